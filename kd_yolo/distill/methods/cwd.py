"""Channel-wise distillation on normalised neck features.

Shu et al., "Channel-wise Knowledge Distillation for Dense Prediction", ICCV 2021, arXiv:2011.13256, section 3.2: every
channel becomes a distribution over the cells of its map (softmax with a temperature), and the student's is pulled to
the teacher's by a KL divergence, so that the salient cells of a channel count most. For image b, channel c, level l
with N_l = H_l W_l cells, teacher map h and student map f, a 1x1 convolution g where the widths differ:

    p_bci = softmax_i(h_bci / (tau s_c))        q_bci = softmax_i(g(f)_bci / (tau u_c))
    kd_cwd = weight mean_l mean_b tau^2 / C_l sum_c sum_i p_bci log(p_bci / q_bci)

s_c and u_c are the standard deviations of channel c over the batch and all cells; ``normalise=false`` sets them to 1,
the paper's form. The paper distils one map of one network design; the necks of two detectors differ in scale by channel
and level, and with one tau for all a loud channel gives a one-hot distribution and a quiet one a flat one. A shift
needs no treatment: the softmax cancels it. tau^2 keeps the size of the gradient when tau changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from kd_yolo.distill.base import DetectorSpec, DistillMethod, MethodArgs, Taps, at_least_float32
from kd_yolo.distill.ops.features import channel_scale, width_adapters


class CWDArgs(MethodArgs):
    """Arguments of ``cwd``."""

    tau: float = Field(default=1.0, gt=0.0, description="temperature of the softmax over cells")
    normalise: bool = Field(default=True, description="divide every channel by its standard deviation first")
    adapter: Literal["auto", "always"] = Field(default="auto", description="1x1 convolution at other widths, or always")


class CWD(DistillMethod):
    """KL divergence between the spatial distributions of corresponding channels (``kd_cwd``).

    Zero for a student that equals its teacher, unless ``adapter=always`` puts a random convolution between them.
    """

    Args = CWDArgs
    args: CWDArgs
    needs_cells: ClassVar[bool] = True
    terms = ("kd_cwd",)

    def __init__(self, args: CWDArgs, student: DetectorSpec, teacher: DetectorSpec) -> None:
        """Build one adapter a level where it is needed."""
        super().__init__(args, student, teacher)
        self.adapters = width_adapters(student.levels, teacher.levels, always=args.adapter == "always")
        self.reads = frozenset({"neck"} if args.weight > 0 else ())

    def forward(self, student: Taps, teacher: Taps, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return ``kd_cwd``, see the base class."""
        if self.args.weight == 0:
            return {"kd_cwd": torch.zeros((), device=student.neck[0].device)}
        tau, normalise = self.args.tau, self.args.normalise
        with torch.autocast(student.neck[0].device.type, enabled=False):
            levels = zip(self.adapters, student.neck, teacher.neck, strict=True)
            losses = [
                channel_divergence(adapt(at_least_float32(mine)), at_least_float32(theirs.detach()), tau, normalise)
                for adapt, mine, theirs in levels
            ]
            return {"kd_cwd": self.args.weight * torch.stack(losses).mean()}


def channel_divergence(student: Tensor, teacher: Tensor, tau: float, normalise: bool = True) -> Tensor:
    """Return tau^2 KL(p || q) over the cells of a channel, mean over channels and images, a scalar.

    Args:
        student: Map at the teacher's width, (B, C, H, W).
        teacher: Map without gradient, (B, C, H, W).
        tau: Temperature.
        normalise: Divide every channel by its standard deviation over batch and cells.
    """
    log_q, log_p = (_log_distribution(x, tau, normalise) for x in (student, teacher))
    divergence = F.kl_div(log_q, log_p, reduction="sum", log_target=True)
    return tau**2 * divergence / (student.shape[0] * student.shape[1])


def _log_distribution(features: Tensor, tau: float, normalise: bool) -> Tensor:
    scaled = features * (channel_scale(features) / tau) if normalise else features / tau
    return scaled.flatten(2).log_softmax(-1)
