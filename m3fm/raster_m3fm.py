# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Read PNG, JPEG, TIFF, BMP, WebP and JPEG 2000 files, and PIL images.

PIL decodes 8 bits of every colour model and one channel of 16 or 32; tifffile the TIFF files that PIL would cut or
does not know; imagecodecs PNG colour of 16 bits, which PIL would cut to 8. Colour profiles and gamma are not applied:
the values of a medical image are its grey levels.

Letters: H rows, W columns, C channels.
"""

import contextlib
import io
import logging
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from .arrays_m3fm import colour_remarks, gray_of_colour, read_plane
from .chest_image_m3fm import ChestImage, LazyPixels, Remark, bad_source, check_voxels
from .hounsfield_m3fm import volume_of

# 8192 x 8192, four times the largest detector for radiographs.
MAX_PIXELS = 1 << 26
MAX_PAGES = 4096

# A JPEG 2000 file of 500 bytes can make its decoder work for many seconds: 5000 x 5000 in grey is the most.
_MAX_JPEG2000_SAMPLES = 3 << 23
# Pixels times scans, each of which goes over the whole picture again: encoders write about ten.
_MAX_JPEG_WORK = 3 << 28
_MAX_TIFF_SCANS = 20
_MAX_TIFF_BYTES = 1 << 29
_JPEG_SCAN = b"\xff\xda"
_ADVICE = "expected a single image"

# By what files of each format start with. Others that PIL opens (EPS, which starts Ghostscript, among them) are not
# for files of unknown origin.
_MARKS = (
    ("PNG", b"\x89PNG\r\n\x1a\n"),
    ("JPEG", b"\xff\xd8\xff"),
    ("TIFF", b"II*\0"),
    ("TIFF", b"MM\0*"),
    ("TIFF", b"II+\0"),
    ("TIFF", b"MM\0+"),
    ("JPEG2000", b"\0\0\0\x0cjP  \r\n\x87\n"),
    ("JPEG2000", b"\xff\x4f\xff\x51"),
)

# What a stored picture needs to be displayed, by its EXIF orientation: turned by quarter turns, after a mirror or not.
_TURNS = {2: (0, True), 3: (2, False), 4: (2, True), 5: (1, True), 6: (3, False), 7: (3, True), 8: (1, False)}

_TIFF_GRAY, _TIFF_WHITE_IS_ZERO, _TIFF_RGB, _TIFF_PALETTE, _TIFF_YCBCR = 1, 0, 2, 3, 6
_TIFF_JPEG = (6, 7)
_TIFF_JPEG2000 = (33003, 33004, 33005, 34712)
_TIFF_WEBP = 50001
# None, LZW, deflate (two codes), PackBits, LZMA, Zstandard: their decoders are told how much may come out.
_TIFF_BOUNDED = (1, 5, 8, 32946, 32773, 34925, 50000)

_NOISY = ("tifffile", "PIL.TiffImagePlugin", "PIL.PngImagePlugin")
_quiet = threading.local()


def raster_kind(head: bytes) -> str | None:
    """Tell a raster file by its first 32 bytes: PIL's name of its format, None if it is of none that is read."""
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    # A text may start with BM: the size of the next header tells a bitmap.
    if head[:2] == b"BM" and head[14:15] in (b"\x0c", b"\x28", b"\x34", b"\x38", b"\x40", b"\x6c", b"\x7c"):
        return "BMP"
    return next((kind for kind, mark in _MARKS if head.startswith(mark)), None)


