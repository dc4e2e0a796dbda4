# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Score generated reports by their words: BLEU-1..4, METEOR, ROUGE-L, CIDEr-D and chrF, in English and Chinese.

English is scored by words; Chinese by characters and, under names that end in "_jieba", by words (see `tokens`). chrF
reads the characters of the untouched text. How each score is defined, and which public implementation it equals, is
said in `ngrams` and `meteor`. All are in 0..1, except CIDEr-D in 0..10 (pycocoevalcap's scale).

A report equal to its reference scores 1. CIDEr-D reaches 10 only if the report has n-grams of every order up to four
that not all references share: it is 0 for a single report, and lower for one of fewer than four tokens. An empty
prediction scores 0; so does anything against an empty reference.
"""

from collections.abc import Callable, Sequence

import numpy as np
from tqdm.auto import tqdm

from .bertscore import BertScorer
from .meteor import JavaMeteor, english_stem, meteor_measurement, meteor_statistics
from .ngrams import (
    BLEU_NAMES,
    BLEU_ORDER,
    CHRF_ORDER,
    NgramIndex,
    bleu_statistics,
    chrf_statistics,
    combine_bleu,
    combine_chrf,
    count_tokens,
    rouge_l,
    rouge_l_against,
)
from .resampling import Measurement, SumMeasurement, mean_measurement, point_scores
from .tokens import LANGUAGES, TOKENIZATIONS, check_language, tokenize, tokenize_report

__all__ = [
    "LANGUAGES",
    "METRICS",
    "TextScorer",
    "distinct_ratio",
    "metric_names",
    "rouge_l",
    "rouge_l_against",
    "score_reports",
    "tokenize_report",
]

#: Names of the scores by the primary tokenisation, and chrF, in table order.
METRICS = (*BLEU_NAMES, "meteor", "rouge_l", "cider_d", "chrf")
# Scored by each further tokenisation too.
_REPEATED = ("bleu_4", "meteor", "rouge_l", "cider_d")

#: Above this many reports, scoring shows a progress bar.
PROGRESS_FROM = 2000

_Progress = Callable[[int], object]


def metric_names(language: str) -> tuple[str, ...]:
    """Returns the names of the scores of a language, in table order.

    Raises:
        ValueError: On an unknown language.
    """
    check_language(language)
    return METRICS + tuple(f"{name}_{cut}" for cut in TOKENIZATIONS[language][1:] for name in _REPEATED)


class TextScorer:
    """Scores any number of systems against one list of references, whose tokens and n-grams are counted once.

    CIDEr-D takes the document frequencies of n-grams from all references, and keeps them when studies are resampled.

    Args:
        references: N true reports.
        language: "en" or "zh", of references and predictions.
        java_meteor: Adds `meteor_java`, on English reports only.
        bertscore: Adds `bertscore_precision`, `bertscore_recall` and `bertscore_f1`.
        metrics: The scores to compute, of `metric_names(language)`; all by default. What they do not need is neither
            computed nor imported: METEOR needs nltk, and names that end in "_jieba" need jieba.

    Raises:
        ValueError: Without references, on a single string in place of a list, an unknown language, or an unknown name.
    """

    def __init__(
        self,
        references: Sequence[str],
        language: str,
        java_meteor: JavaMeteor | None = None,
        bertscore: BertScorer | None = None,
        metrics: Sequence[str] | None = None,
    ) -> None:
        known = metric_names(language)
        wanted = known if metrics is None else tuple(metrics)
        unknown = sorted(set(wanted) - set(known))
        if unknown:
            raise ValueError(f"Unknown metrics {unknown}: expected some of {list(known)}.")
        _check_list("references", references)
        if not len(references):
            raise ValueError("Expected at least one reference, got none.")
        self._references = list(references)
        self._scorers: list[_TokenScorer | _ChrfScorer] = []
        stem = english_stem if language == "en" else None
        for cut in TOKENIZATIONS[language]:
            primary = cut == TOKENIZATIONS[language][0]
            suffix = "" if primary else f"_{cut}"
            names = {name for name in METRICS if f"{name}{suffix}" in wanted} - {"chrf"}
            if names:
                self._scorers.append(_TokenScorer(self._references, cut, names, suffix, stem))
            if primary and "chrf" in wanted:
                self._scorers.append(_ChrfScorer(self._references))
        self._java_meteor = java_meteor if java_meteor and java_meteor.language == language else None
        self._bertscore = bertscore

    def measure(self, predictions: Sequence[str]) -> list[Measurement]:
        """Counts what the scores of N predictions, in the order of the references, are computed from.

        Raises:
            ValueError: On a single string in place of a list, or a number of predictions other than N.
        """
        _check_pairs(predictions, self._references)
        size = len(self._references)
        total = size * sum(scorer.steps for scorer in self._scorers)
        hidden = size <= PROGRESS_FROM
        with tqdm(total=total, desc="text metrics", unit="report", leave=False, disable=hidden) as bar:
            measurements = [each for scorer in self._scorers for each in scorer.measure(predictions, bar.update)]
        if self._java_meteor:
            measurements.append(self._java_meteor.measure(predictions, self._references))
        if self._bertscore:
            measurements.append(self._bertscore.measure(predictions, self._references))
        return measurements


class _ChrfScorer:
    """Scores against references by their characters."""

    steps = 1

    def __init__(self, references: Sequence[str]) -> None:
        self._index = NgramIndex(_characters(references), CHRF_ORDER)

    def measure(self, predictions: Sequence[str], progress: _Progress) -> list[Measurement]:
        """Returns the measurement of chrF; tells `progress` of each report once."""
        texts = _characters(predictions)
        matches = self._index.matches(self._index.count(texts))
        progress(len(texts))
        return [SumMeasurement(chrf_statistics(matches, count_tokens(texts), self._index.lengths), combine_chrf)]


class _TokenScorer:
    """Scores against references by one tokenisation.

    Args:
        references: N texts.
        tokenization: How they are cut.
        names: Of `METRICS`, without chrF.
        suffix: Of the names of the scores.
        stem: For METEOR.
    """

    def __init__(
        self,
        references: Sequence[str],
        tokenization: str,
        names: set[str],
        suffix: str,
        stem: Callable[[str], str] | None,
    ) -> None:
        self._tokenization = tokenization
        self._names = names
        self._suffix = suffix
        self._stem = stem
        self._references = [tokenize(text, tokenization) for text in references]
        counts_ngrams = "cider_d" in names or not names.isdisjoint(BLEU_NAMES)
        self._index = NgramIndex(self._references, BLEU_ORDER) if counts_ngrams else None
        self.steps = counts_ngrams + ("meteor" in names) + ("rouge_l" in names)

    def measure(self, predictions: Sequence[str], progress: _Progress) -> list[Measurement]:
        """Returns measurements in table order; tells `progress` of each report once a step."""
        tokens = [tokenize(text, self._tokenization) for text in predictions]
        measurements: list[Measurement] = []
        means: dict[str, np.ndarray] = {}
        if self._index:
            lengths = count_tokens(tokens)
            counts = self._index.count(tokens)
            if not self._names.isdisjoint(BLEU_NAMES):
                statistics = bleu_statistics(self._index.matches(counts), lengths, self._index.lengths)
                measurements.append(SumMeasurement(statistics, self._bleu))
            progress(len(tokens))
        if "meteor" in self._names:
            statistics = meteor_statistics(tokens, self._references, self._stem, progress)
            measurements.append(meteor_measurement(statistics, f"meteor{self._suffix}"))
        if "rouge_l" in self._names:
            means["rouge_l"] = np.array(
                [rouge_l(ours, true) for ours, true in zip(tokens, self._references, strict=True)]
            )
            progress(len(tokens))
        if "cider_d" in self._names:
            means["cider_d"] = self._index.cider_d(counts, lengths)
        if means:
            measurements.append(mean_measurement({f"{name}{self._suffix}": each for name, each in means.items()}))
        return measurements

    def _bleu(self, sums: np.ndarray) -> dict[str, np.ndarray]:
        return {f"{name}{self._suffix}": scores for name, scores in combine_bleu(sums).items() if name in self._names}


def score_reports(
    predictions: Sequence[str],
    references: Sequence[str],
    language: str,
    metrics: Sequence[str] | None = None,
) -> dict[str, float]:
    """Scores reports against one reference each.

    Args:
        predictions: Generated reports.
        references: True reports, in the same order.
        language: "en" or "zh".
        metrics: The scores to compute, as `TextScorer` takes them; all by default.

    Returns:
        Scores by name, in the order of `metric_names(language)`.

    Raises:
        ValueError: If there is nothing to score, the lengths differ, or the language or a metric is unknown.
    """
    _check_list("references", references)
    _check_pairs(predictions, references)
    scorer = TextScorer(references, language, metrics=metrics)
    return point_scores(scorer.measure(predictions), len(references))


def distinct_ratio(predictions: Sequence[str]) -> float:
    """Returns the share of different texts among `predictions`; 1 / n means one report for everybody.

    Raises:
        ValueError: If there are none.
    """
    if not predictions:
        raise ValueError("Expected at least one prediction, got none.")
    return len({text.strip() for text in predictions}) / len(predictions)


def _characters(texts: Sequence[str]) -> list[str]:
    return ["".join(text.split()) for text in texts]


def _check_list(name: str, texts: Sequence[str]) -> None:
    if isinstance(texts, str):
        raise ValueError(f"Expected {name} to be a list of reports, got one string.")


def _check_pairs(predictions: Sequence[str], references: Sequence[str]) -> None:
    _check_list("predictions", predictions)
    if len(predictions) != len(references) or not len(references):
        raise ValueError(
            f"Expected as many predictions as references, and at least one: got {len(predictions)} predictions and "
            f"{len(references)} references."
        )
