# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Choose the worst, the median and the best cases of a run, and prepare them to be looked at without identifiers.

A case of report generation scores the mean over its languages of ROUGE-L and of the F1 of its stated findings; a case
of diagnosis the mean probability that was given to the truth.
"""

import base64
import difflib
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from ..data import Study
from ..data.labels import FINDINGS, NO_FINDING
from ..image_processing_m3fm import M3FMImageProcessor
from .finding_labeler import LabeledFinding, label_reports
from .ngrams import rouge_l
from .titles import LANGUAGE_TITLES, finding_title
from .tokens import tokenize_report

RANKS = ("worst", "median", "best")
CHIP_KINDS = ("found", "misplaced", "missed", "invented")
IMAGE_SIZE = 256  # pixels, the longest side of an image on the page
MAX_IMAGES = 2  # of a study; a radiograph's frontal and lateral view
_JPEG_QUALITY = 80

_STATED = frozenset({"positive", "uncertain"})
# A Chinese character stands alone, other writing is told apart by words.
_PIECE = re.compile(r"[\u3400-\u9fff]|\d+(?:\.\d+)+|[^\W\u3400-\u9fff]+|[^\w\s]")
# One character in common by chance is no agreement that a reader wants to see.
_LEAST_MATCH = 2


@dataclass(frozen=True)
class Chip:
    """One finding of a case.

    Attributes:
        kind: One of `CHIP_KINDS`; "misplaced" is found, with another side or lobe.
        title: What it is called.
        place: Side and lobe, "left lower" or "bilateral"; of the reference, and of the generated report if that one
            is different; may be empty.
    """

    kind: str
    title: str
    place: str


@dataclass(frozen=True)
class ReportPair:
    """A reference and a generated report side by side.

    Attributes:
        language: Code.
        title: Name of the language.
        reference: Pieces that make up the text, and whether the other text has them too.
        written: As `reference`, of the generated report.
        rouge_l: ROUGE-L of the two.
        chips: Findings of either text.
    """

    language: str
    title: str
    reference: list[tuple[str, bool]]
    written: list[tuple[str, bool]]
    rouge_l: float
    chips: list[Chip]


@dataclass(frozen=True)
class LabelOutcome:
    """What was predicted for one label of a case; `truth` and `decision` are whether it is there."""

    title: str
    truth: bool
    decision: bool
    probability: float


@dataclass(frozen=True)
class Case:
    """One study as a page shows it.

    Attributes:
        number: On the page, from 1.
        rank: One of `RANKS`.
        score: What cases are ranked by.
        images: JPEG data URIs.
        hidden_images: How many images of the study are not shown.
        reports: Of report generation.
        labels: Of diagnosis.
    """

    number: int
    rank: str
    score: float
    images: list[str]
    hidden_images: int
    reports: list[ReportPair] = field(default_factory=list)
    labels: list[LabelOutcome] = field(default_factory=list)


def select_cases(
    predictions: Sequence[dict[str, Any]], task: str, studies_by_id: dict[str, Study] | None, max_cases: int
) -> list[Case]:
    """Ranks the studies and prepares the worst, the median and the best of them, as many of each.

    Args:
        predictions: Rows of `predictions.jsonl`.
        task: "report" or "diagnosis".
        studies_by_id: Where images come from; None leaves them out.
        max_cases: At most this many; fewer than 3 give fewer ranks.

    Raises:
        ValueError: If an image cannot be read.
    """
    scores = _report_scores(predictions) if task == "report" else [_truth_probability(row) for row in predictions]
    present = _present_report if task == "report" else _present_labels
    cases = []
    for rank, index in _choose(scores, max_cases):
        row = predictions[index]
        study = (studies_by_id or {}).get(row["study_id"])
        images = thumbnails(study) if study else []
        hidden = len(study.images) - len(images) if study else 0
        case = Case(len(cases) + 1, rank, scores[index], images, hidden, **present(row))
        cases.append(case)
    return cases


def thumbnails(study: Study) -> list[str]:
    """Returns the first images of a study as JPEG data URIs, windowed as the model sees them; of a volume, one slice.

    Raises:
        ValueError: If an image cannot be read.
    """
    if not study.images:
        return []
    processor = M3FMImageProcessor(size=IMAGE_SIZE, image_mean=[0.0] * 3, image_std=[1.0] * 3, num_slices=1)
    planes = processor.preprocess([list(study.images[:MAX_IMAGES])], return_tensors="np")["pixel_values"][0]
    return [_jpeg(plane) for plane in planes]


def mark_common(first: str, second: str) -> tuple[list[tuple[str, bool]], list[tuple[str, bool]]]:
    """Cuts two texts into pieces and marks those they have in common, in the same order.

    Words are compared without case, Chinese by characters; a single Chinese character or sign in common stays
    unmarked. Joined again the pieces are the texts.
    """
    spans = [list(_PIECE.finditer(text)) for text in (first, second)]
    keys = [[match.group().lower() for match in matches] for matches in spans]
    matcher = difflib.SequenceMatcher(None, *keys, autojunk=False)
    blocks = [block for block in matcher.get_matching_blocks() if _is_shown(keys[0][block.a : block.a + block.size])]
    return (
        list(_pieces(first, spans[0], [(block.a, block.size) for block in blocks])),
        list(_pieces(second, spans[1], [(block.b, block.size) for block in blocks])),
    )


def finding_chips(reference: dict[str, LabeledFinding], written: dict[str, LabeledFinding]) -> list[Chip]:
    """Compares the stated findings of two reports: what was found first, then in the order of `FINDINGS`."""
    expected, stated = _stated(reference), _stated(written)
    chips = []
    for name in (name for name in FINDINGS if name in expected or name in stated):
        places = [_place(labels[name]) for labels in (expected, stated) if name in labels]
        if name not in stated:
            kind = "missed"
        elif name not in expected:
            kind = "invented"
        else:
            kind = "found" if places[0] == places[1] else "misplaced"
        place = " → ".join(place or "no place" for place in places) if kind == "misplaced" else places[0]
        chips.append(Chip(kind, finding_title(name), place))
    return sorted(chips, key=lambda chip: CHIP_KINDS.index(chip.kind))


def _place(label: LabeledFinding) -> str:
    sides = "bilateral" if len(label.sides) > 1 else "".join(label.sides)
    lobes = " and ".join(lobe for lobe in ("upper", "middle", "lower") if lobe in label.lobes)
    return " ".join(part for part in (sides, lobes) if part)


def _stated(labels: dict[str, LabeledFinding]) -> dict[str, LabeledFinding]:
    return {name: label for name, label in labels.items() if label.state in _STATED and name != NO_FINDING}


def _report_scores(predictions: Sequence[dict[str, Any]]) -> list[float]:
    """Returns the mean over languages of ROUGE-L and finding F1 for each study."""
    collected: list[list[float]] = [[] for _ in predictions]
    for language in dict.fromkeys(code for row in predictions for code in _languages(row)):
        places = [place for place, row in enumerate(predictions) if language in _languages(row)]
        references = [predictions[place]["reference"][language] for place in places]
        written = [predictions[place]["prediction"][language] for place in places]
        labels = label_reports([*references, *written], language)
        for index, place in enumerate(places):
            overlap = rouge_l(*(tokenize_report(text[index], language) for text in (written, references)))
            agreement = _finding_f1(labels[index], labels[len(places) + index])
            collected[place].append((overlap + agreement) / 2)
    return [float(np.mean(values)) if values else float("nan") for values in collected]


def _finding_f1(reference: dict[str, LabeledFinding], written: dict[str, LabeledFinding]) -> float:
    """Returns the F1 of one study's stated findings; 1 where neither report states any."""
    expected, stated = set(_stated(reference)), set(_stated(written))
    if not expected and not stated:
        return 1.0
    return 2 * len(expected & stated) / (len(expected) + len(stated))


