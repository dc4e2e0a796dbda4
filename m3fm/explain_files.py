# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Explain files: what `m3fm explain` does. For research use only."""

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from safetensors.numpy import save_file

from .evaluation.runs import NOTICE, without_nan
from .explain import METHODS, EncodedStudy, Explainer, Target
from .explain_maps import HeatMap
from .explain_plots import draw_heat_map, evidence_page

EXPLANATIONS, EVIDENCE = "explanations.jsonl", "evidence.jsonl"
ON_ERROR = ("raise", "row")


def explain_files(
    files: Sequence[str | Path],
    phrases: Sequence[str] = (),
    labels: Sequence[str] = (),
    method: str = "similarity",
    output_dir: str | Path = "explanations",
    model: str | Path | Explainer | None = None,
    device: str = "cpu",
    language: str | None = None,
    report_language: str | None = None,
    modality: str | None = None,
    on_error: str = "raise",
) -> list[dict[str, Any]]:
    """Explains each file by each phrase and label, and each sentence of its generated report.

    Writes, numbered by file and phrase so that no name of a file gets into another: `0001-01.png`, a picture;
    `0001-01.safetensors`, the maps as `map_000`, ... (H, W) float32 with `attention` and `relevance` (N,); a line in
    `explanations.jsonl`. With `report_language` also `0001-report.html` and a line in `evidence.jsonl`.

    Args:
        files: Each is one study.
        phrases: Any texts; the name of a label is weighed against its absence.
        labels: Names of labels; others are refused.
        method: "similarity" or "gradient".
        output_dir: Made if missing; files of the same name are replaced.
        model: A checkpoint folder, or an explainer that has one loaded; None takes the one that ships.
        device: A torch device.
        language: Of the phrases and prompts; None tells it by the script of each.
        report_language: Writes a report in it and weighs its sentences; None writes none.
        modality: "cxr" or "ct" for files that do not say.
        on_error: "raise" on the first file that cannot be read, or "row" to note the error in its place.

    Returns:
        The rows of `explanations.jsonl`, then those of `evidence.jsonl`; each names its `source` as it was given.

    Raises:
        ValueError: If nothing is asked for, or a phrase, label, language, method or file is not right.
        ImportError: Without matplotlib, or if a file needs an optional reader that is not installed.
    """
    if on_error not in ON_ERROR:
        raise ValueError(f"Expected on_error to be 'raise' or 'row', got {on_error!r}.")
    if method not in METHODS:
        raise ValueError(f"Unknown method {method!r}: expected one of {list(METHODS)}.")
    if not files or not (phrases or labels or report_language):
        raise ValueError("Expected at least one file, and a phrase, a label or the language of a report.")
    explainer = model if isinstance(model, Explainer) else Explainer.from_pretrained(model, device)
    if report_language is not None:
        explainer.check_report_language(report_language)
    # All of them before anything is written, so that a misspelt label costs nothing.
    targets = [explainer.target(phrase, language) for phrase in phrases]
    targets += [explainer.label_target(label, language) for label in labels]
    output = Path(output_dir)
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file, expected a folder.")
    output.mkdir(parents=True, exist_ok=True)
    explained: list[dict[str, Any]] = []
    weighed: list[dict[str, Any]] = []
    with ExitStack() as stack:
        explanations = stack.enter_context(_open(output / EXPLANATIONS)) if targets else None
        evidence = stack.enter_context(_open(output / EVIDENCE)) if report_language else None
        for number, source in enumerate(files, start=1):
            try:
                study = explainer.read(source, modality)
            except (ValueError, OSError, ImportError) as error:
                if on_error == "raise":
                    raise
                row = {"source": str(source), "error": str(error).removeprefix(f"{source}: ")}
                explained += _write(explanations, [row])
                weighed += _write(evidence, [row] if explanations is None else [])
                continue
            for row in _explain(explainer, study, targets, method, output, number):
                explained += _write(explanations, [{"source": str(source), **row}])
            if report_language is not None:
                row = _weigh(explainer, study, report_language, output, number)
                weighed += _write(evidence, [{"source": str(source), **row}])
    return explained + weighed


def _explain(
    explainer: Explainer, study: EncodedStudy, targets: Sequence[Target], method: str, output: Path, number: int
) -> Iterator[dict[str, Any]]:
    for place, target in enumerate(targets, start=1):
        heat_map = explainer.heat_map(study, target, method)
        name = f"{number:04d}-{place:02d}"
        (output / f"{name}.png").write_bytes(draw_heat_map(heat_map))
        save_file(_arrays(heat_map), output / f"{name}.safetensors")
        yield {**heat_map.summary(), "picture": f"{name}.png", "data": f"{name}.safetensors", "notice": NOTICE}


def _weigh(explainer: Explainer, study: EncodedStudy, language: str, output: Path, number: int) -> dict[str, Any]:
    report = explainer.write(study, language)
    evidence = explainer.evidence(study, report, language) if report else []
    name = f"{number:04d}-report.html"
    (output / name).write_text(evidence_page(evidence), encoding="utf-8")
    return {f"report_{language}": report, "sentences": [e.summary() for e in evidence], "page": name, "notice": NOTICE}


def _arrays(heat_map: HeatMap) -> dict[str, np.ndarray]:
    weights = {name: shares for name, shares in heat_map.slice_weights.items() if shares is not None}
    maps = {f"map_{index:03d}": values for index, values in enumerate(heat_map.maps)}
    return {name: np.ascontiguousarray(values, dtype=np.float32) for name, values in (maps | weights).items()}


def _open(path: Path) -> TextIO:
    return open(path, "w", encoding="utf-8", newline="\n")


def _write(file: TextIO | None, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Writes rows at once and returns them; none where there is no file for them."""
    if file is None:
        return []
    for row in rows:
        file.write(json.dumps(without_nan(row), ensure_ascii=False, allow_nan=False) + "\n")
    file.flush()
    return rows


__all__ = ["explain_files"]
