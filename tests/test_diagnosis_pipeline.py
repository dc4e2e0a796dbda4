# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""The diagnosis pipeline: shapes of input and output, names in two languages, calibration."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline

from m3fm import DEFAULT_CHECKPOINT, M3FMForReportGeneration
from m3fm.diagnosis import default_diagnosis
from m3fm.diagnosis_m3fm import label_phrases, mean_phrases, zero_shot_logits
from m3fm.diagnosis_pipeline_m3fm import M3FMDiagnosisPipeline
from m3fm.evaluation.probes import ZeroShot
from m3fm.hub import export_remote_code
from tests.phantoms import radiograph_pixels

LABELS = ["tuberculosis", "normal", "pneumonia"]
CHINESE = ["肺结核", "正常", "肺炎"]
CALIBRATION = {"calibration": {"scale": 0.5, "bias": 0.25}, "threshold": 0.5, "fitted_on": "made-up studies"}


@pytest.fixture
def images(tmp_path) -> list[str]:
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for seed, path in enumerate(paths):
        Image.fromarray(radiograph_pixels(seed)).save(path)
    return [str(path) for path in paths]


@pytest.fixture
def diagnose(tiny_model, tiny_processor) -> M3FMDiagnosisPipeline:
    tiny_model.generation_config.max_new_tokens = 6
    return M3FMDiagnosisPipeline(model=tiny_model, processor=tiny_processor)


@pytest.fixture
def calibrated(diagnose) -> M3FMDiagnosisPipeline:
    table = default_diagnosis()
    table["tuberculosis"] |= CALIBRATION
    diagnose.model.config.diagnosis = table
    return diagnose


def scores(row) -> dict[str, float]:
    return {answer["label"]: answer["score"] for answer in row["labels"]}


def test_one_study_gives_a_dict_with_the_most_probable_first(diagnose, images):
    row = diagnose(images[0], candidate_labels=LABELS)
    assert list(row) == ["modality", "labels", "input_check"]
    assert {answer["label"] for answer in row["labels"]} == set(LABELS)
    found = [answer["score"] for answer in row["labels"]]
    assert found == sorted(found, reverse=True)
    assert all(0 < score < 1 for score in found)
    assert all(
        (answer["threshold"], answer["decision"], answer["calibrated"]) == (None, None, False)
        for answer in row["labels"]
    )


def test_names_in_both_languages_give_equal_scores(diagnose, images):
    english, chinese = (diagnose(images, candidate_labels=labels, batch_size=3) for labels in (LABELS, CHINESE))
    for first, second in zip(english, chinese, strict=True):
        assert [scores(first)[name] for name in LABELS] == [scores(second)[name] for name in CHINESE]


def test_scores_are_those_of_the_evaluation(diagnose, images, tiny_checkpoint):
    model, processor = AutoModel.from_pretrained(tiny_checkpoint), AutoProcessor.from_pretrained(tiny_checkpoint)

    def embed(texts):
        return model.get_text_features(**processor(text=texts, return_tensors="pt")).numpy()

    with torch.no_grad():
        features = model.get_image_features(**processor(images=images, return_tensors="pt")).numpy()
        table, keys = default_diagnosis(), ["tuberculosis", "no_finding", "pneumonia"]
        vectors = [
            mean_phrases([[t for ts in label_phrases(table, key, kind).values() for t in ts] for key in keys], embed)
            for kind in ("present", "absent")
        ]
    for exclusive in (False, True):
        system = ZeroShot(LABELS, *vectors, float(model.logit_scale.detach().exp()), exclusive)
        expected = system.predict({"shared": features})
        rows = diagnose(images, candidate_labels=LABELS, exclusive=exclusive)
        for place, row in enumerate(rows):
            assert scores(row) == pytest.approx({name: expected[name][place] for name in LABELS}, abs=1e-4)
    logits = zero_shot_logits(features, *vectors, system.scale)
    assert np.ptp(logits) > 0


def test_exclusive_scores_sum_to_one(calibrated, images):
    for language in (None, "zh"):
        rows = calibrated(images, candidate_labels=LABELS, exclusive=True, report_language=language)
        for row in rows:
            assert sum(scores(row).values()) == pytest.approx(1, abs=1e-3)
            assert not any(answer["calibrated"] or answer["decision"] is not None for answer in row["labels"])


