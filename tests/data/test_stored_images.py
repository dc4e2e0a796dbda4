# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from m3fm.data.schema import ImageFile, StudyRecord
from m3fm.data.stored_images import ImageStore
from m3fm.imaging_m3fm import read_image
from m3fm.series_m3fm import read_study
from tests.dicom_files import SECRET, radiograph, write_dicom
from tests.phantoms import radiograph_pixels
from tests.series_files import series, write_series


def record(*paths, modality="cxr", view=None):
    return StudyRecord("a", "made_up", modality, images=tuple(ImageFile(path, view=view) for path in paths))


def stored(*paths, size=None, modality="cxr", view=None):
    return ImageStore("bytes", size)(record(*paths, modality=modality, view=view)).images


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("window", [{}, {"WindowCenter": 700, "WindowWidth": 900}])
def test_a_dicom_radiograph_becomes_a_png_of_the_same_pixels_without_its_header(tmp_path, photometric, window):
    pixels = radiograph_pixels(1).astype(np.uint16) * 8
    path = write_dicom(tmp_path / "a.dcm", radiograph(pixels, photometric=photometric, ViewPosition="AP", **window))
    assert SECRET.encode() in path.read_bytes()
    (image,) = stored(path)
    assert image.path == Path("a.png")
    assert image.view == "AP"
    assert image.data.startswith(b"\x89PNG")
    assert SECRET.encode() not in image.data
    before, after = read_image(path).pixels, read_image(image.data).pixels
    assert np.abs(np.asarray(before) - np.asarray(after)).max() <= 0.5 / 255 + 1e-6


def test_slices_of_a_dicom_series_become_one_volume_in_hounsfield_units(tmp_path):
    paths = write_series(tmp_path / "ct", series())
    (image,) = stored(*paths, modality="ct")
    assert image.path.name.endswith(".nii.gz")
    assert SECRET.encode() not in image.data
    (before,), after = read_study(paths), read_image(image.data)
    assert after.units == "hu"
    assert after.spacing == pytest.approx(before.spacing)
    np.testing.assert_allclose(np.asarray(after.pixels), np.asarray(before.pixels), atol=0.5)


def test_other_files_are_stored_as_they_are(tmp_path):
    for name, ending in (("a", "png"), ("b", "jpg")):
        path = tmp_path / f"{name}.{ending}"
        Image.fromarray(radiograph_pixels(2)).save(path)
        (image,) = stored(path, view="PA")
        assert (image.path, image.data, image.view) == (Path(path.name), path.read_bytes(), "PA")


def test_views_in_files_of_different_kinds(tmp_path):
    dicom = write_dicom(tmp_path / "a.dcm", radiograph(radiograph_pixels(1)))
    Image.fromarray(radiograph_pixels(2)).save(tmp_path / "b.png")
    first, second = stored(dicom, tmp_path / "b.png")
    assert first.path == Path("a.png")
    assert second.data == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "LA", "1"])
def test_pictures_are_reduced_to_a_shortest_side(tmp_path, mode):
    pixels = radiograph_pixels(3, rows=256, columns=192)
    Image.fromarray(pixels).convert(mode).save(tmp_path / "a.png")
    (image,) = stored(tmp_path / "a.png", size=96)
    with Image.open(io.BytesIO(image.data)) as picture:
        assert picture.size == (96, 128)
    before = np.asarray(read_image(tmp_path / "a.png").pixels)[0].reshape(128, 2, 96, 2).mean(axis=(1, 3))
    after = np.asarray(read_image(image.data).pixels)[0]
    assert np.abs(before - after).mean() < (0.05 if mode != "1" else 0.15)
    (untouched,) = stored(tmp_path / "a.png", size=192)
    assert untouched.data == (tmp_path / "a.png").read_bytes()


def test_a_reduced_photograph_of_a_film_stays_upright(tmp_path):
    pixels = radiograph_pixels(3, rows=256, columns=192)
    exif = Image.Exif()
    exif[274] = 6  # to be turned by a quarter
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif, quality=95)
    (image,) = stored(tmp_path / "a.jpg", size=96)
    assert np.asarray(read_image(image.data).pixels).shape == (1, 96, 128)
    assert np.asarray(read_image(tmp_path / "a.jpg").pixels).shape == (1, 192, 256)


def test_dicom_is_reduced_too_and_volumes_are_not(tmp_path):
    path = write_dicom(tmp_path / "a.dcm", radiograph(radiograph_pixels(3, rows=256, columns=192)))
    (image,) = stored(path, size=96)
    assert np.asarray(read_image(image.data).pixels).shape == (1, 128, 96)
    paths = write_series(tmp_path / "ct", series())
    (volume,) = stored(*paths, size=32, modality="ct")
    assert read_image(volume.data).pixels.shape == read_study(paths)[0].pixels.shape


def test_a_picture_of_16_bits_keeps_its_values_when_it_is_reduced(tmp_path):
    pixels = radiograph_pixels(3, rows=256, columns=192).astype(np.uint16) * 200
    Image.fromarray(pixels).save(tmp_path / "a.png")
    (image,) = stored(tmp_path / "a.png", size=96)
    with Image.open(io.BytesIO(image.data)) as picture:
        assert picture.size == (96, 128)
        reduced = np.asarray(picture).astype(float)
    expected = pixels.reshape(128, 2, 96, 2).mean(axis=(1, 3))
    assert np.abs(reduced - expected).mean() < 0.05 * pixels.max()


@pytest.mark.parametrize("content", [b"", b"<html>", b"\x1f\x8b" + bytes(40)])
def test_what_is_no_image_is_not_stored(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.png: no image that can be read"):
        stored(tmp_path / "a.png")


def test_a_cut_picture_is_told_of_where_it_is_reduced(tmp_path):
    Image.fromarray(radiograph_pixels(3, rows=256, columns=192)).save(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:4000])
    with pytest.raises(ValueError, match="cannot be decoded"):
        stored(tmp_path / "a.png", size=96)


def test_a_damaged_file_is_an_error_that_names_it(tmp_path):
    path = write_dicom(tmp_path / "a.dcm", radiograph(radiograph_pixels(1)))
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(ValueError, match=r"a\.dcm"):
        stored(path)
    with pytest.raises(FileNotFoundError, match=r"gone\.png"):
        stored(tmp_path / "gone.png")


def test_paths_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (image,) = ImageStore("paths")(record(Path("a.png"))).images
    assert image == ImageFile(tmp_path / "a.png")
    with pytest.raises(ValueError, match="images that are files"):
        ImageStore("paths")(StudyRecord("a", "made_up", "cxr", images=(ImageFile(None, b"bytes"),)))
