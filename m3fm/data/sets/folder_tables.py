# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""The tables of an own folder, in whichever form, as rows of one form: values as JSON lines have them."""

from __future__ import annotations

import csv
import difflib
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ..schema import LANGUAGES
from ..tables import BadRow, Reading, Row, read_csv, read_jsonl
from .class_folders import find_class_folders, read_class_folders

__all__ = [
    "FILE_LISTS",
    "LABEL_SEPARATOR",
    "SEPARATOR",
    "TABLES",
    "FolderTable",
    "RowImage",
    "find_tables",
    "has_table",
    "is_known",
    "names_images",
    "near_miss",
    "read_head",
    "read_own_csv",
    "read_rows",
    "row_images",
    "split_name",
]

#: In the order in which they are looked for; `data.jsonl` is text alone.
TABLES = ("metadata.jsonl", "data.jsonl", "metadata.csv", "metadata.parquet")
_TEXT_TABLE = "data.jsonl"
#: Between the images of a study in one cell, as in the lists that `m3fm report` takes.
SEPARATOR = ";"
#: Between the labels of a study in one cell.
LABEL_SEPARATOR = "|"
#: Columns with several images a row.
FILE_LISTS = ("file_names", "images")
_FILE, _FILE_ENDS = "file_name", ("_file_name", "_file_names")
# What the views of a study are called in the names of such columns.
_VIEWS = {"pa": "PA", "ap": "AP", "frontal": "FRONTAL", "lateral": "LATERAL", "lat": "LATERAL", "ll": "LATERAL"}
_SHORT_VIEWS = {"L": "LATERAL", "LL": "LATERAL", "LAT": "LATERAL"}

_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "validate", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_TEXTS = ("report", "reading", "clinical_notes", "findings", "impression")
_COLUMNS = (
    *("modality", "split", "patient_id", "study_id", "labels", "view", "views", "age", "sex", "doi", "url", "licence"),
    *(f"{name}_{language}" for name in _TEXTS for language in LANGUAGES),
)
# Columns that are read or mean something else, but which no other name is likely a slip for.
_OTHER_COLUMNS = frozenset({"license", "source", "infected_slice"})
# "report" is nearer to "report_en" than "image_ids" to "images".
_NEAR = 0.81
_PARQUET_ROWS = 1000
# Lines that are not ASCII, after which the encoding of a table is clear.
_TOLD_LINES = 200
# Share of all lines: fewer are rows in a wrong encoding.
_CHINESE_SHARE = 0.25
_CHINESE_WORD = re.compile("[\u4e00-\u9fff]{2}")
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")


@dataclass(frozen=True)
class FolderTable:
    """One table.

    Attributes:
        path: Where it is; a folder where folders stand for a table.
        folder: What its file names are relative to, relative to the own folder: "." or the folder of a split.
        split: Of its rows where they do not say.
        names_images: Whether its rows have images.
    """

    path: Path
    folder: PurePosixPath
    split: str | None
    names_images: bool


@dataclass(frozen=True)
class RowImage:
    """One image of a row: where it is, relative to the own folder, and its view."""

    name: PurePosixPath
    view: str | None


def find_tables(root: Path) -> list[FolderTable]:
    """Return the table of a folder, or else those of its folders `train`, `validation` and `test`, in that order.

    Without any table, folders named by findings stand for one.
    """
    own = _table(root, PurePosixPath(), None)
    if own is not None:
        return [own]
    parts = sorted(
        (list(_SPLITS).index(path.name.lower()), path.name)
        for path in (root.iterdir() if root.is_dir() else ())
        if path.name.lower() in _SPLITS and path.is_dir()
    )
    tables = (_table(root / name, PurePosixPath(name), split_name(name)) for _, name in parts)
    found = [table for table in tables if table is not None]
    if not found and root.is_dir() and find_class_folders(root, _SPLITS):
        found.append(FolderTable(root, PurePosixPath(), None, True))
    return found


def has_table(root: Path) -> bool:
    """Tell whether a folder is an own folder."""
    return bool(find_tables(root))


