# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Measure how fast files become the model's input, beside plain PIL, pydicom and transformers code in the same run.

Files of realistic size are made from the examples, with noise. Prints tables, and writes JSON with `--output`.
Nothing is downloaded.
"""

import argparse
import functools
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import torch
import transformers
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.pixels import apply_modality_lut, apply_voi_lut

import m3fm
from m3fm import study_pipeline_m3fm
from m3fm.batch.report import load_reporter
from m3fm.read_ahead_m3fm import Result, read_ahead
from m3fm.study_pipeline_m3fm import StudyReader

ROOT = Path(__file__).resolve().parents[1]
SYNTAXES = {
    "DICOM uncompressed": pydicom.uid.ExplicitVRLittleEndian,
    "DICOM JPEG 2000": pydicom.uid.JPEG2000Lossless,
    "DICOM JPEG-LS": pydicom.uid.JPEGLSLossless,
    "DICOM RLE": pydicom.uid.RLELossless,
}
UID = "1.2.826.0.1.3680043.8.498"
# Centre and width in HU, as the shipped checkpoint has them.
WINDOW = (-600.0, 1500.0)
# Of a run. Only the first is waited for without anything to do meanwhile.
BATCHES = 6

# --------------------------------------------------------------------------------------------------------------------
# Files


def radiograph(rows: int, columns: int, bits: int, seed: int) -> np.ndarray:
    """Returns an enlarged example with the grain of a detector, (rows, columns) uint8 or uint16."""
    image = Image.open(ROOT / "examples" / "cxr_normal_nih.jpg").convert("L")
    pixels = np.asarray(image.resize((columns, rows), Image.Resampling.BICUBIC), np.float32) / 255
    pixels += np.random.default_rng(seed).normal(0, 0.01, pixels.shape)
    return (np.clip(pixels, 0, 1) * (2**bits - 1)).astype(np.uint8 if bits == 8 else np.uint16)


def volume(slices: int, size: int) -> np.ndarray:
    """Returns an enlarged example of a CT slice, each time with other noise, (slices, size, size) int16 HU."""
    image = Image.open(ROOT / "examples" / "ct_slice_luna16.jpg").convert("L").resize((size, size))
    values = (np.asarray(image, np.float32) / 255 - 0.5) * WINDOW[1] + WINDOW[0]
    generator = np.random.default_rng(0)
    noise = (generator.normal(0, 20, values.shape) for _ in range(slices))
    return np.stack([(values + each).astype(np.int16) for each in noise])


def write_dicom(path: Path, pixels: np.ndarray, syntax: str, **tags: Any) -> None:
    """Writes one frame with the tags that reading needs."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    bits = 12 if pixels.dtype == np.uint16 else 16
    described = {
        "SOPClassUID": "1.2.840.10008.5.1.4.1.1.1",
        "SOPInstanceUID": f"{UID}.1",
        "Modality": "DX",
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "Rows": pixels.shape[0],
        "Columns": pixels.shape[1],
        "BitsAllocated": 16,
        "BitsStored": bits,
        "HighBit": bits - 1,
        "PixelRepresentation": int(pixels.dtype.kind == "i"),
        "PixelData": pixels.tobytes(),
    }
    for keyword, value in (described | tags).items():
        setattr(dataset, keyword, value)
    dataset["PixelData"].VR = "OW"
    if pydicom.uid.UID(syntax).is_compressed:
        dataset.compress(syntax, generate_instance_uid=False)
    dataset.save_as(path, enforce_file_format=True)


def write_files(folder: Path, count: int, rows: int, columns: int, slices: int) -> dict[str, list[Path]]:
    """Makes `count` radiographs of each format and two CTs of each kind; returns the studies by format."""
    studies: dict[str, list[Path]] = {}
    for number in range(count):
        gray8, gray12 = radiograph(rows, columns, 8, number), radiograph(rows, columns, 12, number)
        for name, suffix, image in (
            ("PNG", ".png", Image.fromarray(gray8)),
            ("JPEG", ".jpg", Image.fromarray(gray8)),
            ("PNG 16 bit", ".16.png", Image.fromarray(gray12)),
        ):
            studies.setdefault(name, []).append(folder / f"{number}{suffix}")
            image.save(studies[name][-1])
        for place, (name, syntax) in enumerate(SYNTAXES.items()):
            studies.setdefault(name, []).append(folder / f"{number}.{place}.dcm")
            tags = {"WindowCenter": 2048, "WindowWidth": 4096}
            write_dicom(studies[name][-1], gray12, syntax, **tags)
    values = volume(slices, 512)
    for number in range(2):
        series = folder / f"ct{number}"
        series.mkdir()
        for place, each in enumerate(values):
            tags = {
                "SOPClassUID": "1.2.840.10008.5.1.4.1.1.2",
                "Modality": "CT",
                "StudyInstanceUID": f"{UID}.{number + 1}",
                "SeriesInstanceUID": f"{UID}.{number + 1}.1",
                "SOPInstanceUID": f"{UID}.{number + 1}.1.{place + 1}",
                "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"],
                "ImagePositionPatient": [0, 0, 1.25 * place],
                "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
                "PixelSpacing": [0.7, 0.7],
                "SliceThickness": 1.25,
                "InstanceNumber": place + 1,
                "RescaleSlope": 1,
                "RescaleIntercept": 0,
            }
            write_dicom(series / f"{(7 * place) % len(values):04d}.dcm", each, SYNTAXES["DICOM uncompressed"], **tags)
        studies.setdefault(f"CT series, {slices} slices", []).append(series)
        path = folder / f"ct{number}.nii.gz"
        nibabel.save(nibabel.Nifti1Image(values.transpose(2, 1, 0), np.diag([-0.7, -0.7, 1.25, 1])), path)
        studies.setdefault(f"NIfTI, gzip, {slices} slices", []).append(path)
    return studies


