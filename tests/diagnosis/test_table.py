# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
import csv
import functools
import json

import pytest
from PIL import Image

from m3fm.diagnosis import default_diagnosis, table
from m3fm.diagnosis.table import COLUMNS, diagnose_files
from m3fm.evaluation.runs import NOTICE
from m3fm.study_pipeline_m3fm import StudyReader
from tests.phantoms import radiograph_pixels

LABELS = ["TB", "正常"]


@pytest.fixture
def checkpoint(tiny_checkpoint, monkeypatch):
    """A calibrated checkpoint, which the runs of a test load once."""
    monkeypatch.setattr(table, "_load", functools.cache(table._load))
    path = tiny_checkpoint / "config.json"
    diagnosis = default_diagnosis()
    fitted = {"calibration": {"scale": 0.5, "bias": 0.2}, "threshold": 0.5, "fitted_on": "made-up studies"}
    diagnosis["tuberculosis"] |= fitted
    config = json.loads(path.read_text(encoding="utf-8")) | {"diagnosis": diagnosis}
    path.write_text(json.dumps(config), encoding="utf-8")
    return tiny_checkpoint


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "scans"
    (folder / "more").mkdir(parents=True)
    for seed, name in enumerate(("b.png", "a, “odd”.jpg", "more/c.PNG")):
        Image.fromarray(radiograph_pixels(seed)).save(folder / name)
    (folder / "d.png").write_text("not an image\n", encoding="utf-8")
    (folder / "notes.txt").write_text("not read", encoding="utf-8")
    (folder / ".hidden.png").write_bytes(b"")
    return folder


ORDER = ["a, “odd”.jpg", "b.png", "d.png", "more/c.PNG"]


def read(path):
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_a_folder_becomes_a_table(checkpoint, folder, tmp_path):
    counts = diagnose_files(folder, LABELS, tmp_path / "out.csv", model=checkpoint, batch_size=2)
    assert counts == {"studies": 4, "errors": 1, "resumed": 0}
    rows = read(tmp_path / "out.csv")
    assert list(rows[0]) == list(COLUMNS)
    readable = [name for name in ORDER if name != "d.png"]
    expected = [(name, label) for name in ORDER for label in (LABELS if name in readable else [""])]
    assert [(row["source"], row["label"]) for row in rows] == expected
    assert {row["notice"] for row in rows} == {NOTICE}
    for row in rows:
        if row["source"] == "d.png":
            assert "not a readable image" in row["error"] and row["probability"] == row["decision"] == ""
        elif row["label"] == "TB":
            assert row["decision"] == ("yes" if float(row["probability"]) >= 0.5 else "no")
            assert (row["threshold"], row["calibration"]) == ("0.5", "fitted on made-up studies")
        else:
            assert (row["threshold"], row["decision"], row["calibration"]) == ("", "", "none")
            assert 0 < float(row["probability"]) < 1
    record = json.loads((tmp_path / "out.csv.run.json").read_text(encoding="utf-8"))
    assert (record["notice"], record["model"]) == (NOTICE, "tiny")
    assert [label["key"] for label in record["labels"]] == ["tuberculosis", "no_finding"]


def test_both_formats_say_the_same(checkpoint, folder, tmp_path):
    diagnose_files(folder, LABELS, tmp_path / "out.csv", model=checkpoint)
    diagnose_files(folder, LABELS, tmp_path / "out.jsonl", format="jsonl", model=checkpoint)
    lines = read(tmp_path / "out.jsonl")
    assert [{name: "" if value is None else str(value) for name, value in row.items()} for row in lines] == read(
        tmp_path / "out.csv"
    )
    assert lines[0]["probability"] == float(read(tmp_path / "out.csv")[0]["probability"])


class Killed(BaseException):
    """Ends a run as a signal does."""


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_a_killed_run_goes_on(form, checkpoint, folder, tmp_path, monkeypatch):
    whole, path = tmp_path / f"whole.{form}", tmp_path / f"out.{form}"
    options = {"labels": LABELS, "format": form, "model": checkpoint, "batch_size": 1}
    diagnose_files(folder, output=whole, **options)
    read_study = StudyReader.__call__

    def stop(reader, item):
        if item[0][0].name == "d.png":
            raise Killed
        return read_study(reader, item)

    monkeypatch.setattr(StudyReader, "__call__", stop)
    with pytest.raises(Killed):
        diagnose_files(folder, output=path, **options)
    assert len(read(path)) == 4
    killed, done = path.read_bytes(), []
    monkeypatch.setattr(
        StudyReader, "__call__", lambda reader, item: done.append(item[0][0].name) or read_study(reader, item)
    )
    # What a kill in the middle of a write leaves.
    for cut in (0, 1, 25, 150):
        path.write_bytes(killed[: len(killed) - cut])
        done.clear()
        counts = diagnose_files(folder, output=path, **options)
        assert path.read_bytes() == whole.read_bytes(), cut
        assert counts["resumed"] == 4 - len(done) == (2 if cut == 0 else 1), cut
        done.clear()
        assert diagnose_files(folder, output=path, **options) == {"studies": 4, "errors": 1, "resumed": 4}
        assert done == [] and path.read_bytes() == whole.read_bytes(), cut


def test_files_that_came_in_take_their_place(checkpoint, folder, tmp_path):
    path = tmp_path / "out.csv"
    diagnose_files(folder, LABELS, path, model=checkpoint)
    (folder / "aa.png").write_bytes((folder / "b.png").read_bytes())
    assert diagnose_files(folder, LABELS, path, model=checkpoint) == {"studies": 5, "errors": 1, "resumed": 4}
    assert list(dict.fromkeys(row["source"] for row in read(path))) == [ORDER[0], "aa.png", *ORDER[1:]]
    (folder / "aa.png").unlink()
    with pytest.raises(ValueError, match="holds 1 studies that are not among the files"):
        diagnose_files(folder, LABELS, path, model=checkpoint)
    assert diagnose_files(folder, LABELS, path, model=checkpoint, resume=False)["studies"] == 4


