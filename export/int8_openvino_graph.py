"""OpenVINO graphs as the quantizer sees them: layers, tensors, quantizers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from kd_yolo.export.int8_ranges import Scale

from kd_yolo.errors import ExportError

CONVOLUTIONS = frozenset({"Convolution", "GroupConvolution"})


def xml_file(source: Path) -> Path:
    """Return the one .xml of a folder, or the file itself."""
    files = sorted(source.glob("*.xml")) if source.is_dir() else [source]
    if len(files) != 1 or not files[0].is_file():
        raise ExportError(f"{source}: is not an OpenVINO model (one .xml file is expected there)")
    return files[0]


def is_layer(op: Any) -> bool:
    """Return whether an operation is a convolution of constant weights, but not of the decoder's 0, 1, 2 ..."""
    if op.get_type_name() not in CONVOLUTIONS:
        return False
    weight = op.input_value(1).get_node()
    if weight.get_type_name() != "Constant":
        return False
    values = weight.data
    return not (len(values) == 1 and np.array_equal(values.ravel(), np.arange(values.size)))


def ancestors(nodes: Sequence[Any]) -> frozenset[str]:
    """Return the names of nodes and of everything they are made from."""
    found: set[str] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node.get_friendly_name() not in found:
            found.add(node.get_friendly_name())
            waiting.extend(value.get_node() for value in node.input_values())
    return frozenset(found)


def bounds(scale: Scale) -> tuple[np.float32, np.float32]:
    """Return the values of the lowest and the highest code."""
    return np.float32(-scale.zero * scale.step), np.float32((255 - scale.zero) * scale.step)


def tensor_name(value: Any) -> str:
    """Return a name of an output that only it has."""
    return f"{value.get_node().get_friendly_name()}:{value.get_index()}"


def is_quantizer(op: Any) -> bool:
    """Return whether an operation quantizes an activation."""
    return op.get_type_name() == "FakeQuantize" and op.input_value(0).get_node().get_type_name() != "Constant"
