# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Compare two finished runs on the same studies: is the difference more than chance?

`compare_runs` is what `m3fm compare` runs. Scores are computed anew from the two `predictions.jsonl`, with the same
code for both, and resampled together: every draw of patients is scored for both runs, so that what patients have in
common cancels out of the difference.
"""

import json
import sys
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .diagnosis_metrics import MACRO, LabelMeasurement, MacroMeasurement
from .resampling import LEVEL, Measurement, cluster_weights, paired_difference, point_scores, resampled_scores
from .runs import METRICS_FILE, NOTICE, PREDICTIONS, library_versions, read_predictions, write_json
from .tables import markdown_table
from .titles import LOWER_IS_BETTER, number

TASKS = ("report", "diagnosis")
# Facts of a run that tell it from another one.
_IDENTITY = ("model", "model_sha256", "data", "data_sha256", "split", "seed", "shots", "command")
_SIGNIFICANCE = 1 - LEVEL
# Percentile intervals of fewer groups are too narrow (simulated in the tests).
_FEW_GROUPS = 20
# Of the studies, not of a run: there is nothing to test.
_NOT_COMPARED = ("prevalence",)


@dataclass(frozen=True)
class Run:
    """Holds a finished run.

    Attributes:
        name: Of its folder, as given.
        metrics: Its `metrics.json`.
        predictions: Study id to row of `predictions.jsonl`.
    """

    name: str
    metrics: dict[str, Any]
    predictions: dict[str, dict[str, Any]] = field(repr=False)


@dataclass(frozen=True)
class Column:
    """Holds what two runs are worth on the same studies: in one language, or on one label.

    Attributes:
        groups: The patient or paper of each study.
        first: Measurements of the first run on these studies.
        second: Of the second run, in the same order of studies.
    """

    groups: Sequence[Hashable]
    first: Sequence[Measurement]
    second: Sequence[Measurement]


def compare_runs(
    first_dir: str | Path,
    second_dir: str | Path,
    num_resamples: int = 1000,
    seed: int = 0,
    output: str | Path | None = None,
) -> dict[str, Any]:
    """Compares two runs of `m3fm evaluate`, and prints a table for each language or label.

    Args:
        first_dir: Output folder of a run.
        second_dir: Output folder of a run on the same studies; the order of the two only turns signs.
        num_resamples: Draws of patients.
        seed: Of the draws.
        output: A JSON file to write.

    Returns:
        `columns`: language or label -> metric -> `first`, `second`, `difference` (first minus second), `low`, `high`,
        `p_value`, and `p_holm`, corrected for the number of metrics in that column; `num_studies` and `num_groups` by
        column; the facts of both runs; `notes` on what differs beside the model; `table`.

    Raises:
        ValueError: If a run is not finished, or the two are of different tasks, studies, patients or references.
    """
    first, second = (read_run(Path(folder)) for folder in (first_dir, second_dir))
    task = _common_task(first, second)
    columns = _COLUMNS[task](first, second)
    compared = {name: compare_column(column, num_resamples, seed) for name, column in columns.items()}
    result = {
        "task": "compare",
        "of": task,
        "first": _identity(first),
        "second": _identity(second),
        "seed": seed,
        "num_resamples": num_resamples,
        "num_studies": {name: len(column.groups) for name, column in columns.items()},
        "num_groups": {name: len(set(column.groups)) for name, column in columns.items()},
        "columns": compared,
        "notes": _notes(first, second, columns, max(map(len, compared.values())), num_resamples),
        "versions": library_versions(),
        "notice": NOTICE,
    }
    result["table"] = render_comparison(result)
    if output is not None:
        write_json(Path(output), result)
    sys.stdout.write(result["table"] + "\n")
    return result


def read_run(folder: Path) -> Run:
    """Reads the output folder of a finished run.

    Raises:
        ValueError: If it is none, or holds no predictions with the group of each study.
    """
    path = folder / METRICS_FILE
    if not path.is_file() or not (folder / PREDICTIONS).is_file():
        raise ValueError(f"{folder} holds no finished run: expected {METRICS_FILE} and {PREDICTIONS}.")
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise ValueError(f"{path} is damaged: expected JSON.") from None
    if not isinstance(metrics, dict) or metrics.get("task") not in TASKS:
        task = metrics.get("task") if isinstance(metrics, dict) else None
        raise ValueError(f"{path}: expected a run of one of the tasks {list(TASKS)}, got {task!r}.")
    predictions = read_predictions(folder / PREDICTIONS)
    if not predictions or any("group" not in row for row in predictions.values()):
        raise ValueError(
            f"{folder / PREDICTIONS}: expected a line a study with its group, as `m3fm evaluate` writes them."
        )
    return Run(str(folder), metrics, predictions)


def compare_column(column: Column, num_resamples: int, seed: int) -> dict[str, dict[str, float]]:
    """Compares two systems metric by metric on shared resamples of patients; see `compare_runs`."""
    count = len(column.groups)
    points = [point_scores(side, count) for side in (column.first, column.second)]
    weights = cluster_weights(column.groups, num_resamples, seed)
    draws = [resampled_scores(side, weights) for side in (column.first, column.second)]
    rows = {}
    for name in (name for name in points[0] if name in points[1] and name not in _NOT_COMPARED):
        first, second = (point[name] for point in points)
        tested = paired_difference(draws[0][name], draws[1][name], first - second)
        rows[name] = {"first": first, "second": second, **tested}
    corrected = holm([row["p_value"] for row in rows.values()])
    return {name: row | {"p_holm": p_value} for (name, row), p_value in zip(rows.items(), corrected, strict=True)}


def holm(p_values: Sequence[float]) -> list[float]:
    """Corrects p-values for their number by Holm's step-down procedure (Scandinavian Journal of Statistics, 1979).

    A value that is not defined (NaN) stays so, and does not count.
    """
    corrected = [float("nan")] * len(p_values)
    order = sorted((place for place, value in enumerate(p_values) if value == value), key=lambda i: p_values[i])
    largest = 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[place]))
        corrected[place] = largest
    return corrected


def render_comparison(result: dict[str, Any]) -> str:
    """Renders what `compare_runs` returns as Markdown."""
    blocks = [
        "\n".join(f"{side}: {_describe(result[side])}" for side in ("first", "second")),
        f"Difference: first minus second, with its {LEVEL:.0%} interval and p-value from {result['num_resamples']} "
        f"resamples of patients (seed {result['seed']}); p (Holm) is corrected for the metrics of the table.",
    ]
    for name, rows in result["columns"].items():
        lines = [["metric", "first", "second", "difference", f"{LEVEL:.0%} interval", "p", "p (Holm)"]]
        for metric, row in rows.items():
            interval = f"[{_signed(row['low'])}, {_signed(row['high'])}]"
            scores = [number(row["first"]), number(row["second"]), _signed(row["difference"])]
            lines.append([metric, *scores, interval, *(_p_value(row[key]) for key in ("p_value", "p_holm"))])
        head = f"**{name}**: {result['num_studies'][name]} studies of {result['num_groups'][name]} groups"
        blocks.append(f"{head}\n\n{markdown_table(lines)}")
    blocks += [f"Note: {note}" for note in result["notes"]]
    return "\n\n".join(blocks)


def _describe(identity: dict[str, Any]) -> str:
    facts = [f"{name} {identity[name]}" for name in ("model", "data", "split", "shots") if name in identity]
    return f"{identity['folder']} ({', '.join(facts)})"


def _p_value(value: float) -> str:
    # It is never 0, and must not look so.
    return "<0.001" if value < 0.001 else number(value)


def _signed(value: float) -> str:
    return f"+{text}" if not (text := number(value)).startswith(("-", "–")) else text


def _identity(run: Run) -> dict[str, Any]:
    return {"folder": run.name} | {name: run.metrics[name] for name in _IDENTITY if name in run.metrics}


def _common_task(first: Run, second: Run) -> str:
    tasks = [run.metrics["task"] for run in (first, second)]
    if tasks[0] != tasks[1]:
        raise ValueError(f"Expected two runs of one task, got {tasks[0]!r} and {tasks[1]!r}.")
    return tasks[0]


def _notes(first: Run, second: Run, columns: dict[str, Column], num_metrics: int, num_resamples: int) -> list[str]:
    """Says what a reader of the numbers has to know beside them."""
    notes = []
    changed = [
        name for name in ("data_sha256", "split", "decoding") if first.metrics.get(name) != second.metrics.get(name)
    ]
    if changed:
        notes.append(
            f"the runs differ in {', '.join(changed)} too (studies and references are the same): the difference need "
            "not be the model's."
        )
    alone = sorted(set(_column_names(first)) ^ set(_column_names(second)))
    if alone:
        notes.append(f"only one of the runs has {', '.join(alone)}: left out.")
    few = [name for name, column in columns.items() if len(set(column.groups)) < _FEW_GROUPS]
    if few:
        notes.append(
            f"fewer than {_FEW_GROUPS} groups in {', '.join(few)}: intervals are too narrow, and p-values too small."
        )
    if first.metrics["task"] == "diagnosis":
        notes.append(f"of {', '.join(sorted(LOWER_IS_BETTER))} the lower is the better.")
    smallest = min(1.0, num_metrics * 2 / (num_resamples + 1))
    if smallest > _SIGNIFICANCE:
        notes.append(
            f"with {num_resamples} resamples no corrected p-value of {num_metrics} metrics can fall below "
            f"{smallest:.3f}: ask for more."
        )
    return notes


def _column_names(run: Run) -> list[str]:
    return list(run.metrics.get("languages" if run.metrics["task"] == "report" else "labels", ()))


def _shared_column_names(first: Run, second: Run) -> list[str]:
    names = [name for name in _column_names(first) if name in _column_names(second)]
    if not names:
        raise ValueError(
            f"The runs have nothing in common: {', '.join(_column_names(first)) or 'nothing'} and "
            f"{', '.join(_column_names(second)) or 'nothing'}."
        )
    return names


def _paired_rows(
    first: Run, second: Run, name: str, truth: Callable[[dict[str, Any]], Any]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Returns the rows of both runs whose truth in a column is known, in the first run's order.

    Raises:
        ValueError: Naming what differs: studies, what is true of them, or which of them share a patient.
    """
    sides = [{key: row for key, row in run.predictions.items() if truth(row) is not None} for run in (first, second)]
    if sides[0].keys() != sides[1].keys():
        common = len(sides[0].keys() & sides[1].keys())
        raise ValueError(
            f"{name}: expected two runs on the same studies, got {len(sides[0])} and {len(sides[1])}, of which "
            f"{common} are in both."
        )
    if not sides[0]:
        raise ValueError(f"{name}: the runs have no study with a reference.")
    pairs = [(row, sides[1][key]) for key, row in sides[0].items()]
    other = sum(truth(row) != truth(twin) for row, twin in pairs)
    if other:
        raise ValueError(
            f"{name}: expected the same references, got {other} of {len(pairs)} studies with another one."
        )
    together = {(row["group"], twin["group"]) for row, twin in pairs}
    if not len(together) == len({group for group, _ in together}) == len({group for _, group in together}):
        raise ValueError(f"{name}: the runs do not agree on which studies share a patient or paper.")
    return [row for row, _ in pairs], [twin for _, twin in pairs]


