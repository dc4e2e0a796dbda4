# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Measure what a checkpoint learns from text alone: a house style, and a language that it has never seen.

- House style: the training reports of a set, as a text file without images; reports of the set's validation images
  before and after. Beside them the two halves of an adaptation alone (memory, decoder), another temperature of the
  memory, what the reports score against those of other studies (`shuffled`: what style alone gives), and the best
  constant report.
  The second temperature's default is the best of three on the validation images of the default set, and the way the
  memory is made was chosen there too: those rows are no estimate for another site.
- A made-up language: English reports in which each letter stands for another, and parallel text made by that rule.
  Reports of images in it are read back into English letters, and scored beside the English ones.

Prints Markdown tables; `--output` writes JSON.
"""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoProcessor

from m3fm import DEFAULT_CHECKPOINT, M3FMForReportGeneration
from m3fm.data import Study, load_studies
from m3fm.data.studies import training_part
from m3fm.evaluation.baselines import derangement, select_constant_report
from m3fm.evaluation.runs import NOTICE, library_versions, write_json
from m3fm.evaluation.tables import markdown_table
from m3fm.evaluation.text_metrics import distinct_ratio, score_reports
from m3fm.training.features import FeatureCache
from m3fm.training.recipe import find_recipe, run_recipe
from m3fm.training.write import WriteValidation

METRICS = ("bleu_1", "bleu_4", "rouge_l")
LANGUAGE_SET, CODE = "cov_ctr", "qx"
_PLAIN, _CHANGED = "aeioubcdfghjklmnpqrstvwxyz", "eiouacdfghjklmnpqrstvwxyzb"
TO_MADE_UP = str.maketrans(_PLAIN + _PLAIN.upper(), _CHANGED + _CHANGED.upper())
FROM_MADE_UP = str.maketrans(_CHANGED + _CHANGED.upper(), _PLAIN + _PLAIN.upper())
# What reports of a set say of a healthy chest, if it is one word.
NORMAL = {"tb_shenzhen_montgomery_128": "normal"}
SHUFFLES = 20


@dataclass
class Images:
    """The validation images of a set, with English reports, and its training reports."""

    name: str
    studies: list[Study]
    training: list[str]
    validation: WriteValidation

    def scores(self, written: Sequence[str]) -> dict[str, float]:
        """Scores reports, and the same reports given to other studies."""
        references = [study.reports["en"] for study in self.studies]
        found = score_reports(list(written), references, "en", metrics=METRICS) | {"distinct": distinct_ratio(written)}
        shuffled = [self._paired([written[place] for place in derangement(len(written), s)]) for s in range(SHUFFLES)]
        own = self._paired(written)
        return found | own | {f"shuffled_{key}": sum(each[key] for each in shuffled) / SHUFFLES for key in own}

    def _paired(self, written: Sequence[str]) -> dict[str, float]:
        references = [study.reports["en"] for study in self.studies]
        scores = {"rouge_l": score_reports(list(written), references, "en", metrics=("rouge_l",))["rouge_l"]}
        word = NORMAL.get(self.name)
        if word:
            said = [word in text.lower() for text in written]
            true = [word in text.lower() for text in references]
            sides = [[a for a, b in zip(said, true, strict=True) if b is side] for side in (True, False)]
            scores["normal_balanced_accuracy"] = (
                sum(sides[0]) / len(sides[0]) + 1 - sum(sides[1]) / len(sides[1])
            ) / 2
        return scores


def load_images(name: str, options: argparse.Namespace, model: M3FMForReportGeneration, processor: Any) -> Images:
    """Reads a set and computes the tokens of its validation images."""
    everything = load_studies(options.data / name)
    studies = [each for each in everything if each.split == "validation" and each.images and "en" in each.reports]
    cache = FeatureCache(options.work / "features", model.model.vision_model, processor.image_processor)
    cache.fill(studies)
    training = [each.reports["en"] for each in training_part(everything) if "en" in each.reports]
    validation = WriteValidation(studies, ("en",), cache, processor, max_new_tokens=options.max_length)
    return Images(name, studies, training, validation)


def adapt(options: argparse.Namespace, name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Runs the recipe that ships, with some settings of its own; returns the facts with the seconds it took."""
    folder = options.work / name
    words = {"base": options.base, "output_dir": folder, "disable_tqdm": "true", "report_to": "none", **values}
    start = time.perf_counter()
    overrides = [word for key, value in words.items() for word in (f"--{key}", str(value))]
    return run_recipe(find_recipe("adapt-text"), overrides) | {"seconds": time.perf_counter() - start}


def load(folder: str | Path) -> M3FMForReportGeneration:
    """Loads a checkpoint."""
    return M3FMForReportGeneration.from_pretrained(folder, dtype=torch.float32).eval()


