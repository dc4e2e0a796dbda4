# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Batches of like length, balanced over groups, dealt to ranks, and the same after a restart at any step."""

from collections import Counter
from itertools import chain

import numpy as np
import pytest
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from torch.utils.data import DataLoader

from m3fm.training.samplers import (
    BalancedDraws,
    EpochBatches,
    EveryStudy,
    LengthBucketSampler,
    TrainerOrder,
    count_tokens,
    padding_share,
)

LENGTHS = np.random.default_rng(0).lognormal(4, 0.7, 103).astype(int) + 1


def buckets(**options) -> LengthBucketSampler:
    return LengthBucketSampler(LENGTHS, 4, **{"seed": 7, "pool": 5, **options})


def epoch_of(batches: EpochBatches, epoch: int = 0) -> list[list[int]]:
    batches.set_epoch(epoch)
    return list(batches)


def test_an_epoch_has_every_study_and_fills_the_last_batch_from_its_beginning():
    seen = Counter(chain(*epoch_of(buckets())))
    assert set(seen) == set(range(103))
    assert sum(seen.values()) == 104 and max(seen.values()) == 2
    assert len(buckets()) == 26


def test_dropping_the_remainder_leaves_out_other_studies_in_each_epoch():
    batches = buckets(remainder="drop")
    left_out = [set(range(103)) - set(chain(*epoch_of(batches, epoch))) for epoch in range(3)]
    assert len(batches) == 25
    assert [len(each) for each in left_out] == [3, 3, 3]
    assert left_out[0] != left_out[1]


def test_order_hangs_on_seed_and_epoch_alone():
    first = epoch_of(buckets(), 3)
    assert first == epoch_of(buckets(), 3)
    assert first != epoch_of(buckets(), 4)
    assert first != epoch_of(buckets(seed=8), 3)


