"""Numbers that a file stores for a convolution, whatever its format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Values:
    """Constant numbers and how they are stored.

    Attributes:
        data: What they stand for.
        kind: ``float32``, ``float16`` or ``int8`` (integers with steps, of any width).
        step: Distance of two neighbouring codes for each of them, of the shape of ``data``; None where they are floats.
    """

    data: Array
    kind: str
    step: Array | None = None

    @classmethod
    def of(cls, stored: NDArray[Any]) -> Values:
        """Return the values of a stored array."""
        return cls(stored.astype(np.float64), str(stored.dtype))

    def dequantized(self, zero: Array, step: Array) -> Values:
        """Return the numbers that integer codes stand for; both are of a shape that spreads over the codes'."""
        steps = np.broadcast_to(step, self.data.shape)
        return Values((self.data - zero) * steps, "int8", np.abs(steps))

    def cast(self, dtype: np.dtype[Any]) -> Values:
        """Return them converted to a type of float; they keep the coarser rounding of the two."""
        data = self.data.astype(dtype).astype(np.float64)
        kind = str(dtype) if self.kind == "float32" else self.kind
        return replace(self, data=data, kind=kind)

    def reshaped(self, shape: Sequence[int]) -> Values:
        """Return them in another shape of the same order."""
        step = None if self.step is None else self.step.reshape(shape)
        return replace(self, data=self.data.reshape(shape), step=step)

    def transposed(self, order: Sequence[int]) -> Values:
        """Return them with their axes in another order."""
        step = None if self.step is None else self.step.transpose(order)
        return replace(self, data=self.data.transpose(order), step=step)


@dataclass(frozen=True)
class Stored:
    """A convolution of a file.

    Attributes:
        name: The file's name for it.
        weight: As PyTorch lays it out: (O, I / groups, H, W), of a transposed one (I, O / groups, H, W).
        bias: (O,), or None.
    """

    name: str
    weight: Values
    bias: Values | None


class NotConstantError(Exception):
    """Weights are computed from something that is no constant, or in a way that is not known here."""
