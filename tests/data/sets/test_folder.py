# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
import csv
import json
import subprocess
import warnings

import pytest

from m3fm.data.groups import group_keys, record_marks
from m3fm.data.opening import open_set
from m3fm.data.schema import LabelState
from m3fm.data.sets import find_set
from m3fm.data.sets.folder import source_name
from m3fm.data.studies import load_studies
from m3fm.data.tables import BadRow

SECRET = "patient-4711"
POSITIVE, NEGATIVE, UNCERTAIN, UNMENTIONED = (
    LabelState.POSITIVE,
    LabelState.NEGATIVE,
    LabelState.UNCERTAIN,
    LabelState.UNMENTIONED,
)


def write_folder(root, rows, table="metadata.jsonl", name="mine", missing=()):
    """Write a folder with its images and its table; a row that is text is written as it is."""
    folder = root / name
    path = folder / table
    path.parent.mkdir(parents=True, exist_ok=True)
    for row in (row for row in rows if isinstance(row, dict)):
        for file in files_of(row):
            if file not in missing:
                (path.parent / file).parent.mkdir(parents=True, exist_ok=True)
                (path.parent / file).write_bytes(b"picture")
    if table.endswith(".jsonl"):
        lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    elif table.endswith(".csv"):
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
            writer.writeheader()
            writer.writerows(rows)
    return folder


def files_of(row):
    for name, value in row.items():
        if name in ("file_name", "file_names", "images") or name.endswith("_file_name"):
            yield from value if isinstance(value, list) else filter(None, str(value or "").split(";"))


def read(folder, **options):
    opened = open_set(folder, **options)
    return list(opened), opened.reading


def test_a_row_becomes_a_record_with_all_that_it_says(tmp_path):
    row = {
        "file_name": "images/a.png", "modality": "cxr", "report_en": "Clear lungs.", "report_zh": "双肺清晰。",
        "split": "val", "patient_id": 12, "labels": ["Edema", "Scoliosis"], "view": "pa", "age": "057Y",
        "sex": "Male", "doi": "10.1/a", "url": "https://example.org/a", "licence": "CC BY 4.0", "hospital": "x",
    }  # fmt: skip
    folder = write_folder(tmp_path, [row, {"file_name": "b.png", "modality": "ct", "labels": ["scoliosis"]}])
    (first, second), reading = read(folder)
    assert (first.study_id, first.source, first.modality, first.patient_id) == ("a", "mine", "cxr", "12")
    assert first.documents == ("doi:10.1/a", "url:https://example.org/a")
    assert [(image.path, image.view) for image in first.images] == [(folder / "images/a.png", "PA")]
    assert {code: report.raw for code, report in first.reports.items()} == {"en": "Clear lungs.", "zh": "双肺清晰。"}
    assert first.labels == {"Edema": POSITIVE, "Scoliosis": POSITIVE}  # "scoliosis" is the same
    assert first.findings == {"no_finding": NEGATIVE, "edema": POSITIVE, "scoliosis": POSITIVE}
    assert (first.age, first.sex, first.split, first.licence) == (57.0, "M", "validation", "CC BY 4.0")
    assert second.labels == {"scoliosis": POSITIVE, "Edema": NEGATIVE}
    assert second.findings == {"no_finding": NEGATIVE, "edema": NEGATIVE, "scoliosis": POSITIVE}
    assert (second.patient_id, second.age, second.sex, second.split, second.reports) == (None, None, None, None, {})
    assert SECRET not in repr(first)
    assert reading.summary() == ""


@pytest.mark.parametrize(
    ("age", "years"),
    [
        ("121", None),
        (400, None),
        ("39岁", 39.0),
        ("6个月", 0.5),
        ("nan", None),
        (True, None),
        (57.5, 57.5),
        ("57", 57.0),
        (57, 57.0),
        ("018M", 1.5),
        ("40+", None),
        ("Young Child", None),
        (None, None),
        ("-1", None),
    ],
)
def test_ages(tmp_path, age, years):
    folder = write_folder(tmp_path, [{"file_name": "a.png", "modality": "cxr", "age": age}])
    assert read(folder)[0][0].age == years


