# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Find hashes that are close to each other among very many, without comparing all of them.

Letters: I items, V hashes of each (of the item and of cuts of it), W words of 64 bits.

Bands are locality-sensitive hashing for the Hamming distance (Indyk and Motwani, STOC 1998).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np

__all__ = ["Candidates", "candidates"]

# Bands of this many bits, drawn from the lowest frequencies (of 16 x 16): those that a crop or a turn changes least.
_BANDS, _BAND_BITS, _LOW = 32, 16, 10
_SIDE = 16
# Hashes that are looked up: the item without its border, and with it.
_LOOKED_UP = (0, -1)
# Comparisons at a time: few enough for the processor's cache.
_CHUNK = 1 << 18


@dataclass(frozen=True)
class Candidates:
    """Hold pairs of items with a close hash; arrays of one length.

    Attributes:
        first: Item.
        second: A later item.
        first_hash: Which of the hashes of the first item.
        second_hash: Which of the second.
        distance: Bits in which these differ.
    """

    first: np.ndarray
    second: np.ndarray
    first_hash: np.ndarray
    second_hash: np.ndarray
    distance: np.ndarray

    def take(self, which: np.ndarray | slice) -> Candidates:
        """Return some of the pairs."""
        return Candidates(*(values[which] for values in vars(self).values()))


def candidates(hashes: np.ndarray, turned: np.ndarray | None, max_distance: int) -> Candidates:
    """Find pairs of items of which one hash of the one is close to one of the other.

    Of items with the same first hash only the first is looked for among the others; each of them makes a pair with it.

    Args:
        hashes: (I, V, W) uint64.
        turned: The hashes of the mirrored items: pairs are then of an item and a mirrored one. None: of items as they
            are.
        max_distance: Bits in which two hashes may differ.

    Returns:
        Each pair once, by the two hashes that are closest.
    """
    count, views, words = hashes.shape
    _, firsts, group = np.unique(hashes[:, 0], axis=0, return_index=True, return_inverse=True)
    leader = firsts[group.reshape(-1)]  # the first item with the same hash
    kept = np.flatnonzero(leader == np.arange(count))
    known = np.concatenate([hashes[kept, view] for view in _LOOKED_UP])
    # An item without a border has one hash twice.
    is_new = np.ones(len(known), bool)
    is_new[len(kept) :] = (hashes[kept, 0] != hashes[kept, -1]).any(axis=1)
    places = np.tile(np.arange(len(kept)), len(_LOOKED_UP))[is_new]
    known_views = np.repeat(np.array(_LOOKED_UP) % views, len(kept))[is_new]
    asked = (hashes if turned is None else turned)[kept].reshape(-1, words)
    table = _Table(np.ascontiguousarray(known[is_new]))
    found = [np.empty((0, 5), np.int64)]
    for band in range(_BANDS):
        for known_row, asked_row, distance in table.matches(band, asked, max_distance):
            one, other = places[known_row], asked_row // views
            # The asked one is the mirrored one, which is to be the second.
            rows = np.stack([kept[one], kept[other], known_views[known_row], asked_row % views, distance], axis=1)
            found.append(_ordered(rows[one != other], may_swap=turned is None))
        if len(found) > 16:
            found = [_closest(np.concatenate(found), count)]
    if turned is None:
        copies = np.flatnonzero(leader != np.arange(count))
        zero = np.zeros_like(copies)
        found.append(np.stack([leader[copies], copies, zero, zero, zero], axis=1))
    return Candidates(*_closest(np.concatenate(found), count).T)


def _ordered(rows: np.ndarray, may_swap: bool) -> np.ndarray:
    """Put the earlier item first; of mirrored pairs, which are found both ways, keep the one."""
    late = rows[:, 0] > rows[:, 1]
    if not may_swap:
        return rows[~late]
    rows[late] = rows[late][:, [1, 0, 3, 2, 4]]
    return rows


def _closest(rows: np.ndarray, count: int) -> np.ndarray:
    """Keep each pair of items once, with its least distance."""
    rows = rows[np.lexsort((rows[:, 3], rows[:, 2], rows[:, 4], rows[:, 1], rows[:, 0]))]
    pair = rows[:, 0] * count + rows[:, 1]
    return rows[np.concatenate([[True], pair[1:] != pair[:-1]])] if len(rows) else rows


@cache
def _bands() -> np.ndarray:
    """Return the numbers of the bits of each band, (bands, bits)."""
    grid = np.arange(_SIDE * _SIDE).reshape(_SIDE, _SIDE)
    low = grid[:_LOW, :_LOW].ravel()[1:]  # without the mean
    rng = np.random.default_rng(0)
    return np.stack([np.sort(rng.choice(low, _BAND_BITS, replace=False)) for _ in range(_BANDS)])


def _band_values(hashes: np.ndarray, band: int) -> np.ndarray:
    """Return the bits of a band of hashes (n, W), as numbers (n,)."""
    values = np.zeros(len(hashes), np.uint32)
    for place, bit in enumerate(_bands()[band]):
        one = (hashes[:, bit // 64] >> np.uint64(bit % 64)).astype(np.uint32) & np.uint32(1)
        values |= one << np.uint32(place)
    return values


class _Table:
    """Look hashes up by bands."""

    def __init__(self, hashes: np.ndarray):
        self._hashes = hashes

    def matches(
        self, band: int, asked: np.ndarray, max_distance: int
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yield rows of the table, rows of what was asked for, and their distance, where a band is the same."""
        known_values = _band_values(self._hashes, band)
        order = np.argsort(known_values, kind="stable")
        known_values = known_values[order]
        asked_values = _band_values(asked, band)
        # Neighbours in this order find the same rows of the table, in the cache.
        asked_order = np.argsort(asked_values, kind="stable")
        asked_values = asked_values[asked_order]
        start = np.searchsorted(known_values, asked_values, "left")
        sizes = np.searchsorted(known_values, asked_values, "right") - start
        ends = np.cumsum(sizes)
        total = int(ends[-1]) if len(ends) else 0
        for low in range(0, total, _CHUNK):
            numbers = np.arange(low, min(low + _CHUNK, total))
            row = np.searchsorted(ends, numbers, "right")
            known = order[start[row] + numbers - (ends[row] - sizes[row])]
            asked_row = asked_order[row]
            distance = np.bitwise_count(self._hashes[known] ^ asked[asked_row]).sum(axis=1, dtype=np.int64)
            close = distance <= max_distance
            yield known[close], asked_row[close], distance[close]
