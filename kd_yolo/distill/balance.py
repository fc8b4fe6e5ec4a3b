"""Set the weight of each distillation term by its gradient, once, instead of by hand.

The size of a loss says nothing about how hard it pulls: a KL of 0.02 can outweigh a CIoU of 2. What the student's neck
feels is the gradient. One measurement at the end of warm-up sets each term's factor so that its gradient norm on the
neck is r times the task loss's; the factors then stay, so that the run minimises one fixed loss. (GradNorm, Chen et
al., ICML 2018, arXiv:1711.02257, equalises the same norms, but keeps changing the weights.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kd_yolo.errors import ConfigError, DistillationError

# Gradients on half-precision maps are often below float16's smallest number; the trainer's GradScaler is not applied
# here, so the losses are scaled for the measurement and the norms are scaled back.
HALF_SCALE = 4096.0


def balance_factors(
    terms: Mapping[str, Tensor], task_loss: Tensor, neck: Sequence[Tensor], ratio: float
) -> dict[str, float]:
    """Return for each term the factor that makes its gradient norm on the neck ``ratio`` times the task loss's.

    The graph is kept, and no ``.grad`` is written. Under distributed training every rank measures its own batch:
    average the factors over the ranks before use.

    Args:
        terms: Named scalar losses with a graph, on the same scale as ``task_loss`` (both means over the batch).
        task_loss: The detection loss, a scalar with a graph.
        neck: The student's neck maps, L x (B, C_l, H_l, W_l), as they stand in both graphs.
        ratio: r; 0.1 to 0.5 is usual.

    Returns:
        Plain numbers, in the order of ``terms``.

    Raises:
        ConfigError: ``ratio`` is not a positive number.
        DistillationError: A gradient norm is zero or not finite; the message names the loss.
    """
    if not (math.isfinite(ratio) and ratio > 0):
        raise ConfigError(f"balance={ratio}: give a positive ratio such as 0.3, or null to use the method's weights")
    goal = ratio * _checked_norm("the task loss", task_loss, neck)
    return {name: goal / _checked_norm(f"distillation loss '{name}'", term, neck) for name, term in terms.items()}


def gradient_norm(loss: Tensor, neck: Sequence[Tensor]) -> float:
    """Return the L2 norm of d loss / d neck over all maps together; 0 when the loss does not depend on them.

    Args:
        loss: A scalar; its graph is kept.
        neck: Maps that are part of the graph, L x (B, C_l, H_l, W_l).
    """
    if not loss.requires_grad:
        return 0.0
    scale = HALF_SCALE if any(feature.dtype == torch.float16 for feature in neck) else 1.0
    grads = torch.autograd.grad(loss * scale, list(neck), retain_graph=True, allow_unused=True)
    norms = [torch.linalg.vector_norm(grad, dtype=torch.float64) for grad in grads if grad is not None]
    return float(torch.stack(norms).square().sum().sqrt()) / scale if norms else 0.0


def _checked_norm(name: str, loss: Tensor, neck: Sequence[Tensor]) -> float:
    norm = gradient_norm(loss, neck)
    if not math.isfinite(norm):
        raise DistillationError(f"balance: the gradient of {name} on the neck is not finite ({norm})")
    if norm == 0.0:
        raise DistillationError(
            f"balance: {name} has no gradient on the neck; leave it out, or give kd.weight=1 to not balance"
        )
    return norm
