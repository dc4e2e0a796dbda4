# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""What a diagnosis head is told: labels from data sets or a table, the uncertain ones among them, and the rare ones.

Letters in shapes: N studies, B of a batch, D width of the shared space, L labels.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..data import Study
from ..data.label_cells import cell_state
from ..data.schema import LabelState
from ..evaluation.label_file import Label, annotate, find_finding

# What an uncertain label is in training (CheXpert, AAAI 2019, section 4: U-Ignore, U-Ones, U-Zeros); "half" is a soft
# target.
UNCERTAIN_POLICIES = {"ignore": np.nan, "positive": 1.0, "negative": 0.0, "half": 0.5}
UNCERTAIN = -1.0
_VALUES = {
    LabelState.POSITIVE: 1.0,
    LabelState.NEGATIVE: 0.0,
    LabelState.UNCERTAIN: UNCERTAIN,
    LabelState.UNMENTIONED: np.nan,
}
BALANCES = ("none", "weights", "sampling")
_TABLE_KEYS = ("study_id", "file_name")
# A label so rare that each of its studies would outweigh this many others counts no more than that.
_LARGEST_WEIGHT = 20.0


@dataclass(frozen=True)
class Examples:
    """Studies with their labels.

    Attributes:
        studies: With images.
        labels: (N, L), 1 present, 0 absent, NaN unknown, in training also 0.5.
        report_embeds: (N, D), of the generated reports; None where the head does not read them.
    """

    studies: Sequence[Study]
    labels: np.ndarray
    report_embeds: torch.Tensor | None = None


def read_label_table(path: str | Path, labels: Sequence[Label]) -> dict[str, dict[str, float]]:
    """Reads a table of labels, as CheXpert's: a line a study.

    Args:
        path: A CSV file with a column `study_id` or `file_name`, of which the name without folder and ending counts.
            A column is a label's where its name is, or is one of the known names of its finding; others are not read.
        labels: What is looked for; one without a column is unknown in every study.

    Returns:
        Study id to label name to 1.0, 0.0, `UNCERTAIN` or NaN.

    Raises:
        ValueError: If the file is no such table, has none of the labels, or a value is none of the four.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such label table.")
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        names = list(reader.fieldnames or [])
        key = next((each for each in _TABLE_KEYS if each in names), None)
        if key is None:
            raise ValueError(f"{path}: expected a column {' or '.join(_TABLE_KEYS)}, got {names}.")
        columns = {name: column for column in names for name in _labels_of(column, labels)}
        if not columns:
            raise ValueError(f"{path}: expected a column for one of {[label.name for label in labels]}, got {names}.")
        table = {}
        for row in reader:
            study = Path(row[key]).stem if key == "file_name" else row[key]
            where = f"{path}, line {reader.line_num}"
            table[study] = {name: _label_value(row[column], f"{where}, {column}") for name, column in columns.items()}
    return table


def _labels_of(column: str, labels: Sequence[Label]) -> list[str]:
    try:
        finding = find_finding(column).key
    except ValueError:
        finding = None
    return [label.name for label in labels if column == label.name or finding == label.finding]


def _label_value(text: str | None, where: str) -> float:
    try:
        return _VALUES[cell_state(text)]
    except ValueError as error:
        raise ValueError(f"{where}: {error}, got {(text or '').strip()!r}.") from None


def make_examples(
    studies: Sequence[Study],
    labels: Sequence[Label],
    table: dict[str, dict[str, float]],
    uncertain: float,
    exclusive: bool,
) -> Examples:
    """Puts labels to studies, and leaves out those that say nothing; of exclusive labels one has to be present."""
    values = np.stack([annotate(studies, label) for label in labels], axis=1)  # (N, L)
    for row, study in enumerate(studies):
        if study.study_id in table:
            values[row] = [table[study.study_id].get(label.name, np.nan) for label in labels]
    values = np.where(values == UNCERTAIN, uncertain, values)
    usable = (values == 1).sum(axis=1) == 1 if exclusive else ~np.isnan(values).all(axis=1)
    places = np.flatnonzero(usable)
    return Examples([studies[place] for place in places], np.where(exclusive & np.isnan(values), 0.0, values)[places])


@dataclass(frozen=True)
class Balance:
    """How imbalance is met, and what that does to the head.

    Attributes:
        label_weights: (L,), what a study with the label counts in the loss beside one without; None: all the same.
        study_weights: (N,), how often each study is drawn; None: once an epoch.
        shift: (L,), what the training adds to each label's log odds.
    """

    label_weights: torch.Tensor | None
    study_weights: np.ndarray | None
    shift: np.ndarray


def choose_balance(labels: np.ndarray, kind: str, exclusive: bool) -> Balance:
    """Makes weights of the training labels (N, L), 1 present, 0 absent, NaN unknown, 0.5 both."""
    known = ~np.isnan(labels)
    present = np.where(known, labels, 0.0)
    positives, negatives = present.sum(axis=0), (known - present).sum(axis=0)
    if kind == "none":
        return Balance(None, None, np.zeros(labels.shape[1]))
    if exclusive:
        # Of classes, not of one label against the rest: the mean class weighs 1.
        weights = np.minimum(positives.mean() / positives, _LARGEST_WEIGHT)
    else:
        weights = np.clip(negatives / positives, 1 / _LARGEST_WEIGHT, _LARGEST_WEIGHT)
    if kind == "weights":
        return Balance(torch.from_numpy(weights).float(), None, np.log(weights))
    if exclusive:
        return Balance(None, (present * weights).sum(axis=1), np.log(weights))
    # A study counts as its rarest state: of the mean over labels the many absent ones would leave little.
    study_weights = np.where(known, present * weights + (known - present), 0.0).max(axis=1)
    drawn = study_weights[:, None] * known
    odds = (drawn * present).sum(axis=0) / (drawn * (1 - present)).sum(axis=0)
    return Balance(None, study_weights, np.log(odds) - np.log(positives / negatives))


def diagnosis_loss(logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """Returns the mean cross-entropy of logits (B, L) with class indices (B,) or values (B, L), NaN unknown."""
    if weights is not None:
        weights = weights.to(logits.device)
    if not labels.is_floating_point():
        return torch.nn.functional.cross_entropy(logits, labels, weights)
    known = ~labels.isnan()
    if not known.any():
        return logits.sum() * 0.0
    losses = torch.nn.functional.binary_cross_entropy_with_logits(
        logits, labels.nan_to_num(), pos_weight=weights, reduction="none"
    )
    return losses[known].mean()
