# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""M3FM (Liu et al., npj Digital Medicine 8:86, 2025): MultiMedCLIP, MultiMedLM and a diagnosis head.

Where the paper is silent the nearest primary sources are followed, and named: DeCap (ICLR 2023) for crossing the gap
between images and text by a memory of reports, CapDec (EMNLP 2022) for the noise that the decoder is trained with.

Letters in shapes: B studies, N images of a study, S image tokens of one image, C width of the image tower, Q pooling
queries, D width of the shared space, M memory entries, P prefix positions, T text tokens, H width of the decoder.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast, ImageClassifierOutput
from transformers.utils import ModelOutput, can_return_tuple

from .configuration_m3fm import M3FMConfig
from .layers_m3fm import M3FMStudyPooling, contrastive_loss, cross_modality_gap


@dataclass
class M3FMOutput(ModelOutput):
    """Output of `M3FMModel`; what was not asked for is None.

    Args:
        loss: Symmetric InfoNCE of the batch, with `return_loss=True`.
        logits_per_image: (B_image, B_text), scaled cosine similarity.
        logits_per_text: (B_text, B_image).
        image_embeds: (B_image, D), unit norm.
        text_embeds: (B_text, D), unit norm.
    """

    loss: torch.FloatTensor | None = None
    logits_per_image: torch.FloatTensor | None = None
    logits_per_text: torch.FloatTensor | None = None
    image_embeds: torch.FloatTensor | None = None
    text_embeds: torch.FloatTensor | None = None


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

    # A part that may be newly initialised when a checkpoint holds none of it: a diagnosis head is the user's to train.
    _new_head_prefix: str | None = None

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, M3FMStudyPooling):
            init.normal_(module.queries, std=module.queries.shape[-1] ** -0.5)
        elif isinstance(module, M3FMModel):
            init.constant_(module.logit_scale, self.config.logit_scale_init_value)
        elif isinstance(module, M3FMForReportGeneration):
            init.zeros_(module.support_memory)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *model_args: Any, output_loading_info: bool = False, **kwargs: Any
    ) -> Any:
        """Loads a checkpoint as `PreTrainedModel.from_pretrained` does, and refuses one that does not fit.

        transformers warns about missing and unexpected weights and goes on with random ones; a report written by
        random weights looks like a report, so this is an error here.

        Raises:
            ValueError: If weights are missing, or the checkpoint holds some that no M3FM class knows.
        """
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
        )
        missing, unexpected = set(info["missing_keys"]), set(info["unexpected_keys"])
        if cls._new_head_prefix is not None:
            head = {key for key in model.state_dict() if key.startswith(cls._new_head_prefix)}
            missing = missing - head if head <= missing else missing
        if missing or unexpected:
            raise ValueError(
                f"The weights in {str(pretrained_model_name_or_path)!r} do not fit {cls.__name__}: "
                f"missing {_summarise(missing)}, unexpected {_summarise(unexpected)}. "
                "Expected a checkpoint saved by this class, or one that contains it."
            )
        return (model, info) if output_loading_info else model


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

    _keys_to_ignore_on_load_unexpected = [r"^decoder\.", r"^prefix_projector\.", r"^support_memory$", r"^classifier\."]

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
        self.post_init()

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
        vision_features = vision_features.to(self.study_pooling.queries.dtype)
        pooled = self.study_pooling(vision_features, image_mask)  # (B, Q, C)
        return nn.functional.normalize(self.visual_projection(pooled.flatten(1)), dim=-1)

    def get_text_features(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Embeds texts in the shared space: the projected mean of the encoder's token states.

        Args:
            input_ids: (B, T), of any of the languages.
            attention_mask: (B, T); None if nothing is padding.

        Returns:
            (B, D), unit norm.
        """
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
        if image_embeds is not None and text_embeds is not None:
            logits_per_image = self.logit_scale.exp() * image_embeds @ text_embeds.t()  # (B_image, B_text)
            logits_per_text = logits_per_image.t()
        if return_loss:
            if logits_per_image is None or logits_per_image.shape[0] != logits_per_image.shape[1]:
                raise ValueError("return_loss=True expected as many images as texts, pair by pair.")
            loss = contrastive_loss(logits_per_image)
        return M3FMOutput(loss, logits_per_image, logits_per_text, image_embeds, text_embeds)


def _check_image_mask(image_mask: torch.Tensor, shape: torch.Size) -> None:
    if image_mask.shape != shape:
        raise ValueError(f"Expected image_mask of shape {tuple(shape)}, got {tuple(image_mask.shape)}.")
    if not torch.compiler.is_compiling() and not image_mask.bool().any(dim=1).all():
        raise ValueError("Expected at least one real image in every study, got an image_mask with a row of none.")


class M3FMForReportGeneration(M3FMPreTrainedModel, GenerationMixin):
    """MultiMedLM on MultiMedCLIP: writes a report from a shared-space embedding, in the language asked for.

    The decoder is trained on text alone; at inference the image embedding, carried over the modality gap by the
    support memory, takes the place of the text embedding.

    Example:

    ```python
    >>> from transformers import AutoModelForImageTextToText, AutoProcessor
    >>> model = AutoModelForImageTextToText.from_pretrained(m3fm.DEFAULT_CHECKPOINT)
    >>> processor = AutoProcessor.from_pretrained(m3fm.DEFAULT_CHECKPOINT)
    >>> inputs = processor(images="chest.png", return_tensors="pt")
    >>> processor.batch_decode(model.generate(**inputs, language="zh"), skip_special_tokens=True)
    ```
    """

    # Unlike in the other classes: `generate` is given a prompt and asks for it by this name.
    main_input_name = "input_ids"
    _keys_to_ignore_on_load_unexpected = [r"^classifier\."]

    def __init__(self, config: M3FMConfig):
        super().__init__(config)
        self.model = M3FMModel(config)
        self.decoder = AutoModelForCausalLM.from_config(config.text_config)
        self.prefix_projector = nn.Linear(
            config.projection_dim, config.num_prefix_tokens * config.text_config.hidden_size
        )
        memory = torch.zeros(len(config.languages), config.support_memory_size, config.projection_dim)
        self.register_buffer("support_memory", memory)
        self.post_init()
        # Prompt ids are input only: were one emitted, it would be read back as a place for the image.
        never = {config.image_token_id, *config.language_token_ids.values()}
        ends = config.text_config.eos_token_id
        ends = set(ends) if isinstance(ends, list) else {ends}
        never |= {config.text_config.pad_token_id, config.text_config.bos_token_id} - ends
        self.generation_config.suppress_tokens = sorted(never - {None})
        # The default of transformers, 20, cuts every report.
        self.generation_config.max_new_tokens = 256

    def get_input_embeddings(self) -> nn.Module:
        """Returns the token embedding of the decoder."""
        return self.decoder.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the token embedding of the decoder."""
        self.decoder.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """Returns the output layer of the decoder."""
        return self.decoder.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replaces the output layer of the decoder."""
        self.decoder.set_output_embeddings(value)

    @torch.no_grad()
    def set_support_memory(self, memory: torch.Tensor) -> None:
        """Stores embeddings of training reports in the checkpoint.

        Args:
            memory: (languages, M, D), unit norm, languages in the order of `config.languages`.

        Raises:
            ValueError: On another shape.
        """
        expected = (len(self.config.languages), self.config.support_memory_size, self.config.projection_dim)
        if tuple(memory.shape) != expected:
            raise ValueError(f"Expected a support memory of shape {expected}, got {tuple(memory.shape)}.")
        self.support_memory.copy_(memory)

    def build_prompt(self, languages: Sequence[str]) -> torch.Tensor:
        """Returns the decoder's prompt ids (B, P + 1): places for the embedding, then the language token.

        Raises:
            ValueError: If the checkpoint does not write one of `languages`.
        """
        unknown = sorted({str(language) for language in languages} - set(self.config.languages))
        if unknown:
            raise ValueError(f"Unsupported language {unknown}: expected one of {list(self.config.languages)}.")
        prefix = [self.config.image_token_id] * self.config.num_prefix_tokens
        ids = [[*prefix, self.config.language_token_ids[language]] for language in languages]
        return torch.tensor(ids, dtype=torch.long, device=self.device)

    def get_shared_embeds(
        self,
        languages: Sequence[str],
        pixel_values: torch.Tensor | None = None,
        image_mask: torch.Tensor | None = None,
        vision_features: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Embeds studies and carries them over the modality gap, by the memory of the language that will be written.

        Returns:
            (B, D), unit norm, ready for the decoder.

        Raises:
            ValueError: If the support memory was never filled, or there is not one language a study.
        """
        image_embeds = self.model.get_image_features(pixel_values, image_mask, vision_features)
        if len(languages) != image_embeds.shape[0]:
            raise ValueError(f"Expected one language or {image_embeds.shape[0]} of them, got {len(languages)}.")
        if self.config.support_memory_size == 0:
            return image_embeds
        if not self.support_memory.any():
            raise ValueError("The support memory is empty: fill it by set_support_memory, or set its size to 0.")
        rows = torch.tensor([self.config.languages.index(language) for language in languages], device=self.device)
        memory = self.support_memory.to(image_embeds.dtype)
        if len(set(languages)) == 1:
            return cross_modality_gap(image_embeds, memory[rows[0]], self.config.support_temperature)
        return cross_modality_gap(image_embeds, memory[rows], self.config.support_temperature)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        shared_embeds: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_mask: torch.Tensor | None = None,
        vision_features: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Predicts the next token of reports, the embedding standing at the image placeholders of `input_ids`.

        Args:
            input_ids: (B, T), `build_prompt` followed by the report.
            shared_embeds: (B, D), unit norm: of a text in training, of a study in inference.
            attention_mask: (B, T).
            position_ids: (B, T).
            past_key_values: Cache of earlier positions.
            inputs_embeds: (B, T, H) instead of `input_ids`.
            pixel_values: (B, N, 3, H, W) instead of `shared_embeds`: supervised training on images.
            image_mask: (B, N).
            vision_features: (B, N, S, C) instead of `pixel_values`.
            labels: (B, T), -100 where there is no loss.
            use_cache: Whether to return a cache.
            logits_to_keep: Last positions (or their indices) that logits are computed for; 0 is all.
            kwargs: What the decoder's forward takes besides.

        Raises:
            ValueError: If placeholders stand in `input_ids` and there is nothing to put there, or not P of them.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Expected exactly one of input_ids and inputs_embeds.")
        if shared_embeds is None and (pixel_values is not None or vision_features is not None):
            languages = self._languages_of(input_ids)
            shared_embeds = self.get_shared_embeds(languages, pixel_values, image_mask, vision_features)
        if inputs_embeds is None:
            inputs_embeds = self._embed(input_ids, shared_embeds)
        outputs = self.decoder(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **{key: value for key, value in kwargs.items() if key != "num_items_in_batch"},
        )
        loss = None
        if labels is not None:
            vocab_size = self.config.text_config.vocab_size
            loss = ForCausalLMLoss(outputs.logits, labels, vocab_size, kwargs.get("num_items_in_batch"))
        return CausalLMOutputWithPast(
            loss=loss,
            logits=outputs.logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _languages_of(self, input_ids: torch.Tensor) -> list[str]:
        """Reads the language of each prompt back from its language token."""
        codes = {token_id: language for language, token_id in self.config.language_token_ids.items()}
        tokens = input_ids[:, self.config.num_prefix_tokens].tolist()
        if any(token not in codes for token in tokens):
            raise ValueError(f"Expected a language token at position {self.config.num_prefix_tokens} of input_ids.")
        return [codes[token] for token in tokens]

    def _embed(self, input_ids: torch.Tensor, shared_embeds: torch.Tensor | None) -> torch.Tensor:
        """Embeds `input_ids` (B, T), the unfolded `shared_embeds` (B, D) at the placeholders; returns (B, T, H)."""
        embeds = self.get_input_embeddings()(input_ids)
        if shared_embeds is None:
            return embeds
        prefix = self.prefix_projector(shared_embeds.to(self.prefix_projector.weight.dtype))  # (B, P * H)
        places = (input_ids == self.config.image_token_id).unsqueeze(-1).expand_as(embeds)  # (B, T, H)
        if places.sum() != prefix.numel():
            raise ValueError(
                f"Expected {self.config.num_prefix_tokens} image placeholders in each of {len(shared_embeds)} rows, "
                f"got {int((input_ids == self.config.image_token_id).sum())} in all."
            )
        return embeds.masked_scatter(places, prefix.to(embeds.dtype))

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        inputs_embeds: torch.Tensor | None = None,
        shared_embeds: torch.Tensor | None = None,
        is_first_iteration: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Passes the embedding to the first step only; from then on it is in the cache."""
        inputs = super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )
        inputs["shared_embeds"] = shared_embeds if is_first_iteration or not kwargs.get("use_cache", True) else None
        return inputs

    @torch.no_grad()
    def generate(
        self,
        pixel_values: torch.Tensor | None = None,
        image_mask: torch.Tensor | None = None,
        language: str | Sequence[str] = "en",
        shared_embeds: torch.Tensor | None = None,
        vision_features: torch.Tensor | None = None,
        **generation_kwargs: Any,
    ) -> Any:
        """Writes reports; images are encoded once, whatever the length and the number of beams.

        Args:
            pixel_values: (B, N, 3, H, W) or (B, 3, H, W).
            image_mask: (B, N).
            language: One code for all studies, or one a study.
            shared_embeds: (B, D) instead of images: of a text, to translate or rewrite it.
            vision_features: (B, N, S, C) instead of `pixel_values`.
            generation_kwargs: What `GenerationMixin.generate` takes (`num_beams`, `do_sample`, `max_new_tokens`, ...).

        Returns:
            Token ids (B, P + 1 + T), the prompt included; special tokens are skipped by
            `processor.batch_decode(ids, skip_special_tokens=True)`.

        Raises:
            ValueError: On an unsupported language, a wrong number of languages, or no input.
        """
        given = [value for value in (pixel_values, shared_embeds, vision_features) if value is not None]
        if len(given) != 1:
            raise ValueError("Expected exactly one of pixel_values, vision_features and shared_embeds.")
        batch = given[0].shape[0]
        languages = [language] * batch if isinstance(language, str) else list(language)
        if len(languages) != batch:
            raise ValueError(f"Expected one language or {batch} of them, got {len(languages)}.")
        prompt = self.build_prompt(languages)
        if shared_embeds is None:
            shared_embeds = self.get_shared_embeds(languages, pixel_values, image_mask, vision_features)
        return super().generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            shared_embeds=shared_embeds,
            **generation_kwargs,
        )


class M3FMForImageClassification(M3FMPreTrainedModel):
    """A diagnosis head on the study's embedding, its report's embedding, or both (the paper combines them).

    With `problem_type="multi_label_classification"` labels are (B, L) floats and NaN marks an unknown label.
    """

    _keys_to_ignore_on_load_unexpected = [r"^decoder\.", r"^prefix_projector\.", r"^support_memory$"]
    _new_head_prefix = "classifier."

    def __init__(self, config: M3FMConfig):
        super().__init__(config)
        self.model = M3FMModel(config)
        sources = 2 if config.classifier_features == "fused" else 1
        self.classifier = nn.Linear(sources * config.projection_dim, config.num_labels)
        self.post_init()

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Resizes the token embedding of the text encoder."""
        return self.model.resize_token_embeddings(*args, **kwargs)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        image_mask: torch.Tensor | None = None,
        vision_features: torch.Tensor | None = None,
        report_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> ImageClassifierOutput:
        """Scores the labels of `config.id2label`.

        Args:
            pixel_values: (B, N, 3, H, W) or (B, 3, H, W).
            image_mask: (B, N).
            vision_features: (B, N, S, C) instead of `pixel_values`.
            report_embeds: (B, D), `get_text_features` of the report, where `config.classifier_features` reads it.
            labels: (B,) class indices, or (B, L) floats for several labels at once.

        Raises:
            ValueError: If the report embedding is missing where the head reads it, or given where it does not.
        """
        reads_report = self.config.classifier_features != "image"
        if reads_report != (report_embeds is not None):
            raise ValueError(
                f"A head on classifier_features={self.config.classifier_features!r} expected report_embeds to be "
                f"{'given' if reads_report else 'left out'}."
            )
        features = [] if report_embeds is None else [report_embeds]
        if self.config.classifier_features != "report":
            features.insert(0, self.model.get_image_features(pixel_values, image_mask, vision_features))
        # Embeddings have unit norm: without this their coordinates are near zero and the head learns slowly.
        scale = self.config.projection_dim**0.5
        logits = self.classifier(torch.cat(features, dim=-1) * scale)  # (B, L)
        loss = self._loss(logits, labels) if labels is not None else None
        return ImageClassifierOutput(loss=loss, logits=logits)

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if self.config.problem_type == "multi_label_classification" or labels.is_floating_point():
            known = ~labels.isnan()
            if not known.any():
                return logits.sum() * 0.0  # the mean over nothing is NaN, and would end the training
            return nn.functional.binary_cross_entropy_with_logits(logits[known], labels[known].to(logits.dtype))
        return nn.functional.cross_entropy(logits, labels)


__all__ = [
    "M3FMForImageClassification",
    "M3FMForReportGeneration",
    "M3FMModel",
    "M3FMOutput",
    "M3FMPreTrainedModel",
]
