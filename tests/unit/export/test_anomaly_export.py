from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from anomaly_export_factory import anomaly_model, exported, labelled_folder, save_model, source, textures
from kd_yolo.export import anomaly as exporting
from kd_yolo.export import export
from kd_yolo.export.anomaly import export_anomaly
from kd_yolo.export.anomaly_gate import TOLERANCE, gate_images, trials_of
from kd_yolo.export.anomaly_graph import AnomalyWork, make_anomaly_onnx
from kd_yolo.export.stock import Made

from kd_yolo.anomaly.checkpoint import load_anomaly
from kd_yolo.errors import CheckpointError, ConfigError, DataError, ExportError
from kd_yolo.runtimes import describe
from kd_yolo.runtimes.anomaly_session import open_anomaly, thresholds_of
from kd_yolo.runtimes.reading import onnx_metadata

FORMATS = ("onnx", "openvino")
SHAPES = [((64, 64), 1), ((64, 64), 4), ((96, 160), 1), ((32, 128), 3)]
SHAPE_OPERATORS = {"Shape", "Gather", "ConstantOfShape", "Pad", "Expand", "Unsqueeze", "Cast", "Range"}


def need(format: str) -> None:
    if format == "openvino":
        pytest.importorskip("openvino")


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_export_anomaly__maps_and_scores_are_the_models(format: str, dynamic: bool) -> None:
    need(format)
    report = exported(format, dynamic)
    model, _ = load_anomaly(source())
    for canvas, count in SHAPES if dynamic else SHAPES[:1]:
        pixels = textures(count, canvas, seed=77)
        session = open_anomaly(report.path, canvas, count)
        with torch.no_grad():
            expected = model(pixels)
        found = session.maps(pixels)
        assert found.shape == (count, 1, *canvas)
        assert float(expected.std()) > 1e-3  # a flat map would prove nothing
        np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=TOLERANCE)
        np.testing.assert_allclose(session.scores(found), model.image_scores(expected), rtol=0, atol=TOLERANCE)
    assert report.passed
    assert report.parity.map_error <= TOLERANCE
    assert len(report.parity.trials) == (4 if dynamic else 1)


@pytest.mark.parametrize("format", FORMATS)
def test_export_anomaly__a_fixed_batch_is_fed_in_portions(format: str) -> None:
    need(format)
    pixels = textures(6, seed=3)
    report = exported(format, batch=4)
    np.testing.assert_allclose(
        open_anomaly(report.path).maps(pixels), open_anomaly(source()).maps(pixels), rtol=0, atol=TOLERANCE
    )


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_export_anomaly__thresholds_come_back_bit_for_bit(format: str, dynamic: bool) -> None:
    need(format)
    model, _ = load_anomaly(source())
    wanted = thresholds_of(model, source())
    found = open_anomaly(exported(format, dynamic).path).thresholds
    assert found.to_dict() == wanted.to_dict()
    assert found.threshold_image == wanted.threshold_image
    assert found.normalised(found.threshold_image) == 0.5


def test_export_anomaly__the_file_describes_itself() -> None:
    report = exported("onnx")
    metadata = onnx_metadata(report.path)
    assert metadata["task"] == "anomaly"
    assert metadata["names"] == "{0: 'normal', 1: 'anomaly'}"
    assert (metadata["stride"], metadata["imgsz"], metadata["batch"]) == ("32", "[64, 64]", "1")
    own = json.loads(metadata["kd_yolo"])
    assert own["source_sha256"] == report.source_sha256
    keys = {"threshold_image", "threshold_pixel", "score_min", "score_max", "fuse", "score", "top_fraction", "taps"}
    assert own["anomaly"].keys() == keys | {"teacher"}
    told = describe(report.path, task="anomaly")
    assert (told.task, told.head, told.canvas, told.dynamic) == ("anomaly", "map", (64, 64), False)
    assert describe(exported("onnx", dynamic=True).path, task=None).dynamic


