# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Rows of large tables by the study that they belong to, held as bytes and not as objects."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from .tables import BadRow, Reading, Row

__all__ = ["RowGroups"]

# Stands between the fields of a row; no text of a table has reason to hold it.
_BETWEEN = "\x1f"


class RowGroups:
    """Hold chosen columns of a table, grouped: the views of a study are found together wherever the table has them.

    A row costs its text and about 30 bytes, so that a table of 377,110 images needs some 40 MB. Iterating yields the
    rows of each group, in the order of their first rows. Texts that make most of a table, as reports, are better read
    in a second pass over it.
    """

    def __init__(
        self, file: Path | None, columns: Sequence[str], keys: array, lines: array, text: bytearray, ends: array
    ):
        self._file = file
        self._columns = tuple(columns)
        self._lines = np.frombuffer(lines, dtype=np.int64)  # (R,)
        self._text = text
        self._ends = np.frombuffer(ends, dtype=np.int64)  # (R + 1,)
        numbers = np.frombuffer(keys, dtype=np.int64)
        self._order = np.argsort(numbers, kind="stable")  # (R,) rows by key, and then as the table has them
        self._keys, starts = np.unique(numbers[self._order], return_index=True)  # (G,)
        self._starts = np.append(starts, len(numbers))  # (G + 1,)

    @classmethod
    def read(
        cls,
        rows: Iterable[Row],
        name: Callable[[Row], str],
        columns: Sequence[str],
        reading: Reading,
        unique: str | None = None,
    ) -> RowGroups:
        """Take up the rows of one table.

        Args:
            rows: As `read_csv` or `read_jsonl` yield them.
            name: Returns what a row belongs to; raises `BadRow` for one that cannot be used.
            columns: Those to keep, as text; empty where a row has not got them.
            reading: Is told of rows that cannot be used.
            unique: Column of which each value may stand in the table once; the first row that has it is kept.
        """
        file, keys, lines, text, ends = None, array("q"), array("q"), bytearray(), array("q", [0])
        seen: set[int] = set()
        for row in rows:
            try:
                key = _hash(name(row))
                value = None if unique is None else _hash(row.require(unique))
                if value in seen:
                    raise row.bad("duplicate_id", f"column {unique!r} repeats that of an earlier row")
            except BadRow as error:
                reading.tell(error)
                continue
            if value is not None:
                seen.add(value)
            file = row.file
            text += _BETWEEN.join(_field(row.values.get(column)) for column in columns).encode()
            keys.append(key)
            lines.append(row.line)
            ends.append(len(text))
        return cls(file, columns, keys, lines, text, ends)

    def __len__(self) -> int:
        """Return the number of groups."""
        return len(self._keys)

    def __iter__(self) -> Iterator[list[Row]]:
        firsts = self._order[self._starts[:-1]]
        for group in np.argsort(firsts, kind="stable"):
            yield self._rows(int(group))

    def get(self, name: str) -> list[Row]:
        """Return the rows that belong to something; none where the table has none."""
        key = _hash(name)
        group = int(np.searchsorted(self._keys, key))
        return self._rows(group) if group < len(self._keys) and self._keys[group] == key else []

    def _rows(self, group: int) -> list[Row]:
        return [self._row(number) for number in self._order[self._starts[group] : self._starts[group + 1]]]

    def _row(self, number: int) -> Row:
        text = self._text[self._ends[number] : self._ends[number + 1]].decode()
        values = dict(zip(self._columns, text.split(_BETWEEN), strict=True))
        return Row(self._file, int(self._lines[number]), values)


def _hash(name: str) -> int:
    # 64 bits: among a million names two are alike once in 37 million tables.
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little", signed=True)


def _field(value: object) -> str:
    return "" if value is None else str(value).replace(_BETWEEN, " ")
