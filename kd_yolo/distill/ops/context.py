"""Global context of a feature map.

GcBlock: Cao et al., "GCNet: Non-local Networks Meet Squeeze-Excitation Networks and Beyond", ICCVW 2019,
arXiv:1904.11492, figure 4 (d).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def context_block(channels: int) -> nn.ModuleDict:
    """Return a block's layers: ``mask`` (C to 1) and ``transform`` (C to C / 2 to C), which starts at 0."""
    middle = max(channels // 2, 1)
    last = nn.Linear(middle, channels)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    transform = nn.Sequential(nn.Linear(channels, middle), nn.LayerNorm(middle), nn.ReLU(), last)
    return nn.ModuleDict({"mask": nn.Conv2d(channels, 1, 1), "transform": transform})


def global_context(feature: Tensor, block: Any) -> Tensor:
    """Return F + W_2 ReLU(LN(W_1 sum_p softmax_p(W_k F) F_p)), (B, C, H, W).

    One softmax over the cells for the whole map, so the cost is linear in H W.

    Args:
        feature: F, (B, C, H, W).
        block: See ``context_block``.
    """
    attention = block["mask"](feature).flatten(2).softmax(-1)
    context = (feature.flatten(2) @ attention.transpose(1, 2)).squeeze(-1)
    return feature + block["transform"](context)[:, :, None, None]
