# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Contracts that the three model classes keep, on a tiny random model: one function a contract.

Generation has its own file, `test_generation_m3fm.py`.
"""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy, normalize
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    AutoModelForZeroShotImageClassification,
    PreTrainedModel,
)

from m3fm import M3FMConfig, M3FMForImageClassification, M3FMForReportGeneration, M3FMModel

CLASSES = [M3FMModel, M3FMForReportGeneration, M3FMForImageClassification]
every_class = pytest.mark.parametrize("model_class", CLASSES, ids=lambda each: each.__name__)
TOLERANCE = {"atol": 1e-5, "rtol": 0}


def build(model_class: type[PreTrainedModel], config: M3FMConfig, **values: Any) -> PreTrainedModel:
    """Returns a random model whose memory, if it has one, is filled."""
    torch.manual_seed(0)
    config = M3FMConfig.from_dict({**copy.deepcopy(config).to_dict(), **values})
    model = model_class(config).eval()
    if model_class is M3FMForReportGeneration and config.support_memory_size:
        memory = torch.randn(len(config.languages), config.support_memory_size, config.projection_dim)
        model.set_support_memory(normalize(memory, dim=-1))
    return model


def inputs_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Returns a batch of three studies of two, one and two images, and what else the class reads."""
    generator = torch.Generator().manual_seed(1)
    inputs = {
        "pixel_values": torch.randn(3, 2, 3, 28, 28, generator=generator),
        "image_mask": torch.tensor([[True, True], [True, False], [True, True]]),
    }
    vocabulary = (model.config.text_config.vocab_size, model.config.text_encoder_config.vocab_size)
    words = torch.randint(16, min(vocabulary), (3, 6), generator=generator)
    if isinstance(model, M3FMModel):
        inputs |= {"input_ids": words, "attention_mask": torch.ones_like(words)}
        inputs["attention_mask"][0, 4:] = 0
    elif isinstance(model, M3FMForReportGeneration):
        inputs["input_ids"] = torch.cat([model.build_prompt(["en", "zh", "en"]), words], dim=1)
    return inputs


