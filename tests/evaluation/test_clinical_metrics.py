# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Clinical scores: hand-counted reports, and controls on real ones."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from m3fm.evaluation.clinical_metrics import CLINICAL_METRICS, ClinicalScorer
from m3fm.evaluation.resampling import cluster_weights, point_scores, resampled_scores

REFERENCES = [
    "右肺上叶见结节影。未见胸腔积液。",  # nodule and lung_lesion, right upper
    "左侧胸腔积液。",  # pleural_effusion, left
    "双肺未见异常密度影。",  # nothing
]
NORMAL = {
    "zh": "胸廓对称，双肺纹理清晰，双肺内未见异常密度影，纵隔内未见肿大淋巴结，双侧胸腔内未见异常密度影。",
    "en": "The heart is normal in size. The lungs are clear. No pleural effusion or pneumothorax.",
}
SWAPS = {"zh": {"左": "右", "右": "左"}, "en": {"left": "right", "right": "left"}}


def scores(predictions: list[str], references: list[str] = REFERENCES, language: str = "zh") -> dict[str, float]:
    return point_scores(ClinicalScorer(references, language).measure(predictions), len(references))


def cov_ctr_reports(data_root: Path, language: str) -> list[str]:
    lines = (data_root / "cov_ctr" / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row["split"] == "validation"]
    assert len(rows) == 72
    return [row[f"report_{language}"] for row in rows]


def swap_sides(text: str, language: str) -> str:
    swaps = SWAPS[language]
    return re.sub("|".join(swaps), lambda match: swaps[match[0]], text)


def test_names_are_the_table_s_and_in_its_order() -> None:
    assert tuple(scores(REFERENCES)) == CLINICAL_METRICS


def test_counts_of_hand_made_reports() -> None:
    predictions = [
        "右肺下叶见结节影。",  # both findings found, side right, lobe wrong
        "左侧胸腔积液，左侧气胸。",  # found, and a pneumothorax invented
        "双肺未见异常密度影。",
    ]
    got = scores(predictions)
    assert got["finding_precision_micro"] == pytest.approx(3 / 4)
    assert got["finding_recall_micro"] == pytest.approx(1)
    assert got["finding_f1_micro"] == pytest.approx(6 / 7)
    assert got["finding_f1_macro"] == pytest.approx(1)  # the invented finding has no support
    assert got["located_f1_micro"] == pytest.approx(2 / 7)
    assert got["side_accuracy"] == pytest.approx(1)
    assert got["lobe_accuracy"] == pytest.approx(0)


def test_macro_counts_every_supported_finding_alike() -> None:
    references = ["肺结节。", "肺结节。", "肺结节。", "气胸。"]
    got = scores(["肺结节。", "肺结节。", "肺结节。", "未见气胸。"], references)
    assert got["finding_f1_macro"] == pytest.approx((1 + 1 + 0) / 3)  # nodule, lung_lesion, pneumothorax


def test_an_uncertain_finding_counts_as_stated() -> None:
    assert scores(["肺炎不除外。"], ["肺炎。"])["finding_f1_micro"] == 1
    assert scores(["未见肺炎。"], ["肺炎可能。"])["finding_f1_micro"] == 0


def test_a_missing_place_is_a_wrong_place() -> None:
    got = scores(["胸腔积液。"], ["左侧胸腔积液。"])
    assert (got["finding_f1_micro"], got["located_f1_micro"], got["side_accuracy"]) == (1, 0, 0)


def test_without_any_stated_finding_every_score_is_undefined() -> None:
    got = scores(["双肺未见异常密度影。"], ["未见胸腔积液。"])
    assert all(np.isnan(value) for value in got.values())


def test_places_are_undefined_where_no_reference_states_one() -> None:
    got = scores(["胸腔积液。"], ["胸腔积液。"])
    assert got["located_f1_micro"] == 1
    assert np.isnan(got["side_accuracy"]) and np.isnan(got["lobe_accuracy"])


def test_empty_predictions_find_nothing() -> None:
    got = scores(["", "", ""])
    assert [got[name] for name in CLINICAL_METRICS[:5]] == [0, 0, 0, 0, 0]


