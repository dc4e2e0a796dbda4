# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
import gzip
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from m3fm.imaging_m3fm import ChestImage, read_image

pydicom = pytest.importorskip("pydicom")
nibabel = pytest.importorskip("nibabel")

RAMP = np.arange(24 * 32, dtype=np.uint16).reshape(24, 32)  # (H, W), no two pixels alike
SECRET = "DOE^JANE"


def make_dicom(path: Path, pixels: np.ndarray = RAMP, syntax: str = "1.2.840.10008.1.2.1", **tags) -> Path:
    """Write a small DICOM file; a tag given as None is left out."""
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1"
    dataset.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    colour = pixels.ndim > 2 and pixels.shape[-1] == 3
    spatial = pixels.shape[:-1] if colour else pixels.shape
    values = {
        "PatientName": SECRET,
        "Modality": "CR",
        "PhotometricInterpretation": "RGB" if colour else "MONOCHROME2",
        "SamplesPerPixel": 3 if colour else 1,
        "PlanarConfiguration": 0 if colour else None,
        "NumberOfFrames": spatial[0] if len(spatial) == 3 else None,
        "Rows": spatial[-2],
        "Columns": spatial[-1],
        "BitsAllocated": 8 * pixels.itemsize,
        "BitsStored": 8 * pixels.itemsize,
        "HighBit": 8 * pixels.itemsize - 1,
        "PixelRepresentation": int(pixels.dtype.kind == "i"),
        "PixelData": pixels.tobytes(),
    } | tags
    for key, value in values.items():
        if value is not None:
            setattr(dataset, key, value)
    dataset.save_as(path, enforce_file_format=True)
    return path


def png_bytes(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def test_chest_image_checks_its_fields():
    with pytest.raises(ValueError, match=r"pixels.*float32.*\(S, H, W\)"):
        ChestImage(np.zeros((4, 4), np.float32))
    with pytest.raises(ValueError, match="units"):
        ChestImage(np.zeros((1, 4, 4), np.float32), units="mm")
    image = ChestImage(np.zeros((1, 4, 4), np.float32))
    assert read_image(image) is image


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "webp"])
def test_lossless_rasters_are_read_by_content(tmp_path, suffix):
    gray = (RAMP % 256).astype(np.uint8)
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(gray).save(path, **({"lossless": True} if suffix == "webp" else {}))
    misnamed = path.rename(tmp_path / "no_extension")
    image = read_image(misnamed)
    assert image.modality is None and image.units == "intensity"
    np.testing.assert_allclose(image.pixels[0], gray / 255, atol=1e-6)


def test_every_kind_of_source_gives_the_same_pixels(tmp_path):
    rng = np.random.default_rng(0)
    colour = rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)
    path = tmp_path / "a.png"
    Image.fromarray(colour).save(path)
    expected = read_image(path).pixels
    data = path.read_bytes()
    with path.open("rb") as file:
        sources = [str(path), data, io.BytesIO(data), file, Image.open(path), colour, torch.tensor(colour)]
        sources += [torch.tensor(colour).permute(2, 0, 1), np.moveaxis(colour, -1, 0)]
        for source in sources:
            np.testing.assert_array_equal(read_image(source).pixels, expected)
    unit = torch.tensor(colour).permute(2, 0, 1) / 255
    np.testing.assert_allclose(read_image(unit).pixels, expected, atol=0.6 / 255)


