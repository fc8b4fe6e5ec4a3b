from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from detector_factory import tiny_detector
from hypothesis import given
from hypothesis import strategies as st
from kd_yolo.export import export
from onnx import TensorProto, helper
from torch import nn
from ultralytics.utils.torch_utils import get_flops

from kd_yolo.bench.layers import Layer, Op, fuse, onnx_layers
from kd_yolo.bench.roofline import PRECISIONS, bound, estimate, is_device
from kd_yolo.bench.torch_layers import torch_layers
from kd_yolo.inference import deployed_form
from kd_yolo.targets import Target, Throughput, load_target

# Round numbers: 1e12 operations a second in fp32, 2e12 in fp16, 4e12 in int8; 1e9 bytes a second; 3 us a launch.
UNIT = Target(
    name="unit",
    title="Unit",
    compute_capability="8.6",
    tflops=Throughput(fp32=1.0, fp16=2.0, int8=4.0),
    bandwidth_gb_s=1.0,
    launch_us=3.0,
    memory_gb=1.0,
    sources=["made up"],
)
CORE = UNIT.model_copy(update={"compute_capability": None, "launch_us": 0.0})


def save_graph(path: Path, nodes: list[Any], weights: dict[str, list[int]], shape: list[int]) -> Path:
    """Write a graph from ``x`` of a shape to ``y``."""
    initializers = [
        helper.make_tensor(name, TensorProto.FLOAT, dims, [0.5] * int(torch.tensor(dims).prod()))
        for name, dims in weights.items()
    ]
    entry = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "g", [entry], [result], initializers)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), path)
    return path


def one_convolution(path: Path) -> Path:
    # 3 -> 8 channels, 3x3, stride 2, padding 1, on 32x32; SiLU behind it
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["c"], "conv", pads=[1, 1, 1, 1], strides=[2, 2]),
        helper.make_node("Sigmoid", ["c"], ["s"], "gate"),
        helper.make_node("Mul", ["c", "s"], ["y"], "silu"),
    ]
    return save_graph(path, nodes, {"w": [8, 3, 3, 3], "b": [8]}, [1, 3, 32, 32])


def test_onnx_layers__one_convolution_golden(tmp_path: Path) -> None:
    found = onnx_layers(one_convolution(tmp_path / "a.onnx"), (32, 32))
    # 8 x 16 x 16 outputs, 3 x 3 x 3 multiply-adds each; weights 8 x 27 + 8; in 3 x 32 x 32, out 8 x 16 x 16, and
    # nothing between convolution and activation
    outputs = 8 * 16 * 16
    assert found == [Layer("conv", "Conv+Sigmoid+Mul", 2 * outputs * 27, 8 * 27 + 8, 3 * 32 * 32 + outputs)]


def test_estimate__one_convolution_golden(tmp_path: Path) -> None:
    layers = onnx_layers(one_convolution(tmp_path / "a.onnx"), (32, 32))
    # 110592 operations; 224 + 3072 + 2048 = 5344 values.
    # fp32: 110592 / 1e12 = 0.000110592 ms x 1000 = 0.110592 us; 4 x 5344 / 1e9 = 21.376 us, and 3 us: memory-bound
    found = estimate(layers, UNIT, "fp32")
    assert (found.flops, found.bytes) == (110_592, 21_376)
    assert found.layers[0].compute_ms == pytest.approx(0.000110592)
    assert found.layers[0].memory_ms == pytest.approx(0.021376)
    assert found.bound_ms == pytest.approx(0.024376)
    assert (found.compute_bound, found.launch_ms) == (0.0, 0.003)
    assert estimate(layers, UNIT, "int8").bound_ms == pytest.approx(0.005344 + 0.003)
    # with 1000 times the bandwidth arithmetic limits: 0.110592 us and 3 us
    fast = UNIT.model_copy(update={"bandwidth_gb_s": 1000.0})
    assert estimate(layers, fast, "fp32").bound_ms == pytest.approx(0.000110592 + 0.003)
    assert estimate(layers, fast, "fp32").compute_bound == 1.0


def test_onnx_layers__free_batch_and_canvas(tmp_path: Path, tiny_checkpoint: Path) -> None:
    path = Path(export(tiny_checkpoint, out=tmp_path / "free.onnx", dynamic=True).path)
    one, four = (sum(layer.flops for layer in onnx_layers(path, (64, 64), batch)) for batch in (1, 4))
    wide = sum(layer.flops for layer in onnx_layers(path, (64, 128), 1))
    assert (four, wide) == (4 * one, 2 * one)


def test_onnx_layers__residual_is_read_and_not_a_kernel(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], "conv"),
        helper.make_node("Add", ["c", "x"], ["y"], "add"),
    ]
    found = onnx_layers(save_graph(tmp_path / "a.onnx", nodes, {"w": [4, 4, 1, 1]}, [1, 4, 8, 8]), (8, 8))
    # x is read once, for both; y is written; c never leaves
    assert [(layer.operators, layer.activations) for layer in found] == [("Conv+Add", 2 * 4 * 64)]


