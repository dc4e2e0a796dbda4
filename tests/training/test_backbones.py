# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.

import json
import re

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoProcessor, AutoTokenizer

import m3fm
from m3fm import M3FMConfig, M3FMForReportGeneration, M3FMImageProcessor, M3FMModel, M3FMProcessor
from m3fm.training.backbones import (
    backbone_config,
    check_fit,
    check_language,
    fit_positions,
    known_backbones,
    load_decoder,
    load_text_encoder,
    load_tokenizer,
    load_vision_tower,
    meta_model,
)
from tests.training.tiny_backbones import TOWER, VISION, metaspace, save_text, save_vision, word_piece

LANGUAGES = ["en", "zh"]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(str(m3fm.DEFAULT_CHECKPOINT), LANGUAGES)[0]


# --------------------------------------------------------------------------------------------------------------------
# Names


@pytest.mark.parametrize("name", known_backbones())
def test_well_known_backbones_have_their_published_parameters(name):
    known = known_backbones()[name]
    config = backbone_config(name)
    causal = config.model_type == "qwen3"
    model = meta_model(config, AutoModelForCausalLM if causal else AutoModel)
    count = sum(weight.numel() for weight in model.parameters()) / 1e6
    assert count == pytest.approx(known["parameters"], rel=2e-3)
    assert all(weight.is_meta for weight in model.parameters())
    # A misspelt value would be kept as an attribute that nothing reads.
    declared = json.loads(AutoConfig.for_model(config.model_type).to_json_string(use_diff=False)).keys()
    assert known["config"].keys() <= declared | {"vision_use_head"}


def test_a_folder_says_more_than_what_is_known(tmp_path):
    folder = save_vision(tmp_path / "tower", "dinov2")
    assert backbone_config(str(folder)).hidden_size == 32


@pytest.mark.parametrize("load", [backbone_config, lambda name: load_tokenizer(name, LANGUAGES)])
def test_a_backbone_that_is_not_here_is_refused(load):
    with pytest.raises(ValueError, match=r"No backbone 'nobody/nothing' on this machine.*hf download nobody/nothing"):
        load("nobody/nothing")


def test_weights_that_are_not_here_are_not_planned_but_refused(tokenizer):
    with pytest.raises(ValueError, match=r"No backbone|no weights as safetensors"):
        load_vision_tower("facebook/dinov2-small", 224, 224)
    with pytest.raises(ValueError, match="No backbone 'FacebookAI/xlm-roberta-base' on this machine"):
        load_text_encoder("FacebookAI/xlm-roberta-base", tokenizer)


# --------------------------------------------------------------------------------------------------------------------
# Image towers


@pytest.mark.parametrize(
    ("kind", "others"),
    [("vit", 1), ("dinov2", 1), ("dinov2_with_registers", 5), ("clip_vision_model", 1), ("siglip_vision_model", 0)],
)
def test_image_towers_are_fitted_to_the_images(tmp_path, kind, others):
    folder = save_vision(tmp_path / kind, kind, image_size=56)
    own = AutoModel.from_pretrained(folder).eval()
    tower = load_vision_tower(str(folder), 28, 28).eval()
    assert tower.config.image_size == 28 and getattr(tower, "pooler", None) is None
    pixels = torch.randn(2, 3, 28, 28, generator=torch.manual_seed(0))
    with torch.no_grad():
        states = tower(pixel_values=pixels).last_hidden_state
        # The tower's own way, at every step.
        resampling = {} if kind.startswith("dinov2") else {"interpolate_pos_encoding": True}
        expected = own(pixel_values=pixels, **resampling).last_hidden_state
    assert states.shape == (2, others + 4, 32)
    torch.testing.assert_close(states, expected, rtol=1e-5, atol=1e-5)


