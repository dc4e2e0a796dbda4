# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Recipes: found by name, read strictly, overridden from the command line; runs: resumed, and kept apart."""

import json
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import pytest
from transformers import HfArgumentParser, TrainingArguments

from m3fm.training import align, write
from m3fm.training import recipe as recipes
from m3fm.training.align import AlignRecipe
from m3fm.training.recipe import KINDS, RECIPES, find_recipe, run_recipe
from m3fm.training.runs import latest_checkpoint, plot_curves, train_or_resume

pytest.importorskip("accelerate")


@pytest.fixture
def seen(monkeypatch) -> list[tuple]:
    """Returns the recipes and arguments that a run was started with, without running it."""
    calls = []
    for module in (align, write):
        monkeypatch.setattr(module, "run", lambda *parsed: calls.append(parsed) or {})
    return calls


def recipe_file(tmp_path, text: str):
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_recipe_is_found_by_path_and_by_name(tmp_path):
    own = recipe_file(tmp_path, "recipe: align")
    assert find_recipe(str(own)) == own
    assert find_recipe("align-small") == find_recipe("align-small.yaml") == RECIPES / "align-small.yaml"
    with pytest.raises(ValueError, match="No recipe 'algin-small'.*align-small.*tokenizer"):
        find_recipe("algin-small")


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_that_ship_are_valid(path, monkeypatch):
    parsed = []

    class Module:
        def __getattr__(self, name):
            return getattr(self.real, name)

    real_import = recipes.import_module

    def spy(name, package):
        module = Module()
        module.real = real_import(name, package)
        module.run = lambda *values: parsed.append(values) or {}
        return module

    monkeypatch.setattr(recipes, "import_module", spy)
    run_recipe(path)
    assert type(parsed[0][0]).__name__ in {kind.dataclass for kind in KINDS.values()}


def test_values_and_overrides_reach_the_run(tmp_path, seen):
    path = recipe_file(
        tmp_path,
        f"recipe: align\noutput_dir: {tmp_path}\nimage_sets: {{cov_ctr: 3}}\nlearning_rate: 1e-4\nseed: 3\n",
    )
    run_recipe(
        path,
        ["--seed", "7", "--image_sets", "{a: 2, b: 1}", "--exclude", "[x]", "--eval_strategy", "no"]
        + ["--learning_rate", "5e-5", "--freeze_vision", "false", "--data_root", "elsewhere"],
    )
    recipe, arguments = seen[0]
    assert (recipe.image_sets, recipe.exclude, recipe.freeze_vision) == ({"a": 2, "b": 1}, ["x"], False)
    assert recipe.data_root == "elsewhere"
    assert isinstance(arguments, TrainingArguments)
    assert (arguments.seed, arguments.learning_rate, arguments.eval_strategy) == (7, 5e-5, "no")
    assert arguments.report_to == [], "nothing is sent anywhere"
    run_recipe(path)
    assert seen[1][0].image_sets == {"cov_ctr": 3}
    assert (seen[1][1].seed, seen[1][1].learning_rate) == (3, 1e-4)


def test_bf16_is_not_refused_without_an_accelerator(tmp_path, seen):
    run_recipe(recipe_file(tmp_path, f"recipe: write\noutput_dir: {tmp_path}\nbf16: true\n"))
    assert seen[0][1].bf16


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("recipe: align\nimage_set: {a: 1}\n", "image_set"),
        ("recipe: write\nfreeze_vision: true\n", "freeze_vision"),
        ("recipe: tokenizer\nlearning_rate: 1.0\n", "learning_rate"),
        (
            "recipe: report\n",
            r"expected `recipe:` to be one of \['align', 'classify', 'tokenizer', 'write'\], got 'report'",
        ),
        ("image_sets: {}\n", "to be one of.*got None"),
        ("- recipe\n", "to be one of"),
        ("", "to be one of"),
        ("recipe: [align", "is not YAML"),
    ],
)
def test_wrong_recipes_are_refused(text, message, tmp_path, seen):
    path = recipe_file(tmp_path, text)
    with pytest.raises(ValueError, match=message) as error:
        run_recipe(path)
    assert "recipe.yaml" in str(error.value)
    assert not seen


@pytest.mark.parametrize("overrides", [["--seed"], ["seed", "3"], ["--seed", "3", "more"]])
def test_overrides_are_pairs(overrides, tmp_path):
    with pytest.raises(ValueError, match="`--name value` pairs"):
        run_recipe(recipe_file(tmp_path, "recipe: align\n"), overrides)


def test_an_unknown_override_is_refused(tmp_path, seen):
    with pytest.raises(ValueError, match="learning_rat"):
        run_recipe(recipe_file(tmp_path, "recipe: align\n"), ["--learning_rat", "1"])


@pytest.mark.parametrize("stage", [align, write])
@pytest.mark.parametrize(("processes", "gpus"), [(2, 1), (1, 2)])
def test_a_run_on_several_devices_is_refused(stage, processes, gpus):
    with pytest.raises(ValueError, match=f"one process on one device, got {processes} on {gpus} GPUs"):
        stage.run(None, SimpleNamespace(world_size=processes, n_gpu=gpus))


# --- resuming --------------------------------------------------------------------------------------------------------


