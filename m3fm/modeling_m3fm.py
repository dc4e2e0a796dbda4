# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""M3FM (Liu et al., npj Digital Medicine 8:86, 2025): MultiMedCLIP, MultiMedLM and a diagnosis head.

Where the paper is silent the nearest primary sources are followed, and named: DeCap (ICLR 2023) for crossing the gap
between images and text by a memory of reports, CapDec (EMNLP 2022) for the noise that the decoder is trained with.

Letters in shapes: B studies, N images of a study, S image tokens of one image, C width of the image tower, Q pooling
queries, D width of the shared space, M memory entries, P prefix positions, K further positions of an image, T text
tokens, H width of the decoder.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, GenerationMixin
from transformers import initialization as init
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast, ImageClassifierOutput
from transformers.utils import can_return_tuple

from .base_m3fm import M3FMModel, M3FMOutput, M3FMPreTrainedModel
from .configuration_m3fm import M3FMConfig
from .layers_m3fm import cross_modality_gap


def _default_generation(config: M3FMConfig) -> GenerationConfig:
    """Returns how reports are written where neither the checkpoint nor the call says it."""
    generation = GenerationConfig.from_model_config(config)
    # Prompt ids are input only: were one emitted, it would be read back as a place for the image.
    never = {config.image_token_id, *config.language_token_ids.values()}
    ends = config.text_config.eos_token_id
    ends = set(ends) if isinstance(ends, list) else {ends}
    never |= {config.text_config.pad_token_id, config.text_config.bos_token_id} - ends
    generation.suppress_tokens = sorted(never - {None})
    # The default of transformers, 20, cuts every report.
    generation.max_new_tokens = 256
    return generation


# Of the first weights that read image tokens.
IMAGE_TOKEN_STD = 1e-3