def test_resampled_scores_are_those_of_the_repeated_studies() -> None:
    predictions = ["右肺下叶见结节影。", "左侧胸腔积液，左侧气胸。", "左肺下叶见实变影。"]
    weights = np.concatenate([cluster_weights([0, 1, 2], num_resamples=20, seed=1), [[0, 0, 1]]])
    resampled = resampled_scores(ClinicalScorer(REFERENCES, "zh").measure(predictions), weights)
    for draw, counts in enumerate(weights.astype(int)):
        chosen = np.repeat(np.arange(3), counts)
        repeated = scores([predictions[i] for i in chosen], [REFERENCES[i] for i in chosen])
        for name in CLINICAL_METRICS:
            np.testing.assert_allclose(resampled[name][draw], repeated[name], err_msg=name)


def test_finding_table_has_each_stated_finding_once() -> None:
    table = ClinicalScorer(REFERENCES, "zh").finding_table(["右肺下叶见结节影。", "气胸。", "双肺未见异常密度影。"])
    assert list(table) == ["no_finding", "lung_lesion", "pneumothorax", "pleural_effusion", "nodule"]
    assert table["nodule"] == {"precision": 1, "recall": 1, "f1": 1, "support": 1, "predicted": 1}
    assert table["pneumothorax"] == {"precision": 0, "recall": 0, "f1": 0, "support": 0, "predicted": 1}
    assert table["pleural_effusion"] == {"precision": 0, "recall": 0, "f1": 0, "support": 1, "predicted": 0}
    assert table["no_finding"]["f1"] == 1
    assert table["no_finding"]["support"] == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ClinicalScorer([], "zh"), "at least one reference"),
        (lambda: ClinicalScorer("气胸。", "zh"), "list of reports, got one string"),
        (lambda: ClinicalScorer(["气胸。"], "fr"), "fr"),
        (lambda: ClinicalScorer(["气胸。"], "zh").measure("气胸。"), "list of reports, got one string"),
        (lambda: ClinicalScorer(["气胸。"], "zh").measure([]), "got 0 predictions and 1 references"),
        (lambda: ClinicalScorer(["气胸。"], "zh").finding_table(["", ""]), "got 2 predictions and 1 references"),
    ],
)
def test_wrong_input_is_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.realdata
@pytest.mark.parametrize("language", ["en", "zh"])
def test_an_oracle_is_perfect(data_root: Path, language: str) -> None:
    reports = cov_ctr_reports(data_root, language)
    assert set(scores(reports, reports, language).values()) == {1.0}


@pytest.mark.realdata
@pytest.mark.parametrize("language", ["en", "zh"])
def test_swapped_sides_lower_the_located_scores_alone(data_root: Path, language: str) -> None:
    reports = cov_ctr_reports(data_root, language)
    got = scores([swap_sides(text, language) for text in reports], reports, language)
    assert got["finding_f1_micro"] == 1
    assert got["lobe_accuracy"] > 0.9  # the lingula is on the left only
    assert got["located_f1_micro"] < 0.75
    assert got["side_accuracy"] < 0.75


@pytest.mark.realdata
@pytest.mark.parametrize(
    ("language", "negated", "asserted"), [("zh", "未见", "可见"), ("en", r"\bno\b(?= abnormal| enlarged)", "an")]
)
def test_a_dropped_negation_lowers_the_finding_scores(
    data_root: Path, language: str, negated: str, asserted: str
) -> None:
    reports = cov_ctr_reports(data_root, language)
    got = scores([re.sub(negated, asserted, text) for text in reports], reports, language)
    assert got["finding_precision_micro"] < 0.8
    assert got["finding_f1_micro"] < 0.9


@pytest.mark.realdata
def test_an_inserted_negation_lowers_the_finding_scores(data_root: Path) -> None:
    reports = cov_ctr_reports(data_root, "zh")
    got = scores([re.sub("(?<!未)见", "未见", text) for text in reports], reports)
    assert got["finding_recall_micro"] < 0.1


@pytest.mark.realdata
@pytest.mark.parametrize("language", ["en", "zh"])
def test_a_constant_normal_report_scores_nothing(data_root: Path, language: str) -> None:
    reports = cov_ctr_reports(data_root, language)
    got = scores([NORMAL[language]] * len(reports), reports, language)
    assert got["finding_f1_micro"] == 0
    assert got["finding_f1_macro"] == 0
