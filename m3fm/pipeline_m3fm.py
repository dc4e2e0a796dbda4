# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""The `m3fm-report` pipeline: chest images in, reports in the languages asked for out. For research use only."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import repeat
from typing import Any

import torch

from .study_pipeline_m3fm import READING_ARGUMENTS, M3FMStudyPipeline

BOTH = "both"

_ARGUMENTS = ("language", *READING_ARGUMENTS, "max_new_tokens", "generate_kwargs")
# What `generate` takes and the pipeline sets itself, or has no place for in its rows.
_NOT_GENERATION = frozenset(
    {
        "pixel_values",
        "image_mask",
        "language",
        "shared_embeds",
        "vision_features",
        "image_tokens",
        "input_ids",
        "attention_mask",
        "num_return_sequences",
        "return_dict_in_generate",
    }
)


class M3FMReportPipeline(M3FMStudyPipeline):
    """Writes reports for chest X-rays and CT.

    An input is a path (PNG, JPEG, TIFF, DICOM, NIfTI, or the folder of a CT series), a PIL image, an array, a row of a
    data set with an "image", or a list of those for a study of several images or the slices of a CT. Every argument of
    a call but the images can be given when the pipeline is made, and is then the default of its calls. The result is a
    dict a study: `modality`, as the file tells it or the image shows it; `report_en`, `report_zh` for the languages
    asked for, the names that the data schema has; and `input_check`, what was seen of the images (docs/input.md). What
    is plainly not a chest is refused.

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
        num_workers: int | None = None,
        on_error: str | None = None,
        on_suspect: str | None = None,
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
            num_workers: Processes that read ahead; default 0, read between batches.
            on_error: "raise" on the first study that is unreadable or refused, the default, or "row": its place in
                the results takes `{"error": reason}`, with its `input_check` where it was refused, and the others are
                reported, also where only an optional reader is missing.
            on_suspect: "refuse" what is plainly not a chest, the default, or "warn": `input_check` says so beside a
                report that means nothing.
            max_new_tokens: Longest report, in tokens.
            generate_kwargs: Passed to `generate`: `num_beams`, `do_sample`, ...
            unknown: Refused, with the names that are accepted.

        Returns:
            A dict for one study, a list of dicts for a list, an iterator of dicts for a stream.

        Raises:
            ValueError: If a study cannot be read, a language is not the checkpoint's, or an argument is unknown.
            RefusedInput: A ValueError, with the `check` of the images, if they are plainly not a chest.
            ImportError: If a DICOM or NIfTI file is given and its optional reader is not installed.
        """
        given, writing, _ = self._sanitize_parameters(
            language, on_error, on_suspect, max_new_tokens, generate_kwargs, **unknown
        )
        reading = {"language": "en"} | self._preprocess_params | given
        settings = self._forward_params.get("generate_kwargs", {}) | writing.get("generate_kwargs", {})
        languages = self._languages(reading["language"], len(images) if isinstance(images, (list, tuple)) else None)
        facts = ({"languages": codes} for codes in languages)
        reading |= {"batch_size": batch_size, "num_workers": num_workers}
        return self.run_studies(images, reading, facts, generate_kwargs=settings)

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
        on_suspect: str | None = None,
        max_new_tokens: int | None = None,
        generate_kwargs: dict[str, Any] | None = None,
        **unknown: Any,
    ) -> tuple[dict, dict, dict]:
        """Checks and sorts the arguments of the construction or of a call; what was not given is left out."""
        hint = "; what generate takes besides, such as num_beams, goes into generate_kwargs"
        self._refuse_unknown(unknown, _ARGUMENTS, hint)
        reading = self._checked_reading(language=language, on_error=on_error, on_suspect=on_suspect)
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
        return reading, {"generate_kwargs": settings} if settings else {}, {}

    def _answer(
        self,
        tokens: torch.Tensor,
        mask: torch.Tensor,
        studies: Sequence[Mapping[str, Any]],
        generate_kwargs: dict[str, Any],
    ) -> dict[str, Any]:
        """Writes one row for each study and language."""
        written = [(index, language) for index, study in enumerate(studies) for language in study["languages"]]
        chosen = torch.tensor([index for index, _ in written], device=tokens.device)
        sequences = self.model.generate(
            vision_features=tokens[chosen],
            image_mask=mask[chosen],
            language=[language for _, language in written],
            **generate_kwargs,
        )
        return {"sequences": sequences, "written": written, "studies": len(studies)}

    def _answer_rows(self, answer: Mapping[str, Any], generate_kwargs: dict[str, Any]) -> list[dict[str, Any]]:
        """Decodes the written rows into one dict a study."""
        texts = self.processor.batch_decode(answer["sequences"], skip_special_tokens=True)
        results: list[dict[str, Any]] = [{} for _ in range(answer["studies"])]
        for (index, language), text in zip(answer["written"], texts, strict=True):
            results[index][f"report_{language}"] = text.strip()
        return results


__all__ = ["M3FMReportPipeline"]
