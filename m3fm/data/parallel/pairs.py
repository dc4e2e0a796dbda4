# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Texts in English and Chinese from any source, in one format: JSON lines.

A line has the columns `en`, `zh`, `study_id`, `source`, `split`, `origin` and `licence`. Of a corpus that is still to
be translated, one language is there. All is read and written as a stream; study ids serve grouping alone.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import IO, Any

from ..opening import open_set
from ..schema import LANGUAGES, StudyRecord
from ..studies import load_studies, source_name
from ..tables import BadRow, Reading, Row, open_text, read_csv, read_jsonl

__all__ = [
    "COLUMNS",
    "RADIOLOGIST",
    "UNKNOWN",
    "ParallelText",
    "machine",
    "read_aligned",
    "read_corpus",
    "read_pairs",
    "texts_of_records",
    "write_pairs",
]

RADIOLOGIST, UNKNOWN = "radiologist", "unknown"
#: Columns of a line, after those of the languages.
COLUMNS = ("study_id", "source", "split", "origin", "licence")
_MACHINE = "machine:"
_PARALLEL_ROWS, _STUDY_ROWS = "parallel_en_zh.jsonl", ("data.jsonl", "metadata.jsonl")
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_PACKED = (".gz", ".zip")
# What a set says of its pairs on its page and not in its rows.
_PUBLISHED = {"openi_iu_reports": ("machine:unnamed", "CC BY-NC-SA 4.0")}
# Reports of a hundred thousand studies are told apart by 16 bytes each.
_DIGEST_BYTES = 16


@dataclass(frozen=True)
class ParallelText:
    """Hold one text, in one language or in several.

    Attributes:
        texts: Language code to text, white space normalised.
        study_id: The study it describes; None where the source does not tell.
        source: The data set or file it comes from.
        split: The split of its study.
        origin: Who made the second language from the first: "radiologist", "machine:NAME" or "unknown".
        licence: Terms of both texts.
    """

    texts: Mapping[str, str] = field(repr=False)
    study_id: str | None = field(default=None, repr=False)
    source: str = ""
    split: str | None = None
    origin: str = UNKNOWN
    licence: str | None = None

    def as_row(self) -> dict[str, str | None]:
        """Return the line that says the same."""
        return {
            "study_id": self.study_id,
            **{language: self.texts.get(language) for language in LANGUAGES},
            **{column: getattr(self, column) or None for column in COLUMNS[1:]},
        }


def machine(name: str) -> str:
    """Return the origin of texts that a translator of that name made."""
    return _MACHINE + name


def read_corpus(
    path: str | Path, languages: Sequence[str] = LANGUAGES, reading: Reading | None = None, field: str = "text"
) -> Iterator[ParallelText]:
    """Read the texts of a file, or of a data set in whatever layout `open_set` knows.

    A folder with `parallel_en_zh.jsonl` gives the pairs in it when both languages are asked for, with the splits of
    its studies. Every other folder gives the reports of its studies that are there in all of the languages.

    Args:
        path: A file (see `read_pairs`) or a folder.
        languages: Those that must be there; others come along where they are.
        reading: How to go on after a bad row, and whether images have to be there; None: the first bad row ends the
            reading, and nobody looks for images.
        field: Of a study's report: "text" (cleaned), "raw", "findings" or "impression".

    Raises:
        ValueError: For a path that is not there, or is no such file or folder.
    """
    path, reading = Path(path), reading or Reading(images="unchecked")
    if path.is_file():
        yield from read_pairs(path, languages, reading)
    elif set(languages) == set(LANGUAGES) and (path / _PARALLEL_ROWS).is_file():
        yield from _read_published(path, reading)
    else:
        records = open_set(path, images="unchecked")
        yield from texts_of_records(records.set.read(path, reading), languages, field)


