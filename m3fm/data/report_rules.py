# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Read the rules of report text: one YAML file a language, which a radiologist can read and edit.

The files are in `report_rules/`. What characters become, what ends a sentence, what compares with an earlier
examination, what stands for a name that was taken out and how sections are headed is in them; how it is applied is in
`report_text` and `report_sections`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

__all__ = ["REPORT_LANGUAGES", "ReportRules", "Substitution", "load_report_rules"]

_FOLDER = Path(__file__).with_name("report_rules")
#: Codes of the languages that have rules.
REPORT_LANGUAGES: tuple[str, ...] = tuple(path.stem for path in sorted(_FOLDER.glob("*.yaml")))
_MACRO = re.compile(r"<([a-z_]+)>")
# What has a letter with a meaning of its own, or a capital.
_LETTER = re.compile(r"(\\.|\(\?P)|[A-Z]")
# Matches nothing: what a language has no rule for.
_NEVER = re.compile(r"(?!)")


@dataclass(frozen=True)
class Substitution:
    """Replace what a pattern matches.

    Attributes:
        kind: What it is counted as.
        pattern: A match with the group "kept" stays as it is.
        replacement: As of `re.sub`.
        needs: Text with none of these characters has no match; empty where that cannot be said. It saves most of the
            time.
    """

    kind: str
    pattern: re.Pattern[str]
    replacement: str
    needs: str = ""

    def apply(self, text: str) -> str:
        """Return the text with every match replaced."""
        if self.needs and not any(character in text for character in self.needs):
            return text
        if "kept" not in self.pattern.groupindex:
            return self.pattern.sub(self.replacement, text)
        return self.pattern.sub(lambda found: found["kept"] or found.expand(self.replacement), text)


@dataclass(frozen=True, eq=False)
class ReportRules:
    """The rules of one language, compiled.

    Attributes:
        language: Language code.
        joint: What stands between two sentences.
        characters: Table of `str.translate`.
        substitutions: In the order in which they are applied.
        sentence_end: Text is split where it matches.
        clause_end: Sentences are split where it matches; None where a sentence is kept or dropped as a whole.
        strong_clause_ends: A dropped clause leaves its end to the clause before it, if it is one of these.
        full_stop: Ends a sentence whose last clause was dropped.
        long_mask: A mask with blanks or sentence ends in it, put down to `MASK` before sentences are split.
        mask: Stands for what was taken out to protect persons.
        earlier: Compares with an earlier examination, or says that there is none.
        earlier_more: As `earlier`, in words that `clean_report` leaves.
        opening: A clause that makes the rest of its sentence a comparison.
        dependent: A clause that speaks of what the clause before it speaks of.
        advice: A clause that advises: what looks like a comparison in it, apart from `earlier_in_advice`, is none.
        earlier_in_advice: As said.
        headings: Matches a possible heading in text with ASCII letters in lower case; the group that matched is the
            section.
        unknown_heading: Matches a heading whatever its name; group 1 is the name.
        heading_names: Name of a heading in lower case to section, for misspelt headings.
        views: Matches in a heading that names views and no section, and in other titles.
        frame: Matches lines that belong to no section.
        prose: Matches in a paragraph that is more than a title.
        statement: Matches in a sentence that is more than a title, a name or a date.
        no_finding: Speaks of the patient, of what is asked or of how the images were taken.
        signature: Matches lines that say who signed the report, and when.
        paragraph_end: Sections are split into paragraphs where it matches.
    """

    language: str
    joint: str
    characters: Mapping[int, str]
    substitutions: tuple[Substitution, ...]
    sentence_end: re.Pattern[str]
    clause_end: re.Pattern[str] | None
    strong_clause_ends: str
    full_stop: str
    long_mask: re.Pattern[str]
    mask: re.Pattern[str]
    earlier: re.Pattern[str]
    earlier_more: re.Pattern[str]
    opening: re.Pattern[str]
    dependent: re.Pattern[str]
    advice: re.Pattern[str]
    earlier_in_advice: re.Pattern[str]
    headings: re.Pattern[str]
    unknown_heading: re.Pattern[str]
    heading_names: Mapping[str, str]
    views: re.Pattern[str]
    frame: re.Pattern[str]
    prose: re.Pattern[str]
    statement: re.Pattern[str]
    no_finding: re.Pattern[str]
    signature: re.Pattern[str]
    paragraph_end: re.Pattern[str]


_REQUIRED = ("language", "joint", "full_stop", "characters", "substitutions", "sentence_end", "mask", "earlier")
_REQUIRED += ("headings", "heading_start", "heading_end", "prose", "paragraph_end")
_OPTIONAL = (
    "define",
    "word_start",
    "word_end",
    "clause_end",
    "strong_clause_ends",
    "long_mask",
    "opening",
    "dependent",
    "advice",
)
_OPTIONAL += ("earlier_more", "earlier_in_advice", "unknown_heading", "misspelt", "views", "frame", "statement")
_OPTIONAL += ("no_finding", "signature")


