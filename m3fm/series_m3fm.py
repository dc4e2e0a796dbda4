# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Read the images of one study: files, a folder of them, or the slices of a CT series in any order.

Shapes: S slices, H rows, W columns. No remark and no error holds patient data; both name sources as they were given.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .chest_image_m3fm import ChestImage, LazyPixels, Remark, bad_source, finished
from .dicom_m3fm import SliceHeader, read_dicom, read_header
from .dicom_tags_m3fm import written_dicom
from .imaging_m3fm import DEFAULT_PERCENTILES, MAX_FILE_BYTES, read_image
from .slice_stack_m3fm import Slice, Stack, chest_stack, localizers_left_out
from .study_files_m3fm import find_images, kind_of, path_kind

# Of a study, this share of slices may be unreadable, and the others stand for it.
MAX_UNREADABLE = 1 / 3
# More are no study but a collection, which would fill the memory before anyone noticed.
MAX_IMAGES = 128
# How far the readable neighbour may be that stands for a slice whose pixels are damaged.
_NEIGHBOURS = (-1, 1, -2, 2)

_BYTES = (bytes, bytearray, memoryview)


def read_study(sources: Any, percentiles: tuple[float, float] | None = DEFAULT_PERCENTILES) -> list[ChestImage]:
    """Read the images of one study.

    CT slices become one volume: that of the series which shows the chest (see `chest_stack`), its slices ordered by
    the position that they state and decoded when they are asked for. A file is then opened again; what was given as
    bytes is kept. What was left out, is missing or is in doubt is told in the remarks.

    Args:
        sources: One source (see `read_image`), a folder, or a list or tuple of these. Folders are searched with all
            below them; images are told by content, and where there are DICOM files, NIfTI and raster files beside
            them are left out as copies, as are raster files beside NIfTI.
        percentiles: As in `read_image`.

    Returns:
        The images, at least one, in the order given: a volume stands where its first slice was given.

    Raises:
        ValueError: If there is no image, or more than `MAX_IMAGES` that are no CT slices; one cannot be read, or more
            than a third of the CT slices; the study mixes CT with radiographs, or has files of several patients.
        ImportError: If a DICOM or NIfTI file is given and its optional reader is not installed.
    """
    is_list = isinstance(sources, (list, tuple))
    given = list(sources) if is_list else [sources]
    if not given:
        raise ValueError("study without images: got an empty list, expected at least one image")
    if len(given) == 1 and not _is_folder(given[0]):
        return [read_image(given[0], percentiles)]
    name = _study_name(given)
    entries, skipped = _entries(given)
    remarks = [_not_images(skipped, "files without an image")] if skipped else []
    entries, left_out = _without_copies(entries)
    remarks += left_out
    if not entries:
        raise bad_source(name, f"holds no chest image, got {skipped} files that are neither DICOM, NIfTI nor raster")
    _refuse_several_patients(name, entries)
    if any(entry.is_ct for entry in entries):
        images = _with_volume(name, entries, percentiles, remarks)
    else:
        images = _without_volume(name, entries, percentiles, remarks)
    if {"ct", "cxr"} <= {image.modality for image in images}:
        raise _mixed(name)
    return images


