# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""The support memory: drawn texts, centres, medoids."""

import pytest
import torch
from torch.nn.functional import normalize

from m3fm.training.memory import MemoryBlock, _equal_shares, build_memory, set_memory, spherical_kmeans
from m3fm.training.text_bank import TextBank, TextGroup


def bank_of(sizes: dict[str, int], embeds: torch.Tensor) -> TextBank:
    """Returns a bank of English texts, so many of each set, with these embeddings."""
    groups = [TextGroup(name, {"en": f"{name} {i}"}, ("en",)) for name, count in sizes.items() for i in range(count)]
    bank = TextBank(groups, ("en",))
    bank.embeds = normalize(embeds, dim=-1).half()
    return bank


@pytest.fixture
def clustered() -> TextBank:
    """Returns texts around four directions; of the second set there are few, around a direction of its own."""
    torch.manual_seed(0)
    directions = torch.eye(4, 8)
    first = directions[:3].repeat_interleave(20, dim=0)
    second = directions[3:].repeat(6, 1)
    return bank_of({"large": 60, "small": 6}, torch.cat([first, second]) + 0.02 * torch.randn(66, 8))


def build(bank: TextBank, method: str, size: int, sets: list[str] | None = None, seed: int = 0) -> torch.Tensor:
    return build_memory(bank, ("en",), MemoryBlock(method, size, sets or ["large", "small"]), seed)


@pytest.mark.parametrize("method", ["sampled", "kmeans", "medoids"])
def test_a_memory_has_unit_norm_and_hangs_on_the_seed_alone(method, clustered):
    memory = build(clustered, method, 8)
    assert memory.shape == (1, 8, 8) and memory.dtype == torch.float32
    torch.testing.assert_close(memory.norm(dim=-1), torch.ones(1, 8), atol=1e-5, rtol=0)
    assert torch.equal(memory, build(clustered, method, 8))
    assert not torch.equal(memory, build(clustered, method, 8, seed=1))


def test_texts_are_drawn_in_equal_shares_without_repeats(clustered):
    similarity = build(clustered, "sampled", 8)[0] @ clustered.embeds.float().t()
    rows = similarity.argmax(dim=-1).tolist()
    assert len(set(rows)) == 8
    assert sum(row >= 60 for row in rows) == 4, "of ten times fewer texts as many entries"


@pytest.mark.parametrize(
    ("available", "size", "shares"),
    [
        ([9, 9], 6, [3, 3]),
        ([1, 9], 6, [1, 5]),
        ([9, 1, 9], 7, [3, 1, 3]),
        ([0, 4], 4, [0, 4]),
        ([5, 5, 5], 7, [2, 2, 3]),
    ],
)
def test_equal_shares(available, size, shares):
    assert _equal_shares(available, size) == shares


def test_centres_are_where_the_texts_are(clustered):
    centres = build(clustered, "kmeans", 4)[0]
    assert sorted(centres.argmax(dim=-1).tolist()) == [0, 1, 2, 3]
    assert (centres.max(dim=-1).values > 0.99).all()


def test_medoids_are_texts_of_their_own_each_nearest_to_its_centre(clustered):
    centres, medoids = build(clustered, "kmeans", 6)[0], build(clustered, "medoids", 6)[0]
    texts = normalize(clustered.embeds.float(), dim=-1)
    rows = (medoids @ texts.t()).argmax(dim=-1)
    torch.testing.assert_close(medoids, texts[rows], atol=1e-4, rtol=0)
    assert len(set(rows.tolist())) == 6
    nearest = (texts @ centres.t()).argmax(dim=-1)
    for number, row in enumerate(rows.tolist()):
        own = texts[nearest == number]
        assert torch.isclose((own @ centres[number]).max(), texts[row] @ centres[number], atol=1e-5)


def test_a_small_set_pulls_a_shared_centre_as_much_as_a_large_one():
    large, small = torch.tensor([[1.0, 0.0]]).repeat(90, 1), torch.tensor([[0.0, 1.0]]).repeat(10, 1)
    bank = bank_of({"large": 90, "small": 10}, torch.cat([large, small]))
    torch.testing.assert_close(build(bank, "kmeans", 1)[0], torch.full((1, 2), 0.5**0.5), atol=1e-3, rtol=0)


def test_a_centre_without_texts_is_put_where_it_serves():
    texts = torch.eye(3)
    starts = torch.tensor([[1.0, 0, 0], [1.0, 0, 0], [0, 1.0, 0]])
    centres = spherical_kmeans(texts, torch.ones(3), starts)
    assert sorted(centres.argmax(dim=-1).tolist()) == [0, 1, 2]


def test_only_so_many_texts_are_looked_at(clustered, monkeypatch):
    monkeypatch.setattr("m3fm.training.memory._MOST_TEXTS_AN_ENTRY", 2)
    seen = []
    monkeypatch.setattr(
        "m3fm.training.memory.spherical_kmeans", lambda texts, *_: seen.append(len(texts)) or texts[:4]
    )
    build(clustered, "kmeans", 4)
    assert seen == [8]


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"method": "nearest"}, "got 'nearest', expected one of"),
        ({"size": -1}, "memory.size: got -1"),
    ],
)
def test_wrong_blocks_are_refused(block, message):
    with pytest.raises(ValueError, match=message):
        MemoryBlock(**block)


def test_too_few_texts_and_unknown_sets_are_refused(clustered):
    with pytest.raises(ValueError, match="Expected 67 texts a language for the support memory, the sets have 66"):
        build(clustered, "kmeans", 67)
    with pytest.raises(ValueError, match=r"memory.sets: got \['other'\], expected some of \['large', 'small'\]"):
        build(clustered, "sampled", 4, ["other"])


def test_a_model_takes_a_memory_of_any_size(tiny_model, tmp_path):
    memory = normalize(torch.randn(2, 5, 16), dim=-1)
    set_memory(tiny_model, memory)
    tiny_model.save_pretrained(tmp_path)
    loaded = type(tiny_model).from_pretrained(tmp_path)
    assert loaded.config.support_memory_size == 5
    torch.testing.assert_close(loaded.support_memory, memory)
