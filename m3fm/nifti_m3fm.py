# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Read NIfTI-1 and NIfTI-2, and volumes in memory that know their orientation, slice by slice.

Letters: S slices, H rows, W columns; x, y, z the axes as stored. World axes are RAS: they grow to the patient's
right, to anterior and to superior. nibabel reads headers and affines; voxels are memory, of which a slice is turned
and scaled when it is asked for.
"""

import contextlib
import gzip
import io
import logging
import math
import struct
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .arrays_m3fm import colour_remarks, gray_of_colour, read_array, read_plane
from .chest_image_m3fm import ChestImage, LazyPixels, Remark, bad_source, check_voxels
from .hounsfield_m3fm import volume_of

GZIP = b"\x1f\x8b"
# What a .nii.gz may hold, and takes in memory: a CT of 600 slices as float64, and little more.
MAX_INFLATED_BYTES = 5 << 28

_MAX_DEFLATE_RATIO = 1032  # of the deflate format itself
_CHUNK = 1 << 22
_TILT_DEGREES = 5.0
_MILLIMETRES = {"meter": 1000.0, "micron": 0.001}
_SILENT = logging.Logger("m3fm.nifti", logging.CRITICAL + 1)  # header checks: what they find is judged here
_DAMAGE = (EOFError, OSError, struct.error, zlib.error)


@dataclass
class _Volume:
    """Hold a volume as stored: `array` (x, y, z), its RAS affine if known, and value = stored * slope + inter."""

    array: np.ndarray
    affine: np.ndarray | None
    sizes: tuple[float, ...] | None = None
    slope: float = 1.0
    inter: float = 0.0
    millimetres: float = 1.0
    volumes: int = 1


def is_nifti(head: bytes) -> bool:
    """Tell NIfTI-1 and -2, whole or the header of a pair, by the first 352 bytes of a file."""
    return head[344:348] in (b"n+1\0", b"ni1\0") or head[4:8] in (b"n+2\0", b"ni2\0")


def is_half_pair(path: Path) -> bool:
    """Tell by its suffix a file that may be one half of a .hdr/.img pair."""
    return path.name.lower().removesuffix(".gz").endswith((".img", ".hdr"))


def read_nifti(source: bytes | Path, name: str, percentiles: tuple[float, float] | None) -> ChestImage:
    """Read a NIfTI file.

    A path without compression is mapped: nothing but the slices asked for is read. A compressed file is inflated
    once, as stored; slices become float32 when they are asked for.

    Args:
        source: The whole file, or its path, also either half of a pair.
        name: What errors call it.
        percentiles: See `stretch`, for what is neither HU nor ready for display.

    Returns:
        A volume from inferior to superior in radiological display, or one plane.

    Raises:
        ValueError: If the file is damaged, is too large, or holds no image.
        ImportError: If nibabel is missing.
    """
    _import_nibabel(name)
    header_source, data_source = _halves(source, name)
    with _stream(header_source) as stream:
        try:
            block = stream.read(540)
        except _DAMAGE:
            raise bad_source(name, "truncated or damaged gzip file") from None
    if not is_nifti(block):
        if block[:4] in (b"\x5c\x01\0\0", b"\0\0\x01\x5c"):
            raise bad_source(name, "looks like Analyze 7.5, which does not tell left from right; expected NIfTI")
        raise bad_source(name, "gzip file that holds no NIfTI volume, expected .nii.gz")
    header = _header(block, name)
    if data_source is None:
        raise bad_source(name, "NIfTI header without its image (.hdr/.img pair), expected both, or one .nii file")
    shape, dtype, offset = _layout(header, name)
    volume = _with_header(_voxels(data_source, name, shape[:3], dtype, offset), header, name)
    volume.volumes = math.prod(shape[3:])
    return _read_volume(volume, name, percentiles)


def read_spatial(image: Any, percentiles: tuple[float, float] | None) -> ChestImage:
    """Read a nibabel image, or a SimpleITK image of three dimensions, by the geometry it states.

    Raises:
        ValueError: If it holds no image.
    """
    name = f"<{type(image).__name__}>"
    if hasattr(image, "GetDirection"):
        volume = _from_simpleitk(image, name)
        if volume is None:
            return read_array(sys.modules["SimpleITK"].GetArrayFromImage(image), percentiles, name)
    else:
        volume = _from_nibabel(image, name)
    if volume.array.ndim < 2 or 0 in volume.array.shape:
        raise bad_source(name, f"image of size {volume.array.shape}, expected a plane or a volume")
    volume.array = volume.array.reshape((*volume.array.shape, 1)[:3])
    check_voxels(name, *volume.array.shape)
    _check_dtype(volume.array.dtype, name)
    return _read_volume(volume, name, percentiles)


def _import_nibabel(name: str) -> Any:
    try:
        import nibabel
    except ImportError as error:
        raise ImportError(f"{name}: reading NIfTI needs nibabel: pip install m3fm[medical]") from error
    return nibabel


# --------------------------------------------------------------------------------------------------------------------
# Files


def _halves(source: bytes | Path, name: str) -> tuple[bytes | Path, bytes | Path | None]:
    """Return where the header and where the voxels are; no place for voxels that are missing."""
    if isinstance(source, bytes) or not is_half_pair(source):
        with _stream(source) as stream, contextlib.suppress(*_DAMAGE):
            head = stream.read(352)
            if head[344:348] == b"ni1\0" or head[4:8] == b"ni2\0":
                return source, None
        return source, source
    compressed = source.name.lower().endswith(".gz")
    stem = source.with_suffix("") if compressed else source
    other = {".img": ".hdr", ".hdr": ".img", ".IMG": ".HDR", ".HDR": ".IMG"}.get(stem.suffix, "")
    beside = [stem.with_suffix(other), stem.with_suffix(other + ".gz")] if other else []
    partner = next((path for path in beside if path.is_file()), None)
    if other.lower() == ".img":
        return source, partner
    if partner is None:
        raise bad_source(name, "an .img file without its .hdr beside it")
    return partner, source


@contextlib.contextmanager
def _stream(source: bytes | Path) -> Iterator[BinaryIO]:
    """Open a file or bytes, inflated where they are compressed."""
    with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as raw:
        compressed = raw.read(2) == GZIP
        raw.seek(0)
        if compressed:
            with gzip.GzipFile(fileobj=raw) as stream:
                yield stream
        else:
            yield raw


def _header(block: bytes, name: str) -> Any:
    nibabel = _import_nibabel(name)
    second = block[4:8] in (b"n+2\0", b"ni2\0")
    single = block[4:8] == b"n+2\0" or block[344:348] == b"n+1\0"
    kind = {
        (True, True): nibabel.nifti2.Nifti2Header,
        (True, False): nibabel.nifti2.Nifti2PairHeader,
        (False, True): nibabel.nifti1.Nifti1Header,
        (False, False): nibabel.nifti1.Nifti1PairHeader,
    }[second, single]
    try:
        header = kind(block[: kind.template_dtype.itemsize], check=False)
        header.check_fix(logger=_SILENT, error_level=40)
    except Exception:  # nibabel raises many kinds on damaged headers
        raise bad_source(name, "damaged NIfTI header") from None
    return header


def _layout(header: Any, name: str) -> tuple[tuple[int, ...], np.dtype, int]:
    """Return shape (x, y, z, ...), type and offset of the voxels, checked."""
    try:
        shape = tuple(int(n) for n in header.get_data_shape())
        dtype = header.get_data_dtype()
        offset = header.get_data_offset()
    except Exception:
        raise bad_source(name, "damaged NIfTI header") from None
    if len(shape) < 2:
        raise bad_source(name, f"NIfTI with {len(shape)} dimensions {shape}, expected a 2-D image or a 3-D volume")
    if any(n < 1 for n in shape):
        raise bad_source(name, f"image of size {shape}, expected at least one pixel")
    if offset < 0:
        raise bad_source(name, "damaged NIfTI header")
    if math.prod(shape[:3]) == 1 and len(shape) > 3:  # CIFTI and other tables of values
        raise bad_source(name, f"NIfTI that holds no plane or volume: {len(shape)} dimensions {shape}")
    _check_dtype(dtype, name)
    check_voxels(name, *shape[:3])
    return (*shape, 1)[: max(3, len(shape))], dtype, offset


def _check_dtype(dtype: np.dtype, name: str) -> None:
    if dtype.kind not in "uifb" and dtype.names not in (("R", "G", "B"), ("R", "G", "B", "A")):
        kind = "complex" if dtype.kind == "c" else str(dtype)
        raise bad_source(name, f"NIfTI with {kind} values, expected integers, floats or RGB")


def _voxels(source: bytes | Path, name: str, shape: tuple[int, ...], dtype: np.dtype, offset: int) -> np.ndarray:
    """Return the first volume (x, y, z) as stored: mapped, viewed, or inflated."""
    count = math.prod(shape) * dtype.itemsize
    if isinstance(source, bytes):
        size, head = len(source), source[:2]
    else:
        size = source.stat().st_size
        with source.open("rb") as stream:
            head = stream.read(2)
    if head == GZIP:
        flat = _inflated(source, name, size, count, offset)
        return np.ndarray(shape, dtype, flat, order="F")
    if size < offset + count:
        raise bad_source(name, f"truncated or damaged NIfTI file: {size} bytes, expected {offset + count}")
    if isinstance(source, bytes):
        return np.ndarray(shape, dtype, source, offset=offset, order="F")
    return np.memmap(source, dtype, "r", offset=offset, shape=shape, order="F")


def _inflated(source: bytes | Path, name: str, size: int, count: int, offset: int) -> np.ndarray:
    """Inflate `count` bytes after `offset`, and nothing that the header does not declare."""
    if offset + count > MAX_INFLATED_BYTES:
        raise bad_source(name, f"decompresses to {offset + count} bytes, expected at most {MAX_INFLATED_BYTES}")
    if offset + count > size * _MAX_DEFLATE_RATIO:
        raise bad_source(name, f"truncated or damaged gzip file: {size} bytes cannot hold {offset + count}")
    flat = np.empty(count, dtype=np.uint8)
    done = 0
    try:
        with _stream(source) as stream:
            stream.seek(offset)
            while done < count:
                got = stream.readinto(memoryview(flat)[done : done + _CHUNK])
                if not got:
                    break
                done += got
            stream.read(1)  # behind the last volume: gzip compares its checksum here
    except _DAMAGE:
        raise bad_source(name, "truncated or damaged gzip file") from None
    if done < count:
        raise bad_source(name, f"truncated or damaged NIfTI file: {done} bytes of voxels, expected {count}")
    return flat


def _with_header(array: np.ndarray, header: Any, name: str) -> _Volume:
    try:
        slope, inter = header.get_slope_inter()
        unit = header.get_xyzt_units()[0]
        sizes = tuple(float(size) for size in header.get_zooms()[:3])
    except Exception:
        raise bad_source(name, "damaged NIfTI header") from None
    slope, inter = (1.0, 0.0) if slope is None else (float(slope), float(inter or 0))
    return _Volume(array, _stated_affine(header), sizes, slope, inter, _MILLIMETRES.get(unit, 1.0))


def _stated_affine(header: Any) -> np.ndarray | None:
    """Return the affine of the sform, else of the qform; None where neither is set to something usable."""
    for code, getter in (("sform_code", header.get_sform), ("qform_code", header.get_qform)):
        if int(header[code]) > 0:
            with contextlib.suppress(Exception):  # nibabel's own kinds for damaged quaternions and sizes
                affine = np.asarray(getter(), dtype=np.float64)
                if np.isfinite(affine).all() and abs(np.linalg.det(affine[:3, :3])) > 1e-12:
                    return affine
    return None


# --------------------------------------------------------------------------------------------------------------------
# Images in memory


def _from_nibabel(image: Any, name: str) -> _Volume:
    data, header = image.dataobj, image.header
    slope, inter = 1.0, 0.0
    extra = (0,) * (len(image.shape) - 3)
    try:
        if extra:
            array = np.asanyarray(data[(..., *extra)])
        elif type(data).__name__ == "ArrayProxy":  # as stored: scaled it would be float64
            array, slope, inter = data.get_unscaled(), float(data.slope), float(data.inter)
        else:
            array = np.asanyarray(data)
    except Exception:  # the image reads its file here
        raise bad_source(name, "truncated or damaged file") from None
    affine = None if image.affine is None else np.asarray(image.affine, dtype=np.float64)
    if hasattr(header, "get_sform") and not (int(header["sform_code"]) or int(header["qform_code"])):
        affine = None
    unit = header.get_xyzt_units()[0] if hasattr(header, "get_xyzt_units") else "mm"
    volumes = math.prod(image.shape[3:])
    return _Volume(array, affine, None, slope, inter, _MILLIMETRES.get(unit, 1.0), volumes)


def _from_simpleitk(image: Any, name: str) -> _Volume | None:
    """Return the volume of a SimpleITK image, whose world axes are LPS; None for a plane, which states no side."""
    if image.GetNumberOfComponentsPerPixel() != 1 or image.GetDimension() not in (2, 3):
        raise bad_source(name, "expected a SimpleITK image of one component and two or three dimensions")
    if image.GetDimension() == 2:
        return None
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * np.array(image.GetSpacing())
    affine[:2] *= -1
    return _Volume(sys.modules["SimpleITK"].GetArrayFromImage(image).T, affine)


# --------------------------------------------------------------------------------------------------------------------
# Orientation and values


def _read_volume(volume: _Volume, name: str, percentiles: tuple[float, float] | None) -> ChestImage:
    view, spacing, remarks = _displayed(volume)
    if volume.volumes > 1:
        remarks.append(Remark("first_volume", f"{volume.volumes} volumes, the first was taken", "info"))
    if view.dtype.names:
        remarks.extend(colour_remarks(_gray(view[len(view) // 2])[1]))
    facts = {"percentiles": percentiles, "spacing": spacing, "remarks": tuple(remarks)}
    if len(view) == 1:
        return read_plane(name, _values(view[0], volume), **facts)
    lazy = LazyPixels(view.shape, lambda number: _values(view[number], volume).astype(np.float32, copy=False))
    return volume_of(name, lazy, **facts)


def _values(stored: np.ndarray, volume: _Volume) -> np.ndarray:
    """Return the values of one slice (H, W) as stored, in the machine's byte order and scaled."""
    if stored.dtype.names:
        return _gray(stored)[0]
    if stored.dtype.kind == "b":
        return stored.astype(np.float32)
    if (volume.slope, volume.inter) == (1.0, 0.0):
        return stored.astype(stored.dtype.newbyteorder("="))
    with np.errstate(over="ignore", invalid="ignore"):
        return stored.astype(np.float32) * np.float32(volume.slope) + np.float32(volume.inter)


