# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Stage 2 from a recipe to reports, on made-up images."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor

from m3fm import M3FMConfig
from m3fm.training.recipe import run_recipe
from m3fm.training.write import (
    Passage,
    TextBank,
    TextGroup,
    WriteCollator,
    WriteDataset,
    WriteRecipe,
    WriteTrainer,
    _equal_shares,
    build_writer,
    load_pairs,
    load_texts,
)

pytest.importorskip("accelerate")

GROUPS = [
    TextGroup("first", {"en": "Clear lungs.", "zh": "双肺清晰。"}, ("en", "zh")),
    TextGroup("first", {"en": "Clear lungs."}, ("en",)),
    TextGroup("second", {"zh": "心影正常。"}, ("zh",)),
    TextGroup("second", {"en": "Normal heart.", "zh": "心影正常。"}, ("en", "zh")),
    # The English is a paraphrase: Chinese is written from it, and nobody writes it.
    TextGroup("second", {"en": "There is no effusion.", "zh": "未见胸腔积液。"}, ("zh",)),
]


@pytest.fixture
def bank(tiny_model, tiny_processor) -> TextBank:
    bank = TextBank(GROUPS, ("en", "zh"))
    bank.embed(tiny_model.model, tiny_processor, batch_size=3)
    return bank


# --- what is written, and from what ----------------------------------------------------------------------------------


def test_a_text_is_embedded_once_and_written_in_its_language(bank, tiny_model, tiny_processor):
    assert sorted(bank.texts) == sorted({text for group in GROUPS for text in group.versions.values()})
    assert [(passage.text, passage.language) for passage in bank.passages] == [
        (group.versions[language], language) for group in GROUPS for language in group.targets
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
        ("未见胸腔积液。", "There is no effusion."),
    }
    always, never = (
        WriteCollator(tiny_model, tiny_processor, bank, WriteRecipe(cross_lingual=share), cache=None)
        for share in (1.0, 0.0)
    )
    first, lone = bank.passages[0], bank.passages[2]
    rng = np.random.default_rng(0)
    assert {always._source_row(first, rng) for _ in range(9)} == set(first.other_rows)
    assert {never._source_row(first, rng) for _ in range(9)} == {first.own_row}
    assert always._source_row(lone, rng) == lone.own_row
    for collator, rows in ((always, [*first.other_rows, lone.own_row]), (never, [first.own_row, lone.own_row])):
        assert torch.equal(collator([first, lone])["text"]["shared_embeds"], bank.embeds[rows])


def test_what_is_only_written_from_is_no_target_and_not_in_the_memory(bank):
    paraphrase = bank.texts.index("There is no effusion.")
    assert paraphrase not in {passage.own_row for passage in bank.passages}
    assert paraphrase not in {row for rows in bank.rows_of.values() for row in rows}
    assert [bank.texts[row] for row in bank.rows_of["second", "zh"]] == ["心影正常。", "未见胸腔积液。"]
    written_elsewhere = TextGroup("first", {"en": "There is no effusion."}, ("en",))
    both = TextBank([*GROUPS, written_elsewhere], ("en", "zh"))
    assert paraphrase in both.rows_of["first", "en"], "a report that reads as a paraphrase does is a report"


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
    inputs = collator.texts.decoder_inputs(texts, ["en", "zh"])
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
    ids = collator.texts.encoded(text)
    assert 9 < len(ids) < 20
    kept = tiny_processor.tokenizer.decode(ids)
    assert text.startswith(kept) and kept.endswith(mark)


def recipe_of(made_up_data, **values) -> WriteRecipe:
    sets = {"text_sets": {"reported": 2, "texts": 1}, "parallel_sets": ["texts"]}
    return WriteRecipe(data_root=str(made_up_data), **{**sets, **values})


def add_rows(path, rows) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def test_only_texts_of_the_training_part_are_read(made_up_data):
    groups = load_texts(recipe_of(made_up_data, exclude=["0"]))
    english = [group.versions["en"] for group in groups]
    assert sum("view 1." in text for text in english) == 2
    assert not any(f"view {number}." in text for text in english for number in (0, 4, 5, 8, 12))
    assert {group.targets for group in groups if group.source == "reported"} == {("en", "zh")}
    assert [group for group in groups if group.source == "texts"] == [
        *(TextGroup("texts", {"en": f"Heart number {number} is normal."}, ("en",)) for number in (1, 2)),
        *(
            TextGroup("texts", {"en": f"Heart number {number}.", "zh": f"心影{number}号。"}, ("zh",))
            for number in (1, 2)
        ),
    ], "a translation is written, and the paraphrase that it was made of is not"


