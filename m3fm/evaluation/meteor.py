# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Score tokenised reports by METEOR 1.5 (Denkowski and Lavie, WMT 2014), without Java, and by its Java release.

A word of the prediction is aligned with one of the reference if both are the same, or (English) have the same stem of
the Snowball stemmer; METEOR's synonyms and paraphrases are left out, because its tables cover general English and no
Chinese. Words are lower-cased. Of all alignments the wanted one has the most equal words, then the fewest chunks (runs
that stand together and in the same order in both reports), then the smallest distances; METEOR looks for it from left
to right with a beam of 40 partial alignments, and so does this module, ties and pruning included.

With m1 equal words, m2 words of equal stem and c chunks, over reports of h (prediction) and r (reference) words:

    P = (m1 + 0.6 m2) / h    R = (m1 + 0.6 m2) / r    F = P R / (alpha P + (1 - alpha) R)
    score = F (1 - gamma (c / (m1 + m2)) ^ beta)      alpha = 0.85, beta = 0.2, gamma = 0.6

The score of a corpus is computed from summed counts, as METEOR's "Final score" and pycocoevalcap's are; a report that
equals its reference in one chunk adds no chunk, so that a perfect corpus scores 1. METEOR's English parameters are
taken for both languages; its delta, which weighs function words below others, is 0.5 here, where all words weigh the
same, so that no list of function words is needed. The numbers equal the Java release run with `-p "0.85 0.2 0.6 0.5"`
and `-m "exact stem" -w "1.0 0.6"` (English) or `-m exact -w 1.0` (Chinese), except where that takes two different
words for one because Java's 32-bit hash of both is the same. They are no substitute for its full English scores, which
`JavaMeteor` gives.

Letters in shapes: N reports, P pairs aligned at once, I and J words of reference and prediction, B partial alignments.
"""

import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from .resampling import SumMeasurement

BEAM = 40
ALPHA, BETA, GAMMA = 0.85, 0.2, 0.6
STEM_WEIGHT = 0.6
_NO_WORD = -1
# Pairs are aligned in batches, of at most this many pairs and cells of their match tables (some 50 MB of memory).
_MAX_PAIRS, _CELLS = 256, 2_000_000
# Of the integer that partial alignments are sorted by.
_PACKED_BITS = 63

Progress = Callable[[int], Any]


def meteor_measurement(statistics: np.ndarray, name: str = "meteor") -> SumMeasurement:
    """Returns the corpus score from what `meteor_statistics` counted."""
    return SumMeasurement(statistics, lambda sums: {name: combine_meteor(sums)})


def combine_meteor(sums: np.ndarray) -> np.ndarray:
    """Combines summed statistics (R, 5) into METEOR, (R,) in 0..1; 0 where nothing matches."""
    equal, stems, chunks, predicted, wanted = sums.T
    weighted = equal + STEM_WEIGHT * stems
    return fragmentation_score(weighted / _positive(predicted), weighted / _positive(wanted), chunks, equal + stems)


def fragmentation_score(
    precision: np.ndarray, recall: np.ndarray, chunks: np.ndarray, matches: np.ndarray
) -> np.ndarray:
    """Returns the weighted harmonic mean of precision and recall, less the penalty for many chunks."""
    mean = precision * recall / _positive(ALPHA * precision + (1 - ALPHA) * recall)
    return mean * (1 - GAMMA * (chunks / _positive(matches)) ** BETA)


def _positive(values: np.ndarray) -> np.ndarray:
    """Makes a divisor of what is 0 only where the numerator is."""
    return np.where(values > 0, values, 1.0)


def meteor_statistics(
    predictions: Sequence[Sequence[str]],
    references: Sequence[Sequence[str]],
    stem: Callable[[str], str] | None = None,
    progress: Progress | None = None,
) -> np.ndarray:
    """Counts per report what METEOR is computed from.

    Args:
        predictions: N tokenised reports.
        references: N tokenised reports, in the same order.
        stem: Stems a lower-cased word (`english_stem`); without it only equal words match.
        progress: Told how many more reports are done.

    Returns:
        (N, 5): equal words, words of equal stem, chunks, words of the prediction, words of the reference.
    """
    vocabulary = _Vocabulary(stem)
    found, true = vocabulary.encode(predictions), vocabulary.encode(references)
    statistics = np.zeros((len(found), 5))
    waiting: dict[tuple[bytes, bytes], list[int]] = {}
    for row, (ours, theirs) in enumerate(zip(found, true, strict=True)):
        statistics[row, 3:] = len(ours), len(theirs)
        if np.array_equal(ours, theirs):
            statistics[row, 0] = len(ours)  # in one chunk, which does not count
        elif len(ours) and len(theirs):
            waiting.setdefault((ours.tobytes(), theirs.tobytes()), []).append(row)
    groups = sorted(waiting.values(), key=lambda rows: (len(true[rows[0]]), len(found[rows[0]])))
    if progress:
        progress(len(found) - sum(map(len, groups)))
    stem_of = vocabulary.stems()
    for chunk in _batches(groups, found, true):
        firsts = [rows[0] for rows in chunk]
        counts = _align([found[row] for row in firsts], [true[row] for row in firsts], stem_of)
        for rows, (equal, stems, chunks) in zip(chunk, counts, strict=True):
            whole = chunks == 1 and equal + stems == len(found[rows[0]]) == len(true[rows[0]])
            statistics[rows, :3] = equal, stems, 0 if whole else chunks
        if progress:
            progress(sum(map(len, chunk)))
    return statistics


class _Vocabulary:
    """Numbers lower-cased words, and their stems."""

    def __init__(self, stem: Callable[[str], str] | None) -> None:
        self._stem = stem or (lambda word: word)
        self._words: dict[str, int] = {}

    def encode(self, texts: Sequence[Sequence[str]]) -> list[np.ndarray]:
        """Returns the numbers of each text's words."""
        numbers = self._words
        return [
            np.array([numbers.setdefault(word.lower(), len(numbers)) for word in text], dtype=np.int32)
            for text in texts
        ]

    def stems(self) -> np.ndarray:
        """Returns the number of each word's stem, by the number of the word."""
        numbers: dict[str, int] = {}
        return np.array([numbers.setdefault(self._stem(word), len(numbers)) for word in self._words], dtype=np.int32)


