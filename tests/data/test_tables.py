# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
import csv
import gzip
import io
import json
import pickle
import zipfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from m3fm.data.tables import BAD_KINDS, BadRow, Reading, Row, open_text, read_csv, read_jsonl, shown


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read(path: Path, columns=("id",), on_bad: str = "skip", **options) -> tuple[list[dict], dict[int, str]]:
    """Returns the good rows, and the kinds of the bad ones by their lines."""
    reading = Reading(on_bad)
    rows = [row.values for row in read_csv(path, columns, reading, **options)]
    return rows, {error.line: error.kind for error in reading.examples}


# --------------------------------------------------------------------------------------------------------------------
# Files


def test_same_rows_from_every_kind_of_file(tmp_path):
    text = "id,text\n1,ä\n2,“b”\n"
    files = [
        write(tmp_path / "plain.csv", text),
        write(tmp_path / "mark.csv", b"\xef\xbb\xbf" + text.encode()),
        write(tmp_path / "windows.csv", text.replace("\n", "\r\n")),
        write(tmp_path / "old_mac.csv", text.replace("\n", "\r")),
        write(tmp_path / "no_end.csv", text.rstrip()),
        write(tmp_path / "blank_lines.csv", text.replace("\n", "\n\n")),
        write(tmp_path / "packed.csv.gz", gzip.compress(text.encode())),
        write(tmp_path / "PACKED.CSV.GZ", gzip.compress(b"\xef\xbb\xbf" + text.encode())),
    ]
    with zipfile.ZipFile(tmp_path / "packed.csv.zip", "w") as archive:
        archive.writestr("folder/", "")
        archive.writestr("folder/other name.csv", text)
        archive.writestr("__MACOSX/folder/._other name.csv", "x")
    for path in [*files, tmp_path / "packed.csv.zip"]:
        assert read(path, ("id", "text"), "raise")[0] == [{"id": "1", "text": "ä"}, {"id": "2", "text": "“b”"}], path


def test_file_that_cannot_be_opened(tmp_path):
    with pytest.raises(BadRow, match=r"gone.csv: no such file") as caught:
        read(tmp_path / "gone.csv")
    assert (caught.value.kind, caught.value.line) == ("missing_file", None)
    with zipfile.ZipFile(tmp_path / "two.zip", "w") as archive:
        archive.writestr("a.csv", "id\n")
        archive.writestr("b.csv", "id\n")
    with pytest.raises(BadRow, match="expected one file in the archive, got 2"):
        read(tmp_path / "two.zip")


