# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""What the cell of a label table says: CheXpert's 1, 0, -1 and blank, or the name of a state."""

from __future__ import annotations

from typing import Any

from .schema import LabelState

__all__ = ["cell_state"]

_NUMBERS = {1.0: LabelState.POSITIVE, 0.0: LabelState.NEGATIVE, -1.0: LabelState.UNCERTAIN}
_BLANK = frozenset({"", "nan"})


def cell_state(cell: Any) -> LabelState:
    """Return the state that a cell of a column of one label gives.

    Args:
        cell: 1, 0, -1 (uncertain; CheXpert, AAAI 2019, table 1), the name of a state, or nothing: None, an empty text
            or "nan". Numbers may be text.

    Raises:
        ValueError: For anything else; the message does not say what came.
    """
    if cell is None:
        return LabelState.UNMENTIONED
    text = str(cell).strip().casefold()
    if text in _BLANK:
        return LabelState.UNMENTIONED
    if text in list(LabelState):
        return LabelState(text)
    try:
        return _NUMBERS[float(cell)]
    except (KeyError, TypeError, ValueError):
        raise ValueError("expected 1, 0, -1 (uncertain) or nothing") from None
