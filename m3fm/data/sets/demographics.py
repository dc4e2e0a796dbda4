# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Age and sex as the tables of data sets write them."""

from __future__ import annotations

import re

__all__ = ["OLDEST", "age_in_years", "sex_letter"]

#: Higher ages are errors of the tables, which have up to 414 years: they are left out, the study is kept.
OLDEST = 120.0

# A number and its unit, as DICOM writes it ("058Y", "011M"; PS3.5, table 6.2-1) or a person does ("45yrs", "16 month",
# "39岁", "5个月").
_AGE = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]*|岁|周岁|个?月|个?星期|周|天|日)\.?", re.IGNORECASE)
_YEAR, _MONTH, _WEEK, _DAY = 1.0, 1 / 12, 7 / 365.25, 1 / 365.25
# By the first letter of the unit, or by the whole where it is Chinese.
_YEARS_PER_UNIT = {
    **dict.fromkeys(("", "y", "岁", "周岁"), _YEAR),
    **dict.fromkeys(("m", "月", "个月"), _MONTH),
    **dict.fromkeys(("w", "周", "星期", "个星期"), _WEEK),
    **dict.fromkeys(("d", "天", "日"), _DAY),
}
_SEXES = {
    **dict.fromkeys(("f", "female", "femal", "女", "女性"), "F"),
    **dict.fromkeys(("m", "male", "男", "男性"), "M"),
}


def age_in_years(text: str | None) -> float | None:
    """Return an age in years; None where it is not told ("" and "nan" too), or higher than anybody's.

    Args:
        text: A number, with or without a unit: years, months, weeks or days by their first letter, or in Chinese.

    Raises:
        ValueError: If it is no age.
    """
    age = (text or "").strip()
    if age.casefold() in ("", "nan"):
        return None
    match = _AGE.fullmatch(age)
    unit = match.group(2).lower() if match else None
    if unit and unit.isascii():
        unit = unit[0]
    if unit not in _YEARS_PER_UNIT:
        raise ValueError('an age must be a number, with or without a unit such as "Y" or "months"')
    years = float(match.group(1)) * _YEARS_PER_UNIT[unit]
    return years if years <= OLDEST else None


def sex_letter(text: str | None) -> str | None:
    """Return "F" or "M"; None where the set tells nothing or something else."""
    return _SEXES.get((text or "").strip().lower())
