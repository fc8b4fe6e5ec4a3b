"""PKD: features matched by their Pearson correlation.

Cao et al., "PKD: General Distillation Framework for Object Detectors via Pearson Correlation Coefficient", NeurIPS
2022, arXiv:2207.02039, section 3.2: each channel of both maps is brought to mean 0 and variance 1 over the batch and
all cells, then the mean squared difference is taken, which is one minus the correlation. For channel c of level l with
N values (B H_l W_l), teacher map h, student map f, a 1x1 convolution g where the widths differ:

    z(x)_c = (x_c - mean(x_c)) / std(x_c)
    kd_pkd = weight mean_l 1/(2 C_l N) sum_c sum_i (z(g(f))_ci - z(h)_ci)^2 = weight mean_l mean_c (1 - r(g(f)_c, h_c))

So size and offset of the features do not matter, only where a channel is high and where it is low: detectors of other
families, whose features have other magnitudes, can teach. A channel that is flat over the whole batch is no evidence
and stays flat (a floor under the variance).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from kd_yolo.distill.base import DetectorSpec, DistillMethod, MethodArgs, Taps, at_least_float32
from kd_yolo.distill.ops.features import standardise, width_adapters


class PKDArgs(MethodArgs):
    """Arguments of ``pkd``."""

    weight: float = Field(default=6.0, ge=0.0, description="factor on kd_pkd")
    adapter: Literal["auto", "always"] = Field(default="auto", description="1x1 convolution at other widths, or always")


class PKD(DistillMethod):
    """One minus the Pearson correlation of corresponding channels (``kd_pkd``).

    Zero for a student that equals its teacher, unless ``adapter=always`` puts a random convolution between them.
    """

    Args = PKDArgs
    args: PKDArgs
    terms = ("kd_pkd",)

    def __init__(self, args: PKDArgs, student: DetectorSpec, teacher: DetectorSpec) -> None:
        """Build one adapter a level where it is needed."""
        super().__init__(args, student, teacher)
        self.adapters = width_adapters(student.levels, teacher.levels, always=args.adapter == "always")
        self.reads = frozenset({"neck"} if args.weight > 0 else ())

    def forward(self, student: Taps, teacher: Taps, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return ``kd_pkd``, see the base class."""
        if self.args.weight == 0:
            return {"kd_pkd": torch.zeros((), device=student.neck[0].device)}
        with torch.autocast(student.neck[0].device.type, enabled=False):
            levels = zip(self.adapters, student.neck, teacher.neck, strict=True)
            losses = [
                correlation_distance(adapt(at_least_float32(mine)), at_least_float32(theirs.detach()))
                for adapt, mine, theirs in levels
            ]
            return {"kd_pkd": self.args.weight * torch.stack(losses).mean()}


def correlation_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Return half the mean squared difference of standardised channels, one minus their mean correlation, a scalar.

    Args:
        student: Map at the teacher's width, (B, C, H, W).
        teacher: Map without gradient, (B, C, H, W).
    """
    return (standardise(student) - standardise(teacher)).square().mean() / 2
