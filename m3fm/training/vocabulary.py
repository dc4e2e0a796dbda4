# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Gives a pretrained text model the vocabulary of another tokenizer.

Fast Vocabulary Transfer (Gee et al., EMNLP 2022 industry track, section 3): a piece that the old tokenizer has too
keeps its embedding; another gets the mean of the embeddings of the pieces that the old tokenizer spells it in.

Tokenizers mark a space in their own ways, so pieces are compared by the bytes of text that they stand for: " lung" is
"▁lung" to sentencepiece, "Ġlung" to a byte-level tokenizer, and "lung" to WordPiece, which marks what goes on
("##ung").
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Pieces", "Transfer", "transfer_vocabulary"]

SPACE_SYMBOL = "\u2581"
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
# Roles of special tokens, and which old role serves where the old tokenizer has none of that name: BERT's [CLS] and
# [SEP] begin and end a text; to GPT-2 and Qwen only the end has a token.
_ROLES = {
    "pad_token_id": ("pad_token_id",),
    "bos_token_id": ("bos_token_id", "cls_token_id", "eos_token_id"),
    "eos_token_id": ("eos_token_id", "sep_token_id"),
    "unk_token_id": ("unk_token_id",),
    "cls_token_id": ("cls_token_id", "bos_token_id", "eos_token_id"),
    "sep_token_id": ("sep_token_id", "eos_token_id"),
    "mask_token_id": ("mask_token_id",),
}


