"""What a network computes and moves, layer by layer, after the fusions that every deployed runtime makes.

A layer is one kernel: a convolution or another heavy operator together with the pointwise operators behind it
(batch normalisation, activation, residual addition). Its inner values stay in registers; only what enters and leaves it
moves through memory. Views, splits and concatenations cost nothing, because engines write into place. So the counts are
lower bounds of what a runtime does.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WEIGHTED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
POINTWISE_NAMES = """
Add Sub Mul Div Pow Sqrt Exp Log Neg Abs Min Max Clip Sigmoid Relu LeakyRelu PRelu Elu Selu Tanh HardSigmoid HardSwish
Softplus Silu Swish Gelu Mish Erf BatchNormalization Where
"""
FREE_NAMES = """
Reshape Flatten Squeeze Unsqueeze Transpose Identity Split Slice Concat Expand Cast Dropout Constant Shape
ConstantOfShape
"""
QUANTIZERS = frozenset({"QuantizeLinear", "DequantizeLinear"})
POINTWISE, FREE = frozenset(POINTWISE_NAMES.split()), frozenset(FREE_NAMES.split())


@dataclass(frozen=True)
class Layer:
    """One kernel of a deployed network.

    Attributes:
        name: Name of its first operator.
        operators: Its operators in order, for example ``Conv+Sigmoid+Mul``.
        flops: Operations of convolutions and matrix products, two per multiply-add.
        weights: Stored values that it reads.
        activations: Computed values that it reads and writes.
        quantized: Whether the graph holds it in eight bits; None in a graph without quantization.
    """

    name: str
    operators: str
    flops: int
    weights: int
    activations: int
    quantized: bool | None = None


@dataclass
class Op:
    """One operator, its values as numbers or names.

    Attributes:
        name: Its name.
        kind: ONNX operator type.
        reads: Computed values that it takes, with their sizes.
        writes: Values that it makes, with their sizes.
        weights: Stored values that it takes.
        flops: See ``Layer``.
        quantized: See ``Layer``.
    """

    name: str
    kind: str
    reads: dict[Any, int]
    writes: dict[Any, int]
    weights: int = 0
    flops: int = 0
    quantized: bool = False


def fuse(ops: Sequence[Op], results: Iterable[Any], quantization: bool = False) -> list[Layer]:
    """Gather operators into layers.

    Args:
        ops: In the order of computation.
        results: The network's outputs, which must be written even when something else also takes them.
        quantization: Whether the graph is a quantized one, so that the rest of it stays in float on purpose.
    """
    groups: list[list[Op]] = []
    made_by: dict[Any, tuple[int, int]] = {}  # value -> (index of the operator, index of its group)
    for index, op in enumerate(ops):
        makers = [made_by[value] for value in op.reads if value in made_by]
        last = max(makers, default=(-1, -1))[1]
        if op.kind in POINTWISE and last >= 0 and groups[last][0].kind not in FREE:
            groups[last].append(op)
        else:
            last = len(groups)
            groups.append([op])
        made_by.update(dict.fromkeys(op.writes, (index, last)))
    readers: dict[Any, set[int]] = {value: {-1} for value in results}
    for number, group in enumerate(groups):
        for op in group:
            for value in op.reads:
                readers.setdefault(value, set()).add(number)
    return [
        _layer(number, group, readers, quantization) for number, group in enumerate(groups) if group[0].kind not in FREE
    ]


def onnx_layers(path: Path, canvas: tuple[int, int], batch: int = 1) -> list[Layer]:
    """Return the layers of an ONNX file.

    Args:
        path: The file.
        canvas: Height and width, for graphs that leave them free.
        batch: Images per call, for graphs that leave it free.
    """
    graph = load_graph(path, canvas, batch)
    return fuse(graph.ops, graph.results, graph.quantization)


@dataclass(frozen=True)
class OnnxGraph:
    """An ONNX graph with every shape known, its constants apart.

    Attributes:
        ops: What computes with something that depends on the input.
        results: Names of the outputs.
        shapes: By name, of values and constants; empty where unknown.
        constants: Names of what does not depend on the input.
        quantization: Whether it quantizes anything; the pairs that do so are left out of ``ops``, as engines do.
        nodes: The ONNX nodes of ``ops``.
    """

    ops: list[Op]
    results: list[str]
    shapes: Mapping[str, tuple[int, ...]]
    constants: set[str]
    quantization: bool = False
    nodes: list[Any] = field(default_factory=list)


def load_graph(path: Path, canvas: tuple[int, int], batch: int = 1) -> OnnxGraph:
    """Read an ONNX file; see ``onnx_layers``."""
    import onnx

    model = onnx.load(path)
    initializers = {item.name: tuple(item.dims) for item in model.graph.initializer}
    entry = next(value for value in model.graph.input if value.name not in initializers)
    for dim, size in zip(entry.type.tensor_type.shape.dim, (batch, None, *canvas), strict=True):
        if size is not None and not dim.dim_value:
            dim.dim_value = size
    for output in model.graph.output:
        output.type.tensor_type.ClearField("shape")
    graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    values = [*graph.value_info, *graph.input, *graph.output]
    shapes = {value.name: tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim) for value in values}
    shapes |= initializers
    constants = set(initializers)
    ops: list[Op] = []
    nodes: list[Any] = []
    origin: dict[str, str] = {}  # what a quantized value stands for
    for node in graph.node:
        if all(name in constants or not name for name in node.input):
            constants.update(node.output)
            if node.op_type == "Constant" and node.attribute and node.attribute[0].HasField("t"):
                shapes[node.output[0]] = tuple(node.attribute[0].t.dims)
        elif node.op_type not in QUANTIZERS:
            nodes.append(node)
            ops.append(_onnx_op(node, shapes, constants, origin))
        if node.op_type in QUANTIZERS:
            origin[node.output[0]] = origin.get(node.input[0], node.input[0])
    results = [origin.get(output.name, output.name) for output in graph.output]
    return OnnxGraph(ops, results, shapes, constants, bool(origin), nodes)


def multiply_adds(node: Any, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Return the multiply-adds of a convolution or matrix product; 0 for every other node or an unknown shape."""
    out = shapes.get(node.output[0], ())
    if node.op_type not in WEIGHTED or not out:
        return 0
    left, right = (shapes.get(name, ()) for name in node.input[:2])
    if node.op_type == "Conv":
        return math.prod(out) * math.prod(right[1:])
    if node.op_type == "ConvTranspose":
        return math.prod(left) * math.prod(right[1:])
    inner = left[-1] if left else 0
    if node.op_type == "Gemm" and any(item.name == "transA" and item.i for item in node.attribute):
        inner = left[0]
    return math.prod(out) * inner


