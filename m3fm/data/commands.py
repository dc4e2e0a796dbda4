# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""What the commands of `m3fm data` do; what may be typed stands in `m3fm_data_cli.py`."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from m3fm_options import EXIT_ERROR

from ..evaluation.tables import markdown_table
from .opening import OpenSet, open_set
from .sets import find_set
from .sets.folder import source_name
from .statistics import SetStatistics, count_set, statistics_markdown

if TYPE_CHECKING:
    from .near_duplicates import RecordHashes

__all__ = ["COMMANDS"]


def inspect(args: Namespace) -> int:
    """Says what a data set is and holds."""
    opened = _open(args)
    statistics = count_set(opened, opened.set.name).as_dict()
    facts = _facts(opened, statistics)
    if args.json:
        sys.stdout.write(json.dumps({**facts, "statistics": statistics}, ensure_ascii=False, indent=1) + "\n")
    else:
        sys.stdout.write(f"{_facts_markdown(facts)}\n\n{statistics_markdown(statistics)}\n")
    return _told(opened)


def stats(args: Namespace) -> int:
    """Writes tables and a picture of a data set: counts, image sizes, near-duplicates, leaks between its parts."""
    from .image_statistics import ImageSample, image_statistics
    from .leaks import find_leaks
    from .near_duplicates import hash_records
    from .statistics_plots import plot_statistics

    opened, output = _open(args), Path(args.output)
    sample, counted = ImageSample(args.image_sample, seed=0), SetStatistics()
    for record in tqdm(opened, desc=opened.set.name, unit="study"):
        counted.add(record)
        sample.add(record)
    statistics = counted.as_dict()
    facts, code = _facts(opened, statistics), _told(opened)
    output.mkdir(parents=True, exist_ok=True)
    if sample.images and not args.tables_only:
        statistics["image_files"] = image_statistics(sample.images)
    # The set is read anew for each question: its studies need not fit the memory together.
    is_looked_at = sample.seen and not (args.no_duplicates or args.tables_only)
    hashes = hash_records(opened, args.num_workers) if is_looked_at else None
    leaks = find_leaks(opened, hashes=hashes)
    if hashes is not None:
        statistics["near_duplicates"] = _duplicates(hashes)
    page = [_facts_markdown(facts), statistics_markdown(statistics), *_image_lines(statistics), leaks.summary()]
    (output / "stats.md").write_text("\n\n".join(page) + "\n", encoding="utf-8")
    content = {**facts, "statistics": statistics, "leaks": leaks.as_dict()}
    (output / "stats.json").write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    plot_statistics(statistics, output / "stats.png", facts["title"])
    sys.stderr.write(f"{leaks.summary()}\nwritten: stats.md, stats.json and stats.png in {args.output}\n")
    return code


def convert(args: Namespace) -> int:
    """Writes a data set as Parquet shards."""
    from .convert import convert_set
    from .pseudonyms import Pseudonyms
    from .splits import read_split
    from .stored_images import ImageStore

    opened = _open(args)
    facts = convert_set(
        opened,
        args.output,
        store=ImageStore(args.images, args.size),
        parts=None if args.split_file is None else read_split(args.split_file),
        pseudonyms=None if args.pseudonyms is None else Pseudonyms.from_file(args.pseudonyms),
        shard_bytes=args.shard_mb << 20,
        num_workers=args.num_workers,
        resume=not args.overwrite,
    )
    written = ", ".join(f"{count:,} {part}" for part, count in facts["studies"].items())
    sys.stderr.write(f"{written}: {len(facts['shards'])} shards in {args.output}\n")
    return _told(opened)


def split(args: Namespace) -> int:
    """Splits a data set by whole groups, or says what its own parts have in common."""
    from .splits import check_set, named_fractions, split_set

    opened = _open(args)
    if args.check:
        leaks = check_set(opened, args.by, args.num_workers)
        if args.leaks is not None:
            leaks.write(Path(args.leaks))
    else:
        leaks = split_set(
            opened, Path(args.output), named_fractions(args.fractions), args.by, args.seed, args.num_workers
        )
    sys.stdout.write(f"{leaks.summary()}\n")
    return EXIT_ERROR if _told(opened) or not leaks.is_clean else 0


def translate(args: Namespace) -> int:
    """Translates the reports of a data set, and keeps the pairs that pass the checks."""
    from .parallel import transformers_translator, translate_files

    translator = args.translator
    if Path(translator).is_dir():
        translator = transformers_translator(translator, args.source_token, args.target_token)
    counts = translate_files(
        args.path,
        translator,
        args.output,
        args.to,
        cache=args.cache,
        rejected=args.rejected,
        unit=args.unit,
        batch_size=args.batch_size,
        on_bad=args.on_bad,
    )
    sys.stderr.write(f"{counts['written']:,} pairs in {args.output}\n")
    return _told_summary(counts["bad_row_summary"])


