# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
import random
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from m3fm.evaluation import meteor
from m3fm.evaluation.meteor import (
    JavaMeteor,
    combine_meteor,
    english_stem,
    meteor_measurement,
    meteor_statistics,
)
from m3fm.evaluation.tokens import tokenize

STEMS = ("run", "runs", "running", "lung", "lungs", "clear", "clears", "clearly", "the", "effusion", "effusions")
# What the search does depends on ties and on how many partial alignments there are: words that come again and again.
LETTERS = "abcdefgh"


def made_up(count, seed, words, longest=50):
    generator = random.Random(seed)
    return [
        generator.choices(words[: generator.randint(1, len(words))], k=generator.randint(1, longest))
        for _ in range(count)
    ]


def run_jar(tmp_path, predictions, references, options):
    """Returns the jar's score of each report, and of all, on tokens."""
    spec = find_spec("pycocoevalcap")
    if spec is None or shutil.which("java") is None:
        pytest.skip("needs java and pycocoevalcap")
    jar = next(Path(spec.submodule_search_locations[0]).glob("meteor/meteor-*.jar"))
    files = []
    for name, texts in (("found", predictions), ("true", references)):
        files.append(tmp_path / name)
        files[-1].write_text("".join(" ".join(tokens) + "\n" for tokens in texts), encoding="utf-8")
    command = ["java", "-Xmx1G", "-jar", str(jar), *map(str, files), "-p", "0.85 0.2 0.6 0.5", "-lower", *options]
    lines = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout.splitlines()
    each = [float(line.split("\t")[1]) for line in lines if line.startswith("Segment")]
    return np.array(each), float(next(line for line in lines if line.startswith("Final")).split()[-1])


@pytest.mark.parametrize(
    ("predictions", "references", "stem", "options"),
    [
        (
            made_up(150, 0, LETTERS) + made_up(150, 1, STEMS) + [["a"] * 70, ["a", "b"] * 30, ["A", "b"]],
            made_up(150, 2, LETTERS) + made_up(150, 3, STEMS) + [["a"] * 60, ["b", "a"] * 30, ["a", "B"]],
            english_stem,
            ["-l", "en", "-m", "exact stem", "-w", "1.0 0.6"],
        ),
        (
            made_up(150, 4, "双肺纹理清晰未见异常，。") + [list("双肺清晰，未见CT异常。"), list("。")],
            made_up(150, 5, "双肺纹理清晰未见异常，。") + [list("双肺未见异常，ct清晰。"), list("。")],
            None,
            ["-l", "other", "-m", "exact", "-w", "1.0"],
        ),
    ],
    ids=["en", "zh"],
)
def test_scores_equal_the_java_release(tmp_path, predictions, references, stem, options):
    pytest.importorskip("nltk")
    each, corpus = run_jar(tmp_path, predictions, references, options)
    statistics = meteor_statistics(predictions, references, stem)
    np.testing.assert_allclose(combine_meteor(statistics), each, atol=1e-9)
    assert combine_meteor(statistics.sum(axis=0, keepdims=True))[0] == pytest.approx(corpus, abs=1e-9)


def test_a_hand_computed_example():
    pytest.importorskip("nltk")
    prediction, reference = "no pleural effusions are seen", "there is no pleural effusion seen ."
    statistics = meteor_statistics([prediction.split()], [reference.split()], english_stem)
    assert statistics.tolist() == [[3, 1, 2, 5, 7]]  # "no pleural effusion(s)" and "seen"
    precision, recall = 3.6 / 5, 3.6 / 7
    expected = precision * recall / (0.85 * precision + 0.15 * recall) * (1 - 0.6 * (2 / 4) ** 0.2)
    assert combine_meteor(statistics)[0] == pytest.approx(expected)
    assert meteor_statistics([prediction.split()], [reference.split()]).tolist() == [[3, 0, 2, 5, 7]]


def test_more_equal_words_come_before_fewer_chunks():
    # "b" "c" as one chunk would leave the second "a" without a partner only if the first were taken.
    statistics = meteor_statistics([list("abca")], [list("aabc")])
    assert statistics.tolist() == [[4, 0, 2, 4, 4]]


def test_identical_reports_score_one_and_empty_ones_nothing():
    texts = [["a"], ["a", "a", "b"] * 20, list("双肺清晰"), []]
    statistics = meteor_statistics(texts, texts)
    assert combine_meteor(statistics).tolist() == [1, 1, 1, 0]
    assert combine_meteor(statistics.sum(axis=0, keepdims=True)).tolist() == [1]
    assert combine_meteor(meteor_statistics([[], ["a"]], [["a"], []])).tolist() == [0, 0]


def test_stems_make_a_report_whole():
    pytest.importorskip("nltk")
    statistics = meteor_statistics([["lungs", "clear"]], [["lung", "clear"]], english_stem)
    assert statistics.tolist() == [[1, 1, 0, 2, 2]]
    assert combine_meteor(statistics)[0] == pytest.approx(0.8)


def test_no_score_depends_on_the_other_pairs(monkeypatch):
    predictions, references = made_up(80, 6, LETTERS), made_up(80, 7, LETTERS)
    together = meteor_statistics(predictions, references)
    order = random.Random(0).sample(range(80), 80)
    shuffled = meteor_statistics([predictions[i] for i in order], [references[i] for i in order])
    assert (shuffled == together[order]).all()
    # One pair at a time, and sorted by several keys instead of one packed integer.
    monkeypatch.setattr(meteor, "_MAX_PAIRS", 1)
    monkeypatch.setattr(meteor, "_PACKED_BITS", 0)
    assert (meteor_statistics(predictions, references) == together).all()


