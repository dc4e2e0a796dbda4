# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Find images that are copies of each other: recompressed, scaled, cropped, padded, brightened, marked or mirrored.

Every image becomes a thumbnail and a few perceptual hashes: signs of the low frequencies of the cosine transform of
its local contrast. They are of the image as it is, without its border, and of slightly smaller cuts of it, so that a
cropped copy meets the cut that resembles it. Images that share a band of hash bits are compared by Hamming distance,
and what is left by aligning the thumbnails (`m3fm.data.thumbnail_alignment`): hashes of chest images of different
people are close.
"""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from ..borders_m3fm import find_border
from ..imaging_m3fm import read_image
from ..read_ahead_m3fm import read_ahead
from .groups import group_keys
from .hash_search import Candidates, candidates
from .schema import StudyRecord
from .thumbnail_alignment import agreement, local_contrast

__all__ = [
    "MAX_DISTANCE",
    "MIN_CORRELATION",
    "DuplicatePair",
    "ImageHashes",
    "RecordHashes",
    "hash_images",
    "hash_records",
    "near_duplicates",
]

#: Of local contrast, after alignment. Measured: benchmarks/near_duplicates.py.
MIN_CORRELATION = 0.83
#: Bits of a hash, of 255. Measured as well.
MAX_DISTANCE = 52

_SIDE = 64  # of a thumbnail
_FREQUENCIES = 16  # a side: 16 x 16 signs, of which that of the mean is left out
_WORDS = _FREQUENCIES * _FREQUENCIES // 64
# Cuts of the image within its border: shares taken off at left, top, right and bottom. The first is the thumbnail.
_CUTS = np.array(
    [(0, 0, 0, 0), (0.025,) * 4, (0.05,) * 4]
    + [(0.025 * left, 0.025 * top, 0.025 * (1 - left), 0.025 * (1 - top)) for left in (0, 1) for top in (0, 1)],
    dtype=np.float32,
)
# The last hash is of the image with its border.
_HASHES = len(_CUTS) + 1
# The planes of a volume that are hashed, as shares of its slices.
_PLANES = (0.3, 0.5, 0.7)
# Hounsfield units that become black and white.
_WINDOW = (-1000.0, 400.0)
# Local contrast that is hashed: neighbourhood in pixels of the thumbnail, noise, most standard deviations.
_CONTRAST = (6.0, 0.02, 1.0)
# Thumbnails with less between black and white show nothing.
_LEAST_CONTRAST = 0.02

_ENTRY = np.dtype(
    [
        ("key", np.uint64, (2,)),
        ("plane", np.uint8),
        ("planes", np.uint8),
        ("is_blank", np.bool_),
        ("border", np.float32, (4,)),
        ("hashes", np.uint64, (_HASHES, _WORDS)),
        ("thumbnail", np.uint8, (_SIDE, _SIDE)),
    ]
)
# Entries of another layout are in a file of another name.
_CACHE_FILE = "image_hashes_1.bin"
_FLUSH = 256
# Candidates whose thumbnails are in memory at once.
_PAIRS = 8192
# Of a CT that is given as its slices, this many are hashed, evenly spread.
_MOST_IMAGES = 8


@dataclass(frozen=True)
class ImageHashes:
    """Hold the hashes of a list of images.

    Attributes:
        entries: One a plane that was hashed, in the order of the images; volumes have several.
        owners: (entries,) the place of its image in the list.
        count: Images in the list.
        unreadable: Places of the images that could not be read.
    """

    entries: np.ndarray
    owners: np.ndarray
    count: int
    unreadable: tuple[int, ...] = ()


@dataclass(frozen=True)
class DuplicatePair:
    """Hold two images that show the same.

    Attributes:
        first: Place in the list of images.
        second: A later place.
        correlation: Of their local contrast when laid over each other.
        distance: Bits in which their nearest hashes differ.
        is_mirrored: Whether one is the other with left and right exchanged.
    """

    first: int
    second: int
    correlation: float
    distance: int
    is_mirrored: bool = False


def hash_images(
    sources: Iterable[Any], workers: int = 0, cache_folder: Path | None = None, progress: bool = True
) -> ImageHashes:
    """Hash images, each as `m3fm.imaging_m3fm.read_image` takes it: a path, bytes, {"bytes", "path"}, an array.

    Args:
        sources: The images. Of a volume three planes are hashed.
        workers: Processes that read; 0: this one.
        cache_folder: Where hashes are kept, under the digest of file name, size and time of change (of the bytes,
            where there is no file); a run that was stopped goes on from there. None: nowhere.
        progress: Whether to show a bar.

    Raises:
        ValueError: If workers is out of range.
    """
    sources = list(sources)
    store = _Store(cache_folder)
    keys = [_key(source) for source in sources] if cache_folder is not None else [None] * len(sources)
    missing = [place for place, key in enumerate(keys) if key not in store]
    found: dict[int, np.ndarray] = {}
    bar = tqdm(
        total=len(sources), initial=len(sources) - len(missing), desc="hashes", unit="img", disable=not progress
    )
    with bar, store:
        results = read_ahead(_entries_of, (sources[place] for place in missing), workers, ahead=4 * workers or None)
        for place, result in zip(missing, results, strict=True):
            if result.error is None:
                found[place] = result.value
                if keys[place] is not None:
                    store.add(keys[place], result.value)
            elif not isinstance(result.error, (ValueError, ImportError)):
                raise result.error
            bar.update()
    parts = [store[key] if key in store else found.get(place) for place, key in enumerate(keys)]
    sizes = [0 if part is None else len(part) for part in parts]
    return ImageHashes(
        entries=np.concatenate([np.empty(0, _ENTRY), *(part for part in parts if part is not None)]),
        owners=np.repeat(np.arange(len(sources)), sizes),
        count=len(sources),
        unreadable=tuple(place for place, size in enumerate(sizes) if not size),
    )


def near_duplicates(
    hashes: ImageHashes,
    max_distance: int = MAX_DISTANCE,
    min_correlation: float = MIN_CORRELATION,
    mirrored: bool = True,
) -> list[DuplicatePair]:
    """Find the images that are copies of each other.

    Of images with one and the same hash, each is compared with the first of them alone: enough to group them, and a
    set with a thousand equal images does not give a million pairs. Blank images are no copies.

    Args:
        hashes: Of the images.
        max_distance: Bits in which the nearest of their hashes may differ.
        min_correlation: Of the local contrast of the aligned thumbnails.
        mirrored: Whether to look for mirrored copies too.

    Returns:
        Pairs, ordered by place; each pair of images once.
    """
    shown = np.flatnonzero(~hashes.entries["is_blank"])
    words, owners = hashes.entries["hashes"][shown], hashes.owners[shown]
    pairs: dict[tuple[int, int], DuplicatePair] = {}
    for is_mirrored in (False, True) if mirrored else (False,):
        close = candidates(words, words ^ _mirror_bits() if is_mirrored else None, max_distance)
        close = close.take(owners[close.first] != owners[close.second])
        for start in range(0, len(close.first), _PAIRS):
            some = close.take(slice(start, start + _PAIRS))
            correlation = _correlation(hashes.entries, shown, some, is_mirrored)
            for number in np.flatnonzero(correlation >= min_correlation):
                low, high = sorted((int(owners[some.first[number]]), int(owners[some.second[number]])))
                value = float(correlation[number])
                if (low, high) not in pairs or pairs[low, high].correlation < value:
                    pairs[low, high] = DuplicatePair(low, high, value, int(some.distance[number]), is_mirrored)
    return [pairs[key] for key in sorted(pairs)]


def _correlation(entries: np.ndarray, shown: np.ndarray, close: Candidates, is_mirrored: bool) -> np.ndarray:
    """Align the thumbnails of candidates, whose items are places in `shown`."""
    first, second = shown[close.first], shown[close.second]
    rows = np.arange(len(first))
    first_boxes = _boxes(entries["border"][first])[rows, close.first_hash]
    second_boxes = _boxes(entries["border"][second])[rows, close.second_hash]
    thumbnails = entries["thumbnail"][second]
    if is_mirrored:
        thumbnails = thumbnails[:, :, ::-1]
        second_boxes = second_boxes[:, [2, 1, 0, 3]] * np.float32([-1, 1, -1, 1]) + np.float32([1, 0, 1, 0])
    return agreement(entries["thumbnail"][first], thumbnails, first_boxes, second_boxes)


@dataclass(frozen=True)
class RecordHashes:
    """Hold the hashes of the images of studies.

    Attributes:
        images: Their hashes.
        studies: Source and study id of each image.
    """

    images: ImageHashes
    studies: tuple[tuple[str, str], ...] = field(repr=False)

    @cached_property
    def pairs(self) -> list[DuplicatePair]:
        """Near-duplicates among the images; those within a study too."""
        return near_duplicates(self.images)

    @cached_property
    def compared(self) -> frozenset[tuple[str, str]]:
        """Source and study id of the studies with an image that could be compared: readable, and not blank."""
        shown = self.images.owners[~self.images.entries["is_blank"]] if self.images.count else ()
        return frozenset(self.studies[int(place)] for place in shown)

    @cached_property
    def marks(self) -> dict[tuple[str, str], tuple[str, ...]]:
        """Source and study id to the groups of its near-duplicate images; studies without any are left out.

        Images that are joined through a chain of near-duplicates are one group.
        """
        linked = sorted({place for pair in self.pairs for place in (pair.first, pair.second)})
        joined: dict[int, list[str]] = {place: [f"image:{place:09}"] for place in linked}
        for pair in self.pairs:
            joined[pair.second].append(f"image:{pair.first:09}")
        marks: dict[tuple[str, str], list[str]] = defaultdict(list)
        for place, group in zip(linked, group_keys(joined[place] for place in linked), strict=True):
            marks[self.studies[place]].append(group)
        return {study: tuple(dict.fromkeys(groups)) for study, groups in marks.items()}


def hash_records(
    records: Iterable[StudyRecord], workers: int = 0, cache_folder: Path | None = None, progress: bool = True
) -> RecordHashes:
    """Hash the images of studies.

    Args:
        records: Of any sets. Of a CT given as slices a few are hashed, of a volume three planes.
        workers: Processes that read; 0: this one.
        cache_folder: Where hashes are kept (`hash_images`).
        progress: Whether to show a bar.
    """
    sources, studies = [], []
    for record in records:
        images = record.images
        if len(images) > _MOST_IMAGES:
            images = [images[int(place)] for place in np.linspace(0, len(images) - 1, _MOST_IMAGES)]
        for image in images:
            sources.append(image.source)
            studies.append((record.source, record.study_id))
    return RecordHashes(hash_images(sources, workers, cache_folder, progress), tuple(studies))


def _boxes(borders: np.ndarray) -> np.ndarray:
    """Return which part each hash shows, in sides of the thumbnail: (entries, hashes, 4)."""
    cuts = np.broadcast_to(_CUTS * [1, 1, -1, -1] + [0, 0, 1, 1], (len(borders), *_CUTS.shape))
    left, top, right, bottom = borders.T
    width, height = right - left, bottom - top
    whole = np.stack([-left / width, -top / height, (1 - left) / width, (1 - top) / height], axis=1)
    return np.concatenate([cuts, whole[:, None]], axis=1).astype(np.float32)


# --------------------------------------------------------------------------------------------------------------------
# From an image to its entries


def _entries_of(source: Any) -> np.ndarray:
    """Read an image and return one entry a plane."""
    image = read_image(source)
    count = len(image.pixels)
    numbers = [0] if count == 1 else sorted({int(share * (count - 1)) for share in _PLANES})
    entries = np.zeros(len(numbers), _ENTRY)
    for plane, number in enumerate(numbers):
        pixels = np.asarray(image.pixels[number])
        if image.units == "hu":
            pixels = ((pixels - _WINDOW[0]) / (_WINDOW[1] - _WINDOW[0])).clip(0, 1)
        entries[plane] = _entry(pixels)
    entries["plane"], entries["planes"] = np.arange(len(numbers)), len(numbers)
    return entries


def _entry(pixels: np.ndarray) -> np.ndarray:
    """Return the entry of one plane (H, W), 0 (black) to 1 (white)."""
    height, width = pixels.shape
    border = find_border(pixels)
    inner = np.array([border.left, border.top, width - border.right, height - border.bottom], np.float32)
    inner_size = np.tile(inner[2:] - inner[:2], 2)
    boxes = [*(inner + _CUTS * [1, 1, -1, -1] * inner_size), (0, 0, width, height)]
    picture = Image.fromarray(np.ascontiguousarray(pixels, dtype=np.float32))
    views = np.stack([_resized(picture, tuple(map(float, box))) for box in boxes])  # (hashes, N, N)
    entry = np.zeros((), _ENTRY)
    low, high = float(views[0].min()), float(views[0].max())
    entry["is_blank"] = high - low < _LEAST_CONTRAST
    entry["border"] = inner / [width, height, width, height]
    entry["hashes"] = _hashes(views)
    entry["thumbnail"] = np.rint((views[0] - low) * (255 / max(high - low, 1e-6))).astype(np.uint8)
    return entry


def _resized(picture: Image.Image, box: tuple[float, float, float, float]) -> np.ndarray:
    # Reduced by whole steps first, which is fast, to no less than three times what is wanted.
    small = picture.resize((_SIDE, _SIDE), Image.Resampling.BILINEAR, box=box, reducing_gap=3)
    return np.asarray(small, dtype=np.float32)


@cache
def _cosines() -> np.ndarray:
    """Return the rows (frequencies, N) of the cosine transform."""
    steps, frequencies = np.arange(_SIDE) + 0.5, np.arange(_FREQUENCIES)
    return np.cos(np.pi / _SIDE * frequencies[:, None] * steps).astype(np.float32)


def _hashes(views: np.ndarray) -> np.ndarray:
    """Return the signs of the low frequencies of views (V, N, N) as words: (V, words)."""
    cosines = _cosines()
    low, high = views.min(axis=(1, 2), keepdims=True), views.max(axis=(1, 2), keepdims=True)
    contrast = local_contrast((views - low) / np.maximum(high - low, 1e-6), *_CONTRAST)
    is_positive = (cosines @ contrast @ cosines.T).reshape(len(views), -1) > 0
    is_positive[:, 0] = False
    return np.packbits(is_positive, axis=1, bitorder="little").view(np.uint64)


@cache
def _mirror_bits() -> np.ndarray:
    """Return the bits (words,) that change when left and right are exchanged: those of odd frequencies along rows."""
    odd = np.zeros((_FREQUENCIES, _FREQUENCIES), bool)
    odd[:, 1::2] = True
    return np.packbits(odd.reshape(1, -1), axis=1, bitorder="little").view(np.uint64)[0]


# --------------------------------------------------------------------------------------------------------------------
# What was hashed before


def _key(source: Any) -> tuple[int, int] | None:
    """Return a digest of what names an image and its state; None where it has neither file nor bytes."""
    if isinstance(source, Mapping):
        source = source.get("path") if source.get("bytes") is None else source["bytes"]
    digest = hashlib.sha256()
    if isinstance(source, (str, os.PathLike)):
        try:
            status = os.stat(source)
        except (OSError, ValueError):
            return None
        digest.update(
            f"{status.st_size}/{status.st_mtime_ns}/{os.path.abspath(source)}".encode(errors="surrogateescape")
        )
    elif isinstance(source, (bytes, bytearray, memoryview)):
        digest.update(source)
    else:
        return None
    words = np.frombuffer(digest.digest()[:16], np.uint64)
    return int(words[0]), int(words[1])


class _Store:
    """Keep entries in a file, to which they are added as they come."""

    def __init__(self, folder: Path | None):
        self._path = None if folder is None else Path(folder) / _CACHE_FILE
        self._waiting: list[np.ndarray] = []
        self._entries = np.empty(0, _ENTRY)
        self._places: dict[tuple[int, int], slice] = {}
        if self._path is not None and self._path.is_file():
            # A stopped run may have left half an entry.
            whole = self._path.stat().st_size // _ENTRY.itemsize
            if whole:
                self._entries = np.memmap(self._path, _ENTRY, mode="r", shape=(whole,))
            self._index()

    def _index(self) -> None:
        keys, planes = self._entries["key"], self._entries["planes"]
        for start in np.flatnonzero(self._entries["plane"] == 0):
            end = start + planes[start]
            if end <= len(keys) and (keys[start:end] == keys[start]).all():
                self._places[int(keys[start, 0]), int(keys[start, 1])] = slice(int(start), int(end))

    def __contains__(self, key: tuple[int, int] | None) -> bool:
        return key in self._places

    def __getitem__(self, key: tuple[int, int]) -> np.ndarray:
        return self._entries[self._places[key]]

    def __enter__(self) -> _Store:
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if self._path.is_file():
                os.truncate(self._path, len(self._entries) * _ENTRY.itemsize)
        return self

    def __exit__(self, *_: object) -> None:
        self._flush()

    def add(self, key: tuple[int, int], entries: np.ndarray) -> None:
        """Keep the entries of an image."""
        entries["key"] = key
        self._waiting.append(entries)
        if len(self._waiting) >= _FLUSH:
            self._flush()

    def _flush(self) -> None:
        if self._waiting and self._path is not None:
            with open(self._path, "ab") as file:
                file.write(np.concatenate(self._waiting).tobytes())
            self._waiting.clear()
