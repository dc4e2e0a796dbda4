# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
import numpy as np
import pytest
import torch

from m3fm.chest_image_m3fm import ChestImage, LazyPixels
from m3fm.imaging_m3fm import read_image

RAMP = np.arange(24 * 32, dtype=np.uint16).reshape(24, 32)  # (H, W), no two pixels alike
HU = np.linspace(-1000, 400, 5 * 24 * 32).reshape(5, 24, 32)


def codes(image: ChestImage) -> list[str]:
    return [remark.code for remark in image.remarks]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_an_axis_of_one_is_no_volume(dtype):
    plain = (RAMP % 256).astype(dtype)
    expected = read_image(plain)
    for array in (plain[..., None], plain[None]):
        image = read_image(array)
        np.testing.assert_array_equal(image.pixels, expected.pixels)
        assert (image.units, image.modality) == ("intensity", None)


def test_planes_by_their_values():
    unit = RAMP / RAMP.max()
    np.testing.assert_array_equal(read_image(unit).pixels[0], unit.astype(np.float32))
    np.testing.assert_allclose(read_image(RAMP, percentiles=None).pixels[0], unit, atol=1e-6)
    np.testing.assert_array_equal(read_image(RAMP > 100).pixels[0], RAMP > 100)
    eight = (RAMP % 251).astype(np.uint8)
    np.testing.assert_allclose(read_image(eight).pixels[0], eight / 255, atol=1e-6)
    hu = read_image(HU[0])
    assert (hu.units, hu.modality, hu.pixels.shape) == ("hu", "ct", (1, 24, 32))
    np.testing.assert_allclose(hu.pixels[0], HU[0], rtol=1e-6)


def test_volumes_by_their_values():
    image = read_image(HU)
    assert (image.units, image.modality) == ("hu", "ct") and isinstance(image.pixels, LazyPixels)
    np.testing.assert_allclose(image.pixels, HU, rtol=1e-6)
    shown = read_image(np.stack([RAMP / RAMP.max()] * 5))
    assert (shown.units, shown.modality, shown.pixels.shape) == ("intensity", None, (5, 24, 32))
    assert codes(shown) == ["assumed", "display_values"]
    assert codes(image) == ["assumed"]  # nothing in an array says which axis is which
    three = read_image(HU[:3])  # no colour is negative
    assert (three.units, three.pixels.shape) == ("hu", (3, 24, 32))


def test_layout_in_memory_does_not_matter():
    expected = np.asarray(read_image(HU).pixels)
    read_only = HU.copy()
    read_only.setflags(write=False)
    masked = np.ma.masked_less(HU, -2000)
    for array in (
        HU.astype(">f8"),
        np.asfortranarray(HU),
        HU[::-1][::-1],
        read_only,
        masked,
        HU.astype(np.longdouble),
    ):
        np.testing.assert_array_equal(np.asarray(read_image(array).pixels), expected)
    sixteen = HU.astype(np.int16)
    for array in (sixteen.astype(">i2"), sixteen.astype(np.int64), sixteen.astype(np.float16).astype(np.int32)):
        assert np.abs(np.asarray(read_image(array).pixels) - sixteen).max() <= 1
    np.testing.assert_array_equal(read_image(RAMP.astype(">u2")).pixels, read_image(RAMP).pixels)


def test_reading_changes_no_array():
    for source in (HU, RAMP, (RAMP % 256).astype(np.uint8)):
        before = source.copy()
        image = read_image(source)
        np.asarray(image.pixels[0])[:] = 7
        np.testing.assert_array_equal(source, before)


def test_masked_and_missing_values_become_background():
    hu = HU.copy()
    hu[0, 0, 0] = np.nan
    assert np.asarray(read_image(hu).pixels).min() == pytest.approx(np.nanmin(hu))
    masked = np.ma.masked_greater(RAMP, 700)
    pixels = read_image(masked, percentiles=None).pixels[0]
    assert (pixels[RAMP > 700] == 0).all() and pixels[RAMP == 700] == 1
    extremes = np.array([[-3e38, 3e38], [0, np.inf]])
    assert np.isfinite(read_image(extremes).pixels).all()