def test_the_table_of_other_settings_is_kept(checkpoint, folder, tmp_path):
    path = tmp_path / "out.csv"
    diagnose_files(folder, LABELS, path, model=checkpoint)
    before = path.read_bytes()
    for changed, reason in (
        ({"labels": ["TB"]}, "another labels"),
        ({"labels": LABELS, "exclusive": True}, "another exclusive"),
        ({"labels": LABELS, "format": "jsonl"}, "another format"),
    ):
        with pytest.raises(ValueError, match=reason):
            diagnose_files(folder, output=path, model=checkpoint, **changed)
    mine = tmp_path / "mine.csv"
    mine.write_text("mine", encoding="utf-8")
    with pytest.raises(ValueError, match="not as a table of m3fm"):
        diagnose_files(folder, LABELS, mine, model=checkpoint)
    assert (path.read_bytes(), mine.read_text(encoding="utf-8")) == (before, "mine")


def test_labels_come_from_a_file(checkpoint, folder, tmp_path):
    path = tmp_path / "labels.yaml"
    own = "  present: {en: [Miliary nodules.]}\n  absent: {en: [No miliary nodules.]}\n"
    path.write_text(
        f"exclusive: true\ntuberculosis:\nmiliary:\n{own}normal: {{finding: no_finding}}\n", encoding="utf-8"
    )
    diagnose_files(folder / "b.png", path, tmp_path / "out.csv", model=checkpoint)
    rows = read(tmp_path / "out.csv")
    assert [row["label"] for row in rows] == ["tuberculosis", "miliary", "normal"]
    assert sum(float(row["probability"]) for row in rows) == pytest.approx(1, abs=1e-3)
    assert {row["calibration"] for row in rows} == {"none"}
    path.write_text("[肺结核, pneumonia]", encoding="utf-8")
    diagnose_files([folder / "b.png"], [str(path)], tmp_path / "two.csv", model=checkpoint)
    assert [row["label"] for row in read(tmp_path / "two.csv")] == ["肺结核", "pneumonia"]


def test_a_data_folder_gives_its_studies(checkpoint, folder, tmp_path):
    rows = [
        {"file_name": "b.png", "study_id": "secret", "labels": ["of no set"]},
        {"file_name": "more/c.PNG", "study_id": "secret"},
        {"file_name": "gone.png"},
        {"file_name": "a, “odd”.jpg", "study_id": "ct", "modality": "ct"},
    ]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    counts = diagnose_files(folder, None, tmp_path / "out.csv", model=checkpoint)
    assert counts == {"studies": 3, "errors": 1, "resumed": 0}
    written = read(tmp_path / "out.csv")
    assert [(row["source"], row["label"]) for row in written] == [
        ("b.png;more/c.PNG", "tuberculosis"),
        ("gone.png", ""),
        ("a, “odd”.jpg", "tuberculosis"),
    ]
    assert "secret" not in (tmp_path / "out.csv").read_text(encoding="utf-8")


def test_without_output_it_is_printed(checkpoint, folder, capsys):
    diagnose_files([folder / "b.png"], ["TB"], model=checkpoint)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == ",".join(COLUMNS)
    assert lines[1].startswith(f"{folder / 'b.png'},TB,0.") and len(lines) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": ["tubercolosis"]}, "expected for instance tuberculosis"),
        ({"labels": "absent.yaml"}, "absent.yaml: no such label file"),
        ({"format": "xlsx"}, r"one of \['csv', 'jsonl'\], got 'xlsx'"),
        ({"batch_size": 0}, "batch_size"),
        ({"report_language": "fr"}, "report_language 'fr'"),
        ({"on_error": "ignore"}, "on_error"),
        ({"output": "no/such/folder/out.csv"}, "a file in a folder that exists"),
        ({"files": []}, "Expected files or a folder"),
        ({"model": "nowhere"}, "nowhere is not a checkpoint"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(options, message, checkpoint, folder, tmp_path):
    path = tmp_path / "out.csv"
    with pytest.raises(ValueError, match=message):
        diagnose_files(**{"files": folder, "labels": LABELS, "output": path, "model": checkpoint} | options)
    assert not path.exists()


def test_odd_sources_are_refused(checkpoint, folder, tmp_path):
    image = folder / "b.png"
    with pytest.raises(ValueError, match="each study once"):
        diagnose_files([image, image], LABELS, tmp_path / "out.csv", model=checkpoint)
    with pytest.raises(ValueError, match="would replace an image"):
        diagnose_files([image], LABELS, image, model=checkpoint)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no chest image in this folder"):
        diagnose_files(tmp_path / "empty", LABELS, tmp_path / "out.csv", model=checkpoint)
    (folder / "metadata.jsonl").write_text('{"image": 1}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"metadata\.jsonl, line 1: expected a JSON object with file_name"):
        diagnose_files(folder, LABELS, tmp_path / "out.csv", model=checkpoint)


def test_the_first_error_may_end_the_run(checkpoint, folder, tmp_path):
    with pytest.raises(ValueError, match=r"d\.png: not a readable image"):
        diagnose_files(folder, LABELS, tmp_path / "out.csv", model=checkpoint, on_error="raise", batch_size=1)
    assert {row["source"] for row in read(tmp_path / "out.csv")} == set(ORDER[:2])
