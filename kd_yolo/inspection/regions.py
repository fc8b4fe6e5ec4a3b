"""Regions of an anomaly map: connected pixels above the threshold, and what explains them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from kd_yolo.anomaly.calibration import Calibration

Box = tuple[float, float, float, float]
CELL_PX = 4
"""Side of a cell of the finest usual level: a region with less than a cell is no more than interpolation."""
MARGIN = 1 / 32
"""How far a detection's box reaches, as a share of the canvas: 8 of 256 pixels, two standard deviations of the blur."""


@dataclass(frozen=True)
class Region:
    """Connected pixels of a map above the pixel threshold.

    Attributes:
        box: Left, top, right, bottom, pixels of the image.
        area: Pixels of the image, rounded.
        peak: Largest value of the map.
        confidence: The peak on the scale of the image score, 0..1; above 0.5 it alone makes the image anomalous.
        number: Value of its pixels in the label image of ``find_regions``.
    """

    box: Box
    area: int
    peak: float
    confidence: float
    number: int


def find_regions(
    anomaly_map: NDArray[np.float32],
    calibration: Calibration,
    shape: tuple[int, int],
    conf: float = 0.5,
    min_area: float | None = None,
) -> tuple[list[Region], NDArray[np.int32]]:
    """Return the 8-connected regions above the pixel threshold, the highest peak first.

    Two thresholds, as in Canny's edges: a region's extent is where the map passes the pixel threshold, and it counts
    when its peak reaches ``conf``, which at 0.5 is the image threshold. So an image that is called normal by its
    largest value shows no region.

    Args:
        anomaly_map: Shape (h, w) on the model's canvas.
        calibration: Thresholds and range of scores.
        shape: Height and width of the image, pixels.
        conf: Lowest confidence of a region, 0..1.
        min_area: Smallest area, pixels of the image; default a cell of 4x4 pixels of the canvas.

    Returns:
        The regions, and their label image (h, w): 0 outside of them.
    """
    rows, columns = anomaly_map.shape
    tall, wide = shape[0] / rows, shape[1] / columns
    least = CELL_PX**2 if min_area is None else min_area / (tall * wide)
    mask = (anomaly_map > calibration.threshold_pixel).astype(np.uint8)
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=8, ltype=cv2.CV_32S)
    found = []
    for number in range(1, count):
        left, top, width, height, area = (int(value) for value in stats[number])
        if area < least:
            continue
        part = np.s_[top : top + height, left : left + width]
        peak = float(anomaly_map[part][labels[part] == number].max())
        confidence = calibration.normalised(peak)
        if confidence >= conf:
            box = (left * wide, top * tall, (left + width) * wide, (top + height) * tall)
            found.append(Region(box, round(area * tall * wide), peak, confidence, number))
    found.sort(key=lambda region: (-region.peak, region.number))
    kept = np.zeros(count, np.int32)
    kept[[region.number for region in found]] = [region.number for region in found]
    return found, kept[labels]


def canvas_rectangle(
    box: Sequence[float], canvas: tuple[int, int], shape: tuple[int, int], margin: float = 0.0
) -> tuple[slice, slice]:
    """Return the pixels of the canvas that a box of the image touches, at least one: rows, columns.

    Args:
        box: Left, top, right, bottom, pixels of the image.
        canvas: Height and width of the map.
        shape: Height and width of the image.
        margin: By how much it is enlarged on every side, share of the canvas.
    """
    found = []
    for low, high, cells, pixels in ((box[1], box[3], canvas[0], shape[0]), (box[0], box[2], canvas[1], shape[1])):
        first = int(np.floor(low * cells / pixels - margin * cells))
        last = int(np.ceil(high * cells / pixels + margin * cells))
        first = min(max(first, 0), cells - 1)
        found.append(slice(first, max(min(last, cells), first + 1)))
    return found[0], found[1]


def covered_shares(
    regions: Sequence[Region],
    labels: NDArray[np.int32],
    boxes: Sequence[Sequence[float]],
    shape: tuple[int, int],
    margin: float = MARGIN,
) -> list[float]:
    """Return for each region which share of it lies in the union of boxes, 0..1.

    Args:
        regions: Regions of one image.
        labels: Their label image (h, w).
        boxes: Left, top, right, bottom of each box, pixels of the image.
        shape: Height and width of the image, pixels.
        margin: By how much every box is enlarged on each side, share of the canvas; the map is blurred, so a region
            is a little larger than its defect.
    """
    canvas = (labels.shape[0], labels.shape[1])
    inside = np.zeros(canvas, np.bool_)
    for box in boxes:
        inside[canvas_rectangle(box, canvas, shape, margin)] = True
    size = int(labels.max(initial=0)) + 1
    total = np.bincount(labels.ravel(), minlength=size)
    covered = np.bincount(labels[inside], minlength=size)
    return [float(covered[region.number] / total[region.number]) for region in regions]


def normalised_map(anomaly_map: NDArray[np.float32], calibration: Calibration) -> NDArray[np.float32]:
    """Return a map on the scale of ``Calibration.normalised``: 0..1, the image threshold at 0.5."""
    width = max(calibration.score_max - calibration.score_min, float(np.finfo(np.float32).tiny))
    scaled = (anomaly_map - calibration.threshold_image) / width + 0.5
    return np.asarray(np.clip(scaled, 0, 1), dtype=np.float32)
