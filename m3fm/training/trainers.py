# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Trainers whose runs can be killed at any moment, guard their weights, and are scored by more than a loss."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import safetensors.torch
import torch
from torch import nn
from transformers import EarlyStoppingCallback, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState

from . import ranks
from .checkpoints import drop_checkpoints, whole_checkpoint
from .guards import NAN_GUARDS, NanGuard, take_study_ids
from .progress import Progress
from .towers import has_lora

__all__ = ["CheckpointTrainer", "RunOptions", "ScoredTrainer", "Validation"]

# A state that has LoRA in it, by the names of the modules: `from_pretrained` knows none of them.
_STATE_FILE = "state.safetensors"
_PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "trackio": ("trackio",)}


@dataclass
class RunOptions:
    """What a run does beside training, and `TrainingArguments` does not say.

    Args:
        early_stopping_patience: Evaluations without a better `metric_for_best_model` after which the run stops; None:
            it does not.
        nan_guard: What is done with a step whose loss or gradient is NaN or infinite: "stop" the run before it, or
            "skip" it, three in a row at most.
    """

    early_stopping_patience: int | None = None
    nan_guard: str = "stop"

    def __post_init__(self) -> None:
        if self.early_stopping_patience is not None and self.early_stopping_patience < 1:
            raise ValueError(f"early_stopping_patience: got {self.early_stopping_patience}, expected at least 1.")
        if self.nan_guard not in NAN_GUARDS:
            raise ValueError(f"nan_guard: got {self.nan_guard!r}, expected one of {list(NAN_GUARDS)}.")


class Validation(Protocol):
    """What a run is scored by while it trains."""

    def score(self, model: Any) -> dict[str, float]:
        """Returns scores of the model, by name; of which less is better, the name ends in "loss".

        Every rank calls it, so that they may share the work; what the main rank returns counts.
        """

    def score_names(self) -> Sequence[str]:
        """Returns the names of the scores, without asking a model."""


