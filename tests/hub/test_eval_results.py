# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Results get into the two formats of the Hub, as huggingface_hub reads them, and again without change."""

import json

import pytest
import yaml
from huggingface_hub import ModelCard, metadata_load, parse_eval_result_entries
from huggingface_hub.repocard_data import model_index_to_eval_results

from m3fm.hub.eval_results import benchmark_entries, card_results, main

CARD = """---
license: cc-by-nc-sa-4.0
language:
- en
- zh
tags:
- 胸片
inference: false
---

# m3fm-small

Text with --- in it.
"""


def report(bleu=0.52943):
    scores = {"bleu_4": bleu, "cider_d": None, "finding_f1_micro": 0.4, "distinct": 0.5}
    return {
        "task": "report",
        "model": "m3fm-small",
        "data": "cov_ctr",
        "split": "validation",
        "rows": {"model": {"en": scores, "zh": scores}, "constant_report": {"en": {"bleu_4": 0.527}}},
        "intervals": {"model": {"en": {"bleu_4": [0.48, 0.58]}, "zh": {"bleu_4": [None, None]}}},
    }


def diagnosis(shots):
    scores = {"auroc": 0.8, "ece": 0.1, "prevalence": 0.2}
    columns = {"nodule": scores, "mass": scores, "macro": scores}
    return {
        "task": "diagnosis",
        "model": "m3fm-small",
        "data": "nih",
        "split": "test",
        "shots": shots,
        "rows": {"model": columns},
    }


@pytest.fixture
def card(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(CARD, encoding="utf-8")
    return path


def write(tmp_path, name, metrics):
    path = tmp_path / f"{name}.json"
    path.write_text(json.dumps(metrics), encoding="utf-8")
    return str(path)


def test_scores_carry_interval_and_floor():
    results = card_results(report())
    assert [(each.dataset_config, each.metric_type, each.metric_value) for each in results] == [
        ("en", "bleu", 0.5294),
        ("en", "f1", 0.4),
        ("zh", "bleu", 0.5294),
        ("zh", "f1", 0.4),
    ]
    assert results[0].metric_name == "BLEU-4, English (95 % interval 0.480 to 0.580; constant report 0.527)"
    assert results[2].metric_name == "BLEU-4, Chinese"
    assert {(each.task_type, each.dataset_type, each.dataset_split) for each in results} == {
        ("image-text-to-text", "cov_ctr", "validation")
    }
    assert card_results(report(), "acme/cov-ctr")[0].dataset_type == "acme/cov-ctr"


def test_labels_give_auroc_alone_and_trainings_are_told_apart():
    zero = card_results(diagnosis(0))
    assert [(each.dataset_config, each.metric_type) for each in zero] == [
        ("nodule", "roc_auc"),
        ("mass", "roc_auc"),
        ("macro", "roc_auc"),
        ("macro", "ece"),
    ]
    keys = [{each.unique_identifier for each in card_results(diagnosis(shots))} for shots in (0, 8, "full")]
    assert not keys[0] & keys[1] and not keys[1] & keys[2]
    assert [card_results(diagnosis(shots))[0].task_type for shots in (0, 8)] == [
        "zero-shot-image-classification",
        "image-classification",
    ]


def test_card_keeps_its_text_and_keys_and_repeats(tmp_path, card):
    runs = [write(tmp_path, "report", report()), write(tmp_path, "diagnosis", diagnosis(8))]
    main([*runs, "--card", str(card)])
    first = card.read_bytes()
    before, after = yaml.safe_load(CARD.split("---\n")[1]), metadata_load(card)
    assert list(after) == [*before, "model-index"]
    assert {key: after[key] for key in before} == before
    assert first.decode().endswith("---\n" + CARD.split("---\n", 2)[2])
    loaded = ModelCard.load(card)
    assert loaded.data.model_name == "m3fm-small" and len(loaded.data.eval_results) == 4 + 4
    main([*runs, "--card", str(card)])
    assert card.read_bytes() == first


def test_new_results_replace_those_of_the_same_data_and_leave_others(tmp_path, card):
    main([write(tmp_path, "diagnosis", diagnosis(0)), write(tmp_path, "old", report()), "--card", str(card)])
    main([write(tmp_path, "new", report(bleu=0.6)), "--card", str(card)])
    _, results = model_index_to_eval_results(metadata_load(card)["model-index"])
    assert sum(each.dataset_name == "nih" for each in results) == 4
    assert [each.metric_value for each in results if each.metric_type == "bleu"] == [0.6, 0.6]


def test_benchmarks_get_entries_that_huggingface_hub_parses(tmp_path, capsys):
    runs = [write(tmp_path, "report", report()), write(tmp_path, "diagnosis", diagnosis(0))]
    url = "https://example.org/run"
    command = [*runs, "--folder", str(tmp_path / "repo"), "--benchmark", "cov_ctr=acme/cov-ctr", "--source-url", url]
    main(command)
    (path,) = (tmp_path / "repo" / ".eval_results").iterdir()
    first = path.read_bytes()
    entries = parse_eval_result_entries(yaml.safe_load(first))
    assert path.name == "cov_ctr_report_validation.yaml"
    assert entries == benchmark_entries(report(), "acme/cov-ctr", url)
    assert [entry.task_id for entry in entries[:2]] == ["en_bleu_4", "en_finding_f1_micro"]
    assert entries[0].value == 0.5294 and entries[0].source_url == url and entries[0].date is None
    assert "part validation" in entries[0].notes and "constant report 0.527" in entries[0].notes
    assert "nih: no benchmark on the Hub is named for it" in capsys.readouterr().out
    main(command)
    assert path.read_bytes() == first


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--benchmark", "cov_ctr=cov-ctr"], "as 'owner/name', got 'cov-ctr'"),
        (["--card", "nowhere.md"], "no such model card"),
        ([], "nowhere to go"),
    ],
)
def test_wrong_arguments_are_told(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit):
        main([write(tmp_path, "report", report()), *arguments])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("content", ["no json", "{}", '{"task": "parallel", "model": "m", "data": "d", "split": "s"}'])
def test_other_files_are_refused(tmp_path, capsys, content):
    path = tmp_path / "other.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(SystemExit):
        main([str(path)])
    assert "expected a metrics.json of m3fm evaluate" in capsys.readouterr().err


def test_a_card_is_of_one_model(tmp_path, card, capsys):
    runs = [write(tmp_path, name, report() | {"model": name}) for name in ("mine", "yours")]
    with pytest.raises(SystemExit):
        main([*runs, "--card", str(card)])
    assert "results of one model for one card, got ['mine', 'yours']" in capsys.readouterr().err


def test_results_without_scores_are_refused():
    with pytest.raises(ValueError, match="Expected scores of a model"):
        card_results({"task": "parallel", "model": "m", "data": "d", "split": "s", "rows": {}})


def test_a_damaged_card_is_refused(tmp_path, card, capsys):
    card.write_text(CARD.replace("inference: false", "model-index: [1]"), encoding="utf-8")
    with pytest.raises(SystemExit):
        main([write(tmp_path, "report", report()), "--card", str(card)])
    assert "its model-index is not valid" in capsys.readouterr().err
