# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Run lengths of masks: both conventions, by hand and back."""

import numpy as np
import pytest

from m3fm.data.run_lengths import CONVENTIONS, decode_run_lengths, encode_run_lengths, run_bounds

# Down the columns of 4 x 3 pixels: pixels 1 and 2 of the first column, the last of it with the first of the second.
MASK = np.array(
    [
        [0, 1, 0],
        [1, 0, 0],
        [0, 0, 1],
        [1, 0, 1],
    ],
    dtype=bool,
)
BY_HAND = {"relative": "1 1 1 2 5 2", "absolute": "2 1 4 2 11 2"}


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_mask_by_hand(convention: str) -> None:
    assert np.array_equal(decode_run_lengths(BY_HAND[convention], 4, 3, convention), MASK)
    assert encode_run_lengths(MASK, convention) == BY_HAND[convention]
    assert run_bounds(BY_HAND[convention], convention).tolist() == [[1, 2], [3, 5], [10, 12]]


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_round_trip_of_any_mask(convention: str) -> None:
    rng = np.random.default_rng(0)
    for share in (0.0, 0.05, 0.5, 1.0):
        mask = rng.random((37, 53)) < share
        again = decode_run_lengths(encode_run_lengths(mask, convention), 37, 53, convention)
        assert again.dtype == bool and again.flags.c_contiguous
        assert np.array_equal(again, mask)


@pytest.mark.parametrize("empty", ["-1", " -1", "", " "])
def test_empty_mask(empty: str) -> None:
    assert not decode_run_lengths(empty, 4, 3, "relative").any()


def test_runs_that_touch_are_one_area() -> None:
    assert decode_run_lengths("0 2 0 3", 4, 3, "relative").sum() == 5
    assert decode_run_lengths("1 2 3 3", 4, 3, "absolute").sum() == 5


def test_agrees_with_a_loop_over_runs() -> None:
    rng = np.random.default_rng(1)
    numbers = np.column_stack([rng.integers(0, 20, 30), rng.integers(1, 9, 30)])
    flat = np.zeros(64 * 64, dtype=bool)
    position = 0
    for start, length in numbers:
        position += start
        flat[position : position + length] = True
        position += length
    rle = " ".join(map(str, numbers.reshape(-1)))
    assert np.array_equal(decode_run_lengths(rle, 64, 64, "relative"), flat.reshape(64, 64).T)


@pytest.mark.parametrize(
    ("rle", "convention", "message"),
    [
        ("1 2 3", "relative", "pairs of a start and a length, got 3 numbers"),
        ("1 x", "relative", "whole numbers"),
        ("1.5 2", "relative", "whole numbers"),
        ("99999999999999999999 1", "relative", "whole numbers"),
        ("9223372036854775807 10", "relative", "at most 2147483648"),
        ("5 9223372036854775807", "absolute", "at most 2147483648"),
        ("-9223372036854775808 1", "absolute", "at most 2147483648"),
        ("3 0", "relative", "at least one pixel"),
        ("3 2 -1 2", "relative", "relative start must be 0 or more"),
        ("0 2", "absolute", "1 or more"),
        ("1 4 3 2", "absolute", "without overlap"),
        ("10 3", "relative", "pixel 13 of an image of 4 x 3"),
        ("12 2", "absolute", "pixel 13 of an image of 4 x 3"),
        ("1 2", "other", "relative, absolute, got 'other'"),
    ],
)
def test_what_is_no_mask(rle: str, convention: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode_run_lengths(rle, 4, 3, convention)


def test_encode_refuses_what_is_no_mask() -> None:
    with pytest.raises(ValueError, match="two dimensions"):
        encode_run_lengths(np.zeros(3), "relative")
    with pytest.raises(ValueError, match="convention"):
        encode_run_lengths(MASK, "other")
