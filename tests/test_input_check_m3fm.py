# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""The input check: each finding on images made for it, limits, files, and what the learned part adds."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from m3fm import DEFAULT_CHECKPOINT
from m3fm.chest_image_m3fm import ChestImage, LazyPixels, Remark
from m3fm.input_check_m3fm import CHECK_FILE, KINDS, InputCheck, StudyCheck, TowerLimits, pooled_tokens, same_tower
from m3fm.input_statistics_m3fm import PixelLimits, display_planes, plane_statistics, thumbnail

WIDTH = 4


def smooth(rows: int = 256, columns: int = 256) -> np.ndarray:
    """Returns something like a radiograph: soft, with a full range of grey."""
    y, x = np.mgrid[0 : 1 : rows * 1j, 0 : 1 : columns * 1j]
    lungs = np.exp(-(((x - 0.3) / 0.12) ** 2) - ((y - 0.5) / 0.3) ** 2)
    lungs += np.exp(-(((x - 0.7) / 0.12) ** 2) - ((y - 0.5) / 0.3) ** 2)
    body = 1 / (1 + np.exp((np.abs(x - 0.5) - 0.45) * 60))
    return (0.95 * body * (1 - 0.8 * lungs) * (0.8 + 0.2 * y)).astype(np.float32)


def radiograph(pixels: np.ndarray, **facts) -> ChestImage:
    return ChestImage(np.ascontiguousarray(pixels, dtype=np.float32)[None], **facts)


def chest_ct(slices: int = 40, side: int = 128, spacing: float = 6.0) -> ChestImage:
    """Returns a body of water around lungs of air, in HU."""
    y, x = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j]
    plane = np.where(x**2 + y**2 < 0.8, 40.0, -1000.0)
    plane[(np.abs(x) > 0.25) & (np.abs(x) < 0.7) & (np.abs(y) < 0.5)] = -850
    rng = np.random.default_rng(0)
    volume = plane + rng.normal(0, 20, (slices, side, side))
    return ChestImage(volume.astype(np.float32), "ct", "hu", spacing=(spacing, 1.0, 1.0))


def codes(check: StudyCheck) -> dict[str, str]:
    return {remark.code: remark.severity for remark in check.remarks}


def learned(**limits: float) -> InputCheck:
    """Returns a check whose heads read one number each of the class token: frontal, lateral, CT, other as they are."""
    weights = {
        "kind.weight": np.hstack([np.eye(4), np.zeros((4, WIDTH))]),
        "kind.bias": np.zeros(4),
        "thumbnail.weight": np.zeros((3, 256)),
        "thumbnail.bias": np.array([0.0, -9.0, 0.0]),
        "probe": np.zeros(3),
    }
    for row, head in enumerate(("ap", "inverted", "turned")):
        weights[f"{head}.weight"] = np.eye(2 * WIDTH)[[WIDTH + row]]
        weights[f"{head}.bias"] = np.full(1, -5.0)
    return InputCheck(weights, tower_limits=TowerLimits(**limits))


def tokens(*images: dict[str, float]) -> torch.Tensor:
    """Returns two tokens an image that the heads of `learned` read as these scores."""
    names = [*KINDS, "ap", "inverted", "turned", ""]
    return torch.tensor([[image.get(name, 0.0) for name in names] for image in images]).unflatten(1, (2, WIDTH))


@pytest.fixture
def check() -> InputCheck:
    return InputCheck.statistical()


# --------------------------------------------------------------------------------------------------------------------
# Pixels


def test_a_good_image_has_no_finding(check: InputCheck) -> None:
    found = check.look([radiograph(smooth(), modality="cxr", view="PA")])
    assert (found.verdict, found.reason, found.remarks) == ("ok", "", ())
    assert (found.modality, found.modality_from, found.view, found.view_from) == ("cxr", "file", "PA", "file")
    assert check.look([chest_ct()]).remarks == ()


