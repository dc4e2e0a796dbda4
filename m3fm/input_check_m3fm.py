# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Say of a study whether it is what the model was made for: a chest X-ray or a chest CT of usable quality.

`InputCheck.look` reads the pixels before the model runs, `InputCheck.judge` the image tower's tokens after it. Both
add remarks to a `StudyCheck`, whose verdict is the gravest of them.

Letters in shapes are those of `modeling_m3fm`: N images of a study (views, or slices of a volume), S tokens of one
image, C width of the tower; h and w are rows and columns of a reduced slice.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch

from .chest_image_m3fm import ChestImage, Remark
from .input_statistics_m3fm import PixelLimits, display_planes, look_at_planes, look_at_volume, thumbnail

CHECK_FILE = "input_check.safetensors"
_METADATA_KEY = "input_check"
_VERSION = 1

# What the heads tell apart, in the order of their outputs.
KINDS = ("frontal", "lateral", "ct", "other")
THUMBNAIL_KINDS = ("upright", "inverted", "neither")
_BINARY_HEADS = ("ap", "inverted", "turned")  # AP against PA; inverted; turned: each one output

_RANK = {"info": 0, "warning": 1, "refuse": 2}
_VERDICTS = ("ok", "suspect", "refused")
_PROBE_VALUES = 4


@dataclass(frozen=True)
class TowerLimits:
    """Say where remarks of the learned part begin. Scores are log odds: 0 is even, 4.6 is 99 to 1.

    Attributes:
        other_refuse: Score of `KINDS`' "other" against the rest, above which a study is refused.
        other_warn: The same, above which it is suspect.
        exchange: Score of a thumbnail as an inverted radiograph, above which black and white are exchanged.
        inverted: Score of the image tower for "inverted", above which it is said.
        turned: Score for "turned", above which it is said.
        modality: Score of one modality against the other, above which it is taken as seen.
        wrong_modality: The same, above which a stated modality is contradicted.
        view: Score of a view against the others, above which it is taken as seen.
        wrong_view: Score of lateral against frontal or the reverse, above which a stated view is contradicted.
    """

    other_refuse: float = 4.6
    other_warn: float = 0.0
    exchange: float = 1.5
    inverted: float = 2.2
    turned: float = 2.2
    modality: float = 2.2
    wrong_modality: float = 4.6
    view: float = 1.4
    wrong_view: float = 3.0


@dataclass(frozen=True)
class Part:
    """Hold what is known of one `ChestImage` of a study, for the images that the model makes of it.

    Attributes:
        planes: Images that it gives the model: 1, or the chosen slices of a volume.
        modality: As its source states it.
        view: As its source states it.
    """

    planes: int
    modality: str | None
    view: str | None


@dataclass(frozen=True)
class StudyCheck:
    """Say what was found in one study.

    Attributes:
        remarks: Those of reading, then those of the check.
        images: Images and volumes of the study.
        modality: "cxr" or "ct", None where neither the file nor the image tells, or where they are mixed.
        modality_from: "file" or "image".
        view: "PA", "AP" or "LATERAL" of a radiograph, None where unknown or where there are several.
        view_from: "file" or "image".
        seen: Probability of each of `KINDS`, mean over the images; None before `judge`.
        parts: One for each image or volume.
    """

    remarks: tuple[Remark, ...] = ()
    images: int = 0
    modality: str | None = None
    modality_from: str | None = None
    view: str | None = None
    view_from: str | None = None
    seen: Mapping[str, float] | None = None
    parts: tuple[Part, ...] = field(default=(), repr=False)

    @property
    def verdict(self) -> str:
        """Return "ok", "suspect" or "refused"."""
        return _VERDICTS[max((_RANK[remark.severity] for remark in self.remarks), default=0)]

    @property
    def reason(self) -> str:
        """Return why a study is refused or suspect, for people; empty if it is ok."""
        grave = {"refused": "refuse", "suspect": "warning"}.get(self.verdict)
        return "; ".join(dict.fromkeys(remark.message for remark in self.remarks if remark.severity == grave))

    def remarked(self, *remarks: Remark) -> "StudyCheck":
        """Return the check with further remarks."""
        return replace(self, remarks=(*self.remarks, *remarks))

    def as_dict(self) -> dict[str, Any]:
        """Return the check as plain data that JSON can hold."""
        return {
            "verdict": self.verdict,
            "modality": self.modality,
            "modality_from": self.modality_from,
            "view": self.view,
            "view_from": self.view_from,
            "images": self.images,
            "findings": [remark.as_dict() for remark in self.remarks],
        }


