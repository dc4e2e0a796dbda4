# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Many phrases, each a regular expression with a meaning, found in a text in one pass.

The standard library tries the alternatives of an expression one after the other. Here only those are tried that can
start with the character at hand, which makes hundreds of phrases affordable.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

__all__ = ["Match", "Vocabulary", "bounded", "first_characters"]

Payload = TypeVar("Payload")

_ESCAPE_OR_CLASS = re.compile(r"(?s:\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|.)")
_QUANTIFIER = re.compile(r"[?*+]\??|\{\d*,?\d*\}\??")
_ZERO_WIDTH = ("(?=", "(?!", "(?<", r"\b", r"\B")


@dataclass(frozen=True)
class Match(Generic[Payload]):
    """One place where a phrase stands; several meanings where a phrase is listed several times."""

    start: int
    end: int
    meanings: tuple[Payload, ...]


class Vocabulary(Generic[Payload]):
    """Phrases with a meaning each: finds the places where one stands, leftmost first, the longest at a place.

    Only the phrases that can start with the character at hand are tried.

    Args:
        phrases: Regular expression and meaning.
        word_start: Regular expression of the place before a word; empty in languages without blanks.
        word_end: Of the place after a word.
    """

    def __init__(self, phrases: Sequence[tuple[str, Payload]], word_start: str, word_end: str):
        firsts = [first_characters(pattern) for pattern, _ in phrases]
        # Where the first characters are known, `scan` sees to the word start: a pattern that starts with a letter
        # fails sooner than one that starts with a boundary.
        self._phrases = [
            (re.compile(bounded(pattern, word_start if known is None else "", word_end)), meaning)
            for (pattern, meaning), known in zip(phrases, firsts, strict=True)
        ]
        self._unknown = [number for number, characters in enumerate(firsts) if characters is None]
        self._by_character: dict[str, list[int]] = {}
        for number, characters in enumerate(firsts):
            for character in characters or ():
                self._by_character.setdefault(character, []).append(number)
        self._candidates: dict[str, tuple[re.Pattern[str], list[tuple[re.Pattern[str], Payload]]]] = {}
        letters = "".join(sorted(filter(str.isalnum, self._by_character)))
        others = "".join(sorted(re.escape(character) for character in self._by_character if not character.isalnum()))
        classes = [
            f"{start}[{characters}]" for start, characters in ((word_start, letters), ("", others)) if characters
        ]
        self._starts = re.compile("(?s:.)" if self._unknown else "|".join(classes) or r"(?!)")

    def scan(self, text: str) -> list[Match[Payload]]:
        """Returns the matches in a text, in order, without overlap."""
        matches: list[Match[Payload]] = []
        end = 0
        for found in self._starts.finditer(text):
            start = found.start()
            if start >= end and (match := self._longest(text, start)) is not None:
                matches.append(match)
                end = match.end
        return matches

    def _longest(self, text: str, start: int) -> Match[Payload] | None:
        any_phrase, phrases = self._starting_with(text[start])
        if not any_phrase.match(text, start):
            return None
        best, meanings = start, []
        for phrase, meaning in phrases:
            if found := phrase.match(text, start):
                if found.end() > best:
                    best, meanings = found.end(), []
                if found.end() == best and meaning not in meanings:
                    meanings.append(meaning)
        return Match(start, best, tuple(meanings))

    def _starting_with(self, character: str) -> tuple[re.Pattern[str], list[tuple[re.Pattern[str], Payload]]]:
        if character not in self._candidates:
            numbers = sorted({*self._by_character.get(character, ()), *self._unknown})
            phrases = [self._phrases[number] for number in numbers]
            any_phrase = re.compile("|".join(phrase.pattern for phrase, _ in phrases) or r"(?!)")
            self._candidates[character] = any_phrase, phrases
        return self._candidates[character]


def bounded(pattern: str, word_start: str, word_end: str) -> str:
    """Puts word boundaries around each alternative of a pattern, where it starts or ends with what can be in a word.

    Args:
        pattern: Regular expression.
        word_start: Regular expression of the place before a word; empty in languages without blanks.
        word_end: Of the place after a word.
    """
    phrases = []
    for alternative in _alternatives(pattern):
        items = [item for item, _ in _items(alternative)]
        start = word_start if _in_word(items[0]) else ""
        end = word_end if _in_word(items[-1]) else ""
        phrases.append(f"{start}{alternative}{end}")
    return "|".join(phrases)


def first_characters(pattern: str) -> frozenset[str] | None:
    """Returns the characters that a match can start with; None where the pattern does not tell.

    Understands groups, alternatives, quantifiers and lookarounds. What starts with a class tells nothing.
    """
    characters: frozenset[str] = frozenset()
    for alternative in _alternatives(pattern):
        known = _first_of_sequence(alternative)
        if known is None:
            return None
        characters |= known
    return characters


def _first_of_sequence(sequence: str) -> frozenset[str] | None:
    characters: frozenset[str] = frozenset()
    for item, quantifier in _items(sequence):
        if item.startswith(_ZERO_WIDTH):
            continue
        if item.startswith("(?:"):
            known = first_characters(item[3:-1])
        elif item.startswith("\\"):
            known = None if item[1].isalnum() else frozenset(item[1])
        else:
            known = None if item[0] in "[.^$(" else frozenset(item)
        if known is None:
            return None
        characters |= known
        if not quantifier.startswith(("?", "*", "{0", "{,")):
            return characters
    return None


def _in_word(item: str) -> bool:
    return not item.startswith(_ZERO_WIDTH) and (item[0].isalnum() or item[0] in "([" or item in (r"\w", r"\d"))


def _items(sequence: str) -> Iterator[tuple[str, str]]:
    """Yields each character, escape, class or group with its quantifier."""
    position = 0
    while position < len(sequence):
        item = _item(sequence, position)
        position += len(item)
        quantifier = _QUANTIFIER.match(sequence, position)
        yield item, quantifier[0] if quantifier else ""
        position = quantifier.end() if quantifier else position


def _item(sequence: str, start: int) -> str:
    depth, position = 0, start
    while position < len(sequence):
        part = _ESCAPE_OR_CLASS.match(sequence, position)[0]  # type: ignore[index]
        depth += {"(": 1, ")": -1}.get(part, 0)
        position += len(part)
        if depth == 0:
            break
    return sequence[start:position]


def _alternatives(pattern: str) -> list[str]:
    """Splits at the `|` that are in no group."""
    parts, start, position = [], 0, 0
    while position < len(pattern):
        item = _item(pattern, position)
        if item == "|":
            parts.append(pattern[start:position])
            start = position + 1
        position += len(item)
    return [*parts, pattern[start:]]
