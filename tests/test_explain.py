# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Explanations: geometry of the maps, what the methods compute, slice weights, phrases, evidence, errors."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from m3fm import M3FMForReportGeneration, M3FMModel
from m3fm.chest_image_m3fm import ChestImage
from m3fm.explain import METHODS, Explainer, Target, detect_language
from m3fm.explain_evidence import split_sentences
from m3fm.explain_maps import HeatMap, ImageMap, to_image
from m3fm.image_processing_m3fm import letterbox, letterbox_place

SIZE, PATCH = 112, 14  # a grid of 8 x 8


@pytest.fixture
def explainer(tiny_model, tiny_processor) -> Explainer:
    return Explainer(tiny_model, tiny_processor)


@pytest.fixture
def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (40, 30), dtype=np.uint8)


def brightness_tokens(pixels: torch.Tensor) -> torch.Tensor:
    """Gives each patch the token (brightness, 1, 0, ...), so that what is bright is known to be relevant."""
    patches = nn.functional.avg_pool2d(pixels[0, :, :1], PATCH).flatten(1)  # (N, P)
    tokens = torch.zeros(*patches.shape, 32)
    tokens[..., 0] = patches
    tokens[..., 1] = 1
    return tokens[None]


@pytest.fixture
def seeing(tiny_model, tiny_processor, monkeypatch) -> tuple[Explainer, Target]:
    """Returns an explainer whose score is the mean brightness of a study, and the direction of that score."""
    processor = tiny_processor.image_processor
    monkeypatch.setattr(processor, "size", {"height": SIZE, "width": SIZE})
    model = tiny_model.model
    monkeypatch.setattr(model, "get_vision_features", brightness_tokens)
    width, queries = 32, tiny_model.config.num_pooling_queries
    model.study_pooling.norm = nn.Identity()
    nn.init.zeros_(model.study_pooling.queries)  # every token weighs the same
    linear = nn.Linear(width * queries, tiny_model.config.projection_dim, bias=False)
    nn.init.zeros_(linear.weight)
    with torch.no_grad():
        linear.weight[0, 0] = 1  # mean brightness
        linear.weight[1, 1] = 1000  # so long that the norm is constant
    model.visual_projection = linear
    direction = torch.zeros(tiny_model.config.projection_dim)
    direction[0] = 1
    return Explainer(tiny_model, tiny_processor), Target("bright", None, "en", direction)


# --------------------------------------------------------------------------------------------------------------------
# Geometry


@pytest.mark.parametrize("shape", [(224, 224), (300, 90), (90, 300), (1, 500), (2000, 1500), (33, 32)])
def test_letterbox_place_is_where_the_letterbox_puts_the_image(shape):
    boxed = letterbox(np.ones(shape, dtype=np.float32), 56, 70, Image.Resampling.BILINEAR)
    rows, columns = np.flatnonzero(boxed.any(axis=1)), np.flatnonzero(boxed.any(axis=0))
    top, left, height, width = letterbox_place(*shape, 56, 70)
    assert (rows[0], rows[-1] + 1, columns[0], columns[-1] + 1) == (top, top + height, left, left + width)


def test_map_has_the_geometry_of_the_image():
    grid = np.arange(16.0).reshape(4, 4)
    square = to_image(grid, (14, 14), (56, 56), (112, 112))
    assert square.shape == (112, 112)
    assert square.dtype == np.float32
    assert square[0, 0] == 0  # before the centre of the first patch nothing is extrapolated
    assert square[-1, -1] == 15
    assert square[14, 14] == pytest.approx(0, abs=0.1)  # the centre of the first patch
    assert square[14, 42] == pytest.approx(1, abs=0.1)
    assert to_image(np.full((4, 4), 3.0), (14, 14), (56, 56), (70, 31)) == pytest.approx(np.full((70, 31), 3.0))


def test_patches_of_padding_do_not_count():
    grid = np.full((4, 4), 100.0)
    grid[:, 1:3] = 1  # an image twice as high as wide fills the two middle columns
    assert to_image(grid, (14, 14), (56, 56), (200, 100)).max() == 1


