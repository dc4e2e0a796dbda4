# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""M3FMConfig: what it fills in, what it refuses and how, and that it survives JSON."""

import json

import pytest
from transformers import AutoConfig

from m3fm import M3FMConfig


def test_defaults_are_complete():
    config = M3FMConfig()
    assert config.vision_config.model_type == "dinov2"
    assert config.text_encoder_config.model_type == "bert"
    assert config.text_config.model_type == "llama"
    assert config.languages == ("en", "zh")
    assert config.language_token_ids == {"en": 5, "zh": 6}


def test_generation_sizes_its_caches_by_the_decoder(tiny_config):
    assert tiny_config.get_text_config(decoder=True) is tiny_config.text_config


@pytest.mark.parametrize("name", ["vision_config", "text_encoder_config", "text_config"])
def test_sub_configs_take_any_architecture(name):
    config = M3FMConfig(**{name: {"model_type": "gpt2", "vocab_size": 90}})
    assert getattr(config, name).model_type == "gpt2"
    ready = AutoConfig.for_model("gpt2", vocab_size=90)
    assert getattr(M3FMConfig(**{name: ready}), name).vocab_size == 90


def test_survives_a_folder_and_json(tiny_config, tmp_path):
    config = M3FMConfig.from_dict(
        {
            **tiny_config.to_dict(),
            "support_temperature": 0.5,
            "id2label": {0: "normal", 1: "pneumonia", 2: "tuberculosis"},
            "problem_type": "multi_label_classification",
        }
    )
    config.save_pretrained(tmp_path)
    for again in (
        M3FMConfig.from_pretrained(tmp_path),
        AutoConfig.from_pretrained(tmp_path),
        M3FMConfig.from_dict(json.loads(config.to_json_string(use_diff=False))),
    ):
        declared = M3FMConfig.__annotations__.keys() - M3FMConfig.sub_configs.keys() - {"sub_configs"}
        for name in declared | {"id2label", "num_labels", "problem_type"}:
            assert getattr(again, name) == getattr(config, name), name
        for name in M3FMConfig.sub_configs:
            assert getattr(again, name).to_diff_dict() == getattr(config, name).to_diff_dict()


def test_the_order_of_languages_survives_json(tmp_path):
    """It is the order of the support memory: were it lost, one language would be written from another's memory."""
    config = M3FMConfig(language_token_ids={"zh": 6, "en": 5})
    config.save_pretrained(tmp_path)
    assert M3FMConfig.from_pretrained(tmp_path).languages == config.languages


def test_unknown_names_are_refused_with_a_hint():
    with pytest.raises(ValueError, match=r"'projection_dims' \(did you mean 'projection_dim'\?\)"):
        M3FMConfig(projection_dims=8)
    with pytest.raises(ValueError, match=r"unknown values: 'banana'\. It takes: .*support_temperature"):
        M3FMConfig(banana=1)


def test_unknown_names_in_a_file_are_refused(tiny_config, tmp_path):
    tiny_config.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "support_size": 3}))
    with pytest.raises(ValueError, match="support_memory_size"):
        M3FMConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"projection_dim": 0}, "projection_dim >= 1, got 0"),
        ({"num_prefix_tokens": -1}, "num_prefix_tokens >= 1, got -1"),
        ({"num_image_tokens": 9}, "0 <= num_image_tokens <= num_pooling_queries=8, got 9"),
        ({"num_pooling_queries": 0}, "num_pooling_queries >= 1"),
        ({"projection_hidden_size": 0}, "projection_hidden_size >= 1"),
        ({"support_memory_size": -1}, "support_memory_size >= 0, got -1"),
        ({"text_noise_std": -0.1}, "text_noise_std >= 0"),
        ({"support_temperature": 0.0}, "support_temperature > 0, got 0"),
        ({"projection_dropout": 1.0}, "projection_dropout < 1, got 1"),
        ({"language_token_ids": {}}, "at least one language"),
        ({"language_token_ids": {"en": 5, "zh": 5}}, "distinct ids"),
        ({"image_token_id": 5}, "distinct ids"),
        ({"language_token_ids": {"en": 5, "zh": 40}, "text_config": {"vocab_size": 40}}, "vocabulary of 40"),
        ({"image_token_id": -1}, "vocabulary of"),
    ],
)
def test_contradictions_are_refused(values, message):
    if "text_config" in values:
        values = {**values, "text_config": {"model_type": "llama", **values["text_config"]}}
    with pytest.raises(ValueError, match=message):
        M3FMConfig(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"projection_dim": "256"}, r"'projection_dim' expected int, got str \(value: '256'\)"),
        ({"classifier_features": "text"}, r"'classifier_features' expected one of \(.*\), got text"),
        ({"language_token_ids": ["en"]}, r"'language_token_ids' .*expected a dict, got list"),
        ({"vision_config": 3}, "'vision_config' .*got int"),
    ],
)
def test_wrong_types_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        M3FMConfig(**values)
    with pytest.raises(ValueError, match=message):
        M3FMConfig.from_dict(values)
    config = M3FMConfig()
    with pytest.raises(ValueError, match=message):
        setattr(config, *next(iter(values.items())))


def test_what_trainer_notes_in_a_config_can_be_loaded(tiny_config, tmp_path):
    tiny_config.eos_token_id, tiny_config.bos_token_id, tiny_config.pad_token_id = 3, 2, 0
    tiny_config.save_pretrained(tmp_path)
    assert M3FMConfig.from_pretrained(tmp_path).languages == ("en", "zh")


def test_a_quantization_is_kept():
    config = M3FMConfig(quantization_config={"quant_method": "bitsandbytes"})
    assert config.to_dict()["quantization_config"] == {"quant_method": "bitsandbytes"}
