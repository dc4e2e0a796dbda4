# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""COV-CTR: slices of chest CT from publications, with reports in Chinese and English, in its two layouts.

1. The `annotation.json` of M3FM's authors, with a folder `images` beside it: 720 images, each in one entry for English
   (`label2` 1) and one for Chinese (0), in R2Gen's parts. They become one study.
2. The original release: `reports_ZH_EN.csv` beside the image files, without a split, and with an impression in Chinese
   that has no English. `terminologies`, a list of abnormalities in Chinese, is not read. Six images have a second row
   with other text, which is told as a duplicate: the first one counts.

The split is that of `annotation.json`, which has all studies it gives; the original release has none.

In both, what is there in two languages are the findings.

The images are those of COVID-CT (Zhao et al. 2020): figures of papers. Names tell of many which paper that is, and
figures of one paper show the same patients: see `StudyRecord.documents`. The published split does not respect that.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from ..labels import shared_findings
from ..report_sections import report_from_sections
from ..schema import ImageFile, LabelState, ReportText, StudyRecord
from ..tables import BadRow, Reading, Row, is_file, read_csv
from .annotation_json import ANNOTATIONS, Entry, opening, read_annotations
from .layouts import find_base, plain_name, table_in
from .study_set import StudySet

__all__ = ["SETS", "source_documents"]

_NAME = "cov_ctr"
_LICENCE = "images from publications, research use; M3FM's copy is in a repository under Apache-2.0"
_REPORTS = "reports_ZH_EN.csv"
_LANGUAGES = {1: "en", 0: "zh"}
# What `COVID` means for the set's two labels.
_POSITIVE_LABEL = {0: "non-COVID", 1: "COVID-19"}

# medRxiv and bioRxiv numbers, as files taken from preprints are named.
_PREPRINT = re.compile(r"\d{4}\.\d{2}\.\d{2}\.\d+")
# "kjr-21-e24-p5-31": the 31st image, on page 5.
_PAGE = re.compile(r"-p\d+-\d+")


def source_documents(file_name: str) -> tuple[str, ...]:
    """Tell the paper that an image was taken from, by the name of its file.

    Args:
        file_name: As COVID-CT calls it; "_" may stand for its "%".

    Returns:
        "doi:10.1101/..." for a preprint; else "study:12" for "12%0.jpg", figures of paper 12, and "article:kjr-21-e24"
        too where the name has pages.
    """
    preprint = _PREPRINT.match(file_name)
    if preprint is not None:
        return (f"doi:10.1101/{preprint.group()}",)
    stem = PurePosixPath(file_name).stem
    page = _PAGE.search(stem)
    article = (f"article:{stem[: page.start()]}",) if page else ()
    return (f"study:{re.split('[%_]', stem)[0]}", *article)


def _recognises(root: Path) -> bool:
    return find_base(root, (_REPORTS,)) is not None or '"label2"' in opening(find_base(root, (ANNOTATIONS,)))


def _read(root: Path, reading: Reading) -> Iterator[StudyRecord]:
    annotated = find_base(root, (ANNOTATIONS,))
    tables = find_base(root, (_REPORTS,))
    if annotated is None and tables is None:
        raise BadRow("missing_file", root, None, f"expected {ANNOTATIONS} or {_REPORTS}, got neither")
    yield from _read_table(tables, reading) if annotated is None else _read_entries(annotated, reading)


@dataclass
class _Image:
    """What the entries of one image have told so far."""

    path: Path = field(repr=False)
    covid: int
    split: str
    reports: dict[str, ReportText] = field(default_factory=dict, repr=False)


def _read_entries(base: Path, reading: Reading) -> Iterator[StudyRecord]:
    # All English entries of a part come before its Chinese ones.
    images: dict[str, _Image] = {}
    for entry in read_annotations(table_in(base, (ANNOTATIONS,)), reading):
        try:
            _add(images, entry, base / "images", reading)
        except BadRow as error:
            reading.tell(error)
    for image in images.values():
        name = image.path.name
        yield _record(name, image.path, image.covid, image.reports, image.split)


