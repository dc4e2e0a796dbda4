# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
import json
from dataclasses import replace

import pyarrow.parquet as parquet
import pytest

from m3fm.data.convert import convert_set
from m3fm.data.opening import open_set
from m3fm.data.pseudonyms import Pseudonyms
from m3fm.data.schema import ImageFile, StudyRecord
from m3fm.data.splits import SplitDocument
from m3fm.data.stored_images import ImageStore
from tests.dicom_files import SECRET, dicom_bytes, radiograph
from tests.phantoms import radiograph_pixels
from tests.study_sets import made_records, opened


@pytest.fixture
def records(tmp_path):
    return made_records(tmp_path / "images")


def without_images(record):
    return replace(record, images=())


def test_every_study_comes_back_with_its_image_files(tmp_path, records):
    facts = convert_set(opened(records), tmp_path / "out")
    assert facts["studies"] == {"train": 4, "validation": 2, "unsplit": 1}
    assert facts["languages"] == {"en": 7, "zh": 7}
    assert facts["modalities"] == {"cxr": 7}
    assert facts["complete"] is True
    back = {record.study_id: record for record in open_set(tmp_path / "out")}
    assert len(back) == 7
    for record in records:
        read = back[record.study_id]
        assert without_images(read) == without_images(record)
        assert [each.view for each in read.images] == [each.view for each in record.images]
        assert [each.read() for each in read.images] == [each.path.read_bytes() for each in record.images]
        assert [each.path.name for each in read.images] == [each.path.name for each in record.images]


def test_images_are_read_from_a_shard_when_they_are_asked_for(tmp_path, records):
    convert_set(opened(records), tmp_path / "out")
    for record in open_set(tmp_path / "out", images="unchecked"):
        original = next(each for each in records if each.study_id == record.study_id)
        for stored, file in zip(record.images, original.images, strict=True):
            assert not isinstance(stored.data, bytes)
            assert stored.read() == file.path.read_bytes()


def test_paths_are_absolute_and_stay_files(tmp_path, records, monkeypatch):
    monkeypatch.chdir(tmp_path)
    relative = [
        replace(record, images=tuple(replace(each, path=each.path.relative_to(tmp_path)) for each in record.images))
        for record in records
    ]
    convert_set(opened(relative), tmp_path / "out", ImageStore("paths"))
    for mode in ("required", "unchecked"):
        back = {record.study_id: record for record in open_set(tmp_path / "out", images=mode)}
        assert [back[record.study_id].images for record in records] == [record.images for record in records]


def test_load_dataset_reads_the_shards_by_part(tmp_path, records):
    from datasets import load_dataset

    convert_set(opened(records), tmp_path / "out")
    parts = load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    assert {part: len(rows) for part, rows in parts.items()} == {"train": 4, "validation": 2, "unsplit": 1}
    assert parts["validation"][0]["report_zh"] == "报告2。"
    states = parts["validation"].features["labels"].feature["state"]
    assert states.int2str(parts["validation"][0]["labels"][0]["state"]) == "uncertain"


def test_shards_are_as_large_as_asked(tmp_path, records):
    facts = convert_set(opened(records), tmp_path / "out", shard_bytes=1)
    assert [shard["rows"] for shard in facts["shards"]] == [1] * 7
    assert sorted(path.name for path in (tmp_path / "out/data").iterdir()) == sorted(
        [f"train-0000{n}.parquet" for n in range(4)]
        + [f"validation-0000{n}.parquet" for n in range(2)]
        + ["unsplit-00000.parquet"]
    )


class StoreThatStops(ImageStore):
    """Is killed at the study whose number is given."""

    stops_at = 5

    def __call__(self, record):
        if record.study_id == f"study-{self.stops_at}":
            raise KeyboardInterrupt
        return super().__call__(record)


def test_a_stopped_run_goes_on_and_ends_as_if_it_had_not_stopped(tmp_path, records):
    whole = convert_set(opened(records), tmp_path / "whole", shard_bytes=1)
    with pytest.raises(KeyboardInterrupt):
        convert_set(opened(records), tmp_path / "out", StoreThatStops(), shard_bytes=1)
    with pytest.raises(ValueError, match="was not finished; run it again"):
        list(open_set(tmp_path / "out"))
    first = (tmp_path / "out/data/train-00000.parquet").stat().st_mtime_ns
    assert convert_set(opened(records), tmp_path / "out", shard_bytes=1) == whole
    assert (tmp_path / "out/data/train-00000.parquet").stat().st_mtime_ns == first
    assert list(open_set(tmp_path / "out")) == list(open_set(tmp_path / "whole"))
    assert not list((tmp_path / "out/data").glob("*.tmp"))


