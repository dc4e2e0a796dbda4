# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""docs/datasets.md names every set, every column, every command, and what a bad row may be called."""

from pathlib import Path

import pytest

from m3fm.data.commands import COMMANDS
from m3fm.data.schema import features
from m3fm.data.sets import get_set, set_names

PAGE = (Path(__file__).parents[2] / "docs" / "datasets.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", set_names())
def test_every_set_is_in_the_table_and_says_what_it_is(name):
    assert f"`{name}`" in PAGE
    each = get_set(name)
    assert each.title and each.licence and each.layout


def test_every_column_of_the_schema_is_in_the_table():
    for column in features():
        base = column.removesuffix("_zh") if column.endswith("_zh") else column
        assert f"`{column}`" in PAGE or f"`{base}_en`" in PAGE


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_in_the_table(name):
    assert f"| `{name} PATH" in PAGE
