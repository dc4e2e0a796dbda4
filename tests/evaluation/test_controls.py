# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Controls of the whole suite: what an oracle, a model that sees nothing and one wrong word are scored."""

import re

import numpy as np
import pytest

from m3fm.data import load_studies
from m3fm.evaluation.baselines import derangement
from m3fm.evaluation.clinical_metrics import CLINICAL_METRICS, ClinicalScorer
from m3fm.evaluation.resampling import cluster_weights, compare_rows, point_scores
from m3fm.evaluation.text_metrics import TextScorer

LANGUAGES = ("en", "zh")
REPORTS = {
    "en": [
        "The heart is enlarged. Small left pleural effusion. No pneumothorax is seen.",
        "There is consolidation in the right lower lobe. No pleural effusion. Heart size is normal.",
        "A nodule of 8 mm is seen in the left upper lobe. No lymphadenopathy.",
        "Patchy ground-glass opacities in the right upper lobe. No pleural effusion or pneumothorax.",
        "Right apical pneumothorax. No consolidation. The mediastinum is midline.",
        "Left basilar atelectasis with a small left pleural effusion. No pneumothorax.",
        "Pleural thickening on the right side. No nodule. No cardiomegaly.",
        "Fibrosis in the left upper lobe, calcified granuloma. No consolidation is present.",
    ],
    "zh": [
        "心影增大。左侧少量胸腔积液。未见气胸。",
        "右肺下叶见实变影。未见胸腔积液。心影大小正常。",
        "左肺上叶见结节影，直径约8mm。纵隔内未见肿大淋巴结。",
        "右肺上叶见片状磨玻璃影。双侧未见胸腔积液及气胸。",
        "右侧气胸。肺内未见实变。纵隔居中。",
        "左肺下叶不张，左侧少量胸腔积液。未见气胸。",
        "右侧胸膜增厚。肺内未见结节。心影不大，未见异常。",
        "左肺上叶纤维化，可见钙化灶。肺内未见实变影。",
    ],
}
# One word of a report, turned into its opposite.
SIDES = {"en": {"left": "right", "right": "left"}, "zh": {"左": "右", "右": "左"}}
NEGATIONS = {"en": {"no": "moderate"}, "zh": {"未见": "可见"}}


def suite(references, language):
    """Returns a function that measures a list of reports in everything."""
    scorers = TextScorer(references, language), ClinicalScorer(references, language)
    return lambda reports: [each for scorer in scorers for each in scorer.measure(reports)]


def scores_of(reports, references, language):
    return point_scores(suite(references, language)(reports), len(references))


def turn(text, words, language):
    edge = r"\b" if language == "en" else ""
    pattern = re.compile(edge + f"({'|'.join(words)})" + edge, re.IGNORECASE)
    return pattern.sub(lambda match: words[match[0].lower()], text)


def check_oracle(references, language):
    scores = scores_of(references, references, language)
    assert len(scores) > len(CLINICAL_METRICS) + 7
    for name, score in scores.items():
        if name.startswith("cider_d"):
            # On a scale to 10; a report of n-grams that every report has weighs nothing.
            assert 8.5 < score <= 10 + 1e-9, name
        elif name.startswith("meteor"):
            # Its penalty for the one chunk that every match has is 0.5 / matches ** 3 of the score.
            assert 0.99 < score <= 1, name
        else:
            assert score == pytest.approx(1), name


def check_swaps(references, language):
    """Words change sides, or lose their negation: overlap hardly notices, findings do."""
    turned = [turn(text, SIDES[language], language) for text in references]
    scores = scores_of(turned, references, language)
    assert scores["finding_f1_micro"] == pytest.approx(1)
    assert scores["located_f1_micro"] < 0.9
    # Both sides turned around are both sides.
    assert scores["side_accuracy"] < 0.7
    assert scores["bleu_1"] > 0.85
    affirmed = [turn(text, NEGATIONS[language], language) for text in references]
    scores = scores_of(affirmed, references, language)
    assert scores["finding_f1_micro"] < 0.9
    assert scores["finding_precision_micro"] < 0.85
    assert scores["bleu_1"] > 0.8


