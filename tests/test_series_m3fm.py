# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
import io
import os
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from m3fm import series_m3fm
from m3fm.chest_image_m3fm import LazyPixels
from m3fm.imaging_m3fm import ChestImage, read_image
from m3fm.series_m3fm import group_studies, read_study
from m3fm.study_files_m3fm import find_images

pydicom = pytest.importorskip("pydicom")
nibabel = pytest.importorskip("nibabel")

from tests.dicom_files import (  # noqa: E402  (needs pydicom)
    AXIAL,
    RAMP,
    SECRET,
    ct_slice,
    dicom_bytes,
    enhanced_ct,
    radiograph,
    write_dicom,
)
from tests.phantoms import ct_volume  # noqa: E402
from tests.series_files import CORONAL, FROM_ABOVE, PRONE, SAGITTAL, phantom, series, write_series  # noqa: E402


def remarks_of(image: ChestImage) -> dict[str, object]:
    return {remark.code: remark for remark in image.remarks}


def only(items: Sequence[Any]) -> Any:
    assert len(items) == 1
    return items[0]


def patient_volume(xs: np.ndarray, ys: np.ndarray, zs: np.ndarray) -> np.ndarray:
    """The phantom as an axial display shows it: slices to superior, rows to posterior, columns to the left."""
    z, y, x = np.meshgrid(zs, ys, xs, indexing="ij")
    return phantom(x, y, z)


X, Y, Z = np.arange(-24, 24), np.arange(-20, 20), 100 + 2 * np.arange(12)


# --------------------------------------------------------------------------------------------------------------------
# Order and orientation


@pytest.mark.parametrize(
    ("orientation", "start", "step"),
    [
        (AXIAL, (-24, -20, 100), (0, 0, 2)),
        (AXIAL, (-24, -20, 122), (0, 0, -2)),  # numbered from the head
        (PRONE, (23, 19, 100), (0, 0, 2)),
        (PRONE, (23, 19, 122), (0, 0, -2)),
        (FROM_ABOVE, (-24, 19, 122), (0, 0, -2)),
        (FROM_ABOVE, (-24, 19, 100), (0, 0, 2)),
        ((-1, 0, 0, 0, 1, 0), (23, -20, 100), (0, 0, 2)),
    ],
)
def test_axial_series_show_the_same_patient_however_they_were_stored(tmp_path, orientation, start, step):
    write_series(tmp_path / "series", series(orientation=orientation, start=start, step=step))
    image = only(read_study(tmp_path / "series"))
    assert (image.modality, image.units) == ("ct", "hu")
    assert isinstance(image.pixels, LazyPixels)
    np.testing.assert_array_equal(image.pixels[:], patient_volume(X, Y, Z))
    assert image.spacing == pytest.approx((2, 1, 1))
    assert {"gap", "duplicates", "other_series", "assumed", "oblique"}.isdisjoint(remarks_of(image))


def test_rows_and_columns_exchanged_are_shown_upright(tmp_path):
    slices = series(orientation=(0, 1, 0, 1, 0, 0), start=(-24, -20, 122), rows=48, columns=40)  # normal: downwards
    write_series(tmp_path, slices)
    image = only(read_study(tmp_path))
    np.testing.assert_array_equal(image.pixels[:], patient_volume(X, Y, Z))


def test_a_shuffled_list_of_paths_bytes_and_files_is_one_volume(tmp_path):
    paths = write_series(tmp_path, series())
    sources = [str(path) if i % 3 == 0 else path.read_bytes() if i % 3 == 1 else path for i, path in enumerate(paths)]
    sources[2] = io.BytesIO(paths[2].read_bytes())
    sources[3] = {"bytes": paths[3].read_bytes(), "path": None}
    sources[4] = {"bytes": None, "path": str(paths[4])}
    sources[5] = pydicom.dcmread(paths[5])
    sources[6] = io.BufferedReader(io.BytesIO(paths[6].read_bytes()))
    random.Random(1).shuffle(sources)
    for given in (sources, tuple(sources)):
        image = only(read_study(given))
        np.testing.assert_array_equal(image.pixels[:], patient_volume(X, Y, Z))