def test_a_paraphrase_is_neither_written_nor_remembered(made_up_data):
    # Of study 5 nothing is left when sentences about earlier examinations are gone.
    row = {"study_id": "5", "modality": "cxr", "split": "train", "findings_en": "Unchanged from the prior exam."}
    add_rows(made_up_data / "texts" / "data.jsonl", [row])
    pair = {"study_id": "5", "en": "Heart number 5.", "zh": "心影5号。"}
    add_rows(made_up_data / "texts" / "parallel_en_zh.jsonl", [pair])
    bank = TextBank(load_texts(recipe_of(made_up_data)), ("en", "zh"))
    paraphrases = {row for row, text in enumerate(bank.texts) if re.fullmatch(r"Heart number \d\.", text)}
    assert len(paraphrases) >= 3
    assert not paraphrases & {passage.own_row for passage in bank.passages}
    assert not paraphrases & {row for rows in bank.rows_of.values() for row in rows}
    sources = {bank.texts[row] for passage in bank.passages for row in passage.other_rows}
    assert {"Heart number 1.", "Heart number 2."} <= sources


def test_translations_that_tell_of_earlier_examinations_or_are_masked_are_not_written(made_up_data):
    pairs = [
        {"study_id": "1", "en": "The heart is unchanged from the prior exam.", "zh": "心影较前无变化。"},
        {"study_id": "2", "en": "XXXX wires are seen.", "zh": "可见XXXX金属丝。"},
        {"study_id": "2", "en": "The heart is large.", "zh": "心影增大。"},
    ]
    add_rows(made_up_data / "texts" / "parallel_en_zh.jsonl", pairs)
    bank = TextBank(load_texts(recipe_of(made_up_data)), ("en", "zh"))
    for pair in pairs[:2]:
        assert not {pair["en"], pair["zh"]} & set(bank.texts)
    assert {"心影增大。", "心影1号。"} <= {passage.text for passage in bank.passages}


def test_pairs_are_images_of_the_training_part_with_each_language(made_up_data):
    recipe = recipe_of(made_up_data, supervised_sets={"reported": 2, "labelled": 1, "texts": 1}, exclude=["0"])
    pairs = [(study.source, study.study_id, language) for study, language in load_pairs(recipe, ("en", "zh"))]
    assert sorted(pairs) == sorted(
        [("reported", number, language) for number in "12367" for language in ("en", "zh")] * 2
    )
    assert {language for _, language in load_pairs(recipe, ("zh",))} == {"zh"}


def test_a_set_that_states_no_parts_is_trained_on_whole(made_up_data):
    path = made_up_data / "reported" / "metadata.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    path.write_text("", encoding="utf-8")
    add_rows(path, [{name: value for name, value in row.items() if name != "split"} for row in rows])
    recipe = recipe_of(made_up_data, text_sets={"reported": 1}, supervised_sets={"reported": 1})
    assert len(load_texts(recipe)) == len(rows)
    assert len(load_pairs(recipe, ("en", "zh"))) == 2 * len(rows)


def test_a_batch_holds_items_of_like_length_and_an_epoch_each_of_them_once(made_up_data):
    texts = ["a" * (1 + 7 * number % 64) for number in range(60)]
    passages = [Passage(text, "en", row, ()) for row, text in enumerate(texts)]
    pairs = load_pairs(recipe_of(made_up_data, supervised_sets={"reported": 1}), ("en", "zh"))
    dataset = WriteDataset(passages, pairs)
    lengths = dataset.lengths()
    assert lengths[:60] == [len(text) for text in texts]
    assert lengths[60:] == [len(study.reports[language].encode()) for study, language in pairs]
    trainer = WriteTrainer.__new__(WriteTrainer)
    trainer.train_dataset, trainer.args = dataset, SimpleNamespace(seed=3, train_batch_size=4)
    order = list(trainer._get_train_sampler(dataset))
    assert sorted(order) == list(range(len(dataset)))
    batches = [[lengths[index] for index in order[start : start + 4]] for start in range(0, len(order), 4)]
    assert np.mean([max(batch) - min(batch) for batch in batches]) < 0.3 * np.ptp(lengths)
    assert order != list(range(len(dataset)))


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
def base(write_recipe, tmp_path):
    """Returns the folder of a stage 1 that has hardly been trained."""
    run_recipe(write_recipe("align"), ["--max_steps", "1", "--eval_strategy", "no"])
    return tmp_path / "align"


def losses(folder) -> list[int]:
    return [entry["step"] for entry in json.loads((folder / "history.json").read_text()) if "loss" in entry]


def test_text_alone_trains_resumes_and_writes(base, write_recipe, tmp_path):
    facts = run_recipe(write_recipe("write", generation={"num_beams": 2}))
    folder = tmp_path / "write"
    assert facts["output_dir"] == str(folder)
    assert (facts["supervision"], facts["pairs"], facts["steps"]) == ("text alone", 0, 3)
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
    assert facts["steps"] == 5 and json.loads((folder / "run.json").read_text())["steps"] == 5
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