def test_exif_alpha_palette_and_transparency(tmp_path):
    gray = (RAMP % 256).astype(np.uint8)
    rotated = tmp_path / "r.png"
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise to display
    Image.fromarray(gray).save(rotated, exif=exif)
    np.testing.assert_allclose(read_image(rotated).pixels[0], np.rot90(gray, -1) / 255, atol=1e-6)

    alpha = np.full_like(gray, 255)
    alpha[:5] = 0
    clear = Image.merge("LA", [Image.fromarray(gray), Image.fromarray(alpha)])
    pixels = read_image(clear).pixels[0]
    assert (pixels[:5] == 0).all()
    np.testing.assert_allclose(pixels[5:], gray[5:] / 255, atol=1e-6)

    palette = Image.fromarray(gray // 64).convert("P")
    palette.putpalette([v for i in range(256) for v in (min(255, i * 80),) * 3])
    np.testing.assert_allclose(read_image(palette).pixels[0], (gray // 64) * 80 / 255, atol=1e-6)
    assert set(np.unique(read_image(Image.fromarray(gray).convert("1")).pixels)) == {0, 1}


def test_sixteen_bits_are_stretched_not_saturated():
    data = png_bytes(RAMP + 1000)
    full = read_image(data, percentiles=None).pixels[0]
    np.testing.assert_allclose(full, RAMP / RAMP.max(), atol=1e-6)
    robust = read_image(data).pixels[0]
    assert robust.min() == 0 and robust.max() == 1 and np.unique(robust).size > 700
    marker = np.zeros((40, 40), np.uint16)
    marker[0, 0] = 5000  # the percentiles are equal here
    assert read_image(marker).pixels.max() == 1


def test_float_arrays_intensity_stack_and_volume():
    unit = np.linspace(0, 1, 48, dtype=np.float64).reshape(6, 8)
    np.testing.assert_array_equal(read_image(unit).pixels[0], unit.astype(np.float32))
    stack = read_image(np.stack([unit] * 5))
    assert stack.pixels.shape == (5, 6, 8) and stack.units == "intensity"
    volume = np.linspace(-1000, 400, 5 * 48).reshape(5, 6, 8)
    image = read_image(volume)
    assert (image.units, image.modality) == ("hu", "ct")
    np.testing.assert_allclose(image.pixels, volume, rtol=1e-6)
    volume[0, 0, 0] = np.nan
    assert read_image(volume).pixels.min() == pytest.approx(np.nanmin(volume))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_an_axis_of_one_is_no_volume(dtype):
    plain = (RAMP % 256).astype(dtype)
    expected = read_image(plain)
    for array in (plain[..., None], plain[None]):
        image = read_image(array)
        np.testing.assert_array_equal(image.pixels, expected.pixels)
        assert (image.units, image.modality) == ("intensity", None)


def test_float_colour_with_and_without_opacity():
    colour = np.random.default_rng(0).random((6, 8, 4), dtype=np.float32)
    luma = colour[..., :3] @ np.array([0.299, 0.587, 0.114], np.float32)
    for channels, expected in ((3, luma), (4, luma * colour[..., 3])):
        last = colour[..., :channels]
        for array in (last, np.moveaxis(last, -1, 0)):
            np.testing.assert_allclose(read_image(array).pixels, expected[None], atol=1e-6)


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.full((8, 8), 7, np.uint8), "blank image: every pixel has the same value"),
        (np.full((8, 8), 700, np.uint16), "blank image: every pixel has the same value"),
        (np.full((8, 8), np.nan), "NaN"),
        (np.zeros((0, 8), np.uint8), "at least one pixel"),
        (np.zeros((2, 3, 8, 8), np.float32), "4 dimensions"),
        (np.zeros((8, 8), bool), "bool"),
        (np.array([["a"]]), "expected integers or floats"),
        (np.arange(8 * 8 * 3, dtype=np.int16).reshape(8, 8, 3), "ambiguous"),
        (np.arange(3 * 8 * 8, dtype=np.float32).reshape(3, 8, 8), "ambiguous"),
        (np.linspace(-2.1, 2.6, 3 * 8 * 8).reshape(3, 8, 8), "not normalised"),
        (np.arange(4 * 8 * 8, dtype=np.int16).reshape(4, 8, 8), "3 or 4 slices as a ChestImage"),
    ],
)
def test_bad_arrays(array, reason):
    with pytest.raises(ValueError, match=reason):
        read_image(array)


def test_bad_files_are_named_with_the_reason(tmp_path):
    ramp = png_bytes((RAMP % 256).astype(np.uint8))
    contents = {
        "empty.png": (b"", "empty file"),
        "text.png": (b"this is not an image", "not a readable image"),
        "cut.png": (ramp[: len(ramp) // 2], "truncated|not a readable"),
        "cut.nii.gz": (gzip.compress(b"\0" * 400)[:-9], "gzip"),
        "other.gz": (gzip.compress(b"hello" * 100), "no NIfTI"),
        "blank.png": (png_bytes(np.full((8, 8), 255, np.uint8)), "blank image"),
    }
    for name, (data, reason) in contents.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=reason) as caught:
            read_image(tmp_path / name)
        assert str(caught.value).startswith(str(tmp_path / name))
    with pytest.raises(ValueError, match="no such file"):
        read_image(tmp_path / "missing.png")
    with pytest.raises(ValueError, match="is a directory"):
        read_image(tmp_path)
    with pytest.raises(ValueError, match="of type int"):
        read_image(3)
    with pytest.raises(ValueError, match="binary mode"):
        read_image(io.StringIO("x"))


def test_decompression_bomb_is_refused(monkeypatch):
    data = png_bytes((RAMP % 256).astype(np.uint8))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match="too many pixels, expected at most 100"):
        read_image(data)


