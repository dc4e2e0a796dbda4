# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints are whole or not there, on full disks too; a run that goes on is the run that was never stopped."""

import contextlib
import errno
import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from transformers import LlamaForCausalLM
from transformers import trainer as transformers_trainer

from m3fm.training import checkpoints
from m3fm.training.checkpoints import CheckpointError, drop_checkpoints, is_whole, latest_checkpoint, whole_checkpoint
from m3fm.training.runs import RunOptions
from m3fm.training.towers import LoraBlock, has_lora, set_training
from tests.training.small_runs import CONFIG, Scores, SmallTrainer, StoppedError, comparable, small_trainer

pytest.importorskip("accelerate")


@pytest.fixture(autouse=True)
def no_collection(monkeypatch):
    """Trainer collects garbage before each run: most of the time that these take."""
    monkeypatch.setattr("gc.collect", lambda *generation: 0)


CPU = torch.device("cpu")


def save(run: Path, step: int) -> Path:
    with whole_checkpoint(run, step, 0, CPU) as folder:
        (folder / "weights").write_bytes(b"0123456789")
    return run / f"checkpoint-{step}"


def names(run: Path) -> list[str]:
    return sorted(path.name for path in run.iterdir())


# --- whole or not there ----------------------------------------------------------------------------------------------


def test_the_last_whole_checkpoint_is_the_one_with_most_steps(tmp_path):
    assert latest_checkpoint(tmp_path / "none") is None
    assert latest_checkpoint(tmp_path) is None
    for step in (90, 1000, 200):
        save(tmp_path, step)
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-1000"
    # Half copied, half deleted, or cut off by what does not know of these rules.
    (tmp_path / "checkpoint-1000" / "weights").write_bytes(b"0123")
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-200"
    (tmp_path / "checkpoint-200" / "weights").unlink()
    (tmp_path / "checkpoint-3000").mkdir()
    (tmp_path / "checkpoint-3000" / "trainer_state.json").write_text("{}")
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-90"
    assert is_whole(save(tmp_path, 3000)), "what was not whole makes room"


def test_a_checkpoint_has_no_name_before_it_is_whole(tmp_path):
    with whole_checkpoint(tmp_path, 7, 0, CPU) as folder:
        (folder / "weights").write_bytes(b"01")
        assert latest_checkpoint(tmp_path) is None and not list(tmp_path.glob("checkpoint-*"))
    assert names(tmp_path) == ["checkpoint-7"]
    (tmp_path / ".checkpoint-9.partial").mkdir()
    (tmp_path / ".checkpoint-3.deleted").mkdir()
    checkpoints.remove_partial(tmp_path)
    assert names(tmp_path) == ["checkpoint-7"]


@pytest.mark.parametrize(
    ("keep", "best", "left"),
    [(None, None, [1, 2, 3, 4]), (2, None, [3, 4]), (2, 1, [1, 4]), (1, 4, [4]), (1, 2, [2, 4]), (3, 4, [2, 3, 4])],
)
def test_old_checkpoints_go_but_for_the_best(keep, best, left, tmp_path):
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    drop_checkpoints(tmp_path, keep, None if best is None else f"/elsewhere/checkpoint-{best}")
    assert names(tmp_path) == [f"checkpoint-{step}" for step in left]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc:857] . PytorchStreamWriter failed writing file data/0"),
        safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_leaves_the_checkpoint_before(error, tmp_path):
    save(tmp_path, 3)
    expected = r"Checkpoint 6 could not be written to .*: the disk is full. It needs about 2.5 kB, .* on after c"
    with pytest.raises(CheckpointError, match=expected), whole_checkpoint(tmp_path, 6, 2500, CPU) as folder:
        (folder / "weights").write_bytes(b"0123")
        raise error
    assert names(tmp_path) == ["checkpoint-3"] and is_whole(tmp_path / "checkpoint-3")
    with (
        pytest.raises(CheckpointError, match=r"about 1000000000000.0 GB.*after checkpoint-3"),
        whole_checkpoint(tmp_path, 6, 10**21, CPU),
    ):
        pytest.fail("there is no room")
    with pytest.raises(KeyError, match="another"), whole_checkpoint(tmp_path, 6, 0, CPU):
        raise KeyError("another mistake")
    assert names(tmp_path) == ["checkpoint-3"]


def test_a_disk_that_fills_up_ends_the_run_which_then_goes_on(tmp_path, monkeypatch):
    whole = small_trainer(tmp_path / "whole")
    whole.train()
    real_save, run = torch.save, tmp_path / "run"

    def full(content, path, *args, **kwargs):
        if "checkpoint-6" in str(path) and "scheduler" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real_save(content, path, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match="the disk is full"):
        patch.setattr(transformers_trainer.torch, "save", full)
        small_trainer(run, save_total_limit=1).train()
    assert names(run) == ["checkpoint-3"]
    later = small_trainer(run, save_total_limit=1)
    later.train(resume_from_checkpoint=str(latest_checkpoint(run)))
    assert comparable(later.state.log_history) == comparable(whole.state.log_history)
    assert names(run) == ["checkpoint-8"]


