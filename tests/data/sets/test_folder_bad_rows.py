# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Bad rows of own folders: named, counted, and no good one lost."""

import subprocess
import warnings

import pytest

from m3fm.data.tables import BadRow
from tests.own_folders import SECRET, read, write_folder

BAD = {
    "missing_file": {"file_name": f"{SECRET}/gone.png"},
    "missing_file 2": {"file_name": "word " * 1000},
    "missing_file 3": {"file_name": "a\0.png"},
    "bad_label": {"labels": ["Edemma"]},
    "bad_label 2": {"labels": "Edema"},
    "bad_label 3": {"labels": [{"Edema": 1}]},
    "bad_label 4": {"labels": {"Edema": "maybe"}},
    "bad_label 5": {"labels": {"Edemma": 1}},
    "duplicate_id": {"file_name": "0.png"},
    "duplicate_id 2": {"file_name": "v0.png", "study_id": "v"},
    "bad_value": {"modality": "mri"},
    "bad_value 2": {"modality": None},
    "bad_value 3": {"file_name": "../outside.png"},
    "bad_value 4": {"file_name": "/etc/hosts"},
    "bad_value 5": {"file_name": "C:\\images\\a.png"},
    "bad_value 6": {"report_en": 3},
    "bad_value 7": {"file_name": None, "images": ["n1.png", 2]},
    "bad_value 8": {"file_name": None, "images": ["n1.png", "n2.png"], "views": ["PA"]},
    "bad_value 9": {"file_name": None, "images": ["n1.png", "n1.png"]},
    "bad_value 10": {"file_name": "v9.png", "study_id": "v", "patient_id": SECRET},
    "bad_value 11": {"file_name": None},
    "bad_value 12": {"file_name": "n4.png", "study_id": ["v"]},
    "bad_value 13": {"file_name": "."},
    "bad_value 14": {"file_name": None, "images": ["n5.png", "./."]},
    "bad_value 15": {"modality": f"chest {SECRET}, clear lungs"},
    "bad_label 6": {"labels": [f"{SECRET}: clear lungs, no effusion"]},
    "bad_label 7": {"labels": {f"{SECRET}: clear lungs, no effusion": 1}},
    "bad_label 8": {"labels": {"Edema": SECRET}},
    "not_a_row": "[" * 200_000,
}


def good_rows():
    rows = [
        {"file_name": f"{i}.png", "modality": "cxr", "labels": ["Edema"] if i % 2 else [], "report_en": "Clear."}
        for i in range(60)
    ]
    views = [{"file_name": f"v{i}.png", "modality": "cxr", "study_id": "v", "patient_id": "q"} for i in range(2)]
    return rows[:30] + views[:1] + rows[30:] + views[1:]


@pytest.mark.parametrize("name", BAD)
def test_bad_rows_are_named_and_cost_no_good_one(tmp_path, name):
    rows = good_rows()
    expected = read(write_folder(tmp_path / "good", rows))[0]
    bad = BAD[name]
    if isinstance(bad, dict):
        bad = {"file_name": "n3.png", "modality": "cxr", "patient_id": SECRET} | bad
    rows.insert(50, bad)
    never = (f"{SECRET}/gone.png", "word " * 1000, "a\0.png", "/etc/hosts", "C:\\images\\a.png", 2, ".", "./.")
    folder = write_folder(tmp_path / "bad", rows, missing=never)
    kind = name.partition(" ")[0]
    with pytest.raises(BadRow, match=r"metadata\.jsonl, line 51: ") as error:
        read(folder)
    assert error.value.kind == kind
    assert SECRET not in str(error.value)
    records, reading = read(folder, on_bad="skip")
    assert reading.counts == {("metadata.jsonl", kind): 1}
    assert [(r.study_id, r.labels, r.findings, len(r.images)) for r in records] == [
        (r.study_id, r.labels, r.findings, len(r.images)) for r in expected
    ]


def test_lines_that_are_no_rows(tmp_path):
    folder = write_folder(tmp_path, [*good_rows()[:3], '{"file_name": "' + SECRET, "[1]"])
    with open(folder / "metadata.jsonl", "ab") as file:
        file.write(b'{"file_name": "0.png", "report_en": "caf\xe9 "}\n')
    records, reading = read(folder, on_bad="skip")
    assert len(records) == 3
    assert reading.counts == {("metadata.jsonl", "not_a_row"): 2, ("metadata.jsonl", "bad_encoding"): 1}
    assert SECRET not in reading.summary()


