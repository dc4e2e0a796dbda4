# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""JSON documents of lists, read entry by entry, also damaged ones."""

import gzip
import json
from pathlib import Path

import pytest

from m3fm.data.sets.annotation_json import opening, read_annotations, read_entries
from m3fm.data.tables import BadRow, Reading

PARTS = {"train": [{"id": "a"}, {"id": "b"}], "val": [{"id": "c"}], "test": [{"id": "d"}]}


def read(path: Path, on_bad: str = "raise", reader=read_entries) -> tuple[list[tuple[str, str]], Reading]:
    reading = Reading(on_bad)
    return [(entry.part, entry.values["id"]) for entry in reader(path, reading)], reading


@pytest.mark.parametrize("indent", [None, 2])
def test_entries_of_parts(tmp_path, indent):
    path = tmp_path / "annotation.json"
    path.write_text(json.dumps({"version": {"a": [1, "]"]}, **PARTS, "licence": "x"}, indent=indent))
    assert read(path)[0] == [("train", "a"), ("train", "b"), ("val", "c"), ("test", "d")]


def test_entries_of_a_list_and_of_a_compressed_file(tmp_path):
    path = tmp_path / "list.json.gz"
    path.write_bytes(gzip.compress(b"\xef\xbb\xbf" + json.dumps([{"id": "a"}, {"id": "b"}]).encode()))
    assert read(path)[0] == [("", "a"), ("", "b")]


def test_lines_places_and_splits(tmp_path):
    path = tmp_path / "annotation.json"
    path.write_text(json.dumps(PARTS, indent=1))
    entries = list(read_annotations(path, Reading()))
    assert [(entry.line, entry.number, entry.split) for entry in entries] == [
        (3, 1, "train"),
        (6, 2, "train"),
        (11, 1, "validation"),
        (16, 1, "test"),
    ]
    assert str(entries[2].bad("bad_value", "too long")) == f"{path}, line 11: entry 1 of 'val': too long"


@pytest.mark.parametrize(
    ("damage", "kind"),
    [
        (('"id": "b"', '"id": "b'), "not_a_row"),
        (('{"id": "b"}', '{"id": b}, {"id": "e"}'), "not_a_row"),
        (('{"id": "b"}', "7"), "not_a_row"),
        (('"b"', '"\udcff"'), "bad_encoding"),
        (('"b"', r'"\ud83d"'), "bad_encoding"),
    ],
)
def test_a_damaged_entry_costs_itself_alone(tmp_path, damage, kind):
    path = tmp_path / "annotation.json"
    path.write_bytes(json.dumps(PARTS).replace(*damage).encode("utf-8", "surrogateescape"))
    entries, reading = read(path, "skip")
    # In a file of one line, an entry after the damaged one cannot always be told from what the damage swallowed.
    assert [name for _, name in entries if name != "e"] == ["a", "c", "d"]
    assert [part for part, name in entries if name != "e"] == ["train", "val", "test"]
    assert reading.counts == {("annotation.json", kind): 1}
    with pytest.raises(BadRow, match="entry 2 of 'train'"):
        read(path)


def test_a_cut_file_keeps_what_came_before(tmp_path):
    path = tmp_path / "annotation.json"
    text = json.dumps(PARTS, indent=1)
    path.write_text(text[: text.index('"c"')])
    entries, reading = read(path, "skip")
    assert [name for _, name in entries] == ["a", "b"]
    assert sum(reading.counts.values()) == 1
    path.write_text(text[: text.index('"val"')])
    assert sum(read(path, "skip")[1].counts.values()) == 1


def test_nested_too_deeply(tmp_path):
    path = tmp_path / "annotation.json"
    path.write_text('{"train": [{"id": ' + "[" * 100_000 + ', {"id": "z"}], "val": [{"id": "c"}]}')
    _, reading = read(path, "skip")
    assert reading.counts[("annotation.json", "not_a_row")] >= 1


@pytest.mark.parametrize("text", ["", "7", '"train"'])
def test_what_is_no_list(tmp_path, text):
    path = tmp_path / "annotation.json"
    path.write_text(text)
    with pytest.raises(BadRow, match="expected a JSON list"):
        read(path, "skip")


def test_other_parts_are_raised_and_contradicting_splits_told(tmp_path):
    path = tmp_path / "annotation.json"
    path.write_text(json.dumps({"training": [{"id": "a"}]}))
    with pytest.raises(BadRow, match="'training'"):
        read(path, "skip", read_annotations)
    path.write_text(json.dumps({"train": [{"id": "a", "split": "test"}], "val": [{"id": "b", "split": "validation"}]}))
    entries, reading = read(path, "skip", read_annotations)
    assert [name for _, name in entries] == ["b"] and reading.counts == {("annotation.json", "bad_value"): 1}


@pytest.mark.parametrize(
    ("value", "paths"),
    [("a.png", ["a.png"]), (["a/0.png", "b"], ["a/0.png", "b"]), ([], None), (None, None), ([1], None), ("", None),
     ("../a", None), ("/a", None), (["a", "b/../../c"], None)],
)  # fmt: skip
def test_image_paths_stay_in_their_folder(tmp_path, value, paths):
    path = tmp_path / "annotation.json"
    path.write_text(json.dumps({"train": [{"id": "a", "image_path": value}]}))
    (entry,) = read_annotations(path, Reading())
    if paths is None:
        with pytest.raises(BadRow, match="image_path must be"):
            entry.image_paths()
    else:
        assert entry.image_paths() == paths


def test_openings(tmp_path):
    assert opening(None) == opening(tmp_path) == ""
    (tmp_path / "annotation.json.gz").write_bytes(b"no archive")
    assert opening(tmp_path) == ""
    (tmp_path / "annotation.json").write_text("x" * 20_000)
    assert opening(tmp_path) == "x" * 8192
