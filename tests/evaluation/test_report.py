# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
import json

import numpy as np
import pytest

import m3fm
from m3fm.data import Study
from m3fm.evaluation import report
from m3fm.evaluation.report import evaluate_parallel, evaluate_reports, generate_predictions, render_table

FINDINGS = {"clear": ("The lungs are clear.", "双肺清晰。"), "effusion": ("Left effusion is seen.", "左侧胸腔积液。")}
FINDINGS |= {
    "nodule": ("A nodule in the right lung.", "右肺结节影。"),
    "edema": ("Edema of both lungs.", "双肺水肿。"),
}


def study(index, split, finding):
    reports = dict(zip(("en", "zh"), FINDINGS[finding], strict=True))
    return Study(f"{split}-{index}", "made_up", "cxr", (), None, reports, None, split)


class FakeReporter:
    """Reads the finding off the file name, and writes the right English and always the same Chinese report."""

    languages = ["en", "zh"]
    decoding_settings = {"num_beams": 3, "do_sample": False}
    calls: list[tuple[int, str]] = []

    def __init__(self, *arguments):
        pass

    def generate(self, studies, language):
        self.calls.append((len(studies), language))
        if language == "zh":
            return [FINDINGS["clear"][1]] * len(studies)
        return [FINDINGS[self.finding(each)][0] for each in studies]

    def embed_studies(self, studies):
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
                (data / name).write_bytes(b"")
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


