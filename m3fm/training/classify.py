# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Full supervision: a diagnosis head on the image, on the report that the checkpoint writes of it, or on both.

The report that the head reads is always the checkpoint's own, written from the image (M3FM 2025, the ablation of image
and report features); a radiologist's would not be there when a new image is diagnosed. The text tower stays as it is;
of the image side the recipe says what is trained.

Letters in shapes: B studies, N images of a study, S tokens of an image, C width of the tower, D of the shared space, L
labels.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler
from transformers import AutoProcessor, TrainingArguments, set_seed

from .. import DEFAULT_CHECKPOINT
from ..data import Study, load_studies
from ..data.splits import new_to
from ..data.studies import training_part
from ..evaluation.diagnosis_metrics import LabelMeasurement, PanelMeasurement, by_column, fit_threshold
from ..evaluation.label_file import Label, LabelSet, choose_labels, parse_labels, read_labels
from ..evaluation.probes import choose_strength, fit_probe, probability
from ..evaluation.reporter import checkpoint_folder
from ..evaluation.resampling import point_scores
from ..evaluation.runs import NOTICE, group_numbers, write_json
from ..modeling_m3fm import M3FMForImageClassification, M3FMForReportGeneration
from ..processing_m3fm import M3FMProcessor
from .features import FeatureCache
from .generated_reports import embed_reports, hash_writer, stack_tokens, write_reports
from .runs import RunOptions, ScoredTrainer, check_single_device, finish_run, train_or_resume
from .supervision import (
    BALANCES,
    UNCERTAIN_POLICIES,
    Balance,
    Examples,
    choose_balance,
    diagnosis_loss,
    make_examples,
    read_label_table,
)

CHOICES = {
    "features": ("image", "report", "fused"),
    "uncertain": tuple(UNCERTAIN_POLICIES),
    "balance": BALANCES,
    "head_start": ("probe", "random"),
    "shared_patients": ("leave_out", "keep"),
}
# What a checkpoint's config has no place for: thresholds, and which writer's reports the head reads.
HEAD_FILE = "diagnosis_head.json"
_FITTED = ("calibration", "threshold", "fitted_on")
_VALIDATION = "validation"


@dataclass
class ClassifyRecipe:
    """What full supervision is made of.

    Args:
        data_root: Folder that holds the sets.
        base: Checkpoint to start from, which also writes the reports; empty takes the one that ships.
        sets: Sets whose part "train" is learned, one name or several.
        labels: Names of findings, or one label file (see `m3fm.evaluation.label_file`); empty takes every finding that
            the sets annotate with and without.
        exclusive: Whether each study has exactly one of the labels, which then compete; a label file may say so too.
        label_table: A CSV file with a column `study_id` or `file_name` and one for each label it knows, of 1
            (present), 0 (absent), -1 (uncertain) or nothing (unknown); it replaces what the sets say of its studies.
        uncertain: What an uncertain label is in training: ignore, positive, negative or half. Validation ignores it.
        features: What the head reads: image, report or fused.
        language: Of the reports that the head reads.
        balance: Against class imbalance: "weights" in the loss, "sampling", or none. Probabilities are brought back to
            the prevalence of the training studies at the end.
        head_start: "probe" fits the head to the features as they are (L2-regularised logistic regression, the penalty
            by cross-validation) before anything else is trained: a random head would spoil what the rest has learned
            (Kumar et al., ICLR 2022).
        train_projection: Whether the way from image tokens to the shared space is trained too.
        train_tower: Whether the image tower is trained too, on pixels: for GPUs.
        dropout: Before the projections, in training.
        exclude: Ids of studies that are left out.
        shared_patients: "leave_out" drops training studies whose patient or paper is in the validation part.
        feature_cache: Folder for the tokens of the frozen image tower.
        report_cache: Folder for the generated reports.
    """

    data_root: str = "../shared/data"
    base: str = ""
    sets: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    exclusive: bool = False
    label_table: str = ""
    uncertain: str = "ignore"
    features: str = "image"
    language: str = "en"
    balance: str = "none"
    head_start: str = "probe"
    train_projection: bool = True
    train_tower: bool = False
    dropout: float = 0.0
    exclude: list[str] = field(default_factory=list)
    shared_patients: str = "leave_out"
    feature_cache: str = "runs/features"
    report_cache: str = "runs/reports"

    def __post_init__(self):
        # On a command line one name is a word, not a list.
        for name in ("sets", "labels", "exclude"):
            value = getattr(self, name)
            setattr(self, name, [value] if isinstance(value, str) else [str(each) for each in value])
        self.uncertain = str(self.uncertain)
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"Expected {name} to be one of {list(allowed)}, got {getattr(self, name)!r}.")
        if self.features == "report" and self.train_tower:
            raise ValueError("A head on reports alone trains no tower: expected train_tower: false.")


