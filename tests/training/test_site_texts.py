# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Texts of a site from files of all kinds, their languages, and what is held out."""

import json
import logging

import pytest

from m3fm.training.languages import check_code, is_other_language, is_spaced
from m3fm.training.site_texts import (
    MIN_TEXTS,
    read_parallel_groups,
    read_site_texts,
    site_groups,
    split_groups,
)
from m3fm.training.text_bank import TextGroup

REPORTS = ["The heart is of normal size.", "There is an effusion on the left.", "The heart is of normal size."]
GERMAN = "Das Herz ist nicht vergrößert, kein Erguss und keine Stauung mit der Lunge."
CHINESE = "双肺纹理清晰，心影大小正常，双侧胸腔未见积液。"


def write(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return path


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "\n".join(REPORTS)),
        ("b.txt", "\r\n\r\n".join(text.replace(" is ", "\r\nis ") for text in REPORTS) + "\r\n"),
        ("c.csv", "id,report\n" + "".join(f'{i},"{text}"\n' for i, text in enumerate(REPORTS))),
        ("d.tsv", "id\ttext\n" + "".join(f"{i}\t{text}\n" for i, text in enumerate(REPORTS))),
        ("e.jsonl", "".join(json.dumps({"report_en": text, "text": "other"}) + "\n" for text in REPORTS)),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_reports_are_read_from_files_of_all_kinds(tmp_path, name, content, encoding):
    found = read_site_texts(write(tmp_path / name, content, encoding), "en")
    assert found.texts == REPORTS
    assert found.counts["read"] == 3 and found.counts["repeated"] == 1
    assert found.summary() == "3 texts, 1 of them repeats"


def test_a_column_is_taken_by_name_and_a_missing_one_told_without_a_cell(tmp_path):
    path = write(tmp_path / "a.csv", "befund,text\n" + "".join(f"{text},x\n" for text in REPORTS))
    assert read_site_texts(path, "en", column="befund").texts == REPORTS
    headless = write(tmp_path / "b.csv", f"17,{REPORTS[0]}\n18,{REPORTS[1]}\n")
    with pytest.raises(ValueError, match=r"expected a column 'report_en' or .* name it by `column`") as error:
        read_site_texts(headless, "en")
    assert "heart" not in str(error.value)


def test_a_data_folder_gives_its_training_part(made_up_data):
    texts = read_site_texts(made_up_data / "reported", "zh").texts
    assert "双肺清晰，视图0。" in texts and not any(
        f"视图{number}" in text for text in texts for number in (4, 5, 8, 12)
    )
    with pytest.raises(ValueError, match="data folders have reports in en, zh"):
        read_site_texts(made_up_data / "reported", "de")


@pytest.mark.parametrize(
    ("content", "encoding", "message"),
    [
        ("", "utf-8", "expected reports, got an empty file"),
        (" \n \n", "utf-8", "expected reports"),
        (
            f"ok\n{CHINESE}\n",
            "gb18030",
            r"line 2: expected UTF-8, it seems to be GB18030; .* iconv -f GB18030 -t UTF-8",
        ),
        (f"{CHINESE}\n", "utf-16", r"line 1: expected UTF-8, it seems to be UTF-16"),
        ("Erguß gering\n", "latin1", r"line 1: expected UTF-8, it seems to be CP1252"),
        ("\n\n".join(["\n".join(["A report."] * 70)] * 2), "utf-8", "say `layout: lines` if each line is a report"),
    ],
)
def test_files_that_cannot_be_read_are_told_with_what_to_do(tmp_path, content, encoding, message):
    with pytest.raises(ValueError, match=message) as error:
        read_site_texts(write(tmp_path / "a.txt", content, encoding), "zh")
    assert "双肺" not in str(error.value) and "Erguß" not in str(error.value)


def test_other_files_and_missing_ones_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"expected \.txt, \.csv, .* got \.docx"):
        read_site_texts(write(tmp_path / "a.docx", "x"), "en")
    with pytest.raises(ValueError, match="there is no "):
        read_site_texts(tmp_path / "none.txt", "en")
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2"):
        read_site_texts(write(tmp_path / "a.jsonl", '{"text": "Clear."}\n{"text": \n'), "en")
    with pytest.raises(ValueError, match="layout: got 'pages'"):
        read_site_texts(write(tmp_path / "a.txt", "x"), "en", layout="pages")


def test_blank_lines_part_reports_unless_it_is_said_that_lines_are_reports(tmp_path):
    path = write(tmp_path / "a.txt", f"{REPORTS[0]}\n{REPORTS[1]}\n\n{REPORTS[2]}\n")
    assert len(read_site_texts(path, "en").texts) == 2
    assert read_site_texts(path, "en", layout="lines").texts == REPORTS


def test_earlier_examinations_are_left_out_and_counted(tmp_path):
    text = "1. Heart normal. The effusion is unchanged since the prior exam. 2. Lungs clear."
    path = write(tmp_path / "a.txt", f"{text}\nUnchanged from the prior exam.\n")
    found = read_site_texts(path, "en")
    assert found.texts == ["1. Heart normal. 2. Lungs clear."], "the site's own numbering stays"
    assert found.counts["earlier"] == 2 and found.counts["empty"] == 1
    assert read_site_texts(path, "en", keep_earlier=True).texts[0] == text


