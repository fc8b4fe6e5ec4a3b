"""Cross-head distillation: the student's held maps go through the rest of the teacher's head.

CrossKD: Wang et al., "CrossKD: Cross-Head Knowledge Distillation for Object Detection", CVPR 2024, arXiv:2306.11369,
section 3.2. Matching the statistics of the two holds is in its released code, not in the paper.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_yolo.distill.base import DetectorSpec, HeadTaps, Taps, at_least_float32
from kd_yolo.distill.ops.boxes import decode_boxes, distribution_loss
from kd_yolo.distill.ops.logits import known_logits, teacher_confidence
from kd_yolo.errors import ConfigError, TeacherError

Hold = Literal["pre", "post"]
STD_EPS = 1e-6


def head_adapters(name: str, student: DetectorSpec, teacher: DetectorSpec, hold: int) -> nn.ModuleDict:
    """Return adapters of the held maps, ``cls`` and ``box``, one 1x1 convolution a level where the widths differ.

    Args:
        name: The method, for messages.
        student: What is to be adapted ...
        teacher: ... and to what.
        hold: Block k whose output is held.

    Raises:
        TeacherError: A detector has no head to cross into.
        ConfigError: The head has fewer blocks.
    """
    for side, spec in (("student", student), ("teacher", teacher)):
        blocks = min(len(level.cls_channels) for level in spec.levels) - 1
        if blocks < 0:
            raise TeacherError(f"{name}: the {side} has no YOLO head to cross; choose another method or teacher")
        if hold > blocks:
            raise ConfigError(f"{name}: k={hold}, but the {side}'s head has {blocks} blocks; give kd.k=0..{blocks}")
    widths = {
        branch: [
            (getattr(mine, f"{branch}_channels")[hold], getattr(theirs, f"{branch}_channels")[hold])
            for mine, theirs in zip(student.levels, teacher.levels, strict=True)
        ]
        for branch in ("cls", "box")
    }
    return nn.ModuleDict(
        {
            branch: nn.ModuleList(
                nn.Identity() if mine == theirs else nn.Conv2d(mine, theirs, 1) for mine, theirs in pairs
            )
            for branch, pairs in widths.items()
        }
    )


def match_statistics(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the student's map with the teacher's mean and unbiased deviation per channel, (B, C, H, W).

    Statistics are over the batch and the cells of the level; the gradient flows through the student's. A single value
    has no deviation and is returned as it is.
    """
    count = student.numel() // student.shape[1]
    if count == 1:
        return student
    deviation, mean = torch.std_mean(teacher, (0, 2, 3))
    # (S - mean) / (std + 1e-6) std_T + mean_T as one fused layer instead of five elementwise ones. The layer divides by
    # the biased deviation without the 1e-6, so both go into its weight; that part's own gradient is below 1e-6.
    own = student.detach().std((0, 2, 3))
    weight = deviation * (own / (own + STD_EPS)) * ((count - 1) / count) ** 0.5
    return F.batch_norm(student, None, None, weight, mean, training=True, eps=STD_EPS**2)


def reused_predictions(
    student: HeadTaps, teacher: HeadTaps, adapters: nn.ModuleDict, hold: Hold
) -> tuple[Tensor, Tensor]:
    """Return what the teacher's head makes of the student's holds: class logits (B, K, A), raw boxes (B, 4 R, A).

    The teacher's layers are frozen; the gradient passes through them to the holds.

    Args:
        student: Holds with gradients.
        teacher: Holds without, and the layers after them.
        adapters: See ``head_adapters``.
        hold: ``pre``: the statistics match before the activation, which then follows, so that the teacher's next block
            sees what it was trained on. ``post``: they match after it and nothing follows.
    """

    def through(branch: str, mine: Sequence[Tensor], theirs: Sequence[Tensor], tails: Sequence[Any]) -> Tensor:
        reused = []
        convolutions = list(adapters[branch].children())
        for adapt, own, other, tail in zip(convolutions, mine, theirs, tails, strict=True):
            own, other = at_least_float32(own), at_least_float32(other.detach())
            if hold == "pre":
                held = teacher.activate(match_statistics(adapt(own), other))
            else:
                held = match_statistics(adapt(student.activate(own)), teacher.activate(other))
            reused.append(tail(held).flatten(2))
        return torch.cat(reused, dim=-1)

    return (
        through("cls", student.cls, teacher.cls, teacher.cls_tail),
        through("box", student.box, teacher.box, teacher.box_tail),
    )


