# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""What holds for every array: a `ValueError` or an image that is finite, of the right shape and in range."""

import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from m3fm.chest_image_m3fm import ChestImage, stretch
from m3fm.image_processing_m3fm import M3FMImageProcessor
from m3fm.imaging_m3fm import read_image

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from hypothesis.extra import numpy as hnp  # noqa: E402

examples = hypothesis.settings(
    derandomize=True, deadline=None, max_examples=100, database=None, suppress_health_check=list(HealthCheck)
)
PROCESSOR = M3FMImageProcessor(size=32, num_slices=3)

NUMBERS = ("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64")
FLOATS = ("float16", "float32", "float64", "longdouble")
OTHERS = ("complex64", "object", "U3", "S3", "datetime64[s]", "timedelta64[s]")
SIDES = st.sampled_from((1, 2, 3, 4, 5, 6, 7, 9, 0))
SHAPES = st.one_of(
    st.lists(SIDES, max_size=5),
    st.tuples(SIDES, SIDES),
    st.tuples(SIDES, SIDES, st.sampled_from((1, 3, 4))),
    st.tuples(st.sampled_from((1, 3, 4, 9)), SIDES, SIDES),
).map(tuple)
# What a value may be anywhere: nothing, everything, the smallest and the largest there is.
SPECIAL = (0.0, 1.0, -1.0, np.nan, np.inf, -np.inf, 5e-324, 1e-40, 1e38, -1e38, 1.7e308, -1024.0, 3071.0, 65535.0, 0.5)


MAGICS = (b"", b"\x89PNG\r\n\x1a\n", b"II*\0", b"\xff\xd8\xff", b"\x1f\x8b\x08", b"BM")


@st.composite
def arrays(draw, dtypes=(*NUMBERS, *FLOATS, *OTHERS)):
    """Draw an array of any shape and type: noise over a wide or a narrow range, constants, a few special values."""
    shape, dtype = draw(SHAPES), draw(st.sampled_from(dtypes))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    low, high = sorted(draw(st.tuples(st.sampled_from(SPECIAL), st.sampled_from(SPECIAL)), label="range"))
    low, high = (float(np.clip(np.nan_to_num(each), -1e300, 1e300)) for each in (low, high))
    values = rng.random(shape) * (high - low) + low
    for special in draw(st.lists(st.sampled_from(SPECIAL), max_size=3)):
        values = np.where(rng.random(shape) < draw(st.sampled_from((0.1, 0.9, 1.0))), special, values)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if dtype not in FLOATS:
            values = np.nan_to_num(values)
        array = np.asarray(values).astype(dtype)
    kind = draw(st.sampled_from(("plain", "fortran", "reversed", "masked", "read-only", "big endian")))
    if kind == "fortran":
        array = np.asfortranarray(array)
    if kind == "reversed" and array.ndim:
        array = np.repeat(array, 2, axis=0)[::-2]
    if kind == "masked":
        array = np.ma.masked_array(array, mask=rng.random(shape) < draw(st.sampled_from((0.2, 1.0))))
    if kind == "read-only":
        array = array.copy()
        array.flags.writeable = False
    if kind == "big endian" and array.dtype.kind in "uif":
        array = array.astype(array.dtype.newbyteorder(">"))
    return array


def assert_sound(image: ChestImage) -> None:
    pixels = np.asarray(image.pixels)
    assert pixels.dtype == np.float32 and pixels.ndim == 3 and 0 not in pixels.shape
    assert pixels.shape == tuple(image.pixels.shape)
    assert np.isfinite(pixels).all()
    if image.units == "intensity":
        assert pixels.min() >= 0 and pixels.max() <= 1
    else:
        assert image.modality == "ct"


def assert_prepared(source, slices: int) -> None:
    prepared = PROCESSOR.preprocess(source)
    assert prepared["pixel_values"].shape == (1, min(slices, 3), 3, 32, 32)
    assert prepared["image_mask"].all() and prepared["image_mask"].shape == (1, min(slices, 3))
    # Black and white after ImageNet's mean and deviation are within -2.2..2.7; preparing clips to them.
    values = np.asarray(prepared["pixel_values"])
    assert np.isfinite(values).all() and values.min() > -2.2 and values.max() < 2.7


