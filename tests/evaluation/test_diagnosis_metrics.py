# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
import numpy as np
import pytest

from m3fm.evaluation.diagnosis_metrics import (
    DIAGNOSIS_METRICS,
    MAX_CURVE_POINTS,
    NUM_BINS,
    LabelMeasurement,
    MacroMeasurement,
    PanelMeasurement,
    by_column,
    curves,
    fit_threshold,
    reliability,
)
from m3fm.evaluation.resampling import cluster_weights, point_scores

NAN = float("nan")


def made_up(seed, count=200, levels=None, prevalence=0.3):
    """Labels and probabilities that have to do with each other; few levels make many ties."""
    generator = np.random.default_rng(seed)
    labels = (generator.random(count) < prevalence).astype(float)
    values = np.clip(0.3 * labels + 0.7 * generator.random(count), 0, 1)
    return labels, values if levels is None else np.round(values * levels) / levels


def scores(labels, probabilities, threshold=0.5):
    measurement = LabelMeasurement(labels, probabilities, np.asarray(probabilities) >= threshold)
    return point_scores([measurement], len(labels))


@pytest.mark.parametrize("levels", [None, 1, 4, 20])
@pytest.mark.parametrize("seed", range(3))
def test_scores_equal_scikit_learns(seed, levels):
    metrics = pytest.importorskip("sklearn.metrics")
    labels, values = made_up(seed, levels=levels)
    found, calls = scores(labels, values, 0.4), values >= 0.4
    fpr, tpr, _ = metrics.roc_curve(labels, values, drop_intermediate=False)
    expected = {
        "auroc": metrics.roc_auc_score(labels, values),
        "auprc": metrics.average_precision_score(labels, values),
        "f1": metrics.f1_score(labels, calls),
        "sensitivity": metrics.recall_score(labels, calls),
        "specificity": metrics.recall_score(1 - labels, ~calls),
        "sensitivity_at_specificity_90": tpr[fpr <= 0.1 + 1e-9].max(),
        "brier": metrics.brier_score_loss(labels, values),
        "prevalence": labels.mean(),
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-9)


