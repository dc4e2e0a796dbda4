# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Cleaning of report text: de-identification masks, references to earlier examinations, punctuation, lost characters.

What is a mask, an earlier examination, a sentence or a list number is data, one file a language: see `report_rules`.
Cleaning what is clean changes nothing.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache

from .report_rules import ReportRules, load_report_rules

__all__ = [
    "Cleaning",
    "clean_fully",
    "clean_report",
    "count_changes",
    "mentions_earlier_or_mask",
    "normalize_text",
    "repair_characters",
    "split_sentences",
]

# What stands for a mask with blanks in it.
_MASK = "___"
_MAX_SENTENCES = 1 << 16
# One pass is enough for nearly every report; a list number that only shows after another was removed takes one more.
_MAX_PASSES = 8

_LOST = "\ufffd"
# A lost character is restored only where its neighbours leave one reading.
_REPAIRS = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (rf"(?<=[A-Za-z]){_LOST}(?=s\b)", "'"),
        (rf"(?<!\S){_LOST}(\w[^{_LOST}]{{0,60}}\w){_LOST}", r'"\1"'),
        (rf"(\d)\s*[{_LOST}?]\s*10(\d)(?!\d)", r"\1 x 10^\2"),  # cell counts: "113 ? 109 per L"
        (rf"(\d){_LOST}(\d)(?={_LOST}\s?[CF]\b)", r"\1.\2"),  # the Lancet's raised decimal point
        (rf"(?<=\d)\s?{_LOST}\s?(?=[CF]\b)", "°"),
        (rf"(?<=\d)\s?{_LOST}(?=\s?[.,)])", "°"),
        (rf"(?<=/){_LOST}(?=[Ll]\b)|(?<=\d){_LOST}(?=g/)", "µ"),
        (rf"(?<=[A-Za-z]) {_LOST} (?=[A-Za-z])", " - "),
    )
)


@dataclass(frozen=True)
class Cleaning:
    """Say what cleaning kept and what it dropped.

    Attributes:
        text: What is left; may be empty.
        dropped: Reason and words of each part that was dropped: "mask", "earlier", "lost" (a lost character),
            "repeated" (said before) or "wordless" (a sentence of numbers and marks).
    """

    text: str
    dropped: tuple[tuple[str, str], ...] = field(default=(), repr=False)


def repair_characters(text: str) -> str:
    """Restore characters lost to a wrong encoding (U+FFFD) where that is certain, and normalise white space.

    A sentence with a loss that cannot be told, such as a range or a decimal point between two numbers, is dropped: a
    wrong number is worse than none.
    """
    return " ".join(sentence for sentence in split_sentences(_repaired(text)) if _LOST not in sentence)


def split_sentences(text: str, language: str = "en") -> list[str]:
    """Split report text into sentences, white space normalised."""
    if not text.strip():
        return []
    return load_report_rules(language).sentence_end.split(" ".join(text.split()))


def normalize_text(text: str, language: str) -> str:
    """Give characters, punctuation, list items and white space one form each; no sentence is dropped.

    Full-width digits and letters become ASCII, white space of all kinds one blank; Chinese text has full-width
    punctuation and no blanks; list numbers and bullets go. Words, numbers and decimal points stay as they are.

    Raises:
        ValueError: For a language without rules.
    """
    return _until_still(lambda words: _normalized(words, load_report_rules(language)), text)


def clean_report(text: str, language: str = "en") -> str:
    """Keep the sentences of a de-identified report that one examination alone can support.

    The text is normalised (`normalize_text`). Sentences with a de-identification mask ("XXXX") or that compare with an
    earlier examination are dropped, and a sentence already said is not said again. In Chinese, where a sentence may be
    the whole report, it is clauses that are dropped. The result may be empty.

    English text is cleaned as that which the checkpoints were trained on; `clean_fully` knows more words.

    Raises:
        ValueError: For a language without rules.
    """
    return _cleaned(text, language, thorough=False).text


def clean_fully(text: str, language: str) -> Cleaning:
    """Clean as `clean_report` does, with all rules, and say what was dropped: what the reports of records go through.

    Raises:
        ValueError: For a language without rules.
    """
    return _cleaned(text, language, thorough=True)


