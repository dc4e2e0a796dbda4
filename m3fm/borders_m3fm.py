# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Find and cut off the even border that collimators, scanners and figures leave around a radiograph.

Letters: H and W rows and columns of the image.
"""

from dataclasses import replace
from typing import NamedTuple

import numpy as np
from PIL import Image

from .chest_image_m3fm import ChestImage, Remark

BORDER_RULES = ("keep", "crop")

# Of a side no more than this is taken for a border: what is even beyond it is no border but something unknown.
MAX_SHARE = 0.35
# A border this thin matters to nobody.
_MIN_SHARE = 0.01
# Borders of larger images are found on a smaller copy.
_LARGEST_SIDE = 1024
# Display values: a border is nearly black or nearly white. Its values lie close together, or within 4 standard
# deviations of the noise on its outermost line, where that is little.
_BLACK, _WHITE = 0.12, 0.88
_TOLERANCE, _LARGEST_TOLERANCE = 0.04, 0.1
# Each row (column) is averaged over this many stretches: noise is lost, the place of the edge is kept.
_STRETCHES = 64
# Stretches of a line that may differ: in the border itself; where a marker, a label or a scale is printed on it; and
# at least in the image behind its edge, which a body's outline against the air beside it does not reach at once. Where
# the border at the other two sides leaves little of the line, this share of what it leaves is enough.
_CLEAN, _MARKED, _EDGE = 1, 10, 32
_EDGE_SHARE = 0.8
# The edge may be tilted: the image is reached within this share of the side.
_TILT = 0.06


class Border(NamedTuple):
    """Rows and columns of an image that are border, by side."""

    top: int
    bottom: int
    left: int
    right: int


def find_border(pixels: np.ndarray) -> Border:
    """Find the even black or white border of a radiograph.

    A side has a border where its lines (rows or columns), from the edge of the image inward, have one value up to a
    straight edge, behind which the image begins at most of the width; a letter or label may stand in the border if
    border follows it. Everything else, such as the air beside a patient, whose outline is round, is no border.

    Args:
        pixels: (H, W), 0 (black) to 1 (white).

    Returns:
        Rows and columns on each side, 0 where there is no border; at most `MAX_SHARE` of a side.
    """
    factor = -(-max(pixels.shape) // _LARGEST_SIDE)
    if factor > 1:
        small = np.asarray(Image.fromarray(np.ascontiguousarray(pixels, dtype=np.float32)).reduce(factor))
        # The last row and column of the small image may stand for fewer than `factor`.
        missing = [-size % factor for size in pixels.shape]
        top, bottom, left, right = (factor * depth for depth in _border(small))
        return Border(top, max(0, bottom - missing[0]), left, max(0, right - missing[1]))
    return _border(pixels)


def without_border(image: ChestImage) -> ChestImage:
    """Cut the border off a radiograph, and remark it.

    A single image of unknown modality counts as a radiograph. What has no border or lost it before, and volumes, pass
    unchanged.
    """
    is_volume = (
        image.modality == "ct" or image.units != "intensity" or max(len(image.pixels), image.source_slices or 1) > 1
    )
    if is_volume or any(remark.code == "border_cropped" for remark in image.remarks):
        return image
    border = find_border(image.pixels[0])
    if not any(border):
        return image
    height, width = image.pixels.shape[1:]
    inner = image.pixels[:, border.top : height - border.bottom, border.left : width - border.right]
    share = 1 - inner.shape[1] * inner.shape[2] / (height * width)
    remark = Remark(
        "border_cropped",
        f"an even border was cut off: {border.top} rows above and {border.bottom} below, {border.left} columns at the "
        f"left and {border.right} at the right of {height} x {width}",
        value=round(share, 4),
    )
    return replace(image, pixels=np.ascontiguousarray(inner)).remarked(remark)


def _border(pixels: np.ndarray) -> Border:
    """Find the border of an image of moderate size, (H, W)."""
    height, width = pixels.shape
    limits = int(MAX_SHARE * height), int(MAX_SHARE * width)
    top, bottom, left, right = 0, 0, 0, 0
    # Rows that cross a border at the left are not even, until that one is left out: look again.
    for _ in range(3):
        inner = pixels[top : height - bottom, left : width - right]
        rows, columns = _line_means(inner), _line_means(inner.T)
        found = (
            _depth(rows, limits[0] - top),
            _depth(rows[::-1], limits[0] - bottom),
            _depth(columns, limits[1] - left),
            _depth(columns[::-1], limits[1] - right),
        )
        top, bottom, left, right = (old + new for old, new in zip((top, bottom, left, right), found, strict=True))
        if not any(found):
            break
    sizes = zip((top, bottom, left, right), (height, height, width, width), strict=True)
    return Border(*(depth if depth >= _MIN_SHARE * size else 0 for depth, size in sizes))


def _line_means(pixels: np.ndarray) -> np.ndarray:
    """Average each row of (H, W) over stretches of it: (H, stretches)."""
    stretches = min(_STRETCHES, pixels.shape[1])
    image = Image.fromarray(np.ascontiguousarray(pixels, dtype=np.float32))
    return np.asarray(image.resize((stretches, pixels.shape[0]), Image.Resampling.BOX))


def _depth(lines: np.ndarray, limit: int) -> int:
    """Count the lines (H, stretches) that are border from the first one inward; 0 unless an edge ends them."""
    level = float(np.median(lines[0]))
    if limit < 1 or _BLACK < level < _WHITE:
        return 0
    noise = 1.4826 * float(np.median(np.abs(lines[0] - level)))  # standard deviation by the median: markers aside
    tolerance = min(max(_TOLERANCE, 4 * noise), _LARGEST_TOLERANCE)
    scale = lines.shape[1] / _STRETCHES
    differs = np.abs(lines - level) > tolerance  # (H, stretches)
    differing = differs.sum(axis=1)
    marked = differing[: limit + 1] > _MARKED * scale
    reached = int(marked.argmax()) if marked.any() else limit + 1
    clean = np.flatnonzero(differing[:reached] <= _CLEAN)
    if not len(clean):
        return 0
    depth = int(clean[-1]) + 1
    if depth > limit or depth == len(lines):
        return 0
    behind = differing[depth : depth + max(2, int(_TILT * len(lines)))]
    width = (differs[depth:].mean(axis=0) > 0.1).sum()  # stretches that hold image; a marker fills but few lines
    return depth if behind.max() >= max(1, min(_EDGE * scale, _EDGE_SHARE * width)) else 0


__all__ = ["BORDER_RULES", "MAX_SHARE", "Border", "find_border", "without_border"]
