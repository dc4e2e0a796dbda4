# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Which findings a report states, denies or leaves open, and where: by rules, one engine for all languages.

The method is that of NegEx (Chapman et al., J Biomed Inform 2001) and of CheXpert's labeler (Irvin et al., AAAI 2019):
find the mentions, then the words around them that deny them or leave them open, then merge the mentions of a report.
All knowledge of a language is in its rules file, see `finding_rules`.

The input is what a report says of the examination, findings and impression. Of an indication ("rule out pneumonia")
questions are left out as far as the rules know them.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path

from tqdm.auto import tqdm

from ..data.labels import NO_FINDING
from .finding_rules import OTHER_ABNORMALITY, Cue, FindingRules, Thing, load_rules
from .vocabulary import Match

__all__ = [
    "STATES",
    "FindingLabeler",
    "FindingMention",
    "LabeledFinding",
    "find_mentions",
    "label_report",
    "label_reports",
]

POSITIVE, UNCERTAIN, NEGATIVE = "positive", "uncertain", "negative"
#: Strongest first: the state of a report is the strongest of its mentions.
STATES = (POSITIVE, UNCERTAIN, NEGATIVE)
# A device is no disease (CheXpert's rule).
_NO_ABNORMALITY = frozenset({"support_devices"})
_NOWHERE: frozenset[str] = frozenset()
_MAX_SENTENCES = 1 << 16
# Text without a sentence end is cut here: no report has such sentences, and the time for one grows with its square.
_MAX_SENTENCE = 2000
# A `before` predicate ("normal heart size") stands this close to its subject.
_MAX_PREDICATE_GAP = 30
_BOUNDARIES = frozenset({"scope_end", "affirmation", "list_stop"})


@dataclass(frozen=True)
class FindingMention:
    """Describe one mention of a finding.

    Attributes:
        finding: Its name, one of `m3fm.data.FINDINGS`.
        state: "positive", "negative" or "uncertain".
        sides: "left", "right" or both; empty where none is stated, and for negative mentions.
        lobes: Of "upper", "middle" and "lower"; empty likewise.
        start: Where the mention starts in the text.
        end: Where it ends, exclusive.
    """

    finding: str
    state: str
    sides: frozenset[str]
    lobes: frozenset[str]
    start: int
    end: int


@dataclass(frozen=True)
class LabeledFinding:
    """Describe what a whole report says of one finding.

    Attributes:
        state: The strongest state of its mentions: positive, then uncertain, then negative.
        sides: Of all mentions in that state.
        lobes: Of all mentions in that state.
    """

    state: str
    sides: frozenset[str] = _NOWHERE
    lobes: frozenset[str] = _NOWHERE


@dataclass(frozen=True)
class _Owner:
    """A thing in a sentence with its state; None where it is not asserted at all."""

    match: Match[Thing]
    thing: Thing
    state: str | None


