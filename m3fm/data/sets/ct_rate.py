# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""CT-RATE: chest CT scans with English reports and labels of 18 abnormalities.

Read are the tables and volumes of the folder `dataset` of the repository on Hugging Face: reports, labels and metadata
of both parts, of which any may be missing, also all in one folder.

The set is published by volume: each scan was reconstructed once or several times, and its reconstructions repeat its
report and labels. A study here is a scan, and its image the reconstruction with the lowest number that is there, so
that no scan counts twice or falls into two parts. A scan with no volume there is left out, as are volumes that the
publishers list as no chest. Each scan is in the part of its tables, which its name repeats.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..labels import label_names, shared_findings
from ..report_sections import report_from_sections
from ..row_groups import RowGroups
from ..schema import ImageFile, LabelState, ReportText, StudyRecord
from ..tables import BadRow, Reading, Row, is_file, open_text, read_csv
from .demographics import age_in_years, sex_letter
from .layouts import table_in
from .study_set import StudySet

__all__ = ["SETS"]

_SOURCE = "ctrate_reports_text"
_STATES = {"1": LabelState.POSITIVE, "0": LabelState.NEGATIVE}
_TEXTS = ("Findings_EN", "Impressions_EN")
# "train_1_a_1.nii.gz": part, patient, scan, reconstruction
_VOLUME = re.compile(r"((train|valid)_\d{1,9})_([a-z]{1,4})_(\d{1,9})(?:\.nii(?:\.gz)?)?")


@dataclass(frozen=True)
class _Part:
    """Tell what the tables of one part are called."""

    name: str
    split: str
    reports: str
    labels: str
    people: str
    no_chest: str

    def tables(self) -> tuple[str, ...]:
        return (self.reports, self.labels, self.people)


_PARTS = (
    _Part(
        "train",
        "train",
        "radiology_text_reports/train_reports",
        "multi_abnormality_labels/train_predicted_labels",
        "metadata/train_metadata",
        "metadata/no_chest_train.txt",
    ),
    _Part(
        "valid",
        "validation",
        "radiology_text_reports/validation_reports",
        "multi_abnormality_labels/valid_predicted_labels",
        "metadata/validation_metadata",
        "metadata/no_chest_valid.txt",
    ),
)


@dataclass(frozen=True)
class _Tables:
    """Hold what one part says of its scans, the texts apart."""

    texts: RowGroups | None
    labels: RowGroups | None
    people: RowGroups | None
    no_chest: frozenset[str]
    folders: Sequence[Path]

    def volumes(self, scan: str) -> list[Row]:
        """Return a row of each reconstruction of a scan, the lowest number first."""
        rows: dict[str, Row] = {}
        for table in (self.texts, self.labels, self.people):
            for row in [] if table is None else table.get(scan):
                name = _volume(row)[0]
                if name not in self.no_chest:
                    rows.setdefault(name, row)
        return [rows[name] for name in sorted(rows, key=lambda name: int(name.rpartition("_")[2]))]


def _recognises(root: Path) -> bool:
    return _base(root) is not None


def _base(root: Path) -> Path | None:
    """Return the folder "dataset" of the repository, which may itself have been given."""
    places = [root / "dataset", root, *sorted(root.glob("*/dataset"))]
    return next(
        (place for place in places if any(_table(place, name) for part in _PARTS for name in part.tables())), None
    )


def _table(base: Path, name: str) -> Path | None:
    """Return a table, in its folder or, where all were downloaded into one, without."""
    return table_in(base, (f"{name}.csv", f"{name.rpartition('/')[2]}.csv"))


def _read(root: Path, reading: Reading) -> Iterator[StudyRecord]:
    base = _base(root)
    if base is None:
        raise BadRow("missing_file", root, None, f"expected {SET.layout[0]}")
    for part in _PARTS:
        tables = _tables(base, part, reading)
        for scan, text in _scans(base, part, tables):
            record = _study(scan, text, part, tables, reading)
            if record is not None:
                yield record


def _tables(base: Path, part: _Part, reading: Reading) -> _Tables:
    def read(name: str, columns: Sequence[str], kept: Sequence[str], has_long_text: bool = False) -> RowGroups | None:
        table = _table(base, name)
        if table is None:
            return None
        rows = read_csv(table, ("VolumeName", *columns), reading, has_long_text=has_long_text)
        return RowGroups.read(
            rows, lambda row: _scan_of(row, part), ("VolumeName", *kept), reading, unique="VolumeName"
        )

    labels, people = sorted(label_names(_SOURCE)), ("PatientAge", "PatientSex")
    names = [f"{part.name}_fixed", part.name]
    return _Tables(
        texts=read(part.reports, _TEXTS, (), has_long_text=True),
        labels=read(part.labels, labels, labels),
        people=read(part.people, people, people),
        no_chest=_no_chest(base, part.no_chest),
        # The publishers corrected the headers of volumes, and keep both: the corrected ones first.
        folders=[base / name for name in names if (base / name).is_dir()] or [base / part.name],
    )


def _no_chest(base: Path, name: str) -> frozenset[str]:
    path = next((path for path in (base / name, base / Path(name).name) if path.is_file()), None)
    if path is None:
        return frozenset()
    with open_text(path) as file:
        return frozenset(line.strip().rpartition("/")[2].split(".")[0] for line in file)