def _table(folder: Path, relative: PurePosixPath, split: str | None) -> FolderTable | None:
    path = next((folder / name for name in TABLES if (folder / name).is_file()), None)
    return None if path is None else FolderTable(path, relative, split, path.name != _TEXT_TABLE)


def split_name(name: str) -> str:
    """Return "train", "validation" or "test" for their usual names, in any case; other names stay as they are."""
    return _SPLITS.get(name.lower(), name)


def read_rows(table: FolderTable, label_columns: Collection[str], reading: Reading) -> Iterator[Row]:
    """Read the rows of a table, streaming, with lists where a cell of a CSV file has several images or labels.

    Raises:
        BadRow: If nothing of the table can be read.
    """
    if table.path.is_dir():
        yield from read_class_folders(table.path, _SPLITS, reading)
        return
    suffix = table.path.suffix
    if suffix == ".jsonl":
        _check_encoding(table.path)
        yield from read_jsonl(table.path, reading)
        return
    rows = read_own_csv(table.path, reading) if suffix == ".csv" else _read_parquet(table.path)
    for row in rows:
        yield Row(row.file, row.line, _as_lists(row.values, label_columns))


def read_own_csv(path: Path, reading: Reading, columns: Sequence[str] = ()) -> Iterator[Row]:
    """Read a CSV file as users make them, streaming; what programs for tables do to it is told by its name.

    A few rows in another encoding are bad rows like others.

    Args:
        path: The file.
        reading: How bad rows are met.
        columns: Those that must be there.

    Raises:
        BadRow: If it is GBK or UTF-16, has other delimiters than commas, or lacks a column.
    """
    _check_encoding(path)
    _check_delimiter(path)
    yield from read_csv(path, columns, reading, has_long_text=True)


def read_head(path: Path) -> Row:
    """Return the first line of a CSV file as a row whose columns have no values."""
    with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
        names = next(csv.reader(file), ())
    return Row(path, 1, {name.strip(): None for name in names if name.strip()})


def _as_lists(values: dict, label_columns: Collection[str]) -> dict:
    """Split the cells that hold several values; `label` stands for `labels`, as in Hugging Face's folders."""
    if "label" in values and "labels" not in values:
        values = {"labels" if name == "label" else name: value for name, value in values.items()}
    separators = dict.fromkeys((*FILE_LISTS, "views"), SEPARATOR) | dict.fromkeys(label_columns, LABEL_SEPARATOR)
    separators |= {name: SEPARATOR for name in values if name.endswith("_file_names")}
    split = {
        name: [part.strip() for part in values[name].split(separator) if part.strip()] or None
        for name, separator in separators.items()
        if isinstance(values.get(name), str)
    }
    return values | split


def _read_parquet(path: Path) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ImportError('Parquet files need pyarrow: pip install "m3fm[data]"') from None
    try:
        with pyarrow.parquet.ParquetFile(path) as opened:
            batches = opened.iter_batches(_PARQUET_ROWS)
            yield from (
                Row(path, number, values)
                for number, values in enumerate((each for batch in batches for each in batch.to_pylist()), start=1)
            )
    except pyarrow.ArrowInvalid as error:
        raise BadRow("not_a_row", path, None, f"no Parquet file that can be read: {type(error).__name__}") from None


def _check_encoding(path: Path) -> None:
    """Refuse a table that as a whole is in another encoding; single wrong rows are left to the reading of rows."""
    lines, told, chinese = 0, 0, 0
    with open(path, "rb") as file:
        if file.read(2) in _UTF_16:
            raise BadRow("bad_encoding", path, None, "is UTF-16, expected UTF-8: save it as 'CSV UTF-8'")
        file.seek(0)
        for line in file:
            lines += not line.isspace()
            if line.isascii():
                continue
            told += 1
            chinese += _is_chinese_code(line)
            if told == _TOLD_LINES:
                break
    if 2 * chinese > told and chinese > _CHINESE_SHARE * lines:
        raise BadRow(
            "bad_encoding",
            path,
            None,
            "looks like GBK / GB18030, as Excel saves Chinese tables; expected UTF-8: save it as 'CSV UTF-8', or "
            "convert it with iconv -f GB18030 -t UTF-8",
        )