def test_a_fitted_tower_is_saved_and_loaded_in_its_model(tmp_path):
    tower = load_vision_tower(str(save_vision(tmp_path / "vit", "vit", image_size=56)), 28, 28).eval()
    model = M3FMModel(M3FMConfig(vision_config=tower.config, text_encoder_config={"model_type": "bert", **TOWER}))
    model.vision_model = tower
    model.save_pretrained(tmp_path / "saved")
    again = M3FMModel.from_pretrained(tmp_path / "saved").eval()
    pixels = torch.zeros(1, 3, 28, 28)
    with torch.no_grad():
        states = [each.get_vision_features(pixels) for each in (model.eval(), again)]
    torch.testing.assert_close(*states)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_of_a_model_of_images_and_texts_the_image_tower_is_taken(tmp_path, kind):
    text = {**TOWER, "vocab_size": 60, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = AutoConfig.for_model(kind, vision_config=VISION, text_config=text)
    whole = AutoModel.from_config(config)
    whole.save_pretrained(tmp_path)
    tower = load_vision_tower(str(tmp_path), 28, 28)
    assert tower.config.model_type == f"{kind}_vision_model"
    for name, weight in tower.state_dict().items():
        assert torch.equal(weight, whole.vision_model.state_dict()[name]), name
    # SigLIP pools the image by a head that nothing here would train.
    assert not any(name.startswith("head.") for name in tower.state_dict())


@pytest.mark.parametrize("kind", ["convnext", "resnet"])
def test_convolutional_networks_are_refused(tmp_path, kind):
    sizes = {"hidden_sizes": [8, 8], "depths": [1, 1], "num_stages": 2, "embedding_size": 8}
    AutoModel.from_config(AutoConfig.for_model(kind, **sizes)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"\({kind}\) makes a map of shape \(1, 8, \d+, \d+\)"):
        load_vision_tower(str(tmp_path), 32, 32)


def test_other_networks_are_no_image_towers(tmp_path):
    folder = save_text(tmp_path / "bert", "bert")
    with pytest.raises(ValueError, match="BertModel reads input_ids. Expected a ViT-like tower"):
        load_vision_tower(str(folder), 28, 28)
    with pytest.raises(ValueError, match="is a whole M3FM checkpoint, no backbone"):
        load_vision_tower(str(m3fm.DEFAULT_CHECKPOINT), 28, 28)


def test_images_that_do_not_divide_into_patches_are_refused(tmp_path):
    folder = save_vision(tmp_path / "tower", "dinov2")
    with pytest.raises(ValueError, match="30 x 30 pixels do not divide .* a multiple of 14, as 28"):
        load_vision_tower(str(folder), 30, 30)


def test_a_tower_that_takes_squares_alone_says_so(tmp_path):
    folder = save_vision(tmp_path / "tower", "vit")
    with pytest.raises(ValueError, match=r"takes no images of 28 x 56 pixels: .*a square that it takes"):
        load_vision_tower(str(folder), 28, 56)


def test_weights_of_another_network_are_refused(tmp_path):
    folder = save_vision(tmp_path / "tower", "dinov2")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    with pytest.raises(ValueError, match=r"lacks 1\d weights of Dinov2Model \(encoder.layer.3"):
        load_vision_tower(str(folder), 28, 28)


def test_pickled_weights_are_refused(tmp_path):
    folder = save_vision(tmp_path / "tower", "dinov2")
    torch.save(AutoModel.from_pretrained(folder).state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="has no weights as safetensors"):
        load_vision_tower(str(folder), 28, 28)


def test_fitted_positions_keep_what_is_trained(tmp_path):
    tower = AutoModel.from_pretrained(save_vision(tmp_path / "tower", "dinov2"))
    tower.embeddings.position_embeddings.requires_grad_(False)
    fit_positions(tower, 42, 42)
    assert tower.embeddings.position_embeddings.shape == (1, 10, 32)
    assert not tower.embeddings.position_embeddings.requires_grad and tower.embeddings.cls_token.requires_grad


# --------------------------------------------------------------------------------------------------------------------
# Text


@pytest.mark.parametrize("kind", ["bert", "xlm-roberta", "modernbert"])
def test_text_encoders_take_the_one_tokenizer(tmp_path, tokenizer, kind):
    folder = save_text(tmp_path / kind, kind)
    encoder = load_text_encoder(str(folder), tokenizer).eval()
    assert encoder.config.vocab_size == 8000 and encoder.config.pad_token_id == 0
    assert getattr(encoder, "pooler", None) is None and encoder.dtype == torch.float32
    texts = tokenizer(["no pleural effusion", "双肺未见异常"], padding=True, return_tensors="pt")
    states = encoder(**texts).last_hidden_state
    alone = encoder(**tokenizer("no pleural effusion", return_tensors="pt")).last_hidden_state
    torch.testing.assert_close(states[0, : alone.shape[1]], alone[0], rtol=1e-4, atol=1e-5)


def test_roberta_is_bert_but_for_its_positions(tmp_path):
    own = AutoModel.from_pretrained(save_text(tmp_path / "xlmr", "xlm-roberta")).eval()
    same, _, _ = load_tokenizer(str(tmp_path / "xlmr"), LANGUAGES)
    kept = load_text_encoder(str(tmp_path / "xlmr"), same)
    assert kept.config.model_type == "xlm-roberta"
    # The same pieces with another padding id.
    other, _, _ = load_tokenizer(str(tmp_path / "xlmr"), LANGUAGES)
    other.pad_token = "<mask>"
    bert = load_text_encoder(str(tmp_path / "xlmr"), other)
    assert bert.config.model_type == "bert" and bert.config.max_position_embeddings == 62
    ids = torch.tensor([metaspace()("no pleural effusion", add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        for encoder in (kept, bert):
            torch.testing.assert_close(
                encoder(ids, torch.ones_like(ids)).last_hidden_state, own(ids, torch.ones_like(ids)).last_hidden_state
            )
    model = M3FMModel(M3FMConfig(vision_config={"model_type": "dinov2", **VISION}, text_encoder_config=bert.config))
    model.text_encoder = bert
    assert model.max_text_tokens == 62


@pytest.mark.parametrize("kind", ["qwen3", "gpt2"])
def test_decoders_write_with_the_one_tokenizer(tmp_path, tokenizer, kind):
    folder = save_text(tmp_path / kind, kind)
    decoder = load_decoder(str(folder), tokenizer, num_placeholders=5)
    assert decoder.config.vocab_size == 8000 and decoder.config.eos_token_id == tokenizer.eos_token_id
    config = M3FMConfig(
        vision_config={"model_type": "dinov2", **VISION},
        text_encoder_config={"model_type": "bert", **TOWER, "vocab_size": 8000, "pad_token_id": 0},
        text_config=decoder.config,
        projection_dim=16,
        support_memory_size=0,
    )
    model = M3FMForReportGeneration(config)
    model.decoder = decoder
    processor = M3FMProcessor(M3FMImageProcessor(size={"height": 28, "width": 28}), tokenizer)
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    model = M3FMForReportGeneration.from_pretrained(tmp_path / "saved").eval()
    assert torch.equal(model.decoder.get_input_embeddings().weight, decoder.get_input_embeddings().weight)
    ids = model.generate(pixel_values=torch.zeros(1, 3, 28, 28), language="zh", max_new_tokens=4)
    assert ids.shape[1] <= 9 and AutoProcessor.from_pretrained(tmp_path / "saved").batch_decode(ids)


@pytest.mark.parametrize(
    ("load", "kind", "message"),
    [
        ("encoder", "t5", "is no text encoder: expected one that was pretrained by masking"),
        ("encoder", "llama", "is no text encoder"),
        ("decoder", "t5", "is no decoder that this model can write with"),
        ("decoder", "bert", "is no decoder"),
        ("decoder", "mamba", "is no decoder"),
    ],
)
def test_other_kinds_of_networks_are_refused(tmp_path, tokenizer, load, kind, message):
    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_text_encoder(str(tmp_path), tokenizer) if load == "encoder" else load_decoder(str(tmp_path), tokenizer, 5)


def test_a_decoder_without_positions_for_the_prompt_is_refused(tmp_path, tokenizer):
    folder = save_text(tmp_path / "gpt2", "gpt2")
    with pytest.raises(ValueError, match="has 64 positions, and a prompt of 64 tokens"):
        load_decoder(str(folder), tokenizer, num_placeholders=64)


def test_a_backbone_without_one_of_the_languages_is_refused(tmp_path, tokenizer):
    english = save_text(tmp_path / "bert", "bert", word_piece(chinese=False))
    with pytest.raises(ValueError, match=r"does not know the language 'zh': .* unknown\. Take a multilingual one"):
        load_text_encoder(str(english), tokenizer)
    assert load_text_encoder(str(english), load_tokenizer(str(english), ["en"])[0]).config.vocab_size


def test_languages_without_phrases_are_probed_by_their_own_texts(tokenizer):
    check_language(tokenizer, "de", "shipped")
    check_language(tokenizer, "de", "shipped", ["Kein Nachweis eines Pleuraergusses."])
    with pytest.raises(ValueError, match="does not know the language 'ru'"):
        check_language(tokenizer, "ru", "shipped", ["Лёгочные поля без очаговых теней."])


# --------------------------------------------------------------------------------------------------------------------
# The tokenizer


def test_the_shipped_tokenizer_is_taken_as_it_is(tmp_path):
    tokenizer, image, languages = load_tokenizer(str(m3fm.DEFAULT_CHECKPOINT), LANGUAGES)
    assert (image, languages, len(tokenizer)) == (4, {"en": 5, "zh": 6}, 8000)
    tokenizer.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert json.loads((tmp_path / name).read_text()) == json.loads((m3fm.DEFAULT_CHECKPOINT / name).read_text())


@pytest.mark.parametrize("kind", ["bert", "xlm-roberta", "qwen3"])
def test_a_pretrained_tokenizer_gets_what_it_lacks(tmp_path, kind):
    folder = save_text(tmp_path / kind, kind)
    own = AutoTokenizer.from_pretrained(folder)
    tokenizer, image, languages = load_tokenizer(str(folder), LANGUAGES)
    assert [image, *languages.values()] == [len(own), len(own) + 1, len(own) + 2]
    tokenizer.save_pretrained(tmp_path / "saved")
    for each in (tokenizer, AutoTokenizer.from_pretrained(tmp_path / "saved")):
        assert None not in (each.pad_token, each.eos_token) and each.pad_token_id != each.eos_token_id
        assert each.padding_side == "right" and each.image_token == "<image>"
        text = "no pleural effusion"
        # Nothing is put around a text, and no text gives a special token.
        assert each(text)["input_ids"] == own(text, add_special_tokens=False)["input_ids"]
        special = {each.eos_token_id, image, *languages.values()}
        assert not special & set(each("<image><|en|>" + each.eos_token)["input_ids"])


def test_padding_is_told_from_the_end_of_a_text(tmp_path):
    own = AutoTokenizer.from_pretrained(save_text(tmp_path / "qwen3", "qwen3"))
    own.pad_token = own.eos_token
    own.save_pretrained(tmp_path / "base")
    tokenizer, _, _ = load_tokenizer(str(tmp_path / "base"), LANGUAGES)
    assert tokenizer.pad_token == "<pad>" and tokenizer.pad_token_id >= len(own)


def test_a_backbone_without_a_tokenizer_is_refused(tmp_path):
    folder = save_vision(tmp_path / "tower", "dinov2")
    with pytest.raises(ValueError, match=r"has no tokenizer: expected a tokenizer\.json beside its weights"):
        load_tokenizer(str(folder), LANGUAGES)


def test_a_tokenizer_without_one_of_the_languages_is_refused(tmp_path):
    word_piece(chinese=False).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does not know the language 'zh'"):
        load_tokenizer(str(tmp_path), LANGUAGES)


# --------------------------------------------------------------------------------------------------------------------
# Before the first step


def test_what_fits_is_let_through(tmp_path):
    check_fit(
        vision_model="microsoft/rad-dino",
        size=(224, 224),
        text_encoder="FacebookAI/xlm-roberta-base",
        decoder="Qwen/Qwen3-0.6B",
        vocab_size=8000,
        training={"vision_training": "last_4", "text_training": "lora", "decoder_training": "full"},
        prompt=5,
        report=512,
    )
    check_fit(model={"text_encoder_config": {**TOWER, "vocab_size": 8000}}, training={"text_training": "full"})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"vision_model": "google/vit-base-patch16-224-in21k", "size": (252, 252)}, "multiple of 16, as 256"),
        (
            {"text_encoder": "FacebookAI/xlm-roberta-base", "model": {"text_encoder_config": TOWER}},
            "`model.text_encoder_config` describes a new network and `text_encoder` names a pretrained one",
        ),
        ({"vision_model": "microsoft/rad-dino", "model": {"vision_config": VISION}}, "leave one out"),
        ({"model": {"text_config": {**TOWER, "hidden_size": 33}}}, "hidden_size 33, which its 2 num_attention_heads"),
        (
            {"model": {"text_config": {**TOWER, "vocab_size": 7000}}, "vocab_size": 8000},
            "`model.text_config.vocab_size` is 7000 and the tokenizer has 8000 ids",
        ),
        (
            {"text_encoder": "FacebookAI/xlm-roberta-base", "training": {"text_training": "last_13"}},
            "the tower has 12 blocks",
        ),
        ({"training": {"text_training": "frozen"}}, "`text_training` is 'frozen' and the text encoder is new"),
        (
            {"vision_model": "microsoft/rad-dino", "training": {"vision_training": "most"}},
            "`vision_training` expected",
        ),
        ({"text_encoder": "Qwen/Qwen3-0.6B"}, "is no text encoder"),
        ({"decoder": "FacebookAI/xlm-roberta-base"}, "is no decoder"),
        (
            {"model": {"text_config": {**TOWER, "max_position_embeddings": 100}}, "prompt": 5, "report": 160},
            "set `max_text_length` to 95 at most",
        ),
        ({"vision_model": "nobody/nothing", "size": (28, 28)}, "No backbone 'nobody/nothing'"),
    ],
)
def test_what_does_not_fit_is_refused(values, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        check_fit(**values)
