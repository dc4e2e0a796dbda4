# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
import gzip
import io
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from m3fm import imaging_m3fm
from m3fm.imaging_m3fm import ChestImage, read_image

GRAY = (np.arange(24 * 32).reshape(24, 32) % 256).astype(np.uint8)  # (H, W)
COLOUR = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)


def png_bytes(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def zip_bytes() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.dcm", b"x")
    return buffer.getvalue()


def test_a_chest_image_checks_its_fields_and_is_returned_unchanged():
    with pytest.raises(ValueError, match=r"pixels.*float32.*\(S, H, W\)"):
        ChestImage(np.zeros((4, 4), np.float32))
    with pytest.raises(ValueError, match="units"):
        ChestImage(np.zeros((1, 4, 4), np.float32), units="mm")
    image = ChestImage(np.zeros((1, 4, 4), np.float32))
    assert read_image(image) is image


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "webp"])
def test_files_are_recognised_by_content(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(GRAY).save(path, **({"lossless": True} if suffix == "webp" else {}))
    for name in ("no_suffix", "wrong.dcm", "wrong.nii.gz", "wrong.img", "wrong.jpg"):
        other = tmp_path / name
        other.write_bytes(path.read_bytes())
        image = read_image(other)
        assert (image.modality, image.units, image.remarks) == (None, "intensity", ())
        np.testing.assert_allclose(image.pixels[0], GRAY / 255, atol=1e-6)


def test_every_kind_of_source_gives_the_same_pixels(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(COLOUR).save(path)
    expected = read_image(path).pixels
    data = path.read_bytes()
    with path.open("rb") as file, Image.open(path) as lazy:
        sources = [str(path), path, data, bytearray(data), memoryview(data)]
        sources += [memoryview(data + data)[: len(data)], io.BytesIO(data), file, lazy, Image.fromarray(COLOUR)]
        sources += [COLOUR, torch.tensor(COLOUR), torch.tensor(COLOUR).permute(2, 0, 1), np.moveaxis(COLOUR, -1, 0)]
        sources += [{"bytes": data, "path": None}, {"bytes": data, "path": "gone.png"}]
        sources += [{"bytes": None, "path": str(path)}, {"path": path}]
        for source in sources:
            image = read_image(source)
            np.testing.assert_array_equal(image.pixels, expected)
            assert [remark.code for remark in image.remarks] == ["colour"]
    unit = torch.tensor(COLOUR).permute(2, 0, 1) / 255
    np.testing.assert_allclose(read_image(unit).pixels, expected, atol=0.6 / 255)


def test_files_are_read_from_their_start_and_left_where_they_were():
    data = png_bytes(GRAY)
    file = io.BytesIO()
    file.write(data)  # the position is at the end now
    for position in (len(data), 10, 0):
        file.seek(position)
        np.testing.assert_allclose(read_image(file).pixels[0], GRAY / 255, atol=1e-6)
        assert file.tell() == position

    class Stream:
        """Something like a network response: it can be read once, and not wound back."""

        def __init__(self):
            self.file = io.BytesIO(data)

        def read(self, size: int = -1) -> bytes:
            return self.file.read(size)

    np.testing.assert_allclose(read_image(Stream()).pixels[0], GRAY / 255, atol=1e-6)


def test_files_that_give_no_bytes(tmp_path):
    class Asynchronous:
        async def read(self, size: int = -1) -> bytes:
            return b""

    with (tmp_path / "a.txt").open("w+") as text:
        for source in (io.StringIO("x"), text, Asynchronous()):
            with pytest.raises(ValueError, match="binary mode"):
                read_image(source)
    closed = io.BytesIO(b"x")
    closed.close()
    with pytest.raises(ValueError, match="<file object>: cannot be read"):
        read_image(closed)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"this is not an image", "looks like text"),
        ("这不是图像".encode() * 300, "looks like text"),
        (b"\n <!DOCTYPE html><title>Sign in</title>", "looks like a web page"),
        (b"<?xml version='1.0'?><a/>", "looks like XML"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "looks like a vector drawing"),
        (b"%PDF-1.7\n%\xe2\xe3", "looks like a PDF"),
        (b"%!PS-Adobe-3.0 EPSF-3.0", "looks like a PostScript"),
        (zip_bytes(), "looks like a ZIP archive"),
        (b"GIF89a" + b"\0" * 20, "looks like a GIF"),
        (b"\0\0\0\x20ftypisom" + b"\0" * 20, "looks like a video"),
        (b"\0\0\0\x20ftypheic" + b"\0" * 20, "looks like a HEIC"),
        (b"\x93NUMPY\x01\0", "looks like a NumPy file"),
        (b"\x80\x04\x95\x05\0\0\0", "looks like a pickle, which is never opened"),
        (b"version https://git-lfs.github.com/spec/v1\n", "looks like a Git LFS pointer"),
        (gzip.compress(b"hello" * 100, mtime=0), "no NIfTI"),
        (b"\0" * 2000, "nothing but zeros"),
        (b"\x17\x99\xfa" * 100, "of no known format"),
        (b"BM is how this text starts", "looks like text"),
    ],
)
def test_what_is_no_image_is_named(data, reason, tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(data)
    for source, name in ((path, str(path)), (data, "<bytes>"), ({"bytes": data, "path": "b.png"}, "b.png")):
        with pytest.raises(ValueError, match=reason) as caught:
            read_image(source)
        assert str(caught.value).startswith(f"{name}: ") and caught.value.__cause__ is None


def test_paths_that_lead_to_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for ever
    cases = {
        tmp_path / "missing.png": "no such file",
        tmp_path: "is a directory",
        tmp_path / "pipe": "is no regular file",
        "a\0b.png": "is no path",
        "": "is a directory|no such file",
        "x" * 100_000: "cannot be read",
    }
    for path, reason in cases.items():
        with pytest.raises(ValueError, match=reason) as caught:
            read_image(path)
        assert len(str(caught.value)) < 600


def test_large_files_are_refused_before_they_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(imaging_m3fm, "MAX_FILE_BYTES", 200)
    path = tmp_path / "a.png"
    path.write_bytes(png_bytes(COLOUR))
    for source in (path, path.read_bytes(), io.BytesIO(path.read_bytes())):
        with pytest.raises(ValueError, match="200"):
            read_image(source)
    video = tmp_path / "video.mp4"
    with video.open("wb") as file:
        file.write(b"\0\0\0\x20ftypisom")
        file.truncate(1 << 40)  # a sparse file: nothing but its start may be read
    with pytest.raises(ValueError, match="looks like a video"):
        read_image(video)


def test_addresses_are_not_fetched_and_not_quoted_whole():
    cases = {
        "https://example.org/a.png?X-Signature=SECRET#SECRET": "https://example.org/a.png: ",
        "http://user:SECRET@example.org/a.png": "http://example.org/a.png: ",
        "s3://bucket/a.dcm": "s3://bucket/a.dcm: ",
        "data:image/png;base64,SECRET": "data:image/png;base64: ",
    }
    for address, start in cases.items():
        with pytest.raises(ValueError, match=r"m3fm\.download\.download") as caught:
            read_image(address)
        assert str(caught.value).startswith(start) and "SECRET" not in str(caught.value)


@pytest.mark.parametrize("source", [3, None, object(), {"image": b""}, ["a.png"], ("a.png", "b.png")])
def test_other_types_are_refused(source):
    with pytest.raises(ValueError, match=f"of type {type(source).__name__}: expected a path"):
        read_image(source)


def test_values_of_datasets_without_anything_to_read():
    for value in ({"bytes": None, "path": None}, {"bytes": 3, "path": "a.png"}, {"path": ""}):
        with pytest.raises(ValueError, match="expected bytes, or the path of a file"):
            read_image(value)


def test_a_pydicom_data_set_is_read_as_its_file():
    pydicom = pytest.importorskip("pydicom")
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.1"
    dataset.PatientName, dataset.Modality, dataset.SOPClassUID = "DOE^JANE", "CT", "1.2.840.10008.5.1.4.1.1.2"
    dataset.Rows, dataset.Columns, dataset.SamplesPerPixel = 24, 32, 1
    dataset.PhotometricInterpretation, dataset.PixelRepresentation = "MONOCHROME2", 0
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 16, 15
    dataset.RescaleSlope, dataset.RescaleIntercept = 1, -1024
    dataset.PixelData = (GRAY * np.uint16(8)).tobytes()
    image = read_image(dataset)
    assert (image.modality, image.units) == ("ct", "hu")
    np.testing.assert_array_equal(image.pixels[0], GRAY * 8.0 - 1024)
    with pytest.raises(ValueError, match="<DICOM data set>: cannot be written") as caught:
        read_image(pydicom.Dataset())
    assert "DOE" not in str(caught.value)


def test_reading_a_png_imports_no_optional_library():
    program = """
import sys, types
package = types.ModuleType("m3fm")
package.__path__ = [sys.argv[1]]
sys.modules["m3fm"] = package
import io
from PIL import Image
from m3fm.imaging_m3fm import read_image
buffer = io.BytesIO()
Image.new("L", (4, 4), 7).save(buffer, "PNG")
assert read_image(buffer.getvalue()).pixels.shape == (1, 4, 4)
print(*sorted({"pydicom", "nibabel", "tifffile", "imagecodecs", "SimpleITK", "torch"} & set(sys.modules)))
"""
    command = [sys.executable, "-c", program, str(Path(imaging_m3fm.__file__).parent)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() == []


@pytest.mark.realdata
def test_real_fixtures(data_root):
    paths = sorted((data_root / "fixtures").iterdir())
    assert paths
    for path in paths:
        image = read_image(path)
        pixels = np.asarray(image.pixels)
        if path.name.startswith("cxr"):
            assert (image.modality, image.units, image.view) == ("cxr", "intensity", "PA")
            assert pixels.min() >= 0 and pixels.max() <= 1
        else:
            assert (image.modality, image.units) == ("ct", "hu")
            assert pixels.min() <= -1000 and pixels.max() > 200
    raw, lossy = (read_image(path).pixels for path in paths if "RG1" in path.name)
    assert np.abs(raw - lossy).mean() < 0.01


@pytest.mark.realdata
def test_real_volumes_agree_with_simpleitk(data_root):
    pytest.importorskip("nibabel")
    sitk = pytest.importorskip("SimpleITK")
    paths = [*(data_root / "fixtures").glob("*.nii.gz"), *(data_root / "covid_ct_md_volumes").glob("*.nii.gz")]
    assert paths
    for path in paths:
        image = read_image(path)
        oriented = sitk.DICOMOrient(sitk.ReadImage(path), "LPS")
        np.testing.assert_array_equal(np.asarray(image.pixels), sitk.GetArrayFromImage(oriented))
        np.testing.assert_allclose(image.spacing, oriented.GetSpacing()[::-1], rtol=1e-4)
