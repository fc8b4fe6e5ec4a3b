"""Exported classifiers: equal to the training form in every format, refused with one wrong weight."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from class_factory import save_classifier, tiny_classifier
from kd_yolo.export import classifier as module
from kd_yolo.export import export
from ultralytics import YOLO
from ultralytics.nn.tasks import ClassificationModel

from kd_yolo.classify.deploy import merge_classifier
from kd_yolo.errors import ConfigError, ExportError
from kd_yolo.nn.merging import MergeReport


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save_classifier(tiny_classifier(seed=3), tmp_path / "best.pt")


@pytest.mark.parametrize("format", ["onnx", "openvino", "torchscript"])
def test_export_classifier__every_format_is_proven(source: Path, format: str) -> None:
    if format == "openvino":
        pytest.importorskip("openvino")
    report = export(source, format, batch=3)
    assert report.passed
    assert report.probability_error <= module.TOLERANCE
    assert report.path.exists()
    content = json.loads(report.parity_path.read_text())
    assert (content["task"], content["canvas"], content["batch"]) == ("classify", [64, 64], 3)
    assert "in probability (8 images)" in report.to_text()
    if format == "onnx":  # Ultralytics itself takes the file
        assert YOLO(report.path, task="classify").predict(torch.rand(3, 3, 64, 64), verbose=False)


def test_export_classifier__one_wrong_weight_is_refused(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(model: ClassificationModel) -> tuple[ClassificationModel, MergeReport]:
        merged, report = merge_classifier(model)
        with torch.no_grad():
            merged.model[-1].linear.bias[0] += 0.01
        return merged, report

    monkeypatch.setattr(module, "merge_classifier", wrong)
    with pytest.raises(ExportError, match=r"best\.onnx: not written, its probabilities differ"):
        export(source)
    assert sorted(path.name for path in source.parent.iterdir()) == ["best.pt"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"format": "ncnn"}, "a classifier is exported to onnx, openvino, torchscript"),
        ({"quantize": 16}, "quantize=16: classifiers are exported in float32"),
        ({"nms": True}, "nms=: means nothing"),
        ({"data": "neu"}, "data=: means nothing"),
        ({"opsett": 17}, "unknown key 'opsett'"),
        ({"imgsz": 50}, "50"),
    ],
)
def test_export_classifier__refuses(source: Path, given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        export(source, **given)
    assert sorted(path.name for path in source.parent.iterdir()) == ["best.pt"]
