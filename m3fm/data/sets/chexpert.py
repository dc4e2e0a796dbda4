# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""CheXpert, and CheXpert Plus: the same radiographs with their reports.

Read are `train.csv` and `valid.csv`, with the images below them, in the folder that they name, or in the batches of
the full-size set. The test part is published apart from the others, with the segmentations of CheXlocalize
(`val_labels.csv`, `test_labels.csv`), and is read where it is there. CheXpert Plus has one table, with PNG or DICOM
files, and its labels in a file of JSON lines.

A study is all its views, which share labels, age and sex; its part is the one that their paths name. A view that says
other labels than an earlier one is bad, and a study of whose views none is there is left out. A blank cell is a label
that is not mentioned.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..labels import shared_findings
from ..report_sections import report_from_sections, report_from_text
from ..row_groups import RowGroups
from ..schema import ImageFile, LabelState, ReportText, StudyRecord
from ..tables import BadRow, Reading, Row, read_csv, read_jsonl
from .chexpert_labels import CHEXPERT_LABELS, chexpert_states
from .demographics import sex_letter
from .layouts import columns_of, table_in, tables_like
from .study_set import StudySet

__all__ = ["SETS"]

# Both are projections from the side.
_VIEWS = {"LL": "LATERAL", "RL": "LATERAL"}
_SPLITS = {"train": "train", "valid": "validation", "val": "validation", "test": "test"}
# The first of a part's names that is there.
_TABLES = (("train.csv",), ("valid.csv", "val_labels.csv"), ("test.csv", "test_labels.csv"))
_PLUS_TABLE = r"df_chexpert_plus_\d+\.csv"
_PLUS_LABELS = ("chexbert_labels/report_fixed.json", "report_fixed.json")
# ".../train/patient00001/study1/view1_frontal.jpg"
_PATH = re.compile(
    r"(?:.*/)?(train|valid|val|test)/(patient\d{1,9})/(study\d{1,9})/(view\d+_(frontal|lateral))\.(\w+)"
)


@dataclass(frozen=True)
class _View:
    """Say what the path of an image says."""

    part: str
    patient: str
    study: str
    name: str
    side: str
    suffix: str

    @classmethod
    def of(cls, row: Row, column: str) -> _View:
        match = _PATH.fullmatch(row.require(column))
        if match is None:
            raise row.bad("bad_value", f"column {column!r} must end as train/patientN/studyN/viewN_frontal.jpg does")
        return cls(*match.groups())

    @property
    def study_id(self) -> str:
        return f"{self.patient}/{self.study}"


def _recognises(root: Path) -> bool:
    table = next(iter(_tables(root)), None)
    if table is None:
        return False
    # Other sets have a train.csv too.
    return {"Path", "Pleural Effusion"} <= columns_of(table)


def _read(root: Path, reading: Reading) -> Iterator[StudyRecord]:
    tables = _tables(root)
    if not tables:
        raise BadRow("missing_file", root, None, "expected train.csv, valid.csv or test.csv")
    folders = _image_folders(root)
    shown = ("Sex", "Age", "Frontal/Lateral", "AP/PA")
    for table in tables:
        needed = ("Path", *(shown if table.name.split(".")[0] in _SPLITS else ()), *CHEXPERT_LABELS)
        rows = read_csv(table, needed, reading)
        columns = ("Path", *shown, *CHEXPERT_LABELS)
        for study in RowGroups.read(rows, lambda row: _View.of(row, "Path").study_id, columns, reading, unique="Path"):
            record = _study(study, folders, reading)
            if record is not None:
                yield record


