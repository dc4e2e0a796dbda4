# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""`training.json`: what a model was made of and how, for its card and for those who want to know what it has seen."""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .trainers import CheckpointTrainer

__all__ = ["FORMAT", "RECORD_FILE", "read_record", "training_record"]

RECORD_FILE = "training.json"
FORMAT = 1
# What checkpoints have that were made before there was a format.
_EARLIER_FILE = "run.json"
_NOTICE = "For research only: no medical device."
_SPEED = (
    "samples_seen",
    "tokens_seen",
    "run_seconds",
    "step_seconds",
    "samples_per_second",
    "tokens_per_second",
    "peak_memory_bytes",
    "train_loss",
)


def read_record(folder: Path) -> dict[str, Any] | None:
    """Returns what a training left in a folder; None where it left nothing, or was not finished.

    Raises:
        ValueError: If the file is no such record, or one of a later version.
    """
    path = next((folder / name for name in (RECORD_FILE, _EARLIER_FILE) if (folder / name).is_file()), None)
    if path is None:
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise ValueError(f"{path} is damaged: expected JSON.") from None
    if not isinstance(record, dict) or not isinstance(record.get("recipe"), dict):
        raise ValueError(f"{path} is no record of a training: expected its recipe in it.")
    if record.get("format", 0) > FORMAT:
        raise ValueError(f"{path} has format {record['format']}, expected at most {FORMAT}: update m3fm.")
    return record


def training_record(
    trainer: "CheckpointTrainer", recipe: Any, facts: Mapping[str, Any], arguments: Sequence[str]
) -> dict[str, Any]:
    """Returns what is to be known of a training that has ended.

    Ids of studies are not in it: of what the recipe excludes only the number.

    Args:
        trainer: Has trained.
        recipe: Its dataclass.
        facts: What the stage says of itself, first of all its name and its data.
        arguments: Names of the training arguments that matter.
    """
    from ..evaluation.runs import library_versions, without_nan

    state = trainer.state
    last = next((entry for entry in reversed(state.log_history) if "train_runtime" in entry), {})
    values = asdict(recipe)
    if "exclude" in values:
        values["exclude"] = len(values["exclude"])
    record = {
        "format": FORMAT,
        "notice": _NOTICE,
        **facts,
        "output_dir": trainer.args.output_dir,
        "recipe": values,
        "arguments": {name: getattr(trainer.args, name, None) for name in arguments},
        "options": asdict(trainer.options),
        "steps": state.global_step,
        "epochs": state.epoch,
        **{name: last[name] for name in _SPEED if name in last},
        "parameters": trainer.parameters,
        "best": _best(trainer),
        "validation": _scores(trainer),
        "device": str(trainer.args.device),
        "hardware": _hardware(trainer.args.device, trainer.args.world_size),
        "versions": library_versions(),
    }
    return without_nan(json.loads(json.dumps(record, default=str)))


def _best(trainer: "CheckpointTrainer") -> dict[str, Any] | None:
    state, name = trainer.state, trainer.args.metric_for_best_model
    if not name or not state.best_global_step:
        return None
    return {
        "metric": name.removeprefix("eval_"),
        "step": state.best_global_step,
        "value": state.best_metric,
        "is_the_model": bool(trainer.args.load_best_model_at_end),
    }


def _scores(trainer: "CheckpointTrainer") -> dict[str, float]:
    """Returns the scores of the model that is left: of the best step where that was loaded, else the last ones."""
    entries = [entry for entry in trainer.state.log_history if any(name.startswith("eval_") for name in entry)]
    best = _best(trainer)
    if best and best["is_the_model"]:
        entries = [entry for entry in entries if entry["step"] == best["step"]]
    return {name: value for name, value in (entries[-1] if entries else {}).items() if name.startswith("eval_")}


def _hardware(device: torch.device, world_size: int) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "ranks": world_size,
        "device": device.type,
        "name": name,
        "cpu_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
