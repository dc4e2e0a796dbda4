# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Whether a text is plainly in another language than it is said to be; what tells languages is in `languages.yaml`."""

import re
import unicodedata
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import yaml

__all__ = ["check_code", "is_other_language", "is_spaced"]

_CODE = re.compile(r"[a-z]{2,3}(-[a-z0-9]{2,8})?")
_WORD = re.compile(r"[^\W\d_]+")
# Fewer letters tell no script, and fewer little words no language.
_LEAST_LETTERS = 8
_LEAST_WORDS = 3
# So many times as many little words of another language as of its own, those that both have left out.
_MORE = 3
# Of what is longer, the beginning tells enough.
_READ = 4000
# Scripts without spaces between words.
_UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR")


def check_code(language: str) -> None:
    """Refuses what is no language code.

    Raises:
        ValueError: With the form that is expected.
    """
    if not isinstance(language, str) or not _CODE.fullmatch(language):
        raise ValueError(
            f"language: got {language!r}, expected a code like 'de' or 'zh-hant', in small letters (in YAML, 'no' in "
            "quotes)."
        )


def is_other_language(text: str, language: str) -> bool:
    """Tells whether a text is plainly not in a language: by its script, or by the little words of another language.

    Args:
        text: A report.
        language: Its code; what stands behind a hyphen does not count.
    """
    known = _languages()
    own = language.split("-")[0]
    if own not in known:
        return False
    text = text[:_READ]
    letters = Counter(_script(character) for character in text if character.isalpha())
    if letters.total() < _LEAST_LETTERS:
        return False
    if 2 * sum(letters[script] for script in known[own]["scripts"]) < letters.total():
        return True
    words = Counter(word.lower() for word in _WORD.findall(text))
    ours = set(known[own].get("words", ()))
    for each in known.values():
        theirs = set(each.get("words", ()))
        count = sum(words[word] for word in theirs - ours)
        if ours and count >= max(_LEAST_WORDS, _MORE * sum(words[word] for word in ours - theirs) + 1):
            return True
    return False


def is_spaced(texts: list[str]) -> bool:
    """Tells whether texts have spaces between words: then they are scored by words, else by characters."""
    letters = Counter(_script(character) for text in texts for character in text[:_READ] if character.isalpha())
    return 2 * sum(letters[script] for script in _UNSPACED) <= letters.total()


@cache
def _languages() -> dict[str, dict[str, Any]]:
    path = Path(__file__).with_suffix(".yaml")
    return yaml.safe_load(path.read_text(encoding="utf-8"))


@cache
def _script(character: str) -> str:
    return unicodedata.name(character, "").split(" ")[0]
