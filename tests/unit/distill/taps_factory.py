"""Random taps and matching specs, shared by the tests of the distillation methods."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from kd_yolo.distill.base import DetectorSpec, DistillMethod, LevelSpec, Taps, build_method


@dataclass(frozen=True)
class Shape:
    """Sizes of one detector's taps; the defaults are a tiny two-level detector."""

    images: int = 2
    classes: int = 3
    reg_max: int = 4
    sizes: tuple[tuple[int, int], ...] = ((3, 3), (2, 2))
    channels: tuple[int, ...] = (4, 6)
    strides: tuple[int, ...] = (8, 16)

    def spec(self) -> DetectorSpec:
        levels = tuple(LevelSpec(c, s) for c, s in zip(self.channels, self.strides, strict=True))
        return DetectorSpec(levels, self.classes, self.reg_max)


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
    )


def leaves(taps: Taps) -> list[Tensor]:
    """Return the tensors of taps that may carry a gradient."""
    optional = [] if taps.scores_one2one is None else [taps.scores_one2one]
    return [*taps.neck, taps.scores, taps.boxes, *optional]


def with_leaves(taps: Taps, values: Sequence[Tensor]) -> Taps:
    """Return taps with other tensors, in the order of ``leaves``."""
    levels = len(taps.neck)
    one2one = values[levels + 2] if len(values) > levels + 2 else None
    neck, scores, boxes = tuple(values[:levels]), values[levels], values[levels + 1]
    return replace(taps, neck=neck, scores=scores, boxes=boxes, scores_one2one=one2one)


def map_leaves(taps: Taps, change: Callable[[Tensor], Tensor]) -> Taps:
    """Return taps with every value tensor changed, cut from the graph and set to require what it required before."""
    return with_leaves(taps, [change(x.detach()).clone().requires_grad_(x.requires_grad) for x in leaves(taps)])


def foreground(shape: Shape, seed: int = 0, share: float = 0.3) -> dict[str, Any]:
    """Return a batch with a random foreground mask."""
    generator = torch.Generator().manual_seed(seed)
    anchors = sum(h * w for h, w in shape.sizes)
    return {"fg_mask": torch.rand(shape.images, anchors, generator=generator) < share}


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
    return Taps(**made)
