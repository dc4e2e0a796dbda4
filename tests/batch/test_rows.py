# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""The file of rows: cuts at every byte, kills, full disks, other settings, and two runs at once."""

import io
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from m3fm.batch import rows as module
from m3fm.batch.rows import CsvTable, JsonLines, RowFile, StreamRows, check_output
from m3fm.read_ahead_m3fm import read_ahead

RUN = {"model": "a", "beams": 2}
SOURCES = ["a.png", 'b, "odd"\nname.png', "肺.png"]
LINES = JsonLines(lambda row: "source" in row and "text" in row)
TABLE = CsvTable(("source", "label", "score"), lambda row: row["label"] in ("x", "y"))


@pytest.fixture(autouse=True)
def _no_look_at_versions(monkeypatch):
    monkeypatch.setattr(module, "library_versions", dict)


def is_whole(rows):
    return [row["label"] for row in rows] == ["x", "y"]


def rows_of(source, form):
    if form is LINES:
        return [{"source": source, "text": f"Lungs of {source}", "score": 0.5}]
    return [{"source": source, "label": label, "score": 0.25} for label in "xy"]


def write_all(path, form, sources=SOURCES, **options):
    """Writes the studies that are missing, and returns which these were."""
    whole = is_whole if form is TABLE else None
    with RowFile(path, form, RUN, whole, **options) as file:
        file.check_sources(sources)
        missing = [source for source in sources if source not in file.kept]
        for source in missing:
            file.write(rows_of(source, form))
        file.sort(sources)
    return missing


@pytest.mark.parametrize("form", [LINES, TABLE], ids=["jsonl", "csv"])
def test_cut_at_any_byte_it_becomes_the_same_file(form, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)  # slow, and of no use here
    path = tmp_path / "out"
    assert write_all(path, form) == SOURCES
    whole = path.read_bytes()
    assert sorted(each.name for each in tmp_path.iterdir()) == ["out", "out.run.json"]
    redone = set()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        redone.add(len(write_all(path, form)))
        assert path.read_bytes() == whole
    assert redone == {1, 2, 3}
    assert write_all(path, form) == [] and path.read_bytes() == whole
    if form is LINES:
        assert [json.loads(line)["source"] for line in whole.decode().splitlines()] == SOURCES


def test_what_is_no_row_is_dropped_and_done_again(tmp_path):
    path = tmp_path / "out"
    write_all(path, LINES)
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    path.write_bytes(lines[0] + b"\0\xff\n" + b"[" * 100000 + b"\n{}\n" + lines[0] + lines[2])
    assert write_all(path, LINES) == [SOURCES[1]]
    assert path.read_bytes() == whole


def test_a_whole_file_is_left_alone(tmp_path):
    path = tmp_path / "out"
    write_all(path, LINES)
    before = path.stat()
    write_all(path, LINES)
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_studies_are_sorted_and_strangers_refused(tmp_path):
    path = tmp_path / "out"
    write_all(path, LINES, ["b", "d"])
    assert write_all(path, LINES, ["a", "b", "c", "d"]) == ["a", "c"]
    assert [json.loads(line)["source"] for line in path.read_text().splitlines()] == ["a", "b", "c", "d"]
    with pytest.raises(ValueError, match="holds 1 studies that are not among the files"):
        write_all(path, LINES, ["a", "b", "c"])
    assert write_all(path, LINES, ["a"], resume=False) == ["a"]


def test_other_settings_and_other_files_are_refused(tmp_path):
    path = tmp_path / "out"
    write_all(path, LINES)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="out was made with another beams, model: expected another output"):
        RowFile(path, LINES, {"model": "b", "beams": 3})
    with pytest.raises(ValueError, match="was made with another format"):
        RowFile(path, TABLE, RUN)
    record = tmp_path / "out.run.json"
    for content in ("{", "[]", None):
        record.unlink() if content is None else record.write_text(content)
        with pytest.raises(ValueError, match="exists, and not as a table of m3fm"):
            RowFile(path, LINES, RUN)
    assert path.read_bytes() == before and not (tmp_path / "out.lock").exists()
    with RowFile(path, LINES, {"model": "b"}, resume=False) as file:
        assert file.kept == {} and path.read_bytes() == b""
    path.write_bytes(b"")  # holds nothing that could be lost
    assert write_all(path, LINES) == SOURCES


def test_no_row_lies_beside_a_record_of_other_settings(tmp_path, monkeypatch):
    path = tmp_path / "out"
    write_all(path, LINES)

    def fail(*_):
        raise OSError("killed here")

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_json", fail)
        with pytest.raises(OSError, match="killed here"):
            RowFile(path, LINES, {"model": "b"}, resume=False)
    assert path.read_bytes() == b""
    assert write_all(path, LINES) == SOURCES


def test_numbers_that_are_none_and_names_that_are_no_text(tmp_path):
    path = tmp_path / "out"
    row = {"source": "a", "text": "\udcff.png", "score": float("nan")}
    with RowFile(path, LINES, RUN) as file:
        file.write([row])
    assert json.loads(path.read_bytes()) == row | {"score": None}
    with RowFile(path, LINES, RUN) as file:
        assert file.kept == {"a": row | {"score": None}}


