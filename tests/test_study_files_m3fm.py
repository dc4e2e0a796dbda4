# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
import io
import os

import numpy as np
import pytest
from PIL import Image

from m3fm.study_files_m3fm import find_images, kind_of, path_kind

pytest.importorskip("pydicom")
nibabel = pytest.importorskip("nibabel")

from tests.dicom_files import RAMP, ct_slice, dicom_bytes  # noqa: E402  (needs pydicom)


def test_kinds_are_told_by_content():
    entry = ct_slice()
    assert kind_of(dicom_bytes(entry)) == kind_of(dicom_bytes(entry, preamble=False)) == "dicom"
    assert kind_of(dicom_bytes(entry, meta=False)) == "dicom"
    buffer = {}
    for kind in ("PNG", "JPEG", "TIFF", "BMP", "WEBP"):
        stream = io.BytesIO()
        Image.fromarray(RAMP.astype(np.uint8)).save(stream, kind)
        buffer[kind] = kind_of(stream.getvalue())
    assert set(buffer.values()) == {"raster"}
    assert kind_of(nibabel.Nifti1Image(np.zeros((2, 2, 2)), np.eye(4)).to_bytes()) == "nifti"
    assert kind_of(nibabel.Nifti2Image(np.zeros((2, 2, 2)), np.eye(4)).to_bytes()) == "nifti"
    for text in (b"", b"BM", b"patient,label\n", b"\x1f\x8b broken", b'{"a": 1}', b"%PDF-1.7", b"PK\x03\x04" * 99):
        assert kind_of(text) is None


def test_folders_are_searched_in_the_order_of_names(tmp_path):
    for name in ("b/2", "b/1", "a", "c/d/e"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(dicom_bytes(ct_slice()))
    for name in (".hidden", ".cache/1", "thumbnails/1", "b/thumb.jpg", "DICOMDIR"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(dicom_bytes(ct_slice()))
    os.mkfifo(tmp_path / "pipe")  # would be waited for
    (tmp_path / "link").symlink_to(tmp_path / "b")
    (tmp_path / "nowhere").symlink_to(tmp_path / "missing")
    found, skipped = find_images(tmp_path)
    assert [path.removeprefix(f"{tmp_path}{os.sep}") for path, _ in found] == ["a", "b/1", "b/2", "c/d/e"]
    assert {kind for _, kind in found} == {"dicom"} and skipped == 7
    assert find_images(str(tmp_path))[0] == found
    with pytest.raises(ValueError, match="cannot be listed") as caught:
        find_images(tmp_path / "missing")
    assert str(caught.value).startswith(str(tmp_path / "missing"))


def test_the_list_of_a_medium_is_no_image(tmp_path):
    medium = ct_slice(PixelData=None, SOPClassUID="1.2.840.10008.1.3.10")
    path = tmp_path / "renamed"
    path.write_bytes(dicom_bytes(medium))
    assert path_kind(path) is None and path_kind(tmp_path) is None and path_kind(tmp_path / "missing") is None
