# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Fit the learned part of the input check to an image tower.

    python -m m3fm.training.input_check --data DATA --other OTHER --output m3fm/checkpoints/m3fm-small

`DATA` holds the chest sets, `OTHER` images of other things as `benchmarks/gather_other_images.py` writes them. What
is fitted is a handful of logistic regressions on the class token beside the mean patch token of each image, and one on
thumbnails of 16 x 16 pixels, for which images are put upright before the tower sees them.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ..input_check_m3fm import KINDS, THUMBNAIL_KINDS, InputCheck, TowerLimits, against, probe_tower
from ..input_statistics_m3fm import display_planes, thumbnail
from .drawn_images import FIT_KINDS
from .input_check_data import (
    HARMLESS,
    Example,
    TowerFeatures,
    changed,
    chest_examples,
    drawn_examples,
    other_examples,
)

# Images of the set of children that take part in the fit, and in tuning: it is by far the largest.
LARGEST_SET = "kermany_pneumonia_224"
MOST_IN_FIT, MOST_IN_TUNING = 450, 150
DRAWN_OF_A_KIND = 40
# Other things are changed too: no change may speak for a chest.
OTHER_CHANGES = (*HARMLESS, "inverted", "turned")
# Weight of the squared coefficients against the mean cross entropy.
DECAY = 1e-3
THUMBNAIL_DECAY = 1e-3
# By how much in log odds the refusal lies above every chest image of the tuning part, and never below even odds.
MARGIN = 1.0


def main() -> None:
    """Runs from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the chest sets")
    parser.add_argument("--other", type=Path, required=True, help="folder of images of other things")
    parser.add_argument("--model", default=None, help="checkpoint whose image tower it is for")
    parser.add_argument("--output", type=Path, required=True, help="folder that input_check.safetensors goes into")
    parser.add_argument("--cache", type=Path, required=True, help="folder that keeps what the tower makes of images")
    arguments = parser.parse_args()
    from .. import DEFAULT_CHECKPOINT, M3FMModel, M3FMProcessor

    checkpoint = arguments.model or DEFAULT_CHECKPOINT
    tower = M3FMModel.from_pretrained(checkpoint).vision_model
    image_processor = M3FMProcessor.from_pretrained(checkpoint).image_processor
    features = TowerFeatures(tower, image_processor, arguments.cache)
    check = fit_input_check(features, arguments.data, arguments.other)
    check.save_pretrained(arguments.output)


def fit_input_check(features: TowerFeatures, data: Path, other: Path) -> InputCheck:
    """Fit heads to the fit parts and limits to the tuning parts.

    Args:
        features: Of the tower that the check is for.
        data: Folder of the chest sets.
        other: Folder of images of other things.
    """
    chest, tuning = chest_of(data, "fit", MOST_IN_FIT), chest_of(data, "tune", MOST_IN_TUNING)
    others = other_examples(other, "fit") + drawn_examples(list(FIT_KINDS), "fit", DRAWN_OF_A_KIND)
    harmless = changed(every(chest, 1600), HARMLESS)
    radiographs = [example for example in chest if example.kind != "ct"]
    inverted = changed(every(chest, 700), ["inverted"])
    turned = changed(every(radiographs, 500), ["turned"])
    other_changed = changed(others, OTHER_CHANGES)
    lists = {"chest": chest, "harmless": harmless, "inverted": inverted, "turned": turned, "other": others}
    lists |= {"other_changed": other_changed}
    rows = {name: features(examples) for name, examples in lists.items()}
    weights = fit_heads(lists, rows)
    weights |= fit_thumbnails(lists, features)
    weights["probe"] = probe_tower(features.tower)
    check = InputCheck(weights)
    highest = float(_other_scores(check, features(tuning)).max())
    limits = TowerLimits(other_refuse=round(max(0.0, highest + MARGIN), 2), other_warn=round(highest, 2))
    return InputCheck(weights, check.pixel_limits, limits)


def fit_heads(lists: dict[str, list[Example]], rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Fit what reads the tower's tokens: kind, AP against PA, inverted and turned.

    Args:
        lists: Examples by what was done to them: "chest", "harmless", "inverted", "turned", "other", "other_changed".
        rows: Features (n, 2 C) of each list.

    Returns:
        `<head>.weight` (outcomes, 2 C) and `<head>.bias` (outcomes,).
    """
    examples = [example for each in lists.values() for example in each]
    stacked = np.concatenate(list(rows.values()))  # (n, 2 C)
    kinds = np.array([KINDS.index(example.kind) for example in examples])
    frontal, radiograph = kinds == 0, kinds < KINDS.index("ct")
    views = np.array([example.view or "" for example in examples])
    change = np.array([example.change for example in examples])
    upright = ~np.isin(change, ("inverted", "turned"))
    tasks = {
        "kind": (np.ones(len(kinds), dtype=bool), kinds),
        "ap": (frontal & upright & np.isin(views, ("AP", "PA")), views == "AP"),
        "inverted": (radiograph & (change != "turned"), change == "inverted"),
        "turned": (radiograph & (change != "inverted"), change == "turned"),
    }
    weights = {}
    for head, (chosen, target) in tasks.items():
        outcomes = len(KINDS) if head == "kind" else 2
        weight, bias = logistic_regression(stacked[chosen], target[chosen].astype(int), outcomes, DECAY)
        if outcomes == 2:  # log odds of the second outcome are all that is needed
            weight, bias = weight[1:] - weight[:1], bias[1:] - bias[:1]
        weights |= {f"{head}.weight": weight, f"{head}.bias": bias}
    return weights


