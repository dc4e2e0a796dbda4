# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""The 14 labels of the CheXpert labeller, by hand."""

from pathlib import Path

import pytest

from m3fm.data.schema import LabelState
from m3fm.data.sets.chexpert_labels import CHEXPERT_LABELS, chexpert_states
from m3fm.data.tables import BadRow, Row


def test_cells_become_states() -> None:
    states = chexpert_states(Row(Path("t.csv"), 2, {"Edema": "1.0", "Fracture": "-1", "Pneumonia": "0", "Other": "x"}))
    assert tuple(states) == CHEXPERT_LABELS and len(CHEXPERT_LABELS) == 14
    said = {label: state for label, state in states.items() if state is not LabelState.UNMENTIONED}
    assert said == {"Pneumonia": "negative", "Edema": "positive", "Fracture": "uncertain"}


def test_another_name_serves_where_the_own_one_is_blank() -> None:
    row = Row(Path("t.csv"), 2, {"Airspace Opacity": "1.0", "Lung Opacity": "", "Edema": "0.0"})
    states = chexpert_states(row, {"Lung Opacity": "Airspace Opacity"})
    assert states["Lung Opacity"] is LabelState.POSITIVE and states["Edema"] is LabelState.NEGATIVE


def test_another_cell_is_a_bad_label_and_not_quoted() -> None:
    with pytest.raises(BadRow, match=r"t\.csv, line 2: column 'Edema'") as error:
        chexpert_states(Row(Path("t.csv"), 2, {"Edema": "Mr Smith"}))
    assert error.value.kind == "bad_label" and "Smith" not in str(error.value)
