# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Bilingual corpora: pairs of English and Chinese texts from any source, their translation, and checks of it."""

from .cache import TranslationCache
from .checks import KINDS, CheckReport, Difference, PairChecker
from .files import check_pairs_file, translate_files
from .pairs import ParallelText, read_aligned, read_corpus, read_pairs, texts_of_records, write_pairs
from .translate import TranslationError, TranslationReport, translate_corpus, translate_texts
from .translators import Translator, as_translator, load_translator, transformers_translator

__all__ = [
    "KINDS",
    "CheckReport",
    "Difference",
    "PairChecker",
    "ParallelText",
    "TranslationCache",
    "TranslationError",
    "TranslationReport",
    "Translator",
    "as_translator",
    "check_pairs_file",
    "load_translator",
    "read_aligned",
    "read_corpus",
    "read_pairs",
    "texts_of_records",
    "transformers_translator",
    "translate_corpus",
    "translate_files",
    "translate_texts",
    "write_pairs",
]
