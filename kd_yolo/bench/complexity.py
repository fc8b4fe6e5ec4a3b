"""Parameters and operations of an ONNX graph, counted as Ultralytics counts those of a torch model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def onnx_complexity(path: Path, canvas: tuple[int, int]) -> tuple[int, float]:
    """Count a graph.

    Args:
        path: ONNX file.
        canvas: Height and width, for graphs that leave them free.

    Returns:
        Weights and biases of convolutions and matrix products; and GFLOPs for one image, two per multiply-add of the
        convolutions.
    """
    import onnx

    model = onnx.load(path)
    dims = model.graph.input[0].type.tensor_type.shape.dim
    for dim, size in zip(dims, (1, None, *canvas), strict=True):
        if size is not None:
            dim.dim_value = size
    for output in model.graph.output:
        output.type.tensor_type.ClearField("shape")
    sizes = {item.name: tuple(item.dims) for item in model.graph.initializer}
    sizes |= _constants(model.graph)
    shapes = _shapes(onnx.shape_inference.infer_shapes(model, data_prop=True).graph)
    params, multiply_adds = 0, 0
    for node in model.graph.node:
        if node.op_type not in WEIGHTED:
            continue
        weights = [sizes[name] for name in node.input[1:] if name in sizes]
        params += sum(math.prod(shape) for shape in weights)
        if node.op_type in {"Conv", "ConvTranspose"} and weights:
            where = shapes.get(node.output[0] if node.op_type == "Conv" else node.input[0], ())
            multiply_adds += math.prod(weights[0]) * math.prod(where[2:])
    return params, 2 * multiply_adds / 1e9


def _constants(graph: Any) -> dict[str, tuple[int, ...]]:
    """Return the shapes of tensors that stand in Constant nodes."""
    found = {}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute and node.attribute[0].HasField("t"):
            found[node.output[0]] = tuple(node.attribute[0].t.dims)
    return found


def _shapes(graph: Any) -> dict[str, tuple[int, ...]]:
    """Return the inferred shapes by tensor name."""
    values = [*graph.value_info, *graph.input, *graph.output]
    return {value.name: tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim) for value in values}