@pytest.mark.skipif(sys.platform == "win32", reason="file sizes are not limited there")
def test_a_full_disk_leaves_whole_rows(tmp_path):
    import resource

    path = tmp_path / "out"
    write_all(path, LINES)
    whole = path.read_bytes()
    path.unlink()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for room in range(0, len(whole), 7):
        with RowFile(path, LINES, RUN, resume=False) as file:
            try:
                resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
                with pytest.raises(OSError, match="File too large"):
                    for source in SOURCES:
                        file.write(rows_of(source, LINES))
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        written = path.read_bytes()
        assert whole.startswith(written) and len(written) <= room and (not written or written.endswith(b"\n"))
    assert write_all(path, LINES) and path.read_bytes() == whole


def test_a_failed_rewrite_leaves_the_file(tmp_path, monkeypatch):
    path = tmp_path / "out"
    write_all(path, LINES, ["b", "c"])
    before = path.read_bytes()

    def fail(*_):
        raise OSError("no space left")

    with RowFile(path, LINES, RUN) as file, monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="no space left"):
            file.sort(["c", "b"])
    assert path.read_bytes() == before
    assert sorted(each.name for each in tmp_path.iterdir()) == ["out", "out.run.json"]


# --------------------------------------------------------------------------------------------------------------------
# Several processes

# Light on purpose: the package need not be loaded to hold the lock.
HOLD = """
import fcntl, sys
file = open(sys.argv[1], "ab")
fcntl.lockf(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="locks otherwise there")
def test_two_runs_do_not_write_one_file(tmp_path):
    path = tmp_path / "out"
    write_all(path, LINES)
    before = path.read_bytes()
    words = [sys.executable, "-c", HOLD, str(tmp_path / "out.lock")]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        for resume in (True, False):
            with pytest.raises(ValueError, match="out is being written by another run: expected another output"):
                RowFile(path, LINES, RUN, resume=resume)
        assert path.read_bytes() == before
        other.kill()
    assert write_all(path, LINES) == []
    assert not (tmp_path / "out.lock").exists()


NAMES = [f"{number}.png" for number in range(60)]


def slow(name):
    time.sleep(0.001)
    if name == "7.png":
        raise ValueError("7.png: not an image")
    return f"read {name} 肺"


def run_once(path, workers):
    with RowFile(path, LINES, RUN) as file:
        missing = [name for name in NAMES if name not in file.kept]
        for name, result in zip(missing, read_ahead(slow, missing, workers), strict=True):
            file.write([{"source": name, "text": result.value or str(result.error)}])
        file.sort(NAMES)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="starts many processes")
@pytest.mark.parametrize("workers", [0, 2])
def test_killed_at_random_it_ends_in_the_same_file(workers, tmp_path):
    run_once(tmp_path / "whole", 0)
    path = tmp_path / "out"
    context, chance = multiprocessing.get_context("fork"), random.Random(workers)
    kills, seen = 0, b""
    for _ in range(9):
        process = context.Process(target=run_once, args=(path, workers))
        process.start()
        # How long it takes to begin depends on the machine: a kill comes at a random time after some more rows.
        while process.is_alive() and not (path.exists() and path.stat().st_size > len(seen)):
            process.join(0.001)
        process.join(chance.uniform(0, 0.01))
        if process.is_alive() and kills < 8:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.join()
        written = path.read_bytes() if path.exists() else b""
        assert written.startswith(seen[: seen.rfind(b"\n") + 1])  # not a line is lost
        seen = written
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
    assert kills >= 3 and process.exitcode == 0
    assert path.read_bytes() == (tmp_path / "whole").read_bytes()
    assert sorted(each.name for each in tmp_path.iterdir()) == ["out", "out.run.json", "whole", "whole.run.json"]


# --------------------------------------------------------------------------------------------------------------------
# Streams and outputs


def test_a_stream_that_is_interrupted_has_its_end():
    stream = io.StringIO()
    with pytest.raises(KeyboardInterrupt), StreamRows(stream, json.dumps, "[", ", ", "]") as rows:
        rows.write([{"a": 1}, {"b": 2}])
        raise KeyboardInterrupt
    assert json.loads(stream.getvalue()) == [{"a": 1}, {"b": 2}]
    stream = io.StringIO()
    with StreamRows(stream, json.dumps, "[", ", ", "]"):
        pass
    assert stream.getvalue() == "[]"


def test_outputs_that_cannot_be(tmp_path):
    image = tmp_path / "a.png"
    image.touch()
    assert check_output(tmp_path / "out", [image]) == tmp_path / "out"
    for output in (tmp_path, tmp_path / "absent" / "out"):
        with pytest.raises(ValueError, match="expected a file in a folder that exists"):
            check_output(output, [image])
    with pytest.raises(ValueError, match="would replace an image"):
        check_output(tmp_path / ".." / tmp_path.name / "a.png", [image])
