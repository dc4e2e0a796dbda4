# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Measure stage 1 in studies a second, beside open_clip's training step on the same towers.

Both sides train the same model (an image tower, a text tower, random weights) on the same images and texts, in
bfloat16 autocast, with AdamW and gradients clipped at 1. Theirs is `open_clip_train.train.train_one_epoch` with
`ClipLoss`, as released; ours is `AlignTrainer` with InfoNCE. With several micro-batches a step both keep the
embeddings of all and go through the towers a second time. They take turns; a row is the median over all steps but the
first of each turn. Where other processes share the cores, the ratio of CPU time says more (with one thread). Also the
share of our step that is spent in matrix multiplication, and on a GPU model FLOP/s over what the card's own matrix
multiplication reaches (`--device cuda`).

Needs open_clip_torch; torchvision and timm, which its training step does not use, may be missing.
"""

import argparse
import importlib.machinery
import importlib.util
import os
import statistics
import sys
import tempfile
import time
import types
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch
import transformers
from align_steps import VISION_TOWERS, MadeUpStudies, StepTimes, build_model, make_trainer, tower_flops
from torch import nn

from m3fm import M3FMModel
from m3fm.evaluation.runs import NOTICE, library_versions, write_json
from m3fm.hub.training_tables import align_speed

_MATMULS = ("mm", "bmm", "addmm", "baddbmm", "convolution", "scaled_dot_product", "mkldnn_linear", "linear_backward")


def import_open_clip() -> tuple[Any, type[nn.Module]]:
    """Returns open_clip's `train_one_epoch` and `ClipLoss`, with stand-ins for packages that are not installed."""
    if importlib.util.find_spec("torchvision") is None:
        names = ("torchvision", "torchvision.transforms", "torchvision.transforms.functional", "torchvision.ops")
        for name in (*names, "torchvision.ops.misc"):
            sys.modules[name] = MagicMock(__spec__=importlib.machinery.ModuleSpec(name, None))
        sys.modules["timm"] = None
    from open_clip.loss import ClipLoss
    from open_clip_train.train import train_one_epoch

    return train_one_epoch, ClipLoss


class AsOpenClip(nn.Module):
    """Shows our towers as open_clip's step expects a model."""

    def __init__(self, model: M3FMModel):
        super().__init__()
        self.towers = model

    @property
    def logit_scale(self) -> nn.Parameter:
        """The parameter that the step clamps."""
        return self.towers.logit_scale

    def forward(self, images: torch.Tensor, texts: torch.Tensor) -> dict[str, torch.Tensor]:
        """Embeds pairs."""
        return {
            "image_features": self.towers.get_image_features(images),
            "text_features": self.towers.get_text_features(texts, torch.ones_like(texts)),
            "logit_scale": self.towers.logit_scale.exp(),
        }


class Pairs:
    """Their loader: batches of the same studies."""

    def __init__(self, studies: MadeUpStudies, batch: int, batches: int):
        self.studies, self.batch, self.num_batches = studies, batch, batches
        self.num_samples = batch * batches
        self.dataloader = self

    def set_epoch(self, epoch: int) -> None:
        """Is told the epoch."""

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for number in range(self.num_batches):
            batch = self.studies.collate(range(number * self.batch, (number + 1) * self.batch))
            yield batch["pixel_values"], batch["input_ids"]


def their_seconds(
    model: M3FMModel, studies: MadeUpStudies, options: argparse.Namespace, count: int, steps: int
) -> StepTimes:
    """Takes steps of open_clip's, and returns how long they took."""
    train_one_epoch, clip_loss = import_open_clip()
    wrapped = AsOpenClip(model).to(options.device)
    gains = [each for each in wrapped.parameters() if each.ndim < 2]
    rest = [each for each in wrapped.parameters() if each.ndim >= 2]
    groups = [{"params": gains, "weight_decay": 0.0}, {"params": rest, "weight_decay": 0.05}]
    optimizer = torch.optim.AdamW(groups, lr=1e-4)
    times = StepTimes()
    optimizer.register_step_post_hook(lambda *_: times.on_step_end(None, None, None))
    args = types.SimpleNamespace(
        device=options.device,
        precision="amp_bf16",
        accum_freq=count,
        distill=False,
        skip_scheduler=True,
        horovod=False,
        grad_clip_norm=1.0,
        rank=0,
        local_rank=0,
        world_size=1,
        log_every_n_steps=10**9,
        batch_size=options.micro_batch,
        wandb=False,
    )
    data = {"train": Pairs(studies, options.micro_batch, count * steps)}
    train_one_epoch(wrapped, data, clip_loss(), 0, optimizer, None, None, None, args)
    return times


