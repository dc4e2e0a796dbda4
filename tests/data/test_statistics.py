# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
import dataclasses
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from m3fm.data.image_statistics import ImageFacts, ImageSample, image_facts, image_statistics
from m3fm.data.schema import ImageFile, LabelState, ReportText, StudyRecord
from m3fm.data.statistics import SetStatistics, count_set, statistics_markdown
from m3fm.data.statistics_plots import plot_statistics
from tests.dicom_files import radiograph, write_dicom
from tests.phantoms import ct_volume, radiograph_pixels
from tests.study_sets import made_records

P, N, U = LabelState.POSITIVE, LabelState.NEGATIVE, LabelState.UNCERTAIN


def study(number, **values):
    return StudyRecord(f"study-{number}", "x", "cxr", **values)


@pytest.fixture
def statistics():
    return count_set(
        [
            study(1, patient_id="p", split="train", labels={"Edema": P}, findings={"edema": P}, age=41, sex="F"),
            study(2, patient_id="p", split="test", labels={"Edema": N}, findings={"edema": N}, age=49),
            study(3, patient_id="q", split="train", labels={"Edema": U}, findings={"edema": U}, licence="CC BY"),
            study(
                4,
                split="train",
                images=(ImageFile(None, b"", "PA"), ImageFile(None, b"")),
                reports={
                    "en": ReportText("No edema seen.", findings="No edema.", impression="Seen."),
                    "zh": ReportText("无水肿", is_translated=True),
                },
            ),
            study(5, reports={"en": ReportText("No edema seen."), "zh": ReportText("", raw="___")}),
        ],
        "made up",
    ).as_dict()


def test_studies_patients_and_images(statistics):
    assert {name: statistics[name] for name in ("studies", "patients", "studies_without_patient", "images")} == {
        "studies": 5,
        "patients": 2,
        "studies_without_patient": 2,
        "images": 2,
    }
    assert {name: (part["studies"], part["patients"]) for name, part in statistics["parts"].items()} == {
        "train": (3, 2),
        "test": (1, 1),
        "(none stated)": (1, 0),
    }
    assert statistics["images_per_study"] == {"0": 4, "2": 1}
    assert statistics["views"] == {"PA": 1, "unknown": 1}
    assert statistics["ages"] == {"40-49": 2}
    assert statistics["licences"] == {"not stated": 4, "CC BY": 1}


def test_states_of_labels_add_up_to_the_studies(statistics):
    expected = {"positive": 1, "uncertain": 1, "negative": 1, "unmentioned": 2}
    assert statistics["labels"] == {"Edema": expected}
    assert statistics["findings"] == {"edema": expected}
    assert statistics["parts"]["train"]["positive"] == {"edema": 1}


def test_languages(statistics):
    english, chinese = statistics["languages"]["en"], statistics["languages"]["zh"]
    assert (english["reports"], english["distinct"], english["with_findings"], english["with_impression"]) == (
        2,
        1,
        1,
        1,
    )
    assert english["lengths"] == {"4": 2}  # three words and the full stop
    assert (chinese["reports"], chinese["translated"], chinese["empty_when_cleaned"]) == (2, 1, 1)
    assert chinese["length"] == {"5 %": 3, "median": 3, "95 %": 3, "longest": 3}


def test_quantiles_are_lengths_that_occur():
    counted = SetStatistics()
    for number in range(1, 101):
        counted.add(study(number, reports={"en": ReportText("word " * number)}))
    assert counted.as_dict()["languages"]["en"]["length"] == {"5 %": 5, "median": 50, "95 %": 95, "longest": 100}


def test_tables_hold_counts_and_no_id(statistics):
    text = statistics_markdown(statistics)
    assert "| train | 3 | 2 | 2 | 1 | 1 |" in text
    assert "| Edema | 1 | 1 | 1 | 2 |" in text
    assert "2 studies name no patient." in text
    assert "study-" not in text


def test_an_empty_set_has_tables_too():
    assert "| part |" in statistics_markdown(SetStatistics().as_dict())


def test_headers_of_image_files(tmp_path):
    nibabel = pytest.importorskip("nibabel")
    Image.fromarray(radiograph_pixels(1)).save(tmp_path / "a.png")
    Image.fromarray(radiograph_pixels(1).astype(np.uint16) * 200).save(tmp_path / "b.png")
    Image.fromarray(radiograph_pixels(1)).convert("RGB").save(tmp_path / "c.jpg")
    write_dicom(tmp_path / "d.dcm", radiograph(radiograph_pixels(1)))
    volume = ct_volume(1).astype(np.int16).transpose(2, 1, 0)
    nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), tmp_path / "e.nii.gz")
    files = [ImageFile(tmp_path / name) for name in ("a.png", "b.png", "c.jpg", "d.dcm", "e.nii.gz")]
    expected = [
        ImageFacts("PNG", "8 bits", 80, 96),
        ImageFacts("PNG", "16 bits or more", 80, 96),
        ImageFacts("JPEG", "8 bits, colour", 80, 96),
        ImageFacts("DICOM", "16 bits or more", 80, 96),
        ImageFacts("NIfTI", "16 bits or more", 48, 40, 24),
    ]
    assert [image_facts(each) for each in files] == expected
    in_shards = [dataclasses.replace(each, data=each.path.read_bytes()) for each in files]
    assert [image_facts(each) for each in in_shards] == expected
    (tmp_path / "f.png").write_text("none")
    counts = image_statistics([*files, ImageFile(tmp_path / "f.png"), ImageFile(tmp_path / "gone.png")])
    assert (counts["images"], counts["unreadable"]) == (5, 2)
    assert counts["kinds"] == {"PNG": 2, "JPEG": 1, "DICOM": 1, "NIfTI": 1}
    assert counts["width"] == {"smallest": 48, "5 %": 48, "median": 80, "95 %": 80, "largest": 80}


def test_a_sample_is_even_and_no_larger_than_asked():
    places = Counter()
    for seed in range(400):
        sample = ImageSample(5, seed)
        for number in range(20):
            sample.add(study(number, images=(ImageFile(None, view=str(number)),)))
        assert len(sample.images) == 5
        places.update(image.view for image in sample.images)
    # Each of 20 images is expected 100 times of 400; the standard deviation is 8.7.
    assert set(places) == {str(number) for number in range(20)}
    assert max(abs(count - 100) for count in places.values()) < 40


def test_the_picture_is_drawn(tmp_path, statistics):
    statistics["image_files"] = image_statistics(
        image for record in made_records(tmp_path / "images") for image in record.images
    )
    plot_statistics(statistics, tmp_path / "a.png", "made up")
    with Image.open(tmp_path / "a.png") as picture:
        assert min(picture.size) > 500
        assert len(picture.convert("L").getcolors()) > 100
