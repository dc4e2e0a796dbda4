# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""The `m3fm-report` pipeline: chest images in, reports in the languages asked for out. For research use only."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import Pipeline

from .chest_image_m3fm import ChestImage

BOTH = "both"
ON_ERROR = ("raise", "row")
# A row of a data set is a dict with its image under this name.
IMAGE_COLUMN = "image"

_ONE_IMAGE = (str, bytes, bytearray, memoryview, os.PathLike, np.ndarray, torch.Tensor, Image.Image, ChestImage)
_ARGUMENTS = ("language", "batch_size", "on_error", "max_new_tokens", "generate_kwargs")
# What `generate` takes and the pipeline sets itself, or has no place for in its rows.
_NOT_GENERATION = frozenset(
    {
        "pixel_values",
        "image_mask",
        "language",
        "shared_embeds",
        "vision_features",
        "input_ids",
        "attention_mask",
        "num_return_sequences",
        "return_dict_in_generate",
    }
)


class M3FMReportPipeline(Pipeline):
    """Writes reports for chest X-rays and CT.

    An input is a path (PNG, JPEG, TIFF, DICOM, NIfTI), a PIL image, an array, a row of a data set with an "image", or
    a list of those for a study of several images. Every argument of a call but the images can be given when the
    pipeline is made, and is then the default of its calls. The result is a dict a study: `modality` as far as the
    file tells it, and `report_en`, `report_zh` for the languages asked for, the names that the data schema has.

    Example:
    ```python
    >>> import m3fm
    >>> from transformers import pipeline
    >>> write = pipeline("m3fm-report")
    >>> write("chest.dcm", language="zh")["report_zh"]
    >>> write(["a.png", ["frontal.png", "lateral.png"]], language=["en", "both"], batch_size=2)
    ```
    """

    task = "m3fm-report"
    _load_processor = True
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False

    def __call__(
        self,
        images: Any,
        language: str | Sequence[str] | None = None,
        batch_size: int | None = None,
        on_error: str | None = None,
        max_new_tokens: int | None = None,
        generate_kwargs: dict[str, Any] | None = None,
        **unknown: Any,
    ) -> dict[str, Any] | list[dict[str, Any]] | Iterator[dict[str, Any]]:
        """Writes the reports of one study, of a list of studies, or of a stream of them.

        Args:
            images: One study, a list of studies (each an image or a list of images), or a stream of them: an
                iterator, a data set or a column of one.
            language: A code of the checkpoint, "both" for all of them, or one of these for each study of a list;
                default "en".
            batch_size: Studies that go through the model at once; default 1.
            on_error: "raise" on the first unreadable study, the default, or "row": its place in the results takes
                `{"error": reason}` and the others are reported, also where only an optional reader is missing.
            max_new_tokens: Longest report, in tokens.
            generate_kwargs: Passed to `generate`: `num_beams`, `do_sample`, ...
            unknown: Refused, with the names that are accepted.

        Returns:
            A dict for one study, a list of dicts for a list, an iterator of dicts for a stream.

        Raises:
            ValueError: If a study cannot be read, a language is not the checkpoint's, or an argument is unknown.
            ImportError: If a DICOM or NIfTI file is given and its optional reader is not installed.
        """
        reading, writing, _ = self._sanitize_parameters(language, on_error, max_new_tokens, generate_kwargs, **unknown)
        reading = {"language": "en", "on_error": "raise"} | self._preprocess_params | reading
        settings = self._forward_params.get("generate_kwargs", {}) | writing.get("generate_kwargs", {})
        batch_size = batch_size if batch_size is not None else self._batch_size if self._batch_size is not None else 1
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"Expected batch_size to be a whole number >= 1, got {batch_size!r}.")
        is_list = isinstance(images, (list, tuple))
        stream = None if is_list else _as_stream(images)
        languages = self._languages(reading["language"], len(images) if is_list else None)
        studies = images if is_list else stream if stream is not None else [images]
        rows = self._stream(zip(studies, languages, strict=False), batch_size, reading["on_error"], settings)
        if stream is not None:
            return rows
        return list(rows) if is_list else next(rows)

    def _languages(self, language: str | Sequence[str], count: int | None) -> Iterable[tuple[str, ...]]:
        """Yields the languages of each study, as codes of the checkpoint."""
        known = self.model.config.languages
        asked = self._known_languages(language)
        if not isinstance(language, str) and len(asked) != count:
            raise ValueError(f"Expected one language or {count} of them, got {len(asked)}.")
        codes = [known if code == BOTH else (code,) for code in asked]
        return codes if not isinstance(language, str) else _repeat(codes[0])

    def _known_languages(self, language: str | Sequence[str]) -> list[str]:
        known = self.model.config.languages
        asked = [language] if isinstance(language, str) else list(language)
        unknown = sorted({str(code) for code in asked} - {*known, BOTH})
        if unknown:
            raise ValueError(f"Unsupported language {unknown}: expected one of {[*known, BOTH]}.")
        return asked

    def _stream(
        self, items: Iterator[tuple[Any, tuple[str, ...]]], batch_size: int, on_error: str, generate_kwargs: dict
    ) -> Iterator[dict[str, Any]]:
        while chunk := list(islice(items, batch_size)):
            rows: list[dict[str, Any] | None] = []
            readable = []
            for images, languages in chunk:
                try:
                    readable.append(self._prepare_study(images, languages))
                    rows.append(None)
                except (ValueError, OSError, ImportError) as error:
                    if on_error == "raise":
                        raise
                    rows.append({"error": str(error)})
            written = iter(self.run_single(readable, {}, {"generate_kwargs": generate_kwargs}, {}) if readable else [])
            yield from (row if row is not None else next(written) for row in rows)

    def _sanitize_parameters(
        self,
        language: str | Sequence[str] | None = None,
        on_error: str | None = None,
        max_new_tokens: int | None = None,
        generate_kwargs: dict[str, Any] | None = None,
        **unknown: Any,
    ) -> tuple[dict, dict, dict]:
        """Checks and sorts the arguments of the construction or of a call; what was not given is left out."""
        if unknown:
            raise ValueError(
                f"{self.task} got unknown arguments {sorted(unknown)}: expected {list(_ARGUMENTS)}; "
                "what generate takes besides, such as num_beams, goes into generate_kwargs."
            )
        if on_error is not None and on_error not in ON_ERROR:
            raise ValueError(f"Expected on_error to be 'raise' or 'row', got {on_error!r}.")
        if language is not None:
            self._known_languages(language)
        settings = dict(generate_kwargs or {})
        refused = sorted(set(settings) & _NOT_GENERATION)
        if refused:
            raise ValueError(
                f"{self.task} does not take {refused} in generate_kwargs: it writes one report for each study and "
                "language from its arguments. For more control call model.generate."
            )
        if max_new_tokens is not None:
            if "max_new_tokens" in settings:
                raise ValueError("Got max_new_tokens twice, alone and in generate_kwargs: expected it once.")
            settings["max_new_tokens"] = max_new_tokens
        reading = {"language": language, "on_error": on_error}
        reading = {name: value for name, value in reading.items() if value is not None}
        return reading, {"generate_kwargs": settings} if settings else {}, {}

    def _prepare_study(self, images: Any, languages: tuple[str, ...]) -> dict[str, Any]:
        """Turns one study into tensors at once: a batch of CT volumes need not be in memory together."""
        if isinstance(images, Mapping):
            if IMAGE_COLUMN not in images:
                raise ValueError(f"Expected a row with {IMAGE_COLUMN!r}, got one with {sorted(map(str, images))}.")
            images = images[IMAGE_COLUMN]
        sources = list(images) if isinstance(images, (list, tuple)) else [images]
        if not sources:
            raise ValueError("Expected a study of at least one image, got an empty list.")
        read = [self.processor.image_processor.read(source) for source in sources]
        inputs = self.processor(images=[read], return_tensors="pt")
        tensors = {name: inputs[name][0] for name in ("pixel_values", "image_mask")}  # (N, 3, H, W), (N,)
        return {**tensors, "modality": read[0].modality, "languages": languages}

    def preprocess(self, studies: list[dict[str, Any]]) -> dict[str, Any]:
        """Pads studies to one batch, and lists one row to write for each study and language."""
        batch = {
            name: torch.nn.utils.rnn.pad_sequence([study[name] for study in studies], batch_first=True)
            for name in ("pixel_values", "image_mask")  # (B, N, 3, H, W), (B, N)
        }
        rows = [(index, language) for index, study in enumerate(studies) for language in study["languages"]]
        return {**batch, "rows": rows, "modalities": [study["modality"] for study in studies]}

    def _forward(self, model_inputs: dict[str, Any], generate_kwargs: dict[str, Any]) -> dict[str, Any]:
        tokens = self.model.model.get_vision_features(model_inputs["pixel_values"].to(self.model.dtype))
        studies = torch.tensor([index for index, _ in model_inputs["rows"]], device=tokens.device)
        # An image is encoded once, however many languages its report is written in.
        sequences = self.model.generate(
            vision_features=tokens[studies],
            image_mask=model_inputs["image_mask"][studies],
            language=[language for _, language in model_inputs["rows"]],
            **generate_kwargs,
        )
        return {"sequences": sequences, "rows": model_inputs["rows"], "modalities": model_inputs["modalities"]}

    def postprocess(self, model_outputs: dict[str, Any]) -> list[dict[str, Any]]:
        """Decodes the written rows into one dict a study."""
        texts = self.processor.batch_decode(model_outputs["sequences"], skip_special_tokens=True)
        results: list[dict[str, Any]] = [{"modality": modality} for modality in model_outputs["modalities"]]
        for (index, language), text in zip(model_outputs["rows"], texts, strict=True):
            results[index][f"report_{language}"] = text.strip()
        return results


def _as_stream(images: Any) -> Iterable[Any] | None:
    """Returns an iterable of studies if that is what `images` is, None for one study."""
    if isinstance(images, (*_ONE_IMAGE, Mapping)) or hasattr(images, "read"):  # open files iterate over lines
        return None
    if hasattr(images, "__iter__"):
        return images
    if hasattr(images, "__getitem__") and hasattr(images, "__len__"):
        return (images[index] for index in range(len(images)))
    return None


def _repeat(value: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    while True:
        yield value


__all__ = ["M3FMReportPipeline"]
