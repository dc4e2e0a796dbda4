# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Labels of zero-shot diagnosis: how they are found by name, what is refused, how they are scored."""

import json
from copy import deepcopy

import numpy as np
import pytest

from m3fm import DEFAULT_CHECKPOINT, M3FMConfig
from m3fm.data import FINDINGS, finding_table
from m3fm.diagnosis import default_diagnosis
from m3fm.diagnosis_m3fm import (
    calibrate_logits,
    check_diagnosis,
    choose_candidates,
    find_label,
    label_phrases,
    logistic,
    mean_phrases,
    zero_shot_logits,
)
from m3fm.evaluation.label_file import default_label

TABLE = {
    "normal": {"present": {"en": ["Clear."], "zh": ["清晰。"]}, "absent": {"en": ["Ill."]}, "also_absent": ["tb"]},
    "tb": {
        "names": {"en": "Pulmonary tuberculosis", "zh": "肺结核"},
        "aliases": ["结核"],
        "present": {"en": ["TB is seen."], "zh": ["考虑肺结核。"]},
        "absent": {"en": ["No TB."], "zh": ["未见结核。"]},
        "also_absent": ["normal"],
        "calibration": {"scale": 2.0, "bias": -1.0},
        "threshold": 0.4,
        "fitted_on": "set (10 studies)",
    },
}


def test_every_finding_comes_with_the_package():
    table = default_diagnosis()
    assert tuple(table) == FINDINGS
    for key, finding in finding_table().items():
        assert set(finding.present["en"]) <= set(table[key]["present"]["en"])
        assert set(finding.absent["zh"]) <= set(table[key]["absent"]["zh"])
        for name in {key, key.upper(), *finding.names.values(), finding.chexpert or key, *table[key]["aliases"]}:
            assert find_label(table, f" {name}  ") == key
    assert M3FMConfig(diagnosis=table).diagnosis == table


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("TB", "tuberculosis"),
        ("结核", "tuberculosis"),
        ("肺结核", "tuberculosis"),
        ("normal", "no_finding"),
        ("正常", "no_finding"),
        ("No Finding", "no_finding"),
        ("Pleural_Effusion", "pleural_effusion"),
        ("Pleural Other", "pleural_other"),
        ("covid 19", "covid_19"),
        ("新冠肺炎", "covid_19"),
    ],
)
def test_names_in_any_case_and_language_are_known(name, key):
    assert find_label(default_diagnosis(), name) == key


def test_the_shipped_checkpoint_has_the_labels_of_the_package():
    path = DEFAULT_CHECKPOINT / "config.json"
    shipped, default = json.loads(path.read_text(encoding="utf-8"))["diagnosis"], default_diagnosis()
    fitted = ("calibration", "threshold", "fitted_on")
    phrases = {
        key: {name: value for name, value in entry.items() if name not in fitted} for key, entry in shipped.items()
    }
    assert phrases == {
        key: {name: value for name, value in entry.items() if name not in fitted} for key, entry in default.items()
    }
    calibrated = [key for key, entry in shipped.items() if entry["calibration"]]
    assert {"tuberculosis", "no_finding", "pneumonia", "covid_19"} <= set(calibrated)
    for key, entry in shipped.items():
        assert len({entry[name] is None for name in fitted}) == 1, key
    assert all(shipped[key]["fitted_on"].startswith("validation parts of ") for key in calibrated)


def test_pipeline_and_evaluation_compare_with_the_same_phrases():
    table = default_diagnosis()
    for finding in FINDINGS:
        label = default_label(finding)
        assert label.present == label_phrases(table, finding, "present")
        assert label.absent == label_phrases(table, finding, "absent")


def test_a_label_is_denied_by_what_its_opposites_state():
    tb, normal = choose_candidates(["TB", "normal"], TABLE)
    assert tb.absent == ("No TB.", "Clear.", "未见结核。", "清晰。")
    # Languages are those of the label's own phrases.
    assert normal.absent == ("Ill.", "TB is seen.")
    assert (tb.name, tb.key, tb.calibration, tb.threshold) == ("TB", "tb", {"scale": 2.0, "bias": -1.0}, 0.4)
    assert normal.calibration is normal.threshold is None


