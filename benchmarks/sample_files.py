# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Make small chest-like files of every format on the spot, from pixels that are known.

Every file carries `MARKS` wherever its format has room for text: none of them may come out of a reader.
"""

import gzip
import io
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import distributions

import imagecodecs
import nibabel
import numpy as np
import pydicom
import pydicom.encaps
import pydicom.uid
import tifffile
from PIL import Image, PngImagePlugin

# As a name, in an identifier, as a date.
MARKS = ("ZQXMARK", "9.87654321", "18991231")
CR_STORAGE = "1.2.840.10008.5.1.4.1.1.1"
CT_STORAGE = "1.2.840.10008.5.1.4.1.1.2"
SC_STORAGE = "1.2.840.10008.5.1.4.1.1.7"

_NAME, _UID, _DATE = MARKS[0] + "^JANE", MARKS[1] + ".1", MARKS[2]
IDENTIFIERS = {
    "PatientName": _NAME,
    "PatientID": MARKS[0],
    "PatientBirthDate": _DATE,
    "PatientComments": MARKS[0],
    "StudyDate": _DATE,
    "StudyDescription": MARKS[0],
    "SeriesDescription": MARKS[0],
    "InstitutionName": MARKS[0],
    "ReferringPhysicianName": _NAME,
    "AccessionNumber": MARKS[0],
    "ImageComments": MARKS[0],
    "StudyInstanceUID": _UID,
    "SeriesInstanceUID": _UID + ".2",
    "SOPInstanceUID": _UID + ".3",
    "FrameOfReferenceUID": _UID + ".4",
}


# What reads and writes the pixels.
CODECS = (
    *("pydicom", "nibabel", "pillow", "tifffile", "imagecodecs", "pyjpegls", "pylibjpeg", "pylibjpeg-openjpeg"),
    *("pylibjpeg-libjpeg", "python-gdcm", "SimpleITK", "dcm2niix"),
)


def codec_versions() -> dict[str, str]:
    """Return the versions of the installed libraries that pixels depend on."""
    installed = {each.metadata["Name"].lower(): each.version for each in distributions()}
    return {name: installed[name.lower()] for name in CODECS if name.lower() in installed}


@dataclass(frozen=True)
class Sample:
    """Hold one file in memory.

    Attributes:
        format: "dicom", "nifti", "png", "jpeg", "tiff", "bmp" or "webp".
        kind: What is special about it.
        data: The file.
        values: What was encoded: stored values (H, W) or (S, H, W), colour with a last axis; NIfTI (x, y, z).
        lossy: Whether the encoding changes values.
    """

    format: str
    kind: str
    data: bytes
    values: np.ndarray
    lossy: bool = False


def phantom(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Draw two dark lungs in a bright body on black, with grain: (rows, columns) float64 in 0..1."""
    y, x = np.mgrid[-1 : 1 : rows * 1j, -1 : 1 : columns * 1j]
    body = ((x / 0.9) ** 2 + (y / 0.95) ** 2 < 1) * 0.75
    for side in (-0.42, 0.42):
        body[((x - side) / 0.3) ** 2 + (y / 0.65) ** 2 < 1] = 0.2
    grain = np.random.default_rng(seed).normal(0, 0.02, (rows, columns))
    return np.clip(body + 0.15 * (x + 1) / 2 * (body > 0) + grain * (body > 0), 0, 1)


def ct_values(slices: int, rows: int, columns: int) -> np.ndarray:
    """Return stored CT values (S, H, W) uint16 below 4096; less 1024 they are Hounsfield units."""
    planes = [phantom(rows, columns, seed) * (0.6 + 0.4 * (seed + 1) / slices) for seed in range(slices)]
    return np.round(np.stack(planes) * 2000).astype(np.uint16)


