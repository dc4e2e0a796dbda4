# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Images as they are stored in a shard: the bytes of files, without the headers that name patients.

Shapes: S slices, H rows, W columns.
"""

from __future__ import annotations

import gzip
import io
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from ..chest_image_m3fm import ChestImage
from ..series_m3fm import read_study
from ..study_files_m3fm import kind_of, path_kind
from .schema import ImageFile, StudyRecord

__all__ = ["IMAGE_MODES", "ImageStore"]

#: "paths": where the files are; "bytes": what they hold.
IMAGE_MODES = ("paths", "bytes")
# Hounsfield units that 16 bits hold; what lies outside is a broken voxel.
_HU_RANGE = (-32768, 32767)
_FAST_GZIP = 1
# Pictures by their mode, and the mode in which they are resized; "F" are those of 16 bits.
_RESIZED_AS = {
    **{"1": "L", "L": "L", "LA": "LA", "P": "RGBA", "RGB": "RGB", "RGBA": "RGBA", "CMYK": "RGB"},
    **dict.fromkeys(("I;16", "I;16B", "I"), "F"),
}


@dataclass(frozen=True)
class ImageStore:
    """Turns the images of a record into what a shard holds.

    "bytes" stores files as they are, except DICOM, whose headers name patients: a radiograph becomes a PNG of 8 bits
    as it is displayed, and CT slices become one NIfTI volume in Hounsfield units; the processor gives the same
    pixels for either, within a grey level. Text burned into pixels stays.

    Args:
        mode: One of `IMAGE_MODES`.
        size: Shortest side in pixels to which larger radiographs and pictures of slices are reduced, as PNG; None
            keeps every size. Volumes and pictures of several pages are never reduced.

    Raises:
        ValueError: For an unknown mode, a size below 32, or a size where only paths are stored.
    """

    mode: str = "bytes"
    size: int | None = None

    def __post_init__(self) -> None:
        """Check the settings."""
        if self.mode not in IMAGE_MODES:
            raise ValueError(f"images must be one of {IMAGE_MODES}, got {self.mode!r}")
        if self.size is not None and (self.size < 32 or self.mode == "paths"):
            raise ValueError(
                f"size must be at least 32 pixels and goes with images='bytes', got {self.size} and {self.mode!r}"
            )

    def __call__(self, record: StudyRecord) -> StudyRecord:
        """Return the record with its images as they are stored.

        Raises:
            ValueError: If an image cannot be read, by its path.
            OSError: As `ValueError`.
            ImportError: For DICOM, without the packages that read it.
        """
        if self.mode == "paths":
            return replace(record, images=tuple(map(_absolute, record.images)))
        named = [each if each.path is not None else replace(each, path=Path("image")) for each in record.images]
        # By content: a file of any name, and bytes in a shard, may be DICOM.
        if named and all(_kind(each) == "dicom" for each in named):
            return replace(record, images=_from_dicom(named, self.size))
        return replace(record, images=tuple(map(self._stored, named)))

    def _stored(self, image: ImageFile) -> ImageFile:
        data = image.read()
        kind = kind_of(data)
        if kind is None:
            raise ValueError(f"{image.path}: no image that can be read")
        if kind == "dicom":
            # Beside files of other kinds, each is one image.
            return _encode(read_study([image.source])[0], image, self.size)
        if kind == "raster" and self.size is not None and (reduced := _reduced(data, self.size)) is not None:
            return ImageFile(Path(image.path.stem + ".png"), reduced, image.view)
        return ImageFile(Path(image.path.name), data, image.view)


def _absolute(image: ImageFile) -> ImageFile:
    if image.data is not None:
        raise ValueError("images='paths' needs images that are files, got some that lie in a shard")
    return replace(image, path=image.path.absolute())


def _kind(image: ImageFile) -> str | None:
    return path_kind(image.path) if image.data is None else kind_of(image.read())


def _from_dicom(files: list[ImageFile], size: int | None) -> tuple[ImageFile, ...]:
    """Return the views of a study, or the volume that its slices make, which has the name of the first."""
    images = read_study([each.source for each in files])
    return tuple(_encode(image, file, size) for image, file in zip(images, files, strict=False))


def _encode(image: ChestImage, named: ImageFile, size: int | None) -> ImageFile:
    stem = named.path.name.removesuffix(".dcm")
    if image.units == "hu" or len(image.pixels) > 1:
        return ImageFile(Path(f"{stem}.nii.gz"), _nifti(image), named.view)
    levels = np.round(np.asarray(image.pixels)[0] * 255).astype(np.uint8)  # (H, W)
    picture = Image.fromarray(levels)
    return ImageFile(Path(f"{stem}.png"), _png(_shrunk(picture, size) or picture), named.view or image.view)


def _nifti(image: ChestImage) -> bytes:
    import nibabel

    pixels = np.asarray(image.pixels)  # (S, H, W)
    if image.units == "hu":
        pixels = np.clip(np.round(pixels), *_HU_RANGE).astype(np.int16)
    slice_mm, row_mm, column_mm = image.spacing or (1.0, 1.0, 1.0)
    # Rows run to posterior, columns to the patient's left, slices to superior; NIfTI counts to right, anterior and
    # superior.
    affine = np.diag([-column_mm, -row_mm, slice_mm, 1.0])
    return gzip.compress(nibabel.Nifti1Image(pixels.transpose(2, 1, 0), affine).to_bytes(), _FAST_GZIP, mtime=0)


def _reduced(data: bytes, size: int) -> bytes | None:
    """Return a smaller picture as PNG; None for what is small enough, has several pages, or no known form.

    Raises:
        ValueError: If the picture cannot be decoded.
    """
    try:
        with Image.open(io.BytesIO(data)) as picture:
            if min(picture.size) <= size or getattr(picture, "n_frames", 1) > 1 or picture.mode not in _RESIZED_AS:
                return None
            turned = ImageOps.exif_transpose(picture)
            if _RESIZED_AS[picture.mode] != "F":
                return _png(_shrunk(turned.convert(_RESIZED_AS[picture.mode]), size))
            levels = np.asarray(turned).astype(np.float32)  # Pillow does not resize 16 bits
            smaller = np.asarray(_shrunk(Image.fromarray(levels), size))
            return _png(Image.fromarray(np.clip(np.round(smaller), 0, 65535).astype(np.uint16)))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"a picture that cannot be decoded ({type(error).__name__})") from None


def _shrunk(picture: Image.Image, size: int | None) -> Image.Image | None:
    if size is None or min(picture.size) <= size:
        return None
    scale = size / min(picture.size)
    shape = tuple(max(1, round(side * scale)) for side in picture.size)
    return picture.resize(shape, Image.Resampling.LANCZOS, reducing_gap=3.0)


def _png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=6)
    return file.getvalue()
