# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""`FewShotClassifier`: every form of data, every method, saving, and what it refuses."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import m3fm
from m3fm import M3FMForImageClassification
from m3fm.adapters import load_adapter_checked
from m3fm.data import Study, load_studies
from m3fm.data.labelled_images import read_labelled
from m3fm.evaluation.reporter import CheckpointReporter
from m3fm.fewshot import FewShotClassifier
from m3fm.training.lora import LoraSettings

# PEFT asks for an attribute that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
CLASSES = ("bright", "dark", "striped")
FAST_LORA = LoraSettings(r=2, epochs=2, num_folds=0)


def picture(kind: str, seed: int) -> Image.Image:
    """Returns an image of one of `CLASSES`, noisy."""
    pixels = np.random.default_rng(seed).integers(0, 60, (32, 28))
    pixels[:, ::2] += {"bright": 180, "dark": 0, "striped": 180}[kind]
    pixels[:, 1::2] += {"bright": 180, "dark": 0, "striped": 0}[kind]
    return Image.fromarray(pixels.astype(np.uint8))


@pytest.fixture(scope="module")
def pictures() -> dict[str, list[Image.Image]]:
    return {kind: [picture(kind, 10 * number + seed) for seed in range(8)] for number, kind in enumerate(CLASSES)}


@pytest.fixture
def lists(pictures: dict[str, list[Image.Image]]) -> Callable[..., tuple[list[Any], list[str]]]:
    """Returns a function that gives images and labels of some classes under names of the test's."""

    def build(**names: str) -> tuple[list[Any], list[str]]:
        pairs = [(image, name) for name, kind in names.items() for image in pictures[kind]]
        return [image for image, _ in pairs], [name for _, name in pairs]

    return build


@pytest.fixture(scope="module")
def loaded(saved_tiny: Path) -> FewShotClassifier:
    return FewShotClassifier.from_pretrained(saved_tiny)


@pytest.fixture
def learner(loaded: FewShotClassifier, tiny_checkpoint: Path) -> FewShotClassifier:
    return FewShotClassifier(copy.deepcopy(loaded._model), loaded.processor, str(tiny_checkpoint))


@pytest.fixture
def csv_file(tmp_path: Path, pictures: dict[str, list[Image.Image]]) -> Path:
    rows = ["file_name,label,patient_id"]
    for kind, name in (("bright", "tuberculosis"), ("dark", "normal")):
        for number, image in enumerate(pictures[kind]):
            image.save(tmp_path / f"{kind}{number}.png")
            rows.append(f"{kind}{number}.png,{name},{kind[0]}{number // 2}")
    path = tmp_path / "mine.csv"
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


def test_features_are_those_of_the_evaluation(tiny_checkpoint: Path, csv_file: Path) -> None:
    images = tuple(sorted(csv_file.parent.glob("*.png"))[:3])
    studies = [
        Study(str(n), "own", "cxr", files, None, {}, None, None) for n, files in enumerate([images[:2], images])
    ]
    expected = CheckpointReporter(tiny_checkpoint).embed_studies(studies)
    found = FewShotClassifier.from_pretrained(tiny_checkpoint).embed([study.images for study in studies])
    for name in ("shared", "tower"):
        np.testing.assert_allclose(found[name], expected[name], atol=1e-6)


@pytest.mark.parametrize("method", ["linear", "prompt"])
def test_two_classes(method: str, learner: FewShotClassifier, lists: Any, pictures: Any) -> None:
    clf = learner.fit(lists(tuberculosis="bright", normal="dark"), method=method)
    assert (clf.classes_, clf.exclusive_, clf.method_) == (("normal", "tuberculosis"), True, method)
    held_out = [picture("bright", 91), picture("dark", 92)]
    assert clf.predict(held_out) == ["tuberculosis", "normal"]
    values = clf.predict_proba([*held_out, [*held_out]])
    assert values.shape == (3, 2)
    np.testing.assert_allclose(values.sum(axis=1), 1)
    np.testing.assert_allclose(clf.predict_proba(held_out[0], batch_size=1), values[:1], atol=1e-5)
    scores = clf.cross_validation_[method]
    assert scores["auroc"] == 1.0
    assert scores["log_loss"] < 0.5
    assert ((clf.thresholds_ > 0) & (clf.thresholds_ < 1)).all()


def test_three_classes_and_prompts_only_for_findings(learner: FewShotClassifier, lists: Any) -> None:
    data = lists(bright="bright", dark="dark", striped="striped")
    clf = learner.fit(data, shots=6)
    assert clf.method_ == "linear"
    assert clf.predict([picture(kind, 90) for kind in CLASSES]) == list(CLASSES)
    with pytest.raises(ValueError, match="knows no phrases for 'bright', 'dark', 'striped'"):
        learner.fit(data, method="prompt")


