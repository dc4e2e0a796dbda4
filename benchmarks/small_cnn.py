# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""A small convolutional network, trained from scratch: what a set's own images and labels give without pretraining.

Letters in shapes: N studies, B of a batch, L labels.
"""

import copy
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from m3fm import M3FMImageProcessor
from m3fm.data import Study
from m3fm.evaluation.probes import grouped_folds, probability
from m3fm.evaluation.runs import group_numbers
from m3fm.training.supervision import diagnosis_loss

WIDTHS = (16, 32, 64, 96, 128)
# Shifts of up to this share of the side, and changes of brightness and contrast, keep it from learning by heart.
_SHIFT, _JITTER = 0.08, 0.15


class SmallCNN(nn.Module):
    """Five blocks of convolution, normalisation and pooling, then the mean over places and a linear head.

    Args:
        num_labels: L.
    """

    def __init__(self, num_labels: int):
        super().__init__()
        blocks: list[nn.Module] = []
        for before, width in zip((1, *WIDTHS), WIDTHS, strict=False):
            blocks += [nn.Conv2d(before, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            blocks += [nn.MaxPool2d(2)]
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Sequential(nn.Dropout(0.3), nn.Linear(WIDTHS[-1], num_labels))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Returns logits (B, L) of images (B, 1, H, W)."""
        return self.head(self.blocks(pixels).mean(dim=(2, 3)))


def load_pixels(studies: Sequence[Study], image_processor: M3FMImageProcessor, side: int) -> torch.Tensor:
    """Returns the first image of each study, prepared as for the checkpoint but smaller: (N, 1, side, side)."""
    settings = image_processor.to_dict() | {"size": {"height": side, "width": side}}
    settings.pop("image_processor_type", None)
    processor = M3FMImageProcessor(**settings)
    chunks = []
    for start in tqdm(range(0, len(studies), 64), desc=f"images at {side} px", unit="batch"):
        paths = [study.images[0] for study in studies[start : start + 64]]
        chunks.append(processor(paths, return_tensors="pt")["pixel_values"][:, 0, :1])  # grey: one channel is all
    return torch.cat(chunks)


def train_cnn(
    pixels: torch.Tensor, labels: np.ndarray, studies: Sequence[Study], seed: int, epochs: int, patience: int
) -> tuple[SmallCNN, int]:
    """Trains on four fifths of the patients, and stops where the loss of the last fifth no longer falls.

    Args:
        pixels: (N, 1, H, W), of the training studies.
        labels: (N, L), 1 present, 0 absent, NaN unknown.
        studies: N, whose patients are kept together.
        seed: Of weights, order and the part that is carved off.
        epochs: At most.
        patience: Epochs without a lower loss before it stops.

    Returns:
        The network of the best epoch, in evaluation mode, and that epoch's number.
    """
    torch.manual_seed(seed)
    held = torch.from_numpy(grouped_folds(labels[:, 0], group_numbers(studies), seed) == 0)
    targets = torch.from_numpy(labels).float()
    model = SmallCNN(labels.shape[1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-2)
    best, best_loss, best_epoch = copy.deepcopy(model.state_dict()), float("inf"), 0
    rest = torch.nonzero(~held).flatten()
    bar = tqdm(range(1, epochs + 1), desc="small CNN", unit="epoch")
    for epoch in bar:
        model.train()
        for places in rest[torch.randperm(len(rest))].split(32):
            if len(places) < 2:  # nothing to normalise over
                continue
            loss = diagnosis_loss(model(_vary(pixels[places])), targets[places], None)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()
        with torch.inference_mode():
            held_loss = float(diagnosis_loss(model(pixels[held]), targets[held], None))
        bar.set_postfix(held_loss=held_loss)
        if held_loss < best_loss:
            best, best_loss, best_epoch = copy.deepcopy(model.state_dict()), held_loss, epoch
        elif epoch - best_epoch >= patience:
            break
    model.load_state_dict(best)
    return model.eval(), best_epoch


@torch.inference_mode()
def predict_cnn(model: SmallCNN, pixels: torch.Tensor) -> np.ndarray:
    """Returns probabilities (N, L)."""
    return probability(torch.cat([model(part) for part in pixels.split(128)]).double().numpy())


def _vary(pixels: torch.Tensor) -> torch.Tensor:
    """Shifts each image and changes its brightness and contrast."""
    batch = len(pixels)
    matrix = torch.eye(2, 3).repeat(batch, 1, 1)
    matrix[:, :, 2] = (torch.rand(batch, 2) * 2 - 1) * 2 * _SHIFT
    matrix[:, :, :2] *= 1 + (torch.rand(batch, 1, 1) * 2 - 1) * _SHIFT
    grid = nn.functional.affine_grid(matrix, list(pixels.shape), align_corners=False)
    moved = nn.functional.grid_sample(pixels, grid, align_corners=False, padding_mode="border")
    contrast, brightness = ((torch.rand(2, batch, 1, 1, 1) * 2 - 1) * _JITTER).unbind()
    return moved * (1 + contrast) + brightness
