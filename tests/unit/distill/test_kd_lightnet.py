"""``kd-lightnet`` as a method: anchor weights, the one-to-one head, boxes and arguments."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from taps_factory import Shape, foreground, leaves, make, random_taps, total
from ultralytics.nn.modules.block import DFL
from ultralytics.utils.tal import dist2bbox

from kd_yolo.distill.base import build_method, parse_args
from kd_yolo.distill.methods.kd_lightnet import KDLightNet, class_loss
from kd_yolo.distill.ops.boxes import decode_boxes, distribution_loss, overlap_loss
from kd_yolo.distill.ops.logits import teacher_confidence
from kd_yolo.errors import ConfigError, DistillationError, TeacherError

SHAPE = Shape()
MODES = ["bernoulli", "softmax_bg", "softmax"]
LOGIT_QUARTER = math.log(0.25 / 0.75)


# -- anchor weights --------------------------------------------------------------------------------------------------


def test_anchor_weight__without_foreground_alpha_counts_as_one() -> None:
    student, teacher = random_taps(SHAPE, 0), random_taps(SHAPE, 1)
    half, one = (make("kd-lightnet", SHAPE, alpha=alpha) for alpha in (0.5, 1.0))
    assert torch.equal(total(half(student, teacher, {})), total(one(student, teacher, foreground(SHAPE))))
    assert not torch.equal(total(half(student, teacher, {})), total(half(student, teacher, foreground(SHAPE))))


def test_forward__alpha_zero_without_any_foreground_gives_zero_not_nan() -> None:
    student, teacher = random_taps(SHAPE, 0, grad=True), random_taps(SHAPE, 1)
    losses = make("kd-lightnet", SHAPE, alpha=0.0, one2one=False)(student, teacher, foreground(SHAPE, share=0.0))
    assert losses["kd_cls"].item() == 0.0
    torch.autograd.backward(total(losses))
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
    dropped = []
    for taps in (student, teacher):
        assert taps.scores_one2one is not None
        dropped.append(replace(taps, scores=taps.scores[:, keep], scores_one2one=taps.scores_one2one[:, keep]))
    expected = make("kd-lightnet", Shape(classes=2), mode=mode, one2one=True)(*dropped, batch)
    losses = make("kd-lightnet", SHAPE, mode=mode, one2one=True)(student, masked, batch)
    for term, value in losses.items():
        torch.testing.assert_close(value, expected[term], rtol=1e-6, atol=1e-9)


# -- the one-to-one head ---------------------------------------------------------------------------------------------


def test_forward__one2one_adds_the_same_loss_weighted_by_confidence_alone() -> None:
    student, teacher, batch = random_taps(SHAPE, 0, grad=True), random_taps(SHAPE, 1), foreground(SHAPE)
    plain = make("kd-lightnet", SHAPE, one2one=False)(student, teacher, batch)
    both = make("kd-lightnet", SHAPE, one2one=True)(student, teacher, batch)
    assert torch.equal(make("kd-lightnet", SHAPE)(student, teacher, batch)["kd_cls"], both["kd_cls"])
    assert student.scores_one2one is not None
    assert teacher.scores_one2one is not None
    confidence = teacher_confidence(teacher.scores_one2one)
    extra = class_loss(student.scores_one2one, teacher.scores_one2one, confidence, 1.0, 0.0)
    torch.testing.assert_close(both["kd_cls"], plain["kd_cls"] + extra)
    assert torch.equal(both["kd_box"], plain["kd_box"])
    torch.autograd.backward(total(plain))
    assert student.scores_one2one.grad is None
    torch.autograd.backward(total(both))
    assert student.scores_one2one.grad is not None


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_forward__one2one_without_that_head_is_refused(side: str) -> None:
    student, teacher = (random_taps(SHAPE, i, one2one=side != name) for i, name in enumerate(("student", "teacher")))
    with pytest.raises(TeacherError, match=f"one2one=true, but the {side} has no one-to-one head; set one2one=false"):
        make("kd-lightnet", SHAPE, one2one=True)(student, teacher, {})
    left_out = make("kd-lightnet", SHAPE, one2one=False)(student, teacher, {})
    assert torch.equal(make("kd-lightnet", SHAPE)(student, teacher, {})["kd_cls"], left_out["kd_cls"])


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
    boxes.requires_grad_()
    optimizer = torch.optim.Adam([boxes], lr=0.3)
    for _ in range(400):
        optimizer.zero_grad()
        torch.autograd.backward(overlap_loss(boxes, teacher, torch.ones(1, 1)))
        optimizer.step()
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
        ({}, ("kd_cls", "kd_box"), {"scores", "boxes", "scores_one2one"}),
        ({"one2one": False}, ("kd_cls", "kd_box"), {"scores", "boxes"}),
        ({"box_weight": 0.0}, ("kd_cls",), {"scores", "scores_one2one"}),
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