def _batches(groups: list[list[int]], found: list[np.ndarray], true: list[np.ndarray]) -> list[list[list[int]]]:
    """Cuts pairs, sorted by length, into batches whose match tables fit into memory."""
    batches: list[list[list[int]]] = [[]]
    longest = [0, 0]
    for rows in groups:
        grown = [max(longest[0], len(true[rows[0]])), max(longest[1], len(found[rows[0]]))]
        size = len(batches[-1]) + 1
        if batches[-1] and (size > _MAX_PAIRS or size * grown[0] * grown[1] > _CELLS):
            batches.append([])
            grown = [len(true[rows[0]]), len(found[rows[0]])]
        batches[-1].append(rows)
        longest = grown
    return batches if groups else []


@dataclass(frozen=True)
class _Candidates:
    """For each word of each reference, the words of the prediction that it may be aligned with, in order of trial.

    Attributes:
        starts: (P, I) the first one's place in `words`.
        counts: (P, I) how many there are.
        certain: (P, I) whether the only one has no other either: such words are aligned before the search.
        words: (C + 1,) their places in the prediction.
        equal: (C + 1,) whether it is the same word, not only one of the same stem.
    """

    starts: np.ndarray
    counts: np.ndarray
    certain: np.ndarray
    words: np.ndarray
    equal: np.ndarray


def _find_candidates(found: np.ndarray, true: np.ndarray, stems: np.ndarray) -> _Candidates:
    """Lists candidates of padded words (P, J) and (P, I): equal words from left to right, then those of equal stem."""
    real = (true != _NO_WORD)[:, :, None] & (found != _NO_WORD)[:, None, :]
    equal = real & (true[:, :, None] == found[:, None, :])  # (P, I, J)
    same_stem = real & ~equal & (stems[true][:, :, None] == stems[found][:, None, :])
    pair, place, kind, word = np.nonzero(np.stack([equal, same_stem], axis=2))
    counts = equal.sum(axis=2) + same_stem.sum(axis=2)
    rivals = equal.sum(axis=1) + same_stem.sum(axis=1)  # (P, J)
    starts = (np.cumsum(counts) - counts.ravel()).reshape(counts.shape)
    certain = counts == 1
    certain[certain] = rivals[pair, word][starts[certain]] == 1
    # The last entry stands for no word.
    return _Candidates(starts, counts, certain, np.append(word, 0), np.append(kind == 0, False))


@dataclass
class _Beam:
    """Partial alignments of P pairs, all in one list, sorted by pair, each pair's best first.

    Attributes:
        pairs: (B,).
        equal: (B,) equal words so far.
        matches: (B,) words aligned so far.
        chunks: (B,) closed chunks.
        distances: (B,) sum of distances between aligned words.
        ends: (B,) the word after the open chunk, in the prediction; -1 if no chunk is open.
        used: (B, J) which words of the prediction are aligned.
    """

    pairs: np.ndarray
    equal: np.ndarray
    matches: np.ndarray
    chunks: np.ndarray
    distances: np.ndarray
    ends: np.ndarray
    used: np.ndarray


