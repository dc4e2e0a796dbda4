# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""What all M3FM models share: loading that refuses what does not fit, and `M3FMModel`, the two towers (MultiMedCLIP).

Letters in shapes are those of `modeling_m3fm`.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput, can_return_tuple

from .configuration_m3fm import M3FMConfig
from .layers_m3fm import M3FMStudyPooling, contrastive_loss


@dataclass
class M3FMOutput(ModelOutput):
    """Output of `M3FMModel`; what was not asked for is None.

    Args:
        loss: Symmetric InfoNCE of the batch, with `return_loss=True`.
        logits_per_image: (B_image, B_text), scaled cosine similarity.
        logits_per_text: (B_text, B_image).
        image_embeds: (B_image, D), unit norm.
        text_embeds: (B_text, D), unit norm.
        logit_scale: The scale of the logits. It and the bias are here for losses over the batches of several
            processes: what distributed training is to reduce has to be an output.
        logit_bias: What is added to the logits, where `config.logit_bias_init_value` says there is one.
    """

    loss: torch.FloatTensor | None = None
    logits_per_image: torch.FloatTensor | None = None
    logits_per_text: torch.FloatTensor | None = None
    image_embeds: torch.FloatTensor | None = None
    text_embeds: torch.FloatTensor | None = None
    logit_scale: torch.FloatTensor | None = None
    logit_bias: torch.FloatTensor | None = None


class M3FMPreTrainedModel(PreTrainedModel):
    """Loading, initialisation and the flags that transformers reads, shared by all M3FM models."""

    config: M3FMConfig
    config_class = M3FMConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, M3FMStudyPooling):
            init.normal_(module.queries, std=module.queries.shape[-1] ** -0.5)
        elif isinstance(module, M3FMModel):
            init.constant_(module.logit_scale, self.config.logit_scale_init_value)
            if module.logit_bias is not None:
                init.constant_(module.logit_bias, self.config.logit_bias_init_value)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *model_args: Any, output_loading_info: bool = False, **kwargs: Any
    ) -> Any:
        """Loads a checkpoint as `PreTrainedModel.from_pretrained` does, and refuses one that does not fit.

        transformers warns about missing and unexpected weights and goes on with random ones; a report written by
        random weights looks like a report, so this is an error here.

        Only safetensors are read: a pickled file can run code.

        Raises:
            ValueError: If weights are missing, or the checkpoint holds some that no M3FM class knows.
        """
        kwargs.setdefault("use_safetensors", True)
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
        )
        missing, unexpected = set(info["missing_keys"]), set(info["unexpected_keys"])
        missing -= model._complete_loading(missing)
        if missing or unexpected:
            raise ValueError(
                f"The weights in {str(pretrained_model_name_or_path)!r} do not fit {cls.__name__}: "
                f"missing {_summarise(missing)}, unexpected {_summarise(unexpected)}. "
                "Expected a checkpoint saved by this class, or one that contains it."
            )
        return (model, info) if output_loading_info else model

    def _complete_loading(self, missing: set[str]) -> set[str]:
        """Sets what no weight file holds, after loading; returns the `missing` keys that a checkpoint may lack."""
        return set()


def _summarise(keys: set[str]) -> str:
    shown = sorted(keys)[:3]
    return f"{len(keys)} ({', '.join(shown)}{', ...' if len(keys) > 3 else ''})" if keys else "none"


def _without_pooler(tower: PreTrainedModel) -> PreTrainedModel:
    """Drops a BERT-style pooler, which nothing here reads and no loss here would train."""
    if getattr(tower, "pooler", None) is not None:
        tower.pooler = None
    return tower


