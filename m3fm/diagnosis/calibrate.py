# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Calibrate zero-shot diagnosis on validation studies, and write the calibration into a copy of the checkpoint.

Platt scaling (Platt 1999): the probability is the logistic function of `scale * logit + bias`, a pair of numbers a
label, with `scale` > 0, so that the order of studies stays as it is. Fitted by penalised log loss on all sets
together, in which no set has more say than 100 studies: the largest would otherwise decide what a probability means.

The threshold is Youden's: it maximises sensitivity + specificity, which, unlike F1, do not depend on how frequent the
finding is where the model will be used.

Letters in shapes: N studies, L labels.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..data import Study, fingerprint, load_studies
from ..data.studies import source_name
from ..diagnosis_m3fm import (
    KINDS,
    calibrate_logits,
    check_diagnosis,
    label_phrases,
    logistic,
    mean_phrases,
    zero_shot_logits,
)
from ..evaluation.diagnosis_metrics import LabelMeasurement, descending
from ..evaluation.features import embed_resumably
from ..evaluation.probes import NUM_FOLDS, grouped_folds
from ..evaluation.reporter import CheckpointReporter, checkpoint_folder, embed_in_batches
from ..evaluation.resampling import cluster_weights, compare_rows
from ..evaluation.runs import group_numbers, open_output
from .prompts import default_diagnosis

VALIDATION = "validation"
# Patients with the finding, and without it, that a calibration needs.
MIN_PATIENTS = 10
# Standard deviations of what scale (its logarithm) and bias are expected to be before anything is seen.
_PRIOR_LOG_SCALE, _PRIOR_BIAS = 1.0, 3.0
_MAX_STEPS = 100
_MOST_SAY = 100
REPORTED = ("auroc", "ece", "brier")


@dataclass(frozen=True)
class EmbeddedSet:
    """The annotated validation studies of one data set.

    Attributes:
        name: Of the set.
        studies: N of them.
        images: (N, D), unit norm.
    """

    name: str
    studies: Sequence[Study]
    images: np.ndarray

    def annotate(self, finding: str) -> np.ndarray:
        """Returns 1 (present), 0 (absent) or NaN (unknown) for each study, (N,)."""
        known = [(study.findings or {}).get(finding, np.nan) for study in self.studies]
        return np.array(known, dtype=np.float64)


@dataclass(frozen=True)
class ScoredSet:
    """Zero-shot logits of the validation part of one data set.

    Attributes:
        name: Of the set.
        groups: (N,), the patient of each study.
        annotations: Label to (N,), 1 present, 0 absent, NaN unknown.
        logits: Label to (N,).
    """

    name: str
    groups: Sequence[int]
    annotations: Mapping[str, np.ndarray]
    logits: Mapping[str, np.ndarray]


# --------------------------------------------------------------------------------------------------------------------
# One label


def fit_platt(labels: np.ndarray, logits: np.ndarray, weights: np.ndarray | None = None) -> dict[str, float]:
    """Fits scale and bias by penalised log loss.

    Args:
        labels: (N,), 1 present, 0 absent.
        logits: (N,).
        weights: (N,), the say of each study; None: 1 each.

    Returns:
        "scale" > 0 and "bias". Their log loss is never above that of the logits as they are, which carry no penalty.

    Raises:
        ValueError: If shapes differ or only one class is there.
    """
    labels, logits = np.asarray(labels, dtype=np.float64), np.asarray(logits, dtype=np.float64)
    weights = np.ones(len(labels)) if weights is None else np.asarray(weights, dtype=np.float64)
    if not labels.shape == logits.shape == weights.shape or labels.ndim != 1:
        raise ValueError(f"Expected one logit a label, got shapes {labels.shape} and {logits.shape}.")
    if set(np.unique(labels)) != {0.0, 1.0}:
        raise ValueError("Expected studies with and without the finding, got one class only or unknown labels.")

    def objective(theta: np.ndarray) -> float:
        values = np.exp(theta[0]) * logits + theta[1]
        losses = np.logaddexp(0, values) - labels * values
        return float(weights @ losses + (theta[0] / _PRIOR_LOG_SCALE) ** 2 / 2 + (theta[1] / _PRIOR_BIAS) ** 2 / 2)

    theta = np.zeros(2)
    for _ in range(_MAX_STEPS):
        step = _newton_step(theta, labels, logits, weights)
        length = 1.0
        while objective(theta + length * step) > objective(theta) and length > 1e-8:
            length /= 2
        if length <= 1e-8 or np.abs(step).max() < 1e-9:
            break
        theta = theta + length * step
    return {"scale": float(np.exp(theta[0])), "bias": float(theta[1])}


