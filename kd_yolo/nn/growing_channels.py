"""Which channels of a larger network repeat which channels of a small one, and convolutions that respect it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

UNREAD = -1  # a feature that only the large network has: every reader starts with weight 0 for it


@dataclass(frozen=True)
class Channels:
    """What the channels of a tensor in the large network are, seen from the small one.

    Attributes:
        source: (C,) int64, for every channel of the large network's tensor the channel of the small network's tensor
            that it repeats, or ``UNREAD``. Every channel of the small one is there at least once.
        width: Number of channels of the small network's tensor.
    """

    source: Tensor
    width: int

    def __len__(self) -> int:
        return len(self.source)

    def same(self, other: Channels) -> bool:
        """Return whether both describe the same tensor."""
        return self.width == other.width and torch.equal(self.source, other.source)

    def unread(self) -> Channels:
        """Return channels that hold new features only."""
        return Channels(torch.full_like(self.source, UNREAD), self.width)


def repeated(width: int, size: int) -> Channels:
    """Return ``size`` channels that repeat ``width`` channels in turn: 0, 1, ..., width - 1, 0, 1, ...

    Whole groups of channels, such as the heads of an attention, are repeated as groups wherever ``size`` is a multiple
    of the group's size.
    """
    return Channels(torch.arange(size) % width, width)


def joined(parts: Sequence[Channels], extra: Sequence[Channels] = ()) -> Channels:
    """Return the channels of a concatenation.

    Args:
        parts: What both networks concatenate, in order.
        extra: What the large network concatenates behind it: repetitions of the last of ``parts``, or unread.
    """
    sources, width = [], 0
    for part in parts:
        sources.append(_shifted(part.source, width))
        width += part.width
    sources += [_shifted(part.source, width - parts[-1].width) for part in extra]
    return Channels(torch.cat(sources), width)


def wide_kernel(weight: Tensor, inputs: Channels, outputs: Channels, generator: torch.Generator) -> Tensor:
    """Return a convolution's weight for more channels, such that every output repeats what it repeated before.

    An output channel takes the filter of the channel it repeats. Of the k repetitions of an input it reads one, drawn
    at random, with the whole weight, and the others with weight 0: the weights over the repetitions sum to the old
    one, as function-preserving widening asks (Net2Net, arXiv:1511.05641, section "Net2WiderNet", which gives each
    repetition 1/k). Drawn weights are exact in any dtype, keep the norm of each filter, and break the symmetry without
    noise: repetitions are read by different filters, so their gradients differ from the first step (uneven shares for
    this purpose: LEMON, arXiv:2310.07999, figure 3). Each repetition is read by an equal number of filters, up to one.

    Args:
        weight: (o, i, h, w) of the small network.
        inputs: I channels that repeat i.
        outputs: O channels that repeat o.
        generator: For the draws.

    Returns:
        (O, I, h, w).
    """
    rows = weight[outputs.source]
    chosen = _drawn(inputs, len(outputs), generator)[:, :, None, None].expand_as(rows)
    return rows.new_zeros(len(outputs), len(inputs), *weight.shape[2:]).scatter_(1, chosen, rows)


def copy_batchnorm(small: nn.BatchNorm2d, large: nn.BatchNorm2d, outputs: Channels) -> int:
    """Copy scale, shift and statistics; repetitions compute the same, so the statistics are theirs too.

    Returns:
        How many parameters were copied.
    """
    for name in ("weight", "bias", "running_mean", "running_var"):
        getattr(large, name).data.copy_(getattr(small, name)[outputs.source])
    if small.num_batches_tracked is not None and large.num_batches_tracked is not None:
        large.num_batches_tracked.copy_(small.num_batches_tracked)
    large.eps, large.momentum = small.eps, small.momentum
    return 2 * len(outputs)


def _shifted(source: Tensor, offset: int) -> Tensor:
    return torch.where(source == UNREAD, source, source + offset)


def _drawn(inputs: Channels, rows: int, generator: torch.Generator) -> Tensor:
    """Return (rows, width): for every row and small channel, the position of one repetition in the large tensor."""
    order = torch.argsort(inputs.source, stable=True)  # unread ones first, then the repetitions of 0, of 1, ...
    counts = torch.bincount(inputs.source[inputs.source != UNREAD], minlength=inputs.width)
    first = int((inputs.source == UNREAD).sum()) + counts.cumsum(0) - counts
    shuffled = torch.rand(inputs.width, rows, generator=generator).argsort(1).T  # every column permutes the rows
    return order[first + shuffled % counts]
