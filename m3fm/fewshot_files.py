# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""What a saved `FewShotClassifier` is made of: JSON, safetensors, and a card that says what it is for."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from .adapters import BASE_FILE
from .evaluation.runs import NOTICE, library_versions, write_json
from .training.heads import Head

CLASSIFIER_FILE, HEAD_FILE, CARD_FILE = "m3fm_few_shot.json", "head.safetensors", "README.md"
FORMAT = 1
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", BASE_FILE)


@dataclass(frozen=True)
class Saved:
    """All that is known of a fitted classifier beside its weights.

    Attributes:
        classes: L names.
        exclusive: Whether each study has exactly one of them.
        method: "linear", "prompt" or "lora".
        scale: What logits are multiplied by before they become probabilities, a value a class.
        thresholds: Probability of each class from which on it counts as present.
        cross_validation: Method to its scores on held-out patients.
        base: Folder of the checkpoint; the name alone of the one that ships.
        base_sha256: Hashes of its weights, see `m3fm.adapters.base_fingerprint`.
        shots: Studies drawn of each class; None: all there were.
        seed: Of draws and folds.
        num_studies: Class to the number of studies with it and without it.
        num_groups: Patients.
        penalty: Of the head's weights; NaN for LoRA.
        lora: Settings of the adapter's training; None for heads.
        seconds: That learning took.
    """

    classes: tuple[str, ...]
    exclusive: bool
    method: str
    scale: tuple[float, ...]
    thresholds: tuple[float, ...]
    cross_validation: dict[str, dict[str, float]]
    base: str
    base_sha256: dict[str, str]
    shots: int | None
    seed: int
    num_studies: dict[str, tuple[int, int]]
    num_groups: int
    penalty: float
    lora: dict[str, Any] | None
    seconds: float


def write_saved(folder: Path, saved: Saved, head: Head | None) -> None:
    """Writes a classifier into a folder; what an earlier one of the other kind left there is removed.

    Args:
        folder: That exists; an adapter is already in it.
        saved: What is known beside the weights.
        head: None where the weights are an adapter's.
    """
    if head is None:
        (folder / HEAD_FILE).unlink(missing_ok=True)
    else:
        for name in _ADAPTER_FILES:
            (folder / name).unlink(missing_ok=True)
        weights = {"weight": head.weight.astype(np.float32), "bias": head.bias.astype(np.float32)}
        save_file(weights, folder / HEAD_FILE, metadata={"space": " ".join(head.space)})
    content = {"format": FORMAT, "notice": NOTICE, **asdict(saved), "versions": library_versions()}
    content["space"] = None if head is None else list(head.space)
    write_json(folder / CLASSIFIER_FILE, content)
    (folder / CARD_FILE).write_text(render_card(saved), encoding="utf-8")


def read_saved(folder: Path) -> tuple[Saved, Head | None]:
    """Reads what `write_saved` wrote; the head is None where the weights are an adapter's.

    Raises:
        ValueError: If a file is missing or damaged, or of a later version.
    """
    path = folder / CLASSIFIER_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version, space = content["format"], content["space"]
        values = {field.name: content[field.name] for field in fields(Saved)}
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is damaged: expected the JSON that save_pretrained writes.") from None
    if version != FORMAT:
        raise ValueError(f"{path} has the format {version}, expected {FORMAT}: it was written by another m3fm.")
    for name in ("classes", "scale", "thresholds"):
        values[name] = tuple(values[name])
    values["num_studies"] = {name: tuple(counts) for name, counts in values["num_studies"].items()}
    values["penalty"] = float("nan") if values["penalty"] is None else values["penalty"]
    saved = Saved(**values)
    return saved, None if space is None else _read_head(folder / HEAD_FILE, tuple(space), len(saved.classes))


def _read_head(path: Path, space: tuple[str, ...], num_classes: int) -> Head:
    if not path.is_file():
        raise ValueError(f"{path} is missing: expected the weights that save_pretrained writes.")
    try:
        weights = load_file(path)
        weight, bias = (weights[name].astype(np.float64) for name in ("weight", "bias"))
    except Exception as error:  # safetensors raises its own kind
        raise ValueError(f"{path} is damaged: {error}") from None
    if bias.shape != (num_classes,) or weight.ndim != 2 or weight.shape[1] != num_classes:
        raise ValueError(f"{path}: expected a head of {num_classes} classes, got {weight.shape} and {bias.shape}.")
    return Head(space, weight, bias)


# --------------------------------------------------------------------------------------------------------------------
# The card

_METHODS = {
    "linear": "a linear head on frozen image features",
    "prompt": "a linear head on frozen image features that starts from what the labels' phrases say",
    "lora": "a LoRA adapter of the image tower with a diagnosis head",
}


def render_card(saved: Saved) -> str:
    """Renders the Markdown card of a saved classifier."""
    base = Path(saved.base).name
    front = ["---", "library_name: m3fm", f"base_model: {base}", "tags: [medical, radiology, few-shot]"]
    if saved.lora is not None:
        front[1] = "library_name: peft"
    kind = "one of these classes a study" if saved.exclusive else "each label by itself"
    counts = [f"| {name} | {n} | {without} |" for name, (n, without) in saved.num_studies.items()]
    how = "all studies there were" if saved.shots is None else f"{saved.shots} studies drawn of each class"
    return "\n".join(
        [
            *front,
            "---",
            f"# Diagnosis of {', '.join(saved.classes)}",
            "",
            f"**{NOTICE}** It must not be used for the care of patients. It knows the population it was trained on "
            "and has not been tested on another.",
            "",
            f"Learned with m3fm as {_METHODS[saved.method]} ({saved.method}), {kind}, from {how}, of "
            f"{saved.num_groups} patients, with seed {saved.seed}, in {saved.seconds:g} s.",
            "",
            "| class | studies with it | without it |",
            "|---|---|---|",
            *counts,
            "",
            *_score_lines(saved),
            "",
            "```python",
            "from m3fm import FewShotClassifier",
            f'FewShotClassifier.from_pretrained("this folder"{_base_argument(saved)}).predict_proba(["chest.png"])',
            "```",
            "",
            f"The base is the checkpoint `{base}`; another one is refused, by the hashes of its weights.",
            "",
        ]
    )


def _score_lines(saved: Saved) -> list[str]:
    calibration = "Probabilities assume that classes are as frequent as in the studies it was trained on."
    if not saved.cross_validation:
        return [
            "It was not cross-validated: how well it does is unknown, and probabilities are not calibrated. "
            + calibration
        ]
    lines = ["Scores on patients that were held out in turn; the first method is the one that was kept.", ""]
    lines += ["| method | AUROC | log loss |", "|---|---|---|"]
    for method, scores in saved.cross_validation.items():
        lines.append(f"| {method} | {_number(scores['auroc'])} | {_number(scores['log_loss'])} |")
    return [*lines, "", "The same patients chose the method and its settings: expect a little less. " + calibration]


def _number(value: float | None) -> str:
    return "–" if value is None or value != value else f"{value:.3f}"


def _base_argument(saved: Saved) -> str:
    return ', base="its checkpoint"' if Path(saved.base).parent != Path(".") else ""


def class_counts(targets: np.ndarray, classes: tuple[str, ...]) -> Mapping[str, tuple[int, int]]:
    """Returns the number of studies with and without each class for targets (N, L)."""
    return {
        name: (int((column == 1).sum()), int((column == 0).sum()))
        for name, column in zip(classes, targets.T, strict=True)
    }
