# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Stage 1 from a recipe to a checkpoint, on made-up images."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor

import m3fm
from m3fm import M3FMModel
from m3fm.training.align import AlignRecipe, AlignTrainer, build_model, load_training_studies, study_draws
from m3fm.training.align_batches import AlignCollator
from m3fm.training.align_scores import AlignValidation
from m3fm.training.backbones import fit_positions
from m3fm.training.recipe import run_recipe
from m3fm.training.study_images import StudyPixels

pytest.importorskip("accelerate")


def logged(history: list[dict], name: str) -> list[int]:
    return [entry["step"] for entry in history if name in entry]


def recipe_of(made_up_data, **values) -> AlignRecipe:
    sets = {"image_sets": {"reported": 1, "labelled": 3}, "text_sets": {"texts": 2}, "parallel_sets": ["texts"]}
    return AlignRecipe(data_root=str(made_up_data), **{**sets, **values})


def collator_of(processor, languages=("en", "zh"), **values) -> AlignCollator:
    blank = {"pixel_values": torch.zeros(1, 1, 3, 28, 28), "image_mask": torch.ones(1, 1, dtype=torch.bool)}
    return AlignCollator(StudyPixels(processor.image_processor), blank, processor.tokenizer, languages, **values)


def test_studies_are_repeated_left_out_and_held_apart(made_up_data):
    train, validation, pairs = load_training_studies(recipe_of(made_up_data, exclude=["0"]))
    counted = {}
    for study in train:
        key = (study.source, study.study_id)
        counted[key] = counted.get(key, 0) + 1
    assert {count for (source, _), count in counted.items() if source == "labelled"} == {3}
    assert {count for (source, _), count in counted.items() if source == "texts"} == {2}
    assert ("reported", "0") not in counted and ("reported", "1") in counted
    assert sum(source == "texts" for source, _ in counted) == 2 + 2, "with a study its translation is left out"
    assert {study.split for study in train} == {"train"}
    assert {study.split for study in validation} == {"validation"}
    assert [pair.study_id for pair in pairs] == ["3"]
    trained = {text for study in train for text in study.reports.values()}
    assert not trained & {text for pair in pairs for text in pair.texts.values()}
    assert not trained & {text for study in validation for text in study.reports.values()}


def test_studies_without_a_text_in_the_languages_are_left_out(made_up_data):
    sets = {"image_sets": {"labelled": 1}, "text_sets": {"texts": 1}}
    train, _, pairs = load_training_studies(recipe_of(made_up_data, languages=["zh"], **sets))
    counted = [(study.source, "zh" in study.reports) for study in train]
    assert set(counted) == {("labelled", False), ("texts", True)}, "what labels speak for stays"
    assert len(pairs) == 1


def test_parallel_text_of_a_set_that_is_not_read_is_refused(made_up_data):
    with pytest.raises(
        ValueError, match=r"parallel_sets: got \['texts'\], expected sets that text_sets or image_sets"
    ):
        load_training_studies(recipe_of(made_up_data, text_sets={}))


def test_no_part_but_that_for_training_is_trained_on(made_up_data):
    train, validation, pairs = load_training_studies(recipe_of(made_up_data))
    assert {study.split for study in train} == {"train"}
    told = [text for study in train + validation for text in study.reports.values()]
    told += [text for pair in pairs for text in pair.texts.values()]
    images = {path.name for study in train + validation for path in study.images}
    for of_test in ("view 12.", "视图12", "number 4", "心影4号"):
        assert not any(of_test in text for text in told), of_test
    assert not images & {"12.png", "13.png"}, "what a set calls a test is not looked at in training at all"


def test_a_left_out_study_must_exist(made_up_data):
    train, _, _ = load_training_studies(recipe_of(made_up_data, exclude=["10", "1"]))
    assert {study.study_id for study in train if study.source == "labelled"} == {"11"}
    assert "number 1" not in " ".join(text for study in train for text in study.reports.values())
    with pytest.raises(ValueError, match="Expected every id of `exclude` to be that of a study, 2 of") as error:
        load_training_studies(recipe_of(made_up_data, exclude=["1", "secret-7", "secret-8"]))
    assert "secret" not in str(error.value)


