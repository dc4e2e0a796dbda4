# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Feed damaged files to the readers: nothing may come out but an image or a `ValueError`.

Each case is a sample of `sample_files.py`, damaged by `mutations.py` as its number and `--seed` tell, read as bytes or
as a file, with two slices of a volume decoded and the image processor run on the result. Cases run in a worker
process, which a crash, 5 s of processor time or 2 GB of memory end. Then come decompression bombs, which must be
refused, or read without their excess, within the same limits. No planted identifier may show in a result, an error, a
warning or on the terminal.

    python benchmarks/fuzz_reading.py --cases 20000 --keep fuzz --output fuzz_reading.json

A stopped run goes on from what `--keep` holds; `--first 1234 --cases 1` runs one case. A markdown table is printed.
"""

import argparse
import collections
import hashlib
import json
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from bomb_files import bombs
from mutations import BYTES, FIELDS, splice
from sample_files import MARKS, Sample, all_samples, codec_versions, ct_series

import m3fm
from m3fm.chest_image_m3fm import ChestImage
from m3fm.evaluation.runs import NOTICE, library_versions, write_json
from m3fm.evaluation.tables import markdown_table
from m3fm.image_processing_m3fm import M3FMImageProcessor
from m3fm.imaging_m3fm import read_image
from m3fm.series_m3fm import read_study

MAX_SECONDS = 5.0
MAX_BYTES = 2 << 30
# Beyond the processor time: a worker that waits for something that never comes.
MAX_WALL_SECONDS = 30.0
# How often each format is drawn. A series is a study of DICOM slices, some of them damaged.
SHARES = {
    "dicom": 0.4,
    "series": 0.05,
    "nifti": 0.17,
    "png": 0.1,
    "jpeg": 0.08,
    "tiff": 0.12,
    "bmp": 0.04,
    "webp": 0.04,
}
FINE = ("result", "ValueError")
CASES_FILE = "cases.jsonl"


@dataclass
class Case:
    """Say what happened to one damaged file.

    Attributes:
        number: With the seed, what the file is made from.
        format: Key of `SHARES`, or "bomb".
        what: The sample and the damage.
        outcome: "result", "ValueError", "exception ...", "crash ...", "hang", "memory", "leak" or "bad result".
        seconds: Processor time of reading.
        megabytes: Largest resident memory of the worker, its libraries included.
        detail: For people: where an exception came from.
    """

    number: int
    format: str
    what: str
    outcome: str
    seconds: float = 0.0
    megabytes: int = 0
    detail: str = ""


# --------------------------------------------------------------------------------------------------------------------
# Cases


class Cases:
    """Make the damaged file, or the study of several files, of each number."""

    def __init__(self, seed: int):
        self._seed = seed
        self._samples: dict[str, list[Sample]] = collections.defaultdict(list)
        for sample in all_samples():
            self._samples[sample.format].append(sample)
        self._series = ct_series(4, 32, 40)

    def make(self, number: int) -> tuple[str, str, list[bytes]]:
        """Return format, description and files of a case."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pydicom's, of what it is made to write
            return self._make(np.random.default_rng([self._seed, number]))

    def _make(self, rng: np.random.Generator) -> tuple[str, str, list[bytes]]:
        format = str(rng.choice(list(SHARES), p=list(SHARES.values())))
        if format != "series":
            sample = self._draw(rng, format)
            how, data = self._damage(rng, format, sample.data)
            return format, f"{sample.kind}: {how}", [data]
        files, done = list(self._series), []
        for which in rng.choice(len(files), size=int(rng.integers(1, 3)), replace=False):
            how, files[which] = self._damage(rng, "dicom", files[which])
            done.append(f"slice {which} {how}")
        return format, ", ".join(done), files

    def _draw(self, rng: np.random.Generator, format: str) -> Sample:
        samples = self._samples[format]
        return samples[int(rng.integers(len(samples)))]

    def _damage(self, rng: np.random.Generator, format: str, data: bytes) -> tuple[str, bytes]:
        """Damage by fields (half the cases), bytes, or both, or splice two files."""
        fields, done = FIELDS[format], []
        if rng.random() < 0.06:
            other = self._draw(rng, str(rng.choice(list(FIELDS)))) if rng.random() < 0.3 else self._draw(rng, format)
            return f"spliced with {other.format} {other.kind}", splice(rng, data, other.data)
        if rng.random() < 0.55:
            name = list(fields)[int(rng.integers(len(fields)))]
            data, done = fields[name](rng, data), [name]
        while not done or rng.random() < 0.15:
            name = list(BYTES)[int(rng.integers(len(BYTES)))]
            data = BYTES[name](rng, data)
            done.append(name)
        return " + ".join(done), data


