# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Score reports by BERTScore (Zhang et al., ICLR 2020), with any encoder of a local folder; nothing is downloaded.

Each token of a report is matched with the most similar one of the other report, by cosine of the encoder's features:
precision is the mean over the prediction's tokens, recall over the reference's. As in the `bert_score` package, the
first and last special tokens may be matched but do not count, tokens weigh the same (no idf), and the number is not
rescaled. Scores of two encoders, or of two layers, cannot be compared.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import AutoModel, AutoTokenizer, GPT2Tokenizer, RobertaTokenizer

from .resampling import SumMeasurement, mean_measurement

NAMES = ("bertscore_precision", "bertscore_recall", "bertscore_f1")

# Features of this many tokens are kept for texts that come again: 300 MB with 768 features.
_KEPT_TOKENS = 100_000
_PAIRS_AT_ONCE = 256


class BertScorer:
    """Computes BERTScore.

    Args:
        model_dir: Folder of a Hugging Face encoder (or encoder-decoder, whose encoder is taken) in safetensors, with
            its tokenizer.
        layer: Whose output is compared, 1 for the first; the last one by default. Zhang et al. list, for common
            encoders, the layer that agrees best with human judgement of translations.
        batch_size: Texts encoded at once.
        device: Where the encoder runs.

    Raises:
        ValueError: If the folder holds no encoder, or it has no such layer.
    """

    def __init__(
        self, model_dir: str | Path, layer: int | None = None, batch_size: int = 32, device: str = "cpu"
    ) -> None:
        if not Path(model_dir, "config.json").is_file():
            raise ValueError(f"Expected the folder of a Hugging Face encoder, got {model_dir}: no config.json there.")
        if batch_size < 1:
            raise ValueError(f"Expected batch_size >= 1, got {batch_size}.")
        self.model_dir = str(model_dir)
        self.batch_size = batch_size
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(self.model_dir, local_files_only=True)
            model = AutoModel.from_pretrained(
                self.model_dir, local_files_only=True, use_safetensors=True, dtype=torch.float32
            )
        except OSError as error:
            raise ValueError(f"Expected a tokenizer and model.safetensors in {model_dir}: {error}") from error
        model = model.get_encoder() if model.config.is_encoder_decoder else model
        self.model = model.eval().requires_grad_(False).to(device)
        self.layer = layer
        depth = model.config.num_hidden_layers
        if layer is not None and not 1 <= layer <= depth:
            raise ValueError(f"Expected a layer from 1 to {depth}, got {layer}.")
        ends = (self.tokenizer.cls_token_id, self.tokenizer.sep_token_id)
        self._unweighted = torch.tensor([token for token in ends if token is not None])
        self._kept: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def measure(self, predictions: Sequence[str], references: Sequence[str]) -> SumMeasurement:
        """Returns the mean precision, recall and F1 of N reports against one reference each."""
        scores = self.score(predictions, references)
        return mean_measurement({name: scores[:, column] for column, name in enumerate(NAMES)})

    def score(self, predictions: Sequence[str], references: Sequence[str]) -> np.ndarray:
        """Computes precision, recall and F1 of each report, (N, 3) in -1..1; 0 where a report is empty.

        A report longer than the encoder takes is cut off at its end.

        Raises:
            ValueError: If there is not one reference a prediction.
        """
        if len(predictions) != len(references):
            raise ValueError(f"Expected a reference a prediction, got {len(predictions)} and {len(references)}.")
        pairs = [(ours.strip(), theirs.strip()) for ours, theirs in zip(predictions, references, strict=True)]
        # Sorted, so that a text that comes again is still kept.
        distinct = sorted(set(pairs))
        scores: dict[tuple[str, str], list[float]] = {}
        with tqdm(total=len(distinct), desc="BERTScore", unit="report", leave=False) as bar:
            for start in range(0, len(distinct), _PAIRS_AT_ONCE):
                chunk = distinct[start : start + _PAIRS_AT_ONCE]
                self._embed(text for pair in chunk for text in pair)
                scores |= {pair: _match(self._kept[pair[0]], self._kept[pair[1]]) for pair in chunk}
                self._forget()
                bar.update(len(chunk))
        return np.array([scores[pair] for pair in pairs], dtype=np.float64).reshape(-1, len(NAMES))

    @torch.inference_mode()
    def _embed(self, texts: Iterator[str]) -> None:
        """Encodes texts that are not kept: unit features (T, D) and weights (T,) of each."""
        missing = [text for text in dict.fromkeys(texts) if text not in self._kept]
        ids = [self._encode(text) for text in missing]
        order = sorted(range(len(missing)), key=lambda row: len(ids[row]))
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            tokens = [torch.tensor(ids[row]) for row in rows]
            mask = pad_sequence([torch.ones_like(each) for each in tokens], batch_first=True)
            padded = pad_sequence(tokens, batch_first=True, padding_value=self.tokenizer.pad_token_id or 0)
            output = self.model(
                input_ids=padded.to(self.model.device),
                attention_mask=mask.to(self.model.device),
                output_hidden_states=self.layer is not None,
            )
            hidden = output.last_hidden_state if self.layer is None else output.hidden_states[self.layer]
            features = torch.nn.functional.normalize(hidden.float(), dim=-1)  # (B, T, D)
            for row, each, vectors in zip(rows, tokens, features, strict=True):
                weights = ~torch.isin(each, self._unweighted)
                self._kept[missing[row]] = (vectors[: len(each)].clone(), weights.to(vectors))

    def _encode(self, text: str) -> list[int]:
        """Turns a text into token ids.

        Byte-level BPE, which marks a word by the space before it, reads the first word like any other. `bert_score`
        does so too, but with transformers 5 its wish for that space goes unheard.
        """
        if text and isinstance(self.tokenizer, GPT2Tokenizer | RobertaTokenizer):
            text = f" {text}"
        return self.tokenizer(text, truncation=True, max_length=self._max_length())["input_ids"]

    def _max_length(self) -> int:
        """Returns how many tokens the encoder takes; a tokenizer's own limit is missing from many folders."""
        positions = getattr(self.model.config, "max_position_embeddings", None) or self.tokenizer.model_max_length
        # RoBERTa and its kin count positions from behind the padding token's.
        if self.model.config.model_type in {"roberta", "xlm-roberta", "camembert", "xlm-roberta-xl"}:
            positions -= self.model.config.pad_token_id + 1
        return min(positions, self.tokenizer.model_max_length)

    def _forget(self) -> None:
        """Drops the features kept longest, so that memory does not grow with the number of reports."""
        tokens = sum(len(weights) for _, weights in self._kept.values())
        while tokens > _KEPT_TOKENS:
            tokens -= len(self._kept.pop(next(iter(self._kept)))[1])


def _match(predicted: tuple[torch.Tensor, torch.Tensor], wanted: tuple[torch.Tensor, torch.Tensor]) -> list[float]:
    """Matches two reports' tokens greedily; returns precision, recall and F1."""
    (ours, our_weights), (theirs, their_weights) = predicted, wanted
    if not our_weights.any() or not their_weights.any():
        return [0.0, 0.0, 0.0]
    similar = ours @ theirs.T
    precision = float(similar.amax(dim=1) @ our_weights / our_weights.sum())
    recall = float(similar.amax(dim=0) @ their_weights / their_weights.sum())
    total = precision + recall
    return [precision, recall, 2 * precision * recall / total if total else 0.0]
