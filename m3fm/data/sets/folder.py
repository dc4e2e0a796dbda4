# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""An own folder: images with a table in Hugging Face's `imagefolder` convention, or texts alone.

The table is `metadata.jsonl`, `metadata.csv` or `metadata.parquet`, with a row an image or a row a study, or
`data.jsonl` for texts without images; instead of one table the folders `train`, `validation` and `test` may have one
each. Without any table, folders named by findings may hold the images. A table is read twice: first to learn which
rows belong to one study and what the labels mean, then for the studies.
"""

from __future__ import annotations

import os
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path, PurePosixPath

from ..schema import LANGUAGES, MODALITIES, ImageFile, StudyRecord
from ..tables import BadRow, Reading, Row, is_file, shown
from .demographics import age_in_years, sex_letter
from .folder_labels import LABEL_COLUMNS, FolderLabels, LabelSurvey
from .folder_studies import FolderStudy, RowText, WaitingStudies
from .folder_tables import (
    TABLES,
    FolderTable,
    RowImage,
    find_tables,
    has_table,
    is_known,
    names_images,
    near_miss,
    read_head,
    read_rows,
    row_images,
    split_name,
)
from .study_set import StudySet

__all__ = ["SETS", "FolderStudy", "RowText", "read_folder", "source_name"]

# Text-only sets that leave out what holds for every row.
_FOLDER_MODALITY = {"openi_iu_reports": "cxr"}
# Studies that the published split leaves out; the set's held-back part is not among them.
_UNSPLIT = {"openi_iu_reports": "train"}
# Sets whose `patient_id` names a whole file series: the number in the file name is the patient.
_FILE_SERIES = {"kermany_pneumonia_224": re.compile(r"IM-(\d+)")}
# Sets without patients whose files of one paper are numbered: "12_0.jpg" and "12_1.jpg" are figures of paper 12.
_PAPER_NUMBERED = frozenset({"cov_ctr"})
# medRxiv and bioRxiv numbers, as files taken from preprints are named.
_PREPRINT = re.compile(r"^\d{4}\.\d{2}\.\d{2}\.\d+")
_WHOLE_TEXTS = ("report", "reading", "clinical_notes")


def source_name(folder: Path) -> str:
    """Return the name that the studies of a folder have as their source; that of "." is the current folder's."""
    # Not resolved: a link may have been made to give a folder the name of a known set.
    return Path(os.path.abspath(folder)).name


def read_folder(root: Path, reading: Reading) -> Iterator[FolderStudy]:
    """Read the studies of an own folder in the order of their first rows.

    A row is a study; rows of radiographs with the same `study_id` are the views of one. Slices of a CT that have a row
    each are a study each; a row that lists them is one.

    Args:
        root: The folder. Its name tells which label names to expect. In a folder of another name, labels that only
            one of the known sets uses tell that it is a part of it; else they are canonical, CheXpert's or English
            names, and a list of labels denies those that other rows name and it does not.
        reading: How bad rows are met.

    Raises:
        BadRow: If there is no table, or nothing of one can be read.
    """
    root = Path(root)
    tables = find_tables(root)
    if not tables:
        raise BadRow("missing_file", root, None, f"none of {', '.join(TABLES)} is there")
    survey = _Survey(source_name(root))
    survey.look_at(tables, reading)
    reader = _StudyReader(root, survey, reading)
    for table in tables:
        for row in read_rows(table, LABEL_COLUMNS, reading):
            yield from reader.take(row, table)


# --------------------------------------------------------------------------------------------------------------------
# First pass


class _Names:
    """Know of each name whether it comes once; hashes, because the names of many images are long."""

    def __init__(self) -> None:
        self._once: set[int] = set()
        self._more: set[int] = set()

    def add(self, name: str) -> bool:
        """Count a name, and tell whether it is new."""
        key = hash(name)
        is_new = key not in self._once
        (self._once if is_new else self._more).add(key)
        return is_new

    def is_unique(self, name: str) -> bool:
        return hash(name) not in self._more


