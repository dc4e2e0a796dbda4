# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""What a recipe would take, said before it starts: parameters, memory, steps, tokens, time and disk.

Parameters, weights, gradients and optimizer are exact. Activations are what autograd keeps of one micro-batch of the
longest texts, counted; what an allocator wastes comes on top, and what is freed before the last gradient is there does
not. Time is floating point operations over what this device reaches in a matrix multiplication, of which `UTILISATION`
is taken to be used. `benchmarks/training_plan.py` holds both against steps that are taken.
"""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments

from .outlook import Outlook, look_ahead
from .rehearsal import Steps, forward_flops, rehearse
from .scaling import ContrastiveStep, state_bytes
from .stages import Stage

__all__ = ["UTILISATION", "Plan", "format_plans", "matmul_flops", "plan_stages", "plan_training"]

#: Share of a device's matrix multiplication rate that a training is taken to reach.
UTILISATION = 0.4
_FLOAT = 4  # bytes
# Numbers that an optimizer keeps for each trained one; those of 8 bits are quarters.
_MOMENTS = {"sgd": 0.0, "adafactor": 0.1, "adagrad": 1.0, "lion": 1.0, "8bit": 0.5, "4bit": 0.25}
_ADAM = 2.0
# Float32 values a logit of the loss: logits, their exponentials, targets and gradients.
_HELD_A_LOGIT = 4


@dataclass
class Plan:
    """What one stage would take.

    Attributes:
        stage: Its name.
        output_dir: Where it writes.
        parameters: By part: all of them, and those that are trained.
        memory: Bytes on the device of one rank, by item.
        data: What is learned from.
        steps: Ranks, batches and how many of them.
        flops: Floating point operations of one rank, first of all of what is computed once.
        device: Where the rate below was measured, and in what precision.
        matmul_flops: Floating point operations a second of a matrix multiplication there.
        seconds: How long it takes, at `UTILISATION` of that rate.
        disk: Bytes in files.
        notes: What else is to be known.
    """

    stage: str
    output_dir: str
    parameters: dict[str, tuple[int, int]] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    data: dict[str, int] = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=dict)
    flops: dict[str, int] = field(default_factory=dict)
    device: str = ""
    matmul_flops: float = 0.0
    seconds: float = 0.0
    disk: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def total(self) -> tuple[int, int]:
        """All parameters, and those that are trained."""
        return sum(all_ for all_, _ in self.parameters.values()), sum(each for _, each in self.parameters.values())

    def to_dict(self) -> dict[str, Any]:
        """Returns what JSON can hold, with totals."""
        parameters = {name: {"total": total, "trained": trained} for name, (total, trained) in self.parameters.items()}
        total, trained = self.total
        return asdict(self) | {
            "parameters": parameters | {"all": {"total": total, "trained": trained}},
            "memory": self.memory | {"all": sum(self.memory.values())},
            "flops": self.flops | {"all": sum(self.flops.values())},
            "disk": self.disk | {"all": sum(self.disk.values())},
            "utilisation": UTILISATION,
        }


def plan_stages(stages: Sequence[Stage], ranks: int = 1, rate: float | None = None) -> list[Plan]:
    """Plans stages one after the other, each with what those before it would leave.

    Args:
        stages: In order.
        ranks: Processes that would train together.
        rate: Floating point operations a second of a matrix multiplication on the device that is planned for; None:
            measured on this one.

    Raises:
        ValueError: If a stage does not fit; see `look_ahead`.
    """
    plans, before = [], {}
    for stage in stages:
        parsed = stage.kind.parse(stage.values)
        arguments = parsed[1] if stage.kind.trains else None
        try:
            found = look_ahead(stage.kind, parsed, before)
            plans.append(plan_training(stage.name, found, arguments, ranks, rate))
        except ValueError as error:
            raise ValueError(f"{stage.name}: {error}") from None
        before[found.output_dir] = found
    return plans


def plan_training(
    name: str, found: Outlook, arguments: TrainingArguments | None, ranks: int = 1, rate: float | None = None
) -> Plan:
    """Plans one stage.

    Args:
        name: Of the stage.
        found: What it would meet.
        arguments: Of its training.
        ranks: Processes that would train together.
        rate: See `plan_stages`.

    Raises:
        ValueError: If there is not one sample for each place of a batch.
    """
    plan = Plan(name, found.output_dir, data=dict(found.facts), notes=list(found.notes))
    plan.notes += [f"{backbone} is not on this machine: planned by its published sizes" for backbone in found.missing]
    if found.stored:
        plan.disk["cache"] = found.stored
    if found.steps is None or arguments is None:
        return plan
    found.steps.check_enough(arguments, ranks)
    model = found.steps.build()
    plan.parameters = count_parameters(model)
    plan.steps = count_steps(len(found.steps.lengths), arguments, ranks)
    _add_states(plan, arguments, ranks)
    _add_computation(plan, found, arguments, model)
    plan.device, plan.matmul_flops = _measured(arguments.bf16) if rate is None else ("as given", rate)
    plan.seconds = sum(plan.flops.values()) / (plan.matmul_flops * UTILISATION)
    _add_disk(plan, arguments)
    return plan


def count_parameters(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Counts the parameters of a model by part: all of them, and those that are trained."""
    counts: dict[str, tuple[int, int]] = {}
    for name, weight in model.named_parameters():
        part = name.removeprefix("model.").split(".", 1)[0]
        total, trained = counts.get(part, (0, 0))
        counts[part] = total + weight.numel(), trained + weight.numel() * weight.requires_grad
    return counts


