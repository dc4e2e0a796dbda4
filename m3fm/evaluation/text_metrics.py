# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Score generated reports by word overlap: corpus BLEU-1..4 and ROUGE-L, in English and Chinese.

Tokens are part of a score, so they are fixed here and not an option:

- "en": lower-cased words; of the punctuation only the full stop is kept, as a token of its own, after the cleaning of
  R2Gen (Chen et al., EMNLP 2020) that the authors' release of M3FM follows. A number with a decimal point is one
  token, a hyphen separates words. With all punctuation kept, BLEU-4 of templated reports is about 0.02 higher.
- "zh": single characters, punctuation included, white space left out, nothing else normalised.

Words and characters give scores that cannot be compared: never put an English beside a Chinese number.

Both metrics follow pycocoevalcap 1.2 to rounding, on the same tokens: its corpus BLEU with the closest reference
length (there is one reference here) and its ROUGE-L, the mean over samples with beta = 1.2.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence

MAX_ORDER = 4
METRICS = (*(f"bleu_{order}" for order in range(1, MAX_ORDER + 1)), "rouge_l")

_BETA_SQUARED = 1.2**2  # recall counts more than precision
# pycocoevalcap's guards against a division by zero; they show in the score where nothing matches.
_TINY, _SMALL = 1e-15, 1e-9

_ENGLISH_TOKEN = re.compile(r"\d+(?:\.\d+)+|\w+|\.")
_TOKENIZERS: dict[str, Callable[[str], list[str]]] = {
    "en": lambda text: _ENGLISH_TOKEN.findall(text.lower()),
    "zh": lambda text: [character for character in text if not character.isspace()],
}
LANGUAGES = tuple(_TOKENIZERS)


def tokenize_report(text: str, language: str) -> list[str]:
    """Splits a report into the tokens that are scored (see the module's text).

    Raises:
        ValueError: On a language without a tokenisation.
    """
    if language not in _TOKENIZERS:
        raise ValueError(f"Unsupported language {language!r}: expected one of {list(LANGUAGES)}.")
    return _TOKENIZERS[language](text)


def score_reports(predictions: Sequence[str], references: Sequence[str], language: str) -> dict[str, float]:
    """Scores reports against one reference each.

    An empty prediction scores 0; so does anything against an empty reference.

    Args:
        predictions: Generated reports.
        references: True reports, in the same order.
        language: "en" or "zh".

    Returns:
        `bleu_1` ... `bleu_4` of the corpus and the mean `rouge_l`, each in 0..1.

    Raises:
        ValueError: If there is nothing to score, the lengths differ, or the language is unknown.
    """
    for name, texts in (("predictions", predictions), ("references", references)):
        if isinstance(texts, str):
            raise ValueError(f"Expected {name} to be a list of reports, got one string.")
    if len(predictions) != len(references) or not predictions:
        raise ValueError(
            f"Expected as many predictions as references, and at least one: got {len(predictions)} predictions and "
            f"{len(references)} references."
        )
    hypotheses = [tokenize_report(text, language) for text in predictions]
    truths = [tokenize_report(text, language) for text in references]
    pairs = list(zip(hypotheses, truths, strict=True))
    mean_rouge = math.fsum(rouge_l(hypothesis, truth) for hypothesis, truth in pairs) / len(pairs)
    return dict(zip(METRICS, [*corpus_bleu(hypotheses, truths), mean_rouge], strict=True))


def distinct_ratio(predictions: Sequence[str]) -> float:
    """Returns the share of different texts among `predictions`; 1 / n means one report for everybody.

    Raises:
        ValueError: If there are none.
    """
    if not predictions:
        raise ValueError("Expected at least one prediction, got none.")
    return len({text.strip() for text in predictions}) / len(predictions)


def corpus_bleu(hypotheses: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> list[float]:
    """Computes BLEU-1..4 of tokenised reports: n-gram matches are summed over the corpus, then combined."""
    matches = [0] * MAX_ORDER
    for hypothesis, reference in zip(hypotheses, references, strict=True):
        for order in range(1, MAX_ORDER + 1):
            found, wanted = count_ngrams(hypothesis, order), count_ngrams(reference, order)
            matches[order - 1] += sum(min(found[ngram], wanted[ngram]) for ngram in found.keys() & wanted.keys())
    guesses = [sum(max(0, len(each) - order) for each in hypotheses) for order in range(MAX_ORDER)]
    return combine_bleu(matches, guesses, sum(map(len, hypotheses)), sum(map(len, references)))


def combine_bleu(
    matches: Sequence[int], guesses: Sequence[int], hypothesis_length: int, reference_length: int
) -> list[float]:
    """Combines counts per order into BLEU-1..4: geometric mean of the precisions times the brevity penalty."""
    ratio = (hypothesis_length + _TINY) / (reference_length + _SMALL)
    penalty = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    scores, product = [], 1.0
    for order, (match, guess) in enumerate(zip(matches, guesses, strict=True), start=1):
        product *= (match + _TINY) / (guess + _SMALL)
        scores.append(penalty * product ** (1 / order))
    return scores


def count_ngrams(tokens: Sequence[str], order: int) -> Counter[tuple[str, ...]]:
    """Counts the n-grams of one order."""
    return Counter(zip(*(tokens[start:] for start in range(order)), strict=False))


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
        scores.append((1 + _BETA_SQUARED) * precision * recall / (recall + _BETA_SQUARED * precision))
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
