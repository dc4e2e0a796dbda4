# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Recipes: from YAML to a run, or to a plan of it."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, get_args

import torch
from transformers import TrainingArguments

from .ranks import is_main, wait_for_all
from .runs import RunOptions
from .settings import (
    checked_block,
    checked_values,
    did_you_mean,
    parse_overrides,
    read_value,
    read_yaml,
    refuse_unknown,
    set_value,
    types_of,
)

if TYPE_CHECKING:
    from .plan import Plan

__all__ = ["KINDS", "RECIPES", "Kind", "checked_block", "find_recipe", "plan_recipe", "read_recipe", "run_recipe"]

RECIPES = Path(__file__).parent / "recipes"


@dataclass(frozen=True)
class Kind:
    """Names the code behind the `recipe:` of a YAML file.

    Attributes:
        module: Has the dataclass, and `run(recipe)`, or `run(recipe, arguments, options)` where it trains.
        dataclass: Declares the settings.
        trains: Whether `TrainingArguments` and `RunOptions` belong to the settings, and every rank takes part.
    """

    module: str
    dataclass: str
    trains: bool

    def load(self) -> ModuleType:
        """Imports the module."""
        return import_module(self.module, __package__)

    def classes(self) -> tuple[type, ...]:
        """Returns the dataclasses that declare the settings."""
        own = getattr(self.load(), self.dataclass)
        return (own, TrainingArguments, RunOptions) if self.trains else (own,)

    def types(self) -> dict[str, Any]:
        """Returns the type of each setting."""
        return {name: kind for cls in reversed(self.classes()) for name, kind in types_of(cls).items()}

    def parse(self, values: Mapping[str, Any]) -> tuple[Any, ...]:
        """Makes the dataclasses of settings.

        Raises:
            ValueError: If a setting is unknown or of another type, or a dataclass refuses its value.
        """
        values = dict(values)
        for name, instead in getattr(self.classes()[0], "MOVED", {}).items():
            if name in values:
                raise ValueError(f"{name}: {instead}")
        refuse_unknown(values, self.types())
        if self.trains:
            # Without this a recipe in bf16 is refused on a machine that has no accelerator.
            values.setdefault("use_cpu", not torch.accelerator.is_available())
        parsed = []
        for cls in self.classes():
            types = types_of(cls)
            own = {name: value for name, value in values.items() if name in types}
            parsed.append(cls(**checked_values(own, types)))
        return tuple(parsed)


KINDS = {
    "tokenizer": Kind(".tokenizer", "TokenizerRecipe", trains=False),
    "align": Kind(".align", "AlignRecipe", trains=True),
    "write": Kind(".write", "WriteRecipe", trains=True),
    "pairs": Kind(".pairs", "PairsRecipe", trains=True),
    "adapt-text": Kind(".adapt_text", "AdaptTextRecipe", trains=True),
    "sweep": Kind(".sweep", "SweepRecipe", trains=True),
    "classify": Kind(".classify", "ClassifyRecipe", trains=True),
    "stages": Kind(".stages", "StagesRecipe", trains=False),
}


# --------------------------------------------------------------------------------------------------------------------
# From YAML


def find_recipe(name: str, beside: Path | None = None) -> Path:
    """Finds a recipe by path, or by name among those that ship with the package.

    Args:
        name: Path, or name with or without ".yaml".
        beside: A folder that paths may start from too.

    Raises:
        ValueError: If there is none, with the names that ship.
    """
    folders = [Path(), RECIPES] if beside is None else [beside, Path(), RECIPES]
    for folder in folders:
        for path in (folder / name, folder / f"{name}.yaml"):
            if path.is_file():
                return path
    shipped = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    hint = did_you_mean(name, shipped)
    raise ValueError(f"No recipe {name!r}{hint}: expected a YAML file, or one of {', '.join(shipped)}.")


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> tuple[Kind, dict[str, Any]]:
    """Reads a recipe, with what it extends and what replaces its settings; types are not checked yet.

    Args:
        path: YAML file. `recipe:` is one of `KINDS`, or `extends:` names another recipe whose settings hold where
            this one has none. Blocks of settings are merged; lists, and tables like `image_sets`, are replaced.
        overrides: `--name value` pairs that replace settings, `--model.projection_dim 128` one inside a block. Of a
            recipe of several stages, `--name value` replaces it in every stage that has it, and
            `--stages.align.name value` in one.

    Returns:
        The kind and the settings.

    Raises:
        ValueError: If the file is not such a recipe.
    """
    path = Path(path)
    with _naming(path):
        values = _resolved(path, ())
        for names, text in parse_overrides(overrides):
            set_value(values, names, read_value(text, _type_at(values, names)))
            if values["recipe"] == "stages" and names[0] not in ("stages", "output_dir"):
                for block in (values.get("stages") or {}).values():
                    _drop(block, names)
        return KINDS[values.pop("recipe")], values