# --------------------------------------------------------------------------------------------------------------------
# What is learned


def load_examples(recipe: ClassifyRecipe) -> tuple[Examples, Examples, list[Label], dict[str, Any]]:
    """Returns training and validation examples, the labels, and facts about what was left out.

    Raises:
        ValueError: If there is nothing to learn from, or a label has one class only.
    """
    if not recipe.sets:
        raise ValueError("Expected sets to learn from, got none: name them by `sets`.")
    studies = [study for name in recipe.sets for study in load_studies(Path(recipe.data_root) / name) if study.images]
    if unknown := set(recipe.exclude) - {study.study_id for study in studies}:
        raise ValueError(f"Expected every id of `exclude` to be that of a study, {len(unknown)} of them are not.")
    studies = [study for study in studies if study.study_id not in recipe.exclude]
    held = [study for study in studies if study.split == _VALIDATION]
    train = training_part(studies)
    shared = 0
    if recipe.shared_patients == "leave_out":
        kept = [study for study, is_new in zip(train, new_to(held, train), strict=True) if is_new]
        shared, train = len(train) - len(kept), kept
    label_set = _choose_labels(recipe, train)
    exclusive = label_set.exclusive or recipe.exclusive
    # Validation is scored on what is certain.
    policies = (UNCERTAIN_POLICIES[recipe.uncertain], np.nan)
    table = read_label_table(recipe.label_table, label_set.labels) if recipe.label_table else {}
    train_part, held_part = (
        make_examples(part, label_set.labels, table, policy, exclusive)
        for part, policy in zip((train, held), policies, strict=True)
    )
    for column, label in enumerate(label_set.labels):
        known = train_part.labels[:, column]
        if not ((known > 0.5).any() and (known < 0.5).any()):
            raise ValueError(
                f"Label {label.name!r}: expected training studies with and without it, got {int((known > 0.5).sum())} "
                f"with and {int((known < 0.5).sum())} without."
            )
    facts = {"exclusive": exclusive, "left_out_for_shared_patients": shared}
    return train_part, held_part, list(label_set.labels), facts


def _choose_labels(recipe: ClassifyRecipe, train: Sequence[Study]) -> LabelSet:
    if len(recipe.labels) == 1 and recipe.labels[0].endswith((".yaml", ".yml")):
        return read_labels(recipe.labels[0])
    if recipe.labels:
        return parse_labels(recipe.labels)
    if recipe.label_table:
        raise ValueError("With a label_table the labels have to be named: expected `labels`.")
    annotated = [study for study in train if study.findings]
    if not annotated:
        raise ValueError(f"No training study of {recipe.sets} is annotated: expected labels.")
    label_set, names, _ = choose_labels(None, annotated, annotated, shots=0)
    return LabelSet(tuple(label for label in label_set.labels if label.name in names))


# --------------------------------------------------------------------------------------------------------------------
# Training


class ExampleDataset(Dataset):
    """Serves places of examples; the collator looks up what stands there."""

    def __init__(self, examples: Examples):
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples.studies)

    def __getitem__(self, index: int) -> int:
        return index


