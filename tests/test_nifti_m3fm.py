# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
import gzip
import io
import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from m3fm import nifti_m3fm
from m3fm.chest_image_m3fm import ChestImage, LazyPixels
from m3fm.imaging_m3fm import read_image

nibabel = pytest.importorskip("nibabel")

HU = np.random.default_rng(0).integers(-1024, 2000, (5, 6, 7)).astype(np.int16)  # (x, y, z)
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])  # stored as it is displayed


def nifti_bytes(values: np.ndarray, affine: np.ndarray | None = LPS, **header) -> bytes:
    """Write a NIfTI-1 file, and then into its header what may not be true."""
    data = nibabel.Nifti1Image(values, affine).to_bytes()
    fields = nibabel.Nifti1Header(data[:348])
    for key, value in header.items():
        fields[key] = value
    return fields.binaryblock + data[348:]


def codes(image: ChestImage) -> list[str]:
    return [remark.code for remark in image.remarks]


def affine_of(axes: tuple[int, ...], signs: tuple[int, ...], sizes=(1.0, 1.5, 2.5), degrees: float = 0) -> np.ndarray:
    """Return an affine whose stored axes run along these world axes, tilted about the first one."""
    affine = np.zeros((4, 4))
    affine[list(axes), range(3)] = np.multiply(signs, sizes)
    affine[:, 3] = (3, -7, 11, 1)
    sine, cosine = np.sin(np.radians(degrees)), np.cos(np.radians(degrees))
    turn = np.array([[1, 0, 0, 0], [0, cosine, -sine, 0], [0, sine, cosine, 0], [0, 0, 0, 1]])
    return turn @ affine


