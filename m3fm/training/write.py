# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Stage 2: MultiMedLM. A decoder learns to write from text alone, in every language, and to translate on the way.

A text is embedded by the frozen text encoder, moved by noise, and written again, in its own language or in that of its
translation (M3FM 2025; ZeroNLG 2024 for the two stages, CapDec 2022 for the noise). No image is needed.

The loss of a step is the mean over its tokens, whichever rank and micro-batch they are in: `Trainer` counts the labels
of all of them, and `M3FMForReportGeneration` divides by that count. What is drawn for a text hangs on the text and the
epoch. So a step of two ranks has the gradient of one rank with the batch of both.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import distributed
from transformers import AutoConfig, AutoProcessor, TrainingArguments, set_seed

from ..adapters import save_adapter
from ..configuration_m3fm import M3FMConfig
from ..data import Study, load_studies
from ..evaluation.text_metrics import distinct_ratio, score_reports
from ..input_check_m3fm import InputCheck
from ..layers_m3fm import add_noise
from ..modeling_m3fm import M3FMForReportGeneration, M3FMModel
from ..processing_m3fm import M3FMProcessor
from .backbones import check_positions, load_decoder
from .collators import ReportTexts
from .features import FeatureCache
from .fed_studies import Draw
from .feed import FeedTrainer
from .memory import MemoryBlock, build_memory, check_memory, set_memory
from .ranks import is_main, rank, world_size
from .runs import RunOptions, ScoredTrainer, finish_run, train_or_resume
from .samplers import LengthBucketSampler, shared_epoch
from .settings import checked_block
from .text_bank import Passage, TextBank, TextSets, load_texts
from .towers import LoraBlock, merge_lora, set_training

METRICS = ("bleu_4", "rouge_l")


@dataclass
class WriteRecipe(TextSets):
    """What stage 2 is made of.

    Args:
        base: Folder of stage 1, or of an earlier stage 2 to go on from.
        decoder: A trained decoder by name or folder, whose vocabulary becomes the base's; empty: a new one, as `model`
            says, or that of the earlier stage 2.
        decoder_training: "full", or "lora" for a decoder that was trained before.
        lora: How, where it is trained by LoRA.
        validation_set: Set whose validation images are written and scored during the run.
        model: Values of `M3FMConfig` that differ from the base's.
        cross_lingual: Share of examples that are written from their translation, where there is one.
        max_text_length: Tokens of a report; longer ones are cut at the last sentence that fits.
        generation: Values of the checkpoint's `GenerationConfig`.
        memory: How the support memory is made. An earlier stage 2 keeps its own where nothing is said of it.
        feature_cache: Folder for the tokens of the frozen image tower and the embeddings of the texts.
    """

    #: Settings that are elsewhere now, and where.
    MOVED: ClassVar[dict[str, str]] = {
        "supervised_sets": "image-report pairs are trained on by a recipe of their own: expected `recipe: pairs`.",
        "memory_sets": "expected `memory: {sets: [...]}`.",
    }

    base: str = ""
    decoder: str = ""
    decoder_training: str = "full"
    lora: LoraBlock = field(default_factory=LoraBlock)
    validation_set: str = ""
    model: dict[str, Any] = field(default_factory=dict)
    cross_lingual: float = 0.5
    max_text_length: int = 160
    generation: dict[str, Any] = field(default_factory=dict)
    memory: MemoryBlock = field(default_factory=MemoryBlock)
    feature_cache: str = "runs/features"

    def __post_init__(self) -> None:
        self.lora = checked_block(LoraBlock, self.lora, "lora")
        self.memory = checked_block(MemoryBlock, self.memory, "memory")
        if self.decoder_training not in ("full", "lora"):
            raise ValueError(f"decoder_training: got {self.decoder_training!r}, expected 'full' or 'lora'.")
        if not 0 <= self.cross_lingual <= 1:
            raise ValueError(f"cross_lingual: got {self.cross_lingual}, expected a share of 0 to 1.")


