"""KD-LightNet: an improved KL loss on the class logits, and localization distillation on the boxes.

Liu et al., "KD-LightNet: A Lightweight Network Based on Knowledge Distillation for Industrial Defect Detection", IEEE
TIM 72, 2023, doi 10.1109/tim.2023.3300421, says "improved KL divergence loss on the teacher's predicted logits" and
publishes no formula and no code. The formula is therefore ours. A YOLO head is K independent sigmoids, so the KL is
Bernoulli (with a softmax it would be exactly 0 for one class), per anchor a and class k:

    p = sigmoid(t / tau)        q = sigmoid(s / tau)
    kb = p log(p / q) + (1 - p) log((1 - p) / (1 - q))
    v_a = alpha c_a + (1 - alpha) fg_a          w_ak = |p - q|^gamma v_a  (a constant for the gradient)
    kd_cls = tau^2 sum_ak w_ak kb_ak / sum_a v_a

Where both have a one-to-one head, kd_cls gets the same over its logits, with c_a for v_a. c_a = max_k sigmoid(t_ak) is
the teacher's confidence. It is not tempered: a temperature above 1 lifts the thousands of background anchors (at
tau = 4 a logit of -8 becomes 0.12 instead of 0.0003), and v_a is there to ignore them.
|p - q|^gamma is BCKD's focus on disagreement (Yang et al., ICCV 2023, arXiv:2308.14286), but detached, so that the
gradient of a term is exactly tau w (q - p) / sum_a v_a. The box part by bins follows localization distillation (Zheng
et al., CVPR 2022, arXiv:2102.12252). tau^2 keeps the size of the gradient when tau changes (Hinton et al.,
arXiv:1503.02531, section 2).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from kd_yolo.distill.base import (
    DetectorSpec,
    DistillMethod,
    MethodArgs,
    Taps,
    at_least_float32,
    check_same_anchors,
)
from kd_yolo.distill.ops.boxes import decode_boxes, distribution_loss, overlap_loss
from kd_yolo.distill.ops.logits import bernoulli_kl, known_logits, positive, teacher_confidence
from kd_yolo.errors import ConfigError, DistillationError, TeacherError

Mode = Literal["bernoulli", "softmax_bg", "softmax"]


class KDLightNetArgs(MethodArgs):
    """Arguments of ``kd-lightnet``."""

    tau: float = Field(default=1.0, gt=0.0, description="temperature of the class logits")
    gamma: float = Field(default=0.0, ge=0.0, description="power of |p - q|, the focus on disagreement")
    alpha: float = Field(default=0.5, ge=0.0, le=1.0, description="teacher's confidence (1) against foreground (0)")
    mode: Mode = Field(default="bernoulli", description="bernoulli, softmax_bg (K + 1) or softmax (YOLOv6's)")
    cls_weight: float = Field(default=1.0, ge=0.0, description="factor on kd_cls; 0 leaves the term out")
    box_weight: float = Field(default=1.0, ge=0.0, description="factor on kd_box; 0 leaves the term out")
    one2one: bool | None = Field(default=None, description="one-to-one logits too; null: where both have that head")


class KDLightNet(DistillMethod):
    """Improved KL on class logits (``kd_cls``) and a box term (``kd_box``) chosen by the two ``reg_max``.

    Equal ``reg_max`` above 1: KL over the bins of each side. Otherwise: 1 - CIoU between decoded boxes.

    Where both detectors have a one-to-one head, and unless ``one2one`` says otherwise, the same class loss on its
    logits is added to ``kd_cls``: it is the head that detects without NMS. Ultralytics detaches its features in
    training, so this teaches the head alone and adds nothing to the gradient on the neck. The foreground in the batch
    is the one-to-many assigner's, so this part is weighted by the teacher's confidence alone.
    """

    Args = KDLightNetArgs
    args: KDLightNetArgs
    zero_at_equality: ClassVar[bool] = True
    gradcheck_args: ClassVar[Mapping[str, Any]] = {"gamma": 0.0}

    def __init__(self, args: KDLightNetArgs, student: DetectorSpec, teacher: DetectorSpec) -> None:
        """Choose the box form and what to read of the teacher.

        Raises:
            ConfigError: Plain softmax over one class, or nothing to distil.
        """
        super().__init__(args, student, teacher)
        if args.mode == "softmax" and student.num_classes == 1:
            raise ConfigError("kd-lightnet: mode=softmax over one class is always 0; use mode=bernoulli or softmax_bg")
        self.term_weights = {"kd_cls": args.weight * args.cls_weight, "kd_box": args.weight * args.box_weight}
        parts = {"kd_cls": args.cls_weight, "kd_box": args.box_weight}
        self.terms = tuple(name for name, weight in parts.items() if weight > 0)
        if not self.terms:
            raise ConfigError("kd-lightnet: cls_weight and box_weight are both 0; raise one or use method=none")
        self.by_bins = student.reg_max == teacher.reg_max and student.reg_max > 1
        self.reads = self._what_is_read()

    def forward(self, student: Taps, teacher: Taps, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return ``kd_cls`` and ``kd_box``, see the base class.

        Without ``batch["fg_mask"]`` alpha counts as 1: the teacher's confidence alone weights the anchors.

        Raises:
            TeacherError: The class logits do not match, or a one-to-one head is asked for and missing.
            DistillationError: ``fg_mask`` is not (B, A).
        """
        if self.args.weight == 0:
            return {name: torch.zeros((), device=student.scores.device) for name in self.terms}
        check_same_anchors(student.scores, teacher.scores)
        with torch.autocast(student.scores.device.type, enabled=False):
            confidence = teacher_confidence(known_logits(teacher.scores.detach(), teacher.class_mask))
            losses = {}
            if "kd_cls" in self.terms:
                weight = anchor_weight(confidence, batch.get("fg_mask"), self.args.alpha)
                losses["kd_cls"] = self._class_loss(student.scores, teacher.scores, teacher.class_mask, weight)
                if self._distils_one2one(student, teacher):
                    losses["kd_cls"] = losses["kd_cls"] + self._one2one_loss(student, teacher)
            if "kd_box" in self.terms:
                losses["kd_box"] = self._box_loss(student, teacher, confidence)
        return {name: self.term_weights[name] * loss for name, loss in losses.items()}

    def _what_is_read(self) -> frozenset[str]:
        if self.args.weight == 0:
            return frozenset()
        boxes = {"boxes"} if "kd_box" in self.terms else set()
        one2one = {"scores_one2one"} if self.args.one2one is not False and "kd_cls" in self.terms else set()
        return frozenset({"scores"} | boxes | one2one)

    def _class_loss(self, student: Tensor, teacher: Tensor, mask: Tensor | None, weight: Tensor) -> Tensor:
        mine, theirs = known_logits(student, mask), known_logits(teacher.detach(), mask)
        return class_loss(mine, theirs, weight, self.args.tau, self.args.gamma, self.args.mode)

    def _distils_one2one(self, student: Taps, teacher: Taps) -> bool:
        both = student.scores_one2one is not None and teacher.scores_one2one is not None
        return both if self.args.one2one is None else self.args.one2one

    def _one2one_loss(self, student: Taps, teacher: Taps) -> Tensor:
        mine, theirs = student.scores_one2one, teacher.scores_one2one
        if mine is None or theirs is None:
            side = "student" if mine is None else "teacher"
            raise TeacherError(f"kd-lightnet: one2one=true, but the {side} has no one-to-one head; set one2one=false")
        check_same_anchors(mine, theirs)
        confidence = teacher_confidence(known_logits(theirs.detach(), teacher.class_mask))
        return self._class_loss(mine, theirs, teacher.class_mask, confidence)

    def _box_loss(self, student: Taps, teacher: Taps, confidence: Tensor) -> Tensor:
        if self.by_bins:
            bins = self.student_spec.reg_max
            mine, theirs = at_least_float32(student.boxes), at_least_float32(teacher.boxes.detach())
            return distribution_loss(mine, theirs, confidence, bins)
        with torch.no_grad():
            target = decode_boxes(teacher, self.teacher_spec.reg_max)
        return overlap_loss(decode_boxes(student, self.student_spec.reg_max), target, confidence)


