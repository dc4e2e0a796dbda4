# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Make the shipped splits again: `python -m m3fm.data.splits --data_root DIR`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from . import CARVED_FOLDERS, FAIR_SPLITS, fair_split, split_document


def main() -> None:
    """Write one list of study ids per carved set, and the fair splits."""
    parser = argparse.ArgumentParser(prog="python -m m3fm.data.splits", description=__doc__)
    parser.add_argument("--data_root", type=Path, required=True, help="folder that holds the data folders")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="where to write (default: here)")
    arguments = parser.parse_args()
    try:
        for name in CARVED_FOLDERS:
            text = split_document(arguments.data_root / name)
            (arguments.output / f"{name}.json").write_text(text, encoding="utf-8", newline="\n")
            document = json.loads(text)
            print(f"{name}: {len(document['validation'])} of {document['studies']} studies for validation")  # noqa: T201 (a command)
        for name in FAIR_SPLITS:
            split = fair_split(arguments.data_root / name)
            split.write(arguments.output / f"{name}-fair.json")
            print(f"{name}: {', '.join(f'{len(ids)} {part}' for part, ids in split.parts.items())}")  # noqa: T201
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
