# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""SIIM-ACR pneumothorax: small trees to both layouts, and the full table with its masks."""

import os
from pathlib import Path

import numpy as np
import pytest

from m3fm.data.opening import open_set
from m3fm.data.schema import LabelState, Mask
from m3fm.data.sets.siim import ABSENT, HEIGHT, PRESENT, SET, WIDTH, decode_mask
from m3fm.data.tables import BadRow

POSITIVE, NEGATIVE = LabelState.POSITIVE, LabelState.NEGATIVE
# What the challenge's table has of rows, and of images with a pneumothorax.
TABLE_ROWS, SICK = 12954, 2669
HEAD = "ImageId, EncodedPixels"
# Four pixels down the second column from row 3, then two down the third from row 1.
ROWS = ["1.2.1,-1", "1.2.2,1027 4 1018 2", "1.2.3, -1", "1.2.2,0 1"]


def write_tree(root: Path, rows: list[str] = ROWS, name: str = "stage_2_train.csv") -> Path:
    (root / name).write_text("\n".join([HEAD, *rows]) + "\n")
    for image in ("1.2.1", "1.2.2", "1.2.3"):
        folder = root / "dicom-images-train" / f"{image}.8" / f"{image}.9"
        folder.mkdir(parents=True)
        (folder / f"{image}.dcm").touch()
    return root


def test_records_and_masks(tmp_path: Path) -> None:
    root = write_tree(tmp_path)
    opened = open_set(root)
    assert opened.set is SET
    first, second, third = opened
    assert [record.study_id for record in (first, second, third)] == ["1.2.1", "1.2.2", "1.2.3"]
    assert first.labels == {ABSENT: POSITIVE, PRESENT: NEGATIVE} and first.findings == {"pneumothorax": NEGATIVE}
    assert first.masks == () and third.masks == () and first.split == "train" and first.patient_id is None
    assert second.labels == {PRESENT: POSITIVE, ABSENT: NEGATIVE}
    assert second.findings == {"no_finding": NEGATIVE, "pneumothorax": POSITIVE}
    assert second.images[0].path == root / "dicom-images-train" / "1.2.2.8" / "1.2.2.9" / "1.2.2.dcm"
    assert second.masks == (Mask(PRESENT, "1027 4 1018 2"), Mask(PRESENT, "0 1"))
    large, small = map(decode_mask, second.masks)
    assert large.shape == (1024, 1024)
    assert np.argwhere(large).tolist() == [[1, 2], [2, 2], [3, 1], [4, 1], [5, 1], [6, 1]]
    assert np.argwhere(small).tolist() == [[0, 0]]


@pytest.mark.parametrize("folder", ["images", "png_images", "dicom-images-test"])
@pytest.mark.parametrize("suffix", [".png", ".dcm"])
def test_flat_layouts(folder: str, suffix: str, tmp_path: Path) -> None:
    (tmp_path / "train-rle.csv").write_text(f"{HEAD}\n1.2.1,-1\n")
    (tmp_path / folder).mkdir()
    (tmp_path / folder / f"1.2.1{suffix}").touch()
    (record,) = open_set(tmp_path)
    assert record.images[0].path == tmp_path / folder / f"1.2.1{suffix}"


BAD_ROWS = {
    "bad_value": "1.2.4,5 2 7",
    "duplicate_id": "1.2.1,-1",
    "missing_file": "1.2.4,-1",
    "not_a_row": "1.2.4",
}


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_bad_rows_are_named_and_cost_themselves(kind: str, tmp_path: Path) -> None:
    root = write_tree(tmp_path, [*ROWS, BAD_ROWS[kind]])
    with pytest.raises(BadRow, match=r"stage_2_train.csv, line 6: ") as error:
        list(open_set(root))
    assert error.value.kind == kind and "1.2.4" not in error.value.message
    opened = open_set(root, on_bad="skip")
    assert [record.study_id for record in opened] == ["1.2.1", "1.2.2", "1.2.3"]
    assert opened.reading.counts == {("stage_2_train.csv", kind): 1}


def test_contradictions_and_masks_beyond_the_image(tmp_path: Path) -> None:
    rows = [*ROWS, "1.2.2,-1", "1.2.1,0 1", "1.2.2,0 1", "1.2.2,1048575 2", "1.2.2,3 0", "1.2.2,", "a/b,-1"]
    rows.append("1.2.1,9223372036854775807 10")
    opened = open_set(write_tree(tmp_path, rows), on_bad="skip")
    records = list(opened)
    assert [len(record.masks) for record in records] == [0, 2, 0]
    assert opened.reading.counts == {
        ("stage_2_train.csv", "duplicate_id"): 3,
        ("stage_2_train.csv", "bad_value"): 5,
    }


def test_wrong_column_is_raised_at_once(tmp_path: Path) -> None:
    (tmp_path / "train-rle.csv").write_text("ImageId,Mask\n")
    with pytest.raises(BadRow, match="EncodedPixels"):
        list(open_set(tmp_path, on_bad="skip"))


@pytest.mark.realdata
def test_full_table_and_its_masks(data_root: Path, tmp_path: Path) -> None:
    name = "siim-pneumothorax-train-rle.csv.gz"
    os.symlink(data_root / "label_tables" / name, tmp_path / name)
    images, sick, masks = 0, 0, []
    for record in open_set(tmp_path, images="unchecked"):
        images += 1
        sick += record.labels[PRESENT] is POSITIVE
        masks += record.masks
        assert bool(record.masks) == (record.labels[PRESENT] is POSITIVE)
    assert images == SET.published["images"] == 12047
    assert sick == SICK
    assert len(masks) + images - sick == TABLE_ROWS
    # No run of any mask leaves the image: the loader would have told. Areas: from a speck to a collapsed lung.
    areas = np.array([sum(map(int, mask.rle.split()[1::2])) for mask in masks])
    assert areas.min() == 55 and areas.max() < 0.2 * HEIGHT * WIDTH
    for mask, area in zip(masks[::4], areas[::4], strict=True):
        pixels = decode_mask(mask)
        assert pixels.shape == (HEIGHT, WIDTH) and pixels.sum() == area
