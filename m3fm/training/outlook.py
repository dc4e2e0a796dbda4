# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""What a stage will meet: its data, its backbones and the model that it leaves, found out before anything is trained.

What does not fit is refused here; what fits is what a plan is made of. Weights are not read.

Letters in shapes: B studies or texts of a micro-batch, N images of a study, T tokens of a text, D width of the shared
space.
"""

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerBase, TrainingArguments

from .. import DEFAULT_CHECKPOINT
from ..configuration_m3fm import M3FMConfig
from ..data import Study
from ..image_processing_m3fm import M3FMImageProcessor
from ..modeling_m3fm import M3FMForImageClassification, M3FMForReportGeneration, M3FMModel
from .backbones import backbone_config, check_fit, check_positions, known_backbones, load_tokenizer
from .recipe import Kind
from .rehearsal import (
    Steps,
    align_inputs,
    build_on_meta,
    image_inputs,
    num_tokens,
    pooled_loss,
    write_inputs,
    written_loss,
)
from .samplers import count_tokens
from .settings import did_you_mean
from .text_bank import TextBank, load_texts
from .towers import LoraBlock

__all__ = ["Outlook", "look_ahead", "missing_backbones"]

# Encoders that count positions from the one after their padding id; they become BERT's where that id changes.
_ROBERTA = ("roberta", "xlm-roberta", "camembert")
_HALF = 2  # bytes


@dataclass
class Outlook:
    """What is known of a stage before it starts.

    Attributes:
        output_dir: Where it leaves what later stages go on from.
        config: Of the model that it leaves or goes on from; None: there is none.
        vocab_size: Ids of its tokenizer.
        ids: Those of them that `M3FMConfig` needs to know.
        tokenizer: None where it is not on this machine, or not learned yet.
        size: Height and width of the images.
        writes: Whether the model that it leaves has a decoder.
        facts: How much it learns from.
        prepared: What is computed once: what of, how many, and a forward pass of part of the model for one of them.
        stored: Bytes of it on disk.
        steps: None where nothing is trained by steps.
        missing: Backbones that are not on this machine.
        notes: What a reader of the plan has to know.
    """

    output_dir: str
    config: M3FMConfig | None = None
    vocab_size: int = 0
    ids: dict[str, Any] = field(default_factory=dict)
    tokenizer: PreTrainedTokenizerBase | None = None
    size: tuple[int, int] = (0, 0)
    writes: bool = False
    facts: dict[str, int] = field(default_factory=dict)
    prepared: list[tuple[str, int, Callable[[nn.Module], Any]]] = field(default_factory=list)
    stored: int = 0
    steps: Steps | None = None
    missing: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def look_ahead(kind: Kind, parsed: Sequence[Any], before: Mapping[str, Outlook]) -> Outlook:
    """Finds out what a stage will meet.

    Args:
        kind: Of the stage.
        parsed: Its dataclasses, as `Kind.parse` makes them.
        before: Earlier stages by output folder.

    Raises:
        ValueError: If data, backbones or their sizes do not fit, saying what to change.
    """
    recipe, arguments = parsed[0], parsed[1] if kind.trains else None
    folder = arguments.output_dir if kind.trains else recipe.output_dir
    look = _LOOKS.get(kind.module)
    if look is not None:
        found = look(recipe, arguments, before)
    else:
        found = _from_base(recipe.base, folder, before) if getattr(recipe, "base", "") else Outlook(folder)
        found.notes.append("what it computes is not estimated")
    found.missing = missing_backbones(recipe, before)
    return found


# --------------------------------------------------------------------------------------------------------------------
# Backbones and tokenizers


def missing_backbones(recipe: Any, before: Collection[str] = ()) -> list[str]:
    """Returns the backbones that a recipe names and that are not here, nor on the Hub where there is a network.

    Args:
        recipe: Of any kind.
        before: Folders that earlier stages will have made.
    """
    names = [getattr(recipe, part, "") for part in ("vision_model", "text_encoder", "decoder", "tokenizer")]
    return [name for name in dict.fromkeys(names) if name and name not in before and not _is_here(name)]


@cache
def _is_here(name: str) -> bool:
    if Path(name).is_dir():
        return True
    try:
        AutoConfig.from_pretrained(name)
    except (OSError, ValueError):
        return False
    return True


def _find_tokenizer(name: str, languages: Sequence[str], found: Outlook, before: Mapping[str, Outlook]) -> None:
    """Finds the tokenizer of a stage: on this machine, of an earlier stage, or by what is known of its size."""
    if name in before:
        found.vocab_size, found.ids = before[name].vocab_size, before[name].ids
        return
    try:
        found.tokenizer, image, ids = load_tokenizer(name, languages)
        found.vocab_size = len(found.tokenizer)
    except ValueError:
        known = known_backbones().get(name, {}).get("config", {})
        if "vocab_size" not in known:
            raise
        # A place for the image and a token for each language are added.
        image = known["vocab_size"]
        ids = {code: image + 1 + place for place, code in enumerate(languages)}
        found.vocab_size = image + 1 + len(languages)
    found.ids = {"image_token_id": image, "language_token_ids": ids}


def _counted(texts: Sequence[str], found: Outlook, most: int) -> np.ndarray:
    """Counts the tokens of texts, (N,), cut to `most`; by the shipped tokenizer where the stage's is not here."""
    tokenizer = found.tokenizer
    if tokenizer is None:
        tokenizer = load_tokenizer(str(DEFAULT_CHECKPOINT), ("en", "zh"))[0]
        found.notes.append("tokens are counted by the tokenizer that ships: the stage's own is not here yet")
    return np.minimum(count_tokens(texts, tokenizer), most)


