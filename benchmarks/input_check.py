# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Measure the input check: what it refuses, and that it does not refuse chests.

Chest images are those of the validation parts (of sets without one, a quarter of the patients), other things come from
`benchmarks/gather_other_images.py` and are drawn. `--methods` also compares ways to tell them apart, which takes an
hour more where nothing is cached. Prints markdown tables, writes all numbers as JSON, and with --image a picture of
the operating point. Rates come with 95 % intervals by Wilson.
"""

import argparse
import shlex
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from input_check_methods import (
    Rows,
    fit_both,
    fit_mahalanobis,
    fit_neighbour,
    fit_regression,
    fit_residual,
    refused_share,
)
from input_check_volumes import check_images, measure_sweeps, measure_volumes

from m3fm import DEFAULT_CHECKPOINT, M3FMModel, M3FMProcessor
from m3fm.evaluation.reporter import hash_checkpoint
from m3fm.evaluation.runs import NOTICE, library_versions, write_json
from m3fm.evaluation.tables import markdown_table
from m3fm.input_check_m3fm import KINDS, InputCheck, StudyCheck, against
from m3fm.input_statistics_m3fm import display_planes, plane_statistics, thumbnail
from m3fm.training.drawn_images import FIT_KINDS, MEASURE_KINDS
from m3fm.training.input_check import DRAWN_OF_A_KIND, MOST_IN_FIT, MOST_IN_TUNING, OTHER_CHANGES, chest_of, every
from m3fm.training.input_check_data import (
    HARMLESS,
    Example,
    TowerFeatures,
    changed,
    chest_examples,
    drawn_examples,
    other_examples,
)

CHANGED_IMAGES = 150
VERDICTS = ("ok", "suspect", "refused")


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the chest sets")
    parser.add_argument("--other", type=Path, required=True, help="folder of images of other things")
    parser.add_argument("--cache", type=Path, required=True, help="folder that keeps what the tower makes of images")
    parser.add_argument("--model", type=Path, default=DEFAULT_CHECKPOINT)
    parser.add_argument("--methods", action="store_true", help="also compare methods")
    parser.add_argument("--output", type=Path, default=Path("input_check.json"))
    parser.add_argument("--image", type=Path, help="a PNG of the operating point")
    args = parser.parse_args()
    result, scores = measure(args)
    write_json(args.output, result)
    if args.image is not None:
        draw_scores(scores, result["limits"]["tower"], args.image)
    sys.stdout.write(result["table"] + "\n")


def measure(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Runs everything; returns what is written as JSON, and the scores of every group for the picture."""
    tower = M3FMModel.from_pretrained(args.model).vision_model
    check = InputCheck.from_pretrained(args.model).for_tower(tower)
    if not check.reads_tokens:
        raise SystemExit(f"{args.model} has no input check for its image tower")
    features = TowerFeatures(tower, M3FMProcessor.from_pretrained(args.model).image_processor, args.cache)
    groups = example_groups(args.data, args.other)
    found, scores = {}, {}
    for name, examples in groups.items():
        found[name] = list(check_all(check, features, examples))
        scores[name] = other_scores(check, features(examples))
    confusion = {name: verdict_counts(checks) for name, checks in found.items()}
    words = ["python", "benchmarks/input_check.py", "--data", str(args.data), "--other", args.other.name]
    words += ["--cache", args.cache.name, "--output", str(args.output)]
    words += ["--methods"] * args.methods + ([] if args.image is None else ["--image", str(args.image)])
    chest = [name for name in groups if name.startswith("chest: ")]
    result = {
        "model": args.model.resolve().name,
        "model_sha256": hash_checkpoint(args.model),
        "command": shlex.join(words),
        "notice": NOTICE,
        "libraries": library_versions(),
        "limits": {"pixels": vars(check.pixel_limits), "tower": vars(check.tower_limits)},
        "confusion": confusion,
        "chest_refused": rate(sum(confusion[n]["refused"] for n in chest), sum(confusion[n]["images"] for n in chest)),
        "other_codes": {
            name: dict(Counter(remark.code for each in checks for remark in each.remarks if remark.severity != "info"))
            for name, checks in found.items()
        },
        "findings": measure_findings(groups, found),
        "sweeps": measure_sweeps(check, features, groups),
        "volumes": measure_volumes(check, features, args.data),
    }
    if args.methods:
        result["methods"] = compare_methods(features, args.data, args.other, groups)
    result["table"] = render(result)
    return result, scores


