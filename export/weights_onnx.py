"""The convolutions that an ONNX file holds, with the numbers that its weights stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from kd_yolo.export.weight_values import NotConstantError, Stored, Values
from onnx import helper, numpy_helper

CONVOLUTIONS = frozenset({"Conv", "ConvTranspose"})


def read_onnx(path: Path) -> list[Stored]:
    """Return the convolutions of an ONNX file in its order.

    Raises:
        NotConstantError: The weights of one are no constants, stored as they are or as integers with a scale.
    """
    graph = onnx.load(path).graph
    reader = _Reader(graph)
    found = []
    for node in graph.node:
        if node.op_type in CONVOLUTIONS:
            bias = node.input[2] if len(node.input) > 2 and node.input[2] else None
            name = node.name or node.output[0]
            found.append(Stored(name, reader.values(node.input[1]), None if bias is None else reader.values(bias)))
    return found


class _Reader:
    """Evaluates constants."""

    def __init__(self, graph: Any) -> None:
        self.constants = {item.name: item for item in graph.initializer}
        self.maker: dict[str, Any] = {name: node for node in graph.node for name in node.output}

    def values(self, name: str) -> Values:
        """Return the values of a tensor."""
        if name in self.constants:
            return Values.of(numpy_helper.to_array(self.constants[name]))
        if name not in self.maker:
            raise NotConstantError(f"'{name}' is an input")
        node = self.maker[name]
        kind = node.op_type
        if kind == "Constant":
            value = next((item for item in node.attribute if item.name == "value"), None)
            if value is not None:
                return Values.of(numpy_helper.to_array(value.t))
        if kind == "Identity":
            return self.values(node.input[0])
        if kind == "Cast":
            return self.values(node.input[0]).cast(helper.tensor_dtype_to_np_dtype(_attribute(node, "to", 1)))
        if kind == "DequantizeLinear":
            return self._dequantized(node)
        raise NotConstantError(f"'{name}' is made by {kind}")

    def _dequantized(self, node: Any) -> Values:
        """Return what integers with one scale, or one for each index of an axis, stand for."""
        codes, step = self.values(node.input[0]), self.values(node.input[1]).data
        zero = self.values(node.input[2]).data if len(node.input) > 2 and node.input[2] else np.zeros_like(step)
        if step.ndim > 1:
            raise NotConstantError(f"'{node.output[0]}' has scales in blocks")
        axis = _attribute(node, "axis", 1)
        shape = [1] * codes.data.ndim
        if step.size > 1:
            shape[axis] = step.size
        return codes.dequantized(zero.reshape(shape), step.reshape(shape))


def _attribute(node: Any, name: str, default: int) -> int:
    return next((int(item.i) for item in node.attribute if item.name == name), default)
