"""Class logits of independent sigmoids: (B, K, A)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kd_yolo.distill.base import at_least_float32

# The logit that both sides get for a class the teacher lacks: its probability is 0 in every mode, so nothing is left.
MASKED_LOGIT = -1e4
# A sum of weights below this is none at all: what is left of float32's range is for the weights of the losses.
NO_WEIGHT = 1e-30


def teacher_confidence(scores: Tensor) -> Tensor:
    """Return the highest class probability of every anchor, (B, K, A) logits to (B, A)."""
    return scores.amax(1).sigmoid()


def bernoulli_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """Return kb(p || q) elementwise from logits of q (student) and p (teacher).

    Both tails are computed from their own logsigmoid: 1 - p would lose all digits of a confident anchor.
    """
    positive = teacher.sigmoid() * (F.logsigmoid(teacher) - F.logsigmoid(student))
    negative = (-teacher).sigmoid() * (F.logsigmoid(-teacher) - F.logsigmoid(-student))
    # Near equality the two cancel to less than rounding; a weighted mean over background alone would magnify that.
    return (positive + negative).clamp_min(0)


def known_logits(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Return class logits (B, K, A) in float32 or more, those of classes outside the mask (K,) at ``MASKED_LOGIT``."""
    scores = at_least_float32(scores)
    return scores if mask is None else scores.masked_fill(~mask.unsqueeze(-1), MASKED_LOGIT)


def positive(total: Tensor) -> Tensor:
    """Return a sum of weights that can be divided by: 1 where it is 0, so that 0 / 0 becomes 0.

    Not the smallest float instead: the gradient's factor, a loss weight over it, would overflow, and inf * 0 is NaN.
    """
    return total.masked_fill(total < NO_WEIGHT, 1.0)
