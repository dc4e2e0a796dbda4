# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Hold what `m3fm train --dry-run` says of memory and time against steps that are really taken.

Each case is a recipe with settings of its own. A process of its own plans it; another takes steps on the longest texts
with random weights and AdamW: its largest resident set, less that before the model was made (on a GPU what torch
allocated), is held against the planned memory, and the time of a step against the planned one.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from m3fm.evaluation.runs import NOTICE, library_versions, write_json
from m3fm.evaluation.tables import markdown_table
from m3fm.training.outlook import Outlook, look_ahead
from m3fm.training.plan import UTILISATION, plan_training
from m3fm.training.recipe import find_recipe, read_recipe

_MICRO_BATCH = "--per_device_train_batch_size"
CASES = {
    "align, image tower frozen": ("align-small", [_MICRO_BATCH, "64", "--gradient_accumulation_steps", "1"]),
    "align, image tower trained": (
        "align-small",
        [_MICRO_BATCH, "8", "--gradient_accumulation_steps", "1", "--vision_training", "full"],
    ),
    "align, image tower by LoRA": (
        "align-small",
        [_MICRO_BATCH, "8", "--gradient_accumulation_steps", "1", "--vision_training", "lora"],
    ),
    "write": ("write-small", [_MICRO_BATCH, "64", "--base", "m3fm/checkpoints/m3fm-small"]),
}


def look(options: argparse.Namespace, case: str) -> tuple[Outlook, Any]:
    """Returns the outlook of a case, and its training arguments."""
    name, words = CASES[case]
    words = [*words, "--data_root", str(options.data), "--bf16", str(options.bf16).lower()]
    kind, values = read_recipe(find_recipe(name), words)
    parsed = kind.parse(values)
    return look_ahead(kind, parsed, {}), parsed[1]


def plan(options: argparse.Namespace, case: str) -> dict[str, Any]:
    """Returns the planned memory of a micro-batch by item, and the planned seconds of a step of the longest texts."""
    found, arguments = look(options, case)
    found.steps.lengths[:] = found.steps.lengths.max()
    planned = plan_training(case, found, arguments)
    seconds = planned.flops["training"] / planned.steps["steps"] / (planned.matmul_flops * UTILISATION)
    return {
        "memory": planned.memory,
        "seconds": seconds,
        "flops": planned.flops["training"] / planned.steps["steps"],
        "matmul_flops": planned.matmul_flops,
    }


def measure(options: argparse.Namespace, case: str) -> dict[str, Any]:
    """Takes steps of a case, and returns their memory and time."""
    found, arguments = look(options, case)
    device = torch.device(options.device)
    held = _resident("VmRSS") if device.type == "cpu" else torch.cuda.memory_allocated()
    model = found.steps.build().to_empty(device=device)
    with torch.no_grad():
        for weight in (*model.parameters(), *model.buffers()):
            weight.normal_(std=0.02) if weight.is_floating_point() else weight.zero_()
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-5, fused=True)
    batch = {name: value.to(device) for name, value in found.steps.inputs(int(found.steps.lengths.max())).items()}
    seconds = []
    for _ in range(options.steps):
        start = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=arguments.bf16):
            loss = found.steps.loss(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    peak = _resident("VmHWM") if device.type == "cpu" else torch.cuda.max_memory_allocated()
    return {"peak_bytes": peak - held, "seconds": statistics.median(seconds[1:])}


def _resident(field: str) -> int:
    """Returns the peak (VmHWM) or present (VmRSS) resident memory of this process (Linux)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def table(facts: dict[str, Any]) -> str:
    """Returns planned and measured memory and time as a Markdown table."""
    rows = [("case", "planned", "of it activations", "measured", "planned / measured", "time: planned / measured")]
    for case, each in facts["cases"].items():
        planned = sum(each["planned"]["memory"].values())
        measured = each["measured"]["peak_bytes"]
        rows.append(
            (
                case,
                f"{planned / 1e6:,.0f} MB",
                f"{each['planned']['memory']['activations of a micro-batch'] / 1e6:,.0f} MB",
                f"{measured / 1e6:,.0f} MB",
                f"{planned / measured:.2f}",
                f"{each['planned']['seconds'] / each['measured']['seconds']:.2f}",
            )
        )
    return markdown_table(rows)


def main() -> None:
    """Plan, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="the folder of the sets")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--steps", type=int, default=4, help="of each case; the first is not timed")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("model_cards/results/training_plan.json"))
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(options.threads)
    if options.case:
        run: Callable[..., dict[str, Any]] = {"plan": plan, "measure": measure}[options.case[0]]
        print(json.dumps(run(options, options.case[1])))
        return
    # Each block of memory goes back to the system when it is freed, so that the peak is that of what is in use.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    cases = {}
    for case in CASES:
        told = [
            subprocess.run(
                [sys.executable, *sys.argv, "--case", what, case],
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
                check=True,
            ).stdout.splitlines()[-1]
            for what in ("plan", "measure")
        ]
        cases[case] = dict(zip(("planned", "measured"), map(json.loads, told), strict=True))
        print(case, cases[case], flush=True)
    facts = {
        **{"notice": NOTICE, "what": "planned against measured memory and time of a training step"},
        "settings": {name: getattr(options, name) for name in ("bf16", "steps", "device", "threads")},
        "machine": {"cpus": os.cpu_count(), "libraries": library_versions()},
        "utilisation": UTILISATION,
        "cases": cases,
    }
    print(table(facts))
    write_json(options.output, facts)


if __name__ == "__main__":
    main()
