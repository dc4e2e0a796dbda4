# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Tokens of a frozen image tower, computed once and kept on disk: what makes training on a CPU possible.

Letters in shapes are those of `modeling_m3fm`: N images of a study, S image tokens of one image, C width of the tower.
"""

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ..data import Study
from ..data.schema import ImageFile, StudyRecord
from ..file_lock import FileLock
from ..image_processing_m3fm import M3FMImageProcessor

logger = logging.getLogger(__name__)

_LOCK_SECONDS = 0.5


class FeatureCache:
    """Serves the tokens of images from memory-mapped float16 files, one file per data set.

    Filling it is resumable and incremental: an image that any earlier run computed is not computed again. Another
    tower or other preprocessing has files of its own. An image file is known by its folder, name and size, so that one
    that changed its size is another image; an image in memory, as from a shard, is known by its content.

    Processes may share a folder: while one fills it, others that want to fill it wait. A copy that goes to another
    process, as to a worker, opens the same files there and serves tokens; without the tower, it cannot be filled.

    Args:
        folder: Where the files are kept.
        tower: The frozen image tower.
        image_processor: What turns image files into pixels; its settings are part of the files' names.
    """

    def __init__(self, folder: Path | str, tower: torch.nn.Module, image_processor: M3FMImageProcessor):
        self.folder = Path(folder)
        self.tower: torch.nn.Module | None = tower.eval()
        self.image_processor = image_processor
        self._key = _fingerprint(tower, image_processor)
        # Of an image, by its path or by its content: the set whose file has it, and the row there.
        self._places: dict[Any, tuple[str, int]] = {}
        self._arrays: dict[str, np.memmap] = {}

    def fill(self, studies: Iterable[Study | StudyRecord], batch_size: int = 16) -> None:
        """Computes what is missing for `studies`, with a progress bar, once no other process fills the same files.

        Their images are one slice or view each, any number of them a study. Studies are gone through once and images
        held for one batch, so that a stream of records from shards will do.

        Raises:
            ValueError: If an image cannot be read or is a volume, or the cache came from another process.
        """
        if self.tower is None:
            raise ValueError("A cache that came from another process has no tower: expected it to be filled there.")
        self.folder.mkdir(parents=True, exist_ok=True)
        shelves: dict[str, _Shelf] = {}
        marks: dict[Any, tuple[str, str]] = {}
        with self._alone(), ExitStack() as stack, tqdm(desc="image tokens", unit="image", delay=1.0) as bar:
            for study in studies:
                for source in map(_source, study.images):
                    shelf = shelves.get(study.source)
                    if shelf is None:
                        shelf = shelves[study.source] = stack.enter_context(self._open(study.source))
                    mark = _mark(source)
                    marks[_name(source, mark)] = study.source, mark
                    shelf.want(mark, source)
                    if len(shelf.waiting) == batch_size:
                        bar.update(shelf.add(self._tokens))
            for shelf in shelves.values():
                bar.update(shelf.add(self._tokens))
        for name, shelf in shelves.items():
            self._arrays[name] = shelf.tokens()
        self._places |= {name: (source, shelves[source].rows[mark]) for name, (source, mark) in marks.items()}

    def get(self, study: Study | StudyRecord) -> np.ndarray:
        """Returns the tokens (N, S, C) float16 of a study that `fill` was given."""
        return self.tokens(study.images)

    def tokens(self, images: Sequence[Any]) -> np.ndarray:
        """Returns the tokens (N, S, C) float16 of images that `fill` was given: paths, bytes, `ImageFile`.

        Raises:
            ValueError: If there is no image, or one that `fill` was not given.
        """
        if not len(images):
            raise ValueError("The study has no image: expected one at least.")
        rows = []
        for source in map(_source, images):
            place = self._places.get(source if isinstance(source, Path) else _mark(source))
            if place is None:
                told = source.name if isinstance(source, Path) else "an image in memory"
                raise ValueError(f"There are no tokens of {told}: call fill with its study first.")
            rows.append(self._arrays[place[0]][place[1]])
        return np.stack(rows)

    def __getstate__(self) -> dict[str, Any]:
        # Neither the tower nor gigabytes of tokens are to be copied to every worker.
        shelves = {name: (Path(array.filename), array.shape) for name, array in self._arrays.items()}
        return self.__dict__ | {"tower": None, "_arrays": shelves}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._arrays = {name: _opened_tokens(path, shape) for name, (path, shape) in self._arrays.items()}

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Waits until no other process fills the files of this tower; then keeps others out."""
        path, lock, was_told = self.folder / self._key, None, False
        while lock is None:
            try:
                lock = FileLock(path)
            except ValueError:  # is held
                if not was_told:
                    logger.warning("waiting for another process that fills the cache: it holds %s.lock", path)
                was_told = True
                time.sleep(_LOCK_SECONDS)
        try:
            yield
        finally:
            lock.release()

    def _open(self, source: str) -> "_Shelf":
        return _Shelf(self.folder / f"{source}-{self._key}", self._token_shape())

    @torch.inference_mode()
    def _tokens(self, sources: list[Any]) -> np.ndarray:
        pixels = self.image_processor(sources, return_tensors="pt")["pixel_values"]  # (b, 1, 3, H, W)
        if pixels.shape[1] != 1:
            raise ValueError("Cached tokens expected files of one slice or view each, got a volume.")
        device = next(self.tower.parameters()).device
        with torch.autocast(device.type, dtype=torch.bfloat16):
            tokens = self.tower(pixel_values=pixels.flatten(0, 1).to(device)).last_hidden_state  # (b, S, C)
        return tokens.to(torch.float16).cpu().numpy()

    @torch.inference_mode()
    def _token_shape(self) -> tuple[int, int]:
        size = self.image_processor.size
        device = next(self.tower.parameters()).device
        pixels = torch.zeros(1, 3, size["height"], size["width"], device=device)
        return tuple(self.tower(pixel_values=pixels).last_hidden_state.shape[1:])


