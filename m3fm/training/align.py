# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Stage 1: MultiMedCLIP. Chest images, English and Chinese meet in one space, English being the pivot.

The contrastive batch is what all processes see in one step: `per_device_train_batch_size` studies, times
`gradient_accumulation_steps` micro-batches, times the processes. Memory hangs on the first of these alone.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from transformers import TrainingArguments, set_seed

from ..adapters import save_adapter
from ..configuration_m3fm import M3FMConfig
from ..data import ParallelPair, Study, load_parallel, load_studies
from ..data.studies import training_part
from ..image_processing_m3fm import M3FMImageProcessor
from ..modeling_m3fm import M3FMModel
from ..processing_m3fm import M3FMProcessor
from .align_batches import AlignCollator
from .align_scores import AlignValidation
from .augmentation import Augmentation
from .backbones import load_text_encoder, load_tokenizer, load_vision_tower
from .features import FeatureCache
from .feed import FeedTrainer
from .gradient_cache import Embeddings, GradientCache
from .objective import LOSSES, AlignmentObjective
from .ranks import is_main, main_first, refuse_data_parallel, world_size
from .runs import RunOptions, ScoredTrainer, finish_run, train_or_resume
from .samplers import BalancedDraws, EveryStudy, StepBuckets, count_tokens
from .settings import checked_block
from .study_images import CachedTokens, StudyPixels
from .towers import LoraBlock, has_lora, merge_lora, parameter_groups, set_training

BALANCES = ("source", "modality", "languages")
_IMAGES = ("vision_features", "pixel_values", "image_mask")
_TEXTS = ("input_ids", "attention_mask")
# SigLIP starts from a scale of 10 and a bias that makes every pair a negative (Zhai et al., ICCV 2023, section 3.2).
_SIGMOID_START = {"logit_scale_init_value": math.log(10), "logit_bias_init_value": -10.0}


@dataclass
class AlignRecipe:
    """What stage 1 is made of.

    Args:
        data_root: Folder that holds the sets.
        image_sets: Sets with images, and how often each is repeated in an epoch.
        text_sets: Sets with reports and labels but no images, and their repeats; of a set in both, these count.
        parallel_sets: Sets whose studies get their translation from parallel text; their `text_sets` entry counts.
        exclude: Ids of studies that are left out.
        balance: What an epoch is balanced over, of source, modality and languages; nothing: every study once.
        balance_temperature: See `m3fm.training.samplers.BalancedDraws`: 1 keeps the shares of the groups, more makes
            small ones larger.
        vision_model: Pretrained image tower, a folder or a hub name.
        text_encoder: Pretrained text encoder, likewise; empty: a new one by `model.text_encoder_config`.
        tokenizer: Folder or hub name of the tokenizer of all languages.
        languages: Codes, the pivot first.
        model: Values of `M3FMConfig`, sub-configs included.
        processor: Settings of `M3FMImageProcessor`.
        vision_training: "frozen" (its tokens are computed once), "full", "lora", or "last_N": the last N blocks.
        text_training: Likewise of the text encoder.
        lora: How, where a tower is trained by LoRA.
        layer_decay: Factor of the learning rate from each block of a tower to the one below it.
        learning_rates: Factors of the learning rate by part: vision_model, text_encoder, ...
        augment: Whether images of a trained tower are augmented: "none" or "standard".
        feature_cache: Folder for the tokens of a frozen tower.
        max_text_length: Tokens of a text that are read.
        label_share: How often a study with images and a report is described by its labels instead.
        loss: "infonce" or "sigmoid", see `m3fm.training.objective.AlignmentObjective`.
        translation_weight: Weight of the contrastive loss between languages.
        translation_temperature: Its temperature, which is not learned.
        translation_mse_weight: Weight of the squared distance of a translation to the English embedding.
        loss_rows: Rows of the loss that are computed at once.
    """

    data_root: str = "../shared/data"
    image_sets: dict[str, int] = field(default_factory=dict)
    text_sets: dict[str, int] = field(default_factory=dict)
    parallel_sets: list[str] = field(default_factory=list)
    exclude: list[str] = field(default_factory=list)
    balance: list[str] = field(default_factory=list)
    balance_temperature: float = 2.0
    vision_model: str = "facebook/dinov2-small"
    text_encoder: str = ""
    tokenizer: str = ""
    languages: list[str] = field(default_factory=lambda: ["en", "zh"])
    model: dict[str, Any] = field(default_factory=dict)
    processor: dict[str, Any] = field(default_factory=dict)
    vision_training: str = "frozen"
    text_training: str = "full"
    lora: LoraBlock = field(default_factory=LoraBlock)
    layer_decay: float = 1.0
    learning_rates: dict[str, float] = field(default_factory=dict)
    augment: str = "none"
    feature_cache: str = "runs/features"
    max_text_length: int = 128
    label_share: float = 0.25
    loss: str = "infonce"
    translation_weight: float = 1.0
    translation_temperature: float = 0.03
    translation_mse_weight: float = 0.0
    loss_rows: int = 1024

    def __post_init__(self) -> None:
        self.lora = checked_block(LoraBlock, self.lora, "lora")
        if self.augment not in ("none", "standard"):
            raise ValueError(f"augment: got {self.augment!r}, expected none or standard.")
        if unknown := sorted(set(self.balance) - set(BALANCES)):
            raise ValueError(f"balance: got {unknown}, expected any of {list(BALANCES)}.")
        if self.vision_training == "frozen" and self.augment != "none":
            raise ValueError("The tokens of a frozen tower are computed once: expected augment: none.")
        if self.loss not in LOSSES:
            raise ValueError(f"loss: got {self.loss!r}, expected one of {list(LOSSES)}.")


