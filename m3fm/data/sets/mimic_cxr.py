# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""MIMIC-CXR (DICOM files and reports) and MIMIC-CXR-JPG (JPEG files and labels), alone or side by side.

Read are the tables and the tree `files/` of either, as PhysioNet has them, with what the other's folder beside adds.
The fullest table that is there names the studies: with those of views (metadata, record list, split) a study has
images; with those of studies alone (study list, labels) it is text.

A study is all its views, with its report where there is one and its labels where there are some: neither is needed.
One of whose views none is there is left out. One on which the table of splits says nothing, or nothing that can be
used, is "unassigned", and in no part for training.

Of the two labellers whose tables are published, CheXpert's is taken, as in the baselines of its publishers, and
NegBio's where CheXpert's is not there: the two are never mixed. Where radiologists labelled a study by hand (the
test-set table of version 2.1.0), theirs are taken instead.
"""

from __future__ import annotations

import os
import re
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from ..labels import shared_findings
from ..report_sections import report_from_text
from ..row_groups import RowGroups
from ..schema import ImageFile, LabelState, ReportText, StudyRecord
from ..tables import BadRow, Reading, Row, is_file, read_csv
from .chexpert_labels import CHEXPERT_LABELS, chexpert_states
from .layouts import tables_like
from .study_set import UNASSIGNED, StudySet

__all__ = ["SETS"]

# The radiologists' table calls the label of opacities by another name than the labellers' tables.
_OTHER_NAMES = {"Lung Opacity": "Airspace Opacity"}
_SPLITS = {"train": "train", "validate": "validation", "validation": "validation", "valid": "validation"}
_SPLITS |= {"val": "validation", "test": "test"}
_VIEWS = {"LL": "LATERAL", "RL": "LATERAL"}

# What names the studies, the fullest table first.
_VIEW_TABLES = (r"mimic-cxr-2\..*-metadata", "cxr-record-list", r"mimic-cxr-2\..*-split")
_STUDY_TABLES = ("cxr-study-list", r"mimic-cxr-2\..*-chexpert", r"mimic-cxr-2\..*-negbio")
_SPLIT_TABLE = _VIEW_TABLES[2]
_LABELLERS = _STUDY_TABLES[1:]
_HAND_LABELS = r"mimic-cxr-2\..*-test-set-labeled"
_ARCHIVE = "mimic-cxr-reports.zip"


@dataclass(frozen=True)
class _Copy:
    """Tell where the parts of a copy lie.

    Attributes:
        table: The table that is gone through.
        has_views: Whether it has a row a view, rather than a study.
        tables: All tables.
        folders: Those that hold the folders of patients, with images or reports; the copy's own before its sisters'.
        suffixes: Of image files, the likeliest first.
        archive: The reports, where they lie in their archive.
    """

    table: Path
    has_views: bool
    tables: Sequence[Path]
    folders: Sequence[Path]
    suffixes: Sequence[str]
    archive: Path | None


def _recognises(root: Path) -> bool:
    tables = _tables(_inside(root))
    return any(_find(tables, pattern) for pattern in (*_VIEW_TABLES, *_STUDY_TABLES))


def _read(root: Path, reading: Reading) -> Iterator[StudyRecord]:
    places = [*_inside(root), *_beside(root)]
    copy = _copy(root, places)
    columns = ("subject_id", "study_id", *(("dicom_id",) if copy.has_views else ()))
    studies = RowGroups.read(
        read_csv(copy.table, columns, reading),
        _checked_study,
        (*columns, "ViewPosition"),
        reading,
        unique="dicom_id" if copy.has_views else "study_id",
    )
    splits = _split_table(copy, reading)
    labels = _label_tables(copy, reading)
    with ExitStack() as stack:
        reports = _Reports(copy, stack)
        for rows in studies:
            images = _images(rows, copy, reading) if copy.has_views else ()
            if copy.has_views and not images:
                continue
            study, patient = rows[0].values["study_id"], rows[0].values["subject_id"]
            stated = _labels(study, labels, reading)
            text = reports.read(rows[0], reading)
            yield StudyRecord(
                study_id=study,
                source=SET.name,
                modality="cxr",
                patient_id=patient,
                images=images,
                reports={} if text is None else {"en": text},
                labels=stated,
                findings=shared_findings(stated, "chexpert"),
                split=_split(study, splits, reading),
                licence=SET.licence,
            )


# --------------------------------------------------------------------------------------------------------------------
# Where things lie


def _inside(root: Path) -> list[Path]:
    """Return the folders of a copy that may hold its tables, as downloads leave them."""
    folders = sorted(Path(entry) for entry in os.scandir(root) if entry.is_dir() and entry.name != "files")
    return [root, *folders, *sorted(root.glob("physionet.org/files/mimic-cxr*/*/"))]


def _beside(root: Path) -> list[Path]:
    """Return the folders of the sister sets: reports are published apart from the JPEG files."""
    root = root.absolute()
    sisters = [path for path in sorted(root.parent.glob("*")) if _is_mimic(path) and path != root]
    # physionet.org/files/mimic-cxr/2.0.0 beside physionet.org/files/mimic-cxr-jpg/2.0.0
    versions = sorted(root.parent.parent.glob("mimic-cxr*/2.*/")) if _is_mimic(root.parent) else []
    return [*sisters, *(path for path in versions if path != root)]


def _is_mimic(path: Path) -> bool:
    return path.name.lower().startswith("mimic-cxr") and path.is_dir()


def _tables(places: Sequence[Path]) -> list[Path]:
    """Return the tables of all places, in their order, and of one place the newest version first."""
    found = []
    for place in places:
        found += tables_like(place, r"(mimic-cxr-2\.|cxr-).*\.csv")
    return found


def _find(tables: Sequence[Path], pattern: str) -> Path | None:
    name = re.compile(rf"{pattern}\.csv(\.gz|\.zip)?")
    return next((table for table in tables if name.fullmatch(table.name)), None)


def _copy(root: Path, places: Sequence[Path]) -> _Copy:
    folders = [place / "files" for place in places if (place / "files").is_dir()]
    folders += [place for place in places if any(place.glob("p1[0-9]"))]
    tables = _tables(places)
    archive = next((place / _ARCHIVE for place in places if (place / _ARCHIVE).is_file()), None)
    for pattern in (*_VIEW_TABLES, *_STUDY_TABLES):
        table = _find(tables, pattern)
        if table is not None:
            is_jpg = any(path.name.startswith("mimic-cxr-2.") for path in _tables(_inside(root)))
            suffixes = (".jpg", ".dcm") if is_jpg else (".dcm", ".jpg")
            has_views = pattern in _VIEW_TABLES
            return _Copy(table, has_views, tables, folders or [root / "files"], suffixes, archive)
    raise BadRow("missing_file", root, None, f"expected one of the tables {', '.join(SET.layout[:6])}")


# --------------------------------------------------------------------------------------------------------------------
# Views and reports


def _checked_study(row: Row) -> str:
    """Return the study of a row; its ids make paths, and have to be what they are published as."""
    for column in ("subject_id", "study_id"):
        if not re.fullmatch(r"\d{1,12}", row.require(column)):
            raise row.bad("bad_value", f"column {column!r} must be a whole number")
    if not re.fullmatch(r"[\w-]+", row.values.get("dicom_id", "-"), flags=re.ASCII):
        raise row.bad("bad_value", "column 'dicom_id' must consist of letters, digits and hyphens")
    return row.require("study_id")


def _images(rows: list[Row], copy: _Copy, reading: Reading) -> tuple[ImageFile, ...]:
    def image(row: Row) -> ImageFile:
        if row.require("subject_id") != rows[0].require("subject_id"):
            raise row.bad("bad_value", "column 'subject_id' is another than in an earlier row of the study")
        path = _study_folder(row) / row.require("dicom_id")
        paths = [folder / f"{path}{suffix}" for folder in copy.folders for suffix in copy.suffixes]
        if reading.images == "required":
            paths = [each for each in paths if is_file(each)] or paths
        view = (row.get("ViewPosition") or "").upper()
        return ImageFile(reading.image(row, paths[0]), view=_VIEWS.get(view, view) or None)

    return tuple(reading.each(rows, image))


def _study_folder(row: Row) -> Path:
    """Return the folder of a study's images, "p10/p10.../s5..."; its report lies beside it."""
    patient, study = row.require("subject_id"), row.require("study_id")
    return Path(f"p{patient[:2]}", f"p{patient}", f"s{study}")


