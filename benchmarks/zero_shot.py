# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Measure zero-shot diagnosis: which phrases, in which language, with or without the report, and its calibration.

Looks at the validation parts alone. The phrases that ship were chosen on them, so that their scores here are those of
the best of a few; "chosen elsewhere" says what the choice is worth: for each set, the AUROC of the variant that is
best on the other sets. Calibrations are scored on patients that they were not fitted on.

Prints markdown tables and writes them, with all numbers, as JSON.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

import m3fm
from m3fm.data.labels import NO_FINDING, finding_table
from m3fm.diagnosis import default_diagnosis
from m3fm.diagnosis.calibrate import (
    EmbeddedSet,
    embed_sets,
    fit_calibrations,
    measure_calibrations,
    score_sets,
)
from m3fm.diagnosis_m3fm import label_phrases, logistic, mean_phrases, zero_shot_logits
from m3fm.evaluation.diagnosis_metrics import MACRO, LabelMeasurement, PanelMeasurement, by_column
from m3fm.evaluation.features import embed_resumably
from m3fm.evaluation.reporter import CheckpointReporter, embed_in_batches
from m3fm.evaluation.resampling import cluster_weights, compare_rows
from m3fm.evaluation.runs import NOTICE, group_numbers, library_versions, write_json
from m3fm.evaluation.tables import difference, markdown_table, number
from m3fm.layers_m3fm import cross_modality_gap

SETS = ("cov_ctr", "covid_chestxray", "kermany_pneumonia_224", "nih_chestxray14_sample", "tb_shenzhen_montgomery_128")
# A label counts in a set's mean if this many studies have it, and as many do not.
MINIMUM = 5
LANGUAGES = {"English": ("en",), "Chinese": ("zh",), "both": ("en", "zh")}
SHIPPED, PLAIN = "prompts.yaml, both", "labels.yaml, both"
_SENTENCES = {"en": ("{}.", "No {}."), "zh": ("{}。", "未见{}。")}

Phrases = Callable[[str, str, str], Sequence[str]]
Embed = Callable[[Sequence[str]], np.ndarray]


def name_only(finding: str, kind: str, language: str) -> Sequence[str]:
    """Returns the bare name of a finding, or its denial."""
    if finding == NO_FINDING:
        return ({"en": ("Normal.", "Abnormal."), "zh": ("正常。", "异常。")}[language][kind == "absent"],)
    return (_SENTENCES[language][kind == "absent"].format(finding_table()[finding].names[language]),)


def report_phrases(finding: str, kind: str, language: str) -> Sequence[str]:
    """Returns the phrases of labels.yaml."""
    return getattr(finding_table()[finding], kind)[language]


def first_phrase(finding: str, kind: str, language: str) -> Sequence[str]:
    """Returns the first phrase of labels.yaml."""
    return report_phrases(finding, kind, language)[:1]


def shipped_phrases(finding: str, kind: str, language: str) -> Sequence[str]:
    """Returns the phrases of labels.yaml and prompts.yaml, those of `also_absent` included."""
    return label_phrases(default_diagnosis(), finding, kind)[language]


SOURCES: dict[str, Phrases] = {
    "name": name_only,
    "first of labels.yaml": first_phrase,
    "labels.yaml": report_phrases,
    "prompts.yaml": shipped_phrases,
}


def score_variants(each: EmbeddedSet, findings: Sequence[str], embed: Embed, scale: float) -> dict[str, np.ndarray]:
    """Returns logits (N, L) of a set by phrases and languages."""
    scored = {}
    for source, phrases in SOURCES.items():
        for title, languages in LANGUAGES.items():
            present, absent = (
                [[text for code in languages for text in phrases(finding, kind, code)] for finding in findings]
                for kind in ("present", "absent")
            )
            means = (mean_phrases(present, embed), mean_phrases(absent, embed))
            scored[f"{source}, {title}"] = zero_shot_logits(each.images, *means, scale)
            if source == "prompts.yaml" and len(languages) > 1:
                scored["prompts.yaml, both, nearest phrase"] = nearest_phrase(
                    each.images, present, absent, embed, scale
                )
    return scored


def nearest_phrase(
    images: np.ndarray, present: Sequence[Sequence[str]], absent: Sequence[Sequence[str]], embed: Embed, scale: float
) -> np.ndarray:
    """Returns logits (N, L) by the phrase that is most like the image, instead of the mean of phrases."""
    columns = [
        [np.max(images @ mean_phrases([[text] for text in texts], embed).T, axis=1) for texts in phrases]
        for phrases in (present, absent)
    ]
    return np.round(scale * (np.stack(columns[0], axis=1) - np.stack(columns[1], axis=1)), 4)


