# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Compare a text with its translation: what a report must not lose or change on its way into another language.

Sentences are not aligned: translators merge and reorder them. Compared is what the whole texts state, side by finding.
The checks are rules; a pair that passes may be wrong in ways that no rule here looks for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from ..schema import LANGUAGES
from .check_rules import load_rules, load_shared_rules
from .facts import Stated, TextFacts, read_facts

__all__ = ["KINDS", "CheckReport", "Difference", "PairChecker"]

_SIDES = frozenset({"left", "right"})
_MAX_TEXTS = 1 << 14


@dataclass(frozen=True)
class Difference:
    """Tell what two texts do not say alike.

    Attributes:
        kind: One of `KINDS`.
        what: What it is about: a finding, a side, a degree; empty where the kind says it all.
        values: Language code to what its text states.
        spans: Language code to where, as (start, end) in that text.
    """

    kind: str
    what: str = ""
    values: Mapping[str, tuple[str, ...]] = field(default_factory=dict, repr=False)
    spans: Mapping[str, tuple[tuple[int, int], ...]] = field(default_factory=dict, repr=False)

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain values; of numbers and foreign words these are pieces of the texts."""
        return {"kind": self.kind, "what": self.what, "values": dict(self.values), "spans": dict(self.spans)}


Facts = Mapping[str, TextFacts]


def _difference(kind: str, what: str, stated: Mapping[str, Sequence[Stated]]) -> Difference:
    return Difference(
        kind,
        what,
        {language: tuple(each.value for each in found) for language, found in stated.items()},
        {language: tuple((each.start, each.end) for each in found) for language, found in stated.items()},
    )


def _empty(facts: Facts) -> Iterator[Difference]:
    for language, fact in facts.items():
        if not fact.text.strip():
            yield Difference("empty", language)


def _untranslated(facts: Facts) -> Iterator[Difference]:
    """Words of another script, a text that has none of its own, or one text twice."""
    texts = {fact.text for fact in facts.values()}
    for language, fact in facts.items():
        if fact.foreign or fact.is_foreign or len(texts) == 1:
            yield _difference("untranslated", language, {language: fact.foreign})


def _repeated(facts: Facts) -> Iterator[Difference]:
    for language, fact in facts.items():
        if fact.loop:
            yield _difference("repeated", language, {language: [fact.loop]})


def _length(facts: Facts) -> Iterator[Difference]:
    rules = load_shared_rules()
    lengths = {language: len(fact.text) for language, fact in facts.items()}
    least, most = (ratio * lengths["en"] for ratio in rules.length_ratio)
    if not least - rules.length_slack <= lengths["zh"] <= most + rules.length_slack:
        yield Difference("length", "", {language: (str(length),) for language, length in lengths.items()})


def _mask(facts: Facts) -> Iterator[Difference]:
    """De-identification marks in one text alone: something was put in their place, or they were made up."""
    marks = {language: fact.aspects["mask"] for language, fact in facts.items()}
    if len({bool(found) for found in marks.values()}) > 1:
        yield _difference("mask", "", marks)


def _number(facts: Facts) -> Iterator[Difference]:
    known = {language: {each.value for each in fact.numbers} for language, fact in facts.items()}
    if all(fact.may_be_two for fact in facts.values()):
        known = {language: values - {"2 plain"} for language, values in known.items()}
    if len({frozenset(values) for values in known.values()}) > 1:
        common = set.intersection(*known.values())
        alone = {
            language: [each for each in fact.numbers if each.value in known[language] - common]
            for language, fact in facts.items()
        }
        yield _difference("number", "", alone)


def _laterality(facts: Facts) -> Iterator[Difference]:
    """A side of a finding, a side that one text alone speaks of, or one side more and the other less."""
    words = {language: fact.aspects["side"] for language, fact in facts.items()}
    sides = {language: [each for each in found if each.value != "loose"] for language, found in words.items()}
    first, second = (Counter(each.value for each in found) for found in words.values())
    change = {side: first[side] - second[side] for side in _SIDES}
    is_alone = any(
        (one[side] or one["both"]) and not (other[side] or other["both"] or (other["loose"] and not one[side]))
        for one, other in ((first, second), (second, first))
        for side in _SIDES
    )
    # One side for both: "both lungs" is "left and right", but not the left one alone.
    is_halved = not all(change.values()) and sum(change.values()) * (first["both"] - second["both"]) < 0
    if is_alone or change["left"] * change["right"] < 0 or is_halved:
        yield _difference("laterality", "", sides)
    if len({tuple(each.value for each in found) for found in sides.values()}) == 1:
        # All sides are there, in the same order: it is the labelers that give one to different findings.
        return
    names = {name for fact in facts.values() for name in fact.findings}
    for name in sorted(names):
        labels = {language: fact.findings.get(name) for language, fact in facts.items()}
        stated = {language: label.sides for language, label in labels.items() if label is not None}
        states = {label.state for label in labels.values() if label is not None}
        if len(stated) == len(facts) and all(stated.values()) and len(states) == 1 and len({*stated.values()}) > 1:
            values = {language: tuple(sorted(found)) for language, found in stated.items()}
            yield Difference("laterality", name, values, _spans_of(name, dict.fromkeys(facts, *states), facts))


def _spans_of(finding: str, states: Mapping[str, str], facts: Facts) -> dict[str, tuple[tuple[int, int], ...]]:
    """Return where each text says what its label is."""
    return {
        language: tuple(
            (mention.start, mention.end)
            for mention in facts[language].mentions
            if mention.finding == finding and mention.state == state
        )
        for language, state in states.items()
    }


def _severity(facts: Facts) -> Iterator[Difference]:
    """A degree of one text alone, or one degree more and another less."""
    near = load_shared_rules().degrees_near
    stated = {language: fact.aspects["degree"] for language, fact in facts.items()}
    first, second = (Counter(each.value for each in found) for found in stated.values())
    change = {degree: first[degree] - second[degree] for degree in near}
    for degree, may_stand in near.items():
        lacking = first if change[degree] < 0 else second
        alone = change[degree] != 0 and not lacking[degree] and not any(lacking[other] for other in may_stand)
        others = [other for other in near if other not in may_stand and degree < other]
        if alone or any(change[degree] * change[other] < 0 for other in others):
            yield _difference("severity", degree, stated)


def _negation(facts: Facts) -> Iterator[Difference]:
    """A finding stated in one text and denied in the other, or negation in one text alone."""
    for name, states in _states(facts).items():
        if len(states) == len(facts) and _is_turned(name, states, facts):
            values = {language: (state,) for language, state in states.items()}
            yield Difference("negation", name, values, _spans_of(name, states, facts))
    affirmed = {
        language: [each for each in fact.aspects["abnormality"] if each.value == "affirmed"]
        for language, fact in facts.items()
    }
    for language, found in affirmed.items():
        others = [other for other in facts if other != language]
        if found and not any(facts[other].states_abnormality for other in others):
            yield _difference("negation", "abnormality", affirmed)
    words = {language: fact.aspects["negation"] for language, fact in facts.items()}
    negated = [any(each.value == "negated" for each in found) for found in words.values()]
    if any(negated) and not all(words.values()):
        yield _difference("negation", "", words)


def _is_turned(finding: str, states: Mapping[str, str], facts: Facts) -> bool:
    """Tell whether a denial of one text is a statement of the other, and not only left beside one more statement."""
    if len({state == "negative" for state in states.values()}) == 1:
        return False
    denials = {
        states[language] == "negative": sum(
            mention.finding == finding and mention.state == "negative" for mention in fact.mentions
        )
        for language, fact in facts.items()
    }
    return denials[False] < denials[True]


def _finding(facts: Facts) -> Iterator[Difference]:
    """A finding that one text speaks of, and the other by no name that may stand for it."""
    states = _states(facts)
    for name, said in states.items():
        lacking = [language for language in facts if language not in said]
        if set(said.values()) == {"negative"} and name not in load_shared_rules().denied_by_name:
            continue
        if not lacking and not _is_turned(name, said, facts):
            # Stated besides a denial that both have: "no other nodule".
            lacking = [language for language, state in said.items() if state == "negative"]
        if len(lacking) == 1 and not _speaks_of(name, lacking[0], states, facts):
            values = {each: (state,) for each, state in said.items()}
            yield Difference("finding", name, values, _spans_of(name, said, facts))


def _speaks_of(finding: str, language: str, states: Mapping[str, Mapping[str, str]], facts: Facts) -> bool:
    """Tell whether a text has a word for a finding that its labeler does not read so, or states one of its family."""
    words = load_rules(language).speaks_of.get(finding)
    if words is not None and words.search(facts[language].text):
        return True
    related = {name for family in load_shared_rules().families if finding in family for name in family} - {finding}
    # What both texts state stands for itself, and for nothing else.
    return any(
        states[name].get(language, "negative") != "negative"
        and any(states[name].get(other, "negative") == "negative" for other in facts)
        for name in related & states.keys()
    )


def _states(facts: Facts) -> dict[str, dict[str, str]]:
    """Return finding to language to state, of the findings that are compared."""
    states: dict[str, dict[str, str]] = {}
    for language, fact in facts.items():
        for name, label in fact.findings.items():
            if name not in load_shared_rules().unchecked:
                states.setdefault(name, {})[language] = label.state
    return dict(sorted(states.items()))


def _term(facts: Facts) -> Iterator[Difference]:
    """A word in one text with its known mistranslation in the other."""
    stated = {language: {each.value for each in fact.aspects["term"]} for language, fact in facts.items()}
    for name in sorted(set.intersection(*stated.values())):
        found = {
            language: [each for each in fact.aspects["term"] if each.value == name] for language, fact in facts.items()
        }
        yield _difference("term", name, found)


_CHECKS: dict[str, Callable[[Facts], Iterator[Difference]]] = {
    "empty": _empty,
    "untranslated": _untranslated,
    "repeated": _repeated,
    "length": _length,
    "mask": _mask,
    "number": _number,
    "laterality": _laterality,
    "severity": _severity,
    "negation": _negation,
    "finding": _finding,
    "term": _term,
}
#: What is checked.
KINDS = tuple(_CHECKS)


class PairChecker:
    """Compares texts with their translations.

    Args:
        kinds: What to check, of `KINDS`; by default all.

    Raises:
        ValueError: For an unknown kind.
    """

    def __init__(self, kinds: Iterable[str] = KINDS):
        self.kinds = tuple(kinds)
        for kind in self.kinds:
            if kind not in _CHECKS:
                raise ValueError(f"unknown check {kind!r}; expected some of {', '.join(KINDS)}")
        # Templated reports come again and again, and so do their translations.
        self._facts = lru_cache(maxsize=_MAX_TEXTS)(read_facts)

    def check(self, texts: Mapping[str, str]) -> list[Difference]:
        """Return what two texts do not say alike, in the order of the checks.

        Args:
            texts: Language code to text, in both languages.

        Raises:
            ValueError: If a language is missing, or what it has is no text.
        """
        if set(texts) != set(LANGUAGES) or not all(isinstance(text, str) for text in texts.values()):
            raise ValueError(f"expected texts in {', '.join(LANGUAGES)}, got {', '.join(texts) or 'none'}")
        facts = {language: self._facts(texts[language], language) for language in LANGUAGES}
        if empty := list(_empty(facts)):
            # Nothing more can be said of it.
            return empty
        return [difference for kind in self.kinds for difference in _CHECKS[kind](facts)]


@dataclass
class CheckReport:
    """Count what became of pairs.

    Attributes:
        accepted: How many passed.
        rejected: How many did not.
        kinds: Kind to the pairs in which it was found.
        alone: Kind to the pairs in which nothing else was found.
    """

    accepted: int = 0
    rejected: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    alone: Counter[str] = field(default_factory=Counter)

    def add(self, differences: Sequence[Difference]) -> None:
        """Count a pair."""
        found = {difference.kind for difference in differences}
        self.accepted += not found
        self.rejected += bool(found)
        self.kinds.update(found)
        if len(found) == 1:
            self.alone.update(found)

    def as_dict(self) -> dict[str, Any]:
        """Return the counts, and the share accepted (None without a pair)."""
        total = self.accepted + self.rejected
        return {
            "pairs": total,
            "accepted": self.accepted,
            "rejected": self.rejected,
            "share_accepted": self.accepted / total if total else None,
            "rejected_by_kind": {kind: self.kinds[kind] for kind in KINDS if self.kinds[kind]},
            "rejected_by_kind_alone": {kind: self.alone[kind] for kind in KINDS if self.alone[kind]},
        }

    def table(self) -> str:
        """Return the counts as a Markdown table, with the share of all pairs."""
        total = self.accepted + self.rejected
        rows = [("accepted", self.accepted, ""), ("rejected", self.rejected, "")]
        rows += [(f"- {kind}", self.kinds[kind], str(self.alone[kind])) for kind in KINDS if self.kinds[kind]]
        lines = ["| | pairs | share | by this alone |", "|---|---:|---:|---:|"]
        lines += [
            f"| {name} | {count} | {count / total if total else 0:.1%} | {alone} |" for name, count, alone in rows
        ]
        return "\n".join(lines)
