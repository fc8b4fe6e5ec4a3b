"""What makes a student level and a teacher map comparable: one projector per level."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class StudentProjector(nn.Module):
    """Q_l: 1x1 convolution, BatchNorm, ReLU, 1x1 convolution, to the teacher's channels (our choice).

    1x1 kernels keep the evidence of a position at that position.

    Args:
        c1: Channels C_l of the student level.
        c2: Channels C_T of the teacher map.

    Attributes:
        scale: Factor on the output; C_T ** -0.5 makes sums of squares means. Folded into the kernel at deployment.
    """

    def __init__(self, c1: int, c2: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c1, c2, 1, bias=False)
        self.bn = nn.BatchNorm2d(c2)
        self.conv2 = nn.Conv2d(c2, c2, 1)
        self.scale = c2**-0.5

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C_l, h, w) to (B, C_T, h, w)."""
        y = self.conv2(F.relu(self.bn(self.conv1(x))))
        return y if self.scale == 1 else y * self.scale


class FrozenProjector(nn.Module):
    """P_l, not trained: a fixed orthogonal 1x1 map of the teacher's channels to the student's; a buffer, no parameter.

    Args:
        c1: Channels C_T of the teacher map.
        c2: Channels C_l of the student level.
        seed: Of the kernel.
    """

    weight: Tensor

    def __init__(self, c1: int, c2: int, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        square, _ = torch.linalg.qr(torch.randn(max(c1, c2), max(c1, c2), generator=generator))
        self.register_buffer("weight", square[:c2, :c1].contiguous().reshape(c2, c1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C_T, h, w) to (B, C_l, h, w)."""
        return F.conv2d(x, self.weight)


class AnchorProjector(nn.Module):
    """R_l: one 1x1 convolution from the student level to the teacher's channels at the same stride.

    Args:
        c1: Channels C_l of the student level.
        c2: Channels of the teacher map.

    Attributes:
        scale: As of ``StudentProjector``.
    """

    def __init__(self, c1: int, c2: int) -> None:
        super().__init__()
        self.conv2 = nn.Conv2d(c1, c2, 1)
        self.scale = c2**-0.5

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C_l, h, w) to (B, C_T, h, w)."""
        y = self.conv2(x)
        return y if self.scale == 1 else y * self.scale