def test_several_labels_a_study_some_unknown(learner: FewShotClassifier, pictures: Any) -> None:
    """The first label is brightness, the second stripes; what is unknown is not learned from."""
    rows = {
        "bright": {"edema": 1, "mass": 0},
        "dark": {"edema": 0, "mass": None},
        "striped": {"edema": None, "mass": 1},
    }
    images = [image for kind in CLASSES for image in pictures[kind]]
    labels = [rows[kind] for kind in CLASSES for _ in pictures[kind]]
    clf = learner.fit((images, labels), method="linear")
    assert (clf.classes_, clf.exclusive_) == (("edema", "mass"), False)
    assert clf.fitted.num_studies == {"edema": (8, 8), "mass": (8, 8)}
    assert clf.predict([picture("bright", 90), picture("striped", 91)])[0] == ["edema"]
    assert "mass" in clf.predict(picture("striped", 91))[0]
    listed = [[name for name, value in row.items() if value] for row in labels]
    assert not learner.fit((images, listed), method="linear").exclusive_


def test_one_label_present_or_not(learner: FewShotClassifier, lists: Any) -> None:
    images, names = lists(tuberculosis="bright", normal="dark")
    clf = learner.fit((images, [["tuberculosis"] if name == "tuberculosis" else [] for name in names]), shots=4)
    assert clf.classes_ == ("tuberculosis",)
    assert clf.method_ in ("linear", "prompt")
    assert clf.predict([picture("bright", 90), picture("dark", 91)]) == [["tuberculosis"], []]


def test_csv_and_its_folder_with_patients(learner: FewShotClassifier, csv_file: Path) -> None:
    clf = learner.fit(csv_file, shots=4, seed=3)
    assert clf.classes_ == ("normal", "tuberculosis")
    assert clf.fitted.num_groups == 8
    with pytest.raises(ValueError, match=r"5 shots a class are more than there are. 'normal': 4 patients"):
        learner.fit(csv_file, shots=5)
    shutil.copy(csv_file, csv_file.with_name("metadata.csv"))
    assert learner.fit(csv_file.parent).fitted.num_studies == {"normal": (8, 8), "tuberculosis": (8, 8)}


def test_csv_with_a_column_for_each_label(learner: FewShotClassifier, csv_file: Path) -> None:
    rows = csv_file.read_text().splitlines()[1:]
    lines = [f"{row.split(',')[0]},{int('tuberculosis' in row)},{'' if 'dark' in row else '1'}" for row in rows]
    csv_file.write_text("\n".join(["file_name,tuberculosis,edema", *lines]))
    clf = learner.fit(csv_file, labels=["tuberculosis"])
    assert clf.classes_ == ("tuberculosis",)
    with pytest.raises(ValueError, match="One class only: 8 studies with 'edema', 0 without"):
        learner.fit(csv_file)
    csv_file.write_text("file_name,tuberculosis\nbright0.png,perhaps\n")
    with pytest.raises(ValueError, match="line 2: .* expected 1, 0, -1"):
        learner.fit(csv_file)


def test_dataset(learner: FewShotClassifier, lists: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    images, names = lists(tuberculosis="bright", normal="dark")
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["tuberculosis", "normal"])}
    )
    coded = datasets.Dataset.from_dict({"image": images, "label": names}, features=features)
    named = datasets.Dataset.from_dict({"image": images, "label": names}).cast_column("image", datasets.Image())
    expected = learner.fit((images, names), method="linear").predict_proba(images)
    for dataset in (coded, named):
        clf = learner.fit(dataset, method="linear")
        assert clf.classes_ == ("normal", "tuberculosis")
        np.testing.assert_allclose(clf.predict_proba(images), expected, atol=1e-6)
    opened = []
    monkeypatch.setattr(Image.Image, "load", lambda self, load=Image.Image.load: opened.append(1) or load(self))
    assert read_labelled(coded).take(np.arange(5)).targets.shape == (5, 2)
    assert not opened
    with pytest.raises(ValueError, match="columns 'image' and 'label', got"):
        learner.fit(coded.rename_column("label", "name"))


def test_studies_and_data_folder(learner: FewShotClassifier, csv_file: Path) -> None:
    rows = []
    for number, row in enumerate(csv_file.read_text().splitlines()[1:]):
        file, name, _ = row.split(",")
        rows.append(
            {
                "file_name": file,
                "modality": "cxr",
                "split": "validation" if number % 4 == 3 else "train",
                "labels": ["tuberculosis" if name == "tuberculosis" else "no_finding"],
            }
        )
    folder = csv_file.parent
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    clf = learner.fit(folder, labels=["肺结核", "no_finding"], method="prompt")
    assert clf.classes_ == ("tuberculosis", "no_finding")
    assert clf.exclusive_
    assert clf.fitted.num_studies["tuberculosis"] == (6, 6)  # not the validation part
    studies = load_studies(folder)
    assert learner.fit(studies, shots="all", labels=["tuberculosis"]).fitted.num_studies["tuberculosis"] == (8, 8)
    assert len(learner.predict_proba(studies[:3])) == 3
    with pytest.raises(ValueError, match="No study is annotated for 'edema'"):
        learner.fit(studies, labels=["edema"])


