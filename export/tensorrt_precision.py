"""What TensorRT wants of a quantized ONNX graph: signed, symmetric, and no quantized constants but weights."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from kd_yolo.errors import ExportError

WEIGHT_READERS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")
Array = np.ndarray[Any, np.dtype[Any]]


def graph_precision(model: onnx.ModelProto) -> str:
    """Return ``int8``, ``fp16`` or ``fp32``: what a graph computes in, the lowest one if there are several."""
    if any(node.op_type == "QuantizeLinear" for node in model.graph.node):
        return "int8"
    weights = {node.input[1] for node in model.graph.node if node.op_type in WEIGHT_READERS and len(node.input) > 1}
    half = any(item.data_type == TensorProto.FLOAT16 and item.name in weights for item in model.graph.initializer)
    return "fp16" if half else "fp32"


def prepare_qdq(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a graph that TensorRT parses, computing exactly what the given one computes.

    Constants behind a DequantizeLinear become float constants unless they are 8-bit weights: TensorRT has no int32
    bias, and takes no quantized constants elsewhere.

    Args:
        model: A graph with QuantizeLinear and DequantizeLinear nodes, as ONNX Runtime's quantizer writes it; it is left
            as it is. A graph without them is returned as a copy.

    Raises:
        ExportError: It is quantized to something that TensorRT does not compute with: unsigned, with a zero point, or
            other than 8 bits.
    """
    prepared = onnx.ModelProto()
    prepared.CopyFrom(model)
    constants = _constants(prepared)
    readers = _readers(prepared)
    folded = []
    for node in prepared.graph.node:
        if node.op_type != "DequantizeLinear" or node.input[0] not in constants:
            continue
        stored = constants[node.input[0]]
        if stored.data_type in {TensorProto.INT8, TensorProto.UINT8} and _feeds_weights(readers[node.output[0]]):
            continue
        prepared.graph.initializer.append(numpy_helper.from_array(_dequantized(node, constants), node.output[0]))
        folded.append(node)
    for node in folded:
        prepared.graph.node.remove(node)
    _drop_unused(prepared)
    _check(prepared)
    return prepared


def _constants(model: onnx.ModelProto) -> dict[str, TensorProto]:
    found = {item.name: item for item in model.graph.initializer}
    for node in model.graph.node:
        for item in node.attribute:
            if node.op_type == "Constant" and item.name == "value":
                found[node.output[0]] = item.t
    return found


def _readers(model: onnx.ModelProto) -> dict[str, list[tuple[onnx.NodeProto, int]]]:
    readers = defaultdict(list)
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            readers[name].append((node, index))
    return readers


def _feeds_weights(readers: list[tuple[onnx.NodeProto, int]]) -> bool:
    return bool(readers) and all(node.op_type in WEIGHT_READERS and index == 1 for node, index in readers)


def _array(name: str, constants: dict[str, TensorProto]) -> Array:
    if name not in constants:
        raise ExportError(f"{name}: a scale or zero point that is computed; TensorRT needs constants")
    return numpy_helper.to_array(constants[name])


def _zero_point(node: onnx.NodeProto, constants: dict[str, TensorProto]) -> Array:
    """Return the zero point of a node; where it is left out, ONNX means uint8 0, or 0 of the stored type."""
    if len(node.input) > 2 and node.input[2]:
        return _array(node.input[2], constants)
    stored = constants.get(node.input[0])
    known = stored is not None and node.op_type == "DequantizeLinear"
    dtype = numpy_helper.to_array(stored).dtype if known else np.dtype(np.uint8)
    return np.zeros(_array(node.input[1], constants).shape, dtype)


def _axis(node: onnx.NodeProto) -> int:
    return next((item.i for item in node.attribute if item.name == "axis"), 1)


def _along(values: Array, rank: int, axis: int) -> Array:
    """Return one value a channel in the shape that broadcasts along an axis."""
    return values.reshape([-1 if index == axis % rank else 1 for index in range(rank)]) if values.ndim else values


def _dequantized(node: onnx.NodeProto, constants: dict[str, TensorProto]) -> Array:
    """Return what a DequantizeLinear makes of a constant: (x - zero point) * scale in the scale's type."""
    stored, scale, zero = (
        _array(node.input[0], constants),
        _array(node.input[1], constants),
        _zero_point(node, constants),
    )
    steps = stored.astype(np.int64) - _along(zero.astype(np.int64), stored.ndim, _axis(node))
    return (steps.astype(scale.dtype) * _along(scale, stored.ndim, _axis(node))).astype(scale.dtype)


def _drop_unused(model: onnx.ModelProto) -> None:
    """Remove constants that no node reads any more."""
    used = {name for node in model.graph.node for name in node.input} | {item.name for item in model.graph.output}
    kept = [item for item in model.graph.initializer if item.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    for node in [node for node in model.graph.node if node.op_type == "Constant" and node.output[0] not in used]:
        model.graph.node.remove(node)


def _check(model: onnx.ModelProto) -> None:
    constants = _constants(model)
    for node in model.graph.node:
        if node.op_type not in QUANTIZERS:
            continue
        zero = _zero_point(node, constants)
        if zero.dtype != np.int8 or zero.any():
            point = " with a zero point" if zero.any() else ""
            raise ExportError(
                f"{node.name}: is quantized to {zero.dtype}{point}, TensorRT computes with symmetric int8 alone; "
                "quantize activations and weights to that"
            )
