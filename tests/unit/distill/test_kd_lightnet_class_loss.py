"""The class loss of ``kd-lightnet``: values, gradient, and wrong twins that the checks must catch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from taps_factory import Shape, foreground, make, map_leaves, random_taps, total
from torch import Tensor

from kd_yolo.distill.methods.kd_lightnet import anchor_weight, class_loss
from kd_yolo.distill.ops.logits import bernoulli_kl, teacher_confidence

SHAPE = Shape()
MODES = ["bernoulli", "softmax_bg", "softmax"]
LOGIT_QUARTER = math.log(0.25 / 0.75)
ClassLoss = Callable[[Tensor, Tensor, Tensor, float, float], Tensor]


# -- the class loss: values ------------------------------------------------------------------------------------------


def test_bernoulli_kl__golden() -> None:
    # (p, q) = (0.5, 0.25): 0.5 ln(0.5 / 0.25) + 0.5 ln(0.5 / 0.75) = 0.5 * 0.693147 - 0.5 * 0.405465 = 0.143841
    value = bernoulli_kl(torch.tensor(LOGIT_QUARTER), torch.tensor(0.0))
    assert value.item() == pytest.approx(0.143841, abs=1e-6)


def test_bernoulli_kl__both_tails_keep_their_digits() -> None:
    # p = sigmoid(l), q = sigmoid(l - 0.5) and the mirror image have the same KL; in float32 both to 5 digits.
    for logit in (4.0, 8.0, 12.0):
        exact = bernoulli_kl(torch.tensor(logit - 0.5).double(), torch.tensor(logit).double())
        for sign in (1.0, -1.0):
            value = bernoulli_kl(torch.tensor(sign * (logit - 0.5)), torch.tensor(sign * logit))
            assert value.item() == pytest.approx(exact.item(), rel=1e-5)


def test_class_loss__golden_two_anchors() -> None:
    # anchor 1: p = 0.5, q = 0.25, foreground: v = 0.5 * 0.5 + 0.5 * 1 = 0.75, w = |0.5 - 0.25| * 0.75 = 0.1875
    # anchor 2: p = q = 0.2, background: v = 0.5 * 0.2 = 0.1, w = 0
    # L = 0.1875 * 0.143841 / (0.75 + 0.1) = 0.0317297; untempered v makes it tau^2 times that for logits times tau.
    teacher = torch.tensor([[[0.0, math.log(0.2 / 0.8)]]])
    student = torch.tensor([[[LOGIT_QUARTER, math.log(0.2 / 0.8)]]])
    weight = anchor_weight(teacher_confidence(teacher), torch.tensor([[True, False]]), alpha=0.5)
    torch.testing.assert_close(weight, torch.tensor([[0.75, 0.1]]))
    assert class_loss(student, teacher, weight, 1.0, 1.0).item() == pytest.approx(0.0317297, abs=1e-6)
    assert class_loss(3 * student, 3 * teacher, weight, 3.0, 1.0).item() == pytest.approx(9 * 0.0317297, abs=1e-5)


def plain_python(student: Tensor, teacher: Tensor, weight: Tensor, tau: float, gamma: float) -> float:
    """The formula of the module's docstring, term by term."""
    numerator = 0.0
    images, classes, anchors = student.shape
    for b in range(images):
        for a in range(anchors):
            for k in range(classes):
                p = 1 / (1 + math.exp(-float(teacher[b, k, a]) / tau))
                q = 1 / (1 + math.exp(-float(student[b, k, a]) / tau))
                kb = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
                numerator += abs(p - q) ** gamma * float(weight[b, a]) * kb
    return tau**2 * numerator / float(weight.sum())


