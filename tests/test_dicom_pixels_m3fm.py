# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
import zlib

import numpy as np
import pytest

from m3fm import dicom_streams_m3fm, dicom_tags_m3fm
from m3fm.chest_image_m3fm import gray_from_uint8
from m3fm.dicom_m3fm import read_dicom, read_header
from m3fm.dicom_tags_m3fm import is_dicom

pydicom = pytest.importorskip("pydicom")

from tests.dicom_files import RAMP, ct_slice, dicom_bytes, radiograph  # noqa: E402

LINEAR = "1.2.840.10008.1.2.1"
BIG = "1.2.840.10008.1.2.2"
DEFLATED = "1.2.840.10008.1.2.1.99"
ENCAPSULATED = "1.2.840.10008.1.2.1.98"
RLE = "1.2.840.10008.1.2.5"
JPEG = "1.2.840.10008.1.2.4.50"
JPEG_12_BIT = "1.2.840.10008.1.2.4.51"
JPEG_LOSSLESS = "1.2.840.10008.1.2.4.70"
JPEG_LS = "1.2.840.10008.1.2.4.80"
JPEG_2000 = "1.2.840.10008.1.2.4.90"

UNIT = RAMP / RAMP.max()
EIGHT = (RAMP % 256).astype(np.uint8)
COLOUR = np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8)


def read(dataset, percentiles=None):
    return read_dicom(dicom_bytes(dataset), "a.dcm", percentiles)


def codes(image):
    return [remark.code for remark in image.remarks]


# --------------------------------------------------------------------------------------------------------------------
# Colour


def test_colour_captures_become_grey():
    gray = read(radiograph(COLOUR, Modality="OT")).pixels
    np.testing.assert_allclose(gray[0], gray_from_uint8(COLOUR) / 255, atol=1e-6)
    planar = np.ascontiguousarray(np.moveaxis(COLOUR, -1, 0)).tobytes()
    np.testing.assert_array_equal(read(radiograph(COLOUR, PixelData=planar, PlanarConfiguration=1)).pixels, gray)
    deep = read(radiograph(COLOUR.astype(np.uint16) << 4, bits_stored=12))
    np.testing.assert_array_equal(deep.pixels, gray)
    image = read(radiograph(COLOUR, Modality="OT"))
    assert (image.modality, codes(image)) == (None, ["colour"])
    assert codes(read(radiograph(np.stack([EIGHT] * 3, axis=-1)))) == []


def test_colour_spaces():
    gray = read(radiograph(COLOUR)).pixels
    ybr = pydicom.pixels.convert_color_space(COLOUR, "RGB", "YBR_FULL")
    np.testing.assert_allclose(read(radiograph(ybr, photometric="YBR_FULL")).pixels, gray, atol=2.5 / 255)
    pairs = ybr.reshape(-1, 2, 3).astype(int)  # two pixels share their colour
    halved = np.stack([pairs[:, 0, 0], pairs[:, 1, 0], *pairs[..., 1:].mean(axis=1).T], axis=1).astype(np.uint8)
    image = read(radiograph(ybr, photometric="YBR_FULL_422", PixelData=halved.tobytes()))
    luma = pairs[..., 0].reshape(40, 48) / 255
    smooth = np.abs(pairs[:, 0, 1:] - pairs[:, 1, 1:]).max(axis=1).repeat(2).reshape(40, 48) < 20
    np.testing.assert_allclose(image.pixels[0][smooth], luma[smooth], atol=0.1)
    whole = read(radiograph(ybr, photometric="YBR_FULL_422"))  # not halved, whatever it says
    np.testing.assert_allclose(whole.pixels, gray, atol=2.5 / 255)
    jpeg2000 = read(radiograph(COLOUR, syntax=JPEG_2000))
    np.testing.assert_allclose(jpeg2000.pixels, gray, atol=1e-6)
    with pytest.raises(ValueError, match="colour space that is retired"):
        read(radiograph(photometric="HSV"))
    with pytest.raises(ValueError, match="4 samples a pixel"):
        read(radiograph(EIGHT, SamplesPerPixel=4))


