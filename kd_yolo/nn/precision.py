"""Number formats."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_float32(values: Tensor) -> Tensor:
    """Return half-precision values in float32; float32 and float64 stay as they are."""
    return values if values.dtype == torch.float64 else values.float()
