# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Convert a data set to Parquet shards that `datasets.load_dataset` and `m3fm.data.open_set` read."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..read_ahead_m3fm import read_ahead
from .data_card import data_card
from .opening import OpenSet
from .pseudonyms import Pseudonyms
from .schema import LabelState, StudyRecord, features
from .sets.parquet import MANIFEST, read_manifest
from .splits import SplitDocument, apply_split
from .stored_images import ImageStore
from .tables import BAD_KINDS, BadRow

__all__ = ["convert_set"]

#: The part of studies for which the set states none.
UNSPLIT = "unsplit"
_FORMAT = 1
# To `datasets`, all parts together.
_RESERVED = "all"
# A row group is what a reader holds in memory; pages of the hub's viewer are of this size too.
_GROUP_ROWS, _GROUP_BYTES = 100, 64 << 20
_STATE_NUMBERS = {state.value: number for number, state in enumerate(LabelState)}
_NOT_IN_NAMES = re.compile(r"\W+")


def convert_set(
    opened: OpenSet,
    output: str | Path,
    store: ImageStore | None = None,
    parts: SplitDocument | None = None,
    pseudonyms: Pseudonyms | None = None,
    shard_bytes: int = 500 << 20,
    num_workers: int = 0,
    resume: bool = True,
) -> dict[str, Any]:
    """Write the studies of a data set as Parquet shards, streaming, with a progress bar.

    `output` gets `data/PART-NNNNN.parquet`, a `README.md` (a dataset card that `load_dataset(output)` reads) and
    `m3fm.json` (settings, counts, bad rows). A stopped run goes on after its last whole shards.

    Args:
        opened: The set, from `open_set`.
        output: A folder, made if missing.
        store: How images are stored; None: as bytes, DICOM without its headers.
        parts: A split (`m3fm.data.splits.read_split`) in place of the parts that the set states. It has to name every
            study, and no other, unless bad rows are skipped or one part alone is read.
        pseudonyms: What ids are replaced by; None keeps them.
        shard_bytes: About how large a shard grows, in bytes before compression.
        num_workers: Processes that read images ahead.
        resume: Whether a stopped run goes on; else the output is made anew.

    Returns:
        What `m3fm.json` says.

    Raises:
        ValueError: If the output holds something else, the set changed since the run that is resumed, or as the
            set's reading says.
        ImportError: If pyarrow or `datasets` is not installed.
    """
    output, store = Path(output), store or ImageStore()
    if pseudonyms is not None and store.mode == "paths":
        raise ValueError("pseudonyms need images='bytes': paths may name patients")
    _check_apart(output, opened.root)
    manifest = _open_manifest(output, _settings(opened, store, parts, pseudonyms), resume)
    writer = _ShardWriter(output, manifest, shard_bytes)
    with tqdm(desc=f"convert {opened.set.name}", unit="study") as bar:
        records = writer.skip_written(_distinct(_with_parts(opened, parts), opened), bar)
        for result, number, record in _stored(records, store, num_workers):
            bar.update()
            if result.error is None:
                writer.write(record, result.value if pseudonyms is None else pseudonyms.replace(result.value))
            elif isinstance(result.error, (ValueError, OSError)):
                reason = f": {result.error}" if pseudonyms is None else ""
                opened.reading.tell(_bad_study(opened, "unreadable_image", number, f"cannot be stored{reason}"))
                writer.pass_over(record)
            else:
                raise result.error
    writer.close()
    manifest.finish(opened)
    manifest.save(output)
    (output / "README.md").write_text(data_card(opened.set, manifest.as_dict()), encoding="utf-8")
    return manifest.as_dict()


def _settings(
    opened: OpenSet, store: ImageStore, parts: SplitDocument | None, pseudonyms: Pseudonyms | None
) -> dict[str, Any]:
    """Return what makes another output."""
    return {
        "set": opened.set.name,
        "split": opened.split,
        "images": store.mode,
        "size": store.size,
        "parts": None if parts is None else _digest(f"{study}\t{part}" for study, part in sorted(parts.items())),
        "pseudonyms": None if pseudonyms is None else pseudonyms.fingerprint,
    }


def _check_apart(output: Path, root: Path) -> None:
    """Refuse an output that is the input, or around it: beginning anew would take away what is read."""
    written, read = output.resolve(), root.resolve()
    if written == read or written in read.parents:
        raise ValueError(f"{output}: expected a folder apart from the set that is read, {root}")


def _distinct(records: Iterable[StudyRecord], opened: OpenSet) -> Iterator[tuple[int, StudyRecord]]:
    """Yield each study once, with its number in the order of the set; those that come again are told of."""
    seen: set[int] = set()
    for number, record in enumerate(records, start=1):
        mark = hash((record.source, record.study_id))
        if mark in seen:
            opened.reading.tell(_bad_study(opened, "duplicate_id", number, "has the id of an earlier one"))
            continue
        seen.add(mark)
        yield number, record


def _bad_study(opened: OpenSet, kind: str, number: int, message: str) -> BadRow:
    return BadRow(kind, opened.root, None, f"study number {number}, in the order of the set, {message}")


