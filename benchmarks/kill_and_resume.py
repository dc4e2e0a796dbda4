# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Kill a training at random moments, and fill up its disk: what it leaves, and whether it is the same run afterwards.

A tiny stage 1 on made-up studies (gradient caching over two micro-batches, dropout, validation, a checkpoint every
second step, one kept) is run once to its end. Then it is started again and again, and killed by SIGKILL: half of the
time at a moment drawn over its duration, half of the time while it writes a checkpoint. After each kill all folders
called checkpoint have to be whole; when a run has come to its end, its losses, gradient norms, scores and weights have
to be those of the first one, bit for bit. The disk is a tmpfs that is filled while a checkpoint is written, where this
process may mount one, else a limit on the size of files. Prints a markdown table, and writes JSON.
"""

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image
from transformers import AutoModel, Dinov2Config

import m3fm
from m3fm.evaluation.runs import NOTICE, library_versions, write_json
from m3fm.evaluation.tables import markdown_table
from m3fm.training.checkpoints import is_whole, latest_checkpoint

STUDIES = 48
TRAIN = "import sys; from m3fm_cli import main; sys.exit(main(sys.argv[1:]))"
# What two runs that do the same may differ in.
TIMES = ("per_second", "seconds", "runtime", "memory", "total_flos")
SECONDS_TO_START = 300


def make_data(folder: Path) -> None:
    """Makes a set of studies with an image, reports in two languages and a label; a fourth of them to validate on."""
    (folder / "made_up").mkdir(parents=True)
    rng, rows = np.random.default_rng(0), []
    for number in range(STUDIES):
        ill = number % 2
        pixels = rng.integers(0, 120, (32, 28), dtype=np.uint8) + np.uint8(100 * ill)
        Image.fromarray(pixels).save(folder / "made_up" / f"{number}.png")
        rows.append(
            {
                "file_name": f"{number}.png",
                "modality": "cxr",
                "split": "validation" if number % 4 == 3 else "train",
                "labels": ["pleural_effusion"] if ill else ["no_finding"],
                "report_en": f"{'There is a small effusion' if ill else 'The lungs are clear'} in view {number}.",
                "report_zh": f"视图{number}{'可见少量胸腔积液' if ill else '双肺清晰'}。",
            }
        )
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "made_up" / "metadata.jsonl").write_text(lines, encoding="utf-8")


def make_recipe(folder: Path, steps: int, seed: int) -> Path:
    """Writes the recipe of a tiny stage 1."""
    make_data(folder / "data")
    tower = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    AutoModel.from_config(Dinov2Config(**tower, image_size=28, patch_size=14)).save_pretrained(folder / "tower")
    text = {**tower, "vocab_size": 8000, "intermediate_size": 64, "max_position_embeddings": 256, "pad_token_id": 0}
    recipe = {
        "recipe": "align",
        "data_root": str(folder / "data"),
        "image_sets": {"made_up": 1},
        "vision_model": str(folder / "tower"),
        "vision_training": "full",
        "tokenizer": str(m3fm.DEFAULT_CHECKPOINT),
        "feature_cache": str(folder / "features"),
        "processor": {"size": 28},
        "model": {
            "text_encoder_config": {"model_type": "bert", **text},
            "text_config": {"model_type": "llama", **text, "bos_token_id": 2, "eos_token_id": 3},
            "projection_dim": 16,
            "projection_hidden_size": 32,
            "projection_dropout": 0.2,
        },
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": steps,
        "save_steps": 2,
        "save_total_limit": 1,
        "logging_steps": 3,
        "eval_strategy": "steps",
        "eval_steps": 5,
        "learning_rate": 0.003,
        "warmup_steps": 5,
        "seed": seed,
        "disable_tqdm": True,
        "use_cpu": True,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return folder / "recipe.yaml"


class Training:
    """A training in a process of its own."""

    def __init__(self, recipe: Path, run: Path):
        self.run = run
        self.log = run.with_name(f"{run.name}.log")
        command = [sys.executable, "-c", TRAIN, "train", str(recipe), "--output_dir", str(run)]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        settings = run / "settings.json"
        before = settings.stat().st_mtime_ns if settings.is_file() else 0
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log, env=environment)
        # Written anew where the steps begin.
        self.wait_until(lambda: settings.is_file() and settings.stat().st_mtime_ns != before, SECONDS_TO_START)
        self.start = time.monotonic()

    def wait_until(self, comes_true: Callable[[], bool], seconds: float) -> None:
        """Waits for something, for the end of the process, or so long."""
        end = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < end and not comes_true():
            time.sleep(0.0005)

    def wait(self, seconds: float) -> None:
        """Waits so long, or for the end of the process."""
        self.wait_until(lambda: False, seconds)

    def is_writing(self) -> bool:
        """Tells whether a checkpoint is being written."""
        return any(self.run.glob(".checkpoint-*.partial"))

    def kill(self) -> bool:
        """Kills the process by SIGKILL; tells whether it was still running."""
        self.process.send_signal(signal.SIGKILL)
        return self.process.wait() == -signal.SIGKILL

    def finish(self) -> str:
        """Waits for the end; returns the last line that the process complained in, "" where it ended well."""
        if not self.process.wait():
            return ""
        return self.log.read_text(encoding="utf-8").strip().splitlines()[-1]


def read_run(run: Path) -> dict[str, Any]:
    """Returns what has to be the same in two runs."""
    history = json.loads((run / "history.json").read_text(encoding="utf-8"))
    kept = [{key: each for key, each in entry.items() if not any(word in key for word in TIMES)} for entry in history]
    weights = hashlib.sha256((run / "model.safetensors").read_bytes()).hexdigest()
    return {"history": kept, "weights": weights}


def kill_once(training: Training, seconds: float, while_writing: bool, rng: np.random.Generator) -> dict[str, Any]:
    """Kills a training at a moment that is drawn; returns what is left of it, nothing if it has ended before."""
    training.wait(float(rng.uniform(0, seconds)))
    if while_writing:
        training.wait_until(training.is_writing, seconds)
        training.wait(float(rng.uniform(0, 0.05)))
    if not training.kill():
        return {}
    left = sorted(training.run.glob("checkpoint-*"))
    last = latest_checkpoint(training.run)
    is_deleting = any(training.run.glob(".checkpoint-*.deleted"))
    return {
        "after_seconds": round(time.monotonic() - training.start, 3),
        "at": "writing" if training.is_writing() else "deleting" if is_deleting else "between",
        "checkpoints": len(left),
        "all_whole": all(is_whole(path) for path in left),
        "goes_on_after": 0 if last is None else int(last.name.split("-")[1]),
    }


def kill_often(
    recipe: Path, expected: dict[str, Any], seconds: float, options: argparse.Namespace, folder: Path
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Kills runs until there were so many kills, bringing each run to its end; returns kills and runs."""
    rng = np.random.default_rng(options.seed)
    kills: list[dict[str, Any]] = []
    runs: list[dict[str, Any]] = []
    while len(kills) < options.kills:
        run = folder / f"run{len(runs)}"
        while not (run / "training.json").is_file():
            training = Training(recipe, run)
            if len(kills) < options.kills:
                left = kill_once(training, 0.6 * seconds, len(kills) % 2 == 1, rng)
                kills += [{"run": len(runs), **left}] if left else []
                print(left, flush=True)
            elif complaint := training.finish():
                raise RuntimeError(f"A run that was killed does not go on: {complaint}")
        ended = read_run(run)
        runs.append({f"same_{name}": ended[name] == expected[name] for name in expected})
        print(runs[-1], flush=True)
        shutil.rmtree(run)
    return kills, runs


