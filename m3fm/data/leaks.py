# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Tell what the parts of a data set have in common that they should not.

A score on a validation part says little where the same patient, the same paper or the same image was trained on. Ids
are never in a summary: they are written to a file, where that is asked for.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

from .groups import group_keys
from .near_duplicates import RecordHashes
from .schema import StudyRecord
from .statistics import UNSPLIT

__all__ = ["LEAK_KINDS", "LeakReport", "SharedMarks", "find_leaks", "study_marks"]

#: What no two parts should share.
LEAK_KINDS = ("patient", "document", "image")
#: Studies of two parts that are joined by any of these, through whatever chain.
GROUP = "group"
_PART_ORDER = ("train", "validation", "test")
# Marks that mean the same in every set; others ("study:12", "article:...") are names within one.
_GLOBAL_MARKS = ("doi:", "url:")
_NAMES = {"patient": "patient", "document": "source document"}
_TITLES = {
    "patient": "patients",
    "document": "source documents",
    "image": "near-duplicate images",
    GROUP: "any of these, through chains",
}


@dataclass(frozen=True)
class SharedMarks:
    """Hold what two parts share of one kind.

    Attributes:
        kind: One of `LEAK_KINDS`, "group", or "report:" and a language code.
        parts: The two.
        shared: Patients, documents, sets of near-duplicate images, groups or texts that are in both.
        studies: Studies concerned, of each of the two.
        in_groups: For report texts: studies concerned that also share a group, of each of the two.
        members: Ids of the studies concerned: for each shared thing those of the first part and those of the second.
    """

    kind: str
    parts: tuple[str, str]
    shared: int
    studies: tuple[int, int]
    in_groups: tuple[int, int] | None = None
    members: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class LeakReport:
    """Hold what the parts of a set share.

    Attributes:
        sizes: Part to studies.
        shared: For each pair of parts and each kind, what they share.
        known: Of how many studies the patient and a source document are told, and an image was compared: by kind. What
            is not known is not compared.
        looked_at_images: Whether images were to be compared.
        unreadable_images: Images that could not be.
    """

    sizes: Mapping[str, int]
    shared: tuple[SharedMarks, ...]
    known: Mapping[str, int]
    looked_at_images: bool
    unreadable_images: int = 0

    @property
    def is_clean(self) -> bool:
        """Tell whether no two parts share a patient, a document or a near-duplicate image, as far as is known."""
        return not any(each.shared for each in self.shared if each.kind in LEAK_KINDS)

    def of(self, kind: str, first: str, second: str) -> SharedMarks:
        """Return what two parts share of a kind.

        Raises:
            KeyError: If that was not looked for.
        """
        for each in self.shared:
            if each.kind == kind and set(each.parts) == {first, second}:
                return each
        raise KeyError((kind, first, second))

    def as_dict(self) -> dict[str, Any]:
        """Return the counts as plain data, without ids."""
        return {
            "studies": dict(self.sizes),
            "is_clean": self.is_clean,
            "known": dict(self.known),
            "looked_at_images": self.looked_at_images,
            "unreadable_images": self.unreadable_images,
            "shared": [
                {
                    "kind": each.kind,
                    "parts": list(each.parts),
                    "shared": each.shared,
                    "studies": dict(zip(each.parts, each.studies, strict=True)),
                    "in_groups": each.in_groups and dict(zip(each.parts, each.in_groups, strict=True)),
                    "share_of_smaller_part": self._share(each),
                }
                for each in self.shared
            ],
        }

    def summary(self) -> str:
        """Return a verdict and a table of what is shared, for people, without ids."""
        return "\n".join([*self._verdict(), *self._table(), *self._notes()])

    def write(self, path: Path) -> None:
        """Write JSON lines with the ids of the studies concerned: one line for each thing shared by two parts."""
        with open(path, "w", encoding="utf-8", newline="\n") as file:
            for each in self.shared:
                for studies in each.members:
                    line = {"kind": each.kind, "studies": dict(zip(each.parts, map(list, studies), strict=True))}
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def _smaller(self, each: SharedMarks) -> int:
        """Return which of the two parts is the smaller; the later one of two equal parts, which is what scores."""
        return min((1, 0), key=lambda place: self.sizes[each.parts[place]])

    def _share(self, each: SharedMarks) -> float:
        smaller = self._smaller(each)
        return round(each.studies[smaller] / max(1, self.sizes[each.parts[smaller]]), 4)

    def _verdict(self) -> list[str]:
        sizes = ", ".join(f"{part} {count:,}" for part, count in self.sizes.items())
        if len(self.sizes) < 2:
            return [f"One part alone ({sizes}): nothing to compare."]
        lines = [f"Studies: {sizes}."]
        for each in self.shared:
            if each.kind == GROUP and each.shared:
                smaller = self._smaller(each)
                lines.append(
                    f"LEAK: {each.studies[smaller]:,} of the {self.sizes[each.parts[smaller]]:,} studies of "
                    f"{each.parts[smaller]} ({100 * self._share(each):.0f} %) share a patient, a source document or a "
                    f"near-duplicate image with {each.parts[1 - smaller]}."
                )
        compared = [_TITLES[kind] for kind in LEAK_KINDS if self.known[kind]]
        if self.is_clean and compared:
            lines.append(f"No two parts share any of: {', '.join(compared)}.")
        return lines + self._gaps()

    def _gaps(self) -> list[str]:
        """Say what was not compared: silence of a set is no proof."""
        studies = sum(self.sizes.values())
        lines = []
        for kind in LEAK_KINDS:
            if kind == "image" and not self.looked_at_images:
                lines.append("Images were not compared.")
            elif self.known[kind] < studies:
                told = "an image that could be compared" if kind == "image" else f"a {_NAMES[kind]}"
                known = f"{self.known[kind]:,} of {studies:,} studies"
                lines.append(f"{known} have {told}; of the others nothing is known.")
        return lines

    def _table(self) -> list[str]:
        listed = [each for each in self.shared if each.shared]
        if not listed:
            return []
        lines = [
            "",
            "| parts | what | shared | studies of the first | studies of the second | of the smaller part |",
            "|---|---|---:|---:|---:|---:|",
        ]
        for each in listed:
            title = _TITLES.get(each.kind) or f"identical reports ({each.kind.partition(':')[2]})"
            lines.append(
                f"| {each.parts[0]}, {each.parts[1]} | {title} | {each.shared:,} | {each.studies[0]:,} | "
                f"{each.studies[1]:,} | {100 * self._share(each):.1f} % |"
            )
        return lines

    def _notes(self) -> list[str]:
        lines = []
        texts = [each for each in self.shared if each.kind.startswith("report:") and each.shared]
        if texts:
            alike = sum(sum(each.studies) for each in texts)
            grouped = sum(sum(each.in_groups or (0, 0)) for each in texts)
            lines += [
                "",
                f"Identical reports are counted apart: of these {alike:,} texts {grouped:,} belong to studies that "
                "share something else as well. Where reports follow a template, as those of normal studies do, the "
                "others are no leak; but a model that has learned the template scores well on them.",
            ]
        if self.unreadable_images:
            lines += ["", f"{self.unreadable_images:,} images could not be read, and were not compared."]
        return lines


