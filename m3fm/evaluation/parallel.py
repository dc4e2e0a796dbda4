# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Evaluate how well a sentence finds its translation in the shared space: `m3fm evaluate --task parallel`."""

import json
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

from ..data import load_parallel
from ..data.studies import source_name
from .reporter import CheckpointReporter, Reporter, embed_in_batches, hash_checkpoint
from .retrieval import retrieval_recall, same_text
from .runs import FORMAT, METRICS_FILE, NOTICE, command_line, hash_text, library_versions, write_json
from .tables import render_table

RECALL_AT = (1, 10)


def evaluate_parallel(
    model_dir: str | Path,
    data_folder: str | Path,
    output_dir: str | Path = "evaluation",
    split: str | None = None,
    batch_size: int = 32,
    device: str = "cpu",
) -> dict[str, Any]:
    """Measures sentence retrieval between languages on the parallel texts of a folder, and prints the table.

    Args:
        model_dir: A checkpoint folder.
        data_folder: Holds parallel texts (see `load_parallel`).
        output_dir: Gets `metrics.json`; made if missing.
        split: The part to evaluate; "all" takes every pair; None: "validation".
        batch_size: Texts at once.
        device: A torch device.

    Returns:
        `retrieval`, with the versions and fingerprints it was measured with.

    Raises:
        ValueError: If there are no pairs in that part.
    """
    part = split or "validation"
    pairs = [pair for pair in load_parallel(Path(data_folder)) if part in ("all", pair.split)]
    if not pairs:
        raise ValueError(f"{data_folder} has no parallel texts in the part {part!r}.")
    # A study's images may share one text: the pair counts once.
    texts = sorted({tuple(sorted(pair.texts.items())) for pair in pairs})
    reporter = CheckpointReporter(model_dir, device)
    columns = {language: [dict(row)[language] for row in texts] for language, _ in texts[0]}
    options = {"data": data_folder, "split": part, "output": output_dir, "batch_size": batch_size, "device": device}
    metrics = {
        "format": FORMAT,
        "task": "parallel",
        "model": Path(model_dir).resolve().name,
        "model_sha256": hash_checkpoint(model_dir),
        "data": source_name(data_folder),
        "data_sha256": hash_text(json.dumps(texts, ensure_ascii=False)),
        "split": part,
        "device": str(device),
        "versions": library_versions(),
        "command": command_line("parallel", model_dir, options),
        "notice": NOTICE,
        "retrieval": text_retrieval(reporter, columns, batch_size),
    }
    output = Path(output_dir)
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / METRICS_FILE, metrics)
    sys.stdout.write(render_table(metrics) + "\n")
    return metrics


def text_retrieval(
    reporter: Reporter, columns: dict[str, list[str]], batch_size: int
) -> dict[str, dict[str, dict[str, float]]]:
    """Measures retrieval between languages; pairs that share a text on either side are right for each other.

    Args:
        reporter: Embeds the texts.
        columns: Language to texts, all of one length; texts at one place say the same.
        batch_size: Texts at once.
    """
    embeds = {language: embed_in_batches(reporter, texts, batch_size) for language, texts in columns.items()}
    return {
        f"{first}-{second}": retrieval_recall(
            embeds[first], embeds[second], RECALL_AT, same_text(columns[first], columns[second])
        )
        for first, second in combinations(columns, 2)
    }
