# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Run the paper's table: its nine sets, zero-shot, few-shot and full, as far as they are on disk.

Sets, labels and metrics are data: see `recipes/paper.yaml`. `run_paper_table` is what `m3fm evaluate --task paper`
runs.
"""

import contextlib
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import yaml
from tqdm.auto import tqdm

from ..data import FINDINGS, fingerprint, load_studies
from ..training.record import read_record
from .diagnosis import evaluate_diagnosis
from .diagnosis_metrics import MACRO
from .report import ReportMetrics, evaluate_reports
from .reporter import checkpoint_folder, hash_checkpoint
from .resampling import LEVEL
from .runs import FORMAT, METRICS_FILE, NOTICE, command_line, hash_text, library_versions, write_json
from .tables import difference, markdown_table
from .titles import FLOORS, ROW_TITLES, number

RECIPE = Path(__file__).parent / "recipes" / "paper.yaml"
PAPER_FILE, CELL_FILE = "paper.json", "cell.json"
# Image features of a set, which its regimes share.
FEATURES = "features"
TASKS = ("report", "diagnosis")
_TRAINING_RECIPES = Path(__file__).parents[1] / "training" / "recipes"
# Fields of training recipes that name data folders.
_TRAINED_SETS = ("sets", "image_sets", "text_sets", "parallel_sets", "supervised_sets", "memory_sets")
_IMAGES, _TEXTS = "metadata.jsonl", "data.jsonl"


@dataclass(frozen=True)
class PaperSet:
    """Describes one evaluation set; see `recipes/paper.yaml`.

    Attributes:
        name: Of its results folder.
        title: As the table calls it.
        task: "report" or "diagnosis".
        modality: "cxr" or "ct".
        metrics: Metrics to show, the first one for image use; higher is better.
        folders: Folder names to look for to what is to be known about each.
        languages: Of the reports.
        labels: Canonical findings.
        split: The part to evaluate; None: the usual one.
        checkpoints: Regime to the folder of a model trained on this set's pairs.
    """

    name: str
    title: str
    task: str
    modality: str
    metrics: Sequence[str]
    folders: Mapping[str, str | None]
    languages: Sequence[str] = ()
    labels: Sequence[str] = ()
    split: str | None = None
    checkpoints: Mapping[str, str] | None = None


@dataclass(frozen=True)
class PaperRecipe:
    """Holds the sets, the regimes (name to shots per class: 0, a number, "full"), and how checkpoints were trained."""

    sets: Sequence[PaperSet]
    regimes: Mapping[str, int | str]
    training_recipes: Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Options:
    """Holds what is the same for every cell of the table."""

    batch_size: int
    device: str
    seed: int
    num_resamples: int


def run_paper_table(
    model_dir: str | Path,
    data_root: str | Path,
    output_dir: str | Path = "paper",
    recipe: str | Path | None = None,
    batch_size: int = 8,
    device: str = "cpu",
    seed: int = 0,
    num_resamples: int = 1000,
) -> dict[str, Any]:
    """Evaluates a checkpoint on every set of the paper that is found, prints the table, and writes `paper.json`.

    Each cell, a set in a regime, is a run of its own in `output_dir/SET/REGIME`. A cell that is finished, of the same
    weights and data, is read and not run again. A set that cannot be evaluated has its reason in the table, and the
    others go on.

    Args:
        model_dir: A checkpoint folder.
        data_root: Folder of data folders.
        output_dir: Made if missing.
        recipe: A YAML file like `recipes/paper.yaml`; None takes that.
        batch_size: Studies at once.
        device: A torch device.
        seed: Of everything that is drawn: shots, shuffles, resamples.
        num_resamples: Draws of patients for the intervals.

    Returns:
        `cells`: for each its set, regime, `status` ("done", "skipped", "failed"), `reason`, and where done its scores;
        `trained_on`, the sets that the checkpoint was trained on, None if that is not known; and `table`.

    Raises:
        ValueError: If the checkpoint, the data root or the recipe cannot be read.
    """
    model, root, output = checkpoint_folder(model_dir), Path(data_root), Path(output_dir)
    if not root.is_dir():
        raise ValueError(f"{root}: expected the folder that holds the data folders.")
    plan = read_recipe(RECIPE if recipe is None else Path(recipe))
    options = Options(batch_size, device, seed, num_resamples)
    cells: list[dict[str, Any]] = []
    for paper_set in tqdm(plan.sets, desc="paper table", unit="set"):
        cells += _evaluate_set(paper_set, plan, model, root, output, options)
    result = {
        "format": FORMAT,
        "task": "paper",
        "model": model.resolve().name,
        "model_sha256": hash_checkpoint(model),
        "seed": seed,
        "num_resamples": num_resamples,
        "regimes": dict(plan.regimes),
        "trained_on": trained_on(model, plan),
        "cells": cells,
        "versions": library_versions(),
        "command": command_line("paper", model_dir, _command_options(data_root, output_dir, recipe, options)),
        "notice": NOTICE,
    }
    result["table"] = render_paper_table(result)
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / PAPER_FILE, result)
    sys.stdout.write(result["table"] + "\n")
    return result


def _command_options(
    data_root: str | Path, output_dir: str | Path, recipe: str | Path | None, options: Options
) -> dict[str, Any]:
    return {"data": data_root, "output": output_dir, "recipe": recipe} | asdict(options)


def read_recipe(path: Path) -> PaperRecipe:
    """Reads the recipe of a table.

    Raises:
        ValueError: If the file is not such a recipe, saying what is wrong with it.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such recipe; expected a YAML file like {RECIPE.name}.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from None
    if not isinstance(values, dict) or not values.get("sets") or not values.get("regimes"):
        raise ValueError(f"{path}: expected `regimes` and `sets`.")
    for regime, shots in values["regimes"].items():
        if shots != "full" and not (isinstance(shots, int) and shots >= 0):
            raise ValueError(f"{path}: expected 0, a number or 'full' for the regime {regime!r}, got {shots!r}.")
    sets = [_read_set(name, entry, values["regimes"], path) for name, entry in values["sets"].items()]
    return PaperRecipe(sets, values["regimes"], values.get("training_recipes") or {})


