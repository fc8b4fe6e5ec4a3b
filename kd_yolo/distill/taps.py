"""Read neck maps and raw head outputs from a detector: the one place that knows Ultralytics' output forms.

The student's taps come from the training outputs it computes anyway. The teacher's are computed here, layer by layer up
to the head and then only the head branches that the method reads: no decode, no NMS and no dead branch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from ultralytics.nn.modules.head import Detect
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils.tal import make_anchors

from kd_yolo.distill.base import DetectorSpec, HeadTaps, LevelSpec, Taps
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
    levels = {
        int(stride): LevelSpec(int(box[0].conv.in_channels), int(stride), _branch_channels(cls), _branch_channels(box))
        for stride, cls, box in zip(head.stride, head.cv3, head.cv2, strict=True)
    }
    chosen = tuple(levels[s] for s in (strides or levels))
    return DetectorSpec(levels=chosen, num_classes=int(head.nc), reg_max=int(head.reg_max))


def common_strides(student: Sequence[int], teacher: Sequence[int]) -> list[int]:
    """Return the strides that both detectors have, finest first.

    Raises:
        TeacherError: They share none.
    """
    shared = sorted(set(student) & set(teacher))
    if not shared:
        raise TeacherError(
            f"no common feature level: the student has strides {list(student)}, the teacher {list(teacher)}"
        )
    return shared


def head_strides(model: DetectionModel) -> list[int]:
    """Return the strides of a detector's levels in pixels, in its own order."""
    return [int(s) for s in detect_head(model).stride]


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


def teacher_taps(
    teacher: DetectionModel, images: Tensor, reads: frozenset[str], strides: Sequence[int], hold: int = 1
) -> Taps:
    """Run a frozen teacher up to what a method reads.

    Args:
        teacher: A detector in eval mode.
        images: (B, 3, H, W) in 0..1.
        reads: What to compute, of ``neck``, ``scores``, ``boxes``, ``scores_one2one``, ``head``.
        strides: The matched strides.
        hold: Block k after which the head is tapped when ``head`` is read.
    """
    if images.device.type in {"cpu", "cuda"}:  # Ultralytics found this layout numerically wrong on MPS
        images = images.contiguous(memory_format=torch.channels_last)
    feats = [x.contiguous() for x in neck_maps(teacher, images)]
    head = detect_head(teacher)

    def branch(layers: nn.ModuleList) -> Tensor:
        return torch.cat([layer(x).flatten(2) for layer, x in zip(layers, feats, strict=True)], dim=-1)

    nothing = images.new_zeros(images.shape[0], 0, sum(int(x.shape[-2] * x.shape[-1]) for x in feats))
    with held_in_head(head, hold if "head" in reads else 0) as held:
        scores = branch(head.cv3) if reads & {"scores", "head"} else nothing
        boxes = branch(head.cv2) if reads & {"boxes", "head"} else nothing
    one2one_layers = getattr(head, "one2one_cv3", None)
    one2one = branch(one2one_layers) if one2one_layers is not None and "scores_one2one" in reads else None
    taps = _select(feats, scores, boxes, one2one, head, strides)
    return replace(taps, head=head_taps(head, taps.neck, held, hold, strides)) if "head" in reads else taps


@contextmanager
def held_in_head(head: Detect, hold: int) -> Iterator[dict[nn.Module, Tensor]]:
    """Catch what block ``hold`` of every one-to-many head branch gives to its activation, while the context is open.

    The activation is one in-place module that all convolutions share, so the block around it tells whose call it is,
    and what it gets is copied before it is overwritten. The hooks are gone afterwards: a hook that stays would be
    pickled into every checkpoint. With ``hold`` 0 nothing is caught.

    Yields:
        Pre-activation maps (B, C, H_l, W_l) by their block, filled by the forward pass.
    """
    held: dict[nn.Module, Tensor] = {}
    if hold == 0:
        yield held
        return
    inside: list[nn.Module] = []
    blocks = {_last_convolution(branch[hold - 1]): branch[hold - 1] for branch in (*head.cv2, *head.cv3)}

    def enter(block: nn.Module, inputs: Any) -> None:
        inside.append(block)

    def leave(block: nn.Module, inputs: Any, output: Any) -> None:
        inside.pop()

    def keep(activation: nn.Module, inputs: Any) -> None:
        if inside:
            held[blocks[inside[-1]]] = inputs[0].clone()

    handles = [block.register_forward_pre_hook(enter) for block in blocks]
    handles += [block.register_forward_hook(leave) for block in blocks]
    handles += [act.register_forward_pre_hook(keep) for act in {block.act for block in blocks}]
    try:
        yield held
    finally:
        for handle in handles:
            handle.remove()


def head_taps(
    head: Detect, neck: Sequence[Tensor], held: Mapping[nn.Module, Tensor], hold: int, strides: Sequence[int]
) -> HeadTaps:
    """Return what ``held_in_head`` caught, level by level, and the layers that follow.

    Args:
        head: The head that ran.
        neck: Its input maps at the matched strides.
        held: What was caught.
        hold: Block k.
        strides: The matched strides.
    """
    own = [int(s) for s in head.stride]
    cls, box = ([branches[own.index(s)] for s in strides] for branches in (head.cv3, head.cv2))

    def holds(branches: Sequence[nn.Sequential]) -> tuple[Tensor, ...]:
        return tuple(held[branch[hold - 1]] for branch in branches) if hold else tuple(neck)

    def tails(branches: Sequence[nn.Sequential]) -> tuple[Callable[[Tensor], Tensor], ...]:
        return tuple(branch[hold:] for branch in branches)

    # Not the module itself: it writes in place.
    activate = type(_last_convolution(cls[0][hold - 1]).act)() if hold else nn.Identity()
    return HeadTaps(holds(cls), holds(box), activate, tails(cls), tails(box))


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


def _last_convolution(block: nn.Module) -> Any:
    """Return the convolution of a head block that ends it, the one with the activation."""
    return [module for module in block.modules() if isinstance(getattr(module, "act", None), nn.Module)][-1]


def _branch_channels(branch: nn.Sequential) -> tuple[int, ...]:
    """Return the channels that enter a head branch and those that leave each block, without the predictor."""
    first = next(module for module in branch[0].modules() if isinstance(module, nn.Conv2d))
    return (first.in_channels, *(int(_last_convolution(block).conv.out_channels) for block in branch[:-1]))


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
