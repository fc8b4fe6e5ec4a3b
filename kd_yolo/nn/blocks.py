"""RepBlock: several branches in training, one 3x3 convolution in deployment."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from ultralytics.nn.modules import Conv, RepConv

from kd_yolo.errors import ModelError, nearest
from kd_yolo.nn import reparam
from kd_yolo.nn.reparam import KernelBias

FORMS = ("qarep", "repvgg", "multi")
SIZE = 3


class ConvBN(nn.Module):
    """A convolution and its BatchNorm: one extra branch. Not an Ultralytics ``Conv``, so that nothing fuses it alone.

    Args:
        c1: Input channels.
        c2: Output channels.
        k: Kernel height and width, odd; the padding keeps the size.
        s: Stride.
        g: Groups.
        d: Dilation.
    """

    conv: nn.Conv2d
    bn: nn.BatchNorm2d

    def __init__(self, c1: int, c2: int, k: tuple[int, int], s: int = 1, g: int = 1, d: int = 1) -> None:
        super().__init__()
        self.conv = _conv(c1, c2, k, s, g, d)
        self.bn = _batch_norm(c2)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', H / s, W / s)."""
        return self.bn(self.conv(x))


class RepBlock(RepConv):
    """Convolution block with parallel branches that merge exactly into one 3x3 convolution.

    With input x of C channels, C' output channels, and the identity only where C = C' and the stride is 1:

    - ``qarep``:  act(BN(BN3(conv3x3(x)) + conv1x1(x) + x)); no BatchNorm on the 1x1 and identity branches, which keeps
      INT8 accuracy (Chu et al., "Make RepVGG Greater Again: A Quantization-Aware Approach", AAAI 2024, section 4).
    - ``repvgg``: act(BN3(conv3x3(x)) + BN1(conv1x1(x)) + BN0(x)) (Ding et al., CVPR 2021, section 3.2).
    - ``multi``:  the same with ``branches`` parallel 3x3 + BN, one 1x3 + BN and one 3x1 + BN (Vasu et al., "MobileOne",
      CVPR 2023, section 3.2; Ding et al., "ACNet", ICCV 2019).

    It subclasses ``RepConv`` because the stock ``fuse()`` selects by class: a subclass of ``Conv`` would silently lose
    its branches there. ``conv`` and ``bn`` are the dense branch, named as in the stock ``Conv``, so that stock code
    that reads ``.conv.in_channels`` and stock state dictionaries fit; ``conv1`` is the 1x1 branch, whose presence
    tells the stock ``is_fused()`` that there is work left.

    Args:
        c1: Input channels C.
        c2: Output channels C'.
        s: Stride.
        g: Groups.
        d: Dilation (the padding follows it).
        act: True for the Ultralytics default, False for none, or a module.
        form: One of ``qarep``, ``repvgg``, ``multi``.
        identity: Allow the identity branch where shapes permit it.
        branches: Number of parallel 3x3 branches of ``multi``.

    Raises:
        ModelError: ``form`` is unknown or ``branches`` is less than 1.
    """

    conv: nn.Conv2d
    bn: nn.BatchNorm2d
    conv1: nn.Conv2d
    bn1: nn.BatchNorm2d | None
    bn0: nn.BatchNorm2d | None
    bn_out: nn.BatchNorm2d | None
    extra: nn.ModuleList

    def __init__(
        self,
        c1: int,
        c2: int,
        s: int = 1,
        g: int = 1,
        d: int = 1,
        act: bool | nn.Module = True,
        form: str = "qarep",
        identity: bool = True,
        branches: int = 2,
    ) -> None:
        nn.Module.__init__(self)  # RepConv's own constructor would build other branches
        if form not in FORMS:
            raise ModelError(f"form '{form}' is not one of {', '.join(FORMS)}{nearest(form, FORMS)}")
        if branches < 1:
            raise ModelError(f"branches={branches}: at least one 3x3 branch is needed")
        self.c1, self.c2, self.g, self.form = c1, c2, g, form
        self.act = act if isinstance(act, nn.Module) else Conv.default_act if act else nn.Identity()
        has_identity = identity and c1 == c2 and s == 1
        with_bn = form != "qarep"
        self.skip = has_identity and not with_bn
        self.conv = _conv(c1, c2, (SIZE, SIZE), s, g, d)
        self.bn = _batch_norm(c2)
        self.conv1 = _conv(c1, c2, (1, 1), s, g, d)
        self.bn1 = _batch_norm(c2) if with_bn else None
        self.bn0 = _batch_norm(c2) if with_bn and has_identity else None
        kernels = [(SIZE, SIZE)] * (branches - 1) + [(1, SIZE), (SIZE, 1)] if form == "multi" else []
        self.extra = nn.ModuleList(ConvBN(c1, c2, k, s, g, d) for k in kernels)
        self.bn_out = None if with_bn else _batch_norm(c2)

    @classmethod
    def from_conv(cls, conv: Conv, form: str = "qarep", identity: bool = True, branches: int = 2) -> RepBlock:
        """Return an untrained block with the shape, activation, dtype, device and mode of a stock 3x3 ``Conv``."""
        dense = conv.conv
        block = cls(
            dense.in_channels,
            dense.out_channels,
            dense.stride[0],
            dense.groups,
            dense.dilation[0],
            conv.act,
            form,
            identity,
            branches,
        )
        block.to(dense.weight.device, dense.weight.dtype).train(conv.training)
        return block.requires_grad_(dense.weight.requires_grad)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', H / s, W / s)."""
        if self.merged_already:
            return self.forward_fuse(x)
        y = self.bn(self.conv(x))
        side = self.conv1(x)
        y = y + (side if self.bn1 is None else self.bn1(side))
        for branch in self.extra:
            y = y + branch(x)
        if self.bn0 is not None:
            y = y + self.bn0(x)
        elif self.skip:
            y = y + x
        return self.act(y if self.bn_out is None else self.bn_out(y))

    @property
    def merged_already(self) -> bool:
        """Whether only the single deployment convolution is left."""
        return not hasattr(self, "conv1")

    @torch.no_grad()
    def merged(self) -> KernelBias:
        """Return the kernel (C', C / groups, 3, 3) and bias (C') that compute this block before its activation.

        Computed in float64 from the running statistics, returned in the dtype and on the device of the dense kernel.
        """
        kernel, bias = self._merged_double()
        return kernel.to(self.conv.weight.dtype), bias.to(self.conv.weight.dtype)

    def get_equivalent_kernel_bias(self) -> KernelBias:
        """Return ``merged()``: the name under which stock ``RepConv`` offers it."""
        return self.merged()

    def fuse_convs(self) -> None:
        """Replace all branches by one convolution with bias, in place; stock ``fuse()`` calls this. Idempotent."""
        if self.merged_already:
            return
        kernel, bias = self.merged()
        dense = self.conv
        with torch.random.fork_rng(devices=[]):  # the discarded initial weights must not move the caller's generator
            conv = nn.Conv2d(
                self.c1,
                self.c2,
                SIZE,
                dense.stride,  # type: ignore[arg-type]
                dense.padding,  # type: ignore[arg-type]
                dense.dilation,  # type: ignore[arg-type]
                self.g,
                bias=True,
            )
        conv = conv.to(kernel.device, kernel.dtype).requires_grad_(False)
        conv.load_state_dict({"weight": kernel, "bias": bias})
        conv.train(self.training)
        for name in ("bn", "conv1", "bn1", "bn0", "bn_out", "extra"):
            delattr(self, name)
        self.conv = conv

    @torch.no_grad()
    def inherit(self, kernel: Tensor, bn: nn.BatchNorm2d) -> None:
        """Take over a trained convolution + BatchNorm: the block then computes exactly what they do.

        The dense branch becomes the convolution; every new branch starts at zero effect: BatchNorm scale 0 (``repvgg``,
        ``multi``), or a zero 1x1 kernel, minus the identity where there is one (``qarep``). The outer BatchNorm of
        ``qarep`` takes the trained scale and shift, and as running statistics those of the inner BatchNorm's output
        (mean 0, variance v / (v + eps)), so that it is the identity in eval mode, and in train mode too as long as the
        batch statistics equal the running ones.

        Args:
            kernel: Trained weight (C', C / groups, kh, kw) with kh, kw in {1, 3}; centred in the 3x3 kernel.
            bn: The trained BatchNorm (C').
        """
        self.conv.weight.copy_(reparam.pad_to(kernel, SIZE))
        _copy_bn(bn, self.bn)
        if self.bn_out is None:
            for new in self._branch_norms()[1:]:
                nn.init.zeros_(new.weight)
                nn.init.zeros_(new.bias)
            return
        nn.init.ones_(self.bn.weight)
        nn.init.zeros_(self.bn.bias)
        variance = reparam.bn_variance(self.bn)  # of the inner BatchNorm's output, now that its scale is 1
        self.bn_out.eps, self.bn_out.momentum = bn.eps, bn.momentum
        _set_bn(self.bn_out, torch.zeros_like(variance), variance, reparam.bn_gamma(bn), reparam.bn_beta(bn))
        nn.init.zeros_(self.conv1.weight)
        if self.skip:
            self.conv1.weight.copy_(-reparam.identity_kernel(self.c1, self.g, 1))

    @torch.no_grad()
    def to_conv(self) -> Conv:
        """Return a stock Ultralytics ``Conv`` that computes this block in eval mode.

        The merged bias b needs a BatchNorm to sit in. Any running mean m and variance v with scale sqrt(v + eps) and
        shift b + m are exact; the block's own output statistics are chosen (the mean exactly, the variance as if
        branches were uncorrelated), so that the result can also be trained on without a jump.
        """
        dense = self.conv
        with torch.random.fork_rng(devices=[]):
            conv = Conv(self.c1, self.c2, SIZE, dense.stride[0], None, self.g, dense.dilation[0], self.act)
        conv.to(dense.weight.device, dense.weight.dtype).train(self.training)
        kernel, bias = self._merged_double()
        mean, variance = (bias, torch.ones_like(bias)) if self.merged_already else self._output_moments()
        conv.bn.eps, conv.bn.momentum = _EPS, _MOMENTUM
        conv.conv.weight.copy_(kernel)
        _set_bn(conv.bn, mean - bias, variance, None, mean)
        return conv.requires_grad_(dense.weight.requires_grad)

    @torch.no_grad()
    def _merged_double(self) -> KernelBias:
        """Return the merged kernel and bias in float64."""
        if self.merged_already:
            assert self.conv.bias is not None  # fuse_convs() made it
            return self.conv.weight.double(), self.conv.bias.double()
        parts = [reparam.fold_bn(self.conv.weight, None, self.bn)]
        pointwise = self.conv1.weight.double()
        zero = pointwise.new_zeros(self.c2)
        parts.append((pointwise, zero) if self.bn1 is None else reparam.fold_bn(pointwise, None, self.bn1))
        parts += [reparam.fold_bn(branch.conv.weight, None, branch.bn) for branch in self._extra_branches()]
        if self.skip or self.bn0 is not None:
            dirac = reparam.identity_kernel(self.c1, self.g, SIZE, device=pointwise.device)
            parts.append((dirac, zero) if self.bn0 is None else reparam.fold_bn(dirac, None, self.bn0))
        kernel, bias = reparam.merge_branches(parts, SIZE)
        return (kernel, bias) if self.bn_out is None else reparam.fold_bn(kernel, bias, self.bn_out)

    def _output_moments(self) -> tuple[Tensor, Tensor]:
        """Return mean and variance (C') of the output before the activation, from the BatchNorms' own statistics."""
        if self.bn_out is not None:
            return reparam.bn_beta(self.bn_out), reparam.bn_variance(self.bn_out)
        norms = self._branch_norms()
        means = torch.stack([reparam.bn_beta(bn) for bn in norms])
        variances = torch.stack([reparam.bn_variance(bn) for bn in norms])
        return means.sum(0), variances.sum(0)

    def _extra_branches(self) -> list[ConvBN]:
        return [branch for branch in self.extra if isinstance(branch, ConvBN)]

    def _branch_norms(self) -> list[nn.BatchNorm2d]:
        """Return the BatchNorms of the parallel branches, the dense one first; without the outer one."""
        norms = (self.bn, self.bn1, self.bn0, *(branch.bn for branch in self._extra_branches()))
        return [bn for bn in norms if bn is not None]