def _gray(stored: np.ndarray) -> tuple[np.ndarray, float]:
    return gray_of_colour(np.stack([stored[channel] for channel in stored.dtype.names], axis=-1))


def _displayed(volume: _Volume) -> tuple[np.ndarray, tuple[float, float, float] | None, list[Remark]]:
    """Turn (x, y, z) to radiological display without copying it.

    Axial: slices from inferior up, rows from anterior down, columns from the patient's right. One plane across
    another axis is shown as it lies: coronal with superior up, sagittal with superior up and anterior at the left.

    Returns:
        The view (S, H, W); millimetres between slices, rows and columns; what to remark.
    """
    orientations = _import_nibabel("<volume>").orientations
    remarks = []
    affine, sizes = volume.affine, None
    orientation = None if affine is None else orientations.io_orientation(affine)
    if orientation is None or not np.isfinite(orientation).all():
        # nibabel's reading of a header without orientation: columns from the patient's right, rows from posterior.
        orientation = np.array([[0, -1], [1, 1], [2, 1]])
        message = "no orientation in the file: left and right, top and bottom may be exchanged"
        remarks.append(Remark("assumed", message, "warning"))
        if volume.sizes and set(volume.sizes) != {1.0}:
            sizes = np.array((*volume.sizes, 1.0, 1.0)[:3])
    else:
        sizes = np.sqrt((affine[:3, :3] ** 2).sum(axis=0))
        remarks.extend(_tilt(affine))
    ras = orientations.apply_orientation(volume.array, orientation)
    planar = [axis for axis in (0, 1) if ras.shape[axis] == 1 and min(ras.shape[1 - axis], ras.shape[2]) > 1]
    if planar == [1]:
        view, axes = ras[::-1, :, ::-1].transpose(1, 2, 0), (1, 2, 0)
    elif planar == [0]:
        view, axes = ras[:, ::-1, ::-1].transpose(0, 2, 1), (0, 2, 1)
    else:
        view, axes = ras[::-1, ::-1].transpose(2, 1, 0), (2, 1, 0)
        if orientation[2, 0] != 2 and len(view) > 1:
            plane = ("sagittal", "coronal")[int(orientation[2, 0])]
            remarks.append(Remark("oblique", f"stored as {plane} slices: axial ones were cut from them", "info"))
    if view.strides != volume.array.transpose(2, 1, 0).strides:
        remarks.append(Remark("reoriented", "turned to radiological display by the orientation in the file", "info"))
    spacing = None
    if sizes is not None:
        by_world = {int(world): float(size) for (world, _), size in zip(orientation, sizes, strict=True)}
        spacing = tuple(by_world[axis] * volume.millimetres for axis in axes)
        spacing = spacing if all(0 < each < math.inf for each in spacing) else None
    return view, spacing, remarks


def _tilt(affine: np.ndarray) -> list[Remark]:
    """Say by how much the stored axes lean from the body's."""
    degrees = float(np.degrees(_import_nibabel("<volume>").affines.obliquity(affine).max()))
    if degrees <= _TILT_DEGREES:
        return []
    message = f"slices are tilted by {degrees:.0f} degrees, and shown as they are"
    return [Remark("oblique", message, "info" if degrees < 30 else "warning", round(degrees, 1), _TILT_DEGREES)]


__all__ = ["GZIP", "is_half_pair", "is_nifti", "read_nifti", "read_spatial"]
