# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""The `m3fm-diagnosis` pipeline: chest images and labels in either language in, probabilities out, without training.

For research use only. Letters in shapes: B studies, N images of a study, D width of the shared space, L labels.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import torch

from .diagnosis_m3fm import (
    DiagnosisLabel,
    calibrate_logits,
    choose_candidates,
    logistic,
    mean_phrases,
    zero_shot_logits,
)
from .study_pipeline_m3fm import READING_ARGUMENTS, M3FMStudyPipeline

_ARGUMENTS = ("candidate_labels", "exclusive", "report_language", *READING_ARGUMENTS)
_TEXTS_AT_ONCE = 64


@dataclass(frozen=True)
class ScoredLabels:
    """The labels of a call, ready to be compared with images.

    Attributes:
        labels: L of them.
        present: (L, D), unit norm.
        absent: (L, D), unit norm.
        scale: What cosines are multiplied by.
        exclusive: Whether labels compete with each other.
        report_weight: Share of the generated report in the logit; None where none is read.
    """

    labels: Sequence[DiagnosisLabel]
    present: np.ndarray
    absent: np.ndarray
    scale: float
    exclusive: bool
    report_weight: float | None

    def logits(self, images: np.ndarray, reports: np.ndarray | None) -> np.ndarray:
        """Returns logits (B, L) for embeddings (B, D)."""
        embeds = images
        if reports is not None:
            # Logits are linear in the embedding: this averages those of the image and of its report.
            embeds = (1 - self.report_weight) * images + self.report_weight * reports
        return zero_shot_logits(embeds, self.present, self.absent, self.scale, self.exclusive)

    def answers(self, logits: np.ndarray) -> list[dict[str, Any]]:
        """Returns what is said of one study with logits (L,), the most probable label first."""
        # A calibration was fitted on presence against absence in images: it fits no other logit.
        plain = not self.exclusive and self.report_weight is None
        found = []
        for label, logit in zip(self.labels, logits, strict=True):
            calibration = label.calibration if plain else None
            threshold = label.threshold if plain else None
            score = float(logistic(calibrate_logits(logit, calibration)))
            found.append(
                {
                    "label": label.name,
                    "score": score,
                    "threshold": threshold,
                    "decision": None if threshold is None else score >= threshold,
                    "calibrated": calibration is not None,
                }
            )
        return sorted(found, key=lambda answer: -answer["score"])


@torch.inference_mode()
def embed_texts(towers: torch.nn.Module, processor: Any, texts: Sequence[str]) -> np.ndarray:
    """Returns texts in the shared space, (texts, D), unit norm, for an `M3FMModel` and its processor."""
    embeds = []
    for start in range(0, len(texts), _TEXTS_AT_ONCE):
        inputs = processor(text=list(texts[start : start + _TEXTS_AT_ONCE]), return_tensors="pt").to(towers.device)
        embeds.append(towers.get_text_features(inputs["input_ids"], inputs["attention_mask"]).float().cpu())
    return torch.cat(embeds).numpy()