def count_steps(samples: int, arguments: TrainingArguments, ranks: int) -> dict[str, int]:
    """Counts batches and steps as `Trainer` does."""
    micro, accumulated = arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps
    of_epoch = math.ceil(math.ceil(samples / (micro * ranks)) / accumulated)
    steps = arguments.max_steps if arguments.max_steps > 0 else math.ceil(of_epoch * arguments.num_train_epochs)
    return {
        "ranks": ranks,
        "micro_batch": micro,
        "batch": micro * accumulated * ranks,
        "steps_of_an_epoch": of_epoch,
        "steps": steps,
        "samples": steps * micro * accumulated * ranks,
    }


def _add_states(plan: Plan, arguments: TrainingArguments, ranks: int) -> None:
    total, trained = plan.total
    shards = ranks if arguments.fsdp else 1
    plan.memory = {
        "weights": total * _FLOAT // shards,
        "gradients": trained * _FLOAT // shards,
        "optimizer": int(trained * moments(arguments.optim) * _FLOAT) // shards,
    }
    if ranks > 1 and not arguments.fsdp:
        plan.memory["gradients on their way"] = trained * _FLOAT
        sharded = state_bytes(trained, total - trained, ranks)
        plan.notes.append(
            f"under FSDP weights, gradients and optimizer take {_bytes(sharded)} of each of {ranks} ranks"
        )


def moments(optimizer: Any) -> float:
    """Returns how many float32 numbers an optimizer keeps for each that is trained."""
    name = getattr(optimizer, "value", str(optimizer))
    return next((count for part, count in _MOMENTS.items() if part in name), _ADAM)


def _add_computation(plan: Plan, found: Outlook, arguments: TrainingArguments, model: nn.Module) -> None:
    """Adds what is held and computed at every step, and what is computed once."""
    steps = found.steps
    for what, count, run in found.prepared:
        plan.flops[f"{what}, once"] = count * forward_flops(steps.build(), run) // plan.steps["ranks"]
    if steps.inputs is not None:
        longest, mean = int(steps.lengths.max()), float(steps.lengths.mean())
        cost = rehearse(model, lambda: steps.inputs(longest), steps.loss, arguments.bf16)
        shorter = rehearse(steps.build(), lambda: steps.inputs(max(1, round(mean))), steps.loss, arguments.bf16)
        accumulated = arguments.gradient_accumulation_steps
        contrastive = any(steps.pairs)
        plan.memory["activations of a micro-batch"] = cost.activations
        plan.memory["their gradients, in passing"] = cost.passing
        # Stage 1 holds the micro-batches of a step until all have been sent back.
        plan.memory["input tensors"] = cost.inputs * (accumulated if contrastive else 1)
        twice = shorter.forward_flops if contrastive and accumulated > 1 else 0
        plan.flops["training"] = plan.steps["steps"] * accumulated * (shorter.flops + twice)
        if contrastive:
            _add_loss(plan, steps, found, accumulated)
        if arguments.gradient_checkpointing:
            plan.notes.append("with gradient_checkpointing activations are fewer than those named")


