# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""VinDr-CXR: boxes of three radiologists an image, as PhysioNet has it or as the VinBigData challenge on Kaggle.

PhysioNet's `annotations_*.csv` (boxes) and `image_labels_*.csv` (what readers said of the whole image) are read with
`train/` and `test/`; else Kaggle's `train.csv`, which has boxes alone. A study is an image.

The readers of a training image do not agree in all. A label is positive where more than half of them gave it (two of
three), uncertain where some did, and negative where none did. The test part of PhysioNet has one agreed reading.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from ..labels import shared_findings
from ..schema import Box, ImageFile, LabelState, StudyRecord
from ..tables import BadRow, Reading, Row, read_csv, shown
from .layouts import ImageFolders, columns_of, find_base, plain_name, table_in
from .study_set import StudySet

__all__ = ["CHALLENGE_LABELS", "LABELS", "SETS"]

SOURCE = "vindr"
#: Findings that are drawn as boxes, on PhysioNet.
_LOCAL = (
    "Aortic enlargement",
    "Atelectasis",
    "Calcification",
    "Cardiomegaly",
    "Clavicle fracture",
    "Consolidation",
    "Edema",
    "Emphysema",
    "Enlarged PA",
    "ILD",
    "Infiltration",
    "Lung Opacity",
    "Lung cavity",
    "Lung cyst",
    "Mediastinal shift",
    "Nodule/Mass",
    "Pleural effusion",
    "Pleural thickening",
    "Pneumothorax",
    "Pulmonary fibrosis",
    "Rib fracture",
    "Other lesion",
)
# What readers said of the whole image.
_GLOBAL = ("COPD", "Lung tumor", "Pneumonia", "Tuberculosis", "Other diseases")
NO_FINDING = "No finding"
LABELS = (*_LOCAL, *_GLOBAL, NO_FINDING)
_OUTSIDE_CHALLENGE = {
    "Clavicle fracture",
    "Edema",
    "Emphysema",
    "Enlarged PA",
    "Lung cavity",
    "Lung cyst",
    "Mediastinal shift",
    "Rib fracture",
}
#: Those of the challenge, which has the rarer ones among "Other lesion".
CHALLENGE_LABELS = (*(name for name in _LOCAL if name not in _OUTSIDE_CHALLENGE), NO_FINDING)
_COLUMN_NAMES = {"Other disease": "Other diseases"}  # as the table of the test part has it
_LICENCE = {
    "physionet": "PhysioNet Credentialed Health Data License 1.5.0",
    "challenge": "rules of the VinBigData Chest X-ray Abnormalities Detection challenge: non-commercial research",
}
_FOLDERS = ("", "annotations/")
_KINDS, _SPLITS = ("annotations", "image_labels"), ("train", "test")
_CHALLENGE_TABLES = ("train.csv", "vinbigdata-train.csv")
_BOX_COLUMNS = ("image_id", "class_name", "x_min", "y_min", "x_max", "y_max")
_SUFFIXES = (".dicom", ".dcm", ".png", ".jpg")
# Test images were read by five radiologists, who agreed in one reading.
_CONSENSUS = ""


@dataclass
class _Image:
    """What the rows of one image say together."""

    row: Row
    readers: set[str] = field(default_factory=set)
    # Label to the readers that gave it.
    votes: dict[str, set[str]] = field(default_factory=dict)
    boxes: list[Box] = field(default_factory=list)


@dataclass(frozen=True)
class _Part:
    """One part of the set, by its tables; `labelled` are the labels that they decide on."""

    split: str
    boxes: Path | None
    votes: Path | None
    names: tuple[str, ...]
    labelled: tuple[str, ...]
    block: str
    licence: str


def _read(root: Path, reading: Reading) -> Iterator[StudyRecord]:
    """Yield a study for each image, in the order in which the tables first name it; rows of an image lie scattered."""
    base = find_base(root, _all_tables()) or root
    earlier: set[str] = set()
    for part in _parts(base):
        images: dict[str, _Image] = {}
        if part.votes is not None:
            _gather_votes(part, images, reading)
        if part.boxes is not None:
            _gather_boxes(part, images, reading)
        folders = ImageFolders(base, (part.split, f"{part.split}_png", "images"), _SUFFIXES)
        for name, image in images.items():
            try:
                if name in earlier:
                    raise image.row.bad("duplicate_id", "the image of this row is in another part too")
                path = reading.image(image.row, folders.find(name))
            except BadRow as error:
                reading.tell(error)
            else:
                yield _record(name, image, part, path)
        earlier.update(images)


def _all_tables() -> tuple[str, ...]:
    own = (f"{folder}{kind}_{split}.csv" for folder in _FOLDERS for kind in _KINDS for split in _SPLITS)
    return (*own, *_CHALLENGE_TABLES)


def _parts(base: Path) -> Iterator[_Part]:
    found = False
    for split in _SPLITS:
        boxes, votes = (table_in(base, [f"{each}{kind}_{split}.csv" for each in _FOLDERS]) for kind in _KINDS)
        if boxes is not None or votes is not None:
            found = True
            # Boxes alone say nothing of what is not drawn.
            labelled = LABELS if votes is not None else (*_LOCAL, NO_FINDING)
            yield _Part(split, boxes, votes, LABELS, labelled, "vindr_cxr", _LICENCE["physionet"])
    if not found:
        table = table_in(base, _CHALLENGE_TABLES) or base / _CHALLENGE_TABLES[0]
        names = CHALLENGE_LABELS
        yield _Part("train", table, None, names, names, SOURCE, _LICENCE["challenge"])


