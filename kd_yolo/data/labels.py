"""Read YOLO label files and name every fault with its line."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

TOLERANCE = 0.01
"""Ultralytics accepts coordinates up to this far outside 0..1 and drops the whole image beyond."""
EDGE_TOLERANCE = 0.001
"""A box edge may lie this far outside the image before it is called outside: rounding to 4 decimals."""


@dataclass(frozen=True)
class Fault:
    """One thing wrong with a label file; ``line`` counts from 1, 0 is the file as a whole.

    Fatal faults make Ultralytics drop the image with all its boxes, or train on something that is no box.
    """

    kind: str
    line: int
    detail: str
    fatal: bool


@dataclass
class Labels:
    """Boxes of one image as (class, x center, y center, width, height), normalised, and what is wrong with the file."""

    boxes: list[tuple[int, float, float, float, float]] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    exists: bool = True


def read_labels(file: Path, nc: int, keypoint_columns: int = 0) -> Labels:
    """Read a label file of boxes (5 columns) or polygons (class and at least three points; its bounding box is taken).

    Args:
        file: The label file; a missing one means an image without any object.
        nc: Number of classes.
        keypoint_columns: Columns of keypoints after the box, of a pose data set.
    """
    labels = Labels()
    try:
        text = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        labels.exists = False
        return labels
    except (OSError, UnicodeDecodeError) as error:
        labels.faults.append(Fault("unreadable label file", 0, f"cannot be read ({error})", True))
        return labels
    rows = [(number, line.split()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if keypoint_columns:
        rows = [(n, row[:5] if len(row) == 5 + keypoint_columns else row) for n, row in rows]
    kinds = {len(row) > 6 for _, row in rows}
    if len(kinds) > 1:
        labels.faults.append(Fault("mixed rows", rows[0][0], "mixes boxes (5 columns) and polygons (7 or more)", True))
    seen: dict[tuple[float, ...], int] = {}
    for number, row in rows:
        values = _numbers(row, number, labels)
        if values is None:
            continue
        first = seen.setdefault(values, number)
        if first != number:
            labels.faults.append(Fault("duplicate box", number, f"the same as line {first}", False))
        elif _class_ok(values[0], number, nc, labels):
            _add_box(values, number, labels)
    return labels


def _numbers(row: list[str], number: int, labels: Labels) -> tuple[float, ...] | None:
    """Return a row's numbers, or None with a fault."""
    columns = len(row)
    if columns != 5 and (columns < 7 or columns % 2 == 0):
        detail = f"{columns} columns, but a box has 5: class x_center y_center width height"
        labels.faults.append(Fault("wrong columns", number, detail, True))
        return None
    try:
        values = tuple(float(value) for value in row)
    except ValueError:
        labels.faults.append(Fault("not a number", number, f"'{' '.join(row)}' holds text where numbers belong", True))
        return None
    if not all(math.isfinite(value) for value in values):
        labels.faults.append(Fault("not a number", number, f"'{' '.join(row)}' holds nan or inf", True))
        return None
    return values


def _class_ok(value: float, number: int, nc: int, labels: Labels) -> bool:
    if value != int(value):
        labels.faults.append(Fault("class id not whole", number, f"class id {value:g} is not a whole number", True))
        return False
    if not 0 <= value < nc:
        detail = f"class id {int(value)} is out of range: the data YAML names {nc} classes (0 to {nc - 1})"
        labels.faults.append(Fault("class id out of range", number, detail, True))
        return False
    return True


def _add_box(values: tuple[float, ...], number: int, labels: Labels) -> None:
    points = values[1:]
    if max(points) > 1 + TOLERANCE or min(points) < -TOLERANCE:
        far = max(points, key=lambda p: abs(p - 0.5))
        detail = (
            f"coordinate {far:g} is not within 0..1; divide x and width by the image width, y and height by its height"
        )
        labels.faults.append(Fault("coordinates not normalised", number, detail, True))
        return
    if len(points) == 4:
        x, y, w, h = points
    else:
        xs, ys = points[0::2], points[1::2]
        x, y = (min(xs) + max(xs)) / 2, (min(ys) + max(ys)) / 2
        w, h = max(xs) - min(xs), max(ys) - min(ys)
    if w <= 0 or h <= 0:
        detail = f"width {w:g} and height {h:g} must be above 0"
        labels.faults.append(Fault("degenerate box", number, detail, min(w, h) < 0))
        return
    over = max(w / 2 - x, h / 2 - y, x + w / 2 - 1, y + h / 2 - 1)
    if over > EDGE_TOLERANCE:
        labels.faults.append(
            Fault("box outside", number, f"reaches {over:.4f} of the image size over the border", False)
        )
    labels.boxes.append((int(values[0]), x, y, w, h))