def test_onnx_layers__concatenation_is_free_and_pooling_is_not(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MaxPool", ["x"], ["p"], "pool", kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        helper.make_node("Concat", ["x", "p"], ["k"], "concat", axis=1),
        helper.make_node("Conv", ["k", "w"], ["y"], "conv"),
    ]
    found = onnx_layers(save_graph(tmp_path / "a.onnx", nodes, {"w": [2, 8, 1, 1]}, [1, 4, 8, 8]), (8, 8))
    assert [(layer.name, layer.activations) for layer in found] == [
        ("pool", 2 * 4 * 64),
        ("conv", 8 * 64 + 2 * 64),
    ]


def test_fuse__an_output_is_written_even_when_it_is_taken_too() -> None:
    ops = [Op("a", "Conv", {"x": 10}, {"c": 20}), Op("b", "Relu", {"c": 20}, {"y": 20})]
    assert fuse(ops, ["y"])[0].activations == 10 + 20
    assert fuse(ops, ["y", "c"])[0].activations == 10 + 20 + 20


def test_fuse__a_value_that_another_layer_takes_is_written() -> None:
    ops = [
        Op("a", "Conv", {"x": 10}, {"c": 20}),
        Op("b", "Relu", {"c": 20}, {"r": 20}),
        Op("d", "Conv", {"c": 20}, {"e": 5}),
    ]
    assert [layer.activations for layer in fuse(ops, ["r", "e"])] == [10 + 20 + 20, 20 + 5]


def test_onnx_layers__quantized_and_kept_in_float(tmp_path: Path) -> None:
    weights = {"w": [4, 4, 1, 1], "v": [4, 4, 1, 1], "scale": []}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale"], ["q"], "q"),
        helper.make_node("DequantizeLinear", ["q", "scale"], ["d"], "dq"),
        helper.make_node("QuantizeLinear", ["w", "scale"], ["wq"], "wq"),
        helper.make_node("DequantizeLinear", ["wq", "scale"], ["wd"], "wdq"),
        helper.make_node("Conv", ["d", "wd"], ["c"], "eight"),
        helper.make_node("Conv", ["c", "v"], ["y"], "float"),
    ]
    found = onnx_layers(save_graph(tmp_path / "a.onnx", nodes, weights, [1, 4, 8, 8]), (8, 8))
    assert [(layer.name, layer.quantized, layer.weights) for layer in found] == [
        ("eight", True, 16),
        ("float", False, 16),
    ]
    assert [bound(layer, UNIT, "int8").precision for layer in found] == ["int8", "fp16"]
    assert [bound(layer, UNIT, "fp16").precision for layer in found] == ["fp16", "fp16"]


def test_onnx_layers__quantizers_between_convolution_and_activation(tmp_path: Path) -> None:
    """What a quantized graph computes and moves is what the same graph in float does."""
    pairs = [
        helper.make_node("QuantizeLinear", ["c", "scale"], ["q"], "q"),
        helper.make_node("DequantizeLinear", ["q", "scale"], ["d"], "dq"),
    ]
    convolution = helper.make_node("Conv", ["x", "w"], ["c"], "conv")
    weights = {"w": [4, 4, 1, 1], "scale": []}
    found = []
    for name, between, value in (("float", [], "c"), ("quantized", pairs, "d")):
        gate = [
            helper.make_node("Sigmoid", [value], ["s"], "gate"),
            helper.make_node("Mul", [value, "s"], ["y"], "silu"),
        ]
        path = save_graph(tmp_path / f"{name}.onnx", [convolution, *between, *gate], weights, [1, 4, 8, 8])
        found.append([(layer.operators, layer.activations) for layer in onnx_layers(path, (8, 8))])
    assert found[0] == found[1] == [("Conv+Sigmoid+Mul", 2 * 4 * 64)]


def test_torch_layers__agree_with_the_exported_graph(tiny_checkpoint: Path, tmp_path: Path) -> None:
    model = deployed_form(tiny_detector())[0].fuse(verbose=False).eval()
    mine = torch_layers(model, (64, 64), 1, 3)
    graph = onnx_layers(Path(export(tiny_checkpoint, out=tmp_path / "a.onnx").path), (64, 64))
    convolutions = [
        [(layer.flops, layer.weights, layer.activations) for layer in layers if layer.operators.startswith("Conv")]
        for layers in (mine, graph)
    ]
    assert sorted(convolutions[0]) == sorted(convolutions[1])
    assert sum(layer.flops for layer in mine) / 1e9 == pytest.approx(get_flops(model, 64))
    assert sum(layer.weights for layer in mine if layer.flops) == sum(p.numel() for p in model.parameters())


