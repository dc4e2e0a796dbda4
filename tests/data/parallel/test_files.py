# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Whole files, as the command line translates and checks them."""

import json
import multiprocessing
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from m3fm.data.parallel import Translator, check_pairs_file, read_pairs, translate_files

CHINESE = {"Clear lungs.": "双肺清晰。", "Mild cardiomegaly.": "心脏重度增大。", "No mass.": "无肿块。"}


def dictionary(texts: Sequence[str]) -> list[str]:
    return [CHINESE[text] for text in texts]


@pytest.fixture
def reports(tmp_path: Path) -> Path:
    path = tmp_path / "reports.jsonl"
    rows = [
        {"study_id": "a", "en": "Clear lungs. No mass."},
        {"study_id": "b", "en": "Mild cardiomegaly."},
        {"study_id": "c", "en": ""},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_translate(tmp_path: Path, reports: Path) -> None:
    output, rejected = tmp_path / "pairs.jsonl", tmp_path / "rejected.jsonl"

    counts = translate_files(reports, dictionary, output, rejected=rejected, on_bad="skip", progress=False)

    assert (counts["texts"], counts["written"], counts["rejected"], counts["bad_rows"]) == (2, 1, 1, 1)
    assert "reports.jsonl, line 3" in counts["bad_row_summary"]
    (pair,) = read_pairs(output)
    assert (pair.study_id, pair.texts["zh"]) == ("a", "双肺清晰。无肿块。")
    assert pair.origin.endswith("test_files:dictionary")
    row = json.loads(rejected.read_text(encoding="utf-8"))
    assert (row["study_id"], row["zh"]) == ("b", "心脏重度增大。")
    assert {difference["kind"] for difference in row["differences"]} == {"severity"}
    assert (tmp_path / "pairs.jsonl.cache.sqlite").is_file()


def translate_and_die(path: Path, cache: Path, output: Path) -> None:
    batches = []

    def translate(texts: Sequence[str]) -> list[str]:
        if len(batches) == 2:
            os._exit(9)
        batches.append(texts)
        return ["结节。"] * len(texts)

    translate_files(path, Translator("nodules", translate), output, cache=cache, batch_size=2)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="a child has to die")
def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    texts = [f"Nodule {'i' * number}." for number in range(6)]
    path, cache, output = tmp_path / "texts.jsonl", tmp_path / "cache.sqlite", tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({"en": text}) + "\n" for text in texts), encoding="utf-8")
    died = multiprocessing.get_context("fork").Process(target=translate_and_die, args=(path, cache, output))
    died.start()
    died.join()
    asked = []

    def translate(batch: Sequence[str]) -> list[str]:
        asked.extend(batch)
        return ["结节。"] * len(batch)

    named = Translator("nodules", translate)
    counts = translate_files(path, named, output, cache=cache, batch_size=2, kinds=[], progress=False)

    assert died.exitcode == 9
    assert sorted(asked) == texts[:2]
    assert counts["written"] == 6


def test_translate_again_asks_nothing(tmp_path: Path, reports: Path) -> None:
    options = {"cache": tmp_path / "cache.sqlite", "on_bad": "skip", "progress": False}
    translate_files(reports, dictionary, tmp_path / "first.jsonl", **options)

    counts = translate_files(reports, dictionary, tmp_path / "second.jsonl", **options)

    assert counts["translated"] == 0
    assert (tmp_path / "first.jsonl").read_bytes() == (tmp_path / "second.jsonl").read_bytes()


def test_a_translator_named_by_its_place(tmp_path: Path, reports: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "named_translators.py").write_text("def same(texts):\n    return ['双肺清晰。' for _ in texts]\n")
    monkeypatch.syspath_prepend(tmp_path)

    counts = translate_files(
        reports, "named_translators:same", tmp_path / "p.jsonl", kinds=[], on_bad="skip", progress=False
    )

    assert counts["written"] == 2


def test_a_bad_row_ends_the_run(tmp_path: Path, reports: Path) -> None:
    with pytest.raises(ValueError, match=r"reports.jsonl, line 3: column 'en' is missing or empty"):
        translate_files(reports, dictionary, tmp_path / "p.jsonl", progress=False)
    assert not (tmp_path / "p.jsonl").exists()


def test_files_are_not_replaced(tmp_path: Path, reports: Path) -> None:
    with pytest.raises(ValueError, match="must be different files"):
        translate_files(reports, dictionary, reports, progress=False)
    with pytest.raises(ValueError, match="must be different files"):
        check_pairs_file(reports, accepted=tmp_path / "x.jsonl", rejected=tmp_path / "x.jsonl", progress=False)


def test_check(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text("en,zh\nMild cardiomegaly.,心脏重度增大。\nNo mass.,无肿块。\nNo mass.,\n", encoding="utf-8")
    accepted, rejected = tmp_path / "accepted.jsonl", tmp_path / "rejected.jsonl"

    counts = check_pairs_file(path, accepted, rejected, on_bad="skip", progress=False)

    assert (counts["pairs"], counts["accepted"], counts["bad_rows"]) == (2, 1, 1)
    assert counts["rejected_by_kind"] == {"severity": 1}
    assert [pair.texts["en"] for pair in read_pairs(accepted)] == ["No mass."]
    assert len(rejected.read_text(encoding="utf-8").splitlines()) == 1
    assert counts["table"].startswith("| |")
    assert check_pairs_file(path, on_bad="skip", progress=False)["accepted"] == 1


def test_wrong_requests_leave_nothing_behind(tmp_path: Path, reports: Path) -> None:
    output = tmp_path / "pairs.jsonl"
    for path, target, unit, message in (
        (reports, "fr", "sentence", "expected a target of"),
        (reports, "zh", "word", "and a unit of"),
        (tmp_path / "gone", "zh", "sentence", "no such data set or file"),
    ):
        with pytest.raises(ValueError, match=message):
            translate_files(path, "builtins:list", output, target, unit=unit, progress=False)
    assert not list(tmp_path.glob("*.sqlite"))


def test_nothing_to_check_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(ValueError, match="no text in both languages to check"):
        check_pairs_file(tmp_path / "pairs.jsonl", progress=False)
