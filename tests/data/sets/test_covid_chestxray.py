# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""COVID-CXR: small tables of its years, and its real images and notes."""

import csv
import json
import os
from pathlib import Path

import pytest

from m3fm.data.opening import open_set
from m3fm.data.schema import LabelState
from m3fm.data.sets.covid_chestxray import SET
from m3fm.data.tables import BadRow

POSITIVE, NEGATIVE, UNMENTIONED = LabelState.POSITIVE, LabelState.NEGATIVE, LabelState.UNMENTIONED
COLUMNS = (
    *("patientid", "offset", "sex", "age", "finding", "RT_PCR_positive", "survival", "intubated"),
    *("intubation_present", "went_icu", "in_icu", "needed_supplemental_O2", "extubated", "temperature"),
    *("pO2_saturation", "leukocyte_count", "neutrophil_count", "lymphocyte_count", "view", "modality", "date"),
    *("location", "folder", "filename", "doi", "url", "license", "clinical_notes", "other_notes", ""),
)
ROWS = [
    {
        **{"patientid": "2", "offset": "0", "sex": "M", "age": "65", "finding": "Pneumonia/Viral/COVID-19"},
        **{"view": "PA", "modality": "X-ray", "folder": "images", "filename": "a.1.jpg", "doi": "10.1056/x"},
        **{
            "url": "https://a.org/x",
            "license": "CC BY",
            "clinical_notes": 'Fever,\nand an "infiltrate".\r\nNo effusion.',
        },
    },
    {
        **{"patientid": "2", "sex": "M", "age": "65", "finding": "Pneumonia/Bacterial/Streptococcus", "view": "L"},
        **{"modality": "X-ray", "folder": "images", "filename": "b.jpg", "url": "https://a.org/x"},
    },
    {
        **{"patientid": "3", "sex": "F", "finding": "No Finding", "view": "AP Supine", "modality": "X-ray"},
        **{"folder": "images", "filename": "c.png", "url": "https://a.org/y"},
    },
    {
        **{"patientid": "4", "finding": "todo", "view": "Axial", "modality": "CT", "folder": "volumes"},
        **{"filename": "d.nii.gz", "url": "https://a.org/z", "": "see there"},
    },
]


