# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Collators: studies of any data set to the tensors that a model's `forward` takes.

A collator has two parts, the images of a batch and what the model is told besides. It takes lists of `Study`,
`StudyRecord` or rows of `datasets`, and goes into a `DataLoader` with workers or into `transformers.Trainer` with
`remove_unused_columns=False`.

Letters: B studies, T tokens, L findings, P places of the embedding in a prompt, K of further image tokens.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from ..configuration_m3fm import M3FMConfig
from ..data import FINDINGS, Study, finding_sentence
from ..data.schema import LANGUAGES, StudyRecord
from .fed_studies import Draw, FedStudy, fed_study, finding_targets
from .samplers import shared_epoch
from .study_images import Images
from .supervision import UNCERTAIN_POLICIES

__all__ = ["DRAWN", "FindingLabels", "PairedTexts", "ReportTexts", "StudyCollator", "Targets"]

DRAWN = "drawn"
_SENTENCE_ENDS = (". ", "。", "；", "; ")


class Targets(Protocol):
    """What makes the rest of a batch."""

    def batch(self, studies: Sequence[FedStudy], draw: Draw) -> dict[str, Any]:
        """Returns the tensors of these studies, by the names of the model's `forward`."""


class StudyCollator:
    """Turns a list of studies into a batch.

    ```python
    pixels = StudyPixels(processor.image_processor, augmentation=Augmentation())
    collator = StudyCollator(pixels, ReportTexts(processor.tokenizer, model.config, language="zh"))
    ```

    What is drawn hangs on the epoch. `ResumableLoader`, `StreamLoader` and `FeedTrainer` tell it; with plain `Trainer`
    and `DataLoader` call `set_epoch` before each epoch, as from a callback: else each epoch draws the same.

    Args:
        images: `StudyPixels`, or `CachedTokens` of a frozen tower.
        targets: `ReportTexts`, `PairedTexts` or `FindingLabels`.
        seed: Of all that is drawn: augmentation, languages, sentences.
    """

    def __init__(self, images: Images, targets: Targets, seed: int = 0):
        self.images = images
        self.targets = targets
        self.seed = seed
        self._epoch = shared_epoch()

    @property
    def epoch(self) -> int:
        """The epoch that is drawn for."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch, in all workers too; before the batches of the epoch are asked for."""
        self._epoch[0] = epoch

    def for_evaluation(self) -> "StudyCollator":
        """Returns a collator of the same studies that does not augment, and stays in epoch 0 unless it is told.

        So an evaluation draws the same languages and sentences each time, whatever epoch the training is in.
        """
        plain = copy.copy(self)
        plain.images = self.images.for_evaluation()
        plain._epoch = shared_epoch()
        return plain

    def __call__(self, items: Sequence[Study | StudyRecord | Mapping[str, Any]]) -> dict[str, Any]:
        """Collates a batch.

        Raises:
            ValueError: If there is no study, an image cannot be read and that is not to be skipped (or all are
                skipped), or a study lacks what is asked for.
        """
        if not len(items):
            raise ValueError("The batch is empty: expected at least one study.")
        draw = Draw(self.seed, self.epoch)
        studies, tensors = self.images.batch([fed_study(item) for item in items], draw)
        return tensors | self.targets.batch(studies, draw)


