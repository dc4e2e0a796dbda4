# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""The one tokenizer of a model, which both towers and the decoder read: the shipped one, or that of a backbone."""

import json
from collections.abc import Callable, Sequence
from typing import TypeVar

from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..data import finding_table
from .tokenizer import IMAGE_TOKEN, UNMATCHABLE_SCORE

__all__ = ["check_language", "find_backbone", "find_tokenizer", "languages_of", "load_tokenizer"]

_Found = TypeVar("_Found")


def find_backbone(name: str, load: Callable[[], _Found]) -> _Found:
    """Returns what `load` finds by a name, by transformers' own rules.

    Raises:
        ValueError: If there is nothing, saying how to get it.
    """
    try:
        return load()
    except OSError as error:
        raise ValueError(
            f"No backbone {name!r} on this machine: expected a folder that save_pretrained wrote, or a name in the "
            f"Hugging Face cache. Where there is a network, `hf download {name} --local-dir FOLDER` gets it; carry "
            "the folder here, and give its path in place of the name."
        ) from error


def find_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Returns the tokenizer of a backbone as it is.

    Raises:
        ValueError: If there is none with a tokenizer.json.
    """

    def load() -> PreTrainedTokenizerBase:
        try:
            return AutoTokenizer.from_pretrained(name)
        except (ValueError, KeyError, ImportError) as error:
            raise ValueError(f"{name!r} has no tokenizer: expected a tokenizer.json beside its weights.") from error

    tokenizer = find_backbone(name, load)
    if not tokenizer.is_fast:
        raise ValueError(f"Tokenizer {name!r} is not of the fast kind: expected one that has a tokenizer.json.")
    return tokenizer


def load_tokenizer(name: str, languages: Sequence[str]) -> tuple[PreTrainedTokenizerBase, int, dict[str, int]]:
    """Loads the tokenizer of a model: one for both towers and the decoder.

    What a pretrained one lacks is added: the image's place, a token for each language, padding and an end of text. No
    text gives a special token, and none is put around a text: prompts are built from ids.

    Args:
        name: Folder or name of a tokenizer, or of a model that has one.
        languages: Codes, as "en" and "zh".

    Returns:
        The tokenizer, the id of the image's place, and the id of each language's token.

    Raises:
        ValueError: If there is none, it has no tokenizer.json, or it cannot spell one of the languages.
    """
    source = find_tokenizer(name)
    for language in languages:
        check_language(source, language, name)
    end = source.eos_token or source.sep_token or "</s>"
    # One id cannot both end a text, which is learned, and fill up what is behind it, which is not.
    pad = source.pad_token if source.pad_token not in (None, end) else "<pad>"
    backend = _unmatched_special_tokens(source.backend_tokenizer)
    if source("").input_ids:
        backend.post_processor = processors.Sequence([])
    # Not of the class of the source: many of those put special tokens around a text anew when they are loaded.
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=pad,
        unk_token=source.unk_token,
        bos_token=source.bos_token,
        eos_token=end,
        extra_special_tokens={"image_token": IMAGE_TOKEN, **{f"{code}_token": f"<|{code}|>" for code in languages}},
        padding_side="right",
        model_max_length=source.model_max_length,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
    )
    ids = {code: tokenizer.convert_tokens_to_ids(f"<|{code}|>") for code in languages}
    return tokenizer, tokenizer.convert_tokens_to_ids(IMAGE_TOKEN), ids


def _unmatched_special_tokens(backend: Tokenizer) -> Tokenizer:
    """Keeps a Unigram model from finding its special tokens in a text, where XLM-RoBERTa's does find "</s>"."""
    special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    content = json.loads(backend.to_str())
    if content["model"]["type"] != "Unigram":
        return backend
    pieces = content["model"]["vocab"]
    if all(score <= UNMATCHABLE_SCORE for name, score in pieces if name in special):
        return backend
    content["model"]["vocab"] = [[name, UNMATCHABLE_SCORE if name in special else score] for name, score in pieces]
    return Tokenizer.from_str(json.dumps(content))


def languages_of(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Returns the codes of the languages that a tokenizer has a token for, by id."""
    codes = {number: name[2:-2] for name, number in tokenizer.get_vocab().items() if name.startswith("<|")}
    table = next(iter(finding_table().values())).present
    return [code for _, code in sorted(codes.items()) if code in table]


def check_language(
    tokenizer: PreTrainedTokenizerBase, language: str, name: str, texts: Sequence[str] | None = None
) -> None:
    """Refuses a tokenizer that cannot spell a language: by unknown pieces, or in more pieces than characters.

    Args:
        tokenizer: Of a backbone.
        language: Code.
        name: Of the backbone, for the message.
        texts: In that language; None: the phrases of the package's findings. A language without any is taken on trust.

    Raises:
        ValueError: If more than one piece in twenty is unknown, or there are 1.5 pieces a character or more.
    """
    if texts is None:
        table = finding_table().values()
        texts = [text for each in table for side in (each.present, each.absent) for text in side.get(language, ())]
    rows = tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []
    pieces, characters = sum(map(len, rows)), sum(map(len, texts))
    unknown = sum(piece == tokenizer.unk_token_id for row in rows for piece in row)
    if pieces and (unknown > 0.05 * pieces or pieces >= 1.5 * characters):
        raise ValueError(
            f"{name!r} does not know the language {language!r}: of {characters} characters its tokenizer makes "
            f"{pieces} pieces, {unknown} of them unknown. Take a multilingual one, or leave the language out."
        )
