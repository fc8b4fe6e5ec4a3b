"""One wrong weight in any artifact is found, however little it does to the outputs; a right one never is."""

from __future__ import annotations

import json
import re
import shutil
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from detector_factory import save_checkpoint, tiny_dataset, tiny_detector, tiny_yaml
from export_factory import FOLDER, exported, need, source
from kd_yolo.export import export, gate, pipeline
from kd_yolo.export.report import ExportReport
from kd_yolo.export.stock import Made, Work
from kd_yolo.export.weight_values import Stored, Values
from kd_yolo.export.weights import Wanted, check_weights, match_kernels, rounding_error, wanted_convolutions
from torch import nn

from kd_yolo.checkpoints import load_model
from kd_yolo.errors import ExportError
from kd_yolo.inference import deployed_form
from kd_yolo.nn.lightnet import build_model

PRECISIONS = {None: "fp32", 16: "fp16", 8: "int8"}
CASES = [(format, quantize) for format in ("onnx", "openvino") for quantize in PRECISIONS]


def right(format: str, quantize: int | None) -> ExportReport:
    """Return the report of an export, made once."""
    if quantize != 8:
        return exported(format, quantize)
    need(format)
    if format == "openvino":
        pytest.importorskip("nncf")
    return int8(format)


@cache
def data() -> Path:
    """Return the data set that calibrates and judges."""
    folder = Path(FOLDER.name) / "weights-set"
    tiny_dataset(folder, images=8)
    return folder / "data.yaml"


@cache
def int8(format: str) -> ExportReport:
    """Return the report of an int8 export that keeps no sensitive layer in float."""
    return export(source(), format, quantize=8, data=str(data()), max_drop=100, calibration_images=8)


def kernels_of_onnx(path: Path) -> tuple[Any, list[Any]]:
    """Return a graph and its kernels in order: of int8 files the integers."""
    import onnx

    graph = onnx.load(path)
    found = [item for item in graph.graph.initializer if len(item.dims) == 4]
    integers = [item for item in found if item.data_type == onnx.TensorProto.INT8]
    return graph, integers or found


def corrupt_onnx(path: Path, place: float) -> None:
    """Change the largest weight of a kernel by 5 %, or an integer by 20."""
    import onnx

    graph, kernels = kernels_of_onnx(path)
    kernel = kernels[int(place * (len(kernels) - 1))]
    values = onnx.numpy_helper.to_array(kernel).copy()
    values.flat[0] = changed(values)
    kernel.CopyFrom(onnx.numpy_helper.from_array(values, kernel.name))
    onnx.save(graph, path)


def corrupt_openvino(folder: Path, place: float) -> None:
    """Do the same in the weight file of a folder, where a bias is (1, O, 1, 1)."""
    graph = next(folder.glob("*.xml"))
    form = r'<data element_type="(f32|f16|i8)" shape="(?!1, \d+, 1, 1")(\d+, \d+, \d+, \d+)" offset="(\d+)"'
    found = list(re.finditer(form, graph.read_text()))
    kernels = [item for item in found if item[1] == "i8"] or found
    kind, shape, offset = kernels[int(place * (len(kernels) - 1))].groups()
    dtype = np.dtype({"f32": np.float32, "f16": np.float16, "i8": np.int8}[kind])
    weights = graph.with_suffix(".bin")
    content = bytearray(weights.read_bytes())
    count = int(np.prod([int(side) for side in shape.split(", ")]))
    values = np.frombuffer(content, dtype, count, int(offset))
    content[int(offset) : int(offset) + dtype.itemsize] = np.asarray(changed(values), dtype).tobytes()
    weights.write_bytes(content)


def changed(values: np.ndarray[Any, Any]) -> Any:
    """Return another value for the first weight."""
    first = values.flat[0]
    if values.dtype == np.int8:
        return first - 20 if first > 0 else first + 20
    return first + values.dtype.type(0.05) * np.abs(values).max()


CORRUPT = {"onnx": corrupt_onnx, "openvino": corrupt_openvino}


