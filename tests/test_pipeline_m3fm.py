# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""The report pipeline: shapes of input and output, languages, batches, unreadable studies; transformers' own too."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline
from transformers.pipelines import PIPELINE_REGISTRY

import m3fm
from m3fm import M3FMReportPipeline
from tests.phantoms import ct_volume, radiograph_pixels

SHORT = {"max_new_tokens": 8}


@pytest.fixture
def write(tiny_model, tiny_processor) -> M3FMReportPipeline:
    return M3FMReportPipeline(model=tiny_model, processor=tiny_processor)


@pytest.fixture
def images(tmp_path) -> list[str]:
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for seed, path in enumerate(paths):
        Image.fromarray(radiograph_pixels(seed)).save(path)
    return [str(path) for path in paths]


@pytest.fixture
def volume(tmp_path) -> Path:
    nibabel = pytest.importorskip("nibabel")
    path = tmp_path / "chest.nii.gz"
    nibabel.save(nibabel.Nifti1Image(ct_volume().transpose(2, 1, 0), np.diag([-8.0, -8.0, 10.0, 1.0])), path)
    return path


def test_one_study_gives_a_dict(write, images):
    row = write(images[0], generate_kwargs=SHORT)
    assert list(row) == ["modality", "report_en", "input_check"]
    assert row["modality"] is None
    assert isinstance(row["report_en"], str)


def test_written_text_is_the_models_own(write, images, tiny_checkpoint):
    model = AutoModelForImageTextToText.from_pretrained(tiny_checkpoint).eval()
    processor = AutoProcessor.from_pretrained(tiny_checkpoint)
    ids = model.generate(**processor(images=images, return_tensors="pt"), language="zh", **SHORT)
    expected = [text.strip() for text in processor.batch_decode(ids, skip_special_tokens=True)]
    rows = write(images, language="zh", batch_size=3, generate_kwargs=SHORT)
    assert [row["report_zh"] for row in rows] == expected
    assert any(expected)


def test_list_gives_a_list_and_empty_list_an_empty_one(write, images):
    rows = write(images[:2], generate_kwargs=SHORT)
    assert [set(row) for row in rows] == [{"modality", "report_en", "input_check"}] * 2
    assert write([images[0]], generate_kwargs=SHORT) == rows[:1]
    assert write([]) == []
    assert write([], language=[]) == []


def test_list_of_studies(write, images):
    rows = write([images[0], images[:2], tuple(images)], batch_size=3, generate_kwargs=SHORT)
    assert rows[1] == write([images[:2]], generate_kwargs=SHORT)[0]
    assert len(rows) == 3


def test_stream_reads_a_batch_at_a_time(write, images):
    read: list[str] = []

    def studies() -> Iterator[str]:
        for path in images:
            read.append(path)
            yield path

    rows = write(studies(), language="zh", batch_size=2, generate_kwargs=SHORT)
    assert isinstance(rows, Iterator) and read == []
    first = next(rows)
    assert read == images[:2]
    assert [first, *rows] == write(images, language="zh", generate_kwargs=SHORT)


