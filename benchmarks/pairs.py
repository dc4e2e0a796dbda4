# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Measure stage 3: image-report pairs at 1, 10 and 100 % of a set, full or by LoRA, with image tokens or without.

Each run starts from the same writer and is scored on the validation part of the set, beside that writer and one
constant report; "shuffled" scores the reports of one study against those of another, ten times, and what a system is
above it comes from its image. A run that was stopped goes on, one that is finished is not run again; what is finished
goes to JSON with `--output`, and a markdown table is printed. Options choose what is run now.

    python benchmarks/pairs.py --runs runs/pairs --output model_cards/results/pairs.json
"""

import argparse
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoProcessor

import m3fm
from m3fm import M3FMForReportGeneration
from m3fm.data import Study, load_studies
from m3fm.data.studies import training_part
from m3fm.evaluation.baselines import derangement, select_constant_report
from m3fm.evaluation.clinical_metrics import ClinicalScorer
from m3fm.evaluation.resampling import point_scores
from m3fm.evaluation.runs import NOTICE, library_versions, write_json
from m3fm.evaluation.tables import markdown_table, number
from m3fm.training.features import FeatureCache
from m3fm.training.pairs import PairsValidation
from m3fm.training.recipe import find_recipe, run_recipe
from m3fm.training.record import read_record
from m3fm.training.study_images import CachedTokens
from m3fm.training.write import score_texts, validation_studies

# Of each share of the set: many passes over few studies, few over many.
STEPS = {0.01: 30, 0.1: 60, 1.0: 210}
MODES: dict[str, dict[str, Any]] = {
    "full": {"decoder_training": "full", "learning_rate": 1e-4},
    "lora": {"decoder_training": "lora", "learning_rate": 1e-3},
    # Embeddings of images as they are, which the decoder has never read, and the way to them trained along.
    "direct": {
        "decoder_training": "full",
        "image_training": "projection",
        "through_memory": False,
        "learning_rate": 3e-4,
    },
}
TITLES = {"full": "decoder", "lora": "decoder by LoRA", "direct": "decoder and projection, no memory"}
# All three at the whole set, the first two at every share of it.
SHARED_MODES = ("full", "lora")
TOKENS = (0, 8)
# A fresh projector has farther to go than a trained decoder.
PROJECTOR_RATE = 1e-3
DRAWS = 10
COLUMNS = ("bleu_4", "bleu_4_shuffled", "rouge_l", "finding_f1", "finding_f1_shuffled", "distinct")


def train(name: str, fraction: float, mode: str, tokens: int, options: argparse.Namespace) -> None:
    """Runs stage 3; does nothing where that is done."""
    folder = options.runs / name
    if read_record(folder) is not None:
        return
    changes = {
        "base": str(options.base),
        "data_root": str(options.data.parent),
        "sets": {options.data.name: 1},
        "validation_set": "",
        "feature_cache": str(options.features),
        "fraction": fraction,
        "image_tokens": tokens,
        "learning_rates": {"token_projector": PROJECTOR_RATE / MODES[mode]["learning_rate"]} if tokens else {},
        **MODES[mode],
        "output_dir": str(folder),
        "max_steps": STEPS[fraction],
        "eval_strategy": "no",
        "save_steps": 30,
    }
    overrides = [word for key, value in changes.items() for word in (f"--{key}", json.dumps(value))]
    run_recipe(options.recipe, overrides)


def write_reports(folder: Path, studies: Sequence[Study], options: argparse.Namespace) -> dict[str, list[str]]:
    """Returns a checkpoint's reports of the studies, by language."""
    processor = AutoProcessor.from_pretrained(folder)
    model = M3FMForReportGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    cache = FeatureCache(options.features, model.model.vision_model, processor.image_processor)
    cache.fill(studies)
    languages = model.config.languages
    validation = PairsValidation(studies, CachedTokens(cache), processor, languages, max_new_tokens=200)
    return {language: validation.write(model, language) for language in languages}