# --- going on --------------------------------------------------------------------------------------------------------


def go_on(folder: Path, stop: int | None = None, **arguments) -> SmallTrainer:
    """Starts or resumes a run, and breaks it off before a step."""
    trainer = small_trainer(folder, **arguments)
    trainer.stop_before = stop
    last = latest_checkpoint(folder)
    try:
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
    except StoppedError:
        assert trainer.state.global_step + 1 == stop
    return trainer


BY_EPOCH = {"eval_strategy": "epoch", "logging_strategy": "epoch"}
BY_STEPS = {"eval_strategy": "steps", "eval_steps": 2}
CASES = {
    "an epoch has 5 steps": ({"save_steps": 2, **BY_STEPS}, (4, 7)),
    "losses are logged less often than they are saved": ({"logging_steps": 4, "save_steps": 3}, (5, 8)),
    "the epoch ends where it is saved": ({"save_steps": 5, **BY_EPOCH}, (6,)),
    "micro-batches and workers": (
        {"gradient_accumulation_steps": 2, "save_steps": 1, "dataloader_num_workers": 1, "max_steps": 5, **BY_STEPS},
        (3, 4),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_that_was_stopped_is_the_run_that_was_not(case, tmp_path):
    arguments, stops = CASES[case]
    whole = go_on(tmp_path / "whole", **arguments)
    expected = comparable(whole.state.log_history)
    for stop in stops:
        go_on(tmp_path / "stopped", stop, **arguments)
    for _ in range(2):  # the second time, the run is over
        last = go_on(tmp_path / "stopped", **arguments)
        assert comparable(last.state.log_history) == expected
        assert last.state.global_step == whole.state.global_step
    ours, theirs = last.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    facts = last.state.log_history[-1]
    assert facts["samples_seen"] == whole.state.log_history[-1]["samples_seen"]
    assert facts["tokens_seen"] == 6 * facts["samples_seen"] and facts["peak_memory_bytes"] > 10**7


class Falling(Scores):
    """Is best at the second of its calls, over all interruptions."""

    def score(self, model: torch.nn.Module) -> dict[str, float]:
        step = self.trainer.state.global_step
        return {"bleu_4_en": 1.0 - abs(step - 2) / 10, "drawn": float(torch.rand(()))}


def patient(folder: Path, stop: int | None = None, patience: int = 3) -> SmallTrainer:
    validation = Falling()
    arguments = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 3, "max_steps": 30}
    trainer = small_trainer(
        folder,
        RunOptions(early_stopping_patience=patience),
        validation,
        metric_for_best_model="bleu_4_en",
        load_best_model_at_end=True,
        save_total_limit=1,
        **arguments,
    )
    validation.trainer = trainer
    trainer.stop_before = stop
    last = latest_checkpoint(folder)
    with contextlib.suppress(StoppedError):
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
    return trainer


def test_a_run_waits_as_long_for_a_better_score_and_leaves_the_best_model(tmp_path):
    whole = patient(tmp_path / "whole")
    assert whole.state.global_step == 5 and whole.state.best_metric == 1.0
    assert Path(whole.state.best_model_checkpoint).name == "checkpoint-2"
    best = LlamaForCausalLM.from_pretrained(tmp_path / "whole" / "checkpoint-2").state_dict()
    assert all(torch.equal(weight, best[name]) for name, weight in whole.model.state_dict().items())
    patient(tmp_path / "before", 5)
    assert names(tmp_path / "before") == ["checkpoint-2", "checkpoint-3"]
    (tmp_path / "before").rename(tmp_path / "moved")
    for _ in range(2):
        later = patient(tmp_path / "moved")
        assert comparable(later.state.log_history) == comparable(whole.state.log_history)
        assert Path(later.state.best_model_checkpoint).parent == tmp_path / "moved"
    assert patient(tmp_path / "moved", patience=5).state.global_step == 7


def test_other_data_are_not_gone_on_with(tmp_path):
    go_on(tmp_path, 5)
    with pytest.raises(ValueError, match="order of the training data is not that of .*checkpoint-3, by its draws"):
        go_on(tmp_path, studies=12)


def test_lora_in_place_is_saved_and_found_by_its_names(tmp_path):
    pytest.importorskip("peft")

    def adapted() -> LlamaForCausalLM:
        torch.manual_seed(1)
        model = LlamaForCausalLM(CONFIG)
        set_training(model, "lora", LoraBlock(r=2))
        assert has_lora(model)
        return model

    whole = go_on(tmp_path / "whole", model=adapted())
    go_on(tmp_path / "run", 5, model=adapted())
    files = json.loads((tmp_path / "run" / "checkpoint-3" / "content.json").read_text())["files"]
    assert {"config.json", "state.safetensors", "optimizer.pt", "rng_state.pth"} <= set(files)
    later = go_on(tmp_path / "run", model=adapted())
    assert comparable(later.state.log_history) == comparable(whole.state.log_history)