def test_sections_and_whole_reports(tmp_path):
    rows = [
        {"study_id": "a", "modality": "cxr", "findings_en": "Clear lungs.", "impression_en": "Normal."},
        {"study_id": "b", "modality": "cxr", "report_en": "All is  clear.", "impression_en": "Normal."},
        {"study_id": "c", "modality": "cxr", "reading_en": "", "clinical_notes_zh": "双肺清晰。"},
    ]
    sections, both, notes = read(write_folder(tmp_path, rows, "data.jsonl"))[0]
    assert (sections.reports["en"].findings, sections.reports["en"].impression) == ("Clear lungs.", "Normal.")
    assert "Clear lungs." in sections.reports["en"].raw
    assert sections.reports["en"].text == "Clear lungs. Normal."
    assert (both.reports["en"].raw, both.reports["en"].text) == ("All is  clear.", "All is clear.")
    assert (both.reports["en"].findings, both.reports["en"].impression) == (None, "Normal.")
    assert list(notes.reports) == ["zh"]
    assert sections.images == ()


def test_csv_with_lists_in_cells(tmp_path):
    rows = [
        {"study_id": "7", "file_names": "a.png; b.png", "views": "PA;L", "modality": "cxr", "labels": "Edema|Mass"},
        {"study_id": "8", "file_names": "c.png", "views": "", "modality": "cxr", "labels": ""},
        {"study_id": "", "file_names": "d.png", "views": "AP", "modality": "cxr", "labels": "Scoliosis"},
    ]
    folder = write_folder(tmp_path, [{**row, "report_en": "One,\ntwo."} for row in rows], "metadata.csv")
    (folder / "b.png").write_bytes(b"picture")
    first, second, third = read(folder)[0]
    assert [image.path.name for image in first.images] == ["a.png", "b.png"]
    assert [image.view for image in first.images] == ["PA", "LATERAL"]
    assert first.findings == {"no_finding": NEGATIVE, "edema": POSITIVE, "mass": POSITIVE, "scoliosis": NEGATIVE}
    assert first.reports["en"].raw == "One,\ntwo."
    assert (second.study_id, second.labels, second.findings) == ("8", {}, {})
    assert (third.study_id, third.images[0].view) == ("d", "AP")


def test_a_row_may_list_the_images_of_a_study(tmp_path):
    rows = [
        {"images": ["1.png", "2.png"], "views": ["PA", None], "modality": "cxr", "study_id": "s"},
        {"file_names": ["ct/1.png", "ct/2.png", "ct/3.png"], "view": "axial", "modality": "ct", "study_id": "t"},
        {"file_names": ["ct2/9.png", "ct2/2.png"], "modality": "ct", "patient_id": "p"},
        {"pa_file_name": "x/pa.png", "lateral_file_name": "x/lat.png", "modality": "cxr", "study_id": "u"},
        {"file_name": "y.png", "mask_file_name": "x/mask.png", "modality": "cxr"},
    ]
    records = read(write_folder(tmp_path, rows))[0]
    assert [record.study_id for record in records] == ["s", "t", "9", "u", "y"]
    assert [[image.path.name for image in record.images] for record in records] == [
        ["1.png", "2.png"], ["1.png", "2.png", "3.png"], ["9.png", "2.png"], ["pa.png", "lat.png"], ["y.png"],
    ]  # fmt: skip
    assert [[image.view for image in record.images] for record in records] == [
        ["PA", None], ["AXIAL"] * 3, [None] * 2, ["PA", "LATERAL"], [None],
    ]  # fmt: skip
    assert [record.documents for record in records] == [()] * 5


