# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""COV-CTR in small trees built to its two layouts; texts are made up."""

import json
from pathlib import Path

import pytest

from m3fm.data.opening import OpenSet
from m3fm.data.schema import LabelState, StudyRecord
from m3fm.data.sets.cov_ctr import SET, source_documents
from m3fm.data.tables import BadRow, Reading

P, N = LabelState.POSITIVE, LabelState.NEGATIVE
NAMES = {"train": ["1%0.jpg", "2020.02.10.20021584-p6-52%7.png"], "val": ["kjr-21-e24-p5-31.png"], "test": ["102.png"]}
CHINESE = "双肺纹理清晰，未见实变影。"


def entry(name: str, language: str, part: str, **changes: object) -> dict[str, object]:
    return {
        "id": name,
        "report": CHINESE if language == "chinese" else "The lungs are clear.\n",
        "COVID": int(name.startswith("2020")),
        "split": part,
        "image_path11": f"[{name}]",
        "image_path": name,
        "label1": language,
        "label2": int(language == "english"),
        **changes,
    }


def document() -> dict[str, list]:
    # The authors' file has all English entries of a part before its Chinese ones.
    return {
        part: [entry(name, language, part) for language in ("english", "chinese") for name in names]
        for part, names in NAMES.items()
    }


def write(root: Path, content: object) -> None:
    root.mkdir(parents=True, exist_ok=True)
    (root / "annotation.json").write_text(json.dumps(content, ensure_ascii=False, indent=4), encoding="utf-8")
    (root / "images").mkdir(exist_ok=True)
    for name in (name for names in NAMES.values() for name in names):
        (root / "images" / name).touch()


def read(root: Path, on_bad: str = "raise", images: str = "required") -> tuple[list[StudyRecord], Reading]:
    opened = OpenSet(root, SET, None, Reading(on_bad, images))
    return list(opened), opened.reading


class TestAnnotations:
    def test_both_languages_of_an_image_are_one_study(self, tmp_path):
        write(tmp_path / "cov", document())
        assert SET.recognises(tmp_path / "cov") and SET.recognises(tmp_path)
        records, _ = read(tmp_path)
        assert [(record.study_id, record.split) for record in records] == [
            ("1_0", "train"),
            ("2020.02.10.20021584-p6-52_7", "train"),
            ("kjr-21-e24-p5-31", "validation"),
            ("102", "test"),
        ]
        first, second, *_ = records
        assert (first.source, first.modality, first.patient_id) == ("cov_ctr", "ct", None)
        assert first.reports["en"].text == "The lungs are clear." and not first.reports["zh"].is_translated
        assert first.reports["zh"].raw == CHINESE and list(first.reports) == ["en", "zh"]
        assert [(image.path, image.view) for image in first.images] == [
            (tmp_path / "cov" / "images" / "1%0.jpg", "AXIAL")
        ]
        assert first.labels == {"non-COVID": P, "COVID-19": N} and first.findings == {"covid_19": N}
        assert second.labels == {"non-COVID": N, "COVID-19": P} and second.findings == {"covid_19": P}
        assert second.documents == ("doi:10.1101/2020.02.10.20021584",)

    def test_bad_entries_cost_themselves_alone(self, tmp_path):
        bad = document()
        bad["train"] += [
            entry("1%0.jpg", "english", "train"),  # given before
            entry("3%0.jpg", "english", "train"),  # not there
            entry("102.png", "french", "train", label2=2),
            entry("102.png", "english", "train", COVID=3),
            entry("102.png", "english", "train", report=" "),
            entry("102.png", "english", "train", image_path=["a", "b"]),
        ]
        bad["val"] += [entry("1%0.jpg", "chinese", "val"), entry("102.png", "english", "test")]
        bad["test"][1]["COVID"] = 1  # the Chinese entry contradicts the English one
        write(tmp_path, bad)
        records, reading = read(tmp_path, "skip")
        assert [(record.study_id, len(record.reports)) for record in records] == [
            ("1_0", 2),
            ("2020.02.10.20021584-p6-52_7", 2),
            ("kjr-21-e24-p5-31", 2),
            ("102", 1),
        ]
        counts = {kind: count for (_, kind), count in reading.counts.items()}
        assert counts == {"duplicate_id": 2, "missing_file": 1, "bad_value": 4, "bad_label": 2}
        with pytest.raises(BadRow, match=r"annotation\.json, line \d+: entry 5 of 'train': .*already given"):
            read(tmp_path)

    def test_names_of_one_study_are_one_image(self, tmp_path):
        names = ("1%0.jpg", "1_0.jpg", "1%0.png")
        write(tmp_path, {"train": [entry(name, "english", "train") for name in names]})
        records, reading = read(tmp_path, "skip", "unchecked")
        assert [(record.study_id, record.images[0].path.name) for record in records] == [("1_0", "1%0.jpg")]
        assert reading.counts == {("annotation.json", "duplicate_id"): 2}

    def test_one_language_alone(self, tmp_path):
        write(tmp_path, {"train": document()["train"][:2]})
        assert [list(record.reports) for record in read(tmp_path)[0]] == [["en"], ["en"]]

    def test_one_bad_entry_in_a_hundred_loses_no_good_one(self, tmp_path):
        names = [f"{number}%0.jpg" for number in range(300)]
        rows = [entry(name, "english", "train", COVID=0 if int(name[:-6]) % 100 else "yes") for name in names]
        write(tmp_path, {"train": rows})
        records, reading = read(tmp_path, "skip", "unchecked")
        assert len(records) == 297 and reading.counts == {("annotation.json", "bad_label"): 3}


