# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""What the model and the image processor computed once, they compute still.

The parameters come from a formula, not from a random generator, whose order of numbers may change between versions of
torch. A difference here means that checkpoints out in the world now give something else. Where that is meant, write
the artifact anew, and say so in the changelog:

    python tests/test_golden.py
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn.functional import normalize

from m3fm import M3FMConfig, M3FMForReportGeneration, M3FMImageProcessor

ARTIFACT = Path(__file__).parent / "artifacts" / "golden.safetensors"
# A step is a tie, and may go either way on another machine, unless the first token leads the second by this.
CLEAR_LEAD = 1e-2


def wave(*shape: int, phase: float = 0.0) -> torch.Tensor:
    """Returns numbers in -1..1 that look random and are the same everywhere."""
    count = int(np.prod(shape))
    index = np.arange(count, dtype=np.float64)
    return torch.from_numpy(np.sin(index * 1.7 + phase * 1.31 + np.sin(index * 0.13))).float().view(shape)


def golden_model() -> M3FMForReportGeneration:
    tower = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**tower, "vocab_size": 64, "intermediate_size": 48, "max_position_embeddings": 64, "pad_token_id": 0}
    ends = {"bos_token_id": 2, "eos_token_id": 3, "tie_word_embeddings": True}
    config = M3FMConfig(
        vision_config={"model_type": "dinov2", **tower, "image_size": 28, "patch_size": 14},
        text_encoder_config={"model_type": "bert", **text},
        text_config={"model_type": "llama", **text, **ends, "num_key_value_heads": 2},
        projection_dim=16,
        projection_hidden_size=32,
        support_memory_size=8,
        support_temperature=0.1,
    )
    model = M3FMForReportGeneration(config).eval()
    with torch.no_grad():
        # By position, so that a parameter renamed by transformers keeps its values.
        for position, (name, parameter) in enumerate(model.named_parameters()):
            values = wave(*parameter.shape, phase=position)
            if "logit_scale" in name:
                continue
            if parameter.dim() > 1:
                parameter.copy_(values * 4 * parameter[0].numel() ** -0.5)
            else:
                scales = any(part in name for part in ("norm", "Norm", "layer_scale")) and name.endswith(
                    ("weight", "lambda1")
                )
                parameter.copy_(scales + values * 0.1)
    model.set_support_memory(normalize(wave(2, 8, 16, phase=99), dim=-1))
    return model


def volume() -> np.ndarray:
    """Returns a made-up chest in HU, (12, 20, 24): lungs and a bone in soft tissue, in air."""
    hu = np.full((12, 20, 24), -1000, dtype=np.int16)
    hu[:, 3:17, 2:22] = 40
    hu[:, 5:15, 4:11], hu[:, 5:15, 13:20] = -850, -780
    hu[:, 14:16, 11:13] = 700
    return hu + np.arange(12, dtype=np.int16)[:, None, None] * 9


@torch.no_grad()
def compute() -> dict[str, torch.Tensor]:
    results = {}
    processor = M3FMImageProcessor(size={"height": 28, "width": 28}, num_slices=2)
    rows, columns = np.mgrid[:40, :30]
    gray = (128 + 90 * np.sin(rows / 5) * np.cos(columns / 4) + rows).astype(np.uint8)
    sources = {
        "gray": Image.fromarray(gray),
        "deep": (gray.astype(np.uint16) * 37 + rows.astype(np.uint16)),
        "volume": volume(),
    }
    for name, source in sources.items():
        results[f"pixel_values_{name}"] = processor(source, return_tensors="pt")["pixel_values"]
    batch = processor([list(sources.values())[:2], [sources["volume"]], sources["gray"]], return_tensors="pt")
    results["image_mask"] = batch["image_mask"]

    model = golden_model()
    ids = 16 + (torch.arange(14).view(2, 7) * 5) % 48
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    outputs = model.model(**batch, input_ids=ids, attention_mask=mask)
    for name in ("image_embeds", "text_embeds", "logits_per_image"):
        results[name] = getattr(outputs, name)
    languages = ["en", "zh", "zh"]
    results["shared_embeds"] = model.get_shared_embeds(languages, **batch)
    written = model.generate(
        **batch,
        language=languages,
        max_new_tokens=10,
        min_new_tokens=10,
        output_logits=True,
        return_dict_in_generate=True,
    )
    results["generated"] = written.sequences
    results["decoder_logits"] = torch.stack(written.logits, dim=1)
    return {name: value.contiguous() for name, value in results.items()}


def test_outputs_are_those_of_the_artifact():
    expected, computed = load_file(ARTIFACT), compute()
    assert computed.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            computed[name], value, atol=1e-4, rtol=1e-4, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_the_artifact_tells_studies_and_languages_apart():
    """A golden value that nothing can move guards nothing."""
    stored = load_file(ARTIFACT)
    for name in ("image_embeds", "text_embeds", "shared_embeds"):
        cosine = stored[name] @ stored[name].t()
        assert cosine[~torch.eye(len(cosine), dtype=torch.bool)].max() < 0.99, name
    assert len({tuple(row) for row in stored["generated"][:, 5:].tolist()}) == 3
    assert len(set(stored["generated"][:, 5:].flatten().tolist())) > 5


if __name__ == "__main__":
    golden = compute()
    allowed = golden["decoder_logits"].clone()
    allowed[..., golden_model().generation_config.suppress_tokens + [3]] = -torch.inf
    leads = allowed.topk(2).values
    lead = (leads[..., 0] - leads[..., 1]).min()
    if lead < CLEAR_LEAD:
        raise SystemExit(f"A step of the generation is decided by {lead:.5f}: change the formula.")
    save_file(golden, ARTIFACT)
