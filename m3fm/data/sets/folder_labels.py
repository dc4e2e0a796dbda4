# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""What the labels of an own folder mean: a list of names, a mapping of names to states, or a column for each label.

A list says what is there; whether a name that is not in it is denied depends on the set whose names they are. A
mapping or columns say what is there, what is not and what is uncertain; the rest is unmentioned.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from functools import cache
from typing import Any

from ..label_cells import cell_state
from ..labels import (
    NO_FINDING,
    canonical_findings,
    label_column,
    label_names,
    missing_labels_mean_none,
    shared_findings,
)
from ..schema import LabelState
from ..tables import Row, shown

__all__ = ["LABEL_COLUMNS", "FolderLabels", "LabelSurvey", "finding_of"]

_CANONICAL = "canonical"
#: Sets of which a folder may be a part. Not all of `label_sources()`: what silence means in a folder must not change
#: with every set that is added.
_FOLDER_SOURCES = (
    "nih_chestxray14_sample",
    "openi_iu_reports",
    "ctrate_reports_text",
    "kermany_pneumonia_224",
    "tb_shenzhen_montgomery_128",
    "covid_chestxray",
    "cov_ctr",
    "covid_ct_md_slices",
    "covid_ct_md_volumes",
    "chexpert",
    "vindr",
    "rsna",
    "siim",
)
#: Columns that may hold lists of labels.
LABEL_COLUMNS = tuple(dict.fromkeys(map(label_column, (_CANONICAL, *_FOLDER_SOURCES))))

# More rows than this with a wrong label are no slips.
_NEARLY_ALL = 0.8

States = dict[str, LabelState]


@cache
def finding_of(name: str) -> str | None:
    """Return the finding that a name means: canonical, English, Chinese, CheXpert's or an alias, in any case."""
    # The names of findings come from a module that reads studies itself.
    from ...evaluation.label_file import find_finding

    try:
        return find_finding(name).key
    except ValueError:
        return None


def _nearest(name: str) -> str:
    near = difflib.get_close_matches(name, sorted(label_names(_CANONICAL)), n=1)
    return f"; the nearest is {near[0]!r}" if near else ""


class LabelSurvey:
    """Collect what labels a folder's rows use; `reader` then knows what they mean.

    Args:
        folder_name: Name of the folder; that of a known set tells what its labels mean.
    """

    def __init__(self, folder_name: str):
        self.folder_name = folder_name
        # Of each column, how many rows name these labels.
        self.named: dict[str, Counter[frozenset[str]]] = {column: Counter() for column in LABEL_COLUMNS}
        self.clean: Counter[frozenset[str]] = Counter()
        self.has_labels = False

    def add(self, row: Row) -> None:
        """Look at one row."""
        for column, counts in self.named.items():
            labels = row.values.get(column)
            self.has_labels |= labels is not None
            if isinstance(labels, list):
                names = frozenset(name for name in labels if isinstance(name, str))
                counts[names] += 1
                if _is_clean_slice(row):
                    self.clean[names] += column == label_column(_CANONICAL)

    def reader(self, columns: Iterable[str]) -> FolderLabels:
        """Return what reads the labels of the rows.

        Args:
            columns: Columns that may be a label each; taken where no row has a list or a mapping of labels.
        """
        source = self._source()
        denied: frozenset[str] = frozenset()
        if source == _CANONICAL:
            said = self.named[label_column(_CANONICAL)] - self.clean
            known = filter(None, (_known_name(name, _CANONICAL) for names in said for name in names))
            denied = frozenset(canonical_findings(known, _CANONICAL)) - {NO_FINDING}
        used = {name for names in self.named[label_column(source)] for name in names if _known_name(name, source)}
        names = used if source == _CANONICAL else label_names(source)
        wide = () if self.has_labels else tuple(column for column in columns if finding_of(column) is not None)
        return FolderLabels(source, denied, tuple(sorted(names)), wide)

    def _source(self) -> str:
        """Return the set whose conventions the rows follow: the folder's name, or else the set that has its labels.

        A part of a known set is often kept in a folder of another name. It is taken for one where a label used is the
        set's own: names that any folder may use tell nothing, and what silence means would be made up. Of several
        sets that have all the labels used, it is the one with the fewest others. Sets where silence says nothing are
        passed over; "canonical" where none is left. If some rows fit none of them, they are wrong: it is the set that
        nearly all fit.
        """
        if self.folder_name in (_CANONICAL, *_FOLDER_SOURCES):
            return self.folder_name
        fits = {
            source: self._fitting_rows(source) / max(1, self._named_rows(source))
            for source in (*_FOLDER_SOURCES, _CANONICAL)
            if source == _CANONICAL or (canonical_findings((), source) and self._uses_own_label(source))
        }
        for share in (1.0, _NEARLY_ALL):
            fitting = [(len(label_names(each)), each) for each in fits if each != _CANONICAL and fits[each] >= share]
            if fitting:
                return min(fitting)[1]
            if fits[_CANONICAL] == 1.0:
                break
        return _CANONICAL

    def _uses_own_label(self, source: str) -> bool:
        """Tell whether rows use a label of the set's own, in any case of letters, or the set has its own column."""
        if label_column(source) != label_column(_CANONICAL):
            return True
        common = {name.casefold() for name in label_names(_CANONICAL)}
        own = {name for name in label_names(source) if name.casefold() not in common}
        return any(names & own for names in self.named[label_column(source)])

    def _named_rows(self, source: str) -> int:
        return sum(count for names, count in self.named[label_column(source)].items() if names)

    def _fitting_rows(self, source: str) -> int:
        counts = self.named[label_column(source)]
        return sum(n for names, n in counts.items() if names and all(_known_name(name, source) for name in names))


