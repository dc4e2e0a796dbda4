# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""One picture of a data set: findings by state, report lengths, ages, image sizes, and how its parts differ.

Labels are Latin text: the font that comes with matplotlib has no Chinese. Colours are those of Okabe and Ito (2008).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..evaluation.plots import COLORS
from .labels import finding_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_statistics"]

_COLUMNS, _PANEL_INCHES = 2, (5.6, 3.4)
_ROW_INCHES = 0.19
_STATE_COLORS = {"positive": COLORS[1], "uncertain": COLORS[4], "negative": COLORS[0], "unmentioned": "#D9D9D9"}
_MOST_PARTS = 5
_LENGTH_BINS = 40


def plot_statistics(statistics: Mapping[str, Any], path: str | Path, title: str) -> None:
    """Draw what `SetStatistics.as_dict()` counts, and under "image_files" what `image_statistics` does, as a PNG.

    Args:
        statistics: Panels whose numbers are missing are left out.
        path: The PNG.
        title: Above the panels.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError('pictures of data need matplotlib: pip install "m3fm[data]"') from None
    panels: list[Callable[[Axes, Mapping[str, Any]], None]] = [_draw_parts]
    if statistics["findings"]:
        panels += [_draw_findings, _draw_prevalence]
    if statistics["languages"]:
        panels.append(_draw_lengths)
    if statistics["ages"]:
        panels.append(_draw_ages)
    if statistics.get("image_files", {}).get("sizes"):
        panels.append(_draw_sizes)
    rows = -(-len(panels) // _COLUMNS)
    height = max(_PANEL_INCHES[1], 1.4 + _ROW_INCHES * len(statistics["findings"]))
    figure = Figure(figsize=(_COLUMNS * _PANEL_INCHES[0], rows * height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=13)
    for number, draw in enumerate(panels, start=1):
        axes = figure.add_subplot(rows, _COLUMNS, number)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
        draw(axes, statistics)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _draw_parts(axes: Axes, statistics: Mapping[str, Any]) -> None:
    parts = statistics["parts"]
    shown = {"studies": COLORS[0], "patients": COLORS[2], "images": COLORS[4]}
    places = np.arange(len(parts))
    for offset, (name, color) in enumerate(shown.items()):
        counts = [part[name] for part in parts.values()]
        bars = axes.barh(places + 0.27 * (offset - 1), counts, 0.25, color=color, label=name)
        axes.bar_label(bars, [f"{count:,}" for count in counts], padding=2, fontsize=7)
    axes.set_yticks(places, list(parts))
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.legend(fontsize=8, frameon=False)
    axes.set_title("Parts", fontsize=10)


def _draw_findings(axes: Axes, statistics: Mapping[str, Any]) -> None:
    findings = statistics["findings"]
    names = [finding_table()[key].names["en"] for key in findings]
    places, left = np.arange(len(names)), np.zeros(len(names))
    for state, color in _STATE_COLORS.items():
        counts = np.array([states[state] for states in findings.values()])
        axes.barh(places, counts, 0.8, left=left, color=color, label=state)
        left += counts
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.set_xlabel("studies", fontsize=8)
    axes.legend(fontsize=8, frameon=False, ncols=4, loc="lower center", bbox_to_anchor=(0.4, 1.0))
    axes.set_title("Findings", fontsize=10, pad=22)


def _draw_prevalence(axes: Axes, statistics: Mapping[str, Any]) -> None:
    """Draw the share of positive studies in each part: parts that differ much are no fair test of each other."""
    keys = list(statistics["findings"])
    places = np.arange(len(keys))
    largest = sorted(statistics["parts"].items(), key=lambda part: -part[1]["studies"])[:_MOST_PARTS]
    for number, (name, part) in enumerate(largest):
        shares = [100 * part["positive"].get(key, 0) / part["studies"] for key in keys]
        marker = "osD^v"[number]
        axes.plot(shares, places, marker, color=COLORS[number], label=name, markersize=5, alpha=0.8)
    axes.set_yticks(places, [finding_table()[key].names["en"] for key in keys])
    axes.invert_yaxis()
    axes.grid(axis="y", color="#EEEEEE")
    axes.set_xlabel("% of studies positive", fontsize=8)
    axes.legend(fontsize=8, frameon=False)
    axes.set_title("Findings by part", fontsize=10)


def _draw_lengths(axes: Axes, statistics: Mapping[str, Any]) -> None:
    for number, (language, texts) in enumerate(statistics["languages"].items()):
        if not texts["lengths"]:
            continue
        lengths = np.array([int(length) for length in texts["lengths"]])
        counts = np.array(list(texts["lengths"].values()))
        unit = "characters" if language == "zh" else "words"
        label = f"{language}, {unit}; median {texts['length']['median']}"
        axes.hist(lengths, _LENGTH_BINS, weights=counts, color=COLORS[number], alpha=0.6, label=label)
    axes.set_xlabel("length of a report", fontsize=8)
    axes.set_ylabel("reports", fontsize=8)
    axes.legend(fontsize=8, frameon=False)
    axes.set_title("Report length", fontsize=10)


def _draw_ages(axes: Axes, statistics: Mapping[str, Any]) -> None:
    ages = statistics["ages"]
    axes.bar(list(ages), list(ages.values()), color=COLORS[0])
    axes.tick_params(axis="x", rotation=45)
    axes.set_ylabel("studies", fontsize=8)
    axes.set_xlabel("age in years", fontsize=8)
    axes.set_title("Age", fontsize=10)


def _draw_sizes(axes: Axes, statistics: Mapping[str, Any]) -> None:
    sizes = np.array(statistics["image_files"]["sizes"])
    distinct, counts = np.unique(sizes, axis=0, return_counts=True)
    area = 12 + 150 * counts / counts.max()
    axes.scatter(*distinct.T, s=area, color=COLORS[0], alpha=0.4, edgecolors="none")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("width in pixels", fontsize=8)
    axes.set_ylabel("height in pixels", fontsize=8)
    axes.set_title(f"Sizes of {len(sizes):,} images", fontsize=10)
