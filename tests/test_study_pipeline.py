# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""What both pipelines do with images that are no chest study: refuse or warn, before the model or after its tower."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import pipeline

from m3fm import M3FMReportPipeline
from m3fm.chest_image_m3fm import ChestImage, Remark
from m3fm.diagnosis_pipeline_m3fm import M3FMDiagnosisPipeline
from m3fm.input_check_m3fm import StudyCheck
from m3fm.study_pipeline_m3fm import RefusedInput
from tests.phantoms import radiograph_pixels

SHORT = {"max_new_tokens": 6}
REFUSED = Remark("not_a_chest", "seen as something else", "refuse", 0.99, 0.5)


class FakeCheck:
    """Refuses images of 20 rows by their pixels, those of 30 rows by what the tower says, and warns of 40 rows."""

    def __init__(self):
        self.judged: list[tuple[int, ...]] = []

    def look(self, images: list[ChestImage]) -> StudyCheck:
        rows = min(image.pixels.shape[1] for image in images)
        check = StudyCheck(images=rows, modality="cxr", modality_from="file")
        if rows == 20:
            return check.remarked(REFUSED)
        return check.remarked(Remark("low_contrast", "few grey levels", "warning")) if rows == 40 else check

    def upright(self, images: list[ChestImage], check: StudyCheck) -> tuple[list[ChestImage], StudyCheck]:
        return images, check

    def judge(self, check: StudyCheck, tokens: torch.Tensor, image_mask: torch.Tensor) -> StudyCheck:
        self.judged.append((*tokens.shape[:1], *image_mask.shape))
        return check.remarked(REFUSED) if check.images == 30 else check


@pytest.fixture
def images(tmp_path) -> dict[int, str]:
    """Image files by their rows."""
    paths = {rows: tmp_path / f"{rows}.png" for rows in (20, 30, 40, 50)}
    for rows, path in paths.items():
        Image.fromarray(radiograph_pixels(rows, rows, 40)).save(path)
    return {rows: str(path) for rows, path in paths.items()}


@pytest.fixture(params=["m3fm-report", "m3fm-diagnosis"])
def ask(request, tiny_model, tiny_processor):
    made = {"m3fm-report": M3FMReportPipeline, "m3fm-diagnosis": M3FMDiagnosisPipeline}[request.param]
    pipe = made(model=tiny_model, processor=tiny_processor)
    pipe.input_check = FakeCheck()
    settings = {"m3fm-report": {"generate_kwargs": SHORT}, "m3fm-diagnosis": {"candidate_labels": ["tuberculosis"]}}

    def call(studies, **arguments):
        return pipe(studies, **settings[request.param], **arguments)

    call.pipe = pipe
    call.said = {"m3fm-report": "report_en", "m3fm-diagnosis": "labels"}[request.param]
    return call


@pytest.mark.parametrize("rows", [20, 30])
def test_refused_study_raises_with_what_was_seen(ask, images, rows):
    with pytest.raises(RefusedInput, match=rf"{rows}\.png: refused: seen as something else") as refusal:
        ask(images[rows])
    assert isinstance(refusal.value, ValueError)
    assert refusal.value.check.as_dict()["verdict"] == "refused"
    again = pickle.loads(pickle.dumps(refusal.value))  # as from a process that reads ahead
    assert str(again) == str(refusal.value) and again.check == refusal.value.check


@pytest.mark.parametrize(("batch_size", "num_workers"), [(1, 0), (3, 0), (5, 2)])
def test_refused_studies_are_rows_in_their_place(ask, images, batch_size, num_workers):
    studies = [images[50], images[20], images[30], "absent.png", images[40]]
    rows = ask(studies, on_error="row", batch_size=batch_size, num_workers=num_workers)
    assert [set(row) for row in rows] == [
        {"modality", ask.said, "input_check"},
        {"error", "input_check"},
        {"error", "input_check"},
        {"error"},
        {"modality", ask.said, "input_check"},
    ]
    assert [row["input_check"]["verdict"] for row in rows if "input_check" in row] == [
        "ok",
        "refused",
        "refused",
        "suspect",
    ]
    assert rows[1]["input_check"]["findings"] == [
        {"code": "not_a_chest", "message": "seen as something else", "severity": "refuse", "value": 0.99, "limit": 0.5}
    ]
    assert rows[0] == ask(images[50]) and rows[4] == ask(images[40])


def test_on_suspect_warn_answers_all_and_says_so(ask, images):
    rows = ask([images[rows] for rows in (20, 30, 50)], on_suspect="warn", batch_size=2)
    assert [row["input_check"]["verdict"] for row in rows] == ["refused", "refused", "ok"]
    assert all(ask.said in row for row in rows)
    assert ask(images[30], on_suspect="warn") == rows[1]


def test_what_pixels_refuse_never_reaches_the_model(ask, images):
    ask([images[20]] * 3, on_error="row", batch_size=2)
    assert ask.pipe.input_check.judged == []
    ask([[images[50]], [images[50], images[40]]], batch_size=2)
    assert ask.pipe.input_check.judged == [(2, 2)] * 2  # the images of a study, padded to those of the batch


def test_on_suspect_of_the_construction_is_the_default_of_calls(tiny_checkpoint, images):
    pipe = pipeline("m3fm-report", model=str(tiny_checkpoint), on_suspect="warn", num_workers=1, generate_kwargs=SHORT)
    pipe.input_check = FakeCheck()
    assert "report_en" in pipe(images[20])
    with pytest.raises(RefusedInput):
        pipe(images[20], on_suspect="refuse")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"on_suspect": "ignore"}, "Expected on_suspect to be 'refuse' or 'warn', got 'ignore'"),
        ({"num_workers": -1}, "Expected num_workers to be a whole number >= 0, got -1"),
    ],
)
def test_wrong_arguments(ask, images, arguments, reason):
    with pytest.raises(ValueError, match=reason):
        ask(images[50], **arguments)


def test_encoded_image_of_a_data_set_is_one_image(ask, images):
    with open(images[50], "rb") as file:
        value = {"bytes": file.read(), "path": None}
    assert ask(value) == ask({"image": value, "name": "a"}) == ask(images[50])


def test_array_like_is_one_study(ask, images):
    class ArrayLike:
        def __array__(self, dtype=None, copy=None):
            return np.asarray(Image.open(images[50]))

        def __iter__(self):
            raise AssertionError("taken for a list of studies")

    assert ask(ArrayLike()) == ask(images[50])


def test_image_of_simpleitk_is_one_study(ask, images):
    sitk = pytest.importorskip("SimpleITK")
    pixels = np.asarray(Image.open(images[50]))
    assert ask(sitk.GetImageFromArray(pixels))["input_check"]["images"] == 50  # of `FakeCheck`: its rows


def test_checkpoint_without_a_check_has_one_of_statistics(tiny_checkpoint, tiny_model, tiny_processor):
    from m3fm import M3FMReportPipeline

    for pipe in (
        pipeline("m3fm-report", model=str(tiny_checkpoint)),
        M3FMReportPipeline(model=tiny_model, processor=tiny_processor),
    ):
        blank = pipe(np.zeros((256, 256), np.uint8), on_error="row")
        assert "refused" in blank["error"] and [each["code"] for each in blank["input_check"]["findings"]] == ["blank"]