def _study_id(name: str) -> str:
    # Windows and URLs know "%" in another meaning; copies of the set write "_".
    return PurePosixPath(name).stem.replace("%", "_")


def _add(images: dict[str, _Image], entry: Entry, folder: Path, reading: Reading) -> None:
    paths = entry.image_paths()
    if len(paths) != 1:
        raise entry.bad("bad_value", f"image_path must name one image, got {len(paths)}")
    language = _LANGUAGES.get(_whole(entry.values.get("label2")))
    if language is None:
        raise entry.bad("bad_value", "label2, the language, must be 1 for English or 0 for Chinese")
    covid = _covid(entry)
    path = reading.image(entry, folder / paths[0])
    report = report_from_sections(entry.require("report"), None, language)
    known = images.setdefault(_study_id(paths[0]), _Image(path, covid, entry.split))
    if language in known.reports or known.split != entry.split or known.path != path:
        raise entry.bad("duplicate_id", "already given: in this language, in another part or by another name")
    if known.covid != covid:
        raise entry.bad("bad_label", "COVID differs from an earlier entry of the same image")
    known.reports[language] = report


def _read_table(base: Path, reading: Reading) -> Iterator[StudyRecord]:
    columns = ("image_id", "findings", "COVID", "impression", "reports_En")
    folders = [folder for folder in (base, base / "images", base / "COV-CTR") if folder.is_dir()]
    seen: set[str] = set()

    def record(row: Row) -> StudyRecord:
        name = plain_name(row, "image_id")
        study_id = _study_id(name)
        if study_id in seen:
            raise row.bad("duplicate_id", "an earlier line has an image of this name, with whatever suffix")
        covid = _covid(row)
        places = [folder / name for folder in folders]
        path = reading.image(row, next((each for each in places if is_file(each)), places[0]))
        seen.add(study_id)
        chinese = report_from_sections(row.get("findings"), row.get("impression"), "zh")
        english = report_from_sections(row.get("reports_En"), None, "en")
        return _record(name, path, covid, {"en": english, "zh": chinese}, None)

    return reading.each(read_csv(table_in(base, (_REPORTS,)), columns, reading, has_long_text=True), record)


def _record(
    name: str, path: Path, covid: int, reports: dict[str, ReportText | None], split: str | None
) -> StudyRecord:
    labels = {
        label: LabelState.POSITIVE if value == covid else LabelState.NEGATIVE
        for value, label in _POSITIVE_LABEL.items()
    }
    return StudyRecord(
        study_id=_study_id(name),
        source=_NAME,
        modality="ct",
        documents=source_documents(PurePosixPath(name).name),
        images=(ImageFile(path, view="AXIAL"),),
        reports={language: report for language, report in sorted(reports.items()) if report is not None},
        labels=labels,
        findings=shared_findings(labels, _NAME),
        split=split,
        licence=_LICENCE,
    )


def _covid(row: Row) -> int:
    covid = _whole(row.values.get("COVID"))
    if covid not in _POSITIVE_LABEL:
        raise row.bad("bad_label", "COVID must be 0 or 1")
    return covid


def _whole(value: object) -> int | None:
    """Return a whole number, which JSON has as such and CSV as text."""
    if isinstance(value, str) and value.strip() in ("0", "1"):
        return int(value)
    return value if type(value) is int else None


SET = StudySet(
    name=_NAME,
    title="COV-CTR (COVID-19 CT Reports)",
    licence=_LICENCE,
    url="https://github.com/mlii0117/COV-CTR",
    reference="Li et al., World Wide Web 26:253-270, 2023, doi:10.1007/s11280-022-01013-6",
    layout=(f"{ANNOTATIONS}, images/*", f"{_REPORTS}, image files beside it"),
    recognises=_recognises,
    read=_read,
    published={
        "studies": 720,
        "images": 720,
        "train_images": 576,
        "validation_images": 72,
        "test_images": 72,
    },
)
SETS: tuple[StudySet, ...] = (SET,)
