# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Choose parts of a data set by whole groups, so that each part has its share of everything."""

from __future__ import annotations

import hashlib
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from ..groups import group_keys
from ..leaks import LEAK_KINDS, study_marks
from ..near_duplicates import RecordHashes
from ..schema import LabelState, StudyRecord

__all__ = ["DEFAULT_FRACTIONS", "choose_groups", "grouped_split", "named_fractions"]

DEFAULT_FRACTIONS = {"train": 0.8, "validation": 0.1, "test": 0.1}
# One collection of many patients must not be most of a part.
_LARGEST_GROUP = 0.25
_MOST_PASSES = 20
# Of every study, so that the size of a part counts too.
_STUDY = "study"

#: What a study counts for.
Strata = tuple[str, ...]


def choose_groups(
    groups: Mapping[str, Sequence[Strata]], wanted: Mapping[str, float], size: float, seed: int
) -> list[str]:
    """Choose groups that together have about the wanted number of studies of each stratum.

    Groups are visited in an order drawn by the seed. A group is taken when that brings the counts closer to what is
    wanted, unless it is more than a quarter of the part and larger than half of the groups are.

    Args:
        groups: Name of a group to the strata of each of its studies.
        wanted: Stratum to number of studies.
        size: Wanted number of studies.
        seed: Fixes the order.

    Returns:
        Names of groups, in the order of the visit.
    """
    taken: Counter[str] = Counter()
    chosen = []
    largest = _largest(groups, size)
    for name in _drawn(groups, seed):
        gains = _gains(groups[name])
        change = sum(abs(wanted[s] - taken[s] - n) - abs(wanted[s] - taken[s]) for s, n in gains.items())
        if change < 0 and len(groups[name]) <= largest:
            taken += gains
            chosen.append(name)
    return chosen


def balance_groups(
    groups: Mapping[str, Sequence[Strata]], chosen: Iterable[str], wanted: Mapping[str, float], size: float, seed: int
) -> list[str]:
    """Improve a choice: groups are taken or given back while that brings the shares closer to what is wanted.

    Here strata count by the share of what is wanted that is missing or too much, so that rare ones weigh as much as
    common ones.

    Args:
        groups: As for `choose_groups`.
        chosen: What that returned.
        wanted: As for `choose_groups`.
        size: As for `choose_groups`.
        seed: As for `choose_groups`.

    Returns:
        Names of groups, in the order of the visit.
    """
    largest = _largest(groups, size)
    order = [name for name in _drawn(groups, seed) if len(groups[name]) <= largest]
    gains = {name: _gains(groups[name]) for name in order}
    kept = set(chosen)
    excess = {stratum: -count for stratum, count in wanted.items()}
    for name in kept:
        for stratum, count in gains[name].items():
            excess[stratum] += count
    for _ in range(_MOST_PASSES):
        changed = False
        for name in order:
            sign = -1 if name in kept else 1
            change = sum(
                (abs(excess[s] + sign * n) - abs(excess[s])) / max(1.0, wanted[s]) for s, n in gains[name].items()
            )
            if change < -1e-9:  # less is rounding, and would go back and forth
                kept ^= {name}
                changed = True
                for stratum, count in gains[name].items():
                    excess[stratum] += sign * count
        if not changed:
            break
    return [name for name in order if name in kept]


def _drawn(groups: Mapping[str, Sequence[Strata]], seed: int) -> list[str]:
    # Hashed rather than shuffled: the same on every Python and machine.
    return sorted(groups, key=lambda name: hashlib.sha256(f"{seed}/{name}".encode()).digest())


def _gains(strata: Sequence[Strata]) -> Counter[str]:
    return Counter(stratum for study in strata for stratum in study)


def _largest(groups: Mapping[str, Sequence[Strata]], size: float) -> float:
    # In a small set a quarter of a part may be less than one patient's studies.
    return max(_LARGEST_GROUP * size, statistics.median(map(len, groups.values())) if groups else 1)


