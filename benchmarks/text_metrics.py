# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Measure how far our text metrics lie from the public implementations, and how long both take, in one run.

Pairs of different real reports that share a label are scored, so that the prediction is about as wrong as a model's:
English Open-i findings; Chinese reports of COV-CTR and the machine translations of Open-i. Peers get the same tokens:
pycocoevalcap (BLEU, ROUGE-L, CIDEr-D, and METEOR's Java release with the same modules and parameters) and sacrebleu
(chrF). The full Java METEOR, with its synonyms and paraphrases, is compared too, as another metric.

Prints a markdown table, and writes the same as JSON with `--output`. Needs Java; nothing is downloaded.
"""

import argparse
import json
import os
import platform
import random
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge
from sacrebleu.metrics import CHRF

import m3fm
from m3fm.evaluation.meteor import ALPHA, BETA, GAMMA, STEM_WEIGHT, JavaMeteor
from m3fm.evaluation.ngrams import BLEU_NAMES
from m3fm.evaluation.resampling import point_scores
from m3fm.evaluation.text_metrics import TextScorer, metric_names
from m3fm.evaluation.tokens import TOKENIZATIONS, tokenize

SOURCES = {"en": "Open-i findings", "zh": "COV-CTR reports and translations of Open-i"}
# The modules of METEOR's Java release that ours has.
METEOR_OPTIONS = {
    "en": ["-l", "en", "-m", "exact stem", "-w", f"1.0 {STEM_WEIGHT}"],
    "zh": ["-l", "other", "-m", "exact", "-w", "1.0"],
}


def load_reports(data: Path, language: str) -> list[tuple[str, str]]:
    """Returns (label, report) of every real report of a language."""
    records = _read_lines(data / "openi_iu_reports" / "data.jsonl")
    labels = {record["study_id"]: ",".join(sorted(record.get("labels21", []))) for record in records}
    if language == "en":
        return [(labels[each["study_id"]], each["findings_en"]) for each in records if each.get("findings_en")]
    parallel = _read_lines(data / "openi_iu_reports" / "parallel_en_zh.jsonl")
    reports = [(labels.get(each["study_id"], ""), each["zh"]) for each in parallel]
    tomography = _read_lines(data / "cov_ctr" / "metadata.jsonl")
    return reports + [(f"ct {each['covid']}", each["report_zh"]) for each in tomography if each.get("report_zh")]


def _read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def draw_pairs(reports: list[tuple[str, str]], count: int, seed: int) -> tuple[list[str], list[str]]:
    """Draws predictions and references: different reports of one label."""
    by_label: dict[str, list[str]] = {}
    for label, text in reports:
        by_label.setdefault(label, []).append(text)
    known = [(label, text) for label, text in reports if len(set(by_label[label])) > 1]
    generator = random.Random(seed)
    predictions, references = [], []
    while len(references) < count:
        label, reference = generator.choice(known)
        prediction = generator.choice(by_label[label])
        if prediction != reference:
            predictions.append(prediction)
            references.append(reference)
    return predictions, references


class Peers:
    """The public implementations, on our tokens.

    Args:
        predictions: N reports.
        references: N reports.
        language: Of both.
    """

    def __init__(self, predictions: list[str], references: list[str], language: str) -> None:
        self.texts = predictions, references
        self.language = language
        self.tokens = {
            cut: [[" ".join(tokenize(text, cut)) for text in texts] for texts in self.texts]
            for cut in TOKENIZATIONS[language]
        }

    def score(self, names: tuple[str, ...]) -> dict[str, tuple[float, np.ndarray | None]]:
        """Returns each metric of the corpus and of its reports."""
        scores: dict[str, tuple[float, np.ndarray | None]] = {}
        for cut, (found, wanted) in self.tokens.items():
            suffix = "" if cut == TOKENIZATIONS[self.language][0] else f"_{cut}"
            found_by_id, wanted_by_id = ({row: [text] for row, text in enumerate(texts)} for texts in (found, wanted))
            corpus, each = Bleu(4).compute_score(wanted_by_id, found_by_id, verbose=0)
            for name, total, singles in zip(BLEU_NAMES, corpus, each, strict=True):
                scores[name + suffix] = total, np.array(singles)
            for name, peer in (("rouge_l", Rouge()), ("cider_d", Cider())):
                total, singles = peer.compute_score(wanted_by_id, found_by_id)
                scores[name + suffix] = float(total), np.asarray(singles)
            scores["meteor" + suffix] = run_meteor(found, wanted, self.language)
        scores["chrf"] = CHRF().corpus_score(self.texts[0], [self.texts[1]]).score / 100, None
        return {name: scores[name] for name in names}


def run_meteor(predictions: list[str], references: list[str], language: str) -> tuple[float, np.ndarray]:
    """Runs METEOR's Java release with our modules and parameters on tokens joined by spaces."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("predictions", "references")]
        for path, texts in zip(files, (predictions, references), strict=True):
            path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
        parameters = ["-p", f"{ALPHA} {BETA} {GAMMA} 0.5", "-lower", *METEOR_OPTIONS[language]]
        command = [str(shutil.which("java")), "-Xmx2G", "-jar", str(JavaMeteor().jar), *map(str, files), *parameters]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    each = [float(line.split("\t")[1]) for line in lines if line.startswith("Segment")]
    return float(next(line for line in lines if line.startswith("Final score")).split()[-1]), np.array(each)


def measure_parity(predictions: list[str], references: list[str], language: str) -> dict[str, dict[str, float]]:
    """Returns by metric our score, the peer's, their difference, and the largest one of a single report."""
    names = metric_names(language)
    measurements = TextScorer(references, language).measure(predictions)
    ours = point_scores(measurements, len(references))
    singles: dict[str, np.ndarray] = {}
    for measurement in measurements:
        singles |= measurement.score(np.eye(len(references)))
    parity = {}
    for name, (score, each) in Peers(predictions, references, language).score(names).items():
        parity[name] = {"ours": ours[name], "peer": score, "difference": abs(ours[name] - score)}
        if each is not None:
            gaps = np.abs(singles[name] - each)
            parity[name] |= {"largest_of_a_report": float(gaps.max()), "reports_apart": int((gaps > 1e-4).sum())}
    return parity


def count_collisions(predictions: list[str], references: list[str], language: str) -> dict[str, int]:
    """Counts, by tokenisation, the pairs in which Java's 32-bit hash takes two different words for one."""
    counts = {}
    for cut in TOKENIZATIONS[language]:
        pairs = zip(predictions, references, strict=True)
        words = [{token.lower() for text in pair for token in tokenize(text, cut)} for pair in pairs]
        counts[cut] = sum(len({_java_hash(word) for word in each}) < len(each) for each in words)
    return counts


def _java_hash(word: str) -> int:
    value = 0
    for unit in memoryview(word.encode("utf-16-le")).cast("H"):
        value = (31 * value + unit) & 0xFFFFFFFF
    return value


def compare_full_meteor(predictions: list[str], references: list[str]) -> dict[str, float]:
    """Compares our METEOR with all of the Java release on English reports."""
    ones, eye = np.ones((1, len(references))), np.eye(len(references))
    ours = TextScorer(references, "en", metrics=["meteor"]).measure(predictions)[0]
    full = JavaMeteor().measure(predictions, references)
    return {
        "ours": float(ours.score(ones)["meteor"][0]),
        "java": float(full.score(ones)["meteor_java"][0]),
        "pearson_r": float(np.corrcoef(ours.score(eye)["meteor"], full.score(eye)["meteor_java"])[0, 1]),
    }


def clock(action: Callable[[], Any]) -> dict[str, float]:
    """Returns the wall and the processor seconds of `action`, those of its child processes included."""
    start, before = time.perf_counter(), os.times()
    action()
    after = os.times()
    return {"wall_s": time.perf_counter() - start, "cpu_s": sum(after[:4]) - sum(before[:4])}


def measure_speed(predictions: list[str], references: list[str], language: str) -> dict[str, Any]:
    """Times ours, from texts to all scores, and the peers on tokens that are already cut."""
    names = metric_names(language)
    # Loads jieba's dictionary and nltk, once a process.
    TextScorer(references[:1], language).measure(predictions[:1])

    def ours() -> None:
        point_scores(TextScorer(references, language).measure(predictions), len(references))

    times = {"ours": clock(ours)}
    peers = Peers(predictions, references, language)
    times["peers"] = clock(lambda: peers.score(names))
    ratios = {f"ratio_{kind}": times["peers"][f"{kind}_s"] / times["ours"][f"{kind}_s"] for kind in ("wall", "cpu")}
    return times | ratios


def describe_machine() -> dict[str, Any]:
    """Says what the numbers were measured on."""
    packages = {name: version(name) for name in ("numpy", "pycocoevalcap", "sacrebleu", "jieba", "nltk")}
    return {
        "cpus": os.cpu_count(),
        "load_average_1_min": round(os.getloadavg()[0], 2),
        "machine": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **packages,
        "m3fm": m3fm.__version__,
    }


def as_markdown(measured: dict[str, Any]) -> str:
    """Renders what was measured as a table, the machine below it."""
    rows = [
        (
            f"{language}: {name}",
            f"{each['ours']:.4f}",
            f"{each['peer']:.4f}",
            _small(each["difference"]),
            _small(each["largest_of_a_report"]) if "largest_of_a_report" in each else "-",
        )
        for language, result in measured["languages"].items()
        for name, each in result["parity"].items()
    ]
    pairs = measured["pairs"]
    lines = [f"{pairs:,} pairs of real reports a language, the same tokens for both:", ""]
    lines += ["| metric | ours | public | difference | largest of a report |", "|---|---|---|---|---|"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    lines += [
        "",
        f"{measured['timed_pairs']:,} pairs in all of these metrics, ours from texts, theirs from tokens:",
        "",
    ]
    lines += ["| language | ours, wall (CPU) s | public, wall (CPU) s | ratio, wall (CPU) |", "|---|---|---|---|"]
    for language, result in measured["languages"].items():
        speed = result["speed"]
        ours, peers = (f"{speed[who]['wall_s']:.1f} ({speed[who]['cpu_s']:.1f})" for who in ("ours", "peers"))
        lines.append(f"| {language} | {ours} | {peers} | {speed['ratio_wall']:.1f} ({speed['ratio_cpu']:.1f}) |")
    full = measured["full_meteor"]
    lines += [
        "",
        f"METEOR of the {pairs:,} English pairs: ours {full['ours']:.4f}, the full Java release {full['java']:.4f}, "
        f"Pearson r of the reports' scores {full['pearson_r']:.3f}.",
        "",
        "Pairs in which Java's hash takes two words for one: "
        + ", ".join(
            f"{cut} {count}" for each in measured["languages"].values() for cut, count in each["collisions"].items()
        )
        + ".",
        "",
        ", ".join(f"{name} {value}" for name, value in measured["machine"].items()),
    ]
    return "\n".join(lines)


def _small(value: float) -> str:
    return f"{value:.0e}" if value else "0"


def main() -> None:
    """Reads the command line, measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--pairs", type=int, default=1000, help="compared with the public implementations")
    parser.add_argument("--timed-pairs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0, help="of the pairs")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    if not (options.data / "openi_iu_reports").is_dir():
        parser.error(f"{options.data} holds no openi_iu_reports")
    measured: dict[str, Any] = {
        "machine": describe_machine(),
        "sources": SOURCES,
        "seed": options.seed,
        "pairs": options.pairs,
        "timed_pairs": options.timed_pairs,
        "languages": {},
    }
    for language in TOKENIZATIONS:
        reports = load_reports(options.data, language)
        speed = measure_speed(*draw_pairs(reports, options.timed_pairs, options.seed + 1), language)
        pairs = draw_pairs(reports, options.pairs, options.seed)
        parity, collisions = measure_parity(*pairs, language), count_collisions(*pairs, language)
        measured["languages"][language] = {"speed": speed, "parity": parity, "collisions": collisions}
        if language == "en":
            measured["full_meteor"] = compare_full_meteor(*pairs)
    measured["table"] = as_markdown(measured)
    print(measured["table"])
    if options.output:
        options.output.write_text(json.dumps(measured, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
