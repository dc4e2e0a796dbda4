# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Folders named by findings, with images and no table: `cxr/train/Pneumonia/*.png`, in any order of the folders."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from ..schema import MODALITIES
from ..tables import BadRow, Reading, Row
from .folder_labels import finding_of

__all__ = ["find_class_folders", "read_class_folders"]

_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".dcm", ".dicom", ".nii", ".nii.gz")
_VOLUMES = (".nii", ".nii.gz")


def find_class_folders(root: Path, splits: dict[str, str]) -> list[PurePosixPath]:
    """Return the folders that may be classes, relative to `root`; none where none is called by a finding.

    Args:
        root: Holds them, or folders of splits or modalities with them.
        splits: What the folders of splits are called, in lower case.
    """
    found = list(_inner_folders(Path(root), PurePosixPath(), {*splits, *MODALITIES}))
    return found if any(finding_of(folder.name) for folder in found) else []


def _inner_folders(root: Path, folder: PurePosixPath, outer: set[str]) -> Iterator[PurePosixPath]:
    with os.scandir(root / folder) as entries:
        names = sorted(entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir())
    for name in names:
        # Each kind of outer folder comes once on a path.
        if name.lower() in outer and name not in folder.parts:
            yield from _inner_folders(root, folder / name, outer)
        else:
            yield folder / name


def read_class_folders(root: Path, splits: dict[str, str], reading: Reading) -> Iterator[Row]:
    """Yield a row an image, in the order of the paths.

    Raises:
        BadRow: If it is not said whether images are radiographs or CT.
    """
    for folder in find_class_folders(root, splits):
        files = sorted(_images_below(root / folder))
        if not files:
            continue
        if finding_of(folder.name) is None:
            message = "holds images, but its name is no finding; expected one of m3fm.data.FINDINGS, or a table"
            reading.tell(BadRow("bad_label", root / folder, None, message))
            continue
        outer = [name.lower() for name in (Path(os.path.abspath(root)).name, *folder.parts[:-1])]
        stated = next((name for name in outer if name in MODALITIES), None)
        split = next((splits[name] for name in outer[1:] if name in splits), None)
        for number, file in enumerate(files, start=1):
            modality = stated or ("ct" if file.name.lower().endswith(_VOLUMES) else None)
            if modality is None:
                raise BadRow(
                    "wrong_column",
                    root,
                    None,
                    "folders named by findings do not say whether their images are radiographs or CT: put them into a "
                    f"folder named {' or '.join(MODALITIES)}, or add metadata.csv with file_name, modality and labels",
                )
            name = file.relative_to(root).as_posix()
            values = {"file_name": name, "modality": modality, "labels": [folder.name], "split": split}
            yield Row(root / folder, number, values)


def _images_below(folder: Path) -> Iterator[Path]:
    for parent, _, names in os.walk(folder):
        yield from (Path(parent, name) for name in names if name.lower().endswith(_SUFFIXES) and name[0] != ".")
