"""How HFLKD's terms are weighed: what trains, what the student feels, what stays bounded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from taps_factory import Shape, foreground, leaves, make, map_leaves, random_taps, total
from torch import Tensor, nn

from kd_yolo.distill.base import DistillMethod, Taps
from kd_yolo.distill.ops import weighting
from kd_yolo.errors import DistillationError

SHAPE = Shape(images=4)
MODES = ("fixed", "frozen", "regularised", "uncertainty", "bilevel")
LEARNED = ("regularised", "uncertainty", "bilevel")


def connected_taps(seed: int, shape: Shape = SHAPE, mean: float = 0.0) -> Taps:
    """Return student taps whose class logits come from the neck maps, of the given mean, as a detector's do."""
    taps = map_leaves(random_taps(shape, seed, grad=True), lambda x: x + mean)
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for feature in taps.neck:
        weight = torch.randn(shape.classes, feature.shape[1], generator=generator)
        parts.append(torch.einsum("kc,bchw->bkhw", weight, feature).flatten(2))
    return replace(taps, scores=torch.cat(parts, -1) - 1.0)


def run(method: DistillMethod, seed: int = 0) -> tuple[dict[str, Tensor], Taps]:
    student = connected_taps(seed)
    return method(student, random_taps(SHAPE, seed + 50), foreground(SHAPE, seed)), student


def weight_parameters(method: DistillMethod) -> dict[str, Tensor]:
    """Return a copy of what sets the weights."""
    return {
        name: value.detach().clone()
        for name, value in method.named_parameters()
        if name.startswith(("predictor", "log_variance"))
    }


def train(method: DistillMethod, steps: int = 10, lr: float = 0.1) -> Iterator[dict[str, Tensor]]:
    """Train the method alone on changing taps, with weight decay, and yield the losses of every step."""
    for parameter in method.parameters():
        parameter.requires_grad_(True)  # as Ultralytics' trainer does with every parameter it finds frozen
    optimizer = torch.optim.AdamW(method.parameters(), lr=lr, weight_decay=0.01)
    for step in range(steps):
        losses, _ = run(method, step)
        optimizer.zero_grad()
        torch.autograd.backward(total(losses))
        optimizer.step()
        yield losses


@pytest.mark.parametrize("mode", MODES)
def test_forward__every_mode_is_finite_not_negative_and_scaled_by_weight(mode: str) -> None:
    one, student = run(make("hflkd", SHAPE, weighting=mode))
    three, _ = run(make("hflkd", SHAPE, weighting=mode, weight=3.0))
    assert all(float(x.detach()) >= 0 for x in one.values())
    torch.testing.assert_close(total(three), 3 * total(one))
    torch.autograd.backward(total(one))
    for feature in student.neck:
        assert feature.grad is not None
        assert bool(torch.isfinite(feature.grad).all())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("batch", [{}, {"fg_mask": torch.zeros(4, 13, dtype=torch.bool)}], ids=["nothing", "no box"])
def test_forward__every_mode_without_targets(mode: str, batch: dict[str, Any]) -> None:
    method = make("hflkd", SHAPE, weighting=mode)
    losses = method(connected_taps(0), random_taps(SHAPE, 1), batch)
    assert float(losses["kd_hfl_rel"].detach()) == 0.0
    torch.autograd.backward(total(losses))
    assert all(bool(torch.isfinite(p.grad).all()) for p in method.parameters() if p.grad is not None)


@pytest.mark.parametrize("mode", LEARNED)
def test_forward__what_trains_the_weights_leaves_value_and_student_gradient_alone(mode: str) -> None:
    method = make("hflkd", SHAPE, weighting=mode)
    losses, student = run(method)
    torch.autograd.backward(total(losses))
    plain = make("hflkd", SHAPE)
    plain.load_state_dict({k: v for k, v in method.state_dict().items() if k in plain.state_dict()})
    fixed, twin = run(plain)
    factors = {name: float((losses[name] / fixed[name]).detach()) for name in fixed}
    torch.autograd.backward(torch.stack([factors[name] * fixed[name] for name in fixed]).sum())
    for mine, theirs in zip(student.neck, twin.neck, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-7)
    grads = [p.grad for n, p in method.named_parameters() if n in weight_parameters(method)]
    assert any(float(grad.abs().max()) > 0 for grad in grads if grad is not None)


@pytest.mark.parametrize("mode", LEARNED)
def test_train__learned_modes_move_their_weights(mode: str) -> None:
    method = make("hflkd", SHAPE, weighting=mode)
    before = weight_parameters(method)
    list(train(method, steps=2))
    after = weight_parameters(method)
    assert before
    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("mode", ["fixed", "frozen"])
def test_train__frozen_predictor_stays_bit_identical_and_the_projection_learns(mode: str) -> None:
    method = make("hflkd", SHAPE, weighting=mode)
    before = {name: p.detach().clone() for name, p in method.named_parameters()}
    list(train(method, steps=2))
    for name, parameter in method.named_parameters():
        assert torch.equal(parameter, before[name]) is name.startswith("predictor"), name


