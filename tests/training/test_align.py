# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Stage 1 from a recipe to a checkpoint, on twelve made-up images."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

import m3fm
from m3fm import M3FMModel
from m3fm.training.align import AlignCollator, AlignRecipe, AlignValidation, build_model, load_training_studies
from m3fm.training.runs import run_recipe

pytest.importorskip("accelerate")


def logged(history: list[dict], name: str) -> list[int]:
    return [entry["step"] for entry in history if name in entry]


def recipe_of(made_up_data, **values) -> AlignRecipe:
    sets = {"image_sets": {"reported": 1, "labelled": 3}, "text_sets": {"texts": 2}, "parallel_sets": ["texts"]}
    return AlignRecipe(data_root=str(made_up_data), **{**sets, **values})


def test_studies_are_repeated_left_out_and_held_apart(made_up_data):
    train, validation, pairs = load_training_studies(recipe_of(made_up_data, exclude=["0"]))
    counted = {}
    for study in train:
        key = (study.source, study.study_id)
        counted[key] = counted.get(key, 0) + 1
    assert {count for (source, _), count in counted.items() if source == "labelled"} == {3}
    assert {count for (source, _), count in counted.items() if source == "texts"} == {2}
    assert ("reported", "0") not in counted and ("reported", "1") in counted
    assert sum(source == "texts" for source, _ in counted) == 2 * 3 - 1, "three reports and their translations"
    assert {study.split for study in train} == {"train"}
    assert {study.split for study in validation} == {"validation"}
    assert [pair.study_id for pair in pairs] == ["3"]
    trained = {text for study in train for text in study.reports.values()}
    assert not trained & {text for pair in pairs for text in pair.texts.values()}
    assert not trained & {text for study in validation for text in study.reports.values()}


def test_a_batch_says_what_belongs_together(made_up_data, tiny_processor):
    train, _, _ = load_training_studies(recipe_of(made_up_data))
    reported, labelled, text_only = (
        next(study for study in train if study.source == source and len(study.reports) == languages)
        for source, languages in (("reported", 2), ("labelled", 0), ("texts", 1))
    )
    collator = AlignCollator(tiny_processor, ("en", "zh"), AlignRecipe(freeze_vision=False), cache=None)
    batch = collator([reported, text_only, labelled, reported])
    assert batch["image_study"].tolist() == [0, 2, 3]
    assert batch["pixel_values"].shape == (3, 1, 3, 28, 28)
    assert batch["text_study"].tolist() == [0, 0, 1, 2, 2, 3, 3]
    assert batch["text_language"].tolist() == [0, 1, 0, 0, 1, 0, 1]
    numbers = batch["text_number"].tolist()
    assert numbers[:2] == numbers[5:] and len(set(numbers)) == 5, "equal texts have one number"
    assert batch["has_report"].tolist() == [True, True, False, True]
    assert len(batch["input_ids"]) == 7
    only_texts = collator([text_only])
    assert "pixel_values" not in only_texts and only_texts["image_study"].tolist() == []


def test_sentences_made_of_labels_change_and_are_translations(made_up_data, tiny_processor):
    train, _, _ = load_training_studies(recipe_of(made_up_data))
    ill = next(study for study in train if study.findings and study.findings.get("pleural_effusion"))
    ill = type(ill)(**{**vars(ill), "reports": {}})
    collator = AlignCollator(tiny_processor, ("en", "zh"), AlignRecipe(freeze_vision=False), cache=None)
    drawn = [collator._texts(ill) for _ in range(20)]
    assert len({texts["en"] for texts in drawn}) > 1
    chinese = {}
    for texts in drawn:
        assert chinese.setdefault(texts["en"], texts["zh"]) == texts["zh"]


