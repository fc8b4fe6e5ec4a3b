"""Structural similarity of two feature maps as a loss.

SSIM: Wang et al., IEEE TIP 13, 2004, equation 13. On features: de Rijk et al., "Structural Knowledge Distillation for
Object Detection", NeurIPS 2022, arXiv:2211.13133.
"""

from __future__ import annotations

import torch
from torch import Tensor

SIGMA = 1.5
C1, C2 = 0.01**2, 0.03**2  # for values in 0..1


def structural_loss(
    student: Tensor, teacher: Tensor, window: int = 7, unit_range: bool = True, zero_border: bool = False
) -> Tensor:
    """Return (1 - mean SSIM) / 2, a scalar in 0..1.

    Args:
        student: S, adapted to the teacher's channels, (B, C, H, W).
        teacher: T without gradient, (B, C, H, W).
        window: Width of the Gaussian window, odd.
        unit_range: Shift and scale both maps so that T of each image lies in 0..1, the range C1 and C2 are made for.
        zero_border: Pad with zeros, as the released code of TSKD does. Otherwise the window is cut at the border and
            its weights still sum to 1, so that it fits maps smaller than itself.
    """
    if unit_range:
        low, high = (edge(teacher, (1, 2, 3), keepdim=True) for edge in (torch.amin, torch.amax))
        scale = torch.where(high > low, high - low, torch.ones_like(high))
        student, teacher = (student - low) / scale, (teacher - low) / scale
    rows, columns = (window_matrix(n, window, student, zero_border) for n in student.shape[-2:])

    def blur(values: Tensor) -> Tensor:
        return rows @ (values @ columns.T)

    mean_s, mean_t = blur(student), blur(teacher)
    spread = (blur(student * student) - mean_s.square()) + (blur(teacher * teacher) - mean_t.square())
    shared = blur(student * teacher) - mean_s * mean_t
    similar = (2 * mean_s * mean_t + C1) * (2 * shared + C2)
    similarity = similar / ((mean_s.square() + mean_t.square() + C1) * (spread.clamp_min(0) + C2))
    return (1 - similarity.mean()) / 2


def window_matrix(size: int, window: int, like: Tensor, zero_border: bool = False) -> Tensor:
    """Return the Gaussian window as a band matrix, (n, n): one product instead of a depthwise convolution.

    On a CPU a product of matrices is far faster than a depthwise convolution, and the border is a matter of the rows.

    Args:
        size: n, cells along one side.
        window: Cells of the window, odd; sigma is 1.5 cells.
        like: A tensor of the device and type that are wanted.
        zero_border: Leave the rows at the border short of a sum of 1, which is what padding with zeros does.
    """
    cells = torch.arange(size, device=like.device, dtype=like.dtype)
    distance = (cells[:, None] - cells[None]).abs()
    weight = torch.exp(-(distance**2) / (2 * SIGMA**2)) * (distance <= window // 2)
    if not zero_border:
        return weight / weight.sum(1, keepdim=True)
    offsets = torch.arange(window, device=like.device, dtype=like.dtype) - window // 2
    return weight / torch.exp(-(offsets**2) / (2 * SIGMA**2)).sum()
