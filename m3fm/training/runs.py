# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Recipes from YAML to a run, and what every run leaves behind: model, facts, history, curves."""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import yaml
from transformers import HfArgumentParser, PreTrainedModel, Trainer, TrainingArguments

# Arguments that make a run what it is; how long it runs and how often it looks up may change when it is resumed.
FIXED_ARGUMENTS = ("seed", "learning_rate", "per_device_train_batch_size", "bf16", "weight_decay", "max_grad_norm")
LENGTH_ARGUMENTS = ("num_train_epochs", "max_steps")
RECIPES = Path(__file__).parent / "recipes"


@dataclass(frozen=True)
class Kind:
    """Names the code behind the `recipe:` of a YAML file: its module, its dataclass, and whether it has a Trainer."""

    module: str
    dataclass: str
    trains: bool


KINDS = {
    "tokenizer": Kind(".tokenizer", "TokenizerRecipe", trains=False),
    "align": Kind(".align", "AlignRecipe", trains=True),
    "write": Kind(".write", "WriteRecipe", trains=True),
    "classify": Kind(".classify", "ClassifyRecipe", trains=True),
}


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


def find_recipe(name: str) -> Path:
    """Finds a recipe by path, or by name among those that ship with the package.

    Raises:
        ValueError: If there is none, with the names that ship.
    """
    for path in (Path(name), RECIPES / name, RECIPES / f"{name}.yaml"):
        if path.is_file():
            return path
    shipped = ", ".join(sorted(path.stem for path in RECIPES.glob("*.yaml")))
    raise ValueError(f"No recipe {name!r}: expected a YAML file, or one of {shipped}.")


def run_recipe(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Runs a recipe.

    Args:
        path: YAML file whose `recipe:` is one of `KINDS`; the rest are fields of that recipe's dataclass, and of
            `transformers.TrainingArguments` where it trains.
        overrides: `--name value` pairs that replace fields; values are read as YAML.

    Returns:
        The facts of the run, as written to `run.json`.

    Raises:
        ValueError: If the file is not such a recipe, or a field is unknown.
    """
    try:
        values = _read_yaml(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from None
    if not isinstance(values, dict) or values.get("recipe") not in KINDS:
        kind = values.get("recipe") if isinstance(values, dict) else values
        raise ValueError(f"{path}: expected `recipe:` to be one of {sorted(KINDS)}, got {kind!r}.")
    kind = KINDS[values.pop("recipe")]
    values.update(_parse_overrides(overrides))
    module = import_module(kind.module, __package__)
    recipe_class = getattr(module, kind.dataclass)
    classes = (recipe_class, TrainingArguments) if kind.trains else (recipe_class,)
    if kind.trains:
        # Without this a recipe in bf16 is refused on a machine that has no accelerator.
        values.setdefault("use_cpu", not torch.accelerator.is_available())
    try:
        parsed = HfArgumentParser(classes).parse_dict(values, allow_extra_keys=False)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return module.run(*parsed)


class _Loader(yaml.SafeLoader):
    """Reads 1e-4 as a number: YAML 1.1 asks for 1.0e-4, and takes this for a word."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _read_yaml(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)


def _parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    names, texts = overrides[::2], overrides[1::2]
    if len(names) != len(texts) or not all(name.startswith("--") for name in names):
        raise ValueError(f"Expected `--name value` pairs after the recipe, got {' '.join(overrides)!r}.")
    # "no" is a strategy of TrainingArguments, and only YAML 1.1 takes it for a truth value.
    words = ("no", "off", "on", "yes")
    values = (text if text in words else _read_yaml(text) for text in texts)
    return {name[2:]: value for name, value in zip(names, values, strict=True)}


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