def size_of(study: Path) -> int:
    """Returns the bytes of a file, or of all files in a folder."""
    return sum(path.stat().st_size for path in (study.iterdir() if study.is_dir() else [study]))


# --------------------------------------------------------------------------------------------------------------------
# What is compared


def ours(path: Path, processor: m3fm.M3FMImageProcessor) -> tuple[int, ...]:
    """Reads and prepares one study as the pipelines do."""
    return processor.preprocess([processor.read_study([path])], return_tensors="pt")["pixel_values"].shape


def peer(path: Path, processor: Any) -> tuple[int, ...]:
    """Reads and prepares one study as the examples of PIL, pydicom, nibabel and transformers do.

    A volume is read whole, windowed, and 8 of its slices are prepared.
    """
    name = path.name
    if path.is_dir():
        datasets = sorted(map(pydicom.dcmread, path.iterdir()), key=lambda each: each.ImagePositionPatient[2])
        images = _windowed(np.stack([apply_modality_lut(each.pixel_array, each) for each in datasets]))
    elif name.endswith(".nii.gz"):
        images = _windowed(nibabel.as_closest_canonical(nibabel.load(path)).get_fdata().transpose(2, 1, 0))
    elif name.endswith(".dcm"):
        dataset = pydicom.dcmread(path)
        images = [_to_uint8(apply_voi_lut(apply_modality_lut(dataset.pixel_array, dataset), dataset))]
    elif name.endswith(".16.png"):
        images = [_to_uint8(np.asarray(Image.open(path)))]
    else:
        images = [Image.open(path)]
    images = [(Image.fromarray(each) if isinstance(each, np.ndarray) else each).convert("RGB") for each in images]
    return processor(images, return_tensors="pt")["pixel_values"].shape


