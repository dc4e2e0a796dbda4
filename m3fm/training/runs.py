# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""What every run has in common: it goes on where it stopped, and leaves model, facts, history and curves behind."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from transformers import PreTrainedModel, Trainer, TrainingArguments

# Arguments that make a run what it is; how long it runs and how often it looks up may change when it is resumed.
FIXED_ARGUMENTS = ("seed", "learning_rate", "per_device_train_batch_size", "bf16", "weight_decay", "max_grad_norm")
LENGTH_ARGUMENTS = ("num_train_epochs", "max_steps")


class Validation(Protocol):
    """What a run is scored by while it trains."""

    def score(self, model: Any) -> dict[str, float]:
        """Returns scores of the model, by name."""


class CheckpointTrainer(Trainer):
    """`Trainer` that finds all weights of a model of transformers in its checkpoints: to go on, and for the best one.

    The names in a checkpoint are not those of the module: `from_pretrained` translates them. `Trainer` does not, keeps
    the fresh weights of what it finds no name for, and only warns.
    """

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        model = self.model if model is None else model
        if not self._is_whole(resume_from_checkpoint, model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        saved = type(model).from_pretrained(resume_from_checkpoint, dtype=torch.float32)
        model.load_state_dict(saved.state_dict())

    def _load_best_model(self) -> None:
        if self._is_whole(self.state.best_model_checkpoint, self.model):
            self._load_from_checkpoint(self.state.best_model_checkpoint)
        else:
            super()._load_best_model()

    def _is_whole(self, checkpoint: str, model: torch.nn.Module) -> bool:
        """Tells whether `save_pretrained` wrote all weights there: not adapters alone, nor what is parted by ranks."""
        is_parted = self.is_fsdp_enabled or self.is_deepspeed_enabled
        return isinstance(model, PreTrainedModel) and not is_parted and (Path(checkpoint) / "config.json").is_file()


class ScoredTrainer(CheckpointTrainer):
    """Evaluates by scores of validation studies: the loss of mixed batches would say little."""

    def __init__(self, *args: Any, validation: Validation, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.validation = validation

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """Scores the model, and logs the scores."""
        scores = self.validation.score(self.accelerator.unwrap_model(self.model))
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in scores.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


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


def batch_generator(names: Iterable[str]) -> np.random.Generator:
    """Returns a generator for one batch, seeded by what is in it.

    A state would not survive an interruption: batches are collated ahead of the step that is saved. Shuffling gives a
    study other company in every epoch, so its draws change.
    """
    digest = hashlib.sha256("\n".join(names).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "little"))


def train_or_resume(trainer: Trainer, recipe: Any) -> None:
    """Trains, going on where an interrupted run of the same recipe stopped.

    Raises:
        ValueError: If the output folder holds a run of other settings, or this one, finished.
    """
    arguments = trainer.args
    folder = Path(arguments.output_dir)
    settings = json.loads(json.dumps(asdict(recipe) | {name: getattr(arguments, name) for name in FIXED_ARGUMENTS}))
    record, finished, checkpoint = folder / "settings.json", folder / "run.json", latest_checkpoint(folder)
    if record.is_file() and (finished.is_file() or checkpoint is not None):
        earlier = json.loads(record.read_text(encoding="utf-8"))
        changed = sorted(name for name in settings.keys() | earlier.keys() if settings.get(name) != earlier.get(name))
        if changed:
            raise ValueError(f"{folder} holds a run with another {', '.join(changed)}: expected another output_dir.")
    folder.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(settings, indent=1, ensure_ascii=False), encoding="utf-8")
    if finished.is_file():
        earlier = json.loads(finished.read_text(encoding="utf-8"))["arguments"]
        if all(earlier.get(name) == getattr(arguments, name) for name in LENGTH_ARGUMENTS):
            raise ValueError(f"{folder} holds this run, finished: expected another output_dir, or a longer run.")
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))


def latest_checkpoint(folder: Path) -> Path | None:
    """Returns the last checkpoint of a run, or None; one that was cut off while it was saved is passed by."""
    whole = [path for path in folder.glob("checkpoint-*") if (path / "trainer_state.json").is_file()]
    return max(whole, key=lambda path: int(path.name.rsplit("-", 1)[1]), default=None)


def finish_run(trainer: Trainer, recipe: Any, facts: dict[str, Any]) -> dict[str, Any]:
    """Saves the model with its processor, the history, the curves and the facts of a run into its output folder.

    Args:
        trainer: A trainer that has trained.
        recipe: The recipe's dataclass.
        facts: What is to be said about the run beyond its recipe.

    Returns:
        `facts` with the output folder, the recipe, the arguments that matter and the last validation scores.
    """
    folder = Path(trainer.args.output_dir)
    # Truncation as it was last used would be saved with the tokenizer, and cut the texts of whoever loads it.
    trainer.processing_class.tokenizer.backend_tokenizer.no_truncation()
    trainer.processing_class.tokenizer.backend_tokenizer.no_padding()
    trainer.save_model(str(folder))
    # Pickled, and naming paths of this machine: it stays in the run's own checkpoints.
    (folder / "training_args.bin").unlink(missing_ok=True)
    history = trainer.state.log_history
    (folder / "history.json").write_text(json.dumps(history, indent=1), encoding="utf-8")
    plot_curves(history, folder / "curves.png")
    scores = next((entry for entry in reversed(history) if any(key.startswith("eval_") for key in entry)), {})
    facts = {
        **facts,
        "output_dir": str(folder),
        "steps": trainer.state.global_step,
        "device": str(trainer.args.device),
        "recipe": asdict(recipe),
        "arguments": {name: getattr(trainer.args, name) for name in (*FIXED_ARGUMENTS, *LENGTH_ARGUMENTS)},
        "validation": {key: value for key, value in scores.items() if key.startswith("eval_")},
    }
    (folder / "run.json").write_text(json.dumps(facts, indent=1, ensure_ascii=False), encoding="utf-8")
    return facts


def plot_curves(history: list[dict[str, float]], path: Path) -> None:
    """Draws the training loss, and every validation score, over the steps."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Curves need matplotlib: pip install 'm3fm[train]'.") from error
    names = sorted({key for entry in history for key in entry if key.startswith("eval_")})
    losses = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(*zip(*losses, strict=True) if losses else ([], []), color="black")
    left.set(title="training loss", xlabel="step")
    for name in names:
        points = [(entry["step"], entry[name]) for entry in history if name in entry]
        right.plot(*zip(*points, strict=True), marker=".", label=name.removeprefix("eval_"))
    right.set(title="validation", xlabel="step")
    if names:
        figure.legend(loc="outside right upper", fontsize=7)
    figure.savefig(path, dpi=120)
