# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Bring the numbers of `metrics.json` into the tables of the page."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .titles import (
    CONTROLS,
    FLOORS,
    LOWER_IS_BETTER,
    MODEL_ROW,
    ROW_TITLES,
    column_title,
    finding_title,
    metric_groups,
    metric_title,
    number,
    signed,
)

_UNCORRECTED = "Model minus row. The p-values are not corrected for the number of comparisons."


@dataclass(frozen=True)
class Cell:
    """A number, the lines printed small below it, and "better" or "worse" where an interval leaves out 0."""

    text: str
    details: tuple[str, ...] = ()
    kind: str = ""


@dataclass(frozen=True)
class Row:
    """A line of a table; the row of the model is marked."""

    title: str
    cells: list[Cell]
    marked: bool = False


@dataclass(frozen=True)
class Table:
    """A table: `groups` are headed parts of the body, with an empty head where it needs none."""

    caption: str
    corner: str
    head: list[str]
    groups: list[tuple[str, list[Row]]]


def shown_columns(metrics: Mapping[str, Any]) -> list[str]:
    """Returns the languages; of diagnosis the average over labels, or the one label there is."""
    columns = list((metrics.get("rows") or {}).get(MODEL_ROW, {}))
    return ["macro"] if "macro" in columns else columns


def score_tables(metrics: Mapping[str, Any]) -> dict[str, list[Table]]:
    """Returns the tables of scores and of differences by the title of each of `shown_columns`."""
    return {column_title(column).capitalize(): _column_tables(metrics, column) for column in shown_columns(metrics)}


def control_table(metrics: Mapping[str, Any], names: Sequence[str]) -> Table | None:
    """Returns what replacing the images costs in the given metrics, for each of `shown_columns`."""
    differences = metrics.get("differences") or {}
    groups = []
    for column in shown_columns(metrics):
        rows = [
            Row(ROW_TITLES[control].removeprefix("model, "), _difference_cells(differences[control][column], names))
            for control in CONTROLS
            if column in differences.get(control, {})
        ]
        if rows:
            groups.append((column_title(column), rows))
    if not groups:
        return None
    caption = "What the model loses without the right images."
    return Table(caption, "images", [metric_title(name) for name in names], groups)


def finding_table_of(language: str, table: Mapping[str, Mapping[str, Any]]) -> Table:
    """Returns precision, recall and F1 of each finding of a language, the most frequent first."""
    names = sorted(table, key=lambda name: -table[name]["support"])
    shown = [name for name in names if table[name]["support"] or table[name]["predicted"]]
    rows = []
    for name in shown:
        scores = [Cell(number(table[name][key])) for key in ("precision", "recall", "f1")]
        counts = [Cell(f"{table[name][key]:g}") for key in ("support", "predicted")]
        rows.append(Row(finding_title(name), [*scores, *counts]))
    head = ["precision", "recall", "F1", "in references", "in generated reports"]
    return Table(f"Findings, {column_title(language)}", "finding", head, [("", rows)])


def label_table(metrics: Mapping[str, Any]) -> Table:
    """Returns the model's scores of each label, with its threshold."""
    names = _metrics_of(metrics["rows"], [*metrics["labels"]])
    thresholds = metrics.get("thresholds") or {}
    rows = [
        Row(
            column_title(label),
            [
                *_score_cells(metrics, MODEL_ROW, label, names),
                Cell(number(thresholds.get(label))),
                Cell(str((metrics.get("num_studies") or {}).get(label, "–"))),
            ],
        )
        for label in metrics["labels"]
    ]
    head = [*map(metric_title, names), "threshold", "studies"]
    return Table("The model, label by label", "label", head, [("", rows)])


