from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from detector_factory import tiny_detector
from kd_yolo.export.tensorrt_precision import graph_precision, prepare_qdq
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType
from qdq_graphs import halve_graph, quantize_graph

from kd_yolo.errors import ExportError
from kd_yolo.images import textured_images, to_canvas

PIXELS = to_canvas(textured_images(4, (64, 64), seed=9), (64, 64)).numpy()


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the float32 graph of a detector's layers up to its raw maps."""
    path = tmp_path_factory.mktemp("graph") / "net.onnx"
    body = torch.nn.Sequential(*list(tiny_detector(None).model)[:4]).eval()
    torch.onnx.export(body, (torch.zeros(1, 3, 64, 64),), str(path), opset_version=18, dynamo=False)
    return path


def run(model: onnx.ModelProto, pixels: Any = PIXELS) -> Any:
    """Run exactly the graph as it stands: optimization would fuse what is to be compared."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return np.concatenate([session.run(None, {name: image[None]})[0] for image in pixels])


def test_graph_precision(graph: Path, tmp_path: Path) -> None:
    assert graph_precision(onnx.load(graph)) == "fp32"
    assert graph_precision(onnx.load(halve_graph(graph, tmp_path / "half.onnx"))) == "fp16"
    assert graph_precision(onnx.load(quantize_graph(graph, tmp_path / "int8.onnx"))) == "int8"


@pytest.mark.parametrize("operators", [["Conv"], None])
def test_prepare_qdq__int32_biases_become_float_and_no_bit_changes(
    operators: list[str] | None, graph: Path, tmp_path: Path
) -> None:
    given = onnx.load(quantize_graph(graph, tmp_path / "int8.onnx", bias=True, operators=operators))
    biases = [item for item in given.graph.initializer if item.data_type == TensorProto.INT32]
    assert biases
    prepared = prepare_qdq(given)
    assert not [item for item in prepared.graph.initializer if item.data_type == TensorProto.INT32]
    assert np.array_equal(run(prepared), run(given))
    # What the comparison must catch: one bias that is one step of its scale off.
    node = next(node for node in prepared.graph.node if node.op_type == "Conv")
    bias = next(item for item in prepared.graph.initializer if item.name == node.input[2])
    values = numpy_helper.to_array(bias).copy()
    source = next(item for item in given.graph.node if item.output[0] == node.input[2])
    step = numpy_helper.to_array(next(item for item in given.graph.initializer if item.name == source.input[1]))
    values[0] += step.ravel()[0]
    bias.CopyFrom(numpy_helper.from_array(values, bias.name))
    assert not np.array_equal(run(prepared), run(given))


def test_prepare_qdq__leaves_the_given_graph_and_a_float_graph_alone(graph: Path, tmp_path: Path) -> None:
    given = onnx.load(quantize_graph(graph, tmp_path / "int8.onnx", bias=True))
    before = given.SerializeToString()
    prepare_qdq(given)
    assert given.SerializeToString() == before
    plain = onnx.load(graph)
    assert prepare_qdq(plain) == plain


def constant_graph(axis: int | None, in_node: bool) -> onnx.ModelProto:
    """Return x -> Q -> DQ -> times a constant that is quantized itself, as an attention scale or an anchor."""
    rng = np.random.default_rng(0)
    stored = rng.integers(-127, 128, (3, 4), dtype=np.int8)
    scale: Any = np.float32(0.02)
    if axis is not None:
        scale = np.asarray(rng.uniform(0.01, 0.1, stored.shape[axis]), np.float32)
    values = {
        "step": np.float32(0.05),
        "zero": np.int8(0),
        "stored": stored,
        "scale": scale,
        "zeros": np.zeros(scale.shape, np.int8),
    }
    along = {} if axis is None else {"axis": axis}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "step", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "step", "zero"], ["d"]),
        helper.make_node("DequantizeLinear", ["stored", "scale", "zeros"], ["c"], **along),
        helper.make_node("Mul", ["d", "c"], ["y"]),
    ]
    if in_node:
        value = numpy_helper.from_array(values.pop("stored"))
        nodes.insert(0, helper.make_node("Constant", [], ["stored"], value=value))
    graph = helper.make_graph(
        nodes,
        "constant",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 3, 4])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in values.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize("in_node", [False, True])
def test_prepare_qdq__constants_that_are_no_weights_become_float(axis: int | None, in_node: bool) -> None:
    given = constant_graph(axis, in_node)
    prepared = prepare_qdq(given)
    assert [node.op_type for node in prepared.graph.node] == ["QuantizeLinear", "DequantizeLinear", "Mul"]
    assert {item.name for item in prepared.graph.initializer} == {"step", "zero", "c"}
    pixels = np.random.default_rng(1).normal(size=(4, 3, 4)).astype(np.float32)
    assert np.array_equal(run(prepared, pixels), run(given, pixels))


def test_prepare_qdq__what_it_makes_is_what_tensorrt_takes(graph: Path, tmp_path: Path) -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed: pip install 'kd-yolo[rtx]'")
    from kd_yolo.runtimes.tensorrt_package import shared_logger

    def taken(model: onnx.ModelProto) -> bool:
        log = shared_logger(trt)
        builder = trt.Builder(log)
        network = builder.create_network(0)
        if not trt.OnnxParser(network, log).parse(model.SerializeToString()):
            return False
        config = builder.create_builder_config()
        config.num_compute_capabilities = 1
        config.set_compute_capability(trt.ComputeCapability.SM86, 0)
        return builder.build_serialized_network(network, config) is not None

    given = onnx.load(quantize_graph(graph, tmp_path / "int8.onnx", bias=True))
    assert not taken(given)
    assert taken(prepare_qdq(given))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"activations": QuantType.QUInt8}, "is quantized to uint8"),
        ({"symmetric": False}, "is quantized to int8 with a zero point"),
        ({"activations": QuantType.QInt16}, "is quantized to int16"),
    ],
)
def test_prepare_qdq__refuses_what_tensorrt_would_compute_otherwise(
    settings: dict[str, Any], message: str, graph: Path, tmp_path: Path
) -> None:
    given = onnx.load(quantize_graph(graph, tmp_path / "int8.onnx", **settings))
    with pytest.raises(ExportError, match=message) as caught:
        prepare_qdq(given)
    assert "\n" not in str(caught.value)


def test_prepare_qdq__a_zero_point_left_out_means_uint8(graph: Path, tmp_path: Path) -> None:
    given = onnx.load(quantize_graph(graph, tmp_path / "int8.onnx"))
    node = next(node for node in given.graph.node if node.op_type == "QuantizeLinear")
    del node.input[2]
    with pytest.raises(ExportError, match=f"{node.name}: is quantized to uint8"):
        prepare_qdq(given)


def test_prepare_qdq__scales_must_be_constants(graph: Path, tmp_path: Path) -> None:
    given = onnx.load(quantize_graph(graph, tmp_path / "int8.onnx"))
    node = next(node for node in given.graph.node if node.op_type == "QuantizeLinear")
    given.graph.node.insert(0, helper.make_node("Identity", [node.input[1]], ["computed"]))
    node.input[1] = "computed"
    del node.input[2]
    with pytest.raises(ExportError, match="computed: a scale or zero point that is computed"):
        prepare_qdq(given)
