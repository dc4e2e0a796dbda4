# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""XML read element by element, without what is dangerous in it."""

import io
from pathlib import Path

import pytest

from m3fm.data.sets.plain_xml import read_elements, text_of
from m3fm.data.tables import BadRow

PATH = Path("file.xml")


def read(content: bytes, name: str = "a") -> list:
    return list(read_elements(io.BytesIO(content), name, PATH))


def test_elements_with_their_lines_and_texts():
    first, second = read(b"<r>\n<a k='1'>x<b>y</b> z</a>\n<c/><a/>\n</r>")
    assert (first.line, first.get("k"), text_of(first), text_of(first.find("b"))) == (2, "1", "xy z", "y")
    assert (second.line, text_of(second), text_of(first.find("d"))) == (3, None, None)


def test_an_encoding_that_is_stated():
    (element,) = read("<?xml version='1.0' encoding='iso-8859-1'?><a>é</a>".encode("latin-1"))
    assert text_of(element) == "é"


def test_long_files_keep_only_the_element_that_is_read():
    content = b"<r>" + b"".join(b"<a>%d</a>" % number for number in range(30_000)) + b"</r>"
    elements = read_elements(io.BytesIO(content), "a", PATH)
    assert sum(int(element.text) for element in elements) == 30_000 * 29_999 // 2


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"<r><a>1</a><a>2</r>", "not_a_row"),
        (b"<r><a>1</a><a>2", "not_a_row"),
        (b"<r><a>1</a><a>\xff</a></r>", "bad_encoding"),
        (b"<r><a>1</a><a>\x01</a></r>", "not_a_row"),
    ],
)
def test_what_came_before_the_damage_is_read(content, kind):
    elements = []
    with pytest.raises(BadRow) as raised:
        for element in read_elements(io.BytesIO(content), "a", PATH):
            elements.append(element.text)
    assert elements == ["1"] and (raised.value.kind, raised.value.line) == (kind, 1)


@pytest.mark.parametrize("content", [b"<!DOCTYPE a><a/>", b"<!DOCTYPE a [<!ENTITY e 'x'>]><a>&e;</a>"])
def test_a_document_type_is_refused(content):
    with pytest.raises(BadRow, match="document type"):
        read(content)


def test_an_entity_that_nobody_declared():
    with pytest.raises(BadRow, match="undefined entity"):
        read(b"<a>&e;</a>")
