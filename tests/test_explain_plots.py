# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Pictures of heat maps: size, what is covered and what is not, determinism, Chinese phrases, the evidence page."""

import io

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("matplotlib")

from m3fm import explain_plots
from m3fm.explain_evidence import FindingEvidence, SentenceEvidence
from m3fm.explain_maps import HeatMap, ImageMap
from m3fm.explain_plots import can_draw, draw_boxes, draw_contact_sheet, draw_heat_map, draw_overlay, evidence_page


def heat_map(num_slices: int = 1, phrase: str = "nodule", view: str | None = None, sign: float = 1) -> HeatMap:
    images = []
    for number in range(num_slices):
        values = np.full((60, 40), -0.1, dtype=np.float32)
        values[30:50, 20:35] = sign * (number + 1)
        images.append(
            ImageMap(
                values=values,
                pixels=np.full((60, 40), 0.5, dtype=np.float32),
                image=0,
                slice=number,
                num_slices=num_slices,
                modality="ct" if num_slices > 1 else "cxr",
                view=view,
                attention=1 / num_slices,
                drop=(-1) ** number * 0.1 if num_slices > 1 else None,
                relevance=1 / num_slices if num_slices > 1 else None,
            )
        )
    return HeatMap(phrase, None, "en", "similarity", 0.25, tuple(images))


def pixels(png: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(png)) as image:
        assert image.format == "PNG"
        assert not image.info.keys() & {"Software", "Creation Time", "Author", "Title"}
        return np.asarray(image.convert("RGB"), dtype=int)


def colourful(picture: np.ndarray) -> np.ndarray:
    return picture.max(axis=-1) - picture.min(axis=-1) > 12


def test_overlay_colours_what_is_high_and_leaves_the_rest():
    picture = pixels(draw_overlay(heat_map(), 0))
    left = picture[:, : int(0.55 * picture.shape[1])]
    assert not colourful(left[:, : int(0.4 * picture.shape[1])]).any()  # low and negative: the image itself
    assert colourful(left).mean() > 0.02
    assert not colourful(pixels(draw_overlay(heat_map(sign=-1), 0))).any()  # nothing speaks for the phrase


def test_same_map_same_bytes():
    assert draw_heat_map(heat_map()) == draw_heat_map(heat_map())
    assert draw_heat_map(heat_map(6)) == draw_heat_map(heat_map(6))


@pytest.mark.parametrize("count", [2, 9])
def test_contact_sheet_grows_with_the_slices(count):
    picture = pixels(draw_heat_map(heat_map(count)))
    assert picture.shape[0] > 100 * (-(-count // 4))
    assert colourful(picture).any()


def test_one_image_is_no_sheet():
    assert draw_heat_map(heat_map()) == draw_overlay(heat_map(), 0)
    assert draw_heat_map(heat_map(2)) == draw_contact_sheet(heat_map(2))


def test_sides_are_marked_only_where_they_are_known():
    assert draw_heat_map(heat_map(view="PA")) != draw_heat_map(heat_map(view=None))
    known = {view: heat_map(view=view).top.side_is_known for view in ("PA", "AP", "LATERAL", None)}
    assert known == {"PA": True, "AP": True, "LATERAL": False, None: False}


def test_chinese_phrase_is_drawn_or_said_to_be_missing(recwarn):
    drawn = draw_heat_map(heat_map(phrase="右肺结节"))
    assert pixels(drawn).any()
    assert not [warning for warning in recwarn if "lyph" in str(warning.message)]
    assert can_draw("nodule, 1.5 cm ± 2")
    assert can_draw("右肺结节") == any(
        name in explain_plots._installed_fonts() for name in explain_plots._CHINESE_FONTS
    )


def test_dollar_signs_and_long_phrases_are_drawn_as_they_are():
    assert pixels(draw_heat_map(heat_map(phrase="a $x^ {broken " + "very long phrase " * 30))).any()


def test_boxes_are_drawn():
    panels = [(heat_map(), np.array([[5.0, 5.0, 10.0, 20.0]]), "one")] * 3
    with_boxes = pixels(draw_boxes(panels, 2))
    without = pixels(draw_boxes([(each, np.empty((0, 4)), title) for each, _, title in panels], 2))
    assert (with_boxes != without).any()


def test_page_is_self_contained_and_escaped():
    finding = FindingEvidence("pleural_effusion", "positive", ("left",), (), 0.7, True, 0.4, True)
    unknown = FindingEvidence("nodule", "negative", (), (), None, False, None, None)
    evidence = [
        SentenceEvidence("<b>Effusion</b> & nodule.", "en", (finding, unknown), 0.2, 61.0, True, heat_map()),
        SentenceEvidence("双肺清晰。", "zh", (), 0.1, 10.0, None, heat_map()),
    ]
    page = evidence_page(evidence)
    assert "&lt;b&gt;Effusion&lt;/b&gt; &amp; nodule." in page
    assert "双肺清晰。" in page
    assert page.count("data:image/png;base64,") == 2
    assert "http" not in page
    assert "0.70 (calibrated, threshold 0.40)" in page
    assert "label scores agree" in page
    assert "research" in page
    assert "no sentence" in evidence_page([])