def _read_published(folder: Path, reading: Reading) -> Iterator[ParallelText]:
    """Read the pairs that lie beside the studies they speak of."""
    splits: dict[str, str | None] = {}
    if any((folder / name).is_file() for name in _STUDY_ROWS):
        splits = {study.study_id: study.split for study in load_studies(folder)}
    source = source_name(folder)
    origin, licence = _PUBLISHED.get(source, (UNKNOWN, None))

    def parse(row: Row) -> ParallelText:
        study_id = row.require("study_id")
        split = row.get("split") or splits.get(study_id)
        return _parallel_text(row, LANGUAGES, {}, source, origin, licence, split)

    yield from _distinct(reading.each(read_jsonl(folder / _PARALLEL_ROWS, reading), parse))


def read_pairs(
    path: str | Path,
    languages: Sequence[str] = LANGUAGES,
    reading: Reading | None = None,
    columns: Mapping[str, str] | None = None,
    origin: str = UNKNOWN,
) -> Iterator[ParallelText]:
    """Read texts from one file, each once: JSON lines (.jsonl) or a table with a head (.csv, .tsv), also packed.

    Args:
        path: Of .gz and .zip the name must still end so before that: "pairs.csv.gz".
        languages: Those that must be there; a row without one is bad.
        reading: How to go on after a bad row; None: the first ends the reading.
        columns: What the file calls its columns, by language code or by one of `COLUMNS`, such as {"en": "source",
            "zh": "target"}; those left out have the names of the format.
        origin: Of rows that do not state one.

    Raises:
        ValueError: For a missing file, a name that tells of no such format, or a table without the columns.
    """
    path, reading, columns = Path(path), reading or Reading(), dict(columns or {})
    if unknown := sorted(set(columns) - {*LANGUAGES, *COLUMNS}):
        raise ValueError(f"columns may name {', '.join((*LANGUAGES, *COLUMNS))}, got {', '.join(unknown)}")
    suffix = _suffix(path)
    if suffix == ".jsonl":
        rows = read_jsonl(path, reading)
    elif suffix in _DELIMITERS:
        needed = [columns.get(language, language) for language in languages]
        rows = read_csv(path, needed, reading, _DELIMITERS[suffix], has_long_text=True)
    else:
        raise ValueError(
            f"{path}: expected a file of texts (.jsonl, .csv or .tsv, also .gz), got {suffix or 'no suffix'!r}"
        )
    source = source_name(path).split(".")[0]
    parsed = reading.each(rows, lambda row: _parallel_text(row, languages, columns, source, origin, None, None))
    yield from _distinct(parsed)


def _suffix(path: Path) -> str:
    suffixes = [each.lower() for each in path.suffixes]
    if suffixes and suffixes[-1] in _PACKED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _parallel_text(
    row: Row,
    languages: Sequence[str],
    columns: Mapping[str, str],
    source: str,
    origin: str,
    licence: str | None,
    split: str | None,
) -> ParallelText:
    texts = {}
    for language in LANGUAGES:
        column = columns.get(language, language)
        text = row.require(column) if language in languages else row.get(column)
        if text:
            texts[language] = _one_line(text)
    said = {name: row.get(columns.get(name, name)) for name in COLUMNS}
    stated = said["origin"] or origin
    if stated not in (RADIOLOGIST, UNKNOWN) and not (stated.startswith(_MACHINE) and stated != _MACHINE):
        raise row.bad("bad_value", f"origin must be {RADIOLOGIST!r}, {UNKNOWN!r} or '{_MACHINE}NAME'")
    return ParallelText(
        texts=texts,
        study_id=said["study_id"],
        source=said["source"] or source,
        split=said["split"] or split,
        origin=stated,
        licence=said["licence"] or licence,
    )


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _distinct(texts: Iterable[ParallelText]) -> Iterator[ParallelText]:
    """Yield each text of a study once: views of one study often repeat its report."""
    seen: set[bytes] = set()
    for each in texts:
        key = json.dumps([each.source, each.study_id, sorted(each.texts.items())]).encode()
        digest = hashlib.blake2b(key, digest_size=_DIGEST_BYTES).digest()
        if digest not in seen:
            seen.add(digest)
            yield each


