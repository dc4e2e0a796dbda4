# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
import warnings

import pytest

from m3fm.data.groups import group_keys, record_marks
from m3fm.data.opening import open_set
from m3fm.data.schema import LabelState
from m3fm.data.sets import find_set
from m3fm.data.sets.folder import source_name
from m3fm.data.studies import load_studies
from m3fm.data.tables import BadRow
from tests.own_folders import SECRET, read, write_folder

POSITIVE, NEGATIVE, UNCERTAIN, UNMENTIONED = (
    LabelState.POSITIVE,
    LabelState.NEGATIVE,
    LabelState.UNCERTAIN,
    LabelState.UNMENTIONED,
)


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