class ClassifyCollator:
    """Turns places of examples into what `M3FMForImageClassification` takes.

    Args:
        examples: What the places count in.
        recipe: Says what the head reads.
        cache: Tokens of the frozen tower; not read where the tower is trained.
        processor: Makes pixels where the tower is trained.
        exclusive: Whether a label is a class index rather than L values.
    """

    def __init__(
        self,
        examples: Examples,
        recipe: ClassifyRecipe,
        cache: FeatureCache,
        processor: M3FMProcessor,
        exclusive: bool,
    ):
        self.examples = examples
        self.recipe = recipe
        self.cache = cache
        self.processor = processor
        self.exclusive = exclusive

    def __call__(self, places: list[int]) -> dict[str, torch.Tensor]:
        """Collates a training batch."""
        studies = [self.examples.studies[place] for place in places]
        batch = self.inputs(places) | {"study_ids": [f"{study.source}/{study.study_id}" for study in studies]}
        labels = self.examples.labels[places]
        targets = torch.from_numpy(labels.argmax(axis=1)) if self.exclusive else torch.from_numpy(labels).float()
        return batch | {"labels": targets}

    def inputs(self, places: Sequence[int]) -> dict[str, torch.Tensor]:
        """Returns what is read of the examples at these places, without their labels."""
        studies = [self.examples.studies[place] for place in places]
        batch = {}
        if self.recipe.features != "image":
            batch["report_embeds"] = self.examples.report_embeds[list(places)]
        if self.recipe.features == "report":
            return batch
        if self.recipe.train_tower:
            images = [list(study.images) for study in studies]
            return batch | dict(self.processor.image_processor(images, return_tensors="pt"))
        return batch | stack_tokens(studies, self.cache)


class BalancedSampler(Sampler):
    """Draws studies with replacement by weight, anew in each epoch; by its number, so that a resumed run agrees."""

    def __init__(self, weights: np.ndarray, seed: int):
        self.weights = torch.from_numpy(weights)
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.weights)

    def set_epoch(self, epoch: int) -> None:
        """Is told the epoch by Trainer."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        yield from torch.multinomial(self.weights, len(self), replacement=True, generator=generator).tolist()


class ClassifyTrainer(ScoredTrainer):
    """Trains the head, with the weights of `Balance`; its scores are areas under the ROC curve of validation."""

    def __init__(self, *args: Any, recipe: ClassifyRecipe, balance: Balance, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.recipe = recipe
        self.balance = balance

    def compute_loss(
        self, model: torch.nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """Computes the (weighted) cross-entropy of the known labels."""
        if not (self.recipe.train_projection or self.recipe.train_tower):
            # What is not trained gives what it will give in inference: no dropout.
            self.accelerator.unwrap_model(model).model.eval()
        outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
        loss = diagnosis_loss(outputs.logits.float(), inputs["labels"], self.balance.label_weights)
        return (loss, outputs) if return_outputs else loss

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler:
        if self.balance.study_weights is None:
            return super()._get_train_sampler(train_dataset)
        return BalancedSampler(self.balance.study_weights, self.args.seed)


class ClassifyValidation:
    """Scores a head on validation studies."""

    def __init__(self, collator: ClassifyCollator, names: Sequence[str], batch_size: int = 64):
        self.collator = collator
        self.names = list(names)
        self.batch_size = batch_size

    @torch.inference_mode()
    def logits(self, model: M3FMForImageClassification) -> np.ndarray:
        """Returns logits (N, L)."""
        model.eval()
        count = len(self.collator.examples.studies)
        chunks = []
        for start in range(0, count, self.batch_size):
            inputs = self.collator.inputs(range(start, min(start + self.batch_size, count)))
            inputs = {name: value.to(model.device) for name, value in inputs.items()}
            chunks.append(model(**inputs).logits.float().cpu().numpy())
        return np.concatenate(chunks)

    def probabilities(self, model: M3FMForImageClassification) -> dict[str, np.ndarray]:
        """Returns probabilities (N,) by label."""
        logits = self.logits(model)
        if self.collator.exclusive:
            values = torch.from_numpy(logits).double().softmax(dim=-1).numpy()
        else:
            values = probability(logits.astype(np.float64))
        return dict(zip(self.names, values.T, strict=True))

    def score(self, model: M3FMForImageClassification) -> dict[str, float]:
        """Returns `auroc_LABEL` for each label that validation has with and without, and `auroc_macro`, their mean."""
        scored = self._scored()
        if not scored:
            return {}
        given = self.probabilities(model)
        measured = {name: LabelMeasurement(labels, given[name], given[name] >= 0.5) for name, labels in scored.items()}
        scores = point_scores([PanelMeasurement(measured, list(measured))], len(self.collator.examples.studies))
        return {f"auroc_{column}": each["auroc"] for column, each in by_column(scores).items()}

    def score_names(self) -> list[str]:
        """Returns the names of the scores, without asking a model."""
        return [f"auroc_{name}" for name in [*self._scored(), "macro"]] if self._scored() else []

    def _scored(self) -> dict[str, np.ndarray]:
        """Returns the values of each label that validation has with and without, (N,) by name."""
        examples = self.collator.examples
        columns = zip(self.names, examples.labels.T, strict=True) if len(examples.studies) else ()
        return {name: labels for name, labels in columns if {0.0, 1.0} <= set(labels)}

    def thresholds(self, model: M3FMForImageClassification) -> dict[str, float]:
        """Fits a threshold for each label; those that validation has only with or only without have none."""
        if not len(self.collator.examples.studies):
            return {}
        predicted = self.probabilities(model)
        fitted = {
            name: fit_threshold(labels, predicted[name])
            for name, labels in zip(self.names, self.collator.examples.labels.T, strict=True)
        }
        return {name: value for name, value in fitted.items() if not np.isnan(value)}


# --------------------------------------------------------------------------------------------------------------------
# The run


def build_classifier(
    recipe: ClassifyRecipe, labels: Sequence[Label], exclusive: bool
) -> tuple[M3FMForImageClassification, M3FMProcessor, Path]:
    """Builds a new head on the base; returns it with its processor and the base's folder."""
    base = checkpoint_folder(recipe.base or DEFAULT_CHECKPOINT)
    names = [label.name for label in labels]
    model = M3FMForImageClassification.from_pretrained(
        base,
        dtype=torch.float32,
        classifier_features=recipe.features,
        projection_dropout=recipe.dropout,
        id2label=dict(enumerate(names)),
        label2id={name: number for number, name in enumerate(names)},
        problem_type="single_label_classification" if exclusive else "multi_label_classification",
    )
    model.model.requires_grad_(False)
    if recipe.features != "report" and (recipe.train_projection or recipe.train_tower):
        model.model.study_pooling.requires_grad_(True)
        model.model.visual_projection.requires_grad_(True)
        model.config.diagnosis = without_fits(model.config.diagnosis)
    model.model.vision_model.requires_grad_(recipe.train_tower)
    return model, AutoProcessor.from_pretrained(base), base


