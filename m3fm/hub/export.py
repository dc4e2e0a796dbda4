# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Writes a checkpoint as a folder of its own: for a machine with m3fm, or for one that has transformers alone."""

import importlib.metadata
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers.dynamic_module_utils import get_relative_import_files

from ..diagnosis import default_diagnosis
from ..input_check_m3fm import CHECK_FILE

PACKAGE = Path(__file__).parents[1]

# What a checkpoint is made of. A folder of a training run holds more: optimizer states, curves, intermediate steps.
REQUIRED_FILES = (
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
OPTIONAL_FILES = ("model.safetensors.index.json", "README.md", "diagnosis_head.json", CHECK_FILE)
WEIGHTS = "model*.safetensors"
STORED_DTYPES = ("float16", "bfloat16")

# transformers reads the class of a model, an image processor and a processor in three different places.
MODEL_AUTO_MAP = {
    "AutoConfig": "configuration_m3fm.M3FMConfig",
    "AutoModel": "modeling_m3fm.M3FMModel",
    "AutoModelForImageClassification": "modeling_m3fm.M3FMForImageClassification",
    "AutoModelForImageTextToText": "modeling_m3fm.M3FMForReportGeneration",
    "AutoModelForZeroShotImageClassification": "modeling_m3fm.M3FMModel",
}
IMAGE_PROCESSOR_AUTO_MAP = {"AutoImageProcessor": "image_processing_m3fm.M3FMImageProcessor"}
PROCESSOR_AUTO_MAP = {"AutoProcessor": "processing_m3fm.M3FMProcessor"}
CUSTOM_PIPELINES = {
    "m3fm-report": {
        "impl": "pipeline_m3fm.M3FMReportPipeline",
        "pt": ["AutoModelForImageTextToText"],
        "type": "multimodal",
    },
    "m3fm-diagnosis": {
        "impl": "diagnosis_pipeline_m3fm.M3FMDiagnosisPipeline",
        "pt": ["AutoModelForImageTextToText"],
        "type": "multimodal",
    },
}


def export_checkpoint(model_dir: str | Path, output_dir: str | Path, store_as: str | None = None) -> Path:
    """Writes a checkpoint, without what else a training run left beside it, for machines where m3fm is installed.

    The folder appears whole or not at all.

    Args:
        model_dir: A checkpoint with its processor.
        output_dir: Made with its parents; must not exist, or be empty.
        store_as: "float16" or "bfloat16" halves the size of float32 weights; they are computed with in the dtype that
            the config names, as before. None copies them as they are.

    Returns:
        The folder.

    Raises:
        ValueError: If `model_dir` is not an M3FM checkpoint, `output_dir` holds something, or the dtype is another.
    """
    source = _checked_source(model_dir)
    _check_dtype(store_as)
    return _write_folder(output_dir, lambda folder: _copy_checkpoint(source, folder, store_as))


def export_remote_code(model_dir: str | Path, output_dir: str | Path, store_as: str | None = None) -> Path:
    """Writes a checkpoint with the code that runs it, for machines with transformers, torch and pillow but not m3fm.

    There `AutoModel`, `AutoProcessor`, `pipeline` and the like load it with `trust_remote_code=True`. DICOM and NIfTI
    need pydicom and nibabel there, as they do here.

    Args:
        model_dir: A checkpoint with its processor.
        output_dir: Made with its parents; must not exist, or be empty.
        store_as: As for `export_checkpoint`.

    Returns:
        The folder.

    Raises:
        ValueError: If `model_dir` is not an M3FM checkpoint, `output_dir` holds something, or the dtype is another.
    """
    source = _checked_source(model_dir)
    _check_dtype(store_as)

    def write(folder: Path) -> None:
        _copy_checkpoint(source, folder, store_as)
        for path in (*_code_files(), *_legal_files()):
            shutil.copyfile(path, folder / path.name)
        config = _read_json(folder / "config.json")
        # The labels of the package, which is not there where this folder is used.
        config["diagnosis"] = config.get("diagnosis") or default_diagnosis()
        config |= {"auto_map": MODEL_AUTO_MAP, "custom_pipelines": CUSTOM_PIPELINES}
        _write_json(folder / "config.json", config)
        processor = _read_json(folder / "processor_config.json")
        processor["auto_map"] = PROCESSOR_AUTO_MAP
        processor["image_processor"]["auto_map"] = IMAGE_PROCESSOR_AUTO_MAP
        _write_json(folder / "processor_config.json", processor)

    return _write_folder(output_dir, write)


def _checked_source(model_dir: str | Path) -> Path:
    source = Path(model_dir)
    missing = [name for name in REQUIRED_FILES if not (source / name).is_file()]
    if not missing and not list(source.glob(WEIGHTS)):
        missing = [WEIGHTS]
    if missing:
        raise ValueError(f"{source} is not a checkpoint with its processor: {', '.join(missing)} not found.")
    model_type = _read_json(source / "config.json").get("model_type")
    if model_type != "m3fm":
        raise ValueError(f"{source}: expected a checkpoint of model type 'm3fm', got {model_type!r}.")
    if not isinstance(_read_json(source / "processor_config.json").get("image_processor"), dict):
        raise ValueError(f"{source}: expected a processor saved by M3FMProcessor, got one without image processor.")
    return source


def _write_folder(output_dir: str | Path, write: Callable[[Path], None]) -> Path:
    """Lets `write` fill a folder beside the output, which takes its name when all is written."""
    output = Path(output_dir)
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file: expected a new or an empty folder.")
    if output.is_dir() and any(output.iterdir()):
        raise ValueError(f"{output} is not empty: expected a new or an empty folder.")
    staging = output.absolute().with_name(f".{output.absolute().name}.{os.getpid()}.partial")
    staging.mkdir(parents=True)
    try:
        write(staging)
        if output.is_dir():
            output.rmdir()
        staging.rename(output)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return output


def _check_dtype(store_as: str | None) -> None:
    if store_as not in (None, *STORED_DTYPES):
        raise ValueError(f"Expected weights to be stored as one of {list(STORED_DTYPES)}, got {store_as!r}.")


def _copy_checkpoint(source: Path, folder: Path, store_as: str | None) -> None:
    for name in (*REQUIRED_FILES, *(name for name in OPTIONAL_FILES if (source / name).is_file())):
        shutil.copyfile(source / name, folder / name)
    for path in source.glob(WEIGHTS):
        if store_as is None:
            shutil.copyfile(path, folder / path.name)
        else:
            _store(path, folder / path.name, getattr(torch, store_as))
    card = PACKAGE.parent / "model_cards" / f"{source.resolve().name}.md"
    if source.resolve().parent == PACKAGE / "checkpoints" and card.is_file():
        shutil.copyfile(card, folder / "README.md")


def _store(path: Path, output: Path, dtype: torch.dtype) -> None:
    weights = load_file(path)
    for name, weight in weights.items():
        if weight.is_floating_point():
            weights[name] = weight.to(dtype)
            if not weights[name].isfinite().all():
                raise ValueError(f"{path}: {name} does not fit into {dtype}.")
    save_file(weights, output, metadata={"format": "pt"})


def _code_files() -> list[Path]:
    """Returns the files that the classes above live in, and those these import."""
    classes = (MODEL_AUTO_MAP, IMAGE_PROCESSOR_AUTO_MAP, PROCESSOR_AUTO_MAP)
    references = [name for mapping in classes for name in mapping.values()]
    references += [task["impl"] for task in CUSTOM_PIPELINES.values()]
    files = {PACKAGE / f"{name.split('.')[0]}.py" for name in references}
    return sorted(files | {Path(needed) for file in files for needed in get_relative_import_files(file)})


def _legal_files() -> list[Path]:
    """Returns LICENSE and NOTICE of the code: from the clone, or from what the installed package brought along."""
    names = ("LICENSE", "NOTICE")
    if (PACKAGE.parent / "pyproject.toml").is_file():
        return [PACKAGE.parent / name for name in names if (PACKAGE.parent / name).is_file()]
    try:
        installed = importlib.metadata.files("m3fm") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    return [Path(file.locate()) for file in installed if file.name in names and ".dist-info" in file.parts[0]]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object.")
    return content


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