def read_aligned(
    files: Mapping[str, str | Path], reading: Reading | None = None, origin: str = UNKNOWN
) -> Iterator[ParallelText]:
    """Read two text files that say the same line by line, as the corpora of machine translation come.

    A pair of lines of which one is empty is bad.

    Args:
        files: Language code to text file.
        reading: How to go on after a bad row; None: the first ends the reading.
        origin: Of all pairs.

    Raises:
        ValueError: If not all languages have a file, a file is missing, or one has more lines than the other: it
            cannot be told which lines belong together.
    """
    if set(files) != set(LANGUAGES):
        raise ValueError(f"expected a file for each of {', '.join(LANGUAGES)}, got {', '.join(files) or 'none'}")
    reading = reading or Reading()
    paths = {language: Path(files[language]) for language in LANGUAGES}
    first, second = paths.values()
    with open_text(first) as one, open_text(second) as other:
        counted = sum(1 for _ in one), sum(1 for _ in other)
    if counted[0] != counted[1]:
        raise BadRow("not_a_row", second, None, f"expected {counted[0]} lines as in {first.name}, got {counted[1]}")

    def rows() -> Iterator[Row]:
        with open_text(first) as one, open_text(second) as other:
            for number, lines in enumerate(zip_longest(one, other, fillvalue=""), start=1):
                if any(lines) and "".join(lines).strip():
                    yield Row(first, number, dict(zip(LANGUAGES, lines, strict=True)))

    source = source_name(first).split(".")[0]

    def parse(row: Row) -> ParallelText:
        if any("\udc80" <= character <= "\udcff" for text in row.values.values() for character in text):
            raise row.bad("bad_encoding", "expected UTF-8 in this line of both files")
        return _parallel_text(row, LANGUAGES, {}, source, origin, None, None)

    yield from _distinct(reading.each(rows(), parse))


def texts_of_records(
    records: Iterable[StudyRecord], languages: Sequence[str] = LANGUAGES, field: str = "text"
) -> Iterator[ParallelText]:
    """Yield the reports of studies that have one in all of the languages.

    A report that its set does not mark as translated counts as a radiologist's.

    Args:
        records: Studies of any set.
        languages: Those that must be there.
        field: "text" (cleaned), "raw", "findings" or "impression".
    """
    if field not in ("text", "raw", "findings", "impression"):
        raise ValueError(f"field must be 'text', 'raw', 'findings' or 'impression', got {field!r}")
    return _distinct(_texts_of_records(records, languages, field))


def _texts_of_records(records: Iterable[StudyRecord], languages: Sequence[str], field: str) -> Iterator[ParallelText]:
    for record in records:
        said = {language: getattr(report, field) for language, report in record.reports.items()}
        texts = {language: _one_line(text) for language, text in said.items() if text and text.strip()}
        if all(language in texts for language in languages):
            translated = any(report.is_translated for report in record.reports.values())
            yield ParallelText(
                texts=texts,
                study_id=record.study_id,
                source=record.source,
                split=record.split,
                origin=machine("unnamed") if translated else RADIOLOGIST,
                licence=record.licence,
            )


def write_pairs(path: str | Path, pairs: Iterable[ParallelText]) -> int:
    """Write texts as JSON lines, packed where the name ends in .gz; returns how many.

    The file appears when all of them are written: a run that was stopped leaves an earlier file as it was.

    Raises:
        ValueError: If the path is a folder, or in none that exists.
    """
    count = 0
    with open_output(path) as file:
        for pair in pairs:
            file.write(json.dumps(pair.as_row(), ensure_ascii=False) + "\n")
            count += 1
    return count


@contextmanager
def open_output(path: str | Path) -> Iterator[IO[str]]:
    """Open a text file to be written, which takes its place when it is whole.

    Raises:
        ValueError: If the path is a folder, or in none that exists.
    """
    path = Path(path)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise ValueError(f"{path}: expected a file in a folder that exists")
    partial = path.with_name(path.name + ".part")
    try:
        # The time of a gzip file is left out: the same pairs give the same bytes.
        with open(partial, "wb") as raw:
            if path.suffix == ".gz":
                with gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0) as packed, _writer(packed) as file:
                    yield file
            else:
                with _writer(raw) as file:
                    yield file
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _writer(file: Any) -> io.TextIOWrapper:
    return io.TextIOWrapper(file, encoding="utf-8", newline="\n")