@cache
def load_report_rules(language: str) -> ReportRules:
    """Return the rules of a language.

    Raises:
        ValueError: For a language without rules, an unknown key in the file, or a bad pattern.
    """
    if language not in REPORT_LANGUAGES:
        raise ValueError(f"Expected a language of {', '.join(REPORT_LANGUAGES)}, got {language!r}.")
    path = _FOLDER / f"{language}.yaml"
    return _Compiler(path.name, yaml.safe_load(path.read_text(encoding="utf-8"))).rules()


class _Compiler:
    """Checks the content of one file and compiles it."""

    def __init__(self, file: str, content: Mapping[str, Any]):
        self._file = file
        self._content = content
        unknown = set(content) - set(_REQUIRED) - set(_OPTIONAL)
        missing = set(_REQUIRED) - set(content)
        if unknown or missing:
            raise ValueError(f"{file}: unknown keys {sorted(unknown)}, missing keys {sorted(missing)}.")
        self._macros: dict[str, str] = {}
        for name, pattern in content.get("define", {}).items():
            self._macros[name] = f"(?:{self._expand(pattern)})"

    def rules(self) -> ReportRules:
        """Compile everything."""
        content = self._content
        headings = content["headings"]
        return ReportRules(
            language=content["language"],
            joint=content["joint"],
            characters=_character_table(content["characters"]),
            substitutions=tuple(self._substitution(rule) for rule in content["substitutions"]),
            sentence_end=self._either("sentence_end"),
            clause_end=self._either("clause_end") if "clause_end" in content else None,
            strong_clause_ends=content.get("strong_clause_ends", ""),
            full_stop=content["full_stop"],
            long_mask=self._either("long_mask"),
            mask=self._either("mask"),
            earlier=self._words("earlier"),
            earlier_more=self._words("earlier_more"),
            opening=self._words("opening"),
            dependent=self._words("dependent"),
            advice=self._words("advice"),
            earlier_in_advice=self._words("earlier_in_advice"),
            headings=self._headings(headings),
            unknown_heading=self._compiled("unknown_heading", content.get("unknown_heading")),
            heading_names={name: section for section, names in content.get("misspelt", {}).items() for name in names},
            views=self._compiled("views", content.get("views")),
            frame=self._compiled("frame", content.get("frame")),
            prose=self._compiled("prose", content["prose"]),
            statement=self._compiled("statement", content.get("statement")),
            no_finding=self._words("no_finding"),
            signature=self._either("signature"),
            paragraph_end=self._compiled("paragraph_end", content["paragraph_end"]),
        )

    def _headings(self, headings: Mapping[str, Sequence[str]]) -> re.Pattern[str]:
        sections = "|".join(f"(?P<{section}>{'|'.join(names)})" for section, names in headings.items())
        start, end = self._content["heading_start"], self._content["heading_end"]
        return self._compiled("headings", _lowered(self._expand(f"(?m){start}(?:{sections}){end}")))

    def _substitution(self, rule: Mapping[str, str]) -> Substitution:
        pattern = self._expand(rule["pattern"])
        if "kept" in rule:
            pattern = f"(?P<kept>{self._expand(rule['kept'])})|{pattern}"
        compiled = self._compiled(rule["kind"], pattern)
        return Substitution(rule["kind"], compiled, rule["replacement"], rule.get("needs", ""))

    def _words(self, key: str) -> re.Pattern[str]:
        """Compile patterns that are matched against text in lower case: several times faster than ignoring case."""
        if key not in self._content:
            return _NEVER
        start, end = self._content.get("word_start", ""), self._content.get("word_end", "")
        patterns = self._expand("|".join(self._content[key]))
        return self._compiled(key, _lowered(f"{start}(?:{patterns}){end}"))

    def _either(self, key: str) -> re.Pattern[str]:
        patterns = self._content.get(key)
        return self._compiled(key, "|".join(patterns)) if patterns else _NEVER

    def _compiled(self, key: str, pattern: str | None) -> re.Pattern[str]:
        if pattern is None:
            return _NEVER
        try:
            return re.compile(self._expand(pattern))
        except re.error as error:
            raise ValueError(f"{self._file}: {key} is no regular expression: {error}") from error

    def _expand(self, pattern: str) -> str:
        return _MACRO.sub(lambda macro: self._macros.get(macro[1], macro[0]), pattern)


def _lowered(pattern: str) -> str:
    return _LETTER.sub(lambda found: found[1] or found[0].lower(), pattern)


def _character_table(content: Mapping[str, Any]) -> dict[int, str]:
    """Return the table of `fold` (ranges whose characters become their compatible form) and `replace`."""
    table: dict[int, str] = {}
    for first, last in content["fold"]:
        for code in range(ord(first), ord(last) + 1):
            folded = unicodedata.normalize("NFKC", chr(code))
            if folded != chr(code):
                table[code] = folded
    for characters, replacement in content["replace"]:
        table |= {ord(character): replacement for character in characters}
    # Marks of writing direction and the like: nothing that is read.
    table |= {code: "" for code in range(0x20) if chr(code) not in "\t\n\x0b\x0c\r\x1c\x1d\x1e\x1f"}
    return table
