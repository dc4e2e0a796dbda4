# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
import json

import pytest

from m3fm.data.opening import open_set
from m3fm.data.schema import ReportText, StudyRecord
from m3fm.data.sets import find_set, get_set, set_names
from m3fm.data.studies import load_studies, study_of

CHEXPERT = (
    "Path,Sex,Age,Frontal/Lateral,AP/PA,No Finding,Enlarged Cardiomediastinum,Cardiomegaly,Lung Opacity,Lung Lesion,"
    "Edema,Consolidation,Pneumonia,Atelectasis,Pneumothorax,Pleural Effusion,Pleural Other,Fracture,Support Devices\n"
)
# Files by which each published layout is told, with what their first lines are.
LAYOUTS = {
    "mimic_cxr": {"mimic-cxr-2.0.0-split.csv.gz": "", "mimic-cxr-2.0.0-chexpert.csv.gz": ""},
    "mimic_cxr 2": {"cxr-record-list.csv.gz": "", "cxr-study-list.csv.gz": ""},
    "chexpert": {"train.csv": CHEXPERT, "valid.csv": CHEXPERT},
    "chexpert 2": {"CheXpert-v1.0-small/train.csv": CHEXPERT},
    "chexpert_plus": {"df_chexpert_plus_240401.csv": "path_to_image,frontal_lateral,ap_pa,age,sex\n"},
    "ct_rate": {"dataset/radiology_text_reports/train_reports.csv": "VolumeName,Findings_EN,Impressions_EN\n"},
    "vindr": {
        "annotations/annotations_train.csv": "image_id,rad_id,class_name,x_min,y_min,x_max,y_max\n",
        "annotations/image_labels_train.csv": "image_id,rad_id,Aortic enlargement\n",
    },
    "vindr 2": {"train.csv": "image_id,class_name,class_id,rad_id,x_min,y_min,x_max,y_max\n"},
    "nih_chestxray14": {"Data_Entry_2017_v2020.csv": "Image Index,Finding Labels\n", "train_val_list.txt": ""},
    "rsna": {"stage_2_train_labels.csv": "patientId,x,y,width,height,Target\n"},
    "siim": {"train-rle.csv": "ImageId, EncodedPixels\n"},
    "iu_xray": {"NLMCXR_reports/ecgen-radiology/1.xml": "<eCitation/>"},
    "iu_xray 2": {"annotation.json": '{"train": [{"id": "CXR2384_IM-0942", "report": "Clear.", "split": "train"}]}'},
    "iu_xray 3": {"indiana_reports.csv": "uid,MeSH\n", "indiana_projections.csv": "uid,filename,projection\n"},
    "cov_ctr": {"reports_ZH_EN.csv": "image_id,findings,terminologies,COVID,impression,reports_En\n"},
    "covid_ct": {"reports.csv": "Case ID,Finding,Conclusion,Gender,Age,Test Result\n"},
    "covid19_ct_cxr": {"05122020.litcovid.released.image.json": "[]"},
    "covid_chestxray": {
        "metadata.csv": "patientid,offset,sex,age,finding,view,modality,date,folder,filename,doi,url,license\n"
    },
    "shenzhen_tb": {"ChinaSet_AllFiles/CXR_png/CHNCXR_0001_0.png": ""},
    "montgomery_tb": {"MontgomerySet/CXR_png/MCUCXR_0001_0.png": ""},
    "folder": {"metadata.jsonl": ""},
    "folder 2": {"metadata.csv": "file_name,modality,finding,view,url\n", "images/a.png": ""},
    "folder 3": {"data.jsonl": ""},
    "folder 4": {"train/metadata.csv": "file_name,modality\n", "test/metadata.csv": "file_name,modality\n"},
    "folder 5": {"validation/metadata.jsonl": ""},
    "folder 6": {"train/Pneumonia/a.png": "", "train/NORMAL/b.png": ""},
}


def write(root, files):
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content, encoding="utf-8")


@pytest.fixture
def folder(tmp_path):
    """Return an own folder of six studies, with one wrong row among them."""
    root = tmp_path / "mine"
    rows = [
        {
            "file_name": f"{i}.png", "modality": "cxr", "report_en": f"Study {i}.", "patient_id": i // 2,
            "labels": ["Edema"] if i % 2 else [], "split": ("train", "train", "validation")[i % 3],
        }
        for i in range(6)
    ]  # fmt: skip
    write(root, {f"{i}.png": "" for i in range(6)})
    write(root, {"metadata.jsonl": "".join(json.dumps(row) + "\n" for row in rows)})
    return root


def break_row(root):
    path = root / "metadata.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], lines[2].replace("cxr", "mri"), *lines[3:]]))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_is_told_by_its_files(tmp_path, layout):
    write(tmp_path, LAYOUTS[layout])
    assert find_set(tmp_path).name == open_set(tmp_path).set.name == layout.partition(" ")[0]


def test_every_set_is_tried_here():
    assert {layout.partition(" ")[0] for layout in LAYOUTS} == {*set_names()} - {"parquet"}


