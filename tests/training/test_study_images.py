# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""The images of a batch: as inference reads them, changed only where asked, and a file that is broken is named."""

import io
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from m3fm import M3FMImageProcessor
from m3fm.training.augmentation import Augmentation, Change, Strengths, apply_change
from m3fm.training.features import FeatureCache
from m3fm.training.fed_studies import Draw, FedStudy
from m3fm.training.study_images import CachedTokens, StudyPixels, UnreadableBatchError

PROCESSOR = M3FMImageProcessor(size=28, num_slices=3)


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    rng = np.random.default_rng(0)
    paths = [tmp_path / f"view{number}.png" for number in range(4)]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (40, 30), dtype=np.uint8)).save(path)
    return paths


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    path = tmp_path / "broken.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\nnot really")
    return path


def study(*images, key: str = "set/1", modality: str = "cxr", **reports: str) -> FedStudy:
    return FedStudy(key, modality, images, (None,) * len(images), reports, {})


def test_pixels_are_those_of_inference_and_padded(files):
    studies = [study(files[0]), study(*files[1:4])]
    kept, batch = StudyPixels(PROCESSOR).batch(studies, Draw())
    expected = PROCESSOR([[files[0]], files[1:4]], return_tensors="pt")
    assert kept == studies
    assert batch.keys() == expected.keys() == {"pixel_values", "image_mask"}
    for name, value in batch.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)


def test_bytes_and_decoded_images_are_the_same(files):
    sources = (files[0], {"bytes": files[0].read_bytes(), "path": "x"}, files[0].read_bytes(), Image.open(files[0]))
    _, batch = StudyPixels(PROCESSOR).batch([study(each) for each in sources], Draw())
    for row in batch["pixel_values"][1:]:
        assert torch.equal(row, batch["pixel_values"][0])


def test_views_beyond_the_maximum_are_left_out(files):
    _, batch = StudyPixels(PROCESSOR, max_views=2).batch([study(*files)], Draw())
    assert torch.equal(batch["pixel_values"], PROCESSOR([files[:2]], return_tensors="pt")["pixel_values"])


def test_an_unreadable_file_is_named_and_not_its_patient(files, broken):
    pixels = StudyPixels(PROCESSOR)
    with pytest.raises(ValueError, match=r"broken\.png: truncated or damaged PNG") as caught:
        pixels.batch([study(files[0]), study(broken, key="set/patient7")], Draw())
    assert "patient7" not in str(caught.value)
    with pytest.raises(ValueError, match=r"shard-name\.dcm"):
        pixels.batch([study({"bytes": bytes(128) + b"DICM" + bytes(9), "path": "p/shard-name.dcm"})], Draw())
    with pytest.raises(ValueError, match="has no image"):
        pixels.batch([study()], Draw())


def test_unreadable_studies_are_skipped_and_counted_as_asked(files, broken, caplog):
    pixels = StudyPixels(PROCESSOR, on_unreadable="skip")
    good, bad = study(files[0], key="set/1"), study(files[1], broken, key="set/patient7")
    with caplog.at_level(logging.WARNING):
        kept, batch = pixels.batch([bad, good, bad], Draw())
    assert kept == [good]
    assert batch["pixel_values"].shape[:2] == (1, 1)
    assert pixels.skipped == 2
    assert "broken.png" in caplog.text and "patient7" not in caplog.text
    with pytest.raises(UnreadableBatchError, match="None of the 1 studies of a batch can be read"):
        pixels.batch([bad], Draw())


def test_evaluation_is_not_augmented_and_counts_with_the_training(files, broken):
    training = StudyPixels(PROCESSOR, max_views=2, on_unreadable="skip", augmentation=Augmentation())
    plain = training.for_evaluation()
    _, batch = plain.batch([study(*files[:3]), study(broken)], Draw())
    assert torch.equal(batch["pixel_values"], PROCESSOR([files[:2]], return_tensors="pt")["pixel_values"])
    assert training.augmentation is not None
    assert training.skipped == plain.skipped == 1


def test_options_are_checked():
    with pytest.raises(ValueError, match=r"one of \['raise', 'skip'\]"):
        StudyPixels(PROCESSOR, on_unreadable="ignore")
    with pytest.raises(ValueError, match="max_views >= 1"):
        StudyPixels(PROCESSOR, max_views=0)


def test_augmentation_without_strength_gives_the_pixels_of_inference(files):
    studies = [study(*files[:2])]
    plain, moved = (
        StudyPixels(PROCESSOR, augmentation=each).batch(studies, Draw())[1] for each in (None, Augmentation({}))
    )
    assert torch.equal(plain["pixel_values"], moved["pixel_values"])


def test_augmentation_comes_between_letterbox_and_normalisation(files):
    strengths = {"cxr": Strengths(brightness=0.3, gamma=0.2)}
    draw = Draw(3, 1)
    _, batch = StudyPixels(PROCESSOR, augmentation=Augmentation(strengths)).batch([study(files[0])], draw)
    raw = M3FMImageProcessor(size=28, image_mean=[0.0] * 3, image_std=[1.0] * 3)
    plane = raw([files[0]], return_tensors="np")["pixel_values"][0, 0, 0]
    (change,) = Augmentation(strengths).changes(draw, "cxr", "set/1", 1)
    assert change.brightness != 1 and change.gamma != 1
    assert change == Change(brightness=change.brightness, gamma=change.gamma, noise_seed=change.noise_seed)
    changed = apply_change(plane, change)
    for channel in range(3):
        expected = (changed - np.float32(PROCESSOR.image_mean[channel])) / np.float32(PROCESSOR.image_std[channel])
        np.testing.assert_array_equal(batch["pixel_values"][0, 0, channel].numpy(), expected)


