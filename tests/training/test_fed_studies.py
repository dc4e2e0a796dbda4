# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Studies of every form become the same, keep what is uncertain, and give the same images each time."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from m3fm.data import Study
from m3fm.data.schema import ImageFile, LabelState, ReportText, StudyRecord, features
from m3fm.training.fed_studies import Draw, FedStudy, chosen_images, fed_study, finding_targets, opened

RECORD = StudyRecord(
    study_id="s1",
    source="set",
    modality="cxr",
    images=(ImageFile(Path("a.png"), None, "PA"), ImageFile(Path("b.png"), b"\x89PNG", "LATERAL")),
    reports={"en": ReportText("Clear lungs.", raw="raw"), "zh": ReportText("双肺清晰。")},
    findings={
        "edema": LabelState.POSITIVE,
        "nodule": LabelState.NEGATIVE,
        "pneumonia": LabelState.UNCERTAIN,
        "mass": LabelState.UNMENTIONED,
    },
)


def test_records_and_rows_become_the_same():
    datasets = pytest.importorskip("datasets")
    fed = fed_study(RECORD)
    assert fed == fed_study(RECORD.as_row())
    assert fed == fed_study(datasets.Dataset.from_list([RECORD.as_row()], features=features())[0])
    assert fed == FedStudy(
        "set/s1",
        "cxr",
        (Path("a.png"), {"bytes": b"\x89PNG", "path": "b.png"}),
        ("PA", "LATERAL"),
        {"en": "Clear lungs.", "zh": "双肺清晰。"},
        {"edema": 1.0, "nodule": 0.0, "pneumonia": -1.0},
    )


def test_studies_bring_paths_and_certain_findings():
    study = Study("s1", "set", "ct", (Path("a.nii"), b"bytes"), None, {"en": "Clear."}, {"edema": 1.0}, None)
    fed = fed_study(study)
    assert (fed.key, fed.modality, fed.images) == ("set/s1", "ct", (Path("a.nii"), b"bytes"))
    assert fed.findings == {"edema": 1.0}
    assert fed_study(Study("s1", "set", "ct", (), None, {}, None, None)).findings == {}


def test_ids_stay_out_of_what_is_shown():
    assert "s1" not in repr(fed_study(RECORD))
    assert "Clear" not in repr(fed_study(RECORD))


def test_rows_without_the_needed_columns_say_what_took_them():
    with pytest.raises(ValueError, match="without study_id, source, modality.*remove_unused_columns=False"):
        fed_study({"images": []})
    with pytest.raises(ValueError, match="got int"):
        fed_study(3)


def test_bytes_in_a_shard_are_read_when_they_are_needed():
    @dataclass
    class Stored:
        reads: int = 0

        def read(self) -> bytes:
            self.reads += 1
            return b"content"

    stored = Stored()
    record = StudyRecord("s", "set", "cxr", images=(ImageFile(Path("a.png"), stored),))
    fed = fed_study(record)
    assert stored.reads == 0
    assert opened(fed.images[0]) == {"bytes": b"content", "path": "a.png"}
    assert opened(stored) == b"content"
    assert opened(Path("a.png")) == Path("a.png")


@pytest.mark.parametrize(
    ("policy", "pneumonia", "known"),
    [("ignore", 0, False), ("positive", 1, True), ("negative", 0, True), ("half", 0.5, True)],
)
def test_uncertain_findings_follow_the_policy(policy, pneumonia, known):
    values, knows = finding_targets([fed_study(RECORD)], ["nodule", "pneumonia", "mass", "edema"], policy)
    assert values.dtype == np.float32
    assert values.tolist() == [[0, pneumonia, 0, 1]]
    assert knows.tolist() == [[True, known, False, True]]


def views(*names: str | None) -> FedStudy:
    return FedStudy("k", "cxr", tuple(f"{place}.png" for place in range(len(names))), names, {}, {})


def test_frontal_views_are_kept_first_in_the_order_of_the_study():
    study = views(None, "LATERAL", "AP", "PA", "PA")
    assert chosen_images(study, 5, 8) == study.images
    assert chosen_images(study, 2, 8) == ("3.png", "4.png")
    assert chosen_images(study, 3, 8) == ("2.png", "3.png", "4.png")
    assert chosen_images(study, 4, 8) == ("1.png", "2.png", "3.png", "4.png")
    assert chosen_images(views(None, None, None), 2, 8) == ("0.png", "1.png")


def test_picture_slices_are_spread_and_others_left_to_the_processor(tmp_path):
    paths = tuple(tmp_path / f"{place:02}.png" for place in range(20))
    for path in paths:
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(32))
    study = FedStudy("k", "ct", paths, (None,) * 20, {}, {})
    assert chosen_images(study, 1, 4) == tuple(paths[place] for place in (4, 8, 12, 16))
    assert chosen_images(study, 1, 20) == paths
    volume = FedStudy("k", "ct", ("a.nii.gz", "b.nii.gz"), (None,) * 2, {}, {})
    assert chosen_images(volume, 1, 1) == volume.images


def test_draws_hang_on_purpose_seed_epoch_and_study():
    numbers = {
        Draw(seed, epoch).generator(purpose, key).integers(2**60)
        for seed in (0, 1)
        for epoch in (0, 1)
        for purpose in ("a", "b")
        for key in ("x", "y")
    }
    assert len(numbers) == 16
    assert Draw(0, 0).generator("a", "x").integers(2**60) in numbers