def group_studies(paths: Iterable[str | os.PathLike]) -> list[tuple[str | os.PathLike, ...]]:
    """Part files into studies, each of which `read_study` takes.

    The radiographs of one DICOM study are its views and belong together, as do its CT series. DICOM files that are
    neither go with the CT of their study, or else with its radiographs. Every other file is a study of its own, and
    so is a DICOM file that cannot be read or does not say its study.

    Args:
        paths: Files, in any order; each is opened for its header.

    Returns:
        The studies in the order of their first files, files in the order given.

    Raises:
        ImportError: If there is a DICOM file and pydicom is not installed.
    """
    studies: dict[Any, list[tuple[int, _Entry]]] = {}
    for order, path in enumerate(paths):
        entry = _entry(path, os.fsdecode(path), path_kind(path), in_folder=True)
        header = entry.header
        key = order if header is None or header.study is None else (header.patient, header.study)
        studies.setdefault(key, []).append((order, entry))
    groups: list[list[tuple[int, _Entry]]] = []
    for members in studies.values():
        radiographs = [member for member in members if member[1].role == "radiograph"]
        others = [member for member in members if member[1].role != "radiograph"]
        is_mixed = bool(radiographs) and any(entry.is_ct for _, entry in others)
        groups += [radiographs, others] if is_mixed else [members]
    groups.sort(key=lambda group: group[0][0])
    return [tuple(entry.source for _, entry in group) for group in groups]


# --------------------------------------------------------------------------------------------------------------------
# What was given


@dataclass(frozen=True, eq=False)
class _Entry:
    """Hold one source of a study.

    Attributes:
        source: As `read_image` takes it; DICOM in memory is replaced by the bytes of its file.
        name: What errors call it.
        kind: "dicom", "nifti", "raster", or None for what is in memory already.
        in_folder: Found in a folder, and not named by the caller: it may be left out.
        header: Of a DICOM file that can be read.
    """

    source: Any
    name: str
    kind: str | None
    in_folder: bool
    header: SliceHeader | None = None

    @property
    def role(self) -> str:
        """Say what the source is to a study."""
        if self.kind != "dicom":
            return "image"
        if self.header is None:
            return "unreadable"
        return _dicom_role(self.header)

    @property
    def is_ct(self) -> bool:
        """Say whether the source is a slice of a CT, or a volume of DICOM frames."""
        return self.role == "slice"


def _dicom_role(header: SliceHeader) -> str:
    if not header.has_pixels:
        is_cut_off = header.modality in ("ct", "cxr") or header.series is None
        return "unreadable" if is_cut_off else "report"
    # Stripped of its modality, or converted to secondary captures: only slices have a place in the patient.
    is_placed = header.modality in ("ct", "") and header.position is not None
    if is_placed or (header.modality == "ct" and not header.is_secondary_capture):
        return "localizer" if header.is_localizer else "slice"
    if header.is_secondary_capture or header.modality == "":
        return "capture"
    return "other" if header.modality is None else "radiograph"


def _entries(given: Sequence[Any]) -> tuple[list[_Entry], int]:
    """Look at each source, and into folders; also count what was skipped there."""
    entries: list[_Entry] = []
    skipped = 0
    for source in given:
        if _is_folder(source):
            found, aside = find_images(source)
            entries += [_entry(path, path, kind, in_folder=True) for path, kind in found]
            skipped += aside
        else:
            entries.append(_given_entry(source))
    return entries, skipped


def _given_entry(source: Any) -> _Entry:
    """Look at a source that is no folder; what is not DICOM is left to `read_image` as it is."""
    content, name = source, f"<{type(source).__name__}>"
    if isinstance(source, Mapping):  # a `datasets.Image` value that is not decoded
        content = source.get("path") if source.get("bytes") is None else source["bytes"]
    if isinstance(content, (str, os.PathLike)):
        return _entry(content, os.fsdecode(content), path_kind(content), in_folder=False)
    if isinstance(content, _BYTES):
        content, name = bytes(content), "<bytes>"
    elif any(kind.__module__.startswith("pydicom.") for kind in type(source).__mro__):
        content, name = written_dicom(source), "<DICOM data set>"
    elif hasattr(source, "read") and hasattr(source, "seek"):
        content, name = _file_content(source), getattr(source, "name", "<file object>")
    if not isinstance(content, bytes) or kind_of(content) != "dicom":
        return _Entry(source, name, None, in_folder=False)
    return _entry(content, name if isinstance(name, str) else "<file object>", "dicom", in_folder=False)


