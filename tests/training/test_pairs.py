# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Stage 3: which pairs are learned, what stands beside them, what is trained, and what a run leaves."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from m3fm import M3FMForReportGeneration
from m3fm.data import Study
from m3fm.training import pair_data
from m3fm.training.pair_data import PairsCollator, ReplayBuckets, draw_fraction, load_pairs, load_replayed
from m3fm.training.pairs import PairsRecipe, PairsTrainer, add_image_tokens, build_model, set_trained
from m3fm.training.recipe import run_recipe

pytest.importorskip("accelerate")


def studies_of(groups: dict[str, int], split: str = "train", source: str = "a", **values) -> list[Study]:
    """Returns as many studies of each group as it says, with reports in two languages."""
    return [
        Study(
            study_id=f"{split}-{group}-{number}",
            source=source,
            modality="cxr",
            images=values.get("images", ("a.png",)),
            patient_id=group,
            reports=values.get("reports", {"en": f"Report {number}.", "zh": f"报告{number}。"}),
            findings=None,
            split=split,
            grouped_key=group,
        )
        for group, count in groups.items()
        for number in range(count)
    ]


def ids(studies: list[Study]) -> set[str]:
    return {study.study_id for study in studies}


# --- which pairs -----------------------------------------------------------------------------------------------------


def test_smaller_fractions_are_parts_of_larger_ones_and_keep_patients_whole():
    sizes = {f"patient{number}": 1 + number % 4 for number in range(60)}
    studies = studies_of(sizes)
    chosen = [draw_fraction(studies, fraction, seed=3) for fraction in (0.001, 0.01, 0.1, 0.5, 1.0)]
    for smaller, larger in zip(chosen, chosen[1:], strict=False):
        assert ids(smaller) <= ids(larger)
    for part in chosen:
        counts = Counter(study.grouped_key for study in part)
        assert part and all(count == sizes[group] for group, count in counts.items())
    assert chosen[-1] == studies
    assert len({study.grouped_key for study in chosen[0]}) == 1
    assert all(abs(len(part) - len(studies) * share) < 4 for part, share in zip(chosen[2:4], (0.1, 0.5), strict=True))
    assert ids(draw_fraction(studies[::-1], 0.1, seed=3)) == ids(chosen[2]), "the order of studies does not matter"
    assert ids(draw_fraction(studies, 0.1, seed=4)) != ids(chosen[2])
    more = studies_of(sizes | {"another": 1})
    assert len(ids(draw_fraction(more, 0.1, seed=3)) - ids(chosen[2])) <= 4, "nor do those that join it, but for a few"


@pytest.fixture
def sets(monkeypatch) -> dict[str, list[Study]]:
    """Returns two sets of which the first shares a patient with its validation part, in place of folders."""
    sets = {
        "a": [
            *studies_of({"x": 2, "y": 3, "z": 1}),
            *studies_of({"y": 1}, "validation"),
            *studies_of({"t": 1}, "test"),
        ],
        "b": studies_of({"x": 1, "y": 2}, source="b", reports={"en": "Clear."}),
    }
    monkeypatch.setattr(pair_data, "load_studies", lambda folder: sets[folder.name])
    return sets


def test_pairs_are_new_to_validation_and_one_for_each_language(sets):
    pairs, facts = load_pairs(PairsRecipe(sets={"a": 2, "b": 1}), ["en", "zh"])
    counts = Counter((study.source, study.study_id, *study.reports) for study in pairs)
    assert counts == {
        **{("a", name, code): 2 for name in ("train-x-0", "train-x-1", "train-z-0") for code in ("en", "zh")},
        **{("b", name, "en"): 1 for name in ("train-x-0", "train-y-0", "train-y-1")},
    }, "patients are known within a set, and test studies are never learned"
    assert facts["sets"] == {"a": {"studies": 3, "of": 3}, "b": {"studies": 3, "of": 3}}
    assert facts["left_out_for_shared_patients"] == 3
    kept, facts = load_pairs(PairsRecipe(sets={"a": 1}, shared_patients="keep"), ["zh"])
    assert ids(kept) == {"train-x-0", "train-x-1", "train-y-0", "train-y-1", "train-y-2", "train-z-0"}
    assert {tuple(study.reports) for study in kept} == {("zh",)}


def test_a_share_is_drawn_of_each_set_and_recorded(sets):
    _, small = load_pairs(PairsRecipe(sets={"a": 1, "b": 1}, fraction=0.01), ["en"])
    assert all(each["studies"] >= 1 for each in small["sets"].values())
    _, again = load_pairs(PairsRecipe(sets={"a": 1, "b": 1}, fraction=0.01), ["en"])
    _, whole = load_pairs(PairsRecipe(sets={"a": 1, "b": 1}), ["en"])
    assert small == again and small["studies_sha256"] != whole["studies_sha256"]


