# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""What a run leaves: its record, which the model card reads, and its curves."""

import json
import math
import sys
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from m3fm.hub.card import fill_tables
from m3fm.training.curves import plot_curves, score_kinds, smoothed
from m3fm.training.record import FORMAT, read_record
from m3fm.training.runs import RunOptions, finish_run, train_or_resume
from tests.training.small_runs import small_trainer

pytest.importorskip("accelerate")

PAGE = "before\n<!-- table: training -->\n<!-- end -->\nafter\n"


@dataclass
class Recipe:
    """Of a run."""

    text_sets: dict[str, int] = field(default_factory=lambda: {"made_up": 2})
    exclude: list[str] = field(default_factory=lambda: ["study-7", "study-8"])


class Processor:
    """Stands in for a processor, of which a run takes the tokenizer."""

    def __init__(self):
        backend = SimpleNamespace(no_truncation=lambda: None, no_padding=lambda: None)
        self.tokenizer = SimpleNamespace(backend_tokenizer=backend)

    def save_pretrained(self, folder):
        pass


def test_a_run_leaves_what_its_card_says(tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("tensorboard")
    trainer = small_trainer(
        tmp_path,
        RunOptions(early_stopping_patience=9),
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
        metric_for_best_model="bleu_4_en",
        load_best_model_at_end=True,
        report_to="tensorboard",
    )
    trainer.processing_class = Processor()
    train_or_resume(trainer, Recipe())
    record = finish_run(trainer, Recipe(), {"stage": "write", "texts": 10})
    text = (tmp_path / "training.json").read_text(encoding="utf-8")
    assert json.loads(text) == record == read_record(tmp_path)
    assert (record["format"], record["stage"], record["texts"], record["steps"]) == (FORMAT, "write", 10, 8)
    assert (record["samples_seen"], record["tokens_seen"]) == (16, 96)
    assert record["parameters"]["trained"] == record["parameters"]["total"] > 1000
    assert record["recipe"] == {"text_sets": {"made_up": 2}, "exclude": 2} and "study-7" not in text
    assert record["best"]["metric"] == "bleu_4_en" and record["best"]["is_the_model"]
    assert record["validation"]["eval_bleu_4_en"] == record["best"]["value"]
    assert record["options"] == {"early_stopping_patience": 9, "nan_guard": "stop"}
    assert record["run_seconds"] >= record["step_seconds"] > 0
    history = json.loads((tmp_path / "history.json").read_text(encoding="utf-8"))
    assert all("samples_per_second" in entry for entry in history if "loss" in entry)
    assert Image.open(tmp_path / "curves.png").width == 1100
    assert not (tmp_path / "training_args.bin").exists()

    page = fill_tables(PAGE, tmp_path)
    for line in (
        "| stage | write |",
        "| sets | made_up |",
        "| data | 10 texts |",
        "| steps | 8 (1.6 epochs) |",
        "| batch | 2 (2 x 1 micro-batches x 1 ranks) |",
        "| seen | 16 samples, 96 tokens |",
        f"| best bleu_4_en | {record['best']['value']:.3f} at step {record['best']['step']} (the model) |",
    ):
        assert line in page, line

    (events,) = (tmp_path / "runs").rglob("events.*")
    seen = events.read_bytes()
    assert b"eval/bleu_4_en" in seen and b"train/loss" in seen
    assert b"made_up" not in seen and b"study-7" not in seen


def test_records_are_read_strictly_and_earlier_ones_too(tmp_path):
    assert read_record(tmp_path) is None
    (tmp_path / "run.json").write_text('{"recipe": {"base": "a"}}', encoding="utf-8")
    assert read_record(tmp_path)["recipe"]["base"] == "a"
    for text, message in (
        ("{", "training.json is damaged"),
        ("[]", "is no record of a training"),
        ('{"recipe": {}, "format": 99}', "has format 99, expected at most 1: update m3fm"),
    ):
        (tmp_path / "training.json").write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            read_record(tmp_path)


# --- what is refused before the first step ---------------------------------------------------------------------------


def test_a_score_that_the_validation_does_not_give_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"got 'bleu_4', expected a score of this run: one of \['bleu_4_en', 'drawn'\]"
    ):
        small_trainer(tmp_path, eval_strategy="steps", metric_for_best_model="bleu_4")
    trainer = small_trainer(tmp_path, eval_strategy="steps", metric_for_best_model="eval_bleu_4_en")
    assert trainer.args.greater_is_better
    with pytest.raises(ValueError, match="early_stopping_patience: expected metric_for_best_model and eval_strategy"):
        small_trainer(tmp_path, RunOptions(early_stopping_patience=2))


@pytest.mark.parametrize("package", ["tensorboard", "trackio"])
def test_a_missing_reporter_is_refused(package, tmp_path, monkeypatch):
    for name in (package, "tensorboardX"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=f"report_to: {package} is not installed: pip install {package}"):
        small_trainer(tmp_path, report_to=package)


# --- curves ----------------------------------------------------------------------------------------------------------


def test_scores_are_sorted_by_kind():
    names = [
        "eval_bleu_4_en",
        "eval_r10_image_zh",
        "eval_r1_en_zh",
        "eval_auroc",
        "eval_auroc_a",
        "loss",
        "eval_bleu_4_zh",
    ]
    assert score_kinds(names) == {
        "auroc": ["eval_auroc", "eval_auroc_a"],
        "bleu": ["eval_bleu_4_en", "eval_bleu_4_zh"],
        "r": ["eval_r10_image_zh", "eval_r1_en_zh"],
    }


def test_a_smoothed_curve_has_no_bias_and_a_half_life():
    assert smoothed(np.full(50, 3.0), 4) == pytest.approx(np.full(50, 3.0))
    values = np.zeros(201)
    values[100] = 1.0
    means = smoothed(values, 5)
    assert means[105] == pytest.approx(means[95]) == pytest.approx(means[100] / 2)
    assert means.sum() == pytest.approx(1.0, rel=1e-4)


def test_curves_are_drawn_of_whatever_was_logged(tmp_path):
    pytest.importorskip("matplotlib")
    history = [
        {"step": 1, "loss": 2.0},
        {"step": 2, "loss": 1.0, "eval_auroc": 0.5},
        {"step": 2, "eval_auroc": math.nan},
    ]
    for number, entries in enumerate(([], history)):
        plot_curves(entries, tmp_path / f"{number}.png", best_step=2)
        assert (tmp_path / f"{number}.png").stat().st_size > 5000
