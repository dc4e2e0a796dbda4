# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Shenzhen and Montgomery: small trees to the published layout, and the real readings and images."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from m3fm.data.opening import open_set
from m3fm.data.schema import LabelState
from m3fm.data.sets.nlm_tb import SETS, lung_mask
from m3fm.data.tables import BadRow

POSITIVE, NEGATIVE = LabelState.POSITIVE, LabelState.NEGATIVE
SHENZHEN, MONTGOMERY = SETS
CHINA = {
    "CHNCXR_0001_0": "male 45yrs\n\nnormal",
    "CHNCXR_0002_0": "Female , 24 yrs\r\nnormal\r\n",
    "CHNCXR_0327_1": "male 35yrs\nbilateral PTB,\nleft pleurisy\n",
    "CHNCXR_0003_0": "femal 18month\nnormal",
    "CHNCXR_0004_1": "male64days\n\nPTB in the right upper field",
    "CHNCXR_0005_1": "female\nSTB",
}
COUNTY = {
    "MCUCXR_0001_0": "Patient's Sex: F\nPatient's Age: 027Y\nnormal",
    "MCUCXR_0104_1": "Patient's Sex:  M  \r\nPatient's Age: 011M\r\n\r\ncavitary infiltrate; cw active TB.\r\n",
    "MCUCXR_0105_1": "Patient's Sex: O\nPatient's Age: \nextensive infiltrates",
}


def write_tree(base: Path, readings: dict[str, str]) -> Path:
    for folder in ("CXR_png", "ClinicalReadings"):
        (base / folder).mkdir(parents=True)
    for stem, text in readings.items():
        (base / "ClinicalReadings" / f"{stem}.txt").write_bytes(text.encode())
        (base / "CXR_png" / f"{stem}.png").touch()
    (base / "CXR_png" / "Thumbs.db").touch()
    return base


def test_shenzhen(tmp_path: Path) -> None:
    base = write_tree(tmp_path / "ChinaSet_AllFiles", CHINA)
    for root in (tmp_path, base):
        opened = open_set(root)
        assert opened.set is SHENZHEN
        records = {record.study_id: record for record in opened}
        assert list(records) == sorted(CHINA)
    first = records["CHNCXR_0001_0"]
    assert first.source == "shenzhen_tb" and first.patient_id == "CHNCXR_0001" and first.modality == "cxr"
    assert first.labels == {"No Finding": POSITIVE, "Tuberculosis": NEGATIVE}
    assert first.findings == {"no_finding": POSITIVE, "tuberculosis": NEGATIVE}
    assert first.reports["en"].raw == "normal" and first.age == 45.0 and first.sex == "M"
    assert first.images[0].path == base / "CXR_png" / "CHNCXR_0001_0.png" and first.images[0].view == "PA"
    sick = records["CHNCXR_0327_1"]
    assert sick.labels == {"Tuberculosis": POSITIVE, "No Finding": NEGATIVE}
    assert sick.findings == {"no_finding": NEGATIVE, "tuberculosis": POSITIVE}
    assert sick.reports["en"].raw == "bilateral PTB,\nleft pleurisy"
    assert [(record.sex, record.age) for record in records.values()] == [
        ("M", 45.0),
        ("F", 24.0),
        ("F", 1.5),
        ("M", pytest.approx(64 / 365.25)),
        ("F", None),
        ("M", 35.0),
    ]
    assert records["CHNCXR_0005_1"].reports["en"].raw == "STB"


def test_montgomery(tmp_path: Path) -> None:
    write_tree(tmp_path / "MontgomerySet", COUNTY)
    opened = open_set(tmp_path)
    assert opened.set is MONTGOMERY
    first, second, third = opened
    assert first.source == "montgomery_tb" and (first.sex, first.age) == ("F", 27.0)
    assert first.reports["en"].raw == "normal" and first.findings["tuberculosis"] is NEGATIVE
    assert (second.sex, second.age) == ("M", pytest.approx(11 / 12)) and second.patient_id == "MCUCXR_0104"
    assert second.reports["en"].raw == "cavitary infiltrate; cw active TB."
    assert (third.sex, third.age) == (None, None) and third.reports["en"].raw == "extensive infiltrates"


def test_both_sets_in_one_folder_are_told_apart(tmp_path: Path) -> None:
    write_tree(tmp_path, CHINA | COUNTY)
    assert {record.source for record in open_set(tmp_path, "shenzhen_tb")} == {"shenzhen_tb"}
    assert len(list(open_set(tmp_path, "montgomery_tb"))) == 3


def test_lung_masks(tmp_path: Path) -> None:
    base = write_tree(tmp_path, {"MCUCXR_0001_0": COUNTY["MCUCXR_0001_0"]})
    (record,) = open_set(tmp_path)
    with pytest.raises(ValueError, match="expected a mask of the left lung"):
        lung_mask(record)
    for row, side in enumerate(("left", "right")):
        (base / "ManualMask" / f"{side}Mask").mkdir(parents=True)
        pixels = np.zeros((3, 4), dtype=np.uint8)
        pixels[row] = 255
        Image.fromarray(pixels).convert("1").save(base / "ManualMask" / f"{side}Mask" / "MCUCXR_0001_0.png")
    masks = lung_mask(record)
    assert masks.shape == (2, 3, 4) and masks.dtype == bool
    assert masks[0, 0].all() and masks[1, 1].all() and masks.sum() == 8


