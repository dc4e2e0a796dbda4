# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Score tokenised reports by their n-grams and their order: BLEU, CIDEr-D, chrF and ROUGE-L, one reference each.

Equal to the public implementations to rounding, on the same tokens:

- BLEU-1..4: pycocoevalcap 1.2, of the corpus, with the closest reference length (there is one reference here).
- CIDEr-D (Vedantam et al., CVPR 2015): pycocoevalcap 1.2, with sigma = 6 and the document frequencies of the
  references it is scored against.
- chrF (Popović, WMT 2015): the corpus score of sacrebleu 2.6 with its defaults, characters up to order 6 without
  white space, beta = 2; divided by 100.
- ROUGE-L (Lin, 2004): pycocoevalcap 1.2, F with beta = 1.2.

Letters in shapes: N reports, O orders, E different n-grams of one order, counted per report, R resamples.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BLEU_ORDER = 4
CHRF_ORDER = 6
BLEU_NAMES = tuple(f"bleu_{order}" for order in range(1, BLEU_ORDER + 1))

_ROUGE_BETA_SQUARED = 1.2**2  # recall counts more than precision
_CHRF_BETA_SQUARED = 2.0**2
_CIDER_SIGMA, _CIDER_SCALE = 6.0, 10.0
# pycocoevalcap's guards against a division by zero; they show in the score where nothing matches.
_TINY, _SMALL = 1e-15, 1e-9


@dataclass(frozen=True)
class NgramCounts:
    """The n-grams of one order in N reports, an entry for each different one of a report, sorted by (report, n-gram).

    Attributes:
        reports: (E,) the report of each entry.
        ngrams: (E,) its n-gram, as the index numbers them; those that no reference has come last.
        counts: (E,) how often that n-gram stands in that report.
    """

    reports: np.ndarray
    ngrams: np.ndarray
    counts: np.ndarray


