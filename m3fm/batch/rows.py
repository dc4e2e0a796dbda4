# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""The file that a run writes its rows into, a study at a time, and that it goes on in after it was stopped.

Whatever ends a run, a kill or a full disk, the rows that were written stay, and no study is written in part: what was
cut off is dropped when the run goes on. Beside the file lie `<file>.run.json`, which says what it was made with, and
while a run writes `<file>.lock`.
"""

import csv
import io
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TextIO

from ..evaluation.runs import library_versions, without_nan, write_json
from ..file_lock import FileLock

Row = dict[str, Any]

# A killed program loses nothing that it has written; a machine that loses power loses at most this much work.
_SYNC_SECONDS = 1.0


class Form(Protocol):
    """How rows stand in a file."""

    name: str

    def head(self) -> str:
        """Returns what stands before the rows."""

    def line(self, row: Row) -> str:
        """Returns a row with its line break."""

    def rows(self, text: str) -> Iterator[Row]:
        """Yields the rows of a file that holds whole lines; what is no row is left out."""


class JsonLines:
    """A JSON object a line.

    Args:
        is_row: Tells the rows of a run from other objects.
    """

    name = "jsonl"

    def __init__(self, is_row: Callable[[Mapping[str, Any]], bool]):
        self._is_row = is_row

    def head(self) -> str:
        """Returns nothing."""
        return ""

    def line(self, row: Row) -> str:
        """Returns a row with its line break."""
        return json.dumps(without_nan(row), ensure_ascii=False, allow_nan=False) + "\n"

    def rows(self, text: str) -> Iterator[Row]:
        """Yields the rows of a file that holds whole lines."""
        for line in text.split("\n"):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict) and self._is_row(row):
                yield row


class CsvTable:
    """Comma-separated values below a line of names; what is None is an empty cell.

    Args:
        columns: Names, in order.
        is_row: Tells the rows of a run from other lines with as many cells.
    """

    name = "csv"

    def __init__(self, columns: Sequence[str], is_row: Callable[[Mapping[str, Any]], bool]):
        self._columns = tuple(columns)
        self._is_row = is_row

    def head(self) -> str:
        """Returns the line of names."""
        return self._joined(self._columns)

    def line(self, row: Row) -> str:
        """Returns a row with its line break."""
        return self._joined(["" if row[name] is None else row[name] for name in self._columns])

    def rows(self, text: str) -> Iterator[Row]:
        """Yields the rows of a file that holds whole lines, with all values as text."""
        # A name may hold a line break: the reader, and not the line, decides where a row ends.
        for cells in csv.reader(io.StringIO(text, newline="")):
            if len(cells) == len(self._columns) and tuple(cells) != self._columns:
                row = {name: cell or None for name, cell in zip(self._columns, cells, strict=True)}
                if self._is_row(row):
                    yield row

    @staticmethod
    def _joined(cells: Iterable[Any]) -> str:
        stream = io.StringIO()
        csv.writer(stream, lineterminator="\n").writerow(cells)
        return stream.getvalue()


def check_output(output: str | Path, images: Iterable[Path]) -> Path:
    """Returns the path of a file that may be written.

    Raises:
        ValueError: If it is a folder, or in none that exists, or one of the images.
    """
    path = Path(output)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise ValueError(f"{output}: expected a file in a folder that exists.")
    if path.exists() and path.resolve() in {image.resolve() for image in images}:
        raise ValueError(f"{output} would replace an image that is to be read.")
    return path


class StreamRows:
    """Writes rows to the screen, a pipe, or a file that is made anew. A context manager.

    Args:
        stream: Of text; left open.
        line: Gives the text of a row.
        head: Stands before all rows.
        separator: Stands between rows.
        tail: Stands after all rows, also where an error ends the run.
    """

    def __init__(
        self, stream: TextIO, line: Callable[[Row], str], head: str = "", separator: str = "", tail: str = ""
    ):
        self._stream = stream
        self._line = line
        self._start, self._separator, self._tail = head, separator, tail

    def __enter__(self) -> "StreamRows":
        self._stream.write(self._start)
        self._start = ""
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.write(self._tail)
        self._stream.flush()

    def write(self, rows: Sequence[Row]) -> None:
        """Writes the rows of one study."""
        for row in rows:
            self._stream.write(self._start + self._line(row))
            self._start = self._separator
        self._stream.flush()


class RowFile:
    """Writes rows, whole studies at once, into a file that an earlier run may have begun. A context manager.

    Args:
        path: The file, in a folder that exists.
        form: How rows stand in it. Each has a `source`, which says what study it is of.
        run: What the rows depend on, as JSON.
        is_whole: Tells whether rows are all those of their study; None: each study has one row.
        resume: False begins anew.

    Attributes:
        kept: The first row of each study that is in the file already, by source.

    Raises:
        ValueError: If the file was made with other settings, is none of a run, or another run is writing it.
    """

    def __init__(
        self,
        path: Path,
        form: Form,
        run: Mapping[str, Any],
        is_whole: Callable[[Sequence[Row]], bool] | None = None,
        resume: bool = True,
    ):
        self.path = path
        self._form = form
        self._is_whole = is_whole
        self._record = path.with_name(f"{path.name}.run.json")
        run = json.loads(json.dumps({**run, "format": form.name}))
        self._lock = FileLock(path)
        try:
            content = path.read_bytes() if path.exists() else None
            if content and resume:
                self._check_record(run)
            studies = self._studies(content) if content and resume else {}
            # Before the record: rows must never lie beside a record of other settings.
            self._replace(studies, unless=content)
            write_json(self._record, run | {"versions": library_versions()})
            self.kept = {source: rows[0] for source, rows in studies.items()}
            self._file = _Appender(path)
            if not studies:
                self._file.append(_encoded(form.head()))
        except BaseException:
            self._lock.release()
            raise

    def _check_record(self, run: Mapping[str, Any]) -> None:
        try:
            earlier = json.loads(self._record.read_text(encoding="utf-8"))
            changed = sorted(key for key in run if earlier.get(key) != run[key])
        except (OSError, ValueError, AttributeError):
            raise ValueError(f"{self.path} exists, and not as a table of m3fm: expected another output.") from None
        if changed:
            raise ValueError(
                f"{self.path} was made with another {', '.join(changed)}: expected another output, or to begin anew "
                "(--overwrite)."
            )

    def __enter__(self) -> "RowFile":
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._file.close()
        finally:
            self._lock.release()

    def check_sources(self, sources: Sequence[str]) -> None:
        """Checks that the file holds no studies but these.

        Raises:
            ValueError: If it does.
        """
        if strangers := self.kept.keys() - set(sources):
            raise ValueError(
                f"{self.path} holds {len(strangers)} studies that are not among the files: expected another output, "
                "or to begin anew (--overwrite)."
            )

    def write(self, rows: Sequence[Row]) -> None:
        """Writes the rows of one study.

        Raises:
            OSError: If they do not fit on the disk; what was written before is kept.
        """
        self._file.append(_encoded("".join(map(self._form.line, rows))))

    def sort(self, sources: Sequence[str]) -> None:
        """Puts studies into this order, which has changed if files came in since the table was begun."""
        self._file.close()
        content = self.path.read_bytes()
        studies = self._studies(content)
        if list(studies) != list(sources):
            self._replace({source: studies[source] for source in sources}, unless=content)

    def _studies(self, content: bytes) -> dict[str, list[Row]]:
        """Reads the studies of which nothing is missing; a killed run may have cut off the last."""
        studies: dict[str, list[Row]] = {}
        text = content[: content.rfind(b"\n") + 1].decode("utf-8", errors="replace")
        for row in self._form.rows(text):
            rows = studies.setdefault(row["source"], [])
            if self._is_whole is not None or not rows:
                rows.append(row)
        return {source: rows for source, rows in studies.items() if self._is_whole is None or self._is_whole(rows)}

    def _replace(self, studies: Mapping[str, Sequence[Row]], unless: bytes | None) -> None:
        """Writes the file anew, whole or not at all, unless it holds just this."""
        lines = "".join(self._form.line(row) for rows in studies.values() for row in rows)
        content = _encoded(self._form.head() + lines if lines else "")
        if content == unless:
            return
        draft = self.path.with_name(f"{self.path.name}.tmp")
        try:
            with open(draft, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(draft, self.path)
        except OSError:
            draft.unlink(missing_ok=True)
            raise


def _encoded(text: str) -> bytes:
    # Paths in errors may hold bytes that are no text; as escapes they are still JSON.
    return text.encode("utf-8", errors="backslashreplace")


class _Appender:
    """Appends bytes to a file, all or nothing."""

    def __init__(self, path: Path):
        self._file: BinaryIO = open(path, "ab", buffering=0)  # noqa: SIM115 - closed by close
        self._length = os.fstat(self._file.fileno()).st_size
        self._synced = time.monotonic()

    def append(self, content: bytes) -> None:
        left = memoryview(content)
        try:
            while left:
                left = left[self._file.write(left) :]
        except BaseException:
            # What is cut in two, by a full disk or by Ctrl-C, would have to be told from a whole line later.
            self._file.truncate(self._length)
            raise
        self._length += len(content)
        if time.monotonic() - self._synced > _SYNC_SECONDS:
            self._sync()

    def _sync(self) -> None:
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()

    def close(self) -> None:
        if not self._file.closed:
            try:
                self._sync()
            finally:
                self._file.close()


__all__ = ["CsvTable", "Form", "JsonLines", "Row", "RowFile", "StreamRows", "check_output"]
