"""Ground-truth boxes on a feature grid: foreground and background weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# In cells. A box that ends on a cell edge must not grow by a cell because its corner came out as 4.9999995.
ROUNDING = 1e-4


def ground_truth(batch: Mapping[str, Any], like: Tensor) -> tuple[Tensor, Tensor]:
    """Return boxes (N, 4), centre x, centre y, width, height in 0..1, and the image of each, (N,) integers.

    Args:
        batch: A training batch; without boxes N is 0.
        like: A tensor of the device and type that are wanted.
    """
    if batch.get("bboxes") is None or batch.get("batch_idx") is None:
        return like.new_zeros(0, 4), torch.zeros(0, dtype=torch.long, device=like.device)
    return batch["bboxes"].to(like), batch["batch_idx"].to(like.device).flatten().long()


def grid_boxes(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Return first and last cell of each box, X1 Y1 X2 Y2, (N, 4): both ends belong to it; not clipped to the grid.

    X1 = floor(x1 W), X2 = ceil(x2 W), and so for Y: what the released code of FGD (Yang et al., CVPR 2022,
    arXiv:2111.11837) and its descendants do. A box grows by up to a cell to the right and to the bottom.

    Args:
        boxes: Centre x, centre y, width, height in 0..1 of the canvas, (N, 4).
        size: H, W of the grid.
    """
    scale = boxes.new_tensor([size[1], size[0]])
    half = boxes[:, 2:] / 2
    first = ((boxes[:, :2] - half) * scale + ROUNDING).floor()
    last = ((boxes[:, :2] + half) * scale - ROUNDING).ceil()
    return torch.cat([first, last], 1)


@torch.no_grad()
def decoupled_masks(boxes: Tensor, image: Tensor, images: int, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return the weights of foreground and background cells, both (B, H, W); FGD, equations 2 to 4.

    A foreground cell gets 1 / area of its box (in cells, before clipping), the largest where boxes overlap: every box
    counts alike, whatever its size. Background cells of an image share a sum of 1; an image that its boxes cover has
    none.

    Args:
        boxes: Centre x, centre y, width, height in 0..1 of the canvas, (N, 4).
        image: Image of each box, (N,) integers.
        images: B.
        size: H, W.
    """
    height, width = size
    x1, y1, x2, y2 = (edge.unsqueeze(1) for edge in grid_boxes(boxes, size).unbind(1))
    columns, rows = (torch.arange(n, device=boxes.device, dtype=boxes.dtype) for n in (width, height))
    inside_x, inside_y = (columns >= x1) & (columns <= x2), (rows >= y1) & (rows <= y2)
    share = 1.0 / ((y2 - y1 + 1) * (x2 - x1 + 1))
    weight = (inside_y * share).unsqueeze(2) * inside_x.unsqueeze(1)
    foreground = boxes.new_zeros(images, height, width)
    index = image.reshape(-1, 1, 1).expand(-1, height, width)
    foreground = foreground.scatter_reduce(0, index, weight, "amax") if len(boxes) else foreground
    outside = foreground == 0
    background = outside / outside.sum((1, 2), keepdim=True).clamp_min(1)
    return foreground, background.to(foreground)
