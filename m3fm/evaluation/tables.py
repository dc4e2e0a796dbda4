# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Render what `metrics.json` holds of reports as Markdown tables."""

from collections.abc import Sequence
from typing import Any

from .titles import ROW_TITLES, number, signed

# A table is read on a screen: what `metrics.json` holds beside these is on the page.
SCORE_COLUMNS = (
    *("bleu_4", "meteor", "rouge_l", "cider_d", "chrf"),
    *("finding_f1_micro", "finding_f1_macro", "located_f1_micro"),
    "distinct",
)
#: Where floors come from unless it has to be said.
TRAINING_PART = "training part"
DIFFERENCE_COLUMNS = ("bleu_4", "rouge_l", "cider_d", "finding_f1_micro")


def render_table(metrics: dict[str, Any]) -> str:
    """Renders metrics as Markdown: the scores of each language, the model against each row, then retrieval.

    Args:
        metrics: As in `metrics.json`; `rows`, `differences`, `floors_from`, `new_patients` and `retrieval` are read,
            each may be missing.
    """
    tables = [_score_table(metrics), _difference_table(metrics), _retrieval_table(metrics.get("retrieval", {}))]
    notes = [
        f"The floors of {language} come from the {where}."
        for language, where in metrics.get("floors_from", {}).items()
        if where != TRAINING_PART
    ]
    return "\n\n".join(block for block in (*tables, "\n".join(notes)) if block)


def _score_table(metrics: dict[str, Any]) -> str:
    rows = metrics.get("rows", {})
    lines = []
    for language in _languages(rows):
        lines += _score_lines(rows, language, f" ({metrics['num_studies'][language]})")
        if new := metrics.get("new_patients"):
            lines += _score_lines(new["rows"], language, f", new patients ({new['num_studies'][language]})")
    return markdown_table([["language", "reports", *SCORE_COLUMNS], *lines]) if lines else ""


def _score_lines(rows: dict[str, Any], language: str, suffix: str) -> list[list[str]]:
    return [
        [language, ROW_TITLES.get(name, name) + suffix, *(number(scores.get(column)) for column in SCORE_COLUMNS)]
        for name, by_language in rows.items()
        if (scores := by_language.get(language))
    ]


def _difference_table(metrics: dict[str, Any]) -> str:
    differences = metrics.get("differences", {})
    lines = [
        [language, ROW_TITLES.get(name, name), *(difference(scores.get(column)) for column in DIFFERENCE_COLUMNS)]
        for language in _languages(differences)
        for name, by_language in differences.items()
        if (scores := by_language.get(language))
    ]
    return markdown_table([["language", "model minus", *DIFFERENCE_COLUMNS], *lines]) if lines else ""


def _retrieval_table(retrieval: dict[str, Any]) -> str:
    lines = []
    columns: list[str] = []
    for name, ways in retrieval.items():
        ends = name.split("-")
        for way, (source, target) in (("forward", ends), ("backward", ends[::-1])):
            found = ways[way]
            columns = [column for column in found if "@" in column]
            numbers = [f"{found[column]:.3f}" for column in columns]
            lines.append([f"{source} → {target}", str(found["num_items"]), *numbers, f"{found['median_rank']:g}"])
    return markdown_table([["retrieval", "items", *columns, "median rank"], *lines]) if lines else ""


def _languages(rows: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(code for by_language in rows.values() for code in by_language))


def markdown_table(lines: Sequence[Sequence[str]]) -> str:
    """Renders lines of cells, the first of them the head."""
    head, *body = lines
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *body))


def difference(entry: dict[str, float | None] | None) -> str:
    """Renders a paired difference with its interval; a dash where it is undefined."""
    if entry is None or signed(entry["difference"]) == "–":
        return "–"
    return f"{signed(entry['difference'])} [{number(entry['low'])}, {number(entry['high'])}]"