@dataclass(frozen=True)
class _Member:
    """What is kept of a study."""

    study_id: str
    part: str
    marks: Mapping[str, tuple[str, ...]]
    known: frozenset[str]
    texts: Mapping[str, bytes]


def study_marks(
    record: StudyRecord, images: Sequence[str] = (), by: Sequence[str] = LEAK_KINDS
) -> dict[str, tuple[str, ...]]:
    """Return what a study may share with others, by kind; names that hold within a set alone have it before them.

    Args:
        record: The study.
        images: Its groups of near-duplicate images, as `RecordHashes.marks` names them.
        by: Kinds that are wanted.

    Raises:
        ValueError: For a kind that is not known.
    """
    if unknown := [kind for kind in by if kind not in LEAK_KINDS]:
        raise ValueError(f"by must be some of {', '.join(LEAK_KINDS)}, got {', '.join(map(repr, unknown))}")
    documents = (
        mark if mark.startswith(_GLOBAL_MARKS) else f"{record.source}/{mark}"
        for mark in dict.fromkeys(record.documents)
    )
    marks = {
        "patient": (f"patient:{record.source}/{record.patient_id}",) if record.patient_id else (),
        "document": tuple(documents),
        "image": tuple(images),
    }
    return {kind: marks[kind] for kind in LEAK_KINDS if kind in by}


