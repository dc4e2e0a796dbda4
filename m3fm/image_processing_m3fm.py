# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Turn chest images of any source into the model's input: window, slice choice, letterbox, normalisation.

Letters: B studies, N images of a study (views of a radiograph, or slices chosen from a volume), S slices of a
volume, H and W the model's rows and columns.
"""

from typing import Any

import numpy as np
from PIL import Image
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.processing_utils import Unpack
from transformers.utils import TensorType

from .borders_m3fm import without_border
from .chest_image_m3fm import ChestImage
from .image_settings_m3fm import SETTINGS, M3FMImagesKwargs, checked_settings, refuse_unknown_settings
from .imaging_m3fm import DEFAULT_PERCENTILES, read_image
from .series_m3fm import read_study
from .slices_m3fm import chosen_slices

# Written into the saved JSON by transformers beside the settings.
_SERVICE_KEYS = ("image_processor_type", "processor_class", "feature_extractor_type", "auto_map")
# By how much display values may be outside 0..1, as resampling and rounding leave them.
_DISPLAY_SLACK = 1e-3


class M3FMImageProcessor(BaseImageProcessor):
    """Prepare radiographs and CT volumes for M3FM.

    Every setting is saved with the checkpoint and can be overridden in a call. Needs numpy and PIL only.

    Args:
        size: {"height", "width"} of the model's input, or one int for both. Images keep their aspect: the side that
            fills first fits, the rest is black on both sides.
        resample: PIL filter, bicubic by default; antialiased, in float32, clipped to 0..1.
        image_mean: Mean per channel, subtracted last.
        image_std: Standard deviation per channel.
        ct_windows: [[center, width]] in HU, repeated to three channels, or three of them, one per channel. "lung",
            "mediastinum" and "bone" name a usual window, and are kept as its numbers.
        cxr_window: [low, high] percentiles stretched to 0..1 where a source defines no display range (16-bit PNG,
            DICOM without window), or None for its minimum and maximum.
        cxr_border: "keep" leaves a radiograph as it is, "crop" cuts an even black or white border off before the
            letterbox (see `borders_m3fm`); all that is said of the image is then said of what remains. A single image
            whose file does not say what it is counts as a radiograph.
        slice_selection: "uniform": `num_slices` evenly over the middle 80 % of the slices; "lungs": over those that
            show lung (see `slices_m3fm`); "all": every slice.
        num_slices: Slices taken from a volume, unless all are; a volume with fewer gives them all.
        max_images: Most images a study may have, slices counted.
    """

    model_input_names = ["pixel_values", "image_mask"]
    valid_kwargs = M3FMImagesKwargs

    size = {"height": 224, "width": 224}
    resample = Image.Resampling.BICUBIC
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    ct_windows = [[-600.0, 1500.0]]  # the usual lung window
    cxr_window = list(DEFAULT_PERCENTILES)
    cxr_border = "keep"
    slice_selection = "uniform"
    num_slices = 8
    max_images = 64

    def __init__(self, **kwargs: Unpack[M3FMImagesKwargs]) -> None:
        """Set and check the settings.

        Raises:
            ValueError: If a setting is unknown or out of range.
        """
        settings = {key: kwargs.pop(key, getattr(type(self), key)) for key in SETTINGS}
        refuse_unknown_settings(key for key in kwargs if key not in _SERVICE_KEYS)
        super().__init__(**kwargs, **checked_settings(settings))

    @property
    def backend(self) -> str:
        """Name the library that resizes, in transformers' vocabulary."""
        return "pil"

    def fetch_images(self, images: Any) -> Any:
        """Return the images unread.

        `ProcessorMixin` calls this hook before the processor itself, and its default opens every string with PIL.
        Reading is left to `preprocess`, which knows the settings of the call and holds one study at a time.
        """
        return images

    def read(self, source: Any) -> ChestImage:
        """Read one source (see `read_image`), a volume whole.

        Raises:
            ValueError: If the source cannot be read as a chest image.
            ImportError: If a DICOM or NIfTI file is given and its optional reader is not installed.
        """
        return read_image(source, percentiles=self.cxr_window)

    def read_study(self, sources: Any) -> list[ChestImage]:
        """Read the images of one study, of volumes the slices that the model sees.

        `preprocess` reads the same, and takes the result in the place of the sources.

        Args:
            sources: One source (see `read_image`), a folder, or a list of these: views, or slices in any order.

        Returns:
            At least one image, in memory; `slice_numbers` says which slices of a volume it holds.

        Raises:
            ValueError: If a source cannot be read, or the study is empty or too large.
            ImportError: If a DICOM or NIfTI file is given and its optional reader is not installed.
        """
        settings = {key: getattr(self, key) for key in SETTINGS}
        return _read_images(list(sources) if isinstance(sources, (list, tuple)) else [sources], "the study", settings)

    def preprocess(
        self, images: Any, return_tensors: str | TensorType | None = None, **kwargs: Unpack[M3FMImagesKwargs]
    ) -> BatchFeature:
        """Prepare one image, a batch of images, or a batch of studies.

        Args:
            images: One source (see `read_image`) or folder is a batch of one study; a list of them is one study each;
                an element may itself be a list: the images of one study, views or the slices of a CT in any order.
                A `ChestImage` that `read_study` reduced to its slices is taken as it is.
            return_tensors: "pt" or "np"; None gives numpy arrays.
            **kwargs: Settings for this call only.

        Returns:
            `pixel_values` (B, N, 3, H, W) float32, zero where a study has fewer than N images, and `image_mask`
            (B, N) bool, True for real images.

        Raises:
            ValueError: If a source cannot be read, a study is empty or too large, or a setting is wrong.
            ImportError: If a DICOM or NIfTI file is given and its optional reader is not installed.
        """
        refuse_unknown_settings(kwargs)
        settings = checked_settings({key: kwargs.get(key, getattr(self, key)) for key in SETTINGS})
        studies = [_prepare_study(sources, i, settings) for i, sources in enumerate(_as_studies(images))]
        longest = max(len(study) for study in studies)
        pixel_values = np.zeros((len(studies), longest, *studies[0].shape[1:]), dtype=np.float32)  # (B, N, 3, H, W)
        image_mask = np.zeros((len(studies), longest), dtype=bool)  # (B, N)
        for i, study in enumerate(studies):
            pixel_values[i, : len(study)] = study
            image_mask[i, : len(study)] = True
        return BatchFeature({"pixel_values": pixel_values, "image_mask": image_mask}, tensor_type=return_tensors)


