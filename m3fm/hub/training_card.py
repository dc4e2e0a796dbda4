# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""What a model card says of a training: the table of a `training.json`."""

from collections.abc import Iterator, Mapping
from typing import Any

from ..evaluation.tables import markdown_table, number

__all__ = ["is_training", "training_table"]

_SETS = ("image_sets", "text_sets", "sets", "parallel_sets")
# What stages say of their data, and how it reads.
_COUNTS = {"train_studies": "studies", "texts": "texts", "pairs": "image-report pairs", "validation_studies": ""}


def is_training(content: Mapping[str, Any]) -> bool:
    """Tells whether a JSON file is the record of a training."""
    return isinstance(content.get("recipe"), dict) and "arguments" in content and "parameters" in content


def training_table(record: Mapping[str, Any]) -> str:
    """Renders a record, see `m3fm.training.record`; what it does not say has no line."""
    return markdown_table([["training", ""], *([name, value] for name, value in _lines(record))])


def _lines(record: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    arguments, parameters = record["arguments"], record["parameters"]
    if record.get("stage"):
        yield "stage", record["stage"]
    if record.get("supervision"):
        yield "supervision", record["supervision"]
    sets = {name for field in _SETS for name in record["recipe"].get(field) or ()}
    if sets:
        yield "sets", ", ".join(sorted(sets))
    seen = [f"{record[name]:,} {title}" for name, title in _COUNTS.items() if title and record.get(name)]
    if record.get("validation_studies"):
        seen.append(f"{record['validation_studies']:,} validation studies")
    if seen:
        yield "data", ", ".join(seen)
    yield "parameters", f"{_millions(parameters['trained'])} trained of {_millions(parameters['total'])}"
    yield "steps", f"{record['steps']:,}" + (f" ({record['epochs']:.3g} epochs)" if record.get("epochs") else "")
    batch = [arguments[name] for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "world_size")]
    yield "batch", f"{batch[0] * batch[1] * batch[2]:,} ({batch[0]} x {batch[1]} micro-batches x {batch[2]} ranks)"
    yield "learning rate", f"{arguments['learning_rate']:.2g}, {arguments['lr_scheduler_type']}"
    if record.get("samples_seen"):
        tokens = f", {record['tokens_seen']:,} tokens" if record.get("tokens_seen") else ""
        yield "seen", f"{record['samples_seen']:,} samples{tokens}"
    if record.get("run_seconds"):
        rate = f", {record['samples_per_second']:,.3g} samples/s" if record.get("samples_per_second") else ""
        yield "time", f"{record['run_seconds'] / 60:,.1f} minutes{rate}"
    hardware = record["hardware"]
    yield "hardware", f"{hardware['ranks']} x {hardware['name'] or hardware['device']}"
    if record.get("best"):
        best = record["best"]
        kept = "the model" if best["is_the_model"] else "not the model"
        yield f"best {best['metric']}", f"{number(best['value'])} at step {best['step']:,} ({kept})"
    for name, value in record.get("validation", {}).items():
        yield f"validation, {name.removeprefix('eval_')}", number(value)
    yield "made with", ", ".join(f"{name} {record['versions'][name]}" for name in ("m3fm", "torch", "transformers"))


def _millions(count: int) -> str:
    return f"{count / 1e6:,.2f} million"
