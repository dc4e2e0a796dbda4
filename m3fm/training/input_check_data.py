# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Chest images and images of other things, in three parts, and what may be done to an image: data of the input check.

Letters: H rows, W columns of one image.
"""

import hashlib
import io
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm.auto import tqdm

from ..chest_image_m3fm import ChestImage
from ..data import load_studies
from ..image_processing_m3fm import M3FMImageProcessor
from ..input_check_m3fm import pooled_tokens
from .drawn_images import draw

# "fit" makes the learned part, "tune" sets its limits, "measure" is seen by neither.
PARTS = ("fit", "tune", "measure")
CHEST_SETS = (
    "nih_chestxray14_sample",
    "covid_chestxray",
    "kermany_pneumonia_224",
    "tb_shenzhen_montgomery_128",
    "cov_ctr",
    "luna16_slices",
    "covid_ct_md_slices",
)
# As the sets write it to `VIEWS`; a supine view is an AP view.
_VIEWS = {"PA": "PA", "AP": "AP", "AP Supine": "AP", "L": "LATERAL"}
_ENDINGS = {".jpg", ".jpeg", ".png"}


@dataclass(frozen=True)
class Example:
    """Hold one image to be read, and what it is.

    Attributes:
        source: Data set, or kind of other thing.
        part: One of `PARTS`.
        kind: "frontal", "lateral", "ct" or "other".
        view: "PA", "AP" or "LATERAL", None where unknown or no radiograph.
        path: Image file, or None for a drawn image.
        number: Which drawn image.
        change: A key of `CHANGES`.
    """

    source: str
    part: str
    kind: str
    view: str | None = None
    path: Path | None = field(default=None, repr=False)
    number: int = 0
    change: str = "as_is"

    def read(self, image_processor: M3FMImageProcessor) -> ChestImage:
        """Read the image and change it; a volume is not expected."""
        if self.path is None:
            pixels = draw(self.source, self.number)
        else:
            image = image_processor.read(self.path)
            if image.units == "hu":
                return image
            pixels = image.pixels[0]
        name = f"{self.source}/{self.path.name if self.path else self.number}/{self.change}"
        rng = np.random.default_rng(list(hashlib.sha256(name.encode()).digest()[:8]))
        pixels = np.clip(CHANGES[self.change](np.asarray(pixels), rng), 0, 1)
        return ChestImage(np.ascontiguousarray(pixels, dtype=np.float32)[None])


def chest_examples(data: Path) -> list[Example]:
    """List the chest images of the data folder.

    Validation parts are for measuring; training parts, and sets without parts, are divided by patient.
    """
    examples = []
    for name in CHEST_SETS:
        folder = data / name
        with open(folder / "metadata.jsonl", encoding="utf-8") as lines:
            rows = {row["file_name"]: row for row in map(json.loads, lines)}
        for study in load_studies(folder):
            if study.split == "unreported":
                continue
            part = _part(study.grouped_key, study.split)
            for path in study.images:
                row = rows[path.relative_to(folder).as_posix()]
                view = _VIEWS.get(row.get("view", ""))
                kind = "ct" if row["modality"] == "ct" else "lateral" if view == "LATERAL" else "frontal"
                examples.append(Example(name, part, kind, None if kind == "ct" else view, path))
    return examples


def other_examples(folder: Path, part: str, kind: str = "other") -> list[Example]:
    """List the images in `folder/<part>/<source>/`, as `benchmarks/gather_other_images.py` writes them."""
    return [
        Example(source.name, part, kind, path=path)
        for source in sorted((folder / part).iterdir())
        for path in sorted(source.iterdir())
        if path.suffix in _ENDINGS
    ]


def drawn_examples(sources: Sequence[str], part: str, count: int) -> list[Example]:
    """List drawn images, `count` of each kind."""
    return [Example(source, part, "other", number=number) for source in sources for number in range(count)]


def changed(examples: Sequence[Example], changes: Sequence[str]) -> list[Example]:
    """Give each example one of the changes, in turn."""
    return [replace(example, change=changes[i % len(changes)]) for i, example in enumerate(examples)]


def _part(key: str, split: str | None) -> str:
    """Divide by patient: every fifth training patient tunes; of sets without parts, every fourth measures."""
    if split == "validation":
        return "measure"
    share = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") / 2**32
    if split != "train" and share > 0.75:
        return "measure"
    return "tune" if share < 0.2 else "fit"


# --------------------------------------------------------------------------------------------------------------------
# Changes of an image (H, W) in 0..1

Change = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def _resized(pixels: np.ndarray, rows: int, columns: int) -> np.ndarray:
    image = Image.fromarray(np.ascontiguousarray(pixels, dtype=np.float32))
    return np.asarray(image.resize((columns, rows), Image.Resampling.BILINEAR, reducing_gap=None))


def _rotated(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    angle = float(rng.uniform(5, 20) * rng.choice([-1, 1]))
    image = Image.fromarray(np.ascontiguousarray(pixels, dtype=np.float32))
    return np.asarray(image.rotate(angle, Image.Resampling.BILINEAR))


def _windowed(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    low, high = np.percentile(pixels, (rng.uniform(10, 30), rng.uniform(70, 90)))
    return (pixels - low) / max(high - low, 1e-3)


def _jpeg(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    buffer = io.BytesIO()
    image = Image.fromarray(np.uint8(np.clip(pixels, 0, 1) * 255))
    image.save(buffer, "JPEG", quality=int(rng.integers(8, 25)))
    return np.asarray(Image.open(buffer), dtype=np.float32) / 255


def _small(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    scale = 64 / min(pixels.shape)
    return _resized(pixels, round(pixels.shape[0] * scale), round(pixels.shape[1] * scale))


def _cropped(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    rows, columns = (int(n * rng.uniform(0.7, 0.85)) for n in pixels.shape)
    top, left = (int(rng.integers(0, n - m + 1)) for n, m in zip(pixels.shape, (rows, columns), strict=True))
    return pixels[top : top + rows, left : left + columns]


def _annotated(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    image = Image.fromarray(np.uint8(np.clip(pixels, 0, 1) * 255))
    canvas, (width, height) = ImageDraw.Draw(image), image.size
    for _ in range(int(rng.integers(1, 4))):
        x, y = float(rng.uniform(0.2, 0.8) * width), float(rng.uniform(0.2, 0.8) * height)
        length = width * 0.12
        canvas.line((x, y, x + length, y - length), fill=255, width=max(2, width // 80))
        canvas.polygon((x, y, x + length / 2.5, y - length / 10, x + length / 10, y - length / 2.5), fill=255)
    font = ImageFont.load_default(max(10, height // 14))
    for text in ("R", "AP 120 kV", "12:30", "SE 3 IM 45")[: int(rng.integers(1, 5))]:
        place = (float(rng.choice([0.02, 0.7]) * width), float(rng.choice([0.02, 0.5, 0.9]) * height))
        canvas.text(place, text, fill=255, font=font)
    return np.asarray(image, dtype=np.float32) / 255


def _padded(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    rows, columns = (int(n * rng.uniform(1.1, 1.7)) for n in pixels.shape)
    canvas = np.full((rows, columns), float(rng.choice([0, 0, 0.2, 1])), dtype=np.float32)
    top, left = (rows - pixels.shape[0]) // 2, (columns - pixels.shape[1]) // 2
    canvas[top : top + pixels.shape[0], left : left + pixels.shape[1]] = pixels
    return canvas


CHANGES: dict[str, Change] = {
    "as_is": lambda pixels, rng: pixels,
    "rotated": _rotated,
    "dark": lambda pixels, rng: pixels ** rng.uniform(1.6, 2.4),
    "bright": lambda pixels, rng: pixels ** rng.uniform(0.4, 0.6),
    "windowed": _windowed,
    "jpeg": _jpeg,
    "small": _small,
    "cropped": _cropped,
    "annotated": _annotated,
    "padded": _padded,
    "noisy": lambda pixels, rng: pixels + rng.normal(0, rng.uniform(0.02, 0.06), pixels.shape),
    "mirrored": lambda pixels, rng: pixels[:, ::-1],
    # These change what is said of a chest image.
    "inverted": lambda pixels, rng: 1 - pixels,
    "turned": lambda pixels, rng: np.rot90(pixels, int(rng.integers(1, 4))),
}
HARMLESS = tuple(name for name in CHANGES if name not in ("as_is", "inverted", "turned"))


# --------------------------------------------------------------------------------------------------------------------
# What the image tower makes of them


class TowerFeatures:
    """Compute what the learned part reads of images, each image once.

    Args:
        tower: The image tower, frozen.
        image_processor: Makes its input.
        folder: Where results are kept; the pixels that went in are the key.
    """

    def __init__(self, tower: torch.nn.Module, image_processor: M3FMImageProcessor, folder: Path):
        self.tower = tower.eval()
        self.image_processor = image_processor
        folder.mkdir(parents=True, exist_ok=True)
        weights = hashlib.sha256()
        for name, weight in sorted(tower.state_dict().items()):
            weights.update(name.encode() + weight.detach().float().cpu().numpy().tobytes())
        self._mark = weights.digest()
        self._data, self._keys = (folder / f"{weights.hexdigest()[:16]}.{ending}" for ending in ("f16", "keys"))
        self._width = 2 * tower.config.hidden_size
        keys = self._keys.read_bytes() if self._keys.is_file() else b""
        rows = np.fromfile(self._data, np.float16).reshape(-1, self._width) if keys else []
        count = min(len(keys) // 16, len(rows))
        self._known = {keys[16 * i : 16 * i + 16]: rows[i] for i in range(count)}

    def __call__(self, images: Iterable[Example | ChestImage], batch_size: int = 16) -> np.ndarray:
        """Return the features (images and slices, 2 C) float32, with a progress bar."""
        keys: list[bytes] = []
        waiting: dict[bytes, torch.Tensor] = {}
        few = isinstance(images, Sequence) and len(images) < batch_size
        for each in tqdm(images, desc="image tower", unit="image", mininterval=30, disable=few):
            image = each.read(self.image_processor) if isinstance(each, Example) else each
            for pixels in self.image_processor([image], return_tensors="pt")["pixel_values"][0]:  # (3, H, W)
                key = hashlib.sha256(self._mark + pixels.numpy().tobytes()).digest()[:16]
                keys.append(key)
                if key not in self._known:
                    waiting[key] = pixels
                if len(waiting) == batch_size:
                    self._run(waiting)
        if waiting:
            self._run(waiting)
        return np.stack([self._known[key] for key in keys]).astype(np.float32)

    @torch.inference_mode()
    def _run(self, waiting: dict[bytes, torch.Tensor]) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            tokens = self.tower(pixel_values=torch.stack(list(waiting.values()))).last_hidden_state
        rows = pooled_tokens(tokens).to(torch.float16).numpy()
        with open(self._data, "ab") as data, open(self._keys, "ab") as names:
            data.write(rows.tobytes())
            names.write(b"".join(waiting))
        self._known |= dict(zip(waiting, rows, strict=True))
        waiting.clear()
