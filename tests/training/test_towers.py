# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.

import json

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from m3fm import M3FMConfig, M3FMForReportGeneration, M3FMModel
from m3fm.adapters import load_adapter_checked, save_adapter
from m3fm.training.towers import (
    LoraBlock,
    blocks_of,
    check_training,
    has_lora,
    layer_depth,
    merge_lora,
    parameter_groups,
    set_training,
    unread_parameters,
)
from tests.training.tiny_backbones import TOWER, VISION

IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
TEXT = {**TOWER, **IDS, "vocab_size": 60, "max_position_embeddings": 40}
DECODER = {**TEXT, "num_key_value_heads": 2, "head_dim": 16}
VISION_KINDS = {
    "vit": VISION,
    "dinov2": VISION,
    "dinov2_with_registers": VISION,
    "clip_vision_model": VISION,
    "siglip_vision_model": {**VISION, "vision_use_head": False},
}
TEXT_KINDS = {
    "bert": TEXT,
    "xlm-roberta": TEXT,
    "modernbert": TEXT,
    "distilbert": {"dim": 32, "n_layers": 3, "n_heads": 2, "hidden_dim": 64, "vocab_size": 60},
}
DECODER_KINDS = {
    "llama": DECODER,
    "qwen3": {**DECODER, "tie_word_embeddings": True},
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 2, "n_positions": 40, "vocab_size": 60, **IDS},
}
KINDS = VISION_KINDS | TEXT_KINDS | DECODER_KINDS
BLOCKS = {
    "vit": "layers",
    "clip_vision_model": "encoder.layers",
    "siglip_vision_model": "encoder.layers",
    "modernbert": "layers",
    "distilbert": "transformer.layer",
    "llama": "model.layers",
    "qwen3": "model.layers",
    "gpt2": "transformer.h",
}


def build(kind):
    torch.manual_seed(0)
    auto_class = AutoModelForCausalLM if kind in DECODER_KINDS else AutoModel
    return auto_class.from_config(AutoConfig.for_model(kind, **KINDS[kind]))


def run(tower, kind):
    if kind in VISION_KINDS:
        return tower(pixel_values=torch.randn(2, 3, 28, 28, generator=torch.manual_seed(0)))[0]
    return tower(input_ids=torch.arange(5, 15).view(2, 5))[0]


def trained(tower):
    return {name for name, weight in tower.named_parameters() if weight.requires_grad}


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_mode_trains(kind):
    tower = build(kind)
    name, blocks = blocks_of(tower)
    assert (name, len(blocks)) == (BLOCKS.get(kind, "encoder.layer"), 3)
    set_training(tower, "full")
    run(tower, kind).sum().backward()
    whole = trained(tower)
    # Exactly what gets a gradient is trained: DistributedDataParallel waits for no other.
    assert whole == {name for name, weight in tower.named_parameters() if weight.grad is not None}
    set_training(tower, "last_2")
    last = trained(tower)
    assert last and last < whole
    assert {key for key in last if key.startswith(name)} == {
        key for key in whole if key.startswith((f"{name}.1.", f"{name}.2."))
    }
    assert not any("embed" in key or "wte" in key or "wpe" in key for key in last)
    assert any("norm" in key.lower() or "ln_f" in key for key in last)
    set_training(tower, "frozen")
    assert not trained(tower)


@pytest.mark.parametrize("kind", ["vit", "clip_vision_model", "xlm-roberta", "modernbert", "qwen3", "gpt2"])
def test_lora_is_merged_into_the_same_model(kind, tmp_path):
    tower = build(kind).eval()
    before = {name: weight.clone() for name, weight in tower.state_dict().items()}
    plain = run(tower, kind)
    set_training(tower, "lora", LoraBlock(r=2, dropout=0.1))
    assert has_lora(tower) and type(tower) is type(build(kind))
    names = trained(tower)
    assert names and all("lora_" in name for name in names)
    torch.testing.assert_close(run(tower, kind), plain, rtol=0, atol=0)
    with torch.no_grad():
        for name, weight in tower.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.2)
    updated = run(tower, kind)
    assert (updated - plain).abs().max() > 1e-3
    merge_lora(tower)
    assert not has_lora(tower) and list(tower.state_dict()) == list(before)
    torch.testing.assert_close(run(tower, kind), updated, rtol=1e-5, atol=1e-5)
    tower.save_pretrained(tmp_path)
    auto_class = AutoModelForCausalLM if kind in DECODER_KINDS else AutoModel
    torch.testing.assert_close(run(auto_class.from_pretrained(tmp_path).eval(), kind), updated, rtol=1e-5, atol=1e-5)


