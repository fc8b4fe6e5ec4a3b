"""int8 ONNX files: what is quantized, how each runtime wants it, what it costs, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import onnxruntime
import pytest
from detector_factory import save_checkpoint, tiny_detector
from kd_yolo.export import export
from kd_yolo.export.calibration import calibration_pixels
from kd_yolo.export.int8 import HEAD_REASON, SENSITIVE_REASON
from kd_yolo.export.int8_onnx import OnnxQuantizer, quantize_onnx
from kd_yolo.export.sensitivity import relative_noise
from onnx import TensorProto, numpy_helper

from kd_yolo.errors import ConfigError, DataError, ExportError
from kd_yolo.images import textured_images

CANVAS = (64, 64)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("float")
    return Path(export(save_checkpoint(tiny_detector(), folder / "best.pt"), format="onnx", imgsz=64).path)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("images")
    files = [folder / f"{index}.png" for index in range(10)]
    for file, image in zip(files, textured_images(10, CANVAS, seed=5), strict=True):
        cv2.imwrite(str(file), image)
    return files


def quantize(source: Path, out: Path, images: list[Path], judge: Any = lambda path: 0.5, **given: Any) -> Any:
    return quantize_onnx(source, out, images, judge, 0.5, 0.5, CANVAS, **given)


def outputs(path: Path, images: list[Path], optimized: Path | None = None) -> list[np.ndarray[Any, Any]]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if optimized:
        options.optimized_model_filepath = str(optimized)
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return [session.run(None, {"images": batch})[0] for batch in calibration_pixels(images, CANVAS)]


def test_quantize_onnx__is_near_the_float_graph_and_smaller(source: Path, images: list[Path], tmp_path: Path) -> None:
    report = quantize(source, tmp_path / "best_int8.onnx", images)
    onnx.checker.check_model(onnx.load(tmp_path / "best_int8.onnx"), full_check=True)
    wanted, found = (outputs(path, images) for path in (source, tmp_path / "best_int8.onnx"))
    apart = [np.abs(a - b) for a, b in zip(wanted, found, strict=True)]
    assert max(float(item[:, 4:].mean()) for item in apart) < 0.02  # a network of random statistics
    assert max(float(item[:, :4].mean()) for item in apart) < 0.5  # pixels
    assert max(float(item.max()) for item in apart) > 1e-4  # it is not the float graph
    assert (tmp_path / "best_int8.onnx").stat().st_size < 0.6 * source.stat().st_size
    assert report.layers_total == report.layers_int8 + len(report.layers_float)
    assert set(report.layers_float.values()) == {HEAD_REASON}
    assert len(report.layers_float) == 6  # boxes and classes on three levels
    assert (report.judge_calls, report.drop_points, report.calibration) == (1, 0.0, {"images": 10})
    assert len(report.sensitivity) == report.layers_int8


def test_quantize_onnx__onnxruntime_stays_in_8_bits(source: Path, images: list[Path], tmp_path: Path) -> None:
    report = quantize(source, tmp_path / "cpu.onnx", images)
    outputs(tmp_path / "cpu.onnx", images[:1], optimized=tmp_path / "optimized.onnx")
    kinds = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    assert kinds["QLinearConv"] == report.layers_int8
    assert kinds["QuantizeLinear"] == 1  # of the image
    # A SiLU before a convolution of the head that is in float is itself in float, and its Sigmoid and Mul with it.
    assert kinds["QLinearMul"] == kinds["QLinearSigmoid"] == report.layers_int8 - 6


def test_quantize_onnx__tensorrt_gets_what_it_takes(source: Path, images: list[Path], tmp_path: Path) -> None:
    report = quantize(source, tmp_path / "trt.onnx", images, scheme="tensorrt")
    graph = onnx.load(tmp_path / "trt.onnx").graph
    constants = {item.name: item for item in graph.initializer}
    readers = {name: node for node in graph.node for name in node.input}
    quantizers = [node for node in graph.node if node.op_type in {"QuantizeLinear", "DequantizeLinear"}]
    assert {constants[node.input[2]].data_type for node in quantizers} == {TensorProto.INT8}
    assert not any(numpy_helper.to_array(constants[node.input[2]]).any() for node in quantizers)
    behind = [readers[node.output[0]] for node in quantizers if node.op_type == "DequantizeLinear"]
    assert {node.op_type for node in behind} == {"Conv"}
    per_channel = [n for n in quantizers if n.op_type == "DequantizeLinear" and n.input[0] in constants]
    assert len(per_channel) == report.layers_int8
    assert all(constants[node.input[0]].data_type == TensorProto.INT8 for node in per_channel)
    assert all(numpy_helper.to_array(constants[node.input[1]]).ndim == 1 for node in per_channel)
    wanted, found = (outputs(path, images) for path in (source, tmp_path / "trt.onnx"))
    assert max(float(np.abs(a - b)[:, 4:].mean()) for a, b in zip(wanted, found, strict=True)) < 0.02


def test_quantize_onnx__nothing_behind_the_head_is_quantized(source: Path, images: list[Path], tmp_path: Path) -> None:
    quantize(source, tmp_path / "cpu.onnx", images)
    graph = onnx.load(tmp_path / "cpu.onnx").graph
    maker = {name: node for node in graph.node for name in node.output}
    waiting, behind = [graph.output[0].name], {}
    while waiting:
        node = maker.get(waiting.pop())
        if node is not None and node.name not in behind:
            behind[node.name] = node.op_type
            waiting += [] if node.op_type == "Conv" else node.input
    assert list(behind.values()).count("Conv") == 6
    assert "DequantizeLinear" not in behind.values()


def test_quantize_onnx__metadata_stays_and_says_int8(source: Path, images: list[Path], tmp_path: Path) -> None:
    quantize(source, tmp_path / "cpu.onnx", images)
    before, after = ({p.key: p.value for p in onnx.load(f).metadata_props} for f in (source, tmp_path / "cpu.onnx"))
    own, ours = json.loads(before.pop("kd_yolo")), json.loads(after.pop("kd_yolo"))
    assert after == before
    assert ours == own | {"precision": "int8"}


def test_quantize_onnx__is_the_same_every_time(source: Path, images: list[Path], tmp_path: Path) -> None:
    reports = [quantize(source, tmp_path / name, images) for name in ("a.onnx", "b.onnx")]
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    assert reports[0].sensitivity == reports[1].sensitivity


def test_quantize_onnx__worst_layers_go_back_to_float(source: Path, images: list[Path], tmp_path: Path) -> None:
    def judge(path: Path) -> float:
        floats = sum(
            node.op_type == "Conv" and not node.input[1].endswith("_dq") for node in onnx.load(path).graph.node
        )
        return 0.5 if floats >= 6 + 3 else 0.4

    report = quantize(source, tmp_path / "mixed.onnx", images, judge)
    worst = [item.layer for item in report.sensitivity[:3]]
    assert [name for name, why in report.layers_float.items() if why == SENSITIVE_REASON] == worst
    assert [(trial.float_layers, trial.drop_points > 0.5) for trial in report.trials] == [
        (0, True),
        (1, True),
        (2, True),
        (4, False),
        (3, False),
    ]
    found = outputs(tmp_path / "mixed.onnx", images, optimized=tmp_path / "optimized.onnx")
    kinds = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    assert kinds["QLinearConv"] == report.layers_int8
    assert np.isfinite(found).all()


def test_quantize_onnx__a_bound_that_cannot_be_held_leaves_no_file(
    source: Path, images: list[Path], tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=r"int8 loses 10\.00 points of mAP50-95 \(0\.5000 in float\)"):
        quantize(source, tmp_path / "never.onnx", images, lambda path: 0.4)
    assert list(tmp_path.iterdir()) == []


def test_rank__a_layer_with_coarse_steps_is_the_most_sensitive(source: Path, images: list[Path]) -> None:
    maker = OnnxQuantizer.of(source, images, CANVAS)
    before = maker.rank()
    victim = next(
        item.layer
        for item in reversed(before)
        if len(maker.network.readers[maker.network.layers[item.layer].input[0]]) == 1
    )
    assert victim != before[0].layer
    tensor = maker.network.layers[victim].output[0]
    scale = maker.scales[tensor]
    maker.scales[tensor] = dataclasses.replace(scale, step=scale.step * 64, zero=scale.zero // 64)
    assert maker.rank()[0].layer == victim


def test_relative_noise__value() -> None:
    wanted = [[np.array([0, 2]), np.array([5, 5])], [np.array([0, 2]), np.array([5, 7])]]
    found = [[np.array([1, 2]), np.array([5, 5])], [np.array([0, 2]), np.array([5, 7])]]
    # First output: mean squared difference 1/4, variance 1; second: none.
    assert relative_noise(wanted, found) == pytest.approx(0.125)


@pytest.mark.parametrize("scheme", ["cpu", "tensorrt"])
def test_quantizer__every_subset_of_layers_makes_a_valid_graph(source: Path, images: list[Path], scheme: str) -> None:
    maker = OnnxQuantizer.of(source, images[:8], CANVAS, scheme=scheme)
    rng = np.random.default_rng(0)
    for _ in range(6):
        chosen = [name for name in maker.network.layers if rng.random() < 0.5]
        model = maker.model(chosen)
        onnx.checker.check_model(model, full_check=True)
        quantized = [n.name for n in model.graph.node if n.op_type == "Conv" and n.input[1].endswith("_dq")]
        assert quantized == [name for name in maker.network.layers if name in chosen]


def test_quantize_onnx__unknown_scheme(source: Path, images: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="scheme=gpu: must be cpu or tensorrt"):
        quantize(source, tmp_path / "x.onnx", images, scheme="gpu")


def test_quantize_onnx__unreadable_image_is_named(source: Path, images: list[Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"x")
    with pytest.raises(DataError, match=r"broken\.png: cannot be read"):
        quantize(source, tmp_path / "x.onnx", [*images, broken])


def test_quantize_onnx__old_opset(source: Path, images: list[Path], tmp_path: Path) -> None:
    model = onnx.load(source)
    model.opset_import[0].version = 12
    onnx.save(model, tmp_path / "old.onnx")
    with pytest.raises(ExportError, match=r"old\.onnx: int8 needs opset 13 or newer, this file has 12"):
        quantize(tmp_path / "old.onnx", tmp_path / "x.onnx", images)


def test_quantize_onnx__graph_without_convolutions(images: list[Path], tmp_path: Path) -> None:
    make = onnx.helper
    entry, result = (make.make_tensor_value_info(n, TensorProto.FLOAT, [1, 3, 64, 64]) for n in ("images", "y"))
    graph = make.make_graph([make.make_node("Relu", ["images"], ["y"])], "g", [entry], [result])
    onnx.save(make.make_model(graph, opset_imports=[make.make_opsetid("", 17)]), tmp_path / "relu.onnx")
    with pytest.raises(ExportError, match="has no convolution with constant weights"):
        quantize(tmp_path / "relu.onnx", tmp_path / "x.onnx", images)
