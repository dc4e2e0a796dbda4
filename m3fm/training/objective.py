# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""The loss of stage 1 over the batches of all ranks, and its gradient, in memory that does not hang on their number.

Each rank is told the embeddings of all, computes the rows of the loss that are of its own studies, a few at a time,
and is told by the others what their rows say of its embeddings. Nothing is kept of a row but its part of the gradient:
what a rank holds is `rows` x J logits, and the embeddings. The gradient then enters the towers as if the whole batch
had been embedded at once (`gradient_cache.py`).

Letters: W ranks, B studies of all ranks, S of one rank, I images, J texts, D width of the shared space, F findings.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch

from .losses import Items, sigmoid_loss, soft_cross_entropy, soft_targets
from .ranks import all_sum, gather_rows, own_rows, sum_own_rows

__all__ = ["AlignmentGradients", "AlignmentObjective", "BatchFacts"]

LOSSES = ("infonce", "sigmoid")


@dataclass(frozen=True)
class BatchFacts:
    """What is known of the studies of a batch, of which each has images, texts or both.

    Attributes:
        modality: (S,) index of the modality.
        has_report: (S,) bool, whether its texts are its own, and not made from its labels.
        values: (S, F) findings, 1 present and 0 not.
        known: (S, F) bool, whether the finding is known.
        image_study: (I,) the study of each row of image embeddings.
        text_study: (J,) the study of each text.
        text_number: (J,) equal for equal texts.
        text_language: (J,) index of the language; a study has one text of a language at most.
    """

    modality: torch.Tensor
    has_report: torch.Tensor
    values: torch.Tensor
    known: torch.Tensor
    image_study: torch.Tensor
    text_study: torch.Tensor
    text_number: torch.Tensor
    text_language: torch.Tensor

    @classmethod
    def joined(cls, parts: Sequence["BatchFacts"]) -> "BatchFacts":
        """Returns the studies of several batches as one, in their order."""
        starts = np.cumsum([0, *(len(part.modality) for part in parts)]).tolist()
        shifted = [part._shifted(start) for part, start in zip(parts, starts, strict=False)]
        return cls(*(torch.cat([getattr(part, field.name) for part in shifted]) for field in fields(cls)))

    def gathered(self) -> "BatchFacts":
        """Returns the studies of all ranks, in the order of the ranks."""
        shifted = self._shifted(own_rows(self.modality).start)
        return BatchFacts(*(gather_rows(getattr(shifted, field.name)) for field in fields(self)))

    def _shifted(self, start: int) -> "BatchFacts":
        """Returns the same with its studies counted from `start`."""
        return replace(self, image_study=self.image_study + start, text_study=self.text_study + start)

    def to(self, device: torch.device) -> "BatchFacts":
        """Returns the same on another device."""
        return BatchFacts(*(getattr(self, field.name).to(device) for field in fields(self)))

    def items(self, study: torch.Tensor, text: torch.Tensor) -> Items:
        """Returns what targets need to know of rows that are of these studies, with these texts."""
        return Items(study, text, self.modality[study], self.values[study], self.known[study], self.has_report[study])


@dataclass(frozen=True)
class AlignmentGradients:
    """The loss of a batch, and what it says of the embeddings of this rank.

    Attributes:
        loss: Of the batch of all ranks, the same on each.
        parts: What it is the sum of, weighted: "image_0" for images and the first language, "0_1" for the first and
            the second, "mse_1" for the distance of the second from the first.
        image_embeds: (I, D) of this rank.
        text_embeds: (J, D) of this rank.
        logit_scale: Of all ranks, the same on each; by the scale itself, not its logarithm.
        logit_bias: Likewise; 0 without a bias.
    """

    loss: torch.Tensor
    parts: dict[str, torch.Tensor]
    image_embeds: torch.Tensor
    text_embeds: torch.Tensor
    logit_scale: torch.Tensor
    logit_bias: torch.Tensor


