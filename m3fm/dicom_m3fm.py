# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Read a DICOM file into a `ChestImage`, or its header alone.

Messages and remarks carry no text of any tag. Letters: S slices or frames, H rows, W columns.
"""

import hashlib
import io
import os
from dataclasses import dataclass, field

import numpy as np

from .chest_image_m3fm import ChestImage, LazyPixels, Remark, bad_source, finished, without_nan
from .dicom_geometry_m3fm import (
    Turn,
    frame_order,
    oblique_remarks,
    orientation_of,
    position_of,
    remark_of,
    spacing_of,
    states_orientation,
    thickness_of,
    turn_of_letters,
    turn_of_slices,
)
from .dicom_pixels_m3fm import FrameDecoder
from .dicom_tags_m3fm import HEADER_TAGS, IMAGE_TAGS, DicomFile, Tags, open_dicom
from .dicom_values_m3fm import FrameValues

_RADIOGRAPHY = ("CR", "DX", "DR", "RG", "RF", "XA")
# Other and secondary capture: may show anything, so they leave it to the image.
_UNSPECIFIC = ("OT", "SC")
_STORAGE = "1.2.840.10008.5.1.4.1.1."
_CT_CLASSES = tuple(_STORAGE + end for end in ("2", "2.1", "2.2"))
_RADIOGRAPHY_CLASSES = tuple(
    _STORAGE + end for end in ("1", "1.1", "1.1.1", "12.1", "12.1.1", "12.2", "12.2.1", "13.1.3")
)
_CAPTURE_CLASSES = tuple(_STORAGE + end for end in ("7", "7.1", "7.2", "7.3", "7.4"))

_VIEWS = {
    "PA": "PA",
    "AP": "AP",
    "LL": "LATERAL",
    "RL": "LATERAL",
    "LAT": "LATERAL",
    "LATERAL": "LATERAL",
    "POSTEROANTERIOR": "PA",
    "ANTEROPOSTERIOR": "AP",
}
# PS3.16 CID 4010, in SNOMED CT and in the older SNOMED RT: lateral, left, right, medial to lateral and back.
_VIEW_CODES = {
    **dict.fromkeys(("272479007", "R-10214", "R-40888"), "PA"),
    **dict.fromkeys(("399348003", "R-10206"), "AP"),
    **dict.fromkeys(("399067008", "R-102CD", "399173006", "R-10236", "399198007", "R-10232"), "LATERAL"),
    **dict.fromkeys(("399352003", "R-10228", "399260004", "R-10224"), "LATERAL"),
}

# Identifiers are compared, never shown: their hashes differ in every process.
_SALT = os.urandom(16)


@dataclass(frozen=True)
class SliceHeader:
    """Say what a file is without its pixels.

    `study`, `series`, `patient` and `instance` are hashes with a salt of this process: good for
    telling the same from another, for nothing else, and not shown.

    Attributes:
        modality: "cxr", "ct", or "" where the file does not say; None for another modality.
        is_localizer: A scout image.
        is_derived: Made from other images.
        is_secondary_capture: A captured display, document or film.
        has_pixels: Whether there is pixel data.
        rows: Rows, 0 where not stated.
        columns: Columns, 0 where not stated.
        frames: Frames.
        position: Where the slice lies along its normal (the cross product of its row and column directions), in mm.
        origin: Centre of the first pixel: x, y, z in mm.
        orientation: Direction cosines along a row, then down a column.
        pixel_spacing: Millimetres between rows, then between columns.
        slice_thickness: In mm.
        instance_number: InstanceNumber.
        series_number: SeriesNumber.
        acquisition_number: AcquisitionNumber.
        temporal_position: TemporalPositionIdentifier or TemporalPositionIndex.
    """

    study: int | None = field(repr=False)
    series: int | None = field(repr=False)
    patient: int | None = field(repr=False)
    instance: int | None = field(repr=False)
    modality: str | None
    is_localizer: bool
    is_derived: bool
    is_secondary_capture: bool
    has_pixels: bool
    rows: int
    columns: int
    frames: int
    position: float | None
    origin: tuple[float, float, float] | None
    orientation: tuple[float, ...] | None
    pixel_spacing: tuple[float, float] | None
    slice_thickness: float | None
    instance_number: int | None = field(repr=False)
    series_number: int | None = field(repr=False)
    acquisition_number: int | None = field(repr=False)
    temporal_position: int | None = field(repr=False)


def read_dicom(
    data: bytes, name: str, percentiles: tuple[float, float] | None, like: ChestImage | None = None
) -> ChestImage:
    """Read a radiograph to 0..1 or a CT to HU; several frames become slices, decoded when they are asked for.

    Args:
        data: The whole file.
        name: What errors call it.
        percentiles: For radiographs without a window that fits, see `stretch`; None takes minimum and maximum.
        like: Another slice of the same CT series: where its HU had to be inferred, they are taken in the same way.

    Returns:
        The image in radiological display, with its modality, view, spacing, and remarks on what was done or doubted.

    Raises:
        ValueError: If the file is damaged, has no pixels, has no installed decoder, or is of another modality.
        ImportError: If pydicom is missing.
    """
    file = open_dicom(io.BytesIO(data), name, IMAGE_TAGS, with_pixels=True)
    tags = file.tags
    modality = _modality(tags)
    if modality is None:
        raise bad_source(name, "DICOM of another modality, expected radiography (CR, DX, RG, RF, XA, OT, SC) or CT")
    if not file.has_pixels:
        raise bad_source(name, "DICOM without pixel data (or cut off before it)")
    decoder = FrameDecoder(file, name)
    middle = decoder.layout.frames // 2
    values = FrameValues(file, decoder.layout, modality, percentiles, decoder(middle), middle, like)
    view, hint = _view(tags) if modality != "ct" else (None, None)
    turn, turn_remarks = _turn_of(tags, modality, view)
    view = view or hint
    order, step = np.arange(decoder.layout.frames), None
    if decoder.layout.frames > 1:
        order, step, more = frame_order(tags, decoder.layout.frames)
        turn_remarks += more
    spacing = spacing_of(tags, step)
    if spacing is not None and spacing[0] == 0 and len(order) > 1:
        spacing = None  # a volume has depth, and nothing says how much

    def read(number: int) -> np.ndarray:
        frame = int(order[number])
        with np.errstate(all="ignore"):  # float pixel data may hold anything
            pixels = values(decoder(frame), frame)
        return np.ascontiguousarray(turn(without_nan(pixels, name)), dtype=np.float32)

    shape = (decoder.layout.rows, decoder.layout.columns)
    shape = (len(order), *(shape[::-1] if turn.transpose else shape))
    return finished(
        name,
        read(0)[None] if len(order) == 1 else LazyPixels(shape, read),
        modality=modality or None,
        units=values.units,
        view=view,
        spacing=None if spacing is None else (spacing[0], *turn.spacing(*spacing[1:])),
        remarks=(*_kind_remarks(tags, modality), *decoder.remarks, *values.remarks, *turn_remarks),
    )


def read_header(source: bytes | str | os.PathLike, name: str) -> SliceHeader:
    """Read the header of a file; of a path no more than that is read.

    Args:
        source: The file's bytes, or its path.
        name: What errors call it.

    Raises:
        ValueError: If it cannot be opened, is no DICOM file, or is damaged before the pixel data.
        ImportError: If pydicom is missing.
    """
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _header(open_dicom(io.BytesIO(source), name, HEADER_TAGS, with_pixels=False))
    try:
        with open(source, "rb") as file:
            return _header(open_dicom(file, name, HEADER_TAGS, with_pixels=False))
    except OSError as error:
        reason = error.strerror
    raise bad_source(name, f"cannot be read ({reason})")


def _header(file: DicomFile) -> SliceHeader:
    tags = file.tags
    kinds = tags.words("ImageType")
    spacing = spacing_of(tags)
    origin = tags.numbers("ImagePositionPatient")
    temporal = [tags.count(keyword) for keyword in ("TemporalPositionIdentifier", "TemporalPositionIndex")]
    return SliceHeader(
        study=_hashed(tags, "StudyInstanceUID"),
        series=_hashed(tags, "SeriesInstanceUID"),
        patient=_hashed(tags, "PatientID"),
        instance=_hashed(tags, "SOPInstanceUID"),
        modality=_modality(tags),
        is_localizer="LOCALIZER" in kinds,
        is_derived="DERIVED" in kinds,
        is_secondary_capture=_is_capture(tags),
        has_pixels=file.has_pixels,
        rows=max(0, tags.count("Rows") or 0),
        columns=max(0, tags.count("Columns") or 0),
        frames=max(1, tags.count("NumberOfFrames") or 1),
        position=position_of(tags),
        origin=origin if len(origin) == 3 else None,
        orientation=orientation_of(tags),
        pixel_spacing=None if spacing is None else spacing[1:],
        slice_thickness=thickness_of(tags),
        instance_number=tags.count("InstanceNumber"),
        series_number=tags.count("SeriesNumber"),
        acquisition_number=tags.count("AcquisitionNumber"),
        temporal_position=next((number for number in temporal if number is not None), None),
    )


def _hashed(tags: Tags, keyword: str) -> int | None:
    value = tags.word(keyword)
    if not value:
        return None
    return int.from_bytes(hashlib.blake2b(value.encode("utf-8", "replace"), key=_SALT, digest_size=8).digest(), "big")


def _is_capture(tags: Tags) -> bool:
    return tags.word("SOPClassUID") in _CAPTURE_CLASSES or "SCREEN SAVE" in tags.words("ImageType")


def _modality(tags: Tags) -> str | None:
    """Return "cxr", "ct", "" where the file does not say, or None for another modality."""
    declared, storage = tags.word("Modality"), tags.word("SOPClassUID")
    if declared == "CT" or (not declared and storage in _CT_CLASSES):
        return "ct"
    if declared in _RADIOGRAPHY or (not declared and storage in _RADIOGRAPHY_CLASSES):
        return "cxr"
    if not declared and not storage and _looks_like_ct(tags):
        return "ct"
    if declared in _UNSPECIFIC or (not declared and (not storage or storage in _CAPTURE_CLASSES)):
        return ""
    return None


def _looks_like_ct(tags: Tags) -> bool:
    """Tell CT that was stripped of its modality: a place in the patient, or signed values with a rescale.

    Radiographs have neither.
    """
    is_signed = tags.count("PixelRepresentation") == 1
    return position_of(tags) is not None or (is_signed and bool(tags.numbers("RescaleIntercept")))


def _kind_remarks(tags: Tags, modality: str) -> list[Remark]:
    """Say where the modality comes from, if no tag states it, and that a projection is no slice."""
    remarks = []
    if not tags.word("Modality") and not tags.word("SOPClassUID"):
        taken = "taken as CT by its place or its signed values" if modality == "ct" else "left to the image"
        remarks.append(Remark("assumed", f"modality missing: {taken}"))
    if modality == "ct" and "LOCALIZER" in tags.words("ImageType"):
        remarks.append(Remark("localizer", "a localizer of CT, which is a projection and no slice", "warning"))
    return remarks


def _view(tags: Tags) -> tuple[str | None, str | None]:
    """Return the view that is stated, by its position or its code, and the one that the orientation hints at."""
    position = tags.word("ViewPosition").replace("-", "").replace("_", "").replace(" ", "")
    if position in _VIEWS:
        return _VIEWS[position], None
    code = tags.item("ViewCodeSequence").word("CodeValue")
    if code in _VIEW_CODES:
        return _VIEW_CODES[code], None
    if position or code:  # stated, and another one: oblique, decubitus
        return None, None
    _, axis, is_implausible = turn_of_letters(tags, (0, 1), keeps_sides=True)
    return None, "LATERAL" if axis == 0 and not is_implausible else None


def _turn_of(tags: Tags, modality: str, view: str | None) -> tuple[Turn, list[Remark]]:
    """Find how to show the image, by ImageOrientationPatient (CT) or PatientOrientation."""
    orientation = orientation_of(tags) if modality == "ct" else None
    if orientation is not None:
        turn = turn_of_slices(orientation)
        return turn, [*oblique_remarks(orientation), *remark_of(turn)]
    doubt = Remark("assumed", "the orientation that is stated is implausible: shown as it is stored", "warning")
    if modality == "ct" and states_orientation(tags):
        return Turn(), [doubt]
    axes = (2,) if modality == "ct" else (0, 1) if view in (None, "LATERAL") else (1,)
    turn, _, is_implausible = turn_of_letters(tags, axes, keeps_sides=view == "LATERAL")
    return turn, [doubt] if is_implausible else remark_of(turn)


__all__ = ["SliceHeader", "read_dicom", "read_header"]