def test_statistics_of_images_that_can_be_reckoned() -> None:
    even = plane_statistics(np.full((32, 32), 0.5, np.float32))
    assert (even.even_share, even.grey_range, even.levels, even.noise) == (1.0, 0.0, 1, 0.0)
    halves = np.zeros((32, 32), np.float32)
    halves[:, 16:] = 1
    assert (plane_statistics(halves).even_share, plane_statistics(halves).levels) == (0.5, 2)
    white = np.random.default_rng(0).random((256, 256)).astype(np.float32)
    assert plane_statistics(white).noise == pytest.approx(1, abs=0.02)
    assert plane_statistics(smooth()).noise < 0.01


@pytest.mark.parametrize("value", [0.0, 0.3, 1.0])
def test_blank_with_and_without_a_marker(check: InputCheck, value: float) -> None:
    pixels = np.full((300, 260), value)
    assert codes(check.look([radiograph(pixels)])) == {"blank": "refuse"}
    pixels[10:40, 10:25] = 0.6
    found = check.look([radiograph(pixels)])
    assert codes(found) == {"blank": "refuse"}
    assert found.verdict == "refused" and "nothing to see" in found.reason


def test_noise_by_how_much_of_it_there_is(check: InputCheck) -> None:
    rng = np.random.default_rng(0)
    image, noise = smooth(), rng.normal(0, 1, (256, 256))
    assert codes(check.look([radiograph(np.clip(image + 0.03 * noise, 0, 1))])) == {}
    assert codes(check.look([radiograph(np.clip(image + 0.25 * noise, 0, 1))])) == {"noise": "warning"}
    assert codes(check.look([radiograph(np.clip(0.5 + 0.2 * noise, 0, 1))])) == {"noise": "refuse"}


def test_low_contrast_and_few_levels(check: InputCheck) -> None:
    assert codes(check.look([radiograph(0.4 + 0.15 * smooth())])) == {"low_contrast": "warning"}
    assert codes(check.look([radiograph(0.4 + 0.01 * smooth())])) == {"blank": "refuse"}
    mask = (smooth() > 0.5).astype(np.float32)
    found = check.look([radiograph(mask)])
    assert codes(found) == {"low_contrast": "refuse"}
    assert found.remarks[0].value == 2


@pytest.mark.parametrize(
    ("side", "severity"), [(300, None), (96, None), (95, "warning"), (32, "warning"), (31, "refuse")]
)
def test_too_small(check: InputCheck, side: int, severity: str | None) -> None:
    found = check.look([radiograph(smooth(side, 2 * side))])
    assert codes(found).get("too_small") == severity


def test_too_few_slices_by_number_and_by_extent(check: InputCheck) -> None:
    assert codes(check.look([chest_ct(slices=3)])) == {"too_few_slices": "warning"}
    short = check.look([chest_ct(slices=40, spacing=1.0)])
    assert codes(short) == {"too_few_slices": "warning"} and short.remarks[0].value == 40
    # 8 of 40 slices are at hand, the source has them all
    assert codes(check.look([chest_ct().take(range(0, 40, 5))])) == {}
    # a screenshot of one slice is what the model was trained with
    assert codes(check.look([radiograph(smooth(), modality="ct")])) == {"too_few_slices": "info"}
    assert check.look([radiograph(smooth(), modality="ct")]).verdict == "ok"


def test_values_that_no_chest_has(check: InputCheck) -> None:
    volume = chest_ct()
    for pixels in (
        (volume.pixels > -500).astype(np.float32),  # a mask
        np.clip(volume.pixels + 1000, 0, None) / 70,  # counts from 0 up
        np.full_like(volume.pixels, -1000) + np.arange(128),  # air alone
    ):
        found = check.look([replace(volume, pixels=pixels.astype(np.float32))])
        assert codes(found).get("out_of_range") == "refuse", codes(found)
        assert found.verdict == "refused"


