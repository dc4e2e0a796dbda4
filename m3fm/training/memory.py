# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""The support memory of stage 2: embeddings of training texts that carry an image embedding to the side of texts.

Letters in shapes: L languages, M entries a language, R texts of one language, D width of the shared space.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch.nn.functional import normalize

from ..configuration_m3fm import M3FMConfig
from ..modeling_m3fm import M3FMForReportGeneration
from .text_bank import TextBank

__all__ = ["METHODS", "MemoryBlock", "build_memory", "check_memory", "set_memory", "spherical_kmeans"]

METHODS = ("sampled", "kmeans", "medoids")
# As many texts an entry are enough to place it, and more are not looked at (faiss, Clustering.h, does the same).
_MOST_TEXTS_AN_ENTRY = 256
_ITERATIONS = 25
_ROWS_AT_ONCE = 8192


@dataclass
class MemoryBlock:
    """How the support memory is made; in a recipe, the block `memory:`.

    Args:
        method: "sampled": embeddings of texts, drawn without repeats; "kmeans": centres of all texts; "medoids": the
            text nearest to each centre.
        size: M; None: the config's `support_memory_size`. 0 keeps no memory.
        sets: Sets whose texts are taken, in equal shares; empty: all of `text_sets`.
    """

    method: str = "sampled"
    size: int | None = None
    sets: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"memory.method: got {self.method!r}, expected one of {list(METHODS)}.")
        if self.size is not None and self.size < 0:
            raise ValueError(f"memory.size: got {self.size}, expected 0 or more.")

    def sized(self, config: M3FMConfig) -> "MemoryBlock":
        """Returns the block with a size: its own, or that of the config."""
        return replace(self, size=config.support_memory_size if self.size is None else self.size)


def build_memory(bank: TextBank, languages: Sequence[str], block: MemoryBlock, seed: int) -> torch.Tensor:
    """Makes the support memory of embedded texts, the same for the same seed.

    Sets have equal shares: of what is drawn, and of the weight by which texts pull the centres.

    Args:
        bank: Embedded texts.
        languages: L of them, in the order of the model's config.
        block: With a size.
        seed: Of the draws.

    Returns:
        (L, M, D) float32, unit norm.

    Raises:
        ValueError: If a set is none of the bank's, or a language has fewer texts than entries.
    """
    check_memory(bank, languages, block)
    if not block.size:
        return torch.zeros(len(languages), 0, bank.embeds.shape[-1])
    memory = []
    for number, language in enumerate(languages):
        pools = [np.array(rows, dtype=np.int64) for rows in _pools(bank, language, block)]
        rng = np.random.default_rng([seed, number])
        drawn = _drawn(pools, block.size, rng)
        if block.method == "sampled":
            memory.append(bank.embeds[drawn].float())
            continue
        rows, weights = _weighted(pools, block.size * _MOST_TEXTS_AN_ENTRY, rng)
        texts = normalize(bank.embeds[rows].float(), dim=-1)
        centres = spherical_kmeans(texts, weights, texts[_spread(texts, weights, block.size, rng)])
        memory.append(_medoids(texts, centres) if block.method == "medoids" else centres)
    return normalize(torch.stack(memory), dim=-1)


def check_memory(bank: TextBank, languages: Sequence[str], block: MemoryBlock) -> None:
    """Refuses a memory that the texts of a bank do not suffice for; they need not be embedded yet.

    Raises:
        ValueError: As `build_memory`.
    """
    if not block.size:
        return
    known = list(dict.fromkeys(name for name, _ in bank.rows_of))
    unknown = sorted(set(block.sets) - set(known))
    if unknown:
        raise ValueError(f"memory.sets: got {unknown}, expected some of {known}, whose texts are learned.")
    for language in languages:
        _equal_shares([len(rows) for rows in _pools(bank, language, block)], block.size)


def set_memory(model: M3FMForReportGeneration, memory: torch.Tensor) -> None:
    """Gives a model a support memory (L, M, D) of any size M."""
    model.config.support_memory_size = memory.shape[1]
    model.support_memory = torch.zeros_like(memory, dtype=model.dtype, device=model.device)
    model.set_support_memory(memory)