# --------------------------------------------------------------------------------------------------------------------
# The worker: reads and judges


def read_fully(sources: list[Any], processor: M3FMImageProcessor, size: int = 224) -> str:
    """Read a study of one or several files, decode slices, preprocess; return what was shown to the user.

    Raises:
        AssertionError: If pixels are not finite or not in 0..1 where they should be.
        Exception: What reading raises.
    """
    images = [read_image(sources[0])] if len(sources) == 1 else read_study(sources)
    shown = []
    for image in images:
        check_image(image)
        shown += [repr(image.remarks), repr((image.modality, image.view, image.spacing))]
        depth = slice(0 if len(image.pixels) > 1 else 1, 3)  # one image has none
        if image.spacing is not None and not all(0 < each < np.inf for each in image.spacing[depth]):
            raise AssertionError(f"spacing {image.spacing}")
        prepared = processor.preprocess(image)
        pixels = prepared["pixel_values"]
        if pixels.shape[0] != 1 or pixels.shape[2:] != (3, size, size) or not np.isfinite(pixels).all():
            raise AssertionError(f"pixel_values {pixels.shape}, finite: {bool(np.isfinite(pixels).all())}")
    return " ".join(shown)


def check_image(image: ChestImage) -> None:
    """Decode the first and last slice and check them.

    Raises:
        AssertionError: If they are not finite, or not in 0..1 where they should be.
    """
    for number in {0, len(image.pixels) - 1}:
        pixels = np.asarray(image.pixels[number])
        if pixels.shape != tuple(image.pixels.shape[1:]) or pixels.dtype != np.float32:
            raise AssertionError(f"slice {pixels.shape} {pixels.dtype} of {image.pixels.shape}")
        low, high = float(pixels.min()), float(pixels.max())
        if not (np.isfinite(low) and np.isfinite(high)) or (image.units == "intensity" and (low < 0 or high > 1)):
            raise AssertionError(f"{image.units} from {low} to {high}")


def judge(sources: list[Any], processor: M3FMImageProcessor, printed: Path, size: int = 224) -> tuple[str, str]:
    """Read and return outcome and detail; `printed` is the file that the terminal's output goes to."""
    printed.write_bytes(b"")
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        outcome, detail, shown = attempt(sources, processor, size)
    sys.stderr.flush()
    shown += "".join(str(each.message) for each in warned) + printed.read_bytes().decode("latin-1")
    if any(mark in shown for mark in MARKS):
        at = min(shown.find(mark) for mark in MARKS if mark in shown)
        lines = shown[:at].splitlines() or [""]
        outcome, detail = "leak", f"{outcome}: {lines[-1].strip()[-80:]}"
    return outcome, detail


def attempt(sources: list[Any], processor: M3FMImageProcessor, size: int) -> tuple[str, str, str]:
    """Read and return outcome, detail, and what a user would see of it."""
    try:
        shown = read_fully(sources, processor, size)
        outcome, detail = "result", ""
    except ValueError as error:
        shown = "".join(traceback.format_exception(error))
        outcome, detail = "ValueError", ""
    except AssertionError as error:
        shown, outcome, detail = "", "bad result", str(error)
    except MemoryError:
        shown, outcome, detail = "", "memory", "allocation refused"
    except BaseException as error:
        shown = "".join(traceback.format_exception(error))
        frame = traceback.extract_tb(error.__traceback__)[-1]
        outcome, detail = f"exception {type(error).__name__}", f"{Path(frame.filename).name}:{frame.lineno}"
        mine = [f for f in traceback.extract_tb(error.__traceback__) if f.filename.endswith("_m3fm.py")]
        detail += f" from {Path(mine[-1].filename).name}:{mine[-1].lineno}" if mine else ""
    return outcome, detail, shown


