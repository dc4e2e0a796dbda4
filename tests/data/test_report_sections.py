# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
import time

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
        # The impression alone is headed.
        (
            "The lungs are clear. There is a small left effusion.\nIMPRESSION: Cardiomegaly.",
            {"findings": "The lungs are clear. There is a small left effusion.", "impression": "Cardiomegaly."},
        ),
        (
            "CHEST TWO VIEWS\n\nThe lungs are clear. Impression: Normal.",
            {"preamble": "CHEST TWO VIEWS", "findings": "The lungs are clear.", "impression": "Normal."},
        ),
        (
            "COMPARISON: ___.\n\nThe lungs are clear.\n\nIMPRESSION: Normal.",
            {"comparison": "___.", "findings": "The lungs are clear.", "impression": "Normal."},
        ),
        ("LUNGS: Clear.\nIMPRESSION: Normal.", {"findings": "LUNGS: Clear.", "impression": "Normal."}),
        # Titles, fields and wet reads before an impression are no findings.
        (
            "AP CHEST, 5:32 A.M., ON ___.\n\nIMPRESSION: a.",
            {"preamble": "AP CHEST, 5:32 A.M., ON ___.", "impression": "a."},
        ),
        ("Portable chest, 5 a.m.\n\nIMPRESSION: a.", {"preamble": "Portable chest, 5 a.m.", "impression": "a."}),
        ("SERVICE: Medicine\nIMPRESSION: a.", {"body": "SERVICE: Medicine", "impression": "a."}),
        (
            "INDICATION: cough. Evaluate for pneumonia.\n\nIMPRESSION: a.",
            {"indication": "cough. Evaluate for pneumonia.", "impression": "a."},
        ),
        (
            "WET READ: 5 PM\n\nThe lungs are low.\n\nIMPRESSION: a.",
            {"wet_read": "5 PM\n\nThe lungs are low.", "impression": "a."},
        ),
        # The report stands behind a field in its line.
        (
            "Comparison: None. The lungs are clear. There is a small left effusion.",
            {"comparison": "None.", "body": "The lungs are clear. There is a small left effusion."},
        ),
        ("Technique: PA. Lungs clear.", {"technique": "PA.", "body": "Lungs clear."}),
        ("Indication: cough. The lungs are clear.", {"indication": "cough.", "body": "The lungs are clear."}),
        (
            "Indication: cough. Evaluate for pneumonia. The lungs are clear.",
            {"indication": "cough. Evaluate for pneumonia.", "body": "The lungs are clear."},
        ),
        ("Indication: cough. Rule out pneumonia.", {"indication": "cough. Rule out pneumonia."}),
        (
            "NAME: J. Smith\nDOB: 1/1/1950\nThe lungs are clear.",
            {"administrative": "J. Smith\n1/1/1950", "body": "The lungs are clear."},
        ),
        ("Dictated by: Dr. John Smith.", {"administrative": "Dr. John Smith."}),
        ("Age: 55 Sex: M Findings: Clear.", {"administrative": "55\nM", "findings": "Clear."}),
        # Headings of other looks: alone on a line after a line without a full stop, numbered, full-width.
        ("Findings\nClear lungs\nImpression\nNormal", {"findings": "Clear lungs", "impression": "Normal"}),
        ("IMPRESSION:\n1. Nodule, 5 mm\n2. Comparison: none", {"impression": "1. Nodule, 5 mm", "comparison": "none"}),
        ("FINDINGS：clear。IMPRESSION：normal", {"findings": "clear。", "impression": "normal"}),
        ("ＦＩＮＤＩＮＧＳ：ｃｌｅａｒ", {"findings": "ｃｌｅａｒ"}),
        ("No effusion\n\nClear", {"body": "No effusion\n\nClear"}),
        ("CHEST\n\nClear", {"preamble": "CHEST", "body": "Clear"}),
        # A wrapped line that starts with the name of a section.
        (
            "FINDINGS: The nodule of the last\nimpression\nis seen.",
            {"findings": "The nodule of the last\nimpression\nis seen."},
        ),
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
        # The impression alone is headed.
        ("胸廓对称，双肺清晰。印象：未见异常。", {"findings": "胸廓对称，双肺清晰。", "impression": "未见异常。"}),
        ("胸廓对称，双肺清晰。\n诊断：正常。", {"findings": "胸廓对称，双肺清晰。", "impression": "正常。"}),
        (
            "双肺清晰，提示肺炎：请结合临床。诊断：肺炎",
            {"findings": "双肺清晰，提示肺炎：请结合临床。", "impression": "肺炎"},
        ),
        ("检查报告：双肺清晰。印象：正常。", {"findings": "双肺清晰。", "impression": "正常。"}),
        ("东方市第一人民医院\n印象：正常。", {"preamble": "东方市第一人民医院", "impression": "正常。"}),
        # The report stands behind a field in its line.
        ("检查方法：CT平扫。双肺清晰，心影正常。", {"technique": "CT平扫。", "body": "双肺清晰，心影正常。"}),
        ("部位：胸部。双肺清晰。", {"examination": "胸部。", "body": "双肺清晰。"}),
        ("病史：咳嗽。排除肺炎。", {"history": "咳嗽。排除肺炎。"}),
        ("姓名：张三 性别：男 所见：双肺清晰。", {"administrative": "张三\n男", "findings": "双肺清晰。"}),
        ("影像表现\n双肺清晰\n影像诊断\n1、正常", {"findings": "双肺清晰", "impression": "1、正常"}),
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


