# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Hold the sharded, cached loss of stage 1 against the whole batch in one process, and its costs against formulas.

Gradients: 2 and 4 ranks (gloo, DDP), one or several micro-batches a step, by way of `AlignTrainer`, and with uneven
ranks by way of its `GradientCache`; studies with images, reports in one language or two, labels, equal texts. The
reference embeds all studies at once and goes back through the full matrices of logits.

Costs: peak memory of a rank over what it held before, and bytes sent on the loopback device, at several batch sizes,
of our loss and of open_clip's (`ClipLoss` with whole and local logits, `SigLipLoss` as a ring). Memory is fitted as
a x logits + b x embeddings on 2 ranks, and the fit is checked on 4. Then what the formulas of
`m3fm.training.scaling` give for 1, 8, 64 and 512 GPUs.

Linux. In a network namespace of its own, where `unshare` may make one, the loopback device carries nothing else.
"""

import argparse
import ctypes
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from align_speed import import_open_clip
from align_steps import TINY, MadeUpStudies, build_model, launch, make_trainer, pair_facts, tower_flops
from torch import distributed, nn
from torch.nn import functional
from transformers import TrainerCallback

from m3fm import M3FMConfig, M3FMModel
from m3fm.evaluation.runs import NOTICE, library_versions, write_json
from m3fm.hub import training_tables
from m3fm.training.backbones import backbone_config
from m3fm.training.gradient_cache import Embeddings, GradientCache
from m3fm.training.losses import Items, soft_targets
from m3fm.training.objective import AlignmentObjective, BatchFacts
from m3fm.training.ranks import world_size
from m3fm.training.scaling import WAYS, ContrastiveStep, Machine, reduce_bytes, state_bytes, step_seconds

WIDTH, SIZE, TOKENS, FINDINGS = 16, 28, 12, 5
SCALES = (1, 8, 64, 512)
# As the recipes have them: towers, pieces of the vocabulary, pixels, D.
MODELS = {
    "base": ("microsoft/rad-dino", "FacebookAI/xlm-roberta-base", 32_000, 336, 512),
    "large": ("facebook/dinov2-large", "FacebookAI/xlm-roberta-large", 64_000, 336, 768),
}
TEXT_TOKENS = 128
#: Studies of each rank and micro-batch.
EVEN = {1: [[4] * 8], 2: [[16]] * 2, 4: [[4, 4]] * 4}
UNEVEN = {2: [[7, 5, 6], [11]], 4: [[5, 4], [9], [2], [3, 6]]}


# --------------------------------------------------------------------------------------------------------------------
# Gradients


class MixedStudies(MadeUpStudies):
    """Studies of all kinds; what one has hangs on its number alone."""

    def collate(self, numbers: list[int]) -> dict[str, Any]:
        """Returns a batch as `AlignCollator` does."""
        draws = [np.random.default_rng([7, number]) for number in numbers]
        chance = np.stack([draw.random(6) for draw in draws])
        reported = chance[:, 0] < 0.6
        said = [
            (row, code, number * 10 + code if chance[row, 1] > 0.25 else code)
            for row, number in enumerate(numbers)
            for code in range(2)
            if not (reported[row] and code == 1 and chance[row, 2] < 0.4)
        ]
        study, language, text = (torch.tensor(column) for column in zip(*said, strict=True))
        facts = BatchFacts(
            modality=torch.from_numpy(chance[:, 3] < 0.3).long(),
            has_report=torch.from_numpy(reported),
            values=torch.tensor(np.stack([draw.random(FINDINGS) < 0.4 for draw in draws])).float(),
            known=torch.tensor(np.stack([draw.random(FINDINGS) < 0.7 for draw in draws])),
            image_study=torch.tensor([row for row, number in enumerate(numbers) if number % 4 or len(numbers) < 3]),
            text_study=study,
            text_number=text,
            text_language=language,
        )
        seen = torch.tensor(numbers)[facts.image_study] % len(self.pixels)
        ids = self.ids[text % len(self.ids)]
        return {
            "facts": facts,
            "study_ids": [f"made_up/{number}" for number in numbers],
            "pixel_values": self.pixels[seen],
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
        }


def embed(model: nn.Module, batch: dict[str, Any]) -> Embeddings:
    """Runs the towers."""
    out = model(**{name: batch[name] for name in ("pixel_values", "input_ids", "attention_mask")})
    return Embeddings(out.image_embeds, out.text_embeds, out.logit_scale, out.logit_bias)


def whole_loss(facts: BatchFacts, embeds: Embeddings, loss: str) -> torch.Tensor:
    """Computes the loss of `AlignmentObjective(loss, 1.0, 0.03, 0.5)` from full matrices of logits."""
    text_items = Items(facts.text_study, facts.text_number, *_of(facts, facts.text_study))
    image_items = Items(facts.image_study, torch.full_like(facts.image_study, -1), *_of(facts, facts.image_study))
    sides = [(facts.text_language == code).nonzero()[:, 0] for code in range(2)]
    bias = 0.0 if embeds.logit_bias is None else embeds.logit_bias

    def contrast(left: Items, left_embeds: torch.Tensor, rows: torch.Tensor, scale: Any, added: Any, kind: str) -> Any:
        right = text_items.select(rows)
        weights, part = soft_targets(left, right, torch.stack([right.study, right.text], dim=1))
        logits = scale * left_embeds @ embeds.text_embeds[rows].t() + added
        if kind == "sigmoid":
            each = functional.binary_cross_entropy_with_logits(logits, weights, reduction="none")
            return (each * part).sum() / part.any(dim=1).sum()
        total = 0.0
        for matrix, weight, counts in ((logits, weights, part), (logits.t(), weights.t(), part.t())):
            has = weight.sum(dim=1) > 0
            chance = matrix.masked_fill(~counts, -torch.inf)[has].softmax(dim=1).clamp(min=1e-30).log()
            total = total - (chance * weight[has] / weight[has].sum(dim=1, keepdim=True)).sum(dim=1).mean() / 2
        return total

    total = sum(contrast(image_items, embeds.image_embeds, rows, embeds.logit_scale, bias, loss) for rows in sides)
    pivot = sides[0]
    total = total + contrast(text_items.select(pivot), embeds.text_embeds[pivot], sides[1], 1 / 0.03, 0.0, "infonce")
    english = {int(facts.text_study[row]): row for row in pivot}
    pairs = [(english[int(facts.text_study[row])], row) for row in sides[1] if int(facts.text_study[row]) in english]
    apart = [(embeds.text_embeds[row] - embeds.text_embeds[to].detach()).square().sum() for to, row in pairs]
    return total + 0.5 * torch.stack(apart).mean()


def _of(facts: BatchFacts, study: torch.Tensor) -> list[torch.Tensor]:
    return [getattr(facts, name)[study] for name in ("modality", "values", "known", "has_report")]


def _tiny(loss: str) -> nn.Module:
    return build_model(TINY, SIZE, 32, 2, WIDTH, loss)


def trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Returns the parameters that are trained, by name."""
    return [(name, each) for name, each in model.named_parameters() if each.requires_grad]


