# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""What training and evaluation take: studies of any data set, and parallel texts.

Study and patient ids serve grouping alone: no message, and no `repr`, shows them, nor any report.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from .groups import group_keys, record_marks
from .schema import LANGUAGES, LabelState, StudyRecord
from .sets import find_set
from .sets.folder import read_folder, source_name
from .sets.folder_tables import TABLES, has_table
from .tables import Reading, is_file, read_jsonl

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
    "study_of",
    "training_part",
]

TRAINING_SPLIT = "train"
_OWN_FOLDER, _SHARDS = "folder", "parquet"
_PARALLEL_ROWS = "parallel_en_zh.jsonl"
_VALUES = {LabelState.POSITIVE: 1.0, LabelState.NEGATIVE: 0.0}


@dataclass(frozen=True)
class Study:
    """Hold one examination.

    Attributes:
        study_id: Unique within its source.
        source: Name of the set, or of the own folder it was read from.
        modality: "cxr" or "ct".
        images: Image files, or their bytes or what reads them where they lie in a shard; empty for text alone.
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
    images: tuple[Any, ...] = field(repr=False)
    patient_id: str | None = field(repr=False)
    reports: dict[str, str] = field(repr=False)
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
    texts: dict[str, str] = field(repr=False)
    split: str | None = None


def load_studies(folder: Path) -> list[Study]:
    """Read the studies of any data set that `open_set` knows, in its order.

    In an own folder (`m3fm.data.sets.folder`) a row is a study; X-ray rows with the same `study_id` are the views of
    one. Slices of a CT are a study each. Its reports are taken as they were written, with lost characters repaired;
    of sections, sentences that one examination alone cannot support are dropped. Those of every other set are the
    cleaned `StudyRecord.reports`.

    Sets that come without a validation part get the one that m3fm fixes for them (`m3fm.data.splits`), also as shards,
    where these keep the names of the set and of its studies.

    Args:
        folder: A set in its published layout, shards, or an own folder, whose name tells which label names to expect.
            In an own folder of another name, labels that only one of the known sets uses tell that it is a part of
            it; else they are canonical, CheXpert's or English names, and a row denies those that other rows name and
            it does not.

    Raises:
        ValueError: For a missing file, a line that is not JSON, a missing column, an unknown label or a repeated
            study, with the file and the line.
    """
    studies = read_studies(folder)
    carved = {study.source for study in studies if study.study_id in carved_ids(study.source)}
    return [_with_part(study) if study.source in carved else study for study in studies]


def _with_part(study: Study) -> Study:
    is_held_back = study.study_id in carved_ids(study.source)
    return replace(study, split="validation" if is_held_back else study.split or TRAINING_SPLIT)


def read_studies(folder: Path) -> list[Study]:
    """Read the studies of a data set with the splits that its rows state; see `load_studies`."""
    folder = Path(folder)
    try:
        found = find_set(folder)
    except ValueError as error:
        raise ValueError(f"{folder} has neither {' nor '.join(TABLES)}; {error}") from None
    if found.name != _OWN_FOLDER:
        # The images of shards are read when they are needed, those of a whole set not being held in memory.
        records = list(found.read(folder, Reading(images="unchecked" if found.name == _SHARDS else "required")))
        keys = group_keys(map(record_marks, records))
        return [study_of(record, key) for record, key in zip(records, keys, strict=True)]
    own = list(read_folder(folder, Reading()))
    keys = group_keys(record_marks(each.record) for each in own)
    return [
        # The id of a CT, whose slices are studies, takes the patient's place.
        replace(
            study_of(each.record, key),
            patient_id=each.record.patient_id or each.examination,
            reports=each.light_reports,
        )
        for each, key in zip(own, keys, strict=True)
    ]


def study_of(record: StudyRecord, grouped_key: str = "") -> Study:
    """Return what training and evaluation take of a record: paths or bytes, cleaned reports, and what is certain.

    Args:
        record: Of any set.
        grouped_key: Of its group, as `group_keys` names it.

    Returns:
        The study; findings that are uncertain or unmentioned are left out, None where nothing is certain.
    """
    findings = {name: _VALUES[state] for name, state in record.findings.items() if state in _VALUES}
    return Study(
        study_id=record.study_id,
        source=record.source,
        modality=record.modality,
        images=tuple(image.source for image in record.images),
        patient_id=record.patient_id,
        reports={language: report.text for language, report in record.reports.items() if report.text},
        findings=findings or None,
        split=record.split,
        grouped_key=grouped_key,
    )


def load_parallel(folder: Path) -> list[ParallelPair]:
    """Read the parallel texts of a data folder, each pair of texts of a study once, with the split of its study.

    Raises:
        ValueError: For a missing file, a line that is not JSON or a missing column, with the file and the line.
    """
    folder = Path(folder)
    path = folder / _PARALLEL_ROWS
    if not path.is_file():
        raise ValueError(f"{path} is missing; expected one JSON object per line with study_id, {', '.join(LANGUAGES)}")
    splits = {study.study_id: study.split for study in load_studies(folder)} if has_table(folder) else {}
    pairs = {}
    for row in read_jsonl(path, Reading()):
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
        images = [_image_digest(image) for image in study.images]
        entry = [study.source, study.study_id, sorted(study.reports.items()), images]
        digest.update(json.dumps(entry, ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()


def _image_digest(image: Any) -> str:
    if isinstance(image, Path):
        with open(image, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    return hashlib.sha256(image if isinstance(image, bytes) else image.read()).hexdigest()


@cache
def carved_ids(source: str) -> frozenset[str]:
    """Return the study ids of the validation part that m3fm fixes for a set; empty where the set has its own.

    Args:
        source: `Study.source`, the name of a set or of its folder.
    """
    path = Path(__file__).parent / "splits" / f"{source}.json"
    # Shards may name any source, and with it a way to another folder.
    if Path(source).name != source or not is_file(path):
        return frozenset()
    return frozenset(json.loads(path.read_text(encoding="utf-8")).get("validation", ()))