def test_volumes_are_not_decoded_whole(check: InputCheck) -> None:
    read: list[int] = []

    def slice_of(number: int) -> np.ndarray:
        read.append(number)
        return chest_ct(slices=1).pixels[0]

    volume = ChestImage(LazyPixels((600, 128, 128), slice_of), "ct", "hu", spacing=(0.5, 1.0, 1.0))
    assert check.look([volume]).verdict == "ok"
    assert len(set(read)) == 16 and max(read) == 599


def test_large_images_are_reduced() -> None:
    (plane,) = display_planes(radiograph(np.ones((2250, 3000))))
    assert plane.shape == (225, 300) and plane.dtype == np.float32
    assert thumbnail(plane).shape == (256,)


# --------------------------------------------------------------------------------------------------------------------
# Tokens


def test_what_is_no_chest_is_refused_or_suspect() -> None:
    check = learned(other_refuse=4.0, other_warn=1.0)
    found = check.look([radiograph(smooth())])
    plain = check.judge(found, tokens({"other": 9.0}))
    assert codes(plain) == {"not_a_chest": "refuse"} and plain.verdict == "refused"
    assert "neither a chest X-ray nor a chest CT" in plain.reason and f"{9 - np.log(3):.1f}" in plain.reason
    assert (plain.modality, plain.view) == (None, None)
    unsure = check.judge(found, tokens({"other": 3.5}))
    assert codes(unsure) == {"not_a_chest": "warning"} and unsure.verdict == "suspect"
    assert check.judge(found, tokens({"frontal": 5.0})).verdict == "ok"
    assert sum(plain.seen.values()) == pytest.approx(1)


def test_modality_and_view_are_told_where_the_file_does_not() -> None:
    check = learned()
    found = check.look([radiograph(smooth())])
    frontal = check.judge(found, tokens({"frontal": 9.0, "ap": 9.0}))
    assert (frontal.modality, frontal.modality_from, frontal.view, frontal.view_from) == (
        "cxr",
        "image",
        "AP",
        "image",
    )
    assert check.judge(found, tokens({"frontal": 9.0})).view == "PA"
    assert check.judge(found, tokens({"frontal": 9.0, "ap": 5.0})).view is None
    slices = check.judge(found, tokens({"ct": 9.0}))
    assert (slices.modality, slices.modality_from, slices.view) == ("ct", "image", None)
    assert check.judge(found, tokens({"ct": 1.0})).modality is None
    stated = check.look([radiograph(smooth(), modality="cxr", view="PA")])
    assert check.judge(stated, tokens({"frontal": 9.0, "ap": 9.0})).view == "PA"


def test_contradictions_to_the_file() -> None:
    check = learned()
    radio = check.look([radiograph(smooth(), modality="cxr", view="PA")])
    assert codes(check.judge(radio, tokens({"ct": 9.0}))) == {"wrong_modality": "warning"}
    assert codes(check.judge(radio, tokens({"frontal": 9.0, "lateral": 0.0}))) == {}
    assert codes(check.judge(radio, tokens({"lateral": 9.0}))) == {"view": "warning"}
    assert check.judge(radio, tokens({"lateral": 9.0})).modality == "cxr"
    volume = check.look([chest_ct()])
    assert codes(check.judge(volume, tokens(*[{"frontal": 9.0}] * 40))) == {"wrong_modality": "warning"}


def test_inverted_and_turned_radiographs_are_said() -> None:
    check, found = learned(), learned().look([radiograph(smooth())])
    assert codes(check.judge(found, tokens({"frontal": 9.0, "inverted": 9.0}))) == {"inverted": "warning"}
    assert codes(check.judge(found, tokens({"frontal": 9.0, "turned": 9.0}))) == {"turned": "warning"}
    assert codes(check.judge(found, tokens({"ct": 9.0, "turned": 9.0, "inverted": 9.0}))) == {}


