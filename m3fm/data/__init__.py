# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Data sets of the field read through one schema: studies, their splits, and one finding space."""

from .labels import FINDINGS, Finding, canonical_findings, finding_sentence, finding_table, label_vector
from .studies import ParallelPair, Study, fingerprint, load_parallel, load_studies, training_part

__all__ = [
    "FINDINGS",
    "Finding",
    "ParallelPair",
    "Study",
    "canonical_findings",
    "finding_sentence",
    "finding_table",
    "fingerprint",
    "label_vector",
    "load_parallel",
    "load_studies",
    "training_part",
]
