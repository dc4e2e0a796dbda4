# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Full supervision from a recipe to a classifier, on made-up images."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageClassification

from m3fm.data import load_studies
from m3fm.evaluation.label_file import parse_labels
from m3fm.training.classify import (
    HEAD_FILE,
    BalancedSampler,
    ClassifyCollator,
    ClassifyRecipe,
    ClassifyTrainer,
    build_classifier,
    load_examples,
    prepare_features,
    start_head,
)
from m3fm.training.features import FeatureCache
from m3fm.training.generated_reports import hash_writer
from m3fm.training.recipe import find_recipe, run_recipe
from m3fm.training.supervision import UNCERTAIN, choose_balance, diagnosis_loss, make_examples, read_label_table

pytest.importorskip("accelerate")
pytest.importorskip("sklearn")

NAN = math.nan
LABELS = parse_labels(["pleural_effusion", "no_finding"]).labels


@pytest.fixture
def tiny_checkpoint(tiny_checkpoint: Path) -> Path:
    """Returns the tiny checkpoint, its reports short: an untrained writer finds no end."""
    path = tiny_checkpoint / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_new_tokens": 6}), encoding="utf-8")
    return tiny_checkpoint


@pytest.fixture
def classify_recipe(tmp_path, write_recipe, tiny_checkpoint):
    """Returns a function that writes a recipe of full supervision on the made-up images."""

    def write(**values) -> Path:
        path = write_recipe(
            "write",
            **{
                "recipe": "classify",
                "base": str(tiny_checkpoint),
                "sets": ["reported", "labelled"],
                "labels": ["pleural_effusion"],
                "report_cache": str(tmp_path / "reports"),
                "output_dir": str(tmp_path / "head"),
                **values,
            },
        )
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        unwanted = ("text_sets:", "parallel_sets:", "memory:", "validation_set:", "max_text_length:")
        kept, skipping = [], False
        for line in lines:
            skipping = line.startswith(unwanted) or (skipping and line[0] in " -")
            kept += [] if skipping else [line]
        path.write_text("".join(kept), encoding="utf-8")
        return path

    return write


def recipe_for(made_up_data, tmp_path, base, **values) -> ClassifyRecipe:
    folders = {"feature_cache": str(tmp_path / "features"), "report_cache": str(tmp_path / "reports")}
    given = {"sets": ["reported", "labelled"], "labels": ["pleural_effusion"]}
    return ClassifyRecipe(data_root=str(made_up_data), base=str(base), **{**folders, **given, **values})


# --- what is learned -------------------------------------------------------------------------------------------------


def test_training_and_validation_are_the_parts_of_the_sets(made_up_data):
    recipe = ClassifyRecipe(data_root=str(made_up_data), sets=["reported", "labelled"], labels="pleural_effusion")
    train, held, labels, facts = load_examples(recipe)
    assert [label.name for label in labels] == ["pleural_effusion"]
    assert {study.study_id for study in train.studies} == {"0", "1", "2", "3", "6", "7", "10", "11"}
    assert {study.study_id for study in held.studies} == {"4", "5", "8", "9"}
    for part in (train, held):
        assert [int(study.study_id) % 2 for study in part.studies] == part.labels[:, 0].tolist()
    assert facts == {"exclusive": False, "left_out_for_shared_patients": 0}


def test_training_studies_of_validation_patients_are_left_out(made_up_data):
    path = made_up_data / "reported" / "metadata.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        row["patient_id"] = "shared" if row["file_name"] in ("4.png", "6.png") else row["file_name"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    kinds = {
        kind: load_examples(
            ClassifyRecipe(
                data_root=str(made_up_data), sets="reported", labels="pleural_effusion", shared_patients=kind
            )
        )
        for kind in ("leave_out", "keep")
    }
    ids = {kind: {study.study_id for study in train.studies} for kind, (train, *_) in kinds.items()}
    assert ids["keep"] - ids["leave_out"] == {"6"}
    assert kinds["leave_out"][3]["left_out_for_shared_patients"] == 1


def test_exclusive_labels_need_exactly_one_present(made_up_data):
    studies = load_studies(made_up_data / "reported")
    table = {studies[0].study_id: {"pleural_effusion": 1.0, "no_finding": 1.0}}
    both = make_examples(studies[:3], LABELS, table, NAN, exclusive=True)
    assert [study.study_id for study in both.studies] == ["1", "2"]
    assert both.labels.tolist() == [[1.0, 0.0], [0.0, 1.0]]


