# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Which studies come in which batch: of like length, balanced over sets, the same after a restart, dealt to ranks.

The order of an epoch hangs on the seed and the epoch alone. A round is one batch for each rank; ranks take the same
number of batches, all of the same size, and no two of them the same study in an epoch but for what fills the last
round up (see `EpochBatches`).

Letters: N studies, R rounds of an epoch, W ranks, B studies of a batch.
"""

import hashlib
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import Sampler
from transformers import PreTrainedTokenizerBase

__all__ = [
    "BalancedDraws",
    "Draws",
    "EpochBatches",
    "EveryStudy",
    "LengthBucketSampler",
    "StepBuckets",
    "TrainerOrder",
    "count_tokens",
    "padding_share",
    "shared_epoch",
]

REMAINDERS = ("fill", "drop")
_TOKENIZED_AT_ONCE = 1024


class Draws(Protocol):
    """What an epoch is made of."""

    def draw(self, seed: int, epoch: int) -> np.ndarray:
        """Returns numbers of studies, in the order in which they are drawn; as many in every epoch."""

    def __len__(self) -> int: ...

    @property
    def fingerprint(self) -> str:
        """Tells these draws from others."""


class EveryStudy:
    """Draws each of `count` studies once an epoch."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    @property
    def fingerprint(self) -> str:
        """Tells these draws from others."""
        return f"every of {self.count}"

    def draw(self, seed: int, epoch: int) -> np.ndarray:
        """Returns a permutation, (N,)."""
        return np.random.default_rng([seed, epoch]).permutation(self.count)


class BalancedDraws:
    """Draws studies so that small groups (sets, modalities, languages) are seen more often than their share.

    A group of n studies makes up a share of an epoch in proportion to n ** (1 / temperature), as in multilingual
    pre-training (Conneau and Lample, NeurIPS 2019, section 3.1, whose alpha is 1 / temperature). Within a group all
    studies are gone through before one comes again, from epoch to epoch too.

    Args:
        groups: The group of each study, (N,).
        temperature: 1 keeps the shares as they are, infinity makes all groups equal.
        total: Draws of an epoch; None: as many as there are studies.

    Raises:
        ValueError: If there is no study, or the temperature is below 1.
    """

    def __init__(self, groups: Sequence[Hashable], temperature: float = 2.0, total: int | None = None):
        if not len(groups) or not temperature >= 1:
            raise ValueError(
                f"Expected groups of studies and temperature >= 1, got {len(groups)} and {temperature!r}."
            )
        names = list(dict.fromkeys(groups))
        numbers = {name: number for number, name in enumerate(names)}
        of_group = np.fromiter((numbers[group] for group in groups), dtype=np.int64, count=len(groups))
        self.members = [np.flatnonzero(of_group == number) for number in range(len(names))]
        self.total = len(groups) if total is None else total
        weights = np.array([len(each) for each in self.members]) ** (1 / temperature)
        self.counts = _whole_shares(weights / weights.sum(), self.total)
        #: Group to how many of its studies are drawn in an epoch.
        self.shares = dict(zip(names, self.counts.tolist(), strict=True))

    def __len__(self) -> int:
        return self.total

    @property
    def fingerprint(self) -> str:
        """Tells these draws from others."""
        return _digest(self.counts, *self.members)

    def draw(self, seed: int, epoch: int) -> np.ndarray:
        """Returns numbers of studies (total,), those of small groups several times."""
        drawn = [
            _cycled(members, int(count), seed, epoch, group)
            for group, (members, count) in enumerate(zip(self.members, self.counts, strict=True))
        ]
        return np.random.default_rng([seed, epoch]).permutation(np.concatenate(drawn))


