# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Measure how long a report takes and how much memory, beside the authors' way of decoding, in one run.

Prints a markdown table, and writes the same as JSON with `--output`. Nothing is downloaded.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

import m3fm

ROOT = Path(__file__).resolve().parents[1]
PEER = "per-token re-encoding (the authors' decoding scheme)"


def median_seconds(action: Callable[[], Any], repeats: int) -> tuple[float, float, float]:
    """Runs `action` once unmeasured, then `repeats` times; returns median, fastest and slowest."""
    action()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), min(seconds), max(seconds)


def run_command(command: list[str], threads: int) -> dict[str, float]:
    """Runs `command` in a process of its own; returns its wall time in s and its peak memory in GB."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    start = time.perf_counter()
    silent = os.open(os.devnull, os.O_WRONLY)
    # Its resources are asked for by its id: those of all children together are of the largest so far.
    actions = [(os.POSIX_SPAWN_DUP2, silent, 1)]
    process = os.posix_spawn(command[0], command, environment, file_actions=actions)
    _, status, usage = os.wait4(process, 0)
    seconds = time.perf_counter() - start
    os.close(silent)
    if os.waitstatus_to_exitcode(status) != 0:
        raise SystemExit(f"{' '.join(command)} failed with {os.waitstatus_to_exitcode(status)}")
    return {"seconds": seconds, "peak_gb": _gigabytes(usage.ru_maxrss)}


def _gigabytes(ru_maxrss: int) -> float:
    return ru_maxrss * (1 if platform.system() == "Darwin" else 1024) / 1e9


@torch.inference_mode()
def write_by_reencoding(
    model: m3fm.M3FMForReportGeneration, inputs: dict[str, torch.Tensor], language: str, length: int
) -> torch.Tensor:
    """Writes `length` tokens greedily as the authors' release does, on our weights.

    For each token their decoder encodes the image again and runs over all earlier tokens again, without a cache.
    """
    ids = model.build_prompt([language])
    forbidden = torch.tensor(model.generation_config.suppress_tokens, dtype=torch.long)
    for _ in range(length):
        embeds = model.get_shared_embeds([language], inputs["pixel_values"], inputs["image_mask"])
        logits = model(input_ids=ids, shared_embeds=embeds, use_cache=False).logits[0, -1]
        logits[forbidden] = -torch.inf
        ids = torch.cat([ids, logits.argmax().view(1, 1)], dim=1)
    return ids


def measure(folder: Path, images: list[Path], language: str, repeats: int, threads: int) -> dict[str, Any]:
    """Takes every measurement on one checkpoint; returns seconds, reports a second and GB by name."""
    torch.set_num_threads(threads)
    start = time.perf_counter()
    reporter = transformers.pipeline("m3fm-report", model=str(folder))
    results: dict[str, Any] = {"load_s": time.perf_counter() - start}
    model, processor = reporter.model, reporter.processor

    def report(batch: list[str], **options: Any) -> Any:
        return reporter(batch, language=language, **options)

    one, sixteen = [str(images[0])], [str(images[i % len(images)]) for i in range(16)]
    results["one_report_s"], *results["one_report_range_s"] = median_seconds(lambda: report(one), repeats)
    batch, *_ = median_seconds(lambda: report(sixteen, batch_size=16), max(1, repeats // 3))
    results["batch_16_reports_per_s"] = 16 / batch

    # The comparison is of the decoding alone, from the same pixels to the same tokens.
    inputs = processor(images=one, return_tensors="pt")
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    ids = model.generate(**inputs, language=language)
    length = ids.shape[1] - model.build_prompt([language]).shape[1]
    ours, *_ = median_seconds(lambda: model.generate(**inputs, language=language), repeats)
    peer_ids = write_by_reencoding(model, inputs, language, length)
    peer, *_ = median_seconds(lambda: write_by_reencoding(model, inputs, language, length), max(1, repeats // 3))
    results |= {"tokens": length, "decoding_s": ours, "reencoding_s": peer, "reencoding_ratio": peer / ours}
    results["same_tokens"] = float((ids == peer_ids).float().mean())
    results["peak_in_process_gb"] = _gigabytes(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)

    command = [sys.executable, "-m", "m3fm", "report", one[0], "--language", "both", "--model", str(folder)]
    cold = [run_command(command, threads) for _ in range(3)]
    results["cold_report_first_s"] = cold[0]["seconds"]
    results["cold_report_s"] = min(each["seconds"] for each in cold)
    results["cold_report_peak_gb"] = max(each["peak_gb"] for each in cold)
    with tempfile.TemporaryDirectory() as copies:
        for number, path in enumerate(sixteen):
            shutil.copy(path, Path(copies) / f"{number:02}{Path(path).suffix}")
        batched = run_command([*command[:4], copies, *command[5:], "--batch-size", "16"], threads)
    results["cold_16_reports_peak_gb"] = batched["peak_gb"]
    return results


def describe_machine(folder: Path, language: str, threads: int) -> dict[str, Any]:
    """Says what the numbers were measured on."""
    weights = folder / "model.safetensors"
    return {
        "checkpoint": folder.name,
        "weights_mb": round(weights.stat().st_size / 1e6, 1),
        "language": language,
        "threads": threads,
        "cpus": os.cpu_count(),
        "load_average_1_min": round(os.getloadavg()[0], 2),
        "machine": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "m3fm": m3fm.__version__,
    }


def as_markdown(machine: dict[str, Any], results: dict[str, Any]) -> str:
    """Renders the measurements as a table, the machine below it."""
    fastest, slowest = results["one_report_range_s"]
    rows = [
        ("load model and processor", f"{results['load_s']:.2f} s"),
        ("one report, file to text (median)", f"{results['one_report_s']:.2f} s ({fastest:.2f} to {slowest:.2f})"),
        ("batch of 16, files to texts", f"{results['batch_16_reports_per_s']:.2f} reports/s"),
        (
            "cold `m3fm report --language both`, first of 3 / fastest",
            f"{results['cold_report_first_s']:.2f} s / {results['cold_report_s']:.2f} s",
        ),
        ("its peak memory", f"{results['cold_report_peak_gb']:.2f} GB"),
        ("peak memory of `m3fm report` on 16 files at once", f"{results['cold_16_reports_peak_gb']:.2f} GB"),
        (f"decoding {results['tokens']} tokens: image once, cached", f"{results['decoding_s']:.2f} s"),
        (f"decoding {results['tokens']} tokens: {PEER}", f"{results['reencoding_s']:.2f} s"),
        ("ratio of the two", f"{results['reencoding_ratio']:.1f} x"),
        ("tokens that are the same in both", f"{results['same_tokens']:.0%}"),
    ]
    lines = ["| measured | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]
    return "\n".join([*lines, "", ", ".join(f"{name} {value}" for name, value in machine.items())])


def main() -> None:
    """Reads the command line, measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=m3fm.DEFAULT_CHECKPOINT, help="checkpoint folder")
    parser.add_argument("--images", type=Path, nargs="+", help="default: examples/*.jpg")
    parser.add_argument("--language", default="en")
    parser.add_argument("--repeats", type=int, default=9, help="measured runs of one report")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    if not (options.model / "model.safetensors").is_file():
        parser.error(f"{options.model} holds no model.safetensors")
    images = options.images or sorted((ROOT / "examples").glob("*.jpg"))
    machine = describe_machine(options.model, options.language, options.threads)
    results = measure(options.model, images, options.language, options.repeats, options.threads)
    measured = {"machine": machine, "results": results, "table": as_markdown(machine, results)}
    print(measured["table"])
    if options.output:
        options.output.write_text(json.dumps(measured, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
