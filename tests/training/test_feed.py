# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Loaders: the same batches with any number of workers, and after a run was killed at any step."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils.data import IterableDataset, get_worker_info
from transformers import TrainingArguments

from m3fm import M3FMForReportGeneration
from m3fm.data.schema import ImageFile, ReportText, StudyRecord
from m3fm.training.augmentation import Augmentation
from m3fm.training.collators import ReportTexts, StudyCollator
from m3fm.training.fed_studies import Draw, fed_study
from m3fm.training.feed import FeedTrainer, ResumableLoader, StreamLoader
from m3fm.training.samplers import EpochBatches, EveryStudy, LengthBucketSampler
from m3fm.training.study_images import StudyPixels, UnreadableBatchError

# The machine that runs the tests may have fewer cores than workers are tried.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


class Ids:
    """A target: which study, in which epoch, read with how many threads."""

    def batch(self, studies, draw) -> dict[str, Any]:
        ids = [int(study.key.split("/")[1]) for study in studies]
        return {"ids": ids, "epoch": draw.epoch, "threads": torch.get_num_threads()}


class NoImages:
    """Images that are not read."""

    def batch(self, studies, draw) -> tuple[list, dict]:
        return list(studies), {}


class SomeUnreadable(NoImages):
    """Images of which those of the first nine studies of each hundred cannot be read."""

    def batch(self, studies, draw) -> tuple[list, dict]:
        kept = [study for study in studies if int(study.key.split("/")[1]) % 100 > 8]
        if not kept:
            raise UnreadableBatchError("none can be read")
        return kept, {}


RECORDS = [StudyRecord(str(number), "set", "cxr") for number in range(23)]


def ids_collator() -> StudyCollator:
    return StudyCollator(NoImages(), Ids())


def loader(workers: int, **options) -> ResumableLoader:
    lengths = np.random.default_rng(0).integers(1, 99, 23)
    return ResumableLoader(
        RECORDS, LengthBucketSampler(lengths, 3, seed=1, pool=3, **options), ids_collator(), workers
    )


def taken(batches) -> list[tuple[int, list[int]]]:
    return [(batch["epoch"], batch["ids"]) for batch in batches]


def test_workers_change_nothing_and_learn_of_the_next_epoch():
    one = loader(0)
    expected = [taken(one) for _ in range(2)]
    assert [{epoch for epoch, _ in each} for each in expected] == [{0}, {1}]
    assert expected[0] != expected[1]
    for workers in (1, 2, 4):
        several = loader(workers)
        assert [taken(several) for _ in range(2)] == expected


def test_workers_have_one_thread_each():
    assert {batch["threads"] for batch in loader(1)} == {1}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_killed_at_any_step_goes_on_with_the_next_batch(workers):
    whole = loader(0)
    expected = [*taken(whole), *taken(whole)]
    for step in range(1, 12) if workers == 0 else (3, 8):
        killed = loader(workers)
        seen = []
        while len(seen) < step:
            for batch in killed:
                seen += taken([batch])
                if len(seen) == step:
                    state = killed.state_dict()  # though workers have read further ahead
                    break
        later = loader(workers)
        later.load_state_dict(state)
        rest = [each for _ in range(later.epoch, 2) for each in taken(later)]
        assert seen + rest == expected


def test_another_number_of_workers_may_go_on():
    first = loader(2)
    seen = []
    for batch in first:
        seen += taken([batch])
        if len(seen) == 3:
            break
    later = loader(0)
    later.load_state_dict(first.state_dict())
    assert seen + taken(later) == taken(loader(0))


def test_ranks_part_the_studies():
    whole = {number for _, ids in taken(loader(0)) for number in ids}
    ranks = [taken(loader(0, rank=rank, world_size=2)) for rank in range(2)]
    assert len(ranks[0]) == len(ranks[1]) == len(loader(0, rank=0, world_size=2))
    assert {number for rank in ranks for _, ids in rank for number in ids} == whole == set(range(23))


class InOrder(EveryStudy):
    """Draws the studies as they come."""

    def draw(self, seed: int, epoch: int) -> np.ndarray:
        return np.arange(self.count)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_without_a_readable_study_is_passed_over(workers):
    def some() -> ResumableLoader:
        batches = EpochBatches(InOrder(23), 3, remainder="drop")
        return ResumableLoader(RECORDS, batches, StudyCollator(SomeUnreadable(), Ids()), workers)

    whole = some()
    expected = taken(whole)
    assert [ids for _, ids in expected] == [[9, 10, 11], [12, 13, 14], [15, 16, 17], [18, 19, 20]]
    assert whole.epoch == 1
    killed = some()
    first = taken([next(iter(killed))])
    assert killed.state_dict()["position"] == 4
    later = some()
    later.load_state_dict(killed.state_dict())
    assert first + taken(later) == expected


