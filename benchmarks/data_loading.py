# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Measure how fast studies become batches, from a folder and from Parquet shards, beside plain `datasets` code.

The peer is what the documentation of `datasets` and `transformers` shows: `Image()` columns and `AutoImageProcessor`
with the settings of DINOv2. Both take the same files in the same run, in turn. Larger sizes are NIH sample images,
enlarged, with the grain of a detector. Also the share of padding in batches of reports, in random order and by length.
Prints a markdown table; `--output` writes JSON.
"""

import argparse
import json
import logging
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from PIL import Image
from torch.utils.data import DataLoader
from transformers import AutoImageProcessor, AutoTokenizer

from m3fm import DEFAULT_CHECKPOINT, M3FMImageProcessor
from m3fm.data import FINDINGS, load_studies
from m3fm.data.convert import convert_set
from m3fm.data.opening import open_set
from m3fm.data.schema import LANGUAGES
from m3fm.data.streaming import stream_for_rank
from m3fm.evaluation.runs import NOTICE, library_versions, write_json
from m3fm.evaluation.tables import markdown_table
from m3fm.training.augmentation import Augmentation
from m3fm.training.collators import FindingLabels, StudyCollator
from m3fm.training.feed import ResumableLoader, StreamLoader
from m3fm.training.samplers import EpochBatches, EveryStudy, LengthBucketSampler, count_tokens, padding_share
from m3fm.training.study_images import StudyPixels

SOURCE = "nih_chestxray14_sample"
REPORT_SETS = ("openi_iu_reports", "ctrate_reports_text", "cov_ctr")
# What a shard holds at most: several shards, so that workers can part them.
SHARDS = 8
# facebook/dinov2-small.
PEER_SETTINGS = {
    "image_processor_type": "BitImageProcessor",
    "crop_size": {"height": 224, "width": 224},
    "size": {"shortest_edge": 256},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "resample": 3,
    "rescale_factor": 1 / 255,
}


def write_folder(source: Path, folder: Path, count: int, size: int) -> Path:
    """Makes a set of `count` images with the labels of the sample; at 256 its own files, else enlarged ones as PNG."""
    (folder / "images").mkdir(parents=True)
    with open(source / "metadata.jsonl", encoding="utf-8") as file:
        rows = [json.loads(line) for _, line in zip(range(count), file, strict=False)]
    for number, row in enumerate(rows):
        if size == 256:
            shutil.copy(source / row["file_name"], folder / row["file_name"])
            continue
        image = Image.open(source / row["file_name"]).convert("L").resize((size, size), Image.Resampling.BICUBIC)
        grain = np.random.default_rng(number).normal(0, 2.5, (size, size))
        pixels = np.clip(np.asarray(image, np.float32) + grain, 0, 255).astype(np.uint8)
        row["file_name"] = str(Path(row["file_name"]).with_suffix(".png"))
        Image.fromarray(pixels).save(folder / row["file_name"])
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metadata.jsonl").write_text(lines, encoding="utf-8")
    return folder


def make_collator(augmentation: Augmentation | None = None) -> StudyCollator:
    """Returns our collator: images and the labels of all findings."""
    return StudyCollator(StudyPixels(M3FMImageProcessor(), augmentation=augmentation), FindingLabels(FINDINGS))


class PeerCollator:
    """Collates rows with a decoded image, or several, as the documentation of transformers does."""

    def __init__(self, processor: Any, column: str):
        self.processor = processor
        self.column = column

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Prepares the images of a batch."""
        images = [row[self.column] for row in rows]
        images = [(each[0] if isinstance(each, list) else each).convert("RGB") for each in images]
        return dict(self.processor(images, return_tensors="pt"))


Loader = Callable[[], Iterable[Any]]


