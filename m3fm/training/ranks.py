# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""The processes of one training run, of which there is one on a laptop: who they are, and what they tell each other.

Letters: W ranks, R rows of one rank, which may differ from rank to rank.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import distributed

__all__ = [
    "all_sum",
    "gather_rows",
    "is_main",
    "main_first",
    "own_rows",
    "rank",
    "refuse_data_parallel",
    "row_counts",
    "sum_own_rows",
    "wait_for_all",
    "world_size",
]


def world_size() -> int:
    """Returns how many processes train together."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """Returns the number of this process among them."""
    return distributed.get_rank() if world_size() > 1 else 0


def is_main() -> bool:
    """Tells whether this process writes what is written once."""
    return rank() == 0


def refuse_data_parallel(gpus: int) -> None:
    """Refuses several GPUs in one process, over which `Trainer` would spread each batch by `DataParallel`.

    Raises:
        ValueError: With how to start one process for each GPU.
    """
    if gpus > 1:
        raise ValueError(
            f"Expected one GPU for each process, got {gpus}: start it by `torchrun --nproc_per_node {gpus}`, or set "
            "CUDA_VISIBLE_DEVICES to one of them."
        )


def wait_for_all() -> None:
    """Returns when every rank has come here."""
    if world_size() > 1:
        distributed.barrier()


@contextmanager
def main_first() -> Iterator[None]:
    """Lets the main rank go through the block before the others: what it writes there, they find."""
    if not is_main():
        wait_for_all()
    try:
        yield
    finally:  # the others are not to wait for what failed
        if is_main():
            wait_for_all()


def gather_rows(values: torch.Tensor) -> torch.Tensor:
    """Returns the rows of all ranks in their order, (sum of R, ...), without gradient; R may differ, and be 0."""
    values = values.detach()
    if world_size() == 1:
        return values
    counts = row_counts(values)
    padded = values.new_zeros(max(counts), *values.shape[1:])
    padded[: len(values)] = values
    # Not every backend moves bool.
    moved = padded.to(torch.uint8) if padded.dtype == torch.bool else padded
    parts = [torch.empty_like(moved) for _ in counts]
    distributed.all_gather(parts, moved)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)]).to(values.dtype)


def own_rows(values: torch.Tensor) -> slice:
    """Returns where the rows of this rank stand in `gather_rows(values)`."""
    counts = row_counts(values)
    start = sum(counts[: rank()])
    return slice(start, start + len(values))


def sum_own_rows(values: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """Adds up what all ranks have to say of the rows of all ranks, and returns the sums of this rank's rows.

    Args:
        values: (sum of R, ...), in the order of `gather_rows`.
        own: (R, ...), any values of this rank: says which rows are its own.

    Returns:
        (R, ...).
    """
    if world_size() == 1:
        return values
    counts = row_counts(own)
    padded = values.new_zeros(len(counts), max(counts), *values.shape[1:])
    for place, part in enumerate(values.split(counts)):
        padded[place, : len(part)] = part
    summed = torch.empty_like(padded[0])
    distributed.reduce_scatter(summed, list(padded))
    return summed[: len(own)]


def all_sum(values: torch.Tensor) -> torch.Tensor:
    """Returns the sum over all ranks, without gradient."""
    total = values.detach().clone()
    if world_size() > 1:
        distributed.all_reduce(total)
    return total


def row_counts(values: torch.Tensor) -> list[int]:
    """Returns how many rows each rank has."""
    if world_size() == 1:
        return [len(values)]
    count = torch.tensor([len(values)], device=values.device)
    counts = [torch.empty_like(count) for _ in range(world_size())]
    distributed.all_gather(counts, count)
    return [int(each) for each in counts]