def letterbox(pixels: np.ndarray, height: int, width: int, resample: int) -> np.ndarray:
    """Resize (H0, W0) to (height, width), keeping the aspect, centred on black.

    Args:
        pixels: (H0, W0) float32 in 0..1.
        height: Rows of the result.
        width: Columns of the result.
        resample: PIL filter.

    Returns:
        (height, width) float32 in 0..1.
    """
    top, left, new_rows, new_columns = letterbox_place(*pixels.shape, height, width)
    if (new_rows, new_columns) != pixels.shape:
        image = Image.fromarray(np.ascontiguousarray(pixels, dtype=np.float32))
        # Bicubic and Lanczos overshoot at edges.
        pixels = np.clip(np.asarray(image.resize((new_columns, new_rows), resample)), 0, 1)
    if (new_rows, new_columns) == (height, width):
        return pixels
    canvas = np.zeros((height, width), dtype=np.float32)
    canvas[top : top + new_rows, left : left + new_columns] = pixels
    return canvas


def letterbox_place(rows: int, columns: int, height: int, width: int) -> tuple[int, int, int, int]:
    """Say where `letterbox` puts an image: its top and left, and the rows and columns it takes there."""
    scale = min(height / rows, width / columns)
    new_rows = min(height, max(1, round(rows * scale)))
    new_columns = min(width, max(1, round(columns * scale)))
    return (height - new_rows) // 2, (width - new_columns) // 2, new_rows, new_columns


