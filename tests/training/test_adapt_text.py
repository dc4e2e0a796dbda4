# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""A checkpoint takes over a way of writing, or a language, from text alone."""

import json
import logging
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

from m3fm import M3FMForReportGeneration
from m3fm.adapters import load_adapter_checked
from m3fm.training.adapt_scores import scores_table, text_bleu
from m3fm.training.adapt_text import AdaptTextRecipe, adapt_memory, decoder_mode, text_length
from m3fm.training.new_language import add_language, free_token
from m3fm.training.recipe import RECIPES, run_recipe
from m3fm.training.replay import ReplayDraws, replay_texts
from m3fm.training.site_texts import site_groups
from m3fm.training.text_bank import TextBank, TextGroup
from m3fm.training.write import WriteTrainer

pytest.importorskip("accelerate")
pytest.importorskip("peft")

ENGLISH = [f"The lungs are clear and no nodule is seen in part {number}." for number in range(24)]
GERMAN = [f"Die Lunge ist frei, kein Rundherd und keine Stauung in Teil {number}." for number in range(24)]


@pytest.fixture
def adapt(tmp_path, made_up_data, tiny_checkpoint):
    """Returns a function that adapts the tiny checkpoint, and returns the facts of the run."""
    generation = tiny_checkpoint / "generation_config.json"
    settings = json.loads(generation.read_text(encoding="utf-8"))
    generation.write_text(json.dumps({**settings, "max_new_tokens": 8}), encoding="utf-8")
    always = {
        **yaml.safe_load((RECIPES / "adapt-text.yaml").read_text(encoding="utf-8")),
        "base": str(tiny_checkpoint),
        "data_root": str(made_up_data),
        "feature_cache": str(tmp_path / "features"),
        "max_text_length": 24,
        "per_device_train_batch_size": 8,
        "num_train_epochs": 1,
        "teaching": {"epochs": 1, "learning_rate": 1e-2},
        "logging_steps": 1,
        "learning_rate": 0.01,
        "bf16": False,
        "disable_tqdm": True,
        "output_dir": str(tmp_path / "adapted"),
    }

    def run(**values):
        path = tmp_path / "adapt.yaml"
        path.write_text(yaml.safe_dump({**always, **values}), encoding="utf-8")
        return run_recipe(path)

    return run


def write_lines(path: Path, texts) -> str:
    path.write_text("\n".join(texts), encoding="utf-8")
    return str(path)


