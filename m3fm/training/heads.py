# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Linear heads on frozen features: penalised logistic regression, alone or from what a label's phrases say.

One objective serves all: the cross-entropy of logits `x W + b + prior(x)`, summed over studies, plus
`penalty / 2 * |W|²`. With a prior the head starts at the zero-shot classifier and moves away from it as far as the
studies ask for (as Tip-Adapter, ECCV 2022, and CLAP, CVPR 2024, do); without one it is a linear probe.

Letters in shapes: N studies, D features, R rank of the features, L classes, P penalties.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..evaluation.diagnosis_metrics import LabelMeasurement, fit_threshold

# Blocks of features are scaled to a mean square norm of 1, so that a penalty means the same for every model.
PENALTIES = (30.0, 10.0, 3.0, 1.0, 0.3, 0.1)
# Tried besides where there are many studies.
LIGHT_PENALTIES = (0.03, 0.01)
# The best from one and two studies of a class, where nothing can be held out.
DEFAULT_PENALTY = 3.0
NUM_FOLDS = 5
# Folds of few studies are luck: they are dealt anew several times.
NUM_DEALS, MANY_STUDIES = 3, 200
_MAX_STEPS = 2000
_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Head:
    """A linear head on features as they are.

    Attributes:
        space: Names of the features, in the order of the rows of `weight`.
        weight: (D, L).
        bias: (L,).
    """

    space: tuple[str, ...]
    weight: np.ndarray
    bias: np.ndarray

    def logits(self, features: Mapping[str, np.ndarray]) -> np.ndarray:
        """Returns logits (N, L) for features (N, .) by name."""
        return join(features, self.space) @ self.weight + self.bias


def join(features: Mapping[str, np.ndarray], space: Sequence[str]) -> np.ndarray:
    """Returns the features (N, D) of a space side by side."""
    return np.concatenate([np.asarray(features[name], dtype=np.float64) for name in space], axis=1)


def fit_heads(
    space: Sequence[str],
    features: Mapping[str, np.ndarray],
    targets: np.ndarray,
    penalties: Sequence[float],
    exclusive: bool,
    prior: np.ndarray | None = None,
) -> list[Head]:
    """Fits a head for each penalty.

    Args:
        space: Names of the features that are learned on.
        features: (N, .) by name.
        targets: (N, L), 1 present, 0 absent, NaN unknown; one-hot where classes exclude each other.
        penalties: P of them, each above 0.
        exclusive: Whether classes compete (softmax) or stand alone (sigmoid).
        prior: (D_shared, L): logits of the zero-shot classifier are the features "shared" times this; None: 0.
    """
    space = tuple(space)
    blocks = [np.asarray(features[name], dtype=np.float64) for name in space]
    means = [block.mean(axis=0) for block in blocks]
    norms = [np.sqrt(((b - mean) ** 2).sum(axis=1).mean()) for b, mean in zip(blocks, means, strict=True)]
    scales = [np.full(block.shape[1], max(norm, 1e-8)) for block, norm in zip(blocks, norms, strict=True)]
    mean, scale = np.concatenate(means), np.concatenate(scales)
    offset = 0.0 if prior is None else np.asarray(features["shared"], dtype=np.float64) @ prior  # (N, L)
    standard = (np.concatenate(blocks, axis=1) - mean) / scale
    weights, biases = _minimise(standard, targets, np.asarray(penalties, dtype=np.float64), exclusive, offset)
    heads = []
    for weight, bias in zip(weights / scale[:, None], biases, strict=True):
        bias = bias - mean @ weight
        heads.append(Head(space, weight, bias) if prior is None else _with_prior(space, weight, bias, features, prior))
    return heads


def _with_prior(
    space: tuple[str, ...], weight: np.ndarray, bias: np.ndarray, features: Mapping[str, np.ndarray], prior: np.ndarray
) -> Head:
    """Returns the head whose weights include the prior, which is linear in the shared features."""
    if "shared" not in space:
        return Head(("shared", *space), np.concatenate([prior, weight]), bias)
    start = sum(features[name].shape[1] for name in space[: space.index("shared")])
    weight = weight.copy()
    weight[start : start + len(prior)] += prior
    return Head(space, weight, bias)


