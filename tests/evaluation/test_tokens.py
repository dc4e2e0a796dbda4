# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
import logging
import os
import sys
import tempfile

import pytest

from m3fm.evaluation import tokens
from m3fm.evaluation.tokens import LANGUAGES, TOKENIZATIONS, tokenize, tokenize_report


@pytest.mark.parametrize(
    ("language", "text", "expected"),
    [
        (
            "en",
            "No Pleural-effusion, clear; 1.5 cm nodule.",
            ["no", "pleural", "effusion", "clear", "1.5", "cm", "nodule", "."],
        ),
        ("en", " ,;\n", []),
        ("zh", "双肺清晰， 未见CT 异常。", list("双肺清晰，未见CT异常。")),
        ("zh", "右肺\u3000上叶\r\n结节", list("右肺上叶结节")),
        ("zh", "", []),
    ],
)
def test_tokens_are_the_stated_ones(language, text, expected):
    assert tokenize_report(text, language) == expected


def test_the_primary_tokenisation_comes_first():
    assert LANGUAGES == ("en", "zh")
    for language, cuts in TOKENIZATIONS.items():
        assert tokenize_report("双肺 clear.", language) == tokenize("双肺 clear.", cuts[0])


def test_chinese_words_are_jieba_s_and_blind_to_white_space():
    pytest.importorskip("jieba")
    words = ["双肺", "未见", "明显", "异常", "。"]
    assert tokenize("双肺未见明显异常。", "jieba") == words
    assert tokenize(" 双肺未\n见明 显\u3000异常。", "jieba") == words
    assert tokenize("", "jieba") == tokenize(" \n", "jieba") == []
    assert "".join(tokenize("右肺上叶见１．５ｃｍ结节，CT值40HU", "jieba")) == "右肺上叶见１．５ｃｍ结节，CT值40HU"


def test_a_token_list_may_be_changed_by_its_owner():
    pytest.importorskip("jieba")
    tokenize("双肺清晰", "jieba").append("x")
    assert "x" not in tokenize("双肺清晰", "jieba")


def test_jieba_equals_its_own_default_and_leaves_no_file_and_no_word_behind(tmp_path, monkeypatch, capfd):
    jieba = pytest.importorskip("jieba")
    text = "胸廓对称，双肺纹理增多，右肺上叶见斑片状磨玻璃影，纵隔内未见肿大淋巴结。"
    tokens._jieba_tokenizer.cache_clear()
    tokens._jieba_words.cache_clear()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    cut = tokenize(text, "jieba")
    assert os.listdir(tmp_path) == []
    assert capfd.readouterr() == ("", "")
    jieba.setLogLevel(logging.ERROR)
    assert cut == jieba.Tokenizer().lcut(text)


@pytest.mark.parametrize(("call", "name"), [(tokenize, "words"), (tokenize_report, "fr")])
def test_unknown_names_are_refused(call, name):
    with pytest.raises(ValueError, match=f"{name!r}: expected one of"):
        call("clear", name)


def test_a_missing_jieba_is_named(monkeypatch):
    monkeypatch.setattr(tokens, "_jieba_tokenizer", tokens._jieba_tokenizer.__wrapped__)
    monkeypatch.setitem(sys.modules, "jieba", None)
    with pytest.raises(ImportError, match=r'pip install "m3fm\[evaluate\]"'):
        tokenize("不在缓存里的一句话", "jieba")
