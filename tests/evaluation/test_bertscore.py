# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
import random

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

from m3fm.evaluation import bertscore
from m3fm.evaluation.bertscore import NAMES, BertScorer
from m3fm.evaluation.text_metrics import TextScorer

WORDS = ("no", "pleural", "effusion", "clear", "lungs", "left", "right", ".", "肺", "清", "晰")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """Returns the folder of a tiny random BERT."""
    folder = tmp_path_factory.mktemp("encoder")
    (folder / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]), encoding="utf-8"
    )
    tokenizer = BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=24)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=5 + len(WORDS),
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=24,
        initializer_range=0.5,
    )
    BertModel(config).save_pretrained(folder)
    return folder


def made_up(count, seed):
    generator = random.Random(seed)
    return [" ".join(generator.choices(WORDS, k=generator.randint(1, 18))) for _ in range(count)]


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_scores_equal_the_public_implementation(encoder, layer):
    package = pytest.importorskip("bert_score")
    predictions, references = made_up(20, 0), made_up(20, 1)
    try:
        peer = package.BERTScorer(model_type=str(encoder), num_layers=layer, device="cpu", use_fast_tokenizer=True)
        expected = np.stack([values.numpy() for values in peer.score(predictions, references)], axis=1)
    except AttributeError as error:
        pytest.skip(f"bert_score does not run here: {error}")
    ours = BertScorer(encoder, layer=layer, batch_size=4).score(predictions, references)
    np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_a_hand_computed_example(encoder):
    scorer = BertScorer(encoder)
    features = []
    for text in ("clear lungs", "no effusion ."):
        inputs = scorer.tokenizer(text, return_tensors="pt")
        hidden = scorer.model(**inputs).last_hidden_state[0]
        features.append(hidden / hidden.norm(dim=-1, keepdim=True))
    similar = features[0] @ features[1].T  # [CLS] and [SEP] may be matched but do not count
    precision = similar.max(dim=1).values[1:-1].mean().item()
    recall = similar.max(dim=0).values[1:-1].mean().item()
    expected = [precision, recall, 2 * precision * recall / (precision + recall)]
    assert scorer.score(["clear lungs"], ["no effusion ."])[0] == pytest.approx(expected, abs=1e-5)


def test_identical_reports_score_one_and_empty_ones_nothing(encoder):
    scores = BertScorer(encoder).score(["clear lungs", "", "clear", " \n"], ["clear lungs", "clear", "", ""])
    np.testing.assert_allclose(scores, [[1, 1, 1], [0, 0, 0], [0, 0, 0], [0, 0, 0]], atol=1e-5)


def test_scores_depend_neither_on_the_batch_nor_on_what_is_kept(encoder, monkeypatch):
    predictions, references = made_up(40, 2), made_up(40, 3)
    expected = BertScorer(encoder, batch_size=1).score(predictions, references)
    scorer = BertScorer(encoder, batch_size=16)
    monkeypatch.setattr(bertscore, "_KEPT_TOKENS", 30)
    monkeypatch.setattr(bertscore, "_PAIRS_AT_ONCE", 7)
    order = random.Random(0).sample(range(40), 40)
    shuffled = scorer.score([predictions[i] for i in order], [references[i] for i in order])
    np.testing.assert_allclose(shuffled, expected[order], atol=1e-5)
    assert sum(len(weights) for _, weights in scorer._kept.values()) <= 30


def test_a_text_is_encoded_once(encoder, monkeypatch):
    scorer = BertScorer(encoder)
    encoded = []
    encode = scorer._encode
    monkeypatch.setattr(scorer, "_encode", lambda text: encoded.append(text) or encode(text))
    scorer.score(["clear"] * 5, ["clear", "lungs", "no", "clear", " lungs "])
    scorer.score(["lungs"], ["no"])
    assert sorted(encoded) == ["clear", "lungs", "no"]


def test_a_report_longer_than_the_encoder_takes_is_cut(encoder):
    scorer = BertScorer(encoder)
    scorer.tokenizer.model_max_length = int(1e30)  # as where the folder says nothing of it
    text = "clear lungs " * 40
    assert scorer.score([text], [text])[0] == pytest.approx([1, 1, 1], abs=1e-5)
    assert len(scorer._encode(text)) == 24


def test_it_joins_the_suite(encoder):
    scorer = TextScorer(["clear lungs", "no effusion"], "en", bertscore=BertScorer(encoder), metrics=["chrf"])
    scores = {}
    for measurement in scorer.measure(["clear lungs", "clear"]):
        scores |= measurement.score(np.array([[1.0, 0.0], [1.0, 1.0]]))
    assert tuple(scores) == ("chrf", *NAMES)
    assert scores["bertscore_f1"][0] == pytest.approx(1, abs=1e-5)
    assert scores["bertscore_f1"][1] < 1


def test_wrong_input_is_refused(encoder, tmp_path):
    with pytest.raises(ValueError, match=r"no config.json there"):
        BertScorer(tmp_path)
    (tmp_path / "config.json").write_text((encoder / "config.json").read_text())
    (tmp_path / "vocab.txt").write_text((encoder / "vocab.txt").read_text())
    with pytest.raises(ValueError, match=r"model.safetensors"):
        BertScorer(tmp_path)
    with pytest.raises(ValueError, match="layer from 1 to 3, got 4"):
        BertScorer(encoder, layer=4)
    with pytest.raises(ValueError, match="batch_size >= 1"):
        BertScorer(encoder, batch_size=0)
    with pytest.raises(ValueError, match="got 1 and 2"):
        BertScorer(encoder).score(["a"], ["a", "b"])
