# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Studies of an own folder as its rows give them, and those that wait for further rows."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import astuple, dataclass, field, replace
from functools import cached_property

from ..report_sections import report_from_sections, report_from_text
from ..report_text import clean_report, repair_characters
from ..schema import ReportText, StudyRecord

__all__ = ["FolderStudy", "RowText", "WaitingStudies"]


@dataclass(frozen=True)
class RowText:
    """Hold a report as the row gives it: as a whole, in sections, or both.

    Attributes:
        language: Its code.
        whole: The report.
        findings: The section.
        impression: The section.
    """

    language: str
    whole: str | None = field(repr=False)
    findings: str | None = field(repr=False)
    impression: str | None = field(repr=False)

    @cached_property
    def light(self) -> str:
        """The text that training and evaluation take from an own folder.

        A report is taken as it was written, with lost characters repaired; sections are joined and cleaned by
        `clean_report`, as those of Open-i are. May be empty.
        """
        if self.whole is not None:
            return repair_characters(self.whole)
        return clean_report(" ".join(filter(None, (self.findings, self.impression))))

    def parse(self) -> ReportText | None:
        """Return the report with its sections, cleaned, the text of the row kept; None where nothing is left."""
        sections = report_from_sections(self.findings, self.impression, self.language)
        if self.whole is None:
            return sections
        report = report_from_text(self.whole, self.language)
        if report is None or sections is None:
            return report
        return replace(report, findings=sections.findings, impression=sections.impression)


@dataclass(frozen=True)
class FolderStudy:
    """One study of an own folder.

    Attributes:
        record: All but its reports.
        texts: Language code to report; may be empty.
        examination: The CT that the study is a slice of.
    """

    record: StudyRecord
    texts: Mapping[str, RowText] = field(repr=False)
    examination: str | None = field(repr=False)

    @property
    def light_reports(self) -> dict[str, str]:
        """Language code to `RowText.light`, where that is not empty."""
        return {language: text.light for language, text in self.texts.items() if text.light}

    def with_reports(self) -> StudyRecord:
        """Return the whole record."""
        parsed = {language: text.parse() for language, text in self.texts.items()}
        return replace(self.record, reports={code: report for code, report in parsed.items() if report is not None})


class WaitingStudies:
    """Keep studies in the order in which they came.

    All but the first are packed: where the views of a study lie far from each other, whole tables wait, and a packed
    study takes a tenth of the memory.
    """

    def __init__(self) -> None:
        self._studies: dict[str, FolderStudy | bytes] = {}

    @property
    def first(self) -> str | None:
        """The id of the study that waits longest."""
        return next(iter(self._studies), None)

    def get(self, study_id: str) -> FolderStudy | None:
        """Return a study; None where it does not wait."""
        study = self._studies.get(study_id)
        return _unpack(study) if isinstance(study, bytes) else study

    def put(self, study: FolderStudy) -> None:
        """Add a study at the end, or change the one of its id."""
        study_id = study.record.study_id
        self._studies[study_id] = study if self.first in (None, study_id) else _pack(study)

    def pop(self, study_id: str) -> FolderStudy:
        """Return a study, which then waits no more."""
        study = self._studies.pop(study_id)
        return _unpack(study) if isinstance(study, bytes) else study


def _pack(study: FolderStudy) -> bytes:
    content = [study.record.as_row(), [astuple(text) for text in study.texts.values()], study.examination]
    return zlib.compress(json.dumps(content, ensure_ascii=False).encode(), level=1)


def _unpack(packed: bytes) -> FolderStudy:
    row, texts, examination = json.loads(zlib.decompress(packed))
    return FolderStudy(StudyRecord.from_row(row), {text[0]: RowText(*text) for text in texts}, examination)
