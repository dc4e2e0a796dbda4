# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
import pytest

from m3fm.data.report_text import clean_report, mentions_earlier_or_mask, repair_characters, split_sentences


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Normal chest x-XXXX. No effusion.", "No effusion."),
        ("XXXX.", ""),
        ("1. No effusion. 2. Clear lungs.", "No effusion. Clear lungs."),
        ("Clear lungs. CLEAR LUNGS. ", "Clear lungs."),
        ("Stable cardiomegaly. There is a granuloma.", "There is a granuloma."),
        ("Unchanged from prior exam. No edema.", "No edema."),
        ("Interval improvement in effusion. No edema.", "No edema."),
        ("The effusion has increased since the prior study.", ""),
        ("The catheter previously seen is gone. No edema.", "No edema."),
        # Words of comparison that compare nothing over time.
        ("Recommend short interval followup.", "Recommend short interval followup."),
        ("Evidence of prior granulomatous disease.", "Evidence of prior granulomatous disease."),
        ("Clips from prior cholecystectomy are noted.", "Clips from prior cholecystectomy are noted."),
        ("The heart measures 3.2 cm. No edema.", "The heart measures 3.2 cm. No edema."),
    ],
)
def test_clean_report(text, expected):
    assert clean_report(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a \ufffdwet market\ufffd (in Wuhan)", 'a "wet market" (in Wuhan)'),
        ("the patient\ufffds course", "the patient's course"),
        ("fever (39.6\ufffdC)", "fever (39.6°C)"),
        ("fever 37.8 \ufffd, cough", "fever 37.8°, cough"),
        ("was 38\ufffd6\ufffdC then", "was 38.6°C then"),
        ("113 \ufffd 109 per L", "113 x 10^9 per L"),
        ("0.12\ufffdg/l", "0.12µg/l"),
        ("organisms \ufffd such as", "organisms - such as"),
        ("Platelets 150\ufffd400. No effusion.", "No effusion."),
        ("Is it pneumonia? 10 days later.", "Is it pneumonia? 10 days later."),
        (" a \n b ", "a b"),
        ("", ""),
        ("双肺清晰，未见异常。", "双肺清晰，未见异常。"),
    ],
)
def test_repair_characters(text, expected):
    assert repair_characters(text) == expected


def test_split_sentences_keeps_numbers_whole():
    assert split_sentences("A 1.5 cm nodule.  No mass.") == ["A 1.5 cm nodule.", "No mass."]
    assert split_sentences(" ") == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Stable cardiomegaly.", True),
        ("No effusion. The nodule is unchanged.", True),
        ("Clear lungs. XXXX sternotomy.", True),
        ("No effusion. Recommend short interval followup.", False),
        ("The lungs are clear.", False),
        ("", False),
    ],
)
def test_mentions_earlier_or_mask(text, expected):
    assert mentions_earlier_or_mask(text) is expected
