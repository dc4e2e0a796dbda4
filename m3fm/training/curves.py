# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""The curves of a run: loss, learning rate, gradient norm, speed, and the validation scores, kind by kind."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["plot_curves", "score_kinds", "smoothed"]

_COLUMNS = 3
# Inches; 1,100 pixels wide at 100 a inch.
_WIDTH, _ROW, _DPI = 11.0, 2.6, 100
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#999999")  # Okabe and Ito
_TITLES = {
    "r": "retrieval, recall",
    "auroc": "AUROC",
    "bleu": "BLEU",
    "rouge": "ROUGE",
    "distinct": "share of distinct reports",
}
# Names in the history, titles, whether the axis is logarithmic where the values span more than a hundredfold.
_TRAINING = (
    ("loss", "training loss", False),
    ("learning_rate", "learning rate", False),
    ("grad_norm", "gradient norm", True),
    ("samples_per_second", "samples per second", False),
    ("tokens_per_second", "tokens per second", False),
)

Points = tuple[np.ndarray, np.ndarray]


def plot_curves(history: Sequence[Mapping[str, float]], path: Path, best_step: int | None = None) -> None:
    """Draws what was logged over the steps, each kind in a panel of its own.

    Args:
        history: Entries with "step", as `TrainerState.log_history`.
        path: PNG to write, 1,100 pixels wide.
        best_step: Marked in the panels of the scores.

    Raises:
        ImportError: Without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('Curves need matplotlib: pip install "m3fm[train]".') from error
    training = [(name, title, log, _points(history, name)) for name, title, log in _TRAINING]
    training = [each for each in training if len(each[3][0])] or [("loss", "training loss", False, _points([], ""))]
    kinds = score_kinds(name for entry in history for name in entry)
    rows = -(-(len(training) + len(kinds)) // _COLUMNS)
    figure = Figure(figsize=(_WIDTH, _ROW * rows + 0.2), layout="constrained")
    axes = list(figure.subplots(rows, _COLUMNS, squeeze=False).flat)
    for axis, (name, title, logarithmic, points) in zip(axes, training, strict=False):
        # A peak of the gradient is to be seen, not spread; and a learning rate has no noise.
        is_noisy = name not in ("grad_norm", "learning_rate")
        _draw_training(axis, points, title, is_noisy, logarithmic)
    for axis, (kind, names) in zip(axes[len(training) :], kinds.items(), strict=False):
        _draw_scores(axis, {name: _points(history, name) for name in names}, kind, best_step)
    for axis in axes[len(training) + len(kinds) :]:
        axis.set_axis_off()
    figure.savefig(path, dpi=_DPI)


def score_kinds(names: Any) -> dict[str, list[str]]:
    """Sorts the names of validation scores by kind: `eval_bleu_4_en` and `eval_bleu_4_zh` are of "bleu"."""
    kinds: dict[str, list[str]] = {}
    for name in sorted({name for name in names if name.startswith("eval_")}):
        kinds.setdefault(_kind(name), []).append(name)
    return kinds


def smoothed(values: np.ndarray, half_life: float) -> np.ndarray:
    """Returns the mean around each of the values (N,), in which a value `half_life` away is half as heavy."""
    decay = 0.5 ** (1 / half_life)
    totals, weights = (_decaying_sum(each, decay) for each in (values, np.ones(len(values))))
    return totals / weights


def _decaying_sum(values: np.ndarray, decay: float) -> np.ndarray:
    """Returns the sum (N,) of values on both sides of each place, less heavy by `decay` from place to place."""
    sums = np.zeros(len(values))
    for direction in (slice(None), slice(None, None, -1)):
        total = 0.0
        for place, value in enumerate(values[direction]):
            total = decay * total + value
            sums[direction][place] += total
    return sums - values  # which is in both directions


def _kind(name: str) -> str:
    return re.match(r"[^\W\d_]*", name.removeprefix("eval_"))[0]


def _points(history: Sequence[Mapping[str, float]], name: str) -> Points:
    pairs = [(entry["step"], entry[name]) for entry in history if isinstance(entry.get(name), int | float)]
    steps, values = zip(*pairs, strict=True) if pairs else ((), ())
    return np.array(steps, dtype=float), np.array(values, dtype=float)


def _draw_training(axis: Any, points: Points, title: str, is_smoothed: bool, logarithmic: bool) -> None:
    steps, values = points
    is_smoothed = is_smoothed and len(values) >= 20 and np.ptp(values) > 0
    axis.plot(steps, values, color=_COLORS[0], alpha=0.35 if is_smoothed else 1, linewidth=1, **_marks(values))
    if is_smoothed:
        axis.plot(steps, smoothed(values, max(2, len(values) / 60)), color=_COLORS[0], linewidth=2)
    positive = values[values > 0]
    if logarithmic and len(positive) and positive.max() > 100 * positive.min():
        axis.set_yscale("log")
    _finish(axis, title)


def _draw_scores(axis: Any, curves: Mapping[str, Points], kind: str, best_step: int | None) -> None:
    for number, (name, (steps, values)) in enumerate(curves.items()):
        color, line = _COLORS[number % len(_COLORS)], "-" if number < len(_COLORS) else "--"
        label = name.removeprefix("eval_").removeprefix(f"{kind}_" if len(curves) > 4 else "")
        axis.plot(steps, values, line, color=color, label=label, linewidth=1.5, **_marks(values))
    if best_step is not None:
        axis.axvline(best_step, color="gray", linestyle=":", linewidth=1.5)
    _finish(axis, _TITLES.get(kind, kind))
    axis.legend(fontsize=7 if len(curves) <= 6 else 6, ncols=1 if len(curves) <= 6 else 2, framealpha=0.7)


def _marks(values: np.ndarray) -> dict[str, Any]:
    """Marks the points of a short curve: one of a single point has no line."""
    return {"marker": "." if len(values) <= 30 else None}


def _finish(axis: Any, title: str) -> None:
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("step", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
