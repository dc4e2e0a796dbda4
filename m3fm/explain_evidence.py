# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Hold the sentences of a report against the image: where each goes back to, and whether label scores bear it out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from .diagnosis_m3fm import calibrate_logits, choose_candidates, logistic, mean_phrases, zero_shot_logits
from .evaluation.finding_labeler import FindingLabeler, FindingMention
from .explain_maps import HeatMap

if TYPE_CHECKING:
    from .explain import EncodedStudy, Explainer

_STATED, _DENIED = "positive", "negative"


@dataclass(frozen=True)
class FindingEvidence:
    """Weigh one mention of a finding against its label score.

    Attributes:
        finding: Canonical name.
        state: "positive", "negative" or "uncertain", what the sentence says.
        sides: The patient's sides that it names.
        lobes: The lobes or zones that it names.
        probability: Of the finding by the image alone, zero-shot; None where the checkpoint has no such label.
        calibrated: Whether that is a calibrated probability.
        threshold: From which on the label counts as present; None where the checkpoint has none.
        agrees: Whether label and sentence say the same; None where there is no threshold, or the sentence leaves the
            finding open.
    """

    finding: str
    state: str
    sides: tuple[str, ...]
    lobes: tuple[str, ...]
    probability: float | None
    calibrated: bool
    threshold: float | None
    agrees: bool | None

    def summary(self) -> dict[str, Any]:
        """Returns it as JSON content."""
        return {**vars(self), "sides": list(self.sides), "lobes": list(self.lobes)}


@dataclass(frozen=True)
class SentenceEvidence:
    """Say what one sentence of a report goes back to.

    Attributes:
        text: The sentence.
        language: Its code.
        findings: What it mentions.
        score: Cosine of study and sentence.
        percentile: Share, 0 to 100, of the stock sentences of that language (those that state and deny the labels)
            whose cosine with the study is lower. A sentence that fits no better than those is near 50.
        supported: True if every finding it states or denies agrees with a label score that has a fitted threshold,
            False if one does not, None if nothing can be said: no finding, left open, or no threshold.
        heat_map: Of the sentence.
    """

    text: str
    language: str
    findings: tuple[FindingEvidence, ...]
    score: float
    percentile: float
    supported: bool | None
    heat_map: HeatMap = field(repr=False)

    def summary(self) -> dict[str, Any]:
        """Returns it as JSON content."""
        top = self.heat_map.summary()["top"]
        return {
            "text": self.text,
            "language": self.language,
            "findings": [each.summary() for each in self.findings],
            "score": self.score,
            "percentile": self.percentile,
            "supported": self.supported,
            "where": top,
        }


def weigh_report(explainer: Explainer, study: EncodedStudy, report: str, language: str) -> list[SentenceEvidence]:
    """Weighs every sentence of a report; see `Explainer.evidence`."""
    labeler = FindingLabeler(language)
    sentences = list(split_sentences(report, labeler))
    if not sentences:
        return []
    mentions = [labeler.find_mentions(sentence) for sentence in sentences]
    embed = explainer.embed_study(study)
    scores = explainer.embed_texts(sentences) @ embed
    stock = np.sort(explainer.embed_prompts(_stock_sentences(explainer, language)) @ embed)
    labels = _label_scores(explainer, embed, sorted({each.finding for found in mentions for each in found}))
    evidence = []
    for sentence, found, score in zip(sentences, mentions, scores, strict=True):
        findings = tuple(_weigh(mention, labels.get(mention.finding)) for mention in _merged(found))
        verdicts = [each.agrees for each in findings if each.state in (_STATED, _DENIED)]
        known = bool(verdicts) and (False in verdicts or None not in verdicts)
        evidence.append(
            SentenceEvidence(
                text=sentence,
                language=language,
                findings=findings,
                score=float(score),
                percentile=100 * float(np.searchsorted(stock, score) / len(stock)),
                supported=False not in verdicts if known else None,
                heat_map=explainer.heat_map(study, explainer.text_target(sentence, language)),
            )
        )
    return evidence


def split_sentences(report: str, labeler: FindingLabeler) -> Iterator[str]:
    """Yields the sentences of a report, cut where the labeler's rules cut."""
    # Lower case without moving a character, which the rules are written for.
    lowered = "".join(char.lower() if len(char.lower()) == 1 else char for char in report)
    ends = [match.end() for match in labeler.rules.sentence_end.finditer(lowered)]
    for start, end in zip([0, *ends], [*ends, len(report)], strict=True):
        sentence = " ".join(report[start:end].split())
        if any(char.isalpha() for char in sentence):
            yield sentence


def _stock_sentences(explainer: Explainer, language: str) -> list[str]:
    phrases = [
        text
        for entry in explainer.label_table.values()
        for kind in ("present", "absent")
        for text in entry[kind].get(language, ())
    ]
    return list(dict.fromkeys(phrases))


def _label_scores(explainer: Explainer, embed: np.ndarray, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Returns probability, calibration and threshold, as diagnosis gives them, of the labels that are known."""
    table = explainer.label_table
    known = [name for name in names if name in table]
    if not known:
        return {}
    labels = choose_candidates(known, table)
    present, absent = (
        mean_phrases([getattr(label, kind) for label in labels], explainer.embed_prompts)
        for kind in ("present", "absent")
    )
    (logits,) = zero_shot_logits(embed[None], present, absent, explainer.logit_scale)
    return {
        label.name: {
            "probability": float(logistic(calibrate_logits(logit, label.calibration))),
            "calibrated": label.calibration is not None,
            "threshold": label.threshold,
        }
        for label, logit in zip(labels, logits, strict=True)
    }


def _merged(mentions: Sequence[FindingMention]) -> list[FindingMention]:
    """Returns each finding of a sentence once a state, places united."""
    merged: dict[tuple[str, str], FindingMention] = {}
    for each in mentions:
        known = merged.setdefault((each.finding, each.state), each)
        merged[each.finding, each.state] = FindingMention(
            each.finding, each.state, known.sides | each.sides, known.lobes | each.lobes, known.start, known.end
        )
    return list(merged.values())


def _weigh(mention: FindingMention, label: dict[str, Any] | None) -> FindingEvidence:
    label = label or {"probability": None, "calibrated": False, "threshold": None}
    agrees = None
    if label["threshold"] is not None and mention.state in (_STATED, _DENIED):
        agrees = (label["probability"] >= label["threshold"]) == (mention.state == _STATED)
    return FindingEvidence(
        mention.finding,
        mention.state,
        tuple(sorted(mention.sides)),
        tuple(sorted(mention.lobes)),
        **label,
        agrees=agrees,
    )


__all__ = ["FindingEvidence", "SentenceEvidence", "split_sentences", "weigh_report"]