def fill_disk(recipe: Path, expected: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Fills the disk of a run while it writes a checkpoint, makes room, and goes on."""
    disk = folder / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)], check=False)
    is_mounted = mount.returncode == 0
    try:
        run, ballast = disk / "run", disk / "ballast"
        training = Training(recipe, run)
        training.wait_until(lambda: latest_checkpoint(run) is not None, SECONDS_TO_START)
        if is_mounted:
            training.wait_until(training.is_writing, SECONDS_TO_START)
            with open(ballast, "wb") as file:
                file.write(b"0" * max(0, shutil.disk_usage(disk).free - 100_000))
        else:
            import resource

            limit = (latest_checkpoint(run) / "optimizer.pt").stat().st_size // 2
            resource.prlimit(training.process.pid, resource.RLIMIT_FSIZE, (limit, limit))
        message = training.finish()
        last = latest_checkpoint(run)
        result = {
            "by": "tmpfs, filled while a checkpoint is written" if is_mounted else "a limit on the size of files",
            "exit_status": training.process.returncode,
            "message": message.replace(str(disk), "DISK"),
            "partial_checkpoints_left": len(list(run.glob(".checkpoint-*.partial"))),
            "last_checkpoint": None if last is None else last.name,
            "it_loads": last is not None and AutoModel.from_pretrained(last) is not None,
        }
        print(result, flush=True)
        ballast.unlink(missing_ok=True)
        if complaint := Training(recipe, run).finish():
            raise RuntimeError(f"A run whose disk was full does not go on: {complaint}")
        ended = read_run(run)
        return result | {f"same_{name}": ended[name] == expected[name] for name in expected}
    finally:
        if is_mounted:
            subprocess.run(["umount", str(disk)], check=True)


def summary(result: dict[str, Any]) -> str:
    """Renders kills and full disk."""
    kills, runs, disk = result["kills"], result["runs"], result["full_disk"]
    writing = sum(each["at"] == "writing" for each in kills)
    lines = [
        ["what", "result"],
        ["kills (SIGKILL)", f"{len(kills)}, {writing} of them while a checkpoint was written"],
        ["kills that left a checkpoint that is not whole", str(sum(not each["all_whole"] for each in kills))],
        ["runs that were killed and came to their end", str(len(runs))],
        ["of these, same losses, gradient norms and scores", str(sum(each["same_history"] for each in runs))],
        ["of these, same weights", str(sum(each["same_weights"] for each in runs))],
        ["disk that fills up", disk["by"]],
        ["the last checkpoint loads", "yes" if disk["it_loads"] else "no"],
        ["partial checkpoints left", str(disk["partial_checkpoints_left"])],
        ["with room again, same history", "yes" if disk["same_history"] else "no"],
        ["with room again, same weights", "yes" if disk["same_weights"] else "no"],
    ]
    return markdown_table(lines)


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=60, help="of a run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("model_cards/results/kill_and_resume.json"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="m3fm-") as name:
        folder = Path(name)
        recipe = make_recipe(folder, options.steps, options.seed)
        whole = Training(recipe, folder / "whole")
        if complaint := whole.finish():
            raise RuntimeError(f"The recipe does not run: {complaint}")
        seconds = time.monotonic() - whole.start
        expected = read_run(folder / "whole")
        kills, runs = kill_often(recipe, expected, seconds, options, folder)
        disk = fill_disk(recipe, expected, folder)
    result = {
        "notice": NOTICE,
        "versions": library_versions(),
        "steps": options.steps,
        "seconds_of_a_run": round(seconds, 1),
        "logged": len(expected["history"]),
        "kills": kills,
        "runs": runs,
        "full_disk": disk,
    }
    result["table"] = summary(result)
    print(result["table"])
    write_json(options.output, result)


if __name__ == "__main__":
    main()
