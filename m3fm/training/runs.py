# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""What every run has in common: it goes on where it stopped, and leaves model, facts, history and curves behind."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainingArguments

from ..evaluation.runs import write_json
from . import ranks
from .checkpoints import latest_checkpoint, remove_partial
from .curves import plot_curves
from .record import RECORD_FILE, read_record, training_record
from .trainers import CheckpointTrainer, RunOptions, ScoredTrainer, Validation

__all__ = [
    "FIXED_ARGUMENTS",
    "LENGTH_ARGUMENTS",
    "CheckpointTrainer",
    "RunOptions",
    "ScoredTrainer",
    "Validation",
    "check_single_device",
    "finish_run",
    "train_or_resume",
]

# Arguments that make a run what it is; how long it runs and how often it looks up may change when it is resumed.
FIXED_ARGUMENTS = (
    "seed",
    "data_seed",
    "world_size",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "optim",
    "optim_args",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "weight_decay",
    "max_grad_norm",
    "bf16",
    "fp16",
)
LENGTH_ARGUMENTS = ("num_train_epochs", "max_steps")
SETTINGS_FILE = "settings.json"


def train_or_resume(trainer: Trainer, recipe: Any) -> None:
    """Trains, going on where an interrupted run of the same recipe stopped.

    Raises:
        ValueError: If the output folder holds a run of other settings, or this one, finished.
    """
    arguments = trainer.args
    folder = Path(arguments.output_dir)
    fixed = {name: getattr(arguments, name, None) for name in FIXED_ARGUMENTS}
    settings = json.loads(json.dumps(asdict(recipe) | fixed, default=str))
    path, finished, checkpoint = folder / SETTINGS_FILE, read_record(folder), latest_checkpoint(folder)
    if path.is_file() and (finished is not None or checkpoint is not None):
        _refuse_another_run(folder, settings, json.loads(path.read_text(encoding="utf-8")))
    if finished is not None:
        earlier = finished.get("arguments", {})
        if all(earlier.get(name) == getattr(arguments, name) for name in LENGTH_ARGUMENTS):
            raise ValueError(f"{folder} holds this run, finished: expected another output_dir, or a longer run.")
    ranks.wait_for_all()  # before anyone changes what the others look at
    if ranks.is_main():
        folder.mkdir(parents=True, exist_ok=True)
        remove_partial(folder)
        write_json(path, settings)
    ranks.wait_for_all()
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))


def check_single_device(arguments: TrainingArguments) -> None:
    """Refuses a run on several devices.

    Raises:
        ValueError: With what to set instead.
    """
    if arguments.world_size > 1 or arguments.n_gpu > 1:
        raise ValueError(
            f"Expected one process on one device, got {arguments.world_size} on {arguments.n_gpu} GPUs: "
            "start it without a launcher, with CUDA_VISIBLE_DEVICES set to one of them."
        )


def _refuse_another_run(folder: Path, settings: dict[str, Any], earlier: dict[str, Any]) -> None:
    changed = sorted(name for name in settings.keys() | earlier.keys() if settings.get(name) != earlier.get(name))
    if not changed:
        return
    # Values of the recipe may be long, and name studies.
    values = [f"{name} was {earlier.get(name)} and is {settings.get(name)}" for name in changed]
    told = ", ".join(value for value, name in zip(values, changed, strict=True) if name in FIXED_ARGUMENTS)
    raise ValueError(
        f"{folder} holds a run with another {', '.join(changed)}: expected another output_dir, or the settings of "
        f"that run{f' ({told})' if told else ''}."
    )


def finish_run(trainer: Trainer, recipe: Any, facts: dict[str, Any]) -> dict[str, Any]:
    """Saves the model with its processor, the history, the curves and the facts of a run into its output folder.

    Args:
        trainer: A trainer that has trained.
        recipe: The recipe's dataclass.
        facts: What is to be said about the run beyond its recipe.

    Returns:
        What `training.json` holds: `facts` with the output folder, the recipe, the arguments that matter, what was
        seen and how fast, and the validation scores of the model that is left; see `record.training_record`.
    """
    folder = Path(trainer.args.output_dir)
    # Truncation as it was last used would be saved with the tokenizer, and cut the texts of whoever loads it.
    trainer.processing_class.tokenizer.backend_tokenizer.no_truncation()
    trainer.processing_class.tokenizer.backend_tokenizer.no_padding()
    if trainer.is_fsdp_enabled:  # its checkpoints may be in parts, a model for others is whole
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    if ranks.is_main():  # of a shorter run: what it tells of is about to be written over
        (folder / RECORD_FILE).unlink(missing_ok=True)
    trainer.save_model(str(folder))
    record = training_record(trainer, recipe, facts, (*FIXED_ARGUMENTS, *LENGTH_ARGUMENTS))
    if ranks.is_main():
        # Pickled, and naming paths of this machine: it stays in the run's own checkpoints.
        (folder / "training_args.bin").unlink(missing_ok=True)
        history = trainer.state.log_history
        write_json(folder / "history.json", history)
        plot_curves(history, folder / "curves.png", best_step=(record["best"] or {}).get("step"))
        write_json(folder / RECORD_FILE, record)  # last: the run counts as finished by it
    ranks.wait_for_all()
    return record
