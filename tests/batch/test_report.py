# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Reports for many studies: rows, formats, workers, and what a kill leaves."""

import json
import multiprocessing
import os
import random
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from m3fm.batch.report import report_files
from m3fm.evaluation.runs import NOTICE
from m3fm.study_pipeline_m3fm import StudyReader
from tests.dicom_files import SECRET, ct_slice, write_dicom
from tests.phantoms import ct_volume, radiograph_pixels

ORDER = ["a.png", "b.png", "blank.png", "c.png", "damaged.png", "more/d.png"]


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "scans"
    (folder / "more").mkdir(parents=True)
    for seed, name in enumerate(("a.png", "b.png", "c.png", "more/d.png")):
        Image.fromarray(radiograph_pixels(seed)).save(folder / name)
    Image.fromarray(np.full((96, 80), 128, np.uint8)).save(folder / "blank.png")
    (folder / "damaged.png").write_bytes((folder / "a.png").read_bytes()[:500])
    return folder


@pytest.fixture
def options(tiny_checkpoint):
    return {"model": tiny_checkpoint, "max_new_tokens": 4, "batch_size": 2}


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_folder_becomes_a_file_of_rows(folder, options, tmp_path):
    told = []
    path = tmp_path / "out.jsonl"
    counts = report_files(folder, language="both", output=path, on_unread=lambda *words: told.append(words), **options)
    assert counts == {"studies": 6, "errors": 2, "refused": 1, "resumed": 0}
    rows = {row["source"]: row for row in read(path)}
    assert list(rows) == ORDER
    assert list(rows["a.png"]) == ["source", "modality", "report_en", "report_zh", "input_check"]
    assert list(rows["blank.png"]) == ["source", "error", "input_check"]
    assert rows["blank.png"]["input_check"]["verdict"] == "refused"
    assert rows["damaged.png"] == {"source": "damaged.png", "error": rows["damaged.png"]["error"]}
    assert rows["damaged.png"]["error"].startswith("truncated or damaged")
    assert told == [(name, rows[name]["error"]) for name in ("blank.png", "damaged.png")]
    record = json.loads((tmp_path / "out.jsonl.run.json").read_text(encoding="utf-8"))
    assert record["notice"] == NOTICE and record["model"] == "tiny"
    assert str(tmp_path) not in json.dumps(record)


def test_suspects_are_reported_with_a_warning_if_asked_for(folder, options, tmp_path, capsys):
    path = tmp_path / "out.jsonl"
    counts = report_files(folder, output=path, on_suspect="warn", **options)
    assert counts == {"studies": 6, "errors": 1, "refused": 0, "resumed": 0}
    row = read(path)[ORDER.index("blank.png")]
    assert row["input_check"]["verdict"] == "refused" and "report_en" in row
    report_files(folder / "blank.png", format="text", on_suspect="warn", **options)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{folder / 'blank.png'}")
    assert any(line.startswith("  not to be trusted: ") for line in lines[1:])


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(workers, folder, options, tmp_path):
    report_files(folder, output=tmp_path / "none.jsonl", **options)
    report_files(folder, output=tmp_path / "some.jsonl", num_workers=workers, **options)
    assert (tmp_path / "some.jsonl").read_bytes() == (tmp_path / "none.jsonl").read_bytes()
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_ct_series_is_one_study_and_no_patient_is_named(workers, folder, options, tmp_path):
    (folder / "more" / "ct").mkdir()
    for number, plane in enumerate(ct_volume()):
        slice_ = ct_slice(plane + 1024, position=(0, 0, 10.0 * number), spacing=(8, 8), number=number + 1)
        write_dicom(folder / "more" / "ct" / f"{99 - number}", slice_)
    path = tmp_path / "out.jsonl"
    report_files(folder / "more", output=path, num_workers=workers, **options)
    rows = {row["source"]: row for row in read(path)}
    assert list(rows) == ["ct", "d.png"]
    assert (rows["ct"]["modality"], rows["ct"]["input_check"]["images"]) == ("ct", 1)
    written = path.read_text(encoding="utf-8") + (tmp_path / "out.jsonl.run.json").read_text(encoding="utf-8")
    assert not [secret for secret in (SECRET, "DOE", "JANE", "1.2.826") if secret in written]


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="workers have to inherit the crash")
def test_a_crash_in_reading_is_a_row(folder, options, tmp_path, monkeypatch):
    read_study = StudyReader.__call__

    def crash(reader, item):
        if item[0].name == "b.png":
            os._exit(9)
        return read_study(reader, item)

    monkeypatch.setattr(StudyReader, "__call__", crash)
    path = tmp_path / "out.jsonl"
    assert report_files(folder, output=path, num_workers=2, **options)["errors"] == 3
    rows = {row["source"]: row for row in read(path)}
    assert rows["b.png"] == {"source": "b.png", "error": "reading ended its process (exit code 9)"}
    assert list(rows) == ORDER and "report_en" in rows["c.png"]


