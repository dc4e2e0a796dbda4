# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Cleaning of report text: de-identification masks, references to earlier examinations, lost characters."""

from __future__ import annotations

import re

__all__ = ["clean_report", "mentions_earlier_or_mask", "repair_characters", "split_sentences"]

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z0-9])")
# "1. No effusion. 2. Clear lungs." A bare number that starts an item is no sentence of its own.
_LIST_NUMBER = re.compile(r"(?:^|(?<=\s))\d{1,2}\.\s+(?=[A-Z])")
_MASK = "XXXX"
_EXAM = (
    r"(?:chest |ct |x-?ray |radiographic )*(?:exam\w*|stud(?:y|ies)|radiographs?|films?|images?|imaging|x-?rays?|ct)"
)
# One image cannot show change over time, so a model taught such sentences can only invent them.
_EARLIER = re.compile(
    r"\b(?:unchanged|stable|redemonstrat\w+|persist(?:s|ent|ing)"
    r"|interval(?! follow)|no (?:significant |interval )*change|again (?:seen|noted|demonstrated|identified)"
    r"|(?:is|are) again|previously|in comparison|comparison (?:exam\w*|stud\w+|radiographs?|is|was|with|to)"
    r"|from comparison|compar(?:ed|able) (?:to|with)(?: the)? (?:prior|previous|comparison)"
    rf"|(?:from|to|than|since|with|on)(?: the| most recent| a)* (?:prior|previous)(?=\s*(?:[.,;)]|$))"
    rf"|(?:prior|previous) {_EXAM}"
    r"|improv(?:ed|ing|ement)|worsen(?:ed|ing)|(?:increas|decreas)ing|has (?:resolved|been removed))\b",
    re.IGNORECASE,
)

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


def repair_characters(text: str) -> str:
    """Restore characters lost to a wrong encoding (U+FFFD) where that is certain, and normalise white space.

    A sentence with a loss that cannot be told, such as a range or a decimal point between two numbers, is dropped: a
    wrong number is worse than none.
    """
    for pattern, replacement in _REPAIRS:
        text = pattern.sub(replacement, text)
    return " ".join(sentence for sentence in split_sentences(text) if _LOST not in sentence)


def split_sentences(text: str) -> list[str]:
    """Split English report text into sentences, white space normalised."""
    return _SENTENCE_END.split(" ".join(text.split())) if text.strip() else []


def clean_report(text: str) -> str:
    """Keep the sentences of a de-identified English report that one examination alone can support.

    Sentences with a de-identification mask ("XXXX") or that compare with an earlier examination are dropped, list
    numbers are taken away and a sentence already said is not said again. The result may be empty.
    """
    kept: dict[str, str] = {}
    for sentence in split_sentences(_LIST_NUMBER.sub("", " ".join(text.split()))):
        has_word = any(character.isalpha() for character in sentence)
        if has_word and not mentions_earlier_or_mask(sentence):
            kept.setdefault(sentence.casefold(), sentence)
    return " ".join(kept.values())


def mentions_earlier_or_mask(text: str) -> bool:
    """Tell whether English text compares with an earlier examination or holds a de-identification mask ("XXXX")."""
    return _MASK in text or _EARLIER.search(text) is not None