def test_a_camera_jpeg_with_previews_is_its_first_picture(tmp_path):
    page = Image.fromarray((RAMP % 256).astype(np.uint8))
    page.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[page])
    assert read_image(tmp_path / "a.jpg").pixels.shape == (1, 24, 32)


def test_multi_page_tiff_is_refused(tmp_path):
    page = Image.fromarray((RAMP % 256).astype(np.uint8))
    page.save(tmp_path / "a.tiff", save_all=True, append_images=[page])
    with pytest.raises(ValueError, match="2 pages"):
        read_image(tmp_path / "a.tiff")


def test_dicom_radiograph_window_inversion_and_view(tmp_path):
    window = {"WindowCenter": [384, 10], "WindowWidth": [769, 5]}  # the first of two
    image = read_image(make_dicom(tmp_path / "no_suffix", ViewPosition="AP", **window))
    assert (image.modality, image.units, image.view) == ("cxr", "intensity", "AP")
    np.testing.assert_allclose(image.pixels[0], np.clip((RAMP - 383.5) / 768 + 0.5, 0, 1), atol=1e-6)
    inverted = read_image(make_dicom(tmp_path / "m1.dcm", PhotometricInterpretation="MONOCHROME1", **window))
    np.testing.assert_allclose(inverted.pixels, 1 - image.pixels, atol=1e-6)
    exact = read_image(make_dicom(tmp_path / "e.dcm", VOILUTFunction="LINEAR_EXACT", **window))
    np.testing.assert_allclose(exact.pixels[0], np.clip((RAMP - 384.0) / 769 + 0.5, 0, 1), atol=1e-6)
    sigmoid = read_image(make_dicom(tmp_path / "s.dcm", VOILUTFunction="SIGMOID", **window))
    np.testing.assert_allclose(sigmoid.pixels[0], 1 / (1 + np.exp(-4 * (RAMP - 384.0) / 769)), atol=1e-5)
    lateral = read_image(make_dicom(tmp_path / "l.dcm", ViewPosition="LL"))
    assert lateral.view == "LATERAL"


def test_dicom_without_usable_window_is_stretched(tmp_path):
    plain = read_image(make_dicom(tmp_path / "a.dcm"), percentiles=None).pixels[0]
    np.testing.assert_allclose(plain, RAMP / RAMP.max(), atol=1e-6)
    beside = make_dicom(tmp_path / "b.dcm", WindowCenter=60000, WindowWidth=10)
    np.testing.assert_allclose(read_image(beside, percentiles=None).pixels[0], plain, atol=1e-6)
    eight = (RAMP % 200).astype(np.uint8)
    np.testing.assert_allclose(read_image(make_dicom(tmp_path / "c.dcm", eight)).pixels[0], eight / 255, atol=1e-6)
    padded = RAMP.copy()
    padded[0] = 65535
    tag = {"PixelPaddingValue": 65535}
    pixels = read_image(make_dicom(tmp_path / "d.dcm", padded, **tag), percentiles=None).pixels[0]
    assert (pixels[0] == 0).all() and pixels[1:].max() == 1


def test_dicom_voi_lut(tmp_path):
    item = pydicom.Dataset()
    item.LUTDescriptor = [1024, 0, 16]
    table = np.arange(1024, dtype=np.uint16)[::-1] * 64
    item.add_new(0x00283006, "OW", np.ascontiguousarray(table).tobytes())
    path = make_dicom(tmp_path / "a.dcm", VOILUTSequence=pydicom.Sequence([item]))
    np.testing.assert_allclose(read_image(path).pixels[0], table[RAMP] / 65535, atol=1e-6)


def test_dicom_ct_is_hounsfield_and_frames_become_slices(tmp_path):
    ct = {"Modality": "CT", "RescaleSlope": 2, "RescaleIntercept": -1024}
    slices = np.stack([RAMP, RAMP + 1]).astype(np.int16)
    image = read_image(make_dicom(tmp_path / "a.dcm", slices, WindowCenter=40, WindowWidth=400, **ct))
    assert (image.modality, image.units, image.pixels.shape) == ("ct", "hu", (2, 24, 32))
    np.testing.assert_array_equal(image.pixels, slices * 2.0 - 1024)
    padded = RAMP.astype(np.int16)
    padded[0] = -2000
    image = read_image(make_dicom(tmp_path / "b.dcm", padded, PixelPaddingValue=-2000, **ct))
    assert (image.pixels[0, 0] == -1024).all()