def _with_parts(opened: OpenSet, parts: SplitDocument | None) -> Iterable[StudyRecord]:
    if parts is None:
        return opened
    # Studies of bad rows, and those of other parts, are named by the split and do not come.
    comes_whole = opened.reading.on_bad == "raise" and opened.split is None
    return apply_split(opened, parts, "raise" if comes_whole else "skip")


def _stored(
    numbered: Iterator[tuple[int, StudyRecord]], store: ImageStore, num_workers: int
) -> Iterator[tuple[Any, int, StudyRecord]]:
    """Yield what became of each record, its number and the record, in order; images are read ahead."""
    waiting: deque[tuple[int, StudyRecord]] = deque()

    def remembered() -> Iterator[StudyRecord]:
        for number, record in numbered:
            waiting.append((number, record))
            yield record

    for result in read_ahead(store, remembered(), num_workers):
        yield result, *waiting.popleft()


def _digest(lines: Any) -> str:
    digest = hashlib.sha256()
    for line in lines:
        digest.update(f"{line}\n".encode())
    return digest.hexdigest()


# --------------------------------------------------------------------------------------------------------------------
# What a stopped run goes on from


@dataclass
class _Manifest:
    """What a conversion is and how far it has come.

    Attributes:
        settings: Those that make another output.
        shards: A row each: file, part, its number in the part, rows, studies (rows and those passed over), digest of
            the study ids, rows by modality and by language of their text.
        bad_rows: Counts by kind.
        complete: Whether all is written.
    """

    settings: dict[str, Any]
    shards: list[dict[str, Any]] = field(default_factory=list)
    bad_rows: dict[str, int] = field(default_factory=dict)
    complete: bool = False

    def as_dict(self) -> dict[str, Any]:
        studies: Counter[str] = Counter()
        modalities: Counter[str] = Counter()
        languages: Counter[str] = Counter()
        for shard in self.shards:
            studies[shard["part"]] += shard["rows"]
            modalities.update(shard["modalities"])
            languages.update(shard["languages"])
        counts = {"studies": dict(studies), "modalities": dict(modalities), "languages": dict(languages)}
        return {"format": _FORMAT, **counts, **vars(self)}

    def finish(self, opened: OpenSet) -> None:
        """Take down the bad rows, by kind: the names of tables may be those of files that name patients.

        Raises:
            ValueError: If no study was written.
        """
        counts: Counter[str] = Counter()
        for (_, kind), count in opened.reading.counts.items():
            counts[kind] += count
        # Studies of shards that an earlier run wrote are not read again.
        counts["unreadable_image"] = sum(shard["studies"] - shard["rows"] for shard in self.shards)
        self.bad_rows = {kind: counts[kind] for kind in BAD_KINDS if counts[kind]}
        if not any(shard["rows"] for shard in self.shards):
            raise ValueError(f"{opened.root}: no study to convert. {opened.reading.summary()}".strip())
        self.complete = True

    def save(self, output: Path) -> None:
        draft = output / f"{MANIFEST}.tmp"
        draft.write_text(json.dumps(self.as_dict(), indent=1) + "\n", encoding="utf-8")
        os.replace(draft, output / MANIFEST)


def _open_manifest(output: Path, settings: dict[str, Any], resume: bool) -> _Manifest:
    data, saved = output / "data", read_manifest(output)
    if saved is not None:
        if resume and saved.get("settings") == settings and saved.get("format") == _FORMAT:
            return _Manifest(settings, _there(saved["shards"], output))
        if resume:
            raise ValueError(
                f"{output}: holds a conversion with other settings ({saved.get('settings')}); got {settings}. Choose "
                "another folder, or overwrite it"
            )
        for shard in (*data.glob("*.parquet"), *data.glob("*.tmp")):
            shard.unlink()
    elif output.exists() and any(output.iterdir()):
        raise ValueError(f"{output}: expected a new or empty folder, or that of a conversion")
    data.mkdir(parents=True, exist_ok=True)
    manifest = _Manifest(settings)
    manifest.save(output)
    return manifest


def _there(shards: list[dict[str, Any]], output: Path) -> list[dict[str, Any]]:
    """Return the shards of each part up to the first that somebody took away."""
    missing = {shard["part"]: math.inf for shard in shards}
    for shard in shards:
        if not (output / shard["file"]).is_file():
            missing[shard["part"]] = min(missing[shard["part"]], shard["number"])
    return [shard for shard in shards if shard["number"] < missing[shard["part"]]]


# --------------------------------------------------------------------------------------------------------------------
# Shards


@dataclass
class _OpenShard:
    """One shard that is being written.

    Attributes:
        studies: Taken from the set for it, those passed over included.
    """

    file: Path
    number: int
    writer: Any
    rows: int = 0
    bytes: int = 0
    studies: int = 0
    digest: Any = field(default_factory=hashlib.sha256)
    modalities: Counter[str] = field(default_factory=Counter)
    languages: Counter[str] = field(default_factory=Counter)
    waiting: list[dict[str, Any]] = field(default_factory=list)
    waiting_bytes: int = 0


