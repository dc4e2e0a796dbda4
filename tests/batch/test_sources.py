# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Finding studies: folders of rasters, of DICOM, data folders, lists, and all of these together."""

import json
import os

import numpy as np
import pytest
from PIL import Image

from m3fm.batch.sources import StudySource, find_sources
from m3fm.study_files_m3fm import find_images
from tests.dicom_files import SECRET, ct_slice, radiograph, write_dicom


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "scans"
    (folder / "b").mkdir(parents=True)
    for name in ("b.png", "b/2.jpg", "b/1.PNG", "a.tif", "肺;1.bmp"):
        Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(folder / name)
    return folder


def found(files):
    return {source.name: [image.name for image in source.images] for source in find_sources(files)}


def write_lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# --------------------------------------------------------------------------------------------------------------------
# Folders and files


def test_each_image_of_a_folder_is_a_study(folder):
    (folder / "damaged.jpeg").write_bytes(b"not an image")
    (folder / "no_suffix").write_bytes((folder / "b.png").read_bytes())
    for name in ("notes.txt", ".hidden.png", "Thumbs.db"):
        (folder / name).write_bytes(b"not an image")
    (folder / "thumbnail.png").write_bytes((folder / "b.png").read_bytes())
    (folder / ".cache").mkdir()
    (folder / ".cache" / "c.png").write_bytes((folder / "b.png").read_bytes())
    assert list(found(folder)) == [
        "a.tif",
        "b/1.PNG",
        "b/2.jpg",
        "b.png",
        "damaged.jpeg",
        "no_suffix",
        "肺;1.bmp",
    ]


def test_the_order_is_not_that_of_the_file_system(folder, monkeypatch):
    expected = find_sources(folder)
    listed = find_images(folder)
    monkeypatch.setattr("m3fm.batch.sources.find_images", lambda _: (listed[0][::-1], listed[1]))
    assert find_sources(folder) == expected
    assert all("\\" not in source.name for source in expected)


def test_single_files_are_called_what_they_were_called(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert found("./b.png") == {"./b.png": ["b.png"]}
    assert found(["absent.png", folder / "b.png"]) == {"absent.png": ["absent.png"], str(folder / "b.png"): ["b.png"]}


def test_several_of_them_in_the_order_given(folder, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "lists").mkdir()
    (folder / "lists" / "some.csv").write_text(f"image\n../a.tif\n{folder / 'b.png'}\n", encoding="utf-8")
    assert list(found(["b.png", "b/", "lists/some.csv"])) == [
        "b.png",
        "b/1.PNG",
        "b/2.jpg",
        "lists/../a.tif",
        (folder / "b.png").as_posix(),
    ]
    with pytest.raises(ValueError, match=r"each study once, got b/1\.PNG more than once"):
        find_sources(["b", "b/1.PNG"])
    with pytest.raises(ValueError, match=r"each study once, got b\.png more than once"):
        find_sources(["b.png", "b.png"])


def test_nothing_found_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Expected files or a folder of images, got none"):
        find_sources([])
    (tmp_path / "notes.txt").write_text("no image", encoding="utf-8")
    with pytest.raises(ValueError, match="no chest image in this folder"):
        find_sources(tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="names are Unicode there")
def test_names_that_are_no_text_can_be_written(folder):
    path = os.fsencode(folder / "b.png")
    try:
        os.rename(path, path.replace(b"b.png", b"\xff.png"))
    except OSError:
        pytest.skip("this file system takes text only")
    (name,) = [name for name in found(folder) if name.endswith(".png")]
    assert name.encode() == b"\\xff.png"


# --------------------------------------------------------------------------------------------------------------------
# DICOM


def add_series(folder, series, count, **tags):
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        # Named against their order along the patient.
        slice_ = ct_slice(series=series, number=number + 1, position=(0, 0, 2.0 * number), **tags)
        write_dicom(folder / f"IM{series}{count - number:03d}", slice_)


def view(name, study, folder):
    write_dicom(
        folder / name,
        radiograph(StudyInstanceUID=f"1.2.{study}", PatientID=f"{SECRET}{study}", SOPInstanceUID=f"1.2.{study}.1"),
    )


def test_a_ct_series_is_a_study_named_by_its_folder(tmp_path):
    first, second = tmp_path / "scans" / "one" / "ct", tmp_path / "scans" / "two"
    add_series(first, 1, 5, StudyInstanceUID="1.2.1")
    add_series(second, 1, 6, StudyInstanceUID="1.2.2")
    view("chest.dcm", 3, tmp_path / "scans")
    sources = find_sources(tmp_path / "scans")
    assert [source.name for source in sources] == ["chest.dcm", "one", "two"]
    assert [len(source.images) for source in sources] == [1, 5, 6]
    (source,) = find_sources(first)
    assert (source.name, len(source.images)) == (first.as_posix(), 5)
    assert [source.name for source in find_sources([first, second])] == [first.as_posix(), second.as_posix()]


def test_studies_that_share_a_folder_are_told_apart(tmp_path):
    add_series(tmp_path, 1, 5, StudyInstanceUID="1.2.1")
    add_series(tmp_path, 2, 6, StudyInstanceUID="1.2.2")
    view("lateral", 3, tmp_path)
    view("frontal", 3, tmp_path)
    view("other", 4, tmp_path)
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "a.png")
    sources = {source.name: len(source.images) for source in find_sources(tmp_path)}
    assert sources == {"IM1001;+4": 5, "IM2001;+5": 6, "a.png": 1, "frontal;lateral": 2, "other": 1}
    assert not any(secret in str(sources) for secret in (SECRET, "DOE", "1.2."))


