# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Diagnose many files into one table, a row a study and label, that a stopped run goes on in.

Columns: `source`, `label`, `probability`, `threshold`, `decision` ("yes", "no", or empty where there is no threshold),
`calibration` (what the probability was fitted on, or "none"), `error` (why a study could not be read, in a row of its
own), and `notice`, which says in every row what the table is for: a row that is copied out of it keeps that.

Beside the table lies `<table>.run.json`, which says what it was made with.
"""

import csv
import io
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

from .. import DEFAULT_CHECKPOINT
from ..diagnosis_pipeline_m3fm import M3FMDiagnosisPipeline, ScoredLabels
from ..evaluation.label_file import YAML_SUFFIXES, read_content
from ..evaluation.reporter import checkpoint_folder, hash_checkpoint
from ..evaluation.runs import NOTICE, library_versions, write_json

COLUMNS = ("source", "label", "probability", "threshold", "decision", "calibration", "error", "notice")
FORMATS = ("csv", "jsonl")
METADATA = "metadata.jsonl"
# Of the files in a folder. DICOM files of any name are known by their content.
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".dcm", ".dicom", ".nii", ".nii.gz")
_DECISIONS = {True: "yes", False: "no", None: None}
_DECIMALS = 6

Row = dict[str, Any]


@dataclass(frozen=True)
class _Source:
    """One study: what it is called in the table, and its image files."""

    name: str
    images: tuple[Path, ...]


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
    on_error: Literal["raise", "row"] = "row",
    resume: bool = True,
) -> dict[str, int]:
    """Diagnoses studies into a table, with a progress bar.

    A run that was stopped goes on after the studies it has, if it is started again with the same settings.

    Args:
        files: A data folder (`metadata.jsonl`; X-ray rows with one `study_id` are one study), any folder (each image
            in it and below is a study), a file, or a list of files, each a study.
        labels: A label file (see `m3fm.evaluation.label_file`), names, or a mapping as the pipeline takes it. None:
            those that the checkpoint is calibrated for.
        output: The table, in a folder that exists; None prints it.
        format: "csv", or "jsonl" with a line an object of the same names and null where a cell is empty.
        model: A checkpoint folder.
        device: A torch device.
        report_language: See the pipeline.
        exclusive: Whether each study has exactly one of the labels; None: as the label file says, or no.
        batch_size: Studies at once.
        on_error: "row": an unreadable study is a row with its `error`; "raise": the first ends the run.
        resume: False makes a table that is there anew.

    Returns:
        "studies", and of these "errors" and "resumed", that were in the table already.

    Raises:
        ValueError: If files, labels, the format or the output are not right, or `output` holds the table of other
            settings; with `on_error="raise"`, if a study cannot be read.
    """
    if format not in FORMATS:
        raise ValueError(f"Expected format to be one of {list(FORMATS)}, got {format!r}.")
    sources = list(_find_sources(files))
    candidates, file_exclusive = _read_candidates(labels)
    exclusive = file_exclusive if exclusive is None else exclusive
    path = None if output is None else _checked_output(Path(output), sources)
    pipe = _load(model, device)
    settings = {"candidate_labels": candidates, "exclusive": exclusive, "report_language": report_language}
    # Checks the settings before a table that is there is touched.
    pipe([], **settings, batch_size=batch_size, on_error=on_error)
    scored = pipe.score_labels(candidates, exclusive, report_language is not None)
    table = _Table(path, format, [label.name for label in scored.labels])
    done = table.open(_run_record(model, scored, settings), resume)
    if strangers := done.keys() - {source.name for source in sources}:
        raise ValueError(
            f"{path} holds {len(strangers)} studies that are not among the files: expected another output, or no "
            "resume."
        )
    missing = [source for source in sources if source.name not in done]
    answers = pipe(
        iter([list(source.images) for source in missing]), **settings, batch_size=batch_size, on_error=on_error
    )
    errors = sum(row["error"] is not None for row in done.values())
    bar = tqdm(total=len(sources), initial=len(done), desc="diagnosis", unit="study", disable=None)
    with table, bar:
        for source, answer in zip(missing, answers, strict=True):
            table.write(_rows(source, answer, scored))
            errors += "error" in answer
            bar.update()
    table.sort([source.name for source in sources])
    return {"studies": len(sources), "errors": errors, "resumed": len(done)}


# --------------------------------------------------------------------------------------------------------------------
# What is diagnosed, and for what


def _find_sources(files: str | Path | Sequence[str | Path]) -> Iterator[_Source]:
    given = [files] if isinstance(files, str | os.PathLike) else list(files)
    if not given:
        raise ValueError("Expected files or a folder to diagnose, got none.")
    found: dict[str, _Source] = {}
    for each in given:
        folder = Path(each)
        if folder.is_dir():
            listed = _from_metadata(folder) if (folder / METADATA).is_file() else _from_folder(folder)
            if not listed:
                raise ValueError(f"{folder}: no chest image in this folder.")
        else:
            listed = [_Source(os.fspath(each), (folder,))]
        if len(given) > 1 and folder.is_dir():
            listed = [_Source(f"{os.fspath(each)}/{source.name}", source.images) for source in listed]
        for source in listed:
            if found.setdefault(source.name, source) is not source:
                raise ValueError(f"Expected each study once, got {source.name} more than once.")
    return iter(found.values())


def _from_metadata(folder: Path) -> list[_Source]:
    """Reads the studies of a data folder in file order; nothing but the names of files is looked at closely."""
    studies: dict[tuple[str, str], list[str]] = {}
    path = folder / METADATA
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            name = row["file_name"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path}, line {number}: expected a JSON object with a file_name.") from None
        if not isinstance(name, str) or not name:
            raise ValueError(f"{path}, line {number}: expected file_name to be text.")
        study = row.get("study_id")
        # The slices of a CT are a study each, as in `m3fm.data.load_studies`.
        together = study is not None and row.get("modality") != "ct"
        studies.setdefault(("study", str(study)) if together else ("file", name), []).append(name)
    return [_Source(";".join(names), tuple(folder / name for name in names)) for names in studies.values()]


def _from_folder(folder: Path) -> list[_Source]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and _is_image(path))
    return [_Source(path.relative_to(folder).as_posix(), (path,)) for path in paths]


def _is_image(path: Path) -> bool:
    if path.name.startswith("."):
        return False
    if path.name.lower().endswith(IMAGE_SUFFIXES):
        return True
    try:
        with open(path, "rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


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
        "exclusive": settings["exclusive"],
        "report_language": settings["report_language"],
        "labels": [vars(label) for label in scored.labels],
    }


# --------------------------------------------------------------------------------------------------------------------
# Rows


def _rows(source: _Source, answer: Mapping[str, Any], scored: ScoredLabels) -> list[Row]:
    """Returns the rows of one study, labels in the order in which they were asked for."""
    empty = dict.fromkeys(COLUMNS) | {"source": source.name, "notice": NOTICE}
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


# --------------------------------------------------------------------------------------------------------------------
# The table on disk


def _checked_output(path: Path, sources: Iterable[_Source]) -> Path:
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise ValueError(f"{path}: expected a file in a folder that exists.")
    if path.resolve() in {image.resolve() for source in sources for image in source.images}:
        raise ValueError(f"{path} would replace an image that is to be read.")
    return path


class _Table:
    """Appends rows, whole studies at once, to a file or to the screen."""

    def __init__(self, path: Path | None, format: str, labels: Sequence[str]):  # noqa: A002
        self.path = path
        self.format = format
        self.labels = list(labels)
        self._stream: Any = None

    def open(self, run: Mapping[str, Any], resume: bool) -> dict[str, Row]:
        """Opens the table; returns the first row of each study that is in it already, by source.

        Raises:
            ValueError: If it was made with other settings, or is no table.
        """
        kept: dict[str, list[Row]] = {}
        if self.path is None:
            self._stream = sys.stdout
        else:
            record = self.path.with_name(f"{self.path.name}.run.json")
            run = json.loads(json.dumps({**run, "format": self.format}))
            if resume and self.path.exists():
                self._check_record(record, run)
                kept = self._whole_studies()
            write_json(record, run | {"versions": library_versions()})
            # Rewritten rather than cut, so that what is there stays if this is stopped.
            self._replace(kept)
            self._stream = open(self.path, "a", encoding="utf-8", newline="")  # noqa: SIM115 - closed by __exit__
        if not kept and (self.path is None or not self.path.stat().st_size):
            self._stream.write(self._head())
            self._stream.flush()
        return {source: rows[0] for source, rows in kept.items()}

    def _check_record(self, record: Path, run: Mapping[str, Any]) -> None:
        try:
            earlier = json.loads(record.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise ValueError(f"{self.path} exists, and not as a table of m3fm: expected another output.") from None
        if changed := sorted(key for key in run if earlier.get(key) != run[key]):
            raise ValueError(
                f"{self.path} was made with another {', '.join(changed)}: expected another output, or no resume."
            )

    def __enter__(self) -> "_Table":
        return self

    def __exit__(self, *_: object) -> None:
        if self.path is not None:
            self._stream.close()

    def write(self, rows: Sequence[Row]) -> None:
        """Writes the rows of one study."""
        self._stream.write("".join(map(self._line, rows)))
        self._stream.flush()

    def sort(self, sources: Sequence[str]) -> None:
        """Puts studies into the order of the files, which has changed if files came in since the table was begun."""
        if self.path is None:
            return
        kept = self._whole_studies()
        if list(kept) != list(sources):
            self._replace({source: kept[source] for source in sources})

    def _whole_studies(self) -> dict[str, list[Row]]:
        """Reads the studies of which no row is missing; a killed run may have cut off the last."""
        rows: dict[str, list[Row]] = {}
        for row in self._read():
            rows.setdefault(row["source"], []).append(row)
        return {
            source: each
            for source, each in rows.items()
            if [row["label"] for row in each] == self.labels or (len(each) == 1 and each[0]["error"] is not None)
        }

    def _read(self) -> Iterator[Row]:
        content = self.path.read_bytes()
        # A name may hold a line break, so that the CSV reader and not the line decides where a row ends.
        text = content[: content.rfind(b"\n") + 1].decode("utf-8", errors="replace")
        if self.format == "csv":
            for cells in csv.reader(io.StringIO(text, newline="")):
                if len(cells) == len(COLUMNS) and tuple(cells) != COLUMNS and cells[-1] == NOTICE:
                    yield {name: cell or None for name, cell in zip(COLUMNS, cells, strict=True)}
            return
        for line in text.split("\n"):
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and set(row) == set(COLUMNS):
                yield row

    def _replace(self, studies: Mapping[str, Sequence[Row]]) -> None:
        draft = self.path.with_name(f"{self.path.name}.tmp")
        lines = [self._line(row) for rows in studies.values() for row in rows]
        draft.write_text(self._head() + "".join(lines) if lines else "", encoding="utf-8", newline="")
        os.replace(draft, self.path)

    def _head(self) -> str:
        return self._csv_line(COLUMNS) if self.format == "csv" else ""

    def _line(self, row: Row) -> str:
        if self.format == "jsonl":
            return json.dumps(row, ensure_ascii=False) + "\n"
        return self._csv_line(["" if row[name] is None else row[name] for name in COLUMNS])

    @staticmethod
    def _csv_line(cells: Sequence[Any]) -> str:
        stream = io.StringIO()
        csv.writer(stream, lineterminator="\n").writerow(cells)
        return stream.getvalue()


__all__ = ["COLUMNS", "diagnose_files"]
