# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""From stored values to Hounsfield units (CT) or to display intensity (radiographs, captures).

Sources: modality transform DICOM PS3.3 C.11.1, display window and LUT (VOI) C.11.2, padding C.7.5.1.1.2. Letters:
H rows, W columns.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from .chest_image_m3fm import ChestImage, Remark, gray_from_uint8, stretch
from .dicom_geometry_m3fm import frame_item
from .dicom_pixels_m3fm import PixelLayout
from .dicom_tags_m3fm import DicomFile, Tags
from .hounsfield_m3fm import infer_offset

AIR_HU = -1024.0

# Padding in this range may be tissue: it is believed only where the corners hold it.
_TISSUE_HU = (-1000.0, 3100.0)
# RescaleType (PS3.3 C.11.1.1.2) of what is no HU. Other words are unspecific, or one more spelling of HU.
_OTHER_TYPES = {"OD", "MGML", "Z_EFF", "ED", "EDW", "PCT"}
# A window fits if not nearly every pixel is black or white in it.
_MOST_SATURATED = 0.99


@dataclass(frozen=True)
class _Table:
    """Hold a lookup table: what `first` and the values after it become."""

    first: int
    bits: int
    values: np.ndarray  # (N,)

    def __call__(self, values: np.ndarray) -> np.ndarray:
        index = np.clip(np.rint(values).astype(np.int64) - self.first, 0, len(self.values) - 1)
        return self.values[index].astype(np.float32)


