# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Open a data set, whatever its layout, as a stream of `StudyRecord` or as `datasets`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .schema import StudyRecord, features
from .sets import StudySet, find_set, get_set
from .tables import Reading

if TYPE_CHECKING:
    import datasets

__all__ = ["OpenSet", "open_set"]


def open_set(
    root: str | Path,
    name: str | None = None,
    split: str | None = None,
    on_bad: str = "raise",
    images: str = "required",
) -> OpenSet:
    """Open a data set: one of the field in its published layout, or an own folder.

    ```python
    mimic = open_set("/data/mimic-cxr-jpg")  # recognised by its files
    for record in mimic:  # streams; images are read when they are needed
        ...
    mimic.dataset()  # datasets.Dataset, or .stream() for datasets.IterableDataset
    ```

    Args:
        root: The folder.
        name: The set, one of `set_names()`; None: told by its files.
        split: Only the studies of this part.
        on_bad: "raise": the first bad row ends the reading; "skip": it is counted in `OpenSet.reading` and left out.
        images: "required": a row without its image file is bad; "unchecked": nobody looks.

    Raises:
        ValueError: For a missing folder, one that is no known set, or an unknown name or option.
    """
    folder = Path(root)
    found = find_set(folder) if name is None else get_set(name)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    return OpenSet(folder, found, split, Reading(on_bad, images))


class OpenSet:
    """Serve the studies of a data set, anew each time it is iterated over.

    Attributes:
        root: Its folder.
        set: What it is.
        split: The part that is read; None: all.
        reading: How it is read, and the bad rows of the latest iteration.
    """

    def __init__(self, root: Path, set: StudySet, split: str | None, reading: Reading):
        self.root = root
        self.set = set
        self.split = split
        self.reading = reading

    def __iter__(self) -> Iterator[StudyRecord]:
        self.reading = Reading(self.reading.on_bad, self.reading.images)
        for record in self.set.read(self.root, self.reading):
            if self.split is None or record.split == self.split:
                yield record

    def dataset(self) -> datasets.Dataset:
        """Return all studies as a `datasets.Dataset`, in memory; images that are files stay paths.

        Raises:
            ImportError: If `datasets` is not installed.
            ValueError: Without a study.
        """
        schema = features()
        import datasets

        columns: dict[str, list[Any]] = {name: [] for name in schema}
        for record in self:
            for name, value in record.as_row().items():
                columns[name].append(value)
        if not columns["study_id"]:
            raise ValueError(f"{self.root}: no study to be read; {self.reading.summary() or 'the tables are empty'}")
        return datasets.Dataset.from_dict(columns, features=schema)

    def stream(self) -> datasets.IterableDataset:
        """Return the studies as a `datasets.IterableDataset`, read from the tables as it is iterated over.

        Raises:
            ImportError: If `datasets` is not installed.
        """
        schema = features()
        import datasets

        return datasets.IterableDataset.from_generator(self._rows, features=schema)

    def _rows(self) -> Iterator[dict[str, Any]]:
        for record in self:
            yield record.as_row()
