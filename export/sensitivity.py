"""How much each layer's quantization disturbs what a head says: a cheap proxy ranks layers before mAP is asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from kd_yolo.export.int8 import LayerError
from numpy.typing import NDArray

IMAGES = 8
"""Calibration images that the layers are compared on, evenly over the list."""

Outputs = list[list[NDArray[Any]]]
"""What the head says: the outputs of its last convolutions, for every batch."""


def relative_noise(wanted: Outputs, found: Outputs) -> float:
    """Return the mean over the head's outputs of (mean squared difference / variance).

    The outputs before the decoding are compared, where box distances and class logits stand side by side for every
    anchor; behind it a difference of pixels would drown one of probabilities, and a selection would hide both.

    Args:
        wanted: Outputs of the float network.
        found: Outputs of the disturbed one, for the same images.
    """
    ratios = []
    for index in range(len(wanted[0])):
        truth = np.concatenate([batch[index].ravel() for batch in wanted]).astype(np.float64)
        other = np.concatenate([batch[index].ravel() for batch in found]).astype(np.float64)
        ratios.append(float(((truth - other) ** 2).mean() / max(float(truth.var()), 1e-12)))
    return float(np.mean(ratios))


def rank_layers(layers: Sequence[str], wanted: Outputs, outputs_with: Callable[[str], Outputs]) -> list[LayerError]:
    """Return the layers by the noise that each alone makes, the worst first; equal ones by name.

    Args:
        layers: Layers to compare.
        wanted: Outputs of the float network.
        outputs_with: Returns the outputs of the network in which only this layer is quantized.
    """
    errors = [LayerError(layer, relative_noise(wanted, outputs_with(layer))) for layer in layers]
    return sorted(errors, key=lambda item: (-item.error, item.layer))