def write_pairs(path: Path) -> str:
    rows = [{"en": english, "de": german} for english, german in zip(ENGLISH, GERMAN, strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


# --- a house style ---------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks by the old name
def test_a_house_style_changes_decoder_and_own_memory_alone(adapt, tmp_path, tiny_model, capsys):
    facts = adapt(texts=write_lines(tmp_path / "a.txt", ENGLISH), validation_set="reported")
    folder = tmp_path / "adapted"
    adapted = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    for name, weight in tiny_model.state_dict().items():
        is_same = torch.equal(weight, adapted.state_dict()[name])
        learns = "decoder.model.layers" in name and "norm" not in name
        assert is_same != (learns or name == "support_memory"), name
    assert torch.equal(adapted.support_memory[1], tiny_model.support_memory[1]), "the Chinese memory stays"
    assert facts["learned_texts"] == 22 and facts["held_out_texts"] == 2 and not facts["is_new_language"]
    assert "en" not in facts["rehearsed"] and facts["rehearsed"]["zh"] > 0
    names = {"en_loss", "en_bleu_4", "zh_loss", "zh_bleu_4", "en_images_bleu_4", "zh_images_distinct"}
    assert names <= set(facts["scores"]["before"]) == set(facts["scores"]["after"])
    assert facts["scores"]["after"]["en_loss"] < facts["scores"]["before"]["en_loss"]
    table = capsys.readouterr().out
    assert table.count("\n") > 8 and "| en | held-out texts, loss a token |" in table
    # The adapter alone, on the base that it names, writes what the merged checkpoint does.
    base = M3FMForReportGeneration.from_pretrained(tmp_path / "tiny", dtype=torch.float32)
    with_adapter = load_adapter_checked(base, folder / "adapter")
    inputs = {"input_ids": adapted.build_prompt(["en"]), "shared_embeds": adapted.support_memory[0, :1]}
    with torch.no_grad():
        torch.testing.assert_close(with_adapter(**inputs).logits, adapted(**inputs).logits, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="holds this run, finished"):
        adapt(texts=str(tmp_path / "a.txt"), validation_set="reported")


def test_the_memory_is_of_the_texts_or_shared_with_the_old_one(tiny_model, tiny_processor):
    bank = TextBank(site_groups([ENGLISH[0]] * 3 + ENGLISH[1:4], "en"), ("en", "zh"))
    bank.embed(tiny_model.model, tiny_processor)
    fresh = torch.nn.functional.normalize(bank.embeds.float(), dim=-1)
    old = tiny_model.support_memory.clone()

    def closest(entries, rows):
        return (entries @ rows.t()).max(dim=-1)

    adapt_memory(tiny_model, bank, AdaptTextRecipe(texts="x", memory_share=1.0), is_new=False, seed=0)
    found = closest(tiny_model.support_memory[0], fresh)
    assert (found.values > 0.999).all()
    assert torch.bincount(found.indices).tolist() == [6, 2, 2, 2], "as often as the site writes it"
    tiny_model.set_support_memory(old)
    adapt_memory(tiny_model, bank, AdaptTextRecipe(texts="x", memory_share=0.25), is_new=False, seed=0)
    assert (closest(tiny_model.support_memory[0], fresh).values > 0.999).sum() == 3
    kept = closest(tiny_model.support_memory[0], old[0])
    assert (kept.values > 0.9999).sum() == 9 and len(set(kept.indices[kept.values > 0.9999].tolist())) == 9
    tiny_model.set_support_memory(old)
    adapt_memory(tiny_model, bank, AdaptTextRecipe(texts="x", memory_share=0.0), is_new=False, seed=0)
    assert torch.equal(tiny_model.support_memory, old)


def test_other_languages_are_rehearsed_by_what_the_base_writes_or_by_a_file(tiny_model, tiny_processor, tmp_path):
    lines = write_lines(tmp_path / "zh.txt", [f"心影正常，{number}号。" for number in range(12)])
    rehearsed, watched = replay_texts(tiny_model, tiny_processor, ["zh"], {"zh": lines})
    assert len(rehearsed) == len(watched) == 6 and {group.targets for group in rehearsed} == {("zh",)}
    assert not {group.versions["zh"] for group in rehearsed} & {group.versions["zh"] for group in watched}
    tiny_model.generation_config.max_new_tokens = 4
    own = replay_texts(tiny_model, tiny_processor, ["en", "zh"], {})
    assert own == replay_texts(tiny_model, tiny_processor, ["en", "zh"], {})
    assert {group.targets for group in own[0]} == {group.targets for group in own[1]} == {("en",), ("zh",)}
    tiny_model.support_memory.zero_()
    assert replay_texts(tiny_model, tiny_processor, ["en"], {}) == ([], [])


def test_an_epoch_rehearses_its_share_and_others_the_next_time():
    draws = ReplayDraws(learned=30, rehearsed=40, share=0.25)
    first, second = draws.draw(3, 0), draws.draw(3, 1)
    assert len(draws) == len(first) == 40 and draws.count == 10
    for drawn in (first, second):
        assert sorted(drawn[drawn < 30]) == list(range(30)) and len(set(drawn[drawn >= 30])) == 10
    assert set(first[first >= 30]) != set(second[second >= 30])
    assert (draws.draw(3, 0) == first).all()
    assert len(ReplayDraws(30, 4, 0.5).draw(0, 0)) == 60, "few are rehearsed several times"
    assert sorted(ReplayDraws(5, 0, 0.5).draw(0, 0)) == sorted(ReplayDraws(5, 9, 0.0).draw(0, 0)) == list(range(5))


# --- a new language --------------------------------------------------------------------------------------------------


def test_a_language_takes_a_token_that_is_kept_for_one(tiny_model, tiny_processor, tmp_path):
    before, memory = tiny_model.state_dict(), tiny_model.support_memory.clone()
    assert free_token(tiny_processor) == ("<|reserved_0|>", 7)
    processor = add_language(tiny_model, tiny_processor, "de")
    assert tiny_model.config.languages == ("en", "zh", "de")
    assert processor.tokenizer.convert_tokens_to_ids("<|de|>") == 7 and len(processor.tokenizer) == 8000
    assert free_token(processor) == ("<|reserved_1|>", 8) and free_token(tiny_processor)[1] == 7
    for text in (GERMAN[0], "<|de|>", "双肺清晰"):
        ids = processor.tokenizer(text)["input_ids"]
        assert 7 not in ids and processor.tokenizer.decode(ids) == text
        assert text == "<|de|>" or ids == tiny_processor.tokenizer(text)["input_ids"]
    assert tiny_model.support_memory.shape[0] == 3 and torch.equal(tiny_model.support_memory[:2], memory)
    assert not tiny_model.support_memory[2].any() and 7 in tiny_model.generation_config.suppress_tokens
    weight = before["decoder.model.embed_tokens.weight"]
    torch.testing.assert_close(tiny_model.get_input_embeddings().weight[7], weight[5:7].mean(dim=0))
    tiny_model.save_pretrained(tmp_path / "three")
    assert M3FMForReportGeneration.from_pretrained(tmp_path / "three").config.languages == ("en", "zh", "de")
    with pytest.raises(ValueError, match="writes 'de' already"):
        add_language(tiny_model, processor, "de")


def test_without_a_kept_token_the_vocabulary_grows(tiny_model, tiny_processor):
    processor = tiny_processor
    for number in range(9):
        processor = add_language(tiny_model, processor, f"x{'abcdefghi'[number]}")
    assert free_token(processor) is None
    processor = add_language(tiny_model, processor, "de")
    assert tiny_model.config.language_token_ids["de"] == 8000 == tiny_model.config.text_config.vocab_size - 1
    assert tiny_model.get_output_embeddings().weight.shape[0] == 8001 and tiny_model.config.languages[-1] == "de"
    assert 8000 not in processor.tokenizer("<|de|>")["input_ids"], "a text gives no control token"
    embeds = torch.nn.functional.normalize(torch.randn(1, 16), dim=-1)
    assert tiny_model.generate(shared_embeds=embeds, language="de", max_new_tokens=3).shape[0] == 1


def test_a_new_language_by_parallel_text_reaches_the_pipeline(adapt, tmp_path, tiny_model, made_up_data):
    # Not a word of the style is asked for: a model of two layers and three steps writes none.
    facts = adapt(
        texts=write_lines(tmp_path / "de.txt", GERMAN), parallel=write_pairs(tmp_path / "p.jsonl"), language="de"
    )
    folder = tmp_path / "adapted"
    assert facts["is_new_language"] and not (folder / "encoder").exists() and not (folder / "adapter").exists()
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    assert model.config.language_token_ids == {"en": 5, "zh": 6, "de": 7}
    assert torch.equal(model.support_memory[:2], tiny_model.support_memory)
    assert AutoProcessor.from_pretrained(folder).tokenizer.convert_tokens_to_ids("<|de|>") == 7
    # The images' side stays; the text encoder has learned.
    for part in ("model.vision_model", "model.visual_projection", "model.text_projection", "model.study_pooling"):
        ours, theirs = model.get_submodule(part).state_dict(), tiny_model.get_submodule(part).state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    before, after = facts["scores"]["before"], facts["scores"]["after"]
    assert after["de_loss"] < before["de_loss"] and after["de_from_parallel_loss"] < before["de_from_parallel_loss"]
    assert before["en_cosine"] == pytest.approx(1, abs=1e-3) and after["en_cosine"] > 0.8
    assert {"de_parallel_recall_1", "zh_loss", "en_loss"} <= set(after)
    write = pipeline("m3fm-report", model=str(folder), on_suspect="warn")
    written = write(str(made_up_data / "reported" / "1.png"), language="both", max_new_tokens=4)
    assert {"report_en", "report_zh", "report_de"} <= set(written)


def test_an_interrupted_run_goes_on_with_the_encoder_that_was_taught(adapt, run_interrupted, tmp_path):
    values = {
        "parallel": write_pairs(tmp_path / "p.jsonl"),
        "language": "de",
        "save_strategy": "steps",
        "save_steps": 2,
        "eval_strategy": "no",
        "load_best_model_at_end": False,
        "metric_for_best_model": None,
    }
    adapt(**values, output_dir=str(tmp_path / "whole"))
    recipe = tmp_path / "adapt.yaml"
    recipe.write_text(recipe.read_text(encoding="utf-8").replace("/whole", "/stopped"), encoding="utf-8")
    run_interrupted(WriteTrainer, recipe, 3)
    assert list((tmp_path / "stopped" / "encoder").glob("checkpoint-*"))
    run_recipe(recipe)
    whole, stopped = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "stopped"))
    for name, weight in whole.items():
        assert torch.equal(weight, stopped[name]), name