def mentions_earlier_or_mask(text: str, language: str = "en") -> bool:
    """Tell whether `clean_report` would drop any of the text for a mask or an earlier examination."""
    sentences = _sentences(text, load_report_rules(language))
    reasons = {reason for sentence in sentences for reason, _ in _kept(sentence, language, False).dropped}
    return not reasons.isdisjoint(("mask", "earlier"))


def count_changes(text: str, language: str) -> Counter[str]:
    """Count what `normalize_text` changes, by kind: "characters" and the kinds of the language's substitutions."""
    rules = load_report_rules(language)
    counts: Counter[str] = Counter()
    translated = text.translate(rules.characters).strip()
    counts["characters"] = sum(ord(character) in rules.characters for character in text)
    for substitution in rules.substitutions:
        for found in substitution.pattern.finditer(translated):
            kept = "kept" in substitution.pattern.groupindex and found["kept"]
            counts[substitution.kind] += not kept and found[0] != found.expand(substitution.replacement)
        translated = substitution.apply(translated)
    return +counts


def _repaired(text: str) -> str:
    for pattern, replacement in _REPAIRS:
        text = pattern.sub(replacement, text)
    return text


def _normalized(text: str, rules: ReportRules) -> str:
    text = text.translate(rules.characters).strip()
    for substitution in rules.substitutions:
        text = substitution.apply(text)
    return text.strip()


def _until_still(change: Callable[[str], str], text: str) -> str:
    for _ in range(_MAX_PASSES):
        changed = change(text)
        if changed == text:
            break
        text = changed
    return text


def _sentences(text: str, rules: ReportRules) -> list[str]:
    """Split text, a mask with blanks in it put down to one that has none."""
    return split_sentences(rules.long_mask.sub(_MASK, text), rules.language)


def _cleaned(text: str, language: str, thorough: bool) -> Cleaning:
    rules = load_report_rules(language)
    dropped: list[tuple[str, str]] = []

    def clean_once(words: str) -> str:
        if _LOST in words:
            words = _repaired(words)
        said: dict[str, str] = {}
        for sentence in _sentences(_normalized(words, rules), rules):
            kept = _kept(sentence, language, thorough)
            dropped.extend(kept.dropped)
            if kept.text.casefold() in said:
                dropped.append(("repeated", kept.text))
            elif kept.text:
                said[kept.text.casefold()] = kept.text
        return rules.joint.join(said.values())

    return Cleaning(_until_still(clean_once, text), tuple(dropped))


@lru_cache(maxsize=_MAX_SENTENCES)
def _kept(sentence: str, language: str, thorough: bool) -> Cleaning:
    """Clean one sentence; reports repeat theirs."""
    if not _has_word(sentence):
        return Cleaning("", (("wordless", sentence),))
    rules = load_report_rules(language)
    clauses = rules.clause_end.split(sentence) if rules.clause_end else [sentence]
    kept: list[str] = []
    dropped: list[tuple[str, str]] = []
    reason, opened = None, False
    for clause in clauses:
        depends = opened or not _has_word(clause) or rules.dependent.search(clause.lower()) is not None
        reason = _why_dropped(clause, rules, thorough) or (reason if depends else None)
        opened = reason is not None and (opened or rules.opening.search(clause.lower()) is not None)
        if reason is None:
            kept.append(clause)
        else:
            dropped.append((reason, clause))
            if kept and clause is clauses[-1]:
                kept[-1] = kept[-1][:-1] + rules.full_stop
            elif kept and clause[-1] in rules.strong_clause_ends:
                kept[-1] = kept[-1][:-1] + clause[-1]
    return Cleaning("".join(kept), tuple(dropped))


def _has_word(text: str) -> bool:
    return any(character.isalpha() for character in text)


def _why_dropped(clause: str, rules: ReportRules, thorough: bool) -> str | None:
    if _LOST in clause:
        return "lost"
    if rules.mask.search(clause):
        return "mask"
    lowered = clause.lower()
    earlier = rules.earlier_in_advice if rules.advice.search(lowered) else rules.earlier
    if earlier.search(lowered) or (thorough and rules.earlier_more.search(lowered)):
        return "earlier"
    return None
