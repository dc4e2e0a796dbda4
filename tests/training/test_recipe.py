# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Recipes: found by name, merged, replaced from the command line, and read strictly."""

from dataclasses import dataclass, field, fields
from typing import Any

import pytest
from transformers import TrainingArguments

from m3fm.training import align, write
from m3fm.training.recipe import KINDS, RECIPES, find_recipe, read_recipe, run_recipe
from m3fm.training.runs import RunOptions
from m3fm.training.settings import checked_block, read_yaml

pytest.importorskip("accelerate")

# What a recipe that ships leaves to whoever runs it.
LEFT_OPEN = {"adapt-text": ["--texts", "reports.txt"]}


@pytest.fixture
def seen(monkeypatch) -> list[tuple]:
    """Returns the recipes, arguments and options that a run was started with, without running it."""
    calls = []
    for module in (align, write):
        monkeypatch.setattr(module, "run", lambda *parsed: calls.append(parsed) or {})
    return calls


def recipe_file(tmp_path, text: str, name: str = "recipe"):
    path = tmp_path / f"{name}.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_recipe_is_found_by_path_and_by_name(tmp_path):
    own = recipe_file(tmp_path, "recipe: align")
    assert find_recipe(str(own)) == own
    assert find_recipe("recipe", tmp_path) == own
    assert find_recipe("align-small") == find_recipe("align-small.yaml") == RECIPES / "align-small.yaml"
    with pytest.raises(ValueError, match=r"No recipe 'algin-small' \(did you mean align-small\?\).*tokenizer"):
        find_recipe("algin-small")


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_that_ship_are_valid(path):
    first_line = path.read_text(encoding="utf-8").splitlines()[0]
    assert first_line.startswith("# ") and len(first_line) < 160, "m3fm train --list shows it"
    kind, values = read_recipe(path, LEFT_OPEN.get(path.stem, []))
    if kind is KINDS["stages"]:
        assert kind.load().read_stages(values)
    else:
        assert type(kind.parse(values)[0]).__name__ == kind.dataclass


def test_values_and_overrides_reach_the_run(tmp_path, seen):
    for name in ("cov_ctr", "a", "b"):
        (tmp_path / name).mkdir()
    path = recipe_file(
        tmp_path,
        f"recipe: align\noutput_dir: {tmp_path}\ndata_root: {tmp_path}\nimage_sets: {{cov_ctr: 3}}\n"
        "learning_rate: 1e-4\nseed: 3\nmodel: {projection_dim: 8, text_config: {hidden_size: 4}}\n",
    )
    run_recipe(
        path,
        ["--seed", "7", "--image_sets", "{a: 2, b: 1}", "--exclude", "0012", "--eval_strategy", "no"]
        + ["--learning_rate", "5e-5", "--vision_training", "last_2", "--run_name", "2024", "--nan_guard", "skip"]
        + ["--model.text_config.hidden_size", "16", "--lora.r", "4", "--balance", "source"],
    )
    recipe, arguments, options = seen[0]
    assert (recipe.image_sets, recipe.vision_training) == ({"a": 2, "b": 1}, "last_2")
    assert recipe.exclude == ["0012"], "no octal number, and a single value is a list of one"
    assert recipe.model == {"projection_dim": 8, "text_config": {"hidden_size": 16}}
    assert (recipe.lora.r, recipe.balance) == (4, ["source"])
    assert isinstance(arguments, TrainingArguments)
    assert (arguments.seed, arguments.learning_rate, arguments.eval_strategy) == (7, 5e-5, "no")
    assert arguments.run_name == "2024", "a setting that takes text takes any"
    assert arguments.report_to == [], "nothing is sent anywhere"
    assert options == RunOptions(nan_guard="skip")
    run_recipe(path)
    assert seen[1][0].image_sets == {"cov_ctr": 3}
    assert (seen[1][1].seed, seen[1][1].learning_rate) == (3, 1e-4)


