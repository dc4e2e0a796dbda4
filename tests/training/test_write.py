# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Stage 2 from a recipe to reports, on made-up images."""

import json
import os
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.multiprocessing import spawn
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    Qwen3Config,
    Qwen3ForCausalLM,
    set_seed,
)

from m3fm import M3FMConfig
from m3fm.layers_m3fm import add_noise
from m3fm.training import text_bank
from m3fm.training.collators import ReportTexts
from m3fm.training.recipe import run_recipe
from m3fm.training.samplers import LengthBucketSampler
from m3fm.training.text_bank import TextBank, TextGroup, load_texts
from m3fm.training.write import WriteCollator, WriteRecipe, WriteTrainer, build_writer, checked_lengths

pytest.importorskip("accelerate")

GROUPS = [
    TextGroup("first", {"en": "Clear lungs.", "zh": "双肺清晰。"}, ("en", "zh"), "1"),
    TextGroup("first", {"en": "The lungs are clear and the heart is of normal size."}, ("en",), "2"),
    TextGroup("second", {"en": "Normal heart.", "zh": "心影正常。"}, ("en", "zh"), "3"),
    TextGroup("second", {"zh": "未见胸腔积液。"}, ("zh",), "4"),
    TextGroup("second", {"en": "There is a small effusion on the left."}, ("en",), "5"),
    TextGroup("second", {"en": "Unremarkable."}, ("en",), "6"),
]


def collator_of(model, processor, cross_lingual=0.5, noise_std=0.3, max_length=160) -> WriteCollator:
    bank = TextBank(GROUPS, ("en", "zh"))
    bank.embed(model.model, processor)
    texts = ReportTexts(processor.tokenizer, model.config, max_length=max_length)
    return WriteCollator(texts, bank, cross_lingual, noise_std, seed=3)


# --- what is written, and from what ----------------------------------------------------------------------------------


def test_only_translations_are_written_across_languages(tiny_model, tiny_processor):
    always, never = (collator_of(tiny_model, tiny_processor, share, 0.0) for share in (1.0, 0.0))
    bank = always.bank
    across = {(bank.texts[p.own_row], *(bank.texts[row] for row in p.other_rows)) for p in bank.passages}
    assert {("Clear lungs.", "双肺清晰。"), ("双肺清晰。", "Clear lungs."), ("Unremarkable.",)} < across
    rows = [passage.own_row for passage in bank.passages]
    others = [row[0] if (row := passage.other_rows) else passage.own_row for passage in bank.passages]
    for collator, expected in ((always, others), (never, rows)):
        batch = collator(range(len(rows)))
        assert torch.equal(batch["shared_embeds"], bank.embeds[expected].float())
        assert batch["study_ids"] == [passage.study for passage in bank.passages]
    assert bank.passages[0].study == "first/1"


def test_draws_hang_on_epoch_and_passage_not_on_the_batch(tiny_model, tiny_processor):
    collator = collator_of(tiny_model, tiny_processor)
    whole = collator([0, 1, 2, 3])["shared_embeds"]
    assert torch.equal(whole, torch.cat([collator([0, 1])["shared_embeds"], collator([2, 3])["shared_embeds"]]))
    assert torch.equal(whole[[2, 0]], collator([2, 0])["shared_embeds"])
    collator.set_epoch(1)
    assert not torch.isclose(whole, collator([0, 1, 2, 3])["shared_embeds"]).all(dim=1).any()


def test_noise_has_the_norm_of_the_config(tiny_model, tiny_processor):
    collator = collator_of(tiny_model, tiny_processor, cross_lingual=0.0)
    moved = []
    for epoch in range(60):
        collator.set_epoch(epoch)
        batch = collator(range(len(collator.bank.passages)))["shared_embeds"]
        torch.testing.assert_close(batch.norm(dim=1), torch.ones(len(batch)), atol=1e-5, rtol=0)
        rows = [passage.own_row for passage in collator.bank.passages]
        moved.append(nn.functional.cosine_similarity(batch, collator.bank.embeds[rows].float()))
    drawn = add_noise(collator.bank.embeds[rows * 60].float(), 0.3)
    expected = nn.functional.cosine_similarity(drawn, collator.bank.embeds[rows * 60].float()).mean()
    assert torch.stack(moved).mean() == pytest.approx(float(expected), abs=0.01)


