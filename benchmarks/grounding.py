# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Measure whether heat maps point at what a radiologist marked, the boxes of NIH ChestX-ray14 (Wang, CVPR 2017).

A case is a finding of an image, with all boxes of that finding. The phrase is the finding's name, which is weighed as
presence against absence. Scores: how often the highest value lies in a box (pointing game, Zhang et al., IJCV 2018),
intersection over union with the boxes of as many of the highest pixels as the boxes have, of the best threshold for
that case (which no user knows), and the share of what is positive in the map that lies in the boxes.

Floors, which know nothing of the image: a centred square, noise over the patches, the method's mean map over other
patients with the finding, and the mean of their boxes; the last two are a prior of where a finding usually is.

The side of the window is chosen on the training part by the second score, among those at most half as wide as the
image: a wider one says little of where. Images of the training part, though not their boxes, were seen in training;
the validation part is small. Prints a markdown table of the validation part and of all, writes all numbers as JSON,
and with --image the maps of every validation image with pneumonia as a PNG.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from m3fm import DEFAULT_CHECKPOINT
from m3fm.chest_image_m3fm import ChestImage
from m3fm.data.labels import canonical_findings, finding_table
from m3fm.evaluation.reporter import hash_checkpoint
from m3fm.evaluation.resampling import cluster_weights, compare_rows, mean_measurement
from m3fm.evaluation.runs import NOTICE, library_versions, write_json
from m3fm.evaluation.tables import markdown_table
from m3fm.explain import DEFAULT_WINDOWS, METHODS, EncodedStudy, Explainer, Target
from m3fm.explain_maps import HeatMap, to_image
from m3fm.explain_plots import draw_boxes

SOURCE = "nih_chestxray14_sample"
# Boxes are in pixels of the originals, which are square.
ORIGINAL_SIZE = 1024
# The list of boxes spells one label otherwise than the list of labels.
SPELLINGS = {"Infiltrate": "Infiltration"}
WINDOWS = (1, 3, 5, 7, 9, 11)
METRICS = ("pointing", "iou", "iou_best", "energy")
TITLES = ("pointing game", "IoU, equal area", "IoU, best threshold", "energy in box")
NOISE_TRIALS = 20
TRAIN, VALIDATION, ALL = "train", "validation", "all"
LEADER = "similarity, en"


@dataclass(frozen=True)
class Case:
    """One finding of one image.

    Attributes:
        image: Number of the image.
        finding: Canonical name.
        boxes: (boxes, 4), x, y, width, height in pixels of the image at hand.
        mask: (H, W), inside any of them.
        split: "train" or "validation".
        patient: Only for grouping.
    """

    image: int
    finding: str
    boxes: np.ndarray
    mask: np.ndarray
    split: str
    patient: str = field(repr=False)


def read_cases(folder: Path, explainer: Explainer) -> tuple[list[EncodedStudy], list[Case]]:
    """Reads the images that have boxes, and runs the image tower on them."""
    lines = (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row.get("bboxes_1024")]
    studies, cases = [], []
    for row in rows:
        study = explainer.read(folder / row["file_name"], modality="cxr")
        height, width = study.images[0].pixels.shape
        by_finding: dict[str, list[np.ndarray]] = {}
        for box in row["bboxes_1024"]:
            found = canonical_findings([SPELLINGS.get(box["label"], box["label"])], SOURCE)
            scaled = np.array(box["xywh"]) * np.array([width, height, width, height]) / ORIGINAL_SIZE
            by_finding.setdefault(next(name for name, value in found.items() if value), []).append(scaled)
        for finding, boxes in by_finding.items():
            mask = np.zeros((height, width), dtype=bool)
            for x, y, w, h in boxes:
                mask[round(y) : round(y + h), round(x) : round(x + w)] = True
            cases.append(Case(len(studies), finding, np.stack(boxes), mask, row["split"], row["patient_id"]))
        studies.append(study)
    return studies, cases


def score_map(values: np.ndarray, mask: np.ndarray) -> list[float]:
    """Returns the scores of one map (H, W), in the order of `METRICS`."""
    row, column = np.unravel_index(int(values.argmax()), values.shape)
    order = np.argsort(-values, axis=None, kind="stable")
    inside = np.cumsum(mask.reshape(-1)[order])
    taken = np.arange(1, len(order) + 1)
    overlap = inside / (mask.sum() + taken - inside)
    positive = np.clip(values, 0, None)
    energy = float(positive[mask].sum() / positive.sum()) if positive.any() else 0.0
    return [float(mask[row, column]), float(overlap[mask.sum() - 1]), float(overlap.max()), energy]