def test_rows_of_a_study_need_not_follow_each_other(tmp_path):
    rows = [
        {"file_name": f"{view}{study}.png", "modality": "cxr", "study_id": study, "view": view}
        for view in ("PA", "LL")
        for study in (2, 1, 3)
    ]
    rows.insert(1, {"file_name": "alone.png", "modality": "cxr"})
    records = read(write_folder(tmp_path, rows))[0]
    assert [record.study_id for record in records] == ["2", "alone", "1", "3"]
    assert [[image.view for image in record.images] for record in records] == [
        ["PA", "LATERAL"], [None], ["PA", "LATERAL"], ["PA", "LATERAL"],
    ]  # fmt: skip


def test_studies_come_as_soon_as_they_are_complete(tmp_path):
    rows = [{"file_name": f"{n}_{v}.png", "modality": "cxr", "study_id": n} for n in range(50) for v in "ab"]
    folder = write_folder(tmp_path, [*rows, {"file_name": "../out.png", "modality": "cxr"}])
    records = iter(open_set(folder))
    assert [len(next(records).images) for _ in range(50)] == [2] * 50
    with pytest.raises(BadRow, match="line 101"):
        next(records)


def test_studies_that_wait_lose_nothing(tmp_path):
    rows = [
        {
            "file_name": f"{n}_{view}.png", "modality": "cxr", "study_id": f"s{n}", "view": view, "age": n / 7,
            "sex": "F", "labels": {"Edema": n % 2, "mass": None}, "doi": f"10.1/{n}", "split": "val",
            "report_zh": "双肺清晰。", "findings_en": "Clear lungs.", "impression_en": "Normal.", "licence": "CC0",
        }
        for n in range(9)
        for view in ("PA", "LATERAL")
    ]  # fmt: skip
    expected = {record.study_id: record for record in read(write_folder(tmp_path, rows))[0]}
    # The second views far from the first, and a study in the first and the last row.
    scattered = rows[::2] + rows[3::2] + rows[1:2]
    records = read(write_folder(tmp_path, scattered))[0]
    assert [record.study_id for record in records] == [f"s{n}" for n in range(9)]
    assert all(record == expected[record.study_id] for record in records)
    assert load_studies(tmp_path / "mine")[3].reports == {"en": "Clear lungs. Normal.", "zh": "双肺清晰。"}


def test_slices_of_a_ct_are_grouped(tmp_path):
    rows = [{"file_name": f"x_{i}.png", "modality": "ct", "study_id": "x"} for i in range(2)]
    rows += [{"file_name": "c.png", "modality": "cxr", "study_id": "x", "patient_id": "p"}]
    rows += [{"file_name": "d.png", "modality": "cxr", "study_id": "y", "patient_id": "p"}]
    rows += [{"file_name": "e.png", "modality": "cxr", "study_id": "z"}]
    folder = write_folder(tmp_path, rows)
    records = read(folder)[0]
    assert [record.study_id for record in records] == ["x_0", "x_1", "x", "y", "z"]
    assert [record.documents for record in records] == [("study:x",)] * 3 + [()] * 2
    keys = group_keys(map(record_marks, records))
    assert keys == ["patient:p"] * 4 + ["study:z"]
    studies = load_studies(folder)
    assert [study.grouped_key for study in studies] == keys
    assert [study.patient_id for study in studies] == ["x", "x", "p", "p", None]


@pytest.mark.parametrize("table", ["metadata.jsonl", "metadata.csv"])
def test_tables_of_split_folders(tmp_path, table):
    for split, number in (("test", 2), ("train", 1), ("Val", 1)):
        rows = [{"file_name": f"{i}.png", "modality": "cxr", "split": "", "study_id": ""} for i in range(number)]
        write_folder(tmp_path, rows, f"{split}/{table}")
    records = read(tmp_path / "mine")[0]
    assert [(record.study_id, record.split) for record in records] == [
        ("train/0", "train"), ("Val/0", "validation"), ("test/0", "test"), ("1", "test"),
    ]  # fmt: skip
    assert all(image.path.is_file() for record in records for image in record.images)
    assert [record.split for record in read(tmp_path / "mine", split="validation")[0]] == ["validation"]
    assert [study.split for study in load_studies(tmp_path / "mine")] == ["train", "validation", "test", "test"]


