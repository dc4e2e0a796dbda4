# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Chooses how MultiMedLM crosses from images to texts: temperature and memory, and the noise that it is trained with.

Reports of validation images are written under every setting, greedily, and scored as the harness scores them. The
setting that is chosen goes into a new checkpoint. A sweep that is stopped goes on with the next setting, and one with
more values than before computes what is new.
"""

import copy
import hashlib
import itertools
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoProcessor, TrainingArguments, set_seed

from ..data import Study
from ..evaluation.runs import NOTICE, library_versions, write_json
from ..evaluation.tables import markdown_table
from ..layers_m3fm import cross_modality_gap
from ..modeling_m3fm import M3FMForReportGeneration
from ..processing_m3fm import M3FMProcessor
from . import write
from .features import FeatureCache
from .memory import METHODS, MemoryBlock, build_memory, check_memory, set_memory
from .ranks import is_main, wait_for_all
from .record import FORMAT, RECORD_FILE, read_record
from .runs import RunOptions
from .sweep_map import draw_map
from .text_bank import TextBank, TextSets, load_texts

__all__ = ["SweepRecipe", "choose", "grid", "run"]

SWEEP_FILE, MAP_FILE = "sweep.json", "sweep.png"
# The memory that the checkpoint brings.
OWN = "own"
# What a score hangs on beside its place in the grid.
_FIXED = ("text_sets", "parallel_sets", "exclude", "memory_sets", "validation_set", "max_text_length")
_OF_NOISE = ("noise_steps", "cross_lingual")
_AXES = ("noise", "memory", "size", "temperature")

logger = logging.getLogger(__name__)


@dataclass
class SweepRecipe(TextSets):
    """What is tried, and how it is chosen.

    Args:
        base: Folder of stage 2; of stage 1 too where `noise_levels` are given.
        validation_set: Set whose validation images are written and scored.
        temperatures: Of the softmax over the memory.
        memory_methods: "own", the memory of the base, or methods of `MemoryBlock`, for which `text_sets` are needed.
        memory_sizes: Entries a language; empty: as many as the base has.
        memory_sets: Sets that memories are made of; empty: all of `text_sets`.
        noise_levels: Values of `text_noise_std`, with each of which the base is trained on; empty: it stays as it is.
        noise_steps: Steps of each.
        cross_lingual: See `WriteRecipe`.
        max_text_length: See `WriteRecipe`; reports are written up to this length.
        metric: What is made as large as can be, on average over languages: "bleu_4" or "rouge_l".
        min_distinct: Least share of distinct reports, in every language, of a setting that may be chosen: higher
            temperatures gain scores by writing the same report for everyone.
        batch_size: Reports that are written at once.
        feature_cache: Folder for the tokens of the frozen image tower and the embeddings of the texts.
    """

    base: str = ""
    validation_set: str = ""
    temperatures: list[float] = field(default_factory=lambda: [0.005, 0.01, 0.02, 0.05, 0.1])
    memory_methods: list[str] = field(default_factory=lambda: [OWN])
    memory_sizes: list[int] = field(default_factory=list)
    memory_sets: list[str] = field(default_factory=list)
    noise_levels: list[float] = field(default_factory=list)
    noise_steps: int = 200
    cross_lingual: float = 0.5
    max_text_length: int = 160
    metric: str = "bleu_4"
    min_distinct: float = 0.5
    batch_size: int = 96
    feature_cache: str = "runs/features"

    def __post_init__(self) -> None:
        unknown = sorted(set(self.memory_methods) - {OWN, *METHODS})
        if unknown or not self.memory_methods:
            raise ValueError(f"memory_methods: got {unknown or 'none'}, expected some of {[OWN, *METHODS]}.")
        if not self.temperatures or min(self.temperatures) <= 0:
            raise ValueError(f"temperatures: got {self.temperatures}, expected numbers above 0.")
        if self.memory_sizes and min(self.memory_sizes) < 1:
            raise ValueError(f"memory_sizes: got {self.memory_sizes}, expected numbers of at least 1.")
        if self.noise_levels and min(self.noise_levels) < 0:
            raise ValueError(f"noise_levels: got {self.noise_levels}, expected numbers of at least 0.")
        if self.metric not in write.METRICS:
            raise ValueError(f"metric: got {self.metric!r}, expected one of {list(write.METRICS)}.")
        if set(self.memory_methods) != {OWN} and not self.text_sets:
            raise ValueError("memory_methods: a new memory is made of texts, expected text_sets.")


def grid(recipe: SweepRecipe, own_size: int) -> list[dict[str, Any]]:
    """Returns the settings that are tried, by writer and memory; the base's own memory has its own size alone."""
    memories = [
        (method, size)
        for method in recipe.memory_methods
        for size in ([own_size] if method == OWN else recipe.memory_sizes or [own_size])
    ]
    return [
        {"noise": noise, "memory": method, "size": size, "temperature": temperature}
        for noise, (method, size), temperature in itertools.product(
            recipe.noise_levels or [None], memories, recipe.temperatures
        )
    ]


