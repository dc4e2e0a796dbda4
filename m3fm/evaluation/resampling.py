# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Say how sure a score is: intervals and paired comparisons by resampling patients.

Studies of one patient, or figures of one paper, are not independent: they are drawn together (cluster bootstrap, Field
and Welsh, JRSS B 2007). All systems of a run are scored on the same draws, so that a difference between two of them is
a paired one.

Letters in shapes: N studies, R resamples, S statistics.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

LEVEL = 0.95
# A smaller difference of two scores is the rounding of their sums.
_ROUNDING = 1e-12


class Measurement(Protocol):
    """One system on N studies, in a form that any weighting of the studies can be scored from."""

    def score(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """Returns scores (R,) by name for weights (R, N), how often each study counts; NaN where undefined."""


@dataclass(frozen=True)
class SumMeasurement:
    """Scores that depend on sums over studies alone: corpus BLEU, means, F1 from counts.

    Attributes:
        statistics: (N, S).
        combine: Turns sums (R, S) into scores (R,) by name.
    """

    statistics: np.ndarray
    combine: Callable[[np.ndarray], dict[str, np.ndarray]]

    def score(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """Returns scores (R,) by name for weights (R, N)."""
        return self.combine(weights @ self.statistics)


def mean_measurement(scores: dict[str, np.ndarray]) -> SumMeasurement:
    """Returns the measurement whose scores are means over studies.

    Args:
        scores: Name to one value a study, (N,) each; NaN marks a study that has no say in that score.
    """
    names = list(scores)
    values = np.stack([np.asarray(scores[name], dtype=np.float64) for name in names], axis=1)  # (N, M)
    known = ~np.isnan(values)

    def combine(sums: np.ndarray) -> dict[str, np.ndarray]:
        totals, counts = sums[:, : len(names)], sums[:, len(names) :]
        means = ratio(totals, counts)
        return {name: means[:, column] for column, name in enumerate(names)}

    return SumMeasurement(np.concatenate([np.where(known, values, 0.0), known], axis=1), combine)


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Divides elementwise; NaN where the denominator is 0."""
    return np.divide(numerator, denominator, out=np.full(np.shape(numerator), np.nan), where=denominator != 0)


def cluster_weights(groups: Sequence[Hashable], num_resamples: int = 1000, seed: int = 0) -> np.ndarray:
    """Draws bootstrap resamples of whole groups.

    Args:
        groups: The group of each study (its patient, or its paper).
        num_resamples: R.
        seed: Of the draws.

    Returns:
        (R, N) float64, how often each study was drawn; the studies of a group always equally often.

    Raises:
        ValueError: Without studies or resamples.
    """
    if not len(groups) or num_resamples < 1:
        raise ValueError(f"Expected studies and resamples, got {len(groups)} studies, {num_resamples} resamples.")
    codes: dict[Hashable, int] = {}
    members = np.array([codes.setdefault(group, len(codes)) for group in groups])  # (N,)
    draws = np.random.default_rng(seed).multinomial(len(codes), [1 / len(codes)] * len(codes), size=num_resamples)
    return draws[:, members].astype(np.float64)


def point_scores(measurements: Sequence[Measurement], num_studies: int) -> dict[str, float]:
    """Returns the scores on the studies as they are."""
    return {
        name: float(values[0]) for name, values in resampled_scores(measurements, np.ones((1, num_studies))).items()
    }


def resampled_scores(measurements: Sequence[Measurement], weights: np.ndarray) -> dict[str, np.ndarray]:
    """Returns scores (R,) by name for weights (R, N), of all measurements together."""
    return {name: values for measurement in measurements for name, values in measurement.score(weights).items()}


def mean_over_trials(trials: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Averages resampled scores over repeated random trials of one system."""
    return {name: np.mean([trial[name] for trial in trials], axis=0) for name in trials[0]}


def percentile_interval(values: np.ndarray, level: float = LEVEL) -> tuple[float, float]:
    """Returns the percentile interval of resampled scores (R,); resamples without a score are left out."""
    values = values[~np.isnan(values)]
    if not len(values):
        return float("nan"), float("nan")
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired_difference(first: np.ndarray, second: np.ndarray, point: float) -> dict[str, Any]:
    """Compares two systems by their scores on the same resamples.

    Args:
        first: (R,).
        second: (R,).
        point: The difference of the two on the studies as they are.

    Returns:
        `difference` (first minus second), `low` and `high` of its percentile interval, and `p_value`: twice the
        smaller share of resamples on either side of zero, counting the observed sample once, so that it is never 0
        (Davison and Hinkley 1997, section 4.2).
    """
    differences = _without_rounding(first - second)
    low, high = percentile_interval(differences)
    known = differences[~np.isnan(differences)]
    tail = min(int((known <= 0).sum()), int((known >= 0).sum()))
    p_value = min(1.0, 2 * (tail + 1) / (len(known) + 1)) if len(known) else float("nan")
    return {"difference": float(_without_rounding(np.asarray(point))), "low": low, "high": high, "p_value": p_value}


def _without_rounding(differences: np.ndarray) -> np.ndarray:
    return np.where(np.abs(differences) < _ROUNDING, 0.0, differences)


def compare_rows(
    trials: dict[str, list[Sequence[Measurement]]], weights: np.ndarray
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, tuple[float, float]]], dict[str, dict[str, Any]]]:
    """Scores systems on the same studies, and the first of them against each other one.

    Args:
        trials: System to its trials, each the measurements of one random draw of it; scores are means over trials.
        weights: (R, N), of `cluster_weights`.

    Returns:
        Scores, intervals, and paired differences (first system minus this one), each system -> score name -> value;
        the first system has no difference.
    """
    with_observed = np.concatenate([np.ones((1, weights.shape[1])), weights])
    points: dict[str, dict[str, float]] = {}
    draws: dict[str, dict[str, np.ndarray]] = {}
    for name, systems in trials.items():
        values = mean_over_trials([resampled_scores(measurements, with_observed) for measurements in systems])
        points[name] = {score: float(value[0]) for score, value in values.items()}
        draws[name] = {score: value[1:] for score, value in values.items()}
    first, *others = trials
    intervals = {
        name: {score: percentile_interval(value) for score, value in by_score.items()}
        for name, by_score in draws.items()
    }
    differences = {
        name: {
            score: paired_difference(draws[first][score], value, points[first][score] - points[name][score])
            for score, value in draws[name].items()
            if score in draws[first]
        }
        for name in others
    }
    return points, intervals, differences