class CheckpointTrainer(Trainer):
    """`Trainer` whose runs can be killed at any moment, and guard their weights.

    - Checkpoints are whole or not there, on any number of ranks; see `checkpoints.py`.
    - A run that goes on has the same losses and history as one that was never stopped. `Trainer` itself restarts the
      mean of the losses that are not logged yet, forgets how long it waited for a better score, passes over the
      evaluation at the end of an epoch whose last step is saved, and takes a step too many after the last.
    - All weights of a model of transformers are found in a checkpoint: its names are not those of the module, and
      `Trainer` keeps the fresh weights of what it finds no name for.
    - Steps that are no number are caught; see `guards.py`. Speed and memory are logged; see `progress.py`.

    Args:
        model: What is trained.
        args: Of transformers.
        others: What else `Trainer` takes.
        options: Of the run; None: the defaults.
        kwargs: What `Trainer` takes by name.

    Raises:
        ValueError: If the arguments ask for a package that is missing, or for what does not go together.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        args: TrainingArguments,
        *others: Any,
        options: RunOptions | None = None,
        **kwargs: Any,
    ):
        self.options = options or RunOptions()
        _check_arguments(args, self.options)
        # It would put a mean in place of a loss that is none, where the guard looks.
        args.logging_nan_inf_filter = False
        _keep_logs_here(args)
        super().__init__(model, args, *others, **kwargs)
        self.progress = Progress()
        #: Numbers of weights, trained and total, as training began: LoRA may be merged when it has ended.
        self.parameters: dict[str, int] = {}
        self.guard = NanGuard(self.options.nan_guard, Path(args.output_dir))
        self._resumed_from: Path | None = None
        self._loss_before_step = torch.tensor(0.0)
        # Of the part of the run that is over: `Trainer` counts anew.
        self._earlier_loss = 0.0
        self._saves_at_epoch_end = False
        self._is_epoch_end = False
        self.add_callback(_RunKeeper(self))
        if self.options.early_stopping_patience is not None:
            self.add_callback(EarlyStoppingCallback(self.options.early_stopping_patience))

    def create_accelerator_and_postprocess(self) -> None:
        """Sets accelerate up; FSDP2 parts weights by their rows, which a single number has none of."""
        super().create_accelerator_and_postprocess()
        if self.is_fsdp_enabled:
            numbers = nn.ParameterList([weight for weight in self.model.parameters() if weight.dim() == 0])
            self.accelerator.state.fsdp_plugin.ignored_modules = [numbers]

    # --- steps -------------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Trains; see `Trainer`."""
        self._resumed_from = Path(resume_from_checkpoint) if isinstance(resume_from_checkpoint, str) else None
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list, Any]:
        """Returns the micro-batches of a step; keeps the ids of their studies from the model."""
        self.progress.begin_step()
        batches, count = super().get_batch_samples(*args, **kwargs)
        study_ids = [take_study_ids(batch) for batch in batches]
        self.guard.begin_step(study_ids)
        self.progress.count(batches, study_ids)
        self._loss_before_step = self._tr_loss.clone()
        return batches, count

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Goes forward and back through a micro-batch."""
        loss = super().training_step(*args, **kwargs)
        self.guard.note_loss(loss)
        return loss

    def _prepare_inputs(self, inputs: Any) -> Any:
        if isinstance(inputs, dict):
            take_study_ids(inputs)  # of an evaluation; those of a step are taken before
        return super()._prepare_inputs(inputs)

    def _clip_grad_norm(self, model: torch.nn.Module) -> Any:
        self._guard_step(model)
        return super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        if grad_norm is None:  # gradients are not clipped
            self._guard_step(model)
        return super()._get_grad_norm(model, grad_norm=grad_norm)

    def _guard_step(self, model: torch.nn.Module) -> None:
        """Ends the run, or leaves the step out, if its loss or gradient is no number."""
        loss = self._tr_loss - self._loss_before_step
        scaler = getattr(self.accelerator, "scaler", None)
        if not self.guard.finds(model, loss, sees_gradients=scaler is None):
            return
        self.guard.handle(model, loss, self.state.global_step + 1, self._get_learning_rate())
        if scaler is None:  # which leaves the step out by itself, and expects gradients
            model.zero_grad()  # the optimizer passes over weights without one
        # The mean loss that is logged is of the steps that were taken.
        self._tr_loss.copy_(self._loss_before_step)
        self._globalstep_last_logged += 1

    def _run_epoch(self, **kwargs: Any) -> None:
        if self._resumed_from is not None and self._is_over():
            self.control.should_training_stop = True
            return
        super()._run_epoch(**kwargs)

    def _is_over(self) -> bool:
        waited = (each for each in self.callback_handler.callbacks if isinstance(each, EarlyStoppingCallback))
        return self.state.global_step >= self.state.max_steps or any(
            each.early_stopping_patience_counter >= each.early_stopping_patience for each in waited
        )

    # --- what is logged ----------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs, and adds speed to the losses, and the facts of the whole run to the last entry."""
        if "train_runtime" in logs:
            logs["train_loss"] = (self._earlier_loss + self._total_loss_scalar) / max(self.state.global_step, 1)
            logs |= self.progress.summary(self.args.device)
        elif "loss" in logs:
            logs |= self.progress.rates(self.args.device)
        super().log(logs, start_time)

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        is_better = super()._determine_best_metric(metrics, trial)
        if is_better and self.args.load_best_model_at_end:
            self.control.should_save = True  # whatever save_steps say: there has to be something to load
        return is_better

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        # What belongs to the end of an epoch, or of the run, has to be in the checkpoint of its last step.
        is_last_step = self.control.should_training_stop or float(self.state.epoch or 0).is_integer()
        if is_last_step and not self._is_epoch_end:
            self._saves_at_epoch_end = True
            return
        self.store_flos()
        run, step = Path(self.args.output_dir), self.state.global_step
        if self.state.best_global_step:
            best = run / f"checkpoint-{self.state.best_global_step}"
            if best.is_dir() or self.state.best_global_step == step:
                self.state.best_model_checkpoint = str(best)
        for each in (*self.callback_handler.callbacks, self.control):
            if isinstance(each, ExportableState):
                self.state.stateful_callbacks[type(each).__name__] = each.state()
        with whole_checkpoint(run, step, self._checkpoint_size(), self.args.device) as folder:
            self.save_model(str(folder), _internal_call=True)
            if not self.args.save_only_model:
                self._save_optimizer_and_scheduler(str(folder))
                self._save_scaler(str(folder))
                self._save_rng_state(str(folder))
            self._progress_file(folder).write_text(json.dumps(self._progress_state(), indent=1), encoding="utf-8")
            if ranks.is_main():
                self.state.save_to_json(str(folder / TRAINER_STATE_NAME))
        if ranks.is_main():
            drop_checkpoints(run, self.args.save_total_limit, self.state.best_model_checkpoint)

    def _checkpoint_size(self) -> int:
        """Returns about how many bytes a checkpoint takes: weights, and what the optimizer keeps of them."""
        kept = [value for state in self.optimizer.state.values() for value in state.values()]
        tensors = [*self.model.state_dict().values(), *(each for each in kept if isinstance(each, torch.Tensor))]
        return sum(each.numel() * each.element_size() for each in tensors)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        # A model of PEFT saves its adapters alone, and finds them again.
        is_in_place = isinstance(self.model, PreTrainedModel) and has_lora(self.model)
        if not is_in_place or self._is_parted():
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            safetensors.torch.save_model(self.model, str(folder / _STATE_FILE))
            self.model.config.save_pretrained(folder)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        model, folder = self.model if model is None else model, Path(resume_from_checkpoint)
        if (folder / _STATE_FILE).is_file():
            safetensors.torch.load_model(model, str(folder / _STATE_FILE))
        elif isinstance(model, PreTrainedModel) and not self._is_parted() and (folder / "config.json").is_file():
            saved = type(model).from_pretrained(folder, dtype=torch.float32)
            model.load_state_dict(saved.state_dict())
        else:  # adapters alone, or what is parted by ranks
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if self._is_parted():
            super()._load_best_model()
        else:
            self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self.args.device.type != "cpu" or self._is_parted():
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        # For several ranks transformers 5.17 asks torch for "cpu:0", which is no place to it.
        for name, part in ((OPTIMIZER_NAME, self.optimizer), (SCHEDULER_NAME, self.lr_scheduler)):
            if (path := Path(checkpoint) / name).is_file():
                part.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))

    def _is_parted(self) -> bool:
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    # --- going on ----------------------------------------------------------------------------------------------------

    def data_order(self) -> dict[str, Any] | None:
        """Returns what the order of the training data hangs on, as JSON; None where that is not known."""
        return None

    def _progress_file(self, checkpoint: Path) -> Path:
        return checkpoint / f"progress_{ranks.rank()}.json"

    def _progress_state(self) -> dict[str, Any]:
        return {
            "order": self.data_order(),
            "loss": self._tr_loss.item(),
            "logged_step": self._globalstep_last_logged,
            "logged_loss": self._earlier_loss + self._total_loss_scalar,
            "skipped_in_a_row": self.guard.skipped_in_a_row,
            "progress": self.progress.state_dict(),
        }

    def begin_run(self) -> None:
        """Is called before the first step; sets what a run that goes on has beside `Trainer`'s own state.

        Raises:
            ValueError: If the training data come in another order than before.
        """
        self.progress.begin_run()
        weights = list(self.model.parameters())
        self.parameters = {
            "trained": sum(weight.numel() for weight in weights if weight.requires_grad),
            "total": sum(weight.numel() for weight in weights),
        }
        if self._resumed_from is None or not self._progress_file(self._resumed_from).is_file():
            return
        saved = json.loads(self._progress_file(self._resumed_from).read_text(encoding="utf-8"))
        ours, theirs = self.data_order() or {}, saved["order"] or {}
        if ours != theirs:
            changed = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
            raise ValueError(
                f"The order of the training data is not that of {self._resumed_from}, by its {', '.join(changed)}: "
                "expected the same data as before, or another output_dir."
            )
        self.progress.load_state_dict(saved["progress"], self.args.device)
        self.guard.skipped_in_a_row = saved["skipped_in_a_row"]
        self._tr_loss.fill_(saved["loss"])
        self._globalstep_last_logged, self._earlier_loss = saved["logged_step"], saved["logged_loss"]
        best = Path(self.args.output_dir) / f"checkpoint-{self.state.best_global_step}"
        if best.is_dir():  # the run's folder may have been moved
            self.state.best_model_checkpoint = str(best)
        for each in self.callback_handler.callbacks:
            kept = self.state.stateful_callbacks.get(type(each).__name__)
            if isinstance(each, EarlyStoppingCallback) and kept:
                each.early_stopping_patience_counter = kept["attributes"]["early_stopping_patience_counter"]


