# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Rehearse data of very many studies: streams over all ranks, and what is held where all studies are at hand.

Streams: Parquet shards of unequal size whose rows are a number alone, read by `stream_for_rank`, one process a rank,
one after another: does every row come once over all ranks, how much memory does a rank take, how many rows a second
does it get. Rows of real studies are slower: see `data_streaming.py`. Also how fast a stream that goes on passes over
what was used.

Held: peak memory of the order of an epoch (`EpochBatches`, as `Trainer` reads it), and of a list of `Study` with a
report in two languages. Prints tables; `--output` writes JSON. Linux.
"""

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch

from m3fm.data import Study
from m3fm.data.streaming import stream_for_rank
from m3fm.evaluation.runs import NOTICE, library_versions, write_json
from m3fm.hub import training_tables
from m3fm.training.feed import StreamLoader
from m3fm.training.samplers import EpochBatches, EveryStudy, LengthBucketSampler, TrainerOrder

BATCH = 64
REPORTS = {
    "en": "The heart is normal in size. The lungs are clear. There is no pleural effusion or pneumothorax. ",
    "zh": "心影大小正常。双肺清晰。未见胸腔积液或气胸。",
}


class Numbers:
    """Collates rows to their numbers."""

    def set_epoch(self, epoch: int) -> None:
        """Is told the epoch."""

    def __call__(self, rows: list[dict[str, int]]) -> dict[str, list[int]]:
        """Returns the numbers."""
        return {"numbers": [row["number"] for row in rows]}


def write_shards(folder: Path, rows: int, shards: int) -> None:
    """Writes shards of unequal size: the last holds about three times as many rows as the first."""
    import pyarrow as pa
    import pyarrow.parquet

    folder.mkdir(parents=True)
    shares = np.linspace(1, 3, shards)
    ends = np.round(np.cumsum(shares) / shares.sum() * rows).astype(np.int64)
    for shard, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        table = pa.table({"number": np.arange(start, end)})
        pyarrow.parquet.write_table(table, folder / f"train-{shard:05}.parquet", row_group_size=10_000)


def resident_bytes(field: str) -> int:
    """Returns the peak (VmHWM) or present (VmRSS) resident memory of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def peak_of(run: Callable[[], Any]) -> tuple[Any, int, float]:
    """Returns what a function gives, the peak of memory over what was held before, and seconds."""
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak to what is held
    held, start = resident_bytes("VmRSS"), time.perf_counter()
    result = run()
    return result, resident_bytes("VmHWM") - held, time.perf_counter() - start


