# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Read JSON documents that hold lists of objects, such as the `annotation.json` of R2Gen, entry by entry.

R2Gen (Chen et al., EMNLP 2020) fixed the layout that most work on report generation shares: one object whose keys
"train", "val" and "test" have a list of entries with `id`, `report` and `image_path`, and a folder `images` beside it.
The file is read whole, as a JSON document has to be; those of this layout have a few thousand reports.
"""

from __future__ import annotations

import json
import re
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ..tables import BadRow, Reading, Row, is_unicode, open_text, shown
from .layouts import table_in

__all__ = ["ANNOTATIONS", "Entry", "opening", "read_annotations", "read_entries"]

ANNOTATIONS = "annotation.json"

# As R2Gen and those who follow it name the parts.
_PARTS = {
    "train": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
}
_BETWEEN = re.compile(r"[\s,]*")
_NAME = re.compile(r'"((?:[^"\\]|\\.)*)"\s*:\s*')
# Where reading can go on after a damaged entry: the next entry, or the next part.
_NEXT = re.compile(r'\}\s*,\s*(?=\{)|\]\s*,\s*(?="[^"\\]*"\s*:\s*\[)')
_OPENING_SIZE = 8192


@dataclass(frozen=True)
class Entry(Row):
    """Hold one entry of a list: a `Row` that also knows its list.

    Attributes:
        part: The key of the list; empty where the document is a list itself.
        number: Place within it, from 1.
    """

    part: str = ""
    number: int = 0

    def bad(self, kind: str, message: str) -> BadRow:
        """Return the error that says what is wrong with this entry; it names the entry too, for files of one line."""
        return BadRow(kind, self.file, self.line, f"{_place(self.part, self.number)}: {message}")

    @property
    def split(self) -> str:
        """The part by the name that it has in records."""
        return _PARTS[self.part]

    def image_paths(self) -> list[str]:
        """Return the paths in `image_path`, one or a list of them, as they are written.

        Raises:
            BadRow: If there is none, or one leads out of the folder of images.
        """
        given = self.values.get("image_path")
        paths = [given] if isinstance(given, str) else given
        if not isinstance(paths, list) or not paths or not all(isinstance(each, str) and each for each in paths):
            raise self.bad("bad_value", "image_path must be a path or a list of paths")
        for each in paths:
            pure = PurePosixPath(each)
            if pure.is_absolute() or ".." in pure.parts:
                raise self.bad("bad_value", "image_path must be a path within the folder of images")
        return paths


def opening(base: Path | None) -> str:
    """Return how the `annotation.json` of a folder starts: enough to tell which set it describes.

    Args:
        base: The folder; None gives an empty text, as does one without the file.
    """
    path = None if base is None else table_in(base, (ANNOTATIONS,))
    if path is None:
        return ""
    try:
        with open_text(path) as file:
            return file.read(_OPENING_SIZE)
    except (OSError, EOFError, zlib.error, zipfile.BadZipFile, BadRow):  # a damaged archive is no known set
        return ""


def read_annotations(path: Path, reading: Reading) -> Iterator[Entry]:
    """Read the entries of an `annotation.json`, in file order.

    Args:
        path: The file.
        reading: Is told of damaged entries, and of those that state another part than the one they are in.

    Raises:
        BadRow: If the file is missing, or is no object of the parts "train", "val" and "test".
    """
    for entry in read_entries(path, reading):
        if entry.part not in _PARTS:
            expected = ", ".join(_PARTS)
            raise BadRow("wrong_column", path, entry.line, f"expected parts named {expected}, got {shown(entry.part)}")
        if entry.values.get("split", entry.part) not in (entry.part, entry.split):
            reading.tell(entry.bad("bad_value", "the entry states another split than the part it is in"))
            continue
        yield entry


def read_entries(path: Path, reading: Reading) -> Iterator[Entry]:
    """Read the objects of a JSON list, or of the lists of a JSON object, in file order; other values are passed over.

    A damaged entry costs itself alone.

    Args:
        path: The file; may be compressed (`m3fm.data.tables.open_text`).
        reading: Is told of what is no JSON object, or not in UTF-8.

    Raises:
        BadRow: If the file is missing, or starts neither a list nor an object.
    """
    with open_text(path) as file:
        text = file.read()
    start = _BETWEEN.match(text).end()
    if text[start : start + 1] not in ("{", "["):
        raise BadRow("not_a_row", path, 1, "expected a JSON list, or a JSON object of lists")
    line, counted = 1, 0
    for part, number, begin, end in _places(text, start):
        line += text.count("\n", counted, begin)
        counted = begin
        try:
            yield _entry(Entry(path, line, {}, part, number), text[begin:end] if end is not None else None)
        except BadRow as error:
            reading.tell(error)


def _entry(place: Entry, written: str | None) -> Entry:
    if written is None:
        raise place.bad("not_a_row", "expected a JSON object; it is damaged, or the file ends too early")
    values = json.loads(written)
    if not isinstance(values, dict):
        raise place.bad("not_a_row", f"expected a JSON object, got {type(values).__name__}")
    if not all(is_unicode(value) for value in values.values()):
        raise place.bad("bad_encoding", "expected UTF-8")
    return Entry(place.file, place.line, values, place.part, place.number)


def _places(text: str, start: int) -> Iterator[tuple[str, int, int, int | None]]:
    """Yield list, place within it, start and end of each entry; the end of one that cannot be read is None."""
    decode = json.JSONDecoder().raw_decode
    is_list = text[start] == "["
    part, number, inside = "", 0, is_list
    position = start + 1
    while True:
        position = _BETWEEN.match(text, position).end()
        here = text[position : position + 1]
        if here == ("]" if is_list else "}") and inside == is_list:
            return
        if here == "]":
            inside = False
            position += 1
            continue
        name = None if inside else _NAME.match(text, position)
        begin = position if name is None else name.end()
        if name is not None and text[begin : begin + 1] == "[":
            part, number, inside, position = name[1], 0, True, begin + 1
            continue
        number += inside
        try:
            # A value within no list, such as a version, has to be stepped over, and to be whole.
            _, end = decode(text, position if inside else begin if name else len(text))
        except (ValueError, RecursionError):
            yield part, number, position, None
            found = _NEXT.search(text, position)
            if found is None:
                return
            inside = found[0].startswith("}")
            position = found.end()
            continue
        if inside:
            yield part, number, position, end
        position = end


def _place(part: str, number: int) -> str:
    return f"entry {number} of {shown(part)}" if part else f"entry {number}"