def test_dataset_is_a_stream(write, images):
    class Studies(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(images)

        def __getitem__(self, index: int) -> str:
            return images[index]

    rows = write(Studies(), generate_kwargs=SHORT)
    assert isinstance(rows, Iterator)
    assert list(rows) == write(images, generate_kwargs=SHORT)


def test_languages_per_study(write, images):
    rows = write(images, language=["en", "both", "zh"], batch_size=3, generate_kwargs=SHORT)
    written = [[name for name in row if name.startswith("report_")] for row in rows]
    assert written == [["report_en"], ["report_en", "report_zh"], ["report_zh"]]
    alone = write(images[1], language="both", generate_kwargs=SHORT)
    assert rows[1] == alone
    assert alone["report_zh"] == write(images[1], language="zh", generate_kwargs=SHORT)["report_zh"]


@pytest.mark.parametrize("batch_size", [2, 5])
def test_batch_equals_single(write, images, batch_size):
    studies = [images[0], images[:2], images[2], images[1:]]
    rows = write(studies, language="both", batch_size=batch_size, generate_kwargs=SHORT)
    assert rows == [write([study], language="both", generate_kwargs=SHORT)[0] for study in studies]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"language": "fr"}, r"Unsupported language \['fr'\]: expected one of \['en', 'zh', 'both'\]"),
        ({"language": ["en", "de", "zh"]}, r"\['de'\]"),
        ({"language": ["en", "zh"]}, "Expected one language or 3 of them, got 2"),
        ({"on_error": "ignore"}, "'raise' or 'row', got 'ignore'"),
        ({"batch_size": 0}, "batch_size to be a whole number >= 1, got 0"),
        ({"num_beams": 3}, r"unknown arguments \['num_beams'\]: expected \['language', .*goes into generate_kwargs"),
        ({"generate_kwargs": {"num_return_sequences": 2}}, r"does not take \['num_return_sequences'\]"),
        ({"generate_kwargs": {"language": "zh"}}, r"does not take \['language'\]"),
        ({"max_new_tokens": 3, "generate_kwargs": SHORT}, "max_new_tokens twice"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_read(write, arguments, reason):
    with pytest.raises(ValueError, match=reason):
        write(["absent.png"] * 3, **arguments)


def test_one_language_per_study_needs_a_list_of_studies(write, images):
    with pytest.raises(ValueError, match="got 2"):
        write(iter(images[:2]), language=["en", "zh"])


def test_unreadable_study_raises(write, images):
    with pytest.raises(ValueError, match=r"absent\.png: no such file"):
        write([images[0], "absent.png"], generate_kwargs=SHORT)


def test_unreadable_studies_keep_their_place(write, images, tmp_path):
    (tmp_path / "text.png").write_text("not an image", encoding="utf-8")
    studies = ["absent.png", images[0], [images[1], str(tmp_path / "text.png")], [], images[2], [images[0]] * 65]
    rows = write(studies, language="zh", batch_size=4, on_error="row", generate_kwargs=SHORT)
    assert [set(row) for row in rows] == [
        {"error"},
        {"modality", "report_zh", "input_check"},
        {"error"},
        {"error"},
        {"modality", "report_zh", "input_check"},
        {"error"},
    ]
    assert [rows[1], rows[4]] == write([images[0], images[2]], language="zh", generate_kwargs=SHORT)
    assert "absent.png: no such file" in rows[0]["error"]
    assert "text.png: not a readable image" in rows[2]["error"]
    assert "at least one image" in rows[3]["error"]
    assert "more than 64 images" in rows[5]["error"]
    assert write("absent.png", on_error="row") == rows[0]


def test_missing_reader_is_a_row_too(write, images, monkeypatch):
    def refuse(source: str) -> None:
        raise ImportError(f"{source}: reading DICOM needs pydicom: pip install m3fm[medical]")

    read = write.processor.image_processor.read_study
    monkeypatch.setattr(
        write.processor.image_processor,
        "read_study",
        lambda sources: refuse(sources[0]) if sources == ["a.dcm"] else read(sources),
    )
    rows = write(["a.dcm", images[0]], batch_size=2, on_error="row", generate_kwargs=SHORT)
    assert "pip install" in rows[0]["error"] and "report_en" in rows[1]


def test_volume_and_radiograph_in_one_batch(write, images, volume):
    rows = write([volume, images[0], volume], batch_size=3, language="both", generate_kwargs=SHORT)
    assert [row["modality"] for row in rows] == ["ct", None, "ct"]
    assert rows[0] == rows[2] == write(volume, language="both", generate_kwargs=SHORT)
    assert rows[1] == write(images[0], language="both", generate_kwargs=SHORT)


def test_images_in_memory_equal_files(write, images):
    from_file = write(images[0], generate_kwargs=SHORT)
    with Image.open(images[0]) as image:
        assert write(image, generate_kwargs=SHORT) == from_file
        assert write(np.asarray(image), generate_kwargs=SHORT) == from_file
    assert write(Path(images[0]).read_bytes(), generate_kwargs=SHORT) == from_file


def test_settings_of_the_checkpoint_are_the_pipelines(write, tmp_path, monkeypatch):
    deep = radiograph_pixels().astype(np.uint16) * 12
    deep[0, 0] = 65535  # one hot pixel: percentiles and the full range differ widely
    Image.fromarray(deep).save(tmp_path / "deep.png")
    seen = []
    write.model.model.get_vision_features = lambda pixels: seen.append(pixels) or torch.zeros(1, 1, 5, 32)
    for window in ([0.5, 99.5], None):
        monkeypatch.setattr(write.processor.image_processor, "cxr_window", window)
        write(str(tmp_path / "deep.png"), generate_kwargs=SHORT)
        expected = write.processor(images=str(tmp_path / "deep.png"), return_tensors="pt")["pixel_values"]
        assert torch.equal(seen[-1], expected)
    assert not torch.equal(*seen)


def test_generation_settings_reach_the_model(write, images):
    count = [len(write(images[0], generate_kwargs={"max_new_tokens": n})["report_en"]) for n in (2, 20)]
    assert count[0] < count[1]
    assert write(images, batch_size=3, generate_kwargs={**SHORT, "num_beams": 3}) == [
        write(image, generate_kwargs={**SHORT, "num_beams": 3}) for image in images
    ]
    assert write(images[0], max_new_tokens=2) == write(images[0], generate_kwargs={"max_new_tokens": 2})


def test_arguments_of_the_construction_are_the_defaults_of_calls(tiny_checkpoint, images):
    write = pipeline(
        "m3fm-report",
        model=str(tiny_checkpoint),
        language="zh",
        batch_size=2,
        on_error="row",
        generate_kwargs={"num_beams": 2, **SHORT},
    )
    plain = pipeline("m3fm-report", model=str(tiny_checkpoint))
    sizes = []
    prepare = write.preprocess
    write.preprocess = lambda studies: sizes.append(len(studies)) or prepare(studies)
    beams = {"generate_kwargs": {"num_beams": 2, **SHORT}}
    rows = write([*images, "absent.png"])
    assert rows[:3] == plain(images, language="zh", **beams) and set(rows[3]) == {"error"}
    assert sizes == [2, 1]
    with pytest.raises(ValueError, match="no such file"):
        write("absent.png", on_error="raise")
    assert write(images[0], language="en", max_new_tokens=3) == plain(
        images[0], max_new_tokens=3, generate_kwargs={"num_beams": 2}
    )
    assert write(images, batch_size=None) == rows[:3]
    for wrong, reason in (({"language": "fr"}, "Unsupported language"), ({"num_beams": 2}, "generate_kwargs")):
        with pytest.raises(ValueError, match=reason):
            pipeline("m3fm-report", model=str(tiny_checkpoint), **wrong)


def test_rows_and_columns_of_a_data_set_are_streams(write, images):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"image": images, "name": ["a", "b", "c"]})
    expected = write(images, generate_kwargs=SHORT)
    decoded = rows.cast_column("image", datasets.Image())
    for stream in (rows, rows["image"], decoded, decoded["image"], rows.to_iterable_dataset(), dict.fromkeys(images)):
        if isinstance(stream, dict):
            stream = stream.keys()
        written = write(stream, batch_size=2, generate_kwargs=SHORT)
        assert isinstance(written, Iterator)
        assert list(written) == expected
    assert write(rows[0], generate_kwargs=SHORT) == expected[0]
    with pytest.raises(ValueError, match=r"a row with 'image', got one with \['name'\]"):
        write({"name": "a"})


