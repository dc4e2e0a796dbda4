# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""One finding space for chest radiographs and chest CT, and how each data set's labels map into it.

The findings, their names and their report phrases per language are data: see `labels.yaml` beside this file.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from .schema import LabelState
from .tables import shown

__all__ = [
    "FINDINGS",
    "Finding",
    "canonical_findings",
    "finding_sentence",
    "finding_table",
    "label_column",
    "label_names",
    "label_sources",
    "label_vector",
    "missing_labels_mean_none",
    "shared_findings",
]

NO_FINDING = "no_finding"

#: Model order. `labels.yaml` describes exactly these.
FINDINGS: tuple[str, ...] = (
    NO_FINDING,
    "enlarged_cardiomediastinum",
    "cardiomegaly",
    "lung_opacity",
    "lung_lesion",
    "edema",
    "consolidation",
    "pneumonia",
    "atelectasis",
    "pneumothorax",
    "pleural_effusion",
    "pleural_other",
    "fracture",
    "support_devices",
    "covid_19",
    "tuberculosis",
    "nodule",
    "mass",
    "infiltration",
    "emphysema",
    "fibrosis",
    "pleural_thickening",
    "hernia",
    "granuloma",
    "calcification",
    "scoliosis",
    "atherosclerosis",
    "coronary_calcification",
    "pericardial_effusion",
    "lymphadenopathy",
    "bronchiectasis",
    "peribronchial_thickening",
    "septal_thickening",
    "mosaic_attenuation",
    "aortic_enlargement",
    "interstitial_lung_disease",
    "ground_glass_opacity",
    "cavity",
    "air_bronchogram",
)

# A device is no disease (CheXpert's rule), and a patient with proven COVID-19 may have a clear image.
_COMPATIBLE_WITH_NORMAL = frozenset({NO_FINDING, "support_devices", "covid_19"})
# A report names a few pertinent negatives, not all of them.
_MAX_NEGATIVES = 2
# Chinese sentences follow each other without a space.
_SENTENCE_JOINER = {"zh": ""}


@dataclass(frozen=True)
class Finding:
    """Describe one finding; the dictionaries are keyed by language code.

    Attributes:
        key: Canonical snake_case name, one of `FINDINGS`.
        names: What a radiologist calls it.
        present: Report phrases that state it.
        absent: Report phrases that deny it.
        chexpert: CheXpert's name for it, where CheXpert has one.
    """

    key: str
    names: Mapping[str, str]
    present: Mapping[str, tuple[str, ...]]
    absent: Mapping[str, tuple[str, ...]]
    chexpert: str | None = None


@dataclass(frozen=True)
class _Source:
    column: str
    labels: Mapping[str, Mapping[str, float]]
    exhaustive: frozenset[str]
    empty_means_none: bool


@cache
def _read_yaml() -> dict[str, Any]:
    with open(Path(__file__).with_name("labels.yaml"), encoding="utf-8") as file:
        return yaml.safe_load(file)


@cache
def finding_table() -> dict[str, Finding]:
    """Return every `Finding` by its canonical name, in the order of `FINDINGS`."""
    table = {}
    for key, entry in _read_yaml()["findings"].items():
        languages = {code: texts for code, texts in entry.items() if isinstance(texts, dict)}
        table[key] = Finding(
            key=key,
            names={code: texts["name"] for code, texts in languages.items()},
            present={code: tuple(texts["present"]) for code, texts in languages.items()},
            absent={code: tuple(texts["absent"]) for code, texts in languages.items()},
            chexpert=entry.get("chexpert"),
        )
    return table


@cache
def _sources() -> dict[str, _Source]:
    sources = {"canonical": _canonical_source()}
    for name, entry in _read_yaml()["sources"].items():
        labels = {
            label: {meaning: 1.0} if isinstance(meaning, str) else meaning
            for label, meaning in entry["labels"].items()
        }
        exhaustive = entry["exhaustive"]
        if exhaustive == "all":
            exhaustive = {finding for meaning in labels.values() for finding in meaning} - {NO_FINDING}
        sources[name] = _Source(entry["column"], labels, frozenset(exhaustive), entry.get("empty_means_none", False))
    return sources


