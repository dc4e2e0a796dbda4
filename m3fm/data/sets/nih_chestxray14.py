# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""NIH ChestX-ray14: labels mined from reports, boxes, the official lists, and expert labels of a part.

Read is `Data_Entry_2017*.csv`, also Kaggle's sample of it, with the images as NIH packs them (`images_001/images/` to
`images_012/images/`) or in one folder. Boxes, the lists of the official parts and the labels of Google's radiologists
are taken where they lie beside it.

A study is an image, each of which is a follow-up of its own. Labels that a row does not name are negative. Where
radiologists read an image, the shared findings follow them. Where there are official lists, an image that none of
them has, or that two of them have, is "unassigned", and in no part for training.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ..labels import NO_FINDING, shared_findings
from ..schema import Box, ImageFile, LabelState, StudyRecord
from ..tables import BadRow, Reading, Row, open_text, read_csv, shown
from .demographics import age_in_years, sex_letter
from .layouts import ImageFolders, find_base, table_in
from .study_set import UNASSIGNED, StudySet

__all__ = ["SETS", "nih_documents"]

SOURCE = "nih_chestxray14"
LABELS = (
    "Atelectasis",
    "Cardiomegaly",
    "Consolidation",
    "Edema",
    "Effusion",
    "Emphysema",
    "Fibrosis",
    "Hernia",
    "Infiltration",
    "Mass",
    "Nodule",
    "Pleural_Thickening",
    "Pneumonia",
    "Pneumothorax",
    "No Finding",
)
#: Columns of the expert labels, to the names that they have in a record; the mined labels keep theirs.
EXPERT_LABELS = {
    "Fracture": "Fracture (expert)",
    "Pneumothorax": "Pneumothorax (expert)",
    "Airspace opacity": "Airspace opacity (expert)",
    "Nodule or mass": "Nodule or mass (expert)",
}
_LICENCE = "no restriction on use; cite Wang et al. 2017 and acknowledge the NIH Clinical Center"
_TABLES = ("Data_Entry_2017_v2020.csv", "Data_Entry_2017.csv", "sample_labels.csv")
_COLUMNS = ("Image Index", "Finding Labels", "Patient ID", "Patient Age", "Patient Gender", "View Position")
_BOX_TABLES = ("BBox_List_2017.csv",)
_BOX_COLUMNS = ("Image Index", "Finding Label", "Bbox [x", "y", "w", "h]")
_LISTS = {"train_val_list.txt": "train", "test_list.txt": "test"}
_EXPERT_TABLES = (
    "google2019_nih-chest-xray-labels.csv",
    *(f"four_findings_expert_labels{mark}{part}_labels.csv" for mark in "/_" for part in ("validation", "test")),
)
_IMAGE_FOLDERS = ("images", "images_*/images", "images_*", "images-224/images-224", "sample/images")
_IMAGE_NAME = re.compile(r"(\d{8})_(\d{3})\.png")
# The boxes call one of the labels by another name.
_BOX_NAMES = {"Infiltrate": "Infiltration"}
_EXPERT_STATES = {"YES": LabelState.POSITIVE, "NO": LabelState.NEGATIVE, "HEDGE": LabelState.UNCERTAIN}


def nih_documents(image: str) -> tuple[str, ...]:
    """Return the marks of an NIH image: itself and its patient, for sets that have NIH's images under other names.

    Args:
        image: As NIH names it, "00000013_008.png".

    Raises:
        ValueError: For another kind of name.
    """
    match = _IMAGE_NAME.fullmatch(image)
    if match is None:
        raise ValueError('an NIH image must have a name like "00000013_008.png"')
    return f"nih:{image}", f"nih-patient:{int(match.group(1))}"


@dataclass(frozen=True)
class _Extras:
    """What other files say of images."""

    images: ImageFolders
    boxes: Mapping[str, tuple[Box, ...]]
    experts: Mapping[str, Mapping[str, LabelState]]
    # By number (`_number`), which takes a third of the memory that names take; None without the official lists.
    splits: Mapping[int, str] | None


