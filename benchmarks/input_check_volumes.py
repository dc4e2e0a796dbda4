# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""The input check on volumes and DICOM files, and on chest images that are made worse step by step."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from m3fm.chest_image_m3fm import ChestImage
from m3fm.input_check_m3fm import InputCheck, StudyCheck
from m3fm.training.input_check import every
from m3fm.training.input_check_data import Example, TowerFeatures

SWEPT_IMAGES = 40
NOISE = (0.02, 0.05, 0.1, 0.2, 0.4, 0.8)
CONTRAST = (0.5, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01)
SIDES = (128, 96, 64, 48, 32, 16)


def check_images(check: InputCheck, features: TowerFeatures, images: list[ChestImage]) -> StudyCheck:
    """Checks one study: looks at it, puts it upright, and judges what the tower makes of it."""
    images, found = check.upright(images, check.look(images))
    return check.judge(found, as_tokens(np.concatenate([features([image]) for image in images])))


def as_tokens(rows: np.ndarray) -> torch.Tensor:
    """Turns features (N, 2 C) into two tokens (N, 2, C) that give the same features."""
    return torch.from_numpy(rows).unflatten(1, (2, -1))


def measure_sweeps(
    check: InputCheck, features: TowerFeatures, groups: dict[str, list[Example]]
) -> dict[str, dict[str, dict[str, float]]]:
    """Makes chest images worse; returns the share with a remark, of any severity and refused, at each step."""
    chest = [example for name, examples in groups.items() if name.startswith("chest: ") for example in examples]
    planes = [example.read(features.image_processor).pixels[0] for example in every(chest, SWEPT_IMAGES)]
    rng = np.random.default_rng(0)
    noise = {f"deviation {step}": lambda p, s=step: p + rng.normal(0, s, p.shape) for step in NOISE}
    contrast = {f"{step:.0%} of the contrast": lambda p, s=step: 0.5 + s * (p - 0.5) for step in CONTRAST}
    small = {f"{step} px": lambda p, s=step: _shrunk(p, s) for step in SIDES}
    sweeps = {"noise": noise, "low_contrast": contrast, "too_small": small}
    return {
        code: {name: _swept(check, planes, code, change) for name, change in steps.items()}
        for code, steps in sweeps.items()
    }


def _swept(
    check: InputCheck, planes: list[np.ndarray], code: str, change: Callable[[np.ndarray], np.ndarray]
) -> dict[str, float]:
    said, refused = [], []
    for plane in planes:
        found = check.look([ChestImage(np.clip(change(plane), 0, 1).astype(np.float32)[None])])
        codes = {remark.code for remark in found.remarks}
        said.append(code in codes or "blank" in codes)
        refused.append(found.verdict == "refused")
    return {"said": float(np.mean(said)), "refused": float(np.mean(refused))}


def _shrunk(plane: np.ndarray, side: int) -> np.ndarray:
    step = max(1, min(plane.shape) // side)
    return plane[::step, ::step]


def measure_volumes(check: InputCheck, features: TowerFeatures, data: Path) -> dict[str, dict[str, Any]]:
    """Checks volumes and DICOM files as they are read; what reading refuses is said so."""
    import nibabel

    fixtures = data / "fixtures"
    sources: dict[str, Path] = {path.name: path for path in sorted(fixtures.iterdir())}
    sources |= {path.name: path for path in sorted((data / "covid_ct_md_volumes").glob("*.nii.gz"))}
    tests = Path(nibabel.__file__).parent / "tests" / "data"
    for name in ("anatomical.nii", "functional.nii", "example4d.nii.gz", "reoriented_anat_moved.nii"):
        sources[f"nibabel, brain MR: {name}"] = tests / name
    rows = {name: _check_source(check, features, path) for name, path in sources.items()}
    thorax = nibabel.load(data / "covid_ct_md_volumes" / "normal001.nii.gz")
    values = np.asarray(thorax.dataobj)
    made = {
        "made: mask of a chest CT": (values < -500).astype(np.uint8),
        "made: chest CT stored with an offset of 1024": (values + 1024).astype(np.int16),
        "made: PET-like values, 0 to 20": (np.clip(values + 1000, 0, 1400) / 70).astype(np.float32),
        "made: three slices of a chest CT": values[:, :, 30:33],
        "made: HU noise": np.random.default_rng(0).normal(-400, 400, values.shape).astype(np.int16),
        "made: constant": np.zeros(values.shape, np.int16),
    }
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, array) in enumerate(made.items()):
            path = Path(folder) / f"{number}.nii.gz"
            nibabel.save(nibabel.Nifti1Image(array, thorax.affine), path)
            rows[name] = _check_source(check, features, path)
    return rows


def _check_source(check: InputCheck, features: TowerFeatures, path: Path) -> dict[str, Any]:
    try:
        images = features.image_processor.read_study([path])
    except ValueError as error:
        return {"verdict": "not read", "codes": [], "reason": str(error).replace(f"{path.parent}/", "")}
    found = check_images(check, features, images)
    codes = list(dict.fromkeys(f"{remark.code} ({remark.severity})" for remark in found.remarks))
    return {"verdict": found.verdict, "codes": codes, "reason": found.reason} | {
        key: value for key, value in found.as_dict().items() if key in ("modality", "modality_from", "view")
    }