def test_a_batch_says_what_belongs_together(made_up_data, tiny_processor):
    train, _, _ = load_training_studies(recipe_of(made_up_data))
    reported, labelled, text_only = (
        next(study for study in train if study.source == source and len(study.reports) == languages)
        for source, languages in (("reported", 2), ("labelled", 0), ("texts", 1))
    )
    batch = collator_of(tiny_processor, label_share=0.0)([reported, text_only, labelled, reported])
    facts = batch["facts"]
    assert facts.image_study.tolist() == [0, 2, 3]
    assert batch["pixel_values"].shape == (3, 1, 3, 28, 28)
    assert batch["study_ids"] == [f"{s.source}/{s.study_id}" for s in (reported, text_only, labelled, reported)]
    assert facts.text_study.tolist() == [0, 0, 1, 2, 2, 3, 3]
    assert facts.text_language.tolist() == [0, 1, 0, 0, 1, 0, 1]
    numbers = facts.text_number.tolist()
    assert numbers[:2] == numbers[5:] and len(set(numbers)) == 5, "equal texts have one number"
    assert facts.has_report.tolist() == [True, True, False, True]
    assert len(batch["input_ids"]) == 7
    by_labels = collator_of(tiny_processor, label_share=1.0)([reported, text_only, labelled])
    assert by_labels["facts"].has_report.tolist() == [False, True, False]
    spoken = tiny_processor.tokenizer.batch_decode(by_labels["input_ids"], skip_special_tokens=True)
    assert not set(reported.reports.values()) & set(spoken) and text_only.reports["en"] in spoken


def test_a_batch_without_images_has_a_blank_one_that_counts_for_nothing(made_up_data, tiny_processor):
    train, _, _ = load_training_studies(recipe_of(made_up_data))
    text_only = next(study for study in train if study.source == "texts")
    batch = collator_of(tiny_processor)([text_only, text_only])
    assert batch["pixel_values"].shape == (1, 1, 3, 28, 28) and not batch["pixel_values"].any()
    assert batch["facts"].image_study.tolist() == []


def test_what_is_drawn_for_a_study_hangs_on_the_epoch_and_not_on_its_company(made_up_data, tiny_processor):
    train, _, _ = load_training_studies(recipe_of(made_up_data))
    labelled, other = [study for study in train if study.findings and not study.reports][:2]
    collator = collator_of(tiny_processor)

    def spoken(*studies):
        ids = collator(studies)["input_ids"][:2]
        return tiny_processor.tokenizer.batch_decode(ids, skip_special_tokens=True)

    first = spoken(labelled)
    assert spoken(labelled, other) == first
    drawn = []
    for epoch in range(20):
        collator.set_epoch(epoch)
        drawn.append(tuple(spoken(labelled)))
    assert drawn[0] == tuple(first) and len({english for english, _ in drawn}) > 1
    assert len(set(drawn)) == len({english for english, _ in drawn}), "the Chinese sentence is the translation"


def test_languages_that_the_model_has_no_token_for_are_passed_over(made_up_data, tiny_processor):
    train, _, _ = load_training_studies(recipe_of(made_up_data))
    reported = next(study for study in train if study.source == "reported")
    collator = collator_of(tiny_processor, languages=("zh",), label_share=0.0)
    batch = collator([reported])
    spoken = tiny_processor.tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)
    assert (spoken, batch["facts"].text_language.tolist()) == ([reported.reports["zh"]], [0])
    english_alone = replace(reported, reports={"en": reported.reports["en"]})
    assert collator([english_alone])["facts"].has_report.tolist() == [False], "its labels speak for it"


def test_epochs_can_be_balanced(made_up_data):
    train, _, _ = load_training_studies(recipe_of(made_up_data, image_sets={"reported": 1, "labelled": 1}))
    alike = AlignRecipe(balance=["source"], balance_temperature=1e9)
    draws = study_draws(train, alike)
    sources = [train[place].source for place in draws.draw(0, 0)]
    assert {name: sources.count(name) for name in set(sources)} == {"reported": 5, "labelled": 5, "texts": 4} or (
        max(sources.count(name) for name in set(sources)) - min(sources.count(name) for name in set(sources)) <= 1
    )
    languages = study_draws(train, AlignRecipe(balance=["languages", "modality"], balance_temperature=1e9))
    assert set(languages.shares) == {(("en", "zh"), "cxr"), ((), "cxr"), (("en",), "cxr")}
    assert len(study_draws(train, AlignRecipe())) == len(train)


def test_the_tower_is_the_pretrained_one(write_recipe, tmp_path, tiny_config):
    write_recipe("align")
    recipe = AlignRecipe(vision_model=str(tmp_path / "tower"), tokenizer=str(m3fm.DEFAULT_CHECKPOINT))
    recipe.model = {"text_encoder_config": tiny_config.text_encoder_config, "text_config": tiny_config.text_config}
    recipe.processor = {"size": 28}
    model, processor = build_model(recipe)
    for name, weight in AutoModel.from_pretrained(tmp_path / "tower").state_dict().items():
        assert torch.equal(model.vision_model.state_dict()[name], weight), name
    assert not any(weight.requires_grad for weight in model.vision_model.parameters())
    assert processor.image_processor.size == {"height": 28, "width": 28}


