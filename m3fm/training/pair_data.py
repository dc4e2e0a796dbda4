# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""What stage 3 learns: all pairs of a set or a small part of them, and texts beside them in every batch.

Letters: R rounds of an epoch, W ranks, B rows of a batch, D width of the shared space.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from ..data import Study, load_studies
from ..data.splits import new_to
from ..data.studies import training_part
from .collators import StudyCollator
from .samplers import BalancedDraws, EpochBatches, StepBuckets
from .text_bank import TextBank, load_texts
from .write import WriteCollator

if TYPE_CHECKING:
    from .pairs import PairsRecipe

__all__ = ["PairsCollator", "ReplayBuckets", "draw_fraction", "load_pairs", "load_replayed"]

# Rounds whose rows are sorted by length together.
_POOL = 50


def load_pairs(recipe: "PairsRecipe", languages: Sequence[str]) -> tuple[list[Study], dict[str, Any]]:
    """Returns the training studies, each once for each language with that report alone, and facts about the choice.

    Raises:
        ValueError: If a set has no pair in the languages, or `exclude` names no study.
    """
    pairs: list[Study] = []
    facts: dict[str, Any] = {"sets": {}, "left_out_for_shared_patients": 0}
    parts = {name: load_studies(Path(recipe.data_root) / name) for name in recipe.sets}
    if unknown := set(recipe.exclude) - {study.study_id for part in parts.values() for study in part}:
        raise ValueError(f"Expected every id of `exclude` to be that of a study, {len(unknown)} of them are not.")
    chosen_ids: list[str] = []
    for name, studies in parts.items():
        usable = [study for study in studies if study.images and set(languages) & set(study.reports)]
        train = [study for study in training_part(usable) if study.study_id not in recipe.exclude]
        if recipe.shared_patients == "leave_out":
            kept = _new_to_validation(studies, train)
            facts["left_out_for_shared_patients"] += len(train) - len(kept)
            train = kept
        if not train:
            raise ValueError(f"sets: {name} has no training study with an image and a report in {list(languages)}.")
        chosen = draw_fraction(train, recipe.fraction, recipe.fraction_seed)
        facts["sets"][name] = {"studies": len(chosen), "of": len(train)}
        chosen_ids += sorted(f"{study.source}/{study.study_id}" for study in chosen)
        pairs += [
            replace(study, reports={language: study.reports[language]})
            for study in chosen
            for language in languages
            if language in study.reports
        ] * recipe.sets[name]
    facts["studies_sha256"] = hashlib.sha256("\n".join(chosen_ids).encode()).hexdigest()
    return pairs, facts


def _new_to_validation(studies: Sequence[Study], train: Sequence[Study]) -> list[Study]:
    held = [study for study in studies if study.split == "validation"]
    return [study for study, is_new in zip(train, new_to(held, train), strict=True) if is_new]


def draw_fraction(studies: Sequence[Study], fraction: float, seed: int) -> list[Study]:
    """Draws a share of the studies of one set by whole groups, those of a smaller share among those of a larger one.

    Groups come in an order that hangs on the seed and their names alone, until the share is reached.

    Args:
        studies: One at least.
        fraction: In (0, 1]; one group is drawn at least.
        seed: Of the order.

    Returns:
        Studies in the order in which they were given.
    """
    if fraction == 1:
        return list(studies)
    sizes: dict[str, int] = {}
    for study in studies:
        sizes[study.grouped_key] = sizes.get(study.grouped_key, 0) + 1
    drawn: set[str] = set()
    count = 0
    for key in sorted(sizes, key=lambda key: hashlib.sha256(f"{seed}\n{key}".encode()).digest()):
        if count >= max(1, round(fraction * len(studies))):
            break
        drawn.add(key)
        count += sizes[key]
    return [study for study in studies if study.grouped_key in drawn]