def choose(points: Sequence[dict[str, Any]], metric: str, min_distinct: float) -> dict[str, Any]:
    """Returns the setting with the best metric among those that are distinct enough.

    Where none is, the most distinct one.
    """
    distinct_enough = [point for point in points if point["distinct"] >= min_distinct]
    if not distinct_enough:
        return max(points, key=lambda point: point["distinct"])
    return max(distinct_enough, key=lambda point: point[metric])


class _Writer:
    """Writes for the same studies again and again, from whatever embeddings these have.

    Args:
        folder: Of a stage 2.
        studies: N of them.
        images: Embeddings of their images, (N, D).
        recipe: Says how much is written.
        device: Where it is written.
    """

    def __init__(
        self, folder: Path, studies: list[Study], images: torch.Tensor, recipe: SweepRecipe, device: torch.device
    ):
        self.model = M3FMForReportGeneration.from_pretrained(folder, dtype=torch.float32).to(device).eval()
        self.processor = AutoProcessor.from_pretrained(folder)
        self.studies = studies
        self.images = images
        self.recipe = recipe
        # By language, and by embedding: at low temperatures many studies share one, and settings share many.
        self._written: dict[tuple[str, bytes], str] = {}

    def score(self, memory: torch.Tensor, temperature: float) -> dict[str, float]:
        """Writes and scores all studies through a memory (languages, M, D)."""
        scores: dict[str, float] = {}
        languages = self.model.config.languages
        for language, entries in zip(languages, memory.to(self.images.device), strict=True):
            texts = self._texts(cross_modality_gap(self.images, entries, temperature), language)
            scores |= write.score_texts(texts, self.studies, language)
        for name in write.METRICS:
            scores[name] = float(np.mean([scores[f"{name}_{language}"] for language in languages]))
        return scores | {"distinct": min(scores[f"distinct_{language}"] for language in languages)}

    @torch.inference_mode()
    def _texts(self, embeds: torch.Tensor, language: str) -> list[str]:
        keys = [(language, row.cpu().numpy().tobytes()) for row in embeds]
        missing = {key: row for key, row in zip(keys, embeds, strict=True) if key not in self._written}

        def decode(rows: Sequence[torch.Tensor]) -> list[str]:
            ids = self.model.generate(
                shared_embeds=torch.stack(list(rows)),
                language=language,
                max_new_tokens=self.recipe.max_text_length,
                num_beams=1,
                do_sample=False,
            )
            return self.processor.batch_decode(ids, skip_special_tokens=True)

        texts = write.write_in_shares(self.model, list(missing.values()), decode, self.recipe.batch_size)
        self._written |= dict(zip(missing, texts, strict=True))
        return [self._written[key] for key in keys]


def run(recipe: SweepRecipe, arguments: TrainingArguments, options: RunOptions | None = None) -> dict[str, Any]:
    """Tries all settings, and saves the base with the one that is chosen.

    Args:
        recipe: What is tried.
        arguments: Of the training with each noise level; `output_dir` and `seed` of the sweep.
        options: Of that training.

    Returns:
        The facts: the setting that was chosen, with its scores, and all others.

    Raises:
        ValueError: If base, validation set or texts do not fit, or the folder holds a sweep of other things.
    """
    set_seed(arguments.seed)
    config = AutoConfig.from_pretrained(recipe.base)
    if "M3FMForReportGeneration" not in (config.architectures or []) and not recipe.noise_levels:
        raise ValueError(f"base: {recipe.base} has no decoder: expected a folder of stage 2, or noise_levels.")
    folder = Path(arguments.output_dir)
    known = _open(folder, _settings(recipe, arguments.seed))
    languages, own_size = config.languages, config.support_memory_size
    studies = write.validation_studies(recipe.data_root, recipe.validation_set, languages)
    if not studies:
        raise ValueError("validation_set: got none, expected the set whose validation part is scored.")
    points = grid(recipe, own_size)
    _check_memories(recipe, points, languages)
    for noise, of_writer in itertools.groupby(points, key=lambda point: point["noise"]):
        todo = [point for point in of_writer if _key(point) not in known["points"]]
        if todo:
            source = _trained(recipe, noise, arguments, options)
            for point in _scored(source, todo, studies, recipe, arguments):
                known["points"][_key(point)] = point
                if is_main():
                    _save(folder, known)
    done = [known["points"][_key(point)] for point in points]
    chosen = choose(done, recipe.metric, recipe.min_distinct)
    if chosen["distinct"] < recipe.min_distinct:
        logger.warning("no setting has a share of %g distinct reports in every language", recipe.min_distinct)
    facts = _facts(recipe, done, chosen, studies, languages)
    source = _trained(recipe, chosen["noise"], arguments, options)
    model, processor = _chosen_model(source, chosen, recipe, arguments)
    if is_main():
        _save_model(folder, source, model, processor, recipe, facts)
        _save(folder, known, facts)
        draw_map(done, chosen, recipe.metric, recipe.min_distinct, folder / MAP_FILE)
    wait_for_all()
    return facts | {"output_dir": str(folder)}