def test_decoder_inputs_are_prompt_report_end(tiny_model, tiny_processor):
    texts_of = ReportTexts(tiny_processor.tokenizer, tiny_model.config)
    texts = ["Clear lungs.", "心影正常，双侧胸腔未见积液。"]
    inputs = texts_of.decoder_inputs(texts, ["en", "zh"])
    assert inputs["input_ids"][:, :5].tolist() == [[4, 4, 4, 4, 5], [4, 4, 4, 4, 6]]
    for row, text in enumerate(texts):
        real = inputs["attention_mask"][row].bool()
        ids, labels = inputs["input_ids"][row], inputs["labels"][row]
        assert tiny_processor.tokenizer.decode(ids[real][5:-1]) == text
        assert ids[real][-1] == 3 and (ids[~real] == 0).all()
        assert (labels[:5] == -100).all() and (labels[~real] == -100).all()
        assert torch.equal(labels[real][5:], ids[real][5:])
    assert (~inputs["attention_mask"].bool()).any()


@pytest.mark.parametrize(
    ("text", "mark"), [("The heart is normal. " * 40, "."), ("双侧胸腔未见积液。" * 40, "。"), ("effusion " * 60, "")]
)
def test_a_long_report_ends_with_a_whole_sentence(text, mark, tiny_model, tiny_processor):
    texts_of = ReportTexts(tiny_processor.tokenizer, tiny_model.config, max_length=20)
    ids = texts_of.encoded(text)
    assert 9 < len(ids) < 20
    kept = tiny_processor.tokenizer.decode(ids)
    assert text.startswith(kept) and kept.endswith(mark)


# --- the writer ------------------------------------------------------------------------------------------------------


def test_a_recipe_changes_the_model_and_how_it_generates(tiny_checkpoint):
    before = M3FMConfig.from_pretrained(tiny_checkpoint)
    recipe = WriteRecipe(base=str(tiny_checkpoint), model={"text_noise_std": 0.7}, generation={"num_beams": 3})
    model, _, goes_on = build_writer(recipe)
    assert goes_on
    assert model.config.text_noise_std == 0.7
    kept, held = (config.text_config.to_dict() | {"dtype": None} for config in (model.config, before))
    assert kept == held
    assert model.config.projection_dim == before.projection_dim
    assert model.generation_config.num_beams == 3
    assert model.generation_config.suppress_tokens


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": {"text_noise": 0.1}}, r"'text_noise' \(did you mean 'text_noise_std'\?\)"),
        ({"model": {"text_noise_std": "much"}}, "text_noise_std"),
        ({"model": {"support_temperature": 0.0}}, "support_temperature > 0"),
        ({"generation": {"num_beam": 3}}, "num_beam"),
    ],
)
def test_misspelt_and_wrong_values_are_refused(values, message, tiny_checkpoint):
    with pytest.raises(ValueError, match=message):
        build_writer(WriteRecipe(base=str(tiny_checkpoint), **values))


# --- the run ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def base(tiny_model, tiny_processor, tmp_path):
    """Returns the folder of a stage 1 that has not been trained, with a memory of six."""
    tiny_model.model.config.support_memory_size = 6
    tiny_model.model.save_pretrained(tmp_path / "align")
    tiny_processor.save_pretrained(tmp_path / "align")
    return tmp_path / "align"


def losses(folder) -> list[int]:
    return [entry["step"] for entry in json.loads((folder / "history.json").read_text()) if "loss" in entry]


def test_text_alone_trains_resumes_and_writes(base, write_recipe, tmp_path):
    facts = run_recipe(write_recipe("write", generation={"num_beams": 2}))
    folder = tmp_path / "write"
    assert facts["output_dir"] == str(folder)
    assert (facts["supervision"], facts["passages"], facts["steps"]) == ("text alone", 30, 3)
    assert facts["memory"] == {"method": "sampled", "size": 6, "sets": ["reported", "texts"]}
    assert set(facts["validation"]) >= {"eval_bleu_4_en", "eval_rouge_l_zh", "eval_distinct_zh"}
    assert losses(folder) == [1, 2, 3]
    assert (folder / "curves.png").stat().st_size > 5000
    memory = load_file(folder / "model.safetensors")["support_memory"]
    assert memory.shape == (2, 6, 16)
    torch.testing.assert_close(memory.norm(dim=-1), torch.ones(2, 6), atol=1e-3, rtol=0)

    with pytest.raises(ValueError, match="holds this run, finished"):
        run_recipe(write_recipe("write", generation={"num_beams": 2}))
    with pytest.raises(ValueError, match="holds a run with another cross_lingual, generation"):
        run_recipe(write_recipe("write", cross_lingual=0.1), ["--max_steps", "5"])
    facts = run_recipe(write_recipe("write", generation={"num_beams": 2}), ["--max_steps", "5"])
    assert facts["steps"] == 5 and json.loads((folder / "training.json").read_text())["steps"] == 5
    assert losses(folder) == [1, 2, 3, 4, 5], "it goes on at step 4"

    model = AutoModelForImageTextToText.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    inputs = processor(images=tmp_path / "data" / "reported" / "8.png", return_tensors="pt")
    ids = model.generate(**inputs, language="zh", max_new_tokens=8)
    assert len(processor.batch_decode(ids, skip_special_tokens=True)) == 1
    assert set(range(5)) - {3} <= set(model.generation_config.suppress_tokens)
    assert model.generation_config.num_beams == 2
    stage1, stage2 = AutoModel.from_pretrained(base), AutoModel.from_pretrained(folder)
    assert all(torch.equal(stage2.state_dict()[name], w) for name, w in stage1.state_dict().items())