def _report_columns(first: Run, second: Run) -> dict[str, Column]:
    from .clinical_metrics import ClinicalScorer
    from .text_metrics import TextScorer

    columns = {}
    for language in _shared_column_names(first, second):
        sides = _paired_rows(first, second, language, lambda row, code=language: row["reference"].get(code))
        references = [row["reference"][language] for row in sides[0]]
        scorers = [TextScorer(references, language), ClinicalScorer(references, language)]
        measured = []
        for run, rows in zip((first, second), sides, strict=True):
            missing = sum(language not in row["prediction"] for row in rows)
            if missing:
                raise ValueError(f"{run.name}: {missing} of {len(rows)} studies have no report in {language!r}.")
            written = [row["prediction"][language] for row in rows]
            measured.append([each for scorer in scorers for each in scorer.measure(written)])
        columns[language] = Column([row["group"] for row in sides[0]], *measured)
    return columns


def _diagnosis_columns(first: Run, second: Run) -> dict[str, Column]:
    """Returns a column for each label that both runs have, and their mean where there are several."""
    names = _shared_column_names(first, second)
    sides = _paired_rows(first, second, "labels", lambda row: {name: row["labels"].get(name) for name in names})
    groups = [row["group"] for row in sides[0]]
    columns, means = {}, []
    for name in names:
        known = [place for place, row in enumerate(sides[0]) if row["labels"].get(name) is not None]
        if not known:
            raise ValueError(f"{name}: the runs have no study of which this label is known.")
        measured = [_label_measurement([rows[place] for place in known], name) for rows in sides]
        columns[name] = Column([groups[place] for place in known], *([each] for each in measured))
        means.append([_label_measurement(rows, name) for rows in sides])
    if len(names) > 1:
        columns[MACRO] = Column(groups, *([MacroMeasurement(labels)] for labels in zip(*means, strict=True)))
    return columns


def _label_measurement(rows: Sequence[dict[str, Any]], name: str) -> LabelMeasurement:
    truth = np.array([row["labels"].get(name) for row in rows], dtype=np.float64)  # (N,), null becomes NaN
    values = [np.array([row[kind][name] for row in rows]) for kind in ("probabilities", "decisions")]
    return LabelMeasurement(truth, *values)


_COLUMNS: dict[str, Callable[[Run, Run], dict[str, Column]]] = {
    "report": _report_columns,
    "diagnosis": _diagnosis_columns,
}
