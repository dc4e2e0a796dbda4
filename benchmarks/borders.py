# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Measure what a border around a radiograph does to the model, with `cxr_border` "keep" and "crop".

On the validation parts of the radiograph sets: how many images have a border as they come, what cropping it changes
(also to CT slices in files that do not say so), and how an image with a border added compares with the same image
without: cosine of the two embeddings, and AUROC of zero-shot diagnosis. Prints markdown tables and writes them, with
all numbers, as JSON.
"""

import argparse
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

import m3fm
from m3fm.borders_m3fm import BORDER_RULES, find_border
from m3fm.chest_image_m3fm import ChestImage
from m3fm.data import Study, load_studies
from m3fm.diagnosis import default_diagnosis
from m3fm.diagnosis_m3fm import label_phrases, logistic, mean_phrases, zero_shot_logits
from m3fm.evaluation.diagnosis_metrics import MACRO, LabelMeasurement, PanelMeasurement, by_column
from m3fm.evaluation.reporter import CheckpointReporter, hash_checkpoint
from m3fm.evaluation.resampling import cluster_weights, compare_rows
from m3fm.evaluation.runs import NOTICE, group_numbers, library_versions, write_json
from m3fm.evaluation.tables import difference, markdown_table, number

SETS = ("nih_chestxray14_sample", "tb_shenzhen_montgomery_128", "covid_chestxray", "kermany_pneumonia_224")
# Single slices in files that do not say that they are CT: what a rule for radiographs does to them.
CT_SLICES = "cov_ctr"
# Sets that diagnosis is scored on, and how many studies with and without a label it takes.
DIAGNOSED, MINIMUM = SETS[:2], 5
# Of each side of the image that results, on either end.
SHARES = (0.05, 0.1, 0.2, 0.3)
# Display value of a border, and the standard deviation of its noise: 8 grey levels of 256.
KINDS = {"black": (0.0, 0.0), "white": (1.0, 0.0), "noisy": (0.05, 8 / 256)}
CLEAN = "no border added"


@dataclass(frozen=True, eq=False)
class ImageSet:
    """The validation images of one set, the first of each study: its name, the studies and the images."""

    name: str
    studies: Sequence[Study]
    images: Sequence[ChestImage]


class Embedder:
    """Embeds images with either rule; what comes out of preprocessing alike is embedded once."""

    def __init__(self, reporter: CheckpointReporter, batch_size: int):
        self.reporter = reporter
        self.batch_size = batch_size
        self._known: dict[str, np.ndarray] = {}

    @torch.inference_mode()
    def __call__(self, images: Sequence[ChestImage], rule: str) -> np.ndarray:
        """Returns embeddings (images, D), unit norm."""
        process = self.reporter.processor.image_processor
        pixels = [process(images=each, cxr_border=rule, return_tensors="pt")["pixel_values"] for each in images]
        keys = [hashlib.sha256(each.numpy().tobytes()).hexdigest() for each in pixels]
        new = {key: each for key, each in zip(keys, pixels, strict=True) if key not in self._known}
        for start in range(0, len(new), self.batch_size):
            batch = dict(list(new.items())[start : start + self.batch_size])
            embeds = self.reporter.model.model.get_image_features(torch.cat(list(batch.values())))
            self._known |= dict(zip(batch, embeds.float().cpu().numpy(), strict=True))
        return np.stack([self._known[key] for key in keys])


def read_set(folder: Path, reporter: CheckpointReporter, limit: int) -> ImageSet:
    """Reads at most `limit` validation images of a set, evenly spread over it."""
    modality = "ct" if folder.name == CT_SLICES else "cxr"
    studies = [study for study in load_studies(folder) if study.split == "validation" and study.modality == modality]
    kept = np.unique(np.linspace(0, len(studies) - 1, min(limit, len(studies))).round().astype(int))
    studies = [studies[index] for index in kept]
    read = reporter.processor.image_processor.read
    return ImageSet(folder.name, studies, [read(study.images[0]) for study in studies])


def add_border(image: ChestImage, kind: str, share: float, generator: np.random.Generator) -> ChestImage:
    """Returns the image inside a border that takes `share` of each side of the result on either end."""
    height, width = image.pixels.shape[1:]
    rows, columns = (round(side * share / (1 - 2 * share)) for side in (height, width))
    level, deviation = KINDS[kind]
    shape = (1, height + 2 * rows, width + 2 * columns)
    pixels = np.clip(generator.normal(level, deviation, shape), 0, 1).astype(np.float32)
    pixels[:, rows : rows + height, columns : columns + width] = image.pixels
    return ChestImage(pixels, image.modality, image.units, image.view)


def describe(values: np.ndarray) -> dict[str, float]:
    """Returns mean, 5th percentile and minimum."""
    return {"mean": float(values.mean()), "p5": float(np.percentile(values, 5)), "min": float(values.min())}


def borders_found(each: ImageSet) -> dict[str, Any]:
    """Returns how many images have a border as they come, and how much of their area it takes."""
    areas = []
    for image in each.images:
        height, width = image.pixels.shape[1:]
        border = find_border(image.pixels[0])
        if any(border):
            inner = (height - border.top - border.bottom) * (width - border.left - border.right)
            areas.append(1 - inner / (height * width))
    median, largest = (float(np.median(areas)), float(max(areas))) if areas else (None, None)
    share = len(areas) / len(each.images)
    return {"images": len(each.images), "share": share, "area_median": median, "area_largest": largest}


class Diagnosis:
    """Scores zero-shot diagnosis on one set, for any embeddings of its images."""

    def __init__(self, each: ImageSet, reporter: CheckpointReporter, options: argparse.Namespace):
        table = default_diagnosis()
        truth = {
            label: np.array([(study.findings or {}).get(label, np.nan) for study in each.studies]) for label in table
        }
        self.truth = {
            label: known for label, known in truth.items() if min((known == 1).sum(), (known == 0).sum()) >= MINIMUM
        }
        self.scale = reporter.logit_scale
        self.means = [
            mean_phrases(
                [phrases(table, label, kind, reporter.languages) for label in self.truth], reporter.embed_texts
            )
            for kind in ("present", "absent")
        ]
        self.weights = cluster_weights(group_numbers(each.studies), options.num_resamples, options.seed)

    def __call__(self, embeds: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Returns the mean AUROC over labels by rule with intervals, and crop minus keep on the same patients."""
        labels, trials = list(self.truth), {}
        for rule in reversed(BORDER_RULES):  # crop first: differences are the first system's minus the other's
            probabilities = logistic(zero_shot_logits(embeds[rule], *self.means, self.scale))
            measured = {
                label: LabelMeasurement(self.truth[label], scores, scores >= 0.5)
                for label, scores in zip(labels, probabilities.T, strict=True)
            }
            trials[rule] = [[PanelMeasurement(measured, labels)]]
        points, intervals, differences = compare_rows(trials, self.weights)
        return {
            "labels": labels,
            "auroc": {rule: by_column(points[rule])[MACRO]["auroc"] for rule in BORDER_RULES},
            "interval": {rule: by_column(intervals[rule])[MACRO]["auroc"] for rule in BORDER_RULES},
            "crop_minus_keep": by_column(differences["keep"])[MACRO]["auroc"],
        }


