# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""CT-RATE in small trees built to its published layout; texts are made up."""

import csv
import io
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from m3fm.data.labels import label_names
from m3fm.data.opening import open_set
from m3fm.data.schema import LabelState, StudyRecord
from m3fm.data.sets.ct_rate import SET
from m3fm.data.tables import BadRow, Reading

# In the order of the published tables.
NAMES = (
    "Medical material", "Arterial wall calcification", "Cardiomegaly", "Pericardial effusion",
    "Coronary artery wall calcification", "Hiatal hernia", "Lymphadenopathy", "Emphysema", "Atelectasis",
    "Lung nodule", "Lung opacity", "Pulmonary fibrotic sequela", "Pleural effusion", "Mosaic attenuation pattern",
    "Peribronchial thickening", "Consolidation", "Bronchiectasis", "Interlobular septal thickening",
)  # fmt: skip
REPORTS = ("VolumeName", "ClinicalInformation_EN", "Technique_EN", "Findings_EN", "Impressions_EN")
PEOPLE = ("VolumeName", "Manufacturer", "PatientSex", "PatientAge")
FINDINGS = 'Heart contour, size are normal.\nNo "pleural" effusion was detected.'
IMPRESSION = "Thoracic CT examination within normal limits."


def line(*fields: object) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="").writerow(fields)
    return text.getvalue()


def report(volume: str, findings: str = FINDINGS, impression: str = IMPRESSION) -> str:
    return line(f"{volume}.nii.gz", "Not given.", "Non-contrast images.", findings, impression)


def labels(volume: str, *positive: str) -> str:
    return line(f"{volume}.nii.gz", *(int(name in positive) for name in NAMES))


def person(volume: str, sex: str = "F", age: str = "057Y") -> str:
    return line(f"{volume}.nii.gz", "SIEMENS", sex, age)


# Patient 1: a scan with two reconstructions, and one without a report. Patient 2: a scan.
TRAIN = ("train_1_a_1", "train_1_a_2", "train_2_a_1")
TABLES = {
    "radiology_text_reports/train_reports.csv": [line(*REPORTS), *map(report, TRAIN)],
    "multi_abnormality_labels/train_predicted_labels.csv": [
        line("VolumeName", *NAMES),
        *(labels(volume, "Lung nodule", "Medical material") for volume in TRAIN[:2]),
        labels("train_2_a_1"),
        labels("train_1_b_1", "Emphysema"),
    ],
    "metadata/train_metadata.csv": [
        line(*PEOPLE),
        *map(person, TRAIN),
        person("train_1_b_1", age="058Y"),
    ],
    "radiology_text_reports/validation_reports.csv": [line(*REPORTS), report("valid_1_a_1")],
    "multi_abnormality_labels/valid_predicted_labels.csv": [line("VolumeName", *NAMES), labels("valid_1_a_1")],
    "metadata/validation_metadata.csv": [line(*PEOPLE), person("valid_1_a_1", "M", "006M")],
}
VOLUMES = (*TRAIN, "train_1_b_1", "valid_1_a_1")


def file_of(root: Path, volume: str, fixed: str = "") -> Path:
    part, patient, scan, _ = volume.split("_")
    name = f"{part}_{patient}"
    return root / "dataset" / f"{part}{fixed}" / name / f"{name}_{scan}" / f"{volume}.nii.gz"


