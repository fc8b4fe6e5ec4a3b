"""Class logits separated into the true class and the rest.

For one softmax: decoupled knowledge distillation (Zhao et al., CVPR 2022, arXiv:2203.08679, equation 7) splits the KL
divergence exactly into a "true class against everything else" part and a "distribution over the other classes" part.
For a detector's independent sigmoids, (B, K, A), the same split is by (anchor, class) pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_yolo.distill.ops.logits import bernoulli_kl, positive
from kd_yolo.errors import DistillationError


def separated_kl(student: Tensor, teacher: Tensor, target: Tensor, tau: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return the relevant and the irrelevant divergence of every sample, each (B,), from softmax logits.

    With ``p = softmax(z / tau)``, y the true class and q the distribution over the other classes alone:

        relevant   = KL((p_y, 1 - p_y) of the teacher || the same of the student)
        irrelevant = KL(q of the teacher || q of the student)
        KL(p of the teacher || p of the student) = relevant + (1 - p_y of the teacher) irrelevant

    With two classes the irrelevant part is exactly 0. Neither part is multiplied by tau^2.

    Args:
        student: Logits, (B, K), K at least 2.
        teacher: Logits without gradient, (B, K).
        target: True classes, (B,).
        tau: Temperature.
    """
    student, teacher = student / tau, teacher / tau
    is_target = F.one_hot(target, student.shape[1]).bool()
    mine, theirs = _target_and_rest(student, is_target), _target_and_rest(teacher, is_target)
    relevant = (theirs.exp() * (theirs - mine)).sum(1)
    if student.shape[1] == 2:
        return relevant, torch.zeros_like(relevant)
    log_q = _others(student, is_target).log_softmax(1)
    log_p = _others(teacher, is_target).log_softmax(1)
    return relevant, (log_p.exp() * (log_p - log_q)).sum(1)


def separation_loss(
    student: Tensor, teacher: Tensor, target: Tensor, tau: float, released: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the relevant and the irrelevant term of a classifier, scalars: tau^2 times the mean over the batch.

    Args:
        student: Logits, (B, K).
        teacher: Logits without gradient, (B, K).
        target: True classes, (B,).
        tau: Temperature.
        released: Divide by B once more, as HFLKD's released code does.
    """
    relevant, irrelevant = separated_kl(student, teacher, target, tau)
    factor = tau**2 / (student.shape[0] if released else 1)
    return factor * relevant.mean(), factor * irrelevant.mean()


def assigned_targets(batch: Mapping[str, Any], scores: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return class c_a, (B, A), and weight omega_a, (B, A), of the anchors that the student's assigner chose.

    omega_a is the assigner's score of class c_a, 0 off the foreground; without ``target_scores`` it is 1 on it.

    Args:
        batch: The training batch.
        scores: The student's class logits, (B, K, A).

    Returns:
        None when ``fg_mask`` or ``target_labels`` is missing.

    Raises:
        DistillationError: One of them has another shape.
    """
    foreground, labels, strength = (batch.get(key) for key in ("fg_mask", "target_labels", "target_scores"))
    if foreground is None or labels is None:
        return None
    images, classes, anchors = scores.shape
    wanted: dict[str, tuple[int, ...]] = {"fg_mask": (images, anchors), "target_labels": (images, anchors)}
    if strength is not None:
        wanted["target_scores"] = (images, anchors, classes)
    for key, shape in wanted.items():
        if tuple(batch[key].shape) != shape:
            raise DistillationError(f"{key} is {tuple(batch[key].shape)}, but the class logits ask for {shape}")
    labels = labels.clamp(0, classes - 1)
    weight = foreground.to(scores.dtype)
    if strength is not None:
        weight = weight * strength.to(scores.dtype).gather(2, labels.unsqueeze(2)).squeeze(2)
    return labels, weight


def target_loss(student: Tensor, teacher: Tensor, labels: Tensor, weight: Tensor, tau: float) -> Tensor:
    """Return ``tau^2 sum_a w_a kb(p_ac || q_ac) / sum_a w_a`` over the class c_a of each anchor alone, a scalar.

    Args:
        student: Class logits, (B, K, A).
        teacher: Class logits without gradient, (B, K, A).
        labels: c_a, (B, A).
        weight: w_a, (B, A), not negative.
        tau: Temperature.
    """
    index = labels.unsqueeze(1)
    divergence = bernoulli_kl(student.gather(1, index) / tau, teacher.gather(1, index) / tau).squeeze(1)
    return tau**2 * (weight * divergence).sum() / positive(weight.sum())


def _target_and_rest(logits: Tensor, is_target: Tensor) -> Tensor:
    """Return (log p_y, log(1 - p_y)), (B, 2); the second from the other logits: 1 - p_y would lose all digits."""
    parts = torch.stack([logits[is_target], _others(logits, is_target).logsumexp(1)], dim=1)
    return parts.log_softmax(1)


def _others(logits: Tensor, is_target: Tensor) -> Tensor:
    return logits[~is_target].reshape(logits.shape[0], -1)