def house_style(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Adapts the base to the reports of a set, and scores reports of its images."""
    base = load(options.base)
    images = load_images(name, options, base, AutoProcessor.from_pretrained(options.base))
    constant = images.training[select_constant_report(images.training, "en")]
    rows = {
        "constant report": images.scores([constant] * len(images.studies)),
        "base": images.scores(images.validation.write(base, "en")),
    }
    texts = options.work / f"{name}.txt"
    texts.write_text("\n".join(" ".join(text.split()) for text in images.training), encoding="utf-8")
    facts = adapt(options, name, {"texts": texts, "num_train_epochs": options.epochs})
    adapted = load(facts["output_dir"])
    memories = base.support_memory.clone(), adapted.support_memory.clone()
    base.set_support_memory(memories[1])
    rows["memory alone"] = images.scores(images.validation.write(base, "en"))
    adapted.set_support_memory(memories[0])
    rows["decoder alone"] = images.scores(images.validation.write(adapted, "en"))
    adapted.set_support_memory(memories[1])
    rows["adapted"] = images.scores(images.validation.write(adapted, "en"))
    adapted.config.support_temperature = options.temperature
    rows[f"adapted, temperature {options.temperature}"] = images.scores(images.validation.write(adapted, "en"))
    return {
        "images": len(images.studies),
        "texts": facts["learned_texts"],
        "rows": rows,
        "texts_scores": facts["scores"],
        "seconds": facts["seconds"],
        "train_seconds": facts.get("run_seconds"),
    }


def made_up_language(options: argparse.Namespace) -> dict[str, Any]:
    """Teaches the base a language by parallel text made by rule, and scores reports of images in it."""
    base = load(options.base)
    images = load_images(LANGUAGE_SET, options, base, AutoProcessor.from_pretrained(options.base))
    english = list(dict.fromkeys(" ".join(text.split()) for text in images.training))[: options.pairs]
    pairs = options.work / "pairs.jsonl"
    rows = [{"en": text, CODE: text.translate(TO_MADE_UP)} for text in english]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    values = {
        "parallel": pairs,
        "language": CODE,
        "keep_earlier": "true",
        "num_train_epochs": options.language_epochs,
        "teaching.epochs": options.teaching_epochs,
        "max_text_length": options.max_length,
    }
    facts = adapt(options, CODE, values)
    adapted = load(facts["output_dir"])
    # Its own tokenizer knows the token; that of the base would read reports of it alike.
    written = [text.translate(FROM_MADE_UP) for text in images.validation.write(adapted, CODE)]
    constant = images.training[select_constant_report(images.training, "en")]
    return {
        "images": len(images.studies),
        "pairs": len(english),
        "rows": {
            "constant report": images.scores([constant] * len(images.studies)),
            "base, English": images.scores(images.validation.write(base, "en")),
            "adapted, English": images.scores(images.validation.write(adapted, "en")),
            "adapted, made-up language": images.scores(written),
        },
        "texts_scores": facts["scores"],
        "seconds": facts["seconds"],
    }


def tables(results: Mapping[str, Any]) -> str:
    """Renders all results."""
    blocks = []
    for name, found in results.items():
        columns = list(dict.fromkeys(key for row in found["rows"].values() for key in row))
        head = [f"{name} ({found['images']} images)", *(column.replace("_", " ") for column in columns)]
        rows = [
            [row, *("" if column not in scores else f"{scores[column]:.3f}" for column in columns)]
            for row, scores in found["rows"].items()
        ]
        blocks.append(markdown_table([head, *rows]))
        before, after = found["texts_scores"]["before"], found["texts_scores"]["after"]
        texts = [[key.replace("_", " "), *(f"{each[key]:.3f}" for each in (before, after))] for key in after]
        blocks.append(markdown_table([[f"{name}, held-out texts", "before", "after"], *texts]))
    return "\n\n".join(blocks)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--base", default=str(DEFAULT_CHECKPOINT))
    parser.add_argument("--sets", nargs="*", default=["tb_shenzhen_montgomery_128"], help="house styles")
    parser.add_argument("--epochs", type=int, default=20, help="of a house style")
    parser.add_argument(
        "--pairs", type=int, default=240, help="parallel texts of the made-up language; 0: leave it out"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.05,
        help="of the memory, beside the base's; its default was picked on the default set",
    )
    parser.add_argument("--teaching-epochs", type=int, default=20)
    parser.add_argument("--language-epochs", type=int, default=10)
    parser.add_argument("--max-length", type=int, default=320, help="tokens of a report")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("out/adapt_text"), help="folder for runs; must be new")
    parser.add_argument("--output", type=Path, default=Path("model_cards/results/adapt_text.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    options.work.mkdir(parents=True)
    results = {name: house_style(name, options) for name in options.sets}
    if options.pairs:
        results[f"{LANGUAGE_SET} in a made-up language"] = made_up_language(options)
    table = tables(results)
    print(table)
    names = ("epochs", "temperature", "pairs", "teaching_epochs", "language_epochs", "max_length", "threads")
    settings = {name: getattr(options, name) for name in names}
    write_json(
        options.output,
        {"notice": NOTICE, "table": table, "settings": settings, "libraries": library_versions(), "results": results},
    )


if __name__ == "__main__":
    main()
