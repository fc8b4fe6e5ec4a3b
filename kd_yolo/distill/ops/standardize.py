"""Logit standardisation: a z-score over the classes of every anchor.

Sun et al., "Logit Standardization in Knowledge Distillation", CVPR 2024, arXiv:2403.01878, section 3.3, algorithm 1:
z becomes (z - mean(z)) / std(z), for student and teacher alike, before the temperature. It lifts the demand that both
logits have the same range and variance; only their relations are taught.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kd_yolo.distill.base import at_least_float32
from kd_yolo.errors import ConfigError

# The paper's code adds 1e-7 to the standard deviation, which leaves the slope at 0 unbounded; here inside the root.
VARIANCE_FLOOR = 1e-7


def standardize_logits(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return (z_k - mean_k z) / sqrt(var_k z + 1e-7) per anchor; classes outside the mask become 0 and count nowhere.

    The variance is the biased one, as in the paper's equation. What is outside the mask may be NaN.

    Args:
        logits: Class logits z, (B, K, A).
        mask: (K,) booleans, True for the classes to use; None means all.

    Raises:
        ConfigError: Fewer than two classes are left: the z-score of one number is always 0.
    """
    logits = at_least_float32(logits)
    classes = logits.shape[1] if mask is None else int(mask.sum())
    check_standardizable(classes)
    if mask is None:
        centred = logits - logits.mean(1, keepdim=True)
    else:
        outside = ~mask.unsqueeze(-1)
        known = logits.masked_fill(outside, 0.0)
        centred = (known - known.sum(1, keepdim=True) / classes).masked_fill(outside, 0.0)
    variance = centred.square().sum(1, keepdim=True) / classes
    return centred * torch.rsqrt(variance + VARIANCE_FLOOR)


def check_standardizable(classes: int, method: str = "") -> None:
    """Refuse a z-score over fewer than two classes.

    Args:
        classes: How many classes there are to standardise over.
        method: Name of the method that asks, for the message.

    Raises:
        ConfigError: ``classes`` is below 2.
    """
    if classes < 2:
        prefix = f"{method}: " if method else ""
        raise ConfigError(
            f"{prefix}standardize=true needs at least 2 classes that teacher and student share, found {classes}: "
            "the z-score of a single logit is always 0; set standardize=false"
        )
