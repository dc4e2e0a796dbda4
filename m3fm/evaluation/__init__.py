# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Measure what a checkpoint is worth: scores of reports and of diagnosis, floors beside them, and how sure they are.

What scores texts is named here. What runs a checkpoint is in the modules `report`, `diagnosis`, `parallel` and
`paper`; `compare` tells two runs apart.
"""

from .clinical_metrics import CLINICAL_METRICS, ClinicalScorer
from .finding_labeler import FindingLabeler, FindingMention, LabeledFinding, find_mentions, label_report, label_reports
from .resampling import cluster_weights, compare_rows, point_scores
from .retrieval import retrieval_recall, same_text
from .text_metrics import METRICS, TextScorer, distinct_ratio, metric_names, score_reports
from .tokens import LANGUAGES, TOKENIZATIONS, tokenize, tokenize_report

__all__ = [
    "CLINICAL_METRICS",
    "LANGUAGES",
    "METRICS",
    "TOKENIZATIONS",
    "ClinicalScorer",
    "FindingLabeler",
    "FindingMention",
    "LabeledFinding",
    "TextScorer",
    "cluster_weights",
    "compare_rows",
    "distinct_ratio",
    "find_mentions",
    "label_report",
    "label_reports",
    "metric_names",
    "point_scores",
    "retrieval_recall",
    "same_text",
    "score_reports",
    "tokenize",
    "tokenize_report",
]
