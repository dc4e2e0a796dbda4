# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Sort the CT slices of a study into volumes, and choose the one that shows the chest.

Only headers are looked at. Millimetres and directions are those of the patient (DICOM PS3.3 C.7.6.2): x to the left,
y to posterior, z to superior. Slices run towards the positive end of the axis that they are stacked along, so axial
ones from inferior to superior, however the patient lay and however the scanner counted.
"""

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .chest_image_m3fm import Remark
from .dicom_m3fm import SliceHeader

# Closer than this is the same place: thinner slices are not made, and positions are written to 1/100 mm or so.
SAME_PLACE_MM = 0.05
# Direction cosines and spacings of one volume differ by rounding only.
_COSINE_TOLERANCE = 0.01
_SPACING_TOLERANCE = 0.01
# Scanners tilt their gantry up to 30 degrees: that is still an axial slice.
_AXIAL_DEGREES = 35.0
_SHIFT_DEGREES = 1.0
_STRONG_SHIFT_DEGREES = 15.0
# A step longer than this many usual ones has lost slices; one that is off by more than a tenth is uneven.
_GAP_STEPS = 1.5
_UNEVEN = 0.1
_MANY = 0.05
# From the lung apices to the costophrenic angles, and the length of a scan that goes on to the pelvis.
_CHEST_MM = 250.0
_LONG_MM = 500.0
# Scouts come one or two to a direction.
_FEW_SLICES = 4

_PLANES = ("sagittal", "coronal", "axial")


@dataclass(frozen=True, eq=False)
class Slice:
    """Hold one DICOM source with its header.

    Attributes:
        source: A path, or the bytes of the file.
        name: What errors call it.
        header: What its tags say.
        order: Its number among all that was given.
    """

    source: Any
    name: str
    header: SliceHeader
    order: int


@dataclass(frozen=True, eq=False)
class Stack:
    """Hold the slices of one volume, or one multi-frame file, in order.

    Attributes:
        slices: From inferior to superior (coronal: anterior to posterior, sagittal: right to left).
        step: Millimetres from one slice to the next, the median; None where unknown.
        extent: Millimetres that the volume covers; 0 where unknown.
        plane: "axial", "coronal", "sagittal", or None where no orientation is stated.
        remarks: Gaps, duplicates, a shift by a tilted gantry, unknown order. That slices are not axial is said by
            each of them (`read_dicom`).
    """

    slices: tuple[Slice, ...]
    step: float | None
    extent: float
    plane: str | None
    remarks: tuple[Remark, ...]

    @property
    def frames(self) -> int:
        """Count the slices."""
        return sum(entry.header.frames for entry in self.slices)


def chest_stack(slices: Sequence[Slice]) -> Stack:
    """Choose the volume of a study that shows the chest, and say what was left out.

    Series, orientations, matrix sizes, spacings and passes over the same places are volumes of their own. Axial ones
    come first, then those that cover more of a chest, original before derived ones, those that do not go on to the
    pelvis, thinner slices, more slices, the first pass and series by their numbers, and at last what was given first.

    Args:
        slices: CT slices of one patient, in any order, at least one.

    Returns:
        The volume, its remarks with those of the choice.
    """
    stacks = [_stacked(group) for group in _groups(slices)]
    scouts = _scouts(stacks)
    chosen = min((stack for stack in stacks if stack not in scouts), key=_rank)
    series = chosen.slices[0].header.series
    others = [stack for stack in stacks if stack is not chosen and stack not in scouts]
    same = [stack for stack in others if stack.slices[0].header.series == series]
    others = [stack for stack in others if stack.slices[0].header.series != series]
    remarks = []
    if scouts:
        remarks.append(localizers_left_out(sum(stack.frames for stack in scouts)))
    if same:
        count = sum(stack.frames for stack in same)
        reason = "another size, spacing or orientation, or another pass over the same places"
        severity = "warning" if count > chosen.frames else "info"
        remarks.append(
            Remark("other_series", f"{_counted(count, 'slice')} of the series left out: {reason}", severity, count)
        )
    if others:
        remarks.append(_others_left_out(chosen, others))
    return replace(chosen, remarks=(*chosen.remarks, *remarks))


def localizers_left_out(count: int) -> Remark:
    """Say that localizers were left out."""
    return Remark("localizer", f"localizer images left out: {count}", value=count)


def _others_left_out(chosen: Stack, others: list[Stack]) -> Remark:
    series = {stack.slices[0].header.series for stack in others}
    count = sum(stack.frames for stack in others)
    taken = f"{chosen.plane or 'unknown plane'}, {_counted(chosen.frames, 'slice')}"
    if chosen.step is not None:
        taken += f" every {chosen.step:.4g} mm"
    message = f"{len(series)} other series with {_counted(count, 'slice')} left out; taken: {taken}"
    return Remark("other_series", message, value=len(series))


def _rank(stack: Stack) -> tuple[Any, ...]:
    """Return what sorts the best volume first."""
    first = stack.slices[0].header
    covered = round(min(stack.extent, _CHEST_MM) / 10)  # a slice more or less does not decide
    return (
        stack.plane != "axial",
        -covered,
        any(entry.header.is_derived for entry in stack.slices),
        stack.extent > _LONG_MM,
        math.inf if stack.step is None else round(stack.step, 2),
        -stack.frames,
        *(number or 0 for number in (first.temporal_position, first.acquisition_number, first.series_number)),
        min(entry.order for entry in stack.slices),
    )


def _scouts(stacks: list[Stack]) -> list[Stack]:
    """Find the few slices of another direction that plan a scan, in a study that has a scan."""
    if not any(stack.plane == "axial" and stack.frames > _FEW_SLICES for stack in stacks):
        return []
    return [stack for stack in stacks if stack.plane not in ("axial", None) and stack.frames <= _FEW_SLICES]


# --------------------------------------------------------------------------------------------------------------------
# Groups


def _groups(slices: Iterable[Slice]) -> list[list[Slice]]:
    """Part slices into volumes, in the order of their first slices."""
    groups: dict[Hashable, list[list[Slice]]] = {}
    for entry in slices:
        header = entry.header
        file = entry.order if header.frames > 1 else None
        alike = groups.setdefault((header.series, header.rows, header.columns, file), [])
        for group in alike:
            if _same_grid(group[0].header, header):
                group.append(entry)
                break
        else:
            alike.append([entry])
    parts = [part for alike in groups.values() for group in alike for part in _passes(group)]
    return sorted(parts, key=lambda part: min(entry.order for entry in part))


def _same_grid(one: SliceHeader, other: SliceHeader) -> bool:
    pairs = (
        (one.orientation, other.orientation, _COSINE_TOLERANCE),
        (one.pixel_spacing, other.pixel_spacing, _SPACING_TOLERANCE),
    )
    for a, b, tolerance in pairs:
        if (a is None) != (b is None):
            return False
        if a is not None and any(abs(x - y) > tolerance for x, y in zip(a, b, strict=True)):
            return False
    return True


def _passes(group: list[Slice]) -> list[list[Slice]]:
    """Part several passes over the same places (phases, repeated acquisitions); a few doubles are no pass."""
    if len(group) < 1.5 * _places(group):
        return [group]
    for field in ("temporal_position", "acquisition_number"):
        parts: dict[Hashable, list[Slice]] = {}
        for entry in group:
            parts.setdefault(getattr(entry.header, field), []).append(entry)
        longest = max(map(len, parts.values()))
        if len(parts) > 1 and 2 * longest >= _places(group) and all(len(p) < 1.5 * _places(p) for p in parts.values()):
            return list(parts.values())
    return [group]


def _places(group: list[Slice]) -> int:
    """Count the different places of slices; slices without one have one each."""
    known = sorted(entry.header.position for entry in group if entry.header.position is not None)
    steps = [b - a for a, b in zip(known, known[1:], strict=False)]
    return len(group) - len(known) + bool(known) + sum(step > SAME_PLACE_MM for step in steps)


# --------------------------------------------------------------------------------------------------------------------
# One volume


def _stacked(group: list[Slice]) -> Stack:
    """Order the slices of one volume and measure it."""
    plane, sign = _plane(group[0].header.orientation)
    if len(group) == 1:
        step = group[0].header.slice_thickness
        return Stack(tuple(group), step, (step or 0.0) * group[0].header.frames, plane, ())
    remarks: list[Remark] = []
    placed = [entry for entry in group if entry.header.position is not None]
    if 2 * len(placed) < len(group) or (_places(placed) == 1 and len(_numbers(group)) == len(group) > 2):
        ordered = sorted(group, key=lambda entry: (_number(entry), entry.order))
        return Stack(tuple(ordered), None, 0.0, plane, (_by_number(len(group)),))
    if len(placed) < len(group):
        count = len(group) - len(placed)
        message = f"slices without a position left out: {count}"
        remarks.append(Remark("unreadable_slices", message, value=count))
    placed.sort(key=lambda entry: (sign * entry.header.position, entry.order))
    kept = _one_of_each(placed, sign)
    if len(kept) < len(placed):
        remarks.append(_duplicates(placed, len(placed) - len(kept)))
    places = [sign * entry.header.position for entry in kept]
    steps = [b - a for a, b in zip(places, places[1:], strict=False)]
    if not steps:
        step = kept[0].header.slice_thickness
        return Stack(tuple(kept), step, step or 0.0, plane, tuple(remarks))
    step = sorted(steps)[(len(steps) - 1) // 2]  # of two, the smaller: slices are missing, not added
    remarks += _step_remarks(steps, step) + _shift_remarks(kept[0].header, kept[-1].header)
    return Stack(tuple(kept), step, places[-1] - places[0] + step, plane, tuple(remarks))


def _plane(orientation: tuple[float, ...] | None) -> tuple[str | None, float]:
    """Return the plane nearest to the slices, and the sign of their normal along the axis that it is stacked by."""
    if orientation is None:
        return None, 1.0
    (a, b, c), (d, e, f) = orientation[:3], orientation[3:]
    normal = (b * f - c * e, c * d - a * f, a * e - b * d)
    is_axial = abs(normal[2]) >= math.cos(math.radians(_AXIAL_DEGREES))
    axis = 2 if is_axial else max(range(3), key=lambda i: abs(normal[i]))
    return _PLANES[axis], math.copysign(1.0, normal[axis])


def _one_of_each(placed: list[Slice], sign: float) -> list[Slice]:
    """Keep of slices at one place the original, then that with the lowest instance number, then the first given."""
    kept: list[Slice] = []
    start = -math.inf
    for entry in placed:
        place = sign * entry.header.position
        if place - start > SAME_PLACE_MM:
            kept.append(entry)
            start = place
        elif _preference(entry) < _preference(kept[-1]):
            kept[-1] = entry
    return kept


def _preference(entry: Slice) -> tuple[Any, ...]:
    return entry.header.is_derived, _number(entry), entry.order


def _number(entry: Slice) -> float:
    number = entry.header.instance_number
    return math.inf if number is None else number


def _numbers(group: list[Slice]) -> set[int]:
    return {entry.header.instance_number for entry in group} - {None}


# --------------------------------------------------------------------------------------------------------------------
# Remarks


def _counted(count: int, thing: str) -> str:
    """Write a number of things."""
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"


def _shift_remarks(first: SliceHeader, last: SliceHeader) -> list[Remark]:
    """Say that slices are shifted sideways, as those of a tilted gantry are."""
    if first.origin is None or last.origin is None:
        return []
    along = abs(last.position - first.position)
    degrees = math.degrees(math.acos(min(1.0, along / max(math.dist(first.origin, last.origin), along))))
    if degrees <= _SHIFT_DEGREES:
        return []
    message = f"slices shifted sideways by {degrees:.0f} degrees, as by a tilted gantry: not straightened"
    severity = "warning" if degrees > _STRONG_SHIFT_DEGREES else "info"
    return [Remark("oblique", message, severity, round(degrees, 1), _SHIFT_DEGREES)]


def _by_number(count: int) -> Remark:
    message = f"{count} slices do not state their places: ordered by instance number, the direction is not known"
    return Remark("assumed", message, "warning", count)


def _duplicates(placed: list[Slice], count: int) -> Remark:
    named = [entry.header.instance for entry in placed if entry.header.instance is not None]
    copies = len(named) - len(set(named))
    if copies == count:
        return Remark("duplicates", f"{_counted(count, 'slice')} left out that came twice", "info", count)
    message = f"{_counted(count, 'slice')} at the place of another left out: originals, then low numbers were kept"
    return Remark("duplicates", message, "warning" if count > _MANY * len(placed) else "info", count)


def _step_remarks(steps: list[float], step: float) -> list[Remark]:
    """Tell missing slices from uneven steps."""
    missing = sum(round(s / step) - 1 for s in steps if s > _GAP_STEPS * step)
    gaps = sum(s > _GAP_STEPS * step for s in steps)
    if missing:
        message = (
            f"{_counted(missing, 'slice')} missing in {_counted(gaps, 'gap')}, the widest {max(steps):.4g} mm; "
            f"usual step {step:.4g} mm"
        )
        severity = "warning" if missing > _MANY * (len(steps) + 1 + missing) else "info"
        return [Remark("gap", message, severity, missing)]
    off = max(abs(s - step) for s in steps)
    if off > max(_UNEVEN * step, SAME_PLACE_MM):
        message = f"steps between slices from {min(steps):.4g} to {max(steps):.4g} mm; usual step {step:.4g} mm"
        return [Remark("gap", message, "info", round(off, 3), round(_UNEVEN * step, 3))]
    return []


__all__ = ["SAME_PLACE_MM", "Slice", "Stack", "chest_stack", "localizers_left_out"]
