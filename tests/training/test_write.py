# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Stage 2 from a recipe to reports, on twelve made-up images."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor

from m3fm.training.runs import run_recipe
from m3fm.training.write import TextBank, WriteCollator, WriteRecipe, _equal_shares, load_texts

pytest.importorskip("accelerate")

GROUPS = [
    ("first", {"en": "Clear lungs.", "zh": "双肺清晰。"}),
    ("first", {"en": "Clear lungs."}),
    ("second", {"zh": "心影正常。"}),
    ("second", {"en": "Normal heart.", "zh": "心影正常。"}),
]


@pytest.fixture
def bank(tiny_model, tiny_processor) -> TextBank:
    bank = TextBank(GROUPS, ("en", "zh"))
    bank.embed(tiny_model.model, tiny_processor, batch_size=3)
    return bank


# --- what is written, and from what ----------------------------------------------------------------------------------


def test_a_text_is_embedded_once_and_written_in_its_language(bank, tiny_model, tiny_processor):
    assert sorted(bank.texts) == sorted({text for _, reports in GROUPS for text in reports.values()})
    assert [(passage.text, passage.language) for passage in bank.passages] == [
        (text, language) for _, reports in GROUPS for language, text in reports.items()
    ]
    for passage in bank.passages:
        assert bank.texts[passage.own_row] == passage.text
        inputs = tiny_processor(text=passage.text, return_tensors="pt")
        alone = tiny_model.model.get_text_features(**inputs)[0]
        torch.testing.assert_close(bank.embeds[passage.own_row], alone, atol=1e-5, rtol=0)


def test_only_translations_are_written_across_languages(bank, tiny_model, tiny_processor):
    across = {(bank.texts[p.own_row], *(bank.texts[row] for row in p.other_rows)) for p in bank.passages}
    assert across == {
        ("Clear lungs.", "双肺清晰。"),
        ("双肺清晰。", "Clear lungs."),
        ("Clear lungs.",),
        ("心影正常。",),
        ("Normal heart.", "心影正常。"),
        ("心影正常。", "Normal heart."),
    }
    always, never = (
        WriteCollator(tiny_model, tiny_processor, bank, WriteRecipe(cross_lingual=share), cache=None)
        for share in (1.0, 0.0)
    )
    first, lone = bank.passages[0], bank.passages[2]
    assert {always._source_row(first) for _ in range(9)} == set(first.other_rows)
    assert {never._source_row(first) for _ in range(9)} == {first.own_row}
    assert always._source_row(lone) == lone.own_row


def test_the_memory_is_drawn_in_equal_shares_without_repeats(bank):
    memory = bank.support_memory(("en", "zh"), ["first", "second"], size=2, seed=0)
    assert memory.shape == (2, 2, 16)
    for language, rows in enumerate(memory):
        expected = {("first", "en"): "Clear lungs.", ("second", "en"): "Normal heart."}
        if language == 0:
            stored = {bank.texts[int((bank.embeds @ row).argmax())] for row in rows}
            assert stored == set(expected.values())
    with pytest.raises(ValueError, match="Expected 3 texts a language for the support memory, the sets have 2"):
        bank.support_memory(("en", "zh"), ["first", "second"], size=3, seed=0)


@pytest.mark.parametrize(
    ("available", "size", "shares"),
    [
        ([9, 9], 6, [3, 3]),
        ([1, 9], 6, [1, 5]),
        ([9, 1, 9], 7, [3, 1, 3]),
        ([0, 4], 4, [0, 4]),
        ([5, 5, 5], 7, [2, 2, 3]),
    ],
)
def test_equal_shares(available, size, shares):
    assert _equal_shares(available, size) == shares


def test_decoder_inputs_are_prompt_report_end(bank, tiny_model, tiny_processor):
    collator = WriteCollator(tiny_model, tiny_processor, bank, WriteRecipe(), cache=None)
    texts = ["Clear lungs.", "心影正常，双侧胸腔未见积液。"]
    inputs = collator.decoder_inputs(texts, ["en", "zh"])
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
def test_a_long_report_ends_with_a_whole_sentence(text, mark, bank, tiny_model, tiny_processor):
    collator = WriteCollator(tiny_model, tiny_processor, bank, WriteRecipe(max_text_length=20), cache=None)
    ids = collator._encode(text)
    assert 9 < len(ids) < 20
    kept = tiny_processor.tokenizer.decode(ids)
    assert text.startswith(kept) and kept.endswith(mark)


