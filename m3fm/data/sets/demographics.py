# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Age and sex as the tables of data sets write them."""

from __future__ import annotations

import re

__all__ = ["OLDEST", "age_in_years", "sex_letter"]

#: Higher ages are errors of the tables, which have up to 414 years: they are left out, the study is kept.
OLDEST = 120.0

# A number and its unit, as DICOM writes it ("058Y", "011M") or a person does ("45yrs", "16 month").
_AGE = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]*)\.?", re.IGNORECASE)
_YEARS_PER_UNIT = {"": 1.0, "y": 1.0, "m": 1 / 12, "w": 7 / 365.25, "d": 1 / 365.25}
_SEXES = {"f": "F", "female": "F", "femal": "F", "m": "M", "male": "M"}


def age_in_years(text: str | None) -> float | None:
    """Return an age in years; None where it is not told, or higher than anybody's.

    Args:
        text: A number, with or without a unit: years, months, weeks or days by their first letter.

    Raises:
        ValueError: If it is no age.
    """
    if text is None:
        return None
    match = _AGE.fullmatch(text.strip())
    unit = match.group(2)[:1].lower() if match else None
    if unit not in _YEARS_PER_UNIT:
        raise ValueError('an age must be a number, with or without a unit such as "Y" or "months"')
    years = float(match.group(1)) * _YEARS_PER_UNIT[unit]
    return years if years <= OLDEST else None


def sex_letter(text: str | None) -> str | None:
    """Return "F" or "M"; None where the set tells nothing or something else."""
    return _SEXES.get((text or "").strip().lower())
