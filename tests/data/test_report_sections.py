# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
import pytest

from m3fm.data.report_sections import report_from_sections, report_from_text, split_sections
from m3fm.data.report_text import clean_fully

# Laid out as the reports of MIMIC-CXR are; the words are ours.
WHOLE = "\n".join(
    (
        "                                 FINAL REPORT",
        " EXAMINATION:  CHEST (PA AND LAT)",
        " ",
        " INDICATION:  ___ year old woman with cough and",
        " fever  // pneumonia?",
        " ",
        " TECHNIQUE:  Chest PA and lateral",
        " ",
        " COMPARISON:  ___",
        " ",
        " FINDINGS: ",
        " ",
        " The lungs are clear.  The heart is mildly enlarged, unchanged from",
        " prior.  No effusion.",
        " ",
        " IMPRESSION: ",
        " ",
        " 1. Mild cardiomegaly.",
        " 2. No pneumonia",
        " ",
        " RECOMMENDATION(S):  Follow-up in six weeks.",
        " ",
        " NOTIFICATION:  Dr. ___ was called at 5:00.",
        "",
    )
)


def test_split_sections_of_a_whole_report():
    assert split_sections(WHOLE, "en") == {
        "examination": "CHEST (PA AND LAT)",
        "indication": "___ year old woman with cough and\n fever  // pneumonia?",
        "technique": "Chest PA and lateral",
        "comparison": "___",
        "findings": "The lungs are clear.  The heart is mildly enlarged, unchanged from\n prior.  No effusion.",
        "impression": "1. Mild cardiomegaly.\n 2. No pneumonia",
        "recommendation": "Follow-up in six weeks.",
        "notification": "Dr. ___ was called at 5:00.",
    }


def test_report_of_a_whole_report():
    report = report_from_text(WHOLE, "en")
    assert report.findings == "The lungs are clear. No effusion."
    assert report.impression == "Mild cardiomegaly. No pneumonia"
    assert report.text == "The lungs are clear. No effusion. Mild cardiomegaly. No pneumonia"
    assert report.raw == WHOLE
    assert not report.is_translated


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        # In the middle of a line, in any case.
        (
            "EXAM: chest. Findings: Lungs clear, no edema. Impression: Normal.",
            {"examination": "chest.", "findings": "Lungs clear, no edema.", "impression": "Normal."},
        ),
        ("findings: clear\nimpression: normal", {"findings": "clear", "impression": "normal"}),
        ("FINDINGS\nClear lungs.\nCONCLUSION\nNormal.", {"findings": "Clear lungs.", "impression": "Normal."}),
        ("FINDINGS AND IMPRESSION:  Clear lungs.", {"impression": "Clear lungs."}),
        ("FINDINGS/IMPRESSION: Clear lungs.", {"impression": "Clear lungs."}),
        ("INDICATION: cough FINDINGS: Clear.", {"indication": "cough", "findings": "Clear."}),
        ("REASON FOR EXAM: cough\r\n\r\nIMPRESSION: Normal.", {"indication": "cough", "impression": "Normal."}),
        # Misspelt headings.
        ("FINDNGS: Clear.\n IMPRESSOIN: Normal.", {"findings": "Clear.", "impression": "Normal."}),
        # A section of two parts.
        ("FINDINGS: a.\n\nIMPRESSION: b.\n\nFINDINGS: c.", {"findings": "a.\nc.", "impression": "b."}),
        # No headings: words of sentences, and headings within the findings.
        (
            "FINDINGS: Clear.\n LUNGS: Clear.\n CHEST WALL: Intact.\n IMPRESSION: Normal.",
            {"findings": "Clear.\n LUNGS: Clear.\n CHEST WALL: Intact.", "impression": "Normal."},
        ),
        (
            "FINDINGS: There are the following\n findings: nodules. In comparison with none.",
            {"findings": "There are the following\n findings: nodules. In comparison with none."},
        ),
        ("As far as can be observed: clear. Note: none.", {"body": "As far as can be observed: clear. Note: none."}),
        # A wet read is not the report.
        (
            "WET READ: ___ 5:30 PM\n  Low volumes.\n______________\n   FINAL REPORT\n IMPRESSION:  Clear.",
            {"wet_read": "___ 5:30 PM\n  Low volumes.", "impression": "Clear."},
        ),
        ("ADDENDUM  \n Corrected.\n FINAL REPORT\n FINDINGS: a.", {"addendum": "Corrected.", "findings": "a."}),
        # Headings that name views, with the report and without.
        ("PA AND LATERAL CHEST:  The lungs are clear.\n LUNGS: a", {"findings": "The lungs are clear.\n LUNGS: a"}),
        (
            "CHEST, PA LATERAL:\n\n INDICATION: cough\n\n IMPRESSION: Normal.",
            {"examination": "CHEST, PA LATERAL", "indication": "cough", "impression": "Normal."},
        ),
        # Nothing is headed findings or impression.
        (
            "FINAL REPORT\n CHEST\n \n INDICATION: Pain.\n \n COMPARISON: None.\n \n Lungs clear.\n \n Heart normal.",
            {
                "preamble": "CHEST",
                "indication": "Pain.",
                "comparison": "None.",
                "body": "Lungs clear.\n\nHeart normal.",
            },
        ),
        (
            "FINAL REPORT\n CHEST RADIOGRAPH\n \n The lungs are clear.\n \n No effusion.",
            {"preamble": "CHEST RADIOGRAPH", "body": "The lungs are clear.\n\nNo effusion."},
        ),
        (
            "INDICATION: cough.\n LUNGS: Clear.\n HEART: Normal.\n DICTATED BY: someone",
            {"indication": "cough.", "body": "LUNGS: Clear.\n HEART: Normal.", "administrative": "someone"},
        ),
        (
            "The lungs are clear.\n\nNOTIFICATION: by phone.",
            {"body": "The lungs are clear.", "notification": "by phone."},
        ),
        ("The lungs are clear.", {"body": "The lungs are clear."}),
        ("INDICATION: cough", {"indication": "cough"}),
        ("CHEST RADIOGRAPH\n\nINDICATION: cough", {"preamble": "CHEST RADIOGRAPH", "indication": "cough"}),
        # Headings without text.
        ("FINDINGS:\nIMPRESSION:\nNormal.", {"impression": "Normal."}),
    ],
)
def test_split_english(raw, expected):
    assert split_sections(raw, "en") == expected


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("检查所见：双肺清晰。\n诊断意见：未见异常。", {"findings": "双肺清晰。", "impression": "未见异常。"}),
        ("影像所见:双肺清晰。影像诊断:未见异常。", {"findings": "双肺清晰。", "impression": "未见异常。"}),
        ("【影像表现】双肺清晰。【印象】未见异常。", {"findings": "双肺清晰。", "impression": "未见异常。"}),
        ("【检查所见】：双肺清晰\n【结论】：未见异常", {"findings": "双肺清晰", "impression": "未见异常"}),
        ("影像所见\n双肺清晰。\n提示\n未见异常。", {"findings": "双肺清晰。", "impression": "未见异常。"}),
        ("描述：双肺清晰。诊断：未见异常。", {"findings": "双肺清晰。", "impression": "未见异常。"}),
        ("CT表现：双肺清晰。 CT诊断：未见异常。", {"findings": "双肺清晰。", "impression": "未见异常。"}),
        ("一、检查所见：清晰\n二、诊断意见：正常", {"findings": "清晰", "impression": "正常"}),
        (
            "姓名：某某\n检查方法：平扫\n临床诊断：咳嗽\n对比：无\n所见：双肺清晰。\n印象：正常。\n报告医师：某某",
            {
                "administrative": "某某\n某某",
                "technique": "平扫",
                "history": "咳嗽",
                "comparison": "无",
                "findings": "双肺清晰。",
                "impression": "正常。",
            },
        ),
        (
            "某某医院CT检查报告单\n病史：发热\n检查技术：平扫\n双肺清晰。\n心影不大。",
            {"history": "发热", "technique": "平扫", "body": "双肺清晰。\n\n心影不大。"},
        ),
        ("胸廓对称，双肺清晰。", {"body": "胸廓对称，双肺清晰。"}),
        # Words of sentences.
        ("所见：双肺清晰，CT提示：结节，考虑诊断：肺炎。", {"findings": "双肺清晰，CT提示：结节，考虑诊断：肺炎。"}),
        ("FINDINGS: 双肺清晰。\nIMPRESSION: 正常。", {"findings": "双肺清晰。", "impression": "正常。"}),
    ],
)
def test_split_chinese(raw, expected):
    assert split_sections(raw, "zh") == expected