def _languages(row: dict[str, Any]) -> list[str]:
    return [code for code in row["prediction"] if code in row["reference"]]


def _truth_probability(row: dict[str, Any]) -> float:
    given = [row["probabilities"][label] for label in _known_labels(row)]
    truth = [row["labels"][label] for label in _known_labels(row)]
    chances = [p if t else 1 - p for p, t in zip(given, truth, strict=True)]
    return float(np.mean(chances)) if chances else float("nan")


def _known_labels(row: dict[str, Any]) -> list[str]:
    known = (label for label, truth in row["labels"].items() if truth is not None)
    return [label for label in known if row["probabilities"].get(label) is not None]


def _choose(scores: Sequence[float], max_cases: int) -> Iterator[tuple[str, int]]:
    """Yields rank and index: the worst first, the best from the very best down, none twice."""
    order = sorted((i for i in range(len(scores)) if scores[i] == scores[i]), key=lambda i: (scores[i], i))
    each = min(max_cases, len(order)) // len(RANKS)
    if each == 0:
        order = order[-max_cases:] if max_cases > 0 else []
        yield from (("best", index) for index in reversed(order))
        return
    start = (len(order) - each) // 2
    yield from (("worst", index) for index in order[:each])
    yield from (("median", index) for index in order[start : start + each])
    yield from (("best", index) for index in reversed(order[-each:]))


def _present_report(row: dict[str, Any]) -> dict[str, list[ReportPair]]:
    pairs = []
    for language in _languages(row):
        reference, written = row["reference"][language], row["prediction"][language]
        labels = label_reports([reference, written], language)
        pairs.append(
            ReportPair(
                language,
                LANGUAGE_TITLES[language],
                *mark_common(reference, written),
                rouge_l(tokenize_report(written, language), tokenize_report(reference, language)),
                finding_chips(*labels),
            )
        )
    return {"reports": pairs}


def _present_labels(row: dict[str, Any]) -> dict[str, list[LabelOutcome]]:
    outcomes = [
        LabelOutcome(
            finding_title(label),
            bool(row["labels"][label]),
            bool(row["decisions"].get(label)),
            row["probabilities"][label],
        )
        for label in _known_labels(row)
    ]
    return {"labels": sorted(outcomes, key=lambda outcome: (not outcome.truth, -outcome.probability))}


def _is_shown(keys: Sequence[str]) -> bool:
    words = [key for key in keys if key[0].isalnum()]
    return len(words) >= _LEAST_MATCH or any(len(word) > 1 for word in words)


def _pieces(
    text: str, spans: Sequence[re.Match[str]], blocks: Sequence[tuple[int, int]]
) -> Iterator[tuple[str, bool]]:
    end = 0
    for place, size in blocks:
        start, stop = spans[place].start(), spans[place + size - 1].end()
        if start > end:
            yield text[end:start], False
        yield text[start:stop], True
        end = stop
    if end < len(text):
        yield text[end:], False


def _jpeg(plane: np.ndarray) -> str:
    """Encodes (3, H, W) in 0..1 anew, so that nothing but pixels is kept."""
    pixels = np.rint(np.moveaxis(plane, 0, -1) * 255).clip(0, 255).astype(np.uint8)  # (H, W, 3)
    gray = (pixels == pixels[..., :1]).all()
    image = Image.fromarray(np.ascontiguousarray(pixels[..., 0] if gray else pixels))
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=_JPEG_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
