# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Configuration of M3FM: two towers, a decoder, and how the gap between images and text is crossed."""

import difflib
import json
from dataclasses import fields
from typing import Any, ClassVar, Literal, TypeVar

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig

from .diagnosis_m3fm import check_diagnosis

_DEFAULT_MODEL_TYPES = {"vision_config": "dinov2", "text_encoder_config": "bert", "text_config": "llama"}

# What transformers itself passes to or stores in any configuration, next to the declared fields.
_TRANSFORMERS_KEYS = frozenset(
    {
        "model_type",
        "num_labels",
        "name_or_path",
        "_name_or_path",
        "_commit_hash",
        "torch_dtype",
        "quantization_config",
        "auto_map",
        "custom_pipelines",
        "use_cache",
        "attn_implementation",
        "_attn_implementation",
        "_attn_implementation_internal",
        "_attn_implementation_autoset",
        "_experts_implementation_internal",
        "experts_implementation",
        "output_attentions",
        # `Trainer` of transformers 5.17 notes the tokenizer's here, that of later versions in `text_config`.
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
    }
)


_Config = TypeVar("_Config", bound=type[PreTrainedConfig])


def _refuse_by_value_error(cls: _Config) -> _Config:
    """Makes a wrong type, in a call or an assignment, the ValueError that any other wrong value is."""
    set_checked = cls.__setattr__

    def __setattr__(self: PreTrainedConfig, name: str, value: Any) -> None:  # noqa: N807
        try:
            set_checked(self, name, value)
        except StrictDataclassFieldValidationError as error:
            raise ValueError(f"M3FMConfig got a wrong value. {error.__cause__}") from None

    cls.__setattr__ = __setattr__
    return cls