def _prepare_study(sources: list[Any], index: int, settings: dict[str, Any]) -> np.ndarray:
    """Read the images of one study, window, letterbox and normalise: (N, 3, H, W)."""
    name = f"study {index} of the batch"
    images = _read_images(sources, name, settings)
    count = sum(len(image.pixels) for image in images)
    study = np.empty((count, 3, settings["size"]["height"], settings["size"]["width"]), dtype=np.float32)
    planes = (_render(image, pixels, name, settings) for image in images for pixels in image.pixels)
    for place, plane in enumerate(planes):
        study[place] = plane
    # In place: new memory for each step takes longer than the arithmetic.
    study -= np.asarray(settings["image_mean"], dtype=np.float32)[:, None, None]
    study /= np.asarray(settings["image_std"], dtype=np.float32)[:, None, None]
    return study


def _read_images(sources: list[Any], name: str, settings: dict[str, Any]) -> list[ChestImage]:
    """Read a study and reduce its images to what the model sees; `name` is what errors call it."""
    if not sources:
        raise ValueError(f"{name} has no image, expected at least one")
    images = read_study(sources, percentiles=settings["cxr_window"])
    _check_number(images, name, settings)
    images = [chosen_slices(image, settings["slice_selection"], settings["num_slices"]) for image in images]
    return images if settings["cxr_border"] == "keep" else [without_border(image) for image in images]


def _check_number(images: list[ChestImage], name: str, settings: dict[str, Any]) -> None:
    """Refuse a study with too many images before any slice is decoded."""
    limit, takes_all = settings["max_images"], settings["slice_selection"] == "all"
    number = 0
    for image in images:
        slices = len(image.pixels)
        number += slices if takes_all or image.slice_numbers is not None else min(slices, settings["num_slices"])
    if number <= limit:
        return
    if takes_all:
        raise ValueError(
            f"{name} has {number} slices, slice_selection 'all' takes at most max_images, which is {limit}: expected "
            f"max_images to be set to {number}, or slice_selection to 'uniform' or 'lungs'"
        )
    raise ValueError(
        f"{name} has more than {limit} images (max_images); give the slices of a CT as one volume, or as DICOM files"
    )


def _render(image: ChestImage, pixels: np.ndarray, name: str, settings: dict[str, Any]) -> np.ndarray:
    """Window one slice (H0, W0) of an image and letterbox it: (3, H, W), or (H, W) for all three, in 0..1."""
    _check_values(pixels, image.units, name)
    size = (settings["size"]["height"], settings["size"]["width"])
    if image.units == "intensity":
        return letterbox(pixels, *size, settings["resample"])
    # Windowed before the resize: metal and air far outside the window would ring into the lung.
    windowed = (np.clip((pixels - (c - w / 2)) / w, 0, 1) for c, w in settings["ct_windows"])
    channels = [letterbox(each, *size, settings["resample"]) for each in windowed]
    return channels[0] if len(channels) == 1 else np.stack(channels)


def _check_values(pixels: np.ndarray, units: str, name: str) -> None:
    """Refuse what only a `ChestImage` made by hand can hold: readers leave no such values."""
    low, high = float(pixels.min()), float(pixels.max())  # NaN if any pixel is
    if not np.isfinite([low, high]).all():
        raise ValueError(f"{name}: got NaN or infinite pixels, expected numbers")
    if units == "intensity" and (low < -_DISPLAY_SLACK or high > 1 + _DISPLAY_SLACK):
        raise ValueError(f"{name}: got display values of {low:g} to {high:g}, expected 0 (black) to 1 (white)")


def _as_studies(images: Any) -> list[list[Any]]:
    """Bring one source, a list of sources, or a list of lists into the form of lists of sources."""
    if not isinstance(images, (list, tuple)):
        return [[images]]
    if not images:
        raise ValueError("images: got an empty list, expected at least one image or study")
    return [list(each) if isinstance(each, (list, tuple)) else [each] for each in images]


__all__ = ["M3FMImageProcessor"]
