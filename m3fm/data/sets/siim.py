# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""SIIM-ACR Pneumothorax Segmentation: outlines of pneumothorax as run lengths, on images of NIH ChestX-ray14.

Read is the table of masks of either stage, `stage_2_train.csv` or `train-rle.csv`, with the images in the folders of
studies and series in which they came, or in one folder, as DICOM or PNG.

A study is an image. One with a mask has a pneumothorax, one with "-1" has none, and nothing is said of what else it
shows. All of the table is for training: the test part was published without labels.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np

from ..labels import shared_findings
from ..run_lengths import decode_run_lengths, run_bounds
from ..schema import ImageFile, LabelState, Mask, StudyRecord
from ..tables import BadRow, Reading, Row, read_csv
from .layouts import find_base, plain_name, table_in
from .study_set import StudySet

__all__ = ["HEIGHT", "RUN_LENGTHS", "SETS", "WIDTH", "decode_mask"]

SOURCE = "siim"
#: Pixels of every image.
HEIGHT, WIDTH = 1024, 1024
#: How the masks of a record are written, in both stages of the challenge: see `m3fm.data.run_lengths`.
RUN_LENGTHS = "relative"
PRESENT, ABSENT = "Pneumothorax", "No Pneumothorax"
_LICENCE = "rules of the SIIM-ACR Pneumothorax Segmentation challenge: academic research and education"
_TABLES = ("stage_2_train.csv", "siim-pneumothorax-train-rle.csv", "train-rle.csv")
_COLUMNS = ("ImageId", "EncodedPixels")
_IMAGE_FOLDERS = ("dicom-images-train", "dicom-images-test", "images", "train", "png_images")
_SUFFIXES = (".dcm", ".png", ".jpg")
_NONE = "-1"


@dataclass
class _Image:
    """What the rows of one image say together."""

    row: Row
    masks: list[Mask] = field(default_factory=list)


def decode_mask(mask: Mask) -> np.ndarray:
    """Return an outline as pixels.

    Args:
        mask: Of a record of this set.

    Returns:
        (1024, 1024) bool.

    Raises:
        ValueError: For run lengths that are none, or go beyond the image.
    """
    return decode_run_lengths(mask.rle, HEIGHT, WIDTH, RUN_LENGTHS)


def _read(root: Path, reading: Reading) -> Iterator[StudyRecord]:
    """Yield a study for each image of the table, in its order; the rows of an image are one mask each."""
    base = find_base(root, _TABLES) or root
    table = table_in(base, _TABLES) or base / _TABLES[0]
    images: dict[str, _Image] = {}

    def gather(row: Row) -> None:
        name = plain_name(row, "ImageId")
        mask = _mask(row)
        known = images.get(name)
        if known is None:
            images[name] = known = _Image(Row(row.file, row.line, {}))
        elif mask is None or not known.masks or mask in known.masks:
            raise row.bad("duplicate_id", "an earlier line says the same, or something else, of this image")
        if mask is not None:
            known.masks.append(mask)

    for _ in reading.each(read_csv(table, _COLUMNS, reading), gather):
        pass
    files = _image_files(base)
    for name, image in images.items():
        try:
            path = reading.image(image.row, files.get(name, base / _IMAGE_FOLDERS[0] / f"{name}{_SUFFIXES[0]}"))
        except BadRow as error:
            reading.tell(error)
            continue
        labels, findings = _states(bool(image.masks))
        yield StudyRecord(
            study_id=name,
            source=SOURCE,
            modality="cxr",
            images=(ImageFile(path),),
            labels=labels,
            findings=findings,
            masks=tuple(image.masks),
            split="train",
            licence=_LICENCE,
        )


def _mask(row: Row) -> Mask | None:
    rle = row.require("EncodedPixels")
    if rle == _NONE:
        return None
    try:
        bounds = run_bounds(rle, RUN_LENGTHS)
    except ValueError as error:
        raise row.bad("bad_value", f"column 'EncodedPixels': {error}") from None
    if bounds[-1, 1] > HEIGHT * WIDTH:
        raise row.bad("bad_value", f"column 'EncodedPixels' goes beyond an image of {HEIGHT} x {WIDTH} pixels")
    return Mask(PRESENT, rle)


@cache
def _states(is_present: bool) -> tuple[dict[str, LabelState], dict[str, LabelState]]:
    said, other = (PRESENT, ABSENT) if is_present else (ABSENT, PRESENT)
    labels = {said: LabelState.POSITIVE, other: LabelState.NEGATIVE}
    return labels, shared_findings(labels, SOURCE)


def _image_files(base: Path) -> dict[str, Path]:
    """Return the image files by name: they lie in folders of studies and series that no table tells."""
    files: dict[str, Path] = {}
    for folder in _IMAGE_FOLDERS:
        for place, below, names in os.walk(base / folder):
            below.sort()
            for name in sorted(names):
                stem, suffix = os.path.splitext(name)
                if suffix.lower() in _SUFFIXES:
                    files.setdefault(stem, Path(place) / name)
    return files


def _recognises(root: Path) -> bool:
    return find_base(root, _TABLES) is not None


SET = StudySet(
    name=SOURCE,
    title="SIIM-ACR Pneumothorax Segmentation 2019",
    licence=_LICENCE,
    url="https://www.kaggle.com/c/siim-acr-pneumothorax-segmentation",
    reference="Society for Imaging Informatics in Medicine and American College of Radiology, 2019",
    layout=(
        "stage_2_train.csv, or train-rle.csv of the first stage",
        "dicom-images-train/<study>/<series>/<image>.dcm, dicom-images-test/ likewise, or images/<image>.dcm or .png",
    ),
    recognises=_recognises,
    read=_read,
    published={"images": 12047},
)
SETS: tuple[StudySet, ...] = (SET,)