def peak_megabytes() -> int:
    """Return the largest resident memory of this process since `reset_peak`."""
    text = Path("/proc/self/status").read_text()
    return int(text.split("VmHWM:")[1].split()[0]) >> 10


def reset_peak() -> None:
    """Forget the largest resident memory."""
    Path("/proc/self/clear_refs").write_text("5")


def work(pipe: Any, seed: int, scratch: str) -> None:
    """Take cases from the pipe, by number or as files, until told None."""
    # Above what may be used: going over is then measured, and only a wild allocation fails.
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 3 * MAX_BYTES, resource.RLIM_INFINITY))
    printed = Path(scratch, f"printed_{os.getpid()}")
    terminal = os.open(printed, os.O_RDWR | os.O_CREAT | os.O_APPEND)
    os.dup2(terminal, 1)
    os.dup2(terminal, 2)
    processor = M3FMImageProcessor()
    cases = Cases(seed)
    while (task := pipe.recv()) is not None:
        files = cases.make(task)[2] if isinstance(task, int) else [task]
        as_path = isinstance(task, int) and task % 2 == 1
        sources = [_on_disk(data, scratch, i) for i, data in enumerate(files)] if as_path else files
        reset_peak()
        started = time.process_time()
        pipe.send("started")
        outcome, detail = judge(sources, processor, printed)
        seconds, megabytes = time.process_time() - started, peak_megabytes()
        if megabytes << 20 > MAX_BYTES and outcome in FINE:
            outcome = "memory"
        if seconds > MAX_SECONDS and outcome in FINE:
            outcome = "hang"
        pipe.send((outcome, round(seconds, 3), megabytes, detail))


def _on_disk(data: bytes, scratch: str, number: int) -> str:
    path = Path(scratch, f"{os.getpid()}_{number}.dcm" if number % 2 else f"{os.getpid()}_{number}")
    path.write_bytes(data)
    return str(path)


# --------------------------------------------------------------------------------------------------------------------
# The parent: feeds a worker, and replaces it when it dies