def test_a_very_thin_image_has_a_map():
    assert to_image(np.ones((4, 4)), (14, 14), (56, 56), (1, 500)).shape == (1, 500)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(160, 160), (300, 150), (120, 320), (61, 97)])
@pytest.mark.parametrize("place", [(0.25, 0.7), (0.8, 0.3), (0.5, 0.5)])
def test_peak_is_where_the_bright_square_is(seeing, method, shape, place):
    explainer, target = seeing
    pixels = np.full(shape, 0.1, dtype=np.float32)
    side = max(shape) / 8  # a patch
    row, column = (int(share * length) for share, length in zip(place, shape, strict=True))
    pixels[
        max(0, int(row - side / 2)) : int(row + side / 2), max(0, int(column - side / 2)) : int(column + side / 2)
    ] = 1
    heat_map = explainer.heat_map(ChestImage(pixels[None]), target, method, window=1)
    assert heat_map.maps[0].shape == shape
    assert np.hypot(*np.subtract(heat_map.top.peak, (row, column))) <= side
    x, y, width, height = heat_map.top.box
    assert x <= column < x + width
    assert y <= row < y + height


# --------------------------------------------------------------------------------------------------------------------
# What the methods compute


def test_similarity_is_what_the_score_loses_without_the_tokens(explainer, picture):
    study = explainer.read([picture, picture.T.copy()])
    target = explainer.target("pleural effusion")
    grids = explainer._occlusion(study, target.direction, 1)
    towers = explainer.model.model
    with torch.inference_mode():
        keys = towers.study_pooling.norm(study.tokens)
        logits = torch.einsum("qc,nsc->qns", towers.study_pooling.queries, keys) * keys.shape[-1] ** -0.5
        logits[:, 1, 1 + 2] = -torch.inf  # patch 2 of the second image, after its class token
        pooled = torch.einsum("qns,nsc->qc", logits.flatten(1).softmax(-1).view_as(logits), keys)
        left = explainer._score(pooled[None], target.direction)
    heat_map = explainer.heat_map(study, target)
    assert grids[1].flatten()[2].item() == pytest.approx(heat_map.score - left.item(), abs=1e-6)


def test_score_is_that_of_the_model(explainer, picture):
    study = explainer.read([picture, picture.T.copy()])
    target = explainer.target("There is a nodule in the left lung.")
    expected = explainer.embed_study(study) @ explainer.embed_texts([target.phrase])[0]
    assert explainer.heat_map(study, target).score == pytest.approx(float(expected), abs=1e-6)
    label = explainer.label_target("nodule", "en")
    assert explainer.heat_map(study, label).score == pytest.approx(
        float(explainer.embed_study(study) @ label.direction.numpy()), abs=1e-6
    )


def test_gradient_is_that_of_a_linear_score(seeing):
    explainer, target = seeing
    values = np.linspace(0.1, 0.9, 64, dtype=np.float32).reshape(8, 8)
    pixels = np.kron(values, np.ones((PATCH, PATCH), dtype=np.float32))
    study = explainer.read(ChestImage(pixels[None]))
    (grid,) = explainer._gate_gradient(study, target.direction, 1)
    brightness = study.tokens[0, :, 0].view(8, 8)
    # The score is the weighted mean of brightness, over a norm of 1000: its derivative by a weight is centred.
    expected = (brightness - brightness.mean()) / 64 / 1000
    assert torch.allclose(grid, expected, atol=1e-7)


