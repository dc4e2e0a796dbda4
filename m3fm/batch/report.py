# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Write reports for many studies: what `m3fm report` does. For research use only.

A row is a dict with `source`, then `modality`, `report_<language>` and `input_check`; or with `source` and `error`
where a study could not be read, and `input_check` too where it was refused.
"""

import contextlib
import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TextIO

import torch
from tqdm.auto import tqdm
from transformers import pipeline

from .. import DEFAULT_CHECKPOINT, M3FMReportPipeline
from ..evaluation.reporter import checkpoint_folder, hash_checkpoint, hash_input_check
from ..evaluation.runs import NOTICE
from .rows import JsonLines, Row, RowFile, StreamRows, check_output
from .sources import StudySource, find_sources

# The name of a language in that language; one not named here goes by its code.
LANGUAGE_NAMES = {"en": "English", "zh": "中文"}
# What stands before the findings of the input check in a text to read; others are left out there.
SEVERITY_WORDS = {"warning": "warning", "refuse": "not to be trusted"}


def report_files(
    files: str | Path | Sequence[str | Path],
    *,
    language: str = "en",
    output: str | Path | None = None,
    format: Literal["text", "json", "jsonl"] = "jsonl",  # noqa: A002 - as the command calls it
    model: str | Path = DEFAULT_CHECKPOINT,
    device: str | torch.device = "cpu",
    num_beams: int | None = None,
    max_new_tokens: int | None = None,
    batch_size: int = 8,
    num_workers: int = 0,
    on_suspect: Literal["refuse", "warn"] = "refuse",
    resume: bool = True,
    on_unread: Callable[[str, str], None] | None = None,
) -> dict[str, int]:
    """Writes reports as they come out of the model, with a progress bar.

    JSON lines in a file are appended a study at a time: a run that was stopped, in whatever way, goes on after them if
    it is started again with the same settings; those with an error are not tried again. Text and JSON are written
    anew each time.

    Args:
        files: Folders, lists and images, as `find_sources` takes them.
        language: A code of the checkpoint, or "both".
        output: A file, in a folder that exists; None prints.
        format: "text" to read, one list of "json", or "jsonl", an object a line.
        model: A checkpoint folder.
        device: A torch device.
        num_beams: None: the checkpoint's.
        max_new_tokens: Longest report, in tokens; None: the checkpoint's.
        batch_size: Studies at once.
        num_workers: Processes that read ahead; 0 reads between batches.
        on_suspect: "refuse" what is plainly not a chest, or "warn" of it in `input_check`.
        resume: False makes a file of JSON lines that is there anew.
        on_unread: Called with the source and the reason of each study that has no report, as it comes.

    Returns:
        "studies", and of these "errors", which have no report, of these in turn "refused"; and "resumed", that were
        in the file already.

    Raises:
        ValueError: If files, the output or a setting are not right, or `output` holds reports of other settings or is
            being written by another run.
    """
    if format not in FORMATS:
        raise ValueError(f"Expected format to be one of {list(FORMATS)}, got {format!r}.")
    sources = find_sources(files)
    path = None if output is None else check_output(output, (image for source in sources for image in source.images))
    reporter = load_reporter(model, device)
    generation = {"num_beams": num_beams, "max_new_tokens": max_new_tokens}
    settings = {
        "language": language,
        "batch_size": batch_size,
        "num_workers": num_workers,
        "on_error": "row",
        "on_suspect": on_suspect,
        "generate_kwargs": {name: value for name, value in generation.items() if value is not None},
    }
    # Checks the settings before a file that is there is touched.
    reporter([], **settings)
    run = _run_record(model, {"language": language, **generation, "on_suspect": on_suspect})
    with _open_rows(path, format, run, resume) as rows:
        if isinstance(rows, RowFile):
            rows.check_sources([source.name for source in sources])
        return _write_reports(sources, rows, functools.partial(reporter, **settings), on_unread)


def _write_reports(
    sources: Sequence[StudySource],
    rows: RowFile | StreamRows,
    reporter: Callable[[Iterator[Any]], Iterator[dict[str, Any]]],
    on_unread: Callable[[str, str], None] | None,
) -> dict[str, int]:
    kept = rows.kept if isinstance(rows, RowFile) else {}
    counts = _count(kept.values(), {"studies": len(sources), "errors": 0, "refused": 0, "resumed": len(kept)})
    for row in kept.values():  # those are not tried again
        if "error" in row and on_unread is not None:
            on_unread(row["source"], row["error"])
    missing = [source for source in sources if source.name not in kept]
    hidden = True if len(sources) < 2 else None  # None: unless stderr is a terminal
    answers = reporter(iter([_images(source) for source in missing]))
    bar = tqdm(total=len(sources), initial=len(kept), desc="reports", unit="study", disable=hidden)
    with contextlib.closing(answers), bar:
        for source, answer in zip(missing, answers, strict=True):
            row = _row(source, answer)
            with contextlib.nullcontext() if bar.disable else tqdm.external_write_mode(sys.stderr):
                if "error" in row and on_unread is not None:
                    on_unread(row["source"], row["error"])
                rows.write([row])
            _count([row], counts)
            bar.update()
    if isinstance(rows, RowFile):
        rows.sort([source.name for source in sources])
    return counts


def load_reporter(model: str | Path, device: str | torch.device) -> M3FMReportPipeline:
    """Loads a checkpoint.

    Raises:
        ValueError: If it cannot be loaded.
    """
    folder = checkpoint_folder(model)
    # Half precision, which checkpoints are stored in, is slow and less exact on CPUs.
    dtype = torch.float32 if torch.device(device).type == "cpu" else "auto"
    try:
        # The class is named for folders that bring code of their own: the installed code runs.
        return pipeline(
            M3FMReportPipeline.task, str(folder), device=device, dtype=dtype, pipeline_class=M3FMReportPipeline
        )
    except Exception as error:  # damaged weights and settings raise many kinds
        raise ValueError(f"{folder}: the model cannot be loaded: {error}") from error


def _run_record(model: str | Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "notice": NOTICE,
        "task": M3FMReportPipeline.task,
        "model": Path(model).resolve().name,
        "model_sha256": hash_checkpoint(model),
        "input_check_sha256": hash_input_check(model),
        **settings,
    }


def _images(source: StudySource) -> Path | list[Path]:
    return source.images[0] if len(source.images) == 1 else list(source.images)


def _row(source: StudySource, answer: Mapping[str, Any]) -> Row:
    row = {"source": source.name, **answer}
    if "error" in answer:
        for name in (source.name, str(source.images[0])):
            row["error"] = row["error"].removeprefix(f"{name}: ")
    return row


def _count(rows: Iterable[Row], counts: dict[str, int]) -> dict[str, int]:
    for row in rows:
        counts["errors"] += "error" in row
        counts["refused"] += "error" in row and row.get("input_check", {}).get("verdict") == "refused"
    return counts


# --------------------------------------------------------------------------------------------------------------------
# Formats


def _is_report(row: Mapping[str, Any]) -> bool:
    return isinstance(row.get("source"), str) and ("error" in row or "modality" in row)


_JSON_LINES = JsonLines(_is_report)


def _as_text(row: Row) -> str:
    """Returns a block to read, nothing for a study without a report."""
    if "error" in row:
        return ""
    modality = f" ({row['modality']})" if row["modality"] else ""
    lines = [f"{row['source']}{modality}"]
    for finding in row.get("input_check", {}).get("findings", ()):
        if finding["severity"] in SEVERITY_WORDS:
            lines.append(f"  {SEVERITY_WORDS[finding['severity']]}: {finding['message']}")
    for name, text in row.items():
        if name.startswith("report_"):
            code = name.removeprefix("report_")
            lines += [f"  {LANGUAGE_NAMES.get(code, code)}", *(f"    {line}" for line in text.splitlines())]
    return "\n".join(lines) + "\n\n"


def _as_item(row: Row) -> str:
    return "\n  " + _JSON_LINES.line(row).rstrip("\n")


# What stands before, between and after the rows of a stream, and how one row stands there.
FORMATS = {
    "text": {"line": _as_text},
    "json": {"head": "[", "line": _as_item, "separator": ",", "tail": "\n]\n"},
    "jsonl": {"line": _JSON_LINES.line},
}


@contextlib.contextmanager
def _open_rows(
    path: Path | None,
    format: str,  # noqa: A002
    run: Mapping[str, Any],
    resume: bool,
) -> Iterator[RowFile | StreamRows]:
    with contextlib.ExitStack() as stack:
        # A pipe, or the screen by its name, cannot be read again.
        if format == "jsonl" and path is not None and (path.is_file() or not path.exists()):
            rows: RowFile | StreamRows = RowFile(path, _JSON_LINES, run, resume=resume)
        else:
            stream = sys.stdout if path is None else stack.enter_context(_open_stream(path))
            rows = StreamRows(stream, **FORMATS[format])
        yield stack.enter_context(rows)


def _open_stream(path: Path) -> TextIO:
    return open(path, "w", encoding="utf-8", errors="backslashreplace", newline="\n")


__all__ = ["FORMATS", "load_reporter", "report_files"]
