# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Choose the slices of a CT volume that the model looks at.

Letters: S slices of the volume, K slices looked at to find the lungs, H and W rows and columns.
"""

import numpy as np
from PIL import Image

from .chest_image_m3fm import ChestImage, LazyPixels, Remark

SLICE_SELECTIONS = ("uniform", "lungs", "all")
# The outer tenths of a chest CT are neck and upper abdomen: "uniform" spreads its slices over the middle 80 %.
MIDDLE_FRACTION = 0.8

# The lungs are found on at most this many slices, each reduced to at most this many rows and columns.
_PROBES = 48
_GRID = 96
# HU. The air around the patient and in the bowel is below, lung with its vessels between, everything else above.
_AIR, _TISSUE = -950.0, -400.0
# Share of the body's cross-section. The walls of trachea and bowel take less, the lung apex at the first rib more.
_LUNG_SHARE = 0.06
# Slices without lung, of those looked at, that do not part one stretch from the next: metal can hide a lung.
_BRIDGED = 2


def chosen_slices(image: ChestImage, selection: str, count: int) -> ChestImage:
    """Reduce a volume in memory to the slices that the model is to see.

    Args:
        image: A single image, a volume, or what an earlier call returned; the first and the last pass unchanged.
        selection: One of `SLICE_SELECTIONS`.
        count: Slices wanted; "all" takes every one. A volume with fewer gives them all.

    Returns:
        An image whose `slice_numbers` say which slices of the volume these are. Where "lungs" finds none, the slices
        are those of "uniform" and a remark says so.
    """
    total = len(image.pixels)
    if image.slice_numbers is not None or (total == 1 and isinstance(image.pixels, np.ndarray)):
        return image
    if selection == "all" or total <= count:
        return image.take(np.arange(total))
    if selection == "uniform":
        return image.take(choose_slices(total, count))
    if image.units != "hu":
        remark = Remark("no_lung", "lung is told from other air in Hounsfield units only: slices spread evenly")
        return image.take(choose_slices(total, count)).remarked(remark)
    extent = find_lungs(image.pixels)
    if extent is None:
        remark = Remark("no_lung", "no lung was found in the volume: slices spread evenly", "warning")
        return image.take(choose_slices(total, count)).remarked(remark)
    return image.take(_spread(extent[0], extent[1] + 1 - extent[0], total, count))


def choose_slices(total: int, count: int) -> np.ndarray:
    """Choose slices evenly over the middle 80 % of a volume.

    Args:
        total: Slices there are.
        count: Slices wanted.

    Returns:
        Increasing indices; all of them if there are no more than `count`.
    """
    return _spread(total * (1 - MIDDLE_FRACTION) / 2, total * MIDDLE_FRACTION, total, count)


def find_lungs(pixels: np.ndarray | LazyPixels) -> tuple[int, int] | None:
    """Find the first and the last slice that shows lung, to within S / 48 slices.

    Lung is what has the density of lung and does not hang together with the air around the patient. Of several
    stretches of such slices the one with the most lung counts.

    Args:
        pixels: (S, H, W) in HU; no more than 48 slices are decoded, one at a time.

    Returns:
        Two slice numbers, or None if no slice shows lung.
    """
    numbers = np.unique(np.linspace(0, len(pixels) - 1, min(len(pixels), _PROBES)).round().astype(int))
    small = np.stack([_reduced(pixels[int(number)]) for number in numbers])  # (K, h, w)
    # A scan cut close has no air at its edges, and lung may lie there: only what is surely air starts the outside.
    outside = _grow(_at_edges(small < _AIR), small < _TISSUE)
    lung = (small > _AIR) & (small < _TISSUE) & ~outside
    shares = lung.sum(axis=(1, 2)) / np.maximum((~outside).sum(axis=(1, 2)), 1)
    stretch = _heaviest_stretch(shares >= _LUNG_SHARE, shares)
    return None if stretch is None else (int(numbers[stretch[0]]), int(numbers[stretch[1]]))


def _spread(start: float, extent: float, total: int, count: int) -> np.ndarray:
    """Spread `count` slices evenly over a part of the `total`, each in the middle of its share."""
    if total <= count:
        return np.arange(total)
    positions = start + (np.arange(count) + 0.5) / count * extent
    chosen = np.unique(np.floor(positions + 1e-6).astype(int))  # 14.999... is slice 15
    if len(chosen) == count:
        return chosen
    # In a part with barely more slices than wanted, two positions can share one: take neighbours around its middle.
    first = int(np.floor(start + (extent - count) / 2 + 1e-6))
    return min(max(first, 0), total - count) + np.arange(count)


def _reduced(pixels: np.ndarray) -> np.ndarray:
    """Average one slice (H, W) over a grid of at most `_GRID` a side."""
    size = tuple(min(side, _GRID) for side in pixels.shape)
    if size == pixels.shape:
        return pixels
    return np.asarray(Image.fromarray(np.ascontiguousarray(pixels)).resize(size[::-1], Image.Resampling.BOX))


def _at_edges(mask: np.ndarray) -> np.ndarray:
    """Keep of a mask (K, h, w) what lies in the first or last row or column."""
    edges = mask.copy()
    edges[:, 1:-1, 1:-1] = False
    return edges


def _grow(seed: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return the parts of a mask (K, h, w) that hang together with a seed in their slice, over edges."""
    grown = seed & mask
    reached = -1
    while reached != (reached := int(grown.sum())):
        for axis in (1, 2):
            lines, allowed = np.moveaxis(grown, axis, 0), np.moveaxis(mask, axis, 0)  # views
            for i in range(1, len(lines)):
                lines[i] |= lines[i - 1] & allowed[i]
            for i in range(len(lines) - 2, -1, -1):
                lines[i] |= lines[i + 1] & allowed[i]
    return grown


def _heaviest_stretch(marked: np.ndarray, weights: np.ndarray) -> tuple[int, int] | None:
    """Return first and last index of the stretch of marked places whose weights sum to most."""
    places = np.flatnonzero(marked)
    if not len(places):
        return None
    stretches = np.split(places, np.flatnonzero(np.diff(places) > _BRIDGED + 1) + 1)
    heaviest = max(stretches, key=lambda stretch: weights[stretch].sum())
    return int(heaviest[0]), int(heaviest[-1])


__all__ = ["MIDDLE_FRACTION", "SLICE_SELECTIONS", "choose_slices", "chosen_slices", "find_lungs"]
