# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import m3fm
from m3fm.training.vocabulary import Pieces, Transfer, transfer_vocabulary
from tests.training.tiny_backbones import byte_level, metaspace, save_text, word_piece

SAMPLE = ("bert", "xlm-roberta", "qwen3", "gpt2")
KINDS = {"byte_level": byte_level, "metaspace": metaspace, "word_piece": word_piece}


@pytest.fixture(scope="module")
def shipped():
    return PreTrainedTokenizerFast.from_pretrained(m3fm.DEFAULT_CHECKPOINT)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("backbones")
    return {kind: save_text(root / kind, kind) for kind in SAMPLE}


def load(folder):
    decoder = folder.name in ("llama", "qwen3", "gpt2")
    return (AutoModelForCausalLM if decoder else AutoModel).from_pretrained(folder).eval()


@pytest.mark.parametrize("kind", SAMPLE)
def test_the_same_tokenizer_changes_nothing(folders, kind):
    model, own = load(folders[kind]), AutoTokenizer.from_pretrained(folders[kind])
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        before, rows = model(ids)[0], model.get_input_embeddings().weight.clone()
        done = transfer_vocabulary(model, own, own)
        after = model(ids)[0]
    assert done == Transfer(len(own), 0, 0)
    assert model.config.vocab_size == len(own) == len(rows) - 3
    torch.testing.assert_close(model.get_input_embeddings().weight, rows[: len(own)], rtol=0, atol=0)
    torch.testing.assert_close(after, before[..., : after.shape[-1]], rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_stand_for_the_text_that_they_spell(kind, shipped):
    for tokenizer in (KINDS[kind](), shipped):
        pieces = Pieces(tokenizer)
        for text in ("no pleural effusion", "双肺未见", "the lungs are"):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            spelled = b"".join(pieces.texts.get(number, b"?") for number in ids).decode()
            # The first word of a text has a mark of a space to some, and all words have one to WordPiece.
            assert spelled.replace(" ", "") == text.replace(" ", ""), (kind, text)
            assert spelled.lstrip(" ") == text or kind == "word_piece"
    assert len(pieces.texts) + len(pieces.byte_pieces) + len(pieces.special) == len(shipped)
    assert pieces.byte_pieces[shipped.convert_tokens_to_ids("<0x0A>")] == b"\n"


@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [
        ("byte_level", " pleural", ["Ġpleural"]),
        ("byte_level", "肺"[:1], None),
        ("metaspace", " no", ["▁no"]),
        ("metaspace", "肺炎", ["肺炎"]),
        # Normalized as XLM-RoBERTa does, and no mark of a space is put before it.
        ("metaspace", "ｔ", ["t"]),
        ("word_piece", " pleural effusion", ["pleural", "effusion"]),
        ("word_piece", "rmal", ["##rmal"]),
        ("word_piece", "双肺", ["双", "肺"]),
    ],
)
def test_text_is_spelled_as_a_part_of_a_longer_one(kind, text, expected):
    tokenizer = KINDS[kind]()
    ids = Pieces(tokenizer).spell(text.encode(), single_byte=False)
    names = tokenizer.convert_ids_to_tokens(ids)
    assert names == expected if expected else b"".join(Pieces(tokenizer).texts[i] for i in ids).decode() == text


def test_parts_of_a_character_go_from_bytes_to_bytes(shipped):
    lung = "肺".encode()
    by_bytes, with_fallback, without = (Pieces(each) for each in (byte_level(), shipped, metaspace()))
    assert b"".join(by_bytes.texts[i] for i in by_bytes.spell(lung[:2], single_byte=False)) == lung[:2]
    assert b"".join(with_fallback.byte_pieces[i] for i in with_fallback.spell(lung[:2], False)) == lung[:2]
    assert with_fallback.spell(b"A", single_byte=True) == [shipped.convert_tokens_to_ids("<0x41>")]
    assert with_fallback.spell(b"A", single_byte=False) == [shipped.convert_tokens_to_ids("A")]
    assert without.spell(lung[:2], single_byte=False) == []


