# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
import json

import numpy as np
import pytest
from PIL import Image

from m3fm.evaluation import diagnosis
from m3fm.evaluation.diagnosis import evaluate_diagnosis, render_diagnosis_table
from m3fm.evaluation.diagnosis_metrics import DIAGNOSIS_METRICS, MACRO
from m3fm.evaluation.titles import ROW_TITLES

# Its name tells that rows deny tuberculosis by not naming it.
SET = "tb_shenzhen_montgomery_128"
LABELS = {"tb": "Tuberculosis", "clear": "No Finding"}
ROWS = ["model", "label_prior", "linear_probe_tower", "shuffled_images", "blank_images", "noise_images"]


class FakeReporter:
    """Reads the disease off the file name; what it has embedded is counted by control."""

    languages = ["en", "zh"]
    logit_scale = 20.0
    calls: list[tuple[str | None, int]] = []
    stop_at: str | None = "nowhere"

    def __init__(self, *arguments):
        pass

    def embed_studies(self, studies, control=None):
        if control == self.stop_at:
            raise KeyboardInterrupt
        self.calls.append((control, len(studies)))
        names = [each.images[0].stem for each in studies]
        signs = np.array([1.0 if name.startswith("tb") else -1.0 for name in names])
        seeds = [int(name.split("_")[-1]) for name in names]
        noise = np.stack([np.random.default_rng(seed).normal(size=6) for seed in seeds])
        if control == "noise_images":
            signs = np.sign(noise[:, 5])
        if control == "blank_images":
            signs, noise = 0 * signs, 0 * noise
        shared = np.stack([signs, 1 + 0 * signs, 0.2 * noise[:, 0]], axis=1)
        shared /= np.linalg.norm(shared, axis=1, keepdims=True)
        return {"shared": shared.astype(np.float32), "tower": np.column_stack([signs + noise[:, 1], noise])}

    def embed_texts(self, texts):
        denied = ("No ", "no ", "未", "不", "clear", "Normal", "normal", "清晰")
        signs = np.array([-1.0 if any(word in text for word in denied) else 1.0 for text in texts])
        return np.stack([signs, 0 * signs, 0 * signs], axis=1)


class BlindReporter(FakeReporter):
    """Says the same of every image."""

    def embed_studies(self, studies, control=None):
        found = super().embed_studies(studies, control)
        return found | {"shared": np.tile(np.float32([0.6, 0.8, 0]), (len(studies), 1))}


