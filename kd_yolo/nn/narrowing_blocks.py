"""Give a narrower Ultralytics block the most important channels of a wide one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from ultralytics.nn.modules import C2PSA, C3, SPPF, Bottleneck, C2f, Conv
from ultralytics.nn.modules.block import PSABlock
from ultralytics.nn.tasks import DetectionModel

from kd_yolo.errors import ModelError
from kd_yolo.nn.block_walk import RULES, BlockWalk, known_kinds
from kd_yolo.nn.blocks import RepBlock
from kd_yolo.nn.growing_channels import Channels, copy_batchnorm, joined, repeated
from kd_yolo.nn.narrowing_sites import Site
from kd_yolo.nn.refit import put

Importance = dict[nn.Module, Tensor]  # of every Conv of the source, (C,): how much each of its channels matters


class Narrowing(BlockWalk):
    """One pass over two networks, from the image to the head, that chooses channels and slices every convolution.

    Args:
        importance: Of every ``Conv`` of the source, tied where tensors are, see ``tie``.

    Attributes:
        inherited: Parameters of the target that hold a value of the source so far.
        sites: The convolutions of the target with those they stand for, in the order of the walk.
    """

    def __init__(self, importance: Importance) -> None:
        super().__init__()
        self.sites: list[Site] = []
        self._importance = importance

    def refusal(self, reason: str) -> ModelError:
        """Return the error that says why the current row does not fit."""
        return ModelError(f"{self._row} {reason}")

    def _label(self, source: Any, target: Any) -> str:
        return f"row {target.i} for the source's row {source.i} ({type(source).__name__})"

    def _unknown(self, source: Any, target: Any) -> ModelError:
        kind = type(source)
        if kind not in RULES:
            return self.refusal(f"cannot be narrowed: {kind.__name__} is not one of {known_kinds()}")
        return self.refusal(f"does not fit: it has a {type(target).__name__} where the source has a {kind.__name__}")

    def _module(self, source: Any, target: Any, inputs: Channels) -> Channels:
        if isinstance(target, RepBlock) and type(source) is Conv:
            return self._conv(source, target, inputs)
        if type(target) is Bottleneck and type(source) is nn.Sequential and _attends(source):
            return self._module(source[0], target, inputs)  # the attention behind it is left out
        if type(source) is type(target) is nn.Upsample:
            self._same(source, target, "size", "scale_factor", "mode")
        return super()._module(source, target, inputs)

    def _conv(self, source: Any, target: Any, inputs: Channels, outputs: Channels | None = None) -> Channels:
        if not isinstance(source, Conv) or not isinstance(target, (Conv, RepBlock)):
            raise self._unknown(source, target)
        if type(source.act) is not type(target.act):
            raise self.refusal(f"does not fit: it has the activation {target.act}, the source {source.act}")
        small, large = target.conv, source.conv
        self._check(large, small, inputs, isinstance(target, RepBlock))
        if large.groups > 1:
            if outputs is not None and not outputs.same(inputs):
                raise self.refusal("cannot be narrowed: it has a depthwise convolution beside a shortcut")
            outputs = inputs
        outputs = outputs or self._chosen(self._importance[source], small.out_channels)
        if len(outputs) != small.out_channels:
            raise self.refusal(f"does not fit: it writes {small.out_channels} channels where {len(outputs)} are added")
        kernel = large.weight[outputs.source]
        kernel = kernel if large.groups > 1 else kernel[:, inputs.source]
        bn = nn.BatchNorm2d(len(outputs)).to(kernel)
        self.inherited += kernel.numel() + copy_batchnorm(source.bn, bn, outputs)
        put(target, kernel, bn)
        self.sites.append(Site(target, source, inputs, outputs, self._row))
        return outputs

    def _check(self, source: nn.Conv2d, target: nn.Conv2d, inputs: Channels, padded: bool) -> None:
        """Refuse a convolution of another geometry; a re-parameterized one may hold a smaller kernel in its centre."""
        names = ("stride", "dilation", "padding_mode") + (() if padded else ("kernel_size", "padding"))
        if any(getattr(source, name) != getattr(target, name) for name in names):
            raise self.refusal("does not fit: it has a convolution of another kernel or stride than the source")
        if target.out_channels > source.out_channels or target.in_channels > source.in_channels:
            wide = f"{target.in_channels} -> {target.out_channels}"
            raise self.refusal(
                f"is wider than the source ({wide}, there {source.in_channels} -> {source.out_channels})"
            )
        if target.in_channels != len(inputs) or source.in_channels != inputs.width:
            raise self.refusal(
                f"does not fit: it reads {target.in_channels} channels of {source.in_channels} and gets {len(inputs)} "
                f"of {inputs.width}"
            )
        plain = source.groups == target.groups == 1
        if not plain and any(c.groups != c.in_channels or c.groups != c.out_channels for c in (source, target)):
            raise self.refusal("cannot be narrowed: it has a grouped convolution that is not depthwise")

    def _chosen(self, importance: Tensor, size: int) -> Channels:
        """Return the most important channels in their old order, which is all of them where the width is the same."""
        if size > len(importance):
            raise self.refusal(f"is wider than the source: {size} channels, there {len(importance)}")
        return Channels(torch.topk(importance, size).indices.sort().values, len(importance))

    def _last(self, source: Any, target: Any, inputs: Channels) -> Channels:
        self._check(source, target, inputs, False)
        if source.out_channels != target.out_channels or source.bias is None or target.bias is None:
            raise self.refusal(f"does not fit: it has {target.out_channels} outputs, the source {source.out_channels}")
        target.weight.copy_(source.weight[:, inputs.source])
        target.bias.copy_(source.bias)
        self.inherited += target.weight.numel() + target.bias.numel()
        outputs = repeated(source.out_channels, source.out_channels)
        self.sites.append(Site(target, source, inputs, outputs, self._row))
        return outputs

    def _sequence(self, source: Any, target: Any, inputs: Channels) -> Channels:
        for one, other in self._pairs(source, target):
            inputs = self._module(one, other, inputs)
        return inputs

    def _c2f(self, source: Any, target: Any, inputs: Channels) -> Channels:
        parts = [*self._halves(source, target)]
        self._conv(source.cv1, target.cv1, inputs, joined(parts))
        for one, other in self._pairs(source.m, target.m):
            parts.append(self._module(one, other, parts[-1]))
        return self._conv(source.cv2, target.cv2, joined(parts))

    def _halves(self, source: Any, target: Any) -> tuple[Channels, Channels]:
        first, second = self._importance[source.cv1].split(source.c)
        return self._chosen(first, target.c), self._chosen(second, target.c)

    def _attention(self, source: Any, target: Any, inputs: Channels) -> Channels:
        """Keep whole heads, for their channels only work together; they are stored one head after the other."""
        self._same(source, target, "head_dim", "key_dim", "scale")
        importance = self._importance[source.qkv].view(source.num_heads, -1)[:, -source.head_dim :].sum(1)
        heads = self._chosen(importance, target.num_heads).source
        channels = []
        for width in (source.qkv.conv.out_channels, source.pe.conv.out_channels):
            size = width // source.num_heads
            channels.append(Channels((heads[:, None] * size + torch.arange(size)).flatten(), width))
        self._conv(source.qkv, target.qkv, inputs, channels[0])
        self._conv(source.pe, target.pe, channels[1])
        return self._conv(source.proj, target.proj, channels[1], inputs)

    def _same(self, source: Any, target: Any, *names: str) -> None:
        for name in names:
            if getattr(source, name) != getattr(target, name):
                raise self.refusal(
                    f"does not fit: it has {name}={getattr(target, name)}, the source {getattr(source, name)}"
                )

    def _pairs(self, source: Any, target: Any) -> Sequence[tuple[Any, Any]]:
        if len(source) != len(target):
            raise self.refusal(f"does not fit: it has {len(target)} blocks in a chain, the source {len(source)}")
        return list(zip(source, target, strict=True))


def tie(importance: Importance, source: DetectionModel) -> None:
    """Add up the importance of channels that must be chosen together, because a shortcut adds them, in place.

    Args:
        importance: Of every ``Conv`` of the source; that of the first convolution that writes a tensor becomes the sum
            over all that are added to it later. The others follow its choice.
        source: The network.
    """
    for module in source.modules():
        if isinstance(module, (C2f, C2PSA)):
            importance[module.cv1][module.c :] += _added(importance, module.m)
        elif isinstance(module, C3):
            importance[module.cv1] += _added(importance, module.m)
    for row in source.model:
        if type(row) is SPPF and getattr(row, "add", False):
            before = source.model[row.i + row.f if row.f < 0 else row.f]
            writer = before if isinstance(before, Conv) else getattr(before, "cv2", None)
            if writer in importance:
                importance[writer] += importance[row.cv2]


def _added(importance: Importance, chain: Any) -> Tensor | float:
    """Return the importance that the blocks of a chain add to its input by shortcuts, up to the first without one."""
    total: Tensor | float = 0.0
    for block in chain:
        if isinstance(block, nn.Sequential):
            total = total + _added(importance, block)
        elif isinstance(block, Bottleneck) and block.add:
            total = total + importance[block.cv2]
        elif isinstance(block, PSABlock) and block.add:
            total = total + importance[block.attn.proj] + importance[block.ffn[1]]
        else:
            break
    return total


def _attends(chain: nn.Sequential) -> bool:
    return type(chain[0]) is Bottleneck and all(type(block) is PSABlock for block in list(chain)[1:])