def _is_clean_slice(row: Row) -> bool:
    """Tell of a slice that readers found clean: the patient's disease does not show on it."""
    return row.values.get("infected_slice") in (0, "0")


class FolderLabels:
    """Read the labels of a folder's rows.

    Args:
        source: Whose names lists have.
        denied: Findings that a list denies by not naming them, besides those of the source.
        names: Labels that lists may name or deny.
        wide: Columns that are a label each.
    """

    def __init__(self, source: str, denied: frozenset[str], names: tuple[str, ...], wide: tuple[str, ...]):
        self.source = source
        self.denied = denied
        self.names = names
        self.wide = wide
        self._silent = frozenset(canonical_findings((), source, denied)) | {NO_FINDING}

    def read(self, row: Row) -> tuple[States, States]:
        """Return the row's labels by their own names, and the findings they mean.

        Raises:
            BadRow: For a label that is not known, or a state that is none.
        """
        if _is_clean_slice(row):
            return {}, {}
        if self.wide:
            return self._read_states({column: row.values.get(column) for column in self.wide}, row)
        labels = row.values.get(label_column(self.source))
        if isinstance(labels, Mapping):
            return self._read_states(labels, row)
        if labels is None:
            if not missing_labels_mean_none(self.source):
                return {}, {}
            labels = []
        if not isinstance(labels, list):
            raise row.bad(
                "bad_label", f"labels must be a list of names or an object of names to states, got {_kind(labels)}"
            )
        return self._read_list(labels, row)

    def _read_list(self, labels: list[Any], row: Row) -> tuple[States, States]:
        if not all(isinstance(name, str) for name in labels):
            raise row.bad("bad_label", "labels must be a list of names")
        try:
            known = [_known_name(name, self.source) or name for name in labels]
            values = canonical_findings(known, self.source, self.denied)
        except ValueError as error:
            raise row.bad("bad_label", str(error)) from None
        findings = {name: LabelState.POSITIVE if value > 0 else LabelState.NEGATIVE for name, value in values.items()}
        own = dict.fromkeys(labels, LabelState.POSITIVE)
        for name in self.names:
            meant = _meant(name, self.source)
            denied = meant and all(f in self._silent and findings.get(f) is LabelState.NEGATIVE for f in meant)
            if name not in own and denied:
                own[name] = LabelState.NEGATIVE
        return own, findings

    def _read_states(self, labels: Mapping[str, Any], row: Row) -> tuple[States, States]:
        own: States = {}
        stated: dict[str, set[LabelState]] = {}
        for name, cell in labels.items():
            finding = finding_of(name)
            if finding is None:
                raise row.bad("bad_label", f"expected the name of a finding, got {shown(name)}{_nearest(name)}")
            try:
                own[name] = cell_state(cell)
            except ValueError as error:
                raise row.bad("bad_label", f"label {shown(name)}: {error}") from None
            stated.setdefault(finding, set()).add(own[name])
        # All names of a finding say the same, so that none is left open.
        told = {name: max(stated[f], key=_WEIGHT.index) for f in stated for name in _synonyms(f)}
        return own, shared_findings(told, _CANONICAL)


# Of two labels for one finding, the one that says more counts.
_WEIGHT = (LabelState.UNMENTIONED, LabelState.NEGATIVE, LabelState.UNCERTAIN, LabelState.POSITIVE)


@cache
def _known_name(label: str, source: str) -> str | None:
    """Return the name by which a source knows a label; a folder of no known set may use any name of a finding."""
    if label in label_names(source):
        return label
    return finding_of(label) if source == _CANONICAL else None


@cache
def _meant(label: str, source: str) -> frozenset[str]:
    """Return the findings that a known label says are there."""
    findings = canonical_findings([_known_name(label, source)], source)
    return frozenset(name for name, value in findings.items() if value > 0)


@cache
def _synonyms(finding: str) -> Collection[str]:
    return [name for name in label_names(_CANONICAL) if finding in _meant(name, _CANONICAL)]


def _kind(value: Any) -> str:
    return type(value).__name__