@pytest.mark.parametrize("name", ["cut.csv.gz", "none.csv.gz", "none.csv.zip", "changed.csv.gz"])
def test_damaged_archive_is_named(tmp_path, name):
    whole = gzip.compress("\n".join(["id", *map(str, range(10000))]).encode())
    content = {
        "cut": whole[: len(whole) // 2],
        "none": b"id\n1\n",
        "changed": whole[:2000] + b"\0\1\2\3" + whole[2004:],
    }[name.split(".")[0]]
    path = write(tmp_path / name, content)
    with pytest.raises(BadRow, match=f"{name}: expected a whole") as caught:
        read(path)
    assert caught.value.kind == "bad_encoding"


def test_open_text_keeps_wrong_bytes_apart(tmp_path):
    with open_text(write(tmp_path / "text.txt", b"a\xffb\r\n")) as file:
        assert file.read() == "a\udcffb\r\n"


# --------------------------------------------------------------------------------------------------------------------
# CSV


def test_head(tmp_path):
    path = write(tmp_path / "a.csv", ' id , "Age (years)" \n1,2\n')
    assert read(path, ("id",), "raise")[0][0]["id"] == "1"
    with pytest.raises(BadRow, match=r"a.csv, line 1: expected the columns \['name'\], got \['id'") as caught:
        read(path, ("id", "name"))
    assert caught.value.kind == "wrong_column"
    for empty in ("", "\n"):
        with pytest.raises(BadRow, match="line 1"):
            read(write(tmp_path / "empty.csv", empty))
    assert read(write(tmp_path / "head.csv", "id,text\n")) == ([], {})


def test_table_without_head_tells_of_no_patient(tmp_path):
    with pytest.raises(BadRow, match="got none of them") as caught:
        read(write(tmp_path / "a.csv", "patient00042,68\n"), ("id", "age"))
    assert "patient00042" not in str(caught.value)


def test_only_known_names_of_a_head_are_told(tmp_path):
    # A row stands in the place of the head, one of its cells being called as a column is.
    with pytest.raises(BadRow, match=r"expected the columns \['id', 'age'\], got \['view'\]$"):
        read(write(tmp_path / "a.csv", "patient00042,view,Clear lungs.\n"), ("id", "view", "age"))


@pytest.mark.parametrize("text", ["", "\n", " , \n1,2\n"])
def test_a_table_without_any_head_is_refused(tmp_path, text):
    with pytest.raises(BadRow, match="line 1: expected the names of the columns, got none") as caught:
        read(write(tmp_path / "a.csv", text), columns=())
    assert caught.value.kind == "wrong_column"


def test_a_field_beyond_the_limit_of_the_csv_module(tmp_path):
    long = "x" * (csv.field_size_limit() + 1)
    limit = csv.field_size_limit()
    for has_long_text in (False, True):
        path = write(tmp_path / "a.csv", f"id,text\n1,a\n2,{long}\n3,b\n")
        rows, bad = read(path, has_long_text=has_long_text)
        assert ([row["id"] for row in rows], bad) == (["1", "3"], {3: "not_a_row"})
        with pytest.raises(BadRow, match=f"line 3: a field is longer than {limit} characters"):
            read(path, on_bad="raise", has_long_text=has_long_text)
    with pytest.raises(BadRow, match=f"line 1: expected the names .* one that is longer than {limit}") as caught:
        read(write(tmp_path / "head.csv", f"id,{long}\n1,2\n"))
    assert caught.value.kind == "wrong_column"
    assert csv.field_size_limit() == limit


def test_delimiter_and_quotes(tmp_path):
    text = 'id;text\n1;"a;b ""c"""\n2;5" wide\n3;""\n'
    rows, bad = read(write(tmp_path / "a.csv", text), delimiter=";")
    assert [row["text"] for row in rows] == ['a;b "c"', '5" wide', ""]
    assert bad == {}


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        (b"9", "not_a_row"),
        (b"9,a,b", "not_a_row"),
        (b'9,"a', "not_a_row"),
        (b'"9,a', "not_a_row"),
        (b'9,"a"b', "not_a_row"),
        (b"9,\xff", "bad_encoding"),
        (b"9,\xe4\xb8", "bad_encoding"),
        ("9,ä".encode("latin-1"), "bad_encoding"),
        ("9,肺炎".encode("gb18030"), "bad_encoding"),
    ],
)
@pytest.mark.parametrize("has_long_text", [False, True])
def test_bad_line_costs_itself_alone(tmp_path, line, kind, has_long_text):
    path = write(tmp_path / "a.csv", b"id,text\n1,a\n" + line + b'\n2,"b"\n3,"c, d"\n')
    rows, bad = read(path, has_long_text=has_long_text)
    assert [row["text"] for row in rows] == ["a", "b", "c, d"]
    assert bad == {3: kind}
    with pytest.raises(BadRow, match=r"a.csv, line 3: ") as caught:
        read(path, on_bad="raise", has_long_text=has_long_text)
    assert (caught.value.kind, caught.value.file, caught.value.line) == (kind, path, 3)


def test_long_texts(tmp_path):
    text = 'id,text,n\r\n1,"two\r\nlines, ""quoted""\r\n",2\r\n\r\n2,"a\n\nb",\n3,c,4\n'
    rows, bad = read(write(tmp_path / "a.csv", text), on_bad="raise", has_long_text=True)
    assert [row["text"] for row in rows] == ['two\r\nlines, "quoted"\r\n', "a\n\nb", "c"]
    assert [row["n"] for row in rows] == ["2", "", "4"]
    reading = Reading()
    assert [row.line for row in read_csv(tmp_path / "a.csv", ("id",), reading, has_long_text=True)] == [2, 6, 9]


def test_unclosed_quote_swallows_no_row_of_long_texts(tmp_path):
    good = [f'{number},"text, {number}\nsecond line of {number}",x' for number in range(2000)]
    lines = list(good)
    bad = range(10, 2000, 100)
    for number in bad:
        lines[number] = lines[number].replace('",x', ",x")
    path = write(tmp_path / "a.csv", "id,text,other\n" + "\n".join(lines) + "\n")
    rows, kinds = read(path, has_long_text=True)
    assert [row["id"] for row in rows] == [str(number) for number in range(2000) if number not in bad]
    assert all(row["other"] == "x" for row in rows)
    # Both lines of a bad row are bad, the second without the first.
    assert set(kinds.values()) == {"not_a_row"} and min(kinds) == 22