def _text_config(name: str, found: Outlook) -> PreTrainedConfig:
    """Returns the configuration of a pretrained text encoder or decoder once it has the stage's vocabulary."""
    config = copy.deepcopy(backbone_config(name))
    values = config.to_dict() | {"vocab_size": found.vocab_size}
    pad = found.tokenizer.pad_token_id if found.tokenizer is not None else config.pad_token_id
    if config.model_type in _ROBERTA and pad != config.pad_token_id:
        values |= {"model_type": "bert", "max_position_embeddings": config.max_position_embeddings - 1}
        values["max_position_embeddings"] -= config.pad_token_id
    values["pad_token_id"] = pad
    return AutoConfig.for_model(values.pop("model_type"), **values)


def _check_model(values: Mapping[str, Any]) -> None:
    """Refuses names in the sub-configs of `model:` that are near one that their architecture knows.

    transformers would keep them unread. A name that is near none may be of an older version, and be translated.
    """
    for part in ("vision_config", "text_encoder_config", "text_config"):
        block = dict(values.get(part) or {})
        if "model_type" in block:
            config = AutoConfig.for_model(block.pop("model_type"))
            known = {each.name for each in fields(config)} | config.attribute_map.keys()
            for name in block.keys() - known:
                if hint := did_you_mean(name, known):
                    raise ValueError(f"model.{part}: unknown setting {name}{hint}.")


# --------------------------------------------------------------------------------------------------------------------
# Stages


def _look_tokenizer(recipe: Any, arguments: None, before: Mapping[str, Outlook]) -> Outlook:
    from .tokenizer import IMAGE_TOKEN, read_corpus

    texts = [text for _, language, text in read_corpus(recipe) if language in recipe.languages]
    tokens = recipe.special_tokens
    ids = {
        "image_token_id": tokens.index(IMAGE_TOKEN),
        "language_token_ids": {code: tokens.index(f"<|{code}|>") for code in recipe.languages},
    }
    facts = {"texts": len(texts), "characters": sum(map(len, texts))}
    return Outlook(recipe.output_dir, vocab_size=recipe.vocab_size, ids=ids, facts=facts)


