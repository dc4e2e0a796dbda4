# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""How far a run has come, over all its interruptions: studies and tokens it has seen, and the time it took."""

import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers.trainer_pt_utils import find_batch_size

from . import ranks

__all__ = ["Progress", "peak_memory"]


class Progress:
    """Counts what one rank has seen, and says how fast all of them are.

    Attributes:
        step_seconds: Time spent on steps, waiting for data included.
        run_seconds: Time since the run was started, evaluation and saving included, but not the time between
            interruptions.
    """

    def __init__(self) -> None:
        self.step_seconds = 0.0
        self.run_seconds = 0.0
        self._samples = 0
        self._tokens = 0
        self._uncounted: list[torch.Tensor] = []
        self._step_start = self._run_start = time.perf_counter()
        self._logged = (0, 0, 0.0)

    def begin_run(self) -> None:
        """Starts the clock of the run."""
        self._run_start = time.perf_counter()

    def begin_step(self) -> None:
        """Starts the clock of a step, before its batches are asked for."""
        self._step_start = time.perf_counter()

    def count(self, batches: Sequence[Mapping[str, Any]], study_ids: Sequence[Sequence[str]]) -> None:
        """Counts the studies of a step's micro-batches, and the tokens of their texts but for padding."""
        for batch, ids in zip(batches, study_ids, strict=True):
            self._samples += len(ids) or find_batch_size(batch) or 0
            self._uncounted += _tokens(batch)

    def end_step(self) -> None:
        """Stops the clock of a step."""
        self.step_seconds += time.perf_counter() - self._step_start

    def rates(self, device: torch.device) -> dict[str, float]:
        """Returns samples and tokens per second of all ranks, since it was last asked; every rank has to ask."""
        samples, tokens = self.totals(device)
        before_samples, before_tokens, before_seconds = self._logged
        seconds = self.step_seconds - before_seconds
        self._logged = (samples, tokens, self.step_seconds)
        if seconds <= 0:
            return {}
        rates = {"samples_per_second": (samples - before_samples) / seconds}
        if tokens > before_tokens:
            rates["tokens_per_second"] = (tokens - before_tokens) / seconds
        return rates

    def totals(self, device: torch.device) -> tuple[int, int]:
        """Returns the samples and tokens that all ranks have seen; every rank has to ask."""
        self._flush()
        samples, tokens = ranks.all_sum(torch.tensor([self._samples, self._tokens], device=device)).tolist()
        return samples, tokens

    def summary(self, device: torch.device) -> dict[str, float]:
        """Returns the facts of the whole run so far; every rank has to ask."""
        samples, tokens = self.totals(device)
        seconds = max(self.step_seconds, 1e-9)
        return {
            "samples_seen": samples,
            "tokens_seen": tokens,
            "run_seconds": self._seconds(),
            "step_seconds": self.step_seconds,
            "samples_per_second": samples / seconds,
            "tokens_per_second": tokens / seconds,
            "peak_memory_bytes": peak_memory(device),
        }

    def state_dict(self) -> dict[str, Any]:
        """Returns what a run that goes on has to know."""
        self._flush()
        return {
            "samples": self._samples,
            "tokens": self._tokens,
            "step_seconds": self.step_seconds,
            "run_seconds": self._seconds(),
        }

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Counts on from there; every rank has to."""
        self._samples, self._tokens = state["samples"], state["tokens"]
        self.step_seconds, self.run_seconds = state["step_seconds"], state["run_seconds"]
        self._logged = (*self.totals(device), self.step_seconds)

    def _seconds(self) -> float:
        return self.run_seconds + time.perf_counter() - self._run_start

    def _flush(self) -> None:
        """Asks the device for the tokens, once in many steps: at each it would have to be waited for."""
        self._tokens += sum(int(count) for count in self._uncounted)
        self._uncounted = []


def peak_memory(device: torch.device) -> int:
    """Returns the most bytes that were taken on any rank: of its GPU, or of its process where there is none."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    elif sys.platform == "win32":
        return 0
    else:
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return int(ranks.gather_rows(torch.tensor([peak], device=device)).max())


def _tokens(batch: Mapping[str, Any]) -> list[torch.Tensor]:
    """Returns the numbers of tokens that are not padding, of a batch or of its parts."""
    mask = batch.get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.dim() == 2:
        return [mask.sum()]
    return [count for part in batch.values() if isinstance(part, Mapping) for count in _tokens(part)]
