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
from bisect import bisect_left, bisect_right
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
#: Sections of what is known before the images are read.
_FIELDS = ("examination", "indication", "history", "technique", "comparison")
_ADMINISTRATIVE = "administrative"
_LINE_END = re.compile(r"\r\n?|[\u0085\x0b\x0c]")
# Nobody wraps lines with these: they end an item or a paragraph.
_PARAGRAPH_END = re.compile(r"[\u2028\u2029]")
# A line that goes on with the sentence of the line before it starts in lower case.
_NEW_LINE = re.compile(r"\n\s*(?=[^\sa-z])")
_RULED_LINE = re.compile(r"(?m)^[^\S\n]*[_=*—-]{4,}[^\S\n]*$")
# Text that starts with a heading without capitals has others of its kind.
_LOWER_HEADING = re.compile(r"\s*[a-z][a-z ]{3,30}:")
# Lower case that moves no character, of full-width letters, too.
_WIDE = "".join(chr(ord(letter) + 0xFEE0) for letter in string.ascii_letters)
_LOWER = str.maketrans(string.ascii_uppercase + _WIDE, string.ascii_lowercase * 3)
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
        Findings and impression, cleaned, or the whole where no section is stated; lines with a signature are left
        out. None where there is no text at all.

    Raises:
        ValueError: For a language without rules.
    """
    if not raw or not raw.strip():
        return None
    sections = split_sections(raw, language)
    if _FINDINGS in sections or _IMPRESSION in sections:
        return report_from_sections(sections.get(_FINDINGS), sections.get(_IMPRESSION), language, raw, is_translated)
    text = clean_fully(_unsigned(sections.get(BODY, ""), language), language).text
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
        The report; a sentence that both sections say is once in its text, and lines with a signature are left out.
        None where both are empty.

    Raises:
        ValueError: For a language without rules.
    """
    sections = [part if part and part.strip() else None for part in (findings, impression)]
    stated = [part for part in sections if part is not None]
    if not stated:
        return None
    unsigned = [None if part is None else _unsigned(part, language) for part in sections]
    text = clean_fully("\n\n".join(part for part in unsigned if part is not None), language).text
    cleaned = [None if part is None else clean_fully(part, language).text for part in unsigned]
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
        findings nor impression is headed, what the report says all the same. Where an impression alone is headed,
        sentences before it are the findings.

    Raises:
        ValueError: For a language without rules.
    """
    rules = load_report_rules(language)
    parts = _parts(_RULED_LINE.sub("", _with_line_ends(raw)), rules)
    found = {part.section for part in parts}
    if found.isdisjoint(_REPORT):
        parts = _with_body(parts, rules)
    elif _IMPRESSION in found and _FINDINGS not in found:
        parts = _with_findings(parts, rules)
    sections: dict[str, list[str]] = {}
    for part in parts:
        sections.setdefault(part.section, []).append(part.text)
    return {section: "\n".join(texts) for section, texts in sections.items()}


def _with_line_ends(text: str) -> str:
    return _LINE_END.sub("\n", _PARAGRAPH_END.sub("\n\n", text))


def _unsigned(text: str, language: str) -> str:
    """Take lines with a signature out."""
    lines = _with_line_ends(text)
    unsigned = load_report_rules(language).signature.sub("", lines)
    return text if unsigned == lines else unsigned


def _parts(text: str, rules: ReportRules) -> list[_Part]:
    """Split text at its headings; parts without text are left out."""
    parts: list[_Part] = []
    section, start, title = _PREAMBLE, 0, ""
    for heading, heading_start, heading_end in [*_headings(text, rules), (_PREAMBLE, len(text), len(text))]:
        if section == _VIEWS and _is_prose(text[start:heading_start].strip(), rules):
            # "CHEST, PA AND LATERAL:" is the report where a report follows it, and its title otherwise.
            section = _FINDINGS
        if heading in (_UNKNOWN, _VIEWS) and section in _REPORT:
            continue
        words = text[start:heading_start].strip()
        if section == _VIEWS:
            section, words = "examination", f"{title} {words}".strip()
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
    found: list[tuple[str, int, int]] = []
    has_lower = _LOWER_HEADING.match(text) is not None
    for match in rules.headings.finditer(text.translate(_LOWER)):
        section, _, end = found[-1] if found else ("", 0, 0)
        follows_field = section in (*_FIELDS, _ADMINISTRATIVE) and text.find("\n", end, match.start()) < 0
        if _is_heading(match, text, follows_field, has_lower):
            found.append((str(match.lastgroup), match.start(), match.end()))
    starts, ends = [start for _, start, _ in found], [end for _, _, end in found]
    for match in rules.unknown_heading.finditer(text):
        # The named headings do not overlap: one alone can hold the first character of the name, and one its end.
        first, last = bisect_right(starts, match.start(1)) - 1, bisect_left(starts, match.end()) - 1
        if (first < 0 or match.start(1) >= ends[first]) and (last < 0 or match.end() > ends[last]):
            found.append((_section_of(match[1], rules), match.start(), match.end()))
    found += [(_PREAMBLE, match.start(), match.end()) for match in rules.frame.finditer(text)]
    return sorted(found, key=lambda heading: heading[1:])


def _is_heading(match: re.Match[str], text: str, follows_field: bool, has_lower: bool) -> bool:
    """Tell whether the name of a section heads one: it stands in sentences, too.

    On a line of its own it heads one in any case, after a line that ends; within a line in capitals, or with a capital
    after a sentence or a field of the same line. (Chinese has no case: `islower` and `isupper` are both false.)

    Args:
        match: Of `ReportRules.headings`.
        text: What it was found in.
        follows_field: Whether the heading before it is on the same line and heads no part of the report.
        has_lower: Whether the text starts with a heading without capitals.
    """
    name = text[slice(*match.span(str(match.lastgroup)))]
    # Each step back ends at the word before the heading: time does not grow with what precedes it.
    start = match.start()
    while start and text[start - 1] in _MARKS:
        start -= 1
    last = start
    while last and text[last - 1].isspace():
        last -= 1
    has_mark = match[0].rstrip()[-1] in _HEADING_MARKS
    follows_end = text[max(last - 1, 0) : last] in _SENTENCE_ENDS
    if start and text[start - 1] != "\n":
        # "FINDINGS:" and "Clear. Impression:", but neither "the findings: ..." nor "... at this time: 5 pm".
        if follows_field and match.lastgroup in (*_FIELDS, *_REPORT, _ADMINISTRATIVE):
            return has_mark and not name[0].islower()
        in_line = name.isupper() or (follows_end and not name.islower() and not name[0].islower())
        return has_mark and in_line and match.lastgroup != _ADMINISTRATIVE
    if name[0].islower() or not has_mark:
        # "Impression", and nothing else on its line, heads one after a line without a full stop, too.
        is_alone = match.lastgroup in (_FINDINGS, _IMPRESSION) and text[match.end() : match.end() + 1] in ("", "\n")
        starts_line = follows_end or text.endswith("\n\n", 0, start) or has_lower
        return name.isupper() or starts_line or (is_alone and not name[0].islower())
    return True


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
            return [*parts[:number], *_without_title(part, BODY, rules), *parts[number + 1 :]]
    return _with_rest(parts, rules)


def _without_title(part: _Part, section: str, rules: ReportRules) -> list[_Part]:
    """Give what follows the paragraphs that are titles to a section."""
    paragraphs = _paragraphs(part.text, rules)
    # Of notes alone ("No effusion", "Clear") only what names views is a title.
    has_prose = any(_is_prose(paragraph, rules) for paragraph in paragraphs)
    titles = 0
    while titles < len(paragraphs) - 1 and not _is_prose(paragraphs[titles], rules):
        if not has_prose and rules.views.search(paragraphs[titles]) is None:
            break
        titles += 1
    title = [_Part(part.section, "\n\n".join(paragraphs[:titles]))] if titles else []
    return [*title, _Part(section, "\n\n".join(paragraphs[titles:]))]


def _with_rest(parts: list[_Part], rules: ReportRules) -> list[_Part]:
    """Find the report behind the first sentence of a field, as of "Technique: PA. Lungs are clear".

    Sentences that still ask, or say how the images were taken, stay in the field. Behind a name only another line is
    looked at, for a name may have full stops in it.
    """
    fields = [n for n in reversed(range(len(parts))) if parts[n].section in _FIELDS]
    names = [n for n in reversed(range(len(parts))) if parts[n].section == _ADMINISTRATIVE]
    for number in [*fields, *names]:
        part = parts[number]
        is_name = part.section == _ADMINISTRATIVE
        ends = {match.end() for match in _NEW_LINE.finditer(part.text)}
        ends |= set() if is_name else {match.end() for match in rules.sentence_end.finditer(part.text)}
        bounds = [*sorted(ends), len(part.text)]
        pairs = zip(bounds, bounds[1:], strict=False)
        start = next((a for a, b in pairs if not rules.no_finding.search(part.text[a:b].lower())), None)
        pattern = rules.statement if is_name else rules.prose
        if start is not None and pattern.search(part.text, start):
            split = [_Part(part.section, part.text[:start].strip()), _Part(BODY, part.text[start:])]
            return [*parts[:number], *split, *parts[number + 1 :]]
    return parts


def _with_findings(parts: list[_Part], rules: ReportRules) -> list[_Part]:
    """Find the findings where the impression alone is headed: sentences that stand right before it."""
    if any(part.section == BODY and _is_prose(part.text, rules) for part in parts):
        return [_Part(_FINDINGS, part.text) if part.section == BODY else part for part in parts]
    number = next(n for n, part in enumerate(parts) if part.section == _IMPRESSION) - 1
    if number < 0:
        return parts
    part = parts[number]
    if part.section == _PREAMBLE:
        split = _without_title(part, _FINDINGS, rules)
    elif part.section in _FIELDS:
        first, *others = _paragraphs(part.text, rules)
        split = [_Part(part.section, first), _Part(_FINDINGS, "\n\n".join(others))]
    else:
        return parts
    # "Portable chest, 5 a.m." is a title with a full stop.
    words = split[-1].text
    is_title = rules.views.search(words) is not None and rules.statement.search(words) is None
    return parts if is_title or not _is_prose(words, rules) else [*parts[:number], *split, *parts[number + 1 :]]


def _paragraphs(text: str, rules: ReportRules) -> list[str]:
    return [paragraph.strip() for paragraph in rules.paragraph_end.split(text)]


def _is_prose(text: str, rules: ReportRules) -> bool:
    """Tell a sentence from a title."""
    return rules.prose.search(text) is not None