@pytest.mark.parametrize("save_steps", [3, 4], ids=["within an epoch", "between epochs"])
def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(
    save_steps, base, write_recipe, run_interrupted, tmp_path
):
    # Every other text is written from its translation, all from noisy embeddings; an epoch has four steps.
    lengths = {"per_device_train_batch_size": 8, "save_steps": save_steps, "max_steps": 7}
    values = {"cross_lingual": 0.5, "eval_strategy": "no", **lengths}
    run_recipe(write_recipe("write", **values, output_dir=str(tmp_path / "straight")))
    interrupted = write_recipe("write", **values, output_dir=str(tmp_path / "interrupted"))
    run_interrupted(WriteTrainer, interrupted, 6)
    assert run_recipe(interrupted)["steps"] == 7
    straight, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("straight", "interrupted"))
    for name, weight in straight.items():
        torch.testing.assert_close(resumed[name], weight, atol=1e-5, rtol=1e-4, msg=name)


def test_training_brings_the_loss_down_and_can_be_gone_on_from(base, write_recipe, tmp_path):
    run_recipe(write_recipe("write", eval_strategy="no", save_strategy="no"), ["--max_steps", "30"])
    history = json.loads((tmp_path / "write" / "history.json").read_text())
    values = [entry["loss"] for entry in history if "loss" in entry]
    assert np.mean(values[-3:]) < 0.6 * np.mean(values[:3])
    more = {"base": str(tmp_path / "write"), "output_dir": str(tmp_path / "more"), "memory": {}}
    again = write_recipe("write", **more, eval_strategy="no", save_strategy="no")
    facts = run_recipe(again, ["--learning_rate", "1e-9", "--max_steps", "1"])
    assert facts["memory"] == "that of the base"
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("write", "more"))
    for name, weight in first.items():
        torch.testing.assert_close(second[name], weight, atol=1e-6, rtol=0, msg=name)


