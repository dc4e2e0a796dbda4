# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Heat maps over chest images: their geometry, and where in the patient their highest values lie.

Letters in shapes: N images or slices of a study, H and W the rows and columns of an image as it was read.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .chest_image_m3fm import ChestImage
from .image_processing_m3fm import letterbox_place

# The region of interest is where a map reaches this share of its peak.
REGION_LEVEL = 0.5
# As a share of the width to either side of the middle: the spine and the mediastinum have no side.
_MIDLINE = 0.06
# Regions are outlined on a lattice of at most this many points a side: finer than any patch grid.
_LATTICE = 128
_THIRDS = {
    "cxr": ("upper", "middle", "lower"),
    "ct": ("anterior", "central", "posterior"),
    None: ("top", "middle", "bottom"),
}
_THIRD_OF = {"cxr": " zone", "ct": "", None: " of the image"}

CONVENTION = "display convention: the patient's right side is on the left of the image"


@dataclass(frozen=True)
class Region:
    """Say where in an image a point lies, the patient in the usual display.

    Attributes:
        side: "left", "right" or "midline" of the PATIENT; None for a lateral view.
        third: Radiograph: "upper", "middle" or "lower" zone. CT: "anterior", "central" or "posterior". Where nothing
            says which of the two it is: "top", "middle" or "bottom" of the image.
        text: Both in words.
    """

    side: str | None
    third: str
    text: str


