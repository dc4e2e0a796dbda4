# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Several stages in one recipe: what each is given, how they go on, and that all are checked before the first one."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModel

from m3fm.data import finding_table
from m3fm.training import recipe as recipes
from m3fm.training.recipe import find_recipe, read_recipe, run_recipe
from m3fm.training.stages import Stage, read_stages
from m3fm.training.write import WriteTrainer

pytest.importorskip("accelerate")


def stages_of(folder: Path, text: str, *overrides: str) -> dict[str, Stage]:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    _, values = read_recipe(path, overrides)
    return {stage.name: stage for stage in read_stages(values)}


# --- what each stage is given ----------------------------------------------------------------------------------------

SMALL = """\
recipe: stages
output_dir: out
data_root: DATA
seed: 9
stages:
  tokenizer: {extends: tokenizer}
  align: {extends: align-small, seed: 4, model: {projection_dim: 64}}
  write: {extends: write-small}
  again: {recipe: write, base: stages.align, text_sets: {a: 1}}
"""


def test_a_stage_goes_on_from_those_before_it(tmp_path):
    stages = stages_of(tmp_path, SMALL, "--stages.write.learning_rate", "5e-4", "--data_root", "ELSEWHERE")
    assert list(stages) == ["tokenizer", "align", "write", "again"]
    assert [str(stage.output_dir) for stage in stages.values()] == [f"out/{name}" for name in stages]
    assert {stage.values["data_root"] for stage in stages.values()} == {"ELSEWHERE"}
    align, write = stages["align"].values, stages["write"].values
    assert (align["tokenizer"], align["seed"], stages["tokenizer"].values["seed"]) == ("out/tokenizer", 4, 9)
    assert (align["model"]["projection_dim"], align["model"]["projection_hidden_size"]) == (64, 384)
    assert (write["base"], write["learning_rate"], write["cross_lingual"]) == ("out/align", 5e-4, 0.5)
    assert stages["again"].values["base"] == "out/align"
    stages = stages_of(tmp_path, SMALL, "--seed", "5", "--model.projection_dim", "32", "--output_dir", "x")
    assert {stage.values["seed"] for stage in stages.values()} == {5}, "on the command line: of all stages"
    assert [stages[name].values["model"]["projection_dim"] for name in ("align", "write", "again")] == [32] * 3


