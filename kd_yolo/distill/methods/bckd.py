"""BCKD: binary classification distillation on the logits, IoU-based localization distillation on the boxes.

Yang et al., "Bridging Cross-task Protocol Inconsistency for Distillation in Dense Object Detection", ICCV 2023,
arXiv:2308.14286. A dense head is trained as K binary classifiers, so it is distilled as K binary classifiers (section
on binary classification distillation), and boxes are compared as boxes, which needs no particular box head (section on
IoU-based localization distillation). Per anchor a and class k, teacher logit t, student logit s:

    p = sigmoid(t)        q = sigmoid(s)        w_ak = |p - q|^beta
    kd_bckd_cls = weight cls_weight sum_ak w_ak [-p log q - (1 - p) log(1 - q)] / P
    kd_bckd_box = weight box_weight sum_a max_k(w_ak) (1 - GIoU(student box_a, teacher box_a)) / P

P is the number of foreground anchors of the batch, as in the released code; without an assigner's mask the sum over
anchors of max_k p, the teacher's own count. No temperature. In kd_bckd_cls w is part of the function and carries a
gradient, as in the quality focal loss it resembles; in kd_bckd_box it is a constant. beta = 1, cls_weight = 1,
box_weight = 4 and GIoU (Rezatofighi et al., CVPR 2019) are those of the released configuration.

``kd-lightnet`` borrows |p - q| from here but is another loss: a KL with a detached weight, anchors chosen by the
teacher's confidence and the assigner, boxes weighted by that confidence. Here the disagreement alone decides, so that a
confident mistake of the student on background is corrected too, and boxes both sides classify alike are left alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor
from ultralytics.utils.metrics import bbox_iou

from kd_yolo.distill.base import DetectorSpec, DistillMethod, MethodArgs, Taps, check_same_anchors
from kd_yolo.distill.ops.boxes import decode_boxes
from kd_yolo.distill.ops.logits import known_logits, positive, teacher_confidence
from kd_yolo.errors import ConfigError


class BCKDArgs(MethodArgs):
    """Arguments of ``bckd``."""

    beta: float = Field(default=1.0, ge=1.0, description="power of the disagreement |p - q|")
    cls_weight: float = Field(default=1.0, ge=0.0, description="factor on kd_bckd_cls; 0 leaves the term out")
    box_weight: float = Field(default=4.0, ge=0.0, description="factor on kd_bckd_box; 0 leaves the term out")


class BCKD(DistillMethod):
    """Disagreement-weighted binary cross-entropy (``kd_bckd_cls``) and GIoU loss (``kd_bckd_box``)."""

    Args = BCKDArgs
    args: BCKDArgs
    gradcheck_args: ClassVar[Mapping[str, Any]] = {"box_weight": 0.0}  # the weight of a box is detached, as released

    def __init__(self, args: BCKDArgs, student: DetectorSpec, teacher: DetectorSpec) -> None:
        """Choose what to read of the teacher.

        Raises:
            ConfigError: Both terms have weight 0.
        """
        super().__init__(args, student, teacher)
        parts = {"kd_bckd_cls": args.cls_weight, "kd_bckd_box": args.box_weight}
        self.term_weights = {name: args.weight * weight for name, weight in parts.items()}
        self.terms = tuple(name for name, weight in parts.items() if weight > 0)
        if not self.terms:
            raise ConfigError("bckd: cls_weight and box_weight are both 0; raise one or use method=none")
        boxes = {"boxes"} if "kd_bckd_box" in self.terms else set()
        self.reads = frozenset({"scores"} | boxes if args.weight > 0 else ())  # the weights of boxes need the scores

    def forward(self, student: Taps, teacher: Taps, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return ``kd_bckd_cls`` and ``kd_bckd_box``, see the base class.

        Raises:
            TeacherError: The class logits do not match.
        """
        if self.args.weight == 0:
            return {name: torch.zeros((), device=student.scores.device) for name in self.terms}
        check_same_anchors(student.scores, teacher.scores)
        with torch.autocast(student.scores.device.type, enabled=False):
            theirs = known_logits(teacher.scores.detach(), teacher.class_mask)
            mine = known_logits(student.scores, teacher.class_mask)
            count = foreground_count(batch.get("fg_mask"), theirs)
            losses = {}
            if "kd_bckd_cls" in self.terms:
                losses["kd_bckd_cls"] = binary_distillation(mine, theirs, self.args.beta) / count
            if "kd_bckd_box" in self.terms:
                weight = disagreement(mine.detach(), theirs, self.args.beta).amax(1)
                with torch.no_grad():
                    target = decode_boxes(teacher, self.teacher_spec.reg_max)
                boxes = decode_boxes(student, self.student_spec.reg_max)
                losses["kd_bckd_box"] = box_distillation(boxes, target, weight) / count
        return {name: self.term_weights[name] * loss for name, loss in losses.items()}


def disagreement(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """Return w = |p - q|^beta elementwise from class logits (B, K, A)."""
    distance = (teacher.sigmoid() - student.sigmoid()).abs()
    return distance if beta == 1.0 else distance.pow(beta)


def binary_distillation(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """Return the sum over images, classes and anchors of |p - q|^beta BCE(q, p), a scalar.

    Args:
        student: Class logits, (B, K, A).
        teacher: Class logits without gradient, (B, K, A).
        beta: Power of the disagreement.
    """
    entropy = F.binary_cross_entropy_with_logits(student, teacher.sigmoid(), reduction="none")
    return (disagreement(student, teacher, beta) * entropy).sum()


def box_distillation(student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    """Return the weighted sum of 1 - GIoU, a scalar.

    A teacher's box without area (``reg_max`` = 1 allows one on background) says nothing; it gets no weight. A student's
    box that is inside out in both directions has a positive area by sign only, and 1 - GIoU could be negative: 0 then.

    Args:
        student: Corners x1 y1 x2 y2 in pixels, (B, A, 4).
        teacher: Corners without gradient, (B, A, 4).
        weight: Weight of every anchor, (B, A).
    """
    weight = weight * (teacher[..., 2:] > teacher[..., :2]).all(-1)
    overlap = bbox_iou(student, teacher, xywh=False, GIoU=True).squeeze(-1)
    return (weight * (1.0 - overlap).clamp_min(0.0)).sum()


def foreground_count(foreground: Tensor | None, teacher: Tensor) -> Tensor:
    """Return P, what the sums are divided by: the foreground anchors, at least 1.

    Args:
        foreground: The assigner's mask, (B, A), or None.
        teacher: Class logits, (B, K, A); without a mask the sum of their confidences counts.
    """
    if foreground is not None:
        return foreground.sum().to(teacher.dtype).clamp_min(1.0)
    return positive(teacher_confidence(teacher).sum())
