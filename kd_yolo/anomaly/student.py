"""The student of an anomaly model: a YOLO backbone with attention, trained from random weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from ultralytics.nn.modules import Conv
from ultralytics.utils.torch_utils import initialize_weights

from kd_yolo.anomaly.cbam import CBAM, add_to_blocks
from kd_yolo.anomaly.foreign import ultralytics_chain
from kd_yolo.anomaly.stages import cut
from kd_yolo.errors import ModelError


class Student(nn.Module):
    """Backbone up to the last tap, and with ``plus`` one level more.

    Random weights are our choice: a pretrained student also reproduces the teacher where something is wrong.

    Args:
        content: Model dictionary of a classifier or detector; its backbone must be a plain chain of layers.
        taps: Strides to tap, ascending, in pixels.
        cbam: ``stage``: one CBAM after each tapped stage, whose output is the tap and feeds the next stage (our
            choice); ``block``: one in every bottleneck; ``none``.
        plus: HKT+: add two 3x3 convolutions (the first of stride 2, both with BatchNorm and SiLU, as wide as the last
            tap) and, unless ``cbam`` is none, a CBAM. That there are two more convolutions is the paper's, their shape
            our choice.

    Attributes:
        channels: Channels of each level, by stride.

    Raises:
        ModelError: The backbone has no layer of a wanted stride.
    """

    def __init__(self, content: Mapping[str, Any], taps: Sequence[int], cbam: str, plus: bool) -> None:
        super().__init__()
        try:
            stages = cut(ultralytics_chain(content), taps)
        except ValueError as error:
            raise ModelError(f"the student {error}; choose other taps") from error
        if cbam == "block" and add_to_blocks(stages) == 0:
            raise ModelError("cbam=block: the student has no bottleneck to put it in; use cbam=stage")
        self.channels = dict(stages.channels)
        parts = list(stages.parts)
        if plus:
            width = self.channels[taps[-1]]
            self.channels[2 * taps[-1]] = width
            parts.append(nn.Sequential(Conv(width, width, 3, 2), Conv(width, width, 3, 1)))
        gated = {"stage": list(self.channels), "block": list(self.channels)[len(taps) :], "none": []}[cbam]
        self.strides = tuple(self.channels)
        self.parts = nn.ModuleList(parts)
        self.gates = nn.ModuleList(
            CBAM(channels) if stride in gated else nn.Identity() for stride, channels in self.channels.items()
        )
        initialize_weights(self)

    def forward(self, x: Tensor) -> dict[int, Tensor]:
        """Return maps (B, C_s, H / s, W / s) by stride s, of images (B, 3, H, W) in [0, 1]."""
        maps: dict[int, Tensor] = {}
        for stride, part, gate in zip(self.strides, self.parts, self.gates, strict=True):
            x = maps[stride] = gate(part(x))
        return maps
