# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Translations kept on disk, so that nothing is ever translated twice.

The file holds the texts themselves, and is as private as the corpus: keep it where the corpus is kept. On systems that
know file permissions it is made readable by its owner alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType

__all__ = ["TranslationCache"]

# Marks the files of this class among other databases: "m3fT".
_APPLICATION = 0x6D336654
_VERSION = 1
_MAX_PARAMETERS = 500
_WAIT_SECONDS = 60.0


class TranslationCache:
    """Keeps translations by translator, direction and text; two translators never mix.

    Several processes may use one file. What `add` was given is on disk when it returns, whatever happens then.

    Args:
        path: The SQLite file, made if missing; None keeps all in memory.

    Raises:
        ValueError: If the file is something else, or its folder is missing.
    """

    def __init__(self, path: str | Path | None = None):
        self.path = None if path is None else Path(path)
        if self.path is not None:
            if self.path.is_dir() or not self.path.absolute().parent.is_dir():
                raise ValueError(f"{self.path}: expected a file in a folder that exists")
            if not self.path.exists():
                os.close(os.open(self.path, os.O_CREAT | os.O_WRONLY, 0o600))
        try:
            self._database = sqlite3.connect(self.path or ":memory:", timeout=_WAIT_SECONDS)
            self._prepare()
        except sqlite3.DatabaseError as error:
            raise self._failed(error) from None

    def _failed(self, error: sqlite3.DatabaseError) -> ValueError:
        if isinstance(error, sqlite3.OperationalError):
            return ValueError(f"{self.path}: the cache of translations is in use by another process, or not writable")
        return ValueError(f"{self.path}: expected a cache of translations, got {type(error).__name__}")

    def _prepare(self) -> None:
        known = self._database.execute("PRAGMA application_id").fetchone()[0]
        version = self._database.execute("PRAGMA user_version").fetchone()[0]
        tables = self._database.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if tables and (known, version) != (_APPLICATION, _VERSION):
            self._database.close()
            raise ValueError(f"{self.path}: expected a cache of translations, got another database")
        with self._database:
            self._database.execute(f"PRAGMA application_id = {_APPLICATION}")
            self._database.execute(f"PRAGMA user_version = {_VERSION}")
            self._database.execute(
                "CREATE TABLE IF NOT EXISTS translations (key BLOB PRIMARY KEY, translator TEXT NOT NULL, "
                "source TEXT NOT NULL, target TEXT NOT NULL, text TEXT NOT NULL, translation TEXT NOT NULL) "
                "WITHOUT ROWID"
            )

    def __enter__(self) -> TranslationCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def __len__(self) -> int:
        return self._database.execute("SELECT count(*) FROM translations").fetchone()[0]

    def find(self, texts: Iterable[str], translator: str, source: str, target: str) -> dict[str, str]:
        """Return the translations that are there, by text.

        Args:
            texts: In the language `source`.
            translator: Its name, with all that its translations depend on.
            source: Language code.
            target: Language code.
        """
        keys = {_key(translator, source, target, text): text for text in texts}
        order = list(keys)
        found = {}
        for start in range(0, len(order), _MAX_PARAMETERS):
            part = order[start : start + _MAX_PARAMETERS]
            marks = ",".join("?" * len(part))
            query = f"SELECT key, translation FROM translations WHERE key IN ({marks})"
            try:
                found.update({keys[key]: text for key, text in self._database.execute(query, part)})
            except sqlite3.DatabaseError as error:
                raise self._failed(error) from None
        return found

    def add(self, translations: Mapping[str, str], translator: str, source: str, target: str) -> None:
        """Keep translations by text; those of texts that are already there replace them."""
        rows = [
            (_key(translator, source, target, text), translator, source, target, text, translation)
            for text, translation in translations.items()
        ]
        try:
            with self._database:
                self._database.executemany("INSERT OR REPLACE INTO translations VALUES (?, ?, ?, ?, ?, ?)", rows)
        except sqlite3.DatabaseError as error:
            raise self._failed(error) from None


def _key(translator: str, source: str, target: str, text: str) -> bytes:
    # As JSON, no two different quadruples are the same bytes.
    return hashlib.sha256(json.dumps([translator, source, target, text]).encode()).digest()
