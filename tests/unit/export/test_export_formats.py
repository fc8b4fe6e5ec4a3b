"""Every format end to end on a tiny detector: proven, described, named, and refused with one wrong weight."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from detector_factory import save_checkpoint, tiny_dataset, tiny_detector
from export_factory import CORRUPT, exported, need, source
from kd_yolo.export import FORMATS, export, pipeline
from kd_yolo.export.report import ExportReport
from kd_yolo.export.stock import Made, Work
from ultralytics import YOLO

from kd_yolo.checkpoints import load_model
from kd_yolo.errors import ExportError
from kd_yolo.files import sha256, size_mb
from kd_yolo.images import textured_images, to_canvas
from kd_yolo.inference import raw_outputs, split_raw, use_head
from kd_yolo.runtimes import describe, open_session

NAMES = {
    ("onnx", None): "best.onnx",
    ("onnx", 16): "best_fp16.onnx",
    ("openvino", None): "best_openvino_model",
    ("openvino", 16): "best_fp16_openvino_model",
    ("torchscript", None): "best.torchscript",
    ("ncnn", None): "best_ncnn_model",
    ("ncnn", 16): "best_fp16_ncnn_model",
    ("bundle", None): "best_bundle",
}


@pytest.mark.parametrize(("format", "quantize"), NAMES)
def test_export__every_format_is_proven(format: str, quantize: int | None) -> None:
    report = exported(format, quantize)
    precision = {None: "fp32", 16: "fp16"}[quantize]
    assert report.path == source().with_name(NAMES[format, quantize])
    assert report.path.is_dir() == (format in {"openvino", "ncnn", "bundle"})
    assert report.passed is True
    assert report.parity.images >= 32
    assert report.parity.reference_detections > 100
    assert report.size_mb == size_mb(report.path)
    assert format != "onnx" or report.runtime == "onnxruntime CPUExecutionProvider"
    content = json.loads(report.parity_path.read_text())
    assert report.parity_path.name == f"{report.path.name}.parity.json"
    assert content == json.loads(json.dumps(report.to_dict()))
    assert (content["passed"], content["sha256"]) == (True, sha256(report.path))
    for text in (report.to_text(), report.to_markdown()):
        assert precision in text
        assert report.checked in text
    made = next(report.path.glob("*.onnx")) if format == "bundle" else report.path
    found = describe(made)
    assert (found.canvas, found.batch, found.dynamic) == ((64, 64), 1, False)
    assert (found.precision, found.head, found.stride) == (precision, "nms", 32)
    assert found.names == {0: "scratch", 1: "dent", 2: "stain"}
    assert found.own["source_sha256"] == sha256(source())
    assert found.own["created"] == content["created"]


@pytest.mark.parametrize("format", ["openvino", "torchscript", "ncnn"])
def test_export__raw_outputs_equal_the_unfused_model(format: str) -> None:
    run = open_session(exported(format).path)
    model, _ = load_model(source())
    use_head(model, nms=True)
    pixels = to_canvas(textured_images(1, seed=11), (64, 64))
    apart = raw_outputs(model, pixels).difference(split_raw(run.infer(pixels).transpose(1, 2), xyxy=False))
    assert apart.box < 5e-5 * 64
    assert apart.score < 2e-5


@pytest.mark.parametrize(
    ("format", "keys"),
    [
        ("openvino", {"imgsz": [64, 96], "batch": 2, "dynamic": True}),
        ("openvino", {"nms": True}),
        ("torchscript", {"imgsz": [96, 64], "batch": 2, "nms_free": True}),
        ("torchscript", {"dynamic": True, "batch": 2, "nms": True}),
        ("ncnn", {"imgsz": [64, 96]}),
    ],
    ids=str,
)
def test_export__shapes_and_heads(tmp_path: Path, format: str, keys: dict[str, Any]) -> None:
    need(format)
    suffix = {"openvino": "_openvino_model", "ncnn": "_ncnn_model"}.get(format, f".{format}")
    report = export(source(), format, out=tmp_path / f"line{suffix}", **keys)
    found = describe(report.path)
    canvas = tuple(keys.get("imgsz", (64, 64)))
    assert (found.canvas, found.batch, found.dynamic) == (canvas, keys.get("batch", 1), "dynamic" in keys)
    assert found.head == ("nms inside" if "nms" in keys else "nms-free" if "nms_free" in keys else "nms")
    assert report.passed


def test_export__passed_through_and_not_proven(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, heard: Any) -> None:
    asked: dict[str, Any] = {}

    def stock(self: YOLO, **keys: Any) -> str:
        asked.update(keys)
        assert not any("kd_yolo" in type(module).__module__ for module in self.model.modules())  # deployed first
        made = Path(str(self.ckpt_path)).with_suffix(".mnn")
        made.write_bytes(b"made")
        return str(made)

    monkeypatch.setattr(YOLO, "export", stock)
    report = export(source(), "mnn", out=tmp_path / "line.mnn", quantize=16, imgsz=[64, 96])
    assert (asked["format"], asked["quantize"], asked["imgsz"], asked["simplify"]) == ("mnn", 16, [64, 96], True)
    assert report.path.read_bytes() == b"made"
    assert (report.passed, report.parity, report.runtime) == (None, None, None)
    assert "not checked: no runtime here for mnn" in report.to_text()
    assert "line.mnn: not checked: no runtime here for mnn" in heard.text
    content = json.loads((tmp_path / "line.mnn.parity.json").read_text())
    assert content["passed"] is None
    assert content["parity"] == {"passed": None, "reason": "not checked: no runtime here for mnn"}


def test_export__engine_for_a_gpu_that_is_not_here(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    report = export(source(), "engine", target="rtx3070ti", quantize=16, out=tmp_path / "line.engine")
    assert report.target == "rtx3070ti"
    assert report.runtime == "onnxruntime CPUExecutionProvider"
    assert report.checked == (
        "the ONNX graph it was built from; the engine itself runs only on a GPU of compute capability 8.6"
    )
    found = describe(report.path)
    assert (found.format, found.precision, found.canvas) == ("rtx", "fp16", (64, 64))
    assert found.own["compute_capability"] == "8.6"
    assert found.own["source_sha256"] == sha256(source())
    assert "tensorrt-rtx" in report.to_text()


@pytest.mark.parametrize("format", ["onnx", "openvino"])
def test_export__int8_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str) -> None:
    need(format)
    if format == "openvino":
        pytest.importorskip("nncf")
    data = tiny_dataset(tmp_path / "set", images=8)
    trained = save_checkpoint(tiny_detector(), tmp_path / "best.pt")
    report = export(trained, format, quantize=8, data=str(data), max_drop=100, calibration_images=8)
    assert report.path.name == {"onnx": "best_int8.onnx", "openvino": "best_int8_openvino_model"}[format]
    assert (report.passed, report.precision, report.parity.precision) == (True, "int8", "int8")
    assert describe(report.path).precision == "int8"
    assert report.int8.calibration["images"] == 8
    content = json.loads(report.parity_path.read_text())
    assert content["int8"]["layers_int8"] > 0
    assert content["int8"]["judge_calls"] == len(content["int8"]["trials"]) > 0
    entry = pipeline._own_entry
    monkeypatch.setattr(pipeline, "_own_entry", lambda *words: entry(*words) | {"created": report.created})

    def corrupt(work: Work) -> Made:
        made = work.folder / report.path.name
        (shutil.copytree if report.path.is_dir() else shutil.copy)(report.path, made)
        CORRUPT[format](made, 0.0)
        return Made(made, report.facts, made, int8=report.int8)

    monkeypatch.setattr(pipeline, "_make", corrupt)
    out = tmp_path / f"wrong{report.path.name}"
    with pytest.raises(ExportError, match=r"not written, the graph is not the model: .*\(bound \d"):
        export(trained, format, quantize=8, data=str(data), out=out)
    assert not list(tmp_path.glob("*wrong*"))


def test_formats__listed() -> None:
    assert FORMATS == ("onnx", "openvino", "engine", "torchscript", "ncnn", "bundle")
    assert set(pipeline.MAKERS) == set(FORMATS)


def test_report__fields_are_documented() -> None:
    text = str(ExportReport.__doc__)
    assert [item.name for item in dataclasses.fields(ExportReport) if f" {item.name}: " not in text] == []
