# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Read chest images from raster, DICOM and NIfTI files, or from memory, into one form: `ChestImage`.

Shapes: S slices (1 for a radiograph), H rows, W columns. No attribute of a `ChestImage` and no error message holds
patient data; errors name the source as the caller gave it.
"""

import gzip
import io
import os
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from .chest_image_m3fm import (
    MAX_VOXELS,
    ChestImage,
    bad_source,
    check_voxels,
    finished,
    gray_from_uint8,
    stretch,
    without_nan,
)
from .dicom_m3fm import read_dicom

# Formats tried by PIL. Others (EPS, which starts Ghostscript, among them) are not for files of unknown origin.
RASTER_FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP")
DEFAULT_PERCENTILES = (0.5, 99.5)

_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R 601, the weights PIL uses
_NIFTI_HEADER_BYTES = 352


def read_image(source: Any, percentiles: tuple[float, float] | None = DEFAULT_PERCENTILES) -> ChestImage:
    """Read one image or volume, recognised by its content and not by its name.

    Depth: 8-bit values are divided by 255. Values with no defined display range (16-bit and float rasters, integer
    arrays, radiograph DICOM without window) are stretched from the given percentiles to 0..1. A float array or
    raster that lies within 0..1 is kept as it is.

    Args:
        source: A path (PNG, JPEG, TIFF, BMP, WebP, DICOM, NIfTI), the bytes or an open binary file of one, a PIL
            image, a numpy array or torch tensor, or a `ChestImage` (returned unchanged). Arrays: (H, W); (H, W, 3)
            or (3, H, W) colour, uint8 or 0..1, also with a fourth channel of opacity; (S, H, W) outside 0..1 is a CT
            volume in HU, and otherwise a stack ready for display; (H, W, 1) and (1, H, W) are (H, W). What could be
            colour or a volume of three or four slices is refused: a `ChestImage` says which.
        percentiles: Low and high percentile that become 0 and 1 where no display range is defined; None takes the
            minimum and maximum.

    Returns:
        The image.

    Raises:
        ValueError: If the source cannot be read as a chest image; names the source and the reason.
        ImportError: If a DICOM or NIfTI file is given and its optional reader is not installed.
    """
    if isinstance(source, ChestImage):
        return source
    if isinstance(source, (str, os.PathLike)):
        return _read_encoded(_file_bytes(source), os.fspath(source), percentiles)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _read_encoded(bytes(source), "<bytes>", percentiles)
    if isinstance(source, Image.Image):
        return _read_pil(source, "<PIL image>", percentiles)
    if hasattr(source, "detach") and hasattr(source, "cpu"):  # a torch tensor, told without importing torch
        tensor = source.detach().cpu()
        source = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    if isinstance(source, np.ndarray):
        return _read_array(source, f"<array {source.shape} {source.dtype}>", percentiles)
    if hasattr(source, "read"):
        data = source.read()
        name = getattr(source, "name", None)
        name = name if isinstance(name, str) else "<file object>"
        if not isinstance(data, bytes):
            raise bad_source(
                name, f"got a file object that reads {type(data).__name__}, expected one opened in binary mode"
            )
        return _read_encoded(data, name, percentiles)
    raise ValueError(
        f"image of type {type(source).__name__}: expected a path, bytes, a binary file, a PIL image, "
        "a numpy array, a torch tensor or a ChestImage"
    )


# --------------------------------------------------------------------------------------------------------------------
# Encoded files


def _file_bytes(source: str | os.PathLike) -> bytes:
    path = Path(source)
    name = os.fspath(source)
    if path.is_dir():
        raise bad_source(name, "is a directory, expected an image file")
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise bad_source(name, "no such file (addresses are not downloaded)") from None
    except (OSError, ValueError) as error:
        raise bad_source(name, f"cannot be read ({getattr(error, 'strerror', None) or error})") from error


def _read_encoded(data: bytes, name: str, percentiles: tuple[float, float] | None) -> ChestImage:
    if not data:
        raise bad_source(name, "empty file (0 bytes)")
    if data[128:132] == b"DICM" or _is_bare_dicom(data, name):
        return read_dicom(data, name, percentiles)
    if data[:2] == b"\x1f\x8b" or _is_nifti(data):
        return _read_nifti(data, name)
    return _read_raster(data, name, percentiles)


def _is_bare_dicom(data: bytes, name: str) -> bool:
    """Recognise a data set without the 128-byte preamble: it starts with an element of group 0002 or 0008."""
    starts = data[:2] in (b"\x02\x00", b"\x08\x00")
    return starts and (name.lower().endswith((".dcm", ".dicom")) or (data[3:4] == b"\x00" and data[4:6].isalpha()))


def _is_nifti(data: bytes) -> bool:
    return data[344:348] in (b"n+1\0", b"ni1\0") or data[4:8] in (b"n+2\0", b"ni2\0")


def _read_raster(data: bytes, name: str, percentiles: tuple[float, float] | None) -> ChestImage:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # remarks on damaged metadata, which may quote it
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            image = Image.open(io.BytesIO(data), formats=RASTER_FORMATS)
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            raise bad_source(name, f"too many pixels, expected at most {Image.MAX_IMAGE_PIXELS}") from None
        except Exception as error:  # PIL's parsers raise many kinds on damaged files
            reason = "not a readable image (PNG, JPEG, TIFF, BMP, WebP, DICOM or NIfTI expected)"
            raise bad_source(name, reason) from error
        try:
            pages = getattr(image, "n_frames", 1)
            image.load()
        except Exception as error:
            raise bad_source(name, "truncated or damaged image") from error
        if pages > 1 and image.format != "MPO":  # MPO: a JPEG with previews behind the picture
            raise bad_source(name, f"holds {pages} pages, expected a single image")
        return _read_pil(image, name, percentiles)


def _read_pil(image: Image.Image, name: str, percentiles: tuple[float, float] | None) -> ChestImage:
    try:
        image = ImageOps.exif_transpose(image)
    except Exception as error:  # PIL images load lazily: a damaged file shows only here
        raise bad_source(name, "truncated or damaged image") from error
    if 0 in image.size:
        raise bad_source(name, f"image of size {image.size}, expected at least one pixel")
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        return _read_array(np.asarray(image), name, percentiles)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    if image.mode not in ("1", "L", "RGB"):
        image = image.convert("RGB")  # palette, CMYK, YCbCr...: through RGB, so that "L" below is luma
    return _read_array(np.asarray(image.convert("L")), name, percentiles)


# --------------------------------------------------------------------------------------------------------------------
# Arrays


def _read_array(array: np.ndarray, name: str, percentiles: tuple[float, float] | None) -> ChestImage:
    if array.dtype.kind not in "uif":
        raise bad_source(name, f"got {array.dtype} values, expected integers or floats")
    if array.ndim not in (2, 3):
        raise bad_source(name, f"got {array.ndim} dimensions, expected (H, W), (H, W, 3), (3, H, W) or (S, H, W)")
    if array.size == 0:
        raise bad_source(name, f"image of size {array.shape}, expected at least one pixel")
    array = without_nan(array, name)
    if array.ndim == 3 and 1 in (array.shape[0], array.shape[-1]):
        array = array[0] if array.shape[0] == 1 else array[..., 0]
    if array.dtype == np.uint8:
        gray = gray_from_uint8(array)
        return finished(name, (gray if gray.ndim == 3 else gray[None]).astype(np.float32) / np.float32(255))
    display_ready = array.dtype.kind == "f" and array.min() >= 0 and array.max() <= 1
    if array.ndim == 2:
        pixels = array.astype(np.float32) if display_ready else _stretch_checked(array, percentiles, name)
        return finished(name, pixels[None])
    if display_ready:
        return finished(name, _gray_float(array.astype(np.float32)))
    if array.shape[-1] in (3, 4) or array.shape[0] in (3, 4):
        raise bad_source(
            name,
            "ambiguous: expected colour as uint8 or floats in 0..1, not normalised; or a volume as (S, H, W) in HU, "
            "one of 3 or 4 slices as a ChestImage",
        )
    return finished(name, array, modality="ct", units="hu")


def _stretch_checked(array: np.ndarray, percentiles: tuple[float, float] | None, name: str) -> np.ndarray:
    if array.min() == array.max():
        raise bad_source(name, "blank image: every pixel has the same value")
    return stretch(array, percentiles)


def _gray_float(array: np.ndarray) -> np.ndarray:
    """Turn colour in 0..1, channels first or last, into (1, H, W) over black; leave a stack (S, H, W) as it is."""
    if array.shape[-1] not in (3, 4):
        if array.shape[0] not in (3, 4):
            return array
        array = np.moveaxis(array, 0, -1)
    gray = array[..., :3] @ _LUMA
    return (gray * array[..., 3] if array.shape[-1] == 4 else gray)[None]


# --------------------------------------------------------------------------------------------------------------------
# NIfTI


def _read_nifti(data: bytes, name: str) -> ChestImage:
    try:
        import nibabel
    except ImportError as error:
        raise ImportError(f"{name}: reading NIfTI needs nibabel: pip install m3fm[medical]") from error
    if data[:2] == b"\x1f\x8b":
        data = _gunzip_nifti(data, name)
    if data[344:348] == b"ni1\0" or data[4:8] == b"ni2\0":
        raise bad_source(name, "NIfTI header without its image (.hdr/.img pair), expected a single .nii file")
    kind = nibabel.Nifti2Image if data[4:8] == b"n+2\0" else nibabel.Nifti1Image
    try:
        header = kind.header_class.from_fileobj(io.BytesIO(data))
        shape = tuple(int(n) for n in header.get_data_shape())
        dtype = header.get_data_dtype()
    except Exception as error:
        raise bad_source(name, "damaged NIfTI header") from error
    _check_nifti(name, shape, dtype)
    try:
        image = kind.from_bytes(data)
        values = image.get_fdata(dtype=np.float32, caching="unchanged").reshape((*shape, 1, 1)[:3])
        volume = nibabel.as_closest_canonical(kind(values, image.affine)).get_fdata(dtype=np.float32)
    except Exception as error:
        raise bad_source(name, "truncated or damaged NIfTI file") from error
    # RAS axes grow to the right, to anterior and to superior. Display: rows from
    # anterior down, columns from the patient's right (which is shown on the left), slices from inferior up.
    return finished(name, without_nan(volume[::-1, ::-1].transpose(2, 1, 0), name), modality="ct", units="hu")


def _check_nifti(name: str, shape: tuple[int, ...], dtype: np.dtype) -> None:
    if len(shape) < 2 or any(n > 1 for n in shape[3:]):
        raise bad_source(name, f"NIfTI with {len(shape)} dimensions {shape}, expected a 2-D image or one 3-D volume")
    if 0 in shape:
        raise bad_source(name, f"image of size {shape}, expected at least one pixel")
    if dtype.kind not in "uif":
        raise bad_source(name, f"NIfTI with {dtype} values, expected integers or floats in HU")
    check_voxels(name, *shape)


def _gunzip_nifti(data: bytes, name: str) -> bytes:
    """Decompress no more than a volume of `MAX_VOXELS` 16-bit values can need."""
    limit = 2 * MAX_VOXELS + (1 << 20)
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as stream:
            head = stream.read(_NIFTI_HEADER_BYTES)
            if not _is_nifti(head):
                raise bad_source(name, "gzip file that holds no NIfTI volume")
            body = stream.read(limit)
    except (EOFError, OSError, struct.error, zlib.error) as error:
        raise bad_source(name, "truncated or damaged gzip file") from error
    if len(body) == limit:
        raise bad_source(name, f"decompresses to more than {limit} bytes")
    return head + body


__all__ = ["DEFAULT_PERCENTILES", "ChestImage", "read_image"]
