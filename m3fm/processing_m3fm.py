# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Processor of M3FM: chest image files and bilingual text to tensors, the same in training, evaluation and serving."""

from transformers.processing_utils import ProcessingKwargs, ProcessorMixin


class M3FMProcessorKwargs(ProcessingKwargs, total=False):
    """Keyword arguments of `M3FMProcessor.__call__`, with the defaults of its texts."""

    _defaults = {  # noqa: RUF012 - a TypedDict takes no other form; transformers reads this name
        "text_kwargs": {"padding": True, "truncation": True, "return_mm_token_type_ids": False},
    }


class M3FMProcessor(ProcessorMixin):
    """Joins `M3FMImageProcessor` and the bilingual tokenizer.

    `processor(images=..., text=..., return_tensors="pt")` gives `pixel_values` (B, N, 3, H, W) and `image_mask` (B, N)
    for images (paths, PIL images, arrays; DICOM and NIfTI too), `input_ids` and `attention_mask` (B, T) for texts,
    ready for `M3FMModel`. Texts longer than the text encoder reads are cut.

    Args:
        image_processor: An `M3FMImageProcessor`.
        tokenizer: The bilingual tokenizer.
    """

    valid_processor_kwargs = M3FMProcessorKwargs

    def __init__(self, image_processor=None, tokenizer=None):
        super().__init__(image_processor, tokenizer)


__all__ = ["M3FMProcessor"]