def _file_content(source: Any) -> bytes | None:
    """Read an open file from its start, and leave it where it was; None for what is no file of bytes."""
    with suppress(Exception):  # closed and broken files: `read_image` says why
        position = source.tell()
        source.seek(0)
        content = source.read(MAX_FILE_BYTES)
        source.seek(position)
        return content if isinstance(content, bytes) else None
    return None


def _entry(source: Any, name: str, kind: str | None, in_folder: bool) -> _Entry:
    header = None
    if kind == "dicom":
        try:
            header = read_header(source, name)
        except ValueError:
            header = None
    return _Entry(source, name, kind, in_folder, header)


def _is_folder(source: Any) -> bool:
    return isinstance(source, (str, os.PathLike)) and os.path.isdir(source)


def _study_name(given: list[Any]) -> str:
    first = given[0]
    if not isinstance(first, (str, os.PathLike)) or not os.path.exists(first):
        return f"study of {len(given)} images"
    return os.fsdecode(first) if len(given) == 1 else f"study of {len(given)} images ({os.fsdecode(first)} the first)"


def _without_copies(entries: list[_Entry]) -> tuple[list[_Entry], list[Remark]]:
    """Leave out what lies in a folder beside a better form of it: previews and conversions of DICOM files."""
    found = {entry.kind for entry in entries if entry.in_folder}
    best = next((kind for kind in ("dicom", "nifti") if kind in found), None)
    if best is None or (best == "dicom" and not any(_has_image(entry) for entry in entries)):
        return entries, []
    kept = [entry for entry in entries if not entry.in_folder or entry.kind == best]
    count = len(entries) - len(kept)
    if not count:
        return entries, []
    form = {"dicom": "DICOM", "nifti": "NIfTI"}[best]
    return kept, [_not_images(count, f"files of other kinds beside {form} files")]


def _has_image(entry: _Entry) -> bool:
    return entry.role in ("slice", "radiograph", "unreadable")


def _refuse_several_patients(name: str, entries: Iterable[_Entry]) -> None:
    patients = {entry.header.patient for entry in entries if entry.header is not None} - {None}
    if len(patients) > 1:
        raise bad_source(
            name, f"DICOM files of {len(patients)} patients, expected the images of one study: give each study alone"
        )


def _mixed(name: str) -> ValueError:
    return bad_source(name, "CT and radiographs in one study: give the CT as one study and the radiographs as another")


def _not_images(count: int, what: str) -> Remark:
    return Remark("not_images", f"{what} left out: {count}", value=count)


# --------------------------------------------------------------------------------------------------------------------
# Studies


def _without_volume(
    name: str, entries: list[_Entry], percentiles: tuple[float, float] | None, remarks: list[Remark]
) -> list[ChestImage]:
    """Read a study without CT slices, one by one; what DICOM studies have beside radiographs is left out."""
    images = [entry for entry in entries if entry.role in ("image", "radiograph")]
    if images:
        studies = _studies(images)
        kept = [
            entry
            for entry in entries
            if entry.role in ("image", "radiograph") or _is_kept_beside_images(entry, studies)
        ]
    else:
        kept = [entry for entry in entries if entry.role in ("capture", "unreadable")]
        kept = kept or [entry for entry in entries if not entry.in_folder]  # reading them says what they are
    if not kept:
        raise bad_source(name, f"holds no chest image, got {len(entries)} DICOM files of other kinds")
    if len(kept) > MAX_IMAGES:
        raise bad_source(
            name, f"{len(kept)} images, expected one study of at most {MAX_IMAGES}: give each study alone"
        )
    remarks = [*remarks, *_one_of_a_folder(name, kept)]
    if len(kept) < len(entries):
        remarks = [*remarks, _not_images(len(entries) - len(kept), "DICOM files that are no radiographs")]
    read = [_read(entry, percentiles) for entry in kept]
    if len(_studies(kept)) > 1:
        remarks = [*remarks, _several_studies(kept)]
    return [read[0].remarked(*remarks), *read[1:]]


