"""The convolutions of a narrower network beside those they stand for, and what the latter write."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from ultralytics.nn.modules import Conv

from kd_yolo.nn.growing_channels import Channels
from kd_yolo.nn.reparam import fold_bn, pad_to

ROWS = 24_000  # positions of a feature map that a fit reads at most; deep maps have fewer


@dataclass(frozen=True, eq=False)
class Site:
    """A convolution of the narrow network and the one it stands for.

    Attributes:
        target: ``Conv``, ``RepBlock`` or plain ``nn.Conv2d`` of the narrow network.
        source: ``Conv`` or plain ``nn.Conv2d`` of the source.
        inputs: Channels of the source's input that the target reads.
        outputs: Channels of the source's output that the target writes.
        label: What errors call it.
    """

    target: nn.Module
    source: nn.Module
    inputs: Channels
    outputs: Channels
    label: str = ""

    @property
    def depthwise(self) -> bool:
        """Whether every output channel reads one input channel."""
        return convolution(self.source).groups > 1

    @property
    def end(self) -> nn.Module:
        """The module of the source whose output is what the target must reproduce: before the activation."""
        return self.source.bn if isinstance(self.source, Conv) else self.source

    def affine(self) -> tuple[Tensor, Tensor]:
        """Return the source's folded kernel and bias, sliced: (O, I, kh, kw) and (O,), float64.

        The kernel has the size of the target's; a depthwise one has I = 1.
        """
        conv = convolution(self.source)
        if isinstance(self.source, Conv):
            kernel, bias = fold_bn(conv.weight, conv.bias, self.source.bn)
        else:
            kernel = conv.weight.double()
            bias = kernel.new_zeros(len(kernel)) if conv.bias is None else conv.bias.double()
        kernel = kernel[self.outputs.source]
        kernel = kernel if self.depthwise else kernel[:, self.inputs.source]
        size = convolution(self.target).kernel_size[0]
        return (kernel if size == kernel.shape[-1] else pad_to(kernel, size)), bias[self.outputs.source]


class Samples:
    """What the source's convolutions write before their activations, at drawn positions of drawn channels.

    Args:
        sites: The convolutions.
        images: How many images will be seen.
        rows: How many positions are kept of a map over all images.
        seed: Seed of the draws.
    """

    def __init__(self, sites: Sequence[Site], images: int, rows: int = ROWS, seed: int = 0) -> None:
        self._sites = {site.end: site for site in sites}
        self._images, self._rows, self._seed = images, rows, seed
        self._positions: dict[tuple[int, int], Tensor] = {}
        self._seen: dict[nn.Module, int] = {}
        self._sizes: dict[nn.Module, tuple[int, int]] = {}
        self._kept: dict[nn.Module, list[Tensor]] = {}

    @property
    def ends(self) -> list[nn.Module]:
        """The modules of the source whose outputs ``note`` must see."""
        return list(self._sites)

    def take(self, site: Site) -> tuple[Tensor, Tensor]:
        """Return the positions (R,) in (image, y, x) order and the outputs (R, O) of a site, and forget the latter."""
        return self._drawn(*self._sizes[site.end]), torch.cat(self._kept.pop(site.end))

    def note(self, module: nn.Module, inputs: object, output: Tensor) -> None:
        """Keep what is drawn of the outputs of the next images; a forward hook."""
        site = self._sites[module]
        count, _, height, width = output.shape
        size = height * width
        first = self._seen.get(module, 0)
        positions = self._drawn(height, width)
        here = positions[(positions >= first * size) & (positions < (first + count) * size)] - first * size
        image, place = here.to(output.device) // size, here.to(output.device) % size
        values = output.flatten(2)[image, :, place][:, site.outputs.source.to(output.device)]
        self._kept.setdefault(module, []).append(values)
        self._seen[module] = first + count
        self._sizes[module] = (height, width)

    def _drawn(self, height: int, width: int) -> Tensor:
        """Return the sorted positions of a map size; the same for every map of this size."""
        key = (height, width)
        if key not in self._positions:
            generator = torch.Generator().manual_seed(self._seed)
            total = self._images * height * width
            self._positions[key] = torch.randperm(total, generator=generator)[: self._rows].sort().values
        return self._positions[key]


def convolution(module: nn.Module) -> nn.Conv2d:
    """Return a plain convolution itself, or the one inside a ``Conv`` or ``RepBlock``."""
    conv = module if isinstance(module, nn.Conv2d) else module.conv
    assert isinstance(conv, nn.Conv2d)
    return conv


def geometry(conv: nn.Conv2d) -> list[tuple[int, int]]:
    """Return kernel size, stride, padding and dilation, each as (vertical, horizontal)."""
    assert not isinstance(conv.padding, str)  # Ultralytics gives numbers
    return [(int(y), int(x)) for y, x in (conv.kernel_size, conv.stride, conv.padding, conv.dilation)]


def output_size(conv: nn.Conv2d, x: Tensor) -> tuple[int, int]:
    """Return height and width of what a convolution writes for x (N, C, H, W)."""
    kernel, stride, padding, dilation = geometry(conv)
    sides = [(x.shape[2 + i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in (0, 1)]
    return sides[0], sides[1]
