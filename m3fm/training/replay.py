# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Texts of the languages that an adaptation is not about, so that a checkpoint does not unlearn them.

A checkpoint has no training text in it, but a memory of texts, which it can write (generative replay: Shin et al.,
NeurIPS 2017; LAMOL: Sun et al., ICLR 2020).
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from ..modeling_m3fm import M3FMForReportGeneration
from ..processing_m3fm import M3FMProcessor
from .site_texts import read_site_texts
from .text_bank import TextGroup
from .write import write_in_shares

__all__ = ["REPLAY", "ReplayDraws", "replay_texts", "write_from_memory"]

#: What their groups are called.
REPLAY = "replay"
# Of each language: held out, to see what becomes of it, and written to be rehearsed; more takes longer than it helps.
MEASURED, REHEARSED = 32, 256
_WRITTEN_AT_ONCE = 32


def replay_texts(
    model: M3FMForReportGeneration, processor: M3FMProcessor, languages: Sequence[str], files: Mapping[str, str]
) -> tuple[list[TextGroup], list[TextGroup]]:
    """Returns distinct texts of some languages: those to be rehearsed, and those held out.

    Args:
        model: Before it is trained.
        processor: Of the model.
        languages: Codes.
        files: Of some of them, a file of texts; those of the others the model writes itself.
    """
    rehearsed, held_out = [], []
    for language in languages:
        if language in files:
            texts = list(dict.fromkeys(read_site_texts(files[language], language).texts))
        else:
            texts = write_from_memory(model, processor, language, MEASURED + REHEARSED)
        groups = [TextGroup(REPLAY, {language: text}, (language,), str(number)) for number, text in enumerate(texts)]
        measured = min(MEASURED, len(groups) // 2)
        held_out += groups[:measured]
        rehearsed += groups[measured:]
    return rehearsed, held_out


def write_from_memory(
    model: M3FMForReportGeneration, processor: M3FMProcessor, language: str, count: int
) -> list[str]:
    """Lets a model write distinct texts from entries of its support memory, always the same; at most `count`."""
    memory = model.support_memory[model.config.languages.index(language)]
    if not memory.any():
        return []
    rows = torch.randperm(len(memory), generator=torch.Generator().manual_seed(0))[:count].tolist()

    def write(numbers: Sequence[int]) -> list[str]:
        ids = model.generate(shared_embeds=memory[list(numbers)], language=language, num_beams=1, do_sample=False)
        return processor.batch_decode(ids, skip_special_tokens=True)

    with torch.inference_mode():
        return list(dict.fromkeys(filter(None, write_in_shares(model, rows, write, _WRITTEN_AT_ONCE))))


class ReplayDraws:
    """Draws each learned text once an epoch, and rehearsed ones as their share asks for, others in each epoch.

    Args:
        learned: How many are learned; they come first.
        rehearsed: How many there are to be rehearsed, behind them.
        share: Of the rehearsed in an epoch.
    """

    def __init__(self, learned: int, rehearsed: int, share: float):
        self.learned = learned
        self.rehearsed = rehearsed
        self.count = round(learned * share / (1 - share)) if rehearsed else 0

    def __len__(self) -> int:
        return self.learned + self.count

    @property
    def fingerprint(self) -> str:
        """Tells these draws from others."""
        return f"{self.count} of {self.rehearsed} beside {self.learned}"

    def draw(self, seed: int, epoch: int) -> np.ndarray:
        """Returns numbers of texts, in the order in which they are drawn."""
        rng = np.random.default_rng([seed, epoch])
        chosen = np.resize(rng.permutation(self.rehearsed), self.count) if self.count else np.empty(0, dtype=np.int64)
        return rng.permutation(np.concatenate([np.arange(self.learned), self.learned + chosen]))
