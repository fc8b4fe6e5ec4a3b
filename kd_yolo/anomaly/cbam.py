"""Convolutional block attention, in its canonical form, starting as the identity."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from ultralytics.nn.modules.block import Bottleneck

REDUCTION = 16
MIN_WIDTH = 4  # of the channel gate's hidden layer: nano students have few channels
KERNEL = 7


class CBAM(nn.Module):
    """Channel gate, then spatial gate (Woo et al., "CBAM: Convolutional Block Attention Module", ECCV 2018, 3).

    Channel gate: sigmoid(MLP(avgpool x) + MLP(maxpool x)) with one shared MLP; spatial gate: sigmoid(BN(conv7x7([max
    over channels; mean over channels]))). The class of that name in Ultralytics is another one: average pooling only,
    no reduction, no BatchNorm.

    Our choice: both gates are doubled and their last layer starts at zero, so that the block starts as the identity;
    two plain sigmoid gates would shrink activations four times per level.

    Args:
        channels: Channels C of the map.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(channels // REDUCTION, MIN_WIDTH)
        self.reduce = nn.Conv2d(channels, hidden, 1)
        self.expand = nn.Conv2d(hidden, channels, 1)
        self.spatial = nn.Conv2d(2, 1, KERNEL, padding=KERNEL // 2, bias=False)
        self.bn = nn.BatchNorm2d(1)
        nn.init.zeros_(self.expand.weight)
        nn.init.zeros_(self.expand.bias)  # type: ignore[arg-type]
        nn.init.zeros_(self.bn.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return the gated map, (B, C, H, W)."""
        pooled = self._mlp(F.adaptive_avg_pool2d(x, 1)) + self._mlp(F.adaptive_max_pool2d(x, 1))
        x = x * (2 * pooled.sigmoid())
        summary = torch.cat((x.amax(1, keepdim=True), x.mean(1, keepdim=True)), 1)
        return x * (2 * self.bn(self.spatial(summary)).sigmoid())

    def _mlp(self, pooled: Tensor) -> Tensor:
        return self.expand(F.relu(self.reduce(pooled)))


def add_to_blocks(module: nn.Module) -> int:
    """Put a CBAM into every bottleneck, at the end of the branch just before the addition, in place.

    This is where the paper on CBAM puts it in residual networks (its figure 3).

    Returns:
        The number of bottlenecks changed.
    """
    found = [block for block in module.modules() if isinstance(block, Bottleneck)]
    for block in found:
        block.cv2 = nn.Sequential(block.cv2, CBAM(_channels(block.cv2)))
    return len(found)


def _channels(conv: nn.Module) -> int:
    """Return the output channels of a stock Conv or a RepBlock."""
    return next(part.out_channels for part in conv.modules() if isinstance(part, nn.Conv2d))