def test_quote_that_is_never_closed_ends_its_search(tmp_path):
    rows = [f"{number},plain" for number in range(3000)]
    path = write(tmp_path / "a.csv", 'id,text\n0,"open\n' + "\n".join(rows) + "\n")
    good, bad = read(path, has_long_text=True)
    assert len(good) == 3000
    assert bad == {2: "not_a_row"}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(
        st.tuples(*[st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)] * 2), max_size=8
    ),
    end=st.sampled_from(["\n", "\r\n"]),
)
def test_what_the_csv_module_writes_comes_back(tmp_path, rows, end):
    text = io.StringIO()
    writer = csv.writer(text, lineterminator=end, quoting=csv.QUOTE_ALL)
    writer.writerow(("id", "text"))
    writer.writerows(rows)
    path = write(tmp_path / "a.csv", text.getvalue())
    found, bad = read(path, has_long_text=True, on_bad="raise")
    assert [(row["id"], row["text"]) for row in found] == rows
    assert bad == {}


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(st.text("ab ,\n", min_size=1, max_size=10), min_size=4, max_size=12),
    place=st.integers(0, 11),
)
def test_any_unclosed_quote_costs_one_row(tmp_path, texts, place):
    rows = [f'"{number}","{text}","end"\n' for number, text in enumerate(texts)]
    place %= len(rows)
    rows[place] = rows[place].replace('","end"', ',"end"')
    path = write(tmp_path / "a.csv", "id,text,other\n" + "".join(rows))
    found, bad = read(path, has_long_text=True)
    good = [(str(number), text) for number, text in enumerate(texts) if number != place]
    # A line of the broken text may itself look like a row, of which the id is none.
    assert [(row["id"], row["text"]) for row in found if row["id"].isdigit()] == good
    assert bad


# --------------------------------------------------------------------------------------------------------------------
# JSON lines


def test_jsonl(tmp_path):
    rows = [{"id": "1", "labels": ["a"]}, {"id": "2", "text": "肺"}]
    text = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    for path in (
        write(tmp_path / "a.jsonl", text),
        write(tmp_path / "b.jsonl", b"\xef\xbb\xbf" + text.encode()),
        write(tmp_path / "c.jsonl.gz", gzip.compress(text.encode())),
    ):
        found = list(read_jsonl(path, Reading()))
        assert [row.values for row in found] == rows
        assert [row.line for row in found] == [1, 3]


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        (b'{"id": "patient42"', "not_a_row"),
        (b'["patient42"]', "not_a_row"),
        (b"null", "not_a_row"),
        (b'{"id": "patient42\xff"}', "bad_encoding"),
        (b"[" * 200_000, "not_a_row"),
        (b'{"id": ' + b"[" * 200_000, "not_a_row"),
        (b'{"id": ' + b"[" * 800 + b"]" * 800 + b"}", "not_a_row"),
    ],
)
def test_bad_line_of_jsonl_costs_itself_alone(tmp_path, line, kind):
    path = write(tmp_path / "a.jsonl", b'{"id": "1"}\n' + line + b'\n{"id": "2"}\n')
    reading = Reading("skip")
    assert [row.values["id"] for row in read_jsonl(path, reading)] == ["1", "2"]
    assert dict(reading.counts) == {("a.jsonl", kind): 1}
    with pytest.raises(BadRow, match=r"a.jsonl, line 2: ") as caught:
        list(read_jsonl(path, Reading()))
    assert caught.value.kind == kind
    assert "patient42" not in str(caught.value)


# --------------------------------------------------------------------------------------------------------------------
# Rows and readings


def row(**values: object) -> Row:
    return Row(Path("table.csv"), 7, values)


def test_text_of_a_row():
    assert row(a=" b ").get("a") == row(a=" b ").require("a") == "b"
    assert row(a=" ").get("a") is row(a=None).get("a") is row().get("a") is None
    assert row(study_id=12).get("study_id") == row(patient_id=12).get("patient_id")[:2] == "12"
    for bad in (row(a=1), row(a=["b"]), row(study_id=True)):
        with pytest.raises(BadRow, match=r"table.csv, line 7: column .* must be text") as caught:
            bad.get(next(iter(bad.values)))
        assert caught.value.kind == "bad_value"
    with pytest.raises(BadRow, match="column 'a' is missing or empty$"):
        row(a=" ", b="secret").require("a")


