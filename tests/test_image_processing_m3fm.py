# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import PretrainedConfig, ProcessorMixin
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from m3fm.chest_image_m3fm import ChestImage, LazyPixels
from m3fm.image_processing_m3fm import M3FMImageProcessor, letterbox, letterbox_place
from m3fm.slices_m3fm import choose_slices

MEAN, STD = (np.asarray(v, np.float32)[:, None, None] for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))


@pytest.fixture
def processor() -> M3FMImageProcessor:
    return M3FMImageProcessor(size=32)


@pytest.fixture
def radiograph() -> Image.Image:
    """A colour picture, higher (60) than wide (40)."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 40, 3), dtype=np.uint8))


def unnormalised(pixel_values: torch.Tensor) -> np.ndarray:
    """(3, H, W) as the model gets it, back to 0..1."""
    return pixel_values.numpy() * STD + MEAN


def test_path_pil_array_and_tensor_give_identical_tensors(processor, radiograph, tmp_path):
    for name in ("a.png", "a.jpg"):
        path = tmp_path / name
        radiograph.save(path)
        opened = Image.open(path)
        array = np.asarray(opened)
        expected = processor(images=path, return_tensors="pt")
        for source in (str(path), path.read_bytes(), opened, array, torch.tensor(array).permute(2, 0, 1)):
            got = processor(images=source, return_tensors="pt")
            assert torch.equal(got["pixel_values"], expected["pixel_values"])
        converted = processor(images=opened.convert("RGB"), return_tensors="pt")  # as transformers' pipelines load
        assert torch.equal(converted["pixel_values"], expected["pixel_values"])


def test_shapes_types_and_mask_of_studies(processor, radiograph):
    one = processor(images=radiograph, return_tensors="pt")
    assert set(one) == {"pixel_values", "image_mask"}
    assert one["pixel_values"].shape == (1, 1, 3, 32, 32) and one["pixel_values"].dtype == torch.float32
    assert one["image_mask"].dtype == torch.bool
    assert processor(images=[radiograph] * 3, return_tensors="pt")["pixel_values"].shape == (3, 1, 3, 32, 32)
    mixed = processor(images=[radiograph, [radiograph, radiograph]], return_tensors="pt")
    assert mixed["image_mask"].tolist() == [[True, False], [True, True]]
    assert torch.equal(mixed["pixel_values"][0, 0], one["pixel_values"][0, 0])
    assert (mixed["pixel_values"][0, 1] == 0).all()
    assert isinstance(processor(images=radiograph)["pixel_values"], np.ndarray)


def test_letterbox_keeps_the_aspect_on_black(processor, radiograph):
    got = unnormalised(processor(images=radiograph, return_tensors="pt")["pixel_values"][0, 0])
    columns = got[0].max(axis=0) > 1e-4
    assert columns.sum() == 21 and columns[5:26].all()  # 40 / 60 * 32 columns in the middle
    np.testing.assert_allclose(got[0], got[2], atol=1e-6)
    same = np.random.default_rng(0).random((32, 32), dtype=np.float32)
    np.testing.assert_array_equal(letterbox(same, 32, 32, 3), same)
    assert letterbox(np.ones((1, 500), np.float32), 32, 32, 3).sum() == 32
    edge = np.zeros((64, 64), np.float32)
    edge[:, 32:] = 1
    resized = letterbox(edge, 128, 128, 3)
    assert resized.min() == 0 and resized.max() == 1


def test_downscaling_is_antialiased(processor):
    checker = (np.indices((256, 256)).sum(axis=0) % 2 * 255).astype(np.uint8)
    got = unnormalised(processor(images=checker, return_tensors="pt")["pixel_values"][0, 0])
    np.testing.assert_allclose(got[:, 2:-2, 2:-2], 0.5, atol=0.02)


def test_ct_windows_in_hu():
    volume = np.full((1, 4, 4), -600, np.float32)
    volume[0, 0, :3] = [-1350, 150, 3000]
    ct = ChestImage(volume, "ct", "hu")
    settings = {"size": 4, "image_mean": [0, 0, 0], "image_std": [1, 1, 1]}
    lung = M3FMImageProcessor(**settings)(images=ct)["pixel_values"][0, 0]
    np.testing.assert_allclose(lung[:, 0], [[0, 1, 1, 0.5]] * 3)
    three = M3FMImageProcessor(**settings, ct_windows=[[-600, 1500], [40, 400], [300, 1500]])
    channels = three(images=ct)["pixel_values"][0, 0]
    np.testing.assert_allclose(channels[:, 0, 1], [1, 0.775, 0.4], rtol=1e-6)


def test_windows_by_name_are_kept_as_numbers():
    named = M3FMImageProcessor(ct_windows=["lung", "mediastinum", "bone"])
    assert named.ct_windows == [[-600, 1500], [40, 400], [400, 1800]]
    assert M3FMImageProcessor(ct_windows=["lung", [0, 100], "bone"]).ct_windows[1] == [0, 100]
    assert M3FMImageProcessor(ct_windows="mediastinum").ct_windows == [[40, 400]]
    assert M3FMImageProcessor(**named.to_dict()).ct_windows == named.ct_windows


def test_slices_come_from_the_middle_of_a_volume(processor):
    volume = np.broadcast_to(np.arange(100, dtype=np.float32)[:, None, None] * 10 - 1000, (100, 8, 8))
    output = processor(images=volume, return_tensors="pt", ct_windows=[[-500, 1000]])
    assert output["pixel_values"].shape == (1, 8, 3, 32, 32)
    levels = [unnormalised(each)[0, 16, 16] * 100 for each in output["pixel_values"][0]]
    np.testing.assert_allclose(levels, choose_slices(100, 8), atol=0.01)


def volume(total: int) -> np.ndarray:
    """HU that tell each slice, (total, 8, 8): -1000, -990, ..."""
    return np.broadcast_to(np.arange(total, dtype=np.float32)[:, None, None] * 10 - 1000, (total, 8, 8)).copy()


def lazily(volume: np.ndarray) -> tuple[ChestImage, list[int]]:
    """A CT whose slices are decoded when asked for, and the list of those that were."""
    decoded: list[int] = []

    def read(number: int) -> np.ndarray:
        decoded.append(number)
        return volume[number]

    return ChestImage(LazyPixels(volume.shape, read), "ct", "hu"), decoded


def test_lazy_volumes_decode_what_the_model_sees_and_give_the_same(processor):
    lazy, decoded = lazily(volume(100))
    expected = processor(images=volume(100))["pixel_values"]
    np.testing.assert_array_equal(processor(images=lazy)["pixel_values"], expected)
    assert decoded == choose_slices(100, 8).tolist()


def test_a_study_that_was_read_is_taken_as_it_is(processor, radiograph):
    lazy, decoded = lazily(volume(100))
    (read,) = processor.read_study([lazy])
    assert read.pixels.shape == (8, 8, 8) and read.source_slices == 100
    assert read.slice_numbers == (15, 25, 35, 45, 55, 65, 75, 85)
    again = processor(images=[[read]], num_slices=2, slice_selection="lungs")["pixel_values"]
    np.testing.assert_array_equal(again, processor(images=lazy)["pixel_values"])
    assert len(decoded) == 16
    views = processor.read_study([radiograph, radiograph])
    assert [view.slice_numbers for view in views] == [None, None]
    both = processor(images=[views])["pixel_values"]
    np.testing.assert_array_equal(both, processor(images=[[radiograph, radiograph]])["pixel_values"])
    assert len(processor.read_study(radiograph)) == 1


def test_every_slice_of_a_volume(processor):
    lazy, decoded = lazily(volume(65))
    with pytest.raises(ValueError, match=r"study 0 of the batch has 65 slices.*max_images to be set to 65"):
        processor(images=lazy, slice_selection="all")
    with pytest.raises(ValueError, match="the study has 65 slices"):
        M3FMImageProcessor(slice_selection="all").read_study(lazy)
    assert decoded == []
    assert processor(images=lazy, slice_selection="all", max_images=65)["image_mask"].sum() == 65


def test_slices_around_the_lungs(processor):
    hu = np.full((40, 32, 32), 40, dtype=np.float32)
    hu[30:38, 8:24, 8:24] = -850
    (read,) = M3FMImageProcessor(slice_selection="lungs", num_slices=4).read_study(ChestImage(hu, "ct", "hu"))
    assert read.slice_numbers == (31, 33, 35, 37)
    got = processor(images=ChestImage(hu, "ct", "hu"), slice_selection="lungs", num_slices=4)["pixel_values"]
    np.testing.assert_array_equal(got, processor(images=read)["pixel_values"])


@pytest.fixture
def series(tmp_path) -> list[Path]:
    """Seventy DICOM slices whose order by file name is the reverse of that by position; each of one HU."""
    pytest.importorskip("pydicom")
    from tests.dicom_files import ct_slice, write_dicom

    folder = tmp_path / "series"
    folder.mkdir()
    return [
        write_dicom(
            folder / f"{70 - n:02}.dcm",
            ct_slice(np.full((8, 8), 24 + 10 * n, np.int16), position=(0.0, 0.0, 2.0 * n), number=n + 1),
        )
        for n in range(70)
    ]


def test_dicom_slices_and_their_folder_are_one_volume(processor, series):
    """Seventy files are more than `max_images`, the eight slices of their volume are not."""
    expected = processor(images=volume(70), return_tensors="pt")["pixel_values"]
    shuffled = series[40:] + series[:40]
    for study in (series[0].parent, str(series[0].parent), [shuffled], [[path.read_bytes() for path in shuffled]]):
        assert torch.equal(processor(images=study, return_tensors="pt")["pixel_values"], expected)
    batch = processor(images=[series[0].parent, np.eye(8, dtype=np.float32)], return_tensors="pt")
    assert batch["image_mask"].sum(dim=1).tolist() == [8, 1]
    (read,) = processor.read_study(shuffled)
    assert read.slice_numbers == tuple(choose_slices(70, 8)) and read.source_slices == 70
    assert torch.equal(processor(images=[[read]], return_tensors="pt")["pixel_values"], expected)


def test_borders_are_kept_unless_cropped():
    inner = np.random.default_rng(0).uniform(0.3, 0.9, (60, 60)).astype(np.float32)
    bordered = np.pad(inner, 20)
    keep, crop = M3FMImageProcessor(size=60), M3FMImageProcessor(size=60, cxr_border="crop")
    cropped = crop(images=bordered)["pixel_values"]
    np.testing.assert_array_equal(cropped, keep(images=inner)["pixel_values"])
    np.testing.assert_array_equal(keep(images=bordered, cxr_border="crop")["pixel_values"], cropped)
    assert not np.array_equal(keep(images=bordered)["pixel_values"], cropped)
    (read,) = crop.read_study(bordered)
    assert read.pixels.shape == (1, 60, 60) and [remark.code for remark in read.remarks] == ["border_cropped"]
    np.testing.assert_array_equal(crop(images=[[read]])["pixel_values"], cropped)
    assert keep.read_study(bordered)[0].remarks == ()


@pytest.mark.parametrize("shape", [(1, 1), (1, 10_000), (10_000, 1), (2, 3)])
@pytest.mark.parametrize("rule", ["keep", "crop"])
def test_any_shape_fills_its_place(processor, shape, rule):
    pixels = ChestImage(np.full((1, *shape), 1, dtype=np.float32))
    got = processor(images=pixels, cxr_border=rule, return_tensors="pt")["pixel_values"][0, 0]
    _, _, rows, columns = letterbox_place(*shape, 32, 32)
    assert max(rows, columns) == 32 and min(rows, columns) >= 1
    assert unnormalised(got)[0].sum() == pytest.approx(rows * columns, abs=1e-2)


@pytest.mark.parametrize(
    ("pixels", "units", "message"),
    [
        ([[0, np.nan]], "intensity", "NaN or infinite"),
        ([[0, np.inf]], "hu", "NaN or infinite"),
        ([[0, 255]], "intensity", "display values of 0 to 255, expected 0"),
    ],
)
def test_images_made_by_hand_with_wrong_values_are_refused(processor, pixels, units, message):
    image = ChestImage(np.array([pixels], dtype=np.float32), None, units)
    with pytest.raises(ValueError, match=f"study 1 of the batch: got {message}"):
        processor(images=[np.eye(4, dtype=np.float32), image])


def test_settings_survive_saving_and_the_auto_class(tmp_path, monkeypatch):
    class Config(PretrainedConfig):
        model_type = "m3fm-image-processor-test"

    AutoImageProcessor.register(Config, image_processor_classes={"pil": M3FMImageProcessor}, exist_ok=True)
    saved = M3FMImageProcessor(size=48, cxr_window=None, ct_windows=[[40, 400]], num_slices=3)
    saved.save_pretrained(tmp_path)
    Config().save_pretrained(tmp_path)
    for loaded in (
        AutoImageProcessor.from_pretrained(tmp_path),
        M3FMImageProcessor.from_pretrained(tmp_path),
        M3FMImageProcessor.from_dict(saved.to_dict()),
    ):
        assert type(loaded) is M3FMImageProcessor
        assert (loaded.size, loaded.cxr_window, loaded.num_slices) == ({"height": 48, "width": 48}, None, 3)
        assert loaded.ct_windows == [[40.0, 400.0]] and loaded.resample == 3
    assert M3FMImageProcessor.from_pretrained(tmp_path, num_slices=5).num_slices == 5
    assert json.loads((tmp_path / "preprocessor_config.json").read_text())["cxr_window"] is None


def test_nests_in_a_processor_and_reads_files_there(tmp_path, radiograph):
    class OnlyImages(ProcessorMixin):
        def __init__(self, image_processor=None):
            super().__init__(image_processor)

    path = tmp_path / "a.png"
    radiograph.save(path)
    images = M3FMImageProcessor(size=32)
    joint = OnlyImages(images)
    got = joint(images=[str(path), [path, radiograph]], return_tensors="pt")
    assert got["pixel_values"].shape == (2, 2, 3, 32, 32)
    assert torch.equal(got["pixel_values"][0, 0], images(images=path, return_tensors="pt")["pixel_values"][0, 0])
    assert joint(images=path, size={"height": 16, "width": 16}, return_tensors="pt")["pixel_values"].shape[-1] == 16
    joint.save_pretrained(tmp_path / "saved")
    nested = json.loads((tmp_path / "saved" / "processor_config.json").read_text())["image_processor"]
    assert nested["image_processor_type"] == "M3FMImageProcessor"
    assert M3FMImageProcessor.from_pretrained(tmp_path / "saved").size == {"height": 32, "width": 32}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ct_windows": ["lungs"]}, r"ct_windows\[0\]: got 'lungs', expected one of.*'mediastinum'"),
        ({"cxr_border": "cut"}, "cxr_border: got 'cut', expected one of"),
        ({"slice_selection": "random"}, "slice_selection: got 'random', expected one of"),
        ({"ct_windows": [[-600]]}, r"ct_windows\[0\].*2 numbers"),
        ({"ct_windows": [[-600, 1500], [40, 400]]}, "one or three"),
        ({"ct_windows": [[-600, 0]]}, "width above 0"),
        ({"ct_windows": [[-600, float("nan")]]}, "2 numbers"),
        ({"cxr_window": [60, 40]}, "low < high"),
        ({"size": {"shortest_edge": 224}}, "height and width"),
        ({"size": 0}, "at least 1"),
        ({"size": "224"}, "expected"),
        ({"resample": 17}, "resample: got 17"),
        ({"image_mean": [0.5]}, "3 numbers"),
        ({"image_std": [0.2, 0.2, 0]}, "above 0"),
        ({"num_slices": 0}, "at least 1"),
        ({"num_slices": 2.5}, "whole number"),
        ({"num_slices": 9, "max_images": 8}, "at most max_images"),
        ({"do_resize": False}, "unknown image processor settings"),
    ],
)
def test_wrong_settings_are_refused(settings, message, radiograph):
    with pytest.raises(ValueError, match=message):
        M3FMImageProcessor(**settings)
    with pytest.raises(ValueError, match=message):
        M3FMImageProcessor()(images=radiograph, **settings)


def test_wrong_batches_are_refused(processor, radiograph, tmp_path):
    with pytest.raises(ValueError, match="empty list"):
        processor(images=[])
    with pytest.raises(ValueError, match="the study has no image"):
        processor.read_study([])
    with pytest.raises(ValueError, match="study 1 of the batch has no image"):
        processor(images=[radiograph, []])
    with pytest.raises(ValueError, match="more than 64 images"):
        processor(images=[[radiograph] * 65])
    with pytest.raises(ValueError, match=r"missing\.png: no such file"):
        processor(images=[radiograph, tmp_path / "missing.png"])


@pytest.mark.realdata
def test_radiographs_and_volumes_share_a_batch(data_root):
    fixtures = data_root / "fixtures"
    output = M3FMImageProcessor()(
        images=[fixtures / "cxr_siim_nih_jpeg.dcm", fixtures / "ct_thorax_cropped_1p5mm.nii.gz"], return_tensors="pt"
    )
    assert output["pixel_values"].shape == (2, 8, 3, 224, 224)
    assert output["image_mask"].sum(dim=1).tolist() == [1, 8]
    assert torch.isfinite(output["pixel_values"]).all()
