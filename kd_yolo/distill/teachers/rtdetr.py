"""RT-DETR (Zhao et al., CVPR 2024, arXiv:2304.08069) as the teacher: queries turned into answers at anchors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from ultralytics.nn.modules.head import RTDETRDecoder
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils.ops import xywh2xyxy

from kd_yolo.distill.base import DetectorSpec, Taps
from kd_yolo.distill.teacher import ClassMap, fold_batchnorm
from kd_yolo.distill.teachers.base import Teacher
from kd_yolo.distill.teachers.dense import (
    BACKGROUND_LOGIT,
    anchor_grid,
    confidence,
    dense_spec,
    dense_taps,
    distances,
    known_classes,
    student_classes,
)

# How far from a box's centre an anchor may lie to speak for it, in strides and along each axis: at most 5 x 5 anchors a
# level, of the order of the ten that a student's assigner takes. The idea is FCOS' centre sampling (arXiv:2006.09214,
# section 3.2), whose 1.5 strides suit a student with one positive level per object.
CENTRE_RADIUS = 2.5
PROBE_PIXELS = 128


class RTDETRTeacher(Teacher):
    """An RT-DETR detector: neck maps as they enter the decoder, scores and boxes from the last layer's queries."""

    provides = frozenset({"neck", "scores", "boxes"})

    def __init__(self, model: DetectionModel, class_map: ClassMap) -> None:
        """Take a loaded detector.

        Args:
            model: In eval mode; its BatchNorm is folded in place.
            class_map: How the student's classes are found in it.
        """
        super().__init__()
        self.model = fold_batchnorm(model.eval()).requires_grad_(False)
        self.class_map = class_map
        self.register_buffer("class_known", known_classes(class_map), persistent=False)
        with torch.no_grad():  # Ultralytics notes no strides for this head
            maps = self._neck(torch.zeros(1, 3, PROBE_PIXELS, PROBE_PIXELS))
        self.strides = tuple(PROBE_PIXELS // int(x.shape[-1]) for x in maps)
        self.channels = {s: int(x.shape[1]) for s, x in zip(self.strides, maps, strict=True)}

    def describe(self, strides: Sequence[int]) -> DetectorSpec:
        """Return levels, classes and box bins, see the base class."""
        return dense_spec(strides, len(self.class_map.index), self.channels)

    def taps(self, images: Tensor, reads: frozenset[str], strides: Sequence[int], hold: int = 1) -> Taps:
        """Run backbone and neck, and the decoder when its answers are read, see the base class."""
        maps = self._neck(images)
        kept = [maps[self.strides.index(s)] for s in strides]
        if not reads & {"scores", "boxes"}:
            return dense_taps(kept, strides, None, None)
        decoder: RTDETRDecoder = self.model.model[-1]
        _, (boxes, logits, *_) = decoder(maps)
        known = student_classes(logits[-1].float().transpose(1, 2), self.class_map)
        anchors, stride_of = anchor_grid(kept, strides)
        canvas = (int(images.shape[-2]), int(images.shape[-1]))
        scores, sides = query_targets(boxes[-1].float(), known, anchors, stride_of, canvas, self.class_known)
        return dense_taps(kept, strides, scores, sides)

    def _neck(self, images: Tensor) -> list[Tensor]:
        outputs: list[Any] = []
        x: Any = images
        for layer in self.model.model[:-1]:
            if layer.f != -1:
                x = outputs[layer.f] if isinstance(layer.f, int) else [x if j == -1 else outputs[j] for j in layer.f]
            x = layer(x)
            outputs.append(x if layer.i in self.model.save else None)
        return [outputs[j] for j in self.model.model[-1].f]

    @property
    def title(self) -> str:
        """Return what this teacher is, for messages."""
        return "an RT-DETR detector"


def query_targets(
    boxes: Tensor,
    logits: Tensor,
    anchors: Tensor,
    strides: Tensor,
    canvas: tuple[int, int],
    known: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return what a set of queries says at anchors: class logits (B, K, A) and distances (B, 4, A).

    A query covers an anchor when the anchor's centre lies inside its box and within ``CENTRE_RADIUS`` strides of the
    box's centre along both axes. An anchor takes logits and box of the covering query with the highest logit of a known
    class. One that no query covers is background: ``BACKGROUND_LOGIT`` for every class and a box without area, which
    the box losses leave out. No logit is below that of the background.

    Args:
        boxes: Centre x, centre y, width, height in 0..1 of the canvas, (B, N, 4).
        logits: Class logits, (B, K, N).
        anchors: Centres in units of the stride, (A, 2).
        strides: Pixels, (A,).
        canvas: Height and width in pixels.
        known: (K,) booleans, the classes that count for the choice; None means all.
    """
    height, width = canvas
    pixels = boxes * boxes.new_tensor([width, height, width, height])
    corners, strength = xywh2xyxy(pixels), confidence(logits, known)
    points = anchors * strides.unsqueeze(-1)
    answers = []
    for one_pixels, one_corners, one_strength in zip(pixels, corners, strength, strict=True):  # A x N is large
        offset = points.unsqueeze(1)
        inside = ((offset > one_corners[:, :2]) & (offset < one_corners[:, 2:])).all(-1)
        near = ((offset - one_pixels[:, :2]).abs() <= CENTRE_RADIUS * strides.view(-1, 1, 1)).all(-1)
        answers.append(one_strength.masked_fill(~(inside & near), -torch.inf).max(-1))
    best = torch.stack([index for _, index in answers])
    covered = torch.stack([torch.isfinite(value) for value, _ in answers]).unsqueeze(1)
    classes = logits.gather(2, best.unsqueeze(1).expand(-1, logits.shape[1], -1)).clamp_min(BACKGROUND_LOGIT)
    sides = distances(corners.gather(1, best.unsqueeze(-1).expand(-1, -1, 4)), anchors, strides)
    return classes.where(covered, classes.new_tensor(BACKGROUND_LOGIT)), sides.where(covered, sides.new_zeros(()))