def score(texts: Sequence[str], studies: Sequence[Study], language: str) -> dict[str, float]:
    """Scores reports, and the same reports given to other studies."""
    clinical = ClinicalScorer([study.reports[language] for study in studies], language)

    def scores_of(reports: list[str]) -> dict[str, float]:
        named = score_texts(reports, studies, language)
        scores = {name.removesuffix(f"_{language}"): value for name, value in named.items()}
        return scores | {"finding_f1": point_scores(clinical.measure(reports), len(studies))["finding_f1_micro"]}

    orders = [derangement(len(texts), seed) for seed in range(DRAWS)]
    shuffled = [scores_of([texts[place] for place in order]) for order in orders]
    return scores_of(list(texts)) | {
        f"{name}_shuffled": float(np.mean([each[name] for each in shuffled])) for name in ("bleu_4", "finding_f1")
    }


def render(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Renders a line a system and language."""
    lines = [["studies", "trained", "image tokens", "language", *(name.replace("_", " ") for name in COLUMNS)]]
    for row in rows.values():
        for language, scores in row["scores"].items():
            cells = [number(scores[name]) for name in COLUMNS]
            lines.append([str(row["studies"]), row["trained"], str(row["image_tokens"]), language, *cells])
    return markdown_table(lines)


def scored(name: str, folder: Path, studies: Sequence[Study], options: argparse.Namespace) -> dict[str, Any]:
    """Returns the scores of a checkpoint, by language; kept beside its folder."""
    path = options.runs / f"{name}-scores.json"
    if not path.is_file():
        written = write_reports(folder, studies, options)
        write_json(path, {language: score(texts, studies, language) for language, texts in written.items()})
    return json.loads(path.read_text(encoding="utf-8"))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Trains what was asked for and is missing, and scores what is there."""
    studies = validation_studies(str(options.data.parent), options.data.name, ["en", "zh"])
    grid = {
        f"{fraction:g}-{mode}-{tokens}": (fraction, mode, tokens)
        for fraction, mode, tokens in itertools.product(STEPS, MODES, TOKENS)
        if fraction == 1 or mode in SHARED_MODES
    }
    for name, (fraction, mode, tokens) in grid.items():
        if fraction in options.fractions and mode in options.modes and tokens in options.image_tokens:
            train(name, fraction, mode, tokens, options)
    constant = {}
    for language in ("en", "zh"):
        reports = [study.reports[language] for study in training_part(load_studies(options.data)) if study.reports]
        chosen = reports[select_constant_report(reports, language)]
        constant[language] = score([chosen] * len(studies), studies, language)
    rows: dict[str, dict[str, Any]] = {
        "constant": {"studies": "-", "trained": "nothing: one report", "image_tokens": "-", "scores": constant},
        "base": {"studies": 0, "trained": "text alone", "image_tokens": 0},
    }
    rows["base"]["scores"] = scored("base", options.base, studies, options)
    records = {name: read_record(options.runs / name) for name in grid}
    for name, (_, mode, tokens) in grid.items():
        if (record := records[name]) is None:
            continue
        rows[name] = {
            "studies": sum(each["studies"] for each in record["sets"].values()),
            "trained": TITLES[mode],
            "image_tokens": tokens,
            "steps": record["steps"],
            "epochs": record["epochs"],
            "trained_parameters": record["trained_parameters"],
            "scores": scored(name, options.runs / name, studies, options),
        }
    missing = [name for name, record in records.items() if record is None]
    return {"validation_studies": len(studies), "not_run": missing, "rows": rows, "table": render(rows)}


def main() -> None:
    """Reads the command line, trains what is missing, scores what is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="pairs-small", help="a recipe of stage 3")
    parser.add_argument("--base", type=Path, default=Path(m3fm.DEFAULT_CHECKPOINT), help="the writer to start from")
    parser.add_argument("--data", type=Path, default=Path("../shared/data/cov_ctr"), help="folder of the set")
    parser.add_argument("--features", type=Path, default=Path("runs/features"), help="cached image tokens")
    parser.add_argument("--runs", type=Path, default=Path("runs/pairs"), help="where the runs are kept")
    parser.add_argument("--fractions", type=float, nargs="*", choices=list(STEPS), default=list(STEPS))
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    parser.add_argument("--image-tokens", type=int, nargs="+", choices=TOKENS, default=list(TOKENS))
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    options.recipe = find_recipe(options.recipe)
    result = {
        "notice": NOTICE,
        "steps": {f"{fraction:g}": steps for fraction, steps in STEPS.items()},
        "modes": MODES,
        "draws": DRAWS,
        "versions": library_versions(),
        **measure(options),
    }
    print(result["table"])
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.output, result)


if __name__ == "__main__":
    main()
