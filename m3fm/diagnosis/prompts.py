# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""The labels that come with m3fm, in the form of `config.diagnosis` (see `m3fm.diagnosis_m3fm`)."""

from functools import cache
from pathlib import Path
from typing import Any

import yaml

from ..data.labels import NO_FINDING, Finding, finding_table
from ..diagnosis_m3fm import check_diagnosis, label_phrases

_FILE = Path(__file__).parents[1] / "data" / "prompts.yaml"


@cache
def _read_yaml() -> dict[str, Any]:
    return yaml.safe_load(_FILE.read_text(encoding="utf-8"))


def default_diagnosis() -> dict[str, dict[str, Any]]:
    """Returns every finding with its names, aliases and phrases, uncalibrated, in the order of `FINDINGS`.

    The phrases are those of `m3fm/data/labels.yaml` and of `m3fm/data/prompts.yaml`.

    Raises:
        ValueError: If the two files contradict each other.
    """
    content = _read_yaml()
    further, ruled_out = content["findings"], frozenset(content["normal_rules_out"])
    table = finding_table()
    if unknown := sorted((set(further) | ruled_out) - set(table)):
        raise ValueError(f"{_FILE.name}: {', '.join(unknown)}: not in labels.yaml.")
    diagnosis = {key: _entry(finding, further.get(key, {}), key in ruled_out) for key, finding in table.items()}
    check_diagnosis(diagnosis)
    return diagnosis


def _entry(finding: Finding, further: dict[str, Any], ruled_out: bool) -> dict[str, Any]:
    known = {finding.key, *(name.casefold() for name in finding.names.values())}
    aliases = [*([finding.chexpert] if finding.chexpert else []), *further.get("aliases", [])]
    return {
        "names": dict(finding.names),
        "aliases": [alias for alias in aliases if alias.casefold() not in known],
        "present": _phrases(finding, further, "present"),
        "absent": _phrases(finding, further, "absent"),
        "also_absent": [*further.get("also_absent", []), *([NO_FINDING] if ruled_out else [])],
        "calibration": None,
        "threshold": None,
        "fitted_on": None,
    }


def _phrases(finding: Finding, further: dict[str, Any], kind: str) -> dict[str, list[str]]:
    return {
        language: [*texts, *further.get(kind, {}).get(language, [])]
        for language, texts in getattr(finding, kind).items()
    }


@cache
def default_phrases(finding: str, kind: str) -> dict[str, tuple[str, ...]]:
    """Returns the zero-shot phrases of a finding by language.

    Args:
        finding: A canonical finding.
        kind: "present" or "absent".
    """
    return label_phrases(default_diagnosis(), finding, kind)
