# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Turn image features into probabilities: by phrases, by heads that learn from studies, or by the label prior alone.

Zero-shot, a study's embedding is compared with the mean embedding of a label's phrases, as the pipeline does it (see
`m3fm.diagnosis_m3fm`), uncalibrated.

A probe is L2-regularised logistic regression on standardised features, the usual way to ask what frozen features hold
(Radford et al., ICML 2021). One probe a label, from the studies whose label is known.

Letters in shapes: N studies, D features, L labels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from tqdm.auto import tqdm

from ..diagnosis_m3fm import LOGIT_DECIMALS, logistic, zero_shot_logits

Shots = int | Literal["full"]

# Inverse strength of the penalty. Features are standardised, so it means the same for every model. The candidates that
# cross-validation chooses from where there are studies enough; the default otherwise.
CANDIDATE_STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1)
DEFAULT_STRENGTH = 1e-2
NUM_FOLDS = 5
_MAX_ITERATIONS = 1000


class Diagnoser(Protocol):
    """What gives each study a probability for each label."""

    def predict(self, features: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Returns probabilities (N,) by label for features (N, D) by name, "shared" and "tower"."""


@dataclass(frozen=True)
class ZeroShot:
    """Compares images with phrases in the shared space.

    Attributes:
        names: L labels.
        present: (L, D), unit norm: what states each label.
        absent: (L, D), unit norm: what denies it.
        scale: What cosines are multiplied by, the checkpoint's.
        exclusive: Whether labels compete with each other rather than each with its own absence.
    """

    names: Sequence[str]
    present: np.ndarray
    absent: np.ndarray
    scale: float
    exclusive: bool

    def predict(self, features: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Returns probabilities (N,) by label for the features "shared" (N, D), unit norm."""
        logits = zero_shot_logits(features["shared"], self.present, self.absent, self.scale, self.exclusive)
        return dict(zip(self.names, logistic(logits).T, strict=True))


@dataclass(frozen=True)
class LabelPrior:
    """Knows how frequent each label is, and nothing of the image.

    Attributes:
        prevalence: Share of the training studies in which each label is present.
    """

    prevalence: Mapping[str, float]

    def predict(self, features: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Returns the same probability (N,) for every study, by label."""
        return {name: np.full(len(features["shared"]), share) for name, share in self.prevalence.items()}


@dataclass(frozen=True)
class Probe:
    """A fitted logistic head.

    Attributes:
        mean: (D,), of the training features.
        scale: (D,), their standard deviation.
        weight: (D,), on standardised features.
        bias: Added to the logit.
    """

    mean: np.ndarray
    scale: np.ndarray
    weight: np.ndarray
    bias: float

    def predict(self, features: np.ndarray) -> np.ndarray:
        """Returns the probability (N,) that the label is present, for features (N, D)."""
        return probability((np.asarray(features, dtype=np.float64) - self.mean) / self.scale @ self.weight + self.bias)


@dataclass(frozen=True)
class ProbeHeads:
    """One probe a label, on one kind of features.

    Attributes:
        space: Name of the features.
        probes: Label to its probe.
    """

    space: str
    probes: Mapping[str, Probe]

    def predict(self, features: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Returns probabilities (N,) by label."""
        return {name: probe.predict(features[self.space]) for name, probe in self.probes.items()}


@dataclass(frozen=True)
class Ensemble:
    """The mean probability of several systems that know the same labels."""

    members: Sequence[Diagnoser]

    def predict(self, features: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Returns probabilities (N,) by label."""
        predicted = [member.predict(features) for member in self.members]
        return {name: np.mean([each[name] for each in predicted], axis=0) for name in predicted[0]}


def fit_heads(
    space: str,
    features: np.ndarray,
    annotations: Mapping[str, np.ndarray],
    groups: Sequence[int],
    shots: Shots,
    seeds: Sequence[int],
) -> list[ProbeHeads]:
    """Trains a probe for each label, once for each seed, with a progress bar.

    Args:
        space: Name of the features.
        features: (N, D), of the training studies.
        annotations: Label to (N,), 1 present, 0 absent, NaN unknown.
        groups: (N,), the patient of each study.
        shots: Studies of each class, drawn anew for each seed; "full" takes all, with a penalty chosen by
            cross-validation.
        seeds: Of draws and folds.

    Raises:
        ValueError: If a label has one class only, or fewer patients in a class than `shots`.
        ImportError: Without scikit-learn.
    """
    heads = []
    with tqdm(total=len(seeds) * len(annotations), desc=f"probes on {space} features", unit="probe") as bar:
        for seed in seeds:
            probes = {}
            for name, labels in annotations.items():
                if shots == "full":
                    strength = choose_strength(features, labels, groups, seed)
                    probes[name] = fit_probe(features, labels, strength)
                else:
                    drawn = draw_shots(labels, groups, shots, seed)
                    probes[name] = fit_probe(features[drawn], labels[drawn])
                bar.update()
            heads.append(ProbeHeads(space, probes))
    return heads


def probability(logits: np.ndarray) -> np.ndarray:
    """Returns the logistic function of logits, which are rounded to what float32 features support."""
    return logistic(np.round(logits, LOGIT_DECIMALS))


def fit_probe(features: np.ndarray, labels: np.ndarray, strength: float = DEFAULT_STRENGTH) -> Probe:
    """Fits a probe to the studies whose label is known.

    Args:
        features: (N, D).
        labels: (N,), 1 present, 0 absent, NaN unknown.
        strength: Inverse of the L2 penalty on standardised features (scikit-learn's `C`).

    Raises:
        ValueError: If the known labels are of one class only.
        ImportError: Without scikit-learn.
    """
    regression = _logistic_regression()
    features, labels = np.asarray(features, dtype=np.float64), np.asarray(labels, dtype=np.float64)
    known = ~np.isnan(labels)
    features, labels = features[known], labels[known]
    if len(np.unique(labels)) < 2:
        raise ValueError("Expected training studies with and without the finding, got one class only.")
    mean, scale = features.mean(axis=0), features.std(axis=0)
    scale = np.where(scale > 1e-8, scale, 1.0)
    fitted = regression(C=strength, max_iter=_MAX_ITERATIONS).fit((features - mean) / scale, labels)
    return Probe(mean, scale, fitted.coef_[0], float(fitted.intercept_[0]))


def choose_strength(features: np.ndarray, labels: np.ndarray, groups: Sequence[int], seed: int = 0) -> float:
    """Chooses the penalty by the log loss of held-out studies, in folds that keep patients together.

    Args:
        features: (N, D).
        labels: (N,), 1 present, 0 absent, NaN unknown.
        groups: (N,), the patient of each study.
        seed: Of the folds.

    Returns:
        One of `CANDIDATE_STRENGTHS`, the smallest of equals; the default where a class is in too few patients to hold
        some out.
    """
    labels = np.asarray(labels, dtype=np.float64)
    folds = grouped_folds(labels, groups, seed)
    known = ~np.isnan(labels)
    parts = [(known & (folds != fold), known & (folds == fold)) for fold in range(NUM_FOLDS)]
    parts = [(rest, held) for rest, held in parts if held.any() and len(np.unique(labels[rest])) == 2]
    if len(parts) < 2:
        return DEFAULT_STRENGTH
    losses = []
    for strength in CANDIDATE_STRENGTHS:
        held_out = [
            _log_losses(fit_probe(features[rest], labels[rest], strength).predict(features[held]), labels[held])
            for rest, held in parts
        ]
        losses.append(np.concatenate(held_out).mean())
    return CANDIDATE_STRENGTHS[int(np.argmin(losses))]


def _log_losses(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return -np.log(np.clip(np.where(labels == 1, probabilities, 1 - probabilities), 1e-12, None))


def grouped_folds(labels: np.ndarray, groups: Sequence[int], seed: int = 0) -> np.ndarray:
    """Deals studies to folds (N,), numbered from 0, whole groups each.

    Groups come in random order, those with the finding first, the next one always to the fold that has the fewest
    studies of that kind: so the finding is in as many folds as there are groups with it.

    Args:
        labels: (N,), 1 present, 0 absent, NaN unknown.
        groups: (N,), the patient of each study.
        seed: Of the order.
    """
    members: dict[int, list[int]] = {}
    for place, group in enumerate(groups):
        members.setdefault(group, []).append(place)
    order = np.random.default_rng(seed).permutation(len(members))
    shuffled = [list(members.values())[number] for number in order]
    folds = np.zeros(len(labels), dtype=np.int64)
    with_finding = [places for places in shuffled if (labels[places] == 1).any()]
    without = [places for places in shuffled if not (labels[places] == 1).any()]
    for kind in (with_finding, without):
        sizes = np.zeros(NUM_FOLDS, dtype=np.int64)
        for places in kind:
            fold = int(np.argmin(sizes))
            folds[places] = fold
            sizes[fold] += len(places)
    return folds


def draw_shots(labels: np.ndarray, groups: Sequence[int], shots: int, seed: int) -> np.ndarray:
    """Draws studies to learn from: as many with the finding as without, each of a class from another patient.

    Args:
        labels: (N,), 1 present, 0 absent, NaN unknown.
        groups: (N,), the patient of each study.
        shots: Studies of each class.
        seed: Of the draw.

    Returns:
        (2 * shots,) places of the drawn studies, those with the finding first.

    Raises:
        ValueError: If `shots` is below 1, or above the number of patients in a class.
    """
    if shots < 1:
        raise ValueError(f"Expected shots >= 1, got {shots}.")
    if problem := learning_problem(labels, groups, shots):
        raise ValueError(f"{shots} shots are more than there are: {problem}.")
    firsts = one_study_a_patient(labels, groups, np.random.default_rng(seed))
    return np.concatenate([places[:shots] for places in firsts.values()])


def learning_problem(labels: np.ndarray, groups: Sequence[int], shots: Shots) -> str | None:
    """Says why a probe cannot learn from these studies; None if it can. See `draw_shots` for the arguments."""
    counts = [len(places) for places in one_study_a_patient(labels, groups, np.random.default_rng(0)).values()]
    least = 1 if shots == "full" else shots
    if min(counts) >= least:
        return None
    needed = "both classes" if shots == "full" else f"{shots} patients of each class"
    return f"learning needs {needed}, the training part has {counts[0]} patients with it and {counts[1]} without"


def one_study_a_patient(
    labels: np.ndarray, groups: Sequence[int], generator: np.random.Generator
) -> dict[str, np.ndarray]:
    """Returns places of studies "with" and "without" the finding in random order, each of another patient."""
    chosen = {}
    for kind, value in (("with", 1.0), ("without", 0.0)):
        places = generator.permutation(np.flatnonzero(labels == value))
        firsts = np.unique(np.asarray(groups)[places], return_index=True)[1]
        chosen[kind] = places[np.sort(firsts)]
    return chosen


def _logistic_regression() -> type:
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise ImportError('Probes need scikit-learn: pip install "m3fm[evaluate]"') from error
    return LogisticRegression
