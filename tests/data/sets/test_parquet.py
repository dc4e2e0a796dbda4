# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
import pickle

import datasets
import pyarrow
import pyarrow.parquet as parquet
import pytest

from m3fm.data.convert import convert_set
from m3fm.data.opening import open_set
from m3fm.data.schema import features
from m3fm.data.sets import find_set
from m3fm.data.stored_images import ImageStore
from m3fm.imaging_m3fm import read_image
from tests.study_sets import made_records, opened


@pytest.fixture
def records(tmp_path):
    return made_records(tmp_path / "images", 5)


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(rows, features=features()).to_parquet(path)


def with_bytes(record):
    row = record.as_row()
    row["images"] = [{"bytes": each.read(), "path": each.path.name} for each in record.images]
    return row


def test_shards_of_others_with_these_columns_are_read(tmp_path, records):
    rows = [with_bytes(record) for record in records]
    write(tmp_path / "set/data/train-00000-of-00002.parquet", rows[:3])
    write(tmp_path / "set/data/train-00001-of-00002.parquet", rows[3:])
    assert find_set(tmp_path / "set").name == "parquet"
    back = list(open_set(tmp_path / "set"))
    assert [record.study_id for record in back] == [record.study_id for record in records]
    assert back[3].images[1].read() == records[3].images[1].path.read_bytes()


def test_parquet_files_of_another_kind_are_not_taken_for_it(tmp_path):
    (tmp_path / "data").mkdir()
    parquet.write_table(pyarrow.table({"question": ["why"]}), tmp_path / "data/train.parquet")
    with pytest.raises(ValueError, match="none of the sets that can be read"):
        find_set(tmp_path)
    with pytest.raises(ValueError, match=r"expected the columns \['study_id', 'source', 'modality', 'images'\]"):
        list(open_set(tmp_path, "parquet"))


def test_an_image_in_a_shard_goes_to_a_worker_and_is_read_there(tmp_path, records):
    convert_set(opened(records), tmp_path / "out")
    record = next(iter(open_set(tmp_path / "out", images="unchecked")))
    source = pickle.loads(pickle.dumps(record.images[0].source))
    assert read_image(source).pixels.shape == (1, 96, 80)


def test_a_study_given_twice_is_bad(tmp_path, records):
    rows = [with_bytes(record) for record in records]
    write(tmp_path / "a.parquet", [*rows, rows[1]])
    with pytest.raises(ValueError, match=r"a\.parquet, line 6: the study of this row was already given"):
        list(open_set(tmp_path))
    skipping = open_set(tmp_path, on_bad="skip")
    assert len(list(skipping)) == 5
    assert dict(skipping.reading.counts) == {("a.parquet", "duplicate_id"): 1}


def test_a_path_that_leads_nowhere_is_bad(tmp_path, records):
    convert_set(opened(records), tmp_path / "out", ImageStore("paths"))
    records[2].images[0].path.unlink()
    opened_again = open_set(tmp_path / "out", on_bad="skip")
    assert len(list(opened_again)) == 4
    assert list(opened_again.reading.counts.values()) == [1]
    assert len(list(open_set(tmp_path / "out", images="unchecked"))) == 5


def test_a_damaged_shard_is_named(tmp_path, records):
    convert_set(opened(records), tmp_path / "out")
    shard = tmp_path / "out/data/train-00000.parquet"
    shard.write_bytes(shard.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"train-00000\.parquet: no Parquet file that can be read"):
        list(open_set(tmp_path / "out"))


def test_rows_stream(tmp_path, records):
    """Of a shard of several row groups no more than one is in memory."""
    rows = [with_bytes(record) for record in records]
    coded = [features().encode_example(row) for row in rows]
    table = pyarrow.Table.from_pylist(coded, schema=features().arrow_schema)
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    for mode in ("required", "unchecked"):
        back = list(open_set(tmp_path, images=mode))
        for record, original in zip(back, records, strict=True):
            assert [each.read() for each in record.images] == [each.path.read_bytes() for each in original.images]
