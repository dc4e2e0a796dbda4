# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Stage-1 models, made-up studies and trainers, for the benchmarks of training steps."""

import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed
from torch.multiprocessing import spawn
from torch.utils.data import Dataset
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from m3fm import M3FMConfig, M3FMModel
from m3fm.data import FINDINGS
from m3fm.training.align import AlignRecipe, AlignTrainer
from m3fm.training.objective import BatchFacts
from m3fm.training.ranks import world_size
from m3fm.training.samplers import EpochBatches, EveryStudy
from m3fm.training.scaling import attention_flops, dense_flops
from m3fm.training.towers import set_training

VOCABULARY = 8000
# facebook/dinov2-small, at the positions of 224 pixels.
VIT_SMALL = {
    "model_type": "dinov2",
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "patch_size": 14,
}
TINY = {"model_type": "dinov2", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 14}
VISION_TOWERS = {"vit-small": VIT_SMALL, "vit-base": VIT_SMALL | {"hidden_size": 768, "num_attention_heads": 12}}


def build_model(
    vision: dict[str, Any], size: int, text_width: int, text_layers: int, width: int = 512, loss: str = "infonce"
) -> M3FMModel:
    """Builds two towers with random weights, the same in every process.

    Args:
        vision: Configuration of the image tower.
        size: Pixels of a side.
        text_width: Width of the text tower.
        text_layers: Its blocks.
        width: D of the shared space.
        loss: "sigmoid" gives the logits a bias.
    """
    heads = max(1, text_width // 64)
    text = {"hidden_size": text_width, "num_hidden_layers": text_layers, "num_attention_heads": heads}
    text |= {"vocab_size": VOCABULARY, "intermediate_size": 4 * text_width, "pad_token_id": 0}
    config = M3FMConfig(
        vision_config={**vision, "image_size": size},
        text_encoder_config={"model_type": "bert", "max_position_embeddings": 512, **text},
        text_config={"model_type": "llama", "num_key_value_heads": heads, **text},
        projection_dim=width,
        projection_dropout=0.0,
        logit_bias_init_value=-10.0 if loss == "sigmoid" else None,
    )
    for tower in (config.vision_config, config.text_encoder_config):
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            if hasattr(tower, name):
                setattr(tower, name, 0.0)
    torch.manual_seed(0)
    model = M3FMModel(config)
    for tower in (model.vision_model, model.text_encoder):
        set_training(tower, "full")
    return model


def tower_flops(model: M3FMModel, size: int, tokens: int, languages: int = 1) -> float:
    """Returns the floating point operations that the towers need for a study, there and back, without a second pass.

    Args:
        model: Its towers.
        size: Pixels of a side of the study's image.
        tokens: Of each text.
        languages: Texts of the study.
    """
    patches = (size // model.config.vision_config.patch_size) ** 2 + 1
    forward = 0.0
    for tower, count, length in ((model.vision_model, 1, patches), (model.text_encoder, languages, tokens)):
        weights = sum(each.numel() for name, each in tower.named_parameters() if "embeddings" not in name)
        layers, width = tower.config.num_hidden_layers, tower.config.hidden_size
        forward += count * (dense_flops(weights, length) + attention_flops(layers, length, width))
    return 3 * forward


def pair_facts(studies: int, languages: int = 1, first: int = 0) -> BatchFacts:
    """Returns what is known of studies that all have an image and a report in every language, no two alike.

    Args:
        studies: S.
        languages: Texts of a study.
        first: Number of the first study among those of all ranks, by which texts are told apart.
    """
    rows = torch.arange(studies)
    return BatchFacts(
        modality=torch.zeros(studies, dtype=torch.long),
        has_report=torch.ones(studies, dtype=torch.bool),
        values=torch.zeros(studies, len(FINDINGS)),
        known=torch.zeros(studies, len(FINDINGS), dtype=torch.bool),
        image_study=rows,
        text_study=rows.repeat_interleave(languages),
        text_number=(first + rows)[:, None].mul(languages).add(torch.arange(languages)).flatten(),
        text_language=torch.arange(languages).repeat(studies),
    )


class MadeUpStudies(Dataset):
    """Random images and texts, a few of which serve for all studies.

    Args:
        count: Studies.
        size: Pixels of a side.
        tokens: Of each text.
        kept: Different images and texts.
    """

    def __init__(self, count: int, size: int, tokens: int, kept: int = 64):
        draw = torch.Generator().manual_seed(0)
        self.count = count
        self.pixels = torch.randn(kept, 3, size, size, generator=draw)
        self.ids = torch.randint(16, VOCABULARY, (kept, tokens), generator=draw)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        return index

    def collate(self, numbers: Sequence[int]) -> dict[str, Any]:
        """Returns a batch as `AlignCollator` does."""
        rows = torch.as_tensor(numbers) % len(self.pixels)
        facts = pair_facts(len(rows))
        facts.text_number.copy_(torch.as_tensor(numbers))
        ids = self.ids[rows]
        return {
            "facts": facts,
            "study_ids": [f"made_up/{number}" for number in numbers],
            "pixel_values": self.pixels[rows],
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
        }


class NoScores:
    """Stands where a run has its validation."""

    def score(self, model: Any) -> dict[str, float]:
        """Returns nothing."""
        return {}


class StepTimes(TrainerCallback):
    """Notes when steps end; times are those from one end to the next, but for the first step, which warms up."""

    def __init__(self):
        self.ends: list[float] = []
        self.cpu_ends: list[float] = []

    @property
    def seconds(self) -> list[float]:
        """How long each step took."""
        return np.diff(self.ends).tolist()

    @property
    def cpu_seconds(self) -> list[float]:
        """How long each step kept the cores of this process busy: other processes change it less."""
        return np.diff(self.cpu_ends).tolist()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Notes the time."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())
        self.cpu_ends.append(time.process_time())


def make_trainer(
    model: M3FMModel,
    studies: MadeUpStudies,
    folder: Path,
    micro_batch: int,
    micro_batches: int,
    steps: int,
    callbacks: Sequence[TrainerCallback] = (),
    device: str = "cpu",
    precision: str = "bfloat16",
    **recipe: Any,
) -> AlignTrainer:
    """Returns the trainer of stage 1 for some steps on made-up studies.

    Args:
        model: What is trained, in full.
        studies: What on.
        folder: For files of the trainer; nothing is saved.
        micro_batch: Studies of one rank that go through the towers at once.
        micro_batches: Of a step.
        steps: To be taken.
        callbacks: Of `Trainer`.
        device: "cpu" or "cuda".
        precision: Of autocast; "float32" for none.
        recipe: Values of `AlignRecipe`.
    """
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=micro_batches,
        max_steps=steps,
        learning_rate=1e-4,
        weight_decay=0.05,
        max_grad_norm=1.0,
        optim="adamw_torch",
        bf16=precision == "bfloat16",
        use_cpu=device == "cpu",
        ddp_find_unused_parameters=False,
        ddp_backend="gloo" if device == "cpu" and world_size() > 1 else None,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=device != "cpu",
    )
    trainer = AlignTrainer(
        model=model,
        args=arguments,
        train_dataset=studies,
        data_collator=studies.collate,
        batches=EpochBatches(EveryStudy(len(studies)), micro_batch, world_size=world_size()),
        validation=NoScores(),
        recipe=AlignRecipe(vision_training="full", **recipe),
        callbacks=list(callbacks),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def launch(function: Callable[..., Any], ranks: int, *arguments: Any, communicate: str = "gloo") -> Any:
    """Calls a function in processes of one thread; returns what it gives on the first.

    Args:
        function: Of a module, so that each process finds it.
        ranks: Processes.
        arguments: Of the function.
        communicate: "gloo", or "apart": each is a run of its own.
    """
    with tempfile.TemporaryDirectory() as folder:
        spawn(_as_rank, (ranks, folder, communicate, function, arguments), nprocs=ranks)
        return json.loads((Path(folder) / "result.json").read_text(encoding="utf-8"))


def _as_rank(
    rank: int, ranks: int, folder: str, communicate: str, function: Callable[..., Any], arguments: Sequence[Any]
) -> None:
    torch.set_num_threads(1)
    together = ranks > 1 and communicate != "apart"
    if together:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        distributed.init_process_group(communicate, f"file://{folder}/store", rank=rank, world_size=ranks)
    result = function(*arguments)
    if rank == 0:
        (Path(folder) / "result.json").write_text(json.dumps(result), encoding="utf-8")
    if together:
        distributed.barrier()
        distributed.destroy_process_group()
