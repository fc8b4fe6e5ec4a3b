"""Kernel algebra of structural re-parameterization: pure functions, computed in float64, without gradient.

Convolution and BatchNorm in eval mode are linear, so parallel branches that share input and stride add up to one
convolution (Ding et al., "RepVGG: Making VGG-style ConvNets Great Again", CVPR 2021, section 3.3).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from kd_yolo.errors import ReparamError

KernelBias = tuple[Tensor, Tensor]


@torch.no_grad()
def fold_bn(kernel: Tensor, bias: Tensor | None, bn: nn.BatchNorm2d) -> KernelBias:
    """Fold the eval-mode BatchNorm that follows a convolution into the convolution.

    With s = sqrt(running_var + eps): kernel' = kernel * gamma / s and bias' = (bias - running_mean) * gamma / s + beta.

    Args:
        kernel: Convolution weight (C', C / groups, kh, kw).
        bias: Convolution bias (C'), or None for zero.
        bn: The BatchNorm over the C' output channels; affine or not.

    Returns:
        Kernel of the same shape and bias (C'), both float64.

    Raises:
        ReparamError: The BatchNorm keeps no running statistics, or its channel count is not C'.
    """
    if bn.running_mean is None or bn.running_var is None:
        raise ReparamError("a BatchNorm without running statistics is not linear in eval mode: it cannot be folded")
    if bn.num_features != kernel.shape[0]:
        raise ReparamError(f"a BatchNorm of {bn.num_features} channels cannot follow {kernel.shape[0]} output channels")
    scale = bn_gamma(bn) / (bn.running_var.double() + bn.eps).sqrt()
    shift = -bn.running_mean.double() if bias is None else bias.double() - bn.running_mean.double()
    return kernel.double() * scale.reshape(-1, 1, 1, 1), shift * scale + bn_beta(bn)


@torch.no_grad()
def pad_to(kernel: Tensor, size: int) -> Tensor:
    """Zero-pad a kernel with odd sides so that it sits at the centre of a (size x size) one.

    A convolution with the padded kernel and padding size // 2 equals the original one with its own "same" padding,
    at every stride and dilation.

    Args:
        kernel: Weight (C', C / groups, kh, kw), for instance 1x1, 1x3, 3x1.
        size: Side of the result, odd.

    Returns:
        Weight (C', C / groups, size, size) in the kernel's dtype.

    Raises:
        ReparamError: A side is even (no centre) or larger than ``size``.
    """
    height, width = kernel.shape[-2:]
    if size % 2 == 0 or height % 2 == 0 or width % 2 == 0 or max(height, width) > size:
        raise ReparamError(f"a {height}x{width} kernel has no centred place in a {size}x{size} one")
    top, left = (size - height) // 2, (size - width) // 2
    return nn.functional.pad(kernel, [left, left, top, top])


@torch.no_grad()
def identity_kernel(
    channels: int, groups: int = 1, size: int = 3, *, device: torch.device | str | None = None
) -> Tensor:
    """Return the kernel whose convolution (stride 1, "same" padding) returns its input: a Dirac per channel.

    Args:
        channels: Input and output channels C.
        groups: Groups of the convolution; must divide C.
        size: Side of the kernel, odd.
        device: Where to build it.

    Returns:
        Weight (C, C / groups, size, size), float64.

    Raises:
        ReparamError: ``groups`` does not divide ``channels`` or ``size`` is even.
    """
    if channels % groups or size % 2 == 0:
        raise ReparamError(f"no identity kernel for {channels} channels in {groups} groups of size {size}")
    per_group = channels // groups
    kernel = torch.zeros(channels, per_group, size, size, dtype=torch.float64, device=device)
    index = torch.arange(channels, device=device)
    kernel[index, index % per_group, size // 2, size // 2] = 1.0
    return kernel


@torch.no_grad()
def merge_branches(branches: Iterable[KernelBias], size: int = 3) -> KernelBias:
    """Add up parallel branches of one input, stride and dilation.

    Args:
        branches: Kernel (C', C / groups, kh, kw) and bias (C') of each branch; each kernel is centred in ``size``.
        size: Side of the merged kernel.

    Returns:
        Kernel (C', C / groups, size, size) and bias (C'), float64.

    Raises:
        ReparamError: There is no branch, or their shapes do not agree.
    """
    parts = [(pad_to(kernel.double(), size), bias.double()) for kernel, bias in branches]
    if not parts:
        raise ReparamError("there is no branch to merge")
    shapes = {(tuple(kernel.shape), tuple(bias.shape)) for kernel, bias in parts}
    if len(shapes) > 1:
        raise ReparamError(f"branches of different shapes cannot be merged: {sorted(shapes)}")
    kernels, biases = zip(*parts, strict=True)
    return torch.stack(kernels).sum(0), torch.stack(biases).sum(0)


@torch.no_grad()
def bn_gamma(bn: nn.BatchNorm2d) -> Tensor:
    """Return the scale (C) of a BatchNorm in float64; ones when it is not affine."""
    device = None if bn.running_mean is None else bn.running_mean.device
    ones = torch.ones(bn.num_features, dtype=torch.float64, device=device)
    return ones if bn.weight is None else bn.weight.detach().double()


@torch.no_grad()
def bn_beta(bn: nn.BatchNorm2d) -> Tensor:
    """Return the shift (C) of a BatchNorm in float64; zeros when it is not affine."""
    return torch.zeros_like(bn_gamma(bn)) if bn.bias is None else bn.bias.detach().double()


@torch.no_grad()
def bn_variance(bn: nn.BatchNorm2d) -> Tensor:
    """Return the variance (C) of a BatchNorm's output, gamma^2 v / (v + eps), for input of its running variance v."""
    if bn.running_var is None:
        raise ReparamError("a BatchNorm without running statistics has no known output variance")
    variance = bn.running_var.double()
    return bn_gamma(bn) ** 2 * variance / (variance + bn.eps)
