# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Corpora turned into pairs: each text once, kept, checked."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from m3fm.data.parallel import ParallelText, TranslationCache, TranslationError, translate_corpus, translate_texts
from m3fm.data.parallel.translate import join_sentences, split_sentences
from m3fm.data.schema import ReportText, StudyRecord

CHINESE = {
    "The lungs are clear.": "双肺清晰。",
    "No pleural effusion.": "无胸腔积液",
    "Small left pleural effusion.": "左侧少量胸腔积液。",
    "Mild cardiomegaly.": "重度心脏增大。",
}


class Recorder:
    """Translates by a dictionary and remembers what it was asked."""

    name = "dictionary"

    def __init__(self, fail_at: int | None = None):
        self.batches: list[list[str]] = []
        self.fail_at = fail_at

    def __call__(self, texts: Sequence[str]) -> list[str]:
        if self.fail_at == len(self.batches):
            raise OSError("the translator went away")
        self.batches.append(list(texts))
        return [CHINESE.get(text, f"结节{len(text)}") for text in texts]

    @property
    def asked(self) -> list[str]:
        return [text for batch in self.batches for text in batch]


def test_equal_texts_are_translated_once_and_come_back_in_order() -> None:
    translator = Recorder()

    made = translate_texts(["No pleural effusion.", "Mild cardiomegaly.", "No pleural effusion."], translator)

    assert made == ["无胸腔积液", "重度心脏增大。", "无胸腔积液"]
    assert sorted(translator.asked) == ["Mild cardiomegaly.", "No pleural effusion."]


def test_batches_have_texts_of_similar_length() -> None:
    translator = Recorder()
    texts = ["a" * length for length in (5, 40, 6, 41, 7, 42)]

    translate_texts(texts, translator, batch_size=3)

    assert [[len(text) for text in batch] for batch in translator.batches] == [[42, 41, 40], [7, 6, 5]]


def test_a_failed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    texts = [f"Nodule {'i' * length}." for length in range(10)]
    with TranslationCache(tmp_path / "cache") as cache, pytest.raises(TranslationError) as caught:
        translate_texts(texts, Recorder(fail_at=3), cache=cache, batch_size=2)
    assert str(caught.value) == (
        f"the translator dictionary failed after 6 of 10 texts (they are kept in {tmp_path / 'cache'}), "
        "at a batch of 2: OSError"
    )
    assert isinstance(caught.value.__cause__, OSError)

    again = Recorder()
    with TranslationCache(tmp_path / "cache") as cache:
        made = translate_texts(texts, again, cache=cache, batch_size=2)

    assert len(again.asked) == 4
    assert len(made) == 10
    assert set(again.asked) == set(texts[:4])


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (["一"], "expected 2 texts, got 1"),
        ("一二", "expected a list of texts, got str"),
        (None, "expected a list of texts, got NoneType"),
        (["一", 2], "expected texts, got int"),
    ],
)
def test_a_translator_that_returns_something_else(result: object, message: str) -> None:
    cache = TranslationCache()

    with pytest.raises(TranslationError, match=message):
        translate_texts(["Mass.", "Nodule."], lambda texts: result, cache=cache, name="bad")  # type: ignore[arg-type, return-value]

    assert len(cache) == 0


def test_an_empty_translation_is_not_kept() -> None:
    cache = TranslationCache()

    assert translate_texts(["Mass.", "Nodule."], lambda texts: ["肿块", " "][: len(texts)], cache=cache, name="x") == [
        "",
        "肿块",
    ]
    assert len(cache) == 1


def test_a_batch_has_at_least_one_text() -> None:
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        translate_texts(["a"], Recorder(), batch_size=0)


def test_sentences_by_the_rules_of_their_language() -> None:
    english = "Seen by Dr. Wu. A 1.2 cm nodule. No mass; heart is normal. T8 vs. T9."
    chinese = "右肺见1.2 cm结节。心影正常；余未见异常"

    assert split_sentences(english, "en") == [
        "Seen by Dr. Wu.",
        "A 1.2 cm nodule.",
        "No mass; heart is normal.",
        "T8 vs. T9.",
    ]
    assert split_sentences(chinese, "zh") == ["右肺见1.2 cm结节。", "心影正常；", "余未见异常"]
    assert join_sentences(["双肺清晰。", "无积液"], "zh") == "双肺清晰。无积液。"
    assert join_sentences(["Clear lungs.", "No mass"], "en") == "Clear lungs. No mass."