def test_parquet_table(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [
        {"file_name": "a.png", "modality": "cxr", "patient_id": 3, "labels": ["Edema"], "split": "train"},
        {"file_name": "b.png", "modality": "cxr", "patient_id": 4, "labels": None, "split": None},
    ]
    folder = write_folder(tmp_path, rows, "metadata.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "metadata.parquet")
    first, second = read(folder)[0]
    assert (first.study_id, first.patient_id, first.split, first.labels["Edema"]) == ("a", "3", "train", POSITIVE)
    assert (second.study_id, second.patient_id, second.split, second.labels) == ("b", "4", None, {})
    (folder / "metadata.parquet").write_bytes(b"PAR1 nothing PAR1")
    with pytest.raises(BadRow, match=r"metadata\.parquet: no Parquet file"):
        read(folder, on_bad="skip")


# --------------------------------------------------------------------------------------------------------------------
# Labels


def test_a_column_for_each_label(tmp_path):
    rows = [
        {"file_name": "a.png", "Edema": "1.0", "Effusion": "-1", "气胸": "0", "No Finding": "", "covid": "positive"},
        {"file_name": "b.png", "Edema": "0", "Effusion": "", "气胸": "", "No Finding": "1", "covid": "nan"},
    ]
    rows = [{**row, "modality": "cxr", "ward": "5"} for row in rows]
    folder = write_folder(tmp_path, rows, "metadata.csv")
    first, second = read(folder)[0]
    assert first.labels == {
        "Edema": POSITIVE, "Effusion": UNCERTAIN, "气胸": NEGATIVE, "No Finding": UNMENTIONED, "covid": POSITIVE,
    }  # fmt: skip
    assert first.findings == {
        "no_finding": NEGATIVE,
        "edema": POSITIVE,
        "pneumothorax": NEGATIVE,
        "pleural_effusion": UNCERTAIN,
        "covid_19": POSITIVE,
    }
    assert second.findings == {"no_finding": POSITIVE, "edema": NEGATIVE}
    assert load_studies(folder)[0].findings == {
        "no_finding": 0.0, "edema": 1.0, "pneumothorax": 0.0, "covid_19": 1.0,
    }  # fmt: skip


def test_labels_as_states(tmp_path):
    labels = [
        {"Edema": 1, "edema": 0, "Lung Lesion": -1, "mass": None, "Fracture": "uncertain", "hernia": False},
        {"Edema": None},
        {},
        ["Edema"],
    ]
    rows = [{"file_name": f"{i}.png", "modality": "cxr", "labels": each} for i, each in enumerate(labels)]
    first, second, third, fourth = read(write_folder(tmp_path, rows))[0]
    assert first.labels["edema"] is NEGATIVE
    assert first.labels["mass"] is UNMENTIONED
    assert first.findings == {
        "no_finding": NEGATIVE, "lung_lesion": UNCERTAIN, "edema": POSITIVE, "fracture": UNCERTAIN,
        "hernia": NEGATIVE,
    }  # fmt: skip
    assert (second.labels, second.findings) == ({"Edema": UNMENTIONED}, {})
    assert (third.labels, third.findings) == ({}, {})
    assert fourth.findings["edema"] is POSITIVE


def test_a_list_denies_what_its_set_denies(tmp_path):
    rows = [
        {"file_name": f"{i}.png", "modality": "ct", "labels": each, "infected_slice": i}
        for i, each in enumerate((["COVID-19"], ["COVID-19"], ["non-COVID"], []), start=0)
    ]
    clean, positive, other, empty = read(write_folder(tmp_path, rows))[0]
    assert (clean.labels, clean.findings) == ({}, {})
    assert (positive.labels, positive.findings) == ({"COVID-19": POSITIVE}, {"covid_19": POSITIVE})
    assert other.labels == {"non-COVID": POSITIVE, "COVID-19": NEGATIVE}
    assert other.findings == empty.findings == {"covid_19": NEGATIVE}


def test_lists_of_no_known_set_may_have_any_name_of_a_finding(tmp_path):
    rows = [
        {"file_name": f"{i}.png", "modality": "cxr", "labels": names}
        for i, names in enumerate([["气胸", "Mass"], ["Pleural Effusion"], [], *[["Mass"]] * 20])
    ]
    first, second, third, *_ = read(write_folder(tmp_path, rows))[0]
    assert first.labels == {"气胸": POSITIVE, "Mass": POSITIVE, "Pleural Effusion": NEGATIVE}
    assert first.findings == {
        "no_finding": NEGATIVE, "pneumothorax": POSITIVE, "pleural_effusion": NEGATIVE, "mass": POSITIVE,
    }  # fmt: skip
    assert second.labels == {"Pleural Effusion": POSITIVE, "Mass": NEGATIVE, "气胸": NEGATIVE}
    assert set(third.labels.values()) == set(third.findings.values()) == {NEGATIVE}


def test_one_wrong_label_does_not_change_whose_labels_they_are(tmp_path):
    rows = [
        {"file_name": f"{i}.png", "modality": "ct", "labels": ["non-COVID" if i % 2 else "COVID-19"]} for i in range(9)
    ]
    rows[4]["labels"] = ["COVID19"]
    records, reading = read(write_folder(tmp_path, rows), on_bad="skip")
    assert [record.findings["covid_19"] for record in records] == [POSITIVE, NEGATIVE] * 2 + [NEGATIVE, POSITIVE] * 2
    assert reading.counts == {("metadata.jsonl", "bad_label"): 1}
    said = "line 5: expected a label of cov_ctr, got a text of 7 characters; the nearest it has is 'COVID-19'"
    assert said in reading.summary()


@pytest.mark.parametrize(
    ("labels", "named"),
    [
        ([["Pneumonia"], ["Edema"]], {"pneumonia", "edema"}),
        ([["Cardiomegaly"], ["Nodule", "Mass"], ["Hernia"]], {"cardiomegaly", "nodule", "mass", "hernia"}),
        ([["No Finding"], ["Tuberculosis"]], {"tuberculosis"}),
    ],
)
def test_names_that_any_folder_may_use_make_it_no_part_of_a_set(tmp_path, labels, named):
    rows = [{"file_name": f"{i}.png", "modality": "cxr", "labels": each} for i, each in enumerate(labels)]
    for record in read(write_folder(tmp_path, rows))[0]:
        assert set(record.findings) - {"no_finding"} == named
    # A name of NIH's own tells whose labels they are; so does the folder's name.
    own = [*rows, {"file_name": "own.png", "modality": "cxr", "labels": ["Pleural_Thickening", "Effusion"]}]
    if "Tuberculosis" not in str(labels):
        assert all(len(r.labels) >= 14 for r in read(write_folder(tmp_path, own, name="other"))[0])
        assert all(len(r.labels) >= 14 for r in read(write_folder(tmp_path, rows, name="nih_chestxray14_sample"))[0])


# --------------------------------------------------------------------------------------------------------------------
# What is wrong


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


# --------------------------------------------------------------------------------------------------------------------
# Folders named by findings


def write_images(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"picture")


def test_folders_named_by_findings(tmp_path):
    write_images(
        tmp_path, "train/cxr/PNEUMONIA/1.jpeg", "train/cxr/NORMAL/p/1.png", "val/cxr/正常/2.png", "train/notes.txt",
        "train/cxr/NORMAL/.2.png", "train/cxr/NORMAL/Thumbs.db",
    )  # fmt: skip
    (tmp_path / "train/cxr/masks").mkdir()
    first, second, third = read(tmp_path)[0]
    assert [r.study_id for r in (first, second, third)] == [
        "train/cxr/NORMAL/p/1", "train/cxr/PNEUMONIA/1", "2",
    ]  # fmt: skip
    assert [r.split for r in (first, second, third)] == ["train", "train", "validation"]
    assert first.labels == {"NORMAL": POSITIVE, "正常": POSITIVE, "PNEUMONIA": NEGATIVE} or first.labels == {
        "NORMAL": POSITIVE,
        "PNEUMONIA": NEGATIVE,
    }
    assert first.findings == third.findings == {"no_finding": POSITIVE, "pneumonia": NEGATIVE}
    assert second.findings == {"no_finding": NEGATIVE, "pneumonia": POSITIVE}
    assert first.modality == "cxr"
    assert load_studies(tmp_path)[1].findings == {"no_finding": 0.0, "pneumonia": 1.0}


def test_a_folder_of_images_whose_name_is_no_finding_is_told(tmp_path):
    write_images(tmp_path, "ct/COVID-19/1.png", "ct/Emphysema/2.png", "ct/Unclear/3.png", "ct/Unclear/4.png")
    with pytest.raises(BadRow, match="Unclear: holds images, but its name is no finding"):
        read(tmp_path)
    records, reading = read(tmp_path, on_bad="skip")
    assert [record.study_id for record in records] == ["1", "2"]
    assert reading.counts == {("Unclear", "bad_label"): 1}


def test_folders_named_by_findings_must_say_the_modality(tmp_path):
    write_images(tmp_path / "mine", "Pneumonia/1.png")
    with pytest.raises(BadRow, match="put them into a folder named cxr or ct, or add metadata.csv"):
        read(tmp_path / "mine", on_bad="skip")
    (tmp_path / "mine").rename(tmp_path / "cxr")
    assert read(tmp_path / "cxr")[0][0].modality == "cxr"
    write_images(tmp_path / "volumes", "Pneumonia/1.nii.gz")
    assert read(tmp_path / "volumes")[0][0].modality == "ct"


# --------------------------------------------------------------------------------------------------------------------
# Real folders


@pytest.mark.realdata
@pytest.mark.parametrize(
    ("folder", "studies", "reported"),
    [
        ("cov_ctr", 674, {"en": 648, "zh": 648}),
        ("covid_chestxray", 481, {"en": 406}),
        ("nih_chestxray14_sample", 1198, {}),
        ("kermany_pneumonia_224", 2604, {}),
        ("tb_shenzhen_montgomery_128", 500, {"en": 417}),
        ("luna16_slices", 423, {}),
        ("covid_ct_md_volumes", 3, {}),
        ("covid_ct_md_slices", 72, {}),
        ("openi_iu_reports", 3365, None),
        ("ctrate_reports_text", 1000, {"en": 1000}),
    ],
)
def test_real_folders_open_as_records(data_root, folder, studies, reported):
    assert find_set(data_root / folder).name == "folder"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        records = list(open_set(data_root / folder))
    assert len(records) == studies
    assert {record.source for record in records} == {source_name(data_root / folder)}
    counts = {}
    for record in records:
        for code in record.reports:
            counts[code] = counts.get(code, 0) + 1
    assert counts["en"] > 3300 if reported is None else counts == reported
    by_id = {study.study_id: study for study in load_studies(data_root / folder)}
    keys = group_keys(map(record_marks, records))
    for record, key in zip(records, keys, strict=True):
        study = by_id[record.study_id]
        certain = {name: state for name, state in record.findings.items() if state in (POSITIVE, NEGATIVE)}
        assert {name: float(state is POSITIVE) for name, state in certain.items()} == (study.findings or {})
        assert (study.grouped_key, study.images) == (key, tuple(image.path for image in record.images))


@pytest.mark.realdata
def test_real_rows_right_down_to_the_record(data_root):
    records = {record.study_id: record for record in open_set(data_root / "nih_chestxray14_sample")}
    heart = records["00000001_000"]
    assert heart.labels["Cardiomegaly"] is POSITIVE
    assert sum(state is NEGATIVE for state in heart.labels.values()) == 14
    assert (heart.age, heart.sex, heart.images[0].view, heart.patient_id) == (57.0, "M", "PA", "nih-1")
    slices = list(open_set(data_root / "covid_ct_md_slices"))
    assert {record.age for record in slices} == {39.0, 62.0, 70.0}
    assert {record.images[0].view for record in slices} == {"AXIAL"}
