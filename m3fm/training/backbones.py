# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Pretrained backbones by folder or name: image towers, text encoders, decoders, and the one tokenizer of a model.

Loading follows transformers' own rules: a folder, else the Hugging Face cache, else the Hub where HF_HUB_OFFLINE does
not forbid it. Only safetensors are read: a pickled file can run code.
"""

import copy
import inspect
import logging
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

from ..base_m3fm import _without_pooler
from .model_tokenizer import check_language, find_backbone, find_tokenizer, languages_of, load_tokenizer
from .towers import blocks_of, check_training, example_inputs
from .vocabulary import transfer_vocabulary

__all__ = [
    "backbone_config",
    "check_fit",
    "check_language",
    "fit_positions",
    "known_backbones",
    "load_decoder",
    "load_text_encoder",
    "load_tokenizer",
    "load_vision_tower",
    "meta_model",
]

_log = logging.getLogger(__name__)
# Encoders that count positions from the one after their padding id, and are BERT's but for that.
_ROBERTA = ("roberta", "xlm-roberta", "camembert")


# --------------------------------------------------------------------------------------------------------------------
# Names


@cache
def known_backbones() -> dict[str, dict[str, Any]]:
    """Returns `parameters` (millions, as published) and `config` of the backbones that can be planned with offline."""
    return yaml.safe_load(Path(__file__).with_name("backbones.yaml").read_text(encoding="utf-8"))


def backbone_config(name: str) -> PreTrainedConfig:
    """Returns the configuration of a backbone; of CLIP and its kin that of their image tower.

    A well-known one that is not on this machine is described by `known_backbones`, which is enough to plan with.

    Raises:
        ValueError: If it is neither here nor well known.
    """
    try:
        config = find_backbone(name, lambda: AutoConfig.from_pretrained(name))
    except ValueError:
        if name not in known_backbones():
            raise
        values = dict(known_backbones()[name]["config"])
        return AutoConfig.for_model(values.pop("model_type"), **values)
    if config.model_type == "m3fm":
        raise ValueError(f"{name!r} is a whole M3FM checkpoint, no backbone: to go on from it, name it as `base`.")
    config = getattr(config, "vision_config", config)
    if "siglip" in config.model_type:
        config.vision_use_head = False  # pools the image, which the study pooling does here
    return config


def meta_model(config: PreTrainedConfig, auto_class: Any = AutoModel) -> PreTrainedModel:
    """Builds a backbone on the meta device: its shapes and parameters, without memory for them."""
    with torch.device("meta"):
        return auto_class.from_config(copy.deepcopy(config)).eval()


def _load(auto_class: Any, name: str, config: PreTrainedConfig) -> PreTrainedModel:
    """Loads weights in float32; refuses a checkpoint that lacks some, which transformers would leave random."""
    try:
        model, info = auto_class.from_pretrained(
            name, config=config, dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
    except OSError as error:
        raise ValueError(
            f"Backbone {name!r} has no weights as safetensors: expected model.safetensors beside its config.json. "
            "Where it is trusted, load it once with transformers and save_pretrained it into a folder."
        ) from error
    # Poolers are dropped.
    missing = sorted(key for key in info["missing_keys"] if "pooler" not in key.split("."))
    if missing:
        raise ValueError(
            f"Backbone {name!r} lacks {len(missing)} weights of {type(model).__name__} ({', '.join(missing[:3])}"
            f"{', ...' if len(missing) > 3 else ''}): expected a checkpoint of this architecture."
        )
    return model


# --------------------------------------------------------------------------------------------------------------------
# Before the first step


def check_fit(
    *,
    model: Mapping[str, Any] | None = None,
    vision_model: str = "",
    size: tuple[int, int] | None = None,
    text_encoder: str = "",
    decoder: str = "",
    vocab_size: int | None = None,
    training: Mapping[str, str] | None = None,
    prompt: int = 0,
    report: int = 0,
) -> None:
    """Refuses backbones that do not fit each other or their recipe; reads configurations alone.

    Args:
        model: The recipe's values of `M3FMConfig`.
        vision_model: Folder or name of the image tower; "" is not checked.
        size: Height and width of the images that it will see.
        text_encoder: Folder or name of the text encoder; "": a new one, made from `model.text_encoder_config`.
        decoder: Folder or name of the decoder; "": a new one, made from `model.text_config`.
        vocab_size: Ids of the tokenizer.
        training: Modes by the recipe's name for them: `vision_training`, `text_training`, `decoder_training`.
        prompt: Decoder positions before a report.
        report: Most tokens of a report, its end included; 0: nothing is written.

    Raises:
        ValueError: With what to change.
    """
    values = dict(model or {})
    training = dict(training or {})
    if vision_model and size is not None:
        check_vision(backbone_config(vision_model), vision_model, *size)
    for name, part, key, mode, auto_class in (
        (vision_model, "vision_model", "vision_config", "vision_training", AutoModel),
        (text_encoder, "text_encoder", "text_encoder_config", "text_training", AutoModel),
        (decoder, "decoder", "text_config", "decoder_training", AutoModelForCausalLM),
    ):
        if name and values.get(key):
            raise ValueError(
                f"`model.{key}` describes a new network and `{part}` names a pretrained one, {name!r}: leave one out."
            )
        if not name and values.get(key):
            _check_new(values[key], f"model.{key}", vocab_size)
        if name and part == "text_encoder":
            check_text_encoder(backbone_config(name), name)
        if name and part == "decoder":
            check_decoder(backbone_config(name), name)
        if mode in training:
            _check_mode(training[mode], mode, name, part, auto_class)
    if report:
        config = backbone_config(decoder) if decoder else _new_config(values.get("text_config"), "llama")
        check_positions(config, decoder or "model.text_config", prompt, report)


def _check_mode(mode: str, where: str, name: str, part: str, auto_class: Any) -> None:
    """Refuses a mode that a pretrained part cannot have, and any but "full" for a new one, named ""."""
    if name:
        check_training(mode, len(blocks_of(meta_model(backbone_config(name), auto_class))[1]), where)
    elif mode != "full":
        raise ValueError(
            f"`{where}` is {mode!r} and the {part.replace('_', ' ')} is new: nothing in it is learned yet. Set it to "
            f'"full", or name a pretrained `{part}`.'
        )


def _new_config(values: Any, default_type: str) -> PreTrainedConfig:
    if isinstance(values, PreTrainedConfig):
        return values
    values = dict(values or {})
    return AutoConfig.for_model(values.pop("model_type", default_type), **values)


def _check_new(values: Any, where: str, vocab_size: int | None) -> None:
    """Refuses a new network whose heads do not divide its width, or that has too few token embeddings."""
    values = dict(values) if isinstance(values, Mapping) else values.to_dict()
    width, heads = values.get("hidden_size"), values.get("num_attention_heads")
    if width and heads and width % heads and not values.get("head_dim"):
        raise ValueError(f"`{where}` has hidden_size {width}, which its {heads} num_attention_heads do not divide.")
    rows = values.get("vocab_size")
    if rows and vocab_size and rows < vocab_size:
        raise ValueError(f"`{where}.vocab_size` is {rows} and the tokenizer has {vocab_size} ids: set it to that.")


# --------------------------------------------------------------------------------------------------------------------
# Image towers


def load_vision_tower(name: str, height: int, width: int) -> PreTrainedModel:
    """Loads a ViT-like image tower, its positions resampled to the images that it will see.

    Args:
        name: Folder or name of a tower, or of a CLIP-like model, of which the tower is taken.
        height: Pixels.
        width: Pixels.

    Raises:
        ValueError: If there is none, or it makes no row of tokens of such images.
    """
    config = backbone_config(name)
    check_vision(config, name, height, width)
    tower = _without_pooler(_load(AutoModel, name, config))
    fit_positions(tower, height, width)
    return tower


def check_vision(config: PreTrainedConfig, name: str, height: int, width: int) -> None:
    """Refuses an image tower that makes no tokens (B, S, C) of images of a size.

    Raises:
        ValueError: With what to change.
    """
    patch = getattr(config, "patch_size", None)
    if isinstance(patch, int) and (height % patch or width % patch):
        near = max(patch, round(height / patch) * patch)
        raise ValueError(
            f"Images of {height} x {width} pixels do not divide into the patches of {name!r}, {patch} x {patch}: "
            f"set `processor.size` to a multiple of {patch}, as {near}."
        )
    config = copy.deepcopy(config)
    if height == width and isinstance(getattr(config, "image_size", None), int):
        config.image_size = height
    try:
        tower = meta_model(config)
        if tower.main_input_name != "pixel_values":
            raise ValueError(f"{type(tower).__name__} reads {tower.main_input_name}")
        states = tower(**example_inputs(tower, height, width)).last_hidden_state
    except (ValueError, RuntimeError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(
            f"{name!r} ({config.model_type}) takes no images of {height} x {width} pixels: {error}. Expected a "
            "ViT-like tower, as DINOv2, ViT, CLIP or SigLIP, and `processor.size` a square that it takes."
        ) from None
    if states.dim() != 3 or states.shape[-1] != getattr(config, "hidden_size", None):
        raise ValueError(
            f"{name!r} ({config.model_type}) makes a map of shape {tuple(states.shape)}, not a row of tokens of the "
            "width in its configuration: expected a ViT-like tower, as DINOv2, ViT, CLIP or SigLIP, and no "
            "convolutional network."
        )


@torch.no_grad()
def fit_positions(tower: PreTrainedModel, height: int, width: int) -> None:
    """Resamples a ViT's table of positions to square images of the size it will see.

    A tower would do so at every step, or take no other size than its own; done once, a checkpoint of DINOv2 keeps 256
    positions instead of 1,369. Towers that cannot resample theirs are left alone.
    """
    old = getattr(tower, "embeddings", None)
    own_size = getattr(getattr(tower, "config", None), "image_size", None)
    if not hasattr(old, "interpolate_pos_encoding") or height != width or not isinstance(own_size, int):
        return
    name = next((key for key in ("position_embeddings", "position_embedding.weight") if key in old.state_dict()), None)
    if name is None:
        return
    table = old.state_dict()[name]
    patch = tower.config.patch_size
    others = table.shape[-2] - (own_size // patch) ** 2  # class tokens
    places = table.new_zeros(1, others + (height // patch) ** 2, table.shape[-1])
    resampled = old.interpolate_pos_encoding(places, height, width).reshape(*table.shape[:-2], -1, table.shape[-1])
    tower.config.image_size = height
    # Built anew, because towers note the size in several places.
    new = type(old)(tower.config).to(table.device, table.dtype).train(old.training)
    new.load_state_dict({**old.state_dict(), name: resampled})
    for weight, before in zip(new.parameters(), old.parameters(), strict=True):
        weight.requires_grad_(before.requires_grad)
    tower.embeddings = new


# --------------------------------------------------------------------------------------------------------------------
# Text


def load_text_encoder(name: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Loads a pretrained text encoder, with the vocabulary of `tokenizer` in place of its own.

    RoBERTa's kind become BERT's where the padding id changes: they are the same but for counting positions from it.

    Raises:
        ValueError: If there is none, it is no encoder, or its own tokenizer cannot spell one of the languages.
    """
    config = backbone_config(name)
    check_text_encoder(config, name)
    own = _own_tokenizer(name, tokenizer)
    encoder = _without_pooler(_load(AutoModel, name, config))
    _log.info("vocabulary of %s: %s", name, transfer_vocabulary(encoder, own, tokenizer))
    if config.model_type in _ROBERTA and own.pad_token_id != tokenizer.pad_token_id:
        encoder = _as_bert(encoder, own.pad_token_id)
    return encoder


