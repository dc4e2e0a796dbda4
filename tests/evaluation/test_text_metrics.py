# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
import random
import time

import numpy as np
import pytest

from m3fm.data import load_studies
from m3fm.evaluation import text_metrics
from m3fm.evaluation.resampling import SumMeasurement, point_scores, resampled_scores
from m3fm.evaluation.text_metrics import (
    METRICS,
    TextScorer,
    distinct_ratio,
    metric_names,
    score_reports,
    tokenize_report,
)
from m3fm.evaluation.tokens import TOKENIZATIONS, tokenize

pytest.importorskip("nltk")
pytest.importorskip("jieba")

WORDS = tuple(f"finding{i}" for i in range(16))
CHINESE = (
    "双肺纹理清晰，未见异常。",
    "右肺上叶见磨玻璃影。",
    "胸廓对称，纵隔居中。",
    "左侧胸腔少量积液。",
    "心影不大。",
)


def peer_scores(predictions, references, language):
    """Returns what the public implementations say, on the same tokens, under our names."""
    bleu = pytest.importorskip("pycocoevalcap.bleu.bleu")
    rouge = pytest.importorskip("pycocoevalcap.rouge.rouge")
    cider = pytest.importorskip("pycocoevalcap.cider.cider")
    sacrebleu = pytest.importorskip("sacrebleu.metrics")
    scores = {"chrf": sacrebleu.CHRF().corpus_score(predictions, [references]).score / 100}
    for cut in TOKENIZATIONS[language]:
        found, wanted = (
            {row: [" ".join(tokenize(text, cut))] for row, text in enumerate(texts)}
            for texts in (predictions, references)
        )
        suffix = "" if cut == TOKENIZATIONS[language][0] else f"_{cut}"
        corpus, _ = bleu.Bleu(4).compute_score(wanted, found, verbose=0)
        scores |= {f"bleu_{order}{suffix}": score for order, score in enumerate(corpus, start=1)}
        scores[f"rouge_l{suffix}"] = rouge.Rouge().compute_score(wanted, found)[0]
        scores[f"cider_d{suffix}"] = cider.Cider().compute_score(wanted, found)[0]
    return {name: score for name, score in scores.items() if name in metric_names(language)}


def without_meteor(scores):
    return {name: score for name, score in scores.items() if not name.startswith("meteor")}


def made_up_reports(count, seed, language="en"):
    generator = random.Random(seed)
    # The peers take the square of the length, and Chinese is counted in characters: ten of them a phrase.
    words, separator, longest = (WORDS, " ", 30) if language == "en" else (CHINESE, "", 12)
    return [separator.join(generator.choices(words, k=generator.randint(1, longest))) for _ in range(count)]


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("seed", range(3))
def test_scores_equal_the_public_implementations_on_made_up_reports(seed, language):
    predictions, references = made_up_reports(50, seed, language), made_up_reports(50, seed + 100, language)
    scores = score_reports(predictions, references, language)
    assert tuple(scores) == metric_names(language)
    assert without_meteor(scores) == pytest.approx(peer_scores(predictions, references, language), abs=1e-6)


def test_scores_equal_them_where_predictions_are_short_long_or_share_nothing():
    for prediction in ("lungs", "x y z", "the the the the the the the the", "the lungs are clear . " * 9):
        references = ["the lungs are clear .", "no effusion"]
        scores = score_reports([prediction] * 2, references, "en")
        assert without_meteor(scores) == pytest.approx(peer_scores([prediction] * 2, references, "en"), abs=1e-6)


@pytest.mark.realdata
@pytest.mark.parametrize("language", ["en", "zh"])
def test_scores_equal_the_public_implementations_on_real_reports(data_root, language):
    studies = load_studies(data_root / "cov_ctr")
    references = [study.reports[language] for study in studies if study.split == "validation"]
    predictions = [study.reports[language] for study in studies if study.split == "train"][: len(references)]
    scores = score_reports(predictions, references, language)
    assert without_meteor(scores) == pytest.approx(peer_scores(predictions, references, language), abs=1e-6)


