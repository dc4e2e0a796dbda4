# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Contracts of writing: every way to decode gives the same tokens, in every language, for any batch; adapters too."""

import re

import pytest
import torch
from torch.nn.functional import normalize

from m3fm import M3FMConfig, M3FMForImageClassification, M3FMForReportGeneration, M3FMModel

LENGTH = 12
PROMPT = 5  # four places for the image and a language token
PREFIX = {"en": [4, 4, 4, 4, 5], "zh": [4, 4, 4, 4, 6]}


@pytest.fixture
def studies() -> dict[str, torch.Tensor]:
    """Returns three studies, of two, one and two images."""
    noise = torch.randn(3, 2, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    return {
        "pixel_values": noise + torch.tensor([2.0, 0.0, -2.0]).view(3, 1, 1, 1, 1),
        "image_mask": torch.tensor([[True, True], [True, False], [True, True]]),
    }


@pytest.fixture
def writer(tiny_model: M3FMForReportGeneration) -> M3FMForReportGeneration:
    """Returns the tiny model with a decoder that has opinions, so that a wrong step shows in the tokens."""
    with torch.no_grad():
        for name, weight in tiny_model.decoder.named_parameters():
            if weight.dim() > 1:
                weight.mul_(1 if "embed_tokens" in name else 8)
        tiny_model.prefix_projector.weight.mul_(8)
        tiny_model.model.visual_projection[-1].weight.mul_(8)
    return tiny_model


def write(model: M3FMForReportGeneration, inputs: dict[str, torch.Tensor], **kwargs) -> list[list[int]]:
    return model.generate(**inputs, **{"max_new_tokens": LENGTH, "min_new_tokens": LENGTH} | kwargs).tolist()


def test_the_prompt_comes_first_and_control_tokens_never_again(writer, studies):
    rows = write(writer, studies, language=["en", "zh", "en"])
    assert [row[:PROMPT] for row in rows] == [PREFIX["en"], PREFIX["zh"], PREFIX["en"]]
    written = {token for row in rows for token in row[PROMPT:]}
    assert not written & {0, 2, 4, 5, 6}
    assert len(written) > 6, "a constant answer would make the comparisons below empty"
    assert rows[0] != rows[2]


@pytest.mark.parametrize("decoding", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_cache_static_cache_and_no_cache_agree(writer, studies, decoding):
    dynamic = write(writer, studies, **decoding)
    assert len(dynamic) == 3 * decoding.get("num_return_sequences", 1)
    assert write(writer, studies, use_cache=False, **decoding) == dynamic
    assert write(writer, studies, cache_implementation="static", **decoding) == dynamic


def test_cached_steps_give_the_logits_of_one_pass(writer, studies):
    outputs = writer.generate(
        **studies, max_new_tokens=LENGTH, return_dict_in_generate=True, output_logits=True, language="zh"
    )
    with torch.no_grad():
        whole = writer(outputs.sequences, **studies).logits[:, PROMPT - 1 : -1]
    torch.testing.assert_close(torch.stack(outputs.logits, dim=1), whole, atol=1e-4, rtol=0)


def test_a_batch_equals_its_studies_alone(writer, studies):
    languages = ["zh", "en", "en"]
    together = write(writer, studies, language=languages)
    for row, language in enumerate(languages):
        real = int(studies["image_mask"][row].sum())
        alone = {"pixel_values": studies["pixel_values"][row : row + 1, :real]}
        assert write(writer, alone, language=language) == [together[row]]


def test_a_mixed_batch_equals_each_language_alone(writer, studies):
    mixed = write(writer, studies, language=("zh", "en", "zh"))
    chinese, english = (write(writer, studies, language=language) for language in ("zh", "en"))
    assert mixed == [chinese[0], english[1], chinese[2]]
    assert write(writer, studies) == english, "English is the default"
    assert [row[PROMPT:] for row in chinese] != [row[PROMPT:] for row in english]


def test_assisted_decoding_writes_the_same(writer, studies):
    alone = {name: value[:1] for name, value in studies.items()}
    expected = write(writer, alone, language="zh")
    assert write(writer, alone, language="zh", prompt_lookup_num_tokens=3) == expected


def test_beams_find_what_is_at_least_as_likely(writer, studies):
    def likelihood(ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            logits = writer(ids, **studies).logits[:, PROMPT - 1 : -1]
        logits[..., writer.generation_config.suppress_tokens] = -torch.inf
        logits[..., 3] = -torch.inf  # the reports compared have one length
        return logits.log_softmax(-1).gather(-1, ids[:, PROMPT:, None]).sum((1, 2))

    greedy, beams = (torch.tensor(write(writer, studies, num_beams=count)) for count in (1, 5))
    assert (likelihood(beams) >= likelihood(greedy) - 1e-3).all()


def test_sampling_follows_its_seed(writer, studies):
    def sample(seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        return write(writer, studies, do_sample=True, temperature=1.5, num_return_sequences=2)

    assert len(sample(0)) == 6
    assert sample(0) == sample(0)
    assert sample(0) != sample(1)


def test_every_way_to_give_the_image_writes_the_same(writer, studies):
    expected = write(writer, studies, language="zh")
    tokens = writer.model.get_vision_features(studies["pixel_values"]).detach()
    features = {"vision_features": tokens, "image_mask": studies["image_mask"]}
    assert write(writer, features, language="zh") == expected
    embeds = writer.get_shared_embeds(["zh"] * 3, **studies).detach()
    assert write(writer, {"shared_embeds": embeds}, language="zh") == expected
    single = studies["pixel_values"][:, 0]
    assert write(writer, {"pixel_values": single}) == write(writer, {"pixel_values": single.unsqueeze(1)})


def test_the_image_is_encoded_once(writer, studies, monkeypatch):
    calls = []
    tower = writer.model.vision_model.forward
    monkeypatch.setattr(writer.model.vision_model, "forward", lambda **inputs: calls.append(1) or tower(**inputs))
    write(writer, studies, num_beams=3)
    assert len(calls) == 1


def test_the_image_decides(writer, studies):
    other = {**studies, "pixel_values": -studies["pixel_values"]}
    assert write(writer, studies) != write(writer, other)


def test_precision_of_a_text_embedding_does_not_matter(writer, studies):
    embeds = writer.get_shared_embeds(["en"] * 3, **studies).detach()
    half = writer.to(torch.bfloat16)
    assert len(write(half, {"shared_embeds": embeds})) == 3
    assert len(write(half, studies)) == 3


def test_a_report_is_not_cut_at_the_default_of_transformers(tiny_model, studies):
    tiny_model.generation_config.eos_token_id = None
    assert tiny_model.generate(**studies).shape[1] > PROMPT + 150


# --- image tokens beside the embedding -------------------------------------------------------------------------------


@pytest.fixture
def seeing(writer: M3FMForReportGeneration) -> M3FMForReportGeneration:
    """Returns the writer with three image tokens that it listens to."""
    config = M3FMConfig.from_dict({**writer.config.to_dict(), "num_image_tokens": 3})
    model = M3FMForReportGeneration(config).eval()
    missing, _ = model.load_state_dict(writer.state_dict(), strict=False)
    assert set(missing) == {"token_projector.weight", "token_projector.bias"}
    torch.nn.init.normal_(model.token_projector.weight, std=0.3, generator=torch.Generator().manual_seed(2))
    return model


def test_image_tokens_are_written_from_in_every_way_of_decoding(seeing, writer, studies):
    languages = ["zh", "en", "en"]
    rows = write(seeing, studies, language=languages)
    assert [row[: PROMPT + 3] for row in rows] == [[4] * 3 + PREFIX[language] for language in languages]
    assert [row[PROMPT + 3 :] for row in rows] != [row[PROMPT:] for row in write(writer, studies, language=languages)]
    for decoding in ({"use_cache": False}, {"cache_implementation": "static"}):
        assert write(seeing, studies, language=languages, **decoding) == rows
    beams = write(seeing, studies, language=languages, num_beams=2)
    assert write(seeing, studies, language=languages, num_beams=2, use_cache=False) == beams
    tokens = seeing.model.get_vision_features(studies["pixel_values"]).detach()
    assert write(seeing, {"vision_features": tokens, "image_mask": studies["image_mask"]}, language=languages) == rows
    for row, language in enumerate(languages):
        real = int(studies["image_mask"][row].sum())
        alone = {"pixel_values": studies["pixel_values"][row : row + 1, :real]}
        assert write(seeing, alone, language=language) == [rows[row]]


def test_image_tokens_change_nothing_for_an_embedding_alone(seeing, writer, studies):
    embeds = writer.get_shared_embeds(["zh"] * 3, **studies).detach()
    assert torch.equal(seeing.get_shared_embeds(["zh"] * 3, **studies), embeds)
    expected = write(writer, {"shared_embeds": embeds}, language="zh")
    assert write(seeing, {"shared_embeds": embeds}, language="zh") == expected
    assert [row[:PROMPT] for row in expected] == [PREFIX["zh"]] * 3


def test_cached_steps_after_image_tokens_give_the_logits_of_one_pass(seeing, studies):
    outputs = seeing.generate(**studies, max_new_tokens=LENGTH, return_dict_in_generate=True, output_logits=True)
    with torch.no_grad():
        whole = seeing(outputs.sequences, **studies).logits[:, PROMPT + 3 - 1 : -1]
    torch.testing.assert_close(torch.stack(outputs.logits, dim=1), whole, atol=1e-4, rtol=0)


def test_texts_may_follow_images_in_one_batch(seeing, studies):
    words = torch.full((5, 6), 20)
    images = torch.cat([seeing.build_prompt(["en", "zh", "en"], 3), words[:3]], dim=1)
    texts = torch.cat([seeing.build_prompt(["en", "zh"]), words[3:]], dim=1)
    embeds = normalize(torch.randn(2, 16, generator=torch.Generator().manual_seed(4)), dim=-1)
    with torch.no_grad():
        apart = [seeing(images, **studies).logits, seeing(texts, shared_embeds=embeds).logits]
        padded = torch.nn.functional.pad(texts, (0, 3))
        mask = torch.ones(5, images.shape[1], dtype=torch.long)
        mask[3:, -3:] = 0
        joined = torch.cat([images, padded])
        together = seeing(joined, shared_embeds=embeds, attention_mask=mask, **studies).logits
    torch.testing.assert_close(together[:3], apart[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(together[3:, :-3], apart[1], atol=1e-4, rtol=0)
    joined[3, -1] = 4
    with pytest.raises(ValueError, match=r"4 image placeholders in each of 2 rows and 7 .* 3 rows of images, got"):
        seeing(joined, shared_embeds=embeds, **studies)


def test_a_checkpoint_with_image_tokens_serves_every_class_and_fits_no_other(seeing, writer, studies, tmp_path):
    seeing.save_pretrained(tmp_path / "seeing")
    writer.save_pretrained(tmp_path / "plain")
    again = M3FMForReportGeneration.from_pretrained(tmp_path / "seeing")
    assert write(again, studies) == write(seeing, studies)
    assert torch.equal(
        M3FMModel.from_pretrained(tmp_path / "seeing").text_projection.weight, seeing.model.text_projection.weight
    )
    M3FMForImageClassification.from_pretrained(tmp_path / "seeing")
    with pytest.raises(ValueError, match="missing 2 .token_projector"):
        M3FMForReportGeneration.from_pretrained(tmp_path / "plain", num_image_tokens=3)


# --- the support memory ----------------------------------------------------------------------------------------------


def test_each_language_is_written_from_its_own_memory(writer, studies, tiny_config):
    memory = torch.zeros(2, 12, 16)
    memory[0, :, 0], memory[1, :, 1] = 1, 1
    writer.set_support_memory(memory)
    crossed = writer.get_shared_embeds(["en", "zh", "en"], **studies)
    torch.testing.assert_close(crossed, torch.eye(16)[[0, 1, 0]], atol=1e-6, rtol=0)
    torch.testing.assert_close(writer.get_shared_embeds(["zh"] * 3, **studies), torch.eye(16)[[1, 1, 1]])


def test_an_empty_memory_is_refused(tiny_config, studies):
    with pytest.raises(ValueError, match="support memory is empty"):
        M3FMForReportGeneration(tiny_config).generate(**studies)


def test_without_a_memory_the_image_goes_straight_to_the_decoder(tiny_config, studies, tmp_path):
    config = M3FMConfig.from_dict({**tiny_config.to_dict(), "support_memory_size": 0})
    model = M3FMForReportGeneration(config).eval()
    assert torch.equal(model.get_shared_embeds(["en"] * 3, **studies), model.model.get_image_features(**studies))
    model.save_pretrained(tmp_path)
    assert write(M3FMForReportGeneration.from_pretrained(tmp_path), studies) == write(model, studies)


def test_a_memory_of_another_shape_is_refused(tiny_model):
    with pytest.raises(ValueError, match=re.escape("shape (2, 12, 16), got (2, 11, 16)")):
        tiny_model.set_support_memory(torch.zeros(2, 11, 16))


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"language": "fr"}, r"Unsupported language \['fr'\]: expected one of \['en', 'zh'\]"),
        ({"language": ["en", "zh", "de"]}, r"Unsupported language \['de'\]"),
        ({"language": ["en", "zh"]}, "one language or 3 of them, got 2"),
        ({"shared_embeds": torch.zeros(3, 16)}, "exactly one of pixel_values, vision_features and shared_embeds"),
        ({"pixel_values": None}, "exactly one of pixel_values"),
        ({"langauge": "zh"}, "langauge"),
        ({"input_ids": torch.full((3, 6), 20)}, "call the processor without text, and pass language='en'"),
        ({"attention_mask": torch.ones(3, 6)}, "call the processor without text"),
    ],
)
def test_wrong_requests_are_refused(kwargs, message, tiny_model, studies):
    with pytest.raises(ValueError, match=message):
        tiny_model.generate(**{**studies, **kwargs}, max_new_tokens=2)


def test_wrong_prompts_are_refused(tiny_model, studies):
    words = torch.full((3, 6), 20)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        tiny_model(**studies)
    with pytest.raises(ValueError, match="language token at position 4"):
        tiny_model(words, **studies)
    embeds = normalize(torch.ones(3, 16), dim=-1)
    with pytest.raises(ValueError, match=r"4 image placeholders in each of 3 rows, got \[0, 0, 0\]"):
        tiny_model(words, shared_embeds=embeds)
    prompts = torch.cat([tiny_model.build_prompt(["en"] * 3), words], dim=1)
    with pytest.raises(ValueError, match="placeholders in input_ids and nothing to put there"):
        tiny_model(prompts)
    prompts[0, 0], prompts[1, -1] = 20, 4  # as many in all, and not in each row
    with pytest.raises(ValueError, match=r"got \[3, 5, 4\]"):
        tiny_model(prompts, shared_embeds=embeds)
    with pytest.raises(ValueError, match=r"in each of 2 rows, got \[4, 4, 4\]"):
        tiny_model(tiny_model.build_prompt(["en"] * 3), shared_embeds=embeds[:2])


# --- adapters --------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks by the old name
@pytest.mark.parametrize(
    "target", [r".*vision_model.*(query|value|q_proj|v_proj)", r"decoder\..*(q_proj|v_proj)", "all-linear"]
)
def test_lora_attaches_trains_saves_alone_and_loads(target, writer, studies, tmp_path):
    peft = pytest.importorskip("peft")
    checkpoint = tmp_path / "base"
    writer.save_pretrained(checkpoint)
    before = write(writer, studies, language="zh")
    torch.manual_seed(3)
    adapted = peft.get_peft_model(
        M3FMForReportGeneration.from_pretrained(checkpoint),
        peft.LoraConfig(r=4, target_modules=target, init_lora_weights=False),
    ).eval()
    trainable = [name for name, weight in adapted.named_parameters() if weight.requires_grad]
    assert trainable and all("lora_" in name for name in trainable)
    ids = torch.tensor(before)
    adapted(input_ids=ids, labels=ids, **studies).loss.backward()
    assert any(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in adapted.parameters())

    adapted.save_pretrained(tmp_path / "adapter")
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert "adapter_model.safetensors" in names and "model.safetensors" not in names
    again = peft.PeftModel.from_pretrained(
        M3FMForReportGeneration.from_pretrained(checkpoint), tmp_path / "adapter"
    ).eval()
    with torch.no_grad():
        expected = adapted(input_ids=ids, **studies).logits
        assert torch.equal(again(input_ids=ids, **studies).logits, expected)
        base = M3FMForReportGeneration.from_pretrained(checkpoint)
        assert not torch.allclose(base(input_ids=ids, **studies).logits, expected, atol=1e-4)
    assert write(again, studies, language="zh") == write(adapted, studies, language="zh")
