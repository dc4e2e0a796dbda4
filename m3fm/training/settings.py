# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Settings of recipes: read from YAML, replaced by name, and checked against the dataclasses that declare them."""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

__all__ = [
    "checked_block",
    "checked_values",
    "did_you_mean",
    "parse_overrides",
    "read_value",
    "read_yaml",
    "refuse_unknown",
    "set_value",
    "types_of",
]

Block = TypeVar("Block")

_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", NoneType: "nothing (null)"}


# --------------------------------------------------------------------------------------------------------------------
# YAML


class _Loader(yaml.SafeLoader):
    """Reads scalars as YAML 1.2 does: `no` is a word, 1e-4 a number, 0012 and 2024-01-01 are texts.

    A key that comes twice is refused.
    """

    yaml_implicit_resolvers = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        if repeated := sorted({key for key in keys if keys.count(key) > 1}):
            raise yaml.YAMLError(f"line {node.start_mark.line + 1}: {', '.join(repeated)} stands there twice")
        return super().construct_mapping(node, deep)


_FLOAT = r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+|[-+]?\.inf|\.nan"
for _kind, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(0|[1-9][0-9_]*)", list("-+0123456789")),
    ("float", _FLOAT, list("-+0123456789.")),
    ("merge", r"<<", ["<"]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(rf"^(?:{_pattern})$"), _first)


def read_yaml(text: str) -> Any:
    """Reads YAML.

    Raises:
        ValueError: If it is none.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"is not YAML: {error}") from None


# --------------------------------------------------------------------------------------------------------------------
# Replaced by name


def parse_overrides(overrides: Sequence[str]) -> list[tuple[list[str], str]]:
    """Returns the path and the text of each of `--a.b value` pairs.

    Raises:
        ValueError: If they are none.
    """
    names, texts = overrides[::2], overrides[1::2]
    if len(names) != len(texts) or not all(name.startswith("--") and name[2:] for name in names):
        raise ValueError(
            f"Expected `--name value` pairs or `--set name=value` after the recipe, got {' '.join(overrides)!r}."
        )
    return [(name[2:].split("."), text) for name, text in zip(names, texts, strict=True)]


def set_value(values: dict[str, Any], path: Sequence[str], value: Any) -> None:
    """Puts a value where a path leads, through mappings that are there and those that have to be made.

    Raises:
        ValueError: If the path leads through something else.
    """
    for depth, name in enumerate(path[:-1], start=1):
        inner = values.get(name)
        if inner is not None and not isinstance(inner, dict):
            raise ValueError(f"{'.'.join(path)}: {'.'.join(path[:depth])} is {inner!r}, which has no settings in it.")
        values[name] = dict(inner or {})
        values = values[name]
    values[path[-1]] = value


def read_value(text: str, kind: Any) -> Any:
    """Reads what stands on a command line: as YAML, but for a setting that takes text, which it is already."""
    choices = get_args(kind) if _is_union(kind) else (kind,)
    value = read_yaml(text)
    if str in choices and value is not None and not any(_fits(value, each) for each in choices):
        return text
    return value


# --------------------------------------------------------------------------------------------------------------------
# Checked


@cache
def types_of(cls: type) -> dict[str, Any]:
    """Returns the type of each setting that a dataclass declares."""
    hints = get_type_hints(cls)
    return {each.name: hints[each.name] for each in fields(cls) if each.init}


def checked_block(cls: type[Block], values: Mapping[str, Any] | Block, where: str) -> Block:
    """Makes a dataclass of a block of a recipe.

    Args:
        cls: A dataclass.
        values: A mapping, or what was made of it before.
        where: The block's name in the recipe, for messages.

    Raises:
        ValueError: If a name is unknown, with the one that may be meant, or a value is of another type.
    """
    if isinstance(values, cls):
        return values
    if not isinstance(values, Mapping):
        raise ValueError(f"{where}: expected settings, `name: value` each, got {values!r}.")
    types = types_of(cls)
    refuse_unknown(values, types, where)
    checked = checked_values(values, types, where)
    try:
        return cls(**checked)
    except TypeError as error:
        raise ValueError(f"{where}: {error}.") from None


def checked_values(values: Mapping[str, Any], types: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Returns the values, blocks made dataclasses, a single value made a list where one is expected.

    Raises:
        ValueError: If one is not of its type, naming it, what came and what was expected.
    """
    return {name: _checked(value, types[name], f"{where}.{name}" if where else name) for name, value in values.items()}


def refuse_unknown(values: Iterable[str], known: Iterable[str], where: str = "") -> None:
    """Refuses names that are not known.

    Raises:
        ValueError: With the known name that is nearest.
    """
    known = sorted(known)
    unknown = [f"{where}.{name}" if where else str(name) for name in values if name not in known]
    if unknown:
        hints = [name + did_you_mean(name.rpartition(".")[2], known) for name in unknown]
        taken = f" {where} takes {', '.join(known)}." if where else ""
        raise ValueError(f"unknown setting{'s' * (len(unknown) > 1)} {', '.join(hints)}.{taken}")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns the known name that is meant, as a question to be added to a message, or nothing."""
    close = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.75)
    return f" (did you mean {close[0]}?)" if close else ""


def _checked(value: Any, kind: Any, where: str) -> Any:
    if is_dataclass(kind):
        return checked_block(kind, value, where)
    origin = get_origin(kind)
    if origin in (list, tuple) and value is not None and not isinstance(value, list | tuple | dict):
        value = [value]
    if not _fits(value, kind):
        quote = " (a number that is meant as text stands in quotes)" if _wants_text(value, kind) else ""
        raise ValueError(f"{where}: expected {_described(kind)}, got {value!r}{quote}.")
    return value


def _fits(value: Any, kind: Any) -> bool:
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any or isinstance(kind, TypeVar):
        return True
    if _is_union(kind):
        # Beside an enumeration, text stands for the name of one of its members.
        return any(_fits(value, each) for each in inner if each is not str or not any(map(_is_enum, inner)))
    if _is_enum(kind):
        return value in [each.value for each in kind]
    if origin is Literal:
        return value in inner
    if origin in (list, tuple):
        return isinstance(value, list | tuple) and all(_fits(each, inner[0]) for each in value if inner)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(k, inner[0]) and _fits(v, inner[1]) for k, v in value.items())
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)


def _is_union(kind: Any) -> bool:
    return get_origin(kind) in (Union, UnionType)


def _is_enum(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Enum)


def _wants_text(value: Any, kind: Any) -> bool:
    texts = value if isinstance(value, list) else [value]
    return (kind is str or str in get_args(kind)) and any(
        isinstance(each, int | float) and not isinstance(each, bool) for each in texts
    )


def _described(kind: Any) -> str:
    """Says a type in words."""
    origin, inner = get_origin(kind), get_args(kind)
    if _is_union(kind):
        return " or ".join(
            dict.fromkeys(_described(each) for each in inner if each is not str or not any(map(_is_enum, inner)))
        )
    if origin is Literal:
        return f"one of {', '.join(map(repr, inner))}"
    if origin in (list, tuple):
        return f"a list, each {_described(inner[0])}" if inner and inner[0] is not Any else "a list"
    if origin is dict or kind is dict:
        value = "value" if not inner or inner[1] is Any else _described(inner[1])
        return f"settings, `name: {value}` each"
    if _is_enum(kind):
        return f"one of {', '.join(str(each.value) for each in kind)}"
    return _WORDS.get(kind, getattr(kind, "__name__", str(kind)))
