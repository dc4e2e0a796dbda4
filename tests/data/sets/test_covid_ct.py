# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""COVID-19 CT in small trees built to the layouts that are read; ids and texts are made up."""

import json
from pathlib import Path

import pytest

from m3fm.data.opening import OpenSet
from m3fm.data.schema import LabelState, StudyRecord
from m3fm.data.sets.covid_ct import SET
from m3fm.data.tables import BadRow, Reading

HEAD = "Case ID,Finding,Conclusion,Gender,Age,Test Result"
FINDING = "右肺下叶磨玻璃斑片影。双侧胸腔未见积液。"
CONCLUSION = "病毒性肺炎可能。"


def touch(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def read(root: Path, on_bad: str = "raise", images: str = "required") -> tuple[list[StudyRecord], Reading]:
    opened = OpenSet(root, SET, None, Reading(on_bad, images))
    return list(opened), opened.reading


class TestTable:
    def write(self, root: Path, *rows: str) -> None:
        root.mkdir(parents=True, exist_ok=True)
        (root / "reports.csv").write_text("\ufeff" + "\n".join((HEAD, *rows)) + "\n", encoding="utf-8")
        for case in ("c1", "c2"):
            for number in (2, 0, 1):
                touch(root / "images" / case / f"{number}.png")

    def test_rows_become_records(self, tmp_path):
        self.write(tmp_path, f"c1,{FINDING},{CONCLUSION},女,66,阳性", f"c2,{FINDING},,男,10个月,阴性")
        assert SET.recognises(tmp_path)
        first, second = read(tmp_path)[0]
        assert (first.study_id, first.modality, first.sex, first.age, first.split) == ("c1", "ct", "F", 66.0, None)
        assert (second.sex, second.age) == ("M", pytest.approx(10 / 12))
        assert first.reports["zh"].findings == FINDING and first.reports["zh"].impression == CONCLUSION
        assert second.reports["zh"].impression is None
        assert first.labels == {"Test Result": LabelState.POSITIVE}
        assert first.findings == {"covid_19": LabelState.POSITIVE}
        assert second.findings == {"covid_19": LabelState.NEGATIVE}
        folder = tmp_path / "images" / "c1"
        assert [(image.path, image.view) for image in first.images] == [
            (folder / f"{number}.png", "AXIAL") for number in range(3)
        ]

    def test_what_is_not_told_is_unmentioned(self, tmp_path):
        self.write(tmp_path, f"c1,{FINDING},,,,")
        (record,) = read(tmp_path)[0]
        assert record.labels == {"Test Result": LabelState.UNMENTIONED} and record.findings == {}
        assert record.sex is None and record.age is None

    def test_bad_rows(self, tmp_path):
        self.write(
            tmp_path,
            f"c1,{FINDING},,女,66,阳性",
            f"c1,{FINDING},,女,66,阳性",
            f"c2,{FINDING},,女,66,可疑",
            f"c2,{FINDING},,女,old,阳性",
            f"../c2,{FINDING},,女,66,阳性",
            f"c3,{FINDING},,女,66,阳性",
            f"c2,{FINDING},,女,66,阴性",
        )
        records, reading = read(tmp_path, "skip")
        assert [record.study_id for record in records] == ["c1", "c2"]
        counts = {kind: count for (_, kind), count in reading.counts.items()}
        assert counts == {"duplicate_id": 1, "bad_label": 1, "bad_value": 2, "missing_file": 1}

    def test_ages_and_sexes_of_other_kinds(self, tmp_path):
        self.write(tmp_path, f"c1,{FINDING},,Female,66岁,阳性", f"c2,{FINDING},,未知,18月,阴性")
        first, second = read(tmp_path)[0]
        assert (first.sex, first.age, second.sex, second.age) == ("F", 66.0, None, 1.5)

    def test_a_case_without_slices_is_left_out(self, tmp_path):
        self.write(tmp_path, f"c1,{FINDING},,女,66,阳性", f"c2,{FINDING},,女,66,阳性")
        for path in (tmp_path / "images" / "c1").iterdir():
            path.unlink()
        records, reading = read(tmp_path, "skip")
        assert [record.study_id for record in records] == ["c2"]
        assert reading.counts == {("reports.csv", "missing_file"): 1}

    def test_the_encoding_of_a_chinese_windows(self, tmp_path):
        self.write(tmp_path)
        (tmp_path / "reports.csv").write_bytes(f"{HEAD}\nc1,{FINDING},,女,66,阳性\n".encode("gbk"))
        with pytest.raises(BadRow, match="expected UTF-8"):
            read(tmp_path)

    def test_a_missing_column_is_raised_and_another_table_not_recognised(self, tmp_path):
        self.write(tmp_path)
        (tmp_path / "reports.csv").write_text("Case ID,Finding\n", encoding="utf-8")
        assert not SET.recognises(tmp_path)
        with pytest.raises(BadRow, match="'Conclusion'"):
            read(tmp_path, "skip")


class TestAnnotations:
    def write(self, root: Path, is_ascii: bool = False) -> None:
        entries = {
            "train": [{"id": "p1", "report": FINDING, "image_path": ["p1/0.png", "p1/1.png"]}],
            "val": [{"id": "p2", "report": f"检查所见：{FINDING}\n诊断意见：{CONCLUSION}", "image_path": "p2.png"}],
            "test": [{"id": "p3", "report": FINDING, "image_path": ["p3.png"]}],
        }
        root.mkdir(parents=True, exist_ok=True)
        (root / "annotation.json").write_text(json.dumps(entries, ensure_ascii=is_ascii), encoding="utf-8")
        for name in ("p1/0.png", "p1/1.png", "p2.png", "p3.png"):
            touch(root / "images" / name)

    @pytest.mark.parametrize("is_ascii", [True, False])
    def test_entries_become_records(self, tmp_path, is_ascii):
        self.write(tmp_path / "covid_ct", is_ascii)
        assert SET.recognises(tmp_path)
        records, _ = read(tmp_path)
        told = [(record.study_id, record.split, len(record.images)) for record in records]
        assert told == [("p1", "train", 2), ("p2", "validation", 1), ("p3", "test", 1)]
        assert records[0].reports["zh"].raw == FINDING and records[0].labels == {}
        assert records[1].reports["zh"].findings == FINDING
        assert records[1].reports["zh"].impression == CONCLUSION

    def test_bad_entries(self, tmp_path):
        self.write(tmp_path)
        (tmp_path / "images" / "p1" / "0.png").unlink()
        (tmp_path / "images" / "p3.png").unlink()
        text = (tmp_path / "annotation.json").read_text(encoding="utf-8")
        (tmp_path / "annotation.json").write_text(text.replace('"p2"', '"p1"'), encoding="utf-8")
        records, reading = read(tmp_path, "skip")
        assert [(record.study_id, len(record.images)) for record in records] == [("p1", 1)]
        counts = {kind: count for (_, kind), count in reading.counts.items()}
        assert counts == {"missing_file": 2, "duplicate_id": 1}
        assert len(read(tmp_path, "skip", "unchecked")[0]) == 2


def test_other_folders_are_not_recognised(tmp_path):
    assert not SET.recognises(tmp_path)
    (tmp_path / "annotation.json").write_text('{"train": [{"id": "a", "report": "Clear.", "image_path": "a"}]}')
    assert not SET.recognises(tmp_path)
    (tmp_path / "annotation.json").unlink()
    with pytest.raises(BadRow, match="got neither"):
        read(tmp_path)