def _onnx_op(node: Any, shapes: Mapping[str, tuple[int, ...]], constants: set[str], origin: Mapping[str, str]) -> Op:
    def size(name: str) -> int:
        return math.prod(shapes.get(name, (0,)))

    taken = [origin.get(name, name) for name in node.input if name and name not in constants]
    return Op(
        name=node.name or node.output[0],
        kind=node.op_type,
        reads={name: size(name) for name in taken},
        writes={name: size(name) for name in node.output if name},
        weights=sum(size(name) for name in node.input if name in constants),
        flops=2 * multiply_adds(node, shapes),
        quantized=len(node.input) > 1 and set(node.input[:2]) <= origin.keys(),
    )


def _layer(number: int, group: Sequence[Op], readers: Mapping[Any, set[int]], quantization: bool) -> Layer:
    writes = {value: size for op in group for value, size in op.writes.items()}
    reads = {value: size for op in group for value, size in op.reads.items() if value not in writes}
    leaves = {value: size for value, size in writes.items() if readers.get(value, set()) - {number}}
    return Layer(
        name=group[0].name,
        operators="+".join(op.kind for op in group),
        flops=sum(op.flops for op in group),
        weights=sum(op.weights for op in group),
        activations=sum(reads.values()) + sum(leaves.values()),
        quantized=any(op.quantized for op in group) if quantization else None,
    )