class Rows(IterableDataset):
    """Shards of rows, parted among workers as `datasets` does."""

    def __init__(self, epoch: int):
        self.epoch = epoch

    def __iter__(self):
        info = get_worker_info()
        shards = range(5) if info is None else range(info.id, 5, info.num_workers)
        for shard in shards:
            for row in range(4 + shard):
                yield StudyRecord(str(1000 * self.epoch + 10 * shard + row), "set", "cxr").as_row()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_goes_on_with_the_next_batch(workers):
    def stream() -> StreamLoader:
        return StreamLoader(Rows, 3, ids_collator(), workers)

    whole = stream()
    first = taken(whole)
    expected = first + taken(whole)
    assert sorted(number for _, ids in first for number in ids) == sorted(
        10 * shard + row for shard in range(5) for row in range(4 + shard)
    )
    for step in range(1, len(expected)) if workers == 0 else (4, 17):
        killed, seen = stream(), []
        while len(seen) < step:
            for batch in killed:
                seen += taken([batch])
                if len(seen) == step:
                    break
        later = stream()
        later.load_state_dict(killed.state_dict())
        rest = [each for _ in range(later.epoch, 2) for each in taken(later)]
        assert seen + rest == expected


def test_a_stream_read_by_others_is_refused():
    state = StreamLoader(Rows, 3, ids_collator(), 2).state_dict()
    with pytest.raises(ValueError, match="'workers': 2.*expected it of.*'workers': 1"):
        StreamLoader(Rows, 3, ids_collator(), 0).load_state_dict(state)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_of_a_stream_without_a_readable_study_is_passed_over(workers):
    def some() -> StreamLoader:
        return StreamLoader(Rows, 3, StudyCollator(SomeUnreadable(), Ids()), workers)

    whole = some()
    expected = taken(whole)
    assert whole.state_dict() == {"epoch": 1, "used": [0] * max(1, workers), "batch_size": 3, "order": None}
    assert sorted(number for _, ids in expected for number in ids) == [
        number for shard in range(5) for number in range(10 * shard, 10 * shard + 4 + shard) if number > 8
    ]
    killed = some()
    seen = []
    for batch in killed:
        seen += taken([batch])
        if len(seen) == 2:
            break
    assert sum(killed.state_dict()["used"]) > 2
    later = some()
    later.load_state_dict(killed.state_dict())
    assert seen + taken(later) == expected


def test_a_stream_of_another_order_is_refused():
    def stream(**order: Any) -> StreamLoader:
        return StreamLoader(Rows, 3, ids_collator(), order=order or None)

    state = stream(seed=0, world_size=2, sets=("a", "b")).state_dict()
    same = stream(seed=0, world_size=2, sets=["a", "b"])
    same.load_state_dict(json.loads(json.dumps(state | {"epoch": 3})))
    assert same.epoch == 3
    for other in ({"seed": 1, "world_size": 2, "sets": ["a", "b"]}, {"seed": 0, "world_size": 1}, {}):
        with pytest.raises(ValueError, match="The state is of a stream read with .*'world_size': 2.*expected it of"):
            stream(**other).load_state_dict(state)
    with pytest.raises(ValueError, match="order: expected a JSON value"):
        stream(seed={1})