class _ShardWriter:
    """Writes rows into the shard of their part; a shard has its name once it is whole."""

    def __init__(self, output: Path, manifest: _Manifest, shard_bytes: int):
        if shard_bytes < 1:
            raise ValueError(f"shard_bytes must be at least 1, got {shard_bytes}")
        try:
            import pyarrow.parquet
        except ImportError:
            raise ImportError('Parquet files need pyarrow: pip install "m3fm[data]"') from None
        self._parquet = pyarrow.parquet
        self._schema = features().arrow_schema
        self._output, self._manifest, self._shard_bytes = output, manifest, shard_bytes
        self._open: dict[str, _OpenShard] = {}

    def skip_written(
        self, numbered: Iterator[tuple[int, StudyRecord]], bar: tqdm
    ) -> Iterator[tuple[int, StudyRecord]]:
        """Yield the numbered records that no whole shard holds yet.

        Raises:
            ValueError: If those before are not the ones that were written.
        """
        whole: dict[str, list[dict[str, Any]]] = {}
        for shard in self._manifest.shards:
            whole.setdefault(shard["part"], []).append(shard)
        taken: dict[str, list[Any]] = {part: [0, hashlib.sha256()] for part in whole}
        for number, record in numbered:
            part = _part(record)
            if not whole.get(part):
                yield number, record
                continue
            count_and_digest = taken[part]
            count_and_digest[0] += 1
            count_and_digest[1].update(_mark(record))
            bar.update()
            shard = whole[part][0]
            if count_and_digest[0] == shard["studies"]:
                if count_and_digest[1].hexdigest() != shard["digest"]:
                    raise ValueError(f"{self._output}: the set has changed since this run was stopped; overwrite it")
                whole[part].pop(0)
                taken[part] = [0, hashlib.sha256()]
        if any(whole.values()):
            raise ValueError(f"{self._output}: the set has fewer studies than when this run was stopped; overwrite it")

    def write(self, record: StudyRecord, stored: StudyRecord) -> None:
        """Write a study; `record` is as the set has it, `stored` as it goes into the shard."""
        shard = self._take(record)
        row = _coded(stored.as_row())
        size = sum(len(each["bytes"] or b"") for each in row["images"]) + 1024
        shard.waiting.append(row)
        shard.waiting_bytes += size
        shard.rows += 1
        shard.bytes += size
        shard.modalities[record.modality] += 1
        shard.languages.update(code for code, report in record.reports.items() if report.text)
        if len(shard.waiting) >= _GROUP_ROWS or shard.waiting_bytes >= _GROUP_BYTES:
            self._flush(shard)
        if shard.bytes >= self._shard_bytes:
            self._finish(_part(record))

    def pass_over(self, record: StudyRecord) -> None:
        """Take account of a study that cannot be written, so that a resumed run counts as this one did."""
        self._take(record)

    def close(self) -> None:
        for part in list(self._open):
            self._finish(part)

    def _take(self, record: StudyRecord) -> _OpenShard:
        part = _part(record)
        if part not in self._open:
            number = sum(shard["part"] == part for shard in self._manifest.shards)
            file = self._output / "data" / f"{part}-{number:05d}.parquet"
            writer = self._parquet.ParquetWriter(file.with_suffix(".tmp"), self._schema, compression="zstd")
            self._open[part] = _OpenShard(file, number, writer)
        shard = self._open[part]
        shard.studies += 1
        shard.digest.update(_mark(record))
        return shard

    def _flush(self, shard: _OpenShard) -> None:
        import pyarrow

        if shard.waiting:
            shard.writer.write_table(pyarrow.Table.from_pylist(shard.waiting, schema=self._schema))
        shard.waiting, shard.waiting_bytes = [], 0

    def _finish(self, part: str) -> None:
        shard = self._open.pop(part)
        self._flush(shard)
        shard.writer.close()
        os.replace(shard.file.with_suffix(".tmp"), shard.file)
        self._manifest.shards.append(
            {
                "file": f"data/{shard.file.name}",
                "part": part,
                "number": shard.number,
                "rows": shard.rows,
                "studies": shard.studies,
                "digest": shard.digest.hexdigest(),
                "modalities": dict(shard.modalities),
                "languages": dict(shard.languages),
            }
        )
        self._manifest.save(self._output)


def _coded(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row with states as the numbers that `ClassLabel` stores, faster than `Features.encode_example` does."""
    for column in ("labels", "findings"):
        row[column] = [{"name": each["name"], "state": _STATE_NUMBERS[each["state"]]} for each in row[column]]
    return row


def _part(record: StudyRecord) -> str:
    """Return the name of a part as `datasets` allows it."""
    name = _NOT_IN_NAMES.sub("_", record.split) if record.split else UNSPLIT
    return f"part_{name}" if name == _RESERVED else name


def _mark(record: StudyRecord) -> bytes:
    return hashlib.sha256(record.study_id.encode()).digest()