def test_an_open_file_is_one_study(write, images):
    with open(images[0], "rb") as file:
        assert write(file, generate_kwargs=SHORT) == write(images[0], generate_kwargs=SHORT)


def test_shipped_checkpoint_is_the_default():
    _, registered, _ = PIPELINE_REGISTRY.check_task("m3fm-report")
    assert registered["default"]["model"][0] == str(m3fm.DEFAULT_CHECKPOINT)
    assert registered["impl"] is M3FMReportPipeline


@pytest.mark.parametrize(
    ("task", "arguments", "reason"),
    [
        ("image-text-to-text", {"text": "Findings:"}, "without text.*m3fm-report"),
        ("image-classification", {}, "diagnosis head is untrained"),
    ],
)
def test_pipelines_that_cannot_answer_say_so(task, arguments, reason, tiny_checkpoint, images):
    pipe = pipeline(task, model=str(tiny_checkpoint))
    with pytest.raises(ValueError, match=reason), Image.open(images[0]) as image:
        pipe(image, **arguments)


def test_transformers_own_pipelines_run_unmodified(tiny_checkpoint, images):
    classify = pipeline("zero-shot-image-classification", model=str(tiny_checkpoint))
    labels = ["no pneumothorax", "肺炎"]
    with Image.open(images[0]) as image:
        answers = classify(image, candidate_labels=labels, hypothesis_template="{}")
    assert {answer["label"] for answer in answers} == set(labels)
    assert sum(answer["score"] for answer in answers) == pytest.approx(1)
    inputs = AutoProcessor.from_pretrained(tiny_checkpoint)(images=images[0], text=labels, return_tensors="pt")
    with torch.no_grad():
        expected = classify.model(**inputs).logits_per_image.softmax(-1)[0].tolist()
    assert {answer["label"]: answer["score"] for answer in answers} == pytest.approx(
        dict(zip(labels, expected, strict=True))
    )
    embed = pipeline("image-feature-extraction", model=str(tiny_checkpoint), return_tensors=True)
    with torch.no_grad():
        features = embed.model.get_image_features(inputs["pixel_values"], inputs["image_mask"])  # (1, D)
    assert torch.equal(embed(images[0]), features)
