from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from detector_factory import tiny_detector
from kd_yolo.export.matching import GraphOutput
from kd_yolo.export.parity import TOLERANCES, ParityReport, Trial, check_parity
from torch import Tensor
from ultralytics.nn.tasks import DetectionModel

from kd_yolo.images import ImageSet, image_set
from kd_yolo.inference import deployed_form, use_head

PLAN = [((64, 64), 4)]
RAW = GraphOutput("raw", nms=True)
FREE = GraphOutput("rows", nms=False)


@pytest.fixture(scope="module")
def images() -> ImageSet:
    return image_set(None, 32)


@pytest.fixture
def model() -> DetectionModel:
    return tiny_detector()


def session_of(model: DetectionModel, change: Callable[[Tensor], Tensor] = lambda output: output) -> Any:
    """Return what stands for an exported graph: the merged model itself, its output changed."""

    def run(pixels: Tensor) -> Tensor:
        with torch.no_grad():
            return change(model(pixels)[0].clone())

    return run


def gate(model: DetectionModel, images: ImageSet, output: GraphOutput = RAW, **keys: Any) -> ParityReport:
    use_head(model, output.nms)
    deployed, _ = deployed_form(model, output.nms)
    change = keys.pop("change", lambda output: output)
    run = session_of(deployed, change)
    trials = [Trial(run, canvas, batch) for canvas, batch in keys.pop("plan", PLAN)]
    return check_parity(model, trials, output, images, **keys)


@pytest.mark.parametrize("output", [RAW, FREE], ids=["raw", "nms-free"])
def test_gate__merged_model_passes(model: DetectionModel, images: ImageSet, output: GraphOutput) -> None:
    report = gate(model, images, output)
    assert report.passed, report.failures
    assert report.failures == []
    assert report.images == 32
    assert report.reference_detections > 32
    assert report.matched == report.reference_detections == report.artifact_detections
    assert report.lowest_iou > 0.99
    assert json.loads(json.dumps(report.to_dict()))["tolerance"]["box"] == TOLERANCES["fp32"].box
    assert "32 synthetic" in report.describe()


def test_gate__several_canvases_and_a_last_batch_that_is_short(model: DetectionModel, images: ImageSet) -> None:
    report = gate(model, images, plan=[((64, 64), 5), ((64, 96), 3)])
    assert report.passed, report.failures
    assert report.canvases == [(64, 64), (64, 96)]


def add(where: tuple[Any, ...], amount: float) -> Callable[[Tensor], Tensor]:
    def change(output: Tensor) -> Tensor:
        output[where] += amount
        return output

    return change


ALL = slice(None)
CHANGES: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "one box": (add((0, 0, 5), 0.1), "raw boxes differ by 0.1"),
    "all boxes a little": (add((ALL, slice(0, 4), ALL), 0.002), "on average"),
    "one score": (add((0, 5, 7), 0.01), "scores differ by 0.01"),
    "nan box": (add((0, 0, 0), math.nan), "raw boxes differ by nan"),
    "nan score": (add((0, 4, 0), math.nan), "scores differ by nan"),
    "boxes moved": (add((ALL, 0, ALL), 3.0), "have no partner at IoU"),
    "classes swapped": (lambda output: torch.cat((output[:, :4], output[:, 4:].flip(1)), 1), "have no partner at IoU"),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_gate__wrong_raw_outputs_fail(model: DetectionModel, images: ImageSet, kind: str) -> None:
    change, message = CHANGES[kind]
    report = gate(model, images, change=change)
    assert not report.passed
    assert any(message in failure for failure in report.failures), report.failures


ROW_CHANGES: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "one box": (add((0, 2, 0), 0.5), "raw boxes differ"),
    "one score": (add((0, 2, 4), 0.01), "scores differ"),
    "class": (add((ALL, ALL, 5), -1.0), "scores differ"),
    "dropped": (lambda output: torch.cat((output[:, 4:], output[:, :4] * 0), 1), "scores differ"),
}


@pytest.mark.parametrize("kind", ROW_CHANGES)
def test_gate__wrong_rows_fail(model: DetectionModel, images: ImageSet, kind: str) -> None:
    change, message = ROW_CHANGES[kind]
    report = gate(model, images, FREE, change=change)
    assert not report.passed
    assert any(message in failure for failure in report.failures), report.failures


def test_gate__half_precision_has_its_own_row(model: DetectionModel, images: ImageSet) -> None:
    def rounded(output: Tensor) -> Tensor:
        return output.half().float()

    assert not gate(model, images, change=rounded).passed
    assert gate(model, images, change=rounded, precision="fp16").passed
    assert not gate(model, images, change=add((ALL, 0, ALL), 3.0), precision="fp16").passed


def test_gate__nothing_detected_proves_nothing(model: DetectionModel, images: ImageSet) -> None:
    inside = GraphOutput("rows", nms=True, confidence=0.9999)
    report = gate(model, images, inside, change=lambda output: output.new_zeros(len(output), 300, 6))
    assert not report.passed
    assert any("nothing could be compared" in failure for failure in report.failures)


def test_gate__unsure_model_is_compared_at_a_lower_threshold(model: DetectionModel, images: ImageSet) -> None:
    head: Any = model.model[-1]
    for level in head.cv3:
        level[-1].bias.data -= 8.0
    report = gate(model, images)
    assert report.passed
    assert report.confidence < 0.05
    assert report.reference_detections > 32
