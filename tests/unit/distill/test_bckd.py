"""BCKD against hand-computed values; where it differs from kd-lightnet."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from taps_factory import Shape, foreground, make, map_leaves, random_taps
from torch import Tensor

from kd_yolo.distill.base import DistillMethod
from kd_yolo.distill.methods.bckd import binary_distillation, box_distillation, disagreement, foreground_count
from kd_yolo.errors import ConfigError

SHAPE = Shape()


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def cls_only(**args: Any) -> DistillMethod:
    return make("bckd", SHAPE, box_weight=0.0, **args)


def test_binary_distillation__golden_value() -> None:
    # p = 0.8, q = 0.5: |p - q| = 0.3, cross-entropy -0.8 ln 0.5 - 0.2 ln 0.5 = ln 2. And p = 0.2, q = 0.6:
    # |p - q| = 0.4, cross-entropy -0.2 ln 0.6 - 0.8 ln 0.4.
    student = torch.tensor([[[logit(0.5), logit(0.6)]]], dtype=torch.float64)
    teacher = torch.tensor([[[logit(0.8), logit(0.2)]]], dtype=torch.float64)
    expected = 0.3 * math.log(2) + 0.4 * (-0.2 * math.log(0.6) - 0.8 * math.log(0.4))
    assert binary_distillation(student, teacher, 1.0).item() == pytest.approx(expected, rel=1e-12)
    squared = 0.09 * math.log(2) + 0.16 * (-0.2 * math.log(0.6) - 0.8 * math.log(0.4))
    assert binary_distillation(student, teacher, 2.0).item() == pytest.approx(squared, rel=1e-12)


def test_binary_distillation__the_weight_carries_a_gradient() -> None:
    # d/ds (q - p) BCE for q > p: q (1 - q) BCE + (q - p)^2; a detached weight would give the second part alone.
    p, q = 0.3, 0.7
    student = torch.tensor([[[logit(q)]]], dtype=torch.float64, requires_grad=True)
    torch.autograd.backward(binary_distillation(student, torch.tensor([[[logit(p)]]], dtype=torch.float64), 1.0))
    entropy = -p * math.log(q) - (1 - p) * math.log(1 - q)
    assert student.grad is not None
    assert student.grad.item() == pytest.approx(q * (1 - q) * entropy + (q - p) ** 2, rel=1e-9)


def test_box_distillation__golden_values() -> None:
    # Two unit-wide boxes 2 x 2 shifted by 1 in x: intersection 2, union 6, enclosing 3 x 2 = 6: GIoU = 1/3.
    # Disjoint 2 x 2 boxes 2 apart: IoU 0, union 8, enclosing 6 x 2 = 12: GIoU = -1/3.
    teacher = torch.tensor([[[0.0, 0.0, 2.0, 2.0]] * 2], dtype=torch.float64)
    student = torch.tensor([[[1.0, 0.0, 3.0, 2.0], [4.0, 0.0, 6.0, 2.0]]], dtype=torch.float64)
    weight = torch.tensor([[1.0, 10.0]], dtype=torch.float64)
    assert box_distillation(student, teacher, weight).item() == pytest.approx(2 / 3 + 10 * 4 / 3, rel=1e-5)


def test_box_distillation__boxes_without_area_never_count_negative() -> None:
    good, inside_out = [0.0, 0.0, 2.0, 2.0], [9.0, 9.0, -9.0, -9.0]
    one = torch.ones(1, 1)
    teacher_bad = box_distillation(torch.tensor([[good]]), torch.tensor([[inside_out]]), one)
    student_bad = box_distillation(torch.tensor([[inside_out]]), torch.tensor([[good]]), one)
    assert teacher_bad.item() == 0.0
    assert student_bad.item() >= 0.0
    half = box_distillation(torch.tensor([[[2.0, 0.0, 0.0, 2.0]]]), torch.tensor([[good]]), one)
    assert half.item() > 0.5  # inside out in one direction: still wrong, and told so


def test_box_distillation__gradcheck_in_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(2, 5, 2, generator=generator, dtype=torch.float64) * 5
    boxes = torch.cat([corner, corner + 1 + torch.rand(2, 5, 2, generator=generator, dtype=torch.float64) * 5], -1)
    student, teacher = boxes.clone().requires_grad_(), boxes.flip(1)
    weight = torch.rand(2, 5, generator=generator, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: box_distillation(x, teacher, weight), (student,))


def test_bckd__terms_are_sums_over_the_foreground_count() -> None:
    student, teacher, batch = random_taps(SHAPE, 0), random_taps(SHAPE, 1), foreground(SHAPE)
    losses = make("bckd", SHAPE, weight=2.0, cls_weight=3.0)(student, teacher, batch)
    count = float(batch["fg_mask"].sum())
    assert count > 1
    expected = 6 * binary_distillation(student.scores, teacher.scores, 1.0) / count
    torch.testing.assert_close(losses["kd_bckd_cls"], expected)
    twin = 6 * F.binary_cross_entropy_with_logits(student.scores, teacher.scores.sigmoid(), reduction="sum") / count
    assert not torch.allclose(losses["kd_bckd_cls"], twin, rtol=0.05)  # without the weight: seen


def test_bckd__boxes_are_weighted_by_the_largest_disagreement() -> None:
    student, teacher = random_taps(SHAPE, 0), random_taps(SHAPE, 1)
    agreeing = replace(teacher, scores=student.scores.clone())
    only = replace(teacher, scores=student.scores.clone().index_fill(2, torch.tensor([4]), 3.0))
    method = make("bckd", SHAPE, cls_weight=0.0)
    assert method(student, agreeing, {})["kd_bckd_box"].item() == 0.0
    moved = map_leaves(replace(student, boxes=student.boxes.clone()), lambda x: x)
    moved.boxes[:, :, 5] += torch.linspace(0, 9, 16).view(1, 16)  # another anchor's box: no disagreement, no weight
    assert torch.equal(method(student, only, {})["kd_bckd_box"], method(moved, only, {})["kd_bckd_box"])
    moved.boxes[:, :, 4] += torch.linspace(0, 9, 16).view(1, 16)
    assert not torch.equal(method(student, only, {})["kd_bckd_box"], method(moved, only, {})["kd_bckd_box"])


def test_bckd__corrects_a_confident_mistake_on_background_that_kd_lightnet_hardly_sees() -> None:
    # Teacher sure of nothing at anchor 0, the student sure of class 0 there: BCKD's gradient is large; kd-lightnet's is
    # weighted by the teacher's confidence at that anchor, which is next to nothing.
    def pull(name: str, **args: Any) -> float:
        student, teacher = random_taps(SHAPE, 0), random_taps(SHAPE, 1)
        teacher.scores[:, :, 0] = -9.0
        student.scores[:, 0, 0] = 2.0
        scores = student.scores.clone().requires_grad_()
        losses = make(name, SHAPE, box_weight=0.0, **args)(replace(student, scores=scores), teacher, {})
        torch.autograd.backward(next(iter(losses.values())))
        assert scores.grad is not None
        return float(scores.grad[:, 0, 0].abs().max() / scores.grad.abs().max())

    assert pull("bckd") > 0.5
    assert pull("kd-lightnet") < 0.01


def test_disagreement__is_the_distance_of_probabilities_to_a_power() -> None:
    student, teacher = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    distance = (student.sigmoid() - teacher.sigmoid()).abs()
    torch.testing.assert_close(disagreement(student, teacher, 1.0), distance)
    torch.testing.assert_close(disagreement(student, teacher, 2.5), distance**2.5)


@pytest.mark.parametrize(
    ("mask", "count"),
    [(torch.tensor([[True, True, False]]), 2.0), (torch.zeros(1, 3, dtype=torch.bool), 1.0), (None, 1.5)],
)
def test_foreground_count__mask_or_teacher(mask: Tensor | None, count: float) -> None:
    teacher = torch.zeros(1, 2, 3)  # three anchors of confidence 1/2
    assert foreground_count(mask, teacher).item() == pytest.approx(count)


def test_bckd__nothing_to_distil_is_refused() -> None:
    with pytest.raises(ConfigError, match="both 0"):
        cls_only(cls_weight=0.0)


def test_bckd__reads_boxes_only_for_their_term() -> None:
    assert cls_only().reads == {"scores"}
    assert cls_only().terms == ("kd_bckd_cls",)
    assert make("bckd", SHAPE, cls_weight=0.0).reads == {"scores", "boxes"}
