# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""`evaluate` module: precision, recall and F1 of the findings that radiology reports state, in English and Chinese."""

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate

from m3fm.evaluation.clinical_metrics import ClinicalScorer
from m3fm.evaluation.resampling import point_scores

_DESCRIPTION = """
Scores generated radiology reports by the findings they state, read out of both texts by rules that know negation and
uncertainty, with one label space for English and Chinese: precision, recall and F1 over all findings and for each,
and whether side and lobe agree. A finding that is stated with uncertainty counts as stated.
"""

_INPUTS = """
Args:
    predictions: Generated reports.
    references: True reports, one for each prediction.
    language: "en" (the default) or "zh".

Returns:
    Scores by name, NaN where undefined; under "findings", for each finding that any report states: precision, recall,
    f1, support (references that state it) and predicted (predictions that do).
"""

_CITATION = """
@inproceedings{smit2020chexbert, title={CheXbert: Combining Automatic Labelers and Expert Annotations for Accurate
  Radiology Report Labeling Using BERT}, author={Smit, Akshay and Jain, Saahil and Rajpurkar, Pranav and Pareek, Anuj
  and Ng, Andrew Y. and Lungren, Matthew P.}, booktitle={EMNLP}, year={2020}}
"""


class ReportFindings(evaluate.Metric):
    """Finding scores of radiology reports."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(self, predictions: Sequence[str], references: Sequence[str], language: str = "en") -> dict[str, Any]:
        predictions, references = list(predictions), list(references)
        scorer = ClinicalScorer(references, language)
        scores = point_scores(scorer.measure(predictions), len(references))
        return {**scores, "findings": scorer.finding_table(predictions)}
