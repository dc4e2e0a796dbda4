# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""What a data set is to m3fm: how it is recognised, how it is read, and under what terms it may be used."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..schema import StudyRecord
from ..tables import Reading

__all__ = ["UNASSIGNED", "StudySet"]

#: The part of a study that the official lists of its set leave out. It is no part for training, unlike None, which is
#: that of sets without lists.
UNASSIGNED = "unassigned"


@dataclass(frozen=True)
class StudySet:
    """Describe one published data set.

    Attributes:
        name: What `open_set` and the command line call it; the `source` of its records.
        title: As its publishers call it.
        licence: Terms of use, in short.
        url: Where it is published.
        reference: What to cite.
        layout: The files that are read, relative to its folder; for documentation and error messages.
        recognises: Tells whether a folder holds it, by a few names of files, without reading tables.
        read: Yields the studies of a folder in a fixed order, streaming. Rows that cannot be used go to the `Reading`.
        published: Counts that its publishers state, for checking a copy: of "images", "studies", "patients" or "boxes"
            in all parts, or of one part, as "train_images": what `m3fm data inspect` counts too.
    """

    name: str
    title: str
    licence: str
    url: str
    reference: str
    layout: tuple[str, ...]
    recognises: Callable[[Path], bool] = field(repr=False)
    read: Callable[[Path, Reading], Iterator[StudyRecord]] = field(repr=False)
    published: Mapping[str, int] = field(default_factory=dict)