def test_lateral_alone_is_said_and_beside_a_frontal_view_not() -> None:
    check = learned()
    both = check.look([radiograph(smooth(), view="PA"), radiograph(smooth(), view="LATERAL")])
    assert (both.view, both.images) == (None, 2)
    assert codes(check.judge(both, tokens({"frontal": 9.0}, {"lateral": 9.0}))) == {}
    alone = check.look([radiograph(smooth(), view="LATERAL")])
    assert codes(check.judge(alone, tokens({"lateral": 9.0}))) == {"view": "warning"}


def test_the_worst_radiograph_and_the_mean_of_slices_decide() -> None:
    check = learned(other_refuse=4.0)
    views = check.look([radiograph(smooth(), modality="cxr"), radiograph(smooth(), modality="cxr")])
    found = check.judge(views, tokens({"frontal": 9.0}, {"other": 9.0}))
    assert found.verdict == "refused" and found.reason.startswith("image 2 of 2: ")
    volume = check.look([chest_ct(slices=40).take(range(0, 40, 10))])
    mixed = tokens({"other": 9.0}, {"ct": 9.0}, {"ct": 9.0}, {"ct": 9.0})
    assert check.judge(volume, mixed).verdict == "ok"
    # a volume that is no CT is refused once
    pages = replace(chest_ct(slices=2), modality=None, units="intensity", pixels=np.stack([smooth()] * 2))
    refused = check.judge(check.look([pages]), tokens({"other": 9.0}, {"other": 9.0}))
    assert [remark.code for remark in refused.remarks] == ["not_a_chest"]
    # the same slices as four files that do not say what they are
    files = check.look([radiograph(smooth())] * 4)
    assert check.judge(files, tokens(*[{"ct": 9.0}] * 4)).verdict == "ok"


def test_padding_is_left_out_and_wrong_tokens_are_refused() -> None:
    check = learned(other_refuse=4.0)
    found = check.look([radiograph(smooth())])
    padded = tokens({"frontal": 9.0}, {"other": 9.0})
    assert check.judge(found, padded, torch.tensor([True, False])).verdict == "ok"
    with pytest.raises(ValueError, match="tokens: got shape"):
        check.judge(found, torch.zeros(1, 2, WIDTH + 1))


def test_pooled_tokens_are_the_first_and_the_mean_of_the_rest() -> None:
    rows = pooled_tokens(torch.tensor([[[1.0, 2.0], [3.0, 4.0], [5.0, 8.0]]]))
    assert rows.tolist() == [[1.0, 2.0, 4.0, 6.0]]


def test_inverted_radiographs_are_put_upright() -> None:
    check = learned()
    check.weights["thumbnail.weight"][1] = -thumbnail(smooth())
    images = [radiograph(1 - smooth(), modality="cxr"), radiograph(smooth(), modality="cxr")]
    upright, found = check.upright(images, check.look(images))
    assert np.allclose(upright[0].pixels[0], smooth(), atol=1e-6) and upright[1] is images[1]
    assert codes(found) == {"inverted": "warning"} and "were exchanged" in found.reason
    assert images[0].remarks == () and upright[0].remarks[0].code == "inverted"
    # a CT, and a check without the learned part, are left alone
    slices = replace(images[0], modality="ct")
    assert check.upright([slices], check.look([slices]))[0][0] is slices
    assert InputCheck.statistical().upright(images, found)[0] == images


# --------------------------------------------------------------------------------------------------------------------
# Files


def test_saved_and_loaded_it_says_the_same(tmp_path: Path) -> None:
    check = learned(other_refuse=7.25)
    check.pixel_limits = PixelLimits(small_side=77)
    check.save_pretrained(tmp_path)
    loaded = InputCheck.from_pretrained(tmp_path)
    assert (loaded.pixel_limits, loaded.tower_limits) == (check.pixel_limits, check.tower_limits)
    found = check.look([radiograph(smooth())])
    given = tokens({"frontal": 2.5, "ap": 8.0})
    assert loaded.judge(found, given) == check.judge(found, given)