class _Survey:
    """What has to be known of all rows before the first study can be made."""

    def __init__(self, folder_name: str):
        self.folder_name = folder_name
        self.labels: FolderLabels
        self.views: Counter[str] = Counter()
        self.examinations: set[str] = set()
        self._label_survey = LabelSurvey(folder_name)
        self._files, self._stems, self._paths = _Names(), _Names(), _Names()
        # Per column the first row that has it, its table, and all columns of that.
        self._columns: dict[str, tuple[Row, FolderTable, set[str]]] = {}
        self._wide: dict[str, None] = {}

    def look_at(self, tables: list[FolderTable], reading: Reading) -> None:
        """Look at all rows; what is wrong with one is told when it is read.

        Raises:
            BadRow: If a table lacks a column.
        """
        firsts = [(table, *self._look_at_table(table)) for table in tables]
        self.labels = self._label_survey.reader(self._wide)
        for table, row, columns in firsts:
            if row is not None:
                self._check_columns(table, row, columns)
        for name, (row, table, columns) in self._columns.items():
            near = self._near_miss(name, columns, table)
            if near is not None:
                _note(reading, row.bad("wrong_column", f"column {shown(name)} is not read; did you mean {near!r}?"))

    def _look_at_table(self, table: FolderTable) -> tuple[Row | None, set[str]]:
        columns: set[str] = set()
        first = None
        for row in read_rows(table, LABEL_COLUMNS, Reading("skip", "unchecked")):
            first = first or row
            for name in row.values:
                if name not in columns:
                    columns.add(name)
                    self._columns.setdefault(name, (row, table, columns))
            self._label_survey.add(row)
            with suppress(BadRow):
                self._look_at_row(row, table)
        if first is None and table.path.suffix == ".csv":
            first = read_head(table.path)
            columns.update(first.values)
        if table.path.suffix in (".csv", ".parquet"):
            self._wide |= dict.fromkeys(first.values if first else ())
        return first, columns

    def _look_at_row(self, row: Row, table: FolderTable) -> None:
        if not table.names_images:
            return
        image = row_images(row, table)[0].name
        stated = row.get("study_id")
        if is_view(row, table):
            self.views[stated] += 1
        elif row.get("file_name") is not None or stated is None:
            if stated is not None:
                self.examinations.add(stated)
            if self._files.add(str(image)):
                self._stems.add(_stem(image))
                self._paths.add(_bare_path(image))

    def _check_columns(self, table: FolderTable, row: Row, columns: set[str]) -> None:
        if not table.names_images:
            missing = "study_id" not in columns and "study_id"
        else:
            missing = not any(map(names_images, columns)) and "file_name"
        if not missing and "modality" not in columns and self.labels.source not in _FOLDER_MODALITY:
            missing = "modality"
        if missing:
            # Without a head, the names are cells of the first row: others than those that are known are not told.
            near = [name for name in row.values if self._near_miss(name, columns, table) == missing]
            hint = f"; did you mean it by {shown(near[0])}?" if near else ""
            known = ", ".join(sorted(filter(is_known, row.values))) or "none of the known columns"
            raise row.bad("wrong_column", f"column {missing!r} is missing; the row has {known}{hint}")

    def _near_miss(self, name: str, columns: set[str], table: FolderTable) -> str | None:
        if name in LABEL_COLUMNS or name in self.labels.wide:
            return None
        return near_miss(name, columns, table)

    def study_id(self, row: Row, table: FolderTable, images: list[RowImage]) -> str:
        """Name the study of a row: by its `study_id`, or by its image file, which a slice of a CT always is."""
        if not images or is_view(row, table):
            return row.require("study_id")
        stated = row.get("study_id")
        if stated is not None and row.get("file_name") is None:
            return stated
        file = images[0].name
        if self._stems.is_unique(_stem(file)):
            return _stem(file)
        return _bare_path(file) if self._paths.is_unique(_bare_path(file)) else str(file)


def is_view(row: Row, table: FolderTable) -> bool:
    """Tell whether the row is of a radiograph whose study is named, and may have further rows."""
    return table.names_images and row.get("modality") != "ct" and row.get("study_id") is not None


def _stem(image: PurePosixPath) -> str:
    name = image.name
    return name.removesuffix(".nii.gz") or name if name.endswith(".nii.gz") else image.stem


def _bare_path(image: PurePosixPath) -> str:
    return str(image.with_name(_stem(image)))


def _note(reading: Reading, problem: BadRow) -> None:
    """Tell of what costs no row: it is counted where bad rows are, and warned of where they are fatal."""
    if reading.on_bad == "raise":
        warnings.warn(str(problem), stacklevel=2)
    else:
        reading.tell(problem)


# --------------------------------------------------------------------------------------------------------------------
# Second pass


