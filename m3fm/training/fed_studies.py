# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""What collators know of a study, whatever form it came in: `Study`, `StudyRecord`, or a row of `datasets`."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..data import Study
from ..data.schema import ImageFile, LabelState, StudyRecord
from ..data.studies import LANGUAGES
from ..slices_m3fm import choose_slices
from ..study_files_m3fm import kind_of, path_kind
from .supervision import UNCERTAIN, UNCERTAIN_POLICIES

__all__ = ["Draw", "FedStudy", "chosen_images", "fed_study", "finding_targets", "opened"]

_NEEDED = ("study_id", "source", "modality", "images")
_STATES = {LabelState.POSITIVE: 1.0, LabelState.NEGATIVE: 0.0, LabelState.UNCERTAIN: UNCERTAIN}
# Which views are kept where a study has more than are wanted: reports are written from frontal views first.
_VIEW_ORDER = ("PA", "AP", "LATERAL")


@dataclass(frozen=True)
class Draw:
    """Draws for one epoch of a run: all that is drawn for a study hangs on seed, epoch and study, and on nothing else.

    A resumed run, another number of workers and another batch draw the same.
    """

    seed: int = 0
    epoch: int = 0

    def generator(self, purpose: str, key: str) -> np.random.Generator:
        """Returns the generator for one purpose of the study of this key."""
        digest = hashlib.sha256(f"{purpose}\n{self.seed}\n{self.epoch}\n{key}".encode()).digest()
        return np.random.default_rng(int.from_bytes(digest[:8], "little"))


@dataclass(frozen=True)
class FedStudy:
    """Hold what a batch may need of one study.

    Attributes:
        key: Names it among all sets; what is drawn for it is seeded by this.
        modality: "cxr" or "ct".
        images: Sources as `M3FMImageProcessor` takes them.
        views: One for each image; None where unknown.
        reports: Language code to text.
        findings: Shared finding to 1.0, 0.0 or `UNCERTAIN`; what is unknown is left out.
    """

    key: str = field(repr=False)
    modality: str
    images: tuple[Any, ...] = field(repr=False)
    views: tuple[str | None, ...]
    reports: Mapping[str, str] = field(repr=False)
    findings: Mapping[str, float]


def fed_study(item: Study | StudyRecord | Mapping[str, Any]) -> FedStudy:
    """Bring a study of any form into the one that collators work with.

    Args:
        item: A `Study`, a `StudyRecord`, or a row of `m3fm.data.schema.features()`, its images decoded or not.

    Raises:
        ValueError: If it is none of these, or a row lacks the columns that name the study and its images.
    """
    if isinstance(item, Study):
        images = tuple(_source(image) for image in item.images)
        views = tuple(getattr(image, "view", None) for image in item.images)
        return FedStudy(_key(item), item.modality, images, views, item.reports, item.findings or {})
    if isinstance(item, StudyRecord):
        return _of_record(item, item.images, [image.view for image in item.images])
    if not isinstance(item, Mapping):
        raise ValueError(f"Expected Study, StudyRecord or rows of m3fm.data, got {type(item).__name__}.")
    missing = [name for name in _NEEDED if name not in item]
    if missing:
        raise ValueError(
            f"Expected rows of m3fm.data, got one without {', '.join(missing)}: Trainer takes columns away unless "
            "remove_unused_columns=False."
        )
    images = item["images"] or ()
    record = StudyRecord.from_row({"patient_id": None, **item, "images": [], "views": []})
    return _of_record(record, images, item.get("views") or [None] * len(images))


def finding_targets(
    studies: Sequence[FedStudy], findings: Sequence[str], uncertain: str = "ignore"
) -> tuple[np.ndarray, np.ndarray]:
    """Return what studies say of findings, as a loss needs it.

    Args:
        studies: B of them.
        findings: L names of `m3fm.data.FINDINGS`.
        uncertain: What an uncertain finding is: a key of `UNCERTAIN_POLICIES`.

    Returns:
        Values (B, L) float32, 0 where unknown, and whether each is known (B, L) bool.
    """
    unknown = float("nan")
    said = [[study.findings.get(name, unknown) for name in findings] for study in studies]
    values = np.array(said, dtype=np.float32).reshape(len(studies), len(findings))
    values = np.where(values == UNCERTAIN, np.float32(UNCERTAIN_POLICIES[uncertain]), values)
    known = ~np.isnan(values)
    return np.where(known, values, np.float32(0)), known


def chosen_images(study: FedStudy, most_views: int, most_slices: int) -> tuple[Any, ...]:
    """Choose the images of a study that a batch has room for; the same ones each time, in the study's own order.

    Of views the frontal ones come first, PA before AP, then lateral ones, then the others. Slices that are single
    pictures are spread evenly over the middle of the examination. DICOM slices are one volume, which the image
    processor reduces itself once it knows where each belongs.
    """
    images = study.images
    if study.modality == "ct":
        if len(images) <= most_slices or _kind(images[0]) != "raster":
            return images
        return tuple(images[place] for place in choose_slices(len(images), most_slices))
    if len(images) <= most_views:
        return images
    ranks = [_VIEW_ORDER.index(view) if view in _VIEW_ORDER else len(_VIEW_ORDER) for view in study.views]
    places = sorted(range(len(images)), key=lambda place: (ranks[place], place))[:most_views]
    return tuple(images[place] for place in sorted(places))


def _of_record(record: StudyRecord, images: Sequence[Any], views: Sequence[str | None]) -> FedStudy:
    return FedStudy(
        _key(record),
        record.modality,
        tuple(_source(image) for image in images),
        tuple(views),
        {
            code: record.reports[code].text
            for code in LANGUAGES
            if code in record.reports and record.reports[code].text
        },
        {name: _STATES[state] for name, state in record.findings.items() if state in _STATES},
    )


def _key(study: Study | StudyRecord) -> str:
    return f"{study.source}/{study.study_id}"


def _source(image: Any) -> Any:
    """Return what the image processor takes; bytes keep the name that they had, which errors then give."""
    if isinstance(image, ImageFile):
        return image.path if image.data is None else {"bytes": image.data, "path": _text(image.path)}
    if isinstance(image, Mapping) and image.get("bytes") is None and image.get("path") is not None:
        return Path(image["path"])
    return image


def _text(path: Any) -> str | None:
    return None if path is None else str(path)


def opened(source: Any) -> Any:
    """Return a source with its bytes, where they lie in a shard until they are needed."""
    if isinstance(source, Mapping) and hasattr(source["bytes"], "read"):
        return {**source, "bytes": source["bytes"].read()}
    return source.read() if hasattr(source, "read") else source


def _kind(source: Any) -> str | None:
    source = opened(source)
    if isinstance(source, Mapping):
        source = source["bytes"]
    if isinstance(source, bytes):
        return kind_of(source)
    return path_kind(source) if hasattr(source, "__fspath__") or isinstance(source, str) else "raster"
