"""Give a larger Ultralytics block the weights of a small one, so that it computes the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from ultralytics.nn.modules import Bottleneck
from ultralytics.nn.modules.block import PSABlock

from kd_yolo.errors import ModelError
from kd_yolo.nn.block_walk import RULES, BlockWalk, known_kinds
from kd_yolo.nn.growing_channels import Channels, copy_batchnorm, joined, repeated, wide_kernel


class Growth(BlockWalk):
    """One pass over two networks of the same rows, from the image to the head, that widens and deepens.

    Attributes:
        inherited: Parameters of the large network that hold a value of the small one so far.
    """

    def __init__(self, scale: str, seed: int) -> None:
        super().__init__()
        self._generator = torch.Generator().manual_seed(seed)
        self._scale = scale

    def row(self, source: Any, target: Any, inputs: Sequence[Channels]) -> Channels:
        """Fill one row of the large network, see ``BlockWalk.row``; both networks have the same rows."""
        if source.f != target.f:
            self._row = self._label(source, target)
            raise self.refusal("reads other rows there")
        return super().row(source, target, inputs)

    def refusal(self, reason: str) -> ModelError:
        """Return the error that says why the current row cannot be grown."""
        return ModelError(f"scale={self._scale}: {self._row} {reason}")

    def _label(self, source: Any, target: Any) -> str:
        return f"row {source.i} ({type(source).__name__})"

    def _unknown(self, source: Any, target: Any) -> ModelError:
        kind = type(source)
        if kind not in RULES:
            return self.refusal(f"holds {kind.__name__}, which cannot be grown (known: {known_kinds()})")
        return self.refusal(
            f"has a {type(target).__name__} where this model has a {kind.__name__}, so it cannot start at the same "
            "function; choose a scale nearer to this model's"
        )

    def _conv(self, small: Any, large: Any, inputs: Channels, outputs: Channels | None = None) -> Channels:
        """Fill a convolution with its BatchNorm; ``outputs`` says which channels to write, default: repeat in turn."""
        if type(small.act) is not type(large.act):
            raise self.refusal(f"has the activation {large.act} there, this model {small.act}")
        outputs = self._kernel(small.conv, large.conv, inputs, outputs)
        self.inherited += copy_batchnorm(small.bn, large.bn, outputs)
        return outputs

    def _kernel(self, small: Any, large: Any, inputs: Channels, outputs: Channels | None) -> Channels:
        settings = ("kernel_size", "stride", "padding", "dilation", "padding_mode")
        if any(getattr(small, name) != getattr(large, name) for name in settings):
            raise self.refusal("has a convolution of another kernel or stride there")
        if small.groups == large.groups == 1:
            outputs = outputs or self._repeated(small.out_channels, large.out_channels)
            large.weight.data.copy_(wide_kernel(small.weight, inputs, outputs, self._generator))
            self.inherited += len(outputs) * small.weight[0].numel()
            return outputs
        if any(conv.groups != conv.in_channels or conv.groups != conv.out_channels for conv in (small, large)):
            raise self.refusal("has a grouped convolution that is not depthwise, which cannot be grown")
        if outputs is not None and not outputs.same(inputs):
            raise self.refusal("has a depthwise convolution beside a shortcut, which cannot be grown")
        large.weight.data.copy_(small.weight[inputs.source])
        self.inherited += large.weight.numel()
        return inputs

    def _repeated(self, width: int, size: int) -> Channels:
        if size < width:
            raise self.refusal(f"has {size} channels there, this model has {width}; a network can only grow")
        return repeated(width, size)

    def _last(self, small: Any, large: Any, inputs: Channels) -> Channels:
        """Fill a plain convolution, which only ends a head's branch: its channels mean classes or box sides."""
        if small.out_channels != large.out_channels or small.bias is None or large.bias is None:
            raise self.refusal(f"has {large.out_channels} outputs there, this model has {small.out_channels}")
        outputs = self._kernel(small, large, inputs, None)
        large.bias.data.copy_(small.bias)
        self.inherited += large.bias.numel()
        return outputs

    def _sequence(self, small: Any, large: Any, inputs: Channels) -> Channels:
        for one, other in zip(small, large, strict=False):
            inputs = self._module(one, other, inputs)
        for other in self._more(small, large):
            if not self._extra(small[-1], other, inputs):
                raise self.refusal(
                    f"has one more {type(other).__name__} in a chain there, which cannot start as the identity "
                    "without a shortcut; choose a scale nearer to this model's"
                )
        return inputs

    def _c2f(self, small: Any, large: Any, inputs: Channels) -> Channels:
        parts = [*self._halves(small, large)]
        self._conv(small.cv1, large.cv1, inputs, joined(parts))
        for one, other in zip(small.m, large.m, strict=False):
            parts.append(self._module(one, other, parts[-1]))
        extra = []
        for other in self._more(small.m, large.m):
            same = self._extra(small.m[-1], other, parts[-1])
            extra.append(parts[-1] if same else parts[-1].unread())
        return self._conv(small.cv2, large.cv2, joined(parts, extra))

    def _halves(self, small: Any, large: Any) -> tuple[Channels, Channels]:
        half = self._repeated(small.c, large.c)
        return half, half

    def _attention(self, small: Any, large: Any, inputs: Channels) -> Channels:
        """Fill an attention by repeating whole heads; their channels are stored one head after the other."""
        self._same(small, large, "head_dim", "key_dim", "scale")
        self._conv(small.qkv, large.qkv, inputs)
        values = self._repeated(small.pe.conv.out_channels, large.pe.conv.out_channels)
        self._conv(small.pe, large.pe, values)
        return self._conv(small.proj, large.proj, values, inputs)

    def _more(self, small: Any, large: Any) -> Any:
        """Return the blocks that only the large network has."""
        if len(large) < len(small) or not len(small):
            raise self.refusal(f"has {len(large)} blocks there, this model {len(small)}; a network can only grow")
        return large[len(small) :]

    def _extra(self, template: Any, large: Any, inputs: Channels) -> bool:
        """Fill a block that the small network lacks with the features of ``template``, its last one.

        Where every part has a shortcut, the branches' last BatchNorm gets scale and shift 0, as in Net2DeeperNet the
        identity (arXiv:1511.05641) and for residual networks arXiv:1706.02677, section 5.1.

        Returns:
            Whether the block is the identity at its start.
        """
        self._module(template, large, inputs)
        last = _last_norms(large)
        for norm in last:
            nn.init.zeros_(norm.weight)
            nn.init.zeros_(norm.bias)
            self.inherited -= 2 * norm.num_features
        return bool(last)


def _last_norms(block: Any) -> list[nn.BatchNorm2d]:
    """Return the BatchNorms that end the branches of a block whose parts all have a shortcut, else nothing."""
    if type(block) is nn.Sequential:
        parts = [_last_norms(part) for part in block]
        return [norm for part in parts for norm in part] if all(parts) else []
    if type(block) is Bottleneck and block.add:
        return [block.cv2.bn]
    if type(block) is PSABlock and block.add:
        return [block.attn.proj.bn, block.ffn[1].bn]
    return []
