# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""What texts and their translations do not say alike."""

from pathlib import Path

import pytest

from m3fm.data.parallel import KINDS, CheckReport, Difference, PairChecker, read_corpus, read_pairs
from m3fm.data.parallel.check_rules import load_rules, load_shared_rules
from m3fm.data.parallel.facts import read_facts
from m3fm.data.tables import Reading


@pytest.fixture(scope="module")
def checker() -> PairChecker:
    return PairChecker()


def kinds(checker: PairChecker, english: str, chinese: str) -> set[str]:
    return {difference.kind for difference in checker.check({"en": english, "zh": chinese})}


@pytest.mark.parametrize(
    ("english", "chinese"),
    [
        ("The lungs are clear. No pleural effusion or pneumothorax.", "双肺清晰。无胸腔积液或气胸。"),
        ("Small left pleural effusion with mild cardiomegaly.", "左侧少量胸腔积液，伴心脏轻度增大。"),
        ("A 12 mm nodule in the right upper lobe.", "右肺上叶见一12mm结节。"),
        ("A 1.2 cm nodule in the right upper lobe.", "右肺上叶见12毫米结节。"),
        ("A nodule of 1.2 x 3 cm in the left lower lobe.", "左肺下叶结节，大小1.2×3cm。"),
        ("Fracture of the third rib on the right.", "右侧第三肋骨骨折。"),
        ("Wedge deformity of T8, twelve percent, fracture.", "T8楔形变，12%，骨折。"),
        ("Ground glass opacities in both lungs.", "双肺见磨玻璃影。"),
        ("Bilateral pleural effusions.", "两侧胸腔积液。"),
        ("Patient with COVID-19 pneumonia.", "新冠肺炎患者。"),
        ("There are two nodules in the left lung.", "左肺见两个结节。"),
        ("The PICC and the Swan-Ganz catheter are unchanged.", "PICC及Swan-Ganz导管未见变化。"),
        ("Comparison with XXXX. No mass.", "与XXXX比较。未见肿块。"),
        ("The heart is not enlarged.", "心影不大。"),
    ],
)
def test_what_says_the_same_passes(checker: PairChecker, english: str, chinese: str) -> None:
    assert checker.check({"en": english, "zh": chinese}) == []


@pytest.mark.parametrize(
    ("kind", "english", "chinese"),
    [
        ("negation", "No pleural effusion.", "可见胸腔积液。"),
        ("negation", "Left pleural effusion. The lungs are clear.", "左侧无胸腔积液。双肺清晰。"),
        ("negation", "No acute abnormality.", "有急性异常。"),
        ("laterality", "Effusion in the left hemithorax.", "右侧胸腔积液。"),
        ("laterality", "Right effusion, left nodule, right mass.", "右侧胸腔积液，右肺结节，右肺肿块。"),
        ("laterality", "Bilateral pleural effusions.", "左侧胸腔积液。"),
        ("laterality", "Nodule in the lung on the left.", "肺内结节。"),
        ("severity", "Mild cardiomegaly.", "心脏重度增大。"),
        ("severity", "Small right pleural effusion.", "右侧大量胸腔积液。"),
        ("severity", "Moderate right pleural effusion.", "右侧胸腔积液。"),
        ("number", "A 12 mm nodule.", "13毫米结节。"),
        ("number", "A 12 mm nodule.", "12厘米结节。"),
        ("number", "Fracture of the fifth rib.", "第六肋骨骨折。"),
        ("number", "There are three nodules.", "见四个结节。"),
        ("finding", "Minimal atelectasis in the left lung base.", "左肺底有轻度吸入。"),
        ("finding", "No effusion and no pneumothorax.", "无积液，无气管。"),
        ("untranslated", "Mild cardiomegaly.", "轻度cardiomegaly。"),
        ("untranslated", "Mild cardiomegaly.", "Mild cardiomegaly."),
        ("untranslated", "Mild 心脏增大.", "心脏轻度增大。"),
        ("empty", "Mild cardiomegaly.", "  "),
        ("repeated", "Mild cardiomegaly.", "心脏轻度增大增大增大增大增大增大。"),
        ("length", "The heart, the mediastinum and the bones are normal in size and shape. " * 3, "心影正常。"),
        ("mask", "The tip is in the XXXX.", "尖端位于上腔静脉。"),
        ("term", "The cardiac silhouette is unremarkable.", "心脏轮廓不明显。"),
        ("term", "There is minimal atelectasis.", "有轻度无气肿。"),
    ],
)
def test_what_says_something_else_is_found(checker: PairChecker, kind: str, english: str, chinese: str) -> None:
    assert kind in kinds(checker, english, chinese)


def test_a_difference_tells_what_and_where(checker: PairChecker) -> None:
    texts = {"en": "A 12 mm nodule in the left lung.", "zh": "左肺见13毫米结节。"}

    (number,) = checker.check(texts)

    assert number == Difference(
        "number", "", {"en": ("12 length",), "zh": ("13 length",)}, {"en": ((2, 4),), "zh": ((3, 5),)}
    )
    assert [texts[language][slice(*number.spans[language][0])] for language in texts] == ["12", "13"]
    assert number.as_dict()["values"] == {"en": ("12 length",), "zh": ("13 length",)}
    assert "12" not in repr(number)


def test_a_finding_is_named_with_its_places(checker: PairChecker) -> None:
    texts = {"en": "No pleural effusion. Mild scoliosis.", "zh": "有胸腔积液。轻度脊柱侧弯。"}

    turned, words = checker.check(texts)

    assert (turned.kind, turned.what) == ("negation", "pleural_effusion")
    assert turned.values == {"en": ("negative",), "zh": ("positive",)}
    ((start, end),) = turned.spans["zh"]
    assert texts["zh"][start:end] == "胸腔积液"
    assert (words.kind, words.what, words.spans) == ("negation", "", {"en": ((0, 2),), "zh": ()})