def _read_set(name: str, entry: Any, regimes: Iterable[str], path: Path) -> PaperSet:
    known = {field.name for field in fields(PaperSet)} - {"name"}
    if not isinstance(entry, dict) or not entry.keys() <= known:
        wrong = sorted(set(entry) - known) if isinstance(entry, dict) else entry
        raise ValueError(f"{path}, set {name!r}: expected some of {sorted(known)}, got {wrong}.")
    try:
        paper_set = PaperSet(name, **entry)
    except TypeError:
        raise ValueError(f"{path}, set {name!r}: expected title, task, modality, metrics and folders.") from None
    what = {"report": paper_set.languages, "diagnosis": paper_set.labels}.get(paper_set.task)
    if not what or not paper_set.metrics or not isinstance(paper_set.folders, dict):
        raise ValueError(
            f"{path}, set {name!r}: expected a task of {list(TASKS)} with languages or labels, metrics, and folders "
            "with a note or null each."
        )
    for kind, given, allowed in (
        ("labels", paper_set.labels, FINDINGS),
        ("regimes of checkpoints", paper_set.checkpoints or (), list(regimes)),
    ):
        unknown = sorted(set(given) - set(allowed))
        if unknown:
            raise ValueError(f"{path}, set {name!r}: unknown {kind} {unknown}; expected some of {list(allowed)}.")
    return paper_set


def find_folder(paper_set: PaperSet, root: Path) -> tuple[Path | None, str]:
    """Finds the folder of a set, the first with images; without one, says why not."""
    there = [root / name for name in paper_set.folders if (root / name).is_dir()]
    for folder in there:
        if (folder / _IMAGES).is_file():
            return folder, ""
    for folder in there:
        if (folder / _TEXTS).is_file():
            return None, f"{folder.name} holds texts without images"
    if there:
        return None, f"{there[0].name} has no {_IMAGES}"
    return None, f"not on disk: looked for {', '.join(paper_set.folders)}"


def _evaluate_set(
    paper_set: PaperSet, plan: PaperRecipe, model: Path, root: Path, output: Path, options: Options
) -> list[dict[str, Any]]:
    """Returns the cells of a set: one for each regime, or one for all where there is nothing to evaluate."""
    head = {"set": paper_set.name, "title": paper_set.title, "task": paper_set.task, "modality": paper_set.modality}
    folder, reason = find_folder(paper_set, root)
    if folder is None:
        return [head | {"regime": None, "status": "skipped", "reason": reason}]
    head |= {"data": folder.name, "note": paper_set.folders[folder.name]}
    try:
        data_sha256 = _hash_data(folder)
    except (ValueError, OSError) as error:
        return [head | {"regime": None, "status": "failed", "reason": str(error)}]
    cells = []
    for regime, shots in plan.regimes.items():
        cell = head | {"regime": regime, "shots": shots, "metrics": list(paper_set.metrics)}
        checkpoint = _cell_checkpoint(paper_set, regime, shots, model)
        if checkpoint is None:
            reason = "needs a checkpoint trained on its pairs: name one in the recipe (checkpoints)"
            cells.append(cell | {"status": "skipped", "reason": reason})
            continue
        try:
            place = output / paper_set.name / regime
            metrics = _evaluate_cell(paper_set, shots, checkpoint, folder, data_sha256, place, options)
            cells.append(cell | {"status": "done", "seen": _is_seen(paper_set, trained_on(checkpoint, plan))})
            cells[-1] |= _summarize(metrics, paper_set)
        except (ValueError, OSError) as error:
            cells.append(cell | {"status": "failed", "reason": str(error)})
    return cells