def test_data_sets_of_pydicom_are_one_volume(tmp_path):
    image = only(read_study(series(6)[::-1]))
    np.testing.assert_array_equal(image.pixels[:], patient_volume(X, Y, Z[:6]))


def test_only_slices_that_are_asked_for_are_decoded(tmp_path, monkeypatch):
    write_series(tmp_path, series(30))
    decoded = []
    read = series_m3fm.read_image
    monkeypatch.setattr(series_m3fm, "read_image", lambda *given: decoded.append(given[0]) or read(*given))
    image = only(read_study(tmp_path))
    assert len(decoded) == 1  # for what holds for all
    image.take(range(0, 30, 4))
    assert len(decoded) == 9


def test_slices_are_decoded_when_asked_for(tmp_path):
    paths = write_series(tmp_path, series())
    image = only(read_study(paths))
    for number, path in enumerate(paths):
        if number not in (2, 7):
            path.unlink()
    taken = image.take([2, 7])
    np.testing.assert_array_equal(taken.pixels, patient_volume(X, Y, Z)[[2, 7]])
    assert (taken.slice_numbers, taken.source_slices) == ((2, 7), 12)


@pytest.mark.parametrize(
    ("orientation", "start", "word"),
    [(CORONAL, (-24, -20, 139), "coronal"), (SAGITTAL, (-24, -20, 139), "sagittal")],
)
def test_other_planes_are_kept_and_told(tmp_path, orientation, start, word):
    write_series(tmp_path, series(orientation=orientation, start=start))
    image = only(read_study(tmp_path))
    remark = remarks_of(image)["oblique"]
    assert word in remark.message and remark.severity == "warning"
    zs = 139 - np.arange(40)  # rows from superior down
    if word == "coronal":  # from anterior to posterior
        expected = patient_volume(X, -20 + 2 * np.arange(12), zs).transpose(1, 0, 2)
    else:  # from the patient's right to the left, anterior at the left
        expected = patient_volume(-46 + 2 * np.arange(12), -20 + np.arange(48), zs).transpose(2, 0, 1)
    np.testing.assert_array_equal(image.pixels[:], expected)


@pytest.mark.parametrize(("degrees", "severity"), [(10, "info"), (20, "warning")])
def test_a_tilted_gantry_is_told_in_degrees(tmp_path, degrees, severity):
    angle = np.deg2rad(degrees)
    tilted = (1, 0, 0, 0, np.cos(angle), np.sin(angle))
    write_series(tmp_path, series(orientation=tilted, step=(0, 0, 2.5)))  # the table moves along z
    image = only(read_study(tmp_path))
    tilted, shifted = [remark for remark in image.remarks if remark.code == "oblique"]
    assert [tilted.value, shifted.value] == pytest.approx([degrees, degrees], abs=0.1)
    assert shifted.severity == severity
    assert image.spacing[0] == pytest.approx(2.5 * np.cos(angle), abs=1e-3)
    middle = image.pixels[:][:, 20, 20]
    assert (np.diff(middle) > 0).all()


# --------------------------------------------------------------------------------------------------------------------
# What is missing, twice there, or not of the volume


def test_gaps_are_counted_in_slices_and_millimetres(tmp_path):
    slices = series(20)
    del slices[5:8], slices[10]
    write_series(tmp_path, slices)
    image = only(read_study(tmp_path))
    remark = remarks_of(image)["gap"]
    assert (remark.value, remark.severity) == (4, "warning")
    assert "4 slices missing in 2 gaps, the widest 8 mm; usual step 2 mm" in remark.message
    assert len(image.pixels) == 16 and image.spacing[0] == 2


def test_uneven_spacing_is_told(tmp_path):
    slices = series(10)
    slices[4].ImagePositionPatient[2] += 0.5
    write_series(tmp_path, slices)
    remark = remarks_of(only(read_study(tmp_path)))["gap"]
    assert (remark.value, remark.limit, remark.severity) == (0.5, 0.2, "info")
    assert "from 1.5 to 2.5 mm" in remark.message


