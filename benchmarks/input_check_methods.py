# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Ways to tell a chest image from anything else, compared at one rate of false refusal.

All are fitted to the fit parts and refuse what scores above `QUANTILE` of the tuning part's chest images, plain and
changed. Each kind of other thing is then met as one that the method has never seen: kinds of the fit parts are left
out of the fit one after the other, those of the measuring parts were never in it.

What ships is the regression on tokens: adding the residual refuses somewhat more, for a file more than ten times as
large (two sets of 64 components).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from m3fm.input_check_m3fm import KINDS, against
from m3fm.training.input_check import DECAY, logistic_regression

QUANTILE = 0.998
COMPONENTS = 64
OTHER = KINDS.index("other")
CT = KINDS.index("ct")

# Kinds that are left out together: the same part of the body in another size or pose.
FAMILIES = {
    "head_ct": "head CT",
    "head_ct_64": "head CT",
    "bone_xray": "limb X-rays",
    "hand_xray_64": "limb X-rays",
    "knee_xray": "limb X-rays",
    "white_noise": "noise",
    "soft_noise": "noise",
}

Score = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Rows:
    """Hold what a method reads of images, (n, d), and what they are.

    Attributes:
        features: (n, d).
        kinds: (n,), numbers of `KINDS`.
        sources: (n,), data set or kind of other thing.
    """

    features: np.ndarray
    kinds: np.ndarray
    sources: np.ndarray

    def take(self, chosen: np.ndarray) -> "Rows":
        """Return some of the rows."""
        return Rows(self.features[chosen], self.kinds[chosen], self.sources[chosen])


def fit_regression(rows: Rows) -> Score:
    """Fit chest X-ray, chest CT and the rest; the score is the log odds of the rest."""
    weight, bias = logistic_regression(rows.features, rows.kinds, len(KINDS), DECAY)
    return lambda features: against(features @ weight.T + bias, [OTHER])


def fit_residual(rows: Rows) -> Score:
    """Fit the principal components of radiographs and of CT; the score is the log of what they leave over."""
    return _nearest(rows, lambda inside, outside, scale: outside)


def fit_mahalanobis(rows: Rows) -> Score:
    """Fit a Gaussian to radiographs and one to CT; the score is the log distance from the nearer."""
    return _nearest(rows, lambda inside, outside, scale: inside + outside / scale)


def fit_neighbour(rows: Rows) -> Score:
    """Keep the chest images; the score is one minus the cosine to the nearest."""
    chest = rows.features[rows.kinds != OTHER]
    mean, deviation = chest.mean(0), chest.std(0) + 1e-6

    def unit(features: np.ndarray) -> np.ndarray:
        scaled = (features - mean) / deviation
        return scaled / np.linalg.norm(scaled, axis=1, keepdims=True)

    kept = unit(chest)
    return lambda features: 1 - (unit(features) @ kept.T).max(1)


def fit_both(rows: Rows) -> Score:
    """Add the residual, in its own deviations over chest images, to the regression."""
    regression, residual = fit_regression(rows), fit_residual(rows)
    usual = residual(rows.features[rows.kinds != OTHER])
    return lambda features: regression(features) + (residual(features) - usual.mean()) / usual.std()


def _nearest(rows: Rows, combine: Callable[[np.ndarray, np.ndarray, float], np.ndarray]) -> Score:
    chest = rows.take(rows.kinds != OTHER)
    mean, deviation = chest.features.mean(0), chest.features.std(0) + 1e-6
    models = []
    for group in (chest.kinds != CT, chest.kinds == CT):
        scaled = (chest.features[group] - mean) / deviation
        centre = scaled.mean(0)
        count = min(COMPONENTS, len(scaled) - 1)
        _, lengths, axes = np.linalg.svd(scaled - centre, full_matrices=False)
        variances = lengths[:count] ** 2 / len(scaled)
        rest = float((lengths[count:] ** 2).sum() / len(scaled) / max(1, scaled.shape[1] - count))
        models.append((centre, axes[:count], variances, max(rest, 1e-9)))

    def score(features: np.ndarray) -> np.ndarray:
        distances = []
        for centre, axes, variances, rest in models:
            scaled = (features - mean) / deviation - centre
            inside = scaled @ axes.T
            outside = (scaled**2).sum(1) - (inside**2).sum(1)
            distances.append(combine((inside**2 / variances).sum(1), outside, rest))
        return np.log(np.maximum(np.min(distances, axis=0), 1e-12))

    return score


def refused_share(
    fit: Callable[[Rows], Score], rows: Rows, tuning: Rows, chest: Rows, others: Rows
) -> dict[str, float]:
    """Return the share refused of each kind, none of which the method has seen, and of the measured chest images.

    Args:
        fit: Of this module.
        rows: Fit parts, chest and other things.
        tuning: Chest images that set the limit.
        chest: Chest images of the measuring parts.
        others: Other things of the measuring parts.
    """
    shares = {}
    families = np.array([FAMILIES.get(source, source) for source in rows.sources])
    for source in np.unique(families[rows.kinds == OTHER]):
        held = (families == source) & (rows.kinds == OTHER)
        score = fit(rows.take(~held))
        limit = np.quantile(score(tuning.features), QUANTILE)
        shares[f"left out: {source}"] = float((score(rows.features[held]) > limit).mean())
    score = fit(rows)
    limit = np.quantile(score(tuning.features), QUANTILE)
    for source in np.unique(others.sources):
        shares[f"unseen: {source}"] = float((score(others.features[others.sources == source]) > limit).mean())
    return shares | {"chest": float((score(chest.features) > limit).mean())}
