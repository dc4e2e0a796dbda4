# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""IU X-ray, the Indiana University collection of Open-i: chest radiographs with reports, in its three layouts.

1. Open-i's XML, a file a report (`ecgen-radiology/`, or `NLMCXR_reports.tgz` as it is downloaded), with the images of
   `NLMCXR_png` or `NLMCXR_dcm`. It alone has all 3,955 reports, and the terms (MeSH) of human and of automatic
   indexing, from which the labels are made.
2. Kaggle's tables `indiana_reports.csv` and `indiana_projections.csv`, with the terms of human indexing alone.
3. R2Gen's `annotation.json`: the findings of 2,955 studies with two images each, without labels, and the split that
   work on report generation shares.

Studies have the same ids in all of them ("CXR2384"). Where an `annotation.json` lies beside the XML or the tables, its
split is theirs; studies that R2Gen left out are "unassigned", and in no part for training. Every patient has one
study, and no id. A study without any image in its table is kept for its text; one of whose images none is there is
left out.

Labels are 20 findings and "Normal", which means none of the 20: it does not mean a chest without any. Studies that
nobody indexed ("No Indexing") are unmentioned in all of them.

The header of the DICOM files (`nlmcxr_dicom_metadata.csv`, as torchxrayvision extracted it) calls many lateral images
"PA", and is not believed in that; views come from Kaggle's projections and from torchxrayvision's t-SNE of the images
(`nlmcxr_tsne_pa.csv`) where those tables are there.
"""

from __future__ import annotations

import io
import re
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import IO

from ..labels import shared_findings
from ..report_sections import report_from_sections, report_from_text
from ..schema import ImageFile, LabelState, StudyRecord
from ..tables import BadRow, Reading, Row, is_file, read_csv
from .annotation_json import ANNOTATIONS, Entry, opening, read_annotations
from .demographics import OLDEST
from .layouts import FileRow, find_base, only_folder, table_in
from .plain_xml import LinedElement, read_elements, text_of
from .study_set import UNASSIGNED, StudySet

__all__ = ["SETS", "mesh_labels"]

_NAME = "iu_xray"
_LICENCE = "CC BY-NC-ND 4.0"
_LICENCES = {"http://creativecommons.org/licenses/by-nc-nd/4.0/": _LICENCE}
_LABEL_SOURCE = "openi_iu_reports"
_DAYS_OF_YEAR = 365.25

_ARCHIVE, _REPORTS_FOLDER, _XML_FOLDER = "NLMCXR_reports.tgz", "NLMCXR_reports", "ecgen-radiology"
_REPORTS, _PROJECTIONS = "indiana_reports.csv", "indiana_projections.csv"
_HEADERS, _TSNE = "nlmcxr_dicom_metadata.csv", "nlmcxr_tsne_pa.csv"
_OWN_FOLDERS = ("NLMCXR_png", "NLMCXR_dcm", "images/images_normalized", "images_normalized")
_IMAGE_FOLDERS = (*_OWN_FOLDERS, "images", ".")
_SECTIONS = ("COMPARISON", "INDICATION", "FINDINGS", "IMPRESSION")

# "CXR1_1_IM-0001-3001" and "CXR1000_IM-0003-2001" are the DICOM files "1_IM-0001-3001" and "1000_IM-0003-2001".
_IMAGE_ID = re.compile(r"CXR(\d+)(?:_\d+)?_(IM-[\w-]+)")
_STUDY_ID = re.compile(r"CXR\d+")
_R2GEN_ID = re.compile(r"(CXR\d+)_[\w-]+")
_KAGGLE_FILE = re.compile(r"(\d+_IM-[\w-]+)\.dcm\.png")

# The views that can be trusted: see above.
_HEADER_VIEWS = {"AP": "AP", "LL": "LATERAL", "RL": "LATERAL", "LATERAL": "LATERAL", "LARGE LATERAL": "LATERAL"}
_TSNE_VIEWS = {"PA": "PA", "L": "LATERAL"}
_PROJECTION_VIEWS = {"Frontal": "FRONTAL", "Lateral": "LATERAL"}

_NOT_INDEXED = "no indexing"
_NORMAL = "Normal"
#: Label to what its terms contain, in lower case.
_TERMS: Mapping[str, tuple[str, ...]] = {
    "Atelectasis": ("atelecta",),
    "Atherosclerosis": ("atheroscler",),
    "Calcinosis": ("calcinosis", "calcifi"),
    "Cardiomegaly": ("cardiomegaly",),
    "Consolidation": ("consolidation",),
    "Edema": ("pulmonary edema", "pulmonary congestion"),
    "Effusion": ("pleural effusion", "pericardial effusion"),
    "Emphysema": ("emphysema",),
    "Fibrosis": ("fibros",),
    "Fracture": ("fracture",),
    "Granuloma": ("granuloma",),
    "Hernia": ("hernia",),
    "Infiltration": ("infiltrat",),
    "Mass": ("mass",),
    "Nodule": ("nodule",),
    "Opacity": ("opacity", "airspace disease"),
    "Pleural_Thickening": ("thickening",),
    "Pneumonia": ("pneumonia", "interstitial pneumonit"),
    "Pneumothorax": ("pneumothorax",),
    "Scoliosis": ("scolios", "spine curvature"),
}


def mesh_labels(terms: Iterable[str]) -> dict[str, LabelState]:
    """Make labels of the terms by which a report was indexed.

    Args:
        terms: MeSH headings, with or without qualifiers ("Pulmonary Atelectasis/base"), and terms of automatic
            indexing.

    Returns:
        Each of the 21 labels: unmentioned where the report was not indexed, else negative where no term says it.
    """
    terms = [term.strip().lower() for term in terms]
    said = "|".join(terms)
    if not said or _NOT_INDEXED in terms:
        return dict.fromkeys((_NORMAL, *_TERMS), LabelState.UNMENTIONED)
    labels = {_NORMAL: LabelState.NEGATIVE}
    for label, parts in _TERMS.items():
        is_said = any(part in said for part in parts)
        labels[label] = LabelState.POSITIVE if is_said else LabelState.NEGATIVE
    if LabelState.POSITIVE not in labels.values():
        labels[_NORMAL] = LabelState.POSITIVE
    return labels


def _recognises(root: Path) -> bool:
    if _xml_source(root) is not None or find_base(root, (_REPORTS,)) is not None:
        return True
    return re.search(r'"id"\s*:\s*"CXR\d+_', opening(find_base(root, (ANNOTATIONS,)))) is not None


def _read(root: Path, reading: Reading) -> Iterator[StudyRecord]:
    source = _xml_source(root)
    tables = find_base(root, (_REPORTS,))
    annotations = find_base(root, (ANNOTATIONS,))
    base = tables if source is None else source.parents[source.parent.name == _REPORTS_FOLDER]
    if base is None and annotations is None:
        expected = f"{_XML_FOLDER}/, {_ARCHIVE}, {_REPORTS} or {ANNOTATIONS}"
        raise BadRow("missing_file", root, None, f"expected {expected}, got none of them")
    if base is None:
        yield from _read_r2gen(annotations, reading)
        return
    beside = _read_beside(base, annotations, reading)
    yield from _read_kaggle(base, beside, reading) if source is None else _read_xml(source, base, beside, reading)


def _xml_source(root: Path) -> Path | None:
    """Return the folder of XML files, or their archive."""
    for base in (root, only_folder(root) or root):
        for folder in (base / _XML_FOLDER, base / _REPORTS_FOLDER / _XML_FOLDER):
            if folder.is_dir():
                return folder
    base = find_base(root, (_ARCHIVE,))
    return None if base is None else base / _ARCHIVE


@dataclass
class _Beside:
    """What tables beside the reports tell of them; a few words a study.

    Attributes:
        splits: Study to its part in R2Gen's split; None where that is not there.
        r2gen_images: Study to the images that R2Gen gives it, where those are there and Open-i's own are not.
        views: DICOM file of an image to its view.
        ages: Study to years.
    """

    splits: dict[str, str] | None = None
    r2gen_images: dict[str, tuple[ImageFile, ...]] = field(default_factory=dict)
    views: dict[str, str] = field(default_factory=dict)
    ages: dict[str, float] = field(default_factory=dict)

    def split(self, study_id: str) -> str | None:
        """Return the part of a study."""
        return None if self.splits is None else self.splits.get(study_id, UNASSIGNED)


def _read_beside(base: Path, annotations: Path | None, reading: Reading) -> _Beside:
    beside = _Beside()
    if annotations is not None:
        beside.splits = {}
        has_own_images = any((base / folder).is_dir() for folder in _OWN_FOLDERS)
        for study_id, entry in _r2gen_studies(annotations, reading):
            beside.splits[study_id] = entry.split
            paths = () if has_own_images else [annotations / "images" / path for path in entry.image_paths()]
            if paths and all(map(is_file, paths)):
                beside.r2gen_images[study_id] = tuple(map(ImageFile, paths))
    if (headers := table_in(base, (_HEADERS,))) is not None:
        columns = ("imageid", "View Position", "Study Date", "Patient's Birth Date")
        for row in read_csv(headers, columns, reading, has_long_text=True):
            _keep_header(row, beside)
    if (tsne := table_in(base, (_TSNE,))) is not None:
        for row in read_csv(tsne, ("imageid", "tsne-view"), reading):
            if (name := _dicom_name(row.get("imageid"))) and (view := _TSNE_VIEWS.get(row.get("tsne-view"))):
                beside.views[name] = view
    return beside


def _keep_header(row: Row, beside: _Beside) -> None:
    name = _dicom_name(row.get("imageid"))
    if name is None:
        return
    view = _HEADER_VIEWS.get((row.get("View Position") or "").upper())
    if view is not None:
        beside.views[name] = view
    try:
        born, taken = (
            datetime.strptime(row.get(key) or "", "%Y%m%d") for key in ("Patient's Birth Date", "Study Date")
        )
    except ValueError:  # a header without dates
        return
    age = (taken - born).days / _DAYS_OF_YEAR
    if 0 <= age <= OLDEST:
        beside.ages.setdefault(f"CXR{name.partition('_')[0]}", age)


def _dicom_name(image_id: str | None) -> str | None:
    match = _IMAGE_ID.fullmatch(image_id or "")
    return f"{match[1]}_{match[2]}" if match else None


def _read_xml(source: Path, base: Path, beside: _Beside, reading: Reading) -> Iterator[StudyRecord]:
    folders = [base / folder for folder in _IMAGE_FOLDERS if (base / folder).is_dir()]
    projections = table_in(base, (_PROJECTIONS,))
    if projections is not None:
        for _, name, view in _projections(projections, reading):
            beside.views[name] = _finer(view, beside.views.get(name))
    seen: set[str] = set()
    for name, file in _xml_files(source, reading):
        try:
            place, report = _xml_report(source, name, file)
            record = _xml_record(report, place, folders or [base / _IMAGE_FOLDERS[0]], beside, seen, reading)
        except BadRow as error:
            reading.tell(error)
        else:
            if record is not None:
                yield record


def _xml_report(source: Path, name: str, file: IO[bytes]) -> tuple[FileRow, LinedElement]:
    """Return the report of a file, and where it stands."""
    try:
        reports = list(read_elements(file, "eCitation", source / name))
    except BadRow as error:
        raise FileRow(source, error.line or 1, {}, name).bad(error.kind, error.message) from None
    if len(reports) != 1:
        raise FileRow(source, 1, {}, name).bad("not_a_row", f"expected one eCitation, got {len(reports)}")
    return FileRow(source, reports[0].line, {}, name), reports[0]


def _xml_files(source: Path, reading: Reading) -> Iterator[tuple[str, IO[bytes]]]:
    """Yield name and content of each file; both forms of the source have them in the same order."""
    if source.is_dir():
        for path in sorted(source.glob("*.xml")):
            with open(path, "rb") as file:
                yield path.name, file
        return
    try:
        with tarfile.open(source, "r|gz") as archive:
            for member in archive:
                if member.isfile() and member.name.endswith(".xml"):
                    yield PurePosixPath(member.name).name, io.BytesIO(archive.extractfile(member).read())
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        reading.tell(BadRow("not_a_row", source, None, f"the archive is damaged: {type(error).__name__}"))


def _xml_record(
    report: LinedElement, row: FileRow, folders: list[Path], beside: _Beside, seen: set[str], reading: Reading
) -> StudyRecord | None:
    identifier = report.find("uId")
    study_id = "" if identifier is None else identifier.get("id", "")
    if not _STUDY_ID.fullmatch(study_id):
        raise row.bad("bad_value", "uId must be CXR and a number")
    if study_id in seen:
        raise row.bad("duplicate_id", "the study of this file was already given by an earlier one")
    seen.add(study_id)
    sections = {each.get("Label", "").upper(): text_of(each) for each in report.iter("AbstractText")}
    terms = [text_of(each) or "" for kind in ("major", "automatic") for each in report.findall(f"MeSH/{kind}")]
    images = beside.r2gen_images.get(study_id)
    if images is None:
        rows = [replace(row, line=each.line, values={"id": each.get("id")}) for each in report.iter("parentImage")]
        images = tuple(reading.each(rows, lambda each: _image(each, folders, beside.views, reading)))
        if rows and not images:
            return None
    url = text_of(report.find("licenseURL"))
    return _record(study_id, sections, mesh_labels(terms), images, beside, _LICENCES.get(url, url or _LICENCE))


def _image(row: Row, folders: list[Path], views: Mapping[str, str], reading: Reading) -> ImageFile:
    image_id = row.require("id")
    name = _dicom_name(image_id)
    if name is None:
        raise row.bad("bad_value", "a parentImage must be named by its study and its DICOM file")
    number = name.partition("_")[0]
    names = (f"{image_id}.png", f"{name}.dcm.png", f"{name}.dcm", f"{number}/{name}.dcm")
    places = [folder / each for folder in folders for each in names]
    path = next((each for each in places if is_file(each)), places[0])
    return ImageFile(reading.image(row, path), view=views.get(name))


def _read_kaggle(base: Path, beside: _Beside, reading: Reading) -> Iterator[StudyRecord]:
    folders = [base / folder for folder in _IMAGE_FOLDERS if (base / folder).is_dir()]
    rows: dict[str, list[tuple[Row, str, str]]] = {}
    for row, name, view in _projections(table_in(base, (_PROJECTIONS,)) or base / _PROJECTIONS, reading):
        rows.setdefault(name.partition("_")[0], []).append((row, name, view))
    columns = ("uid", "MeSH", "indication", "comparison", "findings", "impression")
    reports = table_in(base, (_REPORTS,))
    seen: set[str] = set()

    def image(given: tuple[Row, str, str]) -> ImageFile:
        row, name, view = given
        places = [folder / f"{name}.dcm.png" for folder in folders]
        path = next((each for each in places if is_file(each)), places[0])
        return ImageFile(reading.image(row, path), view=_finer(view, beside.views.get(name)))

    def record(row: Row) -> StudyRecord | None:
        uid = row.require("uid")
        if not uid.isascii() or not uid.isdigit():
            raise row.bad("bad_value", "uid must be a whole number")
        if uid in seen:
            raise row.bad("duplicate_id", "the study of this row was already given by an earlier line")
        seen.add(uid)
        sections = {section: row.get(section.lower()) for section in _SECTIONS}
        labels = mesh_labels((row.get("MeSH") or "").split(";"))
        listed = rows.pop(uid, ())
        images = tuple(reading.each(listed, image))
        if listed and not images:
            return None
        return _record(f"CXR{uid}", sections, labels, images, beside, _LICENCE)

    yield from filter(None, reading.each(read_csv(reports, columns, reading, has_long_text=True), record))
    for row, _, _ in (each for left in rows.values() for each in left):
        reading.tell(row.bad("bad_value", f"the image is of a study that is not in {reports.name}"))


def _projections(path: Path, reading: Reading) -> Iterator[tuple[Row, str, str]]:
    """Yield row, DICOM file and view of each image in Kaggle's table."""
    seen: set[str] = set()

    def parse(row: Row) -> tuple[Row, str, str]:
        match = _KAGGLE_FILE.fullmatch(row.require("filename"))
        if match is None or match[1].partition("_")[0] != row.require("uid"):
            raise row.bad("bad_value", "filename must be an image of the study, such as 1_IM-0001-4001.dcm.png")
        if match[1] in seen:
            raise row.bad("duplicate_id", "the image of this row was already given by an earlier line")
        seen.add(match[1])
        view = _PROJECTION_VIEWS.get(row.require("projection"))
        if view is None:
            raise row.bad("bad_value", f"projection must be one of {', '.join(_PROJECTION_VIEWS)}")
        return row, match[1], view

    return reading.each(read_csv(path, ("uid", "filename", "projection"), reading), parse)


