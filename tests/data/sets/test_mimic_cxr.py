# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""MIMIC-CXR in small trees built to its published layout; ids and texts are made up."""

import gzip
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from m3fm.data.opening import OpenSet, open_set
from m3fm.data.schema import LabelState, StudyRecord
from m3fm.data.sets.mimic_cxr import SET
from m3fm.data.studies import study_of, training_part
from m3fm.data.tables import BadRow, Reading

METADATA = (
    "dicom_id,subject_id,study_id,PerformedProcedureStepDescription,ViewPosition,Rows,Columns,StudyDate,StudyTime"
)
# Two views, apart in the table; one view; a view of another patient.
VIEWS = (
    ("a1", 10000001, 50000001, "PA"),
    ("b1", 10000001, 50000002, "AP"),
    ("a2", 10000001, 50000001, "LL"),
    ("c1", 11000002, 50000003, ""),
)
LABELS = "subject_id,study_id,Atelectasis,Cardiomegaly,Consolidation,Edema,Enlarged Cardiomediastinum,Fracture,"
LABELS += "Lung Lesion,Lung Opacity,No Finding,Pleural Effusion,Pleural Other,Pneumonia,Pneumothorax,Support Devices"
REPORT = "FINAL REPORT\n FINDINGS:  The lungs are clear.\n\n IMPRESSION:  No pneumonia.\n"


def folder_of(patient: int, study: int) -> str:
    return f"files/p{str(patient)[:2]}/p{patient}/s{study}"


def label_row(patient: int, study: int, **said: str) -> str:
    names = LABELS.split(",")[2:]
    return ",".join([str(patient), str(study), *(said.get(name.replace(" ", "_"), "") for name in names)])


