# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Translate and check whole files: what `m3fm data translate` and `m3fm data check-pairs` call."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import IO, Any

from tqdm.auto import tqdm

from ..schema import LANGUAGES
from ..tables import Reading
from .cache import TranslationCache
from .checks import KINDS, CheckReport, Difference, PairChecker
from .pairs import ParallelText, open_output, read_corpus, write_pairs
from .translate import UNITS, translate_corpus
from .translators import Translate, load_translator

__all__ = ["check_pairs_file", "translate_files"]

_Reject = Callable[[ParallelText, Sequence[Difference]], None]


def translate_files(
    path: str | Path,
    translator: str | Translate,
    output: str | Path,
    target: str = "zh",
    cache: str | Path | None = None,
    rejected: str | Path | None = None,
    unit: str = "sentence",
    batch_size: int = 32,
    kinds: Iterable[str] = KINDS,
    on_bad: str = "raise",
    progress: bool = True,
) -> dict[str, Any]:
    """Translate the reports of a data set or of a file of texts, and write the pairs that pass the checks.

    Args:
        path: A data set in a layout that `open_set` knows, or a file that `read_pairs` reads.
        translator: "package.module:callable" (see `load_translator`), or the callable itself.
        output: Gets the pairs as JSON lines.
        target: The language to translate to.
        cache: The file in which translations are kept; a run that was stopped goes on from it. None: beside the
            output, with ".cache.sqlite" after its name.
        rejected: Gets the pairs that do not pass, with what differs: study ids and texts. None: they are counted only.
        unit: "report" or "sentence".
        batch_size: Reports or sentences at a time.
        kinds: What to check, of `KINDS`.
        on_bad: "raise": a bad row ends the run; "skip": it is counted.
        progress: Shows bars.

    Returns:
        Counts: of `TranslationReport.as_dict`, "written", "bad_rows" (how many) and "bad_row_summary" (a line a file
        and kind).

    Raises:
        ValueError: For a path, translator, language or option that is not known, or outputs that would replace the
            input or each other.
        TranslationError: If the translator fails; what it did is in the cache.
    """
    cache = Path(f"{output}.cache.sqlite") if cache is None else Path(cache)
    _check_paths(path, output, cache, rejected)
    named = load_translator(translator) if isinstance(translator, str) else translator
    reading = Reading(on_bad, images="unchecked")
    _check_request(path, target, unit)
    source = [language for language in LANGUAGES if language != target]
    with TranslationCache(cache) as kept, _rejects(rejected) as reject:
        run = translate_corpus(
            read_corpus(path, source, reading),
            named,
            target,
            kept,
            PairChecker(kinds),
            unit,
            batch_size,
            progress=progress,
            on_rejected=reject,
        )
        written = write_pairs(output, run)
    return {**run.report.as_dict(), "written": written, **_bad_rows(reading)}


def check_pairs_file(
    path: str | Path,
    accepted: str | Path | None = None,
    rejected: str | Path | None = None,
    kinds: Iterable[str] = KINDS,
    on_bad: str = "raise",
    progress: bool = True,
) -> dict[str, Any]:
    """Check the pairs of a file, or of a data set that has both languages.

    Args:
        path: A file that `read_pairs` reads, or a folder (see `read_corpus`).
        accepted: Gets the pairs that pass, as JSON lines; None: they are counted only.
        rejected: Gets those that do not, with what differs: study ids and texts. None: they are counted only.
        kinds: What to check, of `KINDS`.
        on_bad: "raise": a bad row ends the run; "skip": it is counted.
        progress: Shows a bar.

    Returns:
        Counts: of `CheckReport.as_dict`, "table" (Markdown), "bad_rows" and "bad_row_summary".

    Raises:
        ValueError: For a path or kind that is not known, or outputs that would replace the input or each other.
    """
    _check_paths(path, accepted, rejected)
    reading, checker, report = Reading(on_bad, images="unchecked"), PairChecker(kinds), CheckReport()
    pairs = tqdm(read_corpus(path, LANGUAGES, reading), desc="checking", unit="pair", disable=not progress)
    with _rejects(rejected) as reject:

        def passing() -> Iterator[ParallelText]:
            for pair in pairs:
                differences = checker.check({language: pair.texts[language] for language in LANGUAGES})
                report.add(differences)
                if not differences:
                    yield pair
                elif reject is not None:
                    reject(pair, differences)

        if accepted is None:
            for _ in passing():
                pass
        else:
            write_pairs(accepted, passing())
    if not report.accepted + report.rejected:
        raise ValueError(f"{path}: no text in both languages to check. {reading.summary()}".strip())
    return {**report.as_dict(), "table": report.table(), **_bad_rows(reading)}


def _bad_rows(reading: Reading) -> dict[str, Any]:
    return {"bad_rows": sum(reading.counts.values()), "bad_row_summary": reading.summary()}


def _check_request(path: str | Path, target: str, unit: str) -> None:
    """Check what is asked for before a cache is made."""
    if target not in LANGUAGES or unit not in UNITS:
        raise ValueError(f"expected a target of {LANGUAGES} and a unit of {UNITS}, got {target!r} and {unit!r}")
    if not Path(path).exists():
        raise ValueError(f"{path}: no such data set or file")


def _check_paths(*paths: str | Path | None) -> None:
    resolved = [Path(path).resolve() for path in paths if path is not None]
    if len(set(resolved)) < len(resolved):
        raise ValueError("input, outputs and cache must be different files")


@contextmanager
def _rejects(path: str | Path | None) -> Iterator[_Reject | None]:
    """Open a file of rejected pairs; None without a path."""
    with nullcontext() if path is None else open_output(path) as file:
        yield None if file is None else _writer(file)


def _writer(file: IO[str]) -> _Reject:
    def write(pair: ParallelText, differences: Sequence[Difference]) -> None:
        row = {**pair.as_row(), "differences": [difference.as_dict() for difference in differences]}
        file.write(json.dumps(row, ensure_ascii=False) + "\n")

    return write