def test_names_in_both_languages_are_one_label():
    english, chinese = (choose_candidates([name], TABLE)[0] for name in ("Pulmonary Tuberculosis", "肺结核"))
    assert vars(english) | {"name": ""} == vars(chinese) | {"name": ""}


def test_the_default_is_what_is_calibrated():
    assert [label.name for label in choose_candidates(None, TABLE)] == ["tb"]
    with pytest.raises(ValueError, match="no calibrated labels to take by default"):
        choose_candidates(None, default_diagnosis())


def test_own_phrases_make_a_label_of_their_own():
    own = {"present": "Miliary nodules.", "absent": ["No miliary nodules."]}
    miliary, tb = choose_candidates({"miliary": own, "结核": None}, TABLE)
    assert (miliary.key, miliary.present, miliary.absent) == (None, ("Miliary nodules.",), ("No miliary nodules.",))
    assert (tb.key, tb.threshold) == ("tb", 0.4)
    # Phrases that were not calibrated have no calibration, whatever they are called.
    [renamed] = choose_candidates({"tb": own}, TABLE)
    assert renamed.key is renamed.calibration is renamed.threshold is None
    [partly] = choose_candidates({"mine": {"finding": "TB", "present": {"en": ["Upper lobe cavity."]}}}, TABLE)
    assert (partly.key, partly.present) == ("tb", ("Upper lobe cavity.", "考虑肺结核。"))
    assert partly.absent == choose_candidates(["tb"], TABLE)[0].absent
    assert partly.calibration is None
    [found] = choose_candidates({"mine": {"finding": "TB"}}, TABLE)
    assert (found.name, found.threshold) == ("mine", 0.4)
    # Labels that exclude each other need no absence.
    labels = choose_candidates({"a": {"present": ["A."]}, "b": {"present": ["B."]}}, {}, exclusive=True)
    assert [label.absent for label in labels] == [(), ()]


@pytest.mark.parametrize(
    ("candidates", "message"),
    [
        (["tubercolosis"], "'tubercolosis' is not a known label; expected for instance tuberculosis"),
        (["肺结合"], "expected for instance .*tuberculosis"),
        (["TB", "结核"], "each label once, got 'TB' and '结核'"),
        (["Pneumonia", "pneumonia"], "each label once"),
        ({"a": {"finding": "tb"}, "tuberculosis": None}, "each label once, got 'a' and 'tuberculosis'"),
        ([], "a candidate label or more, got 0"),
        (7, "names or a mapping, got int"),
        ([3], "to be a name, got 3"),
        (["  "], "to be a name"),
        ({"a": ["x"]}, "mapping of finding, present and absent, got list"),
        ({"a": {"here": ["x"]}}, "got here"),
        ({"a": {"present": []}}, "present to be one phrase or more"),
        ({"a": {"present": [3], "absent": ["x"]}}, "present to be one phrase or more"),
        ({"a": {"present": {"en": [" "]}, "absent": ["x"]}}, "present to be one phrase or more"),
        ({"a": {"present": ["x"]}}, "'a' is not a known label"),
        ({"a": {"finding": 3}}, "finding to be a name, got 3"),
        ({"a": {"present": ["No TB"], "absent": ["no tb."]}}, "'no tb.' stands in both present and absent"),
        (
            {"a": {"present": ["X."], "absent": ["Y."]}, "b": {"present": ["x"], "absent": ["Z."]}},
            "each label once, got 'a' and 'b'",
        ),
    ],
)
def test_wrong_labels_are_refused(candidates, message):
    with pytest.raises(ValueError, match=message):
        choose_candidates(candidates, default_diagnosis())


def test_exclusive_labels_are_two_or_more():
    with pytest.raises(ValueError, match="two candidate labels that exclude each other or more, got 1"):
        choose_candidates(["tb"], TABLE, exclusive=True)


