# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Measure what the shipped decoder still knows when it gets the vocabulary of another tokenizer.

Tokenizers of three kinds (byte-level as Qwen's, marked spaces as XLM-RoBERTa's, WordPiece as BERT's) are trained on
training reports. The decoder writes validation reports from their own embeddings; the score is the negative
log-likelihood by character (nats), which does not hang on how a tokenizer parts a text: with its own vocabulary; with
the carried one and with random embeddings, at once and after the same few steps of training. Prints a markdown table;
`--output` writes JSON.
"""

import argparse
import copy
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoProcessor, PreTrainedTokenizerFast

from m3fm import DEFAULT_CHECKPOINT, M3FMForReportGeneration
from m3fm.data import finding_table, load_studies
from m3fm.data.studies import training_part
from m3fm.evaluation.runs import NOTICE, library_versions, write_json
from m3fm.evaluation.tables import markdown_table
from m3fm.training.backbones import load_tokenizer
from m3fm.training.collators import ReportTexts
from m3fm.training.vocabulary import Transfer, transfer_vocabulary

REPORT_SET = "cov_ctr"
LANGUAGES = ("en", "zh")


def byte_level(texts: Sequence[str], size: int) -> PreTrainedTokenizerFast:
    """Train a tokenizer of Qwen's kind."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=special[0], eos_token=special[1])


def marked_spaces(texts: Sequence[str], size: int) -> PreTrainedTokenizerFast:
    """Train a tokenizer of XLM-RoBERTa's kind."""
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=size, special_tokens=special, unk_token="<unk>", show_progress=False, max_piece_length=12
    )
    backend.train_from_iterator(texts, trainer)
    names = ("bos_token", "pad_token", "eos_token", "unk_token")
    return PreTrainedTokenizerFast(tokenizer_object=backend, **dict(zip(names, special, strict=True)))


def word_piece(texts: Sequence[str], size: int) -> PreTrainedTokenizerFast:
    """Train a tokenizer of BERT's kind."""
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=False)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    backend.train_from_iterator(
        texts, trainers.WordPieceTrainer(vocab_size=size, special_tokens=special, show_progress=False)
    )
    names = ("pad_token", "unk_token", "cls_token", "sep_token")
    return PreTrainedTokenizerFast(tokenizer_object=backend, **dict(zip(names, special, strict=True)))


KINDS: dict[str, Callable[[Sequence[str], int], PreTrainedTokenizerFast]] = {
    "byte-level (Qwen's kind)": byte_level,
    "marked spaces (XLM-RoBERTa's)": marked_spaces,
    "WordPiece (BERT's)": word_piece,
}
Rows = list[tuple[str, str, torch.Tensor]]


def load_reports(root: Path, model: M3FMForReportGeneration, processor: Any, limit: int) -> tuple[Rows, Rows]:
    """Return training and validation reports as (language, text, embedding by the model's own tokenizer)."""
    studies = load_studies(root / REPORT_SET)
    parts = (training_part(studies), [study for study in studies if study.split == "validation"])
    rows: list[Rows] = []
    for part, most in zip(parts, (None, limit), strict=True):
        texts = [(code, study.reports[code]) for study in part[:most] for code in LANGUAGES if code in study.reports]
        embeds = []
        for start in range(0, len(texts), 32):
            chunk = [text for _, text in texts[start : start + 32]]
            tokens = processor.tokenizer(chunk, padding=True, truncation=True, max_length=256, return_tensors="pt")
            with torch.inference_mode():
                embeds.append(model.model.get_text_features(tokens["input_ids"], tokens["attention_mask"]))
        rows.append([(*pair, embed) for pair, embed in zip(texts, torch.cat(embeds).clone(), strict=True)])
    return rows[0], rows[1]


def batch_loss(model: M3FMForReportGeneration, texts: ReportTexts, rows: Rows) -> tuple[torch.Tensor, int]:
    """Return the mean loss of the tokens of a batch, and how many there are."""
    inputs = texts.decoder_inputs([text for _, text, _ in rows], [code for code, _, _ in rows])
    embeds = torch.stack([embed for _, _, embed in rows])
    return model(**inputs, shared_embeds=embeds).loss, int((inputs["labels"] >= 0).sum())


@torch.inference_mode()
def nats_by_character(model: M3FMForReportGeneration, tokenizer: Any, rows: Rows) -> float:
    """Return the negative log-likelihood of the reports by character of their text."""
    model.eval()
    texts = ReportTexts(tokenizer, model.config, max_length=512)
    total = 0.0
    for start in range(0, len(rows), 16):
        loss, tokens = batch_loss(model, texts, rows[start : start + 16])
        total += loss.item() * tokens
    return total / sum(len(text) for _, text, _ in rows)


