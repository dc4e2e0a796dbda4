# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""NIH ChestX-ray14: small trees to the published layout, and the full tables."""

import gzip
import json
import os
from collections import Counter
from pathlib import Path

import pytest

from m3fm.data.opening import open_set
from m3fm.data.schema import Box, LabelState, StudyRecord
from m3fm.data.sets.nih_chestxray14 import LABELS, SET, nih_documents
from m3fm.data.studies import study_of, training_part
from m3fm.data.tables import BadRow

POSITIVE, NEGATIVE, UNMENTIONED = LabelState.POSITIVE, LabelState.NEGATIVE, LabelState.UNMENTIONED
HEAD = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
)
ROWS = [
    "00000001_000.png,Cardiomegaly|Effusion,0,1,57,M,PA,2682,2749,0.143,0.143",
    "00000001_001.png,No Finding,1,1,58,M,PA,2894,2729,0.143,0.143",
    "00000013_008.png,Pneumothorax,8,13,414,F,AP,3056,2544,0.139,0.139",
]


def write_tree(root: Path, rows: list[str] = ROWS, head: str = HEAD, name: str = "Data_Entry_2017_v2020.csv") -> Path:
    root.mkdir(parents=True, exist_ok=True)
    (root / name).write_text("\n".join([head, *rows]) + "\n")
    for number, row in enumerate(rows, start=1):
        folder = root / f"images_{(number + 1) // 2:03d}" / "images"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / row.split(",")[0]).touch()
    return root


def names(record: StudyRecord, state: LabelState = POSITIVE) -> set[str]:
    return {name for name, said in record.labels.items() if said is state}


def test_record_of_every_row(tmp_path: Path) -> None:
    root = write_tree(tmp_path)
    (root / "train_val_list.txt").write_text("00000001_000.png\n00000001_001.png\n")
    (root / "test_list.txt").write_text("00000013_008.png")
    (root / "BBox_List_2017.csv").write_text(
        "Image Index,Finding Label,Bbox [x,y,w,h],,,\n"
        "00000001_000.png,Cardiomegaly,225.5,547.0,86.75,79.25\n"
        "00000001_000.png,Infiltrate,1,2,3,4,,,\n"
    )
    opened = open_set(root)
    assert opened.set is SET
    first, second, third = opened
    assert first.study_id == "00000001_000" and first.source == "nih_chestxray14" and first.modality == "cxr"
    assert first.patient_id == "1" and first.age == 57.0 and first.sex == "M" and first.split == "train"
    assert first.documents == ("nih:00000001_000.png", "nih-patient:1")
    assert [(image.path, image.view) for image in first.images] == [
        (root / "images_001" / "images" / "00000001_000.png", "PA")
    ]
    assert names(first) == {"Cardiomegaly", "Effusion"} and len(names(first, NEGATIVE)) == 13
    assert list(first.labels) == list(LABELS)
    assert first.findings["pleural_effusion"] is POSITIVE and first.findings["no_finding"] is NEGATIVE
    assert first.findings["pneumonia"] is NEGATIVE and "fracture" not in first.findings
    assert first.boxes == (Box("Cardiomegaly", 225.5, 547.0, 86.75, 79.25), Box("Infiltration", 1, 2, 3, 4))
    assert first.reports == {} and first.licence == SET.licence
    assert names(second) == {"No Finding"} and second.findings["no_finding"] is POSITIVE and second.boxes == ()
    # Nobody is 414 years old: the age is left out, the study is kept.
    assert third.age is None and third.split == "test" and third.patient_id == "13" and third.images[0].view == "AP"
    assert third.images[0].path.parent == root / "images_002" / "images"