class _RunKeeper(TrainerCallback):
    """Tells a `CheckpointTrainer` where its run has come to."""

    def __init__(self, trainer: CheckpointTrainer):
        self.trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Is called when the state was loaded, before the first step."""
        self.trainer.begin_run()

    def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
        """Is called before the steps of an epoch."""
        self.trainer._is_epoch_end = False

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Is called before a step is logged, evaluated and saved."""
        self.trainer.progress.end_step()

    def on_epoch_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Is called behind the steps of an epoch, before it is logged, evaluated and saved."""
        self.trainer._is_epoch_end = True
        if self.trainer._saves_at_epoch_end:
            self.trainer._saves_at_epoch_end = False
            control.should_save = True


class ScoredTrainer(CheckpointTrainer):
    """Evaluates by scores of validation studies: the loss of mixed batches would say little.

    Args:
        args: What `CheckpointTrainer` takes.
        validation: Gives the scores; `metric_for_best_model` is the name of one.
        kwargs: What `CheckpointTrainer` takes by name.

    Raises:
        ValueError: If the validation gives no such score.
    """

    def __init__(self, *args: Any, validation: Validation, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.validation = validation
        wanted = self.args.metric_for_best_model
        if wanted and wanted.removeprefix("eval_") not in (names := sorted(validation.score_names())):
            raise ValueError(f"metric_for_best_model: got {wanted!r}, expected a score of this run: one of {names}.")

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """Scores the model, and logs the scores."""
        scores = self.validation.score(self.accelerator.unwrap_model(self.model))
        if ranks.world_size() > 1:
            from accelerate.utils import broadcast_object_list

            # Scores that differ in the last bit would let one rank stop, or save, without the others.
            (scores,) = broadcast_object_list([scores])
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in scores.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def _keep_logs_here(args: TrainingArguments) -> None:
    """Names a run by its folder, and leaves what trackio writes on this machine unless a Space was asked for."""
    args.run_name = args.run_name or Path(args.output_dir).name
    if args.project == "huggingface":  # the default of transformers
        args.project = "m3fm"
    if args.trackio_static_space_id is None:
        args.trackio_static_space_id = False  # None makes a page of it when the model is pushed


def _check_arguments(args: TrainingArguments, options: RunOptions) -> None:
    """Refuses arguments that would fail, or mislead, later on."""
    for reporter in args.report_to:
        packages = _PACKAGES.get(reporter, ())
        if packages and not any(find_spec(name) for name in packages):
            raise ValueError(f"report_to: {reporter} is not installed: pip install {packages[0]}, or leave it out.")
    if options.early_stopping_patience is None:
        return
    lacking = []
    if args.metric_for_best_model is None:
        lacking.append("metric_for_best_model")
    if args.eval_strategy == "no":
        lacking.append("eval_strategy")
    if lacking:
        raise ValueError(f"early_stopping_patience: expected {' and '.join(lacking)} to be set too.")
