"""int8 OpenVINO models: what is quantized, what stays in float, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import yaml
from detector_factory import save_checkpoint, tiny_detector
from kd_yolo.export import export
from kd_yolo.export.calibration import calibration_pixels
from kd_yolo.export.int8 import HEAD_REASON, SENSITIVE_REASON

from kd_yolo.errors import ExportError
from kd_yolo.images import textured_images

openvino = pytest.importorskip("openvino")
pytest.importorskip("nncf")

from kd_yolo.export.int8_openvino import OpenVinoQuantizer, quantize_openvino  # noqa: E402

CANVAS = (64, 64)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("float")
    made = export(save_checkpoint(tiny_detector(), folder / "best.pt"), format="onnx", imgsz=64).path
    out = folder / "best_openvino_model"
    out.mkdir()
    openvino.save_model(openvino.convert_model(made), out / "best.xml", compress_to_fp16=False)
    own = {"version": "0.1.0", "precision": "fp32"}
    (out / "metadata.yaml").write_text(yaml.safe_dump({"stride": 32, "imgsz": [64, 64], "kd_yolo": json.dumps(own)}))
    return out


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("images")
    files = [folder / f"{index}.png" for index in range(9)]
    for file, image in zip(files, textured_images(9, CANVAS, seed=5), strict=True):
        cv2.imwrite(str(file), image)
    return files


def quantize(source: Path, out: Path, images: list[Path], judge: Callable[[Path], float] = lambda path: 0.5) -> Any:
    return quantize_openvino(source, out, images, judge, 0.5, 0.5, CANVAS)


def outputs(folder: Path, images: list[Path]) -> np.ndarray[Any, Any]:
    model = openvino.Core().compile_model(next(folder.glob("*.xml")), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return np.concatenate([model({0: batch})[0] for batch in calibration_pixels(images, CANVAS)])


def int8_layers(folder: Path) -> list[str]:
    """Return the convolutions whose weights are stored as int8."""
    ops = openvino.Core().read_model(next(folder.glob("*.xml"))).get_ordered_ops()
    found = []
    for op in (op for op in ops if op.get_type_name() == "Convolution"):
        weight = op.input_value(1).get_node()
        while weight.get_type_name() != "Constant":
            weight = weight.input_value(0).get_node()
        if weight.get_element_type() == openvino.Type.i8:
            found.append(op.get_friendly_name())
    return found


def test_quantize_openvino__is_near_the_float_model(source: Path, images: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "best_int8_openvino_model"
    report = quantize(source, out, images)
    apart = np.abs(outputs(source, images) - outputs(out, images))
    assert apart[:, 4:].mean() < 0.02
    assert apart[:, :4].mean() < 0.5  # pixels
    assert apart.max() > 1e-4  # it is not the float model
    assert len(int8_layers(out)) == report.layers_int8 == report.layers_total - 6
    assert list(report.layers_float.values()) == [HEAD_REASON] * 6
    assert not set(int8_layers(out)) & set(report.layers_float)
    assert sorted(file.name for file in out.iterdir()) == ["best.bin", "best.xml", "metadata.yaml"]
    before, after = (yaml.safe_load((folder / "metadata.yaml").read_text()) for folder in (source, out))
    assert json.loads(after.pop("kd_yolo")) == {"version": "0.1.0", "precision": "int8"}
    before.pop("kd_yolo")
    assert after == before


def test_quantize_openvino__no_quantizer_stands_in_the_decoding(
    source: Path, images: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "x_openvino_model"
    quantize(source, out, images)
    waiting = [openvino.Core().read_model(next(out.glob("*.xml"))).output(0).get_node()]
    seen: set[str] = set()
    kinds = []
    while waiting:
        op = waiting.pop()
        if op.get_friendly_name() in seen:
            continue
        seen.add(op.get_friendly_name())
        kinds.append(op.get_type_name())
        if op.get_type_name() != "Convolution":
            waiting += [value.get_node() for value in op.input_values()]
    assert kinds.count("Convolution") == 6
    assert "FakeQuantize" not in kinds


def test_quantize_openvino__worst_layers_go_back_to_float(source: Path, images: list[Path], tmp_path: Path) -> None:
    total = len(OpenVinoQuantizer(source, images, CANVAS, 3).candidates)

    def judge(path: Path) -> float:
        return 0.5 if len(int8_layers(path)) <= total - 2 else 0.4

    out = tmp_path / "graph" / "best.xml"
    report = quantize(source / "best.xml", out, images, judge)
    worst = [item.layer for item in report.sensitivity[:2]]
    assert [name for name, why in report.layers_float.items() if why == SENSITIVE_REASON] == worst
    assert not set(int8_layers(out.parent)) & set(worst)
    assert [trial.float_layers for trial in report.trials] == [0, 1, 2]
    assert sorted(file.name for file in out.parent.iterdir()) == ["best.bin", "best.xml"]


def test_quantize_openvino__a_bound_that_cannot_be_held_leaves_nothing(
    source: Path, images: list[Path], tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=r"int8 loses 40\.00 points"):
        quantize(source, tmp_path / "x_openvino_model", images, lambda path: 0.1)
    assert list(tmp_path.iterdir()) == []


def test_quantize_openvino__folder_without_a_model(images: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"is not an OpenVINO model \(one \.xml file is expected there\)"):
        quantize(tmp_path, tmp_path / "x_openvino_model", images)


def test_quantize_openvino__damaged_model(images: list[Path], tmp_path: Path) -> None:
    (tmp_path / "bad.xml").write_text("<net>")
    with pytest.raises(ExportError, match=r"bad\.xml: OpenVINO cannot read it") as caught:
        quantize(tmp_path / "bad.xml", tmp_path / "x_openvino_model", images)
    assert "\n" not in str(caught.value)