def dicom_file(
    pixels: np.ndarray, syntax: str = pydicom.uid.ExplicitVRLittleEndian, frames: list[bytes] | None = None, **tags
) -> bytes:
    """Write a DICOM file with planted identifiers.

    Args:
        pixels: (H, W), (S, H, W), or colour (H, W, 3) uint8.
        syntax: Transfer syntax UID.
        frames: The encoded frames, where the syntax compresses and pydicom does not.
        **tags: By keyword; None leaves one out.
    """
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    colour = pixels.ndim == 3 and pixels.shape[-1] == 3
    spatial = pixels.shape[:-1] if colour else pixels.shape
    bits = 8 * pixels.itemsize
    values = IDENTIFIERS | {
        "SOPClassUID": CR_STORAGE,
        "Modality": "CR",
        "PhotometricInterpretation": "RGB" if colour else "MONOCHROME2",
        "SamplesPerPixel": 3 if colour else 1,
        "PlanarConfiguration": 0 if colour else None,
        "NumberOfFrames": spatial[0] if len(spatial) == 3 else None,
        "Rows": spatial[-2],
        "Columns": spatial[-1],
        "BitsAllocated": bits,
        "BitsStored": bits,
        "HighBit": tags.get("BitsStored", bits) - 1,
        "PixelRepresentation": int(pixels.dtype.kind == "i"),
    }
    for key, value in (values | tags).items():
        if value is not None:
            setattr(dataset, key, value)
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    if frames is not None:
        dataset.PixelData = pydicom.encaps.encapsulate(frames)
        dataset["PixelData"].VR = "OB"
    elif syntax == pydicom.uid.RLELossless:
        dataset.compress(syntax, pixels, generate_instance_uid=False)
    else:
        big = syntax == pydicom.uid.ExplicitVRBigEndian
        dataset.PixelData = pixels.astype(pixels.dtype.newbyteorder(">" if big else "<")).tobytes()
        if len(dataset.PixelData) % 2:
            dataset.PixelData += b"\0"
        dataset["PixelData"].VR = "OW" if bits > 8 else "OB"
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def ct_tags(position: float = 0.0, **more) -> dict:
    """Return the tags of an axial CT slice at a height in millimetres."""
    return {
        "SOPClassUID": CT_STORAGE,
        "Modality": "CT",
        "BitsStored": 12,
        "RescaleSlope": 1,
        "RescaleIntercept": -1024,
        "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
        "ImagePositionPatient": [-100, -100, position],
        "PixelSpacing": [0.75, 0.75],
        "SliceThickness": 1.25,
    } | more


# JPEG-family syntaxes: how imagecodecs writes a frame, and whether that loses anything.
_COMPRESSED = {
    "JPEG baseline": ("1.2.840.10008.1.2.4.50", lambda a: imagecodecs.jpeg8_encode(a, level=95), True),
    "JPEG lossless": ("1.2.840.10008.1.2.4.57", imagecodecs.ljpeg_encode, False),
    "JPEG lossless SV1": ("1.2.840.10008.1.2.4.70", imagecodecs.ljpeg_encode, False),
    "JPEG-LS": ("1.2.840.10008.1.2.4.80", imagecodecs.jpegls_encode, False),
    "JPEG-LS near": ("1.2.840.10008.1.2.4.81", lambda a: imagecodecs.jpegls_encode(a, level=2), True),
    "JPEG 2000": (
        "1.2.840.10008.1.2.4.90",
        lambda a: imagecodecs.jpeg2k_encode(a, codecformat="j2k", reversible=True),
        False,
    ),
    "JPEG 2000 lossy": ("1.2.840.10008.1.2.4.91", lambda a: imagecodecs.jpeg2k_encode(a, 45, codecformat="j2k"), True),
    "HTJ2K": ("1.2.840.10008.1.2.4.201", lambda a: imagecodecs.htj2k_encode(a, reversible=True), False),
}
_PLAIN = {
    "explicit little endian": pydicom.uid.ExplicitVRLittleEndian,
    "implicit little endian": pydicom.uid.ImplicitVRLittleEndian,
    "explicit big endian": pydicom.uid.ExplicitVRBigEndian,
    "deflated": pydicom.uid.DeflatedExplicitVRLittleEndian,
    "RLE": pydicom.uid.RLELossless,
}


