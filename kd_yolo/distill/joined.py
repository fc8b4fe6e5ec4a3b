"""A batch of labelled images with others behind them: take outputs apart by image, pad what only labels give."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def take_images(outputs: Any, index: slice | Tensor) -> Any:
    """Return a detector's training outputs for some of the images.

    Args:
        outputs: Nested mappings and sequences of tensors whose first dimension is the image, (B, ...).
        index: Which images, as a slice or a tensor of numbers.
    """
    if isinstance(outputs, Tensor):
        return outputs[index]
    if isinstance(outputs, Mapping):
        return {key: take_images(value, index) for key, value in outputs.items()}
    if isinstance(outputs, (list, tuple)):
        return type(outputs)(take_images(value, index) for value in outputs)
    return outputs


def with_background(targets: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """Return an assigner's targets with ``count`` images of nothing but background behind them.

    Args:
        targets: ``fg_mask`` (B, A), ``target_labels`` (B, A), ``target_scores`` (B, A, K), or none of them.
        count: U.

    Returns:
        The same names, (B + U, A) and (B + U, A, K).
    """
    return {name: torch.cat([x, x.new_zeros(count, *x.shape[1:])]) for name, x in targets.items()}


def with_boxes(batch: Mapping[str, Any], found: Mapping[str, Tensor], images: Tensor) -> dict[str, Any]:
    """Return a batch with more images and their boxes behind its own.

    Args:
        batch: ``img`` (B, 3, H, W) and, when it has labels, ``bboxes`` (N, 4), ``cls`` (N, 1), ``batch_idx`` (N,).
        found: The same three of the images behind, numbered from 0; may be empty.
        images: All images, (B + U, 3, H, W).
    """
    joined = {**batch, "img": images}
    if found and {"bboxes", "cls", "batch_idx"} <= set(batch):
        moved = {**found, "batch_idx": found["batch_idx"] + len(batch["img"])}
        for name, values in moved.items():
            own = batch[name].to(values.device)
            joined[name] = torch.cat([own.reshape(-1, *values.shape[1:]), values.to(own.dtype)])
    return joined