def _byte_characters() -> dict[int, str]:
    """Returns the character that byte-level tokenizers write for each byte (GPT-2: Radford et al., 2019)."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {byte: chr(byte) for byte in shown} | {byte: chr(256 + place) for place, byte in enumerate(hidden)}


_TO_CHARACTER = _byte_characters()
_TO_BYTE = {character: byte for byte, character in _TO_CHARACTER.items()}


@dataclass(frozen=True)
class Transfer:
    """What became of the pieces of a new vocabulary, as counts.

    Attributes:
        copied: Pieces that the old vocabulary has too, and special tokens of the same role.
        averaged: Pieces that got the mean of old ones.
        fresh: Pieces and special tokens that nothing old stands for: they start near the mean of all old ones.
    """

    copied: int
    averaged: int
    fresh: int

    def __str__(self) -> str:
        total = max(1, self.copied + self.averaged + self.fresh)
        shares = (f"{getattr(self, name) / total:.1%} {name}" for name in ("copied", "averaged", "fresh"))
        return f"{total} pieces: {', '.join(shares)}"


class Pieces:
    """The pieces of a tokenizer as the bytes of text that they stand for, and how it spells other bytes.

    Args:
        tokenizer: A fast one.

    Raises:
        ValueError: If it has no `tokenizer.json` behind it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(f"Expected a tokenizer that has a tokenizer.json, got {type(tokenizer).__name__}.")
        self.tokenizer = tokenizer
        self.backend = tokenizer.backend_tokenizer
        stages = json.loads(self.backend.to_str())
        marks = json.dumps([stages["pre_tokenizer"], stages["decoder"], stages["normalizer"]], ensure_ascii=False)
        model = stages["model"]["type"]
        self.by_bytes = '"ByteLevel"' in marks
        self.by_words = model == "WordPiece"
        # A tokenizer that leaves spaces as they are has none of the marks.
        self.space = SPACE_SYMBOL if SPACE_SYMBOL in marks else " "
        self.continues = stages["model"].get("continuing_subword_prefix") or "##"

    @cached_property
    def special(self) -> dict[int, str]:
        """Special tokens by id."""
        added = self.tokenizer.added_tokens_decoder.items()
        found = {number: token.content for number, token in added if token.special}
        return found | dict(zip(self.tokenizer.all_special_ids, self.tokenizer.all_special_tokens, strict=True))

    @cached_property
    def names(self) -> dict[int, str]:
        """Every piece as the tokenizer writes it, by id; special tokens too."""
        return {number: name for name, number in self.tokenizer.get_vocab().items()}

    @cached_property
    def byte_pieces(self) -> dict[int, bytes]:
        """Pieces for a single byte of a character that is no piece, by id."""
        if self.by_bytes or self.by_words:
            return {}
        matches = {number: _BYTE_PIECE.fullmatch(name) for number, name in self.names.items()}
        return {number: bytes.fromhex(match.group(1)) for number, match in matches.items() if match}

    @cached_property
    def texts(self) -> dict[int, bytes]:
        """The bytes that each piece stands for, by id; neither special tokens nor `byte_pieces`."""
        apart = self.special.keys() | self.byte_pieces.keys()
        return {number: self._text(name) for number, name in self.names.items() if number not in apart}

    @cached_property
    def ids(self) -> dict[bytes, int]:
        """The piece that stands for these bytes; of several the first."""
        return {text: number for number, text in sorted(self.texts.items(), reverse=True)}

    @cached_property
    def _byte_ids(self) -> dict[bytes, int]:
        return {text: number for number, text in self.byte_pieces.items()}

    def _text(self, name: str) -> bytes:
        if self.by_bytes and all(character in _TO_BYTE for character in name):
            return bytes(_TO_BYTE[character] for character in name)
        if self.by_words:
            if name.startswith(self.continues) and len(name) > len(self.continues):
                return name.removeprefix(self.continues).encode()
            # A word has a space before it where the script has spaces, and a sign or an ideograph has none.
            return (f" {name}" if name[:1].isalnum() and ord(name[0]) < 0x2E80 else name).encode()
        return name.replace(self.space, " ").encode()

    def spell(self, text: bytes, single_byte: bool) -> list[int]:
        """Returns the pieces that spell these bytes as a part of a longer text; none where they cannot be spelled.

        Args:
            text: Valid UTF-8, or the beginning or end of a character.
            single_byte: Whether it is a byte that stands for itself, as byte fallback has them.
        """
        if single_byte and text in self._byte_ids:
            return [self._byte_ids[text]]
        if text in self.ids:
            return [self.ids[text]]
        try:
            written = text.decode()
        except UnicodeDecodeError:
            if self.by_bytes:
                return self._tokenize("".join(_TO_CHARACTER[byte] for byte in text))
            parts = [self._byte_ids.get(bytes([byte])) for byte in text]
            return [] if None in parts else parts
        return self._tokenize(self._marked(written))

    def _marked(self, text: str) -> str:
        """Writes text as the tokenizer's model reads it: normalized, spaces marked, and none put before it."""
        body = text.lstrip(" ")
        lead = " " * (len(text) - len(body))
        if body and self.backend.normalizer is not None:
            body = self.backend.normalizer.normalize_str(body).lstrip(f" {SPACE_SYMBOL}") or body
        if self.by_bytes:
            return "".join(_TO_CHARACTER[byte] for byte in (lead + body).encode())
        return body if self.by_words else (lead + body).replace(" ", self.space)

    def _tokenize(self, marked: str) -> list[int]:
        if not marked:
            return []
        if self.by_words:
            # Words are parted before the model sees them. A part of a word is spelled like the word.
            tokens = self.backend.encode(marked, add_special_tokens=False).ids
        else:
            tokens = [token.id for token in self.backend.model.tokenize(marked)]
        return [number for number in tokens if number != self.tokenizer.unk_token_id]


def transfer_vocabulary(
    model: PreTrainedModel, old: PreTrainedTokenizerBase, new: PreTrainedTokenizerBase, seed: int = 0
) -> Transfer:
    """Gives a model the vocabulary of `new` in place of that of `old`: token embeddings and untied output layer.

    The vocabulary's size and its special ids in the model's configuration follow. To the same tokenizer nothing
    changes, but that rows without a token, which some models have at the end, are dropped.

    Args:
        model: A text encoder or a decoder, pretrained with `old`.
        old: Its own tokenizer.
        new: The tokenizer that it is to be used with.
        seed: Of the small differences between rows that nothing old stands for.

    Raises:
        ValueError: If the model has fewer rows than `old` has ids: then it is the tokenizer of another model.
    """
    table = model.get_input_embeddings()
    old_pieces, new_pieces = Pieces(old), Pieces(new)
    highest = max(old_pieces.names)
    if highest >= table.num_embeddings:
        raise ValueError(
            f"{type(model).__name__} has {table.num_embeddings} token embeddings and its tokenizer an id {highest}: "
            "expected the tokenizer that it was pretrained with, as a tokenizer.json beside its weights."
        )
    sources = _sources(old_pieces, new_pieces)
    known = torch.tensor(sorted(old_pieces.names))
    output = model.get_output_embeddings()
    layers = [table]
    if output is not None and output.weight is not table.weight:
        layers.append(output)
    for layer in layers:
        _replace_rows(layer, sources, known, seed)
    if output is not None and len(layers) == 1:
        output.weight, output.out_features = table.weight, table.num_embeddings
    if getattr(output, "bias", None) is not None:
        output.bias = nn.Parameter(_mean_rows(output.bias.detach()[:, None], sources, known, seed, noise=0.0)[:, 0])
    table.num_embeddings = len(table.weight)
    _update_config(model, new, len(table.weight))
    if table.padding_idx is not None:
        table.padding_idx = new.pad_token_id
    lengths = [len(parts) for parts in sources]
    return Transfer(lengths.count(1), sum(length > 1 for length in lengths), lengths.count(0))