def test_predictions_are_written_a_line_a_study(tmp_path):
    studies = [study(i, "validation", finding) for i, finding in enumerate(FINDINGS)]
    path = tmp_path / "predictions.jsonl"
    rows = generate_predictions(
        lambda batch, code: [f"{code} of {s.study_id}" for s in batch], studies, ["zh"], path, 3
    )
    assert rows == [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert rows[1] == {
        "study_id": "validation-1",
        "prediction": {"zh": "zh of validation-1"},
        "reference": {"zh": "左侧胸腔积液。"},
    }


def test_an_interrupted_run_goes_on_after_its_last_whole_line(tmp_path):
    studies = [study(i, "validation", "clear") for i in range(7)]
    path = tmp_path / "predictions.jsonl"
    seen = []

    def generate(batch, language):
        if len(seen) == 4 and interrupt:
            raise KeyboardInterrupt
        seen.extend(each.study_id for each in batch)
        return ["x"] * len(batch)

    interrupt = True
    with pytest.raises(KeyboardInterrupt):
        generate_predictions(generate, studies, ["en"], path, 2)
    before = path.read_bytes()
    assert before.count(b"\n") == 4
    path.write_bytes(before + '{"study_id": "validation-4", "prediction": {"en": "半'.encode()[:-1])
    interrupt = False
    rows = generate_predictions(generate, studies, ["en"], path, 2)
    assert [row["study_id"] for row in rows] == [each.study_id for each in studies]
    assert seen == [each.study_id for each in studies]
    assert path.read_bytes().startswith(before)
    assert path.read_bytes().count(b"\n") == 7
    generate_predictions(lambda *_: pytest.fail("computed again"), studies, ["en"], path, 2)


def test_damaged_predictions_and_wrong_generators_are_refused(tmp_path):
    studies = [study(0, "validation", "clear"), study(1, "validation", "edema")]
    path = tmp_path / "predictions.jsonl"
    with pytest.raises(ValueError, match="Expected 2 reports in 'en', got 1"):
        generate_predictions(lambda *_: ["one"], studies, ["en"], path, 2)
    with pytest.raises(ValueError, match="some that repeat"):
        generate_predictions(lambda *_: ["one"], studies[:1] * 2, ["en"], path, 2)
    with pytest.raises(ValueError, match="batch_size >= 1"):
        generate_predictions(lambda *_: ["one"], studies, ["en"], path, 0)
    path.write_text('{"study_id": "validation-0"}\nnot json\n')
    with pytest.raises(ValueError, match="line 2: expected a prediction"):
        generate_predictions(lambda *_: ["one"], studies, ["en"], path, 2)


def test_the_whole_run(folders, capsys):
    model, data, output = folders
    metrics = evaluate_reports(model, data, output_dir=output, batch_size=4)
    rows = metrics["rows"]
    assert list(rows) == list(report.ROW_TITLES)
    # It reads images in English: perfect, and worse on other patients' images. It does not in Chinese: no difference.
    assert rows["model"]["en"]["bleu_4"] == pytest.approx(1)
    assert rows["shuffled_images"]["en"]["bleu_4"] < 0.5
    assert rows["model"]["zh"] == pytest.approx(rows["shuffled_images"]["zh"])
    assert rows["model"]["zh"]["distinct"] == rows["constant_report"]["en"]["distinct"] == 0.1
    assert rows["nearest_neighbor_shared"]["zh"]["rouge_l"] == pytest.approx(1)
    assert rows["nearest_neighbor_tower"]["en"]["rouge_l"] == pytest.approx(1)
    assert rows["random_report"]["en"]["rouge_l"] < 0.7
    assert metrics["retrieval"]["image-en"]["forward"]["recall@1"] == 1
    assert metrics["retrieval"]["image-zh"]["forward"]["chance@1"] == pytest.approx((4 * 4 + 6 * 2) / 100)
    assert metrics["retrieval"]["en-zh"]["backward"]["recall@1"] == 1
    assert metrics["num_studies"] == {"en": 10, "zh": 10}
    assert set(metrics["constant"]["en"]) == {"report_sha256", "criterion"}
    assert "_train_" not in json.dumps(metrics)
    assert "new_patients" not in metrics
    written = json.loads((output / "metrics.json").read_text(encoding="utf-8"))
    assert written == json.loads(json.dumps(metrics))
    assert {"seed", "versions", "data_sha256", "model_sha256", "command", "decoding"} <= written.keys()
    assert written["decoding"] == FakeReporter.decoding_settings
    assert "--split validation" in written["command"]
    assert capsys.readouterr().out == render_table(metrics) + "\n"
    assert "secret" not in "".join(path.read_text(encoding="utf-8") for path in output.iterdir())


def test_a_second_run_only_scores(folders):
    model, data, output = folders
    first = evaluate_reports(model, data, ["en"], output, batch_size=4)
    assert FakeReporter.calls == [(4, "en"), (4, "en"), (2, "en")]
    assert evaluate_reports(model, data, ["en"], output, batch_size=4) == first
    assert len(FakeReporter.calls) == 3
    assert list(first["retrieval"]) == ["image-en"]


def test_the_output_of_another_run_is_refused(folders):
    model, data, output = folders
    evaluate_reports(model, data, ["en"], output)
    with pytest.raises(ValueError, match="another languages: expected another output folder"):
        evaluate_reports(model, data, ["en", "zh"], output)
    (model / "model.safetensors").write_bytes(b"other weights")
    with pytest.raises(ValueError, match="another model_sha256"):
        evaluate_reports(model, data, ["en"], output)
    (output / "run.json").unlink()
    with pytest.raises(ValueError, match=r"predictions.jsonl without run.json"):
        evaluate_reports(model, data, ["en"], output)


def test_changed_pixels_are_other_data(folders):
    model, data, output = folders
    evaluate_reports(model, data, ["en"], output)
    next(data.glob("*_validation_*")).write_bytes(b"other pixels")
    with pytest.raises(ValueError, match="another data_sha256"):
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
    assert list(new["rows"]) == ["model", "shuffled_images", "constant_report"]
    # All four are clear, so another's image changes nothing.
    assert new["rows"]["shuffled_images"]["en"]["bleu_4"] == pytest.approx(1)
    assert metrics["rows"]["shuffled_images"]["en"]["bleu_4"] < 1
    table = capsys.readouterr().out
    assert table.count("new patients (4) |") == 6
    assert "| zh | model, shuffled images, new patients (4) | 1.000 |" in table


def test_too_few_new_patients_are_counted_alone(folders):
    model, data, output = folders
    text = (data / "metadata.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) | {"patient_id": "secret-shared"} for line in text.splitlines()]
    rows[-1]["patient_id"] = "secret-new"
    (data / "metadata.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    metrics = evaluate_reports(model, data, ["en"], output)
    assert metrics["new_patients"] == {"rows": {}, "num_studies": {"en": 1}}


@pytest.mark.parametrize(
    ("languages", "split", "message"),
    [
        (["fr"], "validation", "Unsupported languages"),
        (["en", "en"], "validation", "each once"),
        (["en"], "train", "floors are chosen from its reports"),
        (["en"], "test", r"got 0; parts in the data: \['train', 'validation'\]"),
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


def test_parallel_texts_count_once_and_by_part(folders, capsys):
    model, data, _ = folders
    study_ids = [path.stem for path in sorted(data.glob("*_validation_*"))]
    rows = [
        {"study_id": study_id, "en": FINDINGS[study_id.split("_")[0]][0], "zh": FINDINGS[study_id.split("_")[0]][1]}
        for study_id in study_ids
    ]
    (data / "parallel_en_zh.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    metrics = evaluate_parallel(model, data)
    assert metrics["retrieval"]["en-zh"]["forward"]["recall@1"] == 1
    assert metrics["retrieval"]["en-zh"]["forward"]["num_items"] == len(FINDINGS)
    assert "| zh → en | 4 | 1.000 |" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no parallel texts in the part 'test'"):
        evaluate_parallel(model, data, split="test")


def test_the_table_is_markdown_and_pure():
    scores = {"bleu_1": 0.7, "bleu_2": 0.62, "bleu_3": 0.57, "bleu_4": 0.5184, "rouge_l": 0.69, "distinct": 1 / 72}
    way = {"recall@1": 0.1, "chance@1": 0.014, "recall@10": 0.5, "chance@10": 0.14, "median_rank": 10.5}
    way |= {"num_queries": 72, "num_items": 72}
    metrics = {
        "rows": {"model": {"en": scores, "zh": scores}, "constant_report": {"en": scores, "zh": scores}},
        "retrieval": {"image-en": {"forward": way, "backward": way}},
    }
    assert render_table(metrics).splitlines() == [
        "| language | reports | bleu_1 | bleu_2 | bleu_3 | bleu_4 | rouge_l | distinct |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        "| en | model | 0.700 | 0.620 | 0.570 | 0.518 | 0.690 | 0.014 |",
        "| en | constant report | 0.700 | 0.620 | 0.570 | 0.518 | 0.690 | 0.014 |",
        "| zh | model | 0.700 | 0.620 | 0.570 | 0.518 | 0.690 | 0.014 |",
        "| zh | constant report | 0.700 | 0.620 | 0.570 | 0.518 | 0.690 | 0.014 |",
        "",
        "| retrieval | items | recall@1 | chance@1 | recall@10 | chance@10 | median rank |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| image → en | 72 | 0.100 | 0.014 | 0.500 | 0.140 | 10.5 |",
        "| en → image | 72 | 0.100 | 0.014 | 0.500 | 0.140 | 10.5 |",
    ]
    assert render_table({}) == ""


def test_command_of_the_shipped_checkpoint_names_no_path():
    options = {"split": "validation", "num_beams": None}
    command = report._command(m3fm.DEFAULT_CHECKPOINT, "../data/set", ["en", "zh"], "out", options)
    assert command == (
        "m3fm evaluate --task report --data ../data/set --language en zh --output out --split validation"
    )
    assert "--model runs/mine" in report._command("runs/mine", "../data/set", ["en"], "out", {})
