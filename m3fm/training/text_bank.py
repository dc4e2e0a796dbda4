# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""The texts that stage 2 learns to write, and their embeddings by the frozen text encoder, computed once.

Letters in shapes: R distinct texts, D width of the shared space, N passages of an epoch.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from ..base_m3fm import M3FMModel
from ..data import load_parallel, load_studies
from ..data.report_text import mentions_earlier_or_mask
from ..data.studies import training_part
from ..processing_m3fm import M3FMProcessor
from .ranks import all_sum, is_main, main_first, rank, wait_for_all, world_size
from .samplers import count_tokens

__all__ = ["Passage", "TextBank", "TextGroup", "TextSets", "load_texts"]

# Texts of one part of the work, which a rank does at once and a stopped run need not do again.
_PART_TEXTS = 16_384
# Tokens of a batch, padding included.
_BATCH_TOKENS = 16_384
_FIRST_BATCH = 32


@dataclass
class TextSets:
    """Which texts a recipe reads.

    Args:
        data_root: Folder that holds the sets.
        text_sets: Sets whose reports are learned, and how often each is repeated in an epoch.
        parallel_sets: Sets of `text_sets` that bring parallel text.
        exclude: Ids of studies that are left out.
    """

    data_root: str = "../shared/data"
    text_sets: dict[str, int] = field(default_factory=dict)
    parallel_sets: list[str] = field(default_factory=list)
    exclude: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class TextGroup:
    """Versions of one text, of which those in `targets` are to be written; the others are only written from.

    Attributes:
        source: Its set.
        versions: Language code to text.
        targets: Languages that are written.
        study_id: Of the study that the text is of.
    """

    source: str
    versions: dict[str, str]
    targets: tuple[str, ...]
    study_id: str = ""


@dataclass(frozen=True, slots=True)
class Passage:
    """One text to be written: its language, and the rows of the embeddings it may be written from."""

    text: str
    language: str
    own_row: int
    other_rows: tuple[int, ...]
    study: str = ""


