"""EfficientNet-Lite feature extractor: ReLU6, no squeeze-and-excitation, made for small devices."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

# Width and depth factors of the family (the TensorFlow TPU repository, efficientnet/lite).
SCALES = {
    "efficientnet-lite0": (1.0, 1.0),
    "efficientnet-lite1": (1.0, 1.1),
    "efficientnet-lite2": (1.1, 1.2),
    "efficientnet-lite3": (1.2, 1.4),
    "efficientnet-lite4": (1.4, 1.8),
}
STEM = 32  # the stem is not scaled with the width
# Repeats, kernel, stride, expansion, output channels of each stage of EfficientNet-B0 (Tan, Le, ICML 2019, table 1).
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
EPS = 1e-3


class ConvNorm(nn.Module):
    """Convolution without bias, BatchNorm, and ReLU6 unless ``act`` is false.

    TensorFlow pads "SAME" on the right and bottom first. At an even size and stride 2 that is one cell less on the left
    than on the right: written as a constant padding, so that exported graphs compute no shapes.
    """

    def __init__(self, c1: int, c2: int, k: int = 1, s: int = 1, g: int = 1, act: bool = True) -> None:
        super().__init__()
        before = (k - s) // 2
        self.pad = nn.ZeroPad2d((before, k - s - before) * 2) if s > 1 else nn.Identity()
        self.conv = nn.Conv2d(c1, c2, k, s, k // 2 if s == 1 else 0, groups=g, bias=False)
        self.bn = nn.BatchNorm2d(c2, eps=EPS)
        self.act = nn.ReLU6(inplace=True) if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', H / s, W / s)."""
        return self.act(self.bn(self.conv(self.pad(x))))


class LiteBlock(nn.Module):
    """Inverted residual: 1x1 expansion, depthwise convolution, linear 1x1 projection, and the input where it fits."""

    def __init__(self, c1: int, c2: int, k: int, s: int, expansion: int) -> None:
        super().__init__()
        width = c1 * expansion
        self.expand = ConvNorm(c1, width) if expansion > 1 else nn.Identity()
        self.depthwise = ConvNorm(width, width, k, s, width)
        self.project = ConvNorm(width, c2, act=False)
        self.skip = s == 1 and c1 == c2

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', H / s, W / s)."""
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.skip else y


def lite_chain(name: str) -> list[nn.Module]:
    """Return stem and blocks of an untrained EfficientNet-Lite, to be run one after the other.

    Args:
        name: A key of ``SCALES``.
    """
    width, depth = SCALES[name]
    chain: list[nn.Module] = [ConvNorm(3, STEM, 3, 2)]
    channels = STEM
    for number, (repeats, kernel, stride, expansion, base) in enumerate(STAGES):
        out = _round_channels(base * width)
        scaled = repeats if number in (0, len(STAGES) - 1) else math.ceil(repeats * depth)
        for index in range(scaled):
            chain.append(LiteBlock(channels, out, kernel, stride if index == 0 else 1, expansion))
            channels = out
    return chain


def load_lite(chain: Sequence[nn.Module], state: Mapping[str, Tensor]) -> list[str]:
    """Load weights named as in ``efficientnet-lite-pytorch`` into the first blocks of a network.

    Args:
        chain: ``lite_chain``, or its first modules.
        state: A state dictionary of the whole network; its classifier and later blocks are not used.

    Returns:
        What does not fit: names that are missing or whose shapes differ; empty when all was loaded.
    """
    wrong: list[str] = []
    for index, module in enumerate(chain):
        own: dict[str, Tensor] = {}
        for key, value in module.state_dict().items():
            name = _wheel_name(index, key)
            if name not in state or state[name].shape != value.shape:
                wrong.append(name)
            else:
                own[key] = state[name]
        module.load_state_dict(own, strict=False)
    return wrong


def _wheel_name(index: int, key: str) -> str:
    """Translate the name of a tensor of module ``index``: the wheel numbers a block's BatchNorms in their order."""
    if index == 0:
        return re.sub(r"^conv\.", "_conv_stem.", re.sub(r"^bn\.", "_bn0.", key))
    part, kind, leaf = key.split(".")
    if kind == "bn":
        return f"_blocks.{index - 1}._bn{('expand', 'depthwise', 'project').index(part)}.{leaf}"
    return f"_blocks.{index - 1}._{part}_conv.{leaf}"


def _round_channels(channels: float) -> int:
    """Round to a multiple of 8, never down by more than a tenth."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded
