# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
import logging
import threading
import warnings

import numpy as np
import pytest

from m3fm import dicom_pixels_m3fm
from m3fm.chest_image_m3fm import LazyPixels
from m3fm.dicom_m3fm import read_dicom, read_header
from m3fm.dicom_tags_m3fm import quiet_pydicom

pydicom = pytest.importorskip("pydicom")

from tests.dicom_files import AXIAL, RAMP, ct_slice, dicom_bytes, enhanced_ct, item, lut, radiograph, write_dicom  # noqa: E402

LINEAR = "1.2.840.10008.1.2.1"
BIG = "1.2.840.10008.1.2.2"
DEFLATED = "1.2.840.10008.1.2.1.99"
RLE = "1.2.840.10008.1.2.5"
JPEG_LS = "1.2.840.10008.1.2.4.80"
JPEG_2000 = "1.2.840.10008.1.2.4.90"

UNIT = RAMP / RAMP.max()
EIGHT = (RAMP % 256).astype(np.uint8)
COLOUR = np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8)


def read(dataset, percentiles=None):
    return read_dicom(dicom_bytes(dataset), "a.dcm", percentiles)


def codes(image):
    return [remark.code for remark in image.remarks]


def chest_ct(shape=(64, 64)):
    """Return HU of a body of soft tissue with two lungs in air."""
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    volume = np.full(shape, -1000, np.int16)
    volume[(rows - 32) ** 2 / 20**2 + (columns - 32) ** 2 / 28**2 < 1] = 40
    for middle in (20, 44):
        volume[(rows - 32) ** 2 / 12**2 + (columns - middle) ** 2 / 8**2 < 1] = -850
    return volume


# --------------------------------------------------------------------------------------------------------------------
# Display


def test_windows_and_inversion():
    window = {"WindowCenter": 384, "WindowWidth": 769}
    image = read(radiograph(ViewPosition="AP", **window))
    assert (image.modality, image.units, image.view, image.remarks) == ("cxr", "intensity", "AP", ())
    np.testing.assert_allclose(image.pixels[0], np.clip((RAMP - 383.5) / 768 + 0.5, 0, 1), atol=1e-6)
    exact = read(radiograph(VOILUTFunction="LINEAR_EXACT", **window))
    np.testing.assert_allclose(exact.pixels[0], np.clip((RAMP - 384.0) / 769 + 0.5, 0, 1), atol=1e-6)
    sigmoid = read(radiograph(VOILUTFunction="SIGMOID", **window))
    np.testing.assert_allclose(sigmoid.pixels[0], 1 / (1 + np.exp(-4 * (RAMP - 384.0) / 769)), atol=1e-5)
    for tags in (
        {"photometric": "MONOCHROME1"},
        {"PresentationLUTShape": "INVERSE"},
        {"photometric": "MONOCHROME1", "PresentationLUTShape": "INVERSE"},  # one says what the other does
    ):
        np.testing.assert_allclose(read(radiograph(**tags, **window)).pixels, 1 - image.pixels, atol=1e-6)


def test_of_several_windows_the_first_that_fits_is_taken():
    two = {"WindowCenter": [60000, 384], "WindowWidth": [10, 769]}
    image = read(radiograph(**two))
    np.testing.assert_allclose(image.pixels[0], np.clip((RAMP - 383.5) / 768 + 0.5, 0, 1), atol=1e-6)
    assert codes(image) == []
    none = read(radiograph(WindowCenter=[60000, -5], WindowWidth=[10, 0]))
    np.testing.assert_allclose(none.pixels[0], UNIT, atol=1e-6)
    assert codes(none) == ["window_ignored"]
    for center in ("", None):
        np.testing.assert_allclose(read(radiograph(WindowCenter=center, WindowWidth="10")).pixels[0], UNIT, atol=1e-6)


def test_without_a_window_values_are_stretched_and_eight_bits_are_not():
    np.testing.assert_allclose(read(radiograph()).pixels[0], UNIT, atol=1e-6)
    dim = EIGHT // 2
    np.testing.assert_allclose(read(radiograph(dim)).pixels[0], dim / 255, atol=1e-6)
    beside = read(radiograph(dim, WindowCenter=60000, WindowWidth=10))
    np.testing.assert_allclose(beside.pixels[0], dim / 255, atol=1e-6)
    assert read(radiograph(RAMP * 0)).pixels.max() == 0  # blank is read, and left to the input check


