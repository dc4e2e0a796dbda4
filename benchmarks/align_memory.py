# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Measure the peak memory of a step of stage 1: a large batch with cached gradients against a small one without.

An image tower and a text tower are trained in full, in bfloat16 autocast, on random images and texts. A step is one of
`AlignTrainer`, its optimizer included; each batch size is measured in a process of its own. What is counted is the
largest resident set of that process (on a GPU what torch allocated), and what it was before the first step.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from align_steps import VISION_TOWERS, MadeUpStudies, StepTimes, build_model, make_trainer

from m3fm.evaluation.runs import NOTICE, library_versions, write_json
from m3fm.hub.training_tables import align_memory


def resident_bytes(field: str) -> int:
    """Returns the peak (VmHWM) or present (VmRSS) resident memory of this process (Linux)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def measure(options: argparse.Namespace, micro_batch: int, micro_batches: int) -> dict[str, Any]:
    """Takes a step, and returns its memory and time."""
    model = build_model(VISION_TOWERS[options.vision], options.size, options.text_width, options.text_layers)
    batch = micro_batch * micro_batches
    studies = MadeUpStudies(batch * options.steps, options.size, options.tokens)
    on_gpu = options.device == "cuda"
    before = torch.cuda.memory_allocated() if on_gpu else resident_bytes("VmRSS")
    times = StepTimes()
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        trainer = make_trainer(
            model, studies, Path(folder), micro_batch, micro_batches, options.steps, [times], options.device
        )
        trained = trainer.train()
    return {
        "batch": batch,
        "micro_batch": micro_batch,
        "micro_batches": micro_batches,
        "before_bytes": before,
        "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else resident_bytes("VmHWM"),
        "seconds": times.seconds[0] if times.seconds else trained.metrics["train_runtime"],
        "parameters": sum(each.numel() for each in model.parameters()),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vision", choices=sorted(VISION_TOWERS), default="vit-small")
    parser.add_argument("--size", type=int, default=112, help="pixels of a side")
    parser.add_argument("--text-width", type=int, default=384)
    parser.add_argument("--text-layers", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=64, help="of each text")
    parser.add_argument("--small", type=int, default=64, help="batch without caching")
    parser.add_argument("--large", type=int, default=2048, help="batch with caching")
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[32], help="studies at once, with caching")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--scratch", type=Path, help="a folder for temporary files")
    parser.add_argument("--output", type=Path, default=Path("model_cards/results/align_memory.json"))
    parser.add_argument("--case", type=int, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(options.threads)
    if options.case:
        print(json.dumps(measure(options, *options.case)))
        return
    results = []
    for micro_batch, count in [(options.small, 1), *((each, options.large // each) for each in options.micro_batches)]:
        # Each block of memory goes back to the system when it is freed, so that the peak is that of what is in use.
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
        command = [sys.executable, *sys.argv, "--case", str(micro_batch), str(count)]
        run = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=True)
        results.append(json.loads(run.stdout.splitlines()[-1]))
        print(results[-1], flush=True)
    names = ("vision", "size", "text_width", "text_layers", "tokens", "steps", "threads", "device")
    facts = {
        **{"notice": NOTICE, "what": "peak memory of a step of stage 1, both towers trained, bfloat16 autocast"},
        "settings": {name: getattr(options, name) for name in names},
        "machine": {"cpus": os.cpu_count(), "libraries": library_versions()},
        "results": results,
    }
    print(align_memory(facts))
    write_json(options.output, facts)


if __name__ == "__main__":
    main()