def read_raster(data: bytes, name: str, kind: str, percentiles: tuple[float, float] | None) -> ChestImage:
    """Read a raster file.

    Args:
        data: The whole file.
        name: What errors call it.
        kind: What `raster_kind` says of it.
        percentiles: See `stretch`.

    Returns:
        One image; the pages of a TIFF file are slices.

    Raises:
        ValueError: If the file is damaged, too large, animated, or of a variant that is not read.
        ImportError: If its variant needs tifffile or imagecodecs and these are missing.
    """
    if kind == "TIFF" and data[2:4] in (b"+\0", b"\0+"):  # BigTIFF, of which PIL takes the tags for damaged
        return _read_tiff(data, name, percentiles)
    with _silence():
        try:
            image = Image.open(io.BytesIO(data), formats=(kind,))
        except Image.DecompressionBombError:
            raise bad_source(name, f"too many pixels, expected at most {MAX_PIXELS}") from None
        except Exception:  # PIL's parsers raise many kinds on damaged files
            if kind == "TIFF":
                return _read_tiff(data, name, percentiles)
            raise bad_source(name, f"truncated or damaged {kind} file") from None
        if kind == "JPEG" and data.count(_JPEG_SCAN) * image.width * image.height > _MAX_JPEG_WORK:
            raise bad_source(name, "too many pixels for the number of its scans (passes over the picture)")
        if kind == "TIFF" and not _is_whole_in_pil(image):
            return _read_tiff(data, name, percentiles)
        if kind == "PNG" and data[24:25] == b"\x10" and data[25:26] in (b"\2", b"\4", b"\6"):
            return _read_deep_png(image, data, name, percentiles)
        return read_pil(image, name, percentiles)


def read_pil(image: Image.Image, name: str, percentiles: tuple[float, float] | None) -> ChestImage:
    """Read a PIL image, also one that is not loaded yet.

    Raises:
        ValueError: If it is damaged, too large, animated or has several pages.
    """
    pixels, orientation = _loaded(image, name)
    if pixels.mode in ("I", "F") or pixels.mode.startswith("I;"):
        gray, share = np.asarray(pixels), 0.0
    else:
        gray, share = _gray_of_pil(pixels, name)
    shown, remarks = _oriented(gray, orientation)
    if image.format == "TIFF" and orientation:  # PIL turns TIFF files itself
        shown = gray
    return read_plane(name, shown, percentiles, remarks=(*remarks, *colour_remarks(share)))


def _loaded(image: Image.Image, name: str) -> tuple[Image.Image, int]:
    """Decode a PIL image: the image, and its EXIF orientation, 0 where there is nothing to do."""
    if getattr(image, "is_animated", False) and image.format != "MPO":  # MPO: a JPEG with previews behind the picture
        frames = "several pages" if image.format == "TIFF" else "several frames (an animation)"
        raise bad_source(name, f"holds {frames}, {_ADVICE}")
    _check_size(name, *image.size)
    if image.format == "JPEG2000" and image.width * image.height * len(image.getbands()) > _MAX_JPEG2000_SAMPLES:
        raise bad_source(name, f"too many pixels, expected at most {_MAX_JPEG2000_SAMPLES} samples in JPEG 2000")
    orientation = _orientation(image) if image.format == "TIFF" else 0
    try:
        image.load()
    except Exception:  # a damaged file shows only here
        raise bad_source(name, f"truncated or damaged {image.format or 'image'} file") from None
    _check_size(name, *image.size)
    return image, orientation or _orientation(image)


def _orientation(image: Image.Image) -> int:
    try:
        value = image.tag_v2.get(274) if image.format == "TIFF" else image.getexif().get(274)
        return int(value) if value in _TURNS else 0
    except Exception:  # EXIF that is damaged is EXIF that is not there
        return 0


def _check_size(name: str, width: int, height: int) -> None:
    if width < 1 or height < 1:
        raise bad_source(name, f"image of size {(width, height)}, expected at least one pixel")
    if width * height > MAX_PIXELS:
        raise bad_source(name, f"{width} x {height} is too many pixels, expected at most {MAX_PIXELS}")