@pytest.mark.parametrize(("policy", "value"), [("ignore", NAN), ("positive", 1.0), ("negative", 0.0), ("half", 0.5)])
def test_uncertain_labels_become_what_the_policy_says_in_training_alone(policy, value, made_up_data, tmp_path):
    table = tmp_path / "labels.csv"
    lines = [
        "file_name,Pleural Effusion,age",
        "reported/0.png,-1,40",
        "1.png,1.0,",
        "2.png,0,50",
        "4.png,-1,",
        "5.png,1,",
    ]
    table.write_text("\n".join(lines), encoding="utf-8")
    recipe = ClassifyRecipe(
        data_root=str(made_up_data),
        sets=["reported"],
        labels=["pleural_effusion"],
        label_table=str(table),
        uncertain=policy,
    )
    train, held, _, _ = load_examples(recipe)
    known = {study.study_id: labels[0] for study, labels in zip(train.studies, train.labels, strict=True)}
    assert known.get("0", NAN) == pytest.approx(value, nan_ok=True)
    assert (known["1"], known["2"]) == (1.0, 0.0)
    assert "4" not in {study.study_id for study in held.studies}


def test_wrong_tables_and_recipes_are_refused(made_up_data, tmp_path):
    table = tmp_path / "labels.csv"
    for text, message in (
        ("name,edema\n", "expected a column study_id or file_name"),
        ("study_id,edema\n", "expected a column for one of"),
        ("study_id,no_finding\n7,maybe\n", "line 2, no_finding: expected 1"),
    ):
        table.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            read_label_table(table, LABELS)
    with pytest.raises(ValueError, match="no such label table"):
        read_label_table(tmp_path / "none.csv", LABELS)
    with pytest.raises(ValueError, match=r"Expected features to be one of .*'fused'\], got 'both'"):
        ClassifyRecipe(features="both")
    with pytest.raises(ValueError, match="Expected sets to learn from"):
        load_examples(ClassifyRecipe())
    given = {"data_root": str(made_up_data), "sets": ["reported"]}
    with pytest.raises(ValueError, match="'tuberculosis': expected training studies with and without it, got 0 with"):
        load_examples(ClassifyRecipe(**given, labels=["tuberculosis"]))
    with pytest.raises(ValueError, match="nearest|for instance"):
        load_examples(ClassifyRecipe(**given, labels=["effusionn"]))
    with pytest.raises(ValueError, match="1 of them are not"):
        load_examples(ClassifyRecipe(**given, labels=["pleural_effusion"], exclude=["77"]))


# --- imbalance -------------------------------------------------------------------------------------------------------


def test_the_loss_counts_known_labels_and_weighs_present_ones():
    logits, labels = torch.tensor([[0.3, -1.0], [2.0, 0.5]]), torch.tensor([[1.0, NAN], [NAN, 0.5]])
    first = -torch.sigmoid(logits[0, 0]).log()
    soft = [-torch.sigmoid(sign * logits[1, 1]).log() / 2 for sign in (1, -1)]
    torch.testing.assert_close(diagnosis_loss(logits, labels, None), (first + sum(soft)) / 2)
    weighted = (3 * first + 4 * soft[0] + soft[1]) / 2
    torch.testing.assert_close(diagnosis_loss(logits, labels, torch.tensor([3.0, 4.0])), weighted)
    assert diagnosis_loss(logits, torch.full((2, 2), NAN), None).item() == 0.0


def test_weights_shift_log_odds_by_what_is_taken_back():
    labels = np.array([[1.0], [0.0], [0.0], [0.0], [NAN], [0.0]])
    none, weights, sampling = (
        choose_balance(labels, kind, exclusive=False) for kind in ("none", "weights", "sampling")
    )
    assert none.label_weights is None and none.study_weights is None and none.shift.tolist() == [0.0]
    assert weights.label_weights.tolist() == [4.0]
    assert sampling.study_weights.tolist() == [4.0, 1.0, 1.0, 1.0, 0.0, 1.0]
    np.testing.assert_allclose([weights.shift, sampling.shift], np.log([[4.0], [4.0]]))
    exclusive = np.array([[1.0, 0.0]] * 3 + [[0.0, 1.0]])
    balanced = choose_balance(exclusive, "sampling", exclusive=True)
    assert balanced.study_weights[:3].sum() == pytest.approx(balanced.study_weights[3])


