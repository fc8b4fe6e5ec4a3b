"""Parameters and operations of an ONNX graph, counted as Ultralytics counts those of a torch model."""

from __future__ import annotations

import math
from pathlib import Path

from kd_yolo.bench.layers import WEIGHTED, load_graph, multiply_adds


def onnx_complexity(path: Path, canvas: tuple[int, int]) -> tuple[int, float]:
    """Count a graph.

    Args:
        path: ONNX file.
        canvas: Height and width, for graphs that leave them free.

    Returns:
        Weights and biases of convolutions and matrix products; and GFLOPs for one image, two per multiply-add of the
        convolutions.
    """
    graph = load_graph(path, canvas)
    params, total = 0, 0
    for node in graph.nodes:
        if node.op_type not in WEIGHTED:
            continue
        stored = [name for name in node.input[1:] if name in graph.constants]
        params += sum(math.prod(graph.shapes.get(name, ())) for name in stored)
        if node.op_type in {"Conv", "ConvTranspose"}:
            total += multiply_adds(node, graph.shapes) // max(1, graph.shapes[node.output[0]][0])
    return params, 2 * total / 1e9
