# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Measure what the parts of the data sets share, and what that does to a score.

- The published split of COV-CTR (training and validation; its test part is held back) against the fair one that ships.
- The splits of the other sets as `load_studies` gives them, and two sets together.
- Retrieval: a study is answered with the report of the image that looks most like its own (by local contrast of
  thumbnails), once as the parts are and once without its relatives: the difference is what the leak adds to a score.

With `--pictures` a grid of leaked pairs is written. It shows images that may not be passed on.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from m3fm.data.groups import group_keys
from m3fm.data.leaks import LeakReport, find_leaks, study_marks
from m3fm.data.near_duplicates import RecordHashes, hash_records
from m3fm.data.opening import open_set
from m3fm.data.schema import LANGUAGES, StudyRecord
from m3fm.data.splits import fair_split_file, read_split
from m3fm.data.splits.fair import fair_records
from m3fm.data.studies import carved_ids
from m3fm.data.thumbnail_alignment import local_contrast
from m3fm.evaluation import ClinicalScorer, score_reports
from m3fm.evaluation.resampling import point_scores
from m3fm.evaluation.tables import markdown_table

CARVED = ("covid_chestxray", "kermany_pneumonia_224", "tb_shenzhen_montgomery_128")
PUBLISHED = ("nih_chestxray14_sample", "openi_iu_reports")
PARTS = ("train", "validation")


def read_records(root: Path, name: str) -> list[StudyRecord]:
    """Reads a set with all source documents known."""
    return list(fair_records(root / name)) if name == "cov_ctr" else list(open_set(root / name))


def parts_of(name: str, records: Sequence[StudyRecord]) -> dict[str, str]:
    """Returns study id to part, as training sees it: validation parts that m3fm fixes count, parts without a name."""
    carved = carved_ids(name)
    return {
        record.study_id: "validation" if record.study_id in carved else record.split or "train"
        for record in records
        if record.split in (None, *PARTS)
    }


def compare_splits(records: Sequence[StudyRecord], hashes: RecordHashes) -> dict[str, LeakReport]:
    """Reports the published and the fair split of COV-CTR."""
    reported = [record for record in records if record.split in PARTS]
    return {
        "published": find_leaks(reported, hashes=hashes),
        "fair": find_leaks(records, read_split(fair_split_file("cov_ctr")), hashes),
    }


def leak_effect(records: Sequence[StudyRecord], hashes: RecordHashes) -> dict[str, Any]:
    """Scores retrieval with and without the relatives of each study among the images that may answer it."""
    reported = [record for record in records if all(record.reports.get(language) for language in LANGUAGES)]
    marks = [study_marks(record, hashes.marks.get((record.source, record.study_id), ())) for record in reported]
    groups = np.unique(
        group_keys([*sum(each.values(), ()), f"study:{number}"] for number, each in enumerate(marks)),
        return_inverse=True,
    )[1]
    features = thumbnail_features(reported, hashes)
    likeness = features @ features.T
    np.fill_diagonal(likeness, -np.inf)
    is_relative = groups[:, None] == groups
    parts = np.array([record.split for record in reported])
    results = {}
    for title, asked, known in (
        ("published validation part, answered from the training part", parts == "validation", parts == "train"),
        ("every study, answered from all others", np.ones(len(parts), bool), np.ones(len(parts), bool)),
    ):
        places = np.flatnonzero(asked)
        open_to_all = np.where(known, likeness[places], -np.inf)
        without = np.where(is_relative[places], -np.inf, open_to_all)
        has_relatives = (is_relative[places] & known & (np.arange(len(parts)) != places[:, None])).any(axis=1)
        results[title] = {
            "studies": len(places),
            "with_relatives": int(has_relatives.sum()),
            "all": {
                "as_it_is": report_scores(reported, open_to_all.argmax(axis=1), places),
                "without_relatives": report_scores(reported, without.argmax(axis=1), places),
            },
            "those_with_relatives": {
                "as_it_is": report_scores(reported, open_to_all[has_relatives].argmax(axis=1), places[has_relatives]),
                "without_relatives": report_scores(
                    reported, without[has_relatives].argmax(axis=1), places[has_relatives]
                ),
            },
        }
    return results


def thumbnail_features(records: Sequence[StudyRecord], hashes: RecordHashes) -> np.ndarray:
    """Returns the local contrast of one image a study, (studies, features), of unit length."""
    entries = dict(zip(hashes.images.owners.tolist(), hashes.images.entries, strict=True))
    by_study = {study: entries[place] for place, study in enumerate(hashes.studies)}
    pictures = np.stack([by_study[record.source, record.study_id]["thumbnail"] for record in records])
    features = local_contrast(pictures.astype(np.float32) / 255, 6.0, 0.02, 1.0).reshape(len(records), -1)
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def report_scores(records: Sequence[StudyRecord], answers: np.ndarray, places: np.ndarray) -> dict[str, float]:
    """Scores the reports of the answers against those of the studies asked for."""
    scores = {}
    for language in LANGUAGES:
        written = [records[place].reports[language].text for place in answers]
        wanted = [records[place].reports[language].text for place in places]
        texts = score_reports(written, wanted, language, metrics=("bleu_4",))
        clinical = point_scores(ClinicalScorer(wanted, language).measure(written), len(wanted))
        identical = np.mean([one == other for one, other in zip(written, wanted, strict=True)])
        scores[language] = {
            "bleu_4": round(texts["bleu_4"], 4),
            "finding_f1_micro": round(clinical["finding_f1_micro"], 4),
            "identical_reports": round(float(identical), 4),
        }
    return scores


