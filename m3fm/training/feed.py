# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Loaders that go on where a killed run stopped: over studies that are at hand, and over streams of shards."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .collators import StudyCollator
from .runs import CheckpointTrainer
from .samplers import EpochBatches, TrainerOrder
from .study_images import UnreadableBatchError

__all__ = ["FeedTrainer", "ResumableLoader", "StreamLoader"]


class ResumableLoader:
    """Loads the batches of one rank, and knows how many of them were used, whatever its workers have read ahead.

    A batch none of whose studies can be read, where such are to be skipped, is passed over; its place counts as used.
    That rank then has a batch less than the others: ranks that wait for each other at every step must allow for it.

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
            collate_fn=_ReadableCollator(collator),
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
            if batch is not None:
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
    A batch none of whose studies can be read, where such are to be skipped, is passed over; its place counts as used.

    Args:
        open_stream: Takes the epoch and returns its stream, in the same order each time it is asked: as
            `lambda epoch: stream_for_rank(dataset, rank, world_size, seed, epoch)`.
        batch_size: Studies of a batch; the last of an epoch may have fewer.
        collator: Makes a batch of rows.
        workers: Processes that read, each its own shards.
        order: What the order of the stream hangs on, which the loader cannot see: any JSON value, as
            `{"set": name, "seed": seed, "rank": rank, "world_size": world_size}`. A state of another order is refused.

    Raises:
        ValueError: If `order` is no JSON value.
    """

    def __init__(
        self,
        open_stream: Callable[[int], IterableDataset],
        batch_size: int,
        collator: StudyCollator,
        workers: int = 0,
        order: Any = None,
    ):
        self.open_stream = open_stream
        self.batch_size = batch_size
        self.collator = collator
        self.workers = workers
        self.order = _as_json(order)
        self.epoch = 0
        # By worker: how many of its batches were used.
        self._used = [0] * max(1, workers)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.collator.set_epoch(self.epoch)
        passing = _PassingCollator(self.collator, list(self._used))
        loader = DataLoader(
            self.open_stream(self.epoch), batch_size=self.batch_size, collate_fn=passing, num_workers=self.workers
        )
        for worker, was_used, batch in loader:
            if was_used:
                continue
            self._used[worker] += 1
            if batch is not None:
                yield batch
        self.epoch, self._used = self.epoch + 1, [0] * max(1, self.workers)

    def state_dict(self) -> dict[str, Any]:
        """Returns the place behind the last batch that was taken."""
        return {
            "epoch": self.epoch,
            "used": list(self._used),
            "batch_size": self.batch_size,
            "order": self.order,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on behind the last batch that was taken before the state was saved.

        Raises:
            ValueError: With another number of workers or batch size, which give a stream another order, or another
                `order`.
        """
        ours = {"workers": max(1, self.workers), "batch_size": self.batch_size, "order": self.order}
        theirs = {
            "workers": len(state["used"]),
            "batch_size": state["batch_size"],
            "order": _as_json(state.get("order")),
        }
        if ours != theirs:
            raise ValueError(f"The state is of a stream read with {theirs}, expected it of {ours}.")
        self.epoch, self._used = state["epoch"], list(state["used"])


class _ReadableCollator:
    """Collates; gives None for a batch of which nothing can be read."""

    def __init__(self, collator: StudyCollator):
        self.collator = collator

    def __call__(self, items: list[Any]) -> dict[str, Any] | None:
        try:
            return self.collator(items)
        except UnreadableBatchError:
            return None


class _PassingCollator:
    """Collates, but for the first batches of each worker; says which worker a batch is of, and if it was passed."""

    def __init__(self, collator: StudyCollator, passed: list[int]):
        self.collator = _ReadableCollator(collator)
        self.left = passed

    def __call__(self, rows: list[Any]) -> tuple[int, bool, dict[str, Any] | None]:
        info = get_worker_info()
        worker = 0 if info is None else info.id
        if self.left[worker]:
            self.left[worker] -= 1
            return worker, True, None
        return worker, False, self.collator(rows)


def _as_json(value: Any) -> Any:
    """Returns what a JSON file would give back: a state may come from one, with lists for tuples."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError) as error:
        raise ValueError(f"order: expected a JSON value: {error}.") from None


class FeedTrainer(CheckpointTrainer):
    """`Trainer` that takes its batches from `EpochBatches` and tells the collator the epoch, in a resumed run too.

    A batch none of whose studies can be read ends the run, whether or not such are skipped: all ranks have to train
    on as many batches. `ResumableLoader` passes it over.

    Args:
        args: What `Trainer` takes, first of all the model; `train_dataset` holds studies or rows, and the training
            arguments say `remove_unused_columns=False`.
        batches: Of all ranks; `rank` does not matter.
        eval_collator: Makes the batches of evaluation and prediction; None: `for_evaluation()` of the collator, which
            does not augment and draws the same each time, or the collator itself where it has no such method.
        kwargs: What `Trainer` takes by name.

    Raises:
        ValueError: If batch size or number of ranks are not those of the arguments.
    """

    def __init__(
        self,
        *args: Any,
        batches: EpochBatches,
        eval_collator: Callable[[list[Any]], dict[str, Any]] | None = None,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.batches = batches
        if eval_collator is None and hasattr(self.data_collator, "for_evaluation"):
            eval_collator = self.data_collator.for_evaluation()
        self.eval_collator = eval_collator or self.data_collator
        ours = (self.args.train_batch_size, self.args.world_size, self.args.remove_unused_columns)
        wanted = (batches.batch_size, batches.world_size, False)
        if ours != wanted:
            raise ValueError(
                f"Expected arguments with batch size, ranks and remove_unused_columns {wanted}, got {ours}."
            )
        self.add_callback(_EpochTeller([batches, self.data_collator]))

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader:
        """Returns the loader of evaluation, which takes `eval_collator`."""
        with self._collating_for_evaluation():
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Dataset) -> DataLoader:
        """Returns the loader of prediction, which takes `eval_collator`."""
        with self._collating_for_evaluation():
            return super().get_test_dataloader(test_dataset)

    def data_order(self) -> dict[str, Any]:
        """Returns what the order of the batches hangs on."""
        return self.batches.state_dict()["order"]

    @contextmanager
    def _collating_for_evaluation(self) -> Iterator[None]:
        training = self.data_collator
        self.data_collator = self.eval_collator
        try:
            yield
        finally:
            self.data_collator = training

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