_EPS, _MOMENTUM = 1e-3, 0.03  # what ultralytics.utils.torch_utils.initialize_weights gives every BatchNorm


def _conv(c1: int, c2: int, k: tuple[int, int], s: int, g: int, d: int) -> nn.Conv2d:
    padding = (d * (k[0] // 2), d * (k[1] // 2))
    return nn.Conv2d(c1, c2, k, s, padding, d, g, bias=False)


def _batch_norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=_EPS, momentum=_MOMENTUM)


def _copy_bn(source: nn.BatchNorm2d, target: nn.BatchNorm2d) -> None:
    """Copy statistics, scale, shift, eps and momentum."""
    target.eps, target.momentum = source.eps, source.momentum
    target.load_state_dict(source.state_dict())


def _set_bn(bn: nn.BatchNorm2d, mean: Tensor, variance: Tensor, gamma: Tensor | None, beta: Tensor) -> None:
    """Set statistics and shift (C), and the scale sqrt(variance + eps), times ``gamma`` (C) when given.

    The scale is rounded to the BatchNorm's dtype first and the variance fitted to it: scale / sqrt(variance + eps) is
    then ``gamma`` to the rounding of one number instead of two.
    """
    gamma = torch.ones_like(variance) if gamma is None else gamma
    scale = ((variance + bn.eps).sqrt() * gamma).to(bn.weight.dtype)
    fitted = (scale.double() / gamma) ** 2 - bn.eps
    fitted = torch.where(torch.isfinite(fitted) & (fitted >= 0), fitted, variance)  # gamma 0, or variance far below eps
    state = {"running_mean": mean, "running_var": fitted, "weight": scale, "bias": beta}
    bn.load_state_dict({**state, "num_batches_tracked": torch.zeros((), dtype=torch.long)})
