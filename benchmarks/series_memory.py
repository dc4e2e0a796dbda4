# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Measure the memory and time that choosing 8 slices of a large CT takes, by the form of its files.

Each form is read in a process of its own. Prints a markdown table; `--output` writes JSON. Needs about 1 GB in the
folder for temporary files.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nibabel
import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset

from m3fm.evaluation.runs import NOTICE, library_versions, write_json
from m3fm.evaluation.tables import markdown_table
from m3fm.series_m3fm import group_studies, read_study

CHOSEN = 8
UID = "1.2.826.0.1.3680043.8.498"
_IMAGE_TAGS = {
    "SamplesPerPixel": 1,
    "PhotometricInterpretation": "MONOCHROME2",
    "BitsAllocated": 16,
    "BitsStored": 16,
    "HighBit": 15,
    "PixelRepresentation": 1,
}


def stored_slice(size: int, number: int, generator: np.random.Generator) -> np.ndarray:
    """Make a noisy slice whose mean tells its number: (size, size) int16 HU."""
    return (generator.normal(0, 30, (size, size)) + number - 900).astype(np.int16)


def write_dicom(path: Path, pixels: bytes, size: int, **tags: object) -> None:
    """Write one uncompressed file with the tags of a CT slice and those given."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = tags.pop("storage")
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = pydicom.uid.generate_uid(
        entropy_srcs=[str(path)]
    )
    series = {"Modality": "CT", "StudyInstanceUID": f"{UID}.1", "SeriesInstanceUID": f"{UID}.1.1", "PatientID": "0"}
    for keyword, value in {
        **series,
        **_IMAGE_TAGS,
        "Rows": size,
        "Columns": size,
        **tags,
        "PixelData": pixels,
    }.items():
        setattr(dataset, keyword, value)
    dataset["PixelData"].VR = "OW"
    dataset.save_as(path, enforce_file_format=True)


def item(**tags: object) -> Dataset:
    """Make an item of a sequence."""
    made = Dataset()
    for keyword, value in tags.items():
        setattr(made, keyword, value)
    return made


def write_forms(folder: Path, slices: int, size: int) -> dict[str, Path]:
    """Write one volume in every form: where each lies."""
    generator = np.random.default_rng(0)
    volume = np.stack([stored_slice(size, number, generator) for number in range(slices)])
    series = folder / "series"
    series.mkdir()
    orientation, spacing = [1, 0, 0, 0, 1, 0], [0.7, 0.7]
    for name, number in enumerate(generator.permutation(slices)):
        place = {"ImagePositionPatient": [0, 0, int(number)], "ImageOrientationPatient": orientation}
        scale = {"PixelSpacing": spacing, "SliceThickness": 1, "RescaleSlope": 1, "RescaleIntercept": 0}
        path = series / f"{name:04d}"
        write_dicom(path, volume[number].tobytes(), size, storage="1.2.840.10008.5.1.4.1.1.2", **place, **scale)
    shared = item(
        PlaneOrientationSequence=[item(ImageOrientationPatient=orientation)],
        PixelMeasuresSequence=[item(PixelSpacing=spacing, SliceThickness=1)],
        PixelValueTransformationSequence=[item(RescaleSlope=1, RescaleIntercept=0)],
    )
    frames = [item(PlanePositionSequence=[item(ImagePositionPatient=[0, 0, number])]) for number in range(slices)]
    groups = {"SharedFunctionalGroupsSequence": [shared], "PerFrameFunctionalGroupsSequence": frames}
    enhanced = folder / "enhanced.dcm"
    storage = {"storage": "1.2.840.10008.5.1.4.1.1.2.1", "NumberOfFrames": slices}
    write_dicom(enhanced, volume.tobytes(), size, **storage, **groups)
    image = nibabel.Nifti1Image(volume.transpose(2, 1, 0)[::-1, ::-1], np.eye(4))
    nibabel.save(image, folder / "volume.nii")
    nibabel.save(image, folder / "volume.nii.gz")
    return {
        "DICOM series": series,
        "DICOM enhanced multi-frame": enhanced,
        "NIfTI": folder / "volume.nii",
        "NIfTI, gzip": folder / "volume.nii.gz",
    }


def resident_mb(field: str) -> float:
    """Return the peak (VmHWM) or present (VmRSS) resident memory of this process in MB (Linux)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def read_one(path: Path) -> dict[str, float]:
    """Read the chosen slices and check them."""
    before = resident_mb("VmRSS")
    start = time.process_time()
    (image,) = read_study(path)
    opened = time.process_time()
    numbers = np.linspace(0, len(image.pixels) - 1, CHOSEN).astype(int)
    taken = image.take(numbers)
    done = time.process_time()
    found = taken.pixels.mean(axis=(1, 2))
    if np.abs(found - (numbers - 900)).max() > 1:
        raise RuntimeError(f"{path.name}: slices in the wrong order")
    return {
        "open_cpu_s": round(opened - start, 2),
        "decode_cpu_s": round(done - opened, 2),
        "mb_before": round(before),
        "mb_peak": round(resident_mb("VmHWM")),
    }


def measure_headers(series: Path) -> dict[str, float]:
    """Time the grouping of the files of a series, of which only headers are read."""
    paths = sorted(series.iterdir())
    start = time.process_time()
    studies = group_studies(paths)
    if len(studies) != 1:
        raise RuntimeError(f"{len(studies)} studies, expected 1")
    return {"files": len(paths), "cpu_ms_per_header": round(1000 * (time.process_time() - start) / len(paths), 2)}


def main() -> None:
    """Measure every form and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slices", type=int, default=600)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.read:
        print(json.dumps(read_one(arguments.read)))
        return
    result: dict[str, object] = {"slices": arguments.slices, "size": arguments.size, "chosen": CHOSEN, "forms": {}}
    with tempfile.TemporaryDirectory() as folder:
        forms = write_forms(Path(folder), arguments.slices, arguments.size)
        result["headers"] = measure_headers(forms["DICOM series"])
        size = f"{arguments.slices} x {arguments.size} x {arguments.size}"
        table = [[size, "open CPU s", "decode CPU s", "MB before", "MB peak"]]
        for name, path in forms.items():
            command = [sys.executable, __file__, "--read", str(path)]
            run = subprocess.run(command, check=True, capture_output=True, text=True)
            result["forms"][name] = measured = json.loads(run.stdout)
            table.append([name, *map(str, measured.values())])
    result |= {"table": markdown_table(table), "versions": library_versions(), "notice": NOTICE}
    print(result["table"], result["headers"], sep="\n")
    if arguments.output:
        write_json(arguments.output, result)


if __name__ == "__main__":
    main()
