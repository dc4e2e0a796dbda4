# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""The 14 labels of the CheXpert labeller as tables of its output have them: CheXpert, CheXpert Plus and MIMIC-CXR.

1 is positive, 0 negative, -1 uncertain, and a blank cell a label that the report does not mention.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from types import MappingProxyType

from ..label_cells import cell_state
from ..schema import LabelState
from ..tables import Row

__all__ = ["CHEXPERT_LABELS", "chexpert_states"]

CHEXPERT_LABELS = (
    "No Finding",
    "Enlarged Cardiomediastinum",
    "Cardiomegaly",
    "Lung Opacity",
    "Lung Lesion",
    "Edema",
    "Consolidation",
    "Pneumonia",
    "Atelectasis",
    "Pneumothorax",
    "Pleural Effusion",
    "Pleural Other",
    "Fracture",
    "Support Devices",
)
_NO_NAMES: Mapping[str, str] = MappingProxyType({})
# Millions of cells say one of four things.
_state = lru_cache(maxsize=64)(cell_state)


def chexpert_states(row: Row, other_names: Mapping[str, str] = _NO_NAMES) -> dict[str, LabelState]:
    """Return what a row says of each of the 14 labels.

    Args:
        row: With a column a label, as text; a column that is not there is unmentioned.
        other_names: Label to the column that has it where that of its own name is missing or blank.

    Raises:
        BadRow: If a cell is none of 1, 0, -1 and blank.
    """
    stated = {}
    for label in CHEXPERT_LABELS:
        try:
            stated[label] = _state(row.get(label) or row.get(other_names.get(label, label)))
        except ValueError as error:
            raise row.bad("bad_label", f"column {label!r}: {error}") from None
    return stated
