# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""One training step without memory or time: on tensors that have a shape and no content.

PyTorch's fake tensors go through the real code of a model, forward and back. What autograd keeps and how many floating
point operations there are is therefore counted, not derived from a formula for one architecture.

Letters in shapes: B studies or texts of a micro-batch, N images of a study, T tokens, P positions before a text.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import TrainingArguments

from ..configuration_m3fm import M3FMConfig
from ..modeling_m3fm import M3FMModel
from .towers import LoraBlock, set_training

__all__ = [
    "StepCost",
    "Steps",
    "align_inputs",
    "build_on_meta",
    "forward_flops",
    "image_inputs",
    "num_tokens",
    "pooled_loss",
    "rehearse",
    "write_inputs",
    "written_loss",
]

Inputs = Mapping[str, torch.Tensor]
Loss = Callable[[nn.Module, Inputs], torch.Tensor]
#: The recipes' names of the ways to train a tower, by part.
MODES = {"vision_model": "vision_training", "text_encoder": "text_training", "decoder": "decoder_training"}


@dataclass
class Steps:
    """What a stage does at every step.

    Attributes:
        build: Makes the model on the meta device, with what is trained.
        lengths: Tokens of the text of each sample of an epoch.
        inputs: Makes a micro-batch of texts of so many tokens; None: it is not known.
        loss: Runs the model on it, and returns a number to go back from.
        pairs: Images and texts of a micro-batch that a contrastive loss compares over a step; (0, 0): there is none.
        loss_rows: Rows of it at once.
    """

    build: Callable[[], nn.Module]
    lengths: np.ndarray
    inputs: Callable[[int], Inputs] | None = None
    loss: Loss | None = None
    pairs: tuple[int, int] = (0, 0)
    loss_rows: int = 0

    def check_enough(self, arguments: TrainingArguments, ranks: int) -> None:
        """Refuses fewer samples than one micro-batch of each rank.

        Raises:
            ValueError: With what to change.
        """
        micro = arguments.per_device_train_batch_size
        if len(self.lengths) < micro * ranks:
            raise ValueError(
                f"Expected at least {micro * ranks} samples, a micro-batch of {micro} for each of {ranks} processes, "
                f"got {len(self.lengths)}: lower per_device_train_batch_size, or add sets."
            )


@dataclass(frozen=True)
class StepCost:
    """What one micro-batch costs.

    Attributes:
        activations: Bytes that are kept for the gradient, copies of weights in 16 bits included.
        passing: Bytes of the gradients at one place of the backward pass: of what an operation gave and of what it was
            given, each taken to be as large as the largest tensor that is kept.
        inputs: Bytes of the micro-batch.
        forward_flops: Floating point operations of the forward pass.
        flops: Of forward and backward pass.
    """

    activations: int
    passing: int
    inputs: int
    forward_flops: int
    flops: int


def build_on_meta(
    model_class: type[nn.Module],
    config: M3FMConfig,
    modes: Mapping[str, str],
    lora: LoraBlock,
    trained: Sequence[str] | None = None,
) -> nn.Module:
    """Builds a model without memory for its weights, trained as a recipe says.

    Args:
        model_class: One of M3FM's.
        config: Its configuration.
        modes: "frozen", "full", "lora" or "last_N" by part; a part without one stays as the rest is.
        lora: Of mode "lora".
        trained: What is trained beside these parts, by name; None: everything.
    """
    with torch.device("meta"):
        model = model_class(config)
        base = model if isinstance(model, M3FMModel) else model.model
        if trained is not None:
            model.requires_grad_(False)
            for name in trained:
                part = getattr(model, name, None) if hasattr(model, name) else getattr(base, name)
                part.requires_grad_(True)
        for name, mode in modes.items():
            owner = base if hasattr(base, name) else model
            set_training(getattr(owner, name), mode, lora, MODES[name])
    return model.train()


def rehearse(model: nn.Module, inputs: Callable[[], Inputs], loss: Loss, bf16: bool) -> StepCost:
    """Goes through one micro-batch, there and back.

    Args:
        model: On the meta device; it is of no use afterwards.
        inputs: Makes the micro-batch.
        loss: Runs the model on it.
        bf16: Whether under autocast, as `TrainingArguments.bf16` has it.
    """
    with _fake(model) as counter:
        batch = inputs()
        weights = {weight.untyped_storage()._cdata for weight in (*model.parameters(), *model.buffers())}
        own = {value.untyped_storage()._cdata for value in batch.values()}
        kept: dict[int, int] = {}

        def keep(value: torch.Tensor) -> torch.Tensor:
            storage = value.untyped_storage()
            if storage._cdata not in weights | own:
                kept[storage._cdata] = storage.nbytes()
            return value

        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value)
        with hooks, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            value = loss(model, batch)
        forward = counter.get_total_flops()
        value.backward()
        size = sum(each.untyped_storage().nbytes() for each in batch.values())
        passing = 2 * max(kept.values(), default=0)
        return StepCost(sum(kept.values()), passing, size, forward, counter.get_total_flops())


