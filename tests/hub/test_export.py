# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""The exported folder: what it holds, and that it gives the same numbers where m3fm is not installed."""

import json
import os
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification, AutoModelForImageTextToText, AutoProcessor, pipeline
from transformers.dynamic_module_utils import get_imports

from m3fm import DEFAULT_CHECKPOINT, M3FMImageProcessor, M3FMModel
from m3fm.diagnosis import default_diagnosis
from m3fm.diagnosis_pipeline_m3fm import M3FMDiagnosisPipeline
from m3fm.hub import export, export_checkpoint, export_remote_code
from tests.phantoms import radiograph_pixels

LABELS = ["the lungs are clear", "双肺纹理增多。"]
FINDINGS = (["tuberculosis", "normal", "pneumonia"], ["肺结核", "正常", "肺炎"])
CALIBRATION = {"calibration": {"scale": 0.5, "bias": 0.25}, "threshold": 0.5, "fitted_on": "made-up studies"}

# Runs without the repository on the path, and without any package that a bare install of transformers lacks.
SCRIPT = """
import sys

BLOCKED = {"m3fm", "pydicom", "nibabel", "sentencepiece", "datasets", "accelerate", "peft", "matplotlib", "sklearn",
           "pandas", "torchvision"}

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in BLOCKED else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]

import json
from pathlib import Path
import torch
from safetensors.torch import save_file
from transformers import (AutoConfig, AutoModel, AutoModelForImageClassification,
                          AutoModelForImageTextToText, AutoModelForZeroShotImageClassification, AutoProcessor,
                          AutoTokenizer, pipeline)
from transformers.models.auto.image_processing_auto import AutoImageProcessor

folder, output = sys.argv[1], Path(sys.argv[2])
images, labels, findings = (json.loads(each) for each in sys.argv[3:])
trust = {"trust_remote_code": True}
processor = AutoProcessor.from_pretrained(folder, **trust)
image_processor = AutoImageProcessor.from_pretrained(folder, **trust)
tokenizer = AutoTokenizer.from_pretrained(folder, **trust)
inputs = processor(images=images, text=labels, return_tensors="pt")
tensors = dict(inputs)
tensors["alone"] = image_processor(images, return_tensors="pt")["pixel_values"]
tensors["alone_ids"] = tokenizer(labels, padding=True, return_tensors="pt")["input_ids"]
model = AutoModel.from_pretrained(folder, **trust).eval()
torch.manual_seed(0)
classifier = AutoModelForImageClassification.from_pretrained(folder, **trust).eval()
writer = AutoModelForImageTextToText.from_pretrained(folder, **trust).eval()
with torch.no_grad():
    tensors["logits"] = model(**inputs).logits_per_image
    tensors["zero_shot"] = AutoModelForZeroShotImageClassification.from_pretrained(folder, **trust).eval()(
        **inputs).logits_per_image
    tensors["classes"] = classifier(
        inputs["pixel_values"], inputs["image_mask"], labels=torch.tensor([0, 1, 0])).logits
    tensors["written"] = writer.generate(inputs["pixel_values"], inputs["image_mask"], language="zh", max_new_tokens=6)
save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, output / "tensors.safetensors")
reporter = pipeline("m3fm-report", model=folder, **trust)
try:
    unnamed = pipeline(model=folder, **trust)
except RuntimeError as error:
    unnamed = str(error)
settings = {"language": "both", "generate_kwargs": {"max_new_tokens": 6}}
rows = reporter([*images, [images[0], images[1]]], batch_size=3, **settings)
zero_shot = pipeline("zero-shot-image-classification", model=folder, **trust)
diagnose = pipeline("m3fm-diagnosis", model=folder, **trust)
Path("chest.nii.gz").write_bytes(b"\\x1f\\x8b")
facts = {
    "rows": rows,
    "unnamed": unnamed,
    "scores": zero_shot(images[0], candidate_labels=labels, hypothesis_template="{}"),
    "missing_reader": reporter("chest.nii.gz", on_error="row"),
    "answers": [diagnose(images, candidate_labels=names, batch_size=2) for names in findings],
    "image_processor": list(AutoImageProcessor.from_pretrained("hub", **trust)(
        images="colour.png", return_tensors="pt")["pixel_values"].shape),
    "modules": sorted(name for name in sys.modules if name.partition(".")[0] in BLOCKED),
    "config": type(AutoConfig.from_pretrained(folder, **trust)).__module__,
}
(output / "facts.json").write_text(json.dumps(facts), encoding="utf-8")
"""


