# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
import pytest

from m3fm.data.sets.demographics import age_in_years, sex_letter


@pytest.mark.parametrize(
    ("text", "years"),
    [
        ("39岁", 39.0),
        ("39 岁", 39.0),
        ("61周岁", 61.0),
        ("6个月", 0.5),
        ("3月", 0.25),
        ("2周", 14 / 365.25),
        ("2个星期", 14 / 365.25),
        ("10天", 10 / 365.25),
        ("3日", 3 / 365.25),
        ("400岁", None),
        ("121", None),
        ("999Y", None),
        ("nan", None),
        ("NaN", None),
        ("", None),
        (" ", None),
        (None, None),
    ],
)
def test_ages(text, years):
    assert age_in_years(text) == (None if years is None else pytest.approx(years))


@pytest.mark.parametrize("text", ["岁", "39岁半", "约39岁", "inf", "40+", "-1"])
def test_what_is_no_age(text):
    with pytest.raises(ValueError, match="an age must be a number") as error:
        age_in_years(text)
    assert text not in str(error.value)


def test_sexes():
    assert [sex_letter(text) for text in ("男", " 女", "男性", "女性", "Male ", "其他")] == [*"MFMFM", None]