def _align(found: list[np.ndarray], true: list[np.ndarray], stems: np.ndarray) -> np.ndarray:
    """Aligns P pairs of words; returns equal words, words of equal stem and chunks of each, (P, 3)."""
    predictions, references = _pad(found), _pad(true)
    candidates = _find_candidates(predictions, references, stems)
    pairs = np.arange(len(found))
    zeros = np.zeros(len(found), np.int64)
    beam = _Beam(pairs, zeros, zeros, zeros, zeros, zeros + _NO_WORD, np.zeros(predictions.shape, bool))
    for place in range(references.shape[1]):
        beam = _extend(beam, candidates, place)
    # Closing the open chunks may change which one is best.
    chunks = beam.chunks + (beam.ends != _NO_WORD)
    best = _rank(beam.pairs, beam.equal, chunks, beam.distances)
    best = best[np.searchsorted(beam.pairs, pairs)]
    return np.stack([beam.equal, beam.matches - beam.equal, chunks], axis=1)[best]


def _pad(texts: list[np.ndarray]) -> np.ndarray:
    padded = np.full((len(texts), max(1, max(map(len, texts)))), _NO_WORD, dtype=np.int32)
    for row, words in enumerate(texts):
        padded[row, : len(words)] = words
    return padded


def _extend(beam: _Beam, candidates: _Candidates, place: int) -> _Beam:
    """Aligns one more word of each reference in every possible way, or leaves it out, and keeps the best."""
    counts = candidates.counts[beam.pairs, place]
    certain = candidates.certain[beam.pairs, place]
    branches = counts + ~certain
    firsts = np.cumsum(branches) - branches
    parents = np.repeat(np.arange(len(counts)), branches)
    turns = np.arange(len(parents)) - firsts[parents]
    aligns = turns < counts[parents]
    tried = np.where(aligns, candidates.starts[beam.pairs, place][parents] + turns, _NO_WORD)
    words = candidates.words[tried]
    possible = np.flatnonzero(~(aligns & beam.used[parents, words]))
    parents, words, aligns, tried = parents[possible], words[possible], aligns[possible], tried[possible]

    # METEOR adds the distance of an aligned word to the partial alignment it continues, after having copied that: a
    # word bears the distances of those tried before it, and leaving out those of all. It only decides between equals.
    steps = np.where(aligns, np.abs(words - place), 0)
    sums = np.cumsum(steps) - steps
    firsts = np.searchsorted(parents, np.arange(len(counts)))
    distances = (beam.distances - sums[firsts])[parents] + sums + np.where(certain[parents], steps, 0)

    pairs = beam.pairs[parents]
    equal = beam.equal[parents] + candidates.equal[tried]
    chunks = beam.chunks[parents] + ((beam.ends != _NO_WORD)[parents] & ~(aligns & (words == beam.ends[parents])))
    order = _rank(pairs, equal, chunks, distances)
    kept = order[np.arange(len(order)) - np.searchsorted(pairs, pairs) < BEAM]

    parents, words, aligns = parents[kept], words[kept], aligns[kept]
    used = beam.used[parents]
    used[aligns, words[aligns]] = True
    ends = np.where(aligns, words + 1, _NO_WORD)
    return _Beam(pairs[kept], equal[kept], beam.matches[parents] + aligns, chunks[kept], distances[kept], ends, used)


def _rank(pairs: np.ndarray, equal: np.ndarray, chunks: np.ndarray, distances: np.ndarray) -> np.ndarray:
    """Orders partial alignments, sorted by pair, from each pair's best to its worst; equals stay as they are."""
    keys = (pairs, equal.max() - equal, chunks, distances, np.arange(len(pairs)))
    bits = [int(key.max()).bit_length() for key in keys]
    if sum(bits) > _PACKED_BITS:
        return np.lexsort(keys[3::-1])
    # One integer that holds all keys is sorted several times faster, and its lowest bits say where it came from.
    packed = np.zeros(len(pairs), np.int64)
    for key, width in zip(keys, bits, strict=True):
        packed = packed << width | key
    packed.sort()
    return packed & ((1 << bits[-1]) - 1)


@lru_cache(maxsize=1)
def _english_stemmer() -> Any:
    try:
        from nltk.stem.snowball import EnglishStemmer
    except ImportError as error:
        raise ImportError('METEOR needs the stemmer of nltk: pip install "m3fm[evaluate]"') from error
    return EnglishStemmer()


@lru_cache(maxsize=100_000)
def english_stem(word: str) -> str:
    """Stems an English word as METEOR's Java release does (Snowball's English stemmer, "Porter2").

    Raises:
        ImportError: Without nltk.
    """
    return _english_stemmer().stem(word)