def example_groups(data: Path, other: Path) -> dict[str, list[Example]]:
    """Lists the images that are measured, by group."""
    chest = [example for example in chest_examples(data) if example.part == "measure"]
    groups = {f"chest: {source}": [e for e in chest if e.source == source] for source in by_source(chest)}
    groups["chest: another source, 64 px"] = other_examples(other, "chest", "frontal")
    for change in HARMLESS:
        groups[f"changed: {change}"] = changed(every(chest, CHANGED_IMAGES), [change])
    groups["inverted"] = changed(every(chest, 2 * CHANGED_IMAGES), ["inverted"])
    groups["turned"] = changed(every([e for e in chest if e.kind != "ct"], CHANGED_IMAGES), ["turned"])
    things = other_examples(other, "measure") + drawn_examples(list(MEASURE_KINDS), "measure", DRAWN_OF_A_KIND)
    return groups | {f"other: {source}": [e for e in things if e.source == source] for source in by_source(things)}


def by_source(examples: Sequence[Example]) -> list[str]:
    """Returns the sources in the order in which they come."""
    return list(dict.fromkeys(example.source for example in examples))


def check_all(check: InputCheck, features: TowerFeatures, examples: Sequence[Example]) -> Iterator[StudyCheck]:
    """Checks every image as a study of its own, as the pipelines do."""
    for example in examples:
        yield check_images(check, features, [example.read(features.image_processor)])


def other_scores(check: InputCheck, rows: np.ndarray) -> np.ndarray:
    """Returns the log odds of "other", (N,)."""
    return against(rows @ check.weights["kind.weight"].T + check.weights["kind.bias"], [KINDS.index("other")])


def verdict_counts(checks: Sequence[StudyCheck]) -> dict[str, Any]:
    """Counts verdicts, with the rate of refusal and its interval."""
    counts = Counter(each.verdict for each in checks)
    return (
        {"images": len(checks)}
        | {verdict: counts[verdict] for verdict in VERDICTS}
        | {"refusal": rate(counts["refused"], len(checks)), "flagged": rate(len(checks) - counts["ok"], len(checks))}
    )


def rate(count: int, total: int) -> dict[str, float]:
    """Returns a share with its 95 % interval by Wilson (JASA 1927)."""
    z = 1.959964
    share = count / total
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * np.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return {"value": share, "low": max(0.0, centre - half), "high": min(1.0, centre + half)}


def measure_findings(groups: dict[str, list[Example]], found: dict[str, list[StudyCheck]]) -> dict[str, Any]:
    """Measures single findings: inverted, turned, modality and view."""
    chest = [
        pair for name in groups if name.startswith("chest: ") for pair in zip(groups[name], found[name], strict=True)
    ]
    radiographs = [(e, c) for e, c in chest if e.kind != "ct"]

    def said(pairs: Sequence[tuple[Example, StudyCheck]], code: str) -> dict[str, float]:
        return rate(sum(code in {remark.code for remark in c.remarks} for _, c in pairs), len(pairs))

    def exchanged(pairs: Sequence[tuple[Example, StudyCheck]]) -> dict[str, float]:
        return rate(sum(any("were exchanged" in r.message for r in c.remarks) for _, c in pairs), len(pairs))

    inverted = [pair for pair in zip(groups["inverted"], found["inverted"], strict=True) if pair[0].kind != "ct"]
    turned = list(zip(groups["turned"], found["turned"], strict=True))
    modality = Counter((("ct" if e.kind == "ct" else "cxr"), c.modality or "not told") for e, c in chest)
    view = Counter((e.view, c.view or "not told") for e, c in radiographs if e.view)
    return {
        "inverted, of inverted radiographs": said(inverted, "inverted"),
        "exchanged, of inverted radiographs": exchanged(inverted),
        "inverted, of radiographs as they are": said(radiographs, "inverted"),
        "exchanged, of radiographs as they are": exchanged(radiographs),
        "exchanged, of turned radiographs": exchanged(turned),
        "turned, of turned radiographs": said(turned, "turned"),
        "turned, of radiographs as they are": said(radiographs, "turned"),
        "modality": {f"{true} seen as {seen}": count for (true, seen), count in sorted(modality.items())},
        "view": {f"{true} seen as {seen}": count for (true, seen), count in sorted(view.items())},
    }


