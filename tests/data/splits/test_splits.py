# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Splits by whole groups, as files, and those that ship."""

import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from m3fm.data.leaks import find_leaks
from m3fm.data.near_duplicates import ImageHashes, RecordHashes, hash_images
from m3fm.data.opening import open_set
from m3fm.data.schema import LabelState, ReportText, StudyRecord
from m3fm.data.splits import (
    CARVED_FOLDERS,
    FAIR_SPLITS,
    SplitDocument,
    apply_split,
    check_set,
    fair_split,
    fair_split_file,
    grouped_split,
    named_fractions,
    read_split,
    split_document,
    split_set,
)
from m3fm.data.studies import carved_ids, load_studies


def studies(count: int = 1000) -> list[StudyRecord]:
    """Returns studies of patients with one to four, of which some share a paper; a third of them has an effusion."""
    rng = random.Random(0)
    records = []
    for number in range(count):
        state = LabelState.POSITIVE if rng.random() < 0.3 else LabelState.NEGATIVE
        language = "zh" if rng.random() < 0.4 else "en"
        records.append(
            StudyRecord(
                study_id=f"s{number:04}",
                source="own",
                modality="cxr" if rng.random() < 0.7 else "ct",
                patient_id=f"p{rng.randrange(count // 2)}",
                documents=(f"doi:10.1/{rng.randrange(50)}",) if rng.random() < 0.05 else (),
                findings={"pleural_effusion": state},
                reports={language: ReportText("Text.")},
            )
        )
    return records


def test_no_group_is_divided_and_every_study_is_in_one_part() -> None:
    records = studies()
    parts = grouped_split(records, by=("patient", "document"))
    assert list(parts) == ["train", "validation", "test"]
    assert sorted(study for ids in parts.values() for study in ids) == [record.study_id for record in records]
    assert find_leaks(records, SplitDocument("own", parts)).is_clean


def test_parts_have_their_share_of_findings_modalities_and_languages() -> None:
    records = {record.study_id: record for record in studies()}
    parts = grouped_split(records.values(), by=("patient",))
    assert len(parts["validation"]) == pytest.approx(100, abs=5)
    assert len(parts["test"]) == pytest.approx(100, abs=5)
    wanted = Counter(s for record in records.values() for s in strata(record))
    for part in ("validation", "test"):
        got = Counter(s for study in parts[part] for s in strata(records[study]))
        for stratum, count in wanted.items():
            assert got[stratum] == pytest.approx(count / 10, abs=4), (part, stratum)


def strata(record: StudyRecord) -> list[str]:
    """Returns what a part should have its share of."""
    effusion = record.findings["pleural_effusion"]
    return [record.modality, *record.reports, *([f"{record.modality}+"] if effusion is LabelState.POSITIVE else [])]


def test_split_does_not_depend_on_the_order_but_on_the_seed() -> None:
    records = studies(300)
    parts = grouped_split(records, by=("patient", "document"))
    shuffled = random.Random(1).sample(records, len(records))
    assert grouped_split(shuffled, by=("patient", "document")) == parts
    assert grouped_split(records, by=("patient", "document"), seed=1) != parts


def test_large_group_stays_in_the_largest_part() -> None:
    records = [StudyRecord(f"{n}", "own", "cxr", patient_id="one" if n < 40 else f"{n}") for n in range(200)]
    parts = grouped_split(records, {"train": 0.51, "validation": 0.49}, by=("patient",))
    assert {f"{n}" for n in range(40)} <= set(parts["train"])


def test_a_small_set_with_several_studies_a_patient_is_split() -> None:
    records = [StudyRecord(f"{n}", "own", "cxr", patient_id=f"{n // 2}") for n in range(20)]
    parts = grouped_split(records, by=("patient",))
    assert {part: len(ids) for part, ids in parts.items()} == {"train": 16, "validation": 2, "test": 2}


def test_equal_fractions_are_folds() -> None:
    parts = grouped_split(studies(500), {f"fold-{n}": 0.2 for n in range(5)}, by=("patient",))
    assert all(len(ids) == pytest.approx(100, abs=8) for ids in parts.values())


def test_near_duplicates_stay_together() -> None:
    records = [StudyRecord(f"{n}", "own", "cxr", patient_id=f"{n}") for n in range(40)]
    hashes = RecordHashes(ImageHashes(hash_images([], progress=False).entries, [], 0), ())
    hashes.__dict__["marks"] = {("own", f"{n}"): (f"image:{n // 2}",) for n in range(40)}
    parts = grouped_split(records, {"train": 0.51, "test": 0.49}, hashes=hashes)
    part_of = {study: part for part, ids in parts.items() for study in ids}
    assert all(part_of[f"{n}"] == part_of[f"{n + 1}"] for n in range(0, 40, 2))


