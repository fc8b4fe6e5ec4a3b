"""HFLKD as a method: its terms against a plain rewriting of the equations, its options, its refusals."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from taps_factory import Shape, foreground, inference_copy, leaves, make, map_leaves, random_taps, total
from torch import Tensor, nn

from kd_yolo.distill.base import DistillMethod, Taps
from kd_yolo.errors import ConfigError

SHAPE = Shape()
WIDE = Shape(channels=(8, 12))


def kb(student: Tensor, teacher: Tensor) -> Tensor:
    p, q = teacher.sigmoid(), student.sigmoid()
    return p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()


def features_by_hand(method: DistillMethod, student: Taps, teacher: Taps, grid: int, embed: str, query: str) -> float:
    """Return L_F from the equations: loops over levels and heads, the matrix M written out."""
    projections, scales = method.projections, method.logit_scale
    assert isinstance(projections, nn.ModuleList)
    assert isinstance(scales, Tensor)
    confidence = teacher.scores.sigmoid().amax(1)
    start, losses = 0, []
    for level, (mine, theirs) in enumerate(zip(student.neck, teacher.neck, strict=True)):
        height, width = theirs.shape[-2:]
        size = (min(height, grid), min(width, grid))
        c = confidence[:, start : start + height * width].reshape(-1, 1, height, width)
        start += height * width
        s, e, c = (F.adaptive_avg_pool2d(x, size) for x in (mine, theirs, c))
        projection = projections[level]
        s, e = (projection(s), e) if embed == "student" else (s, projection(e))
        s, e = (F.batch_norm(x, None, None, training=True, eps=1e-6).flatten(2) for x in (s, e))
        channels = s.shape[1]
        heads = max(h for h in range(1, 9) if channels % h == 0)
        mixed = []
        for a, b in zip(s.chunk(heads, 1), e.chunk(heads, 1), strict=True):
            asking, asked = (b, a) if query == "teacher" else (a, b)
            logits = scales[level].exp() * asking.transpose(1, 2) @ asked / (channels // heads) ** 0.5
            mixed.append(a @ logits.softmax(-1).transpose(1, 2))
        difference = (torch.cat(mixed, 1) - e).square().sum(1)
        losses.append((c.flatten(1) * difference).sum() / (channels * c.sum()))
    return float(torch.stack(losses).mean().detach())


@pytest.mark.parametrize("embed", ["student", "teacher"])
@pytest.mark.parametrize("query", ["student", "teacher"])
@pytest.mark.parametrize("grid", [20, 2])
def test_forward__feature_term_is_the_equation(embed: str, query: str, grid: int) -> None:
    teacher_shape = Shape(channels=(16, 7))
    method = make("hflkd", WIDE, teacher_shape, embed=embed, query=query, grid=grid, sharpness=1.5, alpha=2.0)
    student, teacher = random_taps(WIDE, 0), random_taps(teacher_shape, 1)
    found = float(method(student, teacher, {})["kd_hfl_feat"].detach())
    assert found == pytest.approx(2.0 * features_by_hand(method, student, teacher, grid, embed, query), rel=1e-5)


@pytest.mark.parametrize("tau", [1.0, 4.0])
def test_forward__logit_terms_are_the_equations(tau: float) -> None:
    method = make("hflkd", SHAPE, alpha=0.0, mu=0.5, nu=3.0, tau=tau, gamma=2.0, floor=0.2)
    student, teacher, batch = random_taps(SHAPE, 0), random_taps(SHAPE, 1), foreground(SHAPE)
    rel = irr = omega = v = 0.0
    for image in range(SHAPE.images):
        for anchor in range(13):
            target = int(batch["target_labels"][image, anchor]) if batch["fg_mask"][image, anchor] else None
            for k in range(SHAPE.classes):
                s, t = student.scores[image, k, anchor], teacher.scores[image, k, anchor]
                divergence = float(kb(s / tau, t / tau))
                if k == target:
                    weight = float(batch["target_scores"][image, anchor, k])
                    rel, omega = rel + weight * divergence, omega + weight
                else:
                    weight = max(float(t.sigmoid()), 0.2) ** 2
                    irr, v = irr + weight * divergence, v + weight
    losses = method(student, teacher, batch)
    assert float(losses["kd_hfl_rel"]) == pytest.approx(0.5 * tau**2 * rel / omega, rel=1e-4)
    assert float(losses["kd_hfl_irr"]) == pytest.approx(3.0 * tau**2 * irr / v, rel=1e-4)


def test_forward__irrelevant_term_is_not_0_for_one_class() -> None:
    shape = Shape(classes=1)
    losses = make("hflkd", shape)(random_taps(shape, 0), random_taps(shape, 1), foreground(shape))
    assert float(losses["kd_hfl_irr"].detach()) > 1e-3


def test_forward__logit_terms_vanish_at_equality() -> None:
    teacher = random_taps(SHAPE, 1)
    student = map_leaves(random_taps(SHAPE, 1, grad=True), lambda x: x)
    losses = make("hflkd", SHAPE, alpha=0.0)(student, teacher, foreground(SHAPE))
    torch.autograd.backward(total(losses))
    assert float(total(losses).detach()) == 0.0
    assert student.scores.grad is not None
    assert float(student.scores.grad.abs().max()) < 1e-7


def test_forward__without_targets_every_logit_is_irrelevant() -> None:
    student, teacher = random_taps(SHAPE, 0), random_taps(SHAPE, 1)
    losses = make("hflkd", SHAPE, nu=1.0)(student, teacher, {})
    v = teacher.scores.sigmoid().clamp_min(0.01)
    assert float(losses["kd_hfl_rel"].detach()) == 0.0
    assert float(losses["kd_hfl_irr"].detach()) == pytest.approx(
        float((v * kb(student.scores, teacher.scores)).sum() / v.sum()), rel=1e-4
    )


def test_forward__foreground_of_an_unknown_class_does_not_dilute_the_relevant_term() -> None:
    known = torch.tensor([True, False, True])
    student, batch = random_taps(SHAPE, 0), foreground(SHAPE)
    teacher = replace(random_taps(SHAPE, 1), class_mask=known)
    loss = make("hflkd", SHAPE)(student, teacher, batch)["kd_hfl_rel"]
    without = {**batch, "target_scores": batch["target_scores"] * known}
    assert torch.equal(loss, make("hflkd", SHAPE)(student, teacher, without)["kd_hfl_rel"])
    assert float(loss.detach()) > 0


def test_forward__background_hardly_counts_in_the_feature_term() -> None:
    # Confident in one cell of each level: what the student says elsewhere moves the loss far less.
    scores = torch.full((2, 3, 13), -12.0)
    scores[:, :, [4, 9]] = 3.0
    teacher = replace(random_taps(WIDE, 1), scores=scores)
    student = random_taps(WIDE, 0, grad=True)
    method = make("hflkd", WIDE, sharpness=50.0)  # nearly one-to-one, so that a position answers for itself
    torch.autograd.backward(method(student, teacher, {})["kd_hfl_feat"])
    reference = random_taps(WIDE, 0, grad=True)
    even = replace(teacher, scores=torch.full((2, 3, 13), -12.0))
    torch.autograd.backward(method(reference, even, {})["kd_hfl_feat"])
    assert student.neck[0].grad is not None
    assert reference.neck[0].grad is not None

    def share(grad: Tensor) -> float:
        norms = grad.square().sum(1).flatten(1).sqrt().sum(0)
        return float(norms.max() / norms.sum())

    assert share(student.neck[0].grad) > share(reference.neck[0].grad)


@pytest.mark.parametrize(
    ("args", "terms", "reads"),
    [
        ({}, ("kd_hfl_feat", "kd_hfl_rel", "kd_hfl_irr"), {"neck", "scores"}),
        ({"alpha": 0.0}, ("kd_hfl_rel", "kd_hfl_irr"), {"scores"}),
        ({"mu": 0.0, "nu": 0.0}, ("kd_hfl_feat",), {"neck", "scores"}),
        ({"weight": 0.0}, ("kd_hfl_feat", "kd_hfl_rel", "kd_hfl_irr"), set()),
    ],
)
def test_init__terms_and_reads_follow_the_factors(args: dict[str, Any], terms: tuple[str, ...], reads: Any) -> None:
    method = make("hflkd", SHAPE, **args)
    assert method.terms == terms
    assert method.reads == reads
    assert tuple(method(random_taps(SHAPE, 0), random_taps(SHAPE, 1), foreground(SHAPE))) == terms
    assert bool(list(method.parameters())) is ("kd_hfl_feat" in terms)


def test_forward__feature_term_does_not_need_the_assigner() -> None:
    method = make("hflkd", SHAPE, mu=0.0, nu=0.0)
    student, teacher = random_taps(SHAPE, 0), random_taps(SHAPE, 1)
    assert torch.equal(total(method(student, teacher, {})), total(method(student, teacher, foreground(SHAPE))))


def test_forward__embedding_an_inference_teacher_trains_the_projection() -> None:
    method = make("hflkd", SHAPE, embed="teacher")
    losses = method(random_taps(SHAPE, 0, grad=True), inference_copy(random_taps(SHAPE, 1)), {})
    torch.autograd.backward(losses["kd_hfl_feat"])
    assert all(p.grad is not None and float(p.grad.abs().max()) > 0 for p in method.parameters())


def test_forward__a_constant_student_is_no_way_out_when_the_teacher_is_embedded() -> None:
    # Without the normalisation both sides could agree on a constant; with it a constant map is all zero and the target
    # has variance 1: the loss is 1.
    method = make("hflkd", WIDE, embed="teacher", mu=0.0, nu=0.0)
    student = map_leaves(random_taps(WIDE, 0), torch.ones_like)
    teacher = replace(random_taps(WIDE, 1), scores=torch.zeros(2, 3, 13))
    assert float(method(student, teacher, {})["kd_hfl_feat"].detach()) == pytest.approx(1.0, abs=1e-3)


def test_forward__standardize_ignores_scale_and_offset_of_the_teacher() -> None:
    student, teacher, batch = random_taps(SHAPE, 0), random_taps(SHAPE, 1), foreground(SHAPE)
    stretched = replace(teacher, scores=2 * teacher.scores + 1)
    methods = [make("hflkd", SHAPE, alpha=0.0, standardize=on) for on in (True, False)]
    rel = [[float(method(student, t, batch)["kd_hfl_rel"]) for t in (teacher, stretched)] for method in methods]
    assert rel[0][0] == pytest.approx(rel[0][1], rel=1e-4)
    assert abs(rel[1][0] - rel[1][1]) > 1e-3


@pytest.mark.parametrize("name", ["hflkd", "dist", "dkd"])
@pytest.mark.parametrize("known", [None, (True, False, True)])
def test_forward__standardize_in_every_method_that_has_it(name: str, known: tuple[bool, ...] | None) -> None:
    method = make(name, SHAPE, standardize=True)
    student = random_taps(SHAPE, 0, grad=True)
    teacher = random_taps(SHAPE, 1)
    if known is not None:
        mask = torch.tensor(known)
        scores = teacher.scores.masked_fill(~mask[:, None], float("nan"))
        teacher = replace(teacher, scores=scores, class_mask=mask)
    losses = method(student, teacher, foreground(SHAPE))
    assert float(total(losses).detach()) != float(
        total(make(name, SHAPE)(student, teacher, foreground(SHAPE))).detach()
    )
    torch.autograd.backward(total(losses))
    assert student.scores.grad is not None
    assert bool(torch.isfinite(student.scores.grad).all())
    assert float(student.scores.grad[:, 0].abs().max()) > 0
    assert known is None or float(student.scores.grad[:, 1].abs().max()) == 0.0


@pytest.mark.parametrize("name", ["hflkd", "dist", "dkd"])
def test_init__standardize_with_one_class_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name}: standardize=true needs at least 2 classes.*found 1"):
        make(name, Shape(classes=1), standardize=True)


def test_init__nothing_to_distil_is_refused() -> None:
    with pytest.raises(ConfigError, match="hflkd: alpha, mu and nu are all 0"):
        make("hflkd", SHAPE, alpha=0.0, mu=0.0, nu=0.0)


@pytest.mark.parametrize(
    ("key", "value"),
    [("weighting", "naive"), ("query", "both"), ("grid", 41), ("w_low", 1.5), ("w_high", 0.5), ("floor", 0.0)],
)
def test_parse_args__out_of_range_is_refused_and_named(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"method 'hflkd': {key}="):
        make("hflkd", SHAPE, **{key: value})


def test_forward__learns_to_imitate() -> None:
    # Student features and logits as free parameters: all three terms fall when they follow the gradient.
    method = make("hflkd", WIDE)
    student, teacher, batch = random_taps(WIDE, 0, grad=True), random_taps(WIDE, 1), foreground(WIDE)
    used = leaves(student)[: len(student.neck) + 1]
    optimizer = torch.optim.Adam([*used, *method.parameters()], lr=0.05)
    history = []
    for _ in range(60):
        losses = method(student, teacher, batch)
        history.append({name: float(value.detach()) for name, value in losses.items()})
        optimizer.zero_grad()
        torch.autograd.backward(total(losses))
        optimizer.step()
    assert all(history[-1][name] < 0.3 * history[0][name] for name in method.terms), (history[0], history[-1])
