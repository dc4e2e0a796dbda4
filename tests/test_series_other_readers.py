# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""The volume of a series is the one that SimpleITK and dcm2niix make of the same files."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from m3fm.imaging_m3fm import ChestImage, read_image
from m3fm.series_m3fm import read_study

pytest.importorskip("pydicom")

from tests.series_files import CORONAL, FROM_ABOVE, PRONE, SAGITTAL, series, write_series  # noqa: E402


def lps_array(path_or_image) -> np.ndarray:
    sitk = pytest.importorskip("SimpleITK")
    return sitk.GetArrayFromImage(sitk.DICOMOrient(path_or_image, "LPS"))  # (z, y, x) to superior, posterior, left


CASES = {
    "supine": {},
    "reversed": {"start": (-24, -20, 122), "step": (0, 0, -2)},
    "prone": {"orientation": PRONE, "start": (23, 19, 122), "step": (0, 0, -2)},
    "from above": {"orientation": FROM_ABOVE, "start": (-24, 19, 122)},
    "coronal": {"orientation": CORONAL, "start": (-24, -20, 139)},
    "sagittal": {"orientation": SAGITTAL, "start": (-24, -20, 139)},
    "tilted": {"orientation": (1, 0, 0, 0, np.cos(0.1), np.sin(0.1))},
}


def as_axial(image: ChestImage, case: str) -> np.ndarray:
    """Bring the slices of other planes to (z, y, x)."""
    pixels = image.pixels[:]
    if case == "coronal":
        return pixels.transpose(1, 0, 2)[::-1]
    return pixels.transpose(1, 2, 0)[::-1] if case == "sagittal" else pixels


@pytest.mark.parametrize("case", CASES)
def test_simpleitk_reads_the_same_volume(tmp_path, case):
    sitk = pytest.importorskip("SimpleITK")
    write_series(tmp_path, series(**CASES[case]))
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(tmp_path)))
    expected = reader.Execute()
    (image,) = read_study(tmp_path)
    np.testing.assert_array_equal(as_axial(image, case), lps_array(expected))
    assert sorted(image.spacing) == pytest.approx(sorted(expected.GetSpacing()), abs=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_dcm2niix_makes_the_same_volume(tmp_path, case):
    program = shutil.which("dcm2niix") or Path(sys.executable).parent / "dcm2niix"
    if not Path(program).is_file():
        pytest.skip("dcm2niix not installed")
    write_series(tmp_path / "in", series(**CASES[case]))
    (tmp_path / "out").mkdir()
    subprocess.run([program, "-f", "a", "-o", tmp_path / "out", tmp_path / "in"], check=True, capture_output=True)
    (path,) = [path for path in (tmp_path / "out").glob("*.nii") if "_Tilt" not in path.name]
    expected = read_image(path)
    (image,) = read_study(tmp_path / "in")
    np.testing.assert_array_equal(as_axial(image, case), expected.pixels[:])
