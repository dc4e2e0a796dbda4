# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Measure diagnosis with all labels: heads on image, report or both, beside zero-shot, a probe and a small CNN.

For each set, on its validation part, with no patient or paper of it in training:

- zero-shot: the checkpoint and the phrases of the labels, no label seen;
- image, report, fused: `M3FMForImageClassification` trained by a recipe (`m3fm train classify-small`);
- linear probe: logistic regression on the untouched image tower, its penalty by cross-validation;
- small CNN: five blocks from scratch on the same images, early-stopped on a fifth of the training patients.

What is trained once is not trained again. A markdown table is printed; everything goes to JSON with `--output`.

    python benchmarks/diagnosis.py --runs runs/diagnosis --output diagnosis.json
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from small_cnn import load_pixels, predict_cnn, train_cnn
from transfer import only_auroc, zero_shot
from transformers import AutoModel, AutoModelForImageClassification, AutoProcessor

import m3fm
from m3fm.data import Study
from m3fm.evaluation.diagnosis_metrics import MACRO, LabelMeasurement, PanelMeasurement
from m3fm.evaluation.probes import ZeroShot, fit_heads
from m3fm.evaluation.reporter import hash_checkpoint
from m3fm.evaluation.resampling import cluster_weights, compare_rows
from m3fm.evaluation.runs import NOTICE, group_numbers, library_versions, write_json
from m3fm.evaluation.tables import difference, markdown_table, number
from m3fm.training.classify import (
    ClassifyCollator,
    ClassifyRecipe,
    ClassifyValidation,
    load_examples,
    prepare_features,
)
from m3fm.training.features import FeatureCache
from m3fm.training.recipe import find_recipe, run_recipe
from m3fm.training.record import read_record
from m3fm.training.supervision import Examples

# Set to its labels; none named: all that validation has often enough.
SETS: dict[str, list[str]] = {
    "tb_shenzhen_montgomery_128": ["tuberculosis"],
    "kermany_pneumonia_224": ["pneumonia"],
    "nih_chestxray14_sample": [],
    "covid_chestxray": ["covid_19"],
    "cov_ctr": ["covid_19"],
}
FEATURES = ("image", "report", "fused")
# Rows in the order of the table; the others are compared with the first.
ROWS = {
    "image": "full supervision, image",
    "report": "full supervision, generated report",
    "fused": "full supervision, fused",
    "zero_shot": "zero-shot",
    "linear_probe_tower": "linear probe, untouched DINOv2-small",
    "small_cnn": "small CNN from scratch",
}
# A label is scored where validation has this many studies on either side.
MINIMUM = 5


def train_head(name: str, labels: Sequence[str], features: str, options: argparse.Namespace) -> Path:
    """Trains a head by the recipe, or finds it trained; returns its folder."""
    folder = options.runs / name / features
    changes = {
        "data_root": str(options.data),
        "base": "" if options.model == m3fm.DEFAULT_CHECKPOINT else str(options.model),
        "sets": [name],
        "labels": list(labels),
        "features": features,
        "feature_cache": str(options.features),
        "report_cache": str(options.reports),
        "output_dir": str(folder),
        "disable_tqdm": True,
    }
    if read_record(folder) is None:
        words = [word for key, value in changes.items() for word in (f"--{key}", json.dumps(value))]
        run_recipe(find_recipe(options.recipe), words)
    return folder


def recipe_of(folder: Path) -> ClassifyRecipe:
    """Returns the recipe that a finished run was made by."""
    return ClassifyRecipe(**read_record(folder)["recipe"])