class NgramIndex:
    """The n-grams of N references, numbered and counted once, however many systems are scored against them.

    Args:
        references: N token sequences; a string is a sequence of characters.
        max_order: The longest n-gram.
    """

    def __init__(self, references: Sequence[Sequence[str]], max_order: int) -> None:
        self.size = len(references)
        self.max_order = max_order
        self.lengths = count_tokens(references)
        self._tokens: dict[str, int] = {}
        for tokens in references:
            for token in tokens:
                self._tokens.setdefault(token, len(self._tokens))
        self._known: list[np.ndarray] = []  # by order: sorted codes of the references' n-grams
        self.counts = self.count(references)

    def count(self, texts: Sequence[Sequence[str]]) -> list[NgramCounts]:
        """Counts the n-grams of N token sequences, one item for each order."""
        lengths = count_tokens(texts)
        reports = np.repeat(np.arange(len(texts)), lengths)
        # A token that no reference has is numbered by the call.
        codes = dict(self._tokens)
        tokens = np.fromiter(
            (codes.setdefault(token, len(codes)) for text in texts for token in text), np.int64, int(lengths.sum())
        )
        # How many tokens follow within the report, to know where an n-gram ends inside it.
        following = np.repeat(np.cumsum(lengths), lengths) - np.arange(len(tokens)) - 1
        ngrams, counted = np.zeros(len(tokens), np.int64), []
        for order in range(1, self.max_order + 1):
            starts = np.flatnonzero(following >= order - 1)
            # An n-gram is the one that is a token shorter and its last token.
            ngrams[starts] = self._number(ngrams[starts] * len(codes) + tokens[starts + order - 1], order, len(codes))
            counted.append(_count_pairs(reports[starts], ngrams[starts]))
        return counted

    def _number(self, codes: np.ndarray, order: int, base: int) -> np.ndarray:
        """Turns codes into consecutive numbers, the references' n-grams first and always the same."""
        if len(self._known) < order:
            known, numbers = np.unique(codes, return_inverse=True)
            self._known.append(known)
            return numbers
        # The codes of the references were made with fewer tokens to tell apart.
        known = self._known[order - 1]
        known = known // len(self._tokens) * base + known % len(self._tokens) if len(known) else known
        numbers = np.searchsorted(known, codes)
        found = np.zeros(len(codes), bool)
        inside = numbers < len(known)
        found[inside] = known[numbers[inside]] == codes[inside]
        numbers[~found] = len(known) + np.unique(codes[~found], return_inverse=True)[1]
        return numbers

    def matches(self, predictions: Sequence[NgramCounts]) -> np.ndarray:
        """Returns how many n-grams each prediction shares with its reference, (N, O).

        Each is counted at most as often as the reference has it.
        """
        columns = []
        for predicted, wanted in zip(predictions, self.counts, strict=True):
            shared, place = self._shared(predicted, wanted)
            common = np.minimum(predicted.counts[shared], wanted.counts[place])
            columns.append(np.bincount(predicted.reports[shared], common, minlength=self.size))
        return np.stack(columns, axis=1)

    def cider_d(self, predictions: Sequence[NgramCounts], lengths: np.ndarray) -> np.ndarray:
        """Computes CIDEr-D of each prediction, (N,) in 0..10.

        Vectors of n-gram counts weighted by inverse document frequency are compared by cosine, a prediction's count
        clipped to the reference's, the mean of the orders damped by the difference in length (equations 3 to 6 of the
        paper). Only an n-gram that few references have counts for much.

        Args:
            predictions: Their n-grams.
            lengths: (N,) their tokens.
        """
        log_size = math.log(self.size)
        totals = np.zeros(self.size)
        for predicted, wanted in zip(predictions, self.counts, strict=True):
            frequency = np.bincount(wanted.ngrams, minlength=int(predicted.ngrams.max(initial=-1)) + 1)
            weights = log_size - np.log(np.maximum(frequency, 1))
            found, true = predicted.counts * weights[predicted.ngrams], wanted.counts * weights[wanted.ngrams]
            shared, place = self._shared(predicted, wanted)
            products = np.minimum(found[shared], true[place]) * true[place]
            dots = np.bincount(predicted.reports[shared], products, minlength=self.size)
            norms = np.sqrt(
                np.bincount(predicted.reports, found**2, minlength=self.size)
                * np.bincount(wanted.reports, true**2, minlength=self.size)
            )
            totals += np.divide(dots, norms, out=np.zeros(self.size), where=norms > 0)
        # pycocoevalcap takes the number of bigrams for the length, so that no token and one token are equally long.
        gaps = np.maximum(lengths - 1, 0) - np.maximum(self.lengths - 1, 0)
        return _CIDER_SCALE / self.max_order * totals * np.exp(-(gaps**2) / (2 * _CIDER_SIGMA**2))

    def _shared(self, predicted: NgramCounts, wanted: NgramCounts) -> tuple[np.ndarray, np.ndarray]:
        """Finds the n-grams that a prediction and its reference both have: entries of the one, and of the other."""
        base = 1 + max(int(predicted.ngrams.max(initial=0)), int(wanted.ngrams.max(initial=0)))
        keys = wanted.reports * base + wanted.ngrams
        wished = predicted.reports * base + predicted.ngrams
        place = np.searchsorted(keys, wished)
        place[place == len(keys)] = 0
        shared = np.flatnonzero(keys[place] == wished) if len(keys) else np.zeros(0, np.int64)
        return shared, place[shared]


def count_tokens(texts: Sequence[Sequence[str]]) -> np.ndarray:
    """Returns the length of each token sequence, (N,)."""
    return np.fromiter(map(len, texts), np.int64, len(texts))