def test_a_sampler_draws_by_weight_and_by_the_number_of_the_epoch():
    sampler = BalancedSampler(np.array([0.0, 1.0, 3.0] * 100), seed=1)
    first = list(sampler)
    assert list(sampler) == first and len(first) == 300
    counts = np.bincount(np.array(first) % 3, minlength=3)
    assert counts[0] == 0 and 2 < counts[2] / counts[1] < 4.5
    sampler.set_epoch(1)
    assert list(sampler) != first


# --- the run ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("features", ["image", "report", "fused"])
def test_a_run_gives_a_classifier_that_loads(features, classify_recipe, tmp_path):
    facts = run_recipe(classify_recipe(features=features, balance="weights", language="zh"))
    folder = tmp_path / "head"
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    assert model.config.id2label == {0: "pleural_effusion"} and model.config.label2id == {"pleural_effusion": 0}
    assert model.config.classifier_features == features
    assert model.config.problem_type == "multi_label_classification"
    assert {"eval_auroc_pleural_effusion", "eval_auroc_macro"} <= set(facts["validation"])
    assert (facts["train_studies"], facts["validation_studies"]) == (8, 4)
    head = json.loads((folder / HEAD_FILE).read_text(encoding="utf-8"))
    assert head["thresholds"] == facts["thresholds"] and 0 < head["thresholds"]["pleural_effusion"] < 1
    assert head["report_language"] == (None if features == "image" else "zh")
    assert (folder / "curves.png").is_file() and (folder / "training.json").is_file()
    written = list((tmp_path / "reports").glob("*-zh-*.jsonl"))
    assert len(written) == (0 if features == "image" else 2)


def test_the_writer_of_reports_is_known_by_what_they_depend_on(tiny_checkpoint):
    before = hash_writer(tiny_checkpoint)
    for name, change, differs in (
        ("config.json", {"diagnosis": {}}, False),
        ("training.json", {}, False),
        ("generation_config.json", {"max_new_tokens": 7}, True),
    ):
        path = tiny_checkpoint / name
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        path.write_text(json.dumps(content | change), encoding="utf-8")
        assert (hash_writer(tiny_checkpoint) != before) == differs


def test_reports_are_written_once_and_never_the_references(made_up_data, tmp_path, tiny_checkpoint, monkeypatch):
    recipe = recipe_for(made_up_data, tmp_path, tiny_checkpoint, features="report")
    train, held, labels, _ = load_examples(recipe)
    model, processor, base = build_classifier(recipe, labels, exclusive=False)
    cache = FeatureCache(recipe.feature_cache, model.model.vision_model, processor.image_processor)
    first = prepare_features(recipe, model, processor, base, cache, (train, held))
    reports = [
        json.loads(line)["report"]
        for path in (tmp_path / "reports").glob("*.jsonl")
        for line in path.read_text(encoding="utf-8").splitlines()
    ]
    assert len(reports) == 12
    assert set(reports).isdisjoint(text for study in train.studies for text in study.reports.values())
    monkeypatch.setattr("m3fm.M3FMForReportGeneration.generate", None)
    again = prepare_features(recipe, model, processor, base, cache, (train, held))
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one.report_embeds, other.report_embeds)
        torch.testing.assert_close(one.report_embeds.norm(dim=-1), torch.ones(len(one.studies)))


def test_a_head_starts_as_the_logistic_regression_on_its_features(made_up_data, tmp_path, tiny_checkpoint):
    recipe = recipe_for(made_up_data, tmp_path, tiny_checkpoint)
    train, _, labels, facts = load_examples(recipe)
    model, processor, base = build_classifier(recipe, labels, facts["exclusive"])
    cache = FeatureCache(recipe.feature_cache, model.model.vision_model, processor.image_processor)
    cache.fill(train.studies)
    collator = ClassifyCollator(train, recipe, cache, processor, exclusive=False)
    start_head(model, collator, np.zeros(1), seed=0)
    model.eval()
    with torch.inference_mode():
        outputs = model(**{name: each for name, each in collator(list(range(8))).items() if name != "study_ids"})
    without = diagnosis_loss(torch.zeros(8, 1), torch.from_numpy(train.labels).float(), None)
    assert diagnosis_loss(outputs.logits, torch.from_numpy(train.labels).float(), None) < without
    bias = model.classifier.bias.clone()
    start_head(model, collator, np.ones(1), seed=0)
    torch.testing.assert_close(model.classifier.bias, bias + 1)


