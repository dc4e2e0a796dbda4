# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Read XML of unknown origin: without document types, so without entities that grow or that name other files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import IO
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

from ..tables import BadRow

__all__ = ["LinedElement", "read_elements", "text_of"]

_CHUNK = 65536


class LinedElement(Element):
    """An element that knows the line it starts in, from 1."""

    line: int = 1


class _DocumentType(Exception):  # noqa: N818 (it ends the parsing, and is turned into a `BadRow`)
    """The document has a DTD."""


def read_elements(file: IO[bytes], name: str, path: Path) -> Iterator[LinedElement]:
    """Yield the elements of a name, each as soon as it is read; elements outside of them are not kept.

    Args:
        file: Open for reading bytes.
        name: The tag; such elements do not lie within each other.
        path: For error messages.

    Raises:
        BadRow: If the file is not well-formed, not in the encoding it states, or has a document type. Elements that
            ended before were already yielded.
    """
    collector = _Collector(name)
    parser = expat.ParserCreate()
    parser.buffer_text = True
    parser.StartElementHandler = lambda tag, attributes: collector.start(tag, attributes, parser.CurrentLineNumber)
    parser.EndElementHandler = collector.end
    parser.CharacterDataHandler = collector.data
    parser.StartDoctypeDeclHandler = _refuse
    ended = False
    while not ended:
        chunk = file.read(_CHUNK)
        ended = not chunk
        try:
            parser.Parse(chunk, ended)
        except _DocumentType:
            raise BadRow("bad_value", path, parser.CurrentLineNumber, "XML with a document type is not read") from None
        except expat.ExpatError as error:
            # Elements of this chunk that were whole before the damage.
            yield from collector.take()
            kind, message = _damage(error, chunk)
            raise BadRow(kind, path, error.lineno, message) from None
        yield from collector.take()


def text_of(element: Element | None) -> str | None:
    """Return the text of an element and all within it, stripped; None where it is missing or empty."""
    return None if element is None else "".join(element.itertext()).strip() or None


class _Collector:
    """Build the elements of one name, and drop all else."""

    def __init__(self, name: str):
        self.name = name
        self._builder: TreeBuilder | None = None
        self._ended: list[LinedElement] = []

    def start(self, tag: str, attributes: dict[str, str], line: int) -> None:
        if self._builder is None and tag == self.name:
            self._builder = TreeBuilder(element_factory=LinedElement)
        if self._builder is not None:
            self._builder.start(tag, attributes).line = line

    def end(self, tag: str) -> None:
        if self._builder is not None:
            self._builder.end(tag)
            if tag == self.name:
                self._ended.append(self._builder.close())
                self._builder = None

    def data(self, text: str) -> None:
        if self._builder is not None:
            self._builder.data(text)

    def take(self) -> list[LinedElement]:
        ended, self._ended = self._ended, []
        return ended


def _refuse(*_: object) -> None:
    raise _DocumentType


def _damage(error: expat.ExpatError, chunk: bytes) -> tuple[str, str]:
    text = expat.ErrorString(error.code)
    if text == "not well-formed (invalid token)" and not _is_utf8(chunk):
        return "bad_encoding", "expected XML in the encoding that it states, else in UTF-8"
    return "not_a_row", f"expected well-formed XML: {text}"


def _is_utf8(chunk: bytes) -> bool:
    try:
        chunk.decode("utf-8")
    except UnicodeDecodeError as error:
        # A character that the end of the chunk cuts is no damage.
        return error.end == len(chunk) and error.reason == "unexpected end of data"
    return True
