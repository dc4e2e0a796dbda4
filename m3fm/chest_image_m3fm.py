# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""One chest image in memory, and the checks every reader shares.

Shapes: S slices (1 for a radiograph), H rows, W columns. Errors name the source as the caller gave it.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

MODALITIES = ("cxr", "ct")
UNITS = ("intensity", "hu")
VIEWS = ("PA", "AP", "LATERAL")
SEVERITIES = ("info", "warning", "refuse")

# What reading and the input check may say of an image, by the code that programs go by.
REMARKS = {
    # said in reading
    "reoriented": "turned or mirrored to radiological display, as the file states its geometry",
    "assumed": "a tag that is missing or contradicts the pixels was replaced by what the pixels tell",
    "window_ignored": "the display window of the file does not fit its pixels, another was taken",
    "uncalibrated": "CT values without a rescale: Hounsfield units were inferred or are in doubt",
    "display_values": "a volume of display values, not Hounsfield units: taken as windowed already",
    "colour": "a colour image, made grey",
    "frames_as_slices": "frames or pages taken as the slices of one volume",
    "first_volume": "several volumes in one file, the first was taken",
    "oblique": "slices are not axial, or are tilted",
    "gap": "slices are missing or unevenly spaced",
    "duplicates": "slices at the same place, one of each was kept",
    "localizer": "localizer images left out",
    "other_series": "other series of the study left out",
    "unreadable_slices": "slices that cannot be read left out",
    "not_images": "files that are not chest images left out",
    "border_cropped": "an even border around the radiograph cut off",
    "no_lung": "no lung was found to choose slices by, they were spread evenly",
    # said by the input check
    "blank": "every pixel has the same value, or nearly",
    "noise": "no structure but noise",
    "inverted": "black and white are exchanged",
    "turned": "lies on its side or upside down",
    "low_contrast": "few grey levels are used",
    "not_a_chest": "neither a chest X-ray nor a chest CT",
    "wrong_modality": "seen as another modality than stated",
    "view": "seen as another view than stated, or a view that the model has hardly seen",
    "too_few_slices": "fewer slices than a chest CT has",
    "too_small": "fewer pixels than the model reads",
    "out_of_range": "values that no chest CT has in Hounsfield units",
}

# 2**29 voxels are 512 slices of 1024 x 1024: above any chest CT, below what exhausts a workstation by accident.
MAX_VOXELS = 1 << 29


@dataclass(frozen=True)
class Remark:
    """Say one thing about an image that its user should know.

    Attributes:
        code: A key of `REMARKS`.
        message: For people: what was found and what was done. Never the text of a tag, and no identifier.
        severity: "info", "warning" (the result may be wrong), or "refuse" (no result is to be trusted).
        value: The measured number that the remark rests on, where there is one.
        limit: What `value` was compared with.
    """

    code: str
    message: str
    severity: str = "info"
    value: float | None = None
    limit: float | None = None

    def __post_init__(self) -> None:
        """Check the vocabulary.

        Raises:
            ValueError: If code or severity is unknown.
        """
        if self.code not in REMARKS or self.severity not in SEVERITIES:
            raise ValueError(
                f"Remark: got {self.code!r}, {self.severity!r}, expected a code of {sorted(REMARKS)} and one of "
                f"{SEVERITIES}"
            )

    def as_dict(self) -> dict[str, Any]:
        """Return the remark as plain data, without what is not known."""
        return {name: value for name, value in vars(self).items() if value is not None}


class LazyPixels:
    """Stand for the pixels (S, H, W) of a volume whose slices are decoded when they are asked for.

    Indexing with a number gives one slice (H, W), with a `slice` or numbers several (n, H, W), all float32 and new in
    memory; nothing is kept.

    Args:
        shape: (S, H, W).
        read: Decodes one slice: number to (H, W) float32.

    Attributes:
        remarks: What decoding has noticed so far.
    """

    ndim = 3
    dtype = np.dtype(np.float32)
    remarks: tuple[Remark, ...] = ()

    def __init__(self, shape: tuple[int, int, int], read: Callable[[int], np.ndarray]):
        self.shape = tuple(int(n) for n in shape)
        self._read = read

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> np.ndarray:
        numbers = np.arange(self.shape[0])[index]
        if numbers.ndim == 0:
            return self._read(int(numbers))
        pixels = np.empty((len(numbers), *self.shape[1:]), dtype=np.float32)
        for i, number in enumerate(numbers):
            pixels[i] = self._read(int(number))
        return pixels

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype=dtype)


