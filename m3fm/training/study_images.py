# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""The images of a batch of studies: read from their files, or as tokens that a frozen tower gave before.

Letters: B studies, N images of a study, S tokens of an image, C width of the tower, H and W rows and columns.
"""

import copy
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import PurePath
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import get_worker_info

from ..chest_image_m3fm import ChestImage
from ..image_processing_m3fm import M3FMImageProcessor
from ..series_m3fm import read_study
from ..slices_m3fm import MIDDLE_FRACTION, choose_slices, chosen_slices
from .augmentation import Augmentation, apply_change
from .features import FeatureCache
from .fed_studies import Draw, FedStudy, chosen_images, opened

__all__ = ["CachedTokens", "Images", "StudyPixels", "UnreadableBatchError"]

logger = logging.getLogger(__name__)

ON_UNREADABLE = ("raise", "skip")
# Each worker counts in a place of its own: two that counted in one could lose a study.
_COUNTERS = 256


class UnreadableBatchError(ValueError):
    """Says that a batch is empty, as all of its studies were skipped; the loaders of `feed` pass it over."""


class Images(Protocol):
    """What gives a collator the images of a batch."""

    def batch(self, studies: Sequence[FedStudy], draw: Draw) -> tuple[list[FedStudy], dict[str, torch.Tensor]]:
        """Returns the studies that are in the batch, and their tensors."""

    def for_evaluation(self) -> "Images":
        """Returns what gives the same images, not augmented."""


class StudyPixels:
    """Reads images: `pixel_values` (B, N, 3, H, W), `image_mask` (B, N).

    Args:
        image_processor: Prepares them, as it does for inference.
        max_views: Most views of a radiograph that are read; slices of a CT are the image processor's to count.
        on_unreadable: "raise": an image that cannot be read ends the training, with the name of its file; "skip": its
            study is left out of the batch, counted in `skipped`, and its file named in a warning. Of a batch with no
            study left, `ResumableLoader` and `StreamLoader` take the next; in `Trainer` or a plain `DataLoader` it
            ends the training, so that there batches should not be small or bad files many.
        augmentation: How images are changed; None: not at all, as for validation.

    Raises:
        ValueError: For an option out of range.
    """

    def __init__(
        self,
        image_processor: M3FMImageProcessor,
        max_views: int = 4,
        on_unreadable: str = "raise",
        augmentation: Augmentation | None = None,
    ):
        if on_unreadable not in ON_UNREADABLE or max_views < 1:
            raise ValueError(
                f"Expected on_unreadable to be one of {list(ON_UNREADABLE)} and max_views >= 1, got "
                f"{on_unreadable!r} and {max_views!r}."
            )
        self.image_processor = image_processor
        self.max_views = max_views
        self.on_unreadable = on_unreadable
        self.augmentation = augmentation
        # In shared memory: what workers skip is known here.
        self._skipped = torch.zeros(_COUNTERS, dtype=torch.int64).share_memory_()

    @property
    def skipped(self) -> int:
        """How many studies were left out so far because an image could not be read, by all workers together."""
        return int(self._skipped.sum())

    def for_evaluation(self) -> "StudyPixels":
        """Returns what reads the same images, not augmented, and counts into the same `skipped`."""
        plain = copy.copy(self)
        plain.augmentation = None
        return plain

    def batch(self, studies: Sequence[FedStudy], draw: Draw) -> tuple[list[FedStudy], dict[str, torch.Tensor]]:
        """Reads the images of a batch.

        Raises:
            UnreadableBatchError: If unreadable ones are skipped, and none of the studies can be read.
            ValueError: If an image cannot be read and that is not to be skipped, or a study has no image.
        """
        if not all(study.images for study in studies):
            raise ValueError("A study of the batch has no image: leave such studies out of what is collated.")
        if self.augmentation is None:
            # Nearly always all can be read, and at once is faster; which one cannot is found out below.
            with suppress(ValueError):
                sources = [self._sources(study) for study in studies]
                return list(studies), dict(self.image_processor.preprocess(sources, return_tensors="pt"))
        kept, pixels = [], []
        for study in studies:
            try:
                pixels.append(self._pixels(study, draw))
                kept.append(study)
            except ValueError as error:
                if self.on_unreadable == "raise":
                    raise ValueError(_named(error, study)) from None
                self._count_skipped(_named(error, study))
        if not kept:
            raise UnreadableBatchError(
                f"None of the {len(studies)} studies of a batch can be read; the warnings name the files."
            )
        pixel_values, image_mask = _padded(pixels, np.float32)
        return kept, {"pixel_values": pixel_values, "image_mask": image_mask}

    def _count_skipped(self, message: str) -> None:
        logger.warning("study left out of the batch: %s", message)
        worker = get_worker_info()
        self._skipped[0 if worker is None else 1 + worker.id % (_COUNTERS - 1)] += 1

    def _sources(self, study: FedStudy) -> list[Any]:
        chosen = chosen_images(study, self.max_views, self.image_processor.num_slices)
        return [opened(each) for each in chosen]

    def _pixels(self, study: FedStudy, draw: Draw) -> np.ndarray:
        """Reads the images of one study: (N, 3, H, W)."""
        processor, sources = self.image_processor, self._sources(study)
        if self.augmentation is None:
            return processor.preprocess([sources], return_tensors="np")["pixel_values"][0]
        images = [
            self._moved_slices(image, study, draw) for image in read_study(sources, percentiles=processor.cxr_window)
        ]
        windows = self.augmentation.windows(draw, processor.ct_windows, study.key)
        planes = processor.preprocess(
            [images], return_tensors="np", ct_windows=windows, image_mean=[0.0] * 3, image_std=[1.0] * 3
        )["pixel_values"][0]  # (N, 3, H, W) in 0..1
        changes = self.augmentation.changes(draw, study.modality, study.key, len(planes), study.reports.values())
        for image, change in zip(planes, changes, strict=True):
            grey = np.array_equal(image[0], image[1]) and np.array_equal(image[0], image[2])
            # One window is three equal channels, of which one is changed.
            image[:] = apply_change(image[0], change) if grey else [apply_change(each, change) for each in image]
        mean, std = (np.asarray(each, dtype=np.float32) for each in (processor.image_mean, processor.image_std))
        return (planes - mean[:, None, None]) / std[:, None, None]

    def _moved_slices(self, image: ChestImage, study: FedStudy, draw: Draw) -> ChestImage:
        """Takes slices of a volume that lie a little higher or lower than those that inference would take."""
        processor = self.image_processor
        total, count = len(image.pixels), processor.num_slices
        if image.slice_numbers is not None or processor.slice_selection == "all" or total <= count:
            return image
        if processor.slice_selection == "uniform":
            numbers, spacing = choose_slices(total, count), total * MIDDLE_FRACTION / count
        else:
            numbers = np.asarray(chosen_slices(image, processor.slice_selection, count).slice_numbers)
            spacing = float(np.diff(numbers).mean()) if count > 1 else 1.0
        offset = self.augmentation.slice_offset(draw, spacing, study.key)
        return image.take(numbers + min(max(offset, -int(numbers[0])), total - 1 - int(numbers[-1])))


class CachedTokens:
    """Serves tokens of a frozen tower: `vision_features` (B, N, S, C), `image_mask` (B, N).

    Args:
        cache: Was filled with all studies that are asked for.
        max_views: As in `StudyPixels`.
        max_slices: Most slices of a CT that are pictures of their own.
    """

    def __init__(self, cache: FeatureCache, max_views: int = 4, max_slices: int = 8):
        self.cache = cache
        self.max_views = max_views
        self.max_slices = max_slices

    def batch(self, studies: Sequence[FedStudy], draw: Draw) -> tuple[list[FedStudy], dict[str, torch.Tensor]]:
        """Looks the images of a batch up."""
        tokens = [self.cache.tokens(chosen_images(study, self.max_views, self.max_slices)) for study in studies]
        features, mask = _padded(tokens, np.float16)
        return list(studies), {"vision_features": features.float(), "image_mask": mask}

    def for_evaluation(self) -> "CachedTokens":
        """Returns this: tokens are never augmented."""
        return self


def _padded(arrays: Sequence[np.ndarray], dtype: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Stacks arrays (N, ...) of several N to (B, N, ...), zero where there is none, and says where there is one."""
    longest = max(len(each) for each in arrays)
    stacked = np.zeros((len(arrays), longest, *arrays[0].shape[1:]), dtype=dtype)
    mask = np.zeros((len(arrays), longest), dtype=bool)
    for row, each in enumerate(arrays):
        stacked[row, : len(each)], mask[row, : len(each)] = each, True
    return torch.from_numpy(stacked), torch.from_numpy(mask)


def _named(error: ValueError, study: FedStudy) -> str:
    """Puts the file names of a shard into a message that speaks of bytes."""
    message = str(error)
    names = [PurePath(each["path"]).name for each in study.images if isinstance(each, Mapping) and each.get("path")]
    return message.replace("<bytes>", ", ".join(names[:3])) if names else message
