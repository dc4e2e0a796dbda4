# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""To be written."""

from .study_set import StudySet

SETS: tuple[StudySet, ...] = ()