# --------------------------------------------------------------------------------------------------------------------
# Orientation


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PIR"])
def test_right_is_left_and_anterior_on_top_whatever_the_axes(codes):
    ras = np.full((4, 5, 6), -1000, np.int16)  # x to the right, y to anterior, z to superior
    ras[-1, :, :] += 100  # patient's right
    ras[:, -1, :] += 10  # anterior
    ras[:, :, -1] += 1  # superior
    image = nibabel.Nifti1Image(ras, np.eye(4))
    target = nibabel.orientations.axcodes2ornt(tuple(codes))
    turned = image.as_reoriented(nibabel.orientations.ornt_transform(nibabel.io_orientation(image.affine), target))
    read = read_image(turned.to_bytes())
    assert (read.modality, read.units, read.pixels.shape) == ("ct", "hu", (6, 5, 4))
    marks = np.asarray(read.pixels) + 1000
    np.testing.assert_array_equal(marks // 100, np.broadcast_to([1, 0, 0, 0], (6, 5, 4)))  # right at left
    np.testing.assert_array_equal(marks[:-1, 0, 1:], 10)  # anterior at the top
    np.testing.assert_array_equal(marks[-1] % 10, 1)  # superior last


def test_every_orientation_agrees_with_simpleitk(tmp_path):
    sitk = pytest.importorskip("SimpleITK")
    for number, (axes, signs) in enumerate(
        itertools.product(itertools.permutations(range(3)), itertools.product((1, -1), repeat=3))
    ):
        affine = affine_of(axes, signs, degrees=(number % 2) * 12)
        path = tmp_path / f"{number}.nii"
        path.write_bytes(nifti_bytes(HU, affine))
        oriented = sitk.DICOMOrient(sitk.ReadImage(path), "LPS")
        expected, spacing = sitk.GetArrayFromImage(oriented), oriented.GetSpacing()[::-1]
        for source in (path, path.read_bytes(), nibabel.load(path), sitk.ReadImage(path)):
            image = read_image(source)
            np.testing.assert_array_equal(np.asarray(image.pixels), expected)
            np.testing.assert_allclose(image.spacing, spacing, rtol=1e-5)
            assert ("oblique" in codes(image)) == (number % 2 == 1 or axes[2] != 2)
            as_stored = (axes, signs) == ((0, 1, 2), (-1, -1, 1))
            assert ("reoriented" in codes(image)) == (not as_stored)


def test_one_plane_is_shown_as_it_lies():
    plane = np.arange(30, dtype=np.int16).reshape(5, 6) - 1000
    axial = read_image(nifti_bytes(plane, LPS))
    np.testing.assert_array_equal(axial.pixels[0], plane.T)
    coronal = read_image(nifti_bytes(plane[:, None, :], np.diag([-1, -1, 1, 1])))  # x to the left, z up
    np.testing.assert_array_equal(coronal.pixels[0], plane.T[::-1])
    sagittal = read_image(nifti_bytes(plane[None], np.diag([-1, -1, 1, 1])))  # y to posterior, z up
    np.testing.assert_array_equal(sagittal.pixels[0], plane.T[::-1])
    for image in (coronal, sagittal):
        assert image.units == "hu" and codes(image) == ["reoriented"]


def test_missing_and_useless_geometry_is_said():
    unknown = read_image(nifti_bytes(HU, None))
    assert codes(unknown) == ["assumed", "reoriented"] and unknown.spacing is None
    assert unknown.remarks[0].severity == "warning"
    np.testing.assert_array_equal(unknown.pixels, HU.transpose(2, 1, 0)[:, ::-1])  # as nibabel takes it
    sized = nibabel.Nifti1Image(HU, None)
    sized.header.set_zooms((0.7, 0.8, 3))
    np.testing.assert_allclose(read_image(sized.to_bytes()).spacing, (3, 0.8, 0.7), rtol=1e-6)
    flat = nifti_bytes(HU, LPS, srow_x=[0, 0, 0, 0], qform_code=0)
    assert codes(read_image(flat))[0] == "assumed"
    by_qform = nibabel.Nifti1Image(HU, None)
    by_qform.set_qform(LPS, 1)
    assert codes(read_image(by_qform.to_bytes())) == []


def test_spacing_is_in_millimetres():
    for unit, factor in (("mm", 1), ("meter", 1000), ("micron", 0.001), ("unknown", 1)):
        image = nibabel.Nifti1Image(HU, affine_of((0, 1, 2), (-1, -1, 1), (0.7, 0.8, 3)))
        image.header.set_xyzt_units(unit)
        np.testing.assert_allclose(read_image(image.to_bytes()).spacing, np.multiply((3, 0.8, 0.7), factor), rtol=1e-6)
        np.testing.assert_allclose(read_image(image).spacing, np.multiply((3, 0.8, 0.7), factor), rtol=1e-6)


# --------------------------------------------------------------------------------------------------------------------
# Values


@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("dtype", ["i2", "i4", "i8", "f4", "f8"])
def test_both_versions_both_orders_every_type(kind, order, dtype):
    image = kind(HU.astype(order + dtype), LPS, kind.header_class(endianness=order))
    image.header.set_data_dtype(order + dtype)
    data = image.to_bytes()
    for source in (data, gzip.compress(data), image):
        np.testing.assert_array_equal(read_image(source).pixels, HU.transpose(2, 1, 0))


def test_scaling_is_applied_to_the_slices_asked_for(tmp_path):
    stored = np.arange(5 * 6 * 7, dtype=np.int16).reshape(5, 6, 7)
    path = tmp_path / "a.nii"
    path.write_bytes(nifti_bytes(stored, scl_slope=2, scl_inter=-1000))
    expected = stored.transpose(2, 1, 0) * 2 - 1000
    for source in (path, path.read_bytes(), nibabel.load(path)):
        np.testing.assert_array_equal(read_image(source).pixels, expected)


def test_the_first_of_several_volumes_is_taken(tmp_path):
    series = np.stack([HU, HU + 7, HU + 9], axis=-1)
    path = tmp_path / "a.nii.gz"
    path.write_bytes(gzip.compress(nifti_bytes(series)))
    for source in (path, nibabel.load(path), nifti_bytes(series), nifti_bytes(series[..., None])):
        image = read_image(source)
        np.testing.assert_array_equal(image.pixels, HU.transpose(2, 1, 0))
        assert codes(image) == ["first_volume"]
    assert codes(read_image(nifti_bytes(HU[..., None]))) == []
    with pytest.raises(ValueError, match="holds no plane or volume"):
        read_image(nifti_bytes(np.zeros((1, 1, 1, 60), np.float32)))


def test_colour_volumes_become_grey():
    colours = np.random.default_rng(0).integers(0, 256, (5, 6, 7, 3), dtype=np.uint8)
    kind = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])
    image = read_image(nifti_bytes(colours.view(kind)[..., 0]))
    expected = colours.transpose(2, 1, 0, 3) @ np.array([0.299, 0.587, 0.114]) / 255
    np.testing.assert_allclose(image.pixels, expected, atol=1 / 255)
    assert image.units == "intensity" and codes(image) == ["colour", "display_values"]


