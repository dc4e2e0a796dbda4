# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""VinDr-CXR: small trees to both layouts, and the full table of the challenge."""

import os
from collections import Counter
from pathlib import Path

import pytest

from m3fm.data.opening import open_set
from m3fm.data.schema import Box, LabelState
from m3fm.data.sets.vindr import CHALLENGE_LABELS, LABELS, SET
from m3fm.data.tables import BadRow

POSITIVE, NEGATIVE = LabelState.POSITIVE, LabelState.NEGATIVE
UNCERTAIN, UNMENTIONED = LabelState.UNCERTAIN, LabelState.UNMENTIONED
# What the challenge's table has.
TABLE_ROWS = 67914
HEAD = "image_id,class_name,class_id,rad_id,x_min,y_min,x_max,y_max"
ROWS = [
    "aa,Cardiomegaly,3,R10,691.0,1375.0,1653.0,1831.0",
    "bb,No finding,14,R1,,,,",
    "aa,Cardiomegaly,3,R8,690,1370,1650,1830",
    "aa,Nodule/Mass,8,R8,10,20,30,50",
    "bb,No finding,14,R2,,,,",
    "aa,Nodule/Mass,8,R8,60,20,80,50",
    "bb,No finding,14,R3,,,,",
    "aa,Pleural effusion,10,R9,5,6,7,8",
]


def write_challenge(root: Path, rows: list[str] = ROWS) -> Path:
    (root / "train").mkdir(parents=True)
    (root / "train.csv").write_text("\n".join([HEAD, *rows]) + "\n")
    (root / "train" / "aa.dicom").touch()
    (root / "train" / "bb.png").touch()
    return root


def test_readers_of_the_challenge_vote(tmp_path: Path) -> None:
    root = write_challenge(tmp_path)
    opened = open_set(root)
    assert opened.set is SET
    first, second = opened
    assert first.study_id == "aa" and first.patient_id is None and first.split == "train"
    assert first.images[0].path == root / "train" / "aa.dicom"
    assert list(first.labels) == list(CHALLENGE_LABELS) and len(first.labels) == 15
    said = {name: state for name, state in first.labels.items() if state is not NEGATIVE}
    # Two of three readers, one of three (with two boxes), one of three.
    assert said == {"Cardiomegaly": POSITIVE, "Nodule/Mass": UNCERTAIN, "Pleural effusion": UNCERTAIN}
    assert first.findings["cardiomegaly"] is POSITIVE and first.findings["lung_lesion"] is UNCERTAIN
    assert first.findings["pneumothorax"] is NEGATIVE and first.findings["no_finding"] is NEGATIVE
    assert "nodule" not in first.findings
    assert first.boxes == (
        Box("Cardiomegaly", 691, 1375, 962, 456, reader="R10"),
        Box("Cardiomegaly", 690, 1370, 960, 460, reader="R8"),
        Box("Nodule/Mass", 10, 20, 20, 30, reader="R8"),
        Box("Nodule/Mass", 60, 20, 20, 30, reader="R8"),
        Box("Pleural effusion", 5, 6, 2, 2, reader="R9"),
    )
    assert second.labels["No finding"] is POSITIVE and second.findings["no_finding"] is POSITIVE
    assert second.images[0].path == root / "train" / "bb.png" and second.boxes == ()


def write_physionet(root: Path) -> Path:
    base = root / "physionet.org" / "files" / "vindr-cxr" / "1.0.0"
    tables = base / "annotations"
    tables.mkdir(parents=True)
    given = {"R1": {"Lung Opacity", "Pneumonia"}, "R2": {"Lung Opacity", "COPD"}, "R3": {"Pneumonia", "Rib fracture"}}
    rows = [["image_id", "rad_id", *LABELS]]
    rows += [["aa", reader, *("1" if name in names else "0" for name in LABELS)] for reader, names in given.items()]
    rows += [
        ["bb", reader, *("1" if name == "No finding" else "" for name in LABELS)] for reader in ("R4", "R5", "R6")
    ]
    (tables / "image_labels_train.csv").write_text("\n".join(map(",".join, rows)) + "\n")
    (tables / "annotations_train.csv").write_text(
        "image_id,rad_id,class_name,x_min,y_min,x_max,y_max\n"
        "aa,R1,Lung Opacity,1,2,4,6\nbb,R4,No finding,,,,\naa,R3,Rib fracture,1,1,2,2\n"
    )
    columns = ["Other disease" if name == "Other diseases" else name for name in LABELS]
    values = ["1" if name == "Other diseases" else "0" for name in LABELS]
    (tables / "image_labels_test.csv").write_text(f"image_id,{','.join(columns)}\ncc,{','.join(values)}\n")
    (tables / "annotations_test.csv").write_text(
        "image_id,class_name,x_min,y_min,x_max,y_max\ncc,Other lesion,0,0,9,9\n"
    )
    for split, names in {"train": ("aa", "bb"), "test": ("cc",)}.items():
        (base / split).mkdir()
        for name in names:
            (base / split / f"{name}.dicom").touch()
    return base


