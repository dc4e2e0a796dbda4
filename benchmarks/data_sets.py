# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Read the full tables of the field's sets: counts beside those published, speed, memory, and rows that are bad.

Tables: those of NIH ChestX-ray14, CheXpert, RSNA, SIIM-ACR, VinDr-CXR and Open-i in the data folder, without their
images, and a MIMIC-CXR of the published size whose tables are made up here. Each is read in a process of its own,
whose peak memory is told above that of the imports. Then one row in a hundred is broken, each in one of seven ways,
and the table is read again: studies none of whose rows was touched must be there, unchanged. Linux only.

    python benchmarks/data_sets.py --data ../shared/data
"""

import argparse
import gzip
import json
import random
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from m3fm.data.opening import open_set
from m3fm.data.schema import StudyRecord
from m3fm.data.statistics import SetStatistics
from m3fm.evaluation.runs import NOTICE, library_versions, write_json
from m3fm.evaluation.tables import markdown_table

# Set to (file in the data folder, its name in the set's layout).
TABLES = {
    "nih_chestxray14": (
        ("Data_Entry_2017_v2020.csv.gz", "Data_Entry_2017_v2020.csv"),
        ("BBox_List_2017.csv.gz", "BBox_List_2017.csv"),
    ),
    "chexpert": (("chexpert_train.csv.gz", "train.csv"),),
    "rsna": (("kaggle_stage_2_train_labels.csv.zip", "stage_2_train_labels.csv"),),
    "siim": (("siim-pneumothorax-train-rle.csv.gz", "train-rle.csv"),),
    "vindr": (("vinbigdata-train.csv.gz", "train.csv"),),
    "iu_xray": (("NLMCXR_reports.tgz", ""),),
}
COUNTED = ("studies", "images", "patients", "boxes")
MIMIC_PATIENTS, MIMIC_STUDIES, MIMIC_IMAGES = 65_379, 227_835, 377_110
SPOIL = {
    "cut": lambda line: line.rsplit(b",", 1)[0],
    "too long": lambda line: line + b",,,,,",
    "open quote": lambda line: b'"' + line,
    "encoding": lambda line: b"\xff\xfe" + line,
    "empty fields": lambda line: b"," * line.count(b","),
    "another label": lambda line: line.split(b",")[0] + b",?" * line.count(b","),
    "another folder": lambda line: b"../" + line,
}


def content_of(path: Path) -> bytes:
    """Return a table as it was before it was compressed."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            return archive.read(archive.namelist()[0])
    return gzip.decompress(path.read_bytes())


def lay_out(name: str, data: Path, folder: Path) -> None:
    """Write the tables of a set as it is published."""
    folder.mkdir()
    for file, place in TABLES[name]:
        source = data / "label_tables" / file
        if place:
            (folder / place).write_bytes(content_of(source))
        else:
            with tarfile.open(source) as archive:
                archive.extractall(folder, filter="data")


def make_mimic(folder: Path) -> None:
    """Write tables of MIMIC-CXR's size: patients, studies and views drawn by a seed, labels for every study."""
    folder.mkdir()
    draw = random.Random(0)
    patients = sorted(draw.choices(range(10_000_000, 10_000_000 + MIMIC_PATIENTS), k=MIMIC_STUDIES - MIMIC_PATIENTS))
    patients = sorted([*patients, *range(10_000_000, 10_000_000 + MIMIC_PATIENTS)])
    views = [1] * MIMIC_STUDIES
    for place in draw.choices(range(MIMIC_STUDIES), k=MIMIC_IMAGES - MIMIC_STUDIES):
        views[place] += 1
    labels = (
        "Atelectasis,Cardiomegaly,Consolidation,Edema,Enlarged Cardiomediastinum,Fracture,Lung Lesion,Lung Opacity,"
    )
    labels += "No Finding,Pleural Effusion,Pleural Other,Pneumonia,Pneumothorax,Support Devices"
    with (
        gzip.open(folder / "mimic-cxr-2.0.0-metadata.csv.gz", "wt", 1) as metadata,
        gzip.open(folder / "mimic-cxr-2.0.0-split.csv.gz", "wt", 1) as split,
        gzip.open(folder / "mimic-cxr-2.0.0-chexpert.csv.gz", "wt", 1) as chexpert,
    ):
        metadata.write("dicom_id,subject_id,study_id,PerformedProcedureStepDescription,ViewPosition,Rows,Columns\n")
        split.write("dicom_id,study_id,subject_id,split\n")
        chexpert.write(f"subject_id,study_id,{labels}\n")
        for number, (patient, count) in enumerate(zip(patients, views, strict=True)):
            study = 50_000_000 + number
            part = "train" if patient % 50 else ("validate" if patient % 100 else "test")
            chexpert.write(f"{patient},{study},{','.join(draw.choices(['', '1.0', '0.0', '-1.0'], k=14))}\n")
            for view in range(count):
                name = f"{patient:08x}-{study:08x}-{view:08x}-00000000-00000000"
                metadata.write(
                    f"{name},{patient},{study},CHEST (PA AND LAT),{('PA', 'LATERAL')[view % 2]},3056,2544\n"
                )
                split.write(f"{name},{study},{patient},{part}\n")


