# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""m3fm: chest X-ray and CT reports in English and Chinese, and diagnosis. For research use only.

Importing the package registers its models, processors and pipelines with transformers; nothing else is loaded.
"""

from importlib import import_module
from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
)

# From its module: at the top level, transformers 5.17 has a stand-in that refuses to work without torchvision.
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.pipelines import PIPELINE_REGISTRY

from .configuration_m3fm import M3FMConfig
from .diagnosis_pipeline_m3fm import M3FMDiagnosisPipeline
from .image_processing_m3fm import M3FMImageProcessor
from .modeling_m3fm import M3FMForImageClassification, M3FMForReportGeneration, M3FMModel
from .pipeline_m3fm import M3FMReportPipeline
from .processing_m3fm import M3FMProcessor
from .study_pipeline_m3fm import RefusedInput

__version__ = "0.1.0"

DEFAULT_CHECKPOINT = Path(__file__).parent / "checkpoints" / "m3fm-small"
"""Folder of the checkpoint that ships with the package; the pipelines use it when given no model."""

# Named here, and loaded when asked for: training and evaluation stay out of what `import m3fm` costs.
_LATER = {"FewShotClassifier": ".fewshot", "Explainer": ".explain"}


def _register() -> None:
    AutoConfig.register("m3fm", M3FMConfig, exist_ok=True)
    AutoModel.register(M3FMConfig, M3FMModel, exist_ok=True)
    AutoModelForZeroShotImageClassification.register(M3FMConfig, M3FMModel, exist_ok=True)
    AutoModelForImageTextToText.register(M3FMConfig, M3FMForReportGeneration, exist_ok=True)
    AutoModelForImageClassification.register(M3FMConfig, M3FMForImageClassification, exist_ok=True)
    AutoImageProcessor.register(M3FMConfig, image_processor_classes={"pil": M3FMImageProcessor}, exist_ok=True)
    AutoProcessor.register(M3FMConfig, M3FMProcessor, exist_ok=True)
    for pipeline_class in (M3FMReportPipeline, M3FMDiagnosisPipeline):
        if pipeline_class.task not in PIPELINE_REGISTRY.supported_tasks:
            PIPELINE_REGISTRY.register_pipeline(
                pipeline_class.task,
                pipeline_class=pipeline_class,
                pt_model=AutoModelForImageTextToText,
                default={"model": (str(DEFAULT_CHECKPOINT), None)},
                type="multimodal",
            )


def __getattr__(name: str) -> Any:
    """Loads what is named in `_LATER`."""
    if name in _LATER:
        return getattr(import_module(_LATER[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


_register()

__all__ = [
    "DEFAULT_CHECKPOINT",
    "Explainer",
    "FewShotClassifier",
    "M3FMConfig",
    "M3FMDiagnosisPipeline",
    "M3FMForImageClassification",
    "M3FMForReportGeneration",
    "M3FMImageProcessor",
    "M3FMModel",
    "M3FMProcessor",
    "M3FMReportPipeline",
    "RefusedInput",
    "__version__",
]
