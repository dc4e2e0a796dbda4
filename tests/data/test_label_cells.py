# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
import numpy as np
import pytest

from m3fm.data.label_cells import cell_state


@pytest.mark.parametrize(
    ("cells", "state"),
    [
        (("1", "1.0", " 1 ", 1, 1.0, True, np.float32(1), "positive", "Positive"), "positive"),
        (("0", "0.0", 0, -0.0, False, "negative"), "negative"),
        (("-1", "-1.0", -1, "uncertain"), "uncertain"),
        (("", "  ", None, "nan", float("nan"), "NaN", "unmentioned"), "unmentioned"),
    ],
)
def test_what_a_cell_says(cells, state):
    assert [cell_state(cell) for cell in cells] == [state] * len(cells)


@pytest.mark.parametrize("cell", ["2", "yes", 0.5, "inf", [1], {}, "patient-4711"])
def test_other_cells_are_refused_and_not_repeated(cell):
    with pytest.raises(ValueError, match=r"^expected 1, 0, -1 \(uncertain\) or nothing$"):
        cell_state(cell)
