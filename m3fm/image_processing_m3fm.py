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
from transformers.processing_utils import ImagesKwargs, Unpack
from transformers.utils import TensorType

from .imaging_m3fm import DEFAULT_PERCENTILES, ChestImage, read_image

# The outer tenths of a chest CT are neck and upper abdomen: "uniform" spreads its slices over the middle 80 %.
MIDDLE_FRACTION = 0.8
SLICE_SELECTIONS = ("uniform",)

_SETTINGS = (
    "size",
    "resample",
    "image_mean",
    "image_std",
    "ct_windows",
    "cxr_window",
    "slice_selection",
    "num_slices",
    "max_images",
)
# Written into the saved JSON by transformers beside the settings.
_SERVICE_KEYS = ("image_processor_type", "processor_class", "feature_extractor_type", "auto_map")


class M3FMImagesKwargs(ImagesKwargs, total=False):
    """Settings of `M3FMImageProcessor` beyond `size`, `resample`, `image_mean` and `image_std`."""

    ct_windows: list[list[float]]
    cxr_window: list[float] | None
    slice_selection: str
    num_slices: int
    max_images: int


class M3FMImageProcessor(BaseImageProcessor):
    """Prepare radiographs and CT volumes for M3FM.

    Every setting is saved with the checkpoint and can be overridden in a call. Needs numpy and PIL only.

    Args:
        size: {"height", "width"} of the model's input, or one int for both. Images keep their aspect: the side that
            fills first fits, the rest is black on both sides.
        resample: PIL filter, bicubic by default; antialiased, in float32, clipped to 0..1.
        image_mean: Mean per channel, subtracted last.
        image_std: Standard deviation per channel.
        ct_windows: [[center, width]] in HU, repeated to three channels, or three of them, one per channel.
        cxr_window: [low, high] percentiles stretched to 0..1 where a source defines no display range (16-bit PNG,
            DICOM without window), or None for its minimum and maximum.
        slice_selection: "uniform": `num_slices` evenly over the middle 80 % of the slices.
        num_slices: Slices taken from a volume; a volume with fewer gives them all.
        max_images: Most images a study may have.
    """

    model_input_names = ["pixel_values", "image_mask"]
    valid_kwargs = M3FMImagesKwargs

    size = {"height": 224, "width": 224}
    resample = Image.Resampling.BICUBIC
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    ct_windows = [[-600.0, 1500.0]]  # the usual lung window
    cxr_window = list(DEFAULT_PERCENTILES)
    slice_selection = "uniform"
    num_slices = 8
    max_images = 64

    def __init__(self, **kwargs: Unpack[M3FMImagesKwargs]) -> None:
        """Set and check the settings.

        Raises:
            ValueError: If a setting is unknown or out of range.
        """
        settings = {key: kwargs.pop(key, getattr(type(self), key)) for key in _SETTINGS}
        _refuse_unknown([key for key in kwargs if key not in _SERVICE_KEYS])
        super().__init__(**kwargs, **_checked(settings))

    @property
    def backend(self) -> str:
        """Name the library that resizes, in transformers' vocabulary."""
        return "pil"

    def fetch_images(self, images: Any) -> Any:
        """Return the images unread.

        `ProcessorMixin` calls this hook before the processor itself, and its default opens every string with PIL.
        Reading is left to `preprocess`, which knows the settings of the call and holds one source at a time.
        """
        return images

    def read(self, source: Any) -> ChestImage:
        """Read one source (see `read_image`) as `preprocess` does, which takes the result in the source's place.

        Raises:
            ValueError: If the source cannot be read as a chest image.
            ImportError: If a DICOM or NIfTI file is given and its optional reader is not installed.
        """
        return read_image(source, percentiles=self.cxr_window)

    def preprocess(
        self, images: Any, return_tensors: str | TensorType | None = None, **kwargs: Unpack[M3FMImagesKwargs]
    ) -> BatchFeature:
        """Prepare one image, a batch of images, or a batch of studies.

        Args:
            images: One source (see `read_image`) is a batch of one study; a list of sources is one study each; a
                source may itself be a list: the images of one study.
            return_tensors: "pt" or "np"; None gives numpy arrays.
            **kwargs: Settings for this call only.

        Returns:
            `pixel_values` (B, N, 3, H, W) float32, zero where a study has fewer than N images, and `image_mask`
            (B, N) bool, True for real images.

        Raises:
            ValueError: If a source cannot be read, a study is empty or too large, or a setting is wrong.
        """
        _refuse_unknown([key for key in kwargs if key not in _SETTINGS])
        settings = _checked({key: kwargs.get(key, getattr(self, key)) for key in _SETTINGS})
        studies = [self._prepare_study(sources, i, settings) for i, sources in enumerate(_as_studies(images))]
        longest = max(len(study) for study in studies)
        pixel_values = np.zeros((len(studies), longest, *studies[0].shape[1:]), dtype=np.float32)  # (B, N, 3, H, W)
        image_mask = np.zeros((len(studies), longest), dtype=bool)  # (B, N)
        for i, study in enumerate(studies):
            pixel_values[i, : len(study)] = study
            image_mask[i, : len(study)] = True
        return BatchFeature({"pixel_values": pixel_values, "image_mask": image_mask}, tensor_type=return_tensors)

    def _prepare_study(self, sources: list[Any], index: int, settings: dict[str, Any]) -> np.ndarray:
        """Read the images of one study, window, letterbox and normalise: (N, 3, H, W)."""
        if not sources:
            raise ValueError(f"study {index} of the batch has no image, expected at least one")
        planes: list[np.ndarray] = []
        for source in sources:
            image = read_image(source, percentiles=settings["cxr_window"])
            chosen = choose_slices(len(image.pixels), settings["num_slices"])
            planes.extend(_render(image, pixels, settings) for pixels in image.pixels[chosen])
            if len(planes) > settings["max_images"]:
                raise ValueError(
                    f"study {index} of the batch has more than {settings['max_images']} images (max_images); "
                    "give the slices of a CT as one volume"
                )
        study = np.stack(planes)  # (N, 3, H, W)
        mean = np.asarray(settings["image_mean"], dtype=np.float32)[:, None, None]
        std = np.asarray(settings["image_std"], dtype=np.float32)[:, None, None]
        return (study - mean) / std


