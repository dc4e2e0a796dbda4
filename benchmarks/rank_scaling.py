# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Measure how much faster stage 1 is with several ranks than with one, each of one thread (gloo).

Every step is one of `AlignTrainer` on made-up studies: embeddings gathered, their gradients scattered, those of all
weights added up. Weak scaling keeps the studies of a rank, strong scaling those of a step. "Apart" is the same
number of processes without communication, each a run of its own: what cores that share caches and memory allow.
Launches of all numbers of ranks take turns; a rate is the median over all steps but the first of each launch, on the
first rank. Prints a table and draws the curve.
"""

import argparse
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from align_steps import VISION_TOWERS, MadeUpStudies, StepTimes, build_model, launch, make_trainer

from m3fm.evaluation.runs import NOTICE, library_versions, write_json
from m3fm.hub.training_tables import rank_scaling
from m3fm.training.ranks import world_size


def step_seconds(settings: dict[str, Any], micro_batches: dict[str, int]) -> dict[str, list[float]]:
    """Takes steps on this rank for each kind of scaling, and returns how long each but the first took.

    Args:
        settings: Of model and steps.
        micro_batches: Kind to the studies of this rank at once.
    """
    size, count, steps = (settings[name] for name in ("size", "micro_batches", "steps"))
    found = {}
    for scaling, micro_batch in micro_batches.items():
        model = build_model(VISION_TOWERS[settings["vision"]], size, settings["text_width"], settings["text_layers"])
        studies = MadeUpStudies(micro_batch * count * steps * world_size(), size, settings["tokens"])
        times = StepTimes()
        with tempfile.TemporaryDirectory() as folder:
            make_trainer(model, studies, Path(folder), micro_batch, count, steps, [times]).train()
        found[scaling] = times.seconds
    return found


def measure(settings: dict[str, Any], ranks: list[int], repeats: int) -> list[dict[str, Any]]:
    """Measures weak and strong scaling."""
    launches = [(number, way) for number in ranks for way in (("gloo", "apart") if number > 1 else ("gloo",))]
    seconds: dict[tuple[str, int, str], list[float]] = {}
    for turn in range(repeats):
        for number, way in launches if turn % 2 == 0 else launches[::-1]:
            micro_batches = {"weak": settings["micro_batch"], "strong": settings["micro_batch"] // number}
            found = launch(step_seconds, number, settings, micro_batches, communicate=way)
            print(number, way, found, flush=True)
            for scaling, each in found.items():
                seconds.setdefault((scaling, number, way), []).extend(each)
    results = []
    for (scaling, number, way), together in seconds.items():
        if way == "apart":
            continue
        batch = settings["micro_batch"] * settings["micro_batches"] * (number if scaling == "weak" else 1)
        rate = batch / statistics.median(together)
        one = settings["micro_batch"] * settings["micro_batches"] / statistics.median(seconds[scaling, 1, "gloo"])
        apart = batch / statistics.median(seconds.get((scaling, number, "apart"), together))
        results.append(
            {
                **{"scaling": scaling, "ranks": number, "batch": batch, "studies_per_s": rate},
                **{"speedup": rate / one, "apart_speedup": apart / one, "of_apart": rate / apart},
                "seconds": {"together": together, "apart": seconds.get((scaling, number, "apart"), [])},
            }
        )
    return results


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Draws the speed-up over the ranks."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.subplots()
    for scaling, mark in (("weak", "o"), ("strong", "s")):
        cases = [case for case in results if case["scaling"] == scaling]
        ranks = [case["ranks"] for case in cases]
        axes.plot(ranks, [case["speedup"] for case in cases], marker=mark, label=scaling)
        apart = [case["apart_speedup"] for case in cases]
        axes.plot(ranks, apart, marker=mark, linestyle=":", color="grey", label=f"{scaling}, apart")
    ranks = sorted({case["ranks"] for case in results})
    axes.plot(ranks, ranks, color="black", linewidth=0.8, label="ideal")
    axes.set(xlabel="ranks of one thread", ylabel="studies/s over those of one rank", xticks=ranks)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--vision", choices=sorted(VISION_TOWERS), default="vit-small")
    parser.add_argument("--size", type=int, default=112, help="pixels of a side")
    parser.add_argument("--text-width", type=int, default=384)
    parser.add_argument("--text-layers", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=64, help="of each text")
    parser.add_argument("--micro-batch", type=int, default=16, help="studies of a rank at once")
    parser.add_argument("--micro-batches", type=int, default=1, help="of a step; more than one caches gradients")
    parser.add_argument("--steps", type=int, default=5, help="of a launch; the first is not measured")
    parser.add_argument("--repeats", type=int, default=2, help="launches of each kind")
    parser.add_argument("--picture", type=Path, default=Path("docs/images/rank_scaling.png"))
    parser.add_argument("--output", type=Path, default=Path("model_cards/results/rank_scaling.json"))
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    os.environ["OMP_NUM_THREADS"] = "1"
    load = os.getloadavg()[0]
    names = ("vision", "size", "text_width", "text_layers", "tokens", "micro_batch", "micro_batches", "steps")
    settings = {name: getattr(options, name) for name in names}
    facts = {
        **{"notice": NOTICE, "what": "stage 1 on ranks of one thread; medians, launches in turn"},
        "settings": settings | {"repeats": options.repeats},
        "machine": {"cpus": os.cpu_count(), "load_at_start": round(load, 2), "libraries": library_versions()},
        "results": measure(settings, sorted({1, *options.ranks}), options.repeats),
    }
    print(rank_scaling(facts))
    draw(facts["results"], options.picture)
    write_json(options.output, facts)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