def write_rows(folder, parts, series="secret"):
    """Writes a data folder: part to kind ("tb" or "clear") to number of patients, who are named by the series."""
    folder.mkdir(parents=True)
    rows = []
    for part, kinds in parts.items():
        for kind, count in kinds.items():
            for _ in range(count):
                name = f"{kind}_{part}_{len(rows)}.png"
                (folder / name).write_bytes(name.encode())
                row = {"file_name": name, "modality": "cxr", "split": part, "labels": [LABELS[kind]]}
                rows.append(row | {"patient_id": f"{series}-{len(rows)}"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return rows


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs an evaluation of made-up data by the fake model; pages have tests of their own."""
    data, model = tmp_path / SET, tmp_path / "model"
    write_rows(
        data, {"train": {"tb": 8, "clear": 12}, "validation": {"tb": 6, "clear": 10}, "test": {"tb": 4, "clear": 5}}
    )
    model.mkdir()
    (model / "config.json").write_text("{}")
    monkeypatch.setattr(diagnosis, "CheckpointReporter", FakeReporter)
    monkeypatch.setattr(diagnosis, "write_page", lambda output, studies: output / "report.html")
    monkeypatch.setattr(FakeReporter, "calls", [])

    def run(output="out", reporter=FakeReporter, data=data, **options):
        monkeypatch.setattr(diagnosis, "CheckpointReporter", reporter)
        return evaluate_diagnosis(model, data, output_dir=tmp_path / output, num_resamples=50, **options)

    return run


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_whole_run(run, tmp_path, capsys):
    metrics = run(labels=["tuberculosis"])
    rows = metrics["rows"]
    assert list(rows) == ROWS
    assert all(set(rows[row]) == {"tuberculosis", MACRO} for row in ROWS)
    assert all(list(scores) == list(DIAGNOSIS_METRICS) for by_label in rows.values() for scores in by_label.values())
    model = rows["model"]["tuberculosis"]
    assert (model["auroc"], model["auprc"], model["f1"]) == (1, 1, 1)
    assert rows["label_prior"]["tuberculosis"]["auroc"] == rows["blank_images"]["tuberculosis"]["auroc"] == 0.5
    assert rows["label_prior"]["tuberculosis"]["brier"] == pytest.approx((6 * 0.6**2 + 10 * 0.4**2) / 16)
    assert 0.7 < rows["linear_probe_tower"]["tuberculosis"]["auroc"] < 1
    for row in ("shuffled_images", "blank_images", "noise_images"):
        gap = metrics["differences"][row]["tuberculosis"]["auroc"]
        assert gap["difference"] == pytest.approx(1 - rows[row]["tuberculosis"]["auroc"])
        assert gap["low"] > 0
    assert metrics["intervals"]["model"]["tuberculosis"]["auroc"] == (1, 1)
    assert metrics["num_studies"] == metrics["num_groups"] == {"tuberculosis": 16, MACRO: 16}
    assert (metrics["labels"], metrics["skipped"], metrics["shots"]) == (["tuberculosis"], {}, 0)
    assert metrics["threshold_source"].startswith("cross-fitted in 5 patient-grouped folds")
    assert sum(metrics["reliability"]["tuberculosis"]["count"]) == 16
    assert metrics["curves"]["tuberculosis"]["tpr"][-1] == 1
    assert {"seed", "versions", "data_sha256", "model_sha256", "command", "notice", "phrases"} <= metrics.keys()
    assert "--task diagnosis" in metrics["command"]
    written = json.loads((tmp_path / "out" / "metrics.json").read_text(encoding="utf-8"))
    assert written == json.loads(json.dumps(metrics))
    assert capsys.readouterr().out.startswith(render_diagnosis_table(metrics) + "\n")
    texts = [path.read_text(encoding="utf-8") for path in (tmp_path / "out").glob("*.json*")]
    assert len(texts) == 3
    assert "secret" not in "".join(texts)


def test_predictions_hold_what_was_scored(run, tmp_path):
    metrics = run()
    predictions = lines(tmp_path / "out" / "predictions.jsonl")
    assert len(predictions) == len({row["group"] for row in predictions}) == 16
    for row in predictions:
        sick = row["study_id"].startswith("tb")
        assert row["labels"] == row["decisions"] == {"no_finding": int(not sick), "tuberculosis": int(sick)}
    brier = np.mean(
        [(row["probabilities"]["tuberculosis"] - row["labels"]["tuberculosis"]) ** 2 for row in predictions]
    )
    assert metrics["rows"]["model"]["tuberculosis"]["brier"] == pytest.approx(brier)
    mean = np.mean([metrics["rows"]["model"][label]["ece"] for label in ("no_finding", "tuberculosis")])
    assert metrics["rows"]["model"][MACRO]["ece"] == pytest.approx(mean)


@pytest.mark.parametrize("shots", [0, 4, "full"])
def test_a_model_that_never_looks_has_no_image_use_gap(run, shots):
    metrics = run(labels=["tuberculosis"], reporter=BlindReporter, shots=shots)
    assert metrics["rows"]["model"]["tuberculosis"]["auroc"] == 0.5
    for row in ("shuffled_images", "blank_images", "noise_images"):
        gap = metrics["differences"][row]["tuberculosis"]["auroc"]
        assert gap["low"] <= 0 <= gap["high"]
        assert gap["p_value"] == 1


@pytest.mark.parametrize("shots", [0, 3])
def test_two_runs_with_one_seed_are_identical(run, tmp_path, shots):
    first, second = (run(output, shots=shots, seed=7) for output in ("a", "b"))
    assert {**first, "command": ""} == {**second, "command": ""}
    read = [(tmp_path / output / "predictions.jsonl").read_bytes() for output in ("a", "b")]
    assert read[0] == read[1]
    assert run("a", shots=shots, seed=7) == first


def test_a_killed_run_goes_on_without_embedding_again(run, monkeypatch):
    monkeypatch.setattr(FakeReporter, "stop_at", "noise_images")
    with pytest.raises(KeyboardInterrupt):
        run(batch_size=8)
    before = [(None, 8), (None, 8), (None, 8), (None, 8), (None, 4), ("blank_images", 8), ("blank_images", 8)]
    assert FakeReporter.calls == before
    monkeypatch.setattr(FakeReporter, "stop_at", "nowhere")
    first = run(batch_size=8)
    assert FakeReporter.calls == [*before, ("noise_images", 8), ("noise_images", 8)]
    assert run(batch_size=8) == first
    assert len(FakeReporter.calls) == 9


def test_runs_share_features(run, tmp_path):
    store = tmp_path / "features"
    run("zero", features_dir=store)
    embedded = len(FakeReporter.calls)
    run("few", features_dir=store, shots=2)
    run("full", features_dir=store, shots="full", labels=["tuberculosis"])
    assert len(FakeReporter.calls) == embedded
    with pytest.raises(ValueError, match="another data_sha256, order_sha256, split"):
        run("test", features_dir=store, split="test")


def test_the_output_of_another_run_is_refused(run):
    run()
    with pytest.raises(ValueError, match="another shots: expected another output folder|another languages, shots"):
        run(shots=2)
    with pytest.raises(ValueError, match="another phrases"):
        run(labels=["tuberculosis"])


def test_few_shots_are_repeated(run):
    metrics = run(labels=["tuberculosis"], shots=4)
    assert metrics["trials"] == dict(zip(ROWS, (5, 1, 5, 10, 5, 10), strict=True))
    assert metrics["rows"]["model"]["tuberculosis"]["auroc"] > 0.98
    assert 0.5 < metrics["rows"]["linear_probe_tower"]["tuberculosis"]["auroc"] < 1
    assert set(metrics["spread"]) == {"model", "linear_probe_tower"}
    assert metrics["spread"]["linear_probe_tower"]["tuberculosis"]["auroc"] > 0
    # A few of each class do not tell how frequent the class is; all of them do.
    full = run("full", labels=["tuberculosis"], shots="full")
    assert full["trials"]["model"] == 1
    assert full["spread"] == {}
    assert full["rows"]["model"]["tuberculosis"]["brier"] < metrics["rows"]["model"]["tuberculosis"]["brier"]


def test_thresholds_of_a_test_part_are_fitted_on_validation(run, tmp_path):
    metrics = run(labels=["tuberculosis"], split="test")
    assert metrics["threshold_source"] == "fitted on the validation part (16 studies)"
    assert metrics["num_studies"]["tuberculosis"] == 9
    assert metrics["rows"]["model"]["tuberculosis"]["f1"] == 1
    for row in lines(tmp_path / "out" / "predictions.jsonl"):
        called = row["probabilities"]["tuberculosis"] >= metrics["thresholds"]["tuberculosis"]
        assert row["decisions"]["tuberculosis"] == called


def test_validation_of_one_class_fits_no_threshold(run, tmp_path):
    parts = {"train": {"tb": 3, "clear": 3}, "validation": {"clear": 4}, "test": {"tb": 4, "clear": 5}}
    write_rows(tmp_path / "other" / SET, parts)
    metrics = run(data=tmp_path / "other" / SET, labels=["tuberculosis"], split="test")
    assert metrics["thresholds_not_fitted"] == ["tuberculosis"]
    assert metrics["thresholds"] == {"tuberculosis": 0.5}


def test_patients_of_the_evaluated_part_teach_nothing(run, tmp_path):
    folder = tmp_path / "other" / SET
    rows = write_rows(folder, {"train": {"tb": 4, "clear": 4}, "validation": {"tb": 3, "clear": 3}})
    shared = [row | {"patient_id": "secret-8"} if number in (0, 4, 8) else row for number, row in enumerate(rows)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in shared))
    metrics = run(data=folder, labels=["tuberculosis"])
    assert metrics["training"] == {"num_studies": 6, "left_out_for_shared_patients": 2}
    with pytest.raises(ValueError, match="tuberculosis: learning needs 4 patients of each class"):
        run("few", data=folder, labels=["tuberculosis"], shots=4)


def test_without_training_part_its_floors_are_left_out_by_name(run, tmp_path):
    folder = tmp_path / "other" / SET
    write_rows(folder, {"test": {"tb": 5, "clear": 6}}, series="secret-other")
    metrics = run(data=folder)
    assert list(metrics["rows"]) == ["model", "shuffled_images", "blank_images", "noise_images"]
    assert metrics["skipped"] == dict.fromkeys(("label_prior", "linear_probe_tower"), "no training part to learn from")
    assert metrics["split"] == "test"
    with pytest.raises(ValueError, match="shots=1 needs studies to learn from"):
        run("few", data=folder, shots=1)
    elsewhere = run("elsewhere", data=folder, shots=1, training_data=tmp_path / SET)
    assert list(elsewhere["rows"]) == ROWS
    assert elsewhere["threshold_source"] == "fitted on the validation part (16 studies)"


def test_a_label_of_one_class_is_left_out_by_name(run, tmp_path, capsys):
    # A set whose rows deny all that they do not name.
    folder = tmp_path / "nih_chestxray14_sample"
    rows = write_rows(folder, {"train": {"tb": 4, "clear": 4}, "validation": {"tb": 3, "clear": 3}})
    for row in rows:
        row["labels"] = ["Edema", "Mass"] if row["labels"] == ["Tuberculosis"] else ["Mass"]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    metrics = run(data=folder)
    assert metrics["labels"] == ["edema"]
    assert metrics["skipped"]["mass"] == "one class only in the evaluated studies: 6 with it, 0 without"
    assert metrics["skipped"]["hernia"] == "one class only in the evaluated studies: 0 with it, 6 without"
    assert "Left out: mass: one class only in the evaluated studies: 6 with it" in capsys.readouterr().out


def test_labels_come_from_a_file(run, tmp_path):
    path = tmp_path / "labels.yaml"
    path.write_text("exclusive: true\ntb: {finding: 肺结核}\nnormal: {finding: No finding}\n", encoding="utf-8")
    metrics = run(labels=path, languages=["zh"])
    assert metrics["labels"] == ["tb", "normal"]
    assert (metrics["exclusive"], metrics["languages"]) == (True, ["zh"])
    for row in lines(tmp_path / "out" / "predictions.jsonl"):
        assert sum(row["probabilities"].values()) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shots": -1}, "shots to be 0, a number of studies or 'full', got -1"),
        ({"shots": "all"}, "got 'all'"),
        ({"shots": 9}, "No label can be scored.*learning needs 9 patients of each class"),
        ({"labels": ["tuberculosis"], "shots": 9}, "the training part has 8 patients with it and 12 without"),
        ({"labels": ["tubercolosis"]}, "expected for instance tuberculosis"),
        ({"labels": ["hernia"]}, "hernia: not annotated in the evaluated studies"),
        ({"languages": ["fr"]}, r"Unsupported languages \['fr'\]"),
        ({"languages": ["en", "en"]}, "each once"),
        ({"split": "train"}, "cannot be evaluated"),
    ],
)
def test_runs_that_cannot_be_scored_are_refused_before_embedding(run, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        run(**options)
    assert FakeReporter.calls == []
    assert not (tmp_path / "out").exists()


def test_the_table_is_markdown_and_pure(run):
    metrics = run()
    table = render_diagnosis_table(metrics).splitlines()
    assert table[0].startswith("| label | studies (with it) | system | AUROC [95 %] | AUPRC | F1 |")
    cells = [line.split(" | ")[:4] for line in table[2 : 2 + 3 * len(ROWS)]]
    assert [row[2] for row in cells] == [ROW_TITLES[row] for row in ROWS] * 3
    assert cells[0] == ["| No finding", "16 (10)", "model", "1.000 [1.000, 1.000]"]
    assert cells[-1][:2] == ["| macro average", "16"]
    assert table[-1].startswith("Decisions: thresholds cross-fitted")
    assert "macro" not in render_diagnosis_table(run("one", labels=["tuberculosis"]))


def test_a_checkpoint_is_evaluated_with_its_page(tiny_checkpoint, tmp_path):
    folder = tmp_path / SET
    write_rows(folder, {"train": {"tb": 3, "clear": 3}, "validation": {"tb": 3, "clear": 3}})
    generator = np.random.default_rng(0)
    for path in folder.glob("*.png"):
        Image.fromarray(generator.integers(256, size=(32, 32), dtype=np.uint8)).save(path)
    metrics = evaluate_diagnosis(tiny_checkpoint, folder, output_dir=tmp_path / "out", num_resamples=20)
    assert list(metrics["rows"]) == ROWS
    assert metrics["rows"]["blank_images"][MACRO]["auroc"] == 0.5
    assert (tmp_path / "out" / "report.html").is_file()


@pytest.mark.realdata
def test_real_tuberculosis_labels_are_found(data_root, run):
    metrics = run(data=data_root / SET, labels=["tuberculosis"])
    assert metrics["num_studies"]["tuberculosis"] == 75