class M3FMForReportGeneration(M3FMPreTrainedModel, GenerationMixin):
    """MultiMedLM on MultiMedCLIP: writes a report from a shared-space embedding, in the language asked for.

    The decoder is trained on text alone; at inference the image embedding, carried over the modality gap by the
    support memory, takes the place of the text embedding. A decoder that was trained on image-report pairs besides may
    read K pooled queries of the study beside its embedding (`config.num_image_tokens`).

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
        if config.num_image_tokens:
            self.token_projector = nn.Linear(config.vision_config.hidden_size, config.text_config.hidden_size)
        memory = torch.zeros(len(config.languages), config.support_memory_size, config.projection_dim)
        self.register_buffer("support_memory", memory)
        self.post_init()
        self.generation_config = _default_generation(config)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:
            init.zeros_(module.support_memory)
            if self.config.num_image_tokens:
                # Small beside the embeddings of tokens: a decoder that knows text alone is to read on as it did.
                init.normal_(self.token_projector.weight, std=IMAGE_TOKEN_STD)

    def _complete_loading(self, missing: set[str]) -> set[str]:
        # Without generation_config.json transformers reads config.json in its place, which knows no end of a report.
        # What this class saved is from the model's config too, but has tokens to suppress.
        if self.generation_config._from_model_config and self.generation_config.suppress_tokens is None:
            self.generation_config = _default_generation(self.config)
        return set()

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

    def build_prompt(self, languages: Sequence[str], num_image_tokens: int = 0) -> torch.Tensor:
        """Returns the decoder's prompt ids (B, K + P + 1): places for the embedding, then the language token.

        Args:
            languages: B of them.
            num_image_tokens: K, places in front for what is read of an image beside its embedding.

        Raises:
            ValueError: If the checkpoint does not write one of `languages`.
        """
        unknown = sorted({str(language) for language in languages} - set(self.config.languages))
        if unknown:
            raise ValueError(f"Unsupported language {unknown}: expected one of {list(self.config.languages)}.")
        places = [self.config.image_token_id] * (num_image_tokens + self.config.num_prefix_tokens)
        ids = [[*places, self.config.language_token_ids[language]] for language in languages]
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
        return self._cross(self.model.get_image_features(pixel_values, image_mask, vision_features), languages)

    def _cross(self, image_embeds: torch.Tensor, languages: Sequence[str]) -> torch.Tensor:
        """Carries image embeddings (B, D) over the modality gap."""
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

    def _read_studies(
        self, languages: Sequence[str], pixel_values: Any, image_mask: Any, vision_features: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns what the decoder reads of studies: (B, D) as `get_shared_embeds`, and (B, K, C) where K > 0."""
        pooled = self.model.pool_studies(pixel_values, image_mask, vision_features)  # (B, Q, C)
        shared_embeds = self._cross(self.model.embed_pooled(pooled), languages)
        count = self.config.num_image_tokens
        return shared_embeds, pooled[:, :count] if count else None

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
        image_tokens: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Predicts the next token of reports, the embedding standing at the image placeholders of `input_ids`.

        Args:
            input_ids: (B, T), `build_prompt` followed by the report; of an image with its K places more.
            shared_embeds: (B, D), unit norm: of a text in training, of a study in inference. Beside images: of the
                texts that follow them in `input_ids`, as many rows less.
            attention_mask: (B, T).
            position_ids: (B, T).
            past_key_values: Cache of earlier positions.
            inputs_embeds: (B, T, H) instead of `input_ids`.
            pixel_values: (B, N, 3, H, W) instead of `shared_embeds`: supervised training on images.
            image_mask: (B, N).
            vision_features: (B, N, S, C) instead of `pixel_values`.
            image_tokens: (B, K, C), of the studies that `shared_embeds` are of, where K > 0.
            labels: (B, T), -100 where there is no loss.
            use_cache: Whether to return a cache.
            logits_to_keep: Last positions (or their indices) that logits are computed for; 0 is all.
            kwargs: What the decoder's forward takes besides.

        Raises:
            ValueError: If placeholders stand in `input_ids` and there is nothing to put there, or another number.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Expected exactly one of input_ids and inputs_embeds.")
        if inputs_embeds is None:
            inputs_embeds = self._embed(
                input_ids, shared_embeds, pixel_values, image_mask, vision_features, image_tokens
            )
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
        """Reads the language of each prompt of an image back from its language token."""
        codes = {token_id: language for language, token_id in self.config.language_token_ids.items()}
        position = self.config.num_image_tokens + self.config.num_prefix_tokens
        tokens = input_ids[:, position].tolist()
        if any(token not in codes for token in tokens):
            raise ValueError(f"Expected a language token at position {position} of input_ids.")
        return [codes[token] for token in tokens]

    def _embed(
        self,
        input_ids: torch.Tensor,
        shared_embeds: torch.Tensor | None,
        pixel_values: torch.Tensor | None,
        image_mask: torch.Tensor | None,
        vision_features: torch.Tensor | None,
        image_tokens: torch.Tensor | None,
    ) -> torch.Tensor:
        """Embeds `input_ids` (B, T), what is read of images or texts at the placeholders: (B, T, H)."""
        images = pixel_values if vision_features is None else vision_features
        if images is not None:
            languages = self._languages_of(input_ids[: len(images)])
            read, image_tokens = self._read_studies(languages, pixel_values, image_mask, vision_features)
            shared_embeds = read if shared_embeds is None else torch.cat([read, shared_embeds.to(read.dtype)])
        places = input_ids == self.config.image_token_id  # (B, T)
        self._check_places(places, shared_embeds, 0 if image_tokens is None else len(image_tokens))
        embeds = self.get_input_embeddings()(input_ids)
        if shared_embeds is None:
            return embeds
        prefix = self.prefix_projector(shared_embeds.to(self.prefix_projector.weight.dtype))  # (B, P * H)
        if image_tokens is not None:
            further = self.token_projector(image_tokens.to(self.token_projector.weight.dtype)).flatten(1)  # (., K * H)
            of_images = torch.cat([further, prefix[: len(further)]], dim=1)
            prefix = torch.cat([of_images.flatten(), prefix[len(further) :].flatten()])
        return embeds.masked_scatter(places.unsqueeze(-1).expand_as(embeds), prefix.to(embeds.dtype))

    def _check_places(self, places: torch.Tensor, shared_embeds: torch.Tensor | None, num_images: int) -> None:
        """Refuses placeholders without embedding, and rows (B, T) that have other numbers of them than P or K + P."""
        if torch.compiler.is_compiling():  # values are not known there
            return
        if shared_embeds is None:
            if places.any():
                raise ValueError(
                    "Got image placeholders in input_ids and nothing to put there: expected pixel_values, "
                    "vision_features or shared_embeds."
                )
            return
        counts, of_text = places.sum(dim=1).tolist(), self.config.num_prefix_tokens
        of_image, num_texts = self.config.num_image_tokens + of_text, len(shared_embeds) - num_images
        if counts != [of_image] * num_images + [of_text] * num_texts:
            wanted = (
                [f"{of_text} image placeholders in each of {num_texts} rows"] if num_texts or not num_images else []
            )
            wanted += [f"{of_image} image placeholders in each of {num_images} rows of images"] if num_images else []
            raise ValueError(f"Expected {' and '.join(wanted)}, got {counts}.")

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        inputs_embeds: torch.Tensor | None = None,
        shared_embeds: torch.Tensor | None = None,
        image_tokens: torch.Tensor | None = None,
        is_first_iteration: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Passes what is read of the image to the first step only; from then on it is in the cache."""
        inputs = super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )
        if is_first_iteration or not kwargs.get("use_cache", True):
            inputs |= {"shared_embeds": shared_embeds, "image_tokens": image_tokens}
        return inputs

    @torch.no_grad()
    def generate(
        self,
        pixel_values: torch.Tensor | None = None,
        image_mask: torch.Tensor | None = None,
        language: str | Sequence[str] = "en",
        shared_embeds: torch.Tensor | None = None,
        vision_features: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **generation_kwargs: Any,
    ) -> Any:
        """Writes reports; images are encoded once, whatever the length and the number of beams.

        Args:
            pixel_values: (B, N, 3, H, W) or (B, 3, H, W).
            image_mask: (B, N).
            language: One code for all studies, or one a study.
            shared_embeds: (B, D) instead of images: of a text, to translate or rewrite it.
            vision_features: (B, N, S, C) instead of `pixel_values`.
            input_ids: Refused: the prompt is built here, from `language`.
            attention_mask: Refused, for the same reason.
            generation_kwargs: What `GenerationMixin.generate` takes (`num_beams`, `do_sample`, `max_new_tokens`, ...).

        Returns:
            Token ids (B, P + 1 + T), of images (B, K + P + 1 + T), the prompt included; special tokens are skipped by
            `processor.batch_decode(ids, skip_special_tokens=True)`.

        Raises:
            ValueError: On an unsupported language, a wrong number of languages, no input, or a text prompt.
        """
        if input_ids is not None or attention_mask is not None:
            raise ValueError(
                "generate writes from images alone and builds its prompt from language, got input_ids or "
                "attention_mask: call the processor without text, and pass language='en' or another code. "
                "The pipeline for this is 'm3fm-report'."
            )
        given = [value for value in (pixel_values, shared_embeds, vision_features) if value is not None]
        if len(given) != 1:
            raise ValueError("Expected exactly one of pixel_values, vision_features and shared_embeds.")
        batch = given[0].shape[0]
        languages = [language] * batch if isinstance(language, str) else list(language)
        if len(languages) != batch:
            raise ValueError(f"Expected one language or {batch} of them, got {len(languages)}.")
        # A text has an embedding alone.
        prompt = self.build_prompt(languages, self.config.num_image_tokens if shared_embeds is None else 0)
        image_tokens = None
        if shared_embeds is None:
            shared_embeds, image_tokens = self._read_studies(languages, pixel_values, image_mask, vision_features)
        return super().generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            shared_embeds=shared_embeds,
            image_tokens=image_tokens,
            **generation_kwargs,
        )


class M3FMForImageClassification(M3FMPreTrainedModel):
    """A diagnosis head on the study's embedding, its report's embedding, or both (the paper combines them).

    With `problem_type="multi_label_classification"` labels are (B, L) floats and NaN marks an unknown label.
    """

    _keys_to_ignore_on_load_unexpected = [
        r"^decoder\.",
        r"^prefix_projector\.",
        r"^token_projector\.",
        r"^support_memory$",
    ]

    def __init__(self, config: M3FMConfig):
        super().__init__(config)
        self.model = M3FMModel(config)
        sources = 2 if config.classifier_features == "fused" else 1
        self.classifier = nn.Linear(sources * config.projection_dim, config.num_labels)
        # The random weight of a head that the loaded checkpoint did not hold, until the head is trained or loaded.
        self.register_buffer("random_head", None, persistent=False)
        self.post_init()

    def _complete_loading(self, missing: set[str]) -> set[str]:
        head = {key for key in self.state_dict() if key.startswith("classifier.")}
        if not head <= missing:
            return set()
        self.random_head = self.classifier.weight.detach().clone()
        return head

    def train(self, mode: bool = True) -> "M3FMForImageClassification":
        """Sets the mode as `nn.Module.train` does; a head that has been in training mode counts as trained."""
        if mode:
            self.random_head = None
        return super().train(mode)

    def _refuse_random_head(self) -> None:
        if self.random_head is None:
            return
        # By value, because weights come by other ways too: load_state_dict, an adapter that holds a head.
        weight = getattr(self.classifier, "weight", None)
        if weight is None or not torch.equal(weight, self.random_head):
            self.random_head = None
            return
        raise ValueError(
            "The diagnosis head is untrained: the checkpoint held none, and its scores would be random. Train it, or "
            "load a checkpoint that was saved by M3FMForImageClassification."
        )

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
            ValueError: If the report embedding is missing where the head reads it, or given where it does not; in
                evaluation without labels, also if the head is the random one of a checkpoint that held none.
        """
        if labels is None and not self.training:
            self._refuse_random_head()
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