def _newton_step(theta: np.ndarray, labels: np.ndarray, logits: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Returns the Newton step of (log scale, bias), of the convex part of the second derivative."""
    scaled = np.exp(theta[0]) * logits
    predicted = logistic(scaled + theta[1])
    slopes = np.stack([scaled, np.ones_like(scaled)])  # (2, N)
    prior = 1 / np.array([_PRIOR_LOG_SCALE, _PRIOR_BIAS]) ** 2
    gradient = slopes @ (weights * (predicted - labels)) + prior * theta
    curvature = (slopes * weights * predicted * (1 - predicted)) @ slopes.T + np.diag(prior)
    return -np.linalg.solve(curvature, gradient)


def fit_youden(labels: np.ndarray, probabilities: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Returns the threshold with the highest sensitivity + specificity; a study is called positive at or above it.

    Half-way to the next lower probability; of equals the highest, the one with the fewest alarms.

    Args:
        labels: (N,), 1 present, 0 absent, both there.
        probabilities: (N,).
        weights: (N,), the say of each study; None: 1 each.
    """
    weights = np.ones(len(labels)) if weights is None else np.asarray(weights, dtype=np.float64)
    present = np.asarray(labels) == 1
    order, ends = descending(np.asarray(probabilities, dtype=np.float64))
    hits = np.cumsum((weights * present)[order])[ends] / weights[present].sum()
    alarms = np.cumsum((weights * ~present)[order])[ends] / weights[~present].sum()
    best = int(np.argmax(np.round(hits - alarms, 12)))
    values = np.asarray(probabilities)[order][ends]
    return float(values[best] if best + 1 == len(values) else (values[best] + values[best + 1]) / 2)


@dataclass(frozen=True)
class _Pooled:
    """The studies of all sets in which a label is annotated, everything (N,)."""

    labels: np.ndarray
    logits: np.ndarray
    groups: np.ndarray
    sets: np.ndarray
    names: Sequence[str]

    def weights(self, chosen: np.ndarray) -> np.ndarray:
        """Returns the say of the chosen studies: that of a large set's adds up to that of `_MOST_SAY`."""
        counts = np.bincount(self.sets[chosen], minlength=len(self.names))
        return np.minimum(1, _MOST_SAY / np.maximum(counts, 1))[self.sets[chosen]]

    def fit(self, chosen: np.ndarray) -> dict[str, float] | None:
        """Fits the chosen studies; None where they are of one class."""
        if len(np.unique(self.labels[chosen])) < 2:
            return None
        return fit_platt(self.labels[chosen], self.logits[chosen], self.weights(chosen))


def _pool(sets: Sequence[ScoredSet], label: str) -> _Pooled:
    # A set in which all have the finding, or none, tells no more than how frequent it is there.
    kept = [each for each in sets if {0.0, 1.0} <= set(each.annotations[label].tolist())]
    labels, logits, groups, numbers = [np.zeros(0)], [np.zeros(0)], [np.zeros(0, int)], [np.zeros(0, int)]
    for number, each in enumerate(kept):
        places = np.flatnonzero(~np.isnan(each.annotations[label]))
        labels.append(each.annotations[label][places])
        logits.append(each.logits[label][places])
        groups.append(np.asarray(each.groups)[places] + max(groups[-1], default=-1) + 1)
        numbers.append(np.full(len(places), number))
    columns = [np.concatenate(column) for column in (labels, logits, groups, numbers)]
    return _Pooled(*columns, [each.name for each in kept])


def _shortage(pooled: _Pooled) -> str | None:
    """Says why a label cannot be calibrated; None if it can."""
    counts = [len(set(pooled.groups[pooled.labels == value].tolist())) for value in (1, 0)]
    if min(counts) >= MIN_PATIENTS:
        return None
    return f"{counts[0]} patients with it and {counts[1]} without, {MIN_PATIENTS} of each are needed"


def _fitted_on(pooled: _Pooled) -> str:
    parts = []
    for number, name in enumerate(pooled.names):
        labels = pooled.labels[pooled.sets == number]
        parts.append(f"{name} ({len(labels)} studies, {100 * labels.mean():.1f} % with it)")
    return f"validation parts of {', '.join(parts)}"


def cross_fitted(pooled: _Pooled, seed: int = 0) -> np.ndarray:
    """Returns probabilities (N,) of a label, each by a calibration that saw no study of the patient."""
    folds = grouped_folds(pooled.labels, pooled.groups.tolist(), seed)
    probabilities = np.zeros(len(pooled.labels))
    for fold in range(NUM_FOLDS):
        held = folds == fold
        probabilities[held] = logistic(calibrate_logits(pooled.logits[held], pooled.fit(~held)))
    return probabilities


# --------------------------------------------------------------------------------------------------------------------
# All labels


def fit_calibrations(
    table: Mapping[str, Any], sets: Sequence[ScoredSet]
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Returns a copy of the table with calibrations and thresholds, and why the other labels have none.

    Args:
        table: As `config.diagnosis`.
        sets: Logits of its labels.
    """
    fitted, uncalibrated = deepcopy(dict(table)), {}
    for key, entry in fitted.items():
        entry |= {"calibration": None, "threshold": None, "fitted_on": None}
        pooled = _pool(sets, key)
        if problem := _shortage(pooled):
            uncalibrated[key] = problem
            continue
        everything = np.ones(len(pooled.labels), dtype=bool)
        # Rounded for the reader; what is stored is what the threshold is fitted on.
        calibration = {name: round(value, 4) for name, value in pooled.fit(everything).items()}
        probabilities = logistic(calibrate_logits(pooled.logits, calibration))
        threshold = fit_youden(pooled.labels, probabilities, pooled.weights(everything))
        entry |= {"calibration": calibration, "threshold": round(threshold, 4), "fitted_on": _fitted_on(pooled)}
    return fitted, uncalibrated


def measure_calibrations(
    table: Mapping[str, Any], sets: Sequence[ScoredSet], num_resamples: int = 1000, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """Scores calibrated labels before and after, the calibration cross-fitted so that it never saw the patient.

    Args:
        table: As `config.diagnosis`, after `fit_calibrations`.
        sets: Those that it was fitted on.
        num_resamples: Of patients, for intervals.
        seed: Of folds and resamples.

    Returns:
        Label -> set -> "before" and "after" -> metric -> {"value", "low", "high"}; "studies" and "prevalence" of each
        set; and "difference" of Brier and ECE, after minus before, negative where calibration helps.
    """
    measured: dict[str, dict[str, Any]] = {}
    for key in (key for key, entry in table.items() if entry.get("calibration")):
        pooled = _pool(sets, key)
        after, threshold = cross_fitted(pooled, seed), table[key]["threshold"]
        before = logistic(pooled.logits)
        measured[key] = {}
        for number, name in enumerate(pooled.names):
            places = np.flatnonzero(pooled.sets == number)
            systems = {
                row: [[LabelMeasurement(pooled.labels[places], values[places], values[places] >= cut)]]
                for row, values, cut in (("after", after, threshold), ("before", before, 0.5))
            }
            weights = cluster_weights(pooled.groups[places].tolist(), num_resamples, seed)
            points, intervals, differences = compare_rows(systems, weights)
            measured[key][name] = {
                "studies": len(places),
                "prevalence": float(pooled.labels[places].mean()),
                **{row: {m: _with_interval(points[row][m], intervals[row][m]) for m in REPORTED} for row in systems},
                "difference": {m: differences["before"][m] for m in REPORTED},
            }
    return measured


def _with_interval(value: float, interval: tuple[float, float]) -> dict[str, float]:
    return {"value": value, "low": interval[0], "high": interval[1]}


# --------------------------------------------------------------------------------------------------------------------
# A checkpoint


def embed_sets(
    reporter: CheckpointReporter,
    model_dir: str | Path,
    data_folders: Sequence[str | Path],
    store: Path,
    batch_size: int,
) -> list[EmbeddedSet]:
    """Embeds the annotated validation studies of each folder, resumably.

    Args:
        reporter: Of the checkpoint.
        model_dir: Its folder.
        data_folders: Data folders.
        store: Where the features are kept, a folder for each set.
        batch_size: Studies at once.

    Raises:
        ValueError: If a folder has no annotated validation studies with images, or comes twice.
    """
    names = [source_name(folder) for folder in data_folders]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"Expected data folders of different names, got {names}.")
    parts = [_validation_studies(Path(folder)) for folder in data_folders]
    identity = _hash_features(checkpoint_folder(model_dir))
    embedded = []
    for name, studies in zip(names, parts, strict=True):
        run = {"task": "features", "model_sha256": identity, "data_sha256": fingerprint(studies)}
        folder = open_output(store / name, run)
        images = embed_resumably(reporter.embed_studies, studies, folder, "images", batch_size)["shared"]
        embedded.append(EmbeddedSet(name, studies, images))
    return embedded


def score_sets(
    reporter: CheckpointReporter, table: Mapping[str, Any], sets: Sequence[EmbeddedSet], batch_size: int
) -> list[ScoredSet]:
    """Scores all labels of a table, as `config.diagnosis`, on embedded studies."""
    vectors = [_embed_table(reporter, table, kind, batch_size) for kind in KINDS]
    scored = []
    for each in sets:
        logits = zero_shot_logits(each.images, *vectors, reporter.logit_scale)
        by_label = dict(zip(table, logits.T, strict=True))
        annotations = {key: each.annotate(key) for key in table}
        scored.append(ScoredSet(each.name, group_numbers(each.studies), annotations, by_label))
    return scored


def _hash_features(folder: Path) -> str:
    """Returns the SHA-256 over what features depend on: all of a checkpoint but its labels."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = {name: value for name, value in config.items() if not name.startswith("diagnosis")}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for path in sorted([*folder.glob("*.safetensors"), folder / "processor_config.json"]):
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _validation_studies(folder: Path) -> list[Study]:
    studies = [study for study in load_studies(folder) if study.split == VALIDATION]
    studies = [study for study in studies if study.images and study.findings]
    if not studies:
        raise ValueError(f"{folder} has no annotated studies with images in the part {VALIDATION!r}.")
    return studies


def _embed_table(reporter: CheckpointReporter, table: Mapping[str, Any], kind: str, batch_size: int) -> np.ndarray:
    phrases = [[text for texts in label_phrases(table, key, kind).values() for text in texts] for key in table]
    return mean_phrases(phrases, lambda texts: embed_in_batches(reporter, texts, batch_size))


def calibrate_checkpoint(
    model_dir: str | Path,
    data_folders: Sequence[str | Path],
    output_dir: str | Path,
    batch_size: int = 8,
    device: str = "cpu",
    features_dir: str | Path | None = None,
    num_resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Writes a copy of a checkpoint whose labels are calibrated on validation studies; its weights stay as they are.

    Args:
        model_dir: A checkpoint folder. Its own labels are calibrated, or those of the package where it has none.
        data_folders: Data folders with a part "validation", the only one that is looked at.
        output_dir: Made; must not exist, or be empty.
        batch_size: Studies at once.
        device: A torch device.
        features_dir: Where image features are kept, so that a stopped run goes on; None: beside the output.
        num_resamples: Of patients, for the intervals of what is reported.
        seed: Of folds and resamples.

    Returns:
        "calibrated": label to its calibration, threshold and `fitted_on`; "uncalibrated": label to the reason;
        "measured": see `measure_calibrations`; "output_dir".

    Raises:
        ValueError: If the checkpoint or the data do not fit, no label can be calibrated, or the output is not empty.
    """
    source, output = checkpoint_folder(model_dir), Path(output_dir)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} is not an empty folder: expected a new one.")
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    table = config.get("diagnosis") or default_diagnosis()
    check_diagnosis(table)
    reporter = CheckpointReporter(source, device)
    store = output.with_name(f"{output.name}_features") if features_dir is None else Path(features_dir)
    sets = score_sets(reporter, table, embed_sets(reporter, source, data_folders, store, batch_size), batch_size)
    fitted, uncalibrated = fit_calibrations(table, sets)
    if len(uncalibrated) == len(table):
        raise ValueError(f"No label can be calibrated. {'; '.join(f'{k}: {v}' for k, v in uncalibrated.items())}.")
    measured = measure_calibrations(fitted, sets, num_resamples, seed)
    _write_checkpoint(source, output, fitted)
    kept = ("calibration", "threshold", "fitted_on")
    return {
        "output_dir": str(output),
        "calibrated": {key: {name: fitted[key][name] for name in kept} for key in measured},
        "uncalibrated": uncalibrated,
        "measured": measured,
    }


def _write_checkpoint(source: Path, output: Path, table: Mapping[str, Any]) -> None:
    """Copies a checkpoint, what a training run left beside it excepted, and puts the labels into its config."""
    staging = output.absolute().with_name(f".{output.absolute().name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    for path in sorted(source.iterdir()):
        if path.is_file() and path.suffix in {".json", ".safetensors", ".md", ".py", ""}:
            shutil.copyfile(path, staging / path.name)
    write_labels(staging / "config.json", table)
    if output.is_dir():
        output.rmdir()
    staging.rename(output)


def write_labels(path: Path, table: Mapping[str, Any]) -> None:
    """Puts labels into a config file, as transformers writes one, but Chinese to be read rather than escaped."""
    config = json.loads(path.read_text(encoding="utf-8")) | {"diagnosis": table}
    path.write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


__all__ = [
    "EmbeddedSet",
    "ScoredSet",
    "calibrate_checkpoint",
    "cross_fitted",
    "embed_sets",
    "fit_calibrations",
    "fit_platt",
    "fit_youden",
    "measure_calibrations",
    "score_sets",
    "write_labels",
]