def _gray_of_pil(image: Image.Image, name: str) -> tuple[np.ndarray, float]:
    """Return (H, W) uint8, over black where it is not opaque, and the share of pixels that have a hue."""
    try:
        if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
        if image.mode == "LAB":
            image = image.getchannel(0)
        if image.mode in ("1", "L"):
            return np.asarray(image.convert("L")), 0.0
        return gray_of_colour(np.asarray(image.convert("RGB")))  # palette, CMYK, YCbCr...
    except MemoryError:
        raise
    except Exception:
        raise bad_source(name, f"PIL cannot display an image of mode {image.mode}") from None


def _oriented(pixels: np.ndarray, orientation: int) -> tuple[np.ndarray, tuple[Remark, ...]]:
    """Turn (H, W) as its EXIF orientation asks, and say so."""
    if orientation not in _TURNS:
        return pixels, ()
    quarters, mirrored = _TURNS[orientation]
    pixels = np.rot90(pixels[:, ::-1] if mirrored else pixels, quarters)
    if mirrored:
        message = "mirrored, as the file's orientation tag asks: check left and right"
        return pixels, (Remark("reoriented", message, "warning"),)
    return pixels, (Remark("reoriented", f"turned by {(-90 * quarters) % 360} degrees, as the file asks", "info"),)


# --------------------------------------------------------------------------------------------------------------------
# Sixteen-bit colour PNG


def _read_deep_png(image: Image.Image, data: bytes, name: str, percentiles: tuple[float, float] | None) -> ChestImage:
    """Read PNG colour or opacity of 16 bits; PIL has checked its size and chunks, and knows its orientation."""
    _, orientation = _loaded(image, name)
    codecs = _import_imagecodecs(name, "PNG with 16-bit colour or opacity")
    try:
        array = codecs.png_decode(data)
    except Exception:
        raise bad_source(name, "truncated or damaged PNG file") from None
    gray, share = _gray_of_samples(array, opacity=array.shape[-1] in (2, 4))
    gray, remarks = _oriented(gray, orientation)
    return read_plane(name, gray, percentiles, remarks=(*remarks, *colour_remarks(share)))


def _gray_of_samples(array: np.ndarray, opacity: bool) -> tuple[np.ndarray, float]:
    """Turn (H, W, C) of grey or colour, with opacity last or without, to (H, W); the share that has a hue."""
    if array.ndim == 2:
        return array, 0.0
    if array.shape[-1] > 2:
        colour = array if opacity else array[..., :3]
        if (colour[..., 0] == colour[..., 1]).all() and (colour[..., 0] == colour[..., 2]).all():
            array = colour[..., 2:] if opacity else colour[..., :1]  # grey: exactly its values, not their luma
        else:
            return gray_of_colour(colour)
    if not opacity:
        return array[..., 0], 0.0
    top = np.float32(np.iinfo(array.dtype).max if array.dtype.kind in "ui" else 1)
    return array[..., 0] * (array[..., 1] / top), 0.0


def _import_imagecodecs(name: str, what: str) -> Any:
    try:
        import imagecodecs
    except ImportError as error:
        raise ImportError(f"{name}: reading {what} needs imagecodecs: pip install m3fm[medical]") from error
    return imagecodecs


# --------------------------------------------------------------------------------------------------------------------
# TIFF that PIL does not read, or not whole


def _is_whole_in_pil(image: Image.Image) -> bool:
    """Tell whether PIL gives every bit of a TIFF file, by its header."""
    try:
        tags = image.tag_v2
        bits = tuple(tags.get(258, (1,)))
        signs = set(tags.get(339, (1,)))
        photometric = tags.get(262, _TIFF_GRAY)
        if image.is_animated or tags.get(259, 1) == _TIFF_WEBP:  # PIL calls WebP damaged
            return False
        if max(bits) <= 8:
            return signs <= {1, 4}
        one = (photometric, len(bits), len(signs)) == (_TIFF_GRAY, 1, 1)
        return one and (bits[0], *signs) in {(16, 1), (16, 2), (32, 2), (32, 3)}
    except Exception:  # damaged tags
        return False