def draw_pairs(records: Sequence[StudyRecord], hashes: RecordHashes, path: Path, most: int = 24) -> None:
    """Writes a grid of near-duplicates that the published parts share: training at the left of each pair."""
    record_of = {(record.source, record.study_id): record for record in records}
    crossing = []
    for pair in hashes.pairs:
        both = [record_of[hashes.studies[place]] for place in (pair.first, pair.second)]
        if {record.split for record in both} == set(PARTS):
            crossing.append((pair, sorted(both, key=lambda record: PARTS.index(record.split))))
    side, columns = 200, 3
    crossing = sorted(crossing, key=lambda each: -each[0].correlation)[:most]
    grid = Image.new("L", (columns * (2 * side + 20), -(-len(crossing) // columns) * (side + 24)), 255)
    draw = ImageDraw.Draw(grid)
    for number, (pair, both) in enumerate(crossing):
        left, top = number % columns * (2 * side + 20), number // columns * (side + 24)
        draw.text((left + 4, top + 4), f"training | validation, correlation {pair.correlation:.2f}", fill=0)
        for place, record in enumerate(both):
            picture = Image.open(record.images[0].path).convert("L").resize((side, side))
            grid.paste(picture, (left + place * side, top + 22))
    grid.save(path)


def leak_table(reports: dict[str, dict[str, Any]]) -> str:
    """Returns what training and validation share: things, and the studies of validation concerned."""
    kinds = ("patient", "document", "image", "group", "report:en", "report:zh")
    head = ["split", "studies of validation", "patients", "source documents", "near-duplicate images"]
    lines = [[*head, "any, through chains", "identical reports en", "zh"]]
    for title, report in reports.items():
        shared = {each["kind"]: each for each in report["shared"] if each["parts"] == ["train", "validation"]}
        name = f"cov_ctr, {title}" if title in ("published", "fair") else title
        concerned = [f"{shared[kind]['studies']['validation']:,}" if kind in shared else "–" for kind in kinds]
        lines.append([name, f"{report['studies']['validation']:,}", *concerned])
    return markdown_table(lines)


def main() -> None:
    """Measures and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--cache", type=Path, help="where hashes are kept between runs")
    parser.add_argument("--pictures", type=Path, help="where to write the grid of leaked pairs")
    parser.add_argument("--output", type=Path, default=Path("model_cards/results/leaks.json"))
    arguments = parser.parse_args()
    records = {name: read_records(arguments.data, name) for name in ("cov_ctr", *CARVED, *PUBLISHED)}
    hashes = {name: hash_records(each, cache_folder=arguments.cache) for name, each in records.items()}
    cov_ctr = compare_splits(records["cov_ctr"], hashes["cov_ctr"])
    others = {
        name: find_leaks(records[name], parts_of(name, records[name]), hashes[name]) for name in (*CARVED, *PUBLISHED)
    }
    together = [
        replace(record, split=parts_of(name, records[name]).get(record.study_id))
        for name in ("cov_ctr", "covid_chestxray")
        for record in records[name]
    ]
    both = hash_records(together, cache_folder=arguments.cache)
    across = find_leaks([record for record in together if record.split], hashes=both, by_source=True)
    for title, report in [*cov_ctr.items(), *others.items(), ("cov_ctr and covid_chestxray", across)]:
        print(f"\n## {title}\n\n{report.summary()}")
    results = {
        "command": "python benchmarks/leaks.py --data DATA",
        "cov_ctr": {title: report.as_dict() for title, report in cov_ctr.items()},
        "other_sets": {name: report.as_dict() for name, report in others.items()},
        "cov_ctr_and_covid_chestxray": across.as_dict(),
        "retrieval_on_cov_ctr": leak_effect(records["cov_ctr"], hashes["cov_ctr"]),
    }
    results["table"] = leak_table({**results["cov_ctr"], **results["other_sets"]})
    print(results["table"])
    print(json.dumps(results["retrieval_on_cov_ctr"], indent=1))
    arguments.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if arguments.pictures:
        arguments.pictures.mkdir(parents=True, exist_ok=True)
        draw_pairs(records["cov_ctr"], hashes["cov_ctr"], arguments.pictures / "cov_ctr_leaked_pairs.png")


if __name__ == "__main__":
    main()