class _StudyReader:
    """Make studies of rows, and keep those that more rows will add to, and those behind them.

    Studies come in the order of their first rows: where one has rows at both ends of a table, all of it waits.
    """

    def __init__(self, root: Path, survey: _Survey, reading: Reading):
        self.root = root
        self.survey = survey
        self.reading = reading
        self._waiting = WaitingStudies()
        self._open: set[str] = set()
        self._seen = _Names()

    def take(self, row: Row, table: FolderTable) -> Iterator[FolderStudy]:
        """Take a row, and yield the studies that are complete by it."""
        study_id = None
        try:
            images = row_images(row, table) if table.names_images else []
            if is_view(row, table):
                study_id = row.get("study_id")
            self._add(row, table, images)
        except BadRow as error:
            self.reading.tell(error)
        if study_id is not None:
            self.survey.views[study_id] -= 1
        while (first := self._waiting.first) is not None and self.survey.views[first] <= 0:
            self._open.discard(first)
            del self.survey.views[first]
            yield self._waiting.pop(first)

    def _add(self, row: Row, table: FolderTable, images: list[RowImage]) -> None:
        study = self._study(row, table, images)
        study_id = study.record.study_id
        if self._seen.add(study_id):
            self._waiting.put(study)
            if is_view(row, table):
                self._open.add(study_id)
            return
        known = self._waiting.get(study_id) if study_id in self._open and is_view(row, table) else None
        if known is None or {each.path for each in known.record.images} & {each.path for each in study.record.images}:
            raise row.bad("duplicate_id", "the study of this row was already given by an earlier line")
        self._waiting.put(_add_view(known, study, row))

    def _study(self, row: Row, table: FolderTable, images: list[RowImage]) -> FolderStudy:
        modality = self._modality(row)
        study_id = self.survey.study_id(row, table, images)
        for image in images:
            if self.reading.images == "required" and not is_file(self.root / image.name):
                raise row.bad("missing_file", f"a file that the row names does not exist in {self.root}")
        labels, findings = self.survey.labels.read(row)
        patient = self._patient(row, images)
        stated = row.get("study_id")
        is_slice = bool(images) and modality == "ct" and row.get("file_name") is not None
        split = row.get("split") or table.split or _UNSPLIT.get(self.survey.labels.source)
        record = StudyRecord(
            study_id=study_id,
            source=self.survey.folder_name,
            modality=modality,
            patient_id=patient,
            documents=self._documents(row, study_id, patient, images),
            images=tuple(ImageFile(self.root / image.name, view=image.view) for image in images),
            labels=labels,
            findings=findings,
            age=_age(row),
            sex=sex_letter(str(row.values.get("sex"))),
            split=None if split is None else split_name(split),
            licence=row.get("licence") or row.get("license"),
        )
        return FolderStudy(record, _texts(row), stated if is_slice else None)

    def _modality(self, row: Row) -> str:
        modality = row.get("modality") or _FOLDER_MODALITY.get(self.survey.labels.source) or row.require("modality")
        if modality not in MODALITIES:
            raise row.bad("bad_value", f"modality must be one of {', '.join(MODALITIES)}, got {shown(modality)}")
        return modality

    def _patient(self, row: Row, images: list[RowImage]) -> str | None:
        series = _FILE_SERIES.get(self.survey.labels.source)
        number = series.search(str(images[0].name)) if series and images else None
        return number.group() if number else row.get("patient_id")

    def _documents(self, row: Row, study_id: str, patient: str | None, images: list[RowImage]) -> tuple[str, ...]:
        """Return what groups the study besides its patient: paper, address, and the CT that it is a slice of."""
        preprint = _PREPRINT.match(images[0].name.name) if images else None
        doi = row.get("doi") or (f"10.1101/{preprint.group()}" if preprint else None)
        examination = row.get("study_id")
        slices = examination if examination in self.survey.examinations else None
        given = {"doi": doi, "url": row.get("url"), "study": slices}
        marks = tuple(f"{kind}:{value}" for kind, value in given.items() if value)
        if not marks and patient is None and examination is None and self.survey.labels.source in _PAPER_NUMBERED:
            return (f"study:{study_id.split('_')[0]}",)
        return marks


def _add_view(study: FolderStudy, view: FolderStudy, row: Row) -> FolderStudy:
    """Add the images of a further row; what the rows tell of the study must agree, and may stand in one row alone."""
    known, given = study.record, view.record
    compared = {name: (getattr(known, name), getattr(given, name)) for name in ("patient_id", "findings", "split")}
    reports = ({}, {}) if study.texts == view.texts else (study.light_reports, view.light_reports)
    for name, (first, second) in {**compared, "reports": reports}.items():
        if first and second and first != second:
            raise row.bad("bad_value", f"{name} differs from an earlier row of the same study; expected one of them")
    record = replace(
        known,
        images=known.images + given.images,
        documents=tuple(dict.fromkeys(known.documents + given.documents)),
        **{name: first or second for name, (first, second) in compared.items()},
        labels=known.labels or given.labels,
        age=given.age if known.age is None else known.age,
        sex=known.sex or given.sex,
        licence=known.licence or given.licence,
    )
    is_told = study.texts == view.texts or reports[0]
    return FolderStudy(record, study.texts if is_told else view.texts, study.examination)


def _texts(row: Row) -> dict[str, RowText]:
    texts = {}
    for language in LANGUAGES:
        whole = next(filter(None, (row.get(f"{column}_{language}") for column in _WHOLE_TEXTS)), None)
        text = RowText(language, whole, row.get(f"findings_{language}"), row.get(f"impression_{language}"))
        if text.whole or text.findings or text.impression:
            texts[language] = text
    return texts


def _age(row: Row) -> float | None:
    """Return years; None where a person wrote what is no age, as "40+" or "Young Child"."""
    try:
        return age_in_years(str(row.values.get("age")))
    except ValueError:
        return None


def _read(root: Path, reading: Reading) -> Iterator[StudyRecord]:
    for study in read_folder(root, reading):
        yield study.with_reports()


SETS = (
    StudySet(
        name="folder",
        title="Your own folder",
        licence="yours; the column licence says it per study",
        url="https://huggingface.co/docs/datasets/image_dataset#imagefolder",
        reference="",
        layout=(
            *TABLES,
            "{train,validation,test}/metadata.{jsonl,csv,parquet}",
            "{cxr,ct}/{train,validation,test}/FINDING/* without a table",
        ),
        recognises=has_table,
        read=_read,
    ),
)
