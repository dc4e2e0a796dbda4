# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
import json

import pytest

from m3fm.evaluation.selection import evaluated_and_training


def folder(path, splits):
    path.mkdir()
    rows = []
    for number, split in enumerate(splits):
        name = f"{split}_{number}.png"
        (path / name).write_bytes(b"")
        row = {"file_name": name, "modality": "cxr", "report_en": "Clear."}
        rows.append(row if split is None else row | {"split": split})
    (path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.parametrize(
    ("splits", "asked", "part", "counts"),
    [
        (["train", "train", "validation", "test"], None, "validation", (1, 2)),
        (["train", "train", "validation", "test"], "test", "test", (1, 2)),
        (["train", "test", "test"], None, "test", (2, 1)),
        (["train", "held"], None, "held", (1, 1)),
        (["test", "test"], None, "test", (2, 0)),
        ([None, None, None], None, "all", (3, 0)),
        (["a", "b", "b"], "all", "all", (3, 0)),
    ],
)
def test_which_part_is_evaluated(tmp_path, splits, asked, part, counts):
    evaluated, training, chosen = evaluated_and_training(folder(tmp_path / "set", splits), asked)
    assert chosen == part
    assert (len(evaluated), len(training)) == counts
    assert {study.split for study in training} <= {"train"}


@pytest.mark.parametrize(
    ("splits", "asked", "message"),
    [
        (["train", "validation"], "train", "cannot be evaluated"),
        (["train", "validation"], "all", "not all of it"),
        (["train", "validation"], "test", r"parts in the data: \['train', 'validation'\]"),
        (["a", "b"], None, "name the one to evaluate"),
        (["train", "train"], None, "has the part 'train' alone"),
    ],
)
def test_parts_that_cannot_be_evaluated(tmp_path, splits, asked, message):
    with pytest.raises(ValueError, match=message):
        evaluated_and_training(folder(tmp_path / "set", splits), asked)


def test_training_studies_may_come_from_another_folder(tmp_path):
    held = folder(tmp_path / "held", ["test", "test"])
    full = folder(tmp_path / "full", ["train", "train", "validation"])
    evaluated, training, _ = evaluated_and_training(held, None, full)
    assert (len(evaluated), len(training)) == (2, 2)
    with pytest.raises(ValueError, match="no studies with images in the part 'train'"):
        evaluated_and_training(held, None, held)


def test_training_studies_of_evaluated_patients_are_dropped_across_folders(tmp_path):
    held, full = folder(tmp_path / "held", ["test", "test"]), folder(tmp_path / "full", ["train", "train", "train"])
    for path, patients in ((held, ["a", "b"]), (full, ["a", "c", "d"])):
        rows = [json.loads(line) for line in (path / "metadata.jsonl").read_text().splitlines()]
        named = [row | {"patient_id": patient} for row, patient in zip(rows, patients, strict=True)]
        (path / "metadata.jsonl").write_text("\n".join(map(json.dumps, named)))
    _, training, _ = evaluated_and_training(held, None, full)
    assert [study.patient_id for study in training] == ["c", "d"]
