# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
import dataclasses
import hashlib
import json
from collections import Counter

import pytest

from m3fm.data import splits
from m3fm.data.schema import ReportText, StudyRecord, features
from m3fm.data.studies import (
    Study,
    carved_ids,
    fingerprint,
    load_parallel,
    load_studies,
    read_studies,
    source_name,
    training_part,
)

SECRET = "patient-4711"


def write_folder(root, name, rows, file="metadata.jsonl"):
    folder = root / name
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for row in rows:
        if isinstance(row, dict) and "file_name" in row:
            (folder / row["file_name"]).parent.mkdir(parents=True, exist_ok=True)
            (folder / row["file_name"]).touch()
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    (folder / file).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def study(study_id, group, findings=None, split=None):
    return Study(study_id, "made_up", "cxr", (), None, {}, findings, split, grouped_key=group)


def test_image_row_becomes_a_study(tmp_path):
    folder = write_folder(
        tmp_path,
        "cov_ctr",
        [
            {
                "file_name": "images/1_0.jpg", "modality": "ct", "report_en": " Clear \n lungs. ",
                "report_zh": "双肺清晰。",
                "labels": ["non-COVID"], "split": "train", "patient_id": SECRET,
            },
            {"file_name": "images/2.jpg", "modality": "ct", "report_en": None, "split": "unreported"},
        ],
    )  # fmt: skip
    first, second = load_studies(folder)
    assert (first.study_id, first.source, first.modality, first.split) == ("1_0", "cov_ctr", "ct", "train")
    assert first.images == (folder / "images/1_0.jpg",)
    assert first.patient_id == SECRET
    assert first.reports == {"en": "Clear lungs.", "zh": "双肺清晰。"}
    assert first.findings == {"covid_19": 0.0}
    assert (second.reports, second.findings, second.patient_id, second.split) == ({}, None, None, "unreported")


def test_text_row_becomes_a_study_without_images(tmp_path):
    row = {
        "study_id": "a", "labels21": ["Mass"], "split": "validation", "findings_en": "There is a mass. Seen on XXXX.",
        "impression_en": "1. There is a mass. 2. No effusion.",
    }  # fmt: skip
    (only,) = load_studies(write_folder(tmp_path, "openi_iu_reports", [row], "data.jsonl"))
    assert only.images == ()
    assert only.modality == "cxr"
    assert only.split == "validation"
    assert only.reports == {"en": "There is a mass. No effusion."}
    assert only.findings["mass"] == 1.0


def test_openi_study_outside_the_published_split_is_for_training(tmp_path):
    rows = [{"study_id": "a", "labels21": ["Normal"], "impression_en": "Normal."}]
    assert load_studies(write_folder(tmp_path, "openi_iu_reports", rows, "data.jsonl"))[0].split == "train"


@pytest.mark.parametrize(
    ("labels", "findings"),
    [
        # COV-CTR's and the tuberculosis set's own names; theirs is what a row denies.
        ([["non-COVID"], ["COVID-19"]], [{"covid_19": 0.0}, {"covid_19": 1.0}]),
        (
            [["No Finding"], ["Tuberculosis"]],
            [{"no_finding": 1.0, "tuberculosis": 0.0}, {"no_finding": 0.0, "tuberculosis": 1.0}],
        ),
        # CheXpert's own folder denies nothing by silence; a list of labels in another folder does.
        ([["Edema"], ["Cardiomegaly"]], [{"edema": 1.0, "cardiomegaly": 0.0}, {"edema": 0.0, "cardiomegaly": 1.0}]),
        # No set's: what some rows name the others deny, and a row without labels says nothing.
        (
            [["cardiomegaly", "Scoliosis"], [], ["scoliosis"], None],
            [
                {"cardiomegaly": 1.0, "scoliosis": 1.0},
                {"cardiomegaly": 0.0, "scoliosis": 0.0},
                {"cardiomegaly": 0.0, "scoliosis": 1.0},
                None,
            ],
        ),
    ],
)
def test_a_part_of_a_known_set_in_a_folder_of_another_name(tmp_path, labels, findings):
    rows = [
        {"file_name": f"{number}.png", "modality": "cxr", "labels": names, "split": "test"}
        for number, names in enumerate(labels)
    ]
    read = load_studies(write_folder(tmp_path, "held_back", rows))
    assert [each.source for each in read] == ["held_back"] * len(rows)
    for each, expected in zip(read, findings, strict=True):
        assert expected is None or expected.items() <= each.findings.items()
        assert (each.findings is None) == (expected is None)