def test_a_mirrored_chest_needs_a_report_without_sides(files):
    pixels = StudyPixels(PROCESSOR, augmentation=Augmentation({"cxr": Strengths(mirror=1.0)}))
    plain = StudyPixels(PROCESSOR).batch([study(files[0])], Draw())[1]["pixel_values"]
    silent = pixels.batch([study(files[0], en="Clear lungs.")], Draw())[1]["pixel_values"]
    sided = pixels.batch([study(files[0], en="Opacity on the left.")], Draw())[1]["pixel_values"]
    torch.testing.assert_close(silent, plain.flip(-1), rtol=0, atol=1e-6)
    torch.testing.assert_close(sided, plain, rtol=0, atol=1e-6)


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    """Slice k of 20 has k hundred HU above air, so that the batch tells which were taken."""
    nibabel = pytest.importorskip("nibabel")
    values = np.broadcast_to(np.arange(20, dtype=np.int16) * 50 - 1200, (28, 28, 20))
    path = tmp_path / "ct.nii.gz"
    nibabel.save(nibabel.Nifti1Image(np.ascontiguousarray(values), np.eye(4)), path)
    return path


def test_a_volume_gives_its_chosen_slices(volume):
    _, batch = StudyPixels(PROCESSOR).batch([study(volume, modality="ct")], Draw())
    assert torch.equal(batch["pixel_values"], PROCESSOR([volume], return_tensors="pt")["pixel_values"])
    assert batch["pixel_values"].shape == (1, 3, 3, 28, 28)


def test_slices_and_windows_of_a_volume_move(volume):
    def slices(strengths: Strengths, epoch: int) -> np.ndarray:
        pixels = StudyPixels(PROCESSOR, augmentation=Augmentation({"ct": strengths}))
        values = pixels.batch([study(volume, modality="ct")], Draw(0, epoch))[1]["pixel_values"][0, :, 0, 14, 14]
        share = values.numpy() * PROCESSOR.image_std[0] + PROCESSOR.image_mean[0]
        return np.round((share * 1500 - 1350 + 1200) / 50, 2)  # slice numbers, in the lung window

    plain = slices(Strengths(), 0)
    np.testing.assert_allclose(np.diff(plain), [6, 5], atol=0.1)
    offsets = {tuple(np.round(slices(Strengths(slices=1.0), epoch) - plain)) for epoch in range(20)}
    assert len(offsets) > 3
    assert all(len(set(each)) == 1 and abs(each[0]) <= 3 for each in offsets)
    assert np.abs(slices(Strengths(window=0.1), 0) - plain).max() > 0.1


def test_slices_found_by_lungs_move_too(volume):
    processor = M3FMImageProcessor(size=28, num_slices=3, slice_selection="lungs")
    pixels = StudyPixels(processor, augmentation=Augmentation({"ct": Strengths(slices=1.0)}))
    batches = [pixels.batch([study(volume, modality="ct")], Draw(0, epoch))[1]["pixel_values"] for epoch in range(5)]
    assert any(not torch.equal(batches[0], other) for other in batches[1:])


def test_jpeg_bytes_in_memory_are_read():
    file = io.BytesIO()
    Image.fromarray(np.full((32, 32), 100, np.uint8)).save(file, "JPEG")
    _, batch = StudyPixels(PROCESSOR).batch([study(file.getvalue())], Draw())
    assert batch["pixel_values"].shape == (1, 1, 3, 28, 28)


def test_cached_tokens_take_the_place_of_pixels(files, tmp_path):
    class Tower(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.factor = torch.nn.Parameter(torch.ones(()))

        def forward(self, pixel_values):
            return type("Output", (), {"last_hidden_state": pixel_values.flatten(2)[:, :, :4] * self.factor})

    from m3fm.data.schema import ImageFile, StudyRecord

    cache = FeatureCache(tmp_path / "cache", Tower(), PROCESSOR)
    content = files[1].read_bytes()
    cache.fill([StudyRecord("1", "set", "cxr", images=(ImageFile(files[0]), ImageFile(Path("x.png"), content)))])
    studies = [study(files[0], {"bytes": content, "path": "other name"}), study(content)]
    kept, batch = CachedTokens(cache).batch(studies, Draw())
    assert kept == studies
    assert CachedTokens(cache).for_evaluation().batch(studies, Draw())[0] == studies
    assert batch["vision_features"].shape == (2, 2, 3, 4) and batch["vision_features"].dtype == torch.float32
    assert batch["image_mask"].tolist() == [[True, True], [True, False]]
    assert torch.equal(batch["vision_features"][1, 0], batch["vision_features"][0, 1])
    assert not batch["vision_features"][1, 1].any()
