# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""A sweep as a picture: a field for each setting, coloured by its score."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["draw_map"]

_TITLES = {"bleu_4": "BLEU-4", "rouge_l": "ROUGE-L"}


def draw_map(
    points: Sequence[dict[str, Any]], chosen: dict[str, Any], metric: str, min_distinct: float, path: Path
) -> None:
    """Draws the metric and the share of distinct reports over temperature and memory, a row for each noise level.

    Settings that are not distinct enough are crossed out; the one that was chosen is framed.

    Args:
        points: Settings with their scores.
        chosen: One of them.
        metric: Of the left maps.
        min_distinct: Least share of distinct reports.
        path: Of the PNG.

    Raises:
        ImportError: Without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('Maps need matplotlib: pip install "m3fm[train]".') from error
    noises = list(dict.fromkeys(point["noise"] for point in points))
    memories = list(dict.fromkeys((point["memory"], point["size"]) for point in points))
    temperatures = sorted({point["temperature"] for point in points})
    by_place = {(point["noise"], (point["memory"], point["size"]), point["temperature"]): point for point in points}
    size = (2.5 + 1.5 * len(temperatures), len(noises) * (1.4 + 0.45 * len(memories)))
    figure = Figure(figsize=size, layout="constrained")
    fields = figure.subplots(len(noises), 2, squeeze=False, sharex=True, sharey=True)
    for column, name in enumerate((metric, "distinct")):
        values = [point[name] for point in points]
        for row, noise in enumerate(noises):
            axes = fields[row, column]
            grid = [[by_place[noise, memory, each] for each in temperatures] for memory in memories]
            shades = np.array([[point[name] for point in line] for line in grid])
            image = axes.imshow(shades, cmap="viridis", vmin=min(values), vmax=max(values), aspect="auto")
            _write_fields(axes, grid, name, chosen, min_distinct, middle=(min(values) + max(values)) / 2)
            title = "distinct reports, fewer of the languages" if name == "distinct" else _TITLES[metric] + ", mean"
            axes.set_title(title if noise is None else f"{title}; noise {noise:g}", fontsize=9)
            axes.set_xticks(range(len(temperatures)), [f"{each:g}" for each in temperatures], fontsize=8)
            axes.set_yticks(range(len(memories)), [f"{method} {count}" for method, count in memories], fontsize=8)
            if row == len(noises) - 1:
                axes.set_xlabel("temperature", fontsize=8)
        figure.colorbar(image, ax=fields[:, column].tolist(), shrink=0.8).ax.tick_params(labelsize=7)
    figure.savefig(path, dpi=130)


def _write_fields(
    axes: Any, grid: list[list[dict[str, Any]]], name: str, chosen: dict[str, Any], min_distinct: float, middle: float
) -> None:
    """Writes each value into its field, crosses out and frames."""
    from matplotlib.patches import Rectangle

    for y, line in enumerate(grid):
        for x, point in enumerate(line):
            colour = "black" if point[name] > middle else "white"
            axes.text(x, y, f"{point[name]:.3f}", ha="center", va="center", fontsize=7, color=colour)
            if point["distinct"] < min_distinct:
                axes.plot([x - 0.45, x + 0.45], [y + 0.45, y - 0.45], color=colour, linewidth=0.6, alpha=0.6)
            if point is chosen:
                frame = Rectangle((x - 0.48, y - 0.48), 0.96, 0.96, fill=False, edgecolor="red", linewidth=2)
                axes.add_patch(frame)
