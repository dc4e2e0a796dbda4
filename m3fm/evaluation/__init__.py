# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Measure what a checkpoint is worth: text metrics, floors beside them, retrieval, and the run that records them."""

from .baselines import derangement, nearest_neighbors, random_reports, select_constant_report
from .report import evaluate_parallel, evaluate_reports, render_table
from .retrieval import retrieval_recall, same_text
from .text_metrics import distinct_ratio, score_reports, tokenize_report

__all__ = [
    "derangement",
    "distinct_ratio",
    "evaluate_parallel",
    "evaluate_reports",
    "nearest_neighbors",
    "random_reports",
    "render_table",
    "retrieval_recall",
    "same_text",
    "score_reports",
    "select_constant_report",
    "tokenize_report",
]