@dataclass(frozen=True, eq=False)
class ImageMap:
    """Hold the map of one image or slice, in the geometry of the image as it was read.

    Attributes:
        values: (H, W) float32. Positive speaks for the phrase, negative against it.
        pixels: (H, W) float32 in 0..1, what the map lies over; CT in its first window.
        image: Number of the image in the study.
        slice: Number of the slice in the volume as stored; 0 for a single image.
        num_slices: Slices of that volume.
        modality: "cxr", "ct", or None where unknown.
        view: "PA", "AP", "LATERAL", or None where unknown.
        attention: Share of the study pooling's attention that this image gets; sums to 1 over the study.
        drop: What the score loses when the study is pooled without this image; None if it is the only one.
        relevance: The share of this image in the sizes of those drops; sums to 1, None where there are no drops.
    """

    values: np.ndarray = field(repr=False)
    pixels: np.ndarray = field(repr=False)
    image: int
    slice: int
    num_slices: int
    modality: str | None
    view: str | None
    attention: float
    drop: float | None
    relevance: float | None

    @property
    def peak(self) -> tuple[int, int]:
        """Returns row and column of the highest value; of equal ones the first."""
        row, column = np.unravel_index(int(self.values.argmax()), self.values.shape)
        return int(row), int(column)

    @property
    def peak_value(self) -> float:
        """Returns the highest value."""
        return float(self.values.max())

    @property
    def region(self) -> Region:
        """Returns where the peak lies."""
        row, column = self.peak
        height, width = self.values.shape
        third = _THIRDS[self.modality][min(2, int(3 * (row + 0.5) / height))]
        side = None if self.view == "LATERAL" else _side((column + 0.5) / width)
        place = third + _THIRD_OF[self.modality]
        return Region(side, third, place if side is None else f"{side}, {place}")

    @property
    def side_is_known(self) -> bool:
        """Tells whether the file itself says that it is a frontal radiograph or a CT, so that sides can be marked."""
        return self.modality == "ct" or self.view in ("PA", "AP")

    @property
    def box(self) -> tuple[int, int, int, int] | None:
        """Returns x, y, width, height in pixels around the connected part at `REGION_LEVEL` of the peak.

        None if no value is positive.
        """
        if self.peak_value <= 0:
            return None
        height, width = self.values.shape
        row_step, column_step = max(1, height // _LATTICE), max(1, width // _LATTICE)
        row, column = self.peak
        # A lattice that the peak is a point of.
        rows = np.arange(row % row_step, height, row_step)
        columns = np.arange(column % column_step, width, column_step)
        high = self.values[np.ix_(rows, columns)] >= REGION_LEVEL * self.peak_value
        part = _connected(high, row // row_step, column // column_step)
        tall, wide = np.flatnonzero(part.any(axis=1)), np.flatnonzero(part.any(axis=0))
        top, bottom = rows[tall[0]], min(height, rows[tall[-1]] + row_step)
        left, right = columns[wide[0]], min(width, columns[wide[-1]] + column_step)
        return int(left), int(top), int(right - left), int(bottom - top)

    def summary(self) -> dict[str, Any]:
        """Returns what is in it, as JSON content, without its pixels."""
        row, column = self.peak
        region = self.region
        return {
            "image": self.image,
            "slice": self.slice,
            "num_slices": self.num_slices,
            "height": self.values.shape[0],
            "width": self.values.shape[1],
            "peak": {"row": row, "column": column, "value": self.peak_value},
            "region": {"side": region.side, "third": region.third, "text": region.text},
            "box": None if self.box is None else dict(zip("xywh", self.box, strict=True)),
            "attention": self.attention,
            "drop": self.drop,
            "relevance": self.relevance,
        }


@dataclass(frozen=True, eq=False)
class HeatMap:
    """Hold the maps of one phrase over one study.

    Attributes:
        phrase: As it was given.
        finding: The label whose presence was weighed against its absence; None if the phrase stands for itself.
        language: Of the phrase or of the label's prompts.
        method: "similarity" or "gradient".
        score: What the maps explain: the cosine of study and phrase, or of a finding the cosine with its presence
            minus that with its absence.
        images: One map for each image or slice that the model saw, in its order.
    """

    phrase: str
    finding: str | None
    language: str
    method: str
    score: float
    images: tuple[ImageMap, ...]

    @property
    def maps(self) -> tuple[np.ndarray, ...]:
        """Returns the values (H, W) of each image."""
        return tuple(each.values for each in self.images)

    @property
    def top(self) -> ImageMap:
        """Returns the map with the highest value."""
        return max(self.images, key=lambda each: each.peak_value)

    @property
    def slice_weights(self) -> Mapping[str, np.ndarray | None]:
        """Returns how the study was pooled: "attention" and "relevance" (N,) of each image, each summing to 1."""
        attention = np.array([each.attention for each in self.images])
        relevance = [each.relevance for each in self.images]
        return {"attention": attention, "relevance": None if None in relevance else np.array(relevance)}

    def summary(self) -> dict[str, Any]:
        """Returns what the maps say, as JSON content, without their pixels."""
        top = self.top.summary()
        return {
            "phrase": self.phrase,
            "finding": self.finding,
            "language": self.language,
            "method": self.method,
            "score": self.score,
            "modality": self.top.modality,
            "view": self.top.view,
            "top": {key: top[key] for key in ("image", "slice", "peak", "region", "box")},
            "sides": CONVENTION,
            "images": [each.summary() for each in self.images],
        }


def to_image(grid: np.ndarray, cell: tuple[int, int], size: tuple[int, int], shape: tuple[int, int]) -> np.ndarray:
    """Lays a map over the model's patches out over the image that was letterboxed into the model's input.

    Each pixel takes the bilinear mean of the patches around it. Patches that are more padding than image do not count.

    Args:
        grid: (rows, columns) of patches.
        cell: Height and width of a patch in the model's input.
        size: Height and width of the model's input.
        shape: H, W of the image.

    Returns:
        (H, W) float32.
    """
    top, left, height, width = letterbox_place(*shape, *size)
    rows = _interpolation(shape[0], top, height, cell[0], grid.shape[0])  # (H, rows)
    columns = _interpolation(shape[1], left, width, cell[1], grid.shape[1])  # (W, columns)
    return (rows @ np.asarray(grid, dtype=np.float32) @ columns.T).astype(np.float32)


def _interpolation(length: int, start: int, extent: int, cell: int, cells: int) -> np.ndarray:
    """Returns the weights (length, cells) of patches for each of the pixels, one axis."""
    edges = np.arange(cells) * cell
    covered = np.clip(np.minimum(edges + cell, start + extent) - np.maximum(edges, start), 0, None)
    counted = np.flatnonzero(covered >= min(cell / 2, covered.max()))
    centres = (start + (np.arange(length) + 0.5) * extent / length) / cell - 0.5
    centres = np.clip(centres, counted[0], counted[-1])
    low = np.minimum(np.floor(centres).astype(int), cells - 1)
    high = np.minimum(low + 1, cells - 1)
    share = (centres - low).astype(np.float32)
    weights = np.zeros((length, cells), dtype=np.float32)
    np.add.at(weights, (np.arange(length), low), 1 - share)
    np.add.at(weights, (np.arange(length), high), share)
    return weights


def display_pixels(image: ChestImage, number: int, window: tuple[float, float]) -> np.ndarray:
    """Returns one slice (H, W) of an image as it is displayed, 0..1; CT through a window (center, width) in HU."""
    pixels = image.pixels[number]
    if image.units == "intensity":
        return pixels
    center, width = window
    return np.clip((pixels - np.float32(center - width / 2)) / np.float32(width), 0, 1)


def _side(across: float) -> str:
    """Names the patient's side of a place across the image, 0 left to 1 right."""
    if abs(across - 0.5) <= _MIDLINE:
        return "midline"
    return "right" if across < 0.5 else "left"


def _connected(mask: np.ndarray, row: int, column: int) -> np.ndarray:
    """Returns the part of a mask that hangs together with a point of it, over edges."""
    part = np.zeros_like(mask)
    part[row, column] = True
    while True:
        grown = part.copy()
        grown[1:] |= part[:-1]
        grown[:-1] |= part[1:]
        grown[:, 1:] |= part[:, :-1]
        grown[:, :-1] |= part[:, 1:]
        grown &= mask
        if (grown == part).all():
            return part
        part = grown


__all__ = ["CONVENTION", "REGION_LEVEL", "HeatMap", "ImageMap", "Region", "display_pixels", "to_image"]