def write_tree(root: Path, rows: list[dict[str, str]] = ROWS) -> Path:
    for row in ROWS:
        (root / row["folder"]).mkdir(exist_ok=True)
        (root / row["folder"] / row["filename"]).touch()
    with open(root / "metadata.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        writer.writerows(rows)
    return root


def test_record_of_every_row(tmp_path: Path) -> None:
    root = write_tree(tmp_path)
    opened = open_set(root)
    assert opened.set is SET
    first, second, third, fourth = opened
    assert first.study_id == "a.1" and first.patient_id == "2" and first.age == 65.0 and first.sex == "M"
    assert first.modality == "cxr" and first.split is None and first.licence == "CC BY"
    assert first.documents == ("doi:10.1056/x", "url:https://a.org/x")
    assert [(image.path, image.view) for image in first.images] == [(root / "images" / "a.1.jpg", "PA")]
    assert {name for name, state in first.labels.items() if state is POSITIVE} == {"Pneumonia", "Viral", "COVID-19"}
    assert first.labels["SARS"] is UNMENTIONED and len(first.labels) > 25
    assert first.findings["covid_19"] is POSITIVE and first.findings["pneumonia"] is POSITIVE
    assert first.reports["en"].raw == 'Fever,\nand an "infiltrate".\r\nNo effusion.'
    assert first.reports["en"].text.startswith("Fever, and an") and "\n" not in first.reports["en"].text
    assert second.images[0].view == "LATERAL" and second.documents == ("url:https://a.org/x",)
    assert second.labels["COVID-19"] is NEGATIVE and second.findings["covid_19"] is NEGATIVE
    assert second.findings["pneumonia"] is POSITIVE and second.findings["no_finding"] is NEGATIVE
    assert second.reports == {} and second.licence == "unstated in metadata"
    assert third.findings == {"no_finding": POSITIVE, "pneumonia": NEGATIVE, "covid_19": NEGATIVE}
    assert third.images[0].view == "AP SUPINE" and third.age is None
    # Nobody has said what this one shows.
    assert fourth.findings == {} and set(fourth.labels.values()) == {UNMENTIONED}
    assert fourth.modality == "ct" and fourth.study_id == "d" and fourth.images[0].view == "AXIAL"
    assert fourth.images[0].path == root / "volumes" / "d.nii.gz"


def test_table_of_the_first_weeks(tmp_path: Path) -> None:
    (tmp_path / "metadata.csv").write_text(
        "Patientid,offset,sex,age,finding,survival,view,date,location,filename,doi, url,license,notes\n"
        '1, ,,,"COVID-19, ARDS",,PA,2019,,r.jpg,,https://b.org/1,,Bilateral opacities.\n'
        "2,0,M,65,SARS,Y,CT,2020,,s.jpeg,10.1/y,https://b.org/2,,\n"
    )
    (tmp_path / "images").mkdir()
    for name in ("r.jpg", "s.jpeg"):
        (tmp_path / "images" / name).touch()
    first, second = open_set(tmp_path)
    assert {name for name, state in first.labels.items() if state is POSITIVE} == {"COVID-19", "ARDS"}
    assert first.patient_id == "1" and first.documents == ("url:https://b.org/1",)
    assert first.reports["en"].text == "Bilateral opacities."
    assert second.modality == "ct" and second.images[0].view is None and second.findings["covid_19"] is NEGATIVE


def test_an_own_metadata_csv_is_not_this_set(tmp_path: Path) -> None:
    (tmp_path / "metadata.csv").write_text("file_name,labels\na.png,Mass\n")
    assert not SET.recognises(tmp_path)


BAD_ROWS = {
    "bad_label": ROWS[0] | {"filename": "e.jpg", "finding": "Pneumonia/Viral/Cold"},
    "bad_value": ROWS[0] | {"filename": "e.jpg", "age": "sixty"},
    "duplicate_id": ROWS[1] | {"filename": "b.png"},
    "missing_file": ROWS[0] | {"filename": "gone.jpg"},
}


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_bad_rows_are_named_and_cost_themselves(kind: str, tmp_path: Path) -> None:
    root = write_tree(
        tmp_path, [ROWS[0], BAD_ROWS[kind], *ROWS[1:]] if kind != "duplicate_id" else [*ROWS, BAD_ROWS[kind]]
    )
    for name in ("e.jpg", "b.png"):
        (root / "images" / name).touch()
    # The note of the first row takes three lines.
    line = 5 if kind != "duplicate_id" else 8
    with pytest.raises(BadRow, match=rf"metadata.csv, line {line}: ") as error:
        list(open_set(root))
    assert error.value.kind == kind
    opened = open_set(root, on_bad="skip")
    assert [record.study_id for record in opened] == ["a.1", "b", "c", "d"]
    assert opened.reading.counts == {("metadata.csv", kind): 1}


@pytest.mark.parametrize(
    "change", [{"folder": "../x"}, {"folder": "/x"}, {"modality": "MRI"}, {"filename": "x/e.jpg"}]
)
def test_bad_values(change: dict[str, str], tmp_path: Path) -> None:
    root = write_tree(tmp_path, [ROWS[0] | {"filename": "e.jpg"} | change])
    opened = open_set(root, on_bad="skip")
    assert list(opened) == [] and opened.reading.counts == {("metadata.csv", "bad_value"): 1}


def test_unclosed_quote_and_broken_encoding_cost_their_rows(tmp_path: Path) -> None:
    root = write_tree(tmp_path, ROWS[1:3])
    head, *rows = (root / "metadata.csv").read_bytes().splitlines(keepends=True)
    broken = rows[0].replace(b"b.jpg", b"e.jpg").replace(b"\r\n", b'"\r\n')
    latin = rows[0].replace(b"b.jpg", b"f\xe9.jpg")
    (root / "metadata.csv").write_bytes(b"".join([head, broken.replace(b"images", b'"images'), latin, *rows]))
    opened = open_set(root, on_bad="skip")
    assert [record.study_id for record in opened] == ["b", "c"]
    assert opened.reading.counts[("metadata.csv", "bad_encoding")] == 1
    assert sum(opened.reading.counts.values()) == 2


def test_wrong_column_is_raised_at_once(tmp_path: Path) -> None:
    (tmp_path / "metadata.csv").write_text("patientid,finding,view,url\n")
    with pytest.raises(BadRow, match="filename") as error:
        list(open_set(tmp_path, "covid_chestxray", on_bad="skip"))
    assert error.value.kind == "wrong_column"


@pytest.mark.realdata
def test_real_images_notes_and_licences(data_root: Path, tmp_path: Path) -> None:
    folder = data_root / "covid_chestxray"
    given = [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = []
    for each in given:
        rows.append(
            {
                **{name: each[name] for name in ("sex", "age", "location", "date", "doi", "url") if name in each},
                **{"patientid": each.get("patient_id", ""), "finding": ", ".join(each["labels"])},
                **{"view": each["view"], "modality": {"cxr": "X-ray", "ct": "CT"}[each["modality"]]},
                **{"filename": Path(each["file_name"]).name, "folder": "images", "license": each["licence"]},
                **{"clinical_notes": each.get("clinical_notes_en", "")},
            }
        )
    with open(tmp_path / "metadata.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        writer.writerows(rows)
    os.symlink(folder / "images", tmp_path / "images")
    records = list(open_set(tmp_path))
    assert len(records) == len(given) == 481
    for record, each in zip(records, given, strict=True):
        assert (record.findings.get("covid_19") is POSITIVE) == bool(each["covid"])
        assert record.licence == each["licence"] and record.patient_id == each.get("patient_id")
        assert record.modality == each["modality"]
        notes = each.get("clinical_notes_en")
        assert (record.reports["en"].raw if record.reports else None) == (notes.strip() if notes else None)
