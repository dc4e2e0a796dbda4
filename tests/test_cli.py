# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""The command line: output, bad input, exit codes, and what it must not load or leave behind."""

import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import m3fm_cli
from m3fm import M3FMReportPipeline, cli
from m3fm.hub import export_remote_code
from m3fm_cli import NOTICE, main
from tests.phantoms import ct_volume, radiograph_pixels

ROOT = Path(__file__).parents[1]
SHORT = ["--max-new-tokens", "6"]


@pytest.fixture(autouse=True)
def _settings_of_transformers() -> Iterator[None]:
    yield
    transformers.logging.set_verbosity_warning()
    transformers.logging.enable_progress_bar()


@pytest.fixture
def image(tmp_path) -> Path:
    path = tmp_path / "chest 肺.png"
    Image.fromarray(radiograph_pixels()).save(path)
    return path


@pytest.fixture
def others(tmp_path) -> list[Path]:
    """Two more files, each another image."""
    paths = [tmp_path / "second.png", tmp_path / "third.png"]
    for seed, path in enumerate(paths, start=1):
        Image.fromarray(radiograph_pixels(seed)).save(path)
    return paths


@pytest.fixture
def report(tiny_checkpoint, capsys) -> Callable[..., tuple[int, str, str]]:
    def run(*words: object) -> tuple[int, str, str]:
        code = main(["report", *map(str, words), "--model", str(tiny_checkpoint), *SHORT])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def spawn(*words: object, **settings) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "m3fm", *map(str, words)], env=environment, stderr=subprocess.PIPE, **settings
    )


# --------------------------------------------------------------------------------------------------------------------
# report


def test_json_is_what_the_pipeline_gives(report, image, tiny_checkpoint):
    code, out, err = report(image, "--language", "both", "--format", "json")
    write = transformers.pipeline("m3fm-report", model=str(tiny_checkpoint))
    expected = write(str(image), language="both", generate_kwargs={"max_new_tokens": 6})
    assert code == 0
    assert json.loads(out) == [{"source": str(image), **expected}]
    assert list(json.loads(out)[0]) == ["source", "modality", "report_en", "report_zh", "input_check"]
    assert err == f"{NOTICE}\n"
    assert "肺" in out  # text, not escapes


def test_text_has_a_block_for_each_file(report, image, tmp_path):
    volume = tmp_path / "ct.nii"
    nibabel = pytest.importorskip("nibabel")
    affine = np.diag([-8.0, -8.0, 10.0, 1.0])
    nibabel.save(nibabel.Nifti1Image(ct_volume().transpose(2, 1, 0), affine), volume)
    code, out, err = report(image, volume, "--language", "both")
    blocks = out.removesuffix("\n\n").split("\n\n")
    assert code == 0
    assert [block.splitlines()[0] for block in blocks] == [str(image), f"{volume} (ct)"]
    assert all("\n  English\n    " in block and "\n  中文\n    " in block for block in blocks)
    assert err == f"{NOTICE}\n"


def test_each_format_and_batch_size_tells_the_same(report, image, others, tmp_path):
    files = [image, tmp_path / "absent.png", *others]
    _, out, _ = report(*files, "--format", "json")
    rows = json.loads(out)
    _, out, _ = report(*files, "--format", "jsonl", "--batch-size", "1")
    assert [json.loads(line) for line in out.splitlines()] == rows
    assert [row["source"] for row in rows] == [str(file) for file in files]
    assert rows[1] == {"source": str(files[1]), "error": "no such file"}


def test_output_file(report, image, tmp_path):
    output = tmp_path / "reports.jsonl"
    output.write_text("old\n" * 100, encoding="utf-8")
    words = [image, "--language", "zh", "--format", "jsonl", "--output", output]
    code, _, err = report(*words)
    assert code == 2 and f"error: {output} exists" in err
    assert output.read_text(encoding="utf-8") == "old\n" * 100
    code, out, err = report(*words, "--overwrite")
    assert (code, out) == (0, "")
    assert [set(json.loads(line)) for line in output.read_text(encoding="utf-8").splitlines()] == [
        {"source", "modality", "report_zh", "input_check"}
    ]
    assert f"1 of 1 studies reported in {output}" in err


