# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from m3fm.data.labels import FINDINGS, NO_FINDING, finding_table
from m3fm.evaluation.finding_labeler import (
    FindingLabeler,
    LabeledFinding,
    find_mentions,
    label_report,
    label_reports,
)
from m3fm.evaluation.finding_rules import SHIPPED_RULES, load_rules
from m3fm.evaluation.vocabulary import Vocabulary, bounded, first_characters

SIGNS = {"+": "positive", "-": "negative", "?": "uncertain"}
PLACES = {"L": "left", "R": "right", "u": "upper", "m": "middle", "l": "lower"}

# "-effusion": denied; "?effusion": left open; "+effusion@Rl": stated, right side, lower lobe.
SENTENCES = [
    ("There is no pleural effusion, pneumothorax or focal consolidation.",
     "-pleural_effusion -pneumothorax -consolidation"),
    ("No focal consolidation, pleural effusion, or pneumothorax.", "-consolidation -pleural_effusion -pneumothorax"),
    ("Neither effusion nor pneumothorax is seen.", "-pleural_effusion -pneumothorax"),
    ("Pleural effusion-thickening was not detected.", "-pleural_effusion -pleural_thickening"),
    ("Pericardial effusion-thickening was not observed.", "-pericardial_effusion"),
    ("Mass, nodule or infiltration was not detected in both lung parenchyma.", "-mass -nodule -infiltration"),
    ("No pneumothorax, but there is a small right pleural effusion.", "-pneumothorax +pleural_effusion@R"),
    ("No pneumothorax, there is a left effusion.", "-pneumothorax +pleural_effusion@L"),
    ("No effusion; left lower lobe consolidation is seen.", "-pleural_effusion +consolidation@Ll"),
    ("No evidence of pneumothorax is seen, while a left effusion is present.",
     "-pneumothorax +pleural_effusion@L"),
    ("No infiltrate or effusion, heart is enlarged.", "-infiltration -pleural_effusion +cardiomegaly"),
    ("The lungs are clear except for a nodule in the right upper lobe.",
     "-lung_opacity -consolidation +nodule@Ru"),
    ("No change in the right effusion.", "+pleural_effusion@R"),
    ("No significant interval change in moderate left pneumothorax.", "+pneumothorax@L"),
    ("Not only atelectasis but also effusion is seen.", "+atelectasis +pleural_effusion"),
    ("Resolved pneumothorax.", "-pneumothorax"),
    ("The left pneumothorax has resolved.", "-pneumothorax"),
    ("There is no longer evidence of left pneumothorax.", "-pneumothorax"),
    ("Interval removal of the chest tube.", "-support_devices"),
    ("Consolidation without effusion.", "+consolidation -pleural_effusion"),
    ("Cardiomegaly with no effusion.", "+cardiomegaly -pleural_effusion"),
    ("Right upper lobe consolidation, no pleural effusion.", "+consolidation@Ru -pleural_effusion"),
    ("Lungs are clear without infiltrate.", "-lung_opacity -consolidation -infiltration"),
    ("Negative for pneumothorax.", "-pneumothorax"),
    ("Absence of pleural effusion.", "-pleural_effusion"),
    ("Effusion is unlikely.", "-pleural_effusion"),
    ("No suspicious nodule.", "-nodule"),
    ("No definite consolidation.", "-consolidation"),
    ("No airspace opacity to suggest pneumonia.", "-lung_opacity -pneumonia"),
    ("The nodule is not calcified.", "+nodule -calcification"),
    ("There is no left pleural effusion.", "-pleural_effusion"),
    ("Pneumonia cannot be excluded.", "?pneumonia"),
    ("Cannot exclude left lower lobe pneumonia.", "?pneumonia@Ll"),
    ("Findings may represent pneumonia.", "?pneumonia"),
    ("Possible small effusions.", "?pleural_effusion"),
    ("Atelectasis versus infiltrate.", "?atelectasis ?infiltration"),
    ("Question of pneumonia.", "?pneumonia"),
    ("Rule out pneumonia.", ""),
    ("Evaluate for pneumothorax.", ""),
    ("History of tuberculosis.", ""),
    ("Heart size is normal.", "-cardiomegaly"),
    ("Normal heart size.", "-cardiomegaly"),
    ("Heart size is at the upper limits of normal.", "-cardiomegaly"),
    ("Heart size and mediastinal contours are within normal limits.",
     "-cardiomegaly -enlarged_cardiomediastinum"),
    ("The heart is not enlarged.", "-cardiomegaly"),
    ("The heart is mildly enlarged.", "+cardiomegaly"),
    ("Borderline heart size.", "?cardiomegaly"),
    ("The costophrenic angles are sharp.", "-pleural_effusion"),
    ("Blunting of the left costophrenic angle.", "+pleural_effusion@L"),
    ("Left lower lobe consolidation and small right effusion.", "+consolidation@Ll +pleural_effusion@R"),
    ("Consolidation in the left lower lobe and effusion on the right.", "+consolidation@Ll +pleural_effusion@R"),
    ("Bilateral pleural effusions.", "+pleural_effusion@LR"),
    ("The right lower lobe of the lung was seen as a round-like dense shadow with clear margins.",
     "+lung_opacity@Rl"),
    ("bilateral lung ground glass", "+ground_glass_opacity@LR"),
    ("In the right lung, there is a nodule.", "+nodule@R"),
    ("Nodules in the right upper and left lower lobes.", "+nodule@LRul"),
    ("Atelectasis of the lingula.", "+atelectasis@Lu"),
    ("Bibasilar atelectasis.", "+atelectasis@LRl"),
    ("Right apical pneumothorax.", "+pneumothorax@Ru"),
    ("RML mass.", "+mass@Rm"),
    ("Ground-glass and consolidation areas in both lower lobes.", "+ground_glass_opacity@LRl +consolidation@LRl"),
    ("Left pleural effusion with mediastinal shift to the right.", "+pleural_effusion@L"),
    ("Haemothorax on the left.", "+pleural_effusion@L"),
    ("Pulmonary oedema is present.", "+edema"),
    ("There is XXXX pleural effusion on the left.", "+pleural_effusion@L"),
    ("No XXXX pneumothorax.", "-pneumothorax"),
    ("NO PLEURAL EFFUSION. RIGHT PNEUMOTHORAX.", "-pleural_effusion +pneumothorax@R"),
    ("No acute fracture. Old healed right rib fractures.", "-fracture +fracture"),
    ("PICC line tip in the SVC.", "+support_devices"),
    ("Calcified granuloma in the left lung.", "+granuloma@L +calcification@L"),
    ("The right upper lobe shows a cavitary lesion with air bronchogram.", "+cavity@Ru +air_bronchogram"),
    ("No enlarged lymph nodes were seen in the mediastinum, and no abnormal density shadow was seen in the bilateral "
     "thoracic cavity.", "-lymphadenopathy -pleural_effusion"),
    ("A nodule in the thyroid gland.", ""),
    ("Mass effect on the trachea.", ""),
]  # fmt: skip