def touch(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def write(root: Path, name: str, lines: Sequence[str]) -> None:
    path = root / "dataset" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8", errors="surrogateescape")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Returns a copy of the repository of the set."""
    for name, lines in TABLES.items():
        write(tmp_path, name, lines)
    for volume in VOLUMES:
        touch(file_of(tmp_path, volume))
    return tmp_path


def read(root: Path, images: str = "required") -> list[StudyRecord]:
    return list(SET.read(root, Reading("raise", images)))


def read_on(root: Path) -> tuple[list[StudyRecord], dict[tuple[str, str], int]]:
    reading = Reading("skip")
    return list(SET.read(root, reading)), dict(reading.counts)


def test_a_study_is_a_scan_and_its_first_reconstruction(root):
    assert SET.recognises(root) and SET.recognises(root / "dataset")
    records = read(root)
    assert [record.study_id for record in records] == ["train_1_a", "train_2_a", "train_1_b", "valid_1_a"]
    first, second, third, fourth = records
    assert [(image.path, image.view) for image in first.images] == [(file_of(root, "train_1_a_1"), "AXIAL")]
    assert (first.patient_id, third.patient_id, first.split) == ("train_1", "train_1", "train")
    assert (first.modality, first.age, first.sex) == ("ct", 57.0, "F")
    report = first.reports["en"]
    assert report.raw == f"{FINDINGS}\n{IMPRESSION}"
    assert report.impression == IMPRESSION
    assert report.findings.startswith("Heart contour, size are normal. ")
    # The set labels all of its 18 abnormalities in every scan.
    assert Counter(first.labels.values()) == {"positive": 2, "negative": 16}
    assert first.findings["nodule"] is first.findings["support_devices"] is LabelState.POSITIVE
    assert first.findings["emphysema"] is LabelState.NEGATIVE
    assert set(second.labels.values()) == {LabelState.NEGATIVE} and "no_finding" not in second.findings
    assert (third.reports, third.age, third.labels["Emphysema"]) == ({}, 58.0, "positive")
    assert (fourth.split, fourth.sex, fourth.age) == ("validation", "M", 0.5)
    assert StudyRecord.from_row(first.as_row()) == first


def test_opens_by_its_files_and_by_part(root):
    opened = open_set(root, split="train")
    assert opened.set is SET
    assert [record.split for record in opened] == ["train"] * 3
    assert opened.reading.summary() == ""


def test_reconstruction_that_is_there_is_taken(root):
    file_of(root, "train_1_a_1").unlink()
    records = read(root)  # no bad row: the scan has an image
    assert records[0].images[0].path == file_of(root, "train_1_a_2")
    touch(file_of(root, "train_1_a_2", fixed="_fixed"))
    assert read(root)[0].images[0].path == file_of(root, "train_1_a_2", fixed="_fixed")
    file_of(root, "train_1_a_2", fixed="_fixed").unlink()
    file_of(root, "train_1_a_2").unlink()
    with pytest.raises(BadRow, match="line 2: .*not there") as caught:
        read(root)
    assert "train_1" not in str(caught.value)
    records, counts = read_on(root)
    assert [record.study_id for record in records] == ["train_2_a", "train_1_b", "valid_1_a"]
    assert counts == {("train_reports.csv", "missing_file"): 1}


def test_copies_without_some_of_the_tables(root):
    all_of_it = read(root)
    for folder in ("train", "valid"):
        for path in (root / "dataset" / folder).rglob("*.nii.gz"):
            path.unlink()
    assert [record.images[0].path.name for record in read(root, "unchecked")] == [
        record.images[0].path.name for record in all_of_it
    ]
    for name in ("multi_abnormality_labels", "metadata"):
        for path in (root / "dataset" / name).iterdir():
            path.unlink()
    records = read(root, "unchecked")
    assert [record.study_id for record in records] == ["train_1_a", "train_2_a", "valid_1_a"]
    assert [(record.labels, record.age) for record in records] == [({}, None)] * 3
    for path in (root / "dataset" / "radiology_text_reports").iterdir():
        path.unlink()
    assert not SET.recognises(root)
    with pytest.raises(BadRow, match="expected dataset/radiology_text_reports"):
        read(root)


def test_tables_and_volumes_in_one_folder(root, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for name in TABLES:
        (root / "dataset" / name).rename(flat / Path(name).name)
    (flat / "train").mkdir()
    for volume in VOLUMES:
        (flat / volume.split("_")[0]).mkdir(exist_ok=True)
        (flat / volume.split("_")[0] / f"{volume}.nii.gz").touch()
    assert SET.recognises(flat)
    assert [record.images[0].path.parent for record in read(flat)] == [*[flat / "train"] * 3, flat / "valid"]


def test_what_the_publishers_list_as_no_chest_is_left_out(root):
    write(root, "metadata/no_chest_train.txt", ["train_1_a_1.nii.gz", "train_2_a_1"])
    records = read(root)
    assert [record.study_id for record in records] == ["train_1_a", "train_1_b", "valid_1_a"]
    assert records[0].images[0].path.name == "train_1_a_2.nii.gz"


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        (report("train_1_a_1"), "duplicate_id"),
        (report("head_1_a_1"), "bad_value"),
        (report("valid_1_a_9"), "bad_value"),
        (report("train_1_a"), "bad_value"),
        ("train_3_a_1.nii.gz,too,few", "not_a_row"),
        ('train_3_a_1.nii.gz,,,"never closed', "not_a_row"),
        (report("train_3_a_1", "\udcff"), "bad_encoding"),
        (report("train_3_a_1"), "missing_file"),
    ],
)
def test_each_kind_of_bad_report_is_told_and_costs_nothing_else(root, row, kind):
    expected = read(root)
    name = "radiology_text_reports/train_reports.csv"
    write(root, name, [*TABLES[name][:2], row, *TABLES[name][2:]])
    records, counts = read_on(root)
    assert records == expected
    assert counts == {("train_reports.csv", kind): 1}
    with pytest.raises(BadRow, match="train_reports.csv, line 4: ") as caught:
        read(root)
    assert caught.value.kind == kind


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        (labels("train_1_a_2", "Lung nodule"), "bad_label"),  # not what the other reconstruction has
        (labels("train_1_a_2")[:-1] + "2", "bad_label"),
        (labels("train_1_a_2")[:-1], "bad_label"),
        (labels("train_1_a_1"), "duplicate_id"),
        (labels("train_1_a_2")[:-2], "not_a_row"),
    ],
)
def test_bad_labels_of_a_reconstruction_leave_those_of_the_other(root, row, kind):
    expected = read(root)
    name = "multi_abnormality_labels/train_predicted_labels.csv"
    lines = list(TABLES[name])
    lines[2] = row
    write(root, name, lines)
    assert read_on(root) == (expected, {("train_predicted_labels.csv", kind): 1})


