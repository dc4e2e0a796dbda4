# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Diagnose many files into one table, a row a study and label, that a stopped run goes on in.

Columns: `source`, `label`, `probability`, `threshold`, `decision` ("yes", "no", or empty where there is no threshold),
`calibration` (what the probability was fitted on, or "none"), `error` (why a study could not be read or was refused,
in a row of its own), `input_check` ("ok", "suspect" or "refused", and the codes of what is wrong with the images), and
`notice`, which says in every row what the table is for: a row that is copied out of it keeps that.

Beside the table lies `<table>.run.json`, which says what it was made with.
"""

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

from .. import DEFAULT_CHECKPOINT
from ..batch.rows import CsvTable, JsonLines, Row, RowFile, StreamRows, check_output
from ..batch.sources import StudySource, find_sources
from ..diagnosis_pipeline_m3fm import M3FMDiagnosisPipeline, ScoredLabels
from ..evaluation.label_file import YAML_SUFFIXES, read_content
from ..evaluation.reporter import checkpoint_folder, hash_checkpoint, hash_input_check
from ..evaluation.runs import NOTICE

COLUMNS = (
    "source",
    "label",
    "probability",
    "threshold",
    "decision",
    "calibration",
    "error",
    "input_check",
    "notice",
)
FORMATS = {
    "csv": CsvTable(COLUMNS, lambda row: row["notice"] == NOTICE),
    "jsonl": JsonLines(lambda row: set(row) == set(COLUMNS)),
}
_DECISIONS = {True: "yes", False: "no", None: None}
_DECIMALS = 6


def diagnose_files(
    files: str | Path | Sequence[str | Path],
    labels: str | Path | Sequence[str] | Mapping[str, Any] | None = None,
    output: str | Path | None = None,
    format: Literal["csv", "jsonl"] = "csv",  # noqa: A002 - as the command calls it
    model: str | Path = DEFAULT_CHECKPOINT,
    device: str = "cpu",
    report_language: str | None = None,
    exclusive: bool | None = None,
    batch_size: int = 8,
    num_workers: int = 0,
    on_error: Literal["raise", "row"] = "row",
    on_suspect: Literal["refuse", "warn"] = "refuse",
    resume: bool = True,
) -> dict[str, int]:
    """Diagnoses studies into a table, with a progress bar.

    A run that was stopped goes on after the studies it has, if it is started again with the same settings.

    Args:
        files: Folders, lists and images, as `m3fm.batch.sources.find_sources` takes them.
        labels: A label file (see `m3fm.evaluation.label_file`), names, or a mapping as the pipeline takes it. None:
            those that the checkpoint is calibrated for.
        output: The table, in a folder that exists; None prints it.
        format: "csv", or "jsonl" with a line an object of the same names and null where a cell is empty.
        model: A checkpoint folder.
        device: A torch device.
        report_language: See the pipeline.
        exclusive: Whether each study has exactly one of the labels; None: as the label file says, or no.
        batch_size: Studies at once.
        num_workers: Processes that read ahead; 0 reads between batches.
        on_error: "row": a study that is unreadable or refused is a row with its `error`; "raise": the first ends the
            run.
        on_suspect: "refuse" what is plainly not a chest, or "warn" of it in the column `input_check`.
        resume: False makes a table that is there anew.

    Returns:
        "studies", and of these "errors", which have no labels, and "resumed", that were in the table already.

    Raises:
        ValueError: If files, labels, the format or the output are not right, or `output` holds the table of other
            settings or is being written by another run; with `on_error="raise"`, if a study cannot be read.
    """
    if format not in FORMATS:
        raise ValueError(f"Expected format to be one of {list(FORMATS)}, got {format!r}.")
    sources = find_sources(files)
    candidates, file_exclusive = _read_candidates(labels)
    exclusive = file_exclusive if exclusive is None else exclusive
    path = None if output is None else check_output(output, (image for source in sources for image in source.images))
    pipe = _load(model, device)
    settings = {"candidate_labels": candidates, "exclusive": exclusive, "report_language": report_language}
    running = {"batch_size": batch_size, "num_workers": num_workers, "on_error": on_error, "on_suspect": on_suspect}
    # Checks the settings before a table that is there is touched.
    pipe([], **settings, **running)
    scored = pipe.score_labels(candidates, exclusive, report_language is not None)
    run = _run_record(model, scored, settings | {"on_suspect": on_suspect})
    with _open_table(path, format, scored, run, resume) as table:
        if isinstance(table, RowFile):
            table.check_sources([source.name for source in sources])
        return _write_table(sources, table, functools.partial(pipe, **settings, **running), scored)


def _write_table(
    sources: Sequence[StudySource],
    table: RowFile | StreamRows,
    pipe: Callable[[Iterator[Any]], Iterator[dict[str, Any]]],
    scored: ScoredLabels,
) -> dict[str, int]:
    kept = table.kept if isinstance(table, RowFile) else {}
    errors = sum(row["error"] is not None for row in kept.values())
    missing = [source for source in sources if source.name not in kept]
    answers = pipe(iter([list(source.images) for source in missing]))
    bar = tqdm(total=len(sources), initial=len(kept), desc="diagnosis", unit="study", disable=None)
    with contextlib.closing(answers), bar:
        for source, answer in zip(missing, answers, strict=True):
            table.write(_rows(source, answer, scored))
            errors += "error" in answer
            bar.update()
    if isinstance(table, RowFile):
        table.sort([source.name for source in sources])
    return {"studies": len(sources), "errors": errors, "resumed": len(kept)}


# --------------------------------------------------------------------------------------------------------------------
# What is diagnosed for, and with what


def _read_candidates(labels: Any) -> tuple[Any, bool]:
    """Returns what the pipeline takes as candidate labels, and whether the label file says that they are exclusive."""
    if isinstance(labels, Sequence) and not isinstance(labels, str) and len(labels) == 1:
        labels = labels[0] if Path(str(labels[0])).suffix in YAML_SUFFIXES else labels
    if not isinstance(labels, str | os.PathLike):
        return labels, False
    if isinstance(labels, str) and Path(labels).suffix not in YAML_SUFFIXES:
        return [labels], False
    content = read_content(labels)
    if not isinstance(content, Mapping):
        return content, False
    exclusive = content.get("exclusive", False)
    if not isinstance(exclusive, bool):
        raise ValueError(f"{labels}: expected exclusive to be true or false, got {exclusive!r}.")
    return {name: entry for name, entry in content.items() if name != "exclusive"}, exclusive


def _load(model: str | Path, device: str) -> M3FMDiagnosisPipeline:
    folder = checkpoint_folder(model)
    try:
        # Half precision, which checkpoints are stored in, is slow and less exact on CPUs.
        loaded = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    except Exception as error:  # damaged weights and settings raise many kinds
        raise ValueError(f"{folder}: the model cannot be loaded: {error}") from error
    return M3FMDiagnosisPipeline(model=loaded, processor=AutoProcessor.from_pretrained(folder), device=device)


def _run_record(model: str | Path, scored: ScoredLabels, settings: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "notice": NOTICE,
        "model": Path(model).resolve().name,
        "model_sha256": hash_checkpoint(model),
        "input_check_sha256": hash_input_check(model),
        "on_suspect": settings["on_suspect"],
        "exclusive": settings["exclusive"],
        "report_language": settings["report_language"],
        "labels": [vars(label) for label in scored.labels],
    }


# --------------------------------------------------------------------------------------------------------------------
# Rows


def _rows(source: StudySource, answer: Mapping[str, Any], scored: ScoredLabels) -> list[Row]:
    """Returns the rows of one study, labels in the order in which they were asked for."""
    empty = dict.fromkeys(COLUMNS) | {"source": source.name, "notice": NOTICE}
    empty["input_check"] = _seen(answer.get("input_check"))
    if "error" in answer:
        return [empty | {"error": _one_line(answer["error"])}]
    by_label = {each["label"]: each for each in answer["labels"]}
    rows = []
    for label in scored.labels:
        said = by_label[label.name]
        rows.append(
            empty
            | {
                "label": label.name,
                "probability": round(said["score"], _DECIMALS),
                "threshold": said["threshold"],
                "decision": _DECISIONS[said["decision"]],
                "calibration": f"fitted on {label.fitted_on or 'data not named'}" if said["calibrated"] else "none",
            }
        )
    return rows


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _seen(check: Mapping[str, Any] | None) -> str | None:
    if check is None:
        return None
    codes = dict.fromkeys(each["code"] for each in check["findings"] if each["severity"] != "info")
    return f"{check['verdict']}: {', '.join(codes)}" if codes else check["verdict"]


def _open_table(
    path: Path | None,
    format: str,  # noqa: A002
    scored: ScoredLabels,
    run: Mapping[str, Any],
    resume: bool,
) -> RowFile | StreamRows:
    if path is None:
        return StreamRows(sys.stdout, FORMATS[format].line, FORMATS[format].head())
    labels = [label.name for label in scored.labels]

    def is_whole(rows: Sequence[Row]) -> bool:
        return [row["label"] for row in rows] == labels or (len(rows) == 1 and rows[0]["error"] is not None)

    return RowFile(path, FORMATS[format], run, is_whole, resume)


__all__ = ["COLUMNS", "diagnose_files"]
