# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Shards that `m3fm data convert` wrote, or any Parquet files with the columns of `m3fm.data.features`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..schema import StudyRecord
from ..tables import BadRow, Reading, is_file
from .study_set import StudySet

__all__ = ["MANIFEST", "SETS", "StoredImage", "read_manifest", "shard_files"]

#: What a conversion says of itself, beside the folder of its shards.
MANIFEST = "m3fm.json"
_REQUIRED = ("study_id", "source", "modality", "images")
# The table of an own folder (`m3fm.data.sets.folder`).
_OWN_TABLE = "metadata.parquet"
# Rows in memory at once; a row holds the images of a study.
_BATCH_ROWS = 16
# Row groups of images kept for studies that are read one by one, in order.
_KEPT_GROUPS = 2


@dataclass(frozen=True)
class StoredImage:
    """Stand for one image in a shard; `read` returns its bytes.

    Attributes:
        file: The shard.
        group: Row group.
        row: Row within the group.
        image: Which of the row's images.
    """

    file: Path
    group: int
    row: int
    image: int

    def read(self, size: int = -1) -> bytes:
        """Return the bytes of the image file from its start, at most `size` of them where that is not negative."""
        data = _images_of(self.file, self.group)[self.row][self.image]["bytes"].as_py()
        return data if size < 0 else data[:size]


@lru_cache(maxsize=_KEPT_GROUPS)
def _images_of(file: Path, group: int) -> Any:
    parquet = _import_parquet()
    with parquet.ParquetFile(file) as opened:
        return opened.read_row_group(group, columns=["images"])["images"]


def shard_files(root: Path) -> list[Path]:
    """Return the Parquet files of a folder or of its `data/`, by split and number."""
    beside = [file for file in sorted(root.glob("*.parquet")) if file.name != _OWN_TABLE]
    return beside or sorted((root / "data").glob("*.parquet"))


def _recognises(root: Path) -> bool:
    if (root / MANIFEST).is_file():
        return True
    files = shard_files(root)
    if not files:
        return False
    try:
        with _import_parquet().ParquetFile(files[0]) as opened:
            return set(_REQUIRED) <= set(opened.schema_arrow.names)
    except (OSError, ValueError):  # pyarrow's own errors are ValueErrors
        return False


def _import_parquet() -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise ImportError('Parquet files need pyarrow: pip install "m3fm[data]"') from None
    return pyarrow.parquet


def _read(root: Path, reading: Reading) -> Iterator[StudyRecord]:
    """Yield the studies of all shards; where images are unchecked, their bytes stay in the shard until asked for."""
    _check_whole(root)
    seen: set[int] = set()
    for file in shard_files(root):
        try:
            rows = _rows(file, with_bytes=reading.images == "required")
            for line, row in rows:
                # Hashes: a set of the ids themselves would grow with the data.
                mark = hash((row["source"], row["study_id"]))
                if mark in seen:
                    reading.tell(BadRow("duplicate_id", file, line, "the study of this row was already given"))
                    continue
                seen.add(mark)
                record = _record(row, file, line, reading)
                if record is not None:
                    yield record
        except (OSError, ValueError) as error:
            if isinstance(error, BadRow):
                raise
            raise BadRow(
                "not_a_row", file, None, f"no Parquet file that can be read: {type(error).__name__}"
            ) from None


def _record(row: dict[str, Any], file: Path, line: int, reading: Reading) -> StudyRecord | None:
    """Return the study of a row; None where it is bad."""
    try:
        record = StudyRecord.from_row(row)
    except (TypeError, ValueError, KeyError) as error:
        message = f"expected the columns of m3fm.data.features(), got {type(error).__name__}"
        reading.tell(BadRow("bad_value", file, line, message))
        return None
    outside = (image.path for image in record.images if image.data is None)
    if reading.images == "required" and not all(path is not None and is_file(path) for path in outside):
        reading.tell(BadRow("missing_file", file, line, "an image file that the row names is not there"))
        return None
    return record


def read_manifest(root: Path) -> dict[str, Any] | None:
    """Return what a conversion says of itself; None where there is none.

    Raises:
        ValueError: If the file is damaged.
    """
    path = root / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(manifest.get("shards"), list):
            raise ValueError
    except (ValueError, AttributeError):
        raise ValueError(f"{path}: expected what m3fm data convert writes; delete the folder to begin anew") from None
    return manifest


def _check_whole(root: Path) -> None:
    manifest = read_manifest(root)
    if manifest is not None and not manifest.get("complete"):
        raise ValueError(f"{root}: the conversion was not finished; run it again to go on with it")


def _rows(file: Path, with_bytes: bool) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the rows of a shard with their numbers from 1."""
    line = 0
    with _import_parquet().ParquetFile(file) as opened:
        if missing := [name for name in _REQUIRED if name not in opened.schema_arrow.names]:
            raise BadRow("wrong_column", file, None, f"expected the columns {missing}")
        names = [name for name in opened.schema_arrow.names if name != "images"]
        columns = [*names, "images" if with_bytes else "images.list.element.path"]
        for group in range(opened.num_row_groups):
            start = line
            in_shard = not with_bytes and _holds_bytes(opened.metadata.row_group(group))
            for batch in opened.iter_batches(_BATCH_ROWS, row_groups=[group], columns=columns):
                for row in batch.to_pylist():
                    if not with_bytes:
                        for number, each in enumerate(row["images"]):
                            each["bytes"] = StoredImage(file, group, line - start, number) if in_shard else None
                    line += 1
                    yield line, row


def _holds_bytes(group: Any) -> bool:
    """Tell whether a row group holds image files, and not their paths alone, from what its column says of itself."""
    columns = (group.column(number) for number in range(group.num_columns))
    chunk = next(column for column in columns if column.path_in_schema == "images.list.element.bytes")
    return chunk.statistics is None or chunk.statistics.null_count < chunk.num_values


SETS = (
    StudySet(
        name="parquet",
        title="Parquet shards of m3fm",
        licence="that of the sets inside",
        url="",
        reference="",
        layout=("data/SPLIT-NNNNN.parquet", MANIFEST),
        recognises=_recognises,
        read=_read,
    ),
)