def test_folder_of_any_name_takes_canonical_labels_and_reading(tmp_path):
    row = {"file_name": "images/a.nii.gz", "modality": "ct", "labels": ["Lung Lesion"], "reading_en": "a  mass"}
    (only,) = load_studies(write_folder(tmp_path, "my_hospital", [row]))
    assert only.study_id == "a"
    assert only.findings == {"no_finding": 0.0, "lung_lesion": 1.0}
    assert only.reports == {"en": "a mass"}


def test_slices_of_a_ct_are_studies_of_one_patient(tmp_path):
    rows = [{"file_name": f"images/x_{i}.jpg", "modality": "ct", "study_id": "x"} for i in range(3)]
    studies = load_studies(write_folder(tmp_path, "luna16_slices", rows))
    assert len({s.study_id for s in studies}) == 3
    assert {s.patient_id for s in studies} == {"x"}
    assert len({s.grouped_key for s in studies}) == 1


def test_rows_of_one_xray_study_are_its_views(tmp_path):
    rows = [
        {"file_name": "a.png", "modality": "cxr", "study_id": 7, "report_en": "Clear.", "split": "train"},
        {"file_name": "b.png", "modality": "cxr"},
        {"file_name": "c.png", "modality": "cxr", "study_id": "7", "labels": ["Edema"], "patient_id": 12},
    ]
    folder = write_folder(tmp_path, "my_hospital", rows)
    views, single = load_studies(folder)
    assert (views.study_id, views.patient_id, views.split) == ("7", "12", "train")
    assert views.images == (folder / "a.png", folder / "c.png")
    assert views.reports == {"en": "Clear."}
    assert views.findings["edema"] == 1.0
    assert views.grouped_key == "patient:12"
    assert (single.study_id, single.findings, single.grouped_key) == ("b", None, "study:b")


@pytest.mark.parametrize(
    ("column", "values", "name"),
    [
        ("split", ("train", "validation"), "split"),
        ("report_en", ("Clear.", "Edema."), "reports"),
        ("labels", (["Edema"], ["No Finding"]), "findings"),
        ("patient_id", (SECRET, "other"), "patient_id"),
    ],
)
def test_views_that_contradict_are_refused(tmp_path, column, values, name):
    rows = [
        {"file_name": f"{i}.png", "modality": "cxr", "study_id": SECRET, column: value}
        for i, value in enumerate(values)
    ]
    with pytest.raises(ValueError, match=f"line 2: {name} differs from an earlier row") as error:
        load_studies(write_folder(tmp_path, "my_hospital", rows))
    assert SECRET not in str(error.value)


def test_a_view_given_twice_or_a_text_given_twice_is_refused(tmp_path):
    row = {"file_name": "a.png", "modality": "cxr", "study_id": "1", "report_en": "Clear."}
    with pytest.raises(ValueError, match="already given"):
        load_studies(write_folder(tmp_path, "my_hospital", [row, row]))
    del row["file_name"]
    with pytest.raises(ValueError, match="already given"):
        load_studies(write_folder(tmp_path, "texts", [row, row], "data.jsonl"))