def test_resamples_equal_scikit_learns_sample_weights():
    metrics = pytest.importorskip("sklearn.metrics")
    labels, values = made_up(5, count=60, levels=10)
    labels[:7] = NAN
    weights = cluster_weights([place // 2 for place in range(60)], 40, seed=1)
    found = LabelMeasurement(labels, values, values >= 0.5).score(weights)
    known = ~np.isnan(labels)
    for draw, weight in enumerate(weights[:, known]):
        given = (labels[known], values[known])
        assert found["auroc"][draw] == pytest.approx(metrics.roc_auc_score(*given, sample_weight=weight), abs=1e-9)
        average = metrics.average_precision_score(*given, sample_weight=weight)
        assert found["auprc"][draw] == pytest.approx(average, abs=1e-9)
        assert found["f1"][draw] == pytest.approx(
            metrics.f1_score(given[0], given[1] >= 0.5, sample_weight=weight), abs=1e-9
        )


def test_many_studies_are_scored_in_parts_alike():
    labels, values = made_up(2, count=3000)
    weights = cluster_weights(range(3000), 100)
    measurement = LabelMeasurement(labels, values, values >= 0.5)
    whole = measurement.score(weights)
    assert {name: len(each) for name, each in whole.items()} == dict.fromkeys(DIAGNOSIS_METRICS, 100)
    for draw in (0, 57, 99):
        alone = measurement.score(weights[draw : draw + 1])
        assert all(whole[name][draw] == pytest.approx(alone[name][0], abs=1e-12) for name in DIAGNOSIS_METRICS)


def test_a_perfect_oracle():
    labels = np.array([1.0, 0.0, 0.0, 1.0, 0.0])
    found = scores(labels, labels, fit_threshold(labels, labels))
    perfect = dict.fromkeys(("auroc", "auprc", "f1", "sensitivity", "specificity"), 1.0)
    perfect |= {"sensitivity_at_specificity_90": 1.0, "ece": 0.0, "brier": 0.0, "prevalence": 0.4}
    assert found == perfect
    assert scores(labels, 1 - labels)["auroc"] == 0


@pytest.mark.parametrize("constant", [0.0, 0.2, 0.9, 1.0])
def test_a_constant_probability(constant):
    labels, _ = made_up(3)
    found = scores(labels, np.full(len(labels), constant), constant)
    share = labels.mean()
    expected = {"auroc": 0.5, "auprc": share, "ece": abs(constant - share), "sensitivity_at_specificity_90": 0}
    expected |= {"f1": 2 * share / (1 + share), "sensitivity": 1, "specificity": 0}
    assert {name: found[name] for name in expected} == pytest.approx(expected)


def test_one_class_has_no_ranking_but_is_calibrated():
    absent = scores(np.array([0.0, NAN, 0.0]), np.array([0.1, 0.9, 0.3]))
    undefined = {name for name, value in absent.items() if np.isnan(value)}
    assert undefined == {"auroc", "auprc", "f1", "sensitivity", "sensitivity_at_specificity_90"}
    assert absent["specificity"] == 1
    assert absent["brier"] == pytest.approx((0.01 + 0.09) / 2)
    present = scores(np.array([1.0, 1.0]), np.array([0.1, 0.9]))
    undefined = {name for name, value in present.items() if np.isnan(value)}
    assert undefined == {"auroc", "auprc", "specificity", "sensitivity_at_specificity_90"}
    assert all(np.isnan(value) for value in scores(np.array([NAN]), np.array([0.5])).values())


def test_resamples_without_a_class_are_undefined():
    measurement = LabelMeasurement(np.array([1.0, 0.0]), np.array([0.8, 0.3]), np.array([True, False]))
    found = measurement.score(np.array([[1.0, 1.0], [2.0, 0.0], [0.0, 2.0], [0.0, 0.0]]))
    assert found["auroc"].tolist() == pytest.approx([1, NAN, NAN, NAN], nan_ok=True)
    assert found["prevalence"].tolist() == pytest.approx([0.5, 1, 0, NAN], nan_ok=True)


def test_unknown_labels_are_left_out():
    labels, values = made_up(4)
    more = (np.append(labels, [NAN] * 50), np.append(values, np.linspace(0, 1, 50)))
    assert scores(*more) == pytest.approx(scores(labels, values))


def test_macro_is_the_mean_over_labels_where_defined():
    first, second = made_up(0), made_up(1)
    measured = [LabelMeasurement(*each, each[1] >= 0.5) for each in (first, second)]
    empty = LabelMeasurement(np.zeros(200), first[1], first[1] >= 0.5)
    macro = point_scores([MacroMeasurement([*measured, empty])], 200)
    single = [point_scores([each], 200) for each in [*measured, empty]]
    assert macro["auroc"] == pytest.approx((single[0]["auroc"] + single[1]["auroc"]) / 2)
    assert macro["brier"] == pytest.approx(np.mean([each["brier"] for each in single]))
    panel = PanelMeasurement({"a|b": measured[0], "c": measured[1]}, ["a|b", "c"])
    columns = by_column(point_scores([panel], 200))
    assert list(columns) == ["a|b", "c", "macro"]
    assert columns["a|b"] == single[0]
    assert columns["macro"]["auroc"] == macro["auroc"]
    # A mean over fewer labels is not comparable, so there is none.
    assert list(by_column(point_scores([PanelMeasurement({"c": measured[1]}, ["a|b", "c"])], 200))) == ["c"]
    with pytest.raises(ValueError, match="none of them called 'macro'"):
        PanelMeasurement({"macro": measured[0]}, ["macro"])
    with pytest.raises(ValueError, match="at least one label"):
        MacroMeasurement([])


def test_threshold_maximises_f1():
    labels, values = made_up(6, levels=15)
    threshold = fit_threshold(labels, values)
    best = max(scores(labels, values, cut)["f1"] for cut in np.unique(values))
    assert scores(labels, values, threshold)["f1"] == pytest.approx(best)
    # Half-way to the next lower probability, and unknown labels have no say.
    assert fit_threshold([0, 1, 1, NAN], [0.2, 0.6, 0.8, 0.5]) == pytest.approx(0.4)
    assert fit_threshold([0, 1], [0.3, 0.3]) == 0.3
    # F1 is 2/3 for one hit and no alarm as for both hits and two alarms: the fewest alarms win.
    assert fit_threshold([1, 0, 0, 1], [0.9, 0.7, 0.6, 0.5]) == pytest.approx(0.8)
    assert np.isnan(fit_threshold([1, 1, NAN], [0.1, 0.2, 0.3]))


def test_reliability_and_ece_are_of_the_same_bins():
    labels, values = made_up(7)
    labels[:20] = NAN
    bins = reliability(labels, values)
    assert sum(bins["count"]) == 180
    assert len(bins["count"]) <= NUM_BINS
    gaps = np.abs(np.subtract(bins["confidence"], bins["accuracy"]))
    assert scores(labels, values)["ece"] == pytest.approx((gaps * bins["count"]).sum() / 180)
    edge = reliability([1.0, 0.0], [1.0, 1 / NUM_BINS])
    assert edge == {"confidence": [1 / NUM_BINS, 1.0], "accuracy": [0.0, 1.0], "count": [1, 1]}


def test_curves_are_thinned_and_keep_their_ends():
    metrics = pytest.importorskip("sklearn.metrics")
    labels, values = made_up(8, count=5000)
    points = curves(labels, values)
    assert {len(each) for each in points.values()} == {MAX_CURVE_POINTS}
    assert (points["fpr"][0], points["tpr"][0], points["precision"][0]) == (0, 0, 1)
    assert (points["fpr"][-1], points["tpr"][-1]) == (1, 1)
    assert np.trapezoid(points["tpr"], points["fpr"]) == pytest.approx(scores(labels, values)["auroc"], abs=2e-3)
    labels, values = made_up(8, count=50, levels=9)
    points = curves(labels, values)
    fpr, tpr, _ = metrics.roc_curve(labels, values, drop_intermediate=False)
    assert points["fpr"] == pytest.approx(fpr)
    assert points["tpr"] == pytest.approx(tpr)
    precision, recall, _ = metrics.precision_recall_curve(labels, values)
    assert points["precision"] == pytest.approx(precision[::-1])
    assert points["recall"] == pytest.approx(recall[::-1])
    with pytest.raises(ValueError, match="one class only"):
        curves([1, NAN], [0.5, 0.5])


@pytest.mark.parametrize(
    ("labels", "probabilities", "decisions", "message"),
    [
        ([0, 1], [0.5], [True], "one probability a label"),
        ([0, 2], [0.5, 0.5], [True, True], "1 .present., 0 .absent. or NaN"),
        ([0, 1], [0.5, 1.5], [True, True], "from 0 to 1"),
        ([0, 1], [0.5, NAN], [True, True], "from 0 to 1"),
        ([0, 1], [0.5, 0.5], [True], "Expected 2 decisions"),
    ],
)
def test_what_cannot_be_scored_is_refused(labels, probabilities, decisions, message):
    with pytest.raises(ValueError, match=message):
        LabelMeasurement(np.array(labels), np.array(probabilities), np.array(decisions))