def spherical_kmeans(texts: torch.Tensor, weights: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """Finds centres of unit vectors by cosine (Dhillon and Modha, Machine Learning 42, 2001), each text with a weight.

    A centre that no text is nearest to is put where the text stands that is farthest from its own.

    Args:
        texts: (R, D), unit norm.
        weights: (R,), positive.
        starts: (M, D), unit norm, M <= R.

    Returns:
        (M, D), unit norm.
    """
    centres, nearest = starts.clone(), None
    for _ in range(_ITERATIONS):
        similarity, assigned = _nearest(texts, centres)
        if nearest is not None and torch.equal(assigned, nearest):
            break
        nearest = assigned
        sums = torch.zeros_like(centres).index_add_(0, nearest, texts * weights[:, None].to(texts.dtype))
        empty = (torch.bincount(nearest, minlength=len(centres)) == 0).nonzero()[:, 0]
        sums[empty] = texts[similarity.argsort(stable=True)[: len(empty)]]
        centres = normalize(sums, dim=-1)
    return centres


def _pools(bank: TextBank, language: str, block: MemoryBlock) -> list[list[int]]:
    """Returns the rows of the texts of each set in a language."""
    names = block.sets or dict.fromkeys(name for name, _ in bank.rows_of)
    return [bank.rows_of.get((name, language), []) for name in names]


def _nearest(texts: torch.Tensor, centres: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the cosine with the nearest centre, and its number, of each text: (R,) both."""
    best = [(part @ centres.t()).max(dim=-1) for part in texts.split(_ROWS_AT_ONCE)]
    return torch.cat([each.values for each in best]), torch.cat([each.indices for each in best])


def _medoids(texts: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """Returns of each centre the nearest of its own texts (M, D); a centre without a text stays."""
    similarity, nearest = _nearest(texts, centres)
    order = similarity.argsort(stable=True)
    # Of the texts of one centre the nearest comes last.
    place = torch.full((len(centres),), -1).scatter_reduce(0, nearest[order], torch.arange(len(order)), "amax")
    own = place >= 0
    medoids = centres.clone()
    medoids[own] = texts[order[place[own]]]
    return medoids


def _drawn(pools: Sequence[np.ndarray], size: int, rng: np.random.Generator) -> np.ndarray:
    """Draws `size` rows without repeats, in equal shares of the pools."""
    shares = _equal_shares([len(pool) for pool in pools], size)
    return np.concatenate([rng.permutation(pool)[:share] for pool, share in zip(pools, shares, strict=True)])


def _weighted(pools: Sequence[np.ndarray], most: int, rng: np.random.Generator) -> tuple[np.ndarray, torch.Tensor]:
    """Returns about `most` rows of all pools at most, with weights by which the pools pull alike."""
    kept = [rng.permutation(pool)[: -(-most // len(pools))] for pool in pools if len(pool)]
    weights = [np.full(len(pool), 1 / len(pool), dtype=np.float32) for pool in kept]
    return np.concatenate(kept), torch.from_numpy(np.concatenate(weights))


def _spread(texts: torch.Tensor, weights: torch.Tensor, size: int, rng: np.random.Generator) -> list[int]:
    """Chooses `size` rows that lie apart from each other (k-means++: Arthur and Vassilvitskii, SODA 2007)."""
    chosen: list[int] = []
    distance = torch.ones(len(texts))
    for draw in rng.random(size):
        reach = (distance * weights).double()
        if not reach.any():  # the texts left are equal to chosen ones
            reach[chosen] = -1.0
            reach += 1.0
        ends = reach.cumsum(0)
        chosen.append(int(torch.searchsorted(ends, draw * ends[-1], right=True).clamp(max=len(texts) - 1)))
        distance = torch.minimum(distance, (1 - texts @ texts[chosen[-1]]).clamp(min=0))
        distance[chosen[-1]] = 0
    return chosen


def _equal_shares(available: list[int], size: int) -> list[int]:
    """Splits `size` evenly over pools; what a small pool cannot give the others do."""
    shares = [0] * len(available)
    for rank, pool in enumerate(sorted(range(len(available)), key=lambda i: available[i])):
        shares[pool] = min(available[pool], (size - sum(shares)) // (len(available) - rank))
    if sum(shares) < size:
        raise ValueError(
            f"Expected {size} texts a language for the support memory, the sets have {sum(available)}: choose a "
            "smaller size, or more sets."
        )
    return shares
