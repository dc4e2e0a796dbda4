# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Stage 2: MultiMedLM. A decoder learns to write from text alone, in every language, and to translate on the way.

A text is embedded by the frozen text encoder, moved by noise, and written again, in its own language or in that of its
translation (M3FM 2025; ZeroNLG 2024 for the two stages, CapDec 2022 for the noise). No image is needed. Where a recipe
names `supervised_sets`, image-report pairs are trained on besides, through the same support memory that inference
uses: what comes out is then no longer a zero-shot writer, and its facts say so.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler
from transformers import AutoConfig, AutoProcessor, TrainingArguments, set_seed
from transformers.trainer_pt_utils import LengthGroupedSampler

from ..configuration_m3fm import M3FMConfig
from ..data import Study, load_parallel, load_studies
from ..data.report_text import mentions_earlier_or_mask
from ..data.studies import training_part
from ..evaluation.text_metrics import distinct_ratio, score_reports
from ..input_check_m3fm import InputCheck
from ..layers_m3fm import add_noise
from ..modeling_m3fm import M3FMForReportGeneration, M3FMModel
from ..processing_m3fm import M3FMProcessor
from .collators import ReportTexts
from .features import FeatureCache
from .runs import ScoredTrainer, batch_generator, check_single_device, finish_run, train_or_resume


@dataclass
class WriteRecipe:
    """What stage 2 is made of.

    Args:
        data_root: Folder that holds the sets.
        base: Folder of stage 1, or of an earlier stage 2 to go on from.
        text_sets: Sets whose reports are learned, and how often each is repeated in an epoch.
        parallel_sets: Sets of `text_sets` that bring parallel text.
        supervised_sets: Sets whose images are trained on too, and their repeats; empty for text alone.
        exclude: Ids of studies that are left out.
        validation_set: Set whose validation images are written and scored during the run.
        model: Values of `M3FMConfig` that differ from the base's.
        cross_lingual: Share of examples that are written from their translation, where there is one.
        max_text_length: Tokens of a report; longer ones are cut at the last sentence that fits.
        generation: Values of the checkpoint's `GenerationConfig`.
        memory_sets: Sets that the support memory is drawn from, in equal shares.
        feature_cache: Folder for the tokens of the frozen image tower.
    """

    data_root: str = "../shared/data"
    base: str = ""
    text_sets: dict[str, int] = field(default_factory=dict)
    parallel_sets: list[str] = field(default_factory=list)
    supervised_sets: dict[str, int] = field(default_factory=dict)
    exclude: list[str] = field(default_factory=list)
    validation_set: str = ""
    model: dict[str, Any] = field(default_factory=dict)
    cross_lingual: float = 0.5
    max_text_length: int = 160
    generation: dict[str, Any] = field(default_factory=dict)
    memory_sets: list[str] = field(default_factory=list)
    feature_cache: str = "runs/features"


@dataclass(frozen=True)
class Passage:
    """One text to be written: its language, and the rows of the embeddings it may be written from."""

    text: str
    language: str
    own_row: int
    other_rows: tuple[int, ...]


@dataclass(frozen=True)
class TextGroup:
    """Versions of one text, of which those in `targets` are to be written; the others are only written from."""

    source: str
    versions: dict[str, str]
    targets: tuple[str, ...]


