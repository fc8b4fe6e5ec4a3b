"""Where the quantizers of an ONNX graph go, and the graph with them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from kd_yolo.export.int8_ranges import Scale, quantize_weight, weight_scales
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from kd_yolo.errors import ExportError

FOLLOWING = frozenset({"Sigmoid", "Mul", "Add", "Concat", "MaxPool", "Resize", "Split"})
"""Operators that ONNX Runtime computes in 8 bits between two convolutions that are."""
TIED = frozenset({"MaxPool", "Resize", "Split"})
"""Operators whose output has the scale of their input."""
MIN_OPSET = 13


@dataclass(frozen=True)
class Network:
    """An ONNX graph and who makes and reads its tensors.

    Attributes:
        model: The float32 model.
        constants: Initializers by name.
        maker: Node that makes a tensor.
        readers: Nodes that read a tensor, in order.
        layers: Convolutions with constant weights, by name, those of the decoding left out; in order.
        heads: Those of them that no other one follows: their outputs are box distances and class logits.
    """

    model: Any
    constants: dict[str, NDArray[Any]]
    maker: dict[str, Any]
    readers: dict[str, list[Any]]
    layers: dict[str, Any] = field(default_factory=dict)
    heads: tuple[str, ...] = ()


@dataclass(frozen=True)
class Placement:
    """Where the quantizers go.

    Attributes:
        layers: Names of the convolutions that are int8.
        nodes: Names of all nodes that compute in 8 bits.
        tensors: Quantized tensors in the order of the graph, and the tensor whose range each has.
    """

    layers: frozenset[str]
    nodes: frozenset[str]
    tensors: dict[str, str]


def read_network(path: Any) -> Network:
    """Read an ONNX file.

    Raises:
        ExportError: It has no convolution, is not float32, or its operator set has no scales per channel.
    """
    model = onnx.load(path)
    opset = next(item.version for item in model.opset_import if item.domain in {"", "ai.onnx"})
    if opset < MIN_OPSET:
        raise ExportError(f"{path}: int8 needs opset {MIN_OPSET} or newer, this file has {opset}; leave opset= out")
    if model.graph.input[0].type.tensor_type.elem_type != onnx.TensorProto.FLOAT:
        raise ExportError(f"{path}: int8 is made from the float32 file, not from a converted one")
    graph = model.graph
    for index, node in enumerate(graph.node):
        node.name = node.name or f"{node.op_type}_{index}"
    constants = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
    maker = {name: node for node in graph.node for name in node.output}
    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    layers = {n.name: n for n in graph.node if n.op_type == "Conv" and _is_layer(n, constants)}
    if not layers:
        raise ExportError(f"{path}: has no convolution with constant weights; there is nothing to quantize")
    before = _ancestors(maker, [name for node in layers.values() for name in node.input])
    heads = tuple(name for name in layers if name not in before)
    return Network(model, constants, maker, readers, layers, heads)


def place_everywhere(network: Network, layers: Collection[str]) -> Placement:
    """Return quantizers around convolutions and everything between them.

    ONNX Runtime computes a convolution in int8 only when its output is quantized too, and a SiLU in 8 bits only when
    both its Sigmoid and its Mul are.

    Args:
        network: The graph.
        layers: Convolutions to quantize.
    """
    chosen = frozenset(layers)
    needed = _ancestors(network.maker, [network.layers[name].input[0] for name in chosen])
    nodes: set[str] = set()
    made: set[str] = set()
    tensors: dict[str, str] = {}
    for node in network.model.graph.node:
        inside = node.name in chosen or (node.name in needed and _follows(node, made, network.constants))
        if not inside:
            continue
        nodes.add(node.name)
        for name in _activations(node, network.constants):
            tensors.setdefault(name, name)
        made.update(node.output)
        for name in node.output:
            tensors[name] = tensors[node.input[0]] if node.op_type in TIED else name
    return Placement(chosen, frozenset(nodes), tensors)


def place_at_inputs(network: Network, layers: Collection[str]) -> Placement:
    """Return quantizers before convolutions only: TensorRT and OpenVINO fuse what follows into the convolution."""
    chosen = frozenset(layers)
    inputs = [network.layers[name].input[0] for name in network.layers if name in chosen]
    return Placement(chosen, chosen, {name: name for name in inputs})


def followed_by_silu(network: Network, tensor: str) -> bool:
    """Return whether a tensor is read by exactly one Sigmoid and the Mul of a SiLU."""
    readers = network.readers.get(tensor, [])
    if sorted(node.op_type for node in readers) != ["Mul", "Sigmoid"]:
        return False
    sigmoid, product = sorted(readers, key=lambda node: node.op_type, reverse=True)
    return set(product.input) == {tensor, sigmoid.output[0]}


def quantized_model(network: Network, placement: Placement, scales: Mapping[str, Scale], int_bias: bool) -> Any:
    """Return the model with quantizers (QuantizeLinear, DequantizeLinear) in it.

    Weights are stored as int8 with one scale per output channel, symmetric.

    Args:
        network: The float graph; left as it is.
        placement: Where they go.
        scales: Scale of every tensor in ``placement.tensors``.
        int_bias: Store biases as int32 at the accumulator's scale, which ONNX Runtime wants and TensorRT refuses.
    """
    model = type(network.model).FromString(network.model.SerializeToString())
    writer = _Writer(network, placement, scales, int_bias)
    for name in placement.tensors:
        if name not in network.maker:  # an input of the graph
            writer.quantize(name)
    for node in model.graph.node:
        writer.add(node)
    del model.graph.node[:]
    model.graph.node.extend(writer.nodes)
    used = {name for node in writer.nodes for name in node.input}
    kept = [item for item in model.graph.initializer if item.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept + list(writer.constants.values()))
    del model.graph.value_info[:]  # says nothing about the new tensors
    return model


class _Writer:
    """Writes the nodes of a quantized graph one after the other."""

    def __init__(self, network: Network, placement: Placement, scales: Mapping[str, Scale], int_bias: bool) -> None:
        self.network, self.placement, self.int_bias = network, placement, int_bias
        self.scales = {name: scales[name] for name in placement.tensors}
        self.nodes: list[Any] = []
        self.constants: dict[str, Any] = {}

    def add(self, node: Any) -> None:
        """Write a node that reads the quantized tensors, and quantizers behind it where its outputs are quantized."""
        quantized = node.name in self.placement.nodes
        for index, name in enumerate(node.input):
            # What an 8-bit node makes is there in 8 bits only; what a float node makes stays there for float readers.
            if name in self.scales and (quantized or self._made_in_8_bits(name)):
                node.input[index] = f"{name}_dq"
        if node.name in self.placement.layers:
            self._quantize_constants(node, self.scales[self.network.layers[node.name].input[0]])
        self.nodes.append(node)
        for name in node.output:
            if name in self.scales:
                self.quantize(name)

    def quantize(self, name: str) -> None:
        """Write the pair of quantizers of a tensor."""
        scale = self.scales[name]
        step = self._constant(f"{name}_step", np.float32(scale.step))
        zero = self._constant(f"{name}_zero", np.int8(scale.zero) if scale.signed else np.uint8(scale.zero))
        self._node("QuantizeLinear", [name, step, zero], f"{name}_q")
        self._node("DequantizeLinear", [f"{name}_q", step, zero], f"{name}_dq")

    def _made_in_8_bits(self, name: str) -> bool:
        return name in self.network.maker and self.network.maker[name].name in self.placement.nodes

    def _quantize_constants(self, node: Any, entry: Scale) -> None:
        """Replace the weight, and the bias where asked for, by integers and their dequantizers."""
        weight = self.network.constants[node.input[1]]
        bias = self.network.constants[node.input[2]] if len(node.input) > 2 else None
        # An int32 bias has the step of the accumulator, so that a tiny weight step could push it out of range.
        floor = np.abs(bias) / (entry.step * 2.0**30) if bias is not None and self.int_bias else None
        steps = weight_scales(weight, floor)
        name = f"{node.name}/weight"
        node.input[1] = self._dequantized(name, quantize_weight(weight, steps), steps)
        if bias is not None and self.int_bias:
            unit = (steps * np.float32(entry.step)).astype(np.float32)
            codes = np.rint(bias.astype(np.float64) / unit).astype(np.int32)
            node.input[2] = self._dequantized(f"{node.name}/bias", codes, unit)

    def _dequantized(self, name: str, codes: NDArray[Any], steps: NDArray[Any]) -> str:
        parts = [
            self._constant(f"{name}_q", codes),
            self._constant(f"{name}_step", steps),
            self._constant(f"{name}_zero", np.zeros(len(steps), codes.dtype)),
        ]
        self._node("DequantizeLinear", parts, f"{name}_dq", axis=0)
        return f"{name}_dq"

    def _constant(self, name: str, value: Any) -> str:
        self.constants[name] = numpy_helper.from_array(np.asarray(value), name)
        return name

    def _node(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> None:
        self.nodes.append(helper.make_node(kind, inputs, [output], name=f"{output}/{kind}", **attributes))


def _is_layer(node: Any, constants: Mapping[str, NDArray[Any]]) -> bool:
    """Return whether a convolution has constant weights that are not the decoder's 0, 1, 2 ... (box distributions)."""
    weight = constants.get(node.input[1])
    if weight is None or (len(node.input) > 2 and node.input[2] not in constants):
        return False
    return not (len(weight) == 1 and np.array_equal(weight.ravel(), np.arange(weight.size)))


def _ancestors(maker: Mapping[str, Any], tensors: Collection[str]) -> frozenset[str]:
    """Return the names of the nodes that tensors are made from."""
    found: set[str] = set()
    waiting = list(tensors)
    while waiting:
        node = maker.get(waiting.pop())
        if node is not None and node.name not in found:
            found.add(node.name)
            waiting.extend(node.input)
    return frozenset(found)


def _activations(node: Any, constants: Mapping[str, Any]) -> list[str]:
    """Return the tensors that a node computes with; those after the first of some operators are shapes and weights."""
    names = node.input if node.op_type in {"Mul", "Add", "Concat"} else node.input[:1]
    return [name for name in names if name and name not in constants]


def _follows(node: Any, made: Collection[str], constants: Mapping[str, Any]) -> bool:
    """Return whether a node computes in 8 bits because the ones before it do; ``made`` are the tensors those make."""
    if node.op_type not in FOLLOWING:
        return False
    names = _activations(node, constants)
    if node.op_type == "Concat":
        return any(name in made for name in names)
    return len(names) == len(node.input[: 2 if node.op_type in {"Mul", "Add"} else 1]) and all(n in made for n in names)
