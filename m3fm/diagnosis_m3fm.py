# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Zero-shot diagnosis: the labels of a checkpoint with the phrases that state and deny them, and how they are scored.

An image's embedding is compared with the mean embedding of a label's phrases in all languages; the probability is the
softmax of presence against absence (CheXzero: Tiu et al., Nature Biomedical Engineering 2022), or over labels that
exclude each other. A label's calibration then makes a probability of it that can be taken at its word (Platt 1999).

`config.diagnosis` of a checkpoint holds its labels, key to entry:

```json
"tuberculosis": {
  "names": {"en": "Pulmonary tuberculosis", "zh": "肺结核"},
  "aliases": ["TB", "结核"],
  "present": {"en": ["Findings are consistent with pulmonary tuberculosis."], "zh": ["考虑肺结核。"]},
  "absent": {"en": ["No evidence of tuberculosis."], "zh": ["未见肺结核征象。"]},
  "also_absent": ["no_finding"],
  "calibration": {"scale": 1.4, "bias": 0.2},
  "threshold": 0.41,
  "fitted_on": "..."
}
```

`also_absent` names labels whose presence says that this one is absent. `calibration` turns a logit into
`scale * logit + bias`; `threshold` is on the calibrated probability. Only `present` and `absent` are needed.

Letters in shapes: N studies, D width of the shared space, L labels.
"""

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

KINDS = ("present", "absent")
_ENTRY_KEYS = frozenset(
    {"names", "aliases", "present", "absent", "also_absent", "calibration", "threshold", "fitted_on"}
)
# What a user may say of a label; "finding" is the label of the checkpoint that it stands for.
_GIVEN_KEYS = frozenset({"finding", *KINDS})
_MAX_SUGGESTIONS = 3
# Rounding of float32 features depends on how they were batched. Below this resolution logits are noise: without
# rounding, equal images would be ranked by it.
LOGIT_DECIMALS = 4


@dataclass(frozen=True)
class DiagnosisLabel:
    """Hold one label to score.

    Attributes:
        name: As the user wrote it.
        key: The label of the checkpoint that it is, None for one that the user's own phrases describe.
        present: Phrases that state it, in all languages.
        absent: Phrases that deny it; may be none among labels that exclude each other.
        calibration: "scale" > 0 and "bias", None where there is none for these phrases.
        threshold: Calibrated probability from which on the label is called present, None where there is none.
        fitted_on: What calibration and threshold were fitted on.
    """

    name: str
    key: str | None
    present: tuple[str, ...]
    absent: tuple[str, ...]
    calibration: Mapping[str, float] | None = None
    threshold: float | None = None
    fitted_on: str | None = None


# --------------------------------------------------------------------------------------------------------------------
# The labels of a checkpoint


def check_diagnosis(table: Mapping[str, Any]) -> None:
    """Refuses a `config.diagnosis` that is not what the module describes.

    Raises:
        ValueError: Naming the label and what is wrong with it.
    """
    for key, entry in table.items():
        where = f"diagnosis[{key!r}]"
        if not isinstance(entry, Mapping) or (unknown := sorted(set(map(str, entry)) - _ENTRY_KEYS)):
            got = f"unknown {unknown}" if isinstance(entry, Mapping) else type(entry).__name__
            raise ValueError(f"{where} expected a mapping of {sorted(_ENTRY_KEYS)}, got {got}.")
        for kind in KINDS:
            phrases = entry.get(kind)
            if not isinstance(phrases, Mapping) or not phrases or not all(map(_are_texts, phrases.values())):
                raise ValueError(f"{where} expected {kind} to map languages to phrases, got {phrases!r}.")
        names = entry.get("names") or {}
        if not isinstance(names, Mapping) or not _are_texts([*names.values(), "text"]):
            raise ValueError(f"{where} expected names to map languages to a name, got {names!r}.")
        aliases = entry.get("aliases") or []
        if not isinstance(aliases, list | tuple) or not _are_texts([*aliases, "text"]):
            raise ValueError(f"{where} expected aliases to be a list of names, got {aliases!r}.")
        if missing := [other for other in entry.get("also_absent") or [] if other not in table or other == key]:
            raise ValueError(f"{where} expected also_absent to name other labels of the table, got {missing}.")
        _check_calibration(where, entry.get("calibration"), entry.get("threshold"))
    _names_of(table)


def _check_calibration(where: str, calibration: Any, threshold: Any) -> None:
    if calibration is not None:
        values = calibration if isinstance(calibration, Mapping) else {}
        if set(values) != {"scale", "bias"} or not all(map(_is_number, values.values())) or values["scale"] <= 0:
            raise ValueError(f"{where} expected calibration with a scale > 0 and a bias, got {calibration!r}.")
    if threshold is not None and not (_is_number(threshold) and 0 <= threshold <= 1):
        raise ValueError(f"{where} expected threshold to be a probability from 0 to 1, got {threshold!r}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and bool(np.isfinite(value))


def _are_texts(values: Any) -> bool:
    return isinstance(values, list | tuple) and bool(values) and all(isinstance(v, str) and v.strip() for v in values)


def label_phrases(table: Mapping[str, Any], key: str, kind: str) -> dict[str, tuple[str, ...]]:
    """Returns the phrases of a label by language, those that `also_absent` brings included.

    Args:
        table: As `config.diagnosis`.
        key: Of the label.
        kind: "present" or "absent".
    """
    entry = table[key]
    others = (entry.get("also_absent") or []) if kind == "absent" else []
    return {
        language: tuple(dict.fromkeys([*texts, *(t for other in others for t in _present(table, other, language))]))
        for language, texts in entry[kind].items()
    }


def _present(table: Mapping[str, Any], key: str, language: str) -> Sequence[str]:
    return table[key]["present"].get(language, ())


def find_label(table: Mapping[str, Any], name: str) -> str:
    """Returns the key of the label that has this key, name in a language, or alias, in any case.

    Raises:
        ValueError: If there is none; the message gives the nearest names.
    """
    names = _names_of(table)
    folded = _folded(name)
    if folded in names:
        return names[folded]
    near = difflib.get_close_matches(folded, names, n=3 * _MAX_SUGGESTIONS, cutoff=0.4)
    suggestions = list(dict.fromkeys(names[each] for each in near))[:_MAX_SUGGESTIONS] or list(table)
    known = f"expected for instance {', '.join(suggestions)}, or" if table else "the checkpoint has none: expected"
    raise ValueError(
        f"{name!r} is not a known label; {known} phrases that state and deny it: "
        '{label: {"present": [...], "absent": [...]}}.'
    )


def _names_of(table: Mapping[str, Any]) -> dict[str, str]:
    """Returns the key of every known name.

    Raises:
        ValueError: If a name belongs to two labels.
    """
    names: dict[str, str] = {}
    for key, entry in table.items():
        for name in (key, *(entry.get("names") or {}).values(), *(entry.get("aliases") or [])):
            if names.setdefault(_folded(name), key) != key:
                raise ValueError(f"The name {name!r} belongs to both {names[_folded(name)]!r} and {key!r}.")
    return names


def _folded(name: str) -> str:
    return " ".join(name.casefold().replace("_", " ").replace("-", " ").split())


# --------------------------------------------------------------------------------------------------------------------
# The labels of a call


def choose_candidates(
    candidates: str | Sequence[str] | Mapping[str, Any] | None, table: Mapping[str, Any], exclusive: bool = False
) -> list[DiagnosisLabel]:
    """Turns candidate labels into labels to score.

    Args:
        candidates: Names in any language, or a mapping of names to what they mean: None (the checkpoint's label of
            that name), `{"finding": name}`, and phrases `present` and `absent`, each a list or a mapping of languages
            to lists. Phrases that are left out are those of the checkpoint's label. None: the labels that the
            checkpoint has a calibration for.
        table: As `config.diagnosis`.
        exclusive: Whether each study has exactly one of them, so that they compete.

    Raises:
        ValueError: For an unknown label (the nearest names are given), one that comes twice, one without phrases, a
            phrase that both states and denies a label, or that states two of them.
    """
    if candidates is None:
        candidates = [key for key, entry in table.items() if entry.get("calibration")]
        if not candidates:
            raise ValueError("The checkpoint has no calibrated labels to take by default: expected candidate_labels.")
    if isinstance(candidates, str):
        candidates = [candidates]
    if not isinstance(candidates, Sequence | Mapping):
        raise ValueError(f"Expected candidate_labels to be names or a mapping, got {type(candidates).__name__}.")
    given = candidates if isinstance(candidates, Mapping) else None
    labels = [_candidate(name, given and given[name], table, exclusive) for name in candidates]
    if len(labels) < 1 + exclusive:
        needed = "two candidate labels that exclude each other" if exclusive else "a candidate label"
        raise ValueError(f"Expected {needed} or more, got {len(labels)}.")
    _refuse_duplicates(labels)
    return labels


def _candidate(name: Any, given: Any, table: Mapping[str, Any], exclusive: bool) -> DiagnosisLabel:
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"Expected a candidate label to be a name, got {name!r}.")
    given = {} if given is None else given
    if not isinstance(given, Mapping) or (unknown := sorted(set(map(str, given)) - _GIVEN_KEYS)):
        got = ", ".join(unknown) if isinstance(given, Mapping) else type(given).__name__
        raise ValueError(f"Label {name!r}: expected a mapping of finding, present and absent, got {got}.")
    own = {kind: _own_phrases(name, kind, given[kind]) for kind in KINDS if given.get(kind) is not None}
    finding = given.get("finding")
    if finding is not None and not isinstance(finding, str):
        raise ValueError(f"Label {name!r}: expected finding to be a name, got {finding!r}.")
    # Own phrases make a label of their own, whatever it is called.
    enough = "present" in own and (exclusive or "absent" in own)
    key = None
    if finding is not None or not enough:
        key = find_label(table, name if finding is None else finding)
    phrases = {kind: _all_phrases(own.get(kind), table, key, kind) for kind in KINDS}
    stated = {_bare(text): text for text in phrases["present"]}
    if both := [text for text in phrases["absent"] if _bare(text) in stated]:
        raise ValueError(f"Label {name!r}: the phrase {both[0]!r} stands in both present and absent.")
    fitted = table[key] if key is not None and not own else {}
    fits = ("calibration", "threshold", "fitted_on")
    return DiagnosisLabel(name.strip(), key, **phrases, **{field: fitted.get(field) for field in fits})


def _own_phrases(name: str, kind: str, given: Any) -> dict[str | None, list[str]]:
    """Returns a user's phrases by language, under None where they are not sorted by it."""
    by_language = given if isinstance(given, Mapping) else {None: given}
    phrases = {code: [texts] if isinstance(texts, str) else texts for code, texts in by_language.items()}
    if not phrases or not all(map(_are_texts, phrases.values())):
        raise ValueError(f"Label {name!r}: expected {kind} to be one phrase or more, got {given!r}.")
    return {code: [text.strip() for text in texts] for code, texts in phrases.items()}