class M3FMModel(M3FMPreTrainedModel):
    """MultiMedCLIP: chest images and text in several languages on one unit sphere.

    Example:

    ```python
    >>> from transformers import AutoModel, AutoProcessor
    >>> model = AutoModel.from_pretrained(m3fm.DEFAULT_CHECKPOINT)
    >>> processor = AutoProcessor.from_pretrained(m3fm.DEFAULT_CHECKPOINT)
    >>> inputs = processor(images="chest.png", text=["肺炎", "normal chest"], return_tensors="pt")
    >>> model(**inputs).logits_per_image.softmax(-1)
    ```
    """

    _keys_to_ignore_on_load_unexpected = [
        r"^decoder\.",
        r"^prefix_projector\.",
        r"^token_projector\.",
        r"^support_memory$",
        r"^classifier\.",
    ]

    def __init__(self, config: M3FMConfig):
        super().__init__(config)
        hidden = config.projection_hidden_size
        self.vision_model = _without_pooler(AutoModel.from_config(config.vision_config))
        self.text_encoder = _without_pooler(AutoModel.from_config(config.text_encoder_config))
        self.study_pooling = M3FMStudyPooling(config)
        self.visual_projection = nn.Sequential(
            nn.Dropout(config.projection_dropout),
            nn.Linear(config.num_pooling_queries * config.vision_config.hidden_size, hidden),
            nn.GELU(),
            nn.Dropout(config.projection_dropout),
            nn.Linear(hidden, config.projection_dim),
        )
        self.text_projection = nn.Linear(config.text_encoder_config.hidden_size, config.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(config.logit_scale_init_value))
        bias = config.logit_bias_init_value
        self.logit_bias = None if bias is None else nn.Parameter(torch.tensor(bias))
        self.post_init()

    @property
    def max_text_tokens(self) -> int | None:
        """Tokens of the longest text that the text encoder has positions for; None if it has no table of positions."""
        for name, module in self.text_encoder.named_modules():
            if name.endswith(("position_embeddings", "position_embedding")) and isinstance(module, nn.Embedding):
                # RoBERTa and its kin count positions from the one after their padding index.
                return module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
        return None

    def get_input_embeddings(self) -> nn.Module:
        """Returns the token embedding of the text encoder."""
        return self.text_encoder.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the token embedding of the text encoder."""
        self.text_encoder.set_input_embeddings(value)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Resizes the token embedding of the text encoder as transformers does; the decoder keeps its vocabulary."""
        decoder_size = self.config.text_config.vocab_size
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        # transformers notes the new size in `text_config`, the only text configuration it knows.
        self.config.text_config.vocab_size = decoder_size
        self.config.text_encoder_config.vocab_size = embeddings.num_embeddings
        return embeddings

    def get_vision_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Runs the image tower on `pixel_values` (B, N, 3, H, W) or (B, 3, H, W); returns its tokens (B, N, S, C).

        With a frozen tower these can be computed once and passed on as `vision_features`.
        """
        if pixel_values.dim() == 4:
            pixel_values = pixel_values.unsqueeze(1)
        if pixel_values.dim() != 5:
            raise ValueError(
                f"Expected pixel_values of shape (B, N, 3, H, W) or (B, 3, H, W), got {tuple(pixel_values.shape)}."
            )
        batch, images = pixel_values.shape[:2]
        tokens = self.vision_model(pixel_values=pixel_values.flatten(0, 1)).last_hidden_state  # (B * N, S, C)
        return tokens.view(batch, images, *tokens.shape[1:])

    def pool_studies(
        self,
        pixel_values: torch.Tensor | None = None,
        image_mask: torch.Tensor | None = None,
        vision_features: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Pools all images of each study by the learned queries; arguments as for `get_image_features`.

        Returns:
            (B, Q, C).

        Raises:
            ValueError: As `get_image_features`.
        """
        if (pixel_values is None) == (vision_features is None):
            raise ValueError("Expected exactly one of pixel_values and vision_features.")
        if vision_features is None:
            vision_features = self.get_vision_features(pixel_values)
        width = self.config.vision_config.hidden_size
        if vision_features.dim() != 4 or vision_features.shape[-1] != width:
            raise ValueError(
                f"Expected vision_features of shape (B, N, S, {width}), got {tuple(vision_features.shape)}."
            )
        if image_mask is not None:
            _check_image_mask(image_mask, vision_features.shape[:2])
        return self.study_pooling(vision_features.to(self.study_pooling.queries.dtype), image_mask)

    def embed_pooled(self, pooled: torch.Tensor) -> torch.Tensor:
        """Takes pooled studies (B, Q, C) to the shared space: (B, D), unit norm."""
        return nn.functional.normalize(self.visual_projection(pooled.flatten(1)), dim=-1)

    def get_image_features(
        self,
        pixel_values: torch.Tensor | None = None,
        image_mask: torch.Tensor | None = None,
        vision_features: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Embeds studies in the shared space.

        Args:
            pixel_values: (B, N, 3, H, W), or (B, 3, H, W) for one image a study.
            image_mask: (B, N), true where an image is real; None if all are.
            vision_features: (B, N, S, C) from `get_vision_features`, instead of `pixel_values`.

        Returns:
            (B, D), unit norm.

        Raises:
            ValueError: If not exactly one of `pixel_values` and `vision_features` is given, or on a wrong shape.
        """
        return self.embed_pooled(self.pool_studies(pixel_values, image_mask, vision_features))

    def get_text_features(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Embeds texts in the shared space: the projected mean of the encoder's token states.

        Args:
            input_ids: (B, T), of any of the languages.
            attention_mask: (B, T); None if nothing is padding.

        Returns:
            (B, D), unit norm.

        Raises:
            ValueError: If texts are longer than `max_text_tokens`.
        """
        longest = self.max_text_tokens
        if longest is not None and input_ids.shape[1] > longest:
            raise ValueError(
                f"Expected texts of at most {longest} tokens, the positions of the text encoder, got "
                f"{input_ids.shape[1]}: set tokenizer.model_max_length={longest}, or pass max_length to the processor."
            )
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        states = self.text_encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state  # (B, T, .)
        weights = attention_mask.unsqueeze(-1).to(states.dtype)
        mean = (states * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)
        return nn.functional.normalize(self.text_projection(mean), dim=-1)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_mask: torch.Tensor | None = None,
        vision_features: torch.Tensor | None = None,
        return_loss: bool | None = None,
    ) -> M3FMOutput:
        """Embeds images, texts or both, and compares them where both are given.

        Args:
            pixel_values: (B, N, 3, H, W) or (B, 3, H, W).
            input_ids: (B_text, T).
            attention_mask: (B_text, T).
            image_mask: (B, N).
            vision_features: (B, N, S, C) instead of `pixel_values`.
            return_loss: Whether to compute the contrastive loss; needs image i and text i to be a pair.

        Raises:
            ValueError: If neither images nor texts are given, or a loss is asked for without pairs.
        """
        has_images = pixel_values is not None or vision_features is not None
        if not has_images and input_ids is None:
            raise ValueError("Expected pixel_values, vision_features or input_ids, got none of them.")
        image_embeds = self.get_image_features(pixel_values, image_mask, vision_features) if has_images else None
        text_embeds = self.get_text_features(input_ids, attention_mask) if input_ids is not None else None
        loss = logits_per_text = logits_per_image = None
        scale = self.logit_scale.exp()
        if image_embeds is not None and text_embeds is not None:
            logits_per_image = scale * image_embeds @ text_embeds.t()  # (B_image, B_text)
            if self.logit_bias is not None:
                logits_per_image = logits_per_image + self.logit_bias
            logits_per_text = logits_per_image.t()
        if return_loss:
            if logits_per_image is None or logits_per_image.shape[0] != logits_per_image.shape[1]:
                raise ValueError("return_loss=True expected as many images as texts, pair by pair.")
            loss = contrastive_loss(logits_per_image)
        # A parameter that is an output itself, distributed training would take for an unused one.
        bias = None if self.logit_bias is None else self.logit_bias.clone()
        return M3FMOutput(loss, logits_per_image, logits_per_text, image_embeds, text_embeds, scale, bias)


def _check_image_mask(image_mask: torch.Tensor, shape: torch.Size) -> None:
    if image_mask.shape != shape:
        raise ValueError(f"Expected image_mask of shape {tuple(shape)}, got {tuple(image_mask.shape)}.")
    if not torch.compiler.is_compiling() and not image_mask.bool().any(dim=1).all():
        raise ValueError("Expected at least one real image in every study, got an image_mask with a row of none.")


__all__ = ["M3FMModel", "M3FMOutput", "M3FMPreTrainedModel"]