def loss_of(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    if isinstance(model, M3FMModel):
        return model(**inputs, return_loss=True).loss
    labels = torch.tensor([0, 1, 1]) if isinstance(model, M3FMForImageClassification) else inputs["input_ids"]
    return model(**inputs, labels=labels).loss


@torch.no_grad()
def logits_of(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    outputs = model(**inputs)
    return outputs.logits_per_image if isinstance(model, M3FMModel) else outputs.logits


def assert_same_state(left: PreTrainedModel, right: PreTrainedModel) -> None:
    mine, other = left.state_dict(), right.state_dict()
    assert mine.keys() == other.keys()
    assert [name for name in mine if not torch.equal(mine[name], other[name])] == []


def read_config(folder: Path) -> dict[str, Any]:
    values = json.loads((folder / "config.json").read_text())
    for name in M3FMConfig.sub_configs:  # loading notes the precision in each part too
        values[name].pop("dtype", None)
    return values


# --- saving and loading ----------------------------------------------------------------------------------------------


@every_class
def test_saved_and_loaded_is_equal_bit_for_bit(model_class, tiny_config, tmp_path):
    model = build(model_class, tiny_config)
    model.save_pretrained(tmp_path / "first")
    again = model_class.from_pretrained(tmp_path / "first")
    assert_same_state(model, again)
    again.save_pretrained(tmp_path / "second")
    first, second = (read_config(tmp_path / name) for name in ("first", "second"))
    assert first["architectures"] == [model_class.__name__]
    assert first == second
    assert not again.training
    assert torch.equal(logits_of(model, inputs_of(model)), logits_of(again, inputs_of(model)))


@pytest.mark.parametrize(
    ("auto", "model_class"),
    [
        (AutoModel, M3FMModel),
        (AutoModelForZeroShotImageClassification, M3FMModel),
        (AutoModelForImageTextToText, M3FMForReportGeneration),
        (AutoModelForImageClassification, M3FMForImageClassification),
    ],
)
def test_one_checkpoint_serves_every_class(auto, model_class, tiny_model, tiny_checkpoint):
    loaded = auto.from_pretrained(tiny_checkpoint)
    assert type(loaded) is model_class
    shared = tiny_model.state_dict()
    state = loaded.state_dict()
    for name, weight in state.items():
        stored = name if name in shared else f"model.{name}"
        if not name.startswith("classifier."):
            assert torch.equal(weight, shared[stored]), name
    assert len(state) > 60


def test_a_classifier_gives_its_towers_back(tiny_config, tmp_path):
    classifier = build(M3FMForImageClassification, tiny_config)
    classifier.save_pretrained(tmp_path)
    assert_same_state(classifier.model, M3FMModel.from_pretrained(tmp_path))
    with pytest.raises(ValueError, match=r"do not fit M3FMForReportGeneration: missing \d+ \(decoder"):
        M3FMForReportGeneration.from_pretrained(tmp_path)


def rewrite_weights(folder: Path, change: Any) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


@every_class
def test_a_missing_weight_is_refused(model_class, tiny_config, tmp_path):
    build(model_class, tiny_config).save_pretrained(tmp_path)
    prefix = "" if model_class is M3FMModel else "model."
    rewrite_weights(tmp_path, lambda weights: weights.pop(f"{prefix}text_projection.weight"))
    with pytest.raises(ValueError, match=rf"missing 1 \({prefix}text_projection\.weight\), unexpected none"):
        model_class.from_pretrained(tmp_path)


@every_class
def test_an_unexpected_weight_is_refused(model_class, tiny_config, tmp_path):
    build(model_class, tiny_config).save_pretrained(tmp_path)
    rewrite_weights(tmp_path, lambda weights: weights.update(stranger=torch.zeros(2)))
    with pytest.raises(ValueError, match=r"missing none, unexpected 1 \(stranger\)"):
        model_class.from_pretrained(tmp_path)


def test_a_missing_support_memory_is_refused(tiny_checkpoint):
    rewrite_weights(tiny_checkpoint, lambda weights: weights.pop("support_memory"))
    with pytest.raises(ValueError, match=r"missing 1 \(support_memory\)"):
        M3FMForReportGeneration.from_pretrained(tiny_checkpoint)


def test_a_weight_of_another_shape_is_refused(tiny_checkpoint):
    rewrite_weights(
        tiny_checkpoint, lambda weights: weights.update({"model.text_projection.weight": torch.zeros(16, 33)})
    )
    with pytest.raises((ValueError, RuntimeError), match="mismatch"):
        M3FMForReportGeneration.from_pretrained(tiny_checkpoint)


def test_a_new_head_is_for_checkpoints_without_any(tiny_config, tiny_checkpoint, tmp_path):
    new = AutoModelForImageClassification.from_pretrained(tiny_checkpoint, num_labels=5)
    assert new.classifier.out_features == 5
    assert new.classifier.weight.abs().sum() > 0
    folder = tmp_path / "head"
    new.save_pretrained(folder)
    rewrite_weights(folder, lambda weights: weights.pop("classifier.bias"))
    with pytest.raises(ValueError, match=r"missing 1 \(classifier\.bias\)"):
        M3FMForImageClassification.from_pretrained(folder)


def test_only_safetensors_are_read(tiny_checkpoint):
    torch.save(load_file(tiny_checkpoint / "model.safetensors"), tiny_checkpoint / "pytorch_model.bin")
    (tiny_checkpoint / "model.safetensors").unlink()
    with pytest.raises(OSError, match="safetensors"):
        M3FMForReportGeneration.from_pretrained(tiny_checkpoint)


def test_without_its_file_generation_has_the_defaults_of_the_class(tiny_model, tiny_checkpoint):
    path = tiny_checkpoint / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "max_new_tokens": 7}))
    assert M3FMForReportGeneration.from_pretrained(tiny_checkpoint).generation_config.max_new_tokens == 7
    path.unlink()
    generation = M3FMForReportGeneration.from_pretrained(tiny_checkpoint).generation_config
    for name in ("max_new_tokens", "suppress_tokens", "eos_token_id", "bos_token_id", "pad_token_id"):
        assert getattr(generation, name) == getattr(tiny_model.generation_config, name), name
    assert generation.max_new_tokens == 256
    path.write_text('{"eos_token_id": 3}')
    assert M3FMForReportGeneration.from_pretrained(tiny_checkpoint).generation_config.max_new_tokens is None