class GradientsSeen(TrainerCallback):
    """Keeps the gradients of a step."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        """Is called when the gradients of all micro-batches and ranks are in."""
        self.gradients = {name: each.grad.clone() for name, each in trained(model)}


def by_trainer(loss: str, split: list[list[int]], studies: MixedStudies) -> tuple[list[int], dict, float]:
    """Takes a step of `AlignTrainer`; returns the studies of all ranks, the gradients and the loss."""
    seen = GradientsSeen()
    size, count = split[0][0], len(split[0])
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(
            _tiny(loss), studies, Path(folder), size, count, 1, [seen],
            precision="float32", loss=loss, translation_mse_weight=0.5, loss_rows=5,
        )  # fmt: skip
        numbers = trainer.batches.all_batches(0)[:count].ravel().tolist()
        trainer.args.max_grad_norm = 0.0
        value = trainer.train().training_loss
    return numbers, seen.gradients, value


def by_cache(loss: str, split: list[list[int]], studies: MixedStudies) -> tuple[list[int], dict, float]:
    """Goes through one step of unequal micro-batches and ranks; returns as `by_trainer`."""
    numbers = list(range(sum(map(sum, split))))
    starts = np.cumsum([0, *(size for sizes in split for size in sizes)])
    rank = distributed.get_rank()
    first = sum(len(sizes) for sizes in split[:rank])
    batches = [
        studies.collate(numbers[starts[place] : starts[place + 1]]) for place in range(first, first + len(split[rank]))
    ]
    model = nn.parallel.DistributedDataParallel(_tiny(loss))
    cache = GradientCache(embed, AlignmentObjective(loss, 1.0, 0.03, 0.5, rows=5))
    cache.begin(model, batches, [batch["facts"] for batch in batches])
    for place in range(len(batches)):
        with nullcontext() if place == len(batches) - 1 else model.no_sync():
            surrogate, gradients = cache.next_surrogate(model)
            surrogate.backward()
    return numbers, {name: each.grad for name, each in trained(model.module)}, float(gradients.loss)


def gradient_case(loss: str, split: list[list[int]], way: str) -> dict[str, Any]:
    """Compares the gradients of one step with those of the whole batch."""
    studies = MixedStudies(sum(map(sum, split)), SIZE, TOKENS, kept=128)
    numbers, gradients, value = (by_trainer if way == "AlignTrainer" else by_cache)(loss, split, studies)
    model = _tiny(loss)
    batch = studies.collate(numbers)
    expected = whole_loss(batch["facts"], embed(model, batch), loss)
    expected.backward()
    apart = {name: gradients[name] - each.grad for name, each in trained(model)}
    norm = sum(float(each.grad.double().square().sum()) for _, each in trained(model)) ** 0.5
    return {
        "loss": loss,
        "ranks": world_size(),
        "way": way,
        "studies": split,
        "largest_gradient": max(float(each.grad.abs().max()) for _, each in trained(model)),
        "largest_difference": max(float(each.abs().max()) for each in apart.values()),
        "relative_difference": sum(float(each.double().square().sum()) for each in apart.values()) ** 0.5 / norm,
        "loss_difference": abs(value - expected.item()),
    }


def gradient_cases(ranks: int) -> list[dict[str, Any]]:
    """Returns all cases of some ranks."""
    cases = []
    for loss in ("infonce", "sigmoid"):
        cases.append(gradient_case(loss, EVEN[ranks], "AlignTrainer"))
        if ranks > 1:
            cases.append(gradient_case(loss, UNEVEN[ranks], "GradientCache"))
    return cases


# --------------------------------------------------------------------------------------------------------------------
# Costs


def resident_bytes(field: str) -> int:
    """Returns the peak (VmHWM) or present (VmRSS) resident memory of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def loopback_bytes() -> int:
    """Returns what the loopback device has sent."""
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split()[9])