class WriteCollator:
    """Turns numbers of passages into decoder inputs: prompt, report, end; the loss is on report and end alone.

    Which version of a text is written from, and the noise on it, hang on seed, epoch and passage: they are the same in
    a resumed run, and on any number of ranks.

    Args:
        texts: Makes the decoder's inputs.
        bank: Embedded texts.
        cross_lingual: Share that is written from a translation, where there is one.
        noise_std: See `M3FMConfig.text_noise_std`.
        seed: Of the run.
    """

    def __init__(self, texts: ReportTexts, bank: TextBank, cross_lingual: float, noise_std: float, seed: int = 0):
        self.texts = texts
        self.bank = bank
        self.cross_lingual = cross_lingual
        self.noise_std = noise_std
        self.seed = seed
        self._epoch = shared_epoch()

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch, in all workers too."""
        self._epoch[0] = epoch

    def __call__(self, numbers: Sequence[int]) -> dict[str, Any]:
        """Collates passages: `input_ids`, `attention_mask`, `labels` (B, T), `shared_embeds` (B, D), `study_ids`."""
        passages = [self.bank.passages[number] for number in numbers]
        draw = Draw(self.seed, int(self._epoch))
        rngs = [draw.generator("write", str(number)) for number in numbers]
        rows = [self._source_row(passage, rng) for passage, rng in zip(passages, rngs, strict=True)]
        embeds = self.bank.embeds[rows].float()  # (B, D)
        if self.noise_std:
            width = embeds.shape[-1]
            normal = np.stack([rng.standard_normal(width, dtype=np.float32) for rng in rngs])
            embeds = add_noise(embeds, self.noise_std, torch.from_numpy(normal))
        inputs = self.texts.decoder_inputs([each.text for each in passages], [each.language for each in passages])
        return inputs | {"shared_embeds": embeds, "study_ids": [passage.study for passage in passages]}

    def _source_row(self, passage: Passage, rng: np.random.Generator) -> int:
        if passage.other_rows and rng.random() < self.cross_lingual:
            return int(rng.choice(passage.other_rows))
        return passage.own_row


class WriteTrainer(ScoredTrainer, FeedTrainer):
    """Trains on texts of like length; its scores are those of written validation reports."""


class WriteValidation:
    """Writes and scores reports for validation images, greedily, as inference would; each rank writes its share.

    Args:
        studies: With reports in all languages; without studies there are no scores.
        languages: That are written.
        cache: With the tokens of their images.
        processor: Of the model.
        batch_size: Studies at once.
        max_new_tokens: Of a report.
    """

    def __init__(
        self,
        studies: list[Study],
        languages: Sequence[str],
        cache: FeatureCache,
        processor: M3FMProcessor,
        batch_size: int = 24,
        max_new_tokens: int = 200,
    ):
        self.studies = studies
        self.languages = tuple(languages) if studies else ()
        self.cache = cache
        self.processor = processor
        self.batch_size = batch_size
        self.max_new_tokens = max_new_tokens

    def write(self, model: M3FMForReportGeneration, language: str, **generate_kwargs: Any) -> list[str]:
        """Writes one report a validation study."""

        def write(studies: Sequence[Study]) -> list[str]:
            tokens = np.stack([self.cache.get(study) for study in studies])  # (b, 1, S, C)
            features = torch.from_numpy(tokens).float().to(model.device)
            ids = model.generate(
                vision_features=features, language=language, max_new_tokens=self.max_new_tokens, **generate_kwargs
            )
            return self.processor.batch_decode(ids, skip_special_tokens=True)

        return write_in_shares(model, self.studies, write, self.batch_size)

    def score_names(self) -> list[str]:
        """Returns the names of the scores: `bleu_4_en` and so on."""
        return [f"{name}_{language}" for language in self.languages for name in (*METRICS, "distinct")]

    def score(self, model: M3FMForReportGeneration) -> dict[str, float]:
        """Returns BLEU-4, ROUGE-L and the share of distinct reports, per language."""
        scores: dict[str, float] = {}
        for language in self.languages:
            scores |= score_texts(self.write(model, language), self.studies, language)
        return scores


def write_in_shares(
    model: M3FMForReportGeneration, items: Sequence[Any], write: Callable[[Sequence[Any]], list[str]], batch_size: int
) -> list[str]:
    """Writes a report for each item, batch by batch, each rank its share; returns the reports of all, in order."""
    was_training, own = model.training, items[rank() :: world_size()]
    model.eval()
    texts = [
        text.strip() for start in range(0, len(own), batch_size) for text in write(own[start : start + batch_size])
    ]
    model.train(was_training)
    if world_size() == 1:
        return texts
    shares: list[Any] = [None] * world_size()
    distributed.all_gather_object(shares, texts)
    return [shares[place % world_size()][place // world_size()] for place in range(len(items))]


def score_texts(texts: list[str], studies: Sequence[Study], language: str) -> dict[str, float]:
    """Returns BLEU-4, ROUGE-L and the share of distinct reports of what was written, as `bleu_4_en`."""
    references = [study.reports[language] for study in studies]
    metrics = score_reports(texts, references, language, metrics=METRICS)
    scores = {f"{name}_{language}": value for name, value in metrics.items()}
    return scores | {f"distinct_{language}": distinct_ratio(texts)}


def validation_studies(data_root: str, name: str, languages: Sequence[str]) -> list[Study]:
    """Returns the validation studies of a set that have an image and a report in each language; none without a set.

    Raises:
        ValueError: If the set has no such study.
    """
    if not name:
        return []
    studies = [
        study
        for study in load_studies(Path(data_root) / name)
        if study.split == "validation" and study.images and set(languages) <= set(study.reports)
    ]
    if not studies:
        raise ValueError(
            f"validation_set: {name} has no validation study with images and reports in {list(languages)}; choose "
            "another set, or leave it empty to train without scores."
        )
    return studies


def build_writer(recipe: WriteRecipe) -> tuple[M3FMForReportGeneration, M3FMProcessor, bool]:
    """Builds MultiMedLM on the base; tells whether the base already held a decoder.

    Raises:
        ValueError: If the recipe asks for what the base cannot give.
    """
    processor = AutoProcessor.from_pretrained(recipe.base)
    config = AutoConfig.from_pretrained(recipe.base)
    goes_on = "M3FMForReportGeneration" in (config.architectures or [])
    if goes_on and recipe.decoder:
        raise ValueError(f"decoder: {recipe.base} has a decoder already: expected a base of stage 1, or no `decoder`.")
    if not goes_on and not recipe.decoder and recipe.decoder_training == "lora":
        raise ValueError("decoder_training: 'lora' needs a trained decoder: name one in `decoder`, or take 'full'.")
    values = {**config.to_dict(), **recipe.model}
    decoder = None
    if recipe.decoder:
        decoder = load_decoder(recipe.decoder, processor.tokenizer, values["num_prefix_tokens"] + 1)
        values["text_config"] = decoder.config.to_dict()
    config = M3FMConfig(**values)
    if goes_on:
        model = M3FMForReportGeneration.from_pretrained(recipe.base, config=config, dtype=torch.float32)
    else:
        model = M3FMForReportGeneration(config)
        model.model = M3FMModel.from_pretrained(recipe.base, dtype=torch.float32)
        model.decoder = decoder or model.decoder
        # Control tokens, those kept for further languages too, are for prompts: none is to be written.
        control = set(processor.tokenizer.added_tokens_decoder) - {processor.tokenizer.eos_token_id}
        model.generation_config.suppress_tokens = sorted(control)
    unknown = model.generation_config.update(**recipe.generation)
    if unknown:
        raise ValueError(f"Expected `generation` to hold values of GenerationConfig, got {sorted(unknown)}.")
    return model, processor, goes_on


def run(recipe: WriteRecipe, arguments: TrainingArguments, options: RunOptions | None = None) -> dict[str, Any]:
    """Trains stage 2, resumes where an interrupted run stopped, and saves the model with its curves.

    Raises:
        ValueError: If recipe, base and texts do not fit, or the output folder holds another run.
    """
    set_seed(arguments.seed)
    arguments.remove_unused_columns = False
    if arguments.ddp_find_unused_parameters is None:  # all that is trained takes part in every step
        arguments.ddp_find_unused_parameters = False
    model, processor, goes_on = build_writer(recipe)
    model.to(arguments.device)
    languages = model.config.languages
    bank = TextBank(load_texts(recipe), languages)
    lengths = checked_lengths(bank, recipe, model, processor)
    studies = validation_studies(recipe.data_root, recipe.validation_set, languages)
    memory = None if goes_on and recipe.memory == MemoryBlock() else recipe.memory.sized(model.config)
    if memory is not None:
        check_memory(bank, languages, memory)
    bank.embed(model.model, processor, recipe.feature_cache)
    if memory is not None:
        set_memory(model, build_memory(bank, languages, memory, arguments.seed))
    cache = FeatureCache(Path(recipe.feature_cache), model.model.vision_model, processor.image_processor)
    cache.fill(studies)
    model.model.requires_grad_(False)
    set_training(model.decoder, recipe.decoder_training, recipe.lora, "decoder_training")
    texts = ReportTexts(processor.tokenizer, model.config, max_length=recipe.max_text_length)
    batch_size, world_size = arguments.train_batch_size, arguments.world_size
    trainer = WriteTrainer(
        model=model,
        args=arguments,
        train_dataset=range(len(bank.passages)),
        eval_dataset=range(0),
        data_collator=WriteCollator(texts, bank, recipe.cross_lingual, model.config.text_noise_std, arguments.seed),
        processing_class=processor,
        batches=LengthBucketSampler(lengths, batch_size, arguments.seed, world_size=world_size),
        validation=WriteValidation(studies, languages, cache, processor, max_new_tokens=recipe.max_text_length),
        options=options,
    )
    train_or_resume(trainer, recipe)
    if recipe.decoder_training == "lora" and is_main():
        save_adapter(model, Path(arguments.output_dir) / "adapter")
    merge_lora(model)
    facts = {
        "stage": "write",
        "supervision": "text alone",
        "texts": len(bank.texts),
        "passages": len(bank.passages),
        "memory": "that of the base" if memory is None else asdict(memory),
    }
    facts = finish_run(trainer, recipe, facts)
    keep_input_check(recipe.base, facts["output_dir"])
    return facts


def checked_lengths(
    bank: TextBank, recipe: WriteRecipe, model: M3FMForReportGeneration, processor: M3FMProcessor
) -> np.ndarray:
    """Returns the tokens of each passage as it is read, (N,).

    Raises:
        ValueError: If there is no passage, or one that the decoder has no positions for.
    """
    if not bank.passages:
        raise ValueError(
            f"text_sets: {sorted(recipe.text_sets)} have no training text in {list(model.config.languages)}."
        )
    lengths = np.minimum(bank.lengths(processor, recipe.feature_cache) + 1, recipe.max_text_length)
    prompt = model.config.num_prefix_tokens + 1
    check_positions(model.config.text_config, recipe.decoder or recipe.base, prompt, int(lengths.max()))
    return lengths


def keep_input_check(base: str, folder: str) -> None:
    """Takes over the base's input check: the image tower stays, and so does what its tokens say of an image."""
    check = InputCheck.from_pretrained(base)
    if check.reads_tokens and is_main():
        check.save_pretrained(folder)