def stream_rank(folder: Path, rank: int, ranks: int) -> dict[str, Any]:
    """Reads what one rank gets, and passes over a tenth of it as a run that goes on does."""
    files = sorted(map(str, folder.glob("*.parquet")))
    rows = datasets.load_dataset(
        "parquet", data_files=files, split="train", streaming=True, cache_dir=str(folder / "cache")
    )
    loader = StreamLoader(lambda epoch: stream_for_rank(rows, rank, ranks, 0, epoch), BATCH, Numbers())

    def read() -> np.ndarray:
        return np.concatenate([batch["numbers"] for batch in loader]).astype(np.int64)

    numbers, peak, seconds = peak_of(read)
    np.save(folder / f"rank-{rank}.npy", numbers)
    batches = -(-len(numbers) // BATCH)
    loader.load_state_dict(loader.state_dict() | {"epoch": 0, "used": [batches // 10]})
    start = time.perf_counter()
    again = np.array(next(iter(loader))["numbers"])
    first = batches // 10 * BATCH
    return {
        "rows": len(numbers),
        # The benchmark itself keeps the numbers that came, and the pieces of them that it joins.
        "peak_bytes": peak - 2 * numbers.nbytes,
        "rows_per_s": len(numbers) / seconds,
        "passed_per_s": first / (time.perf_counter() - start),
        "goes_on": bool((again == numbers[first : first + len(again)]).all()),
    }


def hold_order(studies: int) -> int:
    """Goes through the order of an epoch."""
    return sum(1 for _ in TrainerOrder(EpochBatches(EveryStudy(studies), BATCH)))


def hold_lengths(studies: int) -> int:
    """Goes through the order of an epoch by length."""
    lengths = np.random.default_rng(0).integers(10, 200, studies)
    return sum(1 for _ in TrainerOrder(LengthBucketSampler(lengths, BATCH)))


def hold_studies(studies: int) -> list[Study]:
    """Makes studies as `load_studies` gives them."""
    return [
        Study(
            study_id=f"s{number}",
            source="made_up",
            modality="cxr",
            images=(Path(f"/data/made_up/files/p{number % 100}/{number}.jpg"),),
            patient_id=f"p{number}",
            reports={code: f"{number} {text * 3}" for code, text in REPORTS.items()},
            findings={"pleural_effusion": 0.0, "pneumothorax": 0.0},
            split="train",
        )
        for number in range(studies)
    ]


HELD = {
    "order, `EpochBatches`": hold_order,
    "order, `LengthBucketSampler`": hold_lengths,
    "list of `Study`": hold_studies,
}


def in_process(*arguments: str) -> Any:
    """Runs a part in a process of its own."""
    # Each block of memory goes back to the system when it is freed, so that the peak is that of what is in use.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, *arguments]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def measure_stream(folder: Path, rows: int, shards: int, ranks: int, at_once: int) -> dict[str, Any]:
    """Measures all ranks of a stream."""
    write_shards(folder, rows, shards)
    with ThreadPoolExecutor(at_once) as pool:
        found = list(pool.map(lambda rank: in_process("--stream", str(folder), str(rank), str(ranks)), range(ranks)))
    seen = np.concatenate([np.load(folder / f"rank-{rank}.npy") for rank in range(ranks)])
    return {
        "rows": rows,
        "shards": shards,
        "ranks": ranks,
        "once": len(seen) == rows and bool((np.bincount(seen, minlength=rows) == 1).all()),
        "goes_on": all(each["goes_on"] for each in found),
        "of_ranks": [each["rows"] for each in found],
        **{name: [each[name] for each in found] for name in ("peak_bytes", "rows_per_s", "passed_per_s")},
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000, 10_000_000])
    parser.add_argument("--shards", type=int, default=37)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--at-once", type=int, default=2, help="ranks that are read at the same time, each a thread")
    parser.add_argument("--held", type=int, nargs="+", default=[100_000, 1_000_000, 10_000_000])
    parser.add_argument("--scratch", type=Path, help="where shards are made; a folder for temporary files")
    parser.add_argument("--output", type=Path, default=Path("model_cards/results/stream_scaling.json"))
    parser.add_argument("--stream", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--hold", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    logging.getLogger("datasets").setLevel(logging.ERROR)
    if options.stream:
        folder, rank, ranks = options.stream
        print(json.dumps(stream_rank(Path(folder), int(rank), int(ranks))))
        return
    if options.hold:
        name, count = options.hold
        _, peak, seconds = peak_of(lambda: HELD[name](int(count)))
        print(json.dumps({"held": name, "studies": int(count), "peak_bytes": peak, "seconds": seconds}))
        return
    streams = []
    with tempfile.TemporaryDirectory(dir=options.scratch) as name:
        cases = [(rows, options.shards, options.ranks) for rows in options.rows]
        # Fewer shards than ranks: each reads everything.
        for rows, shards, ranks in [*cases, (min(options.rows), 3, options.ranks)]:
            streams.append(measure_stream(Path(name) / f"{rows}-{shards}", rows, shards, ranks, options.at_once))
            print(streams[-1], flush=True)
    # Studies are held up to a million: ten times as many would not leave room on a small machine.
    held = [
        in_process("--hold", name, str(count))
        for name in HELD
        for count in options.held
        if not (HELD[name] is hold_studies and count > 1_000_000)
    ]
    facts = {
        **{"notice": NOTICE, "what": "streams over all ranks, and what is held where all studies are at hand"},
        "streams": streams,
        "held": held,
        "machine": {"cpus": os.cpu_count(), "libraries": library_versions()},
    }
    for table in ("streams", "held"):
        print(training_tables.TABLES[f"stream_scaling#{table}"](facts), end="\n\n")
    write_json(options.output, facts)


if __name__ == "__main__":
    main()
