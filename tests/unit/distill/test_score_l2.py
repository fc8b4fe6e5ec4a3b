from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from taps_factory import Shape, make, random_taps
from torch import Tensor

from kd_yolo.distill.methods.score_l2 import ScoreL2, score_weighted_l2, teacher_scores

SHAPE = Shape()
LevelLoss = Callable[[Tensor, Tensor, Tensor], Tensor]


def check_golden(loss: LevelLoss) -> None:
    # Two channels, two cells. Squared differences summed over channels: cell 1: 1 + 4 = 5, cell 2: 9 + 0 = 9.
    # Scores 0.8 and 0.2: (0.8 * 5 + 0.2 * 9) / (2 channels * (0.8 + 0.2)) = 5.8 / 2 = 2.9
    student = torch.tensor([[1.0, 3.0], [2.0, 0.0]]).reshape(1, 2, 1, 2)
    value = loss(student, torch.zeros(1, 2, 1, 2), torch.tensor([[0.8, 0.2]]))
    assert value.item() == pytest.approx(2.9)


def test_score_weighted_l2__golden() -> None:
    check_golden(score_weighted_l2)


def test_check_golden__catches_a_mean_over_cells_and_a_sum_over_channels() -> None:
    def unweighted(student: Tensor, teacher: Tensor, score: Tensor) -> Tensor:
        return score_weighted_l2(student, teacher, torch.ones_like(score))

    def summed(student: Tensor, teacher: Tensor, score: Tensor) -> Tensor:
        return score_weighted_l2(student, teacher, score) * student.shape[1]

    for twin in (unweighted, summed):
        with pytest.raises(AssertionError):
            check_golden(twin)


def test_score_weighted_l2__a_teacher_that_sees_nothing_gives_zero() -> None:
    student, teacher = torch.ones(1, 2, 1, 2), torch.zeros(1, 2, 1, 2)
    assert score_weighted_l2(student, teacher, torch.zeros(1, 2)).item() == 0.0


def test_teacher_scores__mean_of_both_heads_in_logits_then_the_best_class() -> None:
    # logits 2 and 0 in the two heads: sigmoid(1) = 0.731059; class 2 with -4 and -2 is lower
    taps = random_taps(Shape(images=1, classes=2, sizes=((1, 1),), channels=(4,), strides=(8,)), 0)
    taps = replace(taps, scores=torch.tensor([[[2.0], [-4.0]]]), scores_one2one=torch.tensor([[[0.0], [-2.0]]]))
    assert teacher_scores(taps).item() == pytest.approx(0.731059, abs=1e-6)
    assert teacher_scores(replace(taps, scores_one2one=None)).item() == pytest.approx(0.880797, abs=1e-6)
    only_second = replace(taps, class_mask=torch.tensor([False, True]))
    assert teacher_scores(only_second).item() == pytest.approx(0.047426, abs=1e-6)  # sigmoid(-3)


def test_forward__default_weight_is_the_stock_one() -> None:
    student, teacher = random_taps(SHAPE, 0), random_taps(SHAPE, 1)
    six, one = make("score-l2", SHAPE), make("score-l2", SHAPE, weight=1.0)
    torch.testing.assert_close(six(student, teacher, {})["kd_feat"], 6 * one(student, teacher, {})["kd_feat"])


def test_build_method__one_projector_a_level_from_student_to_teacher_channels() -> None:
    method = make("score-l2", SHAPE, Shape(channels=(7, 3)))
    assert isinstance(method, ScoreL2)
    shapes = [[tuple(p.shape[:2]) for p in level.parameters() if p.ndim == 4] for level in method.projectors]
    assert shapes == [[(7, 4), (7, 7)], [(3, 6), (3, 3)]]
    assert sum(p.ndim == 1 for p in method.parameters()) == 4  # every convolution has a bias, as upstream's


def test_forward__only_the_neck_and_the_projectors_learn() -> None:
    student, teacher = random_taps(SHAPE, 0, grad=True), random_taps(SHAPE, 1)
    method = make("score-l2", SHAPE)
    torch.autograd.backward(method(student, teacher, {})["kd_feat"])
    assert all(x.grad is not None for x in (*student.neck, *method.parameters()))
    assert student.scores.grad is None
    assert student.boxes.grad is None


def test_forward__training_brings_the_maps_together() -> None:
    teacher, student = random_taps(SHAPE, 1), random_taps(SHAPE, 0, grad=True)
    method = make("score-l2", SHAPE)
    optimizer = torch.optim.Adam([*student.neck, *method.parameters()], lr=0.05)
    values = []
    for _ in range(150):
        optimizer.zero_grad()
        loss = method(student, teacher, {})["kd_feat"]
        torch.autograd.backward(loss)
        optimizer.step()
        values.append(loss.item())
    assert values[-1] < 0.2 * values[0]
