"""Neck maps (B, C, H, W): matching widths, standardising channels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kd_yolo.distill.base import LevelSpec

# Added to a variance: a channel that is flat over the whole batch stays flat instead of having its noise blown up.
VARIANCE_FLOOR = 1e-6


def width_adapters(student: Sequence[LevelSpec], teacher: Sequence[LevelSpec], always: bool = False) -> nn.ModuleList:
    """Return one module a level that takes student maps (B, C_s, H, W) to the teacher's width, (B, C_t, H, W).

    Args:
        student: The student's levels.
        teacher: The teacher's levels, as many.
        always: Give levels of equal width a 1x1 convolution too; otherwise they pass unchanged.
    """
    return nn.ModuleList(
        nn.Conv2d(mine.channels, theirs.channels, 1) if always or mine.channels != theirs.channels else nn.Identity()
        for mine, theirs in zip(student, teacher, strict=True)
    )


def channel_scale(features: Tensor) -> Tensor:
    """Return one over the standard deviation of every channel over the batch and all cells, (1, C, 1, 1).

    Population statistics: a batch in which every image appears twice has the same ones.
    """
    return torch.rsqrt(features.var((0, 2, 3), unbiased=False, keepdim=True) + VARIANCE_FLOOR)


def standardise(features: Tensor) -> Tensor:
    """Return maps (B, C, H, W) whose channels have mean 0 and variance 1 over the batch and all cells."""
    return (features - features.mean((0, 2, 3), keepdim=True)) * channel_scale(features)