def _count_pairs(reports: np.ndarray, ngrams: np.ndarray) -> NgramCounts:
    base = int(ngrams.max(initial=0)) + 1
    pairs, counts = np.unique(reports * base + ngrams, return_counts=True)
    return NgramCounts(pairs // base, pairs % base, counts)


def bleu_statistics(matches: np.ndarray, lengths: np.ndarray, reference_lengths: np.ndarray) -> np.ndarray:
    """Returns what BLEU is computed from, summable over reports: (N, 10), for `combine_bleu`.

    Args:
        matches: (N, 4) shared n-grams by order.
        lengths: (N,) tokens of the predictions.
        reference_lengths: (N,).
    """
    guesses = np.maximum(lengths[:, None] - np.arange(BLEU_ORDER), 0)
    return np.concatenate([matches, guesses, lengths[:, None], reference_lengths[:, None]], axis=1).astype(np.float64)


def combine_bleu(sums: np.ndarray) -> dict[str, np.ndarray]:
    """Combines summed statistics (R, 10) into BLEU-1..4: geometric mean of precisions times brevity penalty."""
    matches, guesses = sums[:, :BLEU_ORDER], sums[:, BLEU_ORDER : 2 * BLEU_ORDER]
    ratios = (sums[:, -2] + _TINY) / (sums[:, -1] + _SMALL)
    penalties = np.exp(np.minimum(1 - 1 / ratios, 0))
    products = np.cumprod((matches + _TINY) / (guesses + _SMALL), axis=1)
    scores = penalties[:, None] * products ** (1 / np.arange(1, BLEU_ORDER + 1))
    return {name: scores[:, column] for column, name in enumerate(BLEU_NAMES)}


def chrf_statistics(matches: np.ndarray, lengths: np.ndarray, reference_lengths: np.ndarray) -> np.ndarray:
    """Returns what chrF is computed from, summable over reports: (N, 18), for `combine_chrf`.

    Args:
        matches: (N, 6) shared character n-grams by order.
        lengths: (N,) characters of the predictions.
        reference_lengths: (N,).
    """
    orders = np.arange(CHRF_ORDER)
    wanted = np.maximum(reference_lengths[:, None] - orders, 0)
    # As in sacrebleu, a report is no guess in an order for which its reference is too short.
    guesses = np.where(wanted > 0, np.maximum(lengths[:, None] - orders, 0), 0)
    return np.concatenate([matches, guesses, wanted], axis=1).astype(np.float64)


def combine_chrf(sums: np.ndarray) -> dict[str, np.ndarray]:
    """Combines summed statistics (R, 18) into chrF: F2 of precision and recall averaged over the orders that occur."""
    matches, guesses, wanted = np.split(sums, 3, axis=1)
    known = (guesses > 0) & (wanted > 0)
    orders = np.maximum(known.sum(axis=1), 1)
    precision, recall = (
        np.divide(matches, totals, out=np.zeros_like(matches), where=known).sum(axis=1) / orders
        for totals in (guesses, wanted)
    )
    weighted = _CHRF_BETA_SQUARED * precision + recall
    scores = (1 + _CHRF_BETA_SQUARED) * precision * recall
    return {"chrf": np.divide(scores, weighted, out=np.zeros_like(scores), where=weighted > 0)}


def rouge_l(hypothesis: Sequence[str], reference: Sequence[str]) -> float:
    """Computes ROUGE-L (F, beta = 1.2) of two tokenised reports; 0 if either is empty."""
    return rouge_l_against(hypothesis, [reference])[0]


def rouge_l_against(hypothesis: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """Computes ROUGE-L of one tokenised report against each of many."""
    places = _bit_places(hypothesis)
    scores = []
    for reference in references:
        common = _longest_common(places, len(hypothesis), reference)
        if common == 0:
            scores.append(0.0)
            continue
        precision, recall = common / len(hypothesis), common / len(reference)
        scores.append((1 + _ROUGE_BETA_SQUARED) * precision * recall / (recall + _ROUGE_BETA_SQUARED * precision))
    return scores


def _bit_places(tokens: Sequence[str]) -> dict[str, int]:
    """Maps each token to an integer with a bit set at every place where it stands."""
    places: dict[str, int] = {}
    for place, token in enumerate(tokens):
        places[token] = places.get(token, 0) | 1 << place
    return places


def _longest_common(places: dict[str, int], length: int, other: Sequence[str]) -> int:
    """Returns the length of the longest common subsequence.

    Hyyrö's bit-parallel recurrence (2004): a whole row of the dynamic programme is one integer, and zeros mark where
    it grows, so a report of 80 tokens costs 80 integer additions instead of 6,400 comparisons.
    """
    mask = (1 << length) - 1
    row = mask
    for token in other:
        matched = row & places.get(token, 0)
        row = ((row + matched) | (row - matched)) & mask
    return length - row.bit_count()
