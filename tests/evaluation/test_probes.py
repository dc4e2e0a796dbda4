# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
import numpy as np
import pytest

from m3fm.evaluation.probes import (
    CANDIDATE_STRENGTHS,
    DEFAULT_STRENGTH,
    NUM_FOLDS,
    Ensemble,
    LabelPrior,
    ProbeHeads,
    ZeroShot,
    choose_strength,
    draw_shots,
    fit_heads,
    fit_probe,
    grouped_folds,
    learning_problem,
    probability,
)

NAN = float("nan")


def made_up(count=120, width=5, seed=0):
    """Features of which the first tells the label, on an odd scale, and one that never changes."""
    generator = np.random.default_rng(seed)
    labels = (generator.random(count) < 0.4).astype(float)
    features = generator.normal(size=(count, width)) * 100 + 1000
    features[:, 0] += 150 * labels
    features[:, -1] = 7.0
    return features.astype(np.float32), labels


def test_a_probe_is_scikit_learns_logistic_regression():
    linear = pytest.importorskip("sklearn.linear_model")
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    features, labels = made_up()
    probe = fit_probe(features, labels, strength=0.1)
    expected = make_pipeline(StandardScaler(), linear.LogisticRegression(C=0.1)).fit(features.astype(float), labels)
    np.testing.assert_allclose(probe.predict(features), expected.predict_proba(features)[:, 1], atol=1e-4)


def test_unknown_labels_teach_nothing():
    features, labels = made_up()
    known = labels.copy()
    known[::3] = NAN
    kept = ~np.isnan(known)
    first, second = fit_probe(features, known), fit_probe(features[kept], labels[kept])
    np.testing.assert_array_equal(first.weight, second.weight)
    with pytest.raises(ValueError, match="one class only"):
        fit_probe(features, np.where(labels == 1, 1, NAN))


def test_rounding_of_features_does_not_rank_equal_images():
    logits = np.array([0.3, 0.3 + 1e-6, -40.0, 40.0, 800.0])
    values = probability(logits)
    assert values[0] == values[1] == pytest.approx(1 / (1 + np.exp(-0.3)))
    assert values[2] >= 0
    assert values[4] == 1


def test_zero_shot_weighs_presence_against_absence():
    eye = np.eye(3)
    system = ZeroShot(["a", "b"], present=eye[:2], absent=eye[[2, 2]], scale=10.0, exclusive=False)
    found = system.predict({"shared": np.array([[1.0, 0, 0], [0.6, 0, 0.8]], dtype=np.float32)})
    assert list(found) == ["a", "b"]
    assert found["a"] == pytest.approx(1 / (1 + np.exp([-10, 2])), abs=1e-5)
    assert found["b"] == pytest.approx(1 / (1 + np.exp([0, 8])), abs=1e-5)


def test_exclusive_labels_share_one():
    eye = np.eye(3)
    system = ZeroShot(["a", "b", "c"], present=eye, absent=-eye, scale=5.0, exclusive=True)
    images = np.array([[0.6, 0.8, 0], [0, 0, 1]])
    found = np.stack(list(system.predict({"shared": images}).values()), axis=1)
    expected = np.exp(5 * images) / np.exp(5 * images).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_prior_and_ensemble():
    features = {"shared": np.zeros((3, 2))}
    prior = LabelPrior({"a": 0.2})
    assert prior.predict(features)["a"].tolist() == [0.2] * 3
    assert Ensemble([prior, LabelPrior({"a": 0.4})]).predict(features)["a"] == pytest.approx([0.3] * 3)


def test_folds_keep_patients_together_and_spread_the_finding():
    generator = np.random.default_rng(0)
    groups = generator.integers(40, size=150)
    labels = np.where(groups < 6, 1.0, 0.0)
    folds = grouped_folds(labels, groups, seed=3)
    assert set(folds.tolist()) == set(range(NUM_FOLDS))
    assert all(len(set(folds[groups == group])) == 1 for group in groups)
    assert all((labels[folds == fold] == 1).any() for fold in range(NUM_FOLDS))
    np.testing.assert_array_equal(folds, grouped_folds(labels, groups, seed=3))
    assert (folds != grouped_folds(labels, groups, seed=4)).any()


def test_strength_is_chosen_where_there_is_enough():
    features, labels = made_up(300, width=40)
    assert choose_strength(features, labels, range(300)) in CANDIDATE_STRENGTHS
    # Labels that have nothing to do with the features ask for the strongest penalty.
    shuffled = np.random.default_rng(1).permutation(labels)
    assert choose_strength(features, shuffled, range(300)) == CANDIDATE_STRENGTHS[0]
    # Both classes stand in one patient: none can be held out.
    assert choose_strength(features[:4], np.array([0.0, 1, 0, 1]), [0] * 4) == DEFAULT_STRENGTH


def test_shots_are_of_both_classes_and_other_patients():
    labels = np.array([1, 1, 1, 1, 0, 0, 0, NAN, NAN])
    groups = [0, 0, 1, 2, 0, 3, 3, 4, 5]
    for seed in range(20):
        drawn = draw_shots(labels, groups, 2, seed)
        assert labels[drawn].tolist() == [1, 1, 0, 0]
        chosen = [groups[place] for place in drawn]
        assert len(set(chosen[:2])) == len(set(chosen[2:])) == 2
        np.testing.assert_array_equal(drawn, draw_shots(labels, groups, 2, seed))
    assert len({tuple(draw_shots(labels, groups, 2, seed)) for seed in range(20)}) > 1
    with pytest.raises(ValueError, match="3 shots are more than there are: .*3 patients with it and 2 without"):
        draw_shots(labels, groups, 3, 0)
    with pytest.raises(ValueError, match="shots >= 1"):
        draw_shots(labels, groups, 0, 0)


def test_what_cannot_be_learned_from_is_said():
    groups = range(4)
    assert learning_problem(np.array([1.0, 0, 0, NAN]), groups, "full") is None
    assert learning_problem(np.array([1.0, 0, 0, NAN]), groups, 1) is None
    assert "2 patients of each class" in learning_problem(np.array([1.0, 0, 0, NAN]), groups, 2)
    assert "both classes" in learning_problem(np.array([1.0, 1, 1, NAN]), groups, "full")


@pytest.mark.parametrize("shots", [4, "full"])
def test_heads_are_one_probe_a_label_and_seed(shots):
    features, labels = made_up()
    annotations = {"told": labels, "other": np.roll(labels, 1)}
    heads = fit_heads("tower", features, annotations, range(len(labels)), shots, [0, 1])
    assert [type(each) for each in heads] == [ProbeHeads] * 2
    found = heads[0].predict({"tower": features, "shared": None})
    assert list(found) == ["told", "other"]
    assert found["told"][labels == 1].mean() > found["told"][labels == 0].mean()
    differ = (heads[0].probes["told"].weight != heads[1].probes["told"].weight).any()
    assert differ == (shots == 4)