def folder_loaders(folder: Path, processor: Any, batch: int, workers: int) -> dict[str, Loader]:
    """Returns ways to one epoch over a folder, each in the order of its files or in an order of its own."""
    rows = open_set(folder).dataset()
    pictures = datasets.Dataset.from_dict({"image": sorted(map(str, (folder / "images").iterdir()))})
    pictures = pictures.cast_column("image", datasets.Image())
    order = EpochBatches(EveryStudy(len(rows)), batch)
    ours = ResumableLoader(rows, order, make_collator(), workers)
    moved = ResumableLoader(rows, EpochBatches(EveryStudy(len(rows)), batch), make_collator(Augmentation()), workers)
    peer = DataLoader(
        pictures,
        batch_size=batch,
        shuffle=True,
        collate_fn=PeerCollator(processor, "image"),
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    return {"ours": lambda: ours, "ours, augmented": lambda: moved, "peer": lambda: peer}


def shard_loaders(folder: Path, processor: Any, batch: int, workers: int) -> dict[str, Loader]:
    """Returns ways to one epoch over Parquet shards, streamed."""
    files = sorted(map(str, (folder / "data").glob("*.parquet")))
    stream = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
    pictures = stream.cast_column("images", datasets.List(datasets.Image())).select_columns(["images"])
    ours = StreamLoader(
        lambda epoch: stream_for_rank(stream, 0, 1, 0, epoch, buffer=64), batch, make_collator(), workers
    )
    # As ours: from ten shards at once it would spend five seconds of an epoch on ending threads.
    shuffled = pictures.shuffle(seed=0, buffer_size=64, max_buffer_input_shards=1)
    collator = PeerCollator(processor, "images")
    peer = DataLoader(shuffled, batch_size=batch, collate_fn=collator, num_workers=workers)
    return {"ours": lambda: ours, "peer": lambda: peer}


def samples_per_second(ways: dict[str, Loader], count: int, repeats: int) -> dict[str, float]:
    """Runs an epoch of each way unmeasured, then all in turn; returns the medians."""
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        for name, load in ways.items():
            start = time.perf_counter()
            loaded = sum(len(batch["pixel_values"]) for batch in load())
            seconds = time.perf_counter() - start
            if loaded < count:
                raise RuntimeError(f"{name}: {loaded} of {count} samples")
            if repeat:
                rates[name].append(loaded / seconds)
    return {name: round(statistics.median(each), 1) for name, each in rates.items()}


def convert(folder: Path, output: Path) -> Path:
    """Writes the shards of a folder."""
    size = sum(path.stat().st_size for path in (folder / "images").iterdir())
    convert_set(open_set(folder), output, shard_bytes=size // SHARDS + 1)
    return output


def measure(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Measures all sizes, forms and numbers of workers."""
    (folder / "processor").mkdir()
    write_json(folder / "processor" / "preprocessor_config.json", PEER_SETTINGS)
    processor = AutoImageProcessor.from_pretrained(folder / "processor")
    results = []
    for size in options.sizes:
        images = write_folder(options.data / SOURCE, folder / f"{SOURCE}_{size}", options.images, size)
        forms = {"folder": (folder_loaders, images)}
        if options.forms == "all":
            forms["shards"] = (shard_loaders, convert(images, folder / f"shards_{size}"))
        for form, (make, place) in forms.items():
            for workers in options.workers:
                ways = make(place, processor, options.batch, workers)
                rates = samples_per_second(ways, options.images, options.repeats)
                ratio = round(rates["ours"] / rates["peer"], 2)
                results.append({"form": form, "size": size, "workers": workers, **rates, "ours / peer": ratio})
                print(results[-1], flush=True)
    return results


def measure_padding(data: Path, batch: int) -> list[dict[str, Any]]:
    """Returns the share of padding in batches of reports, at random and by length, for each set and language."""
    tokenizer = AutoTokenizer.from_pretrained(DEFAULT_CHECKPOINT)
    results = []
    for source in REPORT_SETS:
        studies = load_studies(data / source)
        for language in LANGUAGES:
            texts = [study.reports[language] for study in studies if language in study.reports]
            if not texts:
                continue
            lengths = count_tokens(texts, tokenizer)
            shares = {
                "random order": padding_share(lengths, EpochBatches(EveryStudy(len(texts)), batch).all_batches(0)),
                "by length": padding_share(lengths, LengthBucketSampler(lengths, batch).all_batches(0)),
            }
            rounded = {name: round(share, 3) for name, share in shares.items()}
            results.append({"set": source, "language": language, "reports": len(texts), **rounded})
            print(results[-1], flush=True)
    return results


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 1024, 2048])
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2, 4])
    parser.add_argument("--forms", choices=["all", "folder"], default="all")
    parser.add_argument("--scratch", type=Path, help="where images and shards are made; a folder for temporary files")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    logging.getLogger("datasets").setLevel(logging.ERROR)
    load = os.getloadavg()[0]
    padding = measure_padding(options.data, options.batch)
    with tempfile.TemporaryDirectory(dir=options.scratch) as name:
        results = measure(options, Path(name))
    columns = ["form", "size", "workers", "ours", "peer", "ours / peer", "ours, augmented"]
    table = markdown_table([columns, *([str(row.get(column, "")) for column in columns] for row in results)])
    print(table)
    if options.output:
        facts = {name: getattr(options, name) for name in ("images", "batch", "repeats")}
        machine = {"cpus": os.cpu_count(), "load_at_start": round(load, 2), "libraries": library_versions()}
        what = "samples/s from disk to batch, median of the repeats after one unmeasured epoch"
        write_json(
            options.output,
            {
                **{"notice": NOTICE, "what": what, "table": table},
                **{**facts, "machine": machine, "results": results, "padding": padding},
            },
        )


if __name__ == "__main__":
    main()
