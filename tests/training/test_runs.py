# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Recipes: found by name, read strictly, overridden from the command line."""

import json

import pytest
from transformers import HfArgumentParser, TrainingArguments

from m3fm.training import align, runs, write
from m3fm.training.runs import KINDS, RECIPES, find_recipe, latest_checkpoint, plot_curves, run_recipe

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

    real_import = runs.import_module

    def spy(name, package):
        module = Module()
        module.real = real_import(name, package)
        module.run = lambda *values: parsed.append(values) or {}
        return module

    monkeypatch.setattr(runs, "import_module", spy)
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
        ("recipe: report\n", r"expected `recipe:` to be one of \['align', 'tokenizer', 'write'\], got 'report'"),
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


def test_the_last_checkpoint_is_the_one_with_most_steps(tmp_path):
    assert latest_checkpoint(str(tmp_path / "none")) is None
    assert latest_checkpoint(str(tmp_path)) is None
    for step in (90, 1000, 200):
        (tmp_path / f"checkpoint-{step}").mkdir()
    assert latest_checkpoint(str(tmp_path)).endswith("checkpoint-1000")


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