def choose_slices(total: int, count: int) -> np.ndarray:
    """Choose slices evenly over the middle 80 % of a volume.

    Args:
        total: Slices there are.
        count: Slices wanted.

    Returns:
        Increasing indices; all of them if there are no more than `count`.
    """
    if total <= count:
        return np.arange(total)
    start = total * (1 - MIDDLE_FRACTION) / 2
    positions = start + (np.arange(count) + 0.5) / count * total * MIDDLE_FRACTION
    chosen = np.unique(np.floor(positions + 1e-6).astype(int))  # 14.999... is slice 15
    # With barely more slices than wanted, two positions can share a slice: take the middle ones in a row.
    return chosen if len(chosen) == count else (total - count) // 2 + np.arange(count)


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


def _render(image: ChestImage, pixels: np.ndarray, settings: dict[str, Any]) -> np.ndarray:
    """Window one slice (H0, W0) of an image and letterbox it: (3, H, W) in 0..1."""
    size = (settings["size"]["height"], settings["size"]["width"])
    if image.units == "intensity":
        channels = [letterbox(pixels, *size, settings["resample"])]
    else:
        # Windowed before the resize: metal and air far outside the window would ring into the lung.
        windowed = [np.clip((pixels - (c - w / 2)) / w, 0, 1) for c, w in settings["ct_windows"]]
        channels = [letterbox(each, *size, settings["resample"]) for each in windowed]
    return np.broadcast_to(np.stack(channels), (3, *size))