def train(model: M3FMForReportGeneration, tokenizer: Any, rows: Rows, steps: int, rate: float) -> None:
    """Train the decoder's token embeddings and blocks for a few steps, the same reports in each call."""
    model.train()
    model.model.requires_grad_(False)
    texts = ReportTexts(tokenizer, model.config, max_length=256)
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=rate)
    order = torch.Generator().manual_seed(0)
    for _ in range(steps):
        chosen = torch.randperm(len(rows), generator=order)[:16].tolist()
        loss, _ = batch_loss(model, texts, [rows[place] for place in chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def with_vocabulary(
    model: M3FMForReportGeneration, own: Any, tokenizer: Any, image: int, languages: dict[str, int]
) -> tuple[M3FMForReportGeneration, Transfer, float]:
    """Return a copy of the model with another vocabulary, what became of the pieces, and the seconds it took."""
    model = copy.deepcopy(model)
    start = time.perf_counter()
    done = transfer_vocabulary(model.decoder, own, tokenizer)
    seconds = time.perf_counter() - start
    model.config.text_config = model.decoder.config
    model.config.image_token_id, model.config.language_token_ids = image, languages
    return model, done, seconds


def randomized(model: M3FMForReportGeneration) -> M3FMForReportGeneration:
    """Return a copy of the model whose token embeddings are drawn, with the spread of those that it had."""
    model = copy.deepcopy(model)
    table = model.decoder.get_input_embeddings().weight
    with torch.no_grad():
        table.copy_(torch.randn(table.shape, generator=torch.Generator().manual_seed(0)) * table.std())
    return model


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measure all kinds."""
    model = M3FMForReportGeneration.from_pretrained(options.checkpoint)
    processor = AutoProcessor.from_pretrained(options.checkpoint)
    training, validation = load_reports(options.data, model, processor, options.studies)
    own_score = nats_by_character(model, processor.tokenizer, validation)
    table = finding_table().values()
    # So that they know the characters of all findings, as load_tokenizer asks.
    texts = [
        text for each in table for side in (each.present, each.absent) for code in LANGUAGES for text in side[code]
    ]
    texts += [text for _, text, _ in training]
    results = []
    for kind, make in KINDS.items():
        with tempfile.TemporaryDirectory() as folder:
            make(texts, options.vocab_size).save_pretrained(folder)
            tokenizer, image, languages = load_tokenizer(folder, LANGUAGES)
        carried, done, seconds = with_vocabulary(model, processor.tokenizer, tokenizer, image, languages)
        random = randomized(carried)
        row: dict[str, Any] = {
            "tokenizer": kind,
            "pieces": len(tokenizer),
            "copied": done.copied,
            "averaged": done.averaged,
            "fresh": done.fresh,
            "seconds": round(seconds, 2),
        }
        for name, each in (("carried", carried), ("random", random)):
            row[f"{name}, at once"] = round(nats_by_character(each, tokenizer, validation), 3)
            train(each, tokenizer, training, options.steps, options.learning_rate)
            row[f"{name}, trained"] = round(nats_by_character(each, tokenizer, validation), 3)
        results.append(row)
        print(row, flush=True)
    return {"own": round(own_score, 3), "reports": len(validation), "rows": results}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--checkpoint", type=Path, default=DEFAULT_CHECKPOINT)
    parser.add_argument("--studies", type=int, default=24, help="validation studies that are scored, at most")
    parser.add_argument("--vocab_size", type=int, default=3000)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--output", type=Path, default=Path("model_cards/results/vocabulary_transfer.json"))
    options = parser.parse_args()
    torch.manual_seed(0)
    load = os.getloadavg()[0]
    measured = measure(options)
    columns = ["tokenizer", "pieces", "copied", "averaged", "fresh", "carried, at once", "random, at once"]
    columns += ["carried, trained", "random, trained"]
    table = markdown_table([columns, *([str(row[column]) for column in columns] for row in measured["rows"])])
    print(f"own vocabulary: {measured['own']} nats a character\n{table}")
    machine = {"cpus": os.cpu_count(), "load_at_start": round(load, 2), "libraries": library_versions()}
    facts = {name: getattr(options, name) for name in ("studies", "vocab_size", "steps", "learning_rate")}
    what = f"nats by character of validation reports of {REPORT_SET}"
    write_json(
        options.output, {"notice": NOTICE, "what": what, "table": table, **facts, "machine": machine, **measured}
    )


if __name__ == "__main__":
    main()
