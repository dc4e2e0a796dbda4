# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""The `m3fm-report` pipeline: chest images in, reports in the languages asked for out. For research use only."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import repeat
from typing import Any

import torch

from .study_pipeline_m3fm import M3FMStudyPipeline

BOTH = "both"

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


class M3FMReportPipeline(M3FMStudyPipeline):
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
        languages = self._languages(reading["language"], len(images) if isinstance(images, (list, tuple)) else None)
        facts = ({"languages": codes} for codes in languages)
        return self.run_studies(images, batch_size, reading["on_error"], facts, {"generate_kwargs": settings})

    def _languages(self, language: str | Sequence[str], count: int | None) -> Iterable[tuple[str, ...]]:
        """Yields the languages of each study, as codes of the checkpoint."""
        known = self.model.config.languages
        asked = self._known_languages(language)
        if not isinstance(language, str) and len(asked) != count:
            raise ValueError(f"Expected one language or {count} of them, got {len(asked)}.")
        codes = [known if code == BOTH else (code,) for code in asked]
        return codes if not isinstance(language, str) else repeat(codes[0])

    def _known_languages(self, language: str | Sequence[str]) -> list[str]:
        known = self.model.config.languages
        asked = [language] if isinstance(language, str) else list(language)
        unknown = sorted({str(code) for code in asked} - {*known, BOTH})
        if unknown:
            raise ValueError(f"Unsupported language {unknown}: expected one of {[*known, BOTH]}.")
        return asked

    def _sanitize_parameters(
        self,
        language: str | Sequence[str] | None = None,
        on_error: str | None = None,
        max_new_tokens: int | None = None,
        generate_kwargs: dict[str, Any] | None = None,
        **unknown: Any,
    ) -> tuple[dict, dict, dict]:
        """Checks and sorts the arguments of the construction or of a call; what was not given is left out."""
        hint = "; what generate takes besides, such as num_beams, goes into generate_kwargs"
        self._refuse_unknown(unknown, _ARGUMENTS, hint)
        self._check_on_error(on_error)
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

    def preprocess(self, studies: list[dict[str, Any]]) -> dict[str, Any]:
        """Pads studies to one batch, and lists one row to write for each study and language."""
        rows = [(index, language) for index, study in enumerate(studies) for language in study["languages"]]
        return {**super().preprocess(studies), "rows": rows}

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


__all__ = ["M3FMReportPipeline"]