def test_the_memory_of_a_new_language_is_of_what_the_encoder_knew(tiny_model, tiny_processor):
    groups = [TextGroup("parallel", {"en": en, "de": de}, ("de",)) for en, de in zip(ENGLISH, GERMAN, strict=True)]
    processor = add_language(tiny_model, tiny_processor, "de")
    bank = TextBank([*groups, *site_groups(["Herz normal."], "de")], ("en", "zh", "de"))
    bank.embed(tiny_model.model, processor)
    adapt_memory(tiny_model, bank, AdaptTextRecipe(texts="x", language="de", memory_share=0.0), True, seed=0)
    nearest = (tiny_model.support_memory[2] @ bank.embeds.float().t()).argmax(dim=-1)
    assert {bank.texts[row] for row in nearest.tolist()} <= {*ENGLISH, "Herz normal."}


def test_without_parallel_text_it_is_said_what_is_missing(adapt, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        facts = adapt(
            texts=write_lines(tmp_path / "de.txt", GERMAN),
            language="de",
            max_steps=1,
            save_strategy="no",
            load_best_model_at_end=False,
            eval_strategy="no",
        )
    assert "the text encoder is not taught the language" in caplog.text
    assert facts["scores"]["after"]["en_cosine"] == pytest.approx(1, abs=1e-3)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "expected a file of reports"),
        ({"texts": "a.txt", "language": "German"}, "expected a code like 'de'"),
        ({"texts": "a.txt", "decoder_training": "last_2"}, "expected 'full' or 'lora'"),
        ({"texts": "a.txt", "memory_share": 1.5}, "memory_share: got 1.5"),
        ({"texts": "a.txt", "replay_share": 1.0}, "replay_share: got 1.0"),
    ],
)
def test_recipes_that_cannot_be(values, message):
    with pytest.raises(ValueError, match=message):
        AdaptTextRecipe(**values)


