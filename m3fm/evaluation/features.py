# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Embed studies batch by batch, each batch kept on disk, so that a stopped run does not embed them again."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file
from tqdm.auto import tqdm

# One file holds this many items: small enough to lose little, large enough that a million items are few files.
SHARD_SIZE = 256


def embed_resumably(
    embed: Callable[[Sequence[Any]], dict[str, np.ndarray]],
    items: Sequence[Any],
    folder: Path,
    name: str,
    batch_size: int,
) -> dict[str, np.ndarray]:
    """Runs `embed` over items in batches, with a progress bar; shards already in `folder` are read instead.

    Args:
        embed: Takes a batch, returns arrays (B, ...) by name.
        items: What to embed. The folder must belong to these items and this model (`open_output` sees to that).
        folder: Made if missing.
        name: Of the shards, and of the progress bar.
        batch_size: Items at once.

    Returns:
        Arrays (len(items), ...) by name.

    Raises:
        ValueError: Without items, or if a shard on disk does not fit them.
    """
    if not items or batch_size < 1:
        raise ValueError(f"Expected items and batch_size >= 1, got {len(items)} items and batch_size {batch_size}.")
    folder.mkdir(parents=True, exist_ok=True)
    shards = []
    with tqdm(total=len(items), desc=name.replace("_", " "), unit="item") as bar:
        for start in range(0, len(items), SHARD_SIZE):
            wanted = items[start : start + SHARD_SIZE]
            path = folder / f"{name}-{start:09d}.safetensors"
            if path.is_file():
                shard = _read_shard(path, len(wanted))
                bar.update(len(wanted))
            else:
                shard = _embed_shard(embed, wanted, batch_size, bar)
                draft = path.with_suffix(".tmp")
                save_file(shard, draft)
                os.replace(draft, path)
            shards.append(shard)
    return {key: np.concatenate([shard[key] for shard in shards]) for key in shards[0]}


def _embed_shard(
    embed: Callable[[Sequence[Any]], dict[str, np.ndarray]], items: Sequence[Any], batch_size: int, bar: tqdm
) -> dict[str, np.ndarray]:
    parts = []
    for start in range(0, len(items), batch_size):
        batch = items[start : start + batch_size]
        parts.append(embed(batch))
        bar.update(len(batch))
    return {key: np.ascontiguousarray(np.concatenate([part[key] for part in parts])) for key in parts[0]}


def _read_shard(path: Path, num_items: int) -> dict[str, np.ndarray]:
    try:
        shard = load_file(path)
    except Exception as error:  # safetensors raises its own kind
        raise ValueError(f"{path} is damaged ({error}): delete it to compute it again.") from None
    if {len(values) for values in shard.values()} != {num_items}:
        raise ValueError(f"{path} does not hold {num_items} items: expected the features of this run; delete it.")
    return shard