def written(text: str) -> str:
    """Writes the mentions of a text in the notation of `SENTENCES`."""
    signs = {state: sign for sign, state in SIGNS.items()}
    words = []
    for mention in find_mentions(text, "en"):
        place = "".join(letter for letter, name in PLACES.items() if name in mention.sides | mention.lobes)
        words.append(signs[mention.state] + mention.finding + (f"@{place}" if place else ""))
    return " ".join(words)


@pytest.mark.parametrize(("text", "expected"), SENTENCES, ids=[text for text, _ in SENTENCES])
def test_sentences(text, expected):
    assert written(text) == expected


def test_mentions_stand_where_they_say():
    text = "Clear. İ No PLEURAL Effusion.\nLeft lower lobe nodule."
    mentions = find_mentions(text, "en")
    assert [text[mention.start : mention.end] for mention in mentions] == ["Effusion", "nodule"]


def test_a_report_takes_the_strongest_state_and_its_places():
    labels = label_report(
        "No left effusion. Possible effusion. Right effusion. Effusion in the left lower lobe.", "en"
    )
    assert labels["pleural_effusion"] == LabeledFinding("positive", frozenset({"left", "right"}), frozenset({"lower"}))
    assert labels[NO_FINDING].state == "negative"
    assert label_report("No effusion. Possible effusion.", "en")["pleural_effusion"].state == "uncertain"


