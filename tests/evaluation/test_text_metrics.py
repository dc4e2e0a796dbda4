# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
import random
import time

import pytest

from m3fm.data import load_studies
from m3fm.evaluation.text_metrics import METRICS, corpus_bleu, distinct_ratio, rouge_l, score_reports, tokenize_report

WORDS = tuple(f"finding{i}" for i in range(16))


def pycocoevalcap_scores(hypotheses, references):
    bleu = pytest.importorskip("pycocoevalcap.bleu.bleu")
    rouge = pytest.importorskip("pycocoevalcap.rouge.rouge")
    found = {i: [" ".join(tokens)] for i, tokens in enumerate(hypotheses)}
    wanted = {i: [" ".join(tokens)] for i, tokens in enumerate(references)}
    scores, _ = bleu.Bleu(4).compute_score(wanted, found, verbose=0)
    return dict(zip(METRICS, [*scores, rouge.Rouge().compute_score(wanted, found)[0]], strict=True))


def made_up_reports(count, seed):
    generator = random.Random(seed)
    return [" ".join(generator.choices(WORDS, k=generator.randint(1, 40))) for _ in range(count)]


@pytest.mark.parametrize(
    ("language", "text", "tokens"),
    [
        (
            "en",
            "No Pleural-effusion, clear; 1.5 cm nodule.",
            ["no", "pleural", "effusion", "clear", "1.5", "cm", "nodule", "."],
        ),
        ("en", " ,;\n", []),
        ("zh", "双肺清晰， 未见CT 异常。", list("双肺清晰，未见CT异常。")),
        ("zh", "", []),
    ],
)
def test_tokens_are_the_stated_ones(language, text, tokens):
    assert tokenize_report(text, language) == tokens


@pytest.mark.parametrize("seed", range(4))
def test_scores_equal_pycocoevalcap_on_made_up_reports(seed):
    predictions, references = made_up_reports(50, seed), made_up_reports(50, seed + 100)
    expected = pycocoevalcap_scores([text.split() for text in predictions], [text.split() for text in references])
    assert score_reports(predictions, references, "en") == pytest.approx(expected, abs=1e-6)


def test_scores_equal_pycocoevalcap_where_predictions_are_short_long_or_share_nothing():
    for prediction in ("lungs", "x y z", "the the the the the the the the", "the lungs are clear . " * 9):
        references = ["the lungs are clear .", "no effusion"]
        expected = pycocoevalcap_scores([prediction.split()] * 2, [text.split() for text in references])
        assert score_reports([prediction] * 2, references, "en") == pytest.approx(expected, abs=1e-6)


@pytest.mark.realdata
@pytest.mark.parametrize("language", ["en", "zh"])
def test_scores_equal_pycocoevalcap_on_real_reports(data_root, language):
    studies = load_studies(data_root / "cov_ctr")
    references = [study.reports[language] for study in studies if study.split == "validation"]
    predictions = [study.reports[language] for study in studies if study.split == "train"][: len(references)]
    expected = pycocoevalcap_scores(
        *([tokenize_report(text, language) for text in texts] for texts in (predictions, references))
    )
    assert score_reports(predictions, references, language) == pytest.approx(expected, abs=1e-6)


def test_a_hand_computed_example():
    # 3 of 4 words match, 1 of 3 pairs, as long as the reference; the longest common subsequence is "a b d".
    scores = score_reports(["a b x d"], ["a b c d"], "en")
    assert scores["bleu_1"] == pytest.approx(3 / 4)
    assert scores["bleu_2"] == pytest.approx((3 / 4 * 1 / 3) ** 0.5)
    assert scores["rouge_l"] == pytest.approx(3 / 4)


def test_identical_reports_score_one():
    for language, text in (("en", "The lungs are clear. No effusion."), ("zh", "双肺清晰，未见异常。")):
        assert score_reports([text], [text], language) == pytest.approx(dict.fromkeys(METRICS, 1.0), abs=1e-6)


def test_chinese_is_scored_by_character():
    assert score_reports(["双肺清晰"], ["双肺模糊"], "zh")["bleu_1"] == pytest.approx(0.5)


def test_an_empty_prediction_scores_zero():
    assert score_reports([""], ["Clear lungs."], "en") == pytest.approx(dict.fromkeys(METRICS, 0.0), abs=1e-12)
    assert score_reports(["。"], [""], "zh")["rouge_l"] == 0
    half = score_reports(["", "clear lungs ."], ["clear lungs .", "clear lungs ."], "en")
    assert half["rouge_l"] == pytest.approx(0.5)


def test_rouge_equals_plain_dynamic_programming():
    generator = random.Random(3)
    for _ in range(50):
        first, second = ([generator.choice("abcd") for _ in range(generator.randint(1, 90))] for _ in range(2))
        table = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
        for i, token in enumerate(first):
            for j, other in enumerate(second):
                table[i + 1][j + 1] = table[i][j] + 1 if token == other else max(table[i][j + 1], table[i + 1][j])
        precision, recall = table[-1][-1] / len(first), table[-1][-1] / len(second)
        expected = 2.44 * precision * recall / (recall + 1.44 * precision) if recall else 0
        assert rouge_l(first, second) == pytest.approx(expected)


def test_bleu_of_the_corpus_is_not_the_mean_of_sentences():
    hypotheses, references = [["a"], ["b", "c", "d", "e"]], [["a"], ["b", "x", "x", "x"]]
    assert corpus_bleu(hypotheses, references)[0] == pytest.approx(2 / 5)


def test_ten_thousand_pairs_take_seconds():
    predictions, references = made_up_reports(10_000, 0), made_up_reports(10_000, 1)
    start = time.process_time()
    score_reports(predictions, references, "en")
    assert time.process_time() - start < 10


@pytest.mark.parametrize(
    ("predictions", "references", "language", "message"),
    [
        ([], [], "en", "at least one"),
        (["a"], ["a", "b"], "en", "got 1 predictions and 2 references"),
        (["a"], ["a"], "fr", "Unsupported language 'fr'"),
        ("a", "a", "en", "got one string"),
    ],
)
def test_wrong_input_is_refused(predictions, references, language, message):
    with pytest.raises(ValueError, match=message):
        score_reports(predictions, references, language)


def test_distinct_ratio_counts_different_reports():
    assert distinct_ratio(["a", "a ", "b", "c"]) == 0.75
    with pytest.raises(ValueError, match="at least one"):
        distinct_ratio([])