def _all_phrases(
    own: Mapping[str | None, Sequence[str]] | None, table: Mapping[str, Any], key: str | None, kind: str
) -> tuple[str, ...]:
    """Returns the phrases of all languages; a language that the user says nothing in keeps the checkpoint's."""
    phrases = {} if key is None or (own is not None and None in own) else label_phrases(table, key, kind)
    phrases = {**phrases, **(own or {})}
    return tuple(dict.fromkeys(text for texts in phrases.values() for text in texts))


def _refuse_duplicates(labels: Sequence[DiagnosisLabel]) -> None:
    seen: dict[Any, str] = {}
    for label in labels:
        marks = {("name", _folded(label.name)), ("present", frozenset(map(_bare, label.present)))}
        marks |= {("key", label.key)} if label.key is not None else set()
        for mark in marks:
            if mark in seen:
                raise ValueError(f"Expected each label once, got {seen[mark]!r} and {label.name!r}.")
        seen |= dict.fromkeys(marks, label.name)


def _bare(text: str) -> str:
    return " ".join(text.casefold().split()).strip(" .。!！")


# --------------------------------------------------------------------------------------------------------------------
# Scores


def mean_phrases(phrases: Sequence[Sequence[str]], embed: Callable[[Sequence[str]], np.ndarray]) -> np.ndarray:
    """Embeds each label as the mean of its phrases.

    Args:
        phrases: Those of each of L labels; a label without any becomes a row of zeros.
        embed: Takes texts, returns (texts, D).

    Returns:
        (L, D) float64, unit norm.
    """
    texts = list(dict.fromkeys(text for each in phrases for text in each))
    rows = dict(zip(texts, _unit(np.asarray(embed(texts), dtype=np.float64)), strict=True)) if texts else {}
    width = len(next(iter(rows.values()))) if rows else 0
    return _unit(np.stack([np.mean([rows[t] for t in each], axis=0) if each else np.zeros(width) for each in phrases]))


