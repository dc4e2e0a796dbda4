# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
import io
import logging
import struct
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from m3fm import raster_m3fm
from m3fm.chest_image_m3fm import ChestImage, LazyPixels
from m3fm.imaging_m3fm import read_image

tifffile = pytest.importorskip("tifffile")
imagecodecs = pytest.importorskip("imagecodecs")

Y, X = np.mgrid[:40, :50]
GRAY = ((X * 3 + Y * 5) % 256).astype(np.uint8)  # (H, W)
DEEP = ((X * 701 + Y * 13) % 65536).astype(np.uint16)
COLOUR = np.stack([GRAY, np.roll(GRAY, 7, axis=1), 255 - GRAY], axis=-1)
LUMA = np.array([0.299, 0.587, 0.114])


def pil_bytes(pixels: np.ndarray | Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(buffer, kind, **options)
    return buffer.getvalue()


def tiff_bytes(pixels: np.ndarray, **options) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, pixels, **{"photometric": "minisblack"} | options)
    return buffer.getvalue()


def stretched(values: np.ndarray) -> np.ndarray:
    values = values.astype(np.float64)
    return (values - values.min()) / (values.max() - values.min())


def read(data) -> ChestImage:
    return read_image(data, percentiles=None)


def codes(image: ChestImage) -> list[str]:
    return [remark.code for remark in image.remarks]


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of(width: int, height: int, extra: bytes = b"", rows: bytes = b"", depth: int = 8, colour: int = 0) -> bytes:
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = [png_chunk(b"IHDR", head), extra, png_chunk(b"IDAT", zlib.compress(rows)), png_chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def tiff_of(width: int, height: int, compression: int, data: bytes, bits: int = 8, next_page: int = 0) -> bytes:
    """Write a TIFF of one strip that may say what is not true; `next_page` is where the next directory lies."""
    values = {256: width, 257: height, 258: bits, 259: compression, 262: 1, 273: 0, 277: 1, 278: height}
    values[279] = len(data)
    values[273] = 8 + 2 + 12 * len(values) + 4
    tags = b"".join(struct.pack("<HHII", code, 4, 1, value) for code, value in values.items())
    return b"II*\0" + struct.pack("<IH", 8, len(values)) + tags + struct.pack("<I", next_page) + data


# --------------------------------------------------------------------------------------------------------------------
# Depth and colour


def test_sixteen_bit_colour_keeps_its_sixteen_bits():
    opacity = ((Y * 900) % 65536).astype(np.uint16)
    colour = np.stack([DEEP, np.roll(DEEP, 7, axis=1), 65535 - DEEP], axis=-1)
    luma = colour @ LUMA
    with_opacity = np.concatenate([colour, opacity[..., None]], axis=-1)
    cases = [
        (imagecodecs.png_encode(colour), luma),
        (imagecodecs.png_encode(with_opacity), luma * (opacity / 65535)),
        (imagecodecs.png_encode(np.stack([DEEP, opacity], axis=-1)), DEEP * (opacity / 65535)),
        (tiff_bytes(colour, photometric="rgb"), luma),
        (tiff_bytes(np.moveaxis(colour, -1, 0), photometric="rgb", planarconfig="separate"), luma),
        (tiff_bytes(with_opacity, photometric="rgb", extrasamples=("unassalpha",)), luma * (opacity / 65535)),
    ]
    for data, expected in cases:
        np.testing.assert_allclose(read(data).pixels[0], stretched(expected), atol=1e-5)
    twelve = np.stack([DEEP // 16] * 3, axis=-1)  # cut to 8 bits, 12-bit values would leave 16 grey levels
    for data in (imagecodecs.png_encode(twelve), tiff_bytes(twelve, photometric="rgb")):
        image = read(data)
        np.testing.assert_allclose(image.pixels[0], stretched(DEEP // 16), atol=1e-6)
        assert codes(image) == []


def test_a_missing_reader_is_named_and_nothing_is_cut(monkeypatch):
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    monkeypatch.setitem(sys.modules, "tifffile", None)
    deep = np.stack([DEEP] * 3, axis=-1)
    with pytest.raises(ImportError, match=r"<bytes>: .*imagecodecs: pip install m3fm\[medical\]"):
        read(imagecodecs.png_encode(deep))
    with pytest.raises(ImportError, match=r"<bytes>: .*tifffile: pip install m3fm\[medical\]"):
        read(tiff_bytes(deep, photometric="rgb"))
    np.testing.assert_allclose(read(tiff_bytes(DEEP)).pixels[0], stretched(DEEP), atol=1e-6)


@pytest.mark.parametrize("compression", [None, "lzw", "zlib", "packbits", "zstd", "lzma"])
@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (GRAY, GRAY / 255),
        (DEEP, stretched(DEEP)),
        ((DEEP // 200).astype(np.int16), stretched(DEEP // 200)),
        (DEEP.astype(np.uint32) * 60000, stretched(DEEP)),
        (DEEP / 65535, DEEP / 65535),
    ],
    ids=["uint8", "uint16", "int16", "uint32", "float64"],
)
def test_tiff_variants(values, expected, compression):
    options = [{}, {"tile": (16, 32)}, {"bigtiff": True, "byteorder": ">"}]
    options += [] if compression in (None, "packbits") else [{"predictor": True}]
    for option in options:
        image = read(tiff_bytes(values, compression=compression, **option))
        np.testing.assert_allclose(image.pixels[0], expected, atol=1e-6, err_msg=str(option))
        assert (image.units, image.remarks) == ("intensity", ())
    inverted = read(tiff_bytes(values, compression=compression, photometric="miniswhite"))
    np.testing.assert_allclose(inverted.pixels[0], 1 - expected, atol=1e-6)


def test_tiff_with_jpeg_and_jpeg_2000_inside():
    smooth = (X * 4 + Y).astype(np.uint8)
    tile = {"tile": (16, 16)}
    for data in (tiff_bytes(smooth, compression="jpeg"), tiff_bytes(smooth, compression="jpeg", **tile)):
        np.testing.assert_allclose(read(data).pixels[0], smooth / 255, atol=4 / 255)
    deep = tiff_bytes(DEEP, compression="jpeg2000", compressionargs={"level": 0})
    np.testing.assert_allclose(read(deep).pixels[0], stretched(DEEP), atol=1e-6)


def test_signed_values_below_tissue_are_hounsfield_units():
    hu = (DEEP // 40).astype(np.int16) - 1000
    image = read(tiff_bytes(hu))
    assert (image.units, image.modality) == ("hu", "ct")
    np.testing.assert_array_equal(image.pixels[0], hu)


def test_palettes_are_looked_up():
    order = np.random.default_rng(0).permutation(256)  # a grey ramp out of order
    numbers = np.argsort(order).astype(np.uint8)[GRAY]
    image = Image.frombytes("P", GRAY.shape[::-1], numbers.tobytes())
    image.putpalette(np.repeat(order, 3).astype(np.uint8).tobytes())
    for kind in ("PNG", "TIFF", "BMP"):
        read_back = read(pil_bytes(image, kind))
        np.testing.assert_allclose(read_back.pixels[0], GRAY / 255, atol=1e-6)
        assert codes(read_back) == []
    table = np.stack([order] * 3).astype(np.uint16) * 257
    tiled = tiff_bytes(numbers, photometric="palette", colormap=table, compression="zstd")
    np.testing.assert_allclose(read(tiled).pixels[0], GRAY / 255, atol=1e-6)


@pytest.mark.parametrize(("mode", "bits"), [("1", 1), ("L", 8)])
def test_few_bits_fill_the_range(mode, bits):
    levels = Image.fromarray((GRAY >> 7) * np.uint8(255)).convert(mode)
    for kind in ("PNG", "TIFF", "BMP"):
        assert set(np.unique(read(pil_bytes(levels, kind)).pixels)) == {0, 1}


def test_opacity_lies_over_black():
    opacity = np.full_like(GRAY, 255)
    opacity[:5] = 0
    for data in (
        imagecodecs.png_encode(np.stack([GRAY, opacity], axis=-1)),
        pil_bytes(np.dstack([GRAY, GRAY, GRAY, opacity]), "WEBP", lossless=True, exact=True),
    ):
        pixels = read(data).pixels[0]
        assert (pixels[:5] == 0).all()
        np.testing.assert_allclose(pixels[5:], GRAY[5:] / 255, atol=1e-6)


def test_cmyk_jpeg_is_not_inverted():
    ramp = np.broadcast_to((X * 5)[..., None], (40, 50, 3)).astype(np.uint8)
    data = pil_bytes(Image.fromarray(ramp).convert("CMYK"), "JPEG", quality=95)  # PIL writes it as Adobe does
    image = read(data)
    np.testing.assert_allclose(image.pixels[0], ramp[..., 0] / 255, atol=4 / 255)
    assert codes(image) == []


def test_jpeg_2000_of_eight_and_sixteen_bits():
    for pixels, expected in ((GRAY, GRAY / 255), (DEEP, stretched(DEEP))):
        for options in ({}, {"no_jp2": True}):
            image = read(pil_bytes(pixels, "JPEG2000", irreversible=False, **options))
            np.testing.assert_allclose(image.pixels[0], expected, atol=1e-6)


def test_colour_is_said_only_where_channels_differ():
    smooth = np.clip(X * 4 + Y, 0, 255).astype(np.uint8)
    gray = np.stack([smooth] * 3, axis=-1)
    for data in (pil_bytes(gray, "PNG"), pil_bytes(gray, "JPEG", quality=60), pil_bytes(smooth, "JPEG")):
        assert codes(read(data)) == []
    image = read(pil_bytes(COLOUR, "PNG"))
    assert codes(image) == ["colour"] and image.remarks[0].value > 0.9
    np.testing.assert_allclose(image.pixels[0], COLOUR @ LUMA / 255, atol=1 / 255)


def test_colour_profiles_and_gamma_change_nothing():
    profile = b"not a profile that anything could apply"
    data = pil_bytes(GRAY, "PNG", icc_profile=profile)
    with_gamma = data[:33] + png_chunk(b"gAMA", struct.pack(">I", 100_000)) + data[33:]
    np.testing.assert_array_equal(read(with_gamma).pixels, read(pil_bytes(GRAY, "PNG")).pixels)


# --------------------------------------------------------------------------------------------------------------------
# Orientation

TURNED = {
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.T,
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].T,
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("orientation", TURNED)
def test_every_exif_orientation_is_followed_and_said(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    eight, deep = TURNED[orientation](GRAY) / 255, stretched(TURNED[orientation](DEEP))
    tag = [(274, "H", 1, orientation, True)]
    cases = [
        (pil_bytes(GRAY, "PNG", exif=exif), eight, 1e-6),
        (pil_bytes(DEEP, "PNG", exif=exif), deep, 1e-6),
        (pil_bytes(GRAY, "WEBP", exif=exif, lossless=True), eight, 1e-6),
        (pil_bytes((X * 4 + Y).astype(np.uint8), "JPEG", exif=exif), TURNED[orientation](X * 4 + Y) / 255, 4 / 255),
        (tiff_bytes(GRAY, extratags=tag), eight, 1e-6),
        (tiff_bytes(DEEP, extratags=tag), deep, 1e-6),
    ]
    sources = [(Image.open(io.BytesIO(data)), *rest) for data, *rest in cases]
    sources += [*cases, (tiff_bytes(DEEP / 65535, extratags=tag), TURNED[orientation](DEEP / 65535), 1e-6)]
    for source, expected, tolerance in sources:
        image = read(source)
        np.testing.assert_allclose(image.pixels[0], expected, atol=tolerance)
        assert codes(image) == ["reoriented"]
        assert image.remarks[0].severity == ("warning" if orientation in (2, 4, 5, 7) else "info")


def test_damaged_exif_is_no_reason_to_refuse():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = pil_bytes(GRAY, "JPEG", exif=exif, quality=95)
    start = data.index(b"Exif\0\0") + 6
    assert read(data[:start] + b"\xff" * 8 + data[start + 8 :]).pixels.shape == (1, 40, 50)


# --------------------------------------------------------------------------------------------------------------------
# Pages and frames


def test_pages_are_slices_decoded_when_asked_for():
    hu = np.stack([(DEEP // 40).astype(np.int16) - 1000 + number for number in range(30)])
    for option in ({}, {"compression": "lzw"}, {"tile": (16, 16)}):
        image = read(tiff_bytes(hu, **option))
        assert isinstance(image.pixels, LazyPixels) and image.pixels.shape == (30, 40, 50)
        assert (image.units, image.modality, codes(image)) == ("hu", "ct", ["frames_as_slices"])
        np.testing.assert_array_equal(image.pixels[[3, 29]], hu[[3, 29]])
        np.testing.assert_array_equal(np.asarray(image.pixels), hu)
    shown = read(tiff_bytes(np.stack([GRAY, GRAY.T[:40, :40].repeat(2, axis=1)[:, :50]])))
    assert shown.pixels.shape == (2, 40, 50) and codes(shown) == ["frames_as_slices", "display_values"]
    np.testing.assert_allclose(shown.pixels[0], GRAY / 255, atol=1e-6)


def test_previews_in_a_tiff_are_not_slices():
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as writer:
        writer.write(DEEP, photometric="minisblack")
        writer.write(DEEP[::2, ::2], photometric="minisblack", subfiletype=1)
    image = read(buffer.getvalue())
    assert image.pixels.shape == (1, 40, 50) and image.remarks == ()


def test_what_moves_or_does_not_fit_together_is_refused():
    other = [Image.fromarray(255 - GRAY)]
    animated = {"save_all": True, "append_images": other}
    cases = {
        pil_bytes(GRAY, "WEBP", **animated): "several frames",
        pil_bytes(GRAY, "PNG", **animated): "several frames",
        pil_bytes(GRAY, "GIF", **animated): "looks like a GIF image",
        pil_bytes(GRAY, "TIFF", save_all=True, append_images=[Image.fromarray(GRAY[:20])]): "different sizes",
    }
    for data, reason in cases.items():
        with pytest.raises(ValueError, match=reason):
            read(data)
    with pytest.raises(ValueError, match="<PIL image>: holds several pages"):
        read(Image.open(io.BytesIO(tiff_bytes(np.stack([GRAY, GRAY])))))


def test_a_camera_jpeg_with_previews_is_its_first_picture():
    page = Image.fromarray(GRAY)
    assert read(pil_bytes(page, "MPO", save_all=True, append_images=[page])).pixels.shape == (1, 40, 50)


# --------------------------------------------------------------------------------------------------------------------
# Damage and bombs

ZEROS = zlib.compress(b"\0" * 30_000_000, 9)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (png_of(60_000, 60_000), "too many pixels"),
        (png_of(8192, 8193), "8192 x 8193 is too many pixels"),
        (png_of(8, 8, png_chunk(b"zTXt", b"a\0\0" + ZEROS), b"\0" * 72), "damaged PNG"),
        (png_of(8, 8, png_chunk(b"iCCP", b"a\0\0" + ZEROS), b"\0" * 72), "damaged PNG"),
        (png_of(8, 8, rows=b"\0" * 20, depth=16, colour=2), "damaged PNG"),
        (tiff_of(100_000, 100_000, 1, b"\0" * 100), "too many pixels"),
        (tiff_of(100_000, 100_000, 1, b"\0" * 100, bits=64), "too many pixels|damaged TIFF"),
        (tiff_of(16, 16, 8, ZEROS, bits=32), "damaged TIFF"),
        (tiff_of(16, 16, 7, pil_bytes(np.zeros((2000, 2000), np.uint8), "JPEG"), next_page=8), "damaged TIFF"),
        (tiff_of(16, 16, 34712, pil_bytes(np.zeros((200, 200), np.uint8), "JPEG2000")), "damaged TIFF"),
        (tiff_of(16, 16, 50001, b"RIFF", bits=32), "compression that is not read"),
        (b"BM" + struct.pack("<IHHIIiiHHIIiiII", 99, 0, 0, 54, 40, 30_000, 30_000, 1, 8, *[0] * 6), "too many pixels"),
        (tiff_bytes(np.zeros((4, 4, 4), np.uint16), photometric="separated"), "colour model"),
        (tiff_bytes(np.zeros((4, 4), np.complex64)), "expected integers or floats"),
    ],
)
def test_bombs_are_refused_by_their_headers(data, reason):
    with pytest.raises(ValueError, match=f"^<bytes>: .*({reason})"):
        read(data)


def test_jpeg_2000_and_many_scans_have_lower_limits(monkeypatch):
    progressive = pil_bytes(GRAY, "JPEG", progressive=True)
    monkeypatch.setattr(raster_m3fm, "_MAX_JPEG_WORK", 40 * 50 * 5)
    with pytest.raises(ValueError, match="scans"):
        read(progressive)
    assert read(pil_bytes(GRAY, "JPEG")).pixels.shape == (1, 40, 50)
    monkeypatch.setattr(raster_m3fm, "_MAX_JPEG2000_SAMPLES", 40 * 50)
    assert read(pil_bytes(GRAY, "JPEG2000")).pixels.shape == (1, 40, 50)
    with pytest.raises(ValueError, match="JPEG 2000"):
        read(pil_bytes(COLOUR, "JPEG2000"))


def test_too_many_pages_and_pages_in_a_circle(monkeypatch):
    assert read(tiff_of(4, 4, 1, bytes(range(16)), next_page=8)).pixels.shape == (1, 4, 4)
    monkeypatch.setattr(raster_m3fm, "MAX_PAGES", 3)
    with pytest.raises(ValueError, match="more than 3 pages"):
        read(tiff_bytes(np.stack([GRAY] * 4)))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP", "JPEG2000", "BMP"])
def test_cut_files_are_refused(kind):
    noise = np.random.default_rng(0).integers(0, 256, (40, 50), dtype=np.uint8)
    data = pil_bytes(noise, kind)
    for length in (20, 40, len(data) // 2, len(data) - 40):
        with pytest.raises(ValueError, match="^<bytes>: (truncated or damaged|not a readable)"):
            read(data[:length])


def test_a_pil_image_may_prove_damaged_when_it_loads():
    data = pil_bytes(np.random.default_rng(0).integers(0, 256, (40, 50), dtype=np.uint8), "PNG")
    with pytest.raises(ValueError, match="^<PIL image>: truncated or damaged PNG"):
        read(Image.open(io.BytesIO(data[: len(data) // 2])))


def test_a_page_that_is_damaged_is_named_when_it_is_decoded():
    stack = np.stack([(DEEP // 40).astype(np.int16) - 1000] * 30)
    data = bytearray(tiff_bytes(stack, compression="zlib"))
    with tifffile.TiffFile(io.BytesIO(bytes(data))) as file:
        start = file.pages[1].dataoffsets[0]
    data[start : start + 40] = b"\xff" * 40
    image = read(bytes(data))
    np.testing.assert_array_equal(image.pixels[0], stack[0])
    with pytest.raises(ValueError, match="^<bytes>: truncated or damaged TIFF"):
        image.pixels[1]


def test_tags_reach_no_log(caplog):
    secret = "DOE^JANE"
    tags = [(315, "s", 0, secret, True), (274, "s", 0, secret, True)]
    with caplog.at_level(logging.DEBUG):
        for pixels in (GRAY, DEEP / 65535):
            data = tiff_bytes(pixels, description=secret, extratags=tags)
            for damaged in (data, data[:-300]):
                try:
                    read(damaged)
                except ValueError as error:
                    assert secret not in str(error)
    assert secret not in caplog.text