def test_both_parts_of_physionet(tmp_path: Path) -> None:
    base = write_physionet(tmp_path)
    opened = open_set(tmp_path)
    assert opened.set is SET
    first, second, third = opened
    assert list(first.labels) == list(LABELS) and len(first.labels) == 28
    said = {name: state for name, state in first.labels.items() if state is not NEGATIVE}
    assert said == {"Lung Opacity": POSITIVE, "Pneumonia": POSITIVE, "COPD": UNCERTAIN, "Rib fracture": UNCERTAIN}
    assert first.findings["fracture"] is UNCERTAIN and first.findings["pneumonia"] is POSITIVE
    assert first.findings["tuberculosis"] is NEGATIVE and first.findings["no_finding"] is NEGATIVE
    assert first.boxes == (
        Box("Lung Opacity", 1, 2, 3, 4, reader="R1"),
        Box("Rib fracture", 1, 1, 1, 1, reader="R3"),
    )
    assert "Credentialed" in first.licence and first.split == "train"
    assert second.findings["no_finding"] is POSITIVE and second.findings["cavity"] is NEGATIVE
    # One reading, on which five radiologists agreed.
    assert third.split == "test" and third.labels["Other diseases"] is POSITIVE
    assert third.findings["no_finding"] is NEGATIVE and third.findings["pneumonia"] is NEGATIVE
    assert third.boxes == (Box("Other lesion", 0, 0, 9, 9),)
    assert third.images[0].path == base / "test" / "cc.dicom"


def test_boxes_alone_say_nothing_of_diagnoses(tmp_path: Path) -> None:
    base = write_physionet(tmp_path)
    (base / "annotations" / "image_labels_train.csv").unlink()
    first = next(iter(open_set(base)))
    assert first.labels["Lung Opacity"] is UNCERTAIN and first.labels["Pneumonia"] is UNMENTIONED
    assert "pneumonia" not in first.findings and first.findings["pneumothorax"] is NEGATIVE