def test_a_new_language_needs_token_embeddings():
    recipe = AdaptTextRecipe(texts="x", language="de", decoder_training="lora")
    with pytest.raises(ValueError, match="trains no token embeddings"):
        decoder_mode(recipe, ("en", "zh"))
    assert decoder_mode(AdaptTextRecipe(texts="x", language="de"), ("en", "zh")) == "full"
    assert decoder_mode(AdaptTextRecipe(texts="x", language="zh"), ("en", "zh")) == "lora"


def test_runs_are_refused_before_anything_is_trained(adapt, tmp_path):
    texts = write_lines(tmp_path / "a.txt", ENGLISH)
    for values, message in (
        ({"base": str(tmp_path)}, "is no checkpoint"),
        ({"max_text_length": 1000}, "expected 2 to 251, the decoder's positions"),
        ({"replay_texts": {"de": texts}}, r"replay_texts: got \['de'\], expected some of \['zh'\]"),
        ({"language": "zh"}, "24 of 24 texts are plainly not in 'zh'"),
        ({"language": "de"}, "24 of 24 texts are plainly not in 'de'"),
        ({"validation_set": "texts"}, "has no validation study with images"),
        ({"teaching": {"epochs": 0}}, "expected epochs and learning_rate above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            adapt(**{"texts": texts, **values})
    assert not (tmp_path / "adapted").exists()


def test_lengths_and_scores(tiny_model):
    recipe = AdaptTextRecipe(texts="x")
    assert text_length(recipe, tiny_model) == 251
    tiny_model.generation_config.max_new_tokens = 100
    assert text_length(recipe, tiny_model) == 100
    assert text_length(AdaptTextRecipe(texts="x", max_text_length=200), tiny_model) == 200
    assert text_bleu(GERMAN[:2], GERMAN[:2]) == pytest.approx(1) == text_bleu(["心影正常。"], ["心影正常。"])
    table = scores_table({"en_loss": 2.0}, {"en_loss": 1.0, "zh_images_rouge_l": 0.5})
    assert "| en | held-out texts, loss a token | 2.000 | 1.000 |" in table and "reports of images, rouge l" in table
