"""Random taps and matching specs, shared by the tests of the distillation methods."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from kd_yolo.distill.base import DetectorSpec, DistillMethod, HeadTaps, LevelSpec, Taps, build_method


@dataclass(frozen=True)
class Shape:
    """Sizes of one detector's taps; the defaults are a tiny two-level detector."""

    images: int = 2
    classes: int = 3
    reg_max: int = 4
    sizes: tuple[tuple[int, int], ...] = ((3, 3), (2, 2))
    channels: tuple[int, ...] = (4, 6)
    strides: tuple[int, ...] = (8, 16)
    head: bool = True

    def spec(self) -> DetectorSpec:
        levels = tuple(
            LevelSpec(c, s, self.cls_channels(c), self.box_channels(c)) if self.head else LevelSpec(c, s)
            for c, s in zip(self.channels, self.strides, strict=True)
        )
        return DetectorSpec(levels, self.classes, self.reg_max)

    def cls_channels(self, channels: int) -> tuple[int, ...]:
        """Return the widths of a level's class branch: neck map, block 1, block 2."""
        return channels, 5, 3

    def box_channels(self, channels: int) -> tuple[int, ...]:
        """Return the widths of a level's box branch."""
        return channels, 4, 3


def random_taps(
    shape: Shape, seed: int, dtype: torch.dtype = torch.float32, grad: bool = False, one2one: bool = True
) -> Taps:
    """Return taps with plausible values: logits around -1, distances of about two cells."""
    generator = torch.Generator().manual_seed(seed)
    anchors = sum(h * w for h, w in shape.sizes)

    def draw(*size: int, shift: float = 0.0) -> Tensor:
        values = torch.randn(*size, generator=generator, dtype=torch.float64) + shift
        return values.to(dtype).requires_grad_(grad)

    neck = [draw(shape.images, c, h, w) for c, (h, w) in zip(shape.channels, shape.sizes, strict=True)]
    cells = [torch.cartesian_prod(torch.arange(h) + 0.5, torch.arange(w) + 0.5).flip(1) for h, w in shape.sizes]
    strides = [torch.full((h * w,), float(s)) for s, (h, w) in zip(shape.strides, shape.sizes, strict=True)]
    return Taps(
        neck=tuple(neck),
        scores=draw(shape.images, shape.classes, anchors, shift=-1.0),
        boxes=draw(shape.images, 4 * shape.reg_max, anchors, shift=3.0 if shape.reg_max == 1 else 0.0),
        strides=torch.cat(strides),
        anchors=torch.cat(cells),
        scores_one2one=draw(shape.images, shape.classes, anchors, shift=-1.0) if one2one else None,
        head=_head(shape, generator, draw, dtype) if shape.head else None,
    )


def _head(shape: Shape, generator: torch.Generator, draw: Callable[..., Tensor], dtype: torch.dtype) -> HeadTaps:
    """Return holds after block 1 and tails of two 1x1 convolutions, frozen."""

    def tail(widths: tuple[int, ...], outputs: int) -> nn.Module:
        layers = nn.Sequential(nn.Conv2d(widths[1], widths[2], 1), nn.SiLU(), nn.Conv2d(widths[2], outputs, 1))
        for parameter in layers.parameters():
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.5
            parameter.data = drawn.to(parameter.dtype)
        return layers.to(dtype).requires_grad_(False)

    def holds(width: int) -> tuple[Tensor, ...]:
        return tuple(draw(shape.images, width, h, w) for h, w in shape.sizes)

    cls, box = ([widths(c) for c in shape.channels] for widths in (shape.cls_channels, shape.box_channels))
    return HeadTaps(
        cls=holds(cls[0][1]),
        box=holds(box[0][1]),
        activate=nn.SiLU(),
        cls_tail=tuple(tail(widths, shape.classes) for widths in cls),
        box_tail=tuple(tail(widths, 4 * shape.reg_max) for widths in box),
    )