def _canonical_source() -> _Source:
    """Accept canonical, CheXpert's and English names: for folders of which nothing more is known."""
    labels: dict[str, Mapping[str, float]] = {}
    for key, finding in finding_table().items():
        for label in (key, finding.chexpert, finding.names["en"]):
            if label is not None:
                labels[label] = {key: 1.0}
    return _Source("labels", labels, frozenset(), empty_means_none=False)


def label_sources() -> tuple[str, ...]:
    """Return the names that `canonical_findings` accepts as `source`."""
    return tuple(_sources())


def label_column(source: str) -> str:
    """Return the metadata column that holds the labels of a source."""
    return _source(source).column


def label_names(source: str) -> frozenset[str]:
    """Return the label names of a source."""
    return frozenset(_source(source).labels)


def missing_labels_mean_none(source: str) -> bool:
    """Tell whether a row without labels was annotated there and has none, rather than not annotated."""
    return _source(source).empty_means_none


def _source(source: str) -> _Source:
    try:
        return _sources()[source]
    except KeyError:
        raise ValueError(f"unknown label source {source!r}; expected one of {', '.join(_sources())}") from None


def canonical_findings(labels: Iterable[str], source: str, denied: Iterable[str] = ()) -> dict[str, float]:
    """Translate a data set's own labels into canonical findings.

    Args:
        labels: Label names as the data set writes them.
        source: The data set, one of `label_sources()`: a data folder's name, "chexpert", "vindr", "rsna", "siim",
            or "canonical" for canonical and CheXpert names with nothing denied.
        denied: Further findings that are 0.0 where not named.

    Returns:
        1.0 for each finding named, 0.0 for each that the set annotates exhaustively and did not name. Findings that
        the set says nothing of are left out. "No finding" is 0.0 as soon as an abnormality is named.

    Raises:
        ValueError: For a source that is not known, or a label that the source does not have.
    """
    spec = _source(source)
    if isinstance(labels, str):
        raise ValueError(f"labels must be a list of names, got {shown(labels)}")
    findings = dict.fromkeys(sorted(spec.exhaustive.union(denied)), 0.0)
    for label in labels:
        _check_label(label, spec, source)
        for finding, value in spec.labels[label].items():
            findings[finding] = max(value, findings.get(finding, 0.0))
    abnormal = [name for name, value in findings.items() if value > 0 and name not in _COMPATIBLE_WITH_NORMAL]
    if abnormal:
        findings[NO_FINDING] = 0.0
    return {name: findings[name] for name in FINDINGS if name in findings}


def shared_findings(labels: Mapping[str, LabelState], source: str) -> dict[str, LabelState]:
    """Translate what a set says of its own labels into the shared label space.

    A finding is positive where a label that means it is, else uncertain where one is uncertain, else negative where a
    label denies it or all labels that mean it are negative: "no nodule" alone does not deny a lesion of a set that
    also labels masses. "No finding" is negative as soon as an abnormality is positive.

    Args:
        labels: The set's own names to their states.
        source: The data set, one of `label_sources()`.

    Returns:
        Finding to state, in the order of `FINDINGS`; findings that nothing is said of are left out.

    Raises:
        ValueError: For a source that is not known, or a label that the source does not have.
    """
    spec = _source(source)
    for label in labels:
        _check_label(label, spec, source)
    stated: dict[str, LabelState] = {}
    for finding, meaning in _meanings(source).items():
        means = [labels.get(label, LabelState.UNMENTIONED) for label in meaning.present]
        denies = any(labels.get(label) is LabelState.POSITIVE for label in meaning.absent)
        if LabelState.POSITIVE in means:
            stated[finding] = LabelState.POSITIVE
        elif LabelState.UNCERTAIN in means:
            stated[finding] = LabelState.UNCERTAIN
        elif denies or (means and all(state is LabelState.NEGATIVE for state in means)):
            stated[finding] = LabelState.NEGATIVE
    positive = {name for name, state in stated.items() if state is LabelState.POSITIVE}
    if positive - _COMPATIBLE_WITH_NORMAL:
        stated[NO_FINDING] = LabelState.NEGATIVE
    return {name: stated[name] for name in FINDINGS if name in stated}