class _Shelf:
    """The two files of one data set, open for appending: tokens, and the names of the images that they are of.

    Args:
        path: Of both, without ending.
        shape: (S, C) of one image.

    Attributes:
        rows: Mark of an image to its row.
        waiting: Mark to source, of what is to be computed next.
    """

    def __init__(self, path: Path, shape: tuple[int, int]):
        self.data, self.index = (path.with_name(f"{path.name}.{ending}") for ending in ("f16", "index"))
        self.shape = shape
        self.rows: dict[str, int] = {}
        self.waiting: dict[str, Any] = {}
        self._files = ExitStack()

    def __enter__(self) -> "_Shelf":
        row_bytes = self.shape[0] * self.shape[1] * 2
        written = self.index.read_text(encoding="utf-8") if self.index.is_file() else ""
        # A killed run may have written half a name, or names and tokens of which only one reached the disk.
        whole_lines = written.split("\n")[:-1]
        names = whole_lines[: self.data.stat().st_size // row_bytes] if self.data.is_file() else []
        kept = "".join(f"{name}\n" for name in names)
        if kept != written:
            self.index.write_text(kept, encoding="utf-8")
        self.rows = {name: row for row, name in enumerate(names)}
        self._count = len(names)
        self._data_file = self._files.enter_context(open(self.data, "ab"))
        self._index_file = self._files.enter_context(open(self.index, "a", encoding="utf-8"))
        self._data_file.truncate(len(names) * row_bytes)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.close()

    def want(self, mark: str, source: Any) -> None:
        """Puts an image among those to be computed, unless its tokens are there."""
        if mark not in self.rows:
            self.waiting[mark] = source

    def add(self, compute: Callable[[list[Any]], np.ndarray]) -> int:
        """Computes and writes the tokens of what is waiting; returns of how many images."""
        marks = list(self.waiting)
        if marks:
            self._data_file.write(compute(list(self.waiting.values())).tobytes())
            self._data_file.flush()
            self._index_file.writelines(f"{mark}\n" for mark in marks)
            self._index_file.flush()
        for mark in marks:
            self.rows[mark] = self._count
            self._count += 1
        self.waiting = {}
        return len(marks)

    def tokens(self) -> np.memmap:
        """Returns all tokens (rows, S, C) of the file."""
        return _opened_tokens(self.data, (self._count, *self.shape))


def _opened_tokens(path: Path, shape: tuple[int, ...]) -> np.memmap:
    return np.memmap(path, dtype=np.float16, mode="r", shape=shape)


def _source(image: Any) -> Any:
    """Returns the path or the bytes of an image."""
    if isinstance(image, ImageFile):
        image = image.source
    elif isinstance(image, Mapping):
        image = image["path"] if image.get("bytes") is None else image["bytes"]
    if hasattr(image, "read"):  # bytes in a shard
        image = image.read()
    return Path(image) if isinstance(image, (str, os.PathLike)) else image


def _name(source: Any, mark: str) -> Any:
    return source if isinstance(source, Path) else mark


def _mark(source: Any) -> str:
    """Names an image in the index.

    A file by its folder and size too, so that another file of its name is another image; bytes by their content.
    """
    if isinstance(source, Path):
        return f"{source.parent.name}/{source.name} {source.stat().st_size}"
    if not isinstance(source, bytes):
        raise ValueError(f"Cached tokens expected image files or their bytes, got {type(source).__name__}.")
    return f"sha256:{hashlib.sha256(source).hexdigest()} {len(source)}"


def _fingerprint(tower: torch.nn.Module, image_processor: M3FMImageProcessor) -> str:
    digest = hashlib.sha256(json.dumps(image_processor.to_dict(), sort_keys=True, default=str).encode())
    for name, weight in sorted(tower.state_dict().items()):
        digest.update(name.encode() + weight.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