class Worker:
    """A process that reads cases, started anew after each that ends it."""

    def __init__(self, seed: int, scratch: str):
        self._seed, self._scratch = seed, scratch
        self._process: Any = None

    def run(self, task: int | bytes) -> tuple[str, float, int, str]:
        """Return outcome, seconds, megabytes and detail of a case number or a file."""
        if self._process is None or not self._process.is_alive():
            fork = multiprocessing.get_context("fork")
            self._pipe, theirs = fork.Pipe()
            self._process = fork.Process(target=work, args=(theirs, self._seed, self._scratch), daemon=True)
            self._process.start()
            theirs.close()
        self._pipe.send(task)
        try:
            self._pipe.recv()
            started, wall = self._cpu_seconds(), time.monotonic()
            while not self._pipe.poll(0.5):
                used = self._cpu_seconds() - started
                if used > MAX_SECONDS or time.monotonic() - wall > MAX_WALL_SECONDS:
                    self.stop()
                    return "hang", round(used, 3), 0, ""
            return self._pipe.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            code = self._process.exitcode
            self._process = None
            return f"crash {signal.Signals(-code).name if code < 0 else code}", 0.0, 0, ""

    def _cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def stop(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None


def code_state() -> str:
    """Return a hash of the readers' code: cases of other code are not gone on with."""
    digest = hashlib.sha256()
    for path in sorted(Path(m3fm.__file__).parent.glob("*_m3fm.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def run_cases(options: argparse.Namespace, worker: Worker) -> list[Case]:
    """Run the cases that an earlier run with the same seed and code did not, and return all."""
    options.keep.mkdir(parents=True, exist_ok=True)
    record, state = options.keep / CASES_FILE, {"seed": options.seed, "code": code_state()}
    done: dict[int, Case] = {}
    if record.is_file():
        head, *lines = record.read_text(encoding="utf-8").splitlines()
        if json.loads(head) == state:
            done = {case.number: case for case in (Case(**json.loads(line)) for line in lines)}
        else:
            record.unlink()
    maker = Cases(options.seed)
    with record.open("a", encoding="utf-8") as file:
        if not done:
            print(json.dumps(state), file=file)
        for number in range(options.first, options.first + options.cases):
            if number in done:
                continue
            outcome, seconds, megabytes, detail = worker.run(number)
            format, what, files = maker.make(number)
            done[number] = Case(number, format, what, outcome, seconds, megabytes, detail)
            print(json.dumps(asdict(done[number])), file=file, flush=True)
            if outcome not in FINE:
                report_offence(done[number], files, options.keep)
    return [done[number] for number in sorted(done)]


def run_bombs(worker: Worker) -> list[Case]:
    """Run the decompression bombs."""
    found = []
    for i, (name, data) in enumerate(bombs()):
        case = Case(i, "bomb", name, *worker.run(data))
        found.append(case)
        if case.outcome not in FINE:
            print(f"bomb {name}: {case.outcome} {case.detail} after {case.seconds:.1f} s, {case.megabytes} MB")
    return found


def report_offence(case: Case, files: list[bytes], folder: Path) -> None:
    """Print a case that was not fine and keep its files."""
    print(
        f"case {case.number} {case.format} {case.what}: {case.outcome} {case.detail} {case.seconds:.1f} s", flush=True
    )
    for i, data in enumerate(files):
        (folder / f"{case.number}_{i}_{case.format}.bin").write_bytes(data)


# --------------------------------------------------------------------------------------------------------------------
# The table


def summary(cases: list[Case]) -> dict[str, Any]:
    """Count outcomes of each format, with the slowest and the largest case."""
    formats = {}
    for format in dict.fromkeys([*SHARES, *(case.format for case in cases)]):
        mine = [case for case in cases if case.format == format]
        if mine:
            formats[format] = {
                "files": len(mine),
                "outcomes": dict(collections.Counter(case.outcome for case in mine)),
                "slowest_seconds": max(case.seconds for case in mine),
                "peak_megabytes": max(case.megabytes for case in mine),
            }
    return formats


def table(formats: dict[str, Any]) -> str:
    """Render the counts as markdown."""
    head = ["format", "files", "image", "`ValueError`", "anything else", "slowest, s", "peak, MB"]
    lines = []
    for format, row in formats.items():
        other = {name: count for name, count in row["outcomes"].items() if name not in FINE}
        cells = [format, row["files"], *(row["outcomes"].get(name, 0) for name in FINE)]
        cells += [", ".join(f"{count} {name}" for name, count in other.items()) or 0]
        lines.append([str(cell) for cell in (*cells, f"{row['slowest_seconds']:.2f}", row["peak_megabytes"])])
    return markdown_table([head, *lines])


def main() -> None:
    """Run, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--keep", type=Path, default=Path("fuzz"), help="folder of the record and of offending files")
    parser.add_argument("--no-bombs", action="store_true", help="leave the decompression bombs out")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as scratch:
        worker = Worker(options.seed, scratch)
        started = time.monotonic()
        cases = run_cases(options, worker)
        found = cases if options.no_bombs else [*cases, *run_bombs(worker)]
        worker.stop()
    formats = summary(found)
    offences = [asdict(case) for case in found if case.outcome not in FINE]
    print(table(formats))
    print(
        f"\n{len(found)} files, {len(offences)} neither an image nor a ValueError, {time.monotonic() - started:.0f} s"
    )
    if options.output:
        content = {"seed": options.seed, "limits": {"seconds": MAX_SECONDS, "megabytes": MAX_BYTES >> 20}}
        content |= {
            "table": table(formats),
            "formats": formats,
            "offences": offences,
            "versions": library_versions() | codec_versions(),
            "notice": NOTICE,
        }
        write_json(options.output, content)


if __name__ == "__main__":
    main()
