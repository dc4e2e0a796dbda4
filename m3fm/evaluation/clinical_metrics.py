# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Score reports by the findings they state: which ones, on which side, in which lobe; in English and Chinese.

Findings are read out of both texts by the rules of `finding_labeler`, so that one label space serves both languages.
What is counted:

- A finding counts as stated if it is positive or uncertain (F1-CheXbert's choice: Smit et al., EMNLP 2020; Miura et
  al., NAACL 2021). Denied and unmentioned findings count alike: a reader learns of no disease from either.
- `no_finding` is left out of every pooled score and has a row of its own in the finding table: with it, the "normal"
  template would win on any set in which most studies are normal. Without it such a report scores 0.
- `support_devices` is in, as one finding among the others: an invented tube is an error.
- A finding that implies another (a nodule is a lung lesion) counts for both, as in CheXpert's labels.

Precision, recall and F1 are of counts over the corpus, not means over studies; they are 0 where only the predictions,
or only the references, state a finding, and NaN where neither does.

Letters in shapes: N studies, F findings, R resamples, S statistics.
"""

from collections.abc import Sequence

import numpy as np

from ..data.labels import FINDINGS, NO_FINDING
from .finding_labeler import LabeledFinding, label_reports
from .resampling import Measurement, SumMeasurement, ratio

#: Names of the scores, in table order. All in 0..1.
CLINICAL_METRICS = (
    "finding_precision_micro",
    "finding_recall_micro",
    "finding_f1_micro",
    "finding_f1_macro",
    "located_f1_micro",
    "side_accuracy",
    "lobe_accuracy",
)

# A stated finding is one byte, so that reports are compared as arrays: one bit that it is stated, one for each place.
_STATED = 1
_SIDES = {"left": 2, "right": 4}
_LOBES = {"upper": 8, "middle": 16, "lower": 32}
_SIDE_BITS, _LOBE_BITS = sum(_SIDES.values()), sum(_LOBES.values())
_STATED_STATES = frozenset({"positive", "uncertain"})

_COLUMN = {finding: column for column, finding in enumerate(FINDINGS)}
_POOLED = np.array([column for finding, column in _COLUMN.items() if finding != NO_FINDING])


class ClinicalScorer:
    """Scores any number of systems against one list of references; no text is labeled twice.

    Args:
        references: N true reports.
        language: "en" or "zh", of references and predictions.

    Raises:
        ValueError: Without references, on a single string in place of a list, or on an unknown language.
    """

    def __init__(self, references: Sequence[str], language: str) -> None:
        _check_reports("references", references)
        if not len(references):
            raise ValueError("Expected at least one reference report, got none.")
        self.language = language
        self._codes: dict[str, np.ndarray] = {}
        self._references = self._encode(references)

    def measure(self, predictions: Sequence[str]) -> list[Measurement]:
        """Counts per study what the scores of `CLINICAL_METRICS` need, so that any resample is a matrix product.

        `finding_f1_macro` is the mean over the findings that the references of a resample state. `located_f1_micro`
        takes a finding as found only with the same set of sides and the same set of lobes, none stated being a set of
        its own. `side_accuracy` and `lobe_accuracy` are shares of the findings that both reports state and whose
        reference names a side, or a lobe; NaN where there is none.

        Args:
            predictions: N generated reports, in the order of the references.

        Raises:
            ValueError: On a single string in place of a list, or a number of reports other than N.
        """
        found, true = (codes[:, _POOLED] for codes in self._paired_codes(predictions))  # (N, F) each
        both = (found > 0) & (true > 0)
        differing = found ^ true
        sided, lobed = both & ((true & _SIDE_BITS) > 0), both & ((true & _LOBE_BITS) > 0)
        flags = (
            both & (differing == 0),
            sided & ((differing & _SIDE_BITS) == 0),
            sided,
            lobed & ((differing & _LOBE_BITS) == 0),
            lobed,
        )
        pooled = np.stack([each.sum(axis=1) for each in flags], axis=1)
        statistics = np.concatenate([both, found > 0, true > 0, pooled], axis=1).astype(np.float64)
        return [SumMeasurement(statistics, _combine)]

    def finding_table(self, predictions: Sequence[str]) -> dict[str, dict[str, float]]:
        """Scores each finding alone, `no_finding` among them.

        Args:
            predictions: N generated reports, in the order of the references.

        Returns:
            Finding to `precision`, `recall`, `f1`, `support` (studies whose reference states it) and `predicted`
            (studies whose prediction does), in model order. A finding that nobody states has no row.

        Raises:
            ValueError: As `measure`.
        """
        found, true = (codes > 0 for codes in self._paired_codes(predictions))
        hits, predicted, support = (each.sum(axis=0) for each in (found & true, found, true))
        return {
            finding: {
                **{name: float(values[column]) for name, values in _rates(hits, predicted, support).items()},
                "support": int(support[column]),
                "predicted": int(predicted[column]),
            }
            for finding, column in _COLUMN.items()
            if support[column] or predicted[column]
        }

    def _paired_codes(self, predictions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        _check_reports("predictions", predictions)
        if len(predictions) != len(self._references):
            raise ValueError(
                f"Expected one prediction for each reference: got {len(predictions)} predictions and "
                f"{len(self._references)} references."
            )
        return self._encode(predictions), self._references

    def _encode(self, reports: Sequence[str]) -> np.ndarray:
        """Returns (N, F) uint8, 0 where a report does not state a finding."""
        new = [text for text in dict.fromkeys(reports) if text not in self._codes]
        for text, labels in zip(new, label_reports(new, self.language), strict=True):
            self._codes[text] = _encode_labels(labels)
        return np.stack([self._codes[text] for text in reports])


def _encode_labels(labels: dict[str, LabeledFinding]) -> np.ndarray:
    codes = np.zeros(len(FINDINGS), dtype=np.uint8)
    for finding, label in labels.items():
        if label.state in _STATED_STATES:
            places = sum(_SIDES[side] for side in label.sides) + sum(_LOBES[lobe] for lobe in label.lobes)
            codes[_COLUMN[finding]] = _STATED + places
    return codes


def _combine(sums: np.ndarray) -> dict[str, np.ndarray]:
    """Turns sums (R, S) of the statistics of `ClinicalScorer.measure` into scores (R,)."""
    count = len(_POOLED)
    hits, predicted, support = sums[:, :count], sums[:, count : 2 * count], sums[:, 2 * count : 3 * count]
    located, side_hits, sided, lobe_hits, lobed = sums[:, 3 * count :].T
    totals = predicted.sum(axis=1), support.sum(axis=1)
    micro = _rates(hits.sum(axis=1), *totals)
    scores = (
        micro["precision"],
        micro["recall"],
        micro["f1"],
        _mean_where(_rates(hits, predicted, support)["f1"], support > 0),
        _rates(located, *totals)["f1"],
        ratio(side_hits, sided),
        ratio(lobe_hits, lobed),
    )
    return dict(zip(CLINICAL_METRICS, scores, strict=True))


def _rates(hits: np.ndarray, predicted: np.ndarray, support: np.ndarray) -> dict[str, np.ndarray]:
    """Computes precision, recall and F1; 0 without hits, NaN where nobody stated anything."""
    stated = predicted + support
    undefined = np.where(stated > 0, 0.0, np.nan)
    return {
        name: np.divide(part, whole, out=undefined.copy(), where=whole > 0)
        for name, part, whole in (
            ("precision", hits, predicted),
            ("recall", hits, support),
            ("f1", 2 * hits, stated),
        )
    }


def _mean_where(values: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Returns the mean (R,) of the chosen values of each row of (R, F); NaN for a row without any."""
    return ratio(np.where(chosen, values, 0.0).sum(axis=1), chosen.sum(axis=1))


def _check_reports(name: str, reports: Sequence[str]) -> None:
    if isinstance(reports, str):
        raise ValueError(f"Expected {name} to be a list of reports, got one string.")