class TextBank:
    """Every training text once, with its embedding by the frozen text encoder.

    Attributes:
        texts: Distinct texts.
        embeds: (R, D), unit norm, a row for each of them.
        passages: What is to be written.
        rows_of: (set, language) to the rows of the texts that are written: what the support memory is drawn from.
    """

    def __init__(self, groups: list[TextGroup], languages: tuple[str, ...]):
        self.passages: list[Passage] = []
        self.rows_of: dict[tuple[str, str], list[int]] = {}
        self.embeds = torch.empty(0)
        numbers: dict[str, int] = {}
        written: set[int] = set()
        for group in groups:
            rows = {code: numbers.setdefault(text, len(numbers)) for code, text in group.versions.items()}
            for language in [code for code in languages if code in group.targets]:
                row = rows[language]
                others = tuple(other for code, other in rows.items() if code != language)
                self.passages.append(Passage(group.versions[language], language, row, others))
                if row not in written:
                    written.add(row)
                    self.rows_of.setdefault((group.source, language), []).append(row)
        self.texts = list(numbers)

    @torch.inference_mode()
    def embed(self, model: M3FMModel, processor: M3FMProcessor, batch_size: int = 64) -> None:
        """Embeds every text once: the encoder is frozen, so nothing is gained by doing it at every step."""
        model.eval()
        chunks = []
        for start in range(0, len(self.texts), batch_size):
            tokens = processor(text=self.texts[start : start + batch_size], return_tensors="pt").to(model.device)
            chunks.append(model.get_text_features(tokens["input_ids"], tokens["attention_mask"]).float().cpu())
        self.embeds = torch.cat(chunks)

    def support_memory(self, languages: tuple[str, ...], sets: list[str], size: int, seed: int) -> torch.Tensor:
        """Draws (languages, M, D): `size` embeddings a language, an equal share of each set, without repeats."""
        generator = np.random.default_rng(seed)
        memory = []
        for language in languages:
            pools = [self.rows_of.get((name, language), []) for name in sets]
            shares = _equal_shares([len(pool) for pool in pools], size)
            rows = [
                row
                for pool, share in zip(pools, shares, strict=True)
                for row in generator.permutation(pool)[:share].tolist()
            ]
            memory.append(self.embeds[rows])
        return torch.stack(memory)


def _equal_shares(available: list[int], size: int) -> list[int]:
    """Splits `size` evenly over pools; what a small pool cannot give the others do."""
    shares = [0] * len(available)
    for rank, pool in enumerate(sorted(range(len(available)), key=lambda i: available[i])):
        shares[pool] = min(available[pool], (size - sum(shares)) // (len(available) - rank))
    if sum(shares) < size:
        raise ValueError(f"Expected {size} texts a language for the support memory, the sets have {sum(available)}.")
    return shares


class WriteDataset(Dataset):
    """Serves passages and, behind them, image-report pairs."""

    def __init__(self, passages: list[Passage], pairs: list[tuple[Study, str]]):
        self.passages = passages
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.passages) + len(self.pairs)

    def __getitem__(self, index: int) -> Passage | tuple[Study, str]:
        return self.passages[index] if index < len(self.passages) else self.pairs[index - len(self.passages)]

    def lengths(self) -> list[int]:
        """Returns about how long each item is, in bytes: a Chinese character has three, and is a longer token."""
        texts = [passage.text for passage in self.passages] + [study.reports[code] for study, code in self.pairs]
        return [len(text.encode()) for text in texts]


class ByLengthSampler(LengthGroupedSampler):
    """Groups items of like length, anew in each epoch; by its number, so that a resumed run finds the same order."""

    def __init__(self, batch_size: int, lengths: list[int], seed: int):
        super().__init__(batch_size, lengths=lengths)
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Is told the epoch by Trainer."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return super().__iter__()


class WriteCollator:
    """Turns passages and pairs into decoder inputs: prompt, report, end; the loss is on report and end alone."""

    def __init__(
        self,
        model: M3FMForReportGeneration,
        processor: M3FMProcessor,
        bank: TextBank,
        recipe: WriteRecipe,
        cache: FeatureCache,
    ):
        self.texts = ReportTexts(processor.tokenizer, model.config, max_length=recipe.max_text_length)
        self.bank = bank
        self.cross_lingual = recipe.cross_lingual
        self.cache = cache

    def __call__(self, items: list[Passage | tuple[Study, str]]) -> dict[str, Any]:
        """Collates into {"text": ..., "image": ...}, either of which may be missing."""
        passages = [item for item in items if isinstance(item, Passage)]
        rng = batch_generator(item.text for item in passages)
        pairs = [item for item in items if not isinstance(item, Passage)]
        batch = {}
        if passages:
            inputs = self.texts.decoder_inputs([item.text for item in passages], [item.language for item in passages])
            batch["text"] = inputs | {
                "shared_embeds": self.bank.embeds[[self._source_row(item, rng) for item in passages]]
            }
        if pairs:
            reports = [study.reports[language] for study, language in pairs]
            inputs = self.texts.decoder_inputs(reports, [language for _, language in pairs])
            batch["image"] = inputs | self.images([study for study, _ in pairs])
        return batch

    def images(self, studies: list[Study]) -> dict[str, torch.Tensor]:
        """Stacks the cached tokens of studies of one image each: (B, 1, S, C)."""
        return {"vision_features": torch.from_numpy(np.stack([self.cache.get(study) for study in studies])).float()}

    def _source_row(self, passage: Passage, rng: np.random.Generator) -> int:
        if passage.other_rows and rng.random() < self.cross_lingual:
            return int(rng.choice(passage.other_rows))
        return passage.own_row