def _as_studies(images: Any) -> list[list[Any]]:
    """Bring one source, a list of sources, or a list of lists into the form of lists of sources."""
    if not isinstance(images, (list, tuple)):
        return [[images]]
    if not images:
        raise ValueError("images: got an empty list, expected at least one image or study")
    return [list(each) if isinstance(each, (list, tuple)) else [each] for each in images]


def _refuse_unknown(names: list[str]) -> None:
    if names:
        raise ValueError(f"unknown image processor settings {sorted(names)}, expected some of {list(_SETTINGS)}")


# --------------------------------------------------------------------------------------------------------------------
# Settings


def _checked(settings: dict[str, Any]) -> dict[str, Any]:
    """Check every setting and bring it into its JSON form."""
    windows = settings["ct_windows"]
    if not isinstance(windows, (list, tuple)) or len(windows) not in (1, 3):
        raise ValueError(f"ct_windows: got {windows!r}, expected one or three [center, width] pairs in HU")
    windows = [_numbers(f"ct_windows[{i}]", window, 2, "[center, width] in HU") for i, window in enumerate(windows)]
    if any(width <= 0 for _, width in windows):
        raise ValueError(f"ct_windows: got {windows!r}, expected every width above 0 HU")
    std = _numbers("image_std", settings["image_std"], 3, "one number per channel")
    if any(value <= 0 for value in std):
        raise ValueError(f"image_std: got {std!r}, expected numbers above 0")
    if settings["slice_selection"] not in SLICE_SELECTIONS:
        raise ValueError(f"slice_selection: got {settings['slice_selection']!r}, expected one of {SLICE_SELECTIONS}")
    num_slices, max_images = (_positive(key, settings[key]) for key in ("num_slices", "max_images"))
    if num_slices > max_images:
        raise ValueError(f"num_slices: got {num_slices}, expected at most max_images, which is {max_images}")
    return {
        "size": _checked_size(settings["size"]),
        "resample": _checked_resample(settings["resample"]),
        "image_mean": _numbers("image_mean", settings["image_mean"], 3, "one number per channel"),
        "image_std": std,
        "ct_windows": windows,
        "cxr_window": _checked_percentiles(settings["cxr_window"]),
        "slice_selection": settings["slice_selection"],
        "num_slices": num_slices,
        "max_images": max_images,
    }


def _checked_size(size: Any) -> dict[str, int]:
    if isinstance(size, int):
        size = {"height": size, "width": size}
    try:
        size = dict(size)
    except (TypeError, ValueError):
        raise ValueError(f'size: got {size!r}, expected {{"height": int, "width": int}} or an int') from None
    if set(size) != {"height", "width"}:
        raise ValueError(f"size: got keys {sorted(size)}, expected height and width")
    return {key: _positive(f"size[{key!r}]", size[key]) for key in ("height", "width")}


def _checked_resample(resample: Any) -> int:
    try:
        return int(Image.Resampling(resample))
    except ValueError:
        names = {int(each): each.name.lower() for each in Image.Resampling}
        raise ValueError(f"resample: got {resample!r}, expected one of {names}") from None


def _checked_percentiles(percentiles: Any) -> list[float] | None:
    if percentiles is None:
        return None
    low, high = _numbers("cxr_window", percentiles, 2, "[low, high] percentiles or None")
    if not 0 <= low < high <= 100:
        raise ValueError(f"cxr_window: got {[low, high]}, expected percentiles 0 <= low < high <= 100")
    return [low, high]


def _numbers(name: str, values: Any, length: int, meaning: str) -> list[float]:
    """Return `values` as a list of finite floats of that length."""
    listed = list(values) if isinstance(values, (list, tuple, np.ndarray)) else None
    numeric = listed is not None and all(
        isinstance(v, (int, float, np.number)) and not isinstance(v, bool) and np.isfinite(v) for v in listed
    )
    if not numeric or len(listed) != length:
        raise ValueError(f"{name}: got {values!r}, expected {length} numbers, {meaning}")
    return [float(v) for v in listed]


def _positive(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: got {value!r}, expected a whole number of at least 1")
    return value


__all__ = ["M3FMImageProcessor"]