def test_files_of_one_name_are_told_apart_by_their_folder(tmp_path):
    names = ["train/1.png", "test/1.png", "test/2.nii.gz", "test/3.png", "test/3.jpg"]
    folder = write_folder(tmp_path, "mine", [{"file_name": name, "modality": "ct"} for name in names])
    studies = load_studies(folder)
    assert [s.study_id for s in studies] == ["train/1", "test/1", "2", "test/3.png", "test/3.jpg"]
    assert len({s.grouped_key for s in studies}) == 5


def test_figures_of_a_paper_belong_together_in_the_set_that_numbers_them(tmp_path):
    rows = [{"file_name": f"img_{i}.png", "modality": "ct"} for i in range(2)]
    assert len({s.grouped_key for s in load_studies(write_folder(tmp_path, "cov_ctr", rows))}) == 1
    assert len({s.grouped_key for s in load_studies(write_folder(tmp_path, "mine", rows))}) == 2


def test_the_current_folder_has_its_name(tmp_path, monkeypatch):
    folder = write_folder(tmp_path, "mine", [{"file_name": "a.png", "modality": "cxr"}])
    monkeypatch.chdir(folder)
    assert load_studies(".")[0].source == source_name(".") == "mine"
    assert source_name("images/..") == "mine"


def test_training_part_is_train_or_unstated():
    parts = [study(str(i), "g", split=split) for i, split in enumerate(["train", None, "test", "validation", "x"])]
    assert training_part(parts) == parts[:2]


def test_slice_without_infection_says_nothing_of_the_disease(tmp_path):
    rows = [
        {"file_name": f"images/p_{i}.jpg", "modality": "ct", "labels": ["COVID-19"], "infected_slice": i}
        for i in (0, 1)
    ]
    clean, infected = load_studies(write_folder(tmp_path, "covid_ct_md_slices", rows))
    assert clean.findings is None
    assert infected.findings == {"covid_19": 1.0}


def test_missing_ctrate_labels_mean_none_of_them(tmp_path):
    rows = [{"study_id": "a", "modality": "ct", "report_en": "Normal."}]
    (only,) = load_studies(write_folder(tmp_path, "ctrate_reports_text", rows, "data.jsonl"))
    assert len(only.findings) == 18
    assert not any(only.findings.values())


def test_kermany_normals_are_grouped_by_their_number(tmp_path):
    rows = [
        {"file_name": f"images/{name}", "modality": "cxr", "labels": ["No Finding"], "patient_id": "kermany-train-IM"}
        for name in ("normal_IM-0115-0001.jpeg", "normal_IM-0117-0001.jpeg", "normal_NORMAL2-IM-0117-0001-0002.jpeg")
    ]
    studies = load_studies(write_folder(tmp_path, "kermany_pneumonia_224", rows))
    assert [s.patient_id for s in studies] == ["IM-0115", "IM-0117", "IM-0117"]


