# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""What is written, and from what: texts, their embeddings, and the folder that keeps these."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file

from m3fm.training import text_bank
from m3fm.training.text_bank import TextBank, TextGroup, TextSets, load_texts

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
    bank.embed(tiny_model.model, tiny_processor)
    return bank


def test_a_text_is_embedded_once_and_written_in_its_language(bank, tiny_model, tiny_processor):
    assert sorted(bank.texts) == sorted({text for group in GROUPS for text in group.versions.values()})
    assert [(passage.text, passage.language) for passage in bank.passages] == [
        (group.versions[language], language) for group in GROUPS for language in group.targets
    ]
    for passage in bank.passages:
        assert bank.texts[passage.own_row] == passage.text
        inputs = tiny_processor(text=passage.text, return_tensors="pt")
        alone = tiny_model.model.get_text_features(**inputs)[0]
        torch.testing.assert_close(bank.embeds[passage.own_row].float(), alone, atol=1e-3, rtol=0)


def test_what_is_only_written_from_is_no_target_and_not_in_the_memory(bank):
    paraphrase = bank.texts.index("There is no effusion.")
    assert paraphrase not in {passage.own_row for passage in bank.passages}
    assert paraphrase not in {row for rows in bank.rows_of.values() for row in rows}
    assert [bank.texts[row] for row in bank.rows_of["second", "zh"]] == ["心影正常。", "未见胸腔积液。"]
    written_elsewhere = TextGroup("first", {"en": "There is no effusion."}, ("en",))
    both = TextBank([*GROUPS, written_elsewhere], ("en", "zh"))
    assert paraphrase in both.rows_of["first", "en"], "a report that reads as a paraphrase does is a report"


def test_embeddings_are_kept_by_encoder_and_texts(tiny_model, tiny_processor, bank, tmp_path, monkeypatch):
    computed = []
    whole = TextBank._embedded

    def embedded(self, model, processor, rows):
        computed.append(len(rows))
        return whole(self, model, processor, rows)

    monkeypatch.setattr(TextBank, "_embedded", embedded)
    monkeypatch.setattr(text_bank, "_PART_TEXTS", 4)
    kept = TextBank(GROUPS, ("en", "zh"))
    kept.embed(tiny_model.model, tiny_processor, tmp_path)
    assert computed == [4, 2]
    assert kept.embeds.dtype == torch.float16
    torch.testing.assert_close(kept.embeds, bank.embeds, atol=1e-3, rtol=0)
    (path,) = tmp_path.glob("*.safetensors")
    assert torch.equal(load_file(path)["embeds"], kept.embeds)

    tiny_processor(text=["cut"], max_length=2, truncation=True)  # how a tokenizer was used last makes no other file
    again = TextBank(GROUPS, ("en", "zh"))
    again.embed(tiny_model.model, tiny_processor, tmp_path)
    assert computed == [4, 2] and torch.equal(again.embeds, kept.embeds)

    TextBank(GROUPS[:2], ("en", "zh")).embed(tiny_model.model, tiny_processor, tmp_path)
    assert computed == [4, 2, 2]
    with torch.no_grad():
        tiny_model.model.text_projection.weight[0, 0] += 1
    TextBank(GROUPS, ("en", "zh")).embed(tiny_model.model, tiny_processor, tmp_path)
    assert computed == [4, 2, 2, 4, 2]


def test_a_stopped_run_does_not_embed_again(tiny_model, tiny_processor, bank, tmp_path, monkeypatch):
    whole, computed = TextBank._embedded, []

    def embedded(self, model, processor, rows):
        if len(computed) == 1:
            computed.append("stopped")
            raise KeyboardInterrupt
        computed.append(len(rows))
        return whole(self, model, processor, rows)

    monkeypatch.setattr(TextBank, "_embedded", embedded)
    monkeypatch.setattr(text_bank, "_PART_TEXTS", 4)
    with pytest.raises(KeyboardInterrupt):
        TextBank(GROUPS, ("en", "zh")).embed(tiny_model.model, tiny_processor, tmp_path)
    resumed = TextBank(GROUPS, ("en", "zh"))
    resumed.embed(tiny_model.model, tiny_processor, tmp_path)
    assert computed == [4, "stopped", 2]
    torch.testing.assert_close(resumed.embeds, bank.embeds, atol=1e-3, rtol=0)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1


def test_lengths_are_those_of_passages(bank, tiny_processor):
    expected = [len(tiny_processor.tokenizer(passage.text)["input_ids"]) for passage in bank.passages]
    assert bank.lengths(tiny_processor).tolist() == expected


def sets_of(made_up_data, **values) -> TextSets:
    sets = {"text_sets": {"reported": 2, "texts": 1}, "parallel_sets": ["texts"]}
    return TextSets(data_root=str(made_up_data), **{**sets, **values})


def add_rows(path, rows) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def test_only_texts_of_the_training_part_are_read(made_up_data):
    groups = load_texts(sets_of(made_up_data, exclude=["0"]))
    english = [group.versions["en"] for group in groups]
    assert sum("view 1." in text for text in english) == 2
    assert not any(f"view {number}." in text for text in english for number in (0, 4, 5, 8, 12))
    assert {group.targets for group in groups if group.source == "reported"} == {("en", "zh")}
    assert [group for group in groups if group.source == "texts"] == [
        *(TextGroup("texts", {"en": f"Heart number {number} is normal."}, ("en",), str(number)) for number in (1, 2)),
        *(
            TextGroup("texts", {"en": f"Heart number {number}.", "zh": f"心影{number}号。"}, ("zh",), str(number))
            for number in (1, 2)
        ),
    ], "a translation is written, and the paraphrase that it was made of is not"


def test_a_paraphrase_is_neither_written_nor_remembered(made_up_data):
    # Of study 5 nothing is left when sentences about earlier examinations are gone.
    row = {"study_id": "5", "modality": "cxr", "split": "train", "findings_en": "Unchanged from the prior exam."}
    add_rows(made_up_data / "texts" / "data.jsonl", [row])
    pair = {"study_id": "5", "en": "Heart number 5.", "zh": "心影5号。"}
    add_rows(made_up_data / "texts" / "parallel_en_zh.jsonl", [pair])
    bank = TextBank(load_texts(sets_of(made_up_data)), ("en", "zh"))
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
    bank = TextBank(load_texts(sets_of(made_up_data)), ("en", "zh"))
    for pair in pairs[:2]:
        assert not {pair["en"], pair["zh"]} & set(bank.texts)
    assert {"心影增大。", "心影1号。"} <= {passage.text for passage in bank.passages}


def test_a_set_that_states_no_parts_is_trained_on_whole(made_up_data):
    path = made_up_data / "reported" / "metadata.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    path.write_text("", encoding="utf-8")
    add_rows(path, [{name: value for name, value in row.items() if name != "split"} for row in rows])
    sets = sets_of(made_up_data, text_sets={"reported": 1}, parallel_sets=[])
    assert len(load_texts(sets)) == len(rows)


def test_parallel_text_of_a_set_that_is_not_read_is_refused(made_up_data):
    with pytest.raises(ValueError, match=r"parallel_sets: got \['labelled'\], expected sets that text_sets names too"):
        load_texts(sets_of(made_up_data, parallel_sets=["texts", "labelled"]))
