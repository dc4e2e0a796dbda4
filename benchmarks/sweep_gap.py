# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Choose how an image embedding crosses to the text side: temperature of the support memory, and beams.

Writes the validation reports of a data folder under every combination, scores them, and prints a markdown table; the
same goes to JSON with `--output`. Images are encoded once.
"""

import argparse
import json
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

import m3fm
from m3fm.data import Study, load_studies
from m3fm.evaluation.text_metrics import distinct_ratio, score_reports

COLUMNS = ("bleu_4", "rouge_l", "distinct")


@torch.inference_mode()
def sweep(
    folder: Path, studies: list[Study], temperatures: list[float], beams: list[int], batch_size: int
) -> list[dict[str, float | int | str]]:
    """Returns a row of scores for each temperature, number of beams and language."""
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    chunks = [studies[start : start + batch_size] for start in range(0, len(studies), batch_size)]
    tokens = []
    for chunk in tqdm(chunks, desc="images"):
        pixels = processor(images=[list(study.images) for study in chunk], return_tensors="pt")["pixel_values"]
        tokens.append(model.model.get_vision_features(pixels))
    rows = []
    grid = [(tau, count, code) for tau in temperatures for count in beams for code in model.config.languages]
    for tau, count, language in tqdm(grid, desc="combinations"):
        model.config.support_temperature = tau
        texts: list[str] = []
        for features in tokens:
            ids = model.generate(vision_features=features, language=language, num_beams=count, do_sample=False)
            texts += [text.strip() for text in processor.batch_decode(ids, skip_special_tokens=True)]
        references = [study.reports[language] for study in studies]
        scores = score_reports(texts, references, language, metrics=("bleu_4", "rouge_l"))
        scores["distinct"] = distinct_ratio(texts)
        row = {"temperature": tau, "beams": count, "language": language}
        rows.append(row | {name: scores[name] for name in COLUMNS})
    return rows


def as_markdown(rows: list[dict[str, float | int | str]]) -> str:
    """Renders the rows as a table."""
    head = list(rows[0])
    lines = [head, ["---"] * len(head)]
    lines += [[f"{value:.3f}" if name in COLUMNS else str(value) for name, value in row.items()] for row in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main() -> None:
    """Reads the command line, sweeps, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=m3fm.DEFAULT_CHECKPOINT, help="checkpoint folder")
    parser.add_argument(
        "--data", type=Path, required=True, help="data folder with a validation part in every language"
    )
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.01, 0.02, 0.05, 0.1])
    parser.add_argument("--beams", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--batch-size", type=int, default=24)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    studies = [study for study in load_studies(options.data) if study.split == "validation" and len(study.reports) > 1]
    if not studies:
        parser.error(f"{options.data} has no validation studies with reports in both languages")
    rows = sweep(options.model, studies, options.temperatures, options.beams, options.batch_size)
    table = as_markdown(rows)
    print(table)
    if options.output:
        options.output.write_text(json.dumps({"rows": rows, "table": table}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
