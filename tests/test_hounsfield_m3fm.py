# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
import numpy as np
import pytest

from m3fm.chest_image_m3fm import LazyPixels
from m3fm.hounsfield_m3fm import infer_offset, volume_of


def phantom(slices: int = 4) -> np.ndarray:
    """Return a body of soft tissue with two lungs and a spine, in air: (S, 64, 64) HU."""
    y, x = np.mgrid[:64, :64]
    hu = np.full((slices, 64, 64), -1000, np.int16)
    hu[:, ((x - 32) / 28) ** 2 + ((y - 32) / 22) ** 2 < 1] = 40
    for side in (22, 42):
        hu[:, ((x - side) / 8) ** 2 + ((y - 30) / 13) ** 2 < 1] = -850
    hu[:, 44:50, 29:35] = 500
    return hu + np.random.default_rng(0).integers(-20, 21, hu.shape, dtype=np.int16)


def codes(image) -> list[str]:
    return [remark.code for remark in image.remarks]


def test_offsets_are_inferred_where_both_heaps_are_in_place():
    hu = phantom()
    assert infer_offset(hu) == 0
    assert infer_offset(hu + 1024) == infer_offset((hu + 1024).astype(np.uint16)) == -1024
    padded = hu + 1024
    padded[:, :9] = -2000  # outside the field of view
    assert infer_offset(padded) == -1024
    with_nan = hu.astype(np.float32)
    with_nan[0, 0] = np.nan
    assert infer_offset(with_nan) == 0


@pytest.mark.parametrize(
    "values",
    [
        np.random.default_rng(0).integers(0, 4096, 5000),  # noise
        np.clip((phantom() + 1350) / 1500 * 255, 0, 255).astype(np.uint8),  # a lung window
        (phantom() + 1024) * 4,
        phantom() + 500,
        np.full(100, 1064),  # tissue alone
        np.zeros(100),
        np.full(100, np.nan),
        np.zeros(0),
    ],
)
def test_what_is_not_plain_gives_no_offset(values):
    assert infer_offset(values) is None


def test_values_decide_what_a_volume_is():
    hu = phantom()
    plain = volume_of("a", hu)
    assert (plain.units, plain.modality, codes(plain)) == ("hu", "ct", [])
    np.testing.assert_array_equal(plain.pixels, hu)

    stored = volume_of("a", (hu + 1024).clip(0).astype(np.uint16))
    assert (stored.units, codes(stored), stored.remarks[0].severity) == ("hu", ["uncalibrated"], "info")
    np.testing.assert_array_equal(stored.pixels, hu.clip(-1024))

    doubtful = volume_of("a", hu.clip(0).astype(np.int16))
    assert (doubtful.units, codes(doubtful), doubtful.remarks[0].severity) == ("hu", ["uncalibrated"], "warning")

    for shown, expected in (
        ((hu.clip(-1350, 150) + 1350) // 6, (hu.clip(-1350, 150) + 1350) // 6 / 255),  # whole numbers within 0..255
        ((hu + 1350).clip(0, 1500) / 1500, (hu + 1350).clip(0, 1500) / 1500),  # within 0..1
        ((hu + 1350).clip(0).astype(np.uint16) * 30, None),  # above any CT
        (hu > -500, None),  # a mask
    ):
        image = volume_of("a", np.asarray(shown, dtype=np.float64))
        assert (image.units, image.modality, codes(image)) == ("intensity", None, ["display_values"])
        pixels = np.asarray(image.pixels)
        assert pixels.min() >= 0 and pixels.max() == 1 or expected is not None
        if expected is not None:
            np.testing.assert_allclose(pixels, expected, atol=1e-6)


def test_of_lazy_pixels_a_few_slices_are_decoded():
    hu = phantom(100)
    decoded = []

    def read(number: int) -> np.ndarray:
        decoded.append(number)
        return hu[number].astype(np.float32)

    image = volume_of("a", LazyPixels(hu.shape, read))
    assert 1 < len(decoded) <= 7 and isinstance(image.pixels, LazyPixels)
    np.testing.assert_array_equal(image.pixels[[0, 99]], hu[[0, 99]])


def test_what_is_not_finite_becomes_background():
    values = np.full((9, 4, 5), np.nan)
    values[0] = np.arange(20).reshape(4, 5) - 1000  # seven slices are looked at first, and are empty
    values[1, 0, 0] = np.inf
    image = volume_of("a", LazyPixels(values.shape, lambda number: values[number].astype(np.float32)))
    pixels = np.asarray(image.pixels)
    np.testing.assert_array_equal(pixels[0], values[0])
    assert (pixels[1:] == -1000).all()
    with pytest.raises(ValueError, match="^a: every pixel is NaN or infinite"):
        volume_of("a", values * np.nan)
