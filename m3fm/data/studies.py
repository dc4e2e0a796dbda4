# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Studies and parallel texts, read from data folders.

A folder holds `metadata.jsonl` (one row per image, Hugging Face's `imagefolder` convention with the key `file_name`)
or `data.jsonl` (text only, key `study_id`), and may hold `parallel_en_zh.jsonl`. Study and patient ids serve grouping
alone: no message, and no `repr`, shows them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

from .labels import (
    NO_FINDING,
    canonical_findings,
    label_column,
    label_names,
    label_sources,
    missing_labels_mean_none,
)
from .report_text import clean_report, repair_characters

__all__ = [
    "LANGUAGES",
    "ParallelPair",
    "Study",
    "carved_ids",
    "fingerprint",
    "load_parallel",
    "load_studies",
    "read_studies",
    "source_name",
    "training_part",
]

LANGUAGES = ("en", "zh")
MODALITIES = ("cxr", "ct")
TRAINING_SPLIT = "train"
_IMAGE_ROWS, _TEXT_ROWS, _PARALLEL_ROWS = "metadata.jsonl", "data.jsonl", "parallel_en_zh.jsonl"

# Text-only sets that leave out what holds for every row.
_FOLDER_MODALITY = {"openi_iu_reports": "cxr"}
# Studies that the published split leaves out; the set's held-back part is not among them.
_UNSPLIT = {"openi_iu_reports": "train"}
# Sets whose `patient_id` names a whole file series: the number in the file name is the patient.
_FILE_SERIES = {"kermany_pneumonia_224": re.compile(r"IM-(\d+)")}
# Sets without patients whose files of one paper are numbered: "12_0.jpg" and "12_1.jpg" are figures of paper 12.
_PAPER_NUMBERED = frozenset({"cov_ctr"})
_IDENTIFIERS = ("study_id", "patient_id")
# medRxiv and bioRxiv numbers, as files taken from preprints are named.
_PREPRINT = re.compile(r"^\d{4}\.\d{2}\.\d{2}\.\d+")


@dataclass(frozen=True)
class Study:
    """Hold one examination.

    Attributes:
        study_id: Unique within its source.
        source: Name of the folder it was read from.
        modality: "cxr" or "ct".
        images: Image files; empty for text alone.
        patient_id: None where the set does not tell.
        reports: Language code to text; may be empty.
        findings: Canonical finding to 1.0 (present) or 0.0 (absent); a finding left out is unknown, None means that
            all are.
        split: "train", "validation" or what the set says; None where it says nothing.
        grouped_key: Studies of one patient or one source paper have the same key, and belong in the same split.
    """

    study_id: str = field(repr=False)
    source: str
    modality: str
    images: tuple[Path, ...] = field(repr=False)
    patient_id: str | None = field(repr=False)
    reports: dict[str, str]
    findings: dict[str, float] | None
    split: str | None
    grouped_key: str = field(default="", repr=False)


@dataclass(frozen=True)
class ParallelPair:
    """Hold one text in several languages.

    Attributes:
        study_id: The study it describes.
        texts: Language code to text.
        split: The split of that study.
    """

    study_id: str = field(repr=False)
    texts: dict[str, str]
    split: str | None = None


@dataclass(frozen=True)
class _Row:
    """One JSON line, and where it stands for error messages."""

    where: str
    names_image: bool
    values: dict[str, Any] = field(repr=False)

    def get(self, column: str) -> str | None:
        """Return the text of a column, stripped; None where missing or empty. Identifiers may be whole numbers."""
        value = self.values.get(column)
        if value is None:
            return None
        if column in _IDENTIFIERS and type(value) is int:
            return str(value)
        if not isinstance(value, str):
            raise ValueError(f"{self.where}: column {column!r} must be text, got {type(value).__name__}")
        return value.strip() or None

    def require(self, column: str) -> str:
        """Return the text of a column that must be there."""
        value = self.get(column)
        if value is None:
            raise ValueError(
                f"{self.where}: column {column!r} is missing; the row has {', '.join(sorted(self.values))}"
            )
        return value


def load_studies(folder: Path) -> list[Study]:
    """Read the studies of a data folder, in file order.

    A row is a study; X-ray rows with the same `study_id` are the views of one. Slices of a CT are a study each.

    Sets that come without a validation part get the one that m3fm fixes for them (`m3fm.data.splits`).

    Args:
        folder: Has `metadata.jsonl` or `data.jsonl`. Its name tells which label names to expect. In a folder of
            another name the labels used tell which known set it is a part of; where they are no set's, they are
            canonical, CheXpert's or English names, and a row denies those of them that it does not name.

    Raises:
        ValueError: For a missing file, a line that is not JSON, a missing column, an unknown label or a repeated
            study, with the file and the line.
    """
    studies = read_studies(folder)
    validation = carved_ids(source_name(folder))
    if validation.isdisjoint(study.study_id for study in studies):
        return studies
    return [
        replace(study, split="validation" if study.study_id in validation else study.split or "train")
        for study in studies
    ]


def read_studies(folder: Path) -> list[Study]:
    """Read the studies of a data folder with the splits that its rows state; see `load_studies`."""
    folder = Path(folder)
    path = next((folder / name for name in (_IMAGE_ROWS, _TEXT_ROWS) if (folder / name).is_file()), None)
    if path is None:
        raise ValueError(f"{folder} has neither {_IMAGE_ROWS} nor {_TEXT_ROWS}; expected a data folder")
    rows = list(_read_rows(path))
    source = _known_set(rows, source_name(folder))
    ids = _study_ids(rows, source)
    denied = _denied_findings(rows, source)
    studies: dict[str, Study] = {}
    views: set[str] = set()
    for row, study_id, key in zip(rows, ids, _grouped_keys(rows, ids, source), strict=True):
        study = _study(row, folder, source, study_id, key, denied)
        if study_id not in studies:
            studies[study_id] = study
            if _is_view(row, source):
                views.add(study_id)
        elif study_id in views and _is_view(row, source) and study.images[0] not in studies[study_id].images:
            studies[study_id] = _add_view(studies[study_id], study, row.where)
        else:
            raise ValueError(f"{row.where}: the study of this row was already given by an earlier line")
    return list(studies.values())


def source_name(folder: Path) -> str:
    """Return the name that the studies of a folder have as their source; that of "." is the current folder's."""
    # Not resolved: a link may have been made to give a folder the name of a known set.
    return Path(os.path.abspath(folder)).name


def load_parallel(folder: Path) -> list[ParallelPair]:
    """Read the parallel texts of a data folder, each pair of texts of a study once, with the split of its study.

    Raises:
        ValueError: For a missing file, a line that is not JSON or a missing column, with the file and the line.
    """
    folder = Path(folder)
    path = folder / _PARALLEL_ROWS
    if not path.is_file():
        raise ValueError(f"{path} is missing; expected one JSON object per line with study_id, {', '.join(LANGUAGES)}")
    has_studies = (folder / _TEXT_ROWS).is_file() or (folder / _IMAGE_ROWS).is_file()
    splits = {study.study_id: study.split for study in load_studies(folder)} if has_studies else {}
    pairs = {}
    for row in _read_rows(path):
        study_id = row.require("study_id")
        texts = {language: " ".join(row.require(language).split()) for language in LANGUAGES}
        pairs[study_id, *texts.values()] = ParallelPair(study_id, texts, splits.get(study_id))
    return list(pairs.values())


def training_part(studies: Iterable[Study]) -> list[Study]:
    """Keep the studies that may be trained on: those of the part "train", and of sets that state no parts at all.

    Whatever else a set calls a part ("test", "validation", "unreported") is left out.
    """
    return [study for study in studies if study.split in (None, TRAINING_SPLIT)]


def fingerprint(studies: Iterable[Study]) -> str:
    """Return the SHA-256 of the studies' ids, texts and image files as hex; the order of studies does not matter."""
    digest = hashlib.sha256()
    for study in sorted(studies, key=lambda study: (study.source, study.study_id)):
        images = []
        for path in study.images:
            with open(path, "rb") as file:
                images.append(hashlib.file_digest(file, "sha256").hexdigest())
        entry = [study.source, study.study_id, sorted(study.reports.items()), images]
        digest.update(json.dumps(entry, ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()


@cache
def carved_ids(folder_name: str) -> frozenset[str]:
    """Return the study ids of the validation part that m3fm fixes for a set; empty where the set has its own."""
    path = Path(__file__).parent / "splits" / f"{folder_name}.json"
    if not path.is_file():
        return frozenset()
    return frozenset(json.loads(path.read_text(encoding="utf-8"))["validation"])


def _read_rows(path: Path) -> Iterator[_Row]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                values = json.loads(line)
            except ValueError as error:  # not JSON, or not UTF-8
                # The decoder's own message may quote the line, and with it an identifier.
                raise ValueError(f"{where}: expected a JSON object in UTF-8, got {type(error).__name__}") from None
            if not isinstance(values, dict):
                raise ValueError(f"{where}: expected a JSON object, got {type(values).__name__}")
            yield _Row(where, path.name == _IMAGE_ROWS, values)


def _study_ids(rows: list[_Row], source: str) -> list[str]:
    """Name the study of each row: by its `study_id`, or by its image file, which a slice of a CT always is."""
    files = [
        PurePosixPath(row.require("file_name")) if row.names_image and not _is_view(row, source) else None
        for row in rows
    ]
    distinct = {file for file in files if file is not None}
    stems = Counter(map(_stem, distinct))
    paths = Counter(map(_bare_path, distinct))

    def name(file: PurePosixPath) -> str:
        if stems[_stem(file)] == 1:
            return _stem(file)
        return _bare_path(file) if paths[_bare_path(file)] == 1 else str(file)

    return [name(file) if file is not None else row.require("study_id") for row, file in zip(rows, files, strict=True)]


def _is_view(row: _Row, source: str) -> bool:
    return row.names_image and _modality(row, source) == "cxr" and row.get("study_id") is not None


def _add_view(study: Study, view: Study, where: str) -> Study:
    """Add the image of a further row; what the rows tell of the study must agree, and may stand in one row alone."""
    told = {}
    for name in ("patient_id", "reports", "findings", "split"):
        known, given = getattr(study, name), getattr(view, name)
        if known and given and known != given:
            raise ValueError(f"{where}: {name} differs from an earlier row of the same study; expected one of them")
        told[name] = known or given
    return replace(study, images=study.images + view.images, **told)


def _study(row: _Row, folder: Path, source: str, study_id: str, grouped_key: str, denied: frozenset[str]) -> Study:
    images: tuple[Path, ...] = ()
    if row.names_image:
        image = folder / row.require("file_name")
        if not image.is_file():
            raise ValueError(f"{row.where}: the file that file_name gives does not exist in {folder}")
        images = (image,)
    # The id of a CT, whose slices are studies, takes the patient's place.
    examination = row.get("study_id") if images and not _is_view(row, source) else None
    return Study(
        study_id=study_id,
        source=source_name(folder),
        modality=_modality(row, source),
        images=images,
        patient_id=_patient(row, source) or examination,
        reports=_reports(row),
        findings=_findings(row, source, denied),
        split=row.get("split") or _UNSPLIT.get(source),
        grouped_key=grouped_key,
    )


def _modality(row: _Row, source: str) -> str:
    modality = row.get("modality") or _FOLDER_MODALITY.get(source) or row.require("modality")
    if modality not in MODALITIES:
        raise ValueError(f"{row.where}: modality must be one of {', '.join(MODALITIES)}, got {modality!r}")
    return modality


def _stem(image: PurePosixPath) -> str:
    name = image.name
    return name.removesuffix(".nii.gz") if name.endswith(".nii.gz") else image.stem


def _bare_path(image: PurePosixPath) -> str:
    return str(image.with_name(_stem(image)))


def _patient(row: _Row, source: str) -> str | None:
    series = _FILE_SERIES.get(source)
    number = series.search(row.require("file_name")) if series else None
    return number.group() if number else row.get("patient_id")


def _reports(row: _Row) -> dict[str, str]:
    reports = {}
    for language in LANGUAGES:
        sections = [row.get(f"{section}_{language}") for section in ("findings", "impression")]
        whole = [row.get(f"{column}_{language}") for column in ("report", "reading", "clinical_notes")]
        text = next(filter(None, whole), None)
        if text is not None:
            text = repair_characters(text)
        elif any(sections):
            text = clean_report(" ".join(filter(None, sections)))
        if text:
            reports[language] = text
    return reports


def _known_set(rows: list[_Row], folder_name: str) -> str:
    """Return the set whose conventions the rows follow: the folder's name, or else the set that has its labels.

    A part of a known set is often kept in a folder of another name. Of several sets that have all the labels used, it
    is the one with the fewest others. Sets where silence says nothing are passed over; "canonical" where none is left.
    """
    if folder_name in label_sources():
        return folder_name
    fitting = []
    for source in label_sources():
        used = [row.values.get(label_column(source)) for row in rows]
        names = {name for labels in used if isinstance(labels, list) for name in labels if isinstance(name, str)}
        denies = bool(canonical_findings((), source))
        if names and names <= label_names(source) and denies:
            fitting.append((len(label_names(source)), source))
    return min(fitting)[1] if fitting else "canonical"


def _denied_findings(rows: list[_Row], source: str) -> frozenset[str]:
    """Return the findings that a row of a set without conventions denies by not naming them: those its rows use."""
    if source != "canonical":
        return frozenset()
    return frozenset(finding for row in rows for finding in _findings(row, source, frozenset()) or {}) - {NO_FINDING}


def _findings(row: _Row, source: str, denied: frozenset[str]) -> dict[str, float] | None:
    labels = row.values.get(label_column(source))
    if labels is None:
        if not missing_labels_mean_none(source):
            return None
        labels = []
    # The patient's disease does not show on every slice: those that readers found clean say nothing of it.
    if row.values.get("infected_slice") == 0:
        return None
    if not isinstance(labels, list):
        raise ValueError(f"{row.where}: labels must be a list, got {type(labels).__name__}")
    try:
        return canonical_findings(labels, source, denied) or None
    except ValueError as error:
        raise ValueError(f"{row.where}: {error}") from None


def _grouped_keys(rows: list[_Row], ids: list[str], source: str) -> list[str]:
    """Name the group of each row: rows that share a patient or a paper, through whatever chain, are one group."""
    parents: dict[str, str] = {}

    def root(key: str) -> str:
        while parents.setdefault(key, key) != key:
            key = parents[key]
        return key

    keys = [_group_marks(row, study_id, source) for row, study_id in zip(rows, ids, strict=True)]
    for first, *others in keys:
        for other in others:
            # The smaller name wins, so that a group's name does not depend on the order of the rows.
            low, high = sorted((root(first), root(other)))
            parents[high] = low
    return [root(first) for first, *_ in keys]


def _group_marks(row: _Row, study_id: str, source: str) -> list[str]:
    preprint = _PREPRINT.match(PurePosixPath(row.get("file_name") or "").name)
    doi = row.get("doi") or (f"10.1101/{preprint.group()}" if preprint else None)
    given = {"patient": _patient(row, source), "doi": doi, "url": row.get("url"), "study": row.get("study_id")}
    marks = [f"{kind}:{value}" for kind, value in given.items() if value]
    return marks or [f"study:{study_id.split('_')[0] if source in _PAPER_NUMBERED else study_id}"]