def _sources(old: Pieces, new: Pieces) -> list[list[int]]:
    """Returns, for each new id, the old ids whose mean it becomes; none for a fresh one."""
    roles = _roles(old.tokenizer, new.tokenizer)
    old_special = {name: number for number, name in old.special.items()}
    same_marks = (old.by_bytes, old.by_words, old.space) == (new.by_bytes, new.by_words, new.space)
    old_ids: Mapping[str, int] = old.tokenizer.get_vocab()
    sources: list[list[int]] = [[] for _ in range(max(new.names) + 1)]
    for number, name in new.names.items():
        if number in new.special:
            source = roles.get(number, old_special.get(name))
            sources[number] = [] if source is None else [source]
        elif same_marks and old_ids.get(name) in old.texts.keys() | old.byte_pieces.keys():
            sources[number] = [old_ids[name]]
        elif number in new.byte_pieces:
            sources[number] = old.spell(new.byte_pieces[number], single_byte=True)
        else:
            sources[number] = old.spell(new.texts[number], single_byte=False)
    return sources


def _roles(old: PreTrainedTokenizerBase, new: PreTrainedTokenizerBase) -> dict[int, int]:
    roles: dict[int, int] = {}
    for role, alternatives in _ROLES.items():
        number = getattr(new, role)
        found = next((getattr(old, name) for name in alternatives if getattr(old, name) is not None), None)
        if number is not None and found is not None:
            roles.setdefault(number, found)
    return roles


def _replace_rows(layer: nn.Module, sources: list[list[int]], known: torch.Tensor, seed: int) -> None:
    rows = _mean_rows(layer.weight.detach(), sources, known, seed, noise=0.1)
    layer.weight = nn.Parameter(rows, requires_grad=layer.weight.requires_grad)
    if isinstance(layer, nn.Linear):
        layer.out_features = len(rows)


def _mean_rows(
    weight: torch.Tensor, sources: list[list[int]], known: torch.Tensor, seed: int, noise: float
) -> torch.Tensor:
    """Returns the rows (new V, H) as means of rows of `weight` (old V, H).

    A row without a source is the mean of all `known` rows, with noise of a share of their standard deviation.
    """
    lengths = torch.tensor([len(parts) for parts in sources])
    targets = torch.arange(len(sources)).repeat_interleave(lengths)
    parts = torch.tensor([part for each in sources for part in each], dtype=torch.long)
    rows = weight.new_zeros(len(sources), weight.shape[1], dtype=torch.float32)
    rows.index_add_(0, targets.to(weight.device), weight[parts.to(weight.device)].float())
    rows /= lengths.clamp(min=1)[:, None].to(weight.device)
    fresh = (lengths == 0).nonzero()[:, 0]
    if len(fresh):
        old = weight[known.to(weight.device)].float()
        drawn = torch.randn(len(fresh), weight.shape[1], generator=torch.Generator().manual_seed(seed))
        rows[fresh] = old.mean(dim=0) + noise * old.std(dim=0) * drawn.to(weight.device)
    return rows.to(weight.dtype)


def _update_config(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, size: int) -> None:
    config = model.config.get_text_config()
    config.vocab_size = size
    for module in (model, model.base_model):
        if hasattr(module, "vocab_size"):
            module.vocab_size = size
    for role in _ROLES:
        # Roles that a configuration has no field for (BERT's has none for its mask) stay the tokenizer's alone.
        if role in ("pad_token_id", "bos_token_id", "eos_token_id") or hasattr(config, role):
            setattr(config, role, getattr(tokenizer, role))
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        for role in ("pad_token_id", "bos_token_id", "eos_token_id"):
            setattr(generation, role, getattr(tokenizer, role))
