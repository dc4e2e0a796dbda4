# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Evaluate diagnosis on a data folder: zero-shot, from a few studies of each class, or from all; floors beside it.

`evaluate_diagnosis` is what `m3fm evaluate --task diagnosis` runs. How probabilities come about is in `probes`, what
is scored in `diagnosis_metrics`.

Letters in shapes: N studies, D features, L labels.
"""

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..data import Study, fingerprint, load_studies
from ..data.splits import new_to
from ..diagnosis_m3fm import mean_phrases
from .baselines import derangement
from .diagnosis_metrics import (
    MACRO,
    LabelMeasurement,
    PanelMeasurement,
    by_column,
    curves,
    fit_threshold,
    reliability,
)
from .features import embed_resumably
from .label_file import LabelSet, annotate, choose_labels
from .page import write_page
from .probes import (
    NUM_FOLDS,
    Diagnoser,
    Ensemble,
    LabelPrior,
    Shots,
    ZeroShot,
    fit_heads,
    grouped_folds,
    learning_problem,
)
from .reporter import CONTROLS, CheckpointReporter, Reporter, embed_in_batches, hash_checkpoint
from .resampling import cluster_weights, compare_rows, point_scores
from .runs import (
    FORMAT,
    METRICS_FILE,
    PREDICTIONS,
    command_line,
    group_numbers,
    hash_order,
    hash_text,
    open_output,
    provenance,
    write_json,
)
from .selection import evaluated_and_training
from .tables import difference, markdown_table
from .titles import ROW_TITLES, column_title, metric_title, number

# Heads from few studies depend on which: their scores are means over this many draws.
SHOT_TRIALS = 5
# One shuffle of few studies is luck, and many studies need fewer.
_MOST_SHUFFLES, _STUDIES_SHUFFLED = 10, 10_000
# Where nothing can be fitted, a probability is taken at its word.
DEFAULT_THRESHOLD = 0.5
_VALIDATION = "validation"
_TABLE_METRICS = ("auprc", "f1", "sensitivity", "specificity", "sensitivity_at_specificity_90", "ece", "brier")


@dataclass(frozen=True)
class _Part:
    """Studies of one part of the data, and what is known of them.

    Attributes:
        studies: With images and annotations; may be none.
        groups: Number of each study's patient or paper.
        annotations: Label to (N,), 1 present, 0 absent, NaN unknown.
        features: (N, D) by name; empty until embedded.
    """

    studies: Sequence[Study]
    groups: Sequence[int]
    annotations: Mapping[str, np.ndarray]
    features: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class _Data:
    """All that a run looks at; no patient is in two parts, and `controls` are features of images that show nothing."""

    evaluated: _Part
    validation: _Part
    training: _Part
    controls: Mapping[str, Mapping[str, np.ndarray]]


@dataclass(frozen=True)
class _Trial:
    """One draw of one system on the evaluated studies, everything (N,) by label."""

    probabilities: Mapping[str, np.ndarray]
    thresholds: Mapping[str, np.ndarray]

    def measure(self, annotations: Mapping[str, np.ndarray], names: Sequence[str]) -> PanelMeasurement:
        """Returns what scores it."""
        labels = {
            name: LabelMeasurement(annotations[name], values, values >= self.thresholds[name])
            for name, values in self.probabilities.items()
        }
        return PanelMeasurement(labels, names)


def evaluate_diagnosis(
    model_dir: str | Path,
    data_folder: str | Path,
    labels: str | Path | Sequence[str] | None = None,
    shots: Shots = 0,
    output_dir: str | Path = "evaluation",
    split: str | None = None,
    languages: Sequence[str] | None = None,
    batch_size: int = 8,
    seed: int = 0,
    device: str = "cpu",
    num_resamples: int = 1000,
    training_data: str | Path | None = None,
    features_dir: str | Path | None = None,
) -> dict[str, Any]:
    """Evaluates a checkpoint's diagnoses beside the floors, prints the table, returns what `metrics.json` holds.

    Writes `predictions.jsonl`, `run.json`, `metrics.json` and `report.html`, and keeps the image features: an
    interrupted run goes on after those it has.

    Args:
        model_dir: A checkpoint folder.
        data_folder: Heads and floors learn from its part "train", of patients that are in no other part.
        labels: A label file (see `label_file`) or names of findings; None: every finding that the data annotates.
        shots: 0 compares images with phrases; a number trains a head on that many studies of each class, "full" on
            the whole training part. Heads learn each label by itself: labels exclude each other zero-shot only.
        output_dir: Made if missing.
        split: The part to evaluate, see `evaluated_and_training`.
        languages: Of the phrases that are used zero-shot, all of them together; None: all that the checkpoint writes.
        batch_size: Studies at once.
        seed: Of draws, shuffles, folds and resamples.
        device: A torch device.
        num_resamples: Of patients, for intervals and p-values.
        training_data: A folder whose part "train" is learned from instead.
        features_dir: Where image features are kept, so that runs with other shots or labels share them; None: in
            `output_dir`.

    Raises:
        ValueError: If the checkpoint, the data, a label or the shots do not fit, or `output_dir` holds another run.
        ImportError: Without scikit-learn, if there is something to learn from.
    """
    if shots != "full" and (not isinstance(shots, int) or shots < 0):
        raise ValueError(f"Expected shots to be 0, a number of studies or 'full', got {shots!r}.")
    evaluated, validation, training, part, num_shared = _load_parts(data_folder, split, training_data)
    label_set, names, skipped = choose_labels(labels, evaluated, training, shots)
    reporter = CheckpointReporter(model_dir, device)
    languages = _checked_languages(languages, reporter.languages)
    everything = [*evaluated, *validation, *training]
    identity = {"model_sha256": hash_checkpoint(model_dir), "data_sha256": fingerprint(everything), "split": part}
    identity["order_sha256"] = hash_order(everything)
    run = {
        "task": "diagnosis",
        **identity,
        "shots": shots,
        "languages": languages if shots == 0 else [],
        "exclusive": label_set.exclusive,
        "phrases": {label.name: asdict(label) for label in label_set.labels},
        "annotations_sha256": hash_text(json.dumps([sorted((study.findings or {}).items()) for study in everything])),
    }
    output = open_output(output_dir, run)
    store = output / "features" if features_dir is None else open_output(features_dir, {"task": "features"} | identity)
    data = _embed_parts(reporter, label_set, (evaluated, validation, training), store, batch_size)
    options = {"data": data_folder, "training_data": training_data, "labels": labels, "shots": shots}
    options |= {"language": run["languages"] or None, "output": output_dir, "split": part, "batch_size": batch_size}
    options |= {"seed": seed, "device": device, "num_resamples": num_resamples}
    command = command_line("diagnosis", model_dir, options)
    phrases = _embed_phrases(reporter, label_set, languages, batch_size) if shots == 0 else None
    systems, missing = _build_systems(phrases, data, names, shots, seed)
    scores, predictions = _score_systems(systems, data, names, num_resamples, seed)
    result = {
        "format": FORMAT,
        **run,
        **provenance(model_dir, data_folder, seed, device, num_resamples, command),
        "labels": names,
        "skipped": skipped | missing,
        "training": {"num_studies": len(training), "left_out_for_shared_patients": num_shared},
        **scores,
    }
    _write_lines(output / PREDICTIONS, predictions)
    write_json(output / METRICS_FILE, result)
    sys.stdout.write(f"{render_diagnosis_table(result)}\n")
    sys.stdout.write(f"\n{write_page(output, {study.study_id: study for study in evaluated})}\n")
    return result


# --------------------------------------------------------------------------------------------------------------------
# What is evaluated


def _load_parts(
    data_folder: str | Path, split: str | None, training_data: str | Path | None
) -> tuple[list[Study], list[Study], list[Study], str, int]:
    """Returns annotated studies to evaluate, to fit thresholds on and to learn from, which share no patient.

    Also the name of the evaluated part, and how many training studies were left out for their patients.
    """
    evaluated, training, part = evaluated_and_training(data_folder, split, training_data)
    validation: list[Study] = []
    if part != _VALIDATION:
        studies = load_studies(Path(data_folder if training_data is None else training_data))
        validation = [study for study in studies if study.images and study.split == _VALIDATION]
    evaluated, validation, training = (
        [study for study in studies if study.findings] for studies in (evaluated, validation, training)
    )
    if not evaluated:
        raise ValueError(f"{data_folder}: no study with images in the part {part!r} is annotated: expected labels.")
    validation = _only_new(evaluated, validation)
    kept = _only_new([*evaluated, *validation], training)
    return evaluated, validation, kept, part, len(training) - len(kept)


def _only_new(others: Sequence[Study], studies: Sequence[Study]) -> list[Study]:
    return [study for study, is_new in zip(studies, new_to(others, studies), strict=True) if is_new]


def _checked_languages(languages: Sequence[str] | None, known: Sequence[str]) -> list[str]:
    chosen = list(known if languages is None else languages)
    if not chosen or set(chosen) - set(known) or len(set(chosen)) != len(chosen):
        raise ValueError(f"Unsupported languages {chosen}: expected some of {list(known)}, each once.")
    return chosen


def _embed_parts(
    reporter: Reporter, label_set: LabelSet, parts: Sequence[Sequence[Study]], store: Path, batch_size: int
) -> _Data:
    embedded = []
    for name, studies in zip(("images", "validation_images", "training_images"), parts, strict=True):
        features = embed_resumably(reporter.embed_studies, studies, store, name, batch_size) if studies else {}
        annotations = {label.name: annotate(studies, label) for label in label_set.labels}
        embedded.append(_Part(studies, group_numbers(studies), annotations, features))
    controls = {
        control: embed_resumably(_with_control(reporter, control), parts[0], store, control, batch_size)
        for control in CONTROLS
    }
    return _Data(*embedded, controls)


def _with_control(reporter: Reporter, control: str) -> Callable[[Sequence[Study]], dict[str, np.ndarray]]:
    return lambda batch: reporter.embed_studies(batch, control)


def _embed_phrases(
    reporter: CheckpointReporter, label_set: LabelSet, languages: Sequence[str], batch_size: int
) -> ZeroShot:
    """Returns the zero-shot system: a label is the mean of its phrases in all the languages."""

    def mean_embeddings(kind: str) -> np.ndarray:
        phrases = [[text for code in languages for text in getattr(label, kind)[code]] for label in label_set.labels]
        return mean_phrases(phrases, lambda texts: embed_in_batches(reporter, texts, batch_size))  # (L, D)

    names = [label.name for label in label_set.labels]
    present, absent = mean_embeddings("present"), mean_embeddings("absent")
    return ZeroShot(names, present, absent, reporter.logit_scale, label_set.exclusive)


# --------------------------------------------------------------------------------------------------------------------
# Systems and their scores


def _build_systems(
    phrases: ZeroShot | None, data: _Data, names: Sequence[str], shots: Shots, seed: int
) -> tuple[dict[str, list[Diagnoser]], dict[str, str]]:
    """Returns the model and the floors, each with its trials, and why a floor is missing."""
    training = data.training
    seeds = [seed] if shots in (0, "full") else [seed + trial for trial in range(SHOT_TRIALS)]
    # Zero-shot stands beside what all labels would buy.
    floor_shots = "full" if shots == 0 else shots

    def heads(space: str, learned: Sequence[str], shots: Shots) -> list[Diagnoser]:
        known = {name: training.annotations[name] for name in learned}
        return list(fit_heads(space, training.features[space], known, training.groups, shots, seeds))

    missing: dict[str, str] = {}
    if not training.studies:
        missing = dict.fromkeys(("label_prior", "linear_probe_tower"), "no training part to learn from")
        return {"model": [phrases]}, missing
    problems = {name: learning_problem(training.annotations[name], training.groups, floor_shots) for name in names}
    learned = [name for name in names if problems[name] is None]
    missing |= {f"linear_probe_tower of {name}": problem for name, problem in problems.items() if problem}
    shares = {name: np.nanmean(values) for name in names if not np.isnan(values := training.annotations[name]).all()}
    missing |= {f"label_prior of {name}": "not annotated in the training part" for name in names if name not in shares}
    systems: dict[str, list[Diagnoser]] = {"model": [phrases] if phrases else heads("shared", names, shots)}
    if shares:
        systems["label_prior"] = [LabelPrior({name: float(share) for name, share in shares.items()})]
    if learned and "tower" in training.features:
        systems["linear_probe_tower"] = heads("tower", learned, floor_shots)
    return systems, missing


def _score_systems(
    systems: Mapping[str, list[Diagnoser]], data: _Data, names: Sequence[str], num_resamples: int, seed: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Returns what `metrics.json` holds of the scores, and the lines of `predictions.jsonl`."""
    evaluated = data.evaluated
    trials = {row: [_run_trial(system, data, names, seed) for system in draws] for row, draws in systems.items()}
    trials |= _control_trials(systems["model"], trials["model"], data, seed)
    panels = {row: [trial.measure(evaluated.annotations, names) for trial in draws] for row, draws in trials.items()}
    weights = cluster_weights(evaluated.groups, num_resamples, seed)
    rows, intervals, differences = (
        {row: by_column(scores) for row, scores in compared.items()}
        for compared in compare_rows({row: [[panel] for panel in draws] for row, draws in panels.items()}, weights)
    )
    spread = {}
    for row in (row for row, draws in systems.items() if len(draws) > 1):
        points = [point_scores([panel], len(evaluated.studies)) for panel in panels[row]]
        spread[row] = by_column({name: float(np.std([p[name] for p in points], ddof=1)) for name in points[0]})
    mean = _run_trial(Ensemble(systems["model"]), data, names, seed)
    annotated = {name: np.flatnonzero(~np.isnan(evaluated.annotations[name])) for name in names}
    annotated[MACRO] = np.arange(len(evaluated.studies))
    facts = {
        "num_studies": {name: len(places) for name, places in annotated.items()},
        "num_groups": {name: len({evaluated.groups[i] for i in places}) for name, places in annotated.items()},
        "trials": {row: len(draws) for row, draws in trials.items()},
        "rows": rows,
        "intervals": intervals,
        "differences": differences,
        "spread": spread,
        **_threshold_facts(mean, data, names),
        "reliability": {name: reliability(evaluated.annotations[name], mean.probabilities[name]) for name in names},
        "curves": {name: curves(evaluated.annotations[name], mean.probabilities[name]) for name in names},
    }
    return facts, _prediction_lines(mean, evaluated, names)