def test_without_labels_phrases_are_asked_for():
    with pytest.raises(ValueError, match="'tb' is not a known label; the checkpoint has none: expected phrases"):
        choose_candidates(["tb"], {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"present": {}}, r"diagnosis\['tb'\] expected present to map languages to phrases"),
        ({"absent": {"en": "No TB."}}, "expected absent to map languages to phrases"),
        ({"phrases": {}}, r"got unknown \['phrases'\]"),
        ({"calibration": {"scale": 0.0, "bias": 0.0}}, "a scale > 0 and a bias"),
        ({"calibration": {"scale": -1.0, "bias": 0.0}}, "a scale > 0 and a bias"),
        ({"calibration": {"scale": float("nan"), "bias": 0.0}}, "a scale > 0 and a bias"),
        ({"calibration": {"scale": 1.0}}, "a scale > 0 and a bias"),
        ({"threshold": 1.5}, "a probability from 0 to 1, got 1.5"),
        ({"also_absent": ["edema"]}, r"other labels of the table, got \['edema'\]"),
        ({"also_absent": ["tb"]}, r"other labels of the table, got \['tb'\]"),
        ({"aliases": ["Normal"]}, "'Normal' belongs to both 'normal' and 'tb'"),
        ({"aliases": "TB"}, "aliases to be a list of names"),
        ({"names": {"en": 3}}, "names to map languages to a name"),
    ],
)
def test_a_damaged_table_is_refused(change, message):
    table = deepcopy(TABLE)
    table["tb"] |= change
    with pytest.raises(ValueError, match=message):
        check_diagnosis(table)
    with pytest.raises(ValueError, match=message):
        M3FMConfig(diagnosis=table)


def test_the_table_can_be_read_in_the_saved_config(tmp_path):
    M3FMConfig(diagnosis=TABLE, diagnosis_report_weight=0.5).save_pretrained(tmp_path)
    assert "考虑肺结核。" in (tmp_path / "config.json").read_text(encoding="utf-8")
    again = M3FMConfig.from_pretrained(tmp_path)
    assert (again.diagnosis, again.diagnosis_report_weight) == (TABLE, 0.5)


def test_labels_are_means_of_unit_vectors():
    vectors = {"a": [2.0, 0, 0], "b": [0, 1.0, 0], "c": [0, 0, 3.0]}
    asked = []

    def embed(texts):
        asked.extend(texts)
        return np.array([vectors[text] for text in texts])

    found = mean_phrases([["a", "b"], ["c", "a"], []], embed)
    half = 0.5**0.5
    np.testing.assert_allclose(found, [[half, half, 0], [half, 0, half], [0, 0, 0]])
    assert asked == ["a", "b", "c"]


def test_scores_are_presence_against_absence_or_a_softmax():
    eye = np.eye(3)
    images = np.array([[0.6, 0.8, 0], [0, 0, 1]])
    logits = zero_shot_logits(images, eye[:2], eye[[2, 2]], 5.0)
    np.testing.assert_allclose(logits, [[3, 4], [-5, -5]])
    shared = logistic(zero_shot_logits(images, eye, -eye, 5.0, exclusive=True))
    expected = np.exp(5 * images) / np.exp(5 * images).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(shared, expected, atol=1e-4)
    # Rounding of features does not rank equal images.
    assert len(set(zero_shot_logits(images[[0, 0]] + [[0], [1e-7]], eye[:1], eye[1:2], 5.0)[:, 0])) == 1


def test_a_calibration_keeps_the_order():
    logits = np.round(np.random.default_rng(0).normal(size=200) * 5, 4)
    calibrated = logistic(calibrate_logits(logits, {"scale": 0.3, "bias": -2.0}))
    np.testing.assert_array_equal(np.argsort(logits, kind="stable"), np.argsort(calibrated, kind="stable"))
    assert calibrate_logits(logits, None) is logits
