# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Measure diagnosis from 1 to 32 studies of each class, beside a linear probe on the untouched image tower.

Learns from the training part, scores the validation part, of patients that are in no other part. Writes JSON with a
markdown table, and a picture of the curves; `--lora` adds LoRA from 16 studies a class, and measures its adapter.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

import m3fm
from m3fm.adapters import CLASSIFICATION_HEAD, load_adapter_checked, lora_config, save_adapter, use_adapter
from m3fm.data import Study, fingerprint
from m3fm.data.labelled_images import LabelledImages, draw_studies, read_labelled
from m3fm.data.splits import new_to
from m3fm.evaluation.diagnosis_metrics import LabelMeasurement
from m3fm.evaluation.features import embed_resumably
from m3fm.evaluation.label_file import annotate, default_label
from m3fm.evaluation.probes import fit_probe
from m3fm.evaluation.reporter import hash_checkpoint
from m3fm.evaluation.runs import library_versions, open_output, write_json
from m3fm.evaluation.selection import evaluated_and_training
from m3fm.evaluation.tables import markdown_table
from m3fm.fewshot import SPACES, FewShotClassifier
from m3fm.training.heads import choose_heads, fit_heads
from m3fm.training.lora import LoraSettings, classification_model

SETS = {
    "tb_shenzhen_montgomery_128": ("TB (X-ray, 128 px)", ["tuberculosis"]),
    "kermany_pneumonia_224": ("pneumonia (pediatric X-ray)", ["pneumonia"]),
    "covid_chestxray": ("COVID-19 (X-ray)", ["covid_19"]),
    "cov_ctr": ("COVID-19 (CT, COV-CTR)", ["covid_19"]),
    "nih_chestxray14_sample": ("NIH ChestX-ray14, mean over labels", None),
}
SHOTS = (1, 2, 4, 8, 16, 32)
ROWS = {
    "linear": "linear head",
    "prompt": "prompt-initialised head",
    "chosen": "chosen by cross-validation",
    "tower": "linear probe on DINOv2-small",
    "lora": "LoRA",
}
# Of a set with many labels: those whose scores say something, and that the largest draw can be taken from.
LEAST_VALIDATION, LEAST_TRAINING = 8, 32
LORA_SHOTS = 16


class Set:
    """Embedded studies of one data folder.

    Args:
        folder: A data folder.
        store: Where features are kept.
        classifier: What embeds.
    """

    def __init__(self, folder: Path, store: Path, classifier: FewShotClassifier, model: Path):
        evaluated, training, part = evaluated_and_training(folder)
        self.validation = [study for study in evaluated if study.findings]
        training = [study for study in training if study.findings]
        is_new = new_to(self.validation, training)
        self.training = [study for study, new in zip(training, is_new, strict=True) if new]
        everything = [*self.validation, *self.training]
        identity = {"model_sha256": hash_checkpoint(model), "data_sha256": fingerprint(everything), "split": part}
        open_output(store, {"task": "features"} | identity)

        def embed(studies: Sequence[Study]) -> dict[str, np.ndarray]:
            return classifier.embed([study.images for study in studies])

        self.validation_features = embed_resumably(embed, self.validation, store, "images", 16)
        self.training_features = embed_resumably(embed, self.training, store, "training_images", 16)

    def labels(self) -> list[str]:
        """Returns the findings that are frequent enough in both parts."""
        names = sorted({name for study in self.validation for name in study.findings})
        return [name for name in names if self._count(self.validation, name) >= LEAST_VALIDATION]

    def _count(self, studies: Sequence[Study], name: str) -> int:
        truth = annotate(studies, default_label(name))
        return min(int((truth == value).sum()) for value in (1, 0))

    def training_data(self, label: str) -> tuple[LabelledImages, dict[str, np.ndarray]]:
        """Returns the training studies whose label is known, with places in place of images, and their features."""
        data = read_labelled(self.training, labels=[label])
        known = ~np.isnan(annotate(self.training, default_label(label)))
        features = {name: values[known] for name, values in self.training_features.items()}
        places = LabelledImages(
            np.arange(len(data.targets))[:, None], data.targets, data.classes, False, data.groups, data.findings
        )
        return places, features


def auroc(truth: np.ndarray, scores: np.ndarray) -> float:
    """Returns the area under the ROC curve; studies with unknown truth are left out."""
    ranks = np.unique(scores, return_inverse=True)[1] / len(scores)
    measurement = LabelMeasurement(truth, ranks, ranks >= 0.5)
    return float(measurement.score(np.ones((1, len(truth))))["auroc"][0])


