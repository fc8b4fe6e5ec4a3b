from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from kd_yolo.distill.base import build_method, parse_args
from kd_yolo.distill.methods.kd_lightnet import (
    KDLightNet,
    anchor_weight,
    bernoulli_kl,
    class_loss,
    decode_boxes,
    distribution_loss,
    overlap_loss,
    teacher_confidence,
)
from kd_yolo.errors import ConfigError, DistillationError, TeacherError
from taps_factory import Shape, foreground, leaves, make, map_leaves, random_taps, total
from torch import Tensor
from ultralytics.nn.modules.block import DFL
from ultralytics.utils.tal import dist2bbox

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
def test_forward__logits_of_80_are_finite_under_bf16_autocast(mode: str, tau: float, logits: tuple[float, float]) -> None:
    student, teacher = (map_leaves(random_taps(SHAPE, seed, grad=True), Tensor.bfloat16) for seed in (0, 1))
    for taps, logit in zip((student, teacher), logits, strict=True):
        with torch.no_grad():
            taps.scores[:, 0] = logit
            taps.boxes[:, 0] = logit
    with torch.autocast("cpu", torch.bfloat16):
        losses = make("kd-lightnet", SHAPE, mode=mode, tau=tau)(student, teacher, foreground(SHAPE))
    assert all(bool(torch.isfinite(value)) and value.dtype == torch.float32 for value in losses.values())
    total(losses).backward()
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


# -- anchor weights --------------------------------------------------------------------------------------------------


def test_anchor_weight__without_foreground_alpha_counts_as_one() -> None:
    student, teacher = random_taps(SHAPE, 0), random_taps(SHAPE, 1)
    half, one = (make("kd-lightnet", SHAPE, alpha=alpha) for alpha in (0.5, 1.0))
    assert torch.equal(total(half(student, teacher, {})), total(one(student, teacher, foreground(SHAPE))))
    assert not torch.equal(total(half(student, teacher, {})), total(half(student, teacher, foreground(SHAPE))))


def test_forward__alpha_zero_without_any_foreground_gives_zero_not_nan() -> None:
    student, teacher = random_taps(SHAPE, 0, grad=True), random_taps(SHAPE, 1)
    losses = make("kd-lightnet", SHAPE, alpha=0.0)(student, teacher, foreground(SHAPE, share=0.0))
    assert losses["kd_cls"].item() == 0.0
    total(losses).backward()
    assert all(bool(torch.isfinite(x.grad).all()) for x in leaves(student) if x.grad is not None)


def test_forward__alpha_zero_looks_at_the_foreground_alone() -> None:
    student, teacher, batch = random_taps(SHAPE, 0), random_taps(SHAPE, 1), foreground(SHAPE)
    changed = student.scores.masked_fill(~batch["fg_mask"][:, None], 5.0)
    method = make("kd-lightnet", SHAPE, alpha=0.0, box_weight=0.0)
    assert torch.equal(
        method(student, teacher, batch)["kd_cls"], method(replace(student, scores=changed), teacher, batch)["kd_cls"]
    )


def test_forward__a_foreground_mask_of_other_levels_is_refused() -> None:
    with pytest.raises(DistillationError, match=r"fg_mask is \(2, 9\).*\(2, 13\)"):
        make("kd-lightnet", SHAPE)(random_taps(SHAPE, 0), random_taps(SHAPE, 1), {"fg_mask": torch.ones(2, 9)})


@pytest.mark.parametrize("mode", MODES)
def test_forward__an_unknown_class_changes_neither_term(mode: str) -> None:
    # dropping the class from both sides is the same as masking it
    batch, keep = foreground(SHAPE), [0, 2]
    student, teacher = random_taps(SHAPE, 0), random_taps(SHAPE, 1)
    masked = replace(teacher, class_mask=torch.tensor([True, False, True]))
    dropped = [replace(taps, scores=taps.scores[:, keep], scores_one2one=None) for taps in (student, teacher)]
    expected = make("kd-lightnet", Shape(classes=2), mode=mode)(*dropped, batch)
    losses = make("kd-lightnet", SHAPE, mode=mode)(student, masked, batch)
    for term, value in losses.items():
        torch.testing.assert_close(value, expected[term], rtol=1e-6, atol=1e-9)


# -- the one-to-one head ---------------------------------------------------------------------------------------------