def test_positions_are_resampled_once_to_the_size_of_the_images(tiny_config):
    tower = AutoModel.from_config(tiny_config.vision_config).eval()
    pixels = torch.randn(2, 3, 42, 42, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = tower(pixel_values=pixels).last_hidden_state
        fit_positions(tower, 42, 42)
        assert tower.embeddings.position_embeddings.shape == (1, 1 + 3 * 3, 32)
        assert tower.config.image_size == 42
        torch.testing.assert_close(tower(pixel_values=pixels).last_hidden_state, before, atol=1e-5, rtol=1e-5)


def test_positions_that_cannot_be_resampled_are_left_alone(tiny_config):
    tower = AutoModel.from_config(tiny_config.vision_config)
    fit_positions(tower, 42, 28)
    assert tower.embeddings.position_embeddings.shape == (1, 1 + 2 * 2, 32) and tower.config.image_size == 28
    fit_positions(torch.nn.Linear(2, 2), 42, 42)


def test_a_model_of_resampled_positions_is_saved_and_loaded(write_recipe, tmp_path, tiny_config):
    write_recipe("align")
    recipe = AlignRecipe(vision_model=str(tmp_path / "tower"), tokenizer=str(m3fm.DEFAULT_CHECKPOINT))
    recipe.model = {"text_encoder_config": tiny_config.text_encoder_config, "text_config": tiny_config.text_config}
    recipe.processor = {"size": 42}
    model, _ = build_model(recipe)
    assert not model.vision_model.embeddings.position_embeddings.requires_grad
    model.save_pretrained(tmp_path / "saved")
    again = M3FMModel.from_pretrained(tmp_path / "saved")
    assert again.config.vision_config.image_size == 42
    positions = model.vision_model.embeddings.position_embeddings
    assert positions.shape == (1, 1 + 3 * 3, 32)
    assert torch.equal(again.vision_model.embeddings.position_embeddings, positions)


@pytest.mark.parametrize(("positions", "longest"), [(64, 64), (1024, 512)])
def test_texts_are_cut_where_the_encoder_has_no_more_positions(
    positions, longest, write_recipe, tmp_path, tiny_config, tokenizer
):
    write_recipe("align")
    tiny_config.text_encoder_config.max_position_embeddings = positions
    recipe = AlignRecipe(vision_model=str(tmp_path / "tower"), tokenizer=str(m3fm.DEFAULT_CHECKPOINT))
    recipe.model = {"text_encoder_config": tiny_config.text_encoder_config, "text_config": tiny_config.text_config}
    if positions < recipe.max_text_length:
        with pytest.raises(ValueError, match="max_text_length: got 128, expected at most 64, the positions of"):
            build_model(recipe)
        recipe.max_text_length = positions
    _, processor = build_model(recipe)
    assert tokenizer.model_max_length == 512
    assert processor.tokenizer.model_max_length == longest


def test_a_misspelt_value_of_the_model_is_refused(write_recipe):
    with pytest.raises(ValueError, match="'projection_dims' \\(did you mean 'projection_dim'\\?\\)"):
        run_recipe(write_recipe("align", model={"projection_dims": 16}))


@pytest.mark.parametrize("bf16", [True, False])
def test_images_and_texts_are_embedded_in_the_precision_of_the_run(bf16, write_recipe, monkeypatch):
    seen = set()
    for name in ("get_image_features", "get_text_features"):
        whole = getattr(M3FMModel, name)

        def spy(*args, name=name, whole=whole, **kwargs):
            seen.add((name, torch.is_autocast_enabled("cpu")))
            return whole(*args, **kwargs)

        monkeypatch.setattr(M3FMModel, name, spy)
    facts = run_recipe(write_recipe("align", eval_strategy="no", max_steps=1, bf16=bf16))
    assert seen == {("get_image_features", bf16), ("get_text_features", bf16)}
    assert facts["arguments"]["bf16"] is bf16


@pytest.mark.parametrize("loss", ["infonce", "sigmoid"])
def test_micro_batches_of_a_step_train_as_one_batch(loss, write_recipe, tmp_path):
    # Every epoch is one step: the same studies, whatever their order.
    model = yaml.safe_load(write_recipe("align").read_text())["model"] | {"projection_dropout": 0.0}
    encoder = model["text_encoder_config"] | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    values = {
        "loss": loss,
        "label_share": 0.5,
        "max_steps": 3,
        "num_train_epochs": 3,
        "eval_strategy": "no",
        "vision_training": "full",
        "model": model | {"text_encoder_config": encoder},
        "translation_mse_weight": 1.0,
    }
    values |= {"image_sets": {"reported": 1}, "text_sets": {"texts": 1}, "learning_rate": 1e-4}
    losses = {}
    for size, steps in ((12, 1), (4, 3), (3, 4)):
        where = tmp_path / f"{size}"
        batches = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "output_dir": str(where)}
        facts = run_recipe(write_recipe("align", **values, **batches))
        assert facts["contrastive_batch"] == 12 and facts["train_studies"] == 12, facts["train_studies"]
        history = json.loads((where / "history.json").read_text())
        losses[size] = [entry[key] for entry in history for key in ("loss", "grad_norm") if key in entry]
    assert losses[4] == pytest.approx(losses[12], rel=2e-3) and losses[3] == pytest.approx(losses[12], rel=2e-3)
    assert len(set(losses[12])) == 6, "it learns"


