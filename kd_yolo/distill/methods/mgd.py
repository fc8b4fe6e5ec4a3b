"""MGD: the student's masked features must suffice to generate the teacher's.

Yang et al., "Masked Generative Distillation", ECCV 2022, arXiv:2205.01529, section 3: the student's map is brought to
the teacher's width, random cells of it are set to 0, and a small block G of two 3x3 convolutions generates the whole
teacher map from what is left. For level l, teacher map h, student map f, a 1x1 convolution g where the widths differ:

    m_i = 0 with probability mask_ratio, else 1               one draw a cell, the same for all channels
    G(x) = conv3x3(ReLU(conv3x3(x)))
    kd_mgd = weight mean_l mean_b 1 / (C_l H_l W_l) sum (h - G(m g(f)))^2

The paper sums over the map; dividing by its size makes the loss independent of the canvas. Two full 3x3 convolutions at
the width of yolo26s need twice the multiplications of yolo26n's forward pass, so by default each is a depthwise 3x3
followed by a 1x1 (``block=separable``); ``block=full`` is the paper's.

The masks come from a generator of the method's own: global random streams do not move, and a checkpoint carries the
position. One mask a level serves all images of a batch, and it changes once a gradient has been taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from kd_yolo.distill.base import DetectorSpec, DistillMethod, MethodArgs, Taps, at_least_float32
from kd_yolo.distill.ops.features import width_adapters

Block = Literal["separable", "full"]


class MGDArgs(MethodArgs):
    """Arguments of ``mgd``."""

    weight: float = Field(default=10.0, ge=0.0, description="factor on kd_mgd")
    mask_ratio: float = Field(default=0.65, ge=0.0, lt=1.0, description="share of the student's cells that is hidden")
    block: Block = Field(default="separable", description="generation block: separable, or full 3x3 convolutions")


class MGD(DistillMethod):
    """Squared error of the teacher's map generated from the student's masked one (``kd_mgd``).

    Not zero for a student that equals its teacher: the generation block starts at random.
    """

    Args = MGDArgs
    args: MGDArgs
    zero_at_equality: ClassVar[bool] = False
    terms = ("kd_mgd",)
    step: Tensor

    def __init__(self, args: MGDArgs, student: DetectorSpec, teacher: DetectorSpec) -> None:
        """Build one adapter and one generation block a level."""
        super().__init__(args, student, teacher)
        self.adapters = width_adapters(student.levels, teacher.levels)
        self.generators = nn.ModuleList(generation_block(level.channels, args.block) for level in teacher.levels)
        self.register_buffer("step", torch.randint(2**31, ()))  # where the masks start, by the adapters' seed
        self.reads = frozenset({"neck"} if args.weight > 0 else ())

    def forward(self, student: Taps, teacher: Taps, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return ``kd_mgd``, see the base class."""
        if self.args.weight == 0:
            return {"kd_mgd": torch.zeros((), device=student.neck[0].device)}
        now = int(self.step)
        masks = cell_masks([(int(x.shape[-2]), int(x.shape[-1])) for x in student.neck], self.args.mask_ratio, now)
        with torch.autocast(student.neck[0].device.type, enabled=False):
            losses = []
            for adapt, generate, mine, theirs, mask in zip(
                self.adapters, self.generators, student.neck, teacher.neck, masks, strict=True
            ):
                seen = adapt(at_least_float32(mine)) * mask.to(mine.device)
                losses.append((generate(seen) - at_least_float32(theirs.detach())).square().mean())
            loss = self.args.weight * torch.stack(losses).mean()
        if loss.requires_grad:  # several gradients of one forward pass count once: a resumed run takes one more
            loss.register_hook(lambda _: self._next_masks(now + 1))
        return {"kd_mgd": loss}

    def _next_masks(self, step: int) -> None:
        self.step.fill_(step)


def generation_block(channels: int, block: Block) -> nn.Sequential:
    """Return G: two 3x3 convolutions with a ReLU between, (B, C, H, W) to the same."""
    return nn.Sequential(*_convolution(channels, block), nn.ReLU(inplace=True), *_convolution(channels, block))


def cell_masks(sizes: list[tuple[int, int]], ratio: float, step: int) -> list[Tensor]:
    """Return for every map size (H, W) a mask (1, 1, H, W) of 0 and 1, a function of the step alone; never all 0.

    Args:
        sizes: Height and width of every level.
        ratio: Probability of a 0.
        step: Which masks of the sequence.
    """
    generator = torch.Generator().manual_seed(step)
    draws = [torch.rand(1, 1, h, w, generator=generator) for h, w in sizes]
    return [(draw >= draw.max().clamp_max(ratio)).float() for draw in draws]


def _convolution(channels: int, block: Block) -> list[nn.Module]:
    if block == "full":
        return [nn.Conv2d(channels, channels, 3, padding=1)]
    return [nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False), nn.Conv2d(channels, channels, 1)]
