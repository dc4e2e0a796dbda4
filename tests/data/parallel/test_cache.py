# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""The translations kept on disk."""

import os
import sqlite3
from pathlib import Path

import pytest

from m3fm.data.parallel import TranslationCache


def test_translations_outlive_the_process(tmp_path: Path) -> None:
    path = tmp_path / "cache.sqlite"
    with TranslationCache(path) as cache:
        cache.add({"Clear.": "清晰。", "Mass.": "肿块。"}, "a", "en", "zh")

    with TranslationCache(path) as cache:
        assert len(cache) == 2
        assert cache.find(["Mass.", "Nodule.", "Clear."], "a", "en", "zh") == {"Clear.": "清晰。", "Mass.": "肿块。"}


def test_translators_and_directions_never_mix(tmp_path: Path) -> None:
    with TranslationCache(tmp_path / "cache.sqlite") as cache:
        cache.add({"CT": "断层"}, "a", "en", "zh")
        cache.add({"CT": "扫描"}, "b", "en", "zh")

        assert cache.find(["CT"], "a", "en", "zh") == {"CT": "断层"}
        assert cache.find(["CT"], "b", "en", "zh") == {"CT": "扫描"}
        assert cache.find(["CT"], "a", "zh", "en") == {}
        assert cache.find(["CT"], "c", "en", "zh") == {}


def test_what_is_added_is_on_disk_at_once(tmp_path: Path) -> None:
    first = TranslationCache(tmp_path / "cache.sqlite")
    first.add({"Clear.": "清晰。"}, "a", "en", "zh")
    second = TranslationCache(tmp_path / "cache.sqlite")

    assert second.find(["Clear."], "a", "en", "zh") == {"Clear.": "清晰。"}
    first.close()
    second.close()


def test_more_texts_than_one_query_takes() -> None:
    texts = {f"Nodule {number}.": f"结节{number}" for number in range(1200)}
    cache = TranslationCache()
    cache.add(texts, "a", "en", "zh")

    assert cache.find([*texts, "Other."], "a", "en", "zh") == texts


@pytest.mark.skipif(os.name != "posix", reason="file permissions of POSIX")
def test_only_its_owner_may_read_it(tmp_path: Path) -> None:
    TranslationCache(tmp_path / "cache.sqlite").close()

    assert (tmp_path / "cache.sqlite").stat().st_mode & 0o077 == 0


def test_other_files_are_refused_and_left_alone(tmp_path: Path) -> None:
    text, other = tmp_path / "notes.txt", tmp_path / "other.sqlite"
    text.write_text("no database at all, but long enough to be looked at " * 40)
    with sqlite3.connect(other) as database:
        database.execute("CREATE TABLE patients (name TEXT)")
    before = text.read_bytes()

    with pytest.raises(ValueError, match=r"notes.txt: expected a cache of translations"):
        TranslationCache(text)
    with pytest.raises(ValueError, match=r"other.sqlite: expected a cache of translations, got another database"):
        TranslationCache(other)
    with pytest.raises(ValueError, match="in a folder that exists"):
        TranslationCache(tmp_path / "none" / "cache.sqlite")
    assert text.read_bytes() == before


def test_damage_inside_is_named(tmp_path: Path) -> None:
    path = tmp_path / "cache.sqlite"
    with TranslationCache(path) as cache:
        cache.add({f"Text {number}.": "译文。" * 200 for number in range(200)}, "a", "en", "zh")
    content = bytearray(path.read_bytes())
    content[8192:] = b"\xab" * (len(content) - 8192)
    path.write_bytes(content)
    with TranslationCache(path) as cache, pytest.raises(ValueError, match=r"cache\.sqlite: expected a cache"):
        cache.find([f"Text {number}." for number in range(200)], "a", "en", "zh")


def test_a_file_in_use_is_told_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("m3fm.data.parallel.cache._WAIT_SECONDS", 0.05)
    path = tmp_path / "cache.sqlite"
    TranslationCache(path).close()
    holder = sqlite3.connect(path)
    holder.execute("BEGIN EXCLUSIVE")
    with pytest.raises(ValueError, match="in use by another process"):
        TranslationCache(path).add({"a": "b"}, "a", "en", "zh")
    holder.rollback()
    holder.close()