def test_the_tower_is_the_pretrained_one(write_recipe, tmp_path, tiny_config):
    write_recipe("align")
    recipe = AlignRecipe(vision_model=str(tmp_path / "tower"), tokenizer=str(m3fm.DEFAULT_CHECKPOINT))
    recipe.model = {"text_encoder_config": tiny_config.text_encoder_config, "text_config": tiny_config.text_config}
    model, processor = build_model(recipe)
    for name, weight in AutoModel.from_pretrained(tmp_path / "tower").state_dict().items():
        assert torch.equal(model.vision_model.state_dict()[name], weight), name
    assert not any(weight.requires_grad for weight in model.vision_model.parameters())
    assert processor.image_processor.size == {"height": 224, "width": 224}


def test_a_run_leaves_everything_and_resumes(write_recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(AlignValidation, "minimum", 1)
    facts = run_recipe(write_recipe("align"))
    folder = tmp_path / "align"
    assert facts["steps"] == 3 and facts["stage"] == "align"
    assert facts["train_studies"] == 6 + 2 + 6 - 0
    assert json.loads((folder / "run.json").read_text()) == json.loads(json.dumps(facts))
    history = json.loads((folder / "history.json").read_text())
    assert logged(history, "loss") == [1, 2, 3]
    scores = next(entry for entry in history if "eval_auroc" in entry)
    assert {"eval_r10_image_en", "eval_r10_image_zh", "eval_r1_en_zh", "eval_auroc_reported"} <= set(scores)
    assert (folder / "curves.png").stat().st_size > 5000
    assert not list(folder.glob("*.bin")), "what is passed on holds no pickle"
    first = M3FMModel.from_pretrained(folder)

    facts = run_recipe(write_recipe("align"), ["--max_steps", "5"])
    assert facts["steps"] == 5
    history = json.loads((folder / "history.json").read_text())
    assert logged(history, "loss") == [1, 2, 3, 4, 5], "it goes on at step 4"
    second = M3FMModel.from_pretrained(folder)
    assert not torch.equal(first.text_projection.weight, second.text_projection.weight)
    for name, weight in AutoModel.from_pretrained(tmp_path / "tower").state_dict().items():
        assert torch.equal(second.vision_model.state_dict()[name], weight), "the tower stays frozen"


def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(write_recipe, tmp_path):
    values = {"image_sets": {"reported": 1}, "eval_strategy": "no"}  # no sentence is drawn at random
    straight = write_recipe("align", **values, output_dir=str(tmp_path / "straight"))
    run_recipe(straight, ["--max_steps", "5"])
    interrupted = write_recipe("align", **values, output_dir=str(tmp_path / "interrupted"))
    run_recipe(interrupted)
    run_recipe(interrupted, ["--max_steps", "5"])
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("straight", "interrupted")]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, atol=1e-5, rtol=1e-4, msg=name)


def test_a_tower_can_be_trained_too(write_recipe, tmp_path):
    recipe = write_recipe("align", text_sets={}, parallel_sets=[])
    facts = run_recipe(recipe, ["--freeze_vision", "false", "--max_steps", "1"])
    assert facts["vision"] == "trained"
    before = AutoModel.from_pretrained(tmp_path / "tower").embeddings.patch_embeddings
    after = M3FMModel.from_pretrained(tmp_path / "align").vision_model.embeddings.patch_embeddings
    assert not torch.equal(before.projection.weight, after.projection.weight)
    assert not (tmp_path / "features").exists()


def test_training_brings_the_loss_down(write_recipe, tmp_path):
    run_recipe(write_recipe("align"), ["--max_steps", "30", "--eval_strategy", "no"])
    history = json.loads((tmp_path / "align" / "history.json").read_text())
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])


def test_a_batch_of_one_language_without_images_is_no_error(write_recipe):
    recipe = write_recipe("align", image_sets={}, parallel_sets=[], eval_strategy="no")
    assert run_recipe(recipe, ["--max_steps", "1"])["steps"] == 1


def test_validation_scores_what_there_is(write_recipe):
    recipe = write_recipe("align", image_sets={}, eval_steps=1)
    assert set(run_recipe(recipe, ["--max_steps", "1"])["validation"]) == {"eval_r1_en_zh"}
