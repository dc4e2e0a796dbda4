# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Runs: resumed, and kept apart."""

import json
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import pytest
from transformers import TrainingArguments

from m3fm.training import classify
from m3fm.training.align import AlignRecipe
from m3fm.training.runs import train_or_resume

pytest.importorskip("accelerate")


@pytest.mark.parametrize(("processes", "gpus"), [(2, 1), (1, 2)])
def test_a_head_is_trained_on_one_device(processes, gpus):
    with pytest.raises(ValueError, match=f"one process on one device, got {processes} on {gpus} GPUs"):
        classify.run(None, SimpleNamespace(world_size=processes, n_gpu=gpus))


# --- resuming --------------------------------------------------------------------------------------------------------


@dataclass
class RecordedTrainer:
    """Notes what it was to go on from, and trains nothing."""

    args: TrainingArguments
    started_from: list[str | None] = field(default_factory=list)

    def train(self, resume_from_checkpoint: str | None) -> None:
        self.started_from.append(resume_from_checkpoint)


def started_from(folder, recipe=None, **arguments) -> str | None:
    """Returns the checkpoint that a run into `folder` goes on from."""
    trainer = RecordedTrainer(TrainingArguments(output_dir=str(folder), use_cpu=True, **arguments))
    train_or_resume(trainer, recipe or AlignRecipe())
    (checkpoint,) = trainer.started_from
    return checkpoint


def save_checkpoint(folder, step: int) -> str:
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text("{}", encoding="utf-8")
    content = {"format": 1, "step": step, "files": {"trainer_state.json": 2}}
    (checkpoint / "content.json").write_text(json.dumps(content), encoding="utf-8")
    return str(checkpoint)


def finish(folder, **lengths) -> None:
    values = {"num_train_epochs": 3.0, "max_steps": -1, **lengths}
    (folder / "training.json").write_text(json.dumps({"recipe": {}, "arguments": values}), encoding="utf-8")


def test_a_run_starts_from_nothing_and_goes_on_from_its_last_checkpoint(tmp_path):
    folder = tmp_path / "new" / "run"
    recipe = AlignRecipe(image_sets={"a": 2}, label_share=0.5)
    assert started_from(folder, recipe, seed=3, learning_rate=1e-4) is None
    settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    assert settings["image_sets"] == {"a": 2} and settings["label_share"] == 0.5
    assert (settings["seed"], settings["learning_rate"]) == (3, 1e-4)
    last = save_checkpoint(folder, 20)
    same = {"seed": 3, "learning_rate": 1e-4}
    assert started_from(folder, recipe, **same) == last
    assert started_from(folder, recipe, **same, save_steps=7, logging_steps=1, num_train_epochs=9) == last


@pytest.mark.parametrize(
    ("recipe", "arguments", "named"),
    [
        ({"label_share": 0.5}, {}, "label_share"),
        ({"image_sets": {"a": 2}}, {}, "image_sets"),
        ({}, {"gradient_accumulation_steps": 2}, "gradient_accumulation_steps"),
        (
            {},
            {"lr_scheduler_type": "cosine", "optim": "sgd", "warmup_steps": 5},
            "lr_scheduler_type, optim, warmup_steps",
        ),
        ({"model": {"projection_dim": 8}}, {"seed": 7}, "model, seed"),
        ({}, {"learning_rate": 1e-3, "per_device_train_batch_size": 2}, "learning_rate, per_device_train_batch_size"),
        ({}, {"weight_decay": 0.1, "max_grad_norm": 2.0, "bf16": True}, "bf16, max_grad_norm, weight_decay"),
    ],
)
def test_the_folder_of_another_run_is_refused(recipe, arguments, named, tmp_path):
    started_from(tmp_path)
    save_checkpoint(tmp_path, 20)
    before = (tmp_path / "settings.json").read_bytes()
    with pytest.raises(ValueError, match=f"holds a run with another {named}: expected another output_dir"):
        started_from(tmp_path, replace(AlignRecipe(), **recipe), **arguments)
    assert (tmp_path / "settings.json").read_bytes() == before


def test_a_finished_run_is_refused_unless_it_is_to_be_longer(tmp_path):
    started_from(tmp_path)
    last = save_checkpoint(tmp_path, 20)
    finish(tmp_path)
    with pytest.raises(ValueError, match="holds this run, finished: expected another output_dir, or a longer run"):
        started_from(tmp_path)
    assert started_from(tmp_path, num_train_epochs=5) == last
    finish(tmp_path, max_steps=20)
    with pytest.raises(ValueError, match="finished"):
        started_from(tmp_path, max_steps=20)
    assert started_from(tmp_path, max_steps=30) == last
