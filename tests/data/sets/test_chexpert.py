# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""CheXpert and CheXpert Plus in small trees built to their published layouts, and CheXpert's real table."""

import gzip
import json
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from m3fm.data.opening import open_set
from m3fm.data.schema import LabelState, StudyRecord
from m3fm.data.sets.chexpert import PLUS, SET
from m3fm.data.tables import BadRow, Reading

NAMES = (
    "No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema",
    "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture",
    "Support Devices",
)  # fmt: skip
HEAD = ",".join(("Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *NAMES))
TOP = "CheXpert-v1.0-small"


def labels(**said: str) -> str:
    return ",".join(said.get(name.replace(" ", "_"), "") for name in NAMES)


FIRST = labels(Edema="-1.0", Pleural_Effusion="1.0", Pneumothorax="0.0")
TRAIN = (
    f"{TOP}/train/patient00001/study1/view1_frontal.jpg,Female,68,Frontal,AP,{FIRST}",
    f"{TOP}/train/patient00001/study2/view1_frontal.jpg,Female,70,Frontal,PA,{labels(No_Finding='1.0')}",
    # Apart from its study's other view.
    f"{TOP}/train/patient00001/study1/view2_lateral.jpg,Female,68,Lateral,,{FIRST}",
    f"{TOP}/train/patient00002/study1/view1_frontal.jpg,Unknown,0,Frontal,LL,{labels()}",
)
VALID = f"{TOP}/valid/patient64541/study1/view1_frontal.jpg,Male,73,Frontal,AP,"


def write(path: Path, lines: Sequence[str]) -> None:
    text = "\n".join(lines) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


def touch(root: Path, names: Sequence[str]) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Returns a copy as it is published, in the folder that the table names."""
    folder = tmp_path / TOP
    write(folder / "train.csv", [HEAD, *TRAIN])
    write(folder / "valid.csv", [HEAD, VALID + ",".join(["0.0"] * 13 + ["1.0"])])
    touch(tmp_path, [row.partition(",")[0] for row in (*TRAIN, VALID)])
    return folder


def read(root: Path, images: str = "required") -> list[StudyRecord]:
    return list(SET.read(root, Reading("raise", images)))


def read_on(root: Path) -> tuple[list[StudyRecord], dict[tuple[str, str], int]]:
    reading = Reading("skip")
    return list(SET.read(root, reading)), dict(reading.counts)


def test_reads_a_study_with_all_its_views(root):
    records = read(root)
    assert [record.study_id for record in records] == [
        "patient00001/study1",
        "patient00001/study2",
        "patient00002/study1",
        "patient64541/study1",
    ]
    first = records[0]
    folder = root / "train" / "patient00001" / "study1"
    assert [(image.path, image.view) for image in first.images] == [
        (folder / "view1_frontal.jpg", "AP"),
        (folder / "view2_lateral.jpg", "LATERAL"),
    ]
    assert (first.patient_id, first.age, first.sex, first.split) == ("patient00001", 68.0, "F", "train")
    assert first.labels["Edema"] is LabelState.UNCERTAIN
    assert Counter(first.labels.values()) == {"unmentioned": 11, "uncertain": 1, "positive": 1, "negative": 1}
    assert first.findings == {
        "no_finding": LabelState.NEGATIVE,
        "edema": LabelState.UNCERTAIN,
        "pneumothorax": LabelState.NEGATIVE,
        "pleural_effusion": LabelState.POSITIVE,
    }
    assert (records[2].sex, [image.view for image in records[2].images]) == (None, ["LATERAL"])
    assert records[3].split == "validation"
    # Radiologists read every label of the validation part: 0.0 is a denial.
    assert Counter(records[3].labels.values()) == {"negative": 13, "positive": 1}
    assert StudyRecord.from_row(first.as_row()) == first
    assert "patient00001" not in repr(first)


def test_opens_by_its_files_and_by_part(root):
    opened = open_set(root, split="validation")
    assert opened.set is SET
    assert [record.split for record in opened] == ["validation"] * 1
    assert opened.reading.summary() == ""


def test_is_recognised_by_what_its_table_says(root, tmp_path):
    assert SET.recognises(root) and SET.recognises(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "train.csv").write_text("image_id,class_name,class_id\n")
    assert not SET.recognises(tmp_path / "other")
    (tmp_path / "other" / "train.csv").unlink()
    (tmp_path / "other" / "train.csv.gz").write_bytes(b"no gzip")
    assert not SET.recognises(tmp_path / "other")


def test_layouts_on_disk(root, tmp_path):
    expected = read(root)
    assert read(tmp_path) == expected  # from the folder above
    # Tables apart from images
    (tmp_path / "tables").mkdir()
    for name in ("train.csv", "valid.csv"):
        (root / name).rename(tmp_path / "tables" / name)
    assert read(tmp_path / "tables") == expected
    # Batches, as the full-size set is published
    batch = tmp_path / "CheXpert-v1.0 batch 2 (train 1)"
    (root / "train").rename(batch)
    records = read(tmp_path / "tables")
    assert records[0].images[0].path == batch / "patient00001" / "study1" / "view1_frontal.jpg"
    assert [record.labels for record in records] == [record.labels for record in expected]


def test_tables_alone(root):
    for part in ("train", "valid"):
        shutil.rmtree(root / part)
    with pytest.raises(BadRow, match="line 2: .*not there"):
        read(root)
    records = read(root, images="unchecked")
    assert [len(record.images) for record in records] == [2, 1, 1, 1]
    assert read_on(root) == ([], {("train.csv", "missing_file"): 4, ("valid.csv", "missing_file"): 1})


def test_test_part_without_what_the_other_tables_say_of_views(tmp_path):
    head = ",".join(("Path", *sorted(NAMES)))
    zeros = ",".join(["0.0"] * 14)
    rows = [f"test/patient64741/study1/view{view}.jpg,{zeros}" for view in ("1_frontal", "2_lateral")]
    write(tmp_path / "test_labels.csv", [head, *rows])
    write(tmp_path / "val_labels.csv", [head, f"val/patient64541/study1/view1_frontal.jpg,{zeros}"])
    touch(tmp_path, [row.partition(",")[0] for row in rows] + ["val/patient64541/study1/view1_frontal.jpg"])
    assert SET.recognises(tmp_path)
    validation, test = read(tmp_path)
    assert (validation.split, test.split) == ("validation", "test")
    assert [image.view for image in test.images] == ["FRONTAL", "LATERAL"]
    assert (test.age, test.sex, len(test.findings)) == (None, None, 14)


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        (TRAIN[0], "duplicate_id"),
        (TRAIN[0].replace("view1", "view3"), "missing_file"),
        (TRAIN[0].replace("view1", "view2").replace("frontal", "side"), "bad_value"),
        (TRAIN[0].replace("patient00001/", ""), "bad_value"),
        (TRAIN[0].replace("train/", "../"), "bad_value"),
        ("," + TRAIN[0].partition(",")[2], "bad_value"),
        (TRAIN[3].replace("view1", "view4").replace(",0,", ",old,"), "bad_value"),
        (TRAIN[3].replace("view1", "view4").replace(",Frontal,", ",Oblique,"), "bad_value"),
        (TRAIN[0].replace("view1", "view4").replace("-1.0", "0.5"), "bad_label"),
        (TRAIN[0].replace("view1", "view4").replace("-1.0", "1.0"), "bad_label"),  # not what view 1 says
        (TRAIN[0].replace("view1", "view4")[:-1], "not_a_row"),
        ('"' + TRAIN[0], "not_a_row"),
        (TRAIN[0].replace("Female", "Fem\udcff"), "bad_encoding"),
    ],
)
def test_each_kind_of_bad_row_is_told_and_costs_nothing_else(root, row, kind):
    expected = read(root)
    touch(root, [f"train/patient0000{patient}/study1/view4_frontal.jpg" for patient in (1, 2)])
    text = "\n".join([HEAD, TRAIN[0], row, *TRAIN[1:]]) + "\n"
    (root / "train.csv").write_bytes(text.encode("utf-8", "surrogateescape"))
    records, counts = read_on(root)
    assert counts == {("train.csv", kind): 1}
    assert sorted(records, key=lambda each: each.study_id) == expected
    with pytest.raises(BadRow, match="train.csv, line 3: ") as caught:
        read(root)
    assert caught.value.kind == kind
    assert "patient0" not in str(caught.value)


def test_a_study_of_whose_views_none_is_there_is_left_out(root):
    for view in ("view1_frontal", "view2_lateral"):
        (root / "train" / "patient00001" / "study1" / f"{view}.jpg").unlink()
    records, counts = read_on(root)
    assert [record.study_id for record in records] == [
        "patient00001/study2",
        "patient00002/study1",
        "patient64541/study1",
    ]
    assert counts == {("train.csv", "missing_file"): 2}


def test_an_absent_age_may_be_told_as_nan(root):
    rows = [row.replace(",68,", ",nan,") for row in TRAIN]
    write(root / "train.csv", [HEAD, *rows])
    assert [record.age for record in read(root)] == [None, 70.0, 0.0, 73.0]


def test_wrong_column_ends_the_reading_at_once(root):
    write(root / "valid.csv", [HEAD.replace("AP/PA", "View"), VALID + "," * 13])
    with pytest.raises(BadRow, match="AP/PA") as caught:
        read_on(root)
    assert caught.value.kind == "wrong_column"


def test_one_bad_row_in_a_hundred_loses_no_good_one(tmp_path):
    rows = [
        f"{TOP}/train/patient{number // 4:05}/study{number // 2}/view{number % 2 + 1}_frontal.jpg,Male,50,Frontal,AP,"
        + labels(Edema="1.0")
        for number in range(1000)
    ]
    bad = range(7, 1000, 100)
    for number in bad:
        rows[number] = rows[number].replace("1.0", '"1.0')
    write(tmp_path / "train.csv.gz", [HEAD, *rows])
    reading = Reading("skip", "unchecked")
    records = list(SET.read(tmp_path, reading))
    assert dict(reading.counts) == {("train.csv.gz", "not_a_row"): len(bad)}
    assert sum(len(record.images) for record in records) == 990
    assert len(records) == 500  # the other view of a study stays


# Study counts of the paper's Table 1 (Irvin et al. 2019), of the labels for which it tells them: positive, uncertain.
PAPER = {
    "No Finding": (16627, 0),
    "Enlarged Cardiomediastinum": (9020, 10148),
    "Cardiomegaly": (23002, 6597),
    "Lung Lesion": (6856, 1071),
    "Lung Opacity": (92669, 4341),
    "Edema": (48905, 11571),
    "Consolidation": (12730, 23976),
    "Pneumonia": (4576, 15658),
    "Atelectasis": (29333, 29377),
    "Pneumothorax": (17313, 2663),
    "Pleural Effusion": (75696, 9419),
    "Pleural Other": (2441, 1771),
}


@pytest.mark.realdata
def test_real_table_counts_what_its_paper_counts(data_root, tmp_path):
    (tmp_path / "train.csv.gz").symlink_to((data_root / "label_tables" / "chexpert_train.csv.gz").resolve())
    assert SET.recognises(tmp_path)
    stated: Counter = Counter()
    images = studies = 0
    patients = set()
    for record in SET.read(tmp_path, Reading("raise", "unchecked")):
        studies += 1
        images += len(record.images)
        patients.add(record.patient_id)
        stated.update(record.labels.items())
        assert record.split == "train"
    assert (images, studies) == (SET.published["train_images"], SET.published["train_studies"])
    # 200 patients are in the validation part, 500 in the test part.
    assert len(patients) == SET.published["patients"] - 700
    for label, counts in PAPER.items():
        assert (stated[label, LabelState.POSITIVE], stated[label, LabelState.UNCERTAIN]) == counts
        # The paper counts as negative what the report does not mention.
        assert sum(stated[label, state] for state in LabelState) == studies


# --------------------------------------------------------------------------------------------------------------------
# CheXpert Plus

PLUS_HEAD = (
    "path_to_image,path_to_dcm,frontal_lateral,ap_pa,deid_patient_id,patient_report_date_order,report,"
    "section_narrative,section_findings,section_impression,age,sex,race,split"
)


def plus_row(place: str, side: str, report: str, findings: str = "", impression: str = "", sex: str = "Male") -> str:
    texts = ",".join(f'"{text}"' for text in (report, "", findings, impression))
    dicom = place.replace(".jpg", ".dcm")
    part, patient = place.split("/")[:2]
    return f"{place},{dicom},{side},{'AP' if side == 'Frontal' else ''},{patient},1,{texts},77.0,{sex},Other,{part}"


PLUS_ROWS = (
    plus_row(
        "train/patient00001/study1/view1_frontal.jpg",
        "Frontal",
        "FINDINGS: Clear.\n\nIMPRESSION: 1. No pneumonia.",
        "Clear.",
        "1. No pneumonia.",
    ),
    plus_row("train/patient00003/study1/view1_frontal.jpg", "Frontal", "All, of it\nclear.", sex="Female"),
    plus_row("train/patient00001/study1/view2_lateral.jpg", "Lateral", "FINDINGS: Clear."),
    plus_row("valid/patient64541/study1/view1_frontal.jpg", "Frontal", ""),
)


@pytest.fixture
def plus(tmp_path: Path) -> Path:
    """Returns a copy of CheXpert Plus with PNG files."""
    write(tmp_path / "df_chexpert_plus_240401.csv", [PLUS_HEAD, *PLUS_ROWS])
    said = {"path_to_image": PLUS_ROWS[0].partition(",")[0], **dict.fromkeys(NAMES), "Pneumonia": 0.0, "Edema": -1.0}
    write(tmp_path / "chexbert_labels" / "report_fixed.json", [json.dumps(said)])
    touch(tmp_path / "PNG", [row.partition(",")[0].replace(".jpg", ".png") for row in PLUS_ROWS])
    return tmp_path


def test_plus_reads_reports_with_their_views(plus):
    assert PLUS.recognises(plus) and not SET.recognises(plus)
    first, second, third = PLUS.read(plus, Reading())
    folder = plus / "PNG" / "train" / "patient00001" / "study1"
    assert [(image.path, image.view) for image in first.images] == [
        (folder / "view1_frontal.png", "AP"),
        (folder / "view2_lateral.png", "LATERAL"),
    ]
    assert first.reports["en"].raw == "FINDINGS: Clear.\n\nIMPRESSION: 1. No pneumonia."
    assert first.reports["en"].findings == "Clear."
    assert "No pneumonia." in first.reports["en"].impression
    assert first.findings == {"edema": LabelState.UNCERTAIN, "pneumonia": LabelState.NEGATIVE}
    assert (first.source, first.age, first.sex, first.split) == ("chexpert_plus", 77.0, "M", "train")
    assert second.reports["en"].raw == "All, of it\nclear."
    assert (second.patient_id, second.sex, second.labels) == ("patient00003", "F", {})
    assert (third.split, third.reports) == ("validation", {})


def test_plus_tells_of_bad_rows_once(plus):
    rows = [PLUS_ROWS[0], PLUS_ROWS[1].replace('"All', "All").replace('clear."', 'clear"'), *PLUS_ROWS[2:]]
    write(plus / "df_chexpert_plus_240401.csv", [PLUS_HEAD, *rows, PLUS_ROWS[0]])
    reading = Reading("skip")
    records = list(PLUS.read(plus, reading))
    assert [len(record.images) for record in records] == [2, 1]
    # The row without its quote is two lines, neither of which is one.
    assert dict(reading.counts) == {
        ("df_chexpert_plus_240401.csv", "not_a_row"): 2,
        ("df_chexpert_plus_240401.csv", "duplicate_id"): 1,
    }
