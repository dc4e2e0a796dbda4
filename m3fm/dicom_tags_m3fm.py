# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Open a DICOM file and look up its tags, quietly.

Only the tags that reading an image needs are parsed: names, dates and free text never leave the file.
What pydicom and its plugins log and warn is silenced while this package reads, because it quotes values.
"""

import io
import logging
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from .chest_image_m3fm import bad_source

_COMMON_TAGS = (
    "TransferSyntaxUID",
    "ImageType",
    "SOPClassUID",
    "Modality",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "PatientOrientation",
    "PixelSpacing",
    "ImagerPixelSpacing",
    "NominalScannedPixelSpacing",
    "SliceThickness",
    "SpacingBetweenSlices",
    "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
    "Rows",
    "Columns",
    "NumberOfFrames",
    "PixelRepresentation",
    "RescaleIntercept",
)
# Identifiers among these are only compared (see `SliceHeader`).
HEADER_TAGS = (
    *_COMMON_TAGS,
    "SOPInstanceUID",
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "PatientID",
    "SeriesNumber",
    "AcquisitionNumber",
    "InstanceNumber",
    "TemporalPositionIdentifier",
    "TemporalPositionIndex",
)
# OverlayBitPosition of the sixteen overlays.
OVERLAY_BIT_TAGS = tuple(0x60000102 + (group << 16) for group in range(0, 32, 2))
IMAGE_TAGS = (
    *_COMMON_TAGS,
    "ViewPosition",
    "ViewCodeSequence",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "PlanarConfiguration",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelPaddingValue",
    "PixelPaddingRangeLimit",
    "ModalityLUTSequence",
    "RescaleSlope",
    "RescaleType",
    "VOILUTSequence",
    "VOILUTFunction",
    "WindowCenter",
    "WindowWidth",
    "PresentationLUTShape",
    "RedPaletteColorLookupTableDescriptor",
    "GreenPaletteColorLookupTableDescriptor",
    "BluePaletteColorLookupTableDescriptor",
    "RedPaletteColorLookupTableData",
    "GreenPaletteColorLookupTableData",
    "BluePaletteColorLookupTableData",
    "SegmentedRedPaletteColorLookupTableData",
    "SegmentedGreenPaletteColorLookupTableData",
    "SegmentedBluePaletteColorLookupTableData",
    "ExtendedOffsetTable",
    "ExtendedOffsetTableLengths",
    "PixelData",
    "FloatPixelData",
    "DoubleFloatPixelData",
    *OVERLAY_BIT_TAGS,
)
PIXEL_KEYWORDS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")

_PIXEL_TAGS = (0x7FE00008, 0x7FE00009, 0x7FE00010)
_DEFLATED = "1.2.840.10008.1.2.1.99"
# What a deflated file may grow to: above any chest CT, below what exhausts a workstation by accident.
_MAX_INFLATED = 1 << 29

_NOISY = ("pydicom", "pylibjpeg", "libjpeg", "openjpeg", "jpeg_ls", "rle")
_NOISY_MODULES = rf"({'|'.join(_NOISY)})(\.|$)"


class _Reading(threading.local):
    """Count, for each thread, the nested readings."""

    depth = 0


_READING = _Reading()


class _SilentWhileReading(logging.Filter):
    """Drop the records of a thread that is reading; the host program's own use of pydicom is logged as ever."""

    def filter(self, record: logging.LogRecord) -> bool:
        return _READING.depth == 0


_SILENT = _SilentWhileReading()


@contextmanager
def quiet_pydicom(name: str) -> Iterator[Any]:
    """Import pydicom and silence it, and its plugins, while this thread reads.

    Logging is silenced by filters that look at the thread. Warnings cannot be: `warnings.catch_warnings` swaps the
    filters of the whole process and puts back stale ones when threads overlap. Therefore one filter, which ignores
    what these modules and no others warn, is put first in the process's list and left there.

    Args:
        name: What errors call the file.

    Yields:
        The module pydicom.

    Raises:
        ImportError: If pydicom is missing.
    """
    try:
        import pydicom
        import pydicom.pixels
    except ImportError as error:
        raise ImportError(f"{name}: reading DICOM needs pydicom: pip install m3fm[medical]") from error
    if not _is_silenced(warnings.filters[:1]):
        warnings.filterwarnings("ignore", module=_NOISY_MODULES)
    for logger in [logging.getLogger(name) for name in list(logging.root.manager.loggerDict) if _is_noisy(name)]:
        logger.addFilter(_SILENT)  # adding it again changes nothing
    _READING.depth += 1
    try:
        yield pydicom
    finally:
        _READING.depth -= 1


def written_dicom(dataset: Any) -> bytes | None:
    """Write a data set of pydicom as a file, or return None where it lacks what a file needs."""
    buffer = io.BytesIO()
    with quiet_pydicom("<DICOM data set>"), suppress(Exception):  # whose texts quote values
        dataset.save_as(buffer)
        return buffer.getvalue()
    return None


def _is_noisy(name: str) -> bool:
    return name.split(".")[0] in _NOISY


def _is_silenced(filters: list[Any]) -> bool:
    return any(entry[0] == "ignore" and getattr(entry[3], "pattern", None) == _NOISY_MODULES for entry in filters)


