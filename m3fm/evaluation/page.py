# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Write the HTML page of an evaluation: what was measured, whether images were used, and cases to look at.

The page is one file that needs no other: it loads nothing, runs no script, and a content security policy in it forbids
both. Cases are numbered: no study, patient or file is named.
"""

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data import Study
from .cases import IMAGE_SIZE, Case, select_cases
from .page_plots import Plot, draw_plots
from .page_tables import (
    Table,
    control_table,
    finding_table_of,
    is_known,
    label_table,
    new_patient_tables,
    retrieval_table,
    score_tables,
    shown_columns,
    verdict,
)
from .resampling import LEVEL
from .runs import METRICS_FILE, NOTICE, PREDICTIONS, read_predictions
from .text_metrics import distinct_ratio
from .titles import MODEL_ROW, ROW_TITLES, column_title, metric_title, number, signed

PAGE_FILE, PLOT_FOLDER = "report.html", "plots"
_TEMPLATE = "page.html.j2"
_TASK_TITLES = {"report": "report generation", "diagnosis": "diagnosis", "parallel": "retrieval between languages"}

# What the page opens with: metrics that decide, and the rows that the model is held against.
HEADLINE_METRICS = {"report": ("bleu_4", "rouge_l", "finding_f1_micro"), "diagnosis": ("auroc",)}
HEADLINE_ROWS = {"report": ("constant_report",), "diagnosis": ("label_prior", "linear_probe_tower")}
# The hardest control: other images of the same kind.
_IMAGE_ROW = "shuffled_images"

# Parts of the page by what fills them.
_SECTIONS = {
    "statements": "Summary",
    "score_tables": "Scores",
    "control_table": "Image use",
    "label_table": "Labels",
    "finding_tables": "Findings",
    "retrieval_table": "Retrieval",
    "cases": "Cases",
    "provenance": "Provenance",
}
_PROVENANCE = (
    ("command", "Command"),
    ("model", "Model"),
    ("model_sha256", "Model SHA-256"),
    ("data", "Data"),
    ("data_sha256", "Data fingerprint"),
    ("split", "Part"),
    ("num_studies", "Studies"),
    ("num_groups", "Patients or papers"),
    ("shots", "Shots"),
    ("training", "Learned from"),
    ("floors_from", "Floors chosen in"),
    ("skipped", "Labels skipped"),
    ("trials", "Draws averaged"),
    ("threshold_source", "Thresholds"),
    ("thresholds_not_fitted", "Thresholds not fitted"),
    ("decoding", "Decoding"),
    ("seed", "Seed"),
    ("num_resamples", "Bootstrap resamples"),
    ("device", "Device"),
    ("versions", "Versions"),
    ("format", "Format of metrics.json"),
)


@dataclass(frozen=True)
class Clause:
    """What one metric says: `kind` is "better", "worse" or "open" (the interval contains 0)."""

    kind: str
    metric: str
    numbers: str


@dataclass(frozen=True)
class Statement:
    """One line of the summary: in a language (of diagnosis, on average) the model against one row.

    Attributes:
        opening: Language and question.
        clauses: One for each headline metric.
    """

    opening: str
    clauses: list[Clause]


@dataclass(frozen=True)
class Diversity:
    """How many different reports there are in a language."""

    language: str
    model: float
    references: float | None


def write_page(output_dir: str | Path, studies_by_id: dict[str, Study] | None = None, max_cases: int = 6) -> Path:
    """Writes `report.html`, and its plots into `plots/`, from the results in a folder.

    The same results give the same bytes.

    Args:
        output_dir: Holds `metrics.json`, and `predictions.jsonl` if cases are to be shown.
        studies_by_id: The studies evaluated, for the images of the cases; None leaves images out.
        max_cases: Cases at most, a third of them the worst, the median and the best; 0 shows none.

    Returns:
        The page.

    Raises:
        ValueError: If the folder holds no results, or an image cannot be read.
        ImportError: If jinja2 or matplotlib is not installed.
    """
    folder = Path(output_dir)
    metrics = _read_metrics(folder / METRICS_FILE)
    predictions = list(read_predictions(folder / PREDICTIONS).values())
    plots = draw_plots(metrics)
    plot_folder = folder / PLOT_FOLDER
    plot_folder.mkdir(exist_ok=True)
    for plot in plots:
        (plot_folder / f"{plot.name}.svg").write_bytes(plot.svg)
    cases = select_cases(predictions, metrics["task"], studies_by_id, max_cases) if predictions else []
    page = folder / PAGE_FILE
    page.write_text(render_page(metrics, plots, cases, predictions), encoding="utf-8")
    return page


def render_page(
    metrics: Mapping[str, Any], plots: Sequence[Plot], cases: Sequence[Case], predictions: Sequence[dict[str, Any]]
) -> str:
    """Returns the page as HTML.

    Args:
        metrics: As in `metrics.json`.
        plots: To put in, see `draw_plots`.
        cases: To show.
        predictions: Rows of `predictions.jsonl`: their references are counted.

    Raises:
        ImportError: If jinja2 is not installed.
    """
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ImportError as error:
        raise ImportError('The page needs jinja2: pip install "m3fm[evaluate]"') from error
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "data_uri": _data_uri}
    task = metrics["task"]
    content = {
        "statements": _statements(metrics),
        "score_tables": score_tables(metrics),
        "new_patient_tables": new_patient_tables(metrics),
        "control_table": control_table(metrics, HEADLINE_METRICS.get(task, ())),
        "diversity": _diversity(metrics, predictions),
        "label_table": label_table(metrics) if metrics.get("labels") else None,
        "finding_tables": _finding_tables(metrics),
        "retrieval_table": retrieval_table(metrics["retrieval"]) if metrics.get("retrieval") else None,
        "cases": cases,
        "provenance": [
            (title, _plain(metrics[key])) for key, title in _PROVENANCE if metrics.get(key) not in (None, [], {})
        ],
    }
    return environment.get_template(_TEMPLATE).render(
        title=f"{metrics.get('model', 'model')} on {metrics.get('data', 'data')}",
        task=_TASK_TITLES[task],
        is_report=task == "report",
        notice=metrics.get("notice", NOTICE),
        part=metrics.get("split"),
        sizes=_sizes(metrics),
        sections=[(anchor, title) for anchor, title in _SECTIONS.items() if content[anchor]],
        plots={plot.name: plot for plot in plots},
        image_size=IMAGE_SIZE,
        level=f"{LEVEL:.0%}".replace("%", " %"),
        **content,
    )


def _read_metrics(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path.parent} holds no {path.name}: expected the output folder of an evaluation.")
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
        task = metrics["task"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path}: expected the results of an evaluation as a JSON object with a task.") from None
    if task not in _TASK_TITLES:
        raise ValueError(f"{path}: unknown task {task!r}, expected one of {list(_TASK_TITLES)}.")
    return metrics


def _sizes(metrics: Mapping[str, Any]) -> str:
    """Returns how much was evaluated: "English 72 studies of 60 patients or papers; Chinese ..."."""
    counts = metrics.get("num_studies") or {}
    groups = metrics.get("num_groups") or {}
    columns = [column for column in counts if column in shown_columns(metrics)]
    texts = []
    for column in columns:
        of = f" of {groups[column]} patients or papers" if column in groups else ""
        texts.append(f"{column_title(column).capitalize()}: {counts[column]} studies{of}")
    return "; ".join(texts)


def _statements(metrics: Mapping[str, Any]) -> list[Statement]:
    """Says in words whether the model beats its floors and whether it uses the images."""
    statements = []
    for column in shown_columns(metrics):
        for row in (*HEADLINE_ROWS[metrics["task"]], _IMAGE_ROW):
            if clauses := _clauses(metrics, row, column):
                floor = f"the model against the {ROW_TITLES[row]}"
                question = "the right images against those of other studies" if row == _IMAGE_ROW else floor
                statements.append(Statement(f"{column_title(column).capitalize()}, {question}", clauses))
    return statements


def _clauses(metrics: Mapping[str, Any], row: str, column: str) -> list[Clause]:
    differences = metrics.get("differences", {}).get(row, {}).get(column, {})
    clauses = []
    for name in HEADLINE_METRICS[metrics["task"]]:
        found = differences.get(name)
        if is_known(found):
            model, other = (metrics["rows"][each][column][name] for each in (MODEL_ROW, row))
            numbers = (
                f"{number(model)} against {number(other)}; difference {signed(found['difference'])}, "
                f"interval {signed(found['low'])} to {signed(found['high'])}"
            )
            clauses.append(Clause(verdict(name, found) or "open", metric_title(name), numbers))
    return clauses


def _diversity(metrics: Mapping[str, Any], predictions: Sequence[dict[str, Any]]) -> list[Diversity]:
    found = []
    for column, scores in metrics.get("rows", {}).get(MODEL_ROW, {}).items():
        if scores.get("distinct") is not None:
            references = [row["reference"][column] for row in predictions if column in row["reference"]]
            share = distinct_ratio(references) if references else None
            found.append(Diversity(column_title(column), scores["distinct"], share))
    return found


def _finding_tables(metrics: Mapping[str, Any]) -> list[Table]:
    return [finding_table_of(language, table) for language, table in (metrics.get("findings") or {}).items() if table]


def _plain(value: Any) -> str:
    """Returns a setting as text: a flat table as "name: value; name: value", what is nested as JSON."""
    if isinstance(value, dict) and not any(isinstance(each, dict | list) for each in value.values()):
        return "; ".join(f"{ROW_TITLES.get(key) or column_title(key)}: {each}" for key, each in value.items())
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _data_uri(plot: Plot) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(plot.svg).decode("ascii")
