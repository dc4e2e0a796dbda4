# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""What one text states, in terms that any language has: numbers, sides, degrees, negation, findings."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from ...evaluation.finding_labeler import FindingMention, LabeledFinding, find_mentions, label_report
from .check_rules import ASPECTS, LanguageRules, SharedRules, load_rules, load_shared_rules

__all__ = ["Stated", "TextFacts", "read_facts", "repeated_piece"]

# A unit stands directly behind its number.
_MAX_GAP = 2
_PLAIN = "plain"
_ASPECTS = tuple(name for name in ASPECTS if name != "unit")
_NUMBER, _FOREIGN = "number", "foreign"
_MAX_SENTENCES = 1 << 16


@dataclass(frozen=True)
class Stated:
    """One thing that a text states, and where."""

    value: str
    start: int
    end: int


@dataclass(frozen=True)
class TextFacts:
    """What a text states.

    Attributes:
        text: The text, in lower case; offsets are those of the text as it came.
        aspects: Aspect ("side", "degree", ...) to all that is stated of it.
        numbers: With what they measure, such as "12 length"; "2 plain" where they count.
        findings: What the labeler reads.
        mentions: Where it reads it.
        states_abnormality: Whether some abnormality is named in a sentence that denies nothing.
        may_be_two: Whether it has a two, or a word for both that the other language may count.
        foreign: Words that the language itself does not write.
        is_foreign: Whether no character is of the language's own script.
        loop: A piece that follows upon itself too often.
    """

    text: str
    aspects: dict[str, tuple[Stated, ...]]
    numbers: tuple[Stated, ...]
    findings: dict[str, LabeledFinding]
    mentions: tuple[FindingMention, ...]
    states_abnormality: bool
    may_be_two: bool
    foreign: tuple[Stated, ...]
    is_foreign: bool
    loop: Stated | None


def read_facts(text: str, language: str) -> TextFacts:
    """Read what a text states by the rules of its language.

    Raises:
        ValueError: For a language without rules.
    """
    rules, shared = load_rules(language), load_shared_rules()
    # A few letters would become two, and move all that follows.
    lowered = "".join(lower if len(lower := character.lower()) == 1 else character for character in text)
    aspects: dict[str, list[Stated]] = {name: [] for name in (*_ASPECTS, _NUMBER, _FOREIGN)}
    start, states_abnormality = 0, False
    for end in [*(match.end() for match in rules.sentence_break.finditer(text)), len(lowered)]:
        sentence = _read_sentence(lowered[start:end], language)
        is_denied = any(each.value == "negated" for each in sentence["negation"])
        states_abnormality |= any(each.value == "affirmed" or not is_denied for each in sentence["abnormality"])
        for name, found in sentence.items():
            aspects[name] += [replace(each, start=each.start + start, end=each.end + start) for each in found]
        start = end
    return TextFacts(
        text=lowered,
        aspects={name: tuple(aspects[name]) for name in _ASPECTS},
        numbers=tuple(aspects[_NUMBER]),
        findings=label_report(text, language),
        mentions=tuple(find_mentions(text, language)),
        states_abnormality=states_abnormality,
        may_be_two=rules.may_be_two.search(lowered) is not None,
        foreign=tuple(each for each in aspects[_FOREIGN] if not text[each.start : each.end].isupper()),
        is_foreign=rules.own_script.search(lowered) is None,
        loop=repeated_piece(lowered, shared.repeats, shared.repeated_characters),
    )


@lru_cache(maxsize=_MAX_SENTENCES)
def _read_sentence(text: str, language: str) -> dict[str, tuple[Stated, ...]]:
    """Return what a sentence states, with offsets in it: reports repeat their sentences, each is read once."""
    rules = load_rules(language)
    known = [match.span() for match in rules.known_words.finditer(text)]
    foreign = [match for match in rules.foreign_word.finditer(text) if not _overlaps(match, known)]
    aspects = {name: tuple(_stated(text, rules, name)) for name in _ASPECTS}
    aspects["abnormality"] = tuple(_asserted(aspects["abnormality"], aspects["negation"], text, rules))
    return {
        **aspects,
        _NUMBER: tuple(_numbers(text, rules, load_shared_rules())),
        _FOREIGN: tuple(Stated(match[0], *match.span()) for match in foreign),
    }


