# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Read the rules of the finding labeler: one YAML file a language, which a radiologist can read and edit.

The files are in `finding_rules/`; `finding_rules/README.md` describes what each key means. A file is checked as a
whole when it is read: an unknown key, an unknown finding or a pattern that is no regular expression is an error that
names the place.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..data.labels import FINDINGS, NO_FINDING
from .vocabulary import Vocabulary, bounded

__all__ = ["SHIPPED_RULES", "FindingRules", "load_rules"]

#: Language code to the file that ships.
SHIPPED_RULES: dict[str, Path] = {
    path.stem: path for path in sorted(Path(__file__).with_name("finding_rules").glob("*.yaml"))
}
#: What a thing may state besides findings: an abnormality outside the finding space.
OTHER_ABNORMALITY = "other"

_REQUIRED = ("language", "sentence_end", "scope_end", "list_gap", "negation", "uncertainty", "locations", "findings")
_OPTIONAL = ("word_start", "word_end", "space", "define", "affirmation", "phrase_end", "list_stop", "dropped")
_OPTIONAL += ("ignored", "unlocated", "compounds", "not_findings", "normal", "abnormal", "implies")
_SIDES, _LOBES = ("left", "right"), ("upper", "middle", "lower")
_MACRO = re.compile(r"<([a-z_]+)>")
# A blank, or a character class, in which a blank is a blank.
_BLANK_OR_CLASS = re.compile(r"\[(?:\\.|[^\]\\])*\]| ")


@dataclass(frozen=True)
class Thing:
    """What a phrase speaks of.

    Attributes:
        findings: The findings it names, or denies for a subject; empty for a phrase that only looks like one.
        predicates: For a subject ("heart size"): the predicates that make it a denial ("is normal").
    """

    findings: tuple[str, ...]
    predicates: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Cue:
    """What a word does to the mentions around it.

    Attributes:
        kind: "negation", "uncertainty", "dropped", "predicate", "location", or a boundary: "scope_end", "affirmation",
            "list_stop", "ignored".
        before: It stands before what it speaks of; otherwise after. Means nothing for boundaries and locations.
        predicate: Name of a predicate.
        sides: Of a location.
        lobes: Of a location.
    """

    kind: str
    before: bool = True
    predicate: str = ""
    sides: frozenset[str] = frozenset()
    lobes: frozenset[str] = frozenset()


@dataclass(frozen=True)
class FindingRules:
    """The rules of one language, compiled.

    Attributes:
        language: Language code.
        sentence_end: Nothing reaches over it.
        list_gap: Matches the text between two members of one enumeration.
        strong_cut: Separates phrases, for locations.
        weak_cut: Separates members of an enumeration, for locations.
        things: Findings, compounds, subjects, and phrases that are none.
        cues: Negation, uncertainty, locations and boundaries.
        unlocated: Findings that carry no side or lobe.
        implies: Finding to all that a positive or uncertain mention of it implies.
    """

    language: str
    sentence_end: re.Pattern[str]
    list_gap: re.Pattern[str]
    strong_cut: re.Pattern[str]
    weak_cut: re.Pattern[str]
    things: Vocabulary[Thing]
    cues: Vocabulary[Cue]
    unlocated: frozenset[str]
    implies: Mapping[str, tuple[str, ...]]


def load_rules(rules: str | Path) -> FindingRules:
    """Reads and checks a rules file.

    Args:
        rules: The code of a language that ships, or the path of a rules file.

    Raises:
        ValueError: For an unknown language, a file that cannot be read, an unknown key or finding, or a bad pattern.
    """
    if not isinstance(rules, Path):
        if rules not in SHIPPED_RULES:
            raise ValueError(
                f"Expected a language of {', '.join(SHIPPED_RULES)} or the Path of a rules file, got {rules!r}."
            )
        rules = SHIPPED_RULES[rules]
    try:
        content = yaml.safe_load(rules.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"Expected a readable YAML file of rules, got {rules.name}: {error}") from error
    return _Compiler(rules.name, content).rules()