def test_a_random_head_gives_no_scores(tiny_checkpoint, tmp_path):
    def load(folder: Path) -> M3FMForImageClassification:
        return M3FMForImageClassification.from_pretrained(folder)

    model = load(tiny_checkpoint)
    inputs = inputs_of(model)
    with pytest.raises(ValueError, match="diagnosis head is untrained"):
        model(**inputs)
    with pytest.raises(ValueError, match="diagnosis head is untrained"):
        load(tiny_checkpoint).to(torch.bfloat16)(**inputs)
    assert model(**inputs, labels=torch.tensor([0, 1, 1])).loss.isfinite()
    model.train().eval()
    expected = logits_of(model, inputs)
    assert "random_head" not in model.state_dict()
    model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(load(tmp_path), inputs), expected)
    other = load(tiny_checkpoint)
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits_of(other, inputs), expected)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks by the old name
def test_a_head_that_an_adapter_holds_is_a_trained_one(tiny_checkpoint, tmp_path):
    peft = pytest.importorskip("peft")
    base = M3FMForImageClassification.from_pretrained(tiny_checkpoint)
    config = peft.LoraConfig(target_modules=r".*text_encoder.*(query|value)", modules_to_save=["classifier"])
    adapted = peft.get_peft_model(base, config)
    inputs = inputs_of(base)
    adapted.train()
    optimizer = torch.optim.SGD([each for each in adapted.parameters() if each.requires_grad], lr=0.1)
    adapted(**inputs, labels=torch.tensor([0, 1, 1])).loss.backward()
    optimizer.step()
    adapted.eval()
    adapted.save_pretrained(tmp_path)
    base = M3FMForImageClassification.from_pretrained(tiny_checkpoint)
    with pytest.raises(ValueError, match="untrained"):
        base(**inputs)
    again = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, adapted(**inputs).logits, **TOLERANCE)


def test_loading_info_can_still_be_asked_for(tiny_checkpoint):
    model, info = M3FMForReportGeneration.from_pretrained(tiny_checkpoint, output_loading_info=True)
    assert isinstance(model, M3FMForReportGeneration)
    assert not info["missing_keys"]


@every_class
def test_bfloat16(model_class, tiny_config, tmp_path):
    model = build(model_class, tiny_config)
    model.save_pretrained(tmp_path)
    half = model_class.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {weight.dtype for weight in half.parameters()} == {torch.bfloat16}
    logits = logits_of(half, inputs_of(model))
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), logits_of(model, inputs_of(model)), atol=0.3, rtol=0.1)


def test_bfloat16_reads_features_of_another_precision(tiny_config):
    model = build(M3FMModel, tiny_config)
    inputs = inputs_of(model)
    tokens = model.get_vision_features(inputs["pixel_values"]).detach()
    embeds = model.to(torch.bfloat16).get_image_features(vision_features=tokens, image_mask=inputs["image_mask"])
    assert embeds.dtype == torch.bfloat16


# --- computing -------------------------------------------------------------------------------------------------------


