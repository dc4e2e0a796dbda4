# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""What is evaluated: a checkpoint that writes reports, and embeds studies and texts.

Letters in shapes: B studies or texts, N images of a study, S tokens of an image, D width of the shared space, C width
of the image tower.
"""

import hashlib
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import transformers
from PIL import Image
from tqdm.auto import tqdm

from ..data import Study
from ..input_check_m3fm import CHECK_FILE

# Images that show nothing, put in the place of a study's own: what is said of them is not taken from an image.
CONTROLS = ("blank_images", "noise_images")
_MID_GREY = 128

# Bookkeeping that transformers keeps among the generation settings.
_NOT_DECODING = ("_from_model_config", "transformers_version")


class Reporter(Protocol):
    """What is evaluated; each call takes one batch."""

    def generate(self, studies: Sequence[Study], language: str, control: str | None = None) -> list[str]:
        """Writes one report a study; with a control, one of `CONTROLS`, from such images instead of its own."""

    def embed_studies(self, studies: Sequence[Study], control: str | None = None) -> dict[str, np.ndarray]:
        """Returns image features by name: "shared" (B, D), and "tower" (B, C) where there is one."""

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Returns the texts in the shared space, (B, D)."""


class CheckpointReporter:
    """Runs a checkpoint folder, in float32, decoding without sampling.

    Args:
        model_dir: The checkpoint.
        device: A torch device.
        num_beams: Beams; None takes the checkpoint's generation config.
        max_new_tokens: Longest report in tokens; None takes the checkpoint's.
    """

    def __init__(
        self,
        model_dir: str | Path,
        device: str = "cpu",
        num_beams: int | None = None,
        max_new_tokens: int | None = None,
    ):
        folder = checkpoint_folder(model_dir)
        self.processor = transformers.AutoProcessor.from_pretrained(folder)
        self.model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
        self.model.to(device).eval()
        given = {"num_beams": num_beams, "max_new_tokens": max_new_tokens}
        self.decoding = {key: value for key, value in given.items() if value is not None} | {"do_sample": False}
        self._encoded: tuple[tuple[Sequence[Study], str | None], torch.Tensor, torch.Tensor] | None = None

    @property
    def languages(self) -> list[str]:
        """Returns the codes that the checkpoint writes."""
        return list(self.model.config.languages)

    @property
    def logit_scale(self) -> float:
        """Returns what cosines of the shared space are multiplied by before a softmax."""
        return float(self.model.model.logit_scale.detach().exp())

    @property
    def decoding_settings(self) -> dict[str, Any]:
        """Returns the settings in force, those of the checkpoint's generation config included."""
        config = self.model.generation_config
        named = {"num_beams": config.num_beams or 1, "max_new_tokens": config.max_new_tokens}
        changed = {key: value for key, value in config.to_diff_dict().items() if key not in _NOT_DECODING}
        return named | changed | self.decoding

    @torch.inference_mode()
    def generate(self, studies: Sequence[Study], language: str, control: str | None = None) -> list[str]:
        """Writes one report a study; with a control, one of `CONTROLS`, from such images instead of its own."""
        tokens, mask = self._encode(studies, control)
        ids = self.model.generate(vision_features=tokens, image_mask=mask, language=language, **self.decoding)
        return [text.strip() for text in self.processor.batch_decode(ids, skip_special_tokens=True)]

    @torch.inference_mode()
    def embed_studies(self, studies: Sequence[Study], control: str | None = None) -> dict[str, np.ndarray]:
        """Returns "shared" (B, D), and "tower": first and mean token of the image tower, mean over images (B, 2 C)."""
        tokens, mask = self._encode(studies, control)  # (B, N, S, C), (B, N)
        shared = self.model.model.get_image_features(vision_features=tokens, image_mask=mask)
        images = torch.cat([tokens[:, :, 0], tokens.mean(dim=2)], dim=-1)  # (B, N, 2 C)
        weights = mask.unsqueeze(-1).to(images.dtype)
        tower = (images * weights).sum(dim=1) / weights.sum(dim=1)
        return {"shared": shared.float().cpu().numpy(), "tower": tower.float().cpu().numpy()}

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Returns the texts in the shared space, (B, D)."""
        inputs = self.processor(text=list(texts), return_tensors="pt").to(self.model.device)
        features = self.model.model.get_text_features(inputs["input_ids"], inputs["attention_mask"])
        return features.float().cpu().numpy()

    def _encode(self, studies: Sequence[Study], control: str | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Runs the image tower; the last batch is kept, for it is asked again for every language."""
        if self._encoded is None or self._encoded[0] != (studies, control):
            images = [list(study.images) if control is None else self._control(study, control) for study in studies]
            inputs = self.processor(images=images, return_tensors="pt").to(self.model.device)
            tokens = self.model.model.get_vision_features(inputs["pixel_values"])
            self._encoded = ((studies, control), tokens, inputs["image_mask"])
        return self._encoded[1:]

    def _control(self, study: Study, control: str) -> list[Image.Image]:
        size = self.processor.image_processor.size
        shape = (size["height"], size["width"])
        if control == "blank_images":
            pixels = np.full(shape, _MID_GREY, dtype=np.uint8)
            pixels[0, 0] += 1  # an image of one grey level is refused
            return [Image.fromarray(pixels)] * len(study.images)
        if control == "noise_images":
            # Drawn anew for each study, the same in every run.
            generator = np.random.default_rng(zlib.crc32(study.study_id.encode()))
            drawn = generator.integers(256, size=(len(study.images), *shape), dtype=np.uint8)
            return [Image.fromarray(pixels) for pixels in drawn]
        raise ValueError(f"Unknown control {control!r}: expected one of {list(CONTROLS)}.")


def embed_in_batches(reporter: Reporter, texts: Sequence[str], batch_size: int) -> np.ndarray:
    """Embeds texts (B, D) with a progress bar."""
    starts = tqdm(range(0, len(texts), batch_size), desc="texts", unit="batch")
    return np.concatenate([reporter.embed_texts(texts[start : start + batch_size]) for start in starts])


def checkpoint_folder(model_dir: str | Path) -> Path:
    """Returns the folder of a checkpoint.

    Raises:
        ValueError: If it is none.
    """
    folder = Path(model_dir)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is not a checkpoint: expected a folder with config.json and weights.")
    return folder


def hash_input_check(model_dir: str | Path) -> str | None:
    """Returns the SHA-256 of a checkpoint folder's input check, as hex; None where it brings none."""
    path = checkpoint_folder(model_dir) / CHECK_FILE
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def hash_checkpoint(model_dir: str | Path) -> str:
    """Returns the SHA-256 over the weights and settings of a checkpoint folder, as hex."""
    digest = hashlib.sha256()
    folder = checkpoint_folder(model_dir)
    for path in sorted([*folder.glob("*.json"), *folder.glob("*.safetensors")]):
        if path.name == CHECK_FILE:  # scores do not depend on it: what is evaluated is not refused
            continue
        digest.update(path.name.encode())
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