def test_what_is_frozen_stays_and_the_rest_is_trained(classify_recipe, tmp_path, tiny_checkpoint):
    before = AutoModelForImageClassification.from_pretrained(tiny_checkpoint, num_labels=1).state_dict()
    run_recipe(classify_recipe(head_start="random"))
    after = AutoModelForImageClassification.from_pretrained(tmp_path / "head").state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any(name.startswith("model.visual_projection.") for name in changed)
    assert not [name for name in changed if name.startswith(("model.vision_model.", "model.text_"))]

    run_recipe(classify_recipe(train_projection=False, output_dir=str(tmp_path / "frozen")))
    frozen = AutoModelForImageClassification.from_pretrained(tmp_path / "frozen").state_dict()
    assert {name for name in before if not torch.equal(before[name], frozen[name])} == {
        "classifier.weight",
        "classifier.bias",
    }

    run_recipe(classify_recipe(train_tower=True, output_dir=str(tmp_path / "tower")))
    tower = AutoModelForImageClassification.from_pretrained(tmp_path / "tower").state_dict()
    assert any(
        name.startswith("model.vision_model.") and not torch.equal(before[name], tower[name]) for name in before
    )


def test_calibration_of_the_untrained_space_is_dropped_with_it(made_up_data, tmp_path, tiny_checkpoint):
    path = tiny_checkpoint / "config.json"
    entry = {"present": {"en": ["Effusion."]}, "absent": {"en": ["No effusion."]}}
    fitted = entry | {"calibration": {"scale": 1.5, "bias": 0.0}, "threshold": 0.4, "fitted_on": "a set"}
    config = json.loads(path.read_text(encoding="utf-8")) | {"diagnosis": {"pleural_effusion": fitted}}
    path.write_text(json.dumps(config), encoding="utf-8")
    for trained, expected in ((True, entry), (False, fitted)):
        recipe = recipe_for(made_up_data, tmp_path, tiny_checkpoint, train_projection=trained)
        model, _, _ = build_classifier(recipe, LABELS, exclusive=False)
        assert model.config.diagnosis == {"pleural_effusion": expected}


@pytest.mark.parametrize("balance", ["none", "sampling"])
def test_a_resumed_run_is_the_run_it_resumes(balance, classify_recipe, run_interrupted, tmp_path):
    values = {"balance": balance, "features": "fused", "max_steps": 4, "save_steps": 1, "dropout": 0.2}
    whole = run_recipe(classify_recipe(**values, output_dir=str(tmp_path / "whole")))
    broken = classify_recipe(**values, output_dir=str(tmp_path / "broken"))
    run_interrupted(ClassifyTrainer, broken, 3)
    resumed = run_recipe(broken)
    assert resumed["validation"] == whole["validation"] and resumed["thresholds"] == whole["thresholds"]
    first, second = (AutoModelForImageClassification.from_pretrained(tmp_path / name) for name in ("whole", "broken"))
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


def test_labels_that_exclude_each_other_compete(classify_recipe, tmp_path):
    facts = run_recipe(classify_recipe(labels=["pleural_effusion", "no_finding"], exclusive=True, balance="weights"))
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "head")
    assert model.config.problem_type == "single_label_classification"
    assert facts["exclusive"] and set(facts["thresholds"]) == {"pleural_effusion", "no_finding"}


def test_the_recipe_that_ships_is_one():
    import yaml

    values = yaml.safe_load(find_recipe("classify-small").read_text(encoding="utf-8"))
    assert values.pop("recipe") == "classify"
    fields = {name: values[name] for name in values if name in ClassifyRecipe.__dataclass_fields__}
    assert ClassifyRecipe(**fields).features == "image"
    assert UNCERTAIN == -1.0
