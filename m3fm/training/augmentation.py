# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Augmentation that leaves a chest image true: what another patient position, detector or export would have changed.

It works on what the image processor made, before the normalisation, so that training and serving read, window and
letterbox images by the same code. What only the source can give, CT windows and the choice of slices, is moved by
arguments of that same code. Nothing is flipped unless asked for: a mirrored chest has its heart at the other side,
and every "left" of its report is wrong. There is no colour to jitter, and no one is examined upside down.

Letters: N images of a study, H and W rows and columns of the model's input.
"""

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from numbers import Real
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from ..data.schema import MODALITIES
from .fed_studies import Draw

__all__ = ["STRENGTHS", "Augmentation", "Change", "Strengths", "apply_change", "names_side"]

_LOWEST_JPEG_QUALITY = 30


@dataclass(frozen=True)
class Strengths:
    """Say how far each property may be changed, for one modality; 0 leaves it as it is.

    Attributes:
        rotation: Degrees either way.
        scale: Share of the size, larger or smaller.
        shift: Share of the side, along each axis.
        brightness: Share by which the values grow or fall; black stays black.
        contrast: Share by which the distance from the middle grey grows or falls.
        gamma: Largest logarithm of the exponent, either way.
        noise: Largest standard deviation of added noise, of a range of 0..1.
        blur: Largest standard deviation of a Gaussian, in pixels of the model's input.
        jpeg: Share of images that are compressed as JPEG once more, of quality 30 to 95.
        window: Share of the width by which a CT window moves, and grows or shrinks; where values are in HU.
        slices: Share of the distance between chosen slices by which the choice moves; where a volume is read.
        mirror: Share of images that are mirrored left to right. A study whose texts name a side is never mirrored.
    """

    rotation: float = 0.0
    scale: float = 0.0
    shift: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    gamma: float = 0.0
    noise: float = 0.0
    blur: float = 0.0
    jpeg: float = 0.0
    window: float = 0.0
    slices: float = 0.0
    mirror: float = 0.0

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ValueError: If a strength is no number, negative, or so large that nothing of the image would be left.
        """
        most = {"rotation": 45.0, "noise": 0.5, "blur": 8.0}
        for each in fields(self):
            value = getattr(self, each.name)
            limit = most.get(each.name, 1.0 if each.name in ("jpeg", "slices", "mirror", "gamma") else 0.9)
            if not isinstance(value, Real) or not 0 <= value <= limit:
                raise ValueError(f"Strengths.{each.name}: got {value!r}, expected 0 to {limit:g}")


# Patients are laid in a scanner with less freedom than they stand before a detector, and HU are calibrated.
STRENGTHS: Mapping[str, Strengths] = {
    "cxr": Strengths(
        rotation=6.0,
        scale=0.08,
        shift=0.04,
        brightness=0.1,
        contrast=0.1,
        gamma=0.25,
        noise=0.02,
        blur=0.7,
        jpeg=0.15,
    ),
    "ct": Strengths(
        rotation=4.0,
        scale=0.06,
        shift=0.03,
        brightness=0.06,
        contrast=0.06,
        noise=0.02,
        blur=0.5,
        jpeg=0.05,
        window=0.08,
        slices=0.5,
    ),
}


@dataclass(frozen=True)
class Change:
    """Hold what was drawn for one image.

    Attributes:
        rotation: Degrees, counter-clockwise.
        scale: Factor of the size.
        shift: Shares of the width and of the height.
        brightness: Factor of the values.
        contrast: Factor of the distance from the middle grey.
        gamma: Exponent of the values.
        noise: Standard deviation.
        noise_seed: What the noise is made from.
        blur: Standard deviation in pixels.
        jpeg: Quality; None for no compression.
        mirrored: Whether left and right are exchanged.
    """

    rotation: float = 0.0
    scale: float = 1.0
    shift: tuple[float, float] = (0.0, 0.0)
    brightness: float = 1.0
    contrast: float = 1.0
    gamma: float = 1.0
    noise: float = 0.0
    noise_seed: int = field(default=0, repr=False)
    blur: float = 0.0
    jpeg: int | None = None
    mirrored: bool = False


@cache
def _side_patterns() -> tuple[re.Pattern[str], ...]:
    text = (Path(__file__).parents[1] / "data" / "sides.yaml").read_text(encoding="utf-8")
    return tuple(re.compile("|".join(each), re.IGNORECASE) for each in yaml.safe_load(text).values())


def names_side(texts: Iterable[str]) -> bool:
    """Tell whether a text, in whatever language, names the left or the right of the body."""
    return any(pattern.search(text) for text in texts for pattern in _side_patterns())