def test_gradient_is_the_slope_of_the_score(explainer, picture):
    explainer.model.double()
    study = explainer.read(picture)
    study = type(study)(study.images, study.tokens.double(), study.grid)
    direction = explainer.target("nodule").direction.double()
    explainer._score = lambda pooled, d: (
        nn.functional.normalize(explainer.model.model.visual_projection(pooled.flatten(1)), dim=-1) @ d
    )
    grid = explainer._gate_gradient(study, direction, 1)[0]
    with torch.inference_mode():
        keys, weights = explainer._attention(study.tokens)

    @torch.inference_mode()
    def score(gate: float) -> float:
        gates = torch.ones_like(weights)
        gates[:, 0, 1] = gate
        gated = weights * gates
        pooled = torch.einsum("qns,nsc->qc", gated, keys) / gated.sum(dim=(1, 2))[:, None]
        return explainer._score(pooled[None], direction).item()

    assert grid[0, 0].item() == pytest.approx((score(1 + 1e-5) - score(1 - 1e-5)) / 2e-5, rel=1e-5)


def test_explaining_leaves_no_gradient_and_repeats(explainer, picture):
    for method in METHODS:
        first, second = (explainer.heat_map(picture, "pleural effusion", method) for _ in range(2))
        assert np.array_equal(first.maps[0], second.maps[0])
        assert first.summary() == second.summary()
    assert all(parameter.grad is None for parameter in explainer.model.parameters())


# --------------------------------------------------------------------------------------------------------------------
# Studies


@pytest.mark.parametrize("method", METHODS)
def test_volume_has_a_map_and_weights_for_each_slice(explainer, method):
    volume = np.random.default_rng(0).uniform(-1000, 400, (9, 20, 24)).astype(np.float32)
    heat_map = explainer.heat_map(volume, "磨玻璃影", method)
    assert [each.shape for each in heat_map.maps] == [(20, 24)] * 2
    assert [each.slice for each in heat_map.images] == [2, 6]  # those that the image processor chooses
    assert {each.num_slices for each in heat_map.images} == {9}
    assert {each.modality for each in heat_map.images} == {"ct"}
    weights = heat_map.slice_weights
    assert weights["attention"].sum() == pytest.approx(1)
    assert weights["relevance"].sum() == pytest.approx(1)
    assert heat_map.top.region.third in ("anterior", "central", "posterior")


def test_a_single_image_has_all_the_weight(explainer, picture):
    heat_map = explainer.heat_map(picture, "nodule")
    assert heat_map.slice_weights["attention"] == pytest.approx([1])
    assert heat_map.slice_weights["relevance"] is None
    assert heat_map.images[0].drop is None


def test_the_slice_that_matters_weighs_most(seeing):
    explainer, target = seeing
    pixels = np.full((2, 60, 60), 0.1, dtype=np.float32)
    pixels[1, 20:40, 20:40] = 1
    heat_map = explainer.heat_map(ChestImage(pixels, "ct"), target)
    assert heat_map.top.slice == 1
    assert heat_map.images[1].drop > 0 > heat_map.images[0].drop
    assert heat_map.slice_weights["attention"] == pytest.approx([0.5, 0.5])


def test_views_of_a_study_keep_their_own_geometry(explainer, picture):
    heat_map = explainer.heat_map([picture, picture.T.copy()], "nodule")
    assert [each.shape for each in heat_map.maps] == [(40, 30), (30, 40)]
    assert [each.image for each in heat_map.images] == [0, 1]


def image_map(values: np.ndarray, modality: str | None = "cxr", view: str | None = "PA") -> ImageMap:
    values = np.asarray(values, dtype=np.float32)
    return ImageMap(values, np.zeros_like(values), 0, 0, 1, modality, view, 1.0, None, None)


@pytest.mark.parametrize(
    ("place", "modality", "view", "text"),
    [
        ((5, 10), "cxr", "PA", "right, upper zone"),
        ((50, 90), "cxr", "AP", "left, middle zone"),
        ((95, 50), "cxr", None, "midline, lower zone"),
        ((95, 10), "cxr", "LATERAL", "lower zone"),
        ((95, 10), "ct", None, "right, posterior"),
        ((5, 80), None, None, "left, top of the image"),
    ],
)
def test_region_is_named_from_the_patient(place, modality, view, text):
    values = np.zeros((100, 100))
    values[place] = 1
    assert image_map(values, modality, view).region.text == text