HEAD = "\ufeffimage_id,findings,terminologies,COVID,impression,reports_En\n"


class TestTable:
    def write(self, root: Path, *rows: str) -> None:
        root.mkdir(parents=True, exist_ok=True)
        (root / "reports_ZH_EN.csv").write_text(HEAD + "\n".join(rows) + "\n", encoding="utf-8")
        for name in ("1%0.jpg", "20.jpg"):
            (root / name).touch()

    def test_rows_become_records(self, tmp_path):
        self.write(tmp_path / "COV-CTR", f'1%0.jpg,{CHINESE},无,1,双肺未见异常。,"The lungs are clear.\n"',
                   f'20.jpg,{CHINESE},无,0,,"No effusion.\n"')  # fmt: skip
        assert SET.recognises(tmp_path)
        first, second = read(tmp_path)[0]
        assert (first.study_id, first.split, second.study_id) == ("1_0", None, "20")
        assert first.reports["en"].raw == "The lungs are clear." and first.reports["en"].impression is None
        assert first.reports["zh"].findings == CHINESE and first.reports["zh"].impression == "双肺未见异常。"
        assert second.reports["zh"].impression is None
        assert (first.findings, second.findings) == ({"covid_19": P}, {"covid_19": N})
        assert first.images[0].path == tmp_path / "COV-CTR" / "1%0.jpg"

    def test_bad_rows(self, tmp_path):
        self.write(
            tmp_path,
            f"20.jpg,{CHINESE},无,0,,First.",
            f"20.jpg,{CHINESE},无,0,,Second.",
            f"1%0.jpg,{CHINESE},无,maybe,,x",
            f"../x.jpg,{CHINESE},无,0,,x",
            f"9.jpg,{CHINESE},无,0,,x",
            f"1%0.jpg,{CHINESE},无,1",
            f'1%0.jpg,{CHINESE},无,1,,"Good."',
        )
        records, reading = read(tmp_path, "skip")
        assert [(record.study_id, record.reports["en"].raw) for record in records] == [
            ("20", "First."),
            ("1_0", "Good."),
        ]
        counts = {kind: count for (_, kind), count in reading.counts.items()}
        assert counts == {"duplicate_id": 1, "bad_label": 1, "bad_value": 1, "missing_file": 1, "not_a_row": 1}

    def test_names_of_one_study_are_one_image(self, tmp_path):
        self.write(tmp_path, *(f"{name},{CHINESE},无,0,,First." for name in ("1%0.png", "1_0.png", "1_0.jpg")))
        records, reading = read(tmp_path, "skip", "unchecked")
        assert [(record.study_id, record.images[0].path.name) for record in records] == [("1_0", "1%0.png")]
        assert reading.counts == {("reports_ZH_EN.csv", "duplicate_id"): 2}

    def test_a_missing_column_is_raised(self, tmp_path):
        self.write(tmp_path)
        (tmp_path / "reports_ZH_EN.csv").write_text("image_id,findings\n", encoding="utf-8")
        with pytest.raises(BadRow, match="'COVID'"):
            read(tmp_path, "skip")


@pytest.mark.parametrize(
    ("name", "documents"),
    [
        ("12%0.jpg", ("study:12",)),
        ("12_0.jpg", ("study:12",)),
        ("102.png", ("study:102",)),
        ("2020.02.26.20026989-p34-114_1%0.png", ("doi:10.1101/2020.02.26.20026989",)),
        ("2020.01.24.919183-p27-132.png", ("doi:10.1101/2020.01.24.919183",)),
        ("kjr-21-e24-p5-31.png", ("study:kjr-21-e24-p5-31", "article:kjr-21-e24")),
        ("Ni2020_Article_Combination-p3-1.png", ("study:Ni2020", "article:Ni2020_Article_Combination")),
        ("PIIS0140673620301547%0.png", ("study:PIIS0140673620301547",)),
    ],
)
def test_papers_by_the_names_of_files(name, documents):
    assert source_documents(name) == documents


def test_other_folders_are_not_recognised(tmp_path):
    assert not SET.recognises(tmp_path)
    write(tmp_path, {"train": [{"id": "CXR1_IM-1", "report": "x", "image_path": ["a"]}]})
    assert not SET.recognises(tmp_path)
    with pytest.raises(BadRow, match="got neither"):
        read(tmp_path / "images")


@pytest.mark.realdata
def test_ids_and_papers_agree_with_the_folder_of_the_same_images(data_root):
    rows = [json.loads(line) for line in (data_root / "cov_ctr" / "metadata.jsonl").read_text("utf-8").splitlines()]
    for row in rows:
        assert Path(row["file_name"]).stem == Path(row["original_name"]).stem.replace("%", "_")
        preprint = (row.get("doi") or "").startswith("10.1101/2020.")
        if preprint and row["original_name"].startswith("2020."):
            assert source_documents(row["original_name"]) == (f"doi:{row['doi']}",)