@pytest.mark.parametrize(
    ("signature", "language"),
    [
        ("\nElectronically signed by John Smith MD on 01/02/2020", "en"),
        ("\n\nSigned by John Smith, MD\n01/02/2020 10:33", "en"),
        ("\r\nDictated by Dr. John A. Smith\r\nRead and approved by Ann Lee", "en"),
        (" This report was electronically signed by John Smith, M.D.", "en"),
        ("\nDICTATED BY JOHN SMITH", "en"),
        ("\n报告医师 李四", "zh"),
        ("\n审核医师：王五", "zh"),
        ("\n报告医师：李四 审核医师：王五", "zh"),
        ("审核医师：王五", "zh"),
        ("\n报告医生 李四 审核医生 王五 2020-01-02 10:33\n报告日期 2020年1月2日", "zh"),
    ],
)
def test_signatures_are_left_out(signature, language):
    words = {"en": "Clear lungs.", "zh": "双肺清晰。"}[language]
    headed = {"en": f"FINDINGS: {words}{signature}", "zh": f"所见：{words}{signature}"}[language]
    assert report_from_text(words + signature, language).text == words
    report = report_from_text(headed, language)
    assert (report.text, report.findings, report.raw) == (words, words, headed)
    assert report_from_sections(words + signature, None, language).text == words


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("The lungs were\nreviewed by nobody.", "en"),
        ("A nodule is read by many as benign.", "en"),
        ("请结合临床，报告医师提示肺炎。", "zh"),
        ("放射医师提示肺炎。", "zh"),
    ],
)
def test_words_of_a_signature_in_a_sentence_stay(text, language):
    assert report_from_sections(text, None, language).text == text.replace("\n", " ")


def test_the_sentence_behind_a_signature_stays():
    raw = "Electronically signed by John Smith MD. The lungs are clear."
    assert report_from_text(raw, "en").text == "The lungs are clear."


def test_a_line_separator_ends_a_sentence():
    assert report_from_text("No effusion\u2028Clear", "en").text == "No effusion. Clear"


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize(
    "piece",
    [
        "\nA B:",
        "[**",
        "\nIMPRESSION: x.",
        "\nCHEST: ",
        "所见：清。",
        "FINDINGS ",
        "past ",
        "姓名：a 性别：b ",
        "\n  ",
        " ",
    ],
)
def test_time_does_not_grow_with_the_square_of_the_length(language, piece):
    text = (piece * 100_000)[:100_000]
    start = time.perf_counter()
    split_sections(text, language)
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize("name", ["FINDINGS", "报告医师", "FINAL REPORT", "Signed by"])
def test_a_long_run_of_blanks_takes_no_longer(name):
    start = time.perf_counter()
    for language in ("en", "zh"):
        report_from_text(f"{name}{' ' * 50_000}x:\n", language)
    assert time.perf_counter() - start < 2


def test_unknown_language():
    with pytest.raises(ValueError, match="a language of en, zh, got 'de'"):
        split_sections("a", "de")