def image_use(reports, references, groups, language, num_resamples):
    """Compares reports with the same ones on other studies' images, as an evaluation does."""
    measure = suite(references, language)
    shuffles = [measure([reports[i] for i in derangement(len(reports), seed)]) for seed in range(4)]
    trials = {"model": [measure(reports)], "shuffled_images": shuffles}
    return compare_rows(trials, cluster_weights(groups, num_resamples))[2]["shuffled_images"]


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_perfect_oracle_has_every_point(language):
    check_oracle(REPORTS[language], language)


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_wrong_side_and_a_lost_negation_cost_findings(language):
    check_swaps(REPORTS[language], language)


@pytest.mark.parametrize("language", LANGUAGES)
def test_one_wrong_word_in_one_report_is_seen(language):
    references = REPORTS[language]
    for words, name in ((SIDES[language], "located_f1_micro"), (NEGATIONS[language], "finding_f1_micro")):
        for place, text in enumerate(references):
            if (turned := turn(text, words, language)) != text:
                changed = [*references[:place], turned, *references[place + 1 :]]
                assert scores_of(changed, references, language)[name] < 1, (place, turned)


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_model_that_does_not_look_has_no_image_use(language):
    generator = np.random.default_rng(1)
    groups = np.arange(80) // 2
    # Studies of a patient have the same report.
    references = [REPORTS[language][i] for i in np.repeat(generator.integers(8, size=40), 2)]
    blind = [REPORTS[language][i] for i in generator.integers(8, size=80)]
    gaps = image_use(blind, references, groups, language, 200)
    for name, gap in gaps.items():
        assert gap["low"] <= 0 <= gap["high"], name
    constant = image_use([REPORTS[language][0]] * 80, references, groups, language, 50)
    defined = [gap for gap in constant.values() if gap["difference"] == gap["difference"]]
    assert len(defined) > 10
    assert all((gap["difference"], gap["low"], gap["high"]) == (0, 0, 0) for gap in defined)
    oracle = image_use(references, references, groups, language, 200)
    assert all(oracle[name]["low"] > 0.2 for name in ("bleu_4", "rouge_l", "finding_f1_micro"))


def test_image_use_of_blind_models_covers_zero_as_often_as_promised():
    """Of models that write reports at random, about 95 % have an interval of image use that covers 0."""
    generator = np.random.default_rng(0)
    groups = np.arange(60)
    covered = 0
    for _ in range(60):
        references = [REPORTS["en"][i] for i in generator.integers(8, size=60)]
        measure = ClinicalScorer(references, "en").measure
        blind = [REPORTS["en"][i] for i in generator.integers(8, size=60)]
        shuffles = [measure([blind[i] for i in derangement(60, seed)]) for seed in range(10)]
        trials = {"model": [measure(blind)], "shuffled_images": shuffles}
        gap = compare_rows(trials, cluster_weights(groups, 200))[2]["shuffled_images"]["finding_f1_micro"]
        covered += gap["low"] <= 0 <= gap["high"]
    # 57 are promised, and two standard deviations of the binomial are 3.4.
    assert covered >= 52


@pytest.mark.realdata
@pytest.mark.parametrize("language", LANGUAGES)
def test_controls_hold_on_reports_of_radiologists(data_root, language):
    studies = [study for study in load_studies(data_root / "cov_ctr") if study.split == "validation"]
    references = [study.reports[language] for study in studies if language in study.reports]
    assert len(references) == 72
    check_oracle(references, language)
    check_swaps(references, language)
    generator = np.random.default_rng(0)
    blind = [references[i] for i in generator.integers(len(references), size=len(references))]
    groups = [study.grouped_key for study in studies if language in study.reports]
    gaps = image_use(blind, references, groups, language, 500)
    assert all(gaps[name]["low"] <= 0 <= gaps[name]["high"] for name in ("bleu_4", "rouge_l", "finding_f1_micro"))
