# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Compressed DICOM pixel data: which frame is where, how it is compressed, and who decodes it.

Nothing is decoded here: pydicom's plugins and imagecodecs do.
"""

import io
from contextlib import suppress
from typing import Any

import numpy as np

from .chest_image_m3fm import bad_source
from .dicom_tags_m3fm import DicomFile, quiet_pydicom

EXPLICIT_LITTLE = "1.2.840.10008.1.2.1"
EXPLICIT_BIG = "1.2.840.10008.1.2.2"
GE_BIG = "1.2.840.113619.5.2"  # little endian, with big endian pixel data
NATIVE = ("1.2.840.10008.1.2", EXPLICIT_LITTLE, EXPLICIT_BIG, "1.2.840.10008.1.2.1.99", GE_BIG)
ENCAPSULATED_UNCOMPRESSED = "1.2.840.10008.1.2.1.98"
RLE = "1.2.840.10008.1.2.5"
_JPEG = "1.2.840.10008.1.2.4."
# By the start-of-frame marker of the code stream: what it may be declared as; the first where it is not.
_BY_MARKER = {
    0xC0: tuple(_JPEG + end for end in ("50", "51")),
    0xC1: tuple(_JPEG + end for end in ("51", "50")),
    0xC2: tuple(_JPEG + end for end in ("50", "51")),
    0xC3: tuple(_JPEG + end for end in ("57", "70")),
    0xF7: tuple(_JPEG + end for end in ("80", "81")),
}
_JPEG_2000 = tuple(_JPEG + end for end in ("90", "91", "201", "202", "203"))
# Here pydicom sets the sign by the code stream; elsewhere values are interpreted below.
SIGNED_BY_PYDICOM = (*_BY_MARKER[0xF7], *_JPEG_2000)

# Plugins in the order tried. Those first that return an error for damaged data, in a fuzz test of each; gdcm may end
# the process on it, and is used only where no other is installed. CharLS (pyjpegls) is strict, and stays alone.
# imagecodecs, no plugin of pydicom, is called here: of JPEG with 12 bits and of lossless JPEG it reads the grey ones.
_PLUGINS = ("imagecodecs", "pillow", "pylibjpeg", "pydicom")
_PLUGINS_OF = {
    **dict.fromkeys(_JPEG_2000, ("pylibjpeg", "pillow")),
    **dict.fromkeys(_BY_MARKER[0xF7], ("pyjpegls",)),
}
_LAST_PLUGINS = ("pylibjpeg", "gdcm")
_OF_IMAGECODECS = tuple(_JPEG + end for end in ("51", "57", "70"))
_INSTALL = {
    **dict.fromkeys(_JPEG_2000, "pylibjpeg pylibjpeg-openjpeg"),
    **dict.fromkeys(_BY_MARKER[0xF7], "pyjpegls"),
    **dict.fromkeys(_OF_IMAGECODECS, "imagecodecs"),
}
# JPEG, JPEG-LS and JPEG 2000 streams end so, but for padding. Decoders make up what a stream without it lacks, or
# hang on it (CharLS).
_END_OF_IMAGE = b"\xff\xd9"
_PADDING = 64
_JPEG_2000_START = b"\xff\x4f\xff\x51"


def inspect_stream(stream: bytes) -> tuple[tuple[str, ...], tuple[int, int] | None]:
    """Read from the head of a code stream what it may be declared as, and its rows and columns.

    Args:
        stream: One frame.

    Returns:
        Transfer syntaxes, () where the stream is not recognised; and the size, None where it does not say (RLE).
    """
    start = stream.find(_JPEG_2000_START, 0, 4096)
    if start == 0 or (start > 0 and stream[4:8] == b"jP  "):
        x1, y1, x0, y0 = (int.from_bytes(stream[start + 8 + 4 * i : start + 12 + 4 * i], "big") for i in range(4))
        return _JPEG_2000, (y1 - y0, x1 - x0)
    if stream[:2] == b"\xff\xd8":
        return _inspect_jpeg(stream)
    if 1 <= int.from_bytes(stream[:4], "little") <= 15 and stream[4:8] == b"\x40\0\0\0":
        return (RLE,), None
    return (), None


def _inspect_jpeg(stream: bytes) -> tuple[tuple[str, ...], tuple[int, int] | None]:
    """Walk the segments of a JPEG or JPEG-LS stream (ITU-T T.81 B.1) to its start of frame."""
    at = 2
    while at + 9 <= len(stream) and stream[at] == 0xFF:
        marker = stream[at + 1]
        if marker in _BY_MARKER:
            size = (int.from_bytes(stream[at + 5 : at + 7], "big"), int.from_bytes(stream[at + 7 : at + 9], "big"))
            return _BY_MARKER[marker], size
        if marker == 0xFF:  # fill
            at += 1
            continue
        at += 2 + int.from_bytes(stream[at + 2 : at + 4], "big")
    return (), None


def is_encapsulated(data: bytes) -> bool:
    """Tell encapsulated pixel data by its first item."""
    return data[:4] == b"\xfe\xff\x00\xe0"


def is_whole(stream: bytes, syntax: str, rows: int, columns: int) -> bool:
    """Tell whether a code stream has a head, of this size, and an end: decoders allocate what it declares."""
    if syntax == RLE:
        return True
    possible, size = inspect_stream(stream)
    return bool(possible) and size == (rows, columns) and _END_OF_IMAGE in stream[-_PADDING:]


def frame_streams(file: DicomFile, data: bytes, frames: int, name: str) -> list[bytes]:
    """Part encapsulated pixel data into frames; where its offsets are wrong, by one fragment for each frame.

    Args:
        file: The file, for its extended offset table.
        data: Its pixel data.
        frames: How many frames it declares.
        name: What errors call it.

    Raises:
        ValueError: If there are fewer.
    """
    pair = tuple(file.tags.value(key) for key in ("ExtendedOffsetTable", "ExtendedOffsetTableLengths"))
    offsets = pair if all(isinstance(value, bytes) and value for value in pair) else None
    streams: list[bytes] = []
    with quiet_pydicom(name) as pydicom:
        encaps = pydicom.encaps
        with suppress(Exception):
            streams = list(encaps.generate_frames(data, number_of_frames=frames, extended_offsets=offsets))
        if len(streams) < frames or not all(streams):
            with suppress(Exception):
                buffer = io.BytesIO(data)
                encaps.parse_basic_offsets(buffer)
                streams = list(encaps.generate_fragments(buffer))
    if len(streams) < frames or not all(streams[:frames]):
        raise bad_source(name, f"truncated or damaged DICOM pixel data: {len(streams)} of {frames} frames")
    return streams[:frames]


def plugins_of(syntax: str, samples: int, name: str) -> tuple[str, ...]:
    """Choose who decodes a compression, in the order to be tried.

    Raises:
        ValueError: If pydicom does not know the compression, or no plugin for it is installed.
    """
    available, label = None, ""
    with quiet_pydicom(name) as pydicom, suppress(Exception):  # unknown syntaxes raise with their UID
        decoder = pydicom.pixels.get_decoder(pydicom.uid.UID(syntax))
        available, label = list(decoder.available_plugins), decoder.UID.name
    if available is None:
        raise bad_source(name, "DICOM compressed in a way that pydicom does not decode")
    if syntax in _OF_IMAGECODECS and samples == 1 and _imagecodecs() is not None:
        available.append("imagecodecs")
    safe = tuple(plugin for plugin in _PLUGINS_OF.get(syntax, _PLUGINS) if plugin in available)
    plugins = safe or tuple(plugin for plugin in _LAST_PLUGINS if plugin in available)[:1]
    if not plugins:
        install = _INSTALL.get(syntax, "pylibjpeg pylibjpeg-openjpeg")
        raise bad_source(name, f"compressed as {label}, for which no decoder is installed: pip install {install}")
    return plugins


def decode_stream(
    stream: bytes, syntax: str, plugins: tuple[str, ...], options: dict[str, Any], name: str
) -> np.ndarray | None:
    """Decode the code stream of one frame by the first plugin that can; None where none can.

    Args:
        stream: One frame.
        syntax: Its transfer syntax.
        plugins: See `plugins_of`.
        options: Of pydicom's decoders.
        name: What errors call the file.
    """
    if syntax in _JPEG_2000:
        # Without the boxes of a JP2 file, which DICOM forbids (PS3.5 8.2.4): one of length 0 hangs pydicom.
        stream = stream[max(0, stream.find(_JPEG_2000_START)) :]
    with quiet_pydicom(name) as pydicom:
        decoder = pydicom.pixels.get_decoder(pydicom.uid.UID(syntax))
        data = pydicom.encaps.encapsulate([stream])
        for plugin in plugins:
            with suppress(Exception):  # plugins raise many kinds on damaged data
                if plugin != "imagecodecs":
                    return decoder.as_array(data, index=0, decoding_plugin=plugin, **options)[0]
                gray = _imagecodecs().jpeg_decode(stream)
                return gray.astype(f"u{options['bits_allocated'] // 8}", copy=False)
    return None


def _imagecodecs() -> Any:
    """Return the module imagecodecs, or None where it is not installed."""
    try:
        import imagecodecs
    except ImportError:
        return None
    return imagecodecs
