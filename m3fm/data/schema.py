# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""The one schema: what every data set becomes, as a Python record and as a row of `datasets`.

A `StudyRecord` is one examination, with all that its set says of it. `features()` is the same as `datasets.Features`,
`StudyRecord.as_row` and `StudyRecord.from_row` go between them. Ids serve grouping alone: no `repr` shows
them, nor any report.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import datasets

__all__ = [
    "LANGUAGES",
    "MODALITIES",
    "Box",
    "ImageFile",
    "LabelState",
    "Mask",
    "ReportText",
    "StoredBytes",
    "StudyRecord",
    "features",
]

LANGUAGES = ("en", "zh")
MODALITIES = ("cxr", "ct")


class LabelState(StrEnum):
    """What a set says of one label of one study."""

    UNMENTIONED = "unmentioned"
    NEGATIVE = "negative"
    UNCERTAIN = "uncertain"
    POSITIVE = "positive"


class StoredBytes(Protocol):
    """Bytes that lie in a shard, read when they are needed."""

    def read(self, size: int = -1) -> bytes:
        """Return them from the start, at most `size` of them where that is not negative."""


@dataclass(frozen=True)
class ImageFile:
    """Name one image; it is read when it is needed.

    Attributes:
        path: The file; within a shard, the name that it had.
        data: Its bytes, or what reads them when asked to, where it lies in a shard and not in a file.
        view: "PA", "AP", "LATERAL", "AXIAL" or what else the set says; None where it says nothing.
    """

    path: Path | None = field(repr=False)
    data: bytes | StoredBytes | None = field(default=None, repr=False)
    view: str | None = None

    @property
    def source(self) -> Any:
        """What `M3FMProcessor` and `read_image` take: a path, bytes, or what has `read()`."""
        return self.path if self.data is None else self.data

    def read(self) -> bytes:
        """Return the bytes of the file.

        Raises:
            OSError: If it cannot be read.
        """
        if self.data is None:
            return self.path.read_bytes()
        return self.data if isinstance(self.data, bytes) else self.data.read()


@dataclass(frozen=True)
class ReportText:
    """Hold the report of a study in one language.

    Attributes:
        text: The report, cleaned (`m3fm.data.report_text`): findings and impression, or the whole where it states no
            sections.
        findings: The cleaned section; None where the set has no sections.
        impression: As `findings`.
        raw: The text as the set publishes it.
        is_translated: Whether a machine translated it.
    """

    text: str = field(repr=False)
    findings: str | None = field(default=None, repr=False)
    impression: str | None = field(default=None, repr=False)
    raw: str | None = field(default=None, repr=False)
    is_translated: bool = False


@dataclass(frozen=True)
class Box:
    """Mark a finding on an image.

    Attributes:
        label: By the set's own name.
        x: Left edge, in pixels of the image as its set publishes it.
        y: Top edge.
        width: In pixels.
        height: In pixels.
        image: Which of the study's images.
        reader: Who drew it, where the set tells; a code, never a name.
    """

    label: str
    x: float
    y: float
    width: float
    height: float
    image: int = 0
    reader: str | None = None


@dataclass(frozen=True)
class Mask:
    """Outline a finding on an image.

    Attributes:
        label: By the set's own name.
        rle: Run lengths as the set writes them; the loader of the set says how to decode them.
        image: Which of the study's images.
    """

    label: str
    rle: str
    image: int = 0