def test_export_anomaly__one_input_one_output_and_no_shape_arithmetic() -> None:
    graph = onnx.load(exported("onnx").path).graph
    assert [item.name for item in graph.input] == ["images"]
    assert [item.name for item in graph.output] == ["output0"]
    assert [axis.dim_value for axis in graph.output[0].type.tensor_type.shape.dim] == [1, 1, 64, 64]
    assert not SHAPE_OPERATORS & {node.op_type for node in graph.node}


def test_export_anomaly__the_proof_lies_beside_it() -> None:
    report = exported("onnx")
    assert json.loads(report.parity_path.read_text()) == json.loads(json.dumps(report.to_dict(), default=str))
    assert json.loads(report.parity_path.read_text())["passed"] is True
    text = report.to_text()
    assert "thresholds equal" in text
    assert f"{report.thresholds['threshold_image']:.6g}" in text


@pytest.mark.parametrize(
    "overrides",
    [
        {"plus": True},
        {"cross": 0.0, "same": 1.0, "cbam": "none"},
        {"same": 1.0, "maps": "both", "cbam": "block"},
        {"fuse": "product", "score": "topk", "projector": "teacher-frozen"},
    ],
    ids=["plus", "same-layer", "both", "product"],
)
def test_export_anomaly__every_structure(overrides: dict[str, Any], tmp_path: Path) -> None:
    path = save_model(tmp_path / "one.pt", anomaly_model(**overrides))
    report = export_anomaly(path, dynamic=True)
    assert report.parity.map_error < 1e-5
    assert report.thresholds["score"] == overrides.get("score", "max")


def corrupted(change: Callable[[Any], None]) -> Callable[[AnomalyWork], Made]:
    def maker(work: AnomalyWork) -> Made:
        made = make_anomaly_onnx(work)
        graph = onnx.load(made.path)
        change(graph)
        onnx.save(graph, made.path)
        return made

    return maker


def nudge_weight(graph: Any) -> None:
    kernel = max((item for item in graph.graph.initializer if len(item.dims) == 4), key=lambda item: len(item.raw_data))
    values = onnx.numpy_helper.to_array(kernel).copy()
    values += np.float32(0.01) * np.abs(values).max()
    kernel.CopyFrom(onnx.numpy_helper.from_array(values, kernel.name))


def nudge_threshold(graph: Any) -> None:
    for entry in graph.metadata_props:
        if entry.key == "kd_yolo":
            own = json.loads(entry.value)
            own["anomaly"]["threshold_image"] = float(np.nextafter(np.float32(own["anomaly"]["threshold_image"]), 9))
            entry.value = json.dumps(own)