class FrameValues:
    """Turn stored values of a file's frames into HU or intensity, in one way for all of them.

    Args:
        file: The file.
        layout: How its pixel data is read.
        modality: "ct", "cxr" or None.
        percentiles: Where no display range is stated, see `stretch`; None takes minimum and maximum.
        sample: The stored values of one frame, on which what is in doubt is decided.
        frame: Its number.
        like: Another slice of the series, whose inferred HU are taken over.

    Attributes:
        units: "hu" or "intensity".
        remarks: What was inferred or ignored.
    """

    def __init__(
        self,
        file: DicomFile,
        layout: PixelLayout,
        modality: str | None,
        percentiles: tuple[float, float] | None,
        sample: np.ndarray,
        frame: int,
        like: ChestImage | None = None,
    ):
        self._file = file
        self._tags = file.tags
        self._layout = layout
        self._percentiles = percentiles
        self._is_ct = modality == "ct"
        self._offset = 0.0
        self.remarks: list[Remark] = []
        self._modality_table = _table(self._tags.item("ModalityLUTSequence"), file, layout.signed)
        self._inverted = layout.photometric == "MONOCHROME1" or self._tags.word("PresentationLUTShape") == "INVERSE"
        inferred = [remark for remark in (like.remarks if like else ()) if remark.code == "uncalibrated"]
        self._like = (like.units, inferred[0]) if inferred else None
        self.units = self._decide_units(sample, frame)
        if self.units == "intensity":
            self._remark_display(sample, frame)

    def __call__(self, stored: np.ndarray, frame: int) -> np.ndarray:
        """Turn the stored values of a frame, (H, W) or colour (H, W, 3), into (H, W) float32."""
        if stored.ndim == 3:
            return gray_from_uint8(stored).astype(np.float32) / np.float32(255)
        values = self._measured(stored, frame)
        valid = self._valid(stored, values)
        if self.units == "hu":
            values = values + np.float32(self._offset)
            return values if valid is None else np.where(valid, values, np.float32(AIR_HU))
        pixels = self._shown(stored, values, valid, frame)
        pixels = 1 - pixels if self._inverted else pixels
        return pixels if valid is None else np.where(valid, pixels, np.float32(0))

    # ----------------------------------------------------------------------------------------------------------------
    # Modality transform

    def _rescale(self, frame: int) -> tuple[float, float] | None:
        for tags in (frame_item(self._tags, frame, "PixelValueTransformationSequence"), self._tags):
            slope, intercept = tags.number("RescaleSlope"), tags.number("RescaleIntercept")
            if slope or (slope is None and intercept is not None):
                return slope or 1.0, intercept or 0.0
        return None

    def _measured(self, stored: np.ndarray, frame: int) -> np.ndarray:
        """Apply the modality transform of a frame: float32."""
        if self._modality_table is not None:
            return self._modality_table(stored)
        rescale = self._rescale(frame)
        values = stored.astype(np.float32)
        if rescale is not None and rescale != (1.0, 0.0):
            values *= np.float32(rescale[0])
            values += np.float32(rescale[1])
        return values

    def _decide_units(self, sample: np.ndarray, frame: int) -> str:
        if not self._is_ct:
            return "intensity"
        rescale = self._rescale(frame)
        eight_bits = self._layout.stored <= 8 and self._layout.keyword == "PixelData"
        if sample.ndim == 3 or (eight_bits and rescale in (None, (1.0, 0.0)) and self._modality_table is None):
            message = "CT as captured from a display: its values are intensity, the window is as it was"
            self.remarks.append(Remark("display_values", message))
            return "intensity"
        kinds = {self._tags.word("RescaleType")}
        kinds.add(frame_item(self._tags, frame, "PixelValueTransformationSequence").word("RescaleType"))
        if kinds & _OTHER_TYPES:
            message = "CT whose values are stated to be another quantity than HU: shown as intensity"
            self.remarks.append(Remark("uncalibrated", message, "warning"))
            return "intensity"
        if self._modality_table is None and rescale in (None, (1.0, 0.0)):
            return self._infer(sample, is_stated=rescale is not None)
        return "hu"

    def _infer(self, sample: np.ndarray, is_stated: bool) -> str:
        """Find HU where no rescale is stated, or one that changes nothing."""
        if self._like is not None:
            units, remark = self._like
            self._offset = remark.value or 0.0
            self.remarks.append(remark)
            return units
        valid = self._valid(sample, sample.astype(np.float32))
        offset = infer_offset(sample if valid is None else sample[valid])
        if is_stated and not offset:
            return "hu"
        if offset is None:
            message = "CT without rescale whose histogram does not tell HU: shown as intensity"
            self.remarks.append(Remark("uncalibrated", message, "warning"))
            return "intensity"
        self._offset = offset
        stated = "with a rescale that contradicts its histogram" if is_stated else "without rescale"
        told = f"{offset:+.0f} makes HU of its values" if offset else "its values are HU"
        message = f"CT {stated}: air and soft tissue tell that {told}"
        self.remarks.append(Remark("uncalibrated", message, "warning", offset))
        return "hu"

    def _valid(self, stored: np.ndarray, values: np.ndarray) -> np.ndarray | None:
        """Find pixels outside the padding, (H, W) bool; None where there is none."""
        value, limit = self._tags.number("PixelPaddingValue"), self._tags.number("PixelPaddingRangeLimit")
        if value is None:
            return None
        low, high = sorted(self._as_stored(number) for number in (value, value if limit is None else limit))
        padding = (stored >= low) & (stored <= high)
        if not padding.any() or padding.all():
            return None
        if self._is_ct:
            inside = values[padding]
            is_tissue = inside.max() > _TISSUE_HU[0] and inside.min() < _TISSUE_HU[1]
            corners = padding[[0, 0, -1, -1], [0, -1, 0, -1]].sum()
            if is_tissue and corners < 3:
                return None
        return ~padding

    def _as_stored(self, number: float) -> float:
        """Read a padding value with the sign of the pixels: its type in the file is often the other one."""
        span = 2.0**self._layout.allocated
        if self._layout.signed and number >= span / 2:
            return number - span
        return number + span if not self._layout.signed and number < 0 else number

    # ----------------------------------------------------------------------------------------------------------------
    # Display

    def _shown(self, stored: np.ndarray, values: np.ndarray, valid: np.ndarray | None, frame: int) -> np.ndarray:
        """Bring values to 0..1 by the first VOI that fits, their 8 bits, or percentiles."""
        for voi in self._vois(frame):
            if _fits(voi, values, valid):
                return voi(values)
        plain = self._layout.stored <= 8 and not self._layout.signed and self._layout.keyword == "PixelData"
        if plain and self._modality_table is None:
            return np.clip(stored.astype(np.float32) / np.float32(2**self._layout.stored - 1), 0, 1)
        return stretch(values, self._percentiles, valid)

    def _remark_display(self, sample: np.ndarray, frame: int) -> None:
        if sample.ndim == 3:
            if (sample[..., :1] != sample).any():
                self.remarks.append(Remark("colour", "a colour image, made grey"))
            return
        values = self._measured(sample, frame)
        vois = self._vois(frame)
        valid = self._valid(sample, values)
        if not vois and self._states_voi(frame):
            self.remarks.append(Remark("window_ignored", "the display window or table is damaged, another was taken"))
        elif vois and values.min() < values.max() and not any(_fits(voi, values, valid) for voi in vois):
            message = f"none of {len(vois)} display windows fits the pixels, the range of their values was taken"
            self.remarks.append(Remark("window_ignored", message, "info", len(vois)))

    def _states_voi(self, frame: int) -> bool:
        return any(
            tags.numbers("WindowCenter") or tags.items("VOILUTSequence")
            for tags in (frame_item(self._tags, frame, "FrameVOILUTSequence"), self._tags)
        )

    def _vois(self, frame: int) -> list[Any]:
        """List the tables and windows that the file offers for a frame: functions of values to 0..1."""
        vois: list[Any] = []
        for tags in (frame_item(self._tags, frame, "FrameVOILUTSequence"), self._tags):
            signed = self._layout.signed or (self._rescale(frame) or (1.0, 0.0))[1] < 0
            tables = [_table(item, self._file, signed) for item in tags.items("VOILUTSequence")]
            vois += [_scaled(table) for table in tables if table is not None]
            function = tags.word("VOILUTFunction") or "LINEAR"
            pairs = zip(tags.numbers("WindowCenter"), tags.numbers("WindowWidth"), strict=False)
            vois += [_windowed(*pair, function) for pair in pairs if pair[1] > (1 if function == "LINEAR" else 0)]
        return vois


