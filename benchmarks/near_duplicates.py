# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Measure the search for near-duplicate images: what it finds, what it takes for a copy by mistake, and how fast.

- Copies made of real images (recompressed, scaled, cropped, padded, marked, turned, mirrored ...) are to be found.
- Images of different patients are not copies: pairs found among them are mistakes, or leaks of the set.
- Hashes of made-up radiographs show how the search scales. They are drawn from a normal distribution that has mean and
  covariance of the hashed coefficients of the real ones, so that they are as alike as those are.

Next to it stand `imagehash`'s pHash and dHash (64 bits), where that is installed, at the distance that is usual for
them and at the one that makes no more mistakes than the search here.
"""

import argparse
import io
import json
import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from m3fm.data import near_duplicates as search
from m3fm.data.groups import group_keys
from m3fm.data.near_duplicates import DuplicatePair, ImageHashes, hash_images, near_duplicates
from m3fm.evaluation.tables import markdown_table

RADIOGRAPHS = ("nih_chestxray14_sample", "kermany_pneumonia_224", "tb_shenzhen_montgomery_128")
SETS = (*RADIOGRAPHS, "cov_ctr", "covid_chestxray", "luna16_slices", "covid_ct_md_slices")
USUAL_DISTANCE = 10
Corruption = Callable[[np.ndarray], bytes]


def encoded(pixels: np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    """Returns the bytes of an image file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def as_bytes(values: np.ndarray) -> np.ndarray:
    """Returns 0..1 as uint8."""
    return (values.clip(0, 1) * 255).round().astype(np.uint8)


def scaled(pixels: np.ndarray, factor: float) -> bytes:
    """Resizes."""
    size = [max(1, round(side * factor)) for side in pixels.shape[::-1]]
    return encoded(np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR)))


def cropped(pixels: np.ndarray, left: float, top: float, right: float, bottom: float) -> bytes:
    """Takes shares of the sides off."""
    height, width = pixels.shape
    rows = slice(round(top * height), height - round(bottom * height))
    return encoded(np.ascontiguousarray(pixels[rows, round(left * width) : width - round(right * width)]))


