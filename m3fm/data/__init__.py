# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Data sets of the field read through one schema: studies, their splits, and one finding space."""

from .labels import (
    FINDINGS,
    Finding,
    canonical_findings,
    finding_sentence,
    finding_table,
    label_vector,
    shared_findings,
)
from .opening import OpenSet, open_set
from .schema import Box, ImageFile, LabelState, Mask, ReportText, StudyRecord, features
from .sets import find_set, set_names
from .studies import (
    ParallelPair,
    Study,
    fingerprint,
    load_parallel,
    load_studies,
    study_of,
    training_part,
)
from .tables import BadRow, Reading

__all__ = [
    "FINDINGS",
    "BadRow",
    "Box",
    "Finding",
    "ImageFile",
    "LabelState",
    "Mask",
    "OpenSet",
    "ParallelPair",
    "Reading",
    "ReportText",
    "Study",
    "StudyRecord",
    "canonical_findings",
    "features",
    "find_set",
    "finding_sentence",
    "finding_table",
    "fingerprint",
    "label_vector",
    "load_parallel",
    "load_studies",
    "open_set",
    "set_names",
    "shared_findings",
    "study_of",
    "training_part",
]