def _read(root: Path, reading: Reading) -> Iterator[StudyRecord]:
    """Yield a study for each row of the table: every image is its own follow-up.

    Labels that a row does not name are negative, as the publishers' own training has it. `findings` follow the
    experts in the four findings that they read; `labels` keep what was mined beside them. Ages above 120 are left out.
    """
    base = find_base(root, _TABLES) or root
    table = table_in(base, _TABLES) or base / _TABLES[0]
    extras = _Extras(
        ImageFolders(base, _IMAGE_FOLDERS, ("",)),
        _boxes(base, reading),
        _experts(base, reading),
        _splits(base, reading),
    )
    seen: set[int] = set()

    def parse(row: Row) -> StudyRecord:
        record = _record(row, extras, reading)
        number = _number(_image_name(row))
        if number in seen:
            raise row.bad("duplicate_id", "the image of this row was already given by an earlier line")
        seen.add(number)
        return record

    yield from reading.each(read_csv(table, _COLUMNS, reading), parse)


def _record(row: Row, extras: _Extras, reading: Reading) -> StudyRecord:
    image = _image_name(row)
    labels, findings = _mined(row)
    if image in extras.experts:
        labels, findings = _with_experts(labels, extras.experts[image])
    try:
        age = age_in_years(row.get("Patient Age"))
    except ValueError as error:
        raise row.bad("bad_value", f"column 'Patient Age': {error}") from None
    view = row.get("View Position")
    path = reading.image(row, extras.images.find(image))
    return StudyRecord(
        study_id=image.removesuffix(".png"),
        source=SOURCE,
        modality="cxr",
        patient_id=row.require("Patient ID"),
        documents=nih_documents(image),
        images=(ImageFile(path, view=view.upper() if view else None),),
        labels=labels,
        findings=findings,
        boxes=extras.boxes.get(image, ()),
        age=age,
        sex=sex_letter(row.get("Patient Gender")),
        split=None if extras.splits is None else extras.splits.get(_number(image), UNASSIGNED),
        licence=_LICENCE,
    )


def _image_name(row: Row) -> str:
    image = row.require("Image Index")
    if _IMAGE_NAME.fullmatch(image) is None:
        raise row.bad("bad_value", "column 'Image Index' must be a name like \"00000013_008.png\"")
    return image


def _number(image: str) -> int | None:
    """Return patient and follow-up of an image as one number; None for another kind of name."""
    match = _IMAGE_NAME.fullmatch(image)
    return None if match is None else int("".join(match.groups()))


def _mined(row: Row) -> tuple[Mapping[str, LabelState], Mapping[str, LabelState]]:
    try:
        return _states(row.require("Finding Labels"))
    except KeyError as error:
        raise row.bad("bad_label", f"{shown(error.args[0])} is none of the labels {', '.join(LABELS)}") from None


# 112,120 images have 836 sets of labels.
@lru_cache(maxsize=2048)
def _states(named: str) -> tuple[dict[str, LabelState], dict[str, LabelState]]:
    labels = dict.fromkeys(LABELS, LabelState.NEGATIVE)
    for name in named.split("|"):
        if name.strip() not in labels:
            raise KeyError(name.strip())
        labels[name.strip()] = LabelState.POSITIVE
    return labels, shared_findings(labels, SOURCE)


def _with_experts(
    mined: Mapping[str, LabelState], read: Mapping[str, LabelState]
) -> tuple[dict[str, LabelState], dict[str, LabelState]]:
    labels = {**mined, **read}
    findings = shared_findings(labels, SOURCE)
    pneumothorax = read.get(EXPERT_LABELS["Pneumothorax"], LabelState.UNMENTIONED)
    if pneumothorax is not LabelState.UNMENTIONED:
        findings["pneumothorax"] = pneumothorax
        if pneumothorax is LabelState.POSITIVE:
            findings[NO_FINDING] = LabelState.NEGATIVE
        elif findings.get(NO_FINDING) is LabelState.NEGATIVE and LabelState.POSITIVE not in findings.values():
            # All that had been mined is denied; whether the rest is normal nobody said.
            del findings[NO_FINDING]
    return labels, findings