@pytest.mark.parametrize(("format", "quantize"), CASES)
def test_export__weights_are_in_the_report(format: str, quantize: int | None) -> None:
    report = right(format, quantize)
    found = json.loads(report.parity_path.read_text())["parity"]["weights"]
    assert found["kernels"] == len(wanted_convolutions(deployed()))
    assert found["failures"] == []
    # Rounding of random numbers comes close to its bound, and arithmetic does not.
    assert (0 <= found["largest_error"] < 0.5) if quantize is None else (0.9 < found["largest_error"] <= 1)
    assert {None: "1e-6", 16: "float16", 8: "int8 scale"}[quantize] in found["unit"]


@pytest.mark.parametrize("place", [0.0, 0.5, 1.0], ids=["first", "middle", "last"])
@pytest.mark.parametrize(("format", "quantize"), CASES)
def test_export__one_slightly_wrong_weight_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str, quantize: int | None, place: float
) -> None:
    made_before = right(format, quantize)
    entry = pipeline._own_entry
    monkeypatch.setattr(pipeline, "_own_entry", lambda *words: entry(*words) | {"created": made_before.created})

    def corrupt(work: Work) -> Made:
        made = work.folder / made_before.path.name
        (shutil.copytree if made_before.path.is_dir() else shutil.copy)(made_before.path, made)
        CORRUPT[format](made, place)
        return Made(made, made_before.facts, made, int8=made_before.int8)

    monkeypatch.setattr(pipeline, "_make", corrupt)
    out = tmp_path / made_before.path.name
    keys = {"data": str(data())} if quantize == 8 else {}
    with pytest.raises(
        ExportError, match=r"not the model: model\.\d+\.\S*: a weight differs by .*\(bound 1\)$"
    ) as caught:
        export(source(), format, quantize=quantize, out=out, **keys)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_prove__an_engine_by_the_graph_it_was_built_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_before = exported("onnx").path

    def corrupt(work: Work) -> Made:
        graph, engine = work.folder / "best.onnx", work.folder / "best.engine"
        shutil.copy(made_before, graph)
        corrupt_onnx(graph, 0.5)
        engine.write_bytes(b"engine")
        return Made(engine, {}, engine, graph=graph)

    monkeypatch.setattr(pipeline, "_make", corrupt)
    monkeypatch.setattr(pipeline, "check_description", lambda *words: None)
    monkeypatch.setattr(gate, "artifact_format", lambda path: path.suffix[1:])
    monkeypatch.setattr(gate, "open_session", lambda *words: SimpleNamespace(runtime="none", infer=None))
    with pytest.raises(ExportError, match=r"x\.onnx: not written, .*: model\.\d+\.\S*: a weight differs by"):
        export(source(), out=tmp_path / "x.onnx")
    assert not list(tmp_path.iterdir())


def deployed() -> Any:
    """Return the deployed form of the tiny detector with the head that needs NMS."""
    return deployed_form(load_model(source())[0])[0]


@pytest.mark.parametrize("format", ["onnx", "openvino"])
def test_check_weights__another_precision_or_model_is_refused(format: str) -> None:
    need(format)
    path = exported(format, 16).path
    wrong = check_weights(deployed(), path, format, "fp32")
    assert len(wrong.failures) == wrong.kernels
    assert all("stored as float16 in an fp32 artifact" in item for item in wrong.failures)
    other = deployed_form(tiny_detector(seed=1))[0]
    assert len(check_weights(other, path, format, "fp16").failures) >= wrong.kernels
    less = deployed_form(tiny_detector(both_heads=True))[0]
    head: Any = less.model[-1]
    head.cv2[0][0] = nn.Sequential(head.cv2[0][0], nn.Conv2d(head.cv2[0][0].conv.out_channels, 16, 5, padding=2))
    assert any("no convolution in the artifact" in item for item in check_weights(less, path, format, "fp16").failures)


