# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""One row in a hundred of the real tables is broken, each in another way: no other row is lost."""

import gzip
import random
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from m3fm.data.opening import open_set
from m3fm.data.schema import StudyRecord

# Table of the data folder, its name in the layout of its set, and how many of its rows are read.
TABLES = {
    "nih_chestxray14": ("Data_Entry_2017_v2020.csv.gz", "Data_Entry_2017_v2020.csv", 5000),
    "rsna": ("kaggle_stage_2_train_labels.csv.zip", "stage_2_train_labels.csv", 5000),
    "siim": ("siim-pneumothorax-train-rle.csv.gz", "train-rle.csv", 3000),
    "vindr": ("vinbigdata-train.csv.gz", "train.csv", 5000),
}
SPOIL: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda line: line.rsplit(b",", 1)[0],
    "too long": lambda line: line + b",,,,,",
    "open quote": lambda line: b'"' + line,
    "encoding": lambda line: b"\xff\xfe" + line,
    "empty fields": lambda line: b"," * line.count(b","),
    "another label": lambda line: line.split(b",")[0] + b",?" * line.count(b","),
    "a folder": lambda line: b"../" + line,
}


def lines_of(path: Path) -> list[bytes]:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            return archive.read(archive.namelist()[0]).splitlines()
    return gzip.decompress(path.read_bytes()).splitlines()


def records_of(folder: Path, source: str, table: str, lines: list[bytes], on_bad: str) -> dict[str, StudyRecord]:
    folder.mkdir(exist_ok=True)
    (folder / table).write_bytes(b"\n".join(lines) + b"\n")
    opened = open_set(folder, source, on_bad=on_bad, images="unchecked")
    records = {record.study_id: record for record in opened}
    if on_bad == "skip":
        assert sum(opened.reading.counts.values()) == max(1, (len(lines) - 1) // 100)
    return records


@pytest.mark.realdata
@pytest.mark.parametrize("source", TABLES)
def test_no_good_row_is_lost(source: str, data_root: Path, tmp_path: Path) -> None:
    file, table, count = TABLES[source]
    head, *rows = lines_of(data_root / "label_tables" / file)[: count + 1]
    clean = records_of(tmp_path / source, source, table, [head, *rows], "raise")
    touched = set()
    for number, place in enumerate(random.Random(0).sample(range(len(rows)), len(rows) // 100)):
        touched.add(rows[place].split(b",")[0].decode().removesuffix(".png"))
        rows[place] = list(SPOIL.values())[number % len(SPOIL)](rows[place])
    dirty = records_of(tmp_path / source, source, table, [head, *rows], "skip")
    for study_id, record in clean.items():
        if study_id not in touched:
            assert dirty[study_id] == record
    assert dirty.keys() <= clean.keys()