class ReportTexts:
    """Makes the report to be written, for `M3FMForReportGeneration`: `input_ids`, `attention_mask`, `labels` (B, T).

    A row is the places of the image, the language token, the report and its end, padded on the right; the loss is on
    report and end alone. A report that is too long ends with its last whole sentence that fits. Where not even its
    first sentence fits, it is cut after the last token that does, within a sentence or a word, and its end follows all
    the same: choose `max_length` so that this is rare.

    Args:
        tokenizer: The bilingual one.
        config: Of the model: how a prompt looks, and which languages there are.
        language: A code, or "drawn": one of those that the study has, anew in each epoch.
        max_length: Most tokens of a report, its end included.

    Raises:
        ValueError: If the model does not write the language.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, config: M3FMConfig, language: str = DRAWN, max_length: int = 160
    ):
        self.tokenizer = tokenizer
        self.languages = tuple(config.languages)
        self.language = _known_language(language, self.languages)
        self.max_length = max_length
        self.num_image_tokens = config.num_image_tokens
        self._place = config.image_token_id
        places = [self._place] * config.num_prefix_tokens
        self._prompts = {code: [*places, config.language_token_ids[code]] for code in self.languages}

    def batch(self, studies: Sequence[FedStudy], draw: Draw) -> dict[str, torch.Tensor]:
        """Builds the decoder's inputs.

        Raises:
            ValueError: If a study has no report in the language.
        """
        spoken = [_drawn_language(study, self.language, self.languages, draw) for study in studies]
        reports = [study.reports[code] for study, code in zip(studies, spoken, strict=True)]
        return self.decoder_inputs(reports, spoken, self.num_image_tokens)

    def decoder_inputs(
        self, texts: Sequence[str], languages: Sequence[str], num_image_tokens: int = 0
    ) -> dict[str, torch.Tensor]:
        """Builds the inputs of texts, each in its language, with further places in front where they are of images."""
        further = [self._place] * num_image_tokens
        prompts = torch.tensor([further + self._prompts[code] for code in languages])  # (B, K + P + 1)
        end, pad = self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
        bodies = [self.encoded(text) + [end] for text in texts]
        longest = max(map(len, bodies))
        ids = torch.tensor([body + [pad] * (longest - len(body)) for body in bodies])
        real = torch.tensor([[1] * len(body) + [0] * (longest - len(body)) for body in bodies])
        return {
            "input_ids": torch.cat([prompts, ids], dim=1),
            "attention_mask": torch.cat([torch.ones_like(prompts), real], dim=1),
            "labels": torch.cat([torch.full_like(prompts, -100), ids.masked_fill(real == 0, -100)], dim=1),
        }

    def encoded(self, text: str) -> list[int]:
        """Returns the tokens of a report, shortened to its last whole sentence that fits where it is too long.

        Where no whole sentence fits, it is cut after the last token that does.
        """
        ids = self.tokenizer(text)["input_ids"]
        if len(ids) < self.max_length:
            return ids
        kept = self.tokenizer.decode(ids[: self.max_length - 1], skip_special_tokens=True)
        # One token more tells whether a space follows the point at which the cut falls: a sentence's, not a number's.
        further = self.tokenizer.decode(ids[: self.max_length], skip_special_tokens=True)
        end = max(further[: len(kept) + mark.endswith(" ")].rfind(mark) for mark in _SENTENCE_ENDS)
        return self.tokenizer(kept[: end + 1] if end > 0 else kept)["input_ids"][: self.max_length - 1]


class PairedTexts:
    """Makes one text a study, for the contrastive loss of `M3FMModel`: `input_ids`, `attention_mask` (B, T).

    The text is the study's report; where it has none, a sentence made of its findings, anew in each epoch. The batch
    says `return_loss`; `TrainingArguments.label_names` stays unset.

    Args:
        tokenizer: The bilingual one.
        language: A code, or "drawn": one of those that the study has, anew in each epoch.
        max_length: Tokens of a text that are read; None: as many as the tokenizer says.

    Raises:
        ValueError: For an unknown language.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, language: str = DRAWN, max_length: int | None = None):
        self.tokenizer = tokenizer
        self.language = _known_language(language, LANGUAGES)
        self.max_length = max_length

    def batch(self, studies: Sequence[FedStudy], draw: Draw) -> dict[str, Any]:
        """Tokenizes the texts.

        Raises:
            ValueError: If a study has neither a report in the language nor findings.
        """
        texts = [self._text(study, draw) for study in studies]
        tokens = self.tokenizer(texts, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt")
        return {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"], "return_loss": True}

    def _text(self, study: FedStudy, draw: Draw) -> str:
        certain = {name: value for name, value in study.findings.items() if value in (0.0, 1.0)}
        has_report = bool(study.reports) if self.language == DRAWN else self.language in study.reports
        if has_report or not certain:
            return study.reports[_drawn_language(study, self.language, LANGUAGES, draw)]
        rng = draw.generator("sentence", study.key)
        language = LANGUAGES[int(rng.integers(len(LANGUAGES)))] if self.language == DRAWN else self.language
        return finding_sentence(certain, language, rng)


class FindingLabels:
    """Makes `labels` (B, L) float32, NaN where unknown, for `M3FMForImageClassification` of several labels.

    Args:
        findings: The labels in the model's order, of `m3fm.data.FINDINGS`.
        uncertain: What an uncertain finding is: "ignore" (unknown), "positive", "negative" or "half".

    Raises:
        ValueError: For an unknown finding or policy.
    """

    def __init__(self, findings: Sequence[str], uncertain: str = "ignore"):
        unknown = sorted(set(findings) - set(FINDINGS))
        if unknown or not findings:
            raise ValueError(f"findings: got {unknown or 'none'}, expected names of m3fm.data.FINDINGS.")
        if uncertain not in UNCERTAIN_POLICIES:
            raise ValueError(f"uncertain: got {uncertain!r}, expected one of {sorted(UNCERTAIN_POLICIES)}.")
        self.findings = tuple(findings)
        self.uncertain = uncertain

    def batch(self, studies: Sequence[FedStudy], draw: Draw) -> dict[str, torch.Tensor]:
        """Makes the labels."""
        values, known = finding_targets(studies, self.findings, self.uncertain)
        return {"labels": torch.from_numpy(np.where(known, values, np.float32("nan")))}


def _known_language(language: str, spoken: Sequence[str]) -> str:
    if language not in (DRAWN, *spoken):
        raise ValueError(f"language: got {language!r}, expected {DRAWN!r} or one of {list(spoken)}.")
    return language


def _drawn_language(study: FedStudy, wanted: str, spoken: Sequence[str], draw: Draw) -> str:
    """Returns the language wanted, or one drawn of those that the study has texts in."""
    has = [code for code in spoken if code in study.reports]
    if wanted in has:
        return wanted
    if wanted != DRAWN or not has:
        asked = f"any of {list(spoken)}" if wanted == DRAWN else repr(wanted)
        columns = [f"row['report_{code}']" for code in (spoken if wanted == DRAWN else [wanted])]
        raise ValueError(
            f"A study of the batch has no report in {asked}: leave such studies out first, as by "
            f"dataset.filter(lambda row: bool({' or '.join(columns)}))."
        )
    return has[int(draw.generator("language", study.key).integers(len(has)))]
