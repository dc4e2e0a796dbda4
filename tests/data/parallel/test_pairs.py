# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Pairs of texts from every kind of file, and back."""

import gzip
import json
from pathlib import Path

import pytest

from m3fm.data.parallel import ParallelText, read_aligned, read_corpus, read_pairs, texts_of_records, write_pairs
from m3fm.data.schema import ReportText, StudyRecord
from m3fm.data.tables import Reading

PAIR = ParallelText(
    {"en": "No effusion.", "zh": "无积液。"}, "s1", "openi", "train", "machine:marian@1", "CC BY-NC-SA 4.0"
)


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.jsonl.gz"])
def test_what_is_written_is_read(tmp_path: Path, name: str) -> None:
    pairs = [PAIR, ParallelText({"en": "Clear lungs.", "zh": "双肺清晰。"}, origin="radiologist", source="own")]

    assert write_pairs(tmp_path / name, pairs) == 2

    assert list(read_pairs(tmp_path / name)) == pairs
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_line_has_the_columns_of_the_format(tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs.jsonl", [PAIR])

    assert json.loads((tmp_path / "pairs.jsonl").read_text(encoding="utf-8")) == {
        "study_id": "s1",
        "en": "No effusion.",
        "zh": "无积液。",
        "source": "openi",
        "split": "train",
        "origin": "machine:marian@1",
        "licence": "CC BY-NC-SA 4.0",
    }


def test_packed_files_are_equal_bytes(tmp_path: Path) -> None:
    write_pairs(tmp_path / "a.jsonl.gz", [PAIR])
    write_pairs(tmp_path / "b.jsonl.gz", [PAIR])

    assert (tmp_path / "a.jsonl.gz").read_bytes() == (tmp_path / "b.jsonl.gz").read_bytes()


def test_a_stopped_writer_leaves_the_earlier_file(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    write_pairs(path, [PAIR])

    def failing():
        yield PAIR
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_pairs(path, failing())

    assert list(read_pairs(path)) == [PAIR]
    assert list(tmp_path.iterdir()) == [path]


def test_output_in_no_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="in a folder that exists"):
        write_pairs(tmp_path / "none" / "pairs.jsonl", [])
    with pytest.raises(ValueError, match="expected a file"):
        write_pairs(tmp_path, [])


def test_two_columns_are_enough(tmp_path: Path) -> None:
    (tmp_path / "own.csv").write_text('en,zh\n"No effusion,\nno mass.",无积液\nClear.,清晰\n', encoding="utf-8-sig")
    (tmp_path / "own.tsv").write_text("en\tzh\nClear.\t清晰\n", encoding="utf-8")

    first, second = read_pairs(tmp_path / "own.csv")
    (third,) = read_pairs(tmp_path / "own.tsv")

    assert first == ParallelText({"en": "No effusion, no mass.", "zh": "无积液"}, source="own")
    assert second.texts == third.texts == {"en": "Clear.", "zh": "清晰"}


def test_columns_of_another_name(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "own.csv.gz", "wt", encoding="utf-8") as file:
        file.write("id,source text,target text\n7,Clear.,清晰\n")

    columns = {"en": "source text", "zh": "target text", "study_id": "id"}
    (pair,) = read_pairs(tmp_path / "own.csv.gz", columns=columns, origin="radiologist")

    assert (pair.study_id, pair.texts["zh"], pair.origin) == ("7", "清晰", "radiologist")
    with pytest.raises(ValueError, match="got deutsch"):
        list(read_pairs(tmp_path / "own.csv.gz", columns={"deutsch": "text"}))


def test_a_pair_of_a_study_comes_once(tmp_path: Path) -> None:
    row = {"study_id": "s1", "en": "Clear.", "zh": "清晰"}
    path = write_lines(tmp_path / "p.jsonl", [row, row, {**row, "study_id": "s2"}, {**row, "zh": "清楚"}])

    assert [(each.study_id, each.texts["zh"]) for each in read_pairs(path)] == [
        ("s1", "清晰"),
        ("s2", "清晰"),
        ("s1", "清楚"),
    ]


def test_texts_in_one_language(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "p.jsonl", [{"en": "Clear."}, {"en": "No mass.", "zh": "无肿块"}])

    assert [dict(each.texts) for each in read_pairs(path, ["en"])] == [
        {"en": "Clear."},
        {"en": "No mass.", "zh": "无肿块"},
    ]


def test_bad_rows_lose_no_good_one(tmp_path: Path) -> None:
    good = [json.dumps({"study_id": f"s{i}", "en": f"Nodule {i}.", "zh": f"结节{i}。"}) for i in range(99)]
    bad = [b'{"en": "Clear.", "zh": ""}', b"no json", b'{"en": "\xff", "zh": "x"}', b"[1]"]
    bad += [b'{"en": "Clear.", "zh": "x", "origin": "Dr. Wu"}', b'{"en": 5, "zh": "x"}']
    lines = [line.encode() for line in good]
    for place, line in enumerate(bad):
        lines.insert(10 * place + 3, line)
    (tmp_path / "p.jsonl").write_bytes(b"\n".join(lines))
    reading = Reading("skip")

    read = list(read_pairs(tmp_path / "p.jsonl", reading=reading))

    assert [each.study_id for each in read] == [f"s{i}" for i in range(99)]
    assert {kind: count for (_, kind), count in reading.counts.items()} == {
        "bad_value": 3,
        "not_a_row": 2,
        "bad_encoding": 1,
    }
    assert [error.line for error in reading.examples] == [4, 14, 24, 34, 44, 54]
    assert "Wu" not in reading.summary()
    with pytest.raises(ValueError, match=r"p.jsonl, line 4: column 'zh' is missing or empty"):
        list(read_pairs(tmp_path / "p.jsonl"))


def test_a_table_without_the_columns_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "own.csv").write_text("english,chinese\na,b\n", encoding="utf-8")

    with pytest.raises(ValueError, match=r"expected the columns \['en', 'zh'\]"):
        list(read_pairs(tmp_path / "own.csv", reading=Reading("skip")))


