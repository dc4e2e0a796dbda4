# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Validation parts for the sets that come without one.

`python -m m3fm.data.splits --data_root DIR` makes the lists in this folder again, bit for bit.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..studies import Study, read_studies, source_name, training_part

__all__ = ["CARVED_FOLDERS", "carve_validation", "new_to", "split_document", "split_leaks"]

CARVED_FOLDERS = ("covid_chestxray", "kermany_pneumonia_224", "tb_shenzhen_montgomery_128")
FRACTION = 0.15
SEED = 2026
# One collection of many patients must not be most of a validation part.
_LARGEST_GROUP = 0.25


def carve_validation(studies: Sequence[Study], fraction: float, seed: int) -> list[str]:
    """Choose a validation part that shares no patient and no source paper with the rest.

    Groups are visited in an order drawn by the seed. A group is taken when that brings the number of studies with each
    finding, and in each modality, closer to its share; groups above a quarter of the wanted part stay in training.

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
    wanted = {stratum: fraction * count for stratum, count in _strata(studies).items()}
    taken: Counter[str] = Counter()
    chosen: list[str] = []
    # Hashed rather than shuffled: the same on every Python and machine.
    for key in sorted(groups, key=lambda key: hashlib.sha256(f"{seed}/{key}".encode()).digest()):
        group = groups[key]
        gains = _strata(group)
        change = sum(abs(wanted[s] - taken[s] - n) - abs(wanted[s] - taken[s]) for s, n in gains.items())
        if change < 0 and len(group) <= max(1, _LARGEST_GROUP * fraction * len(studies)):
            taken += gains
            chosen += [study.study_id for study in group]
    return sorted(chosen)


def _strata(studies: Sequence[Study]) -> Counter[str]:
    """Count studies per modality and per finding present in it."""
    return Counter(
        stratum
        for study in studies
        for stratum in (
            study.modality,
            *(f"{study.modality}/{name}" for name, value in (study.findings or {}).items() if value > 0),
        )
    )


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