def test_wrong_requests_are_refused() -> None:
    records = studies(20)
    for fractions in ({"train": 1.0}, {"train": 0.5, "test": 0.4}, {"train": 1.5, "test": -0.5}):
        with pytest.raises(ValueError, match="add up to 1"):
            grouped_split(records, fractions, by=("patient",))
    with pytest.raises(ValueError, match="hash_records"):
        grouped_split(records)
    with pytest.raises(ValueError, match="20 studies in 1 groups .* validation, test would be empty"):
        grouped_split([replace(record, patient_id="one") for record in records], by=("patient",))
    with pytest.raises(ValueError, match="got 'doctor'"):
        grouped_split(records, by=("doctor",))
    with pytest.raises(ValueError, match="1 study ids again"):
        grouped_split([*records, records[0]], by=("patient",))
    with pytest.raises(ValueError, match="two or three fractions, got 4"):
        named_fractions([0.25] * 4)
    assert named_fractions([0.7, 0.3]) == {"train": 0.7, "validation": 0.3}


def test_document_goes_through_its_file(tmp_path: Path) -> None:
    document = SplitDocument("own", {"train": ["a", "b"], "test": ["c"]}, {"seed": 3})
    document.write(tmp_path / "split.json")
    again = read_split(tmp_path / "split.json")
    assert again == document
    assert dict(again) == {"a": "train", "b": "train", "c": "test"}
    assert again.about == {"seed": 3}
    assert json.loads((tmp_path / "split.json").read_text(encoding="utf-8"))["counts"] == {"train": 2, "test": 1}
    assert "'a'" not in repr(document)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"parts": {}}', '{"source": "x", "parts": {"a": "b"}}', '{"source": "x", "parts": {"a": [1]}}'],
)
def test_what_is_no_split_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "split.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"split\.json: expected a JSON object"):
        read_split(path)


def test_study_in_two_parts_and_missing_file_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "split.json"
    with pytest.raises(ValueError, match="cannot be read"):
        read_split(path)
    path.write_text('{"source": "x", "parts": {"a": ["secret"], "b": ["secret"]}}', encoding="utf-8")
    with pytest.raises(ValueError, match="1 studies again") as error:
        read_split(path)
    assert "secret" not in str(error.value)


def test_split_is_applied_or_says_what_does_not_fit() -> None:
    records = [StudyRecord(name, "own", "cxr", split="published") for name in ("anna", "bert")]
    fitting = SplitDocument("own", {"train": ["bert"], "test": ["anna"]})
    assert [record.split for record in apply_split(records, fitting)] == ["test", "train"]
    too_small = SplitDocument("own", {"train": ["anna"]})
    with pytest.raises(ValueError, match="study number 2, of own, is not in the split") as error:
        list(apply_split(records, too_small))
    assert "bert" not in str(error.value)
    too_large = SplitDocument("own", {"train": ["anna", "bert", "carl"]})
    with pytest.raises(ValueError, match="1 of the 3 studies"):
        list(apply_split(records, too_large))
    assert [record.study_id for record in apply_split(records, too_small, "skip")] == ["anna"]
    assert len(list(apply_split(records, too_large, "skip"))) == 2
    with pytest.raises(ValueError, match="on_mismatch"):
        list(apply_split(records, fitting, "ignore"))


def test_own_folder_is_split_and_checked(tmp_path: Path) -> None:
    folder = tmp_path / "own"
    folder.mkdir()
    rows = [
        {"study_id": f"s{n}", "patient_id": f"p{n // 2}", "modality": "cxr", "report_en": "Clear.", "split": "train"}
        for n in range(60)
    ]
    rows[1]["split"] = "validation"
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    stated = check_set(open_set(folder))
    assert stated.of("patient", "train", "validation").shared == 1
    report = split_set(open_set(folder), tmp_path / "split.json", named_fractions([0.8, 0.1, 0.1]))
    assert report.is_clean
    split = read_split(tmp_path / "split.json")
    assert (split.source, len(split)) == ("own", 60)
    assert all(split[f"s{n}"] == split[f"s{n + 1}"] for n in range(0, 60, 2))


@pytest.mark.parametrize("name", FAIR_SPLITS)
def test_fair_split_ships_and_is_no_validation_part(name: str) -> None:
    split = read_split(fair_split_file(name))
    assert split.source == name
    assert set(split.parts) == {"train", "validation", "test"}
    assert carved_ids(name) == frozenset()
    assert carved_ids(fair_split_file(name).stem) == frozenset()
    with pytest.raises(ValueError, match="expected one of cov_ctr"):
        fair_split_file("nothing")


@pytest.mark.realdata
@pytest.mark.parametrize("name", CARVED_FOLDERS)
def test_shipped_validation_parts_come_out_bit_for_bit(data_root: Path, name: str) -> None:
    path = fair_split_file("cov_ctr").with_name(f"{name}.json")
    assert split_document(data_root / name) == path.read_text(encoding="utf-8")


@pytest.mark.realdata
def test_fair_split_comes_out_bit_for_bit(data_root: Path) -> None:
    assert fair_split(data_root / "cov_ctr").as_json() == fair_split_file("cov_ctr").read_text(encoding="utf-8")


@pytest.mark.realdata
def test_fair_split_leaves_the_published_one_of_training_alone(data_root: Path) -> None:
    assert Counter(study.split for study in load_studies(data_root / "cov_ctr"))["validation"] == 72
    applied = list(apply_split(open_set(data_root / "cov_ctr"), read_split(fair_split_file("cov_ctr"))))
    assert len(applied) == 674