def test_of_slices_at_one_place_the_original_is_kept(tmp_path):
    slices = series(10)
    derived = series(10, ImageType=["DERIVED", "PRIMARY", "AXIAL"])[3]
    derived.InstanceNumber = 1  # of several originals the lowest number would be kept
    later = series(10)[6]
    later.InstanceNumber = 40
    for entry in (derived, later):
        entry.SOPInstanceUID += ".1"
        entry.PixelData = bytes(len(entry.PixelData))
    for order in (1, -1):
        given = [dicom_bytes(entry) for entry in [*slices, derived, later]][::order]
        image = only(read_study(given))
        remark = remarks_of(image)["duplicates"]
        assert remark.value == 2 and "originals" in remark.message
        np.testing.assert_array_equal(image.pixels[:], patient_volume(X, Y, Z[:10]))


def test_the_same_files_twice_are_one_volume(tmp_path):
    slices = series(10)
    write_series(tmp_path / "a", slices)
    write_series(tmp_path / "b", slices, seed=3)
    image = only(read_study(tmp_path))
    assert remarks_of(image)["duplicates"].value == 10
    np.testing.assert_array_equal(image.pixels[:], patient_volume(X, Y, Z[:10]))


def test_localizers_reports_captures_and_other_modalities_are_left_out(tmp_path):
    write_series(tmp_path, series(12))
    scout = ct_slice(series=2, orientation=CORONAL, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    write_dicom(tmp_path / "scout", scout)
    unmarked = ct_slice(series=3, orientation=SAGITTAL)
    write_dicom(tmp_path / "unmarked", unmarked)
    capture = ct_slice(series=4, SOPClassUID="1.2.840.10008.5.1.4.1.1.7", Modality="OT", ImagePositionPatient=None)
    write_dicom(tmp_path / "capture", capture)
    dose = ct_slice(series=5, SOPClassUID="1.2.840.10008.5.1.4.1.1.88.67", Modality="SR", PixelData=None)
    write_dicom(tmp_path / "dose", dose)
    write_dicom(tmp_path / "pet", ct_slice(series=6, Modality="PT", SOPClassUID="1.2.840.10008.5.1.4.1.1.128"))
    image = only(read_study(tmp_path))
    np.testing.assert_array_equal(image.pixels[:], patient_volume(X, Y, Z))
    found = [(remark.code, remark.value) for remark in image.remarks]
    assert sorted(found) == [
        ("localizer", 1), ("localizer", 1), ("not_images", 1), ("not_images", 1), ("other_series", 1)
    ]  # fmt: skip
    assert "images of another modality left out: 1" in remarks_of(image)["other_series"].message


def test_slices_of_another_size_or_spacing_are_left_out(tmp_path):
    slices = series(20)
    odd = series(23, rows=32, columns=32)[20:22] + series(23, spacing=(0.5, 0.5))[22:]
    write_series(tmp_path, slices + odd)
    image = only(read_study(tmp_path))
    assert image.pixels.shape == (20, 40, 48)
    remark = remarks_of(image)["other_series"]
    assert remark.value == 3 and "another size, spacing or orientation" in remark.message


def test_without_positions_the_instance_number_orders(tmp_path):
    slices = series(12, ImagePositionPatient=None)
    write_series(tmp_path, slices)
    image = only(read_study(tmp_path))
    remark = remarks_of(image)["assumed"]
    assert "instance number" in remark.message and remark.severity == "warning"
    np.testing.assert_array_equal(image.pixels[:], patient_volume(X, Y, Z))
    same = series(12, step=(0, 0, 0))  # a place that was overwritten
    assert len(only(read_study([dicom_bytes(entry) for entry in same])).pixels) == 12


def test_slices_that_state_no_position_among_others_are_left_out(tmp_path):
    slices = series(12)
    del slices[4].ImagePositionPatient
    image = only(read_study([dicom_bytes(entry) for entry in slices]))
    assert len(image.pixels) == 11
    assert remarks_of(image)["unreadable_slices"].value == 1 and remarks_of(image)["gap"].value == 1


def test_a_pair_of_files_without_a_series_is_still_a_volume(tmp_path):
    bare = {"SeriesInstanceUID": None, "StudyInstanceUID": None, "PatientID": None, "PatientName": None}
    image = only(read_study([dicom_bytes(entry) for entry in series(2, InstanceNumber=None, **bare)][::-1]))
    np.testing.assert_array_equal(image.pixels[:], patient_volume(X, Y, Z[:2]))


# --------------------------------------------------------------------------------------------------------------------
# Damage


def test_damaged_headers_are_left_out_up_to_a_third(tmp_path):
    paths = write_series(tmp_path, series(12))
    for path in paths[3:5]:
        path.write_bytes(path.read_bytes()[:150])
    image = only(read_study(tmp_path))
    assert len(image.pixels) == 10 and remarks_of(image)["unreadable_slices"].value == 2
    for path in paths[5:9]:
        path.write_bytes(path.read_bytes()[:150])
    with pytest.raises(ValueError, match="6 of 12 slices cannot be read, .*; expected at most a third") as caught:
        read_study(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}: ") and SECRET not in str(caught.value)


def test_a_slice_with_damaged_pixels_is_replaced_by_its_neighbour(tmp_path):
    paths = write_series(tmp_path, series(12))
    paths[4].write_bytes(paths[4].read_bytes()[:-500])
    image = only(read_study(tmp_path))
    taken = image.take([2, 4, 8])
    np.testing.assert_array_equal(taken.pixels, patient_volume(X, Y, Z)[[2, 3, 8]])
    remark = {remark.code: remark for remark in taken.remarks}["unreadable_slices"]
    assert (remark.value, remark.severity) == (1, "warning")
    for path in paths:
        path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(ValueError) as caught:
        image.take([5])
    assert str(caught.value).startswith(str(paths[5]))
    with pytest.raises(ValueError):
        read_study(tmp_path)


def test_a_file_that_went_away_is_named(tmp_path):
    paths = write_series(tmp_path, series(12))
    image = only(read_study(tmp_path))
    for path in paths:
        path.unlink()
    with pytest.raises(ValueError, match="no such file") as caught:
        image.pixels[3]
    assert str(caught.value).startswith(str(paths[3]))


# --------------------------------------------------------------------------------------------------------------------
# Studies that are none


def test_two_patients_are_refused_without_saying_whose(tmp_path):
    write_series(tmp_path / "a", series(6))
    write_series(tmp_path / "b", series(6, PatientID="OTHER^ONE", series=2))
    with pytest.raises(ValueError, match="2 patients, expected the images of one study") as caught:
        read_study(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}: ")
    assert SECRET not in str(caught.value) and "OTHER" not in str(caught.value)


def test_ct_and_radiographs_are_refused_together(tmp_path):
    write_series(tmp_path, series(6))
    write_dicom(tmp_path / "cr", radiograph())
    for sources in (tmp_path, [tmp_path], sorted(tmp_path.iterdir())):
        with pytest.raises(ValueError, match="give the CT as one study and the radiographs as another"):
            read_study(sources)
    volume = ChestImage(np.zeros((4, 8, 8), np.float32), "ct", "hu")
    with pytest.raises(ValueError, match="CT and radiographs"):
        read_study([volume, tmp_path / "cr"])


def test_empty_studies(tmp_path):
    with pytest.raises(ValueError, match="empty list, expected at least one image"):
        read_study([])
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(ValueError, match="holds no chest image, got 1 files") as caught:
        read_study(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}: ")
    write_dicom(tmp_path / "sr", ct_slice(Modality="SR", PixelData=None))
    with pytest.raises(ValueError, match="holds no chest image, got 1 DICOM files of other kinds"):
        read_study(tmp_path)
    with pytest.raises(ValueError, match="no such file"):
        read_study(tmp_path / "missing")
    with pytest.raises(ValueError, match="no such file"):
        read_study([tmp_path / "missing", tmp_path / "also missing"])
    with pytest.raises(ValueError, match="200 images, expected one study of at most 128"):
        read_study([np.zeros((8, 8), np.uint8)] * 200)
    with pytest.raises(ValueError, match="binary mode"):
        read_study([io.StringIO("a"), io.StringIO("b")])


# --------------------------------------------------------------------------------------------------------------------
# Other images


def gray_png(path: Path, value: int = 0) -> Path:
    Image.fromarray(((RAMP + value) % 256).astype(np.uint8)).save(path, "PNG")
    return path


def test_one_source_is_read_as_read_image_does(tmp_path):
    path = gray_png(tmp_path / "a.png")
    array = np.asarray(Image.open(path))
    for source in (path, str(path), path.read_bytes(), array, Image.open(path), [path], (array,)):
        np.testing.assert_array_equal(only(read_study(source)).pixels, read_image(path).pixels)
    image = read_image(path)
    assert only(read_study(image)) is image
    with path.open("rb") as file:
        np.testing.assert_array_equal(only(read_study(file)).pixels, image.pixels)


def test_a_list_keeps_its_order_and_a_volume_stands_where_it_began(tmp_path):
    pngs = [gray_png(tmp_path / f"{i}.png", 10 * i) for i in range(3)]
    images = read_study([pngs[2], np.asarray(Image.open(pngs[0])), Image.open(pngs[1]), pngs[0].read_bytes()])
    for image, path in zip(images, (pngs[2], pngs[0], pngs[1], pngs[0]), strict=True):
        np.testing.assert_array_equal(image.pixels, read_image(path).pixels)
    slices = [dicom_bytes(entry) for entry in series(6)]
    images = read_study([pngs[0], *slices[3:], pngs[1], *slices[:3]])
    assert [image.pixels.shape[0] for image in images] == [1, 6, 1]
    np.testing.assert_array_equal(images[1].pixels[:], patient_volume(X, Y, Z[:6]))


def test_a_folder_of_views_is_a_study_of_several_images(tmp_path):
    for name, view in (("b", "PA"), ("a", "LATERAL")):
        write_dicom(tmp_path / name, radiograph(ViewPosition=view))
    gray_png(tmp_path / "preview.png")
    images = read_study(tmp_path)
    assert [image.view for image in images] == ["LATERAL", "PA"]  # by name
    assert remarks_of(images[0])["not_images"].value == 1


def test_reports_and_captures_of_a_study_are_left_out_beside_its_radiographs(tmp_path):
    study = {"StudyInstanceUID": "1.2.2", "PatientID": SECRET}
    write_dicom(tmp_path / "a", radiograph(ViewPosition="PA", **study))
    write_dicom(tmp_path / "b", radiograph(ViewPosition="LL", **study))
    capture = {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7", "Modality": "OT"}
    write_dicom(tmp_path / "c", radiograph(**study | capture))
    write_dicom(tmp_path / "d", ct_slice(Modality="SR", PixelData=None, **study))
    paths = sorted(tmp_path.iterdir())
    assert group_studies(paths) == [tuple(paths)]
    for sources in (paths, tmp_path):
        images = read_study(sources)
        assert [image.view for image in images] == ["PA", "LATERAL"]
        assert remarks_of(images[0])["not_images"].value == 2
    other = write_dicom(tmp_path / "e", radiograph(**study | capture | {"StudyInstanceUID": "1.2.3"}))
    assert len(read_study([paths[0], other])) == 2  # named by the caller, and of no study that has the radiograph
    assert len(read_study([paths[2]])) == len(read_study([paths[2], paths[3]])) == 1


def test_a_folder_of_rasters_skips_what_is_no_image(tmp_path):
    for i in range(2):
        gray_png(tmp_path / f"{i}")  # no suffix: told by content
    gray_png(tmp_path / "thumb_0.png")
    gray_png(tmp_path / ".hidden.png")
    (tmp_path / "__MACOSX").mkdir()
    gray_png(tmp_path / "__MACOSX" / "0.png")
    (tmp_path / "report.txt").write_text("BM this text starts like a bitmap")
    (tmp_path / "DICOMDIR").write_bytes(b"\0" * 128 + b"DICM")
    (tmp_path / "empty.dcm").write_bytes(b"")
    os.mkfifo(tmp_path / "pipe")
    images = read_study(tmp_path)
    assert len(images) == 2
    assert remarks_of(images[0])["not_images"].value == 7 and not images[1].remarks
    found, skipped = find_images(tmp_path)
    assert found == [(str(tmp_path / "0"), "raster"), (str(tmp_path / "1"), "raster")] and skipped == 7


def test_a_nifti_beside_its_dicom_is_left_out(tmp_path):
    write_series(tmp_path / "dicom", series(6))
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 4, 4), np.int16), np.eye(4)), tmp_path / "a.nii.gz")
    image = only(read_study(tmp_path))
    assert len(image.pixels) == 6 and remarks_of(image)["not_images"].value == 1
    shutil.rmtree(tmp_path / "dicom")
    assert only(read_study(tmp_path)).pixels.shape == (4, 4, 4)


