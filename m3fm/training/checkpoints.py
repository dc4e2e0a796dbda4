# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints of a run that are whole or not there, whenever the run is killed, and on a disk that fills up.

A checkpoint is written into a hidden folder beside its place. When every rank has written its part, its list of files
is added, all of it is brought to the disk, and the folder gets its name: one step for the file system. Older
checkpoints go only after that. A checkpoint whose files are not those of its list (deleting it was cut off, a copy is
not complete) does not count as one.
"""

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from . import ranks

__all__ = [
    "CheckpointError",
    "drop_checkpoints",
    "is_whole",
    "latest_checkpoint",
    "remove_partial",
    "whole_checkpoint",
]

CONTENT_FILE = "content.json"
FORMAT = 1
_NAME = re.compile(r"checkpoint-(\d+)")
_HIDDEN = (".checkpoint-*.partial", ".checkpoint-*.deleted")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Writers that are not Python say it in words: safetensors in Rust's, torch's archives in their own.
_FULL_WORDS = ("No space left", *(f"os error {number}" for number in _FULL), "PytorchStreamWriter failed writing")


class CheckpointError(OSError):
    """A checkpoint could not be written; the ones before it are as they were."""


@contextmanager
def whole_checkpoint(run: Path, step: int, needed: int, device: torch.device) -> Iterator[Path]:
    """Gives the folder that all ranks write a checkpoint into; behind the block it is `checkpoint-STEP`.

    If writing fails on any rank, what was written is removed, and every rank learns of it.

    Args:
        run: Folder of the run, which all ranks share.
        step: Of the checkpoint.
        needed: Bytes that it takes, about.
        device: What the ranks tell each other by.

    Raises:
        CheckpointError: If the disk is full, or another rank could not write; with the room that is needed.
    """
    partial, place = run / f".checkpoint-{step}.partial", run / f"checkpoint-{step}"

    def prepare() -> None:
        free = shutil.disk_usage(run).free
        if free < needed:
            raise OSError(errno.ENOSPC, f"{free} bytes are free")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()

    def complete() -> None:
        files = {str(file.relative_to(partial)): file.stat().st_size for file in _files(partial)}
        content = json.dumps({"format": FORMAT, "step": step, "files": files}, indent=1)
        (partial / CONTENT_FILE).write_text(content, encoding="utf-8")
        for path in (*_files(partial), partial):
            _bring_to_disk(path)
        if place.is_dir():  # not whole, or the run would have gone on after it
            _remove(place)
        partial.rename(place)
        _bring_to_disk(run)

    failure: Exception | None = None
    try:
        if ranks.is_main():
            prepare()
    except Exception as error:
        failure = error
    _agree(failure, partial, needed, device)
    try:
        yield partial
    except Exception as error:
        failure = error
    _agree(failure, partial, needed, device)
    try:
        if ranks.is_main():
            complete()
    except Exception as error:
        failure = error
    _agree(failure, partial, needed, device)


def is_whole(checkpoint: Path) -> bool:
    """Tells whether a checkpoint has all of its files, at their sizes."""
    try:
        content = json.loads((checkpoint / CONTENT_FILE).read_text(encoding="utf-8"))
        return all((checkpoint / name).stat().st_size == size for name, size in content["files"].items())
    except (OSError, ValueError, KeyError):
        return False


def latest_checkpoint(run: Path) -> Path | None:
    """Returns the last checkpoint of a run, or None; what is not whole is passed by."""
    return next((path for path in reversed(_checkpoints(run)) if is_whole(path)), None)


def drop_checkpoints(run: Path, keep: int | None, best: str | None) -> None:
    """Deletes the oldest checkpoints of a run.

    Args:
        run: Its folder.
        keep: How many stay: the newest, one of which makes room for the best; None keeps all.
        best: The one that stays in any case.
    """
    if not keep or keep < 1:
        return
    kept = {path.name for path in _checkpoints(run)[-1:]} | ({Path(best).name} if best else set())
    for path in reversed(_checkpoints(run)):
        if path.name in kept or len(kept) < keep:
            kept.add(path.name)
        else:
            _remove(path)


def remove_partial(run: Path) -> None:
    """Removes what a killed run left of checkpoints that were being written or deleted."""
    for pattern in _HIDDEN:
        for path in run.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def _checkpoints(run: Path) -> list[Path]:
    """Returns all that is called a checkpoint, by step."""
    numbers = {path: _NAME.fullmatch(path.name) for path in run.glob("checkpoint-*") if path.is_dir()}
    return sorted((path for path, match in numbers.items() if match), key=lambda path: int(numbers[path][1]))


def _remove(checkpoint: Path) -> None:
    """Takes a checkpoint's name away first: half of it is not to be taken for one."""
    hidden = checkpoint.with_name(f".{checkpoint.name}.deleted")
    shutil.rmtree(hidden, ignore_errors=True)
    checkpoint.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def _agree(failure: Exception | None, partial: Path, needed: int, device: torch.device) -> None:
    """Waits for all ranks; if one of them failed, removes the partial checkpoint and raises on each."""
    failures = ranks.all_sum(torch.tensor([int(failure is not None)], device=device))
    if not int(failures):
        return
    if ranks.is_main():
        shutil.rmtree(partial, ignore_errors=True)
    if failure is not None and not _is_full(failure):
        raise failure
    run, step = partial.parent, partial.name.split("-")[1].split(".")[0]
    last = latest_checkpoint(run)
    goes_on = f"the run goes on after {last.name}" if last else "the run has no checkpoint yet"
    reason = "the disk is full" if failure is not None else "another rank could not write"
    raise CheckpointError(
        f"Checkpoint {step} could not be written to {run}: {reason}. It needs about {_readable(needed)}, "
        f"{_readable(shutil.disk_usage(run).free)} are free: make room, or lower save_total_limit, and start again: "
        f"{goes_on}."
    ) from failure


def _is_full(error: BaseException | None) -> bool:
    """Tells whether an error, or what it came of, says that there is no room."""
    while error is not None:
        if getattr(error, "errno", None) in _FULL or any(words in str(error) for words in _FULL_WORDS):
            return True
        error = error.__cause__ or error.__context__
    return False


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _bring_to_disk(path: Path) -> None:
    """Waits until a file, or the names in a folder, would survive a power cut."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _readable(size: int) -> str:
    for unit, factor in (("GB", 10**9), ("MB", 10**6)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size / 1000:.1f} kB"