def test_a_checkpoint_without_the_file_is_checked_by_pixels(tmp_path: Path) -> None:
    check = InputCheck.from_pretrained(tmp_path)
    assert not check.reads_tokens
    found = check.look([radiograph(np.zeros((300, 300)))])
    assert found.verdict == "refused"
    assert check.judge(found, torch.zeros(1, 5, 99)) is found


@pytest.mark.parametrize("content", [b"", b"not safetensors at all", b"\x02\x00\x00\x00\x00\x00\x00\x00{}"])
def test_a_damaged_file_is_an_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / CHECK_FILE).write_bytes(content)
    with pytest.raises(ValueError, match=CHECK_FILE):
        InputCheck.from_pretrained(tmp_path)


def test_another_tower_is_not_judged(tiny_model) -> None:
    tower = getattr(tiny_model, tiny_model.base_model_prefix).vision_model
    from m3fm.input_check_m3fm import probe_tower

    check = learned()
    check.weights["probe"] = probe_tower(tower)
    assert check.for_tower(tower) is check
    assert same_tower(check.weights["probe"], tower.half().float())
    with torch.no_grad():
        list(tower.parameters())[3].add_(0.05)
    other = check.for_tower(tower)
    assert not other.reads_tokens and "thumbnail.weight" in other.weights


# --------------------------------------------------------------------------------------------------------------------
# As data


def test_as_data_it_is_json_and_keeps_the_remarks_of_reading(check: InputCheck) -> None:
    image = radiograph(np.zeros((20, 300)), modality="cxr").remarked(Remark("colour", "made grey"))
    data = check.look([image]).as_dict()
    assert list(data) == ["verdict", "modality", "modality_from", "view", "view_from", "images", "findings"]
    assert [each["code"] for each in data["findings"]] == ["colour", "too_small", "blank"]
    assert json.loads(json.dumps(data)) == data
    judged = learned().judge(check.look([radiograph(smooth())]), tokens({"other": 9.0})).as_dict()
    assert json.loads(json.dumps(judged)) == judged and judged["verdict"] == "refused"


def test_the_verdict_is_the_gravest_remark() -> None:
    info, warning, refuse = (Remark("view", severity, severity) for severity in ("info", "warning", "refuse"))
    assert StudyCheck((info,)).verdict == "ok"
    assert StudyCheck((info, warning)).verdict == "suspect"
    assert StudyCheck((warning, refuse, info)).verdict == "refused"
    assert StudyCheck((warning, refuse, info)).reason == "refuse"


# --------------------------------------------------------------------------------------------------------------------
# The file that ships


def test_the_shipped_file_is_small_and_belongs_to_the_shipped_tower() -> None:
    path = Path(DEFAULT_CHECKPOINT) / CHECK_FILE
    assert path.stat().st_size < 100_000
    check = InputCheck.from_pretrained(DEFAULT_CHECKPOINT)
    assert check.reads_tokens and check.tower_limits.other_refuse > check.tower_limits.other_warn


@pytest.mark.realdata
def test_real_radiographs_are_put_upright_and_not_refused(data_root: Path) -> None:
    from m3fm.imaging_m3fm import read_image

    check = InputCheck.from_pretrained(DEFAULT_CHECKPOINT)
    paths = sorted((data_root / "nih_chestxray14_sample" / "images").iterdir())[:20]
    for path in paths:
        image = read_image(path)
        found = check.look([image])
        assert found.verdict == "ok" and path.stem not in json.dumps(found.as_dict())
        assert check.upright([image], found)[0][0] is image
    inverted = [replace(image, pixels=1 - image.pixels) for image in map(read_image, paths)]
    exchanged = [check.upright([image], check.look([image]))[0][0] is not image for image in inverted]
    assert sum(exchanged) >= 18