@torch.inference_mode()
def write_reports(reporter: CheckpointReporter, images: Sequence[np.ndarray], language: str) -> dict[str, np.ndarray]:
    """Returns embeddings (B, D) of the reports that the model writes for studies with these embeddings."""
    model = reporter.model
    memory = model.support_memory[model.config.languages.index(language)].float()
    embeds = torch.tensor(np.stack(images), dtype=torch.float32, device=model.device)
    shared = cross_modality_gap(embeds, memory, model.config.support_temperature)
    ids = model.generate(shared_embeds=shared, language=language, **reporter.decoding)
    texts = [text.strip() for text in reporter.processor.batch_decode(ids, skip_special_tokens=True)]
    return {"reports": reporter.embed_texts(texts)}


def annotated(each: EmbeddedSet, minimum: int) -> list[str]:
    """Returns the findings that this many studies of a set have, and as many do not."""
    truth = {finding: each.annotate(finding) for finding in finding_table()}
    return [name for name, values in truth.items() if min((values == 1).sum(), (values == 0).sum()) >= minimum]


def compare(
    each: EmbeddedSet, variants: Mapping[str, np.ndarray], findings: Sequence[str], options: argparse.Namespace
) -> dict[str, Any]:
    """Returns AUROC, intervals and paired differences (shipped minus variant) of the labels with enough studies."""
    kept = annotated(each, MINIMUM)
    trials = {}
    for name in sorted(variants, key=lambda name: name != SHIPPED):
        probabilities = dict(zip(findings, logistic(variants[name]).T, strict=True))
        measured = {
            label: LabelMeasurement(each.annotate(label), probabilities[label], probabilities[label] >= 0.5)
            for label in kept
        }
        trials[name] = [[PanelMeasurement(measured, kept)]]
    weights = cluster_weights(group_numbers(each.studies), options.num_resamples, options.seed)
    rows, intervals, differences = (
        {
            name: {column: values["auroc"] for column, values in by_column(scores).items()}
            for name, scores in compared.items()
        }
        for compared in compare_rows(trials, weights)
    )
    return {"rows": rows, "intervals": intervals, "differences": differences}


def score_labels(each: EmbeddedSet, logits: np.ndarray, findings: Sequence[str], options: argparse.Namespace) -> dict:
    """Returns, for each finding of both classes, its AUROC with interval; also among studies that are not normal."""
    normal = each.annotate(NO_FINDING)
    scored = {}
    for finding, values in zip(findings, logistic(logits).T, strict=True):
        entry: dict[str, Any] = {}
        truth = each.annotate(finding)
        populations = {"all": truth}
        if finding != NO_FINDING:
            populations["abnormal"] = np.where(normal == 1, np.nan, truth)
        for population, labels in populations.items():
            counts = [int((labels == value).sum()) for value in (1, 0)]
            if not all(counts) or (population != "all" and counts == entry["all"]["counts"]):
                continue
            system = {"model": [[LabelMeasurement(labels, values, values >= 0.5)]]}
            weights = cluster_weights(group_numbers(each.studies), options.num_resamples, options.seed)
            points, intervals, _ = compare_rows(system, weights)
            auroc = {"auroc": points["model"]["auroc"], "interval": intervals["model"]["auroc"]}
            entry[population] = {"counts": counts, **auroc}
        scored[finding] = entry
    return scored