@torch.inference_mode()
def predict_head(folder: Path, base: Path, held: Examples, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Returns the probabilities (N,) that a trained folder gives, by label."""
    recipe = recipe_of(folder)
    model = AutoModelForImageClassification.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    cache = FeatureCache(Path(recipe.feature_cache), model.model.vision_model, processor.image_processor)
    (held,) = prepare_features(recipe, model, processor, base, cache, (held,))
    return ClassifyValidation(ClassifyCollator(held, recipe, cache, processor, False), names).probabilities(model)


@torch.inference_mode()
def embed_images(model: torch.nn.Module, cache: FeatureCache, studies: Sequence[Study]) -> dict[str, np.ndarray]:
    """Returns "shared" (N, D), and "tower" (N, 2 C): first and mean token, mean over the images of a study."""
    cache.fill(studies)
    shared, tower = [], []
    for study in studies:
        tokens = torch.from_numpy(cache.get(study)).float()  # (N, S, C)
        shared.append(model.get_image_features(vision_features=tokens[None])[0])
        tower.append(torch.cat([tokens[:, 0], tokens.mean(dim=1)], dim=-1).mean(dim=0))
    return {"shared": torch.stack(shared).numpy(), "tower": torch.stack(tower).numpy()}


def save_cnn(path: Path, image_processor: Any, options: argparse.Namespace, train: Examples, held: Examples) -> None:
    """Trains the small CNN, and stores its probabilities (N, L) of the validation examples."""
    pixels = [load_pixels(part.studies, image_processor, options.cnn_side) for part in (train, held)]
    cnn, best_epoch = train_cnn(pixels[0], train.labels, train.studies, options.seed, epochs=40, patience=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, probabilities=predict_cnn(cnn, pixels[1]), best_epoch=best_epoch)


def predict_all(
    name: str, options: argparse.Namespace
) -> tuple[dict[str, dict[str, np.ndarray]], Examples, list[str], dict[str, Any]]:
    """Returns row -> label -> probabilities (N,), the validation examples, the scored labels, and facts."""
    folders = {features: train_head(name, SETS[name], features, options) for features in options.heads}
    recipe = ClassifyRecipe(data_root=str(options.data), sets=[name], labels=SETS[name])
    train, held, labels, facts = load_examples(recipe)
    names = [label.name for label in labels]
    predicted = {row: predict_head(folder, options.model, held, names) for row, folder in folders.items()}

    processor = AutoProcessor.from_pretrained(options.model)
    model = AutoModel.from_pretrained(options.model, dtype=torch.float32).eval()
    cache = FeatureCache(options.features, model.vision_model, processor.image_processor)
    training, evaluated = (embed_images(model, cache, part.studies) for part in (train, held))
    phrases: ZeroShot = zero_shot(model, processor, labels)
    predicted["zero_shot"] = phrases.predict(evaluated)
    annotations = dict(zip(names, train.labels.T, strict=True))
    groups = group_numbers(train.studies)
    (probe,) = fit_heads("tower", training["tower"], annotations, groups, "full", [options.seed])
    predicted["linear_probe_tower"] = probe.predict(evaluated)
    if options.cnn_side:
        stored = options.runs / name / f"small_cnn-{options.cnn_side}-{options.seed}.npz"
        if not stored.is_file():
            save_cnn(stored, processor.image_processor, options, train, held)
        with np.load(stored) as arrays:
            predicted["small_cnn"] = dict(zip(names, arrays["probabilities"].T, strict=True))
            facts["small_cnn"] = {"best_epoch": int(arrays["best_epoch"]), "side": options.cnn_side}
    scored = [
        label
        for label, values in zip(names, held.labels.T, strict=True)
        if min((values == 1).sum(), (values == 0).sum()) >= MINIMUM
    ]
    facts |= {"train_studies": len(train.studies), "train_patients": len(set(groups))}
    return {row: predicted[row] for row in ROWS if row in predicted}, held, scored, facts


def score(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Scores every row on the validation part of a set; intervals and differences are over resampled patients."""
    predicted, held, names, facts = predict_all(name, options)
    every = list(predicted["linear_probe_tower"])
    truth = {label: values for label, values in zip(every, held.labels.T, strict=True) if label in names}
    trials = {}
    for row, values in predicted.items():
        measured = {label: LabelMeasurement(truth[label], values[label], values[label] >= 0.5) for label in names}
        trials[row] = [[PanelMeasurement(measured, names)]]
    groups = group_numbers(held.studies)
    weights = cluster_weights(groups, options.num_resamples, options.seed)
    rows, intervals, differences = (only_auroc(compared) for compared in compare_rows(trials, weights))
    return {
        **facts,
        "validation_studies": len(held.studies),
        "validation_patients": len(set(groups)),
        "labels": {label: [int((values == 1).sum()), int((values == 0).sum())] for label, values in truth.items()},
        "rows": rows,
        "intervals": intervals,
        "differences": differences,
    }


def render(sets: Mapping[str, Any]) -> str:
    """Renders AUROCs with intervals: a line a set and row, the mean over its labels where there are several."""
    lines = [["set", "labels (with / without)", "train", "system", "AUROC [95 %]", "image head minus this [95 %]"]]
    for name, scores in sets.items():
        column = MACRO if len(scores["labels"]) > 1 else next(iter(scores["labels"]))
        counts = ", ".join(f"{label} {with_it} / {without}" for label, (with_it, without) in scores["labels"].items())
        for row, columns in scores["rows"].items():
            low, high = scores["intervals"][row][column]["auroc"]
            against = scores["differences"].get(row, {}).get(column, {}).get("auroc")
            value = f"{number(columns[column]['auroc'])} [{number(low)}, {number(high)}]"
            lines.append([name, counts, str(scores["train_studies"]), ROWS[row], value, difference(against)])
    return markdown_table(lines)


def main() -> None:
    """Reads the command line, trains what is missing, scores, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=m3fm.DEFAULT_CHECKPOINT, help="checkpoint folder")
    parser.add_argument("--recipe", default="classify-small", help="recipe of full supervision")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder that holds the sets")
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS))
    parser.add_argument("--heads", nargs="+", choices=FEATURES, default=list(FEATURES))
    parser.add_argument("--features", type=Path, default=Path("runs/features"), help="cached image tokens")
    parser.add_argument("--reports", type=Path, default=Path("runs/reports"), help="cached generated reports")
    parser.add_argument("--runs", type=Path, default=Path("runs/diagnosis"), help="where trained heads are kept")
    parser.add_argument("--cnn-side", type=int, default=64, help="pixels of the small CNN's images; 0 leaves it out")
    parser.add_argument("--num-resamples", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    recipe = yaml.safe_load(find_recipe(options.recipe).read_text(encoding="utf-8"))
    sets = {name: score(name, options) for name in options.sets}
    result = {
        "notice": NOTICE,
        "model": options.model.resolve().name,
        "model_sha256": hash_checkpoint(options.model),
        "recipe": recipe,
        "split": "validation, no patient or paper of which is in training",
        "minimum_per_class": MINIMUM,
        "cnn_side": options.cnn_side,
        "num_resamples": options.num_resamples,
        "seed": options.seed,
        "versions": library_versions(),
        "sets": sets,
        "table": render(sets),
    }
    print(result["table"])
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.output, result)


if __name__ == "__main__":
    main()