# --------------------------------------------------------------------------------------------------------------------
# Lists

CSV = """\
study_id, image ,note
MRN-1,a.tif,"two
lines"
,b.png,
MRN-1,b/2.jpg,

MRN-2,b/1.PNG; b/3.png,
7,肺;1.bmp,
"""


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("line_break", ["\n", "\r\n"])
def test_csv(folder, encoding, line_break):
    path = folder / "list.CSV"
    path.write_bytes(CSV.replace("\n", line_break).encode(encoding))
    sources = find_sources(path)
    assert [source.name for source in sources] == ["a.tif;b/2.jpg", "b.png", "b/1.PNG;b/3.png", "肺;1.bmp"]
    assert sources[0].images == (folder / "a.tif", folder / "b" / "2.jpg")
    assert "MRN" not in str(sources)


@pytest.mark.parametrize("column", ["image", "file_name", "path"])
def test_json_lines(folder, column):
    path = write_lines(
        folder / "list.jsonl",
        {column: "b.png", "study_id": None},
        {column: ["a.tif", "b/2.jpg"], "study_id": 7},
        {column: "b/1.PNG", "study_id": "7", "modality": "ct"},
        {column: "c\u2028d.png"},
        {column: "series"},
    )
    path.write_text("\n" + path.read_text(encoding="utf-8"), encoding="utf-8-sig")
    names = [source.name for source in find_sources(path)]
    assert names == ["b.png", "a.tif;b/2.jpg;b/1.PNG", "c\u2028d.png", "series"]


def test_many_images_are_not_all_named(tmp_path):
    path = write_lines(tmp_path / "list.jsonl", *({"image": f"{number}.dcm", "study_id": 1} for number in range(300)))
    (source,) = find_sources(path)
    assert (source.name, len(source.images)) == ("0.dcm;+299", 300)


def test_a_data_folder_has_the_studies_of_its_list(folder):
    write_lines(
        folder / "metadata.jsonl",
        {"file_name": "b.png", "study_id": "x"},
        {"file_name": "a.tif", "study_id": "ct", "modality": "ct"},
        {"file_name": "b/1.PNG", "study_id": "x"},
        {"file_name": "b/2.jpg", "study_id": "ct", "modality": "ct"},
    )
    assert list(found(folder)) == ["b.png;b/1.PNG", "a.tif", "b/2.jpg"]
    assert list(found([folder, "x.png"]))[:2] == [f"{folder}/b.png;b/1.PNG", f"{folder}/a.tif"]