class FindingLabeler:
    """Labels reports by the rules of one language.

    Args:
        rules: The code of a language that ships ("en", "zh"), or the `Path` of a rules file of one's own.

    Raises:
        ValueError: For an unknown language or a malformed rules file.
    """

    def __init__(self, rules: str | Path):
        self.rules: FindingRules = load_rules(rules)
        # Reports repeat their sentences: each is read once.
        self._sentence = lru_cache(maxsize=_MAX_SENTENCES)(lambda text: tuple(_read_sentence(text, self.rules)))

    def find_mentions(self, text: str) -> list[FindingMention]:
        """Returns the mentions in a report, in order; those that assert nothing (history, questions) are left out."""
        return [mention for mention in self._mentions(text) if mention.finding != OTHER_ABNORMALITY]

    def label_report(self, text: str) -> dict[str, LabeledFinding]:
        """Merges the mentions of a report.

        Args:
            text: Findings and impression.

        Returns:
            The findings that are mentioned or implied by a mention, and "no_finding": positive if the report is not
            empty and states no abnormality and leaves none open (devices are none), else negative.
        """
        places: dict[str, dict[str, LabeledFinding]] = {}
        for mention in self._mentions(text):
            names = [mention.finding]
            if mention.state != NEGATIVE:
                names += self.rules.implies.get(mention.finding, ())
            for name in names:
                states = places.setdefault(name, {})
                known = states.get(mention.state, LabeledFinding(mention.state))
                located = name not in self.rules.unlocated
                states[mention.state] = replace(
                    known,
                    sides=known.sides | mention.sides if located else _NOWHERE,
                    lobes=known.lobes | mention.lobes if located else _NOWHERE,
                )
        labels = {name: next(states[state] for state in STATES if state in states) for name, states in places.items()}
        abnormal = any(label.state != NEGATIVE for name, label in labels.items() if name not in _NO_ABNORMALITY)
        labels.pop(OTHER_ABNORMALITY, None)
        labels[NO_FINDING] = LabeledFinding(NEGATIVE if abnormal or not text.strip() else POSITIVE)
        return labels

    def label_reports(self, texts: Sequence[str], *, progress: bool = False) -> list[dict[str, LabeledFinding]]:
        """Labels many reports; equal ones once, and they share one dictionary.

        Args:
            texts: Reports.
            progress: Shows a bar.
        """
        distinct = dict.fromkeys(texts)
        labels = {
            text: self.label_report(text)
            for text in tqdm(distinct, desc=f"findings ({self.rules.language})", disable=not progress)
        }
        return [labels[text] for text in texts]

    def _mentions(self, text: str) -> Iterator[FindingMention]:
        lowered = _lower(text)
        for start, end in _sentences(lowered, self.rules.sentence_end):
            for mention in self._sentence(lowered[start:end]):
                yield replace(mention, start=mention.start + start, end=mention.end + start)


@cache
def _shipped(language: str) -> FindingLabeler:
    return FindingLabeler(language)


def find_mentions(text: str, language: str) -> list[FindingMention]:
    """Returns the mentions of findings in a report by the rules that ship, see `FindingLabeler.find_mentions`."""
    return _shipped(language).find_mentions(text)


def label_report(text: str, language: str) -> dict[str, LabeledFinding]:
    """Labels a report by the rules that ship, see `FindingLabeler.label_report`."""
    return _shipped(language).label_report(text)


def label_reports(texts: Sequence[str], language: str, *, progress: bool = False) -> list[dict[str, LabeledFinding]]:
    """Labels reports by the rules that ship, see `FindingLabeler.label_reports`."""
    return _shipped(language).label_reports(texts, progress=progress)


def _lower(text: str) -> str:
    """Lower-cases without moving a character: a few letters would become two."""
    lowered = text.lower()
    if len(lowered) == len(text):
        return lowered
    return "".join(char.lower() if len(char.lower()) == 1 else char for char in text)


def _sentences(text: str, sentence_end: re.Pattern[str]) -> Iterator[tuple[int, int]]:
    start = 0
    for end, following in [*(match.span() for match in sentence_end.finditer(text)), (len(text), len(text))]:
        for piece in range(start, end, _MAX_SENTENCE):
            yield piece, min(piece + _MAX_SENTENCE, end)
        start = following


def _read_sentence(text: str, rules: FindingRules) -> Iterator[FindingMention]:
    """Yields the mentions of a sentence, with offsets in it."""
    things = [match for match in rules.things.scan(text) if match.meanings[0].findings]
    if not things:
        return
    sentence = _Sentence(text, things, rules.cues.scan(text), rules)
    owners = sentence.owners()
    for owner, place in zip(owners, sentence.places(owners), strict=True):
        if owner.state is None:
            continue
        for finding in owner.thing.findings:
            located = owner.state != NEGATIVE and finding not in rules.unlocated
            sides, lobes = place if located else (_NOWHERE, _NOWHERE)
            yield FindingMention(finding, owner.state, sides, lobes, owner.match.start, owner.match.end)


