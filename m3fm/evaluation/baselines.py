# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Make the floors that a report model has to beat: one constant report, random ones, the nearest image's, shuffled.

Chest reports are close to templates, so a report that never looked at the image scores high. No number of a model
means anything without these beside it. Every choice is made on training reports, never on the evaluated set.
"""

from collections.abc import Sequence

import numpy as np

from .ngrams import rouge_l_against
from .tokens import tokenize_report

_QUERIES_AT_ONCE = 1024


def select_constant_report(reports: Sequence[str], language: str, max_reports: int = 1000, seed: int = 0) -> int:
    """Chooses the training report with the highest mean ROUGE-L against all training reports; the first of equals.

    Args:
        reports: Training reports.
        language: "en" or "zh".
        max_reports: Above this many, candidates and references are a random sample of this size: the cost grows with
            the square (10 s for 1,000 reports on one core).
        seed: Of that sample.

    Returns:
        Its index in `reports`.

    Raises:
        ValueError: Without reports, or on an unknown language.
    """
    _check_reports(reports)
    if max_reports < 1:
        raise ValueError(f"Expected max_reports >= 1, got {max_reports}.")
    chosen = np.arange(len(reports))
    if len(reports) > max_reports:
        chosen = np.sort(np.random.default_rng(seed).choice(len(reports), size=max_reports, replace=False))
    tokens = [tokenize_report(reports[i], language) for i in chosen]
    scores = [float(np.mean(rouge_l_against(candidate, tokens))) for candidate in tokens]
    return int(chosen[int(np.argmax(scores))])


def random_reports(
    reports: Sequence[str],
    count: int,
    seed: int = 0,
    groups: Sequence[int] | None = None,
    gallery_groups: Sequence[int] | None = None,
) -> list[str]:
    """Draws `count` reports with replacement, all equally likely.

    Args:
        reports: To draw from.
        count: How many.
        seed: Of the draws.
        groups: Of each drawn place, the group it must not be drawn from; with `gallery_groups`, where the reports are
            those of the evaluated studies themselves.
        gallery_groups: The group of each report.

    Raises:
        ValueError: Without reports, or if all of them are of the group that they must not be drawn from.
    """
    _check_reports(reports)
    generator = np.random.default_rng(seed)
    places = generator.integers(len(reports), size=count)
    if groups is not None:
        own, theirs = np.asarray(groups), np.asarray(gallery_groups)
        _check_groups(own, theirs)
        while len(clashes := np.flatnonzero(theirs[places] == own)):
            places[clashes] = generator.integers(len(reports), size=len(clashes))
    return [reports[place] for place in places]


def nearest_neighbors(
    queries: np.ndarray,
    gallery: np.ndarray,
    groups: Sequence[int] | None = None,
    gallery_groups: Sequence[int] | None = None,
) -> np.ndarray:
    """Finds for each query the most similar gallery item by cosine.

    Features may come from any model: with image features of evaluated studies as queries and of training studies as
    gallery, the found training study's report is the retrieval baseline.

    Args:
        queries: (Q, D).
        gallery: (G, D).
        groups: (Q,), of each query the group that is not searched; with `gallery_groups`, where the gallery is the
            evaluated studies themselves.
        gallery_groups: (G,), the group of each gallery item.

    Returns:
        (Q,) indices into the gallery; the first of equals.

    Raises:
        ValueError: If shapes do not fit, a matrix is empty, a number is not finite, or nothing is left to search.
    """
    rows, columns = unit_rows("queries", queries), unit_rows("gallery", gallery, np.shape(queries)[-1])
    found = np.empty(len(rows), dtype=np.int64)
    own, theirs = np.asarray(groups), np.asarray(gallery_groups)
    if groups is not None:
        _check_groups(own, theirs)
    # In parts: all similarities of a large set at once would not fit the memory.
    for start in range(0, len(rows), _QUERIES_AT_ONCE):
        part = slice(start, start + _QUERIES_AT_ONCE)
        similarity = rows[part] @ columns.T
        if groups is not None:
            similarity[own[part, None] == theirs[None, :]] = -np.inf
        found[part] = similarity.argmax(axis=1)
    return found


def derangement(count: int, seed: int = 0) -> np.ndarray:
    """Draws a permutation of `count` places that leaves none where it was, all such permutations equally likely.

    Raises:
        ValueError: If there are fewer than two places.
    """
    if count < 2:
        raise ValueError(f"Expected at least 2 studies to shuffle, got {count}.")
    generator = np.random.default_rng(seed)
    places = np.arange(count)
    # About one permutation in e is a derangement, whatever the size.
    while ((order := generator.permutation(count)) == places).any():
        pass
    return order


def unit_rows(name: str, matrix: np.ndarray, width: int | None = None) -> np.ndarray:
    """Returns `matrix` (R, D) as float64 with rows of unit norm; a row of zeros stays.

    Raises:
        ValueError: Naming the matrix, if it is not two-dimensional, empty, of another width, or not finite.
    """
    rows = np.asarray(matrix, dtype=np.float64)
    if rows.ndim != 2 or 0 in rows.shape or (width is not None and rows.shape[1] != width):
        raise ValueError(f"Expected {name} of shape (rows, {width or 'features'}), got {rows.shape}.")
    if not np.isfinite(rows).all():
        raise ValueError(
            f"Expected finite {name}, got NaN or infinity in {int((~np.isfinite(rows)).any(1).sum())} rows."
        )
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(norms == 0, 1, norms)


def _check_groups(groups: np.ndarray, gallery_groups: np.ndarray) -> None:
    if len(set(gallery_groups.tolist())) < 2 and set(groups.tolist()) & set(gallery_groups.tolist()):
        raise ValueError("Expected reports of at least two patients to draw from others, got those of one.")


def _check_reports(reports: Sequence[str]) -> None:
    if not len(reports):
        raise ValueError("Expected at least one training report, got none.")