def test_bf16_is_not_refused_without_an_accelerator(tmp_path, seen):
    run_recipe(recipe_file(tmp_path, f"recipe: write\noutput_dir: {tmp_path}\nbf16: true\n"))
    assert seen[0][1].bf16


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("recipe: align\nimage_set: {a: 1}\n", r"unknown setting image_set \(did you mean image_sets\?\)"),
        ("recipe: align\nlearning_rat: 1\nmodell: {}\n", "unknown settings learning_rat .*learning_rate.*modell"),
        ("recipe: align\nlora: {rank: 4}\n", "unknown setting lora.rank. lora takes alpha, dropout, layers, r"),
        ("recipe: align\nlora: {r: four}\n", "lora.r: expected a whole number, got 'four'"),
        ("recipe: align\nlora: 4\n", "lora: expected settings, `name: value` each, got 4"),
        ("recipe: align\nmax_steps: ten\n", "max_steps: expected a whole number, got 'ten'"),
        ("recipe: align\nmax_steps: true\n", "max_steps: expected a whole number, got True"),
        ("recipe: align\nmax_steps:\n", "max_steps: expected a whole number, got None"),
        ("recipe: align\nbf16: yes\n", "bf16: expected true or false, got 'yes'"),
        ("recipe: align\nimage_sets: cov_ctr\n", "image_sets: expected settings, `name: a whole number` each"),
        ("recipe: align\nimage_sets: {cov_ctr: often}\n", "image_sets: expected settings, `name: a whole number`"),
        ("recipe: align\nexclude: [12]\n", "exclude: expected a list, each text, got .12. .*stands in quotes"),
        ("recipe: align\neval_strategy: sometimes\n", "eval_strategy: expected one of no, steps, epoch, got"),
        ("recipe: align\nloss: triplet\n", "loss: got 'triplet', expected one of"),
        ("recipe: align\nseed: 1\nseed: 2\n", "is not YAML.*line 1: seed stands there twice"),
        ("recipe: write\nfreeze_vision: true\n", "freeze_vision"),
        ("recipe: write\nsupervised_sets: {a: 1}\n", "supervised_sets: .*expected `recipe: pairs`"),
        ("recipe: write\nearly_stopping_patience: 0\n", "early_stopping_patience: got 0"),
        ("recipe: tokenizer\nlearning_rate: 1.0\n", "learning_rate"),
        ("recipe: aligns\n", r"expected `recipe:` to be one of .*, got 'aligns' \(did you mean align\?\)"),
        ("image_sets: {}\n", "to be one of.*got None"),
        ("- recipe\n", "to be one of"),
        ("", "to be one of"),
        ("recipe: [align", "is not YAML"),
        ("extends: recipe\n", "extends itself: recipe -> recipe"),
        ("extends: algin-small\n", "No recipe 'algin-small'"),
        ("extends: align-small\nrecipe: write\n", "kind 'write' extends one of kind 'align'"),
    ],
)
def test_wrong_recipes_are_refused(text, message, tmp_path, seen):
    path = recipe_file(tmp_path, text)
    with pytest.raises(ValueError, match=message) as error:
        run_recipe(path)
    assert "recipe.yaml" in str(error.value)
    assert not seen


def test_what_is_not_there_is_refused_before_anything_starts(tmp_path, seen):
    (tmp_path / "cov_ctr").mkdir()
    file = tmp_path / "file"
    file.touch()
    path = recipe_file(
        tmp_path, f"recipe: align\ndata_root: {tmp_path}\noutput_dir: {tmp_path}/out\nimage_sets: {{cov_crt: 1}}\n"
    )
    with pytest.raises(ValueError, match=r"image_sets: no set 'cov_crt' in .* \(did you mean cov_ctr\?\)"):
        run_recipe(path)
    with pytest.raises(ValueError, match="data_root: no folder"):
        run_recipe(path, ["--data_root", str(tmp_path / "none")])
    with pytest.raises(ValueError, match="output_dir: .* cannot be written"):
        run_recipe(path, ["--image_sets", "{cov_ctr: 1}", "--output_dir", str(file / "out")])
    assert not seen and not (tmp_path / "out").exists()