def test_images_without_readings(tmp_path: Path) -> None:
    base = write_tree(tmp_path, CHINA)
    for path in (base / "ClinicalReadings").iterdir():
        path.unlink()
    (base / "ClinicalReadings").rmdir()
    records = list(open_set(base))
    assert len(records) == 6 and all(record.reports == {} and record.age is None for record in records)
    assert sum(record.findings["tuberculosis"] is POSITIVE for record in records) == 3


def test_readings_without_images(tmp_path: Path) -> None:
    base = write_tree(tmp_path, CHINA)
    for path in (base / "CXR_png").iterdir():
        path.unlink()
    (base / "CXR_png").rmdir()
    assert len(list(open_set(base, images="unchecked"))) == 6
    with pytest.raises(BadRow, match="CXR_png: CHNCXR_0001_0.png, line 1: the image file") as error:
        list(open_set(base))
    assert error.value.kind == "missing_file"


BAD_READINGS = {
    "missing_file": None,
    "bad_encoding": b"male 45yrs\n\xff\xfe",
    "bad_value": b"bilateral PTB",
}


@pytest.mark.parametrize("kind", BAD_READINGS)
def test_a_bad_reading_costs_the_report_alone(kind: str, tmp_path: Path) -> None:
    base = write_tree(tmp_path, CHINA)
    file = base / "ClinicalReadings" / "CHNCXR_0327_1.txt"
    if BAD_READINGS[kind] is None:
        file.unlink()
    else:
        file.write_bytes(BAD_READINGS[kind])
    with pytest.raises(BadRow, match=r"CHNCXR_0327_1.txt") as error:
        list(open_set(base))
    assert error.value.kind == kind
    opened = open_set(base, on_bad="skip")
    records = {record.study_id: record for record in opened}
    assert len(records) == 6 and opened.reading.counts == {("ClinicalReadings", kind): 1}
    # Counts and tables are told by the folder; the message has the publishers' name of the file.
    assert file.name in opened.reading.examples[0].message
    assert records["CHNCXR_0327_1"].reports == {} and records["CHNCXR_0327_1"].findings["tuberculosis"] is POSITIVE


def test_a_missing_image_costs_its_study(tmp_path: Path) -> None:
    base = write_tree(tmp_path, CHINA)
    (base / "CXR_png" / "CHNCXR_0327_1.png").unlink()
    opened = open_set(base, on_bad="skip")
    assert len(list(opened)) == 5
    assert opened.reading.counts == {("CXR_png", "missing_file"): 1}


def test_examples_of_many_bad_readings_stay_few(tmp_path: Path) -> None:
    base = write_tree(tmp_path, {f"CHNCXR_{number:04d}_0": "nothing" for number in range(50)})
    opened = open_set(base, on_bad="skip")
    assert len(list(opened)) == 50
    assert opened.reading.counts == {("ClinicalReadings", "bad_value"): 50} and len(opened.reading.examples) == 20
    assert len(opened.reading.summary().splitlines()) == 1


def test_another_folder_is_neither_set(tmp_path: Path) -> None:
    (tmp_path / "CXR_png").mkdir()
    (tmp_path / "CXR_png" / "other_0001_0.png").touch()
    assert not any(each.recognises(tmp_path) for each in SETS)
    with pytest.raises(BadRow, match="expected the folder CXR_png or ClinicalReadings"):
        list(open_set(tmp_path, "shenzhen_tb", on_bad="skip"))


@pytest.mark.realdata
def test_real_images_and_readings(data_root: Path, tmp_path: Path) -> None:
    folder = data_root / "tb_shenzhen_montgomery_128"
    given = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    bases = {"CHN": tmp_path / "ChinaSet_AllFiles", "MCU": tmp_path / "MontgomerySet"}
    for base in bases.values():
        for name in ("CXR_png", "ClinicalReadings"):
            (base / name).mkdir(parents=True)
    for row in given:
        base, name = bases[row["original_name"][:3]], row["original_name"]
        os.symlink(folder / row["file_name"], base / "CXR_png" / name)
        if "reading_en" in row:
            text = f"{row['sex'].lower()} {row['age']}yrs\n\n{row['reading_en']}\n"
            (base / "ClinicalReadings" / name).with_suffix(".txt").write_text(text, encoding="utf-8")
    (bases["MCU"] / "ClinicalReadings").rmdir()
    rows = {row["original_name"].removesuffix(".png"): row for row in given}
    found = {}
    for base, each in zip(bases.values(), SETS, strict=True):
        opened = open_set(base)
        assert opened.set is each
        found |= {record.study_id: record for record in opened}
    assert found.keys() == rows.keys() and len(found) == 500
    for stem, record in found.items():
        row = rows[stem]
        assert (record.findings["tuberculosis"] is POSITIVE) == bool(row["tb"])
        assert (record.reports["en"].raw if record.reports else None) == row.get("reading_en")
        assert record.age == (float(row["age"]) if "age" in row else None)
        assert record.patient_id == row["patient_id"]