def test_groups_follow_patients_and_papers_through_chains(tmp_path):
    marks = [
        {"patient_id": "1", "doi": "10.1/a"},
        {"patient_id": "2", "doi": "10.1/a"},
        {"patient_id": "2", "url": "https://example.org"},
        {"patient_id": "3"},
        {"doi": "10.1101/2020.03.04.20030395"},
        {},
    ]
    names = ["a", "b", "c", "d", "e", "2020.03.04.20030395-p27-108_4"]
    rows = [{"file_name": f"images/{n}.jpg", "modality": "cxr", **mark} for n, mark in zip(names, marks, strict=True)]
    keys = [s.grouped_key for s in load_studies(write_folder(tmp_path, "made_up", rows))]
    assert keys[0] == keys[1] == keys[2]
    assert keys[4] == keys[5]
    assert len(set(keys)) == 3
    reversed_keys = [s.grouped_key for s in load_studies(write_folder(tmp_path, "made_up", rows[::-1]))]
    assert reversed_keys[::-1] == keys


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"file_name": "' + SECRET, "line 2: expected a JSON object"),
        ("[1]", "line 2: expected a JSON object, got list"),
        ({"modality": "cxr", "patient_id": SECRET}, "line 2: column 'file_name' is missing"),
        ({"file_name": "images/b.png", "patient_id": SECRET}, "line 2: column 'modality' is missing"),
        ({"file_name": "images/b.png", "modality": "mri"}, "line 2: modality must be one of cxr, ct, got 'mri'"),
        ({"file_name": "images/b.png", "modality": "cxr", "report_en": 3}, "line 2: column 'report_en' must be text"),
        (
            {"file_name": "images/b.png", "modality": "cxr", "labels": ["Edemma"]},
            "line 2: .*nearest it has is 'Edema'",
        ),
        ({"file_name": "images/b.png", "modality": "cxr", "labels": "Edema"}, "line 2: labels must be a list"),
        ({"file_name": "images/a.png", "modality": "cxr"}, "line 2: .*already given"),
        ('{"file_name": "images/' + SECRET + '.png", "modality": "cxr"}', "line 2: .*does not exist"),
    ],
)
def test_bad_row_is_refused_with_file_and_line_but_no_identifier(tmp_path, row, message):
    folder = write_folder(tmp_path, "made_up", [{"file_name": "images/a.png", "modality": "cxr"}, row])
    with pytest.raises(ValueError, match=r"metadata\.jsonl, " + message) as error:
        load_studies(folder)
    assert SECRET not in str(error.value)
    assert error.value.__cause__ is None


def test_missing_metadata_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"neither metadata\.jsonl nor data\.jsonl"):
        load_studies(tmp_path)


def test_repr_shows_no_identifier(tmp_path):
    row = {"file_name": f"images/{SECRET}.png", "modality": "cxr", "patient_id": SECRET}
    assert SECRET not in repr(load_studies(write_folder(tmp_path, "made_up", [row])))


def test_repr_shows_no_report(tmp_path):
    report = "The lungs are clear."
    rows = [{"file_name": "a.png", "modality": "cxr", "report_en": report}]
    assert report not in repr(load_studies(write_folder(tmp_path, "made_up", rows)))
    pairs = [{"study_id": "a", "en": report, "zh": "双肺清晰。"}]
    shown = repr(load_parallel(write_folder(tmp_path, "made_up", pairs, "parallel_en_zh.jsonl")))
    assert report not in shown and "双肺清晰" not in shown


def test_parallel_texts_come_once_with_the_split_of_their_study(tmp_path):
    write_folder(
        tmp_path,
        "openi_iu_reports",
        [{"study_id": "a", "split": "train"}, {"study_id": "b", "split": "validation"}],
        "data.jsonl",
    )
    pair = {"study_id": "b", "en": "Clear\tlungs.", "zh": "双肺清晰。"}
    rows = [pair, {**pair, "image_id": "b_2"}, {**pair, "study_id": "a"}, {**pair, "study_id": "c"}]
    pairs = load_parallel(write_folder(tmp_path, "openi_iu_reports", rows, "parallel_en_zh.jsonl"))
    assert [(p.study_id, p.split) for p in pairs] == [("b", "validation"), ("a", "train"), ("c", None)]
    assert pairs[0].texts == {"en": "Clear lungs.", "zh": "双肺清晰。"}


def test_parallel_texts_need_every_language(tmp_path):
    folder = write_folder(tmp_path, "made_up", [{"study_id": SECRET, "en": "Clear."}], "parallel_en_zh.jsonl")
    with pytest.raises(ValueError, match=r"parallel_en_zh\.jsonl, line 1: column 'zh' is missing") as error:
        load_parallel(folder)
    assert SECRET not in str(error.value)
    with pytest.raises(ValueError, match=r"parallel_en_zh\.jsonl is missing"):
        load_parallel(tmp_path)