@pytest.mark.parametrize(
    ("content", "line", "reason"),
    [
        ("image,note\na.png,x\nb.png\n", 3, "expected 2 cells, got 1"),
        ("image,note\n,x\n", 2, "expected image to be the path of an image, or several"),
        ("image\na.png;;b.png\n", 2, "expected image to be the path"),
        ("name\na.png\n", 1, r"expected a column image or file_name or path, and commas .*\['name'\]"),
        ("image;note\na.png;x\n", 1, ".* and commas between columns"),
        ("image,image\na.png,b.png\n", 1, "expected each column once"),
        ('image\n"a.png\n', 2, "not a row of a CSV file"),
        ("image\na.png\na.png\n", 3, "expected each study once, got a.png"),
        ("image,study_id\na.png,1\na.png,1\n", 3, "expected each image of a study once, got a.png"),
        ("image\na.png\n肺.png\n".encode("gb18030"), 3, "expected UTF-8 text"),
        ("image\na.png\n".encode("utf-16"), 1, "expected UTF-8 text"),
        ("image\na\0.png\n", 2, "(expected image to be the path|not a row of a CSV file)"),
    ],
)
def test_bad_rows_of_csv_are_named(content, line, reason, tmp_path):
    path = tmp_path / "list.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=rf"list\.csv, line {line}: {reason}"):
        find_sources(path)


@pytest.mark.parametrize(
    ("content", "line", "reason"),
    [
        ('{"image": "a.png"}\n{"image": \n', 2, "expected a JSON object"),
        ('["a.png"]\n', 1, "expected a JSON object with image or file_name or path"),
        ('{"image": 1}\n', 1, "expected image to be the path"),
        ('{"image": []}\n', 1, "expected image to be the path"),
        ('{"image": ["a.png", null]}\n', 1, "expected image to be the path"),
        ('{"images": "a.png"}\n', 1, "expected a JSON object with image or file_name or path"),
        ('{"image": "a.png", "study_id": [1]}\n', 1, "expected study_id to be text or a whole number"),
        ("[" * 100000, 1, "expected a JSON object"),
    ],
)
def test_bad_rows_of_json_lines_are_named(content, line, reason, tmp_path):
    path = tmp_path / "list.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"list\.jsonl, line {line}: {reason}"):
        find_sources(path)


def test_lists_without_rows_and_absent_ones_are_refused(tmp_path):
    for content in ("", "image\n", "\n\n"):
        (tmp_path / "list.csv").write_text(content, encoding="utf-8")
        with pytest.raises(ValueError, match="no image in this list"):
            find_sources(tmp_path / "list.csv")
    with pytest.raises(ValueError, match=r"absent\.jsonl: no such file"):
        find_sources(tmp_path / "absent.jsonl")


def test_addresses_and_studies_that_were_found_before(folder):
    with pytest.raises(ValueError, match=r"^https://example\.org/a\.dcm: is an address.*--download"):
        find_sources("https://example.org/a.dcm?token=s3cret")
    given = StudySource("https://example.org/a.dcm", (folder / "b.png",))
    assert find_sources([given]) == [given]


def test_a_name_that_only_sounds_like_a_preview_is_an_image(folder):
    for name in ("thumbs.png", "a_thumb.png", "thumbnail2.png", "Thumbwala.png"):
        (folder / name).write_bytes((folder / "b.png").read_bytes())
    assert {name for name in found(folder) if "humb" in name} == {"Thumbwala.png"}


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may open every file")
def test_what_may_not_be_opened_is_a_study_whose_reading_says_so(folder):
    write_dicom(folder / "IM0001", radiograph()).chmod(0)
    (folder / "closed").mkdir(mode=0)
    assert {"IM0001", "closed"} <= found(folder).keys()


def test_a_broken_link_with_the_name_of_an_image_is_not_lost(folder):
    (folder / "gone.png").symlink_to(folder / "absent.png")
    assert "gone.png" in found(folder)
