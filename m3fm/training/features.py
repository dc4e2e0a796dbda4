# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Tokens of a frozen image tower, computed once and kept on disk: what makes training on a CPU possible.

Letters in shapes are those of `modeling_m3fm`: N images of a study, S image tokens of one image, C width of the tower.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from ..data import Study
from ..image_processing_m3fm import M3FMImageProcessor


class FeatureCache:
    """Serves the tokens of images from memory-mapped float16 files, one file per data set.

    Filling it is resumable and incremental: an image that any earlier run computed is not computed again. Another
    tower or other preprocessing has files of its own; an image file that changed its size is another image.

    Args:
        folder: Where the files are kept.
        tower: The frozen image tower.
        image_processor: What turns image files into pixels; its settings are part of the files' names.
    """

    def __init__(self, folder: Path | str, tower: torch.nn.Module, image_processor: M3FMImageProcessor):
        self.folder = Path(folder)
        self.tower = tower.eval()
        self.image_processor = image_processor
        self._key = _fingerprint(tower, image_processor)
        self._rows: dict[Path, int] = {}
        self._arrays: dict[str, np.memmap] = {}

    def fill(self, studies: Sequence[Study], batch_size: int = 16) -> None:
        """Computes what is missing for `studies`, whose images are one slice or view each, with a progress bar."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for source in sorted({study.source for study in studies if study.images}):
            self._fill(
                source, [path for study in studies if study.source == source for path in study.images], batch_size
            )

    def get(self, study: Study) -> np.ndarray:
        """Returns the tokens (N, S, C) float16 of a study that `fill` was given."""
        return self._arrays[study.source][[self._rows[path] for path in study.images]]

    @torch.inference_mode()
    def _fill(self, source: str, paths: Sequence[Path], batch_size: int) -> None:
        data, index = (self.folder / f"{source}-{self._key}.{ending}" for ending in ("f16", "index"))
        shape = self._token_shape()
        row_bytes = shape[0] * shape[1] * 2
        written = index.read_text(encoding="utf-8") if index.is_file() else ""
        # A killed run may have written half a name, or names and tokens of which only one reached the disk.
        whole_lines = written.split("\n")[:-1]
        names = whole_lines[: data.stat().st_size // row_bytes] if data.is_file() else []
        kept = "".join(f"{name}\n" for name in names)
        if kept != written:
            index.write_text(kept, encoding="utf-8")
        marks = {path: _mark(path) for path in paths}
        known = set(names)
        missing = [path for path, mark in marks.items() if mark not in known]
        with open(data, "ab") as data_file, open(index, "a", encoding="utf-8") as index_file:
            data_file.truncate(len(names) * row_bytes)
            bar = tqdm(total=len(missing), desc=f"image tokens of {source}", unit="image", disable=not missing)
            for start in range(0, len(missing), batch_size):
                chunk = missing[start : start + batch_size]
                data_file.write(self._tokens(chunk).tobytes())
                data_file.flush()
                index_file.writelines(f"{marks[path]}\n" for path in chunk)
                index_file.flush()
                names += [marks[path] for path in chunk]
                bar.update(len(chunk))
            bar.close()
        rows = {name: row for row, name in enumerate(names)}
        self._rows |= {path: rows[mark] for path, mark in marks.items()}
        self._arrays[source] = np.memmap(data, dtype=np.float16, mode="r", shape=(len(names), *shape))

    def _tokens(self, paths: list[Path]) -> np.ndarray:
        pixels = self.image_processor(paths, return_tensors="pt")["pixel_values"]  # (b, 1, 3, H, W)
        if pixels.shape[1] != 1:
            raise ValueError("Cached tokens expected files of one slice or view each, got a volume.")
        device = next(self.tower.parameters()).device
        with torch.autocast(device.type, dtype=torch.bfloat16):
            tokens = self.tower(pixel_values=pixels.flatten(0, 1).to(device)).last_hidden_state  # (b, S, C)
        return tokens.to(torch.float16).cpu().numpy()

    def _token_shape(self) -> tuple[int, int]:
        size = self.image_processor.size
        device = next(self.tower.parameters()).device
        pixels = torch.zeros(1, 3, size["height"], size["width"], device=device)
        return tuple(self.tower(pixel_values=pixels).last_hidden_state.shape[1:])


def _mark(path: Path) -> str:
    """Names an image file in the index: by folder and size too, so that another file of its name is another image."""
    return f"{path.parent.name}/{path.name} {path.stat().st_size}"


def _fingerprint(tower: torch.nn.Module, image_processor: M3FMImageProcessor) -> str:
    digest = hashlib.sha256(json.dumps(image_processor.to_dict(), sort_keys=True, default=str).encode())
    for name, weight in sorted(tower.state_dict().items()):
        digest.update(name.encode() + weight.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
