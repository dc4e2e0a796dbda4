# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Puts measured tables into Markdown, so that what README and model card print is what was measured.

A page marks the place of a table with `<!-- table: NAME -->` and `<!-- end -->`; the table is rendered from
`NAME.json`: a `metrics.json` of `m3fm evaluate`, the `training.json` of a run, a file that brings its own `table`, or
one that `training_tables` knows, which may give several, `<!-- table: NAME#PART -->`.
"""

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path

from ..evaluation.tables import render_table
from .training_card import is_training, training_table
from .training_tables import TABLES

_PLACE = re.compile(r"(<!-- table: ([\w/-]+)(#\w+)? -->\n).*?(<!-- end -->)", flags=re.DOTALL)


def fill_tables(page: str, results: Path) -> str:
    """Returns a Markdown page with every marked table rendered anew.

    Args:
        page: Markdown with marked places.
        results: Folder of measured JSON files, or of a run.

    Raises:
        ValueError: If a table is asked for that was not measured.
    """

    def render(match: re.Match[str]) -> str:
        path = results / f"{match[2]}.json"
        if not path.is_file():
            measured = ", ".join(sorted(file.stem for file in results.glob("*.json")))
            raise ValueError(f"No results {match[2]!r} in {results}: expected one of {measured}.")
        metrics = json.loads(path.read_text(encoding="utf-8"))
        table = TABLES.get(path.stem + (match[3] or ""))
        if table is None and is_training(metrics):
            table = training_table
        rendered = table(metrics) if table else metrics.get("table") or render_table(metrics)
        return f"{match[1]}{rendered}\n{match[4]}"

    return _PLACE.sub(render, page)


def main(argv: Sequence[str] | None = None) -> None:
    """Fills the tables of pages in place: `python -m m3fm.hub.card RESULTS PAGE [PAGE ...]`."""
    parser = argparse.ArgumentParser(description="Put measured tables into Markdown pages.")
    parser.add_argument("results", type=Path, help="folder of measured JSON files")
    parser.add_argument("pages", type=Path, nargs="+", help="Markdown pages, changed in place")
    args = parser.parse_args(argv)
    for page in args.pages:
        page.write_text(fill_tables(page.read_text(encoding="utf-8"), args.results), encoding="utf-8")


if __name__ == "__main__":
    main()
