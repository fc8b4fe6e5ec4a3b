"""What teachers share that have no Ultralytics head: answers at the student's anchors, as pure functions of tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from ultralytics.utils.tal import make_anchors

from kd_yolo.distill.base import DetectorSpec, LevelSpec, Taps
from kd_yolo.distill.teacher import UNKNOWN_CLASS_LOGIT, ClassMap

# Where nothing was detected: probability 1e-4, below every confidence threshold in use and close to what a trained
# sigmoid head says there. Far lower values would drown losses that compare logits.
BACKGROUND_LOGIT = -9.21
# Probabilities are kept this far from 0 and 1: float32 sigmoids saturate, and a logit must stay finite.
PROBABILITY_MARGIN = 1e-6


def dense_spec(strides: Sequence[int], num_classes: int, channels: Mapping[int, int] | None = None) -> DetectorSpec:
    """Return the specification of a teacher that regresses distances (R = 1).

    Args:
        strides: The matched strides.
        num_classes: K.
        channels: Channels of the neck map by stride; without maps 1, for specifications have no 0.
    """
    levels = tuple(LevelSpec(channels[s] if channels else 1, s) for s in strides)
    return DetectorSpec(levels, num_classes, reg_max=1)


def empty_maps(images: Tensor, strides: Sequence[int]) -> tuple[Tensor, ...]:
    """Return maps (B, 0, H_l, W_l): the sizes of the levels and nothing in them."""
    batch, _, height, width = images.shape
    return tuple(images.new_zeros(batch, 0, -(-height // s), -(-width // s)) for s in strides)


def anchor_grid(maps: Sequence[Tensor], strides: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return centres in units of the stride, (A, 2), and strides in pixels, (A,)."""
    values = torch.tensor([float(s) for s in strides], device=maps[0].device)
    anchors, stride_of = make_anchors(list(maps), values, 0.5)
    return anchors.float(), stride_of.flatten().float()


def dense_taps(maps: Sequence[Tensor], strides: Sequence[int], scores: Tensor | None, boxes: Tensor | None) -> Taps:
    """Put taps together; what is None was not read and becomes an empty tensor.

    Args:
        maps: Neck maps at the matched strides, or ``empty_maps``.
        strides: The matched strides.
        scores: Class logits, (B, K, A).
        boxes: Distances left, top, right, bottom in units of the stride, (B, 4, A).
    """
    anchors, stride_of = anchor_grid(maps, strides)
    nothing = maps[0].new_zeros(maps[0].shape[0], 0, len(anchors))
    return Taps(
        neck=tuple(maps),
        scores=nothing if scores is None else scores,
        boxes=nothing if boxes is None else boxes,
        strides=stride_of,
        anchors=anchors,
    )


def distances(corners: Tensor, anchors: Tensor, strides: Tensor) -> Tensor:
    """Return the distances of box sides from the anchors, (B, 4, A), in units of the stride.

    Args:
        corners: x1 y1 x2 y2 in pixels, (B, A, 4).
        anchors: Centres in units of the stride, (A, 2).
        strides: Pixels, (A,).
    """
    scaled = corners / strides.unsqueeze(-1)
    return torch.cat((anchors - scaled[..., :2], scaled[..., 2:] - anchors), -1).transpose(1, 2)


def probability_logits(probabilities: Tensor) -> Tensor:
    """Return logits of probabilities, at most about 13.8 in size."""
    return torch.logit(probabilities.float(), eps=PROBABILITY_MARGIN)


def product_root_logits(first: Tensor, second: Tensor) -> Tensor:
    """Return the logit of sqrt(sigmoid(a) sigmoid(b)), in logarithms: no digit is lost near 0 or 1."""
    log_p = (F.logsigmoid(first) + F.logsigmoid(second)) / 2
    return log_p - torch.log(-torch.expm1(log_p.clamp_max(-PROBABILITY_MARGIN)))


def student_classes(scores: Tensor, class_map: ClassMap) -> Tensor:
    """Return the logits of the student's classes, (B, K, A), from the teacher's own, (B, K', A)."""
    if class_map.identical:
        return scores
    index = torch.tensor(class_map.index, device=scores.device)
    return scores[:, index.clamp_min(0)].masked_fill((index < 0).view(1, -1, 1), UNKNOWN_CLASS_LOGIT)


def known_classes(class_map: ClassMap) -> Tensor | None:
    """Return (K,) booleans, False where the teacher lacks the class, or None when it knows all."""
    return torch.tensor([i >= 0 for i in class_map.index]) if class_map.missing else None


def confidence(scores: Tensor, known: Tensor | None) -> Tensor:
    """Return the highest logit among the known classes of every anchor, (B, A)."""
    return (scores if known is None else scores[:, known]).amax(1)