class JavaMeteor:
    """METEOR's Java release with everything it has for English: function words, synonyms, paraphrases, normalising.

    It runs the jar that pycocoevalcap brings, as pycocoevalcap does (`-l en -norm`), on untouched reports, and needs
    about 2 GB of memory while it runs.

    Args:
        timeout: Seconds after which a run is given up.

    Raises:
        ValueError: Without `java` on the PATH.
        ImportError: Without pycocoevalcap.
    """

    name = "meteor_java"
    language = "en"
    # Of `-l en`: the weight of content words (that of function words is the rest), of each kind of match.
    _delta = 0.75
    _weights = np.array([1.0, 0.6, 0.8, 0.6])  # equal word, stem, synonym, paraphrase

    def __init__(self, timeout: float = 1800.0) -> None:
        java = shutil.which("java")
        if java is None:
            raise ValueError("METEOR's Java release needs the command `java`, which was not found on the PATH.")
        package = find_spec("pycocoevalcap")
        folders = package.submodule_search_locations if package else None
        jars = [jar for folder in folders or () for jar in sorted(Path(folder).glob("meteor/meteor-*.jar"))]
        if not jars:
            raise ImportError("METEOR's Java release comes with pycocoevalcap: pip install pycocoevalcap")
        self.timeout = timeout
        self.jar = jars[0]
        self._command = [java, "-Xmx2G", "-Djava.awt.headless=true", "-jar", str(self.jar)]

    def measure(self, predictions: Sequence[str], references: Sequence[str]) -> SumMeasurement:
        """Returns the corpus score, "meteor_java", of N English reports against one reference each.

        Raises:
            ValueError: If Java fails or does not finish in time.
        """
        pairs = [
            (" ".join(ours.split()), " ".join(theirs.split()))
            for ours, theirs in zip(predictions, references, strict=True)
        ]
        rows: dict[tuple[str, str], int] = {}
        places = [rows.setdefault(pair, len(rows)) for pair in pairs]
        counts = self._run(list(rows))
        return SumMeasurement(self._statistics(counts)[places], lambda sums: {self.name: self._combine(sums)})

    def _run(self, pairs: list[tuple[str, str]]) -> np.ndarray:
        """Runs the jar; returns its 23 counts a pair."""
        with tempfile.TemporaryDirectory() as folder:
            files = [Path(folder, name) for name in ("predictions", "references")]
            for path, texts in zip(files, zip(*pairs, strict=True), strict=True):
                path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
            command = [*self._command, *map(str, files), "-l", self.language, "-norm", "-ssOut"]
            try:
                done = subprocess.run(
                    command, stdin=subprocess.DEVNULL, capture_output=True, timeout=self.timeout, check=False
                )
            except subprocess.TimeoutExpired:
                raise ValueError(
                    f"METEOR's Java release took longer than {self.timeout:g} s and was stopped."
                ) from None
        lines = done.stdout.decode("utf-8", "replace").splitlines()
        if done.returncode or len(lines) != len(pairs):
            reason = done.stderr.decode("utf-8", "replace").strip().splitlines()[-1:] or ["it said nothing"]
            raise ValueError(
                f"METEOR's Java release failed: exit status {done.returncode}, {len(lines)} results for {len(pairs)} "
                f"reports, {reason[0]}"
            )
        return np.array([line.split() for line in lines], dtype=np.float64)

    def _statistics(self, counts: np.ndarray) -> np.ndarray:
        """Weighs words: (N, 23) counts to (N, 6) weighted matches and lengths of both sides, chunks, matches."""
        lengths, functions = counts[:, :2], counts[:, 2:4]  # prediction, reference
        kinds = counts[:, 4:20].reshape(-1, 4, 2, 2)  # kind of match, content or function word, side
        content, function = (np.einsum("nks,k->ns", kinds[:, :, kind], self._weights) for kind in (0, 1))
        chunks, matches = counts[:, 20], counts[:, 21:].mean(axis=1)
        whole = (kinds.sum(axis=(1, 2)) == lengths).all(axis=1) & (chunks == 1)
        return np.concatenate(
            [
                self._delta * content + (1 - self._delta) * function,
                self._delta * (lengths - functions) + (1 - self._delta) * functions,
                np.where(whole, 0, chunks)[:, None],
                matches[:, None],
            ],
            axis=1,
        )

    def _combine(self, sums: np.ndarray) -> np.ndarray:
        shares = sums[:, :2] / _positive(sums[:, 2:4])
        return fragmentation_score(shares[:, 0], shares[:, 1], sums[:, 4], sums[:, 5])