def write(path: Path, lines: Sequence[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "\n".join(lines) + "\n"
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


def metadata_row(view: tuple) -> str:
    dicom, patient, study, position = view
    return f'{dicom},{patient},{study},"CHEST (PA, LAT)",{position},3056,2544,21800506,213014.531'


def write_images(root: Path, views: Sequence[tuple] = VIEWS, suffix: str = ".jpg") -> None:
    for dicom, patient, study, _ in views:
        path = root / folder_of(patient, study) / f"{dicom}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def write_report(root: Path, patient: int, study: int, content: bytes = REPORT.encode()) -> None:
    path = root / f"{folder_of(patient, study)}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


@pytest.fixture
def jpg(tmp_path: Path) -> Path:
    """Returns a copy of MIMIC-CXR-JPG with reports beside its images."""
    root = tmp_path / "mimic-cxr-jpg"
    write(root / "mimic-cxr-2.0.0-metadata.csv.gz", [METADATA, *map(metadata_row, VIEWS)])
    splits = {50000001: "train", 50000002: "validate", 50000003: "test"}
    rows = [f"{dicom},{study},{patient},{splits[study]}" for dicom, patient, study, _ in VIEWS]
    write(root / "mimic-cxr-2.0.0-split.csv.gz", ["dicom_id,study_id,subject_id,split", *rows])
    chexpert = [
        label_row(10000001, 50000001, Pneumonia="0.0", Edema="-1.0", Lung_Opacity="1.0"),
        label_row(10000001, 50000002, No_Finding="1.0"),
    ]
    write(root / "mimic-cxr-2.0.0-chexpert.csv.gz", [LABELS, *chexpert])
    write_images(root)
    write_report(root, 10000001, 50000001)
    return root


def read(root: Path, images: str = "required") -> list[StudyRecord]:
    return list(OpenSet(root, SET, None, Reading("raise", images)))


def read_on(root: Path) -> tuple[list[StudyRecord], dict[tuple[str, str], int]]:
    reading = Reading("skip")
    return list(SET.read(root, reading)), dict(reading.counts)


def edit(path: Path, line: int, text: str | None = None, raw: bytes | None = None) -> None:
    """Replaces a line of a compressed table, counted from 1."""
    lines = gzip.decompress(path.read_bytes()).split(b"\n")
    lines[line - 1] = raw if raw is not None else text.encode()
    path.write_bytes(gzip.compress(b"\n".join(lines)))


def test_reads_a_study_with_all_its_views(jpg):
    first, second, third = read(jpg)
    assert first == StudyRecord(
        study_id="50000001",
        source="mimic_cxr",
        modality="cxr",
        patient_id="10000001",
        images=first.images,
        reports=first.reports,
        labels=first.labels,
        findings={
            "lung_opacity": LabelState.POSITIVE,
            "edema": LabelState.UNCERTAIN,
            "pneumonia": LabelState.NEGATIVE,
            "no_finding": LabelState.NEGATIVE,
        },
        split="train",
        licence=SET.licence,
    )
    folder = jpg / folder_of(10000001, 50000001)
    assert [(image.path, image.view) for image in first.images] == [
        (folder / "a1.jpg", "PA"),
        (folder / "a2.jpg", "LATERAL"),
    ]
    assert first.reports["en"].raw == REPORT
    assert "No pneumonia." in first.reports["en"].text
    stated = {name: state for name, state in first.labels.items() if state is not LabelState.UNMENTIONED}
    assert len(first.labels) == 14
    assert stated == {"Pneumonia": "negative", "Edema": "uncertain", "Lung Opacity": "positive"}
    assert (second.split, second.findings) == ("validation", {"no_finding": LabelState.POSITIVE})
    # A study counts without a report, labels or a known view.
    assert (third.split, third.reports, third.labels, third.findings) == ("test", {}, {}, {})
    assert [image.view for image in third.images] == [None]


def test_opens_by_its_files_and_by_part(jpg):
    opened = open_set(jpg, split="validation")
    assert opened.set is SET
    assert [record.split for record in opened] == ["validation"] * 1
    assert opened.reading.summary() == ""


def test_is_recognised_wherever_a_download_leaves_it(jpg, tmp_path):
    assert SET.recognises(jpg)
    assert SET.recognises(tmp_path)  # the folder above
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "metadata.csv").write_text("file_name\n")
    assert not SET.recognises(tmp_path / "own")


def test_download_by_wget_with_reports_in_the_sister_set(jpg, tmp_path):
    files = tmp_path / "download" / "physionet.org" / "files"
    (files / "mimic-cxr-jpg").mkdir(parents=True)
    jpg.rename(files / "mimic-cxr-jpg" / "2.0.0")
    write_report(files / "mimic-cxr" / "2.0.0", 10000001, 50000002, b"IMPRESSION: Clear.")
    for root in (tmp_path / "download", files / "mimic-cxr-jpg" / "2.0.0"):
        assert SET.recognises(root)
        first, second, third = read(root)
        assert [image.view for image in first.images] == ["PA", "LATERAL"]
        assert second.reports["en"].raw == "IMPRESSION: Clear."
        assert "en" in first.reports and not third.reports


@pytest.mark.parametrize(
    "place", ["mimic-cxr-jpg", "mimic-cxr-jpg/mimic-cxr-reports", "mimic-cxr-reports", "mimic-cxr"]
)
@pytest.mark.parametrize("packed", [False, True])
def test_reports_in_folders_and_in_their_archive(jpg, tmp_path, place, packed):
    if packed:
        (tmp_path / place).mkdir(exist_ok=True)
        with zipfile.ZipFile(tmp_path / place / "mimic-cxr-reports.zip", "w") as archive:
            archive.writestr(f"{folder_of(11000002, 50000003)}.txt", REPORT)
    else:
        write_report(tmp_path / place, 11000002, 50000003)
    first, second, third = read(jpg)
    assert third.reports["en"].raw == first.reports["en"].raw == REPORT
    assert not second.reports


def test_dicom_copy_with_its_record_list(tmp_path):
    rows = [f"{patient},{study},{dicom},{folder_of(patient, study)}/{dicom}.dcm" for dicom, patient, study, _ in VIEWS]
    write(tmp_path / "cxr-record-list.csv.gz", ["subject_id,study_id,dicom_id,path", *rows])
    write(tmp_path / "cxr-study-list.csv.gz", ["subject_id,study_id,path"])
    write_images(tmp_path, suffix=".dcm")
    write_report(tmp_path, 10000001, 50000001)
    first, second, third = read(tmp_path)
    assert [image.path.name for image in first.images] == ["a1.dcm", "a2.dcm"]
    assert first.reports["en"].raw == REPORT
    assert (second.split, third.labels) == (None, {})


def test_dicom_copy_takes_labels_and_split_from_its_sister(jpg, tmp_path):
    root = tmp_path / "mimic-cxr"
    write(root / "cxr-record-list.csv.gz", ["subject_id,study_id,dicom_id,path"])
    write_images(root, VIEWS[:1], suffix=".dcm")
    for images in ("required", "unchecked"):
        first = read(root, images)[0]
        assert first.images[0].path == root / folder_of(10000001, 50000001) / "a1.dcm"
        assert (first.images[0].view, first.split, len(first.labels)) == ("PA", "train", 14)
    # The sister's own images where this copy has not got one
    assert read(root)[0].images[1].path == jpg / folder_of(10000001, 50000001) / "a2.jpg"


def test_text_alone(tmp_path):
    rows = [f"{patient},{study},{folder_of(patient, study)}.txt" for _, patient, study, _ in VIEWS[:2]]
    write(tmp_path / "cxr-study-list.csv.gz", ["subject_id,study_id,path", *rows])
    write_report(tmp_path, 10000001, 50000001)
    first, second = read(tmp_path)
    assert (first.study_id, first.patient_id, first.images) == ("50000001", "10000001", ())
    assert "en" in first.reports and not second.reports


def test_tables_alone(jpg, tmp_path):
    for path in (jpg / "files").rglob("*.*"):
        path.unlink()
    with pytest.raises(BadRow, match=r"metadata.csv.gz, line 2: .*not there") as caught:
        read(jpg)
    assert caught.value.kind == "missing_file"
    records = read(jpg, images="unchecked")
    assert [len(record.images) for record in records] == [2, 1, 1]
    assert [record.split for record in records] == ["train", "validation", "test"]
    # The labels alone name studies too.
    for name in ("metadata", "split"):
        (jpg / f"mimic-cxr-2.0.0-{name}.csv.gz").unlink()
    assert [(record.patient_id, len(record.labels)) for record in read(jpg)] == [("10000001", 14), ("10000001", 14)]


def test_split_table_names_the_views_where_there_is_no_metadata(jpg):
    (jpg / "mimic-cxr-2.0.0-metadata.csv.gz").unlink()
    edit(jpg / "mimic-cxr-2.0.0-split.csv.gz", 3, "b1,50000002")
    records, counts = read_on(jpg)
    assert [(record.study_id, len(record.images), record.split) for record in records] == [
        ("50000001", 2, "train"),
        ("50000003", 1, "test"),
    ]
    assert counts == {("mimic-cxr-2.0.0-split.csv.gz", "not_a_row"): 1}  # told once, though read twice


def test_labellers_are_not_mixed_and_radiologists_come_first(jpg):
    negbio = [
        label_row(10000001, 50000001, Pneumonia="1.0"),
        label_row(11000002, 50000003, Fracture="1.0"),
    ]
    write(jpg / "mimic-cxr-2.0.0-negbio.csv.gz", [LABELS, *negbio])
    first, _, third = read(jpg)
    assert first.labels["Pneumonia"] is LabelState.NEGATIVE
    assert third.labels == {}  # CheXpert's table has not got it

    (jpg / "mimic-cxr-2.0.0-chexpert.csv.gz").rename(jpg / "away.csv.gz")
    first, second, third = read(jpg)
    assert first.labels["Pneumonia"] is third.labels["Fracture"] is LabelState.POSITIVE
    assert second.labels == {}

    (jpg / "away.csv.gz").rename(jpg / "mimic-cxr-2.1.0-chexpert.csv.gz")
    head = LABELS.removeprefix("subject_id,").replace("Lung Opacity", "Airspace Opacity")
    row = label_row(11000002, 50000003, Lung_Opacity="-1.0", Support_Devices="1.0").partition(",")[2]
    write(jpg / "mimic-cxr-2.1.0-test-set-labeled.csv", [head, row])
    first, _, third = read(jpg)
    assert first.labels["Pneumonia"] is LabelState.NEGATIVE
    assert third.findings == {"lung_opacity": LabelState.UNCERTAIN, "support_devices": LabelState.POSITIVE}
    assert len(third.labels) == 14


def test_bad_view_costs_its_row_alone(jpg):
    (jpg / folder_of(10000001, 50000001) / "a2.jpg").unlink()
    with pytest.raises(BadRow, match="line 4") as caught:
        read(jpg)
    assert "10000001" not in str(caught.value) and "50000001" not in str(caught.value)
    records, counts = read_on(jpg)
    assert [len(record.images) for record in records] == [1, 1, 1]
    assert counts == {("mimic-cxr-2.0.0-metadata.csv.gz", "missing_file"): 1}


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("a1,10000001,50000001,,PA,1,1,1,1", "duplicate_id"),
        ("a1,11000002,50000003,,PA,1,1,1,1", "duplicate_id"),  # in another study
        ("d1,11000002,50000001,,PA,1,1,1,1", "bad_value"),  # of another patient
        ("d1,11000002,s5,,PA,1,1,1,1", "bad_value"),
        ("d1,,50000001,,PA,1,1,1,1", "bad_value"),
        ("../d1,10000001,50000001,,PA,1,1,1,1", "bad_value"),
        (",10000001,50000001,,PA,1,1,1,1", "bad_value"),
        ("d1,10000001,50000001", "not_a_row"),
        ('d1,10000001,50000001,"CHEST,PA,1,1,1,1', "not_a_row"),
        (b"d1,10000001,50000001,CHEST \xff,PA,1,1,1,1", "bad_encoding"),
        ("d1,10000001,50000001,,PA,1,1,1,1", "missing_file"),
    ],
)
def test_each_kind_of_bad_row_is_told_and_costs_nothing_else(jpg, line, kind):
    table = jpg / "mimic-cxr-2.0.0-metadata.csv.gz"
    raw = line if isinstance(line, bytes) else line.encode()
    lines = gzip.decompress(table.read_bytes()).split(b"\n")
    table.write_bytes(gzip.compress(b"\n".join([*lines[:3], raw, *lines[3:]])))
    expected = read_on_without(jpg, table, lines)
    records, counts = read_on(jpg)
    assert records == expected
    assert counts == {(table.name, kind): 1}
    with pytest.raises(BadRow, match=f"{table.name}, line 4: ") as caught:
        read(jpg)
    assert caught.value.kind == kind