def _look_align(recipe: Any, arguments: TrainingArguments, before: Mapping[str, Outlook]) -> Outlook:
    from .align import load_training_studies

    found = Outlook(arguments.output_dir)
    side = M3FMImageProcessor(**recipe.processor).size
    found.size = (side["height"], side["width"])
    _find_tokenizer(recipe.tokenizer, recipe.languages, found, before)
    _check_model(recipe.model)
    check_fit(
        model=recipe.model,
        vision_model=recipe.vision_model,
        size=found.size,
        text_encoder=recipe.text_encoder,
        vocab_size=found.vocab_size,
        training={"vision_training": recipe.vision_training, "text_training": recipe.text_training},
    )
    found.config = _align_config(recipe, found)
    _check_text_positions(recipe.max_text_length, found.config.text_encoder_config)
    train, validation, _ = load_training_studies(recipe)
    languages = found.config.languages
    lengths = _counted([_longest_text(study, languages) for study in train], found, recipe.max_text_length)
    images = _num_images(train + validation)
    found.facts = {"studies": len(train), "validation_studies": len(validation), "images": images}
    found.facts["tokens_of_an_epoch"] = int(lengths.sum())
    batch = arguments.per_device_train_batch_size
    seen = [study for study in train if study.images]
    said = sum(sum(code in study.reports for code in languages) or len(languages) for study in train)
    pairs = (_share(batch, len(seen), len(train)), _share(batch, said, len(train)))
    frozen = recipe.vision_training == "frozen"
    modes = {"vision_model": recipe.vision_training, "text_encoder": recipe.text_training}
    found.steps = Steps(
        partial(build_on_meta, M3FMModel, found.config, modes, recipe.lora),
        lengths,
        partial(align_inputs, found.config, found.size, *pairs, _views(seen), frozen),
        pooled_loss,
        pairs,
        recipe.loss_rows,
    )
    if frozen:
        _add_features(found, images)
    return found


def _look_write(recipe: Any, arguments: TrainingArguments, before: Mapping[str, Outlook]) -> Outlook:
    found = _from_base(recipe.base, arguments.output_dir, before)
    _check_model(recipe.model)
    values = {**found.config.to_dict(), **recipe.model}
    if recipe.decoder:
        check_fit(model=recipe.model, decoder=recipe.decoder)
        values["text_config"] = _text_config(recipe.decoder, found).to_dict()
    found.config = M3FMConfig(**values)
    languages = found.config.languages
    bank = TextBank(load_texts(recipe), languages)
    if not bank.passages:
        raise ValueError(f"text_sets: {sorted(recipe.text_sets)} have no training text in {list(languages)}.")
    texts = [passage.text for passage in bank.passages]
    modes = {"decoder": recipe.decoder_training}
    _add_writing(found, recipe, arguments, texts, modes, ("prefix_projector",), {})
    found.facts = {"texts": len(bank.texts), "passages": len(texts)} | found.facts
    _add_embeddings(found, len(bank.texts), int(found.steps.lengths.mean()))
    return found


def _look_pairs(recipe: Any, arguments: TrainingArguments, before: Mapping[str, Outlook]) -> Outlook:
    from .pair_data import load_pairs, load_replayed

    found = _from_base(recipe.base or str(DEFAULT_CHECKPOINT), arguments.output_dir, before)
    if recipe.image_tokens is not None:
        found.config.num_image_tokens = recipe.image_tokens
    languages = recipe.languages or found.config.languages
    pairs, _ = load_pairs(recipe, languages)
    bank = load_replayed(recipe, languages)
    modes = {"decoder": recipe.decoder_training}
    trained = ["token_projector"] if found.config.num_image_tokens else []
    trained += ["prefix_projector"] if recipe.decoder_training == "full" else []
    if recipe.image_training != "frozen":
        trained += ["study_pooling", "visual_projection"]
    if recipe.trains_tower:
        modes["vision_model"] = recipe.image_training
    images = image_inputs(
        found.config, found.size, arguments.per_device_train_batch_size, _views(pairs), not recipe.trains_tower
    )
    texts = [text for study in pairs for text in study.reports.values()]
    _add_writing(found, recipe, arguments, texts, modes, trained, images)
    found.facts = {"pairs": len(pairs)} | found.facts
    if not recipe.trains_tower:
        _add_features(found, _num_images(pairs))
    if bank is not None:
        found.notes.append("texts beside the pairs count as pairs, of whose number they make an epoch longer")
        found.steps.lengths = np.resize(found.steps.lengths, round(len(pairs) / (1 - recipe.text_share)))
        _add_embeddings(found, len(bank.texts), int(found.steps.lengths.mean()))
    return found