def _finer(view: str, known: str | None) -> str:
    """Keep the direction of the rays, which Kaggle's table does not tell."""
    return known if view == "FRONTAL" and known in ("PA", "AP") else view


def _record(
    study_id: str,
    sections: Mapping[str, str | None],
    labels: Mapping[str, LabelState],
    images: tuple[ImageFile, ...],
    beside: _Beside,
    licence: str,
) -> StudyRecord:
    raw = "\n".join(f"{name}: {sections[name]}" for name in _SECTIONS if sections.get(name))
    report = report_from_sections(sections.get("FINDINGS"), sections.get("IMPRESSION"), "en", raw=raw)
    return StudyRecord(
        study_id=study_id,
        source=_NAME,
        modality="cxr",
        images=images,
        reports={} if report is None else {"en": report},
        labels=labels,
        findings=shared_findings(labels, _LABEL_SOURCE),
        age=beside.ages.get(study_id),
        split=beside.split(study_id),
        licence=licence,
    )


def _read_r2gen(base: Path, reading: Reading) -> Iterator[StudyRecord]:
    for study_id, entry in _r2gen_studies(base, reading):
        images = tuple(
            reading.each(
                [Row(entry.file, entry.line, {"path": path}) for path in entry.image_paths()],
                lambda row: ImageFile(reading.image(row, base / "images" / row.require("path"))),
            )
        )
        report = report_from_text(entry.require("report"), "en")
        if not images:
            continue
        yield StudyRecord(
            study_id=study_id,
            source=_NAME,
            modality="cxr",
            images=images,
            reports={} if report is None else {"en": report},
            split=entry.split,
            licence=_LICENCE,
        )