class M3FMDiagnosisPipeline(M3FMStudyPipeline):
    """Says how probable findings are, by their names in English or Chinese, without any training.

    Each label is weighed by itself, its presence against its absence, so that a study may have several or none; with
    `exclusive=True` the labels compete and their scores sum to 1. Studies are given as to `m3fm-report`. Every
    argument of a call but the images can be given when the pipeline is made, and is then the default of its calls.

    The result is a dict a study: `modality` and `input_check` as there, and `labels`, a list of dicts with the most
    probable first: `label` as it was given; `score`, a probability; `threshold` and `decision` (whether the score
    reaches it), None where the checkpoint has no threshold; `calibrated`, whether the score is a probability that was
    fitted to studies (`config.diagnosis` says on which) or only ranks them.

    Example:
    ```python
    >>> import m3fm
    >>> from transformers import pipeline
    >>> diagnose = pipeline("m3fm-diagnosis")
    >>> diagnose("cxr.dcm", candidate_labels=["tuberculosis", "normal"])["labels"][0]["label"]
    >>> diagnose(["a.png", "b.png"], candidate_labels=["肺结核", "正常"], exclusive=True, batch_size=2)
    >>> phrases = {"present": ["Miliary nodules in both lungs."], "absent": ["No miliary nodules."]}
    >>> diagnose("cxr.dcm", candidate_labels={"miliary": phrases, "tuberculosis": None})
    ```
    """

    task = "m3fm-diagnosis"

    def __call__(
        self,
        images: Any,
        candidate_labels: str | Sequence[str] | Mapping[str, Any] | None = None,
        exclusive: bool | None = None,
        report_language: str | None = None,
        batch_size: int | None = None,
        num_workers: int | None = None,
        on_error: str | None = None,
        on_suspect: str | None = None,
        **unknown: Any,
    ) -> dict[str, Any] | list[dict[str, Any]] | Iterator[dict[str, Any]]:
        """Scores the labels on one study, on a list of studies, or on a stream of them.

        Args:
            images: One study, a list of studies (each an image or a list of images), or a stream of them: an
                iterator, a data set or a column of one.
            candidate_labels: Names of findings, in either language and any case, or a mapping of names to None,
                `{"finding": name}` or phrases of your own: `{"present": [...], "absent": [...]}`, each a list or a
                mapping of languages to lists. None: the labels that the checkpoint is calibrated for.
            exclusive: Whether each study has exactly one of the labels; default no. Scores are then not calibrated.
            report_language: Also reads the report that the model writes in this language, and returns it as
                `report_<language>`; default None, the image alone. Scores are then not calibrated.
            batch_size: Studies that go through the model at once; default 1.
            num_workers: Processes that read ahead; default 0, read between batches.
            on_error: "raise" on the first study that is unreadable or refused, the default, or "row": its place in
                the results takes `{"error": reason}`, with its `input_check` where it was refused, and the others are
                diagnosed.
            on_suspect: "refuse" what is plainly not a chest, the default, or "warn": `input_check` says so beside
                scores that mean nothing.
            unknown: Refused, with the names that are accepted.

        Returns:
            A dict for one study, a list of dicts for a list, an iterator of dicts for a stream.

        Raises:
            ValueError: If a label is unknown (the nearest names are given), comes twice or contradicts itself, a study
                cannot be read, the language is not the checkpoint's, or an argument is unknown.
            RefusedInput: A ValueError, with the `check` of the images, if they are plainly not a chest.
            ImportError: If a DICOM or NIfTI file is given and its optional reader is not installed.
        """
        given, _, _ = self._sanitize_parameters(
            candidate_labels, exclusive, report_language, on_error, on_suspect, **unknown
        )
        settings = {"candidate_labels": None, "exclusive": False, "report_language": None}
        settings |= self._preprocess_params | given
        language = settings["report_language"]
        scored = self.score_labels(settings["candidate_labels"], settings["exclusive"], language is not None)
        reading = settings | {"batch_size": batch_size, "num_workers": num_workers}
        return self.run_studies(images, reading, scored=scored, report_language=language)

    @property
    def label_table(self) -> Mapping[str, Any]:
        """Returns the labels of the checkpoint, as `config.diagnosis`; those of the package where it has none."""
        if self.model.config.diagnosis:
            return self.model.config.diagnosis
        try:  # code that came with a checkpoint has no package around it
            return import_module(".diagnosis.prompts", __package__).default_diagnosis()
        except ImportError:
            return {}

    def score_labels(self, candidate_labels: Any, exclusive: bool = False, reads_report: bool = False) -> ScoredLabels:
        """Embeds the phrases of labels.

        Raises:
            ValueError: As a call.
        """
        labels = choose_candidates(candidate_labels, self.label_table, exclusive)
        present, absent = (
            mean_phrases([getattr(label, kind) for label in labels], self._embed_texts)
            for kind in ("present", "absent")
        )
        weight = self.model.config.diagnosis_report_weight if reads_report else None
        return ScoredLabels(labels, present, absent, float(self._towers.logit_scale.detach().exp()), exclusive, weight)

    def _sanitize_parameters(
        self,
        candidate_labels: str | Sequence[str] | Mapping[str, Any] | None = None,
        exclusive: bool | None = None,
        report_language: str | None = None,
        on_error: str | None = None,
        on_suspect: str | None = None,
        **unknown: Any,
    ) -> tuple[dict, dict, dict]:
        """Checks the arguments of the construction or of a call; what was not given is left out."""
        self._refuse_unknown(unknown, _ARGUMENTS)
        reading = self._checked_reading(on_error=on_error, on_suspect=on_suspect)
        if exclusive is not None and not isinstance(exclusive, bool):
            raise ValueError(f"Expected exclusive to be True or False, got {exclusive!r}.")
        languages = self.model.config.languages
        if report_language is not None and report_language not in languages:
            raise ValueError(f"Unsupported report_language {report_language!r}: expected one of {list(languages)}.")
        if report_language is not None and not self.model.can_generate():
            raise ValueError(f"{type(self.model).__name__} writes no report: expected report_language to be None.")
        if candidate_labels is not None:
            default = getattr(self, "_preprocess_params", {}).get("exclusive", False)
            choose_candidates(candidate_labels, self.label_table, default if exclusive is None else exclusive)
        given = {"candidate_labels": candidate_labels, "exclusive": exclusive}
        given |= {"report_language": report_language}
        return reading | {name: value for name, value in given.items() if value is not None}, {}, {}

    def _embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        return embed_texts(self._towers, self.processor, texts)

    def _answer(
        self,
        tokens: torch.Tensor,
        mask: torch.Tensor,
        studies: Sequence[Mapping[str, Any]],
        scored: ScoredLabels,
        report_language: str | None,
    ) -> dict[str, Any]:
        """Embeds the images, and writes their reports where these are to be read too."""
        images = self._towers.get_image_features(vision_features=tokens, image_mask=mask)  # (B, D)
        answer = {"image_embeds": images.float()}
        if report_language is not None:
            answer["sequences"] = self.model.generate(
                vision_features=tokens, image_mask=mask, language=report_language, do_sample=False
            )
        return answer

    def _answer_rows(
        self, answer: Mapping[str, Any], scored: ScoredLabels, report_language: str | None
    ) -> list[dict[str, Any]]:
        """Scores a batch, one dict a study."""
        rows: list[dict[str, Any]] = [{} for _ in answer["image_embeds"]]
        reports = None
        if report_language is not None:
            texts = self.processor.batch_decode(answer["sequences"], skip_special_tokens=True)
            texts = [text.strip() for text in texts]
            reports = self._embed_texts(texts)
            rows = [{f"report_{report_language}": text} for text in texts]
        logits = scored.logits(answer["image_embeds"].numpy(), reports)  # (B, L)
        return [row | {"labels": scored.answers(each)} for row, each in zip(rows, logits, strict=True)]


__all__ = ["M3FMDiagnosisPipeline"]
