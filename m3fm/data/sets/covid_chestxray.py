# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""The COVID-19 image data collection (Cohen et al.), "COVID-CXR": radiographs and some CT from publications.

Read is the repository's `metadata.csv`, of its first weeks too, with `images/` and what was fetched into `volumes/`.

A study is an image: rows of one patient are days apart, or views. COVID-19 is negative where a row has another
finding; all else that a row does not name is unmentioned. The clinical notes are the English report, and doi and url
of the publication its documents. The set has no parts.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path, PurePosixPath

from ..labels import label_names, shared_findings
from ..report_sections import report_from_text
from ..schema import ImageFile, LabelState, ReportText, StudyRecord
from ..tables import Reading, Row, read_csv, shown
from .demographics import age_in_years, sex_letter
from .layouts import columns_of, find_base, plain_name, table_in
from .study_set import StudySet

__all__ = ["SETS"]

SOURCE = "covid_chestxray"
COVID = "COVID-19"
_TABLES = ("metadata.csv",)
_COLUMNS = ("finding", "view", "filename", "url")
_LANGUAGE = "en"
_MODALITIES = {"x-ray": "cxr", "ct": "ct"}
_VIEWS = {"L": "LATERAL"}
# What the table calls images of which nobody has said yet what they show.
_UNKNOWN = ("todo", "Unknown", "")
# Over the years the table had these names for the same columns.
_PATIENT_COLUMNS = ("patientid", "Patientid")
_NOTES_COLUMNS = ("clinical_notes", "clinical notes", "notes")
_UNSTATED = "unstated in metadata"


def _read(root: Path, reading: Reading) -> Iterator[StudyRecord]:
    """Yield a study for each row, which is an image: rows of one patient are days apart, or views.

    A finding such as "Pneumonia/Viral/COVID-19" is positive with all that stand above it. COVID-19 is negative where
    a row has another finding; all else that a row does not name is unmentioned. The clinical notes, which describe
    image and patient, are the English report. Of an image the doi and url of its publication are its documents.
    """
    base = find_base(root, _TABLES) or root
    table = table_in(base, _TABLES) or base / _TABLES[0]
    seen: set[str] = set()

    def parse(row: Row) -> StudyRecord:
        record = _record(row, base, reading)
        if record.study_id in seen:
            raise row.bad("duplicate_id", "an earlier line has an image of this name, with whatever suffix")
        seen.add(record.study_id)
        return record

    yield from reading.each(read_csv(table, _COLUMNS, reading, has_long_text=True), parse)


def _record(row: Row, base: Path, reading: Reading) -> StudyRecord:
    name = plain_name(row, "filename")
    try:
        labels, findings = _states(row.get("finding") or "")
    except KeyError:
        # Not quoted: notes stand here where a row has slipped.
        raise row.bad("bad_label", "column 'finding' is none of the findings of this set") from None
    try:
        age = age_in_years(row.get("age"))
    except ValueError as error:
        raise row.bad("bad_value", f"column 'age': {error}") from None
    modality, view = _modality(row)
    folder = row.get("folder") or "images"
    if PurePosixPath(folder).is_absolute() or ".." in PurePosixPath(folder).parts:
        raise row.bad("bad_value", "column 'folder' must be a folder of the set")
    documents = [f"{kind}:{value}" for kind in ("doi", "url") if (value := row.get(kind))]
    return StudyRecord(
        study_id=_stem(name),
        source=SOURCE,
        modality=modality,
        patient_id=_first(row, _PATIENT_COLUMNS),
        documents=tuple(documents),
        images=(ImageFile(reading.image(row, base / folder / name), view=view),),
        reports=_reports(row),
        labels=labels,
        findings=findings,
        age=age,
        sex=sex_letter(row.get("sex")),
        licence=row.get("license") or _UNSTATED,
    )


def _first(row: Row, columns: tuple[str, ...]) -> str | None:
    return next(filter(None, map(row.get, columns)), None)


def _stem(name: str) -> str:
    return name.removesuffix(".gz").rpartition(".")[0] or name


def _modality(row: Row) -> tuple[str, str | None]:
    """Return modality and view; early tables tell a CT by the view alone."""
    view = row.get("view")
    told = row.get("modality") or ("CT" if view == "CT" else "X-ray")
    if told.lower() not in _MODALITIES:
        raise row.bad("bad_value", f"column 'modality' must be X-ray or CT, got {shown(told)}")
    if view is None or view == "CT":
        return _MODALITIES[told.lower()], None
    return _MODALITIES[told.lower()], _VIEWS.get(view, view.upper())


def _reports(row: Row) -> dict[str, ReportText]:
    notes = _first(row, _NOTES_COLUMNS)
    report = report_from_text(notes, _LANGUAGE) if notes else None
    return {} if report is None else {_LANGUAGE: report}


@lru_cache(maxsize=256)
def _states(finding: str) -> tuple[dict[str, LabelState], dict[str, LabelState]]:
    """Return the states of a finding; levels are parted by "/", and in early tables findings by ",".

    Raises:
        KeyError: For one that is not known.
    """
    labels = dict.fromkeys(sorted(label_names(SOURCE)), LabelState.UNMENTIONED)
    if finding in _UNKNOWN:
        return labels, {}
    for name in finding.replace(",", "/").split("/"):
        if name.strip() not in labels:
            raise KeyError(name.strip())
        labels[name.strip()] = LabelState.POSITIVE
    if labels[COVID] is LabelState.UNMENTIONED:
        labels[COVID] = LabelState.NEGATIVE
    return labels, shared_findings(labels, SOURCE)


def _recognises(root: Path) -> bool:
    base = find_base(root, _TABLES)
    if base is None:
        return False
    return columns_of(table_in(base, _TABLES)).issuperset(_COLUMNS)


SET = StudySet(
    name=SOURCE,
    title="COVID-19 image data collection (COVID-CXR)",
    licence="by image, as its row states; images come from publications",
    url="https://github.com/ieee8023/covid-chestxray-dataset",
    reference="Cohen et al., COVID-19 Image Data Collection: Prospective Predictions Are the Future, MELBA 2020",
    layout=("metadata.csv", "images/*", "volumes/* (CT; to be fetched from where the rows point)"),
    recognises=_recognises,
    read=_read,
)
SETS: tuple[StudySet, ...] = (SET,)
