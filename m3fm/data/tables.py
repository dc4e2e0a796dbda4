# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Read the tables of data sets row by row: CSV and JSON lines, also compressed, with what is wrong with a row told.

A bad row is named by file, line and kind, never by what it holds, which may identify a patient.
"""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

__all__ = ["BAD_KINDS", "BadRow", "Reading", "Row", "is_file", "is_unicode", "open_text", "read_csv", "read_jsonl"]

#: What may be wrong with a row.
BAD_KINDS = (
    "missing_file",
    "unreadable_image",
    "bad_label",
    "bad_encoding",
    "duplicate_id",
    "wrong_column",
    "bad_value",
    "not_a_row",
)
_MAX_EXAMPLES = 20
_IDENTIFIERS = ("study_id", "patient_id")

Parsed = TypeVar("Parsed")


class BadRow(ValueError):  # noqa: N818 (what it is, more than that it is raised)
    """Tell of a row that cannot be used.

    Args:
        kind: One of `BAD_KINDS`.
        file: The table.
        line: Where the row starts, from 1; None where the whole file is meant.
        message: What came and what was expected; never a value of an id column.
    """

    def __init__(self, kind: str, file: Path, line: int | None, message: str):
        if kind not in BAD_KINDS:
            raise AssertionError(f"{kind!r} is none of {BAD_KINDS}")
        self.kind, self.file, self.line, self.message = kind, file, line, message
        super().__init__(f"{file}{'' if line is None else f', line {line}'}: {message}")


class Reading:
    """Hold how a set is read and what was wrong with it so far.

    Args:
        on_bad: "raise": the first bad row ends the reading; "skip": it is counted and left out.
        images: "required": a row whose image file is not there is bad; "unchecked": nobody looks, for tables without
            their images.

    Attributes:
        counts: Bad rows by (file name, kind).
        examples: The first bad rows of each file and kind.
    """

    def __init__(self, on_bad: str = "raise", images: str = "required"):
        if on_bad not in ("raise", "skip"):
            raise ValueError(f"on_bad must be 'raise' or 'skip', got {on_bad!r}")
        if images not in ("required", "unchecked"):
            raise ValueError(f"images must be 'required' or 'unchecked', got {images!r}")
        self.on_bad = on_bad
        self.images = images
        self.counts: Counter[tuple[str, str]] = Counter()
        self.examples: list[BadRow] = []

    def tell(self, error: BadRow) -> None:
        """Count a bad row, or end the reading with it."""
        if self.on_bad == "raise":
            raise error
        key = (error.file.name, error.kind)
        self.counts[key] += 1
        if self.counts[key] <= _MAX_EXAMPLES:
            self.examples.append(error)

    def each(self, rows: Iterable[Row], parse: Callable[[Row], Parsed]) -> Iterator[Parsed]:
        """Yield what `parse` makes of each row; rows for which it raises `BadRow` are told of."""
        for row in rows:
            try:
                parsed = parse(row)
            except BadRow as error:
                self.tell(error)
            else:
                yield parsed

    def image(self, row: Row, path: Path) -> Path:
        """Return the path of an image, which has to be there where images are required.

        Raises:
            BadRow: If it is not.
        """
        if self.images == "required" and not is_file(path):
            # The folders of many sets are named after patients, so that no path is told.
            raise row.bad("missing_file", "the image file that the row names is not there")
        return path

    def summary(self) -> str:
        """Return a line a file and kind, with the first line number; empty where nothing was wrong."""
        first = {}
        for error in self.examples:
            first.setdefault((error.file.name, error.kind), error)
        return "\n".join(
            f"{count} x {kind} in {file}; the first: {first[file, kind]}"
            for (file, kind), count in sorted(self.counts.items())
        )


@dataclass(frozen=True)
class Row:
    """Hold one row of a table, and where it stands."""

    file: Path
    line: int
    values: dict[str, Any] = field(repr=False)

    def bad(self, kind: str, message: str) -> BadRow:
        """Return the error that says what is wrong with this row, to be raised."""
        return BadRow(kind, self.file, self.line, message)

    def get(self, column: str) -> str | None:
        """Return the text of a column, stripped; None where missing or empty. Identifiers may be whole numbers.

        Raises:
            BadRow: If the value is no text.
        """
        value = self.values.get(column)
        if value is None:
            return None
        if column in _IDENTIFIERS and type(value) is int:
            return str(value)
        if not isinstance(value, str):
            raise self.bad("bad_value", f"column {column!r} must be text, got {type(value).__name__}")
        return value.strip() or None

    def require(self, column: str) -> str:
        """Return the text of a column that must be there.

        Raises:
            BadRow: If it is missing or empty.
        """
        value = self.get(column)
        if value is None:
            raise self.bad(
                "bad_value", f"column {column!r} is missing or empty; the row has {', '.join(sorted(self.values))}"
            )
        return value

    def number(self, column: str) -> float | None:
        """Return the number of a column; None where it is missing or empty.

        Raises:
            BadRow: If it is no finite number.
        """
        value = self.values.get(column)
        if value is None or (isinstance(value, str) and not value.strip()):
            return None
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = float("inf")
        if number - number != 0:  # infinite or not a number
            raise self.bad("bad_value", f"column {column!r} must be a number")
        return number


@contextmanager
def open_text(path: Path) -> Iterator[io.TextIOBase]:
    """Open a text file, also one compressed by gzip or alone in a ZIP archive; wrong bytes become surrogates.

    Raises:
        BadRow: If the file is missing, or the archive is damaged or has not exactly one file.
    """
    if not path.is_file():
        raise BadRow("missing_file", path, None, "no such file")
    kind = path.suffix.lower()
    try:
        with open(path, "rb") as file:
            if kind == ".zip":
                with zipfile.ZipFile(file) as archive, archive.open(_only_member(path, archive)) as member:
                    yield _decoded(member)
            elif kind == ".gz":
                with gzip.open(file) as member:
                    yield _decoded(member)
            else:
                yield _decoded(file)
    except (EOFError, gzip.BadGzipFile, zipfile.BadZipFile, zlib.error):
        raise BadRow("bad_encoding", path, None, f"expected a whole {kind} file, got a damaged one") from None


def _only_member(path: Path, archive: zipfile.ZipFile) -> str:
    names = [name for name in archive.namelist() if not name.startswith("__MACOSX") and name[-1] != "/"]
    if len(names) != 1:
        raise BadRow("not_a_row", path, None, f"expected one file in the archive, got {len(names)}")
    return names[0]


def _decoded(file: Any) -> io.TextIOWrapper:
    return io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")


def read_csv(
    path: Path, columns: Sequence[str], reading: Reading, delimiter: str = ",", has_long_text: bool = False
) -> Iterator[Row]:
    """Read a CSV table, streaming; the file may be compressed (`open_text`).

    Args:
        path: The table, its first line the head. Spaces around names of columns are taken away.
        columns: Those that must be there.
        reading: Is told of rows with too many or too few fields, or in a wrong encoding.
        delimiter: Between fields.
        has_long_text: Whether fields in quotes may go over several lines, as those of reports do. An unclosed quote
            then costs the row that it is in, and no other; what is left of its lines may look like a row, so that
            ids should be checked.

    Raises:
        BadRow: If the file is missing or empty, or has not the columns: nothing of it could be read.
    """
    with open_text(path) as file:
        lines = _Lines(file)
        head = next(lines, None)
        names = [name.strip() for name in next(csv.reader([head], delimiter=delimiter))] if head else []
        if missing := [column for column in columns if column not in names]:
            # Without a head, the first line is a row, which may identify a patient.
            got = names if len(missing) < len(columns) else "none of them"
            raise BadRow("wrong_column", path, 1, f"expected the columns {missing}, got {got}")
        # Spreadsheets leave commas at the end of the head, which rows need not have.
        needed = max((number for number, name in enumerate(names, start=1) if name), default=0)
        while (line := next(lines, None)) is not None:
            if not line.strip():
                continue
            start = lines.number
            fields = _fields(line, delimiter)
            if fields is None and has_long_text:
                fields = _long_fields(line, lines, delimiter, len(names))
            if fields is not None and needed <= len(fields) < len(names):
                fields += [""] * (len(names) - len(fields))
            try:
                yield _row(path, start, names, fields)
            except BadRow as error:
                reading.tell(error)


class _Lines:
    """Lines of a file, of which those looked at in vain can be given back."""

    def __init__(self, file: io.TextIOBase):
        self.file = file
        self.number = 0
        self._returned: list[str] = []

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._returned.pop() if self._returned else self.file.readline()
        if not line:
            raise StopIteration
        self.number += 1
        return line

    def give_back(self, lines: list[str]) -> None:
        self._returned += reversed(lines)
        self.number -= len(lines)


# A report of more lines than this has lost its closing quote.
_MOST_LINES = 500


def _fields(text: str, delimiter: str) -> list[str] | None:
    """Return the fields of one row; None where a quote is not closed."""
    try:
        rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True))
    except csv.Error:
        return None
    return rows[0] if len(rows) == 1 else None


def _long_fields(line: str, lines: _Lines, delimiter: str, width: int) -> list[str] | None:
    """Take further lines until the row is whole; where it never is, they are given back."""
    taken: list[str] = []

    def row() -> Iterator[str]:
        yield line
        for more in itertools.islice(lines, _MOST_LINES):
            taken.append(more)
            yield more

    try:
        # Strict: a quote that was not closed meets the opening quote of a later field, which cannot stand there.
        fields = next(csv.reader(row(), delimiter=delimiter, strict=True), None)
    except csv.Error:
        fields = None
    if fields is not None and len(fields) == width:
        return fields
    lines.give_back(taken)
    return None


def _row(path: Path, line: int, names: list[str], fields: list[str] | None) -> Row:
    if fields is None:
        raise BadRow("not_a_row", path, line, "a quoted field is not closed")
    if len(fields) != len(names):
        raise BadRow("not_a_row", path, line, f"expected {len(names)} fields, got {len(fields)}")
    if not is_unicode(fields):
        raise BadRow("bad_encoding", path, line, "expected UTF-8")
    return Row(path, line, dict(zip(names, fields, strict=True)))


def read_jsonl(path: Path, reading: Reading) -> Iterator[Row]:
    """Read JSON lines, streaming: an object a line; the file may be compressed (`open_text`).

    Raises:
        BadRow: If the file is missing.
    """
    with open_text(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield _json_row(path, number, line)
            except BadRow as error:
                reading.tell(error)


def _json_row(path: Path, number: int, line: str) -> Row:
    if not is_unicode(line):
        raise BadRow("bad_encoding", path, number, "expected a JSON object in UTF-8")
    try:
        values = json.loads(line)
    except ValueError as error:
        # The decoder's own message may quote the line, and with it an identifier.
        raise BadRow(
            "not_a_row", path, number, f"expected a JSON object in UTF-8, got {type(error).__name__}"
        ) from None
    if not isinstance(values, dict):
        raise BadRow("not_a_row", path, number, f"expected a JSON object, got {type(values).__name__}")
    if not is_unicode(values):
        raise BadRow("bad_encoding", path, number, "expected a JSON object in UTF-8")
    return Row(path, number, values)


def is_unicode(value: Any) -> bool:
    """Tell whether text has no half of a surrogate pair: wrong bytes become such, and JSON may name one."""
    if isinstance(value, str):
        return value.isascii() or not any("\ud800" <= character <= "\udfff" for character in value)
    if isinstance(value, list):
        return all(map(is_unicode, value))
    if isinstance(value, dict):
        return all(is_unicode(each) for pair in value.items() for each in pair)
    return True


def is_file(path: Path) -> bool:
    """Tell whether there is a file; a name that no file system takes is that of none."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False