def test_fingerprint_follows_ids_texts_and_pixels(tmp_path):
    image = tmp_path / "a.png"
    image.write_bytes(b"pixels")
    one, two = dataclasses.replace(study("1", "g"), images=(image,)), study("2", "g")
    moved = image.rename(tmp_path / "b.png")
    moved_one = dataclasses.replace(one, images=(moved,))
    image.write_bytes(b"other pixels")
    assert fingerprint([one]) != fingerprint([moved_one])
    image.write_bytes(b"pixels")
    assert fingerprint([one]) == fingerprint([moved_one])
    assert fingerprint([one, two]) == fingerprint([two, one])
    assert fingerprint([one]) == fingerprint([dataclasses.replace(one, split="train")])
    assert fingerprint([one]) != fingerprint([dataclasses.replace(one, reports={"en": "Clear."})])
    assert fingerprint([one]) != fingerprint([two])
    assert len(fingerprint([])) == 64


def made_up_studies():
    studies = []
    for group in range(120):
        findings = {"pneumonia": 1.0} if group % 3 == 0 else {"pneumonia": 0.0, "no_finding": 1.0}
        studies += [study(f"{group}-{i}", str(group), findings) for i in range(1 + group % 4)]
    return [*studies, *(study(f"big-{i}", "big", {"pneumonia": 1.0}) for i in range(40))]


def test_carved_part_keeps_groups_together_and_strata_near_their_share():
    studies = made_up_studies()
    chosen = set(splits.carve_validation(studies, 0.2, seed=1))
    parts = [dataclasses.replace(s, split="validation" if s.study_id in chosen else "train") for s in studies]
    assert splits.split_leaks(parts) == 0
    assert not any(study_id.startswith("big") for study_id in chosen)
    for value in (0.0, 1.0):
        stratum = [s for s in studies if s.findings["pneumonia"] == value]
        share = sum(s.study_id in chosen for s in stratum) / len(stratum)
        assert share == pytest.approx(0.2, abs=0.03)


def test_carving_depends_on_the_seed_and_not_on_the_order():
    studies = made_up_studies()
    assert splits.carve_validation(studies, 0.2, seed=1) == splits.carve_validation(studies[::-1], 0.2, seed=1)
    assert splits.carve_validation(studies, 0.2, seed=1) != splits.carve_validation(studies, 0.2, seed=2)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -1.0])
def test_carving_refuses_an_impossible_fraction(fraction):
    with pytest.raises(ValueError, match="fraction must lie between 0 and 1"):
        splits.carve_validation([], fraction, seed=1)


def test_leaks_count_validation_studies_seen_in_training():
    parts = [
        study("1", "p", split="train"), study("2", "p", split="validation"), study("3", "p", split="validation"),
        study("4", "q", split="validation"), study("5", "r", split="test"), study("6", "r", split="validation"),
    ]  # fmt: skip
    assert splits.split_leaks(parts) == 2
    assert splits.new_to(parts[:1], parts[1:]) == [False, False, True, True, True]


def test_carved_list_is_applied_by_folder_name(tmp_path):
    inside = min(carved_ids("tb_shenzhen_montgomery_128"))
    rows = [
        {"file_name": f"images/{name}.png", "modality": "cxr", "labels": ["Tuberculosis"]}
        for name in (inside, "other")
    ]
    folder = write_folder(tmp_path, "tb_shenzhen_montgomery_128", rows)
    assert [s.split for s in load_studies(folder)] == ["validation", "train"]
    assert [s.split for s in read_studies(folder)] == [None, None]


def test_carved_list_is_applied_by_source_in_shards(tmp_path):
    datasets = pytest.importorskip("datasets")
    inside = min(carved_ids("tb_shenzhen_montgomery_128"))
    sources = ["tb_shenzhen_montgomery_128"] * 2 + ["other", "../splits/tb_shenzhen_montgomery_128", "x" * 5000]
    records = [
        StudyRecord(study_id, source, "cxr", reports={"en": ReportText("Clear.")})
        for study_id, source in zip((inside, "other", inside, inside, inside), sources, strict=True)
    ]
    rows = [record.as_row() for record in records]
    table = datasets.Dataset.from_list(rows, features=features())
    table.to_parquet(str(tmp_path / "data" / "train-00000.parquet"))
    assert [s.split for s in load_studies(tmp_path)] == ["validation", "train", None, None, None]