@every_class
def test_sdpa_equals_eager(model_class, tiny_config, tmp_path):
    build(model_class, tiny_config).save_pretrained(tmp_path)
    fast, plain = (model_class.from_pretrained(tmp_path, attn_implementation=name) for name in ("sdpa", "eager"))
    assert plain.config.vision_config._attn_implementation == "eager"
    torch.testing.assert_close(logits_of(fast, inputs_of(fast)), logits_of(plain, inputs_of(plain)), **TOLERANCE)


@every_class
def test_gradient_checkpointing_gives_the_same_gradients(model_class, tiny_config):
    gradients = []
    for checkpointing in (False, True):
        model = build(model_class, tiny_config)
        if checkpointing:
            # transformers 5.17 has only the name that later versions deprecate.
            enable = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
            getattr(model, f"{enable}_checkpointing_enable")()
            assert getattr(model, f"is_{enable}_checkpointing")
        model.train()
        torch.manual_seed(2)
        loss_of(model, inputs_of(model)).backward()
        gradients.append({name: each.grad for name, each in model.named_parameters() if each.grad is not None})
    plain, checkpointed = gradients
    assert plain.keys() == checkpointed.keys() and len(plain) > 40
    for name in plain:
        torch.testing.assert_close(checkpointed[name], plain[name], msg=name, **TOLERANCE)


@every_class
def test_every_weight_that_trains_gets_a_gradient(model_class, tiny_config):
    model = build(model_class, tiny_config)
    loss_of(model, inputs_of(model)).backward()
    idle = {name for name, each in model.named_parameters() if each.grad is None}
    text_side = ("model.text_encoder.", "model.text_projection.", "model.logit_scale")
    if model_class is not M3FMModel:  # there the text side is read apart
        idle = {name for name in idle if not name.startswith(text_side)}
    assert {name for name in idle if "mask_token" not in name} == set()


@pytest.mark.parametrize("model_class", [M3FMForReportGeneration, M3FMForImageClassification])
def test_a_batch_equals_its_studies_alone(model_class, tiny_config):
    model = build(model_class, tiny_config)
    inputs = inputs_of(model)
    together = logits_of(model, inputs)
    for row in range(3):
        real = int(inputs["image_mask"][row].sum())
        alone = {name: value[row : row + 1] for name, value in inputs.items() if name != "image_mask"}
        alone["pixel_values"] = alone["pixel_values"][:, :real]
        torch.testing.assert_close(logits_of(model, alone)[0], together[row], **TOLERANCE)


def test_texts_of_a_batch_equal_each_alone(tiny_config):
    model = build(M3FMModel, tiny_config)
    inputs = inputs_of(model)
    with torch.no_grad():
        together = model.get_text_features(inputs["input_ids"], inputs["attention_mask"])
        for row, mask in enumerate(inputs["attention_mask"]):
            alone = model.get_text_features(inputs["input_ids"][row : row + 1, : int(mask.sum())])
            torch.testing.assert_close(alone[0], together[row], **TOLERANCE)


def test_a_text_without_positions_is_refused(tiny_config):
    for model_type, longest in (("bert", 24), ("xlm-roberta", 22)):
        encoder = {**tiny_config.text_encoder_config.to_dict(), "max_position_embeddings": 24, "pad_token_id": 1}
        model = build(M3FMModel, tiny_config, text_encoder_config={**encoder, "model_type": model_type})
        assert model.max_text_tokens == longest
        ids = torch.full((1, longest + 1), 20)
        assert model.get_text_features(ids[:, 1:]).isfinite().all()
        with pytest.raises(ValueError, match=f"at most {longest} tokens.* got {longest + 1}"):
            model.get_text_features(ids)


