# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
import tracemalloc
from pathlib import Path

import pytest

from m3fm.data.labels import FINDINGS
from m3fm.data.schema import ImageFile, LabelState, ReportText, StudyRecord
from m3fm.data.sets.folder_studies import FolderStudy, RowText, WaitingStudies

SECRET = "patient-4711"


def test_waiting_studies_are_kept_small():
    waiting = WaitingStudies()
    text = RowText("en", None, "The lungs are clear and the heart is normal in size. " * 6, None)
    for number in range(1000):
        if number == 1:
            tracemalloc.start()
        image = ImageFile(Path("folder") / f"{number}.png")
        findings = dict.fromkeys(FINDINGS, LabelState.NEGATIVE)
        record = StudyRecord(f"s{number}", "mine", "cxr", images=(image,), labels=findings, findings=findings)
        waiting.put(FolderStudy(record, {"en": text}, None))
    taken = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert taken / 1000 < 1000
    assert waiting.get("s999") == waiting.pop("s999")
    assert waiting.get("s999") is None
    assert waiting.first == "s0"


@pytest.mark.parametrize("shown", [RowText("en", SECRET, SECRET, SECRET), ReportText(*[SECRET] * 4)])
def test_no_repr_shows_a_report(shown):
    assert SECRET not in repr(shown)
