# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Measure how many tokens of reports stage 2 learns in a second, beside what else trains such a decoder.

- `transformers.Trainer` on the same decoder alone, without embedding and noise: random order, batches padded to their
  longest text. Same texts, same batch size, same precision, in turn, in one process.
- The training step of the paper's released code (https://github.com/AI-in-Health/M3FM), if `--authors` names a folder
  with its checkout: its decoder, loss, clipping and optimizer, with random numbers in place of what its frozen text
  encoder gives, which is not run. Compared by reports of COV-CTR, because its tokens are words and characters.

Tokens are those that a loss is on: no padding, no prompt. Also the share of the step that is matrix multiplication,
and what padding there would be by order. Prints Markdown tables; `--output` writes JSON.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import Dataset
from transformers import AutoProcessor, DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments, set_seed

from m3fm import DEFAULT_CHECKPOINT, M3FMForReportGeneration
from m3fm.evaluation.runs import NOTICE, library_versions, write_json
from m3fm.evaluation.tables import markdown_table
from m3fm.training.collators import ReportTexts
from m3fm.training.samplers import EpochBatches, EveryStudy, LengthBucketSampler, padding_share
from m3fm.training.text_bank import TextBank, TextSets, load_texts
from m3fm.training.write import WriteCollator, WriteTrainer, WriteValidation

TEXT_SETS, PARALLEL_SETS, SMALL_SET = {"cov_ctr": 3, "openi_iu_reports": 1}, ["openi_iu_reports"], "cov_ctr"
MAX_LENGTH, WARM_UP = 160, 2
# Of the released code: its batch, its vocabulary, the longest report, the width of its text embeddings.
AUTHORS_BATCH, AUTHORS_VOCABULARY, AUTHORS_LENGTH, AUTHORS_WIDTH = 6, 464, 100, 768
MATMUL = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::linear", "mkldnn")
PARTS = {
    "matrix multiplication": MATMUL,
    "attention": ("scaled_dot_product",),
    "softmax and loss": ("log_softmax", "nll_loss"),
    "optimizer": ("_foreach", "_fused_adam", "clip_grad"),
}


class StepClock(TrainerCallback):
    """Times steps, but for the first ones."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._start = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Starts the clock behind the warm-up."""
        if state.global_step == WARM_UP:
            self._start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Reads the clock."""
        self.seconds = time.perf_counter() - self._start


class Counting:
    """Collates, and counts what a loss is on in each batch."""

    def __init__(self, collate: Callable[[Any], dict[str, Any]]):
        self.collate = collate
        self.tokens: list[int] = []
        self.reports: list[int] = []

    def set_epoch(self, epoch: int) -> None:
        """Passes the epoch on."""
        if hasattr(self.collate, "set_epoch"):
            self.collate.set_epoch(epoch)

    def __call__(self, items: Any) -> dict[str, Any]:
        """Collates."""
        batch = self.collate(items)
        self.tokens.append(int((batch["labels"] != -100).sum()))
        self.reports.append(len(batch["labels"]))
        return batch


class Rows(Dataset):
    """Serves tokenized prompts with their reports: what the peer's collator pads."""

    def __init__(self, texts: ReportTexts, bank: TextBank):
        self.rows = []
        for passage in bank.passages:
            inputs = texts.decoder_inputs([passage.text], [passage.language])
            self.rows.append({name: value[0].tolist() for name, value in inputs.items()})

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return self.rows[index]


