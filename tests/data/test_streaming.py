# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Streams: every row once among the ranks and their workers, in an order that seed and epoch say."""

from itertools import chain
from pathlib import Path

import pytest
from torch.utils.data import DataLoader

from m3fm.data.streaming import stream_for_rank

datasets = pytest.importorskip("datasets")


@pytest.fixture(scope="module")
def stream(tmp_path_factory) -> "datasets.IterableDataset":
    """Returns a stream over five Parquet shards of 10 to 14 rows, 60 in all."""
    folder = tmp_path_factory.mktemp("shards")
    start, files = 0, []
    for shard in range(5):
        rows = {"number": list(range(start, start + 10 + shard))}
        start += 10 + shard
        files.append(str(folder / f"{shard}.parquet"))
        datasets.Dataset.from_dict(rows).to_parquet(files[-1])
    cache = str(Path(folder) / "cache")
    return datasets.load_dataset("parquet", data_files=files, split="train", streaming=True, cache_dir=cache)


def numbers(stream, **options) -> list[int]:
    options = {"rank": 0, "world_size": 1, "seed": 1, "epoch": 0, "buffer": 8, **options}
    return [row["number"] for row in stream_for_rank(stream, **options)]


@pytest.mark.parametrize("world_size", [1, 2, 4, 5, 7])
def test_ranks_part_the_rows(stream, world_size):
    ranks = [numbers(stream, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert sorted(chain(*ranks)) == list(range(60))
    assert all(ranks)


def test_order_hangs_on_seed_and_epoch(stream):
    first = numbers(stream, epoch=1)
    assert first == numbers(stream, epoch=1)
    assert first != numbers(stream, epoch=2) and first != numbers(stream, epoch=1, seed=2)
    assert first != sorted(first)
    shards = [number // 12 for number in first[:8]]
    assert len(set(shards)) < 4  # one shard after another: no more of them are open


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 1, 2, 4])
def test_workers_part_the_shards_of_their_rank(stream, workers):
    found = []
    for rank in range(2):
        part = stream_for_rank(stream, rank, 2, seed=1, epoch=0, buffer=8)
        for batch in DataLoader(part, batch_size=4, num_workers=workers):
            found += batch["number"].tolist()
    assert sorted(found) == list(range(60))


def test_ranges_are_checked(stream):
    for wrong in ({"rank": 2, "world_size": 2}, {"buffer": 0}):
        with pytest.raises(ValueError, match="0 <= rank < world_size and buffer >= 1"):
            numbers(stream, **wrong)
