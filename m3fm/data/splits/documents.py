# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Splits as files: study ids by part, and how they were chosen."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..leaks import LEAK_KINDS, LeakReport, find_leaks
from ..near_duplicates import hash_records
from ..opening import OpenSet
from ..schema import StudyRecord
from .grouping import DEFAULT_FRACTIONS, grouped_split

__all__ = ["SplitDocument", "apply_split", "check_set", "read_split", "split_set"]

METHOD = "m3fm.data.splits.grouped_split: whole groups, through chains; stratified by finding, language and modality"


@dataclass(frozen=True)
class SplitDocument(Mapping[str, str]):
    """Hold a split; as a mapping, study id to part.

    Attributes:
        source: The set.
        parts: Part to study ids.
        about: How it was made: "method", "by", "fractions", "seed", and what else stands in the file.
    """

    source: str
    parts: Mapping[str, Sequence[str]] = field(repr=False)
    about: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Index the studies.

        Raises:
            ValueError: If a study is in two parts, or twice in one.
        """
        part_of = {study_id: part for part, ids in self.parts.items() for study_id in ids}
        listed = sum(map(len, self.parts.values()))
        if listed != len(part_of):
            raise ValueError(f"expected each study in one part, got {listed - len(part_of)} studies again")
        object.__setattr__(self, "_part_of", part_of)

    def __getitem__(self, study_id: str) -> str:
        return self._part_of[study_id]  # type: ignore[attr-defined]

    def __iter__(self) -> Iterator[str]:
        return iter(self._part_of)  # type: ignore[attr-defined]

    def __len__(self) -> int:
        return len(self._part_of)  # type: ignore[attr-defined]

    def as_json(self) -> str:
        """Return the text of the file."""
        counts = {part: len(ids) for part, ids in self.parts.items()}
        document = {
            "source": self.source,
            **self.about,
            "studies": len(self),
            "counts": counts,
            "parts": {part: list(ids) for part, ids in self.parts.items()},
        }
        return json.dumps(document, indent=1, ensure_ascii=False) + "\n"

    def write(self, path: Path) -> None:
        """Write the file; the same split gives the same bytes."""
        Path(path).write_text(self.as_json(), encoding="utf-8", newline="\n")


def read_split(path: Path) -> SplitDocument:
    """Read a split that `split_set` or `SplitDocument.write` wrote.

    Raises:
        ValueError: For a missing file, or one that is no split.
    """
    expected = 'expected a JSON object with "source" and "parts", each part a list of study ids'
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or type(error).__name__})") from None
    except ValueError as error:  # not JSON, or not UTF-8; its message may quote ids
        raise ValueError(f"{path}: {expected}, got {type(error).__name__}") from None
    parts = document.get("parts") if isinstance(document, dict) else None
    if not isinstance(parts, dict) or not isinstance(document.get("source"), str):
        raise ValueError(f"{path}: {expected}")
    for ids in parts.values():
        if not isinstance(ids, list) or not all(isinstance(study_id, str) for study_id in ids):
            raise ValueError(f"{path}: {expected}")
    about = {key: value for key, value in document.items() if key not in ("source", "studies", "counts", "parts")}
    try:
        return SplitDocument(document["source"], parts, about)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def apply_split(
    records: Iterable[StudyRecord], document: SplitDocument, on_mismatch: str = "raise"
) -> Iterator[StudyRecord]:
    """Yield studies with the parts of a split.

    Args:
        records: The studies.
        document: The split.
        on_mismatch: "raise", or "skip": leave out studies that the split does not name, and do without those that it
            names and that are not there.

    Raises:
        ValueError: For another `on_mismatch`; for a study that the split does not name, and, at the end, where studies
            that it names did not come.
    """
    if on_mismatch not in ("raise", "skip"):
        raise ValueError(f"on_mismatch must be 'raise' or 'skip', got {on_mismatch!r}")
    missing = set(document)
    for number, record in enumerate(records, start=1):
        part = document.get(record.study_id)
        if part is not None:
            missing.discard(record.study_id)
            yield replace(record, split=part)
        elif on_mismatch == "raise":
            raise ValueError(
                f"study number {number}, of {record.source}, is not in the split of {document.source}: it was made "
                f"for {len(document)} studies of another set or version"
            )
    if missing and on_mismatch == "raise":
        raise ValueError(
            f"{len(missing)} of the {len(document)} studies that the split of {document.source} names are missing"
        )


def split_set(
    opened: OpenSet,
    output: Path,
    fractions: Mapping[str, float] = DEFAULT_FRACTIONS,
    by: Sequence[str] = LEAK_KINDS,
    seed: int = 0,
    workers: int = 0,
    cache_folder: Path | None = None,
) -> LeakReport:
    """Split a set by whole groups (`grouped_split`) and write the split as JSON.

    Args:
        opened: The set, as `open_set` gives it.
        output: The file.
        fractions: Part to its share of the studies.
        by: What no two parts may share.
        seed: Fixes the choice.
        workers: Processes that read images.
        cache_folder: Where hashes of images are kept; None: nowhere.

    Returns:
        What the new parts share; nothing of the kinds in `by`.
    """
    records = list(opened)
    hashes = hash_records(records, workers, cache_folder) if "image" in by else None
    parts = grouped_split(records, fractions, by, seed, hashes)
    about = {"method": METHOD, "by": list(by), "fractions": dict(fractions), "seed": seed}
    source = records[0].source if records else opened.set.name
    document = SplitDocument(source, parts, about)
    document.write(output)
    return find_leaks(records, document, hashes)


def check_set(
    opened: OpenSet,
    by: Sequence[str] = LEAK_KINDS,
    workers: int = 0,
    cache_folder: Path | None = None,
    parts: Mapping[str, str] | None = None,
) -> LeakReport:
    """Report what the parts that a set states have in common.

    Args:
        opened: The set, as `open_set` gives it.
        by: "image" among them: images are compared.
        workers: Processes that read images.
        cache_folder: Where hashes of images are kept.
        parts: Study id to part, as `read_split` gives it; None: the parts that the set states.
    """
    records = list(opened)
    hashes = hash_records(records, workers, cache_folder) if "image" in by else None
    return find_leaks(records, parts, hashes)
