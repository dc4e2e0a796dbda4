# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""What stage 1 makes of a study: images, texts, and what the targets need to know of both.

What a study brings to a batch depends on what its set has: an image and its report, an image and its labels, a report
in two languages. All of them share one batch and one loss (`objective.py`).
"""

import copy
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from ..data import Study, finding_sentence, label_vector
from ..data.schema import StudyRecord
from .fed_studies import Draw, FedStudy, fed_study
from .objective import BatchFacts
from .samplers import shared_epoch
from .study_images import Images

__all__ = ["AlignCollator", "certain_findings"]

MODALITIES = ("cxr", "ct")
_Item = Study | StudyRecord | Mapping[str, Any]


class AlignCollator:
    """Turns studies into images, texts and what the targets need to know of them.

    A study without a report gets a sentence made of its labels in every language, anew in each epoch; one with images,
    a report and labels now and then, so that its findings can be asked for by name. What is drawn for a study hangs on
    seed, epoch and study alone, and not on the batch that it comes in.

    Args:
        images: `StudyPixels`, or `CachedTokens` of a frozen tower.
        blank: Tensors of one study of one image, as `images` would give them. A batch without any image gets it, and
            no target: processes that train together wait for each other's gradients of every tower.
        tokenizer: The bilingual one.
        languages: In the model's order.
        max_length: Tokens of a text that are read.
        label_share: How often a study with images, a report and labels is described by its labels instead.
        seed: Of all that is drawn.
    """

    def __init__(
        self,
        images: Images,
        blank: Mapping[str, torch.Tensor],
        tokenizer: PreTrainedTokenizerBase,
        languages: Sequence[str],
        max_length: int = 128,
        label_share: float = 0.25,
        seed: int = 0,
    ):
        self.images = images
        self.blank = dict(blank)
        self.tokenizer = tokenizer
        self.languages = tuple(languages)
        self.max_length = max_length
        self.label_share = label_share
        self.seed = seed
        self._epoch = shared_epoch()

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch, in all workers too; before the batches of the epoch are asked for."""
        self._epoch[0] = epoch

    def for_evaluation(self) -> "AlignCollator":
        """Returns a collator of the same studies that does not augment, and stays in epoch 0 unless it is told."""
        plain = copy.copy(self)
        plain.images = self.images.for_evaluation()
        plain._epoch = shared_epoch()
        return plain

    def __call__(self, items: Sequence[_Item]) -> dict[str, Any]:
        """Collates a batch: `facts`, `input_ids`, `attention_mask`, `study_ids`, and the tensors of the images."""
        draw = Draw(self.seed, int(self._epoch))
        studies, image_study, tensors = self._images([fed_study(item) for item in items], draw)
        by_labels = [self._speaks_by_labels(study, draw) for study in studies]
        texts = [
            self._label_sentences(study, draw) if speaks else self._reports(study)
            for study, speaks in zip(studies, by_labels, strict=True)
        ]
        rows = [(place, code, text) for place, said in enumerate(texts) for code, text in said.items()]
        findings = [label_vector(certain_findings(study)) for study in studies]
        facts = BatchFacts(
            modality=torch.tensor([MODALITIES.index(study.modality) for study in studies]),
            has_report=~torch.tensor(by_labels),
            values=torch.from_numpy(np.stack([values for values, _ in findings])),
            known=torch.from_numpy(np.stack([known for _, known in findings])),
            image_study=torch.tensor(image_study, dtype=torch.long),
            text_study=torch.tensor([place for place, _, _ in rows]),
            text_number=torch.tensor([_number(text) for _, _, text in rows]),
            text_language=torch.tensor([self.languages.index(code) for _, code, _ in rows]),
        )
        tokens = self.tokenize([text for _, _, text in rows])
        return {"facts": facts, "study_ids": [study.key for study in studies], **tokens, **tensors}

    def tokenize(self, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Returns `input_ids` and `attention_mask` (J, T) of texts."""
        tokens = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
        )
        return {name: tokens[name] for name in ("input_ids", "attention_mask")}

    def longest_text(self, study: _Item) -> str:
        """Returns the longest of the texts that a study may bring to a batch."""
        fed = fed_study(study)
        texts = self._reports(fed) or self._label_sentences(fed, Draw(self.seed, 0))
        return max(texts.values(), key=lambda text: len(text.encode()))

    def _images(
        self, studies: list[FedStudy], draw: Draw
    ) -> tuple[list[FedStudy], list[int], dict[str, torch.Tensor]]:
        """Returns the studies whose images can be read or that have none, the places of the former, and tensors."""
        seen = [study for study in studies if study.images]
        if not seen:
            return studies, [], self.blank
        read, tensors = self.images.batch(seen, draw)
        unread = {id(study) for study in seen} - {id(study) for study in read}
        studies = [study for study in studies if id(study) not in unread]
        return studies, [place for place, study in enumerate(studies) if study.images], tensors

    def _reports(self, study: FedStudy) -> dict[str, str]:
        return {code: study.reports[code] for code in self.languages if code in study.reports}

    def _speaks_by_labels(self, study: FedStudy, draw: Draw) -> bool:
        if not certain_findings(study):
            return False
        if not self._reports(study):
            return True
        return bool(study.images) and draw.generator("label_share", study.key).random() < self.label_share

    def _label_sentences(self, study: FedStudy, draw: Draw) -> dict[str, str]:
        # The same generator gives the same choice of phrases in every language: the sentences are translations.
        findings = certain_findings(study)
        return {
            code: finding_sentence(findings, code, draw.generator("sentence", study.key)) for code in self.languages
        }


def certain_findings(study: FedStudy) -> dict[str, float]:
    """Returns the findings that a study certainly has or has not, 1.0 or 0.0."""
    return {name: value for name, value in study.findings.items() if value in (0.0, 1.0)}


def _number(text: str) -> int:
    """Numbers texts alike in all processes: the first 63 bits of a hash."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
