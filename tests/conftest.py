# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Shared fixtures: a tiny random model with its processor, the shipped checkpoint, and the data folder."""

import copy
import gc
import os
import shutil
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

import m3fm
from m3fm import M3FMConfig, M3FMForReportGeneration, M3FMImageProcessor, M3FMProcessor

ROOT = Path(__file__).parents[1]


def pytest_configure() -> None:
    """Keeps every test off the network, and has checkpoints loaded without threads, which slow tiny ones down."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
    if "PYTEST_XDIST_WORKER" in os.environ:  # processes share the cores already
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """Spares the garbage collector what was imported, which never goes away, and calls it less often.

    Otherwise a tenth of the time of the tests is its walks over the objects of torch and transformers.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(5000, 10, 10)


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Returns the folder of real data sets, or skips the test where it is absent."""
    folder = Path(os.environ.get("M3FM_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("real data not found: set M3FM_DATA to its folder")
    return folder


def make_tiny_config() -> M3FMConfig:
    """Returns a configuration that builds in milliseconds; its vocabulary is the shipped tokenizer's."""
    tower = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**tower, "vocab_size": 8000, "intermediate_size": 64, "max_position_embeddings": 256, "pad_token_id": 0}
    return M3FMConfig(
        vision_config={"model_type": "dinov2", **tower, "image_size": 28, "patch_size": 14},
        text_encoder_config={"model_type": "bert", **text},
        text_config={
            "model_type": "llama",
            **text,
            "num_key_value_heads": 2,
            "bos_token_id": 2,
            "eos_token_id": 3,
            "tie_word_embeddings": True,
        },
        projection_dim=16,
        projection_hidden_size=32,
        support_memory_size=12,
    )


@pytest.fixture
def tiny_config() -> M3FMConfig:
    """Returns a tiny configuration: one for each test, because models write into theirs."""
    return make_tiny_config()


@pytest.fixture(scope="session")
def built_tiny() -> tuple[M3FMForReportGeneration, torch.Tensor]:
    """Returns the model that `tiny_model` copies, and the state of the random numbers after it was built."""
    torch.manual_seed(0)
    config = make_tiny_config()
    model = M3FMForReportGeneration(config).eval()
    memory = torch.randn(2, config.support_memory_size, config.projection_dim)
    model.set_support_memory(torch.nn.functional.normalize(memory, dim=-1))
    return model, torch.get_rng_state()


@pytest.fixture
def tiny_model(built_tiny: tuple[M3FMForReportGeneration, torch.Tensor]) -> M3FMForReportGeneration:
    """Returns a random model with a random support memory; the same one in every test, for it to change."""
    model, random_state = built_tiny
    torch.set_rng_state(random_state)
    return copy.deepcopy(model)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Returns the tokenizer that ships."""
    return PreTrainedTokenizerFast.from_pretrained(m3fm.DEFAULT_CHECKPOINT)


@pytest.fixture(scope="session")
def tiny_processor(tokenizer: PreTrainedTokenizerFast) -> M3FMProcessor:
    """Returns a processor for the tiny model: 28 x 28 pixels, two slices of a volume."""
    return M3FMProcessor(M3FMImageProcessor(size={"height": 28, "width": 28}, num_slices=2), tokenizer)


@pytest.fixture(scope="session")
def saved_tiny(
    built_tiny: tuple[M3FMForReportGeneration, torch.Tensor],
    tiny_processor: M3FMProcessor,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Returns the folder that `tiny_checkpoint` copies."""
    folder = tmp_path_factory.mktemp("tiny")
    copy.deepcopy(built_tiny[0]).save_pretrained(folder)
    tiny_processor.save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_checkpoint(
    saved_tiny: Path, built_tiny: tuple[M3FMForReportGeneration, torch.Tensor], tmp_path: Path
) -> Path:
    """Returns a folder that holds the tiny model and its processor, for the test to change."""
    torch.set_rng_state(built_tiny[1])
    return Path(shutil.copytree(saved_tiny, tmp_path / "tiny"))
