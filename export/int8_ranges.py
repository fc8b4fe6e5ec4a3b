"""Ranges of a network's tensors over calibration images, and the 8-bit scales made of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Function = Callable[[NDArray[Any]], NDArray[Any]]
BINS = 2048
SAMPLES = 1 << 14
"""Values of one tensor of one image that enter the histogram, evenly spread over it; extremes come from all values."""
CANDIDATES = 64
"""Ranges tried per tensor."""


@dataclass(frozen=True)
class Statistics:
    """Values of one tensor over all calibration images.

    Attributes:
        low: Smallest value.
        high: Largest value.
        counts: (BINS,), how many of the sampled values lie in each of the equal bins from low to high.
    """

    low: float
    high: float
    counts: NDArray[np.int64]

    @property
    def centers(self) -> NDArray[Any]:
        """Return the middle of every bin, (BINS,)."""
        width = (self.high - self.low) / len(self.counts)
        return self.low + width * (np.arange(len(self.counts)) + 0.5)


@dataclass(frozen=True)
class Scale:
    """An affine 8-bit scale: value = (code - zero) * step.

    Attributes:
        step: Distance of two neighbouring codes.
        zero: Code of the value 0.
        signed: int8 codes of -128..127, otherwise uint8 codes of 0..255.
    """

    step: float
    zero: int
    signed: bool

    def apply(self, values: NDArray[Any]) -> NDArray[Any]:
        """Return values as the 8-bit codes give them back."""
        low, high = (-128, 127) if self.signed else (0, 255)
        return (np.clip(np.rint(values / self.step) + self.zero, low, high) - self.zero) * self.step


def collect(
    run: Callable[[Array], Sequence[Array]], names: Sequence[str], images: Callable[[], Iterable[Array]]
) -> dict[str, Statistics]:
    """Return the statistics of tensors.

    Args:
        run: Returns the tensors ``names`` of one batch.
        names: Tensors.
        images: Returns the batches, each time anew: they are read twice, for the extremes and for the histograms.
    """
    low = np.full(len(names), np.inf)
    high = np.full(len(names), -np.inf)
    for batch in images():
        for index, values in enumerate(run(batch)):
            low[index] = min(low[index], values.min())
            high[index] = max(high[index], values.max())
    high = np.maximum(high, low + 1e-6)
    counts = np.zeros((len(names), BINS), np.int64)
    for batch in images():
        for index, values in enumerate(run(batch)):
            flat = values.ravel()
            sample = flat[:: max(1, len(flat) // SAMPLES)]
            counts[index] += np.histogram(sample, BINS, (low[index], high[index]))[0]
    return {name: Statistics(float(low[i]), float(high[i]), counts[i]) for i, name in enumerate(names)}


def symmetric_scale(statistics: Statistics, after: Function | None = None) -> Scale:
    """Return the int8 scale with zero point 0, the one kind that TensorRT takes, of the smallest squared error.

    Args:
        statistics: Values of the tensor.
        after: Function that the values go through next; the error is measured behind it. Default: of the values.
    """
    bound = max(abs(statistics.low), abs(statistics.high), 1e-8)
    scales = [Scale(bound * part / 127, 0, True) for part in np.linspace(1, 0.2, CANDIDATES)]
    return _best(scales, statistics, after)


def asymmetric_scale(statistics: Statistics, after: Function | None = None) -> Scale:
    """Return the uint8 scale of the smallest squared error; 0 has a code of its own, because padding is 0.

    Args:
        statistics: Values of the tensor.
        after: Function that the values go through next; the error is measured behind it. Default: of the values.
    """
    low, high = min(statistics.low, 0.0), max(statistics.high, 1e-8)
    top = _best([_affine(low, high * part) for part in np.linspace(1, 0.2, CANDIDATES)], statistics, after)
    kept = top.step * (255 - top.zero)
    return _best([_affine(low * part, kept) for part in np.linspace(1, 0, CANDIDATES)], statistics, after)


def silu(values: NDArray[Any]) -> NDArray[Any]:
    """Return x * sigmoid(x)."""
    return values / (1 + np.exp(-np.clip(values, -80, 80)))


def weight_scales(weight: Array, floor: Array | None = None) -> Array:
    """Return the int8 step of every output channel of a weight (O, I, ...): its largest magnitude over 127.

    Args:
        weight: Weights, output channels first.
        floor: (O,) smallest steps allowed, or None.
    """
    steps = np.abs(weight.reshape(len(weight), -1)).max(1).astype(np.float32) / 127
    steps = np.maximum(steps, np.float32(1e-10))
    return steps if floor is None else np.maximum(steps, floor.astype(np.float32))


def quantize_weight(weight: Array, steps: Array) -> NDArray[np.int8]:
    """Return the int8 codes of weights (O, I, ...) with one step per output channel."""
    shape = (-1,) + (1,) * (weight.ndim - 1)
    return np.clip(np.rint(weight / steps.reshape(shape)), -127, 127).astype(np.int8)


def _affine(low: float, high: float) -> Scale:
    """Return the uint8 scale that spans low to high, moved so that 0 falls on a code."""
    step = max((high - low) / 255, 1e-10)
    return Scale(step, int(np.clip(np.rint(-low / step), 0, 255)), False)


def _best(scales: Sequence[Scale], statistics: Statistics, after: Function | None) -> Scale:
    """Return the scale of the smallest squared error; the widest of equal ones."""
    values, weights = statistics.centers, statistics.counts
    wanted = values if after is None else after(values)
    errors = []
    for scale in scales:
        found = scale.apply(values)
        errors.append(float((weights * (wanted - (found if after is None else after(found))) ** 2).sum()))
    return scales[int(np.argmin(errors))]
