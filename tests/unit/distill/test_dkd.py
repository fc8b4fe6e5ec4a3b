"""DKD for sigmoids: target and other classes apart, on the foreground."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from taps_factory import Shape, foreground, make, random_taps, total

from kd_yolo.distill.ops.logits import bernoulli_kl
from kd_yolo.errors import ConfigError, DistillationError

SHAPE = Shape()


@pytest.mark.parametrize("tau", [1.0, 4.0])
def test_forward__terms_are_the_equations(tau: float) -> None:
    method = make("dkd", SHAPE, alpha=2.0, beta=3.0, tau=tau, weight=0.5)
    student, teacher, batch = random_taps(SHAPE, 0), random_taps(SHAPE, 1), foreground(SHAPE)
    target = others = omega = 0.0
    for image, anchor in batch["fg_mask"].nonzero().tolist():
        chosen = int(batch["target_labels"][image, anchor])
        weight = float(batch["target_scores"][image, anchor, chosen])
        omega += weight
        for k in range(SHAPE.classes):
            q, p = (float((x.scores[image, k, anchor] / tau).sigmoid()) for x in (student, teacher))
            divergence = weight * float(
                p * torch.log(torch.tensor(p / q)) + (1 - p) * torch.log(torch.tensor((1 - p) / (1 - q)))
            )
            target, others = (target + divergence, others) if k == chosen else (target, others + divergence)
    losses = method(student, teacher, batch)
    assert float(losses["kd_dkd_target"]) == pytest.approx(0.5 * 2 * tau**2 * target / omega, rel=1e-4)
    assert float(losses["kd_dkd_nontarget"]) == pytest.approx(0.5 * 3 * tau**2 * others / omega, rel=1e-4)


def test_forward__equal_factors_give_the_whole_divergence() -> None:
    # For sigmoids nothing couples the parts: alpha = beta = 1 is the plain foreground KL.
    student, teacher, batch = random_taps(SHAPE, 0), random_taps(SHAPE, 1), foreground(SHAPE)
    weight = batch["target_scores"].sum(2)
    whole = (weight.unsqueeze(1) * bernoulli_kl(student.scores, teacher.scores)).sum() / weight.sum()
    torch.testing.assert_close(total(make("dkd", SHAPE, beta=1.0)(student, teacher, batch)), whole)


def test_forward__background_has_no_gradient() -> None:
    student, batch = random_taps(SHAPE, 0, grad=True), foreground(SHAPE)
    torch.autograd.backward(total(make("dkd", SHAPE)(student, random_taps(SHAPE, 1), batch)))
    assert student.scores.grad is not None
    felt = student.scores.grad.abs().amax(1) > 0
    assert torch.equal(felt, batch["target_scores"].sum(2) > 0)


@pytest.mark.parametrize("batch", [{}, {"fg_mask": torch.zeros(2, 13, dtype=torch.bool)}], ids=["nothing", "no label"])
def test_forward__without_targets_the_teacher_chooses(batch: dict[str, Any]) -> None:
    student, teacher = random_taps(SHAPE, 0), random_taps(SHAPE, 1)
    highest, label = teacher.scores.max(1)
    weight = highest.sigmoid()
    kb = bernoulli_kl(student.scores, teacher.scores).gather(1, label.unsqueeze(1)).squeeze(1)
    losses = make("dkd", SHAPE)(student, teacher, batch)
    torch.testing.assert_close(losses["kd_dkd_target"], (weight * kb).sum() / weight.sum())
    empty = {**foreground(SHAPE), "fg_mask": torch.zeros(2, 13, dtype=torch.bool)}
    torch.testing.assert_close(total(make("dkd", SHAPE)(student, teacher, empty)), total(losses))


def test_forward__foreground_of_an_unknown_class_does_not_count() -> None:
    known = torch.tensor([True, False, True])
    student, batch = random_taps(SHAPE, 0, grad=True), foreground(SHAPE)
    teacher = replace(random_taps(SHAPE, 1), class_mask=known)
    torch.autograd.backward(total(make("dkd", SHAPE)(student, teacher, batch)))
    assert student.scores.grad is not None
    felt = student.scores.grad.abs().amax(1) > 0
    assert torch.equal(felt, (batch["target_scores"] * known).sum(2) > 0)


def test_init__one_class_has_no_nontarget_term() -> None:
    shape = Shape(classes=1)
    method = make("dkd", shape)
    assert method.terms == ("kd_dkd_target",)
    assert tuple(method(random_taps(shape, 0), random_taps(shape, 1), foreground(shape))) == method.terms


@pytest.mark.parametrize(("classes", "args"), [(3, {"alpha": 0.0, "beta": 0.0}), (1, {"alpha": 0.0})])
def test_init__nothing_to_distil_is_refused(classes: int, args: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"dkd: no term is left.*{classes} classes"):
        make("dkd", Shape(classes=classes), **args)


def test_forward__targets_of_other_anchors_are_refused() -> None:
    batch = foreground(SHAPE)
    batch["target_labels"] = batch["target_labels"][:, 1:]
    with pytest.raises(DistillationError, match=r"target_labels is \(2, 12\)"):
        make("dkd", SHAPE)(random_taps(SHAPE, 0), random_taps(SHAPE, 1), batch)