def not_a_number(graph: Any) -> None:
    name = graph.graph.output[0].name
    for node in graph.graph.node:
        node.output[:] = ["before" if output == name else output for output in node.output]
    graph.graph.node.append(onnx.helper.make_node("Sub", ["before", "before"], ["zero"]))
    graph.graph.node.append(onnx.helper.make_node("Div", ["zero", "zero"], [name]))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (nudge_weight, "maps differ by"),
        (nudge_threshold, "the thresholds read back"),
        (not_a_number, "maps differ by nan"),
    ],
)
def test_export_anomaly__another_model_is_not_written(
    change: Callable[[Any], None], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(exporting.MAKERS, "onnx", corrupted(change))
    out = tmp_path / "hkt.onnx"
    out.write_bytes(b"before")
    with pytest.raises(ExportError, match=f"hkt.onnx: not written, the graph is not the model: {reason}"):
        export(source(), out=out)
    assert [file.name for file in tmp_path.iterdir()] == ["hkt.onnx"]
    assert out.read_bytes() == b"before"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"quantize": 8}, "quantize=8: anomaly models are exported in float32"),
        ({"half": True}, "quantize=16: anomaly models are exported in float32"),
        ({"int8": True}, "quantize=8"),
        ({"nms": True}, "nms=: means nothing to an anomaly model"),
        ({"nms_free": False}, "nms_free=: means nothing"),
        ({"max_drop": 1.0}, "max_drop=: means nothing"),
        ({"calibration_images": 32}, "calibration_images=: means nothing"),
        ({"split": "test"}, "split=: means nothing"),
        ({"simplfy": True}, "unknown key 'simplfy'; did you mean 'simplify'"),
        ({"format": "ncnn"}, "an anomaly model is exported to onnx, openvino, engine, bundle"),
        ({"format": "onx"}, "did you mean 'onnx'"),
        ({"opset": 3}, "opset=3"),
        ({"imgsz": 70}, "multiple of the stride 32"),
        ({"batch": 0}, "batch=0"),
        ({"out": "there.engine"}, "ends in .onnx"),
        ({"category": "screw"}, "category=: says which part of data="),
        ({"target": "rtx3070ti"}, "target=: means nothing to format=onnx"),
    ],
)
def test_export__refuses_what_means_nothing_to_a_map(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        export(source(), **given)
    assert "\n" not in str(caught.value)


def test_export__defaults_of_a_detector_are_no_keys(tmp_path: Path) -> None:
    report = export(source(), out=tmp_path / "a.onnx", nms=False, max_drop=0.5, split="val", quantize=32)
    assert report.passed


def test_export_anomaly__uncalibrated(tmp_path: Path) -> None:
    model = anomaly_model()
    model.calibration = None
    path = save_model(tmp_path / "early.pt", model)
    with pytest.raises(CheckpointError, match=r"early\.pt: is not calibrated"):
        export(path)
    assert [file.name for file in tmp_path.iterdir()] == ["early.pt"]


def test_export_anomaly__a_detector(tiny_checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match="is no anomaly checkpoint"):
        export_anomaly(tiny_checkpoint)


def test_export_anomaly__looks_at_the_test_images_of_the_data(tmp_path: Path) -> None:
    root = labelled_folder(tmp_path / "widget")
    report = export(source(), out=tmp_path / "hkt.onnx", data=str(root))
    assert (report.parity.images, report.parity.real_images) == (16, 6)  # 3 normal and 3 anomalous, the rest is made
    assert "widget" in report.parity.image_source
    with pytest.raises(DataError, match="category=screw"):
        export(source(), data=str(root), category="screw")


def test_gate_images__takes_the_category_that_was_trained(tmp_path: Path) -> None:
    for name in ("nut", "screw"):
        labelled_folder(tmp_path / name)
    found = gate_images(str(tmp_path), None, "screw")
    assert len(found.files) == 6
    assert {file.relative_to(tmp_path).parts[0] for file in found.files} == {"screw"}
    assert gate_images(str(tmp_path), "nut", "screw").source.startswith("6 of ")
    with pytest.raises(DataError, match="give category=NAME"):
        gate_images(str(tmp_path), None, "bolt")


def test_trials_of__a_dynamic_graph_is_run_on_two_canvases_and_batches() -> None:
    assert trials_of((256, 256), 1, False, 32) == [((256, 256), 1)]
    assert trials_of((256, 256), 1, True, 32) == [((256, 256), 1), ((256, 256), 4), ((192, 320), 1), ((192, 320), 4)]
    assert trials_of((32, 32), 2, True, 32)[2:] == [((32, 64), 1), ((32, 64), 4)]


@pytest.mark.parametrize("keys", [{}, {"dynamic": True}])
def test_export_anomaly__engine_without_a_gpu(keys: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    report = export(source(), "engine", out=tmp_path / "hkt.engine", target="rtx3070ti", **keys)
    told = describe(report.path, task="anomaly")
    assert told.own["anomaly"] == report.thresholds
    assert told.own["compute_capability"] == "8.6"
    assert "the ONNX graph it was built from" in report.checked
    assert report.parity.passed
