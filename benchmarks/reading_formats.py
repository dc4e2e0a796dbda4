# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Read every kind of file there is at hand, and compare the pixels with readings that share no code with ours.

Sources: the fixtures and CT volumes of the data folder, some of its JPEG images, the test files of pydicom, nibabel,
and files made on the spot (`sample_files.py`), whose pixels are known. Each is compared with what was encoded, where
that is known, and with SimpleITK (GDCM), dcm2niix, imagecodecs, tifffile or libjpeg. CT series are written as slices
with shuffled names. Files of other modalities in pydicom's folder are refused; copies that claim to be radiographs
show that their pixels would be right.

    python benchmarks/reading_formats.py --data ../shared/data --output reading_formats.json

Differences are in Hounsfield units, or in grey levels of 255. A markdown table and counts are printed. Beside the
`medical` extra this needs SimpleITK, dcm2niix and pylibjpeg-libjpeg.
"""

import argparse
import collections
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
from independent_reading import (
    NoReadingError,
    by_codec,
    by_codecs,
    by_dcm2niix,
    by_simpleitk,
    dicom_by_simpleitk,
    displayed,
    gray,
    series_by_simpleitk,
    stretched,
)
from sample_files import Sample, all_samples, codec_versions, ct_series

from m3fm.chest_image_m3fm import ChestImage
from m3fm.evaluation.runs import NOTICE, library_versions, write_json
from m3fm.evaluation.tables import markdown_table
from m3fm.imaging_m3fm import read_image
from m3fm.series_m3fm import read_study

# Rounding to float32, in HU and in levels.
EXACT = 0.02
# What decoders of lossy codecs, and the rounding of luma to whole levels, may differ by.
LOSSY = 3.0
ROUNDED = 1.0
JPEGS_PER_SET = 5
PAGE_HEAD = """\
# Every file read, against other readers