def test_palette():
    palette = np.arange(256, dtype=np.uint8)[::-1]
    tags = {f"{colour}PaletteColorLookupTableDescriptor": [256, 0, 8] for colour in ("Red", "Green", "Blue")}
    dataset = radiograph(EIGHT, photometric="PALETTE COLOR", **tags)
    for colour in ("Red", "Green", "Blue"):
        dataset.add_new(f"{colour}PaletteColorLookupTableData", "OW", palette.tobytes())
    np.testing.assert_allclose(read(dataset).pixels[0], (255 - EIGHT) / 255, atol=1e-6)
    with pytest.raises(ValueError, match="palette is missing"):
        read(radiograph(EIGHT, photometric="PALETTE COLOR"))


# --------------------------------------------------------------------------------------------------------------------
# Bits


@pytest.mark.parametrize("bits", [11, 12, 15, 16])
@pytest.mark.parametrize("signed", [False, True])
def test_bits_and_signs(bits, signed):
    values = RAMP.astype(np.int32) % 2**bits - (2 ** (bits - 1) if signed else 0)
    values = np.sort(values.ravel()).reshape(RAMP.shape)
    for high in {bits - 1, min(15, bits + 1)}:
        stored = values.astype(np.int16 if signed else np.uint16)
        dataset = radiograph(stored, bits_stored=bits, high_bit=high, RescaleSlope=1, RescaleIntercept=0)
        image = read(dataset)
        np.testing.assert_allclose(image.pixels[0], (values - values.min()) / np.ptp(values), atol=1e-6)