def _boxes(base: Path, reading: Reading) -> dict[str, tuple[Box, ...]]:
    table = table_in(base, _BOX_TABLES)
    found: dict[str, list[Box]] = {}
    if table is not None:
        for image, box in reading.each(read_csv(table, _BOX_COLUMNS, reading), _box):
            found.setdefault(image, []).append(box)
    return {image: tuple(boxes) for image, boxes in found.items()}


def _box(row: Row) -> tuple[str, Box]:
    name = row.require("Finding Label")
    label = _BOX_NAMES.get(name, name)
    if label not in LABELS:
        raise row.bad("bad_label", f"{shown(name)} is none of the labels {', '.join(LABELS)}")
    x, y, width, height = (row.number(column) for column in _BOX_COLUMNS[2:])
    if None in (x, y, width, height) or width <= 0 or height <= 0:
        raise row.bad("bad_value", "a box must have x, y, and a width and height above 0")
    return _image_name(row), Box(label, x, y, width, height)


def _experts(base: Path, reading: Reading) -> dict[str, dict[str, LabelState]]:
    """Return what radiologists said of images, for Majkowska et al. 2019: four findings an image."""
    found: dict[str, dict[str, LabelState]] = {}
    for name in _EXPERT_TABLES:
        table = table_in(base, (name,))
        if table is not None:
            found.update(reading.each(read_csv(table, ("Image Index", *EXPERT_LABELS), reading), _expert))
    return found


def _expert(row: Row) -> tuple[str, dict[str, LabelState]]:
    said = {}
    for column, label in EXPERT_LABELS.items():
        value = row.get(column)
        if value is not None and value.upper() not in _EXPERT_STATES:
            raise row.bad("bad_label", f"column {column!r} must be YES, NO, HEDGE or empty, got {shown(value)}")
        said[label] = LabelState.UNMENTIONED if value is None else _EXPERT_STATES[value.upper()]
    return _image_name(row), said


def _splits(base: Path, reading: Reading) -> dict[int, str] | None:
    """Return the part of each image that the official lists name, by its number; None without the lists."""
    lists = {path: part for name, part in _LISTS.items() if (path := table_in(base, (name,))) is not None}
    if not lists:
        return None
    parts: dict[int, str] = {}
    for path, part in lists.items():
        with open_text(path) as file:
            for place, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                number = _number(line.strip())
                if number is None:
                    reading.tell(BadRow("bad_value", path, place, "expected the name of an image on each line"))
                elif parts.setdefault(number, part) != part:
                    parts[number] = UNASSIGNED
                    reading.tell(BadRow("bad_value", path, place, "an earlier list has this image in another part"))
    return parts


def _recognises(root: Path) -> bool:
    return find_base(root, _TABLES) is not None


SET = StudySet(
    name=SOURCE,
    title="NIH ChestX-ray14",
    licence=_LICENCE,
    url="https://nihcc.app.box.com/v/ChestXray-NIHCC",
    reference="Wang et al., ChestX-ray8, CVPR 2017; experts: Majkowska et al., Radiology 294 (2020) 421-431",
    layout=(
        "Data_Entry_2017_v2020.csv or Data_Entry_2017.csv",
        "images_001/images/*.png ... images_012/images/*.png, or images/*.png",
        "train_val_list.txt, test_list.txt (optional)",
        "BBox_List_2017.csv (optional)",
        "google2019_nih-chest-xray-labels.csv or four_findings_expert_labels/*.csv (optional)",
    ),
    recognises=_recognises,
    read=_read,
    published={"images": 112120, "patients": 30805, "boxes": 984, "train_images": 86524, "test_images": 25596},
)
SETS: tuple[StudySet, ...] = (SET,)