def test_parameters_that_no_state_depends_on_are_told():
    assert unread_parameters(build("dinov2")) == {"embeddings.mask_token"}
    assert unread_parameters(build("clip_vision_model")) == {"post_layernorm.weight", "post_layernorm.bias"}
    assert unread_parameters(build("qwen3")) == set()


def test_lora_goes_where_it_is_asked_for():
    for layers, count in (("auto", 7), ("all", 7), ("attention", 2)):
        decoder = build("llama")
        set_training(decoder, "lora", LoraBlock(layers=layers))
        assert len(trained(decoder)) == 2 * count * 3, layers
    encoder = build("bert")
    set_training(encoder, "lora")
    assert {name.split(".")[5] for name in trained(encoder)} == {"query", "value"}
    with pytest.raises(ValueError, match="already has LoRA"):
        set_training(encoder, "lora")


@pytest.mark.parametrize(("kind", "mode"), [("dinov2", "lora"), ("bert", "last_2"), ("llama", "lora")])
def test_gradient_checkpointing_gives_the_same_gradients(kind, mode):
    def gradients(checkpointing):
        tower = build(kind)
        set_training(tower, mode)
        torch.manual_seed(1)
        for name, weight in tower.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight)
        for module in tower.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if checkpointing:
            # transformers 5.23 has another name for it.
            enable = getattr(tower, "activation_checkpointing_enable", tower.gradient_checkpointing_enable)
            enable()
        run(tower.train(), kind).square().sum().backward()
        return {name: weight.grad for name, weight in tower.named_parameters() if weight.requires_grad}

    plain, checkpointed = gradients(False), gradients(True)
    assert plain and plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, msg=name)


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("half", '`vision_training` expected "frozen", "full", "lora" or "last_N"'),
        ("last_0", 'expected "last_1" to "last_3"'),
        ("last_4", "'last_4', and the tower has 3 blocks"),
        (True, "got True"),
    ],
)
def test_an_impossible_mode_is_refused(mode, message):
    with pytest.raises(ValueError, match=message):
        check_training(mode, 3, "vision_training")


@pytest.mark.parametrize(
    "values", [{"r": 0}, {"alpha": 0}, {"dropout": 1.0}, {"layers": "some"}], ids=lambda values: next(iter(values))
)
def test_a_wrong_lora_block_is_refused(values):
    with pytest.raises(ValueError, match=f"`lora` expected .*{next(iter(values))}"):
        LoraBlock(**values)


def test_a_module_without_blocks_is_refused():
    with pytest.raises(ValueError, match="Linear has no list of blocks"):
        blocks_of(torch.nn.Linear(2, 2))


# --------------------------------------------------------------------------------------------------------------------
# A whole model


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = M3FMConfig(
        vision_config={"model_type": "dinov2", **VISION},
        text_encoder_config={"model_type": "bert", **TEXT},
        text_config={"model_type": "qwen3", **DECODER, "tie_word_embeddings": True},
        projection_dim=16,
        projection_hidden_size=32,
        support_memory_size=0,
    )
    return M3FMForReportGeneration(config)


def test_each_trained_parameter_is_in_one_group_at_its_rate(model):
    set_training(model.model.vision_model, "last_2")
    set_training(model.model.text_encoder, "lora")
    set_training(model.decoder, "full")
    groups = parameter_groups(model, 1e-3, 0.1, layer_decay=0.5, rates={"vision_model": 0.1, "study_pooling": 2})
    found = [id(weight) for group in groups for weight in group["params"]]
    assert len(found) == len(set(found))
    assert set(found) == {id(weight) for weight in model.parameters() if weight.requires_grad}
    by_weight = {id(weight): group for group in groups for weight in group["params"]}
    weights = dict(model.named_parameters())
    vision, decoder = "model.vision_model.", "decoder.model."
    for name, rate, decays in (
        (f"{vision}layernorm.weight", 1e-4, False),
        (f"{vision}encoder.layer.2.mlp.fc1.weight", 0.5e-4, True),
        (f"{vision}encoder.layer.2.mlp.fc1.bias", 0.5e-4, False),
        (f"{vision}encoder.layer.1.layer_scale1.lambda1", 0.25e-4, False),
        ("model.text_encoder.encoder.layer.0.attention.self.query.lora_A.default.weight", 0.125e-3, True),
        (f"{decoder}embed_tokens.weight", 0.0625e-3, True),
        (f"{decoder}layers.0.self_attn.q_norm.weight", 0.125e-3, False),
        (f"{decoder}norm.weight", 1e-3, False),
        ("model.study_pooling.queries", 2e-3, False),
        ("model.visual_projection.1.weight", 1e-3, True),
        ("prefix_projector.weight", 1e-3, True),
        ("model.logit_scale", 1e-3, False),
    ):
        group = by_weight[id(weights[name])]
        assert group["lr"] == pytest.approx(rate), name
        assert group["weight_decay"] == (0.1 if decays else 0.0), name
    assert len({group["name"] for group in groups}) == len(groups)
    torch.optim.AdamW(groups).step()