@dataclass(frozen=True)
class _Side:
    """Images, or the texts of one language, of all ranks.

    Attributes:
        embeds: (R, D).
        items: What the targets need to know of them.
        own: Which rows are of this rank.
        grad: (R, D), what this rank knows of the gradient; it is added to.
    """

    embeds: torch.Tensor
    items: Items
    own: torch.Tensor
    grad: torch.Tensor


class AlignmentObjective:
    """Aligns images with the texts of every language, and the languages with the first, English, the pivot.

    Args:
        loss: "infonce", symmetric cross-entropy over the batch, or "sigmoid" of each pair (SigLIP); between images and
            texts. Both take the soft targets of `losses.soft_targets`.
        translation_weight: Of the cross-entropy between languages.
        translation_temperature: Its temperature. It is not learned: the learned one is held high by label targets, to
            which many studies are alike; translations are one to one and need a low one.
        translation_mse_weight: Of the squared distance of a translation from its English embedding, which it does not
            move (ZeroNLG, TPAMI 2024, equation 1).
        rows: Rows of the loss that are computed at once.

    Raises:
        ValueError: For an option out of range.
    """

    def __init__(
        self,
        loss: str = "infonce",
        translation_weight: float = 1.0,
        translation_temperature: float = 0.03,
        translation_mse_weight: float = 0.0,
        rows: int = 1024,
    ):
        if loss not in LOSSES:
            raise ValueError(f"loss: got {loss!r}, expected one of {list(LOSSES)}.")
        if min(translation_weight, translation_mse_weight) < 0 or translation_temperature <= 0 or rows < 1:
            raise ValueError(
                "Expected translation_weight and translation_mse_weight >= 0, translation_temperature > 0 and rows >= "
                f"1, got {translation_weight}, {translation_mse_weight}, {translation_temperature} and {rows}."
            )
        self.loss = loss
        self.translation_weight = translation_weight
        self.translation_temperature = translation_temperature
        self.translation_mse_weight = translation_mse_weight
        self.rows = rows

    def __call__(
        self,
        facts: BatchFacts,
        image_embeds: torch.Tensor,
        text_embeds: torch.Tensor,
        logit_scale: torch.Tensor,
        logit_bias: torch.Tensor | None = None,
    ) -> AlignmentGradients:
        """Computes the loss over all ranks and its gradient; every rank has to call it.

        Args:
            facts: Of this rank's studies.
            image_embeds: (I, D), unit norm.
            text_embeds: (J, D), unit norm.
            logit_scale: The inverse temperature between images and texts.
            logit_bias: Added to their logits.
        """
        total = facts.gathered()
        everything = torch.arange(len(total.image_study), device=total.image_study.device)
        images = _side(
            gather_rows(image_embeds.float()),
            own_rows(image_embeds),
            everything,
            total.items(total.image_study, torch.full_like(everything, -1)),
        )
        text_items = total.items(total.text_study, total.text_number)
        rows_of = {int(code): (total.text_language == code).nonzero()[:, 0] for code in total.text_language.unique()}
        gathered, own = gather_rows(text_embeds.float()), own_rows(text_embeds)
        texts = {code: _side(gathered, own, rows, text_items.select(rows)) for code, rows in rows_of.items()}

        bias = torch.zeros_like(logit_scale) if logit_bias is None else logit_bias
        learned = torch.stack([logit_scale.detach(), bias.detach()]).float()
        fixed = torch.tensor([1 / self.translation_temperature, 0.0], device=learned.device)
        parts, scalars = {}, torch.zeros_like(learned)
        for code, side in texts.items():
            if len(images.embeds):
                parts[f"image_{code}"], moved = self._contrast(images, side, learned, self.loss, 1.0)
                scalars += moved
            if code == 0 or 0 not in texts:
                continue
            if self.translation_weight:
                parts[f"0_{code}"], _ = self._contrast(texts[0], side, fixed, "infonce", self.translation_weight)
            if self.translation_mse_weight:
                parts[f"mse_{code}"] = self._distance(texts[0], side)
        text_grad = torch.zeros(len(total.text_study), text_embeds.shape[-1], device=learned.device)
        for code, side in texts.items():
            text_grad[rows_of[code]] = side.grad
        parts = {name: all_sum(value) for name, value in parts.items()}
        loss = torch.stack(list(parts.values())).sum() if parts else learned.new_zeros(())
        scale_grad, bias_grad = all_sum(scalars)
        return AlignmentGradients(
            loss,
            parts,
            sum_own_rows(images.grad, image_embeds),
            sum_own_rows(text_grad, text_embeds),
            scale_grad,
            bias_grad,
        )

    def _contrast(
        self, left: _Side, right: _Side, scalars: torch.Tensor, loss: str, weight: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds the gradient of one contrast to both sides.

        Args:
            left: Images, or the pivot's texts.
            right: Texts of one language.
            scalars: Scale and bias of the logits, (2,).
            loss: One of `LOSSES`.
            weight: Of the contrast.

        Returns:
            This rank's part of the loss, and of the gradient of the scalars (2,).
        """
        written = torch.stack([right.items.study, right.items.text], dim=1)
        # Each pair has one logit, but two softmaxes: over its row and over its column.
        directions = ((left, right), (right, left)) if loss == "infonce" else ((left, right),)
        value, scalar_grad = scalars.new_zeros(()), torch.zeros_like(scalars)
        for side, other in directions:
            grads = [torch.zeros_like(side.grad), torch.zeros_like(other.grad), torch.zeros_like(scalars)]
            loss_sum, count = scalars.new_zeros(()), torch.zeros((), dtype=torch.long, device=scalars.device)
            for own in side.own.split(self.rows) if len(side.own) else ():
                leaves = [each.clone().requires_grad_() for each in (side.embeds[own], other.embeds, scalars)]
                logits = leaves[2][0] * leaves[0] @ leaves[1].t() + leaves[2][1]
                mine = side.items.select(own)
                if side is left:
                    targets = soft_targets(mine, other.items, written)
                else:
                    targets = [each.t() for each in soft_targets(other.items, mine, written)]
                summed, counted = (soft_cross_entropy if loss == "infonce" else sigmoid_loss)(logits, *targets)
                moved = torch.autograd.grad(summed, leaves)
                grads[0][own] = moved[0]
                grads[1] += moved[1]
                grads[2] += moved[2]
                loss_sum, count = loss_sum + summed.detach(), count + counted
            share = weight / len(directions) / all_sum(count).clamp(min=1)
            value = value + share * loss_sum
            side.grad.add_(share * grads[0])
            other.grad.add_(share * grads[1])
            scalar_grad += share * grads[2]
        return value, scalar_grad

    def _distance(self, pivot: _Side, side: _Side) -> torch.Tensor:
        """Draws translations to their English text, which stays where it is; returns this rank's part of the loss."""
        highest = int(torch.cat([pivot.items.study, side.items.study]).max())
        row_of = torch.full((highest + 1,), -1, device=side.own.device)
        row_of[pivot.items.study] = torch.arange(len(pivot.embeds), device=side.own.device)
        english = row_of[side.items.study]
        share = self.translation_mse_weight / (english >= 0).sum().clamp(min=1)
        own = side.own[english[side.own] >= 0]
        apart = side.embeds[own] - pivot.embeds[english[own]]
        side.grad[own] += 2 * share * apart
        return share * apart.square().sum()


def _side(gathered: torch.Tensor, own: slice, rows: torch.Tensor, items: Items) -> _Side:
    """Makes a side of some `rows` of the embeddings of all ranks, of which those in `own` are this rank's."""
    embeds = gathered[rows]
    mine = ((rows >= own.start) & (rows < own.stop)).nonzero()[:, 0]
    return _Side(embeds, items, mine, torch.zeros_like(embeds))