class _Reports:
    """Reads reports from their folders, or from the archive that they are published as."""

    def __init__(self, copy: _Copy, stack: ExitStack):
        self._folders = copy.folders
        self._archive = None
        if copy.archive is not None:
            try:
                self._archive = stack.enter_context(zipfile.ZipFile(copy.archive))
            except zipfile.BadZipFile:
                raise BadRow("bad_encoding", copy.archive, None, "expected a ZIP archive") from None

    def read(self, row: Row, reading: Reading) -> ReportText | None:
        """Return the report of a study; None where there is none. One that is no text is told of."""
        try:
            content = self._content(_study_folder(row).with_suffix(".txt"))
            return None if content is None else report_from_text(content.decode(), "en")
        except (UnicodeDecodeError, zipfile.BadZipFile, zlib.error):
            reading.tell(row.bad("bad_encoding", "the report of the row's study must be text in UTF-8"))
            return None

    def _content(self, path: Path) -> bytes | None:
        for folder in self._folders:
            if is_file(folder / path):
                return (folder / path).read_bytes()
        try:
            return None if self._archive is None else self._archive.read(f"files/{path.as_posix()}")
        except KeyError:
            return None


# --------------------------------------------------------------------------------------------------------------------
# Split and labels


def _split_table(copy: _Copy, reading: Reading) -> RowGroups | None:
    table = _find(copy.tables, _SPLIT_TABLE)
    return None if table is None else _by_study(table, ("split",), copy, reading)