def test_box_holds_the_part_that_hangs_together_with_the_peak():
    values = np.zeros((60, 80))
    values[10:20, 30:50] = 0.6
    values[12, 40] = 1
    values[40:45, 5:10] = 0.9  # another part
    assert image_map(values).box == (30, 10, 20, 10)
    assert image_map(-np.ones((4, 4))).box is None


def test_box_of_a_large_image_is_near_enough():
    values = np.zeros((1000, 700))
    values[301:500, 203:300] = 1
    x, y, width, height = image_map(values).box
    assert abs(np.array([x, y, width, height]) - [203, 301, 97, 199]).max() <= 1000 // 128


# --------------------------------------------------------------------------------------------------------------------
# Phrases


@pytest.mark.parametrize(
    ("phrase", "finding", "language"),
    [
        ("pleural effusion", "pleural_effusion", "en"),
        ("Pleural Effusion", "pleural_effusion", "en"),
        ("胸腔积液", "pleural_effusion", "zh"),
        ("a nodule in the right upper lobe", None, "en"),
        ("右肺上叶见结节影", None, "zh"),
    ],
)
def test_phrases_and_labels_in_both_languages(explainer, picture, phrase, finding, language):
    heat_map = explainer.heat_map(picture, phrase)
    assert (heat_map.phrase, heat_map.finding, heat_map.language) == (phrase, finding, language)
    assert heat_map.maps[0].shape == picture.shape


def test_language_of_prompts_can_be_chosen(explainer):
    english, chinese = (explainer.target("pleural_effusion", language).direction for language in ("en", "zh"))
    assert not torch.allclose(english, chinese)
    assert torch.equal(english, explainer.target("胸腔积液", "en").direction)


def test_text_that_is_the_name_of_a_label_can_stand_for_itself(explainer):
    target = explainer.text_target("pneumonia")
    assert target.finding is None
    assert target.direction.norm().item() == pytest.approx(1, abs=1e-5)


def test_language_is_told_by_the_script():
    assert detect_language("双肺清晰 CT", ["en", "zh"]) == "zh"
    assert detect_language("clear lungs", ["zh", "en"]) == "en"


def test_errors_say_what_came_and_what_was_expected(explainer, picture, tmp_path):
    for phrase in ("", "   ", None):
        with pytest.raises(ValueError, match="Expected a phrase"):
            explainer.heat_map(picture, phrase)
    with pytest.raises(ValueError, match="'rollout': expected one of"):
        explainer.heat_map(picture, "nodule", method="rollout")
    for window in (0, 2, 1.5):
        with pytest.raises(ValueError, match="odd number of patches"):
            explainer.heat_map(picture, "nodule", window=window)
    with pytest.raises(ValueError, match="'fr': expected one of"):
        explainer.heat_map(picture, "nodule", language="fr")
    with pytest.raises(ValueError, match="modality"):
        explainer.heat_map(picture, "nodule", modality="mri")
    with pytest.raises(ValueError, match="no such file"):
        explainer.heat_map(str(tmp_path / "none.png"), "nodule")
    with pytest.raises(ValueError, match="empty list"):
        explainer.heat_map([], "nodule")
    with pytest.raises(ValueError, match="pneumothorax"):
        explainer.label_target("pneumothorx")
    with pytest.raises(ValueError, match="not a checkpoint"):
        Explainer.from_pretrained(tmp_path)


def test_loads_a_checkpoint_with_and_without_a_decoder(
    tiny_checkpoint, tiny_config, tiny_processor, tmp_path, picture
):
    explainer = Explainer.from_pretrained(tiny_checkpoint)
    assert isinstance(explainer.model, M3FMForReportGeneration)
    towers = tmp_path / "towers"
    explainer.model.model.save_pretrained(towers)
    tiny_processor.save_pretrained(towers)
    alone = Explainer.from_pretrained(towers)
    assert isinstance(alone.model, M3FMModel)
    maps = [each.heat_map(picture, "nodule").maps[0] for each in (alone, explainer)]
    assert np.allclose(*maps, atol=1e-6)
    with pytest.raises(ValueError, match="writes no report"):
        alone.evidence(picture)