def test_another_set_with_a_train_csv_is_not_this_one(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("Path,Sex,Age\n")
    assert not SET.recognises(tmp_path)


BAD_ROWS = {
    "bad_label": "aa,Broken heart,1,R1,1,2,3,4",
    "bad_value": "aa,Cardiomegaly,1,R1,3,2,3,4",
    "duplicate_id": ROWS[0],
    "missing_file": "cc,No finding,14,R1,,,,",
    "not_a_row": "aa,Cardiomegaly",
}


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_bad_rows_are_named_and_cost_themselves(kind: str, tmp_path: Path) -> None:
    root = write_challenge(tmp_path, [*ROWS, BAD_ROWS[kind]])
    with pytest.raises(BadRow, match=r"train.csv, line 10: ") as error:
        list(open_set(root))
    assert error.value.kind == kind
    opened = open_set(root, on_bad="skip")
    records = list(opened)
    assert [record.study_id for record in records] == ["aa", "bb"] and len(records[0].boxes) == 5
    assert records[0].labels["Cardiomegaly"] is POSITIVE
    assert opened.reading.counts == {("train.csv", kind): 1}


def test_further_bad_rows(tmp_path: Path) -> None:
    rows = [*ROWS, "bb,No finding,14,R1,1,2,3,4", "aa,Cardiomegaly,3,R1,1,2,3,", "a/a,No finding,14,R1,,,,"]
    opened = open_set(write_challenge(tmp_path, rows), on_bad="skip")
    assert len(list(opened)) == 2 and opened.reading.counts == {("train.csv", "bad_value"): 3}


def test_bad_rows_of_physionet(tmp_path: Path) -> None:
    base = write_physionet(tmp_path)
    with open(base / "annotations" / "image_labels_train.csv", "a") as file:
        zeros = ",".join("0" for _ in LABELS)
        file.write(f"aa,R1,{zeros}\naa,R7,2{zeros[1:]}\n")
    with open(base / "annotations" / "annotations_train.csv", "a") as file:
        file.write("bb,R4,Cardiomegaly,1,2,,\n")
    opened = open_set(base, on_bad="skip")
    records = list(opened)
    assert len(records) == 3 and records[0].labels["Lung Opacity"] is POSITIVE
    assert opened.reading.counts == {
        ("image_labels_train.csv", "duplicate_id"): 1,
        ("image_labels_train.csv", "bad_label"): 1,
        ("annotations_train.csv", "bad_value"): 1,
    }


def test_wrong_column_is_raised_at_once(tmp_path: Path) -> None:
    # The set of children has tables of the same names, with other labels.
    (tmp_path / "image_labels_train.csv").write_text("image_id,rad_ID,Bronchitis,No finding\n")
    with pytest.raises(BadRow, match="Aortic enlargement") as error:
        list(open_set(tmp_path, on_bad="skip"))
    assert error.value.kind == "wrong_column"


def test_absent_boxes_may_be_told_as_nan_and_slipped_cells_are_not_quoted(tmp_path: Path) -> None:
    rows = [row.replace(",,,,", ",NaN,NaN,nan,NaN") for row in ROWS]
    clean = write_challenge(tmp_path, rows)
    blank = write_challenge(tmp_path / "blank")
    said = [[(each.study_id, each.labels, each.boxes) for each in open_set(root)] for root in (clean, blank)]
    assert said[0] == said[1]
    rows += ["aa,MRN 555 Smith,1,R1,1,2,3,4", "aa,Cardiomegaly,1,R1,1,2,3,nan"]
    (clean / "train.csv").write_text("\n".join([HEAD, *rows]) + "\n")
    opened = open_set(clean, on_bad="skip")
    assert len(list(opened)) == 2
    assert opened.reading.counts == {("train.csv", "bad_label"): 1, ("train.csv", "bad_value"): 1}
    assert "Smith" not in opened.reading.summary() and "a text of 13 characters" in opened.reading.summary()


def test_an_image_of_both_parts_is_one_study(tmp_path: Path) -> None:
    base = write_physionet(tmp_path)
    for name in ("annotations_test.csv", "image_labels_test.csv"):
        table = base / "annotations" / name
        table.write_text(table.read_text().replace("\ncc,", "\naa,"))
    opened = open_set(base, on_bad="skip")
    assert [(record.study_id, record.split) for record in opened] == [("aa", "train"), ("bb", "train")]
    assert opened.reading.counts == {("image_labels_test.csv", "duplicate_id"): 1}


@pytest.mark.realdata
def test_full_table_has_the_published_counts(data_root: Path, tmp_path: Path) -> None:
    os.symlink(data_root / "label_tables" / "vinbigdata-train.csv.gz", tmp_path / "train.csv.gz")
    images, boxes, readers, states = 0, Counter(), set(), Counter()
    for record in open_set(tmp_path, images="unchecked"):
        images += 1
        boxes.update(box.label for box in record.boxes)
        readers.update(box.reader for box in record.boxes)
        states.update(record.labels.items())
    assert images == SET.published["train_images"] == 15000
    # Each of the three readers of an image without finding has a row, each box has one.
    assert states["No finding", POSITIVE] == 10606 and states["No finding", UNCERTAIN] == 0
    assert sum(boxes.values()) + 3 * 10606 == TABLE_ROWS
    assert boxes["Aortic enlargement"] == 7162 and boxes["Pneumothorax"] == 226
    assert len(readers) == 11 and None not in readers
    assert states["Cardiomegaly", POSITIVE] == 1817 and states["Cardiomegaly", UNCERTAIN] == 483