def compare_methods(
    features: TowerFeatures, data: Path, other: Path, groups: dict[str, list[Example]]
) -> dict[str, dict[str, float]]:
    """Compares methods on the same images, see `input_check_methods`."""
    chest, tuning = chest_of(data, "fit", MOST_IN_FIT), chest_of(data, "tune", MOST_IN_TUNING)
    things = other_examples(other, "fit") + drawn_examples(list(FIT_KINDS), "fit", DRAWN_OF_A_KIND)
    lists = {
        "rows": chest + changed(every(chest, 1600), HARMLESS) + things + changed(things, OTHER_CHANGES),
        "tuning": tuning + changed(tuning, HARMLESS),
        "chest": [e for name, examples in groups.items() if name.startswith("chest: ") for e in examples],
        "others": [e for name, examples in groups.items() if name.startswith("other: ") for e in examples],
    }
    seen = {name: as_rows(examples, features(examples)) for name, examples in lists.items()}
    pixels = {name: as_rows(examples, pixel_features(features, examples)) for name, examples in lists.items()}
    methods = {
        "pixel statistics, regression": (fit_regression, pixels),
        "nearest chest image, cosine": (fit_neighbour, seen),
        "Mahalanobis distance": (fit_mahalanobis, seen),
        "residual of principal components": (fit_residual, seen),
        "regression on tokens": (fit_regression, seen),
        "regression and residual": (fit_both, seen),
    }
    return {name: refused_share(fit, **rows) for name, (fit, rows) in methods.items()}


def as_rows(examples: Sequence[Example], features: np.ndarray) -> Rows:
    """Puts features beside what the images are."""
    kinds = np.array([KINDS.index(example.kind) for example in examples])
    return Rows(features, kinds, np.array([example.source for example in examples]))


def pixel_features(features: TowerFeatures, examples: Sequence[Example]) -> np.ndarray:
    """Returns pixel statistics and the thumbnail of each image, (n, 260)."""
    rows = []
    for example in examples:
        plane = display_planes(example.read(features.image_processor))[0]
        statistics = plane_statistics(plane)
        numbers = [statistics.even_share, statistics.grey_range, statistics.levels / 256, statistics.noise]
        rows.append(np.concatenate([numbers, thumbnail(plane)]))
    return np.stack(rows).astype(np.float32)


def render(result: dict[str, Any]) -> str:
    """Renders what was found as markdown."""
    lines = [["images", "n", "refused", "suspect", "ok", "refusal, 95 % interval"]]
    for name, row in result["confusion"].items():
        share = row["refusal"]
        interval = f"{share['value']:.1%} ({share['low']:.1%} to {share['high']:.1%})"
        lines.append([name, *(str(row[key]) for key in ("images", "refused", "suspect", "ok")), interval])
    parts = [markdown_table(lines)]
    lines = [["finding", "share"]]
    for name, value in result["findings"].items():
        if "value" in value:
            lines.append([name, f"{value['value']:.1%} ({value['low']:.1%} to {value['high']:.1%})"])
        else:
            lines.append([name, "; ".join(f"{key} {count}" for key, count in value.items())])
    parts.append(markdown_table(lines))
    lines = [["volume", "verdict", "findings"]]
    lines += [[name, row["verdict"], ", ".join(row["codes"]) or "none"] for name, row in result["volumes"].items()]
    parts.append(markdown_table(lines))
    if "methods" in result:
        lines = [["method", "chest refused", "left-out kinds refused", "unseen kinds refused", "worst kind"]]
        for name, shares in result["methods"].items():
            means = [
                np.mean([share for kind, share in shares.items() if kind.startswith(start)])
                for start in ("left out", "unseen")
            ]
            worst = min((kind for kind in shares if kind != "chest"), key=lambda kind: shares[kind])
            cells = [f"{share:.1%}" for share in (shares["chest"], *means)]
            lines.append([name, *cells, f"{worst.split(': ')[1]} {shares[worst]:.0%}"])
        parts.append(markdown_table(lines))
    return "\n\n".join(parts)


def draw_scores(scores: dict[str, np.ndarray], limits: dict[str, float], path: Path) -> None:
    """Draws the score of every image, group by group, with the two limits."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 0.24 * len(scores) + 1.4), layout="constrained")
    rng = np.random.default_rng(0)
    for row, (name, values) in enumerate(scores.items()):
        colour = "tab:red" if name.startswith("other") else "tab:blue"
        height = row + rng.uniform(-0.3, 0.3, len(values))
        axes.plot(values, height, ".", color=colour, markersize=3, alpha=0.5, markeredgewidth=0)
    axes.axvline(limits["other_warn"], color="0.4", linestyle="--", label="suspect above")
    axes.axvline(limits["other_refuse"], color="0", label="refused above")
    axes.set_yticks(range(len(scores)), list(scores), fontsize=8)
    axes.set_ylim(len(scores) - 0.5, -0.5)
    axes.set_xlabel("score for neither chest X-ray nor chest CT, log odds")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.06), ncols=2, frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