@dataclass(frozen=True)
class StudyRecord:
    """Hold all that a set says of one examination.

    Attributes:
        study_id: Unique within its source.
        source: The set, by its name in `m3fm.data.sets`, or the name of an own folder.
        modality: "cxr" or "ct".
        patient_id: None where the set does not tell.
        documents: What else groups studies, as "doi:10.1148/...", "url:...": studies that share one belong in one
            split.
        images: Views of a radiograph, or a CT as one volume file or its slices; empty for text alone.
        reports: Language code to report; may be empty.
        labels: The set's own label names to what it says of them.
        findings: The same in the shared label space (`m3fm.data.labels.FINDINGS`); what is not in it is unmentioned.
        boxes: Marks on the images.
        masks: Outlines on the images.
        age: Years.
        sex: "F" or "M"; None where the set does not tell.
        split: "train", "validation", "test" or what else the set calls a part; None where it says nothing.
        licence: Terms of this study's images and text.
    """

    study_id: str = field(repr=False)
    source: str
    modality: str
    patient_id: str | None = field(default=None, repr=False)
    documents: tuple[str, ...] = field(default=(), repr=False)
    images: tuple[ImageFile, ...] = field(default=(), repr=False)
    reports: Mapping[str, ReportText] = field(default_factory=dict, repr=False)
    labels: Mapping[str, LabelState] = field(default_factory=dict)
    findings: Mapping[str, LabelState] = field(default_factory=dict)
    boxes: tuple[Box, ...] = field(default=(), repr=False)
    masks: tuple[Mask, ...] = field(default=(), repr=False)
    age: float | None = field(default=None, repr=False)
    sex: str | None = field(default=None, repr=False)
    split: str | None = None
    licence: str | None = None

    def as_row(self) -> dict[str, Any]:
        """Return the row of `features()` that says the same."""
        texts: dict[str, str | None] = {}
        for language in LANGUAGES:
            report = self.reports.get(language)
            for column, attribute in _TEXT_COLUMNS.items():
                texts[f"{column}_{language}"] = getattr(report, attribute) if report else None
        return {
            "study_id": self.study_id,
            "patient_id": self.patient_id,
            "source": self.source,
            "documents": list(self.documents),
            "split": self.split,
            "modality": self.modality,
            "images": [
                {"bytes": None if each.data is None else each.read(), "path": _text(each.path)} for each in self.images
            ],
            "views": [each.view for each in self.images],
            **texts,
            "translated": [code for code, report in self.reports.items() if report.is_translated],
            "labels": _state_rows(self.labels),
            "findings": _state_rows(self.findings),
            "boxes": [dict(vars(box)) for box in self.boxes],
            "masks": [dict(vars(mask)) for mask in self.masks],
            "age": self.age,
            "sex": self.sex,
            "licence": self.licence,
        }

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> StudyRecord:
        """Return the record of a row of `features()`, with states as names or as numbers."""
        reports = {}
        for language in LANGUAGES:
            said = {name: row.get(f"{column}_{language}") for column, name in _TEXT_COLUMNS.items()}
            if any(value is not None for value in said.values()):
                said["text"] = said["text"] or ""
                reports[language] = ReportText(**said, is_translated=language in (row.get("translated") or ()))
        views = row.get("views") or [None] * len(row["images"])
        return cls(
            study_id=row["study_id"],
            source=row["source"],
            modality=row["modality"],
            patient_id=row["patient_id"],
            documents=tuple(row.get("documents") or ()),
            images=tuple(
                ImageFile(None if each["path"] is None else Path(each["path"]), each["bytes"], view)
                for each, view in zip(row["images"], views, strict=True)
            ),
            reports=reports,
            labels=_states(row.get("labels")),
            findings=_states(row.get("findings")),
            boxes=tuple(Box(**box) for box in row.get("boxes") or ()),
            masks=tuple(Mask(**mask) for mask in row.get("masks") or ()),
            age=row.get("age"),
            sex=row.get("sex"),
            split=row.get("split"),
            licence=row.get("licence"),
        )


# Column of a row, to which the language code is appended, and attribute of `ReportText`.
_TEXT_COLUMNS = {"report": "text", "findings": "findings", "impression": "impression", "raw_report": "raw"}


def features() -> datasets.Features:
    """Return the schema of every set's rows.

    Images are stored as they are (`decode=False`): bytes in a shard, or the path of a file. DICOM and NIfTI are files
    like any other here, which `M3FMProcessor` reads; where all are PNG or JPEG, `cast_column("images",
    datasets.List(datasets.Image()))` gives PIL images.

    Raises:
        ImportError: If `datasets` is not installed.
    """
    try:
        from datasets import ClassLabel, Features, Image, List, Value
    except ImportError:
        raise ImportError('rows of datasets need the package datasets: pip install "m3fm[data]"') from None
    text = Value("string")
    states = List({"name": text, "state": ClassLabel(names=[state.value for state in LabelState])})
    numbers = {name: Value("float32") for name in ("x", "y", "width", "height")}
    return Features(
        {
            "study_id": text,
            "patient_id": text,
            "source": text,
            "documents": List(text),
            "split": text,
            "modality": text,
            "images": List(Image(decode=False)),
            "views": List(text),
            **{f"{column}_{language}": text for language in LANGUAGES for column in _TEXT_COLUMNS},
            "translated": List(text),
            "labels": states,
            "findings": states,
            "boxes": List({"label": text, **numbers, "image": Value("int32"), "reader": text}),
            "masks": List({"label": text, "rle": Value("large_string"), "image": Value("int32")}),
            "age": Value("float32"),
            "sex": text,
            "licence": text,
        }
    )


def _state_rows(states: Mapping[str, LabelState]) -> list[dict[str, str]]:
    return [{"name": name, "state": LabelState(state).value} for name, state in states.items()]


def _states(rows: list[dict[str, Any]] | None) -> dict[str, LabelState]:
    order = list(LabelState)
    return {
        row["name"]: order[row["state"]] if isinstance(row["state"], int) else LabelState(row["state"])
        for row in rows or ()
    }


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)