def phrases(table: Mapping[str, Any], label: str, kind: str, languages: Sequence[str]) -> list[str]:
    """Returns the phrases of a label in all languages."""
    by_language = label_phrases(table, label, kind)
    return [text for language in languages for text in by_language[language]]


def measure_set(
    each: ImageSet, embed: Embedder, reporter: CheckpointReporter, options: argparse.Namespace
) -> dict[str, Any]:
    """Returns all numbers of one set."""
    generator = np.random.default_rng(options.seed)
    diagnosis = Diagnosis(each, reporter, options) if each.name in DIAGNOSED else None
    clean = {rule: embed(each.images, rule) for rule in BORDER_RULES}
    conditions = {CLEAN: (each.images, clean)}
    for kind in tqdm(() if each.name == CT_SLICES else KINDS, desc=each.name):
        for share in SHARES:
            images = [add_border(image, kind, share, generator) for image in each.images]
            conditions[f"{kind} {share:.0%}"] = (images, {rule: embed(images, rule) for rule in BORDER_RULES})
    result: dict[str, Any] = {"as_they_come": borders_found(each), "conditions": {}}
    for name, (images, embeds) in conditions.items():
        entry: dict[str, Any] = {
            "found": float(np.mean([any(find_border(image.pixels[0])) for image in images])),
            "cosine": {rule: describe((embeds[rule] * clean["keep"]).sum(axis=1)) for rule in BORDER_RULES},
        }
        if diagnosis is not None:
            entry["diagnosis"] = diagnosis(embeds)
        result["conditions"][name] = entry
    return result


