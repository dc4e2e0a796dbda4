# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
import json

import pytest
import yaml

from m3fm.evaluation import paper
from m3fm.evaluation.paper import find_folder, read_recipe, run_paper_table, trained_on

NAMES = {
    "IU X-ray": ("report", ["en"]),
    "COVID-19-CT": ("report", ["zh"]),
    "COV-CTR": ("report", ["en", "zh"]),
    "Shenzhen Tuberculosis": ("diagnosis", ["tuberculosis"]),
    "COVID-CXR": ("diagnosis", ["covid_19"]),
    "NIH ChestX-ray14": ("diagnosis", 14),
    "CheXpert": ("diagnosis", 5),
    "RSNA Pneumonia": ("diagnosis", ["pneumonia"]),
    "SIIM-ACR Pneumothorax": ("diagnosis", ["pneumothorax"]),
}


def make_metrics(columns, floors, names):
    scores = dict.fromkeys(names, 0.7)
    gap = {"difference": 0.1, "low": -0.05, "high": 0.25, "p_value": 0.2}
    return {
        "model_sha256": "m",
        "split": "validation",
        "num_studies": dict.fromkeys(columns, 72),
        "num_groups": dict.fromkeys(columns, 57),
        "rows": {"model": dict.fromkeys(columns, scores)}
        | {name: dict.fromkeys(columns, dict.fromkeys(names, score)) for name, score in floors.items()}
        | {"shuffled_images": dict.fromkeys(columns, dict.fromkeys(names, 0.99))},
        "intervals": {"model": dict.fromkeys(columns, dict.fromkeys(names, [0.61, 0.79]))},
        "differences": {"shuffled_images": dict.fromkeys(columns, dict.fromkeys(names, gap))},
    }


@pytest.fixture
def runs(monkeypatch):
    """Replaces both evaluations by ones that only write down how they were called."""
    calls = []

    def evaluate(kind, output_dir, metrics):
        calls.append(kind)
        output_dir.mkdir(parents=True, exist_ok=True)
        (output_dir / "metrics.json").write_text(json.dumps(metrics))

    def evaluate_reports(model_dir, data_folder, languages, output_dir, metrics, **options):
        print("a table of its own")  # noqa: T201
        names = ("bleu_4", "meteor", "rouge_l", "cider_d", "finding_f1_micro")
        found = make_metrics(languages, {"constant_report": 0.75, "random_report": 0.5}, names)
        evaluate((data_folder.name, model_dir.name, options["split"], metrics.num_resamples), output_dir, found)

    def evaluate_diagnosis(model_dir, data_folder, labels, shots, output_dir, **options):
        if data_folder.name == "tb_shenzhen":
            raise ValueError("Expected studies with and without\n| the finding.")
        columns = [*labels, "macro"]
        skipped = {"hernia": "one class only in the evaluated studies"} if "hernia" in labels else {}
        found = make_metrics(columns, {"label_prior": 0.5, "linear_probe_tower": 0.6}, ("auroc", "auprc", "f1"))
        found |= {"labels": [name for name in labels if name not in skipped], "skipped": skipped}
        evaluate((data_folder.name, model_dir.name, shots, options["num_resamples"]), output_dir, found)

    monkeypatch.setattr(paper, "evaluate_reports", evaluate_reports)
    monkeypatch.setattr(paper, "evaluate_diagnosis", evaluate_diagnosis)
    return calls


@pytest.fixture
def world(tmp_path):
    """A checkpoint folder, and a data root with four of the sets and one that has no images."""
    model, root = tmp_path / "m3fm-small", tmp_path / "data"
    for name in ("cov_ctr", "tb_shenzhen", "nih_chestxray14_sample", "chexpert", "openi_iu_reports"):
        folder = root / name
        folder.mkdir(parents=True)
        if name == "openi_iu_reports":
            (folder / "data.jsonl").write_text("")
            continue
        (folder / "1.png").write_bytes(b"pixels")
        row = {"file_name": "1.png", "modality": "cxr", "split": "validation", "patient_id": "secret"}
        (folder / "metadata.jsonl").write_text(json.dumps(row))
    model.mkdir()
    (model / "config.json").write_text("{}")
    return model, root, tmp_path / "out"