def test_chinese_report():
    raw = "【检查所见】双肺纹理增强,右肺上叶见1.5cm*2.0cm结节.\n【诊断意见】1、右肺上叶结节，较前增大；2、心影不大。"
    report = report_from_text(raw, "zh", is_translated=True)
    assert report.findings == "双肺纹理增强，右肺上叶见1.5cm×2.0cm结节。"
    assert report.impression == "右肺上叶结节；心影不大。"
    assert report.text == report.findings + report.impression
    assert (report.raw, report.is_translated) == (raw, True)


def test_a_report_without_sections_is_whole():
    report = report_from_text("The lungs are clear. Stable scar.", "en")
    assert (report.text, report.findings, report.impression) == ("The lungs are clear.", None, None)
    assert report.raw == "The lungs are clear. Stable scar."


@pytest.mark.parametrize("raw", ["INDICATION: cough", "IMPRESSION: Unchanged.", "XXXX."])
def test_a_report_of_which_nothing_is_left(raw):
    report = report_from_text(raw, "en")
    assert (report.text, report.raw) == ("", raw)


@pytest.mark.parametrize("raw", ["", " \n\t", "\u3000"])
def test_no_text_is_no_report(raw):
    assert report_from_text(raw, "en") is None
    assert report_from_sections(raw, None, "zh") is None


def test_sections_given_apart():
    report = report_from_sections("Clear lungs.  XXXX seen. Clear heart", "Clear lungs.", "en")
    assert report.text == "Clear lungs. Clear heart."
    assert (report.findings, report.impression) == ("Clear lungs. Clear heart", "Clear lungs.")
    assert report.raw == "Clear lungs.  XXXX seen. Clear heart\nClear lungs."
    assert report_from_sections(None, "Stable.", "en", raw="<x>Stable.</x>").raw == "<x>Stable.</x>"
    assert report_from_sections(None, "Stable.", "en").findings is None
    assert report_from_sections("A nodule.", " ", "en").impression is None


def test_a_report_cleaned_again_stays():
    text = report_from_text(WHOLE, "en").text
    assert clean_fully(text, "en").text == text
    assert report_from_text(text, "en").text == text


def test_unknown_language():
    with pytest.raises(ValueError, match="a language of en, zh, got 'de'"):
        split_sections("a", "de")