def _trained(
    recipe: SweepRecipe, noise: float | None, arguments: TrainingArguments, options: RunOptions | None
) -> Path:
    """Returns the folder of the writer of a noise level, which is trained unless it was before; None: the base."""
    if noise is None:
        return Path(recipe.base)
    folder = Path(arguments.output_dir) / f"noise-{noise:g}"
    if read_record(folder) is None:
        own = copy.copy(arguments)
        own.output_dir, own.run_name = str(folder), folder.name
        own.max_steps, own.eval_strategy = recipe.noise_steps, type(arguments.eval_strategy)("no")
        stage = write.WriteRecipe(
            **{name: getattr(recipe, name) for name in TextSets.__dataclass_fields__},
            base=recipe.base,
            model={"text_noise_std": noise},
            cross_lingual=recipe.cross_lingual,
            max_text_length=recipe.max_text_length,
            feature_cache=recipe.feature_cache,
        )
        write.run(stage, own, options)
    return folder


def _scored(
    source: Path, points: Sequence[dict[str, Any]], studies: list[Study], recipe: SweepRecipe, arguments: Any
) -> Iterator[dict[str, Any]]:
    """Yields the settings of one writer with their scores."""
    writer = _Writer(source, studies, torch.empty(0), recipe, arguments.device)
    writer.images = _image_embeds(writer.model, writer.processor, studies, recipe)
    memories = _Memories(writer.model, writer.processor, recipe, arguments.seed)
    for point in tqdm(points, desc="settings", disable=not is_main()):
        yield point | writer.score(memories.of(point), point["temperature"])


def _check_memories(recipe: SweepRecipe, points: Sequence[dict[str, Any]], languages: Sequence[str]) -> None:
    """Refuses memories that there are too few texts for, before anything is written."""
    sizes = [point["size"] for point in points if point["memory"] != OWN]
    if sizes:
        block = MemoryBlock(size=max(sizes), sets=recipe.memory_sets)
        check_memory(TextBank(load_texts(recipe), languages), languages, block)


class _Memories:
    """Makes the memories of the settings, each once."""

    def __init__(self, model: M3FMForReportGeneration, processor: M3FMProcessor, recipe: SweepRecipe, seed: int):
        self.model = model
        self.processor = processor
        self.recipe = recipe
        self.seed = seed
        self._bank: TextBank | None = None
        self._last: tuple[Any, torch.Tensor] | None = None

    def of(self, point: dict[str, Any]) -> torch.Tensor:
        """Returns the memory (languages, M, D) of a setting."""
        wanted = (point["memory"], point["size"])
        if point["memory"] == OWN:
            return self.model.support_memory.float()
        if self._last is None or self._last[0] != wanted:
            block = MemoryBlock(*wanted, self.recipe.memory_sets)
            languages = self.model.config.languages
            self._last = (wanted, build_memory(self._embedded(), languages, block, self.seed))
        return self._last[1]

    def _embedded(self) -> TextBank:
        if self._bank is None:
            self._bank = TextBank(load_texts(self.recipe), self.model.config.languages)
            self._bank.embed(self.model.model, self.processor, self.recipe.feature_cache)
        return self._bank