def _is_chinese_code(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        # A lone Latin letter with an accent is no Chinese word.
        return _CHINESE_WORD.search(line.decode("gb18030", "replace")) is not None
    return False


def _check_delimiter(path: Path) -> None:
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        head = file.readline()
    if "," in head:
        return
    for delimiter, name in ((";", "semicolons"), ("\t", "tabs")):
        if delimiter in head:
            raise BadRow(
                "wrong_column",
                path,
                1,
                f"the columns are separated by {name}, as Excel may write them; expected commas",
            )


def names_images(column: str) -> bool:
    """Tell whether a column of this name may have the images of a row."""
    return column == _FILE or column in FILE_LISTS or column.endswith(_FILE_ENDS)


def row_images(row: Row, table: FolderTable) -> list[RowImage]:
    """Return the images of a row: `file_name`, a list of `file_names` or `images`, or columns as `pa_file_name`.

    Raises:
        BadRow: Without an image, or where a path leaves the folder.
    """
    names = [(row.get(_FILE), row.get("view") if isinstance(row.values.get("view"), str | None) else None)]
    listed = next((column for column in FILE_LISTS if row.values.get(column) is not None), None)
    if listed is not None:
        names += zip(_names(row, listed), _listed_views(row, listed), strict=True)
    elif names[0][0] is None:
        names += [
            (name, _VIEWS.get(column.partition("_")[0].lower()))
            for column in row.values
            if column.endswith(_FILE_ENDS)
            for name in _names(row, column)
        ]
    images = [RowImage(_inside(row, table, name), _view(view)) for name, view in names if name is not None]
    if not images:
        row.require(_FILE)
    if len({image.name for image in images}) < len(images):
        raise row.bad("bad_value", "the row gives an image more than once")
    return images


def _names(row: Row, column: str) -> list[str]:
    value = row.values[column]
    if not isinstance(value, list):
        name = row.get(column)
        return [] if name is None else [name]
    if not all(isinstance(name, str) and name.strip() for name in value):
        raise row.bad("bad_value", f"column {column!r} must be a list of file names")
    return [name.strip() for name in value]


def _listed_views(row: Row, listed: str) -> list[str | None]:
    number = len(_names(row, listed))
    column = next((column for column in ("views", "view") if isinstance(row.values.get(column), list)), None)
    if column is None:
        return [row.get("view")] * number
    views = row.values[column]
    if len(views) != number or not all(isinstance(view, str | None) for view in views):
        raise row.bad("bad_value", f"expected a view for each of {number} images in {column!r}, got {len(views)}")
    return views


def _view(view: str | None) -> str | None:
    upper = (view or "").strip().upper()
    return _SHORT_VIEWS.get(upper, upper) or None


def _inside(row: Row, table: FolderTable, name: str) -> PurePosixPath:
    """Return the path relative to the own folder; one that leads out of it could bring any file into a data set."""
    path = PurePosixPath(name)
    if not path.name:
        raise row.bad("bad_value", "expected the name of an image file, got that of the folder")
    if path.is_absolute() or ".." in path.parts or re.match(r"[A-Za-z]:|\\", name):
        raise row.bad(
            "bad_value",
            "file names must be relative and stay in the folder; put the images, or links to them, into it",
        )
    return table.folder / path


def is_known(column: str) -> bool:
    """Tell whether a column of this name is read in some folder, so that the name is none that a row gave."""
    return column in (_FILE, *FILE_LISTS, *_COLUMNS) or column in _OTHER_COLUMNS


def near_miss(column: str, columns: Collection[str], table: FolderTable) -> str | None:
    """Return the column that a column is likely meant to be, unless that one is there as well."""
    known = (*(_FILE, *FILE_LISTS) * table.names_images, *_COLUMNS)
    if column in known or column in _OTHER_COLUMNS:
        return None
    absent = [name for name in known if name not in columns]
    name = column.casefold().replace(" ", "_")
    # The beginning of a name, or its letters in another order.
    near = [each for each in absent if each.rpartition("_")[0] == name or sorted(each) == sorted(name)]
    near = near or difflib.get_close_matches(name, absent, n=1, cutoff=_NEAR)
    return near[0] if near else None
