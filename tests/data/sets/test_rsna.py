# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""RSNA pneumonia: small trees to the layout of Kaggle, and the full tables."""

import json
import os
from pathlib import Path

import pytest

from m3fm.data.opening import open_set
from m3fm.data.schema import Box, LabelState
from m3fm.data.sets.rsna import ABNORMAL, NORMAL, OPACITY, SET
from m3fm.data.tables import BadRow

POSITIVE, NEGATIVE, UNMENTIONED = LabelState.POSITIVE, LabelState.NEGATIVE, LabelState.UNMENTIONED
# What the challenge's table has of rows, and of images with an opacity.
TABLE_ROWS, SICK = 30227, 6012
HEAD = "patientId,x,y,width,height,Target"
ROWS = ["a-1,,,,,0", "b-2,264.0,152.0,213.0,379.0,1", "c-3,,,,,0", "b-2,562.0,152.0,256.0,453.0,1"]


def write_tree(root: Path, rows: list[str] = ROWS) -> Path:
    (root / "stage_2_train_images").mkdir(parents=True)
    (root / "stage_2_train_labels.csv").write_text("\n".join([HEAD, *rows]) + "\n")
    for name in ("a-1", "b-2", "c-3"):
        (root / "stage_2_train_images" / f"{name}.dcm").touch()
    return root


def test_boxes_alone_do_not_tell_what_is_normal(tmp_path: Path) -> None:
    root = write_tree(tmp_path)
    opened = open_set(root)
    assert opened.set is SET
    first, second, third = opened
    assert [record.study_id for record in (first, second, third)] == ["a-1", "b-2", "c-3"]
    assert first.labels == {NORMAL: UNMENTIONED, ABNORMAL: UNMENTIONED, OPACITY: NEGATIVE}
    assert first.findings == {"lung_opacity": NEGATIVE, "pneumonia": NEGATIVE} and first.boxes == ()
    assert second.labels == {NORMAL: NEGATIVE, ABNORMAL: NEGATIVE, OPACITY: POSITIVE}
    assert second.findings == {"no_finding": NEGATIVE, "lung_opacity": POSITIVE, "pneumonia": POSITIVE}
    assert second.boxes == (Box(OPACITY, 264, 152, 213, 379), Box(OPACITY, 562, 152, 256, 453))
    assert second.images[0].path == root / "stage_2_train_images" / "b-2.dcm"
    assert second.patient_id == "b-2" and second.split == "train" and second.documents == ()
    assert second.age is None and second.sex is None and second.images[0].view is None


def test_further_files(tmp_path: Path) -> None:
    root = write_tree(tmp_path)
    (root / "stage_2_detailed_class_info.csv").write_text(
        f"patientId,class\na-1,{NORMAL}\nb-2,{OPACITY}\nb-2,{OPACITY}\nc-3,{ABNORMAL}\n"
    )
    (root / "stage_2_train_images_dicom_headers.csv").write_text(
        ",PatientID,PatientAge,PatientSex,ViewPosition\n0,a-1,43,F,AP\n1,b-2,155,M,pa\n"
    )
    (root / "pneumonia-challenge-dataset-mappings_2018.json").write_text(
        json.dumps([{"SOPInstanceUID": "1.2", "subset_img_id": "a-1", "img_id": "00000013_008.png"}])
    )
    (root / "stage_2_sample_submission.csv").write_text("patientId,PredictionString\nt-9,0.5 0 0 100 100\n")
    (root / "stage_2_test_images").mkdir()
    (root / "stage_2_test_images" / "t-9.dcm").touch()
    first, second, third, test = open_set(root)
    assert first.labels == {NORMAL: POSITIVE, ABNORMAL: NEGATIVE, OPACITY: NEGATIVE}
    assert first.findings == {"no_finding": POSITIVE, "lung_opacity": NEGATIVE, "pneumonia": NEGATIVE}
    assert first.documents == ("nih:00000013_008.png", "nih-patient:13")
    assert first.age == 43.0 and first.sex == "F" and first.images[0].view == "AP"
    assert second.age is None and second.sex == "M" and second.images[0].view == "PA"
    assert third.labels[ABNORMAL] is POSITIVE and third.findings["no_finding"] is NEGATIVE
    assert third.findings["pneumonia"] is NEGATIVE
    assert test.split == "test" and test.study_id == "t-9" and test.findings == {}
    assert set(test.labels.values()) == {UNMENTIONED}
    assert test.images[0].path == root / "stage_2_test_images" / "t-9.dcm"


def test_an_image_of_both_sets_has_one_mark(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "rsna")
    (root / "pneumonia-challenge-dataset-mappings_2018.json").write_text(
        json.dumps([{"subset_img_id": "b-2", "img_id": "00000001_000.png"}])
    )
    nih = tmp_path / "nih"
    nih.mkdir()
    (nih / "Data_Entry_2017.csv").write_text(
        "Image Index,Finding Labels,Patient ID,Patient Age,Patient Gender,View Position\n"
        "00000001_000.png,Mass,1,57,M,PA\n"
    )
    marks = [
        {mark for record in open_set(each, images="unchecked") for mark in record.documents} for each in (root, nih)
    ]
    assert marks[0] == marks[1] == {"nih:00000001_000.png", "nih-patient:1"}