def model_maps(
    explainer: Explainer,
    studies: Sequence[EncodedStudy],
    cases: Sequence[Case],
    method: str,
    window: int,
    target: Callable[[str, str], Target],
) -> dict[str, list[HeatMap]]:
    """Returns the heat map of each case by language; `target` takes the name of the finding and the language."""
    table = finding_table()
    maps: dict[str, list[HeatMap]] = {}
    for language in explainer.model.config.languages:
        targets = {f: target(table[f].names[language], language) for f in dict.fromkeys(c.finding for c in cases)}
        maps[language] = [
            explainer.heat_map(studies[case.image], targets[case.finding], method, window=window) for case in cases
        ]
    return maps


def others(cases: Sequence[Case], case: Case) -> list[int]:
    """Returns the cases of other patients with the same finding, or of all other patients if there are none."""
    known = [number for number, other in enumerate(cases) if other.patient != case.patient]
    same = [number for number in known if cases[number].finding == case.finding]
    return same or known


def mean_of_others(cases: Sequence[Case], maps: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Returns, for each case, the mean map over `others`."""
    return [np.mean([maps[number] for number in others(cases, case)], axis=0) for case in cases]


def centre_maps(cases: Sequence[Case]) -> list[np.ndarray]:
    """Returns maps that fall off from the centre in squares, positive in a square of the mean area of a box."""
    share = np.mean([case.mask.mean() for case in cases])
    maps = []
    for case in cases:
        height, width = case.mask.shape
        rows, columns = np.mgrid[:height, :width]
        off = np.maximum(abs(rows + 0.5 - height / 2) / height, abs(columns + 0.5 - width / 2) / width)
        maps.append(np.sqrt(share) / 2 - off)
    return maps


def noise_maps(studies: Sequence[EncodedStudy], cases: Sequence[Case], explainer: Explainer, seed: int) -> list:
    """Returns maps of noise over the patches, laid out as those of the model are."""
    generator = np.random.default_rng(seed)
    size = tuple(explainer.processor.image_processor.size[side] for side in ("height", "width"))
    maps = []
    for case in cases:
        grid = generator.random(studies[case.image].grid)
        maps.append(to_image(grid, explainer.cell, size, case.mask.shape))
    return maps


def score_rows(
    rows: dict[str, list[list[np.ndarray]]], cases: Sequence[Case], part: str, num_resamples: int, seed: int
) -> dict[str, Any]:
    """Scores systems, each with its trials, on the cases of one part, with intervals over patients."""
    chosen = [number for number, case in enumerate(cases) if part in (ALL, case.split)]
    trials = {}
    for name, draws in rows.items():
        scores = [np.array([score_map(maps[n], cases[n].mask) for n in chosen]) for maps in draws]
        trials[name] = [[mean_measurement(dict(zip(METRICS, each.T, strict=True)))] for each in scores]
    weights = cluster_weights([cases[number].patient for number in chosen], num_resamples, seed)
    points, intervals, differences = compare_rows(trials, weights)
    patients = len({cases[number].patient for number in chosen})
    images = len({cases[number].image for number in chosen})
    counts = {"cases": len(chosen), "images": images, "patients": patients}
    return {**counts, "rows": points, "intervals": intervals, "differences": differences}


def render(parts: dict[str, dict[str, Any]]) -> str:
    """Renders the scores of each part as markdown."""
    lines = [["part", "map", *TITLES]]
    for part in (VALIDATION, ALL):
        scores = parts[part]
        title = f"{part} ({scores['cases']} cases, {scores['patients']} patients)"
        for name, values in scores["rows"].items():
            spans = scores["intervals"][name]
            cells = [f"{values[m]:.3f} [{spans[m][0]:.3f}, {spans[m][1]:.3f}]" for m in METRICS]
            lines.append([title, name, *cells])
    return markdown_table(lines)


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--model", type=Path, default=DEFAULT_CHECKPOINT)
    parser.add_argument("--output", type=Path, default=Path("grounding.json"))
    parser.add_argument("--image", type=Path, help="a PNG of examples")
    parser.add_argument("--num-resamples", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    result, examples = measure(args)
    write_json(args.output, result)
    if args.image is not None:
        args.image.write_bytes(examples)
    sys.stdout.write(result["table"] + "\n")


def measure(args: argparse.Namespace) -> tuple[dict[str, Any], bytes]:
    """Runs everything; returns what is written as JSON, and a PNG of examples."""
    explainer = Explainer.from_pretrained(args.model)
    studies, cases = read_cases(args.data / SOURCE, explainer)
    tuning, prompts, chosen, found = {}, {}, {}, {}
    for method in METHODS:
        by_window = {
            window: model_maps(explainer, studies, cases, method, window, explainer.label_target) for window in WINDOWS
        }
        tuning[method] = {str(window): training_scores(maps, cases) for window, maps in by_window.items()}
        narrow = [window for window in WINDOWS if window <= max(studies[0].grid) / 2]
        chosen[method] = max(narrow, key=lambda window: tuning[method][str(window)]["iou"])
        default = DEFAULT_WINDOWS[method]
        found[method] = by_window[default]
        prompts[method] = {
            "presence against absence": tuning[method][str(default)],
            "name as text": training_scores(
                model_maps(explainer, studies, cases, method, default, explainer.text_target), cases
            ),
        }
        if chosen[method] != DEFAULT_WINDOWS[method]:
            print(f"{method}: window {chosen[method]} is the better one, the default is {DEFAULT_WINDOWS[method]}")
    rows = {
        f"{method}, {language}": [[each.maps[0] for each in maps]]
        for method, by_language in found.items()
        for language, maps in by_language.items()
    }
    rows |= {f"mean of others: {name}": [mean_of_others(cases, draws[0])] for name, draws in list(rows.items())}
    rows["centred square"] = [centre_maps(cases)]
    rows["noise"] = [noise_maps(studies, cases, explainer, args.seed + trial) for trial in range(NOISE_TRIALS)]
    rows["mean box of others"] = [mean_of_others(cases, [case.mask.astype(np.float32) for case in cases])]
    parts = {part: score_rows(rows, cases, part, args.num_resamples, args.seed) for part in (VALIDATION, TRAIN, ALL)}
    shares = side_shares(explainer, studies, cases, rows)
    listed = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
    table = f"{render(parts)}\n\nHighest in the right half of the image, share of all cases: {listed}."
    words = ["python", "benchmarks/grounding.py", "--data", str(args.data), "--output", str(args.output)]
    words += [] if args.image is None else ["--image", str(args.image)]
    result = {
        "data": SOURCE,
        "model": args.model.resolve().name,
        "model_sha256": hash_checkpoint(args.model),
        "command": shlex.join(words),
        "notice": NOTICE,
        "seed": args.seed,
        "num_resamples": args.num_resamples,
        "versions": library_versions(),
        "windows": DEFAULT_WINDOWS,
        "windows_chosen_on_train": chosen,
        "tuning_on_train": {"window": tuning, "prompts": prompts},
        "differences_are": f"{LEADER} minus the row",
        "parts": parts,
        "share_in_right_half": shares,
        "table": table,
    }
    return result, draw_examples(found, cases)


def side_shares(
    explainer: Explainer, studies: Sequence[EncodedStudy], cases: Sequence[Case], rows: dict[str, list]
) -> dict[str, float]:
    """Returns how often maps, maps of the mirrored images, and boxes lie in the right half of the image."""
    shares = {name: share_in_right_half(draws[0]) for name, draws in rows.items() if name.partition(",")[0] in METHODS}
    turned = mirrored(explainer, studies)
    for method in METHODS:
        maps = model_maps(explainer, turned, cases, method, DEFAULT_WINDOWS[method], explainer.label_target)
        for code, by_case in maps.items():
            values = [heat_map.maps[0] for heat_map in by_case]
            shares[f"{method}, {code}, mirrored images"] = share_in_right_half(values)
    columns = [np.argwhere(case.mask)[:, 1].mean() / case.mask.shape[1] for case in cases]
    return shares | {"boxes": float(np.mean(np.array(columns) > 0.5))}


def mirrored(explainer: Explainer, studies: Sequence[EncodedStudy]) -> list[EncodedStudy]:
    """Returns the studies with left and right exchanged: a map that follows the image changes sides too."""
    images = [np.ascontiguousarray(study.images[0].pixels[None, :, ::-1]) for study in studies]
    return [explainer.read(ChestImage(pixels, "cxr")) for pixels in images]


def share_in_right_half(maps: Sequence[np.ndarray]) -> float:
    """Returns how often the peak lies in the right half of the image, which is the patient's left unless mirrored."""
    return float(np.mean([each.argmax() % each.shape[1] >= each.shape[1] / 2 for each in maps]))


def training_scores(maps: dict[str, list[HeatMap]], cases: Sequence[Case]) -> dict[str, float]:
    """Returns the mean scores of the training cases over all languages."""
    scores = [
        score_map(each.maps[0], case.mask)
        for by_case in maps.values()
        for each, case in zip(by_case, cases, strict=True)
        if case.split == TRAIN
    ]
    return dict(zip(METRICS, np.mean(scores, axis=0).tolist(), strict=True))


def draw_examples(found: dict[str, dict[str, list[HeatMap]]], cases: Sequence[Case]) -> bytes:
    """Draws every validation image with pneumonia, one line a method, in English."""
    shown = [n for n, case in enumerate(cases) if case.split == VALIDATION and case.finding == "pneumonia"]
    panels = [
        (maps["en"][number], cases[number].boxes, f"{method}: {maps['en'][number].phrase.lower()}")
        for method, maps in found.items()
        for number in shown
    ]
    return draw_boxes(panels, len(shown))


if __name__ == "__main__":
    main()
