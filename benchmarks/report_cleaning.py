# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Measure the cleaning of report text on real reports: what it drops, what it changes, what it leaves alone.

Per set and language: sections found, parts dropped by reason, changes by kind, reports left empty, whether the finding
labeler reads the same before and after normalising, numbers and sides lost, and reports a second. Besides: how much
of Open-i a mask costs when its sentence is dropped and when the mask alone is taken out, how many of Open-i's sections
are found again once a report is written as one text, and precision and recall on sentences of comparison labelled by
hand. Prints a markdown table and writes all numbers as JSON. No report text is printed or written.
"""

import argparse
import json
import re
import tarfile
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import yaml

from m3fm.data.report_rules import load_report_rules
from m3fm.data.report_sections import report_from_sections, report_from_text, split_sections
from m3fm.data.report_text import (
    clean_fully,
    clean_report,
    count_changes,
    mentions_earlier_or_mask,
    normalize_text,
    split_sentences,
)
from m3fm.evaluation.finding_labeler import label_report

ROOT = Path(__file__).resolve().parents[1]
#: Set, language, file, and the columns of its reports: one is a whole report, two are findings and impression.
SETS = (
    ("openi_iu_reports", "en", "data.jsonl", ("findings_en", "impression_en")),
    ("openi_iu_reports paraphrased", "zh", "data.jsonl", ("paraphrase_zh",)),
    ("cov_ctr", "en", "metadata.jsonl", ("report_en",)),
    ("cov_ctr", "zh", "metadata.jsonl", ("report_zh",)),
    ("ctrate_reports_text", "en", "data.jsonl", ("report_en",)),
    ("covid_chestxray", "en", "metadata.jsonl", ("clinical_notes_en",)),
    ("tb_shenzhen_montgomery_128", "en", "metadata.jsonl", ("reading_en",)),
)
NUMBER = re.compile(r"\d+(?:\.\d+)?")
SIDE = re.compile(r"left|right|bilateral|[左右双两]")


def read_reports(folder: Path, file: str, columns: tuple[str, ...]) -> list[tuple[str | None, ...]]:
    """Reads the reports of a set; rows without text are left out."""
    rows = [json.loads(line) for line in (folder / file).read_text(encoding="utf-8").splitlines() if line.strip()]
    reports = [tuple(row.get(column) for column in columns) for row in rows]
    return [report for report in reports if any(part and part.strip() for part in report)]


def numbers_lost(before: str, after: str, language: str) -> int:
    """Counts numbers that are gone or new, list numbers apart."""
    change = Counter(NUMBER.findall(unicodedata.normalize("NFKC", before)))
    change.subtract(NUMBER.findall(unicodedata.normalize("NFKC", after)))
    new = -sum(count for count in change.values() if count < 0)
    gone = sum(count for count in change.values() if count > 0)
    return new + abs(gone - count_changes(before, language)["list_number"])


def measure_set(reports: list[tuple[str | None, ...]], language: str) -> dict[str, Any]:
    """Cleans the reports of a set and counts."""
    start = time.perf_counter()
    cleaned = [
        report_from_sections(*report, language) if len(report) > 1 else report_from_text(str(report[0]), language)
        for report in reports
    ]
    seconds = time.perf_counter() - start
    texts = ["\n\n".join(filter(None, report)) for report in reports]
    dropped: Counter[str] = Counter()
    changed: Counter[str] = Counter()
    parts = 0
    for text in texts:
        dropped.update(reason for reason, _ in clean_fully(text, language).dropped)
        changed.update(count_changes(text, language))
        parts += len(split_sentences(normalize_text(text, language), language))
    normal = [normalize_text(text, language) for text in texts]
    return {
        "reports": len(reports),
        "with_sections": sum(report is not None and report.findings is not None for report in cleaned) / len(reports),
        "sentences": parts,
        "dropped": dict(sorted(dropped.items())),
        "changed": dict(sorted(changed.items())),
        "left_empty": sum(report is not None and not report.text for report in cleaned),
        "characters_kept": sum(len(report.text) for report in cleaned if report) / sum(map(len, normal)),
        "labels_differ_after_normalising": sum(
            label_report(before, language) != label_report(after, language)
            for before, after in zip(texts, normal, strict=True)
            if before != after
        ),
        "numbers_lost": sum(numbers_lost(*pair, language) for pair in zip(texts, normal, strict=True)),
        "reports_with_other_sides": sum(
            Counter(SIDE.findall(before.lower())) != Counter(SIDE.findall(after.lower()))
            for before, after in zip(texts, normal, strict=True)
        ),
        "changed_by_cleaning_again": sum(
            report is not None and clean_fully(report.text, language).text != report.text for report in cleaned
        ),
        "reports_per_second": len(reports) / seconds,
    }


def measure_masks(reports: list[tuple[str | None, ...]]) -> dict[str, float]:
    """Compares what is left of Open-i when a sentence with a mask is dropped and when its mask alone is taken out."""
    mask = load_report_rules("en").mask
    sentences = [s for report in reports for part in report if part for s in split_sentences(part)]
    masked = [sentence for sentence in sentences if mask.search(sentence)]
    words = sum(len(sentence.split()) for sentence in sentences)
    left = [mask.sub(" ", sentence) for sentence in masked]
    return {
        "sentences": len(sentences),
        "sentences_with_a_mask": len(masked) / len(sentences),
        "words_left_without_these_sentences": 1 - sum(len(sentence.split()) for sentence in masked) / words,
        "words_left_without_the_masks_alone": 1
        - sum(len(a.split()) - len(b.split()) for a, b in zip(masked, left, strict=True)) / words,
        # A mask beside an article, a preposition or a joined word stood for a word that the sentence needs.
        "masks_that_leave_a_hole": sum(HOLE.search(sentence) is not None for sentence in masked) / len(masked),
    }


HOLE = re.compile(
    r"(?i)\b(?:a|an|the|of|in|to|no|with|from|at|is|are|has|and|or|for|by|on|this|these|some)\s+(?:\w+[ -])?XXXX|-XXXX"
    r"|XXXX(?:-|\s+(?:of|in|to|at|is|are|was|were|has|have|and|or|with|from|on|by)\b)|^\W*XXXX"
)


def open_i_sections(archive: Path) -> Iterator[dict[str, str]]:
    """Yields the sections of every XML report of Open-i."""
    with tarfile.open(archive) as tar:
        for member in tar:
            file = tar.extractfile(member) if member.name.endswith(".xml") else None
            if file is not None:
                texts = ElementTree.parse(file).iter("AbstractText")
                yield {node.get("Label", ""): " ".join((node.text or "").split()) for node in texts}


def measure_sections(archive: Path) -> dict[str, float]:
    """Writes Open-i's reports as one text, section under section or all in one line, and splits them again."""
    reports = [report for report in open_i_sections(archive) if report.get("FINDINGS") or report.get("IMPRESSION")]
    result: dict[str, float] = {"reports": len(reports)}
    for name, joint in (("paragraphs", "\n\n"), ("one_line", " ")):
        found = 0
        for report in reports:
            sections = split_sections(joint.join(f"{label}: {text}" for label, text in report.items() if text), "en")
            found += all(
                sections.get(label.lower(), "") == report.get(label, "") for label in ("FINDINGS", "IMPRESSION")
            )
        result[f"both_sections_exact_{name}"] = found / len(reports)
    return result


