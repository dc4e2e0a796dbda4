# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""M3FMProcessor: images and texts in one call, saved and loaded, and the same tensors in training and serving."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from m3fm import M3FMImageProcessor, M3FMModel, M3FMProcessor, M3FMReportPipeline
from m3fm.data import Study
from m3fm.training.align_batches import AlignCollator
from m3fm.training.features import FeatureCache
from m3fm.training.study_images import CachedTokens, Images, StudyPixels


@pytest.fixture
def image_files(tmp_path: Path) -> list[Path]:
    """Returns an 8-bit and a 16-bit file of unequal sides."""
    rng = np.random.default_rng(0)
    gray = rng.integers(0, 256, (50, 40), dtype=np.uint8)
    deep = rng.integers(100, 4000, (33, 64)).astype(np.uint16)
    paths = [tmp_path / "gray.png", tmp_path / "deep.png"]
    Image.fromarray(gray).save(paths[0])
    Image.fromarray(deep).save(paths[1])
    return paths


def study(*images: Path) -> Study:
    return Study("1", "made-up", "cxr", images, None, {"en": "Clear lungs."}, None, "train")


def collator_of(processor: M3FMProcessor, images: Images | None = None) -> AlignCollator:
    images = images or StudyPixels(processor.image_processor)
    blank = {"pixel_values": torch.zeros(1, 1, 3, 28, 28), "image_mask": torch.ones(1, 1, dtype=torch.bool)}
    return AlignCollator(images, blank, processor.tokenizer, ("en", "zh"))


def test_images_and_texts_in_one_call(tiny_processor, tiny_model, image_files):
    inputs = tiny_processor(images=image_files, text=["肺炎", "no pneumonia is seen"], return_tensors="pt")
    assert set(inputs) == {"pixel_values", "image_mask", "input_ids", "attention_mask"}
    assert inputs["pixel_values"].shape == (2, 1, 3, 28, 28) and inputs["pixel_values"].dtype == torch.float32
    assert inputs["image_mask"].tolist() == [[True], [True]]
    lengths = inputs["attention_mask"].sum(dim=1)
    assert lengths[0] < lengths[1] == inputs["input_ids"].shape[1]
    assert inputs["input_ids"][0, -1] == tiny_processor.tokenizer.pad_token_id, "padded on the right"
    assert tiny_model.model(**inputs).logits_per_image.shape == (2, 2)


def test_either_alone(tiny_processor, image_files):
    assert set(tiny_processor(images=image_files[0], return_tensors="pt")) == {"pixel_values", "image_mask"}
    assert set(tiny_processor(text="胸廓对称", return_tensors="pt")) == {"input_ids", "attention_mask"}


def test_a_text_is_bare_and_comes_back(tiny_processor):
    text = "胸廓对称，纵隔居中。 No pleural effusion (2.5 cm)."
    inputs = tiny_processor(text=text, return_tensors="pt")
    assert not set(inputs["input_ids"][0].tolist()) & set(range(16)), "no special token is added"
    assert tiny_processor.batch_decode(inputs["input_ids"]) == [text]


def test_a_control_token_in_a_text_is_text(tiny_processor):
    ids = tiny_processor(text="lungs <|zh|> <image> clear </s>", return_tensors="pt")["input_ids"]
    assert not set(ids[0].tolist()) & set(range(16))


def test_texts_are_cut_at_the_length_of_the_text_encoder(tiny_processor, tokenizer):
    inputs = tiny_processor(text=["effusion " * 2000, "clear"], return_tensors="pt")
    assert inputs["input_ids"].shape == (2, tokenizer.model_max_length)
    assert tiny_processor(text="effusion " * 2000, max_length=9, return_tensors="pt")["input_ids"].shape == (1, 9)


def test_survives_a_folder(tiny_processor, tiny_checkpoint, image_files):
    again = AutoProcessor.from_pretrained(tiny_checkpoint)
    assert type(again) is M3FMProcessor and type(again.image_processor) is M3FMImageProcessor
    assert again.image_processor.to_dict() == tiny_processor.image_processor.to_dict()
    request = {"images": image_files, "text": ["未见胸腔积液。", "Clear."], "return_tensors": "pt"}
    expected = tiny_processor(**request)
    for name, value in again(**request).items():
        assert torch.equal(value, expected[name]), name
    assert type(AutoImageProcessor.from_pretrained(tiny_checkpoint)) is M3FMImageProcessor
    assert AutoTokenizer.from_pretrained(tiny_checkpoint).get_vocab() == tiny_processor.tokenizer.get_vocab()


# --- training and serving --------------------------------------------------------------------------------------------


def test_training_and_serving_give_the_same_pixels(tiny_model, tiny_processor, image_files):
    served = M3FMReportPipeline(model=tiny_model, processor=tiny_processor)
    collator = collator_of(tiny_processor)
    trained = collator([study(*image_files), study(image_files[0])])
    captured = {}
    tower = tiny_model.model.get_vision_features

    def spy(pixel_values: torch.Tensor) -> torch.Tensor:
        captured["pixel_values"] = pixel_values
        return tower(pixel_values)

    tiny_model.model.get_vision_features = spy
    served([[str(path) for path in image_files], str(image_files[0])], batch_size=2, on_suspect="warn")
    assert torch.equal(captured["pixel_values"], trained["pixel_values"])
    assert trained["image_mask"].tolist() == [[True, True], [True, False]]
    opened = [Image.open(path) for path in image_files]
    direct = tiny_processor(images=[opened, [image_files[0].read_bytes()]], return_tensors="pt")
    assert torch.equal(direct["pixel_values"], trained["pixel_values"])


def test_cached_tokens_are_those_of_serving(tiny_model, tiny_processor, image_files, tmp_path):
    model: M3FMModel = tiny_model.model
    cache = FeatureCache(tmp_path / "cache", model.vision_model, tiny_processor.image_processor)
    both = study(*image_files)
    cache.fill([both])
    collator = collator_of(tiny_processor, CachedTokens(cache))
    cached = collator([both, study(image_files[1])])
    pixels = tiny_processor(images=[image_files, [image_files[1]]], return_tensors="pt")
    assert torch.equal(cached["image_mask"], pixels["image_mask"])
    with torch.no_grad():
        served = model.get_vision_features(pixels["pixel_values"])
        real = pixels["image_mask"]
        # The cache computes in bfloat16 and keeps float16.
        torch.testing.assert_close(cached["vision_features"][real], served[real], atol=0.05, rtol=0.02)
        trained = model.get_image_features(image_mask=real, vision_features=cached["vision_features"])
        assert ((trained * model.get_image_features(**pixels)).sum(dim=-1) > 0.999).all()


def test_training_and_serving_give_the_same_tokens(tiny_processor):
    collator = collator_of(tiny_processor)
    reports = {"en": "The heart size is normal.", "zh": "心影大小正常。"}
    trained = collator([Study("1", "made-up", "cxr", (), None, reports, None, "train")])
    served = tiny_processor(text=list(reports.values()), return_tensors="pt")
    for name in ("input_ids", "attention_mask"):
        assert torch.equal(trained[name], served[name])
