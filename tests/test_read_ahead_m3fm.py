# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Reading ahead: order, laziness, errors, crashes, hangs, and what is left behind."""

import faulthandler
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from m3fm import read_ahead_m3fm
from m3fm.read_ahead_m3fm import Result, read_ahead

ROOT = Path(__file__).parents[1]


class UnrestorableError(ValueError):
    def __init__(self, first, second):
        super().__init__(f"{first} {second}")


def read(item):
    if item == "bad":
        raise ValueError("bad: not an image")
    if item == "odd":
        raise UnrestorableError("an odd", "error")
    if item == "crash":
        faulthandler.disable()
        os.kill(os.getpid(), signal.SIGSEGV)
    if item == "leave":
        os._exit(7)
    if item == "hang":
        time.sleep(60)
    if item == "closure":
        return lambda: None
    if isinstance(item, float):
        time.sleep(item)
    return {"item": item, "pid": os.getpid(), "pixels": torch.full((2, 3), 0.5), "mask": torch.tensor([True])}


def said(result):
    return result.value["item"] if result.error is None else str(result.error)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_results_come_in_order_whatever_happens(workers):
    items = [0.1, "a", "bad", 0.0, "odd", "b"]
    results = list(read_ahead(read, iter(items), workers))
    assert [said(each) for each in results] == [0.1, "a", "bad: not an image", 0.0, "an odd error", "b"]
    assert all(isinstance(each.error, ValueError) for each in (results[2], results[4]))
    tensors = results[0].value
    assert torch.equal(tensors["pixels"], torch.full((2, 3), 0.5)) and tensors["mask"].dtype == torch.bool
    tensors["pixels"] += 1  # is the caller's own
    assert (os.getpid() in {each.value["pid"] for each in results if each.error is None}) == (workers == 0)
    assert not multiprocessing.active_children()


@pytest.mark.skipif(sys.platform == "win32", reason="a signal ends no process there")
@pytest.mark.parametrize("workers", [1, 2])
def test_a_crash_is_the_error_of_its_item_alone(workers):
    items = ["a", "crash", "b", "leave", "c", "crash", "crash", "d"]
    results = list(read_ahead(read, items, workers))
    died, left = "reading ended its process (SIGSEGV)", "reading ended its process (exit code 7)"
    assert [said(each) for each in results] == ["a", died, "b", left, "c", died, died, "d"]


def test_a_hang_is_ended():
    start = time.monotonic()
    results = list(read_ahead(read, ["a", "hang", "b"], 1, timeout=0.5))
    assert [said(each) for each in results] == ["a", "reading took longer than 0.5 s", "b"]
    assert time.monotonic() - start < 20


def test_no_more_is_taken_than_is_read_ahead():
    taken = []

    def items():
        for number in range(100):
            taken.append(number)
            yield number

    results = read_ahead(read, items(), workers=2, ahead=3)
    assert taken == []
    for number in range(5):
        assert next(results).value["item"] == number
        assert len(taken) == number + 4
    assert len(multiprocessing.active_children()) == 2
    threads = threading.active_count()
    results.close()
    assert not multiprocessing.active_children() and threading.active_count() == threads - 2
    here = read_ahead(read, items(), workers=0)
    taken.clear()
    next(here)
    assert taken == [0]


def test_items_are_read_while_nobody_asks():
    slow = read_ahead(read, [0.0, 0.3, 0.3, 0.3], workers=3, ahead=4)
    next(slow)
    time.sleep(0.6)
    start = time.monotonic()
    assert [said(each) for each in slow] == [0.3] * 3
    assert time.monotonic() - start < 0.3


def test_few_items_start_few_processes():
    results = read_ahead(read, ["a"], workers=8)
    next(results)
    assert len(multiprocessing.active_children()) == 1
    results.close()


def test_what_cannot_be_sent_or_is_large_is_read_here(monkeypatch):
    unsendable = threading.Lock()
    results = list(read_ahead(read, ["a", unsendable, "b"], 2))
    assert [each.value["pid"] == os.getpid() for each in results] == [False, True, False]
    monkeypatch.setattr(read_ahead_m3fm, "_MAX_ITEM_BYTES", 1000)
    items = [np.zeros(100, np.uint8), np.zeros(2000, np.uint8), torch.zeros(2000), [b"x" * 2000], "a"]
    results = list(read_ahead(_where, items, 2))
    assert [each.value == os.getpid() for each in results] == [False, True, True, True, False]
    assert "cannot be sent" in str(list(read_ahead(read, ["closure"], 1))[0].error)


def _where(_):
    return os.getpid()


def test_an_error_of_the_items_ends_it():
    def items():
        yield "a"
        raise KeyError("the list")

    with pytest.raises(KeyError, match="the list"):
        list(read_ahead(read, items(), 2))
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("settings", [{"workers": -1}, {"workers": True}, {"workers": 1.5}])
def test_wrong_settings_are_refused_at_once(settings):
    with pytest.raises(ValueError, match="Expected workers to be a whole number >= 0"):
        read_ahead(read, [], **settings)
    for wrong in ({"ahead": 0}, {"timeout": 0}):
        with pytest.raises(ValueError, match="Expected ahead >= 1"):
            read_ahead(read, [], workers=1, **wrong)
    assert list(read_ahead(read, [], workers=2)) == []
    assert Result(value=1).error is None


# A script, as on macOS and Windows nothing is inherited; it loads one file, which is quicker than the package.
SCRIPT = """
import multiprocessing, os, sys
from read_ahead_m3fm import read_ahead

def read(item):
    if item == "crash":
        os._exit(3)
    return item

def main():
    multiprocessing.set_start_method("spawn")
    results = list(read_ahead(read, ["a", "b", "crash"], 1))
    print([result.value if result.error is None else str(result.error) for result in results])

GUARD main()
"""


def test_processes_that_inherit_nothing(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.replace("GUARD", 'if __name__ == "__main__":'), encoding="utf-8")
    run = _run(tmp_path, script)
    assert run.stdout.splitlines() == ["['a', 'b', 'reading ended its process (exit code 3)']"], run.stderr
    script.write_text(SCRIPT.replace("GUARD", "if True:"), encoding="utf-8")
    run = _run(tmp_path, script)  # neither hangs nor starts processes on and on
    assert "RuntimeError: A process that reads ended at its start (exit code 1)" in run.stderr


def _run(folder, *words):
    # A stand-in for torch, which takes each process a second to load, and of which none here sends anything.
    (folder / "torch.py").write_text("class Tensor: ...\ndef set_num_threads(count): ...\n", encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT / "m3fm")])}
    return subprocess.run(
        [sys.executable, *map(str, words)], env=environment, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.skipif(sys.platform == "win32", reason="asks for processes as Unix does")
def test_workers_end_with_a_killed_process(tmp_path):
    code = (
        "import os, signal, time\n"
        "from read_ahead_m3fm import read_ahead\n"
        "def read(item):\n"
        "    os._exit(1) if item == 1 else time.sleep(0.05)\n"
        "    return os.getpid()\n"
        "results = read_ahead(read, range(99), 3)\n"
        "print(*{next(results).value for _ in range(9)} - {None}, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    run = _run(tmp_path, "-c", code)
    pids = [int(pid) for pid in run.stdout.split()]
    assert len(pids) >= 3 and run.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 10
    while (left := [pid for pid in pids if _is_running(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left


def _is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    return not (status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] == "Z")
