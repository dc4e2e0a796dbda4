# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
import json

import pytest

import m3fm
from m3fm.data import Study
from m3fm.evaluation.runs import (
    command_line,
    complete_predictions,
    group_numbers,
    library_versions,
    open_output,
    write_json,
)


def study(name, patient=None, group=""):
    return Study(name, "made_up", "cxr", (), patient, {}, None, None, group)


def test_predictions_are_written_a_line_a_study(tmp_path):
    path = tmp_path / "predictions.jsonl"
    studies = [study(f"s{i}") for i in range(5)]
    rows = complete_predictions(path, studies, 2, lambda batch: [{"text": f"肺 {s.study_id}"} for s in batch], "x")
    assert rows == [{"study_id": f"s{i}", "text": f"肺 s{i}"} for i in range(5)]
    assert rows == [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_an_interrupted_run_goes_on_after_its_last_whole_line(tmp_path):
    path = tmp_path / "predictions.jsonl"
    studies = [study(f"s{i}") for i in range(7)]
    seen = []

    def predict(batch):
        if len(seen) == 4 and interrupt:
            raise KeyboardInterrupt
        seen.extend(each.study_id for each in batch)
        return [{"text": "x"}] * len(batch)

    interrupt = True
    with pytest.raises(KeyboardInterrupt):
        complete_predictions(path, studies, 2, predict, "x")
    before = path.read_bytes()
    assert before.count(b"\n") == 4
    path.write_bytes(before + '{"study_id": "s4", "text": "半'.encode()[:-1])
    interrupt = False
    rows = complete_predictions(path, studies, 2, predict, "x")
    assert [row["study_id"] for row in rows] == seen == [each.study_id for each in studies]
    assert path.read_bytes().startswith(before)
    assert path.read_bytes().count(b"\n") == 7
    complete_predictions(path, studies, 2, lambda _: pytest.fail("computed again"), "x")


def test_damaged_predictions_and_wrong_predictors_are_refused(tmp_path):
    path = tmp_path / "predictions.jsonl"
    studies = [study("a"), study("b")]
    with pytest.raises(ValueError, match="Expected 2 predictions, got 1"):
        complete_predictions(path, studies, 2, lambda _: [{}], "x")
    with pytest.raises(ValueError, match="some that repeat"):
        complete_predictions(path, studies[:1] * 2, 2, lambda _: [{}], "x")
    with pytest.raises(ValueError, match="batch_size >= 1"):
        complete_predictions(path, studies, 0, lambda _: [{}], "x")
    path.write_text('{"study_id": "a"}\nnot json\n')
    with pytest.raises(ValueError, match="line 2: expected a prediction"):
        complete_predictions(path, studies, 2, lambda _: [{}], "x")


def test_the_folder_of_another_run_is_refused(tmp_path):
    run = {"task": "report", "languages": ("en", "zh")}
    assert open_output(tmp_path / "out", run) == open_output(tmp_path / "out", run) == tmp_path / "out"
    with pytest.raises(ValueError, match="another seed, task: expected another output folder"):
        open_output(tmp_path / "out", run | {"task": "diagnosis", "seed": 1})
    (tmp_path / "out" / "run.json").write_text("{")
    with pytest.raises(ValueError, match="run.json is damaged"):
        open_output(tmp_path / "out", run)
    (tmp_path / "out" / "run.json").unlink()
    (tmp_path / "out" / "predictions.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"predictions.jsonl without run.json"):
        open_output(tmp_path / "out", run)


def test_json_has_null_for_what_is_no_number(tmp_path):
    write_json(tmp_path / "x.json", {"a": [float("nan"), (1.5, float("inf"))], "肺": {"b": float("-inf")}})
    assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8")) == {
        "a": [None, [1.5, None]],
        "肺": {"b": None},
    }
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_groups_are_numbered_without_identifiers():
    studies = [study("a", "secret-1"), study("b", "secret-2"), study("c", "secret-1"), study("d"), study("e")]
    assert group_numbers(studies) == [0, 1, 0, 2, 3]
    assert group_numbers([study("a", "p", "paper"), study("b", "q", "paper")]) == [0, 0]


def test_the_command_repeats_the_run():
    options = {"data": "../data/my set", "language": ["en", "zh"], "num_beams": None, "batch_size": 8}
    assert command_line("report", m3fm.DEFAULT_CHECKPOINT, options) == (
        "m3fm evaluate --task report --data '../data/my set' --language en zh --batch-size 8"
    )
    assert "--model runs/mine" in command_line("report", "runs/mine", {})


def test_versions_name_what_numbers_depend_on():
    versions = library_versions()
    assert versions["m3fm"] == m3fm.__version__
    assert {"python", "torch", "transformers", "numpy"} <= versions.keys()