@torch.no_grad()
def test_image_features(tiny_config):
    """The promises of the study: order and masked images do not matter, 4-D is one image, tokens can be passed."""
    model = build(M3FMModel, tiny_config)
    inputs = inputs_of(model)
    pixels, mask = inputs["pixel_values"], inputs["image_mask"]
    features = model.get_image_features(pixels, mask)
    torch.testing.assert_close(features.norm(dim=-1), torch.ones(3), **TOLERANCE)
    torch.testing.assert_close(model.get_image_features(pixels.flip(1), mask.flip(1)), features, **TOLERANCE)
    for filling in (0.0, 1e4, math.inf, math.nan):
        other = pixels.clone()
        other[1, 1] = filling
        torch.testing.assert_close(model.get_image_features(other, mask), features, msg=str(filling), **TOLERANCE)
    torch.testing.assert_close(
        model.get_image_features(pixels[:, 0]), model.get_image_features(pixels[:, :1]), **TOLERANCE
    )
    tokens = model.get_vision_features(pixels)
    assert tokens.shape == (3, 2, 5, 32)
    assert torch.equal(model.get_image_features(image_mask=mask, vision_features=tokens), features)
    assert not torch.allclose(features[0], features[2], atol=1e-3)


def test_the_loss_is_the_one_computed_by_hand(tiny_config):
    model = build(M3FMModel, tiny_config)
    outputs = model(**inputs_of(model), return_loss=True)
    cosine = outputs.image_embeds @ outputs.text_embeds.t()
    logits = cosine * math.exp(tiny_config.logit_scale_init_value)
    torch.testing.assert_close(outputs.logits_per_image, logits, atol=1e-4, rtol=0)
    assert torch.equal(outputs.logits_per_text, outputs.logits_per_image.t())
    targets = torch.arange(3)
    by_hand = (cross_entropy(logits, targets) + cross_entropy(logits.t(), targets)) / 2
    torch.testing.assert_close(outputs.loss, by_hand, **TOLERANCE)


def test_the_report_loss_is_next_token_prediction(tiny_model):
    inputs = inputs_of(tiny_model)
    labels = inputs["input_ids"].clone()
    labels[:, :5] = -100
    outputs = tiny_model(**inputs, labels=labels)
    by_hand = cross_entropy(outputs.logits[:, 4:-1].flatten(0, 1), labels[:, 5:].flatten())
    torch.testing.assert_close(outputs.loss, by_hand, **TOLERANCE)
    # `Trainer` passes the count of the whole accumulated batch.
    torch.testing.assert_close(
        tiny_model(**inputs, labels=labels, num_items_in_batch=torch.tensor(36)).loss, by_hand / 2, **TOLERANCE
    )


def test_a_head_reads_what_its_config_says(tiny_config):
    report = normalize(torch.randn(3, 16), dim=-1)
    for reads, width in (("image", 16), ("report", 16), ("fused", 32)):
        model = build(M3FMForImageClassification, tiny_config, classifier_features=reads, num_labels=4)
        assert model.classifier.in_features == width
        given = {"report": {"report_embeds": report}, "image": inputs_of(model)}
        given["fused"] = given["report"] | given["image"]
        assert model(**given[reads]).logits.shape == (3, 4)
        wrong = {"image": "fused", "report": "image", "fused": "image"}[reads]
        with pytest.raises(ValueError, match=f"classifier_features='{reads}' expected report_embeds"):
            model(**given[wrong])


def test_unknown_labels_do_not_count(tiny_config):
    model = build(M3FMForImageClassification, tiny_config, problem_type="multi_label_classification", num_labels=2)
    inputs = inputs_of(model)
    logits = model(**inputs).logits
    nan = math.nan
    loss = model(**inputs, labels=torch.tensor([[1.0, nan], [nan, nan], [nan, 0.0]])).loss
    by_hand = (-torch.sigmoid(logits[0, 0]).log() - torch.sigmoid(-logits[2, 1]).log()) / 2
    torch.testing.assert_close(loss, by_hand, **TOLERANCE)
    assert model(**inputs, labels=torch.full((3, 2), nan)).loss.item() == 0.0