def _gather_votes(part: _Part, images: dict[str, _Image], reading: Reading) -> None:
    """Add what the table of image labels says: 0 or 1 a label, a row a reader."""

    def gather(row: Row) -> None:
        name, reader = plain_name(row, "image_id"), _reader(row)
        given = [label for label, column in columns.items() if _is_given(row, column)]
        image = images.get(name) or _Image(_bare(row))
        if reader in image.readers:
            raise row.bad("duplicate_id", "an earlier line has this image by the same reader")
        images[name] = image
        image.readers.add(reader)
        for label in given:
            image.votes.setdefault(label, set()).add(reader)

    columns = _label_columns(part.votes)
    for _ in reading.each(read_csv(part.votes, ("image_id", *columns.values()), reading), gather):
        pass


def _label_columns(table: Path) -> dict[str, str]:
    """Return label to column of a table; the test part calls one of them by another name."""
    other = {label: column for column, label in _COLUMN_NAMES.items() if column in columns_of(table)}
    return {label: other.get(label, label) for label in LABELS}


def _is_given(row: Row, column: str) -> bool:
    number = row.number(column)
    if number not in (0.0, 1.0, None):
        raise row.bad("bad_label", f"column {column!r} must be 0, 1 or empty")
    return number == 1.0


def _gather_boxes(part: _Part, images: dict[str, _Image], reading: Reading) -> None:
    """Add boxes; where there is no table of image labels, they are what readers gave, or that they found nothing."""

    def gather(row: Row) -> None:
        name, reader, label = plain_name(row, "image_id"), _reader(row), row.require("class_name")
        label = _COLUMN_NAMES.get(label, label)
        if label not in part.names:
            raise row.bad("bad_label", f"{shown(label)} is none of the labels {', '.join(part.names)}")
        box = _box(row, label, reader)
        image = images.get(name)
        if image is None:
            images[name] = image = _Image(_bare(row))
        if box is not None and box in image.boxes:
            raise row.bad("duplicate_id", "an earlier line has the same box of the same reader")
        if part.votes is None:
            image.readers.add(reader)
            image.votes.setdefault(label, set()).add(reader)
        if box is not None:
            image.boxes.append(box)

    for _ in reading.each(read_csv(part.boxes, _BOX_COLUMNS, reading), gather):
        pass


def _box(row: Row, label: str, reader: str) -> Box | None:
    corners = [row.number(column) for column in _BOX_COLUMNS[2:]]
    if corners == [None] * 4:
        return None
    if None in corners or label == NO_FINDING:
        raise row.bad("bad_value", f"a box must have all four corners and a finding, got {label!r}")
    left, top, right, bottom = corners
    if right <= left or bottom <= top:
        raise row.bad("bad_value", "x_max and y_max of a box must be above x_min and y_min")
    return Box(label, left, top, right - left, bottom - top, reader=reader or None)


def _reader(row: Row) -> str:
    return sys.intern(row.get("rad_id") or _CONSENSUS)


def _bare(row: Row) -> Row:
    """Return where a row stands, without what it holds."""
    return Row(row.file, row.line, {})


def _record(name: str, image: _Image, part: _Part, path: Path) -> StudyRecord:
    if image.readers:
        votes = {label: len(readers) for label, readers in image.votes.items()}
        labels, findings = _states(part.names, part.labelled, tuple(votes.items()), len(image.readers), part.block)
    else:  # boxes of an image that the table of labels leaves out
        labels, findings = dict.fromkeys(part.names, LabelState.UNMENTIONED), {}
    return StudyRecord(
        study_id=name,
        source=SOURCE,
        modality="cxr",
        images=(ImageFile(path),),
        labels=labels,
        findings=findings,
        boxes=tuple(image.boxes),
        split=part.split,
        licence=part.licence,
    )


# Most images have no finding, or one of a few sets of them.
@lru_cache(maxsize=4096)
def _states(
    names: Sequence[str], labelled: Sequence[str], votes: tuple[tuple[str, int], ...], readers: int, block: str
) -> tuple[Mapping[str, LabelState], Mapping[str, LabelState]]:
    given = dict(votes)
    labels = {}
    for name in names:
        count = given.get(name, 0)
        if 2 * count > readers:
            labels[name] = LabelState.POSITIVE
        elif count:
            labels[name] = LabelState.UNCERTAIN
        else:
            labels[name] = LabelState.NEGATIVE if name in labelled else LabelState.UNMENTIONED
    return labels, shared_findings(labels, block)


def _recognises(root: Path) -> bool:
    base = find_base(root, _all_tables())
    if base is None:
        return False
    challenge = table_in(base, _CHALLENGE_TABLES[:1])
    if challenge is None or table_in(base, [name for name in _all_tables() if name not in _CHALLENGE_TABLES[:1]]):
        return True
    return columns_of(challenge) >= {"rad_id", "class_name"}


SET = StudySet(
    name=SOURCE,
    title="VinDr-CXR, and its VinBigData challenge",
    licence=_LICENCE["physionet"],
    url="https://physionet.org/content/vindr-cxr/1.0.0/",
    reference="Nguyen et al., Scientific Data 9 (2022) 429",
    layout=(
        "annotations/annotations_train.csv, annotations/image_labels_train.csv with train/*.dicom",
        "annotations/annotations_test.csv, annotations/image_labels_test.csv with test/*.dicom",
        "or of the challenge: train.csv with train/*.dicom (or .dcm, .png, .jpg)",
    ),
    recognises=_recognises,
    read=_read,
    published={"train_images": 15000, "test_images": 3000},
)
SETS: tuple[StudySet, ...] = (SET,)
