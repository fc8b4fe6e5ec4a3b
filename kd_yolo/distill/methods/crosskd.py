"""CrossKD: the student's held maps go through the rest of the teacher's head.

Wang et al., "CrossKD: Cross-Head Knowledge Distillation for Object Detection", CVPR 2024, arXiv:2306.11369, section 3.
The student's map after block k of each head branch, given the mean and deviation of the teacher's, passes the teacher's
remaining, frozen layers; their "reused" predictions are pulled to the teacher's own (equations 4 and 5):

    kd_cross_cls = lambda_c sum_{a,k} |s - q| BCE(s, q) / Z        q = sigmoid(teacher), s = sigmoid(reused)
    kd_cross_box = lambda_r sum_a max_k q_ak (1 - GIoU(reused box, teacher's box)) / Z
    kd_cross_dfl = lambda_d sum_a max_k q_ak mean_sides KL(teacher bins || reused bins) / sum_a max_k q_ak

The student's own last blocks and predictors see the ground truth alone, so that labels and teacher do not pull at the
same numbers. The gradient reaches the student's blocks 1 to k, neck and backbone. Z is the assigner's soft count of
positives. A YOLO branch has two blocks where the paper's has four, so k = 1 stands for its best, 3 of 4.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from kd_yolo.distill.base import DetectorSpec, DistillMethod, MethodArgs, Taps, check_same_anchors
from kd_yolo.distill.ops.crossing import Hold, crossed_bins, crossed_losses, head_adapters, reused_predictions
from kd_yolo.errors import ConfigError, TeacherError


class CrossKDArgs(MethodArgs):
    """Arguments of ``crosskd``."""

    k: int = Field(default=1, ge=0, le=2, description="head block after which the student crosses over")
    hold: Hold = Field(default="pre", description="cross before (pre) or after (post) the block's activation")
    lambda_c: float = Field(default=0.4, ge=0.0, description="factor on kd_cross_cls; 0 leaves it out")
    lambda_r: float = Field(default=5.0, ge=0.0, description="factor on kd_cross_box; 0 leaves it out")
    lambda_d: float = Field(default=0.0, ge=0.0, description="factor on kd_cross_dfl, needs a teacher with reg_max > 1")


class CrossKD(DistillMethod):
    """Cross-head distillation of classes (``kd_cross_cls``) and boxes (``kd_cross_box``).

    Not zero for a student that equals its teacher: |s - q| has a kink there, and float32 lies on either side of it.
    """

    Args = CrossKDArgs
    args: CrossKDArgs
    zero_at_equality: ClassVar[bool] = False
    batch_statistics: ClassVar[bool] = True

    def __init__(self, args: CrossKDArgs, student: DetectorSpec, teacher: DetectorSpec) -> None:
        """Choose the terms and build an adapter of every hold whose width differs.

        Raises:
            ConfigError: Every factor is 0, a head has fewer than k blocks, or bins are asked of a teacher without.
            TeacherError: A detector has no head to cross.
        """
        super().__init__(args, student, teacher)
        factors = {"kd_cross_cls": args.lambda_c, "kd_cross_box": args.lambda_r, "kd_cross_dfl": args.lambda_d}
        self.weights = {name: args.weight * factor for name, factor in factors.items() if factor > 0}
        self.terms = tuple(self.weights)
        if not self.terms:
            raise ConfigError("crosskd: lambda_c, lambda_r and lambda_d are all 0; raise one or use method=none")
        if args.lambda_d > 0 and teacher.reg_max == 1:
            raise ConfigError("crosskd: lambda_d needs a teacher with box bins (reg_max > 1); set kd.lambda_d=0")
        self.hold = args.k
        self.adapters = head_adapters("crosskd", student, teacher, args.k)
        self.reads = frozenset({"head", "scores", "boxes"} if args.weight > 0 else ())

    def forward(self, student: Taps, teacher: Taps, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the terms whose factor is above 0, see the base class.

        Raises:
            TeacherError: Teacher and student have not the same anchors, or a head was not tapped.
        """
        if self.args.weight == 0:
            return {name: torch.zeros((), device=student.scores.device) for name in self.terms}
        if student.head is None or teacher.head is None:
            side = "student" if student.head is None else "teacher"
            raise TeacherError(f"crosskd: the {side} has no YOLO head to cross; choose another method or teacher")
        check_same_anchors(student.scores, teacher.scores)
        bins = self.teacher_spec.reg_max
        with torch.autocast(student.scores.device.type, enabled=False):
            scores, boxes = reused_predictions(student.head, teacher.head, self.adapters, self.args.hold)
            cls, box = crossed_losses(scores, boxes, student, teacher, batch, bins)
            losses = {"kd_cross_cls": cls, "kd_cross_box": box}
            if "kd_cross_dfl" in self.weights:
                losses["kd_cross_dfl"] = crossed_bins(boxes, teacher, bins)
        return {name: weight * losses[name] for name, weight in self.weights.items()}
