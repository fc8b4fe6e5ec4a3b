"""``score-l2`` against the loss that Ultralytics ships, on the same two real detectors."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from ultralytics.nn.distill_model import DistillationModel
from ultralytics.nn.tasks import DetectionModel

from kd_yolo.distill.base import build_method
from kd_yolo.distill.methods.score_l2 import ScoreL2
from kd_yolo.distill.taps import common_strides, describe, detect_head, head_strides, student_taps, teacher_taps

PAIRS = [
    ("yolo26n.yaml", "yolo26n.yaml"),
    ("yolo26n.yaml", "yolo26s.yaml"),
    ("yolov8n.yaml", "yolov8n.yaml"),
    ("yolov8n.yaml", "yolo26n.yaml"),
    ("yolo26n.yaml", "yolov8n.yaml"),  # a teacher without a one-to-one head
]


def detector(name: str, seed: int) -> DetectionModel:
    """Return a random detector with random BatchNorm statistics and class biases, so that scores differ by anchor."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DetectionModel(name, nc=3, verbose=False)
        for module in model.modules():
            if (
                isinstance(module, nn.BatchNorm2d)
                and module.running_mean is not None
                and module.running_var is not None
            ):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
        head = detect_head(model)
        for branch in (head.cv3, getattr(head, "one2one_cv3", None) or ()):
            for level in branch:
                nn.init.normal_(level[-1].weight, 0, 1.0)
                nn.init.normal_(level[-1].bias, -1.0, 0.5)
    model.args = SimpleNamespace(imgsz=64, dis=6.0, box=7.5, cls=0.5, dfl=1.5, epochs=1)
    return model


def a_batch(images: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(5)
    return {
        "img": torch.rand(images, 3, 64, 64, generator=generator),
        "batch_idx": torch.arange(images).float(),
        "cls": torch.zeros(images, 1),
        "bboxes": torch.full((images, 4), 0.4),
    }


@pytest.mark.parametrize(("student_name", "teacher_name"), PAIRS)
@pytest.mark.parametrize("images", [1, 3])
def test_score_l2__equals_the_upstream_loss_and_gradient(student_name: str, teacher_name: str, images: int) -> None:
    student, teacher = detector(student_name, 0), detector(teacher_name, 1)
    upstream = DistillationModel(teacher, student)
    upstream.train()
    for module in student.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()  # so that a second forward pass sees the same network
    batch = a_batch(images)
    loss, items = upstream.loss(batch)
    expected = items["dis_loss"]

    strides = common_strides(head_strides(student), head_strides(teacher))
    method = build_method("score-l2", {}, describe(student, strides), describe(teacher, strides))
    assert isinstance(method, ScoreL2)
    method.projectors.load_state_dict(upstream.projector.state_dict())
    with torch.no_grad():
        theirs = teacher_taps(upstream.teacher_model, batch["img"], method.reads, strides)
    mine = student_taps(student(batch["img"]), detect_head(student), strides)
    value = method(mine, theirs, batch)["kd_feat"]

    assert expected.item() > 1e-3
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
    # upstream multiplies by the batch size once and returns the distillation loss last; cut out of a vector, it gives
    # zeros where there is no path
    weights = [p for p in student.parameters() if p.requires_grad]
    stock = torch.autograd.grad(loss[-1] / images, weights, materialize_grads=True)
    ours = torch.autograd.grad(value, weights, materialize_grads=True)
    reached = 0
    for one, other in zip(stock, ours, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-5 * float(one.abs().max()) + 1e-8)
        reached += bool(one.abs().max() > 0)
    assert reached > 50


def test_score_l2__differs_from_upstream_when_the_weights_differ() -> None:
    """The comparison above can fail: another projector gives another loss."""
    student, teacher = detector("yolov8n.yaml", 0), detector("yolov8n.yaml", 1)
    upstream = DistillationModel(teacher, student)
    upstream.train()
    batch = a_batch(1)
    strides = common_strides(head_strides(student), head_strides(teacher))
    method = build_method("score-l2", {}, describe(student, strides), describe(teacher, strides), seed=9)
    expected = upstream.loss(batch)[1]["dis_loss"].item()
    with torch.no_grad():
        theirs = teacher_taps(upstream.teacher_model, batch["img"], method.reads, strides)
        mine = student_taps(student(batch["img"]), detect_head(student), strides)
        value = method(mine, theirs, batch)["kd_feat"].item()
    assert value != pytest.approx(expected, rel=1e-3)