@dataclass(frozen=True)
class _Meaning:
    """The labels of a source that state a finding, and those that deny it."""

    present: tuple[str, ...]
    absent: tuple[str, ...]


@cache
def _meanings(source: str) -> dict[str, _Meaning]:
    labels = _source(source).labels
    findings = {finding for meaning in labels.values() for finding in meaning}
    return {
        finding: _Meaning(
            present=tuple(label for label, meaning in labels.items() if meaning.get(finding, 0.0) > 0),
            absent=tuple(label for label, meaning in labels.items() if meaning.get(finding) == 0.0),
        )
        for finding in findings
    }


def _check_label(label: str, spec: _Source, source: str) -> None:
    if label not in spec.labels:
        near = difflib.get_close_matches(str(label), spec.labels, n=1, cutoff=0.0)
        # Labels come from rows, where one may have slipped and hold a report.
        raise ValueError(f"expected a label of {source}, got {shown(str(label))}; the nearest it has is {near[0]!r}")


def label_vector(findings: Mapping[str, float] | None) -> tuple[np.ndarray, np.ndarray]:
    """Lay findings out in model order.

    Args:
        findings: Canonical finding to 1.0 or 0.0; None where nothing is known.

    Returns:
        `values` (F,) float32, 0 where unknown, and `known` (F,) bool, with F = `len(FINDINGS)`.

    Raises:
        ValueError: For a name that is not canonical.
    """
    findings = findings or {}
    _check_names(findings)
    values = np.array([findings.get(name, 0.0) for name in FINDINGS], dtype=np.float32)  # (F,)
    known = np.array([name in findings for name in FINDINGS], dtype=bool)  # (F,)
    return values, known


def finding_sentence(findings: Mapping[str, float], language: str, rng: np.random.Generator) -> str:
    """Compose a short report-like text from findings.

    A normal study gives one normal phrase. Otherwise every present finding is stated, in random order, followed by one
    or two of the denied ones.

    Args:
        findings: Canonical finding to 1.0 or 0.0, at least one.
        language: Language code, "en" or "zh".
        rng: Chooses phrases and order.

    Raises:
        ValueError: For an unknown language or finding, or when nothing is known.
    """
    _check_names(findings)
    table = finding_table()
    languages = table[NO_FINDING].names
    if language not in languages:
        raise ValueError(f"language must be one of {', '.join(languages)}, got {language!r}")
    present = [name for name in FINDINGS if findings.get(name, 0.0) > 0 and name != NO_FINDING]
    absent = [name for name in FINDINGS if findings.get(name) == 0.0 and name != NO_FINDING]
    phrases = []
    if findings.get(NO_FINDING, 0.0) > 0:
        phrases.append(_pick(table[NO_FINDING].present[language], rng))
        absent = []
    phrases += [_pick(table[present[i]].present[language], rng) for i in rng.permutation(len(present))]
    negatives = rng.permutation(len(absent))[: int(rng.integers(1, _MAX_NEGATIVES + 1))]
    phrases += [_pick(table[absent[i]].absent[language], rng) for i in negatives]
    if not phrases and NO_FINDING in findings:
        phrases.append(_pick(table[NO_FINDING].absent[language], rng))
    if not phrases:
        raise ValueError("finding_sentence needs at least one known finding, got none")
    return _SENTENCE_JOINER.get(language, " ").join(phrases)


def _pick(phrases: tuple[str, ...], rng: np.random.Generator) -> str:
    return phrases[int(rng.integers(len(phrases)))]


def _check_names(findings: Mapping[str, float]) -> None:
    for name in findings:
        if name not in FINDINGS:
            near = difflib.get_close_matches(name, FINDINGS, n=1, cutoff=0.0)[0]
            raise ValueError(f"{name!r} is not a canonical finding; the nearest is {near!r}")