def test_forward__one2one_adds_the_same_loss_weighted_by_confidence_alone() -> None:
    student, teacher, batch = random_taps(SHAPE, 0, grad=True), random_taps(SHAPE, 1), foreground(SHAPE)
    plain = make("kd-lightnet", SHAPE)(student, teacher, batch)
    both = make("kd-lightnet", SHAPE, one2one=True)(student, teacher, batch)
    assert student.scores_one2one is not None
    assert teacher.scores_one2one is not None
    confidence = teacher_confidence(teacher.scores_one2one)
    extra = class_loss(student.scores_one2one, teacher.scores_one2one, confidence, 1.0, 1.0)
    torch.testing.assert_close(both["kd_cls"], plain["kd_cls"] + extra)
    assert torch.equal(both["kd_box"], plain["kd_box"])
    total(plain).backward()
    assert student.scores_one2one.grad is None
    total(both).backward()
    assert student.scores_one2one.grad is not None


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_forward__one2one_without_that_head_is_refused(side: str) -> None:
    student, teacher = (random_taps(SHAPE, i, one2one=side != name) for i, name in enumerate(("student", "teacher")))
    with pytest.raises(TeacherError, match=f"one2one=true, but the {side} has no one-to-one head; set one2one=false"):
        make("kd-lightnet", SHAPE, one2one=True)(student, teacher, {})


# -- boxes -----------------------------------------------------------------------------------------------------------


def test_distribution_loss__golden() -> None:
    # R = 2; one side has p = (0.5, 0.5), q = (0.25, 0.75): KL 0.143841 as above; the other three sides are equal.
    # Anchor 1 weighs 0.6; anchor 2, all sides equal, weighs 0.2: 0.6 * (0.143841 / 4) / 0.8 = 0.0269702
    teacher, student = torch.zeros(1, 8, 2), torch.zeros(1, 8, 2)
    student[0, 2, 0] = LOGIT_QUARTER  # first bin of the second side, anchor 1
    value = distribution_loss(student, teacher, torch.tensor([[0.6, 0.2]]), 2)
    assert value.item() == pytest.approx(0.0269702, abs=1e-6)


def test_overlap_loss__golden() -> None:
    # (0, 0, 2, 2) and (1, 0, 3, 2): IoU = 2 / 6; centres 1 apart; enclosing box 3 x 2, diagonal^2 13; equal aspect:
    # CIoU = 1/3 - 1/13 = 0.256410. Weights 0.6 there and 0.2 on an equal pair: 0.6 * 0.743590 / 0.8 = 0.557692
    teacher = torch.tensor([[[0.0, 0, 2, 2], [5, 5, 9, 7]]])
    student = torch.tensor([[[1.0, 0, 3, 2], [5, 5, 9, 7]]])
    assert overlap_loss(student, teacher, torch.tensor([[0.6, 0.2]])).item() == pytest.approx(0.557692, abs=1e-5)


