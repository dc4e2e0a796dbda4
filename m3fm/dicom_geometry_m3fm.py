# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Where a DICOM image lies in the patient: how to turn it for display, the order of frames, and spacing.

Directions are those of DICOM PS3.3 C.7.6.2, in mm: x to the patient's left, y to posterior, z to superior. Letters:
S frames, H rows, W columns.
"""

from dataclasses import dataclass

import numpy as np

from .chest_image_m3fm import Remark
from .dicom_tags_m3fm import Tags

# PatientOrientation (PS3.3 C.7.6.1.1.1): axis and sign of each letter.
_LETTERS = {"L": (0, 1), "R": (0, -1), "P": (1, 1), "A": (1, -1), "H": (2, 1), "F": (2, -1)}
# Axis and sign along rows and down columns that radiological display wants, by the axis looked along. Sagittal images
# and lateral radiographs are shown either way round: their rows keep their direction.
_DISPLAY = {
    2: ((0, 1), (1, 1)),  # axial: patient's right at the left, anterior at the top
    1: ((0, 1), (2, -1)),  # frontal: patient's right at the left, head at the top
    0: ((1, 0), (2, -1)),  # sagittal: head at the top
}
_PLANES = {2: "axial", 1: "coronal", 0: "sagittal"}

# Gantries tilt by up to 30 degrees; from here on slices look different.
_TILTED_DEGREES = 5.0
_AXIAL_DEGREES = 35.0
# Rounding in cosines and positions, which are written with a few decimals.
_COSINE_TOLERANCE = 0.05
_SAME_PLACE_MM = 0.05
_UNEVEN = 0.1


@dataclass(frozen=True)
class Turn:
    """Turn an image by exchanging rows and columns, then by flips; all False leaves it.

    Attributes:
        transpose: Exchange rows and columns first.
        flip_rows: Turn upside down.
        flip_columns: Mirror left and right.
    """

    transpose: bool = False
    flip_rows: bool = False
    flip_columns: bool = False

    def __bool__(self) -> bool:
        return self.transpose or self.flip_rows or self.flip_columns

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """Turn (H, W), or (W, H) if transposed."""
        pixels = pixels.T if self.transpose else pixels
        return pixels[:: -1 if self.flip_rows else 1, :: -1 if self.flip_columns else 1]

    def spacing(self, rows: float, columns: float) -> tuple[float, float]:
        """Turn the spacing of rows and columns."""
        return (columns, rows) if self.transpose else (rows, columns)


def orientation_of(tags: Tags, frame: int = 0) -> tuple[float, ...] | None:
    """Return the direction cosines along a row and down a column, or None where absent or implausible."""
    cosines = _frame_numbers(tags, frame, "PlaneOrientationSequence", "ImageOrientationPatient")
    if len(cosines) != 6:
        return None
    row, column = np.array(cosines[:3]), np.array(cosines[3:])
    lengths = np.array([np.linalg.norm(row), np.linalg.norm(column)])
    if np.abs(lengths - 1).max() > _COSINE_TOLERANCE or abs(row @ column) > _COSINE_TOLERANCE:
        return None
    return cosines


def states_orientation(tags: Tags) -> bool:
    """Tell whether there is an ImageOrientationPatient at all, plausible or not."""
    return bool(_frame_numbers(tags, 0, "PlaneOrientationSequence", "ImageOrientationPatient"))


def position_of(tags: Tags, frame: int = 0) -> float | None:
    """Return where a frame lies along its normal, the cross product of its row and column directions, in mm."""
    origin = _frame_numbers(tags, frame, "PlanePositionSequence", "ImagePositionPatient")
    orientation = orientation_of(tags, frame)
    if len(origin) != 3 or orientation is None:
        return None
    return float(np.cross(orientation[:3], orientation[3:]) @ np.array(origin))


def turn_of_slices(orientation: tuple[float, ...]) -> Turn:
    """Return how to show slices with these direction cosines."""
    row, column = np.array(orientation[:3]), np.array(orientation[3:])
    row_axis, column_axis = int(np.argmax(np.abs(row))), int(np.argmax(np.abs(column)))
    if row_axis == column_axis:  # 45 degrees: the smaller of the two errors
        column_axis = int(np.argsort(np.abs(column))[1])
    return _turn((row_axis, int(np.sign(row[row_axis]))), (column_axis, int(np.sign(column[column_axis]))))


def oblique_remarks(orientation: tuple[float, ...]) -> list[Remark]:
    """Say that slices are not axial, or are tilted."""
    normal = np.cross(orientation[:3], orientation[3:])
    degrees = float(np.degrees(np.arccos(np.clip(abs(normal[2]) / np.linalg.norm(normal), 0, 1))))
    if degrees <= _TILTED_DEGREES:
        return []
    if degrees <= _AXIAL_DEGREES:
        message = f"slices tilted by {degrees:.0f} degrees"
        return [Remark("oblique", message, "info", round(degrees, 1), _TILTED_DEGREES)]
    plane = _PLANES[int(np.argmax(np.abs(normal)))]
    message = f"slices nearest to {plane}, {degrees:.0f} degrees from axial"
    return [Remark("oblique", message, "warning", round(degrees, 1), _AXIAL_DEGREES)]


def turn_of_letters(tags: Tags, expected_axes: tuple[int, ...], keeps_sides: bool) -> tuple[Turn, int | None, bool]:
    """Return how to show an image by its PatientOrientation.

    Args:
        tags: The file's.
        expected_axes: Which axes the image may look along (0 x, 1 y, 2 z); another is implausible.
        keeps_sides: Never mirror left and right.

    Returns:
        The turn; the axis looked along, None where not stated; and whether the statement is implausible.
    """
    words = [word for word in tags.words("PatientOrientation") if word]
    if not words:
        return Turn(), None, False
    directions = [_LETTERS.get(word[0]) for word in words]
    if len(directions) != 2 or None in directions or directions[0][0] == directions[1][0]:
        return Turn(), None, True
    axis = 3 - directions[0][0] - directions[1][0]
    if axis not in expected_axes:
        return Turn(), axis, True
    turn = _turn(*directions)
    return Turn(turn.transpose, turn.flip_rows, turn.flip_columns and not keeps_sides), axis, False


def frame_order(tags: Tags, frames: int) -> tuple[np.ndarray, float | None, list[Remark]]:
    """Order the frames of a file along their normal, inferior to superior where axial.

    Args:
        tags: The file's, with functional groups.
        frames: How many frames there are.

    Returns:
        The numbers of the frames in order, (S,), one for each place; the median step in mm; and remarks.
    """
    as_stored = np.arange(frames)
    normal = orientation_of(tags)
    # A place that the file states once, for all frames, orders nothing.
    groups = tags.items("PerFrameFunctionalGroupsSequence")[:frames]
    placed = [group.item("PlanePositionSequence").numbers("ImagePositionPatient") for group in groups]
    positions = [position_of(tags, frame) if place else None for frame, place in enumerate(placed)]
    positions += [None] * (frames - len(positions))
    if normal is None or None in positions:
        message = f"{frames} frames do not state their places: taken as slices in the order of the file"
        return as_stored, None, [Remark("frames_as_slices", message, "info", frames)]
    if any(np.abs(np.subtract(orientation_of(tags, frame), normal)).max() > _COSINE_TOLERANCE for frame in as_stored):
        message = f"{frames} frames lie in different planes: taken as slices in the order of the file"
        return as_stored, None, [Remark("frames_as_slices", message, "warning", frames)]
    across = np.cross(normal[:3], normal[3:])
    places = np.array(positions) * np.sign(across[np.argmax(np.abs(across))])
    order = np.argsort(places, kind="stable")
    steps = np.diff(places[order])
    kept = order[np.concatenate([[True], steps > _SAME_PLACE_MM])]
    remarks = [Remark("frames_as_slices", f"{frames} frames taken as slices, ordered by place", "info", frames)]
    if len(kept) < frames:
        message = f"{frames - len(kept)} of {frames} frames lie where another does: the first of each was kept"
        remarks.append(Remark("duplicates", message, "warning", frames - len(kept)))
    if len(kept) < 2:
        return kept, None, remarks
    steps = np.diff(places[kept])
    step = float(np.median(steps))
    if np.abs(steps - step).max() > _UNEVEN * step:
        message = f"frames are unevenly spaced: from {steps.min():.2f} to {steps.max():.2f} mm"
        remarks.append(Remark("gap", message, "warning", round(float(steps.max()), 2), round(step, 2)))
    return kept, step, remarks


def spacing_of(tags: Tags, step: float | None = None) -> tuple[float, float, float] | None:
    """Return the millimetres between slices, rows and columns, as stored; None where pixels state none.

    Args:
        tags: The file's.
        step: Millimetres between slices, where measured; otherwise it is SpacingBetweenSlices, then SliceThickness,
            then 0, which stands for an image without depth.
    """
    measures = [_frame_numbers(tags, 0, "PixelMeasuresSequence", "PixelSpacing")]
    measures += [tags.numbers("ImagerPixelSpacing"), tags.numbers("NominalScannedPixelSpacing")]
    plane = next((pair for pair in measures if len(pair) == 2 and min(pair) > 0), None)
    if plane is None:
        return None
    stated = [
        _frame_numbers(tags, 0, "PixelMeasuresSequence", keyword)
        for keyword in ("SpacingBetweenSlices", "SliceThickness")
    ]
    between = step or next((abs(value[0]) for value in stated if value and value[0]), 0.0)
    return between, *plane


def thickness_of(tags: Tags) -> float | None:
    """Return SliceThickness in mm, or None."""
    return next(iter(_frame_numbers(tags, 0, "PixelMeasuresSequence", "SliceThickness")), None)


def frame_item(tags: Tags, frame: int, sequence: str) -> Tags:
    """Return the first item of a functional group: that of the frame, or the shared one, or an empty one."""
    per_frame = tags.items("PerFrameFunctionalGroupsSequence")
    if frame < len(per_frame) and per_frame[frame].items(sequence):
        return per_frame[frame].item(sequence)
    return tags.item("SharedFunctionalGroupsSequence").item(sequence)


def _frame_numbers(tags: Tags, frame: int, sequence: str, keyword: str) -> tuple[float, ...]:
    return frame_item(tags, frame, sequence).numbers(keyword) or tags.numbers(keyword)


def _turn(row: tuple[int, int], column: tuple[int, int]) -> Turn:
    """Find the turn that brings the directions along rows and down columns to those of the display."""
    wanted_row, wanted_column = _DISPLAY[3 - row[0] - column[0]]
    transpose = row[0] != wanted_row[0]
    if transpose:
        row, column = column, row
    return Turn(transpose, column[1] == -wanted_column[1], wanted_row[1] != 0 and row[1] == -wanted_row[1])


def remark_of(turn: Turn) -> list[Remark]:
    """Say what was turned."""
    done = [
        text
        for is_done, text in (
            (turn.transpose, "rows and columns exchanged"),
            (turn.flip_rows, "turned upside down"),
            (turn.flip_columns, "left and right mirrored"),
        )
        if is_done
    ]
    return [Remark("reoriented", f"brought to radiological display: {', '.join(done)}")] if done else []
