# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
import numpy as np
import pytest

from m3fm.evaluation import features
from m3fm.evaluation.features import embed_resumably


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(features, "SHARD_SIZE", 4)


def squares(batch):
    return {"square": np.array([[item**2, item] for item in batch], dtype=np.float32), "item": np.array(batch)}


def test_batches_are_joined_in_order(tmp_path, small_shards):
    made = embed_resumably(squares, range(11), tmp_path / "f", "images", 3)
    np.testing.assert_array_equal(made["item"], np.arange(11))
    np.testing.assert_array_equal(made["square"][:, 0], np.arange(11) ** 2)
    assert len(list((tmp_path / "f").glob("images-*.safetensors"))) == 3


def test_a_stopped_run_goes_on_after_its_last_shard(tmp_path, small_shards):
    seen = []

    def stopping(batch):
        if 8 in batch and stop:
            raise KeyboardInterrupt
        seen.extend(batch)
        return squares(batch)

    stop = True
    with pytest.raises(KeyboardInterrupt):
        embed_resumably(stopping, range(11), tmp_path, "images", 2)
    stop = False
    made = embed_resumably(stopping, range(11), tmp_path, "images", 2)
    assert seen == list(range(11))
    np.testing.assert_array_equal(made["item"], np.arange(11))
    again = embed_resumably(lambda _: pytest.fail("computed again"), range(11), tmp_path, "images", 2)
    np.testing.assert_array_equal(again["square"], made["square"])


def test_shards_that_do_not_fit_are_refused(tmp_path, small_shards):
    embed_resumably(squares, range(4), tmp_path, "images", 2)
    with pytest.raises(ValueError, match="does not hold 3 items"):
        embed_resumably(squares, range(3), tmp_path, "images", 2)
    (tmp_path / "images-000000000.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match="is damaged"):
        embed_resumably(squares, range(4), tmp_path, "images", 2)
    with pytest.raises(ValueError, match="got 0 items"):
        embed_resumably(squares, [], tmp_path, "images", 2)