def test_overlap_loss__gradcheck_where_ciou_has_no_detached_factor() -> None:
    # squares: the aspect term and its derivative are 0, so its detached factor cannot matter
    teacher = torch.tensor([[[0.0, 0, 2, 2], [5, 5, 9, 9]]], dtype=torch.float64)
    student = torch.tensor([[[1.0, 0.5, 3, 2.5], [6, 4.5, 9.5, 8]]], dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([[0.6, 0.2]], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda boxes: overlap_loss(boxes, teacher, weight), (student,))


def test_overlap_loss__gradient_pulls_towards_the_teacher() -> None:
    teacher = torch.tensor([[[10.0, 10, 30, 30]]])
    boxes = torch.tensor([[[40.0, 45, 55, 70]]])  # apart: plain IoU would have no gradient
    for _ in range(400):
        boxes = boxes.requires_grad_()
        (gradient,) = torch.autograd.grad(overlap_loss(boxes, teacher, torch.ones(1, 1)), boxes)
        boxes = (boxes - 20 * gradient).detach()
    assert overlap_loss(boxes, teacher, torch.ones(1, 1)).item() < 0.1


def test_overlap_loss__a_teacher_box_without_area_is_left_out() -> None:
    teacher = torch.tensor([[[0.0, 0, 2, 2], [9, 5, 5, 7], [1, 1, 1, 1]]])
    student = torch.tensor([[[1.0, 0, 3, 2], [9, 5, 5, 7], [1, 1, 1, 1]]], requires_grad=True)
    loss = overlap_loss(student, teacher, torch.full((1, 3), 0.5))
    assert loss.item() == pytest.approx(1 - (1 / 3 - 1 / 13), abs=1e-5)
    (gradient,) = torch.autograd.grad(loss, student)
    assert bool(torch.isfinite(gradient).all())
    nothing = overlap_loss(student, teacher.flip(-1), torch.full((1, 3), 0.5))
    assert nothing.item() == 0.0


@pytest.mark.parametrize("reg_max", [1, 4, 16])
def test_decode_boxes__equals_ultralytics(reg_max: int) -> None:
    taps = random_taps(Shape(reg_max=reg_max), 0)
    distances = DFL(reg_max)(taps.boxes) if reg_max > 1 else taps.boxes
    expected = dist2bbox(distances, taps.anchors.T[None], xywh=False, dim=1) * taps.strides
    torch.testing.assert_close(decode_boxes(taps, reg_max), expected.transpose(1, 2), rtol=1e-5, atol=1e-4)


def test_forward__box_form_follows_both_reg_max() -> None:
    for mine, theirs, by_bins in ((4, 4, True), (4, 6, False), (1, 1, False), (1, 4, False), (4, 1, False)):
        student, teacher = Shape(reg_max=mine), Shape(reg_max=theirs)
        method = make("kd-lightnet", student, teacher)
        assert isinstance(method, KDLightNet)
        assert method.by_bins is by_bins
        taps, target = random_taps(student, 0), random_taps(teacher, 1)
        confidence = teacher_confidence(target.scores)
        expected = (
            distribution_loss(taps.boxes, target.boxes, confidence, mine)
            if by_bins
            else overlap_loss(decode_boxes(taps, mine), decode_boxes(target, theirs), confidence)
        )
        torch.testing.assert_close(method(taps, target, foreground(student))["kd_box"], expected)


def test_forward__the_same_boxes_from_bins_and_from_distances_cost_nothing() -> None:
    # a one-hot distribution on bin 2 decodes to the distance 2: a teacher with bins equals a student without
    student, teacher = Shape(reg_max=1), Shape(reg_max=4)
    bins = torch.full((2, 4, 4, 13), -50.0)
    bins[:, :, 2] = 50.0
    taps = replace(random_taps(student, 0), boxes=torch.full((2, 4, 13), 2.0))
    target = replace(random_taps(teacher, 1), boxes=bins.reshape(2, 16, 13))
    assert make("kd-lightnet", student, teacher)(taps, target, {})["kd_box"].item() == pytest.approx(0.0, abs=1e-5)


# -- arguments -------------------------------------------------------------------------------------------------------


def test_build_method__plain_softmax_over_one_class_is_refused() -> None:
    spec = Shape(classes=1).spec()
    with pytest.raises(ConfigError, match="mode=softmax over one class is always 0; use mode=bernoulli"):
        build_method("kd-lightnet", {"mode": "softmax"}, spec, spec)
    build_method("kd-lightnet", {"mode": "softmax_bg"}, spec, spec)


def test_build_method__both_parts_off_is_refused() -> None:
    with pytest.raises(ConfigError, match="cls_weight and box_weight are both 0"):
        make("kd-lightnet", SHAPE, cls_weight=0.0, box_weight=0.0)


@pytest.mark.parametrize(
    ("args", "terms", "reads"),
    [
        ({}, ("kd_cls", "kd_box"), {"scores", "boxes"}),
        ({"box_weight": 0.0}, ("kd_cls",), {"scores"}),
        ({"cls_weight": 0.0}, ("kd_box",), {"scores", "boxes"}),
        ({"one2one": True}, ("kd_cls", "kd_box"), {"scores", "boxes", "scores_one2one"}),
        ({"one2one": True, "cls_weight": 0.0}, ("kd_box",), {"scores", "boxes"}),
        ({"weight": 0.0}, ("kd_cls", "kd_box"), set()),
    ],
)
def test_build_method__terms_and_reads_follow_the_weights(
    args: dict[str, Any], terms: tuple[str, ...], reads: set[str]
) -> None:
    method = make("kd-lightnet", SHAPE, **args)
    assert method.terms == terms
    assert method.reads == reads
    assert tuple(method(random_taps(SHAPE, 0), random_taps(SHAPE, 1), {})) == terms


def test_forward__part_weights_are_factors() -> None:
    student, teacher = random_taps(SHAPE, 0), random_taps(SHAPE, 1)
    plain = make("kd-lightnet", SHAPE)(student, teacher, {})
    scaled = make("kd-lightnet", SHAPE, weight=2.0, cls_weight=3.0, box_weight=0.5)(student, teacher, {})
    torch.testing.assert_close(scaled["kd_cls"], 6 * plain["kd_cls"])
    torch.testing.assert_close(scaled["kd_box"], plain["kd_box"])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"tua": 2.0}, r"no argument 'tua'; did you mean 'tau'\?"),
        ({"tau": 0.0}, "tau=0.0"),
        ({"tau": "2"}, "tau='2'"),
        ({"gamma": -1.0}, "gamma=-1.0"),
        ({"alpha": 1.5}, "alpha=1.5"),
        ({"mode": "binary"}, "mode='binary'.*bernoulli.*softmax_bg"),
        ({"one2one": 1}, "one2one=1"),
    ],
)
def test_parse_args__bad_values_name_the_key(args: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^method 'kd-lightnet'.*{message}"):
        parse_args("kd-lightnet", args)


def test_parse_args__whole_numbers_are_numbers() -> None:
    assert parse_args("kd-lightnet", {"tau": 2, "gamma": 0}).model_dump()["tau"] == 2.0
