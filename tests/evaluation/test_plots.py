# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Plots are valid SVG of the right width, the same bytes every time, and leave matplotlib as it was."""

import re
import xml.etree.ElementTree as ElementTree

import matplotlib
import pytest

from m3fm.evaluation.plots import (
    Curve,
    Estimate,
    ReliabilityBins,
    curve_plot,
    finding_bars,
    forest_plot,
    reliability_diagram,
)

NAN = float("nan")
SVG = "{http://www.w3.org/2000/svg}"


def draw_forest(reverse=False):
    estimates = [
        Estimate("ROUGE-L", 0.1, -0.05, 0.2, "English"),
        Estimate("ROUGE-L", 0.2, 0.1, 0.3, "Chinese"),
        Estimate("BLEU-4", NAN, NAN, NAN, "English"),
    ]
    return forest_plot(estimates[::-1] if reverse else estimates, "gap", 0.0, "no use")


def draw_bars():
    rows = {"mass": {"f1": None, "support": 0}, "nodule": {"f1": 0.5, "support": 7}}
    return finding_bars(
        {"English": rows, "Chinese": {"nodule": {"f1": 1.0, "support": 3}}}, dict.fromkeys(rows, "name")
    )


def draw_curves():
    return curve_plot([Curve(f"label {i}", [0, 0.2, 1], [0, 0.9, 1], (0, 1)) for i in range(4)], "x", "y")


def draw_reliability():
    return reliability_diagram([ReliabilityBins("label", [0.1, 0.95, 1.0], [0.0, 0.5, 1.0], [10, 2, 1], 10)])


@pytest.mark.parametrize("draw", [draw_forest, draw_bars, draw_curves, draw_reliability])
def test_plots_are_svg_that_repeats_and_loads_nothing(draw):
    svg = draw()
    root = ElementTree.fromstring(svg)
    assert root.tag == f"{SVG}svg"
    assert float(root.get("width").removesuffix("pt")) <= 7.0 * 72
    assert svg == draw()
    links = re.findall(rb'(?:href|src)="([^"]*)"', svg)
    assert links and all(link.startswith(b"#") for link in links)
    assert not any(part in svg for part in (b"<script", b"<metadata", b"<!DOCTYPE", b"<image"))


def test_plots_leave_settings_alone_and_follow_none():
    plain = draw_forest()
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red"}):
        before = dict(matplotlib.rcParams)
        assert draw_forest() == plain
        assert dict(matplotlib.rcParams) == before


def test_order_is_kept():
    assert draw_forest() != draw_forest(reverse=True)


def test_an_estimate_without_interval_is_drawn():
    assert b"NaN" not in forest_plot([Estimate("a", 0.5, NAN, NAN), Estimate("b", 0.4, 0.3, 0.5)], "AUROC", 0.5)


@pytest.mark.parametrize(
    ("draw", "name"),
    [
        (lambda: forest_plot([], "gap"), "estimates"),
        (lambda: finding_bars({"English": {}}, {"mass": "Lung mass"}), "findings"),
        (lambda: curve_plot([], "x", "y"), "curves"),
        (lambda: reliability_diagram([]), "panels"),
    ],
)
def test_nothing_to_plot_is_refused(draw, name):
    with pytest.raises(ValueError, match=f"Expected {name} to plot, got none"):
        draw()
