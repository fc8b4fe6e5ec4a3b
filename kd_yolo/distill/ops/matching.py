"""One-to-all feature matching: every position of one map is compared with all positions of the other.

From the released code of "A hierarchical feature-logit-based knowledge distillation scheme for internal defect
detection of magnetic tiles", with the idea of a target-aware reconstruction (Lin et al., "Knowledge Distillation via
the Target-aware Transformer", CVPR 2022, arXiv:2205.10793): the student's positions are mixed by their similarity to
the teacher's, and the mixture is compared with the teacher's map.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_yolo.distill.ops.logits import positive

MAX_HEADS = 8


def head_count(channels: int) -> int:
    """Return the largest divisor of ``channels`` that is not above 8."""
    return max(h for h in range(1, MAX_HEADS + 1) if channels % h == 0)


def limited_size(size: tuple[int, int], grid: int) -> tuple[int, int]:
    """Return a map's size with each side at most ``grid``."""
    return min(size[0], grid), min(size[1], grid)


def grid_average(values: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the means over the bins of adaptive average pooling, (..., H, W) to (..., h, w).

    Two small matrix products, one a side: the same numbers as ``adaptive_avg_pool2d``, whose backward pass has no
    deterministic CUDA kernel. A map that has the size already is returned as it is.
    """
    height, width = values.shape[-2:]
    if width != size[1]:
        values = values @ _bins(width, size[1], values).T
    if height != size[0]:
        values = _bins(height, size[0], values) @ values
    return values


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int, scale: Tensor | float = 1.0) -> Tensor:
    """Return ``sum_j M_ij value_j`` with ``M_ij = softmax_j(scale <query_i, key_j> / sqrt(d))``, head by head.

    The (B, h, N, N) tensor M is not kept where PyTorch has a fused kernel.

    Args:
        query: (B, C, N).
        key: (B, C, N).
        value: (B, C', N); C' must be a multiple of ``heads`` too.
        heads: h; each head has d = C / h channels.
        scale: Sharpness, a number or a scalar tensor.

    Returns:
        (B, C', N).
    """

    def split(values: Tensor) -> Tensor:
        # (B, h, N, d); the fused kernel wants it contiguous, and without it M would be built after all
        return values.unflatten(1, (heads, values.shape[1] // heads)).transpose(2, 3).contiguous()

    mixed = F.scaled_dot_product_attention(split(query * scale), split(key), split(value))
    return mixed.transpose(2, 3).flatten(1, 2)


def weighted_position_l2(student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    """Return ``sum_i w_i |s_i - t_i|^2 / (C sum_i w_i)``, a scalar; without any weight every position counts alike.

    Args:
        student: (B, C, N).
        teacher: (B, C, N).
        weight: w, (B, N), not negative.
    """
    weight = torch.where(weight.sum() > 0, weight, torch.ones_like(weight))
    return (weight * (student - teacher).square().sum(1)).sum() / (student.shape[1] * positive(weight.sum()))


def _bins(size: int, bins: int, like: Tensor) -> Tensor:
    """Return the (bins, size) matrix whose row i averages cells floor(i size / bins) to ceil((i + 1) size / bins)."""
    cell = torch.arange(size, device=like.device)
    row = torch.arange(bins, device=like.device).unsqueeze(1)
    start = row * size // bins
    end = ((row + 1) * size + bins - 1) // bins
    inside = (cell >= start) & (cell < end)
    return inside.to(like.dtype) / (end - start)