def _stated(text: str, rules: LanguageRules, aspect: str) -> Iterator[Stated]:
    for match in rules.aspects[aspect].scan(text):
        if None not in match.meanings:
            yield from (Stated(str(value), match.start, match.end) for value in match.meanings)


def _asserted(
    abnormal: tuple[Stated, ...], negation: tuple[Stated, ...], text: str, rules: LanguageRules
) -> Iterator[Stated]:
    """Turn what is affirmed in words, but denied before in its clause ("no evidence that there is"), into a name."""
    for each in abnormal:
        clause = max((match.end() for match in rules.clause_break.finditer(text, 0, each.start)), default=0)
        is_denied = any(clause <= cue.start < each.start for cue in negation)
        yield replace(each, value="named") if is_denied else each


def _overlaps(match: re.Match[str], spans: list[tuple[int, int]]) -> bool:
    return any(match.start() < end and start < match.end() for start, end in spans)


def _numbers(text: str, rules: LanguageRules, shared: SharedRules) -> Iterator[Stated]:
    """Yield numbers; of a size or a range ("1.2 x 3 cm"), each has the unit behind the last."""
    named = [match.span() for match in rules.not_numbers.finditer(text)]
    found = [
        (match, value)
        for match in rules.number.finditer(text)
        if not _overlaps(match, named) and (value := _value(match, rules)) is not None
    ]
    units = {match.start: match for match in rules.aspects["unit"].scan(text) if None not in match.meanings}
    size: tuple[str, float] | None = None
    results = []
    for place in reversed(range(len(found))):
        match, value = found[place]
        end = match.end()
        unit = next((units[start] for start in range(end, end + _MAX_GAP) if start in units), None)
        if unit is not None and not text[end : unit.start].strip(" -"):
            size = shared.units[str(unit.meanings[0])]
        elif place + 1 == len(found) or not rules.number_joiner.fullmatch(text, end, found[place + 1][0].start()):
            size = None
        kind, scale = size or (_PLAIN, 1.0)
        if kind != _PLAIN or value not in (0, 1):  # "one" and "a" are one word in many languages
            results.append(Stated(f"{round(value * scale, 6):g} {kind}", match.start(), end))
    yield from reversed(results)


def _value(match: re.Match[str], rules: LanguageRules) -> float | None:
    if match["digits"] is not None:
        return float(match["digits"].replace(",", ""))
    words = match["words"]
    if rules.numerals:
        return _numeral(words, rules)
    if words in rules.number_words:
        return rules.number_words[words]
    parts = words.replace("-", " ").split(" ")
    if len(parts) == 2 and all(part in rules.number_words for part in parts):
        return rules.number_words[parts[0]] + rules.number_words[parts[1]]
    return None


def _numeral(characters: str, rules: LanguageRules) -> float:
    """Return the value of a numeral of tens and hundreds: 二十三 is 23, 十二 is 12, 一百零五 is 105."""
    total, digit = 0, None
    for value in (rules.numerals[character] for character in characters):
        if value >= 10:
            total += (1 if digit is None else digit) * value
            digit = None
        else:
            digit = value if digit is None else digit * 10 + value
    return float(total + (digit or 0))


def repeated_piece(text: str, repeats: int, least: int, most: int = 40) -> Stated | None:
    """Return the first piece that follows upon itself at least `repeats` times; None where there is none.

    Args:
        text: Any text.
        repeats: How often is too often.
        least: Characters of the shortest piece that counts.
        most: Characters of the longest piece that is looked for.
    """
    pattern = rf"([^\d\s.·…=_*-](?:.{{{least - 1},{most - 1}}}?))\1{{{repeats - 1},}}"
    match = re.search(pattern, text, re.DOTALL)
    return Stated("loop", *match.span()) if match else None
