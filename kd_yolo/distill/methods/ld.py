"""LD: localization distillation on the box distributions, where a box is worth learning.

Zheng et al., "Localization Distillation for Dense Object Detection", CVPR 2022, arXiv:2102.12252. A head with R bins
per box side predicts a distribution over distances; its shape says how sure the teacher is of an edge, and that is what
the student learns (section 3.2). Per anchor a and side e, teacher bins t, student bins s:

    LD_a = mean_e tau^2 KL(softmax(t_ae / tau) || softmax(s_ae / tau))
    kd_ld = weight [mean of LD_a over the main region + vlr_weight mean of LD_a over the valuable region]

The main region is the assigner's foreground. The valuable localization region (section 3.3, algorithm 1) are the other
anchors with DIoU(anchor box, some ground truth) >= gamma alpha_pos, alpha_pos the positive threshold of that ground
truth as ATSS sets it (Zhang et al., CVPR 2020, arXiv:1912.02424, section 3.2): mean + standard deviation of the IoU of
the 9 closest anchors of every level. An anchor-free head has no anchor boxes; a square of ``anchor_scale`` strides
around the anchor point stands for one, as in the paper's detectors (8 strides). The paper's upper end, alpha_pos, is
here the assigner's own decision: what it calls foreground is the main region and not counted twice. The anchor with the
highest DIoU belongs to the region whatever its value, so that no small defect is left out.

tau = 10 and gamma = 0.25 are the paper's. Needs bins: one ``reg_max`` above 1 on both sides. YOLO26 and LightNet
regress distances (``reg_max`` 1) and have no distribution to distil.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from kd_yolo.distill.base import DetectorSpec, DistillMethod, MethodArgs, Taps, at_least_float32, level_sizes
from kd_yolo.distill.ops.boxes import distribution_loss
from kd_yolo.distill.ops.regions import ground_truth_corners, valuable_region
from kd_yolo.errors import ConfigError


class LDArgs(MethodArgs):
    """Arguments of ``ld``."""

    tau: float = Field(default=10.0, gt=0.0, description="temperature of the softmax over bins")
    gamma: float = Field(default=0.25, gt=0.0, le=1.0, description="lower end of the valuable region, times alpha_pos")
    vlr_weight: float = Field(default=1.0, ge=0.0, description="factor on the valuable region; 0 leaves it out")
    anchor_scale: float = Field(default=8.0, gt=0.0, description="side of an anchor's box, in strides")


class LD(DistillMethod):
    """KL over box bins in the main and the valuable localization region (``kd_ld``)."""

    Args = LDArgs
    args: LDArgs
    needs_bins: ClassVar[bool] = True
    terms = ("kd_ld",)

    def __init__(self, args: LDArgs, student: DetectorSpec, teacher: DetectorSpec) -> None:
        """Check that both detectors have the same bins.

        Raises:
            ConfigError: They have not.
        """
        super().__init__(args, student, teacher)
        if student.reg_max != teacher.reg_max or student.reg_max == 1:
            raise ConfigError(
                f"ld compares box bins and needs one reg_max above 1: the student has {student.reg_max}, the teacher "
                f"{teacher.reg_max}; use bckd or kd-lightnet, which compare boxes"
            )
        self.reads = frozenset({"boxes"} if args.weight > 0 else ())

    def forward(self, student: Taps, teacher: Taps, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return ``kd_ld``, see the base class; 0 for a batch without boxes, or with none given."""
        if self.args.weight == 0:
            return {"kd_ld": torch.zeros((), device=student.boxes.device)}
        with torch.autocast(student.boxes.device.type, enabled=False):
            mine, theirs = at_least_float32(student.boxes), at_least_float32(teacher.boxes.detach())
            main = torch.zeros(mine.shape[0], mine.shape[-1], dtype=torch.bool, device=mine.device)
            main = batch["fg_mask"] if batch.get("fg_mask") is not None else main
            loss = self._mean_divergence(mine, theirs, main)
            if self.args.vlr_weight > 0:
                loss = loss + self.args.vlr_weight * self._mean_divergence(
                    mine, theirs, self._valuable(student, batch) & ~main
                )
        return {"kd_ld": self.args.weight * loss}

    def _mean_divergence(self, student: Tensor, teacher: Tensor, region: Tensor) -> Tensor:
        tau = self.args.tau
        weight = region.to(student.dtype)
        return tau**2 * distribution_loss(student / tau, teacher / tau, weight, self.student_spec.reg_max)

    def _valuable(self, student: Taps, batch: Mapping[str, Any]) -> Tensor:
        """Return the anchors near a ground truth, (B, A); none without ground truth."""
        images, anchors = student.boxes.shape[0], student.boxes.shape[-1]
        if any(batch.get(key) is None for key in ("bboxes", "batch_idx")):
            return torch.zeros(images, anchors, dtype=torch.bool, device=student.boxes.device)
        stride = self.student_spec.levels[0].stride
        canvas = (student.neck[0].shape[-1] * stride, student.neck[0].shape[-2] * stride)
        return valuable_region(
            ground_truth_corners(batch, images, canvas, student.boxes.device),
            student.anchors * student.strides.unsqueeze(-1),
            student.strides * self.args.anchor_scale,
            level_sizes(student.neck),
            self.args.gamma,
        )