def _unit(rows: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(rows, axis=-1, keepdims=True)
    return rows / np.where(norms == 0, 1, norms)


def zero_shot_logits(
    embeds: np.ndarray, present: np.ndarray, absent: np.ndarray, scale: float, exclusive: bool = False
) -> np.ndarray:
    """Returns the logit (N, L) that each label is present, rounded to what float32 embeddings support.

    Args:
        embeds: (N, D), of images: unit norm, or a weighted mean of such rows.
        present: (L, D), unit norm.
        absent: (L, D), unit norm; not looked at where labels exclude each other.
        scale: What cosines are multiplied by, the checkpoint's.
        exclusive: Whether labels compete with each other rather than each with its own absence.
    """
    embeds = np.asarray(embeds, dtype=np.float64)
    stated = scale * embeds @ present.T  # (N, L)
    if exclusive:
        # Of one label against the rest: the logit of its softmax.
        rest = [np.logaddexp.reduce(np.delete(stated, column, axis=1), axis=1) for column in range(len(present))]
        denied = np.stack(rest, axis=1)
    else:
        denied = scale * embeds @ absent.T
    return np.round(stated - denied, LOGIT_DECIMALS)


def logistic(logits: np.ndarray) -> np.ndarray:
    """Returns the probabilities of logits."""
    return 0.5 * (1 + np.tanh(np.asarray(logits, dtype=np.float64) / 2))


def calibrate_logits(logits: np.ndarray, calibration: Mapping[str, float] | None) -> np.ndarray:
    """Returns `scale * logits + bias`; logits as they are without a calibration. The order of studies stays."""
    return logits if calibration is None else calibration["scale"] * np.asarray(logits) + calibration["bias"]


__all__ = [
    "LOGIT_DECIMALS",
    "DiagnosisLabel",
    "calibrate_logits",
    "check_diagnosis",
    "choose_candidates",
    "find_label",
    "label_phrases",
    "logistic",
    "mean_phrases",
    "zero_shot_logits",
]
