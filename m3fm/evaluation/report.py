# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Evaluate report generation on a data folder: scores, floors, image use, retrieval, written down to be re-run.

`evaluate_reports` is what `m3fm evaluate --task report` runs.
"""

import hashlib
import json
import os
import platform
import shlex
import sys
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tqdm.auto import tqdm

from .. import DEFAULT_CHECKPOINT
from ..data import Study, fingerprint, load_parallel, load_studies, training_part
from ..data.splits import new_to
from ..data.studies import TRAINING_SPLIT, source_name
from .baselines import derangement, nearest_neighbors, random_reports, select_constant_report
from .reporter import CheckpointReporter, Reporter, hash_checkpoint
from .retrieval import retrieval_recall, same_text
from .text_metrics import LANGUAGES, METRICS, distinct_ratio, score_reports

PREDICTIONS, RUN, METRICS_FILE = "predictions.jsonl", "run.json", "metrics.json"
RECALL_AT = (1, 10)
# One draw of random or shuffled reports for 72 studies moves BLEU-4 by 0.015: their rows are means over this many.
REPEATS = 10

ROW_TITLES = {
    "model": "model",
    "shuffled_images": "model, shuffled images",
    "constant_report": "constant report",
    "random_report": "random training report",
    "nearest_neighbor_shared": "nearest neighbour, shared space",
    "nearest_neighbor_tower": "nearest neighbour, image tower",
}


def evaluate_reports(
    model_dir: str | Path,
    data_folder: str | Path,
    languages: Sequence[str] | None = None,
    output_dir: str | Path = "evaluation",
    split: str = "validation",
    batch_size: int = 8,
    seed: int = 0,
    device: str = "cpu",
    num_beams: int | None = None,
    max_new_tokens: int | None = None,
) -> dict[str, Any]:
    """Evaluates a checkpoint's reports beside the floors, prints the table, returns what `metrics.json` holds.

    Writes `predictions.jsonl` (an interrupted run goes on after its last line), `run.json` (what these depend on) and
    `metrics.json`.

    Args:
        model_dir: A checkpoint folder.
        data_folder: With reports in the part "train" too: the floors are chosen there.
        languages: Codes to evaluate; None: all that the checkpoint writes.
        output_dir: Made if missing.
        split: The part to evaluate; where not all its studies are of new patients, those are scored alone too.
        batch_size: Studies at once.
        seed: Of random reports and shuffles.
        device: A torch device.
        num_beams: Beams; None takes the checkpoint's generation config.
        max_new_tokens: Longest report in tokens; None takes the checkpoint's.

    Raises:
        ValueError: If the checkpoint, the data or a language does not fit, or `output_dir` holds another run.
    """
    studies = load_studies(Path(data_folder))
    reporter = CheckpointReporter(model_dir, device, num_beams, max_new_tokens)
    languages = list(languages or reporter.languages)
    evaluated, training = _select_studies(studies, languages, reporter.languages, split)
    options = {"split": split, "batch_size": batch_size, "seed": seed, "device": device}
    options |= {"num_beams": num_beams, "max_new_tokens": max_new_tokens}
    run = {
        "task": "report",
        "split": split,
        "languages": languages,
        "model_sha256": hash_checkpoint(model_dir),
        "data_sha256": fingerprint([*evaluated, *training]),
        "decoding": reporter.decoding_settings,
    }
    output = _open_output(output_dir, run)
    rows = generate_predictions(reporter.generate, evaluated, languages, output / PREDICTIONS, batch_size)
    is_new = new_to(training_part(studies), evaluated)
    metrics = run | {
        "data": source_name(data_folder),
        "seed": seed,
        "device": str(device),
        "versions": _library_versions(),
        "command": _command(model_dir, data_folder, languages, output_dir, options),
        **score_predictions(reporter, evaluated, training, rows, is_new, languages, batch_size, seed),
    }
    write_json(output / METRICS_FILE, metrics)
    sys.stdout.write(render_table(metrics) + "\n")
    return metrics


def evaluate_parallel(
    model_dir: str | Path,
    data_folder: str | Path,
    split: str | None = "validation",
    batch_size: int = 32,
    device: str = "cpu",
) -> dict[str, Any]:
    """Measures sentence retrieval between languages on the parallel texts of a folder, and prints the table.

    Args:
        model_dir: A checkpoint folder.
        data_folder: Holds parallel texts (see `load_parallel`).
        split: The part to evaluate; None takes every pair.
        batch_size: Texts at once.
        device: A torch device.

    Returns:
        `retrieval`, with the versions and fingerprints it was measured with.

    Raises:
        ValueError: If there are no pairs in that part.
    """
    pairs = [pair for pair in load_parallel(Path(data_folder)) if split is None or pair.split == split]
    if not pairs:
        raise ValueError(f"{data_folder} has no parallel texts in the part {split!r}.")
    # A study's images may share one text: the pair counts once.
    texts = sorted({tuple(sorted(pair.texts.items())) for pair in pairs})
    reporter = CheckpointReporter(model_dir, device)
    columns = {language: [dict(row)[language] for row in texts] for language, _ in texts[0]}
    metrics = {
        "task": "parallel",
        "data": source_name(data_folder),
        "split": split,
        "model_sha256": hash_checkpoint(model_dir),
        "data_sha256": _hash_text(json.dumps(texts, ensure_ascii=False)),
        "versions": _library_versions(),
        "retrieval": _text_retrieval(reporter, columns, batch_size),
    }
    sys.stdout.write(render_table(metrics) + "\n")
    return metrics


def generate_predictions(
    generate: Callable[[Sequence[Study], str], list[str]],
    studies: Sequence[Study],
    languages: Sequence[str],
    path: Path,
    batch_size: int,
) -> list[dict[str, Any]]:
    """Writes reports for the studies that have no line in `path` yet, appending a line a study as they come.

    Args:
        generate: Takes a batch of studies and a language.
        studies: With ids of their own.
        languages: Codes to write.
        path: The JSON lines file; lines already there are neither computed again nor changed.
        batch_size: Studies at once.

    Returns:
        A row for each study in their order: `study_id`, and `prediction` and `reference` by language.

    Raises:
        ValueError: If ids repeat, the file is damaged, or `generate` does not return a report for each study.
    """
    if batch_size < 1:
        raise ValueError(f"Expected batch_size >= 1, got {batch_size}.")
    if len({study.study_id for study in studies}) != len(studies):
        raise ValueError("Expected studies with ids of their own, got some that repeat.")
    rows = _read_predictions(path)
    missing = [study for study in studies if study.study_id not in rows]
    bar = tqdm(total=len(studies), initial=len(studies) - len(missing), desc="reports", unit="study")
    with open(path, "a", encoding="utf-8") as file, bar:
        for start in range(0, len(missing), batch_size):
            batch = missing[start : start + batch_size]
            texts = {language: generate(batch, language) for language in languages}
            for language, written in texts.items():
                if len(written) != len(batch):
                    raise ValueError(f"Expected {len(batch)} reports in {language!r}, got {len(written)}.")
            for index, study in enumerate(batch):
                row = {
                    "study_id": study.study_id,
                    "prediction": {language: texts[language][index] for language in languages},
                    "reference": {key: text for key, text in study.reports.items() if key in languages},
                }
                rows[study.study_id] = row
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
            bar.update(len(batch))
    return [rows[study.study_id] for study in studies]


def _read_predictions(path: Path) -> dict[str, dict[str, Any]]:
    """Reads the lines there are; a last line that a killed run left unfinished is cut off."""
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


def score_predictions(
    reporter: Reporter,
    evaluated: Sequence[Study],
    training: Sequence[Study],
    predictions: Sequence[dict[str, Any]],
    is_new: Sequence[bool],
    languages: Sequence[str],
    batch_size: int,
    seed: int,
) -> dict[str, Any]:
    """Scores predictions beside the floors, and retrieval in the shared space.

    Returns:
        `rows` (name -> language -> scores), `num_studies` by language, `constant` (which report it was), `retrieval`,
        and where not all studies are new, `new_patients` with `rows` and `num_studies` of those that are.
    """
    features = _embed(reporter.embed_studies, evaluated, batch_size, "images")
    training_features = _embed(reporter.embed_studies, training, batch_size, "training images")
    rows: dict[str, dict[str, dict[str, float]]] = {}
    new_rows: dict[str, dict[str, dict[str, float]]] = {}
    constants, num_studies, num_new, retrieval = {}, {}, {}, {}
    for language in languages:
        here = [i for i, study in enumerate(evaluated) if language in study.reports]
        there = [i for i, study in enumerate(training) if language in study.reports]
        references = [evaluated[i].reports[language] for i in here]
        reports = [training[i].reports[language] for i in there]
        written = [predictions[i]["prediction"][language] for i in here]
        constant = reports[select_constant_report(reports, language, seed=seed)]
        # Its text, for an id may be a patient's.
        constants[language] = {"report_sha256": _hash_text(constant), "criterion": "rouge_l"}
        systems = _image_use(written, constant, seed)
        systems["random_report"] = [random_reports(reports, len(here), seed + repeat) for repeat in range(REPEATS)]
        for space, matrix in features.items():
            nearest = nearest_neighbors(matrix[here], training_features[space][there])
            systems[f"nearest_neighbor_{space}"] = [[reports[i] for i in nearest]]
        _add_scores(rows, systems, references, language)
        new = [place for place, i in enumerate(here) if is_new[i]]
        num_studies[language], num_new[language] = len(here), len(new)
        if 2 <= len(new) < len(here):
            systems = _image_use([written[place] for place in new], constant, seed)
            _add_scores(new_rows, systems, [references[place] for place in new], language)
        texts = _embed_texts(reporter, references, batch_size)
        retrieval[f"image-{language}"] = retrieval_recall(
            features["shared"][here], texts, RECALL_AT, same_text(references)
        )
    common = [study.reports for study in evaluated if all(language in study.reports for language in languages)]
    if common and len(languages) > 1:
        columns = {language: [reports[language] for reports in common] for language in languages}
        retrieval |= _text_retrieval(reporter, columns, batch_size)
    scores = {"rows": rows, "num_studies": num_studies, "constant": constants, "retrieval": retrieval}
    return scores if num_new == num_studies else scores | {"new_patients": {"rows": new_rows, "num_studies": num_new}}


def _image_use(written: Sequence[str], constant: str, seed: int) -> dict[str, list[list[str]]]:
    """Returns what is compared to see whether images are looked at; each row has one or several trials."""
    # Each report was written from its own image alone, without sampling. Giving the model the image of another study
    # would make it write that study's report again, so permuting reports is generating on permuted images.
    shuffles = [derangement(len(written), seed + repeat) for repeat in range(REPEATS)]
    return {
        "model": [list(written)],
        "shuffled_images": [[written[i] for i in order] for order in shuffles],
        "constant_report": [[constant] * len(written)],
    }


def _add_scores(
    rows: dict[str, dict[str, dict[str, float]]],
    systems: dict[str, list[list[str]]],
    references: Sequence[str],
    language: str,
) -> None:
    for name, trials in systems.items():
        rows.setdefault(name, {})[language] = _mean_scores(trials, references, language)


def _mean_scores(trials: Sequence[Sequence[str]], references: Sequence[str], language: str) -> dict[str, float]:
    scores = [score_reports(texts, references, language) | {"distinct": distinct_ratio(texts)} for texts in trials]
    return {name: float(np.mean([score[name] for score in scores])) for name in scores[0]}


def _text_retrieval(
    reporter: Reporter, columns: dict[str, list[str]], batch_size: int
) -> dict[str, dict[str, dict[str, float]]]:
    """Measures retrieval between languages; pairs that share a text on either side are right for each other."""
    embeds = {language: _embed_texts(reporter, texts, batch_size) for language, texts in columns.items()}
    return {
        f"{first}-{second}": retrieval_recall(
            embeds[first], embeds[second], RECALL_AT, same_text(columns[first], columns[second])
        )
        for first, second in combinations(columns, 2)
    }


def _embed(
    embed: Callable[[Sequence[Any]], dict[str, np.ndarray]], items: Sequence[Any], batch_size: int, label: str
) -> dict[str, np.ndarray]:
    """Runs `embed` in batches with a progress bar and joins what it returns by name."""
    starts = tqdm(range(0, len(items), batch_size), desc=label, unit="batch")
    parts = [embed(items[start : start + batch_size]) for start in starts]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _embed_texts(reporter: Reporter, texts: Sequence[str], batch_size: int) -> np.ndarray:
    return _embed(lambda batch: {"shared": reporter.embed_texts(batch)}, texts, batch_size, "texts")["shared"]


def _select_studies(
    studies: Sequence[Study], languages: Sequence[str], known: Sequence[str], split: str
) -> tuple[list[Study], list[Study]]:
    """Returns the studies to evaluate and those to choose floors from: with images and a report in some language."""
    unknown = sorted(set(languages) - (set(known) & set(LANGUAGES)))
    if unknown or len(set(languages)) != len(languages):
        raise ValueError(f"Unsupported languages {list(languages)}: expected some of {list(known)}, each once.")
    if split == TRAINING_SPLIT:
        raise ValueError(f"The part {split!r} cannot be evaluated: the floors are chosen from its reports.")
    usable = [study for study in studies if study.images and any(code in study.reports for code in languages)]
    evaluated = [study for study in usable if study.split == split]
    training = [study for study in usable if study.split == TRAINING_SPLIT]
    for part, chosen, least in ((split, evaluated, 2), (TRAINING_SPLIT, training, 1)):
        for language in languages:
            count = sum(language in study.reports for study in chosen)
            if count < least:
                raise ValueError(
                    f"Expected at least {least} studies with an image and a report in {language!r} in the part "
                    f"{part!r}, got {count}; parts in the data: {sorted({str(study.split) for study in studies})}."
                )
    return evaluated, training


def render_table(metrics: dict[str, Any]) -> str:
    """Renders metrics as Markdown: the scores of each language, then retrieval.

    Args:
        metrics: As in `metrics.json`; `rows`, `new_patients` and `retrieval` are read, each may be missing.
    """
    tables = []
    if rows := metrics.get("rows"):
        lines = [["language", "reports", *METRICS, "distinct"]]
        for language in dict.fromkeys(code for by_language in rows.values() for code in by_language):
            lines += _score_lines(rows, language)
            if new := metrics.get("new_patients"):
                lines += _score_lines(new["rows"], language, f", new patients ({new['num_studies'][language]})")
        tables.append(_table(lines))
    if retrieval := metrics.get("retrieval"):
        kinds = [(kind, k) for k in RECALL_AT for kind in ("recall", "chance")]
        lines = [["retrieval", "items", *(f"{kind}@{k}" for kind, k in kinds), "median rank"]]
        for name, ways in retrieval.items():
            ends = name.split("-")
            for way, (source, target) in (("forward", ends), ("backward", ends[::-1])):
                found = ways[way]
                numbers = [f"{found[f'{kind}@{k}']:.3f}" for kind, k in kinds]
                lines.append([f"{source} → {target}", str(found["num_items"]), *numbers, f"{found['median_rank']:g}"])
        tables.append(_table(lines))
    return "\n\n".join(tables)


def _score_lines(rows: dict[str, dict[str, dict[str, float]]], language: str, suffix: str = "") -> list[list[str]]:
    return [
        [
            language,
            ROW_TITLES.get(name, name) + suffix,
            *(f"{scores[column]:.3f}" for column in (*METRICS, "distinct")),
        ]
        for name, by_language in rows.items()
        if (scores := by_language.get(language))
    ]


def _table(lines: Sequence[Sequence[str]]) -> str:
    head, *body = lines
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *body))


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes JSON whole or not at all."""
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    os.replace(draft, path)


def _open_output(output_dir: str | Path, run: dict[str, Any]) -> Path:
    """Makes the folder, and refuses one whose predictions come from another model, data or decoding."""
    output = Path(output_dir)
    output.mkdir(parents=True, exist_ok=True)
    run = json.loads(json.dumps(run))
    record = output / RUN
    if record.is_file():
        earlier = json.loads(record.read_text(encoding="utf-8"))
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


def _hash_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _library_versions() -> dict[str, str]:
    from .. import __version__

    versions = {"m3fm": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    return versions | {"numpy": np.__version__, "python": platform.python_version()}


def _command(model: str | Path, data: str | Path, languages: Sequence[str], output: str | Path, options: dict) -> str:
    """Returns the command line that repeats the run; the shipped checkpoint goes without its path."""
    words = ["m3fm", "evaluate", "--task", "report"]
    words += [] if Path(model) == DEFAULT_CHECKPOINT else ["--model", str(model)]
    words += ["--data", str(data), "--language", *languages, "--output", str(output)]
    for name, value in options.items():
        words += [f"--{name.replace('_', '-')}", str(value)] if value is not None else []
    return shlex.join(words)