def test_records_go_through_datasets(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    root = write_tree(tmp_path)
    (root / "BBox_List_2017.csv").write_text(
        "Image Index,Finding Label,Bbox [x,y,w,h],,,\n00000001_000.png,Mass,1.5,2,3,4\n"
    )
    records = list(open_set(root))
    assert [StudyRecord.from_row(row) for row in open_set(root).dataset()] == records
    assert [StudyRecord.from_row(row) for row in open_set(root).stream()] == records


def test_without_lists_there_is_no_split(tmp_path: Path) -> None:
    assert [record.split for record in open_set(write_tree(tmp_path))] == [None] * 3


def test_an_absent_age_may_be_told_as_nan(tmp_path: Path) -> None:
    rows = [row.replace(",57,", ",nan,") for row in ROWS]
    assert [record.age for record in open_set(write_tree(tmp_path, rows))] == [None, 58.0, None]


def test_an_image_that_the_lists_leave_out_is_in_no_part(tmp_path: Path) -> None:
    root = write_tree(tmp_path)
    (root / "train_val_list.txt").write_text("00000001_000.png\n")
    (root / "test_list.txt").write_text("00000013_008.png\n")
    assert [record.split for record in open_set(root)] == ["train", "unassigned", "test"]


def test_cells_that_slipped_are_not_quoted(tmp_path: Path) -> None:
    root = write_tree(tmp_path, ["00000002_000.png,Mr Smith had a cough; MRN 12345,0,2,57,M,PA,1,1,1,1", *ROWS])
    (root / "BBox_List_2017.csv").write_text(f"Image Index,Finding Label,Bbox [x,y,w,h]\n{'MRN 12345,' * 5}4\n")
    (root / "google2019_nih-chest-xray-labels.csv").write_text(
        "Image Index,Fracture,Pneumothorax,Airspace opacity,Nodule or mass\nx,NO,Smith was seen in March,NO,NO\n"
    )
    opened = open_set(root, on_bad="skip")
    assert len(list(opened)) == 3 and sum(opened.reading.counts.values()) == 3
    summary = opened.reading.summary()
    assert "Smith" not in summary and "12345" not in summary and summary.count("a text of ") == 3


def test_older_table_and_its_sample(tmp_path: Path) -> None:
    rows = [row.replace(",57,", ",057Y,") + "," for row in ROWS]
    old = write_tree(tmp_path / "old", rows, HEAD + ",", "Data_Entry_2017.csv")
    assert [record.age for record in open_set(old)] == [57.0, 58.0, None]
    head = HEAD.replace("[Width,Height]", "Width,OriginalImageHeight").replace(
        "[x,y]", "_x,OriginalImagePixelSpacing_y"
    )
    sample = write_tree(tmp_path / "wrap" / "sample", ROWS[:1], head, "sample_labels.csv")
    (record,) = open_set(tmp_path / "wrap")
    assert record.images[0].path == sample / "images_001" / "images" / "00000001_000.png"


def test_experts_decide_what_they_read(tmp_path: Path) -> None:
    root = write_tree(tmp_path)
    head = "Image Index,Fracture,Pneumothorax,Airspace opacity,Nodule or mass,Set Id\n"
    (root / "google2019_nih-chest-xray-labels.csv").write_text(
        head + "00000001_001.png,NO,YES,NO,HEDGE,test\n00000013_008.png,NO,NO,NO,,val\n"
    )
    first, second, third = open_set(root)
    assert "Fracture (expert)" not in first.labels and len(first.labels) == 15
    assert second.labels["Pneumothorax (expert)"] is POSITIVE and second.labels["Pneumothorax"] is NEGATIVE
    assert second.labels["No Finding"] is POSITIVE
    assert second.findings["pneumothorax"] is POSITIVE and second.findings["no_finding"] is NEGATIVE
    assert second.findings["lung_lesion"] is LabelState.UNCERTAIN
    assert second.findings["fracture"] is NEGATIVE and second.findings["lung_opacity"] is NEGATIVE
    assert third.labels["Pneumothorax"] is POSITIVE and third.labels["Nodule or mass (expert)"] is UNMENTIONED
    assert third.findings["pneumothorax"] is NEGATIVE
    # The one mined abnormality is denied: neither normal nor abnormal is said.
    assert "no_finding" not in third.findings and "lung_lesion" not in third.findings


BAD_ROWS = {
    "bad_label": "00000002_000.png,Broken Heart,0,2,57,M,PA,1,1,1,1",
    "duplicate_id": ROWS[0],
    "bad_value": "00000002_001.png,Hernia,0,2,old,M,PA,1,1,1,1",
    "not_a_row": "00000002_002.png,Hernia,0,2",
    "missing_file": "00000002_003.png,Hernia,0,2,57,M,PA,1,1,1,1",
}


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_bad_rows_are_named_and_cost_themselves(kind: str, tmp_path: Path) -> None:
    root = write_tree(tmp_path, [*ROWS, BAD_ROWS[kind]])
    (root / "images_002" / "images" / "00000002_003.png").unlink(missing_ok=True)
    with pytest.raises(BadRow, match=r"Data_Entry_2017_v2020.csv, line 5: ") as error:
        list(open_set(root))
    assert error.value.kind == kind and "00000002" not in error.value.message
    opened = open_set(root, on_bad="skip")
    assert len(list(opened)) == 3
    assert opened.reading.counts == {("Data_Entry_2017_v2020.csv", kind): 1}


def test_broken_encoding_and_bad_box_and_bad_expert(tmp_path: Path) -> None:
    root = write_tree(tmp_path)
    with open(root / "Data_Entry_2017_v2020.csv", "ab") as file:
        file.write(b"00000002_000.png,Herni\xe9,0,2,57,M,PA,1,1,1,1\n")
    (root / "BBox_List_2017.csv").write_text(
        "Image Index,Finding Label,Bbox [x,y,w,h],,,\n"
        "00000001_000.png,Cardiomegaly,1,2,0,4\n00000001_000.png,Rib,1,2,3,4\n"
        "x.png,Mass,1,2,3,4\n00000001_000.png,Mass,1,2,3,4\n"
    )
    (root / "google2019_nih-chest-xray-labels.csv").write_text(
        "Image Index,Fracture,Pneumothorax,Airspace opacity,Nodule or mass\n00000001_000.png,NO,MAYBE,NO,NO\n"
    )
    (root / "train_val_list.txt").write_text("\n00000001_000.png\nan image\n")
    (root / "test_list.txt").write_text("00000001_000.png\n")
    opened = open_set(root, on_bad="skip")
    records = list(opened)
    assert len(records) == 3 and records[0].boxes == (Box("Mass", 1, 2, 3, 4),)
    # Both lists have the first image, neither the others: none of them may be trained on.
    assert [record.split for record in records] == ["unassigned"] * 3
    assert training_part(map(study_of, records)) == []
    assert opened.reading.counts == {
        ("Data_Entry_2017_v2020.csv", "bad_encoding"): 1,
        ("BBox_List_2017.csv", "bad_value"): 2,
        ("BBox_List_2017.csv", "bad_label"): 1,
        ("google2019_nih-chest-xray-labels.csv", "bad_label"): 1,
        ("train_val_list.txt", "bad_value"): 1,
        ("test_list.txt", "bad_value"): 1,
    }


def test_wrong_column_is_raised_at_once(tmp_path: Path) -> None:
    root = write_tree(tmp_path, head=HEAD.replace("Patient Age", "Age"))
    with pytest.raises(BadRow, match="Patient Age") as error:
        list(open_set(root, on_bad="skip"))
    assert error.value.kind == "wrong_column"


def test_missing_table_is_raised_at_once(tmp_path: Path) -> None:
    with pytest.raises(BadRow, match="no such file"):
        list(open_set(tmp_path, "nih_chestxray14", on_bad="skip"))


def test_one_percent_of_bad_rows_lose_no_good_one(tmp_path: Path) -> None:
    good = [f"{number:08d}_000.png,Mass,0,{number},50,F,PA,1,1,1,1" for number in range(500)]
    rows = list(good)
    for place, row in zip((0, 100, 200, 300, 400), BAD_ROWS.values(), strict=True):
        rows.insert(place, row if row is not ROWS[0] else good[0])
    (tmp_path / "Data_Entry_2017.csv").write_text("\n".join([HEAD, *rows]) + "\n")
    (tmp_path / "images").mkdir()
    for row in good:
        (tmp_path / "images" / row.split(",")[0]).touch()
    opened = open_set(tmp_path, on_bad="skip")
    assert {record.study_id for record in opened} == {row.split(".")[0] for row in good}
    assert sum(opened.reading.counts.values()) == 5


def test_marks_of_an_image() -> None:
    assert nih_documents("00030805_000.png") == ("nih:00030805_000.png", "nih-patient:30805")
    with pytest.raises(ValueError, match="an NIH image must have a name like"):
        nih_documents("30805.png")


@pytest.mark.realdata
def test_full_tables_have_the_published_counts(data_root: Path, tmp_path: Path) -> None:
    for name in ("Data_Entry_2017_v2020.csv.gz", "BBox_List_2017.csv.gz"):
        os.symlink(data_root / "label_tables" / name, tmp_path / name)
    patients, labels, boxes, images = set(), Counter(), Counter(), 0
    for record in open_set(tmp_path, images="unchecked"):
        images += 1
        patients.add(record.patient_id)
        labels.update(names(record))
        boxes.update(box.label for box in record.boxes)
        assert record.age <= 120 and record.sex in ("F", "M") and record.images[0].view in ("PA", "AP")
    assert images == SET.published["images"] == 112120
    assert len(patients) == SET.published["patients"] == 30805
    assert sum(boxes.values()) == SET.published["boxes"] == 984
    # Counted from the table; the dataset's card on the Hugging Face Hub (alkzar90) has the same numbers for it.
    assert labels == {
        **{"No Finding": 60361, "Infiltration": 19894, "Effusion": 13317, "Atelectasis": 11559, "Nodule": 6331},
        **{"Mass": 5782, "Pneumothorax": 5302, "Consolidation": 4667, "Pleural_Thickening": 3385},
        **{"Cardiomegaly": 2776, "Emphysema": 2516, "Edema": 2303, "Fibrosis": 1686, "Pneumonia": 1431},
        **{"Hernia": 227},
    }
    assert boxes["Infiltration"] == 123 and boxes["Atelectasis"] == 180


@pytest.mark.realdata
def test_real_images_and_experts(data_root: Path, tmp_path: Path) -> None:
    sample = data_root / "nih_chestxray14_sample"
    rows = [json.loads(line) for line in (sample / "metadata.jsonl").read_text().splitlines()]
    given = {row["original_name"]: row for row in rows}
    folder = tmp_path / "images_001" / "images"
    folder.mkdir(parents=True)
    for name, row in given.items():
        os.symlink(sample / row["file_name"], folder / name)
    with gzip.open(data_root / "label_tables" / "Data_Entry_2017_v2020.csv.gz", "rt") as file:
        kept = [line for number, line in enumerate(file) if number == 0 or line.split(",")[0] in given]
    # One row more than there are images.
    (tmp_path / "Data_Entry_2017_v2020.csv").write_text("".join(kept) + ROWS[2].replace("_008", "_999") + "\n")
    name = "google2019_nih-chest-xray-labels.csv.gz"
    os.symlink(data_root / "label_tables" / name, tmp_path / name)
    opened = open_set(tmp_path, on_bad="skip")
    records = {record.documents[0].removeprefix("nih:"): record for record in opened}
    assert records.keys() == given.keys() and len(records) == 1198
    assert opened.reading.counts == {("Data_Entry_2017_v2020.csv", "missing_file"): 1}
    for name, record in records.items():
        assert names(record) & set(LABELS) == set(given[name]["labels"] or ["No Finding"])
        assert record.patient_id == given[name]["patient_id"].removeprefix("nih-")
        assert record.images[0].path.read_bytes()[:2] == b"\xff\xd8"
    assert any("Fracture (expert)" in record.labels for record in records.values())
