# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Small synthetic DICOM data sets: `radiograph`, `ct_slice`, `enhanced_ct`, and `dicom_bytes` to write them.

Every maker takes DICOM keywords as keyword arguments, which win over what it would write; None leaves a tag out.
"""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import UID, ExplicitVRBigEndian, ExplicitVRLittleEndian, JPEGBaseline8Bit

RAMP = np.arange(40 * 48, dtype=np.uint16).reshape(40, 48)  # (H, W), no two pixels alike; JPEG 2000 needs 32 rows
SECRET = "DOE^JANE"
AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)  # rows run to the patient's left, columns to posterior

_ROOT = "1.2.826.0.1.3680043.8.498"
_RADIOGRAPH_STORAGE = "1.2.840.10008.5.1.4.1.1.1"
_CT_STORAGE = "1.2.840.10008.5.1.4.1.1.2"
_ENHANCED_CT_STORAGE = "1.2.840.10008.5.1.4.1.1.2.1"


def radiograph(
    pixels: np.ndarray = RAMP,
    *,
    syntax: str = ExplicitVRLittleEndian,
    photometric: str | None = None,
    bits_stored: int | None = None,
    high_bit: int | None = None,
    **tags: Any,
) -> Dataset:
    """Make a radiograph (CR) of one frame, or of several.

    Args:
        pixels: (H, W), (F, H, W), and with a last axis of 3 colour. Its type gives bits allocated and signedness;
            float32 and float64 become FloatPixelData and DoubleFloatPixelData.
        syntax: Transfer syntax; RLE, JPEG-LS, JPEG 2000 (with their plugins) and JPEG baseline are encoded.
        photometric: MONOCHROME2 or RGB unless given.
        bits_stored: All bits unless given.
        high_bit: One less than `bits_stored` unless given; the values are shifted up to it.
        **tags: Further tags by keyword.
    """
    return _dataset(
        pixels,
        syntax,
        photometric,
        bits_stored,
        high_bit,
        {"SOPClassUID": _RADIOGRAPH_STORAGE, "PatientName": SECRET, "Modality": "CR"} | tags,
    )


def ct_slice(
    pixels: np.ndarray | None = None,
    *,
    position: tuple[float, float, float] = (0.0, 0.0, 0.0),
    orientation: tuple[float, ...] = AXIAL,
    spacing: tuple[float, float] = (0.8, 0.7),
    thickness: float = 1.5,
    rescale: tuple[float, float] | None = (1.0, -1024.0),
    series: int = 1,
    number: int = 1,
    syntax: str = ExplicitVRLittleEndian,
    photometric: str | None = None,
    bits_stored: int | None = None,
    high_bit: int | None = None,
    **tags: Any,
) -> Dataset:
    """Make one slice of a CT series.

    Args:
        pixels: (H, W) stored values; a ramp unless given.
        position: ImagePositionPatient in mm: x to the left, y to posterior, z to superior.
        orientation: ImageOrientationPatient: direction along a row, then down a column.
        spacing: Millimetres between rows, then between columns.
        thickness: SliceThickness in mm.
        rescale: Slope and intercept to HU, or None for none.
        series: Slices with the same number share study, series and frame of reference.
        number: InstanceNumber.
        syntax: As `radiograph`.
        photometric: As `radiograph`.
        bits_stored: As `radiograph`.
        high_bit: As `radiograph`.
        **tags: Further tags by keyword.
    """
    values = {
        "SOPClassUID": _CT_STORAGE,
        "SOPInstanceUID": f"{_ROOT}.{series}.{number}",
        "StudyInstanceUID": f"{_ROOT}.1000",
        "SeriesInstanceUID": f"{_ROOT}.1000.{series}",
        "FrameOfReferenceUID": f"{_ROOT}.2000.{series}",
        "PatientName": SECRET,
        "PatientID": SECRET,
        "Modality": "CT",
        "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"],
        "InstanceNumber": number,
        "SeriesNumber": series,
        "ImagePositionPatient": list(position),
        "ImageOrientationPatient": list(orientation),
        "PixelSpacing": list(spacing),
        "SliceThickness": thickness,
        "RescaleSlope": rescale and rescale[0],
        "RescaleIntercept": rescale and rescale[1],
    }
    pixels = RAMP.astype(np.int16) if pixels is None else pixels
    return _dataset(pixels, syntax, photometric, bits_stored, high_bit, values | tags)


def enhanced_ct(
    volume: np.ndarray | None = None,
    *,
    positions: list[tuple[float, float, float]] | None = None,
    orientation: tuple[float, ...] = AXIAL,
    spacing: tuple[float, float] = (0.8, 0.7),
    thickness: float = 1.5,
    rescales: list[tuple[float, float]] | None = None,
    window: tuple[float, float] | None = None,
    syntax: str = ExplicitVRLittleEndian,
    bits_stored: int | None = None,
    **tags: Any,
) -> Dataset:
    """Make an enhanced multi-frame CT.

    Args:
        volume: (F, H, W) stored values in the order of the file; three ramps unless given.
        positions: ImagePositionPatient of each frame; every 2 mm to superior unless given.
        orientation: ImageOrientationPatient, shared.
        spacing: Millimetres between rows, then between columns, shared.
        thickness: SliceThickness, shared.
        rescales: Slope and intercept of each frame; one pair is shared; (1, -1024) unless given, [] for none.
        window: Centre and width, shared.
        syntax: As `radiograph`.
        bits_stored: As `radiograph`.
        **tags: Further tags by keyword.
    """
    volume = np.stack([RAMP, RAMP + 1, RAMP + 2]).astype(np.int16) if volume is None else volume
    positions = [(0.0, 0.0, 2.0 * i) for i in range(len(volume))] if positions is None else positions
    rescales = [(1.0, -1024.0)] if rescales is None else rescales
    shared = Dataset()
    shared.PlaneOrientationSequence = [item(ImageOrientationPatient=list(orientation))]
    shared.PixelMeasuresSequence = [item(PixelSpacing=list(spacing), SliceThickness=thickness)]
    if len(rescales) == 1:
        shared.PixelValueTransformationSequence = [_rescale(*rescales[0])]
    if window is not None:
        shared.FrameVOILUTSequence = [item(WindowCenter=window[0], WindowWidth=window[1])]
    frames = []
    for i, position in enumerate(positions):
        frame = Dataset()
        frame.PlanePositionSequence = [item(ImagePositionPatient=list(position))]
        frame.FrameContentSequence = [item(InStackPositionNumber=i + 1, StackID="1")]
        if len(rescales) > 1:
            frame.PixelValueTransformationSequence = [_rescale(*rescales[i])]
        frames.append(frame)
    values = {
        "SOPClassUID": _ENHANCED_CT_STORAGE,
        "SOPInstanceUID": f"{_ROOT}.9.1",
        "StudyInstanceUID": f"{_ROOT}.1000",
        "SeriesInstanceUID": f"{_ROOT}.1000.9",
        "FrameOfReferenceUID": f"{_ROOT}.2000.9",
        "PatientName": SECRET,
        "PatientID": SECRET,
        "Modality": "CT",
        "ImageType": ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"],
        "NumberOfFrames": len(volume),
        "SharedFunctionalGroupsSequence": [shared],
        "PerFrameFunctionalGroupsSequence": frames,
    }
    return _dataset(volume, syntax, None, bits_stored, None, values | tags)


def item(**tags: Any) -> Dataset:
    """Make an item of a sequence."""
    made = Dataset()
    _set(made, tags)
    return made


def lut(descriptor: list[int], values: np.ndarray, vr: str = "OW") -> Dataset:
    """Make the item of a modality or VOI LUT, its table as bytes (OW) or as numbers (US)."""
    made = item(LUTDescriptor=descriptor)
    made.add_new("LUTData", vr, values.tobytes() if vr == "OW" else values.tolist())
    return made


def dicom_bytes(dataset: Dataset, *, preamble: bool = True, meta: bool = True) -> bytes:
    """Write a data set of the makers.

    Args:
        dataset: The data set.
        preamble: Write the 128 bytes and "DICM" before the file meta information.
        meta: Write the file meta information; without it nothing says the transfer syntax.
    """
    buffer = io.BytesIO()
    syntax = UID(dataset.file_meta.TransferSyntaxUID)
    pydicom.dcmwrite(
        buffer,
        dataset,
        enforce_file_format=True,
        little_endian=None if syntax.is_transfer_syntax else True,
        implicit_vr=None if syntax.is_transfer_syntax else False,
    )
    data = buffer.getvalue()
    if not meta:
        # Group length (0002,0000) is the first element: 12 bytes, of which the last 4 count what follows.
        return data[132 + 12 + int.from_bytes(data[140:144], "little") :]
    return data if preamble else data[132:]


def write_dicom(path: Path, dataset: Dataset) -> Path:
    """Write a data set of the makers to a file and return its path."""
    path.write_bytes(dicom_bytes(dataset))
    return path


def _dataset(
    pixels: np.ndarray,
    syntax: str,
    photometric: str | None,
    bits_stored: int | None,
    high_bit: int | None,
    tags: dict[str, Any],
) -> Dataset:
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = tags.get("SOPClassUID") or _RADIOGRAPH_STORAGE
    dataset.file_meta.MediaStorageSOPInstanceUID = f"{_ROOT}.1"
    bits = 8 * pixels.itemsize
    stored = bits_stored or bits
    high = stored - 1 if high_bit is None else high_bit
    colour = pixels.ndim > 2 and pixels.shape[-1] == 3
    spatial = pixels.shape[:-1] if colour else pixels.shape
    is_float = pixels.dtype.kind == "f"
    values = {
        "SOPInstanceUID": f"{_ROOT}.1",
        "SamplesPerPixel": 3 if colour else 1,
        "PhotometricInterpretation": photometric or ("RGB" if colour else "MONOCHROME2"),
        "PlanarConfiguration": 0 if colour else None,
        "NumberOfFrames": spatial[0] if len(spatial) == 3 else None,
        "Rows": spatial[-2],
        "Columns": spatial[-1],
        "BitsAllocated": bits,
        "BitsStored": None if is_float else stored,
        "HighBit": None if is_float else high,
        "PixelRepresentation": None if is_float else int(pixels.dtype.kind == "i"),
    }
    data = _compressed_or_native(pixels << (high + 1 - stored) if high + 1 != stored else pixels, syntax)
    values["PixelData" if not is_float else "FloatPixelData" if bits == 32 else "DoubleFloatPixelData"] = data
    _set(dataset, values)
    if "PixelData" in dataset:
        dataset["PixelData"].VR = "OB" if bits == 8 or UID(syntax).is_compressed else "OW"
    if syntax in _ENCODED_BY_PYDICOM:
        dataset.compress(syntax, generate_instance_uid=False)
    _set(dataset, tags)
    dataset.file_meta.TransferSyntaxUID = syntax
    return dataset


_ENCODED_BY_PYDICOM = (
    pydicom.uid.RLELossless,
    pydicom.uid.JPEGLSLossless,
    pydicom.uid.JPEGLSNearLossless,
    pydicom.uid.JPEG2000Lossless,
)


def _set(dataset: Dataset, tags: dict[str, Any]) -> None:
    for keyword, value in tags.items():
        if value is not None:
            setattr(dataset, keyword, value)
        elif keyword in dataset:
            delattr(dataset, keyword)


def _compressed_or_native(pixels: np.ndarray, syntax: str) -> bytes:
    """Encode as pixel data; what pydicom compresses starts native."""
    if syntax == JPEGBaseline8Bit:
        frames = pixels if pixels.ndim > 2 and pixels.shape[-1] != 3 or pixels.ndim == 4 else pixels[None]
        return encapsulate([_jpeg(frame) for frame in frames])
    data = pixels.astype(pixels.dtype.newbyteorder(">" if syntax == ExplicitVRBigEndian else "<")).tobytes()
    return data + b"\0" * (len(data) % 2)


def _jpeg(frame: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def _rescale(slope: float, intercept: float) -> Dataset:
    return item(RescaleSlope=slope, RescaleIntercept=intercept, RescaleType="HU")