def test_ten_bits():
    np.testing.assert_allclose(read(radiograph(RAMP // 2, bits_stored=10)).pixels[0], (RAMP // 2) / 959, atol=1e-6)


def test_overlay_bits_are_cut_off():
    overlay = np.zeros_like(RAMP)
    overlay[10:20, 10:20] = 1 << 13
    image = read(radiograph(RAMP | overlay, bits_stored=12, HighBit=11))
    np.testing.assert_allclose(image.pixels[0], UNIT, atol=1e-6)
    assert codes(image) == []
    low = read(radiograph((RAMP << 4) | (overlay >> 13), bits_stored=12, HighBit=15))
    np.testing.assert_allclose(low.pixels[0], UNIT, atol=1e-6)


def test_high_bit_that_contradicts_the_pixels_is_ignored():
    dataset = radiograph(bits_stored=12)
    dataset.HighBit = 15
    image = read(dataset)
    np.testing.assert_allclose(image.pixels[0], UNIT, atol=1e-6)
    assert codes(image) == ["assumed"]


def test_signedness_that_contradicts_the_pixels():
    hu = (RAMP.astype(np.int16) - 1000).astype(np.int16)
    image = read(ct_slice(hu, rescale=(2, 0), PixelRepresentation=0))
    np.testing.assert_array_equal(image.pixels[0], hu * 2.0)
    assert codes(image) == ["assumed"] and image.remarks[0].severity == "warning"
    high = (RAMP + 32000).astype(np.uint16)
    image = read(radiograph(high, PixelRepresentation=1))
    np.testing.assert_allclose(image.pixels[0], UNIT, atol=1e-6)
    # 12 bits stated as signed, but used from 0 to 4095
    image = read(ct_slice((RAMP * 2).astype(np.int16), bits_stored=12))
    np.testing.assert_array_equal(image.pixels[0], RAMP * 2.0 - 1024)
    assert codes(image) == ["assumed"]


def test_white_beside_black_is_no_sign():
    page = np.where((RAMP // 3) % 2, 65535 - RAMP, RAMP).astype(np.uint16)
    image = read(radiograph(page, WindowCenter=32768, WindowWidth=65536))
    np.testing.assert_allclose(image.pixels[0], page / 65535, atol=1e-4)
    assert codes(image) == []


def test_bits_stored_that_are_too_few():
    image = read(radiograph(RAMP, bits_stored=10, HighBit=9))
    np.testing.assert_allclose(image.pixels[0], UNIT, atol=1e-6)
    assert codes(image) == ["assumed"]


@pytest.mark.parametrize(
    "missing",
    [
        {"PhotometricInterpretation": None},
        {"SamplesPerPixel": None},
        {"BitsStored": None},
        {"BitsAllocated": None},
        {"PixelRepresentation": None},
        {"HighBit": None},
        {"BitsStored": 99},
        {"BitsAllocated": 8},
        {"PhotometricInterpretation": "RGB"},
    ],
    ids=lambda tags: "-".join(f"{key}={value}" for key, value in tags.items()),
)
def test_missing_and_impossible_tags(missing):
    image = read(radiograph(**missing))
    np.testing.assert_allclose(image.pixels[0], UNIT, atol=1e-6)
    assert set(codes(image)) <= {"assumed"}


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.uint32, np.int32])
def test_other_numbers(dtype):
    image = read(radiograph(RAMP.astype(dtype)))
    np.testing.assert_allclose(image.pixels[0], UNIT, atol=1e-6)


def test_floats_that_are_no_numbers_are_background():
    values = RAMP.astype(np.float32) - 500
    values[0, :3] = np.nan, np.inf, -np.inf
    image = read(ct_slice(values, rescale=(1, 0)))
    assert (image.pixels[0, 0, :3] == -497).all()  # the lowest that is one
    with pytest.raises(ValueError, match="NaN"):
        read(ct_slice(values * np.nan, rescale=(1, 0)))


# --------------------------------------------------------------------------------------------------------------------
# Encodings


@pytest.mark.parametrize(
    "syntax", ["1.2.840.10008.1.2", LINEAR, BIG, DEFLATED, RLE, JPEG_LS, JPEG_2000], ids=lambda uid: uid[17:]
)
@pytest.mark.parametrize("pixels", [RAMP, RAMP.astype(np.int16) - 900, EIGHT], ids=["u2", "i2", "u1"])
def test_transfer_syntaxes(syntax, pixels):
    plain = read(radiograph(pixels, RescaleSlope=1, RescaleIntercept=0)).pixels
    np.testing.assert_array_equal(read(radiograph(pixels, syntax=syntax)).pixels, plain)


def test_jpeg_baseline():
    smooth = (np.add.outer(np.arange(40), np.arange(48)) * 2).astype(np.uint8)
    image = read(radiograph(smooth, syntax=JPEG))
    np.testing.assert_allclose(image.pixels[0], smooth / 255, atol=3 / 255)


@pytest.mark.parametrize("signed", [False, True])
def test_jpeg_lossless_and_12_bits(signed):
    imagecodecs = pytest.importorskip("imagecodecs")
    lossless = pydicom.encaps.encapsulate([imagecodecs.ljpeg_encode(RAMP, bitspersample=12)])
    values = RAMP.astype(np.int16 if signed else np.uint16)
    image = read(radiograph(values, bits_stored=12, syntax=JPEG_LOSSLESS, PixelData=lossless))
    np.testing.assert_allclose(image.pixels[0], UNIT, atol=1e-6)
    lossy = pydicom.encaps.encapsulate([imagecodecs.jpeg_encode(RAMP, level=98, bitspersample=12)])
    image = read(radiograph(bits_stored=12, syntax=JPEG_12_BIT, PixelData=lossy, WindowCenter=960, WindowWidth=1920))
    np.testing.assert_allclose(image.pixels[0], UNIT, atol=0.01)


def test_frames_in_fragments():
    volume = np.stack([RAMP, RAMP[::-1]])
    plain = read(radiograph(volume)).pixels
    bare = [frame.astype("<u2").tobytes() for frame in volume]
    uncompressed = radiograph(volume, syntax=ENCAPSULATED, PixelData=pydicom.encaps.encapsulate(bare))
    np.testing.assert_array_equal(read(uncompressed).pixels, plain)
    dataset = radiograph(volume, syntax=JPEG_2000)
    frames = list(pydicom.encaps.generate_frames(dataset.PixelData, number_of_frames=2))
    for has_offsets in (True, False):
        dataset.PixelData = pydicom.encaps.encapsulate(frames, fragments_per_frame=3, has_bot=has_offsets)
        np.testing.assert_array_equal(read(dataset).pixels, plain)
    dataset.PixelData, *offsets = pydicom.encaps.encapsulate_extended(frames)
    dataset.ExtendedOffsetTable, dataset.ExtendedOffsetTableLengths = offsets
    np.testing.assert_array_equal(read(dataset).pixels, plain)


def test_files_without_preamble_or_header():
    plain = read(radiograph()).pixels
    for syntax in ("1.2.840.10008.1.2", LINEAR, BIG, JPEG_2000, RLE):
        dataset = radiograph(syntax=syntax)
        for kept in ({"preamble": False}, {"meta": False}):
            data = dicom_bytes(dataset, **kept)
            assert is_dicom(data[:132])
            np.testing.assert_array_equal(read_dicom(data, "a", None).pixels, plain)


@pytest.mark.parametrize(
    ("made", "declared"),
    [(LINEAR, JPEG_2000), (LINEAR, ""), (JPEG_2000, LINEAR), (JPEG_2000, RLE), (RLE, JPEG_LS), (JPEG_LS, JPEG_2000)],
)
def test_a_transfer_syntax_that_is_wrong(made, declared):
    dataset = radiograph(syntax=made)
    data = dicom_bytes(dataset)
    pad = "\0" * (len(made) % 2)
    old, new = (made + pad).encode(), declared.encode().ljust(len(made + pad), b"\0")
    assert data.count(b"UI" + len(old).to_bytes(2, "little") + old) == 1
    image = read_dicom(data.replace(old, new[: len(old)]), "a", None)
    np.testing.assert_array_equal(image.pixels, read(radiograph()).pixels)
    assert set(codes(image)) <= {"assumed"}


def test_rows_and_columns_that_contradict_the_code_stream():
    image = read(radiograph(syntax=JPEG_2000, Rows=41, Columns=47))
    np.testing.assert_array_equal(image.pixels, read(radiograph()).pixels)
    assert codes(image) == ["assumed"]


# --------------------------------------------------------------------------------------------------------------------
# What is refused


def test_modalities():
    for modality in ("MR", "US", "MG", "PT", "RTDOSE", "SR", "ECG"):
        with pytest.raises(ValueError, match="another modality") as caught:
            read(radiograph(Modality=modality))
        assert modality not in str(caught.value).split(", expected")[0].replace("a.dcm", "")
    for storage in ("1.2.840.10008.5.1.4.1.1.4", "1.2.840.10008.5.1.4.1.1.88.11"):
        with pytest.raises(ValueError, match="another modality"):
            read(radiograph(Modality=None, SOPClassUID=storage))
    assert read(radiograph(Modality=None)).modality == "cxr"
    stripped = read(ct_slice(Modality=None, SOPClassUID=None))
    assert (stripped.modality, stripped.units) == ("ct", "hu") and "assumed" in codes(stripped)
    stripped = read(ct_slice(RAMP, Modality=None, SOPClassUID=None))
    assert (stripped.modality, stripped.units) == ("ct", "hu")
    assert read_header(dicom_bytes(ct_slice(RAMP, Modality=None, SOPClassUID=None)), "a").modality == "ct"
    assert read(radiograph(Modality=None, SOPClassUID=None)).modality is None


def test_damaged_files():
    whole = dicom_bytes(radiograph())
    cases = {
        "without pixel data": dicom_bytes(radiograph(PixelData=None)),
        "truncated or damaged DICOM pixel data: 3640 of 3840 bytes": whole[:-200],
        "at least one pixel": dicom_bytes(radiograph(Rows=0)),
        "without image size": dicom_bytes(radiograph(Rows=None)),
        "declares": dicom_bytes(radiograph(NumberOfFrames=2_000_000_000)),
        "not a DICOM file": b"PK\x03\x04" + bytes(200),
        "truncated or damaged|without pixel|without image size": whole[:180],
        "12 bits allocated": dicom_bytes(radiograph(BitsAllocated=12, PixelData=bytes(40 * 48 * 3 // 2))),
    }
    for reason, data in cases.items():
        with pytest.raises(ValueError, match=reason) as caught:
            read_dicom(data, "a.dcm", None)
        assert str(caught.value).startswith("a.dcm: ") and "DOE" not in str(caught.value)
        assert caught.value.__cause__ is None and caught.value.__context__ is None


def test_bombs_are_refused_before_they_are_allocated(monkeypatch):
    dataset = radiograph(syntax=JPEG_2000)
    huge = dataset.PixelData.replace((48).to_bytes(4, "big") + (40).to_bytes(4, "big"), b"\0\0\xff\xff" * 2)
    with pytest.raises(ValueError, match="declares|expected at most"):
        read(radiograph(syntax=JPEG_2000, PixelData=huge))
    dataset = radiograph(syntax=DEFLATED)
    data = dicom_bytes(dataset)
    deflate = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    bomb = deflate.compress(bytes(1 << 21)) + deflate.flush()
    monkeypatch.setattr(dicom_tags_m3fm, "_MAX_INFLATED", 1 << 20)
    start = 144 + int.from_bytes(data[140:144], "little")
    with pytest.raises(ValueError, match="inflates to more than"):
        read_dicom(data[:start] + bomb, "a.dcm", None)


@pytest.mark.parametrize("syntax", [JPEG, JPEG_LS, JPEG_2000, RLE])
def test_code_streams_that_are_cut_off(syntax):
    dataset = radiograph(EIGHT, syntax=syntax)
    frame = next(pydicom.encaps.generate_frames(dataset.PixelData, number_of_frames=1))
    dataset.PixelData = pydicom.encaps.encapsulate([frame[: len(frame) // 2]])
    with pytest.raises(ValueError, match="truncated or damaged DICOM pixel data"):
        read(dataset)


@pytest.mark.parametrize(
    ("syntax", "install"),
    [(JPEG_LS, "pyjpegls"), (JPEG_2000, "pylibjpeg pylibjpeg-openjpeg"), (JPEG_LOSSLESS, "imagecodecs")],
)
def test_a_missing_decoder_is_named(monkeypatch, syntax, install):
    monkeypatch.setattr(pydicom.pixels.common.CoderBase, "available_plugins", ())
    monkeypatch.setattr(dicom_streams_m3fm, "_imagecodecs", lambda: None)
    jpeg = radiograph(EIGHT, syntax=JPEG).PixelData.replace(b"\xff\xc0", b"\xff\xc3")
    data = jpeg if syntax == JPEG_LOSSLESS else radiograph(EIGHT, syntax=syntax).PixelData
    with pytest.raises(ValueError, match=f"no decoder is installed: pip install {install}"):
        read(radiograph(EIGHT, syntax=LINEAR, PixelData=data))


@pytest.mark.parametrize("length", [0, 12])
def test_boxes_around_a_jpeg_2000_stream_are_passed_over(length):
    dataset = radiograph(syntax=JPEG_2000)
    frame = next(pydicom.encaps.generate_frames(dataset.PixelData, number_of_frames=1))
    boxes = b"\0\0\0\x0cjP  \r\n\x87\n" + length.to_bytes(4, "big") + b"ftypjp2 " + b"\0\0\0\0jp2c"
    dataset.PixelData = pydicom.encaps.encapsulate([boxes + frame])
    np.testing.assert_allclose(read(dataset).pixels[0], UNIT, atol=1e-6)


def test_an_unknown_compression_is_said_to_be_one():
    dataset = radiograph(PixelData=pydicom.encaps.encapsulate([b"\x01\x02\x03\x04" * 10]))
    with pytest.raises(ValueError, match="not recognised"):
        read(dataset)
    dataset.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.102"  # video
    with pytest.raises(ValueError, match="pydicom does not decode"):
        read(dataset)
