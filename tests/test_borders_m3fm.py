# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Collimation borders: found where they are, nowhere else, and cut off with a remark."""

import numpy as np
import pytest
from PIL import Image

from m3fm.borders_m3fm import MAX_SHARE, find_border, without_border
from m3fm.chest_image_m3fm import ChestImage


def chest(height: int = 200, width: int = 160) -> np.ndarray:
    """Two dark lungs in grey, (H, W) in 0..1, with noise; grey up to its edges."""
    rows, columns = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    pixels = 0.6 + 0.02 * np.random.default_rng(0).standard_normal((height, width))
    for middle in (-0.45, 0.45):
        pixels[((columns - middle) / 0.3) ** 2 + (rows / 0.7) ** 2 < 1] -= 0.4
    return pixels.astype(np.float32)


def framed(pixels: np.ndarray, top: int, bottom: int, left: int, right: int, level: float = 0.0) -> np.ndarray:
    return np.pad(pixels, ((top, bottom), (left, right)), constant_values=np.float32(level))


@pytest.mark.parametrize("level", [0.0, 0.05, 0.95, 1.0])
@pytest.mark.parametrize(
    "sides", [(20, 20, 20, 20), (0, 60, 0, 0), (0, 0, 30, 7), (90, 0, 0, 70), (150, 150, 120, 120)]
)
def test_even_borders_are_found_to_the_pixel(level, sides):
    assert find_border(framed(chest(), *sides, level)) == sides


def test_an_image_without_border_is_left_alone():
    assert not any(find_border(chest()))
    assert not any(find_border(np.zeros((50, 50), np.float32)))  # blank: no edge
    assert not any(find_border(np.full((50, 50), 0.5, np.float32)))
    assert not any(find_border(framed(chest(), 30, 30, 30, 30, level=0.5)))  # grey may be anything
    assert not any(find_border(framed(chest(), 1, 1, 1, 1)))  # too thin to matter
    for shape in ((1, 1), (1, 10_000), (10_000, 1), (3, 3)):
        assert not any(find_border(np.zeros(shape, np.float32)))


def test_more_than_a_border_is_not_cut():
    height = 200
    pixels = framed(chest(height), 0, round(height * MAX_SHARE / (1 - MAX_SHARE)) + 5, 0, 0)
    assert not any(find_border(pixels))


def test_air_beside_a_round_outline_is_no_border():
    rows, columns = np.mgrid[-1:1:200j, -1:1:200j]
    for radius in (0.4, 0.6, 0.8, 0.95):
        pixels = np.where(rows**2 + columns**2 < radius**2, 0.7, 0).astype(np.float32)
        assert not any(find_border(pixels))


def test_markers_in_a_border_go_with_it_and_markers_in_the_image_stay():
    pixels = framed(chest(), 40, 0, 0, 40)
    pixels[10:22, 60:72] = 1  # a letter above the image
    pixels[100:110, 170:180] = 1  # and one beside it
    assert find_border(pixels) == (40, 0, 0, 40)
    touching = framed(chest(), 40, 0, 0, 0)
    touching[30:42, 60:72] = 1  # a letter that reaches into the image: border before it alone is cut
    assert find_border(touching) == (30, 0, 0, 0)


def test_tilted_borders_are_cut_up_to_the_image():
    image = Image.fromarray((np.clip(chest(400, 320), 0.1, 1) * 255).astype(np.uint8))
    tilted = np.asarray(image.rotate(1.5, expand=True, fillcolor=0), dtype=np.float32) / 255
    border = find_border(framed(tilted, 40, 40, 40, 40))
    assert all(38 <= side <= 44 for side in border)  # the corners of the image stay


@pytest.mark.parametrize("deviation", [0.01, 0.03])
def test_noise_on_a_border(deviation):
    noise = np.random.default_rng(1).normal(0.05, deviation, (440, 360)).clip(0, 1).astype(np.float32)
    noise[40:-40, 40:-40] = chest(360, 280)
    assert all(38 <= side <= 40 for side in find_border(noise))


def test_borders_of_different_colour_on_different_sides():
    pixels = framed(framed(chest(), 0, 0, 30, 0, level=1.0), 25, 0, 0, 0)
    assert find_border(pixels) == (25, 0, 30, 0)
    pixels = framed(framed(chest(), 25, 0, 0, 0), 0, 0, 50, 0, level=1.0)
    assert find_border(pixels) == (25, 0, 50, 0)


def test_a_large_image_loses_no_pixel_of_its_inside():
    pixels = framed(chest(1001, 803), 201, 99, 103, 0)
    border = find_border(pixels)
    for found, true in zip(border, (201, 99, 103, 0), strict=True):
        assert true - 2 <= found <= true


def test_cutting_remarks_what_was_cut_and_is_done_once():
    image = ChestImage(framed(chest(), 20, 0, 40, 0)[None], "cxr", view="PA")
    cut = without_border(image)
    np.testing.assert_array_equal(cut.pixels[0], chest())
    (remark,) = cut.remarks
    assert remark.code == "border_cropped" and remark.severity == "info"
    assert remark.message.endswith("20 rows above and 0 below, 40 columns at the left and 0 at the right of 220 x 200")
    assert remark.value == pytest.approx(1 - 200 * 160 / (220 * 200), abs=1e-4)
    assert cut.view == "PA" and cut.modality == "cxr"
    twice = ChestImage(framed(cut.pixels[0], 20, 20, 20, 20)[None], remarks=cut.remarks)
    assert without_border(twice) is twice


def test_what_is_no_radiograph_passes():
    bordered = framed(chest(), 20, 20, 20, 20)[None]
    for image in (
        ChestImage(bordered, "ct"),
        ChestImage(np.repeat(bordered, 2, axis=0)),
        ChestImage(bordered, None, "hu"),
        ChestImage(bordered, slice_numbers=(4,), source_slices=9),
        ChestImage(chest()[None]),
    ):
        assert without_border(image) is image
