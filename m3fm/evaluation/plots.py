# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Draw the plots of an evaluation as SVG: intervals, finding bars, ROC and precision-recall curves, reliability.

Nothing here touches the state of `matplotlib.pyplot` or depends on a user's style. The same numbers give the same
bytes. Labels are to be Latin text: the font that comes with matplotlib has no Chinese.

Colours are those of Okabe and Ito (2008), told apart with every kind of colour vision; no plot needs them to be read,
because series differ by marker or hatch too.
"""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "D", "^", "v", "P", "X")
_HATCHES = ("", "///", "...", "xxx")
_GRAY = "#6B6B6B"

_WIDTH = 7.0  # inches; at 100 pixels an inch the 700 of a page's column
_ROW = 0.27  # inches for a line of text
_PANELS = 3  # side by side
_STYLE: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _GRAY,
    "axes.axisbelow": True,
    "grid.color": "#D9D9D9",
    "grid.linewidth": 0.6,
    "svg.fonttype": "path",
    # Element ids are hashes: salted at random unless told otherwise.
    "svg.hashsalt": "m3fm",
}
# No date and no address in the file.
_METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}
_DOCTYPE = re.compile(rb"<!DOCTYPE[^>]*>\s*")


@dataclass(frozen=True)
class Estimate:
    """One line of a forest plot.

    Attributes:
        label: What is estimated.
        value: The estimate; NaN draws nothing.
        low: Lower end of its interval; NaN draws none.
        high: Upper end.
        series: Estimates of one series share colour and marker; named in the legend where there are several.
    """

    label: str
    value: float
    low: float
    high: float
    series: str = ""


@dataclass(frozen=True)
class Curve:
    """One panel of a curve plot.

    Attributes:
        label: Title of the panel.
        x: (P,) in 0..1.
        y: (P,) in 0..1.
        chance: Heights at x = 0 and x = 1 of the line that a model without knowledge gives: (0, 1) for ROC, twice the
            prevalence for precision.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    chance: tuple[float, float]


@dataclass(frozen=True)
class ReliabilityBins:
    """How often a label was right at the confidence the model gave it.

    Attributes:
        label: Title of the panel.
        confidence: (K,) mean probability of each bin that holds a study.
        accuracy: (K,) share of its studies that have the label.
        count: (K,) its studies.
        num_bins: Bins of equal width, empty ones included.
    """

    label: str
    confidence: Sequence[float]
    accuracy: Sequence[float]
    count: Sequence[float]
    num_bins: int


def forest_plot(
    estimates: Sequence[Estimate], axis_label: str, reference: float | None = None, reference_label: str = ""
) -> bytes:
    """Draws estimates with their intervals, one below the other.

    Args:
        estimates: From top to bottom; neighbours with the same label share a line.
        axis_label: Of the shared axis.
        reference: Value of a vertical line: 0 for differences, 0.5 for AUROC.
        reference_label: What the line stands for.

    Returns:
        SVG.

    Raises:
        ValueError: Without estimates.
    """
    _check_some("estimates", estimates)
    series = list(dict.fromkeys(estimate.series for estimate in estimates))
    labels = list(dict.fromkeys(estimate.label for estimate in estimates))
    spread = np.linspace(-0.17, 0.17, len(series)) if len(series) > 1 else np.zeros(1)
    height = 0.75 + _ROW * len(labels) * (1.25 if len(series) > 1 else 1) + (0.3 if len(series) > 1 else 0)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for index, name in enumerate(series):
            chosen = [estimate for estimate in estimates if estimate.series == name]
            value, low, high = (
                np.array([getattr(estimate, key) for estimate in chosen], dtype=float)
                for key in ("value", "low", "high")
            )
            places = np.array([labels.index(estimate.label) for estimate in chosen]) + spread[index]
            color = COLORS[index % len(COLORS)]
            axes.hlines(places, low, high, color=color, linewidth=1.8)
            axes.plot(value, places, _MARKERS[index % len(_MARKERS)], color=color, markersize=5, label=name or None)
        if reference is not None:
            axes.axvline(reference, color=_GRAY, linewidth=1, linestyle="--")
            if reference_label:
                axes.annotate(
                    reference_label, (reference, 1), xycoords=("data", "axes fraction"), xytext=(0, 2),
                    textcoords="offset points", ha="center", va="bottom", fontsize=8, color=_GRAY,
                )  # fmt: skip
        axes.set_yticks(range(len(labels)), labels)
        axes.set_ylim(len(labels) - 0.5, -0.5)
        axes.grid(axis="x")
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel(axis_label)
        if len(series) > 1:
            figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=min(4, len(series)))

    return _svg(draw, height)


