# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Find the studies of a run: in folders, in lists (CSV, JSON lines), and single files, in an order that stays."""

import csv
import io
import json
import os
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from tqdm.auto import tqdm

from ..series_m3fm import group_studies
from ..study_files_m3fm import find_images, path_kind

METADATA = "metadata.jsonl"
LIST_SUFFIXES = (".csv", ".jsonl")
# Where a row of a list names its image or images, the first of these that it has.
IMAGE_COLUMNS = ("image", "file_name", "path")
# In a data folder.
DATA_COLUMNS = ("file_name",)
STUDY_COLUMN = "study_id"
# Between the images of one study, in a list and in the name of a study.
SEPARATOR = ";"
# Images in a folder are told by their content; files with these endings that turn out to be none are errors.
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".dcm", ".dicom", ".nii", ".nii.gz")

_LISTED_NAMES = 4
_SHOW_PROGRESS_FROM = 1000


@dataclass(frozen=True)
class StudySource:
    """One study.

    Attributes:
        name: What the output calls it: paths as they were found, never an identifier.
        images: Its files; a folder stands for all images in it.
    """

    name: str
    images: tuple[Path, ...]


def find_sources(files: str | Path | Sequence[str | Path | StudySource]) -> list[StudySource]:
    """Finds the studies in what a user names.

    - A folder with `metadata.jsonl` has the studies of that list; there, rows that say `"modality": "ct"` are a study
      each.
    - In any other folder, and below it, the radiographs of one DICOM study are one study, and so are its CT slices;
      every other image is a study. They come in the order of their paths.
    - A CSV or JSON lines file has a study a row, with its image under one of `IMAGE_COLUMNS`, or several, in a list or
      with `;` between them, relative to the folder of the file. Rows with one `study_id` are one study.
    - Any other file is a study.

    Studies of the one folder or list that is given are named by paths relative to it; where more is given, these
    follow the path of the folder. A DICOM study is named by the folder that holds nothing else, and any other study by
    its files, `a.png;b.png`; by the first and how many more, `a.dcm;+299`, where they are more than four.

    Args:
        files: A folder, a list or an image, or several of these; a `StudySource` is taken as it is.

    Returns:
        The studies, at least one, each with a name of its own.

    Raises:
        ValueError: If nothing is found, a list is not right, or two studies have one name.
        ImportError: If a folder holds DICOM files and pydicom is not installed.
    """
    given = [files] if isinstance(files, str | os.PathLike) else list(files)
    if not given:
        raise ValueError("Expected files or a folder of images, got none.")
    found: dict[str, StudySource] = {}
    for each in given:
        is_found = isinstance(each, StudySource)
        for source in [each] if is_found else _sources_of(os.fspath(each), is_alone=len(given) == 1):
            source = StudySource(_as_text(source.name), source.images)
            if found.setdefault(source.name, source) is not source:
                raise ValueError(f"Expected each study once, got {source.name} more than once.")
    return list(found.values())


