# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""What the pipelines of M3FM share: one study, a list or a stream of them in; a dict a study out.

A study is read, looked at (`InputCheck`), run through the image tower, judged again by what the tower sees, and only
then answered. Letters in shapes are those of `modeling_m3fm`.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice, repeat
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import Pipeline

from .chest_image_m3fm import ChestImage
from .input_check_m3fm import InputCheck, StudyCheck
from .read_ahead_m3fm import Result, read_ahead

ON_ERROR = ("raise", "row")
ON_SUSPECT = ("refuse", "warn")
# Arguments of every call, beside those of the task.
READING_ARGUMENTS = ("batch_size", "num_workers", "on_error", "on_suspect")
# A row of a data set is a dict with its image under this name.
IMAGE_COLUMN = "image"

_ONE_IMAGE = (str, bytes, bytearray, memoryview, os.PathLike, np.ndarray, torch.Tensor, Image.Image, ChestImage)
# What else is one image, though it can be iterated over: open files, arrays, images of SimpleITK and nibabel.
_OF_ONE_IMAGE = ("read", "__array__", "__array_interface__", "GetDirection", "dataobj")
_ENCODED_IMAGE = {"bytes", "path"}
_TENSORS = ("pixel_values", "image_mask")


class RefusedInput(ValueError):  # noqa: N818 - it is the input that is refused, not the program that failed
    """Images that are plainly no chest study, so that nothing should be said of them.

    Attributes:
        check: What was seen, as a `StudyCheck`.
        name: What errors call the study.
    """

    def __init__(self, check: StudyCheck, name: str):
        super().__init__(check, name)
        self.check = check
        self.name = name

    def __str__(self) -> str:
        return f'{self.name}: refused: {self.check.reason} (on_suspect="warn" answers all the same)'


class StudyReader:
    """Turns the images of one study into tensors; a worker process holds one.

    Args:
        image_processor: Of the checkpoint.
        input_check: Looks at the pixels.
        on_suspect: One of `ON_SUSPECT`.
    """

    def __init__(self, image_processor: Any, input_check: InputCheck, on_suspect: str):
        self.image_processor = image_processor
        self.input_check = input_check
        self.on_suspect = on_suspect

    def __call__(self, item: tuple[Any, Mapping[str, Any]]) -> dict[str, Any]:
        """Reads one study, given with what else `preprocess` is to know of it.

        Returns:
            `pixel_values` (N, 3, H, W), `image_mask` (N,), `check`, `name` for errors, and what was given.

        Raises:
            ValueError: If the study cannot be read.
            RefusedInput: If its pixels are plainly not those of a chest study.
            ImportError: If an optional reader is not installed.
        """
        images, facts = item
        sources = _sources(images)
        name = os.fspath(sources[0]) if isinstance(sources[0], (str, os.PathLike)) else "images in memory"
        read = self.image_processor.read_study(sources)
        check = self.input_check.look(read)
        if check.verdict == "refused" and self.on_suspect == "refuse":
            raise RefusedInput(check, name)
        read, check = self.input_check.upright(read, check)
        inputs = self.image_processor.preprocess([read], return_tensors="pt")
        return {name: inputs[name][0] for name in _TENSORS} | {"check": check, "name": name, **facts}


