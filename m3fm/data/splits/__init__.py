# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Splits that keep patients, source documents and near-duplicate images together, as lists of study ids.

`grouped_split` makes one for any set, `read_split` and `apply_split` use it. Beside them lie validation parts for the
sets that come without one (`carve_validation`), and a fair split for a set whose published one is not (`FAIR_SPLITS`).

`python -m m3fm.data.splits --data_root DIR` makes the lists in this folder again, bit for bit.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..studies import Study, read_studies, source_name, training_part
from .documents import SplitDocument, apply_split, check_set, read_split, split_set
from .fair import FAIR_SPLITS, fair_split, fair_split_file
from .grouping import DEFAULT_FRACTIONS, choose_groups, grouped_split, named_fractions

__all__ = [
    "CARVED_FOLDERS",
    "DEFAULT_FRACTIONS",
    "FAIR_SPLITS",
    "SplitDocument",
    "apply_split",
    "carve_validation",
    "check_set",
    "fair_split",
    "fair_split_file",
    "grouped_split",
    "named_fractions",
    "new_to",
    "read_split",
    "split_document",
    "split_leaks",
    "split_set",
]

CARVED_FOLDERS = ("covid_chestxray", "kermany_pneumonia_224", "tb_shenzhen_montgomery_128")
FRACTION = 0.15
SEED = 2026


def carve_validation(studies: Sequence[Study], fraction: float, seed: int) -> list[str]:
    """Choose a validation part that shares no patient and no source paper with the rest.

    The part has its share of the studies with each finding, and in each modality (`choose_groups`); groups above a
    quarter of the wanted part stay in training.

    Args:
        studies: In any order: the choice does not depend on it.
        fraction: Wanted share of the studies, between 0 and 1.
        seed: Fixes the order of the groups.

    Returns:
        Study ids, sorted.

    Raises:
        ValueError: For a fraction outside (0, 1).
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must lie between 0 and 1, got {fraction}")
    groups: dict[str, list[Study]] = {}
    for study in studies:
        groups.setdefault(study.grouped_key, []).append(study)
    total = Counter(stratum for study in studies for stratum in _strata(study))
    wanted = {stratum: fraction * count for stratum, count in total.items()}
    strata = {key: [_strata(study) for study in group] for key, group in groups.items()}
    chosen = choose_groups(strata, wanted, fraction * len(studies), seed)
    return sorted(study.study_id for key in chosen for study in groups[key])


def _strata(study: Study) -> tuple[str, ...]:
    """Return what a study counts for: its modality, and each finding present in it."""
    findings = (name for name, value in (study.findings or {}).items() if value > 0)
    return (study.modality, *(f"{study.modality}/{name}" for name in findings))


def split_leaks(studies: Sequence[Study]) -> int:
    """Count the validation studies whose patient or source paper also occurs in training."""
    validation = [study for study in studies if study.split == "validation"]
    return new_to(training_part(studies), validation).count(False)


def new_to(training: Iterable[Study], studies: Iterable[Study]) -> list[bool]:
    """Tell of each study whether neither its patient nor its source paper occurs in `training`.

    Patients and papers are known within one set: those that two sets share are not found.
    """
    known = {(study.source, study.grouped_key) for study in training}
    return [(study.source, study.grouped_key) not in known for study in studies]


def split_document(folder: Path) -> str:
    """Return the JSON text that fixes the validation part of a data folder, and says how it was made."""
    studies = read_studies(folder)
    document = {
        "folder": source_name(folder),
        "method": "m3fm.data.splits.carve_validation: whole groups (patient, source paper), stratified by finding",
        "fraction": FRACTION,
        "seed": SEED,
        "studies": len(studies),
        "validation": carve_validation(studies, FRACTION, SEED),
    }
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"