def read_on_without(root: Path, table: Path, lines: Sequence[bytes]) -> list[StudyRecord]:
    """Returns what a table without its bad row holds."""
    bad = table.read_bytes()
    table.write_bytes(gzip.compress(b"\n".join(lines)))
    records = read(root)
    table.write_bytes(bad)
    return records


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        (label_row(10000001, 50000001, Edema="2.0"), "bad_label"),
        (label_row(10000001, 50000001, Edema="yes"), "bad_label"),
        (label_row(10000001, 50000001)[:-3], "not_a_row"),
        (label_row(10000001, 50000002), "duplicate_id"),
    ],
)
def test_bad_labels_cost_the_labels_alone(jpg, row, kind):
    table = jpg / "mimic-cxr-2.0.0-chexpert.csv.gz"
    edit(table, 2, row)
    records, counts = read_on(jpg)
    assert [len(record.images) for record in records] == [2, 1, 1]
    assert "en" in records[0].reports and records[0].labels == {}
    assert counts == {(table.name, kind): 1}


def test_bad_split_and_bad_report_are_told(jpg):
    edit(jpg / "mimic-cxr-2.0.0-split.csv.gz", 3, "b1,50000002,10000001,holdout")
    write_report(jpg, 10000001, 50000001, b"FINDINGS: \xff\xfe")
    records, counts = read_on(jpg)
    assert [record.split for record in records] == ["train", "unassigned", "test"]
    assert [record.reports for record in records] == [{}, {}, {}]
    assert counts == {
        ("mimic-cxr-2.0.0-split.csv.gz", "bad_value"): 1,
        ("mimic-cxr-2.0.0-metadata.csv.gz", "bad_encoding"): 1,
    }


