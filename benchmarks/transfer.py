# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Measure transfer: diagnose a set zero-shot whose images, labels and reports were left out of stage 1.

Trains stage 1 once on every set and once without each, all with the same recipe and number of steps, and scores the
validation part of each set under both. A run that was stopped goes on, one that is finished is not run again; several
processes may share the work by `--leave-out`. What the finished runs give goes to JSON with `--output`, and a markdown
table is printed.

    python benchmarks/transfer.py --runs runs/transfer --output transfer.json
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from transformers import AutoModel, AutoProcessor

from m3fm.data import Study, load_studies
from m3fm.diagnosis_m3fm import mean_phrases
from m3fm.evaluation.diagnosis_metrics import MACRO, LabelMeasurement, PanelMeasurement, by_column
from m3fm.evaluation.label_file import Label, annotate, default_label
from m3fm.evaluation.probes import ZeroShot
from m3fm.evaluation.resampling import cluster_weights, compare_rows
from m3fm.evaluation.runs import NOTICE, group_numbers, library_versions, write_json
from m3fm.evaluation.tables import difference, markdown_table, number
from m3fm.training.features import FeatureCache
from m3fm.training.recipe import find_recipe, run_recipe
from m3fm.training.record import read_record

# Where nothing is left out.
NOTHING = "all"
# A label is scored where it has this many studies on either side.
MINIMUM = 5


def train(recipe: Path, left_out: str, folder: Path, steps: int, options: argparse.Namespace) -> None:
    """Trains stage 1 without a set; does nothing where that is done.

    Raises:
        ValueError: If the folder holds a run of another length or recipe.
    """
    record = read_record(folder)
    if record is not None:
        done = record["steps"]
        if done != steps:
            raise ValueError(f"{folder} holds a run of {done} steps, not {steps}: expected another folder of runs.")
        return
    values = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    sets = {name: repeats for name, repeats in values["image_sets"].items() if name != left_out}
    # An id to leave out must be that of a study that is there.
    ids = {study.study_id for name in sets for study in load_studies(options.data / name)}
    changes = {
        "data_root": str(options.data),
        "image_sets": sets,
        "exclude": [each for each in values["exclude"] if each in ids],
        "feature_cache": str(options.features),
        "output_dir": str(folder),
        "max_steps": steps,
        "eval_steps": steps,
        "save_steps": 20,
    }
    run_recipe(recipe, [word for name, value in changes.items() for word in (f"--{name}", json.dumps(value))])


@torch.inference_mode()
def diagnose(checkpoint: Path, studies: Sequence[Study], labels: Sequence[Label], features: Path) -> dict[str, Any]:
    """Returns the zero-shot probability (N,) of each label, its phrases in all languages."""
    processor = AutoProcessor.from_pretrained(checkpoint)
    model = AutoModel.from_pretrained(checkpoint, dtype=torch.float32).eval()
    cache = FeatureCache(features, model.vision_model, processor.image_processor)
    cache.fill(studies)
    images = np.concatenate(
        [model.get_image_features(vision_features=torch.from_numpy(cache.get(s)[None]).float()) for s in studies]
    )

    return zero_shot(model, processor, labels).predict({"shared": images})


@torch.inference_mode()
def zero_shot(model: torch.nn.Module, processor: Any, labels: Sequence[Label]) -> ZeroShot:
    """Returns the zero-shot system of a checkpoint: a label is the mean of its phrases in all languages."""

    def embed(texts: Sequence[str]) -> np.ndarray:
        inputs = processor(text=list(texts), return_tensors="pt")
        return model.get_text_features(inputs["input_ids"], inputs["attention_mask"]).numpy()

    def mean_embeddings(kind: str) -> np.ndarray:
        languages = model.config.languages
        return mean_phrases([[t for code in languages for t in getattr(label, kind)[code]] for label in labels], embed)

    names = [label.name for label in labels]
    present, absent = mean_embeddings("present"), mean_embeddings("absent")
    return ZeroShot(names, present, absent, float(model.logit_scale.exp()), exclusive=False)


