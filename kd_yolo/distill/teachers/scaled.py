"""A teacher that sees the same view on a larger canvas: what it says, brought to the student's grid.

A detector finds more on more pixels, and that knowledge fits a student on fewer (Qi et al., Multi-Scale Aligned
Distillation for Low-Resolution Detection, CVPR 2021, arXiv:2109.06875, section 3.2, align a teacher at twice the
resolution with its student by shifting one level, so that both maps have one grid). The choice among cells, logits and
boxes instead of feature maps, and ratios other than two are decided here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_yolo.distill.base import DetectorSpec, Taps
from kd_yolo.distill.ops.boxes import decode_boxes
from kd_yolo.distill.teachers.base import Teacher
from kd_yolo.distill.teachers.dense import anchor_grid, confidence, dense_spec, distances

Pairing = Literal["position", "stride"]


class ScaledTeacher(Teacher):
    """Any teacher that gives neck maps, scores or boxes, run on a larger canvas than the student's.

    Every level of the student takes from one level of the teacher. ``position`` takes the one whose cells cover the
    nearest share of the picture: at twice the canvas stride 16 for the student's 8, the same grid. ``stride`` takes
    that of the same stride, with more cells. Where several of the teacher's cells lie in one of the student's, the most
    confident one speaks. Boxes arrive in pixels of the student's canvas.
    """

    def __init__(self, inner: Teacher, canvas: int, student_canvas: int, pairing: Pairing = "stride") -> None:
        """Wrap a ready teacher.

        Args:
            inner: Of the student's classes.
            canvas: Side of the teacher's square images, pixels.
            student_canvas: Side of the student's, pixels.
            pairing: ``position`` or ``stride``.
        """
        super().__init__()
        self.inner = inner
        self.ratio = canvas / student_canvas
        self.pairing = pairing
        self.strides = inner.strides
        self.provides = inner.provides - {"head", "scores_one2one"}
        self.register_buffer("class_known", inner.class_known, persistent=False)

    def describe(self, strides: Sequence[int]) -> DetectorSpec:
        """Return levels, classes and box bins, see the base class."""
        taken = self.inner.describe(self.inner.strides)
        channels = {level.stride: level.channels for level in taken.levels}
        sources = {s: channels[self.source(s)] for s in strides}
        return dense_spec(strides, taken.num_classes, sources)

    def source(self, stride: int) -> int:
        """Return the teacher's stride that a level of the student takes from."""
        wanted = stride * (self.ratio if self.pairing == "position" else 1.0)
        return min(self.inner.strides, key=lambda s: abs(math.log(s / wanted)))

    def taps(self, images: Tensor, reads: frozenset[str], strides: Sequence[int], hold: int = 1) -> Taps:
        """Run the teacher on its canvas and bring its answers to the student's grid, see the base class.

        Args:
            images: (B, 3, H, W) on the teacher's canvas, in 0..1.
            reads: What to compute.
            strides: The matched strides, finest first.
            hold: Not used: the inside of the head is not given.
        """
        needed = tuple(sorted({self.source(s) for s in strides}))
        asked = reads | {"scores"} if "boxes" in reads else reads  # the choice among cells needs them
        taken = self.inner.taps(images, frozenset(asked), needed, hold)
        height, width = (round(side / self.ratio) for side in images.shape[-2:])
        grids = [(height // s, width // s) for s in strides]
        maps = dict(zip(needed, taken.neck, strict=True))
        neck = [_pooled(maps[self.source(s)].float(), g) for s, g in zip(strides, grids, strict=True)]
        anchors, stride_of = anchor_grid(neck, strides)
        given = replace(taken, neck=tuple(neck), anchors=anchors, strides=stride_of, head=None, scores_one2one=None)
        if not reads & {"scores", "boxes"}:
            empty = neck[0].new_zeros(len(images), 0, len(anchors))
            return replace(given, scores=empty, boxes=empty)
        chosen = torch.cat(
            [self._cells(taken, needed, self.source(s), maps, g) for s, g in zip(strides, grids, strict=True)], 1
        )
        scores = _take(taken.scores.float(), chosen)
        if "boxes" not in reads:
            return replace(given, scores=scores, boxes=scores.new_zeros(len(images), 0, len(anchors)))
        bins = self.inner.describe(needed).reg_max
        corners = decode_boxes(taken, bins) / self.ratio
        corners = _take(corners.transpose(1, 2), chosen).transpose(1, 2)
        return replace(given, scores=scores, boxes=distances(corners, anchors, stride_of))

    def _cells(
        self, taps: Taps, levels: Sequence[int], stride: int, maps: dict[int, Tensor], grid: tuple[int, int]
    ) -> Tensor:
        """Return for every cell of a grid the index of the teacher's anchor that speaks for it, (B, h w)."""
        sizes = {s: maps[s].shape[-2] * maps[s].shape[-1] for s in levels}
        start = sum(sizes[s] for s in levels[: levels.index(stride)])
        strength = confidence(taps.scores[..., start : start + sizes[stride]].float(), self.class_known)
        height, width = maps[stride].shape[-2:]
        _, index = F.adaptive_max_pool2d(strength.view(-1, 1, height, width), grid, return_indices=True)
        return index.flatten(1) + start

    @property
    def title(self) -> str:
        """Return what this teacher is, for messages."""
        return f"{self.inner.title} on a canvas {self.ratio:g} times as wide"


def _pooled(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return maps on a smaller grid; those of a teacher without maps have no channels, which not every device pools."""
    return F.adaptive_avg_pool2d(maps, grid) if maps.shape[1] else maps.new_zeros(len(maps), 0, *grid)


def _take(values: Tensor, index: Tensor) -> Tensor:
    """Return (B, C, A) from (B, C, A') by (B, A)."""
    return values.gather(2, index.unsqueeze(1).expand(-1, values.shape[1], -1))
