# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Tables and images are found where people keep them; ages and sexes as tables write them."""

import gzip
import pickle
from pathlib import Path

import pytest

from m3fm.data.sets import get_set
from m3fm.data.sets.demographics import age_in_years, sex_letter
from m3fm.data.sets.layouts import FileRow, ImageFolders, columns_of, find_base, plain_name, table_in, tables_like
from m3fm.data.tables import BadRow, Reading, Row, read_csv


def test_base_is_found_through_wrapping_folders(tmp_path: Path) -> None:
    inner = tmp_path / "physionet.org" / "files" / "set" / "1.0.0"
    inner.mkdir(parents=True)
    assert find_base(tmp_path, ("a.csv",)) is None
    with gzip.open(inner / "a.csv.gz", "wt") as file:
        file.write('\ufeff"one", two\n1,2\n')
    (tmp_path / ".cache").mkdir()
    assert find_base(tmp_path, ("b.csv", "a.csv")) == inner
    assert table_in(inner, ("b.csv", "a.csv")) == inner / "a.csv.gz"
    assert columns_of(inner / "a.csv.gz") == {"one", "two"}
    (inner / "broken.csv.gz").write_bytes(b"no archive")
    assert columns_of(inner / "broken.csv.gz") == columns_of(inner / "none.csv") == frozenset()
    # A folder with two others wraps neither: it may hold two sets.
    (tmp_path / "other").mkdir()
    assert find_base(tmp_path, ("a.csv",)) is None


def test_tables_by_a_pattern_newest_first(tmp_path: Path) -> None:
    for name in ("a-2.0.0.csv.gz", "a-2.1.0.csv", "a-2.0.0.csv.bak", "ba-2.0.0.csv", "a-3.csv.zip"):
        (tmp_path / name).touch()
    names = [path.name for path in tables_like(tmp_path, r"a-2.*\.csv|a-3\.csv")]
    assert names == ["a-3.csv.zip", "a-2.1.0.csv", "a-2.0.0.csv.gz"]


def test_a_file_of_a_folder_is_counted_by_the_folder() -> None:
    reading = Reading("skip")
    for number in range(3):
        reading.tell(FileRow(Path("set/reports"), 7, {}, f"{number}.xml").bad("bad_value", "expected more"))
    assert reading.counts == {("reports", "bad_value"): 3}
    assert str(reading.examples[1]) == "set/reports: 1.xml, line 7: expected more"


def test_missing_root_and_many_entries_are_no_base(tmp_path: Path) -> None:
    assert find_base(tmp_path / "none", ("a.csv",)) is None
    (tmp_path / "wrapped").mkdir()
    (tmp_path / "wrapped" / "a.csv").touch()
    for number in range(250):
        (tmp_path / f"{number}.png").touch()
    assert find_base(tmp_path, ("a.csv",)) is None


def test_images_are_found_in_parts(tmp_path: Path) -> None:
    for part, name in (("001", "a"), ("002", "b"), ("002", "c")):
        (tmp_path / f"images_{part}" / "images").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"images_{part}" / "images" / f"{name}.png").touch()
    folders = ImageFolders(tmp_path, ("images", "images_*/images"), (".jpg", ".png"))
    assert folders.find("a") == tmp_path / "images_001" / "images" / "a.png"
    assert folders.find("c") == tmp_path / "images_002" / "images" / "c.png"
    assert folders.find("a") == tmp_path / "images_001" / "images" / "a.png"
    assert not folders.find("d").is_file()
    assert ImageFolders(tmp_path, ("x", "y*"), (".png",)).find("a") == tmp_path / "x" / "a.png"


@pytest.mark.parametrize("name", ["../a", "b/c", "..", "b\\c"])
def test_names_that_lead_elsewhere_are_refused(name: str) -> None:
    with pytest.raises(BadRow, match=r"t\.csv, line 3: column 'file' must name a file") as error:
        plain_name(Row(Path("t.csv"), 3, {"file": name}), "file")
    assert error.value.kind == "bad_value" and name not in error.value.message


def test_commas_at_the_end_of_the_head_need_no_fields(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text("a,b,,\n1,2\n3,4,,\n5,6,,note\n7\n8,9,,,\n")
    reading = Reading("skip")
    rows = list(read_csv(table, ("a", "b"), reading))
    assert [(row.line, row.get("a"), row.get("b")) for row in rows] == [(2, "1", "2"), (3, "3", "4"), (4, "5", "6")]
    assert reading.counts == {("t.csv", "not_a_row"): 2}


@pytest.mark.parametrize(
    ("text", "years"),
    [
        (None, None),
        ("57", 57.0),
        ("058Y", 58.0),
        ("45yrs", 45.0),
        ("18 months", 1.5),
        ("011M", 11 / 12),
        ("64days", 64 / 365.25),
        ("2w", 14 / 365.25),
        ("0", 0.0),
        ("120", 120.0),
        ("414", None),
        ("65.0", 65.0),
    ],
)
def test_ages(text: str | None, years: float | None) -> None:
    assert age_in_years(text) == (None if years is None else pytest.approx(years))


@pytest.mark.parametrize("text", ["old", "-3", "12x", "Y", "1e3"])
def test_what_is_no_age(text: str) -> None:
    with pytest.raises(ValueError, match="an age must be a number"):
        age_in_years(text)


def test_sexes() -> None:
    assert [sex_letter(text) for text in ("F", "female", "Femal", "M", "Male", "O", "", None)] == [
        *("F", "F", "F", "M", "M"),
        *(None, None, None),
    ]


@pytest.mark.parametrize(
    "name", ["nih_chestxray14", "rsna", "siim", "vindr", "covid_chestxray", "shenzhen_tb", "montgomery_tb"]
)
def test_sets_go_to_other_processes(name: str, tmp_path: Path) -> None:
    # Workers of a data loader may be started afresh, and then get the set by pickle.
    again = pickle.loads(pickle.dumps(get_set(name)))
    assert again.name == name and not again.recognises(tmp_path)
    assert again.layout and again.url.startswith("https://") and again.reference
