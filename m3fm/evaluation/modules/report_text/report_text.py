# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""`evaluate` module: BLEU-1..4, METEOR, ROUGE-L, CIDEr-D and chrF of radiology reports in English and Chinese."""

from collections.abc import Sequence

import datasets
import evaluate

from m3fm.evaluation.text_metrics import score_reports

_DESCRIPTION = """
Scores generated radiology reports by their words: BLEU-1..4, METEOR (equal words and stems; no synonyms), ROUGE-L,
CIDEr-D and chrF, without Java. English is scored by words; Chinese by characters and, under names that end in
"_jieba", by words. All scores are in 0..1, except CIDEr-D in 0..10.
"""

_INPUTS = """
Args:
    predictions: Generated reports.
    references: True reports, one for each prediction.
    language: "en" (the default) or "zh".
    metrics: Names of the scores to compute; all by default.

Returns:
    Scores by name.
"""

_CITATION = """
@inproceedings{papineni2002bleu, title={BLEU: a Method for Automatic Evaluation of Machine Translation},
  author={Papineni, Kishore and Roukos, Salim and Ward, Todd and Zhu, Wei-Jing}, booktitle={ACL}, year={2002}}
@inproceedings{denkowski2014meteor, title={Meteor Universal: Language Specific Translation Evaluation for Any Target
  Language}, author={Denkowski, Michael and Lavie, Alon}, booktitle={WMT}, year={2014}}
@inproceedings{lin2004rouge, title={ROUGE: A Package for Automatic Evaluation of Summaries}, author={Lin, Chin-Yew},
  booktitle={Text Summarization Branches Out}, year={2004}}
@inproceedings{vedantam2015cider, title={CIDEr: Consensus-based Image Description Evaluation},
  author={Vedantam, Ramakrishna and Zitnick, C. Lawrence and Parikh, Devi}, booktitle={CVPR}, year={2015}}
@inproceedings{popovic2015chrf, title={chrF: character n-gram F-score for automatic MT evaluation},
  author={Popović, Maja}, booktitle={WMT}, year={2015}}
"""


class ReportText(evaluate.Metric):
    """Word scores of radiology reports."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(
        self,
        predictions: Sequence[str],
        references: Sequence[str],
        language: str = "en",
        metrics: Sequence[str] | None = None,
    ) -> dict[str, float]:
        return score_reports(list(predictions), list(references), language, metrics)