def test_a_stopped_run_of_a_set_that_changed_is_refused(tmp_path, records):
    with pytest.raises(KeyboardInterrupt):
        convert_set(opened(records), tmp_path / "out", StoreThatStops(), shard_bytes=1)
    changed = [replace(records[0], study_id="another"), *records[1:]]
    with pytest.raises(ValueError, match="the set has changed since this run was stopped"):
        convert_set(opened(changed), tmp_path / "out", shard_bytes=1)
    with pytest.raises(ValueError, match="fewer studies than when this run was stopped"):
        convert_set(opened(records[:1]), tmp_path / "out", shard_bytes=1)
    with pytest.raises(ValueError, match="holds a conversion with other settings"):
        convert_set(opened(records), tmp_path / "out", ImageStore(size=64))
    convert_set(opened(changed), tmp_path / "out", resume=False)
    assert {record.study_id for record in open_set(tmp_path / "out")} == {record.study_id for record in changed}


def test_a_folder_of_something_else_is_left_alone(tmp_path, records):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("mine")
    for resume in (True, False):
        with pytest.raises(ValueError, match="expected a new or empty folder"):
            convert_set(opened(records), tmp_path / "out", resume=resume)
    assert (tmp_path / "out/thesis.txt").read_text() == "mine"


def test_a_study_that_cannot_be_stored_is_told_of_and_costs_no_other(tmp_path, records):
    records[3].images[0].path.unlink()
    with pytest.raises(ValueError, match="cannot be stored"):
        convert_set(opened(records), tmp_path / "raised")
    with pytest.raises(ValueError, match="cannot be stored") as caught:
        convert_set(opened(records), tmp_path / "raised", resume=False)
    assert "study-3" not in str(caught.value)
    source = opened(records, on_bad="skip")
    facts = convert_set(source, tmp_path / "out", shard_bytes=1)
    assert sum(facts["studies"].values()) == 6
    assert list(facts["bad_rows"].values()) == [1]
    assert source.reading.counts.total() == 1
    assert {record.study_id for record in open_set(tmp_path / "out")} == {f"study-{n}" for n in (0, 1, 2, 4, 5, 6)}
    # The same run once more counts the same, though one of its studies is in no shard.
    again = convert_set(opened(records, on_bad="skip"), tmp_path / "out", shard_bytes=1)
    assert again["shards"] == facts["shards"]


def test_workers_change_nothing(tmp_path, records):
    alone = convert_set(opened(records), tmp_path / "alone")
    assert convert_set(opened(records), tmp_path / "helped", num_workers=2) == alone
    assert list(open_set(tmp_path / "helped")) == list(open_set(tmp_path / "alone"))


def test_parts_of_a_split_replace_those_of_the_set(tmp_path, records):
    ids = [record.study_id for record in records]
    split = SplitDocument("made_up", {"test": ids[:2], "train": ids[2:]}, {})
    facts = convert_set(opened(records), tmp_path / "out", parts=split)
    assert facts["studies"] == {"test": 2, "train": 5}
    assert {record.study_id: record.split for record in open_set(tmp_path / "out")} == dict(split)
    another = SplitDocument("made_up", {"test": ids[:2], "train": ids[2:5]}, {})
    with pytest.raises(ValueError, match="split"):
        convert_set(opened(records), tmp_path / "raised", parts=another)
    facts = convert_set(opened(records, on_bad="skip"), tmp_path / "skipped", parts=another)
    assert facts["studies"] == {"test": 2, "train": 3}


def test_pseudonyms_leave_no_id_in_the_output(tmp_path, records):
    names = Pseudonyms(bytes(range(32)))
    convert_set(opened(records), tmp_path / "out", pseudonyms=names)
    rows = [row for path in (tmp_path / "out/data").iterdir() for row in parquet.read_table(path).to_pylist()]
    content = f"{rows} {(tmp_path / 'out/README.md').read_text()} {(tmp_path / 'out/m3fm.json').read_text()}"
    assert len(rows) == 7
    for secret in ("DOE", "study-", "patient-", "10.1/"):
        assert secret not in content
    back = list(open_set(tmp_path / "out"))
    assert {record.study_id for record in back} == {names.of("study", record.study_id) for record in records}
    assert [each.read() for record in back for each in record.images]
    with pytest.raises(ValueError, match="pseudonyms need images='bytes'"):
        convert_set(opened(records), tmp_path / "paths", ImageStore("paths"), pseudonyms=names)


def test_a_run_with_pseudonyms_goes_on(tmp_path, records):
    names = Pseudonyms(bytes(range(32)))
    with pytest.raises(KeyboardInterrupt):
        convert_set(opened(records), tmp_path / "out", StoreThatStops(), pseudonyms=names, shard_bytes=1)
    facts = convert_set(opened(records), tmp_path / "out", pseudonyms=names, shard_bytes=1)
    assert sum(facts["studies"].values()) == 7
    assert convert_set(opened(records), tmp_path / "out", pseudonyms=names, shard_bytes=1) == facts