def _resolved(path: Path, chain: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in chain:
        circle = " -> ".join(each.stem for each in (*chain, path))
        raise ValueError(f"extends itself: {circle}.")
    values = read_yaml(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise ValueError(f"expected `recipe:` to be one of {sorted(KINDS)}, got {values!r}.")
    for block in values.get("stages", {}).values() if isinstance(values.get("stages"), dict) else ():
        if isinstance(block, dict) and "extends" in block:
            block["extends"] = str(find_recipe(str(block["extends"]), path.parent))
    if "extends" in values:
        base = find_recipe(str(values.pop("extends")), path.parent)
        values = merged(_resolved(base, (*chain, path.resolve())), values)
    if values.get("recipe") not in KINDS:
        hint = did_you_mean(values.get("recipe"), KINDS)
        raise ValueError(f"expected `recipe:` to be one of {sorted(KINDS)}, got {values.get('recipe')!r}{hint}.")
    return values


def _drop(values: Any, names: Sequence[str]) -> None:
    """Removes what stands where a path leads, if it leads anywhere."""
    for name in names[:-1]:
        values = values.get(name) if isinstance(values, dict) else None
    if isinstance(values, dict):
        values.pop(names[-1], None)


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings of `base` with those of `changes` in their place; both are of the kind of `base`.

    Raises:
        ValueError: If `changes` are of another kind.
    """
    kind = base["recipe"]
    if changes.get("recipe", kind) != kind:
        raise ValueError(f"a recipe of kind {changes['recipe']!r} extends one of kind {kind!r}: expected one kind.")
    if kind == "stages" and isinstance(changes.get("stages"), dict):
        stages = {**base["stages"], **changes["stages"]}
        for name in base["stages"].keys() & changes["stages"].keys():
            stages[name] = _merged_stage(base["stages"][name], changes["stages"][name])
        return {**base, **changes, "stages": stages}
    return _merged_blocks(base, changes, KINDS[kind].types())


def _merged_stage(base: Any, changes: Any) -> Any:
    if not (isinstance(base, dict) and isinstance(changes, dict)) or {"recipe", "extends"} & changes.keys():
        return changes
    return _merged_blocks(base, changes, KINDS[stage_kind(base)].types())


def _merged_blocks(base: Mapping[str, Any], changes: Mapping[str, Any], types: Mapping[str, Any]) -> dict[str, Any]:
    values = dict(base)
    for name, value in changes.items():
        if isinstance(value, dict) and isinstance(values.get(name), dict) and _is_block(types.get(name)):
            values[name] = _deeply_merged(values[name], value)
        else:
            values[name] = value
    return values


def _deeply_merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    values = dict(base)
    for name, value in changes.items():
        both = isinstance(value, dict) and isinstance(values.get(name), dict)
        values[name] = _deeply_merged(values[name], value) if both else value
    return values


def _is_block(kind: Any) -> bool:
    """Tells settings of something from a table of numbers by name."""
    return is_dataclass(kind) or (get_args(kind)[1:] == (Any,))


def stage_kind(block: Mapping[str, Any]) -> str:
    """Returns the kind of a stage's block: its own, or that of what it extends.

    Raises:
        ValueError: If it has none.
    """
    kind = block.get("recipe")
    if kind is None and "extends" in block:
        kind = _resolved(find_recipe(str(block["extends"])), ()).get("recipe")
    if kind not in KINDS or kind == "stages":
        kinds = sorted(KINDS.keys() - {"stages"})
        raise ValueError(f"expected `extends:` a recipe, or `recipe:` to be one of {kinds}, got {kind!r}.")
    return kind


def _type_at(values: Mapping[str, Any], names: Sequence[str]) -> Any:
    """Returns the type of the setting that a path leads to, `Any` where it is not known."""
    if values["recipe"] != "stages":
        return KINDS[values["recipe"]].types().get(names[0], Any) if len(names) == 1 else Any
    stages = values.get("stages") or {}
    if names[0] != "stages":
        kinds = [stage_kind(block) for block in stages.values() if block is not None] if len(names) == 1 else []
        return next((types[names[0]] for kind in kinds if names[0] in (types := KINDS[kind].types())), Any)
    if len(names) > 1 and names[1] not in stages:
        raise ValueError(f"no stage {names[1]!r}{did_you_mean(names[1], stages)}: it has {', '.join(stages)}.")
    return KINDS[stage_kind(stages[names[1]])].types().get(names[2], Any) if len(names) == 3 else Any


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Names the file in errors about it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


# --------------------------------------------------------------------------------------------------------------------
# To a run


def run_recipe(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Runs a recipe; under a launcher, as one of its ranks.

    Args:
        path: YAML file, see `read_recipe`.
        overrides: `--name value` pairs that replace settings.

    Returns:
        The facts of the run.

    Raises:
        ValueError: If the file is not such a recipe, or a setting, the data or a model does not fit.
    """
    kind, values = read_recipe(path, overrides)
    with _naming(path):
        if kind is KINDS["stages"]:
            stages = kind.load().read_stages(values)
        else:
            check_places(kind, kind.parse(values))
    if kind is KINDS["stages"]:
        return kind.load().run_stages(stages, Path(values["output_dir"]))
    return run_kind(kind, values)


def run_kind(kind: Kind, values: Mapping[str, Any]) -> dict[str, Any]:
    """Runs one training. What does not train is done by the main rank alone, while the others wait."""
    _join_ranks()
    parsed = kind.parse(values)
    if kind.trains:
        return kind.load().run(*parsed)
    facts = kind.load().run(*parsed) if is_main() else {"output_dir": parsed[0].output_dir}
    wait_for_all()
    return facts


def plan_recipe(path: Path, overrides: Sequence[str] = (), ranks: int = 1, rate: float | None = None) -> "list[Plan]":
    """Says what a recipe would take, without starting it: one plan for each stage.

    Args:
        path: YAML file.
        overrides: `--name value` pairs that replace settings.
        ranks: Processes that would train together.
        rate: See `m3fm.training.plan.plan_stages`.

    Raises:
        ValueError: As `run_recipe`.
    """
    from .plan import plan_stages

    kind, values = read_recipe(path, overrides)
    with _naming(path):
        module = KINDS["stages"].load()
        if kind is KINDS["stages"]:
            stages = module.read_stages(values)
        else:
            stages = [module.Stage(next(name for name, each in KINDS.items() if each is kind), kind, values)]
        for stage in stages:
            check_places(stage.kind, stage.kind.parse(stage.values))
        return plan_stages(stages, ranks, rate)


def check_places(kind: Kind, parsed: Sequence[Any]) -> None:
    """Refuses data sets that are not there, and an output folder that cannot be written to.

    Raises:
        ValueError: Naming the setting.
    """
    _check_writable(parsed[1].output_dir if kind.trains else parsed[0].output_dir)
    _check_sets(parsed[0])


def _check_writable(folder: str) -> None:
    """Refuses an output folder that cannot be written to.

    Raises:
        ValueError: If it, or the folder that it is to be made in, is a file or may not be written.
    """
    place = Path(folder).absolute()
    while not place.exists():
        place = place.parent
    probe = place / ".m3fm-write-probe"
    try:
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(
            f"output_dir: {folder} cannot be written ({error.strerror}): choose another folder."
        ) from None


def _check_sets(recipe: Any) -> None:
    """Refuses sets that are not in the data folder.

    Raises:
        ValueError: With those that are, where a name comes near.
    """
    if not hasattr(recipe, "data_root"):
        return
    root = Path(recipe.data_root)
    for name, kind in types_of(type(recipe)).items():
        value = getattr(recipe, name)
        is_sets = name in ("sets", "image_sets", "text_sets", "parallel_sets")
        for each in value if is_sets and kind is not str else [value] if name == "validation_set" and value else []:
            if not root.is_dir():
                raise ValueError(f"data_root: no folder {root}: expected the one that holds the data sets.")
            if not (root / each).exists():
                there = sorted(path.name for path in root.iterdir() if path.is_dir())
                raise ValueError(f"{name}: no set {each!r} in {root}{did_you_mean(each, there)}.")


def launched_ranks() -> int:
    """Returns how many processes a launcher started, whether or not they know of each other yet."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _join_ranks() -> None:
    """Joins the processes that a launcher started: without a Trainer nobody has done it yet."""
    if launched_ranks() == 1 or torch.distributed.is_initialized():
        return
    try:
        from accelerate import PartialState
    except ImportError as error:
        raise ImportError('Several processes need accelerate: pip install "m3fm[train]".') from error
    PartialState(cpu=not torch.accelerator.is_available())
