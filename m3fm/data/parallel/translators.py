# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""What translates: any callable that takes texts and returns as many, or a translation model in a local folder."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Translator", "as_translator", "load_translator", "transformers_translator"]

#: What translates: texts in, as many texts out, in their order.
Translate = Callable[[Sequence[str]], Sequence[str]]
_WEIGHTS = ("*.safetensors",)
_SETTINGS = ("config.json", "generation_config.json", "tokenizer*.json", "vocab*", "*.spm", "*.model", "*.jinja")


@dataclass(frozen=True)
class Translator:
    """Name what translates.

    Attributes:
        name: Stands for all that its translations depend on, and is kept with them: under one name, a text is
            translated once and for all.
        translate: Texts in, as many texts out, in their order.
    """

    name: str
    translate: Translate = field(repr=False)

    def __call__(self, texts: Sequence[str]) -> Sequence[str]:
        """Translate texts."""
        return self.translate(texts)


def as_translator(translator: Translate, name: str | None = None) -> Translator:
    """Name a callable: as told, or by its attribute `name`, or by where it is defined.

    Raises:
        ValueError: If it cannot be called, or has no name that would tell it from others.
    """
    if not callable(translator):
        raise ValueError(f"a translator is called with texts and returns texts; got {type(translator).__name__}")
    if isinstance(translator, Translator) and name is None:
        return translator
    name = name or getattr(translator, "name", None)
    if name is None:
        module, place = getattr(translator, "__module__", None), getattr(translator, "__qualname__", None)
        name = f"{module}:{place}" if module and place and "<lambda>" not in place else None
    if not isinstance(name, str) or not name.strip():
        raise ValueError(
            "this translator has no name of its own, and its results could be taken for another's; give it a name"
        )
    return Translator(name, translator)


def load_translator(place: str) -> Translator:
    """Return the translator that stands in a module, as the command line names it: "package.module:callable".

    The module is imported, which runs its code: name only what you would run. A `Translator` keeps its own name;
    another callable is called by its place.

    Raises:
        ValueError: If the text is not of that form, or there is no such module or callable.
    """
    module_name, _, attribute = place.partition(":")
    parts = [*module_name.split("."), *attribute.split(".")]
    if not all(part.isidentifier() for part in parts):
        raise ValueError(f"expected a translator as 'package.module:callable', got {place!r}")
    try:
        found = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # The module is there, and misses one of its own.
        raise ValueError(f"{place!r}: no module named {error.name!r} can be imported") from None
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ValueError(f"{place!r}: {module_name} has no {attribute!r}")
        found = getattr(found, part)
    return as_translator(found, None if isinstance(found, Translator) else place)


def transformers_translator(
    model_folder: str | Path,
    source_token: str | None = None,
    target_token: str | None = None,
    max_new_tokens: int = 512,
    num_beams: int = 1,
    device: str = "cpu",
) -> Translator:
    """Return a translator that runs a sequence-to-sequence model of transformers (Marian, M2M-100, NLLB, mBART, T5).

    Its name holds a hash of its weights and settings: another model in the same folder is another translator.

    Args:
        model_folder: A local folder, as `save_pretrained` writes it, with the weights as safetensors.
        source_token: What the tokenizer calls the source language ("en", "eng_Latn", "en_XX"); None where the model
            knows one direction alone, as Marian's do.
        target_token: What it calls the target language ("zh", "zho_Hans", "zh_CN").
        max_new_tokens: A translation ends here at the latest; the checks find what was cut off.
        num_beams: 1 is greedy.
        device: A torch device.

    Raises:
        ValueError: If the folder holds no such model, or its tokenizer does not know a language.
    """
    folder = Path(model_folder)
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise ValueError(f"{folder}: expected a folder with config.json and weights as safetensors")
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    model = AutoModelForSeq2SeqLM.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    model = model.eval().to(device)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if source_token is not None:
        tokenizer.src_lang = source_token
    options = {"max_new_tokens": max_new_tokens, "num_beams": num_beams, "do_sample": False}
    if target_token is not None:
        options["forced_bos_token_id"] = _language_id(tokenizer, target_token)
    longest = getattr(model.config, "max_position_embeddings", None) or tokenizer.model_max_length

    def translate(texts: Sequence[str]) -> list[str]:
        import torch

        batch = tokenizer(list(texts), return_tensors="pt", padding=True)
        if batch["input_ids"].shape[1] > longest:
            # Cut text would be translated in part, without a word of it.
            raise ValueError(
                f"a text of this batch has more than the {longest} tokens that the model takes; "
                "translate sentence by sentence"
            )
        batch = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
        with torch.inference_mode():
            tokens = model.generate(**batch, **options)
        return [text.strip() for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)]

    setup = {"source": source_token, "target": target_token, **options, "weights": _hash_model(folder)}
    digest = hashlib.sha256(json.dumps(setup, sort_keys=True).encode()).hexdigest()
    return Translator(f"{folder.resolve().name}@{digest[:12]}", translate)


def _language_id(tokenizer: Any, token: str) -> int:
    get = getattr(tokenizer, "get_lang_id", None)  # M2M-100 writes "__zh__" for "zh"
    try:
        number = get(token) if get else tokenizer.convert_tokens_to_ids(token)
    except KeyError:
        number = None
    if number is None or number == tokenizer.unk_token_id:
        raise ValueError(f"the tokenizer knows no language {token!r}")
    return int(number)


def _hash_model(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted({path for pattern in (*_WEIGHTS, *_SETTINGS) for path in folder.glob(pattern)}):
        with open(path, "rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