# --------------------------------------------------------------------------------------------------------------------
# Evidence

REPORT = "There is a pleural effusion on the left. No pneumothorax. The film is of good quality."


def test_evidence_of_a_given_report(explainer, picture):
    evidence = explainer.evidence(picture, REPORT)
    assert [each.text for each in evidence] == [
        "There is a pleural effusion on the left.",
        "No pneumothorax.",
        "The film is of good quality.",
    ]
    effusion, none, quality = evidence
    assert [(each.finding, each.state, each.sides) for each in effusion.findings] == [
        ("pleural_effusion", "positive", ("left",))
    ]
    assert 0 < effusion.findings[0].probability < 1
    assert [each.state for each in none.findings] == ["negative"]
    assert quality.findings == ()
    assert all(each.supported is None for each in evidence)  # this checkpoint has no thresholds
    assert all(0 <= each.percentile <= 100 for each in evidence)
    json.dumps([each.summary() for each in evidence], allow_nan=False)


def test_evidence_is_supported_where_the_label_score_agrees(explainer, picture):
    table = {key: dict(entry) for key, entry in explainer.label_table.items()}
    table["pleural_effusion"]["threshold"] = 0.0  # present in every image
    explainer.model.config.diagnosis = table
    verdicts = [each.supported for each in explainer.evidence(picture, REPORT)]
    assert verdicts == [True, None, None]
    (denied,) = explainer.evidence(picture, "No pleural effusion.")
    assert denied.supported is False
    (open_,) = explainer.evidence(picture, "Possible pleural effusion.")
    assert open_.supported is None
    (both,) = explainer.evidence(picture, "There is a pleural effusion and a nodule.")
    assert both.supported is None  # nothing is known of the nodule


def test_evidence_of_a_generated_report(explainer, picture):
    for language in ("en", "zh"):
        explainer.model.generation_config.max_new_tokens = 8
        evidence = explainer.evidence(picture, language=language)
        assert all(each.language == language for each in evidence)
    with pytest.raises(ValueError, match="empty one"):
        explainer.evidence(picture, "  ")
    with pytest.raises(ValueError, match="Unsupported language 'de'"):
        explainer.evidence(picture, "Normal.", language="de")


def test_sentences_are_cut_in_both_languages():
    from m3fm.evaluation.finding_labeler import FindingLabeler

    assert list(split_sentences("双肺清晰。未见结节！", FindingLabeler("zh"))) == ["双肺清晰。", "未见结节！"]
    text = "A nodule of 1.5 cm\nin the lung.  No effusion."
    assert list(split_sentences(text, FindingLabeler("en"))) == ["A nodule of 1.5 cm in the lung.", "No effusion."]


def test_summary_is_json(explainer, picture):
    heat_map = explainer.heat_map([picture, picture.T.copy()], "nodule", "gradient")
    assert isinstance(heat_map, HeatMap)
    content = json.loads(json.dumps(heat_map.summary(), allow_nan=False))
    assert set(content["top"]) == {"image", "slice", "peak", "region", "box"}
    assert len(content["images"]) == 2


@pytest.mark.realdata
def test_boxes_of_nih_are_read(data_root):
    import sys

    sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
    try:
        from grounding import read_cases, score_map
    finally:
        sys.path.pop(0)
    from m3fm.explain import EncodedStudy

    class Reader:
        def read(self, path: Path, modality: str) -> EncodedStudy:
            with Image.open(path) as image:
                pixels = np.asarray(image.convert("L"), dtype=np.float32) / 255
            return EncodedStudy((image_map(pixels, modality),), torch.zeros(1, 1, 1), (1, 1))

    _, cases = read_cases(data_root / "nih_chestxray14_sample", Reader())
    assert len({case.image for case in cases}) == 44
    assert all(0 < case.mask.mean() < 0.6 for case in cases)
    assert score_map(cases[0].mask.astype(float), cases[0].mask) == [1, 1, 1, 1]