def test_a_stopped_run_goes_on_with_the_same_settings_only(folder, options, tmp_path):
    path, whole = tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    options["batch_size"] = 1
    report_files(folder, output=whole, **options)
    path.write_bytes(whole.read_bytes()[:-100])
    (tmp_path / "out.jsonl.run.json").write_bytes((tmp_path / "whole.jsonl.run.json").read_bytes())
    counts = report_files(folder, output=path, **options)
    assert counts == {"studies": 6, "errors": 2, "refused": 1, "resumed": 5}
    assert path.read_bytes() == whole.read_bytes()
    for changed, name in (
        ({"language": "zh"}, "language"),
        ({"num_beams": 2}, "num_beams"),
        ({"max_new_tokens": 5}, "max_new_tokens"),
        ({"on_suspect": "warn"}, "on_suspect"),
    ):
        with pytest.raises(ValueError, match=f"made with another {name}: expected another output, or to begin anew"):
            report_files(folder, output=path, **{**options, **changed})
    assert report_files(folder, language="zh", output=path, resume=False, **options)["resumed"] == 0
    assert "report_zh" in read(path)[0]


def run_in_child(folder, path, options):
    torch.set_num_threads(1)
    report_files(folder, output=path, **options)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="starts many processes")
def test_killed_at_random_it_ends_in_the_same_file(folder, options, tmp_path):
    for seed in range(4, 12):
        Image.fromarray(radiograph_pixels(seed)).save(folder / f"e{seed}.png")
    whole, path = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    options |= {"batch_size": 1, "num_workers": 2}
    report_files(folder, output=whole, **options)
    lines = whole.read_bytes().splitlines(keepends=True)
    context, chance = multiprocessing.get_context("fork"), random.Random(0)
    kills = 0
    for _ in range(10):
        # The time to the first row depends on the machine: a kill comes at a random time after some more rows.
        before = path.stat().st_size if path.exists() else 0
        process = context.Process(target=run_in_child, args=(folder, path, options))
        process.start()
        while process.is_alive() and not (path.exists() and path.stat().st_size > before):
            process.join(0.002)
        process.join(chance.uniform(0, 0.02))
        if process.is_alive() and kills < 4:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
    assert kills >= 3 and process.exitcode == 0
    assert path.read_bytes().splitlines(keepends=True) == lines


@pytest.mark.parametrize("format", ["text", "json", "jsonl"])
def test_each_format_goes_to_the_screen_or_a_file(format, folder, options, tmp_path, capsys):  # noqa: A002
    path = tmp_path / "out"
    path.write_text("mine", encoding="utf-8")
    sources = [folder / "a.png", folder / "damaged.png"]
    assert report_files(sources, format=format, **options)["errors"] == 1
    printed = capsys.readouterr().out
    if format == "jsonl":
        with pytest.raises(ValueError, match="exists, and not as a table of m3fm"):
            report_files(sources, format=format, output=path, **options)
        path.unlink()
    report_files(sources, format=format, output=path, **options)
    assert path.read_text(encoding="utf-8") == printed
    if format == "text":
        assert printed.startswith(f"{folder / 'a.png'}") and "\n  English\n    " in printed
        assert "damaged" not in printed
    else:
        rows = json.loads(printed) if format == "json" else [json.loads(line) for line in printed.splitlines()]
        assert [row["source"] for row in rows] == list(map(str, sources))


def test_what_does_not_fit_is_refused_before_anything_is_written(folder, options, tmp_path):
    path = tmp_path / "out.jsonl"
    for changed, message in (
        ({"format": "xml"}, r"one of \['text', 'json', 'jsonl'\], got 'xml'"),
        ({"language": "fr"}, r"Unsupported language \['fr'\]"),
        ({"on_suspect": "pass"}, "Expected on_suspect to be"),
        ({"num_workers": -1}, "Expected num_workers to be a whole number"),
        ({"batch_size": 0}, "Expected batch_size to be a whole number"),
        ({"model": "absent"}, "absent is not a checkpoint"),
        ({"output": "no/such/folder/out"}, "expected a file in a folder that exists"),
        ({"files": []}, "Expected files or a folder"),
    ):
        with pytest.raises(ValueError, match=message):
            report_files(**{"files": folder, "output": path, **options, **changed})
    assert not path.exists()