class StudyDataset(Dataset):
    """Serves studies as they are; the collator decides what becomes of them."""

    def __init__(self, studies: Sequence[Study]):
        self.studies = studies

    def __len__(self) -> int:
        return len(self.studies)

    def __getitem__(self, index: int) -> Study:
        return self.studies[index]


class AlignTrainer(ScoredTrainer, FeedTrainer):
    """Trains with the loss of all micro-batches of a step and of all processes; is scored by retrieval and diagnosis.

    `gradient_accumulation_steps` makes the contrastive batch larger, and not several of them: see `gradient_cache.py`.

    Args:
        args: What `Trainer` takes.
        recipe: Of the loss and of learning rates.
        kwargs: What `Trainer` and its bases here take by name.
    """

    def __init__(self, *args: Any, recipe: AlignRecipe, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.recipe = recipe
        objective = AlignmentObjective(
            recipe.loss,
            recipe.translation_weight,
            recipe.translation_temperature,
            recipe.translation_mse_weight,
            recipe.loss_rows,
        )
        self._cache = GradientCache(self._embed, objective)
        self._micro_batches: list[Mapping[str, Any]] = []

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
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

    def get_train_dataloader(self) -> DataLoader:
        """Returns the loader of training; of the batches of a step only one at a time goes to the device."""
        loader = super().get_train_dataloader()
        loader.device = None  # accelerate would move them all, as they are read
        return loader

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list, Any]:
        """Returns the micro-batches of a step, and keeps them: the loss is that of all of them."""
        self._micro_batches, count = super().get_batch_samples(*args, **kwargs)
        return self._micro_batches, count

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Goes back through one micro-batch; before the first one of a step, computes the loss of all."""
        model.train()
        if self._cache.is_spent:
            with torch.no_grad():
                # CLIP's ceiling of 100 on the inverse temperature.
                self.accelerator.unwrap_model(model).logit_scale.clamp_(max=math.log(100))
            facts = [batch["facts"].to(self.args.device) for batch in self._micro_batches]
            self._cache.begin(model, self._micro_batches, facts)
        # The cache has the images and texts: they are not to be moved to the device once more.
        super().training_step(model, {"facts": inputs["facts"]}, *args, **kwargs)
        return self._loss / len(self._micro_batches)

    def compute_loss(
        self, model: torch.nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """Returns what has the gradient of the loss by way of the next micro-batch of the step."""
        surrogate, gradients = self._cache.next_surrogate(model)
        self._loss = gradients.loss
        # `Trainer` divides by it, for the mean over micro-batches; this loss is of all of them.
        surrogate = surrogate * self.current_gradient_accumulation_steps
        return (surrogate, None) if return_outputs else surrogate

    def _embed(self, model: torch.nn.Module, batch: Mapping[str, Any]) -> Embeddings:
        for tower in (self.model.vision_model, self.model.text_encoder):
            if not any(weight.requires_grad for weight in tower.parameters()):
                tower.eval()  # what is not trained gives what it will give in inference: no dropout
        inputs = self._prepare_inputs({name: batch[name] for name in (*_IMAGES, *_TEXTS) if name in batch})
        # A context of its own: autocast keeps what it cast, and what it cast without a graph has none later on.
        with self.compute_loss_context_manager():
            outputs = model(**inputs)
        images = outputs.image_embeds[: len(batch["facts"].image_study)]  # all but a blank one
        return Embeddings(images.float(), outputs.text_embeds.float(), outputs.logit_scale, outputs.logit_bias)


# --------------------------------------------------------------------------------------------------------------------
# What is learned


def load_training_studies(recipe: AlignRecipe) -> tuple[list[Study], list[Study], list[ParallelPair]]:
    """Returns the training studies (repeated as the recipe says), the validation studies and the held-apart pairs.

    Raises:
        ValueError: If a set of `parallel_sets` is not among the others, or `exclude` names no study.
    """
    root = Path(recipe.data_root)
    sets = {**recipe.image_sets, **recipe.text_sets}
    if lacking := sorted(set(recipe.parallel_sets) - sets.keys()):
        raise ValueError(f"parallel_sets: got {lacking}, expected sets that text_sets or image_sets name too.")
    train, validation, held_apart = [], [], []
    excluded, unknown = set(recipe.exclude), set(recipe.exclude)
    for name, repeats in sets.items():
        studies = load_studies(root / name)
        unknown -= {study.study_id for study in studies}
        studies = [study for study in studies if study.study_id not in excluded]
        if name in recipe.parallel_sets:
            studies, pairs = _with_translations(studies, load_parallel(root / name))
            held_apart += pairs
        # What has neither words in a language of the model nor labels has nothing to be compared with.
        usable = [study for study in studies if study.findings or study.reports.keys() & set(recipe.languages)]
        if not any(study.images or name not in recipe.image_sets for study in usable):
            images = "images beside " if name in recipe.image_sets else ""
            raise ValueError(f"{name}: no study has {images}labels or reports: leave it out, or take another set.")
        validation += [study for study in usable if study.split == "validation"]
        train += training_part(usable) * repeats
    if unknown:
        raise ValueError(f"Expected every id of `exclude` to be that of a study, {len(unknown)} of them are not.")
    return train, validation, held_apart


def _with_translations(studies: list[Study], pairs: list[ParallelPair]) -> tuple[list[Study], list[ParallelPair]]:
    """Adds studies for the parallel texts of training studies; returns the pairs of validation studies apart."""
    by_id = {study.study_id: study for study in studies}
    added = []
    for number, pair in enumerate(pairs):
        study = by_id.get(pair.study_id)
        if study is None or pair.split == "validation":
            continue
        added.append(
            Study(
                study_id=f"{pair.study_id}#{number}",
                source=study.source,
                modality=study.modality,
                images=(),
                patient_id=study.patient_id,
                reports=pair.texts,
                findings=study.findings,
                split=study.split,
                grouped_key=study.grouped_key,
            )
        )
    return studies + added, [pair for pair in pairs if pair.split == "validation" and pair.study_id in by_id]


def study_draws(studies: Sequence[Study], recipe: AlignRecipe) -> EveryStudy | BalancedDraws:
    """Returns what an epoch is made of: every study once, or groups of them balanced as the recipe says."""
    if not recipe.balance:
        return EveryStudy(len(studies))
    of_study = {
        "source": lambda study: study.source,
        "modality": lambda study: study.modality,
        "languages": lambda study: tuple(sorted(study.reports)),
    }
    groups = [tuple(of_study[name](study) for name in recipe.balance) for study in studies]
    return BalancedDraws(groups, recipe.balance_temperature)


def make_batches(
    studies: Sequence[Study], collator: AlignCollator, recipe: AlignRecipe, arguments: TrainingArguments
) -> StepBuckets:
    """Returns the micro-batches of a run.

    Raises:
        ValueError: If there are not enough studies for one micro-batch of each process.
    """
    needed = arguments.train_batch_size * world_size()
    if len(studies) < needed:
        raise ValueError(
            f"Expected at least {needed} training studies, one micro-batch of {arguments.train_batch_size} for each "
            f"of {world_size()} processes, got {len(studies)}: lower per_device_train_batch_size, or add sets."
        )
    with main_first():
        lengths = count_tokens(
            [collator.longest_text(study) for study in studies], collator.tokenizer, recipe.feature_cache
        )
    return StepBuckets(
        np.minimum(lengths, recipe.max_text_length),
        arguments.train_batch_size,
        arguments.gradient_accumulation_steps,
        arguments.seed,
        world_size(),
        study_draws(studies, recipe),
    )


# --------------------------------------------------------------------------------------------------------------------
# The model and the run


def build_model(recipe: AlignRecipe) -> tuple[M3FMModel, M3FMProcessor]:
    """Builds MultiMedCLIP on the pretrained image tower; the text encoder is pretrained where the recipe names one.

    Raises:
        ValueError: If a backbone does not fit, saying what to change.
    """
    tokenizer, image_token_id, language_token_ids = load_tokenizer(recipe.tokenizer, recipe.languages)
    image_processor = M3FMImageProcessor(**recipe.processor)
    vision = load_vision_tower(recipe.vision_model, image_processor.size["height"], image_processor.size["width"])
    values = dict(recipe.model)
    # A decoder comes in stage 2; until then its configuration has to have room for the ids of prompts.
    values.setdefault("text_config", {"vocab_size": len(tokenizer)})
    if recipe.loss == "sigmoid":
        values = _SIGMOID_START | values
    text_encoder = None
    if recipe.text_encoder:
        if "text_encoder_config" in values:
            raise ValueError(
                f"Got text_encoder {recipe.text_encoder!r} and model.text_encoder_config: expected one of them."
            )
        text_encoder = load_text_encoder(recipe.text_encoder, tokenizer)
        values["text_encoder_config"] = text_encoder.config
    model = M3FMModel(
        M3FMConfig(
            vision_config=vision.config,
            image_token_id=image_token_id,
            language_token_ids=language_token_ids,
            **values,
        )
    )
    model.vision_model = vision
    if text_encoder is not None:
        model.text_encoder = text_encoder
    tokenizer.model_max_length = min(tokenizer.model_max_length, model.max_text_tokens or tokenizer.model_max_length)
    if recipe.max_text_length > tokenizer.model_max_length:
        raise ValueError(
            f"max_text_length: got {recipe.max_text_length}, expected at most {tokenizer.model_max_length}, the "
            "positions of the text encoder."
        )
    set_training(model.vision_model, recipe.vision_training, recipe.lora, "vision_training")
    set_training(model.text_encoder, recipe.text_training, recipe.lora, "text_training")
    return model, M3FMProcessor(image_processor, tokenizer)


def make_collator(
    model: M3FMModel, processor: M3FMProcessor, recipe: AlignRecipe, studies: Sequence[Study], seed: int
) -> AlignCollator:
    """Returns the collator; of a frozen tower, once it has seen the images of all `studies`."""
    size = processor.image_processor.size
    blank = {"pixel_values": torch.zeros(1, 1, 3, size["height"], size["width"])}
    if recipe.vision_training == "frozen":
        cache = FeatureCache(Path(recipe.feature_cache), model.vision_model, processor.image_processor)
        with main_first():
            cache.fill(studies)
        images = CachedTokens(cache)
        with torch.inference_mode():
            pixels = blank["pixel_values"].to(model.device)
            blank = {"vision_features": torch.zeros_like(model.get_vision_features(pixels)).cpu()}
    else:
        augmentation = Augmentation() if recipe.augment == "standard" else None
        images = StudyPixels(processor.image_processor, augmentation=augmentation)
    blank["image_mask"] = torch.ones(1, 1, dtype=torch.bool)
    return AlignCollator(
        images, blank, processor.tokenizer, model.config.languages, recipe.max_text_length, recipe.label_share, seed
    )


def run(recipe: AlignRecipe, arguments: TrainingArguments, options: RunOptions | None = None) -> dict[str, Any]:
    """Trains stage 1, resumes where an interrupted run stopped, and saves the model with its curves.

    Raises:
        ValueError: If a backbone does not fit, there are too few studies, the output folder holds another run, or one
            process has several GPUs.
    """
    refuse_data_parallel(arguments.n_gpu)
    set_seed(arguments.seed)
    arguments.remove_unused_columns = False
    if arguments.ddp_find_unused_parameters is None:  # a batch without images has a blank one
        arguments.ddp_find_unused_parameters = False
    model, processor = build_model(recipe)
    model.to(arguments.device)
    train, validation_studies, pairs = load_training_studies(recipe)
    collator = make_collator(model, processor, recipe, train + validation_studies, arguments.seed)
    trainer = AlignTrainer(
        model=model,
        args=arguments,
        options=options,
        train_dataset=StudyDataset(train),
        eval_dataset=StudyDataset(validation_studies),
        data_collator=collator,
        processing_class=processor,
        recipe=recipe,
        batches=make_batches(train, collator, recipe, arguments),
        validation=AlignValidation(validation_studies, pairs, collator),
    )
    train_or_resume(trainer, recipe)
    if has_lora(model) and is_main():
        save_adapter(model, Path(arguments.output_dir) / "adapter")
    merge_lora(model)
    facts = {
        "stage": "align",
        "vision": "frozen, tokens cached" if recipe.vision_training == "frozen" else recipe.vision_training,
        "contrastive_batch": arguments.train_batch_size * arguments.gradient_accumulation_steps * world_size(),
        "train_studies": len({(study.source, study.study_id) for study in train}),
        "validation_studies": len(validation_studies),
    }
    return finish_run(trainer, recipe, facts)