def _fits(voi: Any, values: np.ndarray, valid: np.ndarray | None) -> bool:
    """Tell whether a window leaves grey levels, by a sample of the pixels."""
    step = max(1, min(values.shape) // 256)
    sample = values[::step, ::step]
    pixels = voi(sample if valid is None or not valid[::step, ::step].any() else sample[valid[::step, ::step]])
    share = max(float((pixels <= 0.005).mean()), float((pixels >= 0.995).mean()))
    return share < _MOST_SATURATED


def _windowed(center: float, width: float, function: str) -> Any:
    """Return a window as a function, in closed form and not by pydicom, which returns the range of the bits."""
    middle, span = np.float32(center), np.float32(width)

    def apply(values: np.ndarray) -> np.ndarray:
        if function == "SIGMOID":
            return 1 / (1 + np.exp(np.clip(-4 * (values - middle) / span, -80, 80), dtype=np.float32))
        if function == "LINEAR_EXACT":
            return np.clip((values - middle) / span + np.float32(0.5), 0, 1)
        return np.clip((values - (middle - np.float32(0.5))) / (span - 1) + np.float32(0.5), 0, 1)

    return apply


def _scaled(table: _Table) -> Any:
    """Return a VOI table as a function to 0..1.

    Where no entry uses the upper half of the bits stated, the bits are wrong: the next power of two is white.
    """
    bits = table.bits
    top = int(table.values.max())
    if top < 1 << (bits - 1) or top >= 1 << bits:
        bits = max(1, top.bit_length())
    white = np.float32(2**bits - 1)
    return lambda values: table(values) / white


def _table(item: Tags, file: DicomFile, is_signed: bool) -> _Table | None:
    """Read a lookup table (PS3.3 C.11.1.1.1), or None where there is none or it is damaged."""
    descriptor = [int(number) for number in item.numbers("LUTDescriptor")]
    data = item.value("LUTData")
    if len(descriptor) != 3 or data is None:
        return None
    count, first, bits = descriptor
    count = count or 1 << 16
    if isinstance(data, bytes):
        is_packed = len(data) in (count, count + 1) and bits <= 8
        values = np.frombuffer(data[: len(data) // 2 * 2] if not is_packed else data, _word(file, is_packed))
    else:
        values = np.array(item.numbers("LUTData"), dtype=np.int64)
    values = values[:count]
    if len(values) < 2 or not 1 <= bits <= 16:
        return None
    if is_signed and first >= 1 << 15:  # its type in the file is often the other one
        first -= 1 << 16
    return _Table(first, bits, values.astype(np.int64) & 0xFFFF)


def _word(file: DicomFile, is_packed: bool) -> str:
    return "u1" if is_packed else "<u2" if file.little_endian else ">u2"
