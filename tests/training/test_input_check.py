# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Fitting the input check: drawn images, parts, changes, features and heads."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModel

from m3fm import M3FMImageProcessor
from m3fm.chest_image_m3fm import ChestImage
from m3fm.input_check_m3fm import KINDS, InputCheck
from m3fm.training import input_check as fitting
from m3fm.training import input_check_data as data
from m3fm.training.drawn_images import FIT_KINDS, MEASURE_KINDS, draw


@pytest.fixture
def tower() -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    return AutoModel.from_config(AutoConfig.for_model("dinov2", **sizes)).eval()


@pytest.fixture
def image_processor() -> M3FMImageProcessor:
    return M3FMImageProcessor(size={"height": 28, "width": 28}, num_slices=2)


def save(pixels: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.uint8(pixels * 255)).save(path)


@pytest.fixture
def data_folder(tmp_path: Path) -> Path:
    """Returns the sets of chest images, each with sixteen images of as many patients."""
    rng = np.random.default_rng(0)
    for name in data.CHEST_SETS:
        rows = []
        is_ct = "ct" in name or "luna" in name
        for number in range(16):
            file = f"images/{number}.png"
            shade = np.linspace(0.1 if is_ct else 0.6, 0.9, 40)[:, None] * np.ones((40, 40))
            save(np.clip(shade + rng.normal(0, 0.02, (40, 40)), 0, 1), tmp_path / name / file)
            row = {"file_name": file, "study_id": f"{name}-{number}", "patient_id": f"p{number}", "labels": []}
            row |= {"modality": "ct" if is_ct else "cxr", "view": "axial" if is_ct else ["PA", "AP"][number % 2]}
            rows.append(row | ({} if "luna" in name else {"split": "train" if number < 12 else "validation"}))
        (tmp_path / name / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


@pytest.mark.parametrize("kind", [*FIT_KINDS, *MEASURE_KINDS])
def test_drawn_images_follow_from_kind_and_number(kind: str) -> None:
    first, again, other = draw(kind, 3), draw(kind, 3), draw(kind, 4)
    assert first.shape == (256, 256) and first.dtype == np.float32
    assert first.min() >= 0 and first.max() <= 1
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_kinds_for_fitting_are_not_measured() -> None:
    assert FIT_KINDS.keys().isdisjoint(MEASURE_KINDS)
    with pytest.raises(ValueError, match="kind: got 'cat'"):
        draw("cat", 0)


@pytest.mark.parametrize("name", data.CHANGES)
def test_changes_keep_an_image(name: str) -> None:
    pixels = np.random.default_rng(0).random((90, 70)).astype(np.float32)
    example = data.Example("clouds", "fit", "other", change=name)
    image = example.read(M3FMImageProcessor())
    assert image.pixels.dtype == np.float32 and image.pixels.min() >= 0 and image.pixels.max() <= 1
    changed = data.CHANGES[name](pixels, np.random.default_rng(1))
    assert changed.ndim == 2 and min(changed.shape) > 40
    expected = {"as_is": pixels, "inverted": 1 - pixels, "mirrored": pixels[:, ::-1]}.get(name)
    assert expected is None or np.array_equal(changed, expected)


def test_patients_are_in_one_part(data_folder: Path) -> None:
    examples = data.chest_examples(data_folder)
    assert {example.part for example in examples} <= set(data.PARTS)
    validation = [e for e in examples if "luna" not in e.source and int(e.path.stem) >= 12]
    assert validation and {example.part for example in validation} == {"measure"}
    assert {e.part for e in examples if "luna" not in e.source and int(e.path.stem) < 12} == {"fit", "tune"}
    assert {e.kind for e in examples if e.source == "cov_ctr"} == {"ct"}
    assert {e.view for e in examples if e.source == "kermany_pneumonia_224"} == {"PA", "AP"}


def test_features_are_computed_once(
    tower: torch.nn.Module, image_processor: M3FMImageProcessor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = data.drawn_examples(["clouds", "table"], "fit", 3)
    first = data.TowerFeatures(tower, image_processor, tmp_path)(examples, batch_size=4)
    assert first.shape == (6, 32)
    again = data.TowerFeatures(tower, image_processor, tmp_path)
    monkeypatch.setattr(again, "_run", lambda waiting: pytest.fail("computed again"))
    assert np.array_equal(again(examples), first)
    volume = ChestImage(np.zeros((5, 30, 30), np.float32))
    assert data.TowerFeatures(tower, image_processor, tmp_path)([volume]).shape == (2, 32)


def test_logistic_regression_separates_what_can_be_separated() -> None:
    rng = np.random.default_rng(0)
    centres = np.array([[4.0, 0, 100], [-4, 3, 100], [0, -4, 100]])
    target = np.repeat([0, 1, 2], [300, 30, 60])
    inputs = centres[target] + rng.normal(0, 1, (390, 3))
    weight, bias = fitting.logistic_regression(inputs, target, 3, 1e-3)
    assert weight.shape == (3, 3) and bias.shape == (3,)
    right = (inputs @ weight.T + bias).argmax(1) == target
    assert min(right[target == outcome].mean() for outcome in range(3)) > 0.9


def test_every_takes_evenly() -> None:
    assert fitting.every(list(range(10)), 5) == [0, 2, 4, 6, 8]
    assert fitting.every([1, 2], 5) == [1, 2]


def test_a_fitted_check_tells_chests_from_other_things(
    tower: torch.nn.Module,
    image_processor: M3FMImageProcessor,
    data_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for number in range(6):
        save(draw("square_code", number), tmp_path / "other" / "fit" / "codes" / f"{number}.png")
    monkeypatch.setattr(fitting, "DRAWN_OF_A_KIND", 4)
    features = data.TowerFeatures(tower, image_processor, tmp_path / "cache")
    check = fitting.fit_input_check(features, data_folder, tmp_path / "other")
    assert check.for_tower(tower) is check
    assert check.weights["kind.weight"].shape == (len(KINDS), 32)
    check.save_pretrained(tmp_path / "out")
    loaded = InputCheck.from_pretrained(tmp_path / "out")

    def other(image: ChestImage) -> float:
        pixels = image_processor([image], return_tensors="pt")["pixel_values"][0]
        with torch.inference_mode():
            tokens = tower(pixel_values=pixels).last_hidden_state
        return loaded.judge(loaded.look([image]), tokens).seen["other"]

    # A random tower tells little, but its tokens are those that the heads were fitted to.
    chest = [example for example in data.chest_examples(data_folder) if example.part == "tune"]
    chests = [other(example.read(image_processor)) for example in chest]
    codes = [other(ChestImage(draw("square_code", number)[None])) for number in range(4)]
    assert np.mean(codes) > np.mean(chests) + 0.2
