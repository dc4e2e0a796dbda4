# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Validate the finding labeler on real reports.

English against the MeSH labels of Open-i (by coders) and the 18 labels of CT-RATE's texts, English against Chinese on
the paired reports of COV-CTR. Rules were written from errors on the training rows; the other rows are the result.
"Plain keywords" are the same patterns with every mention counted as present: the gap is what negation is worth.
Prints a markdown table and writes it, with all numbers, as JSON.
"""

import argparse
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from m3fm.data.labels import FINDINGS, NO_FINDING, canonical_findings
from m3fm.evaluation.finding_labeler import FindingLabeler, LabeledFinding

DEVELOPMENT, RESULT = "development", "held apart"
MIN_AGREEMENT_POSITIVES = 10


@dataclass(frozen=True)
class Reading:
    """What a set means by a label, where that differs from the finding of that name here.

    Attributes:
        findings: Any of these counts, as mentioned; nothing implied.
        only: A mention must contain it.
        without: A mention must not contain it.
    """

    findings: tuple[str, ...]
    only: str = ""
    without: str = r"(?!)"


# Open-i: MeSH codes scars as "Cicatrix", bullae as "Blister", a calcified aorta as "Calcinosis" unless the report says
# atherosclerosis, COPD apart from emphysema, and any effusion as "Effusion". CT-RATE's "Lung opacity" is ground glass
# and opacity; consolidation is a label of its own.
READINGS = {
    "openi_iu_reports": {
        "lung_opacity": Reading(("lung_opacity", "ground_glass_opacity")),
        "fibrosis": Reading(("fibrosis",), without="scar|cicatri|sequel"),
        "atherosclerosis": Reading(("atherosclerosis",), only="athero|arterio"),
        "calcification": Reading(("calcification",), without="athero"),
        "emphysema": Reading(("emphysema",), without="bull|bleb"),
        "pleural_effusion": Reading(("pleural_effusion", "pericardial_effusion")),
    },
    "ctrate_reports_text": {"lung_opacity": Reading(("lung_opacity", "ground_glass_opacity"))},
}


def read_rows(folder: Path, name: str) -> list[dict[str, Any]]:
    """Reads the rows of a set."""
    return [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines() if line.strip()]


def english_text(row: dict[str, Any]) -> str:
    """Returns findings and impression, or the report."""
    parts = [row.get(name) for name in ("findings_en", "impression_en", "report_en")]
    return "\n\n".join(part for part in parts if part)


def is_stated(label: LabeledFinding | None) -> bool:
    """Counts uncertain as stated, as F1-CheXbert does."""
    return label is not None and label.state != "negative"


def by_rules(labeler: FindingLabeler, text: str) -> set[str]:
    """Returns the findings stated."""
    return {name for name, label in labeler.label_report(text).items() if is_stated(label)}


def by_keywords(labeler: FindingLabeler, text: str) -> set[str]:
    """Returns the findings whose words occur, whatever is said of them."""
    rules = labeler.rules
    things = [match.meanings[0] for match in rules.things.scan(text.lower()) if not match.meanings[0].predicates]
    named = {finding for thing in things for finding in thing.findings if finding in FINDINGS}
    return named | {parent for finding in named for parent in rules.implies.get(finding, ())}


def by_readings(readings: dict[str, Reading]) -> Callable[[FindingLabeler, str], set[str]]:
    """Returns a way to read reports as the set defines its labels."""

    def read(labeler: FindingLabeler, text: str) -> set[str]:
        mentions = [mention for mention in labeler.find_mentions(text) if mention.state != "negative"]
        stated = by_rules(labeler, text) - set(readings)
        for label, reading in readings.items():
            for mention in mentions:
                words = text[mention.start : mention.end].lower()
                if mention.finding in reading.findings and not re.search(reading.without, words):
                    stated |= {label} if re.search(reading.only, words) else set()
        return stated

    return read


def f1_table(truth: list[dict[str, float]], stated: list[set[str]]) -> dict[str, dict[str, float]]:
    """Returns precision, recall, F1, support and predicted per finding that the set knows, and "micro"."""
    counts: dict[str, np.ndarray] = {}
    for labels, found in zip(truth, stated, strict=True):
        for name, value in labels.items():
            if name != NO_FINDING:
                cell = [value > 0 and name in found, name in found, value > 0]
                counts[name] = counts.get(name, np.zeros(3)) + cell
    counts = {name: counts[name] for name in FINDINGS if name in counts}
    counts["micro"] = np.sum(list(counts.values()), axis=0)
    table = {}
    for name, (both, predicted, support) in counts.items():
        table[name] = {
            "precision": both / predicted if predicted else float("nan"),
            "recall": both / support if support else float("nan"),
            "f1": 2 * both / (predicted + support) if predicted + support else float("nan"),
            "support": int(support),
            "predicted": int(predicted),
        }
    return table


def validate_labels(folder: Path, labeler: FindingLabeler, column: str) -> dict[str, Any]:
    """Scores the three ways of reading on the training rows and on the others."""
    rows = read_rows(folder, "data.jsonl")
    ways = {"rules": by_rules, "set's own reading": by_readings(READINGS[folder.name]), "plain keywords": by_keywords}
    result: dict[str, Any] = {}
    for part in (DEVELOPMENT, RESULT):
        chosen = [row for row in rows if (row.get("split") == "train") == (part == DEVELOPMENT)]
        truth = [canonical_findings(row.get(column) or [], folder.name) for row in chosen]
        tables = {
            name: f1_table(truth, [way(labeler, english_text(row)) for row in chosen]) for name, way in ways.items()
        }
        result[part] = {"num_reports": len(chosen), **tables}
        if "mesh_major" in chosen[0]:
            result[part]["disagreements"] = disagreements(labeler, chosen, truth)
    return result


def disagreements(
    labeler: FindingLabeler, rows: list[dict[str, Any]], truth: list[dict[str, float]]
) -> dict[str, dict[str, dict[str, int]]]:
    """Counts, per finding, the commonest MeSH headings of the reports on which rules and coders differ."""
    headings: dict[str, dict[str, Counter[str]]] = {}
    for row, labels in zip(rows, truth, strict=True):
        stated = by_rules(labeler, english_text(row))
        for name, value in labels.items():
            if name != NO_FINDING and (name in stated) != (value > 0):
                kind = "rules only" if name in stated else "coders only"
                counter = headings.setdefault(name, {}).setdefault(kind, Counter())
                counter["reports"] += 1
                counter.update({heading.split("/")[0] for heading in row["mesh_major"]})
    return {name: {kind: dict(c.most_common(6)) for kind, c in kinds.items()} for name, kinds in headings.items()}


def validate_languages(folder: Path, labelers: dict[str, FindingLabeler]) -> dict[str, Any]:
    """Returns the agreement of English and Chinese on paired reports."""
    rows = [row for row in read_rows(folder, "metadata.jsonl") if row.get("report_en") and row.get("report_zh")]
    result = {}
    for part, split in ((DEVELOPMENT, "train"), (RESULT, "validation")):
        chosen = [row for row in rows if row.get("split") == split]
        labels = {
            code: labeler.label_reports([row[f"report_{code}"] for row in chosen])
            for code, labeler in labelers.items()
        }
        result[part] = {"num_reports": len(chosen), **agreement(labels["en"], labels["zh"])}
    return result


def agreement(
    first: Sequence[dict[str, LabeledFinding]], second: Sequence[dict[str, LabeledFinding]]
) -> dict[str, Any]:
    """Returns Cohen's kappa, F1, share of equal labels and counts per finding, and how often places are equal."""
    table = {}
    for name in FINDINGS:
        pair = np.array([[is_stated(x.get(name)), is_stated(y.get(name))] for x, y in zip(first, second, strict=True)])
        table[name] = binary_agreement(pair[:, 0], pair[:, 1])
    names = [name for name in FINDINGS if name != NO_FINDING]
    cells = [
        (is_stated(x.get(name)), is_stated(y.get(name))) for x, y in zip(first, second, strict=True) for name in names
    ]
    table["all findings"] = binary_agreement(*np.array(cells).T)
    places: dict[str, list[bool]] = {"sides": [], "lobes": []}
    for x, y in zip(first, second, strict=True):
        for name in names:
            if is_stated(x.get(name)) and is_stated(y.get(name)):
                for place, equal in places.items():
                    one, other = getattr(x[name], place), getattr(y[name], place)
                    if one or other:
                        equal.append(one == other)
    return {
        "findings": {name: row for name, row in table.items() if row["positive_en"] or row["positive_zh"]},
        "places": {place: {"equal": float(np.mean(equal)), "count": len(equal)} for place, equal in places.items()},
    }


