"""Weights of several loss terms that are found while training.

HFLKD (see ``methods/hflkd.py``) predicts them from the student's features with a small network G. Its released code
never trains G, and training it on the summed loss would drive every weight to 0, because no term is negative. What
trains here is a loss of its own. It reaches the optimizer through ``value_free``: added to a term, it changes neither
the term's value nor any gradient of the student.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from kd_yolo.distill.ops.logits import positive
from kd_yolo.distill.ops.matching import grid_average

POOLED = (3, 3)  # nine positions, as the released network has
EMA_DECAY = 0.98
EMA_FLOOR = 1e-6


def weight_predictor(channels: int, terms: int) -> nn.Sequential:
    """Return G: three 1x1 convolutions, then three linear layers; (B, C, 3, 3) to one logit a term, (B, n).

    The released layers (512 -> 256 -> 32 -> 4, then 36 -> 512 -> 128 -> n) with the first halving of C instead of 512.
    """
    half = max(channels // 2, 1)
    return nn.Sequential(
        nn.Conv2d(channels, half, 1),
        nn.ReLU(),
        nn.Conv2d(half, 32, 1),
        nn.ReLU(),
        nn.Conv2d(32, 4, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * POOLED[0] * POOLED[1], 512),
        nn.ReLU(),
        nn.Linear(512, 128),
        nn.ReLU(),
        nn.Linear(128, terms),
    )


def predicted_weights(
    predictor: nn.Sequential, feature: Tensor, low: float, high: float, frozen: bool = False
) -> Tensor:
    """Return ``low + (high - low) sigmoid(G(x))``, averaged over the batch, (n,).

    Args:
        predictor: G.
        feature: The student's coarsest map, (B, C, H, W); its gradient is cut unless ``frozen``.
        low: Lower bound of a weight.
        high: Upper bound.
        frozen: Hold G's parameters constant and let the gradient into the feature, as the released code does in effect.
    """
    pooled = grid_average(feature if frozen else feature.detach(), POOLED)
    if frozen:  # by detached copies: a trainer may switch requires_grad on again
        fixed = {name: parameter.detach() for name, parameter in predictor.named_parameters()}
        logits = functional_call(predictor, fixed, (pooled,))
    else:
        logits = predictor(pooled)
    return low + (high - low) * logits.sigmoid().mean(0)


def value_free(loss: Tensor) -> Tensor:
    """Return exactly 0 with the gradient of ``loss``."""
    return loss - loss.detach()


def moving_average(average: Tensor, losses: Tensor) -> Tensor:
    """Return the running mean of each loss, (n,); 0 stands for "nothing seen yet", and a loss of 0 is not counted."""
    seen = losses.clamp_min(EMA_FLOOR)
    updated = torch.where(average > 0, EMA_DECAY * average + (1 - EMA_DECAY) * seen, seen)
    return torch.where(losses > 0, updated, average)


def regularised_objective(weights: Tensor, losses: Tensor, average: Tensor, kappa: float) -> Tensor:
    """Return ``kappa [w_i L_i / ema_i - log w_i]`` of each term, (n,), a loss for the weights alone.

    Its stationary point is w_i = ema_i / L_i: about 1, larger when a term is unusually small. A term that is 0 in this
    batch says nothing about its weight and is left out.
    """
    relative = losses.detach() / average.clamp_min(EMA_FLOOR)
    return torch.where(losses > 0, kappa * (weights * relative - weights.log()), torch.zeros_like(weights))


def held_out_images(images: int) -> int:
    """Return how many images are held out: a quarter, at least one, none of a single image.

    They are the first of the batch: unlabelled images, whose class loss means nothing, stand at its end.
    """
    return 0 if images < 2 else max(1, images // 4)


def class_loss(scores: Tensor, target_scores: Tensor) -> Tensor:
    """Return the detector's own class loss, BCE over all anchors divided by the sum of target scores, a scalar.

    Args:
        scores: Class logits, (B, K, A).
        target_scores: The assigner's, (B, A, K).
    """
    target = target_scores.transpose(1, 2).to(scores.dtype)
    return F.binary_cross_entropy_with_logits(scores, target, reduction="sum") / target.sum().clamp_min(1.0)


def layer_gradients(loss: Tensor, maps: Sequence[Tensor], images: slice) -> Tensor | None:
    """Return the gradient on one 1x1 layer a map, put in front of it as the identity, all entries in one vector.

    A layer y = W f at W = I has dL/dW = sum over images and positions of dL/dy f^T. That makes gradients of different
    images comparable without touching the student's own parameters.

    Args:
        loss: A scalar; its graph is kept.
        maps: f, L x (B, C_l, H_l, W_l), part of its graph.
        images: The images that count.

    Returns:
        (sum of C_l^2,), or None when the loss does not depend on any of the maps.
    """
    grads = torch.autograd.grad(loss, list(maps), retain_graph=True, allow_unused=True)
    if all(grad is None for grad in grads):
        return None
    parts = []
    for grad, feature in zip(grads, maps, strict=True):
        used = torch.zeros_like(feature) if grad is None else grad
        parts.append(torch.einsum("bchw,bdhw->cd", used[images], feature.detach()[images]).flatten())
    return torch.cat(parts)


def alignment(term: Tensor | None, task: Tensor) -> Tensor:
    """Return the cosine between two gradient vectors, a scalar; 0 when one of them vanishes."""
    if term is None:
        return task.new_zeros(())
    return term @ task / positive(term.norm() * task.norm())
