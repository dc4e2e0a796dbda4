# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""No text of a DICOM file reaches output, logs, warnings, errors or results."""

import io
import logging
import traceback
import warnings
from dataclasses import fields

import numpy as np
import pytest

from m3fm.dicom_m3fm import read_dicom, read_header
from m3fm.imaging_m3fm import read_image

pydicom = pytest.importorskip("pydicom")

from tests.dicom_files import RAMP, ct_slice, dicom_bytes, enhanced_ct, radiograph  # noqa: E402

# Each planted value holds one of these: text, digits (numbers, dates, times), and a part of a UID.
TEXT, DIGITS, ARC = "ZQXJK", "987123654", "77665544332211"
PLANTED = (TEXT, DIGITS, ARC, "1987-12-36", TEXT.lower())

# Attributes of the image itself, which reading needs as they are.
_KEPT = ("Modality", "PhotometricInterpretation", "ViewPosition", "ImageType", "SOPClassUID", "VOILUTFunction")
_VALUES = {
    "AE": TEXT,
    "AS": "987Y",
    "CS": TEXT,
    "DA": "19871236",
    "DT": f"{DIGITS}",
    "IS": DIGITS,
    "LO": f"{TEXT} LO",
    "LT": f"{TEXT} long text",
    "PN": f"{TEXT}^JANE^^^",
    "SH": TEXT,
    "ST": f"{TEXT} short text",
    "TM": "987123",
    "UC": f"{TEXT} unlimited",
    "UI": f"1.2.826.{ARC}",
    "UR": f"http://{TEXT.lower()}.example",
    "UT": f"{TEXT} text",
}


def planted(dataset):
    """Fill every text-holding element of the dictionary that the data set has not, an item, and private ones."""
    item = pydicom.Dataset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for tag, (vr, multiplicity, _, _, keyword) in pydicom.datadict.DicomDictionary.items():
            group = tag >> 16
            skipped = not keyword or group in (0, 2, 4, 0x28, 0x3004, 0x7FE0, 0xFFFE) or tag in (0x00080005,)
            if skipped or vr not in _VALUES or keyword in dataset or keyword in _KEPT or group > 0x5000:
                continue
            count = int(multiplicity[0]) if multiplicity[0].isdigit() else 1
            value = _VALUES[vr] if count == 1 else [_VALUES[vr]] * count
            (dataset if group < 0x40 or group == 0x2050 else item).add_new(tag, vr, value)
        for keyword in ("WindowCenterWidthExplanation", "RescaleType", "LUTExplanation", "PixelPresentation"):
            dataset.add_new(keyword, "LO", f"{TEXT} {keyword}")
        dataset.PatientID, dataset.StudyInstanceUID = TEXT + DIGITS, _VALUES["UI"]
        dataset.add_new(0x60000022, "LO", f"{TEXT} overlay")
        dataset.add_new(0x50002500, "LO", f"{TEXT} curve")
        block = dataset.private_block(0x0009, f"{TEXT} CREATOR", create=True)
        block.add_new(1, "LO", f"{TEXT} private")
        block.add_new(2, "PN", f"{TEXT}^PRIVATE")
        dataset.OtherPatientIDsSequence = [item]
        dataset.file_meta.ImplementationVersionName = TEXT
        dataset.file_meta.MediaStorageSOPInstanceUID = _VALUES["UI"]
        dataset.file_meta.PrivateInformationCreatorUID = _VALUES["UI"]
    return dataset


def _cut(data, share):
    return data[: int(len(data) * share)]


def _sources():
    """Make good and damaged files; names tell what is wrong."""
    smooth = (np.add.outer(np.arange(40), np.arange(48)) * 2).astype(np.uint8)
    made = {
        "radiograph": radiograph(),
        "window": radiograph(WindowCenter=[60000, 5], WindowWidth=[10, 0]),
        "orientation": radiograph(PatientOrientation=["R", "F"]),
        "colour": radiograph(np.stack([smooth] * 3, axis=-1)),
        "ct": ct_slice(),
        "uncalibrated": ct_slice(rescale=None),
        "enhanced": enhanced_ct(),
        "rle": radiograph(syntax=pydicom.uid.RLELossless),
        "jpeg": radiograph(smooth, syntax=pydicom.uid.JPEGBaseline8Bit),
        "jpeg_ls": radiograph(syntax=pydicom.uid.JPEGLSLossless),
        "jpeg_2000": radiograph(syntax=pydicom.uid.JPEG2000Lossless),
        "big": radiograph(syntax=pydicom.uid.ExplicitVRBigEndian),
        "deflated": radiograph(syntax=pydicom.uid.DeflatedExplicitVRLittleEndian),
        "modality": radiograph(Modality="MR"),
        "no_pixels": radiograph(PixelData=None),
        "no_size": radiograph(Rows=None),
        "bits": radiograph(BitsStored=99, HighBit=3),
        "bits_allocated": radiograph(BitsAllocated=12),
    }
    files = {name: dicom_bytes(planted(dataset)) for name, dataset in made.items()}
    for name in ("radiograph", "ct", "jpeg_ls", "jpeg_2000", "rle", "jpeg", "deflated"):
        files |= {f"{name}_cut_{share}": _cut(files[name], share) for share in (0.1, 0.5, 0.9, 0.99)}
        hurt = bytearray(files[name])
        for i in np.random.default_rng(0).integers(200, len(hurt), 60):
            hurt[i] ^= 0x5A
        files[f"{name}_hurt"] = bytes(hurt)
        files[f"{name}_pixels_hurt"] = files[name][:-400] + bytes(b ^ 0x33 for b in files[name][-400:-2]) + b"\xff\xd9"
    files["bare"] = dicom_bytes(planted(radiograph()), meta=False)
    # Values that cannot be converted, which pydicom quotes.
    good = files["radiograph"]
    files["number"] = good.replace(b"IS", b"DS").replace(b"\x28\x00\x00\x01US", b"\x28\x00\x00\x01LO")
    files["syntax"] = good.replace(b"1.2.840.10008.1.2.1\0", f"1.2.{ARC}\0".encode().ljust(20, b"\0"))
    files["charset"] = dicom_bytes(planted(radiograph(SpecificCharacterSet=TEXT)))
    return files