@pytest.mark.parametrize(
    ("text", "state"),
    [
        ("The lungs are clear.", "positive"),
        ("No acute disease. A central venous catheter is in place.", "positive"),
        ("Possible pneumonia.", "negative"),
        ("COPD.", "negative"),
        ("  ", "negative"),
    ],
)
def test_no_finding_means_a_report_without_abnormality(text, state):
    labels = label_report(text, "en")
    assert labels[NO_FINDING].state == state
    assert set(labels) <= set(FINDINGS)


def test_a_finding_implies_the_more_general_one_with_its_place_but_its_absence_implies_nothing():
    labels = label_report("Consolidation in the right upper lobe. No nodule.", "en")
    assert (
        labels["lung_opacity"]
        == labels["consolidation"]
        == LabeledFinding("positive", frozenset({"right"}), frozenset({"upper"}))
    )
    assert labels["nodule"].state == "negative"
    assert "lung_lesion" not in labels
    assert "enlarged_cardiomediastinum" not in label_report("Cardiomegaly.", "en")


@pytest.mark.parametrize("name", [name for name in FINDINGS if name != NO_FINDING])
def test_the_phrases_of_the_finding_table_are_understood(name):
    finding = finding_table()[name]
    for phrase in finding.present["en"]:
        assert label_report(phrase, "en").get(name, LabeledFinding("none")).state in ("positive", "uncertain"), phrase
    for phrase in finding.absent["en"]:
        assert label_report(phrase, "en").get(name, LabeledFinding("none")).state == "negative", phrase


def test_swapping_sides_or_a_negation_changes_the_labels():
    labels = label_report("Left effusion. No pneumothorax.", "en")
    assert label_report("Right effusion. No pneumothorax.", "en") != labels
    assert label_report("Left effusion. Pneumothorax.", "en") != labels


def test_reports_keep_their_order():
    texts = ["Left effusion.", "No effusion.", "Left effusion."]
    labels = label_reports(texts, "en")
    assert [label["pleural_effusion"].state for label in labels] == ["positive", "negative", "positive"]


@pytest.mark.parametrize("language", sorted(SHIPPED_RULES))
@pytest.mark.parametrize(
    "text",
    ["no effusion ", "heart ", "a", "lymph nodes, ", "(", "calcified aorta and ", "双肺", "未见，", "主动脉、", " "],
)
def test_no_input_takes_long(text, language):
    text = (text * 100_000)[:100_000]
    start = time.process_time()
    label_report(text, language)
    assert time.process_time() - start < 2


WORDS = {
    "en": "no not right left lower lobe of the lung , and . ; effusion nodule is seen compressed heart normal but was",
    "zh": "未见 右 左 下叶 肺 ， 及 。 ； 积液 结节 影 见 受压 心影 正常 但 双 增大 可能",
}


@pytest.mark.parametrize("language", sorted(WORDS))
def test_any_order_of_words_can_be_read(language):
    rng = np.random.default_rng(0)
    words = WORDS[language].split()
    joiner = " " if language == "en" else ""
    for _ in range(500):
        text = joiner.join(rng.choice(words, size=25))
        for mention in find_mentions(text, language):
            assert 0 <= mention.start < mention.end <= len(text)
            assert mention.state != "negative" or not mention.sides | mention.lobes


def test_unknown_language_is_refused():
    with pytest.raises(ValueError, match=r"Expected a language of en.*got 'fr'"):
        FindingLabeler("fr")


def english_rules() -> dict:
    return yaml.safe_load(SHIPPED_RULES["en"].read_text(encoding="utf-8"))


def write_rules(folder: Path, **changes: object) -> Path:
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(english_rules() | changes), encoding="utf-8")
    return path


