# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""A sweep over temperature, memory and noise, on made-up images."""

import json

import pytest
import torch
import yaml
from transformers import AutoModelForImageTextToText

from m3fm import M3FMConfig
from m3fm.training import sweep
from m3fm.training.recipe import run_recipe
from m3fm.training.sweep import SweepRecipe, choose, grid

pytest.importorskip("accelerate")


@pytest.fixture
def sweep_recipe(tiny_checkpoint, made_up_data, tmp_path):
    """Returns a function that writes a recipe of a sweep, with values of its own, and returns its path."""

    def write(**values):
        always = {
            "recipe": "sweep",
            "data_root": str(made_up_data),
            "base": str(tiny_checkpoint),
            "text_sets": {"reported": 1, "texts": 1},
            "parallel_sets": ["texts"],
            "validation_set": "reported",
            "temperatures": [0.02, 0.5],
            "max_text_length": 12,
            "min_distinct": 0.0,
            "feature_cache": str(tmp_path / "features"),
            "output_dir": str(tmp_path / "sweep"),
            "seed": 5,
            "disable_tqdm": True,
        }
        path = tmp_path / "sweep.yaml"
        path.write_text(yaml.safe_dump({**always, **values}), encoding="utf-8")
        return path

    return write


def point(metric: float, distinct: float) -> dict[str, float]:
    return {"bleu_4": metric, "distinct": distinct}


def test_the_best_that_is_distinct_enough_is_chosen():
    points = [point(0.5, 0.9), point(0.7, 0.5), point(0.9, 0.2), point(0.7, 0.6)]
    assert choose(points, "bleu_4", 0.5) is points[1]
    assert choose(points, "bleu_4", 0.1) is points[2]
    assert choose(points, "bleu_4", 0.95) is points[0], "where none is, the most distinct one"


def test_the_grid_has_the_own_memory_at_its_own_size_alone():
    recipe = SweepRecipe(
        temperatures=[0.1, 0.2], memory_methods=["own", "kmeans"], memory_sizes=[3, 4], text_sets={"a": 1}
    )
    assert [tuple(each.values()) for each in grid(recipe, 12)] == [
        (None, method, size, temperature)
        for method, size in (("own", 12), ("kmeans", 3), ("kmeans", 4))
        for temperature in (0.1, 0.2)
    ]
    noisy = SweepRecipe(temperatures=[0.1], noise_levels=[0.0, 0.3])
    assert [(each["noise"], each["size"]) for each in grid(noisy, 12)] == [(0.0, 12), (0.3, 12)]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"memory_methods": ["nearest"]}, r"memory_methods: got \['nearest'\]"),
        ({"memory_methods": ["kmeans"]}, "expected text_sets"),
        ({"temperatures": [0.0]}, "expected numbers above 0"),
        ({"memory_sizes": [0]}, "memory_sizes"),
        ({"noise_levels": [-0.1]}, "noise_levels"),
        ({"metric": "meteor"}, "metric: got 'meteor'"),
    ],
)
def test_wrong_values_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        SweepRecipe(**values)


def test_a_sweep_resumes_and_saves_what_it_chose(sweep_recipe, tiny_checkpoint, tmp_path, monkeypatch):
    whole, scored = sweep._Writer.score, []

    def score(self, memory, temperature):
        if len(scored) == 3:
            raise KeyboardInterrupt
        scored.append((tuple(memory.shape), temperature))
        # Made up, so that the choice is known: the larger memory, the lower temperature.
        return whole(self, memory, temperature) | {"bleu_4": memory.shape[1] - temperature, "distinct": 0.5}

    monkeypatch.setattr(sweep._Writer, "score", score)
    path = sweep_recipe(memory_methods=["own", "kmeans"], memory_sizes=[4])
    with pytest.raises(KeyboardInterrupt):
        run_recipe(path)
    assert len(scored) == 3 and not (tmp_path / "sweep" / "model.safetensors").exists()
    scored.clear()
    facts = run_recipe(path)
    assert scored == [((2, 4, 16), 0.5)], "the three settings before are not tried again"
    assert (facts["chosen"]["memory"], facts["chosen"]["temperature"]) == ("own", 0.02)

    scored.clear()
    facts = run_recipe(sweep_recipe(memory_methods=["medoids"], memory_sizes=[5], temperatures=[0.1, 0.02]))
    assert scored == [((2, 5, 16), 0.1), ((2, 5, 16), 0.02)]
    assert (facts["chosen"]["memory"], facts["chosen"]["size"], facts["chosen"]["temperature"]) == ("medoids", 5, 0.02)
    folder = tmp_path / "sweep"
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert (model.config.support_memory_size, model.config.support_temperature) == (5, 0.02)
    torch.testing.assert_close(model.support_memory.norm(dim=-1), torch.ones(2, 5), atol=1e-3, rtol=0)
    base = AutoModelForImageTextToText.from_pretrained(tiny_checkpoint)
    others = set(base.state_dict()) - {"support_memory"}
    assert all(torch.equal(base.state_dict()[name], model.state_dict()[name]) for name in others)
    kept = json.loads((folder / "sweep.json").read_text())
    assert len(kept["points"]) == 6 and "| memory | size |" in kept["table"]
    assert json.loads((folder / "training.json").read_text())["sweep"]["chosen"] == kept["chosen"]
    assert (folder / "sweep.png").stat().st_size > 5000

    with pytest.raises(ValueError, match="holds a sweep with another max_text_length"):
        run_recipe(path, ["--max_text_length", "13"])


