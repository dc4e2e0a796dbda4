# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""The checkpoint that ships: small enough to travel in the package, whole, and writing both languages."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModel, AutoModelForImageClassification, AutoModelForImageTextToText, AutoProcessor

import m3fm
from m3fm.data import load_studies
from m3fm.evaluation.text_metrics import score_reports

FOLDER = m3fm.DEFAULT_CHECKPOINT
WEIGHTS = FOLDER / "model.safetensors"
EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.jpg"))
CHINESE = re.compile(r"[\u4e00-\u9fff]")

pytestmark = pytest.mark.skipif(not WEIGHTS.is_file(), reason="the shipped checkpoint is not in this clone")


@pytest.fixture(scope="module")
def writer() -> m3fm.M3FMForReportGeneration:
    return AutoModelForImageTextToText.from_pretrained(FOLDER, dtype=torch.float32)


@pytest.fixture(scope="module")
def processor() -> m3fm.M3FMProcessor:
    return AutoProcessor.from_pretrained(FOLDER)


def write(writer, processor, images: list[Path], language: str) -> list[str]:
    ids = writer.generate(**processor(images=images, return_tensors="pt"), language=language)
    return [text.strip() for text in processor.batch_decode(ids, skip_special_tokens=True)]


@pytest.fixture(scope="module")
def reports(writer, processor) -> dict[str, list[str]]:
    return {language: write(writer, processor, EXAMPLES, language) for language in writer.config.languages}


def test_it_is_small_and_in_half_precision():
    assert WEIGHTS.stat().st_size <= 70e6
    with safe_open(WEIGHTS, framework="pt") as file:
        precisions = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 - not a dict
    assert precisions <= {"BF16", "F16"}


def test_it_holds_what_is_needed_and_no_more():
    names = {path.name for path in FOLDER.iterdir()}
    needed = {"config.json", "generation_config.json", "model.safetensors", "processor_config.json"}
    assert needed | {"tokenizer.json", "tokenizer_config.json"} <= names
    assert {Path(name).suffix for name in names} <= {".json", ".safetensors", ".md", ".png", ""}


def test_no_path_of_the_machine_it_was_made_on_is_in_it():
    for path in FOLDER.glob("*.json"):
        if path.name != "tokenizer.json":
            text = path.read_text(encoding="utf-8")
            assert not re.search(r'"(?:/|~|[A-Z]:)[^"]*"', text), path.name


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
def test_it_loads_into_every_class(precision, processor):
    inputs = processor(images=EXAMPLES[:2], text=["Clear lungs.", "双肺清晰。"], return_tensors="pt")
    images = {name: inputs[name] for name in ("pixel_values", "image_mask")}
    with torch.no_grad():
        embeds = AutoModel.from_pretrained(FOLDER, dtype=precision)(**inputs)
        assert embeds.logits_per_image.shape == (2, 2) and embeds.logits_per_image.isfinite().all()
        classifier = AutoModelForImageClassification.from_pretrained(FOLDER, dtype=precision, num_labels=3)
        assert classifier(**images, labels=torch.tensor([0, 2])).logits.shape == (2, 3)
    writer = AutoModelForImageTextToText.from_pretrained(FOLDER, dtype=precision)
    assert writer.generate(**images, language="zh", max_new_tokens=3).shape[0] == 2


def test_the_support_memory_is_full(writer):
    norms = writer.support_memory.float().norm(dim=-1)
    assert norms.shape == (2, writer.config.support_memory_size)
    torch.testing.assert_close(norms, torch.ones_like(norms), atol=0.02, rtol=0)


def test_reports_are_in_their_language(reports):
    assert all(reports["en"]) and all(reports["zh"])
    assert all(CHINESE.search(text) for text in reports["zh"])
    assert not any(CHINESE.search(text) for text in reports["en"])


def test_reports_are_whole_and_without_control_tokens(reports):
    for texts in reports.values():
        for text in texts:
            assert len(text) > 8
            assert not re.search(r"<\|?\w+\|?>", text)
            assert text[-1] in ".。;；", f"ends in the middle: {text[-20:]!r}"


def test_images_decide_what_is_written(reports):
    for language, texts in reports.items():
        assert len(set(texts)) > 1, language


def test_writing_is_deterministic(writer, processor, reports):
    again = AutoModelForImageTextToText.from_pretrained(FOLDER, dtype=torch.float32)
    for model in (writer, again):
        assert write(model, processor, EXAMPLES, "zh") == reports["zh"]


def test_translations_are_near_in_the_shared_space(writer, processor):
    pairs = [("No pleural effusion.", "未见胸腔积液。"), ("There is cardiomegaly.", "心影增大。")]
    inputs = processor(text=[text for pair in zip(*pairs, strict=True) for text in pair], return_tensors="pt")
    with torch.no_grad():
        english, chinese = writer.model.get_text_features(**inputs).chunk(2)
    similarity = english @ chinese.t()
    assert similarity.diagonal().min() > similarity.fliplr().diagonal().max()


@pytest.mark.realdata
@pytest.mark.parametrize("language", ["en", "zh"])
def test_reports_of_unseen_scans_beat_reports_drawn_at_random(language, writer, processor, data_root):
    studies = load_studies(data_root / "cov_ctr")
    unseen = [study for study in studies if study.split == "validation"][:8]
    pool = sorted({study.reports[language] for study in studies if study.split == "train" and study.reports})
    references = [study.reports[language] for study in unseen]
    written = write(writer, processor, [study.images[0] for study in unseen], language)
    rng = np.random.default_rng(0)

    def rouge_l(reports: list[str]) -> float:
        return score_reports(reports, references, language, metrics=("rouge_l",))["rouge_l"]

    drawn = [rouge_l([pool[i] for i in rng.integers(len(pool), size=len(unseen))]) for _ in range(20)]
    assert rouge_l(written) > np.mean(drawn)