class Bench:
    """Holds what both sides train on.

    Args:
        options: Of the command line.
        scratch: Folder for what a run leaves.
        sets: Of the texts.
    """

    def __init__(self, options: argparse.Namespace, scratch: Path, sets: TextSets):
        self.options = options
        self.scratch = scratch
        self.processor = AutoProcessor.from_pretrained(DEFAULT_CHECKPOINT)
        model = self.new_model()
        self.texts = ReportTexts(self.processor.tokenizer, model.config, max_length=MAX_LENGTH)
        self.bank = TextBank(load_texts(sets), model.config.languages)
        start = time.perf_counter()
        self.bank.embed(model.model, self.processor)
        self.embed_seconds = time.perf_counter() - start
        self.lengths = np.minimum(self.bank.lengths(self.processor) + 1, MAX_LENGTH)
        self.noise_std = model.config.text_noise_std
        self.rows = Rows(self.texts, self.bank)

    def new_model(self) -> M3FMForReportGeneration:
        """Returns the shipped model, of which the decoder is trained."""
        model = M3FMForReportGeneration.from_pretrained(DEFAULT_CHECKPOINT, dtype=torch.float32)
        model.model.requires_grad_(False)
        return model

    def arguments(self) -> TrainingArguments:
        """Returns the same arguments for both."""
        return TrainingArguments(
            output_dir=str(self.scratch / "run"),
            per_device_train_batch_size=self.options.batch,
            max_steps=self.options.steps + WARM_UP,
            bf16=self.options.precision == "bf16",
            use_cpu=not torch.accelerator.is_available(),
            learning_rate=1e-4,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
        )

    def ours(self) -> tuple[Trainer, Counting]:
        """Returns stage 2."""
        arguments = self.arguments()
        collator = Counting(WriteCollator(self.texts, self.bank, 0.5, self.noise_std))
        trainer = WriteTrainer(
            model=self.new_model(),
            args=arguments,
            train_dataset=range(len(self.bank.passages)),
            data_collator=collator,
            processing_class=self.processor,
            batches=LengthBucketSampler(self.lengths, arguments.train_batch_size),
            validation=WriteValidation([], (), None, self.processor),
        )
        return trainer, collator

    def peer(self) -> tuple[Trainer, Counting]:
        """Returns Trainer with its defaults, on the decoder alone."""
        collator = Counting(DataCollatorForSeq2Seq(self.processor.tokenizer, label_pad_token_id=-100))
        trainer = Trainer(
            model=self.new_model().decoder,
            args=self.arguments(),
            train_dataset=self.rows,
            data_collator=collator,
            processing_class=self.processor.tokenizer,
        )
        return trainer, collator


def timed(trainer: Trainer, collator: Counting) -> dict[str, float]:
    """Trains, and returns tokens and reports a second."""
    clock = StepClock()
    trainer.add_callback(clock)
    trainer.train()
    # A batch more may have been collated ahead.
    steps = slice(WARM_UP, trainer.state.global_step)
    return {
        "tokens_per_second": sum(collator.tokens[steps]) / clock.seconds,
        "reports_per_second": sum(collator.reports[steps]) / clock.seconds,
        "seconds_per_step": clock.seconds / (trainer.state.global_step - WARM_UP),
    }


def compare(bench: Bench, repeats: int) -> dict[str, Any]:
    """Measures both sides in turn, each first in every other repeat."""
    found: dict[str, list[dict[str, float]]] = {"ours": [], "Trainer": []}
    for repeat in range(repeats):
        sides = [("ours", bench.ours), ("Trainer", bench.peer)]
        for name, make in sides if repeat % 2 == 0 else reversed(sides):
            set_seed(repeat)
            found[name].append(timed(*make()))
    return compared(found, "tokens_per_second")


def compared(runs: dict[str, list[dict[str, float]]], by: str) -> dict[str, Any]:
    """Returns the runs of both sides, their medians, and the ratios of ours to the other side, repeat by repeat."""
    ours, others = runs.values()
    ratios = [one[by] / other[by] for one, other in zip(ours, others, strict=True)]
    medians = {
        name: {key: statistics.median(each[key] for each in of_side) for key in of_side[0]}
        for name, of_side in runs.items()
    }
    return {"runs": runs, "median": medians, "ratios": ratios, "ratio": statistics.median(ratios)}


def step_parts(bench: Bench) -> dict[str, float]:
    """Returns the share of the processor's time in a step of ours, by what is done."""
    trainer, _ = bench.ours()
    trainer.args.max_steps = WARM_UP + 3
    with profile(activities=[ProfilerActivity.CPU]) as found:
        trainer.train()
    events = found.key_averages()
    # What lies between operations, like reading texts, is in the steps that wrap them, and in none of the parts.
    times = {event.key: event.self_cpu_time_total for event in events}
    total = sum(seconds for key, seconds in times.items() if "aten::" in key or "Optimizer" not in key)
    shares = {
        part: sum(seconds for key, seconds in times.items() if any(word in key for word in words)) / total
        for part, words in PARTS.items()
    }
    return shares | {"all else": 1 - sum(shares.values())}


def padding(bench: Bench, batch: int) -> dict[str, float]:
    """Returns the share of positions that are padding: at random, and by length."""
    lengths = bench.lengths + 5
    return {
        "random order": padding_share(lengths, EpochBatches(EveryStudy(len(lengths)), batch).all_batches(0)),
        "by length": padding_share(lengths, LengthBucketSampler(lengths, batch).all_batches(0)),
    }


@contextmanager
def without_cuda() -> Iterator[None]:
    """Lets code run here that asks for CUDA at every turn."""
    own = nn.Module.cuda, torch.Tensor.cuda
    nn.Module.cuda = torch.Tensor.cuda = lambda self, *_: self
    try:
        yield
    finally:
        nn.Module.cuda, torch.Tensor.cuda = own


