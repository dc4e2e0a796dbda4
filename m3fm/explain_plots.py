# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Draw heat maps over their images as PNG, and the evidence for a report as one HTML page.

Nothing here touches the state of `matplotlib.pyplot`, and the same maps give the same bytes. The colour map, viridis,
rises in lightness and is told apart with every kind of colour vision. What is drawn names no file and no patient.
"""

from __future__ import annotations

import base64
import html
import io
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from .evaluation.runs import NOTICE
from .explain_evidence import SentenceEvidence
from .explain_maps import HeatMap, ImageMap

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DPI = 100
_SIDE = 5.2  # inches of an image's longer side
_TILE = 2.1  # inches of a tile of a contact sheet
_TILES_ACROSS = 4
_COLORS = "viridis"
# Below this share of the highest value nothing is drawn; above it a map gets denser up to the second number.
_VISIBLE_FROM, _DENSEST = 0.3, 0.62
_OUTLINE, _BLUE, _ORANGE = "#FFFFFF", "#0072B2", "#E69F00"
_STYLE: dict[str, Any] = {"font.family": "sans-serif", "font.size": 9, "axes.titlesize": 9, "svg.hashsalt": "m3fm"}
# Families that hold Chinese, in order of preference.
_CHINESE_FONTS = (
    *("Noto Sans CJK SC", "Noto Sans SC", "Source Han Sans SC", "Source Han Sans CN", "WenQuanYi Zen Hei"),
    *("WenQuanYi Micro Hei", "PingFang SC", "Heiti SC", "Microsoft YaHei", "SimHei", "Arial Unicode MS"),
)
_NO_FONT = "(phrase in Chinese: no installed font has its characters)"
_ATTENTION, _RELEVANCE = "attention of the study pooling", "share of relevance"


def draw_heat_map(heat_map: HeatMap) -> bytes:
    """Draws the map of a single image over it, or those of all images or slices beside what each weighs.

    Returns:
        PNG.

    Raises:
        ImportError: Without matplotlib.
    """
    return draw_overlay(heat_map, 0) if len(heat_map.images) == 1 else draw_contact_sheet(heat_map)


def draw_overlay(heat_map: HeatMap, number: int) -> bytes:
    """Draws the map of one image, by its place in the study, with a scale, its peak and the outline of its region.

    Returns:
        PNG.

    Raises:
        ImportError: Without matplotlib.
    """
    image = heat_map.images[number]
    height, width = image.values.shape
    scale = _SIDE / max(height, width)
    tall, wide = max(1.6, height * scale), max(2.4, width * scale)
    with _figure(wide + 1.1, tall + 0.95) as figure:
        axes = figure.add_axes(_inches(figure, 0.1, 0.35, wide, tall))
        drawn = _draw_image(axes, image, heat_map.top.peak_value)
        _mark_sides(axes, image)
        _mark_region(axes, image)
        _draw_title(figure, heat_map, f"peak: {image.region.text}" if image.box else "nothing speaks for it")
        if drawn is not None:
            _draw_scale(figure, drawn, _inches(figure, wide + 0.2, 0.35 + 0.1 * tall, 0.14, 0.8 * tall))
        _draw_notice(figure)
        return _png(figure)


def draw_contact_sheet(heat_map: HeatMap) -> bytes:
    """Draws the maps of all images or slices of a study on one colour scale, above bars of what each weighs.

    Returns:
        PNG.

    Raises:
        ImportError: Without matplotlib.
    """
    images = heat_map.images
    across = min(_TILES_ACROSS, len(images))
    down = -(-len(images) // across)
    tile = _TILE if len(images) > 2 else 2 * _TILE
    wide, bars = max(across * tile, 2 * _TILE), 1.5
    step = tile + 0.22
    total = down * step + bars + 1.38
    with _figure(wide + 1.1, total) as figure:
        drawn = None
        for index, image in enumerate(images):
            left, bottom = (index % across) * tile + 0.1, total - 0.5 - (index // across + 1) * step
            axes = figure.add_axes(_inches(figure, left, bottom, tile - 0.08, tile - 0.08))
            drawn = _draw_image(axes, image, heat_map.top.peak_value) or drawn
            axes.set_title(_name(image, index), fontsize=8, pad=2)
            _mark_sides(axes, image)
            if image is heat_map.top:
                _mark_region(axes, image)
        if drawn is not None:
            bottom = total - 0.5 - down * step
            _draw_scale(figure, drawn, _inches(figure, wide + 0.15, bottom + 0.1, 0.14, down * step - 0.4))
        _draw_weights(figure.add_axes(_inches(figure, 0.6, 0.75, wide - 0.55, bars - 0.2)), heat_map)
        top = heat_map.top
        where = (
            f"highest in {_name(top, images.index(top))}, {top.region.text}" if top.box else "nothing speaks for it"
        )
        _draw_title(figure, heat_map, where)
        _draw_notice(figure)
        return _png(figure)


def draw_boxes(panels: Sequence[tuple[HeatMap, np.ndarray, str]], across: int) -> bytes:
    """Draws single-image heat maps side by side, each with what a reader marked.

    Args:
        panels: Heat map, boxes (boxes, 4) as x, y, width, height in pixels of its image, and a title.
        across: Panels in a row.

    Returns:
        PNG.

    Raises:
        ImportError: Without matplotlib.
    """
    from matplotlib.patches import Rectangle

    down = -(-len(panels) // across)
    with _figure(across * _TILE, down * (_TILE + 0.25) + 0.1) as figure:
        for axes, (heat_map, boxes, title) in zip(figure.subplots(down, across).flat, panels, strict=False):
            image = heat_map.images[0]
            _draw_image(axes, image, image.peak_value)
            row, column = image.peak
            axes.plot(column, row, "+", color="black", markersize=9, markeredgewidth=2.6)
            axes.plot(column, row, "+", color=_OUTLINE, markersize=8, markeredgewidth=1.2)
            for x, y, width, height in boxes:
                axes.add_patch(Rectangle((x, y), width, height, fill=False, edgecolor=_ORANGE, linewidth=1.8))
            axes.set_title(title, fontsize=8, pad=3)
        figure.subplots_adjust(0.005, 0.01, 0.995, 0.955, wspace=0.03, hspace=0.12)
        return _png(figure)


def evidence_page(evidence: Sequence[SentenceEvidence]) -> str:
    """Renders the evidence for a report as a page of HTML that needs no other file.

    Raises:
        ImportError: Without matplotlib.
    """
    parts = [_evidence_section(each) for each in evidence] or ["<p>The report has no sentence.</p>"]
    language = evidence[0].language if evidence else "en"
    return _PAGE.format(language=html.escape(language), notice=html.escape(NOTICE), body="\n".join(parts))


def can_draw(text: str) -> bool:
    """Tells whether a figure can show a text: whether it is Latin, or an installed font has its characters."""
    return _font_of(text) is not None


# --------------------------------------------------------------------------------------------------------------------
# Parts of a figure


@contextmanager
def _figure(width: float, height: float) -> Iterator[Figure]:
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('Drawing heat maps needs matplotlib: pip install "m3fm[evaluate]"') from error
    with matplotlib.rc_context(rc={**matplotlib.rcParamsDefault, "backend": "agg", **_STYLE}):
        figure = Figure(figsize=(width, height), dpi=_DPI, facecolor="white")
        FigureCanvasAgg(figure)
        yield figure


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _inches(figure: Figure, left: float, bottom: float, width: float, height: float) -> tuple[float, ...]:
    """Returns a place in inches from the lower left corner as shares of the figure."""
    wide, tall = figure.get_size_inches()
    return left / wide, bottom / tall, width / wide, height / tall


def _draw_image(axes: Axes, image: ImageMap, highest: float) -> Any:
    """Draws an image, and its map where that is not low; returns what a colour scale is made from, None if nothing."""
    axes.imshow(image.pixels, cmap="gray", vmin=0, vmax=1, interpolation="antialiased")
    axes.set_axis_off()
    if highest <= 0:
        return None
    share = np.clip(image.values / highest, 0, 1)
    opacity = np.clip((share - _VISIBLE_FROM) / (1 - _VISIBLE_FROM), 0, 1) ** 0.6 * _DENSEST
    return axes.imshow(image.values, cmap=_COLORS, vmin=0, vmax=highest, alpha=opacity, interpolation="antialiased")


def _draw_scale(figure: Figure, drawn: Any, place: tuple[float, ...]) -> None:
    from matplotlib.cm import ScalarMappable

    # Made anew: that of the picture would be transparent too.
    bar = figure.colorbar(ScalarMappable(norm=drawn.norm, cmap=drawn.cmap), cax=figure.add_axes(place))
    bar.set_label("speaks for the phrase", fontsize=8)
    bar.ax.tick_params(labelsize=7.5)
    bar.outline.set_linewidth(0.5)


def _mark_region(axes: Axes, image: ImageMap) -> None:
    if image.box is None:
        return
    from matplotlib.patches import Rectangle

    x, y, width, height = image.box
    for color, line in (("black", 2.6), (_OUTLINE, 1.2)):  # seen on dark and on light
        axes.add_patch(Rectangle((x - 0.5, y - 0.5), width, height, fill=False, edgecolor=color, linewidth=line))
    row, column = image.peak
    axes.plot(column, row, "+", color="black", markersize=11, markeredgewidth=3)
    axes.plot(column, row, "+", color=_OUTLINE, markersize=10, markeredgewidth=1.4)


def _mark_sides(axes: Axes, image: ImageMap) -> None:
    """Writes R and L where the file itself tells which side is which."""
    if not image.side_is_known:
        return
    for place, mark, align in ((0.02, "R", "left"), (0.98, "L", "right")):
        axes.text(
            *(place, 0.98, mark),
            transform=axes.transAxes,
            ha=align,
            va="top",
            color="white",
            fontsize=9,
            fontweight="bold",
            bbox={"facecolor": "black", "alpha": 0.55, "linewidth": 0, "pad": 1.5},
        )


def _draw_title(figure: Figure, heat_map: HeatMap, where: str) -> None:
    phrase = heat_map.phrase
    font = _font_of(phrase)
    if font is None:
        phrase = heat_map.finding.replace("_", " ") if heat_map.finding else _NO_FONT
    wide, tall = figure.get_size_inches()
    phrase = textwrap.shorten(phrase, max(16, int(wide * 11)), placeholder=" …")
    family = {} if font in (None, "") else {"fontfamily": font}
    figure.text(0.1 / wide, 1 - 0.1 / tall, phrase, ha="left", va="top", fontsize=11, fontweight="bold", **family)
    kind = "presence against absence" if heat_map.finding else "cosine"
    facts = f"{heat_map.method}, {kind} {heat_map.score:+.3f}; {where}"
    figure.text(0.1 / wide, 1 - 0.33 / tall, facts, ha="left", va="top", fontsize=8.5, color="#404040")


def _draw_notice(figure: Figure) -> None:
    wide, tall = figure.get_size_inches()
    figure.text(0.1 / wide, 0.1 / tall, NOTICE, ha="left", va="bottom", fontsize=7.5, color="#404040")


def _draw_weights(axes: Axes, heat_map: HeatMap) -> None:
    weights = heat_map.slice_weights
    places = np.arange(len(heat_map.images))
    axes.bar(places - 0.2, weights["attention"], 0.38, color=_BLUE, label=_ATTENTION)
    if weights["relevance"] is not None:
        against = np.array([image.drop < 0 for image in heat_map.images])
        bars = axes.bar(places + 0.2, weights["relevance"], 0.38, color=_ORANGE, label=_RELEVANCE)
        for bar, speaks_against in zip(bars, against, strict=True):
            bar.set_hatch("////" if speaks_against else "")
    every = max(1, len(places) // 16)
    axes.set_xticks(places[::every], [_number(heat_map.images[place]) for place in places[::every]], fontsize=7.5)
    axes.set_xlabel("slice of the volume" if heat_map.images[0].num_slices > 1 else "image of the study", fontsize=8)
    axes.set_ylabel("share", fontsize=8)
    axes.tick_params(labelsize=7.5)
    axes.spines[["top", "right"]].set_visible(False)
    handles = axes.get_legend_handles_labels()[0]
    axes.legend(
        handles,
        [_ATTENTION, f"{_RELEVANCE} (hatched: speaks against)"][: len(handles)],
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=2,
        frameon=False,
        fontsize=8,
        borderaxespad=0,
    )


def _number(image: ImageMap) -> str:
    return str(image.slice + 1 if image.num_slices > 1 else image.image + 1)


def _name(image: ImageMap, index: int) -> str:
    return f"slice {image.slice + 1} of {image.num_slices}" if image.num_slices > 1 else f"image {index + 1}"


@cache
def _installed_fonts() -> dict[str, str]:
    from matplotlib import font_manager

    return {font.name: font.fname for font in font_manager.fontManager.ttflist}


def _font_of(text: str) -> str | None:
    """Returns the family that draws a text: "" for the default one, None if no installed one has its characters."""
    if all(ord(char) < 0x2E80 for char in text):  # before the scripts of East Asia
        return ""
    from matplotlib.ft2font import FT2Font

    for family in _CHINESE_FONTS:
        if family in _installed_fonts():
            known = FT2Font(_installed_fonts()[family]).get_charmap()
            if all(ord(char) in known for char in text if not char.isspace()):
                return family
    return None


# --------------------------------------------------------------------------------------------------------------------
# The page

_VERDICTS = {True: "label scores agree", False: "label scores disagree", None: "no verdict"}
_PAGE = """<!DOCTYPE html>
<html lang="{language}"><head><meta charset="utf-8"><title>Evidence</title>
<style>
body {{ font-family: sans-serif; max-width: 62rem; margin: 1.5rem auto; padding: 0 1rem; color: #1a1a1a; }}
section {{ display: flex; flex-wrap: wrap; gap: 1.25rem; border-top: 1px solid #ccc; padding: 1rem 0; }}
section > div {{ flex: 1 1 20rem; }} img {{ max-width: 24rem; width: 100%; height: auto; }}
h2 {{ font-size: 1.1rem; margin: 0 0 .5rem; }} table {{ border-collapse: collapse; font-size: .9rem; }}
td, th {{ border-bottom: 1px solid #ddd; padding: .25rem .6rem; text-align: left; }}
.verdict {{ font-weight: bold; }} .notice {{ background: #fff3d6; padding: .5rem .75rem; }}
</style></head><body>
<h1>What each sentence goes back to</h1>
<p class="notice">{notice}</p>
<p>The maps show what raises the agreement of image and sentence, not that the sentence is true. A verdict compares
what the sentence says with the label score of the image, where the checkpoint has a fitted threshold for it.</p>
{body}
</body></html>
"""


def _evidence_section(evidence: SentenceEvidence) -> str:
    picture = base64.b64encode(draw_heat_map(evidence.heat_map)).decode("ascii")
    rows = "".join(
        f"<tr><td>{html.escape(each.finding.replace('_', ' '))}</td><td>{html.escape(each.state)}</td>"
        f"<td>{html.escape(', '.join((*each.sides, *each.lobes)) or '–')}</td><td>{_probability(each)}</td></tr>"
        for each in evidence.findings
    )
    head = "<tr><th>finding</th><th>said</th><th>where</th><th>label score</th></tr>"
    table = f"<table>{head}{rows}</table>" if rows else "<p>Names no finding.</p>"
    where = html.escape(evidence.heat_map.top.region.text)
    return (
        f'<section><div><h2>{html.escape(evidence.text)}</h2><p class="verdict">{_VERDICTS[evidence.supported]}</p>'
        f"{table}<p>Cosine {evidence.score:+.3f}, above that of {evidence.percentile:.0f} % of stock sentences. "
        f"Highest: {where}.</p></div>"
        f'<div><img alt="heat map" src="data:image/png;base64,{picture}"></div></section>'
    )


def _probability(finding: Any) -> str:
    if finding.probability is None:
        return "–"
    threshold = "no threshold" if finding.threshold is None else f"threshold {finding.threshold:.2f}"
    return f"{finding.probability:.2f} ({'calibrated' if finding.calibrated else 'uncalibrated'}, {threshold})"


__all__ = ["can_draw", "draw_boxes", "draw_contact_sheet", "draw_heat_map", "draw_overlay", "evidence_page"]
