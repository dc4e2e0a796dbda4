# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Count what a data set holds: parts, languages, sections, labels, lengths, ages. Numbers alone, no id and no text."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from ..evaluation.tables import markdown_table
from ..evaluation.tokens import tokenize_report
from .labels import FINDINGS
from .schema import LANGUAGES, LabelState, ReportText, StudyRecord

__all__ = ["SetStatistics", "count_set", "statistics_markdown"]

UNSPLIT = "(none stated)"
_STATES = tuple(state.value for state in reversed(LabelState))
_QUANTILES = {"5 %": 0.05, "median": 0.5, "95 %": 0.95}
_DECADE = 10
_PARTS = ("train", "validation", "test")


class SetStatistics:
    """Counts studies one at a time; what it keeps grows with distinct values and not with images.

    Patients and texts are told apart by hashes, which are kept for the run alone.
    """

    def __init__(self) -> None:
        self.parts: dict[str, _Part] = defaultdict(_Part)
        self.views: Counter[str] = Counter()
        self.images_per_study: Counter[int] = Counter()
        self.languages = {language: _Texts(language) for language in LANGUAGES}
        self.labels: dict[str, Counter[str]] = defaultdict(Counter)
        self.findings: dict[str, Counter[str]] = defaultdict(Counter)
        self.ages: Counter[int] = Counter()
        self.sexes: Counter[str] = Counter()
        self.licences: Counter[str] = Counter()
        self.marks: Counter[str] = Counter()
        self.documents: set[int] = set()

    def add(self, record: StudyRecord) -> None:
        """Count one study."""
        self.parts[record.split or UNSPLIT].add(record)
        self.views.update(image.view or "unknown" for image in record.images)
        self.images_per_study[len(record.images)] += 1
        for language, report in record.reports.items():
            self.languages[language].add(report)
        for name, state in record.labels.items():
            self.labels[name][state.value] += 1
        for name, state in record.findings.items():
            self.findings[name][state.value] += 1
        if record.age is not None:
            self.ages[int(record.age // _DECADE) * _DECADE] += 1
        self.sexes[record.sex or "unknown"] += 1
        self.licences[record.licence or "not stated"] += 1
        self.marks.update({"boxes": len(record.boxes), "masks": len(record.masks)})
        self.documents.update(map(hash, record.documents))

    @property
    def studies(self) -> int:
        """How many were counted."""
        return sum(part.studies for part in self.parts.values())

    def as_dict(self) -> dict[str, Any]:
        """Return the counts as plain data."""
        patients: set[int] = set()
        patients.update(*(part.patients for part in self.parts.values()))
        return {
            "studies": self.studies,
            "patients": len(patients),
            "studies_without_patient": sum(part.without_patient for part in self.parts.values()),
            "documents": len(self.documents),
            "images": sum(part.images for part in self.parts.values()),
            "parts": {name: self.parts[name].as_dict() for name in sorted(self.parts, key=_part_order)},
            "views": dict(self.views.most_common()),
            "images_per_study": {str(count): self.images_per_study[count] for count in sorted(self.images_per_study)},
            "languages": {name: texts.as_dict() for name, texts in self.languages.items() if texts.reports},
            "labels": {name: _state_counts(self.labels[name], self.studies) for name in self.labels},
            "findings": {
                name: _state_counts(self.findings[name], self.studies) for name in FINDINGS if name in self.findings
            },
            "ages": {f"{low}-{low + _DECADE - 1}": self.ages[low] for low in sorted(self.ages)},
            "sexes": dict(self.sexes.most_common()),
            "licences": dict(self.licences.most_common()),
            **{name: self.marks[name] for name in ("boxes", "masks")},
        }


def _part_order(name: str) -> tuple[int, str]:
    return (_PARTS.index(name) if name in _PARTS else len(_PARTS), name)


class _Part:
    def __init__(self) -> None:
        self.studies = self.images = self.without_patient = 0
        self.patients: set[int] = set()
        self.modalities: Counter[str] = Counter()
        self.reports: Counter[str] = Counter()
        self.positive: Counter[str] = Counter()

    def add(self, record: StudyRecord) -> None:
        self.studies += 1
        self.images += len(record.images)
        self.modalities[record.modality] += 1
        self.reports.update(code for code, report in record.reports.items() if report.text)
        self.positive.update(name for name, state in record.findings.items() if state is LabelState.POSITIVE)
        if record.patient_id is None:
            self.without_patient += 1
        else:
            self.patients.add(hash(record.patient_id))

    def as_dict(self) -> dict[str, Any]:
        return {
            "studies": self.studies,
            "patients": len(self.patients),
            "images": self.images,
            "modalities": dict(self.modalities.most_common()),
            "reports": dict(self.reports),
            "positive": {name: self.positive[name] for name in FINDINGS if name in self.positive},
        }


class _Texts:
    """Counts the reports of one language."""

    def __init__(self, language: str) -> None:
        self.language = language
        self.counts: Counter[str] = Counter()
        self.lengths: Counter[int] = Counter()
        self.distinct: set[int] = set()

    @property
    def reports(self) -> int:
        return self.counts["reports"]

    def add(self, report: ReportText) -> None:
        self.counts["reports"] += 1
        self.counts["with_findings"] += bool(report.findings)
        self.counts["with_impression"] += bool(report.impression)
        self.counts["translated"] += report.is_translated
        self.counts["empty_when_cleaned"] += not report.text
        if report.text:
            self.lengths[len(tokenize_report(report.text, self.language))] += 1
            self.distinct.add(hash(report.text))

    def as_dict(self) -> dict[str, Any]:
        values, counts = np.array(sorted(self.lengths.items()), dtype=np.int64).reshape(-1, 2).T
        ranks = np.cumsum(counts)
        quantiles = {
            name: int(values[np.searchsorted(ranks, share * ranks[-1])]) if len(values) else None
            for name, share in _QUANTILES.items()
        }
        return {
            **{name: self.counts[name] for name in ("reports", "with_findings", "with_impression")},
            **{name: self.counts[name] for name in ("translated", "empty_when_cleaned")},
            "distinct": len(self.distinct),
            "length": {**quantiles, "longest": int(values[-1]) if len(values) else None},
            "lengths": {str(length): self.lengths[length] for length in sorted(self.lengths)},
        }


def _state_counts(states: Mapping[str, int], studies: int) -> dict[str, int]:
    """Return how many studies are in each state; those that name the label nowhere are unmentioned."""
    counts = {state: states.get(state, 0) for state in _STATES}
    counts[LabelState.UNMENTIONED.value] += studies - sum(counts.values())
    return counts


def count_set(records: Iterable[StudyRecord], name: str) -> SetStatistics:
    """Count all studies of a set, with a progress bar.

    Args:
        records: As `open_set` gives them.
        name: Of the bar.
    """
    statistics = SetStatistics()
    for record in tqdm(records, desc=name, unit="study"):
        statistics.add(record)
    return statistics


# --------------------------------------------------------------------------------------------------------------------
# Tables


def statistics_markdown(statistics: Mapping[str, Any]) -> str:
    """Render `SetStatistics.as_dict()` as Markdown tables."""
    languages = statistics["languages"]
    blocks = [
        _table(
            ["part", "studies", "patients", "images", *(f"reports {code}" for code in languages)],
            [
                [name, *_numbers(part, "studies", "patients", "images"), *_numbers(part["reports"], *languages)]
                for name, part in statistics["parts"].items()
            ],
        )
    ]
    if statistics["studies_without_patient"]:
        blocks.append(f"{statistics['studies_without_patient']:,} studies name no patient.")
    columns = ("reports", "distinct", "with_findings", "with_impression", "translated", "empty_when_cleaned")
    if languages:
        blocks.append(
            _table(
                ["language", *(name.replace("_", " ") for name in columns), *(f"length {q}" for q in _QUANTILES)],
                [
                    [code, *_numbers(texts, *columns), *_numbers(texts["length"], *_QUANTILES)]
                    for code, texts in languages.items()
                ],
            )
        )
    for title in ("labels", "findings"):
        if statistics[title]:
            rows = [[name, *_numbers(states, *_STATES)] for name, states in statistics[title].items()]
            blocks.append(_table(["label of the set" if title == "labels" else "finding", *_STATES], rows))
    for title in ("views", "images_per_study", "sexes", "ages", "licences"):
        rows = [[name, f"{count:,}"] for name, count in statistics[title].items()]
        if rows:
            blocks.append(_table([title.replace("_", " "), "images" if title == "views" else "studies"], rows))
    return "\n\n".join(blocks)


def _numbers(counts: Mapping[str, Any], *names: str) -> list[str]:
    return ["" if counts.get(name) is None else f"{counts[name]:,}" for name in names]


def _table(head: list[str], rows: list[list[str]]) -> str:
    return markdown_table([[cell.replace("|", "\\|") for cell in line] for line in (head, *rows)])
