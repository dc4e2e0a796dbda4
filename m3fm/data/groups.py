# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Group what shares a patient, a source paper or any other mark, through whatever chain."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .schema import StudyRecord

__all__ = ["group_keys", "record_marks"]


def group_keys(marks: Iterable[Sequence[str]]) -> list[str]:
    """Name the group of each item: items that share a mark, through whatever chain, are one group.

    A group is called by the smallest of its marks, so its name does not depend on the order of the items.

    Args:
        marks: Of each item, at least one, such as ["patient:1", "doi:10.1148/..."].

    Returns:
        The name of the group of each item.

    Raises:
        ValueError: If an item has no mark.
    """
    parents: dict[str, str] = {}

    def root(mark: str) -> str:
        top = mark
        while (parent := parents.setdefault(top, top)) != top:
            top = parent
        while parents[mark] != top:  # the next look-up of a long chain is one step
            parents[mark], mark = top, parents[mark]
        return top

    firsts = []
    for number, each in enumerate(marks):
        if not each:
            raise ValueError(f"expected at least one mark an item, got none for item {number}")
        first, *others = each
        for other in others:
            low, high = sorted((root(first), root(other)))
            parents[high] = low
        firsts.append(first)
    return [root(first) for first in firsts]


def record_marks(record: StudyRecord) -> list[str]:
    """Return what groups a study: its patient and its documents, or else the study itself.

    Marks that hold no patient and no document of their own, as "study:...", stand in `StudyRecord.documents`.
    """
    patient = [f"patient:{record.patient_id}"] if record.patient_id else []
    return [*patient, *record.documents] or [f"study:{record.study_id}"]
