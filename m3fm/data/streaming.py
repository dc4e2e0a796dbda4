# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Streams of a large set for one rank of a training run."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import datasets

__all__ = ["stream_for_rank"]


def stream_for_rank(
    dataset: datasets.IterableDataset,
    rank: int,
    world_size: int,
    seed: int,
    epoch: int,
    buffer: int = 1_000,
) -> datasets.IterableDataset:
    """Shuffle a stream, and give one rank its part of it; the parts of all ranks together are the stream.

    The order of the shards is drawn by seed and epoch, and rows are drawn from a buffer that one shard after another
    fills. With at least one shard a rank, each rank reads its own shards and nothing else; with fewer, every rank
    reads all rows and takes each `world_size`-th. Workers of a `DataLoader` part the shards of their rank among them,
    so that no more workers than those have work. Ranks may have unequal numbers of rows: train for a number of steps.

    Args:
        dataset: As `datasets.load_dataset(..., streaming=True)` or `open_set(...).stream()` gives it.
        rank: Of this process.
        world_size: Of the run.
        seed: Of the run, the same on all ranks.
        epoch: Its order is another in each epoch, and the same each time one is asked for.
        buffer: Rows that are held in memory to be drawn from.

    Raises:
        ImportError: If `datasets` is not installed.
        ValueError: If rank or buffer is out of range.
    """
    try:
        from datasets.distributed import split_dataset_by_node
    except ImportError:
        raise ImportError('streams need the package datasets: pip install "m3fm[data]"') from None
    if not 0 <= rank < world_size or buffer < 1:
        raise ValueError(f"expected 0 <= rank < world_size and buffer >= 1, got {rank}, {world_size} and {buffer}")
    # From ten shards at once, as is the default: ten row groups of images in memory, a thread for each, and five
    # seconds of waiting for those threads at the end.
    shuffled = dataset.shuffle(seed=seed, buffer_size=buffer, max_buffer_input_shards=1)
    strategy = "shards" if dataset.num_shards >= world_size else "examples"
    part = split_dataset_by_node(shuffled, rank=rank, world_size=world_size, strategy=strategy)
    part.set_epoch(epoch)  # the split stream would not take over that of the whole
    return part
