# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Lay small pictures over each other, and tell how well they then agree.

Chest images of different people resemble each other, more so than an image resembles its own copy that was cropped by
a few pixels. So thumbnails are compared after they were aligned, by what is left when the common forms are taken away.

Letters: P pairs, N pixels of a side, K points. Positions are in sides of the picture from its centre: (x, y) with -0.5
at the left and upper edge.
"""

from __future__ import annotations

from functools import cache

import numpy as np

__all__ = ["agreement", "local_contrast"]

# Standard deviations, in pixels: forms larger than this are common to all chests. Alignment goes by larger forms,
# which overlap before it is found.
_FINE, _COARSE = 2.5, 4.0
# Noise, and most local standard deviations.
_NOISE, _MOST = 0.01, 1.5
# Blur in pixels, distance of points in pixels, and steps: on thumbnails of half the side, then on whole ones.
_HALVED_LEVELS = ((1.0, 2, 8), (0.4, 1, 5))
_WHOLE_LEVEL = (0.7, 2, 5)
# Copies are cropped, padded, scaled or turned by little; what needs more was not aligned but distorted.
_LEAST_OVERLAP, _MOST_STRETCH = 0.7, 1.3
# What agrees less than this once the larger forms are aligned is not looked at again: most pairs of different people.
_LEAST_COARSE = 0.83
# Pairs at a time: few enough for the processor's cache.
_CHUNK = 64


def agreement(first: np.ndarray, second: np.ndarray, first_boxes: np.ndarray, second_boxes: np.ndarray) -> np.ndarray:
    """Align pairs of thumbnails and correlate their local contrast.

    Alignment is affine, by the inverse compositional method (Baker and Matthews, IJCV 56:221, 2004), from a start at
    which two boxes cover each other.

    Args:
        first: (P, N, N) uint8.
        second: (P, N, N) uint8.
        first_boxes: (P, 4) left, top, right, bottom in sides of the picture, from its upper left corner.
        second_boxes: (P, 4), the part that should show the same.

    Returns:
        (P,) correlation; 0 where no plausible alignment was found.
    """
    correlation = np.zeros(len(first), np.float32)
    for start in range(0, len(first), _CHUNK):
        part = np.arange(start, min(start + _CHUNK, len(first)))
        a, b = (pictures[part].astype(np.float32) / 255 for pictures in (first, second))
        linear, shift = _start(first_boxes[part], second_boxes[part])
        halved_a, halved_b = (local_contrast(_halved(each), _COARSE / 2, _NOISE, _MOST) for each in (a, b))
        for level in _HALVED_LEVELS:
            linear, shift = _align(halved_a, halved_b, linear, shift, level)
        kept = _correlation(halved_a, halved_b, linear, shift) >= _LEAST_COARSE
        if not kept.any():
            continue
        part, a, b = part[kept], a[kept], b[kept]
        whole_a, whole_b = (local_contrast(each, _COARSE, _NOISE, _MOST) for each in (a, b))
        linear, shift = _align(whole_a, whole_b, linear[kept], shift[kept], _WHOLE_LEVEL)
        fine_a, fine_b = (local_contrast(each, _FINE, _NOISE, _MOST) for each in (a, b))
        correlation[part] = _correlation(fine_a, fine_b, linear, shift)
    return correlation


def _halved(pictures: np.ndarray) -> np.ndarray:
    count, side, _ = pictures.shape
    return pictures.reshape(count, side // 2, 2, side // 2, 2).mean(axis=(2, 4))


@cache
def _gaussian(side: int, deviation: float) -> np.ndarray:
    """Return the matrix (N, N) that blurs along one side, edges as if the picture ended there."""
    steps = np.arange(side)
    weights = np.exp(-0.5 * ((steps[:, None] - steps) / deviation) ** 2)
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def _blurred(pictures: np.ndarray, deviation: float) -> np.ndarray:
    matrix = _gaussian(pictures.shape[-1], deviation)
    return matrix @ pictures @ matrix.T


def local_contrast(pictures: np.ndarray, deviation: float, noise: float, most: float) -> np.ndarray:
    """Subtract the local mean and divide by the local deviation: brightness, contrast and gamma go.

    Args:
        pictures: (P, N, N) float32, 0 to 1.
        deviation: Standard deviation of the neighbourhood, in pixels.
        noise: Deviations well below it are not brought up.
        most: Result beyond -most and most is cut off: a marker or an edge shall not outweigh the rest.

    Returns:
        (P, N, N).
    """
    centred = pictures - _blurred(pictures, deviation)
    local = np.sqrt(np.maximum(_blurred(centred * centred, deviation), 0))
    return np.clip(centred / (local + noise), -most, most)


def _start(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the map (P, 2, 2) and (P, 2) that brings the first box onto the second."""
    sizes = [np.maximum(box[:, 2:] - box[:, :2], 1e-3) for box in (first, second)]
    centres = [(box[:, 2:] + box[:, :2]) / 2 - 0.5 for box in (first, second)]
    scale = sizes[1] / sizes[0]  # (P, 2)
    linear = np.zeros((len(first), 2, 2), np.float32)
    linear[:, 0, 0], linear[:, 1, 1] = scale.T
    return linear, (centres[1] - scale * centres[0]).astype(np.float32)