def test_the_first_row_of_a_study_may_be_the_bad_one(tmp_path):
    rows = [
        {"file_name": "gone.png", "modality": "cxr", "study_id": "1"},
        {"file_name": "other.png", "modality": "cxr"},
        {"file_name": "a.png", "modality": "cxr", "study_id": "1"},
        {"file_name": "b.png", "modality": "cxr", "study_id": "1"},
    ]
    folder = write_folder(tmp_path, rows, missing=("gone.png",))
    records, reading = read(folder, on_bad="skip")
    assert [(r.study_id, len(r.images)) for r in records] == [("other", 1), ("1", 2)]
    assert [(r.study_id, len(r.images)) for r in read(folder, images="unchecked")[0]] == [("1", 3), ("other", 1)]


@pytest.mark.parametrize("on_bad", ["raise", "skip"])
@pytest.mark.parametrize(
    ("rows", "table", "message"),
    [
        ([{"filename": "a.png", "modality": "cxr"}], "metadata.csv", "line 2: column 'file_name' .*it by 'filename'"),
        ([{"file_name": "a.png", "Modalty": "cxr"}], "metadata.csv", "line 2: column 'modality' .*it by 'Modalty'"),
        ([{"file_name": "a.png"}], "metadata.jsonl", "line 1: column 'modality' is missing; the row has file_name$"),
        ([{"study": "1", "modality": "cxr"}], "data.jsonl", "line 1: column 'study_id' .*mean it by 'study'"),
    ],
)  # fmt: skip
def test_a_missing_column_ends_the_reading(tmp_path, rows, table, message, on_bad):
    with pytest.raises(BadRow, match=message) as error:
        read(write_folder(tmp_path, rows, table), on_bad=on_bad)
    assert error.value.kind == "wrong_column"


@pytest.mark.parametrize(
    ("column", "meant"),
    [
        ("reprot_en", "report_en"),
        ("Report_EN", "report_en"),
        ("report", "report_en"),
        ("patient", "patient_id"),
        ("PatientID", "patient_id"),
        ("spilt", "split"),
        ("labels_", "labels"),
        ("original_name", None),
        ("source_width", None),
        ("hospital", None),
        ("image_ids", None),
    ],
)
def test_a_column_that_is_nearly_known_is_told(tmp_path, column, meant):
    rows = [{"file_name": f"{i}.png", "modality": "cxr", column: SECRET} for i in range(3)]
    folder = write_folder(tmp_path, rows)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert len(read(folder)[0]) == 3
    records, reading = read(folder, on_bad="skip")
    assert len(records) == 3
    expected = [] if meant is None else [f"line 1: column '{column}' is not read; did you mean '{meant}'?"]
    for messages in ([str(each.message) for each in caught], [str(each) for each in reading.examples]):
        assert len(messages) == len(expected)
        assert all(message.endswith(end) for message, end in zip(messages, expected, strict=True))


@pytest.mark.parametrize("on_bad", ["raise", "skip"])
@pytest.mark.parametrize(
    ("encoding", "message"),
    [
        ("gbk", "looks like GBK / GB18030.*iconv"),
        ("gb18030", "looks like GBK"),
        ("utf-16", "is UTF-16, expected UTF-8"),
    ],
)
def test_a_table_of_another_encoding_is_refused_with_a_way_out(tmp_path, encoding, message, on_bad):
    rows = [{"file_name": f"{i}.png", "modality": "cxr", "report_zh": "双肺纹理清晰，未见异常。"} for i in range(3)]
    folder = write_folder(tmp_path, rows, "metadata.csv")
    text = (folder / "metadata.csv").read_text(encoding="utf-8")
    (folder / "metadata.csv").write_text(text, encoding=encoding)
    with pytest.raises(BadRow, match=message) as error:
        read(folder, on_bad=on_bad)
    assert error.value.kind == "bad_encoding"
    (folder / "metadata.csv").write_text(text, encoding="utf-8-sig")
    assert read(folder)[0][2].reports["zh"].raw == "双肺纹理清晰，未见异常。"


def test_the_advice_for_gbk_works(tmp_path):
    folder = write_folder(tmp_path, [{"file_name": "a.png", "modality": "cxr", "report_zh": "气胸。"}], "metadata.csv")
    path = folder / "metadata.csv"
    content = path.read_bytes()
    path.write_text(content.decode(), encoding="gb18030")
    try:
        path.write_bytes(subprocess.run(["iconv", "-f", "GB18030", "-t", "UTF-8", path], capture_output=True).stdout)
    except FileNotFoundError:
        pytest.skip("no iconv here")
    assert path.read_bytes() == content


