# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""A step that is no number ends the run or is left out, before it reaches the weights; its studies are named."""

import json
import logging

import pytest
import torch

from m3fm.training.checkpoints import is_whole
from m3fm.training.guards import MOST_SKIPPED, NAN_FILE, NonFiniteStepError
from m3fm.training.runs import RunOptions
from tests.training.small_runs import small_trainer

pytest.importorskip("accelerate")


@pytest.fixture(autouse=True)
def no_collection(monkeypatch):
    """Trainer collects garbage before each run: most of the time that these take."""
    monkeypatch.setattr("gc.collect", lambda *generation: 0)


SKIP = RunOptions(nan_guard="skip")


def first_step_with(study: int, trainer) -> int:
    order = trainer.batches.all_batches(0)[:, 0]
    micro = trainer.args.gradient_accumulation_steps
    return 1 + next(place for place, batch in enumerate(order) if study in batch) // micro


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_the_run_stops_before_the_step_and_names_the_studies(micro_batches, tmp_path):
    trainer = small_trainer(tmp_path, poisoned=4, gradient_accumulation_steps=micro_batches, save_steps=1)
    before = {}
    trainer.on_step = lambda trainer: before.update(
        {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
    )
    with pytest.raises(NonFiniteStepError, match="the loss is nan at learning rate 0.0.*Studies .*made_up/4") as error:
        trainer.train()
    step = first_step_with(4, trainer)
    (found,) = json.loads((tmp_path / NAN_FILE).read_text(encoding="utf-8"))
    assert found["step"] == step == trainer.state.global_step + 1
    assert "lm_head.weight" in found["gradients_not_finite"] and found["weights_not_finite"] == []
    (rank,) = found["ranks"]
    assert rank["loss"] == "nan" and len(rank["batches"]) == micro_batches
    (wrong,) = [batch for batch in rank["batches"] if not batch["is_finite"]]
    assert "made_up/4" in wrong["study_ids"] and len(wrong["study_ids"]) == 2
    assert all(study in str(error.value) for study in wrong["study_ids"])
    assert "training.json" not in str(error.value) and "nan_guard: skip" in str(error.value)
    assert all(torch.equal(weight, before[name]) for name, weight in trainer.model.state_dict().items())
    assert all(torch.isfinite(weight).all() for weight in before.values())
    if step > 1:
        assert is_whole(tmp_path / f"checkpoint-{step - 1}")


def test_a_gradient_is_looked_at_where_it_is_not_clipped(tmp_path):
    trainer = small_trainer(tmp_path, max_grad_norm=0.0)
    weight = trainer.model.lm_head.weight
    weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(NonFiniteStepError, match="1 gradients are not finite, as lm_head.weight"):
        trainer.train()


def test_a_step_that_is_left_out_changes_nothing(tmp_path, caplog):
    trainer = small_trainer(tmp_path, SKIP, poisoned=4, max_steps=5, logging_steps=5, save_steps=5)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert "made_up/4" in caplog.text and "left out" in caplog.text
    assert all(torch.isfinite(weight).all() for weight in trainer.model.parameters())
    steps = {int(state["step"]) for state in trainer.optimizer.state.values()}
    assert steps == {4}, "the optimizer took four of five steps"
    (logged,) = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert 2.5 < logged < 4.5, "the mean is of the steps that were taken"
    assert trainer.guard.skipped_in_a_row == (1 if first_step_with(4, trainer) == 5 else 0)


def test_too_many_steps_in_a_row_are_no_accident(tmp_path):
    trainer = small_trainer(tmp_path, SKIP, save_steps=1)
    trainer.model.lm_head.weight.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(NonFiniteStepError, match=f"It is number {MOST_SKIPPED + 1} in a row"):
        trainer.train()
    assert len(json.loads((tmp_path / NAN_FILE).read_text(encoding="utf-8"))) == MOST_SKIPPED + 1
    later = small_trainer(tmp_path, SKIP, save_steps=1)
    later.model.lm_head.weight.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(NonFiniteStepError, match=f"It is number {MOST_SKIPPED + 1} in a row"):
        later.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{MOST_SKIPPED}"))
    assert later.state.global_step == MOST_SKIPPED, "it counts on after an interruption"


def test_unknown_modes_are_refused():
    with pytest.raises(ValueError, match=r"nan_guard: got 'ignore', expected one of \['stop', 'skip'\]"):
        RunOptions(nan_guard="ignore")
    with pytest.raises(ValueError, match="early_stopping_patience: got 0, expected at least 1"):
        RunOptions(early_stopping_patience=0)