class Augmentation:
    """Draws changes of the images of a study.

    The slices of a CT are changed alike; the views of a radiograph, which were exposed one by one, each by itself.

    Args:
        strengths: Modality to how far its images may be changed; what is left out is not changed at all.

    Raises:
        ValueError: For an unknown modality.
    """

    def __init__(self, strengths: Mapping[str, Strengths] = STRENGTHS):
        unknown = sorted(set(strengths) - set(MODALITIES))
        if unknown:
            raise ValueError(f"strengths: got {unknown}, expected modalities of {list(MODALITIES)}")
        self.strengths = {name: strengths.get(name, Strengths()) for name in MODALITIES}

    def changes(self, draw: Draw, modality: str, key: str, count: int, texts: Iterable[str] = ()) -> list[Change]:
        """Draw the changes of the `count` images of a study.

        Args:
            draw: Seed and epoch.
            modality: "cxr" or "ct".
            key: Names the study among all sets.
            count: Images that the study has in the batch.
            texts: What is said of the images; if it names a side, they are not mirrored.
        """
        strengths = self.strengths[modality]
        rng = draw.generator("images", key)
        mirrored = bool(rng.random() < strengths.mirror) and not names_side(texts)
        if modality == "ct":
            change = _draw_change(strengths, rng, mirrored)
            # Grain is not the same in any two slices.
            return [replace(change, noise_seed=change.noise_seed + place) for place in range(count)]
        return [_draw_change(strengths, rng, mirrored) for _ in range(count)]

    def windows(self, draw: Draw, windows: Sequence[Sequence[float]], key: str) -> list[list[float]]:
        """Move CT windows, [[centre, width], ...] in HU, all of them together."""
        strength = self.strengths["ct"].window
        if not strength:
            return [list(window) for window in windows]
        move, grow = draw.generator("windows", key).uniform(-strength, strength, 2)
        return [[center + move * width, width * float(np.exp(grow))] for center, width in windows]

    def slice_offset(self, draw: Draw, spacing: float, key: str) -> int:
        """Draw by how many slices the choice moves; `spacing` is the distance between chosen slices, in slices."""
        reach = self.strengths["ct"].slices * spacing / 2
        return round(draw.generator("slices", key).uniform(-reach, reach))


def _draw_change(strengths: Strengths, rng: np.random.Generator, mirrored: bool) -> Change:
    # As many numbers for each property whatever its strength: changing one leaves the others as they were.
    turn, grow, right, down, bright, contrast, gamma = rng.uniform(-1, 1, 7)
    noise, blur, jpeg, quality = rng.random(4)
    return Change(
        rotation=float(turn * strengths.rotation),
        scale=float(1 + grow * strengths.scale),
        shift=(float(right * strengths.shift), float(down * strengths.shift)),
        brightness=float(1 + bright * strengths.brightness),
        contrast=float(1 + contrast * strengths.contrast),
        gamma=float(np.exp(gamma * strengths.gamma)),
        noise=float(noise * strengths.noise),
        noise_seed=int(rng.integers(2**63)),
        blur=float(blur * strengths.blur),
        jpeg=int(_LOWEST_JPEG_QUALITY + quality * (96 - _LOWEST_JPEG_QUALITY)) if jpeg < strengths.jpeg else None,
        mirrored=mirrored,
    )


def apply_change(plane: np.ndarray, change: Change) -> np.ndarray:
    """Change one letterboxed image or slice.

    Args:
        plane: (H, W) float32 in 0..1, black around the image.
        change: What to do.

    Returns:
        (H, W) float32 in 0..1; what was black around the image is black.
    """
    inside = _inside(plane)
    values = plane[inside]
    if not values.size:
        return plane.copy()
    # About the middle grey and not the mean: slices of one volume have other means and must be changed alike.
    values = (values - 0.5) * np.float32(change.contrast) + np.float32(0.5) if change.contrast != 1 else values
    values = np.clip(values * np.float32(change.brightness), 0, 1)
    if change.gamma != 1:
        values = values ** np.float32(change.gamma)
    if change.blur > 0:
        values = _blurred(values, change.blur)
    if change.noise > 0:
        grain = np.random.default_rng(change.noise_seed).standard_normal(values.shape, dtype=np.float32)
        values = np.clip(values + np.float32(change.noise) * grain, 0, 1)
    if change.jpeg is not None:
        values = _compressed(values, change.jpeg)
    changed = np.zeros_like(plane)
    changed[inside] = values
    return _moved(changed, change)


def _inside(plane: np.ndarray) -> tuple[slice, slice]:
    """Return the rows and columns of the image in its letterbox: noise and brightness do not belong around it."""
    places = []
    for axis in (1, 0):
        filled = np.flatnonzero(plane.any(axis=axis))
        places.append(slice(int(filled[0]), int(filled[-1]) + 1) if len(filled) else slice(0, 0))
    return places[0], places[1]


def _moved(plane: np.ndarray, change: Change) -> np.ndarray:
    """Turn, scale, shift and mirror about the middle, in one bicubic resampling."""
    height, width = plane.shape
    if (change.rotation, change.scale, change.shift) == (0.0, 1.0, (0.0, 0.0)):
        return np.ascontiguousarray(plane[:, ::-1]) if change.mirrored else plane
    angle = np.deg2rad(change.rotation)
    cos, sin = np.cos(angle) / change.scale, np.sin(angle) / change.scale
    side = -1.0 if change.mirrored else 1.0
    x, y = width / 2 * (1 + 2 * change.shift[0]), height / 2 * (1 + 2 * change.shift[1])
    # From a place in the result to where it came from: out of the middle, back-rotated, mirrored, into the middle.
    matrix = (
        side * cos,
        -side * sin,
        width / 2 - side * (cos * x - sin * y),
        sin,
        cos,
        height / 2 - (sin * x + cos * y),
    )
    image = Image.fromarray(plane)
    moved = image.transform((width, height), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=0)
    return np.clip(np.asarray(moved), 0, 1)


def _blurred(values: np.ndarray, sigma: float) -> np.ndarray:
    reach = max(1, int(np.ceil(3 * sigma)))
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    weights = (weights / weights.sum()).astype(np.float32)
    for axis in (0, 1):
        padding = [(reach, reach) if each == axis else (0, 0) for each in (0, 1)]
        padded = np.pad(values, padding, mode="edge")
        size = values.shape[axis]
        parts = (padded.take(range(start, start + size), axis=axis) for start in range(len(weights)))
        values = sum(weight * part for weight, part in zip(weights, parts, strict=True))
    return values


def _compressed(values: np.ndarray, quality: int) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray((values * 255 + 0.5).astype(np.uint8)).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file), dtype=np.float32) / np.float32(255)