def test_downloaded_addresses_are_studies_in_the_order_given(report, image, others, monkeypatch):
    files = {"https://a.org/z?token=s3cret": others[0], "https://a.org/metadata.jsonl": image}
    pages = {"https://a.org/login": b"<html>log in</html>"}
    content = {address: path.read_bytes() for address, path in files.items()} | pages
    monkeypatch.setattr(cli, "download", content.__getitem__)
    code, out, err = report("--download", *content, "--format", "json")
    rows = json.loads(out)
    assert [row["source"] for row in rows] == [
        "https://a.org/z",
        "https://a.org/metadata.jsonl",
        "https://a.org/login",
    ]
    assert code == 2 and ["error" in row for row in rows] == [False, False, True]
    assert "s3cret" not in out + err


def test_wrong_options_keep_the_earlier_output(report, image, tmp_path):
    output = tmp_path / "reports.txt"
    output.write_text("mine", encoding="utf-8")
    code, _, err = report(image, "--language", "fr", "--output", output)
    assert code == 2
    assert err == f"{NOTICE}\nerror: Unsupported language ['fr']: expected one of ['en', 'zh', 'both'].\n"
    assert output.read_text(encoding="utf-8") == "mine"
    assert report(image, "--output", image)[0] == 2
    assert report(image, "--output", tmp_path)[0] == 2
    code, _, err = report(image, "--output", tmp_path / "absent" / "out.txt")
    assert code == 2 and "expected a file in a folder that exists" in err
    with Image.open(image) as left:
        left.load()


