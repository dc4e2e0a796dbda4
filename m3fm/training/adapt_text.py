# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Stage 3 from text alone: a checkpoint takes over a site's way of writing, or a further language, without an image.

The decoder learns to write the site's reports from their noisy embeddings, as in stage 2, and the support memory that
images go through is made of them: so reports of images are written as the site writes. A language that the checkpoint
lacks gets a token, a memory and, from parallel text, an encoder that reads it. What the checkpoint wrote in its other
languages is rehearsed meanwhile, on texts that it writes itself of its own memory (see `replay`), and measured before
and after.
"""

import logging
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoProcessor, TrainingArguments, set_seed

from .. import DEFAULT_CHECKPOINT
from ..adapters import save_adapter
from ..configuration_m3fm import M3FMConfig
from ..modeling_m3fm import M3FMForReportGeneration
from ..processing_m3fm import M3FMProcessor
from .adapt_scores import AdaptValidation, image_validations, scores_table
from .collators import ReportTexts
from .languages import check_code
from .new_language import ENCODER_FOLDER, TeachBlock, add_language, check_teaching, free_token, teach_encoder
from .ranks import is_main, wait_for_all
from .replay import ReplayDraws, replay_texts
from .runs import RunOptions, finish_run, train_or_resume
from .samplers import LengthBucketSampler
from .site_texts import SiteTexts, read_parallel_groups, read_site_texts, site_groups, split_groups
from .text_bank import TextBank, TextGroup
from .towers import LoraBlock, has_lora, merge_lora, set_training
from .write import WriteCollator, WriteTrainer, keep_input_check

logger = logging.getLogger(__name__)


@dataclass
class AdaptTextRecipe:
    """What an adaptation is made of.

    Args:
        texts: Reports of the site, see `site_texts.read_site_texts`; may be left out where `parallel` is given.
        language: Of the texts: one that the base writes, or a new one.
        parallel: Table of the same texts in `language` and in one that the base writes.
        base: Checkpoint that writes reports; empty: the one that ships.
        column: Of `texts`, where they are a table.
        layout: Of a .txt: "lines", "paragraphs" or "auto".
        keep_earlier: Whether sentences about earlier examinations, or with de-identification masks, are learned.
        held_out: Share of the distinct texts that is kept from training, to measure by.
        max_text_length: Tokens of a report, its end included; longer ones are cut at the last sentence that fits.
            None: as many as the decoder has positions for and the checkpoint writes at most.
        decoder_training: "lora" or "full"; None: "lora", and "full" for a new language.
        lora: See `LoraBlock`.
        teaching: See `TeachBlock`; of a new language with parallel text.
        cross_lingual: Share that is written from the other language of parallel text.
        memory_share: Share of the support memory of `language` that is made of the site's texts; the rest stays.
        replay_share: Share of an epoch that rehearses the other languages; 0: none.
        replay_texts: By language, a file of texts to be rehearsed, instead of those that the base writes itself.
        data_root: Folder of `validation_set`.
        validation_set: Set whose validation images are written and scored before and after.
        feature_cache: Folder for the tokens of the frozen image tower.
    """

    texts: str = ""
    language: str = "en"
    parallel: str = ""
    base: str = ""
    column: str = ""
    layout: str = "auto"
    keep_earlier: bool = False
    held_out: float = 0.1
    max_text_length: int | None = None
    decoder_training: str | None = None
    lora: LoraBlock = field(default_factory=LoraBlock)
    teaching: TeachBlock = field(default_factory=TeachBlock)
    cross_lingual: float = 0.5
    memory_share: float = 1.0
    replay_share: float = 0.3
    replay_texts: dict[str, str] = field(default_factory=dict)
    data_root: str = "../shared/data"
    validation_set: str = ""
    feature_cache: str = "runs/features"

    def __post_init__(self) -> None:
        check_code(self.language)
        if not self.texts and not self.parallel:
            raise ValueError(
                "texts: expected a file of reports (`--texts reports.txt`), or parallel text, got neither."
            )
        if self.decoder_training not in (None, "full", "lora"):
            raise ValueError(f"decoder_training: got {self.decoder_training!r}, expected 'full' or 'lora'.")
        for name in ("cross_lingual", "memory_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected a share of 0 to 1.")
        for name in ("held_out", "replay_share"):
            if not 0 <= getattr(self, name) < 0.9:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected a share of 0 to 0.9.")


@dataclass(frozen=True)
class _Material:
    """Holds the texts of an adaptation: learned, and held out."""

    learned: list[TextGroup]
    held_out: list[TextGroup]
    found: SiteTexts

    @property
    def has_parallel(self) -> bool:
        return any(len(group.versions) > 1 for group in self.learned)

    def facts(self) -> dict[str, Any]:
        """Returns how many texts there are."""
        return {
            "texts": dict(self.found.counts),
            "learned_texts": len(self.learned),
            "held_out_texts": len(self.held_out),
        }


def run(recipe: AdaptTextRecipe, arguments: TrainingArguments, options: RunOptions | None = None) -> dict[str, Any]:
    """Adapts a checkpoint, resumes where an interrupted run stopped, and saves it with what changed.

    Raises:
        ValueError: If texts, language and base do not fit, or the output folder holds another run.
    """
    set_seed(arguments.seed)
    arguments.remove_unused_columns = False
    base, config = _base(recipe)
    is_new = recipe.language not in config.languages
    mode = decoder_mode(recipe, config.languages)
    material = gather_texts(recipe, config.languages, arguments.seed)
    processor = AutoProcessor.from_pretrained(base)
    model = M3FMForReportGeneration.from_pretrained(base, dtype=torch.float32).to(arguments.device)
    _check_model(recipe, model, processor, material)
    limit_text(model, processor)
    others = [code for code in config.languages if code != recipe.language]
    rehearsed, watched = replay_texts(model, processor, others, recipe.replay_texts)
    length = text_length(recipe, model)
    images = image_validations(recipe, model, processor, length)
    if is_new:
        processor = add_language(model, processor, recipe.language)
    texts = ReportTexts(processor.tokenizer, model.config, max_length=length)
    validation = AdaptValidation(recipe.language, texts, processor, [*material.held_out, *watched], images)
    before = validation.all_scores(model)
    if is_new and material.has_parallel:
        _teach(recipe, model, processor, material, rehearsed, arguments, options)
    bank = TextBank([*material.learned, *rehearsed], model.config.languages)
    bank.embed(model.model, processor)
    adapt_memory(model, bank, recipe, is_new, arguments.seed)
    counts = bank.lengths(processor) + 1
    draws = ReplayDraws(len(bank.passages) - len(rehearsed), len(rehearsed), recipe.replay_share)
    freeze(model, mode, recipe.lora)
    # What was learned is to be written in full.
    model.generation_config.max_new_tokens = max(length, model.generation_config.max_new_tokens or 0)
    batch_size, seed, world_size = arguments.train_batch_size, arguments.seed, arguments.world_size
    trainer = WriteTrainer(
        model=model,
        args=arguments,
        train_dataset=range(len(bank.passages)),
        eval_dataset=range(0),
        data_collator=WriteCollator(texts, bank, recipe.cross_lingual, model.config.text_noise_std, seed),
        processing_class=processor,
        batches=LengthBucketSampler(np.minimum(counts, length), batch_size, seed, world_size=world_size, draws=draws),
        validation=validation,
        options=options,
    )
    train_or_resume(trainer, recipe)
    facts = {
        "stage": "adapt-text",
        "supervision": "text alone",
        "is_new_language": is_new,
        **material.facts(),
        "cut_texts": int((counts > length).sum()),
        "rehearsed": {code: sum(code in group.targets for group in rehearsed) for code in others},
        "rehearsed_in_an_epoch": draws.count,
        "scores": {"before": before, "after": validation.all_scores(model)},
    }
    return _finish(trainer, recipe, base, facts)


def freeze(model: M3FMForReportGeneration, mode: str, lora: LoraBlock) -> None:
    """Sets what is trained: the decoder, and in mode "full" how it reads an embedding; by LoRA the adapter alone."""
    model.requires_grad_(False)
    model.prefix_projector.requires_grad_(mode == "full")
    set_training(model.decoder, mode, lora, "decoder_training")


def _finish(trainer: WriteTrainer, recipe: AdaptTextRecipe, base: str, facts: dict[str, Any]) -> dict[str, Any]:
    """Saves the model, LoRA by itself and merged, and prints what changed."""
    folder = Path(trainer.args.output_dir)
    model = trainer.accelerator.unwrap_model(trainer.model)
    if has_lora(model) and is_main():
        save_adapter(model, folder / "adapter")
    merge_lora(model)
    facts = finish_run(trainer, recipe, facts)
    keep_input_check(base, str(folder))
    if is_main():
        shutil.rmtree(folder / ENCODER_FOLDER, ignore_errors=True)
        sys.stdout.write(f"{scores_table(**facts['scores'])}\n")
    wait_for_all()
    return facts


# --------------------------------------------------------------------------------------------------------------------
# Base and texts


def _base(recipe: AdaptTextRecipe) -> tuple[str, M3FMConfig]:
    base = recipe.base or str(DEFAULT_CHECKPOINT)
    if not (Path(base) / "config.json").is_file():
        raise ValueError(f"base: {base} is no checkpoint: expected a folder with config.json and weights.")
    config = AutoConfig.from_pretrained(base)
    if "M3FMForReportGeneration" not in (config.architectures or []):
        raise ValueError(f"base: {base} writes no reports: expected a checkpoint of stage 2.")
    return base, config


def decoder_mode(recipe: AdaptTextRecipe, known: Sequence[str]) -> str:
    """Returns how the decoder is trained.

    Raises:
        ValueError: For a new language by LoRA.
    """
    is_new = recipe.language not in known
    if is_new and recipe.decoder_training == "lora":
        raise ValueError(
            "decoder_training: 'lora' trains no token embeddings, of which a new language needs its own: expected "
            f"'full' for {recipe.language!r}, which is none of {list(known)}."
        )
    return recipe.decoder_training or ("full" if is_new else "lora")


def gather_texts(recipe: AdaptTextRecipe, known: Sequence[str], seed: int) -> _Material:
    """Reads the texts of a recipe, tells what was found, and holds some out.

    Raises:
        ValueError: If they cannot be used; see `site_texts`.
    """
    found = SiteTexts()
    if recipe.texts:
        found = read_site_texts(recipe.texts, recipe.language, recipe.column, recipe.layout, recipe.keep_earlier)
    groups = site_groups(found.texts, recipe.language)
    parallel = read_parallel_groups(recipe.parallel, recipe.language, known) if recipe.parallel else []
    learned, held_out = split_groups([*parallel, *groups], recipe.language, recipe.held_out, seed)
    if is_main():
        parts = [found.summary(), f"{len(parallel)} rows of parallel text" if parallel else ""]
        parts.append(f"{len(held_out)} distinct texts are held out")
        sys.stderr.write(f"{recipe.texts or recipe.parallel}: {'; '.join(filter(None, parts))}\n")
        if recipe.language not in known and not parallel:
            logger.warning(
                "%r is new and there is no parallel text: the text encoder is not taught the language, so that what "
                "its embeddings tell of a text is little, and reports of images rest on what the decoder learned by "
                "heart. Give `parallel`, a table with the columns %s and %s.",
                recipe.language,
                known[0],
                recipe.language,
            )
    return _Material(learned, held_out, found)


def text_length(recipe: AdaptTextRecipe, model: M3FMForReportGeneration) -> int:
    """Returns how many tokens a report may have, its end included."""
    positions = getattr(model.config.text_config, "max_position_embeddings", None)
    prompt = model.config.num_image_tokens + model.config.num_prefix_tokens + 1
    limits = [model.generation_config.max_new_tokens, None if positions is None else positions - prompt]
    if recipe.max_text_length is not None:
        limits = [*limits[1:], recipe.max_text_length]
    return min(limit for limit in limits if limit is not None)


def limit_text(model: M3FMForReportGeneration, processor: M3FMProcessor) -> None:
    """Lets the processor cut texts where the text encoder has no further positions."""
    longest = model.model.max_text_tokens
    if longest is not None:
        processor.tokenizer.model_max_length = min(longest, processor.tokenizer.model_max_length)


def _check_model(
    recipe: AdaptTextRecipe, model: M3FMForReportGeneration, processor: M3FMProcessor, material: _Material
) -> None:
    """Refuses what the base cannot give, before anything is computed."""
    positions = getattr(model.config.text_config, "max_position_embeddings", None)
    prompt = model.config.num_image_tokens + model.config.num_prefix_tokens + 1
    longest = recipe.max_text_length
    if longest is not None and (longest < 2 or (positions is not None and longest + prompt > positions)):
        at_most = "" if positions is None else f" to {positions - prompt}, the decoder's positions without the prompt"
        raise ValueError(f"max_text_length: got {longest}, expected 2{at_most}.")
    others = [code for code in model.config.languages if code != recipe.language]
    unknown = sorted(set(recipe.replay_texts) - set(others))
    if unknown:
        raise ValueError(f"replay_texts: got {unknown}, expected some of {others}, the base's other languages.")
    if recipe.language not in model.config.languages:
        if material.has_parallel:
            check_teaching(model, recipe.teaching)
        if free_token(processor) is None:
            logger.warning("The tokenizer keeps no token for a further language: the vocabulary grows by one.")


# --------------------------------------------------------------------------------------------------------------------
# A new language, and the memory


def _teach(
    recipe: AdaptTextRecipe,
    model: M3FMForReportGeneration,
    processor: M3FMProcessor,
    material: _Material,
    rehearsed: Sequence[TextGroup],
    arguments: TrainingArguments,
    options: RunOptions | None,
) -> None:
    """Teaches the encoder the new language by what parallel text there is."""
    pairs = [group for group in material.learned if len(group.versions) > 1]
    old = [TextGroup(group.source, _known_versions(group, recipe.language), ()) for group in [*pairs, *rehearsed]]
    bank = TextBank(old, ())
    bank.embed(model.model, processor)
    rows = {text: row for row, text in enumerate(bank.texts)}
    targets = dict(rows)
    for group in pairs:
        targets[group.versions[recipe.language]] = rows[next(iter(_known_versions(group, recipe.language).values()))]
    texts = list(targets)
    teach_encoder(
        model,
        processor,
        texts,
        bank.embeds[list(targets.values())],
        recipe.teaching,
        recipe.lora,
        recipe,
        arguments,
        options,
    )


def _known_versions(group: TextGroup, language: str) -> Mapping[str, str]:
    return {code: text for code, text in group.versions.items() if code != language}


def adapt_memory(
    model: M3FMForReportGeneration, bank: TextBank, recipe: AdaptTextRecipe, is_new: bool, seed: int
) -> None:
    """Makes the support memory of the recipe's language of its texts; those of other languages stay.

    A text that the site often writes is often in it: the memory says how likely a report is before an image is seen.
    Of a new language's parallel text it is the version that the encoder has known from the start. Where there are
    fewer texts than entries, all are taken several times.

    Args:
        model: Its memory is changed in place.
        bank: Embedded texts.
        recipe: Of the run.
        is_new: Whether the base does not write the language.
        seed: Of the draws.
    """
    place = model.config.languages.index(recipe.language)
    size = model.support_memory.shape[1]
    share = 1.0 if is_new else recipe.memory_share
    count = round(share * size)
    if not count:
        return
    passages = [passage for passage in bank.passages if passage.language == recipe.language]
    rows = [(passage.other_rows or (passage.own_row,))[0] if is_new else passage.own_row for passage in passages]
    rng = np.random.default_rng(seed)
    drawn = rng.permutation(rows)
    entries = torch.from_numpy(drawn[np.arange(count) % len(drawn)])
    kept = torch.from_numpy(rng.permutation(size)[: size - count])
    memory = model.support_memory.clone()
    fresh = torch.nn.functional.normalize(bank.embeds[entries].float(), dim=-1).to(memory)
    memory[place] = torch.cat([fresh, model.support_memory[place][kept]])
    model.set_support_memory(memory)
