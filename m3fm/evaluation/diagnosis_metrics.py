# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Score probabilities of one finding against its annotations, on any resampling of the studies.

Ties of probabilities are exact: studies with one probability are called positive together. The areas are those of
scikit-learn's `roc_auc_score` and `average_precision_score` (by steps, no interpolation) with `sample_weight`. Studies
whose label is unknown are left out.

Letters in shapes: N studies, K of them with a known label, T distinct probabilities, R resamples, L labels.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from .resampling import ratio

#: Names of the scores, in table order.
DIAGNOSIS_METRICS = (
    "auroc",
    "auprc",
    "f1",
    "sensitivity",
    "specificity",
    "sensitivity_at_specificity_90",
    "ece",
    "brier",
    "prevalence",
)
#: The column of the mean over labels.
MACRO = "macro"
SPECIFICITY = 0.9
# Guo et al., ICML 2017, and most who follow: 15 bins of equal width.
NUM_BINS = 15
MAX_CURVE_POINTS = 200
_VALUES_AT_ONCE = 2**17


class LabelMeasurement:
    """Probabilities and decisions for one label; see `Measurement`.

    Where a resample holds one class only, the scores that need both are NaN; so is everything of no studies at all.

    Args:
        labels: (N,), 1 present, 0 absent, NaN unknown.
        probabilities: (N,), in 0..1.
        decisions: (N,), whether each study is called positive.

    Raises:
        ValueError: If shapes differ, or a value is not what is expected.
    """

    def __init__(self, labels: np.ndarray, probabilities: np.ndarray, decisions: np.ndarray):
        labels, probabilities = check_scores(labels, probabilities)
        if np.shape(decisions) != labels.shape:
            raise ValueError(f"Expected {len(labels)} decisions, got an array of shape {np.shape(decisions)}.")
        self.known = np.flatnonzero(~np.isnan(labels))  # (K,)
        self.present = labels[self.known] == 1
        self.probabilities = probabilities[self.known]
        self.decisions = np.asarray(decisions, dtype=bool)[self.known]

    def score(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """Returns scores (R,) by name for weights (R, N)."""
        # In parts that stay in the processor's cache: faster, and memory does not grow with the resamples.
        size = max(1, _VALUES_AT_ONCE // max(1, len(self.known)))
        parts = [
            self._score_part(weights[start : start + size][:, self.known]) for start in range(0, len(weights), size)
        ]
        return {name: np.concatenate([part[name] for part in parts]) for name in DIAGNOSIS_METRICS}

    def _score_part(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """Returns scores (R,) by name for weights (R, K)."""
        sums = weights @ self._statistics  # (R, 5 + bins)
        true_positives, true_negatives, positives, total, errors = sums[:, :5].T
        negatives = total - positives
        called = true_positives + negatives - true_negatives
        scores = self._ranking_scores(weights, positives, negatives)
        f1 = ratio(2 * true_positives, called + positives)
        scores["f1"] = np.where(positives > 0, f1, np.nan)
        scores["sensitivity"] = ratio(true_positives, positives)
        scores["specificity"] = ratio(true_negatives, negatives)
        scores["ece"] = ratio(np.abs(sums[:, 5:]).sum(axis=1), total)
        scores["brier"] = ratio(errors, total)
        scores["prevalence"] = ratio(positives, total)
        return {name: scores[name] for name in DIAGNOSIS_METRICS}

    @cached_property
    def _statistics(self) -> np.ndarray:
        """Returns what is summed over studies, (K, 5 + bins); the last columns are confidence - outcome by bin."""
        columns = [
            self.decisions & self.present,
            ~self.decisions & ~self.present,
            self.present,
            np.ones(len(self.known)),
            (self.probabilities - self.present) ** 2,
        ]
        bins = np.eye(NUM_BINS)[bin_numbers(self.probabilities)] * (self.probabilities - self.present)[:, None]
        return np.concatenate([np.stack(columns, axis=1), bins], axis=1, dtype=np.float64)

    def _ranking_scores(
        self, weights: np.ndarray, positives: np.ndarray, negatives: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Returns what depends on the order alone, for weights (R, K): areas, and sensitivity at fixed specificity."""
        order, ends = descending(self.probabilities)
        if not len(order):
            return dict.fromkeys(("auroc", "auprc", "sensitivity_at_specificity_90"), np.full(len(weights), np.nan))
        ordered = weights[:, order]
        everything = np.cumsum(ordered, axis=1)[:, ends]  # (R, T), called positive at each threshold
        hits = np.cumsum(ordered * self.present[order], axis=1)[:, ends]
        alarms = everything - hits
        gained = np.diff(hits, axis=1, prepend=0.0)
        # Negatives above a positive are lost pairs; those level with it half of one.
        below = negatives[:, None] - (alarms + np.concatenate([np.zeros_like(alarms[:, :1]), alarms[:, :-1]], 1)) / 2
        both = (positives > 0) & (negatives > 0)
        auroc = ratio((gained * below).sum(axis=1), positives * negatives)
        precision = np.divide(hits, everything, out=np.zeros_like(hits), where=everything > 0)
        auprc = ratio((gained * precision).sum(axis=1), positives)
        # Rounding must not cost the threshold that has exactly this specificity.
        allowed = alarms <= (1 - SPECIFICITY) * negatives[:, None] + 1e-9
        fixed = ratio(np.where(allowed, hits, 0.0).max(axis=1), positives)
        scores = {"auroc": auroc, "auprc": auprc, "sensitivity_at_specificity_90": fixed}
        return {name: np.where(both, values, np.nan) for name, values in scores.items()}


class PanelMeasurement:
    """All labels of one system, and the mean over them; see `Measurement`.

    The names of the scores are those of `score_name`. The mean over labels of a score is over those labels where it is
    defined.

    Args:
        labels: Measurement by label name.
        columns: The labels that the mean is over; there is none if one of them is not measured, for it could not be
            compared with the mean of a system that has it.

    Raises:
        ValueError: Without labels, or if one has the name of the mean.
    """

    def __init__(self, labels: Mapping[str, LabelMeasurement], columns: Sequence[str]):
        if not columns or MACRO in columns:
            raise ValueError(f"Expected labels, none of them called {MACRO!r}, got {list(columns)}.")
        self.labels = dict(labels)
        self.has_macro = set(columns) <= set(labels)

    def score(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """Returns scores (R,) by name for weights (R, N)."""
        by_label = {label: measurement.score(weights) for label, measurement in self.labels.items()}
        if self.has_macro:
            by_label[MACRO] = _mean_over_labels(list(by_label.values()))
        return {score_name(c, metric): v for c, scores in by_label.items() for metric, v in scores.items()}


def score_name(column: str, metric: str) -> str:
    """Returns the name of a metric of one column (a label, or the mean over labels) in a panel."""
    return f"{column}|{metric}"


def by_column(scores: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Sorts what a panel's score names map to into column -> metric -> value."""
    columns: dict[str, dict[str, Any]] = {}
    for name, value in scores.items():
        column, _, metric = name.rpartition("|")
        columns.setdefault(column, {})[metric] = value
    return columns


class MacroMeasurement:
    """The mean over labels of each score, over those labels where it is defined; see `Measurement`.

    Args:
        labels: One measurement a label.

    Raises:
        ValueError: Without labels.
    """

    def __init__(self, labels: Sequence[LabelMeasurement]):
        if not labels:
            raise ValueError("Expected at least one label to take the mean over, got none.")
        self.labels = list(labels)

    def score(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """Returns scores (R,) by name for weights (R, N)."""
        return _mean_over_labels([label.score(weights) for label in self.labels])


def _mean_over_labels(by_label: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    means = {}
    for metric in DIAGNOSIS_METRICS:
        values = np.stack([scores[metric] for scores in by_label])  # (L, R)
        defined = ~np.isnan(values)
        means[metric] = ratio(np.where(defined, values, 0.0).sum(axis=0), defined.sum(axis=0).astype(np.float64))
    return means


def descending(probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the order (K,) from the highest probability down, and the place (T,) of the last of each tied run."""
    order = np.argsort(-probabilities, kind="stable")
    ranked = probabilities[order]
    return order, np.append(np.flatnonzero(ranked[1:] != ranked[:-1]), len(ranked) - 1) if len(ranked) else order


def bin_numbers(probabilities: np.ndarray) -> np.ndarray:
    """Returns the number (K,) of the bin of each probability; bins are of equal width, 1.0 is in the last."""
    return np.minimum((np.asarray(probabilities) * NUM_BINS).astype(int), NUM_BINS - 1)


def fit_threshold(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Chooses the threshold with the highest F1; a study is called positive at or above it.

    F1 because it is the score that is reported at the threshold. Among equals the highest threshold is taken, the one
    with the fewest alarms. It lies half-way to the next lower probability, where new studies are the least likely to
    fall on the other side by accident.

    Args:
        labels: (N,), 1 present, 0 absent, NaN unknown.
        probabilities: (N,).

    Returns:
        NaN where the known labels are of one class only: there is nothing to fit.
    """
    labels, probabilities = check_scores(labels, probabilities)
    known = ~np.isnan(labels)
    present, probabilities = labels[known] == 1, probabilities[known]
    if present.all() or not present.any():
        return float("nan")
    order, ends = descending(probabilities)
    hits = np.cumsum(present[order])[ends]  # (T,)
    f1 = 2 * hits / (ends + 1 + present.sum())
    best = int(np.argmax(f1))
    values = probabilities[order][ends]
    return float(values[best] if best + 1 == len(values) else (values[best] + values[best + 1]) / 2)


def reliability(labels: np.ndarray, probabilities: np.ndarray) -> dict[str, list[float] | list[int]]:
    """Returns the reliability diagram: mean probability, share present and number of studies of each non-empty bin."""
    labels, probabilities = check_scores(labels, probabilities)
    known = ~np.isnan(labels)
    numbers = bin_numbers(probabilities[known])
    counts = np.bincount(numbers, minlength=NUM_BINS)
    filled = np.flatnonzero(counts)
    sums = {
        "confidence": np.bincount(numbers, probabilities[known], NUM_BINS),
        "accuracy": np.bincount(numbers, labels[known], NUM_BINS),
    }
    means = {name: (values[filled] / counts[filled]).tolist() for name, values in sums.items()}
    return means | {"count": counts[filled].tolist()}


def curves(labels: np.ndarray, probabilities: np.ndarray) -> dict[str, list[float]]:
    """Returns points of the ROC and the precision-recall curve, from the highest threshold down, at most 200.

    All four lists belong to the same thresholds; at the first nothing is called positive, and precision is 1 by
    convention.

    Raises:
        ValueError: If the known labels are of one class only.
    """
    labels, probabilities = check_scores(labels, probabilities)
    known = ~np.isnan(labels)
    present = labels[known] == 1
    if present.all() or not present.any():
        raise ValueError("Expected studies with and without the finding, got one class only.")
    order, ends = descending(probabilities[known])
    hits = np.concatenate([[0], np.cumsum(present[order])[ends]])
    called = np.concatenate([[0], ends + 1])
    if len(ends) >= MAX_CURVE_POINTS:
        chosen = np.unique(np.linspace(0, len(ends), MAX_CURVE_POINTS).round().astype(int))
        hits, called = hits[chosen], called[chosen]
    recall = hits / present.sum()
    return {
        "fpr": ((called - hits) / (~present).sum()).tolist(),
        "tpr": recall.tolist(),
        "precision": np.divide(hits, called, out=np.ones(len(hits)), where=called > 0).tolist(),
        "recall": recall.tolist(),
    }


def check_scores(labels: np.ndarray, probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns labels and probabilities (N,) as float64.

    Raises:
        ValueError: If shapes differ, a label is not 0, 1 or NaN, or a probability is not in 0..1.
    """
    labels, probabilities = np.asarray(labels, dtype=np.float64), np.asarray(probabilities, dtype=np.float64)
    if labels.ndim != 1 or labels.shape != probabilities.shape:
        raise ValueError(f"Expected one probability a label, got shapes {labels.shape} and {probabilities.shape}.")
    if not (np.isnan(labels) | (labels == 0) | (labels == 1)).all():
        raise ValueError("Expected labels of 1 (present), 0 (absent) or NaN (unknown), got others.")
    if not ((probabilities >= 0) & (probabilities <= 1)).all():
        raise ValueError("Expected probabilities from 0 to 1, got others.")
    return labels, probabilities