def record(name: str, text: str) -> StudyRecord:
    return StudyRecord(name, "own", "cxr", split="train", reports={"en": ReportText(text)}, licence="CC0")


def test_sentence_by_sentence() -> None:
    translator = Recorder()
    corpus = [
        record("a", "The lungs are clear. No pleural effusion."),
        record("b", "The lungs are clear. Small left pleural effusion."),
    ]
    run = translate_corpus(corpus, translator)

    first, second = run

    assert first == ParallelText(
        {"en": "The lungs are clear. No pleural effusion.", "zh": "双肺清晰。无胸腔积液。"},
        "a",
        "own",
        "train",
        "machine:dictionary",
        "CC0",
    )
    assert second.texts["zh"] == "双肺清晰。左侧少量胸腔积液。"
    assert sorted(translator.asked) == sorted(list(CHINESE)[:3])
    counts = run.report.as_dict()
    assert {name: counts[name] for name in ("texts", "units", "distinct", "from_cache", "translated")} == {
        "texts": 2,
        "units": 4,
        "distinct": 3,
        "from_cache": 0,
        "translated": 3,
    }
    assert (counts["accepted"], counts["rejected"]) == (2, 0)


def test_what_does_not_pass_is_told() -> None:
    rejected = []
    corpus = [record("a", "Mild cardiomegaly."), record("b", "The lungs are clear.")]
    run = translate_corpus(corpus, Recorder(), on_rejected=lambda pair, found: rejected.append((pair, found)))

    accepted = list(run)

    assert [pair.study_id for pair in accepted] == ["b"]
    ((pair, differences),) = rejected
    assert (pair.study_id, {each.kind for each in differences}) == ("a", {"severity"})
    assert run.report.as_dict()["rejected_by_kind"] == {"severity": 1}


def test_report_by_report() -> None:
    translator = Recorder()
    text = "The lungs are clear. No pleural effusion."

    list(translate_corpus([record("a", text)], translator, unit="report"))

    assert translator.asked == [text]


def test_the_second_run_asks_nothing(tmp_path: Path) -> None:
    corpus = [record("a", "The lungs are clear. No pleural effusion.")]
    with TranslationCache(tmp_path / "cache") as cache:
        first = list(translate_corpus(corpus, Recorder(), cache=cache))
    again = Recorder()
    with TranslationCache(tmp_path / "cache") as cache:
        run = translate_corpus(corpus, again, cache=cache)
        second = list(run)

    assert first == second
    assert again.batches == []
    assert run.report.from_cache == 2


def test_a_report_with_an_empty_sentence_is_rejected() -> None:
    def forgetful(texts: Sequence[str]) -> list[str]:
        return ["" if "effusion" in text else "双肺清晰。" for text in texts]

    run = translate_corpus([record("a", "The lungs are clear. No pleural effusion.")], forgetful)

    assert list(run) == []
    assert run.report.as_dict()["rejected_by_kind"] == {"empty": 1}


def test_the_other_direction_and_a_translation_that_is_there() -> None:
    def english(texts: Sequence[str]) -> list[str]:
        return ["The lungs are clear."] * len(texts)

    there = ParallelText({"en": "Something else.", "zh": "双肺清晰。"}, "a")
    only_english = ParallelText({"en": "Mass."}, "b")

    (pair,) = translate_corpus([there, only_english], english, target="en")

    assert pair.texts == {"en": "The lungs are clear.", "zh": "双肺清晰。"}
    assert list(pair.texts) == ["en", "zh"]


def test_a_corpus_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("m3fm.data.parallel.translate._WINDOW", 2)
    taken = []

    def corpus():
        for number in range(6):
            taken.append(number)
            yield record(str(number), "The lungs are clear.")

    run = iter(translate_corpus(corpus(), Recorder()))
    next(run)

    assert taken == [0, 1]


def test_unknown_options() -> None:
    with pytest.raises(ValueError, match="target must be one of en, zh, got 'de'"):
        translate_corpus([], Recorder(), target="de")
    with pytest.raises(ValueError, match="unit must be one of report, sentence, got 'word'"):
        translate_corpus([], Recorder(), unit="word")
