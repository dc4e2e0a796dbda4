# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Loaders that go on where a killed run stopped: over studies that are at hand, and over streams of shards."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .collators import StudyCollator
from .samplers import EpochBatches, TrainerOrder

__all__ = ["FeedTrainer", "ResumableLoader", "StreamLoader"]


class ResumableLoader:
    """Loads the batches of one rank, and knows how many of them were used, whatever its workers have read ahead.

    ```python
    loader = ResumableLoader(dataset, batches, collator, workers=2)
    loader.load_state_dict(saved)  # in a run that goes on
    for epoch in range(loader.epoch, epochs):
        for batch in loader:  # of one epoch, or what is left of it
            ...
            saved = loader.state_dict()
    ```

    Args:
        dataset: Studies, or rows of `datasets.Dataset`.
        batches: Which of them come in which batch.
        collator: Makes a batch of them.
        workers: Processes that read; each has one thread. 0 reads in this one.
        pin_memory: As in `DataLoader`.
    """

    def __init__(
        self,
        dataset: Dataset | Sequence[Any],
        batches: EpochBatches,
        collator: StudyCollator,
        workers: int = 0,
        pin_memory: bool = False,
    ):
        self.batches = batches
        self.collator = collator
        self._loader = DataLoader(
            dataset,
            batch_sampler=batches,
            collate_fn=collator,
            num_workers=workers,
            pin_memory=pin_memory,
            persistent_workers=workers > 0,
        )
        self._place = (batches.epoch, batches.position)

    @property
    def epoch(self) -> int:
        """The epoch whose batches come next."""
        return self._place[0]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        epoch, used = self._place
        self.batches.epoch, self.batches.position = epoch, used
        self.collator.set_epoch(epoch)
        for batch in self._loader:
            used += 1
            self._place = (epoch, used) if used < len(self) else (epoch + 1, 0)
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Returns the place behind the last batch that was taken."""
        epoch, position = self._place
        return self.batches.state_dict() | {"epoch": epoch, "position": position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on behind the last batch that was taken before the state was saved.

        Raises:
            ValueError: If the state is of another order of batches.
        """
        self.batches.load_state_dict(state)
        self._place = (state["epoch"], state["position"])


class StreamLoader:
    """Loads batches of a stream of one rank, epoch by epoch, and goes on at exactly the next batch.

    A stream cannot jump: in a run that goes on, rows that were used before are read once more, but not their images.

    Args:
        open_stream: Takes the epoch and returns its stream, in the same order each time it is asked: as
            `lambda epoch: stream_for_rank(dataset, rank, world_size, seed, epoch)`.
        batch_size: Studies of a batch; the last of an epoch may have fewer.
        collator: Makes a batch of rows.
        workers: Processes that read, each its own shards.
    """

    def __init__(
        self, open_stream: Callable[[int], IterableDataset], batch_size: int, collator: StudyCollator, workers: int = 0
    ):
        self.open_stream = open_stream
        self.batch_size = batch_size
        self.collator = collator
        self.workers = workers
        self.epoch = 0
        # By worker: how many of its batches were used.
        self._used = [0] * max(1, workers)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.collator.set_epoch(self.epoch)
        passing = _PassingCollator(self.collator, list(self._used))
        loader = DataLoader(
            self.open_stream(self.epoch), batch_size=self.batch_size, collate_fn=passing, num_workers=self.workers
        )
        for worker, batch in loader:
            if batch is not None:
                self._used[worker] += 1
                yield batch
        self.epoch, self._used = self.epoch + 1, [0] * max(1, self.workers)

    def state_dict(self) -> dict[str, Any]:
        """Returns the place behind the last batch that was taken."""
        return {"epoch": self.epoch, "used": list(self._used), "batch_size": self.batch_size}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on behind the last batch that was taken before the state was saved.

        Raises:
            ValueError: With another number of workers or batch size, which give a stream another order.
        """
        ours = {"workers": max(1, self.workers), "batch_size": self.batch_size}
        theirs = {"workers": len(state["used"]), "batch_size": state["batch_size"]}
        if ours != theirs:
            raise ValueError(f"The state is of a stream read with {theirs}, expected it of {ours}.")
        self.epoch, self._used = state["epoch"], list(state["used"])


class _PassingCollator:
    """Collates, but for the first batches of each worker; says which worker a batch is of."""

    def __init__(self, collator: StudyCollator, passed: list[int]):
        self.collator = collator
        self.left = passed

    def __call__(self, rows: list[Any]) -> tuple[int, dict[str, Any] | None]:
        info = get_worker_info()
        worker = 0 if info is None else info.id
        if self.left[worker]:
            self.left[worker] -= 1
            return worker, None
        return worker, self.collator(rows)


class FeedTrainer(Trainer):
    """`Trainer` that takes its batches from `EpochBatches` and tells the collator the epoch, in a resumed run too.

    Args:
        args: What `Trainer` takes, first of all the model; `train_dataset` holds studies or rows, and the training
            arguments say `remove_unused_columns=False`.
        batches: Of all ranks; `rank` does not matter.
        kwargs: What `Trainer` takes by name.

    Raises:
        ValueError: If batch size or number of ranks are not those of the arguments.
    """

    def __init__(self, *args: Any, batches: EpochBatches, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.batches = batches
        ours = (self.args.train_batch_size, self.args.world_size, self.args.remove_unused_columns)
        wanted = (batches.batch_size, batches.world_size, False)
        if ours != wanted:
            raise ValueError(
                f"Expected arguments with batch size, ranks and remove_unused_columns {wanted}, got {ours}."
            )
        self.add_callback(_EpochTeller([batches, self.data_collator]))

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> TrainerOrder:
        return TrainerOrder(self.batches)


class _EpochTeller(TrainerCallback):
    """Tells the epoch to what draws by it.

    Trainer tells a sampler, but not a collator, and no sampler that is wrapped for several ranks and a resumed run.
    """

    def __init__(self, listeners: Sequence[Any]):
        self.listeners = [each for each in listeners if hasattr(each, "set_epoch")]

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Is called before the epoch's first batch is asked for."""
        for each in self.listeners:
            each.set_epoch(int(state.epoch or 0))
