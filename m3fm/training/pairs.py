# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Stage 3: a writer goes on with image-report pairs, all of a set or a small part of it.

The decoder is trained in full or by LoRA, the image side as the recipe says. Beside the pairs of a batch stand texts
of stage 2, so that the writer does not forget what it was never shown an image of. Where `image_tokens` are asked for,
it reads pooled queries of the study beside the study's embedding. What comes out is no longer a zero-shot writer on
the sets that it has seen, and its facts say so.

Letters are those of `modeling_m3fm`: B rows, D width of the shared space, K image tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, AutoProcessor, TrainingArguments, set_seed

from .. import DEFAULT_CHECKPOINT
from ..adapters import save_adapter
from ..data import Study
from ..evaluation.reporter import checkpoint_folder
from ..layers_m3fm import add_noise
from ..modeling_m3fm import IMAGE_TOKEN_STD, M3FMForReportGeneration
from ..processing_m3fm import M3FMProcessor
from .augmentation import Augmentation
from .backbones import check_positions
from .classify import without_fits
from .collators import ReportTexts, StudyCollator
from .features import FeatureCache
from .fed_studies import Draw, fed_study
from .feed import FeedTrainer
from .memory import set_memory
from .pair_data import PairsCollator, ReplayBuckets, load_pairs, load_replayed
from .ranks import is_main, main_first, world_size
from .runs import RunOptions, ScoredTrainer, finish_run, train_or_resume
from .samplers import EpochBatches, LengthBucketSampler, count_tokens
from .settings import checked_block
from .study_images import CachedTokens, Images, StudyPixels
from .text_bank import TextSets
from .towers import LoraBlock, has_lora, merge_lora, parameter_groups, set_training
from .write import WriteCollator, keep_input_check, score_texts, validation_studies, write_in_shares

_FROZEN, _PROJECTION = "frozen", "projection"


