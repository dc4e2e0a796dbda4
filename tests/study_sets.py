# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Made-up data sets in memory: what `open_set` would serve, without tables."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

from m3fm.data.opening import OpenSet
from m3fm.data.schema import ImageFile, LabelState, ReportText, StudyRecord
from m3fm.data.sets import StudySet
from m3fm.data.tables import Reading
from tests.phantoms import radiograph_pixels


def made_records(folder: Path, count: int = 7) -> list[StudyRecord]:
    """Make studies of one or two PNG views, of which every third patient has two, in three parts."""
    folder.mkdir(parents=True, exist_ok=True)
    return [_record(folder, number) for number in range(count)]


def _record(folder: Path, number: int) -> StudyRecord:
    images = []
    for view in ("PA", "LATERAL")[: 1 + number % 2]:
        path = folder / f"DOE^JANE.{number}.{view}.png"
        Image.fromarray(radiograph_pixels(number)).save(path)
        images.append(ImageFile(path, view=view))
    return StudyRecord(
        study_id=f"study-{number}",
        source="made_up",
        modality="cxr",
        patient_id=None if number == 0 else f"patient-{number // 3}",
        documents=(f"doi:10.1/{number}",),
        images=tuple(images),
        reports={
            "en": ReportText(f"Report {number}.", findings=f"Report {number}.", raw=f"FINDINGS: Report {number}."),
            "zh": ReportText(f"报告{number}。", is_translated=True),
        },
        labels={"Edema": LabelState.POSITIVE if number % 2 else LabelState.UNCERTAIN},
        findings={"edema": LabelState.POSITIVE if number % 2 else LabelState.UNCERTAIN},
        age=40.0 + number,
        sex="F" if number % 2 else None,
        split=("train", "train", "validation", None)[number % 4],
        licence="CC BY 4.0",
    )


def opened(records: Sequence[StudyRecord], on_bad: str = "raise") -> OpenSet:
    """Serve records as a set whose name is "made_up"."""

    def read(root: Path, reading: Reading) -> Iterator[StudyRecord]:
        yield from records

    made_up = StudySet(
        name="made_up",
        title="A made-up set",
        licence="CC BY 4.0",
        url="https://example.org",
        reference="Doe 2026",
        layout=(),
        recognises=lambda root: False,
        read=read,
    )
    return OpenSet(Path("."), made_up, None, Reading(on_bad))