def choose_elsewhere(compared: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Returns for each set the variant that is best on the others, on average, and its AUROC there and here."""
    chosen = {}
    for name in compared:
        others = [scores["rows"] for other, scores in compared.items() if other != name]
        means = {variant: float(np.mean([rows[variant][MACRO] for rows in others])) for variant in others[0]}
        best = max(means, key=means.get)
        here = compared[name]["rows"][best][MACRO]
        chosen[name] = {"variant": best, "auroc_elsewhere": means[best], "auroc": here}
    return chosen


# --------------------------------------------------------------------------------------------------------------------
# Tables


def render_variants(compared: Mapping[str, Mapping[str, Any]], chosen: Mapping[str, Any]) -> str:
    """Renders the mean AUROC of each variant on each set."""
    lines = [["phrases", *compared, "mean of sets"]]
    for variant in next(iter(compared.values()))["rows"]:
        values = [scores["rows"][variant][MACRO] for scores in compared.values()]
        lines.append([variant, *map(number, values), number(float(np.mean(values)))])
    values = [chosen[name]["auroc"] for name in compared]
    lines.append(["chosen elsewhere", *map(number, values), number(float(np.mean(values)))])
    gaps = [difference(scores["differences"][PLAIN][MACRO]) for scores in compared.values()]
    lines.append([f"prompts.yaml minus {PLAIN}", *gaps, ""])
    return markdown_table(lines)


def render_labels(by_set: Mapping[str, Mapping[str, Any]]) -> str:
    """Renders the AUROC of each label with the phrases that ship."""
    lines = [["set", "label", "with / without", "AUROC [95 %]", "among abnormal: with / without", "AUROC [95 %]"]]
    for name, labels in by_set.items():
        for label, entry in labels.items():
            cells = []
            for population in ("all", "abnormal"):
                found = entry.get(population)
                if found is None:
                    cells += ["", ""]
                else:
                    low, high = map(number, found["interval"])
                    cells += [" / ".join(map(str, found["counts"])), f"{number(found['auroc'])} [{low}, {high}]"]
            lines.append([name, label, *cells])
    return markdown_table(lines)


def render_calibration(measured: Mapping[str, Mapping[str, Any]]) -> str:
    """Renders ECE and Brier of each calibrated label before and after."""
    lines = [["label", "set", "studies", "with it", "ECE before", "ECE after", "Brier before", "Brier after",
              "Brier: after minus before [95 %]"]]  # fmt: skip
    for label, by_set in measured.items():
        for name, entry in by_set.items():
            values = [
                number(entry[row][metric]["value"]) for metric in ("ece", "brier") for row in ("before", "after")
            ]
            prevalence = f"{100 * entry['prevalence']:.1f} %"
            gap = difference(entry["difference"]["brier"])
            lines.append([label, name, str(entry["studies"]), prevalence, *values, gap])
    return markdown_table(lines)


# --------------------------------------------------------------------------------------------------------------------


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Returns what the JSON file holds."""
    reporter = CheckpointReporter(options.model)
    folders = [options.data / name for name in SETS]
    sets = embed_sets(reporter, options.model, folders, options.store, options.batch_size)
    cache: dict[str, np.ndarray] = {}

    def embed(texts: Sequence[str]) -> np.ndarray:
        if new := [text for text in texts if text not in cache]:
            cache.update(zip(new, embed_in_batches(reporter, new, 64), strict=True))
        return np.stack([cache[text] for text in texts])

    compared, by_set, weight = {}, {}, reporter.model.config.diagnosis_report_weight
    for each in tqdm(sets, desc="sets"):
        findings = annotated(each, 1)
        variants = score_variants(each, findings, embed, reporter.logit_scale)
        texts = [
            [[text for code in LANGUAGES["both"] for text in shipped_phrases(name, kind, code)] for name in findings]
            for kind in ("present", "absent")
        ]
        means = [mean_phrases(each_kind, embed) for each_kind in texts]
        for language in reporter.languages:

            def write(batch: Sequence[np.ndarray], language: str = language) -> dict[str, np.ndarray]:
                return write_reports(reporter, batch, language)

            store = options.store / each.name
            reports = embed_resumably(write, list(each.images), store, f"reports_{language}", options.batch_size)[
                "reports"
            ]
            mixed = (1 - weight) * each.images + weight * reports
            variants[f"{SHIPPED}, report {language}"] = zero_shot_logits(mixed, *means, reporter.logit_scale)
        compared[each.name] = compare(each, variants, findings, options)
        by_set[each.name] = score_labels(each, variants[SHIPPED], findings, options)
    table = default_diagnosis()
    scored = score_sets(reporter, table, sets, 64)
    fitted, uncalibrated = fit_calibrations(table, scored)
    measured = measure_calibrations(fitted, scored, options.num_resamples, options.seed)
    chosen = choose_elsewhere(compared)
    tables = [
        f"Mean AUROC over labels with {MINIMUM} studies or more of each class, validation parts",
        render_variants(compared, chosen),
        "AUROC by label, the phrases that ship, both languages",
        render_labels(by_set),
        "Calibration, on patients that it was not fitted on",
        render_calibration(measured),
    ]
    kept = ("calibration", "threshold", "fitted_on")
    return {
        "notice": NOTICE,
        "command": f"python benchmarks/zero_shot.py --data {options.data}",
        "split": "validation",
        "num_resamples": options.num_resamples,
        "seed": options.seed,
        "report_weight": weight,
        "versions": library_versions(),
        "variants": compared,
        "chosen_elsewhere": chosen,
        "labels": by_set,
        "calibrated": {key: {name: fitted[key][name] for name in kept} for key in measured},
        "uncalibrated": uncalibrated,
        "calibration": measured,
        "table": "\n\n".join(tables),
    }


def main() -> None:
    """Reads the command line, measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=m3fm.DEFAULT_CHECKPOINT, help="checkpoint folder")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder that holds the sets")
    parser.add_argument("--store", type=Path, default=Path("runs/zero_shot"), help="where features are kept")
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
