"""DIST: relations between predictions instead of the predictions themselves.

Huang et al., "Knowledge Distillation from A Stronger Teacher", NeurIPS 2022, arXiv:2205.10536. With Pearson's
correlation rho, inter-class relation (equation 7): the row of one sample over the classes; intra-class relation
(equation 9): the column of one class over the samples of a batch. The paper has one softmax per sample. A YOLO head has
K independent sigmoids on every anchor, most of them background, so here p = sigmoid(t / tau), q = sigmoid(s / tau) and

    kd_dist_inter = weight beta  tau^2 sum_a  c_a (1 - rho_k(p_ak, q_ak))  / sum_a c_a     c_a = max_k sigmoid(t_ak)
    kd_dist_intra = weight gamma tau^2 sum_k  m_k (1 - rho_a(p_ak, q_ak))  / sum_k m_k     m_k = max_a sigmoid(t_ak)

a runs over all anchors of the batch. c_a leaves out anchors, and m_k classes, about which the teacher says nothing: the
correlation of two noises weighs as much as any other. Over one class rho_k does not exist and over two it is only a
sign, so that ``kd_dist_inter`` needs three; with fewer it is left out. rho ignores scale and offset: a student with the
right order and wrong probabilities is not corrected, which is the paper's point (a stronger teacher is more certain
than a small student can be), but leaves calibration to the labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from ultralytics.utils import LOGGER

from kd_yolo.distill.base import DetectorSpec, DistillMethod, MethodArgs, Taps, check_same_anchors
from kd_yolo.distill.ops.logits import known_logits, positive
from kd_yolo.distill.ops.standardize import check_standardizable, standardize_logits
from kd_yolo.errors import ConfigError

MIN_CLASSES = 3
VARIANCE_FLOOR = 1e-8


class DISTArgs(MethodArgs):
    """Arguments of ``dist``."""

    beta: float = Field(default=1.0, ge=0.0, description="factor on kd_dist_inter; 0 leaves the term out")
    gamma: float = Field(default=1.0, ge=0.0, description="factor on kd_dist_intra; 0 leaves the term out")
    tau: float = Field(default=1.0, gt=0.0, description="temperature of the class logits")
    standardize: bool = Field(default=False, description="z-score the logits over the classes (arXiv:2403.01878)")


class DIST(DistillMethod):
    """Correlation over the classes of an anchor (``kd_dist_inter``) and over the anchors of a class (``_intra``)."""

    Args = DISTArgs
    args: DISTArgs
    batch_statistics: ClassVar[bool] = True

    def __init__(self, args: DISTArgs, student: DetectorSpec, teacher: DetectorSpec) -> None:
        """Choose the terms.

        Raises:
            ConfigError: Nothing to distil, or ``standardize`` with one class.
        """
        super().__init__(args, student, teacher)
        parts = {"kd_dist_inter": args.beta, "kd_dist_intra": args.gamma}
        if student.num_classes < MIN_CLASSES and parts.pop("kd_dist_inter") > 0:
            LOGGER.warning(
                f"dist: kd_dist_inter is left out: it needs {MIN_CLASSES} classes, found {student.num_classes}"
            )
        self.term_weights = {name: args.weight * weight for name, weight in parts.items() if weight > 0}
        self.terms = tuple(name for name, weight in parts.items() if weight > 0)
        if not self.terms:
            raise ConfigError(
                f"dist: no term is left (beta={args.beta:g}, gamma={args.gamma:g}, {student.num_classes} classes); "
                "raise gamma or use method=none"
            )
        if args.standardize:
            check_standardizable(student.num_classes, "dist")
        self.reads = frozenset({"scores"} if args.weight > 0 else ())

    def forward(self, student: Taps, teacher: Taps, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the terms, see the base class. The batch is not used.

        Raises:
            TeacherError: The class logits do not match.
        """
        if self.args.weight == 0:
            return {name: torch.zeros((), device=student.scores.device) for name in self.terms}
        check_same_anchors(student.scores, teacher.scores)
        mask, tau = teacher.class_mask, self.args.tau
        with torch.autocast(student.scores.device.type, enabled=False):
            certain = known_logits(teacher.scores.detach(), mask).sigmoid()
            mine, theirs = known_logits(student.scores, mask), known_logits(teacher.scores.detach(), mask)
            if self.args.standardize:
                mine, theirs = (standardize_logits(x, mask) for x in (student.scores, teacher.scores.detach()))
            q, p = (mine / tau).sigmoid(), (theirs / tau).sigmoid()
            losses = {}
            if "kd_dist_inter" in self.terms:
                losses["kd_dist_inter"] = inter_class_loss(q, p, certain.amax(1), mask)
            if "kd_dist_intra" in self.terms:
                losses["kd_dist_intra"] = intra_class_loss(q, p, certain.amax((0, 2)))
        return {name: self.term_weights[name] * tau**2 * loss for name, loss in losses.items()}


def inter_class_loss(student: Tensor, teacher: Tensor, weight: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the weighted mean over anchors of 1 - rho over the classes, a scalar; 0 with fewer than 3 known classes.

    Args:
        student: Probabilities, (B, K, A).
        teacher: Probabilities without gradient, (B, K, A).
        weight: c_a, (B, A), not negative.
        mask: (K,), True for the classes to use; None means all.
    """
    if mask is None:
        mask = torch.ones(student.shape[1], dtype=torch.bool, device=student.device)
    distance = correlation_distance(student, teacher, mask.to(student.dtype)[:, None], dim=1)
    enough = (mask.sum() >= MIN_CLASSES).to(student.dtype)
    return enough * (weight * distance).sum() / positive(weight.sum())


def intra_class_loss(student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    """Return the weighted mean over classes of 1 - rho over all anchors of the batch, a scalar.

    Args:
        student: Probabilities, (B, K, A).
        teacher: Probabilities without gradient, (B, K, A).
        weight: m_k, (K,), not negative; 0 for unknown classes.
    """
    mine, theirs = (values.transpose(0, 1).flatten(1) for values in (student, teacher))
    distance = correlation_distance(mine, theirs, torch.ones_like(mine[:1]), dim=1)
    return (weight * distance).sum() / positive(weight.sum())


def correlation_distance(student: Tensor, teacher: Tensor, used: Tensor, dim: int) -> Tensor:
    """Return 1 - rho along a dimension, as half the mean squared difference of the two standardised vectors.

    The same number as by the correlation, but never below 0 and exactly 0 for equal vectors. A vector that is constant
    becomes 0 instead of undefined.

    Args:
        student: Values.
        teacher: Values of the same shape without gradient.
        used: 1 for the entries that count, else 0, of a shape that broadcasts.
        dim: Dimension to correlate along; it disappears.
    """
    count = used.expand_as(student).sum(dim, keepdim=True).clamp_min(1.0)

    def standardised(values: Tensor) -> Tensor:
        centred = (values - (values * used).sum(dim, keepdim=True) / count) * used
        return centred * torch.rsqrt(centred.square().sum(dim, keepdim=True) / count + VARIANCE_FLOOR)

    difference = standardised(student) - standardised(teacher)
    return (difference.square().sum(dim, keepdim=True) / (2 * count)).squeeze(dim)