def binary_agreement(first: np.ndarray, second: np.ndarray) -> dict[str, float]:
    """Compares two boolean labelings (N,)."""
    observed = float(np.mean(first == second))
    chance = float(first.mean() * second.mean() + (1 - first.mean()) * (1 - second.mean()))
    both, either = int((first & second).sum()), int(first.sum() + second.sum())
    return {
        "kappa": (observed - chance) / (1 - chance) if chance < 1 else float("nan"),
        "f1": 2 * both / either if either else float("nan"),
        "agreement": observed,
        "positive_en": int(first.sum()),
        "positive_zh": int(second.sum()),
    }


def seconds_for_10000(rows: list[dict[str, Any]], field: Callable[[dict[str, Any]], str], language: str) -> float:
    """Returns the processor time of one core for 10,000 reports, from the time for the distinct ones at hand."""
    texts = list(dict.fromkeys(field(row) for row in rows))
    labeler = FindingLabeler(language)
    start = time.process_time()
    labeler.label_reports(texts)
    return (time.process_time() - start) / len(texts) * 10_000


def as_markdown(results: dict[str, Any]) -> str:
    """Renders the held-apart parts, with the development parts' totals beside."""
    lines = []
    for name in ("openi_iu_reports", "ctrate_reports_text"):
        part, development = results[name][RESULT], results[name][DEVELOPMENT]
        lines += [f"**{name}**, {part['num_reports']} reports held apart", ""]
        lines += [
            "| finding | n | precision | recall | F1 | F1, set's own reading | F1, plain keywords | F1, development |"
        ]
        lines += ["|" + "---|" * 8]
        for finding, row in part["rules"].items():
            cells = [row["precision"], row["recall"], row["f1"], part["set's own reading"][finding]["f1"]]
            cells += [part["plain keywords"][finding]["f1"], development["rules"][finding]["f1"]]
            lines.append(f"| {finding} | {row['support']} | " + " | ".join(f"{cell:.3f}" for cell in cells) + " |")
        lines.append("")
    part = results["cov_ctr"][RESULT]
    development = results["cov_ctr"][DEVELOPMENT]
    lines += [f"**cov_ctr**, English against Chinese, {part['num_reports']} pairs held apart", ""]
    lines += ["| finding | n EN | n ZH | kappa | F1 | equal | kappa, development | n, development |", "|" + "---|" * 8]
    for finding, row in development["findings"].items():
        held = part["findings"].get(finding)
        count = row["positive_en"] + row["positive_zh"]
        if held is None or count < MIN_AGREEMENT_POSITIVES:
            continue
        lines.append(
            f"| {finding} | {held['positive_en']} | {held['positive_zh']} | {held['kappa']:.3f} | {held['f1']:.3f} | "
            f"{held['agreement']:.3f} | {row['kappa']:.3f} | {row['positive_en']}/{row['positive_zh']} |"
        )
    for place, row in part["places"].items():
        other = development["places"][place]
        cells = f"{row['count']} | | | | {row['equal']:.3f} | equal {other['equal']:.3f} | {other['count']}"
        lines.append(f"| same {place} | {cells} |")
    seconds = ", ".join(f"{name} {value:.1f} s" for name, value in results["seconds_for_10000_reports"].items())
    return "\n".join([*lines, "", f"10,000 reports on one core: {seconds}."])