@pytest.mark.parametrize("tied", [True, False])
def test_pieces_are_copied_averaged_or_fresh(tmp_path, shipped, tied):
    model = load(save_text(tmp_path / "llama", "llama", tie_word_embeddings=tied))
    old = byte_level()
    old_in = model.get_input_embeddings().weight.detach().clone()
    old_out = model.get_output_embeddings().weight.detach().clone()
    done = transfer_vocabulary(model, old, shipped)
    new_in, new_out = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert (new_in is new_out) == tied
    assert done.copied + done.averaged + done.fresh == len(shipped) == len(new_in) == len(new_out)
    new_id, old_id = shipped.convert_tokens_to_ids, old.convert_tokens_to_ids
    for rows, before in ((new_in, old_in), (new_out, old_out)):
        torch.testing.assert_close(rows[new_id(" pleural")], before[old_id("Ġpleural")], rtol=0, atol=0)
        long = next(i for i, text in Pieces(shipped).texts.items() if len(Pieces(old).spell(text, False)) == 3)
        mean = before[Pieces(old).spell(Pieces(shipped).texts[long], False)].mean(dim=0)
        torch.testing.assert_close(rows[long], mean)
        torch.testing.assert_close(rows[new_id("<0x0A>")], before[old_id("Ċ")], rtol=0, atol=0)
        torch.testing.assert_close(rows[shipped.pad_token_id], before[old.pad_token_id], rtol=0, atol=0)
        torch.testing.assert_close(rows[shipped.eos_token_id], before[old.eos_token_id], rtol=0, atol=0)
        # Qwen's kind has no beginning of text: its end serves for it.
        torch.testing.assert_close(rows[shipped.bos_token_id], before[old.eos_token_id], rtol=0, atol=0)
        languages = rows[[new_id("<|en|>"), new_id("<|zh|>")]]
        assert not torch.equal(*languages)
        assert (languages - before[: len(old)].mean(dim=0)).norm(dim=1).max() < before[2:].norm(dim=1).min()
    assert (model.config.pad_token_id, model.config.bos_token_id, model.config.eos_token_id) == (0, 2, 3)
    assert model.generation_config.eos_token_id == 3
    assert model.config.vocab_size == model.vocab_size == 8000
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    ids = torch.tensor([shipped("no pleural effusion")["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits)


def test_logits_of_a_text_whose_pieces_are_copied_are_equal(folders, shipped):
    model, old = load(folders["qwen3"]), byte_level()
    text = " pleural effusion seen"
    old_ids, new_ids = (each(text)["input_ids"] for each in (old, shipped))
    assert [old.decode([i]) for i in old_ids] == [shipped.decode([i]) for i in new_ids]
    with torch.no_grad():
        before = model(torch.tensor([old_ids])).logits[0]
        transfer_vocabulary(model, old, shipped)
        after = model(torch.tensor([new_ids])).logits[0]
    torch.testing.assert_close(after[:, new_ids], before[:, old_ids])


def test_a_tokenizer_of_another_model_is_refused(folders):
    model = load(folders["xlm-roberta"])
    with pytest.raises(ValueError, match="593 token embeddings and its tokenizer an id 699"):
        transfer_vocabulary(model, byte_level(), metaspace())


def test_a_trained_model_speaks_the_new_vocabulary_before_it_is_trained_again(shipped):
    """A decoder that has learned its phrases gives them more probability by the carried vocabulary than by another."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.training.tiny_backbones import TOWER, phrases

    def loss(model, tokenizer):
        texts = phrases()[:16]
        batch = tokenizer(list(texts), padding=True, return_tensors="pt", add_special_tokens=False)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        mean = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
        return mean, mean.item() * int((labels[:, 1:] >= 0).sum()) / sum(map(len, texts))

    torch.manual_seed(0)
    old = byte_level()
    sizes = TOWER | {"num_hidden_layers": 1, "vocab_size": len(old), "pad_token_id": 0, "tie_word_embeddings": True}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, bos_token_id=None, eos_token_id=1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    for _ in range(30):
        optimizer.zero_grad()
        loss(model, old)[0].backward()
        optimizer.step()
    model.eval()
    transfer_vocabulary(model, old, shipped)
    _, carried = loss(model, shipped)
    with torch.no_grad():
        table = model.get_input_embeddings().weight
        table.copy_(table[torch.randperm(len(table))])
    _, shuffled = loss(model, shipped)
    assert carried < 0.7 * shuffled