def load_decoder(name: str, tokenizer: PreTrainedTokenizerBase, num_placeholders: int) -> PreTrainedModel:
    """Loads a pretrained causal language model, with the vocabulary of `tokenizer` in place of its own.

    Args:
        name: Folder or name.
        tokenizer: Of the model that it becomes a part of.
        num_placeholders: Positions before a report, the language token among them.

    Raises:
        ValueError: If there is none, it is no decoder that takes embeddings, it has too few positions, or its own
            tokenizer cannot spell one of the languages.
    """
    config = backbone_config(name)
    check_decoder(config, name)
    check_positions(config, name, num_placeholders, report=1)
    own = _own_tokenizer(name, tokenizer)
    decoder = _load(AutoModelForCausalLM, name, config)
    _log.info("vocabulary of %s: %s", name, transfer_vocabulary(decoder, own, tokenizer))
    return decoder


def check_text_encoder(config: PreTrainedConfig, name: str) -> None:
    """Refuses a configuration that is not that of a text encoder, by which tokens see both sides.

    Raises:
        ValueError: With what to take.
    """
    if type(config) not in MODEL_FOR_MASKED_LM_MAPPING or config.is_encoder_decoder:
        raise ValueError(
            f"{name!r} ({config.model_type}) is no text encoder: expected one that was pretrained by masking, as "
            "BERT, XLM-RoBERTa or ModernBERT."
        )


