# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Linear heads: what they minimise, what a prior does, folds that keep patients together, calibration."""

import numpy as np
import pytest

from m3fm.training.heads import (
    PENALTIES,
    HeldOut,
    choose_heads,
    deal_folds,
    fit_heads,
    hold_out,
    probabilities,
    sigmoid,
)


def made_up(studies: int, width: int, seed: int = 0) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Returns features of which the first coordinate tells the class (N, 1)."""
    rng = np.random.default_rng(seed)
    targets = (np.arange(studies) % 2).astype(np.float64)[:, None]
    shared = rng.normal(size=(studies, width))
    shared[:, 0] += 3 * targets[:, 0]
    return {"shared": shared, "tower": rng.normal(size=(studies, 2 * width))}, targets


@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("penalty", PENALTIES)
def test_equals_scikit_learn(classes: int, penalty: float) -> None:
    regression = pytest.importorskip("sklearn.linear_model").LogisticRegression
    features, targets = made_up(30, 50)
    if classes == 3:
        targets = np.eye(3)[np.arange(30) % 3]
    (head,) = fit_heads(["shared"], features, targets, [penalty], exclusive=classes == 3)
    centred = features["shared"] - features["shared"].mean(axis=0)
    standard = centred / np.sqrt((centred**2).sum(axis=1).mean())
    labels = targets.argmax(axis=1) if classes == 3 else targets[:, 0]
    peer = regression(C=1 / penalty, tol=1e-8, max_iter=1000).fit(standard, labels)
    found = probabilities(head.logits(features), exclusive=classes == 3)
    expected = peer.predict_proba(standard)
    np.testing.assert_allclose(found, expected if classes == 3 else expected[:, 1:], atol=1e-4)


def test_penalties_are_independent_and_labels_too() -> None:
    features, targets = made_up(24, 10)
    both = np.concatenate([targets, 1 - targets], axis=1)
    both[:4, 1] = np.nan
    together = fit_heads(["shared", "tower"], features, both, PENALTIES, exclusive=False)
    for penalty, head in zip(PENALTIES, together, strict=True):
        (alone,) = fit_heads(["shared", "tower"], features, both, [penalty], exclusive=False)
        np.testing.assert_allclose(alone.weight, head.weight, atol=1e-4)
        (first,) = fit_heads(["shared", "tower"], features, both[:, :1], [penalty], exclusive=False)
        np.testing.assert_allclose(first.weight[:, 0], head.weight[:, 0], atol=1e-4)


@pytest.mark.parametrize("space", [("shared",), ("tower",), ("tower", "shared")])
def test_heavy_penalty_leaves_the_prior(space: tuple[str, ...]) -> None:
    features, targets = made_up(20, 10)
    prior = np.random.default_rng(2).normal(size=(10, 1))
    (head,) = fit_heads(space, features, targets, [1e9], exclusive=False, prior=prior)
    difference = head.logits(features) - features["shared"] @ prior
    np.testing.assert_allclose(difference, difference.mean(), atol=1e-4)  # the bias is free
    (free,) = fit_heads(space, features, targets, [1e-2], exclusive=False, prior=prior)
    assert np.abs(free.logits(features) - head.logits(features)).max() > 0.5


def test_folds_keep_patients_together_and_spread_classes() -> None:
    rng = np.random.default_rng(0)
    groups = rng.integers(25, size=60)
    targets = (rng.random((60, 2)) < 0.4).astype(np.float64)
    targets[:10, 1] = np.nan
    folds = deal_folds(targets, groups, 5, seed=1)
    assert all(len(set(folds[groups == group])) == 1 for group in groups)
    for column in targets.T:
        for value in (0, 1):
            counts = np.bincount(folds[column == value], minlength=5)
            assert counts.min() >= 1
            assert counts.max() <= 2.5 * counts.mean()
    assert np.array_equal(deal_folds(targets, groups, 5, seed=1), folds)
    assert not np.array_equal(deal_folds(targets, groups, 5, seed=2), folds)


def test_held_out_studies_are_of_other_patients() -> None:
    groups = np.repeat(np.arange(8), 3)
    targets = (groups % 2).astype(np.float64)[:, None]
    seen: list[set[int]] = []

    def fit(rest: np.ndarray):
        def predict(held: np.ndarray) -> np.ndarray:
            assert not set(groups[rest]) & set(groups[held])
            seen.append(set(held.tolist()))
            return np.zeros((len(held), 1))

        return predict

    logits = hold_out(fit, targets, groups, exclusive=False, seed=0)
    assert set().union(*seen) == set(range(24))
    assert (logits == 0).all()
    alone = hold_out(fit, np.array([[1.0], [0.0]]), np.arange(2), exclusive=False, seed=0)
    assert np.isnan(alone).all()


def test_the_useful_method_is_chosen() -> None:
    features, targets = made_up(40, 20)
    helpful, wrong = np.zeros((20, 1)), np.zeros((20, 1))
    helpful[0], wrong[1] = 2.0, 40.0
    for prior, best in ((helpful, "prompt"), (wrong, "linear")):
        methods = {"prompt": prior, "linear": None}
        choices = choose_heads(methods, [("shared",)], features, targets, np.arange(40), False)
        assert [choices[0].method, len(choices)] == [best, 2]
        assert choices[0].loss <= choices[1].loss


def test_temperature_and_threshold_repair_over_confident_logits() -> None:
    rng = np.random.default_rng(0)
    true_logits = rng.normal(0, 1.5, size=(400, 1))
    targets = (rng.random((400, 1)) < sigmoid(true_logits)).astype(np.float64)
    held_out = HeldOut(4 * true_logits[None], targets, exclusive=False)
    scale = held_out.temperature()
    assert scale == pytest.approx([0.25], rel=0.3)
    assert np.nanmean(held_out.losses(scale)) < np.nanmean(held_out.losses())
    assert 0.2 < held_out.thresholds(scale)[0] < 0.6
    both = np.concatenate([true_logits, np.zeros_like(true_logits)], axis=1)
    exclusive = HeldOut(4 * both[None], np.concatenate([targets, 1 - targets], axis=1), exclusive=True)
    np.testing.assert_allclose(exclusive.temperature(), scale[0], rtol=0.15)
    assert exclusive.scores()["auroc"] == pytest.approx(held_out.scores()["auroc"], abs=1e-9)


def test_nothing_held_out_leaves_probabilities_as_they_are() -> None:
    nothing = HeldOut(np.full((1, 2, 1), np.nan), np.array([[1.0], [0.0]]), exclusive=False)
    assert nothing.is_empty
    assert nothing.thresholds(np.ones(1)).tolist() == [0.5]