def _study(rows: list[Row], folders: Sequence[Path], reading: Reading) -> StudyRecord | None:
    first: dict[str, LabelState] = {}

    def view(row: Row) -> tuple[ImageFile, float | None, str | None]:
        stated = chexpert_states(row)
        if first and stated != first:
            raise row.bad("bad_label", "the labels are others than those of an earlier view of the study")
        image = _image(row, "Path", (row.get("Frontal/Lateral"), row.get("AP/PA")), folders, ("",), reading)
        said = image, row.number("Age"), sex_letter(row.get("Sex"))
        first.update(stated)
        return said

    views = list(reading.each(rows, view))
    if not views:
        return None
    images, ages, sexes = zip(*views, strict=True)
    named = _View.of(rows[0], "Path")
    return StudyRecord(
        study_id=named.study_id,
        source=SET.name,
        modality="cxr",
        patient_id=named.patient,
        images=images,
        labels=first,
        findings=shared_findings(first, "chexpert"),
        age=ages[0],
        sex=sexes[0],
        split=_SPLITS[named.part],
        licence=SET.licence,
    )


# --------------------------------------------------------------------------------------------------------------------
# Where things lie


def _inside(root: Path) -> list[Path]:
    """Return the folders that may hold the tables or the parts: downloads have a folder at the top, or batches."""
    return [root, *sorted(Path(entry) for entry in os.scandir(root) if entry.is_dir())]


def _tables(root: Path) -> list[Path]:
    places = _inside(root)
    found = (next(filter(None, (table_in(place, names) for place in places)), None) for names in _TABLES)
    return [path for path in found if path is not None]


def _image_folders(root: Path) -> list[Path]:
    """Return the folders that hold train/ or patients, as "CheXpert-v1.0 batch 2 (train 1)" does."""
    root = root.absolute()
    beside = [path for path in sorted(root.parent.glob("*")) if path.name.lower().startswith("chexpert")]
    within = [place / "PNG" for place in _inside(root)]
    places = [*_inside(root), *within, *(path for path in beside if path.is_dir() and path != root)]
    return [place for place in places if any((place / part).is_dir() for part in _SPLITS) or "batch" in place.name]


def _image(
    row: Row,
    column: str,
    said: tuple[str | None, str | None],
    folders: Sequence[Path],
    suffixes: Sequence[str],
    reading: Reading,
) -> ImageFile:
    """Return the image of a row; `said` are its side and its projection."""
    view = _View.of(row, column)
    side = (said[0] or view.side).upper()
    if side not in ("FRONTAL", "LATERAL"):
        raise row.bad("bad_value", "expected a view that is 'Frontal' or 'Lateral'")
    projection = (said[1] or side).upper() if side == "FRONTAL" else side
    names = [f"{view.patient}/{view.study}/{view.name}.{suffix or view.suffix}" for suffix in suffixes]
    paths = [folder / place for folder in folders for name in names for place in (f"{view.part}/{name}", name)]
    if reading.images == "required":
        paths = [path for path in paths if path.is_file()] or paths
    # Without any folder of images the table's own path is as good as another.
    path = paths[0] if paths else Path(row.require(column))
    return ImageFile(reading.image(row, path), view=_VIEWS.get(projection, projection))


# --------------------------------------------------------------------------------------------------------------------
# CheXpert Plus


_PLUS_COLUMNS = ("path_to_image", "frontal_lateral", "ap_pa", "age", "sex")
_PLUS_TEXTS = ("report", "section_findings", "section_impression")


def _recognises_plus(root: Path) -> bool:
    return _plus_table(root) is not None


def _plus_table(root: Path) -> Path | None:
    return next(iter(tables_like(root, _PLUS_TABLE)), None)


def _read_plus(root: Path, reading: Reading) -> Iterator[StudyRecord]:
    table = _plus_table(root)
    if table is None:
        raise BadRow("missing_file", root, None, f"expected {PLUS.layout[0]}")
    needed = (*_PLUS_COLUMNS, *_PLUS_TEXTS)

    def study(row: Row) -> str:
        return _View.of(row, "path_to_image").study_id

    def rows(reading: Reading) -> Iterable[Row]:
        return read_csv(table, needed, reading, has_long_text=True)

    studies = RowGroups.read(rows(reading), study, _PLUS_COLUMNS, reading, unique="path_to_image")
    labels = _plus_labels(root, reading)
    folders = _image_folders(root)
    # The reports, most of the table, are read in a second pass; what is wrong with rows has been told in the first.
    for row in rows(Reading("skip")):
        match = _PATH.fullmatch(row.get("path_to_image") or "")
        views = [] if match is None else studies.get(f"{match[2]}/{match[3]}")
        if views and views[0].line == row.line:
            record = _plus_study(views, row, labels, folders, reading)
            if record is not None:
                yield record


