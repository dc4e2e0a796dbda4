# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Measure the memory that streaming a large set takes, after 1,000, 10,000 and 100,000 studies.

The set is made up: a table in CheXpert's layout, and Parquet shards with a small image a study. Each way of streaming
runs in a process of its own. Prints a markdown table; `--output` writes JSON. Needs about 400 MB in the folder for
temporary files.
"""

import argparse
import csv
import gc
import io
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image

from m3fm import M3FMImageProcessor
from m3fm.data import FINDINGS
from m3fm.data.opening import open_set
from m3fm.data.schema import ImageFile, LabelState, ReportText, StudyRecord, features
from m3fm.data.sets.chexpert_labels import CHEXPERT_LABELS
from m3fm.data.streaming import stream_for_rank
from m3fm.evaluation.runs import NOTICE, library_versions, write_json
from m3fm.evaluation.tables import markdown_table
from m3fm.training.collators import FindingLabels, StudyCollator
from m3fm.training.feed import StreamLoader
from m3fm.training.study_images import StudyPixels

MARKS = (1_000, 10_000, 100_000)
SHARDS = 20
GROUP_ROWS = 100


def write_table(folder: Path, rows: int) -> None:
    """Writes a table in CheXpert's layout, one study a row; there are no images."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    with open(folder / "train.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *CHEXPERT_LABELS])
        for number in range(rows):
            path = f"CheXpert-v1.0-small/train/patient{number:06}/study1/view1_frontal.jpg"
            values = rng.choice(["", "1.0", "0.0", "-1.0"], len(CHEXPERT_LABELS))
            writer.writerow([path, "Female", 50, "Frontal", "AP", *values])


def write_shards(folder: Path, rows: int) -> None:
    """Writes Parquet shards: a report, labels and an image of 64 x 64 a study."""
    import pyarrow as pa
    import pyarrow.parquet

    (folder / "data").mkdir(parents=True)
    rng = np.random.default_rng(0)
    schema = features().arrow_schema
    states = list(LabelState)
    size = -(-rows // SHARDS)
    for shard in range(SHARDS):
        with pyarrow.parquet.ParquetWriter(folder / "data" / f"train-{shard:05}.parquet", schema) as writer:
            numbers = range(shard * size, min((shard + 1) * size, rows))
            for start in range(0, len(numbers), GROUP_ROWS):
                made = [_made_up(number, rng, states) for number in numbers[start : start + GROUP_ROWS]]
                encoded = features().encode_batch({name: [row[name] for row in made] for name in schema.names})
                writer.write_table(pa.Table.from_pydict(encoded, schema=schema))


def _made_up(number: int, rng: np.random.Generator, states: list[LabelState]) -> dict[str, Any]:
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (64, 64), dtype=np.uint8)).save(file, "JPEG", quality=50)
    findings = {name: states[int(state)] for name, state in zip(FINDINGS, rng.integers(0, 4, 14), strict=False)}
    return StudyRecord(
        study_id=f"s{number}",
        source="made_up",
        modality="cxr",
        patient_id=f"p{number}",
        images=(ImageFile(Path(f"{number}.jpg"), file.getvalue(), "PA"),),
        reports={"en": ReportText("The heart is normal in size. The lungs are clear. " * int(rng.integers(1, 5)))},
        findings=findings,
        split="train",
    ).as_row()


# --------------------------------------------------------------------------------------------------------------------
# Ways of streaming; each yields how many studies came at once.


def stream_table(folder: Path) -> Iterator[int]:
    """Reads records of the table."""
    for _ in open_set(folder / "table", images="unchecked"):
        yield 1


def stream_records(folder: Path) -> Iterator[int]:
    """Reads records of the shards, images included."""
    for _ in open_set(folder / "shards"):
        yield 1


def _rows(folder: Path) -> datasets.IterableDataset:
    files = sorted(map(str, (folder / "shards" / "data").glob("*.parquet")))
    return datasets.load_dataset(
        "parquet", data_files=files, split="train", streaming=True, cache_dir=str(folder / "cache")
    )


def stream_rows(folder: Path) -> Iterator[int]:
    """Reads rows of the shards, shuffled, as one rank of one."""
    for _ in stream_for_rank(_rows(folder), 0, 1, seed=0, epoch=0):
        yield 1


def stream_batches(folder: Path) -> Iterator[int]:
    """Reads batches of images and labels."""
    images = StudyPixels(M3FMImageProcessor(size=56))
    collator = StudyCollator(images, FindingLabels(FINDINGS))
    for batch in StreamLoader(lambda epoch: stream_for_rank(_rows(folder), 0, 1, 0, epoch), 20, collator):
        yield len(batch["labels"])


WAYS = {
    "CheXpert's table, records": stream_table,
    "shards, records": stream_records,
    "shards, shuffled rows": stream_rows,
    "shards, batches": stream_batches,
}


def resident_mb(field: str) -> float:
    """Returns the peak (VmHWM) or present (VmRSS) resident memory of this process in MB (Linux)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def measure(ways: Iterable[int], marks: list[int]) -> dict[str, Any]:
    """Goes through a stream, and notes the peak memory at the marks."""
    gc.collect()
    facts: dict[str, Any] = {"mb_before": round(resident_mb("VmRSS")), "mb_peak": {}}
    left, seen = list(marks), 0
    start = time.perf_counter()
    for count in ways:
        seen += count
        while left and seen >= left[0]:
            facts["mb_peak"][str(left.pop(0))] = round(resident_mb("VmHWM"))
    if left:
        raise RuntimeError(f"{seen} studies, expected {left[-1]}")
    return facts | {"studies": seen, "studies_per_s": round(seen / (time.perf_counter() - start))}


def main() -> None:
    """Measure every way in a process of its own, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=MARKS[-1])
    parser.add_argument("--scratch", type=Path, help="where the set is made; a folder for temporary files")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--way", choices=list(WAYS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    logging.getLogger("datasets").setLevel(logging.ERROR)
    marks = [mark for mark in MARKS if mark <= options.rows]
    if options.way:
        print(json.dumps(measure(WAYS[options.way](options.scratch), marks)))
        return
    with tempfile.TemporaryDirectory(dir=options.scratch) as name:
        write_table(Path(name) / "table", options.rows)
        write_shards(Path(name) / "shards", options.rows)
        results = {}
        for way in WAYS:
            command = [sys.executable, __file__, "--way", way, "--scratch", name, "--rows", str(options.rows)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            results[way] = json.loads(output.splitlines()[-1])
    head = ["stream", "MB before", *(f"peak MB at {mark:,}" for mark in marks), "studies/s"]
    lines = [
        [way, str(each["mb_before"]), *(str(each["mb_peak"][str(mark)]) for mark in marks), str(each["studies_per_s"])]
        for way, each in results.items()
    ]
    table = markdown_table([head, *lines])
    print(table)
    if options.output:
        machine = {"cpus": os.cpu_count(), "libraries": library_versions()}
        what = "resident memory of the process, in MB; one image of 64 x 64 a study"
        write_json(
            options.output, {"notice": NOTICE, "what": what, "table": table, "machine": machine, "results": results}
        )


if __name__ == "__main__":
    main()
