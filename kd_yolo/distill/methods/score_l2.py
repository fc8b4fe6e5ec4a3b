"""Score-weighted L2 on neck features: the loss Ultralytics ships as ``distill_model``, as a method of this package.

Ultralytics 8.4, ``ultralytics/nn/distill_model.py``, ``DistillationModel.loss`` and ``loss_sl2``. Per level l with C_l
teacher channels, a student map f through a 1x1 - ReLU - 1x1 projector g, a teacher map h and its score m:

    kd_feat = weight sum_l [ sum_a m_a sum_c (g(f) - h)_ca^2 / (C_l sum_a m_a + 1e-9) ]
    m_a = max_k sigmoid((one-to-many logit + one-to-one logit) / 2)

A teacher without a one-to-one head gives its one-to-many logits alone, as upstream's ``decouple_outputs`` does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from kd_yolo.distill.base import (
    DetectorSpec,
    DistillMethod,
    MethodArgs,
    Taps,
    at_least_float32,
    check_same_anchors,
    level_sizes,
)


class ScoreL2Args(MethodArgs):
    """Arguments of ``score-l2``."""

    weight: float = Field(default=6.0, ge=0.0, description="factor on kd_feat; Ultralytics' dis")


class ScoreL2(DistillMethod):
    """Score-weighted L2 between projected student maps and teacher maps (``kd_feat``).

    Not zero for a student that equals its teacher: the projector starts at random.
    """

    Args = ScoreL2Args
    args: ScoreL2Args
    zero_at_equality: ClassVar[bool] = False
    terms = ("kd_feat",)

    def __init__(self, args: ScoreL2Args, student: DetectorSpec, teacher: DetectorSpec) -> None:
        """Build one projector a level, student channels to teacher channels."""
        super().__init__(args, student, teacher)
        self.projectors = nn.ModuleList(
            _projector(mine.channels, theirs.channels)
            for mine, theirs in zip(student.levels, teacher.levels, strict=True)
        )
        self.reads = frozenset({"neck", "scores", "scores_one2one"} if args.weight > 0 else ())

    def forward(self, student: Taps, teacher: Taps, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return ``kd_feat``, see the base class.

        Raises:
            TeacherError: Teacher and student have not the same anchors.
        """
        if self.args.weight == 0:
            return {"kd_feat": torch.zeros((), device=student.scores.device)}
        check_same_anchors(student.scores, teacher.scores)
        with torch.autocast(student.scores.device.type, enabled=False):
            scores = teacher_scores(teacher).split(level_sizes(teacher.neck), dim=-1)
            levels = zip(self.projectors, student.neck, teacher.neck, scores, strict=True)
            losses = [
                score_weighted_l2(project(at_least_float32(mine)), at_least_float32(theirs.detach()), score)
                for project, mine, theirs, score in levels
            ]
            return {"kd_feat": self.args.weight * torch.stack(losses).sum()}


def teacher_scores(teacher: Taps) -> Tensor:
    """Return m_a, the teacher's confidence per anchor, (B, A); classes it does not know are left out."""
    logits = at_least_float32(teacher.scores.detach())
    if teacher.scores_one2one is not None:
        logits = (logits + at_least_float32(teacher.scores_one2one.detach())) / 2
    if teacher.class_mask is not None:
        logits = logits.masked_fill(~teacher.class_mask.unsqueeze(-1), -torch.inf)
    return logits.amax(1).sigmoid()


def score_weighted_l2(student: Tensor, teacher: Tensor, score: Tensor) -> Tensor:
    """Return the squared difference, weighted by score over cells and averaged over channels, a scalar.

    Args:
        student: Projected map, (B, C, H, W).
        teacher: Map without gradient, (B, C, H, W).
        score: m_a of this level, (B, H W).
    """
    per_cell = (student - teacher).square().sum(1).flatten(1)  # over channels first: no weighted (B, C, HW) copy
    return (per_cell * score).sum() / (score.sum() * student.shape[1] + 1e-9)


def _projector(student_channels: int, teacher_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(student_channels, teacher_channels, 1),
        nn.ReLU(inplace=True),
        nn.Conv2d(teacher_channels, teacher_channels, 1),
    )