def test_sets_without_pairs_and_unknown_ids_are_refused(sets):
    with pytest.raises(ValueError, match=r"sets: b has no training study with an image and a report in \['zh'\]"):
        load_pairs(PairsRecipe(sets={"b": 1}), ["zh"])
    with pytest.raises(ValueError, match="every id of `exclude` to be that of a study, 1 of them are not"):
        load_pairs(PairsRecipe(sets={"a": 1}, exclude=["train-x-0", "nobody"]), ["en"])


def test_texts_of_validation_patients_are_not_replayed(made_up_data, monkeypatch):
    recipe = PairsRecipe(data_root=str(made_up_data), sets={"reported": 1}, text_sets={"reported": 1})
    whole = load_replayed(recipe, ("en", "zh"))
    load = pair_data.load_studies
    shared = [
        # Study 0 is of the patient of study 4, which validates.
        Study(**{**vars(study), "grouped_key": "one"}) if study.study_id in ("0", "0.png", "4", "4.png") else study
        for study in load(made_up_data / "reported")
    ]
    assert sum(study.grouped_key == "one" for study in shared) == 2
    monkeypatch.setattr(pair_data, "load_studies", lambda folder: shared)
    assert len(whole.passages) - len(load_replayed(recipe, ("en", "zh")).passages) == 2
    assert load_replayed(PairsRecipe(sets={"reported": 1}), ("en",)) is None


# --- batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2])
def test_every_batch_has_as_many_pairs_and_texts_are_gone_through(world_size):
    rng = np.random.default_rng(0)
    pairs, texts = rng.integers(5, 90, 40), rng.integers(5, 90, 70)
    batches = ReplayBuckets(pairs, texts, text_share=0.4, batch_size=5, seed=1, world_size=world_size)
    rounds = batches.all_batches(0)
    assert rounds.shape == (len(batches), world_size, 5)
    assert (rounds[..., :3] < 40).all() and (rounds[..., 3:] >= 40).all()
    assert set(rounds[..., :3].ravel()) == set(range(40))
    replayed = [each for epoch in range(3) for each in batches.all_batches(epoch)[..., 3:].ravel().tolist()]
    counts = Counter(replayed)
    assert max(counts.values()) - min(counts.values()) <= 1 and set(replayed) <= set(range(40, 110))
    assert np.array_equal(batches.all_batches(4), batches.all_batches(4))
    assert not np.array_equal(batches.all_batches(4), rounds)
    lengths = np.concatenate([pairs, texts])[rounds]
    assert np.ptp(lengths, axis=-1).mean() < np.ptp(np.concatenate([pairs, texts])) / 3
    other = ReplayBuckets(pairs, texts[::-1], text_share=0.4, batch_size=5, seed=1, world_size=world_size)
    with pytest.raises(ValueError, match="another order of batches"):
        other.load_state_dict(batches.state_dict())


def test_a_batch_of_one_has_no_room_for_texts():
    with pytest.raises(ValueError, match="expected a larger batch, or text_share: 0"):
        ReplayBuckets(np.ones(3), np.ones(3), 0.5, batch_size=1)


@pytest.fixture
def seeing_model(tiny_model) -> M3FMForReportGeneration:
    """Returns the tiny model with three image tokens that it has opinions on."""
    add_image_tokens(tiny_model, 3)
    torch.nn.init.normal_(tiny_model.token_projector.weight, std=0.5)
    return tiny_model


class _Part:
    """Gives a batch that was made before."""

    def __init__(self, batch):
        self.batch = batch

    def __call__(self, items):
        return dict(self.batch)


def test_the_loss_of_a_batch_is_that_of_its_pairs_and_texts(seeing_model, tiny_processor):
    from m3fm.training.collators import ReportTexts

    model, texts = seeing_model, ReportTexts(tiny_processor.tokenizer, seeing_model.config)
    images = {"vision_features": torch.randn(2, 2, 5, 32), "image_mask": torch.tensor([[True, True], [True, False]])}
    pairs = images | texts.decoder_inputs(["Clear lungs.", "双肺清晰，心影正常。"], ["en", "zh"], 3)
    embeds = torch.nn.functional.normalize(torch.randn(3, 16), dim=-1)
    alone = {"shared_embeds": embeds} | texts.decoder_inputs(
        ["Normal heart and lungs.", "心影正常。", "Clear."], ["en", "zh", "en"]
    )
    pad = tiny_processor.tokenizer.pad_token_id
    collator = PairsCollator(_Part(pairs), _Part(alone | {"study_ids": ["t"] * 3}), pad)
    studies = studies_of({"x": 2})
    batch = collator([*studies, 0, 1, 2])
    assert batch.pop("study_ids") == ["a/train-x-0", "a/train-x-1", "t", "t", "t"]
    counts = [int((part["labels"] != -100).sum()) for part in (pairs, alone)]
    losses = [model(**part).loss for part in (pairs, alone)]
    expected = sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
    torch.testing.assert_close(model(**batch).loss, expected, atol=1e-5, rtol=0)
    assert "shared_embeds" not in PairsCollator(_Part(pairs), None, pad)(studies)