def forward_flops(model: nn.Module, run: Callable[[nn.Module], Any]) -> int:
    """Returns the floating point operations of a forward pass of a model on the meta device, spent afterwards."""
    with _fake(model) as counter, torch.no_grad():
        run(model)
        return counter.get_total_flops()


@contextlib.contextmanager
def _fake(model: nn.Module) -> Iterator[FlopCounterMode]:
    """Gives the weights of a model to fake tensors on a CPU, whose attention keeps what that of a GPU keeps."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    aten = torch.ops.aten
    counted = {
        aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
    }
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        with FlopCounterMode(display=False, custom_mapping=counted) as counter:
            yield counter


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward_flops(gradient: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)


# --------------------------------------------------------------------------------------------------------------------
# Micro-batches


def align_inputs(
    config: M3FMConfig, size: tuple[int, int], images: int, texts: int, views: int, cached: bool, length: int
) -> dict[str, torch.Tensor]:
    """Makes what stage 1 gives the model: images, or the tokens of a frozen tower, and texts of `length` tokens."""
    batch = {"input_ids": torch.zeros(max(texts, 1), length, dtype=torch.long)}
    return batch | image_inputs(config, size, max(images, 1), views, cached)


def image_inputs(
    config: M3FMConfig, size: tuple[int, int], images: int, views: int, cached: bool
) -> dict[str, torch.Tensor]:
    """Makes `pixel_values` (B, N, 3, H, W), or `vision_features` (B, N, S, C) of a frozen tower."""
    if not cached:
        return {"pixel_values": torch.zeros(images, views, 3, *size)}
    return {"vision_features": torch.zeros(images, views, num_tokens(config, size), config.vision_config.hidden_size)}


def num_tokens(config: M3FMConfig, size: tuple[int, int]) -> int:
    """Returns S, the tokens that the tower makes of an image, that of its class included."""
    patch = config.vision_config.patch_size
    return (size[0] // patch) * (size[1] // patch) + 1


def write_inputs(
    config: M3FMConfig, texts: int, images: Mapping[str, torch.Tensor], length: int
) -> dict[str, torch.Tensor]:
    """Makes what the decoder is trained on: texts of `length` tokens behind their prompts, of images or embeddings."""
    prompt = config.num_prefix_tokens + 1 + (config.num_image_tokens if images else 0)
    batch = {
        "input_ids": torch.zeros(texts, length + 1, dtype=torch.long),  # with the language's
        "labels": torch.zeros(texts, prompt + length, dtype=torch.long),
    }
    return batch | (dict(images) or {"shared_embeds": torch.zeros(texts, config.projection_dim)})


def pooled_loss(model: nn.Module, batch: Inputs) -> torch.Tensor:
    """Embeds a micro-batch of stage 1; the loss itself is counted apart, for it is that of a whole step."""
    output = model(**batch)
    return output.image_embeds.float().sum() + output.text_embeds.float().sum() + output.logit_scale


def written_loss(model: nn.Module, batch: Inputs) -> torch.Tensor:
    """Computes the loss of texts that are written.

    Places are not looked for in `input_ids`, as the model does: there is nothing in them.
    """
    images = {name: batch[name] for name in ("pixel_values", "vision_features") if name in batch}
    parts = []
    shared = batch.get("shared_embeds")
    if images:
        pooled = model.model.pool_studies(**images)  # (B, Q, C)
        shared = model.model.embed_pooled(pooled)
        if model.config.num_image_tokens:
            parts.append(model.token_projector(pooled[:, : model.config.num_image_tokens]))
    prefix = model.prefix_projector(shared)
    words = model.get_input_embeddings()(batch["input_ids"])  # (B, 1 + T, H)
    parts += [prefix.view(len(prefix), -1, words.shape[-1]), words]
    embeds = torch.cat([part.to(words.dtype) for part in parts], dim=1)
    return model(inputs_embeds=embeds, labels=batch["labels"]).loss