def test_texts_of_validation_and_left_out_studies_are_not_read(made_up_data):
    recipe = WriteRecipe(
        data_root=str(made_up_data),
        text_sets={"reported": 2, "texts": 1},
        parallel_sets=["texts"],
        exclude=["0"],
    )
    groups = load_texts(recipe)
    texts = [reports["en"] for _, reports in groups]
    assert sum("view 1." in text for text in texts) == 2
    assert not any(f"view {number}." in text for text in texts for number in (0, 4, 5, 8))
    assert [reports for name, reports in groups if name == "texts"] == [
        {"en": f"Heart number {number} is normal.", "zh": f"心影{number}号。"} for number in (1, 2)
    ], "a translation is lent to the study's own report"


# --- the run ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def base(write_recipe, tmp_path):
    """Returns the folder of a stage 1 that has hardly been trained."""
    run_recipe(write_recipe("align"), ["--max_steps", "1", "--eval_strategy", "no"])
    return tmp_path / "align"


def losses(folder) -> list[int]:
    return [entry["step"] for entry in json.loads((folder / "history.json").read_text()) if "loss" in entry]


def test_text_alone_trains_resumes_and_writes(base, write_recipe, tmp_path):
    facts = run_recipe(write_recipe("write"))
    folder = tmp_path / "write"
    assert (facts["supervision"], facts["pairs"], facts["steps"]) == ("text alone", 0, 3)
    assert set(facts["validation"]) >= {"eval_bleu_4_en", "eval_rouge_l_zh", "eval_distinct_zh"}
    assert losses(folder) == [1, 2, 3]
    assert (folder / "curves.png").stat().st_size > 5000
    memory = load_file(folder / "model.safetensors")["support_memory"]
    assert memory.shape == (2, 6, 16)
    torch.testing.assert_close(memory.norm(dim=-1), torch.ones(2, 6), atol=1e-3, rtol=0)

    facts = run_recipe(write_recipe("write"), ["--max_steps", "5"])
    assert facts["steps"] == 5 and json.loads((folder / "run.json").read_text())["steps"] == 5
    assert losses(folder) == [1, 2, 3, 4, 5], "it goes on at step 4"

    model = AutoModelForImageTextToText.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    inputs = processor(images=tmp_path / "data" / "reported" / "8.png", return_tensors="pt")
    ids = model.generate(**inputs, language="zh", max_new_tokens=8)
    assert len(processor.batch_decode(ids, skip_special_tokens=True)) == 1
    assert set(range(5)) - {3} <= set(model.generation_config.suppress_tokens)
    stage1, stage2 = AutoModel.from_pretrained(base), AutoModel.from_pretrained(folder)
    assert all(torch.equal(stage2.state_dict()[name], w) for name, w in stage1.state_dict().items())


def test_pairs_move_the_way_from_the_image_alone(base, write_recipe, tmp_path):
    facts = run_recipe(write_recipe("write", supervised_sets={"reported": 3}, max_steps=4))
    assert facts["pairs"] == 6 * 2 * 3 and "reported" in facts["supervision"]
    before, after = (AutoModel.from_pretrained(tmp_path / name).state_dict() for name in ("align", "write"))
    moved = {name.partition(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"study_pooling", "visual_projection"}


def test_a_writer_can_be_gone_on_from(base, write_recipe, tmp_path):
    run_recipe(write_recipe("write", eval_strategy="no"))
    again = write_recipe("write", base=str(tmp_path / "write"), output_dir=str(tmp_path / "more"), eval_strategy="no")
    run_recipe(again, ["--learning_rate", "1e-9", "--max_steps", "1"])
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("write", "more"))
    for name, weight in first.items():
        torch.testing.assert_close(second[name], weight, atol=1e-6, rtol=0, msg=name)


def test_training_brings_the_loss_down(base, write_recipe, tmp_path):
    run_recipe(write_recipe("write", eval_strategy="no"), ["--max_steps", "30"])
    history = json.loads((tmp_path / "write" / "history.json").read_text())
    values = [entry["loss"] for entry in history if "loss" in entry]
    assert np.mean(values[-3:]) < 0.6 * np.mean(values[:3])