def _plus_labels(root: Path, reading: Reading) -> RowGroups | None:
    path = next((root / name for name in _PLUS_LABELS if (root / name).is_file()), None)
    if path is None:
        return None
    rows = read_jsonl(path, reading)
    return RowGroups.read(rows, lambda row: _View.of(row, "path_to_image").study_id, CHEXPERT_LABELS, reading)


def _plus_study(
    views: list[Row], first: Row, labels: RowGroups | None, folders: Sequence[Path], reading: Reading
) -> StudyRecord | None:
    def view(row: Row) -> tuple[ImageFile, float | None, str | None]:
        said = (row.get("frontal_lateral"), row.get("ap_pa"))
        image = _image(row, "path_to_image", said, folders, ("png", "", "dcm"), reading)
        return image, row.number("age"), sex_letter(row.get("sex"))

    good = list(reading.each(views, view))
    if not good:
        return None
    images, ages, sexes = zip(*good, strict=True)
    named = _View.of(first, "path_to_image")
    stated = next(reading.each([] if labels is None else labels.get(named.study_id), chexpert_states), {})
    report = _plus_report(first)
    return StudyRecord(
        study_id=named.study_id,
        source=PLUS.name,
        modality="cxr",
        patient_id=named.patient,
        images=images,
        reports={} if report is None else {"en": report},
        labels=stated,
        findings=shared_findings(stated, "chexpert"),
        age=ages[0],
        sex=sexes[0],
        split=_SPLITS[named.part],
        licence=PLUS.licence,
    )


def _plus_report(row: Row) -> ReportText | None:
    report, findings, impression = (row.get(column) for column in _PLUS_TEXTS)
    return report_from_sections(findings, impression, "en", raw=report) or report_from_text(report or "", "en")


SET = StudySet(
    name="chexpert",
    title="CheXpert",
    licence="Stanford University Dataset Research Use Agreement",
    url="https://stanfordmlgroup.github.io/competitions/chexpert/",
    reference="Irvin et al., CheXpert: A Large Chest Radiograph Dataset with Uncertainty Labels and Expert "
    "Comparison, AAAI 2019, arXiv:1901.07031",
    layout=(
        "train.csv",
        "valid.csv or val_labels.csv",
        "test.csv or test_labels.csv",
        "train/patientNNNNN/studyN/viewN_frontal.jpg",
    ),
    recognises=_recognises,
    read=_read,
    published={
        "images": 224316,
        "patients": 65240,
        "train_images": 223414,
        "train_studies": 187641,
        "validation_images": 234,
        "validation_studies": 200,
        "test_studies": 500,
    },
)
PLUS = StudySet(
    name="chexpert_plus",
    title="CheXpert Plus",
    licence="Stanford University Dataset Research Use Agreement",
    url="https://stanfordaimi.azurewebsites.net/datasets/5158c524-d3ab-4e02-96e9-6ee9efc110a1",
    reference="Chambon et al., CheXpert Plus: Augmenting a Large Chest X-ray Dataset with Text Radiology Reports, "
    "Patient Demographics and Additional Image Formats, 2024, arXiv:2405.19538",
    layout=(
        "df_chexpert_plus_240401.csv",
        "chexbert_labels/report_fixed.json",
        "PNG/train/patientNNNNN/studyN/viewN_frontal.png or .dcm or .jpg",
    ),
    recognises=_recognises_plus,
    read=_read_plus,
    published={"images": 223462, "patients": 64725, "studies": 187711},
)
SETS = (PLUS, SET)