def test_labels_with_phrases_of_their_own(learner: FewShotClassifier, lists: Any) -> None:
    labels = {"ill": {"finding": "tuberculosis"}, "well": {"finding": "no_finding", "present": {"en": ["All well."]}}}
    clf = learner.fit(lists(ill="bright", well="dark"), labels=labels, method="prompt")
    assert clf.classes_ == ("ill", "well")


def test_same_seed_same_classifier(learner: FewShotClassifier, lists: Any) -> None:
    data = lists(tuberculosis="bright", normal="dark")
    first = learner.fit(data, shots=2, seed=4).predict_proba(data[0])
    assert np.array_equal(learner.fit(data, shots=2, seed=4).predict_proba(data[0]), first)
    assert not np.array_equal(learner.fit(data, shots=2, seed=5).predict_proba(data[0]), first)


def test_one_shot_is_not_cross_validated(learner: FewShotClassifier, lists: Any) -> None:
    clf = learner.fit(lists(tuberculosis="bright", normal="dark"), shots=1)
    assert clf.cross_validation_ == {}
    assert clf.method_ == "prompt"
    assert clf.thresholds_.tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": ["tubercolosis", "normal"]}, "'tubercolosis'; the nearest"),
        ({"labels": ["normal", "normal"]}, "each label once, got 'normal' more than once"),
        ({"labels": ["normal"]}, "One class only: 8 studies with 'normal', 0 without"),
        ({"shots": 9}, "9 shots a class are more than there are. 'normal': 8 patients; 'tuberculosis': 8 patients"),
        ({"shots": 0}, "at least 1, None or 'all', got 0"),
        ({"method": "lora2"}, r"Expected method to be some of \['linear', 'prompt', 'lora'\]"),
        ({"method": ["linear", "lora"], "lora": FAST_LORA}, "num_folds >= 2"),
        ({"groups": [1, 2]}, "a group for each of 16 studies, got 2"),
    ],
)
def test_wrong_requests(change: dict[str, Any], message: str, learner: FewShotClassifier, lists: Any) -> None:
    with pytest.raises(ValueError, match=message):
        learner.fit(lists(tuberculosis="bright", normal="dark"), **change)


def test_wrong_data(learner: FewShotClassifier, csv_file: Path, pictures: Any) -> None:
    with pytest.raises(ValueError, match="not learned anything yet"):
        learner.predict(pictures["bright"])
    with pytest.raises(ValueError, match="Expected two classes or more, got one|One class only"):
        learner.fit((pictures["bright"], ["a"] * 8))
    with pytest.raises(ValueError, match="as many images as labels, got 8 and 1"):
        learner.fit((pictures["bright"], ["a"]))
    image = str(csv_file.parent / "bright0.png")
    with pytest.raises(ValueError, match="the one of study 0 again in 1"):
        learner.fit(([image, image], ["a", "b"]))
    with pytest.raises(ValueError, match="no such data folder or CSV file"):
        learner.fit(csv_file.with_name("none.csv"))
    csv_file.write_text("file_name,label\nnone.png,a\n")
    with pytest.raises(ValueError, match="do not exist|does not exist; the first: line 2"):
        learner.fit(csv_file)
    with pytest.raises(ValueError, match="got dict"):
        learner.fit({"image": [], "label": []})


@pytest.mark.parametrize("method", ["linear", "prompt"])
def test_saved_head_is_small_and_the_same(
    method: str, learner: FewShotClassifier, lists: Any, tmp_path: Path, tiny_checkpoint: Path
) -> None:
    images, _ = data = lists(tuberculosis="bright", normal="dark")
    folder = learner.fit(data, shots=6, method=method).save_pretrained(tmp_path / "tb")
    assert {path.name for path in folder.iterdir()} == {"README.md", "head.safetensors", "m3fm_few_shot.json"}
    assert sum(path.stat().st_size for path in folder.iterdir()) < 10_000
    again = FewShotClassifier.from_pretrained(folder)
    np.testing.assert_allclose(again.predict_proba(images), learner.predict_proba(images), atol=1e-6)
    assert again.predict(images) == learner.predict(images)
    assert again.cross_validation_ == learner.cross_validation_
    assert np.array_equal(again.thresholds_, learner.thresholds_)
    card = (folder / "README.md").read_text()
    assert "For research only. Not a medical device." in card
    assert "| tuberculosis | 6 | 6 |" in card
    assert f"{learner.cross_validation_[method]['auroc']:.3f}" in card

    moved = tiny_checkpoint.rename(tmp_path / "moved")
    with pytest.raises(ValueError, match="expected its folder as base="):
        FewShotClassifier.from_pretrained(folder)
    np.testing.assert_allclose(
        FewShotClassifier.from_pretrained(folder, base=moved).predict_proba(images), again.predict_proba(images)
    )
    with pytest.raises(ValueError, match="trained on another base: .*visual_projection.* has other weights"):
        FewShotClassifier.from_pretrained(folder, base=m3fm.DEFAULT_CHECKPOINT)


