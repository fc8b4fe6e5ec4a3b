"""Walk over two detectors of the same kinds of blocks at once and fill the convolutions of one from the other."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from ultralytics.nn.modules import (
    C2PSA,
    C3,
    SPPF,
    Attention,
    Bottleneck,
    C2f,
    C3k2,
    Concat,
    Conv,
    Detect,
    DWConv,
)
from ultralytics.nn.modules.block import C3k, PSABlock

from kd_yolo.errors import ModelError
from kd_yolo.nn.growing_channels import Channels, joined

BRANCHES = ("cv2", "cv3", "one2one_cv2", "one2one_cv3")  # of a Detect head, each with one part per level


class BlockWalk(ABC):
    """One pass over two networks of the same rows, from the image to the head.

    It knows what the blocks are made of, and so which channels meet where. A subclass knows what to do with a
    convolution, which channels a tensor takes, and what happens where the two networks differ in depth.

    Attributes:
        inherited: Parameters of the target that hold a value of the source so far.
    """

    def __init__(self) -> None:
        self.inherited = 0
        self._row = ""

    def row(self, source: Any, target: Any, inputs: Sequence[Channels]) -> Channels:
        """Fill one row of the target.

        Args:
            source: Row of the source.
            target: The row that stands for it, changed in place.
            inputs: Channels of what the row reads, in its order.

        Returns:
            Channels of what it writes; those of the head are of no use to anybody.

        Raises:
            ModelError: The row cannot be filled, or is of a kind that is not known.
        """
        self._row = self._label(source, target)
        if type(source) is Concat and type(target) is Concat:
            return joined(inputs)
        if type(source) is Detect and type(target) is Detect:
            self._head(source, target, inputs)
            return inputs[0]
        return self._module(source, target, inputs[0])

    @abstractmethod
    def refusal(self, reason: str) -> ModelError:
        """Return the error that says why the current row cannot be filled."""

    @abstractmethod
    def _label(self, source: Any, target: Any) -> str:
        """Return what errors call a row."""

    @abstractmethod
    def _unknown(self, source: Any, target: Any) -> ModelError:
        """Return the error of two modules that no rule is for: of different kinds, or of a kind that is not known."""

    @abstractmethod
    def _conv(self, source: Any, target: Any, inputs: Channels, outputs: Channels | None = None) -> Channels:
        """Fill a convolution with its BatchNorm; ``outputs`` says which channels to write, default: free to choose."""

    @abstractmethod
    def _last(self, source: Any, target: Any, inputs: Channels) -> Channels:
        """Fill a plain convolution, which only ends a head's branch: its channels mean classes or box sides."""

    @abstractmethod
    def _sequence(self, source: Any, target: Any, inputs: Channels) -> Channels:
        """Fill a chain of modules."""

    @abstractmethod
    def _c2f(self, source: Any, target: Any, inputs: Channels) -> Channels:
        """Fill a C2f or C3k2."""

    @abstractmethod
    def _halves(self, source: Any, target: Any) -> tuple[Channels, Channels]:
        """Return the channels of both halves of what the first convolution of a C2f or C2PSA writes."""

    @abstractmethod
    def _attention(self, source: Any, target: Any, inputs: Channels) -> Channels:
        """Fill an attention; what it writes is added to what it reads."""

    def _module(self, source: Any, target: Any, inputs: Channels) -> Channels:
        kind = type(source)
        if kind not in RULES or kind is not type(target):
            raise self._unknown(source, target)
        return RULES[kind](self, source, target, inputs)

    def _bottleneck(self, source: Any, target: Any, inputs: Channels) -> Channels:
        self._same(source, target, "add")
        hidden = self._conv(source.cv1, target.cv1, inputs)
        return self._conv(source.cv2, target.cv2, hidden, inputs if source.add else None)

    def _c3(self, source: Any, target: Any, inputs: Channels) -> Channels:
        deep = self._sequence(source.m, target.m, self._conv(source.cv1, target.cv1, inputs))
        return self._conv(source.cv3, target.cv3, joined([deep, self._conv(source.cv2, target.cv2, inputs)]))

    def _sppf(self, source: Any, target: Any, inputs: Channels) -> Channels:
        counts, adds = ([getattr(one, name, default) for one in (source, target)] for name, default in _SPPF_ATTRIBUTES)
        if counts[0] != counts[1] or adds[0] != adds[1] or source.m.kernel_size != target.m.kernel_size:
            raise self.refusal("pools in another way there")
        half = self._conv(source.cv1, target.cv1, inputs)
        return self._conv(source.cv2, target.cv2, joined([half] * (counts[0] + 1)), inputs if adds[0] else None)

    def _c2psa(self, source: Any, target: Any, inputs: Channels) -> Channels:
        first, second = self._halves(source, target)
        self._conv(source.cv1, target.cv1, inputs, joined([first, second]))
        deep = self._sequence(source.m, target.m, second)
        return self._conv(source.cv2, target.cv2, joined([first, deep]))

    def _psa_block(self, source: Any, target: Any, inputs: Channels) -> Channels:
        self._same(source, target, "add")
        self._attention(source.attn, target.attn, inputs)
        hidden = self._conv(source.ffn[0], target.ffn[0], inputs)
        return self._conv(source.ffn[1], target.ffn[1], hidden, inputs)

    def _head(self, source: Any, target: Any, inputs: Sequence[Channels]) -> None:
        self._same(source, target, "nl", "nc", "reg_max")
        for name in BRANCHES:
            branch, other = (getattr(head, name, None) for head in (source, target))
            if (branch is None) != (other is None):
                raise self.refusal(f"has lost its branch {name}; give the trained checkpoint with both of its heads")
            if branch is not None and other is not None:
                for one, two, channels in zip(branch, other, inputs, strict=True):
                    self._module(one, two, channels)
        if source.reg_max > 1:  # its fixed convolution is not trained, yet counts as a parameter
            target.dfl.load_state_dict(source.dfl.state_dict())
            self.inherited += target.dfl.conv.weight.numel()

    def _same(self, source: Any, target: Any, *names: str) -> None:
        for name in names:
            if getattr(source, name) != getattr(target, name):
                raise self.refusal(f"has {name}={getattr(target, name)} there, this model {getattr(source, name)}")


Rule = Callable[[Any, Any, Any, Channels], Channels]


def known_kinds() -> str:
    """Return the names of the Ultralytics blocks that have a rule."""
    return ", ".join(kind.__name__ for kind in RULES if kind.__module__.startswith("ultralytics"))


def _rule(name: str) -> Rule:
    """Return the rule that is the method of this name, of whatever class the walk is."""

    def rule(walk: Any, source: Any, target: Any, inputs: Channels) -> Channels:
        outputs: Channels = getattr(walk, name)(source, target, inputs)
        return outputs

    return rule


# What an SPPF of an older Ultralytics has not got, and what it did then.
_SPPF_ATTRIBUTES = (("n", 3), ("add", False))

RULES: dict[type[nn.Module], Rule] = {
    Attention: _rule("_attention"),
    Bottleneck: _rule("_bottleneck"),
    C2PSA: _rule("_c2psa"),
    C2f: _rule("_c2f"),
    C3: _rule("_c3"),
    C3k: _rule("_c3"),
    C3k2: _rule("_c2f"),
    Conv: _rule("_conv"),
    DWConv: _rule("_conv"),
    PSABlock: _rule("_psa_block"),
    SPPF: _rule("_sppf"),
    nn.Conv2d: _rule("_last"),
    nn.Sequential: _rule("_sequence"),
    nn.Upsample: lambda walk, source, target, inputs: inputs,
}
