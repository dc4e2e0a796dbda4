# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Fair splits for sets whose published split shares patients, papers or images between its parts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from ..leaks import LEAK_KINDS
from ..near_duplicates import hash_records
from ..opening import open_set
from ..schema import StudyRecord
from ..sets.cov_ctr import source_documents
from .documents import METHOD, SplitDocument
from .grouping import DEFAULT_FRACTIONS, grouped_split

__all__ = ["FAIR_SPLITS", "fair_records", "fair_split", "fair_split_file"]

#: Sets that have a fair split, by folder, and what to know of it.
FAIR_SPLITS = {
    "cov_ctr": "Made of the 674 images of the published training and validation parts and of those without a report. "
    "The published test part (72 images) is not among them, as it was held back: m3fm data split makes a fair split "
    "of the full set.",
}
SEED = 0


def fair_split_file(name: str) -> Path:
    """Return the file of the fair split of a set, for `read_split`.

    Raises:
        ValueError: If the set has none.
    """
    if name not in FAIR_SPLITS:
        raise ValueError(f"no fair split of {name!r}; expected one of {', '.join(FAIR_SPLITS)}")
    # Not called as the folder is: that is the name of a validation part that `load_studies` applies by itself.
    return Path(__file__).parent / f"{name}-fair.json"


def fair_records(folder: Path) -> Iterator[StudyRecord]:
    """Yield the studies of COV-CTR with all source documents known: by its table, and by the names of its files."""
    for record in open_set(folder):
        named = [mark for image in record.images if image.path for mark in source_documents(image.path.name)]
        yield replace(record, documents=tuple(dict.fromkeys((*record.documents, *named))))


def fair_split(folder: Path) -> SplitDocument:
    """Split a set by patient, source document and near-duplicate image.

    Args:
        folder: Called as one of `FAIR_SPLITS`.
    """
    records = list(fair_records(folder))
    parts = grouped_split(records, DEFAULT_FRACTIONS, LEAK_KINDS, SEED, hash_records(records, progress=False))
    about = {
        "method": METHOD,
        "by": list(LEAK_KINDS),
        "fractions": DEFAULT_FRACTIONS,
        "seed": SEED,
        "note": FAIR_SPLITS[Path(folder).name],
    }
    return SplitDocument(Path(folder).name, parts, about)