def test_predicted_weights__frozen_lets_the_gradient_into_the_student_and_others_do_not() -> None:
    feature = torch.randn(2, 6, 2, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    predictor = weighting.weight_predictor(6, 3)
    torch.autograd.backward(weighting.predicted_weights(predictor, feature, 0.0, 1.0, frozen=True).sum())
    assert feature.grad is not None
    assert float(feature.grad.abs().max()) > 0
    assert all(p.grad is None for p in predictor.parameters())
    feature.grad = None
    torch.autograd.backward(weighting.predicted_weights(predictor, feature, 0.1, 2.0).sum())
    assert feature.grad is None
    assert any(float(p.grad.abs().max()) > 0 for p in predictor.parameters() if p.grad is not None)


def test_train__regularised_never_leaves_its_bounds_and_does_not_collapse() -> None:
    method = make("hflkd", SHAPE, weighting="regularised")
    found = []
    for step, losses in enumerate(train(method, steps=30, lr=0.5)):  # a rate far too high on purpose
        feature = random_taps(SHAPE, step).neck[-1]
        predictor = method.predictor
        assert isinstance(predictor, nn.Sequential)
        found.append(weighting.predicted_weights(predictor, feature, 0.1, 2.0).detach())
        assert all(bool(torch.isfinite(x)) for x in losses.values())
    weights = torch.stack(found)
    assert float(weights.min()) >= 0.1
    assert float(weights.max()) <= 2.0


def test_regularised_objective__settles_where_the_average_says_and_the_naive_sum_at_the_lower_bound() -> None:
    # d/dw (w L / ema - log w) = 0 at w = ema / L: 0.5 and 1.25 here. The plain sum of w L has its minimum at 0.
    losses, average = torch.tensor([0.02, 4.0]), torch.tensor([0.01, 5.0])
    settled = []
    for naive in (False, True):
        logit = torch.zeros(2, requires_grad=True)
        optimizer = torch.optim.Adam([logit], lr=0.05)
        for _ in range(600):
            weights = 0.1 + 1.9 * logit.sigmoid()
            own = weights * losses if naive else weighting.regularised_objective(weights, losses, average, 1.0)
            optimizer.zero_grad()
            torch.autograd.backward(own.sum())
            optimizer.step()
        settled.append((0.1 + 1.9 * logit.sigmoid()).detach())
    torch.testing.assert_close(settled[0], torch.tensor([0.5, 1.25]), atol=0.01, rtol=0)
    assert float(settled[1].max()) < 0.12


def test_regularised_objective__a_term_that_is_0_teaches_nothing() -> None:
    weights = torch.ones(2, requires_grad=True)
    torch.autograd.backward(
        weighting.regularised_objective(weights, torch.tensor([0.0, 1.0]), torch.tensor([0.0, 2.0]), 0.1).sum()
    )
    assert weights.grad is not None
    assert float(weights.grad[0]) == 0.0
    assert float(weights.grad[1]) == pytest.approx(0.1 * (1 / 2 - 1))


def test_moving_average__first_value_then_decay_and_zeros_do_not_count() -> None:
    start = weighting.moving_average(torch.zeros(3), torch.tensor([2.0, 0.0, 1e-9]))
    torch.testing.assert_close(start, torch.tensor([2.0, 0.0, 1e-6]))
    after = weighting.moving_average(start, torch.tensor([1.0, 3.0, 0.0]))
    torch.testing.assert_close(after, torch.tensor([0.98 * 2 + 0.02, 3.0, 1e-6]))


def test_forward__regularised_average_is_a_buffer_that_only_training_moves() -> None:
    method = make("hflkd", SHAPE, weighting="regularised")
    before = method.state_dict()["loss_average"].clone()
    method.eval()
    run(method)
    assert torch.equal(method.state_dict()["loss_average"], before)
    method.train()
    run(method)
    assert float(method.state_dict()["loss_average"].min()) > 0


def test_train__uncertainty_settles_at_the_log_of_twice_the_loss_within_its_bounds() -> None:
    # d/dv (exp(-v) L + v / 2) = 0 at v = log 2L; below L = exp(-3) / 2 = 0.025 the bound holds.
    method = make("hflkd", SHAPE, weighting="uncertainty", alpha=0.0, mu=1e-4, nu=2.0)
    variance = method.log_variance
    assert isinstance(variance, nn.Parameter)
    student, teacher, batch = random_taps(SHAPE, 0), random_taps(SHAPE, 1), foreground(SHAPE)
    optimizer = torch.optim.Adam([variance], lr=0.05)
    for _ in range(400):
        optimizer.zero_grad()
        torch.autograd.backward(total(method(student, teacher, batch)))
        optimizer.step()
    plain = make("hflkd", SHAPE, alpha=0.0, mu=1e-4, nu=2.0)(student, teacher, batch)
    wanted = torch.log(2 * torch.stack(list(plain.values()))).clamp_min(-3.0)
    torch.testing.assert_close(variance.detach(), wanted, atol=0.1, rtol=0)
    assert float(wanted[0]) == -3.0


def test_alignment__sign_says_whether_a_term_helps() -> None:
    # The held-out images and the term's images share features; a term that is the class loss itself helps, its
    # negative hurts. Both are compared through the virtual layer, not position by position.
    student, batch = connected_taps(3), foreground(SHAPE, 3)
    target = batch["target_scores"]
    goal = weighting.layer_gradients(weighting.class_loss(student.scores[:1], target[:1]), student.neck, slice(0, 1))
    loss = weighting.class_loss(student.scores[1:], target[1:])
    assert goal is not None
    helps = weighting.alignment(weighting.layer_gradients(loss, student.neck, slice(1, None)), goal)
    hurts = weighting.alignment(weighting.layer_gradients(-loss, student.neck, slice(1, None)), goal)
    assert 0.3 < float(helps) <= 1.0
    assert float(hurts) == pytest.approx(-float(helps))
    assert float(weighting.alignment(None, goal)) == 0.0


def test_layer_gradients__equal_those_of_an_identity_layer() -> None:
    shape = Shape(images=3, sizes=((3, 2),), channels=(4,), strides=(8,))
    feature = random_taps(shape, 0, torch.float64, grad=True).neck[0]
    layer = torch.eye(4, dtype=torch.float64, requires_grad=True)
    head = torch.randn(5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def loss(values: Tensor) -> Tensor:
        return torch.einsum("kc,bchw->bkhw", head, values)[1:].square().sum()

    (wanted,) = torch.autograd.grad(loss(torch.einsum("dc,bchw->bdhw", layer, feature)), layer)
    found = weighting.layer_gradients(loss(feature), [feature], slice(1, None))
    assert found is not None
    torch.testing.assert_close(found, wanted.flatten())
    assert weighting.layer_gradients(layer.sum(), [feature], slice(None)) is None


@pytest.mark.parametrize(("says", "rises"), [(-6.0, True), (6.0, False)], ids=["helps", "hurts"])
def test_forward__bilevel_raises_the_weight_of_a_term_that_helps_alone(says: float, rises: bool) -> None:
    # No object anywhere: the held-out class loss wants every logit down. So does a teacher that says -6, and one that
    # says +6 wants the opposite. Features of mean 0 could not tell: a layer without bias cannot shift all logits then.
    method = make("hflkd", SHAPE, weighting="bilevel", alpha=0.0, mu=0.0, gamma=0.0)
    batch = {"target_scores": torch.zeros(4, 13, 3)}
    student = connected_taps(3, mean=2.0)
    teacher = replace(random_taps(SHAPE, 4), scores=torch.full((4, 3, 13), says))
    predictor = method.predictor
    assert isinstance(predictor, nn.Sequential)
    optimizer = torch.optim.Adam(predictor.parameters(), lr=1e-3)
    weights = []
    for _ in range(20):
        weights.append(float(weighting.predicted_weights(predictor, student.neck[-1], 0.1, 2.0).detach()))
        optimizer.zero_grad()
        torch.autograd.backward(total(method(student, teacher, batch)), retain_graph=True)
        optimizer.step()
    assert (weights[-1] > weights[0] + 0.1) is rises
    assert (weights[-1] < weights[0] - 0.1) is not rises


def test_forward__bilevel_without_a_path_to_the_neck_says_so() -> None:
    method = make("hflkd", SHAPE, weighting="bilevel")
    with pytest.raises(DistillationError, match=r"bilevel needs class logits that depend on the neck.*amp=false"):
        method(random_taps(SHAPE, 0, grad=True), random_taps(SHAPE, 1), foreground(SHAPE))


def test_forward__bilevel_of_a_single_image_holds_nothing_out() -> None:
    shape = Shape(images=1)
    method = make("hflkd", shape, weighting="bilevel")
    torch.autograd.backward(total(method(connected_taps(0, shape), random_taps(shape, 1), foreground(shape))))
    assert all(p.grad is None or not p.grad.any() for n, p in method.named_parameters() if n.startswith("predictor"))
    assert [weighting.held_out_images(n) for n in (1, 2, 7, 16)] == [0, 1, 1, 4]


def test_train__teacher_is_bit_identical_and_gets_no_gradient() -> None:
    teacher = random_taps(SHAPE, 1, grad=True)
    before = map_leaves(teacher, lambda x: x)
    for mode in MODES:
        method = make("hflkd", SHAPE, weighting=mode, embed="teacher")
        torch.autograd.backward(total(method(connected_taps(0), teacher, foreground(SHAPE))))
    for mine, theirs in zip(leaves(teacher), leaves(before), strict=True):
        assert torch.equal(mine, theirs)
        assert mine.grad is None