def test_colour_with_and_without_opacity():
    rng = np.random.default_rng(0)
    colour = rng.random((6, 8, 4), dtype=np.float32)
    luma = colour[..., :3] @ np.array([0.299, 0.587, 0.114], np.float32)
    for channels, expected in ((3, luma), (4, luma * colour[..., 3])):
        last = colour[..., :channels]
        for array in (last, np.moveaxis(last, -1, 0)):
            image = read_image(array)
            np.testing.assert_allclose(image.pixels, expected[None], atol=1e-6)
            assert codes(image) == ["colour"]
    deep = (colour[..., :3] * 65535).astype(np.uint16)
    expected = deep @ np.array([0.299, 0.587, 0.114])
    expected = (expected - expected.min()) / (expected.max() - expected.min())
    np.testing.assert_allclose(read_image(deep, percentiles=None).pixels[0], expected, atol=1e-5)
    gray = np.stack([(RAMP % 256).astype(np.uint8)] * 3, axis=-1)
    assert codes(read_image(gray)) == []


def test_torch_tensors():
    volume = torch.tensor(HU, dtype=torch.float32)
    expected = np.asarray(read_image(volume.numpy()).pixels)
    np.testing.assert_array_equal(np.asarray(read_image(volume.requires_grad_()).pixels), expected)
    half = read_image(volume.detach().bfloat16())
    assert half.units == "hu" and np.abs(np.asarray(half.pixels) - expected).max() < 4
    np.testing.assert_array_equal(read_image(torch.tensor(RAMP > 100)).pixels[0], RAMP > 100)
    strided = torch.tensor(RAMP.astype(np.int32)).T
    np.testing.assert_array_equal(read_image(strided).pixels, read_image(RAMP.T.astype(np.int32)).pixels)
    for bad in (torch.empty((4, 4), device="meta"), torch.eye(4).to_sparse()):
        with pytest.raises(ValueError, match=r"<tensor \(4, 4\) torch.float32>: expected a dense tensor"):
            read_image(bad)


def test_whatever_offers_itself_as_an_array():
    class Array:
        def __array__(self, dtype=None, copy=None):
            return RAMP

    class Interface:
        __array_interface__ = RAMP.__array_interface__

    class Broken:
        def __array__(self, dtype=None, copy=None):
            raise RuntimeError("no")

    for source in (Array(), Interface()):
        np.testing.assert_array_equal(read_image(source).pixels, read_image(RAMP).pixels)
    with pytest.raises(ValueError, match="<Broken>: cannot be turned into an array"):
        read_image(Broken())


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.full((8, 8), np.nan), "NaN"),
        (np.full((9, 8, 8), np.inf), "NaN or infinite"),
        (np.zeros((0, 8), np.uint8), "at least one pixel"),
        (np.zeros((2, 3, 8, 8), np.float32), "4 dimensions.*one by one"),
        (np.zeros(8), "1 dimensions"),
        (np.array(5.0), "0 dimensions"),
        (np.array([["a"]]), "expected integers, floats or booleans"),
        (np.array([[None]]), "expected integers, floats or booleans"),
        (np.zeros((8, 8), np.complex64), "expected integers, floats or booleans"),
        (np.ma.masked_all((8, 8)), "every pixel is masked"),
        (np.arange(8 * 8 * 3, dtype=np.int16).reshape(8, 8, 3), "ambiguous"),
        (np.arange(3 * 8 * 8, dtype=np.float32).reshape(3, 8, 8), "ambiguous"),
        (np.linspace(-2.1, 2.6, 3 * 8 * 8).reshape(3, 8, 8), "not normalised"),
        (np.arange(4 * 8 * 8, dtype=np.int16).reshape(4, 8, 8), "3 or 4 slices as a ChestImage"),
        (np.zeros((64, 64, 30), np.int16), r"slices along the last axis, expected \(S, H, W\)"),
        (np.broadcast_to(np.float32(0), (1 << 15, 1 << 15)), "declares 1073741824 pixels"),
    ],
)
def test_bad_arrays(array, reason):
    with pytest.raises(ValueError, match=reason) as caught:
        read_image(array)
    assert str(caught.value).startswith("<array (")


def test_blank_arrays_are_read():
    for blank in (np.full((8, 8), 7, np.uint8), np.full((8, 8), 700, np.uint16), np.zeros((5, 8, 8))):
        pixels = np.asarray(read_image(blank).pixels)
        assert pixels.min() == pixels.max()