@pytest.mark.parametrize("remainder", ["fill", "drop"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_get_as_many_batches_and_none_of_the_same_studies(world_size, remainder):
    ranks = [epoch_of(buckets(rank=rank, world_size=world_size, remainder=remainder)) for rank in range(world_size)]
    assert len({len(each) for each in ranks}) == 1
    assert all(len(batch) == 4 for rank in ranks for batch in rank)
    seen = Counter(chain.from_iterable(chain.from_iterable(ranks)))
    if remainder == "drop":
        assert set(seen.values()) == {1}
        assert len(seen) == 103 // (4 * world_size) * 4 * world_size
    else:
        assert set(seen) == set(range(103))
        assert sum(seen.values()) == -(-103 // (4 * world_size)) * 4 * world_size
        assert max(seen.values()) == 2


def test_world_sizes_see_the_same_studies():
    unions = [
        set(chain(*(chain(*epoch_of(buckets(rank=rank, world_size=size))) for rank in range(size))))
        for size in (1, 2, 4)
    ]
    assert unions[0] == unions[1] == unions[2] == set(range(103))


def test_batches_of_a_round_are_of_like_length():
    lengths = np.random.default_rng(1).integers(1, 300, 4000)
    by_length = lengths[LengthBucketSampler(lengths, 4, world_size=2).all_batches(0)].mean(axis=-1)  # (R, W)
    at_random = lengths[EpochBatches(EveryStudy(4000), 4, world_size=2).all_batches(0)].mean(axis=-1)
    assert np.abs(np.diff(by_length)).mean() < 0.1 * np.abs(np.diff(at_random)).mean()


def test_padding_is_a_fraction_of_that_in_random_order():
    lengths = np.random.default_rng(1).lognormal(4, 0.6, 5000).astype(int) + 1
    at_random = padding_share(lengths, EpochBatches(EveryStudy(5000), 16).all_batches(0))
    by_length = padding_share(lengths, LengthBucketSampler(lengths, 16).all_batches(0))
    assert at_random > 0.4
    assert by_length < 0.1
    assert padding_share([3, 1, 2, 2], np.array([[0, 1], [2, 3]])) == pytest.approx(1 - 8 / 10)


def test_long_batches_do_not_all_come_first_or_last():
    lengths = np.random.default_rng(1).integers(1, 300, 4000)
    means = lengths[LengthBucketSampler(lengths, 16, pool=20).all_batches(0)].mean(axis=(1, 2))
    assert abs(np.corrcoef(np.arange(len(means)), means)[0, 1]) < 0.2


@pytest.mark.parametrize("rank", [0, 1])
def test_a_run_killed_at_any_step_goes_on_with_the_next_batch(rank):
    whole = [*epoch_of(buckets(rank=rank, world_size=2), 0), *epoch_of(buckets(rank=rank, world_size=2), 1)]
    for step in range(len(whole)):
        killed = buckets(rank=rank, world_size=2)
        for _ in zip(range(step), chain(killed, killed), strict=False):
            pass
        later = buckets(rank=rank, world_size=2)
        later.load_state_dict(killed.state_dict())
        left = [*later] if later.epoch else [*later, *later]
        assert whole[step:] == left


def test_set_epoch_keeps_the_place_in_that_epoch():
    batches = buckets()
    batches.load_state_dict(batches.state_dict() | {"epoch": 2, "position": 5})
    batches.set_epoch(2)
    assert list(batches) == epoch_of(buckets(), 2)[5:]
    assert (batches.epoch, batches.position) == (3, 0)


@pytest.mark.parametrize(
    ("changed", "told"),
    [({"seed": 8}, "seed was 7 and is 8"), ({"world_size": 2}, "world_size"), ({"pool": 6}, "pool"), ({}, "lengths")],
)
def test_the_state_of_another_order_is_refused(changed, told):
    state = buckets().state_dict()
    other = buckets(**changed) if changed else LengthBucketSampler(LENGTHS + 1, 4, seed=7, pool=5)
    with pytest.raises(ValueError, match=told):
        other.load_state_dict(state)


def test_options_out_of_range_are_refused():
    with pytest.raises(ValueError, match="0 <= rank < world_size, got 4, 2 and 2"):
        buckets(rank=2, world_size=2)
    with pytest.raises(ValueError, match=r"expected one of \['fill', 'drop'\]"):
        buckets(remainder="keep")
    with pytest.raises(ValueError, match="at least 8 studies for one batch of each rank, got 3"):
        EpochBatches(EveryStudy(3), 4, world_size=2, remainder="drop")
    with pytest.raises(ValueError, match="got 0"):
        EpochBatches(EveryStudy(0), 4)


def test_fewer_studies_than_a_batch_fill_it():
    (batch,) = EpochBatches(EveryStudy(3), 7)
    assert sorted(Counter(batch).values()) == [2, 2, 3]


def test_a_temperature_gives_small_groups_more():
    groups = ["big"] * 900 + ["small"] * 100
    assert BalancedDraws(groups, 1.0).shares == {"big": 900, "small": 100}
    assert BalancedDraws(groups, 2.0).shares == {"big": 750, "small": 250}  # 30 : 10
    assert BalancedDraws(groups, float("inf"), total=600).shares == {"big": 300, "small": 300}
    drawn = BalancedDraws(groups, 2.0).draw(0, 0)
    assert len(drawn) == 1000
    assert (drawn >= 900).sum() == 250
    assert set(np.bincount(drawn, minlength=1000)[900:]) == {2, 3}
    with pytest.raises(ValueError, match="temperature >= 1"):
        BalancedDraws(groups, 0.5)


def test_groups_are_gone_through_evenly_over_epochs():
    draws = BalancedDraws(["big"] * 90 + ["small"] * 10, float("inf"))
    counts = sum(np.bincount(draws.draw(3, epoch), minlength=100) for epoch in range(9))
    assert set(counts[:90]) == {5}
    assert set(counts[90:]) == {45}


def test_balanced_draws_go_into_batches_of_like_length():
    groups = ["a"] * 90 + ["b"] * 13
    draws = BalancedDraws(groups, float("inf"))
    batches = buckets(draws=draws)
    drawn = np.bincount(batches.all_batches(0).ravel(), minlength=103)
    assert abs(drawn[:90].sum() - drawn[90:].sum()) <= 2
    state = batches.state_dict()
    with pytest.raises(ValueError, match="draws"):
        buckets(draws=BalancedDraws(groups, 2.0)).load_state_dict(state)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_workers_do_not_change_the_order(workers):
    loader = DataLoader(np.arange(103), batch_sampler=buckets(), num_workers=workers, collate_fn=list)
    assert [[int(each) for each in batch] for batch in loader] == epoch_of(buckets())


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("skipped", [0, 3])
def test_accelerate_deals_the_trainers_order_as_the_sampler_does(world_size, skipped):
    for rank in range(world_size):
        batches = buckets(world_size=world_size)
        loader = DataLoader(np.arange(103), batch_size=4, sampler=TrainerOrder(batches), collate_fn=list)
        prepared = prepare_data_loader(loader, num_processes=world_size, process_index=rank)
        prepared = skip_first_batches(prepared, skipped) if skipped else prepared
        batches.set_epoch(1)  # as FeedTrainer
        prepared.set_epoch(1)  # as Trainer
        found = [[int(each) for each in batch] for batch in prepared]
        assert found == epoch_of(buckets(rank=rank, world_size=world_size), 1)[skipped:]


def test_token_counts_are_kept(tokenizer, tmp_path, monkeypatch):
    texts = ["The lungs are clear.", "双肺清晰。", "No pleural effusion, no pneumothorax."]
    tokenizer(texts, truncation=True, max_length=4, padding=True)  # leaves its settings behind
    counts = count_tokens(texts, tokenizer, tmp_path)
    assert counts.tolist() == [len(tokenizer(text)["input_ids"]) for text in texts]
    monkeypatch.setattr(type(tokenizer), "__call__", lambda *_, **__: pytest.fail("counted again"))
    np.testing.assert_array_equal(count_tokens(texts, tokenizer, tmp_path), counts)
    assert len(list(tmp_path.iterdir())) == 1