def dicom_samples(rows: int, columns: int) -> Iterator[Sample]:
    """Write DICOM files: each transfer syntax that can be encoded here, 8 and 12 bits, and each pixel form."""
    gray = np.round(phantom(rows, columns) * 255).astype(np.uint8)
    deep = np.round(phantom(rows, columns) * 4000).astype(np.uint16)
    volume = ct_values(3, rows, columns)
    window = {"BitsStored": 12, "WindowCenter": 2000, "WindowWidth": 3500}
    for name, syntax in _PLAIN.items():
        yield Sample("dicom", f"radiograph, {name}", dicom_file(deep, syntax, **window), deep)
        yield Sample("dicom", f"CT of 3 frames, {name}", dicom_file(volume, syntax, **ct_tags()), volume)
    for name, (syntax, encode, lossy) in _COMPRESSED.items():
        yield Sample("dicom", f"8 bits, {name}", dicom_file(gray, syntax, [encode(gray)]), gray, lossy)
        if name == "JPEG baseline":
            continue
        data = dicom_file(deep, syntax, [encode(deep)], **window)
        yield Sample("dicom", f"radiograph, {name}", data, deep, lossy)
        data = dicom_file(volume, syntax, [encode(plane) for plane in volume], **ct_tags())
        yield Sample("dicom", f"CT of 3 frames, {name}", data, volume, lossy)
    extended = imagecodecs.jpeg_encode(deep, level=95, bitspersample=12)
    data = dicom_file(deep, "1.2.840.10008.1.2.4.51", [extended], **window)
    yield Sample("dicom", "radiograph, JPEG extended", data, deep, lossy=True)
    yield from _dicom_forms(rows, columns)


