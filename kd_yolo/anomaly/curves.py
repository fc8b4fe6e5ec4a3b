"""Rank statistics: one pass over the scores gives ROC, PRO and F1 curves with ties treated exactly.

All of them only depend on how many negatives lie above each positive. So the negatives are sorted once, and the curves
have corners at the distinct scores of positives alone: between two of them the true-positive rate does not change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from kd_yolo.errors import ModelError

Floats = NDArray[np.float64]
Maps = Sequence[NDArray[np.floating]] | NDArray[np.floating]
Masks = Sequence[NDArray[np.generic]] | NDArray[np.generic]

EXACT_PIXELS = 50_000_000
"""Above this number of pixels a histogram takes the place of sorting."""
BINS = 20_000
_SAMPLE = 2_000_000
"""Pixels looked at to place the histogram's bins."""


@dataclass(frozen=True)
class Curve:
    """Corners of a piecewise linear curve, from (0, 0) or its first point on, x not decreasing."""

    x: Floats
    y: Floats

    def area(self, limit: float = 1.0) -> float:
        """Return the area under the curve from 0 to ``limit``, by trapezoids, the end point interpolated linearly."""
        if limit >= 1.0:
            return float(np.trapezoid(self.y, self.x))
        end = int(np.searchsorted(self.x, limit, side="right"))
        x, y = self.x[:end], self.y[:end]
        if end < len(self.x):
            step = (limit - self.x[end - 1]) / (self.x[end] - self.x[end - 1])
            x = np.append(x, limit)
            y = np.append(y, self.y[end - 1] + step * (self.y[end] - self.y[end - 1]))
        return float(np.trapezoid(y, x))

    def thinned(self, points: int = 1000) -> Curve:
        """Return the curve with at most about ``points`` corners, evenly over its length; for drawing."""
        if len(self.x) <= points:
            return self
        length = np.concatenate([[0.0], np.cumsum(np.abs(np.diff(self.x)) + np.abs(np.diff(self.y)))])
        kept = np.unique(np.searchsorted(length, np.linspace(0, length[-1], points)).clip(0, len(self.x) - 1))
        return Curve(self.x[kept], self.y[kept])


@dataclass(frozen=True)
class Steps:
    """Counts at each distinct score of a positive, highest score first; all arrays of shape (K,).

    Attributes:
        scores: The scores.
        above: Negatives with a higher score.
        reached: Negatives with this score or a higher one.
        found: Positives with this score or a higher one.
        covered: Mean over regions of the share of their pixels with this score or a higher one; 0 without regions.
        negatives: Number of negatives.
        positives: Number of positives.
    """

    scores: Floats
    above: Floats
    reached: Floats
    found: Floats
    covered: Floats
    negatives: int
    positives: int

    @property
    def defined(self) -> bool:
        """Whether there are both negatives and positives; without them no curve exists."""
        return self.negatives > 0 and self.positives > 0

    def roc(self) -> Curve:
        """Return false-positive rate against true-positive rate; its area equals the rank statistic, ties averaged."""
        return self._curve(self.found / self.positives)

    def pro(self) -> Curve:
        """Return false-positive rate against per-region overlap (P. Bergmann et al., IJCV 2021, section 6.1)."""
        return self._curve(self.covered)

    def best_f1(self) -> tuple[float, float]:
        """Return the highest F1 and the score from which it is reached (an anomaly has this score or a higher one)."""
        f1 = 2 * self.found / (self.found + self.reached + self.positives)
        best = int(np.argmax(f1))
        return float(f1[best]), float(self.scores[best])

    def _curve(self, heights: Floats) -> Curve:
        before = np.concatenate([[0.0], heights[:-1]])
        x = np.stack([self.above, self.reached], 1).ravel() / self.negatives
        y = np.stack([before, heights], 1).ravel()
        return Curve(np.concatenate([[0.0], x, [1.0]]), np.concatenate([[0.0], y, y[-1:]]))


def steps_of(scores: NDArray[np.floating], labels: NDArray[np.generic]) -> Steps:
    """Return the counts for scores of single things.

    Args:
        scores: Anomaly scores, shape (N,).
        labels: 0 normal or 1 anomalous, shape (N,).

    Raises:
        ModelError: A score is not a finite number.
    """
    values = np.asarray(scores).ravel()
    positive = np.asarray(labels).ravel().astype(bool)
    _check_finite(values)
    found = values[positive]
    return _exact(np.sort(values[~positive]), found, np.zeros(len(found)))