def _cell_checkpoint(paper_set: PaperSet, regime: str, shots: int | str, model: Path) -> Path | None:
    given = (paper_set.checkpoints or {}).get(regime)
    if given is not None:
        return Path(given)
    # Diagnosis learns from its shots within the evaluation; a report model has to be trained before.
    return model if paper_set.task == "diagnosis" or shots == 0 else None


def _evaluate_cell(
    paper_set: PaperSet,
    shots: int | str,
    checkpoint: Path,
    folder: Path,
    data_sha256: str,
    place: Path,
    options: Options,
) -> dict[str, Any]:
    """Runs one cell, or reads it where it is finished."""
    asked = {
        "task": paper_set.task,
        "shots": shots,
        "languages": list(paper_set.languages),
        "labels": list(paper_set.labels),
        "split": paper_set.split,
        "seed": options.seed,
        "num_resamples": options.num_resamples,
        "model_sha256": hash_checkpoint(checkpoint),
        "data_sha256": data_sha256,
    }
    record = place / CELL_FILE
    if record.is_file() and json.loads(record.read_text(encoding="utf-8")) == asked:
        return json.loads((place / METRICS_FILE).read_text(encoding="utf-8"))
    # The cell's own table is not the answer that was asked for.
    with contextlib.redirect_stdout(sys.stderr):
        if paper_set.task == "report":
            evaluate_reports(
                checkpoint,
                folder,
                languages=list(paper_set.languages),
                output_dir=place,
                split=paper_set.split,
                batch_size=options.batch_size,
                seed=options.seed,
                device=options.device,
                metrics=ReportMetrics(num_resamples=options.num_resamples),
            )
        else:
            evaluate_diagnosis(
                checkpoint,
                folder,
                labels=list(paper_set.labels),
                shots=shots,
                output_dir=place,
                split=paper_set.split,
                batch_size=options.batch_size,
                seed=options.seed,
                device=options.device,
                num_resamples=options.num_resamples,
                features_dir=place.parent / FEATURES,
            )
    write_json(record, asked)
    return json.loads((place / METRICS_FILE).read_text(encoding="utf-8"))


def _hash_data(folder: Path) -> str:
    """Hashes studies, texts and images, and the rows, which hold labels and parts."""
    rows = (folder / _IMAGES).read_text(encoding="utf-8")
    return hash_text(fingerprint(load_studies(folder)) + hash_text(rows))


def trained_on(model: Path, plan: PaperRecipe) -> list[str] | None:
    """Returns the data folders that a checkpoint was trained on, by name; None where that is not written down.

    It is read from the `training.json` of its training and of the models it goes on from, or from the recipes that
    `training_recipes` names for a checkpoint of this folder name.
    """
    try:
        record = read_record(model)
    except ValueError:
        return None
    if record is not None:
        recipe = record["recipe"]
        base = trained_on(Path(recipe["base"]), plan) if recipe.get("base") else []
        return None if base is None else sorted({*_named_sets(recipe), *base})
    named = plan.training_recipes.get(model.resolve().name)
    if named is None:
        return None
    sets: set[str] = set()
    for name in named:
        path = _TRAINING_RECIPES / f"{name}.yaml"
        if not path.is_file():
            return None
        sets |= _named_sets(yaml.safe_load(path.read_text(encoding="utf-8")))
    return sorted(sets)


def _named_sets(recipe: Mapping[str, Any]) -> set[str]:
    blocks = (recipe, recipe.get("memory") or {})
    return {name for block in blocks for field in _TRAINED_SETS for name in block.get(field) or ()}


def _is_seen(paper_set: PaperSet, sets: Sequence[str] | None) -> bool | None:
    return None if sets is None else any(folder in sets for folder in paper_set.folders)


def _summarize(metrics: dict[str, Any], paper_set: PaperSet) -> dict[str, Any]:
    """Takes the primary metrics of a run out of its `metrics.json`: score, interval, best floor, image use."""
    columns = list(paper_set.languages)
    if paper_set.task == "diagnosis":
        columns = list(paper_set.labels) if len(paper_set.labels) == 1 else [MACRO]
    scores = {}
    for column in columns:
        rows = metrics["rows"]
        scores[column] = {
            "num_studies": metrics["num_studies"].get(column),
            "num_groups": metrics["num_groups"].get(column),
            "model": {name: rows["model"][column].get(name) for name in paper_set.metrics},
            "intervals": {name: metrics["intervals"]["model"][column].get(name) for name in paper_set.metrics},
            "floors": {name: _best_floor(rows, column, name) for name in paper_set.metrics},
            "image_use": metrics["differences"].get("shuffled_images", {}).get(column, {}).get(paper_set.metrics[0]),
        }
    facts = {"model_sha256": metrics["model_sha256"], "split": metrics["split"], "scores": scores}
    if paper_set.task == "diagnosis":
        reasons = metrics.get("skipped", {})
        skipped = {name: reasons[name] for name in paper_set.labels if name in reasons}
        facts |= {"labels_scored": metrics["labels"], "labels_skipped": skipped}
    return facts