def test_a_file_of_no_known_kind_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "own.xlsx").write_bytes(b"PK")

    with pytest.raises(ValueError, match=r"own.xlsx: expected a file of texts"):
        list(read_pairs(tmp_path / "own.xlsx"))


def test_aligned_files(tmp_path: Path) -> None:
    (tmp_path / "corpus.en").write_text("Clear.\n\nNo  mass.\n", encoding="utf-8")
    (tmp_path / "corpus.zh").write_text("清晰。\r\n\r\n无肿块。", encoding="utf-8")
    files = {"en": tmp_path / "corpus.en", "zh": tmp_path / "corpus.zh"}

    assert [dict(pair.texts) for pair in read_aligned(files, origin="machine:x")] == [
        {"en": "Clear.", "zh": "清晰。"},
        {"en": "No mass.", "zh": "无肿块。"},
    ]


def test_aligned_files_with_bad_lines(tmp_path: Path) -> None:
    (tmp_path / "c.en").write_bytes(b"Clear.\nNo mass.\n\nNodule.\n")
    (tmp_path / "c.zh").write_bytes("清晰\n\n结节\n".encode() + b"\xff\n")
    files = {"en": tmp_path / "c.en", "zh": tmp_path / "c.zh"}
    reading = Reading("skip")

    assert [pair.texts["en"] for pair in read_aligned(files, reading)] == ["Clear."]
    assert [(error.kind, error.line) for error in reading.examples] == [
        ("bad_value", 2),
        ("bad_value", 3),
        ("bad_encoding", 4),
    ]


def test_aligned_files_of_other_lengths_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "c.en").write_text("Clear.\nNo mass.\n", encoding="utf-8")
    (tmp_path / "c.zh").write_text("清晰\n", encoding="utf-8")

    with pytest.raises(ValueError, match=r"c.zh: expected 2 lines as in c.en, got 1"):
        list(read_aligned({"en": tmp_path / "c.en", "zh": tmp_path / "c.zh"}, Reading("skip")))
    with pytest.raises(ValueError, match="expected a file for each of en, zh, got en"):
        list(read_aligned({"en": tmp_path / "c.en"}))


def test_records_with_both_languages() -> None:
    english, chinese = ReportText("Clear.", raw="Clear. XXXX"), ReportText("清晰。")
    translated = ReportText("清晰。", is_translated=True)
    shared = {"source": "cov_ctr", "modality": "ct", "split": "train", "licence": "Apache-2.0"}
    records = [
        StudyRecord("a", reports={"en": english, "zh": chinese}, **shared),
        StudyRecord("b", reports={"en": english}, **shared),
        StudyRecord("c", reports={"en": english, "zh": translated}, **shared),
    ]

    first, second = texts_of_records(records)

    assert first == ParallelText(
        {"en": "Clear.", "zh": "清晰。"}, "a", "cov_ctr", "train", "radiologist", "Apache-2.0"
    )
    assert (second.study_id, second.origin) == ("c", "machine:unnamed")
    assert [dict(each.texts) for each in texts_of_records(records, ["en"], "raw")] == [{"en": "Clear. XXXX"}] * 3
    with pytest.raises(ValueError, match="field must be"):
        texts_of_records(records, field="title")


def test_pairs_beside_studies_have_their_splits(tmp_path: Path) -> None:
    studies = [{"study_id": "s1", "modality": "cxr", "report_en": "Clear.", "split": "validation"}]
    write_lines(tmp_path / "data.jsonl", studies)
    rows = [{"study_id": "s1", "en": "Clear.", "zh": "清晰"}, {"study_id": "s2", "en": "Mass.", "zh": "肿块"}]
    write_lines(tmp_path / "parallel_en_zh.jsonl", rows)

    assert [(pair.study_id, pair.split, pair.source) for pair in read_corpus(tmp_path)] == [
        ("s1", "validation", tmp_path.name),
        ("s2", None, tmp_path.name),
    ]


def test_no_such_path(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="none"):
        list(read_corpus(tmp_path / "none"))


def test_no_repr_shows_texts_or_ids() -> None:
    assert "s1" not in repr(PAIR)
    assert "effusion" not in repr(PAIR)


@pytest.mark.realdata
def test_open_i(data_root: Path) -> None:
    pairs = list(read_corpus(data_root / "openi_iu_reports"))

    assert len({pair.study_id for pair in pairs}) == 2727
    assert {pair.origin for pair in pairs} == {"machine:unnamed"}
    assert sum(pair.split == "validation" for pair in pairs) > 300


@pytest.mark.realdata
def test_cov_ctr(data_root: Path) -> None:
    pairs = list(read_corpus(data_root / "cov_ctr"))

    assert len(pairs) == 648
    assert {pair.source for pair in pairs} == {"cov_ctr"}