def test_torch_layers__batch_multiplies_all_but_the_weights() -> None:
    model = deployed_form(tiny_detector())[0].fuse(verbose=False).eval()
    one, three = (torch_layers(model, (64, 96), batch, 3) for batch in (1, 3))
    assert [layer.flops for layer in three] == [3 * layer.flops for layer in one]
    assert [layer.activations for layer in three] == [3 * layer.activations for layer in one]
    assert [layer.weights for layer in three] == [layer.weights for layer in one]
    assert next(model.parameters()).device.type == "cpu"


def test_torch_layers__an_unmerged_network_costs_more() -> None:
    """The wrong twin: branches that are not merged are more kernels and more bytes."""
    merged = deployed_form(tiny_detector("repvgg"))[0].eval()
    plain = tiny_detector("repvgg").eval()
    plain.model[-1].end2end = False
    merged_ms, plain_ms = (
        estimate(torch_layers(model, (64, 64), 1, 3), UNIT, "fp32").bound_ms for model in (merged, plain)
    )
    assert plain_ms > 1.2 * merged_ms


layers = st.lists(
    st.builds(
        Layer,
        st.just("a"),
        st.just("Conv"),
        st.integers(0, 10**10),
        st.integers(0, 10**7),
        st.integers(1, 10**7),
        st.sampled_from([None, True, False]),
    ),
    min_size=1,
    max_size=5,
)


@given(layers, st.floats(1.0, 100.0), st.sampled_from(PRECISIONS))
def test_estimate__a_better_processor_is_never_slower(found: list[Layer], factor: float, precision: Any) -> None:
    base = estimate(found, UNIT, precision).bound_ms
    quick = Throughput(**{name: value * factor for name, value in UNIT.tflops.model_dump().items()})
    better: list[dict[str, Any]] = [
        {"bandwidth_gb_s": UNIT.bandwidth_gb_s * factor},
        {"tflops": quick},
        {"launch_us": UNIT.launch_us / factor},
    ]
    for change in better:
        assert estimate(found, UNIT.model_copy(update=change), precision).bound_ms <= base
    everything = {key: value for change in better for key, value in change.items()}
    assert estimate(found, UNIT.model_copy(update=everything), precision).bound_ms == pytest.approx(base / factor)


@given(layers)
def test_estimate__fewer_bits_are_never_slower(found: list[Layer]) -> None:
    fp32, fp16, int8 = (estimate(found, UNIT, precision).bound_ms for precision in PRECISIONS)
    assert int8 <= fp16 <= fp32


@given(layers, layers)
def test_estimate__is_a_sum_over_layers(first: list[Layer], second: list[Layer]) -> None:
    parts = [estimate(one, UNIT, "fp16").bound_ms for one in (first, second)]
    assert estimate(first + second, UNIT, "fp16").bound_ms == pytest.approx(sum(parts))


@given(layers, st.integers(1, 8))
def test_estimate__cores_divide_a_cpu_and_not_a_gpu(found: list[Layer], threads: int) -> None:
    one, many = (estimate(found, CORE, "fp32", threads=count).bound_ms for count in (1, threads))
    assert many == pytest.approx(one / threads)
    assert estimate(found, UNIT, "fp32", threads=threads) == estimate(found, UNIT, "fp32")


def test_estimate__says_that_it_is_one() -> None:
    found = estimate([Layer("a", "Conv", 1, 1, 1)], UNIT, "fp32").to_dict()
    assert found["kind"] == "estimate"
    assert found["measured_ms"] is None


@pytest.mark.parametrize(
    ("target", "name", "same"),
    [
        ("rtx3070ti", "NVIDIA GeForce RTX 3070 Ti", True),
        ("rtx3070ti", "NVIDIA GeForce RTX 3070", False),
        ("rtx4070", "NVIDIA GeForce RTX 4070 Ti", False),
        ("t4", "Tesla T4", True),
        ("t4", "NVIDIA T4", True),
        ("h200", "NVIDIA H200", True),
        ("epyc-avx512", "AMD EPYC", True),
        ("epyc-avx512", "AMD EPYC 9575F 64-Core Processor", False),
        ("epyc-avx512", "AMD EPYC 7763 64-Core Processor", False),
        ("rtx5070", None, False),
    ],
)
def test_is_device__by_the_drivers_name(target: str, name: str | None, same: bool) -> None:
    assert is_device(load_target(target), name) is same


def test_torch_layers__an_activation_in_place_is_fused() -> None:
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.act = nn.Conv2d(3, 8, 1), nn.SiLU(inplace=True)
            self.model = [nn.Identity()]
            self.model[-1].stride = torch.tensor([1.0])

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.act(self.conv(pixels))
            return out

    found = torch_layers(Small().eval(), (16, 16), 1, 3)
    assert [(layer.operators, layer.activations, layer.weights) for layer in found] == [
        ("Conv+Silu", (3 + 8) * 256, 3 * 8 + 8)
    ]