def soft_focal_bce(logits: Tensor, target_logits: Tensor) -> Tensor:
    """Return |s - q| BCE(s, q) elementwise, q = sigmoid(target), s = sigmoid(logits), gradient through both factors.

    Quality focal loss (Li et al., NeurIPS 2020, arXiv:2006.04388, equation 2) with power 1, as CrossKD uses it.
    """
    q = target_logits.sigmoid()
    return (logits.sigmoid() - q).abs() * F.binary_cross_entropy_with_logits(logits, q, reduction="none")


def generalized_overlap_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return 1 - GIoU (Rezatofighi et al., CVPR 2019, arXiv:1902.09630) of corners (B, A, 4), in 0..2, (B, A).

    A box turned inside out, which ``reg_max`` = 1 allows, counts as one without area.
    """
    top_left = torch.maximum(student[..., :2], teacher[..., :2])
    bottom_right = torch.minimum(student[..., 2:], teacher[..., 2:])
    inter = (bottom_right - top_left).clamp_min(0).prod(-1)
    areas = [(box[..., 2:] - box[..., :2]).clamp_min(0).prod(-1) for box in (student, teacher)]
    union = areas[0] + areas[1] - inter
    outer = torch.maximum(student[..., 2:], teacher[..., 2:]) - torch.minimum(student[..., :2], teacher[..., :2])
    hull = outer.clamp_min(0).prod(-1)
    tiny = torch.finfo(union.dtype).eps
    return 1 - inter / (union + tiny) + (hull - union) / (hull + tiny)


def soft_positives(batch: Mapping[str, Any], confidence: Tensor) -> Tensor:
    """Return Z, the number of positives that sums over anchors are divided by, a scalar of at least 1.

    The sum of the assigner's target scores, as in the detection loss; without a target the number of foreground
    anchors; without any (unlabeled images) the sum of the teacher's confidence, so that Z never stays at 1 while
    thousands of anchors are summed.

    Args:
        batch: The training batch.
        confidence: Highest class probability of every anchor, (B, A).
    """
    total = confidence.new_zeros(())
    for key in ("target_scores", "fg_mask"):
        if batch.get(key) is not None:
            total = torch.where(total > 0, total, batch[key].to(confidence).sum())
    return torch.where(total > 0, total, confidence.sum()).clamp_min(1.0)


def crossed_losses(
    scores: Tensor, boxes: Tensor, student: Taps, teacher: Taps, batch: Mapping[str, Any], reg_max: int
) -> tuple[Tensor, Tensor]:
    """Return the class and the box loss between reused and teacher predictions, two scalars.

        L_cls = sum_{a,k} |s - q| BCE(s, q) / Z        L_box = sum_a c_a (1 - GIoU(reused, teacher's)) / Z

    c_a is the teacher's confidence: boxes are distilled everywhere, not on the foreground alone. A teacher's box
    without area says nothing and gets no weight.

    Args:
        scores: Reused class logits, (B, K, A).
        boxes: Reused raw boxes, (B, 4 R, A).
        student: Gives the anchors, which are the teacher's too.
        teacher: Raw predictions without gradient.
        batch: For Z, see ``soft_positives``.
        reg_max: R of the teacher.
    """
    logits = known_logits(teacher.scores.detach(), teacher.class_mask)
    confidence = teacher_confidence(logits)
    positives = soft_positives(batch, confidence)
    cls = soft_focal_bce(known_logits(scores, teacher.class_mask), logits).sum() / positives
    target = decode_boxes(replace(student, boxes=teacher.boxes.detach()), reg_max)
    reused = decode_boxes(replace(student, boxes=boxes), reg_max)
    weight = confidence * (target[..., 2:] > target[..., :2]).all(-1)
    return cls, (weight * generalized_overlap_loss(reused, target)).sum() / positives


def crossed_bins(boxes: Tensor, teacher: Taps, reg_max: int) -> Tensor:
    """Return the KL between the teacher's and the reused bins, weighted by the teacher's confidence, a scalar.

    Args:
        boxes: Reused raw boxes, (B, 4 R, A).
        teacher: Raw predictions without gradient.
        reg_max: R of the teacher, above 1.
    """
    confidence = teacher_confidence(known_logits(teacher.scores.detach(), teacher.class_mask))
    return distribution_loss(boxes, at_least_float32(teacher.boxes.detach()), confidence, reg_max)