def test_a_study_that_the_table_of_splits_does_not_place_is_in_no_part(jpg):
    # The first study has no row left; the images of the second are in two parts.
    rows = ["b1,50000002,10000001,train", "b2,50000002,10000001,test", "c1,50000003,11000002,test"]
    write(jpg / "mimic-cxr-2.0.0-split.csv.gz", ["dicom_id,study_id,subject_id,split", *rows])
    records, counts = read_on(jpg)
    assert [record.split for record in records] == ["unassigned", "unassigned", "test"]
    assert counts == {("mimic-cxr-2.0.0-split.csv.gz", "bad_value"): 1}
    assert training_part(map(study_of, records)) == []
    (jpg / "mimic-cxr-2.0.0-split.csv.gz").unlink()
    assert [record.split for record in read(jpg)] == [None, None, None]


def test_a_study_of_whose_views_none_is_there_is_left_out(jpg):
    write_report(jpg, 10000001, 50000002)
    for name in ("a1", "a2"):
        (jpg / folder_of(10000001, 50000001) / f"{name}.jpg").unlink()
    records, counts = read_on(jpg)
    # The report that it has does not keep it.
    assert [record.study_id for record in records] == ["50000002", "50000003"]
    assert counts == {("mimic-cxr-2.0.0-metadata.csv.gz", "missing_file"): 2}