def find_leaks(
    records: Iterable[StudyRecord],
    parts: Mapping[str, str] | None = None,
    hashes: RecordHashes | None = None,
    by_source: bool = False,
) -> LeakReport:
    """Compare the parts of one set, or of several together.

    Args:
        records: The studies, of one set or of several one after the other; all, whatever their part.
        parts: Study id to part (`m3fm.data.splits.read_split`); studies that are not in it are left out. None: the
            parts that the records state.
        hashes: Of the images of these studies (`hash_records`); None: images are not compared.
        by_source: Whether the parts of each set count as parts of their own, "SET: PART": what one set's training part
            shares with another set's validation part.

    Returns:
        The counts; what is shared by whom is in `SharedMarks.members`.

    Raises:
        ValueError: If no study has a part, or parts are given for studies of several sets, whose ids may be the same.
    """
    members, sources = [], set()
    for record in records:
        sources.add(record.source)
        if parts is not None and len(sources) > 1:
            raise ValueError(f"parts by study id go with one set, got {len(sources)} of them: set each record's split")
        if parts is None or record.study_id in parts:
            members.append(_member(record, parts, hashes, by_source))
    if not members:
        raise ValueError("expected studies to compare, got none that has a part")
    # A study without a mark is a group of its own.
    groups = group_keys(
        [mark for marks in member.marks.values() for mark in marks] or [f"alone:{number}"]
        for number, member in enumerate(members)
    )
    kinds: dict[str, dict[str, dict[str, list[int]]]] = {}  # kind, mark, part, studies
    for kind in (*LEAK_KINDS, GROUP):
        kinds[kind] = defaultdict(lambda: defaultdict(list))
    for number, (member, group) in enumerate(zip(members, groups, strict=True)):
        for kind, mark in [(kind, mark) for kind, marks in member.marks.items() for mark in marks] + [(GROUP, group)]:
            kinds[kind][mark][member.part].append(number)
        for language, digest in member.texts.items():
            texts = kinds.setdefault(f"report:{language}", defaultdict(lambda: defaultdict(list)))
            texts[digest.hex()][member.part].append(number)
    sizes = Counter(member.part for member in members)
    order = sorted(sizes, key=_part_order)
    if hashes is None:
        del kinds["image"]
    shared = []
    for pair in combinations(order, 2):
        joined = _in_both(kinds[GROUP], pair)
        grouped = {number for studies in joined for side in studies for number in side}
        for kind, marks in kinds.items():
            shared.append(_shared(kind, pair, _in_both(marks, pair), grouped, members))
    unreadable = 0 if hashes is None else len(hashes.images.unreadable)
    known = {kind: sum(kind in member.known for member in members) for kind in LEAK_KINDS}
    return LeakReport({part: sizes[part] for part in order}, tuple(shared), known, hashes is not None, unreadable)


def _member(
    record: StudyRecord, parts: Mapping[str, str] | None, hashes: RecordHashes | None, by_source: bool
) -> _Member:
    part = (record.split if parts is None else parts[record.study_id]) or UNSPLIT
    images = () if hashes is None else hashes.marks.get((record.source, record.study_id), ())
    texts = {
        language: hashlib.sha256((report.raw or report.text).strip().encode()).digest()[:12]
        for language, report in sorted(record.reports.items())
        if (report.raw or report.text).strip()
    }
    name = f"{record.source}: {part}" if by_source else part
    marks = study_marks(record, images)
    known = {kind for kind in LEAK_KINDS if marks[kind]}
    if hashes is not None and (record.source, record.study_id) in hashes.compared:
        known.add("image")
    return _Member(record.study_id, name, marks, frozenset(known), texts)


def _part_order(part: str) -> tuple[str, int, str]:
    source, _, name = part.rpartition(": ")
    return source, _PART_ORDER.index(name) if name in _PART_ORDER else len(_PART_ORDER), name


def _in_both(marks: Mapping[str, Mapping[str, list[int]]], pair: tuple[str, str]) -> list[tuple[list[int], list[int]]]:
    first, second = pair
    return [(parts[first], parts[second]) for parts in marks.values() if first in parts and second in parts]


def _shared(
    kind: str,
    pair: tuple[str, str],
    found: list[tuple[list[int], list[int]]],
    grouped: set[int],
    members: Sequence[_Member],
) -> SharedMarks:
    sides = [{number for studies in found for number in studies[side]} for side in (0, 1)]
    is_text = kind.startswith("report:")
    return SharedMarks(
        kind,
        pair,
        len(found),
        (len(sides[0]), len(sides[1])),
        (len(sides[0] & grouped), len(sides[1] & grouped)) if is_text else None,
        tuple(
            (tuple(members[number].study_id for number in one), tuple(members[number].study_id for number in other))
            for one, other in found
        ),
    )
