# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""COVID-19-CT-CXR: figures of COVID-19 articles in PubMed Central, told apart as CT and radiographs.

The annotations of Peng et al. (2020) were published in two forms, both read here:

1. Releases: `MMDDYYYY.litcovid.released.image.json`, a list of figures, each with the class of the whole (`label`) or
   of its panels (`box`), and `MMDDYYYY.litcovid.released.text.json`, captions and the paragraphs that mention them.
2. Before those: `covid_figure_list.csv` (later `MMDDYYYY.litcovid.released.csv`), a row a panel, and
   `convid_figure_text.xml` (the publishers' spelling), the same texts in BioC. Panels that are neither CT nor
   radiograph ("nature") are passed over.

Images have the names that the publishers gave them: `PMC7003341_40779_2020_233_Fig1_HTML.jpg` for a figure, with
`_1x0_396x362` (left, upper, right, lower edge) before the suffix for a panel.

A study is a figure, or its CT and its radiographs apart where it has both: all panels share a caption, whether they
show one patient or several. The report is the caption; `raw` has the mentions too. Figures of an article belong
together (`StudyRecord.documents`). There are no labels: articles on COVID-19 have figures of other things as well.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from ..report_sections import report_from_text
from ..schema import MODALITIES, ImageFile, ReportText, StudyRecord
from ..tables import BadRow, Reading, Row, is_file, read_csv
from .annotation_json import Entry, read_entries
from .layouts import ImageFolders, only_folder
from .plain_xml import LinedElement, read_elements, text_of
from .study_set import StudySet

__all__ = ["SETS"]

_NAME = "covid19_ct_cxr"
_LICENCE = "annotations: public domain (NLM); figures: the licence of each article (PMC open access subset)"
_IMAGE_LISTS = ("*.litcovid.released.image.json",)
_TEXT_LISTS = ("*.litcovid.released.text.json", "*.litcovid.released.json")
_TABLES = ("*.litcovid.released.csv", "covid_figure_list.csv")
_BIOC = ("convid_figure_text.xml", "covid_figure_text.xml")

_OTHER = "nature"
_PMCID = re.compile(r"PMC\d+")
_PANEL = re.compile(r"(\d+)x(\d+)_(\d+)x(\d+)")


@dataclass
class _Figure:
    """A figure and what shows in it: `images` has row and file name for each modality."""

    pmcid: str = field(repr=False)
    name: str = field(repr=False)
    images: dict[str, list[tuple[Row, str]]] = field(default_factory=dict, repr=False)


def _recognises(root: Path) -> bool:
    return _base(root) is not None


def _base(root: Path) -> Path | None:
    for folder in (root, only_folder(root)):
        if folder is not None and _first(folder, (*_IMAGE_LISTS, *_TABLES)) is not None:
            return folder
    return None


def _first(base: Path, patterns: tuple[str, ...]) -> Path | None:
    """Return the latest file of the first pattern that has one."""
    for pattern in patterns:
        # MMDDYYYY sorts by year when its parts are turned around.
        found = sorted(base.glob(pattern), key=lambda path: (path.name[4:8], path.name[:4], path.name))
        if found:
            return found[-1]
    return None


def _read(root: Path, reading: Reading) -> Iterator[StudyRecord]:
    base = _base(root)
    if base is None:
        raise BadRow(
            "missing_file", root, None, f"expected {' or '.join((*_IMAGE_LISTS, *_TABLES))}, got none of them"
        )
    listed = _first(base, _IMAGE_LISTS)
    figures = _listed_figures(listed, reading) if listed else _tabled_figures(_first(base, _TABLES), reading)
    texts = _read_texts(base, reading)
    folders = ImageFolders(base, ("figures", "*"), ("",))

    def image(given: tuple[Row, str]) -> Path:
        row, name = given
        beside = base / name
        return reading.image(row, beside if is_file(beside) else folders.find(name))

    for figure in figures:
        for modality in MODALITIES:
            if given := figure.images.get(modality):
                view = "AXIAL" if modality == "ct" else None
                images = [ImageFile(path, view=view) for path in reading.each(given, image)]
                report = texts.get((figure.pmcid, figure.name))
                if not images:
                    continue
                yield StudyRecord(
                    study_id=f"{figure.pmcid}_{PurePosixPath(figure.name).stem}_{modality}",
                    source=_NAME,
                    modality=modality,
                    documents=(f"pmc:{figure.pmcid}",),
                    images=tuple(images),
                    reports={} if report is None else {"en": report},
                    licence=_LICENCE,
                )


def _listed_figures(path: Path, reading: Reading) -> Iterator[_Figure]:
    seen: set[tuple[str, str]] = set()

    def parse(entry: Entry) -> _Figure:
        figure = _Figure(*_figure_name(entry, "url"))
        if (key := (figure.pmcid, PurePosixPath(figure.name).stem)) in seen:
            raise entry.bad("duplicate_id", "an earlier entry has a figure of this name, with whatever suffix")
        boxes = entry.values.get("box")
        if boxes is None:
            _add(figure, entry, entry.values.get("label"), None)
        elif not isinstance(boxes, list):
            raise entry.bad("bad_value", "box must be a list of panels")
        for box in boxes or ():
            try:
                _add(figure, entry, *_box(entry, box))
            except BadRow as error:
                reading.tell(error)
        seen.add(key)
        return figure

    return reading.each(read_entries(path, reading), parse)


def _box(entry: Entry, box: Any) -> tuple[Any, str]:
    edges = [box.get(key) for key in ("xtl", "ytl", "xbr", "ybr")] if isinstance(box, dict) else []
    if not edges or not all(type(edge) is int and edge >= 0 for edge in edges):
        raise entry.bad("bad_value", "a panel must have the whole numbers xtl, ytl, xbr and ybr")
    left, upper, right, lower = edges
    return box.get("label"), f"{left}x{upper}_{right}x{lower}"


def _tabled_figures(path: Path, reading: Reading) -> Iterator[_Figure]:
    figures: dict[tuple[str, str], _Figure] = {}
    for row in read_csv(path, ("pmcid", "figure url", "subfigure", "label"), reading):
        try:
            pmcid, name = _figure_name(row, "figure url")
            panel = row.get("subfigure")
            if panel is not None and not _PANEL.fullmatch(panel):
                raise row.bad("bad_value", "subfigure must be LEFTxUPPER_RIGHTxLOWER, or empty")
            figure = figures.setdefault((pmcid, PurePosixPath(name).stem), _Figure(pmcid, name))
            if figure.name != name:
                raise row.bad("duplicate_id", "an earlier line has a figure of this name, with another suffix")
            _add(figure, row, row.get("label"), panel)
        except BadRow as error:
            reading.tell(error)
    yield from figures.values()


def _figure_name(row: Row, column: str) -> tuple[str, str]:
    """Return the article and the file of a figure, which the end of its URL names."""
    pmcid, name = row.require("pmcid"), row.require(column).rpartition("/")[2]
    if not _PMCID.fullmatch(pmcid):
        raise row.bad("bad_value", "pmcid must be PMC and a number")
    if not PurePosixPath(name).suffix or "\\" in name:
        raise row.bad("bad_value", f"{column} must end in the name of an image file")
    return pmcid, name


def _add(figure: _Figure, row: Row, label: Any, panel: str | None) -> None:
    if label == _OTHER:
        return
    if label not in MODALITIES:
        raise row.bad("bad_label", f"label must be one of {', '.join((*MODALITIES, _OTHER))}")
    name = PurePosixPath(figure.name)
    file = f"{figure.pmcid}_{name.stem}{f'_{panel}' if panel else ''}{name.suffix}"
    if any(file == known for images in figure.images.values() for _, known in images):
        raise row.bad("duplicate_id", "the panel of this row was already given by an earlier one")
    figure.images.setdefault(label, []).append((row, file))


def _read_texts(base: Path, reading: Reading) -> dict[tuple[str, str], ReportText]:
    """Return the report of each figure, by article and file."""
    listed, bioc = _first(base, _TEXT_LISTS), _first(base, _BIOC)
    if listed is None and bioc is None:
        raise BadRow("missing_file", base, None, f"expected {' or '.join((*_TEXT_LISTS, *_BIOC))}, got none of them")
    passages = _listed_passages(listed, reading) if listed else _bioc_passages(bioc, reading)
    texts: dict[tuple[str, str], ReportText] = {}
    # A figure with several panels may be there as often: always the same text.
    for figure, captions, mentions in passages:
        report = report_from_text("\n".join(captions or mentions), "en")
        if report is not None:
            texts.setdefault(figure, replace(report, raw="\n".join((*captions, *mentions))))
    return texts


_Passages = tuple[tuple[str, str], list[str], list[str]]


def _listed_passages(path: Path, reading: Reading) -> Iterator[_Passages]:
    def parse(entry: Entry) -> _Passages:
        passages = entry.values.get("text")
        if not isinstance(passages, list) or not all(map(_is_passage, passages)):
            raise entry.bad("bad_value", "text must be a list of passages with infons and text")
        captions = [each["text"] for each in passages if "file" in each["infons"]]
        mentions = [each["text"] for each in passages if "file" not in each["infons"]]
        return _figure_name(entry, "url"), captions, mentions

    return reading.each(read_entries(path, reading), parse)


def _is_passage(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("infons"), dict) and isinstance(value.get("text"), str)


def _bioc_passages(path: Path, reading: Reading) -> Iterator[_Passages]:
    def parse(document: LinedElement) -> _Passages:
        row = Row(path, document.line, {"pmcid": (text_of(document.find("id")) or "").partition("_")[0]})
        row.values["url"] = next((text_of(each) for each in document.findall("infon[@key='url']")), None)
        captions, mentions = [], []
        for passage in document.findall("passage"):
            is_caption = passage.find("infon[@key='file']") is not None
            (captions if is_caption else mentions).append(text_of(passage.find("text")) or "")
        return _figure_name(row, "url"), captions, mentions

    with open(path, "rb") as file:
        try:
            yield from reading.each(read_elements(file, "document", path), parse)
        except BadRow as error:
            reading.tell(error)


SET = StudySet(
    name=_NAME,
    title="COVID-19-CT-CXR",
    licence=_LICENCE,
    url="https://github.com/ncbi-nlp/COVID-19-CT-CXR",
    reference="Peng et al., IEEE Transactions on Big Data 7(1):3-12, 2021, doi:10.1109/TBDATA.2020.3035935",
    layout=(
        "MMDDYYYY.litcovid.released.image.json, MMDDYYYY.litcovid.released.text.json",
        "covid_figure_list.csv, convid_figure_text.xml",
        "PMC*.jpg, beside them or in a folder of figures",
    ),
    recognises=_recognises,
    read=_read,
    # 1,327 CT and 263 radiographs of May 9, 2020; the release of June 10 has more.
    published={"images": 1590},
)
SETS: tuple[StudySet, ...] = (SET,)
