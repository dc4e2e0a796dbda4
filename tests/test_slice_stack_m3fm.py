# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
import random
from collections.abc import Sequence
from typing import Any

import pytest

from m3fm.dicom_m3fm import SliceHeader
from m3fm.slice_stack_m3fm import Slice, chest_stack

AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
CORONAL = (1.0, 0.0, 0.0, 0.0, 0.0, -1.0)


def only(items: Sequence[Any]) -> Any:
    assert len(items) == 1
    return items[0]


def codes(stack) -> list[str]:
    return [remark.code for remark in stack.remarks]


def headers(series: int, count: int, step: float, orientation: Sequence[float] = AXIAL, **fields: Any) -> list[Slice]:
    """Make slices of which only headers are known."""
    known = {
        **dict.fromkeys(("study", "patient"), 1),
        **dict.fromkeys(("is_localizer", "is_derived", "is_secondary_capture"), False),
        **dict.fromkeys(("origin", "acquisition_number", "temporal_position", "series_number", "instance")),
        **{"modality": "ct", "has_pixels": True, "rows": 8, "columns": 8, "frames": 1, "pixel_spacing": (1.0, 1.0)},
        **{"series": series, "orientation": orientation, "slice_thickness": step},
    }
    return [
        Slice(
            None,
            "",
            SliceHeader(**{**known, "position": i * step, "instance_number": i + 1, **fields}),
            1000 * series + i,
        )
        for i in range(count)
    ]


@pytest.mark.parametrize("field", ["temporal_position", "acquisition_number"])
def test_passes_over_the_same_places_are_parted(field):
    first, second = headers(1, 10, 2, **{field: 1}), headers(1, 10, 2, **{field: 2})
    slices = [entry for pair in zip(second, first, strict=True) for entry in pair]
    stack = chest_stack(slices)
    assert stack.slices == tuple(first)
    remark = only(stack.remarks)
    assert (remark.code, remark.value) == ("other_series", 10) and "another pass" in remark.message


def test_acquisition_numbers_that_count_slices_part_nothing():
    slices = [entry for i in range(10) for entry in headers(1, 10, 2, acquisition_number=i)[i : i + 1]]
    assert chest_stack(slices).slices == tuple(slices)
    doubled = [*slices, *headers(1, 2, 2, acquisition_number=99)]
    stack = chest_stack(doubled)
    assert len(stack.slices) == 10 and only(stack.remarks).code == "duplicates"


def test_of_several_series_the_one_that_shows_the_chest_is_taken():
    thick, thin = headers(1, 60, 5), headers(6, 250, 1.2)
    coronal, short, long = headers(2, 300, 1, CORONAL), headers(3, 100, 0.5), headers(4, 700, 1)
    projections = headers(5, 300, 1, is_derived=True)
    slices = [*thick, *coronal, *short, *long, *projections, *thin]
    for seed in range(3):
        random.Random(seed).shuffle(slices)
        stack = chest_stack(slices)
        assert [entry.header.instance_number for entry in stack.slices] == list(range(1, 251))
        assert {entry.header.series for entry in stack.slices} == {6} and stack.step == pytest.approx(1.2)
        remark = only(stack.remarks)
        assert (remark.code, remark.value) == ("other_series", 5)
        assert "5 other series with 1460 slices left out; taken: axial, 250 slices every 1.2 mm" in remark.message
    covering = chest_stack([*coronal, *short, *thick])
    assert covering.slices[0].header.series == 1  # the chest, though thicker
    assert chest_stack([*coronal, *short]).slices[0].header.series == 3  # axial, though short
    assert chest_stack([*long, *short]).slices[0].header.series == 4


def test_equal_series_and_passes_are_chosen_by_their_numbers_then_as_given():
    later, sooner = headers(1, 60, 5, series_number=4), headers(2, 60, 5, series_number=3)
    assert chest_stack([*later, *sooner]).slices == tuple(sooner)
    second, first = headers(1, 60, 5, temporal_position=2), headers(1, 60, 5, temporal_position=1)
    assert chest_stack([*second, *first]).slices == tuple(first)
    assert chest_stack([*headers(2, 60, 5), *headers(1, 60, 5)]).slices[0].header.series == 1  # by `order`


def test_a_multi_frame_file_is_a_volume_of_its_own():
    file = headers(2, 1, 1.0, frames=300, position=None)
    stack = chest_stack([*headers(1, 60, 1.0), *file])
    assert stack.slices == tuple(file) and (stack.extent, stack.frames) == (300.0, 300)


def test_slices_with_a_reason_to_be_another_volume_are():
    slices = headers(1, 40, 2)
    for fields in ({"rows": 9}, {"pixel_spacing": (0.5, 0.5)}, {"orientation": (1.0, 0.0, 0.0, 0.0, 0.98, 0.199)}):
        odd = headers(1, 42, 2, **fields)[40:]
        stack = chest_stack([*slices, *odd])
        assert stack.slices == tuple(slices)
        remark = only(stack.remarks)
        assert (remark.code, remark.value, remark.severity) == ("other_series", 2, "info")
    rounded = headers(1, 42, 2, orientation=(1.0, 0.0, 0.0, 0.0, 1.0, 0.001), pixel_spacing=(1.001, 1.0))[40:]
    assert len(chest_stack([*slices, *rounded]).slices) == 42


def test_few_slices_of_another_direction_are_scouts_only_beside_a_scan():
    scouts = headers(2, 2, 10, CORONAL)
    assert codes(chest_stack([*headers(1, 40, 2), *scouts])) == ["localizer"]
    assert chest_stack(scouts).slices == tuple(reversed(scouts)) or chest_stack(scouts).slices == tuple(scouts)
    assert codes(chest_stack([*headers(1, 40, 2), *headers(2, 30, 2, CORONAL)])) == ["other_series"]


@pytest.mark.parametrize(("count", "lost", "severity"), [(100, 3, "info"), (100, 9, "warning")])
def test_gaps_warn_when_more_than_a_few_slices_are_missing(count, lost, severity):
    slices = headers(1, count, 1.25)
    del slices[40 : 40 + lost]
    remark = only(chest_stack(slices).remarks)
    assert (remark.code, remark.value, remark.severity) == ("gap", lost, severity)


def test_positions_that_differ_by_rounding_are_even():
    slices = headers(1, 50, 0.7)
    moved = [Slice(None, "", entry.header, entry.order) for entry in slices]
    assert chest_stack(moved).remarks == () and chest_stack(moved).step == pytest.approx(0.7)


def test_one_slice_has_the_extent_of_its_thickness():
    stack = chest_stack(headers(1, 1, 5.0))
    assert (stack.step, stack.extent, stack.plane, stack.remarks) == (5.0, 5.0, "axial", ())
    unknown = chest_stack(headers(1, 1, 5.0, slice_thickness=None, orientation=None, position=None))
    assert (unknown.step, unknown.extent, unknown.plane) == (None, 0.0, None)