def bad_files(folder: Path) -> dict[str, str]:
    """Makes one file of each bad kind, and returns what has to be said of it."""
    good = Image.fromarray(radiograph_pixels())
    good.save(folder / "whole.png")
    whole = (folder / "whole.png").read_bytes()
    (folder / "empty.png").write_bytes(b"")
    (folder / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (folder / "text.png").write_text("The lungs are clear.", encoding="utf-8")
    Image.new("L", (40, 40), 128).save(folder / "constant.png")
    (folder / "half.nii.gz").write_bytes(b"\x1f\x8b\x08\x00")
    return {
        "absent.png": "no such file",
        "empty.png": "empty file (0 bytes)",
        "truncated.png": "truncated or damaged PNG file",
        "text.png": "not a readable image",
        "constant.png": "there is nothing to see",
        "half.nii.gz": "nibabel" if not _installed("nibabel") else "truncated or damaged gzip file",
    }


def _installed(package: str) -> bool:
    try:
        __import__(package)
    except ImportError:
        return False
    return True


def test_bad_files_are_named_with_the_reason_and_the_good_reported(report, image, tmp_path):
    reasons = bad_files(tmp_path)
    files = [str(tmp_path / name) for name in reasons]
    code, out, err = report(image, *files, "--format", "json", "--batch-size", "3")
    rows = {row["source"]: row for row in json.loads(out)}
    assert code == 2
    assert set(rows[str(image)]) == {"source", "modality", "report_en", "input_check"}
    for file, reason in zip(files, reasons.values(), strict=True):
        assert reason in rows[file]["error"]
        assert f"error: {file}: {rows[file]['error']}\n" in err
        assert file not in rows[file]["error"]
    assert "Traceback" not in err
    code, out, err = report(*files)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == len(files) + 1  # the notice


def test_dicom_without_pixels_and_no_patient_in_any_output(report, tmp_path):
    pydicom = pytest.importorskip("pydicom")
    data = pydicom.Dataset()
    data.PatientName, data.PatientID, data.PatientBirthDate = "Doe^Jane", "MRN-4711", "19700102"
    data.Modality, data.SOPClassUID, data.SOPInstanceUID = "DX", "1.2.840.10008.5.1.4.1.1.1.1", "1.2.3"
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    data.save_as(tmp_path / "report.dcm", enforce_file_format=True)
    data.Rows, data.Columns = 96, 80
    data.BitsAllocated = data.BitsStored = 8
    data.HighBit, data.SamplesPerPixel, data.PixelRepresentation = 7, 1, 0
    data.PhotometricInterpretation = "MONOCHROME2"
    data.PixelData = radiograph_pixels().tobytes()
    data.save_as(tmp_path / "image.dcm", enforce_file_format=True)
    code, out, err = report(tmp_path / "report.dcm", tmp_path / "image.dcm", "--format", "json")
    bad, good = json.loads(out)
    assert code == 2
    assert "DICOM without pixel data" in bad["error"]
    assert f"error: {tmp_path / 'report.dcm'}: DICOM without pixel data" in err
    assert good["modality"] == "cxr" and "report_en" in good
    assert not [secret for secret in ("Doe", "Jane", "4711", "1970") if secret in out + err]


@pytest.mark.parametrize(
    ("model", "reason"),
    [("absent", "is not a checkpoint"), ("empty", "is not a checkpoint"), ("damaged", "the model cannot be loaded")],
)
def test_wrong_model_folder(model, reason, image, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.json").write_text(
        '{"model_type": "m3fm", "projection_dim": "x"}', encoding="utf-8"
    )
    assert main(["report", str(image), "--model", str(tmp_path / model)]) == 2
    err = capsys.readouterr().err.removeprefix(f"{NOTICE}\n")
    assert err.startswith(f"error: {tmp_path / model}") and reason in err


def test_wrong_device(report, image):
    code, _, err = report(image, "--device", "abacus")
    assert code == 2 and err.startswith(f"{NOTICE}\nerror: --device 'abacus' cannot be used here")


def test_traceback_on_request(image, tmp_path):
    with pytest.raises(ValueError, match="is not a checkpoint"):
        main(["--traceback", "report", str(image), "--model", str(tmp_path / "absent")])


def test_traceback_may_follow_the_command(image, tmp_path):
    with pytest.raises(ValueError, match="is not a checkpoint"):
        main(["report", str(image), "--traceback", "--model", str(tmp_path / "absent")])
    with pytest.raises(ValueError, match="No recipe 'absent'"):
        main(["train", "absent", "--seed", "3", "--traceback"])
    with pytest.raises(ValueError, match="No recipe 'absent'"):
        main(["--traceback", "train", "absent"])


def test_interrupted_list_is_json_with_what_was_finished(report, image, others, monkeypatch):
    def stopped(self: M3FMReportPipeline, files: Iterator[Path], **settings: object) -> Iterator[dict]:
        for file in files:
            yield {"modality": None, "report_en": f"of {file}"}
            raise KeyboardInterrupt

    monkeypatch.setattr(M3FMReportPipeline, "__call__", stopped)
    code, out, err = report(image, *others, "--format", "json")
    assert code == 130
    assert json.loads(out) == [{"source": str(image), "modality": None, "report_en": f"of {image}"}]
    assert err.endswith("interrupted\n")


def test_progress_bar_only_for_several_files_on_a_terminal(report, image, others, monkeypatch):
    assert "study" not in report(image, *others)[2].removeprefix(NOTICE)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert "3/3" in report(image, *others)[2]
    assert "1/1" not in report(image)[2]


def test_folder_with_remote_code_needs_no_trust_here(image, tiny_checkpoint, tmp_path, capsys):
    folder = export_remote_code(tiny_checkpoint, tmp_path / "exported")
    assert main(["report", str(image), "--model", str(folder), "--format", "jsonl", *SHORT]) == 0
    exported = capsys.readouterr().out
    assert main(["report", str(image), "--model", str(tiny_checkpoint), "--format", "jsonl", *SHORT]) == 0
    assert capsys.readouterr().out == exported


def test_whole_command_in_a_process_of_its_own(tiny_checkpoint, image, tmp_path):
    words = ["report", image, tmp_path / "absent.png", "--language", "zh", "--format", "jsonl", *SHORT]
    process = spawn(*words, "--model", tiny_checkpoint, stdout=subprocess.PIPE, cwd=tmp_path)
    out, err = process.communicate(timeout=120)
    good, bad = (json.loads(line) for line in out.decode().splitlines())
    assert process.returncode == 2
    assert set(good) == {"source", "modality", "report_zh", "input_check"} and set(bad) == {"source", "error"}
    # Nothing of transformers' own chatter.
    assert err.decode().splitlines() == [NOTICE, f"error: {tmp_path / 'absent.png'}: {bad['error']}"]


def into_pipe(words: list[str], pipe: int, errors: Path) -> None:
    """Runs the command in a child, with what an interpreter does at its end."""
    torch.set_num_threads(1)
    sys.stdout, sys.stderr = open(pipe, "w"), errors.open("w")  # noqa: SIM115 - they are the child's
    code = main(words)
    sys.stdout.flush()
    sys.exit(code)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="pipes close otherwise there")
