# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Read which findings to diagnose, and the phrases that stand for them, from a YAML file.

The file is a list of findings:

```yaml
- pneumonia
- Pleural Effusion   # canonical, English, Chinese and CheXpert names are known, in any case
- 肺结核
```

or a mapping, where a label may have phrases of its own, or a name of its own by saying which finding it is:

```yaml
exclusive: false     # true: each study has exactly one of the labels, which compete zero-shot
tuberculosis:        # nothing said: the phrases that come with m3fm
normal:
  finding: no_finding
  present: {en: [Normal chest radiograph.], zh: [胸片未见异常。]}
  absent: {en: [The chest radiograph is abnormal.]}
```

A list of phrases that is left out, in one language or in both, is the one that comes with m3fm: see
`m3fm/data/prompts.yaml`.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ..data.labels import FINDINGS, Finding, finding_table
from ..data.studies import LANGUAGES, Study
from ..diagnosis import default_diagnosis, default_phrases
from .probes import Shots, learning_problem
from .runs import group_numbers

_EXCLUSIVE = "exclusive"
_PHRASES = ("present", "absent")
YAML_SUFFIXES = (".yaml", ".yml")
_MAX_SUGGESTIONS = 3


@dataclass(frozen=True)
class Label:
    """Hold one thing to diagnose; the dictionaries are keyed by language code.

    Attributes:
        name: What it is called in results.
        finding: The canonical finding whose annotations are its truth.
        present: Phrases that state it.
        absent: Phrases that deny it.
    """

    name: str
    finding: str
    present: Mapping[str, tuple[str, ...]]
    absent: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class LabelSet:
    """Hold the labels of one run.

    Attributes:
        labels: Names and findings differ from each other.
        exclusive: Whether each study has exactly one of them, so that they compete.
    """

    labels: tuple[Label, ...]
    exclusive: bool = False