@pytest.mark.parametrize("overrides", [["--seed"], ["seed", "3"], ["--seed", "3", "more"], ["--", "3"]])
def test_overrides_are_pairs(overrides, tmp_path):
    with pytest.raises(ValueError, match="`--name value` pairs"):
        run_recipe(recipe_file(tmp_path, "recipe: align\n"), overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--learning_rat", "1"], "learning_rat"),
        (["--seed", "[1"], "is not YAML"),
        (["--seed", "one"], "seed: expected a whole number, got 'one'"),
        (["--seed.x", "1"], "seed.x: seed is 3, which has no settings in it"),
        (["--model.projection_dim.x", "1"], "model.projection_dim is 8"),
    ],
)
def test_wrong_overrides_are_refused(overrides, message, tmp_path, seen):
    with pytest.raises(ValueError, match=message):
        run_recipe(recipe_file(tmp_path, "recipe: align\nseed: 3\nmodel: {projection_dim: 8}\n"), overrides)


def test_a_recipe_goes_on_from_another(tmp_path):
    recipe_file(
        tmp_path,
        "recipe: align\nseed: 3\nimage_sets: {a: 1, b: 2}\nexclude: [x]\n"
        "model: {projection_dim: 8, text_config: {hidden_size: 4, num_hidden_layers: 2}}\n",
        "first",
    )
    recipe_file(tmp_path, "extends: first\nmodel: {text_config: {hidden_size: 6}}\n", "second")
    third = recipe_file(tmp_path, "extends: second.yaml\nimage_sets: {c: 1}\nexclude: []\n", "third")
    kind, values = read_recipe(third, ["--seed", "5"])
    assert kind is KINDS["align"]
    assert values == {
        "seed": 5,
        "image_sets": {"c": 1},  # a table is replaced
        "exclude": [],
        "model": {"projection_dim": 8, "text_config": {"hidden_size": 6, "num_hidden_layers": 2}},  # a block is merged
    }


def test_yaml_is_that_of_version_1_2():
    text = "a: no\nb: 1e-4\nc: 0012\nd: 2024-01-01\ne: -3\nf: .5\ng:\nh: True\ni: 12:30\nj: 1.0e-3\nk: '5'\nl: 1.e3"
    read = ["no", 1e-4, "0012", "2024-01-01", -3, 0.5, None, True, "12:30", 1e-3, "5", 1000.0]
    assert list(read_yaml(text).values()) == read
    assert read_yaml("x: &x {a: 1}\ny: {<<: *x, a: 2}") == {"x": {"a": 1}, "y": {"a": 2}}


@dataclass
class Inner:
    size: int = 1


@dataclass
class Block:
    name: str
    inner: Inner = field(default_factory=Inner)
    rates: dict[str, float] = field(default_factory=dict)
    anything: dict[str, Any] = field(default_factory=dict)
    layers: list[int] | None = None


def test_blocks_are_checked_at_any_depth():
    block = checked_block(Block, {"name": "n", "inner": {"size": 3}, "rates": {"a": 1}, "layers": [1]}, "block")
    assert block == Block("n", Inner(3), {"a": 1}, {}, [1])
    assert checked_block(Block, block, "block") is block
    for values, message in (
        ({"name": "n", "inner": {"sise": 3}}, r"unknown setting block.inner.sise \(did you mean size\?\)"),
        ({"name": "n", "layers": ["one"]}, "block.layers: expected a list, each a whole number or nothing"),
        ({"name": "n", "rates": {"a": "b"}}, "block.rates: expected settings, `name: a number` each"),
        ({}, "block: .*missing 1 required positional argument: 'name'"),
    ):
        with pytest.raises(ValueError, match=message):
            checked_block(Block, values, "block")


@pytest.mark.parametrize("name", sorted(KINDS))
def test_settings_are_documented(name):
    """A setting that the docstring leaves out cannot be found."""
    recipe_class = getattr(KINDS[name].load(), KINDS[name].dataclass)
    texts = "\n".join(cls.__doc__ or "" for cls in recipe_class.__mro__)
    described = {line.strip().partition(":")[0] for line in texts.splitlines() if ": " in line}
    assert {each.name for each in fields(recipe_class)} <= described
