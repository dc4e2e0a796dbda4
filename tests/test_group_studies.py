# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
import numpy as np
import pytest
from PIL import Image

from m3fm.imaging_m3fm import read_image
from m3fm.series_m3fm import group_studies, read_study

pytest.importorskip("pydicom")

from tests.dicom_files import RAMP, SECRET, ct_slice, radiograph, write_dicom  # noqa: E402  (needs pydicom)
from tests.series_files import series, write_series  # noqa: E402


def test_files_are_parted_into_studies_in_stable_order(tmp_path):
    ct = write_series(tmp_path, series(4, StudyInstanceUID="1.2.1"), prefix="a")
    png = tmp_path / "c.png"
    Image.fromarray(RAMP.astype(np.uint8)).save(png)
    views = [
        write_dicom(tmp_path / name, radiograph(StudyInstanceUID="1.2.2", ViewPosition=view))
        for name, view in (("b1", "PA"), ("d", "LATERAL"))
    ]
    broken = tmp_path / "e.dcm"
    broken.write_bytes(b"\0" * 128 + b"DICM")
    alone = write_dicom(tmp_path / "f", radiograph())  # says no study
    paths = sorted([*ct, png, *views, broken, alone])
    assert group_studies(paths) == [tuple(sorted(ct)), tuple(views), (png,), (broken,), (alone,)]
    assert group_studies(map(str, paths[::-1]))[0] == (str(alone),)
    mixed = write_dicom(tmp_path / "g", radiograph(StudyInstanceUID="1.2.1", PatientID=SECRET))
    report = write_dicom(tmp_path / "h", ct_slice(StudyInstanceUID="1.2.1", Modality="SR", PixelData=None))
    assert group_studies([*ct, mixed, report]) == [(*ct, report), (mixed,)]


@pytest.mark.realdata
def test_real_fixtures(data_root):
    folder = data_root / "fixtures"
    with pytest.raises(ValueError, match="DICOM files of [0-9]+ patients, expected the images of one study") as caught:
        read_study(folder)
    assert str(caught.value).startswith(f"{folder}: ")
    paths = sorted(folder.iterdir())
    studies = group_studies(paths)
    assert sorted(path for study in studies for path in study) == paths
    several = [{path.name for path in study} for study in studies if len(study) > 1]
    assert several == [
        {"ct_lungmask_0.dcm", "ct_lungmask_1.dcm"},
        {"cxr_RG1_monochrome1_j2k_lossy.dcm", "cxr_RG1_monochrome1_uncompressed.dcm"},
        {"cxr_fake_monochrome1.dcm", "cxr_siim_nih_jpeg.dcm"},
    ]
    for study in studies:
        images = read_study(study)
        if study[0].name.startswith("ct"):
            (image,) = images
            assert (image.modality, image.units) == ("ct", "hu")
            assert len(image.pixels) == (2 if "lungmask" in study[0].name else len(read_image(study[0]).pixels))
        else:
            assert [image.modality for image in images] == ["cxr"] * len(study)
    pair = sorted(folder.glob("ct_lungmask_*.dcm"))[::-1]
    (volume,) = read_study(pair)
    assert volume.spacing == pytest.approx((1, 0.625, 0.625))
    np.testing.assert_array_equal(volume.pixels[1], read_image(pair[0]).pixels[0])
    with pytest.raises(ValueError, match="patients"):
        read_study([path for path in paths if "nysbu" in path.name])