def _as_text(name: str) -> str:
    """Returns a name that can be written as UTF-8, whatever bytes a file system has in it."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _sources_of(given: str, is_alone: bool) -> list[StudySource]:
    if "://" in given:
        raise ValueError(f"{given.partition('?')[0]}: is an address, which is opened only if asked to (--download).")
    path = Path(given)
    if path.is_dir():
        if not os.access(path, os.R_OK | os.X_OK):
            return [StudySource(given, (path,))]  # reading it says so, and the others go on
        listed = path / METADATA
        sources = list(_from_list(listed) if listed.is_file() else _from_folder(path))
        if not sources:
            raise ValueError(f"{given}: no chest image in this folder.")
        given = start = path.as_posix()
    elif path.suffix.lower() in LIST_SUFFIXES:
        sources = list(_from_list(path))
        if not sources:
            raise ValueError(f"{given}: no image in this list.")
        start = path.parent.as_posix()
    else:
        return [StudySource(given, (path,))]
    sources = [source if source.name else StudySource(given, source.images) for source in sources]
    if is_alone or start == os.curdir:
        return sources
    return [
        source
        if source.name == given or PurePath(source.name).is_absolute()
        else StudySource(f"{start}/{source.name}", source.images)
        for source in sources
    ]


# --------------------------------------------------------------------------------------------------------------------
# Folders


def _from_folder(folder: Path) -> Iterator[StudySource]:
    """Yields the studies of a folder; the name of one that is all of it is empty."""
    kinds = {Path(path): kind for path, kind in find_images(folder)[0]}
    # A damaged image starts like none, and would be passed over in silence.
    kinds |= dict.fromkeys(_damaged_images(folder, kinds), "damaged")
    # By parts, so that no folder lies among the files whose names start like its own.
    paths = sorted(kinds, key=lambda path: path.relative_to(folder).parts)
    studies = [(path,) for path in paths if kinds[path] != "dicom"]
    scanned = [path for path in paths if kinds[path] == "dicom"]
    if scanned:
        is_quick = len(scanned) < _SHOW_PROGRESS_FROM
        shown = tqdm(scanned, desc="headers", unit="file", leave=False, disable=True if is_quick else None)
        studies += [tuple(map(Path, each)) for each in group_studies(shown)]
    place = {path: number for number, path in enumerate(paths)}
    studies.sort(key=lambda study: place[study[0]])
    counts = _count_below(paths, folder)
    for study in studies:
        yield StudySource(_study_name(study, folder, counts), study)


def _damaged_images(folder: Path, images: Container[Path]) -> Iterator[Path]:
    """Yields files that by their names are images and by their content none, and what may not be opened."""
    closed: list[str] = []
    for parent, folders, files in os.walk(folder, onerror=lambda error: closed.append(error.filename)):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (Path(parent) / name for name in files if not name.startswith(".")):
            if path in images or (path.is_file() and path_kind(path) is not None):  # a preview, say
                continue
            if path.name.lower().endswith(IMAGE_SUFFIXES) or (path.is_file() and not os.access(path, os.R_OK)):
                yield path
    yield from map(Path, closed)


def _count_below(paths: Iterable[Path], folder: Path) -> Mapping[Path, int]:
    """Counts the images below each folder that holds any."""
    counts: dict[Path, int] = {}
    for path in paths:
        for parent in path.parents:
            counts[parent] = counts.get(parent, 0) + 1
            if parent == folder:
                break
    return counts


def _study_name(images: Sequence[Path], folder: Path, counts: Mapping[Path, int]) -> str:
    names = [image.relative_to(folder).as_posix() for image in images]
    if len(names) == 1:
        return names[0]
    common = Path(os.path.commonpath([image.parent for image in images]))
    if counts[common] == len(images):
        while common != folder and counts[common.parent] == len(images):
            common = common.parent
        return "" if common == folder else common.relative_to(folder).as_posix()
    return _joined(names)


def _joined(names: Sequence[str]) -> str:
    shown = names if len(names) <= _LISTED_NAMES else [names[0], f"+{len(names) - 1}"]
    return SEPARATOR.join(shown)


# --------------------------------------------------------------------------------------------------------------------
# Lists


def _from_list(path: Path) -> Iterator[StudySource]:
    is_data_folder = path.name == METADATA
    columns = DATA_COLUMNS if is_data_folder else IMAGE_COLUMNS
    rows = _csv_rows(path, columns) if path.suffix.lower() == ".csv" else _json_rows(path, columns)
    studies: dict[tuple[str, str], list[str]] = {}
    for place, row in rows:
        names = _image_names(row, columns, path.parent, place)
        study = row.get(STUDY_COLUMN)
        if study is not None and not isinstance(study, str | int):
            raise ValueError(f"{place}: expected {STUDY_COLUMN} to be text or a whole number.")
        # The slices of a CT are a study each in a data folder, as in `m3fm.data.load_studies`.
        is_alone = study is None or study == "" or (is_data_folder and row.get("modality") == "ct")
        key = ("images", SEPARATOR.join(names)) if is_alone else ("study", str(study))
        if is_alone and key in studies:
            raise ValueError(f"{place}: expected each study once, got {key[1]} more than once.")
        images = studies.setdefault(key, [])
        if repeated := next((name for name in names if (images + names).count(name) > 1), None):
            raise ValueError(f"{place}: expected each image of a study once, got {repeated} more than once.")
        images.extend(names)
    for names in studies.values():
        yield StudySource(_joined(names), tuple(path.parent / name for name in names))


def _image_names(row: Mapping[str, Any], columns: Sequence[str], folder: Path, place: str) -> list[str]:
    column = next(name for name in columns if name in row)
    value = row[column]
    if isinstance(value, str) and SEPARATOR in value and not _exists(folder / value):
        value = [name.strip() for name in value.split(SEPARATOR)]
    names = value if isinstance(value, list) else [value]
    if not names or not all(isinstance(name, str) and name.strip() and "\0" not in name for name in names):
        raise ValueError(f"{place}: expected {column} to be the path of an image, or several.")
    return [PurePath(name).as_posix() for name in names]


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # names that no file can have
        return False


def _json_rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    # Not by `splitlines`: characters that it takes for line breaks may stand in JSON text.
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict) or not row.keys() & set(columns):
            raise ValueError(f"{place}: expected a JSON object with {' or '.join(columns)}.")
        yield place, row


def _csv_rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    reader = csv.reader(io.StringIO(_text(path), newline=""), strict=True)
    names: list[str] | None = None
    while True:
        number = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise ValueError(f"{path}, line {number}: not a row of a CSV file ({error}).") from None
        if cells is None:
            return
        if not any(cell.strip() for cell in cells):
            continue
        if names is None:
            names = _checked_header([cell.strip() for cell in cells], columns, path)
        elif len(cells) != len(names):
            raise ValueError(f"{path}, line {number}: expected {len(names)} cells, got {len(cells)}.")
        else:
            row = {name: cell.strip() for name, cell in zip(names, cells, strict=True)}
            yield f"{path}, line {number}", row


def _checked_header(names: list[str], columns: Sequence[str], path: Path) -> list[str]:
    if not set(columns) & set(names):
        hint = "" if len(names) > 1 else ", and commas between columns"
        raise ValueError(f"{path}, line 1: expected a column {' or '.join(columns)}{hint}, got {names}.")
    if len(set(names)) < len(names):
        raise ValueError(f"{path}, line 1: expected each column once, got {names}.")
    return names


def _text(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        raise ValueError(f"{path}: {reason}.") from None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {number}: expected UTF-8 text; save the list with that encoding.") from None


__all__ = ["IMAGE_COLUMNS", "METADATA", "StudySource", "find_sources"]