def test_names_are_the_primary_ones_and_those_of_further_tokenisations():
    assert METRICS == ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "meteor", "rouge_l", "cider_d", "chrf")
    assert metric_names("en") == METRICS
    assert metric_names("zh") == (*METRICS, "bleu_4_jieba", "meteor_jieba", "rouge_l_jieba", "cider_d_jieba")


def test_a_hand_computed_example():
    # 3 of 4 words match, 1 of 3 pairs, as long as the reference; the longest common subsequence is "a b d".
    scores = score_reports(["a b x d"], ["a b c d"], "en")
    assert scores["bleu_1"] == pytest.approx(3 / 4)
    assert scores["bleu_2"] == pytest.approx((3 / 4 * 1 / 3) ** 0.5)
    assert scores["rouge_l"] == pytest.approx(3 / 4)
    # Two chunks, "a b" and "d".
    assert scores["meteor"] == pytest.approx(3 / 4 * (1 - 0.6 * (2 / 3) ** 0.2))


@pytest.mark.parametrize("language", ["en", "zh"])
def test_a_perfect_oracle_scores_one_and_cider_d_ten(language):
    texts = {
        "en": ["The lungs are clear. No effusion.", "A left pleural effusion is seen.", "There is a nodule."],
        "zh": ["双肺纹理清晰，未见异常。", "右肺上叶见磨玻璃影，边界不清。", "左侧胸腔可见少量积液影。"],
    }[language]
    scores = score_reports(texts, texts, language)
    for name, score in scores.items():
        assert score == pytest.approx(10 if "cider_d" in name else 1, abs=1e-6), name
    # With one report no n-gram is rarer than another.
    assert score_reports(texts[:1], texts[:1], language)["cider_d"] == 0


def test_chinese_is_scored_by_character_and_by_word():
    scores = score_reports(["双肺清晰"], ["双肺模糊"], "zh", ["bleu_1", "rouge_l", "rouge_l_jieba"])
    assert scores == pytest.approx({"bleu_1": 0.5, "rouge_l": 0.5, "rouge_l_jieba": 0.5})
    assert tokenize_report("双肺清晰", "zh") == list("双肺清晰")


def test_full_width_characters_are_not_their_half_width_kin():
    scores = score_reports(["CT值，清晰"], ["ＣＴ值,清晰"], "zh")
    assert scores["bleu_1"] == pytest.approx(3 / 6)
    assert 0 < scores["chrf"] < 0.5


def test_white_space_says_nothing_in_chinese_and_in_chrf():
    spaced = score_reports(["双 肺\n清晰\u3000"], ["双肺清晰，未见异常"], "zh")
    assert spaced == score_reports(["双肺清晰"], ["双肺清晰，未见异常"], "zh")
    words = ["clear  lungs\n", "clear lungs"]
    assert score_reports(words[:1], ["clear lungs ."], "en") == score_reports(words[1:], ["clear lungs ."], "en")


@pytest.mark.parametrize("language", ["en", "zh"])
def test_empty_texts_score_zero(language):
    text = "清晰 clear."
    for prediction, reference in (("", text), (text, ""), ("", ""), (" \n", text)):
        scores = score_reports([prediction], [reference], language)
        assert scores == pytest.approx(dict.fromkeys(metric_names(language), 0.0), abs=1e-5), (prediction, reference)
    half = score_reports(["", text], [text, text], language)
    assert half["rouge_l"] == pytest.approx(0.5)
    assert all(np.isfinite(score) for score in half.values())


