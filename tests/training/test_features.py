# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""The cache of image tokens: right values, nothing computed twice, and nothing mixed up by a killed run."""

import logging
import pickle
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from m3fm import M3FMImageProcessor
from m3fm.data import Study
from m3fm.data.schema import ImageFile, StudyRecord
from m3fm.training.features import FeatureCache


class Tower(torch.nn.Module):
    """Counts images; its tokens are numbers made of the pixels."""

    def __init__(self, factor: float = 1.0):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(factor))
        self.seen = 0

    def forward(self, pixel_values: torch.Tensor):
        self.seen += len(pixel_values) if pixel_values.any() else 0  # zeros only ask for the shape
        tokens = pixel_values.flatten(2)[:, :, :4] * self.factor  # (b, 3, 4)
        return type("Output", (), {"last_hidden_state": tokens})


@pytest.fixture
def studies(tmp_path: Path) -> list[Study]:
    rng = np.random.default_rng(0)
    studies = []
    for source, count in (("first", 5), ("second", 2)):
        (tmp_path / source).mkdir()
        for number in range(count):
            path = tmp_path / source / f"{number}.png"  # the same names in both sets
            Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(path)
            studies.append(Study(str(number), source, "cxr", (path,), None, {}, None, None))
    return studies


@pytest.fixture
def processor() -> M3FMImageProcessor:
    return M3FMImageProcessor(size=8)


def expected(study: Study, processor: M3FMImageProcessor) -> np.ndarray:
    pixels = processor(list(study.images), return_tensors="np")["pixel_values"][:, 0]
    return pixels.reshape(len(pixels), 3, -1)[:, :, :4].astype(np.float16)


def assert_right(cache: FeatureCache, studies: list[Study], processor: M3FMImageProcessor) -> None:
    for study in studies:
        np.testing.assert_array_equal(cache.get(study), expected(study, processor))


def test_tokens_are_those_of_the_tower(studies, processor, tmp_path):
    cache = FeatureCache(tmp_path / "cache", Tower(), processor)
    cache.fill(studies, batch_size=2)
    assert_right(cache, studies, processor)
    both = Study("x", "first", "cxr", (*studies[3].images, *studies[0].images), None, {}, None, None)
    cache.fill([both])
    np.testing.assert_array_equal(cache.get(both), np.concatenate([expected(studies[i], processor) for i in (3, 0)]))


def test_nothing_is_computed_twice(studies, processor, tmp_path):
    first = Tower()
    cache = FeatureCache(tmp_path / "cache", first, processor)
    cache.fill([studies[0], studies[2], studies[0]])
    cache.fill(studies)
    assert first.seen == len(studies)
    assert_right(cache, studies, processor)

    later = Tower()
    again = FeatureCache(tmp_path / "cache", later, processor)
    again.fill(list(reversed(studies)))
    assert later.seen == 0
    assert_right(again, studies, processor)


def test_files_of_one_name_in_several_folders_are_not_mixed_up(processor, tmp_path):
    rng = np.random.default_rng(1)
    studies = []
    for patient in ("a", "b"):
        path = tmp_path / "set" / patient / "view.png"
        path.parent.mkdir(parents=True)
        Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(path)
        studies.append(Study(patient, "set", "cxr", (path,), None, {}, None, None))
    tower = Tower()
    cache = FeatureCache(tmp_path / "cache", tower, processor)
    cache.fill(studies)
    assert tower.seen == 2
    assert_right(cache, studies, processor)


def test_a_file_that_was_replaced_is_computed_anew(studies, processor, tmp_path):
    FeatureCache(tmp_path / "cache", Tower(), processor).fill(studies)
    rng = np.random.default_rng(1)
    Image.fromarray(rng.integers(0, 256, (16, 16), dtype=np.uint8)).save(studies[1].images[0])
    tower = Tower()
    cache = FeatureCache(tmp_path / "cache", tower, processor)
    cache.fill(studies)
    assert tower.seen == 1
    assert_right(cache, studies, processor)