@every_class
def test_embeddings_can_be_resized(model_class, tiny_config, tmp_path):
    model = build(model_class, tiny_config)
    before = logits_of(model, inputs_of(model))
    model.resize_token_embeddings(8003)
    assert model.get_input_embeddings().num_embeddings == 8003
    after = logits_of(model, inputs_of(build(model_class, tiny_config)))
    torch.testing.assert_close(after[..., : before.shape[-1]], before, **TOLERANCE)
    model.save_pretrained(tmp_path)
    assert_same_state(model, model_class.from_pretrained(tmp_path))


ARCHITECTURES = {
    "vision-vit": (
        "vision_config",
        {"model_type": "vit", "intermediate_size": 64, "image_size": 28, "patch_size": 14},
    ),
    "text-xlm-roberta": (
        "text_encoder_config",
        {"model_type": "xlm-roberta", "intermediate_size": 64, "vocab_size": 90, "pad_token_id": 1},
    ),
    "decoder-qwen3": (
        "text_config",
        {"model_type": "qwen3", "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 90, "intermediate_size": 64}
        | {"eos_token_id": 3, "pad_token_id": 0},
    ),
    "decoder-gpt2": ("text_config", {"model_type": "gpt2", "vocab_size": 90, "bos_token_id": 2, "eos_token_id": 3}),
    "decoder-two-ends": (
        "text_config",
        {"model_type": "llama", "intermediate_size": 64, "vocab_size": 90, "eos_token_id": [3, 9], "pad_token_id": 0},
    ),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_other_architectures_drop_in(name, tiny_config, tmp_path):
    part, values = ARCHITECTURES[name]
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = build(M3FMForReportGeneration, tiny_config, **{part: small | values})
    inputs = inputs_of(model)
    assert loss_of(model, inputs).isfinite()
    assert model.model.get_text_features(inputs["input_ids"]).isfinite().all()
    ids = model.generate(inputs["pixel_values"], inputs["image_mask"], language="zh", max_new_tokens=4)
    assert ids.shape[0] == 3 and 5 < ids.shape[1] <= 9
    model.save_pretrained(tmp_path)
    again = M3FMForReportGeneration.from_pretrained(tmp_path)
    assert torch.equal(
        again.generate(inputs["pixel_values"], inputs["image_mask"], language="zh", max_new_tokens=4), ids
    )


# --- refusals --------------------------------------------------------------------------------------------------------

PIXELS = torch.zeros(2, 2, 3, 28, 28)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "pixel_values, vision_features or input_ids, got none"),
        ({"pixel_values": PIXELS, "vision_features": torch.zeros(2, 2, 5, 32)}, "exactly one of pixel_values"),
        ({"pixel_values": PIXELS[0, 0]}, r"\(B, N, 3, H, W\) or \(B, 3, H, W\), got \(3, 28, 28\)"),
        ({"pixel_values": PIXELS[:, :, :2]}, "Expected 3 but got 2"),
        ({"pixel_values": PIXELS, "image_mask": torch.ones(2, 1)}, r"shape \(2, 2\), got \(2, 1\)"),
        ({"vision_features": torch.zeros(2, 5, 32)}, r"vision_features of shape \(B, N, S, 32\), got \(2, 5, 32\)"),
        ({"vision_features": torch.zeros(2, 1, 5, 31)}, r"vision_features of shape \(B, N, S, 32\)"),
        ({"pixel_values": PIXELS, "image_mask": torch.tensor([[1, 0], [0, 0]])}, "at least one real image"),
        ({"pixel_values": PIXELS, "return_loss": True}, "as many images as texts"),
        ({"pixel_values": PIXELS, "input_ids": torch.ones(3, 4).long(), "return_loss": True}, "as many images as"),
    ],
)
def test_wrong_inputs_are_refused(inputs, message, tiny_config):
    with pytest.raises(ValueError, match=message):
        build(M3FMModel, tiny_config)(**inputs)
