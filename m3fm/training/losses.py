# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Losses of stage 1: contrastive alignment whose targets come from pairs, from equal texts and from labels.

Each is a sum over some rows of the matrix of all pairs of a batch, with the number of rows that count, so that the
whole can be summed up piece by piece (`objective.py`).

Letters in shapes: I rows of one side and J of the other, F findings.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional

__all__ = ["Items", "label_agreement", "sigmoid_loss", "soft_cross_entropy", "soft_targets"]


@dataclass(frozen=True)
class Items:
    """What the targets need to know of one side of a batch, row by row; a study has one row of a side at most.

    Attributes:
        study: (R,) number of the study in the batch; equal numbers are a pair.
        text: (R,) number that is equal for equal texts, and -1 for images.
        modality: (R,) index of the modality.
        values: (R, F) findings, 1 present and 0 not.
        known: (R, F) bool, whether the finding is known.
        has_report: (R,) bool, whether the study came with a text of its own (not one made from its labels).
    """

    study: torch.Tensor
    text: torch.Tensor
    modality: torch.Tensor
    values: torch.Tensor
    known: torch.Tensor
    has_report: torch.Tensor

    def select(self, rows: torch.Tensor) -> "Items":
        """Returns the rows that an index or mask names."""
        return Items(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))


def label_agreement(left: Items, right: Items) -> tuple[torch.Tensor, torch.Tensor]:
    """Compares studies by their labels: the cosine of the present findings (MedCLIP 2022, section 3.2).

    Only findings that both sides know are compared, so that a set which annotates pneumonia alone says nothing of
    effusion.

    Returns:
        Agreement (I, J) in 0..1, and (I, J) bool telling where the labels allow a comparison.
    """
    present_left, present_right = left.values * left.known, right.values * right.known
    shared_left = present_left @ right.known.to(present_left.dtype).t()  # |findings of i that j knows|
    shared_right = (present_right @ left.known.to(present_left.dtype).t()).t()
    agreement = (present_left @ present_right.t()) / (shared_left * shared_right).clamp(min=1e-6).sqrt()
    comparable = (shared_left > 0) | (shared_right > 0)
    return agreement * (shared_left > 0) * (shared_right > 0), comparable


def soft_targets(left: Items, right: Items, written: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Builds contrastive targets between some rows of two sides.

    A pair, or a text equal to the pair's, weighs 1. Where one side has labels but no report, agreement in labels
    weighs as much as it agrees. Another modality, other labels, or the report of another reported study are
    negatives. What is unknown is neither: a radiograph with labels alone is not pushed away from a report without.

    Args:
        left: I images, or texts of the pivot language.
        right: J texts.
        written: (P, 2): of all texts of the right side in the batch, the study and the number of the text.

    Returns:
        Weights (I, J) >= 0, and (I, J) bool telling which entries take part.
    """
    same = (left.study[:, None] == right.study[None, :]) | _same_text(left, right, written)
    agreement, comparable = label_agreement(left, right)
    other_modality = left.modality[:, None] != right.modality[None, :]
    both_reported = left.has_report[:, None] & right.has_report[None, :]
    # Between two reported studies the reports decide: by labels all cases of one disease would be the same.
    agreement = agreement * ~(other_modality | both_reported)
    return agreement.masked_fill(same, 1.0), same | other_modality | comparable | both_reported


def _same_text(left: Items, right: Items, written: torch.Tensor) -> torch.Tensor:
    """Tells, (I, J) bool, whether text j reads as the one that the study of i has in the language of j."""
    numbers, place = right.text.unique(return_inverse=True)
    row_of = torch.full((int(max(left.study.max(), written[:, 0].max())) + 1,), -1, device=place.device)
    row_of[left.study] = torch.arange(len(left.study), device=place.device)
    rows = row_of[written[:, 0]]
    columns = torch.searchsorted(numbers, written[:, 1].contiguous()).clamp(max=len(numbers) - 1)
    here = (rows >= 0) & (numbers[columns] == written[:, 1])
    reads_as = torch.zeros(len(left.study), len(numbers), dtype=torch.bool, device=place.device)
    reads_as[rows[here], columns[here]] = True
    return reads_as[:, place]


def soft_cross_entropy(
    logits: torch.Tensor, weights: torch.Tensor, takes_part: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums the cross-entropy between softmax(logits) and the normalised weights over rows that have a positive.

    With an identity as weights and everything taking part this is one direction of CLIP's InfoNCE (Radford et al.,
    ICML 2021, figure 3).

    Args:
        logits: (I, J).
        weights: (I, J) >= 0.
        takes_part: (I, J) bool.

    Returns:
        The sum, and the number of those rows.
    """
    mass = weights.sum(dim=-1)
    rows = mass > 0
    logits = logits.float().masked_fill(~takes_part, torch.finfo(torch.float32).min)[rows]
    targets = weights[rows] / mass[rows, None]
    return -(targets * functional.log_softmax(logits, dim=-1)).sum(), rows.sum()


def sigmoid_loss(
    logits: torch.Tensor, weights: torch.Tensor, takes_part: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums the binary cross-entropy of every pair over rows in which any takes part (SigLIP: Zhai et al., ICCV 2023).

    Args:
        logits: (I, J), with the bias.
        weights: (I, J) in 0..1.
        takes_part: (I, J) bool.

    Returns:
        The sum, and the number of those rows.
    """
    losses = functional.binary_cross_entropy_with_logits(logits.float(), weights, reduction="none")
    return losses.masked_fill(~takes_part, 0.0).sum(), takes_part.any(dim=-1).sum()
