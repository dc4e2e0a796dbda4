# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Pixel statistics of chest images, and what they tell of a study without any model.

Letters: S slices of a volume, N of them that are looked at, H rows and W columns, h and w those of a reduced slice.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from .chest_image_m3fm import ChestImage, Remark

# Slices of a volume that are looked at, evenly spread.
MOST_PLANES = 16
# Slices are reduced by a whole number, to no less than what the model reads.
PLANE_SIDE = 224
THUMBNAIL_SIDE = 16
# The lung window, in HU: display values of a volume.
DISPLAY_HU = (-1350.0, 150.0)
AIR_HU = -500.0
TISSUE_HU = (-200.0, 300.0)


@dataclass(frozen=True)
class PixelLimits:
    """Say where remarks of pixel statistics begin; images are in 0..1 for display.

    Attributes:
        even_share: Share of pixels of one grey level from which an image is blank.
        blank_range: Range of grey, between the 0.5th and 99.5th percentile, below which an image is blank.
        low_range: The same, below which it has low contrast.
        low_levels: Grey levels in use, of 256, below which it has low contrast.
        fewest_levels: The same, below which it is a drawing or a mask.
        noise: Share of the variance that is no structure, 1 for white noise, from which an image is noisy.
        only_noise: The same, from which there is nothing else.
        tiny_side: Shorter side in pixels below which nothing can be seen.
        small_side: The same, below which details are missing.
        few_slices: Slices below which a CT is no whole chest.
        short_mm: Extent of a volume below which it is no whole chest.
        air_share: Share of voxels below -500 HU, lung and the air around, that a chest CT has at least.
        tissue_share: Share of voxels from -200 to 300 HU, fat, muscle and blood, that it has at least.
    """

    even_share: float = 0.97
    blank_range: float = 0.02
    low_range: float = 0.25
    low_levels: int = 24
    fewest_levels: int = 8
    noise: float = 0.25
    only_noise: float = 0.6
    tiny_side: int = 32
    small_side: int = 96
    few_slices: int = 8
    short_mm: float = 120.0
    air_share: float = 0.02
    tissue_share: float = 0.02


@dataclass(frozen=True)
class PlaneStatistics:
    """Hold the statistics of one reduced slice (h, w).

    Attributes:
        even_share: Share of pixels within one of 256 grey levels of the most frequent one.
        grey_range: Range between the 0.5th and the 99.5th percentile, 0..1.
        levels: Grey levels, of 256, that 0.05 % of the pixels or more have.
        noise: Variance of each pixel's difference from the mean of its four neighbours, by the variance of the
            image: 1 for white noise, about 0.01 for a radiograph.
    """

    even_share: float
    grey_range: float
    levels: int
    noise: float


def display_planes(image: ChestImage) -> list[np.ndarray]:
    """Decode some slices of an image as they are displayed.

    Args:
        image: Of any source; of a volume `MOST_PLANES` slices are read.

    Returns:
        N arrays (h, w) float32 in 0..1, reduced by whole numbers.
    """
    total = len(image.pixels)
    numbers = np.unique(np.linspace(0, total - 1, min(total, MOST_PLANES)).round().astype(int))
    low, high = DISPLAY_HU if image.units == "hu" else (0.0, 1.0)
    planes = []
    for number in numbers:
        plane = _reduced(np.asarray(image.pixels[int(number)], dtype=np.float32))
        planes.append(np.clip((plane - low) / (high - low), 0, 1))
    return planes


