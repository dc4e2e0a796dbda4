# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""What the parts of a set share."""

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from m3fm.data.leaks import find_leaks, study_marks
from m3fm.data.near_duplicates import hash_records
from m3fm.data.opening import open_set
from m3fm.data.schema import ImageFile, ReportText, StudyRecord
from m3fm.data.splits import fair_split_file, read_split


def image(seed: int, quality: int = 95) -> ImageFile:
    """Returns an image like no other seed's."""
    coarse = (np.random.default_rng(seed).random((16, 16)) * 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize((120, 120), Image.Resampling.BICUBIC).save(file, "JPEG", quality=quality)
    return ImageFile(None, file.getvalue())


def study(name: str, split: str | None, **told: object) -> StudyRecord:
    """Returns a study of the set "own"."""
    return StudyRecord(**{"study_id": name, "source": "own", "modality": "cxr", "split": split, **told})


RECORDS = [
    study("a", "train", patient_id="p1", documents=("doi:10.1/x",)),
    study("b", "train", patient_id="p2", documents=("doi:10.1/x",), images=(image(1),)),
    study("c", "train", patient_id="p3"),
    study("d", "validation", patient_id="p1"),
    study("e", "validation", patient_id="p4", images=(image(1, quality=40),)),
    study("f", "validation", patient_id="p5"),
    study("g", "test", documents=("doi:10.1/y",)),
]


def test_shared_things_and_studies_touched_are_counted() -> None:
    report = find_leaks(RECORDS, hashes=hash_records(RECORDS, progress=False))
    assert dict(report.sizes) == {"train": 3, "validation": 3, "test": 1}
    found = {each.kind: (each.shared, each.studies) for each in report.shared if each.parts == ("train", "validation")}
    # a and b by their paper, b and e by an image, a and d by their patient: one group through a chain.
    assert found == {"patient": (1, (1, 1)), "document": (0, (0, 0)), "image": (1, (1, 1)), "group": (1, (2, 2))}
    assert not report.is_clean
    assert all(not each.shared for each in report.shared if "test" in each.parts)


def test_summary_is_loud_and_shows_no_id() -> None:
    text = find_leaks(RECORDS, hashes=hash_records(RECORDS, progress=False)).summary()
    assert "LEAK: 2 of the 3 studies of validation (67 %) share" in text
    assert "| train, validation | patients | 1 | 1 | 1 | 33.3 % |" in text
    assert not any(mark in text for mark in ("p1", "10.1/x", '"a"'))
    assert "p1" not in repr(find_leaks(RECORDS))


def test_clean_parts_say_so_and_whether_images_were_compared() -> None:
    report = find_leaks([study("a", "train", patient_id="1"), study("b", "test", patient_id="2")])
    assert report.is_clean
    assert "No two parts share any of: patients." in report.summary()
    assert "0 of 2 studies have a source document; of the others nothing is known." in report.summary()
    assert "Images were not compared." in report.summary()
    with pytest.raises(KeyError):
        report.of("image", "train", "test")


def test_what_a_set_does_not_tell_is_not_said_to_be_clean() -> None:
    silent = find_leaks([study("a", "train"), study("b", "test")])
    assert "No two parts share" not in silent.summary()
    assert "0 of 2 studies have a patient" in silent.summary()
    assert silent.as_dict()["known"] == {"patient": 0, "document": 0, "image": 0}
    partly = find_leaks([study("a", "train", patient_id="1"), study("b", "test")])
    assert "1 of 2 studies have a patient; of the others nothing is known." in partly.summary()


def test_parts_by_id_go_with_one_set() -> None:
    records = [study("1", None), replace(study("1", None), source="other")]
    with pytest.raises(ValueError, match="parts by study id go with one set, got 2 of them"):
        find_leaks(records, {"1": "train"})


def test_one_part_has_nothing_to_compare() -> None:
    assert "nothing to compare" in find_leaks([study("a", None), study("b", None)]).summary()
    with pytest.raises(ValueError, match="got none"):
        find_leaks([study("a", "train")], parts={})


def test_ids_are_written_only_where_asked(tmp_path: Path) -> None:
    report = find_leaks(RECORDS, hashes=hash_records(RECORDS, progress=False))
    report.write(tmp_path / "leaks.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "leaks.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {"kind": "patient", "studies": {"train": ["a"], "validation": ["d"]}} in lines
    assert {"kind": "group", "studies": {"train": ["a", "b"], "validation": ["d", "e"]}} in lines
    assert "members" not in json.dumps(report.as_dict())


def test_identical_reports_are_counted_apart_by_language() -> None:
    def reported(name: str, split: str, patient: str, **texts: str) -> StudyRecord:
        reports = {language: ReportText(text) for language, text in texts.items()}
        return study(name, split, patient_id=patient, reports=reports)

    records = [
        reported("a", "train", "1", en="No finding.", zh="未见异常。"),
        reported("b", "train", "2", en="No finding."),
        reported("c", "validation", "1", en="No finding.", zh="双肺清晰。"),
        reported("d", "validation", "3", en="no finding."),
    ]
    report = find_leaks(records)
    english = report.of("report:en", "train", "validation")
    assert (english.shared, english.studies, english.in_groups) == (1, (2, 1), (1, 1))
    assert report.of("report:zh", "train", "validation").shared == 0
    assert "Identical reports are counted apart: of these 3 texts 2" in report.summary()


def test_templates_alone_are_no_leak() -> None:
    reports = {"en": ReportText("Normal.")}
    records = [study(part, part, patient_id=part, reports=reports) for part in ("train", "test")]
    assert find_leaks(records).is_clean


def test_parts_given_win_over_those_stated() -> None:
    report = find_leaks(RECORDS, parts={"a": "one", "d": "other"})
    assert dict(report.sizes) == {"one": 1, "other": 1}
    assert report.of("patient", "one", "other").shared == 1


def test_two_sets_share_papers_but_no_names_of_their_own() -> None:
    records = [
        study("a", "train", patient_id="1", documents=("doi:10.1/x", "study:7")),
        study("b", "validation", source="other", patient_id="1", documents=("doi:10.1/x", "study:7")),
    ]
    report = find_leaks(records, by_source=True)
    assert dict(report.sizes) == {"other: validation": 1, "own: train": 1}
    assert report.of("patient", "own: train", "other: validation").shared == 0
    assert report.of("document", "own: train", "other: validation").shared == 1


def test_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="patient, document, image, got 'doctor'"):
        study_marks(RECORDS[0], by=("doctor",))


@pytest.mark.realdata
def test_published_split_of_cov_ctr_leaks_and_the_fair_one_does_not(data_root: Path) -> None:
    records = list(open_set(data_root / "cov_ctr"))
    hashes = hash_records(records, progress=False)
    published = find_leaks([record for record in records if record.split in ("train", "validation")], hashes=hashes)
    assert dict(published.sizes) == {"train": 576, "validation": 72}
    for kind in ("patient", "document", "image", "group"):
        assert published.of(kind, "train", "validation").shared > 0, kind
    assert "LEAK" in published.summary()
    fair = find_leaks(records, read_split(fair_split_file("cov_ctr")), hashes)
    assert sum(fair.sizes.values()) == 674
    assert fair.is_clean
