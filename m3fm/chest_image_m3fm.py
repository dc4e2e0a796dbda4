# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""One chest image in memory, and the checks every reader shares.

Shapes: S slices (1 for a radiograph), H rows, W columns. Errors name the source as the caller gave it.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

MODALITIES = ("cxr", "ct")
UNITS = ("intensity", "hu")
VIEWS = ("PA", "AP", "LATERAL")

# 2**30 voxels are 1024 slices of 1024 x 1024: above any chest CT, below what exhausts a workstation by accident.
MAX_VOXELS = 1 << 30


@dataclass(frozen=True, eq=False)
class ChestImage:
    """Hold one image or one volume, without any patient data.

    Attributes:
        pixels: (S, H, W) float32. S = 1 for a single image; slices of a volume run from inferior to superior where
            the file tells the direction (NIfTI).
        modality: "cxr", "ct", or None where the source does not say (a PNG may be either).
        units: "intensity" is ready for display, 0 (black) to 1 (white); "hu" is Hounsfield units, not yet windowed.
        view: "PA", "AP" or "LATERAL", or None where unknown.
    """

    pixels: np.ndarray
    modality: str | None = None
    units: str = "intensity"
    view: str | None = None

    def __post_init__(self) -> None:
        """Check shape, type and vocabulary.

        Raises:
            ValueError: If a field is outside what the class documents.
        """
        if not isinstance(self.pixels, np.ndarray) or self.pixels.ndim != 3 or self.pixels.dtype != np.float32:
            got = f"{getattr(self.pixels, 'shape', type(self.pixels))} {getattr(self.pixels, 'dtype', '')}"
            raise ValueError(f"ChestImage.pixels: got {got.strip()}, expected a float32 array of shape (S, H, W)")
        for field, allowed in (("modality", (*MODALITIES, None)), ("units", UNITS), ("view", (*VIEWS, None))):
            if getattr(self, field) not in allowed:
                raise ValueError(f"ChestImage.{field}: got {getattr(self, field)!r}, expected one of {allowed}")


def stretch(
    pixels: np.ndarray, percentiles: tuple[float, float] | None, valid: np.ndarray | None = None
) -> np.ndarray:
    """Map values with no display range to 0..1, linearly between two percentiles.

    Args:
        pixels: Any shape.
        percentiles: The two that become 0 and 1; None takes minimum and maximum.
        valid: Which pixels to count, same shape; None counts all.

    Returns:
        float32, same shape; all 0 if the values do not differ.
    """
    pixels = pixels.astype(np.float32, copy=False)
    counted = pixels if valid is None or not valid.any() else pixels[valid]
    low, high = counted.min(), counted.max()
    if percentiles is not None:
        inner_low, inner_high = np.percentile(counted, percentiles)
        # A bright marker on an even ground has equal percentiles: the whole range is then the better choice.
        if inner_high > inner_low:
            low, high = inner_low, inner_high
    if not high > low:
        return np.zeros_like(pixels)
    return np.clip((pixels - np.float32(low)) / np.float32(high - low), 0, 1)


def bad_source(name: str, reason: str) -> ValueError:
    """Return the error for a source that cannot be read, to be raised."""
    return ValueError(f"{name}: {reason}")


def finished(
    name: str, pixels: np.ndarray, *, modality: str | None = None, units: str = "intensity", view: str | None = None
) -> ChestImage:
    """Check the values and build the image. `pixels` is (S, H, W)."""
    if 0 in pixels.shape:
        raise bad_source(name, f"image of size {tuple(pixels.shape)}, expected at least one pixel")
    low, high = pixels.min(), pixels.max()
    if low == high:
        raise bad_source(name, "blank image: every pixel has the same value")
    return ChestImage(np.ascontiguousarray(pixels, dtype=np.float32), modality, units, view)


def without_nan(pixels: np.ndarray, name: str) -> np.ndarray:
    """Replace NaN and infinities by the lowest finite value, which displays as background."""
    if pixels.dtype.kind != "f":
        return pixels
    finite = np.isfinite(pixels)
    if finite.all():
        return pixels
    if not finite.any():
        raise bad_source(name, "every pixel is NaN or infinite")
    return np.where(finite, pixels, pixels[finite].min())


def check_voxels(name: str, *shape: int) -> None:
    """Refuse a declared size above `MAX_VOXELS` before anything of that size is allocated."""
    count = int(np.prod([int(n) for n in shape], dtype=np.float64))
    if count > MAX_VOXELS:
        raise bad_source(name, f"declares {count} pixels, expected at most {MAX_VOXELS}")


def gray_from_uint8(array: np.ndarray) -> np.ndarray:
    """Turn uint8 colour, channels first or last, into (H, W) as PIL does; leave other arrays as they are."""
    if array.ndim == 2 or (array.shape[-1] not in (3, 4) and array.shape[0] not in (1, 3, 4)):
        return array
    if array.shape[-1] not in (3, 4):
        array = np.moveaxis(array, 0, -1)
    if array.shape[-1] == 1:
        return array[..., 0]
    image = Image.fromarray(np.ascontiguousarray(array))
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    return np.asarray(image.convert("RGB").convert("L"))
