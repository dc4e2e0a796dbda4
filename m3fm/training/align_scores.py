# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""What stage 1 is scored by while it trains: retrieval between images, reports and languages; zero-shot diagnosis."""

from collections.abc import Sequence

import numpy as np
import torch

from ..data import ParallelPair, Study, finding_table
from ..evaluation.retrieval import retrieval_recall, same_text
from ..modeling_m3fm import M3FMModel
from .align_batches import AlignCollator
from .fed_studies import Draw, fed_study

__all__ = ["AlignValidation"]

_AT_ONCE = 64


class AlignValidation:
    """Scores MultiMedCLIP on validation studies.

    Args:
        studies: Of the validation part; those without images are left out.
        pairs: Texts in two languages.
        collator: Says how images are read and texts tokenized.
    """

    # A label is scored where it has at least this many studies on either side.
    minimum = 5

    def __init__(self, studies: Sequence[Study], pairs: Sequence[ParallelPair], collator: AlignCollator):
        self.studies = [study for study in studies if study.images]
        self.pairs = list(pairs)
        self.collator = collator.for_evaluation()
        self.languages = collator.languages

    @torch.inference_mode()
    def score(self, model: M3FMModel) -> dict[str, float]:
        """Returns recalls (`r10_image_en`, ...), `r1_en_zh`, and AUROCs per set and on average."""
        model.eval()
        scores = {}
        if self.studies:
            embeds = self._image_embeds(model)
            scores |= self._retrieval(model, embeds) | self._zero_shot(model, embeds)
        if self.pairs and len(self.languages) > 1:
            first, second = self.languages[:2]
            texts = [self._embed(model, [pair.texts[code] for pair in self.pairs]) for code in (first, second)]
            recalls = retrieval_recall(texts[0], texts[1], ks=(1,))
            scores[f"r1_{first}_{second}"] = recalls["forward"]["recall@1"]
        return scores

    def score_names(self) -> list[str]:
        """Returns the names of the scores, without asking a model."""
        names = []
        if self.studies:
            names += [f"r10_image_{code}" for code in self.languages if self._translated()]
            areas = [f"auroc_{source}" for source in self._sources() if self._scored_findings(source)]
            names += [*areas, "auroc"] if areas else []
        if self.pairs and len(self.languages) > 1:
            names.append("r1_{}_{}".format(*self.languages))
        return names

    def _image_embeds(self, model: M3FMModel) -> np.ndarray:
        chunks = []
        for start in range(0, len(self.studies), _AT_ONCE):
            fed = [fed_study(study) for study in self.studies[start : start + _AT_ONCE]]
            read, images = self.collator.images.batch(fed, Draw())
            if len(read) < len(fed):
                raise ValueError("An image of the validation part cannot be read: its studies have to be whole.")
            images = {name: value.to(model.device) for name, value in images.items()}
            chunks.append(model.get_image_features(**images).float().cpu().numpy())
        return np.concatenate(chunks)

    def _embed(self, model: M3FMModel, texts: Sequence[str]) -> np.ndarray:
        chunks = []
        for start in range(0, len(texts), _AT_ONCE):
            tokens = self.collator.tokenize(texts[start : start + _AT_ONCE])
            tokens = {name: value.to(model.device) for name, value in tokens.items()}
            chunks.append(model.get_text_features(**tokens).float().cpu().numpy())
        return np.concatenate(chunks)

    def _retrieval(self, model: M3FMModel, embeds: np.ndarray) -> dict[str, float]:
        rows = self._translated()
        scores = {}
        for language in self.languages if rows else ():
            texts = [self.studies[i].reports[language] for i in rows]
            recalls = retrieval_recall(embeds[rows], self._embed(model, texts), ks=(1, 10), positives=same_text(texts))
            scores[f"r10_image_{language}"] = recalls["forward"]["recall@10"]
        return scores

    def _zero_shot(self, model: M3FMModel, embeds: np.ndarray) -> dict[str, float]:
        from sklearn.metrics import roc_auc_score

        rows_of = {source: rows for source in self._sources() if (rows := self._scored_findings(source))}
        directions = {}
        for name in dict.fromkeys(name for rows in rows_of.values() for name in rows):
            finding = finding_table()[name]
            directions[name] = sum(
                self._embed(model, list(finding.present[code])).mean(axis=0)
                - self._embed(model, list(finding.absent[code])).mean(axis=0)
                for code in self.languages
            )
        scores = {}
        for source, findings in rows_of.items():
            areas = []
            for name, rows in findings.items():
                truth = [self.studies[row].findings[name] for row in rows]
                areas.append(roc_auc_score(truth, embeds[rows] @ directions[name]))
            scores[f"auroc_{source}"] = float(np.mean(areas))
        return scores | {"auroc": float(np.mean(list(scores.values())))} if scores else {}

    def _translated(self) -> list[int]:
        """Returns the studies with a report in all languages: elsewhere short notes would make a gallery easy."""
        return [row for row, study in enumerate(self.studies) if set(self.languages) <= set(study.reports)]

    def _sources(self) -> list[str]:
        return sorted({study.source for study in self.studies})

    def _scored_findings(self, source: str) -> dict[str, list[int]]:
        """Returns the findings that a set has often enough with and without, each with the studies that know it."""
        rows_of = {}
        for name in finding_table():
            rows = [
                row
                for row, study in enumerate(self.studies)
                if study.source == source and (study.findings or {}).get(name) in (0.0, 1.0)
            ]
            present = sum(self.studies[row].findings[name] for row in rows)
            if min(present, len(rows) - present) >= self.minimum:
                rows_of[name] = rows
        return rows_of