def authors_step(checkout: Path, lengths: list[int], steps: int) -> dict[str, float]:
    """Times the released training step on batches of random tokens, as long as the reports are.

    Args:
        checkout: Of the released code.
        lengths: Tokens of each report, the end included.
        steps: That are timed.
    """
    sys.path.insert(0, str(checkout))
    rng, seconds, tokens = np.random.default_rng(0), 0.0, 0
    with without_cuda():
        from modules.encoder_decoder import Transformer

        torch.manual_seed(0)
        affine, decoder = nn.Linear(AUTHORS_WIDTH, 512), Transformer()
        weights = [*affine.parameters(), *decoder.parameters()]
        optimizer = torch.optim.SGD(weights, lr=1e-3, momentum=0.99)
        criterion = nn.CrossEntropyLoss(ignore_index=0)
        for step in range(steps + 1):
            own = [min(int(length), AUTHORS_LENGTH - 1) for length in rng.choice(lengths, AUTHORS_BATCH)]
            ids = torch.zeros(AUTHORS_BATCH, max(own) + 1, dtype=torch.long)
            for row, length in enumerate(own):
                ids[row, : length + 1] = torch.from_numpy(rng.integers(4, AUTHORS_VOCABULARY, length + 1))
            start = time.perf_counter()
            shared = nn.functional.relu(affine(torch.randn(AUTHORS_BATCH, AUTHORS_WIDTH)))
            output = decoder(shared, ids[:, :-1])
            loss = criterion(output, ids[:, 1:].reshape(-1))
            loss.item()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_value_(weights, 0.1)
            optimizer.step()
            if step:  # the first one warms up
                seconds, tokens = seconds + time.perf_counter() - start, tokens + sum(own)
    sys.path.remove(str(checkout))
    return {
        "tokens_per_second": tokens / seconds,
        "reports_per_second": steps * AUTHORS_BATCH / seconds,
        "seconds_per_step": seconds / steps,
    }


def compare_authors(checkout: Path, options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Measures reports of COV-CTR a second, ours and theirs in turn."""
    bench = Bench(options, scratch, TextSets(str(options.data), {SMALL_SET: 1}))
    passages = bench.bank.passages
    lengths = [len(each.text.split()) if each.language == "en" else len(each.text) for each in passages]
    runs: dict[str, list[dict[str, float]]] = {"ours": [], "released code": []}
    for _ in range(options.repeats):
        runs["ours"].append(timed(*bench.ours()))
        runs["released code"].append(authors_step(checkout, [length + 1 for length in lengths], options.steps))
    return compared(runs, "reports_per_second")


def tables(results: dict[str, Any]) -> str:
    """Renders all results."""
    blocks = []
    for name, unit in (("trainer", "tokens_per_second"), ("authors", "reports_per_second")):
        found = results.get(name)
        if found:
            rows = [
                [side, *(f"{median[key]:,.1f}" for key in (unit, "seconds_per_step"))]
                for side, median in found["median"].items()
            ]
            span = f"{min(found['ratios']):.2f} to {max(found['ratios']):.2f}"
            rows.append([f"ratio {found['ratio']:.2f} ({span})", "", ""])
            blocks.append(markdown_table([["", unit.replace("_per_second", "/s"), "s a step"], *rows]))
    parts = [[name, f"{share:.0%}"] for name, share in results["parts"].items()]
    blocks.append(markdown_table([["of a step", "share of processor time"], *parts]))
    shares = [[name, f"{share:.1%}"] for name, share in results["padding"].items()]
    blocks.append(markdown_table([["order", "padding"], *shares]))
    return "\n\n".join(blocks)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=10, help="that are timed, of each side and repeat")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--authors", type=Path, help="checkout of the paper's released code")
    parser.add_argument("--output", type=Path, default=Path("model_cards/results/write_speed.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(options, Path(name), TextSets(str(options.data), TEXT_SETS, PARALLEL_SETS))
        results = {
            "trainer": compare(bench, options.repeats),
            "parts": step_parts(bench),
            "padding": padding(bench, options.batch),
            "embedding_once_seconds": bench.embed_seconds,
            "texts": len(bench.bank.texts),
        }
        if options.authors:
            results["authors"] = compare_authors(options.authors, options, Path(name))
    table = tables(results)
    print(table)
    facts = {name: getattr(options, name) for name in ("batch", "steps", "repeats", "precision", "threads")}
    machine = {"cpus": os.cpu_count(), "load_at_start": round(load, 2), "libraries": library_versions()}
    write_json(options.output, {"notice": NOTICE, "table": table, **facts, "machine": machine, "results": results})


if __name__ == "__main__":
    main()
