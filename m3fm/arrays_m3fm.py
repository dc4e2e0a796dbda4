# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Read chest images that are arrays already: numpy, torch, and what offers itself as an array.

Letters: S slices, H rows, W columns, C channels (3 colours, or 4 with opacity).
"""

from typing import Any

import numpy as np

from .chest_image_m3fm import (
    ChestImage,
    Remark,
    bad_source,
    check_voxels,
    finished,
    gray_from_uint8,
    stretch,
    without_nan,
)
from .hounsfield_m3fm import BELOW_TISSUE_HU, volume_of

LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R 601, the weights PIL uses

# Below these, channels differ by rounding and JPEG's coarse chroma; a share of pixels as small is a marker or noise.
_COLOUR_STEP = 16 / 255
_COLOUR_SHARE = 0.001
_ROWS = 256

_AXES = Remark("assumed", "an array, taken as axial slices from inferior to superior, seen as radiologists see them")
_WANTED = "(H, W), (H, W, 3), (3, H, W) or (S, H, W)"


def read_array(source: Any, percentiles: tuple[float, float] | None, name: str | None = None) -> ChestImage:
    """Read an array: see `read_image` for what its shape and values mean.

    Args:
        source: A numpy array (masked ones too: what is masked becomes background), a torch tensor on any device, or
            anything with `__array__` or `__array_interface__`.
        percentiles: See `stretch`.
        name: What errors call it; by default its shape and type.

    Returns:
        The image.

    Raises:
        ValueError: If the shape or the values are no image, or could be several kinds of image.
    """
    array = _as_numpy(source)
    name = name or f"<array {array.shape} {array.dtype}>"
    if array.dtype.kind not in "uifb":
        raise bad_source(name, f"got {array.dtype} values, expected integers, floats or booleans")
    if array.ndim == 4:
        raise bad_source(
            name, f"got 4 dimensions, expected {_WANTED}: give the images of a batch one by one, in a list"
        )
    if array.ndim not in (2, 3):
        raise bad_source(name, f"got {array.ndim} dimensions, expected {_WANTED}")
    if array.size == 0:
        raise bad_source(name, f"image of size {array.shape}, expected at least one pixel")
    check_voxels(name, *array.shape)
    if array.dtype == bool:
        array = array.astype(np.float32)
    if array.ndim == 3 and 1 in (array.shape[0], array.shape[-1]):
        array = array[0] if array.shape[0] == 1 else array[..., 0]
    if array.ndim == 2:
        return read_plane(name, array, percentiles)
    return _read_three(name, array, percentiles)


def read_plane(
    name: str,
    values: np.ndarray,
    percentiles: tuple[float, float] | None,
    *,
    spacing: tuple[float, float, float] | None = None,
    remarks: tuple[Remark, ...] = (),
) -> ChestImage:
    """Read one grey plane by its values.

    8 bits are divided by 255, floats within 0..1 kept, values with some below -200 are one CT slice in HU, and all
    others are stretched.

    Args:
        name: What errors call it.
        values: (H, W), integers or floats.
        percentiles: See `stretch`.
        spacing: Millimetres between slices, rows and columns.
        remarks: What reading noticed before.

    Returns:
        The image.

    Raises:
        ValueError: If no value is finite.
    """
    facts = {"spacing": spacing, "remarks": remarks}
    if values.dtype == np.uint8:
        return finished(name, values[None].astype(np.float32) / np.float32(255), **facts)
    with np.errstate(over="ignore"):  # too large for float32: infinite
        plane = without_nan(values.astype(np.float32), name)[None]
    if plane.min() < BELOW_TISSUE_HU:
        return finished(name, plane, modality="ct", units="hu", **facts)
    if values.dtype.kind == "f" and plane.min() >= 0 and plane.max() <= 1:
        return finished(name, plane, **facts)
    return finished(name, stretch(plane, percentiles), **facts)


def gray_of_colour(colour: np.ndarray) -> tuple[np.ndarray, float]:
    """Turn colour into luma, over black where it is not opaque.

    Args:
        colour: (H, W, C), uint8, or floats or other integers in any range; opacity in the range of its type.

    Returns:
        (H, W), uint8 or float32; and the share of pixels that have a hue, 0..1.
    """
    top = np.float32(np.iinfo(colour.dtype).max if colour.dtype.kind in "ui" else 1)
    step = _COLOUR_STEP * (top if colour.dtype == np.uint8 else max(float(colour[..., :3].max()), 1e-12))
    gray = np.empty(colour.shape[:2], np.uint8 if colour.dtype == np.uint8 else np.float32)
    coloured = 0
    for start in range(0, len(colour), _ROWS):  # a few rows at a time: floats take four times the memory of bytes
        rows = colour[start : start + _ROWS]
        spread = rows[..., :3].max(axis=-1).astype(np.float32) - rows[..., :3].min(axis=-1)
        if rows.shape[-1] == 4:
            spread = spread * (rows[..., 3] / top)
        coloured += int((spread > step).sum())
        if colour.dtype == np.uint8:
            gray[start : start + _ROWS] = gray_from_uint8(rows)
        else:
            luma = rows[..., :3].astype(np.float32) @ LUMA
            gray[start : start + _ROWS] = luma * (rows[..., 3] / top) if rows.shape[-1] == 4 else luma
    return gray, coloured / gray.size


def colour_remarks(share: float) -> tuple[Remark, ...]:
    """Say that an image was a colour image, if more than a trace of it was."""
    if share <= _COLOUR_SHARE:
        return ()
    message = f"{share:.1%} of the pixels have a colour: made grey"
    return (Remark("colour", message, "info", round(share, 4), _COLOUR_SHARE),)


def _as_numpy(source: Any) -> np.ndarray:
    """Return the values as a numpy array in the machine's byte order."""
    if hasattr(source, "detach") and hasattr(source, "cpu"):  # a torch tensor, told without importing torch
        try:
            tensor = source.detach().cpu()
            source = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
        except Exception as error:  # sparse, quantised, on the meta device: torch raises many kinds
            raise ValueError(f"<tensor {tuple(source.shape)} {source.dtype}>: expected a dense tensor") from error
    if isinstance(source, np.ma.MaskedArray):
        visible = source.compressed()
        if visible.size == 0 or visible.dtype.kind not in "uifb":
            raise ValueError(f"<array {source.shape} {source.dtype}>: every pixel is masked, or is no number")
        return np.asarray(source.filled(visible.min()))
    try:
        array = np.asarray(source)
    except Exception as error:  # whatever an object's own conversion raises
        raise ValueError(f"<{type(source).__name__}>: cannot be turned into an array") from error
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def _read_three(name: str, array: np.ndarray, percentiles: tuple[float, float] | None) -> ChestImage:
    """Tell colour from a volume: (H, W, C), (C, H, W) or (S, H, W)."""
    last, first = array.shape[-1] in (3, 4), array.shape[0] in (3, 4)
    if not (last or first):
        _refuse_slices_last(name, array)
        return volume_of(name, array, percentiles=percentiles, remarks=(_AXES,))
    low, high = _limits(array)
    if low < BELOW_TISSUE_HU and first:  # no colour is negative: three or four slices
        return volume_of(name, array, percentiles=percentiles, remarks=(_AXES,))
    unit = array.dtype.kind == "f" and low >= 0 and high <= 1
    if array.dtype == np.uint8 or unit or (array.dtype == np.uint16 and last):
        gray, share = gray_of_colour(without_nan(array if last else np.moveaxis(array, 0, -1), name))
        return read_plane(name, gray, percentiles, remarks=colour_remarks(share))
    raise bad_source(
        name,
        "ambiguous: expected colour as uint8 or floats in 0..1, not normalised; or a volume as (S, H, W) in HU, "
        "one of 3 or 4 slices as a ChestImage",
    )


def _refuse_slices_last(name: str, array: np.ndarray) -> None:
    """Refuse (H, W, S), the order of nibabel's and MATLAB's arrays: square slices of a plausible size say so."""
    if array.shape[0] == array.shape[1] != array.shape[2] and array.shape[0] >= 64:
        raise bad_source(
            name,
            "ambiguous: looks like slices along the last axis, expected (S, H, W): give the file itself, which knows "
            "its orientation, or np.moveaxis(volume, -1, 0)",
        )


def _limits(array: np.ndarray) -> tuple[float, float]:
    """Return the lowest and highest value that is a number, NaN where none is."""
    return float(np.fmin.reduce(array, axis=None)), float(np.fmax.reduce(array, axis=None))


__all__ = ["LUMA", "colour_remarks", "gray_of_colour", "read_array", "read_plane"]
