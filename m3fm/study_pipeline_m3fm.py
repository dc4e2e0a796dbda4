# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""What the pipelines of M3FM share: one study, a list or a stream of them in; a dict a study out.

Letters in shapes are those of `modeling_m3fm`.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice, repeat
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import Pipeline

from .chest_image_m3fm import ChestImage

ON_ERROR = ("raise", "row")
# A row of a data set is a dict with its image under this name.
IMAGE_COLUMN = "image"

_ONE_IMAGE = (str, bytes, bytearray, memoryview, os.PathLike, np.ndarray, torch.Tensor, Image.Image, ChestImage)
_TENSORS = ("pixel_values", "image_mask")


class M3FMStudyPipeline(Pipeline):
    """Reads studies one by one and runs them in batches; what is made of a batch is left to the subclass."""

    _load_processor = True
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False

    def run_studies(
        self,
        images: Any,
        batch_size: int | None,
        on_error: str,
        facts: Iterable[Mapping[str, Any]] | None = None,
        forward_params: Mapping[str, Any] | None = None,
        postprocess_params: Mapping[str, Any] | None = None,
    ) -> dict[str, Any] | list[dict[str, Any]] | Iterator[dict[str, Any]]:
        """Runs one study, a list of studies, or a stream of them.

        Args:
            images: One study, a list of studies (each an image or a list of images), or a stream of them: an
                iterator, a data set or a column of one.
            batch_size: Studies that go through the model at once; None takes that of the construction, or 1.
            on_error: One of `ON_ERROR`.
            facts: What `preprocess` is to know of each study, one mapping for each.
            forward_params: Of `_forward`.
            postprocess_params: Of `postprocess`.

        Returns:
            A dict for one study, a list of dicts for a list, an iterator of dicts for a stream.

        Raises:
            ValueError: If a study cannot be read, or the batch size is not a number.
            ImportError: If a DICOM or NIfTI file is given and its optional reader is not installed.
        """
        batch_size = batch_size if batch_size is not None else self._batch_size if self._batch_size is not None else 1
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"Expected batch_size to be a whole number >= 1, got {batch_size!r}.")
        is_list = isinstance(images, (list, tuple))
        stream = None if is_list else _as_stream(images)
        studies = images if is_list else stream if stream is not None else [images]
        items = zip(studies, repeat({}) if facts is None else facts, strict=False)
        rows = self._rows(items, batch_size, on_error, dict(forward_params or {}), dict(postprocess_params or {}))
        if stream is not None:
            return rows
        return list(rows) if is_list else next(rows)

    def _rows(
        self,
        items: Iterator[tuple[Any, Mapping[str, Any]]],
        batch_size: int,
        on_error: str,
        forward_params: dict[str, Any],
        postprocess_params: dict[str, Any],
    ) -> Iterator[dict[str, Any]]:
        while chunk := list(islice(items, batch_size)):
            rows: list[dict[str, Any] | None] = []
            readable = []
            for images, facts in chunk:
                try:
                    readable.append(self._read_study(images) | facts)
                    rows.append(None)
                except (ValueError, OSError, ImportError) as error:
                    if on_error == "raise":
                        raise
                    rows.append({"error": str(error)})
            made = iter(self.run_single(readable, {}, forward_params, postprocess_params) if readable else [])
            yield from (row if row is not None else next(made) for row in rows)

    def _read_study(self, images: Any) -> dict[str, Any]:
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
        return {name: inputs[name][0] for name in _TENSORS} | {"modality": read[0].modality}  # (N, 3, H, W), (N,)

    def preprocess(self, studies: list[dict[str, Any]]) -> dict[str, Any]:
        """Pads studies to one batch: `pixel_values` (B, N, 3, H, W), `image_mask` (B, N), and their modalities."""
        batch = {
            name: torch.nn.utils.rnn.pad_sequence([study[name] for study in studies], batch_first=True)
            for name in _TENSORS
        }
        return {**batch, "modalities": [study["modality"] for study in studies]}

    def _refuse_unknown(self, unknown: Mapping[str, Any], known: Iterable[str], hint: str = "") -> None:
        if unknown:
            raise ValueError(f"{self.task} got unknown arguments {sorted(unknown)}: expected {list(known)}{hint}.")

    def _check_on_error(self, on_error: str | None) -> None:
        if on_error is not None and on_error not in ON_ERROR:
            raise ValueError(f"Expected on_error to be 'raise' or 'row', got {on_error!r}.")


def _as_stream(images: Any) -> Iterable[Any] | None:
    """Returns an iterable of studies if that is what `images` is, None for one study."""
    if isinstance(images, (*_ONE_IMAGE, Mapping)) or hasattr(images, "read"):  # open files iterate over lines
        return None
    if hasattr(images, "__iter__"):
        return images
    if hasattr(images, "__getitem__") and hasattr(images, "__len__"):
        return (images[index] for index in range(len(images)))
    return None


__all__ = ["M3FMStudyPipeline"]
