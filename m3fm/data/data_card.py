# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""The card of a converted data set: what `load_dataset` needs, and what its users should know."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from .sets import StudySet

__all__ = ["data_card"]

_HOW = """\
```python
from datasets import load_dataset

studies = load_dataset("PATH", split="{part}", streaming=True)  # rows of m3fm.data.features()
```

```python
from m3fm.data import open_set

for record in open_set("PATH"):  # StudyRecord
    ...
```"""


def data_card(study_set: StudySet, manifest: Mapping[str, Any]) -> str:
    """Return the README of a conversion.

    Args:
        study_set: What was converted.
        manifest: What `convert_set` returns.
    """
    parts = manifest["studies"]
    head = {
        "license": "other",
        "license_name": study_set.licence,
        "language": sorted(manifest["languages"]),
        "tags": ["medical", "radiology", "chest", *sorted(manifest["modalities"])],
        "configs": [
            {
                "config_name": "default",
                "data_files": [{"split": part, "path": f"data/{part}-*.parquet"} for part in parts],
            }
        ],
    }
    settings = manifest["settings"]
    rows = "\n".join(f"| {part} | {count:,} |" for part, count in parts.items())
    stored = "the bytes of image files; DICOM without its headers" if settings["images"] == "bytes" else "paths"
    if settings["size"]:
        stored += f"; pictures with a shortest side of at most {settings['size']} pixels"
    sections = [
        f"# {study_set.title}",
        "Converted by `m3fm data convert`. For research only; this is no medical device.",
        f"| part | studies |\n|---|---|\n{rows}",
        _HOW.format(part=next(iter(parts))),
        f"- Images: {stored}.",
        f"- Ids: {'pseudonyms' if settings['pseudonyms'] else 'as the set has them'}.",
        f"- Terms: {study_set.licence}; the column `licence` says it for each study. They bind whoever passes it on.",
    ]
    if study_set.url:
        sections.append(f"- Source: {study_set.url}")
    if study_set.reference:
        sections.append(f"- Please cite: {study_set.reference}")
    if manifest["bad_rows"]:
        told = "; ".join(f"{count} x {kind}" for kind, count in manifest["bad_rows"].items())
        sections.append(f"- Rows of the source that could not be used: {told}.")
    text = "\n\n".join(sections[:4]) + "\n\n" + "\n".join(sections[4:])
    return f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---\n\n{text}\n"