@torch.inference_mode()
def _image_embeds(
    model: M3FMForReportGeneration, processor: M3FMProcessor, studies: list[Study], recipe: SweepRecipe
) -> torch.Tensor:
    """Embeds the images of all studies once: (N, D)."""
    cache = FeatureCache(Path(recipe.feature_cache), model.model.vision_model, processor.image_processor)
    cache.fill(studies)
    chunks = []
    for study in studies:
        tokens = torch.from_numpy(cache.get(study)).float().to(model.device)
        chunks.append(model.model.get_image_features(vision_features=tokens[None]))
    return torch.cat(chunks)


def _settings(recipe: SweepRecipe, seed: int) -> dict[str, Any]:
    weights = hashlib.sha256()
    for path in sorted(Path(recipe.base).glob("*.safetensors")):
        with open(path, "rb") as file:
            weights.update(hashlib.file_digest(file, "sha256").digest())
    names = (*_FIXED, *(_OF_NOISE if recipe.noise_levels else ()))
    values = {name: getattr(recipe, name) for name in names}
    # Ids of studies are not to be in a file that says what was measured.
    values["exclude"] = hashlib.sha256("\n".join(sorted(recipe.exclude)).encode()).hexdigest()[:16]
    return json.loads(json.dumps({"weights": weights.hexdigest()[:16], "seed": seed, **values}))


def _open(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Returns what is known of a sweep: its settings, and its points by `_key`.

    Raises:
        ValueError: If the folder holds a sweep of other settings.
    """
    path = folder / SWEEP_FILE
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        return {"settings": settings, "points": {}}
    kept = json.loads(path.read_text(encoding="utf-8"))
    changed = sorted(name for name in settings if settings[name] != kept["settings"].get(name, settings[name]))
    if changed:
        raise ValueError(f"{folder} holds a sweep with another {', '.join(changed)}: expected another output_dir.")
    return {"settings": kept["settings"] | settings, "points": {_key(point): point for point in kept["points"]}}


def _save(folder: Path, known: dict[str, Any], facts: dict[str, Any] | None = None) -> None:
    write_json(folder / SWEEP_FILE, {**known, "points": list(known["points"].values()), **(facts or {})})


def _key(point: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(point[name] for name in _AXES)


def _facts(
    recipe: SweepRecipe,
    points: list[dict[str, Any]],
    chosen: dict[str, Any],
    studies: Sequence[Study],
    languages: Sequence[str],
) -> dict[str, Any]:
    rule = f"largest {recipe.metric}, mean over languages, with at least {recipe.min_distinct:g} distinct in each"
    return {
        "stage": "sweep",
        "notice": NOTICE,
        "versions": library_versions(),
        "studies": len(studies),
        "rule": rule,
        "chosen": chosen,
        "table": _table(points, chosen, languages),
    }


def _table(points: list[dict[str, Any]], chosen: dict[str, Any], languages: Sequence[str]) -> str:
    axes = [name for name in _AXES if any(point[name] is not None for point in points)]
    scores = [f"{name}_{language}" for language in languages for name in (*write.METRICS, "distinct")]
    rows = [
        [
            *(str(point[name]) for name in axes),
            *(f"{point[name]:.3f}" for name in scores),
            "chosen" if point is chosen else "",
        ]
        for point in points
    ]
    return markdown_table([[*axes, *scores, ""], *rows])


def _chosen_model(
    source: Path, chosen: dict[str, Any], recipe: SweepRecipe, arguments: TrainingArguments
) -> tuple[M3FMForReportGeneration, M3FMProcessor]:
    """Returns the writer with the memory and the temperature that were chosen; all ranks embed texts together."""
    model = M3FMForReportGeneration.from_pretrained(source).to(arguments.device)
    processor = AutoProcessor.from_pretrained(source)
    if chosen["memory"] != OWN:
        set_memory(model, _Memories(model, processor, recipe, arguments.seed).of(chosen))
    model.config.support_temperature = float(chosen["temperature"])
    return model, processor


def _save_model(
    folder: Path,
    source: Path,
    model: M3FMForReportGeneration,
    processor: M3FMProcessor,
    recipe: SweepRecipe,
    facts: dict[str, Any],
) -> None:
    """Saves the model that was chosen, and its record with how it was."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    write.keep_input_check(str(source), str(folder))
    # A checkpoint that was only passed on, like the shipped one, has no record.
    values = asdict(recipe) | {"exclude": len(recipe.exclude)}  # ids of studies are not to be passed on
    record = read_record(source) or {"format": FORMAT, "stage": "sweep", "recipe": values}
    record["sweep"] = {name: facts[name] for name in ("rule", "chosen", "studies")}
    write_json(folder / RECORD_FILE, record)