def grouped_split(
    records: Iterable[StudyRecord],
    fractions: Mapping[str, float] = DEFAULT_FRACTIONS,
    by: Sequence[str] = LEAK_KINDS,
    seed: int = 0,
    hashes: RecordHashes | None = None,
) -> dict[str, list[str]]:
    """Split a set so that no two parts share a patient, a source document or a near-duplicate image.

    Studies that share any of these, through whatever chain, are a group and stay together. Each part gets its share of
    every modality and, within a modality, of every finding and every language of reports (`balance_groups`); what no
    other part takes, large groups above all, is the part with the largest fraction. Equal fractions give folds for
    cross-validation.

    Args:
        records: The studies, in any order: the split does not depend on it.
        fractions: Part to its share of the studies; together 1.
        by: What no two parts may share, some of "patient", "document", "image".
        seed: Fixes the choice.
        hashes: Of the images of these studies (`hash_records`); needed by "image".

    Returns:
        Part to study ids, sorted.

    Raises:
        ValueError: For wrong fractions, an unknown kind, "image" without hashes, a study id that comes twice, or a
            part that would be empty.
    """
    _check_fractions(fractions)
    if "image" in by and hashes is None:
        raise ValueError('by "image": expected the hashes of the images (hash_records), got None')
    marks, strata, ids = [], [], []
    for record in records:
        images = () if hashes is None else hashes.marks.get((record.source, record.study_id), ())
        shared = study_marks(record, images, by)
        marks.append([mark for each in shared.values() for mark in each] or [f"study:{record.study_id}"])
        strata.append(_strata(record))
        ids.append(record.study_id)
    if len(set(ids)) < len(ids):
        raise ValueError(f"expected each study once, got {len(ids) - len(set(ids))} study ids again")
    groups: dict[str, list[int]] = {}
    for number, key in enumerate(_stable_keys(group_keys(marks), ids)):
        groups.setdefault(key, []).append(number)
    parts = _filled(groups, strata, fractions, seed)
    if empty := [part for part in fractions if not parts[part]]:
        raise ValueError(
            f"{len(ids)} studies in {len(groups)} groups that must stay together are too few for these parts: "
            f"{', '.join(empty)} would be empty"
        )
    return {part: sorted(ids[number] for number in parts[part]) for part in fractions}


def _filled(
    groups: Mapping[str, Sequence[int]], strata: Sequence[Strata], fractions: Mapping[str, float], seed: int
) -> dict[str, list[int]]:
    """Fill the parts with groups, the smallest part first; the largest takes what is left."""
    left = dict(groups)
    total = Counter(stratum for each in strata for stratum in each)
    rest = max(fractions, key=lambda part: fractions[part])
    parts = {}
    for part in sorted(fractions, key=lambda part: (part == rest, fractions[part], part)):
        names = list(left)
        if part != rest:
            wanted = {stratum: fractions[part] * count for stratum, count in total.items()}
            open_groups = {name: [strata[number] for number in numbers] for name, numbers in left.items()}
            size = fractions[part] * len(strata)
            names = choose_groups(open_groups, wanted, size, seed)
            names = balance_groups(open_groups, names, wanted, size, seed)
        parts[part] = [number for name in names for number in left.pop(name)]
    return parts


def named_fractions(shares: Sequence[float]) -> dict[str, float]:
    """Return the parts that two or three shares mean: training, validation and, of three, test.

    Raises:
        ValueError: For another number of shares.
    """
    if len(shares) not in (2, 3):
        raise ValueError(f"expected two or three fractions, got {len(shares)}")
    return dict(zip(DEFAULT_FRACTIONS, shares, strict=False))


def _check_fractions(fractions: Mapping[str, float]) -> None:
    values = list(fractions.values())
    if len(values) < 2 or not all(0 < value < 1 for value in values) or abs(sum(values) - 1) > 1e-6:
        raise ValueError(f"fractions must be two or more between 0 and 1 that add up to 1, got {values}")


def _stable_keys(keys: Sequence[str], ids: Sequence[str]) -> list[str]:
    """Name each group by the smallest of its study ids: marks of images are numbered in the order of the studies."""
    smallest: dict[str, str] = {}
    for key, study_id in zip(keys, ids, strict=True):
        smallest[key] = min(smallest.get(key, study_id), study_id)
    return [smallest[key] for key in keys]


def _strata(record: StudyRecord) -> Strata:
    """Return what a study counts for: its modality and, within it, its findings and the languages of its reports."""
    findings = (name for name, state in record.findings.items() if state is LabelState.POSITIVE)
    return (_STUDY, record.modality, *(f"{record.modality}/{name}" for name in (*findings, *record.reports)))