def main() -> None:
    """Reads the command line, validates, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with openi_iu_reports, ctrate_reports_text, cov_ctr"
    )
    parser.add_argument("--output", type=Path, default=Path("model_cards/results/finding_labeler.json"))
    options = parser.parse_args()
    labelers = {code: FindingLabeler(code) for code in ("en", "zh")}
    openi, ctrate, cov = (options.data / name for name in ("openi_iu_reports", "ctrate_reports_text", "cov_ctr"))
    results: dict[str, Any] = {
        openi.name: validate_labels(openi, labelers["en"], "labels21"),
        ctrate.name: validate_labels(ctrate, labelers["en"], "labels18"),
        cov.name: validate_languages(cov, labelers),
    }
    pairs = [row for row in read_rows(cov, "metadata.jsonl") if row.get("report_zh")]
    results["seconds_for_10000_reports"] = {
        "English radiographs": seconds_for_10000(read_rows(openi, "data.jsonl"), english_text, "en"),
        "English CT": seconds_for_10000(read_rows(ctrate, "data.jsonl"), english_text, "en"),
        "Chinese CT": seconds_for_10000(pairs, lambda row: row["report_zh"], "zh"),
    }
    results["table"] = as_markdown(results)
    print(results["table"])
    options.output.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=1, ensure_ascii=False)
    options.output.write_text(re.sub(r"\bNaN\b", "null", text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
