# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""The tuberculosis sets of the U.S. National Library of Medicine: Shenzhen, and Montgomery County.

Read are the radiographs of `CXR_png/` and the clinical readings of `ClinicalReadings/`, a file a radiograph, which may
be missing altogether. The outlines of lungs in Montgomery's `ManualMask/` are read when they are asked for.

A study is a radiograph. Its label, tuberculosis or normal, is in the name of its file, as is the patient; its reading
is the English report. The sets have no parts.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
from PIL import Image

from ..labels import shared_findings
from ..report_sections import report_from_text
from ..schema import ImageFile, LabelState, StudyRecord
from ..tables import BadRow, Reading
from .demographics import age_in_years, sex_letter
from .layouts import FileRow, only_folder
from .study_set import StudySet

__all__ = ["SETS", "lung_mask"]

TUBERCULOSIS, NORMAL = "Tuberculosis", "No Finding"
SIDES = ("left", "right")
_LICENCE = "free to use; cite Jaeger et al. 2014 and acknowledge the National Library of Medicine"
_READINGS, _IMAGES, _MASKS = "ClinicalReadings", "CXR_png", "ManualMask"
_LANGUAGE = "en"
_DEEPEST = 3

# "male 45yrs", "Female , 24 yrs", "femal 16month": what stands before the reading.
_SHENZHEN = re.compile(
    r"\s*(?P<sex>female|femal|male|f|m)(?![a-z])[\s,]*"
    r"(?:(?P<age>\d+)\s*(?P<unit>(?:y(?:(?:ea)?rs?)?|m(?:onths?)?|w(?:eeks?)?|d(?:ays?)?)(?![a-z]))?[\s,.]*)?",
    re.IGNORECASE,
)
# "Patient's Sex: F", then "Patient's Age: 027Y".
_MONTGOMERY = re.compile(
    r"\s*Patient.?s\s+Sex\s*:\s*(?P<sex>[A-Z]*)\s*Patient.?s\s+Age\s*:\s*(?:(?P<age>\d+)(?P<unit>[A-Z])?\b)?\s*",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class _Family:
    """What tells the two sets apart."""

    source: str
    top_folders: tuple[str, ...]
    name: re.Pattern[str]
    head: re.Pattern[str]


_FAMILIES = (
    _Family(
        "shenzhen_tb",
        ("ChinaSet_AllFiles", "ChinaSet_AllFiles/ChinaSet_AllFiles", "Shenzhen"),
        re.compile(r"(CHNCXR_\d{4})_([01])"),
        _SHENZHEN,
    ),
    _Family(
        "montgomery_tb",
        ("MontgomerySet", "MontgomerySet/MontgomerySet", "Montgomery"),
        re.compile(r"(MCUCXR_\d{4})_([01])"),
        _MONTGOMERY,
    ),
)


def lung_mask(record: StudyRecord) -> np.ndarray:
    """Return the outlines of both lungs that radiologists drew for a study of Montgomery County.

    They are read from their own files, beside the folder of images, when they are asked for.

    Returns:
        (2, H, W) bool, the left lung of the patient and the right one, in pixels of the image.

    Raises:
        ValueError: If the study has no masks: those of Shenzhen have none, and their files may be missing.
    """
    path = record.images[0].path if record.images else None
    masks = []
    for side in SIDES:
        file = None if path is None else path.parent.parent / _MASKS / f"{side}Mask" / path.name
        if file is None or not file.is_file():
            raise ValueError(f"expected a mask of the {side} lung in {_MASKS}/{side}Mask beside the folder of images")
        with Image.open(file) as image:
            masks.append(np.asarray(image.convert("L")) > 0)
    return np.stack(masks)


def _read(family: _Family, root: Path, reading: Reading) -> Iterator[StudyRecord]:
    """Yield a study for each radiograph, in the order of names, with its clinical reading as the English report.

    The name of a file tells whether it is normal (0) or shows tuberculosis (1). A study whose reading is missing or
    broken is told of, and kept without it; where the whole folder of readings is missing, no reading is expected.
    """
    base = _base(root, family)
    if base is None:
        raise BadRow("missing_file", root, None, f"expected the folder {_IMAGES} or {_READINGS} in it")
    for stem in _stems(base, family):
        try:
            yield _record(stem, base, family, reading)
        except BadRow as error:
            reading.tell(error)


def _stems(base: Path, family: _Family) -> list[str]:
    found: set[str] = set()
    for folder in (_READINGS, _IMAGES):
        if (base / folder).is_dir():
            names = (os.path.splitext(name) for name in os.listdir(base / folder))
            found.update(stem for stem, suffix in names if suffix in (".txt", ".png") and family.name.fullmatch(stem))
    return sorted(found)


def _record(stem: str, base: Path, family: _Family, reading: Reading) -> StudyRecord:
    path = base / _IMAGES / f"{stem}.png"
    reading.image(_place(path), path)
    text, age, sex = _clinical(base / _READINGS / f"{stem}.txt", family, reading)
    patient, is_sick = family.name.fullmatch(stem).groups()
    labels, findings = _states(family.source, is_sick == "1")
    report = report_from_text(text, _LANGUAGE) if text else None
    return StudyRecord(
        study_id=stem,
        source=family.source,
        modality="cxr",
        patient_id=patient,
        images=(ImageFile(path, view="PA"),),
        reports={} if report is None else {_LANGUAGE: report},
        labels=labels,
        findings=findings,
        age=age,
        sex=sex,
        licence=_LICENCE,
    )


def _place(path: Path) -> FileRow:
    """Return a place for what is wrong with a file, which its publishers named by a number of their own."""
    return FileRow(path.parent, 1, {}, path.name)


def _clinical(path: Path, family: _Family, reading: Reading) -> tuple[str | None, float | None, str | None]:
    """Return reading, age and sex of a clinical reading file; nothing of one that cannot be read, which is told."""
    if not path.parent.is_dir():
        return None, None, None
    try:
        return _parse(path, family)
    except BadRow as error:
        reading.tell(error)
    return None, None, None


def _parse(path: Path, family: _Family) -> tuple[str, float | None, str | None]:
    row = _place(path)
    if not path.is_file():
        raise row.bad("missing_file", "no clinical reading of this name")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise row.bad("bad_encoding", "expected UTF-8") from None
    head = family.head.match(text)
    if head is None:
        raise row.bad("bad_value", "expected sex and age before the reading")
    try:
        age = age_in_years(f"{head['age']}{head['unit'] or ''}" if head["age"] else None)
    except ValueError as error:
        raise row.bad("bad_value", str(error)) from None
    return text[head.end() :].strip(), age, sex_letter(head["sex"])


@cache
def _states(source: str, is_sick: bool) -> tuple[dict[str, LabelState], dict[str, LabelState]]:
    said, other = (TUBERCULOSIS, NORMAL) if is_sick else (NORMAL, TUBERCULOSIS)
    labels = {said: LabelState.POSITIVE, other: LabelState.NEGATIVE}
    return labels, shared_findings(labels, source)


def _base(root: Path, family: _Family) -> Path | None:
    """Return the folder of the set: it has files of its names in the folder of images or of readings."""
    folder: Path | None = Path(root)
    for _ in range(_DEEPEST):
        if folder is None:
            return None
        for each in (folder, *(folder / name for name in family.top_folders)):
            if _has_files(each, family):
                return each
        folder = only_folder(folder)
    return None


def _has_files(base: Path, family: _Family) -> bool:
    for folder in (_IMAGES, _READINGS):
        if (base / folder).is_dir():
            with os.scandir(base / folder) as entries:
                if any(family.name.fullmatch(os.path.splitext(entry.name)[0]) for entry in entries):
                    return True
    return False


def _recognises(family: _Family, root: Path) -> bool:
    return _base(root, family) is not None


SHENZHEN, MONTGOMERY = _FAMILIES
SETS: tuple[StudySet, ...] = (
    StudySet(
        name=SHENZHEN.source,
        title="Shenzhen Hospital chest X-ray set (tuberculosis)",
        licence=_LICENCE,
        url="https://data.lhncbc.nlm.nih.gov/public/Tuberculosis-Chest-X-ray-Datasets",
        reference="Jaeger et al., Quantitative Imaging in Medicine and Surgery 4 (2014) 475-477",
        layout=("ChinaSet_AllFiles/CXR_png/CHNCXR_*.png", "ChinaSet_AllFiles/ClinicalReadings/CHNCXR_*.txt"),
        recognises=partial(_recognises, SHENZHEN),
        read=partial(_read, SHENZHEN),
        published={"images": 662},
    ),
    StudySet(
        name=MONTGOMERY.source,
        title="Montgomery County chest X-ray set (tuberculosis)",
        licence=_LICENCE,
        url="https://data.lhncbc.nlm.nih.gov/public/Tuberculosis-Chest-X-ray-Datasets",
        reference="Jaeger et al., Quantitative Imaging in Medicine and Surgery 4 (2014) 475-477",
        layout=(
            "MontgomerySet/CXR_png/MCUCXR_*.png",
            "MontgomerySet/ClinicalReadings/MCUCXR_*.txt",
            "MontgomerySet/ManualMask/leftMask/*.png, rightMask/*.png (optional)",
        ),
        recognises=partial(_recognises, MONTGOMERY),
        read=partial(_read, MONTGOMERY),
        published={"images": 138},
    ),
)