def fit_thumbnails(lists: dict[str, list[Example]], features: TowerFeatures) -> dict[str, np.ndarray]:
    """Fit what tells an inverted radiograph by its thumbnail; CT, turned images and other things are "neither"."""
    upright, neither = [], []
    for name in ("chest", "harmless", "turned", "other"):
        for example in lists[name]:
            small = thumbnail(display_planes(example.read(features.image_processor))[0])
            is_upright = name in ("chest", "harmless") and example.kind in ("frontal", "lateral")
            (upright if is_upright else neither).append(small)
    stacked = np.stack([*upright, *neither])
    signs = np.concatenate([stacked, -stacked])
    target = np.full(len(signs), THUMBNAIL_KINDS.index("neither"))
    target[: len(upright)] = THUMBNAIL_KINDS.index("upright")
    target[len(stacked) : len(stacked) + len(upright)] = THUMBNAIL_KINDS.index("inverted")
    weight, bias = logistic_regression(signs, target, len(THUMBNAIL_KINDS), THUMBNAIL_DECAY)
    return {"thumbnail.weight": weight, "thumbnail.bias": bias}


def logistic_regression(
    inputs: np.ndarray, target: np.ndarray, outcomes: int, decay: float
) -> tuple[np.ndarray, np.ndarray]:
    """Fit a multinomial logistic regression, every outcome weighing the same, on standardised inputs.

    Args:
        inputs: (n, d).
        target: (n,), 0 to outcomes - 1.
        outcomes: How many.
        decay: Weight of the squared coefficients of the standardised inputs.

    Returns:
        Weight (outcomes, d) and bias (outcomes,) for inputs as they come.
    """
    x = torch.from_numpy(np.asarray(inputs, dtype=np.float32))
    mean, deviation = x.mean(0), x.std(0).clamp_min(1e-6)
    x = (x - mean) / deviation
    y = torch.from_numpy(target)
    balance = len(y) / (outcomes * torch.bincount(y, minlength=outcomes).clamp_min(1).float())
    weight = torch.zeros(outcomes, x.shape[1], requires_grad=True)
    bias = torch.zeros(outcomes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=500, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = nn.functional.cross_entropy(x @ weight.T + bias, y, balance) + decay * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    with torch.no_grad():
        scaled = weight / deviation
        return scaled.numpy(), (bias - scaled @ mean).numpy()


def every(examples: Sequence[Example], most: int) -> list[Example]:
    """Take so many examples, evenly spread."""
    step = max(1.0, len(examples) / most)
    return [examples[int(i * step)] for i in range(min(most, len(examples)))]


def chest_of(data: Path, part: str, most: int) -> list[Example]:
    """List the chest images of one part, and so many of the largest set."""
    chest = [example for example in chest_examples(data) if example.part == part]
    largest = every([example for example in chest if example.source == LARGEST_SET], most)
    sources = dict.fromkeys(example.source for example in chest)
    parts = {source: [example for example in chest if example.source == source] for source in sources}
    return [example for each in (parts | {LARGEST_SET: largest}).values() for example in each]


def _other_scores(check: InputCheck, rows: np.ndarray) -> np.ndarray:
    scores = rows @ check.weights["kind.weight"].T + check.weights["kind.bias"]
    return against(scores, [KINDS.index("other")])


if __name__ == "__main__":
    main()
