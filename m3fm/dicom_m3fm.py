# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Read a DICOM file into a `ChestImage`.

Messages carry no value of any tag. Warnings and errors of pydicom do, so they are not passed on.
"""

import io
import warnings
from typing import Any

import numpy as np

from .chest_image_m3fm import (
    VIEWS,
    ChestImage,
    bad_source,
    check_voxels,
    finished,
    gray_from_uint8,
    stretch,
    without_nan,
)

AIR_HU = -1024.0

_RADIOGRAPHY = {"CR", "DX", "DR", "RG", "RF", "XA", "OT", "SC", ""}
_CT_STORAGE = ("1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.2.1", "1.2.840.10008.5.1.4.1.1.2.2")


def read_dicom(data: bytes, name: str, percentiles: tuple[float, float] | None) -> ChestImage:
    """Read a radiograph to 0..1 or a CT to HU; several frames become slices.

    Args:
        data: The whole file.
        name: What errors call it.
        percentiles: For radiographs without window, see `stretch`; None takes minimum and maximum.

    Returns:
        The image, with its modality and view.

    Raises:
        ValueError: If the file is damaged, has no pixels, has no installed decoder, or is of another modality.
        ImportError: If pydicom is missing.
    """
    pydicom = _import_pydicom(name)
    with warnings.catch_warnings(), pydicom.config.disable_value_validation():
        warnings.simplefilter("ignore")
        try:
            dataset = pydicom.dcmread(io.BytesIO(data), force=True)
            has_pixels = any(dataset.get(key) for key in ("PixelData", "FloatPixelData", "DoubleFloatPixelData"))
        except Exception:
            raise bad_source(name, "truncated or damaged DICOM file") from None
        if not has_pixels:
            raise bad_source(name, "DICOM without pixel data (or cut off before it)")
        modality = _modality(dataset, name)
        stored = _decode(dataset, name)
        try:
            pixels, units = _to_units(stored, dataset, modality, percentiles)
            view = _view(dataset)
        except Exception:
            raise bad_source(name, "DICOM attributes of the pixel values are damaged or contradictory") from None
    return finished(name, without_nan(pixels, name), modality=modality, units=units, view=view)


def _import_pydicom(name: str) -> Any:
    try:
        import pydicom
        import pydicom.pixels
    except ImportError as error:
        raise ImportError(f"{name}: reading DICOM needs pydicom: pip install m3fm[medical]") from error
    return pydicom


def _to_units(
    stored: np.ndarray, dataset: Any, modality: str, percentiles: tuple[float, float] | None
) -> tuple[np.ndarray, str]:
    """Bring stored values (S, H, W) or colour (S, H, W, 3) to (S, H, W) in HU or display intensity."""
    if stored.ndim == 4:
        return np.stack([gray_from_uint8(frame) for frame in stored]).astype(np.float32) / np.float32(255), "intensity"
    valid = _not_padding(stored, dataset)
    values = _rescaled(stored, dataset)
    if modality == "ct" and not _is_screenshot(dataset):
        return (values if valid is None else np.where(valid, values, np.float32(AIR_HU))), "hu"
    return _displayed(stored, values, valid, dataset, percentiles), "intensity"


def _modality(dataset: Any, name: str) -> str:
    declared = str(dataset.get("Modality") or "").strip().upper()
    if declared == "CT" or (not declared and str(dataset.get("SOPClassUID", "")) in _CT_STORAGE):
        return "ct"
    if not declared and dataset.get("PixelRepresentation") == 1 and dataset.get("RescaleIntercept") is not None:
        return "ct"  # stripped of its identity, yet signed values with a rescale are HU: radiographs are unsigned
    if declared in _RADIOGRAPHY:
        return "cxr"
    raise bad_source(name, "DICOM of another modality, expected radiography (CR, DX, RG, RF, XA, OT, SC) or CT")


def _view(dataset: Any) -> str | None:
    declared = str(dataset.get("ViewPosition") or "").strip().upper()
    declared = {"LL": "LATERAL", "RL": "LATERAL", "LAT": "LATERAL"}.get(declared, declared)
    return declared if declared in VIEWS else None


def _decode(dataset: Any, name: str) -> np.ndarray:
    """Decode to (S, H, W), or (S, H, W, 3) uint8 for colour."""
    try:
        frames = int(dataset.get("NumberOfFrames") or 1)
        colour = int(dataset.get("SamplesPerPixel") or 1) > 1
        rows, columns = int(dataset.Rows), int(dataset.Columns)
    except Exception:
        raise bad_source(name, "DICOM without image size") from None
    if rows < 1 or columns < 1 or frames < 1:
        raise bad_source(name, f"image of size {(frames, rows, columns)}, expected at least one pixel")
    check_voxels(name, frames, rows, columns)
    try:
        array = dataset.pixel_array
        if dataset.get("PhotometricInterpretation") == "PALETTE COLOR":
            array, colour = _import_pydicom("DICOM").pixels.apply_color_lut(array, dataset), True
    except Exception:
        raise bad_source(name, _undecodable(dataset)) from None
    if colour and array.dtype != np.uint8:
        array = (array >> (8 * (array.itemsize - 1))).astype(np.uint8)
    return array if frames > 1 else array[None]


def _undecodable(dataset: Any) -> str:
    """Say why the pixels did not decode: no plugin for the compression, or damage."""
    syntax = getattr(getattr(dataset, "file_meta", None), "TransferSyntaxUID", None)
    try:
        decoder = _import_pydicom("DICOM").pixels.get_decoder(syntax) if syntax.is_compressed else None
    except NotImplementedError:
        return "DICOM compressed in a way that pydicom does not decode"
    except (AttributeError, ValueError):  # no transfer syntax, or one that DICOM does not define
        decoder = None
    if decoder is None or decoder.is_available:
        return "truncated or damaged DICOM pixel data"
    return f"compressed as {syntax.name}, for which no decoder is installed: {'; '.join(decoder.missing_dependencies)}"


def _not_padding(stored: np.ndarray, dataset: Any) -> np.ndarray | None:
    """Find pixels outside PixelPaddingValue..PixelPaddingRangeLimit, or None where none is declared."""
    value = dataset.get("PixelPaddingValue")
    if value is None:
        return None
    limit = dataset.get("PixelPaddingRangeLimit")
    low, high = sorted((int(value), int(value if limit is None else limit)))
    valid = (stored < low) | (stored > high)
    return valid if valid.any() else None


def _rescaled(stored: np.ndarray, dataset: Any) -> np.ndarray:
    """Apply the modality transform, also where enhanced multi-frame files keep it: (S, H, W) float32."""
    if "ModalityLUTSequence" in dataset:
        return np.asarray(_import_pydicom("DICOM").pixels.apply_modality_lut(stored, dataset), dtype=np.float32)
    values = stored.astype(np.float32)
    if dataset.get("RescaleSlope") is not None:
        return values * np.float32(dataset.RescaleSlope) + np.float32(dataset.get("RescaleIntercept") or 0)
    shared = dataset.get("SharedFunctionalGroupsSequence") or [{}]
    per_frame = dataset.get("PerFrameFunctionalGroupsSequence") or []
    for i in range(len(values)):
        for group in (per_frame[i] if i < len(per_frame) else {}, shared[0]):
            transform = group.get("PixelValueTransformationSequence")
            if transform:
                slope, intercept = transform[0].RescaleSlope, transform[0].RescaleIntercept
                values[i] = values[i] * np.float32(slope) + np.float32(intercept)
                break
    return values


def _is_screenshot(dataset: Any) -> bool:
    """Tell a captured display, windowed already, from measured HU: at most 8 bits and no rescale."""
    return int(dataset.get("BitsStored") or 16) <= 8 and dataset.get("RescaleSlope") is None


def _displayed(
    stored: np.ndarray,
    values: np.ndarray,
    valid: np.ndarray | None,
    dataset: Any,
    percentiles: tuple[float, float] | None,
) -> np.ndarray:
    """Bring a radiograph to 0..1 by its VOI LUT, its window, its 8 bits, or percentiles, in that order."""
    pixels = _voi(values, dataset)
    if pixels is None or pixels.min() == pixels.max():  # a window beside the data would show nothing
        bits = int(dataset.get("BitsStored") or 16)
        if bits <= 8 and stored.dtype.kind == "u" and pixels is None:
            pixels = stored.astype(np.float32) / np.float32(2**bits - 1)
        else:
            pixels = stretch(values, percentiles, valid)
    if dataset.get("PhotometricInterpretation") == "MONOCHROME1":
        pixels = 1 - pixels
    return pixels if valid is None else np.where(valid, pixels, np.float32(0))


def _voi(values: np.ndarray, dataset: Any) -> np.ndarray | None:
    """Apply the first VOI LUT or window of the file: float32 in 0..1, or None where there is no usable one.

    Source: DICOM PS3.3 C.11.2. The window is applied in closed form and not by pydicom, which returns the range of
    the stored bits and not 0..1.
    """
    if dataset.get("VOILUTSequence"):
        descriptor = dataset.VOILUTSequence[0].LUTDescriptor
        mapped = _import_pydicom("DICOM").pixels.apply_voi(values.astype(np.int64), dataset)
        return np.clip(mapped.astype(np.float32) / np.float32(2 ** int(descriptor[2]) - 1), 0, 1)
    center, width = _first(dataset.get("WindowCenter")), _first(dataset.get("WindowWidth"))
    if center is None or width is None:
        return None
    function = str(dataset.get("VOILUTFunction") or "LINEAR").strip().upper()
    if function == "SIGMOID" and width > 0:
        return 1 / (1 + np.exp(np.clip(-4 * (values - center) / width, -80, 80), dtype=np.float32))
    if function == "LINEAR_EXACT" and width > 0:
        return np.clip((values - center) / width + 0.5, 0, 1)
    if function == "LINEAR" and width > 1:
        return np.clip((values - (center - 0.5)) / (width - 1) + 0.5, 0, 1)
    return None


def _first(value: Any) -> np.float32 | None:
    """Return the first of one or several numbers as float32, or None."""
    values = [value] if value is None or np.isscalar(value) else list(value)
    return None if not values or values[0] in (None, "") else np.float32(values[0])