def test_one_row_of_broken_bytes_costs_itself(tmp_path):
    rows = [{"file_name": f"{i}.png", "modality": "cxr", "report_zh": "双肺清晰。"} for i in range(5)]
    folder = write_folder(tmp_path, rows, "metadata.csv")
    lines = (folder / "metadata.csv").read_bytes().splitlines(keepends=True)
    lines[3] = lines[3].replace("双".encode(), "双".encode()[:2])
    (folder / "metadata.csv").write_bytes(b"".join(lines))
    records, reading = read(folder, on_bad="skip")
    assert [record.study_id for record in records] == ["0", "1", "3", "4"]
    assert reading.counts == {("metadata.csv", "bad_encoding"): 1}
    with pytest.raises(BadRow, match="line 4"):
        read(folder)


@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("table", ["metadata.csv", "metadata.jsonl"])
def test_rows_in_gbk_cost_themselves(tmp_path, number, table):
    rows = [{"file_name": f"{i}.png", "modality": "cxr", "report_zh": "Clear lungs."} for i in range(30)]
    folder = write_folder(tmp_path, rows, table)
    lines = (folder / table).read_bytes().splitlines(keepends=True)
    for place in range(10, 10 + number):
        lines[place] = lines[place].replace(b"Clear lungs.", "肺部正常".encode("gbk"))
    (folder / table).write_bytes(b"".join(lines))
    records, reading = read(folder, on_bad="skip")
    assert len(records) == 30 - number
    assert reading.counts == {(table, "bad_encoding"): number}
    with pytest.raises(BadRow, match="line 11: expected"):
        read(folder)


@pytest.mark.parametrize(("delimiter", "name"), [(";", "semicolons"), ("\t", "tabs")])
def test_other_delimiters_are_told(tmp_path, delimiter, name):
    (tmp_path / "metadata.csv").write_text(delimiter.join(["file_name", "modality"]) + "\n")
    with pytest.raises(BadRow, match=f"separated by {name}, .*; expected commas"):
        read(tmp_path, on_bad="skip")


def test_links_may_lead_out_of_the_folder(tmp_path):
    folder = write_folder(tmp_path, [{"file_name": "images/a.png", "modality": "cxr"}], missing=("images/a.png",))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.png").write_bytes(b"picture")
    (folder / "images").symlink_to(tmp_path / "elsewhere")
    assert read(folder)[0][0].images[0].path == folder / "images/a.png"


def test_an_empty_table_has_no_studies(tmp_path):
    (tmp_path / "metadata.jsonl").touch()
    assert read(tmp_path)[0] == []
    (tmp_path / "metadata.jsonl").rename(tmp_path / "metadata.csv")
    (tmp_path / "metadata.csv").write_text("file_name,modality\n")
    assert read(tmp_path)[0] == []


@pytest.mark.parametrize("on_bad", ["raise", "skip"])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: expected the names of the columns, got none"),
        ("\n\n", "line 1: expected the names of the columns, got none"),
        (
            f"a.png,cxr,John Smith,{SECRET},Clear lungs.\n",
            "line 1: column 'file_name' is missing; the row has none of the known columns$",
        ),
        (
            f"a.png,cxr,John Smith,{SECRET},Clear lungs.\nb.png,ct,Jane Roe,{SECRET},Mass.\n",
            "line 2: column 'file_name' is missing; the row has none of the known columns$",
        ),
        (f"file_name,John Smith {SECRET}\na.png,x\n", "line 2: column 'modality' is missing; the row has file_name$"),
    ],
)
def test_a_csv_table_without_head_is_refused_and_tells_of_no_patient(tmp_path, text, message, on_bad):
    (tmp_path / "metadata.csv").write_text(text)
    with pytest.raises(BadRow, match=message) as error:
        read(tmp_path, on_bad=on_bad)
    assert error.value.kind == "wrong_column"
    assert all(secret not in str(error.value) for secret in (SECRET, "Smith", "Clear", "a.png"))


def test_keys_of_json_rows_are_told_where_they_are_known(tmp_path):
    folder = write_folder(tmp_path, [{"study_id": "1", "John Smith": "x", "patient_id": "2"}])
    with pytest.raises(BadRow, match="column 'file_name' is missing; the row has patient_id, study_id$"):
        read(folder)


def test_the_first_table_counts(tmp_path):
    folder = write_folder(tmp_path, [{"file_name": "a.png", "modality": "cxr"}])
    write_folder(tmp_path, [{"file_name": "b.png", "modality": "cxr"}], "metadata.csv")
    write_folder(tmp_path, [{"file_name": "c.png", "modality": "cxr"}], "train/metadata.jsonl")
    assert [record.study_id for record in read(folder)[0]] == ["a"]
