# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
import json

import numpy as np
import pytest

from m3fm.evaluation.compare import Column, compare_column, compare_runs, holm
from m3fm.evaluation.resampling import mean_measurement

REPORTS = {
    "en": [
        "The lungs are clear.",
        "Small left pleural effusion.",
        "Nodule in the right upper lobe.",
        "Cardiomegaly.",
    ],
    "zh": ["双肺清晰，未见异常。", "左侧少量胸腔积液。", "右肺上叶结节。", "心影增大。"],
}
COUNT = 24
LABELS = ("pneumonia", "edema")


def report_rows(write, languages=("en", "zh")):
    """Two studies a patient; `write` maps language and number of the report to what a model wrote."""
    rows = []
    for index in range(COUNT):
        number = index % 4
        reference = {code: REPORTS[code][number] for code in languages}
        prediction = {code: write(code, number) for code in languages}
        row = {"study_id": f"study-{index}", "group": index // 2, "prediction": prediction, "reference": reference}
        rows.append(row)
    return rows


def diagnosis_rows(probability, labels=LABELS):
    rows = []
    for index in range(COUNT):
        truth = {label: int((index + place) % 3 == 0) for place, label in enumerate(labels)}
        given = {label: probability(value, index) for label, value in truth.items()}
        decided = {label: int(value >= 0.5) for label, value in given.items()}
        row = {"study_id": f"study-{index}", "group": index // 2, "labels": truth}
        rows.append(row | {"probabilities": given, "decisions": decided})
    return rows


@pytest.fixture
def make_run(tmp_path):
    """Returns a function that writes the output folder of a run."""

    def make(name, rows, **facts):
        folder = tmp_path / name
        folder.mkdir()
        metrics = {"format": 2, "model": name, "data": "made_up", "data_sha256": "0", "split": "test"}
        if "labels" in rows[0]:
            metrics |= {"task": "diagnosis", "labels": list(rows[0]["labels"]), "shots": 0}
        else:
            metrics |= {"task": "report", "languages": list(rows[0]["prediction"])}
        (folder / "metrics.json").write_text(json.dumps(metrics | facts), encoding="utf-8")
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / "predictions.jsonl").write_text(lines, encoding="utf-8")
        return folder

    return make


def truth(code, number):
    return REPORTS[code][number]


def constant(code, number):
    return REPORTS[code][0]


def test_identical_runs_do_not_differ(make_run):
    found = compare_runs(make_run("a", report_rows(truth)), make_run("b", report_rows(truth)), num_resamples=200)
    assert list(found["columns"]) == ["en", "zh"]
    assert found["num_studies"] == {"en": COUNT, "zh": COUNT}
    assert found["num_groups"] == {"en": COUNT // 2, "zh": COUNT // 2}
    for rows in found["columns"].values():
        assert {"bleu_4", "rouge_l", "finding_f1_micro", "located_f1_micro"} <= rows.keys()
        for row in rows.values():
            if row["first"] == row["first"]:
                assert (row["difference"], row["low"], row["high"]) == (0, 0, 0)
                assert row["p_value"] == row["p_holm"] == 1


def test_a_small_p_value_does_not_look_like_none(make_run, capsys):
    compare_runs(make_run("oracle", report_rows(truth)), make_run("constant", report_rows(constant)), 3000)
    cells = [line.split(" | ")[-2:] for line in capsys.readouterr().out.splitlines() if line.startswith("| bleu_1 ")]
    assert cells[0][0] == "<0.001"
    assert float(cells[0][1].removesuffix(" |")) > 0


def test_a_worse_run_is_found_worse_and_the_order_turns_signs(make_run, capsys, tmp_path):
    folders = make_run("oracle", report_rows(truth)), make_run("constant", report_rows(constant))
    found = compare_runs(*folders, num_resamples=1000, output=tmp_path / "compare.json")
    table = capsys.readouterr().out
    for name in ("bleu_1", "bleu_4", "rouge_l", "finding_recall_micro", "finding_f1_micro"):
        row = found["columns"]["en"][name]
        assert row["first"] == pytest.approx(1)
        assert 0 < row["low"] <= row["difference"] <= row["high"]
        assert row["p_value"] <= row["p_holm"] < 0.05
    assert "**zh**: 24 studies of 12 groups" in table
    assert "| metric | first | second | difference | 95% interval | p | p (Holm) |" in table
    assert "study-" not in table
    written = json.loads((tmp_path / "compare.json").read_text(encoding="utf-8"))
    assert written["table"] + "\n" == table
    assert written["first"]["model"] == "oracle"
    back = compare_runs(*folders[::-1], num_resamples=1000)
    for name, row in found["columns"]["zh"].items():
        turned = back["columns"]["zh"][name]
        swapped = [turned[key] for key in ("second", "first", "p_value", "p_holm")]
        np.testing.assert_allclose([row[key] for key in ("first", "second", "p_value", "p_holm")], swapped)
        signs = [-turned[key] for key in ("difference", "high", "low")]
        np.testing.assert_allclose([row[key] for key in ("difference", "low", "high")], signs, atol=1e-12)


def test_diagnosis_is_compared_by_label_and_macro(make_run):
    generator = np.random.default_rng(0)
    good = diagnosis_rows(lambda value, index: 0.2 + 0.6 * value)
    chance = diagnosis_rows(lambda value, index: float(generator.uniform()))
    found = compare_runs(make_run("a", good), make_run("b", chance), num_resamples=300)
    assert list(found["columns"]) == [*LABELS, "macro"]
    macro = found["columns"]["macro"]
    assert macro["auroc"]["first"] == 1
    assert macro["auroc"]["low"] > 0
    assert macro["brier"]["high"] < 0
    assert "prevalence" not in macro
    assert "of brier, ece the lower is the better" in found["table"]


def test_a_study_whose_label_is_unknown_is_left_out_of_that_label(make_run):
    rows = diagnosis_rows(lambda value, index: 0.2 + 0.6 * value)
    for row in rows[:6]:
        row["labels"]["edema"] = None
    found = compare_runs(make_run("a", rows), make_run("b", rows), num_resamples=50)
    assert found["num_studies"] == {"pneumonia": COUNT, "edema": COUNT - 6, "macro": COUNT}
    assert found["num_groups"]["edema"] == COUNT // 2 - 3


def rejection_rate(num_patients, num_trials):
    """Tests pairs of systems of one quality, two studies a patient, at the 5 % level."""
    generator = np.random.default_rng(3)
    groups = [number // 2 for number in range(2 * num_patients)]
    rejected = 0
    for trial in range(num_trials):
        # What is common to a patient is common to both systems, and moves both studies.
        patients = generator.normal(size=(num_patients, 1, 1)) + generator.normal(size=(num_patients, 2, 1))
        systems = generator.normal(size=(num_patients, 1, 2)) + generator.normal(size=(num_patients, 2, 2))
        scores = (patients + systems).reshape(-1, 2)
        sides = ([mean_measurement({"score": scores[:, side]})] for side in range(2))
        rejected += compare_column(Column(groups, *sides), 400, trial)["score"]["p_value"] < 0.05
    return rejected / num_trials


def test_equal_systems_are_told_apart_about_as_often_as_promised():
    # Two standard deviations of a binomial with 200 draws are 3 %.
    assert 0.02 <= rejection_rate(num_patients=40, num_trials=200) <= 0.085
    # What the note about few groups warns of.
    assert rejection_rate(num_patients=8, num_trials=200) > 0.085


def test_doubling_studies_within_their_group_changes_nothing():
    generator = np.random.default_rng(0)
    scores = generator.normal(size=(2, 30))
    groups = list(range(30))

    def compare(scores, groups):
        sides = ([mean_measurement({"score": side})] for side in scores)
        return compare_column(Column(groups, *sides), 400, 0)["score"]

    once, twice = compare(scores, groups), compare(np.tile(scores, 2), groups * 2)
    assert twice == pytest.approx(once)
    as_if_independent = compare(np.tile(scores, 2), list(range(60)))
    width, narrow = (row["high"] - row["low"] for row in (once, as_if_independent))
    assert narrow < 0.85 * width


def test_holm_is_the_step_down_procedure():
    # By hand: 4 x 0.005, then 3 x 0.01, then 2 x 0.03, and 0.04 is raised to the one before.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1, 1]
    corrected = holm([float("nan"), 0.02])
    assert corrected[0] != corrected[0]
    assert corrected[1] == 0.02


def test_runs_that_cannot_be_compared_are_refused(make_run, tmp_path):
    rows = report_rows(truth)
    base = make_run("base", rows)
    diagnosis = make_run("diagnosis", diagnosis_rows(lambda value, index: 0.5))
    other = json.loads(json.dumps(rows))
    for row in other[:2]:
        row["reference"]["zh"] = "别的报告"
    regrouped = [row | {"group": 0} for row in rows]
    ungrouped = [{key: row[key] for key in row if key != "group"} for row in rows]
    unwritten = json.loads(json.dumps(rows))
    unwritten[0]["prediction"].pop("en")
    for folder, message in (
        (tmp_path / "missing", "holds no finished run"),
        (diagnosis, "two runs of one task, got 'report' and 'diagnosis'"),
        (make_run("fewer", rows[:-2]), "en: expected two runs on the same studies, got 24 and 22, of which 22"),
        (make_run("other", other), "zh: expected the same references, got 2 of 24"),
        (make_run("regrouped", regrouped), "do not agree on which studies share a patient"),
        (make_run("ungrouped", ungrouped), "a line a study with its group"),
        (make_run("unwritten", unwritten, languages=["en", "zh"]), "1 of 24 studies have no report in 'en'"),
        (make_run("parallel", rows, task="parallel"), "expected a run of one of the tasks"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            compare_runs(base, folder, num_resamples=10)
        assert "study-" not in str(error.value)
    (base / "metrics.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged: expected JSON"):
        compare_runs(base, base)


def test_what_differs_beside_the_model_is_said(make_run):
    english = make_run("english", report_rows(truth, ("en",)), data_sha256="1")
    found = compare_runs(make_run("both", report_rows(truth)), english, num_resamples=20)
    assert list(found["columns"]) == ["en"]
    notes = " ".join(found["notes"])
    assert "the runs differ in data_sha256 too" in notes
    assert "only one of the runs has zh: left out" in notes
    assert "no corrected p-value" in notes
    assert "fewer than 20 groups in en: intervals are too narrow" in notes
    with pytest.raises(ValueError, match="nothing in common: zh and en"):
        compare_runs(make_run("chinese", report_rows(truth, ("zh",))), english)
