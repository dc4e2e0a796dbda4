# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Name rows, columns and metrics of `metrics.json` for people: in tables, plots, pages and model cards."""

from collections.abc import Iterable

from ..data.labels import finding_table

MODEL_ROW = "model"
ROW_TITLES = {
    MODEL_ROW: "model",
    "constant_report": "constant report",
    "random_report": "random training report",
    "nearest_neighbor_shared": "nearest neighbour, shared space",
    "nearest_neighbor_tower": "nearest neighbour, image tower",
    "label_prior": "label prior",
    "linear_probe_tower": "linear probe, image tower",
    "shuffled_images": "model, shuffled images",
    "blank_images": "model, blank images",
    "noise_images": "model, noise images",
}
FLOORS = (
    "constant_report",
    "random_report",
    "nearest_neighbor_shared",
    "nearest_neighbor_tower",
    "label_prior",
    "linear_probe_tower",
)
CONTROLS = ("shuffled_images", "blank_images", "noise_images")

LANGUAGE_TITLES = {"en": "English", "zh": "Chinese"}

METRIC_TITLES = {
    "meteor": "METEOR",
    "meteor_java": "METEOR (Java)",
    "rouge_l": "ROUGE-L",
    "cider_d": "CIDEr-D",
    "chrf": "chrF",
    "bertscore_precision": "BERTScore precision",
    "bertscore_recall": "BERTScore recall",
    "bertscore_f1": "BERTScore F1",
    "distinct": "distinct",
    "finding_precision_micro": "finding precision, micro",
    "finding_recall_micro": "finding recall, micro",
    "finding_f1_micro": "finding F1, micro",
    "finding_f1_macro": "finding F1, macro",
    "located_f1_micro": "located F1, micro",
    "side_accuracy": "side accuracy",
    "lobe_accuracy": "lobe accuracy",
    "auroc": "AUROC",
    "auprc": "AUPRC",
    "f1": "F1",
    "sensitivity_at_specificity_90": "sensitivity at specificity 0.90",
    "ece": "ECE",
    "brier": "Brier",
}
LOWER_IS_BETTER = frozenset({"ece", "brier"})

TEXT_GROUP, FINDING_GROUP, DIAGNOSIS_GROUP = "Text overlap", "Findings", "Diagnosis"
_FINDING_METRICS = ("finding_", "located_", "side_", "lobe_")
_DIAGNOSIS_METRICS = frozenset({"auroc", "auprc", "f1", "sensitivity", "specificity", "prevalence", *LOWER_IS_BETTER})
# Tokens beside a language's primary ones are named at the end of a metric.
_TOKENS = {"jieba": "jieba words"}


def metric_title(name: str) -> str:
    """Returns how a metric is written: "bleu_4_jieba" as "BLEU-4 (jieba words)"; others without underscores."""
    stem, _, tokens = name.rpartition("_")
    if tokens in _TOKENS and stem:
        return f"{metric_title(stem)} ({_TOKENS[tokens]})"
    if name.startswith("bleu_"):
        return name.upper().replace("_", "-")
    return METRIC_TITLES.get(name, name.replace("_", " "))


def column_title(name: str) -> str:
    """Returns how a column is written: a language, a finding, "macro average"; others without underscores."""
    if name == "macro":
        return "macro average"
    return LANGUAGE_TITLES.get(name) or finding_title(name)


def finding_title(name: str, language: str = "en") -> str:
    """Returns what a finding is called in a language; a name that is no finding without underscores."""
    findings = finding_table()
    if name not in findings:
        return name.replace("_", " ")
    return findings[name].names[language]


def metric_groups(names: Iterable[str]) -> dict[str, list[str]]:
    """Sorts metrics into the tables they are shown in, each in the order given."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(_metric_group(name), []).append(name)
    return groups


def _metric_group(name: str) -> str:
    tokens = name.rpartition("_")[2]
    if tokens in _TOKENS:
        return f"{TEXT_GROUP}, {_TOKENS[tokens]}"
    if name.startswith(_FINDING_METRICS):
        return FINDING_GROUP
    if name in _DIAGNOSIS_METRICS or name.startswith("sensitivity"):
        return DIAGNOSIS_GROUP
    return TEXT_GROUP


def number(value: float | None, digits: int = 3) -> str:
    """Returns a score as text, with a minus sign of its own width; a dash where it is undefined."""
    if value is None or value != value:
        return "–"
    return f"{value:.{digits}f}".replace("-", "−")


def signed(value: float | None) -> str:
    """Returns a difference as text, with its sign unless it rounds to 0; a dash where it is undefined."""
    if value is None or value != value:
        return "–"
    text = f"{value:+.3f}"
    return "0.000" if text[1:] == "0.000" else text.replace("-", "−")