def scored_labels(studies: Sequence[Study]) -> list[Label]:
    """Returns the labels that have enough studies with and without them."""
    found = sorted({finding for study in studies for finding in study.findings or {}})
    labels = [default_label(finding) for finding in found]
    return [
        label
        for label in labels
        if min((annotate(studies, label) == 1).sum(), (annotate(studies, label) == 0).sum()) >= MINIMUM
    ]


def score(name: str, runs: Mapping[str, Path], options: argparse.Namespace) -> dict[str, Any]:
    """Scores the validation part of a set by each run: rows, intervals and paired differences of the AUROC."""
    studies = [s for s in load_studies(options.data / name) if s.split == "validation" and s.findings and s.images]
    labels = scored_labels(studies)
    names = [label.name for label in labels]
    trials = {}
    for row, folder in runs.items():
        predicted = diagnose(folder, studies, labels, options.features)
        measured = {
            label.name: LabelMeasurement(annotate(studies, label), predicted[label.name], predicted[label.name] >= 0.5)
            for label in labels
        }
        trials[row] = [[PanelMeasurement(measured, names)]]
    weights = cluster_weights(group_numbers(studies), options.num_resamples, options.seed)
    rows, intervals, differences = (
        {
            row: {column: {"auroc": values["auroc"]} for column, values in by_column(scores).items()}
            for row, scores in x.items()
        }
        for x in compare_rows(trials, weights)
    )
    truth = {label.name: annotate(studies, label) for label in labels}
    counts = {each: [int((values == 1).sum()), int((values == 0).sum())] for each, values in truth.items()}
    return {"labels": counts, "rows": rows, "intervals": intervals, "differences": differences}


def only_auroc(compared: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Returns row -> label -> {"auroc": value} of what is known of each row."""
    return {
        row: {column: {"auroc": values["auroc"]} for column, values in by_column(scores).items()}
        for row, scores in compared.items()
    }


def render(sets: Mapping[str, Any]) -> str:
    """Renders a line a set and label."""
    lines = [["set", "label", "with / without", "all sets", "without this set", "all minus without"]]
    for name, scores in sets.items():
        columns = [*scores["labels"]] + ([MACRO] if len(scores["labels"]) > 1 else [])
        for column in columns:
            counts = " / ".join(map(str, scores["labels"].get(column, ["", ""]))) if column != MACRO else ""
            cells = []
            for row in (NOTHING, "left_out"):
                low, high = scores["intervals"][row][column]["auroc"]
                cells.append(f"{number(scores['rows'][row][column]['auroc'])} [{number(low)}, {number(high)}]")
            cells.append(difference(scores["differences"]["left_out"][column]["auroc"]))
            lines.append([name, column, counts, *cells])
    return markdown_table(lines)


def main() -> None:
    """Reads the command line, trains what is missing, scores what is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="align-small", help="a recipe of stage 1")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder that holds the sets")
    parser.add_argument("--features", type=Path, default=Path("runs/features"), help="cached image tokens")
    parser.add_argument("--runs", type=Path, default=Path("runs/transfer"), help="where the runs are kept")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--leave-out", nargs="*", help=f"sets to run without ({NOTHING!r} for none); default: all")
    parser.add_argument("--num-resamples", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    recipe = find_recipe(options.recipe)
    sets = list(yaml.safe_load(recipe.read_text(encoding="utf-8"))["image_sets"])
    wanted = [NOTHING, *sets] if options.leave_out is None else options.leave_out
    if unknown := sorted(set(wanted) - {NOTHING, *sets}):
        parser.error(f"--leave-out got {unknown}, expected some of {[NOTHING, *sets]}")
    for left_out in wanted:
        train(recipe, left_out, options.runs / left_out, options.steps, options)
    finished = [name for name in (NOTHING, *sets) if read_record(options.runs / name) is not None]
    if NOTHING not in finished:
        return
    scores = {
        name: score(name, {NOTHING: options.runs / NOTHING, "left_out": options.runs / name}, options)
        for name in finished
        if name != NOTHING
    }
    result = {
        "notice": NOTICE,
        "recipe": recipe.name,
        "steps": options.steps,
        "not_run": [name for name in sets if name not in finished],
        "num_resamples": options.num_resamples,
        "seed": options.seed,
        "versions": library_versions(),
        "sets": scores,
        "table": render(scores),
    }
    print(result["table"])
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.output, result)


if __name__ == "__main__":
    main()
