# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
from pathlib import Path

import pytest

from m3fm.data.row_groups import RowGroups
from m3fm.data.tables import BadRow, Reading, Row

FILE = Path("table.csv")
ROWS = [
    Row(FILE, 2, {"study": "b", "view": "1", "text": "ä"}),
    Row(FILE, 3, {"study": "a", "view": "2", "text": ""}),
    Row(FILE, 5, {"study": "b", "view": "3", "text": "x\x1fy\n"}),
    Row(FILE, 6, {"study": "", "view": "4"}),
    Row(FILE, 7, {"study": "a", "view": "2"}),
]


def group(rows, reading, unique=None):
    return RowGroups.read(rows, lambda row: row.require("study"), ("view", "text"), reading, unique)


def test_groups_come_in_the_order_of_their_first_rows():
    reading = Reading("skip")
    groups = group(ROWS, reading, unique="view")
    assert len(groups) == 2
    assert [[(row.line, row.values) for row in rows] for rows in groups] == [
        [(2, {"view": "1", "text": "ä"}), (5, {"view": "3", "text": "x y\n"})],
        [(3, {"view": "2", "text": ""})],
    ]
    assert [(error.kind, error.line) for error in reading.examples] == [("bad_value", 6), ("duplicate_id", 7)]


def test_get():
    groups = group(ROWS, Reading("skip"))
    assert [row.line for row in groups.get("a")] == [3, 7]
    assert groups.get("a")[0].file == FILE
    assert groups.get("c") == groups.get("") == []


def test_no_rows():
    groups = group([], Reading())
    assert (len(groups), list(groups), groups.get("a")) == (0, [], [])


def test_missing_columns_are_empty_and_numbers_are_text():
    rows = [Row(FILE, 1, {"study": "a", "view": None, "text": -1.0})]
    assert group(rows, Reading()).get("a")[0].values == {"view": "", "text": "-1.0"}


def test_bad_row_ends_the_reading_where_asked():
    with pytest.raises(BadRow, match=r"table.csv, line 6"):
        group(ROWS, Reading("raise"))
    with pytest.raises(BadRow, match=r"line 7: column 'view' repeats that of an earlier row"):
        group([*ROWS[:3], ROWS[4]], Reading("raise"), unique="view")


def test_many_groups_are_told_apart():
    rows = (Row(FILE, number, {"study": str(number % 5000), "view": str(number)}) for number in range(10000))
    groups = group(rows, Reading())
    assert len(groups) == 5000
    assert all(
        [row.values["view"] for row in rows] == [str(number), str(number + 5000)] for number, rows in enumerate(groups)
    )
