# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Reports that a checkpoint writes of training images, kept on disk, and their embeddings: input of a diagnosis head.

Letters in shapes: B studies, N images of a study, S tokens of an image, C width of the tower, D of the shared space.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ..data import Study
from ..evaluation.runs import complete_predictions
from ..modeling_m3fm import M3FMForImageClassification, M3FMForReportGeneration
from ..processing_m3fm import M3FMProcessor
from .features import FeatureCache

_WRITER_FILES = ("*.safetensors", "generation_config.json", "processor_config.json", "tokenizer*.json")


def hash_writer(folder: Path) -> str:
    """Returns the SHA-256 over what a checkpoint's reports depend on, as hex: labels of its config may change."""
    digest = hashlib.sha256()
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    settings = {name: value for name, value in config.items() if not name.startswith("diagnosis")}
    digest.update(json.dumps(settings, sort_keys=True).encode())
    others = [path for name in _WRITER_FILES for path in folder.glob(name)]
    for path in sorted(others):
        digest.update(path.name.encode())
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def write_reports(
    writer: M3FMForReportGeneration,
    processor: M3FMProcessor,
    studies: Sequence[Study],
    cache: FeatureCache,
    language: str,
    folder: Path,
    writer_key: str,
    batch_size: int = 32,
) -> list[str]:
    """Returns the report that the writer makes of each study's images; those written earlier are read from `folder`.

    Args:
        writer: Decodes greedily.
        processor: The writer's.
        studies: With tokens in `cache`.
        cache: Tokens of the writer's image tower.
        language: One that the writer knows.
        folder: Of the reports, a file for each set, language and writer.
        writer_key: Names the writer, as `hash_writer` does.
        batch_size: Studies at once.
    """
    folder.mkdir(parents=True, exist_ok=True)

    @torch.inference_mode()
    def predict(batch: Sequence[Study]) -> list[dict[str, str]]:
        images = {name: value.to(writer.device) for name, value in stack_tokens(batch, cache).items()}
        ids = writer.generate(**images, language=language, num_beams=1, do_sample=False)
        return [{"report": text.strip()} for text in processor.batch_decode(ids, skip_special_tokens=True)]

    reports: dict[tuple[str, str], str] = {}
    for source in sorted({study.source for study in studies}):
        part = [study for study in studies if study.source == source]
        path = folder / f"{source}-{language}-{writer_key[:16]}.jsonl"
        rows = complete_predictions(path, part, batch_size, predict, f"reports ({language}) of {source}")
        reports |= {(source, row["study_id"]): row["report"] for row in rows}
    return [reports[study.source, study.study_id] for study in studies]


@torch.inference_mode()
def embed_reports(
    model: M3FMForImageClassification, processor: M3FMProcessor, texts: Sequence[str], batch_size: int = 64
) -> torch.Tensor:
    """Embeds reports in the shared space, each distinct one once: (N, D)."""
    distinct = sorted(set(texts), key=lambda text: (len(text), text))
    longest = model.model.max_text_tokens
    limit = {} if longest is None else {"truncation": True, "max_length": longest}
    chunks = []
    for start in range(0, len(distinct), batch_size):
        # A writer that finds no end goes on for longer than the text tower can read.
        tokens = processor(text=distinct[start : start + batch_size], return_tensors="pt", **limit).to(model.device)
        chunks.append(model.model.get_text_features(tokens["input_ids"], tokens["attention_mask"]).float().cpu())
    rows = {text: row for row, text in enumerate(distinct)}
    return torch.cat(chunks)[[rows[text] for text in texts]].clone()


def stack_tokens(studies: Sequence[Study], cache: FeatureCache) -> dict[str, torch.Tensor]:
    """Returns cached tokens, padded to the most images: `vision_features` (B, N, S, C) and `image_mask` (B, N)."""
    tokens = [cache.get(study) for study in studies]
    longest = max(len(each) for each in tokens)
    features = np.zeros((len(tokens), longest, *tokens[0].shape[1:]), dtype=np.float32)
    mask = np.zeros((len(tokens), longest), dtype=bool)
    for row, each in enumerate(tokens):
        features[row, : len(each)], mask[row, : len(each)] = each, True
    return {"vision_features": torch.from_numpy(features), "image_mask": torch.from_numpy(mask)}