def test_display_values_stored_offsets_and_gaps():
    shown = (np.abs(HU) % 256).astype(np.uint8)
    image = read_image(nifti_bytes(shown))
    assert (image.units, image.modality, codes(image)) == ("intensity", None, ["display_values"])
    np.testing.assert_allclose(image.pixels, shown.transpose(2, 1, 0) / 255, atol=1e-6)
    doubtful = read_image(nifti_bytes(HU.clip(0)))
    assert (doubtful.units, codes(doubtful)) == ("hu", ["uncalibrated"])
    holes = HU.astype(np.float32)
    holes[0, 0] = np.nan
    pixels = np.asarray(read_image(nifti_bytes(holes)).pixels)
    assert (pixels[:, 0, 0] == holes[np.isfinite(holes)].min()).all()


# --------------------------------------------------------------------------------------------------------------------
# Files


def test_pairs_are_read_from_either_half(tmp_path):
    for suffixes in ((".hdr", ".img"), (".HDR", ".IMG")):
        image = nibabel.Nifti1Pair(HU, LPS)
        nibabel.save(image, tmp_path / "a.hdr")
        for before, after in zip((".hdr", ".img"), suffixes, strict=True):
            (tmp_path / f"a{before}").rename(tmp_path / f"b{after}")
        for suffix in suffixes:
            np.testing.assert_array_equal(read_image(tmp_path / f"b{suffix}").pixels, HU.transpose(2, 1, 0))
    header = (tmp_path / "b.HDR").read_bytes()
    with pytest.raises(ValueError, match="header without its image"):
        read_image(header)
    (tmp_path / "alone.hdr").write_bytes(header)
    (tmp_path / "orphan.img").write_bytes(b"\0" * 99)
    (tmp_path / "old.hdr").write_bytes(header[:344] + b"\0" * 4)
    with pytest.raises(ValueError, match="header without its image"):
        read_image(tmp_path / "alone.hdr")
    with pytest.raises(ValueError, match="without its .hdr beside it"):
        read_image(tmp_path / "orphan.img")
    with pytest.raises(ValueError, match=r"Analyze 7.5, which does not tell left from right"):
        read_image(tmp_path / "old.hdr")


def test_an_uncompressed_path_is_mapped(tmp_path):
    path = tmp_path / "a.nii"
    path.write_bytes(nifti_bytes(np.repeat(HU, 12, axis=2)))
    image = read_image(path)
    assert isinstance(image.pixels, LazyPixels)
    with path.open("r+b") as file:  # a voxel of a slice that reading has not looked at
        file.seek(352)
        file.write(np.int16(1234).tobytes())
    assert image.pixels[0][0, 0] == 1234


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (nifti_bytes(HU)[:-9], r"damaged NIfTI file: \d+ bytes, expected \d+"),
        (nifti_bytes(HU)[:300], "looks like Analyze|not a readable image"),
        (gzip.compress(nifti_bytes(HU))[:-9], "damaged gzip"),
        (gzip.compress(nifti_bytes(HU)[:-9]), r"damaged NIfTI file: \d+ bytes of voxels"),
        (gzip.compress(nifti_bytes(HU))[:-8] + b"\0" * 8, "damaged gzip"),  # the checksum
        (gzip.compress(b"\0" * 400, mtime=0)[:-9], "gzip"),
        (gzip.compress(b"hello" * 100, mtime=0), "no NIfTI"),
        (nifti_bytes(HU, dim=[3, 0, 6, 7, 1, 1, 1, 1]), "at least one pixel"),
        (nifti_bytes(HU, dim=[3, -5, 6, 7, 1, 1, 1, 1]), "at least one pixel"),
        (nifti_bytes(HU, dim=[1, 5, 1, 1, 1, 1, 1, 1]), "1 dimensions"),
        (nifti_bytes(HU, dim=[3, 32767, 32767, 32767, 1, 1, 1, 1]), "declares"),
        (nifti_bytes(HU, dim=[3, 512, 512, 600, 1, 1, 1, 1]), "damaged NIfTI file"),
        (gzip.compress(nifti_bytes(HU, dim=[3, 512, 512, 600, 1, 1, 1, 1])), r"cannot hold \d+"),
        (gzip.compress(nifti_bytes(HU, dim=[3, 512, 512, 2040, 1, 1, 1, 1], datatype=16, bitpix=32)), "at most"),
        (nifti_bytes(HU.astype(np.complex64)), "complex values"),
        (nifti_bytes(HU, datatype=1), "damaged NIfTI header"),
        (nifti_bytes(HU, vox_offset=-1000), "damaged"),
    ],
)
def test_damage_and_bombs(data, reason, tmp_path):
    path = tmp_path / "a.nii"
    path.write_bytes(data)
    for source, name in ((data, "<bytes>"), (path, str(path))):
        with pytest.raises(ValueError, match=reason) as caught:
            read_image(source)
        assert str(caught.value).startswith(f"{name}: ") and caught.value.__cause__ is None


