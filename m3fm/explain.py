# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Say what in an image speaks for a phrase, and what in it each sentence of a report goes back to.

Both methods explain the score that diagnosis uses, the agreement of the pooled study with a text, through the layers
between the image tower's patch tokens and the shared space:

- "similarity": what the score loses when the patches around a place are left out of the pooling (occlusion, Zeiler and
  Fergus, ECCV 2014, on tokens rather than pixels). The tower is run once, and leaving tokens out of an attention
  average is exact, so this costs no more than a projection.
- "gradient": the derivative of the score by a gate on each patch token, gradient times input at gates of one (Michel
  et al., NeurIPS 2019, for tokens in place of heads), summed over the same places.

A patch token of a transformer holds something of the whole image, and neither method looks into the tower.
`benchmarks/grounding.py` measures how often a map points at what a radiologist marked. For research only.

Letters in shapes: N images of a study, S tokens of an image of which P are patches, C width of the tower, Q pooling
queries, D width of the shared space, H and W an image as it was read.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

from . import DEFAULT_CHECKPOINT
from .chest_image_m3fm import MODALITIES, ChestImage
from .diagnosis.prompts import default_diagnosis
from .diagnosis_m3fm import find_label, label_phrases, mean_phrases
from .diagnosis_pipeline_m3fm import embed_texts
from .evaluation.reporter import checkpoint_folder
from .explain_evidence import SentenceEvidence, weigh_report
from .explain_maps import HeatMap, ImageMap, display_pixels, to_image

METHODS = ("similarity", "gradient")
# Side, in patches, of the part of the image that is left out around each patch, by `benchmarks/grounding.py`.
DEFAULT_WINDOWS = {"similarity": 7, "gradient": 7}
# What remains of the attention when nearly all is left out, so that dividing by it is safe.
_LEAST_ATTENTION = 1e-6
# First and last character of scripts that tell a language.
_SCRIPTS = {"zh": ("\u4e00", "\u9fff")}


@dataclass(frozen=True, eq=False)
class Target:
    """A text, or a label with its prompts, as a direction of the shared space.

    Attributes:
        phrase: As it was given.
        finding: The label, None for a text that stands for itself.
        language: Of the text or of the prompts.
        direction: (D,). The score of a study is its embedding times this.
    """

    phrase: str
    finding: str | None
    language: str
    direction: torch.Tensor = field(repr=False)


@dataclass(frozen=True, eq=False)
class EncodedStudy:
    """A study that went through the image tower, to be explained any number of times.

    Attributes:
        images: What is known of each image or slice before it is explained; their values are empty.
        tokens: (N, S, C).
        grid: Rows and columns of patches.
    """

    images: tuple[ImageMap, ...]
    tokens: torch.Tensor = field(repr=False)
    grid: tuple[int, int]