def test_number_of_a_row():
    assert [row(a=value).number("a") for value in ("1.5", " 2 ", 3, "-1e2")] == [1.5, 2.0, 3.0, -100.0]
    empty = ("", " ", None, "nan", " NaN ", float("nan"))
    assert [row(a=value).number("a") for value in empty] == [None] * len(empty)
    assert row().number("a") is None
    for value in ("x", "inf", float("-inf"), 10**400, [1], "1,5", "nano"):
        with pytest.raises(BadRow, match="must be a number"):
            row(a=value).number("a")


def test_nothing_of_a_row_is_shown():
    secret = row(patient_id="patient42", text="pneumonia")
    assert "patient42" not in repr(secret) and "pneumonia" not in repr(secret)
    with pytest.raises(BadRow) as caught:
        secret.require("age")
    assert "patient42" not in str(caught.value) and "pneumonia" not in str(caught.value)


def test_names_of_columns_may_be_cells_of_a_table_without_head():
    with pytest.raises(BadRow) as caught:
        row(**{"John Smith": "Jane Roe"}).require("age")
    assert "John" not in str(caught.value)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("Efusion", "'Efusion'"),
        ("ground glass opacity", "'ground glass opacity'"),
        ("气胸", "'气胸'"),
        ("P4711", "a text of 5 characters"),
        ("患者４", "a text of 3 characters"),
        ("no sign of effusion", "a text of 19 characters"),
        ("x" * 31, "a text of 31 characters"),
    ],
)
def test_a_cell_is_shown_where_it_may_be_a_name(value, said):
    assert shown(value) == said


@pytest.mark.parametrize("line", [7, None])
def test_a_bad_row_comes_whole_out_of_another_process(line):
    error = BadRow("bad_label", Path("table.csv"), line, "what came")
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), vars(copy)) == (BadRow, str(error), vars(error))


@pytest.mark.parametrize("kind", BAD_KINDS)
def test_each_kind_is_told_counted_or_fatal(kind):
    error = row().bad(kind, "what came")
    assert isinstance(error, ValueError)
    assert str(error) == "table.csv, line 7: what came"
    with pytest.raises(BadRow):
        Reading("raise").tell(error)
    reading = Reading("skip")
    reading.tell(error)
    assert dict(reading.counts) == {("table.csv", kind): 1}
    assert reading.summary() == f"1 x {kind} in table.csv; the first: table.csv, line 7: what came"


def test_unknown_kinds_and_options_are_refused():
    with pytest.raises(AssertionError):
        row().bad("odd", "what came")
    with pytest.raises(ValueError, match="on_bad must be 'raise' or 'skip', got 'warn'"):
        Reading("warn")
    with pytest.raises(ValueError, match="images must be 'required' or 'unchecked', got 'no'"):
        Reading(images="no")


def test_reading_keeps_count_of_all_and_the_first_as_examples():
    reading = Reading("skip")

    def parse(each: Row) -> int:
        number = int(each.require("a"))
        if number % 2:
            raise each.bad("bad_value", "expected an even number")
        return number

    rows = [Row(Path("t.csv"), number, {"a": str(number)}) for number in range(100)]
    assert list(reading.each(rows, parse)) == list(range(0, 100, 2))
    assert reading.counts["t.csv", "bad_value"] == 50
    assert [error.line for error in reading.examples] == list(range(1, 41, 2))
    assert reading.summary().startswith("50 x bad_value in t.csv; the first: t.csv, line 1: ")
    assert Reading().summary() == ""


def test_images_are_looked_for_where_they_are_required(tmp_path):
    path = tmp_path / "patient42" / "image.png"
    with pytest.raises(BadRow, match="line 7: the image file that the row names is not there") as caught:
        Reading().image(row(), path)
    assert caught.value.kind == "missing_file" and "patient42" not in str(caught.value)
    assert Reading(images="unchecked").image(row(), path) == path
    path.parent.mkdir()
    path.touch()
    assert Reading().image(row(), path) == path
    with pytest.raises(BadRow):
        Reading().image(row(), path.parent)
