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

__all__ = [
    "BAD_KINDS",
    "BadRow",
    "Reading",
    "Row",
    "is_file",
    "is_unicode",
    "open_text",
    "read_csv",
    "read_jsonl",
    "shown",
]

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
_LONGEST_NAME, _MOST_WORDS = 30, 3
_NO_NUMBER = ("", "nan")

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

    def __reduce__(self) -> tuple[type[BadRow], tuple[str, Path, int | None, str]]:
        """Tell workers' processes how to make it again: an exception is made of its message by default."""
        return type(self), (self.kind, self.file, self.line, self.message)


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
            # Without a head, the names of the row's columns are cells of the first row: none is told.
            raise self.bad("bad_value", f"column {column!r} is missing or empty")
        return value

    def number(self, column: str) -> float | None:
        """Return the number of a column; None where it is missing, empty or "nan", as programs for tables write it.

        Raises:
            BadRow: If it is no number, or infinite.
        """
        value = self.values.get(column)
        if value is None or (isinstance(value, str) and value.strip().casefold() in _NO_NUMBER):
            return None
        try:
            number = float(value)
        except (OverflowError, TypeError, ValueError):
            number = float("inf")
        if number != number:
            return None
        if number - number != 0:  # infinite
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
        names = _head(path, head, delimiter)
        if missing := [column for column in columns if column not in names]:
            # Without a head, the first line is a row, which may identify a patient: only known names are told.
            got = [column for column in columns if column in names] or "none of them"
            raise BadRow("wrong_column", path, 1, f"expected the columns {missing}, got {got}")
        # Spreadsheets leave commas at the end of the head, which rows need not have.
        needed = max((number for number, name in enumerate(names, start=1) if name), default=0)
        while (line := next(lines, None)) is not None:
            if not line.strip():
                continue
            start = lines.number
            try:
                fields = _fields(line, delimiter)
                if fields is None and has_long_text:
                    fields = _long_fields(line, lines, delimiter, len(names))
                if fields is not None and needed <= len(fields) < len(names):
                    fields += [""] * (len(names) - len(fields))
                yield _row(path, start, names, fields)
            except _LongFieldError as error:
                reading.tell(BadRow("not_a_row", path, start, f"a field is {error}"))
            except BadRow as error:
                reading.tell(error)


def _head(path: Path, line: str | None, delimiter: str) -> list[str]:
    try:
        names = [name.strip() for name in next(csv.reader([line or ""], delimiter=delimiter), ())]
    except csv.Error:
        message = f"expected the names of the columns, got one that is {_LongFieldError()}"
        raise BadRow("wrong_column", path, 1, message) from None
    if not any(names):
        raise BadRow("wrong_column", path, 1, "expected the names of the columns, got none")
    return names


class _LongFieldError(Exception):
    """Tell of a field that the csv module does not take; its limit is the whole program's, and not ours to raise."""

    def __init__(self) -> None:
        super().__init__(f"longer than {csv.field_size_limit()} characters")


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
    """Return the fields of one row; None where a quote is not closed.

    Raises:
        _LongFieldError: If one is.
    """
    try:
        rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True))
    except csv.Error as error:
        if "field limit" in str(error):
            raise _LongFieldError from None
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
        raise BadRow(
            "not_a_row", path, line, f"a quoted field is not closed within {csv.field_size_limit()} characters"
        )
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
        is_whole = is_unicode(values)
    except RecursionError:
        message = "expected a JSON object, got values that are nested too deeply"
        raise BadRow("not_a_row", path, number, message) from None
    except ValueError as error:
        # The decoder's own message may quote the line, and with it an identifier.
        raise BadRow(
            "not_a_row", path, number, f"expected a JSON object in UTF-8, got {type(error).__name__}"
        ) from None
    if not isinstance(values, dict):
        raise BadRow("not_a_row", path, number, f"expected a JSON object, got {type(values).__name__}")
    if not is_whole:
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


def shown(value: str) -> str:
    """Return what a message may say of a cell: in a row that slipped, any cell may hold a report or an id.

    Args:
        value: What came where a name was expected.

    Returns:
        The value in quotes where it may be such a name: short, of few words, without a digit; else its length.
    """
    is_name = len(value) <= _LONGEST_NAME and len(value.split()) <= _MOST_WORDS
    if is_name and not any(character.isdigit() for character in value):
        return repr(value)
    return f"a text of {len(value)} characters"


def is_file(path: Path) -> bool:
    """Tell whether there is a file; a name that no file system takes is that of none."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False