def pixel_steps(maps: Maps, masks: Masks, exact_pixels: int = EXACT_PIXELS) -> Steps:
    """Return the counts for all pixels of all images.

    A region is an 8-connected component of a mask; each weighs the same in ``covered``, whatever its size.

    Args:
        maps: Anomaly maps, shape (N, H, W), or N maps of any sizes (H_i, W_i).
        masks: Truth of the same shapes; a pixel above 0 is anomalous.
        exact_pixels: Up to this number of pixels scores are sorted, above it they are counted in 20,000 bins of about
            equal content, and scores of one bin count as ties. Memory: sorting takes about 8 bytes a pixel.

    Raises:
        ModelError: A map holds a value that is not finite.
        ValueError: A map and its mask differ in shape.
    """
    pixels = 0
    for one, mask in zip(maps, masks, strict=True):
        if one.shape != mask.shape:
            raise ValueError(f"map of shape {one.shape} and mask of shape {mask.shape} do not belong together")
        _check_finite(one)
        pixels += one.size
    regions = sum(_regions(mask)[0] for mask in masks)
    if pixels > exact_pixels:
        return _binned(maps, masks, regions)
    background: list[NDArray[np.floating]] = []
    inside: list[NDArray[np.floating]] = []
    weights: list[Floats] = []
    for one, mask in zip(maps, masks, strict=True):
        marked = np.asarray(mask) > 0
        background.append(one[~marked])
        if marked.any():
            inside.append(one[marked])
            weights.append(_weights(mask, marked) / regions)
    negatives = np.concatenate(background) if background else np.zeros(0)
    background.clear()  # otherwise every background pixel is held twice while they are sorted
    negatives.sort()
    return _exact(negatives, *(np.concatenate(part) if part else np.zeros(0) for part in (inside, weights)))


def _exact(negatives: NDArray[np.floating], positives: NDArray[np.floating], weights: Floats) -> Steps:
    """Count; ``negatives`` ascending, ``weights`` the share of each positive in ``covered``."""
    order = np.argsort(positives)[::-1]
    ranked = positives[order]
    last = np.append(ranked[1:] != ranked[:-1], True) if len(ranked) else np.zeros(0, bool)
    distinct = ranked[last]
    total = len(negatives)
    return Steps(
        scores=distinct.astype(np.float64),
        above=(total - np.searchsorted(negatives, distinct, side="right")).astype(np.float64),
        reached=(total - np.searchsorted(negatives, distinct, side="left")).astype(np.float64),
        found=(np.flatnonzero(last) + 1).astype(np.float64),
        covered=np.cumsum(weights[order])[last],
        negatives=total,
        positives=len(positives),
    )


def _binned(maps: Maps, masks: Masks, regions: int) -> Steps:
    """Count in bins whose edges are quantiles: any rising change of the scores leaves the result as it is."""
    edges = _edges(maps)
    counts = np.zeros((3, len(edges) + 1))  # negatives, positives, share of regions
    for one, mask in zip(maps, masks, strict=True):
        bins = np.searchsorted(edges, one.ravel(), side="right")
        marked = np.asarray(mask).ravel() > 0
        counts[0] += np.bincount(bins[~marked], minlength=counts.shape[1])
        counts[1] += np.bincount(bins[marked], minlength=counts.shape[1])
        if marked.any():
            weights = _weights(mask, marked.reshape(np.shape(mask))) / regions
            counts[2] += np.bincount(bins[marked], weights, counts.shape[1])
    downward = counts[:, ::-1]
    totals = np.cumsum(downward, axis=1)
    used = downward[1] > 0
    lower = np.concatenate([[edges[0]], edges])[::-1]
    return Steps(
        scores=lower[used].astype(np.float64),
        above=(totals[0] - downward[0])[used],
        reached=totals[0][used],
        found=totals[1][used],
        covered=totals[2][used],
        negatives=int(totals[0, -1]),
        positives=int(totals[1, -1]),
    )


def _edges(maps: Maps) -> NDArray[np.floating]:
    stride = max(1, sum(one.size for one in maps) // _SAMPLE)
    sample = np.concatenate([one.ravel()[index % stride :: stride] for index, one in enumerate(maps)])
    sample.sort()
    return np.unique(sample[np.linspace(0, len(sample) - 1, BINS - 1).astype(np.int64)])


def _regions(mask: NDArray[np.generic]) -> tuple[int, NDArray[np.int32], NDArray[np.int32]]:
    """Return the number of 8-connected regions, their labels (H, W) from 1 on, and their areas from index 0 on."""
    binary = (np.asarray(mask) > 0).astype(np.uint8)
    if not binary.any():
        return 0, np.zeros(binary.shape, np.int32), np.zeros(1, np.int32)
    count, labels, stats, _ = cv2.connectedComponentsWithStats(binary, connectivity=8)
    return count - 1, np.asarray(labels, np.int32), np.asarray(stats[:, cv2.CC_STAT_AREA], np.int32)


def _weights(mask: NDArray[np.generic], marked: NDArray[np.bool_]) -> Floats:
    """Return 1 / area of its region for every marked pixel."""
    _, labels, areas = _regions(mask)
    return np.asarray(1.0 / areas[labels[marked]], dtype=np.float64)


def _check_finite(values: NDArray[np.floating]) -> None:
    if not np.isfinite(values).all():
        bad = int((~np.isfinite(values)).sum())
        raise ModelError(
            f"{bad} of {values.size} anomaly scores are not finite; the model is broken or overflows in FP16; "
            f"train it again, or export it in FP32"
        )


__all__ = ["BINS", "EXACT_PIXELS", "Curve", "Steps", "pixel_steps", "steps_of"]
