"""Read neck maps and raw head outputs from a detector: the one place that knows Ultralytics' output forms.

The student's taps come from the training outputs it computes anyway. The teacher's are computed here, layer by layer up
to the head and then only the head branches that the method reads: no decode, no NMS and no dead branch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from ultralytics.nn.modules.head import Detect
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils.tal import make_anchors

from kd_yolo.distill.base import DetectorSpec, LevelSpec, Taps
from kd_yolo.errors import TeacherError


def detect_head(model: DetectionModel) -> Detect:
    """Return the Detect head of a detector.

    Raises:
        TeacherError: The model's last layer is no Detect head.
    """
    head = model.model[-1] if isinstance(getattr(model, "model", None), nn.Sequential) else None
    if not isinstance(head, Detect):
        raise TeacherError(f"{type(head).__name__} is not a Detect head; only detectors with one can be distilled")
    return head


def describe(model: DetectionModel, strides: Sequence[int] | None = None) -> DetectorSpec:
    """Return levels, classes and box bins of a detector.

    Args:
        model: A detector with a Detect head.
        strides: Keep only the levels of these strides, in this order; None keeps all.
    """
    head = detect_head(model)
    channels = {int(s): int(branch[0].conv.in_channels) for s, branch in zip(head.stride, head.cv2, strict=True)}
    levels = tuple(LevelSpec(channels[s], s) for s in (strides or channels))
    return DetectorSpec(levels=levels, num_classes=int(head.nc), reg_max=int(head.reg_max))


def common_strides(student: DetectionModel, teacher: DetectionModel) -> list[int]:
    """Return the strides both detectors have, finest first.

    Raises:
        TeacherError: They share none.
    """
    mine, theirs = ([int(s) for s in detect_head(model).stride] for model in (student, teacher))
    shared = sorted(set(mine) & set(theirs))
    if not shared:
        raise TeacherError(f"no common feature level: the student has strides {mine}, the teacher {theirs}")
    return shared


def student_taps(preds: Mapping[str, Any], head: Detect, strides: Sequence[int]) -> Taps:
    """Build taps from the training outputs of a student.

    Args:
        preds: Output of the model in training mode: the one-to-many dict, or a dict with ``one2many`` and ``one2one``.
        head: The student's head.
        strides: The matched strides.
    """
    one2many = preds.get("one2many", preds)
    one2one = preds.get("one2one")
    return _select(
        one2many["feats"], one2many["scores"], one2many["boxes"], one2one["scores"] if one2one else None, head, strides
    )


def teacher_taps(teacher: DetectionModel, images: Tensor, reads: frozenset[str], strides: Sequence[int]) -> Taps:
    """Run a frozen teacher up to what a method reads.

    Args:
        teacher: A detector in eval mode.
        images: (B, 3, H, W) in 0..1.
        reads: What to compute, of ``neck``, ``scores``, ``boxes``, ``scores_one2one``.
        strides: The matched strides.
    """
    if images.device.type in {"cpu", "cuda"}:  # Ultralytics found this layout numerically wrong on MPS
        images = images.contiguous(memory_format=torch.channels_last)
    feats = [x.contiguous() for x in neck_maps(teacher, images)]
    head = detect_head(teacher)

    def branch(layers: nn.ModuleList) -> Tensor:
        return torch.cat([layer(x).flatten(2) for layer, x in zip(layers, feats, strict=True)], dim=-1)

    nothing = images.new_zeros(images.shape[0], 0, sum(int(x.shape[-2] * x.shape[-1]) for x in feats))
    scores = branch(head.cv3) if "scores" in reads else nothing
    boxes = branch(head.cv2) if "boxes" in reads else nothing
    one2one_layers = getattr(head, "one2one_cv3", None)
    one2one = branch(one2one_layers) if one2one_layers is not None and "scores_one2one" in reads else None
    return _select(feats, scores, boxes, one2one, head, strides)


def neck_maps(model: DetectionModel, images: Tensor) -> list[Tensor]:
    """Run a detector up to its head and return the maps that enter it, L x (B, C_l, H_l, W_l)."""
    outputs: list[Tensor | None] = []
    x: Any = images
    for layer in model.model:
        if layer.f != -1:
            x = outputs[layer.f] if isinstance(layer.f, int) else [x if j == -1 else outputs[j] for j in layer.f]
        if isinstance(layer, Detect):
            return list(x)
        x = layer(x)
        outputs.append(x if layer.i in model.save else None)
    raise TeacherError("the model has no Detect head; only detectors with one can be distilled")


def select_anchors(
    values: Tensor, feats: Sequence[Tensor], head_strides: Sequence[int], strides: Sequence[int]
) -> Tensor:
    """Keep the anchors, along the last dimension, of the levels with the given strides."""
    if list(head_strides) == list(strides):
        return values
    parts = dict(zip(head_strides, values.split([int(x.shape[-2] * x.shape[-1]) for x in feats], dim=-1), strict=True))
    return torch.cat([parts[s] for s in strides], dim=-1)


def _select(
    feats: Sequence[Tensor], scores: Tensor, boxes: Tensor, one2one: Tensor | None, head: Detect, strides: Sequence[int]
) -> Taps:
    own = [int(s) for s in head.stride]
    kept = [feats[own.index(s)] for s in strides]
    kept_stride = torch.tensor([float(s) for s in strides], device=kept[0].device)
    anchors, stride_of = make_anchors(kept, kept_stride, 0.5)

    def keep(values: Tensor) -> Tensor:
        return select_anchors(values, feats, own, strides)

    return Taps(
        neck=tuple(kept),
        scores=keep(scores),
        boxes=keep(boxes),
        strides=stride_of.flatten(),
        anchors=anchors,
        scores_one2one=None if one2one is None else keep(one2one),
    )
