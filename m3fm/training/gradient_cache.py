# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Contrastive batches of any size in the memory of a small one (GradCache: Gao et al., RepL4NLP 2021).

A step has several micro-batches. All are embedded without a graph; the loss of the whole gives the gradient of every
embedding; then each micro-batch is embedded once more, with a graph, and the gradient of its embeddings is sent back
through it. What comes to the weights is the gradient of the whole batch, at the cost of a second forward pass. With
one micro-batch a step there is no second pass.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .objective import AlignmentGradients, AlignmentObjective, BatchFacts
from .ranks import world_size

__all__ = ["Embeddings", "GradientCache"]


@dataclass(frozen=True)
class Embeddings:
    """What the towers make of a micro-batch.

    Attributes:
        image_embeds: (I, D), unit norm.
        text_embeds: (J, D), unit norm.
        logit_scale: The inverse temperature.
        logit_bias: None where there is none.
    """

    image_embeds: torch.Tensor
    text_embeds: torch.Tensor
    logit_scale: torch.Tensor
    logit_bias: torch.Tensor | None


Embed = Callable[[nn.Module, Mapping[str, Any]], Embeddings]


class GradientCache:
    """Holds the gradients of one step's embeddings.

    Args:
        embed: Runs the towers on a micro-batch.
        objective: The loss.
    """

    def __init__(self, embed: Embed, objective: AlignmentObjective):
        self.embed = embed
        self.objective = objective
        self._waiting: list[_MicroBatch] = []
        self._gradients: AlignmentGradients | None = None
        self._starts = (0, 0)

    def begin(self, model: nn.Module, batches: Sequence[Mapping[str, Any]], facts: Sequence[BatchFacts]) -> None:
        """Computes the loss over all micro-batches of a step, and the gradient of their embeddings.

        Args:
            model: Goes to `embed`.
            batches: The micro-batches of this rank.
            facts: Of each of them.
        """
        alone = len(batches) == 1
        self._waiting = []
        for batch in batches:
            state = _RandomState.now()
            with torch.set_grad_enabled(alone):
                embeds = self.embed(model, batch)
            self._waiting.append(_MicroBatch(batch, embeds, state if not alone else None))
        images, texts = (
            torch.cat([getattr(micro.embeds, name) for micro in self._waiting])
            for name in ("image_embeds", "text_embeds")
        )
        last = self._waiting[-1].embeds
        self._gradients = self.objective(BatchFacts.joined(facts), images, texts, last.logit_scale, last.logit_bias)
        self._starts = (0, 0)

    @property
    def is_spent(self) -> bool:
        """Tells whether every micro-batch was sent back."""
        return not self._waiting

    def next_surrogate(self, model: nn.Module) -> tuple[torch.Tensor, AlignmentGradients]:
        """Returns a number whose gradient is that of the loss by way of the next micro-batch, and the whole step's.

        Processes that train together average their gradients; the loss is a sum over what each has, hence the factor.
        """
        micro = self._waiting.pop(0)
        embeds = micro.embeds
        if micro.state is not None:
            # The same dropout as when the loss was computed.
            with micro.state.again():
                embeds = self.embed(model, micro.batch)
        gradients, (first_image, first_text) = self._gradients, self._starts
        self._starts = first_image + len(embeds.image_embeds), first_text + len(embeds.text_embeds)
        surrogate = world_size() * (
            (embeds.image_embeds * gradients.image_embeds[first_image : self._starts[0]]).sum()
            + (embeds.text_embeds * gradients.text_embeds[first_text : self._starts[1]]).sum()
        )
        # Known to every rank as a whole: the average over ranks is what is wanted, once a step.
        share = 1.0 if self.is_spent else 0.0
        surrogate = surrogate + share * gradients.logit_scale * embeds.logit_scale
        if embeds.logit_bias is not None:
            surrogate = surrogate + share * gradients.logit_bias * embeds.logit_bias
        return surrogate, gradients


@dataclass(frozen=True)
class _MicroBatch:
    batch: Mapping[str, Any]
    embeds: Embeddings
    state: "_RandomState | None"


@dataclass(frozen=True)
class _RandomState:
    """The state of the generators that dropout draws from."""

    cpu: torch.Tensor
    device: torch.Tensor | None

    @classmethod
    def now(cls) -> "_RandomState":
        accelerator = torch.accelerator.current_accelerator()
        module = None if accelerator is None else torch.get_device_module(accelerator)
        return cls(torch.get_rng_state(), None if module is None else module.get_rng_state())

    @contextmanager
    def again(self) -> Iterator[None]:
        """Draws in the block what was drawn after the state was noted; after it, goes on as if nothing had been."""
        after = _RandomState.now()
        self._set()
        try:
            yield
        finally:
            after._set()

    def _set(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.device is not None:
            torch.get_device_module(torch.accelerator.current_accelerator()).set_rng_state(self.device)