def _look_adapt(recipe: Any, arguments: TrainingArguments, before: Mapping[str, Outlook]) -> Outlook:
    from .adapt_text import decoder_mode, gather_texts

    found = _from_base(recipe.base or str(DEFAULT_CHECKPOINT), arguments.output_dir, before)
    config = found.config
    mode = decoder_mode(recipe, config.languages)
    learned = gather_texts(recipe, config.languages, arguments.seed).learned
    texts = [group.versions[code] for group in learned for code in group.targets]
    trained = ["prefix_projector"] if mode == "full" else []
    _add_writing(found, recipe, arguments, texts, {"decoder": mode}, trained, {})
    found.facts = {"texts": len(texts)} | found.facts
    if recipe.replay_share and len(config.languages) > 1:
        found.notes.append("texts of other languages that are rehearsed count as those that are learned")
        found.steps.lengths = np.resize(found.steps.lengths, round(len(texts) / (1 - recipe.replay_share)))
    if recipe.language not in config.languages:
        found.notes.append("what a new language adds, a token and the teaching of the encoder, is not in it")
    found.prepared.append(("texts", len(texts), partial(_run_encoder, int(found.steps.lengths.mean()))))
    return found


def _look_classify(recipe: Any, arguments: TrainingArguments, before: Mapping[str, Outlook]) -> Outlook:
    from .classify import load_examples

    found = _from_base(recipe.base or str(DEFAULT_CHECKPOINT), arguments.output_dir, before)
    train, held, labels, _ = load_examples(recipe)
    found.config.classifier_features, found.config.num_labels = recipe.features, len(labels)
    found.facts = {"studies": len(train.studies), "validation_studies": len(held.studies)}
    found.notes.append("activations, computation and time of a diagnosis head are not estimated")
    trained = ["classifier"]
    modes = {}
    if recipe.features != "report" and (recipe.train_projection or recipe.train_tower):
        trained += ["study_pooling", "visual_projection"]
    if recipe.train_tower:
        modes["vision_model"] = "full"
    build = partial(build_on_meta, M3FMForImageClassification, found.config, modes, LoraBlock(), trained)
    found.steps = Steps(build, np.zeros(len(train.studies), dtype=np.int64))
    return found


_LOOKS = {
    ".tokenizer": _look_tokenizer,
    ".align": _look_align,
    ".write": _look_write,
    ".pairs": _look_pairs,
    ".adapt_text": _look_adapt,
    ".classify": _look_classify,
}


# --------------------------------------------------------------------------------------------------------------------
# What stages have in common


def _align_config(recipe: Any, found: Outlook) -> M3FMConfig:
    vision = copy.deepcopy(backbone_config(recipe.vision_model))
    if isinstance(getattr(vision, "image_size", None), int) and found.size[0] == found.size[1]:
        vision.image_size = found.size[0]  # its positions are resampled
    values = {"text_config": {"vocab_size": found.vocab_size}, **recipe.model}
    if recipe.loss == "sigmoid":
        values.setdefault("logit_bias_init_value", -10.0)
    if recipe.text_encoder:
        values["text_encoder_config"] = _text_config(recipe.text_encoder, found)
    return M3FMConfig(vision_config=vision, **found.ids, **values)