@dataclass(frozen=True)
class _Layout:
    """What the tags of a TIFF page say, checked to be numbers; rows and columns are those of a tile or strip."""

    width: int
    height: int
    rows: int
    columns: int
    planes: int
    bits: int
    dtype: str
    photometric: int
    compression: int
    orientation: int
    is_planar: bool
    has_opacity: bool


def _read_tiff(data: bytes, name: str, percentiles: tuple[float, float] | None) -> ChestImage:
    """Read a TIFF file with tifffile: one plane, or its pages as slices."""
    pages, layout = _tiff_pages(data, name)
    gray, share = _gray_of_page(pages[0], layout, name)
    shown, remarks = _oriented(gray, layout.orientation)
    remarks = (*remarks, *colour_remarks(share))
    if len(pages) == 1:
        return read_plane(name, shown, percentiles, remarks=remarks)

    def read(number: int) -> np.ndarray:
        gray, _ = _gray_of_page(pages[number], layout, name)
        return _oriented(gray, layout.orientation)[0].astype(np.float32)

    remark = Remark("frames_as_slices", f"{len(pages)} pages taken as the slices of one volume, first page lowest")
    lazy = LazyPixels((len(pages), *shown.shape), read)
    return volume_of(name, lazy, percentiles=percentiles, remarks=(*remarks, remark))


def _tiff_pages(data: bytes, name: str) -> tuple[list[Any], _Layout]:
    """Return the pages of full size, and their layout: alike, and none larger than it may be."""
    try:
        import tifffile
    except ImportError as error:
        raise ImportError(f"{name}: this kind of TIFF needs tifffile: pip install m3fm[medical]") from error
    pages: list[Any] = []
    with _silence():
        try:
            file = tifffile.TiffFile(io.BytesIO(data), _multifile=False)
            file.filehandle.set_lock(True)
            while len(pages) <= MAX_PAGES:
                try:
                    pages.append(file.pages[len(pages)])
                except IndexError:
                    break
            pages = [page for page in pages if not (page.is_reduced or page.is_mask)] or pages[:1]
            layouts = [*{_layout(page) for page in pages}]
            layout = layouts[0]
        except Exception:  # tifffile raises many kinds on damaged files
            raise bad_source(name, "truncated or damaged TIFF file") from None
    if len(pages) > MAX_PAGES:
        raise bad_source(name, f"more than {MAX_PAGES} pages")
    if len(layouts) > 1:
        raise bad_source(name, f"pages of different sizes or kinds, {_ADVICE} or the slices of one volume")
    _check_size(name, layout.width, layout.height)
    _check_size(name, layout.columns, layout.rows)
    check_voxels(name, len(pages), layout.width, layout.height)
    _check_variant(layout, name)
    return pages, layout


def _layout(page: Any) -> _Layout:
    def tag(code: int, default: int) -> int:
        return int(page.tags[code].value) if code in page.tags else default

    tiled = bool(page.is_tiled)
    rows = int(page.tilelength) if tiled else min(int(page.rowsperstrip), int(page.imagelength))
    return _Layout(
        width=int(page.imagewidth),
        height=int(page.imagelength),
        rows=rows,
        columns=int(page.tilewidth) if tiled else int(page.imagewidth),
        planes=int(page.samplesperpixel),
        bits=int(page.bitspersample),
        dtype=str(page.dtype) if page.ndim in (2, 3) and int(page.imagedepth) == 1 else "None",
        photometric=int(page.photometric),
        compression=int(page.compression),
        orientation=tag(274, 0),
        is_planar=int(page.planarconfig or 1) == 2,
        has_opacity=tuple(int(value) for value in page.extrasamples) == (2,),
    )


