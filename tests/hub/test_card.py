# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Measured tables get into Markdown, and the committed pages hold the committed results."""

import json
from pathlib import Path

import pytest

from m3fm import DEFAULT_CHECKPOINT
from m3fm.chest_image_m3fm import REMARKS
from m3fm.hub.card import fill_tables, main

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "model_cards" / "results" / "m3fm-small"
PAGE = "before\n<!-- table: speed -->\nold\n<!-- end -->\nafter\n"


def test_table_is_replaced_and_the_rest_stays(tmp_path):
    (tmp_path / "speed.json").write_text(json.dumps({"table": "| a |\n| --- |\n| 1 |"}), encoding="utf-8")
    page = tmp_path / "page.md"
    page.write_text(PAGE, encoding="utf-8")
    main([str(tmp_path), str(page)])
    expected = "before\n<!-- table: speed -->\n| a |\n| --- |\n| 1 |\n<!-- end -->\nafter\n"
    assert page.read_text(encoding="utf-8") == expected
    assert fill_tables(expected, tmp_path) == expected


def test_metrics_are_rendered(tmp_path):
    metrics = {"rows": {"model": {"en": {"bleu_4": 0.25, "rouge_l": 0.6}}}, "num_studies": {"en": 7}}
    (tmp_path / "speed.json").write_text(json.dumps(metrics), encoding="utf-8")
    assert "| en | model (7) | 0.250 | – | 0.600 |" in fill_tables(PAGE, tmp_path)


def test_a_table_that_was_not_measured_is_refused(tmp_path):
    with pytest.raises(ValueError, match="No results 'speed'"):
        fill_tables(PAGE, tmp_path)


def test_the_card_travels_with_the_weights():
    # A copy, so that the package and every export of the checkpoint carry the card and its licence.
    card = ROOT / "model_cards" / "m3fm-small.md"
    assert (DEFAULT_CHECKPOINT / "README.md").read_bytes() == card.read_bytes()


@pytest.mark.parametrize(
    ("name", "results"),
    [
        ("README.md", RESULTS),
        ("model_cards/m3fm-small.md", RESULTS),
        ("docs/explain.md", RESULTS),
        ("docs/training.md", RESULTS.parent),
        ("docs/evaluation.md", RESULTS.parent),
        ("docs/input.md", RESULTS.parent),
        ("docs/datasets.md", RESULTS.parent),
        ("docs/scaling.md", RESULTS.parent),
    ],
)
def test_pages_print_what_was_measured(name, results):
    page = (ROOT / name).read_text(encoding="utf-8")
    assert "<!-- table: " in page
    assert fill_tables(page, results) == page


def test_every_remark_is_explained():
    page = (ROOT / "docs" / "input.md").read_text(encoding="utf-8")
    table = page.partition("<!-- codes -->\n")[2].partition("<!-- end codes -->")[0]
    rows = [f"| `{code}` | {meaning} |" for code, meaning in REMARKS.items()]
    assert table == "\n".join(["| code | says |", "|---|---|", *rows, ""])