def test_no_more_is_inflated_than_the_header_declares(monkeypatch):
    behind = gzip.compress(nifti_bytes(HU) + b"\0" * 50_000_000)
    assert read_image(behind).pixels.shape == (7, 6, 5)
    monkeypatch.setattr(nifti_m3fm, "MAX_INFLATED_BYTES", 500)
    with pytest.raises(ValueError, match="expected at most 500"):
        read_image(behind)


def test_descriptions_reach_no_message(capfd):
    secret = b"DOE^JANE"
    data = nifti_bytes(HU, descrip=secret, aux_file=secret, intent_name=secret, vox_offset=353)
    for each in (data, data[:-90], gzip.compress(data)[:-90]):
        try:
            read_image(each)
        except ValueError as error:
            assert secret.decode() not in str(error)
    assert capfd.readouterr() == ("", "")


# The readers alone: importing the package would import torch, which is larger than what is measured.
MEASURE = """
import sys, types
import numpy as np
package = types.ModuleType("m3fm")
package.__path__ = [sys.argv[2]]
sys.modules["m3fm"] = package
from m3fm.imaging_m3fm import read_image
image = read_image(sys.argv[1])
assert image.pixels.shape == (600, 512, 512), image.pixels.shape
image.pixels[np.arange(60, 540, 60)]
with open("/proc/self/status") as status:  # ru_maxrss would count the parent that was copied
    print(next(line.split()[1] for line in status if line.startswith("VmHWM")))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the measure is of Linux")
def test_a_ct_of_600_slices_takes_little_memory(tmp_path):
    """315 MB of voxels are held as stored and never as floats, of which there would be 630 MB."""
    header = nibabel.Nifti1Header()
    header.set_data_shape((512, 512, 600))
    header.set_data_dtype(np.int16)
    header.set_sform(LPS, 1)
    header["magic"], header["vox_offset"] = b"n+1", 352
    path = tmp_path / "a.nii.gz"
    plane = np.full((512, 512), -1000, np.int16).tobytes()
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(header.binaryblock + b"\0" * 4)
        for _ in range(600):
            file.write(plane)
    folder = str(Path(nifti_m3fm.__file__).parent)
    command = [sys.executable, "-c", MEASURE, str(path), folder]
    kibibytes = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert 300_000 < kibibytes < 600_000


def test_file_objects_and_values_of_datasets(tmp_path):
    path = tmp_path / "a.nii.gz"
    path.write_bytes(gzip.compress(nifti_bytes(HU)))
    for source in (io.BytesIO(path.read_bytes()), {"bytes": None, "path": str(path)}):
        np.testing.assert_array_equal(read_image(source).pixels, HU.transpose(2, 1, 0))


def test_images_of_nibabel_and_simpleitk():
    in_memory = nibabel.Nifti1Image(HU, affine_of((0, 1, 2), (1, 1, 1)))
    np.testing.assert_array_equal(read_image(in_memory).pixels, HU[::-1, ::-1].transpose(2, 1, 0))
    mgh = nibabel.MGHImage(HU, LPS)
    np.testing.assert_array_equal(read_image(mgh).pixels, HU.transpose(2, 1, 0))
    assert codes(read_image(nibabel.Nifti1Image(HU, None)))[0] == "assumed"
    sitk = pytest.importorskip("SimpleITK")
    plane = sitk.GetImageFromArray(HU[0])
    np.testing.assert_array_equal(read_image(plane).pixels[0], HU[0])
    with pytest.raises(ValueError, match="<Image>: expected a SimpleITK image of one component"):
        read_image(sitk.GetImageFromArray(np.zeros((4, 4, 3), np.uint8), isVector=True))
