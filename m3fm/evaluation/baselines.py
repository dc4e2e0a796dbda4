# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Make the floors that a report model has to beat: one constant report, random ones, the nearest image's, shuffled.

Chest reports are close to templates, so a report that never looked at the image scores high. No number of a model
means anything without these beside it. Every choice is made on training reports, never on the evaluated set.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from .text_metrics import MAX_ORDER, combine_bleu, count_ngrams, rouge_l_against, tokenize_report

CRITERIA = ("rouge_l", "bleu_4")


def select_constant_report(
    reports: Sequence[str], language: str, criterion: str = "rouge_l", max_reports: int = 1000, seed: int = 0
) -> int:
    """Chooses the training report that stands best for all training reports.

    Args:
        reports: Training reports.
        language: "en" or "zh".
        criterion: "rouge_l": highest mean ROUGE-L against the training reports; "bleu_4": highest corpus BLEU-4 when
            given as the prediction for each of them. The first of equals wins.
        max_reports: Above this many, candidates and references are a random sample of this size: the cost of
            "rouge_l" grows with the square (10 s for 1,000 reports on one core).
        seed: Of that sample.

    Returns:
        Its index in `reports`.

    Raises:
        ValueError: Without reports, or on an unknown language or criterion.
    """
    if criterion not in CRITERIA:
        raise ValueError(f"Unknown criterion {criterion!r}: expected one of {list(CRITERIA)}.")
    _check_reports(reports)
    if max_reports < 1:
        raise ValueError(f"Expected max_reports >= 1, got {max_reports}.")
    chosen = np.arange(len(reports))
    if len(reports) > max_reports:
        chosen = np.sort(np.random.default_rng(seed).choice(len(reports), size=max_reports, replace=False))
    tokens = [tokenize_report(reports[i], language) for i in chosen]
    scores = _mean_rouge_l(tokens) if criterion == "rouge_l" else _constant_bleu(tokens)
    return int(chosen[int(np.argmax(scores))])


def random_reports(reports: Sequence[str], count: int, seed: int = 0) -> list[str]:
    """Draws `count` training reports, with replacement.

    Raises:
        ValueError: Without reports.
    """
    _check_reports(reports)
    return [reports[i] for i in np.random.default_rng(seed).integers(len(reports), size=count)]


def nearest_neighbors(queries: np.ndarray, gallery: np.ndarray) -> np.ndarray:
    """Finds for each query the most similar gallery item by cosine.

    Features may come from any model: with image features of evaluated studies as queries and of training studies as
    gallery, the found training study's report is the retrieval baseline.

    Args:
        queries: (Q, D).
        gallery: (G, D).

    Returns:
        (Q,) indices into the gallery; the first of equals.

    Raises:
        ValueError: If shapes do not fit, a matrix is empty, or a number is not finite.
    """
    return (unit_rows("queries", queries) @ unit_rows("gallery", gallery, np.shape(queries)[-1]).T).argmax(axis=1)


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


def _check_reports(reports: Sequence[str]) -> None:
    if not len(reports):
        raise ValueError("Expected at least one training report, got none.")


def _mean_rouge_l(tokens: list[list[str]]) -> list[float]:
    """Returns each report's mean ROUGE-L against all of them."""
    return [float(np.mean(rouge_l_against(candidate, tokens))) for candidate in tokens]


def _constant_bleu(tokens: list[list[str]]) -> list[float]:
    """Returns for each report the corpus BLEU-4 of giving it for all of them.

    The clipped matches of an n-gram that a candidate holds m times are summed over the references as the number of
    references that hold it at least once, plus at least twice, ... up to m times: one pass for all candidates.
    """
    at_least: Counter[tuple[tuple[str, ...], int]] = Counter()
    for reference in tokens:
        for order in range(1, MAX_ORDER + 1):
            for ngram, times in count_ngrams(reference, order).items():
                at_least.update((ngram, level) for level in range(1, times + 1))
    reference_length = sum(map(len, tokens))
    scores = []
    for candidate in tokens:
        matches = [
            sum(at_least[ngram, level] for ngram, times in counts.items() for level in range(1, times + 1))
            for counts in (count_ngrams(candidate, order) for order in range(1, MAX_ORDER + 1))
        ]
        guesses = [len(tokens) * max(0, len(candidate) - order) for order in range(MAX_ORDER)]
        scores.append(combine_bleu(matches, guesses, len(tokens) * len(candidate), reference_length)[-1])
    return scores