class EpochBatches(Sampler[list[int]]):
    """Gives the batches of one rank: the `batch_sampler` of a `DataLoader`. Batches are random.

    Where the studies do not fill the last round, "fill" takes the missing ones from the beginning of the epoch's
    order, so that every study is in the epoch and fewer than W * B of them twice (more often, where there are fewer
    studies than that); "drop" leaves the last round out, and with it fewer than W * B studies, others in each epoch.

    With workers a `DataLoader` asks for batches before they are used: `m3fm.training.feed.ResumableLoader` knows how
    many were used.

    Args:
        draws: What an epoch is made of.
        batch_size: B.
        seed: Of the run.
        rank: Of this process.
        world_size: W.
        remainder: "fill" or "drop".

    Attributes:
        epoch: Of the batch that comes next.
        position: How many batches of it were given.

    Raises:
        ValueError: For an option out of range, or if there is not one batch for each rank.
    """

    def __init__(
        self,
        draws: Draws,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        remainder: str = "fill",
    ):
        if batch_size < 1 or not 0 <= rank < world_size:
            raise ValueError(
                f"Expected batch_size >= 1 and 0 <= rank < world_size, got {batch_size}, {rank} and {world_size}."
            )
        if remainder not in REMAINDERS:
            raise ValueError(f"remainder: got {remainder!r}, expected one of {list(REMAINDERS)}.")
        self.draws = draws
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.remainder = remainder
        self.epoch = 0
        self.position = 0
        if not len(draws) or not len(self):
            raise ValueError(
                f"Expected at least {batch_size * world_size} studies for one batch of each rank, got {len(draws)}: "
                "take smaller batches, or remainder='fill'."
            )

    def __len__(self) -> int:
        round_size = self.batch_size * self.world_size
        return len(self.draws) // round_size if self.remainder == "drop" else -(-len(self.draws) // round_size)

    def __iter__(self) -> Iterator[list[int]]:
        epoch, start = self.epoch, self.position
        for place, batch in enumerate(self.all_batches(epoch)[start:, self.rank], start=start + 1):
            self.epoch, self.position = (epoch, place) if place < len(self) else (epoch + 1, 0)
            yield batch.tolist()

    def all_batches(self, epoch: int) -> np.ndarray:
        """Returns the numbers of the studies in the batches of all ranks, (R, W, B)."""
        order = self.draws.draw(self.seed, epoch)
        missing = len(self) * self.batch_size * self.world_size - len(order)
        order = np.resize(order, len(order) + missing) if missing > 0 else order[: len(order) + missing]
        return self._rounds(order, np.random.default_rng([self.seed, epoch, 1]))

    def _rounds(self, order: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Makes rounds (R, W, B) of what is drawn, (R * W * B,)."""
        return order.reshape(-1, self.world_size, self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Goes to the beginning of an epoch; stays where it is if it is in that epoch already."""
        if epoch != self.epoch:
            self.epoch, self.position = epoch, 0

    def state_dict(self) -> dict[str, Any]:
        """Returns the place in the order, and what the order hangs on."""
        return {"epoch": self.epoch, "position": self.position, "order": self._order_facts()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on at the batch after the last one that was given.

        Raises:
            ValueError: If the state is of another order: other studies, seed, batch size or number of ranks.
        """
        ours, theirs = self._order_facts(), state["order"]
        changed = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
        if changed:
            told = ", ".join(f"{name} was {theirs.get(name)!r} and is {ours.get(name)!r}" for name in changed)
            raise ValueError(f"The state is of another order of batches: {told}.")
        self.epoch, self.position = state["epoch"], state["position"]

    def _order_facts(self) -> dict[str, Any]:
        return {
            "kind": type(self).__name__,
            "draws": self.draws.fingerprint,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "world_size": self.world_size,
            "remainder": self.remainder,
        }


class LengthBucketSampler(EpochBatches):
    """Gives batches of studies of like length, the batches in random order; the ranks' batches of a round are alike.

    What is drawn is parted into pools at random; each is sorted by length and cut into rounds.

    Args:
        lengths: Of each study, in tokens (see `count_tokens`), (N,).
        batch_size: B.
        seed: Of the run.
        rank: Of this process.
        world_size: W.
        remainder: See `EpochBatches`.
        draws: What an epoch is made of; None: every study once.
        pool: Rounds of a pool. More of them make lengths more alike, and batches less random.

    Raises:
        ValueError: As `EpochBatches`, or if there is not one length a study.
    """

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        remainder: str = "fill",
        draws: Draws | None = None,
        pool: int = 50,
    ):
        self.lengths = np.asarray(lengths)
        self.pool = pool
        if self.lengths.ndim != 1 or pool < 1:
            raise ValueError(f"Expected lengths (N,) and pool >= 1, got {self.lengths.shape} and {pool}.")
        super().__init__(draws or EveryStudy(len(self.lengths)), batch_size, seed, rank, world_size, remainder)

    def _rounds(self, order: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return rng.permutation(self._by_length(order))

    def _by_length(self, order: np.ndarray) -> np.ndarray:
        """Returns rounds (R, W, B) in which what is in one pool is sorted by length."""
        round_size = self.batch_size * self.world_size
        pool_size = round_size * self.pool
        pools = (order[start : start + pool_size] for start in range(0, len(order), pool_size))
        # Stable: studies of one length stay in the random order in which they were drawn.
        by_length = np.concatenate([pool[np.argsort(self.lengths[pool], kind="stable")] for pool in pools])
        return by_length.reshape(-1, self.world_size, self.batch_size)

    def _order_facts(self) -> dict[str, Any]:
        return super()._order_facts() | {"lengths": _digest(self.lengths), "pool": self.pool}


class StepBuckets(LengthBucketSampler):
    """Gives the micro-batches of steps whose studies are drawn at random, and parted by length within a step.

    A contrastive loss compares the studies of a step: were all of one length, they would be told apart by less. Within
    a step, which micro-batch a study is in makes no difference to the loss, and studies of like length waste no
    computation on padding.

    Args:
        lengths: Of each study, in tokens, (N,).
        batch_size: B, of a micro-batch.
        steps: Rounds of a step: `gradient_accumulation_steps`.
        seed: Of the run.
        world_size: W.
        draws: What an epoch is made of; None: every study once.
        remainder: See `EpochBatches`.

    Raises:
        ValueError: As `LengthBucketSampler`.
    """

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray,
        batch_size: int,
        steps: int = 1,
        seed: int = 0,
        world_size: int = 1,
        draws: Draws | None = None,
        remainder: str = "fill",
    ):
        super().__init__(lengths, batch_size, seed, 0, world_size, remainder, draws, pool=steps)

    def _rounds(self, order: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return self._by_length(order)


class TrainerOrder(Sampler[int]):
    """Gives the studies of all ranks one by one: what `Trainer._get_train_sampler` is to return.

    `Trainer` cuts them into batches and deals these to the ranks in turn, by which each rank comes to the batches that
    `EpochBatches` would give it.
    """

    def __init__(self, batches: EpochBatches):
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches) * self.batches.world_size * self.batches.batch_size

    def set_epoch(self, epoch: int) -> None:
        """Is told the epoch by Trainer."""
        self.batches.set_epoch(epoch)

    def __iter__(self) -> Iterator[int]:
        # Trainer passes over the batches of an epoch that were trained on before.
        for batches in self.batches.all_batches(self.batches.epoch):
            # A list of all of them would take five times the memory of the array.
            yield from batches.ravel().tolist()


def shared_epoch() -> torch.Tensor:
    """Returns epoch 0 in shared memory: workers that live longer than an epoch have to learn of the next."""
    return torch.zeros(1, dtype=torch.int64).share_memory_()


def count_tokens(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, cache: str | Path | None = None
) -> np.ndarray:
    """Counts the tokens of texts, (N,) int32.

    Args:
        texts: N of them.
        tokenizer: A fast one; texts are counted whole.
        cache: A folder in which the counts are kept, by tokenizer and texts: the next run does not count again.
    """
    backend = tokenizer.backend_tokenizer
    # As they are counted; what an earlier call left would be part of the cache's name.
    backend.no_truncation()
    backend.no_padding()
    path = None
    if cache is not None:
        digest = hashlib.sha256(backend.to_str().encode())
        for text in texts:
            digest.update(hashlib.sha256(text.encode()).digest())
        path = Path(cache) / f"tokens-{digest.hexdigest()[:16]}.npy"
        if path.is_file():
            return np.load(path, allow_pickle=False)
    counts = np.empty(len(texts), dtype=np.int32)
    for start in range(0, len(texts), _TOKENIZED_AT_ONCE):
        part = list(texts[start : start + _TOKENIZED_AT_ONCE])
        ids = tokenizer(part, truncation=False, padding=False)["input_ids"]
        counts[start : start + len(part)] = [len(each) for each in ids]
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".part")
        with open(partial, "wb") as file:
            np.save(file, counts, allow_pickle=False)
        partial.replace(path)
    return counts


def padding_share(lengths: Sequence[int] | np.ndarray, batches: np.ndarray) -> float:
    """Returns the share of a padded batch that is padding, over all of `batches` (..., B)."""
    of_batches = np.asarray(lengths)[batches]
    return float(1 - of_batches.sum() / (of_batches.max(axis=-1).sum() * of_batches.shape[-1]))


def _whole_shares(shares: np.ndarray, total: int) -> np.ndarray:
    """Splits `total` by shares that sum to 1 into whole numbers that sum to it, the largest remainders first."""
    counts = np.floor(shares * total).astype(np.int64)
    left = np.argsort(-(shares * total - counts), kind="stable")[: total - int(counts.sum())]
    counts[left] += 1
    return counts


def _cycled(members: np.ndarray, count: int, seed: int, epoch: int, group: int) -> np.ndarray:
    """Returns the `count` members that an epoch comes to, going through one random order after another."""
    start = epoch * count
    laps = range(start // len(members), (start + count - 1) // len(members) + 1) if count else range(0)
    orders = [np.random.default_rng([seed, group, lap, 2]).permutation(members) for lap in laps]
    gone_through = np.concatenate([*orders, members[:0]])
    begin = start - laps.start * len(members) if count else 0
    return gone_through[begin : begin + count]


def _digest(*arrays: np.ndarray) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array, dtype=np.int64).tobytes() + b"|")
    return digest.hexdigest()[:16]
