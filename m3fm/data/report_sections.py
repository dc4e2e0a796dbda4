# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Reports parsed into sections and cleaned, with the text kept as it was published.

How sections are headed is data, see `report_rules`. The rules for reports that name no section were learned from the
parser that the publishers of MIMIC-CXR use (MIT-LCP/mimic-cxr, `txt/section_parser.py`): a heading that names views
starts the findings, and where nothing is headed findings or impression the paragraphs after the first of the last
section are the report.
"""

from __future__ import annotations

import difflib
import re
import string
from dataclasses import dataclass
from functools import lru_cache

from .report_rules import ReportRules, load_report_rules
from .report_text import clean_fully
from .schema import ReportText

__all__ = ["report_from_sections", "report_from_text", "split_sections"]

#: The section of what stands under no heading and is no title.
BODY = "body"
_FINDINGS, _IMPRESSION, _PREAMBLE = "findings", "impression", "preamble"
_REPORT = (_FINDINGS, _IMPRESSION, BODY)
# A heading of capitals that has none of the names, or that names views.
_UNKNOWN, _VIEWS = "unknown", "views"
#: Sections that stand behind the report.
_AFTER_REPORT = ("recommendation", "notification", "addendum", "dose", "comment", "administrative")
_LINE_END = re.compile(r"\r\n?|[\u2028\u2029\u0085\x0b\x0c]")
_RULED_LINE = re.compile(r"(?m)^[^\S\n]*[_=*—-]{4,}[^\S\n]*$")
# Text that starts with a heading without capitals has others of its kind.
_LOWER_HEADING = re.compile(r"\s*[a-z][a-z ]{3,30}:")
# Lower case that moves no character.
_LOWER = str.maketrans(string.ascii_uppercase, string.ascii_lowercase)
# What may stand between a heading and what precedes it, what a heading ends with, and what a sentence ends with.
_MARKS = " \t【[〔*#"
_HEADING_MARKS = ":：】]〕"
# With "", the start of the text.
_SENTENCE_ENDS = ("", *".!?;:。！？；：】")
# A misspelt heading is as close as this to the name (`difflib`): "IMPRESSOIN" is, "INDICATION" and "FINDINGS" are not.
_CLOSE = 0.8


@dataclass(frozen=True)
class _Part:
    """What stands under one heading.

    Attributes:
        section: Its section.
        text: Without the heading.
    """

    section: str
    text: str


def report_from_text(raw: str, language: str, is_translated: bool = False) -> ReportText | None:
    """Parse and clean a report as its set publishes it.

    Args:
        raw: The report with its line ends.
        language: Language code.
        is_translated: Whether a machine translated it.

    Returns:
        Findings and impression, cleaned, or the whole where no section is stated; None where there is no text at all.

    Raises:
        ValueError: For a language without rules.
    """
    if not raw or not raw.strip():
        return None
    sections = split_sections(raw, language)
    if _FINDINGS in sections or _IMPRESSION in sections:
        return report_from_sections(sections.get(_FINDINGS), sections.get(_IMPRESSION), language, raw, is_translated)
    text = clean_fully(sections.get(BODY, ""), language).text
    return ReportText(text, raw=raw, is_translated=is_translated)


def report_from_sections(
    findings: str | None, impression: str | None, language: str, raw: str | None = None, is_translated: bool = False
) -> ReportText | None:
    """Clean a report whose set gives its sections apart.

    Args:
        findings: As published.
        impression: As published.
        language: Language code.
        raw: The whole report as published; None for the sections, one under the other.
        is_translated: Whether a machine translated it.

    Returns:
        The report; a sentence that both sections say is once in its text. None where both are empty.

    Raises:
        ValueError: For a language without rules.
    """
    sections = [part if part and part.strip() else None for part in (findings, impression)]
    stated = [part for part in sections if part is not None]
    if not stated:
        return None
    text = clean_fully("\n\n".join(stated), language).text
    cleaned = [None if part is None else clean_fully(part, language).text for part in sections]
    return ReportText(text, *cleaned, raw=raw or "\n".join(stated), is_translated=is_translated)


def split_sections(raw: str, language: str) -> dict[str, str]:
    """Split a report by its headings.

    Args:
        raw: The report with its line ends.
        language: Language code.

    Returns:
        Section to text, in the order of the report and not cleaned; sections without text are left out. Sections are
        "findings", "impression" (also of findings and impression in one), "examination", "indication", "history",
        "technique", "comparison", "recommendation", "notification", "wet_read", "preliminary", "addendum", "dose",
        "comment", "administrative", "preamble" (what stands before the first heading), and "body": where neither
        findings nor impression is headed, what the report says all the same.

    Raises:
        ValueError: For a language without rules.
    """
    rules = load_report_rules(language)
    parts = _parts(_RULED_LINE.sub("", _LINE_END.sub("\n", raw)), rules)
    if not any(part.section in _REPORT for part in parts):
        parts = _with_body(parts, rules)
    sections: dict[str, str] = {}
    for part in parts:
        sections[part.section] = f"{sections[part.section]}\n{part.text}" if part.section in sections else part.text
    return sections


def _parts(text: str, rules: ReportRules) -> list[_Part]:
    """Split text at its headings; parts without text are left out."""
    parts: list[_Part] = []
    section, start, title = _PREAMBLE, 0, ""
    for heading, heading_start, heading_end in [*_headings(text, rules), (_PREAMBLE, len(text), len(text))]:
        words = text[start:heading_start].strip()
        reports = section in _REPORT or (section == _VIEWS and _is_prose(words, rules))
        if heading in (_UNKNOWN, _VIEWS) and reports:
            continue
        if section == _VIEWS:
            # "CHEST, PA AND LATERAL:" is the report where a report follows it, and its title otherwise.
            section, words = (_FINDINGS, words) if reports else ("examination", f"{title} {words}".strip())
        if words:
            parts.append(_Part(section, words))
        title = text[heading_start:heading_end].strip(" \t\n:")
        # The name of an unknown heading may be all that says what is spoken of: "LUNGS: Clear."
        section, start = (BODY, heading_start) if heading == _UNKNOWN else (heading, heading_end)
    return parts


def _headings(text: str, rules: ReportRules) -> list[tuple[str, int, int]]:
    """Return section, start and end of every heading, in order."""
    if not any(mark in text for mark in _HEADING_MARKS + "\n"):
        return []
    found = [
        (str(match.lastgroup), match.start(), match.end())
        for match in rules.headings.finditer(text.translate(_LOWER))
        if _is_heading(match, text)
    ]
    for match in rules.unknown_heading.finditer(text):
        if not any(start <= match.start(1) < end or start < match.end() <= end for _, start, end in found):
            found.append((_section_of(match[1], rules), match.start(), match.end()))
    found += [(_PREAMBLE, match.start(), match.end()) for match in rules.frame.finditer(text)]
    return sorted(found, key=lambda heading: heading[1:])


def _is_heading(match: re.Match[str], text: str) -> bool:
    """Tell whether the name of a section heads one: it stands in sentences, too.

    On a line of its own it heads one in any case, after a line that ends; within a line in capitals, or with a capital
    after a sentence. (Chinese has no case: `islower` and `isupper` are both false.)
    """
    name = text[slice(*match.span(str(match.lastgroup)))]
    before = text[: match.start()]
    has_mark = match[0].rstrip()[-1] in _HEADING_MARKS
    follows_end = before.rstrip()[-1:] in _SENTENCE_ENDS
    if before.rpartition("\n")[2].strip(_MARKS):
        # "FINDINGS:" and "Clear. Impression:", but neither "the findings: ..." nor "... at this time: 5 pm".
        in_line = name.isupper() or (follows_end and not name.islower() and not name[0].islower())
        return has_mark and in_line and match.lastgroup != "administrative"
    starts_line = follows_end or before.rstrip(" \t").endswith("\n\n") or _LOWER_HEADING.match(text) is not None
    return name.isupper() or (starts_line if name[0].islower() or not has_mark else True)


@lru_cache(maxsize=1 << 12)
def _section_of(name: str, rules: ReportRules) -> str:
    """Return the section of a heading of capitals with a name of its own."""
    close = difflib.get_close_matches(name.lower().strip(), rules.heading_names, 1, _CLOSE)
    if close:
        return rules.heading_names[close[0]]
    return _VIEWS if rules.views.search(name) else _UNKNOWN


def _with_body(parts: list[_Part], rules: ReportRules) -> list[_Part]:
    """Find the report where no section is stated: the end of the last section, or else what precedes all headings."""
    last = next((n for n in reversed(range(len(parts))) if parts[n].section not in _AFTER_REPORT), None)
    if last is not None and parts[last].section != _PREAMBLE:
        first, *others = _paragraphs(parts[last].text, rules)
        if others:
            return [
                *parts[:last],
                _Part(parts[last].section, first),
                _Part(BODY, "\n\n".join(others)),
                *parts[last + 1 :],
            ]
    for number, part in enumerate(parts):
        if part.section == _PREAMBLE and (len(parts) == 1 or _is_prose(part.text, rules)):
            paragraphs = _paragraphs(part.text, rules)
            titles = 0
            while titles < len(paragraphs) - 1 and not _is_prose(paragraphs[titles], rules):
                titles += 1
            body = _Part(BODY, "\n\n".join(paragraphs[titles:]))
            title = [_Part(_PREAMBLE, "\n\n".join(paragraphs[:titles]))] if titles else []
            return [*parts[:number], *title, body, *parts[number + 1 :]]
    return parts


def _paragraphs(text: str, rules: ReportRules) -> list[str]:
    return [paragraph.strip() for paragraph in rules.paragraph_end.split(text)]


def _is_prose(text: str, rules: ReportRules) -> bool:
    """Tell a sentence from a title."""
    return rules.prose.search(text) is not None