class Elsewhere(NamedTuple):
    """A checkpoint, images, and what they gave in a process without m3fm."""

    checkpoint: Path
    images: list[str]
    tensors: dict[str, torch.Tensor]
    facts: dict[str, Any]


@pytest.fixture(scope="module")
def elsewhere(saved_tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Elsewhere:
    """Runs `SCRIPT` once, as loading torch and transformers takes most of its time."""
    tmp_path = tmp_path_factory.mktemp("elsewhere")
    checkpoint = Path(shutil.copytree(saved_tiny, tmp_path / "tiny"))
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    table = default_diagnosis()
    table["tuberculosis"] |= CALIBRATION
    (checkpoint / "config.json").write_text(json.dumps(config | {"diagnosis": table}), encoding="utf-8")
    folder = export_remote_code(checkpoint, tmp_path / "exported-0.1")

    results = tmp_path / "results"
    results.mkdir()
    images = [str(tmp_path / "a.png"), str(tmp_path / "b.png"), str(tmp_path / "c.png")]
    Image.fromarray(radiograph_pixels(0)).save(images[0])
    Image.fromarray(radiograph_pixels(1).astype(np.uint16) * 240).save(images[1])
    Image.fromarray(radiograph_pixels(2)).save(images[2])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(M3FMImageProcessor, "_auto_class", "AutoImageProcessor")
        M3FMImageProcessor(size=32).save_pretrained(results / "hub")
    colours = np.random.default_rng(0).integers(0, 256, (60, 40, 3), dtype=np.uint8)
    Image.fromarray(colours).save(results / "colour.png")

    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "HF_"))}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    command = [sys.executable, "-I", str(tmp_path / "script.py"), str(folder), str(results)]
    run = subprocess.run(
        [*command, *(json.dumps(each) for each in (images, LABELS, FINDINGS))],
        cwd=results,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    facts = json.loads((results / "facts.json").read_text(encoding="utf-8"))
    return Elsewhere(checkpoint, images, load_file(results / "tensors.safetensors"), facts)


def test_folder_gives_the_same_without_m3fm(elsewhere):
    checkpoint, images, written, facts = elsewhere
    assert facts["modules"] == []
    assert facts["config"].startswith("transformers_modules.")

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        expected = installed_tensors(checkpoint, images)
        settings = {"language": "both", "generate_kwargs": {"max_new_tokens": 6}}
        reporter = pipeline("m3fm-report", model=str(checkpoint))
        rows = reporter([*images, [images[0], images[1]]], batch_size=3, **settings)
        zero_shot = pipeline("zero-shot-image-classification", model=str(checkpoint))
        scores = zero_shot(images[0], candidate_labels=LABELS, hypothesis_template="{}")
    finally:
        torch.set_num_threads(threads)
    assert set(written) == set(expected)
    assert [name for name in expected if not torch.equal(written[name], expected[name])] == []
    assert facts["rows"] == rows
    assert facts["unnamed"].endswith("Pick one in m3fm-report, m3fm-diagnosis")
    assert facts["scores"] == scores
    assert "nibabel" in facts["missing_reader"]["error"]


def test_folder_diagnoses_without_m3fm(elsewhere):
    model = AutoModelForImageTextToText.from_pretrained(elsewhere.checkpoint)
    here = M3FMDiagnosisPipeline(model=model, processor=AutoProcessor.from_pretrained(elsewhere.checkpoint))
    for names, rows in zip(FINDINGS, elsewhere.facts["answers"], strict=True):
        for row, expected in zip(rows, here(elsewhere.images, candidate_labels=names, batch_size=2), strict=True):
            assert scores(row) == pytest.approx(scores(expected), abs=1e-4)
            assert [each["calibrated"] for each in row["labels"]].count(True) == 1


def scores(row: dict[str, Any]) -> dict[str, float]:
    return {answer["label"]: answer["score"] for answer in row["labels"]}


def test_an_image_processor_alone_works_without_m3fm(elsewhere):
    assert elsewhere.facts["image_processor"] == [1, 1, 3, 32, 32]


def installed_tensors(checkpoint: Path, images: list[str]) -> dict[str, torch.Tensor]:
    processor = AutoProcessor.from_pretrained(checkpoint)
    inputs = processor(images=images, text=LABELS, return_tensors="pt")
    torch.manual_seed(0)
    classifier = AutoModelForImageClassification.from_pretrained(checkpoint).eval()
    writer = AutoModelForImageTextToText.from_pretrained(checkpoint).eval()
    pixels, mask = inputs["pixel_values"], inputs["image_mask"]
    with torch.no_grad():
        logits = M3FMModel.from_pretrained(checkpoint).eval()(**inputs).logits_per_image
        classes = classifier(pixels, mask, labels=torch.tensor([0, 1, 0])).logits
    return {
        **inputs,
        "alone": pixels,
        "alone_ids": inputs["input_ids"],
        "logits": logits,
        "zero_shot": logits,
        "classes": classes,
        "written": writer.generate(pixels, mask, language="zh", max_new_tokens=6),
    }


def test_checkpoint_alone_is_copied_without_the_rest_of_a_run(tiny_checkpoint, tmp_path):
    for name in ("optimizer.pt", "history.json"):
        (tiny_checkpoint / name).write_bytes(b"x")
    (tiny_checkpoint / "checkpoint-5").mkdir()
    folder = export_checkpoint(tiny_checkpoint, tmp_path / "new" / "folder")
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert all(path.read_bytes() == (tiny_checkpoint / path.name).read_bytes() for path in folder.iterdir())
    assert AutoModelForImageTextToText.from_pretrained(folder).num_parameters() > 0


def test_code_folder_holds_every_file_it_needs(tiny_checkpoint, tmp_path):
    folder = export_remote_code(tiny_checkpoint, tmp_path / "out")
    code = {path.name for path in folder.glob("*.py")}
    assert {
        "modeling_m3fm.py",
        "base_m3fm.py",
        "layers_m3fm.py",
        "imaging_m3fm.py",
        "chest_image_m3fm.py",
        "dicom_m3fm.py",
        "nifti_m3fm.py",
        "raster_m3fm.py",
        "series_m3fm.py",
        "input_check_m3fm.py",
        "read_ahead_m3fm.py",
    } <= code
    installed = {"torch", "transformers", "numpy", "PIL", "huggingface_hub", "safetensors"}  # by transformers
    allowed = set(sys.stdlib_module_names) | installed
    for name in code:
        assert set(get_imports(folder / name)) <= allowed, name
    assert (folder / "model.safetensors").read_bytes() == (tiny_checkpoint / "model.safetensors").read_bytes()
    assert {"LICENSE", "NOTICE"} <= {path.name for path in folder.iterdir()}


def test_every_class_named_in_the_folder_exists():
    maps = (export.MODEL_AUTO_MAP, export.IMAGE_PROCESSOR_AUTO_MAP, export.PROCESSOR_AUTO_MAP)
    names = [name for mapping in maps for name in mapping.values()]
    names += [task["impl"] for task in export.CUSTOM_PIPELINES.values()]
    for name in names:
        module, _, cls = name.partition(".")
        assert isinstance(getattr(import_module(f"m3fm.{module}"), cls), type)


@pytest.mark.parametrize("write", [export_checkpoint, export_remote_code])
def test_nothing_is_overwritten(write, tiny_checkpoint, tmp_path):
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("keep", encoding="utf-8")
    with pytest.raises(ValueError, match="full is not empty"):
        write(tiny_checkpoint, full)
    with pytest.raises(ValueError, match=r"mine\.txt is a file"):
        write(tiny_checkpoint, full / "mine.txt")
    assert [path.name for path in full.iterdir()] == ["mine.txt"]
    empty = tmp_path / "empty"
    empty.mkdir()
    assert (write(tiny_checkpoint, empty) / "config.json").is_file()


def test_failed_export_leaves_nothing(tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "_legal_files", lambda: [tmp_path / "absent"])
    with pytest.raises(FileNotFoundError):
        export_remote_code(tiny_checkpoint, tmp_path / "out" / "folder")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda folder: (folder / "tokenizer.json").unlink(), r"tokenizer\.json not found"),
        (lambda folder: (folder / "generation_config.json").unlink(), r"generation_config\.json not found"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"safetensors not found"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "clip"}', encoding="utf-8"), "'clip'"),
        (lambda folder: (folder / "config.json").write_text("{", encoding="utf-8"), "expected a JSON object"),
        (lambda folder: (folder / "processor_config.json").write_text("{}", encoding="utf-8"), "image processor"),
    ],
)
def test_what_is_no_checkpoint_is_refused(spoil, reason, tiny_checkpoint, tmp_path):
    spoil(tiny_checkpoint)
    with pytest.raises(ValueError, match=reason):
        export_remote_code(tiny_checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_shipped_checkpoint_brings_its_card(tmp_path, monkeypatch):
    # The card is found by the place of the folder, whatever lies in it.
    monkeypatch.setattr(export, "REQUIRED_FILES", ())
    monkeypatch.setattr(export, "_checked_source", Path)
    folder = export_checkpoint(DEFAULT_CHECKPOINT, tmp_path / "out")
    assert "m3fm-small" in (folder / "README.md").read_text(encoding="utf-8")
