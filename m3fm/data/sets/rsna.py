# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""RSNA Pneumonia Detection Challenge: radiologists' boxes and classes on images of NIH ChestX-ray14.

Read are Kaggle's tables of the second stage, of which `stage_2_train_labels.csv` must be there, with the images in
`stage_2_train_images/` and `stage_2_test_images/`, as DICOM or converted. Classes, a table of DICOM headers and the
mapping to NIH's images are taken where they lie beside it.

A study is an image. One with a box has an opacity; without the detailed classes nothing is said of what else it shows.
Images of the test part have no label. The NIH image and patient of the mapping become documents: images of one
patient belong together, whatever the set calls them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from ..labels import shared_findings
from ..schema import Box, ImageFile, LabelState, StudyRecord
from ..tables import BadRow, Reading, Row, open_text, read_csv, shown
from .demographics import age_in_years, sex_letter
from .layouts import ImageFolders, find_base, plain_name, table_in
from .nih_chestxray14 import nih_documents
from .study_set import StudySet

__all__ = ["SETS"]

SOURCE = "rsna"
OPACITY, NORMAL, ABNORMAL = "Lung Opacity", "Normal", "No Lung Opacity / Not Normal"
CLASSES = (NORMAL, ABNORMAL, OPACITY)
_LICENCE = "terms of the RSNA Pneumonia Detection Challenge: research and education, non-commercial"
_TABLES = ("stage_2_train_labels.csv",)
_COLUMNS = ("patientId", "x", "y", "width", "height", "Target")
_CLASS_TABLES = ("stage_2_detailed_class_info.csv",)
_TEST_TABLES = ("stage_2_sample_submission.csv",)
_HEADER_TABLES = (
    "stage_2_train_images_dicom_headers.csv",
    "kaggle_stage_2_train_images_dicom_headers.csv",
)
_HEADER_COLUMNS = ("PatientID", "PatientAge", "PatientSex", "ViewPosition")
_MAPPINGS = ("pneumonia-challenge-dataset-mappings_2018.json",)
_TRAIN_FOLDERS = ("stage_2_train_images", "stage_2_train_images*")
_TEST_FOLDERS = ("stage_2_test_images", "stage_2_test_images*")
_SUFFIXES = (".dcm", ".png", ".jpg")


@dataclass
class _Image:
    """What the rows of one image say together."""

    row: Row
    target: str
    boxes: list[Box] = field(default_factory=list)


@dataclass(frozen=True)
class _Extras:
    """What other files say of images."""

    classes: Mapping[str, str]
    headers: Mapping[str, tuple[str | None, float | None, str | None]]
    documents: Mapping[str, tuple[str, ...]]


def _read(root: Path, reading: Reading) -> Iterator[StudyRecord]:
    """Yield a study for each image, in the order of the table, then those of the test part, which has no labels.

    The set's "patientId" names an image: whose it is tells only the mapping file, whose NIH image and NIH patient
    become documents. Without the detailed classes an image without opacity may be normal or not: nothing is said.
    """
    base = find_base(root, _TABLES) or root
    table = table_in(base, _TABLES) or base / _TABLES[0]
    extras = _Extras(_classes(base, reading), _headers(base, reading), _documents(base, reading))
    images: dict[str, _Image] = {}

    def gather(row: Row) -> None:
        name = plain_name(row, "patientId")
        target, box = _mark(row)
        known = images.get(name)
        if known is None:
            images[name] = known = _Image(Row(row.file, row.line, {}), target)
        elif box is None or known.target != target or box in known.boxes:
            raise row.bad("duplicate_id", "an earlier line says the same, or something else, of this image")
        if box is not None:
            known.boxes.append(box)

    for _ in reading.each(read_csv(table, _COLUMNS, reading), gather):
        pass
    folders = ImageFolders(base, _TRAIN_FOLDERS, _SUFFIXES)
    for name, image in images.items():
        try:
            path = reading.image(image.row, folders.find(name))
            yield _record(name, image, extras, path)
        except BadRow as error:
            reading.tell(error)
    yield from _test_part(base, extras, reading, images)


def _mark(row: Row) -> tuple[str, Box | None]:
    target = row.require("Target").removesuffix(".0")
    numbers = [row.number(column) for column in _COLUMNS[1:5]]
    if target == "0" and numbers == [None] * 4:
        return target, None
    if target == "1" and None not in numbers and numbers[2] > 0 and numbers[3] > 0:
        return target, Box(OPACITY, *numbers)
    if target not in ("0", "1"):
        raise row.bad("bad_label", f"column 'Target' must be 0 or 1, got {shown(target)}")
    raise row.bad("bad_value", "a row of Target 1 must have a box with a width and height above 0, one of 0 no box")


def _record(name: str, image: _Image, extras: _Extras, path: Path) -> StudyRecord:
    said = extras.classes.get(name) or (OPACITY if image.target == "1" else "")
    if (said == OPACITY) != (image.target == "1"):
        raise image.row.bad("bad_label", f"Target is {image.target}, but the detailed class is {said!r}")
    view, age, sex = extras.headers.get(name, (None, None, None))
    labels, findings = _states(said)
    return StudyRecord(
        study_id=name,
        source=SOURCE,
        modality="cxr",
        patient_id=name,
        documents=extras.documents.get(name, ()),
        images=(ImageFile(path, view=view),),
        labels=labels,
        findings=findings,
        boxes=tuple(image.boxes),
        age=age,
        sex=sex,
        split="train",
        licence=_LICENCE,
    )