class _Compiler:
    """Checks the content of one file and compiles it."""

    def __init__(self, file: str, content: Any):
        self._file = file
        if not isinstance(content, dict):
            raise self._error("", f"expected a mapping, got {type(content).__name__}")
        self._content = content
        self._check_keys("", content, _REQUIRED, _OPTIONAL)
        self._word = str(content.get("word_start", "")), str(content.get("word_end", ""))
        self._macros: dict[str, str] = {}
        for name, pattern in content.get("define", {}).items():
            self._macros[name] = f"(?:{self._pattern(f'define.{name}', pattern)})"

    def rules(self) -> FindingRules:
        """Compiles everything."""
        content = self._content
        cuts = content.get("phrase_end", {})
        self._check_keys("phrase_end", cuts, (), ("strong", "weak"))
        return FindingRules(
            language=str(content["language"]),
            sentence_end=re.compile(self._nonempty("sentence_end", content["sentence_end"])),
            list_gap=re.compile(self._pattern("list_gap", content["list_gap"])),
            strong_cut=self._either("phrase_end.strong", cuts.get("strong", [])),
            weak_cut=self._either("phrase_end.weak", cuts.get("weak", [])),
            things=Vocabulary(self._things(), *self._word),
            cues=Vocabulary(self._cues(), *self._word),
            unlocated=frozenset(self._findings("unlocated", content.get("unlocated", []))),
            implies=self._implied(),
        )

    def _things(self) -> list[tuple[str, Thing]]:
        content = self._content
        things = []
        for number, entry in enumerate(content.get("compounds", [])):
            where = f"compounds[{number}]"
            self._check_keys(where, entry, ("findings", "words"))
            names = tuple(self._findings(where, entry["findings"]))
            things += [(phrase, Thing(names)) for phrase in self._phrases(where, entry["words"])]
        for finding, patterns in content["findings"].items():
            names = tuple(self._findings("findings", [finding]))
            things += [(phrase, Thing(names)) for phrase in self._phrases(f"findings.{finding}", patterns)]
        for key, names in (("not_findings", ()), ("abnormal", (OTHER_ABNORMALITY,))):
            things += [(phrase, Thing(names)) for phrase in self._phrases(key, content.get(key, []))]
        normal = content.get("normal", {"predicates": {}, "subjects": []})
        self._check_keys("normal", normal, ("predicates", "subjects"))
        for number, entry in enumerate(normal["subjects"]):
            where = f"normal.subjects[{number}]"
            self._check_keys(where, entry, ("words", "predicate", "denies"))
            predicates = [entry["predicate"]] if isinstance(entry["predicate"], str) else entry["predicate"]
            for name in predicates:
                self._check_name(f"{where}.predicate", name, normal["predicates"])
            thing = Thing(tuple(self._findings(where, entry["denies"])), frozenset(predicates))
            things += [(phrase, thing) for phrase in self._phrases(where, entry["words"])]
        return things

    def _cues(self) -> list[tuple[str, Cue]]:
        content = self._content
        cues = []
        for kind in ("negation", "uncertainty", "dropped"):
            cues += self._directed(kind, content.get(kind, {}), kind)
        for kind in ("scope_end", "affirmation", "list_stop", "ignored"):
            cues += [(phrase, Cue(kind)) for phrase in self._phrases(kind, content.get(kind, []))]
        for name, directions in content.get("normal", {"predicates": {}})["predicates"].items():
            cues += self._directed(f"normal.predicates.{name}", directions, "predicate", name)
        for number, entry in enumerate(content["locations"]):
            where = f"locations[{number}]"
            self._check_keys(where, entry, ("words",), ("sides", "lobes"))
            for key, allowed in (("sides", _SIDES), ("lobes", _LOBES)):
                for name in entry.get(key, []):
                    self._check_name(f"{where}.{key}", name, allowed)
            place = Cue("location", sides=frozenset(entry.get("sides", [])), lobes=frozenset(entry.get("lobes", [])))
            cues += [(phrase, place) for phrase in self._phrases(where, entry["words"])]
        return cues

    def _directed(self, where: str, entry: Any, kind: str, predicate: str = "") -> list[tuple[str, Cue]]:
        self._check_keys(where, entry, (), ("before", "after"))
        return [
            (phrase, Cue(kind, direction == "before", predicate))
            for direction, patterns in entry.items()
            for phrase in self._phrases(f"{where}.{direction}", patterns)
        ]

    def _implied(self) -> dict[str, tuple[str, ...]]:
        direct = self._content.get("implies", {})
        for child, parents in direct.items():
            self._findings(f"implies.{child}", [child, *parents])
        implied = {}
        for child in direct:
            ancestors: list[str] = []
            queue = list(direct[child])
            while queue:
                parent = queue.pop(0)
                if parent not in ancestors and parent != child:
                    ancestors.append(parent)
                    queue += direct.get(parent, [])
            implied[child] = tuple(ancestors)
        return implied

    def _findings(self, where: str, names: Sequence[str]) -> Sequence[str]:
        if isinstance(names, str):
            raise self._error(where, f"expected a list of findings, got the text {names!r}")
        for name in names:
            if name == NO_FINDING:
                raise self._error(where, f"{NO_FINDING!r} follows from the others and has no rules of its own")
            self._check_name(where, name, FINDINGS)
        return names

    def _phrases(self, where: str, patterns: Any) -> list[str]:
        """Checks patterns and fills them in."""
        if not isinstance(patterns, list):
            raise self._error(where, f"expected a list of patterns, got {patterns!r}")
        return [self._nonempty(f"{where}[{number}]", pattern) for number, pattern in enumerate(patterns)]

    def _either(self, where: str, patterns: Any) -> re.Pattern[str]:
        phrases = [bounded(phrase, *self._word) for phrase in self._phrases(where, patterns)]
        return re.compile("|".join(phrases) or r"(?!)")

    def _nonempty(self, where: str, pattern: Any) -> str:
        filled = self._pattern(where, pattern)
        if re.match(filled, ""):
            raise self._error(where, f"{pattern!r} matches the empty text")
        return filled

    def _pattern(self, where: str, pattern: Any) -> str:
        """Fills in macros and blanks, and checks that the result is a regular expression."""
        if not isinstance(pattern, str) or not pattern:
            raise self._error(where, f"expected a pattern, got {pattern!r}")
        for name in _MACRO.findall(pattern):
            self._check_name(where, name, self._macros)
        space = f"(?:{self._content.get('space', ' ')})"
        filled = _BLANK_OR_CLASS.sub(lambda match: space if match[0] == " " else match[0], pattern)
        filled = _MACRO.sub(lambda match: self._macros[match[1]], filled)
        try:
            compiled = re.compile(filled)
        except re.error as error:
            raise self._error(where, f"{pattern!r} is no regular expression: {error}") from error
        if compiled.groups:
            raise self._error(where, f"{pattern!r} has a capturing group; write (?:...) instead of (...)")
        return filled

    def _check_keys(self, where: str, entry: Any, required: Sequence[str], optional: Sequence[str] = ()) -> None:
        if not isinstance(entry, dict):
            raise self._error(where, f"expected a mapping, got {entry!r}")
        for key in entry:
            self._check_name(where, key, [*required, *optional])
        if missing := [key for key in required if key not in entry]:
            raise self._error(where, f"missing {', '.join(missing)}")

    def _check_name(self, where: str, name: Any, known: Any) -> None:
        if name not in known:
            near = difflib.get_close_matches(str(name), [str(key) for key in known], n=1, cutoff=0.0)
            hint = f"the nearest is {near[0]!r}" if near else "none is known"
            raise self._error(where, f"unknown {name!r}; {hint}")

    def _error(self, where: str, problem: str) -> ValueError:
        return ValueError(f"{self._file}: {where}: {problem}." if where else f"{self._file}: {problem}.")
