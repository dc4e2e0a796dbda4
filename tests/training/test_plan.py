# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Plans: held against the models that are built, and against what training holds."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import TrainingArguments

from m3fm import M3FMModel
from m3fm.training import align, write
from m3fm.training.align import build_model
from m3fm.training.outlook import Outlook, look_ahead
from m3fm.training.plan import count_parameters, count_steps, format_plans, moments, plan_training
from m3fm.training.recipe import KINDS, plan_recipe, read_recipe, run_recipe
from m3fm.training.rehearsal import Steps, build_on_meta, pooled_loss, rehearse
from m3fm.training.towers import LoraBlock

pytest.importorskip("accelerate")


@pytest.fixture
def trainers(monkeypatch) -> list:
    """Returns the trainers of runs, once they have trained."""
    kept = []
    for module in (align, write):
        finish = module.finish_run
        keep = lambda trainer, *rest, finish=finish: kept.append(trainer) or finish(trainer, *rest)  # noqa: E731
        monkeypatch.setattr(module, "finish_run", keep)
    return kept


def held_bytes(trainer) -> dict[str, int]:
    """Returns what training holds of weights, gradients and the optimizer's moments."""
    weights = list(trainer.model.parameters())
    moments_ = [state[name] for state in trainer.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    return {
        "weights": sum(weight.nbytes for weight in weights),
        "gradients": sum(weight.nbytes for weight in weights if weight.requires_grad),
        "optimizer": sum(value.nbytes for value in moments_),
    }


def test_plans_say_what_training_holds(write_recipe, trainers, tmp_path):
    """Of two stages: what the first leaves is known to the second, though nothing has been made yet."""
    length = {"max_steps": -1, "num_train_epochs": 1.5, "gradient_accumulation_steps": 2, "eval_strategy": "no"}
    recipes = [
        write_recipe("align", **length, per_device_train_batch_size=2),
        write_recipe("write", max_steps=2, eval_strategy="no"),
    ]
    stages = {kind: {"extends": str(recipe)} for kind, recipe in zip(("align", "write"), recipes, strict=True)}
    path = tmp_path / "stages.yaml"
    path.write_text(json.dumps({"recipe": "stages", "output_dir": str(tmp_path / "out"), "stages": stages}))
    plans = plan_recipe(path, rate=1e12)
    assert not (tmp_path / "out").exists(), "nothing is started"
    facts = [run_recipe(recipe) for recipe in recipes]

    assert [plan.stage for plan in plans] == ["align", "write"]
    for plan, trainer, fact in zip(plans, trainers, facts, strict=True):
        assert plan.parameters == count_parameters(trainer.model)
        assert {name: plan.memory[name] for name in ("weights", "gradients", "optimizer")} == held_bytes(trainer)
        assert plan.steps["steps"] == fact["steps"]
        assert plan.data["tokens_of_an_epoch"] == pytest.approx(int(trainer.batches.lengths.sum()), rel=0.1)
        assert plan.seconds == pytest.approx(sum(plan.flops.values()) / 0.4e12) and plan.notes == []
    assert plans[0].steps["batch"] == facts[0]["contrastive_batch"] == 4
    assert plans[0].data["studies"] == len(trainers[0].train_dataset)
    assert plans[1].data["passages"] == len(trainers[1].train_dataset)
    features = sum(file.stat().st_size for file in Path(trainers[0].recipe.feature_cache).glob("*.f16"))
    assert plans[0].disk["cache"] == features == plans[0].data["images"] * 5 * 32 * 2

    read = json.loads(format_plans(plans, "json"))
    assert read[0]["memory"]["all"] == sum(plans[0].memory.values())
    assert read[1]["parameters"]["all"]["trained"] == plans[1].total[1] > 0
    text = format_plans(plans)
    assert "align: into" in text and "all stages: about" in text and "activations of a micro-batch" in text
    with pytest.raises(ValueError, match="align: Expected at least 200 samples, a micro-batch of 2 for each of 100"):
        plan_recipe(path, ranks=100, rate=1e12)


@pytest.mark.parametrize(
    "values",
    [
        {"vision_training": "full", "loss": "sigmoid"},
        {"vision_training": "lora", "lora": {"r": 2, "layers": "all"}},
    ],
)
def test_parameters_are_those_of_the_model_that_is_built(values, write_recipe):
    kind, settings = read_recipe(write_recipe("align", **values))
    parsed = kind.parse(settings)
    found = look_ahead(kind, parsed, {})
    model, _ = build_model(parsed[0])
    assert count_parameters(found.steps.build()) == count_parameters(model)
    assert found.config.vision_config.image_size == model.config.vision_config.image_size


def test_a_rehearsal_keeps_what_a_step_keeps(tiny_config):
    """The same bytes as autograd keeps on real tensors, with and without autocast."""
    modes = {"vision_model": "last_1", "text_encoder": "full"}
    model = M3FMModel(tiny_config)
    for bf16 in (False, True):
        twin = build_on_meta(M3FMModel, tiny_config, modes, LoraBlock())
        for (name, weight), planned in zip(model.named_parameters(), twin.parameters(), strict=True):
            assert weight.shape == planned.shape, name
            weight.requires_grad_(planned.requires_grad)

        def batch():
            return {"input_ids": torch.zeros(3, 7, dtype=torch.long), "pixel_values": torch.zeros(2, 1, 3, 28, 28)}

        cost = rehearse(twin, batch, pooled_loss, bf16)
        inputs, kept = batch(), {}
        known = {value.data_ptr() for value in (*model.parameters(), *model.buffers(), *inputs.values())}

        def keep(value, known=known, kept=kept):
            if value.untyped_storage().data_ptr() not in known:
                kept[value.untyped_storage()._cdata] = (value.untyped_storage().nbytes(), value)
            return value

        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value)
        with hooks, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            pooled_loss(model.train(), inputs)
        assert cost.activations == sum(size for size, _ in kept.values())
        assert cost.passing == 2 * max(size for size, _ in kept.values())
        assert cost.inputs == sum(value.nbytes for value in inputs.values())
        # A blocks' weights are multiplied once a token forward, and those that are trained twice backward.
        assert 1.5 < cost.flops / cost.forward_flops < 3