def test_padding_is_black_and_not_counted():
    padded = RAMP.copy()
    padded[0] = 65535
    for photometric in ("MONOCHROME2", "MONOCHROME1"):
        image = read(radiograph(padded, photometric=photometric, PixelPaddingValue=65535))
        assert (image.pixels[0, 0] == 0).all() and image.pixels[0, 1:].max() == 1
    ranged = read(radiograph(padded, PixelPaddingValue=65535, PixelPaddingRangeLimit=1900))
    assert (ranged.pixels[0, -1, 30:] == 0).all() and ranged.pixels[0, 1, 0] == 0


@pytest.mark.parametrize("syntax", [LINEAR, BIG])
def test_voi_luts(syntax):
    table = np.arange(2048, dtype=np.uint16)[::-1] * 32 + 31
    order = ">" if syntax == BIG else "<"
    plain = lut([2048, 0, 16], table.astype(f"{order}u2"))
    numbers = lut([2048, 0, 16], table, "US")
    for voi in (plain, numbers):
        image = read(radiograph(syntax=syntax, VOILUTSequence=[voi]))
        np.testing.assert_allclose(image.pixels[0], table[RAMP] / 65535, atol=1e-6)
    # Of 16 bits stated 12 are used: white is the largest value of 12 bits.
    twelve = lut([2048, 0, 16], (np.arange(2048) * 2 + 1).astype(f"{order}u2"))
    image = read(radiograph(syntax=syntax, VOILUTSequence=[twelve]))
    np.testing.assert_allclose(image.pixels[0], (RAMP * 2 + 1) / 4095, atol=1e-6)
    offset = read(radiograph(syntax=syntax, VOILUTSequence=[lut([256, 1000, 8], np.arange(256, dtype=np.uint8))]))
    np.testing.assert_allclose(offset.pixels[0], np.clip(RAMP - 1000.0, 0, 255) / 255, atol=1e-6)


def test_a_damaged_voi_lut_gives_way_to_the_window():
    broken = lut([2048, 0, 16], np.zeros(0, np.uint16))
    window = {"WindowCenter": 384, "WindowWidth": 769}
    np.testing.assert_array_equal(
        read(radiograph(VOILUTSequence=[broken], **window)).pixels, read(radiograph(**window)).pixels
    )
    assert codes(read(radiograph(VOILUTSequence=[broken]))) == ["window_ignored"]


