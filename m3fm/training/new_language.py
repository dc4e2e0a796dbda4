# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""A further language for a checkpoint: its token, its place in the memory, and a text encoder that reads it.

The encoder is taught by parallel text: it takes the new language to where the frozen encoder takes the same text in a
language that it knows, and leaves that where it is (Reimers and Gurevych, EMNLP 2020).

Letters in shapes: B texts, D width of the shared space, L languages, M memory entries.
"""

import copy
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoProcessor, TrainingArguments

from ..modeling_m3fm import M3FMForReportGeneration
from ..processing_m3fm import M3FMProcessor
from .feed import FeedTrainer
from .runs import RunOptions, train_or_resume
from .samplers import LengthBucketSampler, count_tokens
from .towers import LoraBlock, check_training, merge_lora, set_training

__all__ = ["TeachBlock", "add_language", "free_token", "teach_encoder"]

RESERVED = "<|reserved_"
#: Folder of a run in which the encoder is taught.
ENCODER_FOLDER = "encoder"


@dataclass
class TeachBlock:
    """How the text encoder is taught a new language; in a recipe, the block `teaching:`.

    Args:
        training: "full", "lora" or "last_N". Token embeddings, which a new script needs, are trained by "full" alone.
        epochs: Passes over the parallel text.
        learning_rate: Of AdamW, at its highest.
    """

    training: str = "full"
    epochs: float = 20
    learning_rate: float = 5e-4

    def __post_init__(self) -> None:
        if self.epochs <= 0 or self.learning_rate <= 0:
            raise ValueError(f"teaching: expected epochs and learning_rate above 0, got {self}.")
        if self.training == "frozen":
            raise ValueError("teaching.training: expected 'full', 'lora' or 'last_N', got 'frozen'.")


# --------------------------------------------------------------------------------------------------------------------
# Token and memory


def free_token(processor: M3FMProcessor) -> tuple[str, int] | None:
    """Returns the first token that the tokenizer keeps for a language, and its id; None if none is left."""
    kept = {
        number: token.content
        for number, token in processor.tokenizer.added_tokens_decoder.items()
        if token.content.startswith(RESERVED)
    }
    number = min(kept, default=None)
    return None if number is None else (kept[number], number)


def add_language(model: M3FMForReportGeneration, processor: M3FMProcessor, language: str) -> M3FMProcessor:
    """Makes a model able to be asked for a language that it does not write yet; its memory of it is empty.

    The language takes a token that the tokenizer keeps for such; where none is left, the vocabulary grows by one.

    Args:
        model: Gets the token in its configuration, and a further, empty part of its support memory. The token starts
            as the mean of those of the other languages.
        processor: Of the model, left as it is.
        language: A code that the model does not know.

    Returns:
        A processor whose tokenizer has the token.

    Raises:
        ValueError: If the model knows the language.
    """
    config = model.config
    if language in config.languages:
        raise ValueError(f"The model writes {language!r} already: expected none of {list(config.languages)}.")
    token = f"<|{language}|>"
    kept = free_token(processor)
    processor = _with_token(processor, language, token, None if kept is None else kept[0])
    number = processor.tokenizer.convert_tokens_to_ids(token)
    if number >= model.get_input_embeddings().num_embeddings:
        model.decoder.resize_token_embeddings(number + 1)
        config.text_config.vocab_size = number + 1
    known = list(config.language_token_ids.values())
    with torch.no_grad():
        for table in (model.get_input_embeddings(), model.get_output_embeddings()):
            table.weight[number] = table.weight[known].mean(dim=0)
    memory = dict(zip(config.languages, model.support_memory, strict=True))
    config.language_token_ids = {**config.language_token_ids, language: number}
    empty = torch.zeros_like(model.support_memory[0])
    model.support_memory = torch.stack([memory.get(code, empty) for code in config.languages])
    never = {*(model.generation_config.suppress_tokens or ()), number}
    model.generation_config.suppress_tokens = sorted(never)
    return processor


def _with_token(processor: M3FMProcessor, language: str, token: str, kept: str | None) -> M3FMProcessor:
    """Returns a copy of a processor with a token, in the place of a kept one or behind the last."""
    with tempfile.TemporaryDirectory() as folder:
        processor.save_pretrained(folder)
        if kept is not None:
            vocabulary, settings = Path(folder, "tokenizer.json"), Path(folder, "tokenizer_config.json")
            content = vocabulary.read_text(encoding="utf-8")
            vocabulary.write_text(content.replace(json.dumps(kept), json.dumps(token)), encoding="utf-8")
            names = json.loads(settings.read_text(encoding="utf-8").replace(json.dumps(kept), json.dumps(token)))
            names[f"{language}_token"] = token
            settings.write_text(json.dumps(names, indent=2, ensure_ascii=False), encoding="utf-8")
        loaded = AutoProcessor.from_pretrained(folder)
    if kept is None:
        loaded.tokenizer.add_tokens([token], special_tokens=True)
    return loaded


# --------------------------------------------------------------------------------------------------------------------
# The encoder


class _TeachCollator:
    """Tokenizes texts, and gives each the embedding that it is to have."""

    def __init__(self, processor: M3FMProcessor, texts: Sequence[str], targets: torch.Tensor):
        self.processor = processor
        self.texts = texts
        self.targets = targets

    def __call__(self, numbers: Sequence[int]) -> dict[str, Any]:
        tokens = self.processor(text=[self.texts[number] for number in numbers], return_tensors="pt")
        return {
            "input_ids": tokens["input_ids"],
            "attention_mask": tokens["attention_mask"],
            "targets": self.targets[list(numbers)].float(),
            "study_ids": [f"text {number}" for number in numbers],
        }


class _TeachTrainer(FeedTrainer):
    """Minimises the squared distance of embeddings to their targets."""

    def compute_loss(
        self, model: torch.nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """Computes the mean of |embedding - target|^2 over the texts."""
        targets = inputs.pop("targets")
        outputs = model(**inputs)
        loss = (outputs.text_embeds.float() - targets).square().sum(dim=-1).mean()
        return (loss, outputs) if return_outputs else loss


def teach_encoder(
    model: M3FMForReportGeneration,
    processor: M3FMProcessor,
    texts: Sequence[str],
    targets: torch.Tensor,
    block: TeachBlock,
    lora: LoraBlock,
    recipe: Any,
    arguments: TrainingArguments,
    options: RunOptions | None = None,
) -> None:
    """Trains the text encoder to take texts to given places of the shared space; goes on where it was interrupted.

    Args:
        model: Its text encoder is trained in place; everything else stays.
        processor: Of the model.
        texts: In the new language, and in those known.
        targets: (B, D), unit norm: where the untrained encoder takes each text, or the version that it can read.
        block: How.
        lora: Of mode "lora".
        recipe: Of the run, for its settings.
        arguments: Of the run; its folder gets a folder of the encoder's training.
        options: Of the run.
    """
    encoder = model.model
    arguments = copy.copy(arguments)
    arguments.output_dir = str(Path(arguments.output_dir) / ENCODER_FOLDER)
    arguments.num_train_epochs, arguments.learning_rate = block.epochs, block.learning_rate
    arguments.max_steps = -1
    arguments.eval_strategy = arguments.eval_strategy.__class__("no")
    arguments.load_best_model_at_end, arguments.metric_for_best_model = False, None
    encoder.requires_grad_(False)
    set_training(encoder.text_encoder, block.training, lora, "teaching.training")
    trainer = _TeachTrainer(
        model=encoder,
        args=arguments,
        train_dataset=range(len(texts)),
        data_collator=_TeachCollator(processor, texts, targets),
        processing_class=processor,
        batches=LengthBucketSampler(
            count_tokens(texts, processor.tokenizer),
            arguments.train_batch_size,
            arguments.seed,
            world_size=arguments.world_size,
        ),
        options=RunOptions(nan_guard=options.nan_guard) if options else None,
    )
    train_or_resume(trainer, recipe)
    merge_lora(encoder)
    encoder.requires_grad_(False)
    encoder.eval()


def check_teaching(model: M3FMForReportGeneration, block: TeachBlock) -> None:
    """Refuses a mode of training that the text encoder cannot have.

    Raises:
        ValueError: With those that it can.
    """
    from .towers import blocks_of

    check_training(block.training, len(blocks_of(model.model.text_encoder)[1]), "teaching.training")
