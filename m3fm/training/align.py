# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Stage 1: MultiMedCLIP. Chest images, English and Chinese meet in one space, English being the pivot.

What one example brings to a batch depends on what its set has: an image and its report, an image and its labels, a
report in two languages. All of them share one batch and one loss (`losses.soft_contrastive_loss`).
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    PreTrainedModel,
    TrainingArguments,
    set_seed,
)

from ..configuration_m3fm import M3FMConfig
from ..data import ParallelPair, Study, finding_sentence, finding_table, label_vector, load_parallel, load_studies
from ..data.studies import training_part
from ..evaluation.retrieval import retrieval_recall, same_text
from ..image_processing_m3fm import M3FMImageProcessor
from ..modeling_m3fm import M3FMModel
from ..processing_m3fm import M3FMProcessor
from .features import FeatureCache
from .losses import Items, soft_contrastive_loss, soft_targets
from .runs import ScoredTrainer, batch_generator, check_single_device, finish_run, train_or_resume

MODALITIES = ("cxr", "ct")


@dataclass
class AlignRecipe:
    """What stage 1 is made of.

    Args:
        data_root: Folder that holds the sets.
        image_sets: Sets with images, and how often each is repeated in an epoch.
        text_sets: Sets with reports and labels but no images, and their repeats.
        parallel_sets: Sets whose studies get their translation from parallel text; their `text_sets` entry counts.
        exclude: Ids of studies that are left out.
        vision_model: Pretrained image tower, a folder or a hub name.
        tokenizer: Folder of the bilingual tokenizer.
        model: Values of `M3FMConfig`, sub-configs included.
        processor: Settings of `M3FMImageProcessor`.
        freeze_vision: Whether the image tower stays as it is; its tokens are then computed once.
        feature_cache: Folder for those tokens.
        max_text_length: Tokens of a text that are read.
        label_share: How often a study with images and a report is described by its labels instead.
        translation_weight: Weight of the loss between languages.
        translation_temperature: Its temperature, which is not learned.
    """

    data_root: str = "../shared/data"
    image_sets: dict[str, int] = field(default_factory=dict)
    text_sets: dict[str, int] = field(default_factory=dict)
    parallel_sets: list[str] = field(default_factory=list)
    exclude: list[str] = field(default_factory=list)
    vision_model: str = "facebook/dinov2-small"
    tokenizer: str = ""
    model: dict[str, Any] = field(default_factory=dict)
    processor: dict[str, Any] = field(default_factory=dict)
    freeze_vision: bool = True
    feature_cache: str = "runs/features"
    max_text_length: int = 128
    label_share: float = 0.25
    translation_weight: float = 1.0
    translation_temperature: float = 0.03


class StudyDataset(Dataset):
    """Serves studies as they are; the collator decides what becomes of them."""

    def __init__(self, studies: list[Study]):
        self.studies = studies

    def __len__(self) -> int:
        return len(self.studies)

    def __getitem__(self, index: int) -> Study:
        return self.studies[index]