def anchor_weight(confidence: Tensor, foreground: Tensor | None, alpha: float) -> Tensor:
    """Return v_a = alpha c_a + (1 - alpha) fg_a, (B, A); without a foreground mask alpha counts as 1.

    Raises:
        DistillationError: The mask has another shape.
    """
    if foreground is None or alpha == 1.0:
        return confidence
    if foreground.shape != confidence.shape:
        raise DistillationError(
            f"fg_mask is {tuple(foreground.shape)}, but images and anchors are {tuple(confidence.shape)}"
        )
    return alpha * confidence + (1.0 - alpha) * foreground


def class_loss(
    student: Tensor, teacher: Tensor, weight: Tensor, tau: float, gamma: float, mode: Mode = "bernoulli"
) -> Tensor:
    """Return tau^2 sum |p - q|^gamma v_a KL / sum v_a, a scalar.

    In the softmax modes the KL is one number an anchor; |p - q| is then the total variation distance of the two
    distributions, which for a Bernoulli is the same |p - q|, and the weight stays one number an anchor.

    Args:
        student: Class logits, (B, K, A).
        teacher: Class logits without gradient, (B, K, A).
        weight: v_a, (B, A), not negative.
        tau: Temperature.
        gamma: Power of the disagreement.
        mode: ``softmax_bg`` appends a background logit of 0.
    """
    student, teacher = student / tau, teacher / tau
    if mode == "bernoulli":
        divergence = bernoulli_kl(student, teacher)
        with torch.no_grad():
            distance = (teacher.sigmoid() - student.sigmoid()).abs_()
        weight_per_term = weight.unsqueeze(1)
    else:
        if mode == "softmax_bg":
            student, teacher = F.pad(student, (0, 0, 0, 1)), F.pad(teacher, (0, 0, 0, 1))
        log_q, log_p = student.log_softmax(1), teacher.log_softmax(1)
        divergence = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)
        with torch.no_grad():
            distance = (log_p.exp() - log_q.exp()).abs_().sum(1).div_(2)
        weight_per_term = weight
    factor = distance.pow_(gamma).mul_(weight_per_term)
    return tau**2 * (factor * divergence).sum() / positive(weight.sum())