def _chain(error):
    """List an error with all that is tied to it."""
    seen = []
    while error is not None and error not in seen:
        seen.append(error)
        error = error.__cause__ or error.__context__
    return seen


def _shown(image):
    """Collect all that a result says but for its pixels."""
    said = [repr(image.remarks), repr([remark.as_dict() for remark in image.remarks])]
    return said + [repr(getattr(image, field.name)) for field in fields(image) if field.name != "pixels"]


def _assert_clean(said):
    for text in said:
        for value in PLANTED:
            assert value not in text, f"{value} in {text[:300]}"


@pytest.fixture(scope="module")
def sources():
    return _sources()


@pytest.mark.filterwarnings("ignore:Unknown encoding")
def test_the_values_are_planted(sources):
    dataset = pydicom.dcmread(io.BytesIO(sources["radiograph"]))
    text = str(dataset)
    assert text.count(TEXT) > 400 and ARC in text and DIGITS in text
    assert dataset.PatientName == _VALUES["PN"] or dataset.PatientName == "DOE^JANE"
    assert any(value in str(dataset.file_meta) for value in PLANTED)


@pytest.mark.parametrize("reader", ["image", "header", "study"])
def test_nothing_planted_is_told(sources, reader, capfd, caplog):
    caplog.set_level(logging.DEBUG)
    caplog.set_level(logging.DEBUG, logger="pydicom")
    said = []
    outcomes = []
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for name, data in sources.items():
            try:
                said += _read(reader, data, name)
                outcomes.append(True)
            except ValueError as error:
                chain = _chain(error)
                said += [text for e in chain for text in (str(e), repr(e), repr(e.args))]
                said.append("".join(traceback.format_exception(error)))
                outcomes.append(False)
    captured = capfd.readouterr()
    said += [captured.out, captured.err]
    said += [str(warning.message) for warning in warned]
    said += [record.getMessage() + str(record.exc_info) + str(record.exc_text) for record in caplog.records]
    _assert_clean(said)
    assert any(outcomes) and (reader == "header" or not all(outcomes))
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def _read(reader, data, name):
    if reader == "header":
        return [repr(read_header(data, name))]
    if reader == "image":
        images = [read_dicom(data, name, (0.5, 99.5)), read_image(data)]
    else:
        from m3fm.series_m3fm import read_study

        images = read_study([data, data])
    return [text for image in images for text in _shown(image)] + [str(np.asarray(images[0].pixels).shape)]


def test_the_pipeline_tells_nothing(tiny_model, tiny_processor, sources, capfd, caplog):
    from m3fm import M3FMReportPipeline

    caplog.set_level(logging.DEBUG)
    pipeline = M3FMReportPipeline(model=tiny_model, processor=tiny_processor)
    studies = [sources[name] for name in ("radiograph", "ct", "jpeg_ls_cut_0.5", "jpeg_2000_hurt", "modality", "bits")]
    rows = pipeline(studies, on_error="row", max_new_tokens=3)
    captured = capfd.readouterr()
    said = [str(row) for row in rows] + [captured.out, captured.err]
    _assert_clean(said + [record.getMessage() for record in caplog.records])
    assert len(rows) == len(studies)


def test_identifiers_are_not_even_parsed(sources):
    from m3fm.dicom_tags_m3fm import IMAGE_TAGS, open_dicom

    dataset = open_dicom(io.BytesIO(sources["radiograph"]), "a", IMAGE_TAGS, with_pixels=True).tags.dataset
    for keyword in ("PatientName", "PatientBirthDate", "InstitutionName", "ReferringPhysicianName", "StudyDate"):
        assert keyword not in dataset
    assert RAMP.tobytes() == dataset.PixelData