def read_alone(folder: Path, name: str) -> dict[str, Any]:
    """Read a set in this process, and tell counts, seconds, and memory in MB above that before."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is that of the imports
    before = memory_mb("VmRSS")
    opened, start = open_set(folder, name, on_bad="skip", images="unchecked"), time.perf_counter()
    studies = sum(1 for _ in opened)
    seconds = time.perf_counter() - start
    memory = memory_mb("VmHWM") - before
    counted = SetStatistics()
    for record in opened:
        counted.add(record)
    counts = counted.as_dict()
    return {
        "seconds": seconds,
        "studies_per_second": studies / seconds,
        "memory_mb": memory,
        "bad_rows": opened.reading.counts.total(),
        "counts": {what: counts[what] for what in COUNTED},
        "published": compare_published(opened.set.published, counts),
    }


def compare_published(published: Mapping[str, int], counts: dict[str, Any]) -> dict[str, list[int]]:
    """Return the counts that the publishers state and those found: of all parts, or of one that is here."""
    compared = {}
    for name, count in published.items():
        part, _, what = name.rpartition("_")
        here = counts.get(name) if name in COUNTED else counts["parts"].get(part, {}).get(what)
        if here is not None:
            compared[name.replace("_", " ")] = [count, here]
    return compared


def memory_mb(name: str) -> float:
    """Return what Linux says of this process's memory: "VmRSS" now, "VmHWM" at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def records_of(folder: Path, name: str) -> tuple[dict[str, StudyRecord], int]:
    """Return the studies by id, and how many rows were bad."""
    opened = open_set(folder, name, on_bad="skip", images="unchecked")
    return {record.study_id: record for record in opened}, opened.reading.counts.total()


def break_rows(folder: Path, name: str) -> dict[str, int]:
    """Break one row in a hundred of a set's first table; return what became of the studies."""
    clean, _ = records_of(folder, name)
    path = folder / TABLES[name][0][1]
    head, *rows = path.read_bytes().splitlines()
    places = random.Random(0).sample(range(len(rows)), len(rows) // 100)
    touched = set()
    for number, place in enumerate(places):
        touched.add(study_of_row(rows[place], name))
        rows[place] = list(SPOIL.values())[number % len(SPOIL)](rows[place])
    path.write_bytes(b"\n".join([head, *rows]) + b"\n")
    dirty, told = records_of(folder, name)
    good = [study for study in clean if study not in touched]
    return {
        "rows": len(rows),
        "broken": len(places),
        "told": told,
        "good_studies": len(good),
        "good_studies_lost_or_changed": sum(dirty.get(study) != clean[study] for study in good),
    }


def study_of_row(line: bytes, name: str) -> str:
    """Return the study that an intact row belongs to."""
    first = line.split(b",")[0].decode()
    if name == "chexpert":
        return "/".join(first.split("/")[-3:-1])
    return first.removesuffix(".png")


def measure(data: Path) -> dict[str, Any]:
    """Read every set."""
    results = {}
    with tempfile.TemporaryDirectory(prefix="m3fm-tables-") as scratch:
        for name in (*TABLES, "mimic_cxr"):
            folder = Path(scratch) / name
            make_mimic(folder) if name == "mimic_cxr" else lay_out(name, data, folder)
            command = [sys.executable, __file__, "--alone", str(folder), "--set", name]
            result = subprocess.run(command, capture_output=True, text=True, check=True)
            results[name] = json.loads(result.stdout)
            if name in TABLES and TABLES[name][0][1]:
                results[name]["one_percent_bad"] = break_rows(folder, name)
            sys.stderr.write(f"{name}: {results[name]}\n")
    return results


def render(results: dict[str, Any]) -> str:
    """Return a Markdown table."""
    head = ["set", *COUNTED, "as published", "studies/s", "memory MB", "bad rows told", "good studies lost"]
    lines = [head]
    for name, result in results.items():
        counts, published, broken = result["counts"], result["published"], result.get("one_percent_bad")
        equal = [name for name, (stated, here) in published.items() if stated == here]
        other = [f"{name} ({stated:,})" for name, (stated, here) in published.items() if stated != here]
        lines.append(
            [
                name + (" (made up)" if name == "mimic_cxr" else ""),
                *(f"{counts[what]:,}" if counts[what] else "–" for what in COUNTED),
                "; not ".join(filter(None, [", ".join(equal) or "–", ", ".join(other)])),
                f"{result['studies_per_second']:,.0f}",
                f"{result['memory_mb']:.0f}",
                f"{broken['told']:,} of {broken['broken']:,}" if broken else "–",
                f"{broken['good_studies_lost_or_changed']} of {broken['good_studies']:,}" if broken else "–",
            ]
        )
    return markdown_table(lines)


def main() -> None:
    """Measure, print the table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--output", type=Path, default=Path("model_cards/results/data_sets.json"))
    parser.add_argument("--alone", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--set", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone is not None:
        sys.stdout.write(json.dumps(read_alone(options.alone, options.set)))
        return
    results = measure(options.data)
    table = render(results)
    versions = library_versions()
    write_json(options.output, {"notice": NOTICE, "versions": versions, "table": table, "results": results})
    sys.stdout.write(f"{table}\n")


if __name__ == "__main__":
    main()