def without_fits(diagnosis: dict[str, Any] | None) -> dict[str, Any]:
    """Returns a config's labels without what was fitted to a shared space that is no longer there."""
    return {
        label: {name: value for name, value in entry.items() if name not in _FITTED}
        for label, entry in (diagnosis or {}).items()
    }


def prepare_features(
    recipe: ClassifyRecipe,
    model: M3FMForImageClassification,
    processor: M3FMProcessor,
    base: Path,
    cache: FeatureCache,
    parts: Sequence[Examples],
) -> list[Examples]:
    """Computes what is frozen, once: tokens of the images, and reports with their embeddings.

    Raises:
        ValueError: If the base does not write the recipe's language.
    """
    studies = [study for part in parts for study in part.studies]
    if recipe.features == "image":
        if not recipe.train_tower:
            cache.fill(studies)
        return list(parts)
    writer = M3FMForReportGeneration.from_pretrained(base, dtype=torch.float32).to(model.device).eval()
    if recipe.language not in writer.config.languages:
        raise ValueError(f"Expected language to be one of {list(writer.config.languages)}, got {recipe.language!r}.")
    cache.fill(studies)
    folder, key = Path(recipe.report_cache), hash_writer(base)
    texts = write_reports(writer, processor, studies, cache, recipe.language, folder, key)
    embeds = embed_reports(model.eval(), processor, texts)
    sizes = [len(part.studies) for part in parts]
    return [replace(part, report_embeds=each) for part, each in zip(parts, embeds.split(sizes), strict=True)]