def _run_trial(system: Diagnoser, data: _Data, names: Sequence[str], seed: int) -> _Trial:
    """Returns what a system says of the evaluated studies, decided by thresholds that never saw the study."""
    evaluated, validation = data.evaluated, data.validation
    predicted = system.predict(evaluated.features)
    probabilities = {name: predicted[name] for name in names if name in predicted}
    held_out = system.predict(validation.features) if validation.studies else None
    thresholds = {}
    for name, values in probabilities.items():
        labels = evaluated.annotations[name]
        if held_out is not None:
            threshold = fit_threshold(validation.annotations[name], held_out[name])
            thresholds[name] = np.full(len(values), threshold)
        else:
            folds = grouped_folds(labels, evaluated.groups, seed)
            of_fold = [fit_threshold(labels[folds != fold], values[folds != fold]) for fold in range(NUM_FOLDS)]
            thresholds[name] = np.array(of_fold)[folds]
        thresholds[name] = np.where(np.isnan(thresholds[name]), DEFAULT_THRESHOLD, thresholds[name])
    return _Trial(probabilities, thresholds)


def _control_trials(
    systems: Sequence[Diagnoser], trials: Sequence[_Trial], data: _Data, seed: int
) -> dict[str, list[_Trial]]:
    """Returns the model on images that are not the study's own, with the model's thresholds."""
    # A probability comes from the study's images alone: to permute them is to run the model on permuted images. Noise
    # belongs to no study, so that each permutation of it is one more draw, where a single one is luck.
    count = len(data.evaluated.studies)
    repeats = max(2, min(_MOST_SHUFFLES, _STUDIES_SHUFFLED // count))
    orders = [derangement(count, seed + repeat) for repeat in range(repeats)]
    unseen = {control: [system.predict(features) for system in systems] for control, features in data.controls.items()}

    def instead(predicted: Sequence[Mapping[str, np.ndarray]], orders: Sequence[np.ndarray]) -> list[_Trial]:
        draws = []
        for repeat, order in enumerate(orders):
            values, thresholds = predicted[repeat % len(predicted)], trials[repeat % len(trials)].thresholds
            draws.append(_Trial({name: values[name][order] for name in thresholds}, thresholds))
        return draws

    as_they_are = [np.arange(count)] * len(systems)
    return {
        "shuffled_images": instead([trial.probabilities for trial in trials], orders),
        "blank_images": instead(unseen["blank_images"], as_they_are),
        "noise_images": instead(unseen["noise_images"], orders),
    }


def _threshold_facts(trial: _Trial, data: _Data, names: Sequence[str]) -> dict[str, Any]:
    """Returns one threshold a label for others to use, and where they come from."""
    if data.validation.studies:
        fitted = {name: float(trial.thresholds[name][0]) for name in names}
        known = {name: data.validation.annotations[name] for name in names}
        source = f"fitted on the validation part ({len(data.validation.studies)} studies)"
    else:
        known = {name: data.evaluated.annotations[name] for name in names}
        fitted = {name: fit_threshold(known[name], trial.probabilities[name]) for name in names}
        source = (
            f"cross-fitted in {NUM_FOLDS} patient-grouped folds of the evaluated studies: each is decided by the "
            "threshold of the other folds; those listed are fitted on all of them"
        )
    unfitted = [name for name in names if len(np.unique(known[name][~np.isnan(known[name])])) < 2]
    return {"thresholds": fitted, "threshold_source": source, "thresholds_not_fitted": unfitted}


def _prediction_lines(trial: _Trial, evaluated: _Part, names: Sequence[str]) -> list[dict[str, Any]]:
    lines = []
    for place, (study, group) in enumerate(zip(evaluated.studies, evaluated.groups, strict=True)):
        truth = {name: evaluated.annotations[name][place] for name in names}
        values = {name: float(trial.probabilities[name][place]) for name in names}
        lines.append(
            {
                "study_id": study.study_id,
                "group": group,
                "labels": {name: int(value) for name, value in truth.items() if not np.isnan(value)},
                "probabilities": values,
                "decisions": {name: int(value >= trial.thresholds[name][place]) for name, value in values.items()},
            }
        )
    return lines


def _write_lines(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Writes JSON lines whole or not at all."""
    draft = path.with_suffix(".tmp")
    draft.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    os.replace(draft, path)


# --------------------------------------------------------------------------------------------------------------------
# The table


def render_diagnosis_table(metrics: Mapping[str, Any]) -> str:
    """Renders `metrics.json` of a diagnosis as Markdown: for each label, and their mean, the model and the floors.

    Args:
        metrics: As in `metrics.json`; `rows`, `intervals`, `differences`, `num_studies` and `skipped` are read.
    """
    rows = metrics["rows"]
    columns = [column for column in rows["model"] if column != MACRO]
    columns += [MACRO] if len(columns) > 1 else []
    titles = [metric_title(metric) for metric in _TABLE_METRICS]
    lines = [["label", "studies (with it)", "system", "AUROC [95 %]", *titles, "AUROC: model minus this [95 %]"]]
    for column in columns:
        studies = str(count := metrics["num_studies"][column])
        if column != MACRO:
            # An interval from a few studies with the finding is too narrow: they are the same few in every resample.
            studies += f" ({round(count * rows['model'][column]['prevalence'])})"
        for row in (row for row in rows if column in rows[row]):
            scores = rows[row][column]
            low, high = metrics["intervals"][row][column]["auroc"]
            lines.append(
                [
                    column_title(column),
                    studies,
                    ROW_TITLES.get(row, row),
                    f"{number(scores['auroc'])} [{number(low)}, {number(high)}]",
                    *(number(scores[metric]) for metric in _TABLE_METRICS),
                    difference(metrics["differences"].get(row, {}).get(column, {}).get("auroc"))
                    if row != "model"
                    else "",
                ]
            )
    notes = [f"Decisions: thresholds {metrics['threshold_source']}."]
    notes += [f"Left out: {name}: {reason}." for name, reason in metrics["skipped"].items()]
    return "\n".join([markdown_table(lines), "", *notes])
