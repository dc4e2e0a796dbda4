# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Augmentation: small, the same when drawn again, alike for the slices of a CT, and never a mirrored side."""

from dataclasses import fields, replace

import numpy as np
import pytest

from m3fm.training.augmentation import STRENGTHS, Augmentation, Change, Strengths, apply_change, names_side
from m3fm.training.fed_studies import Draw

PLANE = np.zeros((64, 48), dtype=np.float32)
PLANE[8:56] = np.random.default_rng(0).random((48, 48), dtype=np.float32) * 0.8 + 0.1


def centre(plane: np.ndarray) -> tuple[float, float]:
    rows, columns = np.mgrid[: plane.shape[0], : plane.shape[1]]
    return float((rows * plane).sum() / plane.sum()), float((columns * plane).sum() / plane.sum())


def spot(row: int, column: int) -> np.ndarray:
    plane = np.zeros((61, 61), dtype=np.float32)
    plane[row - 2 : row + 3, column - 2 : column + 3] = 0.9
    return plane


def test_the_same_is_drawn_again_and_nothing_else():
    augmentation = Augmentation()
    drawn = augmentation.changes(Draw(1, 2), "cxr", "set/a", 2)
    assert drawn == augmentation.changes(Draw(1, 2), "cxr", "set/a", 2)
    assert drawn[0] != drawn[1]
    assert drawn[0] == augmentation.changes(Draw(1, 2), "cxr", "set/a", 1)[0]
    for other in (Draw(2, 2), Draw(1, 3)):
        assert drawn != augmentation.changes(other, "cxr", "set/a", 2)
    assert drawn != augmentation.changes(Draw(1, 2), "cxr", "set/b", 2)


def test_slices_of_a_ct_are_changed_alike_but_for_their_grain():
    slices = Augmentation().changes(Draw(), "ct", "set/a", 3)
    assert len({each.noise_seed for each in slices}) == 3
    assert len({replace(each, noise_seed=0) for each in slices}) == 1


def test_a_strength_bounds_what_is_drawn_and_leaves_the_others_as_they_were():
    changes = [Augmentation().changes(Draw(0, epoch), "cxr", "k", 1)[0] for epoch in range(200)]
    turned = [abs(each.rotation) for each in changes]
    assert 0.9 * STRENGTHS["cxr"].rotation < max(turned) <= STRENGTHS["cxr"].rotation
    assert 0.05 < np.mean([each.jpeg is not None for each in changes]) < 0.3
    assert all(each.jpeg is None or 30 <= each.jpeg <= 95 for each in changes)
    still = Augmentation({"cxr": replace(STRENGTHS["cxr"], rotation=0.0)}).changes(Draw(0, 7), "cxr", "k", 1)[0]
    assert still == replace(changes[7], rotation=0.0)


def test_nothing_is_mirrored_by_default():
    assert all(each.mirror == 0 for each in STRENGTHS.values())
    drawn = [
        Augmentation().changes(Draw(0, epoch), modality, "k", 1)[0] for epoch in range(50) for modality in STRENGTHS
    ]
    assert not any(each.mirrored for each in drawn)


@pytest.mark.parametrize(
    "text",
    [
        "Opacity in the LEFT base.",
        "right-sided effusion",
        "RUL nodule",
        "Lingular atelectasis",
        "marker R",
        "左肺下叶",
        "右侧胸腔积液",
    ],
)
def test_texts_that_name_a_side(text):
    assert names_side([text])


@pytest.mark.parametrize(
    "text", ["The lungs are clear.", "Bilateral effusions.", "双肺清晰，心影不大。", "Bright lines."]
)
def test_texts_that_name_none(text):
    assert not names_side([text])


def test_a_study_whose_text_names_a_side_is_not_mirrored():
    augmentation = Augmentation({"cxr": Strengths(mirror=1.0)})
    assert augmentation.changes(Draw(), "cxr", "k", 1, ["Clear lungs."])[0].mirrored
    assert augmentation.changes(Draw(), "cxr", "k", 1)[0].mirrored
    assert not augmentation.changes(Draw(), "cxr", "k", 1, ["Clear lungs.", "左肺清晰。"])[0].mirrored


def test_modalities_left_out_are_not_changed():
    assert replace(Augmentation({"cxr": Strengths()}).changes(Draw(), "ct", "k", 1)[0], noise_seed=0) == Change()
    with pytest.raises(ValueError, match=r"got \['mri'\]"):
        Augmentation({"mri": Strengths()})