class Tags:
    """Look up the tags of a data set or of an item; a tag that is missing, empty or damaged reads as absent."""

    def __init__(self, dataset: Any):
        self.dataset = dataset
        self._items: dict[str, list[Tags]] = {}

    def value(self, keyword: str) -> Any:
        """Return the value as pydicom gives it, or None."""
        with suppress(Exception):  # converting a damaged value raises many kinds
            return self.dataset.get(keyword)
        return None

    def numbers(self, keyword: str) -> tuple[float, ...]:
        """Return the finite numbers of a tag."""
        value = self.value(keyword)
        if isinstance(value, bytes):  # pydicom leaves what it cannot type as bytes: words of 16 bits here
            value = np.frombuffer(value[: len(value) // 2 * 2], "<u2").tolist()
        numbers = []
        for item in [value] if value is None or isinstance(value, str) or not hasattr(value, "__iter__") else value:
            with suppress(Exception):
                numbers.append(float(item))
        return tuple(number for number in numbers if np.isfinite(number))

    def number(self, keyword: str) -> float | None:
        """Return the first finite number of a tag, or None."""
        return next(iter(self.numbers(keyword)), None)

    def count(self, keyword: str) -> int | None:
        """Return a tag as a whole number, or None."""
        number = self.number(keyword)
        return None if number is None or abs(number) >= 2**53 else int(number)

    def count_at(self, tag: int) -> int | None:
        """Return a tag without a keyword of its own, as a whole number, or None."""
        with suppress(Exception):
            return int(self.dataset[tag].value)
        return None

    def words(self, keyword: str) -> tuple[str, ...]:
        """Return the values of a tag in capitals and without spaces around."""
        value = self.value(keyword)
        if value is None or isinstance(value, (str, bytes)) or not hasattr(value, "__iter__"):
            value = [] if value is None else [value]
        return tuple(str(item).strip().strip("\0").upper() for item in value)

    def word(self, keyword: str) -> str:
        """Return the first value of a tag in capitals, or ""."""
        return next(iter(self.words(keyword)), "")

    def items(self, keyword: str) -> list["Tags"]:
        """Return the items of a sequence."""
        if keyword not in self._items:
            self._items[keyword] = []
            with suppress(Exception):
                self._items[keyword] = [Tags(item) for item in self.dataset.get(keyword) or []]
        return self._items[keyword]

    def item(self, keyword: str) -> "Tags":
        """Return the first item of a sequence, or an empty one."""
        items = self.items(keyword)
        return items[0] if items else Tags({})


@dataclass(frozen=True, eq=False, repr=False)
class DicomFile:
    """Hold an opened file.

    Attributes:
        tags: Its tags.
        syntax: The transfer syntax UID that it states, or "".
        little_endian: How its values are ordered.
        has_pixels: Whether it has pixel data.
        pixel_vr: The value representation of the pixel data.
    """

    tags: Tags
    syntax: str
    little_endian: bool
    has_pixels: bool
    pixel_vr: str = "OW"


def is_dicom(head: bytes) -> bool:
    """Tell a DICOM file by its first 132 bytes: the preamble, or without it a short element of group 0002 or 0008."""
    if head[128:132] == b"DICM":
        return True
    if len(head) < 8:
        return False
    is_explicit = head[4:6].isalpha() and head[4:6].isupper()
    for order in ("<", ">"):
        group, element, length = struct.unpack(f"{order}HHI", head[:8])
        if group in (0x0002, 0x0008) and element <= 0x20 and (is_explicit or length <= 64):
            return True
    return False


def open_dicom(file: Any, name: str, keywords: tuple[str | int, ...], with_pixels: bool) -> DicomFile:
    """Parse some tags of a file.

    Args:
        file: An open binary file, at its start.
        name: What errors call it.
        keywords: The tags wanted, by keyword or number.
        with_pixels: Parse on to the pixel data; otherwise it is not read.

    Raises:
        ValueError: If the file is no DICOM, is damaged, or is too large when inflated.
        ImportError: If pydicom is missing.
    """
    with quiet_pydicom(name) as pydicom:
        head = file.read(132)
        file.seek(0)
        if not is_dicom(head):
            raise bad_source(name, "not a DICOM file")
        opened = None
        with suppress(Exception):  # damaged files raise many kinds, whose text may quote values
            opened = _parsed(pydicom, file, keywords, with_pixels)
    if opened is None:
        raise bad_source(name, "truncated or damaged DICOM file")
    if isinstance(opened, int):
        raise bad_source(name, f"inflates to more than {_MAX_INFLATED} bytes")
    return opened


def _parsed(pydicom: Any, file: Any, keywords: tuple[str | int, ...], with_pixels: bool) -> "DicomFile | int":
    """Parse, or return how far a file was inflated that is too large."""
    reader = pydicom.filereader
    reader.read_preamble(file, force=True)
    start = file.tell()
    meta = reader.read_dataset(file, False, True, stop_when=lambda tag, vr, length: tag >> 16 != 2)
    syntax = Tags(meta).word("TransferSyntaxUID")
    if syntax == _DEFLATED:
        inflate = zlib.decompressobj(-zlib.MAX_WBITS)
        body = inflate.decompress(file.read(), _MAX_INFLATED + 1)
        if len(body) > _MAX_INFLATED:
            return len(body)
        file = io.BytesIO(body)  # explicit VR, little endian, and without a header, which pydicom recognises
    else:
        file.seek(0 if start == 0 else start - 132)
    at_pixels: list[tuple[int, str | None]] = []

    def stop(tag: int, vr: str | None, length: int) -> bool:
        if tag not in _PIXEL_TAGS:
            return False
        at_pixels.append((length, vr))
        return not with_pixels

    dataset = reader.read_partial(
        file, stop, force=True, specific_tags=[pydicom.tag.Tag(keyword) for keyword in keywords]
    )
    is_little = bool(dataset.original_encoding[1])
    length, vr = at_pixels[-1] if at_pixels else (0, None)
    return DicomFile(Tags(dataset), syntax, is_little, length > 0, vr or "OW")
