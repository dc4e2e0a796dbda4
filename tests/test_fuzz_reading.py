# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""A small slice of `benchmarks/fuzz_reading.py` and its decompression bombs, which must not be read."""

import contextlib
import sys
import time
from pathlib import Path

import pytest

from m3fm.image_processing_m3fm import M3FMImageProcessor

for module in ("pydicom", "nibabel", "tifffile", "imagecodecs"):
    pytest.importorskip(module)
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
fuzz_reading = pytest.importorskip("fuzz_reading")
from bomb_files import bombs  # noqa: E402
from sample_files import MARKS, all_samples  # noqa: E402

CASES = 400
PROCESSOR = M3FMImageProcessor(size=32)


@pytest.fixture(scope="module")
def cases():
    return fuzz_reading.Cases(seed=11)


def test_every_sample_is_read():
    for sample in all_samples(24, 32):
        try:
            fuzz_reading.read_fully([sample.data], PROCESSOR, size=32)
        except ValueError as error:
            assert "not read" in str(error) or "decoder" in str(error), (sample.kind, str(error))


@pytest.mark.parametrize("start", range(0, CASES, 100))
def test_damaged_files_are_images_or_value_errors(cases, start, tmp_path, capfd):
    printed = tmp_path / "printed"
    for number in range(start, start + 100):
        format, what, files = cases.make(number)
        outcome, detail = fuzz_reading.judge(files, PROCESSOR, printed, size=32)
        assert outcome in fuzz_reading.FINE, (number, format, what, outcome, detail)
    said = capfd.readouterr()
    assert not any(mark in said.out + said.err for mark in MARKS)


def test_cases_are_the_same_in_every_run(cases):
    again = fuzz_reading.Cases(seed=11)
    assert [cases.make(number) for number in range(40)] == [again.make(number) for number in range(40)]


def test_bombs_that_are_small_are_refused_at_once():
    for name, data in bombs():
        if len(data) < 30_000:
            started = time.process_time()
            with contextlib.suppress(ValueError):
                fuzz_reading.read_fully([data], PROCESSOR, size=32)
            assert time.process_time() - started < 5, name
            assert fuzz_reading.peak_megabytes() < 2048, name