def test_damaged_files_are_refused(learner: FewShotClassifier, lists: Any, tmp_path: Path) -> None:
    folder = learner.fit(lists(tuberculosis="bright", normal="dark"), shots=2).save_pretrained(tmp_path / "tb")
    (folder / "head.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(ValueError, match=r"head.safetensors is damaged"):
        FewShotClassifier.from_pretrained(folder)
    (folder / "m3fm_few_shot.json").write_text("{}")
    with pytest.raises(ValueError, match="m3fm_few_shot.json is damaged"):
        FewShotClassifier.from_pretrained(folder)
    with pytest.raises(ValueError, match="is not a checkpoint"):
        FewShotClassifier.from_pretrained(tmp_path)


@pytest.mark.parametrize("exclusive", [True, False])
def test_lora_is_learned_saved_and_taken_out_again(
    exclusive: bool, learner: FewShotClassifier, lists: Any, tmp_path: Path, tiny_checkpoint: Path
) -> None:
    pytest.importorskip("peft")
    images, names = lists(tuberculosis="bright", normal="dark")
    labels = names if exclusive else [[name] if name == "tuberculosis" else [] for name in names]
    before = learner.fit((images, labels), shots=4, method="linear").predict_proba(images)
    clf = learner.fit((images, labels), shots=4, method="lora", lora=FAST_LORA)
    assert clf.method_ == "lora"
    values = clf.predict_proba(images)
    folder = clf.save_pretrained(tmp_path / "tb")
    assert {"adapter_config.json", "adapter_model.safetensors", "m3fm_base.json"} <= {p.name for p in folder.iterdir()}
    assert "LoRA adapter" in (folder / "README.md").read_text()
    again = FewShotClassifier.from_pretrained(folder)
    np.testing.assert_allclose(again.predict_proba(images), values, atol=1e-6)
    with pytest.raises(ValueError, match="another base"):
        FewShotClassifier.from_pretrained(folder, base=m3fm.DEFAULT_CHECKPOINT)

    # It is an adapter like any other.
    number = len(clf.classes_)
    base = M3FMForImageClassification.from_pretrained(tiny_checkpoint, num_labels=number, dtype=torch.float32)
    inputs = learner.processor.image_processor(images[:2], return_tensors="pt")
    with torch.no_grad():
        logits = load_adapter_checked(base, folder)(**inputs).logits.numpy()
    expected = torch.from_numpy(logits).softmax(-1) if exclusive else torch.from_numpy(logits).sigmoid()
    np.testing.assert_allclose(values[:2], expected, atol=1e-5)

    # The base is untouched, and a head replaces the adapter in the same folder.
    after = learner.fit((images, labels), shots=4, method="linear").predict_proba(images)
    assert np.array_equal(after, before)
    assert not (learner.save_pretrained(folder) / "adapter_model.safetensors").exists()
    np.testing.assert_allclose(FewShotClassifier.from_pretrained(folder).predict_proba(images), after, atol=1e-6)


def test_lora_is_chosen_by_cross_validation_when_named(learner: FewShotClassifier, lists: Any) -> None:
    pytest.importorskip("peft")
    settings = LoraSettings(r=2, epochs=1, num_folds=2)
    clf = learner.fit(lists(bright="bright", dark="dark"), shots=4, method=["linear", "lora"], lora=settings)
    assert clf.cross_validation_.keys() == {"linear", "lora"}
    losses = [scores["log_loss"] for scores in clf.cross_validation_.values()]
    assert losses == sorted(losses)
    assert clf.method_ == next(iter(clf.cross_validation_))
    assert not any("lora" in name for name, _ in clf._model.named_parameters()) or clf.method_ == "lora"


@pytest.mark.realdata
def test_sixteen_radiographs_tell_tuberculosis(data_root: Path) -> None:
    folder = data_root / "tb_shenzhen_montgomery_128"
    clf = FewShotClassifier.from_pretrained().fit(folder, shots=16, labels=["tuberculosis"], method="linear")
    studies = [study for study in load_studies(folder) if study.split == "validation"]
    truth = np.array([study.findings["tuberculosis"] for study in studies])
    values = clf.predict_proba(studies)[:, 0]
    assert (values[truth == 1][:, None] > values[truth == 0]).mean() > 0.65
