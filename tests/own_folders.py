# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Own folders as a user would have them, made by the tests that read them."""

import csv
import json

from m3fm.data.opening import open_set

SECRET = "patient-4711"


def write_folder(root, rows, table="metadata.jsonl", name="mine", missing=()):
    """Write a folder with its images and its table; a row that is text is written as it is."""
    folder = root / name
    path = folder / table
    path.parent.mkdir(parents=True, exist_ok=True)
    for row in (row for row in rows if isinstance(row, dict)):
        for file in files_of(row):
            if file not in missing:
                (path.parent / file).parent.mkdir(parents=True, exist_ok=True)
                (path.parent / file).write_bytes(b"picture")
    if table.endswith(".jsonl"):
        lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    elif table.endswith(".csv"):
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
            writer.writeheader()
            writer.writerows(rows)
    return folder


def files_of(row):
    """Yield the images that a row names."""
    for name, value in row.items():
        if name in ("file_name", "file_names", "images") or name.endswith("_file_name"):
            yield from value if isinstance(value, list) else filter(None, str(value or "").split(";"))


def read(folder, **options):
    """Return the studies of a folder, and how they were read."""
    opened = open_set(folder, **options)
    return list(opened), opened.reading