def _one_of_a_folder(name: str, entries: list[_Entry]) -> list[Remark]:
    """Refuse, or doubt, that what lies in a folder and does not say whose it is, is one study."""
    kinds = [entry.kind for entry in entries if entry.in_folder]
    if kinds.count("nifti") > 1:
        raise bad_source(name, f"holds {kinds.count('nifti')} NIfTI volumes, expected one study: give each alone")
    count = kinds.count("raster")
    message = f"{count} images of a folder, which do not say whose they are, taken as one study"
    return [Remark("assumed", message, "warning", count)] if count > 1 else []


def _with_volume(
    name: str, entries: list[_Entry], percentiles: tuple[float, float] | None, remarks: list[Remark]
) -> list[ChestImage]:
    """Read a study with CT slices: one volume of them, and what else was named."""
    roles = [entry.role for entry in entries]
    if "radiograph" in roles:
        raise _mixed(name)
    slices = [
        Slice(entry.source, entry.name, entry.header, order) for order, entry in enumerate(entries) if entry.is_ct
    ]
    unreadable = [entry.name for entry in entries if entry.role == "unreadable"]
    if len(unreadable) > MAX_UNREADABLE * (len(slices) + len(unreadable)):
        raise bad_source(
            name,
            f"{len(unreadable)} of {len(slices) + len(unreadable)} slices cannot be read, {unreadable[0]} among "
            "them; expected at most a third",
        )
    stack = chest_stack(slices)
    remarks = [*remarks, *_left_out(roles)]
    if unreadable:
        message = f"unreadable slices left out: {len(unreadable)} of {len(slices) + len(unreadable)}"
        remarks.append(Remark("unreadable_slices", message, "warning", len(unreadable)))
    if len(_studies(slices)) > 1:
        remarks.append(_several_studies(slices))
    volume = _volume(name, stack, percentiles).remarked(*stack.remarks, *remarks)
    first = min(entry.order for entry in stack.slices)
    images = []
    for order, entry in enumerate(entries):
        if order == first:
            images.append(volume)
        elif entry.role == "image":
            images.append(_read(entry, percentiles))
    return images


def _left_out(roles: list[str]) -> list[Remark]:
    """Say what a CT study had beside its slices."""
    remarks = []
    if "localizer" in roles:
        remarks.append(localizers_left_out(roles.count("localizer")))
    if "capture" in roles:
        remarks.append(_not_images(roles.count("capture"), "secondary captures"))
    if "report" in roles:
        remarks.append(_not_images(roles.count("report"), "DICOM files without pixels, such as dose reports"))
    if "other" in roles:
        count = roles.count("other")
        remarks.append(Remark("other_series", f"images of another modality left out: {count}", value=count))
    return remarks


def _is_kept_beside_images(entry: _Entry, studies: set[int]) -> bool:
    """Say whether to read, and maybe fail on, a DICOM file that is no radiograph in a study of images."""
    if entry.role == "capture":  # of the same study it shows the radiograph again, or is a form
        return not entry.in_folder and entry.header.study not in studies
    return entry.role == "unreadable"


def _studies(entries: Sequence[_Entry | Slice]) -> set[int]:
    return {entry.header.study for entry in entries if entry.header is not None} - {None}


def _several_studies(entries: Sequence[_Entry | Slice]) -> Remark:
    count = len(_studies(entries))
    return Remark("other_series", f"images of {count} DICOM studies given as one", "warning", count, 1)


def _read(
    entry: _Entry | Slice, percentiles: tuple[float, float] | None, like: ChestImage | None = None
) -> ChestImage:
    """Read one image; DICOM bytes under the name of the file that they came from."""
    source = entry.source
    if like is not None and isinstance(source, (str, os.PathLike)):
        with suppress(OSError):  # `read_image` says why
            source = Path(source).read_bytes()
    if isinstance(source, bytes) and entry.header is not None:
        return read_dicom(source, entry.name, percentiles, like)
    return read_image(source, percentiles)


