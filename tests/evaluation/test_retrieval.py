# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
import numpy as np
import pytest

from m3fm.evaluation.retrieval import chance_recall, retrieval_recall, same_text


def test_a_perfect_space_finds_everything():
    found = retrieval_recall(np.eye(5), np.eye(5) * 3, ks=(1, 3))
    for way in ("forward", "backward"):
        assert found[way]["recall@1"] == found[way]["recall@3"] == 1
        assert found[way]["median_rank"] == 1
        assert found[way]["chance@1"] == pytest.approx(0.2)
        assert found[way]["chance@3"] == pytest.approx(0.6)
        assert (found[way]["num_queries"], found[way]["num_items"]) == (5, 5)


def test_the_two_ways_differ():
    # Both queries point at item 0; item 1 is nearer to query 1 than to query 0.
    found = retrieval_recall(np.array([[1.0, 0], [1, 0.1]]), np.array([[1.0, -0.05], [0, 1]]), ks=(1, 2))
    assert found["forward"]["recall@1"] == 0.5
    assert found["forward"]["median_rank"] == 1.5
    assert found["forward"]["recall@2"] == 1
    assert found["backward"]["recall@1"] == 1


def test_a_collapsed_space_finds_nothing():
    noise = np.random.default_rng(0).normal(scale=1e-8, size=(2, 20, 4))
    found = retrieval_recall(np.ones((20, 4)) + noise[0], np.ones((20, 4)) + noise[1], ks=(1, 10))
    assert found["forward"]["recall@10"] == 0
    assert found["forward"]["median_rank"] == 20


def test_an_item_with_the_same_text_is_a_hit_and_chance_knows():
    texts = ["normal", "effusion", "normal "]
    positives = same_text(texts)
    assert positives.tolist() == [[True, False, True], [False, True, False], [True, False, True]]
    gallery = np.eye(3)
    queries = gallery[[2, 1, 0]]  # the normal ones are exchanged: the same text all the same
    found = retrieval_recall(queries, gallery, ks=(1,), positives=positives)
    assert found["forward"]["recall@1"] == 1
    assert found["forward"]["chance@1"] == pytest.approx((2 / 3 + 1 / 3 + 2 / 3) / 3)
    assert retrieval_recall(queries, gallery, ks=(1,))["forward"]["recall@1"] == pytest.approx(1 / 3)


def test_same_text_joins_over_columns():
    assert same_text(["a", "b", "c"], ["x", "y", "x"])[0].tolist() == [True, False, True]


def test_distractors_are_in_the_gallery_but_not_asked():
    positives = np.array([[True, False, False], [False, True, False]])
    found = retrieval_recall(np.eye(3)[:2], np.eye(3), ks=(1,), positives=positives)
    assert found["forward"]["num_items"] == 3
    assert found["backward"]["num_queries"] == 2


def test_chance_equals_simulation():
    generator = np.random.default_rng(0)
    draws = np.array([generator.permutation(12)[:4].min() < 3 for _ in range(20_000)])
    assert chance_recall(12, 3, 4) == pytest.approx(draws.mean(), abs=0.01)
    assert chance_recall(3, 1, 10) == 1


def test_random_features_score_at_chance():
    generator = np.random.default_rng(1)
    found = retrieval_recall(generator.normal(size=(500, 16)), generator.normal(size=(500, 16)), ks=(50,))
    assert found["forward"]["recall@50"] == pytest.approx(found["forward"]["chance@50"], abs=0.04)


@pytest.mark.parametrize(
    ("queries", "gallery", "options", "message"),
    [
        (np.eye(2), np.eye(3)[:, :2], {}, "as many queries as gallery items"),
        (np.eye(2), np.eye(3), {}, "gallery of shape"),
        (np.eye(2), np.eye(2), {"ks": (0,)}, "whole numbers >= 1"),
        (np.eye(2), np.eye(2), {"positives": np.eye(3)}, "positives of shape"),
        (np.eye(2), np.eye(2), {"positives": np.array([[1, 0], [0, 0]])}, "1 have none"),
        (np.full((2, 2), np.inf), np.eye(2), {}, "finite queries"),
    ],
)
def test_wrong_input_is_refused(queries, gallery, options, message):
    with pytest.raises(ValueError, match=message):
        retrieval_recall(queries, gallery, **options)


def test_columns_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match="one length"):
        same_text(["a"], ["a", "b"])
