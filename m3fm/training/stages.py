# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Several trainings in one recipe, each going on from what those before it left.

```yaml
recipe: stages
data_root: /data/chest     # a setting up here is that of every stage that has it
output_dir: runs/mine      # each stage writes into a folder of its name in it
stages:
  tokenizer: {extends: tokenizer}
  align:                   # takes the tokenizer above
    extends: align-small
    num_train_epochs: 3
  write:                   # goes on from align
    extends: write-small
```

What a stage says itself holds before what stands above the stages, and that before what it extends.
"""

import gc
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .ranks import is_main, wait_for_all
from .recipe import (
    KINDS,
    Kind,
    check_places,
    find_recipe,
    launched_ranks,
    merged,
    read_recipe,
    run_kind,
    stage_kind,
)
from .record import RECORD_FILE
from .settings import refuse_unknown

__all__ = ["Stage", "StagesRecipe", "read_stages", "run_stages"]

_RECORD = "stages.json"
_FORMAT = 1
# How often a run looks up, and where it keeps what it could compute again, may change between two starts.
_FREE = frozenset(
    ("logging_steps", "eval_steps", "save_steps", "save_total_limit", "disable_tqdm", "report_to", "use_cpu")
    + ("per_device_eval_batch_size", "dataloader_num_workers", "feature_cache", "report_cache")
)


@dataclass
class StagesRecipe:
    """What a recipe of several stages is made of; its other settings are those of every stage that has them.

    Args:
        output_dir: Folder of the folders of the stages.
        stages: Settings of each stage by name, in order; a stage that is null is left out.
    """

    output_dir: str = "runs/stages"
    stages: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    """One training of a recipe.

    Attributes:
        name: As the recipe calls it.
        kind: Of the training.
        values: All of its settings.
    """

    name: str
    kind: Kind
    values: dict[str, Any]

    @property
    def output_dir(self) -> Path:
        """The folder that it leaves its results in."""
        return Path(self.kind.parse(self.values)[1 if self.kind.trains else 0].output_dir)


# --------------------------------------------------------------------------------------------------------------------
# From YAML


def read_stages(values: Mapping[str, Any]) -> list[Stage]:
    """Gives each stage its settings, and checks all of them.

    Args:
        values: Of a recipe of kind "stages".

    Raises:
        ValueError: If a setting is unknown or of another type, or a stage names one that does not come before it.
    """
    blocks = values.get("stages")
    if not isinstance(blocks, Mapping) or not any(block is not None for block in blocks.values()):
        raise ValueError(f"stages: expected at least one, as `name: {{extends: RECIPE}}`, got {blocks!r}.")
    if not isinstance(values.get("output_dir"), str):
        raise ValueError(f"output_dir: expected the folder of the stages' folders, got {values.get('output_dir')!r}.")
    shared = {name: value for name, value in values.items() if name not in ("stages", "output_dir")}
    stages: list[Stage] = []
    for name, block in blocks.items():
        if block is None:
            continue
        where = f"stages.{name}"
        if not isinstance(block, Mapping):
            raise ValueError(f"{where}: expected settings, `name: value` each, got {block!r}.")
        try:
            stages.append(_stage(name, block, shared, values["output_dir"], stages))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    of_stages = {name for stage in stages for name in stage.kind.types()}
    if others := shared.keys() - of_stages:
        # Those of a stage that is left out may stay.
        known = {name for kind in KINDS.values() for name in kind.types()}
        refuse_unknown([name for name in shared if name in others], known)
    return stages


def _stage(name: str, block: Mapping[str, Any], shared: Mapping[str, Any], folder: str, before: list[Stage]) -> Stage:
    kind = KINDS[stage_kind(block)]
    own = {key: value for key, value in block.items() if key not in ("extends", "recipe")}
    values: dict[str, Any] = {}
    if "extends" in block:
        kind, values = read_recipe(find_recipe(str(block["extends"])))
    types = kind.types()
    above = {key: value for key, value in shared.items() if key in types}
    above |= {"output_dir": f"{folder}/{name}"} | _links(types, before)
    label = {"recipe": stage_kind(block)}
    values = merged(merged(label | values, above), own)
    del values["recipe"]
    for key, value in values.items():
        if isinstance(value, str) and value.startswith("stages."):
            values[key] = str(_named(value, before).output_dir)
    kind.parse(values)
    return Stage(name, kind, values)


def _links(types: Mapping[str, Any], before: list[Stage]) -> dict[str, Any]:
    """Returns what a stage takes of those before it where it does not say so itself: the last tokenizer and model."""
    links = {}
    for setting, makes in (("tokenizer", lambda kind: kind is KINDS["tokenizer"]), ("base", _makes_model)):
        made = [stage for stage in before if makes(stage.kind)]
        if setting in types and made:
            links[setting] = str(made[-1].output_dir)
    return links


def _makes_model(kind: Kind) -> bool:
    return kind is not KINDS["tokenizer"]


def _named(reference: str, before: list[Stage]) -> Stage:
    name = reference.removeprefix("stages.")
    for stage in before:
        if stage.name == name:
            return stage
    earlier = ", ".join(stage.name for stage in before) or "none"
    raise ValueError(f"{reference} names no stage before it: expected one of {earlier}.")


# --------------------------------------------------------------------------------------------------------------------
# To runs


def run_stages(stages: list[Stage], folder: Path) -> dict[str, Any]:
    """Runs stages in order: those that are finished are passed over, one that was interrupted goes on.

    Args:
        stages: As `read_stages` makes them.
        folder: Gets `stages.json`, which says how far the run is.

    Returns:
        `output_dir`, that of the last stage, and under `stages` the facts of each.

    Raises:
        ValueError: If the folder holds stages of other settings.
    """
    record = _read_record(folder)
    left = _left(stages, record)
    check_stages(left)
    for number, stage in enumerate(stages, start=1):
        title = f"stage {number} of {len(stages)}, {stage.name}"
        if stage not in left:
            _tell(f"{title}: finished earlier, in {stage.output_dir}\n")
            continue
        _tell(f"{title}: into {stage.output_dir}\n")
        record[stage.name] = {"settings": _settings(stage), "facts": None}
        _write_record(folder, record)
        record[stage.name]["facts"] = _as_json(run_kind(stage.kind, stage.values))
        _write_record(folder, record)
        # What a stage held is not needed by the next.
        gc.collect()
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()
    facts = {stage.name: record[stage.name]["facts"] for stage in stages}
    return {"output_dir": str(stages[-1].output_dir), "stages": facts}


def check_stages(stages: list[Stage]) -> None:
    """Refuses what any of the stages could not do, before the first one starts.

    Raises:
        ValueError: If data, backbones or their sizes do not fit, saying what to change.
    """
    from .outlook import Outlook, look_ahead, missing_backbones

    before: dict[str, Outlook] = {}
    for stage in stages:
        parsed = stage.kind.parse(stage.values)
        try:
            check_places(stage.kind, parsed)
            if missing := missing_backbones(parsed[0], before):
                raise ValueError(
                    f"not on this machine: {', '.join(missing)}. Expected folders, or names in the Hugging Face "
                    "cache; where there is a network, `hf download NAME` gets them."
                )
            found = look_ahead(stage.kind, parsed, before)
            if found.steps is not None:
                found.steps.check_enough(parsed[1], launched_ranks())
        except ValueError as error:
            raise ValueError(f"stages.{stage.name}: {error}") from None
        before[found.output_dir] = found


def _left(stages: list[Stage], record: Mapping[str, Any]) -> list[Stage]:
    """Returns the stages that are still to be run."""
    left: list[Stage] = []
    for stage in stages:
        entry = record.get(stage.name)
        if entry is None:
            left.append(stage)
            continue
        ours, theirs = _settings(stage), entry["settings"]
        changed = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
        is_finished = _is_finished(stage, entry)
        if changed and is_finished:
            raise ValueError(
                f"stages.{stage.name} was run with another {', '.join(changed)}: expected another output_dir, or "
                f"{stage.output_dir} and its entry in {_RECORD} removed."
            )
        if not is_finished:
            left.append(stage)
        elif left:
            raise ValueError(
                f"stages.{stage.name} is finished and stages.{left[0].name} before it is not: expected another "
                f"output_dir, or {stage.output_dir} and its entry in {_RECORD} removed."
            )
    return left


def _is_finished(stage: Stage, entry: Mapping[str, Any]) -> bool:
    if entry["facts"] is not None:
        return stage.output_dir.is_dir()
    # Killed between the end of the stage and its entry.
    return stage.kind.trains and (stage.output_dir / RECORD_FILE).is_file()


def _settings(stage: Stage) -> dict[str, Any]:
    return _as_json({name: value for name, value in stage.values.items() if name not in _FREE})


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _read_record(folder: Path) -> dict[str, Any]:
    path = folder / _RECORD
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] > _FORMAT:
            raise ValueError(f"{path} has format {content['format']}, expected at most {_FORMAT}: update m3fm.")
        return content["stages"]
    except (KeyError, TypeError, json.JSONDecodeError):
        raise ValueError(f"{path} is damaged: expected the record of earlier stages, or no such file.") from None


def _write_record(folder: Path, record: Mapping[str, Any]) -> None:
    wait_for_all()
    if is_main():
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f"{_RECORD}.part"
        content = {"format": _FORMAT, "stages": record}
        partial.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
        partial.replace(folder / _RECORD)
    wait_for_all()


def _tell(text: str) -> None:
    if is_main():
        sys.stderr.write(text)