def test_reader_that_goes_away_is_no_error(tiny_checkpoint, image, others, tmp_path):
    words = ["report", image, *others, "--batch-size", 1, *SHORT, "--model", tiny_checkpoint]
    reader, writer = os.pipe()
    os.close(reader)
    arguments = ([str(word) for word in words], writer, tmp_path / "errors")
    process = multiprocessing.get_context("fork").Process(target=into_pipe, args=arguments)
    process.start()
    os.close(writer)
    process.join(120)
    assert process.exitcode == 141
    assert (tmp_path / "errors").read_text().splitlines() == [NOTICE]


# --------------------------------------------------------------------------------------------------------------------
# help and options


@pytest.mark.parametrize("words", [["--help"], ["report", "--help"], ["report", "a.png", "--colour"], ["report"], []])
def test_help_and_option_errors_load_nothing(words):
    code = (
        "import sys, m3fm_cli\ntry:\n    m3fm_cli.main(sys.argv[1:])\nfinally:\n    assert 'torch' not in sys.modules"
    )
    run = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == (0 if "--help" in words else 2)
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize(
    "command", ["report", "diagnose", "calibrate", "explain", "train", "evaluate", "compare", "export"]
)
def test_help_teaches(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0
    assert text.count(f"\n  m3fm {command} ") >= 3
    assert "exit codes:" in text


def test_help_of_report_names_fields_and_purpose(capsys):
    with pytest.raises(SystemExit):
        main(["report", "--help"])
    text = capsys.readouterr().out
    assert NOTICE in text
    assert all(
        f"\n  {field} " in text for field in ("source", "modality", "report_en", "report_zh", "input_check", "error")
    )


@pytest.mark.parametrize(
    "words",
    [["report", "a.png", "--batch-size", "0"], ["report", "a.png", "--format", "xml"], ["evaluate", "--task", "x"]],
)
def test_wrong_option_is_a_usage_error(words, capsys):
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_every_command_is_done_somewhere():
    commands = {"report", "diagnose", "calibrate", "explain", "train", "evaluate", "compare", "export", "data"}
    assert set(cli.COMMANDS) == commands


# --------------------------------------------------------------------------------------------------------------------
# train, evaluate, compare, export


def test_train_passes_settings_on(tmp_path, monkeypatch, capsys):
    pytest.importorskip("yaml")
    from m3fm.training import recipe as recipes

    called = []

    def run_recipe(path: Path, overrides: list[str]) -> dict[str, str]:
        called.append((path, overrides))
        return {"output_dir": "runs/mine"}

    monkeypatch.setattr(recipes, "run_recipe", run_recipe)
    recipe = tmp_path / "mine.yaml"
    recipe.touch()
    assert main(["train", str(recipe), "--learning_rate", "1e-4", "--seed=3"]) == 0
    assert called[-1] == (recipe, ["--learning_rate", "1e-4", "--seed", "3"])
    assert capsys.readouterr().err == "results are in runs/mine\n"
    shipped = recipes.RECIPES / "tokenizer.yaml"
    for words in (["tokenizer", "--output_dir", "elsewhere"], ["--output_dir", "elsewhere", "tokenizer"]):
        assert main(["train", *words]) == 0
        assert called[-1] == (shipped, ["--output_dir", "elsewhere"])
    assert main(["train", "--seed=3", "tokenizer", "--output_dir", "elsewhere"]) == 0
    assert called[-1] == (shipped, ["--seed", "3", "--output_dir", "elsewhere"])
    assert main(["train", "--set", "seed=3", "a.b=x=y", "tokenizer", "--set=c=1", "--d", "-1", "--set", "e="]) == 0
    assert called[-1] == (shipped, ["--seed", "3", "--a.b", "x=y", "--c", "1", "--d", "-1", "--e", ""])


def test_train_plans_and_starts_nothing(monkeypatch, capsys):
    pytest.importorskip("yaml")
    from m3fm.training import plan, recipe

    called = []
    monkeypatch.setattr(recipe, "plan_recipe", lambda *given: called.append(given) or [])
    monkeypatch.setattr(plan, "format_plans", lambda plans, form: f"{form}\n")
    assert main(["train", "tokenizer", "--dry-run", "--set", "seed=3"]) == 0
    assert capsys.readouterr().out == "text\n"
    assert main(["train", "--dry-run", "--ranks", "8", "--tflops", "400", "--format", "json", "tokenizer"]) == 0
    assert capsys.readouterr().out == "json\n"
    path = recipe.RECIPES / "tokenizer.yaml"
    assert called == [(path, ["--seed", "3"], 1, None), (path, [], 8, 4e14)]
    for words in (["--format", "json"], ["--ranks", "2"], ["--tflops", "9"]):
        assert main(["train", "tokenizer", *words]) == 2
        assert "expected --dry-run beside them" in capsys.readouterr().err


def test_one_process_of_several_tells_an_error(monkeypatch, capsys):
    pytest.importorskip("yaml")
    waited = []
    monkeypatch.setenv("TQDM_DISABLE", "1")  # other processes have it set, and here it is to go again
    monkeypatch.setattr(m3fm_cli.time, "sleep", waited.append)
    for rank, told in (("0", "error: No recipe"), ("1", "error on rank 1: No recipe")):
        monkeypatch.setenv("RANK", rank)
        assert main(["train", "absent"]) == 2
        assert capsys.readouterr().err.startswith(told)
    assert len(waited) == 1, "the launcher ends it meanwhile"


def test_train_lists_and_refuses(capsys):
    pytest.importorskip("yaml")
    assert main(["train", "--list"]) == 0
    assert {line.split()[0] for line in capsys.readouterr().out.splitlines()} >= {"tokenizer", "align-small"}
    assert main(["train", "absent"]) == 2
    assert "No recipe 'absent'" in capsys.readouterr().err
    assert main(["train"]) == 2
    assert "m3fm train --list" in capsys.readouterr().err
    assert main(["train", "--output_dir", "elsewhere"]) == 2
    assert "Expected a recipe beside" in capsys.readouterr().err
    for words in (["--seed"], ["another"]):
        assert main(["train", "tokenizer", *words]) == 2
        assert "`--name value` pairs" in capsys.readouterr().err
    for words in (["--set"], ["--set", "seed"], ["--set", "=3"]):
        assert main(["train", "tokenizer", *words]) == 2
        assert "--set: expected name=value" in capsys.readouterr().err


def test_missing_extra_is_one_line(monkeypatch, capsys):
    def lacking(args: object) -> int:
        raise ImportError("sentencepiece is missing: pip install m3fm[train]")

    monkeypatch.setitem(cli.COMMANDS, "train", lacking)
    assert main(["train", "tokenizer"]) == 2
    assert capsys.readouterr().err == "error: sentencepiece is missing: pip install m3fm[train]\n"


@pytest.fixture
def evaluated(monkeypatch):
    """Returns what each kind of evaluation was called with, in place of running it."""
    from m3fm.evaluation import diagnosis, paper, parallel
    from m3fm.evaluation import report as reports

    called = []
    for module, name in (
        (reports, "evaluate_reports"),
        (diagnosis, "evaluate_diagnosis"),
        (parallel, "evaluate_parallel"),
        (paper, "run_paper_table"),
    ):
        monkeypatch.setattr(
            module, name, lambda *args, _name=name, **options: called.append((_name, args, options)), raising=True
        )
    return called


@pytest.mark.parametrize(
    ("words", "name", "options"),
    [
        ("--language en zh --seed 0", "evaluate_reports", {"languages": ["en", "zh"], "seed": 0}),
        ("--num-beams 2 --training-data x", "evaluate_reports", {"num_beams": 2, "training_data": "x"}),
        ("--task diagnosis --labels l.yaml --shots 0", "evaluate_diagnosis", {"labels": "l.yaml", "shots": 0}),
        ("--task diagnosis --labels edema 肺炎", "evaluate_diagnosis", {"labels": ["edema", "肺炎"]}),
        ("--task diagnosis --shots full --split test", "evaluate_diagnosis", {"shots": "full", "split": "test"}),
        ("--task parallel --split all", "evaluate_parallel", {"split": "all"}),
        ("--task paper --num-resamples 10 --recipe r", "run_paper_table", {"num_resamples": 10, "recipe": "r"}),
    ],
)
def test_evaluate_passes_options_on(tiny_checkpoint, tmp_path, evaluated, words, name, options):
    start = ["evaluate", "--model", str(tiny_checkpoint), "--data", str(tmp_path), "--output", "out"]
    assert main([*start, *words.split()]) == 0
    called, args, given = evaluated[-1]
    assert (called, args) == (name, (tiny_checkpoint, str(tmp_path)))
    given = {key: value for key, value in given.items() if key != "metrics" and value is not None}
    assert given == {"output_dir": "out", "batch_size": 8, "device": "cpu"} | options


def test_evaluate_makes_the_further_metrics(tiny_checkpoint, tmp_path, evaluated):
    start = ["evaluate", "--model", str(tiny_checkpoint), "--data", str(tmp_path)]
    assert main([*start, "--num-resamples", "50"]) == 0
    metrics = evaluated[-1][2]["metrics"]
    assert (metrics.num_resamples, metrics.java_meteor, metrics.bertscore) == (50, None, None)


def test_evaluate_refuses_what_does_not_fit(tiny_checkpoint, tmp_path, evaluated, capsys):
    start = ["evaluate", "--model", str(tiny_checkpoint), "--data", str(tmp_path)]
    assert main([*start, "--task", "parallel", "--num-beams", "2", "--shots", "0"]) == 2
    assert "--task parallel takes no --num-beams, --shots." in capsys.readouterr().err
    assert main([*start, "--labels", "x.yaml"]) == 2
    assert "--task report takes no --labels." in capsys.readouterr().err
    assert main([*start[:3], "--data", str(tmp_path / "absent")]) == 2
    assert "no such data folder" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*start, "--task", "diagnosis", "--shots", "some"])
    assert "expected 0, a whole number or full" in capsys.readouterr().err
    assert not evaluated


