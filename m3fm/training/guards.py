# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Looks at every step before the optimizer takes it: a loss or gradient that is no number does not reach the weights.

What was in the batch is named, by all ranks: in `nan_batch.json` of the run's folder, and in the error. These ids are
the one place where a run names studies that it trains on.
"""

import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import ranks

__all__ = ["NAN_FILE", "NAN_GUARDS", "NanGuard", "NonFiniteStepError", "take_study_ids"]

NAN_FILE = "nan_batch.json"
NAN_GUARDS = ("stop", "skip")
STUDY_IDS = "study_ids"
# More steps than these in a row are no accident of a batch.
MOST_SKIPPED = 3
_NAMED = 8

logger = logging.getLogger(__name__)


class NonFiniteStepError(ArithmeticError):
    """The loss or a gradient is NaN or infinite; the weights are those of the step before."""


def take_study_ids(batch: dict[str, Any]) -> list[str]:
    """Takes the ids out of a batch, "source/study_id", which the model is not to see; [] where it has none."""
    return list(batch.pop(STUDY_IDS, ()))


class NanGuard:
    """Watches the steps of one run.

    Args:
        mode: "stop" ends the run before the optimizer step; "skip" leaves the step out, at most `MOST_SKIPPED` in a
            row.
        folder: Of the run.

    Raises:
        ValueError: For another mode.
    """

    def __init__(self, mode: str, folder: Path):
        if mode not in NAN_GUARDS:
            raise ValueError(f"nan_guard: got {mode!r}, expected one of {list(NAN_GUARDS)}.")
        self.mode = mode
        self.folder = folder
        self.skipped_in_a_row = 0
        self._study_ids: list[list[str]] = []
        self._losses: list[torch.Tensor] = []

    def begin_step(self, study_ids: list[list[str]]) -> None:
        """Is told the studies of each micro-batch of the step."""
        self._study_ids, self._losses = study_ids, []

    def note_loss(self, loss: torch.Tensor) -> None:
        """Is told the loss of a micro-batch."""
        self._losses.append(loss)

    def finds(self, model: nn.Module, loss: torch.Tensor, sees_gradients: bool) -> bool:
        """Tells whether the step is to be left alone on all ranks, as soon as one has met with NaN or infinity.

        Args:
            model: With the gradients of the step, before they are clipped, which would spread a NaN to all of them.
            loss: Summed over the step, of this rank.
            sees_gradients: False where a gradient scaler looks at the gradients itself.
        """
        is_wrong = ~torch.isfinite(loss.detach())
        gradients = [_own_part(weight.grad) for weight in model.parameters() if weight.grad is not None]
        if sees_gradients and gradients:
            is_wrong = is_wrong | ~torch.isfinite(nn.utils.get_total_norm(gradients)).to(loss.device)
        wrong = ranks.all_sum(is_wrong.int().reshape(1))
        if int(wrong):
            return True
        self.skipped_in_a_row = 0
        return False

    def handle(self, model: nn.Module, loss: torch.Tensor, step: int, learning_rate: float) -> None:
        """Writes down what was found. Returns if the step is to be skipped.

        Args:
            model: As in `finds`.
            loss: As in `finds`.
            step: Number of the step that is not taken.
            learning_rate: It would have been taken with.

        Raises:
            NonFiniteStepError: If the run ends here, with the studies of the batch.
        """
        found = {
            "step": step,
            "learning_rate": learning_rate,
            "gradients_not_finite": _names(model, gradients=True),
            "weights_not_finite": _names(model, gradients=False),
            "ranks": _of_all_ranks({"rank": ranks.rank(), "loss": _as_json(loss), "batches": self._batches()}),
        }
        if ranks.is_main():
            self._write(found)
        self.skipped_in_a_row += 1
        message = _message(found, self.folder)
        if self.mode == "skip" and self.skipped_in_a_row <= MOST_SKIPPED:
            logger.warning("%s It is left out.", message)
            return
        more = f" It is number {self.skipped_in_a_row} in a row." if self.mode == "skip" else ""
        raise NonFiniteStepError(
            f"{message}{more} The step was not taken, and the checkpoints before it are as they were: look at these "
            "studies, lower learning_rate or max_grad_norm, or leave such steps out by nan_guard: skip."
        )

    def _batches(self) -> list[dict[str, Any]]:
        # None: of a trainer that does not go through them one by one.
        finite = [bool(torch.isfinite(loss).all()) for loss in self._losses]
        finite += [None] * (len(self._study_ids) - len(finite))
        return [{"is_finite": each, STUDY_IDS: ids} for each, ids in zip(finite, self._study_ids, strict=False)]

    def _write(self, found: Mapping[str, Any]) -> None:
        path = self.folder / NAN_FILE
        earlier = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
        draft = path.with_suffix(".tmp")
        draft.write_text(json.dumps([*earlier, found], indent=1, ensure_ascii=False), encoding="utf-8")
        os.replace(draft, path)


def _message(found: Mapping[str, Any], folder: Path) -> str:
    batches = [batch for rank in found["ranks"] for batch in rank["batches"]]
    suspects = [batch for batch in batches if batch["is_finite"] is False] or batches
    ids = [study_id for batch in suspects for study_id in batch[STUDY_IDS]]
    losses = ", ".join(str(rank["loss"]) for rank in found["ranks"])
    named = ", ".join(ids[:_NAMED]) + (f" and {len(ids) - _NAMED} more" if len(ids) > _NAMED else "")
    wrong = {name: found[f"{name}_not_finite"] for name in ("weights", "gradients")}
    told = "".join(f"; {len(names)} {name} are not finite, as {names[0]}" for name, names in wrong.items() if names)
    return (
        f"Step {found['step']}: the loss is {losses} at learning rate {found['learning_rate']:.3g}{told}. "
        f"Studies of the batch: {named or 'not told by the collator'} (all of them in {folder / NAN_FILE})."
    )


def _names(model: nn.Module, gradients: bool) -> list[str]:
    """Returns the names of the weights that are not finite, or whose gradients are not, on any rank."""
    values = ((name, weight.grad if gradients else weight) for name, weight in model.named_parameters())
    own = [name for name, value in values if value is not None and not bool(torch.isfinite(_own_part(value)).all())]
    # DDP's wrapper puts its own word before every name.
    return list(dict.fromkeys(name.removeprefix("module.") for each in _of_all_ranks(own) for name in each))


def _own_part(value: torch.Tensor) -> torch.Tensor:
    """Returns what this rank holds of a tensor that may be parted over ranks."""
    return (value.to_local() if hasattr(value, "to_local") else value).detach()


def _of_all_ranks(value: Any) -> list[Any]:
    if ranks.world_size() == 1:
        return [value]
    from accelerate.utils import gather_object

    return gather_object([value])


def _as_json(value: torch.Tensor) -> float | str:
    """Returns a number, or the name of what is none: JSON has no NaN."""
    number = float(value)
    return number if math.isfinite(number) else str(number)