def test_bad_age_costs_the_age_and_the_sex(root):
    name = "metadata/train_metadata.csv"
    lines = list(TABLES[name])
    lines[1] = person("train_1_a_1", age="old")
    write(root, name, lines)
    records, counts = read_on(root)
    assert (records[0].age, records[0].sex, records[1].age) == (None, None, 57.0)
    assert counts == {("train_metadata.csv", "bad_value"): 1}


def test_wrong_column_ends_the_reading_at_once(root):
    name = "multi_abnormality_labels/valid_predicted_labels.csv"
    write(root, name, [line("VolumeName", *NAMES[1:])])
    with pytest.raises(BadRow, match="Medical material") as caught:
        read_on(root)
    assert caught.value.kind == "wrong_column"


def test_one_bad_row_in_a_hundred_loses_no_good_one(tmp_path):
    rows = [report(f"train_{number}_a_1") for number in range(1000)]
    bad = range(3, 1000, 100)
    for number in bad:
        rows[number] = rows[number].replace(' effusion was detected."', " effusion was detected.")
    write(tmp_path, "radiology_text_reports/train_reports.csv", [line(*REPORTS), *rows])
    reading = Reading("skip", "unchecked")
    records = list(SET.read(tmp_path, reading))
    assert {record.study_id for record in records} == {f"train_{n}_a" for n in range(1000) if n not in bad}
    assert all(record.reports["en"].impression == IMPRESSION for record in records)


def test_labels_are_those_of_the_shared_space():
    assert label_names("ctrate_reports_text") == set(NAMES)


@pytest.mark.realdata
def test_real_labels_have_these_names(data_root):
    with open(data_root / "ctrate_reports_text" / "data.jsonl", encoding="utf-8") as file:
        said = {name for row in map(json.loads, file) for name in row.get("labels18") or ()}
    assert said == set(NAMES)