@pytest.fixture
def reported(tmp_path: Path) -> list[StudyRecord]:
    records = []
    for number in range(10):
        path = tmp_path / f"{number}.png"
        pixels = np.random.default_rng(number).integers(0, 256, (30, 30), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
        reports = {"en": ReportText(f"Heart number {number}. " * (1 + number)), "zh": ReportText("双肺清晰。")}
        records.append(StudyRecord(str(number), "set", "cxr", images=(ImageFile(path),), reports=reports))
    return records


class Noting:
    """A collator that notes what it was asked for."""

    def __init__(self, collator: StudyCollator):
        self.collator = collator
        self.set_epoch = collator.set_epoch
        self.batches: list[tuple[int, list[str], float]] = []

    def __call__(self, records: list[StudyRecord]) -> dict[str, Any]:
        batch = self.collator(records)
        sum_of_pixels = float(batch["pixel_values"].double().sum())
        self.batches.append((self.collator.epoch, [record.study_id for record in records], sum_of_pixels))
        return batch


def test_trainer_takes_the_batches_and_goes_on_with_them(reported, tiny_processor, tiny_model, tmp_path):
    def trainer() -> FeedTrainer:
        texts = ReportTexts(tiny_processor.tokenizer, tiny_model.config)
        images = StudyPixels(tiny_processor.image_processor, augmentation=Augmentation())
        arguments = TrainingArguments(
            str(tmp_path / "run"),
            per_device_train_batch_size=2,
            num_train_epochs=2,
            save_steps=7,
            remove_unused_columns=False,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            seed=1,
        )
        return FeedTrainer(
            tiny_model,
            arguments,
            Noting(StudyCollator(images, texts, seed=4)),
            reported,
            batches=LengthBucketSampler([len(each.reports["en"].text) for each in reported], 2, seed=4, pool=2),
        )

    whole = trainer()
    whole.train()
    assert [epoch for epoch, _, _ in whole.data_collator.batches] == [0] * 5 + [1] * 5
    order = whole.batches
    expected = [[str(number) for number in batch] for epoch in (0, 1) for batch in order.all_batches(epoch)[:, 0]]
    assert [ids for _, ids, _ in whole.data_collator.batches] == expected
    assert len({pixels for _, _, pixels in whole.data_collator.batches}) == 10

    later = trainer()
    later.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-7"))
    assert later.data_collator.batches == whole.data_collator.batches[7:]


def fresh_model(config, seed: int) -> M3FMForReportGeneration:
    torch.manual_seed(seed)
    model = M3FMForReportGeneration(config)
    model.set_support_memory(torch.eye(2 * config.support_memory_size, config.projection_dim).unflatten(0, (2, -1)))
    return model


def small_trainer(reported, processor, model, folder: Path, eval_collator=None, **arguments) -> FeedTrainer:
    images = StudyPixels(processor.image_processor, augmentation=Augmentation())
    return FeedTrainer(
        model,
        TrainingArguments(
            str(folder),
            per_device_train_batch_size=2,
            per_device_eval_batch_size=4,
            num_train_epochs=1,
            remove_unused_columns=False,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            learning_rate=0.01,
            **arguments,
        ),
        StudyCollator(images, ReportTexts(processor.tokenizer, model.config)),
        reported,
        reported[:4],
        batches=EpochBatches(EveryStudy(10), 2),
        eval_collator=eval_collator,
    )


def assert_same_weights(model, other) -> None:
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def test_a_new_model_goes_on_with_all_the_weights_that_were_trained(reported, tiny_processor, tiny_config, tmp_path):
    def trainer(seed: int, folder: str) -> FeedTrainer:
        model = fresh_model(tiny_config, seed)
        return small_trainer(reported, tiny_processor, model, tmp_path / folder, save_steps=3)

    whole = trainer(1, "whole")
    whole.train()
    later = trainer(2, "later")
    later.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert_same_weights(later.model, whole.model)


def test_the_best_model_has_all_the_weights_of_its_checkpoint(reported, tiny_processor, tiny_config, tmp_path):
    trainer = small_trainer(
        reported,
        tiny_processor,
        fresh_model(tiny_config, 1),
        tmp_path,
        save_steps=1,
        eval_steps=1,
        eval_strategy="steps",
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,  # so that it is not the last one
    )
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name != "checkpoint-5"
    assert_same_weights(trainer.model, M3FMForReportGeneration.from_pretrained(best))


def test_a_checkpoint_that_lacks_weights_is_refused(reported, tiny_processor, tiny_model, tmp_path):
    trainer = small_trainer(reported, tiny_processor, tiny_model, tmp_path / "run")
    tiny_model.save_pretrained(tmp_path / "whole")
    weights = load_file(tmp_path / "whole" / "model.safetensors")
    name = next(name for name in weights if "attention" in name)
    save_file({key: value for key, value in weights.items() if key != name}, tmp_path / "whole" / "model.safetensors")
    with pytest.raises(ValueError, match="do not fit M3FMForReportGeneration: missing 1 .*attention"):
        trainer._load_from_checkpoint(str(tmp_path / "whole"))


def test_evaluation_is_not_augmented_and_the_same_in_each_epoch(reported, tiny_processor, tiny_model, tmp_path):
    trainer = small_trainer(reported, tiny_processor, tiny_model, tmp_path)
    plain = StudyPixels(tiny_processor.image_processor).batch([fed_study(each) for each in reported[:4]], Draw())[1]
    texts = set()
    for epoch in range(3):
        trainer.data_collator.set_epoch(epoch)
        for loader in (trainer.get_eval_dataloader(), trainer.get_test_dataloader(reported[:4])):
            (batch,) = loader
            assert torch.equal(batch["pixel_values"], plain["pixel_values"])
            texts.add(str(batch["input_ids"].tolist()))
    assert len(texts) == 1
    augmented = next(iter(trainer.get_train_dataloader()))
    assert trainer.data_collator.images.augmentation is not None and len(augmented["pixel_values"]) == 2

    own = Noting(StudyCollator(StudyPixels(tiny_processor.image_processor), trainer.data_collator.targets))
    trainer = small_trainer(reported, tiny_processor, tiny_model, tmp_path, eval_collator=own)
    trainer.evaluate()
    assert [ids for _, ids, _ in own.batches] == [["0", "1", "2", "3"]]


def test_trainer_refuses_other_sizes_than_the_batches_have(tiny_model, tmp_path):
    arguments = TrainingArguments(str(tmp_path), per_device_train_batch_size=3, use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match=r"\(2, 1, False\), got \(3, 1, True\)"):
        FeedTrainer(tiny_model, arguments, batches=EpochBatches(EveryStudy(10), 2))