def test_enhanced_ct_is_a_volume_beside_other_series(tmp_path):
    volume = np.stack([RAMP + i for i in range(30)]).astype(np.int16)
    write_dicom(tmp_path / "enhanced", enhanced_ct(volume, thickness=2.0))
    write_dicom(tmp_path / "scout", ct_slice(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"], orientation=CORONAL))
    image = only(read_study(tmp_path))
    assert image.pixels.shape == (30, 40, 48)
    assert remarks_of(image)["localizer"].value == 1


def test_no_tag_value_is_told(tmp_path):
    marks = {"PatientName": SECRET, "PatientID": SECRET, "InstitutionName": SECRET, "SeriesDescription": SECRET}
    slices = series(12, **marks)
    del slices[5]
    write_series(tmp_path, slices)
    write_dicom(tmp_path / "other", ct_slice(series=7, **marks))
    image = only(read_study(tmp_path))
    assert image.remarks and SECRET not in repr(image) + repr(image.remarks) + repr(image.pixels)
    assert not any(
        str(slices[0][key].value) in repr(image.remarks) for key in ("SeriesInstanceUID", "StudyInstanceUID")
    )


@pytest.mark.parametrize("as_bytes", [False, True])
def test_slices_without_rescale_take_their_units_from_one_of_them(tmp_path, as_bytes):
    volume = ct_volume(slices=6, rows=80, columns=96)
    volume[:2] = volume[:2].clip(-1024, 60)  # slices of other contents, which alone might be taken otherwise
    volume[5] = 900
    slices = [
        ct_slice((hu.astype(np.int32) + 1024).astype(np.uint16), rescale=None, position=(0.0, 0.0, 5.0 * i))
        for i, hu in enumerate(volume)
    ]
    paths = write_series(tmp_path, slices)
    (image,) = read_study([path.read_bytes() for path in paths] if as_bytes else paths)
    assert "uncalibrated" in {remark.code for remark in image.remarks}
    assert image.units == "hu"
    assert np.array_equal(np.asarray(image.pixels), volume.astype(np.float32))


@pytest.mark.parametrize("odd", [3, 5])
def test_one_slice_in_other_units_does_not_stand_for_all(tmp_path, odd):
    slices = series(6, rescale=[None if number == odd else (1, -1024) for number in range(6)])
    slices[odd].PixelData = np.full((40, 48), 5000, np.int16).tobytes()  # no histogram that HU could be told from
    (image,) = read_study(write_series(tmp_path, slices))
    assert image.units == "hu"
    pixels = np.asarray(image.pixels)
    assert np.array_equal(pixels[odd], pixels[odd - 1])  # its nearest neighbour
    assert [remark.code for remark in image.take([odd]).remarks] == ["unreadable_slices"]


def test_a_folder_of_images_that_do_not_say_whose_they_are(tmp_path):
    for name in "ab":
        Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(tmp_path / f"{name}.png")
    images = read_study(tmp_path)
    assert len(images) == 2
    assert [(remark.code, remark.severity) for remark in images[0].remarks] == [("assumed", "warning")]
    assert not any(image.remarks for image in read_study([tmp_path / "a.png", tmp_path / "b.png"]))


def test_several_volumes_of_a_folder_are_no_study(tmp_path):
    nibabel = pytest.importorskip("nibabel")
    for name in "ab":
        nibabel.save(nibabel.Nifti1Image(ct_volume().transpose(2, 1, 0), np.eye(4)), tmp_path / f"{name}.nii.gz")
    with pytest.raises(ValueError, match="holds 2 NIfTI volumes, expected one study"):
        read_study(tmp_path)
