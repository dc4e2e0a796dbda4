# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
import numpy as np
import pytest

from m3fm.data import load_studies
from m3fm.evaluation.baselines import (
    derangement,
    nearest_neighbors,
    random_reports,
    select_constant_report,
    unit_rows,
)
from m3fm.evaluation.text_metrics import score_reports

REPORTS = [
    "Large effusion on the left.",
    "The lungs are clear. No effusion.",
    "The lungs are clear. The heart is normal. No effusion.",
    "The lungs are clear. The heart is normal.",
    "Fracture.",
]


def test_the_constant_report_has_the_highest_rouge_on_training_reports():
    scores = [score_reports([report] * len(REPORTS), REPORTS, "en")["rouge_l"] for report in REPORTS]
    assert select_constant_report(REPORTS, "en") == int(np.argmax(scores))


def test_the_constant_report_of_a_sample_is_an_index_into_all_and_repeats():
    reports = [f"report number {i}" for i in range(50)] + ["the lungs are clear ."] * 50
    chosen = select_constant_report(reports, "en", max_reports=20, seed=3)
    assert chosen == select_constant_report(reports, "en", max_reports=20, seed=3)
    assert reports[chosen] == "the lungs are clear ."


def test_the_constant_report_refuses_wrong_input():
    with pytest.raises(ValueError, match="at least one training report"):
        select_constant_report([], "en")
    with pytest.raises(ValueError, match="Unsupported language"):
        select_constant_report(REPORTS, "fr")
    with pytest.raises(ValueError, match="max_reports"):
        select_constant_report(REPORTS, "en", max_reports=0)


def test_random_reports_are_training_reports_and_seeded():
    drawn = random_reports(REPORTS, 40, seed=1)
    assert len(drawn) == 40
    assert set(drawn) <= set(REPORTS)
    assert drawn == random_reports(REPORTS, 40, seed=1)
    assert drawn != random_reports(REPORTS, 40, seed=2)


def test_nearest_neighbors_go_by_direction_not_length():
    gallery = np.array([[1.0, 0], [0, 100], [-1, 0]])
    assert nearest_neighbors(np.array([[0.1, 0.0], [-5, 1], [1, 1.1]]), gallery).tolist() == [0, 2, 1]


@pytest.mark.parametrize("count", [2, 3, 72])
def test_a_derangement_moves_everything(count):
    order = derangement(count, seed=4)
    assert sorted(order) == list(range(count))
    assert (order != np.arange(count)).all()
    assert (order == derangement(count, seed=4)).all()


def test_one_study_cannot_be_shuffled():
    with pytest.raises(ValueError, match="at least 2"):
        derangement(1)


def test_features_are_checked():
    assert unit_rows("queries", np.array([[3.0, 4], [0, 0]])).tolist() == [[0.6, 0.8], [0, 0]]
    with pytest.raises(ValueError, match=r"gallery of shape \(rows, 2\), got \(1, 3\)"):
        nearest_neighbors(np.ones((1, 2)), np.ones((1, 3)))
    with pytest.raises(ValueError, match="NaN or infinity in 1 rows"):
        nearest_neighbors(np.array([[np.nan, 1]]), np.ones((1, 2)))


@pytest.mark.realdata
def test_floors_on_cov_ctr_validation(data_root):
    studies = load_studies(data_root / "cov_ctr")
    # One report does for every patient what many a model does not: these numbers are the floor.
    for language, bleu_4, rouge in (("en", 0.527, 0.697), ("zh", 0.697, 0.794)):
        reports = [study.reports[language] for study in studies if study.split == "train"]
        references = [study.reports[language] for study in studies if study.split == "validation"]
        assert (len(reports), len(references)) == (576, 72)
        constant = reports[select_constant_report(reports, language)]
        scores = score_reports([constant] * 72, references, language)
        assert scores["bleu_4"] == pytest.approx(bleu_4, abs=5e-4)
        assert scores["rouge_l"] == pytest.approx(rouge, abs=5e-4)