@cache
def _states(said: str) -> tuple[dict[str, LabelState], dict[str, LabelState]]:
    """Return the states of the three classes, of which an image has one; empty: any but opacity."""
    if said:
        labels = {name: LabelState.POSITIVE if name == said else LabelState.NEGATIVE for name in CLASSES}
    else:
        labels = dict.fromkeys(CLASSES, LabelState.UNMENTIONED) | {OPACITY: LabelState.NEGATIVE}
    return labels, shared_findings(labels, SOURCE)


def _test_part(base: Path, extras: _Extras, reading: Reading, known: Mapping[str, _Image]) -> Iterator[StudyRecord]:
    table = table_in(base, _TEST_TABLES)
    if table is None:
        return
    folders = ImageFolders(base, _TEST_FOLDERS, _SUFFIXES)
    seen = set(known)

    def parse(row: Row) -> StudyRecord:
        name = plain_name(row, "patientId")
        if name in seen:
            raise row.bad("duplicate_id", "the image of this row was already given")
        path = reading.image(row, folders.find(name))
        seen.add(name)
        return StudyRecord(
            study_id=name,
            source=SOURCE,
            modality="cxr",
            patient_id=name,
            documents=extras.documents.get(name, ()),
            images=(ImageFile(path),),
            labels=dict.fromkeys(CLASSES, LabelState.UNMENTIONED),
            split="test",
            licence=_LICENCE,
        )

    yield from reading.each(read_csv(table, ("patientId",), reading), parse)


def _classes(base: Path, reading: Reading) -> dict[str, str]:
    """Return the class of each image; the table repeats it for each box."""
    table = table_in(base, _CLASS_TABLES)
    classes: dict[str, str] = {}

    def gather(row: Row) -> None:
        said = row.require("class")
        if said not in CLASSES:
            raise row.bad("bad_label", f"{shown(said)} is none of the classes {', '.join(CLASSES)}")
        if classes.setdefault(row.require("patientId"), said) != said:
            raise row.bad("bad_label", "an earlier line has another class for this image")

    if table is not None:
        for _ in reading.each(read_csv(table, ("patientId", "class"), reading), gather):
            pass
    return classes


def _headers(base: Path, reading: Reading) -> dict[str, tuple[str | None, float | None, str | None]]:
    """Return view, age and sex of images from a table of their DICOM headers, which some copies have."""
    table = table_in(base, _HEADER_TABLES)
    if table is None:
        return {}
    return dict(reading.each(read_csv(table, _HEADER_COLUMNS, reading), _header))


def _header(row: Row) -> tuple[str, tuple[str | None, float | None, str | None]]:
    try:
        age = age_in_years(row.get("PatientAge"))
    except ValueError as error:
        raise row.bad("bad_value", f"column 'PatientAge': {error}") from None
    view = row.get("ViewPosition")
    return row.require("PatientID"), (view.upper() if view else None, age, sex_letter(row.get("PatientSex")))


def _documents(base: Path, reading: Reading) -> dict[str, tuple[str, ...]]:
    """Return the NIH image and the NIH patient of each image, from the mapping that RSNA published later."""
    path = table_in(base, _MAPPINGS)
    if path is None:
        return {}
    with open_text(path) as file:
        try:
            entries = json.load(file)
        except ValueError:
            entries = None
    if not isinstance(entries, list):
        raise BadRow("not_a_row", path, None, "expected a JSON list in UTF-8")
    documents = {}
    for number, entry in enumerate(entries, start=1):
        try:
            documents[str(entry["subset_img_id"])] = nih_documents(entry["img_id"])
        except (KeyError, TypeError, ValueError):
            message = f"entry {number} must have subset_img_id, and img_id with the name of an NIH image"
            reading.tell(BadRow("bad_value", path, None, message))
    return documents


def _recognises(root: Path) -> bool:
    return find_base(root, _TABLES) is not None


SET = StudySet(
    name=SOURCE,
    title="RSNA Pneumonia Detection Challenge 2018",
    licence=_LICENCE,
    url="https://www.kaggle.com/c/rsna-pneumonia-detection-challenge",
    reference="Shih et al., Radiology: Artificial Intelligence 1 (2019) e180041",
    layout=(
        "stage_2_train_labels.csv",
        "stage_2_train_images/*.dcm (or .png, .jpg)",
        "stage_2_detailed_class_info.csv (optional)",
        "stage_2_sample_submission.csv with stage_2_test_images/*.dcm (optional)",
        "stage_2_train_images_dicom_headers.csv (optional)",
        "pneumonia-challenge-dataset-mappings_2018.json (optional)",
    ),
    recognises=_recognises,
    read=_read,
    published={"train_images": 26684, "test_images": 3000, "boxes": 9555},
)
SETS: tuple[StudySet, ...] = (SET,)
