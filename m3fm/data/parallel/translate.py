# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Turn a corpus of one language into pairs, by any translator, with each result checked.

A text is translated once, however often it occurs, and whenever the run was stopped: what is done is in the cache.
Reports repeat their sentences, so that sentence by sentence there is much less to translate than report by report.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..schema import LANGUAGES, StudyRecord
from ..tables import is_unicode
from .cache import TranslationCache
from .check_rules import load_rules
from .checks import CheckReport, Difference, PairChecker
from .pairs import ParallelText, machine, texts_of_records
from .translators import Translate, Translator, as_translator

__all__ = [
    "UNITS",
    "CorpusTranslation",
    "TranslationError",
    "TranslationReport",
    "join_sentences",
    "split_sentences",
    "translate_corpus",
    "translate_texts",
]

#: What is translated at a time: a whole report, or each of its sentences.
UNITS = ("report", "sentence")
Rejected = Callable[[ParallelText, list[Difference]], None]
# So many reports are held at a time: enough for batches of texts of one length, little beside a model.
_WINDOW = 2048


class TranslationError(RuntimeError):
    """Tell that a translator failed; what it did before is in the cache. `__cause__` is its own error."""


def translate_texts(
    texts: Sequence[str],
    translator: Translate,
    source: str = "en",
    target: str = "zh",
    cache: TranslationCache | None = None,
    batch_size: int = 32,
    name: str | None = None,
    progress: bool = False,
) -> list[str]:
    """Translate texts, equal ones once, those in the cache not at all, in batches of similar length.

    Args:
        texts: In the language `source`.
        translator: Takes texts and returns as many (see `as_translator`).
        source: Language code.
        target: Language code.
        cache: Where translations are looked for and kept, batch by batch.
        batch_size: Texts at a time.
        name: What to call the translator, where it does not tell.
        progress: Shows a bar.

    Returns:
        A translation for each text; empty where the translator returned nothing, which is not kept.

    Raises:
        TranslationError: If the translator fails, or returns something else than as many texts.
    """
    named = as_translator(translator, name)
    cache = cache if cache is not None else TranslationCache()
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    wanted = dict.fromkeys(texts)
    known = cache.find(wanted, named.name, source, target)
    # The longest first: where memory is short, it shows at once.
    missing = sorted((text for text in wanted if text not in known), key=lambda text: (-len(text), text))
    starts = range(0, len(missing), batch_size)
    for start in tqdm(starts, desc=f"translating {source} to {target}", unit="batch", disable=not progress):
        batch = missing[start : start + batch_size]
        done = dict(zip(batch, _translated(named, batch, start, len(missing), cache.path), strict=True))
        # What came back empty is asked for again in the next run.
        cache.add({text: made for text, made in done.items() if made}, named.name, source, target)
        known.update(done)
    return [known[text] for text in texts]


def _translated(translator: Translator, batch: list[str], done: int, total: int, cache: Path | None) -> list[str]:
    kept = "nothing is kept without a cache" if cache is None else f"they are kept in {cache}"
    where = (
        f"the translator {translator.name} failed after {done} of {total} texts ({kept}), at a batch of {len(batch)}"
    )
    try:
        result = translator(batch)
    except Exception as error:
        raise TranslationError(f"{where}: {type(error).__name__}") from error
    if isinstance(result, str) or not isinstance(result, Sequence):
        raise TranslationError(f"{where}: expected a list of texts, got {type(result).__name__}")
    if len(result) != len(batch):
        raise TranslationError(f"{where}: expected {len(batch)} texts, got {len(result)}")
    for text in result:
        if not isinstance(text, str):
            raise TranslationError(f"{where}: expected texts, got {type(text).__name__}")
        if not is_unicode(text):
            raise TranslationError(f"{where}: expected Unicode, got half of a surrogate pair")
    return [" ".join(text.split()) for text in result]


def split_sentences(text: str, language: str) -> list[str]:
    """Split a report into sentences by the rules of its language, white space normalised."""
    return [part for part in load_rules(language).sentence_break.split(" ".join(text.split())) if part]


def join_sentences(sentences: Sequence[str], language: str) -> str:
    """Join sentences to a report by the rules of its language; one without an end gets a full stop."""
    rules = load_rules(language)
    ended = [text if rules.sentence_closed.search(text) else text + rules.full_stop for text in sentences]
    return rules.joiner.join(ended)


@dataclass
class TranslationReport:
    """Count what became of a corpus.

    Attributes:
        texts: Reports that came.
        units: What was to be translated: reports or sentences, with repetitions.
        distinct: Different ones among them, within what was held at a time.
        from_cache: Of these, how many were there already.
        checked: What the checks said.
    """

    texts: int = 0
    units: int = 0
    distinct: int = 0
    from_cache: int = 0
    checked: CheckReport = field(default_factory=CheckReport)

    def as_dict(self) -> dict[str, Any]:
        """Return all counts."""
        counts = {name: getattr(self, name) for name in ("texts", "units", "distinct", "from_cache")}
        return {**counts, "translated": self.distinct - self.from_cache, **self.checked.as_dict()}