class InputCheck:
    """Check studies by their pixels, and by the tokens of the image tower that the learned part was fitted to.

    Example:
    ```python
    >>> check = InputCheck.from_pretrained(checkpoint).for_tower(model.vision_model)
    >>> found = check.look(images)
    >>> images, found = check.upright(images, found)
    >>> found = check.judge(found, tokens, image_mask)  # of the images as they are now
    >>> found.verdict, found.reason, found.as_dict()
    ```

    Args:
        weights: Arrays of the learned part, see `m3fm.training.input_check`; None for pixel statistics alone.
        pixel_limits: Where remarks of pixel statistics begin.
        tower_limits: Where remarks of the learned part begin.
    """

    def __init__(
        self,
        weights: Mapping[str, np.ndarray] | None = None,
        pixel_limits: PixelLimits | None = None,
        tower_limits: TowerLimits | None = None,
    ):
        self.weights = {name: np.asarray(value, dtype=np.float32) for name, value in (weights or {}).items()}
        self.pixel_limits = pixel_limits or PixelLimits()
        self.tower_limits = tower_limits or TowerLimits()

    @classmethod
    def statistical(cls) -> "InputCheck":
        """Return a check by pixel statistics alone, for a checkpoint that has no learned part."""
        return cls()

    @classmethod
    def from_pretrained(
        cls,
        checkpoint: str | os.PathLike,
        *,
        revision: str | None = None,
        token: bool | str | None = None,
        cache_dir: str | os.PathLike | None = None,
        local_files_only: bool = False,
    ) -> "InputCheck":
        """Load the check of a checkpoint; one without `input_check.safetensors` is checked by pixel statistics alone.

        Args:
            checkpoint: Folder, or name on the hub.
            revision: As for `AutoModel.from_pretrained`.
            token: As for `AutoModel.from_pretrained`.
            cache_dir: As for `AutoModel.from_pretrained`.
            local_files_only: As for `AutoModel.from_pretrained`.

        Raises:
            ValueError: If the file is not an input check of this version.
        """
        from transformers.utils import cached_file

        path = cached_file(
            checkpoint,
            CHECK_FILE,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        return cls.statistical() if path is None else cls._load(path)

    @classmethod
    def _load(cls, path: str) -> "InputCheck":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="np") as file:
                weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
                stored = json.loads((file.metadata() or {}).get(_METADATA_KEY, "{}"))
        except (SafetensorError, json.JSONDecodeError) as error:
            raise ValueError(f"{CHECK_FILE}: cannot be read as safetensors with JSON metadata ({error})") from None
        if stored.get("version") != _VERSION:
            raise ValueError(f"{CHECK_FILE}: got version {stored.get('version')!r}, expected {_VERSION}")
        try:
            limits = PixelLimits(**stored["pixel_limits"]), TowerLimits(**stored["tower_limits"])
        except (KeyError, TypeError):
            known = [each.name for kind in (PixelLimits, TowerLimits) for each in fields(kind)]
            raise ValueError(f"{CHECK_FILE}: expected pixel_limits and tower_limits with some of {known}") from None
        return cls(weights, *limits)

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write `input_check.safetensors` into a folder, weights in half precision."""
        from safetensors.numpy import save

        stored = {
            "version": _VERSION,
            "pixel_limits": asdict(self.pixel_limits),
            "tower_limits": asdict(self.tower_limits),
        }
        os.makedirs(folder, exist_ok=True)
        weights = {name: np.ascontiguousarray(value, dtype=np.float16) for name, value in self.weights.items()}
        weights["probe"] = self.weights.get("probe", np.zeros(0, np.float32))
        with open(os.path.join(folder, CHECK_FILE), "wb") as file:
            file.write(save(weights, {_METADATA_KEY: json.dumps(stored)}))

    @property
    def reads_tokens(self) -> bool:
        """Return whether `judge` has something to say."""
        return "kind.weight" in self.weights

    def for_tower(self, tower: torch.nn.Module) -> "InputCheck":
        """Return the check for a model with this image tower.

        Tokens of another tower, or of one that was trained further, mean something else: the check is then one of
        pixels alone.
        """
        if not self.reads_tokens or same_tower(self.weights["probe"], tower):
            return self
        kept = {name: value for name, value in self.weights.items() if name.startswith("thumbnail.")}
        return InputCheck(kept, self.pixel_limits, self.tower_limits)

    def look(self, images: Sequence[ChestImage]) -> StudyCheck:
        """Check the pixels of the images of one study.

        Args:
            images: As they were read; volumes best reduced to the slices that the model reads.
        """
        remarks: list[Remark] = [remark for image in images for remark in image.remarks]
        for number, image in enumerate(images):
            seen = look_at_volume(image, self.pixel_limits)
            seen += look_at_planes(image, display_planes(image), self.pixel_limits)
            remarks += _numbered(seen, number, len(images))
        parts = tuple(Part(len(image.pixels), image.modality, image.view) for image in images)
        modality = _only({part.modality for part in parts})
        view = _only({part.view for part in parts})
        return StudyCheck(
            tuple(dict.fromkeys(remarks)),
            len(parts),
            modality,
            "file" if modality else None,
            view,
            "file" if view else None,
            parts=parts,
        )

    def upright(self, images: Sequence[ChestImage], check: StudyCheck) -> tuple[list[ChestImage], StudyCheck]:
        """Exchange black and white of plainly inverted radiographs.

        Args:
            images: Of one study.
            check: Of `look`.

        Returns:
            The images, and the check with a remark "inverted" for each that was changed.
        """
        changed = []
        for number, image in enumerate(images):
            score = self._inversion_score(image)
            if score > self.tower_limits.exchange:
                message = "the radiograph is inverted: black and white were exchanged before the model read it"
                remark = Remark("inverted", message, "warning", round(score, 2), self.tower_limits.exchange)
                image = replace(image, pixels=1 - np.asarray(image.pixels)).remarked(remark)
                check = check.remarked(*_numbered([remark], number, len(images)))
            changed.append(image)
        return changed, check

    def _inversion_score(self, image: ChestImage) -> float:
        """Return the log odds that an image is an inverted radiograph; minus infinity for what cannot be one."""
        cannot = image.modality == "ct" or image.units == "hu" or len(image.pixels) > 1
        if cannot or "thumbnail.weight" not in self.weights:
            return -np.inf
        (plane,) = display_planes(image)
        scores = self._scores("thumbnail", thumbnail(plane)[None])
        return float(against(scores, [THUMBNAIL_KINDS.index("inverted")])[0])

    def judge(self, check: StudyCheck, tokens: torch.Tensor, image_mask: torch.Tensor | None = None) -> StudyCheck:
        """Add what the image tower sees; a few hundred multiplications for each token.

        Args:
            check: Of `look` or `upright`.
            tokens: (N, S, C), the tower's last hidden state; the first token is the class token.
            image_mask: (N,), true where an image is real; None if all are.

        Returns:
            The check, unchanged if there is no learned part.

        Raises:
            ValueError: If the tokens have another shape or width.
        """
        if not self.reads_tokens:
            return check
        width = self.weights["kind.weight"].shape[1] // 2
        if tokens.dim() != 3 or tokens.shape[-1] != width or tokens.shape[1] < 2:
            raise ValueError(f"tokens: got shape {tuple(tokens.shape)}, expected (N, S, {width}) with S of 2 or more")
        if image_mask is not None:
            tokens = tokens[image_mask.to(tokens.device)]
        features = pooled_tokens(tokens).cpu().numpy()  # (N, 2 C)
        if not len(features):
            return check
        scores = {head: self._scores(head, features) for head in ("kind", *_BINARY_HEADS)}
        groups = self._groups(check, scores["kind"])
        remarks: list[Remark] = []
        for numbers, part in groups:
            total = len(features) if len(numbers) == 1 else 1
            remarks += _numbered(self._judge_group(numbers, part, scores), int(numbers[0]), total)
        remarks += self._judge_views(check, groups, scores["kind"])
        seen = _softmax(scores["kind"]).mean(0)
        check = replace(check, seen={kind: float(p) for kind, p in zip(KINDS, seen, strict=True)})
        check = check.remarked(*dict.fromkeys(remarks))
        return self._fill_in(check, groups, scores)

    def _scores(self, head: str, features: np.ndarray) -> np.ndarray:
        return features @ self.weights[f"{head}.weight"].T + self.weights[f"{head}.bias"]

    def _groups(self, check: StudyCheck, kinds: np.ndarray) -> list[tuple[np.ndarray, Part]]:
        """Put together what is judged as one: the images of each part, and all parts that are CT.

        Args:
            check: Whose parts the images belong to.
            kinds: Scores (N, 4).
        """
        parts = check.parts
        if sum(part.planes for part in parts) != len(kinds):
            # The processor chose among the slices: only what all parts share is known.
            shared = Part(1, _only({part.modality for part in parts}), _only({part.view for part in parts}))
            parts = (shared,) * len(kinds)
        owners = np.repeat(np.arange(len(parts)), [part.planes for part in parts])  # (N,)
        ct_scores = against(kinds[:, : KINDS.index("other")], [KINDS.index("ct")])
        groups, slices = [], []
        for owner, part in enumerate(parts):
            numbers = np.flatnonzero(owners == owner)
            if part.modality == "ct" or (part.modality is None and ct_scores[numbers].mean() > 0):
                slices.append((numbers, part))
            else:
                groups.append((numbers, part))
        if slices:
            groups.append((np.concatenate([numbers for numbers, _ in slices]), slices[0][1]))
        return groups

    def _judge_group(self, numbers: np.ndarray, part: Part, scores: dict[str, np.ndarray]) -> list[Remark]:
        limits = self.tower_limits
        kinds = scores["kind"][numbers]
        other = float(against(kinds, [KINDS.index("other")]).mean())
        for severity, limit in (("refuse", limits.other_refuse), ("warning", limits.other_warn)):
            if other > limit:
                verb = "is" if severity == "refuse" else "may be"
                message = f"this {verb} neither a chest X-ray nor a chest CT: score {other:.1f}, limit {limit:.1f}"
                return [Remark("not_a_chest", message, severity, round(other, 2), limit)]
        remarks = []
        ct = float(against(kinds[:, : KINDS.index("other")], [KINDS.index("ct")]).mean())
        stated, seen = part.modality, "ct" if ct > 0 else "cxr"
        if stated and stated != seen and abs(ct) > limits.wrong_modality:
            names = {"cxr": "a chest X-ray", "ct": "a chest CT"}
            message = f"the file says {names[stated]}, the image looks like {names[seen]}"
            remarks.append(Remark("wrong_modality", message, "warning", round(abs(ct), 2), limits.wrong_modality))
        if seen == "cxr":
            for code, message in (
                ("inverted", "black and white seem to be exchanged"),
                ("turned", "the radiograph seems to lie on its side or upside down"),
            ):
                score = float(scores[code][numbers].mean())
                if score > getattr(limits, code):
                    remarks.append(Remark(code, message, "warning", round(score, 2), getattr(limits, code)))
        return remarks

    def _judge_views(
        self, check: StudyCheck, groups: list[tuple[np.ndarray, Part]], kinds: np.ndarray
    ) -> list[Remark]:
        """Compare stated views with seen ones, and say where there is no frontal view."""
        limit = self.tower_limits.wrong_view
        remarks, laterals, radiographs = [], 0, 0
        for numbers, part in groups:
            frontal, lateral, ct, other = kinds[numbers].mean(0)
            if max(frontal, lateral) < max(ct, other):
                continue
            score = float(lateral - frontal)
            radiographs += 1
            laterals += score > 0 if part.view is None else part.view == "LATERAL"
            if part.view is not None and (part.view == "LATERAL") != (score > 0) and abs(score) > limit:
                seen = "lateral" if score > 0 else "frontal"
                message = f"the file says {part.view}, the image looks {seen}"
                remarks.append(Remark("view", message, "warning", round(abs(score), 2), limit))
        if radiographs and laterals == radiographs:
            message = "there is no frontal view, and the model has hardly seen lateral ones"
            remarks.append(Remark("view", message, "warning"))
        return remarks

    def _fill_in(
        self, check: StudyCheck, groups: list[tuple[np.ndarray, Part]], scores: dict[str, np.ndarray]
    ) -> StudyCheck:
        """Add modality and view as seen where the file does not say."""
        limits = self.tower_limits
        if any(remark.code == "not_a_chest" and remark.severity == "refuse" for remark in check.remarks):
            return check
        if check.modality is None and all(part.modality is None for part in check.parts):
            ct = [float(against(scores["kind"][n][:, :3], [KINDS.index("ct")]).mean()) for n, _ in groups]
            if min(map(abs, ct)) > limits.modality:
                if len({score > 0 for score in ct}) == 1:
                    check = replace(check, modality="ct" if ct[0] > 0 else "cxr", modality_from="image")
                else:
                    message = "images of the study are seen as X-rays and as CT, expected one of them"
                    check = check.remarked(Remark("wrong_modality", message, "warning"))
        if check.modality == "cxr" and check.view is None and all(part.view is None for part in check.parts):
            view = _only({self._view_of(numbers, scores) for numbers, _ in groups}, strict=True)
            check = replace(check, view=view, view_from="image" if view else None)
        return check

    def _view_of(self, numbers: np.ndarray, scores: dict[str, np.ndarray]) -> str | None:
        frontal, lateral = scores["kind"][numbers].mean(0)[:2]
        ap = float(scores["ap"][numbers].mean())
        if abs(lateral - frontal) < self.tower_limits.view:
            return None
        if lateral > frontal:
            return "LATERAL"
        return None if abs(ap) < self.tower_limits.view else "AP" if ap > 0 else "PA"


def pooled_tokens(tokens: torch.Tensor) -> torch.Tensor:
    """Put the class token beside the mean of the patch tokens: (N, S, C) to (N, 2 C) float32."""
    tokens = tokens.detach().float()
    return torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], dim=1)


def probe_tower(tower: torch.nn.Module) -> np.ndarray:
    """Take a few values of every parameter, in the order of their names, to know a tower by: (values,) float32."""
    values = []
    for _, parameter in sorted(tower.named_parameters()):
        flat = parameter.detach().flatten()
        places = torch.linspace(0, len(flat) - 1, min(len(flat), _PROBE_VALUES)).round().long()
        values.append(flat[places.to(flat.device)].float().cpu())
    return torch.cat(values).numpy()


def same_tower(probe: np.ndarray, tower: torch.nn.Module) -> bool:
    """Return whether a tower has the values of a probe, up to the rounding of half precision."""
    values = probe_tower(tower)
    return values.shape == probe.shape and bool(np.allclose(values, probe, rtol=0.02, atol=1e-3))


def _numbered(remarks: list[Remark], number: int, total: int) -> list[Remark]:
    """Say which of several images the remarks are about."""
    if total == 1:
        return remarks
    return [replace(remark, message=f"image {number + 1} of {total}: {remark.message}") for remark in remarks]


def _only(values: set[str | None], strict: bool = False) -> str | None:
    """Return the one value that there is, leaving out None; with `strict`, None counts as another value."""
    known = values if strict else values - {None}
    return next(iter(known)) if len(known) == 1 else None


def against(scores: np.ndarray, columns: list[int]) -> np.ndarray:
    """Return the log odds (N,) of some outcomes against the rest, from scores (N, outcomes)."""
    rest = [i for i in range(scores.shape[1]) if i not in columns]
    return np.logaddexp.reduce(scores[:, columns], axis=1) - np.logaddexp.reduce(scores[:, rest], axis=1)


def _softmax(scores: np.ndarray) -> np.ndarray:
    exponentials = np.exp(scores - scores.max(1, keepdims=True))
    return exponentials / exponentials.sum(1, keepdims=True)


__all__ = ["InputCheck", "StudyCheck"]
