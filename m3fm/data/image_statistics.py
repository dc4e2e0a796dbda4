# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Sizes, kinds and depths of the images of a data set, from the headers of their files."""

from __future__ import annotations

import io
import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from tqdm.auto import tqdm

from ..dicom_m3fm import read_header
from ..dicom_tags_m3fm import is_dicom
from ..imaging_m3fm import read_image
from .schema import ImageFile, StudyRecord

__all__ = ["ImageFacts", "ImageSample", "image_facts", "image_statistics"]

_HEAD = 132
_BITS = {"1": "1 bit", "L": "8 bits", "P": "8 bits, palette", "RGB": "8 bits, colour", "RGBA": "8 bits, colour"}
_QUANTILES = {"smallest": 0.0, "5 %": 0.05, "median": 0.5, "95 %": 0.95, "largest": 1.0}


@dataclass(frozen=True)
class ImageFacts:
    """What the header of an image file says.

    Attributes:
        kind: "PNG", "JPEG", "DICOM", "NIfTI" ...
        depth: As people say it, "8 bits", "16 bits or more".
        width: Pixels of a row.
        height: Rows.
        slices: 1 for a radiograph or one slice.
    """

    kind: str
    depth: str
    width: int
    height: int
    slices: int = 1


def image_facts(image: ImageFile) -> ImageFacts:
    """Read the header of an image.

    Raises:
        ValueError: If it is no image that can be read.
        OSError: As `ValueError`.
    """
    with open(image.path, "rb") if image.data is None else io.BytesIO(image.read()) as file:
        head = file.read(_HEAD)
        file.seek(0)
        if is_dicom(head):
            header = read_header(image.path if image.data is None else file.read(), image.path.name)
            return ImageFacts("DICOM", "16 bits or more", header.columns, header.rows, max(1, header.frames))
        try:
            with Image.open(file) as picture:
                depth = _BITS.get(picture.mode, "16 bits or more")
                return ImageFacts(picture.format, depth, *picture.size, getattr(picture, "n_frames", 1))
        except UnidentifiedImageError:
            pass
    slices, height, width = read_image(image.source).pixels.shape
    return ImageFacts("NIfTI", "16 bits or more", width, height, slices)


class ImageSample:
    """Keeps a random sample of the images that it is shown (reservoir sampling, Vitter 1985, algorithm R).

    Args:
        limit: Most images that are kept.
        seed: Of the draw.

    Attributes:
        images: The sample.
        seen: How many images it was shown.
    """

    def __init__(self, limit: int, seed: int):
        self.images: list[ImageFile] = []
        self.seen = 0
        self._limit = limit
        self._generator = random.Random(seed)

    def add(self, record: StudyRecord) -> None:
        """Show the images of a study."""
        for image in record.images:
            self.seen += 1
            if len(self.images) < self._limit:
                self.images.append(image)
            elif (place := self._generator.randrange(self.seen)) < self._limit:
                self.images[place] = image


def image_statistics(images: Iterable[ImageFile]) -> dict[str, Any]:
    """Count kinds, depths and sizes, with a progress bar.

    Args:
        images: A sample, or all.

    Returns:
        Counts by kind and depth, quantiles of width, height and slices, the sizes (width, height) themselves for a
        plot, and how many could not be read.
    """
    facts, unreadable = [], 0
    for image in tqdm(images, desc="image headers", unit="image"):
        try:
            facts.append(image_facts(image))
        except (ValueError, OSError, ImportError, Image.DecompressionBombError):
            unreadable += 1
    return {
        "images": len(facts),
        "unreadable": unreadable,
        "kinds": dict(Counter(each.kind for each in facts).most_common()),
        "depths": dict(Counter(each.depth for each in facts).most_common()),
        **{
            name: _quantiles([getattr(each, name) for each in facts])
            for name in ("width", "height", "slices")
            if facts
        },
        "sizes": [[each.width, each.height] for each in facts],
    }


def _quantiles(values: list[int]) -> dict[str, int]:
    ordered = np.sort(values)
    return {name: int(ordered[round(share * (len(ordered) - 1))]) for name, share in _QUANTILES.items()}