class CorpusTranslation:
    """Yields the pairs of a corpus that pass the checks; what `translate_corpus` returns.

    Attributes:
        report: Counts, up to where the latest iteration is.
    """

    def __init__(
        self,
        corpus: Iterable[StudyRecord | ParallelText],
        translator: Translator,
        languages: tuple[str, str],
        cache: TranslationCache,
        checker: PairChecker,
        unit: str,
        batch_size: int,
        progress: bool,
        on_rejected: Rejected | None,
    ):
        self.report = TranslationReport()
        self._corpus = corpus
        self._translator = translator
        self._source, self._target = languages
        self._cache = cache
        self._checker = checker
        self._unit = unit
        self._batch_size = batch_size
        self._progress = progress
        self._on_rejected = on_rejected

    def __iter__(self) -> Iterator[ParallelText]:
        self.report = TranslationReport()
        texts = iter(_texts(self._corpus, self._source))
        with tqdm(desc="reports", unit="report", disable=not self._progress) as bar:
            while window := list(islice(texts, _WINDOW)):
                for pair in self._pairs(window):
                    differences = self._checker.check(pair.texts)
                    self.report.checked.add(differences)
                    if not differences:
                        yield pair
                    elif self._on_rejected:
                        self._on_rejected(pair, differences)
                bar.update(len(window))

    def _pairs(self, window: list[ParallelText]) -> Iterator[ParallelText]:
        texts = [each.texts[self._source] for each in window]
        units = [split_sentences(text, self._source) if self._unit == "sentence" else [text] for text in texts]
        distinct = list(dict.fromkeys(part for parts in units for part in parts))
        self.report.texts += len(texts)
        self.report.units += sum(map(len, units))
        self.report.distinct += len(distinct)
        self.report.from_cache += len(self._cache.find(distinct, self._translator.name, self._source, self._target))
        translations = translate_texts(
            distinct,
            self._translator,
            self._source,
            self._target,
            self._cache,
            self._batch_size,
            progress=self._progress,
        )
        known = dict(zip(distinct, translations, strict=True))
        for each, parts in zip(window, units, strict=True):
            translated = [known[part] for part in parts]
            # Without one of its sentences it is no translation.
            text = self._joined(translated) if all(translated) else ""
            pair = {self._source: each.texts[self._source], self._target: text}
            yield replace(each, texts={code: pair[code] for code in LANGUAGES}, origin=machine(self._translator.name))

    def _joined(self, parts: list[str]) -> str:
        return join_sentences(parts, self._target) if self._unit == "sentence" else parts[0]


def translate_corpus(
    corpus: Iterable[StudyRecord | ParallelText],
    translator: Translate,
    target: str = "zh",
    cache: TranslationCache | None = None,
    checks: PairChecker | None = None,
    unit: str = "sentence",
    batch_size: int = 32,
    name: str | None = None,
    progress: bool = False,
    on_rejected: Rejected | None = None,
) -> CorpusTranslation:
    """Translate a corpus as it streams by, and yield the pairs that pass the checks.

    ```python
    run = translate_corpus(open_set("/data/mimic-cxr"), my_translator, cache=TranslationCache("zh.sqlite"))
    write_pairs("pairs.jsonl", run)
    print(run.report.as_dict())
    ```

    Args:
        corpus: Studies, or texts of `read_corpus`; those without a report in the other language are left out, and a
            translation that is there is not used.
        translator: Takes texts and returns as many.
        target: The language to translate to; from the other one.
        cache: Where translations are kept; None: in memory.
        checks: What a pair has to pass; None: all checks. An empty translation never passes.
        unit: "report" or "sentence".
        batch_size: Units at a time.
        name: What to call the translator, where it does not tell.
        progress: Shows bars.
        on_rejected: Is given each pair that does not pass, with what differs.

    Raises:
        ValueError: For an unknown language or unit, or a translator without a name.
    """
    if target not in LANGUAGES:
        raise ValueError(f"target must be one of {', '.join(LANGUAGES)}, got {target!r}")
    if unit not in UNITS:
        raise ValueError(f"unit must be one of {', '.join(UNITS)}, got {unit!r}")
    source = next(language for language in LANGUAGES if language != target)
    return CorpusTranslation(
        corpus,
        as_translator(translator, name),
        (source, target),
        cache if cache is not None else TranslationCache(),
        checks if checks is not None else PairChecker(),
        unit,
        batch_size,
        progress,
        on_rejected,
    )


def _texts(corpus: Iterable[StudyRecord | ParallelText], source: str) -> Iterator[ParallelText]:
    for each in corpus:
        if isinstance(each, ParallelText):
            if each.texts.get(source):
                yield each
        else:
            yield from texts_of_records([each], [source])
