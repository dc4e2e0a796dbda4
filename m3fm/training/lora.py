# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Adapt the image tower to a few labelled studies by LoRA, its diagnosis head trained along.

The head starts from a fitted linear head rather than from random weights, which would first pull the tower about
(linear probing, then fine-tuning: Kumar et al., ICLR 2022).
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ..adapters import CLASSIFICATION_HEAD, lora_config
from ..base_m3fm import M3FMModel
from ..image_processing_m3fm import M3FMImageProcessor
from ..modeling_m3fm import M3FMForImageClassification
from .heads import Head

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass(frozen=True)
class LoraSettings:
    """How an adapter is trained.

    Attributes:
        preset: What is adapted, see `m3fm.adapters.PRESETS`.
        r: Rank of the updates.
        epochs: Passes over the studies.
        learning_rate: Of AdamW, at its highest: it rises over the first tenth of the steps and falls to zero by a
            cosine.
        batch_size: Studies a step.
        weight_decay: Of AdamW.
        lora_dropout: Before the updates.
        num_folds: Patient-grouped folds that the method is scored, calibrated and given its thresholds by, each
            another training; 0 trains once and leaves probabilities as they are.
    """

    preset: str = "vision"
    r: int = 8
    epochs: int = 8
    learning_rate: float = 1e-3
    batch_size: int = 8
    weight_decay: float = 0.01
    lora_dropout: float = 0.0
    num_folds: int = 3

    def __post_init__(self):
        for name in ("r", "epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"LoraSettings expected {name} >= 1, got {getattr(self, name)}.")
        if self.learning_rate <= 0:
            raise ValueError(f"LoraSettings expected learning_rate > 0, got {self.learning_rate}.")
        if self.num_folds < 0 or self.num_folds == 1:
            raise ValueError(f"LoraSettings expected num_folds to be 0 or at least 2, got {self.num_folds}.")


def classification_model(base: M3FMModel, classes: Sequence[str], exclusive: bool) -> M3FMForImageClassification:
    """Returns a diagnosis model on the weights of `base`, which it shares, with an untrained head."""
    config = copy.deepcopy(base.config)
    config.classifier_features = "image"
    config.id2label = dict(enumerate(classes))
    config.label2id = {name: number for number, name in enumerate(classes)}
    config.problem_type = "single_label_classification" if exclusive else "multi_label_classification"
    model = M3FMForImageClassification(config)
    model.model = base
    model.name_or_path = base.name_or_path
    return model.eval()


def add_lora(model: M3FMForImageClassification, settings: LoraSettings, head: Head, seed: int) -> "PeftModel":
    """Puts fresh LoRA weights into the model, and the fitted head into its classifier; `unload` takes them out.

    Args:
        model: As `classification_model` makes it.
        settings: Preset and rank.
        head: On the features "shared".
        seed: Of the LoRA weights.
    """
    from peft import get_peft_model

    # Its classifier reads unit-norm embeddings times the root of their width.
    weight = torch.from_numpy(head.weight.T / model.config.projection_dim**0.5)
    with torch.no_grad():
        model.classifier.weight.copy_(weight)
        model.classifier.bias.copy_(torch.from_numpy(head.bias))
    config = lora_config(
        settings.preset, settings.r, lora_dropout=settings.lora_dropout, modules_to_save=CLASSIFICATION_HEAD
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return get_peft_model(model, config)


def train_adapter(
    model: "PeftModel",
    processor: M3FMImageProcessor,
    images: Sequence[Sequence[Any]],
    targets: np.ndarray,
    settings: LoraSettings,
    seed: int,
) -> list[float]:
    """Trains the adapter of a model, with a progress bar; returns the mean loss of each epoch.

    Args:
        model: As `add_lora` makes it.
        processor: Turns sources into pixels.
        images: The sources of each study's images.
        targets: (N, L), 1 present, 0 absent, NaN unknown; one-hot where classes exclude each other.
        settings: Of the training.
        seed: Of the order of studies and of dropout.
    """
    exclusive = model.config.problem_type == "single_label_classification"
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    steps = -(-len(images) // settings.batch_size) * settings.epochs
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _warm_cosine(step, steps))
    labels = torch.from_numpy(targets.argmax(axis=1) if exclusive else targets.astype(np.float32))
    device = weights[0].device
    losses = []
    with torch.random.fork_rng(), tqdm(total=steps, desc="LoRA", unit="step") as bar:
        torch.manual_seed(seed)
        model.train()
        for _ in range(settings.epochs):
            total = 0.0
            for places in torch.randperm(len(images)).split(settings.batch_size):
                batch = processor([list(images[int(place)]) for place in places], return_tensors="pt").to(device)
                loss = model(**batch, labels=labels[places].to(device)).loss
                loss.backward()
                torch.nn.utils.clip_grad_norm_(weights, 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                total += loss.item() * len(places)
                bar.update()
            losses.append(total / len(images))
            bar.set_postfix(loss=f"{losses[-1]:.3f}")
    model.eval()
    return losses


def _warm_cosine(step: int, steps: int) -> float:
    warm = max(1, steps // 10)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + float(np.cos(np.pi * (step - warm) / max(1, steps - warm))))