def read_labels(path: str | Path) -> LabelSet:
    """Reads a label file.

    Raises:
        ValueError: If the file is not what the module describes: not YAML, an unknown finding (the nearest names are
            given), a label or finding that comes twice, or a phrase that both states and denies a label.
    """
    content = read_content(path)
    try:
        return parse_labels(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def read_content(path: str | Path) -> Any:
    """Reads what a label file holds, as it is.

    Raises:
        ValueError: If there is no such file, it is not YAML, or a key comes twice.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such label file.")
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: expected YAML: {' '.join(str(error).split())}") from None
    except ValueError as error:  # UnicodeDecodeError is one
        raise ValueError(f"{path}: {error}") from None


def parse_labels(content: Any) -> LabelSet:
    """Makes labels of what a label file holds: a list of names, or a mapping; see the module.

    Raises:
        ValueError: As `read_labels`.
    """
    if isinstance(content, Mapping):
        entries = {name: entry for name, entry in content.items() if name != _EXCLUSIVE}
        exclusive = content.get(_EXCLUSIVE, False)
        labels = [_parse_entry(name, entry) for name, entry in entries.items()]
    elif isinstance(content, Sequence) and not isinstance(content, str):
        exclusive = False
        labels = [_parse_entry(name, None) for name in content]
    else:
        raise ValueError(f"Expected a list of findings or a mapping of labels, got {type(content).__name__}.")
    if not isinstance(exclusive, bool):
        raise ValueError(f"Expected {_EXCLUSIVE} to be true or false, got {exclusive!r}.")
    if len(labels) < 1 + exclusive:
        raise ValueError(f"Expected {'two labels' if exclusive else 'a label'} or more, got {len(labels)}.")
    for field in ("name", "finding"):
        values = [getattr(label, field) for label in labels]
        if twice := sorted({value for value in values if values.count(value) > 1}):
            raise ValueError(f"Expected each {field} once, got {', '.join(map(repr, twice))} more than once.")
    return LabelSet(tuple(labels), exclusive)


def default_label(finding: str) -> Label:
    """Returns the label of a canonical finding, with the phrases that come with m3fm."""
    return _parse_entry(finding, None)


def choose_labels(
    labels: str | Path | Sequence[str] | None, evaluated: Sequence[Study], training: Sequence[Study], shots: Shots
) -> tuple[LabelSet, list[str], dict[str, str]]:
    """Chooses what can be scored, and learned where shots are asked for.

    Args:
        labels: A label file or names of findings; None: every finding that is annotated in `evaluated`.
        evaluated: Studies to score.
        training: Studies to learn from.
        shots: 0 learns nothing; see `probes`.

    Returns:
        All labels, the names of those that can be scored, and why the others cannot, by name.

    Raises:
        ValueError: If the file is not right, there is nothing to learn from, or no label can be scored.
    """
    if shots != 0 and not training:
        raise ValueError(f"shots={shots} needs studies to learn from: expected annotated ones in the part 'train'.")
    if labels is None:
        found = {finding for study in evaluated for finding in study.findings}
        label_set = LabelSet(tuple(default_label(finding) for finding in FINDINGS if finding in found))
    else:
        label_set = _read_or_parse(labels)
    groups = group_numbers(training)
    names, skipped = [], {}
    for label in label_set.labels:
        truth = annotate(evaluated, label)
        counts = [int((truth == value).sum()) for value in (1, 0)]
        problem = None
        if not any(counts):
            problem = "not annotated in the evaluated studies"
        elif not all(counts):
            problem = f"one class only in the evaluated studies: {counts[0]} with it, {counts[1]} without"
        elif shots != 0:
            problem = learning_problem(annotate(training, label), groups, shots)
        if problem:
            skipped[label.name] = problem
        else:
            names.append(label.name)
    if not names:
        reasons = "; ".join(f"{name}: {problem}" for name, problem in skipped.items())
        raise ValueError(f"No label can be scored. {reasons}.")
    return label_set, names, skipped


def _read_or_parse(labels: str | Path | Sequence[str]) -> LabelSet:
    given = [labels] if isinstance(labels, str | Path) else list(labels)
    # A command line gives a list either way.
    if len(given) == 1 and Path(given[0]).suffix in YAML_SUFFIXES:
        return read_labels(given[0])
    return read_labels(labels) if isinstance(labels, str | Path) else parse_labels(given)


def annotate(studies: Sequence[Study], label: Label) -> np.ndarray:
    """Returns 1 (present), 0 (absent) or NaN (unknown) for each study, (N,)."""
    return np.array([(study.findings or {}).get(label.finding, np.nan) for study in studies], dtype=np.float64)


def find_finding(name: str) -> Finding:
    """Finds a finding by its canonical, English, Chinese or CheXpert name, or an alias, in any case.

    Raises:
        ValueError: If there is none; the message gives the nearest names.
    """
    names = _names()
    key = _folded(name)
    if key not in names:
        near = difflib.get_close_matches(key, names, n=2 * _MAX_SUGGESTIONS, cutoff=0.4)
        suggestions = list(dict.fromkeys(names[each] for each in near))[:_MAX_SUGGESTIONS] or list(FINDINGS)
        raise ValueError(f"{name!r} is not a known finding; expected for instance {', '.join(suggestions)}.")
    return finding_table()[names[key]]


def _parse_entry(name: Any, entry: Any) -> Label:
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"Expected the name of a finding, got {name!r}.")
    name = name.strip()
    entry = {} if entry is None else entry
    if not isinstance(entry, Mapping) or (unknown := sorted(set(map(str, entry)) - {"finding", *_PHRASES})):
        got = ", ".join(unknown) if isinstance(entry, Mapping) else type(entry).__name__
        raise ValueError(f"Label {name!r}: expected a mapping of finding, present and absent, got {got}.")
    given = entry.get("finding")
    if given is not None and not isinstance(given, str):
        raise ValueError(f"Label {name!r}: expected finding to be a name, got {given!r}.")
    finding = find_finding(name if given is None else given)
    phrases = {
        kind: _parse_phrases(name, kind, entry.get(kind), default_phrases(finding.key, kind)) for kind in _PHRASES
    }
    _refuse_contradiction(name, phrases)
    return Label(finding.key if given is None else name, finding.key, **phrases)


def _parse_phrases(
    name: str, kind: str, given: Any, defaults: Mapping[str, tuple[str, ...]]
) -> dict[str, tuple[str, ...]]:
    given = {} if given is None else given
    if not isinstance(given, Mapping) or (unknown := sorted(set(map(str, given)) - set(LANGUAGES))):
        got = ", ".join(unknown) if isinstance(given, Mapping) else type(given).__name__
        raise ValueError(f"Label {name!r}: expected {kind} to be a mapping of {', '.join(LANGUAGES)}, got {got}.")
    phrases = {}
    for language in LANGUAGES:
        texts = given.get(language, defaults[language])
        texts = [texts] if isinstance(texts, str) else texts
        if not isinstance(texts, Sequence) or not texts or not all(isinstance(t, str) and t.strip() for t in texts):
            raise ValueError(f"Label {name!r}: expected {kind}.{language} to be one phrase or more, got {texts!r}.")
        phrases[language] = tuple(dict.fromkeys(text.strip() for text in texts))
    return phrases


def _refuse_contradiction(name: str, phrases: Mapping[str, Mapping[str, tuple[str, ...]]]) -> None:
    stated, denied = ({_bare(text): text for texts in phrases[kind].values() for text in texts} for kind in _PHRASES)
    if both := [text for key, text in stated.items() if key in denied]:
        raise ValueError(f"Label {name!r}: the phrase {both[0]!r} stands in both present and absent.")


def _bare(text: str) -> str:
    return " ".join(text.casefold().split()).strip(" .。!！")


def _folded(name: str) -> str:
    return " ".join(name.casefold().replace("_", " ").split())


@cache
def _names() -> dict[str, str]:
    """Returns the canonical finding of every known name."""
    names: dict[str, str] = {}
    for key, entry in default_diagnosis().items():
        for name in (key, *entry["names"].values(), *entry["aliases"]):
            names.setdefault(_folded(name), key)
    return names


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that comes twice, of which YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Makes a dictionary of a mapping node."""
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := sorted({key for key in keys if keys.count(key) > 1}):
            raise ValueError(f"Expected each key once, got {', '.join(map(repr, twice))} more than once.")
        return super().construct_mapping(node, deep)