def _reduced(plane: np.ndarray) -> np.ndarray:
    """Average blocks of (H, W), so that the shorter side stays above `PLANE_SIDE`."""
    factor = min(plane.shape) // PLANE_SIDE
    if factor < 2:
        return plane
    rows, columns = (n // factor for n in plane.shape)
    blocks = plane[: rows * factor, : columns * factor].reshape(rows, factor, columns, factor)
    return blocks.mean((1, 3))


def thumbnail(plane: np.ndarray) -> np.ndarray:
    """Shrink (h, w) to 16 x 16, whatever its aspect, with mean 0 and deviation 1: (256,) float32."""
    image = Image.fromarray(np.ascontiguousarray(plane, dtype=np.float32))
    small = np.asarray(image.resize((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.BOX)).ravel()
    return (small - small.mean()) / max(float(small.std()), 1e-6)


def plane_statistics(plane: np.ndarray) -> PlaneStatistics:
    """Measure one slice (h, w) in 0..1."""
    counts = np.bincount(np.uint8(plane * 255 + 0.5).ravel(), minlength=256)
    mode = int(counts.argmax())
    low, high = np.percentile(plane, (0.5, 99.5))
    noise = 0.0
    if min(plane.shape) > 2:
        inner = plane[1:-1, 1:-1]
        around = (plane[:-2, 1:-1] + plane[2:, 1:-1] + plane[1:-1, :-2] + plane[1:-1, 2:]) / 4
        # The difference from a mean of four has 5/4 of the variance of white noise.
        noise = float((inner - around).var() / 1.25 / max(float(inner.var()), 1e-12))
    return PlaneStatistics(
        float(counts[max(0, mode - 1) : mode + 2].sum() / plane.size),
        float(high - low),
        int((counts >= 0.0005 * plane.size).sum()),
        noise,
    )


def look_at_planes(image: ChestImage, planes: list[np.ndarray], limits: PixelLimits) -> list[Remark]:
    """Check the quality of an image; of a volume, the median of its slices.

    Args:
        image: Where the slices come from.
        planes: Of `display_planes`.
        limits: Where remarks begin.

    Returns:
        Remarks with the codes "blank", "low_contrast", "noise" and "too_small".
    """
    statistics = [plane_statistics(plane) for plane in planes]
    even, grey_range, levels, noise = (
        round(float(np.median([getattr(each, name) for each in statistics])), 4)
        for name in ("even_share", "grey_range", "levels", "noise")
    )
    remarks = _look_at_size(image, limits)
    if even >= limits.even_share:
        message = f"{even:.1%} of the pixels have the same grey: there is nothing to see"
        return [*remarks, Remark("blank", message, "refuse", even, limits.even_share)]
    if grey_range < limits.blank_range:
        message = f"the grey levels differ by {grey_range:.1%} of the display range: there is nothing to see"
        return [*remarks, Remark("blank", message, "refuse", grey_range, limits.blank_range)]
    if noise >= limits.only_noise:
        message = f"{min(noise, 1):.0%} of what varies is noise: there is no structure to read"
        remarks.append(Remark("noise", message, "refuse", noise, limits.only_noise))
    elif noise >= limits.noise:
        message = f"{noise:.0%} of what varies is noise or fine lines; a chest image has a few percent"
        remarks.append(Remark("noise", message, "warning", noise, limits.noise))
    if levels < limits.low_levels:
        severity, limit = (
            ("refuse", limits.fewest_levels) if levels < limits.fewest_levels else ("warning", limits.low_levels)
        )
        message = f"{levels:.0f} grey levels are in use, expected at least {limit}"
        remarks.append(Remark("low_contrast", message, severity, levels, limit))
    elif grey_range < limits.low_range:
        message = f"the image uses {grey_range:.0%} of the display range, expected at least {limits.low_range:.0%}"
        remarks.append(Remark("low_contrast", message, "warning", grey_range, limits.low_range))
    return remarks


def _look_at_size(image: ChestImage, limits: PixelLimits) -> list[Remark]:
    rows, columns = image.pixels.shape[1:]
    side = min(rows, columns)
    message = f"{columns} x {rows} pixels"
    if side < limits.tiny_side:
        message += f", expected a shorter side of at least {limits.tiny_side}"
        return [Remark("too_small", message, "refuse", side, limits.tiny_side)]
    if side < limits.small_side:
        message += f": small findings cannot be seen below {limits.small_side}"
        return [Remark("too_small", message, "warning", side, limits.small_side)]
    return []


def look_at_volume(image: ChestImage, limits: PixelLimits) -> list[Remark]:
    """Check the extent of a CT and its values in Hounsfield units.

    Returns:
        Remarks with the codes "too_few_slices" and "out_of_range"; none for what is not a CT by its source.
    """
    if image.modality != "ct" and image.units != "hu":
        return []
    remarks = []
    slices = image.source_slices or len(image.pixels)
    extent = slices * image.spacing[0] if image.spacing else None
    if slices < limits.few_slices:
        message = f"{slices} slice{'s' if slices > 1 else ''} of a CT: nothing is known of the rest of the lung"
        severity = "warning" if image.units == "hu" else "info"
        remarks.append(Remark("too_few_slices", message, severity, slices, limits.few_slices))
    elif extent is not None and extent < limits.short_mm:
        message = f"the slices cover {extent:.0f} mm; a whole chest is above {limits.short_mm:.0f} mm"
        remarks.append(Remark("too_few_slices", message, "warning", extent, limits.short_mm))
    return [*remarks, *_look_at_range(image, limits)] if image.units == "hu" else remarks


def _look_at_range(image: ChestImage, limits: PixelLimits) -> list[Remark]:
    total = len(image.pixels)
    numbers = np.unique(np.linspace(0, total - 1, min(total, MOST_PLANES)).round().astype(int))
    # Every fourth voxel of every fourth row is enough for a share.
    sample = np.concatenate([np.asarray(image.pixels[int(number)])[::4, ::4].ravel() for number in numbers])
    air = round(float((sample < AIR_HU).mean()), 4)
    tissue = round(float(((sample >= TISSUE_HU[0]) & (sample <= TISSUE_HU[1])).mean()), 4)
    shown = f"values from {sample.min():.0f} to {sample.max():.0f}"
    if air < limits.air_share:
        message = f"{shown}: {air:.1%} are air or lung (below {AIR_HU:.0f} HU), in a chest CT well above 10 %"
        return [Remark("out_of_range", message, "refuse", air, limits.air_share)]
    if tissue < limits.tissue_share:
        message = f"{shown}: {tissue:.1%} are soft tissue (-200 to 300 HU), in a chest CT well above 10 %"
        return [Remark("out_of_range", message, "refuse", tissue, limits.tissue_share)]
    return []