def score_draw(
    classifier: FewShotClassifier, subset: Set, label: str, shots: int, seed: int
) -> dict[str, float] | None:
    """Returns the AUROC on validation of every row of one draw; None where a class has too few patients."""
    data, features = subset.training_data(label)
    try:
        drawn = draw_studies(data, shots, seed)
    except ValueError:
        return None
    places = np.array([images[0] for images in drawn.images], dtype=np.int64)
    taken = {name: values[places] for name, values in features.items()}
    truth = annotate(subset.validation, default_label(label))
    priors = {"prompt": classifier.prompt_prior(drawn), "linear": None}
    choices = choose_heads(priors, SPACES, taken, drawn.targets, drawn.groups, False, seed)
    scores = {}
    for choice in choices:
        (head,) = fit_heads(choice.space, taken, drawn.targets, [choice.penalty], False, priors[choice.method])
        scores[choice.method] = auroc(truth, head.logits(subset.validation_features)[:, 0])
    scores["chosen"] = scores[choices[0].method]
    probe = fit_probe(taken["tower"], drawn.targets[:, 0])
    scores["tower"] = auroc(truth, probe.predict(subset.validation_features["tower"]))
    return scores


def zero_shot(classifier: FewShotClassifier, subset: Set, labels: Sequence[str]) -> float:
    """Returns the mean AUROC of the phrases alone."""
    values = []
    for label in labels:
        data, _ = subset.training_data(label)
        scores = subset.validation_features["shared"] @ classifier.prompt_prior(data)[:, 0]
        values.append(auroc(annotate(subset.validation, default_label(label)), scores))
    return statistics.mean(values)