def _from_base(base: str, folder: str, before: Mapping[str, Outlook]) -> Outlook:
    """Returns the outlook of a stage that goes on from a checkpoint, which may be one that is still to be made."""
    if base in before:
        earlier = before[base]
        if earlier.config is None:
            raise ValueError(f"base: {base} is made by a stage that leaves no model.")
        return Outlook(
            folder,
            copy.deepcopy(earlier.config),
            earlier.vocab_size,
            earlier.ids,
            earlier.tokenizer,
            earlier.size,
            earlier.writes,
        )
    if not (Path(base) / "config.json").is_file():
        raise ValueError(f"base: no checkpoint in {base!r}: expected the folder of an earlier stage.")
    config = AutoConfig.from_pretrained(base)
    tokenizer, image, languages = load_tokenizer(base, config.languages)
    side = M3FMImageProcessor.from_pretrained(base).size
    ids = {"image_token_id": image, "language_token_ids": languages}
    writes = "M3FMForReportGeneration" in (config.architectures or [])
    return Outlook(folder, config, len(tokenizer), ids, tokenizer, (side["height"], side["width"]), writes)


def _add_writing(
    found: Outlook,
    recipe: Any,
    arguments: TrainingArguments,
    texts: Sequence[str],
    modes: Mapping[str, str],
    trained: Sequence[str],
    images: Mapping[str, torch.Tensor],
) -> None:
    """Adds the steps of a stage that writes these texts, once it is sure that the decoder has positions for them."""
    config = found.config
    prompt = config.num_prefix_tokens + 1 + (config.num_image_tokens if images else 0)
    most = recipe.max_text_length or config.text_config.max_position_embeddings - prompt
    lengths = _counted(texts, found, most - 1) + 1  # with the end
    check_positions(config.text_config, getattr(recipe, "decoder", "") or recipe.base, prompt, int(lengths.max()))
    found.writes = True
    found.facts["tokens_of_an_epoch"] = int(lengths.sum())
    found.steps = Steps(
        partial(build_on_meta, M3FMForReportGeneration, config, modes, recipe.lora, trained),
        lengths,
        partial(write_inputs, config, arguments.per_device_train_batch_size, images),
        written_loss,
    )


def _add_features(found: Outlook, images: int) -> None:
    """Adds the tokens of a frozen tower, computed once for each image and kept in float16."""
    width = found.config.vision_config.hidden_size
    found.prepared.append(("images", images, partial(_run_tower, found.size)))
    found.stored += images * num_tokens(found.config, found.size) * width * _HALF


def _run_tower(size: tuple[int, int], model: nn.Module) -> None:
    getattr(model, "model", model).get_vision_features(torch.zeros(1, 3, *size))


def _add_embeddings(found: Outlook, texts: int, length: int) -> None:
    """Adds the embeddings of texts by the frozen encoder, computed once for each and kept in float16."""
    found.prepared.append(("texts", texts, partial(_run_encoder, length)))
    found.stored += texts * found.config.projection_dim * _HALF


def _run_encoder(length: int, model: nn.Module) -> None:
    model.model.get_text_features(torch.zeros(1, length, dtype=torch.long))


def _check_text_positions(length: int, config: PreTrainedConfig) -> None:
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and config.model_type in _ROBERTA:
        positions -= config.pad_token_id + 1
    if positions is not None and length > positions:
        raise ValueError(
            f"max_text_length: got {length}, expected at most {positions}, the positions of the text encoder."
        )


def _longest_text(study: Study, languages: Sequence[str]) -> str:
    # A sentence made of labels is about as long as their names.
    texts = [study.reports[code] for code in languages if code in study.reports]
    return max(texts, key=lambda text: len(text.encode()), default=", ".join(study.findings or {}))


def _num_images(studies: Sequence[Study]) -> int:
    return sum({(study.source, study.study_id): len(study.images) for study in studies}.values())


def _views(studies: Sequence[Study]) -> int:
    """Returns N, the images of a study, rounded up."""
    return _share(1, sum(len(study.images) for study in studies), len(studies))


def _share(batch: int, part: int, whole: int) -> int:
    return max(1, -(-batch * part // max(1, whole)))
