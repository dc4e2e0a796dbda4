# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Near-duplicate images: what is found, what is not, and what is kept between runs."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from m3fm.data import near_duplicates as module
from m3fm.data.hash_search import candidates
from m3fm.data.near_duplicates import ImageHashes, hash_images, hash_records, near_duplicates
from m3fm.data.schema import ImageFile, StudyRecord
from m3fm.data.thumbnail_alignment import agreement


def picture(seed: int, height: int = 240, width: int = 200) -> np.ndarray:
    """Returns a smooth picture (H, W) uint8 like no other seed's."""
    coarse = np.random.default_rng(seed).random((20, 20), np.float32)
    return np.asarray(
        Image.fromarray((coarse * 255).astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    )


def png(pixels: np.ndarray) -> bytes:
    """Returns the bytes of a PNG."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def jpeg(pixels: np.ndarray, quality: int) -> bytes:
    """Returns the bytes of a JPEG."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    return file.getvalue()


def marked(pixels: np.ndarray) -> np.ndarray:
    """Returns the picture with a white label."""
    pixels = pixels.copy()
    pixels[6:24, 6:40] = 255
    return pixels


COPIES = {
    "jpeg": lambda x: jpeg(x, 30),
    "half size": lambda x: png(np.asarray(Image.fromarray(x).resize((100, 120)))),
    "16 bits": lambda x: png(x.astype(np.uint16) * 200 + 500),
    "gamma": lambda x: png(((x / 255) ** 1.6 * 255).astype(np.uint8)),
    "brighter": lambda x: png(np.clip(x.astype(int) + 30, 0, 255).astype(np.uint8)),
    "crop": lambda x: png(np.ascontiguousarray(x[6:-6, 5:-5])),
    "crop of two sides": lambda x: png(np.ascontiguousarray(x[6:, 5:])),
    "border": lambda x: png(np.pad(x, 12)),
    "label": lambda x: png(marked(x)),
    "turned": lambda x: png(np.asarray(Image.fromarray(x).rotate(2, Image.Resampling.BILINEAR))),
}


@pytest.fixture(scope="module")
def originals() -> list[bytes]:
    """Returns thirty different images."""
    return [png(picture(seed)) for seed in range(30)]


def test_different_images_are_no_duplicates(originals: list[bytes]) -> None:
    assert near_duplicates(hash_images(originals, progress=False)) == []


@pytest.mark.parametrize("kind", COPIES)
def test_copy_is_found_and_nothing_else(originals: list[bytes], kind: str) -> None:
    pairs = near_duplicates(hash_images([*originals, COPIES[kind](picture(7))], progress=False))
    assert [(pair.first, pair.second, pair.is_mirrored) for pair in pairs] == [(7, 30, False)]
    assert pairs[0].correlation >= module.MIN_CORRELATION


def test_mirrored_copy_is_found_as_mirrored_and_only_where_asked(originals: list[bytes]) -> None:
    hashes = hash_images([*originals, png(np.ascontiguousarray(picture(3)[:, ::-1]))], progress=False)
    pairs = near_duplicates(hashes)
    assert [(pair.first, pair.second, pair.is_mirrored) for pair in pairs] == [(3, 30, True)]
    assert near_duplicates(hashes, mirrored=False) == []


def test_equal_images_are_compared_with_the_first() -> None:
    pairs = near_duplicates(hash_images([png(picture(1))] * 5, progress=False))
    assert [(pair.first, pair.second, pair.distance) for pair in pairs] == [(0, n, 0) for n in range(1, 5)]
    assert all(pair.correlation == pytest.approx(1, abs=1e-3) for pair in pairs)


def test_blank_images_are_no_duplicates() -> None:
    blank = [png(np.full((50, 40), value, np.uint8)) for value in (0, 0, 90, 255)]
    assert near_duplicates(hash_images(blank, progress=False)) == []


def test_sources_of_every_kind_are_the_same_image(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(png(picture(5)))
    sources = [path, str(path), path.read_bytes(), {"bytes": path.read_bytes(), "path": "x.png"}, picture(5)]
    hashes = hash_images(sources, progress=False)
    assert hashes.owners.tolist() == [0, 1, 2, 3, 4]
    assert (hashes.entries["hashes"] == hashes.entries["hashes"][0]).all()


def test_unreadable_images_are_named_by_place_and_the_others_kept(tmp_path: Path) -> None:
    hashes = hash_images([b"no image", png(picture(1)), tmp_path / "missing.png", png(picture(1))], progress=False)
    assert hashes.unreadable == (0, 2)
    assert hashes.count == 4
    assert [(pair.first, pair.second) for pair in near_duplicates(hashes)] == [(1, 3)]


def test_volume_has_three_planes_and_one_is_enough() -> None:
    volume = np.stack([picture(seed, 64, 64) for seed in range(11)]).astype(np.float32) * 5 - 1000  # HU
    hashes = hash_images([volume, png(picture(0)), volume[::-1]], progress=False)
    assert hashes.owners.tolist() == [0, 0, 0, 1, 2, 2, 2]
    assert [(pair.first, pair.second) for pair in near_duplicates(hashes)] == [(0, 2)]


def test_cache_is_read_again_and_follows_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [tmp_path / f"{n}.png" for n in range(3)]
    for seed, path in enumerate(paths):
        path.write_bytes(png(picture(seed)))
    first = hash_images(paths, cache_folder=tmp_path / "cache", progress=False)
    read: list[Path] = []
    original = module._entries_of
    monkeypatch.setattr(module, "_entries_of", lambda source: (read.append(source), original(source))[1])
    again = hash_images(paths, cache_folder=tmp_path / "cache", progress=False)
    assert read == []
    assert (again.entries["hashes"] == first.entries["hashes"]).all()
    paths[1].write_bytes(png(picture(9)))
    changed = hash_images(paths, cache_folder=tmp_path / "cache", progress=False)
    assert read == [paths[1]]
    assert (changed.entries["hashes"][1] != first.entries["hashes"][1]).any()


def test_cache_that_a_stopped_run_left_is_gone_on_from(tmp_path: Path) -> None:
    paths = [tmp_path / f"{n}.png" for n in range(3)]
    for seed, path in enumerate(paths):
        path.write_bytes(png(picture(seed)))
    whole = hash_images(paths, cache_folder=tmp_path, progress=False)
    cache = tmp_path / "image_hashes_1.bin"
    cache.write_bytes(cache.read_bytes()[:-100])  # half of the last entry
    again = hash_images(paths, cache_folder=tmp_path, progress=False)
    assert (again.entries["thumbnail"] == whole.entries["thumbnail"]).all()
    assert cache.stat().st_size == 3 * whole.entries.itemsize


def test_workers_give_the_same(tmp_path: Path) -> None:
    paths = [tmp_path / f"{n}.png" for n in range(4)]
    for seed, path in enumerate(paths):
        path.write_bytes(png(picture(seed)))
    alone, together = (hash_images(paths, workers=workers, progress=False) for workers in (0, 2))
    assert (alone.entries == together.entries).all()


def test_no_image_at_all() -> None:
    hashes = hash_images([], progress=False)
    assert (hashes.count, len(hashes.entries)) == (0, 0)
    assert near_duplicates(hashes) == []


def test_marks_join_chains_across_studies() -> None:
    def study(name: str, *images: bytes) -> StudyRecord:
        return StudyRecord(name, "own", "cxr", images=tuple(ImageFile(None, data) for data in images))

    records = [
        study("a", png(picture(1))),
        study("b", jpeg(picture(1), 60), png(picture(2))),
        study("c", jpeg(picture(2), 60)),
        study("d", png(picture(3))),
    ]
    marks = hash_records(records, progress=False).marks
    assert set(marks) == {("own", "a"), ("own", "b"), ("own", "c")}
    assert len(marks["own", "b"]) == 2
    assert set(marks["own", "b"]) == {*marks["own", "a"], *marks["own", "c"]}


def test_search_finds_planted_hashes_among_many() -> None:
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**63, (20_000, 1, 4)).astype(np.uint64)
    flips = np.packbits(rng.random((50, 1, 256)) < 0.06, axis=-1, bitorder="little").view(np.uint64)
    hashes[-50:] = hashes[:50] ^ flips
    found = candidates(hashes, None, 56)
    expected = [(n, 19_950 + n) for n in range(50)]
    assert list(zip(found.first.tolist(), found.second.tolist(), strict=True)) == expected
    assert found.distance.tolist() == np.bitwise_count(flips).sum(axis=(1, 2)).tolist()


def test_alignment_undoes_a_crop() -> None:
    whole = picture(4, 256, 256)
    cut = np.asarray(Image.fromarray(whole[10:-4, 12:-6]).resize((64, 64), Image.Resampling.BOX))
    small = np.asarray(Image.fromarray(whole).resize((64, 64), Image.Resampling.BOX))
    other = np.asarray(Image.fromarray(picture(5, 256, 256)).resize((64, 64), Image.Resampling.BOX))
    boxes = np.tile(np.float32([0, 0, 1, 1]), (2, 1))
    same, different = agreement(np.stack([small, small]), np.stack([cut, other]), boxes, boxes)
    assert same > 0.97
    assert different < 0.5


@pytest.mark.realdata
def test_different_patients_are_no_duplicates_and_recompressed_radiographs_are(data_root: Path) -> None:
    folder = data_root / "nih_chestxray14_sample"
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()][:400]
    files = [(folder / row["file_name"]).read_bytes() for row in rows]
    copies = [
        jpeg(np.asarray(Image.open(io.BytesIO(file)).convert("L"))[5:-3, 4:-4].copy(), 60) for file in files[:20]
    ]
    pairs = near_duplicates(hash_images([*files, *copies], progress=False))
    patients = [row["patient_id"] for row in rows] + [row["patient_id"] for row in rows[:20]]
    assert all(patients[pair.first] == patients[pair.second] for pair in pairs)
    assert {(n, 400 + n) for n in range(20)} <= {(pair.first, pair.second) for pair in pairs}


def test_hashes_hold_no_name_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "smith_john.png"
    path.write_bytes(png(picture(0)))
    hashes = hash_images([path], cache_folder=tmp_path, progress=False)
    assert isinstance(hashes, ImageHashes)
    assert b"smith" not in (tmp_path / "image_hashes_1.bin").read_bytes()