def check_decoder(config: PreTrainedConfig, name: str) -> None:
    """Refuses a configuration that is not that of a causal language model which takes embeddings.

    Raises:
        ValueError: With what to take.
    """
    causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and not config.is_encoder_decoder
    if causal and (type(config) not in MODEL_FOR_MASKED_LM_MAPPING or getattr(config, "is_decoder", False)):
        takes = inspect.signature(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].forward).parameters
        if {"inputs_embeds", "past_key_values", "logits_to_keep"} <= takes.keys():
            return
    raise ValueError(
        f"{name!r} ({config.model_type}) is no decoder that this model can write with: expected a causal language "
        "model which takes embeddings, as Llama, Qwen3 or GPT-2."
    )


def check_positions(config: PreTrainedConfig, name: str, prompt: int, report: int) -> None:
    """Refuses a decoder that has no positions for a prompt and a report of so many tokens, its end included.

    Raises:
        ValueError: With the longest report that fits.
    """
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and prompt + report > positions:
        raise ValueError(
            f"Decoder {name!r} has {positions} positions, and a prompt of {prompt} tokens with a report of {report} "
            f"takes {prompt + report}: set `max_text_length` to {max(0, positions - prompt)} at most, or take a "
            "decoder with more positions."
        )


def _own_tokenizer(name: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    own = find_tokenizer(name)
    for language in languages_of(tokenizer):
        check_language(own, language, name)
    return own


def _as_bert(encoder: PreTrainedModel, old_pad: int) -> PreTrainedModel:
    """Returns BERT with the weights of an encoder of RoBERTa's kind, whose positions begin after `old_pad`."""
    values = encoder.config.to_dict()
    values["max_position_embeddings"] -= old_pad + 1
    config = AutoConfig.for_model("bert", **{key: values[key] for key in values if key != "model_type"})
    weights = encoder.state_dict()
    name = "embeddings.position_embeddings.weight"
    weights[name] = weights[name][old_pad + 1 :]
    bert = _without_pooler(AutoModel.from_config(config))
    bert.load_state_dict(weights)
    return bert.eval()