class Explainer:
    """Explains images by the text side of a checkpoint.

    Args:
        model: `M3FMModel`, or `M3FMForReportGeneration` where reports are to be generated.
        processor: The checkpoint's.

    Raises:
        ValueError: If the image tower has no square of patches.

    Example:

    ```python
    >>> from m3fm.explain import Explainer
    >>> explainer = Explainer.from_pretrained()
    >>> heat_map = explainer.heat_map("chest.png", "pleural effusion")
    >>> heat_map.maps[0].shape, heat_map.top.region.text
    ```
    """

    def __init__(self, model: PreTrainedModel, processor: Any):
        self.model = model.eval()
        self.processor = processor
        self._towers = getattr(model, model.base_model_prefix, model)
        patch = getattr(model.config.vision_config, "patch_size", None)
        if patch is None:
            kind = model.config.vision_config.model_type
            raise ValueError(f"The image tower {kind!r} has no patch_size: expected a vision transformer.")
        self.cell = (patch, patch) if isinstance(patch, int) else tuple(patch)
        self._prompts: dict[str, np.ndarray] = {}

    @classmethod
    def from_pretrained(cls, path: str | Path | None = None, device: str = "cpu") -> "Explainer":
        """Loads a checkpoint folder, by default the one that ships.

        Raises:
            ValueError: If it is none.
        """
        folder = checkpoint_folder(DEFAULT_CHECKPOINT if path is None else path)
        config = AutoConfig.from_pretrained(folder)
        writes = "M3FMForReportGeneration" in (config.architectures or ())
        auto = AutoModelForImageTextToText if writes else AutoModel
        model = auto.from_pretrained(folder, dtype=torch.float32).to(device)
        return cls(model, AutoProcessor.from_pretrained(folder))

    @property
    def label_table(self) -> Mapping[str, Any]:
        """Returns the labels of the checkpoint, as `config.diagnosis`; those of the package where it has none."""
        return self.model.config.diagnosis or default_diagnosis()

    @property
    def logit_scale(self) -> float:
        """Returns what cosines are multiplied by before a probability."""
        return float(self._towers.logit_scale.detach().exp())

    # ----------------------------------------------------------------------------------------------------------------
    # What is explained

    @torch.inference_mode()
    def read(self, images: Any, modality: str | None = None) -> EncodedStudy:
        """Reads a study, an image, a folder or a list of images, and runs the image tower.

        Args:
            images: As `m3fm-report` takes one study.
            modality: "cxr" or "ct" for files that do not say; None leaves it open.

        Raises:
            ValueError: If an image cannot be read, the list is empty, or there is no such modality.
            ImportError: If a DICOM or NIfTI file is given and its optional reader is not installed.
        """
        if modality not in (*MODALITIES, None):
            raise ValueError(f"Expected modality to be one of {list(MODALITIES)} or None, got {modality!r}.")
        if isinstance(images, list | tuple) and not images:
            raise ValueError("Expected a study of at least one image, got an empty list.")
        processor = self.processor.image_processor
        read = processor.read_study(images)
        pixels = self.processor(images=[read], return_tensors="pt")["pixel_values"].to(self.model.device)
        tokens = self._towers.get_vision_features(pixels)[0]  # (N, S, C)
        grid = tuple(side // cell for side, cell in zip(pixels.shape[-2:], self.cell, strict=True))
        if tokens.shape[1] < grid[0] * grid[1]:
            raise ValueError(f"The image tower gives {tokens.shape[1]} tokens, expected one for each patch of {grid}.")
        return EncodedStudy(tuple(_planes(read, processor, modality)), tokens, grid)

    def target(self, phrase: str, language: str | None = None) -> Target:
        """Turns a phrase into a direction; the name of a label, in any language, into presence minus absence.

        Args:
            phrase: In a language of the checkpoint.
            language: None tells it by the script.

        Raises:
            ValueError: If the phrase is empty, or the language is not the checkpoint's.
        """
        phrase, language = self._checked(phrase, language)
        try:
            key = find_label(self.label_table, phrase)
        except ValueError:
            return self.text_target(phrase, language)
        return self._label_target(phrase, key, language)

    def text_target(self, text: str, language: str | None = None) -> Target:
        """Turns a text into a direction as it stands, also where it is the name of a label.

        Raises:
            ValueError: As `target`.
        """
        text, language = self._checked(text, language)
        return Target(text, None, language, self._tensor(mean_phrases([[text]], self.embed_texts)[0]))

    def label_target(self, label: str, language: str | None = None) -> Target:
        """Turns a label, by its key or any of its names, into the direction from its absence to its presence.

        Raises:
            ValueError: If there is no such label (the nearest are named), or it has no prompts in the language.
        """
        label, language = self._checked(label, language)
        return self._label_target(label, find_label(self.label_table, label), language)

    def _label_target(self, phrase: str, key: str, language: str) -> Target:
        prompts = [label_phrases(self.label_table, key, kind).get(language) for kind in ("present", "absent")]
        if not all(prompts):
            raise ValueError(f"The label {key!r} has no prompts in {language!r}: expected another language.")
        present, absent = mean_phrases(prompts, self.embed_prompts)
        return Target(phrase, key, language, self._tensor(present - absent))

    def _checked(self, phrase: str, language: str | None) -> tuple[str, str]:
        if not isinstance(phrase, str) or not phrase.strip():
            raise ValueError(f"Expected a phrase or the name of a label, got {phrase!r}.")
        language = detect_language(phrase, self.model.config.languages) if language is None else language
        self._check_language(language)
        return phrase.strip(), language

    def _check_language(self, language: str) -> None:
        known = self.model.config.languages
        if language not in known:
            raise ValueError(f"Unsupported language {language!r}: expected one of {list(known)}.")

    def embed_prompts(self, texts: Sequence[str]) -> np.ndarray:
        """Returns texts in the shared space, (texts, D), unit norm, and keeps them: prompts are asked for again."""
        missing = [text for text in dict.fromkeys(texts) if text not in self._prompts]
        if missing:
            self._prompts |= dict(zip(missing, self.embed_texts(missing), strict=True))
        return np.stack([self._prompts[text] for text in texts])

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Returns texts in the shared space, (texts, D), unit norm."""
        return embed_texts(self._towers, self.processor, texts)

    @torch.inference_mode()
    def embed_study(self, study: EncodedStudy) -> np.ndarray:
        """Returns a study in the shared space, (D,), unit norm."""
        return self._towers.get_image_features(vision_features=study.tokens[None])[0].float().cpu().numpy()

    def _tensor(self, direction: np.ndarray) -> torch.Tensor:
        return torch.as_tensor(direction, dtype=torch.float32, device=self.model.device)

    # ----------------------------------------------------------------------------------------------------------------
    # Maps

    def heat_map(
        self,
        images: Any,
        phrase: str | Target,
        method: str = "similarity",
        language: str | None = None,
        window: int | None = None,
        modality: str | None = None,
    ) -> HeatMap:
        """Maps what in a study speaks for a phrase.

        Args:
            images: An image, a list of images, or what `read` returned for them.
            phrase: A phrase or the name of a label, in any language of the checkpoint; or what `target` returned.
            method: One of `METHODS`; see the module.
            language: Of the phrase; None tells it by the script.
            window: Odd side, in patches, of the places that are left out or summed over; None takes the method's of
                `DEFAULT_WINDOWS`.
            modality: "cxr" or "ct" for files that do not say.

        Raises:
            ValueError: If the phrase is empty, or the method, window, language or an image is not right.
            ImportError: If a DICOM or NIfTI file is given and its optional reader is not installed.
        """
        target = phrase if isinstance(phrase, Target) else self.target(phrase, language)
        if method not in METHODS:
            raise ValueError(f"Unknown method {method!r}: expected one of {list(METHODS)}.")
        window = DEFAULT_WINDOWS[method] if window is None else window
        if not isinstance(window, int) or window < 1 or window % 2 == 0:
            raise ValueError(f"Expected window to be an odd number of patches, got {window!r}.")
        study = images if isinstance(images, EncodedStudy) else self.read(images, modality)
        explain = {"similarity": self._occlusion, "gradient": self._gate_gradient}[method]
        grids = explain(study, target.direction, window).float().cpu().numpy()  # (N, rows, columns)
        score, attention, drops = self._pooling(study, target.direction)
        total = float(np.abs(drops).sum()) if len(drops) > 1 else 0.0
        size = tuple(self.processor.image_processor.size[side] for side in ("height", "width"))
        maps = tuple(
            replace(
                image,
                values=to_image(grid, self.cell, size, image.pixels.shape),
                attention=float(weight),
                drop=float(drop) if len(drops) > 1 else None,
                relevance=float(abs(drop)) / total if total else None,
            )
            for image, grid, weight, drop in zip(study.images, grids, attention, drops, strict=True)
        )
        return HeatMap(target.phrase, target.finding, target.language, method, score, maps)

    @torch.inference_mode()
    def _occlusion(self, study: EncodedStudy, direction: torch.Tensor, window: int) -> torch.Tensor:
        """Returns what the score loses without the window around each patch, (N, rows, columns)."""
        keys, weights = self._attention(study.tokens)  # (N, S, C), (Q, N, S)
        pooled = torch.einsum("qns,nsc->qc", weights, keys)
        full = self._score(pooled[None], direction)  # (1,)
        rows, columns = study.grid
        maps = []
        for image in range(len(keys)):
            weight = weights[:, image, -rows * columns :]  # (Q, P); the patches follow the special tokens
            parts = weight[:, None] * keys[image, -rows * columns :].T  # (Q, C, P)
            around = _window_sum(parts.view(*parts.shape[:2], rows, columns), window)  # (Q, C, rows, columns)
            mass = _window_sum(weight.view(-1, 1, rows, columns), window)  # (Q, 1, rows, columns)
            left = (pooled[..., None, None] - around) / (1 - mass).clamp(min=_LEAST_ATTENTION)
            scores = self._score(left.flatten(2).permute(2, 0, 1), direction)  # (P,)
            maps.append((full - scores).view(rows, columns))
        return torch.stack(maps)

    def _gate_gradient(self, study: EncodedStudy, direction: torch.Tensor, window: int) -> torch.Tensor:
        """Returns the derivative of the score by a gate on each patch, summed over windows, (N, rows, columns)."""
        rows, columns = study.grid
        with torch.inference_mode(False), torch.enable_grad():
            tokens = study.tokens.clone()
            gates = torch.ones(tokens.shape[:2], device=tokens.device, requires_grad=True)  # (N, S)
            keys, weights = self._attention(tokens)
            gated = weights * gates
            pooled = torch.einsum("qns,nsc->qc", gated, keys) / gated.sum(dim=(1, 2))[:, None]
            (gradient,) = torch.autograd.grad(self._score(pooled[None], direction).sum(), gates)
        patches = gradient[:, -rows * columns :].view(-1, 1, rows, columns)
        return _window_sum(patches, window)[:, 0]

    @torch.inference_mode()
    def _pooling(self, study: EncodedStudy, direction: torch.Tensor) -> tuple[float, np.ndarray, np.ndarray]:
        """Returns the score, the attention share (N,) of each image, and what the score loses without it (N,)."""
        keys, weights = self._attention(study.tokens)
        parts = torch.einsum("qns,nsc->nqc", weights, keys)
        mass = weights.sum(dim=-1).T  # (N, Q)
        pooled = parts.sum(dim=0)
        full = self._score(pooled[None], direction)
        left = (pooled - parts) / (1 - mass).clamp(min=_LEAST_ATTENTION)[..., None]
        drops = full - self._score(left, direction)
        return float(full), mass.mean(dim=1).double().cpu().numpy(), drops.double().cpu().numpy()

    def _attention(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the keys (N, S, C) of the study pooling and its attention (Q, N, S), which sums to 1 over N, S."""
        pooling = self._towers.study_pooling
        keys = pooling.norm(tokens.to(pooling.queries.dtype))
        logits = torch.einsum("qc,nsc->qns", pooling.queries, keys) * keys.shape[-1] ** -0.5
        return keys, logits.flatten(1).softmax(dim=-1).view_as(logits)

    def _score(self, pooled: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
        """Returns the scores (B,) of pooled studies (B, Q, C)."""
        embeds = nn.functional.normalize(self._towers.visual_projection(pooled.flatten(1)), dim=-1)
        return embeds.float() @ direction

    # ----------------------------------------------------------------------------------------------------------------
    # Reports

    def evidence(
        self, images: Any, report: str | None = None, language: str = "en", modality: str | None = None
    ) -> list[SentenceEvidence]:
        """Says of each sentence of a report what in the study it goes back to, and whether label scores bear it out.

        Args:
            images: An image, a list of images, or what `read` returned for them.
            report: None has the checkpoint write it.
            language: Of the report.
            modality: "cxr" or "ct" for files that do not say.

        Raises:
            ValueError: If the report is empty, the language is not the checkpoint's, an image cannot be read, or a
                report is to be written by a checkpoint that has no decoder.
            ImportError: If a DICOM or NIfTI file is given and its optional reader is not installed.
        """
        if report is not None and not report.strip():
            raise ValueError("Expected a report, got an empty one.")
        if report is None:
            self.check_report_language(language)
        else:
            self._check_language(language)
        study = images if isinstance(images, EncodedStudy) else self.read(images, modality)
        return weigh_report(self, study, self.write(study, language) if report is None else report, language)

    def check_report_language(self, language: str) -> None:
        """Raises ValueError if the checkpoint does not write reports in a language."""
        self._check_language(language)
        if not self.model.can_generate():
            raise ValueError(f"{type(self.model).__name__} writes no report: expected one to be given.")

    @torch.inference_mode()
    def write(self, study: EncodedStudy, language: str) -> str:
        """Writes the report of a study, as the pipeline does."""
        ids = self.model.generate(vision_features=study.tokens[None], language=language)
        return self.processor.batch_decode(ids, skip_special_tokens=True)[0].strip()


def detect_language(text: str, languages: Sequence[str]) -> str:
    """Tells the language of a text by its script; the first of `languages` where no script tells it."""
    for language, (first, last) in _SCRIPTS.items():
        if language in languages and any(first <= char <= last for char in text):
            return language
    return next((language for language in languages if language not in _SCRIPTS), languages[0])


def _planes(read: Sequence[ChestImage], processor: Any, modality: str | None) -> list[ImageMap]:
    """Returns what the model sees of a study, reduced to its slices, in the order of the image processor."""
    empty = np.empty((0, 0), dtype=np.float32)
    return [
        ImageMap(
            values=empty,
            pixels=display_pixels(image, position, processor.ct_windows[0]),
            image=index,
            slice=position if image.slice_numbers is None else image.slice_numbers[position],
            num_slices=image.source_slices or len(image.pixels),
            modality=image.modality or modality,
            view=image.view,
            attention=0.0,
            drop=None,
            relevance=None,
        )
        for index, image in enumerate(read)
        for position in range(len(image.pixels))
    ]


def _window_sum(values: torch.Tensor, window: int) -> torch.Tensor:
    """Sums (..., rows, columns) over the window around each place; outside the image nothing is added."""
    return nn.functional.avg_pool2d(values, window, stride=1, padding=window // 2, divisor_override=1)


__all__ = ["DEFAULT_WINDOWS", "METHODS", "EncodedStudy", "Explainer", "Target", "detect_language"]
