# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""What an adaptation changes: texts and images, in the language that is adapted and in the others, before and after.

Letters in shapes: R texts, D width of the shared space.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import cross_entropy, normalize

from ..data import load_studies
from ..evaluation.tables import markdown_table
from ..evaluation.text_metrics import score_reports
from ..modeling_m3fm import M3FMForReportGeneration
from ..processing_m3fm import M3FMProcessor
from .collators import ReportTexts
from .features import FeatureCache
from .languages import is_spaced
from .text_bank import TextBank, TextGroup
from .write import WriteValidation, write_in_shares

if TYPE_CHECKING:
    from .adapt_text import AdaptTextRecipe

__all__ = ["AdaptValidation", "image_validations", "scores_table", "text_bleu"]

# More held-out texts of a language than this tell nothing more, and are written one token at a time.
_MOST_TEXTS = 200
_WRITTEN = 64
_AT_ONCE = 32
# In tables; what stands before is the language.
_TITLES = {
    "loss": "held-out texts, loss a token",
    "bleu_4": "held-out texts written again, BLEU-4",
    "cosine": "text encoder, cosine with the base's embedding",
}


class AdaptValidation:
    """Scores held-out texts by how well they are written from their embeddings, and reports of images.

    Args:
        language: The one that is adapted.
        texts: Makes the decoder's inputs.
        processor: Of the model.
        groups: Held-out texts, of which `targets` are written.
        images: By language, what scores reports of images.
    """

    def __init__(
        self,
        language: str,
        texts: ReportTexts,
        processor: M3FMProcessor,
        groups: Sequence[TextGroup],
        images: Mapping[str, WriteValidation],
    ):
        self.language = language
        self.texts = texts
        self.processor = processor
        self.images = images
        by_language: dict[str, list[TextGroup]] = {}
        for group in groups:
            by_language.setdefault(group.targets[0], []).append(group)
        self.banks = {code: TextBank(each[:_MOST_TEXTS], (code,)) for code, each in by_language.items()}
        self._first: dict[str, torch.Tensor] = {}

    def score_names(self) -> Sequence[str]:
        """Returns the names of the scores that a run is followed by."""
        return [self._loss_name(code) for code in self.banks]

    def _loss_name(self, language: str) -> str:
        # The same in every language, so that a recipe can name it.
        return "text_loss" if language == self.language else f"{language}_loss"

    def score(self, model: M3FMForReportGeneration) -> dict[str, float]:
        """Returns the loss a token of held-out texts: `text_loss` of the language that is adapted, `zh_loss`."""
        self._embed(model)
        return {
            self._loss_name(code): self._loss(model, bank, [passage.own_row for passage in bank.passages])
            for code, bank in self.banks.items()
        }

    def all_scores(self, model: M3FMForReportGeneration) -> dict[str, float]:
        """Returns all scores, each named by its language first: losses, BLEU-4 of texts, and those of images.

        The first call sets what later embeddings are compared with.
        """
        self._embed(model)
        scores: dict[str, float] = {}
        for code, bank in self.banks.items():
            scores |= self._text_scores(model, code, bank)
        for code, images in self.images.items():
            scores |= {
                f"{code}_images_{name.removesuffix(f'_{code}')}": each for name, each in images.score(model).items()
            }
        return scores

    def _embed(self, model: M3FMForReportGeneration) -> None:
        for bank in self.banks.values():
            bank.embed(model.model, self.processor)

    def _text_scores(self, model: M3FMForReportGeneration, code: str, bank: TextBank) -> dict[str, float]:
        own = [passage.own_row for passage in bank.passages]
        scores = {f"{code}_loss": self._loss(model, bank, own), f"{code}_bleu_4": self._bleu(model, bank, own)}
        first = self._first.setdefault(code, bank.embeds[own].float())
        cosine = (normalize(bank.embeds[own].float(), dim=-1) * normalize(first, dim=-1)).sum(dim=-1).mean()
        scores[f"{code}_cosine"] = float(cosine)
        if bank.passages and all(passage.other_rows for passage in bank.passages):
            other = [passage.other_rows[0] for passage in bank.passages]
            scores[f"{code}_from_parallel_loss"] = self._loss(model, bank, other)
            scores[f"{code}_from_parallel_bleu_4"] = self._bleu(model, bank, other)
            nearest = (bank.embeds[own].float() @ bank.embeds[other].float().t()).argmax(dim=-1)
            found = [bank.texts[other[place]] == bank.texts[row] for place, row in zip(nearest, other, strict=True)]
            scores[f"{code}_parallel_recall_1"] = sum(found) / len(found)
        return scores

    @torch.inference_mode()
    def _loss(self, model: M3FMForReportGeneration, bank: TextBank, rows: Sequence[int]) -> float:
        """Returns the cross-entropy a token of passages written from some rows of the embeddings, without noise."""
        was_training, total, count = model.training, 0.0, 0
        model.eval()
        for start in range(0, len(rows), _AT_ONCE):
            passages = bank.passages[start : start + _AT_ONCE]
            inputs = self.texts.decoder_inputs([each.text for each in passages], [each.language for each in passages])
            inputs = {name: value.to(model.device) for name, value in inputs.items()}
            labels = inputs.pop("labels")[:, 1:]
            embeds = bank.embeds[rows[start : start + _AT_ONCE]].float().to(model.device)
            logits = model(**inputs, shared_embeds=embeds).logits[:, :-1].float()
            total += float(cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"))
            count += int((labels != -100).sum())
        model.train(was_training)
        return total / max(count, 1)

    def _bleu(self, model: M3FMForReportGeneration, bank: TextBank, rows: Sequence[int]) -> float:
        """Returns BLEU-4 of passages written from some rows of the embeddings."""
        places = list(range(min(len(rows), _WRITTEN)))

        @torch.inference_mode()
        def write(chosen: Sequence[int]) -> list[str]:
            embeds = bank.embeds[[rows[place] for place in chosen]].float().to(model.device)
            ids = model.generate(
                shared_embeds=embeds,
                language=[bank.passages[place].language for place in chosen],
                max_new_tokens=self.texts.max_length,
                num_beams=1,
                do_sample=False,
            )
            return self.processor.batch_decode(ids, skip_special_tokens=True)

        written = write_in_shares(model, places, write, _AT_ONCE)
        return text_bleu(written, [bank.passages[place].text for place in places])


def text_bleu(written: list[str], references: list[str]) -> float:
    """Returns BLEU-4 in any language: of words where there are spaces between them, else of characters."""
    tokenized_as = "en" if is_spaced(references) else "zh"
    return score_reports(written, references, tokenized_as, metrics=("bleu_4",))["bleu_4"]


def image_validations(
    recipe: "AdaptTextRecipe", model: M3FMForReportGeneration, processor: M3FMProcessor, max_length: int
) -> dict[str, WriteValidation]:
    """Returns what scores reports of the validation images of a recipe's set, by language; {} without a set.

    Args:
        recipe: Of the run.
        model: With the image tower.
        processor: Of the model.
        max_length: Tokens of a report.

    Raises:
        ValueError: If the set has no validation image with a report.
    """
    if not recipe.validation_set:
        return {}
    studies = [
        study
        for study in load_studies(Path(recipe.data_root) / recipe.validation_set)
        if study.split == "validation" and study.images
    ]
    spoken = {code: [study for study in studies if code in study.reports] for code in model.config.languages}
    spoken = {code: each for code, each in spoken.items() if each}
    if not spoken:
        raise ValueError(
            f"validation_set: {recipe.validation_set} has no validation study with images and a report in "
            f"{list(model.config.languages)}; choose another set, or leave it empty."
        )
    cache = FeatureCache(Path(recipe.feature_cache), model.model.vision_model, processor.image_processor)
    cache.fill({study.study_id: study for each in spoken.values() for study in each}.values())
    return {
        code: WriteValidation(each, (code,), cache, processor, max_new_tokens=max_length)
        for code, each in spoken.items()
    }


def scores_table(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Renders scores before and after as Markdown."""
    lines = [["language", "", "before", "after"]]
    for name in after:
        language, _, what = name.partition("_")
        lines.append(
            [language, _title(what), *(f"{each[name]:.3f}" if name in each else "" for each in (before, after))]
        )
    return markdown_table(lines)


def _title(name: str) -> str:
    if name.startswith("images_"):
        return f"reports of images, {name.removeprefix('images_').replace('_', ' ')}"
    if name.startswith("from_parallel_"):
        return f"from parallel text, {_TITLES[name.removeprefix('from_parallel_')].split(', ')[1]}"
    return _TITLES.get(name, name.replace("_", " "))
