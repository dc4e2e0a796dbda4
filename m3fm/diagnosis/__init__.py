# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Zero-shot diagnosis around the flat modules: default labels, calibration, tables of many files."""

from .prompts import default_diagnosis, default_phrases

__all__ = ["default_diagnosis", "default_phrases"]
