"""The convolutions that an OpenVINO folder holds, with the numbers that its weights stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import openvino
from kd_yolo.export.weight_values import NotConstantError, Stored, Values

PLAIN = frozenset({"Convolution", "ConvolutionBackpropData"})
GROUPED = frozenset({"GroupConvolution", "GroupConvolutionBackpropData"})


def read_openvino(path: Path) -> list[Stored]:
    """Return the convolutions of an OpenVINO folder in the order of its graph.

    Raises:
        NotConstantError: The weights of one are no constants, stored as they are, compressed or behind a FakeQuantize.
    """
    graph = openvino.Core().read_model(next(path.glob("*.xml")))
    found = []
    for op in graph.get_ordered_ops():
        kind = op.get_type_name()
        if kind not in PLAIN | GROUPED:
            continue
        weight = _values(op.input_value(1).get_node())
        if kind in GROUPED:  # (G, O / G, I / G, H, W), where PyTorch has (O, I / G, H, W)
            weight = weight.reshaped((-1, *weight.data.shape[2:]))
        found.append(Stored(op.get_friendly_name(), weight, _bias(op)))
    return found


def _bias(op: Any) -> Values | None:
    """Return what is added to the output of a convolution and nothing else."""
    readers = list(op.output(0).get_target_inputs())
    if len(readers) != 1 or readers[0].get_node().get_type_name() != "Add":
        return None
    add = readers[0].get_node()
    channels = int(op.output(0).get_partial_shape()[1].get_length())
    try:
        values = _values(add.input_value(1 - readers[0].get_index()).get_node())
    except NotConstantError:  # another tensor: a residual connection
        return None
    if values.data.shape[1:2] != (channels,) or values.data.size != channels:
        return None
    return values.reshaped((channels,))


def _values(op: Any) -> Values:
    """Return the values of an operation's first output."""
    kind = op.get_type_name()
    if kind == "Constant":
        return Values.of(op.data)
    sources = [value.get_node() for value in op.input_values()]
    if kind == "Convert":
        return _converted(_values(sources[0]), op)
    if kind == "Subtract":
        # The zero point: codes stay codes until they are multiplied by their step.
        codes = _values(sources[0])
        return Values(codes.data - _values(sources[1]).data, codes.kind)
    if kind == "Multiply":
        return _values(sources[0]).dequantized(np.zeros(()), _values(sources[1]).data)
    if kind == "FakeQuantize":
        return _fake_quantized([_values(source) for source in sources], int(op.get_attributes()["levels"]))
    if kind in {"Reshape", "Unsqueeze", "Squeeze"}:
        return _values(sources[0]).reshaped(tuple(op.output(0).get_shape()))
    if kind == "Transpose":
        return _values(sources[0]).transposed([int(axis) for axis in sources[1].data])
    raise NotConstantError(f"'{op.get_friendly_name()}' is made by {kind}")


def _converted(values: Values, op: Any) -> Values:
    """Return values after a Convert; integers stay what they are until they are multiplied by their step."""
    if values.kind in {"float32", "float16"} or values.step is not None:
        return values.cast(np.dtype(op.output(0).get_element_type().to_dtype()))
    return values


def _fake_quantized(values: list[Values], levels: int) -> Values:
    """Return weights rounded to levels between two bounds: weight, input low and high, output low and high."""
    weight, low, high, bottom, top = (item.data for item in values)
    codes = np.rint((np.clip(weight, low, high) - low) / (high - low) * (levels - 1))
    step = (top - bottom) / (levels - 1)
    return Values(codes * step + bottom, "int8", np.broadcast_to(np.abs(step), weight.shape))
