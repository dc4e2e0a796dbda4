# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Studies and parallel texts, read from data folders.

A folder holds `metadata.jsonl` (one row per image, Hugging Face's `imagefolder` convention with the key `file_name`)
or `data.jsonl` (text only, key `study_id`), and may hold `parallel_en_zh.jsonl`. Study and patient ids serve grouping
alone: no message, and no `repr`, shows them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from .labels import canonical_findings, label_column, label_sources, missing_labels_mean_none
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
]

LANGUAGES = ("en", "zh")
MODALITIES = ("cxr", "ct")
_IMAGE_ROWS, _TEXT_ROWS, _PARALLEL_ROWS = "metadata.jsonl", "data.jsonl", "parallel_en_zh.jsonl"

# Text-only sets that leave out what holds for every row.
_FOLDER_MODALITY = {"openi_iu_reports": "cxr"}
# Studies that the published split leaves out; the set's held-back part is not among them.
_UNSPLIT = {"openi_iu_reports": "train"}
# Sets whose `patient_id` names a whole file series: the number in the file name is the patient.
_FILE_SERIES = {"kermany_pneumonia_224": re.compile(r"IM-(\d+)")}
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
        """Return the text of a column, stripped; None where missing or empty."""
        value = self.values.get(column)
        if value is None:
            return None
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
    """Read the studies of a data folder, in file order, one per row.

    Sets that come without a validation part get the one that m3fm fixes for them (`m3fm.data.splits`).

    Args:
        folder: Has `metadata.jsonl` or `data.jsonl`. Its name tells which label names to expect; in a folder of
            another name labels are canonical or CheXpert names.

    Raises:
        ValueError: For a missing file, a line that is not JSON, a missing column, an unknown label or a repeated
            study, with the file and the line.
    """
    folder = Path(folder)
    studies = read_studies(folder)
    validation = carved_ids(folder.name)
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
    studies = [_study(row, folder, key) for row, key in zip(rows, _grouped_keys(rows, folder.name), strict=True)]
    seen: set[str] = set()
    for row, study in zip(rows, studies, strict=True):
        if study.study_id in seen:
            raise ValueError(f"{row.where}: the study of this row was already given by an earlier line")
        seen.add(study.study_id)
    return studies


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


def fingerprint(studies: Iterable[Study]) -> str:
    """Return the SHA-256 of the studies' ids and texts as hex; their order does not matter."""
    digest = hashlib.sha256()
    for study in sorted(studies, key=lambda study: (study.source, study.study_id)):
        entry = [study.source, study.study_id, sorted(study.reports.items())]
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


def _study(row: _Row, folder: Path, grouped_key: str) -> Study:
    images: tuple[Path, ...] = ()
    if row.names_image:
        image = folder / row.require("file_name")
        if not image.is_file():
            raise ValueError(f"{row.where}: the file that file_name gives does not exist in {folder}")
        images = (image,)
    modality = row.get("modality") or _FOLDER_MODALITY.get(folder.name) or row.require("modality")
    if modality not in MODALITIES:
        raise ValueError(f"{row.where}: modality must be one of {', '.join(MODALITIES)}, got {modality!r}")
    return Study(
        # Slices of one CT are a study each, so the file names the study and the CT takes the patient's place.
        study_id=_stem(images[0]) if images else row.require("study_id"),
        source=folder.name,
        modality=modality,
        images=images,
        patient_id=_patient(row, folder.name) or (row.get("study_id") if images else None),
        reports=_reports(row),
        findings=_findings(row, folder.name),
        split=row.get("split") or _UNSPLIT.get(folder.name),
        grouped_key=grouped_key,
    )


def _stem(image: Path) -> str:
    name = image.name
    return name.removesuffix(".nii.gz") if name.endswith(".nii.gz") else image.stem


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


def _findings(row: _Row, folder_name: str) -> dict[str, float] | None:
    source = folder_name if folder_name in label_sources() else "canonical"
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
        return canonical_findings(labels, source) or None
    except ValueError as error:
        raise ValueError(f"{row.where}: {error}") from None


def _grouped_keys(rows: list[_Row], source: str) -> list[str]:
    """Name the group of each row: rows that share a patient or a paper, through whatever chain, are one group."""
    parents: dict[str, str] = {}

    def root(key: str) -> str:
        while parents.setdefault(key, key) != key:
            key = parents[key]
        return key

    keys = [_group_marks(row, source) for row in rows]
    for first, *others in keys:
        for other in others:
            # The smaller name wins, so that a group's name does not depend on the order of the rows.
            low, high = sorted((root(first), root(other)))
            parents[high] = low
    return [root(first) for first, *_ in keys]


def _group_marks(row: _Row, source: str) -> list[str]:
    marks = []
    stem = _stem(Path(row.get("file_name") or ""))
    preprint = _PREPRINT.match(stem)
    doi = row.get("doi") or (f"10.1101/{preprint.group()}" if preprint else None)
    patient = _patient(row, source)
    for kind, value in (("patient", patient), ("doi", doi), ("url", row.get("url"))):
        if value:
            marks.append(f"{kind}:{value}")
    if not marks:
        marks.append(f"study:{row.get('study_id') or stem.split('_')[0]}")
    return marks