def _minimise(
    features: np.ndarray, targets: np.ndarray, penalties: np.ndarray, exclusive: bool, offset: np.ndarray | float
) -> tuple[np.ndarray, np.ndarray]:
    """Returns weights (P, D, L) and biases (P, L) for centred features (N, D), all penalties at once.

    Rotated to their principal axes, features have a diagonal Gram matrix, and with it a diagonal bound of the Hessian
    (Böhning, 1992): steps scaled by it never overshoot. Momentum with restarts (O'Donoghue and Candès, 2015) makes
    them fast.
    """
    known = ~np.isnan(targets)  # (N, L)
    wanted = np.where(known, targets, 0.0)
    left, singular, axes = np.linalg.svd(features, full_matrices=False)
    kept = singular > 1e-10 * max(singular.max(initial=0.0), 1e-300)
    rotated, axes = left[:, kept] * singular[kept], axes[kept]  # (N, R), (R, D)
    # The last column is the bias, which nearly nothing holds back: only so that one class alone has a solution.
    design = np.concatenate([rotated, np.ones((len(features), 1))], axis=1)  # (N, R + 1)
    pull = np.concatenate([np.tile(penalties[:, None], (1, rotated.shape[1])), np.full((len(penalties), 1), 1e-3)], 1)
    pull = pull[:, :, None]  # (P, R + 1, 1)
    curvature = 0.5 if exclusive else 0.25
    bound = curvature * np.append(singular[kept] ** 2, len(features))[None, :, None] + pull
    solution = np.zeros((len(penalties), design.shape[1], targets.shape[1]))  # (P, R + 1, L)
    ahead, momentum = solution, 1.0
    for _ in range(_MAX_STEPS):
        logits = design @ ahead + offset  # (P, N, L)
        expected = _softmax(logits) if exclusive else sigmoid(logits)
        step = (design.T @ (known * (wanted - expected)) - pull * ahead) / bound
        following = ahead + step
        if np.abs(step).max() < _TOLERANCE * (1 + np.abs(following).max()):
            solution = following
            break
        moved = following - solution
        if (bound * step * moved).sum() < 0:
            momentum = 1.0
        next_momentum = (1 + np.sqrt(1 + 4 * momentum**2)) / 2
        ahead = following + (momentum - 1) / next_momentum * moved
        solution, momentum = following, next_momentum
    return axes.T @ solution[:, :-1], solution[:, -1]


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Returns the logistic function."""
    return 0.5 * (1 + np.tanh(logits / 2))


def _softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)


def probabilities(logits: np.ndarray, exclusive: bool) -> np.ndarray:
    """Returns probabilities (N, L) of logits (N, L)."""
    return _softmax(logits) if exclusive else sigmoid(logits)


# --------------------------------------------------------------------------------------------------------------------
# Cross-validation


@dataclass(frozen=True)
class HeldOut:
    """What folds said of studies that they did not learn from.

    Attributes:
        logits: (R, N, L) of R deals of folds; NaN where a fold could not learn a class, or the target is unknown.
        targets: (N, L), 1 present, 0 absent, NaN unknown.
        exclusive: Whether classes compete.
    """

    logits: np.ndarray
    targets: np.ndarray
    exclusive: bool

    @property
    def is_empty(self) -> bool:
        """Returns whether there is nothing to score: a class is in too few patients to hold some out."""
        return bool(np.isnan(self.logits).all())

    def losses(self, scale: float | np.ndarray = 1.0) -> np.ndarray:
        """Returns the log loss (R, N, L) or, of exclusive classes, (R, N) of logits times `scale`."""
        logits = self.logits * scale
        if self.exclusive:
            shifted = logits - logits.max(axis=-1, keepdims=True)
            return np.log(np.exp(shifted).sum(axis=-1)) - (shifted * self.targets).sum(axis=-1)
        with np.errstate(invalid="ignore"):  # NaN where nothing was held out
            return np.logaddexp(0.0, np.where(self.targets == 1, -logits, logits))

    def scores(self) -> dict[str, float]:
        """Returns the mean log loss, and the AUROC of one class against the rest, mean over classes and deals."""
        areas = [
            LabelMeasurement(labels, p, p >= 0.5).score(np.ones((1, len(p))))["auroc"][0]
            for logits in self.logits
            for labels, p in self._columns(logits)
        ]
        areas = [area for area in areas if not np.isnan(area)]
        return {"log_loss": float(np.nanmean(self.losses())), "auroc": float(np.mean(areas)) if areas else np.nan}

    def temperature(self) -> np.ndarray:
        """Returns what to multiply logits (L,) by (temperature scaling: Guo et al., ICML 2017).

        Classes that compete share one value. Few held-out studies move it little from 1.
        """
        candidates = np.exp(np.linspace(np.log(0.125), np.log(4.0), 51))
        kept = (0, 1, 2) if self.exclusive else (0, 1)
        # A study counts once, however often it was dealt.
        losses = np.stack([_total(self.losses(scale), kept) / len(self.logits) for scale in candidates])
        best = candidates[
            np.argmin(losses + (2 * np.log(candidates) ** 2).reshape(-1, *[1] * (losses.ndim - 1)), axis=0)
        ]
        return np.broadcast_to(best, self.targets.shape[1:]).copy()

    def thresholds(self, scale: np.ndarray) -> np.ndarray:
        """Returns the probability (L,) from which on F1 is highest; 0.5 where nothing was held out."""
        fitted = np.full(self.targets.shape[1], 0.5)
        pairs = [list(self._columns(logits * scale)) for logits in self.logits]
        for column in range(len(fitted)):
            labels, values = (np.concatenate([deal[column][part] for deal in pairs]) for part in (0, 1))
            threshold = fit_threshold(labels, values)
            fitted[column] = 0.5 if np.isnan(threshold) else threshold
        return fitted

    def _columns(self, logits: np.ndarray) -> Sequence[tuple[np.ndarray, np.ndarray]]:
        """Returns the known targets and the probabilities of each class for logits (N, L)."""
        known = ~np.isnan(logits) & ~np.isnan(self.targets)
        values = probabilities(logits, self.exclusive)
        return [(self.targets[k, c], values[k, c]) for c, k in enumerate(known.T)]


def _total(losses: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    return np.nansum(losses, axis=axes[: losses.ndim])


def deal_folds(targets: np.ndarray, groups: np.ndarray, num_folds: int, seed: int) -> np.ndarray:
    """Deals studies to folds (N,), whole groups each, every class spread as evenly as groups allow.

    Args:
        targets: (N, L), 1 present, 0 absent, NaN unknown.
        groups: (N,), the patient of each study.
        num_folds: Folds there are; of few groups some stay empty.
        seed: Of the order in which groups are dealt.
    """
    strata = np.concatenate([targets == 1, targets == 0], axis=1).astype(np.float64)  # (N, 2 L)
    strata /= np.maximum(strata.sum(axis=0), 1)
    _, numbers = np.unique(groups, return_inverse=True)
    by_group = np.zeros((numbers.max() + 1, strata.shape[1]))
    np.add.at(by_group, numbers, strata)
    order = np.random.default_rng(seed).permutation(len(by_group))
    # Groups with the rarest classes first, while every fold is still open to them.
    order = order[np.argsort(-by_group[order].max(axis=1), kind="stable")]
    filled, fold_of = np.zeros((num_folds, strata.shape[1])), np.zeros(len(by_group), dtype=np.int64)
    for group in order:
        fold_of[group] = np.argmin(filled @ by_group[group])
        filled[fold_of[group]] += by_group[group]
    return fold_of[numbers]


def hold_out(
    fit: Callable[[np.ndarray], Callable[[np.ndarray], np.ndarray]],
    targets: np.ndarray,
    groups: np.ndarray,
    exclusive: bool,
    seed: int,
    num_folds: int = NUM_FOLDS,
    num_deals: int = 1,
) -> np.ndarray:
    """Returns logits (R, N, ..., L) of studies by what was learned from other patients.

    Args:
        fit: Takes the places of studies to learn from; returns what takes places and gives logits (n, ..., L).
        targets: (N, L), 1 present, 0 absent, NaN unknown.
        groups: (N,), the patient of each study.
        exclusive: Whether classes compete: a fold then needs all of them to learn from.
        seed: Of the first deal of folds; the next ones follow.
        num_folds: Parts that are held out in turn.
        num_deals: R, how often folds are dealt.

    Returns:
        NaN where nothing could be learned, or where the target is unknown.
    """
    deals = []
    for deal in range(num_deals):
        folds = deal_folds(targets, groups, num_folds, seed + deal)
        held_logits: np.ndarray | None = None
        for fold in range(num_folds):
            rest, held = np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)
            learnable = (targets[rest] == 1).any(axis=0) & (targets[rest] == 0).any(axis=0)  # (L,)
            if not len(held) or not (learnable.all() if exclusive else learnable.any()):
                continue
            values = fit(rest)(held)
            if held_logits is None:
                held_logits = np.full((len(targets), *values.shape[1:]), np.nan)
            held_logits[held] = np.where(learnable, values, np.nan)
        deals.append(held_logits)
    found = [deal for deal in deals if deal is not None]
    if not found:
        return np.full((1, *targets.shape), np.nan)
    logits = np.stack(found)
    unknown = np.isnan(targets).reshape(len(targets), *[1] * (logits.ndim - 3), targets.shape[1])
    return np.where(unknown, np.nan, logits)


@dataclass(frozen=True)
class Choice:
    """A way to learn a head, and what folds say of it.

    Attributes:
        method: Its name.
        space: Names of the features that it learns on.
        penalty: Of the weights.
        held_out: Predictions of the folds.
    """

    method: str
    space: tuple[str, ...]
    penalty: float
    held_out: HeldOut

    @property
    def loss(self) -> float:
        """Returns the log loss of held-out patients; infinite where there are none."""
        return float("inf") if self.held_out.is_empty else float(np.nanmean(self.held_out.losses()))


def choose_heads(
    methods: Mapping[str, np.ndarray | None],
    spaces: Sequence[tuple[str, ...]],
    features: Mapping[str, np.ndarray],
    targets: np.ndarray,
    groups: np.ndarray,
    exclusive: bool,
    seed: int = 0,
) -> list[Choice]:
    """Chooses features and penalty of each method by the log loss of held-out patients; the best method comes first.

    Args:
        methods: Name to its prior (see `fit_heads`), in order of preference where nothing can be held out.
        spaces: Names of features to choose from; the first of them is taken where nothing can be held out.
        features: (N, .) by name.
        targets: (N, L), 1 present, 0 absent, NaN unknown.
        groups: (N,), the patient of each study.
        exclusive: Whether classes compete.
        seed: Of the folds.
    """
    choices = []
    for method, prior in methods.items():
        candidates = [
            Choice(method, space, penalty, HeldOut(logits, targets, exclusive))
            for space in spaces
            for penalty, logits in _hold_out_heads(space, prior, features, targets, groups, exclusive, seed).items()
        ]
        default = Choice(method, spaces[0], DEFAULT_PENALTY, candidates[0].held_out)
        choices.append(default if default.held_out.is_empty else min(candidates, key=lambda each: each.loss))
    return sorted(choices, key=lambda choice: choice.loss)


def _hold_out_heads(
    space: tuple[str, ...],
    prior: np.ndarray | None,
    features: Mapping[str, np.ndarray],
    targets: np.ndarray,
    groups: np.ndarray,
    exclusive: bool,
    seed: int,
) -> dict[float, np.ndarray]:
    """Returns held-out logits (R, N, L) for each penalty."""
    many = len(targets) >= MANY_STUDIES
    penalties = PENALTIES + LIGHT_PENALTIES if many else PENALTIES

    def fit(rest: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
        heads = fit_heads(space, _take(features, rest), targets[rest], penalties, exclusive, prior)
        return lambda held: np.stack([head.logits(_take(features, held)) for head in heads], axis=1)

    # Deals of many studies agree, and take time.
    logits = hold_out(fit, targets, groups, exclusive, seed, num_deals=1 if many else NUM_DEALS)
    if np.isnan(logits).all():
        return dict.fromkeys(penalties, np.full((1, *targets.shape), np.nan))
    return {penalty: logits[:, :, number] for number, penalty in enumerate(penalties)}


def describe(choices: Sequence[Choice]) -> dict[str, Any]:
    """Returns the scores of methods by name, empty where nothing could be held out."""
    return {
        choice.method: {"features": "+".join(choice.space), "penalty": choice.penalty, **choice.held_out.scores()}
        for choice in choices
        if not choice.held_out.is_empty
    }


def _take(features: Mapping[str, np.ndarray], places: np.ndarray) -> dict[str, np.ndarray]:
    return {name: values[places] for name, values in features.items()}