@_refuse_by_value_error
@strict
class M3FMConfig(PreTrainedConfig):
    """Describes an M3FM checkpoint (Liu et al., npj Digital Medicine 8:86, 2025).

    The three sub-configs accept any architecture that transformers knows, by `model_type`: a ViT-like tower, a text
    encoder, a causal language model. Unknown and contradictory values are refused.

    Args:
        vision_config: Image tower of MultiMedCLIP; default DINOv2.
        text_encoder_config: Bilingual text tower of MultiMedCLIP; default BERT.
        text_config: Decoder of MultiMedLM; default Llama. It has this name because `generate` sizes its caches by it.
        projection_dim: Width D of the shared space.
        num_pooling_queries: Learned queries that pool the tokens of all images of a study.
        projection_hidden_size: Width of the hidden layer between the pooled study and the shared space.
        num_prefix_tokens: Decoder positions P that one shared-space embedding is unfolded into.
        num_image_tokens: Decoder positions K in front of these, of an image alone: they take the first K pooled
            queries of the study, of which a text has none. 0: a report is written from the embedding alone.
        image_token_id: Placeholder id of all those positions.
        language_token_ids: Language code to the token that asks the decoder for it; the memory is in their order.
        logit_scale_init_value: Initial value of the log temperature; CLIP's ln(1 / 0.07).
        logit_bias_init_value: Initial value of a bias on the logits, as the sigmoid loss needs it (SigLIP 2023,
            section 3.2: -10, beside a scale of ln(10)); None: there is no bias.
        support_memory_size: Embeddings M of training reports kept per language; 0 keeps none, and image embeddings
            then reach the decoder as they are.
        support_temperature: Temperature of the softmax over the memory (DeCap 2023, section 3.3).
        text_noise_std: Standard deviation of the noise added to a unit-norm text embedding while the decoder is
            trained (CapDec 2022, section 3), per vector: its expected norm, not that of one coordinate.
        classifier_features: What the diagnosis head reads: the image, its generated report, or both.
        projection_dropout: Dropout before the projections, in training.
        diagnosis: Labels of zero-shot diagnosis with their phrases, calibrations and thresholds; see
            `diagnosis_m3fm`. Empty: those that come with the package, uncalibrated.
        diagnosis_report_weight: Share of the generated report in the logit of a label where zero-shot diagnosis reads
            the report beside the image.

    Raises:
        ValueError: If a name is unknown or values contradict each other.

    Example:

    ```python
    >>> from m3fm import M3FMConfig
    >>> M3FMConfig(text_config={"model_type": "qwen3", "vocab_size": 8000}).text_config.model_type
    'qwen3'
    ```
    """

    model_type = "m3fm"
    # transformers 5.23 has richer specs for sub-configs; this older form is read by every supported version.
    sub_configs: ClassVar[dict[str, type]] = dict.fromkeys(_DEFAULT_MODEL_TYPES, AutoConfig)

    vision_config: dict | PreTrainedConfig | None = None
    text_encoder_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    projection_dim: int = 256
    num_pooling_queries: int = 8
    projection_hidden_size: int = 512
    num_prefix_tokens: int = 4
    num_image_tokens: int = 0
    image_token_id: int = 4
    language_token_ids: dict[str, int] | None = None
    logit_scale_init_value: float = 2.6592
    logit_bias_init_value: float | None = None
    support_memory_size: int = 1024
    support_temperature: float = 0.02
    text_noise_std: float = 0.3
    classifier_features: Literal["image", "report", "fused"] = "image"
    projection_dropout: float = 0.1
    diagnosis: dict | None = None
    diagnosis_report_weight: float = 0.3

    def __post_init__(self, **kwargs: Any):
        self._refuse_unknown(kwargs)
        if self.language_token_ids is None:
            self.language_token_ids = {"en": 5, "zh": 6}
        self.diagnosis = {} if self.diagnosis is None else self.diagnosis
        for name, model_type in _DEFAULT_MODEL_TYPES.items():
            setattr(self, name, _build_sub_config(name, getattr(self, name), model_type))
        super().__post_init__(**kwargs)
        self._refuse_contradictions()

    @property
    def languages(self) -> tuple[str, ...]:
        """Codes of the languages that the checkpoint writes, in the order of its support memory."""
        # By id, because JSON keeps no order of keys.
        return tuple(sorted(self.language_token_ids, key=self.language_token_ids.get))

    def to_json_string(self, *args: Any, **kwargs: Any) -> str:
        """Returns the JSON of transformers with Chinese phrases to be read rather than escaped."""
        content = json.loads(super().to_json_string(*args, **kwargs))
        return json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"

    def _refuse_unknown(self, kwargs: dict[str, Any]) -> None:
        unknown = sorted(set(kwargs) - _TRANSFORMERS_KEYS)
        if not unknown:
            return
        known = sorted(field.name for field in fields(self))
        hints = [f"{name!r}" + _did_you_mean(name, known) for name in unknown]
        raise ValueError(f"M3FMConfig got unknown values: {', '.join(hints)}. It takes: {', '.join(known)}.")

    def _refuse_contradictions(self) -> None:
        for name in ("projection_dim", "num_pooling_queries", "projection_hidden_size", "num_prefix_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"M3FMConfig expected {name} >= 1, got {getattr(self, name)}.")
        for name, low in (("support_memory_size", 0), ("text_noise_std", 0.0)):
            if getattr(self, name) < low:
                raise ValueError(f"M3FMConfig expected {name} >= {low}, got {getattr(self, name)}.")
        if not 0 <= self.num_image_tokens <= self.num_pooling_queries:
            raise ValueError(
                f"M3FMConfig expected 0 <= num_image_tokens <= num_pooling_queries={self.num_pooling_queries}, got "
                f"{self.num_image_tokens}."
            )
        if self.support_temperature <= 0:
            raise ValueError(f"M3FMConfig expected support_temperature > 0, got {self.support_temperature}.")
        if not 0 <= self.projection_dropout < 1:
            raise ValueError(f"M3FMConfig expected 0 <= projection_dropout < 1, got {self.projection_dropout}.")
        if not 0 <= self.diagnosis_report_weight <= 1:
            raise ValueError(
                f"M3FMConfig expected 0 <= diagnosis_report_weight <= 1, got {self.diagnosis_report_weight}."
            )
        check_diagnosis(self.diagnosis)
        if not self.language_token_ids:
            raise ValueError("M3FMConfig expected language_token_ids with at least one language, got none.")
        prompt_ids = [self.image_token_id, *self.language_token_ids.values()]
        if len(set(prompt_ids)) < len(prompt_ids):
            raise ValueError(
                f"M3FMConfig expected distinct ids, got image_token_id={self.image_token_id} and "
                f"language_token_ids={self.language_token_ids}."
            )
        vocab_size = getattr(self.text_config, "vocab_size", None)
        if vocab_size is not None and not all(0 <= token_id < vocab_size for token_id in prompt_ids):
            raise ValueError(
                f"M3FMConfig expected prompt ids inside the decoder's vocabulary of {vocab_size}, got {prompt_ids}."
            )


def _build_sub_config(name: str, value: dict | PreTrainedConfig | None, default_type: str) -> PreTrainedConfig:
    if isinstance(value, PreTrainedConfig):
        return value
    values = dict(value or {})
    model_type = values.pop("model_type", default_type)
    try:
        return AutoConfig.for_model(model_type, **values)
    except ValueError as error:
        raise ValueError(f"M3FMConfig got {name} of model_type {model_type!r}: {error}") from None


def _did_you_mean(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


__all__ = ["M3FMConfig"]