def test_noise_and_memory_of_the_recipe_reach_the_checkpoint(base, write_recipe, tmp_path):
    memory = {"method": "medoids", "size": 4, "sets": ["reported"]}
    run_recipe(write_recipe("write", memory=memory, model={"text_noise_std": 0.7}, eval_strategy="no", max_steps=1))
    config = M3FMConfig.from_pretrained(tmp_path / "write")
    assert (config.support_memory_size, config.text_noise_std) == (4, 0.7)
    assert load_file(tmp_path / "write" / "model.safetensors")["support_memory"].shape == (2, 4, 16)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_text_length": 252}, "set `max_text_length` to 251 at most"),
        ({"text_sets": {"labelled": 1}, "parallel_sets": []}, r"text_sets: \['labelled'\] have no training text"),
        ({"validation_set": "labelled"}, "labelled has no validation study with images and reports"),
        ({"memory": {"size": 99}}, "Expected 99 texts a language for the support memory, the sets have 10"),
        ({"decoder_training": "lora"}, "'lora' needs a trained decoder"),
        ({"decoder_training": "last_2"}, "got 'last_2', expected 'full' or 'lora'"),
        ({"cross_lingual": 1.5}, "expected a share of 0 to 1"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_first_step(values, message, base, write_recipe, made_up_data):
    long = {"study_id": "9", "modality": "cxr", "split": "train", "report_en": "Clear. " * 126}
    with open(made_up_data / "texts" / "data.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(long) + "\n")
    with pytest.raises(ValueError, match=message):
        run_recipe(write_recipe("write", **values))


def test_a_pretrained_decoder_is_trained_by_lora_and_merged(base, write_recipe, tokenizer, tmp_path):
    pytest.importorskip("peft")
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Qwen3Config(**sizes, num_key_value_heads=1, head_dim=12, vocab_size=len(tokenizer), eos_token_id=3)
    torch.manual_seed(1)
    pretrained = Qwen3ForCausalLM(config)
    pretrained.save_pretrained(tmp_path / "qwen")
    tokenizer.save_pretrained(tmp_path / "qwen")
    values = {"decoder": str(tmp_path / "qwen"), "decoder_training": "lora", "lora": {"r": 2}}
    facts = run_recipe(write_recipe("write", **values, eval_strategy="no", max_steps=2, generation={"num_beams": 1}))
    folder = tmp_path / "write"
    assert facts["recipe"]["lora"]["r"] == 2
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert type(model.decoder) is Qwen3ForCausalLM
    assert not any("lora" in name for name in load_file(folder / "model.safetensors"))
    moved = [
        name
        for name, weight in pretrained.state_dict().items()
        if not torch.equal(weight, model.decoder.state_dict()[name])
    ]
    assert moved and all("_proj" in name for name in moved), "LoRA is in the layers of the blocks, and nothing else is"
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    with pytest.raises(ValueError, match="has a decoder already"):
        run_recipe(write_recipe("write", base=str(folder), **values, output_dir=str(tmp_path / "more")))


def test_settings_that_moved_name_their_new_place(base, write_recipe):
    with pytest.raises(ValueError, match="supervised_sets: .* expected `recipe: pairs`"):
        run_recipe(write_recipe("write", supervised_sets={"reported": 3}))


# --- the gradient of a step ------------------------------------------------------------------------------------------


PLAIN_STEPS = {"optim": "sgd", "weight_decay": 0.0, "max_grad_norm": 0.0, "learning_rate": 1.0, "eval_strategy": "no"}


def test_a_step_has_the_gradient_of_its_tokens_over_micro_batches(base, write_recipe, tmp_path):
    values = {**PLAIN_STEPS, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 1}
    path = write_recipe("write", **values)
    run_recipe(path)
    recipe = WriteRecipe(
        data_root=str(tmp_path / "data"),
        text_sets={"reported": 2, "texts": 1},
        parallel_sets=["texts"],
        base=str(base),
        feature_cache=str(tmp_path / "features"),
    )
    set_seed(5)
    model, processor, _ = build_writer(recipe)
    bank = TextBank(load_texts(recipe), ("en", "zh"))
    bank.embed(model.model, processor)
    lengths = checked_lengths(bank, recipe, model, processor)
    numbers = LengthBucketSampler(lengths, 2, seed=5).all_batches(0)[:2].ravel().tolist()
    texts = ReportTexts(processor.tokenizer, model.config)
    batch = WriteCollator(texts, bank, 0.5, model.config.text_noise_std, seed=5)(numbers)
    assert len({int(count) for count in (batch["labels"][:, 1:] >= 0).sum(1)}) > 1
    del batch["study_ids"]
    before = {name: weight.detach().clone() for name, weight in model.state_dict().items()}
    model(**batch).loss.backward()
    after = load_file(tmp_path / "write" / "model.safetensors")
    for name, weight in model.named_parameters():
        if weight.grad is not None and not name.startswith("model."):
            torch.testing.assert_close(before[name] - after[name], weight.grad, atol=1e-6, rtol=1e-4, msg=name)


def on_a_rank(rank: int, recipe: Path, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port_of(folder))}
    text_bank._PART_TEXTS = 8
    run_recipe(recipe)


def free_port_of(folder: Path) -> int:
    return int((folder / "port").read_text())


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_two_ranks_train_as_one_does_with_the_batches_of_both(base, write_recipe, tmp_path):
    values = {**PLAIN_STEPS, "learning_rate": 0.5, "max_steps": 4, "eval_strategy": "steps", "eval_steps": 4}
    alone = run_recipe(
        write_recipe("write", **values, per_device_train_batch_size=4, output_dir=str(tmp_path / "one"))
    )
    both = write_recipe("write", **values, per_device_train_batch_size=2, feature_cache=str(tmp_path / "shared"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        (tmp_path / "port").write_text(str(free.getsockname()[1]))
    spawn(on_a_rank, (both, tmp_path), nprocs=2)
    weights, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("write", "one"))
    for name, weight in expected.items():
        torch.testing.assert_close(weights[name], weight, atol=2e-5, rtol=1e-4, msg=name)
    histories = [json.loads((tmp_path / name / "history.json").read_text()) for name in ("write", "one")]
    losses_of_both, losses_alone = ([entry["loss"] for entry in each if "loss" in entry] for each in histories)
    assert losses_of_both == pytest.approx(losses_alone, abs=2e-3)
    facts = json.loads((tmp_path / "write" / "training.json").read_text())
    assert facts["validation"] == pytest.approx(alone["validation"], abs=1e-6)
    assert (facts["samples_seen"], facts["tokens_seen"]) == (alone["samples_seen"], alone["tokens_seen"])
