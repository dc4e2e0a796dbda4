# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""A run of seconds on made-up tokens, with dropout and validation scores, that tests stop and break."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from m3fm.training.feed import FeedTrainer
from m3fm.training.runs import RunOptions, ScoredTrainer
from m3fm.training.samplers import EpochBatches, EveryStudy

CONFIG = LlamaConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    attention_dropout=0.3,
    pad_token_id=0,
)
# What two runs that do the same may differ in.
TIMES = ("per_second", "seconds", "runtime", "memory")


class StoppedError(Exception):
    """Ends a run in the middle."""


class Tokens:
    """Collates numbers of studies; each of them is a row of tokens."""

    def __init__(self, poisoned: int | None = None):
        self.poisoned = poisoned

    def __call__(self, numbers: list[int]) -> dict[str, Any]:
        rows = [np.random.default_rng(number).integers(1, 32, 6) for number in numbers]
        ids = torch.from_numpy(np.stack(rows))
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
        batch["study_ids"] = [f"made_up/{number}" for number in numbers]
        if self.poisoned in numbers:
            batch["poison"] = torch.tensor(float("nan"))
        return batch


class Scores:
    """Draws on the generators, as sampled reports would."""

    def score(self, model: torch.nn.Module) -> dict[str, float]:
        weight = model.lm_head.weight.detach()
        return {"bleu_4_en": float(weight.abs().mean()), "drawn": float(torch.rand(())) + float(np.random.rand())}

    def score_names(self) -> list[str]:
        return ["bleu_4_en", "drawn"]


class SmallTrainer(ScoredTrainer, FeedTrainer):
    """Stops before a step where it is told to."""

    stop_before: int | None = None
    on_step: Callable[["SmallTrainer"], None] | None = None

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.state.global_step + 1 == self.stop_before:
            raise StoppedError
        if self.on_step is not None:
            self.on_step(self)
        return super().training_step(model, inputs, *args, **kwargs)

    def compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any], **kwargs: Any) -> torch.Tensor:
        assert "study_ids" not in inputs
        poison = inputs.pop("poison", None)
        loss = model(**inputs).loss
        return loss if poison is None else loss * poison


def small_trainer(
    folder: Path,
    options: RunOptions | None = None,
    validation: Any = None,
    poisoned: int | None = None,
    studies: int = 10,
    model: torch.nn.Module | None = None,
    **arguments: Any,
) -> SmallTrainer:
    """Makes a run of 10 studies in batches of 2, logged at each step."""
    values = {
        "per_device_train_batch_size": 2,
        "max_steps": 8,
        "logging_steps": 1,
        "save_steps": 3,
        "learning_rate": 0.01,
        "seed": 3,
        "use_cpu": True,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "report_to": "none",
    }
    values |= arguments
    torch.manual_seed(0)
    return SmallTrainer(
        model=LlamaForCausalLM(CONFIG) if model is None else model,
        args=TrainingArguments(str(folder), **values),
        data_collator=Tokens(poisoned),
        train_dataset=list(range(studies)),
        eval_dataset=list(range(2)),
        options=options,
        validation=validation or Scores(),
        batches=EpochBatches(EveryStudy(studies), 2, seed=3, world_size=int(os.environ.get("WORLD_SIZE", 1))),
    )


def comparable(history: list[dict[str, float]]) -> list[dict[str, float]]:
    """Returns a history without what says how fast the run was."""
    kept = [{key: each for key, each in entry.items() if not any(word in key for word in TIMES)} for entry in history]
    return [{key: each for key, each in entry.items() if key != "total_flos"} for entry in kept]
