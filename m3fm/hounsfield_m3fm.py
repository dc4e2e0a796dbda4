# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Tell what the values of a volume without a stated unit are: Hounsfield units, shifted ones, or display values.

Letters: S slices, H rows, W columns. Air is -1000 HU and water 0 HU; scanners that store unsigned values store
HU + 1024.
"""

from collections.abc import Callable

import numpy as np

from .chest_image_m3fm import ChestImage, LazyPixels, Remark, bad_source, finished, stretch_range

STORED_OFFSET_HU = -1024.0
# Fat and everything denser lies above: values below it are HU, and no display values.
BELOW_TISSUE_HU = -200.0
# 12 bits, the offset, and metal: what is larger, and has no air, is no CT in any shift.
LARGEST_STORED = 5119.0

_SAMPLED_SLICES = 7
_SAMPLED_VALUES = 1 << 20


def infer_offset(sample: np.ndarray) -> float | None:
    """Tell what must be added to stored CT values to make them HU, where their histogram is plain.

    A CT has two heaps: air and lung, and 1000 HU above them soft tissue. The heaps at their places in HU, or all of
    it 1024 higher, are plain; anything else is not.

    Args:
        sample: Stored values of some slices, any shape.

    Returns:
        0.0 for HU as they are, -1024.0 for shifted ones, None where the histogram says neither.
    """
    values = np.asarray(sample).reshape(-1)
    values = values[:: max(1, values.size // _SAMPLED_VALUES)].astype(np.float32)
    values = values[np.isfinite(values) & (values > -1500)]  # below: padding outside the field of view
    if values.size == 0:
        return None
    for offset in (0.0, STORED_OFFSET_HU):
        hu = values + np.float32(offset)
        air = hu < -500
        dense = hu[~air]
        if air.mean() < 0.02 or dense.size < 0.02 * hu.size or np.quantile(hu, 0.001) < -1150:
            continue
        # Fat, water, muscle and blood are the heap; bone and contrast medium are the rest.
        if ((dense > -180) & (dense < 180)).mean() > 0.5:
            return offset
    return None


def volume_of(
    name: str,
    pixels: np.ndarray | LazyPixels,
    *,
    percentiles: tuple[float, float] | None = None,
    spacing: tuple[float, float, float] | None = None,
    remarks: tuple[Remark, ...] = (),
) -> ChestImage:
    """Build a volume from values whose unit is not stated.

    Values below -200 are HU. Values within 0..1, whole numbers within 0..255 and, once stretched, unsigned values
    above any CT's are display values. What remains is CT whose offset is inferred or in doubt. Of `LazyPixels` a few
    slices are looked at, of an array all; an array is not copied.

    Args:
        name: What errors call the source.
        pixels: (S, H, W), any type of number.
        percentiles: For values above any CT's, see `stretch`; None takes minimum and maximum.
        spacing: Millimetres between slices, rows and columns.
        remarks: What reading noticed before.

    Returns:
        The volume, with `LazyPixels`.

    Raises:
        ValueError: If no value is finite.
    """
    sample, low, high = _sampled(name, pixels)
    if low >= 0:
        shown = _display_range(sample, high, percentiles, bytes_=pixels.dtype == np.uint8)
        if shown is not None:
            bottom, width = np.float32(shown[0]), np.float32(max(shown[1] - shown[0], 1e-12))
            lazy = _mapped(pixels, low, lambda values: np.clip((values - bottom) / width, 0, 1))
            message = f"values from {low:g} to {high:g}, no Hounsfield units: taken as a display from black to white"
            remark = Remark("display_values", message, "info" if high <= 255 else "warning")
            return finished(name, lazy, spacing=spacing, remarks=(*remarks, remark))
    offset = infer_offset(sample)
    if offset:
        message = f"air and soft tissue lie {-offset:g} too high for Hounsfield units: {offset:g} was added"
        remarks = (*remarks, Remark("uncalibrated", message, "info", offset))
    elif low >= BELOW_TISSUE_HU:
        message = f"values from {low:g} to {high:g}, without air: taken as Hounsfield units, which is in doubt"
        remarks = (*remarks, Remark("uncalibrated", message, "warning", low, BELOW_TISSUE_HU))
    shift = np.float32(offset or 0)
    lazy = _mapped(pixels, low, lambda values: values + shift)
    return finished(name, lazy, modality="ct", units="hu", spacing=spacing, remarks=remarks)


def _display_range(
    sample: np.ndarray, high: float, percentiles: tuple[float, float] | None, bytes_: bool
) -> tuple[float, float] | None:
    """Return what is black and white if values from 0 to `high` are display values, else None."""
    if bytes_ or (1 < high <= 255 and (sample == np.floor(sample)).all()):
        return 0.0, 255.0
    if high <= 1:
        return 0.0, 1.0
    return stretch_range(sample, percentiles) if high > LARGEST_STORED else None


def _sampled(name: str, pixels: np.ndarray | LazyPixels) -> tuple[np.ndarray, float, float]:
    """Return the finite values of a few slices, flat, with the lowest and highest value looked at."""
    total = pixels.shape[0]
    chosen = sorted({(2 * i + 1) * total // (2 * _SAMPLED_SLICES) for i in range(_SAMPLED_SLICES)})
    kept = [_finite(pixels[number]) for number in chosen]
    rest = (number for number in range(total) if number not in chosen)
    limits = [(values.min(), values.max()) for values in kept if values.size]
    if isinstance(pixels, np.ndarray) or not limits:  # outer slices of a volume may be all NaN
        for number in rest:
            values = _finite(pixels[number])
            limits += [(values.min(), values.max())] if values.size else []
            if values.size and not isinstance(pixels, np.ndarray):
                kept.append(values)
                break
    if not limits:
        raise bad_source(name, "every pixel is NaN or infinite")
    return np.concatenate(kept), float(min(low for low, _ in limits)), float(max(high for _, high in limits))


def _float32(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):  # too large for float32: infinite, like what is so already
        return values.astype(np.float32)


def _finite(values: np.ndarray) -> np.ndarray:
    values = _float32(values)
    return values[np.isfinite(values)]


def _mapped(pixels: np.ndarray | LazyPixels, floor: float, change: Callable[[np.ndarray], np.ndarray]) -> LazyPixels:
    """Change every slice when it is decoded; what is not finite becomes `floor`, which displays as background."""

    def read(number: int) -> np.ndarray:
        values = _float32(pixels[number])
        finite = np.isfinite(values)
        return change(values if finite.all() else np.where(finite, values, np.float32(floor)))

    return LazyPixels(pixels.shape, read)


__all__ = ["BELOW_TISSUE_HU", "STORED_OFFSET_HU", "infer_offset", "volume_of"]