def load_replayed(recipe: "PairsRecipe", languages: Sequence[str]) -> TextBank | None:
    """Returns the texts that stand beside the pairs, not yet embedded; None where there are none.

    Raises:
        ValueError: If the sets have no text in the languages.
    """
    if not recipe.text_sets or not recipe.text_share:
        return None
    groups = load_texts(recipe)
    if recipe.shared_patients == "leave_out":
        known: dict[str, set[str]] = {}
        for name in recipe.text_sets:
            studies = load_studies(Path(recipe.data_root) / name)
            known[name] = {study.study_id for study in _new_to_validation(studies, training_part(studies))}
        groups = [group for group in groups if group.study_id in known[group.source]]
    bank = TextBank(groups, languages)
    if not bank.passages:
        raise ValueError(f"text_sets: {sorted(recipe.text_sets)} have no training text in {list(languages)}.")
    return bank


class ReplayBuckets(EpochBatches):
    """Gives batches of pairs with texts beside them, all of like length; numbers of texts follow those of pairs.

    Every batch has as many pairs: ranks that wait for each other all run the image side. All pairs are gone through in
    an epoch, and of the texts as many as stand beside them; the next epoch goes on with those not yet seen.

    Args:
        pair_lengths: In tokens.
        text_lengths: Likewise.
        text_share: Share of a batch that is texts, one pair and one text at least.
        batch_size: B, of both.
        seed: Of the run.
        world_size: Ranks.

    Raises:
        ValueError: If a batch has no room for both.
    """

    def __init__(
        self,
        pair_lengths: np.ndarray,
        text_lengths: np.ndarray,
        text_share: float,
        batch_size: int,
        seed: int = 0,
        world_size: int = 1,
    ):
        if batch_size < 2:
            raise ValueError("A batch of one has no room for texts: expected a larger batch, or text_share: 0.")
        texts = min(max(1, round(batch_size * text_share)), batch_size - 1)
        self.pairs = StepBuckets(pair_lengths, batch_size - texts, _POOL, seed, world_size)
        # One group: all texts are gone through before one comes again, from epoch to epoch too.
        draws = BalancedDraws([0] * len(text_lengths), total=len(self.pairs) * world_size * texts)
        self.texts = StepBuckets(text_lengths, texts, _POOL, seed, world_size, draws)
        super().__init__(self.pairs.draws, batch_size, seed, 0, world_size)

    def __len__(self) -> int:
        return len(self.pairs)

    def all_batches(self, epoch: int) -> np.ndarray:
        """Returns the numbers in the batches of all ranks, (R, W, B), the pairs of a batch first."""
        texts = self.texts.all_batches(epoch) + len(self.pairs.lengths)
        joined = np.concatenate([self.pairs.all_batches(epoch), texts], axis=-1)
        return np.random.default_rng([self.seed, epoch, 1]).permutation(joined)

    def _order_facts(self) -> dict[str, Any]:
        orders = {name: each._order_facts() for name, each in (("pairs", self.pairs), ("texts", self.texts))}
        return super()._order_facts() | orders


class PairsCollator:
    """Turns studies and, behind them, numbers of texts into one batch of the decoder's inputs.

    Args:
        pairs: Makes the batch of the studies.
        texts: Makes that of the texts; None: there are none.
        pad_token_id: Of the decoder.
    """

    def __init__(self, pairs: StudyCollator, texts: WriteCollator | None, pad_token_id: int):
        self.pairs = pairs
        self.texts = texts
        self._padding = {"input_ids": pad_token_id, "attention_mask": 0, "labels": -100}

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch, in all workers too."""
        for each in (self.pairs, self.texts):
            if each is not None:
                each.set_epoch(epoch)

    def __call__(self, items: Sequence[Study | int]) -> dict[str, Any]:
        """Collates: what `StudyCollator` gives, `shared_embeds` of the texts (the last rows), and `study_ids`."""
        studies = [item for item in items if isinstance(item, Study)]
        batch = self.pairs(studies) | {"study_ids": [f"{study.source}/{study.study_id}" for study in studies]}
        numbers = [item for item in items if not isinstance(item, Study)]
        if not numbers:
            return batch
        texts = self.texts(numbers)
        longest = max(part["input_ids"].shape[1] for part in (batch, texts))
        for name, value in self._padding.items():
            rows = [
                nn.functional.pad(part[name], (0, longest - part[name].shape[1]), value=value)
                for part in (batch, texts)
            ]
            batch[name] = torch.cat(rows)
        study_ids = batch["study_ids"] + texts["study_ids"]
        return batch | {"shared_embeds": texts["shared_embeds"], "study_ids": study_ids}