class M3FMStudyPipeline(Pipeline):
    """Reads studies one by one and runs them in batches; what is said of a batch is left to the subclass."""

    _load_processor = True
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False

    @property
    def input_check(self) -> InputCheck:
        """Returns the check of the checkpoint; one of statistics alone where it brings none."""
        if not hasattr(self, "_input_check"):
            checkpoint = self.model.config.name_or_path  # empty for a model that was made in memory
            check = InputCheck.from_pretrained(checkpoint) if checkpoint else InputCheck.statistical()
            self._input_check = check.for_tower(self._towers.vision_model)
        return self._input_check

    @input_check.setter
    def input_check(self, check: InputCheck) -> None:
        self._input_check = check

    def run_studies(
        self,
        images: Any,
        reading: Mapping[str, Any],
        facts: Iterable[Mapping[str, Any]] | None = None,
        **answer_params: Any,
    ) -> dict[str, Any] | list[dict[str, Any]] | Iterator[dict[str, Any]]:
        """Runs one study, a list of studies, or a stream of them.

        Args:
            images: One study, a list of studies (each an image or a list of images), or a stream of them: an
                iterator, a data set or a column of one.
            reading: Those of `READING_ARGUMENTS` that were given; what is None or missing takes its default.
            facts: What `_answer` is to know of each study, one mapping for each.
            answer_params: Of `_answer` and `_answer_rows`.

        Returns:
            A dict for one study, a list of dicts for a list, an iterator of dicts for a stream.

        Raises:
            ValueError: If a study cannot be read or is refused, or a number is not right.
            ImportError: If a DICOM or NIfTI file is given and its optional reader is not installed.
        """
        batch_size = _at_least("batch_size", reading.get("batch_size"), self._batch_size, default=1, least=1)
        num_workers = _at_least("num_workers", reading.get("num_workers"), self._num_workers, default=0, least=0)
        on_error, on_suspect = reading.get("on_error") or "raise", reading.get("on_suspect") or "refuse"
        is_list = isinstance(images, (list, tuple))
        stream = None if is_list else _as_stream(images)
        studies = images if is_list else stream if stream is not None else [images]
        items = zip(studies, repeat({}) if facts is None else facts, strict=False)
        reader = StudyReader(self.processor.image_processor, self.input_check, on_suspect)
        # A batch is read while the one before it is in the model.
        ahead = max(batch_size, 2 * num_workers) if num_workers else None
        read = map(_value_or_error, read_ahead(reader, items, num_workers, ahead))
        rows = (
            self._row(each, on_error)
            for batch in iter(lambda: list(islice(read, batch_size)), [])
            for each in self._run_batch(batch, on_error, on_suspect, answer_params)
        )
        if stream is not None:
            return rows
        return list(rows) if is_list else next(rows)

    def _run_batch(
        self,
        batch: Sequence[dict[str, Any] | Exception],
        on_error: str,
        on_suspect: str,
        answer_params: dict[str, Any],
    ) -> list[dict[str, Any] | Exception]:
        """Answers the studies of a batch that could be read; errors keep their place."""
        readable = [each for each in batch if not isinstance(each, Exception)]
        if not readable or (on_error == "raise" and len(readable) < len(batch)):
            return [each for each in batch if isinstance(each, Exception)]
        params = {"answer_params": answer_params}
        made = iter(self.run_single(readable, {}, {"on_suspect": on_suspect, **params}, params))
        return [each if isinstance(each, Exception) else next(made) for each in batch]

    def _row(self, made: dict[str, Any] | Exception, on_error: str) -> dict[str, Any]:
        if not isinstance(made, Exception):
            return made
        if on_error == "raise":
            raise made
        checked = {"input_check": made.check.as_dict()} if isinstance(made, RefusedInput) else {}
        return {"error": str(made), **checked}

    def preprocess(self, studies: list[dict[str, Any]]) -> dict[str, Any]:
        """Pads studies to one batch: `pixel_values` (B, N, 3, H, W), `image_mask` (B, N), and the rest as it is."""
        batch = {
            name: torch.nn.utils.rnn.pad_sequence([study[name] for study in studies], batch_first=True)
            for name in _TENSORS
        }
        rest = [{name: value for name, value in study.items() if name not in _TENSORS} for study in studies]
        return {**batch, "studies": rest}

    @property
    def _towers(self) -> torch.nn.Module:
        """Returns MultiMedCLIP, which is the model itself or stands in it."""
        return getattr(self.model, self.model.base_model_prefix, self.model)

    def _forward(
        self, model_inputs: dict[str, Any], on_suspect: str, answer_params: Mapping[str, Any]
    ) -> dict[str, Any]:
        mask, studies = model_inputs["image_mask"], model_inputs["studies"]
        # An image is encoded once, however many reports are written of it.
        tokens = self._towers.get_vision_features(model_inputs["pixel_values"].to(self.model.dtype))  # (B, N, S, C)
        checks = [
            self.input_check.judge(study["check"], *seen) for study, *seen in zip(studies, tokens, mask, strict=True)
        ]
        kept = [i for i, check in enumerate(checks) if on_suspect == "warn" or check.verdict != "refused"]
        answer = self._answer(tokens[kept], mask[kept], [studies[i] for i in kept], **answer_params) if kept else {}
        return {"answer": answer, "checks": checks, "kept": kept, "names": [study["name"] for study in studies]}

    def postprocess(
        self, model_outputs: dict[str, Any], answer_params: Mapping[str, Any]
    ) -> list[dict[str, Any] | RefusedInput]:
        """Makes a dict of each study that was answered, with what was seen of its images."""
        kept, checks = model_outputs["kept"], model_outputs["checks"]
        rows = self._answer_rows(model_outputs["answer"], **answer_params) if kept else []
        results: list[dict[str, Any] | RefusedInput] = list(map(RefusedInput, checks, model_outputs["names"]))
        for index, row in zip(kept, rows, strict=True):
            seen = checks[index].as_dict()
            results[index] = {"modality": seen["modality"], **row, "input_check": seen}
        return results

    def _answer(
        self, tokens: torch.Tensor, mask: torch.Tensor, studies: Sequence[Mapping[str, Any]], **params: Any
    ) -> dict[str, Any]:
        """Runs the task on the tokens (B, N, S, C) of the image tower and their mask (B, N)."""
        raise NotImplementedError

    def _answer_rows(self, answer: Mapping[str, Any], **params: Any) -> list[dict[str, Any]]:
        """Makes one dict a study of what `_answer` returned."""
        raise NotImplementedError

    def _refuse_unknown(self, unknown: Mapping[str, Any], known: Iterable[str], hint: str = "") -> None:
        if unknown:
            raise ValueError(f"{self.task} got unknown arguments {sorted(unknown)}: expected {list(known)}{hint}.")

    def _checked_reading(self, **given: Any) -> dict[str, Any]:
        """Checks the arguments of reading, and leaves out those that were not given."""
        for name, allowed in (("on_error", ON_ERROR), ("on_suspect", ON_SUSPECT)):
            if given.get(name) is not None and given[name] not in allowed:
                raise ValueError(f"Expected {name} to be {' or '.join(map(repr, allowed))}, got {given[name]!r}.")
        return {name: value for name, value in given.items() if value is not None}