def test_stages_are_merged_into_those_of_another_recipe(tmp_path):
    (tmp_path / "first.yaml").write_text(SMALL, encoding="utf-8")
    text = "extends: first\nstages: {tokenizer: null, align: {model: {projection_hidden_size: 1}}, write: {seed: 3}}"
    stages = stages_of(tmp_path, text, "--stages.again", "null", "--vocab_size", "500")
    assert list(stages) == ["align", "write"]
    model = stages["align"].values["model"]
    assert (model["projection_dim"], model["projection_hidden_size"]) == (64, 1)
    assert (stages["align"].values["seed"], stages["write"].values["seed"]) == (4, 3)
    assert "tokenizer" in stages["align"].values, "that of align-small"


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        (SMALL, ["--data_rot", "x"], r"unknown setting data_rot \(did you mean data_root\?\)"),
        (SMALL, ["--stages.algin.seed", "1"], r"no stage 'algin' \(did you mean align\?\): it has tokenizer, align"),
        (SMALL, ["--stages.align.max_step", "1"], r"stages.align: unknown setting max_step \(did you mean max_steps"),
        (SMALL, ["--stages.align.max_steps", "ten"], "stages.align: max_steps: expected a whole number, got 'ten'"),
        (SMALL, ["--stages.align.lora.rank", "4"], "stages.align: unknown setting lora.rank"),
        (SMALL, ["--stages.align.base", "x"], "stages.align: unknown setting base"),
        (SMALL, ["--stages.write.base", "stages.again"], "stages.again names no stage before it: .*tokenizer, align"),
        (SMALL, ["--stages.write.base", "stages.wirte"], "stages.wirte names no stage before it"),
        (SMALL, ["--stages.write", "fast"], "stages.write: expected settings"),
        (SMALL, ["--output_dir", "null"], "output_dir: expected the folder"),
        ("recipe: stages\noutput_dir: x\n", [], "stages: expected at least one"),
        ("recipe: stages\noutput_dir: x\nstages: {a: null}\n", [], "stages: expected at least one"),
        ("recipe: stages\noutput_dir: x\nstages: {a: {seed: 1}}\n", [], "stages.a: expected `extends:` a recipe, or"),
        ("recipe: stages\noutput_dir: x\nstages: {a: {extends: small}}\n", [], "stages.a: expected `extends:`"),
        ("recipe: stages\noutput_dir: x\nstages: {a: {extends: smal}}\n", [], "No recipe 'smal'"),
    ],
)
def test_wrong_stages_are_refused(text, overrides, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        stages_of(tmp_path, text, *overrides)


# --- runs ------------------------------------------------------------------------------------------------------------


def words() -> Iterator[dict[str, str]]:
    """Yields as many texts as a tokenizer of both languages needs to be learned."""
    phrases = {
        code: [
            phrase
            for finding in finding_table().values()
            for phrase in (*finding.present[code], *finding.absent[code])
        ]
        for code in ("en", "zh")
    }
    rng = random.Random(0)
    for number in range(150):
        reports = {f"report_{code}": ", ".join(rng.choices(known, k=3)) for code, known in phrases.items()}
        yield {"study_id": str(number), "modality": "cxr", "split": "train"} | reports


@pytest.fixture
def tiny_words(tmp_path: Path, made_up_data: Path) -> list[str]:
    """Returns the settings that bring the recipe `tiny` to the made-up data and a tower of two layers."""
    tower = {"model_type": "dinov2", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = AutoConfig.for_model(**tower, image_size=28, patch_size=14)
    AutoModel.from_config(config).save_pretrained(tmp_path / "tower")
    (made_up_data / "words").mkdir()
    rows = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in words())
    (made_up_data / "words" / "data.jsonl").write_text(rows, encoding="utf-8")
    both = "{reported: 1, texts: 1}"
    settings = {
        "data_root": made_up_data,
        "output_dir": tmp_path / "out",
        "feature_cache": tmp_path / "features",
        "text_sets": both,
        "parallel_sets": "[texts]",
        "validation_set": "reported",
        "max_text_length": 48,
        "disable_tqdm": "true",
        "stages.tokenizer.text_sets": "{words: 1}",
        "stages.tokenizer.parallel_sets": "[]",
        "stages.tokenizer.vocab_size": 700,
        "stages.align.image_sets": "{reported: 1, labelled: 1}",
        "stages.align.vision_model": tmp_path / "tower",
        "stages.align.processor.size": 28,
        "stages.align.model.support_memory_size": 6,
        "stages.align.per_device_train_batch_size": 2,
        "stages.align.max_steps": 2,
        "stages.write.per_device_train_batch_size": 4,
        "stages.write.max_steps": 3,
        "stages.write.save_steps": 2,
        "stages.sweep.temperatures": "[0.02]",
        "stages.sweep.max_text_length": 4,
        "stages.pairs.sets": "{reported: 1}",
        "stages.pairs.fraction": 1.0,
        "stages.pairs.per_device_train_batch_size": 2,
        "stages.pairs.max_steps": 1,
    }
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def test_stages_run_in_order_and_go_on(tiny_words, tmp_path, monkeypatch, capsys):
    ran = []
    run_kind = recipes.run_kind

    def record(kind, values):
        ran.append(kind.module)
        return run_kind(kind, values)

    monkeypatch.setattr("m3fm.training.stages.run_kind", record)
    tiny = find_recipe("tiny")
    whole = WriteTrainer.training_step

    def broken(trainer, *args, **kwargs):
        if trainer.state.global_step == 2:
            raise KeyboardInterrupt
        return whole(trainer, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(WriteTrainer, "training_step", broken)
        run_recipe(tiny, tiny_words)
    assert ran == [".tokenizer", ".align", ".write"]
    facts = run_recipe(tiny, tiny_words)
    assert ran[3:] == [".write", ".sweep", ".pairs"], "what is finished is passed over"
    assert list(facts["stages"]) == ["tokenizer", "align", "write", "sweep", "pairs"]
    assert facts["output_dir"] == str(tmp_path / "out" / "pairs")
    history = json.loads((tmp_path / "out" / "write" / "history.json").read_text(encoding="utf-8"))
    assert history[-1]["step"] == 3
    assert (tmp_path / "out" / "pairs" / "model.safetensors").is_file()
    assert run_recipe(tiny, [*tiny_words, "--logging_steps", "1"])["stages"] == facts["stages"]
    assert len(ran) == 6
    told = capsys.readouterr().err.splitlines()
    assert "stage 5 of 5, pairs: finished earlier, in" in told[-1]
    with pytest.raises(ValueError, match="stages.align was run with another learning_rate, seed: expected another"):
        run_recipe(tiny, [*tiny_words, "--learning_rate", "2e-3", "--stages.align.seed", "3"])
    record_file = tmp_path / "out" / "stages.json"
    content = json.loads(record_file.read_text(encoding="utf-8"))
    del content["stages"]["align"]
    record_file.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match="stages.write is finished and stages.align before it is not"):
        run_recipe(tiny, tiny_words)
    record_file.write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="stages.json is damaged"):
        run_recipe(tiny, tiny_words)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--stages.pairs.sets", "{texts: 1}"], "stages.pairs: sets: texts has no training study with an image"),
        (["--stages.pairs.sets", "{report: 1}"], r"stages.pairs: sets: no set 'report' .*did you mean reported"),
        (["--stages.align.text_sets", "{labelled: 1}", "--stages.align.parallel_sets", "[]"], None),
        (
            ["--stages.align.image_sets", "{texts: 1}"],
            "stages.align: texts: no study has images beside labels or reports",
        ),
        (
            ["--stages.write.text_sets", "{labelled: 1}", "--stages.write.parallel_sets", "[]"],
            "stages.write: text_sets: .* have no training text",
        ),
        (["--stages.write.parallel_sets", "[reported]"], "stages.write: .*parallel_en_zh.jsonl is missing"),
        (["--stages.align.max_text_length", "300"], "stages.align: max_text_length: got 300, expected at most 256"),
        (["--stages.align.processor.size", "30"], "stages.align: Images of 30 x 30 pixels do not divide"),
        (["--stages.align.model.text_encoder_config.hiden_size", "8"], "unknown setting hiden_size .*hidden_size"),
        (["--stages.align.model.text_config.max_position_embeddings", "12"], "stages.write: .*12 positions"),
        (["--stages.align.model.text_config.vocab_size", "9"], "text_config.vocab_size` is 9 and the tokenizer has"),
        (["--stages.align.text_encoder", "FacebookAI/xlm-roberta-base"], "not on this machine: FacebookAI/xlm-rob"),
        (["--stages.align.vision_model", "microsoft/rad-dino"], "stages.align: not on this machine: microsoft/rad"),
        (["--stages.align.vision_training", "last_9"], "stages.align: `vision_training` is 'last_9'"),
        (["--stages.align.per_device_train_batch_size", "64"], "stages.align: Expected at least 64 samples"),
        (["--stages.write.base", "nowhere"], "stages.write: base: no checkpoint in 'nowhere'"),
        (["--stages.write.base", "stages.tokenizer"], "made by a stage that leaves no model"),
    ],
)
def test_all_stages_are_checked_before_the_first(change, message, tiny_words, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr("m3fm.training.stages.run_kind", lambda kind, values: started.append(kind) or {})
    if message is None:
        run_recipe(find_recipe("tiny"), [*tiny_words, *change])
        assert len(started) == 5
        return
    with pytest.raises(ValueError, match=message):
        run_recipe(find_recipe("tiny"), [*tiny_words, *change])
    assert not started and not (tmp_path / "out").exists()


def test_stages_run_under_a_launcher(tiny_words, tmp_path):
    """Two processes: each stage is run once, one of them talks, and an error is told once."""
    settings = [*tiny_words, "--stages.sweep", "null", "--stages.pairs", "null", "--logging_steps", "1"]

    def launch(*more: str) -> subprocess.CompletedProcess:
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "m3fm", "train"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
        words = [sys.executable, *command, "tiny", *settings, *more]
        return subprocess.run(words, capture_output=True, text=True, env=environment, timeout=300)

    done = launch()
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stderr.splitlines() if line.startswith(("stage ", "results"))]
    assert [line.partition(":")[0] for line in told] == [
        "stage 1 of 3, tokenizer",
        "stage 2 of 3, align",
        "stage 3 of 3, write",
    ] + ["results are in " + str(tmp_path / "out" / "write")]
    run = json.loads((tmp_path / "out" / "write" / "training.json").read_text(encoding="utf-8"))
    assert run["steps"] == 3 and run["hardware"]["ranks"] == 2
