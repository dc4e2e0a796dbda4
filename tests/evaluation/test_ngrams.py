# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
import random

import numpy as np
import pytest

from m3fm.evaluation.ngrams import (
    BLEU_NAMES,
    CHRF_ORDER,
    NgramIndex,
    bleu_statistics,
    chrf_statistics,
    combine_bleu,
    combine_chrf,
    count_tokens,
    rouge_l,
)

WORDS = tuple(f"finding{i}" for i in range(12))
# One index serves several orders, and counts are the same whatever the texts are.
ODD = [[], ["a"], ["a"] * 9, ["b", "a", "b"], ["x", "y", "z", "w", "v"], ["a", "b", "c", "d"]]


def made_up(count, seed, words=WORDS, longest=40):
    generator = random.Random(seed)
    return [generator.choices(words, k=generator.randint(0, longest)) for _ in range(count)]


def bleu(hypotheses, references):
    index = NgramIndex(references, 4)
    lengths = count_tokens(hypotheses)
    return bleu_statistics(index.matches(index.count(hypotheses)), lengths, index.lengths)


def chrf(hypotheses, references):
    index = NgramIndex(references, CHRF_ORDER)
    lengths = count_tokens(hypotheses)
    return chrf_statistics(index.matches(index.count(hypotheses)), lengths, index.lengths)


def cider_d(hypotheses, references):
    index = NgramIndex(references, 4)
    return index.cider_d(index.count(hypotheses), count_tokens(hypotheses))


def as_coco(texts):
    return {row: [" ".join(tokens)] for row, tokens in enumerate(texts)}


@pytest.fixture(params=[0, 1, 2], ids=lambda seed: f"seed{seed}")
def pairs(request):
    hypotheses, references = made_up(60, request.param), made_up(60, request.param + 100)
    references[:5] = hypotheses[:5]  # some are right
    return hypotheses + ODD, references + ODD[::-1]


def test_bleu_equals_pycocoevalcap_for_the_corpus_and_for_each_report(pairs):
    peer = pytest.importorskip("pycocoevalcap.bleu.bleu").Bleu(4)
    hypotheses, references = pairs
    statistics = bleu(hypotheses, references)
    corpus, each = peer.compute_score(as_coco(references), as_coco(hypotheses), verbose=0)
    ours = combine_bleu(statistics.sum(axis=0, keepdims=True))
    assert [ours[name][0] for name in BLEU_NAMES] == pytest.approx(corpus, abs=1e-9)
    singles = combine_bleu(statistics)
    for name, expected in zip(BLEU_NAMES, each, strict=True):
        np.testing.assert_allclose(singles[name], expected, atol=1e-9)


def test_cider_d_equals_pycocoevalcap_for_each_report(pairs):
    peer = pytest.importorskip("pycocoevalcap.cider.cider").Cider()
    hypotheses, references = pairs
    mean, each = peer.compute_score(as_coco(references), as_coco(hypotheses))
    np.testing.assert_allclose(cider_d(hypotheses, references), each, atol=1e-9)
    assert cider_d(hypotheses, references).mean() == pytest.approx(mean)


def test_chrf_equals_sacrebleu_for_the_corpus_and_for_each_report(pairs):
    peer = pytest.importorskip("sacrebleu.metrics").CHRF()
    hypotheses, references = ([" ".join(tokens) for tokens in texts] for texts in pairs)
    hypotheses += ["双肺纹理清晰，未见CT异常。", "Ｃ Ｔ　值", "ab"]
    references += ["双肺纹理增多，未见异常。", "CT值", "abcdefgh"]
    statistics = chrf(*(["".join(text.split()) for text in texts] for texts in (hypotheses, references)))
    ours = combine_chrf(statistics.sum(axis=0, keepdims=True))["chrf"][0]
    assert ours == pytest.approx(peer.corpus_score(hypotheses, [references]).score / 100, abs=1e-9)
    expected = [
        peer.sentence_score(*pair).score / 100 for pair in zip(hypotheses, [[r] for r in references], strict=True)
    ]
    np.testing.assert_allclose(combine_chrf(statistics)["chrf"], expected, atol=1e-9)


def test_rouge_equals_pycocoevalcap(pairs):
    peer = pytest.importorskip("pycocoevalcap.rouge.rouge").Rouge()
    for hypothesis, reference in zip(*pairs, strict=True):
        expected = peer.calc_score([" ".join(hypothesis)], [" ".join(reference)]) if hypothesis and reference else 0
        assert rouge_l(hypothesis, reference) == pytest.approx(expected)


def test_an_index_counts_what_no_reference_has_and_forgets_it_again():
    index = NgramIndex([["a", "b", "a", "b"], ["c"]], 2)
    assert [counts.counts.tolist() for counts in index.counts] == [[2, 2, 1], [2, 1]]
    for _ in range(2):
        ones, twos = index.count([["b", "x", "a", "b", "x"], ["c", "c"]])
        assert sorted(zip(ones.reports.tolist(), ones.counts.tolist(), strict=True)) == [
            (0, 1),
            (0, 2),
            (0, 2),
            (1, 2),
        ]
        assert sorted(zip(twos.reports.tolist(), twos.counts.tolist(), strict=True)) == [
            (0, 1),
            (0, 1),
            (0, 2),
            (1, 1),
        ]
        assert index.matches([ones, twos]).tolist() == [[3, 1], [1, 0]]


def test_cider_d_sees_no_worth_in_what_all_references_share():
    shared = [["the", "lungs", "are", "clear"]] * 2
    assert cider_d(shared, shared).tolist() == [0, 0]
    assert cider_d([["a", "b", "c", "d"]], [["a", "b", "c", "d"]]).tolist() == [0]
    # Two tokens have n-grams of two orders out of four.
    assert cider_d([["a", "b"], ["c"] * 4], [["a", "b"], ["c"] * 4]) == pytest.approx([5, 10])


def test_bleu_of_the_corpus_is_not_the_mean_of_sentences():
    sums = bleu([["a"], ["b", "c", "d", "e"]], [["a"], ["b", "x", "x", "x"]]).sum(axis=0, keepdims=True)
    assert combine_bleu(sums)["bleu_1"][0] == pytest.approx(2 / 5)


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