def _scans(base: Path, part: _Part, tables: _Tables) -> Iterator[tuple[str, Row | None]]:
    """Yield each scan once, with the row of its report: those with one in the order of reports, then the others."""
    if tables.texts is not None:
        # The texts, most of the table, are read in a second pass; what is wrong with rows was told in the first.
        rows = read_csv(_table(base, part.reports), ("VolumeName", *_TEXTS), Reading("skip"), has_long_text=True)
        for row in rows:
            match = _VOLUME.fullmatch(row.get("VolumeName") or "")
            scan = "" if match is None else f"{match[1]}_{match[3]}"
            known = tables.texts.get(scan)
            if known and known[0].line == row.line:
                yield scan, row
    earlier = [tables.texts]
    for table in (tables.labels, tables.people):
        for rows in table or ():
            scan = _volume(rows[0])[1]
            if not any(each is not None and each.get(scan) for each in earlier):
                yield scan, None
        earlier.append(table)


def _volume(row: Row) -> tuple[str, str, str]:
    """Return the names of a volume, of its scan and of its patient."""
    match = _VOLUME.fullmatch(row.require("VolumeName"))
    if match is None:
        raise row.bad("bad_value", "column 'VolumeName' must be as train_1_a_1.nii.gz")
    return f"{match[1]}_{match[3]}_{match[4]}", f"{match[1]}_{match[3]}", match[1]


def _scan_of(row: Row, part: _Part) -> str:
    scan = _volume(row)[1]
    if not scan.startswith(f"{part.name}_"):
        raise row.bad("bad_value", f"column 'VolumeName' must name a volume of the part {part.name!r}")
    return scan


def _study(scan: str, text: Row | None, part: _Part, tables: _Tables, reading: Reading) -> StudyRecord | None:
    volumes = tables.volumes(scan)
    image = next(reading.each(volumes[:1], lambda row: _image(row, volumes, tables, reading)), None)
    if image is None:
        return None
    stated = _labels(scan, tables, reading)
    ages = list(reading.each([] if tables.people is None else tables.people.get(scan)[:1], _age_and_sex))
    age, sex = ages[0] if ages else (None, None)
    report = None if text is None else _report(text)
    return StudyRecord(
        study_id=scan,
        source=SET.name,
        modality="ct",
        patient_id=scan.rpartition("_")[0],
        images=(image,),
        reports={} if report is None else {"en": report},
        labels=stated,
        findings=shared_findings(stated, _SOURCE),
        age=age,
        sex=sex,
        split=part.split,
        licence=SET.licence,
    )


def _image(row: Row, volumes: list[Row], tables: _Tables, reading: Reading) -> ImageFile:
    """Return the first reconstruction that is there; `row` is told of where none is."""
    paths = []
    for volume in volumes:
        name, scan, patient = _volume(volume)
        for folder in tables.folders:
            paths += [folder / patient / scan / f"{name}.nii.gz", folder / f"{name}.nii.gz"]
    if reading.images == "required":
        paths = [path for path in paths if is_file(path)] or paths
    return ImageFile(reading.image(row, paths[0]), view="AXIAL")


def _labels(scan: str, tables: _Tables, reading: Reading) -> dict[str, LabelState]:
    first: dict[str, LabelState] = {}

    def stated(row: Row) -> dict[str, LabelState]:
        states = {}
        for label in sorted(label_names(_SOURCE)):
            state = _STATES.get((row.get(label) or "").removesuffix(".0"))
            if state is None:
                raise row.bad("bad_label", f"column {label!r} must be 1 or 0")
            states[label] = state
        if first and states != first:
            raise row.bad("bad_label", "the labels are others than those of an earlier reconstruction of the scan")
        first.update(states)
        return states

    for _ in reading.each([] if tables.labels is None else tables.labels.get(scan), stated):
        pass
    return first


def _age_and_sex(row: Row) -> tuple[float | None, str | None]:
    try:
        return age_in_years(row.get("PatientAge")), sex_letter(row.get("PatientSex"))
    except ValueError as error:
        raise row.bad("bad_value", f"column 'PatientAge': {error}") from None


def _report(row: Row) -> ReportText | None:
    findings, impression = (row.get(column) for column in _TEXTS)
    return report_from_sections(findings, impression, "en")


SET = StudySet(
    name="ct_rate",
    title="CT-RATE",
    licence="CC BY-NC-SA 4.0",
    url="https://huggingface.co/datasets/ibrahimhamamci/CT-RATE",
    reference="Hamamci et al., Developing Generalist Foundation Models from a Multimodal Dataset for 3D Computed "
    "Tomography, 2024, arXiv:2403.17834",
    layout=(
        "dataset/radiology_text_reports/train_reports.csv, validation_reports.csv",
        "dataset/multi_abnormality_labels/train_predicted_labels.csv, valid_predicted_labels.csv",
        "dataset/metadata/train_metadata.csv, validation_metadata.csv, no_chest_train.txt, no_chest_valid.txt",
        "dataset/train_fixed/train_N/train_N_a/train_N_a_N.nii.gz, or train/ and valid/",
    ),
    recognises=_recognises,
    read=_read,
    # 50,188 volumes, of which a study here is all that one scan was made into. The parts are by patients.
    published={"studies": 25692, "patients": 21304, "train_patients": 20000, "validation_patients": 1304},
)
SETS = (SET,)
