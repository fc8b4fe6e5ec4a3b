"""Refit convolutions in closed form: least squares on what the layers of a narrower network really read."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional
from ultralytics.nn.modules import Conv

from kd_yolo.errors import ModelError
from kd_yolo.nn.blocks import RepBlock
from kd_yolo.nn.narrowing_sites import Site, convolution, geometry, output_size

EXACT = 1e-10  # squared error over the target's variance below which a layer already does what it should
_BLOCK = 4096  # positions whose patches are held in float64 at a time


@torch.no_grad()
def refit(site: Site, x: Tensor, positions: Tensor, expected: Tensor, ridge: float) -> None:
    """Give a convolution the weights with which it comes nearest to the source's outputs on its own inputs.

    Layer by layer this is the reconstruction of ThiNet (Luo, Wu and Lin, ICCV 2017, arXiv:1707.06342, section 3.2.3)
    and of channel pruning (He, Zhang and Sun, ICCV 2017, arXiv:1707.06168, equation 1 and section 3.2): the inputs are
    those of the narrow network, whose earlier layers are refitted already, and the outputs those of the untouched
    source, so that what the earlier layers lost is made up for as far as it can be. A layer that already does what it
    should is left as it is.

    Args:
        site: The convolution, changed in place, and what it stands for.
        x: (N, C, H, W) what the narrow network reads there.
        positions: (R,) positions in (image, y, x) order of the convolution's output.
        expected: (R, O) the source's outputs there, before the activation.
        ridge: Pull towards the sliced weights, over the mean square of a patch's entry.

    Raises:
        ModelError: The source's outputs are not finite.
    """
    if not bool(torch.isfinite(expected).all()):
        raise ModelError(f"{site.label}: the source computes values there that are not finite on these images")
    kernel, bias = site.affine()
    if not site.depthwise:
        fitted = fit_dense(_patches(site, x, positions), expected, kernel.flatten(1), bias, ridge)
    else:
        fitted = fit_depthwise(_patches(site, x, positions), expected, kernel.flatten(1), bias, ridge)
    if fitted is not None:
        install(site, x, fitted[0].view_as(kernel), fitted[1])


def fit_dense(
    patches: Iterator[Tensor], expected: Tensor, kernel: Tensor, bias: Tensor, ridge: float
) -> tuple[Tensor, Tensor] | None:
    """Return the weights and bias that minimise |Y - A W' - b|^2 + ridge m |W - W0|^2, m the mean diagonal of A'A.

    A is centred, so the bias is free. The penalty pulls towards the weights given, not towards 0: where there are
    fewer rows than unknowns, or dead inputs, what the rows do not say stays as it was.

    Args:
        patches: Blocks (r, K) of A, float64.
        expected: Y (R, O).
        kernel: W0 (O, K), float64.
        bias: (O,) the bias that belongs to it, float64.
        ridge: Not negative; with 0 the solution of least norm of W - W0.

    Returns:
        (O, K) and (O,) in float64, or None where W0 is exact already.
    """
    gram, cross = kernel.new_zeros(kernel.shape[1], kernel.shape[1]), kernel.new_zeros(kernel.shape[::-1])
    mean, residual = kernel.new_zeros(kernel.shape[1]), expected.new_zeros(len(bias), dtype=torch.float64)
    start, squares = 0, 0.0
    for a in patches:
        r = expected[start : start + len(a)].double() - a @ kernel.T - bias
        gram.addmm_(a.T, a)
        cross.addmm_(a.T, r)
        mean += a.sum(0)
        residual += r.sum(0)
        squares += float(r.square().sum())
        start += len(a)
    if squares <= EXACT * _variation(expected):
        return None
    mean, residual = mean / start, residual / start
    gram.addr_(mean, mean, alpha=-start)
    cross.addr_(mean, residual, alpha=-start)
    change = _solve(gram, cross, ridge * gram.diagonal().mean()).T
    return kernel + change, bias + residual - change @ mean


def fit_depthwise(
    patches: Iterator[Tensor], expected: Tensor, kernel: Tensor, bias: Tensor, ridge: float
) -> tuple[Tensor, Tensor] | None:
    """Do what ``fit_dense`` does for every channel on its own.

    Args:
        patches: Blocks (r, k * C), float64, in which the entries of one kernel position lie beside each other.
        expected: (R, C).
        kernel: (C, k), float64.
        bias: (C,), float64.
        ridge: Over the mean diagonal of each channel's own A'A.

    Returns:
        (C, k) and (C,) in float64, or None where the kernel given is exact already.
    """
    channels, size = kernel.shape
    gram, cross = kernel.new_zeros(channels, size, size), kernel.new_zeros(channels, size, 1)
    mean, residual = kernel.new_zeros(channels, size), kernel.new_zeros(channels)
    start, squares = 0, 0.0
    for part in patches:
        a = part.view(-1, size, channels).permute(2, 0, 1).contiguous()  # (C, r, k)
        r = expected[start : start + len(part)].double().T - (a @ kernel[:, :, None])[:, :, 0] - bias[:, None]
        gram.baddbmm_(a.transpose(1, 2), a)
        cross.baddbmm_(a.transpose(1, 2), r[:, :, None])
        mean += a.sum(1)
        residual += r.sum(1)
        squares += float(r.square().sum())
        start += len(part)
    if squares <= EXACT * _variation(expected):
        return None
    mean, residual = mean / start, residual / start
    gram -= start * mean[:, :, None] * mean[:, None, :]
    cross -= start * (mean * residual[:, None])[:, :, None]
    change = _solve(gram, cross, ridge * gram.diagonal(dim1=1, dim2=2).mean(1))[:, :, 0]
    return kernel + change, bias + residual - (change * mean).sum(1)


@torch.no_grad()
def install(site: Site, x: Tensor, kernel: Tensor, bias: Tensor) -> None:
    """Give a convolution a kernel and a bias: exactly, and with BatchNorm statistics that fit its input.

    Filters get the norm they had in the source, as a BatchNorm follows whose scale undoes it; its running statistics
    are those of the new convolution on ``x``, so that eval mode and train mode agree there.

    Args:
        site: What to change.
        x: (N, C, H, W) what the convolution reads.
        kernel: (O, I, kh, kw), float64.
        bias: (O,), float64.
    """
    target = site.target
    if not isinstance(target, (Conv, RepBlock)):
        conv = convolution(target)
        conv.weight.copy_(kernel)
        assert conv.bias is not None  # the walk has refused others
        conv.bias.copy_(bias)
        return
    source = convolution(site.source).weight.double()[site.outputs.source]
    source = source if site.depthwise else source[:, site.inputs.source]
    norms = [one.flatten(1).norm(dim=1) for one in (source, kernel)]
    scale = torch.where((norms[0] > 0) & (norms[1] > 0), norms[0] / norms[1], torch.ones_like(bias))
    kernel = kernel * scale[:, None, None, None]
    conv = target.conv
    z = functional.conv2d(x, kernel.to(x), None, conv.stride, conv.padding, conv.dilation, conv.groups)
    variance, mean = (one.double() for one in torch.var_mean(z, (0, 2, 3), correction=0))
    trained = site.source.bn
    assert isinstance(trained, nn.BatchNorm2d)  # of a Conv that is not fused
    bn = nn.BatchNorm2d(len(bias), trained.eps, trained.momentum).to(x)
    bn.load_state_dict({"running_mean": mean, "running_var": variance}, strict=False)
    bn.weight.copy_((variance + bn.eps).sqrt() / scale)
    bn.bias.copy_(bias + mean / scale)
    put(target, kernel, bn)


@torch.no_grad()
def put(target: Conv | RepBlock, kernel: Tensor, bn: nn.BatchNorm2d) -> None:
    """Give a stock or re-parameterized convolution a kernel and the BatchNorm that follows it."""
    if isinstance(target, RepBlock):
        target.inherit(kernel.to(target.conv.weight), bn)
        return
    target.conv.weight.copy_(kernel)
    target.bn.load_state_dict(bn.state_dict())
    target.bn.eps, target.bn.momentum = bn.eps, bn.momentum


def _patches(site: Site, x: Tensor, positions: Tensor) -> Iterator[Tensor]:
    """Yield what a convolution reads at the positions of its output, in blocks (r, K) of float64.

    K counts input channels first and kernel positions second, as in a flattened kernel; for a depthwise convolution
    the other way round.
    """
    conv = convolution(site.target)
    (kh, kw), (sy, sx), (py, px), (dy, dx) = geometry(conv)
    rows, columns = output_size(conv, x)
    height, width = x.shape[2] + 2 * py, x.shape[3] + 2 * px
    flat = functional.pad(x.permute(0, 2, 3, 1), [0, 0, px, px, py, py]).reshape(-1, x.shape[1])
    image, place = positions // (rows * columns), positions % (rows * columns)
    corner = (image * height + place // columns * sy) * width + place % columns * sx
    offsets = torch.tensor([i * dy * width + j * dx for i in range(kh) for j in range(kw)], device=x.device)
    for part in corner.to(x.device).split(_BLOCK):
        block = flat[part[:, None] + offsets].double()  # (r, kh * kw, C)
        yield (block if site.depthwise else block.transpose(1, 2)).reshape(len(part), -1)


def _solve(gram: Tensor, cross: Tensor, ridge: Tensor) -> Tensor:
    """Solve (gram + ridge I) X = cross for symmetric positive semi-definite matrices (..., K, K) and ridges (...).

    Where the matrix is singular even so, such as with dead inputs alone, X is the solution of least norm.
    """
    if gram.dim() == 2 and ridge > 0:
        eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        factor, failed = torch.linalg.cholesky_ex(gram + ridge * eye)
        if not failed:
            return torch.cholesky_solve(cross, factor)
    values, vectors = torch.linalg.eigh(gram)
    values = (values + ridge[..., None])[..., None]
    limit = values.amax(-2, keepdim=True) * torch.finfo(values.dtype).eps * gram.shape[-1]
    inverse = torch.where(values > limit.clamp_min(torch.finfo(values.dtype).tiny), 1 / values, 0.0)
    return vectors @ (inverse * (vectors.transpose(-1, -2) @ cross))


def _variation(expected: Tensor) -> float:
    """Return the sum of squares around the mean of every channel."""
    return float(expected.var(0, correction=0).double().sum()) * len(expected)
