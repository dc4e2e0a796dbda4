# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Two ranks save, stop, go on, score and fail together."""

import json
import os
import socket
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import multiprocessing

from m3fm.training.checkpoints import CheckpointError, is_whole, latest_checkpoint
from m3fm.training.guards import NonFiniteStepError
from m3fm.training.runs import train_or_resume
from tests.training.small_runs import Scores, StoppedError, comparable, small_trainer

pytest.importorskip("accelerate")


@dataclass
class Recipe:
    """Of a run."""

    width: int = 3


class RankScores(Scores):
    """Gives another score on each rank."""

    def score(self, model: torch.nn.Module) -> dict[str, float]:
        return super().score(model) | {"drawn": float(os.environ["RANK"])}


BY_STEPS = {"eval_strategy": "steps", "eval_steps": 2}


def run(folder: Path, stop: int | None = None, **arguments):
    trainer = small_trainer(folder, validation=RankScores(), save_steps=3, **BY_STEPS, **arguments)
    trainer.stop_before = stop
    return trainer


def fail_to_save(folder: Path) -> str:
    """Lets rank 1 fail while it writes its part of a checkpoint, and returns what this rank learns of it."""
    trainer = run(folder)
    if os.environ["RANK"] == "1":

        def save_rng_state(output_dir: str) -> None:
            raise OSError(28, "No space left on device")

        trainer._save_rng_state = save_rng_state
    try:
        trainer.train()
    except CheckpointError as error:
        return str(error)
    return ""


def work(rank: int, root: str, port: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    folder = Path(root)
    whole = run(folder / "whole")
    train_or_resume(whole, Recipe())
    try:
        train_or_resume(run(folder / "stopped", 5), Recipe())
    except StoppedError:
        later = run(folder / "stopped")
        train_or_resume(later, Recipe())
    poisoned = small_trainer(folder / "poisoned", poisoned=4)
    try:
        poisoned.train()
        message = ""
    except NonFiniteStepError as error:
        message = str(error)
    found = {
        "whole": comparable(whole.state.log_history),
        "later": comparable(later.state.log_history),
        "same_weights": all(
            torch.equal(ours, theirs)
            for ours, theirs in zip(later.model.parameters(), whole.model.parameters(), strict=True)
        ),
        "samples": later.state.log_history[-1]["samples_seen"],
        "full": fail_to_save(folder / "full"),
        "nan": message,
        "nan_step": poisoned.state.global_step + 1,
        "order": poisoned.batches.all_batches(0).tolist(),
    }
    (folder / f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")


def test_ranks_save_stop_go_on_score_and_fail_together(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(work, (str(tmp_path), port), nprocs=2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1))
    for name in ("whole", "later", "nan", "nan_step"):
        assert first[name] == second[name], name
    assert first["later"] == first["whole"] and first["same_weights"] and second["same_weights"]
    assert first["samples"] == 8 * 2 * 2
    drawn = [entry["eval_drawn"] for entry in first["whole"] if "eval_drawn" in entry]
    assert drawn == [0.0] * 4, "the scores of the main rank count"

    last = latest_checkpoint(tmp_path / "stopped")
    assert last.name == "checkpoint-8" and {"rng_state_0.pth", "rng_state_1.pth"} <= set(os.listdir(last))
    assert is_whole(last)
    assert "another rank could not write" in first["full"] and "the disk is full" in second["full"]
    assert os.listdir(tmp_path / "full") == []

    (found,) = json.loads((tmp_path / "poisoned" / "nan_batch.json").read_text(encoding="utf-8"))
    told = [batch["study_ids"] for rank in found["ranks"] for batch in rank["batches"]]
    assert told == [[f"made_up/{number}" for number in batch] for batch in first["order"][found["step"] - 1]]
    assert sorted(str(rank["loss"]) == "nan" for rank in found["ranks"]) == [False, True]
    assert "made_up/4" in first["nan"] and found["step"] == first["nan_step"]

    alone = small_trainer(tmp_path / "stopped", save_steps=3)
    with pytest.raises(ValueError, match="holds a run with another world_size.*world_size was 2 and is 1"):
        train_or_resume(alone, Recipe())
