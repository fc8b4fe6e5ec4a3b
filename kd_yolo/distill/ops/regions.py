"""Which anchors lie near a ground truth: (B, A) booleans from boxes, without a trained detector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from ultralytics.utils.metrics import bbox_iou

# Anchors of each level that set a ground truth's positive threshold (ATSS, section 3.2).
CANDIDATES = 9


def ground_truth_corners(
    batch: Mapping[str, Any], images: int, canvas: tuple[int, int], device: torch.device
) -> list[Tensor]:
    """Return the ground truth of every image as corners x1 y1 x2 y2 in pixels, B tensors of (M_b, 4).

    Args:
        batch: With ``bboxes`` (N, 4), centre and size in 0..1 of the canvas, and ``batch_idx`` (N,).
        images: B.
        canvas: Width and height in pixels.
        device: Where the boxes are needed.
    """
    boxes, image = batch["bboxes"].to(device).float(), batch["batch_idx"].to(device)
    pixels = boxes * torch.tensor([*canvas, *canvas], dtype=boxes.dtype, device=device)
    corners = torch.cat([pixels[:, :2] - pixels[:, 2:] / 2, pixels[:, :2] + pixels[:, 2:] / 2], dim=1)
    return [corners[image == number] for number in range(images)]


@torch.no_grad()
def valuable_region(
    boxes: Sequence[Tensor], centres: Tensor, sides: Tensor, sizes: Sequence[int], gamma: float
) -> Tensor:
    """Return the anchors whose box has DIoU >= gamma alpha_pos with some ground truth, or its highest DIoU, (B, A).

    Args:
        boxes: Ground truth of every image, corners in pixels, B tensors of (M_b, 4).
        centres: Anchor centres in pixels, (A, 2).
        sides: Side of every anchor's square box in pixels, (A,).
        sizes: Number of anchors of each level; they add up to A.
        gamma: Share of alpha_pos.
    """
    half = sides.unsqueeze(-1) / 2
    anchors = torch.cat([centres - half, centres + half], dim=1).unsqueeze(0)
    region = torch.zeros(len(boxes), centres.shape[0], dtype=torch.bool, device=centres.device)
    for number, truth in enumerate(boxes):  # image by image: all ground truths at once would need (B, M, A) memory
        if len(truth):
            distance_iou = bbox_iou(truth.unsqueeze(1), anchors, xywh=False, DIoU=True).squeeze(-1)
            threshold = (gamma * positive_threshold(truth, anchors, sizes)).minimum(distance_iou.amax(1))
            region[number] = (distance_iou >= threshold.unsqueeze(-1)).any(0)
    return region


def positive_threshold(truth: Tensor, anchors: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return alpha_pos of every ground truth as ATSS sets it, (M,): mean + standard deviation of its candidates' IoU.

    Args:
        truth: Corners in pixels, (M, 4).
        anchors: Corners in pixels, (1, A, 4).
        sizes: Number of anchors of each level.
    """
    overlap = bbox_iou(truth.unsqueeze(1), anchors, xywh=False).squeeze(-1)
    between = _centres(truth).unsqueeze(1) - _centres(anchors)
    chosen = []
    for far, iou in zip(between.norm(dim=-1).split(list(sizes), 1), overlap.split(list(sizes), 1), strict=True):
        closest = far.topk(min(CANDIDATES, far.shape[1]), dim=1, largest=False).indices
        chosen.append(iou.gather(1, closest))
    candidates = torch.cat(chosen, dim=1)
    return candidates.mean(1) + candidates.std(1, unbiased=False)


def _centres(corners: Tensor) -> Tensor:
    return (corners[..., :2] + corners[..., 2:]) / 2
