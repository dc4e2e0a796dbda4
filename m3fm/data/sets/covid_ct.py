# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""COVID-19 CT: chest CT with Chinese reports, the set of Medical-VLBERT (Liu et al., TNNLS 2021).

Public are a page (https://covid19ct.github.io) with links to an archive of scans and a spreadsheet of reports, and an
example on it, which shows what a report has: Case ID, Finding, Conclusion, Gender, Age and Test Result. How the two
are laid out is documented nowhere, nor is the split of the papers. Two layouts are read:

1. The spreadsheet, saved as `reports.csv` (CSV in UTF-8) with the columns of the example, and the slices of a case in
   a folder that its id names: `images/CASE_ID/*`. These folders are assumed.
2. R2Gen's `annotation.json` with Chinese reports and a folder `images` beside it, into which code for report
   generation, M3FM's among it, wants its sets brought.

The label is the result of the laboratory test, where the spreadsheet has it: it is no finding of the image.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from ..labels import shared_findings
from ..report_sections import report_from_sections, report_from_text
from ..schema import ImageFile, LabelState, ReportText, StudyRecord
from ..tables import BadRow, Reading, Row, open_text, read_csv
from .annotation_json import ANNOTATIONS, Entry, opening, read_annotations
from .demographics import age_in_years, sex_letter
from .layouts import find_base, plain_name, table_in
from .study_set import StudySet

__all__ = ["SETS"]

_NAME = "covid_ct"
_LICENCE = "academic research alone, by the licence agreement on the set's page"
_REPORTS = ("reports.csv", "Medical Reports.csv")
_COLUMNS = ("Case ID", "Finding", "Conclusion", "Gender", "Age", "Test Result")

# A report whose text starts in Chinese, as it is or escaped; that is how it differs from other sets of R2Gen's layout.
_CHINESE_REPORT = re.compile(r'"report"\s*:\s*"\s*(?:[\u3400-\u9fff]|\\u[3-9][0-9a-fA-F]{3})')

_TEST = "Test Result"
_TEST_STATES = {"阳性": LabelState.POSITIVE, "阴性": LabelState.NEGATIVE, None: LabelState.UNMENTIONED}


def _recognises(root: Path) -> bool:
    if _CHINESE_REPORT.search(opening(find_base(root, (ANNOTATIONS,)))) is not None:
        return True
    base = find_base(root, _REPORTS)
    if base is None:
        return False
    with open_text(table_in(base, _REPORTS)) as file:
        head = file.readline(1000)
    return all(column in head for column in _COLUMNS)


def _read(root: Path, reading: Reading) -> Iterator[StudyRecord]:
    tables = find_base(root, _REPORTS)
    annotated = find_base(root, (ANNOTATIONS,))
    if tables is None and annotated is None:
        raise BadRow("missing_file", root, None, f"expected {ANNOTATIONS} or {_REPORTS[0]}, got neither")
    yield from _read_table(tables, reading) if annotated is None else _read_entries(annotated, reading)


def _read_entries(base: Path, reading: Reading) -> Iterator[StudyRecord]:
    seen: set[str] = set()

    def record(entry: Entry) -> StudyRecord:
        study_id = entry.require("id")
        report = report_from_text(entry.require("report"), "zh")
        rows = [Row(entry.file, entry.line, {"path": path}) for path in entry.image_paths()]
        _once(entry, study_id, seen)
        paths = reading.each(rows, lambda row: reading.image(row, base / "images" / row.require("path")))
        return _record(study_id, paths, report, split=entry.split)

    for study in reading.each(read_annotations(table_in(base, (ANNOTATIONS,)), reading), record):
        if study.images:
            yield study


def _read_table(base: Path, reading: Reading) -> Iterator[StudyRecord]:
    seen: set[str] = set()

    def record(row: Row) -> StudyRecord:
        study_id = plain_name(row, "Case ID")
        state = _TEST_STATES.get(row.get(_TEST))
        if state is None:
            expected = " or ".join(filter(None, _TEST_STATES))
            raise row.bad("bad_label", f"column {_TEST!r} must be {expected}, or empty")
        try:
            age = age_in_years(row.get("Age"))
        except ValueError as error:
            raise row.bad("bad_value", f"column 'Age': {error}") from None
        report = report_from_sections(row.get("Finding"), row.get("Conclusion"), "zh")
        _once(row, study_id, seen)
        folder = base / "images" / study_id
        slices = sorted(path for path in folder.glob("*") if path.is_file() and path.name[0] != ".")
        if not slices and reading.images == "required":
            raise row.bad("missing_file", f"the case has no folder with slices in {folder.parent}")
        return _record(study_id, slices, report, labels={_TEST: state}, sex=sex_letter(row.get("Gender")), age=age)

    return reading.each(read_csv(table_in(base, _REPORTS), _COLUMNS, reading, has_long_text=True), record)


def _once(row: Row, study_id: str, seen: set[str]) -> None:
    if study_id in seen:
        raise row.bad("duplicate_id", "the study of this row was already given by an earlier one")
    seen.add(study_id)


def _record(
    study_id: str,
    slices: Iterable[Path],
    report: ReportText | None,
    labels: Mapping[str, LabelState] | None = None,
    sex: str | None = None,
    age: float | None = None,
    split: str | None = None,
) -> StudyRecord:
    labels = labels or {}
    return StudyRecord(
        study_id=study_id,
        source=_NAME,
        modality="ct",
        images=tuple(ImageFile(path, view="AXIAL") for path in slices),
        reports={} if report is None else {"zh": report},
        labels=labels,
        findings=shared_findings(labels, _NAME),
        age=age,
        sex=sex,
        split=split,
        licence=_LICENCE,
    )


SET = StudySet(
    name=_NAME,
    title="COVID-19 CT (Chinese reports, Medical-VLBERT)",
    licence=_LICENCE,
    url="https://covid19ct.github.io",
    reference="Liu et al., IEEE TNNLS 32(9):3786-3797, 2021, doi:10.1109/TNNLS.2021.3099165",
    layout=(
        f"{_REPORTS[0]} (the spreadsheet saved as CSV), images/CASE_ID/* (assumed)",
        f"{ANNOTATIONS}, images/* (R2Gen's layout)",
    ),
    recognises=_recognises,
    read=_read,
    published={"studies": 368, "images": 1104},
)
SETS: tuple[StudySet, ...] = (SET,)