def test_modality_lut_and_rescale_come_before_the_window():
    table = (np.arange(2048, dtype=np.uint16) // 2) + 100
    image = read(radiograph(ModalityLUTSequence=[lut([2048, 0, 16], table)], WindowCenter=600, WindowWidth=1001))
    np.testing.assert_allclose(image.pixels[0], np.clip((table[RAMP] - 599.5) / 1000 + 0.5, 0, 1), atol=1e-6)
    image = read(radiograph(RescaleSlope=2, RescaleIntercept=-50, WindowCenter=1000, WindowWidth=2001))
    np.testing.assert_allclose(image.pixels[0], np.clip((RAMP * 2.0 - 50 - 999.5) / 2000 + 0.5, 0, 1), atol=1e-6)


def test_window_of_a_frame():
    frames = np.stack([RAMP, RAMP])
    groups = [item(FrameVOILUTSequence=[item(WindowCenter=centre, WindowWidth=1001)]) for centre in (500, 1000)]
    image = read(radiograph(frames, PerFrameFunctionalGroupsSequence=groups))
    assert codes(image) == ["frames_as_slices"] and isinstance(image.pixels, LazyPixels)
    for pixels, centre in zip(image.pixels, (500, 1000), strict=True):
        np.testing.assert_allclose(pixels, np.clip((RAMP - (centre - 0.5)) / 1000 + 0.5, 0, 1), atol=1e-6)


# --------------------------------------------------------------------------------------------------------------------
# CT


def test_ct_is_hounsfield_whatever_its_window():
    image = read(ct_slice(WindowCenter=40, WindowWidth=400, rescale=(2, -1024)))
    assert (image.modality, image.units, image.remarks) == ("ct", "hu", ())
    np.testing.assert_array_equal(image.pixels[0], RAMP * 2.0 - 1024)
    assert image.spacing == pytest.approx((1.5, 0.8, 0.7))
    table = (np.arange(2048, dtype=np.uint16) // 2) + 7
    image = read(ct_slice(rescale=None, ModalityLUTSequence=[lut([2048, 0, 16], table)]))
    np.testing.assert_array_equal(image.pixels[0], table[RAMP])


@pytest.mark.parametrize("value", [-2000, 63536])  # the same 16 bits, written as signed or unsigned
def test_ct_padding_is_air(value):
    padded = RAMP.astype(np.int16)
    padded[0] = -2000
    dataset = ct_slice(padded)
    dataset.add_new("PixelPaddingValue", "SS" if value < 0 else "US", value)
    image = read(dataset)
    assert (image.pixels[0, 0] == -1024).all()
    np.testing.assert_array_equal(image.pixels[0, 1:], RAMP[1:] - 1024.0)


def test_padding_within_tissue_needs_the_corners():
    water = RAMP.astype(np.int16)
    image = read(ct_slice(water, rescale=(1, -500), PixelPaddingValue=500))
    np.testing.assert_array_equal(image.pixels[0], RAMP - 500.0)
    water[[0, -1]] = 500
    assert (read(ct_slice(water, rescale=(1, -500), PixelPaddingValue=500)).pixels[0, 0] == -1024).all()


@pytest.mark.parametrize(("offset", "rescale"), [(0, None), (1024, None), (1024, (1, 0))])
def test_hounsfield_units_are_inferred_from_a_plain_histogram(offset, rescale):
    image = read(ct_slice((chest_ct() + offset).astype(np.int16), rescale=rescale))
    np.testing.assert_array_equal(image.pixels[0], chest_ct())
    assert codes(image) == ["uncalibrated"] and image.remarks[0].severity == "warning"


def test_ct_without_rescale_and_without_a_plain_histogram_is_no_hounsfield():
    image = read(ct_slice((RAMP * 20).astype(np.uint16), rescale=None))
    assert (image.units, codes(image)) == ("intensity", ["uncalibrated"])
    other = read(ct_slice(RescaleType="Z_EFF"))
    assert (other.units, codes(other)) == ("intensity", ["uncalibrated"])
    assert read(ct_slice(RescaleType="Hounsfield Unit")).units == "hu"


def test_slices_of_a_series_are_calibrated_alike():
    middle = read(ct_slice((chest_ct() + 1024).astype(np.int16), rescale=None))
    doubtful = ct_slice((RAMP + 1000).astype(np.int16), rescale=None)
    assert read(doubtful).units == "intensity"
    image = read_dicom(dicom_bytes(doubtful), "a", None, like=middle)
    assert (image.units, image.remarks) == ("hu", middle.remarks)
    np.testing.assert_array_equal(image.pixels[0], RAMP - 24.0)
    calibrated = read_dicom(dicom_bytes(ct_slice()), "a", None, like=middle)
    assert (calibrated.units, calibrated.remarks) == ("hu", ())


def test_ct_captures_and_localizers():
    shot = read(ct_slice(EIGHT, rescale=None, SOPClassUID="1.2.840.10008.5.1.4.1.1.7"))
    assert (shot.modality, shot.units, codes(shot)) == ("ct", "intensity", ["display_values"])
    np.testing.assert_allclose(shot.pixels[0], EIGHT / 255, atol=1e-6)
    colour = read(ct_slice(COLOUR, rescale=None))
    assert (colour.modality, colour.units, codes(colour)) == ("ct", "intensity", ["display_values", "colour"])
    assert "localizer" in codes(read(ct_slice(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])))


# --------------------------------------------------------------------------------------------------------------------
# Frames


def test_enhanced_ct_is_ordered_by_place_and_decoded_when_asked(monkeypatch):
    volume = np.stack([RAMP + 10 * i for i in range(5)]).astype(np.int16)
    positions = [(0, 0, z) for z in (4.0, 0.0, 6.0, 2.0, 8.0)]
    rescales = [(1, -1000 - i) for i in range(5)]
    decoded = []
    decode = dicom_pixels_m3fm.FrameDecoder._decoded
    monkeypatch.setattr(
        dicom_pixels_m3fm.FrameDecoder, "_decoded", lambda self, frame: decoded.append(frame) or decode(self, frame)
    )
    image = read(enhanced_ct(volume, positions=positions, rescales=rescales))
    assert isinstance(image.pixels, LazyPixels) and image.pixels.shape == (5, 40, 48)
    assert set(decoded) == {2}  # the middle one, for what is decided on the pixels
    assert (image.modality, image.units, codes(image)) == ("ct", "hu", ["frames_as_slices"])
    assert image.spacing == pytest.approx((2.0, 0.8, 0.7))
    for number, frame in enumerate([1, 3, 0, 2, 4]):
        np.testing.assert_array_equal(image.pixels[number], volume[frame] - 1000.0 - frame)
    assert image.take([1, 3]).slice_numbers == (1, 3)


def test_frames_at_one_place_and_gaps():
    volume = np.stack([RAMP + i for i in range(5)]).astype(np.int16)
    image = read(enhanced_ct(volume, positions=[(0, 0, z) for z in (0, 2, 2, 4, 12)]))
    assert image.pixels.shape[0] == 4 and codes(image) == ["frames_as_slices", "duplicates", "gap"]
    np.testing.assert_array_equal(image.pixels[1], volume[1] - 1024.0)
    assert image.spacing[0] == 2


def test_frames_without_places_keep_their_order():
    volume = np.stack([RAMP, RAMP + 1]).astype(np.int16)
    dataset = ct_slice(volume)  # one place for all of them
    image = read(dataset)
    assert codes(image) == ["frames_as_slices"]
    np.testing.assert_array_equal(np.asarray(image.pixels), volume - 1024.0)
    assert read(enhanced_ct(volume, positions=[(0, 0, 0)])).pixels.shape[0] == 2


def test_a_damaged_frame_is_an_error_when_it_is_asked_for():
    volume = np.stack([RAMP, RAMP + 1, RAMP + 2]).astype(np.int16)
    dataset = enhanced_ct(volume, syntax=RLE)
    frames = list(pydicom.encaps.generate_frames(dataset.PixelData, number_of_frames=3))
    dataset.PixelData = pydicom.encaps.encapsulate([frames[0][:70], *frames[1:]])
    image = read(dataset)
    np.testing.assert_array_equal(image.pixels[2], volume[2] - 1024.0)
    with pytest.raises(ValueError, match=r"a\.dcm: truncated or damaged DICOM pixel data \(frame 0\)"):
        image.pixels[0]


@pytest.mark.parametrize("syntax", [LINEAR, RLE, JPEG_LS, JPEG_2000])
def test_frames_that_are_missing_are_noticed_at_once(syntax):
    volume = np.stack([RAMP, RAMP + 1, RAMP + 2]).astype(np.int16)
    with pytest.raises(ValueError, match="truncated or damaged DICOM pixel data: .* of "):
        read(enhanced_ct(volume, syntax=syntax, NumberOfFrames=4))


# --------------------------------------------------------------------------------------------------------------------
# View and orientation


@pytest.mark.filterwarnings("ignore:Invalid value")
@pytest.mark.parametrize(
    ("tags", "view"),
    [
        ({"ViewPosition": "PA"}, "PA"),
        ({"ViewPosition": "A-P"}, "AP"),
        ({"ViewPosition": "LL"}, "LATERAL"),
        ({"ViewPosition": "RL"}, "LATERAL"),
        ({"ViewPosition": "RLD"}, None),  # decubitus
        ({"ViewCodeSequence": [item(CodeValue="R-10214", CodingSchemeDesignator="SRT")]}, "PA"),
        ({"ViewCodeSequence": [item(CodeValue="399348003", CodingSchemeDesignator="SCT")]}, "AP"),
        ({"ViewCodeSequence": [item(CodeValue="R-10236", CodingSchemeDesignator="SRT")]}, "LATERAL"),
        ({"ViewCodeSequence": [item(CodeValue="X-1", CodingSchemeDesignator="SRT")]}, None),
        ({"PatientOrientation": ["A", "F"]}, "LATERAL"),
        ({"PatientOrientation": ["L", "F"]}, None),
        ({"ViewPosition": "AP", "PatientOrientation": ["L", "F"]}, "AP"),
        ({}, None),
    ],
    ids=str,
)
def test_views(tags, view):
    assert read(radiograph(**tags)).view == view


@pytest.mark.parametrize(
    ("orientation", "stored"),
    [
        (("L", "F"), lambda shown: shown),
        (("R", "F"), lambda shown: shown[:, ::-1]),
        (("L", "H"), lambda shown: shown[::-1]),
        (("R", "H"), lambda shown: shown[::-1, ::-1]),
        (("F", "L"), lambda shown: shown.T),
        (("H", "L"), lambda shown: shown[::-1].T),
        (("FR", "RH"), lambda shown: shown[:, ::-1].T),
        (("H", "R"), lambda shown: shown[::-1, ::-1].T),
    ],
    ids=lambda value: None if callable(value) else str(value),
)
def test_radiographs_are_shown_with_the_patients_right_at_the_left(orientation, stored):
    dataset = radiograph(
        np.ascontiguousarray(stored(RAMP)), PatientOrientation=list(orientation), PixelSpacing=[0.2, 0.1]
    )
    image = read(dataset)
    np.testing.assert_allclose(image.pixels[0], UNIT, atol=1e-6)
    assert codes(image) == ([] if orientation == ("L", "F") else ["reoriented"])
    assert image.spacing[1:] == ((0.1, 0.2) if orientation[0][0] in "FH" else (0.2, 0.1))


def test_laterals_keep_their_sides_and_implausible_orientations_change_nothing():
    lateral = read(radiograph(ViewPosition="LL", PatientOrientation=["P", "H"]))
    np.testing.assert_allclose(lateral.pixels[0], UNIT[::-1], atol=1e-6)
    assert codes(read(radiograph(ViewPosition="RL", PatientOrientation=["R", "F"]))) == []
    for tags in (
        {"PatientOrientation": ["L", "R"]},
        {"PatientOrientation": ["L", "P"]},  # a radiograph from above
        {"PatientOrientation": ["X", "F"]},
        {"PatientOrientation": ["A", "F"], "ViewPosition": "PA"},
    ):
        image = read(radiograph(**tags))
        np.testing.assert_allclose(image.pixels[0], UNIT, atol=1e-6)
        assert [(remark.code, remark.severity) for remark in image.remarks] == [("assumed", "warning")]


@pytest.mark.parametrize(
    ("orientation", "stored"),
    [
        ((1, 0, 0, 0, 1, 0), lambda shown: shown),
        ((-1, 0, 0, 0, -1, 0), lambda shown: shown[::-1, ::-1]),  # prone
        ((-1, 0, 0, 0, 1, 0), lambda shown: shown[:, ::-1]),
        ((0, 1, 0, 1, 0, 0), lambda shown: shown.T),
        ((0, -1, 0, 1, 0, 0), lambda shown: shown[::-1].T),
    ],
    ids=lambda value: None if callable(value) else str(value),
)
def test_slices_are_shown_from_below_with_anterior_at_the_top(orientation, stored):
    image = read(ct_slice(np.ascontiguousarray(stored(RAMP)).astype(np.int16), orientation=orientation))
    np.testing.assert_array_equal(image.pixels[0], RAMP - 1024.0)
    assert codes(image) == ([] if orientation == AXIAL else ["reoriented"])


def test_slices_that_are_tilted_not_axial_or_say_nothing_sensible():
    tilted = read(ct_slice(orientation=(1, 0, 0, 0, np.cos(0.3), np.sin(0.3))))
    assert [(remark.code, remark.severity, remark.value) for remark in tilted.remarks] == [("oblique", "info", 17.2)]
    coronal = read(ct_slice(orientation=(1, 0, 0, 0, 0, 1)))
    np.testing.assert_array_equal(coronal.pixels[0], RAMP[::-1] - 1024.0)
    assert codes(coronal) == ["oblique", "reoriented"]
    for orientation in ((1, 0, 0, 1, 0, 0), (0, 0, 0, 0, 0, 0), (3, 0, 0, 0, 1, 0)):
        image = read(ct_slice(orientation=orientation))
        np.testing.assert_array_equal(image.pixels[0], RAMP - 1024.0)
        assert codes(image) == ["assumed"]
    letters = read(ct_slice(ImageOrientationPatient=None, PatientOrientation=["R", "P"]))
    np.testing.assert_array_equal(letters.pixels[0], RAMP[:, ::-1] - 1024.0)


def test_spacing():
    assert read(radiograph()).spacing is None
    assert read(radiograph(ImagerPixelSpacing=[0.2, 0.1])).spacing == (0, 0.2, 0.1)
    assert read(radiograph(PixelSpacing=[0, 0])).spacing is None
    assert read(ct_slice(SpacingBetweenSlices=-3)).spacing == pytest.approx((3, 0.8, 0.7))


# --------------------------------------------------------------------------------------------------------------------
# Headers


def test_read_header(tmp_path):
    path = write_dicom(tmp_path / "a", ct_slice(position=(1, 2, 30), number=7, series=3, AcquisitionNumber=2))
    header = read_header(path, "a")
    assert header == read_header(path.read_bytes(), "a")
    assert (header.modality, header.has_pixels, header.frames, header.rows, header.columns) == ("ct", True, 1, 40, 48)
    assert (header.position, header.origin, header.orientation) == (30, (1, 2, 30), AXIAL)
    assert (header.pixel_spacing, header.slice_thickness) == ((0.8, 0.7), 1.5)
    assert (header.instance_number, header.series_number, header.acquisition_number) == (7, 3, 2)
    assert not (header.is_localizer or header.is_derived or header.is_secondary_capture)
    same = read_header(dicom_bytes(ct_slice(number=8, series=3)), "b")
    other = read_header(dicom_bytes(ct_slice(series=4)), "c")
    assert (same.series, same.study, same.patient) == (header.series, header.study, header.patient)
    assert same.instance != header.instance and other.series != header.series and other.study == header.study
    assert str(header.study) not in repr(header) and "DOE" not in repr(header)


def test_headers_of_other_files(tmp_path):
    scout = ct_slice(ImageType=["DERIVED", "PRIMARY", "LOCALIZER"])
    assert read_header(dicom_bytes(scout), "a").is_localizer and read_header(dicom_bytes(scout), "a").is_derived
    capture = radiograph(SOPClassUID="1.2.840.10008.5.1.4.1.1.7", Modality="OT")
    header = read_header(dicom_bytes(capture), "a")
    assert header.is_secondary_capture and header.modality == "" and header.position is None
    report = read_header(dicom_bytes(radiograph(PixelData=None, Modality="SR", Rows=None)), "a")
    assert (report.modality, report.has_pixels, report.rows) == (None, False, 0)
    cut = dicom_bytes(ct_slice())[:-3000]  # within the pixels, which are not read
    assert read_header(cut, "a").has_pixels
    enhanced = read_header(dicom_bytes(enhanced_ct()), "a")
    assert (enhanced.frames, enhanced.pixel_spacing, enhanced.position) == (3, (0.8, 0.7), 0)
    assert read_header(dicom_bytes(radiograph(syntax=DEFLATED)), "a").has_pixels
    with pytest.raises(ValueError, match="cannot be read"):
        read_header(tmp_path / "none", "none")
    with pytest.raises(ValueError, match="not a DICOM file"):
        read_header(b"\x89PNG" + bytes(200), "a.png")


# --------------------------------------------------------------------------------------------------------------------
# Silence


def test_silence_holds_for_the_thread_that_reads_alone(caplog):
    log = logging.getLogger("pydicom")
    inside, done = threading.Event(), threading.Event()

    def work():
        with quiet_pydicom("a"):
            log.warning("said while reading")
            inside.set()
            done.wait(5)

    thread = threading.Thread(target=work)
    thread.start()
    assert inside.wait(5)
    log.warning("said by the host program")
    done.set()
    thread.join()
    assert [record.message for record in caplog.records] == ["said by the host program"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read(radiograph(BitsStored=99, WindowCenter="1e400", syntax=JPEG_LS))


def test_threads_read_the_same():
    data = dicom_bytes(enhanced_ct(np.stack([RAMP + i for i in range(8)]).astype(np.int16), syntax=RLE))
    image = read_dicom(data, "a", None)
    results = {}

    def work(worker):
        results[worker] = np.stack([image.pixels[i] for i in (range(8) if worker % 2 else range(7, -1, -1))])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for worker, pixels in results.items():
        ordered = pixels if worker % 2 else pixels[::-1]
        np.testing.assert_array_equal(ordered, np.stack([RAMP + i for i in range(8)]) - 1024.0)


# --------------------------------------------------------------------------------------------------------------------
# Real files


def test_pydicoms_own_files():
    from pydicom.data import get_testdata_files

    files = [path for path in get_testdata_files() if path.endswith(".dcm")]
    assert len(files) > 60
    read_count = 0
    for path in files:
        with open(path, "rb") as file:
            data = file.read()
        try:
            image = read_dicom(data, "a.dcm", None)
        except ValueError as error:
            assert str(error).startswith("a.dcm: ") and error.__context__ is None
            continue
        pixels = np.asarray(image.pixels)
        assert pixels.dtype == np.float32 and np.isfinite(pixels).all()
        read_count += 1
    assert read_count >= 25


@pytest.mark.realdata
def test_fixtures_agree_with_an_independent_reader(data_root):
    simpleitk = pytest.importorskip("SimpleITK")
    for path in sorted((data_root / "fixtures").glob("ct_*.dcm")):
        image = read_dicom(path.read_bytes(), path.name, None)
        expected = simpleitk.GetArrayFromImage(simpleitk.ReadImage(str(path))).astype(np.float32)
        np.testing.assert_array_equal(np.maximum(image.pixels, -1024), np.maximum(expected, -1024))