def check_pairs(args: Namespace) -> int:
    """Checks the pairs of a bilingual corpus; the table goes to the screen."""
    from .parallel import check_pairs_file

    counts = check_pairs_file(args.path, args.accepted, args.rejected, on_bad=args.on_bad)
    sys.stdout.write(f"{counts['table']}\n")
    return _told_summary(counts["bad_row_summary"])


# --------------------------------------------------------------------------------------------------------------------
# Parts


def _open(args: Namespace) -> OpenSet:
    images = "unchecked" if args.tables_only or _is_sharded(args) else "required"
    return open_set(args.path, args.set, args.part, args.on_bad, images)


def _is_sharded(args: Namespace) -> bool:
    """Tells whether images lie in shards, from which they are then read when they are needed."""
    return (args.set or find_set(Path(args.path)).name) == "parquet"


def _told(opened: OpenSet) -> int:
    return _told_summary(opened.reading.summary())


def _told_summary(summary: str) -> int:
    """Lists the bad rows; returns the exit code."""
    if summary:
        sys.stderr.write(f"bad rows, left out:\n{summary}\n")
    return EXIT_ERROR if summary else 0


def _duplicates(hashes: RecordHashes) -> dict[str, int]:
    studies = hashes.studies
    return {
        "pairs": len(hashes.pairs),
        "mirrored_pairs": sum(pair.is_mirrored for pair in hashes.pairs),
        "pairs_within_a_study": sum(studies[pair.first] == studies[pair.second] for pair in hashes.pairs),
        "studies": len(hashes.marks),
        "unreadable_images": len(hashes.images.unreadable),
    }


def _image_lines(statistics: dict[str, Any]) -> list[str]:
    """Returns what stats adds to the tables of inspect."""
    lines = []
    if files := statistics.get("image_files"):
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in {**files["kinds"], **files["depths"]}.items())
        lines.append(f"Of {files['images']:,} images: {kinds}; {files['unreadable']:,} unreadable.")
        names = [name for name in ("width", "height", "slices") if name in files]
        if names:
            quantiles = list(files[names[0]])
            cells = [[name, *(f"{files[name][each]:,}" for each in quantiles)] for name in names]
            lines.append(markdown_table([["pixels", *quantiles], *cells]))
    if found := statistics.get("near_duplicates"):
        lines.append(
            f"Near-duplicate images: {found['pairs']:,} pairs ({found['mirrored_pairs']:,} mirrored, "
            f"{found['pairs_within_a_study']:,} within one study), in {found['studies']:,} studies."
        )
    return lines


def _facts(opened: OpenSet, statistics: dict[str, Any]) -> dict[str, Any]:
    """Returns what is said of a set beside its statistics; raises ValueError if it has no study."""
    if not statistics["studies"]:
        raise ValueError(f"{opened.root}: no study to count. {opened.reading.summary()}".strip())
    bad = {f"{file}: {kind}": count for (file, kind), count in sorted(opened.reading.counts.items())}
    return {
        "set": opened.set.name,
        "title": _title(opened),
        "licence": opened.set.licence,
        "url": opened.set.url,
        "reference": opened.set.reference,
        "published": {
            name: {"published": count, "here": _count_here(name, statistics)}
            for name, count in opened.set.published.items()
        },
        "bad_rows": bad,
    }


def _title(opened: OpenSet) -> str:
    """Returns the title of a published set, and the name of a folder that is none."""
    return opened.set.title if opened.set.published else source_name(opened.root)


def _count_here(name: str, statistics: dict[str, Any]) -> int | None:
    """Return the count that a published one is of: "images" of all parts, or "train_images" of one; None: neither."""
    if name in statistics:
        return statistics[name]
    part, _, what = name.rpartition("_")
    return statistics["parts"].get(part, {}).get(what)


def _facts_markdown(facts: dict[str, Any]) -> str:
    lines = [f"# {facts['title']} ({facts['set']})", ""]
    lines += [f"- {name}: {facts[name]}" for name in ("licence", "url", "reference") if facts[name]]
    for name, counts in facts["published"].items():
        if counts["here"] is not None:
            lines.append(f"- {name.replace('_', ' ')}: {counts['here']:,} here, {counts['published']:,} published")
    lines += [f"- bad rows, {kind}: {count:,}" for kind, count in facts["bad_rows"].items()]
    return "\n".join(lines)


COMMANDS = {
    "inspect": inspect,
    "stats": stats,
    "convert": convert,
    "split": split,
    "translate": translate,
    "check-pairs": check_pairs,
}
