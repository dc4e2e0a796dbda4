# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Read the rules by which a text is compared with its translation: one YAML file a language, and one for all.

The files are in `check_rules/` and say themselves what each key means. A file is checked as a whole when it is read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from ...evaluation.vocabulary import Vocabulary
from ..labels import FINDINGS

__all__ = ["ASPECTS", "LanguageRules", "SharedRules", "load_rules", "load_shared_rules"]

_FOLDER = Path(__file__).with_name("check_rules")
#: What phrases may state, and what of it; "ignored" phrases only look like it.
ASPECTS: dict[str, tuple[str, ...] | None] = {
    "side": ("left", "right", "both", "loose"),
    "degree": ("slight", "moderate", "severe", "small", "large", "loose"),
    "negation": ("negated", "loose"),
    "abnormality": ("affirmed", "named"),
    "mask": ("mask",),
    "unit": None,
    "term": None,
}
_IGNORED = "ignored"
_SHARED = (
    "families",
    "unchecked",
    "denied_by_name",
    "degrees_near",
    "length_ratio",
    "length_slack",
    "repeats",
    "repeated_characters",
)
_SHARED += ("units",)
_PLAIN = ("language", "word_start", "word_end", "sentence_break", "sentence_closed", "full_stop", "joiner")
_PATTERNS = ("own_script", "foreign_word", "number", "number_joiner", "may_be_two", "clause_break")
_LISTS = ("known_words", "not_numbers")


@dataclass(frozen=True)
class LanguageRules:
    """The rules of one language, compiled.

    Attributes:
        language: Language code.
        sentence_break: Matches between two sentences.
        sentence_closed: Matches the end of a text that has its full stop.
        full_stop: What a sentence without an end gets.
        joiner: What stands between two sentences.
        aspects: Aspect to the phrases that state it; a phrase that only looks like one means None.
        own_script: Matches a character of the language's own script.
        foreign_word: Matches a word that the language itself does not write.
        known_words: Matches the foreign words that its reports use.
        clause_break: Matches between two clauses, over which no denial reaches.
        number: Matches a number, in digits (group "digits") or in words (group "words").
        number_joiner: Matches between two numbers of one size or range.
        not_numbers: Matches what has a number in its name.
        may_be_two: Matches a word for both, which the other language may count.
        number_words: Word of a number to its value.
        numerals: Single characters of numerals to their values, for languages that build numbers of them.
        speaks_of: Finding to what may stand for it here, though the labeler does not read it so.
    """

    language: str
    sentence_break: re.Pattern[str]
    sentence_closed: re.Pattern[str]
    full_stop: str
    joiner: str
    aspects: Mapping[str, Vocabulary[str | None]]
    own_script: re.Pattern[str]
    foreign_word: re.Pattern[str]
    known_words: re.Pattern[str]
    clause_break: re.Pattern[str]
    number: re.Pattern[str]
    number_joiner: re.Pattern[str]
    not_numbers: re.Pattern[str]
    may_be_two: re.Pattern[str]
    number_words: Mapping[str, float]
    numerals: Mapping[str, int]
    speaks_of: Mapping[str, re.Pattern[str]]


@dataclass(frozen=True)
class SharedRules:
    """The rules that hold for every language.

    Attributes:
        families: Findings of which one may stand for another, as one language has a word that the other has not.
        unchecked: Findings that the two labelers are known not to read alike.
        denied_by_name: Findings that reports deny by their own name, and not by what is normal.
        degrees_near: Degree to those that may stand for it.
        length_ratio: Characters of Chinese for one of English: least and most.
        length_slack: So many characters more or fewer are always right: a short text has no ratio.
        repeats: A piece of text that follows upon itself so often is a loop.
        repeated_characters: The least length of such a piece.
        units: Unit to what it measures and how much of its base unit it is.
    """

    families: tuple[frozenset[str], ...]
    unchecked: frozenset[str]
    denied_by_name: frozenset[str]
    degrees_near: Mapping[str, frozenset[str]]
    length_ratio: tuple[float, float]
    length_slack: int
    repeats: int
    repeated_characters: int
    units: Mapping[str, tuple[str, float]]


