# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Images that look enough like a chest for the input check to let them pass, each seed another one."""

import numpy as np


def radiograph_pixels(seed: int = 0, rows: int = 96, columns: int = 80) -> np.ndarray:
    """Return (rows, columns) uint8: a bright body with two dark lungs, on black, with a little grain."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[-1 : 1 : rows * 1j, -1 : 1 : columns * 1j]
    shift, lung = random.uniform(-0.05, 0.05, 2), random.uniform(0.28, 0.36)
    body = 170 - 60 * (x**2 + 0.3 * y**2)
    for side in (-1, 1):
        inside = ((x - side * 0.45 - shift[0]) / lung) ** 2 + ((y + 0.05 - shift[1]) / 0.65) ** 2
        body -= 110 / (1 + np.exp(np.clip(8 * (inside - 1), -50, 50)))
    body[(x / 0.98) ** 4 + (y / 1.6) ** 4 > 1] = 8
    ribs = 8 * np.sin(14 * (y + 0.4 * x**2))
    return np.clip(body + ribs + random.normal(0, 2, body.shape), 0, 255).astype(np.uint8)


def ct_volume(seed: int = 0, slices: int = 24, rows: int = 40, columns: int = 48) -> np.ndarray:
    """Return (slices, rows, columns) int16 HU, from inferior to superior: soft tissue with two lungs, in air."""
    random = np.random.default_rng(seed)
    z, y, x = np.mgrid[-1 : 1 : slices * 1j, -1 : 1 : rows * 1j, -1 : 1 : columns * 1j]
    volume = np.full(z.shape, -1000.0)
    volume[(x / 0.9) ** 2 + (y / 0.8) ** 2 < 1] = 40
    size = np.sqrt(np.clip(1.1 - z**2, 0, None))
    for side in (-1, 1):
        volume[((x - side * 0.4) / 0.3) ** 2 + (y / 0.5) ** 2 < size**2] = -820
    volume[(x / 0.08) ** 2 + ((y - 0.6) / 0.1) ** 2 < 1] = 600  # the spine
    return np.clip(volume + random.normal(0, 15, volume.shape), -1024, 3000).astype(np.int16)