def our_seconds(
    model: M3FMModel, studies: MadeUpStudies, options: argparse.Namespace, count: int, steps: int
) -> StepTimes:
    """Takes steps of stage 1, and returns how long they took."""
    times = StepTimes()
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        make_trainer(model, studies, Path(folder), options.micro_batch, count, steps, [times], options.device).train()
    return times


def matmul_share(model: M3FMModel, studies: MadeUpStudies, options: argparse.Namespace, count: int) -> float:
    """Returns the share of the time of all operators of our steps that matrix multiplication takes."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if options.device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        our_seconds(model, studies, options, count, steps=2)
    spent = "self_device_time_total" if options.device == "cuda" else "self_cpu_time_total"
    averages = profile.key_averages()
    multiplied = sum(getattr(each, spent) for each in averages if any(part in each.key for part in _MATMULS))
    return multiplied / sum(getattr(each, spent) for each in averages)


def card_peak(device: str, side: int = 8192) -> float:
    """Returns the FLOP/s that a large matrix multiplication in bfloat16 reaches."""
    left, right = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = []
    for _ in range(20):
        torch.cuda.synchronize()
        start = time.perf_counter()
        left @ right
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 2 * side**3 / statistics.median(seconds[5:])


def measure(options: argparse.Namespace, count: int) -> dict[str, Any]:
    """Measures steps of `count` micro-batches."""
    size = (VISION_TOWERS[options.vision], options.size, options.text_width, options.text_layers)
    studies = MadeUpStudies(options.micro_batch * count * options.steps, options.size, options.tokens)
    seconds: dict[str, list[float]] = {"ours": [], "open_clip": []}
    cpu_seconds: dict[str, list[float]] = {"ours": [], "open_clip": []}
    model = build_model(*size)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    for turn in range(options.repeats):
        ways = [("ours", our_seconds), ("open_clip", their_seconds)]
        for name, run in ways if turn % 2 == 0 else ways[::-1]:
            model.load_state_dict(weights)
            times = run(model, studies, options, count, options.steps)
            seconds[name] += times.seconds
            cpu_seconds[name] += times.cpu_seconds
            print(count, name, [round(each, 2) for each in seconds[name]], flush=True)
    batch = options.micro_batch * count
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    facts = {
        "micro_batches": count,
        "batch": batch,
        "studies_per_s": {name: batch / each for name, each in medians.items()},
        "ratio": medians["open_clip"] / medians["ours"],
        "cpu_ratio": statistics.median(cpu_seconds["open_clip"]) / statistics.median(cpu_seconds["ours"]),
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "matmul_share": matmul_share(model, studies, options, count),
    }
    if options.device == "cuda":
        facts["flops_per_s"] = tower_flops(model, options.size, options.tokens) * batch / medians["ours"]
        facts["of_peak"] = facts["flops_per_s"] / card_peak(options.device)
    return facts


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vision", choices=sorted(VISION_TOWERS), default="vit-small")
    parser.add_argument("--size", type=int, default=224, help="pixels of a side")
    parser.add_argument("--text-width", type=int, default=384)
    parser.add_argument("--text-layers", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=64, help="of each text")
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--steps", type=int, default=4, help="of a turn; the first is not measured")
    parser.add_argument("--repeats", type=int, default=2, help="turns of each side")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--scratch", type=Path, help="a folder for temporary files")
    parser.add_argument("--output", type=Path, default=Path("model_cards/results/align_speed.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    load = os.getloadavg()[0]
    names = ("vision", "size", "text_width", "text_layers", "tokens", "micro_batch", "steps", "repeats", "threads")
    facts = {
        **{"notice": NOTICE, "what": "stage 1 beside open_clip's training step; medians, in turn, bfloat16 autocast"},
        "settings": {name: getattr(options, name) for name in names},
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
        "machine": {
            "cpus": os.cpu_count(),
            "load_at_start": round(load, 2),
            "libraries": library_versions() | {"open_clip_torch": version("open_clip_torch")},
        },
        "results": [measure(options, count) for count in options.micro_batches],
    }
    print(align_speed(facts))
    write_json(options.output, facts)


if __name__ == "__main__":
    main()