def outcome(source) -> ChestImage | str:
    """Read without any warning: an image, or the message of its ValueError."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            image = read_image(source)
            assert_sound(image)
        except ValueError as error:
            return str(error)
    return image


@examples
@given(arrays())
def test_any_array_is_an_image_or_a_value_error(array):
    before = array.copy()
    image = outcome(array)
    if isinstance(image, ChestImage):
        assert array.ndim in (2, 3) and array.dtype.kind in "uifb"
        assert_prepared(image, len(image.pixels))
    else:
        assert image  # says something
    np.testing.assert_array_equal(array, before)  # never written to


@examples
@given(arrays(dtypes=("uint8", "int16", "float16", "float32", "float64", "int64", "bool")), st.booleans())
def test_tensors_are_read_as_their_arrays(array, as_bfloat):
    plain = np.array(np.ma.getdata(array).astype(array.dtype.newbyteorder("=")))
    tensor = torch.from_numpy(plain)
    if as_bfloat and tensor.is_floating_point():
        tensor = tensor.to(torch.bfloat16)
        plain = tensor.float().numpy()
    ours, theirs = outcome(tensor), outcome(plain)
    assert isinstance(ours, str) == isinstance(theirs, str)
    if isinstance(ours, ChestImage):
        np.testing.assert_array_equal(np.asarray(ours.pixels), np.asarray(theirs.pixels))
        assert (ours.units, ours.modality) == (theirs.units, theirs.modality)


@examples
@given(arrays(dtypes=(*NUMBERS, *FLOATS)), st.sampled_from(("intensity", "hu")))
def test_preprocess_takes_any_finite_chest_image(array, units):
    if array.ndim != 3 or array.size == 0:
        return
    pixels = np.nan_to_num(np.ma.getdata(array).astype(np.float64))
    pixels = np.clip(pixels, *((0, 1) if units == "intensity" else (-3e38, 3e38))).astype(np.float32)
    assert_prepared(ChestImage(pixels, "ct" if units == "hu" else None, units), len(pixels))


@examples
@given(
    hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=9), elements=st.integers(0, 4000)),
    st.sampled_from((0.25, 2.0, 8.0)),
    st.integers(-500, 500),
)
def test_stretch_ignores_gain_and_offset(pixels, gain, offset):
    plain = stretch(pixels, (0.5, 99.5))
    np.testing.assert_allclose(stretch(pixels * np.float32(gain) + offset, (0.5, 99.5)), plain, atol=1e-4)
    np.testing.assert_allclose(
        stretch(-pixels, None), 1 - stretch(pixels, None) if np.ptp(pixels) else plain, atol=1e-6
    )
    assert plain.min() >= 0 and plain.max() <= 1
    assert np.ptp(pixels) == 0 or (plain.min() == 0 and plain.max() > 1 - 1e-6)
    order = np.argsort(pixels, axis=None)
    assert (np.diff(plain.ravel()[order]) >= 0).all()  # never turns grey levels around


@examples
@given(hnp.arrays(st.sampled_from((np.uint8, np.uint16, np.int16, np.float32)), st.tuples(SIDES, SIDES)))
def test_an_axis_of_one_changes_nothing(plane):
    plain = outcome(plane)
    if plane.ndim == 2 and 1 in plane.shape:
        return  # which axis is the one of channels or slices is then a matter of taste
    for array in (plane[..., None], plane[None]):
        image = outcome(array)
        assert isinstance(image, str) == isinstance(plain, str)
        if isinstance(image, ChestImage):
            np.testing.assert_array_equal(np.asarray(image.pixels), np.asarray(plain.pixels))
            assert (image.units, image.modality) == (plain.units, plain.modality)


@examples
@given(hnp.arrays(np.uint8, st.tuples(st.integers(5, 9), st.integers(5, 9), st.just(3))), st.booleans())
def test_colour_becomes_the_grey_of_pil(colour, channels_first):
    grey = np.asarray(Image.fromarray(colour).convert("L"))
    image = read_image(np.ascontiguousarray(np.moveaxis(colour, -1, 0)) if channels_first else colour)
    np.testing.assert_allclose(image.pixels[0] * 255, grey, atol=1e-3)


@examples
@given(
    hnp.arrays(np.float32, (6, 6), elements=st.integers(-2000, 4000)),
    st.integers(-1000, 1000),
    st.integers(1, 4000),
)
def test_windowing_keeps_the_order_of_hounsfield_units(plane, center, width):
    processor = M3FMImageProcessor(size=6, ct_windows=[[center, width]], image_mean=[0.0] * 3, image_std=[1.0] * 3)
    shown = np.asarray(processor.preprocess(ChestImage(plane[None], "ct", "hu"))["pixel_values"])[0, 0]  # (3, 6, 6)
    assert (shown == shown[:1]).all()  # one window is all three channels
    order = np.argsort(plane, axis=None)
    assert (np.diff(shown[0].ravel()[order]) >= 0).all()
    np.testing.assert_allclose(shown[0], np.clip((plane - center) / width + 0.5, 0, 1), atol=1e-5)


@examples
@given(
    st.binary(max_size=600),
    st.sampled_from((b"", b"\x89PNG\r\n\x1a\n", b"II*\0", b"\xff\xd8\xff", b"\x1f\x8b\x08", b"BM")),
)
def test_any_bytes_are_an_image_or_a_value_error(data, magic):
    image = outcome(magic + data)
    assert isinstance(image, (ChestImage, str))
