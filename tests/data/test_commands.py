# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""`m3fm data` as it is typed, on an own folder of a few radiographs."""

import json

import numpy as np
import pytest
from PIL import Image

from m3fm.data.opening import open_set
from m3fm.data.splits import read_split
from m3fm_cli import main

SECRET = "DOE-4711"


def picture(number):
    """Draw clouds: phantoms of radiographs are near-duplicates of each other."""
    small = np.random.default_rng(number).integers(0, 255, (7, 6), dtype=np.uint8)
    return Image.fromarray(small).resize((112, 128), Image.Resampling.BICUBIC)


@pytest.fixture
def folder(tmp_path):
    """Twelve studies of six patients; patient 0 is in two parts."""
    rows = []
    place = tmp_path / "mine"
    place.mkdir()
    for number in range(12):
        picture(number).save(place / f"{number}.png")
        patient = number // 2 if number else 0
        rows.append(
            {
                "file_name": f"{number}.png",
                "modality": "cxr",
                "view": "PA",
                "patient_id": f"{SECRET}-{patient}",
                "report_en": f"No effusion. {SECRET}" if number % 2 else "The heart is enlarged.",
                "report_zh": "未见胸腔积液。" if number % 2 else "心影增大。",
                "labels": [] if number % 2 else ["Cardiomegaly"],
                "split": "validation" if number == 1 else "train",
            }
        )
    (place / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return place


@pytest.fixture
def broken(folder):
    """The same with one row whose image is not there, and one whose label nobody knows."""
    lines = (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    lines[3] = lines[3].replace('"3.png"', '"gone.png"')
    lines[4] = lines[4].replace("Cardiomegaly", "Hiccups")
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def run(capsys, *words):
    code = main(["data", *map(str, words)])
    said = capsys.readouterr()
    assert SECRET not in said.out + said.err
    return code, said.out, said.err


def test_inspect_says_what_is_there(folder, capsys):
    code, out, _ = run(capsys, "inspect", folder)
    assert code == 0
    assert "| train | 11 | 6 | 11 | 11 | 11 |" in out
    assert "| validation | 1 | 1 | 1 | 1 | 1 |" in out
    assert "| Cardiomegaly | 6 |" in out
    code, out, _ = run(capsys, "inspect", folder, "--json", "--part", "validation")
    content = json.loads(out)
    assert code == 0
    assert (content["set"], content["statistics"]["studies"], content["bad_rows"]) == ("folder", 1, {})


def test_inspect_names_bad_rows_and_counts_the_others(broken, capsys):
    code, out, err = run(capsys, "inspect", broken)
    assert code == 2
    assert "- bad rows, metadata.jsonl: missing_file: 1" in out
    assert "metadata.jsonl, line 4" in err
    assert "metadata.jsonl, line 5" in err
    assert "| train | 9 |" in out
    code, _, err = run(capsys, "inspect", broken, "--on-bad", "raise")
    assert code == 2
    assert err.rstrip().splitlines()[-1].startswith("error: ")
    code, out, _ = run(capsys, "inspect", broken, "--tables-only")
    assert "missing_file" not in out


def test_stats_writes_tables_and_a_picture(folder, tmp_path, capsys):
    (folder / "11.png").write_bytes((folder / "1.png").read_bytes())  # in training and in validation
    code, _, err = run(capsys, "stats", folder, "--output", tmp_path / "stats")
    assert code == 0
    assert "LEAK: 1 of the 1 studies of validation (100 %)" in err
    content = json.loads((tmp_path / "stats/stats.json").read_text(encoding="utf-8"))
    assert content["statistics"]["near_duplicates"]["pairs"] == 1
    assert content["statistics"]["image_files"]["kinds"] == {"PNG": 12}
    assert content["leaks"]["is_clean"] is False
    page = (tmp_path / "stats/stats.md").read_text(encoding="utf-8")
    assert "Near-duplicate images: 1 pairs" in page
    assert SECRET not in page + json.dumps(content)
    with Image.open(tmp_path / "stats/stats.png") as drawn:
        assert drawn.width > 500


def test_stats_of_tables_alone_opens_no_image(folder, tmp_path, capsys):
    for path in folder.glob("*.png"):
        path.unlink()
    code, _, _ = run(capsys, "stats", folder, "--output", tmp_path / "stats", "--tables-only")
    content = json.loads((tmp_path / "stats/stats.json").read_text(encoding="utf-8"))
    assert code == 0
    assert "image_files" not in content["statistics"]
    assert content["leaks"]["looked_at_images"] is False


def test_split_then_convert_then_check(folder, tmp_path, capsys):
    words = ("--fractions", "0.5", "0.25", "0.25", "--output", tmp_path / "split.json")
    code, out, _ = run(capsys, "split", folder, *words)
    assert code == 0
    assert "No two parts share" in out
    parts = read_split(tmp_path / "split.json")
    assert len(parts) == 12
    code, _, err = run(
        capsys, "convert", folder, "--split-file", tmp_path / "split.json", "--output", tmp_path / "out", "--size", 64
    )
    assert code == 0
    assert {record.study_id: record.split for record in open_set(tmp_path / "out")} == dict(parts)
    assert "1 shards" not in err
    code, out, _ = run(capsys, "split", tmp_path / "out", "--check")
    assert code == 0
    code, out, _ = run(capsys, "split", folder, "--check", "--by", "patient", "--leaks", tmp_path / "leaks.jsonl")
    assert code == 2
    assert "LEAK: 1 of the 1 studies of validation" in out
    (line,) = [json.loads(line) for line in (tmp_path / "leaks.jsonl").read_text().splitlines() if "patient" in line]
    assert line == {"kind": "patient", "studies": {"train": ["0"], "validation": ["1"]}}


def test_convert_with_pseudonyms_and_bad_rows(broken, tmp_path, capsys):
    words = ("--pseudonyms", tmp_path / "key", "--on-bad", "skip", "--output", tmp_path / "out")
    code, _, err = run(capsys, "convert", broken, *words)
    assert code == 2
    assert "9 train, 1 validation: 2 shards" in err
    records = list(open_set(tmp_path / "out"))
    assert len(records) == 10
    assert len({record.patient_id for record in records}) == 6
    assert not any(SECRET in str(record.patient_id) for record in records)


def test_translate_and_check_pairs(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "made_translator.py").write_text(
        "WORDS = {'The heart is enlarged.': '心影增大。', 'No effusion.': '可见胸腔积液。'}\n"
        "def translate(texts):\n    return [WORDS.get(text, '其他。') for text in texts]\n",
        encoding="utf-8",
    )
    words = ("--to", "zh", "--translator", "made_translator:translate", "--output", tmp_path / "pairs.jsonl")
    code, _, err = run(capsys, "translate", folder, *words, "--rejected", tmp_path / "rejected.jsonl")
    assert code == 0
    accepted = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {pair["zh"] for pair in accepted} == {"心影增大。"}
    rejected = (tmp_path / "rejected.jsonl").read_text(encoding="utf-8")
    assert "negation" in rejected
    code, out, _ = run(capsys, "check-pairs", tmp_path / "pairs.jsonl")
    assert code == 0
    assert "| rejected | 0 |" in out


def test_errors_say_what_was_expected(tmp_path, folder, capsys):
    for words, message in (
        (("inspect", tmp_path / "gone"), "no such folder"),
        (("inspect", folder, "--set", "imagenet"), "unknown data set 'imagenet'; expected one of"),
        (("split", folder, "--output", tmp_path / "s.json", "--fractions", "0.5"), "two or three fractions, got 1"),
        (("convert", folder, "--images", "paths", "--size", 64, "--output", tmp_path / "o"), "images='bytes'"),
        (("stats", folder, "--part", "nowhere", "--output", tmp_path / "o"), "no study to count"),
        (("inspect", folder, "--part", "nowhere"), "no study to count"),
    ):
        code, _, err = run(capsys, *words)
        assert code == 2
        assert message in err
