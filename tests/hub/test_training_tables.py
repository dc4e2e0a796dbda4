# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Tables of training benchmarks: cells that are computed, and several tables of one file."""

import json

from m3fm.hub.card import fill_tables
from m3fm.hub.training_tables import TABLES, size

HELD = [{"studies": 1000, "held": "order", "peak_bytes": 32_000}, {"studies": 10, "held": "list", "peak_bytes": 5e7}]
STREAM = {
    **{"rows": 100_000, "shards": 37, "ranks": 2, "once": True, "of_ranks": [49_000, 51_000]},
    **{"peak_bytes": [9e6, 12.3e6], "rows_per_s": [10_000, 20_000]},
}


def test_parts_of_one_file_are_tables_of_their_own(tmp_path):
    (tmp_path / "stream_scaling.json").write_text(json.dumps({"held": HELD, "streams": [STREAM]}), encoding="utf-8")
    marks = "".join(f"<!-- table: stream_scaling#{part} -->\n<!-- end -->\n" for part in ("held", "streams"))
    page = fill_tables(marks, tmp_path)
    assert "| 1,000 | order | 0.0 | 32 | 3.2 GB |" in page
    assert "| 100,000 | 37 | 2 | yes | 49,000 to 51,000 | 12 | 15,000 |" in page
    assert fill_tables(page, tmp_path) == page


def test_memory_is_told_beside_the_first():
    case = {"batch": 64, "micro_batch": 64, "micro_batches": 1, "before_bytes": 1e9, "peak_bytes": 4e9, "seconds": 9.6}
    large = case | {"batch": 2048, "micro_batch": 32, "micro_batches": 64, "peak_bytes": 3e9}
    assert TABLES["align_memory"]({"results": [case, large]}).splitlines()[2:] == [
        "| 64 | 1 of 64 | 4,000 | 3,000 | 10 | 1.00 |",
        "| 2,048 | 64 of 32 | 3,000 | 2,000 | 10 | 0.75 |",
    ]


def test_bytes_are_told_in_units():
    assert [size(count) for count in (12, 1234, 5.678e6, 1.2e9, 4e15)] == [
        *("12 B", "1.23 kB", "5.68 MB", "1.2 GB", "4,000 TB"),
    ]
