# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""What publishers state of their sets is what the statistics count too."""

import pytest

from m3fm.data.commands import _count_here
from m3fm.data.schema import StudyRecord
from m3fm.data.sets import get_set, set_names
from m3fm.data.statistics import SetStatistics


@pytest.mark.parametrize("name", set_names())
def test_published_counts_are_counted_here(name: str) -> None:
    counted = SetStatistics()
    for part in ("train", "validation", "test"):
        counted.add(StudyRecord(part, name, "cxr", split=part))
    statistics = counted.as_dict()
    for key, count in get_set(name).published.items():
        assert isinstance(_count_here(key, statistics), int), f"{key} is counted nowhere"
        assert count > 0
