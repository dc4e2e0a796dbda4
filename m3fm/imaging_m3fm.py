# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Read chest images from raster, DICOM and NIfTI files, or from memory, into one form: `ChestImage`.

Shapes: S slices (1 for a radiograph), H rows, W columns. No attribute of a `ChestImage` and no error message holds
patient data; errors name the source as the caller gave it.
"""

import io
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .arrays_m3fm import read_array
from .chest_image_m3fm import MAX_VOXELS, ChestImage, bad_source
from .dicom_m3fm import read_dicom
from .dicom_tags_m3fm import is_dicom, written_dicom
from .nifti_m3fm import GZIP, is_half_pair, is_nifti, read_nifti, read_spatial
from .raster_m3fm import raster_kind, read_pil, read_raster

DEFAULT_PERCENTILES = (0.5, 99.5)

# A volume of the most voxels in 16 bits, with room for its header.
MAX_FILE_BYTES = 2 * MAX_VOXELS + (1 << 24)

_EXPECTED = "PNG, JPEG, TIFF, BMP, WebP, DICOM or NIfTI expected"
_HEAD = 1024
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://|data:[a-z]+/")

# What else people hand over: (what it looks like, where its mark is, the mark).
_OTHERS = (
    ("a PDF document", 0, b"%PDF"),
    ("a PostScript document", 0, b"%!PS"),
    ("a ZIP archive or Office document", 0, b"PK\x03\x04"),
    ("a RAR archive", 0, b"Rar!"),
    ("a 7-Zip archive", 0, b"7z\xbc\xaf\x27\x1c"),
    ("a bzip2 archive", 0, b"BZh"),
    ("an xz archive", 0, b"\xfd7zXZ\0"),
    ("a Zstandard archive", 0, b"\x28\xb5\x2f\xfd"),
    ("a tar archive", 257, b"ustar"),
    ("a GIF image", 0, b"GIF8"),
    ("a Photoshop file", 0, b"8BPS"),
    ("an icon", 0, b"\0\0\x01\0"),
    ("a JPEG XL image", 0, b"\xff\x0a"),
    ("a JPEG XL image", 0, b"\0\0\0\x0cJXL "),
    ("a HEIC image", 4, b"ftyphei"),
    ("a HEIC image", 4, b"ftypmif1"),
    ("an AVIF image", 4, b"ftypavi"),
    ("a video", 4, b"ftyp"),
    ("a video", 8, b"AVI "),
    ("a video", 0, b"\x1aE\xdf\xa3"),
    ("a video", 0, b"\0\0\x01\xba"),
    ("an HDF5 or MINC file", 0, b"\x89HDF"),
    ("a NumPy file: load it with numpy and give the array", 0, b"\x93NUMPY"),
    ("an NRRD file: read it with SimpleITK and give the image", 0, b"NRRD"),
    ("a MetaImage file: read it with SimpleITK and give the image", 0, b"ObjectType ="),
    ("a Git LFS pointer, whose file was not fetched", 0, b"version https://git-lfs"),
    ("a pickle, which is never opened", 0, b"\x80\x04\x95"),
    ("a pickle, which is never opened", 0, b"\x80\x02}"),
    ("a program", 0, b"\x7fELF"),
    ("a program", 0, b"MZ"),
)


def read_image(source: Any, percentiles: tuple[float, float] | None = DEFAULT_PERCENTILES) -> ChestImage:
    """Read one image or volume, recognised by its content and not by its name.

    Values: 8 bits are divided by 255. Values with no defined display range (16-bit and float rasters, integer arrays,
    radiograph DICOM without window) are stretched from the given percentiles to 0..1. Floats within 0..1 are kept.
    Values below -200 are Hounsfield units. Colour becomes grey, over black where it is not opaque. What reading
    assumed, turned or left out is said in `ChestImage.remarks`. A volume comes with `LazyPixels`.

    Args:
        source: A path (PNG, JPEG, TIFF, BMP, WebP, JPEG 2000, DICOM, NIfTI), the bytes or an open binary file of one
            (read from its start), a `datasets.Image` value ({"bytes", "path"}), a PIL, nibabel, SimpleITK or pydicom
            image, a numpy array, a torch tensor, what has `__array__`, or a `ChestImage` (returned unchanged).
            Arrays: (H, W); (H, W, 3) or (3, H, W) colour, uint8 or 0..1, with a fourth channel of opacity or without;
            (H, W, 1) and (1, H, W) are (H, W); other (S, H, W) are volumes, see `volume_of` for their values. What
            could be colour or a volume of three or four slices is refused: a `ChestImage` says which.
        percentiles: Low and high percentile that become 0 and 1 where no display range is defined; None takes the
            minimum and maximum.

    Returns:
        The image.

    Raises:
        ValueError: If the source cannot be read as a chest image; names the source and the reason.
        ImportError: If a file is given whose optional reader is not installed.
    """
    if isinstance(source, ChestImage):
        return source
    if isinstance(source, (str, os.PathLike)):
        return _read_path(source, percentiles)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _read_encoded(bytes(source), "<bytes>", percentiles)
    if isinstance(source, Image.Image):
        return read_pil(source, "<PIL image>", percentiles)
    if isinstance(source, np.ndarray) or (hasattr(source, "detach") and hasattr(source, "cpu")):
        return read_array(source, percentiles)
    if isinstance(source, Mapping) and ("bytes" in source or "path" in source):
        return _read_value(source, percentiles)
    if hasattr(source, "read"):
        return _read_file(source, percentiles)
    if (hasattr(source, "dataobj") and hasattr(source, "affine")) or _comes_from("SimpleITK.", source):
        return read_spatial(source, percentiles)
    if _comes_from("pydicom.", source):
        name, data = "<DICOM data set>", written_dicom(source)
        if data is None:
            raise bad_source(
                name, "cannot be written as a file (is its transfer syntax set?), expected one as read from a file"
            )
        return read_dicom(data, name, percentiles)
    if hasattr(source, "__array__") or hasattr(source, "__array_interface__"):
        return read_array(source, percentiles)
    several = " (a list is several images: read them one by one)" if isinstance(source, (list, tuple)) else ""
    raise ValueError(
        f"image of type {type(source).__name__}: expected a path, bytes, a binary file, a PIL image, "
        f"a numpy array, a torch tensor or a ChestImage{several}"
    )


def _comes_from(package: str, source: Any) -> bool:
    """Tell an object of a library without importing it."""
    return any(kind.__module__.startswith(package) for kind in type(source).__mro__)


# --------------------------------------------------------------------------------------------------------------------
# From a source to the bytes of a file


def _read_path(source: str | os.PathLike, percentiles: tuple[float, float] | None) -> ChestImage:
    name = os.fsdecode(source)
    if _ADDRESS.match(name):
        start = re.split(r"[?#,]", name, maxsplit=1)[0]  # the rest may be a signature, or an image as text
        advice = "addresses are not downloaded: give the bytes that m3fm.download.download(url) returns"
        raise bad_source(_short(re.sub(r"//[^/@]*@", "//", start)), advice)
    path, name = Path(name), _short(name)
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise bad_source(name, "is a directory, expected an image file")
        if not stat.S_ISREG(status.st_mode):
            raise bad_source(name, "is no regular file, expected an image file")
        with path.open("rb") as stream:
            head = stream.read(_HEAD)
            if head[:2] == GZIP or is_nifti(head) or (is_half_pair(path) and not raster_kind(head)):
                return read_nifti(path, name, percentiles)
            _check_kind(head, name)
            if status.st_size > MAX_FILE_BYTES:
                raise bad_source(name, f"{status.st_size} bytes, expected at most {MAX_FILE_BYTES}")
            stream.seek(0)
            data = stream.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise bad_source(name, "no such file") from None
    except OSError as error:
        raise bad_source(name, f"cannot be read ({error.strerror or type(error).__name__})") from None
    except ValueError as error:
        if "null byte" in str(error) or "null character" in str(error):
            raise bad_source(name.replace("\0", "?"), "is no path") from None
        raise
    return _read_encoded(data, name, percentiles)


def _read_file(source: Any, percentiles: tuple[float, float] | None) -> ChestImage:
    """Read an open file from its start, and leave it where it was."""
    name = getattr(source, "name", None)
    name = _short(name) if isinstance(name, str) else "<file object>"
    if isinstance(source, io.TextIOBase):
        raise bad_source(name, "got a file object that reads str, expected one opened in binary mode")
    try:
        position = source.tell() if source.seekable() else None
    except (AttributeError, OSError, ValueError):
        position = None
    try:
        if position:
            source.seek(0)
        data = source.read(MAX_FILE_BYTES + 1)
        if position is not None:
            source.seek(position)
    except Exception as error:  # closed files, and whatever a user's own class raises
        raise bad_source(name, f"cannot be read ({type(error).__name__})") from None
    if hasattr(data, "close") and not isinstance(data, bytes):
        data.close()  # a coroutine, of an asynchronous file
    if not isinstance(data, (bytes, bytearray)):
        reason = f"got a file object that reads {type(data).__name__}, expected one opened in binary mode"
        raise bad_source(name, reason)
    return _read_encoded(bytes(data), name, percentiles)


def _read_value(source: Mapping[str, Any], percentiles: tuple[float, float] | None) -> ChestImage:
    """Read a `datasets.Image` value that is not decoded: its bytes, or else its path."""
    data, path = source.get("bytes"), source.get("path")
    name = _short(os.fsdecode(path)) if isinstance(path, (str, os.PathLike)) and os.fspath(path) else "<bytes>"
    if isinstance(data, (bytes, bytearray, memoryview)):
        return _read_encoded(bytes(data), name, percentiles)
    if data is None and name != "<bytes>":
        return _read_path(path, percentiles)
    raise ValueError('image as {"bytes", "path"}: expected bytes, or the path of a file')


def _short(name: str) -> str:
    return name if len(name) <= 300 else f"{name[:120]}...{name[-60:]}"


# --------------------------------------------------------------------------------------------------------------------
# By content


def _read_encoded(data: bytes, name: str, percentiles: tuple[float, float] | None) -> ChestImage:
    if len(data) > MAX_FILE_BYTES:
        raise bad_source(name, f"more than {MAX_FILE_BYTES} bytes")
    head = data[:_HEAD]
    if head[:2] == GZIP or is_nifti(head):
        return read_nifti(data, name, percentiles)
    kind = _check_kind(head, name)
    if kind == "DICOM":
        return read_dicom(data, name, percentiles)
    return read_raster(data, name, kind, percentiles)


def _check_kind(head: bytes, name: str) -> str:
    """Return "DICOM" or a raster format; refuse what is neither, and say what it looks like."""
    if not head:
        raise bad_source(name, "empty file (0 bytes)")
    if is_dicom(head):
        return "DICOM"
    kind = raster_kind(head)
    if kind is None:
        raise bad_source(name, f"not a readable image: {_looks_like(head)} ({_EXPECTED})")
    return kind


def _looks_like(head: bytes) -> str:
    found = next((what for what, at, mark in _OTHERS if head[at : at + len(mark)] == mark), None)
    if found:
        return f"looks like {found}"
    if not head.strip(b"\0"):
        return "begins with nothing but zeros"
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        return "looks like a web page (HTML), as downloads that need a login return"
    if start.startswith(b"<svg") or b"<svg" in start[:300]:
        return "looks like a vector drawing (SVG)"
    if start.startswith(b"<"):
        return "looks like XML"
    try:
        text = head[: len(head) - 4 if len(head) == _HEAD else None].decode("utf-8")
    except UnicodeDecodeError:
        return "of no known format"
    return "looks like text" if all(c.isprintable() or c in "\r\n\t" for c in text) else "of no known format"


__all__ = ["DEFAULT_PERCENTILES", "MAX_FILE_BYTES", "ChestImage", "read_image"]