def test_reports_are_those_that_inference_writes(sweep_recipe, tiny_checkpoint, tmp_path, monkeypatch):
    decoded = []
    generate = AutoModelForImageTextToText.from_pretrained(tiny_checkpoint).generate.__func__

    def counted(self, *args, **kwargs):
        decoded.append(len(kwargs["shared_embeds"]))
        return generate(self, *args, **kwargs)

    written = []
    monkeypatch.setattr(sweep.M3FMForReportGeneration, "generate", counted)
    monkeypatch.setattr(
        sweep.write,
        "score_texts",
        lambda texts, studies, code: (
            written.append((texts, studies, code))
            or {f"{name}_{code}": 0.5 for name in ("bleu_4", "rouge_l", "distinct")}
        ),
    )
    # So cold that an image takes the nearest entry as it is: equal embeddings are written once.
    run_recipe(sweep_recipe(temperatures=[1e-6, 1e-7]))
    assert sum(decoded) <= 2 * 3
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "sweep")
    assert model.config.support_temperature == pytest.approx(1e-6)
    texts, studies, language = written[0]
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(tmp_path / "sweep")
    monkeypatch.undo()
    pixels = processor(images=[list(study.images) for study in studies], return_tensors="pt")
    ids = model.generate(**pixels, language=language, max_new_tokens=12, num_beams=1, do_sample=False)
    assert [text.strip() for text in processor.batch_decode(ids, skip_special_tokens=True)] == texts


def test_noise_levels_are_trained_from_the_same_start_once(sweep_recipe, tmp_path, monkeypatch):
    values = {"noise_levels": [0.0, 0.6], "noise_steps": 2, "temperatures": [0.1], "save_strategy": "no"}
    path = sweep_recipe(**values, per_device_train_batch_size=4, learning_rate=0.01)
    facts = run_recipe(path)
    records = [json.loads((tmp_path / "sweep" / f"noise-{n}" / "training.json").read_text()) for n in ("0", "0.6")]
    assert [record["steps"] for record in records] == [2, 2]
    assert M3FMConfig.from_pretrained(tmp_path / "sweep").text_noise_std == facts["chosen"]["noise"]
    assert "| noise | memory |" in facts["table"]
    monkeypatch.setattr(sweep.write, "run", lambda *_: pytest.fail("trained again"))
    assert run_recipe(path)["chosen"] == facts["chosen"]


def test_a_memory_that_is_too_large_is_refused_before_the_first_report(sweep_recipe, monkeypatch):
    monkeypatch.setattr(sweep._Writer, "score", lambda *_: pytest.fail("written"))
    with pytest.raises(ValueError, match="Expected 99 texts a language for the support memory, the sets have 9"):
        run_recipe(sweep_recipe(memory_methods=["own", "kmeans"], memory_sizes=[4, 99]))


def test_all_ranks_make_the_memory_and_the_main_one_saves(sweep_recipe, tmp_path, monkeypatch):
    whole, made = sweep.build_memory, []
    monkeypatch.setattr(sweep, "build_memory", lambda *given: made.append(given) or whole(*given))
    path = sweep_recipe(memory_methods=["sampled"], memory_sizes=[4], temperatures=[0.1], exclude=["0"])
    with monkeypatch.context() as patch:
        patch.setattr(sweep, "is_main", lambda: False)
        run_recipe(path)
    # Texts are embedded by all ranks together: one that left it to the main rank would keep that waiting.
    assert len(made) == 2 and not (tmp_path / "sweep" / "model.safetensors").exists()
    run_recipe(path)
    record = json.loads((tmp_path / "sweep" / "training.json").read_text())
    assert record["recipe"]["exclude"] == 1, "ids of studies are not passed on"