def _r2gen_studies(base: Path, reading: Reading) -> Iterator[tuple[str, Entry]]:
    """Yield study and entry of R2Gen's file, checked."""
    seen: set[str] = set()

    def parse(entry: Entry) -> tuple[str, Entry]:
        match = _R2GEN_ID.fullmatch(entry.require("id"))
        if match is None:
            raise entry.bad("bad_value", "id must be that of a study and its images, such as CXR1_1_IM-0001")
        entry.require("report")
        entry.image_paths()
        if match[1] in seen:
            raise entry.bad("duplicate_id", "the study of this entry was already given by an earlier one")
        seen.add(match[1])
        return match[1], entry

    return reading.each(read_annotations(table_in(base, (ANNOTATIONS,)), reading), parse)


SET = StudySet(
    name=_NAME,
    title="IU X-ray (Indiana University Chest X-ray Collection, Open-i)",
    licence=_LICENCE,
    url="https://openi.nlm.nih.gov/faq",
    reference="Demner-Fushman et al., JAMIA 23(2):304-310, 2016, doi:10.1093/jamia/ocv080",
    layout=(
        f"{_XML_FOLDER}/*.xml or {_ARCHIVE}, NLMCXR_png/*.png or NLMCXR_dcm/*/*.dcm",
        f"{_REPORTS}, {_PROJECTIONS}, images/images_normalized/*.dcm.png",
        f"{ANNOTATIONS}, images/*/*.png",
        f"optional: {_HEADERS}, {_TSNE}",
    ),
    recognises=_recognises,
    read=_read,
    published={"studies": 3955, "images": 7470},
)
SETS: tuple[StudySet, ...] = (SET,)
