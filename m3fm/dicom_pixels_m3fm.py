# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Decode the frames of a DICOM file to stored values, one at a time.

Where tags are missing or contradict the pixel data, the pixel data decides, and a remark says so. Letters: H rows,
W columns.
"""

from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .chest_image_m3fm import Remark, bad_source, check_voxels
from .dicom_streams_m3fm import (
    ENCAPSULATED_UNCOMPRESSED,
    EXPLICIT_BIG,
    EXPLICIT_LITTLE,
    GE_BIG,
    NATIVE,
    SIGNED_BY_PYDICOM,
    decode_stream,
    frame_streams,
    inspect_stream,
    is_encapsulated,
    is_whole,
    plugins_of,
)
from .dicom_tags_m3fm import OVERLAY_BIT_TAGS, PIXEL_KEYWORDS, DicomFile, Tags, quiet_pydicom

# Larger than any detector, small enough to be decoded to floats in 2 GB.
MAX_FRAME_PIXELS = 1 << 26
MAX_FRAMES = 1 << 14

_GRAY = ("MONOCHROME1", "MONOCHROME2")
_COLOUR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_RCT", "YBR_ICT")
_PALETTE = "PALETTE COLOR"
# Of two readings of the same bits the one is right whose neighbouring pixels differ less, by this factor: misread
# signs and masked bits make jumps of the whole range. Fewer different values than this are padding or markers.
_SMOOTHER = 0.75
_DISTINCT = 16


@dataclass(frozen=True)
class PixelLayout:
    """Describe the pixel data as it will be read (DICOM PS3.3 C.7.6.3).

    Attributes:
        keyword: One of `PIXEL_KEYWORDS`.
        syntax: Transfer syntax UID that the data has, whatever the file says.
        rows: H.
        columns: W.
        frames: Frames.
        samples: 1, or 3 for colour.
        photometric: Photometric interpretation.
        planar: 1 where the three colours are planes.
        allocated: Bits of a word.
        stored: Bits of a value.
        shift: Bits below the value in its word.
        signed: Whether values have a sign.
    """

    keyword: str
    syntax: str
    rows: int
    columns: int
    frames: int
    samples: int
    photometric: str
    planar: int
    allocated: int
    stored: int
    shift: int
    signed: bool

    @property
    def is_colour(self) -> bool:
        """Tell whether frames decode to colour."""
        return self.samples == 3 or self.photometric == _PALETTE


class FrameDecoder:
    """Decode frames of an opened file.

    Args:
        file: The file, with pixels.
        name: What errors call it.

    Attributes:
        layout: How the pixel data is read.
        remarks: What was assumed.

    Raises:
        ValueError: If the pixel data is cut off, contradicts the size beyond repair, or has no decoder installed.
    """

    def __init__(self, file: DicomFile, name: str):
        self._file = file
        self._name = name
        self._last: tuple[int, np.ndarray] | None = None
        self._data = b""
        self._streams: list[bytes] = []
        self.remarks: list[Remark] = []
        self.layout = self._layout()
        is_compressed = self.layout.syntax not in (*NATIVE, ENCAPSULATED_UNCOMPRESSED)
        self._plugins = plugins_of(self.layout.syntax, self.layout.samples, name) if is_compressed else ()
        self._check_length()
        self._choose_interpretation()

    def __call__(self, frame: int) -> np.ndarray:
        """Decode one frame to stored values (H, W), or to colour (H, W, 3) uint8.

        Raises:
            ValueError: If its data is damaged.
        """
        decoded = self._decoded(frame)  # shared with later calls: never written to
        if not self.layout.is_colour:
            return self._interpreted(decoded, self.layout)
        if self.layout.photometric == _PALETTE:
            decoded = self._palette(self._interpreted(decoded, self.layout))
        if decoded.dtype != np.uint8:
            used = 8 * decoded.itemsize if self.layout.photometric == _PALETTE else self.layout.stored
            decoded = (decoded >> max(0, used - 8)).astype(np.uint8)
        return decoded

    # ----------------------------------------------------------------------------------------------------------------
    # What the tags and the data say

    def _layout(self) -> PixelLayout:
        tags = self._file.tags
        keyword = next((key for key in PIXEL_KEYWORDS if tags.value(key)), None)
        if keyword is None:
            raise bad_source(self._name, "DICOM without pixel data (or cut off before it)")
        data = self._data = bytes(tags.value(keyword))
        rows, columns = tags.count("Rows"), tags.count("Columns")
        frames = tags.count("NumberOfFrames")
        if rows is None or columns is None:
            raise bad_source(self._name, "DICOM without image size")
        frames = 1 if frames is None else frames
        if frames > MAX_FRAMES:
            raise bad_source(self._name, f"declares {frames} frames, expected at most {MAX_FRAMES}")
        if min(rows, columns, frames) < 1:
            raise bad_source(self._name, f"image of size {(frames, rows, columns)}, expected at least one pixel")
        samples, photometric = self._colour_of(tags)
        declared = self._file.syntax
        is_float = keyword != "PixelData"
        allocated = {"FloatPixelData": 32, "DoubleFloatPixelData": 64}.get(keyword) or self._allocated(
            tags, data, rows * columns * samples * frames
        )
        stored = tags.count("BitsStored")
        if not is_float and (stored is None or not 1 <= stored <= allocated):
            self._assume(f"bits stored missing or impossible: {allocated} taken, all that are allocated")
            stored = allocated
        representation = tags.count("PixelRepresentation")
        if not is_float and representation not in (0, 1):
            self._assume("signedness missing or impossible: unsigned taken")
            representation = 0
        layout = PixelLayout(
            keyword=keyword,
            syntax=declared,
            rows=rows,
            columns=columns,
            frames=frames,
            samples=samples,
            photometric=photometric,
            planar=1 if tags.count("PlanarConfiguration") == 1 else 0,
            allocated=allocated,
            stored=allocated if is_float else stored,
            shift=0,
            signed=representation == 1,
        )
        layout = self._with_true_syntax(layout, data)
        check_voxels(self._name, layout.frames, layout.rows, layout.columns)
        check_frame(self._name, layout.rows, layout.columns, layout.samples)
        return layout

    def _colour_of(self, tags: Tags) -> tuple[int, str]:
        photometric = tags.word("PhotometricInterpretation").replace("_COLOR", " COLOR")
        samples = tags.count("SamplesPerPixel")
        if samples is None:
            samples = 3 if photometric in _COLOUR else 1
        if samples not in (1, 3):
            raise bad_source(self._name, f"DICOM with {samples} samples a pixel, expected 1 (grey) or 3 (colour)")
        expected = _COLOUR if samples == 3 else (*_GRAY, _PALETTE)
        if photometric in expected:
            return samples, photometric
        if photometric and photometric not in (*_COLOUR, *_GRAY, _PALETTE):
            raise bad_source(self._name, "DICOM in a colour space that is retired or unknown")
        assumed = expected[0] if samples == 3 else "MONOCHROME2"
        self._assume(f"photometric interpretation missing or impossible: {assumed} taken", "warning")
        return samples, assumed

    def _allocated(self, tags: Tags, data: bytes, values: int) -> int:
        """Return bits allocated as declared, or by the length of native pixel data."""
        declared, stored = tags.count("BitsAllocated"), tags.count("BitsStored") or 0
        whole, rest = divmod(len(data), values)
        by_length = {1: 8, 2: 16, 4: 32}.get(whole) if rest <= 1 and not is_encapsulated(data) else None
        if declared in (1, 8, 16, 32, 64):
            # Half of the data missing looks like fewer bits: what the bits stored leave possible decides.
            fits = by_length is not None and (stored <= by_length < declared or declared < stored <= by_length)
            if not fits or declared == 1:
                return declared
        elif declared is not None and declared > 0 and by_length is None:
            raise bad_source(self._name, f"DICOM with {declared} bits allocated, expected 1, 8, 16, 32 or 64")
        allocated = by_length or (8 if 0 < stored <= 8 else 16)
        self._assume(f"bits allocated missing or contradictory: {allocated} taken")
        return allocated

    def _with_true_syntax(self, layout: PixelLayout, data: bytes) -> PixelLayout:
        """Find how the data is encoded where the file does not say or is wrong, and the size of the code stream."""
        if layout.keyword != "PixelData":
            return replace(layout, syntax=EXPLICIT_LITTLE if self._file.little_endian else EXPLICIT_BIG)
        if not is_encapsulated(data) or len(data) == _native_length(layout):
            if layout.syntax not in NATIVE:
                self._assume("pixel data is not compressed, whatever the transfer syntax says")
            return self._native(layout, len(data))
        self._streams = frame_streams(self._file, data, layout.frames, self._name)
        self._data = b""
        with suppress(Exception):
            del self._file.tags.dataset.PixelData  # held once, in frames
        if layout.syntax == ENCAPSULATED_UNCOMPRESSED:
            return layout
        possible, size = inspect_stream(self._streams[0])
        syntax = layout.syntax
        if possible and syntax not in possible:
            syntax = possible[0]
            self._assume("pixel data is compressed in another way than the transfer syntax says")
        elif not possible and syntax in (*NATIVE, ""):
            raise bad_source(self._name, "DICOM compressed in a way that it does not say and that is not recognised")
        if size is not None and size != (layout.rows, layout.columns):
            self._assume(
                f"compressed image of {size[0]} x {size[1]} pixels, unlike rows and columns: taken", "warning"
            )
            layout = replace(layout, rows=size[0], columns=size[1])
        return replace(layout, syntax=syntax, planar=0)

    def _native(self, layout: PixelLayout, length: int) -> PixelLayout:
        is_little = self._file.little_endian and layout.syntax != GE_BIG
        layout = replace(layout, syntax=EXPLICIT_LITTLE if is_little else EXPLICIT_BIG)
        if layout.photometric == "YBR_FULL_422" and length >= 3 * _native_length(layout) // 2:
            layout = replace(layout, photometric="YBR_FULL")
        return layout

    def _check_length(self) -> None:
        needed = _native_length(self.layout)
        if self.layout.syntax in NATIVE and len(self._data) < needed:
            reason = f"truncated or damaged DICOM pixel data: {len(self._data)} of {needed} bytes"
            raise bad_source(self._name, reason)

    # ----------------------------------------------------------------------------------------------------------------
    # Decoding

    def _decoded(self, frame: int) -> np.ndarray:
        """Decode a frame as pydicom does, without its treatment of unused bits; the last one is kept."""
        last = self._last
        if last is not None and last[0] == frame:
            return last[1]
        layout = self.layout
        options = _options(layout, self._file)
        stream = self._streams[frame] if self._streams else b""
        array = None
        if layout.syntax in NATIVE:
            array = self._native_array(self._data, frame, layout.syntax, options)
        elif layout.syntax == ENCAPSULATED_UNCOMPRESSED:
            array = self._native_array(stream, 0, EXPLICIT_LITTLE, options | {"number_of_frames": 1})
        elif is_whole(stream, layout.syntax, layout.rows, layout.columns):
            options["number_of_frames"] = 1
            array = decode_stream(stream, layout.syntax, self._plugins, options, self._name)
        expected = (layout.rows, layout.columns, *([3] if layout.samples == 3 else []))
        if array is None or array.shape != expected:
            raise bad_source(self._name, f"truncated or damaged DICOM pixel data (frame {frame})")
        array = array.astype(array.dtype.newbyteorder("="), copy=False)
        self._last = (frame, array)
        return array

    def _native_array(self, data: bytes, index: int, syntax: str, options: dict[str, Any]) -> np.ndarray | None:
        with quiet_pydicom(self._name) as pydicom, suppress(Exception):
            return pydicom.pixels.get_decoder(pydicom.uid.UID(syntax)).as_array(data, index=index, **options)[0]
        return None

    def _palette(self, indices: np.ndarray) -> np.ndarray:
        colours = None
        with quiet_pydicom(self._name) as pydicom, suppress(Exception):
            colours = pydicom.pixels.apply_color_lut(indices, self._file.tags.dataset)[..., :3]
        if colours is None:
            raise bad_source(self._name, "DICOM whose colour palette is missing or damaged")
        return colours

    # ----------------------------------------------------------------------------------------------------------------
    # Which bits are the value

    def _choose_interpretation(self) -> None:
        """Settle shift, bits stored and sign by one frame, where its bits leave a doubt.

        Values below half of what the bits stored hold read the same in every way, and a few values above it are
        padding and markers.
        """
        layout = self.layout
        if layout.keyword != "PixelData" or layout.is_colour or layout.allocated <= 8:
            return
        if layout.syntax in SIGNED_BY_PYDICOM:
            return
        words = _unsigned(self._decoded(layout.frames // 2))[:: max(1, layout.rows // 256)]
        layout = self._with_shift(words)
        values = words >> layout.shift
        doubtful = values[values >= 1 << (layout.stored - 1)]
        if len(np.unique(doubtful)) < _DISTINCT:
            self.layout = layout
            return
        readings = [replace(layout, stored=stored, signed=signed) for stored, signed in self._readings(layout)]
        rough = [_roughness(self._interpreted(words, reading)) for reading in readings]
        best = int(np.argmin(rough))
        if rough[best] < _SMOOTHER * rough[0]:
            layout = readings[best]
            kind = "signed" if layout.signed else "unsigned"
            message = f"bits stored or signedness contradict the pixels: read as {layout.stored} bits, {kind}"
            self._assume(message, "warning")
        self.layout = layout

    def _readings(self, layout: PixelLayout) -> list[tuple[int, bool]]:
        """List bits and sign as declared, then what else they may be.

        Radiographs are unsigned. White beside black would be as smooth with a sign: only CT is given one.
        """
        full = layout.allocated - layout.shift
        signs = [layout.signed]
        if layout.signed or self._file.tags.word("Modality") in ("CT", ""):
            signs.append(not layout.signed)
        widths = [layout.stored]
        if full > layout.stored and not self._has_overlay_bits():
            widths.append(full)
        return [(width, sign) for width in widths for sign in signs]

    def _has_overlay_bits(self) -> bool:
        """Tell whether bits above the value hold an overlay (retired: OverlayBitPosition without OverlayData)."""
        tags = self._file.tags
        return any(tags.count_at(tag) for tag in OVERLAY_BIT_TAGS)

    def _with_shift(self, words: np.ndarray) -> PixelLayout:
        """Move values down where the high bit lies above the bits stored, and bits there are in use."""
        layout = self.layout
        high = self._file.tags.count("HighBit")
        if high is None or high == layout.stored - 1 or layout.stored == layout.allocated:
            return layout
        shift = high + 1 - layout.stored
        if shift > 0 and high < layout.allocated and int(words.max()) >> layout.stored:
            return replace(layout, shift=shift)
        self._assume("high bit contradicts the bits stored and the pixels: ignored")
        return layout

    @staticmethod
    def _interpreted(words: np.ndarray, layout: PixelLayout) -> np.ndarray:
        """Cut values out of their words, with their sign."""
        if words.dtype.kind == "f" or layout.syntax in SIGNED_BY_PYDICOM or layout.allocated == 1:
            return words
        words = _unsigned(words)
        bits = 8 * words.itemsize
        if bits < layout.shift + layout.stored:  # a plugin that returns fewer bits than are stored
            return words
        up, down = bits - layout.shift - layout.stored, bits - layout.stored
        values = (words << up) if up else words
        values = values.view(values.dtype.str.replace("u", "i")) if layout.signed else values
        return values >> down if down else values

    def _assume(self, message: str, severity: str = "info") -> None:
        self.remarks.append(Remark("assumed", message, severity))


def check_frame(name: str, rows: int, columns: int, samples: int) -> None:
    """Refuse a frame of more than `MAX_FRAME_PIXELS` values before anything of its size is allocated."""
    most = MAX_FRAME_PIXELS // samples
    if rows * columns > most:
        raise bad_source(name, f"image of {rows} x {columns} pixels, expected at most {most}")


def _native_length(layout: PixelLayout) -> int:
    bits = layout.frames * layout.rows * layout.columns * layout.samples * layout.allocated
    return (bits // 3 * 2 if layout.photometric == "YBR_FULL_422" else bits + 7) // 8


def _options(layout: PixelLayout, file: DicomFile) -> dict[str, Any]:
    options = {
        "rows": layout.rows,
        "columns": layout.columns,
        "number_of_frames": layout.frames,
        "samples_per_pixel": layout.samples,
        "photometric_interpretation": layout.photometric,
        "planar_configuration": layout.planar,
        "bits_allocated": layout.allocated,
        "bits_stored": layout.stored,
        "pixel_representation": int(layout.signed),
        "pixel_keyword": layout.keyword,
        "pixel_vr": file.pixel_vr,
    }
    if layout.syntax not in SIGNED_BY_PYDICOM:
        options["correct_unused_bits"] = False
    return options


def _unsigned(words: np.ndarray) -> np.ndarray:
    return words.view(words.dtype.str.replace("i", "u")) if words.dtype.kind == "i" else words


def _roughness(values: np.ndarray) -> float:
    """Sum how much neighbours differ."""
    values = values.astype(np.float64)
    return float(np.abs(np.diff(values, axis=0)).sum() + np.abs(np.diff(values, axis=1)).sum())
