# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""The bare parts: pooling a study, crossing the gap by the support memory, noise, the contrastive loss."""

import math

import pytest
import torch
from torch.nn.functional import normalize

from m3fm.layers_m3fm import M3FMStudyPooling, add_noise, contrastive_loss, cross_modality_gap


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.fixture
def pooling(tiny_config) -> M3FMStudyPooling:
    torch.manual_seed(0)
    pooling = M3FMStudyPooling(tiny_config)
    torch.nn.init.normal_(pooling.queries)
    torch.nn.init.normal_(pooling.norm.weight)
    return pooling.eval()


# --- crossing the gap ------------------------------------------------------------------------------------------------


def test_one_memory_row_is_where_every_image_lands():
    row = unit(1, 16, seed=1)
    crossed = cross_modality_gap(unit(5, 16), row, temperature=0.02)
    torch.testing.assert_close(crossed, row.expand(5, -1), atol=1e-6, rtol=0)


def test_low_temperature_picks_the_nearest_row_and_high_the_mean():
    images, memory = unit(5, 16), unit(12, 16, seed=1)
    nearest = memory[(images @ memory.t()).argmax(dim=1)]
    torch.testing.assert_close(cross_modality_gap(images, memory, 1e-6), nearest, atol=1e-6, rtol=0)
    mean = normalize(memory.mean(dim=0), dim=0).expand(5, -1)
    torch.testing.assert_close(cross_modality_gap(images, memory, 1e6), mean, atol=1e-4, rtol=0)


def test_crossing_is_the_equation_of_decap():
    images, memory, temperature = unit(2, 3), unit(4, 3, seed=1), 0.1
    for image, crossed in zip(images, cross_modality_gap(images, memory, temperature), strict=True):
        weights = [math.exp(float(image @ row) / temperature) for row in memory]
        by_hand = sum(weight / sum(weights) * row for weight, row in zip(weights, memory, strict=True))
        torch.testing.assert_close(crossed, by_hand / by_hand.norm(), atol=1e-6, rtol=0)


def test_one_memory_for_all_equals_one_memory_a_study():
    images, memories = unit(3, 16), unit(3, 12, 16, seed=1)
    together = cross_modality_gap(images, memories, 0.05)
    alone = [cross_modality_gap(images[i : i + 1], memories[i], 0.05) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-6, rtol=0)


# --- pooling ---------------------------------------------------------------------------------------------------------


def test_pooling_gives_one_row_a_query_and_ignores_the_order_of_images(pooling, tiny_config):
    tokens = torch.randn(2, 3, 5, 32)
    pooled = pooling(tokens)
    assert pooled.shape == (2, tiny_config.num_pooling_queries, 32)
    torch.testing.assert_close(pooling(tokens[:, [2, 0, 1]]), pooled, atol=1e-5, rtol=0)


@pytest.mark.parametrize("filling", [0.0, 1e4, -1e4, math.inf, math.nan])
def test_pooling_ignores_masked_images_whatever_they_hold(pooling, filling):
    tokens = torch.randn(2, 3, 5, 32)
    mask = torch.tensor([[True, False, True], [True, True, True]])
    alone = pooling(tokens[:1, [0, 2]])
    tokens[0, 1] = filling
    torch.testing.assert_close(pooling(tokens, mask)[:1], alone, atol=1e-5, rtol=0)


def test_a_mask_of_numbers_is_a_mask(pooling):
    tokens = torch.randn(1, 2, 5, 32)
    mask = torch.tensor([[1, 0]])
    assert torch.equal(pooling(tokens, mask), pooling(tokens, mask.bool()))


def test_one_image_twice_is_one_image(pooling):
    tokens = torch.randn(1, 1, 5, 32)
    torch.testing.assert_close(pooling(tokens.expand(1, 4, 5, 32)), pooling(tokens), atol=1e-5, rtol=0)


# --- noise -----------------------------------------------------------------------------------------------------------


def test_no_noise_changes_nothing():
    embeds = unit(4, 16)
    torch.testing.assert_close(add_noise(embeds, 0.0), embeds, atol=1e-6, rtol=0)


@pytest.mark.parametrize("width", [16, 1024])
def test_noise_has_the_same_angle_in_every_width(width):
    torch.manual_seed(0)
    embeds = unit(4000, width, seed=9)
    moved = add_noise(embeds, 0.3)
    torch.testing.assert_close(moved.norm(dim=-1), torch.ones(4000), atol=1e-5, rtol=0)
    cosine = (moved * embeds).sum(dim=-1).mean()
    # Noise of norm s at right angles to a unit vector leaves a cosine of 1 / sqrt(1 + s^2).
    assert float(cosine) == pytest.approx(1 / math.sqrt(1 + 0.3**2), abs=0.01)


# --- loss ------------------------------------------------------------------------------------------------------------


def test_contrastive_loss_is_the_mean_of_both_directions():
    logits = torch.tensor([[2.0, 0.0], [1.0, 3.0]])
    rows = [math.log(1 + math.exp(-2)), math.log(1 + math.exp(-2))]
    columns = [math.log(1 + math.exp(-1)), math.log(1 + math.exp(-3))]
    assert float(contrastive_loss(logits)) == pytest.approx((sum(rows) / 2 + sum(columns) / 2) / 2, abs=1e-6)
