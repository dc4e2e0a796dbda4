# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Slice choice: evenly, around the lungs, all; lazily, and with true numbers."""

import numpy as np
import pytest

from m3fm import M3FMImageProcessor, M3FMProcessor
from m3fm.chest_image_m3fm import ChestImage, LazyPixels
from m3fm.explain import Explainer
from m3fm.imaging_m3fm import read_image
from m3fm.slices_m3fm import choose_slices, chosen_slices, find_lungs


def body(total: int = 40, first: int = 10, last: int = 29, side: int = 64) -> np.ndarray:
    """A body in air, (S, H, W) in HU: lungs from `first` to `last`, gas in the bowel below, a trachea above."""
    volume = np.full((total, side, side), -1000, dtype=np.float32)
    volume[:, 8:56, 4:60] = 40
    volume[:, 58:60, :] = 100  # the table, with air between it and the patient
    volume[first : last + 1, 16:44, 10:28] = -850
    volume[first : last + 1, 16:44, 36:54] = -800
    volume[: max(0, first - 4), 16:40, 10:40] = -1000
    volume[last + 1 :, 20:24, 30:34] = -1000
    return volume


def counted(volume: np.ndarray) -> tuple[LazyPixels, list[int]]:
    """A lazy stand-in for a volume, and the list of the slices that were decoded."""
    decoded: list[int] = []

    def read(number: int) -> np.ndarray:
        decoded.append(number)
        return volume[number]

    return LazyPixels(volume.shape, read), decoded


def test_uniform_slices_are_spread_over_the_middle():
    assert choose_slices(100, 8).tolist() == [15, 25, 35, 45, 55, 65, 75, 85]
    assert choose_slices(5, 8).tolist() == [0, 1, 2, 3, 4]
    assert choose_slices(10, 9).tolist() == list(range(9))
    for total in range(1, 60):
        for count in (1, 4, 8):
            chosen = choose_slices(total, count)
            assert len(chosen) == min(total, count) and (np.diff(chosen) > 0).all()
            assert chosen[0] >= 0 and chosen[-1] < total


def test_lungs_are_found_and_bowel_and_trachea_are_not():
    assert find_lungs(body()) == (10, 29)
    assert find_lungs(body()[::-1].copy()) == (10, 29)
    assert find_lungs(body(first=0, last=39)) == (0, 39)
    assert find_lungs(body(first=20, last=19)) is None


def test_lungs_at_the_edge_of_a_scan_that_was_cut_close():
    close = body()[:, 16:44, 10:54]
    assert find_lungs(np.ascontiguousarray(close)) == (10, 29)


def test_a_slice_hidden_by_metal_does_not_end_the_lungs():
    volume = body()
    volume[20:22] = 3000
    assert find_lungs(volume) == (10, 29)


def test_lungs_of_a_long_scan_are_found_on_48_slices_one_at_a_time():
    pixels, decoded = counted(body(total=480, first=100, last=299, side=200))
    first, last = find_lungs(pixels)
    assert len(decoded) == 48
    assert 100 <= first <= 110 and 289 <= last <= 299


def test_slices_around_the_lungs_are_spread_from_first_to_last():
    chosen = chosen_slices(ChestImage(body(), "ct", "hu"), "lungs", 4)
    assert chosen.slice_numbers == (12, 17, 22, 27)  # the middles of four runs of 5 slices
    assert chosen.source_slices == 40 and chosen.remarks == ()
    few = chosen_slices(ChestImage(body(first=20, last=21), "ct", "hu"), "lungs", 8)
    assert few.slice_numbers == tuple(range(17, 25))  # neighbours of the two that show lung


def test_without_lung_slices_are_spread_evenly_and_it_is_said():
    abdomen = ChestImage(body(first=20, last=19), "ct", "hu")
    chosen = chosen_slices(abdomen, "lungs", 8)
    assert chosen.slice_numbers == tuple(choose_slices(40, 8))
    assert [(each.code, each.severity) for each in chosen.remarks] == [("no_lung", "warning")]
    display = ChestImage(np.random.default_rng(0).random((40, 8, 8), dtype=np.float32))
    chosen = chosen_slices(display, "lungs", 8)
    assert chosen.slice_numbers == tuple(choose_slices(40, 8))
    assert [(each.code, each.severity) for each in chosen.remarks] == [("no_lung", "info")]


def test_only_what_is_chosen_is_decoded_and_kept():
    pixels, decoded = counted(body(total=100))
    chosen = chosen_slices(ChestImage(pixels, "ct", "hu", spacing=(2.0, 1.0, 1.0)), "uniform", 8)
    assert decoded == [15, 25, 35, 45, 55, 65, 75, 85]
    assert isinstance(chosen.pixels, np.ndarray) and chosen.pixels.shape == (8, 64, 64)
    assert chosen.slice_numbers == tuple(decoded) and chosen.source_slices == 100
    assert chosen_slices(chosen, "all", 3) is chosen
    assert len(decoded) == 8


def test_all_slices_and_single_images():
    volume = ChestImage(body(), "ct", "hu")
    assert chosen_slices(volume, "all", 8).slice_numbers == tuple(range(40))
    single = ChestImage(body()[:1], "ct", "hu")
    assert chosen_slices(single, "lungs", 8) is single
    pixels, _ = counted(body()[:1])
    assert isinstance(chosen_slices(ChestImage(pixels, "ct", "hu"), "uniform", 8).pixels, np.ndarray)


def test_explanations_show_what_the_model_sees(tiny_model, tiny_processor):
    """The planes of a heat map are the chosen slices, by their numbers in the volume as stored."""
    images = tiny_processor.image_processor
    pixels, decoded = counted(body())
    lungs = M3FMImageProcessor(size=images.size, num_slices=3, slice_selection="lungs")
    explainer = Explainer(tiny_model, M3FMProcessor(lungs, tiny_processor.tokenizer))
    study = explainer.read(ChestImage(pixels, "ct", "hu"))
    assert [plane.slice for plane in study.images] == [13, 20, 26]
    assert {plane.num_slices for plane in study.images} == {40}
    assert decoded[-3:] == [13, 20, 26]
    for plane in study.images:
        np.testing.assert_allclose(plane.pixels, np.clip((body()[plane.slice] + 1350) / 1500, 0, 1), atol=1e-6)


@pytest.mark.realdata
@pytest.mark.parametrize(
    ("path", "first", "last"),
    [  # as seen by eye, to within three slices
        ("covid_ct_md_volumes/P001.nii.gz", 7, 66),
        ("covid_ct_md_volumes/cap001.nii.gz", 10, 80),
        ("covid_ct_md_volumes/normal001.nii.gz", 14, 70),
        ("fixtures/ct_thorax_cropped_1p5mm.nii.gz", 16, 163),
        ("fixtures/ct_abdomen_small_3mm.nii.gz", 24, 29),
    ],
)
def test_lungs_of_real_volumes(data_root, path, first, last):
    found = find_lungs(read_image(data_root / path).pixels)
    assert found is not None
    assert abs(found[0] - first) <= 3 and abs(found[1] - last) <= 3
