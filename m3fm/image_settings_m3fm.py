# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""The settings of the image processor: checked, and brought into the form in which a checkpoint keeps them."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from PIL import Image
from transformers.processing_utils import ImagesKwargs

from .borders_m3fm import BORDER_RULES
from .slices_m3fm import SLICE_SELECTIONS

# [center, width] in HU, as radiologists set them to look at a chest.
NAMED_WINDOWS = {
    "lung": (-600.0, 1500.0),
    "mediastinum": (40.0, 400.0),
    "bone": (400.0, 1800.0),
}

SETTINGS = (
    "size",
    "resample",
    "image_mean",
    "image_std",
    "ct_windows",
    "cxr_window",
    "cxr_border",
    "slice_selection",
    "num_slices",
    "max_images",
)


class M3FMImagesKwargs(ImagesKwargs, total=False):
    """Settings of `M3FMImageProcessor` beyond `size`, `resample`, `image_mean` and `image_std`."""

    ct_windows: str | list[str | list[float]]
    cxr_window: list[float] | None
    cxr_border: str
    slice_selection: str
    num_slices: int
    max_images: int


def refuse_unknown_settings(names: Iterable[str]) -> None:
    """Refuse names that are no setting.

    Raises:
        ValueError: If there is one.
    """
    unknown = sorted(name for name in names if name not in SETTINGS)
    if unknown:
        raise ValueError(f"unknown image processor settings {unknown}, expected some of {list(SETTINGS)}")


def checked_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Check every setting and bring it into its JSON form.

    Args:
        settings: All of `SETTINGS`.

    Raises:
        ValueError: If one is out of range.
    """
    std = _numbers("image_std", settings["image_std"], 3, "one number per channel")
    if any(value <= 0 for value in std):
        raise ValueError(f"image_std: got {std!r}, expected numbers above 0")
    num_slices, max_images = (_positive(key, settings[key]) for key in ("num_slices", "max_images"))
    if num_slices > max_images:
        raise ValueError(f"num_slices: got {num_slices}, expected at most max_images, which is {max_images}")
    return {
        "size": _size(settings["size"]),
        "resample": _resample(settings["resample"]),
        "image_mean": _numbers("image_mean", settings["image_mean"], 3, "one number per channel"),
        "image_std": std,
        "ct_windows": _windows(settings["ct_windows"]),
        "cxr_window": _percentiles(settings["cxr_window"]),
        "cxr_border": _one_of("cxr_border", settings["cxr_border"], BORDER_RULES),
        "slice_selection": _one_of("slice_selection", settings["slice_selection"], SLICE_SELECTIONS),
        "num_slices": num_slices,
        "max_images": max_images,
    }


def _size(size: Any) -> dict[str, int]:
    if isinstance(size, int):
        size = {"height": size, "width": size}
    try:
        size = dict(size)
    except (TypeError, ValueError):
        raise ValueError(f'size: got {size!r}, expected {{"height": int, "width": int}} or an int') from None
    if set(size) != {"height", "width"}:
        raise ValueError(f"size: got keys {sorted(size)}, expected height and width")
    return {key: _positive(f"size[{key!r}]", size[key]) for key in ("height", "width")}


def _resample(resample: Any) -> int:
    try:
        return int(Image.Resampling(resample))
    except ValueError:
        names = {int(each): each.name.lower() for each in Image.Resampling}
        raise ValueError(f"resample: got {resample!r}, expected one of {names}") from None


def _windows(windows: Any) -> list[list[float]]:
    """Return one or three [center, width] in HU, with names replaced by their windows."""
    windows = [windows] if isinstance(windows, str) else windows
    if not isinstance(windows, (list, tuple)) or len(windows) not in (1, 3):
        raise ValueError(
            f"ct_windows: got {windows!r}, expected one or three, each a [center, width] pair in HU or one of the "
            f"names {list(NAMED_WINDOWS)}"
        )
    pairs = []
    for i, window in enumerate(windows):
        if isinstance(window, str):
            window = NAMED_WINDOWS[_one_of(f"ct_windows[{i}]", window, tuple(NAMED_WINDOWS))]
        pairs.append(_numbers(f"ct_windows[{i}]", window, 2, "[center, width] in HU"))
    if any(width <= 0 for _, width in pairs):
        raise ValueError(f"ct_windows: got {pairs!r}, expected every width above 0 HU")
    return pairs


def _percentiles(percentiles: Any) -> list[float] | None:
    if percentiles is None:
        return None
    low, high = _numbers("cxr_window", percentiles, 2, "[low, high] percentiles or None")
    if not 0 <= low < high <= 100:
        raise ValueError(f"cxr_window: got {[low, high]}, expected percentiles 0 <= low < high <= 100")
    return [low, high]


def _one_of(name: str, value: Any, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise ValueError(f"{name}: got {value!r}, expected one of {allowed}")
    return value


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


__all__ = ["NAMED_WINDOWS", "SETTINGS", "M3FMImagesKwargs", "checked_settings", "refuse_unknown_settings"]