def test_a_calibration_is_applied_and_decides(calibrated, images):
    rows = calibrated(images, candidate_labels=["TB", "normal"])
    calibrated.model.config.diagnosis = {}
    plain = calibrated(images, candidate_labels=["TB", "normal"])
    for row, before in zip(rows, plain, strict=True):
        answer = next(each for each in row["labels"] if each["label"] == "TB")
        logit = np.log(scores(before)["TB"] / (1 - scores(before)["TB"]))
        assert answer["score"] == pytest.approx(1 / (1 + np.exp(-(0.5 * logit + 0.25))))
        assert answer["decision"] is (answer["score"] >= 0.5)
        assert (answer["threshold"], answer["calibrated"]) == (0.5, True)
        assert scores(row)["normal"] == scores(before)["normal"]


def test_calibrated_labels_are_the_default(calibrated, images):
    assert list(scores(calibrated(images[0]))) == ["tuberculosis"]
    calibrated.model.config.diagnosis = {}
    with pytest.raises(ValueError, match="expected candidate_labels"):
        calibrated(images[0])


def test_the_report_may_have_a_say(calibrated, images):
    row = calibrated(images[0], candidate_labels=["TB"], report_language="zh")
    assert list(row) == ["modality", "report_zh", "labels", "input_check"]
    assert not row["labels"][0]["calibrated"]
    calibrated.model.config.diagnosis_report_weight = 0.0
    unheard = calibrated(images[0], candidate_labels=["TB"], report_language="zh")
    calibrated.model.config.diagnosis = {}
    alone = calibrated(images[0], candidate_labels=["TB"])
    assert scores(unheard)["TB"] == pytest.approx(scores(alone)["TB"], abs=1e-4)
    assert scores(row)["TB"] != pytest.approx(scores(alone)["TB"], abs=1e-4)
    # The report alone decides: its text, embedded, is as good as the image.
    calibrated.model.config.diagnosis_report_weight = 1.0
    only = calibrated(images[0], candidate_labels=["TB"], report_language="zh")
    scored = calibrated.score_labels(["TB"])
    logit = scored.logits(calibrated._embed_texts([row["report_zh"]]), None)[0, 0]
    assert scores(only)["TB"] == pytest.approx(1 / (1 + np.exp(-logit)), abs=1e-4)


def test_lists_streams_studies_and_batches(diagnose, images):
    rows = diagnose(images, candidate_labels=LABELS)
    assert diagnose([images[0]], candidate_labels=LABELS) == rows[:1]
    assert diagnose([], candidate_labels=LABELS) == []
    read: list[str] = []

    def studies() -> Iterator[str]:
        for path in images:
            read.append(path)
            yield path

    stream = diagnose(studies(), candidate_labels=LABELS, batch_size=2)
    assert isinstance(stream, Iterator) and read == []
    first = next(stream)
    assert read == images[:2]
    for row, expected in zip([first, *stream], rows, strict=True):
        assert scores(row) == pytest.approx(scores(expected), abs=1e-4)
    both = diagnose([[images[0], images[1]], {"image": images[2]}], candidate_labels=LABELS, batch_size=2)
    assert scores(both[1]) == pytest.approx(scores(rows[2]), abs=1e-4)
    with Image.open(images[0]) as image:
        assert diagnose(image, candidate_labels=LABELS) == rows[0]
        assert diagnose(np.asarray(image), candidate_labels=LABELS) == rows[0]