@cache
def load_rules(language: str) -> LanguageRules:
    """Return the rules of a language.

    Raises:
        ValueError: For a language without rules, or a malformed file.
    """
    names = sorted(path.stem for path in _FOLDER.glob("*.yaml") if path.stem != "shared")
    if language not in names:
        raise ValueError(f"language must be one of {', '.join(names)}, got {language!r}")
    file, content = _read(language, (*_PLAIN, *_PATTERNS, *_LISTS, "number_words", "numerals", "speaks_of", *ASPECTS))
    bounds = content["word_start"], content["word_end"]
    return LanguageRules(
        language=content["language"],
        sentence_break=_compiled(file, "sentence_break", content["sentence_break"]),
        sentence_closed=_compiled(file, "sentence_closed", content["sentence_closed"]),
        full_stop=content["full_stop"],
        joiner=content["joiner"],
        aspects={
            # A unit may touch its number: "8mm".
            name: _vocabulary(file, name, content[name], values, ("" if name == "unit" else bounds[0], bounds[1]))
            for name, values in ASPECTS.items()
        },
        **{name: _compiled(file, name, content[name]) for name in _PATTERNS},
        **{name: _compiled(file, name, "|".join(content[name]) or r"(?!)") for name in _LISTS},
        number_words={str(word): float(value) for word, value in content["number_words"].items()},
        numerals={str(word): int(value) for word, value in content["numerals"].items()},
        speaks_of={
            name: _compiled(file, f"speaks_of.{name}", "|".join(patterns))
            for name, patterns in _known(file, content["speaks_of"]).items()
        },
    )


@cache
def load_shared_rules() -> SharedRules:
    """Return the rules of all languages.

    Raises:
        ValueError: For a malformed file.
    """
    file, content = _read("shared", _SHARED)
    groups = [content["unchecked"], content["denied_by_name"], *content["families"]]
    _known(file, dict.fromkeys(name for family in groups for name in family))
    return SharedRules(
        families=tuple(frozenset(family) for family in content["families"]),
        unchecked=frozenset(content["unchecked"]),
        denied_by_name=frozenset(content["denied_by_name"]),
        degrees_near={name: frozenset(near) for name, near in content["degrees_near"].items()},
        length_ratio=(float(content["length_ratio"][0]), float(content["length_ratio"][1])),
        length_slack=int(content["length_slack"]),
        repeats=int(content["repeats"]),
        repeated_characters=int(content["repeated_characters"]),
        units={name: (str(kind), float(size)) for name, (kind, size) in content["units"].items()},
    )


def _read(name: str, keys: tuple[str, ...]) -> tuple[str, dict[str, Any]]:
    path = _FOLDER / f"{name}.yaml"
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    if set(content) != set(keys):
        raise ValueError(f"{path.name}: expected the keys {sorted(keys)}, got {sorted(content)}")
    return path.name, content


def _known(file: str, entries: dict[str, Any]) -> dict[str, Any]:
    for name in entries:
        if name not in FINDINGS:
            raise ValueError(f"{file}: {name!r} is not a canonical finding")
    return entries


def _compiled(file: str, key: str, pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{file}: {key}: {pattern!r} is no regular expression: {error}") from error


def _vocabulary(
    file: str, aspect: str, entry: dict[str, list[str]], values: tuple[str, ...] | None, bounds: tuple[str, str]
) -> Vocabulary[str | None]:
    phrases: list[tuple[str, str | None]] = []
    for value, patterns in entry.items():
        if values is not None and value not in (*values, _IGNORED):
            raise ValueError(f"{file}: {aspect}: expected {', '.join((*values, _IGNORED))}, got {value!r}")
        for pattern in patterns:
            _compiled(file, f"{aspect}.{value}", pattern)
            phrases.append((pattern, None if value == _IGNORED else value))
    return Vocabulary(phrases, *bounds)