def _add_loss(plan: Plan, steps: Steps, found: Outlook, accumulated: int) -> None:
    """Adds the loss over all ranks: embeddings with their gradients, and logits of some rows at a time."""
    images, texts = (count * accumulated for count in steps.pairs)
    ranks, width = plan.steps["ranks"], found.config.projection_dim
    studies = plan.steps["batch"]
    loss = ContrastiveStep(studies, ranks, width, max(1, round(texts * ranks / studies)), steps.loss_rows)
    own = (images + texts) * width * _FLOAT
    plan.memory["cached embeddings"] = int(loss.embedding_bytes("ours")) + 2 * own
    plan.memory["logits of the loss"] = int(loss.logits("ours")) * _HELD_A_LOGIT * _FLOAT
    plan.flops["loss"] = int(loss.flops()) * plan.steps["steps"]


def _add_disk(plan: Plan, arguments: TrainingArguments) -> None:
    total, trained = plan.total
    weights = total * _FLOAT
    state = 0 if arguments.save_only_model else int(trained * moments(arguments.optim) * _FLOAT)
    plan.disk["checkpoints"] = _num_checkpoints(plan, arguments) * (weights + state)
    plan.disk["model"] = weights


def _num_checkpoints(plan: Plan, arguments: TrainingArguments) -> int:
    strategy, steps = arguments.save_strategy.value, plan.steps["steps"]
    if strategy == "no":
        return 0
    every = plan.steps["steps_of_an_epoch"] if strategy == "epoch" else arguments.save_steps
    every = math.ceil(every * steps) if every < 1 else every
    saved = max(1, math.ceil(steps / every))
    # One more is whole before the oldest goes.
    return min(saved, (arguments.save_total_limit or saved) + 1)


# --------------------------------------------------------------------------------------------------------------------
# The device


@cache
def _measured(bf16: bool) -> tuple[str, float]:
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    dtype = torch.bfloat16 if bf16 else torch.float32
    name = f"{device.type}, {torch.get_num_threads()} threads" if device.type == "cpu" else device.type
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return f"measured: {name}, {str(dtype).removeprefix('torch.')}", matmul_flops(device, dtype)


def matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Measures the floating point operations a second of a matrix multiplication, the best of a few."""
    size = 768 if device.type == "cpu" else 8192
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = math.inf
    for _ in range(5):
        start = time.perf_counter()
        product = left @ right
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        best = min(best, time.perf_counter() - start)
    del product
    return 2 * size**3 / best


# --------------------------------------------------------------------------------------------------------------------
# To read


def format_plans(plans: Sequence[Plan], form: str = "text") -> str:
    """Returns plans to be read by people ("text") or programs ("json")."""
    if form == "json":
        return json.dumps([plan.to_dict() for plan in plans], indent=1, ensure_ascii=False) + "\n"
    text = "\n".join(_as_text(plan) for plan in plans)
    if len(plans) > 1:
        disk, seconds = sum(sum(plan.disk.values()) for plan in plans), sum(plan.seconds for plan in plans)
        text += f"\nall stages: about {_duration(seconds)}, {_bytes(disk)} of disk\n"
    return text


def _as_text(plan: Plan) -> str:
    lines = [f"{plan.stage}: into {plan.output_dir}"]
    if plan.parameters:
        total, trained = plan.total
        lines.append(f"  parameters   {_count(total)}, {_count(trained)} of them trained")
        lines += [
            f"    {part:<22}{_count(each):>10}  trained {_count(learned):>8}"
            for part, (each, learned) in plan.parameters.items()
        ]
    for title, values, shown in (
        ("data", plan.data, lambda value: f"{value:,}"),
        ("steps", plan.steps, lambda value: f"{value:,}"),
        ("memory", plan.memory, _bytes),
        ("disk", plan.disk, _bytes),
    ):
        if values:
            whole = "" if title in ("data", "steps") else f"about {_bytes(sum(values.values()))}"
            whole += " on the device of a rank" if title == "memory" else ""
            lines.append(f"  {title:<12} {whole}".rstrip())
            lines += [f"    {name.replace('_', ' '):<30}{shown(value):>12}" for name, value in values.items()]
    if plan.flops:
        rate = f"{UTILISATION:.0%} of {plan.matmul_flops / 1e12:.3g} TFLOP/s ({plan.device})"
        lines.append(f"  computation  {sum(plan.flops.values()):.3g} FLOPs, about {_duration(plan.seconds)} at {rate}")
        lines += [f"    {name:<30}{value:>12.3g}" for name, value in plan.flops.items()]
    lines += [f"  note: {note}" for note in dict.fromkeys(plan.notes)]
    return "\n".join(lines) + "\n"


def _count(value: float) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f}"


def _bytes(value: float) -> str:
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            return f"{value:.3g} {unit}"
        value /= 1000
    raise AssertionError(value)


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{max(1, round(seconds))} seconds"