def test_unreadable_studies_keep_their_place(diagnose, images):
    rows = diagnose(["absent.png", images[0], []], candidate_labels=["TB"], on_error="row", batch_size=3)
    assert [set(row) for row in rows] == [{"error"}, {"modality", "labels", "input_check"}, {"error"}]
    assert "absent.png: no such file" in rows[0]["error"]
    with pytest.raises(ValueError, match=r"absent\.png: no such file"):
        diagnose([images[0], "absent.png"], candidate_labels=["TB"])


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"candidate_labels": ["tubercolosis"]}, "expected for instance tuberculosis"),
        ({"candidate_labels": ["TB", "tuberculosis"]}, "each label once"),
        ({"candidate_labels": ["TB"], "exclusive": True}, "two candidate labels that exclude each other"),
        ({"candidate_labels": ["TB"], "exclusive": "yes"}, "exclusive to be True or False, got 'yes'"),
        ({"candidate_labels": ["TB"], "report_language": "fr"}, r"'fr': expected one of \['en', 'zh'\]"),
        ({"candidate_labels": ["TB"], "on_error": "ignore"}, "'raise' or 'row', got 'ignore'"),
        ({"candidate_labels": ["TB"], "batch_size": 0}, "whole number >= 1, got 0"),
        ({"candidate_labels": ["TB"], "hypothesis_template": "{}"}, r"unknown arguments \['hypothesis_template'\]"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_read(diagnose, arguments, reason):
    with pytest.raises(ValueError, match=reason):
        diagnose(["absent.png"], **arguments)


def test_arguments_of_the_construction_are_the_defaults_of_calls(tiny_checkpoint, images):
    diagnose = pipeline(
        "m3fm-diagnosis",
        model=str(tiny_checkpoint),
        pipeline_class=M3FMDiagnosisPipeline,
        candidate_labels=["TB"],
        on_error="row",
        batch_size=2,
    )
    rows = diagnose([*images, "absent.png"])
    assert [set(row) for row in rows] == [{"modality", "labels", "input_check"}] * 3 + [{"error"}]
    assert list(scores(diagnose(images[0], candidate_labels=["normal"]))) == ["normal"]
    with pytest.raises(ValueError, match="'fever' is not a known label"):
        pipeline("m3fm-diagnosis", model=str(tiny_checkpoint), candidate_labels=["fever"])


def test_labels_of_a_call_compete_as_the_construction_says(tiny_model, tiny_processor, images):
    diagnose = M3FMDiagnosisPipeline(model=tiny_model, processor=tiny_processor, exclusive=True)
    own = {"TB": None, "miliary": {"present": ["Miliary nodules."]}}
    assert sum(scores(diagnose(images[0], candidate_labels=own)).values()) == pytest.approx(1, abs=1e-3)
    with pytest.raises(ValueError, match="'miliary' is not a known label"):
        diagnose(images[0], candidate_labels=own, exclusive=False)


def test_the_shipped_checkpoint_reads_the_examples():
    folder = Path(__file__).parents[1] / "examples"
    model = AutoModelForImageTextToText.from_pretrained(DEFAULT_CHECKPOINT, dtype=torch.float32)
    diagnose = M3FMDiagnosisPipeline(model=model, processor=AutoProcessor.from_pretrained(DEFAULT_CHECKPOINT))
    images = [str(folder / name) for name in ("cxr_normal_nih.jpg", "cxr_pneumonia_child.jpg")]
    rows = diagnose(images, candidate_labels=["pneumonia"])
    assert [row["labels"][0]["decision"] for row in rows] == [False, True]
    chinese = diagnose(images, candidate_labels=["肺炎"])
    assert [scores(row)["pneumonia"] for row in rows] == [scores(row)["肺炎"] for row in chinese]


def test_two_towers_alone_diagnose_too(tiny_model, tiny_processor, images, diagnose):
    towers = M3FMDiagnosisPipeline(model=tiny_model.model, processor=tiny_processor)
    assert towers(images[0], candidate_labels=LABELS) == diagnose(images[0], candidate_labels=LABELS)
    with pytest.raises(ValueError, match="M3FMModel writes no report"):
        towers(images[0], candidate_labels=LABELS, report_language="en")


def test_an_exported_folder_brings_the_labels_of_the_package(tiny_checkpoint, tmp_path):
    folder = export_remote_code(tiny_checkpoint, tmp_path / "out")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["diagnosis"] == default_diagnosis()
    assert {"diagnosis_pipeline_m3fm.py", "diagnosis_m3fm.py", "study_pipeline_m3fm.py"} <= {
        Path(path).name for path in folder.iterdir()
    }
    assert M3FMForReportGeneration.from_pretrained(folder).config.diagnosis == default_diagnosis()