class TextBank:
    """Every training text once, with its embedding by the frozen text encoder.

    Args:
        groups: Texts with their translations; equal texts are one.
        languages: Those that are written.

    Attributes:
        texts: Distinct texts, R.
        embeds: (R, D) float16, unit norm, a row for each of them; mapped from disk where `embed` was given a folder.
            In float32 the loss of a trained decoder differs by 3e-6 at most.
        passages: What is to be written, N.
        rows_of: (set, language) to the rows of the texts that are written: what the support memory is made of.
    """

    def __init__(self, groups: Sequence[TextGroup], languages: Sequence[str]):
        self.passages: list[Passage] = []
        self.rows_of: dict[tuple[str, str], list[int]] = {}
        self.embeds = torch.empty(0, dtype=torch.float16)
        numbers: dict[str, int] = {}
        written: set[int] = set()
        for group in groups:
            rows = {code: numbers.setdefault(text, len(numbers)) for code, text in group.versions.items()}
            study = f"{group.source}/{group.study_id}"
            for language in [code for code in languages if code in group.targets]:
                row = rows[language]
                others = tuple(other for code, other in rows.items() if code != language)
                self.passages.append(Passage(group.versions[language], language, row, others, study))
                if row not in written:
                    written.add(row)
                    self.rows_of.setdefault((group.source, language), []).append(row)
        self.texts = list(numbers)

    def embed(self, model: M3FMModel, processor: M3FMProcessor, cache_folder: Path | str | None = None) -> None:
        """Embeds every text once: the encoder is frozen, so nothing is gained by doing it at every step.

        Texts of like length share a batch. Where there are several ranks, each does its part.

        Args:
            model: With the text encoder; its device is used.
            processor: Of the model.
            cache_folder: Where embeddings are kept as safetensors, by encoder and texts: the next run reads them, a
                stopped one goes on, and the ranks of a machine share the memory. None: nowhere.

        Raises:
            ValueError: If the ranks do not share the folder.
        """
        if cache_folder is None:
            rows = self._by_length(processor, None)
            self.embeds = self._empty(model)
            self.embeds[rows] = self._embedded(model, processor, rows)
            return
        folder = Path(cache_folder)
        path = folder / f"texts-{_encoder_hash(model, processor)}-{self._hash()}.safetensors"
        if all_sum(torch.tensor(int(not path.is_file()), device=model.device)):
            folder.mkdir(parents=True, exist_ok=True)
            self._fill(path, model, processor)
            wait_for_all()
        if not path.is_file():
            raise ValueError(f"Expected {folder} to be shared by all ranks: what rank 0 wrote there is not found.")
        self.embeds = load_file(path)["embeds"]

    def lengths(self, processor: M3FMProcessor, cache_folder: Path | str | None = None) -> np.ndarray:
        """Counts the tokens of each passage, (N,); on one rank alone where a folder keeps the counts."""
        rows = np.fromiter((passage.own_row for passage in self.passages), dtype=np.int64, count=len(self.passages))
        return self._counts(processor, cache_folder)[rows]

    def _counts(self, processor: M3FMProcessor, cache_folder: Path | str | None) -> np.ndarray:
        _forget_last_use(processor)
        with main_first():
            return count_tokens(self.texts, processor.tokenizer, cache_folder)

    def _by_length(self, processor: M3FMProcessor, cache_folder: Path | str | None) -> np.ndarray:
        """Returns the rows of all texts, the longest first: what does not fit the memory fails at once."""
        return np.argsort(-self._counts(processor, cache_folder), kind="stable")

    def _empty(self, model: M3FMModel) -> torch.Tensor:
        return torch.empty(len(self.texts), model.config.projection_dim, dtype=torch.float16)

    def _fill(self, path: Path, model: M3FMModel, processor: M3FMProcessor) -> None:
        """Writes the file of all embeddings, from the files of its parts, which the ranks compute in turn."""
        rows = self._by_length(processor, path.parent)
        parts = [rows[start : start + _PART_TEXTS] for start in range(0, len(rows), _PART_TEXTS)]
        files = [path.with_name(f"{path.stem}.part{number}.safetensors") for number in range(len(parts))]
        for number in range(rank(), len(parts), world_size()):
            if not files[number].is_file():
                _save(files[number], self._embedded(model, processor, parts[number]))
        wait_for_all()
        if not is_main():
            return
        embeds = self._empty(model)
        for rows, file in zip(parts, files, strict=True):
            embeds[rows] = load_file(file)["embeds"]
        _save(path, embeds)
        for file in files:
            file.unlink(missing_ok=True)

    @torch.inference_mode()
    def _embedded(self, model: M3FMModel, processor: M3FMProcessor, rows: np.ndarray) -> torch.Tensor:
        """Embeds the texts of some rows, sorted by length: (len(rows), D) float16."""
        was_training, chunks = model.training, []
        model.eval()
        with tqdm(total=len(rows), desc="texts", unit="text", delay=1.0, disable=not is_main()) as bar:
            for tokens in self._batches(processor, rows):
                tokens = tokens.to(model.device)
                chunks.append(model.get_text_features(tokens["input_ids"], tokens["attention_mask"]).half().cpu())
                bar.update(len(chunks[-1]))
        model.train(was_training)
        return torch.cat(chunks)

    def _batches(self, processor: M3FMProcessor, rows: np.ndarray) -> Iterator[dict[str, torch.Tensor]]:
        start, size = 0, _FIRST_BATCH
        while start < len(rows):
            texts = [self.texts[row] for row in rows[start : start + size]]
            tokens = processor(text=texts, return_tensors="pt")
            yield tokens
            start += len(texts)
            size = max(1, _BATCH_TOKENS // tokens["input_ids"].shape[1])

    def _hash(self) -> str:
        digest = hashlib.sha256()
        for text in self.texts:
            digest.update(hashlib.sha256(text.encode()).digest())
        return digest.hexdigest()[:16]


def load_texts(sets: TextSets) -> list[TextGroup]:
    """Returns the texts of every training study, repeated as the recipe says.

    Of a parallel text only the languages that the set's own reports lack are written: the rest is the paraphrase that
    the translation was made of, and no radiologist's. Translations that speak of earlier examinations are left out, as
    such sentences are left out of the reports.

    Raises:
        ValueError: If a set of `parallel_sets` is not in `text_sets`.
    """
    if lacking := sorted(set(sets.parallel_sets) - sets.text_sets.keys()):
        raise ValueError(f"parallel_sets: got {lacking}, expected sets that text_sets names too.")
    root, excluded = Path(sets.data_root), set(sets.exclude)
    groups = []
    for name, repeats in sets.text_sets.items():
        studies = [study for study in training_part(load_studies(root / name)) if study.study_id not in excluded]
        own = [
            TextGroup(name, study.reports, tuple(study.reports), study.study_id) for study in studies if study.reports
        ]
        own_languages = {language for study in studies for language in study.reports}
        by_id = {study.study_id: study for study in studies}
        for pair in load_parallel(root / name) if name in sets.parallel_sets else []:
            if pair.study_id in by_id and not mentions_earlier_or_mask(pair.texts["en"]):
                lacking = tuple(code for code in pair.texts if code not in own_languages)
                own.append(TextGroup(name, pair.texts, lacking, pair.study_id))
        groups += own * repeats
    return groups


def _save(path: Path, embeds: torch.Tensor) -> None:
    partial = path.with_suffix(f".{rank()}.tmp")
    save_file({"embeds": embeds.contiguous()}, partial)
    partial.replace(path)


def _forget_last_use(processor: M3FMProcessor) -> None:
    """Takes off how texts were cut and padded last: a tokenizer keeps it in what it is known by."""
    processor.tokenizer.backend_tokenizer.no_truncation()
    processor.tokenizer.backend_tokenizer.no_padding()


def _encoder_hash(model: M3FMModel, processor: M3FMProcessor) -> str:
    """Names what an embedding hangs on: the text side's weights, the tokenizer, and how much of a text is read."""
    _forget_last_use(processor)
    digest = hashlib.sha256(processor.tokenizer.backend_tokenizer.to_str().encode())
    config = model.config.text_encoder_config.to_dict()
    shape = {name: config.get(name) for name in ("model_type", "num_attention_heads", "hidden_act")}
    digest.update(f"{processor.tokenizer.model_max_length} {sorted(shape.items())}".encode())
    for side in (model.text_encoder, model.text_projection):
        for name, weight in sorted(side.state_dict().items()):
            digest.update(name.encode() + weight.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
