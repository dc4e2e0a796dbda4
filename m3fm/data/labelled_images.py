# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Bring labelled images of any common form into one: studies, folders, CSV files, `datasets.Dataset`, two lists.

Letters in shapes: N studies, L classes.
"""

import difflib
import os
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..evaluation.label_file import Label, LabelSet, annotate, default_label, find_finding, parse_labels, read_labels
from ..evaluation.runs import group_numbers
from .label_cells import cell_state
from .labels import FINDINGS
from .schema import LabelState
from .sets.folder_tables import LABEL_SEPARATOR, read_own_csv
from .studies import TRAINING_SPLIT, Study, load_studies, training_part
from .tables import Reading, Row, shown

__all__ = ["LabelledImages", "draw_studies", "read_labelled"]

IMAGE_COLUMNS, LABEL_COLUMNS, GROUP_COLUMNS = ("image", "images"), ("label", "labels"), ("patient_id", "group")
_FILE_COLUMN, _CSV_NAMES = "file_name", ("metadata.csv", "labels.csv")
_NOT_LABELS = frozenset({_FILE_COLUMN, *GROUP_COLUMNS, "study_id", "split", "modality", "view", "age", "sex"})
_VALUES = {LabelState.POSITIVE: 1.0, LabelState.NEGATIVE: 0.0}
# Folders of two classes are often called so; the finding space says "no finding".
_NO_FINDING_NAMES = frozenset({"normal", "healthy", "正常"})


@dataclass(frozen=True)
class LabelledImages:
    """Hold studies and what is known of them.

    Attributes:
        images: The sources of each study's images.
        targets: (N, L), 1 present, 0 absent, NaN unknown.
        classes: L names, in the order of the columns.
        exclusive: Whether each study has exactly one of the classes.
        groups: (N,), number of each study's patient.
        findings: L labels of the finding space, None where a class is not in it.
    """

    images: Sequence[Sequence[Any]] = field(repr=False)
    targets: np.ndarray = field(repr=False)
    classes: tuple[str, ...]
    exclusive: bool
    groups: np.ndarray = field(repr=False)
    findings: tuple[Label | None, ...]

    def take(self, places: np.ndarray, targets: np.ndarray | None = None) -> "LabelledImages":
        """Return the studies at `places`, with other targets where given."""
        chosen = self.targets[places] if targets is None else targets
        return replace(self, images=_Chosen(self.images, places), targets=chosen, groups=self.groups[places])


def read_labelled(
    dataset: Any,
    labels: str | Path | Sequence[str] | Mapping[str, Any] | None = None,
    groups: Sequence[Hashable] | None = None,
    exclusive: bool | None = None,
) -> LabelledImages:
    """Read labelled images; studies whose labels are all unknown are left out.

    Args:
        dataset: A list of `Study`; a data folder; a CSV file with `file_name` and `label` (several separated by "|"),
            or a column of 0, 1 or nothing for each label, and optionally `patient_id`; a folder that holds such a
            `metadata.csv`; a `datasets.Dataset` with `image` and `label`; or a tuple (images, labels). A label is a
            name, a list of names, or a mapping of names to 1, 0 or None; None is unknown.
        labels: Classes to learn, in this order, as names, or as a label file (see `m3fm.evaluation.label_file`) or its
            content; None: all that the data knows.
        groups: The patient of each study; None: what the data says, or else each study its own.
        exclusive: Whether each study has exactly one class; None: where labels are single names, or where all findings
            of all `Study` are known and each has exactly one.

    Raises:
        ValueError: If the data is not of such a form, a class is unknown or comes twice, or an image comes twice.
    """
    label_set = _label_set(labels)
    if isinstance(dataset, str | os.PathLike):
        read = _read_path(Path(dataset), label_set)
    elif isinstance(dataset, tuple) and len(dataset) == 2:
        read = _read_lists(*dataset, label_set)
    elif hasattr(dataset, "column_names") and hasattr(dataset, "features"):
        read = _read_columns(dataset, label_set)
    elif isinstance(dataset, Sequence) and len(dataset) and all(isinstance(each, Study) for each in dataset):
        read = _read_studies(dataset, label_set)
    else:
        raise ValueError(
            "Expected a list of Study, a data folder, a CSV file, a datasets.Dataset or a tuple (images, labels), "
            f"got {type(dataset).__name__}."
        )
    if groups is not None:
        if len(groups) != len(read.images):
            raise ValueError(f"Expected a group for each of {len(read.images)} studies, got {len(groups)}.")
        read = replace(read, groups=_number(groups))
    _refuse_repeated_images(read.images)
    known = ~np.isnan(read.targets)
    exclusive = read.exclusive if exclusive is None else exclusive
    if exclusive:
        # An exclusive class is known where one is present, even if others are not annotated.
        present = (read.targets == 1).sum(axis=1)
        if (present > 1).any() or ((present == 0) & known.all(axis=1)).any():
            raise ValueError(
                "Expected each study to have exactly one of the exclusive classes, got studies with none or several."
            )
        kept = np.flatnonzero(present == 1)
    else:
        kept = np.flatnonzero(known.any(axis=1))
    if not len(kept):
        raise ValueError("Expected studies with known labels, got none.")
    targets = (read.targets[kept] == 1).astype(np.float64) if exclusive else read.targets[kept]
    return replace(read.take(kept, targets), exclusive=exclusive)


def draw_studies(data: LabelledImages, shots: int, seed: int) -> LabelledImages:
    """Draw as many studies of each class, each of a class from another patient.

    Of labels that do not exclude each other, every label has its own studies with it and without it; what is known of
    a study beyond the label it was drawn for is not used.

    Args:
        data: Studies to draw from.
        shots: Studies of each class.
        seed: Of the draw.

    Raises:
        ValueError: If a class has fewer patients than `shots`.
    """
    generator = np.random.default_rng(seed)
    drawn, too_few = np.full(data.targets.shape, np.nan), []
    for column, name in enumerate(data.classes):
        for value in (1,) if data.exclusive else (1, 0):
            places = generator.permutation(np.flatnonzero(data.targets[:, column] == value))
            firsts = np.sort(np.unique(data.groups[places], return_index=True)[1])
            if len(firsts) < shots:
                without = "" if value else " without it"
                too_few.append(f"{name!r}{without}: {len(firsts)} patients")
                continue
            chosen = places[firsts[:shots]]
            drawn[chosen, column] = value
            if data.exclusive:
                drawn[chosen] = data.targets[chosen]
    if too_few:
        raise ValueError(f"{shots} shots a class are more than there are. {'; '.join(too_few)}.")
    places = np.flatnonzero(~np.isnan(drawn).all(axis=1))
    return data.take(places, drawn[places])


# --------------------------------------------------------------------------------------------------------------------
# Forms of data


class _Chosen(Sequence):
    """Some studies of others, each taken when it is asked for."""

    def __init__(self, images: Sequence[Sequence[Any]], places: np.ndarray):
        self.images = images
        self.places = places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, place: int) -> Sequence[Any]:
        return self.images[int(self.places[place])]


class _DatasetImages(Sequence):
    """Opens an image of a `datasets.Dataset` when it is asked for: all of them need not be in memory."""

    def __init__(self, dataset: Any, column: str):
        self.dataset = dataset
        self.column = column

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, place: int) -> list[Any]:
        image = self.dataset[place][self.column]
        return list(image) if isinstance(image, list | tuple) else [image]


def _read_path(path: Path, label_set: LabelSet | Sequence[str] | None) -> LabelledImages:
    if path.is_dir():
        table = next((path / name for name in _CSV_NAMES if (path / name).is_file()), None)
        if table is None:
            return _read_studies(training_part(load_studies(path)), label_set)
        path = table
    if not path.is_file():
        raise ValueError(f"{path}: no such data folder or CSV file.")
    rows = list(read_own_csv(path, Reading(), (_FILE_COLUMN,)))
    if not rows:
        raise ValueError(f"{path}: expected rows with labels, got none.")
    columns = list(rows[0].values)
    # Validation and test parts are not learned from.
    rows = [row for row in rows if row.get("split") in (None, TRAINING_SPLIT)]
    images = [path.parent / (row.get(_FILE_COLUMN) or "") for row in rows]
    if missing := [row.line for row, image in zip(rows, images, strict=True) if not image.is_file()]:
        raise ValueError(f"{path}: {len(missing)} rows name a file that does not exist; the first: line {missing[0]}.")
    label_column = next((name for name in LABEL_COLUMNS if name in columns), None)
    if label_column is None:
        values = [_states(row, columns) for row in rows]
    else:
        cells = [row.get(label_column) or "" for row in rows]
        several = any(LABEL_SEPARATOR in cell for cell in cells)
        values = [_split_cell(cell) if several else cell or None for cell in cells]
    read = _read_lists(images, values, label_set)
    group_column = next((name for name in GROUP_COLUMNS if name in columns), None)
    if group_column is None:
        return read
    groups = [row.get(group_column) or ("row", number) for number, row in enumerate(rows)]
    return replace(read, groups=_number(groups))


def _states(row: Row, columns: Sequence[str]) -> dict[str, float]:
    values = {}
    for name in columns:
        if name in _NOT_LABELS:
            continue
        try:
            values[name] = _VALUES.get(cell_state(row.values[name]), np.nan)
        except ValueError as error:
            raise row.bad(
                "bad_label", f"without a column 'label' every other column is a label, {shown(name)} too: {error}"
            ) from None
    return values


def _split_cell(cell: str) -> list[str] | None:
    return [name.strip() for name in cell.split(LABEL_SEPARATOR) if name.strip()] or None


def _read_columns(dataset: Any, label_set: LabelSet | Sequence[str] | None) -> LabelledImages:
    names = list(dataset.column_names)
    image, label = (next((n for n in known if n in names), None) for known in (IMAGE_COLUMNS, LABEL_COLUMNS))
    if image is None or label is None:
        raise ValueError(f"Expected a dataset with the columns 'image' and 'label', got {names}.")
    feature = dataset.features[label]
    coded = feature if hasattr(feature, "int2str") else getattr(feature, "feature", None)
    values = list(dataset[label])
    if hasattr(coded, "int2str"):
        values = [_decode(value, coded) for value in values]
    read = _read_lists(_DatasetImages(dataset, image), values, label_set)
    group = next((name for name in GROUP_COLUMNS if name in names), None)
    return read if group is None else replace(read, groups=_number(list(dataset[group])))


def _decode(value: Any, feature: Any) -> Any:
    if isinstance(value, list):
        return [feature.int2str(int(each)) for each in value]
    return None if value is None or value == -1 else feature.int2str(int(value))


def _read_lists(
    images: Sequence[Any], values: Sequence[Any], label_set: LabelSet | Sequence[str] | None
) -> LabelledImages:
    if len(images) != len(values):
        raise ValueError(f"Expected as many images as labels, got {len(images)} and {len(values)}.")
    if not len(images):
        raise ValueError("Expected labelled images, got none.")
    rows = [_row(value, number) for number, value in enumerate(values)]
    known = list(dict.fromkeys(name for row in rows if row is not None for name in row))
    names = sorted(known)
    if label_set is not None:
        names = [label.name for label in label_set.labels] if isinstance(label_set, LabelSet) else list(label_set)
        for name in names:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=3, cutoff=0.0)
                raise ValueError(
                    f"No study is labelled {name!r}; the nearest labels are {', '.join(map(shown, near))}."
                )
    single = all(isinstance(value, str) or value is None or value != value for value in values)
    mappings = any(isinstance(value, Mapping) for value in values)
    targets = np.full((len(rows), len(names)), np.nan)
    for place, row in enumerate(rows):
        # A row of single names or lists denies what it does not name; a mapping says what it knows.
        if row is not None and (not single or any(name in names for name in row)):
            targets[place] = [row.get(name, np.nan if mappings else 0.0) for name in names]
    findings = label_set.labels if isinstance(label_set, LabelSet) else tuple(map(_finding_of, names))
    sources = images if isinstance(images, _DatasetImages) else [_sources(image) for image in images]
    exclusive = single and len(names) > 1
    return LabelledImages(sources, targets, tuple(names), exclusive, np.arange(len(rows)), findings)


def _row(value: Any, number: int) -> dict[str, float] | None:
    """Return what one label says, by name; None for an unknown one."""
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return None
    if isinstance(value, str):
        return {value: 1.0}
    if isinstance(value, Mapping):
        row = {str(name): np.nan if known is None else float(known) for name, known in value.items()}
        if not all(known in (0.0, 1.0) or np.isnan(known) for known in row.values()):
            raise ValueError(f"Label {number}: expected 1, 0 or None for each name, got {sorted(set(row.values()))}.")
        return row
    if isinstance(value, list | tuple | set | frozenset) and all(isinstance(name, str) for name in value):
        if len(set(value)) < len(value):
            raise ValueError(f"Label {number}: expected each name once, got {', '.join(map(shown, sorted(value)))}.")
        return dict.fromkeys(value, 1.0)
    raise ValueError(
        f"Label {number}: expected a name, a list of names, a mapping of names to 1, 0 or None, or None; got "
        f"{type(value).__name__}."
    )


def _read_studies(studies: Sequence[Study], label_set: LabelSet | Sequence[str] | None) -> LabelledImages:
    studies = [study for study in studies if study.images and study.findings]
    if not studies:
        raise ValueError("Expected studies with images and findings in the training part, got none.")
    if label_set is None:
        found = {name for study in studies for name in study.findings}
        chosen = [default_label(name) for name in FINDINGS if name in found]
        # What the data says of all studies alike cannot be learned, and was not asked for.
        chosen = [label for label in chosen if {0.0, 1.0} <= set(annotate(studies, label))]
    else:
        chosen = list(label_set.labels if isinstance(label_set, LabelSet) else parse_labels(list(label_set)).labels)
    if not chosen:
        raise ValueError("Expected a finding that some studies have and others do not, got none.")
    targets = np.stack([annotate(studies, label) for label in chosen], axis=1)  # (N, L)
    for column, label in enumerate(chosen):
        if np.isnan(targets[:, column]).all():
            found = sorted({name for study in studies for name in study.findings})
            near = difflib.get_close_matches(label.finding, found, n=3, cutoff=0.0)
            raise ValueError(f"No study is annotated for {label.name!r}; the nearest labels are {', '.join(near)}.")
    return LabelledImages(
        images=[list(study.images) for study in studies],
        targets=targets,
        classes=tuple(label.name for label in chosen),
        # Where something is unknown the sum is NaN.
        exclusive=len(chosen) > 1 and bool((targets.sum(axis=1) == 1).all()),
        groups=np.asarray(group_numbers(studies)),
        findings=tuple(chosen),
    )


# --------------------------------------------------------------------------------------------------------------------
# Parts


def _label_set(labels: Any) -> LabelSet | Sequence[str] | None:
    if labels is None:
        return None
    if isinstance(labels, str | os.PathLike):
        return read_labels(labels)
    if isinstance(labels, Mapping):
        return parse_labels(labels)
    names = list(labels)
    if not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"Expected labels to be names, a mapping or a label file, got {labels!r}.")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"Expected each label once, got {', '.join(map(repr, twice))} more than once.")
    return names


def _finding_of(name: str) -> Label | None:
    """Return the label of the finding space that a class is called by, if any."""
    known = "no_finding" if name.strip().casefold() in _NO_FINDING_NAMES else name
    try:
        finding = find_finding(known).key
    except ValueError:
        return None
    return replace(default_label(finding), name=name)


def _sources(image: Any) -> list[Any]:
    return list(image) if isinstance(image, list | tuple) else [image]


def _number(groups: Sequence[Hashable]) -> np.ndarray:
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(group, len(numbers)) for group in groups], dtype=np.int64)


def _refuse_repeated_images(images: Sequence[Sequence[Any]]) -> None:
    """Refuse a file that stands in two studies: it would be learned from and tested on."""
    if isinstance(images, _DatasetImages):
        return
    first: dict[str, int] = {}
    for number, sources in enumerate(images):
        for source in sources:
            if isinstance(source, str | os.PathLike):
                earlier = first.setdefault(os.path.abspath(source), number)
                if earlier != number:
                    raise ValueError(f"Expected each image once, got the one of study {earlier} again in {number}.")