def _windowed(values: np.ndarray) -> list[np.ndarray]:
    center, width = WINDOW
    pixels = np.clip((values - (center - width / 2)) / width, 0, 1)
    return [np.uint8(255 * pixels[i]) for i in np.linspace(0.1, 0.9, 8) * len(pixels) // 1 for i in [int(i)]]


def _to_uint8(values: np.ndarray) -> np.ndarray:
    values = values.astype(np.float64)
    return np.uint8(255 * (values - values.min()) / (values.max() - values.min()))


# --------------------------------------------------------------------------------------------------------------------
# Measurements


def fastest_seconds(ways: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Runs each way once unmeasured, then all in turn `repeats` times, so that none has the machine's best moment.

    Returns:
        The fastest run of each, which other programs disturbed least.
    """
    for action in ways.values():
        action()
    seconds = dict.fromkeys(ways, float("inf"))
    for _ in range(repeats):
        for way, action in ways.items():
            start = time.perf_counter()
            action()
            seconds[way] = min(seconds[way], time.perf_counter() - start)
    return seconds


def read_all(read: Callable[[Path], Any], studies: Sequence[Path], workers: int) -> None:
    """Reads all, ahead in processes where there are workers."""
    for result in read_ahead(read, studies, workers):
        if result.error is not None:
            raise result.error


def read_all_in_threads(read: Callable[[Path], Any], studies: Sequence[Path], threads: int) -> None:
    """Reads all in threads, what processes are compared with."""
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(read, studies))


def measure_formats(studies: dict[str, list[Path]], model: Path, repeats: int) -> list[dict[str, Any]]:
    """Returns studies a second and MB a second for each format and way of reading."""
    reporter = load_reporter(model, "cpu")
    processor = reporter.processor.image_processor
    read = functools.partial(ours, processor=processor)
    plain = functools.partial(peer, processor=transformers.BitImageProcessorPil(do_resize=True))
    reader = StudyReader(processor, reporter.input_check, "warn")
    rows = []
    for name, paths in studies.items():
        megabytes = sum(map(size_of, paths)) / 1e6
        seconds = fastest_seconds(
            {
                "peer": functools.partial(read_all, plain, paths, 0),
                "ours": functools.partial(read_all, read, paths, 0),
                "ours, 1 worker": functools.partial(read_all, read, paths, 1),
                "ours, 2 workers": functools.partial(read_all, read, paths, 2),
                "ours, 2 threads": functools.partial(read_all_in_threads, read, paths, 2),
                "ours and input check": functools.partial(read_all, reader, [(path, {}) for path in paths], 0),
            },
            repeats,
        )
        rows.append(
            {
                "format": name,
                "studies": len(paths),
                "megabytes_a_study": megabytes / len(paths),
                "studies_per_s": {way: len(paths) / each for way, each in seconds.items()},
                "megabytes_per_s": {way: megabytes / each for way, each in seconds.items()},
                "ratio_to_peer": seconds["peer"] / seconds["ours"],
            }
        )
    return rows


def measure_runs(studies: Sequence[Path], model: Path, batch_size: int, repeats: int) -> list[dict[str, Any]]:
    """Returns how long a batch run of reports takes, and the share in which the model waits for reading."""
    reporter = load_reporter(model, "cpu")
    waited = 0.0

    def timed(*args: Any, **options: Any) -> Iterator[Result]:
        nonlocal waited
        results = read_ahead(*args, **options)
        while True:
            start = time.perf_counter()
            result = next(results, None)
            waited += time.perf_counter() - start
            if result is None:
                return
            yield result

    rows = []
    study_pipeline_m3fm.read_ahead = timed
    try:
        for workers in (0, 1, 2):
            runs = []
            for _ in range(repeats):
                waited, start = 0.0, time.perf_counter()
                settings = {"batch_size": batch_size, "num_workers": workers, "on_suspect": "warn"}
                list(reporter(iter(studies), **settings))
                runs.append((time.perf_counter() - start, waited))
            total, waiting = min(runs)
            rows.append(
                {
                    "workers": workers,
                    "reports_per_s": len(studies) / total,
                    "seconds": total,
                    "waiting_share": waiting / total,
                }
            )
    finally:
        study_pipeline_m3fm.read_ahead = read_ahead
    return rows


# --------------------------------------------------------------------------------------------------------------------
# Output


def as_markdown(results: dict[str, Any]) -> str:
    """Renders the measurements as tables, the machine below them."""
    ways = list(results["formats"][0]["studies_per_s"])
    lines = [
        "| format | MB | " + " | ".join(f"{way}, studies/s" for way in ways) + " | ours, MB/s | ours : peer |",
        "|---|" + "---:|" * (len(ways) + 3),
    ]
    for row in results["formats"]:
        speeds = " | ".join(f"{row['studies_per_s'][way]:.2f}" for way in ways)
        lines.append(
            f"| {row['format']} | {row['megabytes_a_study']:.1f} | {speeds} | {row['megabytes_per_s']['ours']:.0f} | "
            f"{row['ratio_to_peer']:.2f} x |"
        )
    lines += ["", "| batch run of | workers | reports/s | the model waits for reading |", "|---|---:|---:|---:|"]
    for name, rows in results["runs"].items():
        lines += [
            f"| {name} | {row['workers']} | {row['reports_per_s']:.2f} | {row['waiting_share']:.1%} |" for row in rows
        ]
    return "\n".join([*lines, "", ", ".join(f"{name} {value}" for name, value in results["machine"].items())])


def describe_machine(options: argparse.Namespace) -> dict[str, Any]:
    """Says what the numbers were measured on."""
    return {
        "checkpoint": options.model.name,
        "threads": options.threads,
        "cpus": os.cpu_count(),
        "load_average_1_min": round(os.getloadavg()[0], 2),
        "machine": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "pydicom": pydicom.__version__,
        "pillow": Image.__version__,
        "m3fm": m3fm.__version__,
    }


def main() -> None:
    """Reads the command line, measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=m3fm.DEFAULT_CHECKPOINT, help="checkpoint folder")
    parser.add_argument("--count", type=int, default=8, help="radiographs of each format")
    parser.add_argument("--rows", type=int, default=2500)
    parser.add_argument("--columns", type=int, default=2048)
    parser.add_argument("--slices", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2, help="of the model")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    results: dict[str, Any] = {"machine": describe_machine(options)}
    sizes = {name: getattr(options, name) for name in ("count", "rows", "columns", "slices")}
    with tempfile.TemporaryDirectory() as folder:
        studies = write_files(Path(folder), **sizes)
        results["settings"] = sizes | {"repeats": options.repeats, "batch_size": options.batch_size}
        results["formats"] = measure_formats(studies, options.model, options.repeats)
        running = {"model": options.model, "batch_size": options.batch_size, "repeats": options.repeats}
        results["runs"] = {
            name: measure_runs(list(islice(cycle(paths), BATCHES * options.batch_size)), **running)
            for name, paths in studies.items()
            if name in ("PNG", "DICOM JPEG 2000") or name.startswith("CT series")
        }
    results["table"] = as_markdown(results)
    print(results["table"])
    if options.output:
        options.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
