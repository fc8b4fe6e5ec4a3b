"""Confident teacher boxes as labels: what is kept, in which form, and what the student's loss on them is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from detector_factory import tiny_detector
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from ultralytics.cfg import get_cfg
from ultralytics.utils.metrics import box_iou
from ultralytics.utils.ops import xywh2xyxy

from kd_yolo.distill import pseudo
from kd_yolo.distill.base import Taps
from kd_yolo.distill.joined import take_images
from kd_yolo.distill.pseudo import confident_boxes, pseudo_loss

CANVAS = (32, 64)  # height, width
STRIDE = 8.0


def taps_of(probability: Tensor, sides: Tensor) -> Taps:
    """Return taps of one level at stride 8 from class probabilities (U, K, A) and l, t, r, b in cells (U, 4, A)."""
    rows, columns = CANVAS[0] // 8, CANVAS[1] // 8
    y, x = torch.meshgrid(torch.arange(rows) + 0.5, torch.arange(columns) + 0.5, indexing="ij")
    return Taps(
        neck=(torch.zeros(len(probability), 1, rows, columns),),
        scores=probability.logit(),
        boxes=sides,
        strides=torch.full((rows * columns,), STRIDE),
        anchors=torch.stack([x.flatten(), y.flatten()], 1),
    )


def nothing(images: int = 1, classes: int = 2) -> tuple[Tensor, Tensor]:
    return torch.full((images, classes, 32), 1e-4), torch.ones(images, 4, 32)


def test_confident_boxes__golden() -> None:
    """Anchor 9 is row 1, column 1: centre (1.5, 1.5) cells = (12, 12) px. Sides 1, 0.5, 2, 1 cells = 8, 4, 16, 8 px.

    Corners (4, 8, 28, 20) px; centre (16, 14), size (24, 12); over width 64 and height 32: 0.25, 0.4375, 0.375, 0.375.
    """
    probability, sides = nothing(images=2)
    probability[1, 1, 9] = 0.9
    sides[1, :, 9] = torch.tensor([1.0, 0.5, 2.0, 1.0])
    found = confident_boxes(taps_of(probability, sides), 1, 0.5, CANVAS)
    assert found["bboxes"].tolist() == [[0.25, 0.4375, 0.375, 0.375]]
    assert found["cls"].tolist() == [[1.0]]
    assert found["batch_idx"].tolist() == [1.0]


def test_confident_boxes__one_of_two_overlapping_boxes_of_a_class_goes() -> None:
    """Anchors 9 and 10 both see x 4..28, y 4..20, identical boxes; a box of the other class there stays."""
    probability, sides = nothing()
    probability[0, 0, 9], probability[0, 0, 10], probability[0, 1, 17] = 0.7, 0.8, 0.6
    sides[0, :, 9] = torch.tensor([1.0, 1.0, 2.0, 1.0])  # centre x 12: 4..28
    sides[0, :, 10] = torch.tensor([2.0, 1.0, 1.0, 1.0])  # centre x 20: 4..28
    sides[0, :, 17] = torch.tensor([1.0, 2.0, 2.0, 0.0])  # centre y 20: 4..20
    found = confident_boxes(taps_of(probability, sides), 1, 0.5, CANVAS)
    assert sorted(found["cls"].flatten().tolist()) == [0.0, 1.0]
    assert torch.equal(found["bboxes"][0], found["bboxes"][1])


def test_confident_boxes__confidence_is_the_lowest_kept() -> None:
    probability, sides = nothing()
    probability[0, 0, 0], probability[0, 0, 31] = 0.49, 0.51
    assert len(confident_boxes(taps_of(probability, sides), 1, 0.5, CANVAS)["cls"]) == 1
    assert len(confident_boxes(taps_of(probability, sides), 1, 0.48, CANVAS)["cls"]) == 2
    assert len(confident_boxes(taps_of(probability, sides), 1, 0.52, CANVAS)["cls"]) == 0


def test_confident_boxes__cut_to_the_canvas_and_small_or_broken_ones_dropped() -> None:
    probability, sides = nothing()
    probability[0, 0, [0, 4, 20, 31]] = 0.9
    sides[0, :, 0] = 2.0  # centre (4, 4): -12..20, cut to 0..20
    sides[0, :, 4] = 0.1  # 1.6 px
    sides[0, :, 20] = float("nan")
    sides[0, :, 31] = torch.tensor([1.0, 1.0, -3.0, 1.0])  # the right side left of the left side
    found = confident_boxes(taps_of(probability, sides), 1, 0.5, CANVAS)
    assert found["bboxes"].tolist() == [[10 / 64, 10 / 32, 20 / 64, 20 / 32]]


def test_confident_boxes__classes_the_teacher_lacks_are_no_labels() -> None:
    probability, sides = nothing()
    probability[0, 0, 3] = 0.9
    taps = taps_of(probability, sides)
    taps.scores[0, 1] = float("nan")  # what stands there says nothing and must not leak
    taps.scores[0, 1, 5] = 20.0
    found = confident_boxes(replace(taps, class_mask=torch.tensor([True, False])), 1, 0.5, CANVAS)
    assert found["cls"].flatten().tolist() == [0.0]


def test_confident_boxes__limit_keeps_the_most_confident_of_each_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pseudo, "MOST_BOXES", 3)
    probability, sides = nothing(images=2)
    probability[0, 0] = torch.linspace(0.6, 0.9, 32)
    probability[1, 0, 7] = 0.55
    sides[:] = 0.45  # 7.2 px boxes that do not overlap
    found = confident_boxes(taps_of(probability, sides), 1, 0.5, CANVAS)
    assert found["batch_idx"].tolist() == [0.0, 0.0, 0.0, 1.0]
    centres = (found["bboxes"][:3, 0] * 64 // 8).tolist()
    assert sorted(centres) == [5.0, 6.0, 7.0]  # anchors 29, 30, 31: the end of the last row


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), classes=st.integers(1, 4), reg_max=st.sampled_from([1, 4]))
def test_confident_boxes__are_labels_and_follow_their_images(seed: int, classes: int, reg_max: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    probability = torch.rand(4, classes, 32, generator=generator).clamp(0.001, 0.999)
    sides = torch.randn(4, 4 * reg_max, 32, generator=generator) * 2
    taps = taps_of(probability, sides)
    found = confident_boxes(taps, reg_max, 0.7, CANVAS)
    index = found["batch_idx"].long()
    assert torch.equal(index, index.sort().values)  # Ultralytics' loss needs them in order
    assert ((found["bboxes"] >= 0) & (found["bboxes"] <= 1)).all()
    assert ((found["cls"] >= 0) & (found["cls"] < classes)).all()
    for image in range(4):
        for kind in range(classes):
            mine = found["bboxes"][(index == image) & (found["cls"].flatten() == kind)]
            corners = xywh2xyxy(mine * torch.tensor([64.0, 32.0, 64.0, 32.0]))
            overlap = box_iou(corners, corners) - torch.eye(len(mine))
            assert not (overlap > pseudo.OVERLAP + 1e-4).any()
    order = torch.randperm(4, generator=generator)
    moved = confident_boxes(replace(taps, scores=taps.scores[order], boxes=taps.boxes[order]), reg_max, 0.7, CANVAS)
    for new, old in enumerate(order.tolist()):
        assert torch.equal(moved["bboxes"][moved["batch_idx"] == new], found["bboxes"][index == old])


def labels(*images: int) -> dict[str, Tensor]:
    return {
        "bboxes": torch.tensor([[0.5, 0.5, 0.5, 0.5]]).repeat(len(images), 1),
        "cls": torch.zeros(len(images), 1),
        "batch_idx": torch.tensor(images, dtype=torch.float32),
    }


@pytest.fixture
def student() -> Any:
    model = tiny_detector(form=None)
    model.args = get_cfg()
    return model.train()


def test_pseudo_loss__is_the_students_loss_on_the_images_with_boxes(student: Any) -> None:
    """Two of five images have a box: the loss on these two alone, multiplied by 2 as stock losses are, over 5."""
    images = torch.rand(5, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    outputs = student(images)
    value = pseudo_loss(student, outputs, images, labels(1, 3))
    alone = {**labels(0, 1), "img": images[[1, 3]]}
    expected, _ = student.loss(alone, take_images(outputs, torch.tensor([1, 3])))
    assert float(value.detach()) == pytest.approx(float(expected.sum().detach()) / 5)
    every, _ = student.loss({**labels(1, 3), "img": images}, outputs)
    assert float(value.detach()) != pytest.approx(float(every.sum().detach()) / 5)  # the others are no background


def test_pseudo_loss__reaches_the_student_and_only_those_images(student: Any) -> None:
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    student.eval()  # so that BatchNorm does not tie the images together
    head = student.model[-1]
    head.training = True  # training outputs
    (found,) = torch.autograd.grad(pseudo_loss(student, student(images), images, labels(2)), [images])
    assert [bool(grad.any()) for grad in found] == [False, False, True]


def test_pseudo_loss__without_boxes_is_zero(student: Any) -> None:
    images = torch.rand(2, 3, 64, 64)
    assert float(pseudo_loss(student, student(images), images, labels())) == 0.0