@torch.inference_mode()
def head_features(model: M3FMForImageClassification, collator: ClassifyCollator, batch_size: int = 64) -> np.ndarray:
    """Returns what the head reads of each example, as it reads it: (N, D), or (N, 2 D) fused."""
    read: list[torch.Tensor] = []
    hook = model.classifier.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0].float().cpu()))
    # The head is not asked: it may be untrained.
    model.train()
    model.model.eval()
    count = len(collator.examples.studies)
    for start in range(0, count, batch_size):
        inputs = collator.inputs(range(start, min(start + batch_size, count)))
        model(**{name: value.to(model.device) for name, value in inputs.items()})
    hook.remove()
    return torch.cat(read).numpy()


@torch.no_grad()
def start_head(model: M3FMForImageClassification, collator: ClassifyCollator, shift: np.ndarray, seed: int) -> None:
    """Fits the head to the features as they are: a logistic regression a label, its log odds moved by `shift` (L,)."""
    features = head_features(model, collator).astype(np.float64)
    groups = group_numbers(collator.examples.studies)
    for row, values in enumerate(collator.examples.labels.T):
        # Neither with nor without: a regression of two classes cannot take it.
        labels = np.where(values == 0.5, np.nan, values)
        probe = fit_probe(features, labels, choose_strength(features, labels, groups, seed))
        weight = probe.weight / probe.scale
        bias = probe.bias - probe.mean @ weight + shift[row]
        model.classifier.weight[row] = torch.from_numpy(weight)
        model.classifier.bias[row] = float(bias)


def run(recipe: ClassifyRecipe, arguments: TrainingArguments, options: RunOptions | None = None) -> dict[str, Any]:
    """Trains a diagnosis head, resumes where an interrupted run stopped, and saves the model with its curves.

    Raises:
        ValueError: In a run on several devices, or if data, labels or the output folder do not fit.
    """
    check_single_device(arguments)
    set_seed(arguments.seed)
    arguments.remove_unused_columns = False
    train, held, labels, facts = load_examples(recipe)
    model, processor, base = build_classifier(recipe, labels, facts["exclusive"])
    model.to(arguments.device)
    cache = FeatureCache(Path(recipe.feature_cache), model.model.vision_model, processor.image_processor)
    train, held = prepare_features(recipe, model, processor, base, cache, (train, held))
    collators = [ClassifyCollator(part, recipe, cache, processor, facts["exclusive"]) for part in (train, held)]
    validation = ClassifyValidation(collators[1], [label.name for label in labels])
    balance = choose_balance(train.labels, recipe.balance, facts["exclusive"])
    if recipe.head_start == "probe":
        start_head(model, collators[0], balance.shift, arguments.seed)
    trainer = ClassifyTrainer(
        model=model,
        args=arguments,
        options=options,
        train_dataset=ExampleDataset(train),
        eval_dataset=ExampleDataset(held),
        data_collator=collators[0],
        processing_class=processor,
        recipe=recipe,
        balance=balance,
        validation=validation,
    )
    train_or_resume(trainer, recipe)
    with torch.no_grad():
        model.classifier.bias -= torch.from_numpy(balance.shift).to(model.classifier.bias)
    thresholds = validation.thresholds(model)
    facts |= {
        "stage": "classify",
        "labels": validation.names,
        "train_studies": len(train.studies),
        "validation_studies": len(held.studies),
        "probabilities": "at the prevalence of the training studies",
    }
    facts = finish_run(trainer, recipe, facts)
    head = {
        "notice": NOTICE,
        "labels": validation.names,
        "exclusive": facts["exclusive"],
        "thresholds": thresholds,
        "fitted_on": f"validation part of {', '.join(recipe.sets)} ({len(held.studies)} studies)",
        "features": recipe.features,
        # The folder holds no decoder: reports come from the checkpoint that it was made of.
        "report_language": None if recipe.features == "image" else recipe.language,
        "report_writer_sha256": None if recipe.features == "image" else hash_writer(base),
    }
    write_json(Path(arguments.output_dir) / HEAD_FILE, head)
    return facts | {"thresholds": thresholds}