@dataclass
class RecordedTrainer:
    """Notes what it was to go on from, and trains nothing."""

    args: TrainingArguments
    started_from: list[str | None] = field(default_factory=list)

    def train(self, resume_from_checkpoint: str | None) -> None:
        self.started_from.append(resume_from_checkpoint)


def started_from(folder, recipe=None, **arguments) -> str | None:
    """Returns the checkpoint that a run into `folder` goes on from."""
    trainer = RecordedTrainer(TrainingArguments(output_dir=str(folder), use_cpu=True, **arguments))
    train_or_resume(trainer, recipe or AlignRecipe())
    (checkpoint,) = trainer.started_from
    return checkpoint


def save_checkpoint(folder, step: int) -> str:
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text("{}", encoding="utf-8")
    return str(checkpoint)


def finish(folder, **lengths) -> None:
    values = {"num_train_epochs": 3.0, "max_steps": -1, **lengths}
    (folder / "run.json").write_text(json.dumps({"arguments": values}), encoding="utf-8")


def test_the_last_checkpoint_is_the_one_with_most_steps(tmp_path):
    assert latest_checkpoint(tmp_path / "none") is None
    assert latest_checkpoint(tmp_path) is None
    for step in (90, 1000, 200):
        save_checkpoint(tmp_path, step)
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-1000"


def test_a_checkpoint_that_was_cut_off_is_passed_by(tmp_path):
    (tmp_path / "checkpoint-9").mkdir()
    (tmp_path / "checkpoint-9" / "model.safetensors").write_bytes(b"half of")
    assert latest_checkpoint(tmp_path) is None
    whole = save_checkpoint(tmp_path, 6)
    assert str(latest_checkpoint(tmp_path)) == whole


def test_a_run_starts_from_nothing_and_goes_on_from_its_last_checkpoint(tmp_path):
    folder = tmp_path / "new" / "run"
    recipe = AlignRecipe(image_sets={"a": 2}, label_share=0.5)
    assert started_from(folder, recipe, seed=3, learning_rate=1e-4) is None
    settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    assert settings["image_sets"] == {"a": 2} and settings["label_share"] == 0.5
    assert (settings["seed"], settings["learning_rate"]) == (3, 1e-4)
    last = save_checkpoint(folder, 20)
    same = {"seed": 3, "learning_rate": 1e-4}
    assert started_from(folder, recipe, **same) == last
    assert started_from(folder, recipe, **same, save_steps=7, logging_steps=1, num_train_epochs=9) == last


@pytest.mark.parametrize(
    ("recipe", "arguments", "named"),
    [
        ({"label_share": 0.5}, {}, "label_share"),
        ({"image_sets": {"a": 2}}, {}, "image_sets"),
        ({"model": {"projection_dim": 8}}, {"seed": 7}, "model, seed"),
        ({}, {"learning_rate": 1e-3, "per_device_train_batch_size": 2}, "learning_rate, per_device_train_batch_size"),
        ({}, {"weight_decay": 0.1, "max_grad_norm": 2.0, "bf16": True}, "bf16, max_grad_norm, weight_decay"),
    ],
)
def test_the_folder_of_another_run_is_refused(recipe, arguments, named, tmp_path):
    started_from(tmp_path)
    save_checkpoint(tmp_path, 20)
    before = (tmp_path / "settings.json").read_bytes()
    with pytest.raises(ValueError, match=f"holds a run with another {named}: expected another output_dir"):
        started_from(tmp_path, replace(AlignRecipe(), **recipe), **arguments)
    assert (tmp_path / "settings.json").read_bytes() == before


def test_a_finished_run_is_refused_unless_it_is_to_be_longer(tmp_path):
    started_from(tmp_path)
    last = save_checkpoint(tmp_path, 20)
    finish(tmp_path)
    with pytest.raises(ValueError, match="holds this run, finished: expected another output_dir, or a longer run"):
        started_from(tmp_path)
    assert started_from(tmp_path, num_train_epochs=5) == last
    finish(tmp_path, max_steps=20)
    with pytest.raises(ValueError, match="finished"):
        started_from(tmp_path, max_steps=20)
    assert started_from(tmp_path, max_steps=30) == last


# --- what a run leaves -----------------------------------------------------------------------------------------------


def test_curves_are_drawn_of_whatever_was_logged(tmp_path):
    pytest.importorskip("matplotlib")
    history = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0, "eval_auroc": 0.5}, {"step": 2, "eval_auroc": 0.7}]
    for number, entries in enumerate(([], history)):
        plot_curves(entries, tmp_path / f"{number}.png")
        assert (tmp_path / f"{number}.png").stat().st_size > 5000


def test_recipe_dataclasses_are_documented():
    """`HfArgumentParser` takes what the dataclass declares: a field that its docstring leaves out cannot be found."""
    for recipe_class in (align.AlignRecipe, write.WriteRecipe):
        declared = {action.dest for action in HfArgumentParser(recipe_class)._actions} - {"help", "no_freeze_vision"}
        described = {line.strip().partition(":")[0] for line in recipe_class.__doc__.splitlines() if ": " in line}
        assert declared <= described, json.dumps(sorted(declared - described))
