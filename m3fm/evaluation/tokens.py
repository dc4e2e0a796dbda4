# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Split reports into the tokens that are scored.

Tokens are part of a score, so they are fixed here and not an option:

- "word" (English): lower-cased words; of the punctuation only the full stop is kept, as a token of its own, after the
  cleaning of R2Gen (Chen et al., EMNLP 2020) that the authors' release of M3FM follows. A number with a decimal point
  is one token, a hyphen separates words. With all punctuation kept, BLEU-4 of templated reports is about 0.02 higher.
- "character" (Chinese): single characters, punctuation included, white space left out, nothing else normalised.
- "jieba" (Chinese): words of jieba 0.42 with its own dictionary and its model for unknown words (`jieba.lcut`), cut
  from the text without its white space, so that a line break never decides where a word ends; punctuation included.

Words and characters give scores that cannot be compared: never put an English beside a Chinese number, or characters
beside jieba words.
"""

import re
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

#: Language to its tokenisations; the first is the primary one, whose scores carry no suffix.
TOKENIZATIONS: dict[str, tuple[str, ...]] = {"en": ("word",), "zh": ("character", "jieba")}
LANGUAGES = tuple(TOKENIZATIONS)

_ENGLISH_TOKEN = re.compile(r"\d+(?:\.\d+)+|\w+|\.")


def _cut_words(text: str) -> list[str]:
    return _ENGLISH_TOKEN.findall(text.lower())


def _cut_characters(text: str) -> list[str]:
    return list("".join(text.split()))


def _cut_jieba_words(text: str) -> list[str]:
    return list(_jieba_words("".join(text.split())))


# The slowest of all the steps of scoring, and a run scores the same reports in several pairings.
@lru_cache(maxsize=50_000)
def _jieba_words(text: str) -> tuple[str, ...]:
    return tuple(_jieba_tokenizer().lcut(text))


_CUTS: dict[str, Callable[[str], list[str]]] = {
    "word": _cut_words,
    "character": _cut_characters,
    "jieba": _cut_jieba_words,
}


@cache
def _jieba_tokenizer() -> Any:
    """Loads jieba's dictionary, once a process (about a second)."""
    try:
        import jieba
    except ImportError as error:
        raise ImportError('Chinese words need jieba: pip install "m3fm[evaluate]"') from error
    tokenizer = jieba.Tokenizer()
    # Left to itself, jieba reads its dictionary from a `jieba.cache` in the shared temporary folder, which anybody may
    # have written there, writes that file, and tells of it on stderr.
    tokenizer.FREQ, tokenizer.total = tokenizer.gen_pfdict(tokenizer.get_dict_file())
    tokenizer.initialized = True
    return tokenizer


def tokenize(text: str, tokenization: str) -> list[str]:
    """Splits a report by one tokenisation (see the module's text).

    Raises:
        ValueError: On an unknown tokenisation.
        ImportError: On "jieba" without that package.
    """
    if tokenization not in _CUTS:
        raise ValueError(f"Unknown tokenisation {tokenization!r}: expected one of {list(_CUTS)}.")
    return _CUTS[tokenization](text)


def tokenize_report(text: str, language: str) -> list[str]:
    """Splits a report by the primary tokenisation of its language.

    Raises:
        ValueError: On a language without a tokenisation.
    """
    check_language(language)
    return tokenize(text, TOKENIZATIONS[language][0])


def check_language(language: str) -> None:
    """Refuses a language that has no tokenisation.

    Raises:
        ValueError: Naming those that have one.
    """
    if language not in TOKENIZATIONS:
        raise ValueError(f"Unsupported language {language!r}: expected one of {list(LANGUAGES)}.")