@pytest.mark.parametrize("tau", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_class_loss__equals_the_formula(tau: float, gamma: float) -> None:
    student, teacher = (random_taps(SHAPE, seed, torch.float64).scores for seed in (0, 1))
    weight = torch.rand(2, 13, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    expected = plain_python(student, teacher, weight, tau, gamma)
    assert class_loss(student, teacher, weight, tau, gamma).item() == pytest.approx(expected, rel=1e-10)


def test_class_loss__softmax_with_background_of_one_class_is_the_bernoulli_loss() -> None:
    # softmax over (s, 0) is (sigmoid(s), 1 - sigmoid(s)), and its total variation distance is |p - q|
    student, teacher = (random_taps(Shape(classes=1), seed, torch.float64).scores for seed in (0, 1))
    weight = teacher_confidence(teacher)
    values = [class_loss(student, teacher, weight, 2.0, 1.5, mode) for mode in ("bernoulli", "softmax_bg")]
    torch.testing.assert_close(*values)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("gamma", [0.0, 1.0])
def test_class_loss__zero_with_zero_gradient_only_at_equality(mode: Any, gamma: float) -> None:
    teacher = random_taps(SHAPE, 0, torch.float64).scores
    student = teacher.clone().requires_grad_()
    weight = teacher_confidence(teacher)
    loss = class_loss(student, teacher, weight, 2.0, gamma, mode)
    (gradient,) = torch.autograd.grad(loss, student)
    assert abs(loss.item()) < 1e-12
    assert gradient.abs().max().item() < 1e-12
    other = class_loss(student + torch.eye(3, 13).double(), teacher, weight, 2.0, gamma, mode)
    assert other.item() > 1e-4


def test_class_loss__plain_softmax_over_one_class_is_always_zero() -> None:
    # why the mode is refused for K = 1, and why a YOLO head needs the Bernoulli form
    student, teacher = (random_taps(Shape(classes=1), seed, grad=True).scores for seed in (0, 1))
    loss = class_loss(student, teacher.detach(), torch.ones(2, 13), 1.0, 0.0, "softmax")
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.item() == 0.0
    assert gradient.abs().max().item() == 0.0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tau", [0.1, 1.0, 4.0])
@pytest.mark.parametrize("logits", [(80.0, -80.0), (-80.0, 80.0), (80.0, 80.0), (-80.0, -80.0)])
def test_forward__logits_of_80_are_finite_under_bf16_autocast(
    mode: str, tau: float, logits: tuple[float, float]
) -> None:
    student, teacher = (map_leaves(random_taps(SHAPE, seed, grad=True), Tensor.bfloat16) for seed in (0, 1))
    for taps, logit in zip((student, teacher), logits, strict=True):
        with torch.no_grad():
            taps.scores[:, 0] = logit
            taps.boxes[:, 0] = logit
    with torch.autocast("cpu", torch.bfloat16):
        losses = make("kd-lightnet", SHAPE, mode=mode, tau=tau)(student, teacher, foreground(SHAPE))
    assert all(bool(torch.isfinite(value)) and value.dtype == torch.float32 for value in losses.values())
    torch.autograd.backward(total(losses))
    assert student.scores.grad is not None
    assert bool(torch.isfinite(student.scores.grad).all())
    if mode == "bernoulli" or logits[0] != logits[1]:  # two softmaxes saturated alike have no gradient left in float32
        assert student.scores.grad.abs().max().item() > 0


def test_class_loss__confident_disagreement_at_80_is_its_exact_value() -> None:
    # p = 1, q = sigmoid(-80): kb = ln(1 / q) = 80; one anchor, |p - q| = 1: L = 80, and dL/ds = q - p = -1
    student = torch.full((1, 1, 1), -80.0, requires_grad=True)
    loss = class_loss(student, torch.full((1, 1, 1), 80.0), torch.ones(1, 1), 1.0, 1.0)
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.item() == pytest.approx(80.0)
    assert gradient.item() == pytest.approx(-1.0)


# -- the class loss: properties, and wrong twins that the checks must catch ------------------------------------------


def check_gradient(loss: ClassLoss) -> None:
    """The weight is a constant for the gradient: dL/ds = tau w (q - p) / sum v."""
    teacher = random_taps(SHAPE, 1, torch.float64).scores
    student = random_taps(SHAPE, 0, torch.float64, grad=True).scores
    weight = teacher_confidence(teacher)
    for tau, gamma in ((1.0, 0.0), (1.0, 1.0), (1.0, 2.0), (3.0, 1.0)):
        p, q = (teacher / tau).sigmoid(), (student.detach() / tau).sigmoid()
        expected = tau * (p - q).abs() ** gamma * weight[:, None] * (q - p) / weight.sum()
        (gradient,) = torch.autograd.grad(loss(student, teacher, weight, tau, gamma), student)
        torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)


def check_one_class_has_a_gradient(loss: ClassLoss) -> None:
    student, teacher = (random_taps(Shape(classes=1), seed, grad=True).scores for seed in (0, 1))
    (gradient,) = torch.autograd.grad(loss(student, teacher.detach(), torch.ones(2, 13), 1.0, 1.0), student)
    assert gradient.abs().min().item() > 0


def check_gradient_keeps_its_size_when_tau_changes(loss: ClassLoss) -> None:
    """For a large tau, q - p -> (s - t) / (4 tau): tau^2 makes the gradient of gamma = 0 independent of tau."""
    student, teacher = (random_taps(SHAPE, seed, torch.float64, grad=True).scores for seed in (0, 1))
    sizes = []
    for tau in (100.0, 400.0):
        (gradient,) = torch.autograd.grad(loss(student, teacher.detach(), torch.ones(2, 13), tau, 0.0), student)
        sizes.append(gradient.norm().item())
    assert sizes[0] == pytest.approx(sizes[1], rel=1e-2)


def check_background_does_not_dilute(loss: ClassLoss) -> None:
    """A thousand anchors on which the teacher sees nothing change the loss by less than a thousandth."""
    student, teacher = (random_taps(SHAPE, seed).scores for seed in (0, 1))
    sea = [torch.full((2, 3, 1000), logit) for logit in (-15.0, -16.0)]
    alone, with_sea = (
        loss(s, t, teacher_confidence(t), 1.0, 1.0).item()
        for s, t in ((student, teacher), (torch.cat([student, sea[0]], 2), torch.cat([teacher, sea[1]], 2)))
    )
    assert with_sea == pytest.approx(alone, rel=1e-3)


CHECKS = [
    check_gradient,
    check_one_class_has_a_gradient,
    check_gradient_keeps_its_size_when_tau_changes,
    check_background_does_not_dilute,
]


def plain_softmax_twin(student: Tensor, teacher: Tensor, weight: Tensor, tau: float, gamma: float) -> Tensor:
    return class_loss(student, teacher, weight, tau, gamma, "softmax")


def forgotten_tau_twin(student: Tensor, teacher: Tensor, weight: Tensor, tau: float, gamma: float) -> Tensor:
    return class_loss(student, teacher, weight, tau, gamma) / tau**2


def nothing_detached_twin(student: Tensor, teacher: Tensor, weight: Tensor, tau: float, gamma: float) -> Tensor:
    focus = (teacher / tau).sigmoid().sub((student / tau).sigmoid()).abs() ** gamma
    return tau**2 * (focus * weight[:, None] * bernoulli_kl(student / tau, teacher / tau)).sum() / weight.sum()


def mean_over_anchors_twin(student: Tensor, teacher: Tensor, weight: Tensor, tau: float, gamma: float) -> Tensor:
    return class_loss(student, teacher, weight, tau, gamma) * weight.sum() / weight.numel()


def swapped_roles_twin(student: Tensor, teacher: Tensor, weight: Tensor, tau: float, gamma: float) -> Tensor:
    return class_loss(teacher, student, weight, tau, gamma)


@pytest.mark.parametrize("check", CHECKS)
def test_class_loss__passes(check: Callable[[ClassLoss], None]) -> None:
    check(class_loss)


@pytest.mark.parametrize(
    ("twin", "check"),
    [
        (plain_softmax_twin, check_one_class_has_a_gradient),
        (plain_softmax_twin, check_gradient),
        (forgotten_tau_twin, check_gradient_keeps_its_size_when_tau_changes),
        (forgotten_tau_twin, check_gradient),
        (nothing_detached_twin, check_gradient),
        (mean_over_anchors_twin, check_background_does_not_dilute),
        (swapped_roles_twin, check_gradient),
    ],
)
def test_checks__catch_a_wrong_twin(twin: ClassLoss, check: Callable[[ClassLoss], None]) -> None:
    with pytest.raises(AssertionError):
        check(twin)