def _dicom_forms(rows: int, columns: int) -> Iterator[Sample]:
    """Write uncompressed radiographs and CT slices in the forms that their tags give pixel values."""
    gray = np.round(phantom(rows, columns) * 255).astype(np.uint8)
    deep = np.round(phantom(rows, columns) * 4000).astype(np.uint16)
    signed = (ct_values(1, rows, columns)[0].astype(np.int16) - 1024).astype(np.int16)
    colour = np.stack([gray, 255 - gray, gray // 2], axis=-1)
    twelve = {"BitsStored": 12}
    window = twelve | {"WindowCenter": 2000, "WindowWidth": 3500}
    lut = pydicom.Dataset()
    lut.LUTDescriptor, lut.LUTData = [4096, 0, 12], (np.arange(4096) ** 2 // 4096).astype(np.uint16).tobytes()
    lut["LUTDescriptor"].VR, lut["LUTData"].VR = "US", "OW"
    forms = {
        "no window": (deep, twelve),
        "MONOCHROME1": (deep, window | {"PhotometricInterpretation": "MONOCHROME1"}),
        "sigmoid window": (deep, window | {"VOILUTFunction": "SIGMOID"}),
        "exact window": (deep, window | {"VOILUTFunction": "LINEAR_EXACT"}),
        "two windows": (deep, twelve | {"WindowCenter": [2000, 1000], "WindowWidth": [3500, 500]}),
        "VOI LUT": (deep, twelve | {"VOILUTSequence": [lut]}),
        "8 bits": (gray, {}),
        "RGB": (colour, {"SOPClassUID": SC_STORAGE, "Modality": "OT"}),
        "padding": (deep, window | {"PixelPaddingValue": 0}),
        "CT, signed": (signed, ct_tags(RescaleIntercept=0, BitsStored=16)),
        "CT, fractional rescale": (signed, ct_tags(RescaleSlope=0.5, RescaleIntercept=-24.25, BitsStored=16)),
        "CT, padding": (signed, ct_tags(PixelPaddingValue=-1024, RescaleIntercept=0, BitsStored=16)),
    }
    for name, (pixels, tags) in forms.items():
        yield Sample("dicom", name, dicom_file(pixels, **tags), pixels)


def nifti_samples(rows: int, columns: int) -> Iterator[Sample]:
    """Write NIfTI-1 and -2, plain and gzipped, of several types, axes and scales."""
    values = ct_values(5, rows, columns).astype(np.int16).T - 1024  # (x, y, z)
    affines = {
        "RAS": np.diag([0.8, 0.8, 2, 1]),
        "LPS": np.diag([-0.8, -0.8, 2, 1]),
        "tilted": np.array([[0.8, 0, 0, -9], [0, 0.75, -0.5, 4], [0, 0.28, 1.9, 7], [0, 0, 0, 1]]),
        "coronal": np.array([[0.8, 0, 0, 0], [0, 0, 2, 0], [0, -0.8, 0, 0], [0, 0, 0, 1.0]]),
    }
    for kind, cls in (("NIfTI-1", nibabel.Nifti1Image), ("NIfTI-2", nibabel.Nifti2Image)):
        for axes, affine in affines.items():
            yield from _nifti_pair(f"{kind}, {axes}", cls(values, affine), values)
        for dtype in (np.uint8, np.float32, np.float64, np.uint16, np.int32):
            cast = (values // 8 + 128 if dtype == np.uint8 else np.abs(values)).astype(dtype)
            yield from _nifti_pair(f"{kind}, {np.dtype(dtype)}", cls(cast, affines["RAS"], dtype=dtype), cast)
        scaled = cls((values + 1024).astype(np.uint16), affines["LPS"], dtype=np.uint16)
        scaled.header.set_slope_inter(0.5, -1024)
        yield from _nifti_pair(f"{kind}, scaled", scaled, (values + 1024) * 0.5 - 1024)
        yield from _nifti_pair(f"{kind}, 2-D", cls(values[..., 2], affines["RAS"]), values[..., 2])


def _nifti_pair(name: str, image: nibabel.Nifti1Image, values: np.ndarray) -> Iterator[Sample]:
    image.header["descrip"] = MARKS[0]
    image.header["intent_name"] = MARKS[0]
    data = image.to_bytes()
    yield Sample("nifti", name, data, values)
    yield Sample("nifti", name + ", gzip", gzip.compress(data, mtime=0), values)


def raster_samples(rows: int, columns: int) -> Iterator[Sample]:
    """Write PNG, JPEG, TIFF, BMP and WebP in every depth and colour they are met in."""
    gray = np.round(phantom(rows, columns) * 255).astype(np.uint8)
    deep = np.round(phantom(rows, columns) * 60000).astype(np.uint16)
    colour = np.stack([gray, 255 - gray, gray // 2], axis=-1)
    opacity = np.full((rows, columns), 255, np.uint8)
    opacity[: rows // 4], opacity[rows // 4 : rows // 2] = 0, 128
    rgba = np.dstack([colour, opacity])
    picture = Image.fromarray
    forms = {"gray": gray, "16 bits": deep, "RGB": colour, "RGBA": rgba}
    for name, array in forms.items():
        yield Sample("png", name, _saved(picture(array), "PNG"), array)
    yield Sample("png", "LA", _saved(picture(np.dstack([gray, opacity]), "LA"), "PNG"), np.dstack([gray, opacity]))
    table = np.stack([np.arange(256), 255 - np.arange(256), np.arange(256) // 2], -1).astype(np.uint8)
    palette = picture(gray, "P")
    palette.putpalette(table.tobytes())
    yield Sample("png", "palette", _saved(palette, "PNG"), table[gray])
    yield Sample("png", "1 bit", _saved(picture(gray > 99), "PNG"), np.uint8(255) * (gray > 99))
    yield Sample("png", "16 bits RGB", imagecodecs.png_encode(np.dstack([deep, deep, deep])), deep)
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, MARKS[0]  # turn clockwise to display
    yield Sample("png", "EXIF turned", _saved(picture(gray), "PNG", exif=exif), np.rot90(gray, -1))
    yield Sample("jpeg", "EXIF turned", _saved(picture(gray), "JPEG", exif=exif), np.rot90(gray, -1), True)
    yield Sample("jpeg", "gray", _saved(picture(gray), "JPEG", comment=MARKS[0]), gray, True)
    yield Sample("jpeg", "progressive", _saved(picture(gray), "JPEG", progressive=True), gray, True)
    yield Sample("jpeg", "RGB 4:2:0", _saved(picture(colour), "JPEG"), colour, True)
    cmyk = picture(colour).convert("CMYK")
    yield Sample("jpeg", "CMYK", _saved(cmyk, "JPEG"), np.asarray(cmyk), True)
    for name, array in {"gray": gray, "RGB": colour}.items():
        yield Sample("bmp", name, _saved(picture(array), "BMP"), array)
    yield Sample("bmp", "palette", _saved(palette, "BMP"), table[gray])
    yield Sample("webp", "lossless", _saved(picture(colour), "WEBP", lossless=True), colour)
    yield Sample("webp", "lossless, alpha", _saved(picture(rgba), "WEBP", lossless=True, exact=True), rgba)
    yield Sample("webp", "lossy", _saved(picture(colour), "WEBP", quality=90), colour, True)
    yield from _tiff_samples(gray, deep, colour)


def _tiff_samples(gray: np.ndarray, deep: np.ndarray, colour: np.ndarray) -> Iterator[Sample]:
    hu = (deep / 60000 * 2000 - 1024).astype(np.float32)
    pages = np.stack([deep, deep // 2, deep // 3, deep // 4, deep // 5])
    plans = {
        "8 bits": (gray, {}),
        "16 bits": (deep, {}),
        "16 bits big endian": (deep, {"byteorder": ">"}),
        "int16 HU": (hu.astype(np.int16), {}),
        "float32 HU": (hu, {}),
        "RGB": (colour, {"photometric": "rgb"}),
        "white is zero": (gray, {"photometric": "miniswhite"}),
        "BigTIFF": (deep, {"bigtiff": True}),
        "tiles": (deep, {"tile": (16, 16)}),
        "5 pages": (pages, {"photometric": "minisblack"}),
        "LZW": (deep, {"compression": "lzw"}),
        "Deflate, predictor": (deep, {"compression": "zlib", "predictor": True}),
        "PackBits": (gray, {"compression": "packbits"}),
        "Zstandard": (deep, {"compression": "zstd"}),
        "LZMA": (deep, {"compression": "lzma"}),
        "WebP": (colour, {"compression": "webp", "photometric": "rgb", "compressionargs": {"level": -1}}),
        "JPEG": (gray, {"compression": "jpeg"}),
        "JPEG 2000": (deep, {"compression": "jpeg2000", "compressionargs": {"level": 0}}),
    }
    for name, (array, how) in plans.items():
        buffer = io.BytesIO()
        tifffile.imwrite(buffer, array, description=MARKS[0], metadata=None, **how)
        yield Sample("tiff", name, buffer.getvalue(), array, lossy=name == "JPEG")


def _saved(image: Image.Image, form: str, **how) -> bytes:
    if form == "PNG":
        how["pnginfo"] = PngImagePlugin.PngInfo()
        how["pnginfo"].add_text("Description", MARKS[0])
    buffer = io.BytesIO()
    image.save(buffer, form, **how)
    return buffer.getvalue()


def all_samples(rows: int = 48, columns: int = 64) -> list[Sample]:
    """Write every sample; the same bytes in every run with the same library versions."""
    makers = (dicom_samples, nifti_samples, raster_samples)
    return [sample for make in makers for sample in make(rows, columns)]


def ct_series(slices: int, rows: int, columns: int, spacing: float = 2.0, **tags) -> list[bytes]:
    """Write a CT series, one file a slice, from inferior to superior."""
    values = ct_values(slices, rows, columns)
    return [
        dicom_file(
            plane,
            **ct_tags(i * spacing)
            | {"SOPInstanceUID": f"{_UID}.3.{i}", "InstanceNumber": slices - i, "SliceThickness": spacing}
            | tags,
        )
        for i, plane in enumerate(values)
    ]