# --- the model -------------------------------------------------------------------------------------------------------


def test_a_base_gets_image_tokens_once_and_no_other_number(tiny_checkpoint, tmp_path):
    model, processor, _ = build_model(PairsRecipe(base=str(tiny_checkpoint), sets={"a": 1}, image_tokens=3))
    assert model.config.num_image_tokens == 3 and model.token_projector.weight.abs().max() < 0.01
    model.save_pretrained(tmp_path / "seeing")
    processor.save_pretrained(tmp_path / "seeing")
    again, *_ = build_model(PairsRecipe(base=str(tmp_path / "seeing"), sets={"a": 1}))
    assert torch.equal(again.token_projector.weight, model.token_projector.weight)
    with pytest.raises(ValueError, match="image_tokens: got 0, and the base reads 3"):
        build_model(PairsRecipe(base=str(tmp_path / "seeing"), sets={"a": 1}, image_tokens=0))
    with pytest.raises(ValueError, match="image_tokens: got 9, expected 1 to 8"):
        build_model(PairsRecipe(base=str(tiny_checkpoint), sets={"a": 1}, image_tokens=9))
    with pytest.raises(ValueError, match=r"missing 2 \(token_projector.bias, token_projector.weight\)"):
        M3FMForReportGeneration.from_pretrained(tiny_checkpoint, num_image_tokens=3)


def test_a_base_that_writes_nothing_is_refused(tiny_model, tmp_path):
    tiny_model.model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="writes no reports: expected a checkpoint of stage 2"):
        build_model(PairsRecipe(base=str(tmp_path), sets={"a": 1}))


def test_without_the_memory_the_image_goes_straight_to_the_decoder(tiny_checkpoint, tmp_path):
    recipe = PairsRecipe(base=str(tiny_checkpoint), sets={"a": 1}, through_memory=False)
    model, processor, _ = build_model(recipe)
    pixels = torch.randn(2, 1, 3, 28, 28)
    assert torch.equal(model.get_shared_embeds(["en", "zh"], pixels), model.model.get_image_features(pixels))
    model.save_pretrained(tmp_path / "direct")
    processor.save_pretrained(tmp_path / "direct")
    with pytest.raises(ValueError, match="no support memory: expected through_memory: false"):
        build_model(PairsRecipe(base=str(tmp_path / "direct"), sets={"a": 1}))


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({}, {"decoder", "prefix_projector", "token_projector"}),
        ({"decoder_training": "lora"}, {"decoder", "token_projector"}),
        (
            {"image_training": "projection"},
            {"decoder", "prefix_projector", "token_projector", "study_pooling", "visual_projection"},
        ),
        (
            {"decoder_training": "lora", "image_training": "last_1"},
            {"decoder", "token_projector", "study_pooling", "visual_projection", "vision_model"},
        ),
    ],
)
def test_what_the_recipe_names_is_trained_and_nothing_else(values, parts, seeing_model):
    seeing_model.config.diagnosis = {}
    set_trained(seeing_model, PairsRecipe(sets={"a": 1}, **values))
    trained = {name for name, weight in seeing_model.named_parameters() if weight.requires_grad}
    assert {name.removeprefix("model.").split(".")[0] for name in trained} == parts
    if values.get("decoder_training") == "lora":
        assert all("lora_" in name for name in trained if name.startswith("decoder."))
    if values.get("image_training") == "last_1":
        assert not any(".0." in name for name in trained if "vision_model" in name)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sets": {}}, "expected a set of image-report pairs"),
        ({"fraction": 0.0}, "expected a share above 0, up to 1"),
        ({"fraction": 10}, "0.01 is one percent"),
        ({"decoder_training": "frozen"}, r"expected one of \['full', 'lora'\]"),
        ({"shared_patients": "drop"}, "leave_out"),
        ({"text_share": 1.0}, "0 <= text_share < 1"),
        ({"noise": -0.1}, "noise: got -0.1"),
        ({"augment": "standard"}, "expected augment: none"),
    ],
)
def test_wrong_settings_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        PairsRecipe(**{"sets": {"a": 1}, **values})