def test_own_rules_can_be_used(tmp_path):
    labeler = FindingLabeler(write_rules(tmp_path, findings={"hernia": ["gap"]}, compounds=[], not_findings=[]))
    assert [mention.finding for mention in labeler.find_mentions("A gap. No effusion.")] == ["hernia"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"findings": {"efusion": ["x"]}}, "mine.yaml: findings: unknown 'efusion'; the nearest is"),
        ({"findings": {"hernia": ["(x"]}}, r"findings.hernia\[0\]: '\(x' is no regular expression"),
        ({"findings": {"hernia": ["(x)"]}}, r"findings.hernia\[0\]: '\(x\)' has a capturing group"),
        ({"findings": {"hernia": ["x?"]}}, r"findings.hernia\[0\]: 'x\?' matches the empty text"),
        ({"findings": {"hernia": "x"}}, "findings.hernia: expected a list of patterns, got 'x'"),
        ({"findings": {NO_FINDING: ["x"]}}, "'no_finding' follows from the others"),
        ({"findings": {"hernia": ["<lug>"]}}, r"findings.hernia\[0\]: unknown 'lug'"),
        ({"negations": {}}, "unknown 'negations'; the nearest is 'negation'"),
        ({"negation": {"befor": ["no"]}}, "negation: unknown 'befor'; the nearest is 'before'"),
        ({"locations": [{"sides": ["port"], "words": ["x"]}]}, r"locations\[0\].sides: unknown 'port'"),
        ({"implies": {"mass": ["lump"]}}, "implies.mass: unknown 'lump'"),
    ],
)
def test_malformed_rules_name_the_place(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        load_rules(write_rules(tmp_path, **changes))


def test_rules_that_are_no_mapping_are_refused(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("- a", encoding="utf-8")
    with pytest.raises(ValueError, match="mine.yaml: expected a mapping, got list"):
        load_rules(path)
    path.write_text("a: [", encoding="utf-8")
    with pytest.raises(ValueError, match="Expected a readable YAML file of rules, got mine.yaml"):
        load_rules(path)


@pytest.mark.parametrize("language", sorted(SHIPPED_RULES))
def test_shipped_rules_are_named_after_their_language_and_know_every_finding(language):
    content = yaml.safe_load(SHIPPED_RULES[language].read_text(encoding="utf-8"))
    assert content["language"] == language == load_rules(language).language
    known = set(content["findings"]) | {name for entry in content.get("compounds", []) for name in entry["findings"]}
    assert known == set(FINDINGS) - {NO_FINDING}


@pytest.mark.parametrize(
    ("pattern", "characters"),
    [
        ("ab|c", "ac"),
        ("(?:ab|c)?d", "acd"),
        (r"\ba{2}", "a"),
        ("(?!x)(?:y|z)", "yz"),
        (r"\?|,(?= a)", "?,"),
        (r"[ab]c", None),
        (r"\w", None),
        (r"(?:a|[(|)])", None),
        ("a*", None),
    ],
)
def test_first_characters(pattern, characters):
    assert first_characters(pattern) == (None if characters is None else frozenset(characters))


def test_vocabulary_takes_the_longest_leftmost_phrase():
    patterns = ("no", "no change", r"\?", "[cd]og|(?:do|so)[ld]", "no")
    matches = Vocabulary([(pattern, pattern) for pattern in patterns], r"\b", r"\b").scan("nothing? no change, no dog")
    assert [(match.start, match.end, match.meanings) for match in matches] == [
        (7, 8, (r"\?",)),
        (9, 18, ("no change",)),
        (20, 22, ("no",)),
        (23, 26, ("[cd]og|(?:do|so)[ld]",)),
    ]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [("a|b", r"\ba\b|\bb\b"), (r"\?|(?:a|b)", r"\?|\b(?:a|b)\b"), (",(?= a)", ",(?= a)"), ("a{2}", r"\ba{2}\b")],
)
def test_boundaries_stand_where_a_word_starts_or_ends(pattern, expected):
    assert bounded(pattern, r"\b", r"\b") == expected