class AlignCollator:
    """Turns studies into images, texts and what the targets need to know of them.

    A study without a report gets a sentence made of its labels in every language, anew each time it is drawn; one with
    images, a report and labels now and then, so that its findings can be asked for by name.
    """

    def __init__(self, processor: M3FMProcessor, languages: tuple[str, ...], recipe: AlignRecipe, cache: FeatureCache):
        self.processor = processor
        self.languages = languages
        self.max_length = recipe.max_text_length
        self.label_share = recipe.label_share
        self.cache = cache if recipe.freeze_vision else None

    def __call__(self, studies: list[Study]) -> dict[str, Any]:
        """Collates `studies` into the inputs of `AlignTrainer`."""
        rng = batch_generator(f"{study.source}/{study.study_id}" for study in studies)
        speaks_by_labels = [self._speaks_by_labels(study, rng) for study in studies]
        texts = [
            self._label_sentences(study, rng) if by_labels else self._reports(study)
            for study, by_labels in zip(studies, speaks_by_labels, strict=True)
        ]
        rows = [(i, language, text) for i, by_language in enumerate(texts) for language, text in by_language.items()]
        numbers = {text: number for number, text in enumerate(dict.fromkeys(text for _, _, text in rows))}
        tokens = self.processor.tokenizer(
            [text for _, _, text in rows],
            padding=True,
            truncation=True,
            max_length=self.max_length,
            return_tensors="pt",
        )
        findings = [label_vector(study.findings) for study in studies]
        batch = {
            "input_ids": tokens["input_ids"],
            "attention_mask": tokens["attention_mask"],
            "text_study": torch.tensor([i for i, _, _ in rows]),
            "text_number": torch.tensor([numbers[text] for _, _, text in rows]),
            "text_language": torch.tensor([self.languages.index(language) for _, language, _ in rows]),
            "image_study": torch.tensor([i for i, study in enumerate(studies) if study.images]),
            "modality": torch.tensor([MODALITIES.index(study.modality) for study in studies]),
            "values": torch.tensor(np.stack([values for values, _ in findings])),
            "known": torch.tensor(np.stack([known for _, known in findings])),
            "has_report": ~torch.tensor(speaks_by_labels),
        }
        return batch | self._images([study for study in studies if study.images])

    def _reports(self, study: Study) -> dict[str, str]:
        return {language: study.reports[language] for language in self.languages if language in study.reports}

    def _speaks_by_labels(self, study: Study, rng: np.random.Generator) -> bool:
        if not study.findings:
            return False
        return not self._reports(study) or (bool(study.images) and rng.random() < self.label_share)

    def _label_sentences(self, study: Study, rng: np.random.Generator) -> dict[str, str]:
        # The same seed gives the same choice of phrases in every language: the sentences are translations.
        seed = int(rng.integers(2**31))
        return {
            language: finding_sentence(study.findings, language, np.random.default_rng(seed))
            for language in self.languages
        }

    def _images(self, studies: list[Study]) -> dict[str, torch.Tensor]:
        if not studies:
            return {}
        if self.cache is None:
            return dict(self.processor.image_processor([list(s.images) for s in studies], return_tensors="pt"))
        tokens = [self.cache.get(study) for study in studies]
        longest = max(len(each) for each in tokens)
        features = np.zeros((len(tokens), longest, *tokens[0].shape[1:]), dtype=np.float16)  # (I, N, S, C)
        mask = np.zeros((len(tokens), longest), dtype=bool)
        for row, each in enumerate(tokens):
            features[row, : len(each)], mask[row, : len(each)] = each, True
        return {"vision_features": torch.from_numpy(features).float(), "image_mask": torch.from_numpy(mask)}