def test_a_run_leaves_everything_and_resumes(write_recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(AlignValidation, "minimum", 1)
    facts = run_recipe(write_recipe("align"))
    folder = tmp_path / "align"
    assert facts["steps"] == 3 and facts["stage"] == "align"
    assert facts["output_dir"] == str(folder)
    assert facts["arguments"]["max_steps"] == 3
    assert facts["train_studies"] == 6 + 2 + 6
    assert json.loads((folder / "settings.json").read_text())["image_sets"] == {"reported": 1, "labelled": 1}
    assert json.loads((folder / "training.json").read_text()) == json.loads(json.dumps(facts))
    history = json.loads((folder / "history.json").read_text())
    assert logged(history, "loss") == [1, 2, 3]
    scores = next(entry for entry in history if "eval_auroc" in entry)
    assert {"eval_r10_image_en", "eval_r10_image_zh", "eval_r1_en_zh", "eval_auroc_reported"} <= set(scores)
    assert (folder / "curves.png").stat().st_size > 5000
    assert not list(folder.glob("*.bin")), "what is passed on holds no pickle"
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    assert tokenizer["truncation"] is None and tokenizer["padding"] is None
    first = M3FMModel.from_pretrained(folder)
    assert AutoProcessor.from_pretrained(folder).tokenizer.model_max_length == 256
    with pytest.raises(ValueError, match="holds this run, finished: expected another output_dir, or a longer run"):
        run_recipe(write_recipe("align"))
    with pytest.raises(ValueError, match="holds a run with another label_share, seed: expected another output_dir"):
        run_recipe(write_recipe("align", label_share=0.5, seed=6), ["--max_steps", "5"])

    facts = run_recipe(write_recipe("align"), ["--max_steps", "5"])
    assert facts["steps"] == 5
    history = json.loads((folder / "history.json").read_text())
    assert logged(history, "loss") == [1, 2, 3, 4, 5], "it goes on at step 4"
    second = M3FMModel.from_pretrained(folder)
    assert not torch.equal(first.text_projection.weight, second.text_projection.weight)
    for name, weight in AutoModel.from_pretrained(tmp_path / "tower").state_dict().items():
        assert torch.equal(second.vision_model.state_dict()[name], weight), "the tower stays frozen"


@pytest.mark.parametrize("save_steps", [3, 5], ids=["within an epoch", "between epochs"])
def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(save_steps, write_recipe, run_interrupted, tmp_path):
    # Every other reported image is described by its labels, in phrases drawn at random; an epoch has five steps.
    values = {"label_share": 0.5, "eval_strategy": "no", "save_steps": save_steps, "max_steps": 7}
    run_recipe(write_recipe("align", **values, output_dir=str(tmp_path / "straight")))
    interrupted = write_recipe("align", **values, output_dir=str(tmp_path / "interrupted"))
    run_interrupted(AlignTrainer, interrupted, 6)
    assert run_recipe(interrupted)["steps"] == 7
    straight, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("straight", "interrupted"))
    for name, weight in straight.items():
        torch.testing.assert_close(resumed[name], weight, atol=1e-5, rtol=1e-4, msg=name)