@dataclass(frozen=True, eq=False)
class ChestImage:
    """Hold one image or one volume, without any patient data.

    Attributes:
        pixels: (S, H, W) float32, an array or `LazyPixels`. S = 1 for a single image; slices of a volume run from
            inferior to superior where the source tells the direction. Displayed as radiologists see it: rows from
            anterior (CT) or superior (radiograph) down, the patient's right at the left.
        modality: "cxr", "ct", or None where the source does not say (a PNG may be either).
        units: "intensity" is ready for display, 0 (black) to 1 (white); "hu" is Hounsfield units, not yet windowed.
        view: "PA", "AP" or "LATERAL", or None where unknown.
        spacing: Millimetres between slices, rows and columns; None where the source does not say.
        remarks: What reading changed or noticed.
        slice_numbers: Which slices of the source these are, counted from 0; None for all of them.
        source_slices: Slices of the source; None for those that are here.
    """

    pixels: np.ndarray | LazyPixels
    modality: str | None = None
    units: str = "intensity"
    view: str | None = None
    spacing: tuple[float, float, float] | None = None
    remarks: tuple[Remark, ...] = ()
    slice_numbers: tuple[int, ...] | None = None
    source_slices: int | None = None

    def __post_init__(self) -> None:
        """Check shape, type and vocabulary.

        Raises:
            ValueError: If a field is outside what the class documents.
        """
        is_array = isinstance(self.pixels, (np.ndarray, LazyPixels))
        if not is_array or self.pixels.ndim != 3 or self.pixels.dtype != np.float32:
            got = f"{getattr(self.pixels, 'shape', type(self.pixels))} {getattr(self.pixels, 'dtype', '')}"
            raise ValueError(f"ChestImage.pixels: got {got.strip()}, expected a float32 array of shape (S, H, W)")
        for field, allowed in (("modality", (*MODALITIES, None)), ("units", UNITS), ("view", (*VIEWS, None))):
            if getattr(self, field) not in allowed:
                raise ValueError(f"ChestImage.{field}: got {getattr(self, field)!r}, expected one of {allowed}")

    def take(self, numbers: Any) -> "ChestImage":
        """Decode some slices into memory.

        Args:
            numbers: Increasing slice numbers, (n,).

        Returns:
            An image of these slices that knows which they are.
        """
        numbers = np.asarray(numbers)
        before = self.slice_numbers
        pixels = np.ascontiguousarray(self.pixels[numbers])
        noticed = self.pixels.remarks if isinstance(self.pixels, LazyPixels) else ()
        return replace(
            self,
            pixels=pixels,
            remarks=(*self.remarks, *noticed),
            slice_numbers=tuple(int(n) if before is None else before[n] for n in numbers),
            source_slices=self.source_slices or len(self.pixels),
        )

    def remarked(self, *remarks: Remark) -> "ChestImage":
        """Return the image with further remarks."""
        return replace(self, remarks=(*self.remarks, *remarks))


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
    low, high = stretch_range(pixels if valid is None or not valid.any() else pixels[valid], percentiles)
    if not high > low:
        return np.zeros_like(pixels)
    if not np.isfinite(np.float32(high - low)):  # the ends of float32: their difference is no number
        pixels, low, high = pixels / 4, low / 4, high / 4
    return np.clip((pixels - np.float32(low)) / np.float32(high - low), 0, 1)


def stretch_range(values: np.ndarray, percentiles: tuple[float, float] | None) -> tuple[float, float]:
    """Return the two values that become black and white when `values`, of any shape, are stretched."""
    low, high = float(values.min()), float(values.max())
    if percentiles is not None:
        inner_low, inner_high = np.percentile(values, percentiles)
        # A bright marker on an even ground has equal percentiles: the whole range is then the better choice.
        if inner_high > inner_low:
            low, high = float(inner_low), float(inner_high)
    return low, high


def bad_source(name: str, reason: str) -> ValueError:
    """Return the error for a source that cannot be read, to be raised."""
    return ValueError(f"{name}: {reason}")


def finished(
    name: str,
    pixels: np.ndarray | LazyPixels,
    *,
    modality: str | None = None,
    units: str = "intensity",
    view: str | None = None,
    spacing: tuple[float, float, float] | None = None,
    remarks: tuple[Remark, ...] = (),
) -> ChestImage:
    """Check the size and build the image. `pixels` is (S, H, W)."""
    if 0 in pixels.shape:
        raise bad_source(name, f"image of size {tuple(pixels.shape)}, expected at least one pixel")
    if not isinstance(pixels, LazyPixels):
        pixels = np.ascontiguousarray(pixels, dtype=np.float32)
    return ChestImage(pixels, modality, units, view, spacing, remarks)


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
