"""Per-position distance of two feature maps, and its mean: the loss of HKT."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kd_yolo.anomaly.maps import upsample
from kd_yolo.nn.precision import at_least_float32

EPS = 1e-6  # below it float16 underflows to 0 and the division gives NaN; above 1e-5 identical maps have a distance


def discrepancy(a: Tensor, b: Tensor, eps: float = EPS) -> Tensor:
    """Return 1 - cos(a, b) along channels at every position, in 0..2.

    Equal to half the squared distance of the unit vectors, which STFPM and RD4AD use. Features are scaled by
    C ** -0.5 before squaring, so that sums of squares stay in the range of float16.

    Args:
        a: Feature map (B, C, h, w).
        b: Feature map of the same shape.
        eps: Added under the root.

    Returns:
        (B, 1, h, w).
    """
    scale = a.shape[1] ** -0.5
    return scaled_discrepancy(a * scale, b * scale, eps)


def scaled_discrepancy(a: Tensor, b: Tensor, eps: float = EPS, floor: float = 0.0) -> Tensor:
    """Return ``discrepancy`` of maps that are scaled by C ** -0.5 already, both with one more, constant channel.

    Standardised targets are near zero over whatever is commonest in the images, such as a plain background, and the
    angle of a vector near zero is noise. The constant channel takes the noise out of it: with a small floor only there,
    with a large one the distance becomes the squared difference over 2 floor (our choice).

    Args:
        a: Feature map (B, C, h, w), times C ** -0.5.
        b: Feature map of the same shape, scaled so too.
        eps: Added under the root.
        floor: Square of the constant channel; a standardised target has a mean square of 1.

    Returns:
        (B, 1, h, w), in 0..2.
    """
    dot = (a * b).sum(1, keepdim=True) + floor
    norms = (a.square().sum(1, keepdim=True) + floor) * (b.square().sum(1, keepdim=True) + floor)
    return 1 - dot / (norms + eps).sqrt()


def level_distance(own: Tensor, target: Tensor, factor: int, floor: float = 0.0) -> Tensor:
    """Return the distance of two scaled maps at the finer one's positions, in float32 or better under autocast too.

    Args:
        own: (B, C, h, w), scaled by C ** -0.5.
        target: (B, C, h / factor, w / factor), scaled so too.
        factor: By how much the target is enlarged.
        floor: See ``scaled_discrepancy``.

    Returns:
        (B, 1, h, w).
    """
    with torch.autocast(own.device.type, enabled=False):
        return scaled_discrepancy(at_least_float32(own), upsample(at_least_float32(target), factor), floor=floor)


def reduce_positions(distances: Tensor, hard_quantile: float | None = None) -> Tensor:
    """Return the mean over all positions of all images, or over the worst ones only.

    Args:
        distances: (B, 1, h, w).
        hard_quantile: Average only the positions at or above this quantile (hard mining, after EfficientAD).

    Returns:
        A scalar.
    """
    if hard_quantile is None:
        return distances.mean()
    kept = max(1, math.ceil((1 - hard_quantile) * distances.numel()))
    return torch.topk(distances.flatten(), kept, sorted=False).values.mean()