def test_what_may_name_a_patient_is_warned_of_without_saying_it(tmp_path, caplog):
    lines = [*REPORTS, "Seen on 12/03/2021: normal.", "MRN 88123456. The heart is normal.", "T12 fracture, 3.5 mm."]
    with caplog.at_level(logging.WARNING):
        assert read_site_texts(write(tmp_path / "a.txt", "\n".join(lines)), "en").counts["identifiers"] == 2
    assert "2 texts hold what looks like" in caplog.text and "88123456" not in caplog.text


# --- languages -------------------------------------------------------------------------------------------------------


def test_texts_of_another_language_are_left_out_or_refused(tmp_path):
    many = [f"There is no effusion in view {number}." for number in range(20)]
    found = read_site_texts(write(tmp_path / "a.txt", "\n".join([*many, CHINESE])), "en")
    assert found.texts == many and found.counts["other_language"] == 1
    with pytest.raises(ValueError, match="21 of 21 texts are plainly not in 'de'") as error:
        read_site_texts(tmp_path / "a.txt", "de")
    assert "effusion" not in str(error.value)
    short = ["nodule in the apex", "effusion of the left", "normal", "scar in the apex", "there is nothing"]
    with pytest.raises(ValueError, match="most of 5 texts are plainly not in 'de'"):
        read_site_texts(write(tmp_path / "b.txt", "\n".join(short)), "de")
    assert len(read_site_texts(tmp_path / "a.txt", "xx").texts) == 21, "nothing is known of the language"


@pytest.mark.parametrize(
    ("text", "language", "is_other"),
    [
        (GERMAN, "de", False),
        (GERMAN, "en", True),
        (REPORTS[0] + REPORTS[1], "de", True),
        (CHINESE, "zh-hant", False),
        (CHINESE, "en", True),
        (CHINESE, "ja", False),
        ("PTB", "zh", False),
        ("Bilateral PTB, COPD", "en", False),
        ("В лёгких без очаговых изменений", "ru", False),
        ("В лёгких без очаговых изменений", "en", True),
    ],
)
def test_languages_are_told_by_script_and_little_words(text, language, is_other):
    assert is_other_language(text, language) is is_other


def test_codes_and_spaces():
    for code in ("e", "EN", "de_AT", "", "no "):
        with pytest.raises(ValueError, match="expected a code like 'de'"):
            check_code(code)
    check_code("zh-hant")
    assert is_spaced(REPORTS) and is_spaced([]) and not is_spaced([CHINESE])


# --- parallel text and parts -----------------------------------------------------------------------------------------


def test_parallel_text_has_both_languages_in_each_row(tmp_path):
    rows = [{"en": text, "de": GERMAN + str(number), "note": "x"} for number, text in enumerate(REPORTS[:2])]
    path = write(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in [*rows, rows[0]]))
    groups = read_parallel_groups(path, "de", ("en", "zh"))
    assert [(group.versions, group.targets) for group in groups] == [
        ({"en": row["en"], "de": row["de"]}, ("de",)) for row in rows
    ]
    for row, message in (({"de": GERMAN}, r"line 1: .*'de' and one of \['en', 'zh'\]"), ({"en": "x"}, "line 1")):
        with pytest.raises(ValueError, match=message):
            read_parallel_groups(write(tmp_path / "b.jsonl", json.dumps(row)), "de", ("en", "zh"))
    swapped = write(tmp_path / "c.csv", "en,de\n" + f'"{GERMAN}","{REPORTS[0]} {REPORTS[1]}"\n')
    with pytest.raises(ValueError, match="1 of 1 texts of column 'en' are plainly not in it"):
        read_parallel_groups(swapped, "de", ("en",))


def test_no_text_is_on_both_sides_and_the_frequent_one_is_learned():
    texts = ["normal"] * 60 + [f"nodule {number}" for number in range(40)] + ["nodule 3"]
    learned, held_out = split_groups(site_groups(texts, "en"), "en", 0.1, seed=1)
    sides = [{group.versions["en"] for group in side} for side in (learned, held_out)]
    assert not sides[0] & sides[1] and sides[0] | sides[1] == set(texts)
    assert len(held_out) == len(sides[1]) == 4 and sum(group.versions["en"] == "normal" for group in learned) == 60
    again = split_groups(site_groups(texts[::-1], "en"), "en", 0.1, seed=1)[1]
    assert {group.versions["en"] for group in again} == sides[1], "the order of the file does not matter"
    assert {group.versions["en"] for group in split_groups(site_groups(texts, "en"), "en", 0.1, 2)[1]} != sides[1]
    pairs = [TextGroup("parallel", {"en": f"n {n}", "de": text}, ("de",)) for n, text in enumerate(texts[60:100])]
    learned, held_out = split_groups([*pairs, *site_groups(texts, "de")], "de", 0.1, seed=1)
    assert len(held_out) == 4 and all(len(group.versions) == 2 for group in held_out)
    assert not {group.versions["de"] for group in held_out} & {group.versions["de"] for group in learned}
    with pytest.raises(ValueError, match=f"at least {MIN_TEXTS} distinct texts, got 11"):
        split_groups(site_groups(texts[50:70], "en"), "en", 0.1, seed=0)