def odd_detector() -> Any:
    """Return a detector with depthwise, grouped and transposed kernels, and BatchNorms behind and not behind a SiLU."""
    torch.manual_seed(0)
    content = tiny_yaml(None)
    content["backbone"] = [
        [-1, 1, "Conv", [16, 3, 2]],
        [-1, 1, "DWConv", [16, 3, 2]],
        [-1, 1, "Conv", [24, 3, 2, None, 4]],
        [-1, 1, "Conv", [24, 3, 1, None, 1, 1, False]],
        [-1, 1, "nn.BatchNorm2d", []],
        [-1, 1, "Conv", [32, 3, 2]],
        [-1, 1, "nn.BatchNorm2d", []],
        [-1, 1, "Conv", [48, 3, 2]],
        [-1, 1, "nn.ConvTranspose2d", [32, 2, 2, 0]],
    ]
    content["head"] = [[[4, 8, 7], 1, "Detect", ["nc"]]]
    model: Any = build_model(content)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.get_buffer("running_mean"), 0, 0.2)
            nn.init.uniform_(module.get_buffer("running_var"), 0.3, 1.5)
            nn.init.uniform_(module.weight, 0.8, 1.6)
    model.names = {0: "scratch", 1: "dent", 2: "stain"}
    return model.eval()


@pytest.mark.parametrize(("format", "quantize"), [case for case in CASES if case[1] != 8])
def test_check_weights__groups_transposed_and_batchnorms(tmp_path: Path, format: str, quantize: int | None) -> None:
    need(format)
    trained = save_checkpoint(odd_detector(), tmp_path / "odd.pt")
    found = export(trained, format, quantize=quantize).parity.weights
    assert found is not None
    assert found.failures == []
    assert found.largest_error <= 1


def test_rounding_error__bounds_of_every_type() -> None:
    """float16 keeps 11 bits: 1 + 2^-11 lies halfway to the next number, 1 + 2^-10."""
    one = np.ones((1, 1, 1, 2))
    half = Values.of(np.asarray([1 + 2.0**-10, 1.0], np.float16).reshape(one.shape))
    assert rounding_error(one + 2.0**-11, half)[0] == pytest.approx(1, abs=0.01)
    assert rounding_error(one, half)[0] == pytest.approx(2, abs=0.01)
    codes = Values.of(np.asarray([100, -3], np.int8).reshape(one.shape)).dequantized(np.zeros(()), np.asarray(0.01))
    assert rounding_error(codes.data + 0.005, codes)[0] == pytest.approx(0.998, abs=0.001)
    assert rounding_error(codes.data + 0.006, codes)[0] > 1.19
    assert rounding_error(one + 2e-6, Values.of(one.astype(np.float32)))[0] == pytest.approx(2, abs=0.1)
    assert not rounding_error(one, Values.of(np.asarray([1, np.nan]).reshape(one.shape)))[0] <= 1
    assert rounding_error(np.zeros(3), None) == (0, 0)
    assert rounding_error(np.asarray([0, 0.1, 0]), None)[0] > 1


def test_match_kernels__by_values_whatever_the_order() -> None:
    generator = np.random.default_rng(0)
    kernels = [generator.normal(size=(4, 3, 3, 3)).astype(np.float32) for _ in range(5)]
    kernels.append(kernels[0].copy())  # a twin that only its bias tells apart
    biases = [generator.normal(size=4).astype(np.float32) for _ in kernels]
    wanted = [
        Wanted(str(i), k.astype(float), b.astype(float)) for i, (k, b) in enumerate(zip(kernels, biases, strict=True))
    ]
    order = generator.permutation(6)
    wrong = [kernels[i].copy() for i in order]
    for kernel in wrong:
        kernel.flat[0] += 1
    stored = [Stored(str(i), Values.of(k), Values.of(biases[i])) for i, k in zip(order, wrong, strict=True)]
    pairs, failures = match_kernels(wanted, stored)
    assert [one.name for one, _ in pairs] == [other.name for _, other in pairs] == [str(i) for i in range(6)]
    assert failures == []
    _, failures = match_kernels(wanted[1:], stored[:5])
    assert len(failures) == abs(len(wanted[1:]) - 5)
    extra = Stored("extra", Values.of(np.zeros((1, 1, 1, 1), np.float32)), None)
    assert match_kernels(wanted, [*stored, extra])[1] == [
        "the artifact's convolution 'extra' (1, 1, 1, 1) is none of the model's"
    ]