def loss_of(way: str, rows: int) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], Any]:
    """Returns a function that computes the loss of pairs and its gradient."""
    from open_clip.loss import ClipLoss, SigLipLoss

    place = {"rank": distributed.get_rank(), "world_size": world_size()}
    if way.startswith("ours"):
        objective = AlignmentObjective("sigmoid" if "sigmoid" in way else "infonce", rows=rows)

        def ours(images: torch.Tensor, texts: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> Any:
            facts = pair_facts(len(images), first=place["rank"] * len(images))
            return objective(facts, images, texts, scale, bias)

        return ours
    if way == "ring":
        ring = SigLipLoss(**place)
        return lambda images, texts, scale, bias: ring(images, texts, scale, bias).backward()
    whole = ClipLoss(local_loss=way == "local", gather_with_grad=True, **place)
    return lambda images, texts, scale, bias: whole(images, texts, scale).backward()


def cost_cases(batches: list[int], width: int, rows: list[int], repeats: int) -> list[dict[str, Any]]:
    """Measures all ways at all batch sizes; peaks are of this rank, bytes sent of all ranks on average."""
    import_open_clip()
    results = []
    ours = [(way, each) for way in ("ours", "ours, sigmoid") for each in rows]
    for way, each in [("whole", 0), ("local", 0), ("ring", 0), *ours]:
        run = loss_of(way, each)
        for studies in batches:
            peak, sent = cost_of(run, studies // world_size(), width, repeats)
            facts = {"way": way, "ranks": world_size(), "studies": studies, "width": width, "rows": each}
            results.append(facts | {"peak_bytes": peak, "sent_bytes": sent})
    return results


def cost_of(run: Callable[..., Any], own: int, width: int, repeats: int) -> tuple[int, float]:
    """Returns the peak memory and the bytes sent of a loss of `own` pairs on each rank."""
    draw = torch.Generator().manual_seed(distributed.get_rank())
    pairs = [functional.normalize(torch.randn(own, width, generator=draw), dim=-1) for _ in range(2)]
    peaks, sent = [], []
    for _ in range(repeats + 1):  # the first warms up
        leaves = [each.clone().requires_grad_() for each in (*pairs, torch.tensor(10.0), torch.tensor(-10.0))]
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak to what is held
        distributed.barrier()
        before, held = loopback_bytes(), resident_bytes("VmRSS")
        distributed.barrier()
        kept = run(*leaves)
        distributed.barrier()
        peaks.append(resident_bytes("VmHWM") - held)
        sent.append((loopback_bytes() - before) / world_size())
        distributed.barrier()
        del kept
    return int(np.median(peaks[1:])), min(sent[1:])


def with_formulas(cases: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, list[float]]]:
    """Adds what the formulas give; returns by what memory was fitted: bytes a logit and copies of embeddings."""
    steps = [
        ContrastiveStep(case["studies"], case["ranks"], case["width"], 1, case["rows"], findings=_num_findings())
        for case in cases
    ]
    fits = {}
    for way in dict.fromkeys(case["way"] for case in cases):
        kind = way.split(",")[0]
        fitted = [(case, step) for case, step in zip(cases, steps, strict=True) if case["way"] == way]
        fitted = [pair for pair in fitted if pair[0]["ranks"] == 2] or fitted
        terms = np.array([[step.logits(kind), step.embedding_bytes(kind)] for _, step in fitted])
        peaks = np.array([case["peak_bytes"] for case, _ in fitted])
        # Relative errors count: else the largest batch alone would.
        fits[way] = np.linalg.lstsq(terms / peaks[:, None], np.ones(len(peaks)), rcond=None)[0].tolist()
    for case, step in zip(cases, steps, strict=True):
        kind = case["way"].split(",")[0]
        a_logit, copies = fits[case["way"]]
        case["peak_by_formula"] = a_logit * step.logits(kind) + copies * step.embedding_bytes(kind)
        case["sent_by_formula"] = step.sent_bytes(kind)
    return cases, fits


def _num_findings() -> int:
    return pair_facts(1).values.shape[1]


def costs_at_scale(fits: dict[str, list[float]], per_rank: int, whole: int) -> list[dict[str, Any]]:
    """Returns what formulas give for more ranks, in two languages: `per_rank` studies each, then `whole` in all."""
    results = []
    sizes = [(ranks, per_rank * ranks) for ranks in SCALES] + [(ranks, whole) for ranks in SCALES]
    for ranks, studies in dict.fromkeys(sizes):
        step = ContrastiveStep(studies, ranks, languages=2, findings=_num_findings())
        for way in WAYS:
            a_logit, copies = fits[way]
            memory = a_logit * step.logits(way) + copies * step.embedding_bytes(way)
            results.append({**asdict(step), "way": way, "memory_bytes": memory, "sent_bytes": step.sent_bytes(way)})
    return results


def steps_at_scale(per_rank: int) -> list[dict[str, Any]]:
    """Returns state, traffic and an estimated time of steps of the recipes `base` and `large`, without caching."""
    results = []
    for name, (vision, text, vocabulary, size, width) in MODELS.items():
        towers = {"vision_config": backbone_config(vision), "text_encoder_config": backbone_config(text)}
        towers["vision_config"].image_size, towers["text_encoder_config"].vocab_size = size, vocabulary
        with torch.device("meta"):
            model = M3FMModel(M3FMConfig(**towers, projection_dim=width))
        parameters = sum(each.numel() for each in model.parameters())
        flops = per_rank * tower_flops(model, size, TEXT_TOKENS, languages=2)
        for ranks in SCALES:
            step = ContrastiveStep(per_rank * ranks, ranks, width, 2, findings=_num_findings())
            results.append(
                {
                    **{"recipe": name, "ranks": ranks, "studies": step.studies, "parameters": parameters},
                    **{"state_bytes": state_bytes(parameters), "parted_bytes": state_bytes(parameters, shards=ranks)},
                    **{"reduce_bytes": reduce_bytes(parameters, ranks), "sent_bytes": step.sent_bytes("ours")},
                    "seconds": step_seconds(step, flops, parameters, Machine()),
                }
            )
    return results


# --------------------------------------------------------------------------------------------------------------------


def alone_on_loopback(command: list[str]) -> list[str]:
    """Returns the command, in a network namespace of its own where that may be made."""
    apart = ["unshare", "-rn", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
    able = shutil.which("unshare") and subprocess.run([*apart, "true"], capture_output=True).returncode == 0
    return [*apart, *command] if able else command


def in_process(options: argparse.Namespace, ranks: int) -> dict[str, Any]:
    """Runs all cases of some ranks in a process of its own."""
    # Each block of memory goes back to the system when it is freed, so that the peak is that of what is in use.
    environment = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": "65536", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"
    }  # fmt: skip
    command = [sys.executable, *sys.argv, "--ranks", str(ranks)]
    run = subprocess.run(alone_on_loopback(command), stdout=subprocess.PIPE, text=True, env=environment, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--width", type=int, default=256, help="D, of what is measured")
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 256], help="R, of what is measured")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--per-rank", type=int, default=64, help="studies of a rank, of what is not measured")
    parser.add_argument("--whole", type=int, default=32_768, help="studies of a step, of what is not measured")
    parser.add_argument("--output", type=Path, default=Path("model_cards/results/contrastive_scaling.json"))
    parser.add_argument("--ranks", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    if options.ranks:
        found = {"gradients": launch(gradient_cases, options.ranks, options.ranks)}
        if options.ranks > 1:
            measured = (options.batches, options.width, options.rows, options.repeats)
            found["costs"] = launch(cost_cases, options.ranks, *measured)
        print(json.dumps(found))
        return
    parts = []
    for ranks in EVEN:
        parts.append(in_process(options, ranks))
        print(ranks, "ranks:", max(case["relative_difference"] for case in parts[-1]["gradients"]), flush=True)
    costs, fits = with_formulas([case for part in parts for case in part.get("costs", [])])
    facts = {
        **{"notice": NOTICE, "what": "gradients, memory and traffic of the contrastive loss over ranks"},
        "gradients": [case for part in parts for case in part["gradients"]],
        "costs": costs,
        "fits": fits,
        "at_scale": costs_at_scale(fits, options.per_rank, options.whole),
        "steps": steps_at_scale(options.per_rank),
        "machine": {"cpus": os.cpu_count(), "libraries": library_versions()},
    }
    for table in ("gradients", "memory", "traffic", "at_scale", "steps"):
        print(training_tables.TABLES[f"contrastive_scaling#{table}"](facts), end="\n\n")
    write_json(options.output, facts)


if __name__ == "__main__":
    main()
