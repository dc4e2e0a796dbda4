# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Read chest images without the package, by tools of their own: SimpleITK, dcm2niix, imagecodecs, tifffile, libjpeg.

Letters: S slices, H rows, W columns. Every reader returns values as the tool gives them, (S, H, W) float64 or colour
(S, H, W, 3), in radiological display where the tool knows the geometry.
"""

import io
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import imagecodecs
import libjpeg
import numpy as np
import pydicom
import pydicom.encaps
import SimpleITK as sitk  # noqa: N813
import tifffile

_LUMA = np.array([0.299, 0.587, 0.114])
_JPEG = "1.2.840.10008.1.2.4"
# By the end of the transfer syntax.
_CODECS = (
    ((".50", ".51", ".57", ".70"), imagecodecs.jpeg_decode),
    ((".80", ".81"), imagecodecs.jpegls_decode),
    ((".90", ".91"), imagecodecs.jpeg2k_decode),
    ((".201", ".202", ".203"), imagecodecs.htj2k_decode),
)


class NoReadingError(Exception):
    """Say that a tool cannot read a file."""


# --------------------------------------------------------------------------------------------------------------------
# Medical files


def by_simpleitk(source: Path | list[Path]) -> np.ndarray:
    """Read DICOM (GDCM) or NIfTI by ITK; a list of slices as a series that is in order.

    Raises:
        NoReadingError: If ITK cannot.
    """
    try:
        if isinstance(source, list):
            image = sitk.ReadImage([str(path) for path in source])
        else:
            image = sitk.ReadImage(str(source))
        if image.GetDimension() == 4:
            image = image[..., 0]
        if image.GetDimension() == 3 and min(image.GetSize()[:2]) > 1:
            image = sitk.DICOMOrient(image, "LPS")
    except RuntimeError as error:
        raise NoReadingError(_first_line(error)) from None
    values = sitk.GetArrayFromImage(image)
    if image.GetDimension() == 2:
        if not isinstance(source, list) and ".nii" in source.name:
            raise NoReadingError("2-D: not oriented")
        values = values[None]
    return values.astype(np.float64)


def dicom_by_simpleitk(path: Path, header: pydicom.Dataset) -> np.ndarray:
    """Read a DICOM file by ITK, and undo what GDCM changes on the way: MONOCHROME1 and single bits."""
    values = by_simpleitk(path)
    if header.get("PhotometricInterpretation") == "MONOCHROME1":
        slope, intercept = float(header.get("RescaleSlope") or 1), float(header.get("RescaleIntercept") or 0)
        values = (2.0 ** int(header.BitsStored) - 1 - (values - intercept) / slope) * slope + intercept
    return (values > 0).astype(np.float64) if header.get("BitsAllocated") == 1 else values


def series_by_simpleitk(folder: Path) -> np.ndarray:
    """Read the largest series of a folder as ITK orders it."""
    reader = sitk.ImageSeriesReader()
    series = [reader.GetGDCMSeriesFileNames(str(folder), key) for key in reader.GetGDCMSeriesIDs(str(folder))]
    return by_simpleitk([Path(name) for name in max(series, key=len)])


def by_dcm2niix(folder: Path, scratch: Path) -> np.ndarray:
    """Convert the DICOM files of a folder to NIfTI by dcm2niix, and read its largest volume by ITK.

    Raises:
        NoReadingError: If dcm2niix converts nothing.
    """
    for old in scratch.glob("*.nii"):
        old.unlink()
    # Beside Python, where pip puts it, unless it is on the path.
    program = shutil.which("dcm2niix") or str(Path(sys.executable).parent / "dcm2niix")
    command = [program, "-z", "n", "-b", "n", "-m", "n", "-f", "%s_%n", "-o", str(scratch), str(folder)]
    subprocess.run(command, capture_output=True, check=False, timeout=120)
    # Where slices are unevenly spaced it writes an "_Eq" volume of even ones beside the original.
    volumes = [by_simpleitk(path) for path in sorted(scratch.glob("*.nii")) if "_Eq" not in path.name]
    if not volumes:
        raise NoReadingError("dcm2niix converts nothing")
    return max(volumes, key=len)


def by_codecs(data: bytes) -> np.ndarray:
    """Decode the frames of a DICOM file by imagecodecs or, uncompressed, by numpy; pydicom only parses.

    Raises:
        NoReadingError: If it cannot be decoded so.
    """
    dataset = pydicom.dcmread(io.BytesIO(data), force=True)
    syntax = str(dataset.file_meta.get("TransferSyntaxUID", ""))
    if dataset.SamplesPerPixel > 1 and syntax.endswith(".50"):
        raise NoReadingError("whether its colours are transformed is left open")
    decode = next((codec for ends, codec in _CODECS if syntax.startswith(_JPEG) and syntax.endswith(ends)), None)
    try:
        count = int(dataset.get("NumberOfFrames") or 1)
        if syntax == pydicom.uid.RLELossless:
            frames = pydicom.encaps.generate_frames(dataset.PixelData, number_of_frames=count)
            values = np.stack([_run_lengths(frame, dataset) for frame in frames])
        elif decode is not None:
            frames = pydicom.encaps.generate_frames(dataset.PixelData, number_of_frames=count)
            values = np.stack([decode(frame) for frame in frames])
        else:
            values = _plain(dataset, count)
    except NoReadingError:
        raise
    except Exception as error:
        raise NoReadingError(_first_line(error)) from None
    bits = int(dataset.BitsStored)
    if dataset.PixelRepresentation == 1:
        values = values.astype(np.int64) & ((1 << bits) - 1)
        values = np.where(values & (1 << (bits - 1)), values - (1 << bits), values)
    slope, intercept = dataset.get("RescaleSlope"), dataset.get("RescaleIntercept")
    return values.astype(np.float64) * float(slope or 1) + float(intercept or 0)


def _run_lengths(frame: bytes, dataset: pydicom.Dataset) -> np.ndarray:
    """Put the byte planes of an RLE frame together (PS3.5 Annex G)."""
    count, *offsets = struct.unpack_from("<16I", frame)
    ends = [*offsets[1:count], len(frame)]
    size = dataset.Rows * dataset.Columns
    planes = [
        np.frombuffer(imagecodecs.packbits_decode(frame[start:end])[:size], np.uint8)
        for start, end in zip(offsets[:count], ends, strict=True)
    ]
    samples = dataset.SamplesPerPixel
    words = np.stack(planes).reshape(samples, -1, size).transpose(2, 0, 1)  # most significant byte first
    values = np.ascontiguousarray(words).view(f">u{words.shape[-1]}").reshape(dataset.Rows, dataset.Columns, samples)
    return values if samples > 1 else values[..., 0]


def _plain(dataset: pydicom.Dataset, count: int) -> np.ndarray:
    """Interpret uncompressed values of whole bytes, without subsampled colour or a palette."""
    photometric, samples, bits = dataset.PhotometricInterpretation, dataset.SamplesPerPixel, dataset.BitsAllocated
    if photometric not in ("MONOCHROME1", "MONOCHROME2", "RGB") or bits % 8 or "PixelData" not in dataset:
        raise NoReadingError("left to ITK")
    order = ">" if dataset.file_meta.get("TransferSyntaxUID") == pydicom.uid.ExplicitVRBigEndian else "<"
    size = count * dataset.Rows * dataset.Columns * samples
    data = dataset.PixelData
    if bits == 8 and order == ">" and dataset["PixelData"].VR == "OW":  # words of two pixels
        data = np.frombuffer(data, "<u2").byteswap().tobytes()
    values = np.frombuffer(data, f"{order}u{bits // 8}", size)
    if samples == 1:
        return values.reshape(count, dataset.Rows, dataset.Columns)
    if dataset.PlanarConfiguration == 1:
        return np.moveaxis(values.reshape(count, samples, dataset.Rows, dataset.Columns), 1, -1)
    return values.reshape(count, dataset.Rows, dataset.Columns, samples)


# --------------------------------------------------------------------------------------------------------------------
# Rasters


def by_codec(data: bytes, format: str) -> np.ndarray:
    """Decode a raster as it is stored: (H, W), (H, W, C) or pages (S, H, W), in its own type.

    Raises:
        NoReadingError: If the decoder cannot.
    """
    decoders = {
        "png": imagecodecs.png_decode,
        "jpeg": lambda stream: libjpeg.decode(stream, colour_transform=1),
        "bmp": imagecodecs.bmp_decode,
        "webp": imagecodecs.webp_decode,
        "tiff": _tiff,
    }
    try:
        return decoders[format](data)
    except Exception as error:
        raise NoReadingError(_first_line(error)) from None


def _tiff(data: bytes) -> np.ndarray:
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        values = file.asarray()
        if file.pages[0].photometric == tifffile.PHOTOMETRIC.MINISWHITE:
            values = np.iinfo(values.dtype).max - values
        return values


# --------------------------------------------------------------------------------------------------------------------
# Arithmetic from values to display


def gray(values: np.ndarray, top: float) -> np.ndarray:
    """Turn colour with or without opacity (..., 2 to 4 channels) into luma over black, in the range of the input."""
    channels = values.shape[-1]
    opacity = values[..., -1].astype(np.float64) / top if channels in (2, 4) else 1.0
    luma = values[..., 0] if channels == 2 else values[..., :3].astype(np.float64) @ _LUMA
    return luma * opacity


def stretched(values: np.ndarray, valid: np.ndarray | None = None) -> np.ndarray:
    """Map the 0.5th and 99.5th percentile to 0 and 1, or minimum and maximum where these are equal."""
    counted = values if valid is None else values[valid]
    low, high = np.percentile(counted, (0.5, 99.5))
    if high <= low:
        low, high = counted.min(), counted.max()
    return np.clip((values - low) / max(high - low, 1e-12), 0, 1)


def displayed(values: np.ndarray, header: pydicom.Dataset, *, use_window: bool) -> np.ndarray:
    """Bring the values (S, H, W) of a radiograph to 0..1 by the tags (PS3.3 C.11.2), read by pydicom.

    Args:
        values: After the modality transform; of colour (S, H, W, 3) luma is taken.
        header: The file's tags.
        use_window: Whether the first window or table is used, or the range of the values.
    """
    if values.ndim == 4:
        top = 2.0 ** int(header.get("BitsAllocated", 8)) - 1 if values.max() > 255 else 255.0
        return gray(values, top) / top
    valid = np.ones(values.shape, bool)
    padding = header.get("PixelPaddingValue")
    if padding is not None and (values == padding).any() and not (values == padding).all():
        valid = values != padding
    pixels = _windowed(values, header) if use_window else None
    bits = int(header.get("BitsStored", 16))
    if pixels is None and bits <= 8 and header.get("PixelRepresentation", 0) == 0:
        pixels = values / (2**bits - 1)
    if pixels is None:
        pixels = np.stack([stretched(*pair) for pair in zip(values, valid, strict=True)])
    if header.get("PhotometricInterpretation") == "MONOCHROME1":
        pixels = 1 - pixels
    return np.where(valid, pixels, 0)


def _windowed(values: np.ndarray, header: pydicom.Dataset) -> np.ndarray | None:
    if header.get("VOILUTSequence"):
        item = header.VOILUTSequence[0]
        _, first, bits = item.LUTDescriptor
        raw = item.LUTData
        table = np.frombuffer(raw, "<u2") if isinstance(raw, bytes) else np.asarray(raw)
        return table[np.clip(values - first, 0, len(table) - 1).astype(int)] / (2.0**bits - 1)
    center, width = (_first_number(header.get(key)) for key in ("WindowCenter", "WindowWidth"))
    if center is None or width is None:
        return None
    function = header.get("VOILUTFunction", "LINEAR")
    if function == "SIGMOID":
        return 1 / (1 + np.exp(-4 * (values - center) / width))
    if function == "LINEAR_EXACT":
        return np.clip((values - center) / width + 0.5, 0, 1)
    return np.clip((values - (center - 0.5)) / (width - 1) + 0.5, 0, 1)


def _first_number(value: Any) -> float | None:
    values = [value] if value is None or np.isscalar(value) else list(value)
    return float(values[0]) if values and values[0] is not None else None


def _first_line(error: Exception) -> str:
    """Return what kind of failure it was; messages of tools quote the paths and tags of files."""
    return type(error).__name__