def _check_variant(layout: _Layout, name: str) -> None:
    """Refuse what is not read: values, colour models, and codecs whose output has no bound."""
    if layout.dtype == "None" or np.dtype(layout.dtype).kind not in "uif":
        raise bad_source(name, "a TIFF variant whose values are not read, expected integers or floats")
    planes = {_TIFF_GRAY: (1, 2), _TIFF_WHITE_IS_ZERO: (1,), _TIFF_RGB: (3, 4), _TIFF_PALETTE: (1,)}
    planes[_TIFF_YCBCR] = (3,) if layout.compression in _TIFF_JPEG else ()
    if layout.planes not in planes.get(layout.photometric, ()):
        raise bad_source(name, "a TIFF of a colour model that is not read, expected grey, RGB or a palette")
    if layout.compression not in (*_TIFF_BOUNDED, *_TIFF_JPEG, *_TIFF_JPEG2000):
        raise bad_source(name, "a TIFF of a compression that is not read")
    size = np.dtype(layout.dtype).itemsize * layout.planes * layout.width * layout.height
    if size > _MAX_TIFF_BYTES:
        raise bad_source(name, f"too many pixels: {size} bytes, expected at most {_MAX_TIFF_BYTES}")


def _gray_of_page(page: Any, layout: _Layout, name: str) -> tuple[np.ndarray, float]:
    """Decode one page: (H, W), black at its lowest value, and the share of pixels that have a hue."""
    _check_pictures_inside(page, layout, name)
    with _silence():
        try:
            array = page.asarray(maxworkers=1)
            if array.ndim == 3 and layout.is_planar:
                array = np.moveaxis(array, 0, -1)
            if array.shape[:2] != (layout.height, layout.width):
                raise ValueError(array.shape)
            if layout.photometric == _TIFF_PALETTE:
                table = np.asarray(page.colormap)  # (3, 2**bits), 16 bits
                array = (table >> 8).astype(np.uint8).T[array]
        except Exception:
            _import_imagecodecs(name, "a compressed TIFF")  # the likeliest reason, where it is missing
            raise bad_source(name, "truncated or damaged TIFF file") from None
    if layout.photometric == _TIFF_WHITE_IS_ZERO:
        return _inverted(array, layout.bits), 0.0
    return _gray_of_samples(array, opacity=layout.planes in (2, 4) and layout.has_opacity)


def _check_pictures_inside(page: Any, layout: _Layout, name: str) -> None:
    """Refuse a JPEG or JPEG 2000 inside the page that is larger than the page says."""
    if layout.compression in _TIFF_BOUNDED:
        return
    kind = "JPEG" if layout.compression in _TIFF_JPEG else "JPEG2000"
    handle = page.parent.filehandle
    for start, count in zip(page.dataoffsets, page.databytecounts, strict=False):
        try:
            with handle.lock:
                handle.seek(start)
                segment = handle.read(count)
            with Image.open(io.BytesIO(segment), formats=(kind,)) as inner:
                width, height = inner.size
        except Exception:
            raise bad_source(name, "truncated or damaged TIFF file") from None
        if height > layout.rows or width > layout.columns or segment.count(_JPEG_SCAN) > _MAX_TIFF_SCANS:
            raise bad_source(name, "truncated or damaged TIFF file")


def _inverted(array: np.ndarray, bits: int) -> np.ndarray:
    """Turn WhiteIsZero around: within its bits, and floats within 0..1 or, beyond, by sign."""
    if array.dtype.kind == "u":
        return (np.uint64(2**bits - 1) - array).astype(array.dtype)
    return 1 - array if array.dtype.kind == "f" else -1 - array


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keep what PIL and tifffile log in this thread to themselves: it quotes tags."""
    for logger in map(logging.getLogger, _NOISY):
        logger.addFilter(_is_heard)  # adding it again changes nothing
    before = getattr(_quiet, "on", False)
    _quiet.on = True
    try:
        yield
    finally:
        _quiet.on = before


def _is_heard(record: logging.LogRecord) -> bool:
    return not getattr(_quiet, "on", False)


__all__ = ["MAX_PAGES", "MAX_PIXELS", "raster_kind", "read_pil", "read_raster"]