def test_a_list_of_ones_own_decides_whatever_lies_beside_it(tmp_path, folder):
    pytest.importorskip("datasets")
    (tmp_path / "shards").mkdir()
    open_set(folder).dataset().to_parquet(tmp_path / "shards" / "train-00000.parquet")
    assert find_set(tmp_path / "shards").name == "parquet"
    write(tmp_path / "shards", {"metadata.jsonl": ""})
    assert find_set(tmp_path / "shards").name == "folder"


@pytest.mark.parametrize("files", [{}, {"a.png": "", "notes/metadata.csv": ""}, {"test/a.png": ""}])
def test_an_unknown_folder_is_refused_with_what_is_expected(tmp_path, files):
    write(tmp_path, files)
    with pytest.raises(ValueError, match=r"none of the sets .*metadata\.jsonl"):
        open_set(tmp_path)
    with pytest.raises(ValueError, match=r"neither metadata\.jsonl nor data\.jsonl .*none of the sets"):
        load_studies(tmp_path)


def test_wrong_arguments_are_refused(tmp_path, folder):
    with pytest.raises(ValueError, match="no such folder"):
        open_set(tmp_path / "none")
    with pytest.raises(ValueError, match="no such folder"):
        open_set(tmp_path / "none", name="folder")
    with pytest.raises(ValueError, match="unknown data set 'mimic'; expected one of .*mimic_cxr"):
        open_set(folder, name="mimic")
    with pytest.raises(ValueError, match="on_bad must be 'raise' or 'skip', got 'ignore'"):
        open_set(folder, on_bad="ignore")
    with pytest.raises(ValueError, match="images must be 'required' or 'unchecked', got 'none'"):
        open_set(folder, images="none")


def test_a_split_is_a_part(folder):
    assert [record.study_id for record in open_set(folder, split="validation")] == ["2", "5"]
    assert [record.study_id for record in open_set(str(folder), split="train")] == ["0", "1", "3", "4"]
    assert list(open_set(folder, split="test")) == []
    assert [record.study_id for record in open_set(folder)] == list("012345")


def test_bad_rows_end_the_reading_or_are_those_of_the_latest_iteration(folder):
    break_row(folder)
    with pytest.raises(ValueError, match=r"metadata\.jsonl, line 3: modality must be one of cxr, ct, got 'mri'"):
        list(open_set(folder))
    opened = open_set(folder, on_bad="skip")
    assert not opened.reading.counts
    for _ in range(2):
        assert [record.study_id for record in opened] == list("01345")
        assert opened.reading.counts == {("metadata.jsonl", "bad_value"): 1}
        assert [(each.kind, each.line) for each in opened.reading.examples] == [("bad_value", 3)]
    assert opened.reading.summary().startswith("1 x bad_value in metadata.jsonl; the first: ")
    (folder / "0.png").unlink()
    assert len(list(opened)) == 4
    assert len(list(open_set(folder, on_bad="skip", images="unchecked"))) == 5


def test_dataset_and_stream_have_the_same_rows(folder):
    pytest.importorskip("datasets")
    opened = open_set(folder, split="train")
    rows = list(opened.dataset())
    assert rows == list(opened.stream()) == list(opened.stream())
    assert [StudyRecord.from_row(row) for row in rows] == list(opened)
    assert opened.dataset().features == opened.stream().features
    with pytest.raises(ValueError, match="no study to be read; the tables are empty"):
        open_set(folder, split="test").dataset()


def test_studies_of_a_set_that_is_no_own_folder(tmp_path, folder):
    pytest.importorskip("datasets")
    (tmp_path / "shards").mkdir()
    open_set(folder).dataset().to_parquet(tmp_path / "shards" / "train-00000.parquet")
    assert load_studies(tmp_path / "shards") == load_studies(folder)
    assert [study.grouped_key for study in load_studies(folder)] == [f"patient:{i // 2}" for i in range(6)]


def test_a_study_has_what_is_certain_in_a_record(tmp_path):
    states = {"edema": "positive", "mass": "negative", "nodule": "uncertain", "hernia": "unmentioned"}
    reports = {"en": ReportText("Edema.", raw="EDEMA"), "zh": ReportText("", raw="____")}
    record = StudyRecord("1", "mine", "ct", "p", findings=states, reports=reports, split="test")
    study = study_of(record, "patient:p")
    assert study.findings == {"edema": 1.0, "mass": 0.0}
    assert study.reports == {"en": "Edema."}
    assert (study.study_id, study.source, study.modality, study.patient_id) == ("1", "mine", "ct", "p")
    assert (study.images, study.split, study.grouped_key) == ((), "test", "patient:p")
    assert study_of(StudyRecord("1", "mine", "ct", findings={"nodule": "uncertain"})).findings is None


def test_sets_say_how_they_are_laid_out_and_licensed():
    for name in set_names():
        each = get_set(name)
        assert each.name == name
        assert each.title
        assert each.licence
        assert each.layout
