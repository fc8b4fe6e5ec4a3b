"""DIST: correlations over classes and over anchors."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from taps_factory import Shape, make, map_leaves, random_taps, total
from torch import Tensor
from ultralytics.utils import LOGGER

from kd_yolo.distill.methods.dist import correlation_distance, inter_class_loss, intra_class_loss
from kd_yolo.errors import ConfigError

SHAPE = Shape()


def draw(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).sigmoid()


def rho(a: Tensor, b: Tensor) -> float:
    """Return Pearson's correlation of two vectors by PyTorch."""
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1])


def test_correlation_distance__is_1_minus_pearson() -> None:
    student, teacher = draw(4, 9), draw(4, 9, seed=1)
    found = correlation_distance(student, teacher, torch.ones(1, 9, dtype=torch.float64), dim=1)
    for row in range(4):
        assert float(found[row]) == pytest.approx(1 - rho(student[row], teacher[row]), abs=1e-5)


@pytest.mark.parametrize(("scale", "offset", "distance"), [(2.0, 0.3, 0.0), (-1.0, 1.0, 2.0)])
def test_correlation_distance__ignores_scale_and_offset_but_not_sign(
    scale: float, offset: float, distance: float
) -> None:
    teacher = draw(3, 8)
    found = correlation_distance(scale * teacher + offset, teacher, torch.ones(1, 8, dtype=torch.float64), dim=1)
    torch.testing.assert_close(found, torch.full_like(found, distance), atol=1e-5, rtol=0)


def test_correlation_distance__constant_vectors_are_finite_with_gradient() -> None:
    for teacher in (draw(1, 5), torch.full((1, 5), 0.7, dtype=torch.float64)):
        student = torch.full((1, 5), 0.01, dtype=torch.float64, requires_grad=True)
        found = correlation_distance(student, teacher, torch.ones(1, 5, dtype=torch.float64), dim=1)
        torch.autograd.backward(found.sum())
        assert student.grad is not None
        assert bool(torch.isfinite(student.grad).all())


def test_inter_class_loss__golden_by_anchor_with_a_mask() -> None:
    student, teacher, weight = draw(2, 5, 3), draw(2, 5, 3, seed=1), draw(2, 3, seed=2)
    known = torch.tensor([True, True, False, True, True])
    wanted = sum(
        float(weight[b, a]) * (1 - rho(student[b, known, a], teacher[b, known, a])) for b in range(2) for a in range(3)
    ) / float(weight.sum())
    assert float(inter_class_loss(student, teacher, weight, known)) == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("known", [[True, True, False], [False, True, False], [False, False, False]])
def test_inter_class_loss__is_0_below_three_known_classes(known: list[bool]) -> None:
    loss = inter_class_loss(draw(1, 3, 4), draw(1, 3, 4, seed=1), draw(1, 4, seed=2), torch.tensor(known))
    assert float(loss) == 0.0


def test_intra_class_loss__golden_by_class_over_the_whole_batch() -> None:
    student, teacher, weight = draw(2, 3, 6), draw(2, 3, 6, seed=1), torch.tensor([1.0, 0.0, 3.0], dtype=torch.float64)
    by_class = [1 - rho(student[:, k].flatten(), teacher[:, k].flatten()) for k in range(3)]
    assert float(intra_class_loss(student, teacher, weight)) == pytest.approx(
        (by_class[0] + 3 * by_class[2]) / 4, abs=1e-5
    )


def test_forward__terms_are_the_weighted_equations() -> None:
    student, teacher = random_taps(SHAPE, 0, torch.float64), random_taps(SHAPE, 1, torch.float64)
    losses = make("dist", SHAPE, beta=2.0, gamma=0.5, tau=2.0, weight=3.0)(student, teacher, {})
    q, p, certain = (student.scores / 2).sigmoid(), (teacher.scores / 2).sigmoid(), teacher.scores.sigmoid()
    inter, intra = inter_class_loss(q, p, certain.amax(1)), intra_class_loss(q, p, certain.amax((0, 2)))
    torch.testing.assert_close(losses["kd_dist_inter"], 3 * 2 * 4 * inter)
    torch.testing.assert_close(losses["kd_dist_intra"], 3 * 0.5 * 4 * intra)


def test_forward__a_class_the_teacher_never_sees_hardly_counts() -> None:
    student, teacher = random_taps(SHAPE, 0), random_taps(SHAPE, 1)
    silent = teacher.scores.clone()
    silent[:, 1] -= 20.0
    method = make("dist", SHAPE, beta=0.0)
    noise = silent.clone()
    noise[:, 1] = noise[:, 1].flip(1)
    values = [
        float(method(student, replace(teacher, scores=scores), {})["kd_dist_intra"]) for scores in (silent, noise)
    ]
    assert values[0] == pytest.approx(values[1], rel=1e-6)


@pytest.mark.parametrize("classes", [1, 2])
def test_init__below_three_classes_only_the_intra_term_is_left_and_a_warning_says_so(
    classes: int, caplog: pytest.LogCaptureFixture
) -> None:
    LOGGER.addHandler(caplog.handler)
    try:
        with caplog.at_level(logging.WARNING):
            method = make("dist", Shape(classes=classes))
    finally:
        LOGGER.removeHandler(caplog.handler)
    assert method.terms == ("kd_dist_intra",)
    assert f"kd_dist_inter is left out: it needs 3 classes, found {classes}" in caplog.text


@pytest.mark.parametrize(("classes", "args"), [(3, {"beta": 0.0, "gamma": 0.0}), (2, {"gamma": 0.0})])
def test_init__nothing_to_distil_is_refused(classes: int, args: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"dist: no term is left.*{classes} classes"):
        make("dist", Shape(classes=classes), **args)


def test_forward__a_more_certain_teacher_of_the_same_order_is_nearly_free() -> None:
    # The paper's point: a stronger teacher differs in scale. Its probabilities scaled by 1.8 leave both terms at 0,
    # where a divergence does not.
    p = (torch.rand(2, 3, 13, generator=torch.Generator().manual_seed(0)) * 0.5 + 0.02).double()
    taps = map_leaves(random_taps(SHAPE, 0, torch.float64), lambda x: x)
    student, teacher = replace(taps, scores=p.logit()), replace(taps, scores=(1.8 * p).logit())
    assert float(total(make("dist", SHAPE)(student, teacher, {}))) < 1e-5
    assert float(total(make("kd-lightnet", SHAPE, box_weight=0.0)(student, teacher, {}))) > 1e-3