def test_progress_counts_every_report_once():
    done = []
    texts = made_up(300, 8, LETTERS, longest=9)
    meteor_statistics(texts, made_up(300, 9, LETTERS, longest=9), progress=done.append)
    assert sum(done) == 300
    assert len(done) > 1


def test_a_very_long_report_is_aligned():
    text = random.Random(0).choices([f"w{i}" for i in range(900)], k=3000)
    assert combine_meteor(meteor_statistics([text[1500:] + text[:1500]], [text]))[0] > 0.7


def test_a_measurement_weighs_reports():
    measurement = meteor_measurement(meteor_statistics([["a"], ["b", "x"]], [["a"], ["b", "y"]]), "meteor_x")
    scores = measurement.score(np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]))
    assert scores["meteor_x"] == pytest.approx([1, 0.5 * 0.4, 0])


@pytest.mark.parametrize(
    ("word", "stem"), [("effusions", "effus"), ("opacities", "opac"), ("lungs", "lung"), ("1.5", "1.5")]
)
def test_stems_are_snowball_s(word, stem):
    pytest.importorskip("nltk")
    assert english_stem(word) == stem


def test_a_missing_nltk_is_named(monkeypatch):
    meteor._english_stemmer.cache_clear()
    monkeypatch.setitem(sys.modules, "nltk.stem.snowball", None)
    with pytest.raises(ImportError, match=r'nltk: pip install "m3fm\[evaluate\]"'):
        english_stem("neverstemmedbefore")


@pytest.fixture
def java_meteor(tmp_path, monkeypatch):
    """Returns a JavaMeteor that runs a given Python script in place of the jar."""
    monkeypatch.setattr(meteor.shutil, "which", lambda name: f"/usr/bin/{name}")
    (tmp_path / "meteor").mkdir()
    (tmp_path / "meteor" / "meteor-1.5.jar").touch()
    spec = type("Spec", (), {"submodule_search_locations": [str(tmp_path)]})
    monkeypatch.setattr(meteor, "find_spec", lambda name: spec)

    def build(script, timeout=30.0):
        scorer = JavaMeteor(timeout)
        scorer._command = [sys.executable, "-c", script]
        return scorer

    return build


WHOLE = "5 5 3 3 2 2 3 3 0 0 0 0 0 0 0 0 0 0 0 0 1 5 5"
PART = "5 7 2 4 2 2 1 1 1 1 0 0 0 0 0 0 0 0 0 0 2 4 4"


def test_the_java_release_s_counts_become_a_score(java_meteor):
    script = f"import sys; [print({WHOLE!r} if line.startswith('the') else {PART!r}) for line in open(sys.argv[1])]"
    measurement = java_meteor(script).measure(
        ["the lungs\nare clear .", "no", "the lungs are clear ."], ["x", "y", "x"]
    )
    whole, part = measurement.score(np.eye(3)[:2])["meteor_java"]
    assert whole == 1
    matches = 0.75 * 2 + 0.25 * 1 + 0.6 * 0.75 * 1
    precision, recall = matches / (0.75 * 3 + 0.25 * 2), matches / (0.75 * 3 + 0.25 * 4)
    expected = precision * recall / (0.85 * precision + 0.15 * recall) * (1 - 0.6 * (2 / 4) ** 0.2)
    assert part == pytest.approx(expected)


@pytest.mark.parametrize(
    ("script", "timeout", "message"),
    [
        (
            "import sys; sys.exit('Error: out of memory')",
            30,
            "exit status 1, 0 results for 1 reports, Error: out of mem",
        ),
        ("print('1 2 3'); print('1 2 3')", 30, "exit status 0, 2 results for 1 reports, it said nothing"),
        ("import time; time.sleep(60)", 0.5, "took longer than 0.5 s"),
    ],
    ids=["crash", "wrong", "hang"],
)
def test_a_failing_java_release_is_an_error(java_meteor, script, timeout, message):
    with pytest.raises(ValueError, match=message):
        java_meteor(script, timeout).measure(["clear"], ["clear"])


def test_missing_java_or_jar_is_named(monkeypatch):
    monkeypatch.setattr(meteor.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="java"):
        JavaMeteor()
    monkeypatch.setattr(meteor.shutil, "which", lambda name: "/usr/bin/java")
    monkeypatch.setattr(meteor, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install pycocoevalcap"):
        JavaMeteor()


@pytest.mark.realdata
def test_the_whole_java_release_equals_pycocoevalcap(data_root):
    peer = pytest.importorskip("pycocoevalcap.meteor.meteor").Meteor()
    from m3fm.data import load_studies

    texts = [study.reports["en"] for study in load_studies(data_root / "cov_ctr") if "en" in study.reports][:40]
    predictions, references = texts[:20], texts[20:]
    corpus, each = peer.compute_score(
        {row: [text] for row, text in enumerate(references)}, {row: [text] for row, text in enumerate(predictions)}
    )
    measurement = JavaMeteor().measure(predictions, references)
    assert measurement.score(np.ones((1, 20)))["meteor_java"][0] == pytest.approx(corpus, abs=1e-9)
    np.testing.assert_allclose(measurement.score(np.eye(20))["meteor_java"], each, atol=1e-9)


def test_words_are_matched_by_themselves_and_not_by_a_hash():
    # The jar takes these two for the same word: Java's 32-bit hash of both is equal.
    first, second = tokenize("放置明显", "jieba") if find_spec("jieba") else ("放置", "明显")
    assert (ord(first[0]) - ord(second[0])) * 31 == ord(second[1]) - ord(first[1])
    assert meteor_statistics([[first]], [[second]])[0, 0] == 0
