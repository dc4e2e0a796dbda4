# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
import itertools

import numpy as np
import pytest

from m3fm.data.groups import group_keys, record_marks
from m3fm.data.schema import StudyRecord


def test_items_that_share_a_mark_through_a_chain_are_one_group():
    marks = [
        ["patient:2", "doi:10.1/b"],
        ["patient:1"],
        ["patient:3", "doi:10.1/b", "url:x"],
        ["study:9"],
        ["url:x", "patient:1"],
    ]
    assert group_keys(marks) == ["doi:10.1/b", "doi:10.1/b", "doi:10.1/b", "study:9", "doi:10.1/b"]


def test_names_do_not_depend_on_the_order():
    marks = [["b", "c"], ["d"], ["a", "c"], ["e", "d"], ["f"]]
    expected = dict(zip(map(tuple, marks), group_keys(marks), strict=True))
    assert list(expected.values()) == ["a", "d", "a", "d", "f"]
    for order in itertools.permutations(marks):
        assert dict(zip(map(tuple, order), group_keys(order), strict=True)) == expected


def test_a_long_chain_is_followed_without_recursion():
    places = np.random.default_rng(0).permutation(20_000)
    assert set(group_keys([[f"{place:05}", f"{place + 1:05}"] for place in places])) == {"00000"}


def test_an_item_without_marks_is_refused():
    assert group_keys([]) == []
    with pytest.raises(ValueError, match="got none for item 1"):
        group_keys([["a"], []])


@pytest.mark.parametrize(
    ("patient", "documents", "marks"),
    [
        ("7", (), ["patient:7"]),
        ("7", ("doi:10.1/a", "url:x"), ["patient:7", "doi:10.1/a", "url:x"]),
        (None, ("doi:10.1/a",), ["doi:10.1/a"]),
        (None, (), ["study:s"]),
    ],
)
def test_marks_of_a_record(patient, documents, marks):
    assert record_marks(StudyRecord("s", "mine", "cxr", patient_id=patient, documents=documents)) == marks