def test_wrong_tables_end_the_reading_at_once(jpg, tmp_path):
    edit(jpg / "mimic-cxr-2.0.0-chexpert.csv.gz", 1, LABELS.replace("Edema", "Oedema"))
    with pytest.raises(BadRow, match="Edema") as caught:
        read_on(jpg)
    assert caught.value.kind == "wrong_column"
    (jpg / "mimic-cxr-2.0.0-chexpert.csv.gz").unlink()
    (jpg / "mimic-cxr-reports.zip").write_bytes(b"not an archive")
    with pytest.raises(BadRow, match="ZIP archive"):
        read_on(jpg)
    (tmp_path / "other" / "empty").mkdir(parents=True)
    with pytest.raises(BadRow, match="expected one of the tables"):
        read(tmp_path / "other" / "empty")


def test_one_bad_row_in_a_hundred_loses_no_good_one(tmp_path):
    views = [(f"d{number}", 10000000 + number // 4, 50000000 + number // 2, "AP") for number in range(1000)]
    lines = [METADATA, *map(metadata_row, views)]
    bad = range(50, 1001, 100)
    for number in bad:
        lines[number] = lines[number].replace("CHEST (PA", 'CHEST "(PA')
    write(tmp_path / "mimic-cxr-2.0.0-metadata.csv", lines)
    write_images(tmp_path, views)
    records, counts = read_on(tmp_path)
    assert counts == {("mimic-cxr-2.0.0-metadata.csv", "not_a_row"): len(bad)}
    found = {image.path.stem for record in records for image in record.images}
    assert found == {view[0] for number, view in enumerate(views, start=1) if number not in bad}


def test_order_is_that_of_the_table_and_repeats(jpg):
    assert [record.study_id for record in read(jpg)] == ["50000001", "50000002", "50000003"]
    assert read(jpg) == read(jpg)
    record = read(jpg)[0]
    assert StudyRecord.from_row(record.as_row()) == record
    assert not any(word in repr(record) for word in ("10000001", "50000001", "lungs are clear"))