class WriteTrainer(ScoredTrainer):
    """Trains with noise on the text embeddings; its scores are those of written validation reports."""

    def compute_loss(
        self, model: torch.nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """Computes the mean of the losses on texts and on image-report pairs, weighted by their rows."""
        losses, rows = [], []
        for kind, part in inputs.items():
            if kind == "text":
                std = self.accelerator.unwrap_model(model).config.text_noise_std
                part = part | {"shared_embeds": add_noise(part["shared_embeds"], std)}
            losses.append(model(**part).loss)
            rows.append(len(part["input_ids"]))
        loss = sum(each * count for each, count in zip(losses, rows, strict=True)) / sum(rows)
        return (loss, None) if return_outputs else loss

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler:
        """Puts items of like length into one batch: mixed at random, half of every batch would be padding."""
        return ByLengthSampler(self.args.train_batch_size, self.train_dataset.lengths(), self.args.seed)


class WriteValidation:
    """Writes and scores reports for validation images, greedily, as inference would."""

    def __init__(self, studies: list[Study], collator: WriteCollator, processor: M3FMProcessor, batch_size: int = 24):
        self.studies = studies
        self.collator = collator
        self.processor = processor
        self.batch_size = batch_size

    def write(self, model: M3FMForReportGeneration, language: str, **generate_kwargs: Any) -> list[str]:
        """Writes one report a validation study."""
        model.eval()
        texts = []
        for start in range(0, len(self.studies), self.batch_size):
            images = self.collator.images(self.studies[start : start + self.batch_size])
            features = images["vision_features"].to(model.device)
            ids = model.generate(vision_features=features, language=language, max_new_tokens=200, **generate_kwargs)
            texts += self.processor.batch_decode(ids, skip_special_tokens=True)
        return [text.strip() for text in texts]

    def score(self, model: M3FMForReportGeneration) -> dict[str, float]:
        """Returns BLEU-4, ROUGE-L and the share of distinct reports, per language."""
        scores = {}
        for language in model.config.languages if self.studies else ():
            texts = self.write(model, language)
            references = [study.reports[language] for study in self.studies]
            metrics = score_reports(texts, references, language, metrics=("bleu_4", "rouge_l"))
            scores |= {f"{name}_{language}": value for name, value in metrics.items()}
            scores[f"distinct_{language}"] = distinct_ratio(texts)
        return scores


def load_texts(recipe: WriteRecipe) -> list[TextGroup]:
    """Returns the texts of every training study, repeated as the recipe says.

    Of a parallel text only the languages that the set's own reports lack are written: the rest is the paraphrase that
    the translation was made of, and no radiologist's. Translations that speak of earlier examinations are left out, as
    such sentences are left out of the reports.
    """
    root = Path(recipe.data_root)
    groups = []
    for name, repeats in recipe.text_sets.items():
        studies = [study for study in training_part(load_studies(root / name)) if study.study_id not in recipe.exclude]
        own = [TextGroup(name, study.reports, tuple(study.reports)) for study in studies if study.reports]
        own_languages = {language for study in studies for language in study.reports}
        by_id = {study.study_id: study for study in studies}
        for pair in load_parallel(root / name) if name in recipe.parallel_sets else []:
            if pair.study_id in by_id and not mentions_earlier_or_mask(pair.texts["en"]):
                lacking = tuple(code for code in pair.texts if code not in own_languages)
                own.append(TextGroup(name, pair.texts, lacking))
        groups += own * repeats
    return groups


def load_pairs(recipe: WriteRecipe, languages: tuple[str, ...]) -> list[tuple[Study, str]]:
    """Returns every training study of the supervised sets with each language of its report, repeated."""
    pairs = []
    for name, repeats in recipe.supervised_sets.items():
        for study in training_part(load_studies(Path(recipe.data_root) / name)):
            if study.images and study.study_id not in recipe.exclude:
                pairs += [(study, language) for language in languages if language in study.reports] * repeats
    return pairs


def build_writer(recipe: WriteRecipe) -> tuple[M3FMForReportGeneration, M3FMProcessor, bool]:
    """Builds MultiMedLM on the base; tells whether the base already held a decoder."""
    processor = AutoProcessor.from_pretrained(recipe.base)
    config = AutoConfig.from_pretrained(recipe.base)
    goes_on = "M3FMForReportGeneration" in (config.architectures or [])
    config = M3FMConfig(**{**config.to_dict(), **recipe.model})
    if goes_on:
        model = M3FMForReportGeneration.from_pretrained(recipe.base, config=config, dtype=torch.float32)
    else:
        model = M3FMForReportGeneration(config)
        model.model = M3FMModel.from_pretrained(recipe.base, dtype=torch.float32)
        # Control tokens, those kept for further languages too, are for prompts: none is to be written.
        control = set(processor.tokenizer.added_tokens_decoder) - {processor.tokenizer.eos_token_id}
        model.generation_config.suppress_tokens = sorted(control)
    unknown = model.generation_config.update(**recipe.generation)
    if unknown:
        raise ValueError(f"Expected `generation` to hold values of GenerationConfig, got {sorted(unknown)}.")
    return model, processor, goes_on


def run(recipe: WriteRecipe, arguments: TrainingArguments) -> dict[str, Any]:
    """Trains stage 2, resumes where an interrupted run stopped, and saves the model with its curves.

    Raises:
        ValueError: In a run on several devices, or one whose output folder holds another run.
    """
    check_single_device(arguments)
    set_seed(arguments.seed)
    arguments.remove_unused_columns = False
    model, processor, goes_on = build_writer(recipe)
    model.to(arguments.device)
    languages = model.config.languages
    bank = TextBank(load_texts(recipe), languages)
    bank.embed(model.model, processor)
    if not goes_on and model.config.support_memory_size:
        size = model.config.support_memory_size
        model.set_support_memory(bank.support_memory(languages, recipe.memory_sets, size, arguments.seed))
    pairs = load_pairs(recipe, languages)
    validation_studies = [
        study
        for study in (load_studies(Path(recipe.data_root) / recipe.validation_set) if recipe.validation_set else [])
        if study.split == "validation" and set(languages) <= set(study.reports)
    ]
    cache = FeatureCache(Path(recipe.feature_cache), model.model.vision_model, processor.image_processor)
    cache.fill([study for study, _ in pairs] + validation_studies)
    _freeze(model, supervised=bool(pairs))
    collator = WriteCollator(model, processor, bank, recipe, cache)
    trainer = WriteTrainer(
        model=model,
        args=arguments,
        train_dataset=WriteDataset(bank.passages, pairs),
        eval_dataset=WriteDataset([], []),
        data_collator=collator,
        processing_class=processor,
        validation=WriteValidation(validation_studies, collator, processor),
    )
    train_or_resume(trainer, recipe)
    facts = {
        "stage": "write",
        "supervision": f"image-report pairs of {sorted(recipe.supervised_sets)}" if pairs else "text alone",
        "texts": len(bank.texts),
        "pairs": len(pairs),
    }
    facts = finish_run(trainer, recipe, facts)
    check = InputCheck.from_pretrained(recipe.base)
    if check.reads_tokens:  # the image tower stays as it is, and so does what its tokens say of an image
        check.save_pretrained(facts["output_dir"])
    return facts


def _freeze(model: M3FMForReportGeneration, supervised: bool) -> None:
    """Freezes MultiMedCLIP, but for the way from image tokens to the shared space where pairs supervise it."""
    model.model.requires_grad_(False)
    if supervised:
        model.model.study_pooling.requires_grad_(True)
        model.model.visual_projection.requires_grad_(True)
