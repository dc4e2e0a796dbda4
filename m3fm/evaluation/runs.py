# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""What evaluation runs share: a folder that a stopped run goes on in, and the record that lets numbers be made again.

A folder holds `run.json` (what the results depend on), `predictions.jsonl` (a line a study) and `metrics.json`.
"""

import hashlib
import json
import math
import os
import platform
import shlex
from collections.abc import Callable, Hashable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from .. import DEFAULT_CHECKPOINT
from ..data import Study
from ..data.studies import source_name

PREDICTIONS, RUN, METRICS_FILE = "predictions.jsonl", "run.json", "metrics.json"
FORMAT = 2
NOTICE = "For research only. Not a medical device."
# What numbers may depend on; those that are not installed are left out.
_LIBRARIES = ("torch", "transformers", "numpy", "scikit-learn", "jieba", "nltk", "pillow")


def open_output(output_dir: str | Path, run: dict[str, Any]) -> Path:
    """Makes the folder of a run, or opens the one that an earlier, stopped run left.

    Raises:
        ValueError: If the folder holds results of another model, other data or other settings.
    """
    output = Path(output_dir)
    output.mkdir(parents=True, exist_ok=True)
    run = json.loads(json.dumps(run))
    record = output / RUN
    if record.is_file():
        try:
            earlier = json.loads(record.read_text(encoding="utf-8"))
        except ValueError:
            raise ValueError(f"{record} is damaged: expected JSON; choose another output folder.") from None
        changed = sorted(key for key in run.keys() | earlier.keys() if run.get(key) != earlier.get(key))
        if changed:
            raise ValueError(
                f"{output} holds a run with another {', '.join(changed)}: expected another output folder."
            )
    elif (output / PREDICTIONS).is_file():
        raise ValueError(f"{output} holds {PREDICTIONS} without {RUN}: expected another output folder.")
    else:
        write_json(record, run)
    return output


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes JSON whole or not at all; what is not a number becomes null."""
    draft = path.with_suffix(".tmp")
    text = json.dumps(without_nan(content), ensure_ascii=False, indent=2, allow_nan=False)
    draft.write_text(text + "\n", encoding="utf-8")
    os.replace(draft, path)


def without_nan(value: Any) -> Any:
    """Returns JSON content, nested as it may be, with None for numbers that are none and lists for tuples."""
    if isinstance(value, Mapping):
        return {key: without_nan(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def complete_predictions(
    path: Path,
    studies: Sequence[Study],
    batch_size: int,
    predict: Callable[[Sequence[Study]], Sequence[dict[str, Any]]],
    label: str,
) -> list[dict[str, Any]]:
    """Predicts for the studies that have no line in `path` yet, appending a line a study as they come.

    Args:
        path: The JSON lines file; lines already there are neither computed again nor changed.
        studies: With ids of their own.
        batch_size: Studies at once.
        predict: Takes a batch, returns one row for each of its studies.
        label: Of the progress bar.

    Returns:
        A row for each study in their order, each with its `study_id`.

    Raises:
        ValueError: If ids repeat, the file is damaged, or `predict` does not return a row for each study.
    """
    if batch_size < 1:
        raise ValueError(f"Expected batch_size >= 1, got {batch_size}.")
    if len({study.study_id for study in studies}) != len(studies):
        raise ValueError("Expected studies with ids of their own, got some that repeat.")
    rows = read_predictions(path)
    missing = [study for study in studies if study.study_id not in rows]
    bar = tqdm(total=len(studies), initial=len(studies) - len(missing), desc=label, unit="study")
    with open(path, "a", encoding="utf-8") as file, bar:
        for start in range(0, len(missing), batch_size):
            batch = missing[start : start + batch_size]
            predicted = predict(batch)
            if len(predicted) != len(batch):
                raise ValueError(f"Expected {len(batch)} predictions, got {len(predicted)}.")
            for study, row in zip(batch, predicted, strict=True):
                rows[study.study_id] = {"study_id": study.study_id, **row}
                file.write(json.dumps(rows[study.study_id], ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
            bar.update(len(batch))
    return [rows[study.study_id] for study in studies]


def read_predictions(path: Path) -> dict[str, dict[str, Any]]:
    """Reads the rows there are by study id; a last line that a killed run left unfinished is cut off the file.

    Raises:
        ValueError: If a line is not a prediction.
    """
    rows: dict[str, dict[str, Any]] = {}
    if not path.is_file():
        return rows
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            row = json.loads(line)
            rows[row["study_id"]] = row
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path}, line {number}: expected a prediction as JSON; the file is damaged.") from None
    if len(whole) < len(content):
        os.truncate(path, len(whole))
    return rows


def group_numbers(studies: Sequence[Study]) -> list[int]:
    """Numbers the groups that are resampled together, patients or source papers, in order of appearance.

    The numbers say which studies belong together and nothing of who the patient is.
    """
    numbers: dict[Hashable, int] = {}
    keys = [(study.source, study.grouped_key or study.patient_id or study.study_id) for study in studies]
    return [numbers.setdefault(key, len(numbers)) for key in keys]


def hash_order(studies: Sequence[Study]) -> str:
    """Returns the SHA-256 of the studies' ids in their order, each with its group, as hex.

    Kept features are told apart by their places and kept predictions name the group; a fingerprint knows neither.
    """
    return hash_text(
        json.dumps(
            [
                [study.source, study.study_id, group]
                for study, group in zip(studies, group_numbers(studies), strict=True)
            ]
        )
    )


def library_versions() -> dict[str, str]:
    """Returns the versions of what the numbers may depend on."""
    from .. import __version__

    versions = {"m3fm": __version__, "python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def provenance(
    model_dir: str | Path, data_folder: str | Path, seed: int, device: str, num_resamples: int, command: str
) -> dict[str, Any]:
    """Returns what `metrics.json` says of how its numbers came about, beside what the results depend on."""
    return {
        "model": Path(model_dir).resolve().name,
        "data": source_name(data_folder),
        "seed": seed,
        "device": str(device),
        "versions": library_versions(),
        "command": command,
        "notice": NOTICE,
        "num_resamples": num_resamples,
    }


def command_line(task: str, model: str | Path, options: dict[str, Any]) -> str:
    """Returns the command that repeats a run; the shipped checkpoint goes without its path.

    Args:
        task: Of `m3fm evaluate`.
        model: The checkpoint folder.
        options: Name to a value, several values, or None for what was not given.
    """
    words = ["m3fm", "evaluate", "--task", task]
    words += [] if Path(model) == DEFAULT_CHECKPOINT else ["--model", str(model)]
    for name, value in options.items():
        if value is not None:
            values = value if isinstance(value, list | tuple) else [value]
            words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return shlex.join(words)


def hash_text(text: str) -> str:
    """Returns the SHA-256 of a text as hex."""
    return hashlib.sha256(text.encode()).hexdigest()