def _by_study(
    table: Path, columns: Sequence[str], copy: _Copy, reading: Reading, kept: Sequence[str] = (), once: bool = False
) -> RowGroups:
    # The table that is gone through has been read, and what is wrong with it told.
    reading = Reading("skip") if table == copy.table else reading
    rows = read_csv(table, ("study_id", *columns), reading)
    unique = "study_id" if once else None
    return RowGroups.read(rows, lambda row: row.require("study_id"), (*columns, *kept), reading, unique)


def _split(study: str, table: RowGroups | None, reading: Reading) -> str | None:
    def part(row: Row) -> str:
        if row.require("split") not in _SPLITS:
            raise row.bad("bad_value", f"column 'split' must be one of {', '.join(_SPLITS)}")
        return _SPLITS[row.require("split")]

    if table is None:
        return None
    rows = table.get(study)
    # All images of a study are in one part.
    parts = set(reading.each(rows, part))
    if len(parts) > 1:
        reading.tell(rows[0].bad("bad_value", "the images of the row's study are in several parts"))
    return parts.pop() if len(parts) == 1 else UNASSIGNED


def _label_tables(copy: _Copy, reading: Reading) -> list[RowGroups]:
    tables = []
    by_hand = _find(copy.tables, _HAND_LABELS)
    if by_hand is not None:
        kept = [*(label for label in CHEXPERT_LABELS if label != "Pneumonia"), *_OTHER_NAMES.values()]
        tables.append(_by_study(by_hand, ("Pneumonia",), copy, reading, kept, once=True))
    by_labeller = next(filter(None, (_find(copy.tables, pattern) for pattern in _LABELLERS)), None)
    if by_labeller is not None:
        tables.append(_by_study(by_labeller, CHEXPERT_LABELS, copy, reading, once=True))
    return tables


def _labels(study: str, tables: Sequence[RowGroups], reading: Reading) -> dict[str, LabelState]:
    """Return what the first table that has the study says; a study may stand in none."""
    rows = [row for table in tables for row in table.get(study)]
    return next(reading.each(rows, _stated), {})


def _stated(row: Row) -> dict[str, LabelState]:
    return chexpert_states(row, _OTHER_NAMES)


SET = StudySet(
    name="mimic_cxr",
    title="MIMIC-CXR and MIMIC-CXR-JPG",
    licence="PhysioNet Credentialed Health Data License 1.5.0",
    url="https://physionet.org/content/mimic-cxr-jpg/",
    reference="Johnson et al., MIMIC-CXR, a de-identified publicly available database of chest radiographs with "
    "free-text reports, Scientific Data 6:317, 2019, doi:10.1038/s41597-019-0322-0",
    layout=(
        "mimic-cxr-2.0.0-metadata.csv.gz",
        "cxr-record-list.csv.gz",
        "mimic-cxr-2.0.0-split.csv.gz",
        "cxr-study-list.csv.gz",
        "mimic-cxr-2.0.0-chexpert.csv.gz",
        "mimic-cxr-2.0.0-negbio.csv.gz",
        "mimic-cxr-2.1.0-test-set-labeled.csv",
        "files/pNN/pNNNNNNNN/sNNNNNNNN/*.jpg or *.dcm",
        "files/pNN/pNNNNNNNN/sNNNNNNNN.txt, also under mimic-cxr-reports/ or in mimic-cxr-reports.zip",
    ),
    recognises=_recognises,
    read=_read,
    published={"images": 377110, "studies": 227835, "patients": 65379},
)
SETS = (SET,)
