# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Draw the plots that go with the results of an evaluation, each with its caption and a text for who cannot see it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .diagnosis_metrics import NUM_BINS
from .plots import Curve, Estimate, ReliabilityBins, curve_plot, finding_bars, forest_plot, reliability_diagram
from .titles import CONTROLS, MODEL_ROW, ROW_TITLES, column_title, finding_title, metric_title, number

# Metrics of one scale, so that they share an axis.
IMAGE_USE_METRICS = {"report": ("bleu_4", "rouge_l", "finding_f1_micro"), "diagnosis": ("auroc", "auprc", "f1")}
IMAGE_USE_COLUMNS = {"diagnosis": ("macro",)}
_AUROC_ROWS = (MODEL_ROW, "linear_probe_tower")
_CONTROL_WORDS = {"shuffled_images": "shuffled", "blank_images": "blank", "noise_images": "noise"}


@dataclass(frozen=True)
class Plot:
    """One plot of a page.

    Attributes:
        name: Of its file, and of its place on the page.
        svg: The picture.
        caption: Printed below.
        alt: What it shows, in words.
    """

    name: str
    svg: bytes
    caption: str
    alt: str


def draw_plots(metrics: Mapping[str, Any]) -> list[Plot]:
    """Draws every plot that the results of a run have numbers for.

    Args:
        metrics: As in `metrics.json`.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    makers = (_image_use, _findings, _auroc, _roc, _precision_recall, _reliability)
    return [plot for maker in makers if (plot := maker(metrics))]


def _image_use(metrics: Mapping[str, Any]) -> Plot | None:
    differences = metrics.get("differences", {})
    estimates = []
    for control in (name for name in CONTROLS if name in differences):
        for name in IMAGE_USE_METRICS.get(metrics["task"], ()):
            for column, found in differences[control].items():
                if column not in IMAGE_USE_COLUMNS.get(metrics["task"], differences[control]):
                    continue
                label = f"{metric_title(name)}, {_CONTROL_WORDS[control]}"
                estimates += _estimates(label, found.get(name), "difference", column_title(column))
    if not estimates:
        return None
    caption = (
        "Score with a study's own images minus the score with shuffled, blank or noise images, with the interval. "
        "An interval that contains 0 shows no use of the images."
    )
    return Plot("image_use", forest_plot(estimates, "gap", 0.0, "no use"), caption, _spoken("Gaps", estimates))


def _findings(metrics: Mapping[str, Any]) -> Plot | None:
    tables = {column_title(code): table for code, table in (metrics.get("findings") or {}).items()}
    support: dict[str, float] = {}
    for table in tables.values():
        for name, row in table.items():
            if row["support"] or row["predicted"]:
                support[name] = support.get(name, 0) + row["support"]
    if not support:
        return None
    shown = sorted(support, key=lambda name: -support[name])
    titles = {name: finding_title(name) for name in shown}
    best = ", ".join(
        f"{titles[name]} {number(row['f1'])} in {series}"
        for series, table in tables.items()
        for name in shown[:3]
        if (row := table.get(name))
    )
    alt = f"Bars of F1 for {len(shown)} findings by language. The most frequent: {best}. The table below has all."
    caption = "F1 of each finding that a reference or a generated report states, the most frequent first."
    return Plot("findings", finding_bars(tables, titles), caption, alt)


def _auroc(metrics: Mapping[str, Any]) -> Plot | None:
    labels = metrics.get("labels") or []
    estimates = []
    for row in _AUROC_ROWS:
        for label in [*labels, "macro"] if len(labels) > 1 else labels:
            scores = metrics["rows"].get(row, {}).get(label, {})
            interval = metrics.get("intervals", {}).get(row, {}).get(label, {}).get("auroc") or (None, None)
            found = {"value": scores.get("auroc"), "low": interval[0], "high": interval[1]}
            estimates += _estimates(column_title(label), found, "value", ROW_TITLES[row])
    if not estimates:
        return None
    caption = "AUROC of each label with the interval; the line at 0.5 is guessing."
    return Plot("auroc", forest_plot(estimates, "AUROC", 0.5, "chance"), caption, _spoken("AUROC", estimates))


def _roc(metrics: Mapping[str, Any]) -> Plot | None:
    curves = [
        Curve(_with_score(metrics, label, "auroc"), points["fpr"], points["tpr"], (0.0, 1.0))
        for label, points in (metrics.get("curves") or {}).items()
        if points and points.get("fpr")
    ]
    if not curves:
        return None
    caption = "ROC curves, with the AUROC of each label; dotted: guessing."
    return Plot(
        "roc", curve_plot(curves, "1 − specificity", "sensitivity"), caption, _panel_text("ROC curves", curves)
    )


def _precision_recall(metrics: Mapping[str, Any]) -> Plot | None:
    curves = []
    for label, points in (metrics.get("curves") or {}).items():
        if points and points.get("precision"):
            share = metrics["rows"][MODEL_ROW].get(label, {}).get("prevalence") or 0.0
            title = _with_score(metrics, label, "auprc")
            curves.append(Curve(title, points["recall"], points["precision"], (share, share)))
    if not curves:
        return None
    svg = curve_plot(curves, "recall", "precision", drawstyle="steps-pre")
    caption = "Precision-recall curves, with the AUPRC of each label; dotted: the share of studies that have it."
    return Plot("precision_recall", svg, caption, _panel_text("Precision-recall curves", curves))


def _reliability(metrics: Mapping[str, Any]) -> Plot | None:
    panels = [
        ReliabilityBins(
            _with_score(metrics, label, "ece"), bins["confidence"], bins["accuracy"], bins["count"], NUM_BINS
        )
        for label, bins in (metrics.get("reliability") or {}).items()
        if bins and bins.get("count")
    ]
    if not panels:
        return None
    caption = (
        "Reliability: how often a label was there, against the probability given, with the expected calibration error "
        "(ECE); dotted: perfect calibration. Below: studies in each bin."
    )
    return Plot("reliability", reliability_diagram(panels), caption, _panel_text("Reliability diagrams", panels))


def _estimates(label: str, found: Mapping[str, Any] | None, key: str, series: str) -> list[Estimate]:
    """Returns one estimate, or none where it is undefined."""
    if found is None or found[key] is None:
        return []
    low, high = (float("nan") if found[end] is None else found[end] for end in ("low", "high"))
    return [Estimate(label, found[key], low, high, series)]


def _with_score(metrics: Mapping[str, Any], label: str, name: str) -> str:
    score = metrics["rows"][MODEL_ROW].get(label, {}).get(name)
    return f"{column_title(label)} ({number(score, 2)})"


def _spoken(what: str, estimates: Sequence[Estimate]) -> str:
    """Returns the numbers of a forest plot as a sentence."""
    parts = [
        f"{each.label}{f', {each.series}' if each.series else ''}: {number(each.value, 2)} "
        f"({number(each.low, 2)} to {number(each.high, 2)})"
        for each in estimates
    ]
    return f"{what} with intervals. {'; '.join(parts)}."


def _panel_text(what: str, panels: Sequence[Curve | ReliabilityBins]) -> str:
    return f"{what}, one panel for each of: {', '.join(panel.label for panel in panels)}."
