# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Find the tables and images of a set where people keep them: compressed, in a folder of its own, in parts."""

from __future__ import annotations

import csv
import os
import re
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..tables import BadRow, Row, is_file, open_text

__all__ = [
    "FileRow",
    "ImageFolders",
    "columns_of",
    "find_base",
    "only_folder",
    "plain_name",
    "table_in",
    "tables_like",
]

_COMPRESSED = ("", ".gz", ".zip")
# Archives and mirrors put a set into a folder in a folder, as in physionet.org/files/vindr-cxr/1.0.0.
_DEEPEST = 5
# A folder with more entries holds images and wraps nothing.
_MOST_ENTRIES = 200


def find_base(root: Path, names: Sequence[str]) -> Path | None:
    """Return the folder that has one of the tables: `root`, or what lies in it as the only folder, and so on.

    Args:
        root: Where the user says that the set is.
        names: Tables by their names in the set's layout; they may be compressed.
    """
    folder: Path | None = Path(root)
    for _ in range(_DEEPEST):
        if folder is None:
            return None
        if table_in(folder, names) is not None:
            return folder
        folder = only_folder(folder)
    return None


def table_in(base: Path, names: Sequence[str]) -> Path | None:
    """Return the first of the tables that is there, as it is or compressed."""
    for name in names:
        for suffix in _COMPRESSED:
            path = base / f"{name}{suffix}"
            if path.is_file():
                return path
    return None


def tables_like(base: Path, pattern: str) -> list[Path]:
    """Return the tables of a folder whose whole name, without what tells of compression, is as a pattern says.

    Those whose names sort last come first: these are the newest where names have versions or dates.
    """
    endings = "|".join(map(re.escape, _COMPRESSED))
    whole = re.compile(rf"(?:{pattern})(?:{endings})")
    return [base / name for name in sorted(os.listdir(base), reverse=True) if whole.fullmatch(name)]


def columns_of(table: Path) -> frozenset[str]:
    """Return the names of a table's columns, from its head alone: many sets have a `train.csv` or `metadata.csv`.

    Empty where the file cannot be read: whoever reads the table says why.
    """
    try:
        with open_text(table) as file:
            return frozenset(name.strip() for name in next(csv.reader([file.readline()]), ()))
    except (OSError, EOFError, ValueError, csv.Error, zipfile.BadZipFile, zlib.error):
        return frozenset()


def only_folder(folder: Path) -> Path | None:
    """Return the only folder in a folder; None where there are several, or none."""
    found = None
    try:
        with os.scandir(folder) as entries:
            for number, entry in enumerate(entries):
                if number == _MOST_ENTRIES:
                    return None
                if entry.is_dir() and not entry.name.startswith((".", "__MACOSX")):
                    if found is not None:
                        return None
                    found = entry.name
    except OSError:
        return None
    return None if found is None else folder / found


def plain_name(row: Row, column: str) -> str:
    """Return what a column names as a file, which must not lead out of its folder.

    Raises:
        BadRow: If it is missing, or has a folder in it.
    """
    name = row.require(column)
    if "/" in name or "\\" in name or name in (".", ".."):
        raise row.bad("bad_value", f"column {column!r} must name a file without a folder")
    return name


@dataclass(frozen=True)
class FileRow(Row):
    """Hold a place in one of the files of a set that has a file a study: bad ones are counted by their folder.

    Attributes:
        file: The folder, or the archive, that the file is in.
        name: Of the file. Messages have it: it is for sets whose publishers name files in a way that tells nothing.
    """

    name: str = ""

    def bad(self, kind: str, message: str) -> BadRow:
        """Return the error that says what is wrong here; it names the file, and its folder as the table."""
        return BadRow(kind, self.file, None, f"{self.name}, line {self.line}: {message}")


class ImageFolders:
    """Find image files that lie in several folders, in one of several formats, by the name that a table has for them.

    The place in which the last one was is tried first: images of one folder follow each other in the tables.

    Args:
        base: The folder of the set.
        folders: Patterns below it; the first has no wildcard, and is named where nothing is found.
        suffixes: Formats, with the dot; "" where the tables name files with their suffix.
    """

    def __init__(self, base: Path, folders: Sequence[str], suffixes: Sequence[str]):
        found = [folder for pattern in folders for folder in sorted(base.glob(pattern)) if folder.is_dir()]
        found = list(dict.fromkeys(found)) or [base / folders[0]]
        self._places = [(folder, suffix) for folder in found for suffix in suffixes]

    def find(self, name: str) -> Path:
        """Return the file of a name; where it is nowhere, the path on which it was expected."""
        for number, (folder, suffix) in enumerate(self._places):
            path = folder / f"{name}{suffix}"
            if is_file(path):
                if number:
                    self._places.insert(0, self._places.pop(number))
                return path
        folder, suffix = self._places[0]
        return folder / f"{name}{suffix}"