class AlignTrainer(ScoredTrainer):
    """Trains with the contrastive loss of stage 1; its scores are retrieval and zero-shot diagnosis."""

    def __init__(self, *args: Any, recipe: AlignRecipe, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.recipe = recipe

    def compute_loss(
        self, model: torch.nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """Computes image-English, image-Chinese and English-Chinese alignment of one mixed batch."""
        # Not through `model(...)`, which would wrap this in autocast: texts are embedded in several calls.
        with self.accelerator.autocast():
            image_names = [name for name in ("vision_features", "pixel_values", "image_mask") if name in inputs]
            image_embeds = model.get_image_features(**{n: inputs[n] for n in image_names}) if image_names else None
            text_embeds = _embed_by_length(model, inputs["input_ids"], inputs["attention_mask"])  # (J, D)
        losses = self._losses(inputs, image_embeds, text_embeds, model.logit_scale.exp())
        # A small batch may hold texts of one language alone, which say nothing.
        loss = torch.stack(losses).sum() if losses else text_embeds.sum() * 0.0
        return (loss, {"image_embeds": image_embeds, "text_embeds": text_embeds}) if return_outputs else loss

    def _losses(
        self,
        inputs: dict[str, torch.Tensor],
        image_embeds: torch.Tensor | None,
        text_embeds: torch.Tensor,
        scale: torch.Tensor,
    ) -> list[torch.Tensor]:
        texts = _text_items(inputs)
        text_embeds = text_embeds.float()
        sides = [inputs["text_language"] == language for language in range(len(self.validation.languages))]
        losses = []
        if image_embeds is not None:
            images = _image_items(inputs)
            for side in sides:
                if side.any():
                    logits = scale * image_embeds.float() @ text_embeds[side].t()
                    losses.append(soft_contrastive_loss(logits, *soft_targets(images, texts.select(side))))
        pivot = sides[0]
        for side in sides[1:]:
            if side.any() and pivot.any():
                # The learned temperature is held high by label targets, to which many studies are alike; translations
                # are one to one and need a low one.
                logits = text_embeds[pivot] @ text_embeds[side].t() / self.recipe.translation_temperature
                targets = soft_targets(texts.select(pivot), texts.select(side))
                losses.append(self.recipe.translation_weight * soft_contrastive_loss(logits, *targets))
        return losses

    def training_step(self, model: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Takes a step with CLIP's ceiling of 100 on the inverse temperature."""
        with torch.no_grad():
            self.accelerator.unwrap_model(model).logit_scale.clamp_(max=float(np.log(100)))
        return super().training_step(model, *args, **kwargs)


def _embed_by_length(
    model: M3FMModel, input_ids: torch.Tensor, attention_mask: torch.Tensor, chunk: int = 64
) -> torch.Tensor:
    """Embeds texts (J, T) in chunks of like length: reports differ so much in length that half would be padding."""
    lengths = attention_mask.sum(dim=1)
    order = lengths.argsort()
    embeds = []
    for rows in order.split(chunk):
        longest = int(lengths[rows].max())
        embeds.append(model.get_text_features(input_ids[rows, :longest], attention_mask[rows, :longest]))
    return torch.cat(embeds)[order.argsort()]


def _text_items(inputs: dict[str, torch.Tensor]) -> Items:
    rows = inputs["text_study"]
    columns = (inputs[name][rows] for name in ("modality", "values", "known", "has_report"))
    return Items(rows, inputs["text_number"], *columns)


def _image_items(inputs: dict[str, torch.Tensor]) -> Items:
    rows = inputs["image_study"]
    columns = (inputs[name][rows] for name in ("modality", "values", "known", "has_report"))
    return Items(rows, torch.full_like(rows, -1), *columns)


class AlignValidation:
    """Scores MultiMedCLIP on validation studies: image-to-report and cross-lingual retrieval, zero-shot diagnosis."""

    # A label is scored where it has at least this many studies on either side.
    minimum = 5

    def __init__(self, studies: list[Study], pairs: list[ParallelPair], collator: AlignCollator):
        self.studies = [study for study in studies if study.images]
        self.pairs = pairs
        self.collator = collator
        self.languages = collator.languages

    @torch.inference_mode()
    def score(self, model: M3FMModel) -> dict[str, float]:
        """Returns recalls (`r10_image_en`, ...), `r1_en_zh`, and AUROCs per set and on average."""
        model.eval()
        scores = {}
        if self.studies:
            embeds = self._image_embeds(model)
            scores |= self._retrieval(model, embeds) | self._zero_shot(model, embeds)
        if self.pairs and len(self.languages) > 1:
            texts = [self._embed(model, [pair.texts[code] for pair in self.pairs]) for code in self.languages[:2]]
            recalls = retrieval_recall(texts[0], texts[1], ks=(1,))
            scores["r1_en_zh"] = recalls["forward"]["recall@1"]
        return scores

    def _image_embeds(self, model: M3FMModel) -> np.ndarray:
        chunks = []
        for start in range(0, len(self.studies), 64):
            images = self.collator._images(self.studies[start : start + 64])
            images = {name: value.to(model.device) for name, value in images.items()}
            chunks.append(model.get_image_features(**images).float().cpu().numpy())
        return np.concatenate(chunks)

    def _embed(self, model: M3FMModel, texts: list[str]) -> np.ndarray:
        chunks = []
        for start in range(0, len(texts), 64):
            tokens = self.collator.processor.tokenizer(
                texts[start : start + 64],
                padding=True,
                truncation=True,
                max_length=self.collator.max_length,
                return_tensors="pt",
            ).to(model.device)
            chunks.append(model.get_text_features(tokens["input_ids"], tokens["attention_mask"]).float().cpu().numpy())
        return np.concatenate(chunks)

    def _retrieval(self, model: M3FMModel, embeds: np.ndarray) -> dict[str, float]:
        # Where every report exists in all languages: elsewhere short notes would make the gallery easy.
        rows = [i for i, study in enumerate(self.studies) if len(study.reports) == len(self.languages)]
        scores = {}
        for language in self.languages if rows else ():
            texts = [self.studies[i].reports[language] for i in rows]
            recalls = retrieval_recall(embeds[rows], self._embed(model, texts), ks=(1, 10), positives=same_text(texts))
            scores[f"r10_image_{language}"] = recalls["forward"]["recall@10"]
        return scores

    def _zero_shot(self, model: M3FMModel, embeds: np.ndarray) -> dict[str, float]:
        from sklearn.metrics import roc_auc_score

        table = finding_table()
        scores = {}
        for source in sorted({study.source for study in self.studies}):
            rows = [i for i, study in enumerate(self.studies) if study.source == source]
            areas = []
            for name, finding in table.items():
                known = [i for i in rows if name in (self.studies[i].findings or {})]
                truth = np.array([self.studies[i].findings[name] for i in known])
                if min(truth.sum(), (1 - truth).sum(), len(truth)) < self.minimum:
                    continue
                margin = np.zeros(len(known))
                for language in self.languages:
                    present = self._embed(model, list(finding.present[language])).mean(axis=0)
                    absent = self._embed(model, list(finding.absent[language])).mean(axis=0)
                    margin += embeds[known] @ (present - absent)
                areas.append(roc_auc_score(truth, margin))
            if areas:
                scores[f"auroc_{source}"] = float(np.mean(areas))
        scores["auroc"] = float(np.mean(list(scores.values()))) if scores else float("nan")
        return scores


def load_training_studies(recipe: AlignRecipe) -> tuple[list[Study], list[Study], list[ParallelPair]]:
    """Returns the training studies (repeated as the recipe says), the validation studies and the held-apart pairs."""
    root = Path(recipe.data_root)
    train, validation, held_apart = [], [], []
    excluded = set(recipe.exclude)
    for name, repeats in {**recipe.image_sets, **recipe.text_sets}.items():
        studies = load_studies(root / name)
        excluded -= {study.study_id for study in studies}
        studies = [study for study in studies if study.study_id not in recipe.exclude]
        if name in recipe.parallel_sets:
            studies, pairs = _with_translations(studies, load_parallel(root / name))
            held_apart += pairs
        usable = [study for study in studies if study.reports or study.findings]
        validation += [study for study in usable if study.split == "validation"]
        train += training_part(usable) * repeats
    if excluded:
        raise ValueError(f"Expected every id of `exclude` to be that of a study, {len(excluded)} of them are not.")
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


@torch.no_grad()
def fit_positions(tower: PreTrainedModel, height: int, width: int) -> None:
    """Resamples a ViT's table of positions to square images of the size it will see.

    The tower would do so at every step; done once, a checkpoint of DINOv2 keeps 256 positions instead of 1,369. Towers
    that cannot resample theirs are left alone.
    """
    embeddings = getattr(tower, "embeddings", None)
    table = getattr(embeddings, "position_embeddings", None)
    if not hasattr(embeddings, "interpolate_pos_encoding") or table is None or height != width:
        return
    patches = (height // tower.config.patch_size) * (width // tower.config.patch_size)
    places = torch.zeros(1, 1 + patches, table.shape[-1])
    embeddings.position_embeddings = torch.nn.Parameter(embeddings.interpolate_pos_encoding(places, height, width))
    tower.config.image_size = height


def build_model(recipe: AlignRecipe) -> tuple[M3FMModel, M3FMProcessor]:
    """Builds MultiMedCLIP on the pretrained image tower, the text side new."""
    tokenizer = AutoTokenizer.from_pretrained(recipe.tokenizer)
    processor = M3FMProcessor(M3FMImageProcessor(**recipe.processor), tokenizer)
    vision_config = AutoConfig.from_pretrained(recipe.vision_model)
    model = M3FMModel(M3FMConfig(vision_config=vision_config, **recipe.model))
    tokenizer.model_max_length = min(tokenizer.model_max_length, model.max_text_tokens or tokenizer.model_max_length)
    model.vision_model = AutoModel.from_pretrained(recipe.vision_model, dtype=torch.float32, use_safetensors=True)
    fit_positions(
        model.vision_model, processor.image_processor.size["height"], processor.image_processor.size["width"]
    )
    model.config.vision_config.image_size = model.vision_model.config.image_size
    model.vision_model.requires_grad_(not recipe.freeze_vision)
    return model, processor


def run(recipe: AlignRecipe, arguments: TrainingArguments) -> dict[str, Any]:
    """Trains stage 1, resumes where an interrupted run stopped, and saves the model with its curves.

    Raises:
        ValueError: In a run on several devices, whose batches would not see each other's negatives.
    """
    check_single_device(arguments)
    set_seed(arguments.seed)
    arguments.remove_unused_columns = False
    model, processor = build_model(recipe)
    model.to(arguments.device)
    train, validation_studies, pairs = load_training_studies(recipe)
    cache = FeatureCache(Path(recipe.feature_cache), model.vision_model, processor.image_processor)
    if recipe.freeze_vision:
        cache.fill(train + validation_studies)
    collator = AlignCollator(processor, model.config.languages, recipe, cache)
    validation = AlignValidation(validation_studies, pairs, collator)
    trainer = AlignTrainer(
        model=model,
        args=arguments,
        train_dataset=StudyDataset(train),
        eval_dataset=StudyDataset(validation_studies),
        data_collator=collator,
        processing_class=processor,
        recipe=recipe,
        validation=validation,
    )
    train_or_resume(trainer, recipe)
    facts = {
        "stage": "align",
        "vision": "frozen, tokens cached" if recipe.freeze_vision else "trained",
        "train_studies": len({(study.source, study.study_id) for study in train}),
        "validation_studies": len(validation_studies),
    }
    return finish_run(trainer, recipe, facts)
