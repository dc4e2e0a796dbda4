# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Damage files, by bytes and by the fields of their format, reproducibly from a random generator.

Each mutator takes a generator and a file and returns a damaged file; one that needs something the file lacks returns
it unchanged or damages plain bytes instead.
"""

import gzip
import io
import struct
import zlib
from collections.abc import Callable, Sequence

import numpy as np
import pydicom
import pydicom.encaps
import pydicom.uid

Mutator = Callable[[np.random.Generator, bytes], bytes]

EXTREMES = (
    0,
    1,
    2,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0x8000,
    0xFFFF,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFF,
    1 << 40,
    (1 << 64) - 1,
)


# --------------------------------------------------------------------------------------------------------------------
# Bytes, whatever the format


def _place(rng: np.random.Generator, data: bytes) -> int:
    """Choose an offset, half the time in the first 512 bytes, where headers are."""
    end = len(data) if rng.random() < 0.5 else min(len(data), 512)
    return int(rng.integers(max(1, end)))


def flip_bits(rng: np.random.Generator, data: bytes) -> bytes:
    """Flip 1 to 32 bits."""
    damaged = bytearray(data)
    for _ in range(int(rng.integers(1, 33)) if damaged else 0):
        damaged[_place(rng, data)] ^= 1 << int(rng.integers(8))
    return bytes(damaged)


def overwrite_run(rng: np.random.Generator, data: bytes) -> bytes:
    """Overwrite up to 64 bytes with zeros, ones, or anything."""
    start, length = _place(rng, data), int(rng.integers(1, 65))
    run = (b"\0" * length, b"\xff" * length, rng.bytes(length))[int(rng.integers(3))]
    return data[:start] + run[: len(data) - start] + data[start + length :]


def truncate(rng: np.random.Generator, data: bytes) -> bytes:
    """Cut the end off, or the last few bytes."""
    return data[: _place(rng, data)] if rng.random() < 0.7 else data[: -int(rng.integers(1, 20))]


def insert_bytes(rng: np.random.Generator, data: bytes) -> bytes:
    """Insert up to 64 bytes of anything."""
    start = _place(rng, data)
    return data[:start] + rng.bytes(int(rng.integers(1, 65))) + data[start:]


def remove_bytes(rng: np.random.Generator, data: bytes) -> bytes:
    """Take up to 64 bytes out."""
    start = _place(rng, data)
    return data[:start] + data[start + int(rng.integers(1, 65)) :]


def duplicate_chunk(rng: np.random.Generator, data: bytes) -> bytes:
    """Repeat a part up to four times."""
    start = _place(rng, data)
    chunk = data[start : start + int(rng.integers(1, 2048))]
    return data[:start] + chunk * int(rng.integers(2, 5)) + data[start:]


def write_extreme(rng: np.random.Generator, data: bytes) -> bytes:
    """Overwrite 1, 2, 4 or 8 bytes with an extreme number of either byte order."""
    damaged = bytearray(data)
    for _ in range(int(rng.integers(1, 4))):
        size = int(rng.choice((1, 2, 4, 8)))
        number = EXTREMES[int(rng.integers(len(EXTREMES)))] & ((1 << 8 * size) - 1)
        start = _place(rng, data)
        damaged[start : start + size] = number.to_bytes(size, ("little", "big")[int(rng.integers(2))])
    return bytes(damaged)


BYTES: dict[str, Mutator] = {
    "bits": flip_bits,
    "run": overwrite_run,
    "cut": truncate,
    "insert": insert_bytes,
    "remove": remove_bytes,
    "repeat": duplicate_chunk,
    "extreme": write_extreme,
}


def any_bytes(rng: np.random.Generator, data: bytes) -> bytes:
    """Damage bytes in one of the ways of `BYTES`."""
    return list(BYTES.values())[int(rng.integers(len(BYTES)))](rng, data)


def splice(rng: np.random.Generator, data: bytes, other: bytes) -> bytes:
    """Put the header of one file before the body of another."""
    return data[: _place(rng, data)] + other[_place(rng, other) :]


# --------------------------------------------------------------------------------------------------------------------
# DICOM

_NUMBERS = (0, 1, 2, 3, 4, 7, 8, 9, 12, 15, 16, 17, 31, 32, 33, 64, 255, 1024, 32767, 65535)
_US_TAGS = (
    *("Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "SamplesPerPixel"),
    *("PlanarConfiguration", "PixelPaddingValue", "PixelPaddingRangeLimit", "SmallestImagePixelValue"),
)
_DS_TAGS = (
    *("WindowCenter", "WindowWidth", "RescaleSlope", "RescaleIntercept", "SliceThickness", "PixelSpacing"),
    *("ImagePositionPatient", "ImageOrientationPatient", "GantryDetectorTilt", "ImagerPixelSpacing"),
)
_DS_VALUES = ("0", "1", "-1", "1e308", "-1e308", "1e-308", "1e39", "nan", "inf", "-inf", "", "abc", "1\\2", "1e999")
_TEXTS = {
    "NumberOfFrames": ("0", "-1", "2", "3", "1000000", "2147483647", "99999999999", "", "x"),
    "PhotometricInterpretation": (
        *("MONOCHROME1", "MONOCHROME2", "RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT", "PALETTE COLOR"),
        *("ARGB", "CMYK", "", "YBR_PARTIAL_420", "\xff"),
    ),
    "Modality": ("CT", "CR", "DX", "MR", "", "SC", "\\"),
    "VOILUTFunction": ("SIGMOID", "LINEAR_EXACT", "LINEAR", "?", ""),
    "ImageType": ("", "DERIVED\\SECONDARY", "ORIGINAL\\PRIMARY\\LOCALIZER", "\\\\\\"),
    "ViewPosition": ("PA", "LL", "", "\\PA"),
    "SOPClassUID": ("", "1.2.840.10008.5.1.4.1.1.2.1", "1.2.840.10008.5.1.4.1.1.7.3", "9"),
    "SpecificCharacterSet": ("ISO_IR 192", "ISO 2022 IR 87", "nonsense", ""),
    "PixelAspectRatio": ("0\\0", "1\\0", "-1\\1", "x"),
    "PatientOrientation": ("", "L\\F", "\\\\", "A"),
    "PresentationLUTShape": ("INVERSE", "IDENTITY", ""),
    "BurnedInAnnotation": ("YES", ""),
}
_TEXT_VRS = {"NumberOfFrames": "IS", "SOPClassUID": "UI", "PixelAspectRatio": "IS"}
_LUTS = ("VOILUTSequence", "ModalityLUTSequence")
_SYNTAXES = [str(uid) for uid in pydicom.uid.AllTransferSyntaxes]


def dicom_tags(rng: np.random.Generator, data: bytes) -> bytes:
    """Set one to three tags of pixels and display to extremes, or take them away."""
    dataset = pydicom.dcmread(io.BytesIO(data))
    for _ in range(int(rng.integers(1, 4))):
        ways = (_us_tag, _ds_tag, _text_tag, _lut, _drop_tag, _functional_groups, _syntax)
        ways[int(rng.choice(len(ways), p=(0.4, 0.2, 0.15, 0.08, 0.07, 0.05, 0.05)))](rng, dataset)
    return _written(dataset)


def _us_tag(rng: np.random.Generator, dataset: pydicom.Dataset) -> None:
    number = _NUMBERS[int(rng.integers(len(_NUMBERS)))]
    _set(dataset, _US_TAGS[int(rng.integers(len(_US_TAGS)))], "US", struct.pack("<H", number))


def _ds_tag(rng: np.random.Generator, dataset: pydicom.Dataset) -> None:
    count = int(rng.choice((1, 1, 2, 3, 6)))
    value = "\\".join(_DS_VALUES[int(rng.integers(len(_DS_VALUES)))] for _ in range(count))
    _set(dataset, _DS_TAGS[int(rng.integers(len(_DS_TAGS)))], "DS", value.encode())


def _text_tag(rng: np.random.Generator, dataset: pydicom.Dataset) -> None:
    keyword = list(_TEXTS)[int(rng.integers(len(_TEXTS)))]
    value = _TEXTS[keyword][int(rng.integers(len(_TEXTS[keyword])))]
    _set(dataset, keyword, _TEXT_VRS.get(keyword, "CS"), value.encode("latin-1"))


def _lut(rng: np.random.Generator, dataset: pydicom.Dataset) -> None:
    item = pydicom.Dataset()
    entries, first, bits = (_NUMBERS[int(i)] for i in rng.integers(len(_NUMBERS), size=3))
    item.add_new("LUTDescriptor", "US", [entries, first, bits])
    item.add_new("LUTData", "OW", rng.bytes(2 * int(rng.choice((0, 1, 255, entries)))))
    dataset.add_new(_LUTS[int(rng.integers(2))], "SQ", [item] * int(rng.integers(3)))
    for name in ("Red", "Green", "Blue"):
        dataset.add_new(f"{name}PaletteColorLookupTableDescriptor", "US", [entries, first, bits])
        dataset.add_new(f"{name}PaletteColorLookupTableData", "OW", bytes(item.LUTData))


def _drop_tag(rng: np.random.Generator, dataset: pydicom.Dataset) -> None:
    keys = list(dataset.keys())
    if keys:
        del dataset[keys[int(rng.integers(len(keys)))]]


def _functional_groups(rng: np.random.Generator, dataset: pydicom.Dataset) -> None:
    transform = pydicom.Dataset()
    transform.add(_raw("RescaleSlope", "DS", _DS_VALUES[int(rng.integers(len(_DS_VALUES)))].encode()))
    if rng.random() < 0.7:
        transform.add(_raw("RescaleIntercept", "DS", _DS_VALUES[int(rng.integers(len(_DS_VALUES)))].encode()))
    group = pydicom.Dataset()
    group.add_new("PixelValueTransformationSequence", "SQ", [transform] * int(rng.integers(3)))
    keyword = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")[int(rng.integers(2))]
    dataset.add_new(keyword, "SQ", [group] * int(rng.integers(1, 5)))


def _syntax(rng: np.random.Generator, dataset: pydicom.Dataset) -> None:
    """Claim another transfer syntax than the pixels have."""
    dataset.file_meta.claimed = _SYNTAXES[int(rng.integers(len(_SYNTAXES)))]


def _raw(keyword: str, vr: str, value: bytes) -> pydicom.dataelem.RawDataElement:
    tag = pydicom.tag.Tag(keyword)
    return pydicom.dataelem.RawDataElement(tag, vr, len(value), value, 0, False, True, True)


def _set(dataset: pydicom.Dataset, keyword: str, vr: str, value: bytes) -> None:
    """Store a value as bytes, which pydicom writes without looking at them."""
    padded = value if len(value) % 2 == 0 else value + (b"\0" if vr == "UI" else b" ")
    dataset._dict[pydicom.tag.Tag(keyword)] = _raw(keyword, vr, padded)


def _written(dataset: pydicom.Dataset) -> bytes:
    buffer = io.BytesIO()
    claimed = dataset.file_meta.__dict__.pop("claimed", None)
    true = str(dataset.file_meta.TransferSyntaxUID)
    dataset.save_as(buffer, implicit_vr=pydicom.uid.UID(true).is_implicit_VR, little_endian=not true.endswith("1.2.2"))
    data = buffer.getvalue()
    if claimed is not None:
        width = max(len(true), len(claimed)) + 1
        data = data.replace(true.encode().ljust(width, b"\0"), claimed.encode().ljust(width, b"\0"), 1)
    return data


def dicom_pixels(rng: np.random.Generator, data: bytes) -> bytes:
    """Damage the pixels: the code stream of a frame, the fragments, or the uncompressed values."""
    dataset = pydicom.dcmread(io.BytesIO(data))
    if not dataset.file_meta.TransferSyntaxUID.is_compressed or "Deflated" in dataset.file_meta.TransferSyntaxUID.name:
        dataset["PixelData"].value = any_bytes(rng, dataset.PixelData)
        return _written(dataset)
    frames = list(pydicom.encaps.generate_frames(dataset.PixelData, number_of_frames=dataset.get("NumberOfFrames", 1)))
    which = int(rng.integers(len(frames)))
    frames[which] = any_bytes(rng, frames[which]) or b"\0\0"
    dataset.PixelData = pydicom.encaps.encapsulate(frames)
    dataset["PixelData"].VR = "OB"
    return _written(dataset)


def dicom_encapsulation(rng: np.random.Generator, data: bytes) -> bytes:
    """Damage the first bytes of the pixel data element: its length, offset table and item lengths."""
    start = data.rfind(b"\xe0\x7f\x10\x00")
    if start < 0:
        return any_bytes(rng, data)
    return data[:start] + any_bytes(rng, data[start : start + 64]) + data[start + 64 :]


# --------------------------------------------------------------------------------------------------------------------
# NIfTI

# Offset and struct code of the fields of the header.
_NIFTI1 = {
    **{f"dim{i}": (40 + 2 * i, "h") for i in range(8)},
    **{"datatype": (70, "h"), "bitpix": (72, "h"), "vox_offset": (108, "f"), "slope": (112, "f"), "inter": (116, "f")},
    **{f"pixdim{i}": (76 + 4 * i, "f") for i in range(5)},
    **{"sizeof_hdr": (0, "i"), "qform": (252, "h"), "sform": (254, "h"), "magic": (344, "i"), "extension": (348, "i")},
    **{f"srow{i}": (280 + 4 * i, "f") for i in range(12)},
    **{f"quatern{i}": (256 + 4 * i, "f") for i in range(6)},
}
_NIFTI2 = {
    **{f"dim{i}": (16 + 8 * i, "q") for i in range(8)},
    **{"datatype": (12, "h"), "bitpix": (14, "h"), "vox_offset": (168, "q"), "slope": (176, "d"), "inter": (184, "d")},
    **{f"pixdim{i}": (104 + 8 * i, "d") for i in range(5)},
    **{"sizeof_hdr": (0, "i"), "qform": (344, "i"), "sform": (348, "i"), "magic": (4, "i"), "extension": (540, "i")},
    **{f"srow{i}": (400 + 8 * i, "d") for i in range(12)},
}
_INTEGERS = (-32768, -1, 0, 1, 2, 3, 4, 5, 7, 8, 16, 64, 128, 256, 512, 768, 1024, 1536, 1792, 2048, 2304, 32767)
_FLOATS = (0.0, 1.0, -1.0, 1e38, -1e38, 1e-38, float("nan"), float("inf"), float("-inf"), 352.0, 348.0, 1e9)


def _inside_gzip(mutate: Mutator) -> Mutator:
    """Damage what a gzip file holds, and pack it again."""

    def mutated(rng: np.random.Generator, data: bytes) -> bytes:
        if data[:2] != b"\x1f\x8b":
            return mutate(rng, data)
        return gzip.compress(mutate(rng, gzip.decompress(data)), compresslevel=1, mtime=0)

    return mutated


def _nifti_fields(rng: np.random.Generator, data: bytes) -> bytes:
    fields = _NIFTI2 if data[:4] == struct.pack("<i", 540) else _NIFTI1
    damaged = bytearray(data)
    for _ in range(int(rng.integers(1, 4))):
        offset, code = fields[list(fields)[int(rng.integers(len(fields)))]]
        values = _FLOATS if code in "fd" else _INTEGERS
        value = values[int(rng.integers(len(values)))]
        if code == "q" and rng.random() < 0.3:
            value = int(rng.choice((1 << 31, 1 << 40, -(1 << 62))))
        struct.pack_into("<" + code, damaged, offset, value)
    return bytes(damaged)


nifti_fields = _inside_gzip(_nifti_fields)
nifti_bytes = _inside_gzip(any_bytes)


# --------------------------------------------------------------------------------------------------------------------
# Rasters


def png_chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    """Take a PNG file apart into names and bodies."""
    chunks, at = [], 8
    while at + 8 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    return chunks


def png_file(chunks: Sequence[tuple[bytes, bytes]]) -> bytes:
    """Put a PNG file together, with right lengths and checksums."""
    parts = [
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def png_fields(rng: np.random.Generator, data: bytes) -> bytes:
    """Damage the header, a chunk, the order of chunks or the compressed rows, with right checksums."""
    chunks = png_chunks(data)
    which, way = int(rng.integers(len(chunks))), int(rng.integers(5))
    if way == 0:
        header = list(struct.unpack(">IIBBBBB", chunks[0][1]))
        field = int(rng.integers(7))
        values = EXTREMES[:12] if field < 2 else (0, 1, 2, 3, 4, 6, 8, 16, 255)
        header[field] = values[int(rng.integers(len(values)))]
        chunks[0] = (b"IHDR", struct.pack(">IIBBBBB", *header))
    elif way == 1:
        chunks[which] = (chunks[which][0], any_bytes(rng, chunks[which][1] or b"\0"))
    elif way == 2:
        chunks.insert(int(rng.integers(len(chunks))), chunks[which])
    elif way == 3:
        del chunks[which]
    else:
        rows = zlib.decompress(b"".join(body for kind, body in chunks if kind == b"IDAT"))
        head = [chunk for chunk in chunks if chunk[0] not in (b"IDAT", b"IEND")]
        chunks = [*head, (b"IDAT", zlib.compress(any_bytes(rng, rows), 1)), (b"IEND", b"")]
    return png_file(chunks)


def tiff_fields(rng: np.random.Generator, data: bytes) -> bytes:
    """Set the type, count or value of one to three entries of the first directory to extremes."""
    order = "<" if data[:2] == b"II" else ">"
    damaged = bytearray(data)
    if struct.unpack_from(order + "H", data, 2)[0] == 43:
        (at,), head, size, code = struct.unpack_from(order + "Q", data, 8), 8, 20, "QQ"
    else:
        (at,), head, size, code = struct.unpack_from(order + "I", data, 4), 2, 12, "II"
    (count,) = struct.unpack_from(order + ("Q" if head == 8 else "H"), data, at)
    for _ in range(int(rng.integers(1, 4))):
        entry = at + head + size * int(rng.integers(count))
        _, kind, *numbers = struct.unpack_from(f"{order}HH{code}", data, entry)
        field = int(rng.integers(4))
        limit = (1 << (64 if code == "QQ" else 32)) - 1
        if field == 0:
            kind = int(rng.integers(20))
        elif field == 1:
            numbers[0] = EXTREMES[int(rng.integers(len(EXTREMES)))] & limit
        else:
            small = order == ">" and kind == 3 and code == "II"
            value = EXTREMES[int(rng.integers(len(EXTREMES)))]
            numbers[1] = (value << 16 if small else value) & limit
        struct.pack_into(f"{order}H{code}", damaged, entry + 2, kind, *numbers)
    return bytes(damaged)


def jpeg_fields(rng: np.random.Generator, data: bytes) -> bytes:
    """Set the size, depth or components of the frame header to extremes, or damage, repeat or drop a segment."""
    segments, at = [], 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != 0xDA:
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        segments.append(bytearray(data[at : at + 2 + length]))
        at += 2 + length
    if not segments:
        return any_bytes(rng, data)
    way, which = int(rng.integers(4)), int(rng.integers(len(segments)))
    if way == 0:
        frame = next((s for s in segments if 0xC0 <= s[1] <= 0xC3), segments[which])
        place = int(rng.choice((4, 5, 7, 9, 10, 11, 12)))
        size = 2 if place in (5, 7) else 1
        frame[place : place + size] = rng.choice((b"\0\0", b"\0\1", b"\xff\xff", b"\x7f\xff", b"\xff\0"))[:size]
    elif way == 1:
        segments[which][4:] = any_bytes(rng, bytes(segments[which][4:]) or b"\0")
    elif way == 2:
        segments.insert(which, segments[which])
    else:
        del segments[which]
    return data[:2] + b"".join(segments) + data[at:]


def head_fields(rng: np.random.Generator, data: bytes) -> bytes:
    """Write extremes into the first 64 bytes, where BMP and WebP keep their sizes."""
    return write_extreme(rng, data[:64]) + data[64:]


# What is done to each format beside `BYTES` and splicing.
FIELDS: dict[str, dict[str, Mutator]] = {
    "dicom": {"tags": dicom_tags, "pixels": dicom_pixels, "encapsulation": dicom_encapsulation},
    "nifti": {"fields": nifti_fields, "inner bytes": nifti_bytes},
    "png": {"fields": png_fields},
    "jpeg": {"fields": jpeg_fields},
    "tiff": {"fields": tiff_fields},
    "bmp": {"fields": head_fields},
    "webp": {"fields": head_fields},
}
