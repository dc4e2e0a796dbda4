# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""The data sets of the field, each read from the layout in which it is published.

A module of this package has one `StudySet`, or one for each set of a family. `find_set` tells which of them a folder
is; `m3fm.data.open_set` reads it.
"""

from __future__ import annotations

import importlib
from functools import cache
from pathlib import Path

from .study_set import StudySet

__all__ = ["StudySet", "find_set", "get_set", "set_names"]

# In the order in which a folder is tried: what has the most telling files first, what takes any folder last.
_MODULES = (
    "parquet",
    "mimic_cxr",
    "chexpert",
    "ct_rate",
    "vindr",
    "nih_chestxray14",
    "rsna",
    "siim",
    "iu_xray",
    "cov_ctr",
    "covid_ct",
    "covid19_ct_cxr",
    "covid_chestxray",
    "nlm_tb",
    "folder",
)


_OWN_TABLES = ("metadata.jsonl", "data.jsonl")


@cache
def _sets() -> dict[str, StudySet]:
    modules = [importlib.import_module(f"{__name__}.{name}") for name in _MODULES]
    return {each.name: each for module in modules for each in module.SETS}


def set_names() -> tuple[str, ...]:
    """Return the names of the sets that can be read."""
    return tuple(_sets())


def get_set(name: str) -> StudySet:
    """Return a set by its name.

    Raises:
        ValueError: For a name that is not known.
    """
    try:
        return _sets()[name]
    except KeyError:
        raise ValueError(f"unknown data set {name!r}; expected one of {', '.join(_sets())}") from None


def find_set(root: Path) -> StudySet:
    """Tell which set lies in a folder, by the files it is published with.

    A folder with `metadata.jsonl` or `data.jsonl`, in which no set is published, is an own folder, whatever else is in
    it.

    Raises:
        ValueError: If the folder is missing, or is none of them.
    """
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder")
    if any((root / name).is_file() for name in _OWN_TABLES):
        return get_set("folder")
    for each in _sets().values():
        if each.recognises(root):
            return each
    raise ValueError(
        f"{root}: none of the sets that can be read ({', '.join(_sets())}); an own folder has metadata.jsonl, "
        "data.jsonl, metadata.csv or metadata.parquet"
    )