def test_studies_without_images_are_passed_over(processor, tmp_path):
    cache = FeatureCache(tmp_path / "cache", Tower(), processor)
    cache.fill([Study("a", "texts", "cxr", (), None, {"en": "Clear."}, None, None)])
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("change", ["tower", "processor"])
def test_another_tower_or_preprocessing_has_its_own_files(change, studies, processor, tmp_path):
    FeatureCache(tmp_path / "cache", Tower(), processor).fill(studies)
    tower = Tower(2.0 if change == "tower" else 1.0)
    other = M3FMImageProcessor(size=8, image_mean=[0.0] * 3) if change == "processor" else processor
    cache = FeatureCache(tmp_path / "cache", tower, other)
    cache.fill(studies)
    assert tower.seen == len(studies)
    assert len(list((tmp_path / "cache").iterdir())) == 8
    np.testing.assert_array_equal(cache.get(studies[0]), expected(studies[0], other) * (2 if change == "tower" else 1))


def files_of_first(folder: Path) -> tuple[Path, Path]:
    (data,), (index,) = folder.glob("first-*.f16"), folder.glob("first-*.index")
    return data, index


@pytest.mark.parametrize("kill", ["tokens ahead", "part of a token", "half a name", "names ahead", "no tokens at all"])
def test_a_killed_run_is_gone_on_with(kill, studies, processor, tmp_path):
    FeatureCache(tmp_path / "cache", Tower(), processor).fill(studies[:3])
    data, index = files_of_first(tmp_path / "cache")
    tokens, names = data.read_bytes(), index.read_text(encoding="utf-8")
    row = len(tokens) // 3
    left = {
        "tokens ahead": (tokens, names[: names.index("\n") + 1], 1),
        "part of a token": (tokens + tokens[: row // 2], names, 3),
        "half a name": (tokens, names[:-3], 2),
        "names ahead": (tokens[: row * 2 - 3], names, 1),
        "no tokens at all": (b"", names, 0),
    }
    tokens, names, whole = left[kill]
    data.write_bytes(tokens)
    index.write_text(names, encoding="utf-8")
    tower = Tower()
    cache = FeatureCache(tmp_path / "cache", tower, processor)
    cache.fill(studies[:5])
    assert tower.seen == 5 - whole
    assert_right(cache, studies[:5], processor)
    again = FeatureCache(tmp_path / "cache", tower, processor)
    again.fill(studies[:5])
    assert tower.seen == 5 - whole
    assert_right(again, studies[:5], processor)


def test_an_error_on_the_way_loses_nothing(studies, processor, tmp_path):
    broken = tmp_path / "first" / "broken.png"
    broken.write_bytes(b"not an image")
    bad = Study("b", "first", "cxr", (broken,), None, {}, None, None)
    cache = FeatureCache(tmp_path / "cache", Tower(), processor)
    with pytest.raises(ValueError, match=r"broken\.png"):
        cache.fill([*studies[:4], bad], batch_size=2)
    tower = Tower()
    again = FeatureCache(tmp_path / "cache", tower, processor)
    again.fill(studies[:4])
    assert tower.seen == 0
    assert_right(again, studies[:4], processor)


def test_a_volume_is_refused(processor, tmp_path):
    nibabel = pytest.importorskip("nibabel")
    path = tmp_path / "ct.nii.gz"
    rng = np.random.default_rng(0)
    nibabel.save(nibabel.Nifti1Image(rng.integers(-1000, 400, (8, 8, 4)).astype(np.int16), np.eye(4)), path)
    cache = FeatureCache(tmp_path / "cache", Tower(), processor)
    with pytest.raises(ValueError, match="one slice or view each, got a volume"):
        cache.fill([Study("v", "volumes", "ct", (path,), None, {}, None, None)])


def records_of(studies: list[Study]) -> list[StudyRecord]:
    """Returns the same studies as if from shards: bytes, under names that say nothing."""
    return [
        StudyRecord(
            each.study_id,
            each.source,
            each.modality,
            images=tuple(ImageFile(Path("image.png"), path.read_bytes()) for path in each.images),
        )
        for each in studies
    ]


def test_images_of_shards_are_known_by_their_content(studies, processor, tmp_path):
    records = records_of(studies)
    twice = StudyRecord("twice", "first", "cxr", images=(*records[1].images, *records[0].images, *records[1].images))
    tower = Tower()
    cache = FeatureCache(tmp_path / "cache", tower, processor)
    cache.fill(iter([*records, twice, *records_of(studies)]), batch_size=3)  # a stream, gone through once
    assert tower.seen == len(studies)
    for record, study in zip(records, studies, strict=True):
        np.testing.assert_array_equal(cache.get(record), expected(study, processor))
    tokens = [expected(studies[place], processor) for place in (1, 0, 1)]
    np.testing.assert_array_equal(cache.get(twice), np.concatenate(tokens))

    later = Tower()
    again = FeatureCache(tmp_path / "cache", later, processor)
    again.fill(records)
    assert later.seen == 0
    np.testing.assert_array_equal(again.get(records[4]), expected(studies[4], processor))


def test_names_of_image_files_in_the_index_stay_what_they_were(studies, processor, tmp_path):
    FeatureCache(tmp_path / "cache", Tower(), processor).fill(studies[:2])
    _, index = files_of_first(tmp_path / "cache")
    sizes = [study.images[0].stat().st_size for study in studies]
    assert index.read_text(encoding="utf-8") == f"first/0.png {sizes[0]}\nfirst/1.png {sizes[1]}\n"


def test_paths_and_bytes_share_a_file(studies, processor, tmp_path):
    tower = Tower()
    cache = FeatureCache(tmp_path / "cache", tower, processor)
    cache.fill([*studies[:2], *records_of(studies[1:4])])
    assert tower.seen == 5  # what is known by its name is not known by its content
    _, index = files_of_first(tmp_path / "cache")
    kinds = [line.split(":")[0] for line in index.read_text(encoding="utf-8").splitlines()]
    assert [kind == "sha256" for kind in kinds] == [False, False, True, True, True]


def test_images_in_memory_that_are_no_files_are_refused(processor, tmp_path):
    cache = FeatureCache(tmp_path / "cache", Tower(), processor)
    study = Study("a", "first", "cxr", (np.zeros((8, 8), np.uint8),), None, {}, None, None)
    with pytest.raises(ValueError, match="image files or their bytes, got ndarray"):
        cache.fill([study])


_HOLD = """
import fcntl, sys
file = open(sys.argv[1], "ab")
fcntl.lockf(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def test_a_second_process_waits_until_the_first_has_filled(studies, processor, tmp_path, caplog):
    pytest.importorskip("fcntl")
    FeatureCache(tmp_path / "filled", Tower(), processor).fill(studies)
    (tmp_path / "cache").mkdir()
    key = next((tmp_path / "filled").glob("first-*.f16")).stem.removeprefix("first-")
    command = [sys.executable, "-c", _HOLD, str(tmp_path / "cache" / f"{key}.lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout.readline() == "held\n"

        def fill_and_let_go() -> None:
            shutil.copytree(tmp_path / "filled", tmp_path / "cache", dirs_exist_ok=True)
            first.stdin.close()

        threading.Timer(0.2, fill_and_let_go).start()
        tower = Tower()
        cache = FeatureCache(tmp_path / "cache", tower, processor)
        with caplog.at_level(logging.WARNING):
            cache.fill(list(reversed(studies)), batch_size=2)
    assert tower.seen == 0, "the first had computed them all"
    assert len(caplog.records) == 1 and caplog.records[0].message.endswith(f"{key}.lock")
    assert not list((tmp_path / "cache").glob("*.lock"))
    assert_right(cache, studies, processor)


def test_tokens_that_were_not_filled_are_asked_for_in_vain(studies, processor, tmp_path):
    cache = FeatureCache(tmp_path / "cache", Tower(), processor)
    for missing, named in ((studies[0], r"0\.png"), (records_of(studies)[0], "an image in memory")):
        with pytest.raises(ValueError, match=f"no tokens of {named}: call fill with its study first"):
            cache.get(missing)
    with pytest.raises(ValueError, match="has no image"):
        cache.get(Study("a", "texts", "cxr", (), None, {}, None, None))


def test_a_copy_in_another_process_opens_the_same_files(studies, processor, tmp_path):
    cache = FeatureCache(tmp_path / "cache", Tower(), processor)
    cache.fill(studies)
    with torch.no_grad():
        cache.tower.extra = torch.nn.Parameter(torch.zeros(1_000_000))
    sent = pickle.dumps(cache)
    assert len(sent) < 20_000
    there = pickle.loads(sent)
    assert_right(there, studies, processor)
    assert all(isinstance(array, np.memmap) for array in there._arrays.values())
    with pytest.raises(ValueError, match="came from another process has no tower"):
        there.fill(studies)
    assert cache.tower is not None
    cache.fill(studies)