@cache
def _points(side: int, spacing: int) -> np.ndarray:
    """Return the positions (2, K) of every `spacing`-th pixel."""
    axis = ((np.arange(0, side, spacing) + 0.5) / side - 0.5).astype(np.float32)
    y, x = np.meshgrid(axis, axis, indexing="ij")
    return np.stack([x.ravel(), y.ravel()])


def _sampled(pictures: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Read pictures (P, N, N) at places (P, 2, K), bilinearly: (P, K), and where that lies inside."""
    count, side, _ = pictures.shape
    pixels = (places + 0.5) * side - 0.5
    inside = ((pixels > -1) & (pixels < side)).all(axis=1)
    # A map gone astray may lie anywhere; it is judged later.
    pixels = np.nan_to_num(pixels).clip(0, side - 1.001)
    whole = pixels.astype(np.int32)
    x, y = (pixels - whole).swapaxes(0, 1)
    corner = np.arange(count, dtype=np.int32)[:, None] * side * side + whole[:, 1] * side + whole[:, 0]
    flat = pictures.reshape(-1)
    upper = flat[corner] * (1 - x) + flat[corner + 1] * x
    lower = flat[corner + side] * (1 - x) + flat[corner + side + 1] * x
    return upper * (1 - y) + lower * y, inside


def _mapped(linear: np.ndarray, shift: np.ndarray, points: np.ndarray) -> np.ndarray:
    return linear @ points + shift[:, :, None]  # (P, 2, K)


def _align(
    first: np.ndarray, second: np.ndarray, linear: np.ndarray, shift: np.ndarray, level: tuple[float, int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Improve the maps from positions of the first picture to those of the second."""
    blur, spacing, steps = level
    first, second = _blurred(first, blur), _blurred(second, blur)
    side = first.shape[-1]
    points = _points(side, spacing)
    wanted = first[:, ::spacing, ::spacing].reshape(len(first), -1)  # (P, K)
    slopes = [
        slope[:, ::spacing, ::spacing].reshape(len(first), -1) * side for slope in np.gradient(first, axis=(2, 1))
    ]
    jacobian = np.stack([slope * factor for slope in slopes for factor in (points[0], points[1], 1)], axis=1)
    normal = jacobian @ jacobian.swapaxes(1, 2)  # (P, 6, 6)
    damping = 1e-3 * np.trace(normal, axis1=1, axis2=2) / 6 + 1e-6
    inverse = np.linalg.inv(normal + damping[:, None, None] * np.eye(6, dtype=np.float32))
    for _ in range(steps):
        got, inside = _sampled(second, _mapped(linear, shift, points))
        error = np.where(inside, got - wanted, 0)
        change = (inverse @ (jacobian @ error[:, :, None]))[:, :, 0].reshape(-1, 2, 3)
        # No step larger than a fifth of the side: those belong to pairs that have no alignment.
        change *= np.minimum(1, 0.2 / np.abs(change).max(axis=(1, 2), keepdims=True).clip(1e-9))
        linear = linear @ np.linalg.inv(np.eye(2, dtype=np.float32) + change[:, :, :2])
        shift = shift - (linear @ change[:, :, 2:])[:, :, 0]
    return linear, shift


def _correlation(first: np.ndarray, second: np.ndarray, linear: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Correlate pictures under their maps; 0 where these are no crop, border, scale or turn of a copy."""
    got, inside = _sampled(second, _mapped(linear, shift, _points(first.shape[-1], 1)))
    wanted = first.reshape(len(first), -1)
    covered = np.maximum(inside.sum(axis=1, keepdims=True), 1)
    centred = [np.where(inside, x - (x * inside).sum(axis=1, keepdims=True) / covered, 0) for x in (wanted, got)]
    norm = np.sqrt((centred[0] ** 2).sum(axis=1) * (centred[1] ** 2).sum(axis=1))
    value = (centred[0] * centred[1]).sum(axis=1) / np.maximum(norm, 1e-6)
    share = inside.mean(axis=1)
    linear = np.nan_to_num(linear, posinf=1e3, neginf=-1e3)
    stretch = np.linalg.svd(linear, compute_uv=False)  # (P, 2)
    of_second = share * np.abs(np.linalg.det(linear))
    plausible = (
        (np.minimum(share, of_second) >= _LEAST_OVERLAP)
        & (stretch[:, 0] <= _MOST_STRETCH)
        & (stretch[:, 1] >= 1 / _MOST_STRETCH)
    )
    return np.where(plausible, value, 0)