def retrieval_table(retrieval: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Table:
    """Returns recall and chance of each way of retrieval."""
    rows, names = [], []
    for name, ways in retrieval.items():
        ends = [column_title(end) for end in name.split("-")]
        for way, (source, target) in (("forward", ends), ("backward", ends[::-1])):
            found = ways[way]
            names = [key for key in found if "@" in key]
            cells = [Cell(number(found[key])) for key in names]
            cells += [Cell(f"{found['median_rank']:g}"), Cell(f"{found['num_queries']:g} / {found['num_items']:g}")]
            rows.append(Row(f"{source} → {target}", cells))
    caption = "Retrieval in the shared space; chance counts texts that repeat."
    return Table(caption, "query → items", [*names, "median rank", "queries / items"], [("", rows)])


def new_patient_tables(metrics: Mapping[str, Any]) -> list[Table]:
    """Returns the scores of studies whose patients are not among the training studies, where they are told apart."""
    new = metrics.get("new_patients")
    if not new:
        return []
    tables = []
    for column in new["rows"].get(MODEL_ROW, {}):
        for group, names in metric_groups(_metrics_of(new["rows"], [column])).items():
            caption = f"{group}, {column_title(column)}, new patients alone ({new['num_studies'][column]} studies)"
            tables.append(Table(caption, "reports", [*map(metric_title, names)], _grouped(new, column, names)))
    return tables


def _column_tables(metrics: Mapping[str, Any], column: str) -> list[Table]:
    tables = []
    found = {row: scores[column] for row, scores in (metrics.get("differences") or {}).items() if column in scores}
    for group, names in metric_groups(_metrics_of(metrics["rows"], [column])).items():
        head = [metric_title(name) for name in names]
        caption = f"{group}, {column_title(column)}"
        tables.append(Table(caption, "system", head, _grouped(metrics, column, names)))
        compared = [name for name in names if any(name in scores for scores in found.values())]
        if compared:
            head = [metric_title(name) for name in compared]
            rows = [
                Row(ROW_TITLES.get(row, row), _difference_cells(scores, compared)) for row, scores in found.items()
            ]
            tables.append(Table(f"{caption}: differences. {_UNCORRECTED}", "model minus", head, [("", rows)]))
    return tables


def _grouped(scores: Mapping[str, Any], column: str, names: Sequence[str]) -> list[tuple[str, list[Row]]]:
    """Returns the model's row, the floors, the controls, and whatever else there is."""
    rows = [row for row, by_column in scores["rows"].items() if column in by_column]
    others = [row for row in rows if row not in (MODEL_ROW, *FLOORS, *CONTROLS)]
    parts = (
        ("", [MODEL_ROW]),
        ("Floors, without a report model" if "constant_report" in rows else "Floors", FLOORS),
        ("Controls: the model with other images", CONTROLS),
        ("Others", others),
    )
    groups = []
    for title, members in parts:
        lines = [
            Row(ROW_TITLES.get(row, row), _score_cells(scores, row, column, names), row == MODEL_ROW)
            for row in members
            if row in rows
        ]
        if lines:
            groups.append((title, lines))
    return groups


def _score_cells(scores: Mapping[str, Any], row: str, column: str, names: Iterable[str]) -> list[Cell]:
    values = scores["rows"][row].get(column, {})
    intervals, spread = ((scores.get(key) or {}).get(row, {}).get(column, {}) for key in ("intervals", "spread"))
    cells = []
    for name in names:
        interval = intervals.get(name)
        known = interval and interval[0] is not None
        details = (f"{number(interval[0])} to {number(interval[1])}",) if known else ()
        # Of the scores of several draws of training studies.
        details += (f"SD {number(spread[name])}",) if spread.get(name) is not None else ()
        cells.append(Cell(number(values.get(name)), details))
    return cells


def _difference_cells(found: Mapping[str, Mapping[str, Any]], names: Iterable[str]) -> list[Cell]:
    cells = []
    for name in names:
        entry = found.get(name)
        if not is_known(entry):
            cells.append(Cell("–"))
            continue
        kind = verdict(name, entry)
        details = (f"{signed(entry['low'])} to {signed(entry['high'])}", _p_value(entry["p_value"]))
        cells.append(Cell(signed(entry["difference"]), details, kind))
    return cells


def is_known(entry: Mapping[str, Any] | None) -> bool:
    """Tells whether a paired difference and its interval are defined."""
    return entry is not None and entry["difference"] is not None and entry["low"] is not None


def verdict(name: str, entry: Mapping[str, Any]) -> str:
    """Returns "better" or "worse" for the model by a paired difference; "" where its interval contains 0."""
    low, high = entry["low"], entry["high"]
    if name in LOWER_IS_BETTER:
        low, high = -high, -low
    return "better" if low > 0 else "worse" if high < 0 else ""


def _p_value(value: float | None) -> str:
    if value is None:
        return "p –"
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"


def _metrics_of(rows: Mapping[str, Any], columns: Sequence[str]) -> list[str]:
    """Returns the model's metrics in their order; those without a value in any row and column are left out."""
    names = dict.fromkeys(name for column in columns for name in rows[MODEL_ROW].get(column, {}))
    return [
        name
        for name in names
        if any(by_column.get(column, {}).get(name) is not None for by_column in rows.values() for column in columns)
    ]
