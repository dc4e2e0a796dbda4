# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""The bare parts of M3FM: pooling a study, crossing the gap between images and text, noise, the contrastive loss.

Letters in shapes are those of `modeling_m3fm`.
"""

import torch
from torch import nn

from .configuration_m3fm import M3FMConfig


def add_noise(embeds: torch.Tensor, std: float, normal: torch.Tensor | None = None) -> torch.Tensor:
    """Moves unit-norm embeddings by Gaussian noise and returns them to the sphere (CapDec 2022, section 3).

    Args:
        embeds: (B, D), unit norm.
        std: Expected norm of the noise vector; 0 changes nothing. Stated per vector, so that it means the same angle
            in spaces of different width.
        normal: (B, D), drawn from the standard normal distribution; None draws it here.

    Returns:
        (B, D), unit norm.
    """
    normal = torch.randn_like(embeds) if normal is None else normal
    return nn.functional.normalize(embeds + normal * (std * embeds.shape[-1] ** -0.5), dim=-1)


def cross_modality_gap(image_embeds: torch.Tensor, memory: torch.Tensor, temperature: float) -> torch.Tensor:
    """Carries image embeddings to the text side of the shared space (DeCap 2023): p = normalize(softmax(v Mᵀ / τ) M).

    Args:
        image_embeds: v, (B, D), unit norm.
        memory: M, embeddings of training reports, (M, D) or one memory per study (B, M, D), unit norm.
        temperature: τ; small values pick the nearest report, large ones the mean of all.

    Returns:
        (B, D), unit norm.
    """
    similarity = torch.einsum("bd,...md->bm" if memory.dim() == 2 else "bd,bmd->bm", image_embeds, memory)
    weights = (similarity / temperature).softmax(dim=-1)  # (B, M)
    projected = weights @ memory if memory.dim() == 2 else torch.einsum("bm,bmd->bd", weights, memory)
    return nn.functional.normalize(projected, dim=-1)


def contrastive_loss(logits: torch.Tensor) -> torch.Tensor:
    """Computes CLIP's symmetric InfoNCE over a (B, B) matrix whose diagonal holds the pairs."""
    targets = torch.arange(logits.shape[0], device=logits.device)
    return (nn.functional.cross_entropy(logits, targets) + nn.functional.cross_entropy(logits.t(), targets)) / 2


class M3FMStudyPooling(nn.Module):
    """Pools the tokens of all images of a study by attention from learned queries.

    One path serves one view, two views and the slices of a volume. Queries are learned directly in token space, which
    makes key and value projections redundant: the cost is linear in the tokens and free of matrix products of width C.
    """

    def __init__(self, config: M3FMConfig):
        super().__init__()
        width = config.vision_config.hidden_size
        self.norm = nn.LayerNorm(width)
        self.queries = nn.Parameter(torch.empty(config.num_pooling_queries, width))

    def forward(self, tokens: torch.Tensor, image_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Pools `tokens` (B, N, S, C) of the images that `image_mask` (B, N) calls real into (B, Q, C)."""
        batch, images, per_image, width = tokens.shape
        if image_mask is not None:
            image_mask = image_mask.bool()
            # Attention alone would let a NaN of the padding through: its weight of 0 times NaN is NaN.
            tokens = tokens.masked_fill(~image_mask[:, :, None, None], 0.0)
            image_mask = image_mask.repeat_interleave(per_image, dim=1)[:, None]  # (B, 1, N * S)
        keys = self.norm(tokens).view(batch, images * per_image, width)
        queries = self.queries.expand(batch, -1, -1)  # (B, Q, C)
        return nn.functional.scaled_dot_product_attention(queries, keys, keys, attn_mask=image_mask)


__all__ = ["M3FMStudyPooling", "add_noise", "contrastive_loss", "cross_modality_gap"]