# --------------------------------------------------------------------------------------------------------------------
# Tables


def render_found(results: Mapping[str, Any]) -> str:
    """Renders how many images have a border as they come."""
    lines = [["set", "images", "with a border", "median area", "largest area", "cosine of crop and keep: mean, min"]]
    for name, result in results.items():
        found = result["as_they_come"]
        areas = ["–" if found[key] is None else f"{found[key]:.1%}" for key in ("area_median", "area_largest")]
        cosine = result["conditions"][CLEAN]["cosine"]["crop"]
        lines.append([name, str(found["images"]), f"{found['share']:.1%}", *areas,
                      f"{number(cosine['mean'])}, {number(cosine['min'])}"])  # fmt: skip
    return markdown_table(lines)


def render_cosines(results: Mapping[str, Any]) -> str:
    """Renders the mean cosine with the image as it comes, and how often the border was found, over all radiographs."""
    lines = [["border added", "found", "cosine, keep", "cosine, crop"]]
    weights = [results[name]["as_they_come"]["images"] for name in SETS]
    for name in results[SETS[0]]["conditions"]:
        entries = [results[each]["conditions"][name] for each in SETS]
        found = np.average([entry["found"] for entry in entries], weights=weights)
        means = [
            number(float(np.average([entry["cosine"][rule]["mean"] for entry in entries], weights=weights)))
            for rule in BORDER_RULES
        ]
        lines.append([name, f"{found:.1%}", *means])
    return markdown_table(lines)


def render_diagnosis(results: Mapping[str, Any]) -> str:
    """Renders AUROC by border and rule."""
    lines = [["set", "border added", "AUROC, keep", "AUROC, crop", "crop minus keep [95 %]"]]
    for name in DIAGNOSED:
        for condition, entry in results[name]["conditions"].items():
            scores = entry["diagnosis"]
            cells = [number(scores["auroc"][rule]) for rule in BORDER_RULES]
            lines.append([name, condition, *cells, difference(scores["crop_minus_keep"])])
    return markdown_table(lines)


# --------------------------------------------------------------------------------------------------------------------


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Returns what the JSON file holds."""
    reporter = CheckpointReporter(options.model)
    embed = Embedder(reporter, options.batch_size)
    results = {
        name: measure_set(read_set(options.data / name, reporter, options.limit), embed, reporter, options)
        for name in (*SETS, CT_SLICES)
    }
    tables = [
        "Borders in the images as they come",
        render_found(results),
        "Agreement with the image as it comes, mean over the radiographs of all sets",
        render_cosines(results),
        "Zero-shot diagnosis, mean over labels",
        render_diagnosis(results),
    ]
    command = f"python benchmarks/borders.py --data {options.data} --limit {options.limit}"
    return {
        "notice": NOTICE,
        "command": f"{command} --output {options.output}" if options.output else command,
        "model": Path(options.model).resolve().name,
        "model_sha256": hash_checkpoint(options.model),
        "split": "validation",
        "seed": options.seed,
        "num_resamples": options.num_resamples,
        "versions": library_versions(),
        "sets": results,
        "table": "\n\n".join(tables),
    }


def main() -> None:
    """Reads the command line, measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=m3fm.DEFAULT_CHECKPOINT, help="checkpoint folder")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder that holds the sets")
    parser.add_argument("--limit", type=int, default=150, help="most images of a set")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--num-resamples", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    result = measure(options)
    print(result["table"])
    if options.output:
        write_json(options.output, result)


if __name__ == "__main__":
    main()
