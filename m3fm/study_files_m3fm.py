# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Find the images in a folder, told by the first bytes of each file and not by its name."""

import os
import re
import zlib
from collections.abc import Iterator

from .dicom_tags_m3fm import is_dicom
from .nifti_m3fm import GZIP, is_nifti
from .raster_m3fm import raster_kind

KINDS = ("dicom", "nifti", "raster")

_HEAD_BYTES = 512
_NIFTI_HEADER_BYTES = 352
# Media Storage Directory: the list of files on a medium, which is DICOM without an image.
_DIRECTORY_CLASS = b"1.2.840.10008.1.3.10"
# Previews that viewers and media leave beside the images.
_PREVIEW = re.compile(r"(.*[^a-z])?thumb(s|nails?)?([^a-z].*)?", flags=re.IGNORECASE | re.DOTALL)


def find_images(folder: str | os.PathLike) -> tuple[list[tuple[str, str]], int]:
    """List the images in a folder and below it.

    Hidden files and folders, DICOMDIR files, thumbnails and whatever is no image are skipped; links to folders are
    not followed. Only the start of each file is read, so that a file may still prove damaged.

    Args:
        folder: The folder; paths found start with it as it was given.

    Returns:
        (path, one of `KINDS`) in the order of their names, folder by folder; and how many files were skipped.

    Raises:
        ValueError: If the folder cannot be listed.
    """
    root = os.fspath(folder)
    try:
        os.listdir(root)
    except OSError as error:
        raise ValueError(f"{root}: cannot be listed ({error.strerror})") from None
    found: list[tuple[str, str]] = []
    skipped = 0
    for path in _files(root):
        kind = None if _is_aside(os.path.relpath(path, root)) else path_kind(path)
        if kind is None:
            skipped += 1
        else:
            found.append((path, kind))
    return found, skipped


def path_kind(path: str | os.PathLike) -> str | None:
    """Return the kind of image that a file starts like, one of `KINDS`; None where it is none or cannot be read."""
    if not os.path.isfile(path):  # opening a pipe would wait for its writer
        return None
    try:
        with open(path, "rb") as file:
            return kind_of(file.read(_HEAD_BYTES))
    except OSError:
        return None


def kind_of(data: bytes) -> str | None:
    """Return the kind of image, one of `KINDS`, that an encoded file starts like, or None.

    Args:
        data: The file, or at least its first 512 bytes.
    """
    head = bytes(data[:_HEAD_BYTES])
    if is_dicom(head):
        return None if _DIRECTORY_CLASS in head else "dicom"
    if is_nifti(_gunzipped(head) if head[:2] == GZIP else head):
        return "nifti"
    return "raster" if raster_kind(head) else None


def _files(root: str) -> Iterator[str]:
    for folder, folders, files in os.walk(root):
        folders.sort()
        yield from (os.path.join(folder, name) for name in sorted(files))


def _is_aside(path: str) -> bool:
    """Tell hidden files, those that archives of Macs carry along, and previews."""
    parts = path.split(os.sep)
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in parts)
    return hidden or any(map(_PREVIEW.fullmatch, parts)) or parts[-1].upper() == "DICOMDIR"


def _gunzipped(head: bytes) -> bytes:
    try:
        return zlib.decompressobj(wbits=31).decompress(head, _NIFTI_HEADER_BYTES)
    except zlib.error:
        return b""


__all__ = ["KINDS", "find_images", "kind_of", "path_kind"]
