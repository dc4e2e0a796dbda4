# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Choose what is evaluated and what floors and probes may learn from, which are never the same studies."""

from collections.abc import Sequence
from pathlib import Path

from ..data import Study, load_studies
from ..data.studies import TRAINING_SPLIT

# Where no part is named: the one that choices are made on, so that a test part is looked at on purpose only.
_PREFERRED = ("validation", "test")


def evaluated_and_training(
    data_folder: str | Path, split: str | None = None, training_data: str | Path | None = None
) -> tuple[list[Study], list[Study], str]:
    """Reads a data folder and returns the studies with images to evaluate and to learn from.

    Args:
        data_folder: A data folder.
        split: The part to evaluate. None: "validation" where there is one, else "test", else the only part that is not
            for training; all studies of a set that states no parts.
        training_data: A data folder whose training part is learned from in place of this one's, but for the studies,
            patients and papers that are evaluated.

    Returns:
        The evaluated studies, the training studies (may be none), and the name of the evaluated part ("all" where the
        set states none).

    Raises:
        ValueError: If there is no such part, it is the training part, or the choice is not clear.
    """
    studies = [study for study in load_studies(Path(data_folder)) if study.images]
    parts = sorted({study.split for study in studies if study.split is not None})
    part = split if split is not None else _default_part(parts, str(data_folder))
    if part == TRAINING_SPLIT:
        raise ValueError(f"The part {part!r} cannot be evaluated: floors and probes learn from it.")
    evaluated = studies if part == "all" else [study for study in studies if study.split == part]
    if part == "all" and TRAINING_SPLIT in parts:
        raise ValueError(f"{data_folder} has a part {TRAINING_SPLIT!r}: expected one of the others, not all of it.")
    if not evaluated:
        raise ValueError(f"{data_folder} has no studies with images in the part {part!r}; parts in the data: {parts}.")
    source = studies if training_data is None else load_studies(Path(training_data))
    training = [study for study in source if study.images and study.split == TRAINING_SPLIT]
    if training_data is not None and not training:
        raise ValueError(f"{training_data} has no studies with images in the part {TRAINING_SPLIT!r}.")
    if training_data is not None:
        training = _apart_from(evaluated, training)
    return evaluated, training, part


def _default_part(parts: Sequence[str], data_folder: str) -> str:
    for part in _PREFERRED:
        if part in parts:
            return part
    others = [part for part in parts if part != TRAINING_SPLIT]
    if len(others) == 1:
        return others[0]
    if not parts:
        return "all"
    if not others:
        raise ValueError(f"{data_folder} has the part {TRAINING_SPLIT!r} alone: expected another one to evaluate.")
    raise ValueError(f"{data_folder} has the parts {list(parts)}: name the one to evaluate with --split.")


def _apart_from(evaluated: Sequence[Study], training: Sequence[Study]) -> list[Study]:
    """Drops training studies of another folder that are evaluated, or of a patient or paper that is."""
    taken = {study.study_id for study in evaluated}
    # Only what names a patient or a paper means the same in two folders.
    groups = {study.grouped_key for study in evaluated if study.grouped_key.startswith(("patient:", "doi:"))}
    return [study for study in training if study.study_id not in taken and study.grouped_key not in groups]