def test_compare_passes_options_on(monkeypatch):
    from m3fm.evaluation import compare

    called = []
    monkeypatch.setattr(compare, "compare_runs", lambda *args: called.append(args))
    assert main(["compare", "a", "b", "--output", "c.json"]) == 0
    assert called == [("a", "b", 1000, 0, "c.json")]


def test_export(tiny_checkpoint, tmp_path, capsys):
    words = ["export", "--model", str(tiny_checkpoint)]
    assert main([*words, str(tmp_path / "plain")]) == 0
    assert main([*words, str(tmp_path / "code"), "--remote-code"]) == 0
    assert not list((tmp_path / "plain").glob("*.py"))
    assert (tmp_path / "code" / "modeling_m3fm.py").is_file()
    capsys.readouterr()
    assert main([*words, str(tmp_path / "code")]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'code'} is not empty: expected a new or an empty folder.\n"


def test_half_precision_checkpoint_is_computed_in_full(report, image, tiny_checkpoint, tiny_model, monkeypatch):
    tiny_model.half().save_pretrained(tiny_checkpoint)
    seen = []
    monkeypatch.setattr(
        M3FMReportPipeline,
        "postprocess",
        lambda self, _, answer_params: seen.append(self.model.dtype) or [{"modality": None}],
    )
    assert report(image)[0] == 0
    assert seen == [torch.float32]