def leaves(taps: Taps) -> list[Tensor]:
    """Return the tensors of taps that may carry a gradient."""
    optional = [] if taps.scores_one2one is None else [taps.scores_one2one]
    inside = [] if taps.head is None else [*taps.head.cls, *taps.head.box]
    return [*taps.neck, taps.scores, taps.boxes, *optional, *inside]


def with_leaves(taps: Taps, values: Sequence[Tensor]) -> Taps:
    """Return taps with other tensors, in the order of ``leaves``."""
    rest, levels = list(values), len(taps.neck)

    def take(count: int) -> tuple[Tensor, ...]:
        taken, rest[:] = tuple(rest[:count]), rest[count:]
        return taken

    neck, (scores, boxes) = take(levels), take(2)
    one2one = None if taps.scores_one2one is None else take(1)[0]
    head = None if taps.head is None else replace(taps.head, cls=take(levels), box=take(levels))
    return replace(taps, neck=neck, scores=scores, boxes=boxes, scores_one2one=one2one, head=head)


def map_leaves(taps: Taps, change: Callable[[Tensor], Tensor]) -> Taps:
    """Return taps with every value tensor changed, cut from the graph and set to require what it required before."""
    return with_leaves(taps, [change(x.detach()).clone().requires_grad_(x.requires_grad) for x in leaves(taps)])


def foreground(shape: Shape, seed: int = 0, share: float = 0.3) -> dict[str, Any]:
    """Return a batch with a random foreground mask, what an assigner says beside it, and two boxes an image."""
    generator = torch.Generator().manual_seed(seed)
    anchors = sum(h * w for h, w in shape.sizes)
    mask = torch.rand(shape.images, anchors, generator=generator) < share
    labels = torch.randint(0, shape.classes, (shape.images, anchors), generator=generator)
    strength = torch.rand(shape.images, anchors, generator=generator) * mask
    boxes = torch.rand(2 * shape.images, 4, generator=generator) * 0.4 + 0.3
    return {
        "fg_mask": mask,
        "target_labels": labels,
        "target_scores": torch.nn.functional.one_hot(labels, shape.classes) * strength.unsqueeze(-1),
        "bboxes": boxes,
        "cls": torch.randint(0, shape.classes, (2 * shape.images, 1), generator=generator).float(),
        "batch_idx": torch.arange(shape.images).repeat_interleave(2).float(),
    }


def reorder(batch: Mapping[str, Any], order: Sequence[int]) -> dict[str, Any]:
    """Return a batch with its images permuted or repeated."""
    dense = {key: batch[key][list(order)] for key in ("fg_mask", "target_labels", "target_scores")}
    rows = [torch.nonzero(batch["batch_idx"] == image).flatten() for image in order]
    index = torch.cat([torch.full((len(r),), float(new)) for new, r in enumerate(rows)])
    kept = torch.cat(rows)
    return {**dense, "bboxes": batch["bboxes"][kept], "cls": batch["cls"][kept], "batch_idx": index}


def make(name: str, student: Shape, teacher: Shape | None = None, **args: Any) -> DistillMethod:
    """Build a method for two shapes."""
    return build_method(name, args, student.spec(), (teacher or student).spec())


def total(losses: dict[str, Tensor]) -> Tensor:
    """Return the sum of named losses."""
    return torch.stack(list(losses.values())).sum()


def inference_copy(taps: Taps) -> Taps:
    """Return taps made of inference tensors, as a teacher under ``inference_mode`` gives them."""
    with torch.inference_mode():
        made = {f.name: getattr(taps, f.name) for f in fields(taps)}
        made = {k: v.clone() if isinstance(v, Tensor) else v for k, v in made.items()}
        made["neck"] = tuple(x.clone() for x in taps.neck)
        if taps.head is not None:
            made["head"] = replace(
                taps.head, cls=tuple(x.clone() for x in taps.head.cls), box=tuple(x.clone() for x in taps.head.box)
            )
    return Taps(**made)