@pytest.mark.parametrize("language", ["en", "zh"])
def test_resampling_equals_scoring_the_drawn_studies(language):
    predictions, references = made_up_reports(12, 0, language), made_up_reports(12, 1, language)
    predictions[:3] = references[:3]
    weights = np.ones((3, 12))
    weights[1, 4] = 2
    weights[2] = 0
    weights[2, [1, 7]] = 3, 1
    measurements = TextScorer(references, language).measure(predictions)
    drawn = resampled_scores(measurements, weights)
    for row, places in enumerate((list(range(12)), [*range(12), 4], [1, 1, 1, 7])):
        again = score_reports([predictions[i] for i in places], [references[i] for i in places], language)
        for name in metric_names(language):
            # The rarity of n-grams is that of all references, whatever is drawn.
            if row == 0 or not name.startswith("cider_d"):
                assert drawn[name][row] == pytest.approx(again[name], abs=1e-9), name
    assert all((values >= 0).all() and (values <= 10).all() for values in drawn.values())


def test_a_scorer_scores_many_systems_as_if_each_were_alone():
    references = made_up_reports(20, 0, "zh")
    scorer = TextScorer(references, "zh")
    systems = [made_up_reports(20, seed, "zh") for seed in (1, 2)] + [["新词 xyz"] * 20, references]
    for predictions in [*systems, systems[0]]:
        assert point_scores(scorer.measure(predictions), 20) == score_reports(predictions, references, "zh")


def test_only_the_wanted_scores_are_computed(monkeypatch):
    predictions, references = made_up_reports(9, 0, "zh"), made_up_reports(9, 1, "zh")
    every = score_reports(predictions, references, "zh")
    for name in metric_names("zh"):
        assert score_reports(predictions, references, "zh", [name]) == pytest.approx({name: every[name]})

    def refuse(*args):
        raise AssertionError("needs an optional package")

    monkeypatch.setattr("m3fm.evaluation.tokens._jieba_tokenizer", refuse)
    monkeypatch.setattr("m3fm.evaluation.meteor._english_stemmer", refuse)
    names = ["rouge_l", "bleu_4", "cider_d", "chrf"]
    assert set(score_reports(predictions, references, "zh", names)) == set(names)
    assert set(score_reports(["a"], ["a"], "en", names)) == set(names)


def test_optional_scorers_come_last_and_java_only_for_english():
    class Fake:
        language = "en"

        def measure(self, predictions, references):
            return SumMeasurement(np.ones((len(references), 1)), lambda sums: {"fake": sums[:, 0]})

    for language, names in (("en", ["fake", "fake"]), ("zh", ["fake"])):
        scorer = TextScorer(["a"], language, java_meteor=Fake(), bertscore=Fake(), metrics=["chrf"])
        measured = [name for each in scorer.measure(["b"]) for name in each.score(np.ones((1, 1)))]
        assert measured == ["chrf", *names]


def test_a_bar_shows_only_where_there_is_much_to_do(monkeypatch, capsys):
    texts = made_up_reports(30, 0)
    score_reports(texts, texts[::-1], "en")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(text_metrics, "PROGRESS_FROM", 20)
    score_reports(texts, texts[::-1], "en")
    shown = capsys.readouterr().err
    assert "text metrics" in shown
    assert "/120" in shown  # four steps of 30 reports


def test_a_thousand_pairs_take_seconds():
    predictions, references = made_up_reports(1000, 0), made_up_reports(1000, 1)
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


def test_wrong_input_of_a_scorer_is_refused():
    with pytest.raises(ValueError, match="at least one reference"):
        TextScorer([], "en")
    with pytest.raises(ValueError, match=r"Unknown metrics \['bleu_5'\]"):
        TextScorer(["a"], "en", metrics=["bleu_5"])
    with pytest.raises(ValueError, match=r"Unknown metrics \['meteor_jieba'\]"):
        TextScorer(["a"], "en", metrics=["meteor_jieba"])
    with pytest.raises(ValueError, match="got 2 predictions and 1 references"):
        TextScorer(["a"], "en").measure(["a", "b"])
    with pytest.raises(ValueError, match="predictions to be a list"):
        TextScorer(["a"], "en").measure("a")


def test_distinct_ratio_counts_different_reports():
    assert distinct_ratio(["a", "a ", "b", "c"]) == 0.75
    with pytest.raises(ValueError, match="at least one"):
        distinct_ratio([])
