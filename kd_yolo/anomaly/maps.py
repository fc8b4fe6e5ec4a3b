"""From per-level distances to one map and one score: calibration, fusion, blur. Plain tensor functions, exportable."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PRODUCT_EPS = 1e-6
REFERENCE_PX = 256  # the canvas at which the blur's sigma is given
CALIBRATED_RANGE = 0.1  # what the upper calibration quantile becomes (EfficientAD, section 3.4)


class GaussianBlur(nn.Module):
    """Separable Gaussian blur of a coarse map, with zero padding and division by the blur of ones.

    Reflect padding would put chains of shape operations into exported graphs. The kernel is a buffer.

    Args:
        sigma: Standard deviation in cells of the map; 0 leaves the map as it is.
    """

    kernel: Tensor

    def __init__(self, sigma: float) -> None:
        super().__init__()
        self.radius = round(4 * sigma)
        cells = torch.arange(-self.radius, self.radius + 1, dtype=torch.float64)
        weights = torch.exp(-0.5 * (cells / max(sigma, 1e-9)).square())
        self.register_buffer("kernel", (weights / weights.sum()).float().reshape(1, 1, 1, -1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Blur (B, 1, h, w)."""
        if self.radius == 0:
            return x
        ones = torch.ones_like(x[:1])
        return self._convolve(x) / self._convolve(ones)

    def _convolve(self, x: Tensor) -> Tensor:
        kernel = self.kernel.to(x.dtype)
        across = F.conv2d(x, kernel, padding=(0, self.radius))
        return F.conv2d(across, kernel.transpose(2, 3), padding=(self.radius, 0))


def grid_sigma(sigma_px: float, imgsz: int, stride: int) -> float:
    """Return the blur's standard deviation in cells of a grid of ``stride``, at a canvas of ``imgsz`` pixels."""
    return sigma_px * imgsz / REFERENCE_PX / stride


def upsample(x: Tensor, factor: int) -> Tensor:
    """Enlarge (B, C, h, w) by a whole factor, bilinear, corners not aligned.

    A factor instead of a size: exported graphs then need no shapes, and any canvas works.
    """
    if factor == 1:
        return x
    return F.interpolate(x, scale_factor=float(factor), mode="bilinear", align_corners=False)


def fuse(levels: Sequence[Tensor], strides: Sequence[int], low: Tensor, high: Tensor, how: str) -> Tensor:
    """Fuse distances of several levels into one map at the finest level's grid.

    ``mean``: of 0.1 (D_l - low_l) / (high_l - low_l), EfficientAD's normalisation; not clipped, so it may be negative.
    ``product``: geometric mean of D_l + 1e-6, without calibration, as STFPM multiplies.

    Args:
        levels: Distances (B, 1, h_l, w_l), L of them.
        strides: Stride of each in pixels.
        low: Lower calibration quantile of each level (L).
        high: Upper one (L).
        how: ``mean`` or ``product``.

    Returns:
        (B, 1, h, w) at the smallest stride.
    """
    finest = min(strides)
    if how == "product":
        logs = [
            upsample(level, stride // finest).clamp_min(0).add(PRODUCT_EPS).log()
            for level, stride in zip(levels, strides, strict=True)
        ]
        return (sum(logs[1:], logs[0]) / len(logs)).exp()
    gain = CALIBRATED_RANGE / (high - low).clamp_min(1e-6) / len(levels)
    shift = -(low * gain).sum()
    by_stride: dict[int, Tensor] = {}  # levels of one grid are added before the one interpolation they share
    for index, (level, stride) in enumerate(zip(levels, strides, strict=True)):
        term = level * gain[index]
        by_stride[stride] = by_stride[stride] + term if stride in by_stride else term
    coarse = sorted(by_stride, reverse=True)
    total = by_stride[finest] + shift
    for stride in coarse[:-1]:
        total = total + upsample(by_stride[stride], stride // finest)
    return total


def image_scores(maps: Tensor, how: str, top_fraction: float) -> Tensor:
    """Return the score of each image: the largest value of its map, or the mean of its largest ones.

    Args:
        maps: Final maps (B, 1, H, W).
        how: ``max`` or ``topk``.
        top_fraction: Share of the pixels that ``topk`` averages.

    Returns:
        (B,).
    """
    values = maps.flatten(1)
    if how == "max":
        return values.amax(1)
    count = max(1, math.ceil(top_fraction * values.shape[1]))
    return values.topk(count, dim=1, sorted=False).values.mean(1)