@pytest.mark.parametrize(
    "wrong", [{"rotation": 90}, {"scale": -0.1}, {"jpeg": 1.5}, {"shift": 1.0}, {"rotation": "a"}]
)
def test_strengths_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=rf"Strengths\.{next(iter(wrong))}: got"):
        Strengths(**wrong)


def test_no_change_changes_nothing():
    np.testing.assert_array_equal(apply_change(PLANE, Change()), PLANE)


@pytest.mark.parametrize("name", [each.name for each in fields(Change) if each.name != "noise_seed"])
def test_each_change_does_something_and_stays_in_range(name):
    values = {
        "rotation": 5.0,
        "scale": 1.1,
        "shift": (0.05, -0.05),
        "brightness": 1.2,
        "contrast": 0.8,
        "gamma": 1.3,
        "noise": 0.05,
        "blur": 1.0,
        "jpeg": 40,
        "mirrored": True,
    }
    before = PLANE.copy()
    changed = apply_change(PLANE, Change(**{name: values[name]}))
    np.testing.assert_array_equal(PLANE, before)
    assert changed.shape == PLANE.shape and changed.dtype == np.float32
    assert changed.min() >= 0 and changed.max() <= 1
    assert np.abs(changed - PLANE).max() > 0.01
    if name not in ("rotation", "scale", "shift"):
        assert not changed[:8].any() and not changed[56:].any()  # black around the image


def test_values_change_as_said():
    inside = np.s_[8:56]
    np.testing.assert_allclose(apply_change(PLANE, Change(brightness=1.1))[inside], PLANE[inside] * 1.1, atol=1e-6)
    np.testing.assert_allclose(apply_change(PLANE, Change(gamma=2.0))[inside], PLANE[inside] ** 2, atol=1e-6)
    contrast = apply_change(PLANE, Change(contrast=0.5))[inside]
    np.testing.assert_allclose(contrast, 0.25 + PLANE[inside] / 2, atol=1e-6)
    noisy = apply_change(np.full((64, 64), 0.5, np.float32), Change(noise=0.05, noise_seed=3))
    assert noisy.std() == pytest.approx(0.05, rel=0.05)
    blurred = apply_change(spot(30, 30), Change(blur=0.5))
    assert blurred.sum() == pytest.approx(spot(30, 30).sum(), rel=0.05)


def test_places_move_as_said():
    right_of_middle = spot(30, 45)
    assert centre(apply_change(right_of_middle, Change(mirrored=True))) == pytest.approx((30, 15), abs=0.1)
    assert centre(apply_change(right_of_middle, Change(shift=(0.1, -0.1)))) == pytest.approx((23.9, 51.1), abs=0.2)
    assert centre(apply_change(right_of_middle, Change(scale=1.2))) == pytest.approx((30, 48), abs=0.3)
    row, column = centre(apply_change(right_of_middle, Change(rotation=20)))
    assert (row, column) == pytest.approx((30 - 15 * np.sin(np.pi / 9), 30 + 15 * np.cos(np.pi / 9)), abs=0.3)
    both = apply_change(right_of_middle, Change(mirrored=True, rotation=20))
    assert centre(both) == pytest.approx((30 + 15 * np.sin(np.pi / 9), 30 - 15 * np.cos(np.pi / 9)), abs=0.3)


def test_a_black_plane_stays_black():
    black = np.zeros((16, 16), np.float32)
    wild = Change(rotation=5, brightness=1.2, contrast=0.5, noise=0.1, blur=1.0, jpeg=40, gamma=0.5)
    assert not apply_change(black, wild).any()


def test_windows_and_slices_move_a_little():
    augmentation = Augmentation()
    windows = [[-600.0, 1500.0], [40.0, 400.0]]
    moved = augmentation.windows(Draw(0, 1), windows, "k")
    assert moved == augmentation.windows(Draw(0, 1), windows, "k") != windows
    shares = [(new[0] - old[0]) / old[1] for new, old in zip(moved, windows, strict=True)]
    assert shares[0] == pytest.approx(shares[1]) and abs(shares[0]) <= 0.08
    assert moved[0][1] / 1500 == pytest.approx(moved[1][1] / 400)
    assert Augmentation({}).windows(Draw(), windows, "k") == windows
    offsets = {augmentation.slice_offset(Draw(0, epoch), 12.0, "k") for epoch in range(100)}
    assert offsets == {-3, -2, -1, 0, 1, 2, 3}
    assert {Augmentation({}).slice_offset(Draw(0, epoch), 12.0, "k") for epoch in range(9)} == {0}
