# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints as folders for other machines."""

from .export import export_checkpoint, export_remote_code

__all__ = ["export_checkpoint", "export_remote_code"]
