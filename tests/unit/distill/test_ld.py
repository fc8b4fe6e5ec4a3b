"""LD: the divergence, the two regions, and the detectors it must refuse."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from taps_factory import Shape, foreground, make, random_taps, total
from torch import Tensor

from kd_yolo.distill.methods.ld import LD
from kd_yolo.distill.ops.regions import ground_truth_corners, positive_threshold, valuable_region
from kd_yolo.errors import ConfigError

# Two levels of a canvas of 64: strides 8 and 16.
SHAPE = Shape(sizes=((8, 8), (4, 4)), reg_max=4)


def divergence(student: Tensor, teacher: Tensor, tau: float, bins: int) -> Tensor:
    """Return LD of every anchor, (B, A), written out from the definition."""
    shape = (student.shape[0], 4, bins, student.shape[-1])
    p, q = ((x.double().reshape(shape) / tau).softmax(2) for x in (teacher, student))
    return tau**2 * (p * (p / q).log()).sum(2).mean(1)


def anchors_of(shape: Shape) -> tuple[Tensor, Tensor, list[int]]:
    taps = random_taps(shape, 0)
    return taps.anchors * taps.strides[:, None], taps.strides, [h * w for h, w in shape.sizes]


def square(cx: float, cy: float, side: float) -> Tensor:
    return torch.tensor([[cx - side / 2, cy - side / 2, cx + side / 2, cy + side / 2]])


@pytest.mark.parametrize(("student", "teacher"), [(1, 1), (1, 16), (16, 1), (8, 16)])
def test_ld__needs_one_reg_max_above_1_and_names_both(student: int, teacher: int) -> None:
    with pytest.raises(ConfigError, match=rf"reg_max above 1: the student has {student}, the teacher {teacher}; use"):
        make("ld", Shape(reg_max=student), Shape(reg_max=teacher))


def test_ld__golden_value() -> None:
    # Two bins, tau 2, one image, every anchor foreground. Teacher logits (2 ln 3, 0) on all four sides: p = (3/4, 1/4);
    # student (0, 0): q = (1/2, 1/2). LD = tau^2 (3/4 ln 3/2 + 1/4 ln 1/2) at every anchor.
    shape = Shape(images=1, reg_max=2)
    student, teacher = random_taps(shape, 0), random_taps(shape, 1)
    student.boxes.zero_()
    teacher.boxes.zero_()
    teacher.boxes[:, 0::2] = 2 * math.log(3.0)
    everywhere = {"fg_mask": torch.ones(1, 13, dtype=torch.bool)}
    expected = 4 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert make("ld", shape, tau=2.0)(student, teacher, everywhere)["kd_ld"].item() == pytest.approx(expected, rel=1e-5)


def test_ld__is_the_mean_over_each_region() -> None:
    student, teacher, batch = random_taps(SHAPE, 0), random_taps(SHAPE, 1), foreground(SHAPE)
    method = make("ld", SHAPE, vlr_weight=0.5)
    assert isinstance(method, LD)
    per_anchor = divergence(student.boxes, teacher.boxes, 10.0, 4)
    main = batch["fg_mask"]
    centres, strides, sizes = anchors_of(SHAPE)
    truth = ground_truth_corners(batch, 2, (64, 64), torch.device("cpu"))
    near = valuable_region(truth, centres, 8 * strides, sizes, 0.25) & ~main
    assert 0 < int(near.sum()) < int((~main).sum())  # a part of the rest, neither none nor all
    expected = per_anchor[main].mean() + 0.5 * per_anchor[near].mean()
    assert method(student, teacher, batch)["kd_ld"].item() == pytest.approx(expected.item(), rel=1e-5)
    alone = make("ld", SHAPE, vlr_weight=0.0)(student, teacher, batch)["kd_ld"]
    assert alone.item() == pytest.approx(per_anchor[main].mean().item(), rel=1e-5)


@pytest.mark.parametrize("missing", ["fg_mask", "bboxes", "batch_idx"])
def test_ld__goes_on_with_what_the_batch_has(missing: str) -> None:
    student, teacher = random_taps(SHAPE, 0, grad=True), random_taps(SHAPE, 1)
    batch = {key: value for key, value in foreground(SHAPE).items() if key != missing}
    loss = make("ld", SHAPE)(student, teacher, batch)["kd_ld"]
    torch.autograd.backward(loss)
    assert loss.item() > 0
    assert student.boxes.grad is not None
    assert bool(torch.isfinite(student.boxes.grad).all())


def test_ld__no_box_is_no_loss_and_no_gradient_however_large_the_factor() -> None:
    student, teacher = random_taps(SHAPE, 0, grad=True), random_taps(SHAPE, 1)
    none: dict[str, Any] = {
        "fg_mask": torch.zeros(2, 80, dtype=torch.bool),
        "bboxes": torch.zeros(0, 4),
        "batch_idx": torch.zeros(0),
    }
    loss = total(make("ld", SHAPE, weight=1e4)(student, teacher, none))
    torch.autograd.backward(loss * 16)
    assert loss.item() == 0.0
    assert student.boxes.grad is not None
    assert float(student.boxes.grad.abs().max()) == 0.0  # 1 / (smallest float) would overflow, and 0 * inf is NaN


# ---- the valuable region ---------------------------------------------------------------------------------------------


def test_ground_truth_corners__pixels_by_image() -> None:
    batch = {
        "bboxes": torch.tensor([[0.5, 0.5, 0.5, 0.25], [0.25, 0.5, 0.5, 1.0]]),
        "batch_idx": torch.tensor([2.0, 0.0]),
    }
    corners = ground_truth_corners(batch, 3, (64, 32), torch.device("cpu"))
    assert [c.tolist() for c in corners] == [[[0.0, 0.0, 32.0, 32.0]], [], [[16.0, 12.0, 48.0, 20.0]]]


def test_positive_threshold__golden_value() -> None:
    # One level of two anchors, both 10 x 10, at (0, 0)-(10, 10) and (20, 0)-(30, 10); the truth is the first: IoU 1, 0.
    # Mean 1/2, standard deviation 1/2: threshold 1.
    anchors = torch.cat([square(5, 5, 10), square(25, 5, 10)]).unsqueeze(0)
    assert positive_threshold(square(5, 5, 10), anchors, [2]).item() == pytest.approx(1.0, abs=1e-5)


def test_positive_threshold__nine_closest_of_each_level() -> None:
    centres, strides, sizes = anchors_of(SHAPE)
    half = (8 * strides / 2).unsqueeze(1)
    anchors = torch.cat([centres - half, centres + half], 1)
    truth = square(20.0, 28.0, 30.0)
    overlaps = []
    for level in torch.split(anchors, sizes):
        middle = (level[:, :2] + level[:, 2:]) / 2
        order = (middle - torch.tensor([20.0, 28.0])).square().sum(1).argsort(stable=True)[:9]
        for x1, y1, x2, y2 in level[order].tolist():
            width, height = min(x2, 35.0) - max(x1, 5.0), min(y2, 43.0) - max(y1, 13.0)
            inter = max(width, 0.0) * max(height, 0.0)
            overlaps.append(inter / ((x2 - x1) * (y2 - y1) + 900.0 - inter))
    values = torch.tensor(overlaps)
    expected = float(values.mean() + values.std(unbiased=False))
    assert positive_threshold(truth, anchors.unsqueeze(0), sizes).item() == pytest.approx(expected, rel=1e-3)


def test_valuable_region__grows_when_gamma_falls_and_lies_around_the_box() -> None:
    centres, strides, sizes = anchors_of(SHAPE)
    truth = [square(32.0, 32.0, 40.0), torch.zeros(0, 4)]
    regions = [valuable_region(truth, centres, 4 * strides, sizes, gamma) for gamma in (1.0, 0.5, 0.25)]
    for inner, outer in pairwise(regions):
        assert bool((outer | ~inner).all())
        assert int(outer.sum()) > int(inner.sum())
    assert not bool(regions[-1][1].any())  # the image without ground truth
    inside = (centres - 32).abs().amax(1) <= 28
    assert bool(inside[regions[-1][0]].all())


def test_valuable_region__no_defect_is_too_small() -> None:
    centres, strides, sizes = anchors_of(SHAPE)
    region = valuable_region([square(1.0, 63.0, 0.5)], centres, 8 * strides, sizes, 1.0)
    assert int(region.sum()) >= 1


@pytest.mark.parametrize("given", [{"tau": 0.0}, {"gamma": 0.0}, {"gamma": 1.5}, {"anchor_scale": 0.0}])
def test_ld__bad_arguments_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(given))}="):
        make("ld", SHAPE, **given)
