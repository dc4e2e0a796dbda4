# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
import json

import numpy as np
import pytest
from PIL import Image

from m3fm.evaluation import report
from m3fm.evaluation.report import ReportMetrics, evaluate_reports
from m3fm.evaluation.reporter import hash_checkpoint
from m3fm.evaluation.resampling import mean_measurement
from m3fm.evaluation.tables import render_table

FINDINGS = {"clear": ("The lungs are clear.", "双肺清晰。"), "effusion": ("Left effusion is seen.", "左侧胸腔积液。")}
FINDINGS |= {
    "nodule": ("A nodule in the right lung.", "右肺结节影。"),
    "edema": ("Edema of both lungs.", "双肺水肿。"),
}


def write_image(path, level):
    Image.fromarray(np.add.outer(np.arange(32), np.full(32, level)).astype(np.uint8)).save(path)


class FakeReporter:
    """Reads the finding off the file name, and writes the right English and always the same Chinese report."""

    languages = ["en", "zh"]
    decoding_settings = {"num_beams": 3, "do_sample": False}
    calls: list[tuple[int, str]] = []

    def __init__(self, *arguments):
        pass

    def generate(self, studies, language, control=None):
        self.calls.append((len(studies), language))
        if language == "zh" or control is not None:
            return [FINDINGS["clear"][("en", "zh").index(language)]] * len(studies)
        return [FINDINGS[self.finding(each)][0] for each in studies]

    def embed_studies(self, studies, control=None):
        return {space: self.one_hot(map(self.finding, studies)) for space in ("shared", "tower")}

    def embed_texts(self, texts):
        return self.one_hot(next(key for key, pair in FINDINGS.items() if text in pair) for text in texts)

    @staticmethod
    def finding(each):
        return each.images[0].stem.split("_")[0]

    @staticmethod
    def one_hot(findings):
        return np.stack([np.eye(len(FINDINGS))[list(FINDINGS).index(finding)] for finding in findings])


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """A data folder with every finding in both parts, a checkpoint folder, an output folder; the fake in between."""
    data, model = tmp_path / "data", tmp_path / "model"
    data.mkdir()
    model.mkdir()
    (model / "config.json").write_text("{}")
    rows = []
    for split, repeats in (("train", 3), ("validation", 2)):
        for finding in [*FINDINGS, "clear"]:
            for repeat in range(repeats):
                name = f"{finding}_{split}_{len(rows)}_{repeat}.png"
                write_image(data / name, len(rows))
                english, chinese = FINDINGS[finding]
                row = {
                    "file_name": name,
                    "modality": "cxr",
                    "report_en": english,
                    "report_zh": chinese,
                    "split": split,
                }
                rows.append(row | {"patient_id": f"secret-{len(rows)}"})
    (data / "metadata.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    monkeypatch.setattr(report, "CheckpointReporter", FakeReporter)
    monkeypatch.setattr(FakeReporter, "calls", [])
    return model, data, tmp_path / "out"


@pytest.fixture
def no_page(monkeypatch):
    """Leaves the page out, which takes longer than all the rest of a run."""
    monkeypatch.setattr(report, "write_page", lambda output, studies: output / "report.html")


def test_the_whole_run(folders, capsys):
    model, data, output = folders
    metrics = evaluate_reports(model, data, output_dir=output, batch_size=4)
    rows = metrics["rows"]
    controls, floors = ["shuffled_images", "blank_images", "noise_images"], ["constant_report", "random_report"]
    assert list(rows) == ["model", *controls, *floors, "nearest_neighbor_shared", "nearest_neighbor_tower"]
    # It reads images in English: perfect, and worse on other patients' images. It does not in Chinese: no difference.
    assert rows["model"]["en"]["bleu_4"] == pytest.approx(1)
    assert rows["model"]["en"]["finding_f1_micro"] == 1
    assert rows["shuffled_images"]["en"]["bleu_4"] < 0.5
    assert rows["blank_images"]["en"]["distinct"] == 0.1
    assert rows["model"]["zh"] == pytest.approx(rows["shuffled_images"]["zh"])
    assert rows["model"]["zh"]["distinct"] == rows["constant_report"]["en"]["distinct"] == 0.1
    assert rows["nearest_neighbor_shared"]["zh"]["rouge_l"] == pytest.approx(1)
    assert rows["nearest_neighbor_tower"]["en"]["rouge_l"] == pytest.approx(1)
    assert rows["random_report"]["en"]["rouge_l"] < 0.7
    assert metrics["retrieval"]["image-en"]["forward"]["recall@1"] == 1
    assert metrics["retrieval"]["image-zh"]["forward"]["chance@1"] == pytest.approx((4 * 4 + 6 * 2) / 100)
    assert metrics["retrieval"]["en-zh"]["backward"]["recall@1"] == 1
    assert metrics["num_studies"] == metrics["num_groups"] == {"en": 10, "zh": 10}
    assert metrics["floors_from"] == {"en": "training part", "zh": "training part"}
    assert metrics["findings"]["en"]["pleural_effusion"] == {
        "precision": 1, "recall": 1, "f1": 1, "support": 2, "predicted": 2
    }  # fmt: skip
    assert set(metrics["constant"]["en"]) == {"report_sha256", "criterion"}
    assert "new_patients" not in metrics
    assert capsys.readouterr().out.startswith(render_table(metrics) + "\n")


@pytest.mark.usefixtures("no_page")
def test_image_use_is_told_from_chance(folders):
    metrics = evaluate_reports(*folders[:2], output_dir=folders[2])
    for control in ("shuffled_images", "blank_images", "noise_images"):
        gap = metrics["differences"][control]["en"]["bleu_4"]
        assert 0 < gap["low"] < gap["difference"] < gap["high"]
        assert gap["p_value"] < 0.05
        for blind in metrics["differences"][control]["zh"].values():
            assert blind["difference"] is None or blind["low"] <= 0 <= blind["high"] or np.isnan(blind["low"])


def test_what_is_written_lets_the_numbers_be_made_again(folders):
    model, data, output = folders
    metrics = evaluate_reports(model, data, output_dir=output)
    written = json.loads((output / "metrics.json").read_text(encoding="utf-8"))
    assert written["rows"]["model"] == metrics["rows"]["model"]
    assert {"seed", "versions", "data_sha256", "model_sha256", "command", "decoding", "notice"} <= written.keys()
    assert written["decoding"] == FakeReporter.decoding_settings
    assert "--split validation" in written["command"]
    rows = [json.loads(line) for line in (output / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["group"] for row in rows] == list(range(10))
    assert rows[0].keys() == {"study_id", "group", "prediction", "reference", "controls"}
    assert rows[0]["controls"]["noise_images"].keys() == {"en", "zh"}
    assert (output / "report.html").is_file()
    assert "_train_" not in json.dumps(metrics)
    files = [path for path in output.rglob("*") if path.is_file()]
    assert b"secret" not in b"".join(path.read_bytes() for path in files)


class FakeBertScorer:
    """Finds all reports alike."""

    def __init__(self, model_dir):
        self.model_dir = model_dir

    def measure(self, predictions, references):
        return mean_measurement({"bertscore_f1": np.ones(len(references))})


@pytest.mark.usefixtures("no_page")
def test_the_encoder_of_bertscore_is_told_by_its_hash(folders):
    model, data, output = folders
    assert "bertscore_model_sha256" not in evaluate_reports(model, data, ["en"], output)
    metrics = ReportMetrics(bertscore=FakeBertScorer(model), num_resamples=10)
    found = evaluate_reports(model, data, ["en"], output, metrics=metrics)
    assert found["rows"]["model"]["en"]["bertscore_f1"] == 1
    assert found["bertscore_model_sha256"] == hash_checkpoint(model)


@pytest.mark.usefixtures("no_page")
def test_a_second_run_only_scores(folders, monkeypatch):
    model, data, output = folders
    first = evaluate_reports(model, data, ["en"], output, batch_size=4)
    assert [size for size, _ in FakeReporter.calls] == [4, 4, 4, 4, 4, 4, 2, 2, 2]
    monkeypatch.setattr(FakeReporter, "embed_studies", lambda *_: pytest.fail("embedded again"))
    second = evaluate_reports(model, data, ["en"], output, batch_size=4)
    assert json.dumps(second) == json.dumps(first)
    assert len(FakeReporter.calls) == 9
    assert list(first["retrieval"]) == ["image-en"]


@pytest.mark.usefixtures("no_page")
def test_two_runs_with_one_seed_are_identical(folders, tmp_path):
    model, data, _ = folders
    made = []
    for name in ("first", "second"):
        metrics = evaluate_reports(model, data, output_dir=tmp_path / name, seed=3)
        made.append(json.dumps(metrics).replace(str(tmp_path / name), "out"))
    assert made[0] == made[1]


def test_a_set_without_a_training_part_takes_its_floors_from_other_patients(folders):
    model, data, output = folders
    rows = [json.loads(line) for line in (data / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    held = [row | {"split": "test"} for row in rows if row["split"] == "validation"]
    (data / "metadata.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in held))
    metrics = evaluate_reports(model, data, output_dir=output)
    assert metrics["split"] == "test"
    assert metrics["floors_from"]["en"] == "other patients of the evaluated part"
    # Every finding is there twice, so the nearest other patient has the same report.
    assert metrics["rows"]["nearest_neighbor_shared"]["en"]["rouge_l"] == pytest.approx(1)
    assert metrics["rows"]["random_report"]["en"]["rouge_l"] < 0.7
    for row in held:
        row["patient_id"] = "secret-one"
    (data / "metadata.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in held))
    with pytest.raises(ValueError, match="at least two patients"):
        evaluate_reports(model, data, output_dir=output.with_name("other"))


def test_languages_without_references_are_left_out_unless_asked_for(folders):
    model, data, output = folders
    rows = [json.loads(line) for line in (data / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    for row in rows:
        del row["report_zh"]
    (data / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    with pytest.raises(ValueError, match=r"at least 2 studies with an image and a report .* got \{'zh': 0\}"):
        evaluate_reports(model, data, ["zh"], output)
    assert evaluate_reports(model, data, output_dir=output)["languages"] == ["en"]


@pytest.mark.usefixtures("no_page")
def test_the_output_of_another_run_is_refused(folders):
    model, data, output = folders
    evaluate_reports(model, data, ["en"], output)
    with pytest.raises(ValueError, match="another languages: expected another output folder"):
        evaluate_reports(model, data, ["en", "zh"], output)
    (model / "model.safetensors").write_bytes(b"other weights")
    with pytest.raises(ValueError, match="another model_sha256"):
        evaluate_reports(model, data, ["en"], output)


@pytest.mark.usefixtures("no_page")
def test_changed_pixels_are_other_data(folders):
    model, data, output = folders
    evaluate_reports(model, data, ["en"], output)
    write_image(next(data.glob("*_validation_*")), 200)
    with pytest.raises(ValueError, match="another data_sha256"):
        evaluate_reports(model, data, ["en"], output)


@pytest.mark.usefixtures("no_page")
@pytest.mark.parametrize("change", ["rows in another order", "other patients"])
def test_kept_features_and_groups_are_not_taken_for_those_of_others(folders, change):
    model, data, output = folders
    evaluate_reports(model, data, ["en"], output)
    path = data / "metadata.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows = rows[::-1] if change == "rows in another order" else [row | {"patient_id": "secret-one"} for row in rows]
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    with pytest.raises(ValueError, match="another order_sha256"):
        evaluate_reports(model, data, ["en"], output)


def test_studies_of_new_patients_are_scored_alone_too(folders, capsys):
    model, data, output = folders
    rows = [json.loads(line) for line in (data / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    # A training image without report teaches a patient too.
    rows[0] |= {"report_en": None, "report_zh": None, "patient_id": "secret-shared"}
    for row in rows:
        if row["split"] == "validation" and row["report_en"] != FINDINGS["clear"][0]:
            row["patient_id"] = "secret-shared"
    (data / "metadata.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    metrics = evaluate_reports(model, data, output_dir=output)
    assert metrics["num_studies"] == {"en": 10, "zh": 10}
    new = metrics["new_patients"]
    assert new["num_studies"] == {"en": 4, "zh": 4}
    assert list(new["rows"]) == ["model", "shuffled_images", "blank_images", "noise_images", "constant_report"]
    # All four are clear, so another's image changes nothing.
    assert new["rows"]["shuffled_images"]["en"]["bleu_4"] == pytest.approx(1)
    assert metrics["rows"]["shuffled_images"]["en"]["bleu_4"] < 1
    table = capsys.readouterr().out
    assert table.count("new patients (4) |") == 10


def test_too_few_new_patients_are_counted_alone(folders):
    model, data, output = folders
    text = (data / "metadata.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) | {"patient_id": "secret-shared"} for line in text.splitlines()]
    rows[-1]["patient_id"] = "secret-new"
    (data / "metadata.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    metrics = evaluate_reports(model, data, ["en"], output)
    assert metrics["new_patients"]["rows"] == {}
    assert metrics["new_patients"]["num_studies"] == {"en": 1}


@pytest.mark.parametrize(
    ("languages", "split", "message"),
    [
        (["fr"], "validation", "Unsupported languages"),
        (["en", "en"], "validation", "each once"),
        (["en"], "train", "floors and probes learn from it"),
        (["en"], "test", r"parts in the data: \['train', 'validation'\]"),
    ],
)
def test_runs_that_cannot_be_scored_are_refused_before_generating(folders, languages, split, message):
    model, data, output = folders
    with pytest.raises(ValueError, match=message):
        evaluate_reports(model, data, languages, output, split=split)
    assert FakeReporter.calls == []
    assert not output.exists()


def test_a_folder_without_checkpoint_is_refused(tmp_path, folders):
    _, data, output = folders
    with pytest.raises(ValueError, match=r"expected a folder with config.json"):
        evaluate_reports(tmp_path / "missing", data, ["en"], output)