def test_steps_are_counted_as_trainer_counts_them(tmp_path):
    arguments = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=4, gradient_accumulation_steps=3, num_train_epochs=2, use_cpu=True
    )
    assert count_steps(100, arguments, ranks=2) == {
        "ranks": 2,
        "micro_batch": 4,
        "batch": 24,
        "steps_of_an_epoch": 5,  # 13 micro-batches of each rank
        "steps": 10,
        "samples": 240,
    }
    assert [moments(name) for name in ("adamw_torch_fused", "sgd", "adafactor", "adamw_8bit")] == [2, 0, 0.1, 0.5]


def test_ranks_hold_gradients_twice_and_share_what_fsdp_parts(tmp_path):
    steps = Steps(lambda: torch.nn.Linear(9, 10), np.full(100, 5))
    values = {"per_device_train_batch_size": 2, "use_cpu": True}
    plan = plan_training("x", Outlook("out", steps=steps), TrainingArguments(str(tmp_path), **values), 4, 1e12)
    assert plan.memory == {"weights": 400, "gradients": 400, "optimizer": 800, "gradients on their way": 400}
    assert plan.notes == ["under FSDP weights, gradients and optimizer take 400 B of each of 4 ranks"]
    assert plan.disk == {"checkpoints": 1200, "model": 400}


def test_backbones_that_are_not_here_are_planned_by_their_sizes(made_up_data, tmp_path):
    values = {
        "data_root": str(made_up_data),
        "output_dir": str(tmp_path / "out"),
        "image_sets": {"reported": 1},
        "vision_model": "microsoft/rad-dino",
        "text_encoder": "FacebookAI/xlm-roberta-base",
        "tokenizer": "FacebookAI/xlm-roberta-base",
        "processor": {"size": 224},
        "per_device_train_batch_size": 2,
    }
    kind = KINDS["align"]
    found = look_ahead(kind, kind.parse(values), {})
    assert found.missing == ["microsoft/rad-dino", "FacebookAI/xlm-roberta-base"]
    assert found.vocab_size == found.config.text_encoder_config.vocab_size == 250_005
    counts = count_parameters(found.steps.build())
    assert counts["vision_model"][0] == pytest.approx(86e6, rel=0.02)
    assert counts["text_encoder"][0] == pytest.approx(278e6, rel=0.01)
    assert any("shipped" in note or "ships" in note for note in found.notes)


def test_what_is_not_estimated_is_said(made_up_data, tmp_path, tiny_checkpoint):
    values = {"base": str(tiny_checkpoint), "validation_set": "reported", "data_root": str(made_up_data)}
    kind = KINDS["sweep"]
    parsed = kind.parse(values | {"output_dir": str(tmp_path / "out")})
    found = look_ahead(kind, parsed, {})
    assert found.config.projection_dim == 16 and found.writes
    plan = plan_training("sweep", found, parsed[1])
    assert plan.notes == ["what it computes is not estimated"] and not plan.flops
    assert "not estimated" in format_plans([plan])
