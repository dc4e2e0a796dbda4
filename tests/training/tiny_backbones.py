# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Folders of tiny random backbones with tokenizers of the kinds that real ones have, trained on finding phrases."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedTokenizerFast

from m3fm.data import finding_table

TOWER = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
VISION = {**TOWER, "image_size": 28, "patch_size": 14}


@cache
def phrases() -> tuple[str, ...]:
    """Returns the phrases of the package's findings, in all languages."""
    return tuple(
        text
        for finding in finding_table().values()
        for by_language in (finding.present, finding.absent)
        for texts in by_language.values()
        for text in texts
    )


@cache
def byte_level(size: int = 700) -> PreTrainedTokenizerFast:
    """Returns a tokenizer of Qwen's kind: bytes as characters, no beginning of text."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(phrases(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=special[0], eos_token=special[1])


@cache
def metaspace(size: int = 600) -> PreTrainedTokenizerFast:
    """Returns a tokenizer of XLM-RoBERTa's kind: normalized text, spaces marked, <s> and </s> around a text."""
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=size,
        special_tokens=special,
        unk_token="<unk>",
        initial_alphabet=[chr(code) for code in range(0x21, 0x7F)],
        max_piece_length=8,
        show_progress=False,
    )
    backend.train_from_iterator(phrases(), trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    names = ("bos_token", "pad_token", "eos_token", "unk_token", "mask_token")
    roles = dict(zip(names, special, strict=True)) | {"cls_token": "<s>", "sep_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **roles)


@cache
def word_piece(chinese: bool = True, size: int = 700) -> PreTrainedTokenizerFast:
    """Returns a tokenizer of BERT's kind."""
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=False)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    texts = [text for text in phrases() if chinese or text.isascii()]
    backend.train_from_iterator(
        texts, trainers.WordPieceTrainer(vocab_size=size, special_tokens=special, show_progress=False)
    )
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    return PreTrainedTokenizerFast(tokenizer_object=backend, **dict(zip(names, special, strict=True)))


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "bert": word_piece,
    "xlm-roberta": metaspace,
    "modernbert": byte_level,
    "llama": byte_level,
    "qwen3": byte_level,
    "gpt2": byte_level,
}


def save_text(folder: Path, model_type: str, tokenizer: PreTrainedTokenizerFast | None = None, **values: Any) -> Path:
    """Saves a random text encoder or decoder with its tokenizer, as if it were pretrained; returns its folder."""
    tokenizer = tokenizer or TOKENIZERS[model_type]()
    roles = ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")
    ids = {role: getattr(tokenizer, role) for role in roles}
    if model_type == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 3, "n_head": 2, "n_positions": 64}
    else:
        sizes = {**TOWER, "max_position_embeddings": 64}
    if model_type in ("llama", "qwen3"):
        sizes |= {"num_key_value_heads": 2, "head_dim": 16}
    # Models have more rows than their tokenizers have ids, now and then.
    config = AutoConfig.for_model(model_type, **{**sizes, **ids, "vocab_size": len(tokenizer) + 3, **values})
    torch.manual_seed(0)
    causal = model_type in ("llama", "qwen3", "gpt2")
    (AutoModelForCausalLM if causal else AutoModel).from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_vision(folder: Path, model_type: str, **values: Any) -> Path:
    """Saves a random image tower; returns its folder."""
    torch.manual_seed(0)
    AutoModel.from_config(AutoConfig.for_model(model_type, **{**VISION, **values})).save_pretrained(folder)
    return folder
