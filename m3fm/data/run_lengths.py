# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Masks as run lengths: numbers in pairs, of which each is a start and a length, counted down the columns.

Two conventions are in use. "relative" (SIIM-ACR): a start counts from the end of the run before, the first from 0.
"absolute" (most other challenges of Kaggle): a start counts from the first pixel of the image, which is number 1.
"""

from __future__ import annotations

import numpy as np

__all__ = ["CONVENTIONS", "decode_run_lengths", "encode_run_lengths", "run_bounds"]

CONVENTIONS = ("relative", "absolute")
_EMPTY = ("", "-1")
# No image has as many pixels; sums of larger numbers would not fit 64 bits.
_MOST_PIXELS = 2**31


def run_bounds(rle: str, convention: str) -> np.ndarray:
    """Return where runs start and end.

    Args:
        rle: Pairs of numbers; empty, or "-1", for an empty mask.
        convention: One of `CONVENTIONS`.

    Returns:
        (R, 2) int64: pixel of the start, and the one after the end, from 0, in column order.

    Raises:
        ValueError: For an unknown convention, text that is not pairs of whole numbers, a number beyond any image, a
            run without length, or runs that go back or overlap.
    """
    if convention not in CONVENTIONS:
        raise ValueError(f"convention must be one of {', '.join(CONVENTIONS)}, got {convention!r}")
    text = rle.strip()
    if text in _EMPTY:
        return np.zeros((0, 2), dtype=np.int64)
    try:
        numbers = np.array(text.split(), dtype=np.int64)
    except (ValueError, OverflowError):
        raise ValueError("run lengths must be whole numbers with spaces between") from None
    if numbers.size % 2:
        raise ValueError(f"run lengths must be pairs of a start and a length, got {numbers.size} numbers")
    pairs = numbers.reshape(-1, 2)  # (R, 2)
    if ((pairs > _MOST_PIXELS) | (pairs < -_MOST_PIXELS)).any():
        raise ValueError(f"starts and lengths of runs must be at most {_MOST_PIXELS}")
    if (pairs[:, 1] <= 0).any():
        raise ValueError("every run must be at least one pixel long")
    if convention == "relative":
        if (pairs[:, 0] < 0).any():
            raise ValueError("a relative start must be 0 or more: runs follow each other")
        return np.cumsum(pairs.reshape(-1)).reshape(-1, 2)
    bounds = np.column_stack([pairs[:, 0] - 1, pairs.sum(axis=1) - 1])
    if bounds[0, 0] < 0 or (bounds[1:, 0] < bounds[:-1, 1]).any():
        raise ValueError("absolute starts must be 1 or more, and runs must follow each other without overlap")
    return bounds


def decode_run_lengths(rle: str, height: int, width: int, convention: str) -> np.ndarray:
    """Return the mask that run lengths describe.

    Args:
        rle: Pairs of numbers; empty, or "-1", for an empty mask.
        height: H, pixels.
        width: W, pixels.
        convention: One of `CONVENTIONS`.

    Returns:
        (H, W) bool.

    Raises:
        ValueError: For run lengths that are none (`run_bounds`), or go beyond the image.
    """
    bounds = run_bounds(rle, convention)
    if bounds.size and bounds[-1, 1] > height * width:
        raise ValueError(f"run lengths go to pixel {bounds[-1, 1]} of an image of {height} x {width} pixels")
    # Outside and inside take turns.
    lengths = np.diff(bounds.reshape(-1), prepend=0, append=height * width)  # (2 R + 1,)
    inside = np.repeat(np.arange(lengths.size) % 2 == 1, lengths)
    return np.ascontiguousarray(inside.reshape(width, height).T)  # (H, W)


def encode_run_lengths(mask: np.ndarray, convention: str) -> str:
    """Return the run lengths of a mask; the inverse of `decode_run_lengths`.

    Args:
        mask: (H, W), not zero inside.
        convention: One of `CONVENTIONS`.

    Raises:
        ValueError: For an unknown convention, or a mask that has not two dimensions.
    """
    if convention not in CONVENTIONS:
        raise ValueError(f"convention must be one of {', '.join(CONVENTIONS)}, got {convention!r}")
    if mask.ndim != 2:
        raise ValueError(f"a mask must have two dimensions, got the shape {mask.shape}")
    flat = np.asarray(mask, dtype=bool).T.reshape(-1)
    edges = np.flatnonzero(np.diff(flat.astype(np.int8), prepend=0, append=0))  # (2 R,)
    if convention == "relative":
        numbers = np.diff(edges, prepend=0)
    else:
        bounds = edges.reshape(-1, 2)
        numbers = np.column_stack([bounds[:, 0] + 1, bounds[:, 1] - bounds[:, 0]]).reshape(-1)
    return " ".join(map(str, numbers.tolist()))
