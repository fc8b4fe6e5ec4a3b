"""The layers of a PyTorch model, seen by running it once."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kd_yolo.bench.layers import Layer, Op, fuse
from kd_yolo.inference import head_of

# PyTorch's operators that have an ONNX name for fusion; every other one is a kernel of its own.
KINDS = {
    "convolution": "Conv",
    "mkldnn_convolution": "Conv",
    "cudnn_convolution": "Conv",
    "addmm": "Gemm",
    "mm": "MatMul",
    "bmm": "MatMul",
    "silu": "Silu",
    "sigmoid": "Sigmoid",
    "relu": "Relu",
    "hardswish": "HardSwish",
    "gelu": "Gelu",
    "native_batch_norm": "BatchNormalization",
    "add": "Add",
    "sub": "Sub",
    "mul": "Mul",
    "div": "Div",
    "exp": "Exp",
    "clamp": "Clip",
    "cat": "Concat",
    "clone": "Identity",
    "copy": "Identity",
    "_to_copy": "Cast",
}
VIEW_NAMES = """
view _unsafe_view reshape slice split split_with_sizes select unbind chunk permute transpose t expand unsqueeze squeeze
detach alias as_strided flatten contiguous lift_fresh
"""
MAKER_NAMES = "arange empty empty_like full full_like new_full zeros zeros_like ones ones_like scalar_tensor"
VIEWS, MAKERS = frozenset(VIEW_NAMES.split()), frozenset(MAKER_NAMES.split())


def torch_layers(model: nn.Module, canvas: tuple[int, int], batch: int, channels: int) -> list[Layer]:
    """Return the layers of a deployed model in eval mode.

    Args:
        model: Fused model whose first output is its decoded detections.
        canvas: Height and width in pixels.
        batch: Images per call.
        channels: Channels of an image.
    """
    strides = head_of(model).stride.cpu()
    model = copy.deepcopy(model).to("meta")  # shapes only: nothing is computed, no memory is used
    head_of(model).stride = strides  # the head makes its anchors from their values
    pixels = torch.zeros(batch, channels, *canvas, device="meta", dtype=next(model.parameters()).dtype)
    with torch.no_grad():
        model(pixels)  # the head makes its anchors now, which are constants from here on
        with _Recorder(model, pixels) as recorder:
            output: Any = model(pixels)
    return fuse(recorder.ops, [recorder.value_of(output[0] if isinstance(output, (tuple, list)) else output)])


class _Recorder(TorchDispatchMode):
    """Notes every operator with the values that it takes and makes."""

    def __init__(self, model: nn.Module, pixels: Tensor) -> None:
        super().__init__()
        self.ops: list[Op] = []
        self.numbers: Iterator[int] = itertools.count()
        self.values: dict[int, int] = {id(pixels): next(self.numbers)}
        self.kept: list[Tensor] = [pixels]  # an id is a name only as long as its object lives
        self.names = {id(value): name for name, value in model.named_parameters()}

    def value_of(self, tensor: Tensor) -> int | None:
        """Return the number of what a tensor holds now, or None for a constant."""
        return self.values.get(id(tensor))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__.rstrip("_")
        taken = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        reads = {number: leaf.numel() for leaf in taken if (number := self.value_of(leaf)) is not None}
        if not reads or name in MAKERS:
            return result
        op = Op(
            name=next((self.names[id(leaf)] for leaf in taken if id(leaf) in self.names), f"{name} {len(self.ops)}"),
            kind="Identity" if name in VIEWS else KINDS.get(name, name),
            reads=reads,
            writes={},
            weights=sum(leaf.numel() for leaf in taken if self.value_of(leaf) is None),
            flops=2 * _multiply_adds(name, taken, made),
        )
        for leaf in made:  # an operator in place gives its tensor a new value
            self.kept.append(leaf)
            self.values[id(leaf)] = next(self.numbers)
            op.writes[self.values[id(leaf)]] = leaf.numel()
        self.ops.append(op)
        return result


def _multiply_adds(name: str, taken: list[Tensor], made: list[Tensor]) -> int:
    kind = KINDS.get(name)
    if kind == "Conv":
        return made[0].numel() * math.prod(taken[1].shape[1:])
    if kind in {"MatMul", "Gemm"}:
        return made[0].numel() * int(taken[-1].shape[-2])
    return 0