# --------------------------------------------------------------------------------------------------------------------
# Volumes


class SeriesPixels(LazyPixels):
    """Stand for the pixels of a series; a file is opened when its slice is asked for.

    A slice whose pixels are damaged is given as its nearest readable neighbour, and told in `remarks`.

    Args:
        slices: In order.
        sample: One of them. Where its HU had to be inferred, those of all are taken in the same way; a slice of
            another size or in other units counts as damaged.
        percentiles: As in `read_image`.
    """

    def __init__(self, slices: Sequence[Slice], sample: ChestImage, percentiles: tuple[float, float] | None):
        super().__init__((len(slices), *sample.pixels.shape[1:]), self._readable)
        self._slices, self._percentiles, self._sample = tuple(slices), percentiles, sample
        self._damaged: set[int] = set()

    @property
    def remarks(self) -> tuple[Remark, ...]:
        """What decoding has noticed so far."""
        count = len(self._damaged)
        if not count:
            return ()
        message = f"slices that cannot be decoded, and are shown as their nearest readable neighbours: {count}"
        return (Remark("unreadable_slices", message, "warning", count),)

    def _readable(self, number: int) -> np.ndarray:
        image, damaged = _nearest_readable(self._slices, number, self._percentiles, self._sample)
        self._damaged.update(damaged)
        return image.pixels[0]  # (H, W)


def _volume(name: str, stack: Stack, percentiles: tuple[float, float] | None) -> ChestImage:
    """Make the volume of a stack. The middle slice is decoded for what holds for all of them."""
    if len(stack.slices) == 1:
        return _decoded(stack.slices[0], percentiles)
    middle = len(stack.slices) // 2
    # Others are asked only where it is not in HU: one slice that is odd is not to stand for all.
    places = (middle, middle // 2, middle + middle // 2)
    samples = (_nearest_readable(stack.slices, place, percentiles)[0] for place in places)
    sample = next((each for each in samples if each.units == "hu"), None)
    if sample is None:
        sample, _ = _nearest_readable(stack.slices, middle, percentiles)
    pixels = SeriesPixels(stack.slices, sample, percentiles)
    spacing = None if sample.spacing is None or stack.step is None else (stack.step, *sample.spacing[1:])
    return finished(name, pixels, modality="ct", units=sample.units, spacing=spacing, remarks=sample.remarks)


def _nearest_readable(
    slices: Sequence[Slice],
    number: int,
    percentiles: tuple[float, float] | None,
    sample: ChestImage | None = None,
) -> tuple[ChestImage, list[int]]:
    """Decode a slice or, where it is damaged, the nearest one that is not; also say which were found damaged."""
    errors: dict[int, ValueError] = {}
    for place in (number, *(number + step for step in _NEIGHBOURS)):
        if 0 <= place < len(slices):
            try:
                return _decoded(slices[place], percentiles, sample), list(errors)
            except ValueError as error:
                errors[place] = error
    raise errors[number]


def _decoded(entry: Slice, percentiles: tuple[float, float] | None, sample: ChestImage | None = None) -> ChestImage:
    """Read a slice, which has to be of the kind of `sample`, another one of its series."""
    if sample is None:
        return _read(entry, percentiles)
    inferred = any(remark.code == "uncalibrated" for remark in sample.remarks)
    image = _read(entry, percentiles, sample if inferred else None)
    kind, expected = ((*each.pixels.shape[1:], each.units) for each in (image, sample))
    if kind != expected:
        raise bad_source(entry.name, f"slice of {kind} (rows, columns, units), expected {expected} as in its series")
    return image


__all__ = ["MAX_IMAGES", "MAX_UNREADABLE", "SeriesPixels", "group_studies", "read_study"]