def test_the_recipe_has_the_nine_sets_of_the_paper_in_three_regimes():
    recipe = read_recipe(paper.RECIPE)
    assert list(recipe.regimes.values()) == [0, 16, "full"]
    assert [each.title for each in recipe.sets] == list(NAMES)
    for each in recipe.sets:
        task, columns = NAMES[each.title]
        given = each.languages if task == "report" else each.labels
        assert each.task == task
        assert len(given) == columns if isinstance(columns, int) else list(given) == columns


def test_what_is_there_runs_and_the_rest_is_skipped_by_name(world, runs, capsys):
    model, root, output = world
    result = run_paper_table(model, root, output, num_resamples=50)
    assert runs == [
        ("cov_ctr", "m3fm-small", None, 50),
        *[("nih_chestxray14_sample", "m3fm-small", shots, 50) for shots in (0, 16, "full")],
        *[("chexpert", "m3fm-small", shots, 50) for shots in (0, 16, "full")],
    ]
    assert {cell["title"] for cell in result["cells"]} == set(NAMES)
    by_status = [(cell["status"], cell["set"], cell["regime"]) for cell in result["cells"]]
    assert ("skipped", "cov_ctr", "full") in by_status
    assert ("failed", "tb_shenzhen", "few_shot") in by_status
    table = capsys.readouterr().out
    assert "| SIIM-ACR Pneumothorax | all | skipped | not on disk: looked for siim, siim_pneumothorax |" in table
    assert "| IU X-ray | all | skipped | openi_iu_reports holds texts without images |" in table
    assert "needs a checkpoint trained on its pairs" in table
    assert "failed | Expected studies with and without \\| the finding. |" in table
    # A control is not a floor, whatever it scores.
    cell = "0.700 [0.610, 0.790] (0.750 constant report)"
    assert f"| COV-CTR | zero-shot | zh | validation | 72 (57) | {cell} |" in table
    assert "| NIH ChestX-ray14 | few-shot (16) | macro of 13 | validation |" in table
    assert "NIH ChestX-ray14, full: without hernia (one class only in the evaluated studies)." in table
    assert "(0.600 linear probe, image tower) | +0.100 [−0.050, 0.250] | yes |" in table
    assert "NIH ChestX-ray14 (nih_chestxray14_sample): a sample, not the official test list." in table
    assert "a table of its own" not in table
    written = json.loads((output / "paper.json").read_text(encoding="utf-8"))
    assert written["table"] + "\n" == table
    assert written["command"].startswith("m3fm evaluate --task paper --model ")
    assert "secret" not in (output / "paper.json").read_text(encoding="utf-8")


def test_a_finished_cell_is_not_run_again(world, runs):
    model, root, output = world
    first = run_paper_table(model, root, output)
    done = len(runs)
    assert run_paper_table(model, root, output) == first
    assert len(runs) == done
    (root / "chexpert" / "1.png").write_bytes(b"other pixels")
    run_paper_table(model, root, output)
    assert [call[0] for call in runs[done:]] == ["chexpert"] * 3
    (model / "model.safetensors").write_bytes(b"other weights")
    run_paper_table(model, root, output)
    assert len(runs) == 2 * done + 3


def test_a_set_that_cannot_be_read_does_not_stop_the_others(world, runs):
    model, root, output = world
    (root / "cov_ctr" / "metadata.jsonl").write_text("not json")
    cells = run_paper_table(model, root, output)["cells"]
    failed = next(cell for cell in cells if cell["set"] == "cov_ctr")
    assert (failed["status"], failed["regime"]) == ("failed", None)
    assert "line 1: expected a JSON object" in failed["reason"]
    assert sum(cell["status"] == "done" for cell in cells) == 6