def test_dicom_colour_capture(tmp_path):
    colour = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    image = read_image(make_dicom(tmp_path / "a.dcm", colour, Modality="OT"))
    np.testing.assert_array_equal(image.pixels, read_image(colour).pixels)


def test_bad_dicom_names_no_tag_value(tmp_path):
    whole = make_dicom(tmp_path / "whole.dcm").read_bytes()
    cut = tmp_path / "cut.dcm"
    cut.write_bytes(whole[:-200])
    head = tmp_path / "head.dcm"
    head.write_bytes(whole[:180])
    odd = tmp_path / "odd.dcm"
    odd.write_bytes(whole.replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.1\0\0\0"))  # not a transfer syntax
    compressed = {"syntax": "1.2.840.10008.1.2.4.80", "PixelData": pydicom.encaps.encapsulate([b"\0" * 20])}
    cases = {
        make_dicom(tmp_path / "none.dcm", PixelData=None): "without pixel data",
        cut: "truncated or damaged",
        head: "DICOM",
        make_dicom(tmp_path / "mr.dcm", Modality="MR"): "another modality",
        make_dicom(tmp_path / "jls.dcm", **compressed): "no decoder is installed.*pyjpegls|truncated or damaged",
        odd: "truncated or damaged",
        make_dicom(tmp_path / "blank.dcm", RAMP * 0): "blank image",
        make_dicom(tmp_path / "zero.dcm", Rows=0): "at least one pixel",
        make_dicom(tmp_path / "huge.dcm", NumberOfFrames=2_000_000_000): "declares",
    }
    for path, reason in cases.items():
        with pytest.raises(ValueError, match=reason) as caught:
            read_image(path)
        assert str(caught.value).startswith(str(path)) and SECRET not in str(caught.value)
        assert caught.value.__cause__ is None


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PIR"])
def test_nifti_is_displayed_radiologically_whatever_its_axes(tmp_path, codes):
    ras = np.zeros((4, 5, 6), np.int16)  # x to the right, y to anterior, z to superior
    ras[-1, :, :] += 100  # patient's right
    ras[:, -1, :] += 10  # anterior
    ras[:, :, -1] += 1  # superior
    image = nibabel.Nifti1Image(ras, np.eye(4))
    target = nibabel.orientations.axcodes2ornt(tuple(codes))
    turned = image.as_reoriented(nibabel.orientations.ornt_transform(nibabel.io_orientation(image.affine), target))
    nibabel.save(turned, tmp_path / "a.nii.gz")
    read = read_image(tmp_path / "a.nii.gz")
    assert (read.modality, read.units, read.pixels.shape) == ("ct", "hu", (6, 5, 4))
    np.testing.assert_array_equal(read.pixels // 100 % 10, np.broadcast_to([1, 0, 0, 0], (6, 5, 4)))  # right at left
    np.testing.assert_array_equal(read.pixels[:-1, 0, 1:], 10)  # anterior at the top
    np.testing.assert_array_equal(read.pixels[-1] % 10, 1)  # superior last


def test_nifti_scaling_dimensions_and_damage(tmp_path):
    flat = nibabel.Nifti1Image(RAMP.astype(np.int16), np.eye(4))
    flat.header.set_slope_inter(2, -1000)
    nibabel.save(flat, tmp_path / "flat.nii")
    assert read_image(tmp_path / "flat.nii").pixels.shape == (1, 32, 24)
    series = nibabel.Nifti1Image(np.arange(4 * 4 * 3 * 2, dtype=np.int16).reshape(4, 4, 3, 2), np.eye(4))
    nibabel.save(series, tmp_path / "series.nii")
    with pytest.raises(ValueError, match=r"4 dimensions \(4, 4, 3, 2\), expected a 2-D image or one 3-D volume"):
        read_image(tmp_path / "series.nii")
    whole = (tmp_path / "flat.nii").read_bytes()
    with pytest.raises(ValueError, match="truncated or damaged NIfTI"):
        read_image(whole[:-100])


@pytest.mark.realdata
def test_real_fixtures(data_root):
    paths = sorted((data_root / "fixtures").iterdir())
    assert paths
    for path in paths:
        image = read_image(path)
        if path.name.startswith("cxr"):
            assert (image.modality, image.units, image.view) == ("cxr", "intensity", "PA")
            assert image.pixels.min() >= 0 and image.pixels.max() <= 1
        else:
            assert (image.modality, image.units) == ("ct", "hu")
            assert image.pixels.min() <= -1000 and image.pixels.max() > 200
    raw, lossy = (read_image(p).pixels for p in paths if "RG1" in p.name)
    assert np.abs(raw - lossy).mean() < 0.01