def test_every_carved_set_has_its_list():
    for name in splits.CARVED_FOLDERS:
        assert carved_ids(name)
    assert carved_ids("cov_ctr") == frozenset()


@pytest.mark.realdata
@pytest.mark.parametrize(
    ("folder", "expected"),
    [
        ("cov_ctr", {"train": 576, "validation": 72, "unreported": 26}),
        ("covid_chestxray", {"train": 403, "validation": 78}),
        ("nih_chestxray14_sample", {"train": 1121, "validation": 77}),
        ("kermany_pneumonia_224", {"train": 2213, "validation": 391}),
        ("tb_shenzhen_montgomery_128", {"train": 425, "validation": 75}),
        ("luna16_slices", {"unlabelled": 423}),
        ("covid_ct_md_slices", {None: 72}),
        ("covid_ct_md_volumes", {None: 3}),
        ("openi_iu_reports", {"train": 3069, "validation": 296}),
        ("ctrate_reports_text", {"train": 800, "validation": 200}),
    ],
)
def test_counts_of_the_real_sets(data_root, folder, expected):
    assert Counter(s.split for s in load_studies(data_root / folder)) == expected


@pytest.mark.realdata
@pytest.mark.parametrize(
    ("folder", "digest"),
    [
        ("cov_ctr", "9f0b395b165de3e4"),
        ("covid_chestxray", "8c934a8a0bc11f7e"),
        ("covid_ct_md_slices", "bf6f0d61de1fe0d5"),
        ("kermany_pneumonia_224", "a635cdbb316c7fca"),
        ("luna16_slices", "43490c4877ba08bc"),
        ("nih_chestxray14_sample", "62fa90c5baa67236"),
        ("openi_iu_reports", "d7d4ae7d6352e1fe"),
        ("tb_shenzhen_montgomery_128", "5059f675a657cfae"),
    ],
)
def test_ids_and_groups_of_the_real_sets_stay(data_root, folder, digest):
    # The carved validation parts, recipes and earlier scores hang on them.
    found = hashlib.sha256()
    for each in load_studies(data_root / folder):
        found.update(json.dumps([each.study_id, each.grouped_key]).encode() + b"\n")
    assert found.hexdigest().startswith(digest)


@pytest.mark.realdata
@pytest.mark.parametrize("folder", splits.CARVED_FOLDERS)
def test_carved_lists_are_made_again_bit_for_bit_and_leak_nothing(data_root, folder):
    path = splits.__path__[0] + f"/{folder}.json"
    with open(path, encoding="utf-8", newline="") as file:
        assert splits.split_document(data_root / folder) == file.read()
    assert splits.split_leaks(load_studies(data_root / folder)) == 0


@pytest.mark.realdata
def test_text_of_open_i_stays(data_root):
    # Measured results of the shipped checkpoint hang on it.
    assert fingerprint(load_studies(data_root / "openi_iu_reports")).startswith("bac2d41afd99")


@pytest.mark.realdata
def test_real_reports_are_clean(data_root):
    reported = load_studies(data_root / "cov_ctr")
    assert sum(set(s.reports) == {"en", "zh"} for s in reported) == 648
    assert splits.split_leaks(reported) == 22  # the official split's, not ours
    for folder in ("openi_iu_reports", "covid_chestxray", "tb_shenzhen_montgomery_128", "ctrate_reports_text"):
        texts = [s.reports["en"] for s in load_studies(data_root / folder) if s.reports]
        assert texts
        assert not any("XXXX" in text or "\ufffd" in text or "  " in text for text in texts)


@pytest.mark.realdata
def test_real_parallel_pairs(data_root):
    pairs = load_parallel(data_root / "openi_iu_reports")
    assert Counter(p.split for p in pairs) == {"train": 2677, "validation": 332}