def measure_sentences() -> dict[str, dict[str, dict[str, float]]]:
    """Returns precision and recall of "compares with an earlier examination" on the sentences of the tests.

    The rules were written with the first group in view; the later group was written after them.
    """
    labelled = yaml.safe_load((ROOT / "tests/data/report_sentences.yaml").read_text(encoding="utf-8"))
    ways: dict[str, Callable[[str, str], bool]] = {
        "clean_report": mentions_earlier_or_mask,
        "clean_fully": lambda sentence, code: any(
            r in ("earlier", "mask") for r, _ in clean_fully(sentence, code).dropped
        ),
    }
    result: dict[str, dict[str, dict[str, float]]] = {}
    for language, sentences in labelled.items():
        for way, is_dropped in ways.items():
            for group in ("", "later_"):
                earlier, single = sentences[f"{group}earlier"], sentences[f"{group}single"]
                right = sum(is_dropped(sentence, language) for sentence in earlier)
                wrong = sum(is_dropped(sentence, language) for sentence in single)
                result.setdefault(language, {})[f"{way}, {group or 'seen_'}sentences"] = {
                    "precision": right / (right + wrong),
                    "recall": right / len(earlier),
                    "sentences": len(earlier) + len(single),
                }
    return result


def table(sets: dict[str, dict[str, Any]]) -> str:
    """Returns the numbers of every set as a markdown table."""
    lines = ["| set | reports | dropped: earlier, mask | left empty | labels differ | numbers lost | reports/s |"]
    lines.append("|---|---|---|---|---|---|---|")
    for name, row in sets.items():
        drops = ", ".join(str(row["dropped"].get(reason, 0)) for reason in ("earlier", "mask"))
        cells = [name, row["reports"], f"{drops} of {row['sentences']}", row["left_empty"]]
        cells += [row["labels_differ_after_normalising"], row["numbers_lost"], round(row["reports_per_second"])]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> None:
    """Runs everything."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data")
    parser.add_argument("--out", type=Path, default=ROOT / "model_cards/results/report_cleaning.json")
    arguments = parser.parse_args()
    sets: dict[str, dict[str, Any]] = {}
    for name, language, file, columns in SETS:
        folder = arguments.data / name.split()[0]
        sets[f"{name} ({language})"] = measure_set(read_reports(folder, file, columns), language)
    reports = read_reports(arguments.data / "openi_iu_reports", "data.jsonl", ("findings_en", "impression_en"))
    sections = [" ".join(filter(None, report)) for report in reports]
    result = {
        "table": table(sets),
        "sets": sets,
        "masks": measure_masks(reports),
        "sections": measure_sections(arguments.data / "label_tables/NLMCXR_reports.tgz"),
        "sentences": measure_sentences(),
        "open_i_clean_report": {
            "left_empty": sum(not clean_report(text) for text in sections),
            "same_as_clean_fully": sum(clean_report(text) == clean_fully(text, "en").text for text in sections)
            / len(sections),
        },
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(sets))
    print(json.dumps({key: value for key, value in result.items() if key not in ("table", "sets")}, indent=1))


if __name__ == "__main__":
    main()