def test_a_tower_can_be_trained_too(write_recipe, tmp_path):
    recipe = write_recipe("align", text_sets={}, parallel_sets=[])
    facts = run_recipe(recipe, ["--vision_training", "full", "--max_steps", "1"])
    assert facts["vision"] == "full"
    before = AutoModel.from_pretrained(tmp_path / "tower").embeddings.patch_embeddings
    after = M3FMModel.from_pretrained(tmp_path / "align").vision_model.embeddings.patch_embeddings
    assert not torch.equal(before.projection.weight, after.projection.weight)
    assert not list((tmp_path / "features").glob("*.f16"))


def test_towers_by_lora_leave_a_whole_checkpoint_and_the_adapter(write_recipe, tmp_path):
    pytest.importorskip("peft")
    values = {"vision_training": "lora", "text_training": "last_1", "layer_decay": 0.5, "eval_strategy": "no"}
    recipe = write_recipe("align", **values, learning_rates={"vision_model": 0.5}, lora={"r": 2})
    facts = run_recipe(recipe, ["--max_steps", "2", "--save_steps", "1"])
    before = AutoModel.from_pretrained(tmp_path / "tower").state_dict()
    after = M3FMModel.from_pretrained(tmp_path / "align").vision_model.state_dict()
    changed = {name for name, weight in before.items() if not torch.equal(after[name], weight)}
    assert changed and all(re.search(r"attention\.([qv]_proj|.*query|.*value)", name) for name in changed)
    assert (tmp_path / "align" / "adapter" / "adapter_model.safetensors").is_file()
    assert facts["vision"] == "lora"


def test_a_frozen_tower_drops_nothing_out(write_recipe, monkeypatch):
    seen = []
    whole = M3FMModel.get_text_features

    def spy(self, *args, **kwargs):
        seen.append((self.training, self.text_encoder.training, self.text_projection.training))
        return whole(self, *args, **kwargs)

    monkeypatch.setattr(M3FMModel, "get_text_features", spy)
    run_recipe(write_recipe("align", text_training="frozen", text_encoder="", eval_strategy="no", max_steps=2))
    assert seen == [(True, False, True)] * 2


def test_training_brings_the_loss_down(write_recipe, tmp_path):
    run_recipe(write_recipe("align"), ["--max_steps", "30", "--eval_strategy", "no"])
    history = json.loads((tmp_path / "align" / "history.json").read_text())
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])


def test_a_batch_of_one_language_without_images_is_no_error(write_recipe):
    recipe = write_recipe("align", image_sets={}, parallel_sets=[], eval_strategy="no")
    assert run_recipe(recipe, ["--max_steps", "1"])["steps"] == 1


def test_validation_scores_what_there_is(write_recipe, tmp_path):
    recipe = write_recipe("align", image_sets={}, eval_steps=1)
    assert set(run_recipe(recipe, ["--max_steps", "1"])["validation"]) == {"eval_r1_en_zh"}
    # Of too few studies with labels there is no area, which would be logged as no number.
    other = write_recipe("align", image_sets={"reported": 1}, eval_steps=1, output_dir=str(tmp_path / "images"))
    assert set(run_recipe(other, ["--max_steps", "1"])["validation"]) == {
        "eval_r10_image_en",
        "eval_r10_image_zh",
        "eval_r1_en_zh",
    }


def test_one_micro_batch_at_a_time_goes_to_the_device(write_recipe, monkeypatch):
    whole_loader, whole_inputs, loaders, moved = (
        AlignTrainer.get_train_dataloader,
        AlignTrainer._prepare_inputs,
        [],
        [],
    )

    def loader(self):
        loaders.append(whole_loader(self))
        return loaders[-1]

    def inputs(self, batch):
        moved.append(len(batch.get("input_ids", ())))
        return whole_inputs(self, batch)

    monkeypatch.setattr(AlignTrainer, "get_train_dataloader", loader)
    monkeypatch.setattr(AlignTrainer, "_prepare_inputs", inputs)
    run_recipe(write_recipe("align", eval_strategy="no", max_steps=1, gradient_accumulation_steps=3))
    assert [each.device for each in loaders] == [None], "accelerate moves nothing"
    assert len(moved) == 3 + 3 * 2, "each is moved when it is embedded, and nothing but its facts otherwise"
    assert moved[:3] == moved[4::2] and moved[3::2] == [0, 0, 0]


def test_a_process_with_several_gpus_is_refused(write_recipe, monkeypatch):
    monkeypatch.setattr("transformers.TrainingArguments.n_gpu", property(lambda _: 4))
    with pytest.raises(ValueError, match="torchrun --nproc_per_node 4"):
        run_recipe(write_recipe("align"))
