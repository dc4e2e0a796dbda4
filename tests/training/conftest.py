# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""A made-up data folder of fourteen chest images with reports in two languages, and recipes that train on it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from transformers import AutoModel, Trainer

import m3fm
from m3fm import M3FMConfig
from m3fm.training.recipe import run_recipe

SPLITS = dict.fromkeys((4, 5, 8, 9), "validation") | dict.fromkeys((12, 13), "test")
REPORTS = {
    "en": ("The lungs are clear in view {}.", "There is a small pleural effusion in view {}."),
    "zh": ("双肺清晰，视图{}。", "视图{}可见少量胸腔积液。"),
}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def made_up_data(tmp_path: Path) -> Path:
    """Returns a folder of three sets: reports with images, images with labels alone, and parallel text."""
    root = tmp_path / "data"
    rng = np.random.default_rng(0)
    rows: dict[str, list[dict[str, Any]]] = {"reported": [], "labelled": []}
    for number in range(14):
        source = "labelled" if number in (9, 10, 11, 13) else "reported"
        (root / source).mkdir(parents=True, exist_ok=True)
        ill = number % 2
        pixels = rng.integers(0, 120, (32, 28), dtype=np.uint8) + np.uint8(100 * ill)
        Image.fromarray(pixels).save(root / source / f"{number}.png")
        row = {
            "file_name": f"{number}.png",
            "modality": "cxr",
            "split": SPLITS.get(number, "train"),
            "labels": ["pleural_effusion"] if ill else ["no_finding"],
        }
        if source == "reported":
            row |= {f"report_{language}": texts[ill].format(number) for language, texts in REPORTS.items()}
        rows[source].append(row)
    for source, listed in rows.items():
        write_rows(root / source / "metadata.jsonl", listed)

    (root / "texts").mkdir()
    splits = ("train", "train", "train", "validation", "test")
    write_rows(
        root / "texts" / "data.jsonl",
        [
            {"study_id": str(i), "modality": "cxr", "split": split, "report_en": f"Heart number {i} is normal."}
            for i, split in enumerate(splits)
        ],
    )
    pairs = [{"study_id": str(i), "en": f"Heart number {i}.", "zh": f"心影{i}号。"} for i in range(5)]
    write_rows(root / "texts" / "parallel_en_zh.jsonl", pairs)
    return root


class InterruptedRunError(Exception):
    """Ends a run in the middle, as a power cut would."""


@pytest.fixture
def run_interrupted(monkeypatch: pytest.MonkeyPatch) -> Callable[[type[Trainer], Path, int], None]:
    """Returns a function that runs a recipe up to a step, in which it breaks off."""

    def run(trainer_class: type[Trainer], recipe: Path, step: int) -> None:
        whole_step, taken = trainer_class.training_step, []

        def training_step(self: Trainer, *args: Any, **kwargs: Any) -> Any:
            taken.append(self.state.global_step + 1)
            if taken[-1] == step:
                raise InterruptedRunError
            return whole_step(self, *args, **kwargs)

        with monkeypatch.context() as patch, pytest.raises(InterruptedRunError):
            patch.setattr(trainer_class, "training_step", training_step)
            run_recipe(recipe)
        assert taken == list(range(1, step + 1))

    return run


@pytest.fixture
def write_recipe(tmp_path: Path, made_up_data: Path, tiny_config: M3FMConfig) -> Callable[..., Path]:
    """Returns a function that writes a recipe of a kind, with values of its own, and returns its path."""
    parts = {name: getattr(tiny_config, name).to_diff_dict() for name in ("text_encoder_config", "text_config")}
    sizes = {name: getattr(tiny_config, name) for name in ("projection_dim", "projection_hidden_size")}
    always = {
        "data_root": str(made_up_data),
        "feature_cache": str(tmp_path / "features"),
        "per_device_train_batch_size": 4,
        "max_steps": 3,
        "save_steps": 3,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "learning_rate": 0.01,
        "lr_scheduler_type": "constant",
        "seed": 5,
        "disable_tqdm": True,
    }
    by_kind = {
        "align": {
            "image_sets": {"reported": 1, "labelled": 1},
            "text_sets": {"texts": 2},
            "parallel_sets": ["texts"],
            "vision_model": str(tmp_path / "tower"),
            "tokenizer": str(m3fm.DEFAULT_CHECKPOINT),
            "processor": {"size": 28},
            "model": {**parts, **sizes, "support_memory_size": 6},
            "output_dir": str(tmp_path / "align"),
        },
        "write": {
            "base": str(tmp_path / "align"),
            "text_sets": {"reported": 2, "texts": 1},
            "parallel_sets": ["texts"],
            "memory": {"sets": ["reported", "texts"]},
            "validation_set": "reported",
            "max_text_length": 24,
            "output_dir": str(tmp_path / "write"),
        },
        "pairs": {
            "base": str(tmp_path / "tiny"),
            "sets": {"reported": 1},
            "text_sets": {"texts": 1},
            "parallel_sets": ["texts"],
            "validation_set": "reported",
            "max_text_length": 24,
            "output_dir": str(tmp_path / "pairs"),
        },
    }

    def write(kind: str, **values: Any) -> Path:
        if not (tmp_path / "tower").is_dir():
            AutoModel.from_config(tiny_config.vision_config).save_pretrained(tmp_path / "tower")
        path = tmp_path / f"{kind}.yaml"
        path.write_text(yaml.safe_dump({"recipe": kind, **always, **by_kind[kind], **values}), encoding="utf-8")
        return path

    return write
