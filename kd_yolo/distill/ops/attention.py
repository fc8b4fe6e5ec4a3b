"""Attention maps of a feature map and the foreground/background loss that they weight.

FGD: Yang et al., "Focal and Global Knowledge Distillation for Detectors", CVPR 2022, arXiv:2111.11837, section 3.1.
"""

from __future__ import annotations

import torch
from torch import Tensor


def spatial_attention(feature: Tensor, tau: float, scaled: bool = False) -> Tensor:
    """Return H W softmax(mean over channels of |F| / tau), (B, H, W): mean 1 over the cells. FGD, equations 5 and 7.

    Args:
        feature: (B, C, H, W).
        tau: Temperature; smaller is sharper.
        scaled: Divide by the largest of the cells first, so that the sharpness does not depend on the size of the
            features; ours, not FGD's.
    """
    height, width = feature.shape[-2:]
    return (height * width * _softmax(feature.abs().mean(1).flatten(1), tau, scaled)).reshape(-1, height, width)


def channel_attention(feature: Tensor, tau: float, scaled: bool = False) -> Tensor:
    """Return C softmax(mean over cells of |F| / tau), (B, C): mean 1 over the channels. FGD, equations 6 and 8."""
    return feature.shape[1] * _softmax(feature.abs().mean((2, 3)), tau, scaled)


def decoupled_loss(
    student: Tensor, teacher: Tensor, foreground: Tensor, background: Tensor, tau: float, scaled: bool = False
) -> tuple[Tensor, Tensor]:
    """Return L_fg and L_bg, sums over channels and cells and means over the batch. FGD, equation 9 without its alphas.

        L = 1/B sum_{b,c,p} M_b(p) A^s_b(p; T) A^c_b(c; T) (S - T)^2_{b,c,p}

    Args:
        student: S, adapted to the teacher's channels, (B, C, H, W).
        teacher: T without gradient, (B, C, H, W); its attention alone weights the difference.
        foreground: M of the boxes, (B, H, W).
        background: M of the rest, (B, H, W).
        tau: Temperature of the attention.
        scaled: See ``spatial_attention``.
    """
    channel = channel_attention(teacher, tau, scaled)[:, :, None, None]
    # Over channels first: the masks then weight (B, H, W) and not two copies of (B, C, H, W).
    per_cell = ((student - teacher).square() * channel).sum(1) * spatial_attention(teacher, tau, scaled)
    images = student.shape[0]
    return (per_cell * foreground).sum() / images, (per_cell * background).sum() / images


def _softmax(values: Tensor, tau: float, scaled: bool) -> Tensor:
    if scaled:
        largest = values.amax(1, keepdim=True)
        values = values / torch.where(largest > 0, largest, torch.ones_like(largest))
    return (values / tau).softmax(1)