@dataclass
class PairsRecipe(TextSets):
    """What supervised fine-tuning is made of.

    Args:
        base: Writer to start from: a stage 2, or an earlier stage 3; empty takes the checkpoint that ships.
        sets: Sets whose images and reports are learned, and how often each is repeated in an epoch.
        fraction: Share of each set's training studies that is learned. Whole groups of patients and papers are drawn,
            a smaller share is part of a larger one, and one group at least is learned.
        fraction_seed: Of which groups these are.
        languages: Of the reports; empty: all that the base writes.
        decoder_training: "full", with its projectors; or "lora": low-rank updates of the decoder alone, and the new
            projector of image tokens.
        image_training: "frozen"; "projection": the pooling and the way to the shared space; or these and the tower, as
            "full", "lora" or "last_N" say. All but the first two read pixels: for GPUs.
        lora: How, where something is trained by LoRA.
        image_tokens: K, see `M3FMConfig.num_image_tokens`; None: as many as the base has.
        through_memory: Whether embeddings of images go through the support memory, as they do in a zero-shot writer;
            if not, the checkpoint keeps no memory.
        noise: On the embeddings of images in training; as `M3FMConfig.text_noise_std`, which those of texts have.
        text_share: Share of a batch that is texts of `text_sets`, where there are any.
        cross_lingual: Share of the texts that are written from their translation, where there is one.
        shared_patients: "leave_out" drops what shares a patient or a paper with a validation part; or "keep".
        validation_set: Set whose validation images are written and scored during the run.
        max_text_length: Tokens of a report; longer ones are cut at the last sentence that fits.
        augment: Whether images of a trained tower are augmented: "none" or "standard".
        layer_decay: Factor of the learning rate from each block of a tower to the one below it.
        learning_rates: Factors of the learning rate by part: decoder, vision_model, token_projector, ...
        generation: Values of the checkpoint's `GenerationConfig`.
        feature_cache: Folder for the tokens of a frozen image tower and the embeddings of the texts.
    """

    base: str = ""
    sets: dict[str, int] = field(default_factory=dict)
    fraction: float = 1.0
    fraction_seed: int = 0
    languages: list[str] = field(default_factory=list)
    decoder_training: str = "full"
    image_training: str = _FROZEN
    lora: LoraBlock = field(default_factory=LoraBlock)
    image_tokens: int | None = None
    through_memory: bool = True
    noise: float = 0.0
    text_share: float = 0.5
    cross_lingual: float = 0.5
    shared_patients: str = "leave_out"
    validation_set: str = ""
    max_text_length: int = 160
    augment: str = "none"
    layer_decay: float = 1.0
    learning_rates: dict[str, float] = field(default_factory=dict)
    generation: dict[str, Any] = field(default_factory=dict)
    feature_cache: str = "runs/features"

    def __post_init__(self) -> None:
        self.lora = checked_block(LoraBlock, self.lora, "lora")
        choices = {
            "decoder_training": ("full", "lora"),
            "shared_patients": ("leave_out", "keep"),
            "augment": ("none", "standard"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected one of {list(allowed)}.")
        if not self.sets or any(repeats < 1 for repeats in self.sets.values()):
            raise ValueError(f"sets: got {self.sets}, expected a set of image-report pairs at least, and its repeats.")
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction: got {self.fraction}, expected a share above 0, up to 1; 0.01 is one percent.")
        if not 0 <= self.text_share < 1 or not 0 <= self.cross_lingual <= 1:
            raise ValueError(
                f"Expected 0 <= text_share < 1 and 0 <= cross_lingual <= 1, got {self.text_share} and "
                f"{self.cross_lingual}."
            )
        if self.noise < 0:
            raise ValueError(f"noise: got {self.noise}, expected 0 or more.")
        if self.augment != "none" and not self.trains_tower:
            raise ValueError("The tokens of a frozen tower are computed once: expected augment: none.")

    @property
    def trains_tower(self) -> bool:
        """Whether the image tower itself is trained."""
        return self.image_training not in (_FROZEN, _PROJECTION)


# --------------------------------------------------------------------------------------------------------------------
# The model


def build_model(recipe: PairsRecipe) -> tuple[M3FMForReportGeneration, M3FMProcessor, Path]:
    """Loads the base and gives it image tokens, as the recipe says; returns it with its processor and its folder.

    Raises:
        ValueError: If the base is no writer, or the recipe asks for what it cannot give.
    """
    base = checkpoint_folder(recipe.base or DEFAULT_CHECKPOINT)
    if "M3FMForReportGeneration" not in (AutoConfig.from_pretrained(base).architectures or ()):
        raise ValueError(
            f"base: {base} writes no reports: expected a checkpoint of stage 2, or of an earlier stage 3."
        )
    processor = AutoProcessor.from_pretrained(base)
    model = M3FMForReportGeneration.from_pretrained(base, dtype=torch.float32)
    if unknown := sorted(set(recipe.languages) - set(model.config.languages)):
        raise ValueError(f"languages: got {unknown}, expected some of {list(model.config.languages)}.")
    if recipe.image_tokens is not None and recipe.image_tokens != model.config.num_image_tokens:
        add_image_tokens(model, recipe.image_tokens)
    if recipe.through_memory and not model.config.support_memory_size:
        raise ValueError("The base has no support memory: expected through_memory: false.")
    if not recipe.through_memory:
        set_memory(model, model.support_memory[:, :0])
    unknown = model.generation_config.update(**recipe.generation)
    if unknown:
        raise ValueError(f"Expected `generation` to hold values of GenerationConfig, got {sorted(unknown)}.")
    return model, processor, base


def add_image_tokens(model: M3FMForReportGeneration, count: int) -> None:
    """Lets a writer that reads the embedding alone read `count` pooled queries of a study beside it, from scratch.

    Raises:
        ValueError: If it reads some already, or the study is not pooled by as many queries.
    """
    config = model.config
    if config.num_image_tokens:
        raise ValueError(
            f"image_tokens: got {count}, and the base reads {config.num_image_tokens}: expected as many, or null."
        )
    if not 1 <= count <= config.num_pooling_queries:
        raise ValueError(
            f"image_tokens: got {count}, expected 1 to {config.num_pooling_queries}, the queries that pool a study."
        )
    config.num_image_tokens = count
    projector = nn.Linear(config.vision_config.hidden_size, config.text_config.hidden_size)
    nn.init.normal_(projector.weight, std=IMAGE_TOKEN_STD)
    nn.init.zeros_(projector.bias)
    model.token_projector = projector.to(model.device, model.dtype)


def set_trained(model: M3FMForReportGeneration, recipe: PairsRecipe) -> None:
    """Freezes what the recipe does not train, and takes away what was fitted to a shared space that will move.

    Raises:
        ValueError: If a tower cannot be trained as the recipe says.
    """
    model.model.requires_grad_(False)
    set_training(model.decoder, recipe.decoder_training, recipe.lora, "decoder_training")
    model.prefix_projector.requires_grad_(recipe.decoder_training == "full")
    if recipe.image_training == _FROZEN:
        return
    model.model.study_pooling.requires_grad_(True)
    model.model.visual_projection.requires_grad_(True)
    model.config.diagnosis = without_fits(model.config.diagnosis)
    if recipe.trains_tower:
        set_training(model.model.vision_model, recipe.image_training, recipe.lora, "image_training")


class ImageNoise:
    """Moves the embeddings of images as the decoder gets them, in training alone; a hook of the prefix projector.

    Args:
        std: See `M3FMConfig.text_noise_std`.

    Attributes:
        num_texts: Rows of texts of the batch, which come last and have noise of their own.
    """

    def __init__(self, std: float):
        self.std = std
        self.num_texts = 0

    def __call__(self, projector: nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor] | None:
        """Is called with what the projector is about to read, (B, D)."""
        if not projector.training:
            return None
        images, texts = inputs[0].split([len(inputs[0]) - self.num_texts, self.num_texts])
        return (torch.cat([add_noise(images, self.std), texts]),)


# --------------------------------------------------------------------------------------------------------------------
# Training


class PairsTrainer(ScoredTrainer, FeedTrainer):
    """Trains on pairs and texts; its scores are those of written validation reports.

    Args:
        args: What `Trainer` takes.
        recipe: Of learning rates, noise and what is frozen.
        kwargs: What `Trainer` and its bases here take by name.
    """

    def __init__(self, *args: Any, recipe: PairsRecipe, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.recipe = recipe
        self.noise = ImageNoise(recipe.noise)
        if recipe.noise:
            self.model.prefix_projector.register_forward_pre_hook(self.noise)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Makes the optimizer of the arguments, with a learning rate for each part and depth."""
        if self.optimizer is None:
            kind, values = self.get_optimizer_cls_and_kwargs(self.args)
            groups = parameter_groups(
                self.model if model is None else model,
                self.args.learning_rate,
                self.args.weight_decay,
                self.recipe.layer_decay,
                self.recipe.learning_rates,
            )
            self.optimizer = kind(groups, **values)
        return self.optimizer

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Computes the mean loss of the tokens of reports and texts."""
        if self.recipe.image_training == _FROZEN:
            # What is not trained gives what it will give in inference: no dropout.
            self.accelerator.unwrap_model(model).model.eval()
        self.noise.num_texts = len(inputs.get("shared_embeds", ()))
        return super().compute_loss(model, inputs, *args, **kwargs)


class PairsValidation:
    """Writes and scores reports for validation images, greedily, as inference would; each rank writes its share.

    Args:
        studies: With images, and reports in the languages.
        images: Gives their tokens or pixels.
        processor: Of the model.
        languages: That are written.
        max_new_tokens: Longest report.
        batch_size: Studies at once.
    """

    def __init__(
        self,
        studies: Sequence[Study],
        images: Images,
        processor: M3FMProcessor,
        languages: Sequence[str],
        max_new_tokens: int,
        batch_size: int = 24,
    ):
        self.studies = studies
        self.images = images.for_evaluation()
        self.processor = processor
        self.languages = tuple(languages)
        self.max_new_tokens = max_new_tokens
        self.batch_size = batch_size

    def write(self, model: M3FMForReportGeneration, language: str) -> list[str]:
        """Writes one report a study."""

        def write(studies: Sequence[Study]) -> list[str]:
            _, tensors = self.images.batch([fed_study(study) for study in studies], Draw())
            inputs = {name: value.to(model.device) for name, value in tensors.items()}
            ids = model.generate(**inputs, language=language, max_new_tokens=self.max_new_tokens)
            return self.processor.batch_decode(ids, skip_special_tokens=True)

        return write_in_shares(model, self.studies, write, self.batch_size)

    def score(self, model: M3FMForReportGeneration) -> dict[str, float]:
        """Returns BLEU-4, ROUGE-L and the share of distinct reports, per language."""
        scores: dict[str, float] = {}
        for language in self.languages if self.studies else ():
            scores |= score_texts(self.write(model, language), self.studies, language)
        return scores

    def score_names(self) -> list[str]:
        """Returns the names of the scores."""
        names = ("bleu_4", "rouge_l", "distinct")
        return [f"{name}_{code}" for code in self.languages for name in names] if self.studies else []


def make_images(
    model: M3FMForReportGeneration, processor: M3FMProcessor, recipe: PairsRecipe, studies: Sequence[Study]
) -> Images:
    """Returns what gives the images of a batch: pixels, or of a frozen tower its tokens, once those are computed."""
    if recipe.trains_tower:
        augmentation = Augmentation() if recipe.augment == "standard" else None
        return StudyPixels(processor.image_processor, augmentation=augmentation)
    cache = FeatureCache(Path(recipe.feature_cache), model.model.vision_model, processor.image_processor)
    with main_first():
        cache.fill(studies)
    return CachedTokens(cache)


def make_batches(
    pair_lengths: np.ndarray, text_lengths: np.ndarray, recipe: PairsRecipe, arguments: TrainingArguments
) -> EpochBatches:
    """Returns the batches of a run."""
    common = {"batch_size": arguments.train_batch_size, "seed": arguments.seed, "world_size": world_size()}
    if not len(text_lengths):
        return LengthBucketSampler(pair_lengths, **common)
    return ReplayBuckets(pair_lengths, text_lengths, recipe.text_share, **common)


def finish_lora(model: M3FMForReportGeneration, folder: Path, recipe: PairsRecipe) -> dict[str, Any]:
    """Merges LoRA into the weights; first saves it alone, where the base with it is what was trained.

    Returns:
        Facts: how many parameters were trained, by part, and whether there is an adapter of its own.
    """
    trained: dict[str, int] = {}
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            part = name.removeprefix("model.").split(".")[0]
            trained[part] = trained.get(part, 0) + weight.numel()
    is_low_rank = all(".lora_" in name for name, weight in model.named_parameters() if weight.requires_grad)
    is_whole = has_lora(model) and is_low_rank and recipe.through_memory
    if is_whole and is_main():
        save_adapter(model, folder / "adapter")
    merge_lora(model)
    return {"trained_parameters": trained, "adapter": is_whole}


def run(recipe: PairsRecipe, arguments: TrainingArguments, options: RunOptions | None = None) -> dict[str, Any]:
    """Trains on pairs, resumes where an interrupted run stopped, and saves the model with its curves.

    Raises:
        ValueError: If recipe, base and data do not fit, or the output folder holds another run.
    """
    set_seed(arguments.seed)
    arguments.remove_unused_columns = False
    model, processor, base = build_model(recipe)
    languages = [code for code in model.config.languages if not recipe.languages or code in recipe.languages]
    pairs, facts = load_pairs(recipe, languages)
    bank = load_replayed(recipe, languages)
    held = validation_studies(recipe.data_root, recipe.validation_set, languages)
    with main_first():
        reports = [text for study in pairs for text in study.reports.values()]
        lengths = count_tokens(reports, processor.tokenizer, recipe.feature_cache)
    text_lengths = np.zeros(0, dtype=int) if bank is None else bank.lengths(processor, recipe.feature_cache)
    prompt = model.config.num_image_tokens + model.config.num_prefix_tokens + 1
    longest = min(recipe.max_text_length, int(max(lengths.max(), text_lengths.max(initial=0))) + 1)
    check_positions(model.config.text_config, str(base), prompt, longest)
    set_trained(model, recipe)
    model.to(arguments.device)
    if bank is not None:
        bank.embed(model.model, processor, recipe.feature_cache)
    images = make_images(model, processor, recipe, [*pairs, *held])
    texts = ReportTexts(processor.tokenizer, model.config, max_length=recipe.max_text_length)
    seed, std = arguments.seed, model.config.text_noise_std
    replayed = None if bank is None else WriteCollator(texts, bank, recipe.cross_lingual, std, seed)
    lengths, text_lengths = (np.minimum(each, recipe.max_text_length) for each in (lengths, text_lengths))
    trainer = PairsTrainer(
        model=model,
        args=arguments,
        train_dataset=[*pairs, *range(len(text_lengths))],
        eval_dataset=[],
        data_collator=PairsCollator(StudyCollator(images, texts, seed), replayed, processor.tokenizer.pad_token_id),
        processing_class=processor,
        recipe=recipe,
        options=options,
        batches=make_batches(lengths, text_lengths, recipe, arguments),
        validation=PairsValidation(held, images, processor, languages, recipe.max_text_length),
    )
    train_or_resume(trainer, recipe)
    facts |= finish_lora(model, Path(arguments.output_dir), recipe) | {
        "stage": "pairs",
        "supervision": f"image-report pairs of {', '.join(recipe.sets)}: no zero-shot writer on these sets",
        "zero_shot": False,
        "languages": languages,
        "pairs": len({(study.source, study.study_id, *study.reports) for study in pairs}),
        "replayed_texts": 0 if bank is None else len(bank.texts),
        "image_tokens": model.config.num_image_tokens,
        "validation_studies": len(held),
    }
    facts = finish_run(trainer, recipe, facts)
    if not recipe.trains_tower:
        keep_input_check(str(base), facts["output_dir"])
    return facts