def _at_least(name: str, given: int | None, constructed: int | None, default: int, least: int) -> int:
    """Returns a number of the call, else of the construction, else the default."""
    value = given if given is not None else constructed if constructed is not None else default
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"Expected {name} to be a whole number >= {least}, got {value!r}.")
    return value


def _value_or_error(result: Result) -> dict[str, Any] | Exception:
    """Returns what was read, or why it could not be; errors that no image is to blame for are raised."""
    if result.error is not None and not isinstance(result.error, (ValueError, OSError, ImportError)):
        raise result.error
    return result.value if result.error is None else result.error


def _sources(images: Any) -> list[Any]:
    """Returns the images of one study as a list of sources."""
    if isinstance(images, Mapping) and not _ENCODED_IMAGE.issuperset(images):
        if IMAGE_COLUMN not in images:
            raise ValueError(f"Expected a row with {IMAGE_COLUMN!r}, got one with {sorted(map(str, images))}.")
        images = images[IMAGE_COLUMN]
    sources = list(images) if isinstance(images, (list, tuple)) else [images]
    if not sources:
        raise ValueError("Expected a study of at least one image, got an empty list.")
    return sources


def _as_stream(images: Any) -> Iterable[Any] | None:
    """Returns an iterable of studies if that is what `images` is, None for one study."""
    if isinstance(images, (*_ONE_IMAGE, Mapping)) or any(hasattr(images, name) for name in _OF_ONE_IMAGE):
        return None
    if hasattr(images, "__iter__"):
        return images
    if hasattr(images, "__getitem__") and hasattr(images, "__len__"):
        return (images[index] for index in range(len(images)))
    return None


__all__ = ["M3FMStudyPipeline", "RefusedInput"]