# --- the run ---------------------------------------------------------------------------------------------------------


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_pairs_train_with_texts_and_say_what_they_are(tiny_checkpoint, write_recipe, tmp_path):
    values = {"image_tokens": 2, "noise": 0.1, "metric_for_best_model": "rouge_l_en"}
    facts = run_recipe(write_recipe("pairs", **values, max_steps=4, save_steps=2))
    folder = tmp_path / "pairs"
    record = json.loads((folder / "training.json").read_text())
    assert record["zero_shot"] is False and "no zero-shot writer" in record["supervision"]
    assert record["sets"] == {"reported": {"studies": 6, "of": 6}} and record["pairs"] == 12
    assert record["image_tokens"] == 2 and record["replayed_texts"] > 0 and not record["adapter"]
    assert facts["steps"] == 4
    assert set(record["validation"]) >= {
        f"eval_{name}_{code}" for name in ("bleu_4", "distinct") for code in ("en", "zh")
    }
    before, after = state_of(tiny_checkpoint), state_of(folder)
    assert after.keys() - before.keys() == {"token_projector.weight", "token_projector.bias"}
    moved = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"decoder", "prefix_projector"}, "the image side and the memory are those of the base"
    assert after["token_projector.weight"].abs().max() > 0.005

    model = AutoModelForImageTextToText.from_pretrained(folder)
    inputs = AutoProcessor.from_pretrained(folder)(images=tmp_path / "data/reported/8.png", return_tensors="pt")
    prompts = model.generate(**inputs, language="zh", max_new_tokens=1)[:, :7]
    assert prompts.tolist() == [[4] * 6 + [6]]


def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(
    tiny_checkpoint, write_recipe, run_interrupted, tmp_path
):
    values = {"image_tokens": 2, "noise": 0.2, "eval_strategy": "no", "save_steps": 2, "max_steps": 7}
    run_recipe(write_recipe("pairs", **values, output_dir=str(tmp_path / "straight")))
    interrupted = write_recipe("pairs", **values, output_dir=str(tmp_path / "interrupted"))
    run_interrupted(PairsTrainer, interrupted, 4)
    assert run_recipe(interrupted)["steps"] == 7
    straight, resumed = (state_of(tmp_path / name) for name in ("straight", "interrupted"))
    assert all(torch.equal(resumed[name], weight) for name, weight in straight.items())


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks by the old name
def test_lora_leaves_a_whole_checkpoint_and_an_adapter_of_the_base(tiny_checkpoint, write_recipe, tmp_path):
    from m3fm.adapters import load_adapter_checked

    record = run_recipe(write_recipe("pairs", decoder_training="lora", eval_strategy="no", text_sets={}))
    assert record["adapter"] and record["trained_parameters"].keys() == {"decoder"} and not record["replayed_texts"]
    merged = M3FMForReportGeneration.from_pretrained(tmp_path / "pairs").eval()
    base = M3FMForReportGeneration.from_pretrained(tiny_checkpoint).eval()
    pixels = torch.randn(1, 1, 3, 28, 28)
    ids = torch.cat([base.build_prompt(["en"]), torch.full((1, 4), 20)], dim=1)
    with torch.no_grad():
        plain = base(ids, pixel_values=pixels).logits
        adapted = load_adapter_checked(base, tmp_path / "pairs" / "adapter")(ids, pixel_values=pixels).logits
        whole = merged(ids, pixel_values=pixels).logits
    torch.testing.assert_close(adapted, whole, atol=1e-4, rtol=0)
    assert (adapted - plain).abs().max() > 1e-3


def test_a_trained_tower_reads_augmented_pixels(tiny_checkpoint, write_recipe, tmp_path):
    values = {"image_training": "last_1", "augment": "standard", "through_memory": False, "languages": ["zh"]}
    rates = {"learning_rates": {"vision_model": 0.1}, "layer_decay": 0.9}
    record = run_recipe(write_recipe("pairs", **values, **rates, max_steps=2, save_steps=2, text_sets={}))
    assert record["languages"] == ["zh"] and record["pairs"] == 6
    assert {name for name in record["validation"] if "distinct" in name} == {"eval_distinct_zh"}
    before, after = state_of(tiny_checkpoint), state_of(tmp_path / "pairs")
    moved = {
        name.split(".")[1]
        for name in before
        if name.startswith("model.") and not torch.equal(before[name], after[name])
    }
    assert moved == {"vision_model", "study_pooling", "visual_projection"}
    assert after["support_memory"].shape == (2, 0, 16)
    assert not (tmp_path / "features").is_dir() or not list((tmp_path / "features").glob("*.f16"))


def test_only_the_scores_of_the_run_can_choose_the_best_step(tiny_checkpoint, write_recipe):
    with pytest.raises(ValueError, match="metric_for_best_model: got 'bleu'"):
        run_recipe(write_recipe("pairs", metric_for_best_model="bleu"))