def _best_floor(rows: dict[str, Any], column: str, metric: str) -> dict[str, Any] | None:
    floors = {
        name: rows[name][column][metric]
        for name in FLOORS
        if rows.get(name, {}).get(column, {}).get(metric) is not None
    }
    best = max(floors, key=lambda name: floors[name], default=None)
    return None if best is None else {"row": best, "score": floors[best]}


def render_paper_table(result: dict[str, Any]) -> str:
    """Renders what `run_paper_table` returns as Markdown: reports, diagnosis, and what was not evaluated, by name."""
    blocks = [f"{result['model']} on the evaluation sets of the paper."]
    cells = result["cells"]
    done = [cell for cell in cells if cell["status"] == "done"]
    for task, column in (("report", "language"), ("diagnosis", "label")):
        chosen = [cell for cell in done if cell["task"] == task]
        if chosen:
            blocks.append(_score_table(chosen, column))
    if done:
        blocks.append(
            f"A cell is the model's score [its {LEVEL:.0%} interval, patients resampled] (the best of the floors, by "
            "name). Image use is the model's first metric minus the same on shuffled images."
        )
        blocks.append(_training_note(result, done))
    notes = list(dict.fromkeys(f"{cell['title']} ({cell['data']}): {cell['note']}." for cell in done if cell["note"]))
    notes += list(dict.fromkeys(note for cell in done if (note := _skipped_note(cell))))
    blocks += ["\n".join(f"- {note}" for note in notes)] if notes else []
    missing = [cell for cell in cells if cell["status"] != "done"]
    if missing:
        lines = [["not evaluated", "regime", "", "reason"]]
        lines += [
            [cell["title"], _words(cell["regime"] or "all"), cell["status"], _one_line(cell["reason"])]
            for cell in missing
        ]
        blocks.append(markdown_table(lines))
    blocks.append(result["notice"])
    return "\n\n".join(blocks)


def _score_table(cells: Sequence[dict[str, Any]], column: str) -> str:
    metrics = list(dict.fromkeys(name for cell in cells for name in cell["metrics"]))
    lines = [["set", "regime", column, "part", "studies (groups)", *metrics, "image use", "trained on this set"]]
    for cell in cells:
        for name, scores in cell["scores"].items():
            lines.append(
                [
                    cell["title"],
                    _words(cell["regime"]) + (f" ({cell['shots']})" if cell["regime"] == "few_shot" else ""),
                    f"{MACRO} of {len(cell['labels_scored'])}" if name == MACRO else name,
                    cell["split"],
                    f"{scores['num_studies']} ({scores['num_groups']})",
                    *(_score_cell(scores, metric) for metric in metrics),
                    difference(scores["image_use"]),
                    {True: "yes", False: "no", None: "unknown"}[cell["seen"]],
                ]
            )
    return markdown_table(lines)


def _score_cell(scores: dict[str, Any], metric: str) -> str:
    value, interval, floor = (scores[key].get(metric) for key in ("model", "intervals", "floors"))
    text = number(value)
    text += f" [{number(interval[0])}, {number(interval[1])}]" if value is not None and interval else ""
    return text + (f" ({number(floor['score'])} {ROW_TITLES[floor['row']]})" if floor else "")


def _training_note(result: dict[str, Any], done: Sequence[dict[str, Any]]) -> str:
    if result["trained_on"] is None:
        return "What this checkpoint was trained on is not written down beside it: a set may have been part of it."
    seen = list(dict.fromkeys(cell["title"] for cell in done if cell["seen"]))
    text = f"{result['model']} was trained on the training parts of {', '.join(result['trained_on'])}."
    if seen:
        text += f" Zero-shot on {', '.join(seen)} is therefore not zero-shot on a set never seen."
    return text


def _skipped_note(cell: dict[str, Any]) -> str:
    """Says which labels of a set the mean is not over, and why."""
    missing = [f"{name} ({_one_line(why)})" for name, why in cell.get("labels_skipped", {}).items()]
    return f"{cell['title']}, {_words(cell['regime'])}: without {'; '.join(missing)}." if missing else ""


def _words(name: str) -> str:
    return name.replace("_", "-" if name.endswith("_shot") else " ")


def _one_line(text: str) -> str:
    """Takes out of a message what would end a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")
