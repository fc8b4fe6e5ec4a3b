"""DKD: the target class and the other classes distilled apart.

Zhao et al., "Decoupled Knowledge Distillation", CVPR 2022, arXiv:2203.08679, equations 7 and 8: the KL divergence of a
softmax splits into a part on the target class (TCKD) and one on the distribution over the others (NCKD), which a
certain teacher all but switches off; the paper gives them factors of their own, alpha and beta. A YOLO head has K
independent sigmoids instead, where the split is by class and nothing couples the parts. With p = sigmoid(t / tau), q =
sigmoid(s / tau), kb the Bernoulli KL, and on the assigner's foreground anchors a their class c_a and score omega_a:

    kd_dkd_target    = weight alpha tau^2 sum_a omega_a kb(p_a,c_a || q_a,c_a)               / sum_a omega_a
    kd_dkd_nontarget = weight beta  tau^2 sum_a omega_a sum_(k not c_a) kb(p_ak || q_ak)     / sum_a omega_a

In a batch without foreground (no labels, no boxes) the teacher's own most probable class is the target and its
probability the weight, on every anchor. Background anchors have no target class and take no part otherwise:
``kd-lightnet``, ``bckd`` and ``hflkd`` cover them. With one class there are no others, and ``kd_dkd_nontarget`` does
not exist.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from kd_yolo.distill.base import DetectorSpec, DistillMethod, MethodArgs, Taps, check_same_anchors
from kd_yolo.distill.ops.logits import MASKED_LOGIT, bernoulli_kl, known_logits, positive
from kd_yolo.distill.ops.separation import assigned_targets
from kd_yolo.distill.ops.standardize import check_standardizable, standardize_logits
from kd_yolo.errors import ConfigError


class DKDArgs(MethodArgs):
    """Arguments of ``dkd``."""

    alpha: float = Field(default=1.0, ge=0.0, description="factor on kd_dkd_target; 0 leaves the term out")
    beta: float = Field(default=8.0, ge=0.0, description="factor on kd_dkd_nontarget; 0 leaves the term out")
    tau: float = Field(default=1.0, gt=0.0, description="temperature of the class logits")
    standardize: bool = Field(default=False, description="z-score the logits over the classes (arXiv:2403.01878)")


class DKD(DistillMethod):
    """Bernoulli KL on the foreground's target class (``kd_dkd_target``) and all its others (``kd_dkd_nontarget``)."""

    Args = DKDArgs
    args: DKDArgs

    def __init__(self, args: DKDArgs, student: DetectorSpec, teacher: DetectorSpec) -> None:
        """Choose the terms.

        Raises:
            ConfigError: Nothing to distil, or ``standardize`` with one class.
        """
        super().__init__(args, student, teacher)
        parts = {"kd_dkd_target": args.alpha, "kd_dkd_nontarget": args.beta if student.num_classes > 1 else 0.0}
        self.term_weights = {name: args.weight * weight for name, weight in parts.items() if weight > 0}
        self.terms = tuple(name for name, weight in parts.items() if weight > 0)
        if not self.terms:
            raise ConfigError(
                f"dkd: no term is left (alpha={args.alpha:g}, beta={args.beta:g}, {student.num_classes} classes); "
                "raise alpha or use method=none"
            )
        if args.standardize:
            check_standardizable(student.num_classes, "dkd")
        self.reads = frozenset({"scores"} if args.weight > 0 else ())

    def forward(self, student: Taps, teacher: Taps, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the terms, see the base class.

        Raises:
            TeacherError: The class logits do not match.
            DistillationError: The assigner's outputs do not fit the logits.
        """
        if self.args.weight == 0:
            return {name: torch.zeros((), device=student.scores.device) for name in self.terms}
        check_same_anchors(student.scores, teacher.scores)
        mask = teacher.class_mask
        with torch.autocast(student.scores.device.type, enabled=False):
            raw = known_logits(teacher.scores.detach(), mask)
            mine, theirs = known_logits(student.scores, mask), raw
            if self.args.standardize:
                mine, theirs = (standardize_logits(x, mask) for x in (student.scores, teacher.scores.detach()))
            labels, weight = target_classes(batch, raw)
            target, nontarget = decoupled_losses(mine, theirs, labels, weight, self.args.tau)
        losses = {"kd_dkd_target": target, "kd_dkd_nontarget": nontarget}
        return {name: weight * losses[name] for name, weight in self.term_weights.items()}


def target_classes(batch: Mapping[str, Any], teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Return c_a and omega_a, (B, A) each: the assigner's, or the teacher's own when the batch has no foreground.

    Args:
        batch: The training batch.
        teacher: Class logits of known classes, others at ``MASKED_LOGIT``, (B, K, A). Anchors whose class the teacher
            does not know get weight 0.

    Raises:
        DistillationError: The assigner's outputs do not fit the logits.
    """
    highest, own_labels = teacher.max(1)
    own_weight = highest.sigmoid()
    assigned = assigned_targets(batch, teacher)
    if assigned is None:
        return own_labels, own_weight
    labels, weight = assigned
    weight = weight * (teacher.gather(1, labels.unsqueeze(1)).squeeze(1) > MASKED_LOGIT)
    some = weight.sum() > 0
    return torch.where(some, labels, own_labels), torch.where(some, weight, own_weight)


def decoupled_losses(
    student: Tensor, teacher: Tensor, labels: Tensor, weight: Tensor, tau: float
) -> tuple[Tensor, Tensor]:
    """Return the target and the nontarget loss, scalars.

    Args:
        student: Class logits, (B, K, A).
        teacher: Class logits without gradient, (B, K, A).
        labels: c_a, (B, A).
        weight: omega_a, (B, A), not negative.
        tau: Temperature.
    """
    divergence = bernoulli_kl(student / tau, teacher / tau)
    index = labels.unsqueeze(1)
    target = divergence.gather(1, index).squeeze(1)
    others = divergence.scatter(1, index, 0.0).sum(1)
    scale = tau**2 / positive(weight.sum())
    return scale * (weight * target).sum(), scale * (weight * others).sum()