def test_offsets_are_those_of_the_text_as_it_came(checker: PairChecker) -> None:
    texts = {"en": "Clear lungs. İt shows a 12 MM nodule.", "zh": "双肺清晰。见12mm结节。XXXX"}

    (mask,) = checker.check(texts)

    assert mask.kind == "mask"
    ((start, end),) = mask.spans["zh"]
    assert texts["zh"][start:end] == "XXXX"


def test_only_the_kinds_that_are_asked_for() -> None:
    english, chinese = "Mild left effusion.", "右侧重度胸腔积液。"

    assert kinds(PairChecker(["severity"]), english, chinese) == {"severity"}
    assert kinds(PairChecker(["number"]), english, chinese) == set()
    with pytest.raises(ValueError, match="unknown check 'spelling'"):
        PairChecker(["spelling"])


def test_both_languages_are_needed(checker: PairChecker) -> None:
    with pytest.raises(ValueError, match="expected texts in en, zh, got en"):
        checker.check({"en": "Clear."})


@pytest.mark.parametrize(
    ("language", "text", "numbers"),
    [
        ("en", "measuring 1.2 x 3 cm", ["12 length", "30 length"]),
        ("en", "8mm and .5 cm", ["8 length", "5 length"]),
        ("en", "twenty-two ribs and 1,200 ml", ["22 plain", "1200 volume"]),
        ("en", "the 7th rib, a second rib", ["7 plain", "2 plain"]),
        ("en", "one nodule, both lungs, covid-19, x-ray, two lungs", []),
        ("en", "3 to 4 mm", ["3 length", "4 length"]),
        ("zh", "大小约1.2×3cm", ["12 length", "30 length"]),
        ("zh", "第三、四肋", ["3 plain", "4 plain"]),
        ("zh", "十二毫米，二十三处，一百零五毫升", ["12 length", "23 plain", "105 volume"]),
        ("zh", "两肺、两侧、二尖瓣、三尖瓣、三角形、一些、统一、新冠19", []),
        ("zh", "3～4毫米", ["3 length", "4 length"]),
        ("zh", "50%，60％", ["50 share", "60 share"]),
    ],
)
def test_numbers(language: str, text: str, numbers: list[str]) -> None:
    assert [each.value for each in read_facts(text, language).numbers] == numbers


@pytest.mark.parametrize(
    ("language", "text", "sides"),
    [
        (
            "en",
            "left-sided, RLL, bibasilar, both lung bases, dextroscoliosis",
            ["left", "right", "both", "both", "right"],
        ),
        ("en", "both the heart and the lungs, which may have left", []),
        ("zh", "左肺，右侧，双肺，两侧，舌段，左、右肺", ["left", "right", "both", "both", "left", "both"]),
        ("zh", "双腔心、5毫米左右", []),
    ],
)
def test_sides(language: str, text: str, sides: list[str]) -> None:
    stated = [each.value for each in read_facts(text, language).aspects["side"]]

    assert [side for side in stated if side != "loose"] == sides


def test_counts() -> None:
    report = CheckReport()
    report.add([])
    report.add([Difference("number"), Difference("number"), Difference("mask")])
    report.add([Difference("mask")])

    assert report.as_dict() == {
        "pairs": 3,
        "accepted": 1,
        "rejected": 2,
        "share_accepted": 1 / 3,
        "rejected_by_kind": {"mask": 2, "number": 1},
        "rejected_by_kind_alone": {"mask": 1},
    }
    assert "| - mask | 2 | 66.7% | 1 |" in report.table()
    assert CheckReport().as_dict()["share_accepted"] is None
    assert "| accepted | 0 | 0.0% |" in CheckReport().table()


def test_rules_are_of_both_languages() -> None:
    assert load_rules("en").language == "en"
    assert set(load_rules("zh").speaks_of) == set(load_rules("en").speaks_of)
    assert load_shared_rules().units["cm"] == ("length", 10.0)
    assert set(load_rules("en").aspects) == set(load_rules("zh").aspects)
    with pytest.raises(ValueError, match="language must be one of en, zh, got 'de'"):
        load_rules("de")


def test_malformed_rules_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("m3fm.data.parallel.check_rules._FOLDER", tmp_path)
    (tmp_path / "xx.yaml").write_text("language: xx\n", encoding="utf-8")

    with pytest.raises(ValueError, match=r"xx.yaml: expected the keys"):
        load_rules("xx")


def test_every_kind_is_named_once() -> None:
    assert len(set(KINDS)) == len(KINDS)


@pytest.mark.realdata
def test_most_pairs_of_radiologists_pass(data_root: Path, checker: PairChecker) -> None:
    pairs = read_pairs(
        data_root / "cov_ctr" / "metadata.jsonl",
        reading=Reading("skip"),
        columns={"en": "report_en", "zh": "report_zh"},
    )
    report = CheckReport()
    for pair in pairs:
        report.add(checker.check(pair.texts))

    assert report.as_dict()["share_accepted"] > 0.85


@pytest.mark.realdata
def test_known_errors_of_open_i_are_found(data_root: Path) -> None:
    pairs = list(read_corpus(data_root / "openi_iu_reports"))
    checker = PairChecker(["finding", "term", "negation"])
    wrong = [pair for pair in pairs if "atelectasis" in pair.texts["en"] and "无气肿" in pair.texts["zh"]]

    assert len(wrong) > 20
    assert all(checker.check(pair.texts) for pair in wrong)