def finding_bars(tables: Mapping[str, Mapping[str, Mapping[str, Any]]], titles: Mapping[str, str]) -> bytes:
    """Draws the F1 of each finding as bars, a series for each language, with the support beside it.

    Args:
        tables: Series to finding to `f1` (a number or None) and `support`.
        titles: Finding to how it is written; findings are drawn in this order.

    Returns:
        SVG.

    Raises:
        ValueError: Without findings.
    """
    findings = [name for name in titles if any(name in table for table in tables.values())]
    _check_some("findings", findings)
    thickness = 0.8 / len(tables)
    height = 0.9 + len(findings) * max(_ROW, 0.17 * len(tables) + 0.08)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for index, (series, table) in enumerate(tables.items()):
            shown = [(place, table[name]) for place, name in enumerate(findings) if name in table]
            places = np.array([place for place, _ in shown]) + (index - (len(tables) - 1) / 2) * thickness
            scores = np.array([float(row["f1"] or 0) for _, row in shown])
            axes.barh(
                places, scores, thickness * 0.9, color=COLORS[index % len(COLORS)], label=series,
                hatch=_HATCHES[index % len(_HATCHES)], edgecolor="white", linewidth=0,
            )  # fmt: skip
            for place, score, (_, row) in zip(places, scores, shown, strict=True):
                known = "–" if row["f1"] is None else f"{score:.2f}"
                axes.text(score + 0.008, place, f"{known}  n = {row['support']:g}", va="center", fontsize=7.5)
        axes.set_yticks(range(len(findings)), [titles[name] for name in findings])
        axes.set_ylim(len(findings) - 0.45, -0.55)
        axes.set_xlim(0, 1.12)
        axes.set_xticks(np.linspace(0, 1, 6))
        axes.grid(axis="x")
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("F1 (n: reports of the reference that state the finding)")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=4)

    return _svg(draw, height)


def curve_plot(curves: Sequence[Curve], x_label: str, y_label: str, drawstyle: str = "default") -> bytes:
    """Draws curves in the unit square, a panel for each: ROC, precision against recall.

    Args:
        curves: One for each label.
        x_label: Of the axes.
        y_label: Of the axes.
        drawstyle: "steps-pre" joins the points, from left to right, by steps at the height of the later one: between
            two recalls precision cannot be interpolated linearly (Davis and Goadrich, ICML 2006), and the area below
            is the average precision.

    Returns:
        SVG.

    Raises:
        ValueError: Without curves.
    """
    _check_some("curves", curves)
    columns = min(_PANELS, len(curves))

    def draw(figure: Figure) -> None:
        for index, curve in enumerate(curves):
            axes = figure.add_subplot(-(-len(curves) // columns), columns, index + 1)
            axes.plot([0, 1], curve.chance, color=_GRAY, linewidth=1, linestyle=(0, (1, 2)))
            axes.plot(curve.x, curve.y, color=COLORS[0], linewidth=1.5, drawstyle=drawstyle)
            _unit_square(axes, curve.label)
            if index % columns == 0:
                axes.set_ylabel(y_label)
            if index + columns >= len(curves):
                axes.set_xlabel(x_label)

    return _svg(draw, *_panel_size(len(curves), 2.45))


def reliability_diagram(panels: Sequence[ReliabilityBins]) -> bytes:
    """Draws observed against predicted frequency for each label, with the number of studies in each bin below.

    Args:
        panels: One for each label.

    Returns:
        SVG.

    Raises:
        ValueError: Without panels.
    """
    _check_some("panels", panels)
    columns = min(_PANELS, len(panels))
    rows = -(-len(panels) // columns)

    def draw(figure: Figure) -> None:
        grid = figure.add_gridspec(2 * rows, columns, height_ratios=[3.2, 1] * rows)
        for index, panel in enumerate(panels):
            row, column = divmod(index, columns)
            upper = figure.add_subplot(grid[2 * row, column])
            lower = figure.add_subplot(grid[2 * row + 1, column])
            _draw_reliability(upper, lower, panel)
            if column == 0:
                upper.set_ylabel("observed")
                lower.set_ylabel("studies")
            if index + columns >= len(panels):
                lower.set_xlabel("predicted probability")

    return _svg(draw, *_panel_size(len(panels), 3.2))


def _draw_reliability(upper: Axes, lower: Axes, panel: ReliabilityBins) -> None:
    upper.plot([0, 1], [0, 1], color=_GRAY, linewidth=1, linestyle=(0, (1, 2)))
    upper.plot(panel.confidence, panel.accuracy, "-o", color=COLORS[0], linewidth=1.4, markersize=4)
    _unit_square(upper, panel.label)
    upper.set_xticklabels([])
    # A probability of 1 is in the last bin.
    bins = np.minimum(np.floor(np.array(panel.confidence) * panel.num_bins), panel.num_bins - 1)
    lower.bar(
        bins / panel.num_bins, panel.count, 1 / panel.num_bins, align="edge", color=COLORS[5], edgecolor="white",
        linewidth=0.6,
    )  # fmt: skip
    lower.set_xlim(-0.02, 1.02)
    lower.set_xticks([0, 0.5, 1])
    lower.grid(axis="y")


def _unit_square(axes: Axes, title: str) -> None:
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.02, 1.02)
    axes.set_aspect("equal")
    axes.set_xticks([0, 0.5, 1])
    axes.set_yticks([0, 0.5, 1])
    axes.grid()
    axes.set_title("\n".join(textwrap.wrap(title, 30)))


def _panel_size(count: int, height: float) -> tuple[float, float]:
    """Returns height and width in inches of a figure of panels; fewer than a row of them make a narrower one."""
    columns = min(_PANELS, count)
    return height * -(-count // columns) + 0.15, _WIDTH * columns / _PANELS + (0.2 if columns < _PANELS else 0)


def _svg(draw: Callable[[Figure], None], height: float, width: float = _WIDTH) -> bytes:
    with _style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
        figure.get_layout_engine().set(w_pad=0.08, h_pad=0.06)
        draw(figure)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata=_METADATA)
    return _DOCTYPE.sub(b"", buffer.getvalue())


@contextmanager
def _style() -> Iterator[None]:
    """Applies the style on top of matplotlib's own defaults, whatever the user has set, and takes it back."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError('Plots need matplotlib: pip install "m3fm[evaluate]"') from error
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


def _check_some(name: str, values: Sequence[Any]) -> None:
    if not values:
        raise ValueError(f"Expected {name} to plot, got none.")
