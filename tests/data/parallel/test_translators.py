# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Translators by name, by place and from a model folder."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from m3fm.data.parallel import Translator, as_translator, load_translator, transformers_translator


def upper(texts: Sequence[str]) -> list[str]:
    return [text.upper() for text in texts]


def test_a_function_is_called_by_its_place() -> None:
    assert as_translator(upper).name.endswith("test_translators:upper")
    assert as_translator(upper, "mine")(["a"]) == ["A"]
    assert as_translator(upper, "mine").name == "mine"


def test_what_has_no_name_needs_one() -> None:
    for nameless in (lambda texts: texts, partial(upper)):
        with pytest.raises(ValueError, match="has no name of its own"):
            as_translator(nameless)
        assert as_translator(nameless, "mine").name == "mine"
    with pytest.raises(ValueError, match="got list"):
        as_translator(["a"])


def test_a_translator_by_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_translators.py").write_text(
        "from m3fm.data.parallel import Translator\n"
        "def plain(texts):\n    return list(texts)\n"
        "class Models:\n    zh = Translator('model@1', plain)\n"
    )
    (tmp_path / "broken_translators.py").write_text("import a_package_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)

    assert load_translator("my_translators:plain").name == "my_translators:plain"
    assert load_translator("my_translators:Models.zh").name == "model@1"
    with pytest.raises(ValueError, match="my_translators has no 'other'"):
        load_translator("my_translators:other")
    with pytest.raises(ValueError, match="no module named 'no_such_module'"):
        load_translator("no_such_module.sub:plain")
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_not_there"):
        load_translator("broken_translators:plain")


@pytest.mark.parametrize("place", ["plain", "module:", ":plain", "a b:c", "__import__('os'):system", "m:f()"])
def test_nothing_is_evaluated(place: str) -> None:
    with pytest.raises(ValueError, match="expected a translator as 'package.module:callable'"):
        load_translator(place)


@pytest.fixture
def model_folder(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=16,
        d_kv=8,
        d_ff=16,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=3,
    )
    folder = tmp_path / "tiny-t5"
    T5ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_model_in_a_folder(model_folder: Path) -> None:
    translator = transformers_translator(model_folder, max_new_tokens=5)

    texts = ["No effusion.", "The heart is of normal size and the lungs are clear."]
    both, alone = translator(texts), translator(texts[:1])

    assert len(both) == 2
    assert all(isinstance(text, str) for text in both)
    # Padding changes nothing.
    assert both[0] == alone[0]
    assert translator.name.startswith("tiny-t5@")


def test_its_name_tells_models_and_settings_apart(model_folder: Path) -> None:
    first = transformers_translator(model_folder, max_new_tokens=5)
    assert transformers_translator(model_folder, max_new_tokens=5).name == first.name
    assert transformers_translator(model_folder, max_new_tokens=6).name != first.name

    model = T5ForConditionalGeneration.from_pretrained(model_folder)
    with torch.no_grad():
        model.shared.weight[5] += 1
    model.save_pretrained(model_folder)
    assert transformers_translator(model_folder, max_new_tokens=5).name != first.name


def test_a_language_that_the_tokenizer_does_not_know(model_folder: Path) -> None:
    with pytest.raises(ValueError, match="the tokenizer knows no language 'zho_Hans'"):
        transformers_translator(model_folder, target_token="zho_Hans")


def test_a_text_that_is_too_long_is_not_cut(model_folder: Path) -> None:
    translator = transformers_translator(model_folder, max_new_tokens=2)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_folder)
    if tokenizer.model_max_length > 10_000:
        pytest.skip("this tokenizer states no greatest length")

    with pytest.raises(ValueError, match="translate sentence by sentence"):
        translator(["effusion " * (tokenizer.model_max_length + 1)])


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a folder with config.json and weights as safetensors"):
        transformers_translator(tmp_path)


def test_a_translator_is_a_translator() -> None:
    assert as_translator(Translator("x", upper)).name == "x"
