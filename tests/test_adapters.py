# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Adapters as users have them: presets, saved alone, several on one base, merged, switched, refused elsewhere."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging import version
from transformers import AutoModelForImageClassification

import m3fm
from m3fm import M3FMConfig, M3FMForImageClassification, M3FMForReportGeneration, M3FMModel, M3FMProcessor
from m3fm.adapters import (
    CLASSIFICATION_HEAD,
    PRESETS,
    base_fingerprint,
    load_adapter_checked,
    lora_config,
    save_adapter,
    use_adapter,
)

peft = pytest.importorskip("peft")
# PEFT asks for an attribute that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@pytest.fixture
def pixels() -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(2, 1, 3, 28, 28, generator=torch.Generator().manual_seed(1))}


def diagnosis_model(checkpoint: Path) -> M3FMForImageClassification:
    torch.manual_seed(0)
    return M3FMForImageClassification.from_pretrained(checkpoint, num_labels=2, dtype=torch.float32).eval()


def moved(model: Any, seed: int = 0) -> Any:
    """Gives an untrained adapter, which changes nothing yet, weights that do."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                weight.add_(torch.randn(weight.shape, generator=generator) * (0.1 if "lora_" in name else 0.5))
    return model.eval()


def with_adapter(checkpoint: Path, seed: int = 0) -> Any:
    config = lora_config("vision", modules_to_save=CLASSIFICATION_HEAD)
    return moved(peft.get_peft_model(diagnosis_model(checkpoint), config), seed)


@torch.no_grad()
def logits(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**inputs, labels=torch.tensor([0, 1])).logits


@torch.no_grad()
def embeds(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    model = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    return model.model.get_image_features(**inputs)


def adapted_modules(model: torch.nn.Module) -> set[str]:
    return {name.rsplit(".lora_A", 1)[0] for name, _ in model.named_modules() if name.endswith("lora_A")}


@pytest.mark.parametrize(
    ("preset", "parts"),
    [
        ("vision", {"vision_model"}),
        ("text", {"text_encoder"}),
        ("decoder", {"decoder"}),
        ("all", {"vision_model", "text_encoder", "decoder"}),
    ],
)
def test_preset_adapts_query_and_value_of_its_parts_alone(
    tiny_model: M3FMForReportGeneration, preset: str, parts: set[str]
) -> None:
    names = adapted_modules(peft.get_peft_model(tiny_model, lora_config(preset)))
    found = {next(part for part in ("vision_model", "text_encoder", "decoder") if f"{part}." in n) for n in names}
    assert found == parts
    # Two layers each: query and value of the towers, seven linear layers of the decoder's blocks.
    assert len(names) == sum(14 if part == "decoder" else 4 for part in parts)
    assert not any(word in name for name in names for word in ("key", "lm_head", "embed", "projection"))


def test_presets_find_the_modules_of_the_shipped_checkpoint() -> None:
    config = M3FMConfig.from_pretrained(m3fm.DEFAULT_CHECKPOINT)
    with torch.device("meta"):
        model = M3FMForReportGeneration(config)
    layers = {
        "vision": (2, config.vision_config.num_hidden_layers),
        "text": (1, config.text_encoder_config.num_hidden_layers),  # query, key and value in one matrix
        "decoder": (7, config.text_config.num_hidden_layers),
    }
    for preset, (per_layer, number) in layers.items():
        adapted = copy.deepcopy(model)
        assert len(adapted_modules(peft.get_peft_model(adapted, lora_config(preset)))) == per_layer * number


@pytest.mark.parametrize("model_class", [M3FMModel, M3FMForReportGeneration, M3FMForImageClassification])
def test_vision_preset_fits_every_class(model_class: type, tiny_config: M3FMConfig) -> None:
    assert len(adapted_modules(peft.get_peft_model(model_class(tiny_config), lora_config("vision")))) == 4


def test_wrong_presets_and_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match=f"'visoin': expected one of {', '.join(PRESETS)}"):
        lora_config("visoin")
    with pytest.raises(ValueError, match="r >= 1, got 0"):
        lora_config("vision", r=0)


# Before, transformers looked for the heads of `modules_to_save` in the base's own weights.
TRANSFORMERS_LOADS_HEADS = version.parse(transformers.__version__) >= version.parse("5.23")
by_transformers = pytest.mark.skipif(not TRANSFORMERS_LOADS_HEADS, reason="transformers loads no saved heads here")


@by_transformers
def test_adapter_loads_by_transformers_too(
    tiny_checkpoint: Path, tmp_path: Path, pixels: dict[str, torch.Tensor]
) -> None:
    model = with_adapter(tiny_checkpoint)
    expected = logits(model, pixels)
    folder = save_adapter(model, tmp_path / "tb")
    loaded = diagnosis_model(tiny_checkpoint)
    loaded.load_adapter(str(folder), adapter_name="tb")
    by_auto = AutoModelForImageClassification.from_pretrained(folder, num_labels=2, dtype=torch.float32)
    for each in (loaded, by_auto):
        torch.testing.assert_close(logits(each.eval(), pixels), expected, atol=0, rtol=0)


def test_adapter_is_saved_alone_and_loads_by_peft(
    tiny_checkpoint: Path, tmp_path: Path, pixels: dict[str, torch.Tensor]
) -> None:
    model = with_adapter(tiny_checkpoint)
    expected = logits(model, pixels)
    folder = save_adapter(model, tmp_path / "tb")
    assert {path.suffix for path in folder.iterdir()} == {".json", ".md", ".safetensors"}
    assert (folder / "adapter_model.safetensors").stat().st_size < 40_000

    checked = load_adapter_checked(diagnosis_model(tiny_checkpoint), folder)
    by_peft = peft.PeftModel.from_pretrained(diagnosis_model(tiny_checkpoint), folder)
    for loaded in (checked, by_peft):
        torch.testing.assert_close(logits(loaded.eval(), pixels), expected, atol=0, rtol=0)


def test_disabled_adapter_is_the_base_exactly(tiny_checkpoint: Path, pixels: dict[str, torch.Tensor]) -> None:
    base = diagnosis_model(tiny_checkpoint)
    expected = logits(base, pixels), embeds(base, pixels)
    model = with_adapter(tiny_checkpoint)
    assert not torch.equal(embeds(model, pixels), expected[1])
    with use_adapter(model, None):
        assert torch.equal(logits(model, pixels), expected[0])
        assert torch.equal(embeds(model, pixels), expected[1])
    assert not torch.equal(logits(model, pixels), expected[0])


def test_merged_equals_unmerged(tiny_checkpoint: Path, tmp_path: Path, pixels: dict[str, torch.Tensor]) -> None:
    model = with_adapter(tiny_checkpoint)
    expected = logits(model, pixels)
    merged = model.merge_and_unload()
    assert adapted_modules(merged) == set()
    torch.testing.assert_close(logits(merged, pixels), expected, atol=1e-5, rtol=0)
    merged.save_pretrained(tmp_path / "merged")
    again = M3FMForImageClassification.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    torch.testing.assert_close(logits(again, pixels), logits(merged, pixels), atol=0, rtol=0)


def test_merged_adapter_is_not_saved(tiny_checkpoint: Path, tmp_path: Path) -> None:
    model = with_adapter(tiny_checkpoint)
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        save_adapter(model, tmp_path / "tb")


@pytest.fixture
def two_adapters(tiny_checkpoint: Path, tmp_path: Path) -> tuple[Path, Path]:
    return tuple(save_adapter(with_adapter(tiny_checkpoint, seed), tmp_path / f"site_{seed}") for seed in (1, 2))


@pytest.mark.parametrize("way", ["peft", pytest.param("transformers", marks=by_transformers)])
def test_adapters_on_one_base_are_switched_per_call(
    way: str, tiny_checkpoint: Path, two_adapters: tuple[Path, Path], pixels: dict[str, torch.Tensor]
) -> None:
    base = diagnosis_model(tiny_checkpoint)
    expected = {None: logits(base, pixels)}
    for name, folder in zip(("one", "two"), two_adapters, strict=True):
        expected[name] = logits(load_adapter_checked(diagnosis_model(tiny_checkpoint), folder), pixels)
    if way == "peft":
        model = load_adapter_checked(diagnosis_model(tiny_checkpoint), two_adapters[0], "one")
        model = load_adapter_checked(model, two_adapters[1], "two")
    else:
        model = diagnosis_model(tiny_checkpoint)
        model.load_adapter(str(two_adapters[0]), adapter_name="one")
        model.load_adapter(str(two_adapters[1]), adapter_name="two")
        model.set_adapter("two")
    trainable = [name for name, weight in model.named_parameters() if weight.requires_grad]
    for name in ("one", None, "two", "one", None):
        with use_adapter(model, name):
            assert torch.equal(logits(model, pixels), expected[name]), name
        assert torch.equal(logits(model, pixels), expected["two"]), f"after {name}"
    assert [name for name, weight in model.named_parameters() if weight.requires_grad] == trainable
    with use_adapter(model, None), use_adapter(model, "one"):
        assert torch.equal(logits(model, pixels), expected["one"])
    with pytest.raises(RuntimeError, match="inside"), use_adapter(model, "one"):
        raise RuntimeError("inside")
    assert torch.equal(logits(model, pixels), expected["two"])
    with pytest.raises(ValueError, match=r"no adapter 'three': expected one of \['one', 'two'\]"):
        use_adapter(model, "three").__enter__()


def test_an_adapter_beside_others_is_saved_alone(
    tiny_checkpoint: Path, two_adapters: tuple[Path, Path], tmp_path: Path, pixels: dict[str, torch.Tensor]
) -> None:
    model = load_adapter_checked(diagnosis_model(tiny_checkpoint), two_adapters[0], "one")
    model = load_adapter_checked(model, two_adapters[1], "two")
    folder = save_adapter(model, tmp_path / "again", "one")
    assert folder == tmp_path / "again" / "one"
    again = load_adapter_checked(diagnosis_model(tiny_checkpoint), folder)
    with use_adapter(model, "one"):
        assert torch.equal(logits(again, pixels), logits(model, pixels))
    with pytest.raises(ValueError, match="already has an adapter 'one'"):
        load_adapter_checked(model, folder, "one")


def test_adapter_of_another_base_is_refused(
    tiny_checkpoint: Path, two_adapters: tuple[Path, Path], tmp_path: Path
) -> None:
    other = diagnosis_model(tiny_checkpoint)
    with torch.no_grad():
        other.model.visual_projection[1].bias[0] += 1e-3
    with pytest.raises(ValueError, match="trained on another base: visual_projection of this model has other weights"):
        load_adapter_checked(other, two_adapters[0])
    unknown = shutil.copytree(two_adapters[0], tmp_path / "unknown")
    (unknown / "m3fm_base.json").unlink()
    with pytest.raises(ValueError, match="does not say what base"):
        load_adapter_checked(diagnosis_model(tiny_checkpoint), unknown)
    (unknown / "m3fm_base.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        load_adapter_checked(diagnosis_model(tiny_checkpoint), unknown)
    with pytest.raises(ValueError, match="is not an adapter"):
        load_adapter_checked(diagnosis_model(tiny_checkpoint), tiny_checkpoint)


def test_fingerprint_is_of_the_base_alone(tiny_checkpoint: Path) -> None:
    plain = base_fingerprint(diagnosis_model(tiny_checkpoint))
    assert base_fingerprint(with_adapter(tiny_checkpoint)) == plain
    whole = base_fingerprint(M3FMForReportGeneration.from_pretrained(tiny_checkpoint))
    assert {part: whole[part] for part in plain} == plain
    assert whole.keys() - plain.keys() == {"decoder", "prefix_projector"}


def test_adapter_training_is_resumed(
    tiny_checkpoint: Path, two_adapters: tuple[Path, Path], pixels: dict[str, torch.Tensor]
) -> None:
    def step(model: Any) -> float:
        optimizer = torch.optim.SGD([w for w in model.parameters() if w.requires_grad], lr=0.1)
        loss = model(**pixels, labels=torch.tensor([0, 1])).loss
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    model = load_adapter_checked(diagnosis_model(tiny_checkpoint), two_adapters[0], is_trainable=True).eval()
    losses = [step(model) for _ in range(4)]
    assert losses[-1] < losses[0]
    frozen = load_adapter_checked(diagnosis_model(tiny_checkpoint), two_adapters[0])
    assert not any(weight.requires_grad for weight in frozen.parameters())


def style_inputs(model: Any, processor: M3FMProcessor, reports: list[str]) -> tuple[dict[str, Any], torch.Tensor]:
    """Returns inputs that write each report from its own embedding, and the labels."""
    tokens = processor(text=reports, return_tensors="pt")
    with torch.no_grad():
        shared = model.model.get_text_features(tokens["input_ids"], tokens["attention_mask"])
    prompt = model.build_prompt(["en"] * len(reports))
    inputs = {
        "input_ids": torch.cat([prompt, tokens["input_ids"]], dim=1),
        "attention_mask": torch.cat([torch.ones_like(prompt), tokens["attention_mask"]], dim=1),
        "shared_embeds": shared,
    }
    answers = tokens["input_ids"].masked_fill(tokens["attention_mask"] == 0, -100)
    return inputs, torch.cat([torch.full_like(prompt, -100), answers], dim=1)


def train(model: Any, inputs: dict[str, Any], labels: torch.Tensor, steps: int) -> float:
    optimizer = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], lr=0.02)
    for _ in range(steps):
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        return float(model(**inputs, labels=labels).loss)


def test_decoder_learns_a_sites_style_from_text_alone(
    tiny_model: M3FMForReportGeneration, tiny_processor: M3FMProcessor, tmp_path: Path
) -> None:
    plain = [f"The heart is normal, view {i}." for i in range(20)]
    train(tiny_model.requires_grad_(True), *style_inputs(tiny_model, tiny_processor, plain), steps=25)
    # The same reports as a site writes them.
    inputs, labels = style_inputs(tiny_model, tiny_processor, [f"CHEST. Normal heart ({i})." for i in range(20)])
    shared = inputs["shared_embeds"][:2]

    def write(model: Any) -> list[str]:
        ids = model.generate(shared_embeds=shared, max_new_tokens=12)
        return tiny_processor.batch_decode(ids, skip_special_tokens=True)

    with torch.no_grad():
        base = tiny_model(**inputs, labels=labels)
    written = write(tiny_model)
    model = peft.get_peft_model(tiny_model, lora_config("decoder", r=4))
    learned = train(model, inputs, labels, steps=40)
    assert learned < 0.6 * float(base.loss)
    assert write(model) != written
    with use_adapter(model, None), torch.no_grad():
        assert torch.equal(model(**inputs).logits, base.logits)
        assert write(model) == written

    folder = save_adapter(model, tmp_path / "style")
    assert {"decoder", "vision_model"} <= json.loads((folder / "m3fm_base.json").read_text())["weights_sha256"].keys()
    again = load_adapter_checked(model.unload(), folder)
    with torch.no_grad():
        assert float(again(**inputs, labels=labels).loss) == pytest.approx(learned, abs=1e-5)
