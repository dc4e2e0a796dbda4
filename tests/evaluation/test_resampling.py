# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
import numpy as np
import pytest

from m3fm.evaluation.resampling import (
    SumMeasurement,
    cluster_weights,
    compare_rows,
    mean_measurement,
    paired_difference,
    percentile_interval,
    point_scores,
    ratio,
)


def test_a_sum_measurement_scores_any_weighting():
    counts = np.array([[1.0, 2.0], [3.0, 4.0], [0.0, 1.0]])  # right, all
    measurement = SumMeasurement(counts, lambda sums: {"share": ratio(sums[:, 0], sums[:, 1])})
    assert point_scores([measurement], 3)["share"] == pytest.approx(4 / 7)
    np.testing.assert_allclose(
        measurement.score(np.array([[2.0, 0, 0], [0, 1, 1], [0, 0, 0]]))["share"], [0.5, 0.6, np.nan]
    )


def test_means_leave_out_studies_without_a_value():
    measurement = mean_measurement({"a": np.array([1.0, np.nan, 0.0]), "b": np.array([0.5, 0.5, np.nan])})
    scores = measurement.score(np.array([[1.0, 1, 1], [3, 1, 1], [0, 1, 0]]))
    np.testing.assert_allclose(scores["a"], [0.5, 0.75, np.nan])
    np.testing.assert_allclose(scores["b"], [0.5, 0.5, 0.5])


def test_groups_are_drawn_whole():
    groups = ["a", "b", "b", "c", "a"]
    weights = cluster_weights(groups, 500, seed=1)
    assert weights.shape == (500, 5)
    np.testing.assert_array_equal(weights[:, 0], weights[:, 4])
    np.testing.assert_array_equal(weights[:, 1], weights[:, 2])
    # As many groups are drawn as there are, each as often as the others.
    np.testing.assert_array_equal(weights[:, [0, 1, 3]].sum(axis=1), 3)
    np.testing.assert_allclose(weights.mean(axis=0), 1, atol=0.15)
    np.testing.assert_array_equal(weights, cluster_weights(groups, 500, seed=1))
    assert (weights != cluster_weights(groups, 500, seed=2)).any()


@pytest.mark.parametrize(("groups", "resamples"), [([], 10), (["a"], 0)])
def test_nothing_to_draw_is_refused(groups, resamples):
    with pytest.raises(ValueError, match="Expected studies and resamples"):
        cluster_weights(groups, resamples)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    generator = np.random.default_rng(0)
    covered = 0
    for trial in range(300):
        values = generator.normal(0.3, 1, size=40)
        draws = mean_measurement({"x": values}).score(cluster_weights(range(40), 400, seed=trial))["x"]
        low, high = percentile_interval(draws)
        covered += low <= 0.3 <= high
    assert 0.9 <= covered / 300 <= 0.98


def test_clusters_widen_the_interval():
    values = np.repeat(np.random.default_rng(0).normal(size=30), 4)
    alone = mean_measurement({"x": values}).score(cluster_weights(range(120), 1000))["x"]
    together = mean_measurement({"x": values}).score(cluster_weights(np.repeat(np.arange(30), 4).tolist(), 1000))["x"]
    assert together.std() == pytest.approx(2 * alone.std(), rel=0.2)


def test_paired_differences():
    draws = np.array([0.2, 0.3, 0.4, np.nan])
    same = paired_difference(draws, draws, 0.0)
    assert same == {"difference": 0.0, "low": 0.0, "high": 0.0, "p_value": 1.0}
    above = paired_difference(draws, draws - 0.1, 0.1)
    assert above["low"] == pytest.approx(0.1)
    assert above["p_value"] == pytest.approx(2 / 4)  # three resamples cannot tell more
    many = np.random.default_rng(0).normal(1, 0.1, size=999)
    assert paired_difference(many, np.zeros(999), 1.0)["p_value"] == pytest.approx(2 / 1000)
    nothing = paired_difference(np.full(3, np.nan), draws[:3], float("nan"))
    assert np.isnan([nothing["low"], nothing["p_value"]]).all()


def test_rows_are_compared_with_the_first():
    generator = np.random.default_rng(0)
    truth = generator.normal(size=50)
    systems = {
        "model": [[mean_measurement({"x": truth + 1})]],
        "same": [[mean_measurement({"x": truth + 1})]],
        "worse": [[mean_measurement({"x": truth + shift, "y": truth})] for shift in (0.0, 0.2)],
    }
    points, intervals, differences = compare_rows(systems, cluster_weights(range(50), 200))
    assert points["worse"]["x"] == pytest.approx(truth.mean() + 0.1)
    assert list(differences) == ["same", "worse"]
    assert differences["same"]["x"] == {"difference": 0.0, "low": 0.0, "high": 0.0, "p_value": 1.0}
    # Paired: what studies have in common cancels out.
    assert differences["worse"]["x"]["low"] == pytest.approx(0.9)
    assert differences["worse"]["x"]["p_value"] < 0.02
    assert list(differences["worse"]) == ["x"]
    low, high = intervals["model"]["x"]
    assert low < points["model"]["x"] < high