Made by `python benchmarks/reading_formats.py --data DATA --page docs/formats.md`; [input.md](input.md#formats) sums it
up. Differences are the largest of a file, in Hounsfield units or in grey levels of 255.
"""
_TURNS = [(quarters, mirror) for mirror in (False, True) for quarters in range(4)]


@dataclass
class Comparison:
    """Say what reading one source gave and how it compares.

    Attributes:
        group: Where the source is from.
        name: File or sample.
        result: "image", or why it was refused.
        shape: (S, H, W).
        modality, units, view, remarks: As in `ChestImage`, remarks by their codes.
        against: What it was compared with, to the largest difference in HU or levels, or why there is none.
        verdict: "exact", "within tolerance", "differs" (from every tool), "tools disagree" (one of them agrees with
            ours), "refused", or "nothing to compare with".
    """

    group: str
    name: str
    result: str
    shape: tuple[int, ...] = ()
    modality: str | None = None
    units: str | None = None
    view: str | None = None
    remarks: tuple[str, ...] = ()
    against: dict[str, float | str] | None = None
    verdict: str = "refused"


def compare(group: str, name: str, source: Any, references: dict[str, Any], tolerance: float = EXACT) -> Comparison:
    """Read a source and compare it with references.

    Args:
        group: Where it is from.
        name: What the table calls it.
        source: For `read_image`, or a list for `read_study`.
        references: By tool, a function that takes our image and returns pixels (S, H, W) in its units.
        tolerance: What may differ, in HU or levels.
    """
    try:
        images = read_study(source) if isinstance(source, list) else [read_image(source)]
    except ValueError as error:
        return Comparison(group, name, _reason(error, source))
    image = images[0]
    pixels = np.asarray(image.pixels)
    against: dict[str, float | str] = {}
    for tool, reference in references.items():
        try:
            against[tool] = difference(pixels, reference(image), image)
        except NoReadingError as error:
            against[tool] = f"cannot read it ({error})"
    numbers = [value for value in against.values() if not isinstance(value, str)]
    verdict = "nothing to compare with"
    if numbers:
        worst = max(numbers)
        verdict = "exact" if worst <= EXACT else "within tolerance" if worst <= tolerance else "differs"
    if verdict == "differs" and min(numbers) <= tolerance:
        verdict = "tools disagree"
    codes = tuple(remark.code for remark in image.remarks)
    return Comparison(
        group, name, "image", pixels.shape, image.modality, image.units, image.view, codes, against, verdict
    )


def difference(ours: np.ndarray, theirs: np.ndarray, image: ChestImage) -> float | str:
    """Return the largest difference in HU or levels; of a radiograph that we turned, in the turn that fits best."""
    scale = 255.0 if image.units == "intensity" else 1.0
    turned = image.modality != "ct" and any(remark.code == "reoriented" for remark in image.remarks)
    found = []
    for quarters, mirror in _TURNS if turned else _TURNS[:1]:
        other = np.rot90(theirs[..., ::-1] if mirror else theirs, quarters, axes=(1, 2))
        if other.shape == ours.shape:
            found.append(float(np.abs(ours - other).max()) * scale)
    return round(min(found), 4) if found else f"shape {theirs.shape}"


def _reason(error: ValueError, source: Any) -> str:
    """Return an error's message without the source's name, which holds a path."""
    message = str(error)
    name = str(source[0] if isinstance(source, list) else source)
    for known in (name, str(Path(name).parent) if not isinstance(source, bytes) else name):
        message = message.removeprefix(f"{known}: ")
    return message.removeprefix("<bytes>: ")[:160]


# --------------------------------------------------------------------------------------------------------------------
# DICOM


def dicom_references(path: Path, scratch: Path) -> dict[str, Any]:
    """Return the independent readings of a DICOM file, as functions of our image."""
    header = pydicom.dcmread(path, force=True, stop_before_pixels=True)

    def shown(values: np.ndarray, image: ChestImage) -> np.ndarray:
        if image.units == "hu":
            shifts = [r.value for r in image.remarks if r.code == "uncalibrated" and r.value is not None]
            values = values + (shifts[0] if shifts else 0)
            padding = header.get("PixelPaddingValue")
            if padding is not None:
                raw = (values - float(header.get("RescaleIntercept") or 0)) / float(header.get("RescaleSlope") or 1)
                values = np.where(raw == padding, -1024.0, values)
            return values
        ignored = any(remark.code in ("window_ignored", "display_values") for remark in image.remarks)
        return displayed(values, header, use_window=not ignored)

    def dcm2niix(image: ChestImage) -> np.ndarray:
        folder = scratch / "one"
        folder.mkdir(exist_ok=True)
        for old in folder.iterdir():
            old.unlink()
        (folder / "a.dcm").write_bytes(path.read_bytes())
        return shown(by_dcm2niix(folder, scratch), image)

    references = {
        "SimpleITK": lambda image: shown(dicom_by_simpleitk(path, header), image),
        "codecs": lambda image: shown(by_codecs(path.read_bytes()), image),
    }
    if header.get("Modality") == "CT":
        references["dcm2niix"] = dcm2niix
    return references


def dicom_files(group: str, paths: list[Path], scratch: Path) -> Iterator[Comparison]:
    """Compare DICOM files; those refused as another modality once more as radiographs."""
    for number, path in enumerate(paths, 1):
        # Names of fixtures may be made of an identifier and a date.
        name = path.name if group != "fixtures" else f"{'_'.join(path.name.split('_')[:2])} {number}"
        first = compare(group, name, str(path), dicom_references(path, scratch), LOSSY)
        yield first
        if "another modality" in first.result:
            dataset = pydicom.dcmread(path, force=True)
            if "PixelData" not in dataset:
                continue
            dataset.Modality = "CR"
            copy = scratch / "claimed.dcm"
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                dataset.save_as(copy)
            yield compare(f"{group}, as CR", name, str(copy), dicom_references(copy, scratch), LOSSY)


# --------------------------------------------------------------------------------------------------------------------
# NIfTI and rasters


def nifti_references(path: Path) -> dict[str, Any]:
    """Return the independent readings of a NIfTI file."""

    def fit(values: np.ndarray, image: ChestImage) -> np.ndarray:
        if image.units == "hu":
            shifts = [r.value for r in image.remarks if r.code == "uncalibrated" and r.severity == "info"]
            return values + (shifts[0] if shifts else 0)
        return gray(values, 255) / 255 if values.ndim == 4 else display_of(values)

    def own(image: ChestImage) -> np.ndarray:
        """Orient by the affine alone, and scale in float64."""
        file = nibabel.load(path)
        if not isinstance(file, nibabel.Nifti1Pair):
            raise NoReadingError("not NIfTI to nibabel")
        values = np.asarray(file.dataobj.get_unscaled(), dtype=np.float64)
        values = values * file.dataobj.slope + file.dataobj.inter
        values = values.reshape((*values.shape, 1, 1)[: max(3, values.ndim)])
        values = values[(..., *[0] * (values.ndim - 3))] if values.ndim > 3 else values
        matrix = file.affine[:3, :3]
        axes = [int(np.abs(matrix[world]).argmax()) for world in range(3)]  # which stored axis runs along each
        if sorted(axes) != [0, 1, 2]:
            raise NoReadingError("its axes lean too far")
        values = values.transpose(axes[::-1])  # (z, y, x)
        for position, world in enumerate((2, 1, 0)):
            grows = matrix[world, axes[world]] > 0
            if grows != (world == 2):  # slices go up; rows go to posterior, columns to the left
                values = np.flip(values, position)
        return fit(values, image)

    return {"SimpleITK": lambda image: fit(by_simpleitk(path), image), "own arithmetic": own}


def display_of(values: np.ndarray) -> np.ndarray:
    """Bring values (S, H, W) without a unit to 0..1: within 0..1 and 0..255 as they are, all others by percentiles."""
    finite = np.isfinite(values)
    values = np.where(finite, values, values[finite].min())
    if values.min() >= 0 and values.max() <= 1:
        return values
    whole = bool((values == np.floor(values)).all())
    if len(values) > 1 and values.max() <= 255 and whole:
        return values / 255
    return stretched(values, finite)


def raster_values(values: np.ndarray, image: ChestImage) -> np.ndarray:
    """Bring decoded raster values (H, W), (H, W, C) or (S, H, W) into the units of our image, (S, H, W)."""
    top = np.iinfo(values.dtype).max if values.dtype.kind == "u" else 1
    if values.ndim == 3 and values.shape[-1] in (2, 3, 4):
        values = gray(values, top) if top > 255 else gray(values, top).round().astype(np.uint8)
    if values.ndim == 2:
        values = values[None]
    if image.units == "hu":
        return values.astype(np.float64)
    if values.dtype == np.uint8:
        return values / 255
    return stretched(values.astype(np.float64))


def sample_comparison(sample: Sample, scratch: Path) -> Comparison:
    """Compare a file made on the spot with what went into it and with independent readings."""
    suffix = {"nifti": ".nii.gz" if sample.data[:2] == b"\x1f\x8b" else ".nii", "dicom": ".dcm"}.get(sample.format, "")
    path = scratch / f"sample{suffix}"
    path.write_bytes(sample.data)
    tolerance = LOSSY if sample.lossy else ROUNDED
    if sample.format == "dicom":
        references = dicom_references(path, scratch)
    elif sample.format == "nifti":
        references = nifti_references(path)
    else:
        turn = 3 if "turned" in sample.kind else 0
        references = {
            "codec": lambda image: raster_values(np.rot90(by_codec(sample.data, sample.format), turn), image)
        }
        if "CMYK" not in sample.kind and not sample.lossy:
            references["encoded"] = lambda image: raster_values(_upright(sample), image)
    return compare(f"made here, {sample.format}", sample.kind, str(path), references, tolerance)


def _upright(sample: Sample) -> np.ndarray:
    return 255 - sample.values if sample.kind == "white is zero" else sample.values


# --------------------------------------------------------------------------------------------------------------------
# CT series


def series_comparisons(scratch: Path) -> Iterator[Comparison]:
    """Compare CT series of shuffled names with ITK's and dcm2niix' idea of them."""
    plain = ct_series(12, 40, 48)
    localizer = ct_series(1, 64, 32, SeriesInstanceUID="1.2.3.9", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    feet_first = ct_series(12, 40, 48, ImageOrientationPatient=[-1, 0, 0, 0, -1, 0])
    plans = {
        "12 slices": plain,
        "12 slices, with a localizer": [*plain, *localizer],
        "12 slices, two of them twice": [*plain, *plain[4:6]],
        "12 slices, prone": feet_first,
        "12 slices, spacing 5 mm": ct_series(12, 40, 48, spacing=5.0),
        "12 slices, two missing": [*plain[:5], *plain[7:]],
    }
    for number, (name, files) in enumerate(plans.items()):
        folder = scratch / f"series{number}"
        folder.mkdir()
        paths = []
        for place, data in zip(np.random.default_rng(number).permutation(len(files)), files, strict=True):
            paths.append(folder / f"IM{place:04d}")
            paths[-1].write_bytes(data)
        references = {
            "SimpleITK": lambda _, folder=folder: series_by_simpleitk(folder),
            "dcm2niix": lambda _, folder=folder: by_dcm2niix(folder, scratch),
        }
        yield compare("made here, CT series", name, [str(path) for path in sorted(paths)], references)


# --------------------------------------------------------------------------------------------------------------------
# All of it


def comparisons(data: Path, scratch: Path) -> Iterator[Comparison]:
    """Compare every source."""
    fixtures = sorted((data / "fixtures").iterdir())
    yield from dicom_files("fixtures", [path for path in fixtures if path.suffix == ".dcm"], scratch)
    volumes = sorted((data / "covid_ct_md_volumes").glob("*.nii.gz"))
    for group, paths in (
        ("fixtures", [path for path in fixtures if path.name.endswith(".nii.gz")]),
        ("covid_ct_md_volumes", volumes),
    ):
        for path in paths:
            yield compare(group, path.name, str(path), nifti_references(path), ROUNDED)
    for folder in sorted(path for path in data.iterdir() if path.is_dir()):
        for number, path in enumerate(sorted(folder.rglob("*.jpg"))[:JPEGS_PER_SET], 1):
            encoded = path.read_bytes()
            codec = {"libjpeg": lambda image, encoded=encoded: raster_values(by_codec(encoded, "jpeg"), image)}
            yield compare(f"JPEG of {folder.name}", f"image {number}", str(path), codec, LOSSY)
    files = Path(pydicom.__file__).parent / "data" / "test_files"
    yield from dicom_files("pydicom", sorted(p for p in files.iterdir() if p.suffix == ".dcm"), scratch)
    for path in sorted((Path(nibabel.__file__).parent / "tests" / "data").iterdir()):
        if path.name.endswith((".nii", ".nii.gz", ".hdr")):
            yield compare("nibabel", path.name, str(path), nifti_references(path), ROUNDED)
        elif path.is_file() and path.suffix not in (".py", ".rst", ".m"):
            references = dicom_references(path, scratch) if path.suffix == ".dcm" else {}
            yield compare("nibabel", path.name, str(path), references)
    for sample in all_samples():
        yield sample_comparison(sample, scratch)
    yield from series_comparisons(scratch)


def rows(found: list[Comparison]) -> list[list[str]]:
    """Render each comparison as a line of the table, the head first."""
    lines = [["source", "file", "result", "agreement", "verdict"]]
    for each in found:
        facts = [each.modality or "no modality", each.units or "", each.view or "", *each.remarks]
        shape = " x ".join(map(str, each.shape))
        result = each.result if each.result != "image" else f"{shape}, {', '.join(filter(None, facts))}"
        agreement = ", ".join(f"{tool} {value}" for tool, value in (each.against or {}).items())
        lines.append([each.group, each.name, result.replace("|", "/"), agreement, each.verdict])
    return lines


def counts(found: list[Comparison]) -> dict[str, dict[str, int]]:
    """Count verdicts by source."""
    groups: dict[str, dict[str, int]] = {}
    for group in dict.fromkeys(each.group for each in found):
        groups[group] = dict(collections.Counter(each.verdict for each in found if each.group == group))
    groups["all"] = dict(collections.Counter(each.verdict for each in found))
    return groups


def main() -> None:
    """Compare, print the tables, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--page", type=Path, help="Markdown page to write, with a line for each file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        found = list(comparisons(options.data, Path(scratch)))
    print(markdown_table(rows(found)))
    verdicts = list(dict.fromkeys(each.verdict for each in found))
    table = [["source", *verdicts]]
    summary = counts(found)
    for group, count in summary.items():
        table.append([group, *(str(count.get(verdict, 0)) for verdict in verdicts)])
    print("\n" + markdown_table(table))
    if options.page:
        options.page.write_text(f"{PAGE_HEAD}\n{markdown_table(rows(found))}\n", encoding="utf-8")
    if options.output:
        content: dict[str, Any] = {"tolerances": {"exact": EXACT, "lossy": LOSSY, "rounded": ROUNDED}}
        content |= {"table": markdown_table(table), "counts": summary, "files": [asdict(each) for each in found]}
        write_json(options.output, content | {"versions": library_versions() | codec_versions(), "notice": NOTICE})


if __name__ == "__main__":
    main()