def test_an_image_that_cannot_be_read_is_told_without_its_name_where_names_are_replaced(tmp_path, records, capsys):
    records[3].images[0].path.write_bytes(b"<html>")
    source = opened(records, on_bad="skip")
    facts = convert_set(source, tmp_path / "out", pseudonyms=Pseudonyms(bytes(range(32))))
    assert facts["bad_rows"] == {"unreadable_image": 1}
    assert "study number 4" in source.reading.summary()
    assert "DOE" not in source.reading.summary() + (tmp_path / "out/README.md").read_text() + capsys.readouterr().err


def test_a_study_is_told_by_the_same_number_in_a_run_that_goes_on(tmp_path, records):
    with pytest.raises(KeyboardInterrupt):
        convert_set(opened(records), tmp_path / "out", StoreThatStops(), shard_bytes=1)
    records[6].images[0].path.write_bytes(b"<html>")
    for workers in (0, 2):
        source = opened(records, on_bad="skip")
        convert_set(source, tmp_path / "out", shard_bytes=1, num_workers=workers, resume=workers == 0)
        assert "study number 7, in the order of the set" in source.reading.summary()


def test_dicom_in_a_shard_loses_its_header_too(tmp_path):
    data = dicom_bytes(radiograph(radiograph_pixels(1)))
    record = StudyRecord("a", "made_up", "cxr", images=(ImageFile(None, data),))
    convert_set(opened([record]), tmp_path / "out")
    (back,) = open_set(tmp_path / "out")
    assert SECRET.encode() in data
    assert back.images[0].read().startswith(b"\x89PNG")


def test_a_study_that_comes_again_is_told_of(tmp_path, records):
    with pytest.raises(ValueError, match="study number 8, in the order of the set, has the id of an earlier one"):
        convert_set(opened([*records, records[2]]), tmp_path / "raised")
    facts = convert_set(opened([*records, records[2]], on_bad="skip"), tmp_path / "out")
    assert facts["bad_rows"] == {"duplicate_id": 1}
    assert len(list(open_set(tmp_path / "out"))) == 7


def test_the_input_is_never_the_output(tmp_path, records):
    convert_set(opened(records), tmp_path / "out")
    for place in (tmp_path / "out", tmp_path):
        with pytest.raises(ValueError, match="expected a folder apart from the set that is read"):
            convert_set(open_set(tmp_path / "out"), place, resume=False)
    assert len(list(open_set(tmp_path / "out"))) == 7


def test_a_shard_that_was_taken_away_is_written_again(tmp_path, records):
    whole = convert_set(opened(records), tmp_path / "out", shard_bytes=1)
    (tmp_path / "out/data/train-00001.parquet").unlink()
    again = convert_set(opened(records), tmp_path / "out", shard_bytes=1)
    assert sorted(again["shards"], key=str) == sorted(whole["shards"], key=str)
    assert len(list(open_set(tmp_path / "out"))) == 7


def test_a_damaged_manifest_is_named(tmp_path, records):
    convert_set(opened(records), tmp_path / "out")
    for content in ("[]", '{"shards": ['):
        (tmp_path / "out/m3fm.json").write_text(content)
        with pytest.raises(ValueError, match=r"m3fm\.json: expected what m3fm data convert writes"):
            list(open_set(tmp_path / "out"))


def test_parts_whose_names_datasets_keeps_for_itself(tmp_path, records):
    from datasets import load_dataset

    convert_set(opened([replace(record, split="all") for record in records]), tmp_path / "out")
    assert list(load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))) == ["part_all"]
    assert {record.split for record in open_set(tmp_path / "out")} == {"all"}


def test_nothing_but_unreadable_images_is_an_error(tmp_path, records):
    for record in records:
        for image in record.images:
            image.path.unlink()
    with pytest.raises(ValueError, match="no study to convert"):
        convert_set(opened(records, on_bad="skip"), tmp_path / "out")


def test_the_card_says_what_it_is_and_under_what_terms(tmp_path, records):
    convert_set(opened(records), tmp_path / "out", ImageStore(size=64))
    card = (tmp_path / "out/README.md").read_text(encoding="utf-8")
    for said in ("A made-up set", "CC BY 4.0", "Doe 2026", "For research only", "| train | 4 |", "at most 64 pixels"):
        assert said in card
    manifest = json.loads((tmp_path / "out/m3fm.json").read_text())
    assert str(tmp_path) not in json.dumps(manifest) + card


def test_no_study_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no study to convert"):
        convert_set(opened([]), tmp_path / "out")


def test_options_out_of_range(tmp_path, records):
    with pytest.raises(ValueError, match="shard_bytes must be at least 1, got 0"):
        convert_set(opened(records), tmp_path / "out", shard_bytes=0)
    for arguments, message in (
        ({"mode": "tapes"}, "images must be one of"),
        ({"size": 8}, "at least 32 pixels"),
        ({"mode": "paths", "size": 64}, "goes with images='bytes'"),
    ):
        with pytest.raises(ValueError, match=message):
            ImageStore(**arguments)
