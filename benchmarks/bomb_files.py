# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Write small files that ask for very much memory or time, to see that readers refuse them."""

import gzip
import struct
import zlib
from collections.abc import Iterator
from functools import cache

import imagecodecs
import numpy as np
import pydicom
from mutations import png_chunks, png_file
from sample_files import all_samples, ct_tags, dicom_file, phantom

_GIGABYTE = 1 << 30


def bombs() -> Iterator[tuple[str, bytes]]:
    """Yield a name and a file for each; none may take 2 GB or 5 s to be refused, or to be read without its excess."""
    yield from _png_bombs()
    yield from _jpeg_bombs()
    yield from _tiff_bombs()
    yield from _other_rasters()
    yield from _nifti_bombs()
    yield from _dicom_bombs()


@cache
def _deflated_block(size: int) -> bytes:
    """Deflate zeros so that the result may be repeated: it looks back at nothing."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return packer.compress(bytes(size)) + packer.flush(zlib.Z_FULL_FLUSH)


def zeros_deflated(size: int, wrapped: bool = True) -> bytes:
    """Deflate that many zeros without ever holding them, as zlib or as a raw stream."""
    step = 1 << 24
    raw = _deflated_block(step) * (size // step) + b"\3\0"  # the last two bytes are an empty last block
    if not wrapped:
        return raw
    checksum = 1 + (size // step * step % 65521 << 16)  # Adler-32 of zeros
    return b"\x78\xda" + raw + struct.pack(">I", checksum & 0xFFFFFFFF)


# --------------------------------------------------------------------------------------------------------------------
# Rasters


def _png_bombs() -> Iterator[tuple[str, bytes]]:
    for name, side, depth, colour in (
        ("8 bits, 30000 x 30000", 30000, 8, 0),
        ("1 bit, 100000 x 100000", 100_000, 1, 0),
        ("16 bits RGBA, 20000 x 20000", 20000, 16, 6),
    ):
        header = struct.pack(">IIBBBBB", side, side, depth, colour, 0, 0, 0)
        row = 1 + (side * depth * (4 if colour else 1) + 7) // 8
        yield f"PNG, {name}", png_file([(b"IHDR", header), (b"IDAT", zeros_deflated(row * side)), (b"IEND", b"")])
    sound = next(s for s in all_samples(8, 8) if (s.format, s.kind) == ("png", "gray"))
    chunks = png_chunks(sound.data)
    bomb = zeros_deflated(2 * _GIGABYTE)
    for kind, body in (
        (b"zTXt", b"x\0\0" + bomb),
        (b"iTXt", b"x\0\1\0\0\0" + bomb),
        (b"iCCP", b"x\0\0" + bomb),
    ):
        yield f"PNG, {kind.decode()} of 2 GB", png_file([chunks[0], *[(kind, body)] * 3, *chunks[1:]])


def _jpeg_sized(data: bytes, rows: int, columns: int) -> bytes:
    """Claim another size in the frame header of a JPEG, JPEG-LS or lossless JPEG stream."""
    at = next(i for i in range(2, len(data)) if data[i] == 0xFF and data[i + 1] in (0xC0, 0xC1, 0xC2, 0xC3, 0xF7))
    return data[: at + 5] + struct.pack(">HH", rows, columns) + data[at + 9 :]


def _jpeg_bombs() -> Iterator[tuple[str, bytes]]:
    kinds = {s.kind: s.data for s in all_samples(16, 16) if s.format == "jpeg"}
    for kind in ("gray", "progressive", "CMYK"):
        yield f"JPEG, {kind}, claims 65500 x 65500", _jpeg_sized(kinds[kind], 65500, 65500)
    progressive = _jpeg_sized(kinds["progressive"], 9000, 9000)
    last = progressive.rfind(b"\xff\xda")
    yield "JPEG, 2000 scans of 9000 x 9000", progressive[:-2] + progressive[last:-2] * 2000 + b"\xff\xd9"


def _tiff(rows: int, columns: int, strip: bytes, compression: int, bits: int = 8, more: tuple = ()) -> bytes:
    """Write a classic TIFF of one strip."""
    entries = sorted(
        [
            *((256, 4, 1, columns), (257, 4, 1, rows), (258, 3, 1, bits), (259, 3, 1, compression), (262, 3, 1, 1)),
            *((273, 4, 1, 8), (277, 3, 1, 1), (278, 4, 1, rows), (279, 4, 1, len(strip))),
            *more,
        ]
    )
    at = 8 + len(strip)
    directory = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0" + struct.pack("<I", at) + strip + directory + struct.pack("<I", 0)


def _tiff_bombs() -> Iterator[tuple[str, bytes]]:
    yield "TIFF, Deflate, 40000 x 40000", _tiff(40000, 40000, zeros_deflated(40000 * 40000), 8)
    yield "TIFF, Deflate, 4 GB in a strip of 64 x 64", _tiff(64, 64, zeros_deflated(4 * _GIGABYTE), 8)
    yield "TIFF, LZMA, claims 60000 x 60000", _tiff(60000, 60000, imagecodecs.lzma_encode(bytes(1 << 20)), 34925)
    yield "TIFF, uncompressed, claims 65535 x 65535", _tiff(65535, 65535, bytes(4096), 1)
    yield "TIFF, 64 bits, claims 30000 x 30000", _tiff(30000, 30000, zeros_deflated(_GIGABYTE), 8, bits=64)
    sound = _tiff(64, 64, bytes(4096), 1)
    at = struct.unpack_from("<I", sound, 4)[0]
    yield "TIFF, pages in a circle", sound[:-4] + struct.pack("<I", at)
    page = sound[at:-4]
    count = 200_000
    starts = [len(sound) + i * (len(page) + 4) for i in range(count + 1)]
    linked = b"".join(page + struct.pack("<I", start) for start in starts[1:-1]) + page + bytes(4)
    yield f"TIFF, {count} pages", sound[:-4] + struct.pack("<I", starts[0]) + linked


def _other_rasters() -> Iterator[tuple[str, bytes]]:
    size = struct.pack("<IiiHHIIiiII", 40, 60000, 60000, 1, 8, 1, 4, 0, 0, 0, 0)
    yield "BMP, run lengths, claims 60000 x 60000", b"BM" + struct.pack("<IHHI", 62, 0, 0, 54) + size + b"\0\1" * 4
    webp = next(s.data for s in all_samples(8, 8) if (s.format, s.kind) == ("webp", "lossless"))
    at = webp.find(b"VP8L") + 9  # 14 bits of width, 14 bits of height
    yield "WebP, claims 16384 x 16384", webp[:at] + struct.pack("<I", 0x0FFFFFFF) + webp[at + 4 :]


# --------------------------------------------------------------------------------------------------------------------
# Volumes


def _nifti_header(shape: tuple[int, ...], code: int, bits: int) -> bytes:
    header = bytearray(352)
    struct.pack_into("<i", header, 0, 348)
    struct.pack_into("<8h", header, 40, len(shape), *shape, *[1] * (7 - len(shape)))
    struct.pack_into("<hh", header, 70, code, bits)
    struct.pack_into("<8f", header, 76, *[1.0] * 8)
    struct.pack_into("<f", header, 108, 352.0)
    header[344:348] = b"n+1\0"
    return bytes(header)


def _gzip_zeros(head: bytes, size: int) -> bytes:
    """Gzip a head followed by that many zeros."""
    packer = zlib.compressobj(1, zlib.DEFLATED, -15)
    start = packer.compress(head) + packer.flush(zlib.Z_FULL_FLUSH)
    return b"\x1f\x8b\x08\0\0\0\0\0\0\xff" + start + zeros_deflated(size, wrapped=False) + bytes(8)


def _nifti_bombs() -> Iterator[tuple[str, bytes]]:
    yield "NIfTI, gzip, claims 30000 cubed", _gzip_zeros(_nifti_header((30000,) * 3, 4, 16), _GIGABYTE)
    yield "NIfTI, gzip, 2000 cubed", _gzip_zeros(_nifti_header((2000,) * 3, 4, 16), 16 * _GIGABYTE)
    yield "NIfTI, claims 800 cubed doubles", _nifti_header((800, 800, 800), 64, 64)
    yield "NIfTI, gzip, cut after 8 GB", _gzip_zeros(_nifti_header((1024, 1024, 510), 16, 32), 8 * _GIGABYTE)[:-9]
    yield "gzip of nothing but 8 GB of zeros", _gzip_zeros(bytes(352), 8 * _GIGABYTE)
    yield "gzip in gzip in gzip", gzip.compress(gzip.compress(_gzip_zeros(bytes(352), 4 * _GIGABYTE)))


def _dicom_bombs() -> Iterator[tuple[str, bytes]]:
    deep = np.round(phantom(16, 16) * 4000).astype(np.uint16)
    gray = (deep >> 4).astype(np.uint8)
    plain = dicom_file(deep)
    start = plain.find(b"\x08\x00\x16\x00UI")
    meta = dicom_file(deep, pydicom.uid.DeflatedExplicitVRLittleEndian)
    meta = meta[: 132 + 12 + struct.unpack_from("<I", meta, 140)[0]]
    element = b"\x09\x00\x10\x10OB\0\0" + struct.pack("<I", 0xFFFFFFFE)
    packer = zlib.compressobj(1, zlib.DEFLATED, -15)
    inflated = packer.compress(plain[start:-520] + element) + packer.flush(zlib.Z_FULL_FLUSH)
    yield "DICOM, deflated, a private element of 8 GB", meta + inflated + zeros_deflated(8 * _GIGABYTE, wrapped=False)
    for rows, columns, frames in ((65535, 65535, None), (65535, 65535, 2147483647), (16, 16, 2147483647)):
        size = {"Rows": rows, "Columns": columns, "NumberOfFrames": frames}
        yield f"DICOM, claims {rows} x {columns} x {frames or 1}", dicom_file(deep, **size)
    yield from _dicom_streams(deep, gray)
    runs = struct.pack("<16I", 1, 64, *[0] * 14) + bytes([0x81, 0]) * 2_000_000  # 128 zeros each
    size = {"Rows": 16000, "Columns": 16000, "NumberOfFrames": 200}
    yield "DICOM, RLE, 200 frames of 16000 x 16000", dicom_file(gray, pydicom.uid.RLELossless, [runs], **size)
    yield "DICOM, RLE, a frame of 16 x 16 in 256 MB", dicom_file(gray, pydicom.uid.RLELossless, [runs])
    nested = b"\x08\x00\x40\x11SQ\0\0\xff\xff\xff\xff\xfe\xff\0\xe0\xff\xff\xff\xff" * 20000
    at = plain.rfind(b"\xe0\x7f\x10\x00")
    yield "DICOM, sequences nested 20000 deep", plain[:start] + nested + plain[start:]
    yield "DICOM, a million elements", plain[:at] + b"\x09\x10\x01\x10SH\0\0" * 1_000_000 + plain[at:]


def _dicom_streams(deep: np.ndarray, gray: np.ndarray) -> Iterator[tuple[str, bytes]]:
    """Write frames whose code stream claims a huge picture, with and without tags that say so too."""
    streams = {
        "JPEG": ("1.2.840.10008.1.2.4.50", gray, imagecodecs.jpeg8_encode(gray)),
        "lossless JPEG": ("1.2.840.10008.1.2.4.70", deep, imagecodecs.ljpeg_encode(deep)),
        "JPEG-LS": ("1.2.840.10008.1.2.4.80", deep, imagecodecs.jpegls_encode(deep)),
    }
    for name, (syntax, pixels, stream) in streams.items():
        for rows, columns in ((65500, 65500), (16384, 16384)):
            huge = _jpeg_sized(stream, rows, columns)
            tags = {"Rows": rows, "Columns": columns}
            yield f"DICOM, {name} stream claims {rows} x {columns}", dicom_file(pixels, syntax, [huge])
            yield f"DICOM, {name} and tags claim {rows} x {columns}", dicom_file(pixels, syntax, [huge], **tags)
    for name, syntax, stream in (
        ("JPEG 2000", "1.2.840.10008.1.2.4.90", imagecodecs.jpeg2k_encode(deep, codecformat="j2k", reversible=True)),
        ("HTJ2K", "1.2.840.10008.1.2.4.201", imagecodecs.htj2k_encode(deep, reversible=True)),
    ):
        at = stream.find(b"\xff\x51")  # SIZ: capabilities, width, height, ...
        for side in (0x7FFFFFFF, 60000, 16384):
            wide = stream[: at + 6] + struct.pack(">II", side, side) + stream[at + 14 :]
            whole = wide[: at + 22] + struct.pack(">II", side, side) + wide[at + 30 :]
            yield f"DICOM, {name} stream claims {side} squared", dicom_file(deep, syntax, [wide], **ct_tags())
            yield f"DICOM, {name} stream, one tile of {side} squared", dicom_file(deep, syntax, [whole], **ct_tags())