class _Sentence:
    """One sentence with its things and cues in order."""

    def __init__(self, text: str, things: list[Match[Thing]], cues: list[Match[Cue]], rules: FindingRules):
        self._text = text
        self._things = things
        self._cues = cues
        self._rules = rules

    def owners(self) -> list[_Owner]:
        """Returns what the sentence speaks of: findings, and subjects called normal."""
        owners = []
        for number, match in enumerate(self._things):
            thing = match.meanings[0]
            if not thing.predicates:
                owners.append(_Owner(match, thing, self._state(number)))
            elif self._is_normal(number, thing.predicates):
                owners.append(_Owner(match, thing, NEGATIVE))
        return owners

    def _state(self, number: int) -> str | None:
        kinds = {self._before(number), self._after(number)}
        if "dropped" in kinds:
            return None
        if "negation" in kinds:
            return NEGATIVE
        return UNCERTAIN if "uncertainty" in kinds else POSITIVE

    def _before(self, number: int) -> str | None:
        """Returns the kind of the nearest cue before a mention or in it, within its scope."""
        thing = self._things[number]
        uncertain_at = None
        for cue in reversed(self._cues):
            inside = thing.start <= cue.start
            if cue.start >= thing.end:
                continue
            kinds = {meaning.kind for meaning in cue.meanings if meaning.before or inside}
            if uncertain_at is not None and not self._directly_before(cue, uncertain_at):
                break
            if kinds & _BOUNDARIES:
                if inside:
                    continue
                break
            for kind in ("dropped", "negation"):
                if kind in kinds:
                    return kind
            if "uncertainty" in kinds:
                uncertain_at = cue.start
        return None if uncertain_at is None else "uncertainty"

    def _directly_before(self, cue: Match[Cue], position: int) -> bool:
        """Tells whether only words stand between a cue and a position: no mention, no phrase end."""
        gap = self._text[cue.end : position]
        if self._rules.strong_cut.search(gap) or self._rules.weak_cut.search(gap):
            return False
        return not any(cue.end <= thing.start < position for thing in self._things)

    def _after(self, number: int) -> str | None:
        """Returns the kind of the nearest cue after a mention, if it reaches back to it along an enumeration."""
        last = self._things[number]
        following = self._things[number + 1 :]
        for cue in self._cues:
            if cue.start < last.end:
                continue
            while following and following[0].end <= cue.start:
                if not self._joined(last, following[0]):
                    return None
                last = following.pop(0)
            if following and following[0].start <= cue.start < following[0].end:
                continue
            kinds = {meaning.kind for meaning in cue.meanings if not meaning.before}
            for kind in ("dropped", "negation", "uncertainty"):
                if kind in kinds:
                    return kind
            if any(m.kind in _BOUNDARIES or (m.before and m.kind == "negation") for m in cue.meanings):
                return None
        return None

    def _joined(self, first: Match[Thing], second: Match[Thing]) -> bool:
        return self._rules.list_gap.fullmatch(self._text, first.end, second.start) is not None

    def _is_normal(self, number: int, predicates: frozenset[str]) -> bool:
        return self._normal_after(number, predicates) or self._normal_before(number, predicates)

    def _normal_after(self, number: int, predicates: frozenset[str]) -> bool:
        """Tells whether one of the predicates follows ("heart size and mediastinum are normal")."""
        subject = self._things[number]
        findings = [thing.start for thing in self._things[number + 1 :] if not thing.meanings[0].predicates]
        limit = findings[0] if findings else len(self._text)
        for cue in self._cues:
            if cue.start < subject.end or all(meaning.kind == "location" for meaning in cue.meanings):
                continue
            return cue.end <= limit and any(
                m.kind == "predicate" and m.predicate in predicates and not m.before for m in cue.meanings
            )
        return False

    def _normal_before(self, number: int, predicates: frozenset[str]) -> bool:
        """Tells whether one of the predicates stands directly before ("normal heart size and mediastinum")."""
        subject = self._things[number]
        previous = self._things[number - 1] if number else None
        for cue in reversed(self._cues):
            if cue.end > subject.start or all(meaning.kind == "location" for meaning in cue.meanings):
                continue
            if previous and cue.end <= previous.start:
                break
            return subject.start - cue.end <= _MAX_PREDICATE_GAP and any(
                m.kind == "predicate" and m.predicate in predicates and m.before for m in cue.meanings
            )
        if previous is None or not previous.meanings[0].predicates or not self._joined(previous, subject):
            return False
        return self._normal_before(number - 1, predicates)

    def places(self, owners: list[_Owner]) -> list[tuple[frozenset[str], frozenset[str]]]:
        """Returns sides and lobes of each owner."""
        own: list[list[Cue]] = [[] for _ in owners]
        for cue in self._cues:
            locations = [meaning for meaning in cue.meanings if meaning.kind == "location"]
            if locations and owners and (number := self._owner_of(cue, owners)) is not None:
                own[number] += locations
        places = [
            (_NOWHERE.union(*(cue.sides for cue in cues)), _NOWHERE.union(*(cue.lobes for cue in cues)))
            for cues in own
        ]
        nowhere = (_NOWHERE, _NOWHERE)
        for number in range(1, len(owners)):
            if places[number] == nowhere and self._joined(owners[number - 1].match, owners[number].match):
                places[number] = places[number - 1]
        for number in reversed(range(len(owners) - 1)):
            if places[number] == nowhere and self._joined(owners[number].match, owners[number + 1].match):
                places[number] = places[number + 1]
        return places

    def _owner_of(self, cue: Match[Cue], owners: list[_Owner]) -> int | None:
        """Returns which owner a location word belongs to."""
        later = next((i for i, owner in enumerate(owners) if cue.start < owner.match.end), len(owners))
        if later < len(owners) and owners[later].match.start <= cue.start:
            return later
        start = owners[later - 1].match.end if later else 0
        end = owners[later].match.start if later < len(owners) else len(self._text)
        ends = [c for c in self._cues if c.meanings[0].kind == "scope_end" and start <= c.start and c.end <= end]
        before = [c for c in ends if c.end <= cue.start]
        after = [c for c in ends if c.start >= cue.end]
        if later == len(owners):
            return None if before else later - 1
        if later == 0:
            return None if after else 0
        if ends:
            return (later if not after else None) if before else later - 1
        return later if cue.start >= self._cut(cue, start, end) else later - 1

    def _cut(self, cue: Match[Cue], start: int, end: int) -> int:
        """Returns where the words of the earlier of two mentions stop and those of the later begin.

        A location word after the cut belongs to the later one.
        """
        strong, weak = (
            [match.end() for match in pattern.finditer(self._text, start, end)]
            for pattern in (self._rules.strong_cut, self._rules.weak_cut)
        )
        locations = self._kind_between("location", start, end)
        if self._kind_between("affirmation", locations[-1].end, end):
            # "..., the left upper lobe, the lingula and the right lung show": subjects of what is mentioned later.
            if strong:
                return self._first_of_places(strong)
            return weak[0] if weak else start
        if strong:
            last = [place for place in weak if place >= strong[-1]]
            return end if last and not self._kind_between("location", last[-1], end) else strong[-1]
        if weak:
            return weak[-1]
        return start if end - cue.end <= cue.start - start else end

    def _first_of_places(self, cuts: list[int]) -> int:
        """Returns the cut where an enumeration of places begins that reaches to the last cut."""
        number = len(cuts) - 1
        while number and self._kind_between("location", cuts[number - 1], cuts[number]):
            if self._kind_between("affirmation", cuts[number - 1], cuts[number]):
                break
            number -= 1
        return cuts[number]

    def _kind_between(self, kind: str, start: int, end: int) -> list[Match[Cue]]:
        return [
            cue
            for cue in self._cues
            if start <= cue.start < end and any(meaning.kind == kind for meaning in cue.meanings)
        ]
