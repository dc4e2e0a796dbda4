# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Explaining files: what is written, what is not, unreadable files, wrong requests."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from m3fm.explain import Explainer
from m3fm.explain_files import explain_files

pytest.importorskip("matplotlib")


@pytest.fixture
def explainer(tiny_model, tiny_processor) -> Explainer:
    return Explainer(tiny_model, tiny_processor)


@pytest.fixture
def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (40, 30), dtype=np.uint8)


@pytest.fixture
def file(tmp_path, picture) -> Path:
    path = tmp_path / "Jane-Doe-1970.png"
    Image.fromarray(picture).save(path)
    return path


def test_files_are_explained_as_picture_and_data(explainer, file, tmp_path):
    output = tmp_path / "out"
    rows = explain_files([file], ["右肺结节"], ["nodule"], output_dir=output, model=explainer)
    assert [(row["phrase"], row["finding"]) for row in rows] == [("右肺结节", None), ("nodule", "nodule")]
    assert {path.name for path in output.iterdir()} == {
        *("explanations.jsonl", "0001-01.png", "0001-01.safetensors", "0001-02.png", "0001-02.safetensors"),
    }
    written = [json.loads(line) for line in (output / "explanations.jsonl").read_text(encoding="utf-8").splitlines()]
    assert written == json.loads(json.dumps(rows))
    assert all("research" in row["notice"] for row in rows)
    data = load_file(output / "0001-02.safetensors")
    heat_map = explainer.heat_map(file, "nodule")
    assert np.array_equal(data["map_000"], heat_map.maps[0])
    assert rows[1]["top"]["peak"]["value"] == pytest.approx(float(data["map_000"].max()))
    assert data["attention"] == pytest.approx([1])
    with Image.open(output / "0001-01.png") as opened:
        assert opened.format == "PNG"


def test_names_of_files_stand_in_source_alone(explainer, file, tmp_path):
    output = tmp_path / "out"
    explain_files([file], ["nodule"], output_dir=output, model=explainer, report_language="en")
    for path in output.iterdir():
        content = path.read_bytes().replace(json.dumps(str(file)).encode(), b"")
        assert b"Jane" not in content
        assert "Jane" not in path.name


def test_nothing_of_a_dicom_header_is_written(explainer, tmp_path):
    pydicom = pytest.importorskip("pydicom")
    from pydicom.data import get_testdata_file

    dataset = pydicom.dcmread(get_testdata_file("CT_small.dcm"))
    dataset.PatientName, dataset.PatientID = "Secret^Name", "SECRET-ID"
    path = tmp_path / "a.dcm"
    dataset.save_as(path)
    rows = explain_files([path], ["nodule"], output_dir=tmp_path / "out", model=explainer)
    assert rows[0]["modality"] == "ct"
    for written in (tmp_path / "out").iterdir():
        assert b"secret" not in written.read_bytes().lower()


def test_a_report_is_weighed(explainer, file, tmp_path):
    explainer.model.generation_config.max_new_tokens = 8
    output = tmp_path / "out"
    (row,) = explain_files([file], output_dir=output, model=explainer, report_language="en")
    assert set(row) == {"source", "report_en", "sentences", "page", "notice"}
    assert {path.name for path in output.iterdir()} == {"evidence.jsonl", "0001-report.html"}


def test_a_file_that_cannot_be_read_takes_a_row_or_raises(explainer, file, tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    rows = explain_files([bad, file], ["nodule"], output_dir=tmp_path / "o", model=explainer, on_error="row")
    assert set(rows[0]) == {"source", "error"}
    assert str(bad) not in rows[0]["error"]
    assert rows[1]["picture"] == "0002-01.png"
    with pytest.raises(ValueError, match="not a readable image"):
        explain_files([bad, file], ["nodule"], output_dir=tmp_path / "o", model=explainer)


def test_wrong_requests_write_nothing(explainer, file, tmp_path):
    output = tmp_path / "out"
    for wrong in (
        {},
        {"labels": ["no such thing"]},
        {"phrases": [""]},
        {"phrases": ["nodule"], "on_error": "skip"},
        {"phrases": ["nodule"], "method": "rollout"},
        {"report_language": "de"},
    ):
        with pytest.raises(ValueError, match=r".+"):
            explain_files([file], output_dir=output, model=explainer, **wrong)
    with pytest.raises(ValueError, match="is a file"):
        explain_files([file], ["nodule"], output_dir=file, model=explainer)
    assert not output.exists()
