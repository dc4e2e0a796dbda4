# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Synthetic CT series of one phantom, in whatever orientation, order and naming a scanner may have used."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.dicom_files import AXIAL, ct_slice, write_dicom

CORONAL = (1.0, 0.0, 0.0, 0.0, 0.0, -1.0)
SAGITTAL = (0.0, 1.0, 0.0, 0.0, 0.0, -1.0)
PRONE = (-1.0, 0.0, 0.0, 0.0, -1.0, 0.0)
# Seen from above: the order of the slices along their normal is from superior to inferior.
FROM_ABOVE = (1.0, 0.0, 0.0, 0.0, -1.0, 0.0)


def phantom(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Return HU at places of the patient in mm (x to the left, y to posterior, z to superior): no axis is alike."""
    return (x + 2 * y + 5 * z).round()


def series(
    count: int = 12,
    *,
    orientation: Sequence[float] = AXIAL,
    start: Sequence[float] = (-24.0, -20.0, 100.0),
    step: Sequence[float] | None = None,
    spacing: tuple[float, float] = (1.0, 1.0),
    rows: int = 40,
    columns: int = 48,
    **tags: Any,
) -> list[Any]:
    """Make the slices of a series of `phantom`, counted from 1.

    Args:
        count: How many slices.
        orientation: ImageOrientationPatient.
        start: ImagePositionPatient of the first.
        step: From one slice to the next in mm; 2 mm along the normal unless given.
        spacing: Millimetres between rows, then between columns.
        rows: Rows of a slice.
        columns: Columns of a slice.
        **tags: As `ct_slice`; a list gives each slice its own.
    """
    across, down = np.reshape(orientation, (2, 3))
    step = 2 * np.cross(across, down) if step is None else np.asarray(step)
    made = []
    for i in range(count):
        position = np.asarray(start) + i * step
        i_row, i_column = np.mgrid[:rows, :columns][..., None]
        places = position + i_row * spacing[0] * down + i_column * spacing[1] * across  # (H, W, 3)
        stored = (phantom(*np.moveaxis(places, -1, 0)) + 1024).astype(np.int16)
        own = {
            key: value[i] if isinstance(value, list) and len(value) == count else value for key, value in tags.items()
        }
        place = {"position": tuple(map(float, position)), "orientation": tuple(orientation), "spacing": spacing}
        made.append(ct_slice(stored, **(place | {"thickness": 2.0, "number": i + 1} | own)))
    return made


def write_series(folder: Path, slices: Sequence[Any], *, seed: int = 0, prefix: str = "IM") -> list[Path]:
    """Write slices under names in an order that says nothing; paths in the order of `slices`."""
    folder.mkdir(parents=True, exist_ok=True)
    names = np.random.default_rng(seed).permutation(len(slices))
    return [write_dicom(folder / f"{prefix}{name:04d}", entry) for name, entry in zip(names, slices, strict=True)]