BAD_ROWS = {
    "bad_label": "d-4,,,,,2",
    "bad_value": "d-4,1,2,,4,1",
    "duplicate_id": "a-1,,,,,0",
    "missing_file": "d-4,,,,,0",
    "not_a_row": "d-4,,,0",
}


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_bad_rows_are_named_and_cost_themselves(kind: str, tmp_path: Path) -> None:
    root = write_tree(tmp_path, [*ROWS, BAD_ROWS[kind]])
    with pytest.raises(BadRow, match=r"stage_2_train_labels.csv, line 6: ") as error:
        list(open_set(root))
    assert error.value.kind == kind and "d-4" not in str(error.value)
    opened = open_set(root, on_bad="skip")
    assert [record.study_id for record in opened] == ["a-1", "b-2", "c-3"]
    assert opened.reading.counts == {("stage_2_train_labels.csv", kind): 1}


def test_contradictions_and_repetitions_are_bad_rows(tmp_path: Path) -> None:
    root = write_tree(tmp_path, [*ROWS, ROWS[1], "a-1,1,2,3,4,1", "b-2,,,,,0", "../e,,,,,0", "f-6,1,2,0,4,1"])
    opened = open_set(root, on_bad="skip")
    records = list(opened)
    assert len(records) == 3 and len(records[1].boxes) == 2 and records[0].boxes == ()
    counts = {"duplicate_id": 3, "bad_value": 2}
    assert opened.reading.counts == {("stage_2_train_labels.csv", kind): count for kind, count in counts.items()}


def test_bad_rows_of_further_files(tmp_path: Path) -> None:
    root = write_tree(tmp_path)
    (root / "stage_2_detailed_class_info.csv").write_text(
        f"patientId,class\na-1,{OPACITY}\nb-2,Sick\nc-3,{NORMAL}\nc-3,{ABNORMAL}\n"
    )
    (root / "stage_2_train_images_dicom_headers.csv").write_text(
        ",PatientID,PatientAge,PatientSex,ViewPosition\n0,c-3,old,F,AP\n"
    )
    (root / "pneumonia-challenge-dataset-mappings_2018.json").write_text('[{"subset_img_id": "a-1"}, 3]')
    (root / "stage_2_sample_submission.csv").write_text("patientId,PredictionString\na-1,\nt-9,\n")
    opened = open_set(root, on_bad="skip")
    assert [record.study_id for record in opened] == ["b-2", "c-3"]
    assert opened.reading.counts == {
        ("stage_2_train_labels.csv", "bad_label"): 1,
        ("stage_2_detailed_class_info.csv", "bad_label"): 2,
        ("stage_2_train_images_dicom_headers.csv", "bad_value"): 1,
        ("pneumonia-challenge-dataset-mappings_2018.json", "bad_value"): 2,
        ("stage_2_sample_submission.csv", "duplicate_id"): 1,
        ("stage_2_sample_submission.csv", "missing_file"): 1,
    }


def test_cells_that_slipped_are_not_quoted(tmp_path: Path) -> None:
    root = write_tree(tmp_path, ["a-1,,,,,Mr Smith was seen in March", "b-2,NaN,NaN,NaN,NaN,0.0"])
    (root / "stage_2_detailed_class_info.csv").write_text("patientId,class\na-1,record 12345\n")
    opened = open_set(root, on_bad="skip")
    # An absent box may be told as "NaN".
    assert [(record.study_id, record.boxes) for record in opened] == [("b-2", ())]
    summary = opened.reading.summary()
    assert "Smith" not in summary and "a text of 26 characters" in summary
    assert "12345" not in summary and "a text of 12 characters is none of the classes" in summary


@pytest.mark.parametrize("text", ["{}", "[", '"x"'])
def test_mapping_of_another_form_is_raised_at_once(text: str, tmp_path: Path) -> None:
    root = write_tree(tmp_path)
    (root / "pneumonia-challenge-dataset-mappings_2018.json").write_text(text)
    with pytest.raises(BadRow, match="expected a JSON list"):
        list(open_set(root, on_bad="skip"))


def test_wrong_column_is_raised_at_once(tmp_path: Path) -> None:
    (tmp_path / "stage_2_train_labels.csv").write_text("patientId,x,y,w,h,Target\n")
    with pytest.raises(BadRow, match="width"):
        list(open_set(tmp_path, on_bad="skip"))


@pytest.mark.realdata
def test_full_tables_have_the_published_counts(data_root: Path, tmp_path: Path) -> None:
    tables = data_root / "label_tables"
    os.symlink(tables / "kaggle_stage_2_train_labels.csv.zip", tmp_path / "stage_2_train_labels.csv.zip")
    name = "kaggle_stage_2_train_images_dicom_headers.csv.gz"
    os.symlink(tables / name, tmp_path / name)
    records = list(open_set(tmp_path, images="unchecked"))
    assert len(records) == SET.published["train_images"] == 26684
    boxes = sum(len(record.boxes) for record in records)
    assert boxes == SET.published["boxes"] == 9555
    sick = [record for record in records if record.labels[OPACITY] is POSITIVE]
    assert len(sick) == SICK
    assert boxes + len(records) - len(sick) == TABLE_ROWS
    assert all(box.x >= 0 and box.x + box.width <= 1024 for record in records for box in record.boxes)
    assert {record.images[0].view for record in records} == {"AP", "PA"}
    assert {record.sex for record in records} == {"F", "M"}
    # The headers have five ages between 148 and 155.
    assert sum(record.age is None for record in records) == 5