def measure_curves(
    classifier: FewShotClassifier, subset: Set, labels: Sequence[str], seeds: Sequence[int]
) -> dict[str, dict[str, dict[str, float]]]:
    """Returns row -> shots -> mean and standard deviation over seeds of the mean AUROC over labels."""
    curves: dict[str, dict[str, dict[str, float]]] = {row: {} for row in ROWS if row != "lora"}
    for shots in SHOTS:
        draws = [[score_draw(classifier, subset, label, shots, seed) for label in labels] for seed in seeds]
        if any(scores is None for draw in draws for scores in draw):
            continue
        for row, curve in curves.items():
            curve[str(shots)] = spread([statistics.mean(scores[row] for scores in draw) for draw in draws])
    return curves


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Returns mean, standard deviation, and the values."""
    return {
        "mean": statistics.mean(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "values": list(values),
    }


def measure_lora(
    classifier: FewShotClassifier, subset: Set, label: str, seeds: Sequence[int], settings: LoraSettings
) -> dict[str, Any]:
    """Trains LoRA on `LORA_SHOTS` studies of each class, for each seed; returns AUROC and seconds."""
    truth = annotate(subset.validation, default_label(label))
    values, seconds = [], []
    for seed in seeds:
        start = time.perf_counter()
        classifier.fit(subset.training, LORA_SHOTS, "lora", labels=[label], seed=seed, lora=settings)
        seconds.append(time.perf_counter() - start)
        values.append(auroc(truth, classifier.predict_proba(subset.validation)[:, 0]))
    return spread(values) | {"seconds": seconds}


@torch.inference_mode()
def measure_adapter(model: Path, settings: LoraSettings) -> dict[str, Any]:
    """Returns size and load time of an adapter and a head, and how far a disabled and a merged adapter are off."""
    from peft import get_peft_model

    classifier = FewShotClassifier.from_pretrained(model)
    base = classification_model(classifier._model, ("a", "b"), exclusive=True)
    pixels = torch.randn(2, 1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(2, dtype=torch.long)
    expected = base(pixel_values=pixels, labels=labels).logits
    adapted = get_peft_model(
        base, lora_config(settings.preset, settings.r, modules_to_save=CLASSIFICATION_HEAD)
    ).eval()
    for name, weight in adapted.named_parameters():
        if "lora_" in name:
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) * 0.02)
    logits = adapted(pixel_values=pixels, labels=labels).logits
    with use_adapter(adapted, None):
        disabled = adapted(pixel_values=pixels, labels=labels).logits
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(adapted, folder)
        size = sum(path.stat().st_size for path in Path(folder).iterdir())
        merged = adapted.merge_and_unload()(pixel_values=pixels, labels=labels).logits
        fresh = FewShotClassifier.from_pretrained(model)
        start = time.perf_counter()
        load_adapter_checked(classification_model(fresh._model, ("a", "b"), exclusive=True), folder)
        seconds = time.perf_counter() - start
    return {
        "adapter_bytes": size,
        "load_seconds": seconds,
        "disabled_minus_base": float((disabled - expected).abs().max()),
        "merged_minus_unmerged": float((merged - logits).abs().max()),
        "effect": float((logits - expected).abs().max()),
    }


# --------------------------------------------------------------------------------------------------------------------
# Show


def render_table(results: Mapping[str, Any]) -> str:
    """Renders mean and standard deviation of every curve as Markdown."""
    lines = [["set", "learned by", *(f"k = {shots}" for shots in SHOTS)]]
    for measured in results.values():
        lines.append([measured["title"], "zero-shot: phrases alone", f"{measured['zero_shot']:.3f}", *[""] * 5])
        for row, curve in measured["curves"].items():
            cells = [_cell(curve.get(str(shots))) for shots in SHOTS]
            lines.append([measured["title"], ROWS[row], *cells])
    return markdown_table(lines)


def _cell(entry: Mapping[str, Any] | None) -> str:
    if entry is None:
        return "–"
    return f"{entry['mean']:.3f}" + ("" if entry["std"] is None else f" ± {entry['std']:.3f}")


def draw_curves(results: Mapping[str, Any], path: Path) -> None:
    """Draws a panel a set: AUROC over the number of studies of each class, bands of one standard deviation."""
    from matplotlib.figure import Figure

    styles = {
        "linear": ("#0072b2", "o", "-"),
        "prompt": ("#d55e00", "s", "-"),
        "chosen": ("#444444", "", ":"),
        "tower": ("#009e73", "^", "--"),
        "lora": ("#cc79a7", "D", ""),
    }
    figure = Figure(figsize=(13, 7.2), layout="constrained")
    panels = figure.subplots(2, 3).flat
    for panel, measured in zip(panels, results.values(), strict=False):
        panel.axhline(measured["zero_shot"], color="#d55e00", linewidth=1, linestyle=(0, (1, 3)), label="zero-shot")
        for row, curve in measured["curves"].items():
            color, marker, line = styles[row]
            shots = [int(each) for each in curve]
            mean, std = (np.array([entry[key] or 0.0 for entry in curve.values()]) for key in ("mean", "std"))
            if row == "lora":
                panel.errorbar(shots, mean, std, color=color, marker=marker, linestyle="", capsize=3, label=ROWS[row])
                continue
            panel.plot(
                shots, mean, color=color, marker=marker, linestyle=line or "none", markersize=4, label=ROWS[row]
            )
            if row != "chosen":
                panel.fill_between(shots, mean - std, mean + std, color=color, alpha=0.12, linewidth=0)
        panel.set_xscale("log", base=2)
        panel.set_xticks(SHOTS, [str(each) for each in SHOTS])
        panel.set(title=measured["title"], xlabel="studies of each class", ylabel="AUROC on validation")
        panel.grid(alpha=0.3)
    legend = figure.axes[-1]
    legend.axis("off")
    shown = {label: h for axes in figure.axes[:-1] for h, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    legend.legend(shown.values(), shown.keys(), loc="center", frameon=False, fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Reads the command line, measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=m3fm.DEFAULT_CHECKPOINT, help="checkpoint folder")
    parser.add_argument("--data", type=Path, required=True, help="folder that holds the sets")
    parser.add_argument("--features", type=Path, default=Path("runs/few_shot"), help="where features are kept")
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS))
    parser.add_argument("--seeds", type=int, default=5, help="draws for each number of studies")
    parser.add_argument("--lora", nargs="*", choices=list(SETS), default=[], help="sets of one label to train LoRA on")
    parser.add_argument("--lora-seeds", type=int, default=2)
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--picture", type=Path, required=True, help="PNG file to write")
    options = parser.parse_args()
    classifier = FewShotClassifier.from_pretrained(options.model)
    settings = LoraSettings(num_folds=0)
    results: dict[str, Any] = {}
    for name in options.sets:
        title, labels = SETS[name]
        subset = Set(options.data / name, options.features / name, classifier, options.model)
        if labels is None:
            labels = [
                label for label in subset.labels() if subset.training_data(label)[0].targets.sum() >= LEAST_TRAINING
            ]
        curves = measure_curves(classifier, subset, labels, range(options.seeds))
        counts = {"training": len(subset.training), "validation": len(subset.validation)}
        zero = zero_shot(classifier, subset, labels)
        results[name] = {"title": title, "labels": labels, **counts, "zero_shot": zero, "curves": curves}
        print(render_table({name: results[name]}), file=sys.stderr)
        if name in options.lora:
            measured = measure_lora(
                FewShotClassifier.from_pretrained(options.model),
                subset,
                labels[0],
                range(options.lora_seeds),
                settings,
            )
            curves["lora"] = {str(LORA_SHOTS): measured}
    adapter = measure_adapter(options.model, settings)
    table = render_table(results)
    content = {
        "task": "few-shot",
        "model": options.model.resolve().name,
        "model_sha256": hash_checkpoint(options.model),
        "command": f"python benchmarks/few_shot.py {' '.join(sys.argv[1:])}",
        "note": "Mean ± standard deviation of AUROC over draws. The checkpoint's shared space has learned from the "
        "training parts of these sets; its image tower has not.",
        "seeds": options.seeds,
        "lora": asdict(settings),
        "machine": {
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "load_average_1_min": round(os.getloadavg()[0], 1),
        },
        "versions": library_versions(),
        "sets": results,
        "adapter": adapter,
        "table": table,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.output, content)
    draw_curves(results, options.picture)
    print(table)
    print(json.dumps(adapter, indent=1))


if __name__ == "__main__":
    main()