def padded(pixels: np.ndarray, value: int) -> bytes:
    """Adds a border of 5 % at each side."""
    return encoded(np.pad(pixels, [(max(1, side // 20),) * 2 for side in pixels.shape], constant_values=value))


def marked(pixels: np.ndarray) -> bytes:
    """Puts a white label with text into a corner: a sixth of the height wide, a twelfth high."""
    image = Image.fromarray(pixels.copy())
    side = max(8, pixels.shape[0] // 12)
    draw = ImageDraw.Draw(image)
    draw.rectangle([4, 4, 4 + 2 * side, 4 + side], fill=255)
    draw.text((6, 6), "R PORTABLE", fill=0)
    return encoded(np.asarray(image))


def turned(pixels: np.ndarray, degrees: float) -> bytes:
    """Rotates, black where nothing was."""
    return encoded(np.asarray(Image.fromarray(pixels).rotate(degrees, Image.Resampling.BILINEAR)))


def toned(change: Callable[[np.ndarray], np.ndarray]) -> Corruption:
    """Changes grey values, given as 0..1."""
    return lambda pixels: encoded(as_bytes(change(pixels / 255)))


CORRUPTIONS: dict[str, Corruption] = {
    "JPEG quality 90": lambda x: encoded(x, "JPEG", quality=90),
    "JPEG quality 60": lambda x: encoded(x, "JPEG", quality=60),
    "JPEG quality 30": lambda x: encoded(x, "JPEG", quality=30),
    "half size": lambda x: scaled(x, 0.5),
    "three quarters of the size": lambda x: scaled(x, 0.75),
    "16 bits": lambda x: encoded(x.astype(np.uint16) * 200 + 500),
    "brighter by 0.15": toned(lambda x: x + 0.15),
    "darker by 0.15": toned(lambda x: x - 0.15),
    "contrast x 1.4": toned(lambda x: (x - 0.5) * 1.4 + 0.5),
    "contrast x 0.7": toned(lambda x: (x - 0.5) * 0.7 + 0.5),
    "gamma 0.6": toned(lambda x: x**0.6),
    "gamma 1.6": toned(lambda x: x**1.6),
    "crop 1 % a side": lambda x: cropped(x, *(0.01,) * 4),
    "crop 2 % a side": lambda x: cropped(x, *(0.02,) * 4),
    "crop 3 % a side": lambda x: cropped(x, *(0.03,) * 4),
    "crop 3 % left and top": lambda x: cropped(x, 0.03, 0.03, 0, 0),
    "black border": lambda x: padded(x, 0),
    "white border": lambda x: padded(x, 255),
    "white label": marked,
    "turned 1 degree": lambda x: turned(x, 1),
    "turned 2 degrees": lambda x: turned(x, 2),
    "mirrored": lambda x: encoded(np.ascontiguousarray(x[:, ::-1])),
}


def read_set(folder: Path) -> tuple[list[Path], list[str | None]]:
    """Returns the image files of a folder, and the patient of each."""
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    paths = [folder / row["file_name"] for row in rows]
    if folder.name == "kermany_pneumonia_224":  # its patient_id names a series; the number of the file is the patient
        return paths, [re.search(r"IM-\d+|person\d+", path.name).group() for path in paths]
    return paths, [row.get("patient_id") or row.get("study_id") for row in rows]


def joined(first: ImageHashes, second: ImageHashes) -> ImageHashes:
    """Returns the hashes of two lists of images as those of one list."""
    owners = np.concatenate([first.owners, second.owners + first.count])
    return ImageHashes(np.concatenate([first.entries, second.entries]), owners, first.count + second.count)


def count_pairs(pairs: Sequence[DuplicatePair], patients: Sequence[str | None]) -> dict[str, Any]:
    """Counts pairs by what is known of the patients, and lists the highest correlations of different ones."""
    known = [pair for pair in pairs if patients[pair.first] and patients[pair.second]]
    different = [pair for pair in known if patients[pair.first] != patients[pair.second]]
    return {
        "pairs": len(pairs),
        "same_patient": len(known) - len(different),
        "different_patients": len(different),
        "patient_unknown": len(pairs) - len(known),
        "mirrored": sum(pair.is_mirrored for pair in pairs),
    }


def measure_sets(root: Path, cache: Path) -> tuple[dict[str, Any], dict[str, ImageHashes]]:
    """Hashes and searches every set."""
    results, hashes = {}, {}
    for name in SETS:
        paths, patients = read_set(root / name)
        hashes[name] = hash_images(paths, cache_folder=cache)
        loose = near_duplicates(hashes[name], min_correlation=0.6)
        shown = [pair for pair in loose if pair.correlation >= search.MIN_CORRELATION]
        apart = [x.correlation for x in loose if patients[x.first] and patients[x.first] != patients[x.second]]
        results[name] = {
            "images": len(paths),
            "pairs_of_images": len(paths) * (len(paths) - 1) // 2,
            **count_pairs(shown, patients),
            "highest_correlations_of_different_patients": [round(x, 3) for x in sorted(apart, reverse=True)[:5]],
        }
        print(name, results[name])
    return results, hashes


def measure_across(hashes: dict[str, ImageHashes]) -> dict[str, Any]:
    """Searches for images that two sets share."""
    results = {}
    for one, other in (
        ("cov_ctr", "covid_chestxray"),
        ("cov_ctr", "luna16_slices"),
        ("cov_ctr", "covid_ct_md_slices"),
        ("nih_chestxray14_sample", "covid_chestxray"),
        ("nih_chestxray14_sample", "tb_shenzhen_montgomery_128"),
        ("kermany_pneumonia_224", "covid_chestxray"),
    ):
        border = hashes[one].count
        pairs = near_duplicates(joined(hashes[one], hashes[other]))
        across = [pair for pair in pairs if pair.first < border <= pair.second]
        results[f"{one} and {other}"] = {
            "pairs": len(across),
            f"images of {one}": len({pair.first for pair in across}),
            f"images of {other}": len({pair.second for pair in across}),
        }
    return results


def measure_copies(root: Path, hashes: dict[str, ImageHashes], count: int, seed: int) -> tuple[dict, dict]:
    """Makes copies of some images of each set and looks for them among all; returns recalls, and the copies."""
    recalls: dict[str, dict[str, Any]] = {}
    made: dict[str, Any] = {}
    for name in (*RADIOGRAPHS, "cov_ctr", "covid_chestxray"):
        paths, _ = read_set(root / name)
        chosen = np.sort(np.random.default_rng(seed).choice(len(paths), min(count, len(paths)), replace=False))
        originals = [np.asarray(Image.open(paths[place]).convert("L")) for place in chosen]
        recalls[name] = {}
        made[name] = {"originals": chosen, "copies": {}}
        for title, corrupt in CORRUPTIONS.items():
            files = [corrupt(pixels) for pixels in originals]
            copies = hash_images(files, progress=False)
            together = joined(hashes[name], copies)
            marks = [[str(place)] for place in range(together.count)]
            for pair in near_duplicates(together):
                marks[pair.second].append(str(pair.first))
            groups = group_keys(marks)
            # Where the set has the original twice, the copy may have been compared with the other one.
            found = [groups[place] == groups[hashes[name].count + number] for number, place in enumerate(chosen)]
            recalls[name][title] = round(float(np.mean(found)), 4)
            made[name]["copies"][title] = files
        print(name, {title: recall for title, recall in recalls[name].items() if recall < 1})
    everything = [np.mean([recalls[name][title] for name in recalls]) for title in CORRUPTIONS]
    recalls["mean"] = {title: round(float(x), 4) for title, x in zip(CORRUPTIONS, everything, strict=True)}
    return recalls, made


def measure_peer(root: Path, made: dict[str, Any], mistakes: int) -> dict[str, Any] | None:
    """Does the same with the 64-bit hashes of `imagehash`: between different patients, and original against copy."""
    try:
        import imagehash
    except ImportError:
        return None
    results: dict[str, Any] = {"version": imagehash.__version__, "mistakes_allowed": mistakes}
    for title, function in (("pHash", imagehash.phash), ("dHash", imagehash.dhash)):
        words, counts = {}, np.zeros(65, np.int64)
        for name in (*RADIOGRAPHS, "cov_ctr", "covid_chestxray"):
            paths, patients = read_set(root / name)
            words[name] = peer_words([Image.open(path).convert("L") for path in paths], function)
            if name in RADIOGRAPHS:
                patient = np.unique(patients, return_inverse=True)[1]
                for place in range(len(paths) - 1):
                    distance = np.bitwise_count(words[name][place] ^ words[name][place + 1 :])
                    counts += np.bincount(distance[patient[place + 1 :] != patient[place]], minlength=65)
        most = int(np.searchsorted(np.cumsum(counts), mistakes, "right")) - 1
        at = {"usual distance": USUAL_DISTANCE, "as few mistakes": most}
        results[title] = {
            label: {
                "distance": distance,
                "mistakes": int(counts[: distance + 1].sum()) if distance >= 0 else 0,
                "recall": peer_recalls(made, words, function, distance),
            }
            for label, distance in at.items()
        }
    return results


def peer_words(images: Sequence[Image.Image], function: Callable[[Image.Image], Any]) -> np.ndarray:
    """Returns a peer's hashes (n,) as words."""
    return np.array([int(str(function(image)), 16) for image in images], np.uint64)


def peer_recalls(made: dict[str, Any], words: dict, function: Callable, distance: int) -> dict[str, float]:
    """Returns the mean recall of each kind of copy."""
    recalls = {}
    for title in CORRUPTIONS:
        each = []
        for name, copies in made.items():
            images = []
            for file in copies["copies"][title]:
                image = Image.open(io.BytesIO(file))
                # imagehash takes 8 bits; as a user would bring 16 bits there.
                pixels = np.asarray(image)
                images.append(Image.fromarray((pixels >> 8).astype(np.uint8)) if pixels.dtype != np.uint8 else image)
            got = peer_words(images, function)
            each.append((np.bitwise_count(words[name][copies["originals"]] ^ got) <= distance).mean())
        recalls[title] = round(float(np.mean(each)), 4)
    return recalls


def measure_scale(hashes: dict[str, ImageHashes], sizes: Sequence[int], seed: int) -> list[dict[str, Any]]:
    """Searches made-up hashes, of which one in a hundred is a copy with a tenth of its bits changed."""
    entries = np.concatenate([hashes[name].entries for name in RADIOGRAPHS])
    bits = np.unpackbits(entries["hashes"].view(np.uint8), axis=-1, bitorder="little").reshape(len(entries), -1)
    centred = bits.astype(np.float32) * 2 - 1
    mean = centred.mean(axis=0)
    _, values, directions = np.linalg.svd((centred - mean) / np.sqrt(len(centred)), full_matrices=False)
    # The sign of a normal variable has the mean of the bit.
    results = []
    for size in sizes:
        rng = np.random.default_rng(seed)
        made = np.zeros(size, entries.dtype)
        kept = min(400, len(values))
        rest = np.sqrt(np.maximum(1 - mean**2 - ((values[:kept, None] * directions[:kept]) ** 2).sum(axis=0), 1e-3))
        for start in range(0, size, 4096):
            count = min(4096, size - start)
            drawn = (rng.standard_normal((count, kept), np.float32) * values[:kept]) @ directions[:kept] + mean
            drawn += rng.standard_normal(drawn.shape, np.float32) * rest
            packed = np.packbits((drawn > 0).reshape(count, -1, 256), axis=-1, bitorder="little")
            made["hashes"][start : start + count] = packed.view(np.uint64)
        made["thumbnail"] = entries["thumbnail"][rng.integers(0, len(entries), size)]
        made["border"] = (0, 0, 1, 1)
        planted = size // 100
        flips = np.packbits(rng.random((planted, made["hashes"].shape[1], 256)) < 0.1, axis=-1, bitorder="little")
        made[-planted:] = made[:planted]
        made["hashes"][-planted:] ^= flips.view(np.uint64)
        start = time.perf_counter()
        pairs = near_duplicates(ImageHashes(made, np.arange(size), size))
        seconds = time.perf_counter() - start
        found = {(pair.first, pair.second) for pair in pairs}
        recall = np.mean([(number, size - planted + number) in found for number in range(planted)])
        results.append({"hashes": size, "seconds": round(seconds, 1), "copies": planted, "found": float(recall)})
        print(results[-1])
    return results


def measure_speed(root: Path, count: int) -> dict[str, float]:
    """Hashes files of one set without a cache; images a second by number of workers."""
    paths = read_set(root / RADIOGRAPHS[0])[0][:count]
    speeds = {}
    for workers in (0, 1, 2):
        start = time.perf_counter()
        hash_images(paths, workers=workers, progress=False)
        speeds[f"{workers} workers"] = round(len(paths) / (time.perf_counter() - start), 1)
    return speeds


def recall_table(recalls: dict[str, dict[str, float]], peer: dict[str, Any] | None) -> str:
    """Returns the share of copies found, mean of the sets, beside imagehash's: as is usual, and without a mistake."""
    names = {"ours": {kind: np.mean([each[kind] for each in recalls.values()]) for kind in CORRUPTIONS}}
    wrong = {"ours": 0}
    for function in ("pHash", "dHash") if peer else ():
        for title in ("usual distance", "as few mistakes"):
            found = peer[function].get(title)
            if found and found["distance"] >= 0:  # dHash makes mistakes at any distance
                name = f"{function}, distance {found['distance']}"
                names[name], wrong[name] = found["recall"], found["mistakes"]
    lines = [[kind, *(f"{each[kind]:.2f}" for each in names.values())] for kind in CORRUPTIONS]
    mistakes = ["pairs of different patients taken for copies", *(f"{count:,}" for count in wrong.values())]
    return markdown_table([["copy", *names], *lines, mistakes])


def main() -> None:
    """Measures and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--cache", type=Path, required=True, help="where hashes are kept between runs")
    parser.add_argument("--copies", type=int, default=100, help="images of each set that are copied")
    parser.add_argument("--sizes", type=int, nargs="+", default=[20_000, 100_000, 200_000])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("model_cards/results/near_duplicates.json"))
    arguments = parser.parse_args()
    sets, hashes = measure_sets(arguments.data, arguments.cache)
    mistakes = sum(sets[name]["different_patients"] for name in RADIOGRAPHS)
    recalls, made = measure_copies(arguments.data, hashes, arguments.copies, arguments.seed)
    results = {
        "command": "python benchmarks/near_duplicates.py --data DATA --cache CACHE",
        "max_distance_of_255_bits": search.MAX_DISTANCE,
        "min_correlation": search.MIN_CORRELATION,
        "sets": sets,
        "across_sets": measure_across(hashes),
        "copies_of_each_set": arguments.copies,
        "recall": recalls,
        "imagehash": measure_peer(arguments.data, made, mistakes),
        "images_a_second": measure_speed(arguments.data, 400),
        "scale": measure_scale(hashes, arguments.sizes, arguments.seed),
        "processors": os.cpu_count(),
    }
    results["table"] = recall_table(recalls, results["imagehash"])
    arguments.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(results["table"])
    print(json.dumps({key: results[key] for key in ("across_sets", "images_a_second", "imagehash")}, indent=1))


if __name__ == "__main__":
    main()
