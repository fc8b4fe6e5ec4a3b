"""Numbers that turn distances into decisions, from held-out normal images only."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

LOW_QUANTILE, HIGH_QUANTILE = 0.9, 0.995  # EfficientAD, section 3.4
STD_FLOOR = 1e-3  # of the mean over channels: a channel that normal images leave constant must not outweigh all others


@dataclass(frozen=True)
class Calibration:
    """Calibration of an anomaly model; every number is exact in float32.

    Attributes:
        level_low: Quantile 0.9 of each level's distances on normal images.
        level_high: Quantile 0.995.
        threshold_image: Image scores above it are anomalous.
        threshold_pixel: Map values above it are anomalous.
        score_min: Smallest image score of the normal images.
        score_max: Largest, or the threshold if that is larger.
    """

    level_low: list[float]
    level_high: list[float]
    threshold_image: float
    threshold_pixel: float
    score_min: float
    score_max: float

    def normalised(self, score: float) -> float:
        """Return a score for display in 0..1, where 0.5 is always the threshold."""
        width = max(self.score_max - self.score_min, float(np.finfo(np.float32).tiny))
        return min(max((score - self.threshold_image) / width + 0.5, 0.0), 1.0)


def channel_statistics(batches: Iterable[Mapping[int, Tensor]]) -> dict[int, tuple[Tensor, Tensor]]:
    """Return mean and standard deviation (C_s) of every channel, by stride s, accumulated in float64.

    Args:
        batches: Maps (B, C_s, h, w) by stride, batch after batch.

    Returns:
        Empty when there was no batch. Deviations below a thousandth of their mean are raised to it.
    """
    sums: dict[int, list[Tensor]] = {}
    for maps in batches:
        for stride, values in maps.items():
            flat = values.detach().double().transpose(0, 1).flatten(1)
            parts = [flat.sum(1), flat.square().sum(1), flat.new_tensor(float(flat.shape[1]))]
            sums[stride] = [a + b for a, b in zip(sums[stride], parts, strict=True)] if stride in sums else parts
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for stride, (total, squares, count) in sums.items():
        mean = total / count
        std = (squares / count - mean.square()).clamp_min(0).sqrt()
        found[stride] = mean, std.clamp_min(STD_FLOOR * float(std.mean()))
    return found


def level_quantiles(levels: Sequence[Sequence[Tensor]]) -> tuple[list[float], list[float]]:
    """Return the lower and the upper quantile of each level.

    Args:
        levels: For every batch, L maps (B, 1, h_l, w_l).
    """
    low: list[float] = []
    high: list[float] = []
    for level in zip(*levels, strict=True):
        values = np.concatenate([part.detach().float().cpu().numpy().ravel() for part in level])
        a, b = np.quantile(values, (LOW_QUANTILE, HIGH_QUANTILE))
        low.append(_float32(a))
        high.append(_float32(b))
    return low, high


def threshold(values: Tensor, quantile: float, margin: float, total: int | None = None) -> float:
    """Return a quantile, moved up by a share of its magnitude.

    Args:
        values: All values, or the largest of ``total`` values.
        quantile: In 0..1, linear between neighbours.
        margin: Share of the quantile's magnitude that is added; a map may be negative, so not simply a factor.
        total: How many values there were, when only the largest are given.
    """
    ordered = values.flatten().sort(descending=True).values.double()
    count = len(ordered) if total is None else total
    position = (count - 1) * (1 - quantile)  # counted from the largest
    index = min(math.floor(position), len(ordered) - 1)
    upper, lower = float(ordered[index]), float(ordered[min(index + 1, len(ordered) - 1)])
    value = upper + (lower - upper) * (position - math.floor(position))
    return _float32(value + margin * abs(value))


def largest(maps: Iterable[Tensor], total: int, quantile: float) -> Tensor:
    """Return the largest of all values that ``threshold`` needs, without holding all maps at once.

    Args:
        maps: Final maps, batch after batch.
        total: Number of values in all of them.
        quantile: As of ``threshold``.
    """
    wanted = min(total, math.ceil((total - 1) * (1 - quantile)) + 2)
    kept = torch.empty(0)
    for batch in maps:
        values = torch.cat((kept, batch.detach().float().cpu().flatten()))
        kept = values.topk(min(wanted, len(values)), sorted=False).values
    return kept


def score_range(scores: Tensor, limit: float) -> tuple[float, float]:
    """Return smallest and largest score (B), the threshold ``limit`` counted among the large ones."""
    return _float32(float(scores.min())), _float32(max(float(scores.max()), limit))


def _float32(value: float) -> float:
    return float(np.float32(value))
