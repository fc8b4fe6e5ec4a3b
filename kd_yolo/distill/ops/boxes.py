"""Raw box outputs (B, 4 R, A): decoding, overlaps, distributions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from ultralytics.utils.metrics import bbox_iou
from ultralytics.utils.tal import dist2bbox

from kd_yolo.distill.base import Taps, at_least_float32
from kd_yolo.distill.ops.logits import positive


def distribution_loss(student: Tensor, teacher: Tensor, weight: Tensor, reg_max: int) -> Tensor:
    """Return the KL over the R bins of a side, mean over the four sides, weighted mean over anchors; not tempered.

    Args:
        student: Bin logits, (B, 4 R, A), side by side.
        teacher: Bin logits without gradient, (B, 4 R, A).
        weight: c_a, (B, A).
        reg_max: R.
    """
    shape = (student.shape[0], 4, reg_max, student.shape[-1])
    log_q, log_p = student.reshape(shape).log_softmax(2), teacher.reshape(shape).log_softmax(2)
    divergence = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum((1, 2)) / 4
    return (weight * divergence).sum() / positive(weight.sum())


def overlap_loss(student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    """Return 1 - CIoU (Zheng et al., arXiv:1911.08287), weighted mean over anchors.

    A teacher's box without area (``reg_max`` = 1 allows one on background) says nothing and makes CIoU unbounded; it
    gets no weight.

    Args:
        student: Corners x1 y1 x2 y2, (B, A, 4).
        teacher: Corners without gradient, (B, A, 4).
        weight: c_a, (B, A).
    """
    weight = weight * (teacher[..., 2:] > teacher[..., :2]).all(-1)
    ciou = bbox_iou(student, teacher, xywh=False, CIoU=True).squeeze(-1)
    return (weight * (1.0 - ciou)).sum() / positive(weight.sum())


def decode_boxes(taps: Taps, reg_max: int) -> Tensor:
    """Return corners x1 y1 x2 y2 in pixels, (B, A, 4), from distances (R = 1) or the mean over bins (R > 1)."""
    boxes = at_least_float32(taps.boxes)
    batch, _, anchors = boxes.shape
    if reg_max > 1:
        bins = torch.arange(reg_max, device=boxes.device, dtype=boxes.dtype)
        boxes = torch.einsum("bsra,r->bsa", boxes.reshape(batch, 4, reg_max, anchors).softmax(2), bins)
    corners = dist2bbox(boxes.transpose(1, 2), taps.anchors.to(boxes.dtype), xywh=False)
    return corners * taps.strides.to(boxes.dtype).unsqueeze(-1)
