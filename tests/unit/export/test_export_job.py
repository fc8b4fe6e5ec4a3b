"""What is refused before a model is loaded, and what the artifacts are called."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from kd_yolo.export import export
from kd_yolo.export.formats import ALIASES, CHECKED, Format, find_format, passthrough_formats
from kd_yolo.export.job import make_job, require_packages

from kd_yolo.errors import BackendMissingError, ConfigError


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"format": "onx"}, r"format=onx: unknown; did you mean 'onnx'\? \(proven: onnx, .*; passed through .*mnn"),
        ({"format": "pt"}, "format=pt: .*use kd-yolo deploy"),
        ({"format": "ncnn", "nms": True}, "nms=: means nothing to format=ncnn; leave it out"),
        ({"format": "ncnn", "dynamic": True}, "dynamic=: means nothing to format=ncnn"),
        ({"format": "ncnn", "nms_free": True}, "nms_free=: means nothing to format=ncnn"),
        ({"format": "ncnn", "batch": 2}, "batch=2: ncnn takes one image per call"),
        ({"format": "ncnn", "quantize": 8}, "quantize=8: ncnn has fp32, fp16 here, not int8"),
        ({"format": "torchscript", "quantize": 16}, "quantize=16: torchscript has fp32 here, not fp16"),
        ({"format": "torchscript", "half": True}, "quantize=16: torchscript has fp32 here"),
        ({"format": "torchscript", "opset": 17}, "opset=: means nothing to format=torchscript"),
        ({"format": "openvino", "simplify": False}, "simplify=: means nothing to format=openvino"),
        ({"format": "openvino", "target": "rtx3070ti"}, "target=: means nothing to format=openvino"),
        ({"format": "mnn", "target": "rtx3070ti"}, "target=: means nothing to format=mnn"),
        ({"format": "imx", "batch": 2, "data": "x.yaml"}, "batch=2: imx takes one image per call"),
        ({"quantize": 4}, "quantize=4: must be 16"),
        ({"quantize": True}, "quantize=True: must be 16"),
        ({"quantize": 8}, "quantize=8 needs data=: the training images calibrate it"),
        ({"int8": True}, "quantize=8 needs data="),
        ({"int8": True, "quantize": 16}, "int8=true is quantize=8, but quantize=16 was given"),
        ({"max_drop": 1.0}, "max_drop=: means something to quantize=8 only"),
        ({"calibration_images": 64}, "calibration_images=: means something to quantize=8 only"),
        ({"quantize": 8, "data": "x.yaml", "max_drop": -1}, "max_drop=-1: must be points"),
        ({"quantize": 8, "data": "x.yaml", "max_drop": float("nan")}, "max_drop=nan"),
        ({"quantize": 8, "data": "x.yaml", "calibration_images": 0}, "calibration_images=0"),
        ({"format": "engine", "target": "rtx3071ti"}, "rtx3071ti.*did you mean 'rtx3070ti'"),
        ({"format": "engine", "target": "epyc-avx512"}, "target=epyc-avx512: .* is no GPU"),
        (
            {"format": "engine", "target": "rtx3070ti", "nms": True},
            "nms=true: TensorRT for RTX, .* takes no NMS inside of the graph; leave nms= out, or use nms_free=true",
        ),
        ({"format": "openvino", "out": "line.xml"}, r"out=line\.xml: an openvino folder ends in _openvino_model"),
        ({"format": "torchscript", "out": "line.pt"}, r"a torchscript file ends in \.torchscript"),
        ({"nms": True, "nms_free": True}, "choose one"),
        ({"qantize": 8}, "unknown key 'qantize'; did you mean 'quantize'"),
    ],
    ids=str,
)
def test_export__keys_that_a_format_cannot_honour(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        export(tmp_path / "best.pt", **keys)  # not even there: refused before anything is loaded
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_export__engine_without_gpu_names_both_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("engine", "trt", "tensorrt"):
        with pytest.raises(
            ConfigError, match=r"run it on the machine that has the GPU, or .*target=rtx3070ti"
        ) as caught:
            export(tmp_path / "best.pt", name)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("target", "capability"), [("orin-nano", "8.7"), ("h200", "9.0")])
def test_make_job__a_gpu_that_nothing_here_builds_for(tmp_path: Path, target: str, capability: str) -> None:
    """Refused although there is no checkpoint: before anything is loaded."""
    pytest.importorskip("tensorrt_rtx")
    with pytest.raises(ConfigError, match=rf"target={target}: .* has compute capability {capability}, and") as caught:
        export(tmp_path / "absent.pt", "engine", target=target)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "name"),
    [
        ({}, "best.onnx"),
        ({"quantize": 16}, "best_fp16.onnx"),
        ({"quantize": 32}, "best.onnx"),
        ({"quantize": 8, "data": "x.yaml"}, "best_int8.onnx"),
        ({"format": "OpenVINO"}, "best_openvino_model"),
        ({"format": "ov", "quantize": 16}, "best_fp16_openvino_model"),
        ({"format": "torchscript"}, "best.torchscript"),
        ({"format": "ncnn", "quantize": 16}, "best_fp16_ncnn_model"),
        ({"format": "engine", "target": "rtx3070ti"}, "best_rtx3070ti.engine"),
        ({"format": "trt", "target": "rtx3070ti", "quantize": 16}, "best_rtx3070ti_fp16.engine"),
        ({"format": "bundle", "quantize": 16}, "best_fp16_bundle"),
        ({"format": "tflite"}, "best.tflite"),
        ({"format": "edgetpu", "data": "x.yaml"}, "best_int8_edgetpu.tflite"),
    ],
    ids=str,
)
def test_make_job__default_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: dict[str, Any], name: str
) -> None:
    if "target" in keys:
        pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr(importlib.util, "find_spec", lambda *words: object())
    job = make_job(tmp_path / "best.pt", **keys)
    assert job.out == tmp_path / name
    assert job.parity_path == tmp_path / f"{name}.parity.json"


def test_make_job__folders_of_other_things_are_never_replaced(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    mine = tmp_path / "photos"
    mine.mkdir()
    (mine / "cat.png").write_bytes(b"cat")
    with pytest.raises(ConfigError, match="photos: is a folder with other things in it"):
        make_job("best.pt", "bundle", out=mine)
    named = mine.rename(tmp_path / "x_openvino_model")
    with pytest.raises(ConfigError, match="x_openvino_model: is a folder with other things in it"):
        make_job("best.pt", "openvino", out=named)
    (named / "cat.png").rename(named / "best.xml")
    assert make_job("best.pt", "openvino", out=named).out == named
    file = tmp_path / "y_openvino_model"
    file.write_bytes(b"")
    with pytest.raises(ConfigError, match="y_openvino_model: is a file, but a folder"):
        make_job("best.pt", "openvino", out=file)
    (tmp_path / "z.onnx").mkdir()
    with pytest.raises(ConfigError, match=r"z\.onnx: is a folder, but a file"):
        make_job("best.pt", out=tmp_path / "z.onnx")


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("nms", [True, False])
@pytest.mark.parametrize("batch", [1, 4])
def test_parity_plan__a_dynamic_graph_is_run_on_two_canvases(dynamic: bool, nms: bool, batch: int) -> None:
    job = make_job("best.pt", "torchscript", dynamic=dynamic, nms=nms, batch=batch)
    plan = job.parity_plan((64, 96), 32)
    assert plan[0] == ((64, 96), batch)
    assert len(plan) == (2 if dynamic else 1)
    if dynamic:
        canvas, other = plan[1]
        assert canvas == (64, 128)
        assert other <= batch if nms else other > batch  # an NMS inside is unrolled: ``batch`` is its largest


@pytest.mark.parametrize("name", CHECKED)
def test_require_packages__a_missing_one_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda *words: None)
    item = CHECKED[name]
    if item.packages:
        with pytest.raises(BackendMissingError, match=rf"needs {item.packages[0]}.*'kd-yolo\[{item.extra}\]'"):
            require_packages(item)
    else:
        require_packages(item)


def test_find_format__knows_every_name_and_alias_of_ultralytics() -> None:
    from ultralytics.engine.exporter import export_formats

    names = set(export_formats()["Argument"]) - {"-"}
    assert names <= set(CHECKED) | set(passthrough_formats())
    for name in [*names, *ALIASES]:
        found: Format = find_format(name)
        assert found.checked == (found.name in CHECKED)
    assert find_format("qnn").precisions == ("w8a16",)
    assert "fp32" not in find_format("edgetpu").precisions
