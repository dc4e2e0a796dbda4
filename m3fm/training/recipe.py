# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Recipes: from YAML to a run."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments

RECIPES = Path(__file__).parent / "recipes"


@dataclass(frozen=True)
class Kind:
    """Names the code behind the `recipe:` of a YAML file: its module, its dataclass, and whether it has a Trainer."""

    module: str
    dataclass: str
    trains: bool


KINDS = {
    "tokenizer": Kind(".tokenizer", "TokenizerRecipe", trains=False),
    "align": Kind(".align", "AlignRecipe", trains=True),
    "write": Kind(".write", "WriteRecipe", trains=True),
    "classify": Kind(".classify", "ClassifyRecipe", trains=True),
}


def find_recipe(name: str) -> Path:
    """Finds a recipe by path, or by name among those that ship with the package.

    Raises:
        ValueError: If there is none, with the names that ship.
    """
    for path in (Path(name), RECIPES / name, RECIPES / f"{name}.yaml"):
        if path.is_file():
            return path
    shipped = ", ".join(sorted(path.stem for path in RECIPES.glob("*.yaml")))
    raise ValueError(f"No recipe {name!r}: expected a YAML file, or one of {shipped}.")


def run_recipe(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Runs a recipe.

    Args:
        path: YAML file whose `recipe:` is one of `KINDS`; the rest are fields of that recipe's dataclass, and of
            `transformers.TrainingArguments` where it trains.
        overrides: `--name value` pairs that replace fields; values are read as YAML.

    Returns:
        The facts of the run, as written to `run.json`.

    Raises:
        ValueError: If the file is not such a recipe, or a field is unknown.
    """
    try:
        values = _read_yaml(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from None
    if not isinstance(values, dict) or values.get("recipe") not in KINDS:
        kind = values.get("recipe") if isinstance(values, dict) else values
        raise ValueError(f"{path}: expected `recipe:` to be one of {sorted(KINDS)}, got {kind!r}.")
    kind = KINDS[values.pop("recipe")]
    values.update(_parse_overrides(overrides))
    module = import_module(kind.module, __package__)
    recipe_class = getattr(module, kind.dataclass)
    classes = (recipe_class, TrainingArguments) if kind.trains else (recipe_class,)
    if kind.trains:
        # Without this a recipe in bf16 is refused on a machine that has no accelerator.
        values.setdefault("use_cpu", not torch.accelerator.is_available())
    try:
        parsed = HfArgumentParser(classes).parse_dict(values, allow_extra_keys=False)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return module.run(*parsed)


class _Loader(yaml.SafeLoader):
    """Reads 1e-4 as a number: YAML 1.1 asks for 1.0e-4, and takes this for a word."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _read_yaml(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)


def _parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    names, texts = overrides[::2], overrides[1::2]
    if len(names) != len(texts) or not all(name.startswith("--") for name in names):
        raise ValueError(f"Expected `--name value` pairs after the recipe, got {' '.join(overrides)!r}.")
    # "no" is a strategy of TrainingArguments, and only YAML 1.1 takes it for a truth value.
    words = ("no", "off", "on", "yes")
    values = (text if text in words else _read_yaml(text) for text in texts)
    return {name[2:]: value for name, value in zip(names, values, strict=True)}
