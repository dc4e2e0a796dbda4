# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Losses of stage 1: contrastive alignment whose targets come from pairs, from equal texts and from labels.

Letters in shapes: I images and J texts of one batch, F findings.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional


@dataclass
class Items:
    """What the targets need to know of one side of a batch, row by row.

    Attributes:
        study: (R,) index of the study in the batch; equal indices are a pair.
        text: (R,) index that is equal for equal texts, and -1 for images.
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


def label_agreement(images: Items, texts: Items) -> tuple[torch.Tensor, torch.Tensor]:
    """Compares studies by their labels: the cosine of the present findings (MedCLIP 2022, section 3.2).

    Only findings that both sides know are compared, so that a set which annotates pneumonia alone says nothing of
    effusion.

    Returns:
        Agreement (I, J) in 0..1, and (I, J) bool telling where the labels allow a comparison.
    """
    left, right = images.values * images.known, texts.values * texts.known
    shared_left = left @ texts.known.to(left.dtype).t()  # |findings of i that j knows|
    shared_right = (right @ images.known.to(left.dtype).t()).t()
    dot = left @ right.t()
    agreement = dot / (shared_left * shared_right).clamp(min=1e-6).sqrt()
    comparable = (shared_left > 0) | (shared_right > 0)
    return agreement * (shared_left > 0) * (shared_right > 0), comparable


def soft_targets(images: Items, texts: Items) -> tuple[torch.Tensor, torch.Tensor]:
    """Builds contrastive targets between two sides of a batch.

    A pair, or a text equal to the pair's, weighs 1. Where one side has labels but no report, agreement in labels
    weighs as much as it agrees. Another modality, other labels, or the report of another reported study are
    negatives. What is unknown is neither: a radiograph with labels alone is not pushed away from a report without.

    Returns:
        Weights (I, J) >= 0, and (I, J) bool telling which entries take part.
    """
    same = images.study[:, None] == texts.study[None, :]
    own_texts = torch.zeros(len(images.study), int(texts.text.max()) + 1, device=same.device)
    own_texts.index_put_(
        (same.nonzero()[:, 0], texts.text[same.nonzero()[:, 1]]), torch.ones(int(same.sum()), device=same.device)
    )
    same_text = own_texts[:, texts.text] > 0  # (I, J): text j reads as one of the texts of image i
    agreement, comparable = label_agreement(images, texts)
    other_modality = images.modality[:, None] != texts.modality[None, :]
    both_reported = images.has_report[:, None] & texts.has_report[None, :]
    # Between two reported studies the reports decide: by labels all cases of one disease would be the same.
    agreement = agreement * ~(other_modality | both_reported)
    weights = torch.where(same | same_text, torch.ones_like(agreement), agreement)
    takes_part = same | same_text | other_modality | comparable | both_reported
    return weights, takes_part


def soft_contrastive_loss(logits: torch.Tensor, weights: torch.Tensor, takes_part: torch.Tensor) -> torch.Tensor:
    """Computes the symmetric cross-entropy between softmax(logits) and the normalised weights, rows and columns.

    With an identity as weights and everything taking part this is CLIP's InfoNCE. Rows without a positive do not
    count.
    """
    logits = logits.float().masked_fill(~takes_part, torch.finfo(torch.float32).min)
    return (_soft_cross_entropy(logits, weights) + _soft_cross_entropy(logits.t(), weights.t())) / 2


def _soft_cross_entropy(logits: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    mass = weights.sum(dim=-1)
    rows = mass > 0
    if not rows.any():
        return logits.sum() * 0.0
    targets = weights[rows] / mass[rows, None]
    return -(targets * functional.log_softmax(logits[rows], dim=-1)).sum(dim=-1).mean()