def test_report_sets_take_checkpoints_of_their_own(world, runs, tmp_path):
    model, root, output = world
    tuned = tmp_path / "tuned"
    tuned.mkdir()
    (tuned / "config.json").write_text("{}")
    (tuned / "run.json").write_text(json.dumps({"recipe": {"supervised_sets": {"cov_ctr": 6}, "base": str(model)}}))
    content = yaml.safe_load(paper.RECIPE.read_text(encoding="utf-8"))
    content["sets"] = {"cov_ctr": content["sets"]["cov_ctr"] | {"checkpoints": {"full": str(tuned)}, "split": "test"}}
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(yaml.safe_dump(content, sort_keys=False))
    result = run_paper_table(model, root, output, recipe=recipe)
    assert [call[:3] for call in runs] == [("cov_ctr", "m3fm-small", "test"), ("cov_ctr", "tuned", "test")]
    assert [cell["status"] for cell in result["cells"]] == ["done", "skipped", "done"]
    assert "| COV-CTR | few-shot | skipped | needs a checkpoint" in result["table"]


def test_what_a_checkpoint_was_trained_on_is_read_never_guessed(world, tmp_path):
    model, _, _ = world
    recipe = read_recipe(paper.RECIPE)
    known = trained_on(model, recipe)
    assert {"cov_ctr", "nih_chestxray14_sample", "openi_iu_reports"} <= set(known)
    assert "chexpert" not in known
    unknown = tmp_path / "unknown"
    unknown.mkdir()
    assert trained_on(unknown, recipe) is None
    # A run that goes on from a model of which nothing is known.
    (unknown / "run.json").write_text(json.dumps({"recipe": {"text_sets": {"a": 1}, "base": str(tmp_path / "none")}}))
    assert trained_on(unknown, recipe) is None
    (unknown / "run.json").write_text(json.dumps({"recipe": {"text_sets": {"a": 1}, "parallel_sets": ["b"]}}))
    assert trained_on(unknown, recipe) == ["a", "b"]


def test_the_table_says_what_zero_shot_means_here(world, runs):
    model, root, output = world
    table = run_paper_table(model, root, output)["table"]
    assert "Zero-shot on COV-CTR, NIH ChestX-ray14 is therefore not zero-shot on a set never seen" in table
    assert "| CheXpert | zero-shot | macro of 5 |" in table
    assert "| no |" in next(line for line in table.splitlines() if line.startswith("| CheXpert | zero-shot"))
    other = model.rename(model.with_name("other"))
    table = run_paper_table(other, root, output.with_name("out2"))["table"]
    assert "What this checkpoint was trained on is not written down" in table
    assert "| unknown |" in table


def test_a_folder_with_images_is_preferred(tmp_path):
    iu_xray = next(each for each in read_recipe(paper.RECIPE).sets if each.name == "iu_xray")
    (tmp_path / "iu_xray").mkdir()
    assert find_folder(iu_xray, tmp_path) == (None, "iu_xray has no metadata.jsonl")
    (tmp_path / "openi_iu_reports").mkdir()
    (tmp_path / "openi_iu_reports" / "metadata.jsonl").write_text("")
    assert find_folder(iu_xray, tmp_path) == (tmp_path / "openi_iu_reports", "")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": ["pnuemonia"]}, r"unknown labels \['pnuemonia'\]"),
        ({"task": "segmentation"}, "expected a task of"),
        ({"colour": "red"}, r"got \['colour'\]"),
        ({"checkpoints": {"half": "x"}}, r"unknown regimes of checkpoints \['half'\]"),
        ({"labels": []}, "with languages or labels"),
    ],
)
def test_a_wrong_recipe_is_refused(tmp_path, change, message):
    content = yaml.safe_load(paper.RECIPE.read_text(encoding="utf-8"))
    content["sets"]["rsna_pneumonia"] |= change
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=message):
        read_recipe(path)


def test_wrong_places_are_refused(world, tmp_path):
    model, root, output = world
    with pytest.raises(ValueError, match="no such recipe"):
        run_paper_table(model, root, output, recipe=tmp_path / "none.yaml")
    with pytest.raises(ValueError, match="expected the folder that holds the data folders"):
        run_paper_table(model, tmp_path / "nowhere", output)
    (tmp_path / "broken.yaml").write_text("regimes: {few: -1}\nsets: {a: {}}")
    with pytest.raises(ValueError, match="expected 0, a number or 'full' for the regime 'few', got -1"):
        read_recipe(tmp_path / "broken.yaml")
    assert not output.exists()
