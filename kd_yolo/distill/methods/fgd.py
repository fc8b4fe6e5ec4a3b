"""FGD: focal and global distillation of the neck maps.

Yang et al., "Focal and Global Knowledge Distillation for Detectors", CVPR 2022, arXiv:2111.11837. S is the student's
map, adapted to the teacher's C channels, T the teacher's, M the boxes' weights or those of what is outside, A^s and A^c
attention over cells and channels (softmax of the mean |F| / tau), B images. Summed over the levels:

    kd_fgd_fg, kd_fgd_bg = alpha, beta  256 / C 1/B sum M A^s(T) A^c(T) (S - T)^2                        (eq. 9)
    kd_fgd_att           = gamma 1/B (sum |A^s(S) - A^s(T)| + 256 / C sum |A^c(S) - A^c(T)|)             (eq. 10)
    kd_fgd_global        = lambda 256 / C 1/B sum (R(T) - R(S))^2                                        (eq. 12)
    R(F) = F + W_2 ReLU(LN(W_1 sum_p softmax_p(W_k F) F_p))                        GcBlock, one of S and one of T

The paper's necks have 256 channels everywhere; 256 / C keeps its factors meaningful at other widths.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from kd_yolo.distill.base import DetectorSpec, DistillMethod, MethodArgs, Taps, at_least_float32
from kd_yolo.distill.ops.attention import channel_attention, decoupled_loss, spatial_attention
from kd_yolo.distill.ops.context import context_block, global_context
from kd_yolo.distill.ops.features import width_adapters
from kd_yolo.distill.ops.masks import decoupled_masks, ground_truth
from kd_yolo.errors import ConfigError

REFERENCE_CHANNELS = 256


class FGDArgs(MethodArgs):
    """Arguments of ``fgd``; the paper's Greek letters."""

    alpha: float = Field(default=5e-4, ge=0.0, description="factor on kd_fgd_fg, the boxes; 0 leaves it out")
    beta: float = Field(default=2.5e-4, ge=0.0, description="factor on kd_fgd_bg, the background; 0 leaves it out")
    gamma: float = Field(default=1e-3, ge=0.0, description="factor on kd_fgd_att, the attention; 0 leaves it out")
    global_weight: float = Field(default=5e-6, ge=0.0, description="lambda, factor on kd_fgd_global; 0 leaves it out")
    tau: float = Field(default=0.5, gt=0.0, description="temperature of the attention")
    attention: Literal["raw", "scaled"] = Field(default="scaled", description="softmax of |F|, or of |F| / its maximum")


class FGD(DistillMethod):
    """Focal terms (``kd_fgd_fg``, ``kd_fgd_bg``, ``kd_fgd_att``) and a global one (``kd_fgd_global``)."""

    Args = FGDArgs
    args: FGDArgs

    def __init__(self, args: FGDArgs, student: DetectorSpec, teacher: DetectorSpec) -> None:
        """Choose the terms and build adapters and context blocks.

        Raises:
            ConfigError: Every factor is 0.
        """
        super().__init__(args, student, teacher)
        factors = {
            "kd_fgd_fg": args.alpha,
            "kd_fgd_bg": args.beta,
            "kd_fgd_att": args.gamma,
            "kd_fgd_global": args.global_weight,
        }
        self.weights = {name: args.weight * factor for name, factor in factors.items() if factor > 0}
        self.terms = tuple(self.weights)
        if not self.terms:
            raise ConfigError("fgd: alpha, beta, gamma and global_weight are all 0; raise one or use method=none")
        self.adapters = width_adapters(student.levels, teacher.levels)
        if "kd_fgd_global" in self.weights:
            self.contexts = nn.ModuleDict(
                {
                    side: nn.ModuleList(context_block(level.channels) for level in teacher.levels)
                    for side in ("student", "teacher")
                }
            )
        self.reads = frozenset({"neck"} if args.weight > 0 else ())

    def forward(self, student: Taps, teacher: Taps, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the terms whose factor is above 0, see the base class; without boxes all is background."""
        if self.args.weight == 0:
            return {name: torch.zeros((), device=student.neck[0].device) for name in self.terms}
        with torch.autocast(student.neck[0].device.type, enabled=False):
            boxes, image = ground_truth(batch, at_least_float32(student.neck[0]))
            sums: dict[str, Tensor] = {}
            for level, (mine, theirs) in enumerate(zip(student.neck, teacher.neck, strict=True)):
                mine = self.adapters[level](at_least_float32(mine))
                theirs = at_least_float32(theirs.detach())
                theirs = theirs.clone() if theirs.is_inference() else theirs  # autograd keeps no inference tensors
                for name, loss in self._level(level, mine, theirs, boxes, image).items():
                    sums[name] = sums[name] + loss if name in sums else loss
        return {name: weight * sums[name] for name, weight in self.weights.items()}

    def _level(self, level: int, mine: Tensor, theirs: Tensor, boxes: Tensor, image: Tensor) -> dict[str, Tensor]:
        attention = self.args.tau, self.args.attention == "scaled"
        scale = REFERENCE_CHANNELS / theirs.shape[1]
        losses: dict[str, Tensor] = {}
        if "kd_fgd_fg" in self.weights or "kd_fgd_bg" in self.weights:
            masks = decoupled_masks(boxes, image, len(mine), (mine.shape[2], mine.shape[3]))
            losses["kd_fgd_fg"], losses["kd_fgd_bg"] = (
                scale * loss for loss in decoupled_loss(mine, theirs, *masks, *attention)
            )
        if "kd_fgd_att" in self.weights:
            losses["kd_fgd_att"] = attention_loss(mine, theirs, *attention)
        if "kd_fgd_global" in self.weights:
            seen = [
                global_context(x, self.contexts[side][level])  # type: ignore[index]
                for x, side in ((mine, "student"), (theirs, "teacher"))
            ]
            losses["kd_fgd_global"] = scale * (seen[1] - seen[0]).square().sum() / len(mine)
        return losses


def attention_loss(student: Tensor, teacher: Tensor, tau: float, scaled: bool = False) -> Tensor:
    """Return the L1 distance of both attentions, sums over cells and channels and a mean over the batch, a scalar.

    Args:
        student: S, adapted to the teacher's channels, (B, C, H, W).
        teacher: T without gradient, (B, C, H, W).
        tau: Temperature.
        scaled: See ``spatial_attention``.
    """
    cells = (spatial_attention(student, tau, scaled) - spatial_attention(teacher, tau, scaled)).abs().sum()
    channels = (channel_attention(student, tau, scaled) - channel_attention(teacher, tau, scaled)).abs().sum()
    return (cells + REFERENCE_CHANNELS / student.shape[1] * channels) / len(student)