def test_without_decay_by_layer_a_part_is_two_groups(model):
    groups = parameter_groups(model.model, 1e-3, 0.1)
    parts = {"vision_model", "text_encoder", "study_pooling", "visual_projection"}
    rates = {group["lr"] for group in groups}
    assert rates == {1e-3}
    assert parts < {group["name"].split("-")[0] for group in groups}


def test_depths_end_at_the_top(model):
    for tower in (model.model.vision_model, model.model.text_encoder, model.decoder):
        depths = layer_depth(tower)
        assert set(depths.values()) >= {0, 1, 2, 3} and max(depths.values()) <= 4
    assert depths["model.embed_tokens.weight"] == 0 and depths["model.norm.weight"] == 4


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"rates": {"vision": 0.1}},
            "`learning_rates` names 'vision': expected parts of M3FMForReportGeneration, decoder",
        ),
        ({"rates": {"decoder": 0}}, 'freeze it by "frozen"'),
        ({"layer_decay": 1.5}, "0 < layer_decay <= 1"),
        ({"layer_decay": 0}, "0 < layer_decay <= 1"),
    ],
)
def test_impossible_rates_are_refused(model, values, message):
    with pytest.raises(ValueError, match=message):
        parameter_groups(model, 1e-3, 0.1, **values)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks by the old name
def test_the_adapter_of_injected_lora_loads_by_peft(model, tmp_path):
    import peft

    model.save_pretrained(tmp_path / "base")
    set_training(model.model.vision_model, "lora", LoraBlock(r=2))
    set_training(model.decoder, "lora", LoraBlock(r=4, alpha=4))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.3)
    model.eval()

    def outputs(each):
        pixels = torch.randn(2, 3, 28, 28, generator=torch.manual_seed(0))
        with torch.no_grad():
            ids = torch.tensor([[4, 4, 4, 4, 5, 9, 10]] * 2)
            return each(input_ids=ids, pixel_values=pixels).logits

    expected = outputs(model)
    assert save_adapter(model, tmp_path / "adapter") == tmp_path / "adapter"
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert {config["r"], *config["rank_pattern"].values()} == {2, 4}
    assert str(tmp_path) not in json.dumps(config)
    base = M3FMForReportGeneration.from_pretrained(tmp_path / "base").eval()
    assert not torch.allclose(outputs(base), expected, atol=1e-3)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    torch.testing.assert_close(outputs(loaded.eval()), expected)
    checked = M3FMForReportGeneration.from_pretrained(tmp_path / "base")
    torch.testing.assert_close(
        outputs(load_adapter_checked(checked, tmp_path / "adapter").eval()), expected, msg="checked"
    )
    with pytest.raises(ValueError, match="no adapter 'tb': expected one of"):
        save_adapter(model, tmp_path / "tb", "tb")
    merge_lora(model)
    model.save_pretrained(tmp_path / "merged")
    merged = M3FMForReportGeneration.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(outputs(merged), expected, rtol=1e-5, atol=1e-5)


def test_every_trained_weight_of_a_step_gets_a_gradient(model):
    towers: M3FMModel = model.model
    set_training(towers.vision_model, "full")
    set_training(towers.text_encoder, "full")
    batch = {"pixel_values": torch.randn(2, 3, 28, 28), "input_ids": torch.arange(5, 15).view(2, 5)}
    towers(**batch, return_loss=True).loss.backward()
    assert [name for name, weight in towers.named_parameters() if weight.requires_grad and weight.grad is None] == []
