# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
import pytest

from m3fm.evaluation.modules import MODULES, module_path
from m3fm.evaluation.text_metrics import score_reports


@pytest.fixture
def load(monkeypatch, tmp_path):
    """Returns a function that loads one of our modules, offline, with a cache of its own."""
    evaluate = pytest.importorskip("evaluate")
    for name in ("HF_EVALUATE_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(evaluate.config, "HF_EVALUATE_OFFLINE", True)

    def refuse(*args, **kwargs):
        raise AssertionError("went to the network")

    monkeypatch.setattr("socket.socket.connect", refuse)
    return lambda name: evaluate.load(module_path(name), cache_dir=str(tmp_path))


PREDICTIONS = ["双肺清晰，未见异常。", "右侧胸腔积液。" * 300]
REFERENCES = ["双肺纹理清晰，未见异常。", "左侧胸腔积液。"]


def test_report_text_computes_what_score_reports_does(load):
    pytest.importorskip("nltk")
    metric = load("report_text")
    scores = metric.compute(predictions=PREDICTIONS, references=REFERENCES, language="zh")
    assert scores == pytest.approx(score_reports(PREDICTIONS, REFERENCES, "zh"))
    metric.add_batch(predictions=["clear lungs"], references=["the lungs are clear ."])
    metric.add(prediction="no effusion", reference="no effusion .")
    names = ["bleu_1", "rouge_l"]
    expected = score_reports(["clear lungs", "no effusion"], ["the lungs are clear .", "no effusion ."], "en", names)
    assert metric.compute(metrics=names) == pytest.approx(expected)


def test_report_findings_computes_what_the_clinical_scorer_does(load):
    metric = load("report_findings")
    right = ["Right pleural effusion.", "The lungs are clear."]
    same = metric.compute(predictions=right, references=right)
    assert same["finding_f1_micro"] == same["side_accuracy"] == 1
    assert same["findings"]["pleural_effusion"]["support"] == 1
    left = metric.compute(predictions=["Left pleural effusion.", "The lungs are clear."], references=right)
    assert left["finding_f1_micro"] == 1
    assert left["side_accuracy"] == left["located_f1_micro"] == 0
    assert metric.compute(predictions=PREDICTIONS[1:], references=REFERENCES[1:], language="zh")["side_accuracy"] == 0


def test_wrong_input_is_refused(load):
    with pytest.raises(ValueError, match="Unsupported language 'fr'"):
        load("report_text").compute(predictions=["a"], references=["a"], language="fr")
    with pytest.raises(ValueError, match=r"Unknown module 'report': expected one of"):
        module_path("report")


@pytest.mark.parametrize("name", MODULES)
def test_a_module_says_what_it_is(load, name):
    metric = load(name)
    assert metric.name == name
    assert "Chinese" in metric.description
    assert "language" in metric.inputs_description
    assert "@inproceedings" in metric.citation
