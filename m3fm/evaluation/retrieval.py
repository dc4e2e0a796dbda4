# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Measure retrieval in the shared space: recall at k both ways, median rank, and what chance would give.

Reports repeat. Where two gallery items carry the same text no model can tell them apart, so a hit is any item with the
right text (`same_text`), and the chance level counts them too. Where a wrong item scores as high as the right one
the tie counts against the model: a space that has collapsed to a point finds nothing.
"""

import math
from collections.abc import Sequence

import numpy as np

from .baselines import unit_rows

# Cosines closer than this are rounding of float32 features, not an opinion of the model.
TIE_TOLERANCE = 1e-6


def retrieval_recall(
    queries: np.ndarray, gallery: np.ndarray, ks: Sequence[int] = (1, 10), positives: np.ndarray | None = None
) -> dict[str, dict[str, float]]:
    """Ranks the gallery for each query by cosine, and the other way round.

    The rank of a query is 1 + the wrong items that score at least as high as its best right one, rounding aside.

    Args:
        queries: (Q, D).
        gallery: (G, D).
        ks: Ranks to report the recall at.
        positives: (Q, G) bool, the right items of each query; None: item i is right for query i alone.

    Returns:
        `forward` (query to gallery) and `backward`, each with `recall@k` and `chance@k` in 0..1, `median_rank`,
        `num_queries` and `num_items`. Gallery items that are right for no query are distractors forward, and are not
        asked backward.

    Raises:
        ValueError: If shapes do not fit, a number is not finite, a k is below 1, or a query has no right item.
    """
    if not ks or any(k < 1 for k in ks):
        raise ValueError(f"Expected ks to be whole numbers >= 1, got {list(ks)}.")
    rows, columns = unit_rows("queries", queries), unit_rows("gallery", gallery, np.shape(queries)[-1])
    if positives is None:
        if len(rows) != len(columns):
            raise ValueError(
                f"Expected as many queries as gallery items where positives are not given, "
                f"got {len(rows)} and {len(columns)}."
            )
        positives = np.eye(len(rows), dtype=bool)
    positives = np.asarray(positives, dtype=bool)
    if positives.shape != (len(rows), len(columns)):
        raise ValueError(f"Expected positives of shape {(len(rows), len(columns))}, got {positives.shape}.")
    if not positives.any(axis=1).all():
        raise ValueError(f"Expected a right item for every query, {int((~positives.any(axis=1)).sum())} have none.")
    similarity = rows @ columns.T  # (Q, G)
    asked = positives.any(axis=0)
    return {
        "forward": _one_way(similarity, positives, ks),
        "backward": _one_way(similarity.T[asked], positives.T[asked], ks),
    }


def same_text(*columns: Sequence[str]) -> np.ndarray:
    """Marks which items are right for which: those that share the text of at least one column.

    Args:
        columns: Lists of N texts each: the reports of N studies, or the two sides of N pairs.

    Returns:
        (N, N) bool, symmetric, true on the diagonal.

    Raises:
        ValueError: Without a column, or on different lengths.
    """
    lengths = {len(column) for column in columns}
    if len(lengths) != 1:
        raise ValueError(f"Expected columns of one length, got {sorted(lengths)}.")
    matrix = np.eye(lengths.pop(), dtype=bool)
    for column in columns:
        _, codes = np.unique(np.asarray([text.strip() for text in column], dtype=object), return_inverse=True)
        matrix |= codes[:, None] == codes[None, :]
    return matrix


def chance_recall(num_items: int, num_positives: int, k: int) -> float:
    """Returns the chance that at least one of the right items is among k drawn without looking."""
    k = min(k, num_items)
    return 1 - math.comb(num_items - num_positives, k) / math.comb(num_items, k)


def _one_way(similarity: np.ndarray, positives: np.ndarray, ks: Sequence[int]) -> dict[str, float]:
    best = np.where(positives, similarity, -np.inf).max(axis=1, keepdims=True)  # (Q, 1)
    ranks = 1 + ((similarity >= best - TIE_TOLERANCE) & ~positives).sum(axis=1)  # (Q,)
    num_items = similarity.shape[1]
    counts, times = np.unique(positives.sum(axis=1), return_counts=True)
    result: dict[str, float] = {}
    for k in ks:
        result[f"recall@{k}"] = float((ranks <= k).mean())
        by_count = [chance_recall(num_items, int(count), int(k)) for count in counts]
        result[f"chance@{k}"] = float(np.average(by_count, weights=times))
    return result | {
        "median_rank": float(np.median(ranks)),
        "num_queries": len(ranks),
        "num_items": num_items,
    }
